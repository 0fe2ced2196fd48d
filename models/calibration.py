"""Probabilities that mean what they say: temperature, the verdict "uncertain" with its guarantee, the atypical study.

::

    logit ─ temperature ─▶ probability ─ Triage ─▶ positive | negative | uncertain
    embedding ─ Atypical ─▶ distance > limit: the network has met nothing like it

All is numpy in, plain numbers and small arrays out: what a bundle keeps beside its weights.
The conformal part is our own, for MAPIE means its split conformal classifier for more than two classes (its maintainers closed
the class-conditional one for two, pull request 230) and counts studies where patients are what is exchangeable.

Not here: metrics (metrics.py), checks of the input (worker), drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.judged import FloatArray, known

# (n + 1)(1 - alpha) is often a whole number on paper and a hair above it in floats: 1e-9 of a patient is nobody.
_HAIR = 1e-9
# Below that, a fold of the held-out distances holds no patient.
_FOLDS = 10


@dataclass(frozen=True, slots=True)
class Triage:
    """Two thresholds on the probability of one finding, and the guarantee they carry.

    Attributes
    ----------
    alpha
        Chance, at most, that a truly positive study is called negative; the same for a truly negative one called positive.
    threshold
        Positive from here on (p >= threshold); NaN if refused, which calls every study uncertain.
    negative_below
        Negative below (p < negative_below); never above `threshold`.
    positives, negatives
        Patients (studies, if no groups were given) with such a study in the calibration set.
    refused
        Why no guarantee is given; empty if it is.
    """

    alpha: float
    threshold: float
    negative_below: float
    positives: int
    negatives: int
    refused: str = ""

    def call(self, probabilities: ArrayLike) -> FloatArray:
        """1 positive, 0 negative, NaN uncertain, for each probability; NaN, too, for a probability that is NaN."""
        p = np.asarray(probabilities, dtype=np.float64)
        return np.where(p >= self.threshold, 1.0, np.where(p < self.negative_below, 0.0, np.nan))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Share of the positives not called negative, of the negatives not called positive, and of all called uncertain."""

    positive: float
    negative: float
    uncertain: float


@dataclass(frozen=True, slots=True)
class Atypical:
    """Where the embeddings of known studies lie, and how far from them is too far.

    `mean` (E,) and `precision` (E, E) are float32, `limit` a number float32 can hold: written and read back they are the same.
    """

    mean: NDArray[np.float32]
    precision: NDArray[np.float32]
    limit: float

    def distance(self, embeddings: ArrayLike) -> FloatArray:
        """Mahalanobis distance of each embedding, (..., E) to (...)."""
        away = np.asarray(embeddings, dtype=np.float64) - self.mean.astype(np.float64)
        square = np.einsum("...i,ij,...j->...", away, self.precision.astype(np.float64), away)
        # A precision rounded to float32 may leave a hair less than nothing.
        distance: FloatArray = np.sqrt(np.maximum(square, 0))
        return distance

    def is_atypical(self, embeddings: ArrayLike) -> NDArray[np.bool_]:
        """Whether each embedding lies beyond the limit, (..., E) to (...); one with NaN does."""
        return ~np.asarray(self.distance(embeddings) <= self.limit)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Temperature of one finding in [0.5, 8] of least loss, doi:10.48550/arXiv.1706.04599; 1 if only one class is there.

    A grid, not a line search: the loss has one valley, and a percent of temperature changes nothing. The lower bound is for a
    calibration set that happens to be told apart without an error: there the least loss is at temperature 0, certainty.

    Parameters
    ----------
    logits, labels
        (N,); a label is 1, 0, or NaN where unknown.
    """
    (z,), truth, _ = known(np.asarray(logits)[None], labels, bounded=False)
    if not 0 < truth.sum() < len(truth):
        return 1.0
    grid = np.logspace(-1, 3, 161, base=2.0)
    scaled = z / grid[:, None]  # (161, N)
    losses = (np.logaddexp(0, scaled) - truth * scaled).mean(axis=1)
    return float(grid[losses.argmin()])


def triage(probabilities: ArrayLike, labels: ArrayLike, *, alpha: float, groups: ArrayLike | None = None) -> Triage:
    """Class-conditional split conformal sets of one finding, as two thresholds.

    A label's nonconformity is 1 - p(label). A label is in a study's set unless its nonconformity exceeds the quantile q, the
    ceil((n + 1)(1 - alpha))-th smallest of the n calibration studies that truly have that label. With a the p of that rank from
    above among positives, b that from below among negatives:

    * positive is in the set if p >= a, negative if p <= b;
    * a <= b (the classes overlap): {positive} if p > b, {negative} if p < a, both between;
    * a > b (a gap): {positive} if p >= a, {negative} if p <= b, none between.

    Both and none are "uncertain". With b' the next number above b, each case is: positive from max(a, b'), negative below
    min(a, b'). Called negative implies p < a, of which the chance is at most alpha if the study is truly positive and
    exchangeable with the calibration positives; called positive implies p > b, and the same for negatives.
    The chance is over calibration sets and new studies together, not for this set, patient or subgroup.

    Patients, not studies, are exchangeable: give `groups` wherever a patient may have several studies. Each patient of a class
    then weighs 1, shared among its studies of that class, n counts patients, and the chance is that of one study
    drawn from a new patient (doi:10.48550/arXiv.2306.06342). Without `groups` each study counts as a patient.

    Parameters
    ----------
    probabilities
        (N,) calibrated, from a network that saw none of these patients. Out-of-fold ones are of several networks: about right,
        no longer guaranteed.
    labels
        (N,) 1, 0, or NaN where unknown.
    groups
        (N,) whose each study is.

    Returns
    -------
    Triage
        Refused where a class has fewer than ceil(1 / alpha) - 1 patients: 19 at 0.05, 9 at 0.10, 4 at 0.20. No threshold but
        "always" keeps the promise then. Refused, too, where negatives of probability 1 leave no threshold.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha:g}; it must lie between 0 and 1.")
    (p,), truth, names = known(np.asarray(probabilities)[None], labels, groups)
    positive, negative = truth == 1, truth == 0
    positives, negatives = len(np.unique(names[positive])), len(np.unique(names[negative]))
    needed = math.ceil(1 / alpha - _HAIR) - 1
    if min(positives, negatives) < needed:
        unit = "studies" if groups is None else "patients"
        refused = f"{positives} positive and {negatives} negative {unit}; a guarantee at {alpha:g} needs {needed} of each."
        return Triage(alpha, math.nan, math.nan, positives, negatives, refused)
    # The quantile of -p, not of 1 - p: the p of a calibration study must come back as the float it was.
    lowest = -_quantile(-p[positive], names[positive], alpha)
    above = math.nextafter(_quantile(p[negative], names[negative], alpha), math.inf)
    if above > 1:
        refused = f"More than {alpha:g} of the negatives have a probability of 1; no study could be called positive."
        return Triage(alpha, math.nan, math.nan, positives, negatives, refused)
    return Triage(alpha, max(lowest, above), min(lowest, above), positives, negatives)


def covered(found: Triage, probabilities: ArrayLike, labels: ArrayLike, *, groups: ArrayLike | None = None) -> Coverage:
    """What the guarantee comes to on other studies (N,): of each class, the share not called the other; NaN if it is absent.

    With `groups` each patient weighs 1 in each share, as in `triage`.
    """
    (p,), truth, names = known(np.asarray(probabilities)[None], labels, groups)
    call = found.call(p)
    shares = []
    for right, asked in ((call != 0, truth == 1), (call != 1, truth == 0), (np.isnan(call), truth >= 0)):
        shares.append(float(np.average(right[asked], weights=_shares(names[asked]))) if asked.any() else math.nan)
    return Coverage(*shares)


def fit_atypical(
    embeddings: ArrayLike, *, groups: ArrayLike | None = None, share: float = 0.01, shrinkage: float | None = None
) -> Atypical:
    """Fit the distance that tells how unlike the known studies a new one is.

    Mahalanobis on a covariance shrunk to a multiple of the identity (Ledoit-Wolf, doi:10.1016/S0047-259X(03)00096-4), for there
    may be fewer studies than dimensions. The limit comes from distances of patients held out in 10 folds: those of the studies
    fitted on are too short by far. It is their conformal 1 - share quantile, each patient weighing 1; with fewer than
    ceil(1 / share) - 1 patients the largest distance, and then 1 in (patients + 1) typical ones lies beyond.

    Parameters
    ----------
    embeddings
        (N, E), fused.
    groups
        (N,) whose each study is; without, each is its own patient.
    shrinkage
        Weight in [0, 1] of the identity; None estimates it.

    Raises
    ------
    ValueError
        Fewer than 10 patients, embeddings that are not finite or do not vary.
    """
    from sklearn.model_selection import GroupKFold  # here: a worker, which fits nothing, starts without it

    points = np.asarray(embeddings, dtype=np.float64)
    names = np.arange(len(points)) if groups is None else np.asarray(groups)
    if points.ndim != 2 or names.shape != points.shape[:1]:
        raise ValueError(f"Embeddings {points.shape} and groups {names.shape} are not (N, E) and (N,) of the same studies.")
    if not np.isfinite(points).all():
        raise ValueError("An embedding is not finite.")
    patients = len(np.unique(names))
    if patients < _FOLDS:
        raise ValueError(f"{patients} patients are too few to hold some out: at least {_FOLDS} are needed.")
    distances = np.empty(len(points))
    for fitted, held_out in GroupKFold(_FOLDS).split(points, groups=names):
        distances[held_out] = _fit_distance(points[fitted], math.inf, shrinkage).distance(points[held_out])
    limit = _quantile(distances, names, share)
    return _fit_distance(points, float(np.float32(limit)), shrinkage)


def _fit_distance(embeddings: FloatArray, limit: float, shrinkage: float | None) -> Atypical:
    from sklearn.covariance import LedoitWolf, ShrunkCovariance

    shape = LedoitWolf() if shrinkage is None else ShrunkCovariance(shrinkage=shrinkage)
    if not np.ptp(embeddings, axis=0).any():
        raise ValueError("The embeddings do not vary: no study is farther than another.")
    shape.fit(embeddings)
    return Atypical(shape.location_.astype(np.float32), shape.precision_.astype(np.float32), limit)


def _quantile(values: FloatArray, groups: NDArray[np.generic], alpha: float) -> float:
    """Smallest value at or below which lie (1 - alpha)(n + 1) of n groups, each of weight 1; the largest if none is enough."""
    order = np.argsort(values, kind="stable")
    weight = np.cumsum(_shares(groups)[order])
    wanted = (1 - alpha) * (len(np.unique(groups)) + 1) - _HAIR
    return float(values[order[min(int(np.searchsorted(weight, wanted)), len(values) - 1)]])


def _shares(groups: NDArray[np.generic]) -> FloatArray:
    """Weight of each study so that each group weighs 1."""
    _, index, count = np.unique(groups, return_inverse=True, return_counts=True)
    weight: FloatArray = 1 / count[index]
    return weight
