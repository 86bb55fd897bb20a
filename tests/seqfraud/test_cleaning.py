"""Every kind of dirty input: what becomes of it under each policy, and that it is counted with an example."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.cleaning import clean
from seqfraud.config import CleaningConfig, parse_config
from seqfraud.errors import DataError
from seqfraud.reading import read_transactions
from seqfraud.schema import schema_of
from seqfraud.table import Transactions

CONFIG = """
[data]
transaction = "id"
user = "user"
time = "time"
label = "fraud"
label_known_at = "known"
amount = "amount"
[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["shop"]
"""
HEADER = "id,user,time,amount,age,kind,shop,fraud,known"
GOOD = [f"{i},u{i % 3},2025-01-01 00:00:{i:02d},{10 + i}.5,{20 + i % 7},k,s{i % 2},{int(i == 5)}," for i in range(30)]


def run(
    tmp_path: Path, rows: list[str], config: str = CONFIG, **policy: Any
) -> tuple[Transactions, list[dict[str, Any]]]:
    """Clean a CSV of the rows; the table and the findings."""
    file = tmp_path / "data.csv"
    file.write_text("\n".join([HEADER, *rows]) + "\n")
    parsed = parse_config(config, "test")
    table, problems = read_transactions(file, schema_of(parsed), parsed.data)
    cleaned, report = clean(table, problems, CleaningConfig(**policy))
    assert report["rows_read"] == len(rows)
    assert report["rows_used"] == len(cleaned)
    return cleaned, report["findings"]


def changed(index: int, column: str, value: str) -> list[str]:
    """The good rows with one cell replaced."""
    cells = GOOD[index].split(",")
    cells[HEADER.split(",").index(column)] = value
    return [*GOOD[:index], ",".join(cells), *GOOD[index + 1 :]]


def test_good_rows_are_all_used(tmp_path: Path) -> None:
    table, findings = run(tmp_path, GOOD)
    assert len(table) == 30
    assert findings == []


DIRTY = [
    ("user", "", "missing user", "bad_row", "dropped"),
    ("time", "", "missing time", "bad_row", "dropped"),
    ("time", "yesterday", "unreadable time", "bad_row", "dropped"),
    ("id", "", "missing id", "bad_row", "dropped"),
    ("amount", "ten", "not a number", "bad_number", "set to missing"),
    ("amount", "inf", "infinite number", "bad_number", "set to missing"),
    ("amount", "1e300", "number beyond", "bad_number", "set to missing"),
    ("age", "", "missing number", "missing_number", "kept"),
    ("amount", "-3", "negative amount", "negative_amount", "kept"),
    ("fraud", "2", "label neither 0 nor 1", "bad_label", "label unknown"),
    ("fraud", "yes", "label neither 0 nor 1", "bad_label", "label unknown"),
    ("known", "soon", "unreadable label time", "bad_label", "label unknown"),
]


@pytest.mark.parametrize(("column", "value", "reason", "key", "action"), DIRTY)
def test_dirty_cell(tmp_path: Path, column: str, value: str, reason: str, key: str, action: str) -> None:
    rows = changed(7, column, value)
    table, findings = run(tmp_path, rows)
    # -3 is far from the other amounts too
    (finding,) = [f for f in findings if f["reason"] != "outlier"]
    assert finding["reason"].startswith(reason)
    assert (finding["column"], finding["rows"], finding["action"]) == (column, 1, action)
    assert finding["share"] == pytest.approx(1 / 30)
    assert finding["examples"][0].startswith("row 8: ")
    used = {"dropped": 29}.get(action, 30)
    assert len(table) == used
    assert (7 in table.file_row) == (used == 30)
    if action == "set to missing":
        assert np.flatnonzero(np.isnan(table.numbers[:, 0])).tolist() == [7]
    if action == "label unknown":
        assert table.label is not None
        assert np.flatnonzero(table.label == -1).tolist() == [7]
    with pytest.raises(
        DataError, match=rf"column '{column}': {reason}.* in 1 of 30 rows, first in row 8: .*cleaning.{key}"
    ):
        run(tmp_path, rows, **{key: "error"})


@pytest.mark.parametrize(("column", "value", "reason", "key", "action"), [d for d in DIRTY if d[3] != "bad_row"])
def test_dirty_cell_dropped_on_request(
    tmp_path: Path, column: str, value: str, reason: str, key: str, action: str
) -> None:
    table, findings = run(tmp_path, changed(7, column, value), **{key: "drop"})
    assert 7 not in table.file_row
    assert len(table) == 29
    assert findings[0]["action"] == "dropped"


def test_repetitions(tmp_path: Path) -> None:
    """The first in arrival order stays, also where a later row of the file is older."""
    rows = [*GOOD, GOOD[3], "4,u1,2025-01-01 00:00:04,99,24,k,s0,0,", "29,u2,2024-12-31 23:00:00,1,1,k,s0,0,"]
    table, findings = run(tmp_path, rows)
    assert len(table) == 30
    by_reason = {f["reason"]: f for f in findings}
    assert by_reason["repeated id"]["rows"] == 1
    assert by_reason["repeated id"]["examples"] == ["row 31: also in row 4"]
    assert by_reason["repeated id, other content"]["rows"] == 2
    assert 32 in table.file_row
    assert 29 not in table.file_row
    with pytest.raises(DataError, match="repeated id"):
        run(tmp_path, rows, repeated="error")


def test_repetitions_without_an_id_column(tmp_path: Path) -> None:
    config = CONFIG.replace('transaction = "id"\n', "")
    same_but_the_amount = GOOD[3].replace("13.5", "13.6")
    table, findings = run(tmp_path, [*GOOD, GOOD[3], same_but_the_amount], config)
    assert len(table) == 31
    assert [(f["reason"], f["rows"]) for f in findings if f["reason"].startswith("rep")] == [("repeated id", 1)]


def test_rows_out_of_order_are_sorted_and_counted(tmp_path: Path) -> None:
    rows = [*GOOD[:10], GOOD[20], *GOOD[10:20], *GOOD[21:]]
    table, findings = run(tmp_path, rows)
    assert [(f["reason"], f["rows"], f["action"]) for f in findings] == [("out of order", 10, "sorted by time")]
    assert (np.diff(table.time) >= 0).all()


def test_outliers_are_kept_and_shown(tmp_path: Path) -> None:
    table, findings = run(tmp_path, changed(9, "amount", "5e9"))
    assert [(f["reason"], f["column"], f["rows"], f["action"]) for f in findings] == [("outlier", "amount", 1, "kept")]
    assert findings[0]["examples"] == ["row 10: 5e+09"]
    assert table.numbers[9, 0] == 5e9


def test_too_many_dropped_rows_are_an_error(tmp_path: Path) -> None:
    rows = [row.replace(f",u{i % 3},", ",,") if i < 10 else row for i, row in enumerate(GOOD)]
    with pytest.raises(
        DataError, match=r"33\.3% of 30 rows would be dropped.*'user', missing user, 10 rows, such as row 1"
    ):
        run(tmp_path, rows)
    table, _ = run(tmp_path, rows, most_dropped=0.5)
    assert len(table) == 20


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left"):
        run(tmp_path, ["1,,2025-01-01,1,1,k,s,0,"], most_dropped=1.0)
