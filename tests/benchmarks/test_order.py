"""The benchmark of order: its features, and the whole of it on a small simulation."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.quality.order import SIMULATION, compared, read_data, told
from training.baselines import Material
from training.prepare import Prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    small = replace(SIMULATION, users=30, fraud_share=0.05)
    return read_data(small, tmp_path_factory.mktemp("order"), epochs=1)


def test_told_trees_know_when_each_category_was_last_bought(prepared: Prepared) -> None:
    material = Material(prepared)
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


def test_the_trees_see_three_events_back(prepared: Prepared) -> None:
    names = Material(prepared).binned().names
    for lag in (1, 2, 3):
        for name in (f"seconds since {lag} before", f"amount {lag} before", f"category {lag} before id"):
            assert name in names


def test_everything_is_compared_on_the_same_rows(prepared: Prepared) -> None:
    rows = np.flatnonzero(prepared.rows.test)
    result = compared(prepared, rows, seeds=1, iterations=5)
    assert (result["rows"], result["frauds"]) == (len(rows), int(prepared.label[rows].sum()))
    run = result["runs"][0]
    for other in ("trees", "told_trees", "without_recurrence"):
        figure = (run if other in run else result)[other]["estimate"]
        assert run["gru_minus"][other]["difference"] == pytest.approx(run["gru"]["estimate"] - figure)
        assert result["summary"]["least_lead"][other] == run["gru_minus"][other]["difference"]
