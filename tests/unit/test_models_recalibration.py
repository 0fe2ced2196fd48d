"""A new site's numbers: what was promised holds there, and what cannot be promised changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.bundle import Bundle
from models.recalibration import recalibrate, settle

N = 400


def site(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A network that is three times too sure of "ill", and has never been told of "rare"."""
    rng = np.random.default_rng(seed)
    evidence = rng.normal(0, 1.5, N)
    ill = rng.random(N) < 1 / (1 + np.exp(-evidence))
    logits = np.stack([3 * evidence, rng.normal(size=N)], axis=1)
    labels = np.stack([ill.astype(float), np.full(N, np.nan)], axis=1)
    return torch.tensor(logits), torch.tensor(labels), [f"p{index}" for index in range(N)]


def test_a_network_that_is_too_sure_is_cooled_and_its_verdicts_keep_their_promise(bundle: Bundle) -> None:
    ill, _ = recalibrate(bundle, *site(0), alpha=0.1)
    assert ill.temperature == pytest.approx(3, rel=0.2)
    missed, called = [], []
    for seed in range(1, 21):
        logits, labels, _ = site(seed)
        p = torch.sigmoid(logits[:, 0] / ill.temperature)
        missed.append(float((p[labels[:, 0] == 1] < ill.negative_below).float().mean()))
        called.append(float((p[labels[:, 0] == 0] >= ill.threshold).float().mean()))
    assert np.mean(missed) == pytest.approx(0.1, abs=0.04)
    assert np.mean(called) == pytest.approx(0.1, abs=0.04)


def test_a_finding_nobody_labeled_keeps_every_number_it_had(bundle: Bundle) -> None:
    before = bundle.findings[1]
    new = recalibrate(bundle, *site(0), alpha=0.1)
    assert "0 positive" in new[1].refused
    settled = settle(bundle, new)
    assert settled.findings[1] == before
    assert settled.findings[0].alpha == 0.1
    assert settled.digest != bundle.digest
