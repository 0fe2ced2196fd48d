"""A probability is made to mean what it says, the verdicts keep their promise, and a study like no other is noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save
from sklearn.covariance import LedoitWolf

from models.calibration import Triage, covered, fit_atypical, fit_temperature, triage

FloatArray = NDArray[np.float64]


def draw(positives: int, negatives: int, generator: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Probabilities of overlapping classes: of a positive √U, of a negative 1 - √U, so that both chances are known."""
    p = np.sqrt(generator.random(positives + negatives))
    y = np.r_[np.ones(positives), np.zeros(negatives)]
    return np.where(y == 1, p, 1 - p), y


def test_an_overconfident_network_is_cooled_and_a_calibrated_one_left_alone() -> None:
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal(20_000)
    labels = (generator.random(20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.15)
    assert fit_temperature(logits / 4, labels) == 0.5, "not below the bound"
    unknown = np.r_[labels, np.full(100, np.nan)]
    assert fit_temperature(np.r_[3 * logits, np.full(100, 50.0)], unknown) == fit_temperature(3 * logits, labels)


def test_a_temperature_of_one_class_or_of_no_error_is_not_believed() -> None:
    assert fit_temperature([1.0, -1.0], [1, 1]) == 1
    assert fit_temperature([], []) == 1
    assert fit_temperature([900.0, -900.0, 800.0], [1, 0, 1]) == 0.5
    assert fit_temperature([-900.0, 900.0], [1, 0]) == 8
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature([np.inf, 0.0], [1, 0])


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 19), (0.1, 9), (0.2, 4), (0.3, 3), (0.01, 99), (1 / 49, 48)])
def test_a_guarantee_is_refused_below_the_patients_it_needs_and_given_from_there(alpha: float, needed: int) -> None:
    generator = np.random.default_rng(0)
    for positives, negatives in ((needed - 1, 200), (200, needed - 1)):
        few = triage(*draw(positives, negatives, generator), alpha=alpha)
        assert f"needs {needed} of each" in few.refused
        assert (few.positives, few.negatives) == (positives, negatives)
        assert np.isnan(few.call([0.0, 0.5, 1.0])).all(), "everything is uncertain"
    p, y = draw(needed, needed, generator)
    enough = triage(p, y, alpha=alpha)
    assert not enough.refused
    assert p[y == 1].min() in (enough.threshold, enough.negative_below), "of so few, the least is the quantile"


def test_studies_of_one_patient_count_once_towards_the_guarantee() -> None:
    p, y = draw(40, 40, np.random.default_rng(1))
    few = triage(p, y, alpha=0.05, groups=np.arange(80) % 18)
    assert (few.positives, few.negatives) == (18, 18)
    assert "18 positive and 18 negative patients" in few.refused
    assert not triage(p, y, alpha=0.05, groups=np.arange(80) % 19).refused
    assert not triage(p, y, alpha=0.05).refused


def test_thresholds_of_overlapping_and_of_parted_classes_by_hand() -> None:
    overlap = triage([0.3, 0.6, 0.7, 0.8, 0.9, 0.1, 0.2, 0.25, 0.4, 0.5], [1] * 5 + [0] * 5, alpha=0.2)
    assert overlap.negative_below == 0.3
    assert overlap.call([0.29, 0.3, 0.5, 0.51]) == pytest.approx([0, np.nan, np.nan, 1], nan_ok=True)
    gap = triage([0.6, 0.7, 0.8, 0.9, 0.1, 0.2, 0.3, 0.4], [1] * 4 + [0] * 4, alpha=0.2)
    assert gap.threshold == 0.6
    assert gap.call([0.4, 0.41, 0.59, 0.6, np.nan]) == pytest.approx([0, np.nan, np.nan, 1, np.nan], nan_ok=True)
    assert overlap.alpha == 0.2


@settings(deadline=None)  # a machine may be busy
@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=30),
    st.lists(st.integers(0, 20), min_size=4, max_size=30),
    st.sampled_from([0.2, 0.25, 0.4]),
)
def test_the_two_thresholds_say_what_the_sets_say(positives: list[int], negatives: list[int], alpha: float) -> None:
    """A set holds each label of which (1 - alpha)(n + 1) calibration studies or fewer conform better: counted, not sorted."""
    p = np.array(positives + negatives) / 20
    y = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    found = triage(p, y, alpha=alpha)

    def holds(new: float, label: int) -> bool:
        mine = np.abs(label - p[y == label])
        return bool((mine >= abs(label - new)).sum() + 1 > alpha * (len(mine) + 1) + 1e-9)

    for new in np.arange(21) / 20:
        said = {(True, False): 1.0, (False, True): 0.0}.get((holds(new, 1), holds(new, 0)), np.nan)
        if found.refused:
            assert "probability of 1" in found.refused
            assert new < 1 or np.isnan(said) or said == 0
        else:
            assert found.call(new) == pytest.approx(said, nan_ok=True)


def naive(p: FloatArray, y: FloatArray, *, alpha: float) -> Triage:
    """The quantile everybody writes first, without the new study's own place among n + 1."""
    low, high = np.quantile(p[y == 1], alpha, method="higher"), np.quantile(p[y == 0], 1 - alpha, method="lower")
    return Triage(alpha, max(low, high), min(low, high), int(y.sum()), int((1 - y).sum()))


def broken_promises(how: Callable[..., Triage], positives: int, negatives: int, alpha: float) -> tuple[float, float]:
    """Mean over 2,000 calibration sets of the exact chances that a positive is called negative, a negative positive."""
    generator = np.random.default_rng(2)
    lost = []
    for _ in range(2000):
        found = how(*draw(positives, negatives, generator), alpha=alpha)
        # P(√U < t) = t², and the mirror of it.
        lost.append((found.negative_below**2, (1 - found.threshold) ** 2))
    first, second = np.mean(lost, axis=0)
    return float(first), float(second)


@pytest.mark.parametrize(("positives", "negatives", "alpha"), [(19, 60, 0.05), (30, 300, 0.1), (13, 14, 0.2)])
def test_the_promise_holds_on_average_for_either_class(positives: int, negatives: int, alpha: float) -> None:
    for lost in broken_promises(triage, positives, negatives, alpha):
        assert lost <= alpha + 0.004, "2,000 draws know the mean to 0.0015"
    # And is not kept by calling everything uncertain: n = 19 at 0.05 is exact.
    if alpha == 0.05:
        assert broken_promises(triage, positives, negatives, alpha)[0] == pytest.approx(0.05, abs=0.004)


def test_a_quantile_without_the_new_study_breaks_the_promise() -> None:
    """The test above can fail."""
    assert broken_promises(naive, 30, 30, 0.1)[0] > 0.115


def test_patients_with_many_easy_studies_do_not_pay_for_those_with_one_hard_one() -> None:
    """One patient in five is hard and has one study; the others have eight easy ones. New: a patient, then one study."""
    generator = np.random.default_rng(3)

    def cohort(patients: int) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
        hard = generator.random(patients) < 0.2
        count = np.where(hard, 1, 8)
        of = np.repeat(np.arange(patients), count)
        y = np.repeat(np.arange(patients) % 2, count).astype(float)
        p = np.where(hard[of], 0.5, 0.75) + 0.25 * generator.random(len(of))
        return np.where(y == 1, p, 1 - p), y, of

    lost: dict[str, list[float]] = {"patients": [], "studies": []}
    for _ in range(300):
        p, y, of = cohort(80)
        for how, found in (("patients", triage(p, y, alpha=0.1, groups=of)), ("studies", triage(p, y, alpha=0.1))):
            # Exact: a hard positive lies evenly in [0.5, 0.75], an easy one in [0.75, 1]. Classes part, so p >= a is coverage.
            lowest = found.threshold
            lost[how].append(0.2 * np.clip((lowest - 0.5) / 0.25, 0, 1) + 0.8 * np.clip((lowest - 0.75) / 0.25, 0, 1))
    assert np.mean(lost["patients"]) <= 0.1 + 0.01
    assert np.mean(lost["studies"]) > 0.15


def test_coverage_counts_what_was_not_called_the_other() -> None:
    found = Triage(alpha=0.1, threshold=0.7, negative_below=0.3, positives=20, negatives=20)
    p, y = [0.9, 0.5, 0.2, 0.1, 0.8, 0.4, np.nan], [1, 1, 1, 0, 0, np.nan, np.nan]
    share = covered(found, p, y)
    assert dataclasses.astuple(share) == pytest.approx((2 / 3, 1 / 2, 1 / 5))
    by_patient = covered(found, p, y, groups=["a", "a", "b", "b", "c", "c", "c"])
    assert dataclasses.astuple(by_patient) == pytest.approx((1 / 2, 1 / 2, (1 / 2 + 0 + 0) / 3))
    assert np.isnan(covered(found, [0.9], [1]).negative)
    refused = covered(triage([0.9, 0.1], [1, 0], alpha=0.1), p, y)
    assert dataclasses.astuple(refused) == (1, 1, 1)


def test_coverage_on_new_patients_is_about_what_was_promised() -> None:
    generator = np.random.default_rng(4)
    found = triage(*draw(400, 400, generator), alpha=0.1)
    share = covered(found, *draw(20_000, 20_000, generator))
    assert share.positive == pytest.approx(0.9, abs=0.04)
    assert share.negative == pytest.approx(0.9, abs=0.04)
    assert 0.1 < share.uncertain < 0.9


def test_a_network_that_is_certain_of_the_wrong_is_refused_a_verdict() -> None:
    found = triage([1.0] * 10 + [1.0] * 10, [1] * 10 + [0] * 10, alpha=0.1)
    assert "probability of 1" in found.refused


@pytest.mark.parametrize(
    ("p", "y", "alpha"), [([0.5], [1], 0.0), ([0.5], [1], 1.0), ([1.5], [1], 0.1), ([0.5], [2], 0.1), ([0.5, 0.5], [1], 0.1)]
)
def test_what_is_no_calibration_set_is_refused_with_a_sentence(p: list[float], y: list[float], alpha: float) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        triage(p, y, alpha=alpha)


def test_distance_is_of_mahalanobis_on_the_shrunk_covariance() -> None:
    generator = np.random.default_rng(5)
    known = generator.standard_normal((200, 4)) @ generator.standard_normal((4, 4))
    new = generator.standard_normal((7, 4))
    found = fit_atypical(known)
    reference = LedoitWolf().fit(known).mahalanobis(new)
    assert found.distance(new) == pytest.approx(np.sqrt(reference), rel=1e-5)
    assert found.distance(new[0]) == pytest.approx(np.sqrt(reference[0]), rel=1e-5)
    assert fit_atypical(known, shrinkage=1.0).distance(new) == pytest.approx(
        np.linalg.norm(new - known.mean(0), axis=1) / np.sqrt(known.var(0).mean()), rel=1e-5
    )


def test_few_typical_studies_and_all_far_ones_lie_beyond_the_limit() -> None:
    """Also with more dimensions than studies, where distances of the studies fitted on would put the limit far too near."""
    generator = np.random.default_rng(6)
    for studies, width in ((400, 8), (100, 64), (100, 150)):
        mix = generator.standard_normal((width, width))
        known, new = generator.standard_normal((studies, width)) @ mix, generator.standard_normal((4000, width)) @ mix
        found = fit_atypical(known)
        assert found.is_atypical(new).mean() < 0.04
        assert found.is_atypical(new * 8).mean() > 0.95
    own = found.distance(known)
    assert (found.distance(new) > np.quantile(own, 0.99)).mean() > 0.2, "the limit that was not taken"


def test_the_limit_is_held_out_by_patient() -> None:
    """Five nearly equal studies of each patient: with four of them fitted on, the fifth looks near."""
    generator = np.random.default_rng(7)
    patients = generator.standard_normal((40, 60))
    known = np.repeat(patients, 5, axis=0) + 0.01 * generator.standard_normal((200, 60))
    new = generator.standard_normal((2000, 60))
    by_patient, by_study = fit_atypical(known, groups=np.arange(200) // 5), fit_atypical(known)
    assert by_patient.is_atypical(new).mean() < 0.1
    assert by_study.is_atypical(new).mean() > 0.3


def test_what_is_kept_beside_the_weights_comes_back_the_same() -> None:
    generator = np.random.default_rng(8)
    found = fit_atypical(generator.standard_normal((50, 6)))
    back = load(save({"mean": found.mean, "precision": found.precision, "limit": np.array([found.limit], dtype=np.float32)}))
    again = dataclasses.replace(found, mean=back["mean"], precision=back["precision"], limit=float(back["limit"][0]))
    new = generator.standard_normal((20, 6))
    assert again.limit == found.limit
    assert (again.distance(new) == found.distance(new)).all()


def test_an_embedding_that_is_no_number_is_atypical() -> None:
    found = fit_atypical(np.random.default_rng(9).standard_normal((30, 3)))
    assert found.is_atypical([np.nan, 0.0, 0.0])
    assert found.is_atypical(np.diag([1e6, 0, 0])[:2]).tolist() == [True, False]


def test_embeddings_nothing_can_be_learned_from_are_refused() -> None:
    varied = np.random.default_rng(10).standard_normal((30, 3))
    with pytest.raises(ValueError, match="9 patients"):
        fit_atypical(varied, groups=np.arange(30) % 9)
    with pytest.raises(ValueError, match="not finite"):
        fit_atypical(np.where(varied > 2, np.inf, varied) if (varied > 2).any() else np.full((30, 3), np.inf))
    with pytest.raises(ValueError, match="do not vary"):
        fit_atypical(np.ones((30, 3)))
    with pytest.raises(ValueError, match="same studies"):
        fit_atypical(varied, groups=np.arange(29))
