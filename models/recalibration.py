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
    """One finding's new numbers; `refused` says why its verdicts stay as they were, or is empty.

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
        threshold, negative_below = spec.threshold, low
        if not found.refused:
            # Outwards to the four places that bundle.toml keeps: the guarantee can only gain by that.
            threshold, negative_below = math.ceil(found.threshold * 1e4) / 1e4, math.floor(found.negative_below * 1e4) / 1e4
        result.append(
            Recalibrated(
                finding=spec.name,
                temperature=temperature,
                threshold=threshold,
                negative_below=negative_below,
                alpha=0.0 if found.refused else alpha,
                positives=found.positives,
                negatives=found.negatives,
                uncertain=float(((probabilities >= negative_below) & (probabilities < threshold)).mean()),
                refused=found.refused,
            )
        )
    return result


def settle(bundle: Bundle, new: Sequence[Recalibrated]) -> Bundle:
    """Write the new numbers into bundle.toml; the bundle has another digest then, and its reports other UIDs."""
    return bundles.settle(
        bundle.folder,
        {
            one.finding: {
                "temperature": one.temperature,
                "threshold": one.threshold,
                "negative_below": one.negative_below,
                "alpha": one.alpha,
            }
            for one in new
        },
    )
