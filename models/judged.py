"""Scores of which it is known whether they were right.

Apart from metrics.py, so that a worker, which judges nothing, starts without scikit-learn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def known(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, *, bounded: bool = True
) -> tuple[FloatArray, FloatArray, NDArray[np.generic]]:
    """Scores (R, M), labels (M,) and groups (M,) of the M studies whose label is known; without groups each is its own.

    Raises
    ------
    ValueError
        Shapes differ, a label is neither 0, 1 nor NaN, or a score is not finite or, if `bounded`, no probability.
    """
    repeats, truth = np.atleast_2d(np.asarray(scores, dtype=np.float64)), np.asarray(labels, dtype=np.float64)
    names = np.arange(truth.size) if groups is None else np.asarray(groups)
    if truth.ndim != 1 or repeats.ndim != 2 or repeats.shape[1:] != truth.shape or names.shape != truth.shape:
        raise ValueError(f"Scores {repeats.shape}, labels {truth.shape} and groups {names.shape} are not of the same studies.")
    here = ~np.isnan(truth)
    repeats, truth = repeats[:, here], truth[here]
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("A label is neither 0, 1 nor NaN.")
    if not np.isfinite(repeats).all() or (bounded and ((repeats < 0) | (repeats > 1)).any()):
        raise ValueError(f"A score of a study with a known label is not {'a probability in [0, 1]' if bounded else 'finite'}.")
    return repeats, truth, names[here]
