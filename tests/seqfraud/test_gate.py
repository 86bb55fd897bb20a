"""The gate on rows made so that the right answer is known."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seqfraud.bundle import Parity
from seqfraud.gate import Compared, GateSettings, Latency, Period, _segments, judge
from seqfraud.metrics import Floats

SETTINGS = GateSettings(rounds=40)
PARITY = Parity(1e-5, 1e-3, {"sequence": {"probability": 2e-7, "logit": 1e-5, "integer state": 0.0},
                             "probabilities visited": {"lowest": 0.0, "highest": 1.0}})  # fmt: skip
LATENCY = Latency(champion=20.0, challenger=22.0)
PERIOD = Period(begin=1_767_225_600_000, end=1_768_435_200_000, labels_until=1_767_225_600_000)


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def rows_of(gain: float, seed: int = 0, count: int = 3000) -> Compared:
    """The truth has log-odds a + b; the champion knows a, the challenger `gain` of b besides. Both are about calibrated."""
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, count))
    fraud = random.random(count) < sigmoid(-3.5 + 1.5 * a + 1.5 * b)
    return Compared(
        fraud=fraud,
        champion=sigmoid(-2.9 + 1.2 * a),
        challenger=sigmoid(-2.9 - 0.6 * gain + 1.2 * a + 1.5 * gain * b),
        user=random.integers(0, 300, count),
        weight=np.ones(count),
        amount=random.lognormal(3, 1, count),
        categories={"kind": [("food", "fuel", None)[i] for i in random.integers(0, 3, count)]},
    )


def outcome(rows: Compared, parity: Parity = PARITY, latency: Latency = LATENCY, settings: GateSettings = SETTINGS):
    report = judge("old", "new", rows, parity, latency, PERIOD, settings)
    return report, {c.name: c for c in report.criteria}


@pytest.fixture(scope="module")
def better() -> Compared:
    return rows_of(1.0)


def test_a_better_challenger_passes_with_words_and_figures(better):
    report, found = outcome(better)
    assert report.passed
    assert list(found) == [
        "unseen", "enough to compare", "average precision", "segments", "calibration", "parity", "latency",
    ]  # fmt: skip
    figures = found["average precision"].figures
    assert figures["low"] > 0
    assert figures["difference"] == pytest.approx(figures["challenger"] - figures["champion"])
    assert "surely better" in found["average precision"].words
    assert {s["segment"] for s in found["segments"].figures["segments"]} >= {"kind = food", "kind = missing"}
    assert report.compared == {
        "from": "2026-01-01T00:00:00Z", "to": "2026-01-15T00:00:00Z", "rows": 3000,
        "frauds": int(better.fraud.sum()), "users": 300, "let_through": 0,
    }  # fmt: skip
    lines = report.text().splitlines()
    assert lines[0] == "challenger new against champion old: passed"
    assert [line.split()[0] for line in lines[1:]] == ["ok"] * 7
    plain = json.loads(json.dumps(report.as_dict()))
    assert (plain["passed"], plain["champion"], plain["challenger"]) == (True, "old", "new")
    assert [(c["name"], c["passed"]) for c in plain["criteria"]] == [(name, True) for name in found]


def test_the_same_model_again_is_not_better(better):
    report, found = outcome(replace(better, challenger=better.champion))
    assert not report.passed
    assert [c.name for c in report.criteria if not c.passed] == ["average precision"]
    assert found["average precision"].words.endswith("no sure difference")
    assert report.text().splitlines()[0].endswith("refused: average precision")


def test_a_challenger_that_knows_nothing_is_refused_on_every_count(better):
    random = np.random.default_rng(1)
    report, found = outcome(replace(better, challenger=random.permutation(better.challenger)))
    assert {c.name for c in report.criteria if not c.passed} == {"average precision", "segments", "calibration"}
    assert found["average precision"].words.endswith("surely worse")
    assert "surely worse in" in found["segments"].words
    assert "slope off 1" in found["calibration"].words


def test_two_lucky_frauds_are_no_confidence():
    """Better on the rows as they are, but not on most draws of users."""
    rows = rows_of(0.0, count=1500)
    challenger = rows.champion.copy()
    lucky = np.flatnonzero(rows.fraud)[np.argsort(rows.champion[rows.fraud])[:2]]
    challenger[lucky] = 0.999
    _, found = outcome(replace(rows, challenger=challenger))
    figures = found["average precision"].figures
    assert figures["difference"] > 0 >= figures["low"]
    assert not found["average precision"].passed


def test_better_on_the_whole_and_worse_in_one_segment(better):
    random = np.random.default_rng(2)
    fuel = np.array([kind == "fuel" for kind in better.categories["kind"]])
    challenger = better.challenger.copy()
    challenger[fuel] = random.permutation(challenger[fuel])
    # what is lost there is won elsewhere
    others = ~fuel
    challenger[others] = sigmoid(np.log(challenger[others] / (1 - challenger[others])) + better.fraud[others])
    _, found = outcome(replace(better, challenger=challenger))
    assert found["average precision"].passed
    assert not found["segments"].passed
    assert found["segments"].words.startswith("surely worse in 1 of ")
    assert "kind = fuel" in found["segments"].words
    assert [s["segment"] for s in found["segments"].figures["segments"] if s["worse"]] == ["kind = fuel"]


def test_a_band_of_the_amount_is_a_segment_too(better):
    random = np.random.default_rng(3)
    assert better.amount is not None
    large = better.amount >= np.quantile(better.amount[better.fraud], 0.75)
    challenger = better.challenger.copy()
    challenger[large] = random.permutation(challenger[large])
    _, found = outcome(replace(better, challenger=challenger))
    worse = [s["segment"] for s in found["segments"].figures["segments"] if s["worse"]]
    assert len(worse) == 1
    assert worse[0].startswith("amount from ")


def test_many_segments_of_luck_alone_are_no_reason():
    """Champion and challenger equally good: with 40 segments at 95 % one or two would seem worse."""
    refused = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        rows = rows_of(0.0, seed, 6000)
        noise = random.normal(0, 0.7, (2, len(rows.fraud)))
        logit = np.log(rows.champion / (1 - rows.champion))
        kinds = [f"k{i}" for i in random.integers(0, 12, len(rows.fraud))]
        rows = replace(
            rows, champion=sigmoid(logit + noise[0]), challenger=sigmoid(logit + noise[1]), categories={"kind": kinds}
        )
        found = _segments(rows, replace(SETTINGS, fewest_in_segment=10))
        assert len(found.figures["segments"]) >= 12
        refused += not found.passed
    assert refused <= 1


def test_small_segments_are_not_looked_at(better):
    _, found = outcome(replace(better, categories={"id": [str(i) for i in range(3000)]}, amount=None))
    assert found["segments"].passed
    assert found["segments"].words == "none has 20 frauds: none was looked at"


def test_probabilities_that_are_too_high_are_worse_calibrated(better):
    logit = np.log(better.challenger / (1 - better.challenger))
    report, found = outcome(replace(better, challenger=sigmoid(logit + 1.5)))
    assert [c.name for c in report.criteria if not c.passed] == ["calibration"]  # the ranking is as good as before
    assert "intercept off 0" in found["calibration"].words
    _, found = outcome(replace(better, challenger=sigmoid(3 * logit)))
    assert "slope off 1" in found["calibration"].words


def test_a_badly_calibrated_champion_asks_for_no_more_than_itself(better):
    logit = np.log(better.champion / (1 - better.champion))
    _, found = outcome(replace(better, champion=sigmoid(3 * logit)))
    assert found["calibration"].passed


@pytest.mark.parametrize(("frauds", "words"), [(0, "0 frauds in 500"), (29, "29 frauds in 500")])
def test_too_few_frauds_decide_nothing(frauds, words):
    fraud = np.arange(500) < frauds
    p = np.where(fraud, 0.9, 0.1)
    rows = Compared(fraud, 1 - p, p, np.arange(500), np.ones(500))
    report, found = outcome(rows)
    assert not report.passed
    assert list(found) == ["unseen", "enough to compare", "parity", "latency"]
    assert found["enough to compare"].words.startswith(words)


def test_what_stands_for_nothing_does_not_count_and_what_stands_for_more_counts_more(better):
    """Rows of weight 0 as if they were not there; a weight of 2 as if they stood twice."""
    kept = np.random.default_rng(4).random(3000) < 0.7
    weighed = replace(better, weight=np.where(kept, 2.0, 0.0))
    rows = np.repeat(np.flatnonzero(kept), 2)
    twice = replace(
        better.of(rows), amount=better.amount[rows], categories={"kind": [better.categories["kind"][i] for i in rows]}
    )
    one, other = outcome(weighed)[1], outcome(twice)[1]
    for name in ("challenger", "champion", "difference"):
        assert one["average precision"].figures[name] == pytest.approx(other["average precision"].figures[name])
        if name != "difference":
            for measure in ("log loss", "slope off 1", "intercept off 0"):
                a, b = (found["calibration"].figures[measure][name] for found in (one, other))
                assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    assert one["enough to compare"].figures["rows"] == kept.sum()


def test_what_was_fitted_is_no_test():
    few = Compared(np.zeros(1, bool), np.ones(1), np.ones(1), np.zeros(1, int), np.ones(1))
    for until, passes in ((PERIOD.begin, True), (PERIOD.begin + 1, False)):
        report = judge("old", "new", few, PARITY, LATENCY, replace(PERIOD, labels_until=until), SETTINGS)
        assert report.criteria[0].passed == passes
        assert ("learnt by heart" in report.criteria[0].words) == (not passes)


def measured(**figures: Any) -> Parity:
    return replace(PARITY, measured={"step": {"probability": 0.0, "logit": 0.0, **figures}})


@pytest.mark.parametrize(
    ("parity", "passes"),
    [
        (measured(), True),
        (measured(probability=1.1e-5), False),
        (measured(logit=2e-3), False),
        (measured(probability=float("nan")), False),
        (measured(**{"integer state": 1.0}), False),
        (replace(PARITY, measured={}), False),
        (replace(PARITY, measured={"probabilities visited": {"lowest": 0.0}}), False),
    ],
)
def test_parity(parity, passes):
    few = Compared(np.zeros(1, bool), np.ones(1), np.ones(1), np.zeros(1, int), np.ones(1))
    assert outcome(few, parity)[1]["parity"].passed == passes


@pytest.mark.parametrize(("challenger", "passes"), [(30.0, True), (30.1, False), (5.0, True)])
def test_latency(challenger, passes):
    few = Compared(np.zeros(1, bool), np.ones(1), np.ones(1), np.zeros(1, int), np.ones(1))
    found = outcome(few, latency=Latency(20.0, challenger))[1]["latency"]
    assert found.passed == passes
    assert f"{challenger / 20:.2f} times" in found.words
