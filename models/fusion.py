"""★ The network, whole: tokens of whatever is present → masked attention → one query per finding → log-odds.

::

    image, values, text ─ encoders ─▶ tokens (B, N, d), mask (B, N)
                       + one context token, always present: what is believed of a study nothing is known of
    ─ `layers` × pre-norm self-attention over the present tokens
    ─ cross-attention, one label query per finding ─ LayerNorm ─ one weight vector per finding ─▶ logits (B, L)

What is absent is masked, never imputed: whatever lies in an absent modality's slot changes no bit of the output.
So a prediction without a record is the same network with fewer tokens, and the exact Shapley value of each
modality is 2**M forwards of the part after the encoders.

Shapes: B batch, N tokens, d width, H heads, L findings, M modalities, S subsets.
References: label queries, doi:10.48550/arXiv.2403.06197 (DrFuse); masked tokens, doi:10.48550/arXiv.2412.14810 (MARIA).
"""

from __future__ import annotations

from itertools import combinations
from math import factorial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.bundle import Bundle
from models.encoders import ImageEncoder, TextEncoder, ValueEncoder
from models.transforms import Sample

Tokens = dict[str, tuple[Tensor, Tensor]]
"""Per modality: tokens (B, n, d) and mask (B, n), True where present."""


class Attention(nn.Module):
    """Multi-head attention of queries over keys; a key whose mask is False takes no part."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """(B, Q, d), (B, N, d), (B, N) → (B, Q, d)."""
        q = self._split(self.query(queries))
        k, v = (self._split(half) for half in self.key_value(keys).chunk(2, dim=-1))
        drop = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=drop)
        return self.out(seen.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)  # (B, H, N, d / H)


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward step, each around a short cut."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=dropout)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, y, mask))
        return x + self.drop(self.feed(self.norm2(x)))  # type: ignore[no-any-return]


class FusionHead(nn.Module):
    """Everything after the encoders: cheap enough to be run once per subset of modalities."""

    def __init__(self, modalities: tuple[str, ...], width: int, heads: int, *, layers: int, findings: int, dropout: float) -> None:
        super().__init__()
        self.modalities = modalities
        self.modality = nn.Parameter(torch.randn(len(modalities), width) * 0.1)
        self.context = nn.Parameter(torch.randn(width) * 0.1)
        self.layers = nn.ModuleList([Layer(width, heads, dropout=dropout) for _ in range(layers)])
        self.queries = nn.Parameter(torch.randn(findings, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads, dropout=dropout)
        self.last = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(findings, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(findings))

    def forward(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
        """Fuse what is present, and of that only what `keep` (B, M) allows → logits (B, L)."""
        some = tokens[self.modalities[0]][0]
        batch = some.shape[0]
        parts, masks = [self.context.expand(batch, 1, -1)], [torch.ones(batch, 1, dtype=torch.bool, device=some.device)]
        for index, name in enumerate(self.modalities):
            values, mask = tokens[name]
            masks.append(mask if keep is None else mask & keep[:, index, None])
            parts.append(values + self.modality[index])
        mask = torch.cat(masks, dim=1)  # (B, N)
        # where(), not multiplication: 0 × NaN is NaN, and an absent slot may hold anything.
        x = torch.where(mask[..., None], torch.cat(parts, dim=1), 0.0)  # (B, N, d)
        for layer in self.layers:
            x = layer(x, mask)
        queries = self.queries.expand(batch, -1, -1)
        answers = self.last(queries + self.cross(self.norm(queries), self.norm(x), mask))  # (B, L, d)
        logits: Tensor = (answers * self.weight).sum(-1) + self.bias
        return logits


class FusionNetwork(nn.Module):
    """Encoders, fusion head and, for training only, one auxiliary head per modality."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        config, drop = bundle.network, bundle.training.dropout
        width = config.width
        dims = len(config.image_size)
        self.modalities = bundle.modalities
        self.image = ImageEncoder(config.channels, width, dims=dims, grid=config.image_grid, dropout=drop)
        if "values" in self.modalities:
            self.values = ValueEncoder(len(bundle.record.values), width, bins=config.bins)
        if "text" in self.modalities:
            self.text = TextEncoder(config.buckets, width, dropout=drop)
        findings = len(bundle.findings)
        self.head = FusionHead(self.modalities, width, config.heads, layers=config.layers, findings=findings, dropout=drop)
        self.auxiliary = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, findings)) for _ in self.modalities])

    def encode(self, batch: Sample) -> Tokens:
        """Encode each modality once.

        Parameters
        ----------
        batch
            ``image`` (B, 1, *size); ``image_mask`` (B,); ``numbers``, ``signs``, ``number_mask`` (B, V); ``words`` (B, T, K).
        """
        image = self.image(batch["image"])
        tokens: Tokens = {"image": (image, batch["image_mask"][:, None].expand(-1, image.shape[1]))}
        if "values" in self.modalities:
            tokens["values"] = (self.values(batch["numbers"], batch["signs"]), batch["number_mask"])
        if "text" in self.modalities:
            tokens["text"] = self.text(batch["words"])
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


def subsets(modalities: int, *, device: torch.device | None = None) -> Tensor:
    """All 2**M subsets as (S, M) booleans; row r holds modality m where bit m of r is set."""
    rows = torch.arange(2**modalities, device=device)
    return (rows[:, None] >> torch.arange(modalities, device=device)) % 2 == 1


def subset_logits(head: FusionHead, tokens: Tokens) -> Tensor:
    """Logits of every subset of modalities, in one forward: (S, B, L), the last row being all that is present."""
    keep = subsets(len(head.modalities), device=head.bias.device)  # (S, M)
    batch = next(iter(tokens.values()))[0].shape[0]
    wide = {name: (t.repeat(len(keep), 1, 1), m.repeat(len(keep), 1)) for name, (t, m) in tokens.items()}
    logits: Tensor = head(wide, keep.repeat_interleave(batch, dim=0))  # (S * B, L)
    return logits.view(len(keep), batch, -1)


def shapley(logits: Tensor) -> Tensor:
    """Exact Shapley values (M, B, L) of the game (S, B, L): the mean gain of each modality over all orders.

    They sum to the full logit less the logit of nothing. A modality that is absent gains exactly 0.
    """
    players = logits.shape[0].bit_length() - 1
    shares = torch.zeros(players, *logits.shape[1:], dtype=logits.dtype, device=logits.device)
    for player in range(players):
        others = [p for p in range(players) if p != player]
        for size in range(players):
            weight = factorial(size) * factorial(players - size - 1) / factorial(players)
            for coalition in combinations(others, size):
                row = sum(1 << p for p in coalition)
                shares[player] += weight * (logits[row | 1 << player] - logits[row])
    return shares
