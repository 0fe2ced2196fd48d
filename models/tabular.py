"""The record's numbers to tokens: values, their histories, genes.

::

    values  (B, V) numbers, comparators, ages ─ piecewise-linear | periodic ─▶ (B, V, d), one token a value
    history (B, T) triplets: hours before the study, variable, number ─ LSTM | self-attention ─▶ (B, T, d), masked
    genes   (B, K) hashed codes; (B, G) expression ─▶ (B, K + G, d), masked

Missing is masked, never imputed: a token nobody may look at is made of zeros, so that whatever lay in its place reaches
neither an output nor, in training, a gradient.
Shapes: B batch, V values, T steps, K variants, G genes, d width. Not here: which value counts (worker/inputs.py).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class ValueEncoder(nn.Module):
    """One token a value: its position between learned knots, its comparator, its name and, `with_age`, how old it is.

    `knots` (V, bins + 1) are the training values' quantiles, kept with the weights. "piecewise" fills the bins between
    them; "periodic" takes sines and cosines, at `bins` learned frequencies, of the position among the training values.

    References
    ----------
    Embeddings of numbers, doi:10.48550/arXiv.2203.05556, §3.2 (piecewise-linear) and §3.3 (periodic, then linear and ReLU).
    """

    knots: Tensor

    def __init__(
        self, values: int, width: int, *, bins: int, kind: Literal["piecewise", "periodic"] = "piecewise", with_age: bool = False
    ) -> None:
        super().__init__()
        if kind not in ("piecewise", "periodic"):
            raise ValueError(f"There is no value encoder {kind!r}; there are piecewise and periodic.")
        self.kind, self.with_age = kind, with_age
        self.register_buffer("knots", torch.linspace(-1, 1, bins + 1).repeat(values, 1))
        inputs = bins if kind == "piecewise" else 2 * bins
        self.weight = nn.Parameter(torch.randn(values, inputs, width) * inputs**-0.5)
        self.name = nn.Parameter(torch.randn(values, width) * 0.1)
        self.sign = nn.Embedding(3, width)
        if kind == "periodic":
            # 0.01 to 0.5 learned a band and a step from 120 studies alike (AUROC within 0.002 of piecewise-linear), 2 lost 0.011.
            self.frequency = nn.Parameter(torch.randn(values, bins) * 0.3)
            self.bias = nn.Parameter(torch.zeros(values, width))
        if with_age:
            self.age = nn.Linear(1, width)

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

    def forward(self, numbers: Tensor, signs: Tensor, ages: Tensor | None = None) -> Tensor:
        """(B, V) numbers, comparators and, for an encoder `with_age` only, hours before the study → (B, V, d).

        A missing value may hold anything, NaN too; its token is finite and the head must mask it.
        """
        if (ages is not None) != self.with_age:
            raise ValueError("Ages of the values are needed by an encoder made with_age, and by no other.")
        low, high = self.knots[:, :-1], self.knots[:, 1:]  # (V, bins)
        # A NaN that is masked later would still make the weights' gradient NaN: 0 x NaN.
        filled = ((torch.nan_to_num(numbers)[..., None] - low) / (high - low)).clamp(0, 1)  # (B, V, bins)
        if self.kind == "periodic":
            angles = 2 * math.pi * (2 * filled.mean(-1, keepdim=True) - 1) * self.frequency  # (B, V, bins)
            waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, V, 2 * bins)
            coded = functional.relu(torch.einsum("bvn,vnd->bvd", waves, self.weight) + self.bias)
        else:
            coded = torch.einsum("bvn,vnd->bvd", filled, self.weight)
        tokens: Tensor = coded + self.name + self.sign(signs)
        return tokens if ages is None else tokens + self.age(_days(ages)[..., None])


class HistoryEncoder(nn.Module):
    """A record's numbers over time as triplets (hours before the study, variable, number), in one row for all variables.

    "lstm": each token is the state after that point, in the order given; "transformer": each point attends to all, and only
    its hours tell when it was. `mean` and `scale` (variables) are the training numbers', kept with the weights.

    References
    ----------
    Triplets, each of time and number embedded by a small network of its own: doi:10.1145/3516367 (STraTS), §4.1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, variables: int, width: int, *, kind: Literal["lstm", "transformer"], dropout: float) -> None:
        super().__init__()
        if kind not in ("lstm", "transformer"):
            raise ValueError(f"There is no history encoder {kind!r}; there are lstm and transformer.")
        self.register_buffer("mean", torch.zeros(variables))
        self.register_buffer("scale", torch.ones(variables))
        self.name = nn.Embedding(variables, width)
        self.sign = nn.Embedding(3, width)
        nn.init.normal_(self.sign.weight, std=0.1)  # nearly every point has none, and should not be drowned by that
        self.time = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width))
        # A number of one variable is another thing than the same of the next: each has slopes of its own.
        self.slope = nn.Embedding(variables, width)
        self.number = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        if kind == "lstm":
            self.lstm = nn.LSTM(width, width, batch_first=True)
        else:
            heads = math.gcd(width, 4)
            self.layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
            )
        self.kind = kind

    @torch.no_grad()
    def learn_scale(self, numbers: Tensor, variables: Tensor, mask: Tensor) -> None:
        """Set mean and scale of each variable from (N, T) points where `mask`; one never seen keeps its old ones."""
        for index in range(len(self.mean)):
            seen = numbers[mask & (variables == index)].double()
            if seen.numel():
                self.mean[index], self.scale[index] = _mean_and_scale(seen)

    def forward(self, hours: Tensor, variables: Tensor, numbers: Tensor, signs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) hours before the study, variables, numbers, comparators and mask, oldest first → (B, T, d) and the mask."""
        hours, numbers = torch.where(mask, hours, 0.0), torch.where(mask, numbers, 0.0)
        variables, signs = torch.where(mask, variables, 0), torch.where(mask, signs, 0)
        standard = (numbers - self.mean[variables]) / self.scale[variables]
        bent = torch.tanh(standard[..., None] * self.slope(variables) + self.name(variables))  # (B, T, d)
        points = self.number(bent) + self.sign(signs) + self.time(_days(hours)[..., None])
        points = self.dropout(torch.where(mask[..., None], points, 0.0))
        states = self._in_order(points, mask) if self.kind == "lstm" else self._attended(points, mask)
        return torch.where(mask[..., None], states, 0.0), mask

    def _in_order(self, points: Tensor, mask: Tensor) -> Tensor:
        # Present points to the front, in their order: a hole (a point dropped in training) must not be a step of the LSTM.
        order = (~mask).int().argsort(dim=1, stable=True)  # (B, T)
        front = points.take_along_dim(order[..., None], dim=1)
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(front, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=points.shape[1])
        return states.take_along_dim(order.argsort(dim=1)[..., None], dim=1)

    def _attended(self, points: Tensor, mask: Tensor) -> Tensor:
        # Attention over nothing is NaN; a patient without history looks at zeros, and all of it is masked after.
        hidden = ~(mask | ~mask.any(1, keepdim=True))
        return self.layer(points, src_key_padding_mask=hidden)  # type: ignore[no-any-return]


class GeneEncoder(nn.Module):
    """Variant or cluster codes as embedded ids, expression as one token a gene: its own line of the standardized level, plus its name.

    Either part may be empty. `mean` and `scale` (genes) are the training levels', kept with the weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, genes: int, buckets: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(genes))
        self.register_buffer("scale", torch.ones(genes))
        self.variant = nn.Embedding(buckets, width, padding_idx=0)
        self.weight = nn.Parameter(torch.randn(genes, width) * 0.5)
        self.name = nn.Parameter(torch.randn(genes, width) * 0.1)

    @torch.no_grad()
    def learn_scale(self, numbers: Tensor, mask: Tensor) -> None:
        """Set mean and scale of each gene from (N, G) levels where `mask`; a gene never seen keeps its old ones."""
        for index in range(len(self.mean)):
            seen = numbers[mask[:, index], index].double()
            if seen.numel():
                self.mean[index], self.scale[index] = _mean_and_scale(seen)

    def forward(self, variants: Tensor, numbers: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) ids, 0 for none, (B, G) levels and their mask → (B, K + G, d) and mask (B, K + G)."""
        levels = (torch.where(mask, numbers, 0.0) - self.mean) / self.scale
        expression = levels[..., None] * self.weight + self.name  # (B, G, d)
        present = torch.cat([variants > 0, mask], dim=1)  # (B, K + G)
        tokens = torch.cat([self.variant(variants), expression], dim=1)  # (B, K + G, d)
        return torch.where(present[..., None], tokens, 0.0), present


def _days(hours: Tensor) -> Tensor:
    """Signed log of hours, 1 at one day: an hour matters today, not last year. After the study is below 0."""
    known = torch.nan_to_num(hours)
    return known.sign() * known.abs().log1p() / math.log1p(24.0)


def _mean_and_scale(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; of numbers all alike the latter is 1, so that another one is not infinitely far."""
    deviation = seen.std(correction=0)
    return seen.mean().float(), torch.where(deviation > 1e-6 * seen.abs().max(), deviation, 1.0).float()
