"""Smaller networks of the same answers: distilled to the image alone, in bfloat16, in int8, and as a program for elsewhere.

::

    FusionNetwork ─ distil ─▶ FusionNetwork of the first image alone: for studies without a record
                  ├ to_bfloat16 ─▶ products in bfloat16        ├ exported ─┬ export_program ─▶ .pt2 (torch.export)
                  └ to_int8 ─▶ weights in int8                             └ export_onnx ─▶ .onnx
    each ─ compare ─▶ bytes, milliseconds, change of every probability

Attention's softmax and all norms stay in float32. Not here: a text encoder of the BERT type leaves as it stands in its
folder, so a network with one is not exported.
Shapes: B batch, L findings.
References: distillation, doi:10.48550/arXiv.1503.02531; one scale for each row of int8 weights, doi:10.48550/arXiv.1806.08342 §3.1.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from models.bundle import Bundle
from models.network import FusionNetwork
from models.stages import deterministic
from models.table import Labeled, Table
from models.tabular import HistoryEncoder
from models.text import TextEncoder
from models.training import masked_loss, predict
from models.transforms import Sample, collate

#: What softens the teacher's answers, doi:10.48550/arXiv.1503.02531 §2: between certain and certain lies what it learned.
SOFTNESS: Final = 2.0
#: Parameters of fewer numbers than this stay as they are: next to nothing is saved on them.
SMALL: Final = 256
#: Studies of the batch that a program is exported with.
EXAMPLES: Final = 3


def distil(
    teacher: FusionNetwork,
    bundle: Bundle,
    studies: Sequence[Labeled],
    *,
    seed: int,
    epochs: int | None = None,
    weight: float = 0.7,
    device: str = "cpu",
) -> FusionNetwork:
    """Train a network of the bundle's first image alone on what `teacher` answers to the whole study, and on the labels.

    It starts with the teacher's encoder of that image. What it cannot see in the image it can only guess: where the teacher
    rests on the record, the student is no substitute. Studies without that image are left out.

    Parameters
    ----------
    weight
        Of the teacher's softened answers; the rest is of the labels.

    Raises
    ------
    ValueError
        No study has the first image, or an answer of the teacher is not finite.
    """
    image, config, where = bundle.images[0].name, bundle.training, torch.device(device)
    seen = [s for s in studies if bool(s.sample[f"{image}_mask"])]
    if not seen:
        raise ValueError(f"No study has the image {image!r}: there is nothing to learn from.")
    small = image_only(bundle)
    with deterministic(seed, where):
        soft = torch.sigmoid(_finite(predict(teacher, seen, device=where)[0]) / SOFTNESS).to(where)
        student = FusionNetwork(small).to(where)
        student.images[image].load_state_dict(teacher.images[image].state_dict())
        table = Table(student.modalities, seen, where, config=config)
        optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        total = (epochs or config.epochs) * math.ceil(len(seen) / config.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        student.train()
        for _ in range(epochs or config.epochs):
            for rows in torch.split(torch.randperm(len(seen)), config.batch):
                logits = student.head(table.encode(student, rows, partial(torch.rand, len(rows))))
                # The square keeps the gradient's size whatever the softness, doi:10.48550/arXiv.1503.02531 §2.1.
                softened = functional.binary_cross_entropy_with_logits(logits / SOFTNESS, soft[rows]) * SOFTNESS**2
                loss = weight * softened + (1 - weight) * masked_loss(logits, table.labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return student.cpu().eval()


def image_only(bundle: Bundle) -> Bundle:
    """The bundle of a student: the first image, no record."""
    image = bundle.images[0]
    return replace(
        bundle,
        images=(replace(image, required=True),),
        record=replace(bundle.record, values=(), histories=(), texts=()),
        network=replace(bundle.network, fusion=f"single:{image.name}", text="gru", bert=""),
    )


class Bfloat16(nn.Module):
    """The network with weights of products and convolutions in bfloat16, and those computed in it; logits come out in float32."""

    def __init__(self, network: FusionNetwork) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        for module in self.network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                module.to(torch.bfloat16)

    @torch.no_grad()
    def forward(self, batch: Sample) -> Tensor:
        """Return logits (B, L)."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            logits: Tensor = self.network(batch)
        return logits.float()


class Int8(nn.Module):
    """The network with weights in int8, one scale for each row, widened to float32 for every forward: small, not fast.

    torch.ao's dynamic quantization, which also multiplies in int8, is deprecated as are the tensors it makes; what takes its
    place (torchao) is another dependency. Buffers and parameters of fewer than `SMALL` numbers stay in float32.
    """

    def __init__(self, network: FusionNetwork) -> None:
        super().__init__()
        # In a tuple, so that its tensors, which hold nothing, are not counted among this module's.
        self._skeleton = (copy.deepcopy(network).to("meta").eval(),)
        self._names: list[str] = []
        learned = dict(network.named_parameters())
        for name, tensor in network.state_dict().items():
            key = name.replace(".", "/")
            self._names.append(name)
            if name in learned and tensor.dim() >= 2 and tensor.numel() >= SMALL:
                scale = tensor.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
                scale = scale.view(-1, *[1] * (tensor.dim() - 1))
                self.register_buffer(key, (tensor / scale).round().to(torch.int8))
                self.register_buffer(f"{key}/scale", scale)
            else:
                self.register_buffer(key, tensor.clone())

    @torch.no_grad()
    def forward(self, batch: Sample) -> Tensor:
        """Return logits (B, L)."""
        held = dict(self.named_buffers())
        state = {}
        for name in self._names:
            key = name.replace(".", "/")
            scale = held.get(f"{key}/scale")
            state[name] = held[key] if scale is None else held[key].float() * scale
        return functional_call(self._skeleton[0], state, (batch,))  # type: ignore[no-any-return]


def to_bfloat16(network: FusionNetwork) -> Bfloat16:
    """Copy the network into bfloat16."""
    return Bfloat16(network)


def to_int8(network: FusionNetwork) -> Int8:
    """Copy the network into int8 weights."""
    return Int8(network)


class Plain(nn.Module):
    """The network as a function of plain tensors, in the order of the sorted keys of a sample, for programs that know no dictionary.

    Encoders whose code depends on the data (packed texts, sorted histories, places of uneven size) are replaced by equals that do not.

    Raises
    ------
    ValueError
        The text encoder is of the BERT type.
    """

    def __init__(self, network: FusionNetwork, keys: Sequence[str]) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.network = copy.deepcopy(network).cpu().eval()
        for name, encoder in self.network.images.items():
            self.network.images[name] = _EvenPlaces(encoder)
        text = getattr(self.network, "text", None)
        if isinstance(text, TextEncoder):
            self.network.text = _PaddedText(text)
        elif text is not None:
            raise ValueError("A network with a text encoder of the BERT type is not exported: that encoder stays in its folder.")
        history = getattr(self.network, "history", None)
        if history is not None and history.kind == "lstm":
            history._in_order = partial(_padded_history, history)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return logits (B, L)."""
        return self.network(dict(zip(self.keys, tensors, strict=True)))  # type: ignore[no-any-return]


def export_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write `path` (.pt2) for ``torch.export.load``: tensors in the order of the sample's sorted keys, any number of studies → logits."""
    torch.export.save(program, path)


def export_onnx(program: torch.export.ExportedProgram, sample: Sample, path: Path) -> None:
    """Write `path` (.onnx): inputs named as the sample's keys, any number of studies → ``logits``.

    Raises
    ------
    ImportError
        The packages onnx and onnxscript, of the extra ``export``, are not installed.
    """
    with warnings.catch_warnings():
        # Of torch 2.13 about itself.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        written = torch.onnx.export(
            program, input_names=sorted(sample), output_names=["logits"], dynamo=True, verbose=False, external_data=False
        )
    written.save(path)  # type: ignore[union-attr]  # None only without dynamo


def exported(network: FusionNetwork, sample: Sample) -> torch.export.ExportedProgram:
    """The network as a graph, for both files: a word's step through a GRU is a dozen operators, and tracing them takes the time.

    Raises
    ------
    ValueError
        It has a text encoder of the BERT type.
    """
    keys = sorted(sample)
    # Three, because a batch of 1 becomes a constant, and one of 2 is taken for the number of something else.
    batch = collate([sample] * EXAMPLES)
    studies = torch.export.Dim("studies", min=1, max=4096)
    shapes = ((*({0: studies} for _ in keys),),)
    with torch.no_grad(), warnings.catch_warnings():
        # Every RNN of torch keeps its weights in a list besides; nothing is assigned to it that the next run would miss.
        warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.network\..*_flat_weights")
        return torch.export.export(Plain(network, keys), tuple(batch[key] for key in keys), dynamic_shapes=shapes)


class _PaddedText(nn.Module):
    """A TextEncoder without packing: each direction an RNN of its own, the backward one over each text turned around."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        both = encoder.gru if encoder.kind == "gru" else encoder.lstm
        self.embed = encoder.embed
        self.onward, self.backward_ = (self._one_way(both, ending) for ending in ("", "_reverse"))

    @staticmethod
    def _one_way(both: nn.RNNBase, ending: str) -> nn.RNNBase:
        one = type(both)(both.input_size, both.hidden_size, batch_first=True)  # type: ignore[arg-type,call-arg]  # mode is given by GRU and LSTM
        one.load_state_dict({name: getattr(both, name + ending) for name in one.state_dict()})
        return one

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, K) → (B, T, d) and mask (B, T)."""
        pieces = (ids > 0).sum(-1)
        mask = pieces > 0
        words = self.embed(ids).sum(2) / pieces.clamp(min=1)[..., None]
        length, place = mask.sum(1, keepdim=True), torch.arange(ids.shape[1], device=ids.device)
        turned = torch.where(place < length, length - 1 - place, place)[..., None]  # (B, T, 1)
        back, _ = self.backward_(words.gather(1, turned.expand(-1, -1, words.shape[-1])))
        back = back.gather(1, turned.expand(-1, -1, back.shape[-1]))
        return torch.cat([self.onward(words)[0], back], dim=-1), mask


def _padded_history(encoder: HistoryEncoder, points: Tensor, mask: Tensor) -> Tensor:
    """What HistoryEncoder does with its LSTM, without packing: it only looks back, so what comes after the last point is no matter."""
    # The number of present points before it is a point's place; the others go behind. Sorting would be exported worse.
    place = torch.where(mask, mask.cumsum(1) - 1, mask.sum(1, keepdim=True) + (~mask).cumsum(1) - 1)[..., None]  # (B, T, 1)
    front = torch.zeros_like(points).scatter(1, place.expand(-1, -1, points.shape[-1]), points)
    states, _ = encoder.lstm(front)
    return states.gather(1, place.expand(-1, -1, states.shape[-1]))  # type: ignore[no-any-return]


class _EvenPlaces(nn.Module):
    """An ImageEncoder whose adaptive pooling is written out axis by axis: ONNX has none for sides that do not divide."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, *size) → (B, G, d)."""
        encoder = self.encoder
        maps = encoder.blocks(image * 2 - 1)  # type: ignore[operator]
        mean = peak = maps
        for axis in range(2, maps.dim()):
            side, grid = maps.shape[axis], int(encoder.grid)  # type: ignore[arg-type]
            parts = [(place * side // grid, -(-(place + 1) * side // grid)) for place in range(grid)]
            mean = torch.stack([mean.narrow(axis, low, high - low).mean(axis) for low, high in parts], axis)
            peak = torch.stack([peak.narrow(axis, low, high - low).amax(axis) for low, high in parts], axis)
        places = torch.cat([mean, peak], dim=1).flatten(2).transpose(1, 2)  # (B, G, 2C)
        return encoder.project(places) + encoder.place  # type: ignore[no-any-return,operator]


def compare(reference: nn.Module, other: nn.Module, studies: Sequence[Labeled], bundle: Bundle) -> dict[str, float]:
    """Size, speed and change of every answer of `other` against `reference`, both networks of `bundle`'s findings.

    Returns
    -------
    dict
        ``size_bytes`` of the tensors in a safetensors file; ``median_ms`` of one study at a time; ``max_change`` and
        ``mean_change`` of a probability; ``same_verdicts``, the share of equal verdicts over studies and findings.

    Raises
    ------
    ValueError
        There is no study, or an answer is not finite.
    """
    if not studies:
        raise ValueError("No study to compare the networks on.")
    batches = [collate([study.sample]) for study in studies]
    was, _ = _answers(reference, batches, bundle)
    now, seconds = _answers(other, batches, bundle)
    change = (now - was).abs()
    return {
        "size_bytes": float(len(save({name: tensor.contiguous() for name, tensor in other.state_dict().items()}))),
        "median_ms": 1000 * statistics.median(seconds),
        "max_change": float(change.max()),
        "mean_change": float(change.mean()),
        "same_verdicts": float((_verdicts(now, bundle) == _verdicts(was, bundle)).float().mean()),
    }


def compress(
    network: FusionNetwork, bundle: Bundle, studies: Sequence[Labeled], *, student: FusionNetwork | None = None
) -> list[dict[str, object]]:
    """Compare all variants with `network` on `studies`, one row each; a `student` (of `distil`) should not have learned from these."""
    variants: dict[str, nn.Module] = {"float32": network, "bfloat16": to_bfloat16(network), "int8": to_int8(network)}
    if student is not None:
        variants |= {"image alone": student, "image alone, int8": to_int8(student)}
    return [{"name": name, **compare(network, other, studies, bundle)} for name, other in variants.items()]


@torch.no_grad()
def _answers(network: nn.Module, batches: Sequence[Sample], bundle: Bundle) -> tuple[Tensor, list[float]]:
    """Probabilities (N, L) and the seconds of each study; the first is done twice, the warm-up does not count."""
    temperatures = torch.tensor([finding.temperature for finding in bundle.findings])
    network.eval()
    network(batches[0])
    answers, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        answers.append(torch.sigmoid(_finite(network(batch)) / temperatures))
        seconds.append(time.perf_counter() - start)
    return torch.cat(answers), seconds


def _finite(logits: Tensor) -> Tensor:
    """The same; a ValueError where one is infinite or undefined, for nothing can be learned from it or compared with it."""
    if not bool(logits.isfinite().all()):
        raise ValueError("A network gave an answer that is not a finite number.")
    return logits


def _verdicts(probabilities: Tensor, bundle: Bundle) -> Tensor:
    """(N, L): 2 positive, 1 uncertain, 0 negative."""
    high = torch.tensor([finding.threshold for finding in bundle.findings])
    low = torch.tensor([f.threshold if f.negative_below is None else f.negative_below for f in bundle.findings])
    return (probabilities >= high).int() + (probabilities >= low).int()
