"""Training learns what is there, forgets what is not labeled, and does the same thing twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from models.bundle import Bundle
from models.evaluation import assign_folds, auroc, by_modality, out_of_fold
from models.training import Labeled, fit, fit_temperatures, predict, save_fit, split_groups, step_loss
from models.transforms import collate
from tests.unit import small_bundle


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on many threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.read(small_bundle.write(tmp_path / "small"), verify=False)


def test_training_twice_with_one_seed_gives_the_same_bits(bundle: Bundle) -> None:
    studies = small_bundle.studies(bundle, 24)
    first, second, other = (fit(bundle, studies, seed=seed, epochs=2).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_network_learns_the_value_that_decides(bundle: Bundle) -> None:
    result = fit(bundle, small_bundle.studies(bundle, 80), seed=0, epochs=12)
    logits, labels = predict(result.network, small_bundle.studies(bundle, 60, seed=9))
    assert auroc(logits[:, 0], labels[:, 0]) > 0.95
    blind, _ = predict(result.network, small_bundle.studies(bundle, 60, seed=9), keep=("image", "text"))
    assert auroc(blind[:, 0], labels[:, 0]) < 0.8


def test_what_fit_saves_is_what_a_bundle_loads(bundle: Bundle) -> None:
    result = fit(bundle, small_bundle.studies(bundle, 16), seed=0, epochs=1)
    settled = save_fit(bundle, result)
    loaded = Bundle.read(bundle.folder).tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.network.state_dict().items())
    assert settled.findings[0].temperature == pytest.approx(float(result.temperatures[0]), abs=1e-4)


def test_a_study_without_a_label_moves_no_weight(bundle: Bundle) -> None:
    studies = small_bundle.studies(bundle, 8)
    network = fit(bundle, studies, seed=0, epochs=1).network
    nothing = torch.full((8, 2), float("nan"))
    quiet = dataclasses.replace(bundle.training, dropout=0.0)
    loss = step_loss(network, collate([s.sample for s in studies]), nothing, quiet, torch.Generator().manual_seed(0))
    assert loss.item() == 0


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=4, max_size=40), st.integers(0, 99))
def test_no_patient_is_on_both_sides_of_a_split(drawn: list[tuple[int, bool]], seed: int) -> None:
    studies = [Labeled({}, torch.tensor([float(ill)]), f"p{group}") for group, ill in [*drawn, (97, True), (98, False)]]
    train, held_out = split_groups(studies, share=0.2, seed=seed)
    assert {s.group for s in train}.isdisjoint({s.group for s in held_out})
    assert len(train) + len(held_out) == len(studies)
    assert train
    assert held_out


def test_one_patient_alone_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="1 group"):
        split_groups([Labeled({}, torch.tensor([1.0]), "p")] * 5, share=0.2, seed=0)


def test_folds_hold_whole_patients_and_about_as_many_studies_each() -> None:
    studies = [Labeled({}, torch.tensor([1.0]), f"p{i % 13}") for i in range(100)]
    fold_of = assign_folds(studies, folds=5, seed=3)
    sizes = [sum(fold_of[s.group] == fold for s in studies) for fold in range(5)]
    assert sum(sizes) == 100
    assert max(sizes) - min(sizes) <= 10
    with pytest.raises(ValueError, match="13 groups cannot fill 14 folds"):
        assign_folds(studies, folds=14, seed=3)


def test_cross_validation_finds_the_modality_that_knows_and_the_one_that_does_not(bundle: Bundle) -> None:
    studies = small_bundle.studies(bundle, 80)
    pooled = out_of_fold(bundle, studies, folds=4, seed=0, epochs=10)
    assert all(scores.isfinite().all() for scores in pooled.values()), "each study is in one fold"
    table = by_modality(bundle, pooled, torch.stack([s.labels for s in studies]))["ill"]
    assert set(table) == {"fused", "image", "values", "text"}
    assert table["values"] > 0.9
    assert table["image"] < 0.75


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 1.0])), min_size=2, max_size=30))
def test_auroc_agrees_with_scikit_learn_ties_included(pairs: list[tuple[int, float]]) -> None:
    scores, labels = (torch.tensor([float(p[i]) for p in pairs]) for i in (0, 1))
    if len(set(labels.tolist())) < 2:
        assert auroc(scores, labels) != auroc(scores, labels), "NaN, for there is nothing to tell apart"
    else:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))


def test_an_overconfident_network_is_cooled_and_a_calibrated_one_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 1, generator=generator) * 2
    labels = (torch.rand(4000, 1, generator=generator) < torch.sigmoid(logits)).float()
    assert fit_temperatures(logits, labels).item() == pytest.approx(1, abs=0.12)
    assert fit_temperatures(logits * 3, labels).item() == pytest.approx(3, abs=0.35)
    assert fit_temperatures(logits, torch.ones(4000, 1)).item() == 1
