"""Judging a network honestly: out-of-fold, by patient, each modality alone beside the fusion.

Not here yet: intervals, calibration curves, abstention, floors and subgroups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from models.bundle import Bundle
from models.training import Labeled, fit, predict

#: Called with (fold, folds) as each one starts.
FoldProgress = Callable[[int, int], None]


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of (N,) scores for (N,) labels in {0, 1}; ties count half; NaN if one class is absent."""
    known = ~labels.isnan()
    scores, labels = scores[known].double(), labels[known]
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    return float(wins.mean())


def by_modality(bundle: Bundle, scores: Mapping[str, Tensor], labels: Tensor) -> dict[str, dict[str, float]]:
    """AUROC per finding and view; `scores` holds (N, L) for each view of `views`."""
    return {
        finding.name: {view: auroc(found[:, index], labels[:, index]) for view, found in scores.items()}
        for index, finding in enumerate(bundle.findings)
    }


def views(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """What a network is judged by: everything ("fused"), and each modality alone."""
    return {"fused": bundle.modalities, **{m: (m,) for m in bundle.modalities}}


def out_of_fold(
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    folds: int,
    seed: int,
    epochs: int | None = None,
    device: str = "cpu",
    progress: FoldProgress | None = None,
) -> dict[str, Tensor]:
    """Train `folds` times, each time without one fold of the groups; calibrated probabilities (N, L) per view.

    A study is only ever judged by a network that saw nothing of its group, nor stopped or calibrated on it.
    """
    fold_of = assign_folds(studies, folds=folds, seed=seed)
    pooled = {view: torch.full((len(studies), len(bundle.findings)), torch.nan) for view in views(bundle)}
    for fold in range(folds):
        if progress:
            progress(fold + 1, folds)
        inner = [s for s in studies if fold_of[s.group] != fold]
        outer = [index for index, s in enumerate(studies) if fold_of[s.group] == fold]
        result = fit(bundle, inner, seed=seed + fold, epochs=epochs, device=device)
        for view, keep in views(bundle).items():
            logits, _ = predict(result.network, [studies[i] for i in outer], keep=keep)
            pooled[view][outer] = torch.sigmoid(logits / result.temperatures)
    return pooled


def assign_folds(studies: Sequence[Labeled], *, folds: int, seed: int) -> dict[str, int]:
    """Give each group to the fold that holds fewest studies so far, largest groups first, ties by a seeded hash."""
    sizes: dict[str, int] = {}
    for study in studies:
        sizes[study.group] = sizes.get(study.group, 0) + 1
    if len(sizes) < folds:
        raise ValueError(f"{len(sizes)} groups cannot fill {folds} folds.")
    order = sorted(sizes, key=lambda g: (-sizes[g], hashlib.sha256(f"{seed}/{g}".encode()).digest()))
    load = [0] * folds
    result = {}
    for group in order:
        fold = load.index(min(load))
        result[group] = fold
        load[fold] += sizes[group]
    return result
