"""Studies as tensors of many rows, encoded by rows: records stacked once, images by the batch or as tokens out of a cache.

Not here: making one study's tensors (transforms.py), learning from them (training.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.augmentation import augment
from models.fusion import Tokens
from models.image_spec import RESERVED
from models.network import FusionNetwork
from models.spec import TrainingConfig
from models.transforms import Sample, collate

#: ``draw(*shape)`` gives (B, *shape) uniform numbers of [0, 1), a row of its own for each study of a batch.
Draw = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Labeled:
    """One study to learn from: tensors, labels (L,) in {0, 1} or NaN where unknown, and whose it is."""

    sample: Sample
    labels: Tensor
    group: str


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Tokens of each study's images by frozen `encoders`: per image (N, 1 + copies, n, d), the first as it is, the others augmented."""

    encoders: dict[str, Tensor]
    groups: tuple[str, ...]
    tokens: dict[str, Tensor]

    def check(self, studies: Sequence[Labeled]) -> None:
        """Raise ValueError where these are not the tokens of `studies`, in this order."""
        if self.groups != tuple(s.group for s in studies):
            raise ValueError("The cached tokens are of other studies, or of these in another order.")


class Table:
    """Some studies on one device.

    Parameters
    ----------
    config
        How images are augmented and values dropped, for those who learn from it.
    cache, rows
        Cached tokens, and which of its rows are these studies.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        studies: Sequence[Labeled],
        device: torch.device,
        *,
        config: TrainingConfig | None = None,
        cache: TokenCache | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.images = tuple(name for name in modalities if name not in RESERVED)
        self.labels = torch.stack([s.labels for s in studies]).to(device)
        self._studies, self._device, self._config = studies, device, config
        record = collate([{key: t for key, t in s.sample.items() if key not in self.images} for s in studies])
        self.record = {key: tensor.to(device) for key, tensor in record.items()}
        chosen = slice(None) if rows is None else list(rows)
        self._tokens = {name: t[chosen].to(device) for name, t in cache.tokens.items()} if cache else None

    def __len__(self) -> int:
        return len(self._studies)

    def image(self, name: str, rows: Tensor, draw: Draw | None = None) -> Tensor:
        """Images (B, 1, *size) of some rows, augmented if there is a `draw`, 0 where absent."""
        stack = torch.stack([self._studies[row].sample[name] for row in rows.tolist()])
        if draw is not None and (config := self._config):
            # A generator for each image: it comes out the same in whichever batch or process it is.
            seeds = (draw() * 2**24).long().tolist()
            changes = {"shift": config.shift, "zoom": config.zoom, "rotate_deg": config.rotate_deg, "contrast": config.contrast}
            pairs = zip(torch.split(stack, 1), seeds, strict=True)
            stack = torch.cat([augment(one, torch.Generator().manual_seed(seed), **changes) for one, seed in pairs])
        present = self.record[f"{name}_mask"][rows]
        # where(): NaN of an absent image would come back by the gradient of the encoder's weights.
        return torch.where(present.view(-1, *[1] * (stack.dim() - 1)), stack.to(self._device), 0.0)

    def encode(self, network: FusionNetwork, rows: Tensor, draw: Draw | None = None) -> Tokens:
        """Tokens of some rows; with `draw` as in training: images augmented (or one of the cached copies), some values dropped."""
        batch: Sample = {key: tensor[rows] for key, tensor in self.record.items()}
        if draw is not None and self._config and "number_mask" in batch:
            kept = draw(batch["number_mask"].shape[1]) >= self._config.drop_value
            batch["number_mask"] = batch["number_mask"] & kept.to(self._device)
        if self._tokens is None:
            return network.encode(batch | {name: self.image(name, rows, draw) for name in self.images})
        tokens: Tokens = {}
        for name, cached in self._tokens.items():
            copy = torch.zeros_like(rows) if draw is None else (draw() * cached.shape[1]).long()
            tokens[name] = (cached[rows, copy], batch[f"{name}_mask"][:, None].expand(-1, cached.shape[2]))
        return tokens | network.encode_record(batch)


def digest_of(studies: Sequence[Labeled]) -> str:
    """The sha256 over tensors, labels and groups of studies in this order."""
    whole = hashlib.sha256()
    for study in studies:
        whole.update(f"{study.group}\0{digest(study.sample | {'labels of all': study.labels})}".encode())
    return whole.hexdigest()


def digest(tensors: dict[str, Tensor]) -> str:
    """The sha256 over names and bytes of tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()
