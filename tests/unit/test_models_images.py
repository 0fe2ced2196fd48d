"""Every image encoder, in 2D and 3D: one token a place, at that place, whatever else is in the batch."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from models.images import ImageEncoder

torch.set_num_threads(1)

KINDS: list[tuple[Any, tuple[int, ...]]] = [("residual", (4, 8, 8)), ("resnet", (4, 4, 8, 8)), ("densenet", (8, 4, 2, 2))]
SIZES: dict[Any, tuple[int, ...]] = {2: (40, 36), 3: (24, 20, 22)}


@pytest.fixture(params=[(kind, channels, dims) for kind, channels in KINDS for dims in (2, 3)], ids=lambda p: f"{p[0]}-{p[2]}d")
def encoder(request: pytest.FixtureRequest) -> ImageEncoder:
    kind, channels, dims = request.param
    torch.manual_seed(0)
    return ImageEncoder(kind, channels, 16, dims=dims, grid=2, dropout=0.5).eval()


def images(encoder: ImageEncoder, batch: int) -> torch.Tensor:
    return torch.rand(batch, 1, *SIZES[encoder.dims], generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_an_image_becomes_one_token_for_each_place_of_the_grid(encoder: ImageEncoder) -> None:
    tokens = encoder(images(encoder, 3))
    assert tokens.shape == (3, 2**encoder.dims, 16)
    assert tokens.isfinite().all()
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-4), "two images must not look alike"


def test_no_norm_anywhere_looks_at_the_rest_of_the_batch(encoder: ImageEncoder) -> None:
    """MonAI 1.6 leaves BatchNorm in a ResNet that was asked for GroupNorm."""
    kinds = {type(module) for module in encoder.modules()}
    assert nn.GroupNorm in kinds
    assert not any(issubclass(kind, nn.modules.batchnorm._NormBase) for kind in kinds)
    assert not any("running" in name for name, _ in encoder.named_buffers())


def test_an_image_is_encoded_alike_alone_and_in_company_also_while_training(encoder: ImageEncoder) -> None:
    encoder.train()
    encoder.dropout.eval()
    batch = images(encoder, 3)
    company = torch.cat([batch[:1], torch.full_like(batch[1:], 0.9)])
    with torch.no_grad():
        assert torch.allclose(encoder(batch)[:1], encoder(company)[:1], atol=1e-5)
        assert torch.allclose(encoder(batch)[:1], encoder(batch[:1]), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_token_is_mean_and_maximum_of_its_own_place_in_the_images_order(dims: Any) -> None:
    """Known answer, with the network taken out: a place's token is made of its own part of the image."""
    encoder = ImageEncoder("residual", (4,), 2, dims=dims, grid=2, dropout=0.0)
    encoder.blocks, encoder.project = nn.Sequential(nn.Identity()), nn.Identity()  # type: ignore[assignment]
    image = torch.rand(1, 1, *(6, 4, 8)[:dims])
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in image.shape[2:]]
    parts = [image[0, 0][place] * 2 - 1 for place in product(*halves)]
    expected = torch.stack([torch.stack([part.mean(), part.max()]) for part in parts])
    assert torch.allclose(encoder(image)[0] - encoder.place, expected, atol=1e-6)


def test_every_parameter_gets_a_gradient(encoder: ImageEncoder) -> None:
    encoder(images(encoder, 2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in encoder.named_parameters() if p.grad is not None and "blocks" in name)


def test_dropout_plays_a_part_in_training_only(encoder: ImageEncoder) -> None:
    image = images(encoder, 1)
    assert torch.equal(encoder(image), encoder(image))
    encoder.train()
    assert not torch.equal(encoder(image), encoder(image))


def test_the_residual_network_keeps_the_names_that_weights_were_saved_under() -> None:
    names = {name.split(".")[0] for name in ImageEncoder("residual", (4, 8), 8, dims=2, grid=1, dropout=0.0).state_dict()}
    assert names == {"blocks", "project", "place"}


@pytest.mark.parametrize(
    ("kind", "channels", "said"),
    [
        ("residual", (), "at least one number"),
        ("residual", (6,), r"residual encoder cannot be \(6,\): each must divide by 4"),
        ("resnet", (8, 8, 8), "4 numbers"),
        ("resnet", (8, 8, 8, 10), "divide by 4"),
        ("densenet", (8, 4), "initial features, growth rate"),
        ("densenet", (8, 4, 3, 2), "10 maps after block 1"),
        ("densenet", (8, 0, 2), "divide by 4"),
        ("vgg", (8,), "no image encoder 'vgg'"),
    ],
)
def test_channels_that_cannot_be_are_refused_in_a_sentence(kind: Any, channels: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageEncoder(kind, channels, 8, dims=2, grid=1, dropout=0.0)


@pytest.mark.parametrize(
    ("kind", "channels", "least"), [("residual", (4, 4), 4), ("densenet", (8, 4, 2, 2), 8), ("resnet", (4, 4, 4, 4), 1)]
)
def test_an_image_too_small_for_the_network_is_refused_and_the_least_is_not(kind: Any, channels: tuple[int, ...], least: int) -> None:
    encoder = ImageEncoder(kind, channels, 8, dims=3, grid=2, dropout=0.0)
    assert encoder.least == least
    assert encoder.eval()(torch.rand(1, 1, least, least + 8, least + 9)).shape == (1, 8, 8)
    if least > 1:
        with pytest.raises(ValueError, match="is too small"):
            encoder(torch.rand(1, 1, least - 1, least + 8, least + 9))
