"""How good the probabilities are, and how sure we may be of it: metrics, intervals, curves.

Shapes: N studies, R repeats, B resamples, T runs of equal scores. Scores are probabilities, (N,) or, for R repeats of
out-of-fold predictions of the same studies, (R, N). Labels (N,) are 1, 0, or NaN where unknown; unknown ones are left out.
What cannot be computed is NaN, never 0: a metric without its class has no value.

Not here: folds and networks (evaluation.py), what is done about bad calibration (calibration.py), plots (page.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk

from models.judged import FloatArray, known

#: Value, low and high end of the 95 % interval.
Interval = tuple[float, float, float]

METRICS = ("auroc", "auprc", "accuracy", "precision", "recall", "f1", "specificity", "brier", "ece")
#: Those that no threshold moves.
THRESHOLD_FREE = ("auroc", "auprc", "brier", "ece")

# FUSION.md §2: 15 bins of equal mass; fewer than 10 studies in a bin say nothing about its rate.
MAX_BINS, MIN_PER_BIN = 15, 10
# An interval that leaves out the resamples it cannot judge is one of the easy resamples only.
MAX_UNDEFINED = 0.05
# FUSION.md §9: no claims below 20 patients; 5 of a class is the least that gives recall any second digit.
MIN_PATIENTS, MIN_PER_CLASS = 20, 5
# Elements of (B, N) worked on at once: a few arrays of it stay in a core's cache.
_CHUNK = 200_000


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Error rate `risk` among the most confident share `coverage` of the studies, and the area under it."""

    coverage: list[float]
    risk: list[float]
    area: float
    studies: int


@dataclass(frozen=True, slots=True)
class Subgroup:
    """One subgroup's size and metrics; no metrics where it is too small to say anything."""

    studies: int
    patients: int
    positives: int
    metrics: dict[str, Interval] | None


def judge(scores: ArrayLike, labels: ArrayLike, *, threshold: float) -> dict[str, float]:
    """Every metric of `METRICS`; of repeats, the mean over those in which it is defined.

    AUROC and AUPRC (average precision) need both classes; recall and F1 a positive, specificity a negative, precision a
    study called positive (at or above `threshold`).

    ECE: mean over studies of the gap between predicted and observed rate in bins of equal mass. There are 15 bins, or so many
    that each holds 10 studies, at least 1. A study's bin is floor(bins x share of studies with a lower score): equal scores
    share a bin, so that the order of studies does not matter.

    Raises
    ------
    ValueError
        Shapes differ, a known label is neither 0 nor 1, or a score of a known label is no probability.
    """
    repeats, truth, _ = known(scores, labels)
    found = [_judge_one(score, truth, threshold) for score in repeats]
    return {name: float(_mean(np.array([each[name] for each in found]))) for name in METRICS}


def intervals(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, threshold: float, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Value and 95 % percentile interval of every metric, from resampled patients.

    Patients are drawn with replacement, all their studies with them, apart for patients with and without a positive study,
    so that no resample is short of a class. The metric of a resample is the mean over repeats. The interval holds
    the chance of having met these patients, not that of having trained these networks. That of ECE lies high, for each resample
    adds noise that ECE counts as error.

    Parameters
    ----------
    groups
        (N,) whose each study is.

    Returns
    -------
    dict
        Per metric value, low, high; low and high are NaN if over 5 % of the resamples leave the metric undefined.
    """
    values = judge(scores, labels, threshold=threshold)
    drawn = _resampled([scores], labels, groups, threshold=threshold, resamples=resamples, seed=seed)[0]
    return {name: (values[name], *_percentiles(drawn[name])) for name in METRICS}


def paired(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    metric: str = "auroc",
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float, float]:
    """Difference a - b of a metric of `THRESHOLD_FREE`, its 95 % interval and two-sided p, on the resamples of `intervals`.

    p is twice the smaller share of resamples on one side of 0, each counted with one more: never 0. Of a resample that equals 0
    both sides are counted, so that a model against itself has p = 1.

    Returns
    -------
    tuple
        Difference, low, high, p.
    """
    if metric not in THRESHOLD_FREE:
        raise ValueError(f"No paired difference of {metric!r}: it hangs on two thresholds. Choose one of {', '.join(THRESHOLD_FREE)}.")
    # The threshold moves none of the metrics that are let through above.
    value = judge(scores_a, labels, threshold=0.5)[metric] - judge(scores_b, labels, threshold=0.5)[metric]
    a, b = _resampled([scores_a, scores_b], labels, groups, threshold=0.5, resamples=resamples, seed=seed)
    difference = a[metric] - b[metric]
    low, high = _percentiles(difference)
    if np.isnan(low):
        return value, low, high, float("nan")
    side = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
    return value, low, high, min(1.0, 2 * (side + 1) / (int((~np.isnan(difference)).sum()) + 1))


def holm(p_values: ArrayLike) -> FloatArray:
    """p-values adjusted for their number by Holm's step-down, in the order given; NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]  # NaN sorts last
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def curve_points(scores: ArrayLike, labels: ArrayLike) -> dict[str, dict[str, list[float]]]:
    """ROC (x: 1 - specificity, y: recall) and PR (x: recall, y: precision), repeats pooled; empty if a class is absent."""
    pooled, truth, _ = _pool(scores, labels)
    if len(np.unique(truth)) < 2:
        return {name: {"x": [], "y": []} for name in ("roc", "pr")}
    false_positive, true_positive, _ = sk.roc_curve(truth, pooled)
    precision, recall, _ = sk.precision_recall_curve(truth, pooled, drop_intermediate=True)
    return {
        "roc": {"x": false_positive.tolist(), "y": true_positive.tolist()},
        "pr": {"x": recall.tolist(), "y": precision.tolist()},
    }


def reliability(scores: ArrayLike, labels: ArrayLike) -> dict[str, list[float]]:
    """Mean predicted and observed rate, and number of predictions, in each of the bins of ECE that is not empty; repeats pooled."""
    pooled, truth, studies = _pool(scores, labels)
    if not truth.size:
        return {"predicted": [], "observed": [], "count": []}
    below = np.searchsorted(np.sort(pooled), pooled, side="left")
    where = below * _bins(studies) // len(pooled)
    count = np.bincount(where)
    some = count > 0
    return {
        "predicted": (np.bincount(where, weights=pooled)[some] / count[some]).tolist(),
        "observed": (np.bincount(where, weights=truth)[some] / count[some]).tolist(),
        "count": count[some].astype(float).tolist(),
    }


def risk_coverage(scores: ArrayLike, labels: ArrayLike) -> RiskCoverage:
    """Error rate at 0.5 among the studies of most confidence (distance of p from 0.5), for each share of them; repeats pooled.

    Studies of equal confidence enter together. The area is that under the steps: without ties, the mean risk over coverages 1/N,
    2/N, ..., 1 (AURC, doi:10.48550/arXiv.1805.08206).
    """
    pooled, truth, studies = _pool(scores, labels)
    if not truth.size:
        return RiskCoverage([], [], float("nan"), 0)
    confidence = np.abs(pooled - 0.5)
    order = np.argsort(-confidence, kind="stable")
    errors = np.cumsum(((pooled >= 0.5) != (truth == 1))[order])
    last = np.flatnonzero(np.r_[np.diff(confidence[order]) < 0, True])
    coverage, risk = (last + 1) / len(truth), errors[last] / (last + 1)
    area = float((risk * np.diff(coverage, prepend=0)).sum())
    return RiskCoverage(coverage.tolist(), risk.tolist(), area, studies)


def is_monotone(curve: RiskCoverage, *, tolerance: float = 0.02) -> bool:
    """Whether abstention may be claimed: leaving out the unsure leaves fewer errors.

    Rule: read the risk at coverage 1, 0.9, 0.8, 0.7, 0.6, 0.5 (the first point of the curve that reaches it). It may never lie
    more than `tolerance` above the lowest risk at a larger coverage, and at half coverage it must lie below that at full
    coverage (or both be 0). Below 40 studies, half of which are 20, the answer is no.

    A finding's curve can fall while that of its positives rises (CHIL 2026, FUSION.md §2): ask of each class's studies too.
    """
    if curve.studies < 2 * MIN_PATIENTS:
        return False
    # A hair below, for 0.7 x N is a whole number of studies that a float may miss.
    points = np.searchsorted(curve.coverage, np.arange(10, 4, -1) / 10 - 1e-9)
    risk = np.asarray(curve.risk)[points]
    steady = bool((risk <= np.minimum.accumulate(risk) + tolerance).all())
    return steady and bool(risk[-1] < risk[0] or risk[0] == 0)


def subgroups(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    values: Sequence[str],
    *,
    threshold: float,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Subgroup]:
    """`intervals` at the deployed threshold for each of `values` (N,), e.g. sex; sizes count studies of known label.

    Metrics are refused (None) below 20 patients, or below 5 patients with a study of either class.
    """
    named, names, truth = np.asarray(values), np.asarray(groups), np.asarray(labels, dtype=np.float64)
    repeats = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    result = {}
    for value in sorted(set(values)):
        here = (named == value) & ~np.isnan(truth)
        patients, of_class = len(np.unique(names[here])), [len(np.unique(names[here & (truth == kind)])) for kind in (0, 1)]
        found = None
        if patients >= MIN_PATIENTS and min(of_class) >= MIN_PER_CLASS:
            found = intervals(repeats[:, here], truth[here], names[here], threshold=threshold, resamples=resamples, seed=seed)
        result[value] = Subgroup(int(here.sum()), patients, int((truth[here] == 1).sum()), found)
    return result


def weighted(scores: FloatArray, labels: FloatArray, weights: FloatArray, *, threshold: float) -> dict[str, FloatArray]:
    """Every metric under each row of weights: scikit-learn's with `sample_weight`, thousands of rows in one sort.

    Parameters
    ----------
    scores, labels
        (N,), all known.
    weights
        (B, N): how many times each study is in the resample.

    Returns
    -------
    dict
        (B,) per metric.
    """
    order = np.argsort(scores, kind="stable")
    p, y, w = scores[order], labels[order], weights[:, order]
    starts = np.flatnonzero(np.r_[True, np.diff(p) > 0])
    all_at = np.add.reduceat(w, starts, axis=1)  # (B, T)
    positive_at = np.add.reduceat(w * y, starts, axis=1)  # (B, T)
    negative_at = all_at - positive_at
    total, positive = w.sum(axis=1), w @ y
    negative = total - positive
    both = positive * negative > 0
    wins = (positive_at * (np.cumsum(negative_at, axis=1) - 0.5 * negative_at)).sum(axis=1)
    above = np.cumsum(all_at[:, ::-1], axis=1)[:, ::-1]
    # Where nothing lies at or above, no positive lies at, and what it is divided by does not matter.
    precision_at = np.cumsum(positive_at[:, ::-1], axis=1)[:, ::-1] / np.where(above > 0, above, 1)
    called = (p >= threshold).astype(np.float64)
    hits, calls = w @ (y * called), w @ called
    return {
        "auroc": _ratio(wins, positive * negative),
        "auprc": np.where(both, _ratio((positive_at * precision_at).sum(axis=1), positive), np.nan),
        "accuracy": _ratio(negative - calls + 2 * hits, total),
        "precision": _ratio(hits, calls),
        "recall": _ratio(hits, positive),
        "f1": np.where(positive > 0, _ratio(2 * hits, calls + positive), np.nan),
        "specificity": _ratio(negative - calls + hits, negative),
        "brier": _ratio(w @ (p - y) ** 2, total),
        "ece": _ece(p, y, w, starts),
    }


def _judge_one(score: FloatArray, truth: FloatArray, threshold: float) -> dict[str, float]:
    if not truth.size:
        return dict.fromkeys(METRICS, float("nan"))
    nan = float("nan")
    actual, called = truth.astype(int), (score >= threshold).astype(int)
    both = 0 < actual.sum() < len(actual)
    return {
        "auroc": sk.roc_auc_score(actual, score) if both else nan,
        "auprc": sk.average_precision_score(actual, score) if both else nan,
        "accuracy": sk.accuracy_score(actual, called),
        "precision": sk.precision_score(actual, called, zero_division=nan),
        "recall": sk.recall_score(actual, called, zero_division=nan),
        "f1": sk.f1_score(actual, called, zero_division=nan) if actual.any() else nan,
        "specificity": sk.recall_score(actual, called, pos_label=0, zero_division=nan),
        "brier": sk.brier_score_loss(actual, score, labels=[0, 1], pos_label=1),
        # scikit-learn has none.
        "ece": weighted(score, truth, np.ones((1, len(truth))), threshold=threshold)["ece"][0],
    }


def _ece(p: FloatArray, y: FloatArray, w: FloatArray, starts: NDArray[np.intp]) -> FloatArray:
    """Calibration error (B,) of scores and labels (N,) sorted by score, under weights (B, N)."""
    rows, total = len(w), w.sum(axis=1, keepdims=True)  # (B, 1)
    some = np.maximum(total, 1)
    first = starts[np.cumsum(np.isin(np.arange(len(p)), starts)) - 1]
    lower = (np.cumsum(w, axis=1) - w)[:, first]  # (B, N)
    bins = _bins(total)
    # Studies of weight 0 at the upper end have all weight below them: their bin would be one too many.
    where = np.minimum(bins * lower // some, bins - 1).astype(int)
    flat = (np.arange(rows)[:, None] * MAX_BINS + where).ravel()
    gaps = np.bincount(flat, weights=(w * (y - p)).ravel(), minlength=rows * MAX_BINS)
    return _ratio(np.abs(gaps).reshape(rows, MAX_BINS).sum(axis=1), total[:, 0])


def _bins(studies: ArrayLike) -> NDArray[np.int64]:
    bins: NDArray[np.int64] = np.clip(np.asarray(studies) // MIN_PER_BIN, 1, MAX_BINS).astype(np.int64)
    return bins


def _resampled(
    several: Sequence[ArrayLike], labels: ArrayLike, groups: ArrayLike, *, threshold: float, resamples: int, seed: int
) -> list[dict[str, FloatArray]]:
    """Each metric (B,) on the same resamples for each of `several` scores."""
    asked = [known(scores, labels, groups) for scores in several]
    _, truth, names = asked[0]
    if not truth.size:
        return [{name: np.full(resamples, np.nan) for name in METRICS} for _ in asked]
    parts: list[dict[str, list[FloatArray]]] = [{name: [] for name in METRICS} for _ in asked]
    for weights in _patient_weights(truth, names, resamples=resamples, seed=seed):
        for (repeats, _, _), part in zip(asked, parts, strict=True):
            found = [weighted(score, truth, weights, threshold=threshold) for score in repeats]
            for name in METRICS:
                part[name].append(_mean(np.stack([each[name] for each in found])))
    return [{name: np.concatenate(part[name]) for name in METRICS} for part in parts]


def _patient_weights(labels: FloatArray, groups: NDArray[np.generic], *, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each study is in each resample, (b, N) at a time; the same draws for the same labels, groups and seed."""
    names, patient = np.unique(groups, return_inverse=True)
    has_positive = np.bincount(patient, weights=labels) > 0
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(labels))
    for start in range(0, resamples, size):
        drawn = np.zeros((min(size, resamples - start), len(names)))
        for stratum in (has_positive, ~has_positive):
            count = int(stratum.sum())
            if count:
                drawn[:, stratum] = generator.multinomial(count, np.full(count, 1 / count), size=len(drawn))
        yield drawn[:, patient]


def _pool(scores: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, FloatArray, int]:
    """All repeats in one row: scores (R x M,), labels (R x M,) and the number of studies M."""
    repeats, truth, _ = known(scores, labels)
    return repeats.ravel(), np.tile(truth, len(repeats)), len(truth)


def _percentiles(values: FloatArray) -> tuple[float, float]:
    found = values[~np.isnan(values)]
    if not found.size or len(found) < (1 - MAX_UNDEFINED) * len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def _mean(values: FloatArray) -> FloatArray:
    """Mean over the first axis of what is not NaN; NaN where all is."""
    return _ratio(np.nansum(values, axis=0), (~np.isnan(values)).sum(axis=0).astype(np.float64))


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    above, below = np.broadcast_arrays(above, below)
    ratio: FloatArray = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return ratio
