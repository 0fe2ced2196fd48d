"""What is absent plays no part in any fusion: not a bit of it; and what is present gets its exact share."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.fusion import (
    FUSIONS,
    FusionHead,
    Gated,
    Graph,
    Recurrent,
    Shape,
    Tokens,
    make_head,
    parameters,
    shapley,
    subset_logits,
    subsets,
)

MODALITIES = ("image", "values", "text")
SINGLE = "single:values"
EVERY = (*FUSIONS, SINGLE)
SMALL = Shape(width=16, heads=2, layers=1, findings=2, dropout=0.0, hidden=8)

every_head = pytest.mark.parametrize("fusion", EVERY)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(fusion: str, modalities: tuple[str, ...] = MODALITIES) -> FusionHead:
    return make_head(fusion, modalities, width=16, heads=2, layers=1, findings=2, dropout=0.0).eval()


def make_tokens(studies: int = 8, modalities: tuple[str, ...] = MODALITIES) -> Tokens:
    """Study r lacks the modalities whose bit is not set in r (so the first lacks all), and of each the last token."""
    result: Tokens = {}
    for index, (name, count) in enumerate(zip(modalities, (4, 3, 5), strict=False)):
        mask = torch.tensor([[bool(study >> index & 1)] * (count - 1) + [False] for study in range(studies)])
        result[name] = (torch.randn(studies, count, 16), mask)
    return result


def without(tokens: Tokens, name: str) -> Tokens:
    x, mask = tokens[name]
    return {**tokens, name: (x, torch.zeros_like(mask))}


@every_head
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@torch.inference_mode()
def test_whatever_lies_in_an_absent_slot_changes_no_bit(fusion: str, garbage: float) -> None:
    """Of a modality that is absent, and of one missing value or word of a modality that is present."""
    head, tokens = make(fusion), make_tokens()
    dirty = {name: (torch.where(mask[..., None], x, garbage), mask) for name, (x, mask) in tokens.items()}
    assert torch.equal(head(tokens), head(dirty))
    assert torch.equal(head.embed(tokens), head.embed(dirty))
    assert torch.equal(subset_logits(head, tokens), subset_logits(head, dirty))


@every_head
@torch.inference_mode()
def test_which_garbage_lies_in_which_absent_slot_changes_no_bit(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    answers = set()
    for order in permutations((float("nan"), float("-inf"), 7.0)):
        dirty = {
            name: (torch.where(tokens[name][1][..., None], tokens[name][0], g), tokens[name][1])
            for name, g in zip(MODALITIES, order, strict=True)
        }
        answers.add(head(dirty).numpy().tobytes())
    assert len(answers) == 1


@every_head
@torch.inference_mode()
def test_what_is_present_matters_where_it_is_used(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    for bit, name in enumerate(MODALITIES):
        changed = (head(without(tokens, name)) != head(tokens)).any(1)
        assert changed.tolist() == [name in head.used and bool(study >> bit & 1) for study in range(8)]


@every_head
@pytest.mark.parametrize("modalities", [("values",), ("values", "image"), MODALITIES])
@torch.inference_mode()
def test_of_nothing_every_head_says_the_same_finite_prior(fusion: str, modalities: tuple[str, ...]) -> None:
    """And none falls over a network that has one modality only."""
    head, tokens = make(fusion, modalities), make_tokens(modalities=modalities)
    nothing = {name: (x, torch.zeros_like(mask)) for name, (x, mask) in tokens.items()}
    prior = head(nothing)
    assert prior.shape == (8, 2)
    assert prior.isfinite().all()
    assert head.embed(nothing).isfinite().all()
    assert torch.equal(prior, prior[:1].expand(8, -1))
    assert torch.equal(prior, head(tokens, torch.zeros(8, len(modalities), dtype=torch.bool)))


@every_head
@torch.inference_mode()
def test_what_may_not_be_used_is_as_if_absent(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    for row in subsets(3):
        allowed = {name: (x, mask & row[index]) for index, (name, (x, mask)) in enumerate(tokens.items())}
        assert torch.equal(head(tokens, row.expand(8, -1)), head(allowed))
        assert torch.equal(head.embed(tokens, row.expand(8, -1)), head.embed(allowed))


@every_head
@torch.inference_mode()
def test_a_study_is_answered_alike_alone_and_in_any_company(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    together = head(tokens)
    for study in range(8):
        alone = {name: (x[study : study + 1], mask[study : study + 1]) for name, (x, mask) in tokens.items()}
        assert torch.allclose(head(alone)[0], together[study], atol=1e-5)
        others = torch.arange(8)[:, None, None] != study
        company = {name: (torch.where(others, x + 1, x), mask) for name, (x, mask) in tokens.items()}
        assert torch.equal(head(company)[study], together[study]), "not a bit may come from a neighbor"


@every_head
def test_every_parameter_learns_and_from_no_absent_slot(fusion: str) -> None:
    """Also beside NaN: a gradient through a masked softmax over nothing would be NaN and end the training."""
    head, tokens = make(fusion).train(), make_tokens()
    leaves = {name: torch.where(mask[..., None], x, float("nan")).requires_grad_() for name, (x, mask) in tokens.items()}
    head({name: (leaves[name], mask) for name, (_, mask) in tokens.items()}).sub(1).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    for name in head.used:
        grad = leaves[name].grad
        assert grad is not None
        assert torch.equal(grad.any(-1), tokens[name][1])


@every_head
def test_reduced_precision_trains_too_and_says_nearly_the_same(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(tokens)
    logits.float().sum().backward()
    assert torch.allclose(logits.float(), head(tokens), atol=0.05)


@every_head
@torch.inference_mode()
def test_the_last_subset_is_everything_and_the_shares_sum_to_the_gain(fusion: str) -> None:
    head, tokens = make(fusion), make_tokens()
    game = subset_logits(head, tokens)
    assert game.shape == (8, 8, 2)
    assert torch.allclose(game[-1], head(tokens), atol=1e-5)
    for row, allowed in enumerate(subsets(3)):
        assert torch.allclose(game[row], head(tokens, allowed.expand(8, -1)), atol=1e-5)
    assert torch.allclose(shapley(game).sum(0), game[-1] - game[0], atol=1e-5)


@every_head
@torch.inference_mode()
def test_a_modality_absent_or_unused_has_a_share_of_exactly_nothing(fusion: str) -> None:
    head = make(fusion)
    shares = shapley(subset_logits(head, make_tokens()))
    for index, name in enumerate(MODALITIES):
        for study in range(8):
            counts = name in head.used and bool(study >> index & 1)
            assert bool((shares[index, study] != 0).all()) is counts
            assert bool((shares[index, study] == 0).all()) is not counts


@torch.inference_mode()
def test_that_share_is_exactly_nothing_though_no_two_runs_of_the_head_agree_to_the_last_bit() -> None:
    """As on a device whose sums depend on a row's place in the batch."""

    class Restless(FusionHead):
        def forward(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
            return self.embed(tokens, keep)

        def embed(self, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
            batch = len(next(iter(tokens.values()))[0])
            return torch.randn(batch, 2) + sum(mask.sum(1, keepdim=True) for _, mask in tokens.values())

    shares = shapley(subset_logits(Restless(MODALITIES, only="values"), make_tokens()))
    assert torch.equal(
        (shares != 0).all(2), torch.tensor([[name == "values" and bool(study & 2) for study in range(8)] for name in MODALITIES])
    )


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


# What only two modalities together tell: the finding is positive where one of two signs is positive, not both.


def exclusive_or(noise: float) -> tuple[Tokens, Tensor]:
    """64 studies of an image and values, each with a sign along its own direction, and labels (B, 1)."""
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=2))).repeat(16, 1)  # (B, 2)
    directions = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    x = signs[:, :, None, None] * directions[:, None] + noise * torch.randn(64, 2, 3, 16)  # (B, M, n, d)
    mask = torch.ones(64, 3, dtype=torch.bool)
    return {"image": (x[:, 0], mask), "values": (x[:, 1], mask)}, (signs.prod(1, keepdim=True) < 0).float()


def learn(fusion: str) -> FusionHead:
    tokens, labels = exclusive_or(noise=0.1)
    head = make_head(fusion, ("image", "values"), width=16, heads=2, layers=1, findings=1, dropout=0.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss: Tensor = functional.binary_cross_entropy_with_logits(head(tokens), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head.eval()


@torch.no_grad()
def accuracy(head: FusionHead, noise: float) -> float:
    tokens, labels = exclusive_or(noise)
    return float(((head(tokens) > 0) == labels.bool()).float().mean())


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if not name.startswith("late")])
def test_every_fusion_before_the_decision_learns_what_only_two_modalities_together_tell(fusion: str) -> None:
    assert accuracy(learn(fusion), noise=0.1) == 1.0


@pytest.mark.parametrize("fusion", ["late_mean", "late_stack", SINGLE])
def test_no_late_fusion_and_no_single_modality_can_learn_it(fusion: str) -> None:
    """Proof: the two ways to be positive and the two ways to be negative sum to the same logit, so one of four must be wrong."""
    head, (first, second), mask = learn(fusion), torch.randn(2, 5, 3, 16), torch.ones(5, 3, dtype=torch.bool)
    assert accuracy(head, noise=0.0) <= 0.75

    @torch.no_grad()
    def logit(image: Tensor, values: Tensor) -> Tensor:
        return head({"image": (image, mask), "values": (values, mask)})  # type: ignore[no-any-return]

    assert torch.allclose(logit(first, second) + logit(second, first), logit(first, first) + logit(second, second), atol=1e-4)


def test_a_fusion_before_the_decision_is_no_such_sum() -> None:
    """What the proof above measures is not 0 for every function."""
    tokens, _ = exclusive_or(noise=0.0)
    logits = learn("tokens")(tokens)[:4, 0].detach()  # both negative, values positive, image positive, both
    assert (logits[1] + logits[2] - logits[0] - logits[3]).abs() > 1


# Known answers.


@torch.inference_mode()
def test_an_absent_modality_is_exactly_0_in_the_embedding_of_a_late_fusion() -> None:
    embedding = make("late_mean").embed(make_tokens()).view(8, 3, 16)
    assert torch.equal(embedding.any(-1), subsets(3))


@torch.inference_mode()
def test_late_mean_is_the_mean_of_what_each_present_modality_says_alone() -> None:
    head, tokens = make("late_mean"), make_tokens()
    alone = [head(tokens, torch.eye(3, dtype=torch.bool)[index].expand(8, -1)) for index in range(3)]
    for study in range(1, 8):
        there = [alone[index][study] for index in range(3) if study >> index & 1]
        assert torch.allclose(head(tokens)[study], torch.stack(there).mean(0), atol=1e-6)


@torch.inference_mode()
def test_late_stack_adds_what_each_present_modality_says_to_the_prior() -> None:
    head, tokens = make("late_stack"), make_tokens()
    prior = head.get_parameter("prior").copy_(torch.tensor([1.0, -2.0]))
    game = subset_logits(head, tokens)
    assert torch.equal(game[0], prior.expand(8, -1))
    gains = [game[1 << index] - game[0] for index in range(3)]
    assert torch.allclose(head(tokens), game[0] + sum(gains), atol=1e-5)


@torch.inference_mode()
def test_the_lstm_reads_only_the_present_in_their_order() -> None:
    """As torch's own LSTM of the same weights does when it is given those alone."""
    step = Recurrent(3, SMALL)
    reference = torch.nn.LSTM(16, 16, batch_first=True)
    reference.load_state_dict({f"{name}_l0": value for name, value in step.cell.state_dict().items()})
    vectors, present = torch.randn(8, 3, 16), subsets(3)
    states = step(vectors, present)
    for study in range(1, 8):
        assert torch.allclose(states[study], reference(vectors[study : study + 1, present[study]])[0][0, -1], atol=1e-6)


@torch.inference_mode()
def test_the_graph_is_the_papers_equation_written_out_node_by_node() -> None:
    """doi:10.48550/arXiv.2105.14491, Eq. 7: score a · LeakyReLU(W [target ‖ source]), softmax over the neighbors."""
    step, vectors = Graph(4, SMALL), torch.randn(8, 4, 16)
    present = torch.cat([torch.ones(8, 1, dtype=torch.bool), subsets(3)], dim=1)
    weights = torch.cat([step.target.weight, step.source.weight], dim=1)  # (d, 2d)
    for study, answer in enumerate(step(vectors, present)):
        nodes, total = vectors[study, present[study]], torch.zeros(16)
        for node in nodes:
            heard = torch.zeros(16)
            for part, a in zip((slice(8), slice(8, 16)), step.score, strict=True):  # two heads
                both = [
                    functional.leaky_relu(weights @ torch.cat([node, other]) + step.target.bias + step.source.bias, 0.2) for other in nodes
                ]
                shares = torch.stack([a @ one[part] for one in both]).softmax(0)
                heard[part] = sum(s * step.source(other)[part] for s, other in zip(shares, nodes, strict=True))
            total += node + functional.elu(heard)
        assert torch.allclose(answer, total / len(nodes), atol=1e-5)


@torch.inference_mode()
def test_the_gated_unit_is_the_papers_equation_of_two_modalities() -> None:
    """doi:10.48550/arXiv.1702.01992, §3.1: a gate per feature that sees both, of each modality's tanh."""
    step, (a, b) = Gated(2, SMALL), torch.randn(2, 16)
    gates = torch.sigmoid(step.gate.weight @ torch.cat([a, b]))
    answer = step(torch.stack([a, b])[None], torch.ones(1, 2, dtype=torch.bool))[0]
    assert torch.allclose(answer, gates[:16] * a.tanh() + gates[16:] * b.tanh(), atol=1e-6)


# What a bundle names, and what its weights are called.


def test_every_head_has_as_many_parameters_as_the_default_within_a_tenth() -> None:
    counts = {
        name: parameters(make_head(name, MODALITIES, width=64, heads=4, layers=2, findings=2, dropout=0.1))
        for name in (*FUSIONS, *(f"single:{modality}" for modality in MODALITIES))
    }
    print(*(f"{name:15}{count:8,}" for name, count in counts.items()), sep="\n")
    assert max(counts.values()) <= 1.1 * counts["tokens"]
    assert min(counts.values()) >= 0.9 * counts["tokens"]


def test_counting_parameters_draws_no_random_number() -> None:
    """So that a head's first weights depend on the seed and on its own shape alone."""
    first = make("tokens").state_dict()
    torch.manual_seed(0)
    second = FUSIONS["tokens"](MODALITIES, Shape(16, 2, 1, 2, 0.0)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("name", ["sum", "single:", "single:genes", "single", ""])
def test_an_unknown_fusion_is_refused_with_the_names_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown; known are tokens, .*late_stack, single:image, single:values, single:text\."):
        make(name)


def test_the_names_in_shipped_weights_stay_what_they_are() -> None:
    """A bundle's safetensors of the default fusion must load for as long as the bundle is in service."""
    attention = [f"{part}.{kind}" for part in ("query", "key_value", "out") for kind in ("weight", "bias")]
    layer = [f"{part}.{kind}" for part in ("norm1", "norm2", "feed.0", "feed.3") for kind in ("weight", "bias")]
    expected = {"modality", "context", "queries", "weight", "bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
    expected |= {f"cross.{name}" for name in attention}
    expected |= {f"layers.0.{name}" for name in (*layer, *(f"attention.{name}" for name in attention))}
    assert set(make("tokens").state_dict()) == expected
