"""The classical baselines learn what is there and nothing where nothing is; that no fold leaks, test_models_evaluation.py shows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from models import baselines
from models.baselines import BASELINES, SETTINGS, fit_predict, missing_table, value_table

FloatArray = NDArray[np.float64]
NAMES = tuple(BASELINES)
#: Quick ones of three kinds: a decision function, class-weighted probabilities, probabilities without class weights.
QUICK = ("SVM", "decision tree", "nearest neighbors")
IMPUTED = tuple(name for name in NAMES if name != "gradient boosting, missingness seen")


@pytest.fixture(autouse=True)
def _small_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the trees is enough for toys, and takes a tenth of the time."""
    monkeypatch.setattr(baselines, "TREES", 10)


class Toy(NamedTuple):
    """Studies of patients with two studies each."""

    x: FloatArray
    y: FloatArray
    groups: NDArray[np.int64]
    folds: NDArray[np.int64]


def toy(*, studies: int = 90, signal: float = 0.0, prevalence: float = 0.5, seed: int = 0) -> Toy:
    """Four columns, of which the first two move by `signal` standard deviations with the label, in two stratified folds."""
    rng = np.random.default_rng(seed)
    groups = np.arange(studies) // 2
    y = (rng.permutation(studies // 2) < prevalence * (studies // 2)).astype(np.float64)[groups]
    x = rng.normal(size=(studies, 4))
    x[:, :2] += signal * y[:, None]
    folds = np.zeros(studies, np.int64)
    for fold, (_, test) in enumerate(StratifiedGroupKFold(2, shuffle=True, random_state=seed).split(x, y, groups)):
        folds[test] = fold
    return Toy(x, y, groups, folds)


def across_folds(name: str, data: Toy, y: FloatArray, x: FloatArray | None = None) -> FloatArray:
    """Each fold of `data` answered by a baseline that learned on the other."""
    x, result = data.x if x is None else x, np.full(len(y), np.nan)
    for fold in np.unique(data.folds):
        test = data.folds == fold
        result[test] = fit_predict(name, x[~test], y[~test], x[test], seed=0, groups=data.groups[~test])
    return result


@pytest.mark.parametrize("name", NAMES)
def test_each_baseline_separates_what_is_separable(name: str) -> None:
    train, test = toy(signal=4.0, prevalence=0.3), toy(signal=4.0, prevalence=0.3, seed=1)
    found = fit_predict(name, train.x, train.y, test.x, seed=0, groups=train.groups)
    assert found.shape == test.y.shape
    assert found.dtype == np.float64
    assert ((found >= 0) & (found <= 1)).all()
    assert roc_auc_score(test.y, found) > 0.95
    assert np.mean((found - test.y) ** 2) < 0.08


@pytest.mark.parametrize("name", NAMES)
def test_each_baseline_is_at_chance_on_noise_and_says_the_prevalence(name: str) -> None:
    noise = toy(prevalence=0.7, studies=120, seed=3)
    found = across_folds(name, noise, noise.y)
    # The standard error of 120 studies of 60 patients is 0.07.
    assert 0.33 < roc_auc_score(noise.y, found) < 0.67
    assert found.mean() == pytest.approx(0.7, abs=0.12)
    assert np.mean((found - noise.y) ** 2) < 0.7 * 0.3 + 0.04


@pytest.mark.parametrize("name", QUICK)
def test_a_study_is_judged_the_same_whatever_stands_beside_it(name: str) -> None:
    data = toy(signal=1.0)
    data.x[::3, 1] = np.nan
    together = fit_predict(name, data.x[30:], data.y[30:], data.x[:30], seed=0, groups=data.groups[30:])
    alone = fit_predict(name, data.x[30:], data.y[30:], data.x[:1], seed=0, groups=data.groups[30:])
    assert together[0] == pytest.approx(alone[0], abs=1e-12)


@pytest.mark.parametrize("name", QUICK)
def test_inner_folds_keep_patients_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy()
    parted: list[NDArray[np.int64]] = []
    original = StratifiedGroupKFold.split

    def watched(*args: object) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        splits = list(original(*args))
        parted.extend(np.intersect1d(data.groups[a], data.groups[b]) for a, b in splits)
        return splits

    monkeypatch.setattr(StratifiedGroupKFold, "split", watched)
    fit_predict(name, data.x, data.y, data.x, seed=0, groups=data.groups)
    assert len(parted) == 3
    assert not any(len(both) for both in parted)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_values_and_columns_never_known_in_training_are_taken(name: str) -> None:
    data = toy(signal=4.0)
    data.x[np.random.default_rng(0).random(data.x.shape) < 0.2] = np.nan
    data.x[data.folds != 0, 3] = np.nan
    test = data.folds == 0
    found = fit_predict(name, data.x[~test], data.y[~test], data.x[test], seed=0, groups=data.groups[~test])
    assert np.isfinite(found).all()
    assert roc_auc_score(data.y[test], found) > 0.8


@pytest.mark.parametrize("name", IMPUTED)
def test_an_unknown_value_reads_as_the_training_median_and_not_as_unknown(name: str) -> None:
    data = toy(signal=1.0)
    data.x[::3, 0] = np.nan
    unknown = np.array([[np.nan, 0.0, 0.0, 0.0]])
    median = np.where(np.isnan(unknown), np.nanmedian(data.x[:, 0]), unknown)
    first, second = fit_predict(name, data.x, data.y, np.vstack([unknown, median]), seed=0, groups=data.groups)
    assert first == second


def test_only_the_baseline_named_for_it_learns_from_missingness() -> None:
    data = toy()
    data.x[data.y == 1, 0] = np.nan  # the shortcut, and nothing else
    auroc = {
        name: roc_auc_score(data.y, across_folds(name, data, data.y))
        for name in ("logistic regression", "gradient boosting, missingness seen")
    }
    assert auroc["gradient boosting, missingness seen"] > 0.95
    assert auroc["logistic regression"] < 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_in_training_gives_its_prevalence(name: str, label: float) -> None:
    data = toy()
    found = fit_predict(name, data.x, np.full(len(data.y), label), data.x[:5], seed=0, groups=data.groups)
    assert found.tolist() == [label] * 5


@pytest.mark.parametrize("name", NAMES)
def test_a_class_with_a_single_patient_leaves_nothing_to_choose_and_still_trains(name: str) -> None:
    data = toy(studies=12, signal=4.0)
    y = (data.groups == 0).astype(np.float64)
    found = fit_predict(name, data.x, y, data.x, seed=0, groups=data.groups)
    assert np.isfinite(found).all()
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("name", QUICK)
def test_unlabeled_studies_are_judged_but_never_trained_on(name: str) -> None:
    data = toy(signal=2.0)
    unlabeled = data.groups % 5 == 0
    y = np.where(unlabeled, np.nan, data.y)
    found = across_folds(name, data, y)
    assert np.isfinite(found).all()
    moved = np.where(unlabeled[:, None], 1e3, data.x)
    again = across_folds(name, data, y, moved)
    assert again[~unlabeled].tobytes() == found[~unlabeled].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    data = toy(studies=60, signal=1.0)
    first, second = (fit_predict(name, data.x[20:], data.y[20:], data.x[:20], seed=5, groups=data.groups[20:]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_each_baseline_has_the_same_number_of_settings() -> None:
    assert SETTINGS.keys() == BASELINES.keys()
    assert {len(values) for _, values in SETTINGS.values()} == {4}


def test_what_cannot_be_judged_is_refused() -> None:
    data = toy()
    with pytest.raises(ValueError, match="'oracle' is no baseline; known are logistic regression"):
        fit_predict("oracle", data.x, data.y, data.x, seed=0, groups=data.groups)
    with pytest.raises(ValueError, match="No study of the training part has a label"):
        fit_predict("SVM", data.x, np.full(len(data.y), np.nan), data.x, seed=0, groups=data.groups)


def test_tables_hold_the_values_and_which_are_there() -> None:
    samples = [
        {"numbers": torch.tensor([1.5, 0.0]), "number_mask": torch.tensor([True, False])},
        # What lies in an absent slot is nobody's business.
        {"numbers": torch.tensor([torch.inf, -2.0]), "number_mask": torch.tensor([False, True])},
    ]
    np.testing.assert_array_equal(value_table(samples), [[1.5, np.nan], [np.nan, -2.0]])
    np.testing.assert_array_equal(missing_table(samples), [[1.0, 0.0], [0.0, 1.0]])
    assert value_table(samples).dtype == missing_table(samples).dtype == np.float64
