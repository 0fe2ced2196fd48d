"""The metrics agree with scikit-learn, an interval counts patients, and what cannot be known is said to be unknown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from models.metrics import (
    METRICS,
    RiskCoverage,
    curve_points,
    holm,
    intervals,
    is_monotone,
    judge,
    paired,
    reliability,
    risk_coverage,
    subgroups,
    weighted,
)

FloatArray = NDArray[np.float64]


def calibrated(studies: int, *, seed: int, spread: float = 2.0) -> tuple[FloatArray, FloatArray]:
    """Probabilities that are true, and labels drawn by them."""
    generator = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-spread * generator.standard_normal(studies)))
    return p, (generator.random(studies) < p).astype(float)


def test_metrics_of_a_case_small_enough_to_count_by_hand() -> None:
    found = judge([0.9, 0.8, 0.6, 0.4, 0.3, 0.1], [1, 0, 1, 1, 0, 0], threshold=0.5)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["auroc"] == pytest.approx(7 / 9)
    assert found["auprc"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.16 + 0.36 + 0.09 + 0.01) / 6)
    assert found["ece"] == pytest.approx(abs(3.1 - 3) / 6), "six studies fill one bin"


def test_a_score_at_the_threshold_is_called_positive() -> None:
    assert judge([0.5, 0.4], [1, 0], threshold=0.5)["recall"] == 1


def test_what_has_no_class_to_be_judged_by_is_nan_and_never_0() -> None:
    negatives, positives = (judge([0.2, 0.7], [label, label], threshold=0.5) for label in (0, 1))
    assert {name for name in METRICS if np.isnan(negatives[name])} == {"auroc", "auprc", "recall", "f1"}
    assert {name for name in METRICS if np.isnan(positives[name])} == {"auroc", "auprc", "specificity"}
    assert np.isnan(judge([0.2, 0.3], [0, 1], threshold=0.5)["precision"]), "nothing was called positive"
    assert all(np.isnan(value) for value in judge([0.5], [np.nan], threshold=0.5).values())
    none = intervals([0.5], [np.nan], ["a"], threshold=0.5, resamples=10)
    assert all(np.isnan(none[name]).all() for name in METRICS)


def test_studies_of_unknown_label_change_nothing() -> None:
    p, y = calibrated(60, seed=0)
    groups = np.arange(60) // 2
    more = (np.r_[p, np.nan, 0.3], np.r_[y, np.nan, np.nan])
    assert judge(*more, threshold=0.5) == judge(p, y, threshold=0.5)
    with_unknown = intervals(*more, np.r_[groups, 3, 99], threshold=0.5, resamples=50)
    assert with_unknown == intervals(p, y, groups, threshold=0.5, resamples=50)
    assert curve_points(*more) == curve_points(p, y)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([0.5, 1.5], [0, 1]), ([0.5, np.nan], [0, 1]), ([0.5, 0.6], [0, 2]), ([0.5], [0, 1]), ([[0.5], [0.6]], [0, 1])],
    ids=["no probability", "missing score", "third class", "too few", "turned"],
)
def test_scores_that_are_none_are_refused(scores: list[float], labels: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        judge(scores, labels, threshold=0.5)


studies = st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.5001, 0.9, 1.0]), st.booleans(), st.integers(0, 3))


@settings(deadline=None, max_examples=40)  # a machine may be busy
@given(st.lists(studies, min_size=1, max_size=40))
def test_the_fast_metrics_are_those_of_scikit_learn_with_sample_weights(rows: list[tuple[float, bool, int]]) -> None:
    p, y, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    fast = {name: value[0] for name, value in weighted(p, y, w[None], threshold=0.5).items()}
    drawn = w > 0
    truth, score, weight = y[drawn].astype(int), p[drawn], w[drawn]
    both, called = len(set(truth)) == 2, score >= 0.5
    if both:
        assert fast["auroc"] == pytest.approx(sk.roc_auc_score(truth, score, sample_weight=weight))
        assert fast["auprc"] == pytest.approx(sk.average_precision_score(truth, score, sample_weight=weight))
        assert fast["specificity"] == pytest.approx(sk.recall_score(truth, called, pos_label=0, sample_weight=weight))
        assert fast["recall"] == pytest.approx(sk.recall_score(truth, called, sample_weight=weight))
        assert fast["f1"] == pytest.approx(sk.f1_score(truth, called, sample_weight=weight))
    else:
        assert np.isnan([fast["auroc"], fast["auprc"]]).all()
    if called.any():
        assert fast["precision"] == pytest.approx(sk.precision_score(truth, called, sample_weight=weight))
    else:
        assert np.isnan(fast["precision"])
    if drawn.any():
        assert fast["accuracy"] == pytest.approx(sk.accuracy_score(truth, called, sample_weight=weight))
        assert fast["brier"] == pytest.approx(((score - truth) ** 2 * weight).sum() / weight.sum())


@settings(deadline=None, max_examples=40)  # a machine may be busy
@given(st.lists(studies, min_size=1, max_size=40))
def test_a_weight_of_three_is_a_study_met_three_times(rows: list[tuple[float, bool, int]]) -> None:
    p, y, w = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    fast = weighted(p, y, w[None], threshold=0.5)
    repeated = judge(np.repeat(p, w.astype(int)), np.repeat(y, w.astype(int)), threshold=0.5)
    for name in METRICS:
        assert fast[name][0] == pytest.approx(repeated[name], nan_ok=True), name


def test_calibration_error_of_known_miscalibration() -> None:
    y = np.tile([0.0, 1.0], 100)
    assert judge(np.full(200, 0.9), y, threshold=0.5)["ece"] == pytest.approx(0.4)
    assert judge(np.where(y == 1, 0.8, 0.2), y, threshold=0.5)["ece"] == pytest.approx(0.2)
    assert judge(np.full(200, 0.5), y, threshold=0.5)["ece"] == pytest.approx(0)
    p, drawn = calibrated(20_000, seed=1)
    assert judge(p, drawn, threshold=0.5)["ece"] < 0.015
    assert judge(p**2, drawn, threshold=0.5)["ece"] > 0.05


@pytest.mark.parametrize(("count", "bins"), [(9, 1), (19, 1), (20, 2), (149, 14), (150, 15), (600, 15)])
def test_bins_are_15_or_as_many_as_hold_10_studies(count: int, bins: int) -> None:
    p, y = calibrated(count, seed=2)
    found = reliability(p, y)
    assert len(found["count"]) == bins
    assert max(found["count"]) - min(found["count"]) <= 1, "of equal mass"


def test_the_reliability_curve_and_the_calibration_error_are_of_the_same_bins_in_any_order() -> None:
    p, y = calibrated(300, seed=3)
    p = p.round(1)
    order = np.random.default_rng(0).permutation(300)
    curve = {name: np.array(values) for name, values in reliability(p, y).items()}
    error = (np.abs(curve["observed"] - curve["predicted"]) * curve["count"]).sum() / 300
    assert judge(p, y, threshold=0.5)["ece"] == pytest.approx(error)
    assert judge(p[order], y[order], threshold=0.5)["ece"] == pytest.approx(error)


def test_an_interval_holds_its_value_and_is_the_same_twice() -> None:
    p, y = calibrated(120, seed=4)
    groups = [f"p{index // 2}" for index in range(120)]
    found = intervals(p, y, groups, threshold=0.4, resamples=300)
    assert {name: found[name][0] for name in METRICS} == judge(p, y, threshold=0.4)
    for name in set(METRICS) - {"ece"}:
        value, low, high = found[name]
        assert low < value < high, name
    assert found == intervals(p, y, groups, threshold=0.4, resamples=300)
    assert found != intervals(p, y, groups, threshold=0.4, resamples=300, seed=1)


def test_many_studies_of_few_patients_are_worth_no_more_than_the_patients() -> None:
    p, y = calibrated(30, seed=5)
    many_p, many_y, patient = np.repeat(p, 10), np.repeat(y, 10), np.repeat(np.arange(30), 10)
    once = intervals(p, y, np.arange(30), threshold=0.5, resamples=400)["auroc"]
    clustered = intervals(many_p, many_y, patient, threshold=0.5, resamples=400)["auroc"]
    naive = intervals(many_p, many_y, np.arange(300), threshold=0.5, resamples=400)["auroc"]
    assert clustered == pytest.approx(once)
    assert clustered[2] - clustered[1] > 2.5 * (naive[2] - naive[1])


def test_an_interval_of_95_percent_holds_the_truth_about_that_often() -> None:
    """Patients of three studies share an offset of the score: the interval has to hold all the same."""
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(60):
        y = np.repeat(generator.random(60) < 0.4, 3).astype(float)
        score = y * 1.2 + np.repeat(generator.standard_normal(60), 3)
        _, low, high = intervals(1 / (1 + np.exp(-score)), y, np.arange(180) // 3, threshold=0.5, resamples=200)["auroc"]
        held += low <= 0.8019 <= high  # Φ(1.2 / √2)
    assert 52 <= held <= 60


def test_no_resample_is_short_of_a_class_however_rare() -> None:
    y = np.zeros(200)
    y[:2] = 1
    found = intervals(np.linspace(0, 1, 200), y, np.arange(200), threshold=0.5, resamples=200)
    assert not np.isnan(found["auroc"]).any()


def test_an_interval_is_not_made_of_the_easy_resamples_only() -> None:
    """One study is called positive: a third of the resamples miss it, and their precision is undefined."""
    p, y = np.r_[0.9, np.full(39, 0.1)], np.r_[np.ones(20), np.zeros(20)]
    value, low, high = intervals(p, y, np.arange(40), threshold=0.5, resamples=200)["precision"]
    assert value == 1
    assert np.isnan([low, high]).all()


def test_repeats_are_judged_one_by_one_and_averaged() -> None:
    p, y = calibrated(80, seed=7)
    other = np.random.default_rng(0).random(80)
    groups = np.arange(80)
    found = intervals(np.stack([p, other]), y, groups, threshold=0.5, resamples=100)
    single = [judge(score, y, threshold=0.5) for score in (p, other)]
    assert found["auroc"][0] == pytest.approx(np.mean([each["auroc"] for each in single]))
    twice = intervals(np.stack([p, p]), y, groups, threshold=0.5, resamples=100)
    once = intervals(p, y, groups, threshold=0.5, resamples=100)
    for name in METRICS:
        assert twice[name] == pytest.approx(once[name]), "the same predictions twice are no second opinion"


def test_a_model_does_not_differ_from_itself_and_a_better_one_does() -> None:
    p, y = calibrated(200, seed=8)
    worse = np.clip(p + np.random.default_rng(0).normal(0, 0.4, 200), 0, 1)
    groups = np.arange(200) // 2
    assert paired(p, p, y, groups, resamples=200) == (0, 0, 0, 1)
    value, low, high, p_value = paired(p, worse, y, groups, resamples=400)
    assert value == pytest.approx(sk.roc_auc_score(y, p) - sk.roc_auc_score(y, worse))
    assert 0 < low < value < high
    assert p_value == pytest.approx(2 / 401), "never 0, for resamples are counted"
    turned = paired(worse, p, y, groups, resamples=400)
    assert turned == pytest.approx((-value, -high, -low, p_value))
    brier = paired(worse, p, y, groups, metric="brier", resamples=100)[0]
    assert brier == pytest.approx(sk.brier_score_loss(y, worse) - sk.brier_score_loss(y, p))


def test_a_paired_difference_is_surer_than_the_difference_of_two_intervals() -> None:
    p, y = calibrated(200, seed=9, spread=1)
    near = np.clip(p + np.random.default_rng(0).normal(0, 0.05, 200), 0, 1)
    groups = np.arange(200)
    _, low, high, _ = paired(p, near, y, groups, resamples=300)
    _, alone_low, alone_high = intervals(p, y, groups, threshold=0.5, resamples=300)["auroc"]
    assert high - low < 0.5 * (alone_high - alone_low)


def test_equal_models_are_seldom_told_apart() -> None:
    generator = np.random.default_rng(10)
    found = []
    for _ in range(30):
        p, y = calibrated(60, seed=int(generator.integers(1 << 30)))
        a, b = (np.clip(p + generator.normal(0, 0.2, 60), 0, 1) for _ in range(2))
        found.append(paired(a, b, y, np.arange(60), resamples=100)[3])
    assert np.mean(np.array(found) < 0.05) <= 0.15
    assert 0.3 < np.mean(found) < 0.7


def test_a_difference_that_hangs_on_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="'recall'"):
        paired([0.1, 0.9], [0.2, 0.8], [0, 1], [0, 1], metric="recall")


def test_holm_of_a_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, np.nan, 0.6]) == pytest.approx([1, np.nan, 1], nan_ok=True)
    assert holm([]).size == 0


def test_the_area_under_the_points_is_the_metric() -> None:
    p, y = calibrated(150, seed=11)
    p = p.round(2)
    points = curve_points(p, y)
    found = judge(p, y, threshold=0.5)
    assert sk.auc(points["roc"]["x"], points["roc"]["y"]) == pytest.approx(found["auroc"])
    recall, precision = np.array(points["pr"]["x"]), np.array(points["pr"]["y"])
    assert -(np.diff(recall) * precision[:-1]).sum() == pytest.approx(found["auprc"])
    assert curve_points(p, np.ones(150)) == {"roc": {"x": [], "y": []}, "pr": {"x": [], "y": []}}


def test_risk_falls_with_confidence_where_it_should() -> None:
    curve = risk_coverage([0.95, 0.1, 0.6, 0.45], [1, 0, 0, 0])
    assert curve.coverage == [0.25, 0.5, 0.75, 1]
    assert curve.risk == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert curve.area == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    tied = risk_coverage([0.75, 0.25, 0.75, 0.5], [1, 1, 1, 1])
    assert tied.coverage == [0.75, 1], "equal confidence enters together"
    assert tied.area == pytest.approx(0.75 / 3 + 0.25 / 4)
    assert np.isnan(risk_coverage([0.5], [np.nan]).area)


def test_abstention_is_claimed_of_calibrated_confidence_only() -> None:
    p, y = calibrated(2000, seed=12)
    assert is_monotone(risk_coverage(p, y))
    assert is_monotone(risk_coverage(y, y)), "no errors: nothing to lose"
    # Most confident where most often wrong.
    assert not is_monotone(risk_coverage(np.where(p >= 0.5, 1.5 - p, 0.5 - p), y))
    constant = np.full(2000, 0.3)
    assert not is_monotone(risk_coverage(constant, y)), "no confidence at all gains nothing"


def test_abstention_can_help_on_the_whole_and_harm_the_positives() -> None:
    """A rare finding, low probabilities: the surest errors are the positives."""
    generator = np.random.default_rng(13)
    p = generator.beta(1, 6, 4000)
    y = (generator.random(4000) < p).astype(float)
    assert is_monotone(risk_coverage(p, y))
    assert not is_monotone(risk_coverage(p[y == 1], y[y == 1]))


def test_the_rule_of_monotony_at_its_edges() -> None:
    coverage = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]

    def curve(*risk: float, studies: int = 40) -> RiskCoverage:
        return RiskCoverage(coverage, list(risk), 0.0, studies)

    assert is_monotone(curve(0.1, 0.12, 0.14, 0.16, 0.18, 0.2))
    assert not is_monotone(curve(0.1, 0.12, 0.14, 0.16, 0.18, 0.2, studies=39))
    assert is_monotone(curve(0.1, 0.12, 0.14, 0.199, 0.18, 0.2)), "a bump within the tolerance"
    assert not is_monotone(curve(0.1, 0.12, 0.14, 0.201, 0.18, 0.2))
    assert not is_monotone(curve(0.2, 0.2, 0.2, 0.2, 0.2, 0.2)), "no gain"


@pytest.mark.parametrize(
    ("patients", "positives", "judged"), [(20, 5, True), (19, 5, False), (20, 4, False), (20, 15, True), (20, 16, False)]
)
def test_a_subgroup_too_small_is_counted_and_not_judged(patients: int, positives: int, *, judged: bool) -> None:
    """Two studies each: what counts is patients."""
    y = np.repeat(np.arange(patients) < positives, 2).astype(float)
    p = np.linspace(0.9, 0.1, 2 * patients)
    groups = [f"p{index // 2}" for index in range(2 * patients)]
    both = subgroups(
        np.r_[p, 0.5, 0.5], np.r_[y, 1, np.nan], [*groups, "q", "r"], ["F"] * (2 * patients) + ["M", "M"], threshold=0.5, resamples=50
    )
    assert (both["F"].studies, both["F"].patients, both["F"].positives) == (2 * patients, patients, 2 * positives)
    assert (both["M"].studies, both["M"].patients, both["M"].metrics) == (1, 1, None)
    if judged:
        assert both["F"].metrics == intervals(p, y, groups, threshold=0.5, resamples=50)
    else:
        assert both["F"].metrics is None
