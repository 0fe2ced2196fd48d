"""Reading an evaluation: what its numbers allow one to say, in plain sentences.

Claims follow intervals: a difference is shown when its 95 % interval excludes 0 and p, where there is one, does not take that
back; an AUROC is better than chance when its interval lies above 0.5; below `FEWEST` patients, of a class too, nothing is claimed.
No markup and no drawing here: page.py and plots.py do that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.metrics import RiskCoverage, is_monotone

#: The evaluation as read from JSON; its shape is drawn in models/README.md.
Results = Mapping[str, Any]
Row = Mapping[str, Any]

# FUSION.md §9: no claim about a class of fewer patients.
FEWEST = 20
# A floor this near to the network may be what the network has learned.
CLOSE = 0.05
JOINTLY = ", learned jointly"  # ends a row's name, as in folds.py, which needs torch
ABOVE = "that is above the network"
GROUPS = {"fusion": "Fusion", "single": "One modality", "late": "Late fusion", "baseline": "Simple baselines", "floor": "Shortcut floors"}
METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "specificity": "Specificity",
    "brier": "Brier",
    "ece": "ECE",
}
LOWER_IS_BETTER = frozenset({"brier", "ece"})
RECORD = frozenset({"values", "history", "text", "genes"})


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The headline against one other row: `difference` is positive where the headline is better."""

    other: Row
    difference: Estimate | None
    p: float | None


def estimate(found: Sequence[float | None] | None) -> Estimate | None:
    """[value, low, high], or None where the evaluation could not say."""
    if found is None or len(found) != 3 or not all(x is not None and math.isfinite(x) for x in found):
        return None
    value, low, high = (float(x) for x in found if x is not None)
    return Estimate(value, low, high)


def metric(row: Row | None, name: str) -> Estimate | None:
    """One metric of a row."""
    return estimate(((row or {}).get("metrics") or {}).get(name))


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals with a true minus sign, or a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def given(part: Row | None, key: str) -> str:
    """What a part of the results says, or a dash where it says nothing."""
    value = (part or {}).get(key)
    return "–" if value is None else str(value)


def share(value: float | None) -> str:
    """A share as whole percent, never "0 %" or "100 %" unless it is."""
    if value is None or not math.isfinite(value):
        return "–"
    if 0 < value < 0.005:
        return "below 1 %"
    return f"{100 * value:.1f} %" if 0.995 <= value < 1 else f"{100 * value:.0f} %"


def chance(p: float | None) -> str:
    """A p value as one prints it."""
    return "–" if p is None or not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def findings(results: Results) -> list[str]:
    """The findings judged, in the order of the rows."""
    return list(dict.fromkeys(row["finding"] for row in results.get("rows") or []))


def rows(results: Results, finding: str) -> list[Row]:
    """One finding's rows, group by group, each group in the order given."""
    order = list(GROUPS)
    found = [row for row in results.get("rows") or [] if row["finding"] == finding]
    return sorted(found, key=lambda row: order.index(row["group"]) if row["group"] in order else len(order))


def of(results: Results, part: str, finding: str) -> list[Row]:
    """One finding's entries of "differences", "missing" or "subgroups"."""
    return [row for row in results.get(part) or [] if row["finding"] == finding]


def headline(results: Results, finding: str) -> Row | None:
    """The row a bundle is judged by: its own, of whatever group, else "tokens", else the first one given."""
    found = rows(results, finding)
    fused = [row for row in found if row["group"] == "fusion"]
    named = (results.get("bundle") or {}).get("fusion") or "tokens"
    return next((row for row in found if row["name"] == named), next(iter(fused or found), None))


def best(found: Sequence[Row], group: str) -> Row | None:
    """The row of the highest AUROC in a group."""
    known = [(m.value, -index, row) for index, row in enumerate(found) if row["group"] == group and (m := metric(row, "auroc"))]
    return max(known, key=lambda item: item[:2])[2] if known else None


def image_alone(found: Sequence[Row]) -> Row | None:
    """The best single modality that is an image."""
    return best([row for row in found if str(row["name"]).removesuffix(" alone") not in RECORD], "single")


def compare(results: Results, finding: str, other: Row, name: str = "auroc") -> Comparison:
    """Find the paired difference of the headline against `other`, turned so that more is better for the headline."""
    head = headline(results, finding)
    sign = -1 if name in LOWER_IS_BETTER else 1
    for row in of(results, "differences", finding):
        if head is None or row["metric"] != name or {row["a"], row["b"]} != {head["name"], other["name"]}:
            continue
        found = estimate(row["difference"])
        if found and sign * (1 if row["a"] == head["name"] else -1) < 0:
            found = Estimate(-found.value, -found.high, -found.low)
        return Comparison(other, found, row.get("p"))
    return Comparison(other, None, None)


def comparisons(results: Results, finding: str) -> list[tuple[str, Comparison]]:
    """What the first screen compares with: image alone, the best single modality, late fusion, the best simple baseline."""
    head = headline(results, finding)
    found = [row for row in rows(results, finding) if row is not head]
    image, own = image_alone(found), (head or {}).get("group")
    chosen = [("", image)] if image else []
    for group, kind in (("single", "single modality"), ("late", "late fusion"), ("baseline", "simple baseline")):
        row = best(found, group)
        if row is not None and row is not image:
            chosen.append((f"the best {'other ' if own == group else ''}{kind}, ", row))
    return [(label + str(row["name"]), compare(results, finding, row)) for label, row in chosen]


def against_chance(auroc: Estimate, level: float = 0.5) -> str:
    """What an AUROC's interval says about guessing."""
    if auroc.low > level:
        return f"That is better than chance ({level})."
    if auroc.high < level:
        return f"That is worse than chance ({level}): look for a fault in the labels or the folds."
    return f"That is not shown to be more than chance ({level}): the interval spans it."


def verdict(difference: Estimate | None, p: float | None = None) -> str:
    """What a difference's interval says; `p`, corrected for the number of comparisons, can only take a claim back."""
    if difference is None:
        return "no paired difference was computed, so no claim"
    if difference.low <= 0 <= difference.high:
        return "not shown to be more than chance (the interval includes 0)"
    if p is not None and p > 0.05:
        return f"not shown after correction for the number of comparisons (p = {chance(p)}), though the interval excludes 0"
    return "a gain that is shown (the interval excludes 0)" if difference.low > 0 else "a loss that is shown (the interval excludes 0)"


def in_short(difference: Estimate | None, p: float | None = None) -> str:
    """The verdict as two words behind a comma, or nothing where there is none."""
    return "" if difference is None else ", not shown" if verdict(difference, p).startswith("not") else ", shown"


def higher(results: Results, finding: str) -> str:
    """Say what is simpler than the network and scores higher, claim or no claim: a kind, how many of it, and the best; else nothing."""
    found, head = rows(results, finding), metric(headline(results, finding), "auroc")
    said = []
    for group in ("single", "late", "baseline", "floor"):
        known = [row for row in found if row["group"] == group and metric(row, "auroc")]
        above = [row for row in known if head and (m := metric(row, "auroc")) and m.value > head.value]
        if top := best(above, group):
            said.append(f"{GROUPS[group].lower()}: {len(above)} of {len(known)}, {top['name']} most with {metric(top, 'auroc')}")
    if not head or not said:
        return ""
    weighed = "; with so few patients that may be chance" if too_few(results, finding) else ""
    return f"Beware: simpler ways have a higher AUROC here than the network's {number(head.value)} ({'; '.join(said)}){weighed}."


def jointly(results: Results) -> str:
    """Say what the row is that learned its encoders with its fusion, where there is one."""
    name = next((str(row["name"]) for row in results.get("rows") or [] if str(row["name"]).endswith(JOINTLY)), "")
    own = ", as this bundle is trained" if (results.get("bundle") or {}).get("stages") == "joint" else ""
    what = f"the fusion {name.removesuffix(JOINTLY)} with image encoders learned together with it{own}"
    return f"{name}: {what}; all other networks stand on encoders learned before." if name else ""


def twins(results: Results, finding: str) -> str:
    """Which rows have the same figures to the last digit, and why that is no error."""
    alike: dict[str, list[str]] = {}
    for row in rows(results, finding):
        if metric(row, "auroc"):
            alike.setdefault(repr(row["metrics"]), []).append(str(row["name"]))
    said = "; ".join(" = ".join(names) for names in alike.values() if len(names) > 1)
    return f"Equal figures: {said}. What one of them is given more than the other changed no answer." if said else ""


def close_floors(results: Results, finding: str) -> list[tuple[Row, str]]:
    """Floors that reach what the network reaches, or nearly: above it, within its interval, near its value, or not shown to be below."""
    head = metric(headline(results, finding), "auroc")
    close = []
    for row in rows(results, finding):
        found = metric(row, "auroc")
        if row["group"] != "floor" or found is None or head is None:
            continue
        difference = compare(results, finding, row).difference
        if found.value > head.value:
            close.append((row, ABOVE))
        elif difference and difference.low <= 0:
            close.append((row, "the network is not shown to be better than it"))
        elif found.value >= min(head.low, head.value - CLOSE):
            close.append((row, "that is close to the network"))
    return close


def counts(results: Results, finding: str) -> tuple[int | None, int | None]:
    """Studies with the finding and without it."""
    cohort = results.get("cohort") or {}
    return (cohort.get("positives") or {}).get(finding), (cohort.get("negatives") or {}).get(finding)


def too_few(results: Results, finding: str) -> str:
    """Why the cohort, or the finding's smaller class, holds too few patients to claim anything; empty where it does not."""
    cohort, (positives, negatives) = results.get("cohort") or {}, counts(results, finding)
    patients = [(cohort.get(key) or {}).get(finding) for key in ("patients_positive", "patients_negative")]
    # A class has no more patients than studies: those bound it where an older evaluation does not say.
    known = (
        (patients[0], "patients have the finding"),
        (patients[1], "patients are without the finding"),
        (cohort.get("patients") or 0, "patients in all"),
        (positives, "studies have the finding"),
        (negatives, "studies are without the finding"),
    )
    least, what = min(((n, what) for n, what in known if n is not None), key=lambda item: item[0])
    return f"only {least} {what}; {FEWEST}{' patients' * what.startswith('studies')} are needed" if least < FEWEST else ""


def population(results: Results, finding: str) -> str:
    """Never a number without its n."""
    cohort, (positives, negatives) = results.get("cohort") or {}, counts(results, finding)
    words = f"{given(cohort, 'studies')} studies of {given(cohort, 'patients')} patients"
    return words if positives is None else f"{words} ({positives} studies with the finding, {negatives} without)"


def how_good(results: Results, finding: str) -> str:
    """The headline in one or two sentences."""
    head = headline(results, finding)
    auroc, n = metric(head, "auroc"), population(results, finding)
    if head is None or auroc is None:
        return f"On {n}, no AUROC could be computed for {finding}: no claim is made."
    said = f"On {n}, the network ({head['name']}) reached an AUROC of {number(auroc.value)} for {finding}"
    said += f" (95 % interval {number(auroc.low)} to {number(auroc.high)})"
    if few := too_few(results, finding):
        return f"{said}. {few.capitalize()}: no claim is made from these figures."
    right = "about half the time" if 0.495 <= auroc.value < 0.505 else f"{100 * auroc.value:.0f} times in 100"
    return f"{said}: shown one study with the finding and one without, it ranks them rightly {right}. {against_chance(auroc)}"


def how_compared(results: Results, finding: str) -> list[str]:
    """What is simpler and higher, then a sentence a comparison: with image alone, the best single modality, late fusion, baseline; floors.

    Where there are too few patients for a claim, only what speaks against the network is said.
    """
    said = [above] if (above := higher(results, finding)) else []
    if metric(headline(results, finding), "auroc") is None or too_few(results, finding):
        return said
    for label, found in comparisons(results, finding):
        other, gap = metric(found.other, "auroc"), found.difference
        ends = (gap.value, gap.low, gap.high) if gap else ()
        amount = "a difference of {} ({} to {}), ".format(*(number(x, signed=True) for x in ends)) if gap else ""
        said.append(f"Against {label}, AUROC {other or 'unknown'}: {amount}{verdict(gap, found.p)}.")
    for row, why in close_floors(results, finding):
        said.append(f"Beware: {row['name']}, a shortcut that sees nothing of the finding, reaches {metric(row, 'auroc')}; {why}.")
    return said


def without(results: Results, finding: str) -> str:
    """Which modality it leans on most, in a sentence; empty where nothing was taken away."""
    known = [(m, row) for row in of(results, "missing", finding) if (m := metric(row, "auroc"))]
    if not known or too_few(results, finding):
        return ""
    least, row = min(known, key=lambda item: item[0].value)
    return f"It loses most {row['name']}: AUROC {least}."


def triage(results: Results, finding: str) -> str:
    """How many the bundle calls uncertain and how many it calls wrongly; then what a recalibration would give."""
    found = (results.get("triage") or {}).get(finding)
    if not found:
        return "No triage was evaluated."
    if not (own := found.get("shipped")):
        return _recalibrated(results, finding, found)
    if too_few(results, finding):
        return f"No claim is made about triage ({population(results, finding)}): {too_few(results, finding)}."
    missed, alarmed, alpha = own.get("positives_called_negative"), own.get("negatives_called_positive"), own.get("alpha") or 0
    broken = alpha and any(x is not None and x > alpha + 1e-9 for x in (missed, alarmed))
    aim = f"; the bundle aims at {share(alpha)} at most of each{', so do not rely on it' if broken else ''}" if alpha else ""
    return (
        f"Triage by the bundle's own thresholds (positive from {number(own.get('threshold'))}, negative below "
        f"{number(own.get('negative_below'))}): {share(own.get('uncertain'))} of studies are called uncertain and left to a person, "
        f"{share(missed)} of those with the finding are called negative, {share(alarmed)} of those without it positive{aim}. "
        f"After recalibrate: {_recalibrated(results, finding, found).removeprefix('Triage: ')}"
    )


def _recalibrated(results: Results, finding: str, found: Row) -> str:
    """What thresholds fitted to this cohort come to, and whether their aim was met."""
    n = f"n = {given(found, 'positives')} with and {given(found, 'negatives')} without the finding"
    seen = [found.get("coverage_positive"), found.get("coverage_negative")]
    if found.get("refused"):
        return f"No triage is offered ({n}): {str(found['refused']).rstrip('.')}."
    if too_few(results, finding):
        return f"No claim is made about triage ({n}): {too_few(results, finding)}."
    broken = any(x is not None and x < 1 - found["alpha"] - 1e-9 for x in seen)
    return (
        f"Triage: {share(found.get('uncertain'))} of studies are called uncertain and left to a person ({n}). "
        f"The aim is that at least {share(1 - found['alpha'])} of each class are not called the opposite; seen were "
        f"{share(seen[0])} of those with the finding and {share(seen[1])} of those without"
        f"{': fewer than aimed at, so do not rely on it.' if broken else '.'}"
    )


def selective(results: Results, finding: str) -> str:
    """Whether abstention may be claimed, by the rule of metrics.is_monotone (FUSION.md §2: only then)."""
    curve = ((results.get("curves") or {}).get(finding) or {}).get("risk_coverage") or {}
    coverage, risk = list(curve.get("coverage") or []), list(curve.get("risk") or [])
    if not coverage or coverage[-1] < 1 - 1e-9 or too_few(results, finding):
        return ""
    studies = sum(n or 0 for n in counts(results, finding))
    if is_monotone(RiskCoverage(coverage, risk, math.nan, studies)):
        return "Answering fewer studies, the most certain first, lowers the error."
    return "Answering fewer studies is not shown to lower the error: no claim for abstention."


def repeated(results: Results) -> str:
    """How often the patients were dealt anew, after a comma, or nothing where they were dealt once."""
    times = results.get("repeats")
    return "" if times in (None, 1) else f", repeated {times} times"


def worth(results: Results) -> str:
    """What figures from so many patients are worth."""
    cohort = results.get("cohort") or {}
    patients = cohort.get("patients") or 0
    if patients < FEWEST:
        weight = f"{patients} patients are too few for any claim: this shows that the software runs, not that the network is good"
    elif patients < 100:
        weight = f"{patients} patients are few: a first indication worth a larger study, no ground to act on"
    elif patients < 1000:
        weight = f"{patients} patients are enough to rank methods that lie far apart, not to rely on the network"
    else:
        weight = f"{patients} patients give narrow intervals, for this cohort"
    return (
        f"What these figures are worth: {weight}. Every study was judged by networks that had seen nothing of its patient "
        f"({given(results, 'folds')} folds{repeated(results)}), all within one cohort; how good it is "
        "elsewhere is unknown until it is judged there. For research, not for the care of patients."
    )
