"""Judging a network honestly: out-of-fold, by patient, each modality alone beside the fusion.

Not here yet: intervals, calibration curves, abstention, floors and subgroups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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


def by_modality(bundle: Bundle, predict_keep: Callable[[tuple[str, ...] | None], Tensor], labels: Tensor) -> dict[str, dict[str, float]]:
    """AUROC per finding, for all modalities ("fused") and for each alone, of one network's logits (N, L)."""
    views: dict[str, tuple[str, ...] | None] = {"fused": None, **{m: (m,) for m in bundle.modalities}}
    table: dict[str, dict[str, float]] = {f.name: {} for f in bundle.findings}
    for view, keep in views.items():
        logits = predict_keep(keep)
        for index, finding in enumerate(bundle.findings):
            table[finding.name][view] = auroc(logits[:, index], labels[:, index])
    return table


def cross_validate(
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    folds: int,
    seed: int,
    epochs: int | None = None,
    device: str = "cpu",
    progress: FoldProgress | None = None,
) -> dict[str, dict[str, float]]:
    """Train `folds` times, each time without one fold of the groups; AUROC of the pooled out-of-fold probabilities.

    A study is only ever judged by a network that saw nothing of its group, nor stopped or calibrated on it.
    """
    fold_of = assign_folds(studies, folds=folds, seed=seed)
    pooled: dict[tuple[str, ...] | None, Tensor] = {}
    labels = torch.stack([s.labels for s in studies])
    views: list[tuple[str, ...] | None] = [None, *((m,) for m in bundle.modalities)]
    for fold in range(folds):
        if progress:
            progress(fold + 1, folds)
        inner = [s for s in studies if fold_of[s.group] != fold]
        outer = [index for index, s in enumerate(studies) if fold_of[s.group] == fold]
        result = fit(bundle, inner, seed=seed + fold, epochs=epochs, device=device)
        for keep in views:
            logits, _ = predict(result.network, [studies[i] for i in outer], keep=keep)
            pooled.setdefault(keep, torch.zeros_like(labels))[outer] = torch.sigmoid(logits / result.temperatures)
    return by_modality(bundle, lambda keep: pooled[keep], labels)


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
