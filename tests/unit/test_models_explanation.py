"""The explanation: shares that add up to the answer, and maps that lie where the image lay."""

from __future__ import annotations

from itertools import permutations, product
from math import factorial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.visualize import VanillaGrad
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from models.bundle import Bundle
from models.explanation import EXACT, saliency, to_patient, token_shares
from models.fusion import FusionHead, Tokens, make_head, shapley, subset_logits
from models.loading import load_network
from models.network import FusionNetwork
from models.spec import ImageSpec
from models.transforms import Sample, collate, radiograph_tensor, text_ids, value_tensors, volume_tensor
from worker.demo.phantom import COLUMNS, INTERCEPT_HU, ROWS, SLICES, SPACING_MM, _thorax

PHANTOM = Path(__file__).parents[2] / "models" / "bundles" / "phantom"
NAMES = ("image", "values", "text")


class OnlyHead(nn.Module):
    """What token_shares needs of a network: its head."""

    def __init__(self, head: FusionHead) -> None:
        super().__init__()
        self.head = head


def network(seed: int = 0) -> FusionNetwork:
    torch.manual_seed(seed)
    head = make_head("tokens", NAMES, width=8, heads=2, layers=1, findings=2, dropout=0.0).eval()
    return OnlyHead(head)  # type: ignore[return-value]  # no encoder is needed to share out what a head says


def some_tokens(*counts: int, absent: tuple[tuple[int, str], ...] = ()) -> Tokens:
    """Two studies; the first token of values is missing in the second."""
    generator = torch.Generator().manual_seed(1)
    tokens: Tokens = {}
    for name, count in zip(NAMES, counts, strict=True):
        mask = torch.ones(2, count, dtype=torch.bool)
        if name == "values":
            mask[1, 0] = False
        for study, gone in absent:
            if gone == name:
                mask[study] = False
        tokens[name] = (2 * torch.randn(2, count, 8, generator=generator), mask)
    return tokens


@pytest.mark.parametrize("modality", ["image", "values", "text"])
def test_the_shares_of_tokens_sum_to_the_share_of_their_modality(modality: str) -> None:
    """Text has more tokens than every subset can be tried of: the sum holds for sampled orders, too."""
    net, tokens = network(), some_tokens(3, 4, EXACT + 3)
    each = token_shares(net, tokens, modality, orders=2)
    whole = shapley(subset_logits(net.head, tokens))[NAMES.index(modality)]
    assert each.shape == (2, tokens[modality][0].shape[1], 2)
    assert each.abs().max() > 0.01
    torch.testing.assert_close(each.sum(1), whole, atol=1e-4, rtol=0)


def test_what_is_missing_has_a_share_of_exactly_0() -> None:
    net, tokens = network(), some_tokens(2, 3, 2, absent=((0, "values"),))
    each = token_shares(net, tokens, "values")
    assert (each[0] == 0).all()
    assert (each[1, 0] == 0).all()
    assert (each[1, 1:] != 0).all()


def test_the_shares_are_those_of_owen_by_going_through_every_order() -> None:
    """The definition itself: all orders that keep the tokens of a modality together, each as likely."""
    net = network()
    tokens = {name: (x[1:], mask[1:]) for name, (x, mask) in some_tokens(1, 4, 2).items()}
    players = [(name, t) for name in NAMES for t in range(tokens[name][0].shape[1]) if bool(tokens[name][1][0, t])]
    gains: dict[tuple[str, int], Tensor] = {player: torch.zeros(2) for player in players}
    known: dict[frozenset[tuple[str, int]], Tensor] = {}

    def value(coalition: frozenset[tuple[str, int]]) -> Tensor:
        if coalition not in known:
            masks = {name: torch.tensor([[(name, t) in coalition for t in range(x.shape[1])]]) for name, (x, _) in tokens.items()}
            with torch.no_grad():
                known[coalition] = net.head({name: (x, masks[name]) for name, (x, _) in tokens.items()})[0]
        return known[coalition]

    within = [[p for p in players if p[0] == name] for name in NAMES]
    number = factorial(3) * int(np.prod([factorial(len(union)) for union in within]))
    for unions in permutations(within):
        for orders in product(*(permutations(union) for union in unions)):
            before: frozenset[tuple[str, int]] = frozenset()
            for player in (p for order in orders for p in order):
                gains[player] = gains[player] + (value(before | {player}) - value(before)) / number
                before = before | {player}
    for name in NAMES:
        shares = token_shares(net, tokens, name)[0]
        for t in range(len(shares)):
            torch.testing.assert_close(shares[t], gains.get((name, t), torch.zeros(2)), atol=1e-5, rtol=0)


def test_sampled_orders_come_near_the_exact_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens = network(), some_tokens(2, 6, 2)
    exact = token_shares(net, tokens, "values")
    monkeypatch.setattr("models.explanation.EXACT", 0)
    sampled = token_shares(net, tokens, "values", orders=32)
    assert torch.equal(sampled, token_shares(net, tokens, "values", orders=32))
    assert (sampled - exact).abs().max() < 0.15 * exact.abs().max()


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    spacing=st.tuples(*[st.floats(1.0, 4.0)] * 3),
    shape=st.tuples(*[st.integers(18, 40)] * 3),
    turn=st.floats(-0.3, 0.3),
    data=st.data(),
)
def test_a_bright_place_of_a_volume_is_where_the_map_says_it_is(
    order: list[int], signs: tuple[int, ...], spacing: tuple[float, ...], shape: tuple[int, ...], turn: float, data: st.DataObject
) -> None:
    """Whatever way the voxels lie, and however large they are: within one voxel of the map, in each direction."""
    spec = ImageSpec("image", "volume", ("CT",), (12, 10, 8), spacing_mm=(5.0, 6.0, 7.0), window_hu=(0, 1000))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * np.array(signs) * np.array(spacing)
    oblique = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine[:3, :3] = oblique @ affine[:3, :3]
    affine[:3, 3] = (11.0, -230.0, 57.0)
    # A place near the middle, so that it lies in the field of view.
    middle = np.array([n // 2 for n in shape[::-1]])
    place = middle + np.array([data.draw(st.integers(-3, 3)) for _ in range(3)])
    array = np.zeros(shape, dtype=np.float32)
    i, j, k = place
    array[k - 1 : k + 2, j - 1 : j + 2, i - 1 : i + 2] = 1000.0
    found, at = to_patient(volume_tensor(array, affine, spec)[0], spec, shape, affine)
    weights = found.astype(float) / found.sum()
    k_map, j_map, i_map = (float((weights * grid).sum()) for grid in np.indices(found.shape))
    where = at @ np.array([i_map, j_map, k_map, 1.0])
    truth = affine @ np.array([*place, 1.0])
    off = np.linalg.solve(at[:3, :3], (where - truth)[:3])
    assert np.abs(off).max() <= 1.0


@pytest.mark.parametrize("shape", [(90, 60), (50, 120), (64, 48), (20, 30)])
def test_a_bright_place_of_a_radiograph_is_where_the_map_says_it_is(shape: tuple[int, int]) -> None:
    spec = ImageSpec("film", "radiograph", ("DX",), (32, 24))
    array = np.zeros(shape, dtype=np.float32)
    row, column = shape[0] // 2 + 3, shape[1] // 2 - 4
    array[row - 2 : row + 3, column - 2 : column + 3] = 1.0
    found, at = to_patient(radiograph_tensor(array, spec)[0], spec, shape)
    weights = found.astype(float) / found.sum()
    place = at @ np.array([*(float((weights * grid).sum()) for grid in np.indices(found.shape)), 1.0])
    assert np.abs((place[:2] - (row, column)) / np.diag(at)[:2]).max() <= 1.0


def test_a_map_of_a_volume_without_an_affine_is_refused() -> None:
    spec = ImageSpec("image", "volume", ("CT",), (4, 4, 4), spacing_mm=(1.0, 1.0, 1.0), window_hu=(0, 1))
    with pytest.raises(ValueError, match="without an affine"):
        to_patient(torch.zeros(4, 4, 4), spec, (8, 8, 8))


def nodule(seed: int) -> tuple[Sample, NDArray[np.float64], float]:
    """A study of the phantom whose large nodule is alone what tells it from itself without one: sample, center in LPS mm, diameter."""
    diameter_mm = float(np.random.default_rng(seed).uniform(24, 38))
    # The same draws twice; a nodule of less than no diameter is none.
    present, absent = (_thorax(np.random.default_rng(seed), d).astype(np.float32) + INTERCEPT_HU for d in (diameter_mm, -100.0))
    affine = np.diag([SPACING_MM[2], SPACING_MM[1], SPACING_MM[0], 1.0])
    change = np.abs(present - absent)
    k, j, i = (float((change * grid).sum() / change.sum()) for grid in np.indices(change.shape))
    bundle = Bundle.read(PHANTOM)
    values = value_tensors({"cea": (20.0, "", 1.0)}, bundle.record.values)
    words = {"words": text_ids("Never smoked.", bundle.network)}
    image = {"image": volume_tensor(present, affine, bundle.images[0]), "image_mask": torch.tensor(True)}
    return image | values | words, (affine @ np.array([i, j, k, 1.0]))[:3], diameter_mm


def shipped() -> FusionNetwork:
    bundle = Bundle.read(PHANTOM)
    torch.manual_seed(0)
    net, _ = load_network(bundle)
    return net.eval()


def test_the_peak_of_the_saliency_lies_on_the_nodule_in_most_studies() -> None:
    """Large nodule, the shipped network: in patient coordinates, within the nodule and one voxel of the map, in most studies.

    A peak anywhere in the field of view would lie there in about one of a hundred. Measured: 21 of 24.
    """
    net, spec = shipped(), Bundle.read(PHANTOM).images[0]
    affine = np.diag([SPACING_MM[2], SPACING_MM[1], SPACING_MM[0], 1.0])
    hits = 0
    for seed in range(24):
        sample, center, diameter_mm = nodule(seed)
        found, at = to_patient(saliency(net, sample, "image", 1), spec, (SLICES, ROWS, COLUMNS), affine)
        k, j, i = np.unravel_index(int(found.argmax()), found.shape)
        place = (at @ np.array([i, j, k, 1.0]))[:3]
        hits += bool(np.linalg.norm(place - center) <= diameter_mm / 2 + 9 * 3**0.5)
    assert hits >= 18


def test_the_saliency_is_the_gradient_as_monai_takes_it_and_leaves_none_on_the_weights() -> None:
    net, (sample, _, _) = shipped(), nodule(1)
    ours = saliency(net, sample, "image", 0)
    assert all(p.grad is None for p in net.parameters())
    assert (float(ours.min()), float(ours.max())) >= (0.0, 1.0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return net({**collate([sample]), "image": x})  # type: ignore[no-any-return]

    theirs = VanillaGrad(Whole())(sample["image"][None].clone(), index=0)[0, 0].abs()
    torch.testing.assert_close(ours, torch.as_tensor(theirs / theirs.max()), atol=1e-4, rtol=0)


def test_a_network_of_random_weights_gives_another_map() -> None:
    """Else the map would show the image's edges, not what was learned (doi:10.48550/arXiv.1810.03292)."""
    torch.manual_seed(1)
    random, (sample, _, _) = FusionNetwork(Bundle.read(PHANTOM)).eval(), nodule(2)
    learned, other = (saliency(net, sample, "image", 1).flatten() for net in (shipped(), random))
    assert abs(spearmanr(learned, other).statistic) < 0.5


def test_there_is_no_saliency_on_an_image_the_study_has_not() -> None:
    sample, _, _ = nodule(0)
    with pytest.raises(ValueError, match="no image 'image'"):
        saliency(shipped(), {**sample, "image_mask": torch.tensor(False)}, "image", 0)


def test_the_map_of_a_clip_lies_in_frames_rows_and_columns() -> None:
    """A clip of 10 frames of 16 x 24 pixels on a grid of (X, Y, T) = (8, 8, 5): its columns are cropped, nothing else is."""
    spec = ImageSpec("clip", "frames", ("US",), (8, 8, 5))
    values = torch.zeros(8, 8, 5)
    values[7, 0, 4] = 1
    array, affine = to_patient(values, spec, (10, 16, 24))
    assert array.shape == (5, 8, 8)
    assert array[4, 0, 7] == 1
    assert np.allclose(affine @ [4, 0, 7, 1], [8.5, 0.5, 18.5, 1])
