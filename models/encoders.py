"""Each modality to tokens: an image's places, a record's values, a note's words, all of one width.

::

    image  (B, 1, *size)   ─ residual CNN ─ grid of places ─▶ (B, G, d), all present
    values (B, V)          ─ piecewise-linear bins ─ one token per value ─▶ (B, V, d), masked where missing
    text   (B, T, K) ids   ─ word vectors ─ GRU both ways ─▶ (B, T, d), masked after the last word

GroupNorm, not BatchNorm: a study's answer must not depend on the studies it happened to be batched with.
Shapes: B batch, C channels, G grid places, V values, T words, K pieces of a word, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions with a short cut, then the maximum of each 2-wide place.

    Striding in the first convolution instead was tried: a network of such blocks did not find a bright nodule of three
    voxels in 14 epochs, this one did in four (models/README.md, 2026-11-21).
    """

    def __init__(self, inputs: int, outputs: int, *, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first = conv(inputs, outputs, 3, padding=1, bias=False)
        self.second = conv(outputs, outputs, 3, padding=1, bias=False)
        self.short = conv(inputs, outputs, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = functional.relu(self.norm1(self.first(x)))  # (B, C, *size)
        return self.pool(functional.relu(self.norm2(self.second(y)) + self.short(x)))  # type: ignore[no-any-return]  # (B, C, size / 2)


class ImageEncoder(nn.Module):
    """A small residual network over a radiograph (`dims` 2) or a volume (3) → `grid` ** dims place tokens.

    Each place gives mean and maximum of its features: a nodule is a maximum, an opacity is a mean.
    """

    def __init__(self, channels: Sequence[int], width: int, *, dims: int, grid: int, dropout: float) -> None:
        super().__init__()
        self.dims, self.grid = dims, grid
        blocks = [ResidualBlock(i, o, dims=dims) for i, o in zip((1, *channels[:-1]), channels, strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.project = nn.Linear(2 * channels[-1], width)
        self.place = nn.Parameter(torch.randn(grid**dims, width) * 0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, *size) in [0, 1] → (B, G, d)."""
        maps = self.blocks(image * 2 - 1)  # (B, C, *size / 2**n)
        mean = functional.adaptive_avg_pool2d(maps, self.grid) if self.dims == 2 else functional.adaptive_avg_pool3d(maps, self.grid)
        peak = functional.adaptive_max_pool2d(maps, self.grid) if self.dims == 2 else functional.adaptive_max_pool3d(maps, self.grid)
        places = torch.cat([mean, peak], dim=1).flatten(2).transpose(1, 2)  # (B, G, 2C)
        return self.project(self.dropout(places)) + self.place  # type: ignore[no-any-return]


class ValueEncoder(nn.Module):
    """Numbers as positions between learned knots: piecewise-linear encoding, doi:10.48550/arXiv.2203.05556, §3.2.

    `knots` (V, bins + 1) are the training values' quantiles, kept with the weights.
    """

    knots: Tensor

    def __init__(self, values: int, width: int, *, bins: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-1, 1, bins + 1).repeat(values, 1))
        self.weight = nn.Parameter(torch.randn(values, bins, width) * bins**-0.5)
        self.name = nn.Parameter(torch.randn(values, width) * 0.1)
        self.sign = nn.Embedding(3, width)

    @torch.no_grad()
    def learn_knots(self, numbers: Tensor, mask: Tensor) -> None:
        """Set the knots to the quantiles of (N, V) `numbers` where `mask`; a never-seen value keeps its old knots."""
        steps = torch.linspace(0, 1, self.knots.shape[1])
        for index in range(self.knots.shape[0]):
            seen = numbers[mask[:, index], index].double()
            if seen.numel():
                knots = torch.quantile(seen, steps.double())
                # Equal quantiles (one value many times) would give bins without width.
                least = 1e-3 * torch.arange(len(knots))
                self.knots[index] = (knots + least * max(1.0, float(knots.abs().max()))).float()

    def forward(self, numbers: Tensor, signs: Tensor) -> Tensor:
        """(B, V) numbers and comparators → (B, V, d)."""
        low, high = self.knots[:, :-1], self.knots[:, 1:]  # (V, bins)
        filled = ((numbers[..., None] - low) / (high - low)).clamp(0, 1)  # (B, V, bins)
        coded = torch.einsum("bvn,vnd->bvd", filled, self.weight)
        return coded + self.name + self.sign(signs)  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """Words as the mean of their hashed pieces, then a GRU in both directions."""

    def __init__(self, buckets: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(buckets, width, padding_idx=0)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, K) ids → (B, T', d) and mask (B, T'); words stand at the front, T' is the longest text here."""
        longest = int((ids[..., 0] > 0).sum(1).max().clamp(min=1))
        ids = ids[:, :longest]
        pieces = (ids > 0).sum(-1)  # (B, T')
        mask = pieces > 0
        words = self.dropout(self.embed(ids).sum(2) / pieces.clamp(min=1)[..., None])  # (B, T', d)
        # Packed, so that the backward direction starts at the last word, not in the padding.
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        return states, mask
