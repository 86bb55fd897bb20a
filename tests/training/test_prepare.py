"""From a file to graph inputs: what is fitted is fitted on rows before the validation days, and on nothing else."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from seqfraud.config import Config, parse_config
from seqfraud.errors import ConfigError, DataError
from seqfraud.nn.model import EventEncoder, ModelSpec
from seqfraud.sequences import Encoded
from seqfraud.vocabulary import Vocabulary
from training import prepare as module
from training.prepare import SENTINEL, Prepared, Scaling, fit_scaling, prepare
from training.simulate import Simulation, simulate_to
from training.split import Rows

ROOT = Path(__file__).parents[2]

torch.set_num_threads(1)

HOUR = 3_600_000
DAY = 24 * HOUR
START = 1_735_689_600_000  # 2025-01-01
DATA = """
[data]
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "1d"
amount = "amount"
"""
SPLIT = """
[split]
train_start = 2025-01-03
train_end = 2025-01-09
validation = "2d"
"""
"""History 2 days, train 4, validation 2, a gap of 1, then the test."""
HISTORY_END, TRAIN_END, VALIDATION_END = START + 2 * DAY, START + 6 * DAY, START + 8 * DAY


def config_of(features: str, data: str = DATA, split: str = SPLIT, rest: str = "") -> Config:
    return parse_config(f"{data}\n[features]\n{features}\n{split}\n{rest}", "config.toml")


def columns(rows: int = 240) -> dict[str, Any]:
    """One transaction an hour for ten days, users in turn; every seventh is a fraud."""
    i = np.arange(rows)
    return {
        "user": [f"u{k % 4}" for k in i],
        "time": START + HOUR * i,
        "amount": (i + 1).astype(float),
        "age": 20.0 + i % 50,
        "kind": [("a", "b", "c")[k % 3] for k in i],
        "shop": [f"s{k % 5}" for k in i],
        "lat": 10.0 + i % 4,
        "long": 50.0 + i % 3,
        "fraud": (i % 7 == 0).astype(int),
    }


def write(folder: Path, data: dict[str, Any], name: str = "data.parquet") -> Path:
    pq.write_table(pa.table(data), folder / name)
    return folder / name


def arrays(scaling: Scaling) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in vars(scaling).items()}


ALL = """
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["shop"]
geo = [["lat", "long"]]
half_lives = ["1d"]
min_count = 2
bins = 4
"""


# --- Rows by user ------------------------------------------------------------------------------------------------


def test_masks_and_labels_go_with_their_rows_into_the_order_by_user(tmp_path: Path) -> None:
    """The amount is the row's number, so that every encoded row can be told."""
    data = columns()
    prepared = prepare(config_of('numeric = ["amount"]'), write(tmp_path, data))
    row = prepared.encoded.numeric[:, 0].astype(int) - 1
    assert sorted(row.tolist()) == list(range(240))
    assert (np.diff(row.reshape(4, 60), axis=1) == 4).all()  # four users, each in order
    np.testing.assert_array_equal(prepared.encoded.time, START + HOUR * row)
    np.testing.assert_array_equal(prepared.encoded.arrival, row)
    np.testing.assert_array_equal(prepared.label, row % 7 == 0)
    for name, first, end in (("before_validation", 48, 144), ("train", 48, 144), ("validation", 144, 192),
                             ("test", 216, 240)):  # fmt: skip
        np.testing.assert_array_equal(getattr(prepared.rows, name), (first <= row) & (row < end), err_msg=name)


def test_rows_that_are_not_in_order_of_time_are_put_in_it(tmp_path: Path) -> None:
    data = columns()
    mixed = np.random.default_rng(0).permutation(240)
    ordered = prepare(config_of(ALL), write(tmp_path, data))
    shuffled = prepare(
        config_of(ALL), write(tmp_path, {k: np.array(v)[mixed] for k, v in data.items()}, "mixed.parquet")
    )
    by_time = {"u0": 0, "u1": 1, "u2": 2, "u3": 3}
    users = [by_time[u] for u in dict.fromkeys(np.array(data["user"])[mixed])]  # users are numbered as they come
    blocks = [np.flatnonzero(ordered.encoded.arrival % 4 == u) for u in users]
    assert {len(b) for b in blocks} == {60}
    for name in ("time", "numeric", "categorical", "context"):
        np.testing.assert_array_equal(
            getattr(shuffled.encoded, name), getattr(ordered.encoded, name)[np.concatenate(blocks)], err_msg=name
        )
    assert shuffled.vocabularies == ordered.vocabularies


# --- Vocabularies ------------------------------------------------------------------------------------------------


def test_a_value_that_training_does_not_see_stays_unseen(tmp_path: Path) -> None:
    data = columns()
    kind = np.array(["common"] * 240, dtype=object)
    kind[:48] = "history"
    kind[144:192] = "validation"
    kind[192:] = "later"
    kind[48:52], kind[52:55], kind[150] = "four", "three", "three"
    kind[60:70] = None
    data["kind"] = kind.tolist()
    prepared = prepare(config_of('categorical = ["kind"]\nmin_count = 4'), write(tmp_path, data))
    assert prepared.vocabularies == (Vocabulary("kind", ("common", "four")),)
    row = (prepared.encoded.time - START) // HOUR
    ids = prepared.encoded.categorical[np.argsort(row), 0]
    expected = np.where(kind == "common", 2, np.where(kind == "four", 3, 1))
    np.testing.assert_array_equal(ids, expected)
    assert fit_scaling(prepared)[1].vocabularies == (4,)


def test_given_vocabularies_are_used_and_nothing_is_fitted(tmp_path: Path) -> None:
    given = (Vocabulary("kind", ("c", "x", "a")),)
    prepared = prepare(config_of('categorical = ["kind"]'), write(tmp_path, columns()), given)
    assert prepared.vocabularies == given
    row = (prepared.encoded.time - START) // HOUR
    assert prepared.encoded.categorical[np.argsort(row), 0][:3].tolist() == [4, 1, 2]  # a, b (unseen), c


# --- Scaling and bins --------------------------------------------------------------------------------------------


def test_nothing_from_the_validation_days_on_moves_vocabularies_scaling_or_bins(tmp_path: Path) -> None:
    """Amounts, places, categories, shops and labels are all other ones there; only the classes stay both."""
    data, other = columns(), columns()
    late = np.arange(240) >= 144
    other["amount"] = np.where(late, 1e7 + np.arange(240.0), data["amount"])
    other["age"] = np.where(late, -500.0, data["age"])
    other["lat"] = np.where(late, -80.0, data["lat"])
    other["kind"] = ["new" if is_late else k for is_late, k in zip(late, data["kind"], strict=True)]
    other["shop"] = ["new" if is_late else k for is_late, k in zip(late, data["shop"], strict=True)]
    other["fraud"] = np.where(late, 1 - data["fraud"], data["fraud"])
    a = prepare(config_of(ALL), write(tmp_path, data))
    b = prepare(config_of(ALL), write(tmp_path, other, "other.parquet"))
    assert not np.array_equal(a.encoded.numeric, b.encoded.numeric)
    assert a.vocabularies == b.vocabularies
    (scaling_a, spec_a, graph_a), (scaling_b, spec_b, graph_b) = fit_scaling(a), fit_scaling(b)
    assert arrays(scaling_a) == arrays(scaling_b)
    assert (spec_a, graph_a) == (spec_b, graph_b)


def test_nothing_from_the_history_moves_the_scaling_of_numbers(tmp_path: Path) -> None:
    data, other = columns(), columns()
    history = np.arange(240) < 48
    other["amount"] = np.where(history, 1e7, data["amount"])
    other["fraud"] = np.where(history, 1 - data["fraud"], data["fraud"])
    config = config_of('numeric = ["amount"]\nbins = 4')
    fits = [fit_scaling(prepare(config, write(tmp_path, d, f"{i}.parquet")))[0] for i, d in enumerate((data, other))]
    assert arrays(fits[0]) == arrays(fits[1])


def test_a_training_row_does_move_them(tmp_path: Path) -> None:
    """So that the two tests before this one could fail."""
    data, other = columns(), columns()
    other["amount"][143] = 1e7  # the last row before the validation days
    config = config_of('numeric = ["amount"]\nbins = 4')
    fits = [fit_scaling(prepare(config, write(tmp_path, d, f"{i}.parquet")))[0] for i, d in enumerate((data, other))]
    assert fits[0].mean[0] < fits[1].mean[0]
    assert fits[0].bin_low.tolist() != fits[1].bin_low.tolist()


def test_means_and_deviations_are_those_of_the_encoders_values(tmp_path: Path) -> None:
    """Numbers, gap, distance and speed by hand; every gap is 4 hours, also that of the first training row."""
    data = columns()
    i = np.arange(240)
    data["lat"] = (i // 4).astype(float)  # every user goes one degree north with each transaction
    data["long"] = np.full(240, 30.0)
    config = config_of('numeric = ["amount", "age"]\ngeo = [["lat", "long"]]\nbins = 4')
    scaling, spec, _ = fit_scaling(prepare(config, write(tmp_path, data)))
    train = i[48:144]
    km = math.radians(1) * 6371.0088
    logs = [np.log1p(train + 1), np.log1p(20 + train % 50), np.log1p(4 * 3600), np.log1p(km), np.log1p(km / 4)]
    np.testing.assert_allclose(scaling.mean, [np.mean(x) for x in logs], rtol=1e-5)
    deviations = np.array([np.std(x) for x in logs])
    np.testing.assert_allclose(scaling.inverse_std[:2], 1 / deviations[:2], rtol=1e-4)
    assert scaling.inverse_std[2] == 0  # the gap never changes
    assert spec.values == 5
    assert scaling.fill[:2].tolist() == [np.median(train + 1), np.median(20 + train % 50)]
    assert set(scaling.bin_value.tolist()) == {0, 1}  # what hardly changes needs no bins


def test_first_events_count_with_their_sentinel(tmp_path: Path) -> None:
    """Without history: four first events of 144, all other gaps 4 hours."""
    split = SPLIT.replace("train_start = 2025-01-03", "")
    config = config_of('numeric = ["amount"]\nbins = 4', split=split)
    scaling, _, _ = fit_scaling(prepare(config, write(tmp_path, columns())))
    known = math.log1p(4 * 3600)
    assert scaling.mean[1] == pytest.approx((4 * SENTINEL + 140 * known) / 144, rel=1e-6)
    gap_bins = np.flatnonzero(scaling.bin_value == 1)
    assert len(gap_bins) == 1  # from unknown to the one gap there is
    assert scaling.bin_low[gap_bins[0]] == pytest.approx(-math.log(2))
    assert 1 / scaling.bin_scale[gap_bins[0]] == pytest.approx(known + math.log(2), rel=1e-6)


def test_bins_follow_one_another_along_the_quantiles(tmp_path: Path) -> None:
    scaling, spec, _ = fit_scaling(prepare(config_of(ALL), write(tmp_path, columns())))
    amounts = np.log1p(np.arange(49, 145))
    assert spec.bins == len(scaling.bin_value) > 0
    for value in np.unique(scaling.bin_value):
        mine = scaling.bin_value == value
        low, width = scaling.bin_low[mine].astype(float), 1 / scaling.bin_scale[mine].astype(float)
        assert (width >= module.NARROWEST_BIN).all()
        np.testing.assert_allclose(low[1:], low[:-1] + width[:-1], rtol=1e-5, atol=1e-5)
    mine = scaling.bin_value == 0
    edges = np.quantile(amounts, [0, 0.25, 0.5, 0.75, 0.99, 0.999])
    np.testing.assert_allclose(scaling.bin_low[mine][:5], edges[: mine.sum()], rtol=1e-5)
    encoder = EventEncoder(spec)
    scaling.apply(encoder)
    values = torch.zeros(5, spec.values)
    values[:, 0] = torch.tensor([0.0, edges[0], (edges[0] + edges[1]) / 2, edges[2], 99.0])
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(encoder.bins(values)[:, :4].numpy(), expected, atol=1e-5)


def big(prepared: Prepared, rows: int, numeric: np.ndarray) -> Prepared:
    """The same configuration over many rows of one user, all of them train rows."""
    time = np.linspace(HISTORY_END, TRAIN_END - 1, rows).astype(np.int64)
    none = np.zeros(rows, dtype=bool)
    encoded = Encoded(
        time=time,
        numeric=numeric.astype(np.float32),
        categorical=np.empty((rows, 0), np.int32),
        context=np.empty((rows, 0), np.float32),
        begin=np.array([0]),
        end=np.array([rows]),
        arrival=np.arange(rows),
    )
    label = np.zeros(rows, dtype=np.int8)
    label[:: rows // 100] = 1
    return dataclasses.replace(prepared, encoded=encoded, rows=Rows(~none, ~none, none, none), label=label)


def test_a_column_that_never_changes_is_constant_also_over_many_rows(tmp_path: Path) -> None:
    """In float32 the mean of 400,000 times log(1.1) is off by 1e-4, and the column looked as if it varied by that:
    it was scaled by 3,000, so that the first other value in production became an enormous number."""
    prepared = prepare(config_of('numeric = ["amount"]'), write(tmp_path, columns()))
    scaling, _, _ = fit_scaling(big(prepared, 400_000, np.full((400_000, 1), 0.1)))
    assert scaling.mean[0] == pytest.approx(math.log(1.1), rel=1e-6)
    assert scaling.inverse_std[0] == 0
    assert 0 not in scaling.bin_value


def test_many_rows_are_sampled_but_every_missing_number_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(config_of('numeric = ["amount", "age"]\nbins = 3'), write(tmp_path, columns()))
    numeric = np.random.default_rng(0).lognormal(3, 1, (20_000, 2))
    numeric[777, 1] = np.nan
    many = big(prepared, 20_000, numeric)
    whole, _, _ = fit_scaling(many)
    monkeypatch.setattr(module, "FIT_ROWS", 5000)
    sampled, spec, _ = fit_scaling(many)
    assert spec.missing == (1,)
    assert sampled.mean.tolist() != whole.mean.tolist()
    np.testing.assert_allclose(sampled.mean[:2], whole.mean[:2], atol=0.05)
    np.testing.assert_allclose(sampled.inverse_std[:2], whole.inverse_std[:2], rtol=0.05)
    assert arrays(fit_scaling(many)[0]) == arrays(sampled)  # the same sample every time


# --- Missing numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "missing"),
    [(3, (1,)), (60, (1,)), (143, (1,)), (144, ()), (230, ())],
    ids=["history", "train", "last train row", "validation", "test"],
)
def test_a_number_may_be_missing_if_it_was_before_the_validation_days(
    tmp_path: Path, row: int, missing: tuple[int, ...]
) -> None:
    data = columns()
    data["age"] = np.array(data["age"], dtype=object)
    data["age"][row] = None
    data["age"] = data["age"].tolist()
    config = config_of('numeric = ["amount", "age"]')
    _, spec, _ = fit_scaling(prepare(config, write(tmp_path, data)))
    assert spec.missing == missing


def test_the_fill_value_is_the_median_of_the_training_rows(tmp_path: Path) -> None:
    data = columns()
    data["age"] = [None if 50 <= i < 90 else 1e6 if i >= 144 or i < 48 else float(i) for i in range(240)]
    scaling, spec, _ = fit_scaling(prepare(config_of('numeric = ["age"]'), write(tmp_path, data)))
    assert spec.missing == (0,)
    assert scaling.fill.tolist() == [np.median([48, 49, *range(90, 144)])]


@pytest.mark.parametrize("column", ["age", "lat"])
def test_a_column_without_a_value_in_the_training_rows_is_an_error(tmp_path: Path, column: str) -> None:
    data = columns()
    data[column] = [None if 48 <= i < 144 else 1.0 for i in range(240)]
    prepared = prepare(config_of(ALL), write(tmp_path, data))
    with pytest.raises(DataError, match=f"column '{column}' has no value in the training rows"):
        fit_scaling(prepared)


# --- Shapes ------------------------------------------------------------------------------------------------------


def stepped(
    tmp_path: Path, fraud: Callable[[np.ndarray, np.ndarray], np.ndarray], steps: int = 7
) -> tuple[Scaling, ModelSpec]:
    """Fitted on 4,000 rows whose amounts are 0 to 3999 in mixed order; `fraud` of amount and row."""
    rows = 4000
    amount = np.random.default_rng(0).permutation(rows).astype(float)
    row = np.arange(rows)
    data = {"user": [f"u{k % 4}" for k in row], "time": START + row * (10 * DAY // rows), "amount": amount,
            "fraud": fraud(amount, row).astype(int)}  # fmt: skip
    config = config_of(f'numeric = ["amount"]\nsteps = {steps}')
    scaling, spec, _ = fit_scaling(prepare(config, write(tmp_path, data)))
    return scaling, spec


def test_steps_are_where_the_share_of_frauds_changes_in_the_train_rows(tmp_path: Path) -> None:
    scaling, spec = stepped(tmp_path, lambda amount, row: (amount >= 3000) | (row % 50 == 0))
    assert spec.steps == len(scaling.step_threshold)
    assert min(abs(scaling.step_threshold[scaling.step_value == 0] - 2999.5)) < 5
    # of the gap, which says nothing of a fraud, steps are what chance left
    assert set(scaling.step_value.tolist()) <= {0, 1}


def test_labels_of_validation_and_test_rows_do_not_move_steps(tmp_path: Path) -> None:
    def later_differ(amount: np.ndarray, row: np.ndarray) -> np.ndarray:
        early = START + row * (10 * DAY // len(row)) < TRAIN_END
        return np.where(early, amount >= 3000, amount < 500)

    one, _ = stepped(tmp_path, later_differ)
    other, _ = stepped(tmp_path, lambda amount, row: amount >= 3000)
    assert one.step_threshold.tolist() == other.step_threshold.tolist()


def test_no_steps_where_none_are_asked_for(tmp_path: Path) -> None:
    scaling, spec = stepped(tmp_path, lambda amount, row: amount >= 3000, steps=0)
    assert spec.steps == len(scaling.step_value) == 0


def test_the_models_shapes_follow_from_the_configuration_and_the_data(tmp_path: Path) -> None:
    rest = """
[model]
hidden = 5
layers = 2
input_width = 6
head_width = 7
embedding = 2
[training]
dropout = 0.25
"""
    scaling, spec, graph = fit_scaling(prepare(config_of(ALL, rest=rest), write(tmp_path, columns())))
    assert dataclasses.replace(spec, bins=0, steps=0).as_dict() == {
        "numeric": 4, "places": 1, "context": 9, "vocabularies": (5,), "missing": (), "bins": 0, "hidden": 5, "members": 1,
        "layers": 2, "input_width": 6, "head_width": 7, "embedding": 2, "dropout": 0.25,
        "forecast": True, "steps": 0,
    }  # fmt: skip
    assert spec.values == 2 + 9 + 1 + 2 == len(scaling.mean)
    assert (graph.numeric, graph.categorical, graph.context) == (4, 1, 9)
    assert [s.axes for s in graph.states] == [(2, "B", 5), ("B",), ("B", 2)]


# --- Errors ------------------------------------------------------------------------------------------------------


def test_a_configuration_or_file_without_labels_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, columns())
    with pytest.raises(DataError, match=r"training needs labels: the configuration has no data\.label"):
        prepare(config_of('numeric = ["amount"]', data=DATA.replace('label = "fraud"', "")), path)
    with pytest.raises(DataError, match="there is no column 'chargeback'"):
        prepare(config_of('numeric = ["amount"]', data=DATA.replace('"fraud"', '"chargeback"')), path)


def test_a_configuration_without_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"section \[split\] is missing"):
        prepare(config_of('numeric = ["amount"]', split=""), write(tmp_path, columns()))


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    empty = pa.table({k: pa.array(v)[:0] for k, v in columns().items()})
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no rows; expected at least one transaction"):
        prepare(config_of('numeric = ["amount"]'), tmp_path / "empty.parquet")


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_only_is_an_error(tmp_path: Path, value: int) -> None:
    data = columns() | {"fraud": [value] * 240}
    word = "honest transaction" if value else "fraud"
    with pytest.raises(DataError, match=f"the train rows .* hold no {word}; expected both classes"):
        prepare(config_of('numeric = ["amount"]'), write(tmp_path, data))


@pytest.mark.parametrize("day", ["2024-12-01", "2025-01-03", "2025-03-01"])
def test_a_train_end_outside_the_data_is_an_error(tmp_path: Path, day: str) -> None:
    split = f'[split]\ntrain_end = {day}\nvalidation = "2d"'
    with pytest.raises(ConfigError, match="the data reach from 2025-01-01T00:00:00Z to 2025-01-10T23:00:00Z, but"):
        prepare(config_of('numeric = ["amount"]', split=split), write(tmp_path, columns()))


def test_labels_known_only_after_the_test_begins_are_not_fitted(tmp_path: Path) -> None:
    """Through the column data.label_known_at: the row is there as history, its label is not used."""
    data = columns()
    known_at = np.array(data["time"]) + HOUR
    late = [49, 56, 150]  # 49 and 56 are multiples of 7: frauds
    known_at[late] = START + 9 * DAY + 1  # a millisecond after the test begins
    known_at[63] = START + 9 * DAY
    data["known_at"] = known_at
    config = config_of('numeric = ["amount"]', data=DATA + 'label_known_at = "known_at"')
    prepared = prepare(config, write(tmp_path, data))
    row = prepared.encoded.arrival
    assert sorted(row[prepared.rows.before_validation & ~prepared.rows.train].tolist()) == [49, 56]
    assert sorted(set(range(144, 192)) - set(row[prepared.rows.validation].tolist())) == [150]
    assert prepared.rows.train[row == 63].all()


# --- Memory ------------------------------------------------------------------------------------------------------

BYTES_PER_ROW = 380
"""At most, above the imports, for 400,000 rows with one context column of four half-lives. Measured: 298, of which 85 are
blocks and buffers that do not grow with the rows. When 24 million rows peaked at 8.27 GiB, it was 454."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_preparing_needs_few_bytes_per_row(tmp_path: Path) -> None:
    """Every int64 [N] that lives while the contexts are filled is 8 of them, 0.2 GB of 24 million rows."""
    file = tmp_path / "transactions.parquet"
    simulate_to(Simulation(users=3_400), file)
    words = [sys.executable, "-m", "benchmarks.preparation", "--measure", str(file)]
    measured = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)
    assert measured["rows"] > 400_000
    assert measured["bytes_per_row"] < BYTES_PER_ROW


def test_what_looks_like_a_card_is_never_in_a_vocabulary(tmp_path: Path) -> None:
    """The service would hash it and so find it unseen; said in the report, for it may be a merchant's number."""
    card = "4111111111111111"
    kinds = [("a", card, "c")[k % 3] for k in range(240)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({**columns(), "kind": kinds}), path)
    features = 'numeric = ["amount"]\ncategorical = ["kind"]\nmin_count = 1'
    prepared = prepare(config_of(features), path)
    assert prepared.vocabularies == (Vocabulary("kind", ("a", "c")),)
    (finding,) = [f for f in prepared.cleaning["findings"] if f["reason"] == "looks like a card number"]
    assert (finding["column"], finding["rows"], finding["examples"]) == ("kind", 80, ["row 2"])
    assert finding["share"] == 80 / 240
    assert card not in json.dumps(prepared.cleaning)
    kept = prepare(config_of(features, rest='[identifiers]\ncolumns = { kind = "keep" }'), path)
    assert set(kept.vocabularies[0].values) == {"a", "c", card}
