"""Why the network said so: the share of each modality, of each value or word, and of each place of an image.

::

    Tokens ─ subsets of one modality's tokens ─▶ token_shares (B, n, L), Owen values: they sum to that modality's share
    image  ─ gradient ─▶ saliency (*size) in [0, 1] ─ to_patient ─▶ array and affine, in LPS mm

All of it runs the network as it stands, in eval mode; shares are in log-odds before any temperature. An explanation says
what the answer rests on, not that the answer is right.

Shapes: B batch, n tokens of a modality, d width, L findings, M modalities, S subsets of modalities, R subsets of tokens.
References: Owen values, doi:10.1007/978-3-642-45494-3_7; their sampling by orders, doi:10.1016/j.cor.2008.04.004;
gradient saliency, doi:10.48550/arXiv.1312.6034 §3.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.fusion import FusionHead, Tokens, shapley, subsets
from models.network import FusionNetwork
from models.spec import ImageSpec
from models.transforms import Sample, _to_ras, collate

#: Most tokens of which every subset is tried: 2 ** 8 runs of the head for each subset of the other modalities.
EXACT: Final = 8
#: Rows of one run of the head; more at once are slower on a CPU, whose cache they leave.
_ROWS: Final = 256


@torch.no_grad()
def token_shares(network: FusionNetwork, tokens: Tokens, modality: str, *, orders: int = 16, seed: int = 0) -> Tensor:
    """Share (B, n, L) of each token of `modality` in the log-odds: of each value, word, point of a history, gene or place.

    These are Owen values: Shapley values among the tokens of one modality, which enters the game of modalities as a
    whole. So they sum, exactly, to the modality's own Shapley value. Up to `EXACT` present tokens every subset is tried;
    of more, `orders` random orders and their reverses, the same for the same `seed`. A missing token has exactly 0.

    The token of a word or of a point of a history is made with its neighbors in view: taking it away leaves what those
    have already learned of it.

    Raises
    ------
    KeyError
        The network has no such modality.
    """
    batch, places = tokens[modality][1].shape
    shares = [_token_shares_of_one(network.head, _study(tokens, b), modality, orders, seed) for b in range(batch)]
    return torch.stack(shares) if shares else torch.zeros(0, places, 0)


def saliency(network: FusionNetwork, sample: Sample, image: str, finding: int) -> Tensor:
    """How strongly each place of `image` of one study moves the finding, (*size), 1 the most: the gradient's size.

    It says where the answer would change, not in which direction, and it is a pointer, not a proof: on 24 phantoms with a
    large nodule its peak lay on the nodule, or a voxel beside it, in 21. All else of the study is held fixed. It is what
    MonAI's VanillaGrad gives, but that leaves its gradients on the weights, this leaves none.

    Parameters
    ----------
    sample
        One study, not collated.
    finding
        Its place among the bundle's findings.

    Raises
    ------
    ValueError
        The study does not have that image.
    """
    if not sample[f"{image}_mask"]:
        raise ValueError(f"The study has no image {image!r}, so there is nothing to show on it.")
    pixels = sample[image][None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_ImageOnly(network, sample, image)(pixels)[0, finding], pixels)
    strength = gradient[0, 0].abs()  # (*size)
    return strength / strength.max().clamp(min=torch.finfo(strength.dtype).tiny)


def to_patient(
    saliency_map: Tensor, spec: ImageSpec, shape: Sequence[int], affine: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Turn a map on the network's grid back into the order and the coordinates of the image it was made from.

    Nothing is interpolated: the map keeps its own, coarser grid, and the affine says where each of its voxels lies.

    Parameters
    ----------
    saliency_map
        (X, Y, Z) in RAS of a volume, (H', W') of a radiograph, (X, Y, T) of a clip.
    shape
        Of the array that `volume_tensor` (K, J, I), `radiograph_tensor` (H, W) or `frames_tensor` (T, H, W) was given.
    affine
        Of that volume: index (i, j, k, 1) to LPS mm.

    Returns
    -------
    array, affine
        A volume's map (K', J', I') and the (4, 4) that takes (i', j', k', 1) to LPS mm; or a radiograph's map (H', W') and the
        (3, 3) that takes (row', column', 1) to row and column of the radiograph; or a clip's map (T', H', W') and the (4, 4) that
        takes (t', row', column', 1) to frame, row and column of the clip.

    Raises
    ------
    ValueError
        A volume without an affine.
    """
    values = saliency_map.detach().cpu().numpy().astype(np.float32)
    if spec.kind == "radiograph":
        return values, _scale_and_move(_steps_in_plane(shape, spec.size))
    if spec.kind == "frames":
        width, height, times = spec.size
        along = (shape[0] / times, 0.0)
        return np.ascontiguousarray(values.transpose(2, 1, 0)), _scale_and_move([along, *_steps_in_plane(shape[1:], (height, width))])
    if affine is None:
        raise ValueError(f"Image {spec.name!r} is a volume; without an affine its map has no place in the patient.")
    order, backwards, voxel_mm = _to_ras(affine)
    straight = np.flip(values, backwards)
    array = np.ascontiguousarray(straight.transpose([order.index(2 - axis) for axis in range(3)]))  # (K', J', I')
    steps = [(1.0, 0.0)] * 3
    for axis, source in enumerate(order):  # axis of RAS, index of (i, j, k)
        view = max(1, round(spec.size[axis] * spec.spacing_mm[axis] / float(voxel_mm[axis])))
        steps[source] = (view / spec.size[axis], float(_start(shape[2 - source], view)))
    return array, affine @ _scale_and_move(steps)


def _steps_in_plane(shape: Sequence[int], size: Sequence[int]) -> list[tuple[float, float]]:
    """Of a plane's rows and columns: how many a pixel of the network's grid spans, and where the first begins."""
    height, width = size
    scale = max(height / shape[0], width / shape[1])
    steps = []
    for length, side in zip(shape, size, strict=True):
        whole = max(side, round(length * scale))  # the side of the resized radiograph, before it is cropped
        steps.append((length / whole, length / whole * _start(whole, side)))
    return steps


class _ImageOnly(nn.Module):
    """The network as a function of one image of one study, everything else as it is: what a saliency method takes."""

    def __init__(self, network: FusionNetwork, sample: Sample, image: str) -> None:
        super().__init__()
        self.network, self.sample, self.image = network, collate([sample]), image
        with torch.no_grad():
            self.tokens = network.encode(self.sample)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 1, *size) → (B, L)."""
        batch = len(pixels)
        tokens = {name: (x.expand(batch, -1, -1), mask.expand(batch, -1)) for name, (x, mask) in self.tokens.items()}
        encoder = self.network.images[self.network._encoder_of[self.image]]
        tokens[self.image] = (encoder(pixels), tokens[self.image][1])
        return self.network.head(tokens)  # type: ignore[no-any-return]


def _study(tokens: Tokens, index: int) -> Tokens:
    return {name: (x[index : index + 1], mask[index : index + 1]) for name, (x, mask) in tokens.items()}


def _token_shares_of_one(head: FusionHead, tokens: Tokens, modality: str, orders: int, seed: int) -> Tensor:
    """(n, L) of a batch of one."""
    mask = tokens[modality][1][0]
    there = mask.nonzero()[:, 0]
    count = len(there)
    if count <= EXACT:
        shares = shapley(_game(head, tokens, modality, subsets(count, device=mask.device))[:, None])[:, 0]
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(count, generator=generator) for _ in range(orders)]
        # A reversed order costs no draw and takes much of the spread away.
        ways = torch.stack([way for order in drawn for way in (order, order.flip(0))])  # (W, n)
        prefixes = ways.argsort(1)[:, None] < torch.arange(count + 1)[:, None]  # (W, n + 1, n): the first r of each order
        once, row = torch.unique(prefixes.flatten(0, 1), dim=0, return_inverse=True)
        gains = _game(head, tokens, modality, once.to(mask.device)).cpu()[row].view(*prefixes.shape[:2], -1).diff(dim=1)  # (W, n, L)
        shares = gains.take_along_dim(ways.argsort(1)[..., None], dim=1).mean(0).to(mask.device)
    result = shares.new_zeros(len(mask), shares.shape[-1])
    result[there] = shares
    return result.float()


def _game(head: FusionHead, tokens: Tokens, modality: str, inner: Tensor) -> Tensor:
    """(R, L) for (R, n) subsets of the present tokens of `modality`: the mean log-odds over all subsets of the other modalities.

    Those weigh as in the Shapley value of `modality`: then the Shapley values of this game are the Owen values.
    """
    x, mask = tokens[modality]
    others = [m for m in head.modalities if m != modality and bool(tokens[m][1].any())]
    outer = subsets(len(others), device=mask.device)  # (S, M')
    players = len(others) + 1
    sizes = outer.sum(1).tolist()
    weights = torch.tensor([factorial(s) * factorial(players - s - 1) / factorial(players) for s in sizes], dtype=torch.float64)
    keep = torch.zeros(len(outer), len(head.modalities), dtype=torch.bool, device=mask.device)
    for column, name in enumerate(others):
        keep[:, head.modalities.index(name)] = outer[:, column]
    keep[:, head.modalities.index(modality)] = True
    masks = torch.zeros(len(inner), mask.shape[1], dtype=torch.bool, device=mask.device)
    masks[:, mask[0]] = inner
    keep, masks = keep.repeat(len(inner), 1), masks.repeat_interleave(len(outer), 0)  # (R * S, M), (R * S, n)
    parts = []
    for some, kept in zip(torch.split(masks, _ROWS), torch.split(keep, _ROWS), strict=True):
        wide = {name: (t.expand(len(some), -1, -1), m.expand(len(some), -1)) for name, (t, m) in tokens.items()}
        parts.append(head({**wide, modality: (x.expand(len(some), -1, -1), some)}, kept))
    logits = torch.cat(parts).double().view(len(inner), len(outer), -1)  # (R, S, L)
    return torch.einsum("rsl,s->rl", logits, weights.to(logits.device))


def _start(length: int, view: int) -> int:
    """Where the middle `view` of a side of `length` begins, as MonAI crops; below 0 where it pads."""
    return length // 2 - view // 2 if length >= view else -((view - length) // 2)


def _scale_and_move(steps: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Homogeneous matrix from map indices to image indices: the voxel's width, and where the image's part begins, of each axis."""
    matrix = np.eye(len(steps) + 1)
    for axis, (width, start) in enumerate(steps):
        matrix[axis, axis] = width
        # A voxel's index is of its middle: the first of a map lies half of its width from the edge.
        matrix[axis, -1] = start + width / 2 - 0.5
    return matrix
