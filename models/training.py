"""Learning the weights: one plain loop, the same for every bundle.

Each step encodes the images, values and words once and runs the cheap head twice: with all that is present, and
with a random subset of modalities (sometimes none: that teaches the prior the Shapley values start from). Masked binary
cross-entropy, auxiliary heads so that no modality is lazy, AdamW under a cosine, averaged weights, early stop on
patients held out whole.

Not here: where samples come from (worker/infer.py), judging the result (evaluation.py).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from models.bundle import Bundle, TrainingConfig, settle_weights
from models.fusion import FusionNetwork, Tokens
from models.transforms import Sample, augment, collate

#: Called after each epoch with (epoch, epochs, validation loss).
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Labeled:
    """One study to learn from: tensors, labels (L,) in {0, 1} or NaN where unknown, and whose it is."""

    sample: Sample
    labels: Tensor
    group: str


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained network, its temperatures (L,) and how the training went."""

    network: FusionNetwork
    temperatures: Tensor
    epochs: int
    best_epoch: int
    validation_loss: float
    train_studies: int
    validation_studies: int


def fit(
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    seed: int,
    epochs: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Fit:
    """Train a fresh network on `studies`; the same seed on the same CPU gives the same bits.

    Raises
    ------
    ValueError
        Fewer than two groups: no patient can be held out.
    """
    config = bundle.training
    total = epochs or config.epochs
    # By group, so that the order in which files were found does not decide the weights.
    ordered = sorted(studies, key=lambda s: s.group)
    train, held_out = split_groups(ordered, share=config.validation, seed=seed)
    with _deterministic(seed):
        network = FusionNetwork(bundle).to(device)
        if "values" in network.modalities:
            network.values.learn_knots(
                torch.stack([s.sample["numbers"] for s in train]), torch.stack([s.sample["number_mask"] for s in train])
            )
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(_decay_groups(network, config.weight_decay), lr=config.learning_rate)
        steps = total * math.ceil(len(train) / config.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps, warm_up=0.05))
        average = copy.deepcopy(network).eval()
        best, best_epoch, best_loss = copy.deepcopy(average), 0, math.inf
        epoch = 0
        for epoch in range(1, total + 1):
            network.train()
            for batch, labels in _batches(train, config, generator):
                batch, labels = _to(batch, device), labels.to(device)
                loss = step_loss(network, batch, labels, config, generator)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                _follow(average, network, config.average)
            loss_now = float(_loss(*predict(average, held_out, device=device)))
            if progress:
                progress(epoch, total, loss_now)
            if loss_now < best_loss:
                best, best_epoch, best_loss = copy.deepcopy(average), epoch, loss_now
            elif epoch - best_epoch >= config.patience:
                break
        logits, labels = predict(best, held_out, device=device)
    return Fit(
        network=best.cpu(),
        temperatures=fit_temperatures(logits, labels),
        epochs=epoch,
        best_epoch=best_epoch,
        validation_loss=best_loss,
        train_studies=len(train),
        validation_studies=len(held_out),
    )


def save_fit(bundle: Bundle, result: Fit) -> Bundle:
    """Write weights.safetensors, then its sha256 and the temperatures into bundle.toml; return the bundle as it now is."""
    raw = save({name: tensor.contiguous() for name, tensor in result.network.state_dict().items()})
    bundle.weights_path.write_bytes(raw)
    temperatures = {f.name: float(t) for f, t in zip(bundle.findings, result.temperatures, strict=True)}
    return settle_weights(bundle.folder, sha256=hashlib.sha256(raw).hexdigest(), temperatures=temperatures)


def split_groups(studies: Sequence[Labeled], *, share: float, seed: int) -> tuple[list[Labeled], list[Labeled]]:
    """Split into (train, held out), every group whole, about `share` of the groups held out, at least one.

    Groups are ranked by a hash of seed and name: which other studies are there does not move a patient. Ranked apart by
    the mean of their first label, so that both sides hold both kinds.
    """
    groups = sorted({s.group for s in studies})
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} group of studies: at least 2 are needed to hold one out.")
    mean = {g: torch.stack([s.labels[0] for s in studies if s.group == g]).nanmean().item() for g in groups}
    held: set[str] = set()
    for high in (False, True):
        kind = [g for g in groups if (mean[g] >= 0.5) == high]
        kind.sort(key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())
        held.update(kind[: round(len(kind) * share)])
    held = held or {groups[0]}
    return [s for s in studies if s.group not in held], [s for s in studies if s.group in held]


def step_loss(network: FusionNetwork, batch: Sample, labels: Tensor, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Loss of one batch: everything present + a random subset of modalities + the auxiliary heads."""
    modalities = len(network.modalities)
    tokens = network.encode(_drop_values(batch, config.drop_value, generator))
    keep = torch.rand(labels.shape[0], modalities, generator=generator) >= config.drop_modality
    loss = _loss(network.head(tokens), labels) + _loss(network.head(tokens, keep.to(labels.device)), labels)
    auxiliary = _auxiliary_loss(network, tokens, labels)
    return 0.5 * loss + config.auxiliary * auxiliary


@torch.inference_mode()
def predict(
    network: FusionNetwork, studies: Sequence[Labeled], *, device: str = "cpu", keep: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, L) and labels (N, L), in order; of the modalities only those in `keep`, if given."""
    network.eval()
    logits = []
    for start in range(0, len(studies), 32):
        batch = _to(collate([s.sample for s in studies[start : start + 32]]), device)
        allowed = None
        if keep is not None:
            allowed = torch.tensor([m in keep for m in network.modalities]).expand(len(batch["image_mask"]), -1).to(device)
        logits.append(network.head(network.encode(batch), allowed).cpu())
    return torch.cat(logits), torch.stack([s.labels for s in studies])


def fit_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """Per finding the temperature in [0.5, 8] of least loss, doi:10.48550/arXiv.1706.04599; 1 if only one class is there.

    A grid, not a line search: the loss has one valley, and a percent of temperature changes nothing. The lower bound is for a
    held-out set that happens to be told apart without an error: there the least loss is at temperature 0, certainty.
    """
    grid = torch.logspace(-1, 3, 161, base=2.0)
    result = torch.ones(logits.shape[1])
    for index in range(logits.shape[1]):
        known = ~labels[:, index].isnan()
        truth = labels[known, index]
        if truth.numel() and 0 < truth.mean() < 1:
            scaled = logits[known, index] / grid[:, None]  # (grid, N)
            losses = functional.binary_cross_entropy_with_logits(scaled, truth.expand_as(scaled), reduction="none").mean(1)
            result[index] = grid[losses.argmin()]
    return result


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over known labels; 0, with a gradient, where none is."""
    known = ~labels.isnan()
    each = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def _auxiliary_loss(network: FusionNetwork, tokens: Tokens, labels: Tensor) -> Tensor:
    losses = []
    for logits, present in network.alone(tokens).values():
        losses.append(_loss(logits, torch.where(present[:, None], labels, torch.nan)))
    return torch.stack(losses).mean()


def _drop_values(batch: Sample, chance: float, generator: torch.Generator) -> Sample:
    if "number_mask" not in batch:
        return batch
    mask = batch["number_mask"]
    kept = torch.rand(mask.shape, generator=generator).to(mask.device) >= chance
    return {**batch, "number_mask": mask & kept}


def _batches(studies: Sequence[Labeled], config: TrainingConfig, generator: torch.Generator) -> Iterator[tuple[Sample, Tensor]]:
    order = torch.randperm(len(studies), generator=generator).tolist()
    for start in range(0, len(order), config.batch):
        chosen = [studies[i] for i in order[start : start + config.batch]]
        batch = collate([s.sample for s in chosen])
        batch["image"] = augment(
            batch["image"],
            generator,
            shift=config.shift,
            zoom=config.zoom,
            rotate_deg=config.rotate_deg,
            contrast=config.contrast,
        )
        yield batch, torch.stack([s.labels for s in chosen])


def _cosine(step: int, steps: int, *, warm_up: float) -> float:
    first = max(1, int(steps * warm_up))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def _decay_groups(network: FusionNetwork, weight_decay: float) -> list[dict[str, object]]:
    """No weight decay on biases, norms and embeddings: only matrices that mix features shrink."""
    mixing = [p for p in network.parameters() if p.dim() >= 2]
    plain = [p for p in network.parameters() if p.dim() < 2]
    return [{"params": mixing, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def _follow(average: FusionNetwork, network: FusionNetwork, rate: float) -> None:
    for slow, fast in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        slow.lerp_(fast, 1 - rate)


def _to(batch: Sample, device: str) -> Sample:
    return {key: tensor.to(device) for key, tensor in batch.items()}


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed torch and forbid algorithms whose sums depend on scheduling; leave both as they were found."""
    state, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        torch.set_rng_state(state)
