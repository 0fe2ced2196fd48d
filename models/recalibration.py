"""A bundle's probabilities and verdicts fitted to a site's own patients; the weights stay as they are.

One temperature a finding, then two thresholds by class-conditional conformal prediction (calibration.py). Temperature and
thresholds are fitted on the same studies: one number fitted on a hundred moves the guarantee by far less than its own spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models import bundle as bundles
from models.bundle import Bundle
from models.calibration import fit_temperature, triage


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """One finding's new numbers; where `refused` says why there are none, they are those it had.

    `positives`, `negatives` are patients; `uncertain` is the share of these studies between the two thresholds.
    """

    finding: str
    temperature: float
    threshold: float
    negative_below: float
    alpha: float
    positives: int
    negatives: int
    uncertain: float
    refused: str


def recalibrate(bundle: Bundle, logits: Tensor, labels: Tensor, groups: Sequence[str], *, alpha: float) -> list[Recalibrated]:
    """Fit each finding of (N, L) raw `logits` to `labels`, NaN where unknown; `groups` says whose each study is."""
    result = []
    whose = np.array(groups)
    for index, spec in enumerate(bundle.findings):
        scores, truth = logits[:, index].double().numpy(), labels[:, index].double().numpy()
        temperature = fit_temperature(scores, truth)
        probabilities = 1 / (1 + np.exp(-scores / temperature))
        found = triage(probabilities, truth, alpha=alpha, groups=whose)
        low = spec.threshold if spec.negative_below is None else spec.negative_below
        new = (spec.temperature, spec.threshold, low, spec.alpha)
        if found.refused:
            # Thresholds mean something at the temperature they were chosen at only: all stay, or none.
            probabilities = 1 / (1 + np.exp(-scores / spec.temperature))
        else:
            # Outwards to the four places that bundle.toml keeps: the guarantee can only gain by that.
            new = (temperature, math.ceil(found.threshold * 1e4) / 1e4, math.floor(found.negative_below * 1e4) / 1e4, alpha)
        uncertain = (probabilities >= new[2]) & (probabilities < new[1])
        result.append(
            Recalibrated(spec.name, *new, found.positives, found.negatives, uncertain=float(uncertain.mean()), refused=found.refused)
        )
    return result


def settle(bundle: Bundle, new: Sequence[Recalibrated]) -> Bundle:
    """Write the numbers of what was not refused into bundle.toml; the bundle has another digest then, and its reports other UIDs."""
    keys = ("temperature", "threshold", "negative_below", "alpha")
    return bundles.settle(bundle.folder, {one.finding: {key: getattr(one, key) for key in keys} for one in new if not one.refused})
