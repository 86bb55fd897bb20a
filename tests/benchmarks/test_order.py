"""The benchmark of order: its features, and the whole of it on a small simulation."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality.order import SIMULATION, comparison, parts_of, read_data, told
from training.baselines import Material
from training.prepare import Prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    small = replace(SIMULATION, users=30, fraud_share=0.05)
    return read_data(small, tmp_path_factory.mktemp("order"), epochs=1)


@pytest.fixture(scope="module")
def material(prepared: Prepared) -> Material:
    train, validation, test = parts_of(prepared)
    return Material(prepared, train, np.r_[validation, test], most=len(train))


def test_told_trees_know_when_each_category_was_last_bought(prepared: Prepared, material: Material) -> None:
    features = told(prepared, material, material.history)
    encoded = prepared.encoded
    begin = np.repeat(encoded.begin, encoded.lengths())
    codes = np.unique(encoded.categorical[:, 0]).tolist()
    columns = features.values[:, -len(codes) :]
    for at in range(0, len(material.rows), 97):
        row = material.rows[at]
        past = np.arange(begin[row], row)
        for c, code in enumerate(codes):
            same = past[encoded.categorical[past, 0] == code]
            expected = (encoded.time[row] - encoded.time[same[-1]]) / 1000 if len(same) else np.nan
            assert columns[at, c] == pytest.approx(expected, rel=1e-6, nan_ok=True), (row, code)


def test_the_trees_see_three_events_back(material: Material) -> None:
    names = material.binned().names
    for lag in (1, 2, 3):
        for name in (f"seconds since {lag} before", f"amount {lag} before", f"category {lag} before id"):
            assert name in names


def test_everything_is_compared_on_the_same_rows(prepared: Prepared) -> None:
    rows = np.flatnonzero(prepared.rows.test)
    result = comparison(prepared, rows, seeds=1, iterations=5)
    models, differences = result["models"], result["differences"]
    assert list(models) == ["gru", "without_recurrence", "trees", "told_trees"]
    for name, figures in models.items():
        assert (figures["rows"], figures["frauds"]) == (len(rows), int(prepared.label[rows].sum()))
        if name != "gru":
            lead = models["gru"]["average_precision"] - figures["average_precision"]
            assert differences[name]["average_precision"] == pytest.approx(lead)
