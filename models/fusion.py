"""★ The fusion: tokens of whatever is present → log-odds of each finding. The default, and what the field does instead.

::

    Tokens ─ seen(): what is absent or not allowed becomes exactly 0, its mask False
      tokens      + context token ─ `layers` × masked self-attention ─ one label query per finding ─▶ logits (B, L)
      single:<m>  the same, of one modality: what fusing has to beat
      film        the other modalities scale and shift the first image's tokens ─ mean ─ MLP ─▶ logits
      late_*      each modality ─ mean ─ its own MLP ─ its own logits ─ their mean, or a weighted sum ─▶ logits
      the others  each modality ─ mean ─▶ vectors (B, M, d) ─ concat | weighted | gated | attention | lstm | graph ─ MLP ─▶ logits

What is absent is masked, never imputed: whatever lies in an absent slot changes no bit of any head's output. So a prediction
without a record is the same network with fewer tokens, and the exact Shapley value of each modality is 2**M runs of the head
alone. Where nothing is present the answer is a learned prior. For a fair comparison every head has about as many parameters
as ``tokens``: its MLP is made as wide as that takes (``gated`` is larger, by its gates, from 5 modalities on).
Not here: how tokens are made (images.py, tabular.py, text.py), the network around a head (network.py).

Shapes: B batch, n tokens of a modality, N of all, d width, H heads, L findings, M modalities, K = M + 1 with the context, E embedding,
S subsets. References: label queries, doi:10.48550/arXiv.2403.06197 (DrFuse); masked tokens, doi:10.48550/arXiv.2412.14810 (MARIA).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import factorial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

Tokens = dict[str, tuple[Tensor, Tensor]]
"""Per modality: tokens (B, n, d) and mask (B, n), True where present. A modality is absent where its mask is all False."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a head is; `hidden` is the width of its MLP, where it has one."""

    width: int
    heads: int
    layers: int
    findings: int
    dropout: float
    hidden: int = 0


class FusionHead(nn.Module, ABC):
    """Everything after the encoders: cheap enough to be run once per subset of modalities.

    `modalities` are the columns of `keep`; of them the head looks at those `used`, any other has a Shapley share of exactly 0.
    """

    def __init__(self, modalities: tuple[str, ...], *, only: str = "") -> None:
        super().__init__()
        self.answer: nn.Module
        self.modalities = modalities
        self.used = (only,) if only else modalities

    def forward(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
        """Fuse what is present, and of that only what `keep` (B, M) allows → logits (B, L)."""
        return self.answer(self.embed(tokens, keep))  # type: ignore[no-any-return]

    @abstractmethod
    def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
        """(B, E): what the last linear layer sees, to measure how far a study is from those learned from."""

    def seen(self, tokens: Tokens, keep: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Tokens (B, n, d) and mask (B, n) of each modality used, with 0 wherever the mask is False."""
        result = []
        for name in self.used:
            x, mask = tokens[name]
            if keep is not None:
                mask = mask & keep[:, self.modalities.index(name), None]
            # where(), not multiplication: 0 × NaN is NaN, and an absent slot may hold anything.
            result.append((torch.where(mask[..., None], x, 0.0), mask))
        return result


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
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=drop)
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # noqa: D102  (B, N, d), (B, N) → (B, N, d)
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, y, mask))
        return x + self.drop(self.feed(self.norm2(x)))  # type: ignore[no-any-return]


class TokenFusion(FusionHead):
    """``tokens``, and of one modality ``single:<m>``: every token sees every other, every finding asks its own question.

    One context token is always present: what is believed of a study nothing is known of. E is L × d.
    """

    def __init__(self, modalities: tuple[str, ...], shape: Shape, *, only: str = "") -> None:
        super().__init__(modalities, only=only)
        width, heads, drop, findings = shape.width, shape.heads, shape.dropout, shape.findings
        self.modality = nn.Parameter(torch.randn(len(self.used), width) * 0.1)
        self.context = nn.Parameter(torch.randn(width) * 0.1)
        self.layers = nn.ModuleList([Layer(width, heads, dropout=drop) for _ in range(shape.layers)])
        self.queries = nn.Parameter(torch.randn(findings, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads, dropout=drop)
        self.last = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(findings, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(findings))

    def forward(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        answers = self.embed(tokens, keep).view(-1, *self.weight.shape)  # (B, L, d)
        return (answers * self.weight).sum(-1) + self.bias  # (B, L)

    def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        seen = self.seen(tokens, keep)
        x = torch.cat([x + modality for (x, _), modality in zip(seen, self.modality, strict=True)], dim=1)
        x, mask = _beside(self.context, x, torch.cat([mask for _, mask in seen], dim=1))  # (B, N, d), (B, N)
        for layer in self.layers:
            x = layer(x, mask)  # (B, N, d)
        queries = self.queries.expand(x.shape[0], -1, -1)
        answers: Tensor = self.last(queries + self.cross(self.norm(queries), self.norm(x), mask))  # (B, L, d)
        return answers.flatten(1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, n, d), (B, n) → the mean (B, d) of those whose mask is True; of none, 0."""
    return torch.where(mask[..., None], x, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _beside(context: Tensor, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Put a context (d) before the vectors (B, M, d): always present, so that no softmax is ever over nothing."""
    first = context.to(vectors.dtype).expand(vectors.shape[0], 1, -1)  # len() would fix the batch of an export
    return torch.cat([first, vectors], dim=1), torch.cat([present.new_ones(present.shape[0], 1), present], dim=1)


def _mlp(inputs: int, shape: Shape) -> nn.Sequential:
    steps = (nn.Linear(inputs, shape.hidden), nn.GELU(), nn.Dropout(shape.dropout), nn.Linear(shape.hidden, shape.width))
    return nn.Sequential(*steps, nn.LayerNorm(shape.width))


def _concat(vectors: Tensor, present: Tensor) -> Tensor:
    """Put the vectors side by side, 0 for the absent, and M bits that tell an absent one from a 0 → (B, M × (d + 1))."""
    return torch.cat([vectors.flatten(1), present.to(vectors.dtype)], dim=1)


class Pool(nn.Module):
    """One vector per modality: its tokens' mean through its own step; 0 where absent. Before them, where wanted, the context."""

    def __init__(self, steps: Iterable[nn.Module], width: int, *, context: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), step) for step in steps])
        self.context = nn.Parameter(torch.randn(width) * 0.1) if context else None

    def forward(self, seen: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Tokens and mask per modality → vectors (B, M, d), present (B, M); with the context (B, K, d), (B, K)."""
        vectors = torch.stack([step(_mean(x, mask)) for step, (x, mask) in zip(self.steps, seen, strict=True)], dim=1)
        present = torch.stack([mask.any(1) for _, mask in seen], dim=1)
        pooled = torch.where(present[..., None], vectors, 0.0), present
        return pooled if self.context is None else _beside(self.context, *pooled)


class Weighted(nn.Module):
    """``weighted``: one learned weight per modality, a softmax over those present."""

    def __init__(self, modalities: int, shape: Shape) -> None:  # noqa: ARG002  one signature for all
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(modalities))

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:  # noqa: D102  (B, K, d), (B, K) → (B, d)
        return (torch.where(present, self.weight, -torch.inf).softmax(-1)[..., None] * vectors).sum(1)


class Gated(nn.Module):
    """``gated``: each modality's tanh, let through feature by feature by gates that see all: doi:10.48550/arXiv.1702.01992, §3.1."""

    def __init__(self, modalities: int, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(modalities * shape.width, modalities * shape.width, bias=False)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:  # noqa: ARG002, D102  (B, M, d), (B, M) → (B, d)
        gates = torch.sigmoid(self.gate(vectors.flatten(1))).view_as(vectors)
        return (gates * vectors.tanh()).sum(1)


class Attended(nn.Module):
    """``attention``: one layer of scaled dot products between the modalities' vectors, then the mean of those present."""

    def __init__(self, modalities: int, shape: Shape) -> None:  # noqa: ARG002  one signature for all
        super().__init__()
        self.layer = Layer(shape.width, shape.heads, dropout=shape.dropout)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:  # noqa: D102  (B, K, d), (B, K) → (B, d)
        return _mean(self.layer(vectors, present), present)


class Recurrent(nn.Module):
    """``lstm``: an LSTM reads the modalities in turn and skips the absent: doi:10.48550/arXiv.2207.07027 (MedFuse)."""

    def __init__(self, modalities: int, shape: Shape) -> None:  # noqa: ARG002  one signature for all
        super().__init__()
        self.cell = nn.LSTMCell(shape.width, shape.width)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:  # noqa: D102  (B, M, d), (B, M) → (B, d)
        state = memory = torch.zeros_like(vectors[:, 0])
        for vector, here in zip(vectors.unbind(1), present[..., None].unbind(1), strict=True):
            after = self.cell(vector, (state, memory))
            state, memory = torch.where(here, after[0], state), torch.where(here, after[1], memory)
        return state


class Graph(nn.Module):
    """``graph``: GATv2 over modalities as nodes, an edge where both are present: doi:10.48550/arXiv.2105.14491, Eq. 7."""

    def __init__(self, modalities: int, shape: Shape) -> None:  # noqa: ARG002  one signature for all
        super().__init__()
        self.target, self.source = nn.Linear(shape.width, shape.width), nn.Linear(shape.width, shape.width)
        self.score = nn.Parameter(torch.randn(shape.heads, shape.width // shape.heads) * 0.1)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:  # noqa: D102  (B, K, d), (B, K) → (B, d)
        target = self.target(vectors).view(*present.shape, 1, *self.score.shape)  # (B, K, 1, H, d / H)
        source = self.source(vectors).view(-1, 1, present.shape[1], *self.score.shape)  # (B, 1, K, H, d / H)
        scores = (functional.leaky_relu(target + source, 0.2) * self.score).sum(-1)  # (B, K, K, H)
        # An absent node is heard by none; what it hears itself is left out of the mean.
        shares = torch.where(present[:, None, :, None], scores, -torch.inf).softmax(2)
        heard = (shares[..., None] * source).sum(2).flatten(2)  # (B, K, d)
        return _mean(vectors + functional.elu(heard), present)


class VectorFusion(FusionHead):
    """Each modality's mean ─ `fuse`, or ``concat`` without it ─ MLP. What lies where in an image is lost in the mean. E is d."""

    def __init__(self, modalities: tuple[str, ...], shape: Shape, *, fuse: Fuse | None = None, context: bool = False) -> None:
        super().__init__(modalities)
        width, count = shape.width, len(modalities)
        self.pool = Pool([nn.Linear(width, width) for _ in modalities], width, context=context)
        self.fuse = fuse(count + context, shape) if fuse else None
        self.mlp = _mlp(width if fuse else count * (width + 1), shape)
        self.answer = nn.Linear(width, shape.findings)

    def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.mlp((self.fuse or _concat)(*self.pool(self.seen(tokens, keep))))  # type: ignore[no-any-return]


class FilmFusion(FusionHead):
    """``film``: what is known of the patient scales and shifts each feature of the first modality's tokens, an image's. E is d.

    doi:10.48550/arXiv.1709.07871 (FiLM); that the image's own mean helps to choose scale and shift,
    doi:10.1016/j.neuroimage.2022.119505 (DAFT). A context token beside the image's lets the others answer without an image.
    """

    def __init__(self, modalities: tuple[str, ...], shape: Shape) -> None:
        super().__init__(modalities)
        width = shape.width
        self.context = nn.Parameter(torch.randn(width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.pool = Pool([nn.Linear(width, width) for _ in modalities], width)
        inputs = len(modalities) * (width + 1)
        self.condition = nn.Sequential(nn.Linear(inputs, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, 2 * width))
        self.mlp = _mlp(width, shape)
        self.answer = nn.Linear(width, shape.findings)

    def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        seen = self.seen(tokens, keep)
        x, mask = _beside(self.context, *seen[0])  # (B, 1 + n, d)
        scale, shift = self.condition(_concat(*self.pool(seen)))[:, None].chunk(2, dim=-1)  # (B, 1, d)
        return self.mlp(_mean(functional.gelu(self.norm(x) * (1 + scale) + shift), mask))  # type: ignore[no-any-return]


class LateFusion(FusionHead):
    """``late_mean``, ``late_stack``: each modality answers by itself, then the answers are put together. E is M × d, 0 where absent.

    The logit is a sum f(a) + g(b) of one function per modality, so what only a combination of two tells cannot be learned: for
    an exclusive or f(0) + g(0) + f(1) + g(1) would have to be below 0 and above 0. All is learned together, by the loss of the sum.
    """

    def __init__(self, modalities: tuple[str, ...], shape: Shape, *, stack: bool) -> None:
        super().__init__(modalities)
        self.pool = Pool([_mlp(shape.width, shape) for _ in modalities], shape.width)
        self.answers = nn.ModuleList([nn.Linear(shape.width, shape.findings) for _ in modalities])
        self.prior = nn.Parameter(torch.zeros(shape.findings))
        self.stack = nn.Parameter(torch.full((len(modalities), shape.findings), 1 / len(modalities))) if stack else None

    def forward(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        vectors, present = self.pool(self.seen(tokens, keep))
        logits = torch.stack([answer(v) for answer, v in zip(self.answers, vectors.unbind(1), strict=True)], dim=1)  # (B, M, L)
        if self.stack is None:
            return torch.where(present.any(1, keepdim=True), _mean(logits, present), self.prior)
        return self.prior + torch.where(present[..., None], logits * self.stack, 0.0).sum(1)

    def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:  # noqa: D102
        return self.pool(self.seen(tokens, keep))[0].flatten(1)  # type: ignore[no-any-return]


Fuse = Callable[[int, Shape], nn.Module]
Build = Callable[[tuple[str, ...], Shape], FusionHead]
FUSIONS: Final[Mapping[str, Build]] = {
    "tokens": TokenFusion,
    "concat": VectorFusion,
    "weighted": partial(VectorFusion, fuse=Weighted, context=True),
    "gated": partial(VectorFusion, fuse=Gated),
    "attention": partial(VectorFusion, fuse=Attended, context=True),
    "film": FilmFusion,
    "lstm": partial(VectorFusion, fuse=Recurrent),
    "graph": partial(VectorFusion, fuse=Graph, context=True),
    "late_mean": partial(LateFusion, stack=False),
    "late_stack": partial(LateFusion, stack=True),
}
"""Every fusion by its name in a bundle; besides these, ``single:<modality>``."""


def make_head(
    fusion: str, modalities: tuple[str, ...], *, width: int, heads: int, layers: int, findings: int, dropout: float
) -> FusionHead:
    """Build the head named `fusion`; `layers` are those of ``tokens``, the others get as many parameters by a wider MLP.

    Raises
    ------
    ValueError
        The name is unknown, or names a modality that is not among `modalities`.
    """
    shape = Shape(width, heads, layers, findings, dropout)
    known: dict[str, Build] = {**FUSIONS, **{f"single:{name}": partial(TokenFusion, only=name) for name in modalities}}
    if fusion not in known:
        raise ValueError(f"Fusion {fusion!r} is unknown; known are {', '.join(known)}.")
    build = known[fusion]
    with torch.random.fork_rng(devices=[]):  # counts; on the meta device it would import torch's compiler, two seconds of a start
        budget = parameters(TokenFusion(modalities, shape))
        fixed, more = (parameters(build(modalities, replace(shape, hidden=hidden))) for hidden in (1, 2))
    if more > fixed:
        shape = replace(shape, hidden=max(width // 4, 1 + (budget - fixed) // (more - fixed)))
    return build(modalities, shape)


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def subsets(modalities: int, *, device: torch.device | None = None) -> Tensor:
    """All 2**M subsets as (S, M) booleans; row r holds modality m where bit m of r is set."""
    return (torch.arange(2**modalities, device=device)[:, None] >> torch.arange(modalities, device=device)) % 2 == 1


def subset_logits(head: FusionHead, tokens: Tokens) -> Tensor:
    """Logits of every subset of modalities, in one forward: (S, B, L), the last row being all that is present."""
    present = torch.stack([tokens[m][1].any(1) & (m in head.used) for m in head.modalities], dim=1)  # (B, M)
    keep = subsets(present.shape[1], device=present.device)  # (S, M)
    batch = len(present)
    wide = {name: (t.repeat(len(keep), 1, 1), m.repeat(len(keep), 1)) for name, (t, m) in tokens.items()}
    logits: Tensor = head(wide, keep.repeat_interleave(batch, dim=0)).unflatten(0, (len(keep), batch))  # (S, B, L)
    # Subsets that differ in absent modalities alone are one game: one row for all of them, because two places of a
    # batch may differ in the last bit, and the share of what is absent is to be exactly 0.
    same = ((keep[:, None] & present) << torch.arange(present.shape[1], device=present.device)).sum(-1)  # (S, B)
    return logits.gather(0, same[..., None].expand_as(logits))


def shapley(logits: Tensor) -> Tensor:
    """Exact Shapley values (M, B, L) of the game (S, B, L): the mean gain of each modality over all orders.

    They sum to the full logit less the logit of nothing. A modality that is absent gains exactly 0.
    """
    players = logits.shape[0].bit_length() - 1
    shares = torch.zeros(players, *logits.shape[1:], dtype=logits.dtype, device=logits.device)
    for player in range(players):
        for row in (row for row in range(len(logits)) if not row >> player & 1):
            others = row.bit_count()
            weight = factorial(others) * factorial(players - others - 1) / factorial(players)
            shares[player] += weight * (logits[row | 1 << player] - logits[row])
    return shares
