"""Values, histories and genes: what is missing leaves no trace, what is there can be told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.tabular import GeneEncoder, HistoryEncoder, ValueEncoder

torch.set_num_threads(1)

KINDS: tuple[Any, ...] = ("piecewise", "periodic")
ORDERS: tuple[Any, ...] = ("lstm", "transformer")
GARBAGE = [float("nan"), float("inf"), -1e30]


@pytest.fixture(params=KINDS)
def values(request: pytest.FixtureRequest) -> ValueEncoder:
    torch.manual_seed(0)
    return ValueEncoder(3, 16, bins=4, kind=request.param, with_age=True)


@pytest.fixture(params=ORDERS)
def history(request: pytest.FixtureRequest) -> HistoryEncoder:
    torch.manual_seed(0)
    return HistoryEncoder(3, 16, kind=request.param, dropout=0.5).eval()


def points(batch: int = 4, steps: int = 6) -> tuple[torch.Tensor, ...]:
    """Hours, variables, numbers, signs and mask of histories of 6, 5, 3 and 0 points."""
    random = torch.Generator().manual_seed(2)
    hours = (torch.rand(batch, steps, generator=random) * 200).sort(descending=True).values
    variables = torch.randint(0, 3, (batch, steps), generator=random)
    numbers = torch.randn(batch, steps, generator=random)
    signs = torch.randint(0, 3, (batch, steps), generator=random)
    mask = torch.arange(steps) < torch.tensor([6, 5, 3, 0])[:batch, None]
    return hours, variables, numbers, signs, mask


# --- values ---


def test_a_value_is_one_token_that_its_number_its_comparator_its_age_and_its_name_each_change(values: ValueEncoder) -> None:
    numbers, signs, ages = torch.full((1, 3), 0.2), torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), 5.0)
    before = values(numbers, signs, ages)
    assert before.shape == (1, 3, 16)
    for changed in (values(numbers + 0.3, signs, ages), values(numbers, signs + 1, ages), values(numbers, signs, ages + 20)):
        assert (changed - before).abs().amax(-1).min() > 1e-4
    assert (before[0, 0] - before[0, 1]).abs().max() > 1e-3, "names"
    assert (values(numbers, signs + 1, ages) - values(numbers, signs + 2, ages)).abs().max() > 1e-3, "< is not >"


def test_an_hour_counts_more_today_than_last_week_and_after_the_study_is_not_before_it(values: ValueEncoder) -> None:
    numbers, signs = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long)
    at = {hours: values(numbers, signs, torch.full((1, 3), float(hours))) for hours in (-2, 0, 2, 168, 170)}
    assert (at[2] - at[0]).norm() > 10 * (at[170] - at[168]).norm()
    assert torch.allclose(at[2] - at[0], at[0] - at[-2], atol=1e-5)
    assert not torch.allclose(at[2], at[-2], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ages_are_asked_for_only_by_an_encoder_that_uses_them(kind: Any) -> None:
    numbers, signs = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long)
    ValueEncoder(2, 8, bins=3, kind=kind)(numbers, signs)
    with pytest.raises(ValueError, match="with_age"):
        ValueEncoder(2, 8, bins=3, kind=kind)(numbers, signs, numbers)
    with pytest.raises(ValueError, match="with_age"):
        ValueEncoder(2, 8, bins=3, kind=kind, with_age=True)(numbers, signs)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_a_missing_value_reaches_no_other_token_and_no_gradient(values: ValueEncoder, garbage: float) -> None:
    signs, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[True, False, True], [True, True, False]])

    def gradients(fill: float) -> list[torch.Tensor]:
        values.zero_grad()
        numbers = torch.where(mask, torch.tensor([[0.1, 0.2, 0.3]]), fill)
        tokens = torch.where(mask[..., None], values(numbers, signs, torch.where(mask, 4.0, fill)), 0.0)
        (tokens * torch.arange(16)).sum().backward()  # type: ignore[no-untyped-call]
        return [tokens.detach(), *(p.grad.clone() for p in values.parameters() if p.grad is not None)]

    for plain, dirty in zip(gradients(0.0), gradients(garbage), strict=True):
        assert torch.equal(plain, dirty)


def test_knots_are_the_quantiles_of_what_was_seen_and_a_never_seen_value_keeps_its_own(values: ValueEncoder) -> None:
    numbers = torch.stack([torch.arange(101.0), torch.full((101,), 7.0), torch.full((101,), float("nan"))], dim=1)
    numbers[50, 0] = float("nan")
    mask = torch.tensor([True, True, False]).repeat(101, 1)
    mask[50, 0] = False
    old = values.knots.clone()
    values.learn_knots(numbers, mask)
    seen = torch.cat([torch.arange(50.0), torch.arange(51.0, 101.0)])
    assert torch.allclose(values.knots[0], torch.quantile(seen, torch.linspace(0, 1, 5)), atol=0.5)
    assert (values.knots[1].diff() > 0).all(), "one value many times still gives bins with a width"
    assert torch.equal(values.knots[2], old[2])


def test_beyond_the_knots_a_number_is_as_the_last_of_them(values: ValueEncoder) -> None:
    signs, ages = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3)
    assert torch.equal(values(torch.full((1, 3), 1.0), signs, ages), values(torch.full((1, 3), 1e6), signs, ages))


def test_a_piecewise_linear_code_fills_its_bins_from_the_left() -> None:
    """Known answer: between knots 0, 1, 2 the number 1.25 fills the first bin and a quarter of the second."""
    encoder = ValueEncoder(1, 2, bins=2)
    with torch.no_grad():
        encoder.knots.copy_(torch.tensor([[0.0, 1.0, 2.0]]))
        encoder.weight.copy_(torch.eye(2)[None])
        encoder.name.zero_()
        encoder.sign.weight.zero_()
    token = encoder(torch.tensor([[1.25]]), torch.zeros(1, 1, dtype=torch.long))
    assert token[0, 0].tolist() == [1.0, 0.25]


def test_the_values_encoder_keeps_the_names_that_weights_were_saved_under() -> None:
    assert set(ValueEncoder(2, 8, bins=3).state_dict()) == {"knots", "weight", "name", "sign.weight"}


# --- histories ---


@torch.inference_mode()
def test_a_history_becomes_one_token_a_point_and_nothing_where_there_is_none(history: HistoryEncoder) -> None:
    tokens, mask = history(*points())
    assert tokens.shape == (4, 6, 16)
    assert torch.equal(mask, points()[-1])
    assert tokens.isfinite().all()
    assert (tokens[mask].abs().amax(-1) > 0).all()
    assert torch.equal(tokens[~mask], torch.zeros_like(tokens[~mask]))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_missing_points_changes_no_bit_and_no_gradient(history: HistoryEncoder, garbage: float) -> None:
    hours, variables, numbers, signs, mask = points()
    mask[0, 2] = False  # a hole, as a point dropped in training leaves it

    def gradients(hour: float, id_: int) -> list[torch.Tensor]:
        history.zero_grad()
        dirty = (hours, variables, numbers, signs, mask)
        dirty = (
            torch.where(mask, hours, hour),
            torch.where(mask, variables, id_),
            torch.where(mask, numbers, hour),
            torch.where(mask, signs, id_),
            mask,
        )
        tokens, _ = history(*dirty)
        (tokens * torch.arange(16)).sum().backward()
        return [tokens.detach(), *(p.grad.clone() for p in history.parameters() if p.grad is not None)]

    plain = gradients(0.0, 0)
    assert len(plain) == 1 + len(list(history.parameters()))
    assert all(tensor.isfinite().all() for tensor in plain)
    for expected, found in zip(plain, gradients(garbage, -99), strict=True):
        assert torch.equal(expected, found)


@torch.inference_mode()
def test_a_history_is_encoded_alike_alone_in_company_and_with_more_padding(history: HistoryEncoder) -> None:
    given = points()
    tokens, mask = history(*given)
    alone = torch.cat([history(*(tensor[i : i + 1] for tensor in given))[0] for i in range(4)])
    longer = [torch.cat([tensor, torch.zeros(4, 3, dtype=tensor.dtype)], dim=1) for tensor in given]
    assert torch.allclose(tokens, alone, atol=1e-5)
    assert torch.allclose(tokens, history(*longer)[0][:, :6], atol=1e-5)
    assert not history(*longer)[1][:, 6:].any()
    assert torch.equal(mask, history(*longer)[1][:, :6])


@torch.inference_mode()
def test_a_point_left_out_is_as_a_history_without_it(history: HistoryEncoder) -> None:
    given = [tensor[:1] for tensor in points()]
    given[4] = given[4].clone()
    given[4][0, 2] = False
    kept = [0, 1, 3, 4, 5]
    assert torch.allclose(history(*given)[0][:, kept], history(*(tensor[:, kept] for tensor in given))[0], atol=1e-5)


@torch.inference_mode()
def test_the_order_in_time_changes_what_is_made_of_the_same_numbers(history: HistoryEncoder) -> None:
    """Rising is not falling: the same numbers at the same hours, the other way round."""
    hours, variables, numbers, signs, mask = (tensor[:1] for tensor in points())
    variables, signs = torch.zeros_like(variables), torch.zeros_like(signs)
    rising, _ = history(hours, variables, numbers.sort().values, signs, mask)
    falling, _ = history(hours, variables, numbers.sort(descending=True).values, signs, mask)
    # The mean over all points: whatever does not bring number and time together is the same in both.
    assert (rising.mean(1) - falling.mean(1)).abs().max() > 1e-4


@torch.inference_mode()
def test_each_part_of_a_point_counts_and_earlier_points_reach_later_ones(history: HistoryEncoder) -> None:
    hours, variables, numbers, signs, mask = points()
    before, _ = history(hours, variables, numbers, signs, mask)
    first = torch.zeros_like(mask)
    first[:3, 0] = True
    for part in (
        (hours + 50 * first, variables, numbers, signs, mask),
        (hours, (variables + first.long()) % 3, numbers, signs, mask),
        (hours, variables, numbers + first.float(), signs, mask),
        (hours, variables, numbers, (signs + first.long()) % 3, mask),
    ):
        change = (history(*part)[0] - before).abs().amax(-1)
        assert (change[:3, 0] > 1e-4).all()
        assert (change[:3, 2] > 1e-7).all(), "the third point knows of the first"
        assert change[3].max() == 0


@torch.inference_mode()
def test_the_lstm_never_looks_ahead() -> None:
    history = HistoryEncoder(3, 16, kind="lstm", dropout=0.0)
    hours, variables, numbers, signs, mask = (tensor[:1] for tensor in points())
    later = numbers.clone()
    later[:, 3:] += 5
    before, after = history(hours, variables, numbers, signs, mask)[0], history(hours, variables, later, signs, mask)[0]
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


@torch.inference_mode()
def test_numbers_are_standardized_by_what_each_variable_was_in_training(history: HistoryEncoder) -> None:
    hours, variables, numbers, signs, mask = points()
    before, _ = history(hours, variables, numbers, signs, mask)
    seen = torch.tensor([[1.0, 3.0, float("nan"), 8.0, 8.0]])
    history.learn_scale(seen, torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[True, True, False, True, True]]))
    assert history.mean.tolist() == [2.0, 8.0, 0.0]
    assert history.scale.tolist() == [1.0, 1.0, 1.0], "all alike: 1; never seen: as before"
    history.learn_scale(torch.tensor([[10.0, 30.0]]), torch.tensor([[2, 2]]), torch.ones(1, 2, dtype=torch.bool))
    assert (history.mean[2].item(), history.scale[2].item()) == (20.0, 10.0)
    moved = numbers * history.scale[variables] + history.mean[variables]
    assert torch.allclose(history(hours, variables, moved, signs, mask)[0], before, atol=1e-5)
    assert {"mean", "scale"} <= set(history.state_dict())


# --- genes ---


@pytest.mark.parametrize(("variants", "genes"), [(3, 2), (3, 0), (0, 2)])
def test_genes_become_a_token_a_variant_and_a_token_a_measured_gene(variants: int, genes: int) -> None:
    encoder = GeneEncoder(genes, 32, 16)
    ids = torch.tensor([[5, 9, 0], [0, 0, 0]])[:, :variants]
    measured = torch.tensor([[True, False], [False, False]])[:, :genes]
    tokens, mask = encoder(ids, torch.ones(2, genes), measured)
    assert tokens.shape == (2, variants + genes, 16)
    assert mask.tolist() == torch.cat([ids > 0, measured], dim=1).tolist()
    assert not mask[1].any()
    tokens.sum().backward()
    assert torch.equal(tokens[~mask], torch.zeros_like(tokens[~mask]))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_an_unmeasured_gene_changes_no_bit_and_no_gradient(garbage: float) -> None:
    torch.manual_seed(0)
    encoder = GeneEncoder(2, 32, 16)
    ids, mask = torch.tensor([[5, 0]]), torch.tensor([[False, True]])

    def gradients(fill: float) -> list[torch.Tensor]:
        encoder.zero_grad()
        tokens, _ = encoder(ids, torch.tensor([[fill, 1.5]]), mask)
        (tokens * torch.arange(16)).sum().backward()
        return [tokens.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]

    for plain, dirty in zip(gradients(0.0), gradients(garbage), strict=True):
        assert torch.equal(plain, dirty)


@torch.inference_mode()
def test_variants_genes_and_levels_are_told_apart_and_their_places_are_not() -> None:
    torch.manual_seed(0)
    encoder = GeneEncoder(2, 32, 16)
    measured = torch.ones(1, 2, dtype=torch.bool)
    tokens, _ = encoder(torch.tensor([[5, 9]]), torch.ones(1, 2), measured)
    swapped, _ = encoder(torch.tensor([[9, 5]]), torch.full((1, 2), 2.0), measured)
    assert torch.equal(tokens[:, :2], swapped[:, :2].flip(1)), "a code means the same wherever it stands"
    distances = torch.cdist(torch.cat([tokens[0], swapped[0, 2:]]), torch.cat([tokens[0], swapped[0, 2:]])) + torch.eye(6)
    assert distances.min() > 0.1


def test_levels_of_a_gene_are_standardized_by_training() -> None:
    encoder = GeneEncoder(2, 8, 4)
    encoder.learn_scale(torch.tensor([[1.0, float("nan")], [5.0, float("nan")]]), torch.tensor([[True, False], [True, False]]))
    assert encoder.mean.tolist() == [3.0, 0.0]
    assert encoder.scale.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "build", [lambda: ValueEncoder(1, 8, bins=2, kind=_any("fourier")), lambda: HistoryEncoder(1, 8, kind=_any("gru"), dropout=0)]
)
def test_an_unknown_kind_is_refused_in_a_sentence(build: Any) -> None:
    with pytest.raises(ValueError, match="There is no"):
        build()


def _any(kind: str) -> Any:
    return kind
