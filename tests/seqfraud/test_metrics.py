"""Metrics against scikit-learn, against slow references, and on cases done by hand."""

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn import metrics as reference  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from seqfraud import metrics
from seqfraud.errors import DataError

Array = NDArray[Any]

DAY_MS = 86_400_000


def random_rows(seed: int, rows: int = 600, levels: int | None = 40) -> tuple[Array, Array]:
    """Labels and informative scores in 0..1, tied where there are but few `levels`."""
    random = np.random.default_rng(seed)
    label = random.random(rows) < 0.15
    score = 1 / (1 + np.exp(-(random.normal(size=rows) + 1.5 * label - 1)))
    if levels is not None:
        score = np.round(score * levels) / levels
    return label.astype(np.int64), score


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[Array, Array]:
    """Few rows of even fewer distinct scores."""
    rows = draw(st.integers(1, 30))
    label = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 1)))
    score = draw(hnp.arrays(np.int64, rows, elements=st.integers(-4, 4)))
    return label, score.astype(np.float64)


# --- Ranking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 40, 3, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ranking_metrics_equal_scikit_learn(seed: int, levels: int | None, weighted: bool) -> None:
    label, score = random_rows(seed, levels=levels)
    weight = np.random.default_rng(seed).gamma(1.0, size=len(label)) if weighted else None
    assert metrics.average_precision(label, score, weight) == pytest.approx(
        reference.average_precision_score(label, score, sample_weight=weight), abs=1e-12
    )
    assert metrics.roc_auc(label, score, weight) == pytest.approx(
        reference.roc_auc_score(label, score, sample_weight=weight), abs=1e-12
    )
    fpr, tpr, _ = reference.roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
    for limit in (0.0, 0.01, 0.2, 1.0):
        # The reference adds weights up in another order: allow its last digits at the limit.
        expected = tpr[fpr <= limit + 1e-12].max()
        assert metrics.recall_at_fpr(label, score, limit, weight) == pytest.approx(expected)


def test_a_false_positive_rate_at_exactly_the_limit_is_allowed() -> None:
    # 0.29 * 100 is 28.999... in floats: comparing counts instead of rates would lose the 29th.
    label = np.array([0] * 29 + [1] + [0] * 71)
    assert metrics.recall_at_fpr(label, -np.arange(101.0), 0.29) == 1.0
    assert metrics.recall_at_fpr(label, -np.arange(101.0), 0.28) == 0.0


@given(tied_rows())
def test_average_precision_and_auc_ignore_a_strictly_monotone_map(
    rows: tuple[Array, Array],
) -> None:
    label, score = rows
    mapped = np.exp(score / 3) - 7
    assert metrics.average_precision(label, mapped) == metrics.average_precision(label, score)
    assert metrics.roc_auc(label, mapped) == metrics.roc_auc(label, score)


@given(tied_rows(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: tuple[Array, Array], random: Any) -> None:
    label, score = rows
    order = list(range(len(label)))
    random.shuffle(order)
    assert metrics.average_precision(label[order], score[order]) == metrics.average_precision(label, score)
    assert metrics.recall_at_fpr(label[order], score[order], 0.3) == metrics.recall_at_fpr(label, score, 0.3)


@given(tied_rows(), st.data())
def test_a_whole_weight_is_the_row_repeated(rows: tuple[Array, Array], data: st.DataObject) -> None:
    label, score = rows
    weight = data.draw(hnp.arrays(np.int64, len(label), elements=st.integers(0, 3)))
    repeated_label, repeated_score = np.repeat(label, weight), np.repeat(score, weight)
    for metric in (metrics.average_precision, metrics.roc_auc, metrics.recall_at_fpr):
        assert metric(label, score, weight=weight) == metric(repeated_label, repeated_score)
    p, repeated_p = (score + 4) / 8, (repeated_score + 4) / 8
    for loss in (metrics.log_loss, metrics.brier):
        assert loss(label, p, weight) == pytest.approx(loss(repeated_label, repeated_p))


@given(tied_rows())
def test_reversed_scores_mirror_the_auc(rows: tuple[Array, Array]) -> None:
    label, score = rows
    auc, mirrored = metrics.roc_auc(label, score), metrics.roc_auc(label, -score)
    assert (auc is None) == (mirrored is None) == (label.min() == label.max())
    if auc is not None and mirrored is not None:
        assert auc + mirrored == pytest.approx(1.0)


def test_fractional_weights_leave_no_ghost_of_an_honest_row() -> None:
    # 0.1 + 0.2 - 0.3 is not 0: honest weight found by subtraction would make an AUC of nothing.
    label, score = [1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5]
    assert metrics.roc_auc(label, score, [0.1, 0.2, 0.3, 0.0]) is None


def test_infinite_scores_rank_like_others() -> None:
    assert metrics.roc_auc([1, 0, 0], [np.inf, 0.0, -np.inf]) == 1.0


def test_precision_recall_curve_is_scikit_learns_where_recall_rises() -> None:
    label, score = random_rows(1)
    curve = metrics.precision_recall_curve(label, score, points=1000)
    assert curve is not None
    precision, recall, threshold = reference.precision_recall_curve(label, score)
    of_threshold = {t: (p, r) for p, r, t in zip(precision, recall, threshold, strict=False)}
    for t, p, r in zip(curve.threshold, curve.precision, curve.recall, strict=True):
        assert (p, r) == pytest.approx(of_threshold[t])
    area = (np.diff(curve.recall, prepend=0) * curve.precision).sum()
    assert area == pytest.approx(metrics.average_precision(label, score))


def test_precision_recall_curve_is_reduced_and_keeps_its_ends() -> None:
    label, score = random_rows(2, rows=5000, levels=None)
    full = metrics.precision_recall_curve(label, score, points=10**5)
    few = metrics.precision_recall_curve(label, score, points=50)
    assert full is not None and few is not None
    assert len(full.recall) == label.sum() and len(few.recall) <= 50
    assert (few.recall[0], few.recall[-1]) == (full.recall[0], 1.0)
    assert np.diff(few.recall).max() < 0.03
    assert np.all(np.diff(few.threshold) < 0)


# --- Probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_scikit_learn(seed: int) -> None:
    label, p = random_rows(seed)
    p[:3] = 0.0, 1.0, 1.0  # certainties, right and wrong
    label[:3] = 0, 1, 0
    assert metrics.log_loss(label, p) == pytest.approx(reference.log_loss(label, p))
    assert metrics.brier(label, p) == pytest.approx(reference.brier_score_loss(label, p))


@pytest.mark.parametrize("seed", range(4))
def test_calibration_slope_equals_scikit_learns_regression(seed: int) -> None:
    label, p = random_rows(seed, rows=3000, levels=None)
    p = p ** (1 + seed)
    logit = np.log(p / (1 - p))[:, None]
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit, label)
    fit = metrics.calibration_slope(label, p)
    assert fit is not None
    assert fit.slope == pytest.approx(model.coef_[0, 0], rel=1e-5)
    assert fit.intercept == pytest.approx(model.intercept_[0], rel=1e-5, abs=1e-5)


def test_calibration_slope_recovers_a_known_distortion() -> None:
    random = np.random.default_rng(3)
    logit = random.normal(-4, 2, size=400_000)
    label = random.random(len(logit)) < 1 / (1 + np.exp(-logit))
    fit = metrics.calibration_slope(label, 1 / (1 + np.exp(-(2 * logit + 1))))
    assert fit is not None
    assert fit.slope == pytest.approx(0.5, abs=0.01)
    assert fit.intercept == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize(
    ("label", "probability"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]),  # apart
        ([0, 1, 0, 1], [0.1, 0.2, 0.2, 0.4]),  # touching
        ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]),  # apart the wrong way round
        ([0, 1, 0, 1], [0.3, 0.3, 0.3, 0.3]),  # constant
        ([0, 0], [0.3, 0.4]),
        ([1, 1], [0.3, 0.4]),
        ([], []),
    ],
)
def test_no_calibration_slope_where_no_finite_one_exists(label: list[int], probability: list[float]) -> None:
    assert metrics.calibration_slope(label, probability) is None


@settings(deadline=None)
@given(st.data(), st.integers(2, 40))
def test_calibration_slope_is_the_maximum_or_none(data: st.DataObject, rows: int) -> None:
    label = data.draw(hnp.arrays(np.bool_, rows))
    p = data.draw(hnp.arrays(np.float64, rows, elements=st.floats(0, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = metrics.calibration_slope(label, p)
    if fit is None:
        return
    cut = np.clip(p, metrics.LOGIT_LIMIT, 1 - metrics.LOGIT_LIMIT)
    logit = np.log(cut) - np.log1p(-cut)

    def loss(intercept: float, slope: float) -> float:
        z = intercept + slope * logit
        return float((np.logaddexp(0, z) - label * z).sum())

    best = loss(fit.intercept, fit.slope)
    for d_intercept, d_slope in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)]:
        assert best <= loss(fit.intercept + d_intercept, fit.slope + d_slope) + 1e-9


def test_calibration_bins_hold_equal_mass_and_every_row() -> None:
    label, p = random_rows(4, rows=1000, levels=None)
    bins = metrics.calibration_bins(label, p, bins=8)
    assert [part.count for part in bins] == [125] * 8
    for part, rows in zip(bins, np.array_split(np.argsort(p), 8), strict=True):
        assert part.mean_probability == pytest.approx(p[rows].mean())
        assert part.observed_rate == pytest.approx(label[rows].mean())


def test_calibration_bins_never_split_a_tie() -> None:
    p = np.array([0.1] * 7 + [0.2] * 2 + [0.9])
    label = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 1])
    bins = metrics.calibration_bins(label, p, bins=5)
    assert [part.count for part in bins] == [7, 3]
    assert bins[0].observed_rate == pytest.approx(1 / 7)
    assert metrics.calibration_bins(label[::-1], p[::-1], bins=5) == bins


def test_calibration_bins_of_the_top_take_the_highest_share_and_its_ties() -> None:
    p = np.arange(1000) / 1000
    label = p > 0.5
    bins = metrics.calibration_bins(label, p, bins=2, top=0.01)
    assert [part.count for part in bins] == [5, 5]
    assert bins[0].mean_probability == pytest.approx(0.992)
    tied = np.where(p >= 0.98, 0.98, p)
    (only,) = metrics.calibration_bins(label, tied, bins=2, top=0.01)
    assert only.count == 20


def test_expected_calibration_error_by_hand() -> None:
    p = np.array([0.2] * 5 + [0.6] * 5)
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    assert metrics.expected_calibration_error(label, p, bins=2) == pytest.approx(0.1)
    assert metrics.expected_calibration_error(label, p, bins=2, top=0.5) == pytest.approx(0.2)


# --- Alerts ---------------------------------------------------------------------------------------


def test_card_precision_drops_a_user_detected_on_an_earlier_day() -> None:
    rows = [
        # day, user, score, fraud
        (0, "a", 0.9, 1),  # detected on day 0
        (0, "b", 0.8, 0),
        (0, "c", 0.7, 1),  # third: not shown, so not detected
        (1, "a", 0.9, 1),  # known: makes room for d
        (1, "c", 0.6, 1),
        (1, "d", 0.5, 0),
    ]
    day, user, score, label = (list(column) for column in zip(*rows, strict=True))
    assert metrics.card_precision_at_k(label, score, user, day, k=2) == pytest.approx(0.5)
    # Without a's detection day 1 would show a and c, two hits.
    assert metrics.card_precision_at_k(label[3:], score[3:], user[3:], day[3:], k=2) == 1.0


def test_card_precision_takes_a_users_highest_score_and_label() -> None:
    # The score of a's honest row finds a; its fraud makes it a hit.
    label, score, user = [0, 1, 0, 0], [0.9, 0.1, 0.5, 0.4], [7, 7, 8, 9]
    assert metrics.card_precision_at_k(label, score, user, [0] * 4, k=1) == 1.0
    assert metrics.card_precision_at_k(label, score, user, [0] * 4, k=2) == 0.5


def test_card_precision_divides_by_k_on_a_short_day_like_the_handbook() -> None:
    assert metrics.card_precision_at_k([1, 0], [0.9, 0.1], [1, 2], [0, 0], k=100) == 0.01


def test_card_precision_with_ties_does_not_look_at_the_label_or_the_row_order() -> None:
    assert metrics.card_precision_at_k([1, 0], [0.5, 0.5], [1, 2], [0, 0], k=1) == 1.0
    assert metrics.card_precision_at_k([0, 1], [0.5, 0.5], [2, 1], [0, 0], k=1) == 1.0
    assert metrics.card_precision_at_k([0, 1], [0.5, 0.5], [1, 2], [0, 0], k=1) == 0.0


def slow_card_precision(label: Array, score: Array, user: Array, day: Array, k: int) -> float:
    detected: set[Any] = set()
    precisions = []
    for today in sorted(set(day.tolist())):
        best: dict[Any, tuple[float, int]] = {}
        for y, s, u, d in zip(label, score, user, day, strict=True):
            if d == today and u not in detected:
                before = best.get(u, (-np.inf, 0))
                best[u] = (max(before[0], s), max(before[1], y))
        shown = sorted(best, key=lambda u: -best[u][0])[:k]
        hits = [u for u in shown if best[u][1]]
        precisions.append(len(hits) / k)
        detected.update(hits)
    return float(np.mean(precisions))


@pytest.mark.parametrize("seed", range(5))
def test_card_precision_equals_the_protocol_written_out(seed: int) -> None:
    label, score = random_rows(seed, rows=800, levels=None)
    random = np.random.default_rng(seed)
    number, day = random.integers(0, 60, 800), random.integers(17, 24, 800)
    names = np.array([f"user {n}" for n in number], dtype=object)
    expected = slow_card_precision(label, score, number, day, 10)
    assert metrics.card_precision_at_k(label, score, number, day, k=10) == pytest.approx(expected)
    assert metrics.card_precision_at_k(label, score, names, day, k=10) == pytest.approx(expected)


def test_money_caught_by_hand() -> None:
    day = [0, 0, 0, 1, 1, 1, 2]
    score = [0.9, 0.8, 0.1, 0.9, 0.8, 0.7, 0.9]
    label = [1, 0, 1, 0, 1, 1, 0]
    amount = [30.0, 500.0, 10.0, 500.0, 60.0, 100.0, 70.0]
    caught = metrics.money_caught(label, score, amount, day, alerts_per_day=2)
    assert caught is not None
    # 30 of 40, 60 of 160; day 2 has no fraud money.
    assert caught.mean == pytest.approx((0.75 + 0.375) / 2)
    assert caught.total == pytest.approx(90 / 200)
    assert caught.days == 2
    precision = metrics.precision_at_budget(label, score, day, alerts_per_day=2)
    assert precision is not None
    assert precision.mean == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert precision.total == pytest.approx(2 / 5)


def test_a_tie_at_the_end_of_the_budget_counts_in_part() -> None:
    label, score, amount = [1, 1, 0, 0], [0.9, 0.5, 0.5, 0.5], [10.0, 30.0, 1.0, 1.0]
    caught = metrics.money_caught(label, score, amount, [0] * 4, alerts_per_day=2)
    precision = metrics.precision_at_budget(label, score, [0] * 4, alerts_per_day=2)
    assert caught is not None and precision is not None
    assert caught.total == pytest.approx((10 + 30 / 3) / 40)
    assert precision.total == pytest.approx((1 + 1 / 3) / 2)


def test_an_alert_share_is_taken_of_each_day() -> None:
    day = np.repeat([0, 1], [100, 10])
    score = np.arange(110.0)
    label = np.isin(np.arange(110), [99, 98, 109, 100])
    precision = metrics.precision_at_budget(label, score, day, alert_share=0.02)
    assert precision is not None
    assert precision.total == pytest.approx(3 / 3)  # two of day 0, at least one of day 1
    money = metrics.money_caught(label, score, np.ones(110), day, alert_share=0.02)
    assert money is not None
    assert money.mean == pytest.approx((1 + 0.5) / 2)


def test_a_refund_is_no_money_to_be_saved() -> None:
    caught = metrics.money_caught([1, 1], [0.9, 0.1], [-50.0, 10.0], [0, 0], alerts_per_day=1)
    assert caught is not None and caught.total == 0.0


# --- Bootstrap ------------------------------------------------------------------------------------

METRICS: dict[metrics.MetricName, Callable[[Array, Array], float | None]] = {
    "average_precision": metrics.average_precision,
    "roc_auc": metrics.roc_auc,
    "recall_at_1pct_fpr": metrics.recall_at_fpr,
    "log_loss": metrics.log_loss,
    "brier": metrics.brier,
}


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_equals_copying_the_rows_of_the_drawn_groups(metric: metrics.MetricName) -> None:
    label, score = random_rows(5, rows=300)
    group = np.random.default_rng(5).integers(0, 40, 300)
    found = metrics.bootstrap_interval(metric, label, score, group, rounds=30, seed=9, level=0.8)
    names = np.unique(group)
    random = np.random.default_rng(9)
    values: list[Any] = []
    for _ in range(30):
        drawn = names[random.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(group == name) for name in drawn])
        values.append(METRICS[metric](label[rows], score[rows]))
    assert found is not None
    assert found.estimate == pytest.approx(METRICS[metric](label, score))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])))
    assert found.rounds == 30


def test_bootstrap_is_repeatable_and_follows_its_seed() -> None:
    label, score = random_rows(6)
    group = np.array([f"user {n}" for n in np.random.default_rng(6).integers(0, 50, 600)])
    draw = metrics.bootstrap_interval
    first = draw("average_precision", label, score, group, seed=1)
    assert first == draw("average_precision", label, score, group, seed=1)
    assert first != draw("average_precision", label, score, group, seed=2)
    assert first is not None and first.low < first.estimate < first.high


def test_groups_make_the_interval_wider_than_rows_would() -> None:
    # 20 users with 30 equal rows each carry the information of 20 rows, not of 600.
    random = np.random.default_rng(7)
    label = np.repeat(random.random(20) < 0.4, 30)
    score = np.repeat(random.random(20), 30) + label * 0.3
    by_user = metrics.bootstrap_interval("roc_auc", label, score, np.repeat(range(20), 30))
    by_row = metrics.bootstrap_interval("roc_auc", label, score, np.arange(600))
    assert by_user is not None and by_row is not None
    assert by_user.high - by_user.low > 3 * (by_row.high - by_row.low)


def test_rounds_without_fraud_are_left_out() -> None:
    label, score, group = [1, 0, 0], [0.9, 0.5, 0.1], [0, 1, 2]
    found = metrics.bootstrap_interval("average_precision", label, score, group, rounds=100)
    assert found is not None and 40 < found.rounds < 90
    assert metrics.bootstrap_interval("roc_auc", [0, 0], [0.1, 0.2], [1, 2]) is None


def test_paired_bootstrap_compares_on_the_same_draws() -> None:
    label, score = random_rows(8, levels=None)
    group = np.arange(600) // 5
    same = metrics.paired_bootstrap("average_precision", label, score, score * 0.5, group)
    assert same == metrics.PairedDifference(0.0, 0.0, 0.0, 0.95, 200, 0.5)
    noisy = score + np.random.default_rng(8).normal(0, 0.3, 600)
    better = metrics.paired_bootstrap("average_precision", label, score, noisy, group)
    worse = metrics.paired_bootstrap("average_precision", label, noisy, score, group)
    assert better is not None and worse is not None
    assert 0 < better.low < better.difference < better.high and better.share_a_higher > 0.97
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))


def test_means_over_parts_draw_a_group_equally_often_in_every_part() -> None:
    """Against copied rows: of each draw all rows in both parts; the means over seeds and parts, and differences."""
    random = np.random.default_rng(11)
    group = [random.integers(0, 30, 200), random.integers(10, 40, 300)]
    label = [random.random(len(g)) < 0.3 for g in group]
    a = [[random.random(len(g)) + y for _ in range(2)] for g, y in zip(group, label, strict=True)]
    b = [[random.random(len(g)) + 0.5 * y] for g, y in zip(group, label, strict=True)]
    parts = [metrics.Part(label[i], group[i], {"a": a[i], "b": b[i]}) for i in range(2)]
    found = metrics.bootstrap_means("average_precision", parts, rounds=20, seed=3, level=0.8)
    assert found is not None

    def mean(scores: list[list[Array]], rows: list[Array]) -> float:
        of_part = []
        for y, seeds, at in zip(label, scores, rows, strict=True):
            values = [metrics.average_precision(y[at], score[at]) for score in seeds]
            of_part.append(np.mean([value for value in values if value is not None]))
        return float(np.mean(of_part))

    whole = [np.arange(len(g)) for g in group]
    names = np.unique(np.concatenate(group))
    draws = np.random.default_rng(3)
    of_a, of_b = [], []
    for _ in range(20):
        drawn = names[draws.integers(0, len(names), len(names))]
        rows = [np.concatenate([np.flatnonzero(g == name) for name in drawn]) for g in group]
        of_a.append(mean(a, rows))
        of_b.append(mean(b, rows))
    assert found.of["a"].estimate == pytest.approx(mean(a, whole))
    assert (found.of["b"].low, found.of["b"].high) == pytest.approx(tuple(np.quantile(of_b, [0.1, 0.9])))
    difference = np.array(of_a) - of_b
    assert list(found.first_minus) == ["b"]
    minus = found.first_minus["b"]
    assert minus.difference == pytest.approx(mean(a, whole) - mean(b, whole))
    assert (minus.low, minus.high) == pytest.approx(tuple(np.quantile(difference, [0.1, 0.9])))


def test_sums_are_drawn_by_group_and_their_columns_on_the_same_draws() -> None:
    rng = np.random.default_rng(3)
    value, group = rng.lognormal(0, 1, 600), rng.integers(0, 40, 600)
    one_each = np.zeros(600)
    one_each[np.unique(group, return_index=True)[1]] = 1
    columns = np.stack([value, 3 * value, one_each, value - 3 * value], axis=1)
    single, triple, constant, difference = metrics.bootstrap_sums(columns, group)
    assert single.estimate == pytest.approx(value.sum())
    assert single.low < single.estimate < single.high
    assert [triple.low, triple.high] == pytest.approx([3 * single.low, 3 * single.high])
    assert [difference.low, difference.high] == pytest.approx([-2 * single.high, -2 * single.low])
    assert constant.low == constant.high == constant.estimate == 40, "every group has one, however they are drawn"
    by_row = metrics.bootstrap_sums(columns, np.arange(600))[0]
    assert by_row.estimate == pytest.approx(single.estimate)
    assert (by_row.low, by_row.high) != (single.low, single.high)


def test_means_over_one_part_are_the_intervals_of_that_part() -> None:
    label, score = random_rows(12)
    group = np.arange(600) // 5
    other = np.random.default_rng(12).random(600)
    found = metrics.bootstrap_means("roc_auc", [metrics.Part(label, group, {"a": [score], "b": [other]})], seed=4)
    assert found is not None
    assert found.of["a"] == metrics.bootstrap_interval("roc_auc", label, score, group, seed=4)
    assert found.first_minus["b"] == metrics.paired_bootstrap("roc_auc", label, score, other, group, seed=4)


def test_means_are_undefined_where_a_part_is() -> None:
    good = metrics.Part([1, 0], [0, 1], {"a": [[0.9, 0.1]]})
    without_fraud = metrics.Part([0, 0], [0, 1], {"a": [[0.9, 0.1]]})
    assert metrics.bootstrap_means("average_precision", [good, without_fraud]) is None


# --- All of it ------------------------------------------------------------------------------------


def test_quality_gathers_the_single_figures() -> None:
    label, p = random_rows(9)
    random = np.random.default_rng(9)
    user, amount = random.integers(0, 80, 600), random.gamma(2.0, 30.0, 600)
    time_ms = random.integers(1_530_000_000_000, 1_530_000_000_000 + 5 * DAY_MS, 600)
    day = time_ms // DAY_MS
    found = metrics.measure_quality(label, p, user=user, time_ms=time_ms, amount=amount, alerts_per_day=7)
    calibration = metrics.calibration_slope(label, p)
    money = metrics.money_caught(label, p, amount, day, alerts_per_day=7)
    precision = metrics.precision_at_budget(label, p, day, alerts_per_day=7)
    assert calibration is not None and money is not None and precision is not None
    assert found == metrics.Quality(
        rows=600,
        frauds=int(label.sum()),
        average_precision=metrics.average_precision(label, p),
        roc_auc=metrics.roc_auc(label, p),
        recall_at_1pct_fpr=metrics.recall_at_fpr(label, p, 0.01),
        log_loss=metrics.log_loss(label, p),
        brier=metrics.brier(label, p),
        calibration_slope=calibration.slope,
        calibration_intercept=calibration.intercept,
        card_precision_at_100=metrics.card_precision_at_k(label, p, user, day),
        alerts_per_day=7,
        alert_share=None,
        precision_at_budget=precision.mean,
        money_caught=money.mean,
        money_caught_total=money.total,
    )
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()


@pytest.mark.parametrize("label", [[], [0, 0], [1, 1]])
def test_undefined_figures_are_none_and_warn_of_nothing(label: list[int]) -> None:
    p = np.full(len(label), 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.measure_quality(label, p, user=label, time_ms=np.zeros(len(label), dtype=np.int64), amount=p)
    assert found.roc_auc is None and found.recall_at_1pct_fpr is None
    assert found.calibration_slope is None and found.calibration_intercept is None
    assert (found.average_precision is None) == (sum(label) == 0)
    assert (found.money_caught is None) == (sum(label) == 0)
    assert (found.log_loss is None) == (len(label) == 0)
    json.dumps(found.as_dict(), allow_nan=False)


def test_figures_that_need_a_column_are_none_without_it() -> None:
    label, p = random_rows(10)
    found = metrics.measure_quality(label, p)
    assert found.card_precision_at_100 is found.money_caught is found.precision_at_budget is None
    assert found.average_precision is not None
    assert found.alerts_per_day == 100


# --- Inputs that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.roc_auc([0, 2], [0.1, 0.2]), r"label: seen 2 in row 1; expected 0 \(ho"),
        (lambda: metrics.roc_auc([0, -1], [0.1, 0.2]), "label: seen -1 in row 1"),
        (lambda: metrics.roc_auc([0.0, np.nan], [0.1, 0.2]), "label: seen nan in row 1"),
        (lambda: metrics.roc_auc(["0", "1"], [0.1, 0.2]), "label: seen .*'0'.* of type <U1"),
        (lambda: metrics.roc_auc([[0, 1]], [0.1, 0.2]), r"label: seen an array of shape \(1, 2\)"),
        (lambda: metrics.roc_auc([0, 1], [0.1]), r"score: .*\(1,\); expected .*\(2,\)"),
        (lambda: metrics.roc_auc([0, 1], [0.1, np.nan]), "score: seen nan in row 1; expected a nu"),
        (lambda: metrics.roc_auc([0, 1], [0.1, 0.2], [1, -1]), "weight: seen -1.0 in row 1"),
        (lambda: metrics.recall_at_fpr([0], [0.1], 1.5), "fpr: seen 1.5; expected a share"),
        (lambda: metrics.log_loss([0, 1], [0.1, 1.5]), "probability: seen 1.5 in row 1"),
        (lambda: metrics.measure_quality([0, 1], [0.1, np.nan]), "probability: seen nan in row 1"),
        (lambda: metrics.calibration_bins([0], [0.1], bins=0), "bins: seen 0; expected at least 1"),
        (lambda: metrics.calibration_bins([0], [0.1], top=2), "top: seen 2"),
        (lambda: metrics.precision_recall_curve([1], [0.1], points=1), "points: seen 1"),
        (lambda: metrics.card_precision_at_k([0], [0.1], ["a", "b"], [0]), "user: seen an array"),
        (lambda: metrics.card_precision_at_k([0], [0.1], ["a"], [0], k=0), "k: seen 0"),
        (lambda: metrics.precision_at_budget([0], [0.1], [0]), "alert budget: seen .*exactly one"),
        (
            lambda: metrics.precision_at_budget([0], [0.1], [0], alerts_per_day=1, alert_share=0.1),
            "alert budget: seen alerts_per_day=1, alert_share=0.1; expected exactly one",
        ),
        (
            lambda: metrics.money_caught([0], [0.1], [np.nan], [0], alerts_per_day=1),
            "amount: seen nan in row 0; expected a finite amount",
        ),
        (
            lambda: metrics.measure_quality([0], [0.1], time_ms=[0.5]),
            "time_ms: seen values of type",
        ),
        (
            lambda: metrics.bootstrap_interval("auc", [0], [0.1], [0]),  # type: ignore[arg-type]
            "metric: seen 'auc'; expected one",
        ),
        (lambda: metrics.bootstrap_interval("brier", [0], [0.1], [0], rounds=0), "rounds: seen 0"),
        (
            lambda: metrics.bootstrap_interval("brier", [0], [0.1], [0], level=1.0),
            "level: seen 1.0",
        ),
        (
            lambda: metrics.paired_bootstrap("roc_auc", [0], [0.1], [np.nan], [0]),
            "score_b: seen nan in row 0",
        ),
        (lambda: metrics.bootstrap_means("roc_auc", []), "parts: seen no scores"),
        (
            lambda: metrics.bootstrap_means(
                "roc_auc",
                [metrics.Part([1, 0], [0, 1], {"a": [[1, 0]]}), metrics.Part([1, 0], [0, 1], {"b": [[1, 0]]})],
            ),
            r"parts: seen scores of \['b'\]; expected one or more of each of \['a'\]",
        ),
    ],
)
def test_unusable_input_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_calibration_in_the_large_is_what_brings_the_expected_frauds_to_those_that_came() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-3, 2, 5_000)
    label = (rng.random(5_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    exact = metrics.calibration_in_the_large(label, 1 / (1 + np.exp(-logit)))
    assert exact is not None and abs(exact) < 0.15
    for off in (-2.5, 1.0):
        found = metrics.calibration_in_the_large(label, 1 / (1 + np.exp(-(logit + off))))
        assert found == pytest.approx(exact - off, abs=1e-6)
        added = 1 / (1 + np.exp(-(logit + off + found)))
        assert added.sum() == pytest.approx(label.sum(), rel=1e-9)
    # the slope is not its business
    flat = metrics.calibration_in_the_large(label, np.full(5_000, 0.5))
    assert flat == pytest.approx(math.log(label.mean() / (1 - label.mean())), abs=1e-9)
    assert metrics.calibration_in_the_large(np.zeros(3), np.full(3, 0.5)) is None
    assert metrics.calibration_in_the_large(np.ones(3), np.full(3, 0.5)) is None
    assert metrics.calibration_in_the_large([1, 0], [1.0, 0.0]) == pytest.approx(0.0, abs=1e-6)


def test_a_weight_is_as_many_equal_rows() -> None:
    rng = np.random.default_rng(3)
    label = (rng.random(400) < 0.3).astype(int)
    probability = np.clip(0.2 + 0.4 * label + rng.normal(0, 0.2, 400), 0.01, 0.99)
    group, weight = np.arange(400) // 5, rng.integers(1, 4, 400)
    many = np.repeat(np.arange(400), weight)
    for metric in ("average_precision", "recall_at_1pct_fpr", "roc_auc", "brier"):
        once = metrics.bootstrap_interval(metric, label, probability, group, weight=weight, rounds=30)  # type: ignore[arg-type]
        again = metrics.bootstrap_interval(metric, label[many], probability[many], group[many], rounds=30)  # type: ignore[arg-type]
        assert once is not None and again is not None
        assert (once.estimate, once.low, once.high) == pytest.approx((again.estimate, again.low, again.high))
    weighted, repeated = (
        metrics.calibration_slope(label, probability, weight),
        metrics.calibration_slope(label[many], probability[many]),
    )
    assert weighted is not None and repeated is not None
    assert weighted.slope == pytest.approx(repeated.slope)
    assert metrics.calibration_in_the_large(label, probability, weight) == pytest.approx(
        metrics.calibration_in_the_large(label[many], probability[many])
    )
    both = metrics.calibration_intervals(label, probability, group, weight)
    of_many = metrics.calibration_intervals(label[many], probability[many], group[many])
    assert both is not None and of_many is not None
    for a, b in zip(both, of_many, strict=True):
        assert (a.estimate, a.low, a.high) == pytest.approx((b.estimate, b.low, b.high))


def test_intervals_of_the_calibration_hold_the_truth_also_where_rows_hang_together() -> None:
    inside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        logit = rng.normal(-2, 1, 150)
        group = np.repeat(np.arange(150), 8)
        label = np.repeat(rng.random(150) < 1 / (1 + np.exp(-logit)), 8)
        found = metrics.calibration_intervals(label, np.repeat(1 / (1 + np.exp(-logit)), 8), group)
        assert found is not None
        inside += [found[0].low < 0 < found[0].high, found[1].low < 1 < found[1].high]
    assert np.mean(inside) > 0.87
    assert metrics.calibration_intervals([0, 0], [0.1, 0.2], [0, 1]) is None


# --- Weights of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_counts_a_row_that_often(seed: int) -> None:
    label, score = random_rows(seed, 300)
    score = np.clip(score, 0.01, 0.99)
    weight = np.random.default_rng(seed).integers(0, 4, len(label))
    rows = np.repeat(np.arange(len(label)), weight)
    one, other = metrics.calibration_slope(label, score, weight), metrics.calibration_slope(label[rows], score[rows])
    assert one is not None and other is not None
    assert (one.slope, one.intercept) == pytest.approx((other.slope, other.intercept), abs=1e-6)
    assert metrics.calibration_in_the_large(label, score, weight) == pytest.approx(
        metrics.calibration_in_the_large(label[rows], score[rows]), abs=1e-9
    )
    user = np.random.default_rng(seed + 100).integers(0, 40, len(label))  # not the draws of the weights
    other_score = np.roll(score, 1)
    for metric in ("average_precision", "log_loss"):
        a = metrics.paired_bootstrap(metric, label, score, other_score, user, weight=weight, rounds=30)
        # all users have a row in both, so that the draws are the same
        b = metrics.paired_bootstrap(metric, label[rows], score[rows], other_score[rows], user[rows], rounds=30)
        assert a is not None and b is not None
        assert (a.difference, a.low, a.high) == pytest.approx((b.difference, b.low, b.high))


def test_any_figure_has_an_interval() -> None:
    label, score = random_rows(0)
    user = np.arange(len(label)) // 5
    wanted = metrics.bootstrap_interval("average_precision", label, score, user, rounds=50)
    got = metrics.bootstrap_figure(lambda w: metrics.average_precision(label, score, w), user, rounds=50)
    assert got is not None and wanted is not None
    assert vars(got) == pytest.approx(vars(wanted))
    assert metrics.bootstrap_figure(lambda _: None, user) is None
