"""An evaluation as the bundle's model card, in Markdown, under the headings a model card has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models import plots, words
from models.words import GROUPS, METRICS, Estimate, Results, Row, given, metric, share


def write_card(results: Mapping[str, Any], *, bundle_text: Mapping[str, Any]) -> str:
    """The bundle's model card as Markdown.

    Parameters
    ----------
    bundle_text
        What only the bundle's author knows, Markdown, each absent or a string or a list of strings: ``summary`` (what it reads and
        answers), ``intended_use``, ``learned_from``, ``quality_statement``, ``limits``, ``citation``, ``license``, ``authors``.

    References
    ----------
    Mitchell et al. 2019, Model Cards for Model Reporting, doi:10.1145/3287560.3287596.
    """
    bundle, found = results.get("bundle") or {}, words.findings(results)

    def own(key: str, otherwise: str) -> str:
        text = bundle_text.get(key) or otherwise
        return text if isinstance(text, str) else "\n".join(f"* {item}" for item in text)

    def each(parts: Iterable[str]) -> str:
        return "\n".join(f"* {_md(part)}" for part in parts if part) or "No claim is made."

    title = bundle.get("title") or bundle.get("name") or "A bundle"
    cite = f"{_md(given(bundle, 'name'))} {_md(bundle.get('version', ''))}, digest `{_md(given(bundle, 'digest'))}`."
    authors = bundle_text.get("authors") or ()
    by = authors if isinstance(authors, str) else ", ".join(authors)
    sections = {
        "What it is": own("summary", _md(title)),
        "Intended use": own("intended_use", "Research."),
        "What it learned from": own("learned_from", f"Not said here. It was judged on {_cohort_words(results)}"),
        "How it was judged": _judged(results),
        "Results": "\n\n".join(
            f"### {_md(name)}\n\n{_md(words.how_good(results, name))}\n\n{each(words.how_compared(results, name))}\n\n"
            f"{_card_table(results, name)}\n\n{_md(' '.join(filter(None, (words.jointly(results), words.twins(results, name)))))}"
            for name in found
        )
        or "Not evaluated.",
        "What it is worth without the record": "\n\n".join(_card_missing(results, name) for name in found) or "Not evaluated.",
        "Subgroups": "\n\n".join(_card_subgroups(results, name) for name in found) or "Not evaluated.",
        "Calibration and abstention": each(_calibration(results, name) for name in found),
        "Limits": "\n".join(
            filter(None, (own("limits", ""), own("quality_statement", ""), each([words.worth(results), *(results.get("notes") or [])])))
        ),
        "How to cite": own("citation", f"{_md(by)}{'. ' if by else ''}{cite}"),
        "License": own("license", "See LICENSE."),
    }
    body = "\n\n".join(f"## {head}\n\n{text}" for head, text in sections.items())
    first = "**Research use. Not a medical device, not for the care of patients.**"
    if bundle.get("stages") == "joint":  # folds freeze the encoders, the bundle's training does not
        first += " Its figures judge this recipe with frozen encoders, not these weights."
    return f"# {_md(title)}\n\n{first}\n\n{body}\n"


def _md(text: object) -> str:
    """Text from outside as Markdown that says what the text says."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]|<>#~" else "&amp;" if c == "&" else c for c in flat)


def _md_table(heads: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(_md(cell) for cell in cells)} |" for cells in body)]
    return "\n".join(lines)


def _or_dash(found: Estimate | None) -> str:
    return str(found) if found else "–"


def _cohort_words(results: Results) -> str:
    cohort = results.get("cohort") or {}
    has = ", ".join(f"{_md(name)} {share(part)}" for name, part in (cohort.get("present") or {}).items())
    return f"{given(cohort, 'studies')} studies of {given(cohort, 'patients')} patients{f' (studies that have it: {has})' if has else ''}."


def _judged(results: Results) -> str:
    return (
        f"{given(results, 'folds')} folds of whole patients, stratified{words.repeated(results)}, seed "
        f"{given(results, 'seed')}, every row on the same folds, on {_cohort_words(results)} "
        "Intervals are 95 %, from a bootstrap of patients; claims against single modalities and late fusions are corrected by Holm for "
        "their number, other differences are not. "
        "Plots: `evaluation.html`."
    )


def _card_table(results: Results, finding: str) -> str:
    names = ("auroc", "auprc", "recall", "specificity", "brier")
    body = [
        (GROUPS.get(row["group"], row["group"]), row["name"], *(_or_dash(metric(row, name)) for name in names))
        for row in words.rows(results, finding)
    ]
    return f"95 % intervals, {words.population(results, finding)}.\n\n" + _md_table(("Kind", "Row", *(METRICS[n] for n in names)), body)


def _card_missing(results: Results, finding: str) -> str:
    alone, head = [row for row in words.rows(results, finding) if row["group"] == "single"], words.headline(results, finding)
    rows: list[tuple[str, Row | None]] = [("everything present", head)]
    rows += [(str(row["name"]), row) for row in words.of(results, "missing", finding)]
    rows += [(f"a network of its own: {row['name']}", row) for row in alone]
    body = [(label, *(_or_dash(metric(row, name)) for name in ("auroc", "auprc", "brier"))) for label, row in rows]
    return f"{_md(finding)}, {words.population(results, finding)}:\n\n" + _md_table(("Input", "AUROC", "AUPRC", "Brier"), body)


def _card_subgroups(results: Results, finding: str) -> str:
    found = words.of(results, "subgroups", finding)
    if not found:
        return f"{_md(finding)}: not evaluated by subgroup."
    body = [
        (
            f"{row['by']}: {row['group']}{' (too few, no claim)' if plots.small_group(row) else ''}",
            f"{row['positives']} / {row['studies']}",
            *(_or_dash(metric(row, name)) for name in ("auroc", "recall", "specificity")),
        )
        for row in found
    ]
    return f"{_md(finding)}:\n\n" + _md_table(("Subgroup", "With / all studies", "AUROC", "Recall", "Specificity"), body)


def _calibration(results: Results, finding: str) -> str:
    head = words.headline(results, finding)
    said = f"{finding}: Brier {_or_dash(metric(head, 'brier'))}, calibration error (ECE) {_or_dash(metric(head, 'ece'))}, "
    selective = words.selective(results, finding)
    return f"{said}{words.population(results, finding)}. {words.triage(results, finding)} {selective}".strip()
