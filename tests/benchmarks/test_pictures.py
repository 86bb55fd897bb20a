"""Pictures of what the model sees: the right rows by the rule, whole files with words, the forecast as the model makes it."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.quality.fitting import FittedGru, logits_until
from benchmarks.quality.handbook import Fold, test_rows
from benchmarks.quality.pictures import (
    Events,
    choose_customers,
    choose_terminals,
    draw_all,
    events_of,
    forecast_bands,
    shown_rows,
    terminals_of,
)
from seqfraud.config import DAY_MS, parse_config, parse_instant
from seqfraud.graph import NEXT
from seqfraud.nn.model import LOG_PRECISION, SequenceModel
from training.prepare import fit_scaling, prepare

test_rows.__test__ = False

CONFIG = """
[data]
transaction = "id"
user = "customer"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "7d"
amount = "amount"
[features]
numeric = ["amount"]
context = ["terminal"]
half_lives = ["3d", "14d"]
[model]
hidden = 8
input_width = 8
head_width = 8
[split]
train_start = "2018-02-10"
validation = "1d"
train_end = "2018-03-08"
test_start = "2018-03-15"
test_end = "2018-03-22"
[training]
events_per_chunk = 16
"""
BEGIN = parse_instant("2018-01-01")
DAYS = 80
FIRST = {0: 50, 1: 68, 2: 74}
"""Terminals that go bad, and the day from which all their transactions are frauds."""


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Fold:
    """Twelve customers with a terminal for each three; the last two have a single fraud and none, the others what falls to them."""
    rng = np.random.default_rng(5)
    customer = np.tile(np.arange(12), DAYS)
    day = np.repeat(np.arange(DAYS), 12)
    terminal = customer // 3
    fraud = np.zeros(len(day), dtype=bool)
    for bad, since in FIRST.items():
        fraud |= (terminal == bad) & (day >= since)
    fraud[np.flatnonzero((customer == 10) & (day == 76))[0]] = True
    kept = rng.random(len(day)) < 0.9  # customers have different numbers of events
    columns = {
        "id": np.arange(len(day)),
        "customer": [f"c{c}" for c in customer],
        "terminal": [f"t{t}" for t in terminal],
        "time": BEGIN + day * DAY_MS + rng.integers(0, DAY_MS, len(day)),
        "amount": np.round(rng.lognormal(3, 0.7, len(day)), 2),
        "fraud": fraud.astype(np.int64),
    }
    file = tmp_path_factory.mktemp("data") / "cards.parquet"
    pq.write_table(pa.table(columns).filter(pa.array(kept)), file)
    prepared = prepare(parse_config(CONFIG, "test"), file)
    encoded = prepared.encoded
    user = np.repeat(np.arange(len(encoded.begin)), encoded.lengths()).astype(np.int32)
    since = (encoded.time - parse_instant("2018-03-01")) // DAY_MS
    return Fold("all", "2018-03-01", 0, prepared, user, since, test_rows(since, user, prepared.label))


@pytest.fixture(scope="module")
def fitted(fold: Fold) -> FittedGru:
    """Drawn weights."""
    torch.manual_seed(3)
    scaling, spec, graph = fit_scaling(fold.prepared)
    model = SequenceModel(spec, graph)
    scaling.apply(model.encoder)
    return FittedGru(model, logits_until(model, fold.prepared, fold.prepared.split.test_end))


def test_every_picture_is_a_whole_file_with_words(fold, fitted, tmp_path):
    pictures = draw_all(tmp_path, fold, fitted)
    assert len(pictures) == 6
    assert {file.name for file in tmp_path.iterdir()} == {picture["file"] for picture in pictures}
    for picture in pictures:
        text = (tmp_path / picture["file"]).read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        tags = [re.sub(r"\{.*\}", "", element.tag) for element in root]
        assert tags[:3] == ["title", "desc", "rect"]
        assert root[0].text == picture["title"]
        assert root[1].text == picture["description"]
        assert "probability" in picture["description"]
        assert not re.search(r'(?i)[" ,(]-?(nan|inf)\b', text)
        assert not re.search(r"(?i)<script|<style|var\(|@import|url\((?!#)", text)
        assert not re.search(r'href="(?!#)', text)
        assert "#0001" not in text  # every stand-in colour has become a real one
        assert len(text) < 60_000
        drawn = "".join(root.itertext())
        for words in (
            "amount (currency of the data)",
            "probability of fraud",
            "day (UTC)",
            "honest",
            "history only",
            "learned from",
            "test",
        ):
            assert words in drawn


def test_the_same_model_gives_the_same_files(fold, fitted, tmp_path):
    for name in ("a", "b"):
        draw_all(tmp_path / name, fold, fitted)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_customers_are_those_of_the_rule(fold):
    prepared = fold.prepared
    chosen = choose_customers(fold)
    frauds = [int((fold.test & (fold.user == user) & (prepared.label == 1)).sum()) for user, _ in chosen]
    assert frauds[:2] == [0, 1]
    assert frauds[2] >= 3
    shown = np.bincount(fold.user[shown_rows(prepared)])
    user, rule = chosen[2]
    tests = np.bincount(fold.user[fold.test & (prepared.label == 1)], minlength=len(shown))
    assert shown[user] == np.sort(shown[tests >= 3])[(int((tests >= 3).sum()) - 1) // 2]
    assert "median" in rule


def test_terminals_are_in_the_order_of_their_first_fraud(fold):
    values = fold.prepared.table.entities()[0].values
    assert [values[code] for code, _ in choose_terminals(fold)] == ["t0", "t1", "t2"]


def test_a_fold_without_fraud_has_a_customer_and_no_terminal(fold):
    honest = replace(fold.prepared, label=np.zeros_like(fold.prepared.label))
    quiet = replace(fold, prepared=honest)
    assert len(choose_customers(quiet)) == 1
    assert choose_terminals(quiet) == []


def test_the_band_is_what_the_state_before_each_event_forecasts(fold, fitted):
    model, encoded = fitted.model, fold.prepared.encoded
    user = 4
    low, high = forecast_bands(model, fold.prepared, user)
    begin, end = int(encoded.begin[user]), int(encoded.end[user])
    assert len(low) == end - begin > 2 * 16  # more than two chunks
    states = model.initial_states(1, torch.device("cpu"))
    least, most = LOG_PRECISION
    for i, row in enumerate(range(begin, end)):
        with torch.no_grad():
            forecast = model.networks[0].forecast
            mean, log_precision = forecast.linear(states["h"][-1])[0].tolist()[:: forecast.count]
            inputs = {name: torch.from_numpy(np.asarray(v)) for name, v in encoded.gather(np.array([[row]])).items()}
            out = model({**inputs, **states, "length": torch.ones(1, dtype=torch.int64)})
        spread = np.exp(-np.clip(log_precision, least, most))
        for side, ends in ((-1, low), (1, high)):
            scaled = mean + side * 2 * spread
            value = scaled / float(model.encoder.inverse_std[0]) + float(model.encoder.mean[0])
            assert np.sign(ends[i]) * np.log1p(abs(ends[i])) == pytest.approx(value, abs=1e-5)
        states = {spec.name: out[spec.name + NEXT] for spec in model.graph.states}


def test_events_have_what_the_terminal_had_been_through(fold, fitted):
    rows = np.flatnonzero(terminals_of(fold.prepared) == 0)
    events = events_of(fold, fitted, rows)
    assert (np.diff(events.time) >= 0).all()
    first = int(events.time[events.fraud].min())
    known = events.time >= first + 7 * DAY_MS
    assert (events.run[~known, 1] == 0).all()
    assert (events.run[known, 1] > 0).all()
    assert events.run[known, 0] == pytest.approx((events.time[known] - first) / DAY_MS)
    assert (events.known_at - events.time == 7 * DAY_MS).all()
    assert (events.after_known_fraud == known).all()


def test_a_known_honest_transaction_after_the_fraud_ends_the_ring():
    run = np.array([[-1, 0, -1, -1], [9, 1, 9, -1], [9, 1, 9, 12], [9, 1, 9, 8], [-1, 0, -1, 3]], dtype=float)
    nothing = np.zeros(5)
    events = Events(nothing.astype(np.int64), nothing, nothing, nothing > 0, nothing.astype(np.int64), run)
    assert events.after_known_fraud.tolist() == [False, True, True, False, False]
