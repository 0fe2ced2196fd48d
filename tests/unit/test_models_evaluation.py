"""The fair table: no fold leaks, rows are what they are named, verdicts and differences say what they say."""

from __future__ import annotations

import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import baselines, evaluation, folds, metrics, words
from models.bundle import Bundle
from models.folds import LATE, Task, all_folds, assign_folds, group_of, one_fold, presence
from models.fusion import FUSIONS
from models.judged import FloatArray
from models.training import Labeled
from tests.unit import small_bundle

#: The rows of an evaluation that was kept by the version before this one.
KEPT = {
    "tokens": "fusion",
    "tokens, learned jointly": "fusion",
    "concat": "fusion",
    "lstm": "fusion",
    "late_mean": "late",
    "late_stack": "late",
    "late mean of single networks": "late",
    "late stack of single networks": "late",
    "image alone": "single",
    "values alone": "single",
    "without image": "missing",
    "30% of the values dropped": "missing",
    "60% of the values dropped": "missing",
    "image features: SVM": "baseline",
    "values: gradient boosting, missingness seen": "baseline",
    "both: nearest neighbors": "baseline",
    "acquisition alone": "floor",
    "view alone": "floor",
    "missingness alone": "floor",
}


@pytest.fixture(autouse=True)
def _few_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two learners of two kinds are enough: each has its own tests."""
    kept = ("logistic regression", "decision tree")
    monkeypatch.setattr(baselines, "BASELINES", {name: baselines.BASELINES[name] for name in kept})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    toml = small_bundle.TOML.replace("epochs = 3", "epochs = 1")
    return Bundle.read(small_bundle.write(tmp_path_factory.mktemp("small"), toml), verify=False)


def task(bundle: Bundle, n: int = 24, *, fusions: tuple[str, ...] = ("tokens", "single:image", "single:values")) -> Task:
    studies = small_bundle.studies(bundle, n)
    facts = [{"view": "AP" if study.labels[0] == 1 else "PA", "kvp": float(80 + index)} for index, study in enumerate(studies)]
    return Task(bundle, studies, facts, fusions, 0, "cpu")


def relabeled(given: Task, where: np.ndarray[Any, Any]) -> Task:
    """The same with every label turned where `where` says so."""
    pairs = zip(given.studies, where, strict=True)
    return replace(given, studies=[replace(study, labels=1 - study.labels) if turn else study for study, turn in pairs])


def test_no_row_of_a_fold_hangs_on_the_labels_it_is_judged_on(bundle: Bundle) -> None:
    given = task(bundle)
    fold_of = assign_folds(given.studies, folds=3, seed=0)
    outer = np.array([fold_of[study.group] == 0 for study in given.studies])
    before = one_fold(given, outer.tolist(), seed=0)
    after = one_fold(relabeled(given, outer), outer.tolist(), seed=0)
    assert {name: scores.tobytes() for name, scores in after.items()} == {name: scores.tobytes() for name, scores in before.items()}
    taught = one_fold(relabeled(given, ~outer), outer.tolist(), seed=0)
    assert not [name for name in before if np.array_equal(before[name], taught[name])], "what it learns from matters to every row"
    kinds = {group_of(name, bundle.modalities) for name in before}
    assert kinds == {"fusion", "single", "late", "missing", "baseline", "floor"}
    assert all(scores.shape == (outer.sum(), 2) and ((scores >= 0) & (scores <= 1)).all() for scores in before.values())


def test_rows_kept_by_an_earlier_version_are_of_the_kind_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {name: group_of(name, ("image", "values")) for name in KEPT} == KEPT
    assert {group_of(name, ()) for name in FUSIONS} == {"fusion", "late"}
    assert {group_of(name, ()) for name in LATE} == {"late"}


@pytest.mark.parametrize("image", ["lateral", "late_mean", "without", "values_dropped", "tokens"])
def test_an_image_by_itself_is_a_single_modality_whatever_its_name(image: str) -> None:
    assert group_of(f"{image} alone", (image, "values")) == "single"
    assert group_of(f"without {image}", (image, "values")) == "missing"


def test_a_row_that_nothing_makes_is_refused() -> None:
    for name in ("frontal alone", "values: oracle", "without text", "oracle"):
        with pytest.raises(ValueError, match="is no row of this table"):
            group_of(name, ("image", "values"))


@pytest.mark.parametrize("name", ["view", "acquisition", "missingness"])
def test_an_image_named_like_a_floor_is_refused_before_anything_is_learned(bundle: Bundle, name: str, tmp_path: Path) -> None:
    clash = replace(bundle, images=(replace(bundle.images[0], name=name),))
    with pytest.raises(ValueError, match=f"An image named '{name}' cannot be evaluated"):
        evaluation.evaluate(clash, [], [], folds=2, repeats=1, seed=0, folder=tmp_path)


def test_a_modality_is_there_where_any_of_its_tensors_says_so(bundle: Bundle) -> None:
    genes = replace(bundle.record.texts[0], kind="expression", genes=("TP53",))
    whole = replace(bundle, record=replace(bundle.record, texts=(*bundle.record.texts, genes)))
    assert whole.modalities == ("image", "values", "text", "genes")

    def sample(**given: torch.Tensor) -> dict[str, torch.Tensor]:
        nothing = {
            "image_mask": torch.tensor(False),
            "number_mask": torch.zeros(2, dtype=torch.bool),
            "words": torch.zeros(4, dtype=torch.long),
            "variants": torch.zeros(3, dtype=torch.long),
            "expression_mask": torch.zeros(1, dtype=torch.bool),
        }
        return {**nothing, **given}

    samples = [
        sample(),
        sample(image_mask=torch.tensor(True), number_mask=torch.tensor([False, True]), words=torch.tensor([5, 0, 0, 0])),
        sample(variants=torch.tensor([7, 0, 0])),
        sample(expression_mask=torch.tensor([True])),
        # BERT's own tokens stand in an empty text, too.
        sample(words=torch.tensor([101, 102, 0, 0]), word_mask=torch.zeros(4, dtype=torch.bool)),
        sample(words=torch.tensor([101, 9, 102, 0]), word_mask=torch.tensor([True, True, True, False])),
    ]
    expected = [[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert presence(whole, samples).tolist() == expected


def test_folds_part_no_patient_and_hold_both_classes() -> None:
    rng = np.random.default_rng(0)
    whose = [patient for patient in range(60) for _ in range(int(rng.integers(1, 6)))]
    studies = [Labeled({}, torch.tensor([float(patient % 5 == 0)]), f"p{patient}") for patient in whose]
    found = assign_folds(studies, folds=4, seed=1)
    assert set(found) == {study.group for study in studies}, "one fold a patient"
    positive = [sum(study.labels[0] == 1 and found[study.group] == fold for study in studies) for fold in range(4)]
    sizes = [sum(found[study.group] == fold for study in studies) for fold in range(4)]
    assert min(positive) > 0
    assert max(positive) - min(positive) <= 5, "no more apart than the studies of one patient"
    assert max(sizes) - min(sizes) <= 10
    assert found == assign_folds(studies[::-1], folds=4, seed=1) != assign_folds(studies, folds=4, seed=2)
    with pytest.raises(ValueError, match="60 groups cannot fill 61 folds"):
        assign_folds(studies, folds=61, seed=0)


def test_shipped_verdicts_are_the_bundles_own_with_each_patient_weighing_1(bundle: Bundle) -> None:
    spec = replace(bundle.findings[0], threshold=0.6, negative_below=0.4, alpha=0.2)
    # Patient a: four positive studies, one called negative; b, c: one positive, called positive; d, e: one negative each.
    groups = np.array([*"aaaabcde", "f"])
    y = np.array([1, 1, 1, 1, 1, 1, 0, 0, math.nan])
    first = np.array([0.3, 0.6, 0.9, 0.9, 0.7, 0.8, 0.1, 0.5, 0.5])
    second = np.where(groups == "d", 0.95, first)  # in the other repeat, d is called positive
    found = evaluation._shipped(spec, np.stack([first, second]), y, groups)
    assert found["positives_called_negative"] == pytest.approx(0.25 / 3)
    assert found["negatives_called_positive"] == pytest.approx((0 + 1 / 2) / 2)
    assert found["uncertain"] == pytest.approx(1 / 5)
    assert (found["threshold"], found["negative_below"], found["alpha"]) == (0.6, 0.4, 0.2)
    alone = evaluation._shipped(replace(spec, negative_below=None), first[None], y, groups)
    assert (alone["uncertain"], alone["negative_below"]) == (0, 0.6)
    unknown = evaluation._shipped(spec, first[None], np.where(y == 1, math.nan, y), groups)
    assert unknown["positives_called_negative"] is None


def pooled(given: Task, repeats: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    """Made-up scores of every kind of row: all weak but for the headline."""
    rng, n = np.random.default_rng(0), len(given.studies)
    y = np.array([float(study.labels[0]) for study in given.studies])
    names = ["tokens", "concat", "late_mean", "image alone", "values alone", "text alone", "view alone", "without image"]
    names += [f"{table}: {learner}" for table in ("values", "both") for learner in baselines.BASELINES]
    strong = {"tokens": 0.35}
    return {
        name: np.clip(0.5 + strong.get(name, 0.05) * (2 * y - 1)[:, None] + rng.normal(0, 0.15, (repeats, n, 2)), 0, 1) for name in names
    }


def judged(given: Task) -> dict[str, Any]:
    fold_of = [assign_folds(given.studies, folds=3, seed=seed) for seed in range(2)]
    return evaluation._judged(given, pooled(given), fold_of)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, and no network to count."""
    paired, intervals = metrics.paired, metrics.intervals
    monkeypatch.setattr(metrics, "intervals", lambda *a, **k: intervals(*a, **{**k, "resamples": 200}))
    monkeypatch.setattr(metrics, "paired", lambda *a, **k: paired(*a, **{**k, "resamples": 500}))
    monkeypatch.setattr(evaluation, "_size", lambda *_: 1)


@pytest.mark.usefixtures("_quick")
def test_only_what_is_claimed_has_a_p_and_is_corrected_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    corrected: list[int] = []
    holm = metrics.holm

    def watched(p: list[float]) -> FloatArray:
        corrected.append(len(p))
        return holm(p)

    monkeypatch.setattr(metrics, "holm", watched)
    results = judged(task(bundle, 120, fusions=("tokens",)))
    ill = {row["b"]: row for row in results["differences"] if row["finding"] == "ill"}
    assert {name for name, row in ill.items() if row["p"] is not None} == {"late_mean", "image alone", "values alone", "text alone"}
    assert corrected == [4, 4]
    assert "without image" not in ill
    assert all(row["difference"][1] is not None for row in ill.values()), "each has its interval"
    said = words.how_compared(results, "ill")
    assert any("values: " in line or "both: " in line for line in said)
    assert all("a gain that is shown" in line for line in said if line.startswith("Against"))


@pytest.mark.usefixtures("_quick")
def test_patients_of_each_class_are_counted_for_the_cohort_and_its_subgroups(bundle: Bundle) -> None:
    given = task(bundle, 120, fusions=("tokens",))
    results = judged(given)
    ill = [(study.group, float(study.labels[0])) for study in given.studies]
    assert results["cohort"]["patients"] == 60
    assert results["cohort"]["patients_positive"]["ill"] == len({group for group, label in ill if label == 1})
    assert results["cohort"]["patients_negative"]["ill"] == len({group for group, label in ill if label == 0})
    pa = next(row for row in results["subgroups"] if (row["finding"], row["by"], row["group"]) == ("ill", "view", "PA"))
    assert (pa["patients_positive"], pa["patients_negative"]) == (0, results["cohort"]["patients_negative"]["ill"])


@pytest.mark.usefixtures("_quick")
def test_a_finding_without_any_label_is_judged_as_unknown_and_not_with_an_error(bundle: Bundle) -> None:
    given = task(bundle, 40, fusions=("tokens",))
    bare = replace(given, studies=[replace(s, labels=torch.tensor([float(s.labels[0]), math.nan])) for s in given.studies])
    results = judged(bare)
    assert all(row["metrics"]["auroc"] is None for row in results["rows"] if row["finding"] == "rare")
    assert results["triage"]["rare"]["shipped"]["uncertain"] is None
    assert any(note.startswith("rare: in 6 of 6 folds") for note in results["notes"])
    assert not any(note.startswith("ill: in") for note in results["notes"])
    assert "no claim is made" in words.how_good(results, "rare")


def test_baselines_say_a_half_where_there_is_nothing_to_learn(bundle: Bundle) -> None:
    given = task(bundle)
    outer = np.arange(24) < 8
    studies = [
        replace(s, labels=torch.tensor([float(s.labels[0]), float(out) if out else math.nan]))
        for s, out in zip(given.studies, outer, strict=True)
    ]
    scores = folds._classical(replace(given, studies=studies), outer, seed=0)
    assert scores
    for found in scores.values():
        assert (found[:, 1] == 0.5).all()
        assert np.isfinite(found[:, 0]).all()


def test_an_absent_image_has_unknown_features_and_not_those_of_a_black_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.read(small_bundle.write(tmp_path, small_bundle.TOML.replace("size = [12, 10, 8]", "size = [16, 16, 16]")), verify=False)
    absent = {"image": torch.zeros(1, 16, 16, 16), "image_mask": torch.tensor(False)}
    image = torch.rand(1, 16, 16, 16)
    given = task(bundle, 12)
    studies = [replace(s, sample={**s.sample, "image": image, **(absent if i in (2, 3) else {})}) for i, s in enumerate(given.studies)]
    seen: list[np.ndarray[Any, Any]] = []

    def watched(_: str, train: Any, *rest: Any, **__: Any) -> Any:
        seen.append(np.vstack([train, rest[1]]))
        return np.full(len(rest[1]), 0.5)

    monkeypatch.setattr(baselines, "fit_predict", watched)
    folds._classical(replace(given, studies=studies), np.arange(12) < 4, seed=0)
    table = seen[0]  # training rows, then the four outer ones
    assert np.isnan(table[-2:]).all()
    assert np.isfinite(table[:-2]).all()


def test_kept_folds_are_read_and_strange_ones_refused_at_once(bundle: Bundle, tmp_path: Path) -> None:
    given = task(bundle, fusions=("tokens", "single:image", "single:values", "single:text"))
    kept = tmp_path / "folds" / evaluation._digest(given, 2)
    kept.mkdir(parents=True)
    for fold in range(2):
        np.savez_compressed(kept / f"0-{fold}.npz", allow_pickle=False, **{"tokens": np.zeros((12, 2)), "image alone": np.ones((12, 2))})
    read = dict(all_folds(given, [(0, 0), (0, 1)], [], kept=kept, processes=1))
    assert read[0, 1]["image alone"].sum() == 24
    np.savez_compressed(kept / "0-1.npz", oracle=np.zeros((12, 2)))
    with pytest.raises(ValueError, match="'oracle' is no row of this table"):
        evaluation.evaluate(
            bundle, given.studies, given.facts, folds=2, repeats=1, seed=0, folder=tmp_path, fusions=("tokens",)
        )  # the same fusions as of `given`


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "pickle", "array"])
def test_a_kept_fold_that_is_broken_is_learned_anew(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    file = tmp_path / "0-0.npz"
    rows = {"tokens": np.random.default_rng(0).random((12, 2))}
    np.savez_compressed(file, allow_pickle=False, **rows)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 255
    broken: dict[str, bytes | bytearray] = {"cut": raw[: len(raw) // 2], "empty": b"", "bit": raw, "pickle": pickle.dumps({})}
    if damage == "array":
        with file.open("wb") as stream:
            np.save(stream, rows["tokens"])
    else:
        file.write_bytes(broken[damage])
    monkeypatch.setattr(folds, "ProcessPoolExecutor", lambda *_given, **_named: ThreadPoolExecutor(1))
    monkeypatch.setattr(folds, "_run", lambda *_given: rows)
    (again,) = all_folds(task(bundle), [(0, 0)], [{}], kept=tmp_path, processes=1)
    assert again == ((0, 0), rows)
    assert [one.name for one in tmp_path.iterdir()] == ["0-0.npz"]
    monkeypatch.setattr(folds, "_run", lambda *_given: pytest.fail("it is kept"))
    ((_, scores),) = all_folds(task(bundle), [(0, 0)], [{}], kept=tmp_path, processes=1)
    assert np.array_equal(scores["tokens"], rows["tokens"])


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**70])
def test_a_seed_that_a_learner_cannot_take_is_refused_before_anything_is_learned(bundle: Bundle, seed: int, tmp_path: Path) -> None:
    given = task(bundle)
    with pytest.raises(ValueError, match="A seed must lie from 0 to"):
        evaluation.evaluate(bundle, given.studies, given.facts, folds=2, repeats=1, seed=seed, folder=tmp_path)


def test_folds_kept_with_other_rows_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    given = task(bundle, fusions=("tokens", "single:image", "single:values", "single:text"))
    kept = tmp_path / "folds" / evaluation._digest(given, 2)
    kept.mkdir(parents=True)
    for fold, names in enumerate((("tokens",), ("tokens", "image alone"))):
        np.savez_compressed(kept / f"0-{fold}.npz", allow_pickle=False, **{name: np.zeros((12, 2)) for name in names})
    with pytest.raises(ValueError, match="different rows"):
        evaluation.evaluate(bundle, given.studies, given.facts, folds=2, repeats=1, seed=0, folder=tmp_path, fusions=("tokens",))
