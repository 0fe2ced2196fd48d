"""Images to tokens: a radiograph or a volume → one token for each place of a coarse grid.

::

    image (B, 1, *size) ─ residual | ResNet | DenseNet ─ maps (B, C, *size / 2**n) ─ mean and maximum a place ─ linear ─▶ (B, G, d)

GroupNorm, not BatchNorm: a study's answer must not depend on the studies it happened to be batched with.
Shapes: B batch, C channels, G = grid ** dims places, d width. Not here: how pixels become [0, 1] (transforms.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from monai.networks.nets import DenseNet, ResNet
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["residual", "resnet", "densenet"]

#: Groups of every GroupNorm; all numbers of channels must divide by it.
GROUPS: Final = 4
_NORM: Final = ("group", {"num_groups": GROUPS})


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
        self.norm1 = nn.GroupNorm(GROUPS, outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = functional.relu(self.norm1(self.first(x)))  # (B, C, *size)
        return self.pool(functional.relu(self.norm2(self.second(y)) + self.short(x)))  # type: ignore[no-any-return]  # (B, C, size / 2)


class ImageEncoder(nn.Module):
    """A convolutional network over a radiograph (`dims` 2) or a volume (3) → `grid` ** dims place tokens.

    Each place gives mean and maximum of its features: a nodule is a maximum, an opacity is a mean.

    Parameters
    ----------
    kind
        "residual": own small blocks, each halves the size; "resnet": basic blocks, one a stage (32 times smaller in 2D, 8
        times in 3D); "densenet": 2 ** (blocks + 1) times smaller. The last two are MonAI's, without their classifier.
    channels
        Of "residual" and "resnet" (4 numbers) those of each stage; of "densenet" initial features, growth rate, and the
        number of layers of each block.

    Raises
    ------
    ValueError
        The number of channels cannot be, or some channels do not divide by `GROUPS`.

    References
    ----------
    ResNet, doi:10.48550/arXiv.1512.03385; DenseNet, doi:10.48550/arXiv.1608.06993; GroupNorm, doi:10.48550/arXiv.1803.08494.
    """

    def __init__(self, kind: Kind, channels: Sequence[int], width: int, *, dims: Literal[2, 3], grid: int, dropout: float) -> None:
        super().__init__()
        self.dims, self.grid = dims, grid
        self.blocks, features, self.least = _body(kind, channels, dims)
        self.project = nn.Linear(2 * features, width)
        self.place = nn.Parameter(torch.randn(grid**dims, width) * 0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, *size) in [0, 1] → (B, G, d). A side too short for the network is a ValueError."""
        if min(image.shape[2:]) < self.least:
            raise ValueError(
                f"An image of {tuple(image.shape[2:])} is too small: this encoder halves it down to nothing below {self.least}."
            )
        maps = self.blocks(image * 2 - 1)  # (B, C, *size / 2**n)
        mean = functional.adaptive_avg_pool2d(maps, self.grid) if self.dims == 2 else functional.adaptive_avg_pool3d(maps, self.grid)
        peak = functional.adaptive_max_pool2d(maps, self.grid) if self.dims == 2 else functional.adaptive_max_pool3d(maps, self.grid)
        places = torch.cat([mean, peak], dim=1).flatten(2).transpose(1, 2)  # (B, G, 2C)
        return self.project(self.dropout(places)) + self.place  # type: ignore[no-any-return]


class _ResNet(ResNet):  # type: ignore[misc]  # MonAI exports without types
    """MonAI 1.6 gives its `norm` to the stem alone and leaves BatchNorm in every stage; here the stages get it too."""

    def _make_layer(self, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(*args, **{**kwargs, "norm": _NORM})  # type: ignore[no-any-return]


def _body(kind: Kind, channels: Sequence[int], dims: int) -> tuple[nn.Sequential, int, int]:
    """Make the convolutions of `kind`, the number of maps they give, and the least side they can take."""
    if kind == "residual":
        _check(kind, channels, bool(channels), "at least one number is needed")
        _divides(kind, channels)
        pairs = zip((1, *channels[:-1]), channels, strict=True)
        return nn.Sequential(*(ResidualBlock(i, o, dims=dims) for i, o in pairs)), channels[-1], 2 ** len(channels)
    if kind == "resnet":
        _check(kind, channels, len(channels) == 4, "4 numbers are needed, one for each stage")
        _divides(kind, channels)
        return _resnet(channels, dims), channels[-1], 1
    if kind == "densenet":
        _check(kind, channels, len(channels) >= 3, "initial features, growth rate and the layers of each block are needed")
        _divides(kind, channels[:2])
        body, features = _densenet(channels[0], channels[1], channels[2:], dims)
        return body, features, 2 ** (len(channels) - 1)
    raise ValueError(f"There is no image encoder {kind!r}; there are residual, resnet and densenet.")


def _resnet(channels: Sequence[int], dims: int) -> nn.Sequential:
    # A volume comes coarse (tens of voxels a side, transforms.py), so its stem neither strides nor pools; a radiograph's does both.
    flat = dims == 2
    net = _ResNet(
        "basic",
        [1, 1, 1, 1],
        list(channels),
        spatial_dims=dims,
        n_input_channels=1,
        conv1_t_size=7 if flat else 3,
        conv1_t_stride=2 if flat else 1,
        feed_forward=False,
        bias_downsample=False,
        norm=_NORM,
    )
    stem = [net.conv1, net.bn1, net.act, *([net.maxpool] if flat else [])]
    return nn.Sequential(*stem, net.layer1, net.layer2, net.layer3, net.layer4)


def _densenet(initial: int, growth: int, layers: Sequence[int], dims: int) -> tuple[nn.Sequential, int]:
    features = initial
    for index, count in enumerate(layers):
        if index:  # a transition halves them
            features //= 2
            _check(
                "densenet",
                (initial, growth, *layers),
                features % GROUPS == 0,
                f"{features} maps after block {index} do not divide by {GROUPS}",
            )
        features += count * growth
    net = DenseNet(dims, 1, 1, init_features=initial, growth_rate=growth, block_config=tuple(layers), norm=_NORM)
    return nn.Sequential(net.features, nn.ReLU()), features


def _check(kind: str, channels: Sequence[int], right: bool, rule: str) -> None:
    if not right:
        raise ValueError(f"The channels of a {kind} encoder cannot be {tuple(channels)}: {rule}.")


def _divides(kind: str, channels: Sequence[int]) -> None:
    right = all(c > 0 and c % GROUPS == 0 for c in channels)
    _check(kind, channels, right, f"each must divide by {GROUPS}, the groups of its norms")
