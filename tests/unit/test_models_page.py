"""The page and the card say what the numbers say, no more, and nothing from outside gets through as markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import evaluation, words
from models.folds import JOINTLY
from models.page import write_card, write_page
from models.plots import learning_curve, small_group

# (name, group, AUROC of the first finding, of the second): the rows a real evaluation has.
ROWS: tuple[tuple[str, str, tuple[float, float]], ...] = (
    ("tokens", "fusion", (0.84, 0.71)),
    ("concatenation", "fusion", (0.82, 0.70)),
    ("weighted", "fusion", (0.81, 0.69)),
    ("gated", "fusion", (0.82, 0.68)),
    ("attention", "fusion", (0.80, 0.66)),
    ("film", "fusion", (0.79, 0.69)),
    ("lstm", "fusion", (0.78, 0.66)),
    ("graph", "fusion", (0.80, 0.67)),
    ("image alone", "single", (0.79, 0.64)),
    ("values alone", "single", (0.76, 0.69)),
    ("text alone", "single", (0.58, 0.52)),
    ("late_mean", "late", (0.81, 0.68)),
    ("late_stack", "late", (0.80, 0.67)),
    ("values: logistic regression", "baseline", (0.76, 0.66)),
    ("values: random forest", "baseline", (0.77, 0.67)),
    ("values: SVM", "baseline", (0.74, 0.64)),
    ("values: k-nearest neighbors", "baseline", (0.70, 0.60)),
    ("values: gradient boosting", "baseline", (0.75, 0.65)),
    ("image features: logistic regression", "baseline", (0.72, 0.58)),
    ("image features: SVM", "baseline", (0.73, 0.59)),
    ("both: logistic regression", "baseline", (0.78, 0.67)),
    ("both: random forest", "baseline", (0.79, 0.68)),
    ("missingness alone", "floor", (0.68, 0.61)),
    ("view alone", "floor", (0.77, 0.50)),
    ("acquisition alone", "floor", (0.66, 0.51)),
)


def around(value: float, half: float) -> list[float]:
    return [round(value, 4), round(max(0.0, value - 1.1 * half), 4), round(min(1.0, value + 0.9 * half), 4)]


def metrics(auroc: float, half: float) -> dict[str, list[float]]:
    names = ("auroc", "auprc", "accuracy", "precision", "recall", "f1", "specificity")
    return {name: around(auroc - 0.013 * i, half) for i, name in enumerate(names)} | {
        "brier": around(0.5 - auroc / 2.5, half / 3),
        "ece": around(0.06, half / 4),
    }


def curves(finding: int) -> dict[str, Any]:
    x = np.linspace(0, 1, 60)
    roc, pr = {}, {}
    for name, _, aurocs in ROWS:
        power = (1 - aurocs[finding]) / aurocs[finding]
        y = x**power
        roc[name] = {"x": x.tolist(), "y": y.tolist()}
        share = (0.44, 0.2)[finding]
        pr[name] = {"x": y[1:].tolist(), "y": (y[1:] * share / (y[1:] * share + x[1:] * (1 - share))).tolist()}
    predicted = np.linspace(0.06, 0.93, 9)
    coverage = np.linspace(0.05, 1, 40)
    risk = (0.05 + 0.2 * coverage**2) if finding == 0 else (0.3 - 0.05 * coverage + 0.01 * np.sin(30 * coverage))
    return {
        "roc": roc,
        "pr": pr,
        "reliability": {
            "predicted": predicted.tolist(),
            "observed": (predicted**1.3).tolist(),
            "count": [41.0, 33.0, 22.0, 17.0, 12.0, 14.0, 16.0, 19.0, 14.0],
        },
        "risk_coverage": {"coverage": coverage.tolist(), "risk": risk.tolist()},
    }


def sample() -> dict[str, Any]:
    """What an evaluation of two findings looks like; the figures are made up."""
    names = ("in_icu", "deceased")
    rows, differences, missing, subgroups = [], [], [], []
    for f, finding in enumerate(names):
        half = (0.07, 0.11)[f]
        for name, group, aurocs in ROWS:
            weights = None if group in {"baseline", "floor"} else 1_234_567
            rows.append({"finding": finding, "name": name, "group": group, "parameters": weights, "metrics": metrics(aurocs[f], half)})
        for b, low in (("image alone", 0.012), ("values alone", 0.021), ("late_mean", -0.011), ("both: random forest", -0.02)):
            gap = ROWS[0][2][f] - next(row[2][f] for row in ROWS if row[0] == b)
            p = 0.031 if low > 0 else 0.32
            differences.append(
                {
                    "finding": finding,
                    "a": "tokens",
                    "b": b,
                    "metric": "auroc",
                    "difference": [round(gap, 4), low - 0.08 * f, round(gap + 0.05, 4)],
                    "p": p if not f else 0.7,
                }
            )
        for name, loss in (("image", 0.07), ("values", 0.05), ("text", 0.01)):
            missing.append({"finding": finding, "name": f"without {name}", "metrics": metrics(ROWS[0][2][f] - loss, half)})
        for part, loss in ((30, 0.01), (60, 0.03)):
            missing.append({"finding": finding, "name": f"{part} % of values dropped", "metrics": metrics(ROWS[0][2][f] - loss, half)})
        for by, group, studies, positives in (
            ("sex", "F", 70, 27),
            ("sex", "M", 118, 56),
            ("age", "under 50", 48, 9),
            ("age", "50 to 69", 88, 46),
            ("age", "70 and over", 52, 28),
            ("view", "AP", 122, 79),
            ("view", "PA", 66, 4),
            ("scanner", "mobile", 120, 77),
        ):
            some = metrics(ROWS[0][2][f] - 0.02 * (positives % 4), 0.6 / math.sqrt(positives))
            subgroups.append({"finding": finding, "by": by, "group": group, "studies": studies, "positives": positives, "metrics": some})
    common = {"alpha": 0.1, "threshold": 0.61, "negative_below": 0.34, "positives": 83, "negatives": 105}
    return {
        "bundle": {"name": "cxr-severity", "version": "0.2.0", "title": "Chest radiograph severity", "digest": "5f" * 32},
        "cohort": {
            "studies": 188,
            "patients": 54,
            "positives": {"in_icu": 83, "deceased": 38},
            "negatives": {"in_icu": 105, "deceased": 150},
            "present": {"image": 1.0, "values": 0.73, "text": 0.41},
        },
        "folds": 5,
        "repeats": 5,
        "seed": 0,
        "seconds": 1834.2,
        "machine": "2 CPU cores, torch 2.13",
        "rows": rows,
        "differences": differences,
        "missing": missing,
        "subgroups": subgroups,
        "curves": {finding: curves(f) for f, finding in enumerate(names)},
        "triage": {
            "in_icu": {**common, "uncertain": 0.37, "coverage_positive": 0.916, "coverage_negative": 0.905, "refused": ""},
            "deceased": {
                **common,
                "positives": 38,
                "negatives": 150,
                "refused": "16 patients with the finding are fewer than the 19 that the guarantee needs.",
            },
        },
        "notes": ["The view is no input; the pixels show it all the same.", "Six patients hold 42 % of the radiographs."],
    }


def small() -> dict[str, Any]:
    """One finding, a row of each group, one of each other part: soon drawn."""
    results = sample()
    for part, most in (("rows", 25), ("differences", 1), ("missing", 1), ("subgroups", 3)):
        results[part] = [row for row in results[part] if row["finding"] == "in_icu"][:most]
    results["rows"] = [row for row in results["rows"] if row["name"] in {"tokens", "image alone", "late_mean", "view alone"}]
    del results["curves"]["deceased"], results["triage"]["deceased"]
    return results


class Reader(HTMLParser):
    """What a browser would take for markup: tags with their attributes, text without markup, and whether tags balance."""

    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(results: dict[str, Any], folder: Path) -> str:
    (path,) = write_page(results, folder)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(sample(), tmp_path_factory.mktemp("page"))


def poison(node: Any, by: str) -> Any:
    """Every string of the results, names and notes alike, carries `by`; what the format itself fixes stays."""
    fixed = {"group", "metric"}
    if isinstance(node, dict):
        names = {"in_icu", "deceased", *(row[0] for row in ROWS), "image", "values", "text"}
        return {
            (key + by if key in names else key): (value if key in fixed and value in {*words.GROUPS, *words.METRICS} else poison(value, by))
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [poison(item, by) for item in node]
    return node + by if isinstance(node, str) and node else node


def test_the_page_is_well_formed_and_its_ids_are_unique(rendered: str) -> None:
    found = Reader(rendered)
    assert found.open == []
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    # Matplotlib may repeat a marker's definition within one figure; those are the same.
    assert {i for i in ids if ids.count(i) > 1} == set()
    assert {"#" + str(i) for i in ids} >= {v for _, attrs in found.tags for k, v in attrs.items() if k in {"href", "xlink:href"}}


def test_the_page_loads_nothing(rendered: str) -> None:
    found = Reader(rendered)
    assert not re.search(r"(https?:)?//\w", rendered)
    assert not {"script", "link", "iframe", "img", "object", "embed", "image", "base", "form"} & {tag for tag, _ in found.tags}
    assert not [key for _, attrs in found.tags for key in attrs if key.startswith("on") or key in {"src", "srcset", "action"}]
    assert "@import" not in rendered
    assert not re.findall(r"url\((?!#)", rendered)
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in found.tags)


@pytest.mark.parametrize("by", ["<script>alert(1)</script>", "\"' onload=alert(1) x='", "]]></style></svg><b>", "$\\frac$ & 肺 --><i>"])
def test_whatever_comes_from_outside_is_text_and_never_markup(by: str, rendered: str, tmp_path: Path) -> None:
    results = poison(small(), by)
    text = page(results, tmp_path)
    found, plain = Reader(text), Reader(rendered)
    assert found.open == []
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in plain.tags}
    assert {key for _, attrs in found.tags for key in attrs} <= {key for _, attrs in plain.tags for key in attrs}
    assert " ".join(f"tokens{by}".split()) in found.text
    assert " ".join(f"in_icu{by}".split()) in found.text


def test_markup_in_names_stays_text_in_the_card_too() -> None:
    card = write_card(poison(sample(), "<script> | [x](y)"), bundle_text={})
    assert "<script" not in re.sub(r"\\<", "", card)
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {5, 6, 8}


def test_numbers_printed_are_those_given(rendered: str) -> None:
    results, found = sample(), Reader(rendered)
    exact = {float(str(attrs["value"])) for tag, attrs in found.tags if tag == "data"}
    given = [m for part in ("rows", "subgroups") for row in results[part] for m in row["metrics"].values()]
    subgroup = {"auroc", "recall", "specificity"}
    shown = [m for row in results["subgroups"] for key, m in row["metrics"].items() if key in subgroup]
    shown += [m for row in results["rows"] for m in row["metrics"].values()] + [row["difference"] for row in results["differences"]]
    assert {m[0] for m in shown} == exact
    assert len(given) > 450
    first = results["rows"][0]["metrics"]["auroc"]
    assert f"AUROC of {first[0]:.3f} for in_icu (95 % interval {first[1]:.3f} to {first[2]:.3f})" in found.text
    for row in results["missing"]:
        value, low, high = row["metrics"]["auroc"]
        assert f"{value:.3f} ({low:.3f} to {high:.3f})" in found.text
    card = write_card(results, bundle_text={})
    for row in results["rows"]:
        value, low, high = row["metrics"]["brier"]
        assert f"{value:.3f} ({low:.3f} to {high:.3f})" in card


def test_every_finding_says_on_how_many_studies_and_patients(rendered: str) -> None:
    text = Reader(rendered).text
    for positives, negatives in ((83, 105), (38, 150)):
        assert f"188 studies of 54 patients ({positives} studies with the finding, {negatives} without)" in text
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", rendered):
        assert "188 studies of 54 patients" in caption or "studies with the finding / all studies" in caption


@pytest.mark.parametrize(
    ("difference", "p", "says"),
    [
        ([0.05, 0.001, 0.1], None, "a gain that is shown"),
        ([0.05, 0.001, 0.1], 0.04, "a gain that is shown"),
        ([0.05, 0.001, 0.1], 0.06, "not shown after correction"),
        ([0.05, -0.001, 0.1], 0.04, "not shown to be more than chance"),
        ([0.05, 0.0, 0.1], 0.04, "not shown to be more than chance"),
        ([-0.05, -0.1, 0.0], 0.04, "not shown to be more than chance"),
        ([-0.05, -0.1, -0.001], 0.01, "a loss that is shown"),
        ([0.3, -0.2, 0.8], 0.001, "not shown to be more than chance"),
        (None, None, "no paired difference was computed, so no claim"),
        ([0.05, None, None], 0.01, "no paired difference was computed, so no claim"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_words_about_a_gain_follow_its_interval_whichever_way_round_it_is_given(
    difference: list[float] | None, p: float | None, says: str, swapped: bool
) -> None:
    results = sample()
    gap: list[float] | None = difference
    if swapped and difference is not None and None not in difference:
        gap = [-difference[0], -difference[2], -difference[1]]
    a, b = ("image alone", "tokens") if swapped else ("tokens", "image alone")
    results["differences"] = [{"finding": "in_icu", "a": a, "b": b, "metric": "auroc", "difference": gap, "p": p}]
    said = words.how_compared(results, "in_icu")[0]
    assert "Against image alone" in said
    assert says in said
    assert sum(phrase in said for phrase in ("a gain that is", "a loss that is", "not shown", "no claim")) == 1


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        ([0.84, 0.76, 0.9], "better than chance"),
        ([0.55, 0.49, 0.61], "not shown to be more than chance"),
        ([0.55, 0.5, 0.61], "not shown to be more than chance"),
        ([0.4, 0.3, 0.48], "worse than chance"),
    ],
)
def test_words_about_chance_follow_the_interval(interval: list[float], says: str) -> None:
    results = sample()
    results["rows"][0]["metrics"]["auroc"] = interval
    said = words.how_good(results, "in_icu")
    assert says in said
    assert said.replace("in_icu", r"in\_icu") in write_card(results, bundle_text={})


def test_the_first_screen_holds_every_sentence(rendered: str) -> None:
    text, results = Reader(rendered).text, sample()
    first = text[: text.index("Read on:")]
    assert words.worth(results) in first
    for finding in ("in_icu", "deceased"):
        for said in (words.how_good(results, finding), *words.how_compared(results, finding), words.triage(results, finding)):
            assert said in first


@pytest.mark.parametrize(("patients", "positives"), [(19, 83), (54, 19), (0, 83)])
def test_below_twenty_nothing_is_claimed(patients: int, positives: int, tmp_path: Path) -> None:
    results = {**small(), "curves": {}, "missing": [], "subgroups": []}
    results["cohort"]["patients"] = patients
    results["cohort"]["positives"]["in_icu"] = positives
    text = Reader(page(results, tmp_path)).text
    first = text[: text.index("Read on:")]
    assert "no claim is made" in first
    for said in (first, write_card(results, bundle_text={})):
        for claim in ("better than chance", "that is shown", "The aim", "ranks them", ", shown"):
            assert claim not in said


@pytest.mark.parametrize(
    ("floor", "difference", "near"),
    [(0.80, None, True), (0.77, None, True), (0.66, None, False), (0.66, [0.18, -0.01, 0.3], True), (0.66, [0.18, 0.1, 0.3], False)],
)
def test_a_floor_that_comes_close_is_said(floor: float, difference: list[float] | None, near: bool) -> None:
    results = sample()
    row = next(r for r in results["rows"] if r["name"] == "view alone")
    row["metrics"]["auroc"] = around(floor, 0.07)
    if difference:
        pair = {"finding": "in_icu", "a": "tokens", "b": "view alone", "metric": "auroc", "difference": difference, "p": None}
        results["differences"].append(pair)
    assert any("Beware: view alone" in said for said in words.how_compared(results, "in_icu")) is near
    assert ("Beware: view alone" in write_card(results, bundle_text={}).split("### deceased")[0]) is near


@pytest.mark.parametrize("patients", [54, 18])
def test_what_is_simpler_and_higher_is_said_claim_or_no_claim(patients: int, tmp_path: Path) -> None:
    results = small()
    results["cohort"]["patients"] = patients
    assert words.higher(results, "in_icu") == ""
    for name, auroc in (("image alone", 0.86), ("view alone", 0.88)):
        next(row for row in results["rows"] if row["name"] == name)["metrics"]["auroc"] = [auroc, 0.7, 0.9]
    said = words.higher(results, "in_icu")
    assert "than the network's 0.840" in said
    assert "one modality: 1 of 1, image alone most with 0.860 (0.700 to 0.900)" in said
    assert "shortcut floors: 1 of 1, view alone most with 0.880" in said
    assert ("may be chance" in said) is (patients < 20)
    text = page(results, tmp_path)
    assert "<li class=warn>Beware: simpler ways" in text
    assert "view alone" in write_card(results, bundle_text={}).split("## Subgroups")[0]
    assert "· above the network" in text
    assert "close to the network" not in text


@pytest.mark.parametrize(
    ("patients", "positive", "shown"),
    [(54, 20, "gain over image alone, shown"), (54, 18, ""), (18, 18, "")],
)
def test_a_gain_of_which_nothing_may_be_claimed_is_no_tile(patients: int, positive: int, shown: str, tmp_path: Path) -> None:
    results = small()
    results["cohort"] |= {"patients": patients, "patients_positive": {"in_icu": positive}, "patients_negative": {"in_icu": 30}}
    text = page(results, tmp_path)
    assert (shown or "patients") in text
    assert ("gain over" in text) is bool(shown)
    assert ("<div class=few><dt>AUROC" in text) is not bool(shown)


def test_a_gain_that_is_not_shown_is_gray(tmp_path: Path) -> None:
    results = small()
    results["differences"][0]["p"] = 0.2
    assert "<div class=few><dt>gain over image alone, not shown" in page(results, tmp_path)


@pytest.mark.parametrize(
    ("cohort", "says"),
    [
        ({"patients": 40, "patients_positive": {"in_icu": 18}}, "Only 18 patients have the finding; 20 are needed"),
        ({"patients": 40, "patients_negative": {"in_icu": 7}}, "Only 7 patients are without the finding; 20 are needed"),
        ({"patients": 12}, "Only 12 patients in all; 20 are needed"),
        ({"positives": {"in_icu": 5}}, "Only 5 studies have the finding; 20 patients are needed"),
    ],
)
def test_why_nothing_is_claimed_is_said_with_its_number(cohort: dict[str, Any], says: str) -> None:
    results = small()
    results["cohort"] |= cohort
    assert f"{says}: no claim is made" in words.how_good(results, "in_icu")
    assert says.lower() in words.triage(results, "in_icu")


def test_rows_of_equal_figures_and_the_row_learned_jointly_are_explained(tmp_path: Path) -> None:
    results = small()
    assert words.jointly(results) == words.twins(results, "in_icu") == ""
    first = results["rows"][0]
    results["rows"] += [{**first, "name": "tokens" + JOINTLY, "metrics": metrics(0.83, 0.1)}, {**first, "name": "film"}]
    card, text = write_card(results, bundle_text={}), Reader(page(results, tmp_path)).text
    for said in (card, text):
        assert "Equal figures: tokens = film." in said
        assert "tokens, learned jointly: the fusion tokens with image encoders learned together with it; all" in said
    results["bundle"]["stages"] = "joint"
    assert "as this bundle is trained" in words.jointly(results)


def test_curves_are_drawn_of_baselines_and_floors_too(rendered: str) -> None:
    for label in ("both: random forest: 0.790", "view alone: 0.770"):
        assert label in rendered


def test_an_evaluation_keeps_the_curves_of_all_that_is_drawn() -> None:
    kinds = {
        "tokens": "fusion",
        "film": "fusion",
        "image alone": "single",
        "late_mean": "late",
        "both: SVM": "baseline",
        "view alone": "floor",
    }
    y = np.array([0.0, 1.0, 0.0, 1.0])
    found = evaluation._curves(dict.fromkeys(kinds, np.array([[0.1, 0.7, 0.4, 0.3]])), "tokens", y, kinds)
    assert set(found["roc"]) == set(found["pr"]) == set(kinds) - {"film"}


def test_once_is_not_repeated_1_times() -> None:
    once = {**small(), "repeats": 1}
    assert "repeated" not in words.worth(once) + write_card(once, bundle_text={}).split("Limits")[0]
    assert "5 folds, repeated 5 times" in words.worth(small())


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(
    "gone",
    [
        ("bundle", "cohort", "folds", "repeats", "seed", "seconds", "machine", "notes"),
        ("differences", "triage"),
        ("missing",),
        ("subgroups",),
        ("curves",),
        ("rows",),
    ],
)
def test_a_part_that_is_missing_breaks_nothing(gone: tuple[str, ...], null: bool, tmp_path: Path) -> None:
    whole = small() if "curves" in gone else {**small(), "curves": {}}
    results: dict[str, Any] = {key: part for key, part in whole.items() if key not in gone}
    results |= dict.fromkeys(gone if null else ())
    found, card = Reader(page(results, tmp_path)), write_card(results, bundle_text={})
    assert found.open == []
    for text in (found.text, card):
        assert "None" not in text
        assert "nan" not in text


def test_metrics_without_numbers_are_dashes_and_no_claim(tmp_path: Path) -> None:
    results = json.loads(json.dumps(small()))
    for part in ("rows", "missing", "subgroups"):
        for row in results[part]:
            row["metrics"] = dict.fromkeys(row["metrics"]) | {"auprc": [math.nan, math.nan, math.nan]}
    results["curves"]["in_icu"] = {
        "roc": {},
        "pr": {},
        "reliability": {"predicted": [], "observed": [], "count": []},
        "risk_coverage": None,
    }
    text = Reader(page(results, tmp_path)).text
    assert "no AUROC could be computed for in_icu: no claim is made" in text
    assert "not computed" in text
    assert "nan" not in text
    assert "nan" not in write_card(results, bundle_text={})


def test_one_finding_and_one_row_make_a_page(tmp_path: Path) -> None:
    results = small()
    only = {**results, "rows": results["rows"][1:2], "differences": [], "missing": [], "subgroups": [], "curves": {}, "triage": {}}
    text = Reader(page(only, tmp_path)).text
    assert "the network (image alone) reached an AUROC of 0.790" in text
    assert "deceased" not in text


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    assert page(small(), tmp_path) == page(small(), tmp_path / "new" / "folder")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"coverage_positive": 0.916}, "37 % of studies are called uncertain"),
        ({"coverage_positive": 0.87}, "fewer than aimed at"),
        ({"refused": "Too few."}, "No triage is offered (n = 83 with and 105 without the finding): Too few."),
    ],
)
def test_triage_says_whether_its_aim_was_met(found: dict[str, Any], says: str) -> None:
    results = sample()
    results["triage"]["in_icu"].update(found)
    said = words.triage(results, "in_icu")
    assert says in said
    assert ("fewer than aimed at" in said) is (found.get("coverage_positive") == 0.87)


@pytest.mark.parametrize(
    ("alpha", "missed", "says"),
    [(0.1, 0.04, "the bundle aims at 10 % at most of each."), (0.1, 0.13, "so do not rely on it"), (0.0, 0.13, "")],
)
def test_triage_is_first_that_of_the_bundle_as_shipped(alpha: float, missed: float, says: str, tmp_path: Path) -> None:
    own = {"alpha": alpha, "threshold": 0.72, "negative_below": 0.21, "uncertain": 0.44}
    results = small()
    results["triage"]["in_icu"]["shipped"] = own | {"positives_called_negative": missed, "negatives_called_positive": 0.06}
    said = words.triage(results, "in_icu")
    shipped, fitted = said.split(" After recalibrate: ")
    assert "positive from 0.720, negative below 0.210" in shipped
    assert f"44 % of studies are called uncertain and left to a person, {100 * missed:.0f} % of those with the finding" in shipped
    assert "6 % of those without it positive" in shipped
    assert says in shipped
    assert ("aims" in shipped) is (alpha > 0)
    assert ("do not rely" in shipped) is (alpha > 0 and missed > alpha)
    assert "37 % of studies are called uncertain" in fitted
    text = Reader(re.sub("</?t[dhr]", " \\g<0>", page(results, tmp_path))).text
    assert "called uncertain 44 %" in text, "the first screen shows the bundle as it stands"
    assert f"as shipped {f'{alpha:.3f}' if alpha else '–'} 0.720 0.210 44 % {100 * missed:.0f} % 6 %" in text
    assert "after recalibrate 0.100 0.610 0.340 37 % 8 % 9 %" in text
    card = write_card(results, bundle_text={})
    assert "44 % of studies are called uncertain" in card
    assert "After recalibrate: " in card
    results["cohort"]["patients"] = 19
    assert words.triage(results, "in_icu").startswith("No claim is made about triage (188 studies of 19 patients")


def test_a_bundle_without_a_guarantee_still_says_what_its_own_thresholds_do() -> None:
    results = sample()
    own = {"alpha": 0.0, "threshold": 0.5, "negative_below": 0.5, "uncertain": 0.0}
    results["triage"]["deceased"]["shipped"] = own | {"positives_called_negative": 0.3, "negatives_called_positive": None}
    said = words.triage(results, "deceased")
    assert "0 % of studies are called uncertain" in said
    assert "– of those without it positive" in said
    assert "After recalibrate: No triage is offered" in said


@pytest.mark.parametrize("name", ["late_mean", "image alone", "tokens", "concatenation"])
def test_the_network_is_the_row_of_the_bundles_own_fusion_whatever_its_kind(name: str, tmp_path: Path) -> None:
    results = sample()
    results["bundle"]["fusion"] = name
    found = words.headline(results, "in_icu")
    assert found is not None
    assert found["name"] == name
    assert f"the network ({name}) reached" in Reader(page(results, tmp_path)).text
    compared = [label for label, _ in words.comparisons(results, "in_icu")]
    assert name not in [label.split(", ")[-1] for label in compared], "it is not compared with itself"
    assert ("the best other late fusion, late_stack" in compared) is (name == "late_mean")
    assert ("the best late fusion, late_mean" in compared) is (name != "late_mean")
    assert ("the best other single modality, values alone" in compared) is (name == "image alone")


@pytest.mark.parametrize(("positive", "negative", "few"), [(20, 34, False), (19, 40, True), (40, 19, True)])
def test_a_class_is_counted_in_patients_not_in_studies(positive: int, negative: int, few: bool) -> None:
    results = sample()
    results["cohort"] |= {"patients_positive": {"in_icu": positive}, "patients_negative": {"in_icu": negative}}
    assert bool(words.too_few(results, "in_icu")) is few
    assert ("no claim is made" in words.how_good(results, "in_icu")) is few
    row = {"positives": 83, "studies": 188, "patients_positive": positive, "patients_negative": negative}
    assert small_group(row) is few
    assert not small_group({"positives": 83, "studies": 188})
    assert small_group({"positives": 83, "studies": 102})


def test_the_card_tells_what_was_judged_from_what_was_learned_from() -> None:
    results = sample()
    card = write_card(results, bundle_text={})
    assert "Not said here. It was judged on 188 studies of 54 patients" in card
    own = write_card(results, bundle_text={"learned_from": "The training part of the archive."})
    assert own.split("## What it learned from")[1].split("##")[0].strip() == "The training part of the archive."
    assert "188 studies of 54 patients" in own.split("## How it was judged")[1].split("##")[0]


@pytest.mark.parametrize(("stages", "says"), [("joint", True), ("frozen", False), (None, False)])
def test_the_card_of_a_bundle_trained_jointly_says_at_once_that_other_weights_were_judged(stages: str | None, says: bool) -> None:
    results = sample()
    results["bundle"]["stages"] = stages
    first = write_card(results, bundle_text={}).split("\n\n")[1]
    assert ("this recipe with frozen encoders, not these weights" in first) is says


def test_abstention_is_claimed_only_where_it_lowers_the_error() -> None:
    results = sample()
    assert words.selective(results, "in_icu") == "Answering fewer studies, the most certain first, lowers the error."
    assert "no claim for abstention" in words.selective(results, "deceased")
    results["cohort"]["patients"] = 19
    assert words.selective(results, "in_icu") == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (0.001, "below 1 %"), (0.374, "37 %"), (0.998, "99.8 %"), (1.0, "100 %"), (None, "–"), (math.nan, "–")],
)
def test_shares_never_round_to_none_or_all(value: float | None, text: str) -> None:
    assert words.share(value) == text


def test_the_card_has_the_headings_of_a_card_and_the_authors_words() -> None:
    text = {
        "summary": "Reads one frontal radiograph.",
        "intended_use": "Research on fusion.",
        "limits": ["One hospital.", "One spring."],
        "quality_statement": "No external test.",
        "authors": ["A. Author", "B. Author"],
        "license": "CC-BY-3.0",
    }
    card = write_card(sample(), bundle_text=text)
    heads = re.findall(r"^## (.*)$", card, flags=re.MULTILINE)
    assert heads == [
        "What it is",
        "Intended use",
        "What it learned from",
        "How it was judged",
        "Results",
        "What it is worth without the record",
        "Subgroups",
        "Calibration and abstention",
        "Limits",
        "How to cite",
        "License",
    ]
    for said in (
        "Reads one frontal radiograph.",
        "* One spring.",
        "A. Author, B. Author",
        "CC-BY-3.0",
        "No external test.",
        "Six patients hold",
    ):
        assert said in card


def image(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_a_learning_curve_is_a_picture_that_shows_both_losses(tmp_path: Path) -> None:
    history = [{"epoch": e, "train_loss": 0.7 * 0.9**e, "validation_loss": 0.5 + 0.01 * (e - 8) ** 2} for e in range(1, 21)]
    learning_curve(history, tmp_path / "curve.png")
    pixels = image(tmp_path / "curve.png")
    for color in ((0, 114, 178), (213, 94, 0)):  # Okabe and Ito's blue and vermilion
        assert (np.abs(pixels - color).sum(-1) < 12).sum() > 300


@pytest.mark.parametrize("losses", [[], [0.5], [math.nan, math.nan], [0.6, math.nan, 0.4]])
def test_a_short_or_broken_history_still_makes_a_picture(losses: list[float], tmp_path: Path) -> None:
    history = [{"epoch": float(e), "train_loss": loss, "validation_loss": loss} for e, loss in enumerate(losses, 1)]
    learning_curve(history, tmp_path / "curve.png")
    assert image(tmp_path / "curve.png").shape[0] > 300
