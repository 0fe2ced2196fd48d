"""Learning the weights: what is learned and from what, the same for every bundle; the loop itself is stages.py.

::

    stages "joint"   all of the network together ("joint")
    stages "frozen"  each image's encoder alone ("image:<name>") ─ its tokens, kept once ─ all the rest on them ("fusion")

Each step encodes the images, values and words once and runs the cheap head twice: with all that is present, and
with a random subset of modalities (sometimes none: that teaches the prior the Shapley values start from). Masked binary
cross-entropy, auxiliary heads so that no modality is lazy, early stop on patients held out whole.

Not here: where samples come from (worker/infer.py), judging the result (evaluation.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.bundle import Bundle
from models.calibration import fit_temperature
from models.fusion import Tokens
from models.network import FusionNetwork
from models.spec import TrainingConfig
from models.stages import Checkpoint, Epoch, deterministic, join, learn, over_all, processes
from models.stages import Progress as Progress
from models.table import Draw, Table, digest, digest_of
from models.table import Labeled as Labeled
from models.table import TokenCache as TokenCache

CHUNK = 32  # studies encoded at once where nothing is learned


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained network, its temperatures (L,) and how the training went; `held_…` is of the studies it did not learn from.

    `validation_loss` is NaN where no label of those is known. `checkpoint` is all there is of the run on disk, until it is saved.
    """

    network: FusionNetwork
    temperatures: Tensor
    epochs: int
    best_epoch: int
    validation_loss: float
    train_studies: int
    validation_studies: int
    held_logits: Tensor
    held_labels: Tensor
    held_groups: tuple[str, ...]
    history: list[Epoch]
    checkpoint: Path | None


def fit(
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    seed: int,
    epochs: int | None = None,
    device: str = "cpu",
    fusion: str = "",
    encoders: Mapping[str, Tensor] | None = None,
    tokens: TokenCache | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Train a fresh network on `studies`, with the bundle's `fusion` or another; the same seed on the same CPU gives the same bits.

    Parameters
    ----------
    encoders
        Image encoders learned by `pretrain` on the same studies with the same seed: they stay, the rest is learned.
    tokens
        The same with their tokens, of these studies in this order, by `cache_tokens`.
    folder
        Where a checkpoint is kept; one found there of the same run is continued, be it a finished one. It stays until
        `saving.save_fit` has written the result.

    Raises
    ------
    ValueError
        Fewer than two groups (none can be held out), tokens of other studies, a checkpoint of another run, or no finite loss.
    """
    config, where = bundle.training, join(device)
    train, held_out = _split(studies, config, seed)
    if tokens:
        tokens.check(studies)
        encoders = tokens.encoders
    checkpoint = _checkpoint(folder, bundle, studies, seed=seed, arguments=(epochs, fusion, digest(dict(encoders or {}))))
    history: list[Epoch] = []
    if config.stages == "frozen" and encoders is None:
        encoders, history = _pretrain(bundle, studies, seed, epochs or config.epochs, where, checkpoint, progress)
    if encoders is not None and tokens is None:
        tokens = cache_tokens(bundle, studies, encoders, seed=seed, device=device)

    with deterministic(seed, where):
        network = _fresh(bundle, where, fusion)
        learning, judging = (
            Table(network.modalities, [studies[row] for row in rows], where, config=config, cache=tokens, rows=rows)
            for rows in (train, held_out)
        )
        _learn_ranges(network, learning)
        if tokens:
            network.images.load_state_dict(tokens.encoders)
            network.images.requires_grad_(False)
        weight = _positive_weight(learning.labels, config.positive_weight)
        learned = learn(
            "fusion" if tokens else "joint",
            network,
            loss=partial(_fusion_loss, network, learning, config, weight),
            validate=partial(_held_out_loss, judging, weight) if _is_any_known(judging.labels) else None,
            studies=len(train),
            config=config,
            epochs=epochs or (config.fusion_epochs if tokens else 0) or config.epochs,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        network.load_state_dict(learned.weights)
        network.images.requires_grad_(True)
        logits, labels = _logits(network, judging).cpu(), judging.labels.cpu()
    return Fit(
        network=network.cpu().eval(),
        temperatures=fit_temperatures(logits, labels),
        epochs=learned.epochs,
        best_epoch=learned.best_epoch,
        validation_loss=learned.best_loss,
        train_studies=len(train),
        validation_studies=len(held_out),
        held_logits=logits,
        held_labels=labels,
        held_groups=tuple(studies[row].group for row in held_out),
        history=history + learned.history,
        checkpoint=checkpoint.file,
    )


def pretrain(
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    seed: int,
    epochs: int | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Learn each image's encoder alone, as `fit` does first under ``stages = "frozen"``; the state of ``network.images``."""
    where = join(device)
    checkpoint = _checkpoint(folder, bundle, studies, seed=seed, arguments=(epochs, "images"))
    encoders, _ = _pretrain(bundle, studies, seed, epochs or bundle.training.epochs, where, checkpoint, progress)
    checkpoint.remove()
    return encoders


@torch.inference_mode()
def cache_tokens(
    bundle: Bundle,
    studies: Sequence[Labeled],
    encoders: Mapping[str, Tensor],
    *,
    seed: int = 0,
    copies: int | None = None,
    device: str = "cpu",
) -> TokenCache:
    """Encode each study's images as they are and in `copies` (else the bundle's) augmented versions, for many heads to learn from."""
    where = join(device)
    copies = bundle.training.copies if copies is None else copies
    with deterministic(seed, where):
        network = _fresh(bundle, where).eval()
        network.images.load_state_dict(encoders)
        table = Table(network.modalities, studies, where, config=bundle.training)
        tokens = {}
        for image in bundle.images:
            encoder, parts = network.images[image.like or image.name], []
            for rows in torch.split(torch.arange(len(table)), CHUNK):
                draws: list[Draw | None] = [None, *[partial(torch.rand, len(rows))] * copies]
                seen = [encoder(table.image(image.name, rows, draw)) for draw in draws]
                parts.append(torch.stack(seen, dim=1).cpu())  # (rows, 1 + copies, n, d)
            tokens[image.name] = torch.cat(parts)
    return TokenCache(dict(encoders), tuple(s.group for s in studies), tokens)


def split_groups(studies: Sequence[Labeled], *, share: float, seed: int) -> tuple[list[Labeled], list[Labeled]]:
    """Split into (train, held out), every group whole, about `share` of the groups held out, at least one.

    Groups are ranked by a hash of seed and name, apart by their first label's mean: both sides hold each kind that has two groups or
    more, and which other studies are there moves a patient only at the cut.
    """
    groups = sorted({s.group for s in studies})
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} group of studies: at least 2 are needed to hold one out.")
    mean = {g: torch.stack([s.labels[0] for s in studies if s.group == g]).nanmean().item() for g in groups}
    held: set[str] = set()
    for high in (False, True):
        kind = [g for g in groups if (mean[g] >= 0.5) == high]
        kind.sort(key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())
        held.update(kind[: max(round(len(kind) * share), int(len(kind) > 1))])
    held = held or {groups[0]}
    return [s for s in studies if s.group not in held], [s for s in studies if s.group in held]


def step_loss(network: FusionNetwork, tokens: Tokens, labels: Tensor, config: TrainingConfig, draw: Draw, *, weight: Tensor) -> Tensor:
    """Loss of one batch: everything present + a random subset of modalities + each modality alone."""
    head = network.head
    keep = (draw(len(network.modalities)) >= config.drop_modality).to(labels.device)
    fused = [masked_loss(head(tokens, kept), labels, weight=weight, shared=True) for kept in (None, keep)]
    alone = network.alone(tokens).values()
    each = [masked_loss(own, torch.where(here[:, None], labels, torch.nan), weight=weight, shared=True) for own, here in alone]
    return torch.stack(fused).mean() + config.auxiliary * torch.stack(each).mean()


def masked_loss(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None, shared: bool = False) -> Tensor:
    """Binary cross-entropy over the known of labels (B, L); 0, with a gradient, where none is.

    Parameters
    ----------
    weight
        Of a positive, (L,).
    shared
        The batch is one process's share: divided by an average share's known labels, the mean over processes comes out right.
    """
    known = ~labels.isnan()
    each = functional.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), pos_weight=weight, reduction="none")
    count = over_all(known.sum()).clamp(min=1) / processes()[1] if shared else known.sum().clamp(min=1)
    return torch.where(known, each, 0.0).sum() / count


def predict(
    network: FusionNetwork,
    studies: Sequence[Labeled],
    *,
    device: str | torch.device = "cpu",
    keep: Sequence[str] | None = None,
    tokens: TokenCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, L) and labels (N, L), in order; of the modalities only those in `keep`, if given; images out of `tokens`, if given."""
    if tokens:
        tokens.check(studies)
    table = Table(network.modalities, studies, torch.device(device), cache=tokens)
    return _logits(network, table, keep=keep).cpu(), table.labels.cpu()


@torch.inference_mode()
def embeddings(network: FusionNetwork, studies: Sequence[Labeled], *, device: str | torch.device = "cpu") -> Tensor:
    """The fused embedding (N, E) of each study, in order."""
    network.eval()
    table = Table(network.modalities, studies, torch.device(device))
    parts = torch.split(torch.arange(len(table)), CHUNK)
    return torch.cat([network.head.embed(table.encode(network, rows)) for rows in parts]).cpu()


def fit_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """Temperatures (L,) of logits (N, L), each finding by `calibration.fit_temperature`."""
    columns = zip(logits.double().numpy().T, labels.numpy().T, strict=True)
    return torch.tensor([fit_temperature(*column) for column in columns])


class _ImageAlone(nn.Module):
    """An encoder and a head of its own: the mean of its tokens → logits (B, L)."""

    def __init__(self, encoder: nn.Module, width: int, findings: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, findings))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image).mean(1))  # type: ignore[no-any-return]


def _pretrain(
    bundle: Bundle,
    studies: Sequence[Labeled],
    seed: int,
    epochs: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], list[Epoch]]:
    history: list[Epoch] = []
    parts = [[studies[row] for row in rows] for rows in _split(studies, bundle.training, seed)]
    with deterministic(seed, device):
        network = _fresh(bundle, device)
        learning, judging = (Table(network.modalities, part, device, config=bundle.training) for part in parts)
        weight = _positive_weight(learning.labels, bundle.training.positive_weight)
        # All heads before anything is learned: a resumed run skips epochs, and with them the random numbers that they drew.
        width, findings = bundle.network.width, len(bundle.findings)
        each = {name: _ImageAlone(encoder, width, findings).to(device) for name, encoder in network.images.items()}
        for name, alone in each.items():
            learned = learn(
                f"image:{name}",
                alone,
                loss=partial(_alone_loss, alone, learning, name, weight),
                validate=partial(_held_out_alone_loss, judging, name, weight) if _is_any_known(_labels_of(name, judging)) else None,
                studies=len(learning),
                config=bundle.training,
                epochs=epochs,
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
            )
            alone.load_state_dict(learned.weights)
            history += learned.history
    return {name: tensor.cpu() for name, tensor in network.images.state_dict().items()}, history


def _fresh(bundle: Bundle, device: torch.device, fusion: str = "") -> FusionNetwork:
    network = FusionNetwork(bundle, fusion=fusion).to(device)
    for image in bundle.images:
        if not image.like and image.kind == "radiograph":  # on a CPU, 128 x 128, measured: a step takes 0.79 of the time
            network.images[image.name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a gap in torch's stubs
    return network


def _alone_loss(alone: nn.Module, table: Table, name: str, weight: Tensor, rows: Tensor, draw: Draw) -> Tensor:
    return masked_loss(alone(table.image(name, rows, draw)), _labels_of(name, table)[rows], weight=weight, shared=True)


@torch.inference_mode()
def _held_out_alone_loss(table: Table, name: str, weight: Tensor, alone: nn.Module) -> float:
    alone.eval()
    logits = [alone(table.image(name, rows)) for rows in torch.split(torch.arange(len(table)), CHUNK)]
    return float(masked_loss(torch.cat(logits), _labels_of(name, table), weight=weight))


def _is_any_known(labels: Tensor) -> bool:
    return not bool(labels.isnan().all())


def _labels_of(name: str, table: Table) -> Tensor:
    """The labels of those who have this modality."""
    return torch.where(table.record[f"{name}_mask"][:, None], table.labels, torch.nan)


def _fusion_loss(network: FusionNetwork, table: Table, config: TrainingConfig, weight: Tensor, rows: Tensor, draw: Draw) -> Tensor:
    return step_loss(network, table.encode(network, rows, draw), table.labels[rows], config, draw, weight=weight)


def _held_out_loss(table: Table, weight: Tensor, network: nn.Module) -> float:
    assert isinstance(network, FusionNetwork)  # noqa: S101  the averaged copy of one
    return float(masked_loss(_logits(network, table), table.labels, weight=weight))


@torch.inference_mode()
def _logits(network: FusionNetwork, table: Table, *, keep: Sequence[str] | None = None) -> Tensor:
    network.eval()
    allowed = None if keep is None else torch.tensor([[m in keep for m in network.modalities]], device=table.labels.device)
    parts = torch.split(torch.arange(len(table)), CHUNK)
    kept = [None if allowed is None else allowed.expand(len(rows), -1) for rows in parts]
    return torch.cat([network.head(table.encode(network, rows), some) for rows, some in zip(parts, kept, strict=True)])


def _learn_ranges(network: FusionNetwork, table: Table) -> None:
    """Tell the encoders of numbers what numbers there are."""
    record = {key: tensor.cpu() for key, tensor in table.record.items()}
    for name, learner, keys in (
        ("values", "learn_knots", ("numbers", "number_mask")),
        ("history", "learn_scale", ("history_numbers", "history_variables", "history_mask")),
        ("genes", "learn_scale", ("expression", "expression_mask")),
    ):
        if name in network.modalities:
            getattr(getattr(network, name), learner)(*(record[key] for key in keys))


def _positive_weight(labels: Tensor, most: float) -> Tensor:
    """Negatives per positive of each finding, (N, L) → (L,), at least 1 and at most `most`."""
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    return (negatives / positives.clamp(min=1)).clamp(min=1.0, max=max(1.0, most))


def _split(studies: Sequence[Labeled], config: TrainingConfig, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows held out, by group, so that the order in which files were found does not decide the weights."""
    row_of = {id(study): row for row, study in enumerate(studies)}
    train, held_out = split_groups(sorted(studies, key=lambda s: s.group), share=config.validation, seed=seed)
    return [row_of[id(s)] for s in train], [row_of[id(s)] for s in held_out]


def _checkpoint(folder: Path | None, bundle: Bundle, studies: Sequence[Labeled], *, seed: int, arguments: tuple[object, ...]) -> Checkpoint:
    if folder is None:
        return Checkpoint(None, {})
    # Not what save_fit writes into bundle.toml: a run killed right after that finds its own checkpoint. The files of a language
    # model are known by the digest alone.
    files = bundle.digest if bundle.network.bert else ""
    learned = repr((files, [f.name for f in bundle.findings], bundle.images, bundle.record, bundle.network, bundle.training))
    names = {"data": digest_of(studies), "bundle": learned, "seed": str(seed), "arguments": repr((*arguments, processes()[1]))}
    return Checkpoint(folder, names)
