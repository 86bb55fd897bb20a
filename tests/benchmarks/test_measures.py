"""Figures of several models on the same rows, against small cases that were worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import measures
from benchmarks.quality.measures import ScoredRows, compared, figures, label_segments, scored_rows, segments_of
from seqfraud.metrics import Part, bootstrap_means
from training.prepare import Prepared

LABEL = np.array([1, 0, 0, 1, 0, 1], dtype=np.int8)
USER = np.array(["a", "b", "c", "a", "b", "c"])
DAY = np.array([1, 1, 1, 2, 2, 2])
AMOUNT = np.array([10.0, 5.0, 5.0, 30.0, 5.0, 10.0])
GOOD = np.array([0.9, 0.2, 0.1, 0.8, 0.1, 0.7])
BAD = np.array([0.1, 0.9, 0.8, 0.1, 0.9, 0.7])
"""Ranks: honest .9 .9 .8, fraud .7, frauds .1 .1."""


def part(**models: list[np.ndarray]) -> ScoredRows:
    segments = {"half": {"first": DAY == 1, "second": DAY == 2}, **label_segments("kind", DAY, LABEL == 1)}
    return ScoredRows(LABEL, USER, DAY, AMOUNT, models, segments)


def test_a_figure_is_the_mean_over_parts_and_seeds() -> None:
    # of BAD: the first fraud is the 4th alert, the two others tie as 5th and 6th
    bad = (1 / 4 + 2 * 3 / 6) / 3
    two = [part(gru=[GOOD, BAD]), part(gru=[GOOD, GOOD])]
    found = figures(two, "gru")
    assert found["average_precision"] == pytest.approx((3 + bad) / 4)
    assert found["roc_auc"] == pytest.approx((3 + 0) / 4)
    assert (found["rows"], found["frauds"], found["seeds"]) == (12, 6, 2)
    assert found["log_loss"] == pytest.approx(
        np.mean([-np.log(np.where(LABEL == 1, p, 1 - p)).mean() for p in (GOOD, BAD, GOOD, GOOD)])
    )


def test_money_is_a_days_share_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One alert a day: GOOD finds all of day 1 and 30 of 40 on day 2, BAD nothing."""
    monkeypatch.setattr(measures, "BUDGETS", (1, 2))
    assert figures([part(gru=[GOOD])], "gru")["money_caught"] == {"1": pytest.approx((1 + 0.75) / 2), "2": 1.0}
    # two alerts of BAD on day 2: its honest row and the fraud of 10
    assert figures([part(gru=[BAD])], "gru")["money_caught"] == {"1": 0.0, "2": pytest.approx((0 + 0.25) / 2)}


def test_segments_count_frauds_among_the_days_alerts_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "BUDGET", 1)
    found = figures([part(gru=[GOOD]), part(gru=[BAD])], "gru")["segments"]
    name = "recall_at_1_alerts"
    # parts: GOOD alerts the fraud of day 1 and one of two on day 2, BAD none
    assert found["half"]["first"][name] == pytest.approx(1 / 2)
    assert found["half"]["second"][name] == pytest.approx(1 / 4)
    assert (found["half"]["second"]["rows"], found["half"]["second"]["frauds"]) == (6, 4)
    # 1 for GOOD; in BAD's second day the honest row is first, the frauds second and third
    assert found["half"]["second"]["average_precision"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    # frauds alone have a recall, but no ranking among honest rows
    kind = found["kind"]["kind 2"]
    assert (kind["rows"], kind["frauds"], kind[name]) == (4, 4, pytest.approx(1 / 4))
    assert kind["average_precision"] is None and kind["roc_auc"] is None


def test_bins_lie_in_the_top_of_the_first_seed_with_wilsons_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "TOP", 0.5)
    bins = figures([part(gru=[BAD, GOOD])], "gru")["top_bins"]
    assert sum(one["count"] for one in bins) == 3
    assert {round(one["mean_probability"], 6) for one in bins} == {0.8, 0.9}
    highest = bins[-1]
    assert (highest["count"], highest["observed_rate"], highest["low"]) == (2, 0.0, 0.0)
    z2 = 1.959963984540054**2
    assert highest["high"] == pytest.approx((z2 / 2) / 2 / (1 + z2 / 2) + math.sqrt(z2 * z2 / 16) / (1 + z2 / 2))


def test_calibration_of_probabilities_that_are_right_is_slope_1() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-2, 1.5, 40_000)
    label = (rng.random(40_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    count = np.arange(40_000)
    rows = ScoredRows(label, count % 100, count % 7, np.ones(40_000), {"gru": [1 / (1 + np.exp(-2 * logit - 1))]})
    found = figures([rows], "gru")["calibration"]
    # logit P = logit = (stated - 1) / 2
    assert found["slope"] == pytest.approx(0.5, abs=0.02)
    assert found["intercept"] == pytest.approx(-0.5, abs=0.04)


def test_intervals_and_differences_are_of_the_mean_with_customers_drawn_once() -> None:
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(2):
        label = (rng.random(300) < 0.2).astype(np.int8)
        noise = [rng.random(300) for _ in range(3)]
        probabilities = {"gru": [(label + n) / 2 for n in noise[:2]], "trees": [(0.5 * label + noise[2]) / 1.5]}
        parts.append(ScoredRows(label, rng.integers(0, 40, 300), rng.integers(0, 7, 300), np.ones(300), probabilities))
    found = compared(parts, rounds=50)
    assert list(found["models"]) == ["gru", "trees"]
    drawn = bootstrap_means("average_precision", [Part(p.label, p.user, p.probabilities) for p in parts], rounds=50)
    assert drawn is not None
    minus = found["differences"]["trees"]
    models = found["models"]
    assert minus["average_precision"] == pytest.approx(
        models["gru"]["average_precision"] - models["trees"]["average_precision"]
    )
    assert (minus["low"], minus["high"]) == (drawn.first_minus["trees"].low, drawn.first_minus["trees"].high)
    assert models["trees"]["interval"] == [drawn.of["trees"].low, drawn.of["trees"].high]
    assert drawn.of["trees"].estimate == pytest.approx(models["trees"]["average_precision"])
    json.dumps(found, allow_nan=False)


def test_rows_without_fraud_leave_figures_out() -> None:
    rows = ScoredRows(0 * LABEL, USER, DAY, AMOUNT, {"gru": [GOOD], "trees": [BAD]})
    found = compared([rows], rounds=5)
    assert found["differences"] == {}
    assert found["models"]["gru"]["average_precision"] is None
    assert found["models"]["gru"]["calibration"] == {"slope": None, "intercept": None, "in_the_large": None}


@pytest.fixture
def prepared(small_split: Prepared) -> Prepared:
    return small_split


def test_rows_of_a_split_keep_their_users_days_and_segments(prepared: Prepared) -> None:
    rows = np.flatnonzero(prepared.rows.test)
    score = np.linspace(0, 1, len(prepared.encoded))
    found = scored_rows(prepared, rows, {"gru": [score]})
    table = prepared.table.take(prepared.encoded.arrival[rows])
    assert found.user.tolist() == [table.user.values[code] for code in table.user.codes]
    np.testing.assert_array_equal(found.day, table.time // 86_400_000)
    np.testing.assert_array_equal(found.amount, table.amount())
    np.testing.assert_array_equal(found.probabilities["gru"][0], score[rows])
    assert list(found.segments) == ["amount", "events before", "merchant_id"]
    for masks in found.segments.values():
        assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()


def test_a_place_with_known_fraud_had_one_a_week_ago(prepared: Prepared) -> None:
    """Against a loop over the transactions of each merchant; the delay of labels is the configuration's."""
    rows = np.flatnonzero(prepared.rows.test)
    known = segments_of(prepared, rows)["merchant_id"]["with known fraud"]
    table, arrival = prepared.table, prepared.encoded.arrival
    merchant = table.text("merchant_id") if "merchant_id" in table.schema.categorical else table.entities()[0]
    delay = prepared.context.label_delay
    assert table.label is not None
    for row, is_known in list(zip(rows, known, strict=True))[::37]:
        at = arrival[row]
        same = merchant.codes == merchant.codes[at]
        early = table.time + delay <= table.time[at]
        assert is_known == bool((same & early & (table.label == 1)).any())
    assert 0 < known.sum() < len(known)


def test_a_column_that_training_does_not_read_follows_its_rows(prepared: Prepared, tmp_path: Path) -> None:

    size = int(prepared.table.file_row.max()) + 1
    pq.write_table(pa.table({"kind": np.arange(size)}), tmp_path / "kinds.parquet")
    rows = np.array([5, 3, 11])
    found = measures.column_of(tmp_path / "kinds.parquet", "kind", prepared, rows)
    np.testing.assert_array_equal(found, prepared.table.file_row[prepared.encoded.arrival[rows]])
