"""Permutation importance: what is permuted, what is not, and what it says of inputs that are known to matter or not."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from seqfraud.config import parse_config
from seqfraud.errors import RunError
from seqfraud.metrics import average_precision
from seqfraud.nn.model import SequenceModel
from training.importance import (
    FILE,
    Importance,
    Input,
    inputs_of,
    measure_importance,
    read_importance,
    validation_days,
    with_permuted,
)
from training.loop import DeviceData, Fitted, fit, score_logits
from training.prepare import Prepared, fit_scaling, prepare
from training.run import write_json

torch.set_num_threads(1)

DAY = 86_400_000
START = 1_735_689_600_000  # 2025-01-01
CPU = torch.device("cpu")
CONFIG = """
[data]
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_delay = "1d"
amount = "amount"
[features]
numeric = ["amount", "noise"]
categorical = ["kind", "dice"]
context = ["shop"]
ip = ["ip"]
geo = [["lat", "long"]]
context_inputs = ["count", "amount", "fraud", "honest", "run"]  # the ratio would tell the transaction's own amount
half_lives = ["1d"]
bins = 4
[split]
train_start = 2025-01-03
train_end = 2025-01-23
validation = "6d"
test_end = 2025-01-27
[model]
hidden = 8
input_width = 16
head_width = 16
[training]
epochs = 6
learning_rate = 2e-2
users_per_batch = 8
events_per_chunk = 16
"""
AMOUNT, NOISE = Input("numeric", ("amount",)), Input("numeric", ("noise",))
KIND, DICE = Input("categorical", ("kind",)), Input("categorical", ("dice",))
SHOP, IP, PLACE = Input("context", ("shop",)), Input("ip", ("ip",)), Input("geo", ("lat", "long"))


def make_data(rows: int = 1600) -> pa.Table:
    """Thirty days; a large amount of kind "web" is fraud, and nothing else says anything."""
    rng = np.random.default_rng(0)
    amount = rng.choice([5.0, 20.0, 300.0], rows, p=[0.3, 0.4, 0.3])
    web = rng.random(rows) < 0.4
    labels = (web & (amount == 300.0)).astype(int)
    return pa.table(
        {
            "user": rng.integers(0, 30, rows),
            "time": np.sort(rng.integers(START, START + 30 * DAY, rows)),
            "amount": amount,
            "noise": [None if x < 0.1 else x for x in rng.random(rows)],
            "kind": np.where(web, "web", "shop"),
            "dice": [f"d{d}" for d in rng.integers(1, 7, rows)],
            "shop": [f"s{s}" for s in rng.integers(0, 9, rows)],
            "ip": [f"10.0.{i}.1" for i in rng.integers(0, 9, rows)],
            "lat": 50 + rng.random(rows),
            "long": 8 + rng.random(rows),
            "fraud": [None if i % 13 == 0 else int(label) for i, label in enumerate(labels)],
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    path = tmp_path_factory.mktemp("importance") / "data.parquet"
    pq.write_table(make_data(), path)
    prepared = prepare(parse_config(CONFIG, "config.toml"), path)
    torch.manual_seed(0)
    scaling, spec, graph = fit_scaling(prepared)
    model = SequenceModel(spec, graph)
    scaling.apply(model.encoder)
    return Fitted(prepared, model, fit(model, prepared, CPU, prepared.config.training))


@pytest.fixture(scope="module")
def measured(trained: Fitted) -> Importance:
    return measure_importance(trained.model, trained.prepared, CPU, repeats=3)


def in_validation(prepared: Prepared) -> npt.NDArray[np.bool_]:
    time, split = prepared.encoded.time, prepared.split
    return (time >= split.validation_start) & (time < split.train_end)


def test_what_the_label_is_made_of_matters_and_noise_does_not(measured: Importance) -> None:
    by_input = {figure.input: figure for figure in measured.figures}
    assert set(by_input) == {AMOUNT, NOISE, KIND, DICE, SHOP, IP, PLACE}
    assert measured.average_precision > 0.9
    for one, figure in by_input.items():
        if one in (AMOUNT, KIND):
            assert figure.mean > 0.3
            assert figure.mean > 5 * figure.deviation
        else:
            assert abs(figure.mean) < 0.1
    means = [figure.mean for figure in measured.figures]
    assert means == sorted(means, reverse=True)


def test_figures_are_differences_to_the_rows_as_they_are(trained: Fitted, measured: Importance) -> None:
    """With every event unpermuted, scored from the very first one."""
    prepared = trained.prepared
    mask = prepared.rows.validation
    logits = score_logits(trained.model, DeviceData(prepared.encoded, CPU), prepared.encoded, 1000)
    assert measured.average_precision == pytest.approx(average_precision(prepared.label[mask], logits[mask]), abs=1e-6)
    assert measured.rows == mask.sum()
    assert measured.frauds == (prepared.label[mask] == 1).sum()
    assert measured.permuted_rows == in_validation(prepared).sum() > measured.rows  # the unlabelled ones too
    assert sum(len(set(figure.permuted)) > 1 for figure in measured.figures) > 1  # noise may change nothing
    for figure in measured.figures:
        assert figure.mean == pytest.approx(measured.average_precision - np.mean(figure.permuted))
        assert figure.deviation == pytest.approx(np.std(figure.permuted, ddof=1))


@pytest.mark.parametrize(
    ("one", "array", "columns"),
    [
        (NOISE, "numeric", [1]),
        (PLACE, "numeric", [2, 3]),
        (DICE, "categorical", [1]),
        (SHOP, "context", list(range(8))),
        (IP, "context", list(range(8, 16))),
    ],
)
def test_the_permuted_figure_is_that_of_a_whole_walk(
    trained: Fitted, measured: Importance, one: Input, array: str, columns: list[int]
) -> None:
    """A slow reference: whole histories, in which the input's columns are exchanged among the validation days' rows."""
    prepared = trained.prepared
    rows = np.flatnonzero(in_validation(prepared))
    order = np.random.default_rng((0, 0)).permutation(len(rows))
    values = getattr(prepared.encoded, array).copy()
    values[np.ix_(rows, columns)] = values[np.ix_(rows[order], columns)]
    changed = dataclasses.replace(prepared.encoded, **{array: values})
    logits = score_logits(trained.model, DeviceData(changed, CPU), changed, 1000)
    mask = prepared.rows.validation
    expected = average_precision(prepared.label[mask], logits[mask])
    figure = next(figure for figure in measured.figures if figure.input == one)
    assert figure.permuted[0] == pytest.approx(expected, abs=1e-5)


def test_values_come_from_validation_rows_only(trained: Fitted) -> None:
    """A column that never changes in the validation days cannot be permuted there, however it changed before."""
    prepared = trained.prepared
    numeric = prepared.encoded.numeric.copy()
    numeric[in_validation(prepared), 0] = 300.0
    still = dataclasses.replace(prepared, encoded=dataclasses.replace(prepared.encoded, numeric=numeric))
    found = {f.input: f for f in measure_importance(trained.model, still, CPU, repeats=2).figures}
    assert (found[AMOUNT].mean, found[AMOUNT].deviation) == (0, 0)
    assert found[KIND].mean > 0.1


def test_rows_after_the_validation_days_are_not_read(trained: Fitted, measured: Importance) -> None:
    prepared = trained.prepared
    encoded = prepared.encoded
    later = encoded.time >= prepared.split.train_end
    assert later.sum() > 100
    spoilt = {name: getattr(encoded, name).copy() for name in ("numeric", "categorical", "context")}
    spoilt["numeric"][later] = np.nan
    spoilt["categorical"][later] = 0
    spoilt["context"][later] = 1e9
    label = prepared.label.copy()
    label[later] = 1 - label[later]
    other = dataclasses.replace(prepared, encoded=dataclasses.replace(encoded, **spoilt), label=label)
    assert measure_importance(trained.model, other, CPU, repeats=3) == measured


def test_a_permutation_keeps_the_values_and_all_other_columns(trained: Fitted) -> None:
    prepared = trained.prepared
    days = validation_days(trained.model, prepared, CPU).encoded
    order = np.random.default_rng(1).permutation(len(days))
    moved = with_permuted(days, prepared, PLACE, order)
    np.testing.assert_array_equal(moved.numeric[:, 2:], days.numeric[order, 2:])  # latitude with its longitude
    np.testing.assert_array_equal(moved.numeric[:, :2], days.numeric[:, :2])
    for name in ("time", "categorical", "context", "begin", "end"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(days, name))
    assert inputs_of(prepared.config.features) == (AMOUNT, NOISE, KIND, DICE, SHOP, IP, PLACE)


def test_the_same_seed_gives_the_same_figures_and_another_one_others(trained: Fitted, measured: Importance) -> None:
    other = measure_importance(trained.model, trained.prepared, CPU, repeats=3, seed=1)
    assert other.average_precision == measured.average_precision
    assert other.figures[0].permuted != measured.figures[0].permuted
    assert measure_importance(trained.model, trained.prepared, CPU, repeats=3, seed=1) == other


def test_the_file_gives_back_what_was_written(measured: Importance, tmp_path: Path) -> None:
    assert read_importance(tmp_path) is None
    write_json(tmp_path / FILE, measured.as_dict())
    assert read_importance(tmp_path) == measured
    (tmp_path / FILE).write_text('{"figures": 3}')
    with pytest.raises(RunError, match="cannot be read; run seqfraud importance again"):
        read_importance(tmp_path)
