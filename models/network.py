"""A bundle's network: one encoder for each modality, one fusion head over all of them.

::

    sample ─ image encoders, values, history, text, genes ─▶ Tokens ─ head (fusion.py) ─▶ logits (B, L)
                                                               └─ auxiliary heads, one a modality, for training

Shapes: B batch, L findings, d width. Not here: what a head does (fusion.py), how samples are made (transforms.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.bundle import Bundle
from models.fusion import Tokens, make_head
from models.images import ImageEncoder
from models.tabular import GeneEncoder, HistoryEncoder, ValueEncoder
from models.text import BertEncoder, TextEncoder
from models.transforms import Sample


class FusionNetwork(nn.Module):
    """Encoders, fusion head and, for training only, one auxiliary head per modality.

    Parameters
    ----------
    fusion
        Another head than the bundle's, by its name in ``fusion.FUSIONS``.
    """

    def __init__(self, bundle: Bundle, *, fusion: str = "") -> None:
        super().__init__()
        config, record, drop = bundle.network, bundle.record, bundle.training.dropout
        width, findings = config.width, len(bundle.findings)
        self.modalities = bundle.modalities
        self.with_age = config.value_age
        self._encoder_of = {image.name: image.like or image.name for image in bundle.images}
        self.images = nn.ModuleDict(
            {
                image.name: ImageEncoder(
                    image.encoder, image.channels, width, dims=2 if image.kind == "radiograph" else 3, grid=image.grid, dropout=drop
                )
                for image in bundle.images
                if not image.like
            }
        )
        if record.values:
            self.values = ValueEncoder(len(record.values), width, bins=config.bins, kind=config.values, with_age=config.value_age)
        if record.histories:
            self.history = HistoryEncoder(len(record.histories), width, kind=config.history, dropout=drop)
        if record.notes:
            self.text: nn.Module = (
                BertEncoder(bundle.folder / config.bert, width, dropout=drop)
                if config.text == "bert"
                else TextEncoder(config.buckets, width, kind=config.text, dropout=drop)
            )
        if record.genomics:
            self.genes = GeneEncoder(len(record.genes), config.buckets, width)
        self.head = make_head(
            fusion or config.fusion,
            self.modalities,
            width=width,
            heads=config.heads,
            layers=config.layers,
            findings=findings,
            dropout=drop,
        )
        self.auxiliary = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, findings)) for _ in self.modalities])

    def encode(self, batch: Sample) -> Tokens:
        """Encode each modality once; `batch` is a collated sample (transforms.py lists its keys)."""
        tokens: Tokens = {}
        for name, encoder in self._encoder_of.items():
            places = self.images[encoder](batch[name])
            tokens[name] = (places, batch[f"{name}_mask"][:, None].expand(-1, places.shape[1]))
        return tokens | self.encode_record(batch)

    def encode_record(self, batch: Sample) -> Tokens:
        """Encode what is no image."""
        tokens: Tokens = {}
        if "values" in self.modalities:
            ages = batch["ages"] if self.with_age else None
            tokens["values"] = (self.values(batch["numbers"], batch["signs"], ages), batch["number_mask"])
        if "history" in self.modalities:
            names = ("history_hours", "history_variables", "history_numbers", "history_signs", "history_mask")
            tokens["history"] = self.history(*(batch[name] for name in names))
        if "text" in self.modalities:
            given = (batch["words"],) if "word_mask" not in batch else (batch["words"], batch["word_mask"])
            tokens["text"] = self.text(*given)
        if "genes" in self.modalities:
            tokens["genes"] = self.genes(batch["variants"], batch["expression"], batch["expression_mask"])
        return tokens

    def forward(self, batch: Sample) -> Tensor:
        """Return logits (B, L)."""
        return self.head(self.encode(batch))  # type: ignore[no-any-return]

    def alone(self, tokens: Tokens) -> dict[str, tuple[Tensor, Tensor]]:
        """Each modality's own logits (B, L) and whether it is present (B,)."""
        result = {}
        for name, head in zip(self.modalities, self.auxiliary, strict=True):
            values, mask = tokens[name]
            weight = mask[..., None].float()
            mean = torch.where(mask[..., None], values, 0.0).sum(1) / weight.sum(1).clamp(min=1)  # (B, d)
            result[name] = (head(mean), mask.any(1))
        return result
