"""What is absent plays no part: not a bit of it; and what is present gets its exact share."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

from models.bundle import Bundle
from models.fusion import FusionNetwork, shapley, subset_logits, subsets
from models.transforms import collate
from tests.unit import small_bundle


@pytest.fixture
def network(tmp_path: Path) -> FusionNetwork:
    bundle = Bundle.read(small_bundle.write(tmp_path), verify=False)
    torch.manual_seed(0)
    return FusionNetwork(bundle).eval()


@pytest.fixture
def batch(tmp_path: Path) -> dict[str, torch.Tensor]:
    bundle = Bundle.read(small_bundle.write(tmp_path), verify=False)
    return collate([s.sample for s in small_bundle.studies(bundle, 5)])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30, 0.5])
@pytest.mark.parametrize("absent", ["image", "values", "text"])
@torch.inference_mode()
def test_whatever_lies_in_an_absent_modalitys_slot_changes_no_bit(
    network: FusionNetwork, batch: dict[str, torch.Tensor], absent: str, garbage: float
) -> None:
    tokens = network.encode(batch)
    values, mask = tokens[absent]
    none = torch.zeros_like(mask)
    before = network.head({**tokens, absent: (values, none)})
    after = network.head({**tokens, absent: (torch.full_like(values, garbage), none)})
    assert torch.equal(before, after)
    assert before.isfinite().all()
    assert not torch.equal(before, network.head(tokens)), "the modality must matter when it is there"


@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
@torch.inference_mode()
def test_garbage_in_one_missing_value_or_image_changes_no_bit_from_the_encoders_on(
    network: FusionNetwork, batch: dict[str, torch.Tensor], garbage: float
) -> None:
    batch["number_mask"][:, 1] = False
    batch["image_mask"][:] = False
    before = network(batch)
    numbers = batch["numbers"].clone()
    numbers[:, 1] = garbage
    assert torch.equal(before, network({**batch, "numbers": numbers, "image": torch.full_like(batch["image"], garbage)}))


@torch.inference_mode()
def test_a_study_is_answered_alike_alone_and_in_company(network: FusionNetwork, batch: dict[str, torch.Tensor]) -> None:
    """Also when its neighbors' notes are longer than its own."""
    together = network(batch)
    alone = torch.cat([network({key: tensor[i : i + 1] for key, tensor in batch.items()}) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.inference_mode()
def test_the_last_subset_is_everything_and_the_shares_sum_to_the_gain(network: FusionNetwork, batch: dict[str, torch.Tensor]) -> None:
    tokens = network.encode(batch)
    game = subset_logits(network.head, tokens)
    assert game.shape == (8, 5, 2)
    assert torch.allclose(game[-1], network.head(tokens), atol=1e-5)
    assert torch.allclose(shapley(game).sum(0), game[-1] - game[0], atol=1e-5)


@torch.inference_mode()
def test_a_modality_that_is_absent_has_a_share_of_exactly_nothing(network: FusionNetwork, batch: dict[str, torch.Tensor]) -> None:
    batch["words"][:] = 0
    shares = shapley(subset_logits(network.head, network.encode(batch)))
    assert torch.equal(shares[2], torch.zeros(5, 2))
    assert shares[:2].abs().min() > 0


def test_shapley_values_equal_the_mean_over_all_orders_of_arrival() -> None:
    """The definition itself, by brute force, on a random game of four players."""
    game = torch.rand(16, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(4, 3, 2, dtype=torch.float64)
    for order in permutations(range(4)):
        row = 0
        for player in order:
            expected[player] += (game[row | 1 << player] - game[row]) / 24
            row |= 1 << player
    assert torch.allclose(shapley(game), expected)


def test_subset_rows_are_binary_numbers() -> None:
    assert subsets(2).tolist() == [[False, False], [True, False], [False, True], [True, True]]
