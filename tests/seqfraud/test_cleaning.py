"""Every kind of dirty input: what becomes of it under each policy, and that it is counted with an example."""

import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


FORMATS = ["csv", "parquet"]


def write(file: Path, rows: list[str]) -> Path:
    """The rows as a file of its kind; a Parquet column has a type of its own where all of its cells allow it."""
    if file.suffix == ".csv":
        file.write_text("\n".join([HEADER, *rows]) + "\n")
        return file
    cells = zip(*([cell or None for cell in row.split(",")] for row in rows), strict=True)
    columns = {name: pa.array(values, pa.string()) for name, values in zip(HEADER.split(","), cells, strict=True)}
    for name, kind in (("id", pa.int64()), ("time", pa.timestamp("us")), ("amount", pa.float64()), ("age", pa.int32()),
                       ("fraud", pa.int8()), ("known", pa.timestamp("us"))):  # fmt: skip
        with suppress(pa.ArrowInvalid):
            columns[name] = columns[name].cast(kind)
    pq.write_table(pa.table(columns), file)
    return file


def read(file: Path, config: str = CONFIG, **policy: Any) -> tuple[Transactions, dict[str, Any]]:
    parsed = parse_config(config, "test")
    table, problems = read_transactions(file, schema_of(parsed), parsed.data)
    cleaned, report = clean(table, problems, CleaningConfig(**policy))
    assert report["rows_used"] == len(cleaned)
    return cleaned, report


def run(
    tmp_path: Path, rows: list[str], config: str = CONFIG, form: str = "csv", **policy: Any
) -> tuple[Transactions, list[dict[str, Any]]]:
    """Clean a file of the rows; the table and the findings."""
    cleaned, report = read(write(tmp_path / f"data.{form}", rows), config, **policy)
    assert report["rows_read"] == len(rows)
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


Dirty = tuple[str, str, str, str, str]
DIRTY: list[Dirty] = [
    ("user", "", "missing user", "bad_row", "text that is not empty or a whole number"),
    ("time", "", "missing time", "bad_row", "an ISO 8601 time"),
    ("time", "yesterday", "unreadable time", "bad_row", "an ISO 8601 time"),
    ("id", "", "missing id", "bad_row", "text that is not empty or a whole number"),
    ("amount", "ten", "not a number", "bad_number", "a number"),
    ("amount", "inf", "infinite number", "bad_number", "a finite number"),
    ("amount", "-inf", "infinite number", "bad_number", "a finite number"),  # once, not as negative too
    ("amount", "1e+300", "number beyond 1e+30", "bad_number", "a number between -1e+30 and 1e+30"),
    ("age", "", "missing number", "missing_number", "a number"),
    ("amount", "-3", "negative amount", "negative_amount", "0 or more"),
    ("fraud", "2", "label neither 0 nor 1", "bad_label", "0, 1 or nothing"),
    ("fraud", "yes", "label neither 0 nor 1", "bad_label", "0, 1 or nothing"),
    ("known", "soon", "unreadable label time", "bad_label", "an ISO 8601 time"),
]
"""Column, cell, reason, policy, what is expected."""
VALUES = {
    key: typing.get_args(hint) for key, hint in typing.get_type_hints(CleaningConfig).items() if hint is not float
}
DEFAULTS = CleaningConfig()
ACTIONS = {"drop": "dropped", "missing": "set to missing", "unknown": "label unknown", "keep": "kept"}


def test_every_policy_is_tried() -> None:
    """Each of [cleaning] with values to choose from decides about something below."""
    assert set(VALUES) == {key for *_, key, _ in DIRTY} | {"repeated"}
    assert {value for values in VALUES.values() for value in values} == {*ACTIONS, "error"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("dirty", "value"),
    [(dirty, value) for dirty in DIRTY for value in VALUES[dirty[3]]],
    ids=lambda x: x if isinstance(x, str) else f"{x[2]}={x[1]}",
)
def test_dirty_cell(tmp_path: Path, dirty: Dirty, value: str, form: str) -> None:
    """One bad cell under each value of its policy: counted, shown, and what is left of its row."""
    column, cell, reason, key, expected = dirty
    rows = changed(7, column, cell)
    if value == "error":
        with pytest.raises(DataError) as refusal:
            run(tmp_path, rows, form=form, **{key: value})
        start, _, rest = str(refusal.value).partition("; ")
        assert start.startswith(f"column {column!r}: {reason} in 1 of 30 rows, first in row 8: ")
        assert cell in start
        assert rest == f'expected {expected}; cleaning.{key} is "error"'
        return
    table, findings = run(tmp_path, rows, form=form, **{key: value})
    if getattr(DEFAULTS, key) == value:
        assert findings == run(tmp_path, rows, form=form)[1], "what is left out of the configuration is the default"
    # a kept -3 is far from the other amounts too
    (finding,) = [f for f in findings if f["reason"] != "outlier"]
    assert (finding["reason"], finding["column"], finding["rows"], finding["action"]) == (
        reason, column, 1, ACTIONS[value]
    )  # fmt: skip
    assert finding["share"] == pytest.approx(1 / 30)
    (example,) = finding["examples"]
    assert example.startswith("row 8: ")
    assert cell in example
    assert table.file_row.tolist() == [i for i in range(30) if value != "drop" or i != 7]
    row = 7 if value != "drop" else None
    missing = row if value == "missing" or reason == "missing number" else None
    number = {"amount": 0, "age": 1}.get(column, 0)
    assert np.argwhere(np.isnan(table.numbers)).tolist() == ([] if missing is None else [[7, number]])
    assert table.label is not None
    assert np.flatnonzero(table.label == -1).tolist() == ([7] if value == "unknown" else [])
    if reason == "negative amount" and row is not None:
        assert table.numbers[7, 0] == -3


@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_label_is_unknown_and_counted_whatever_the_policy(tmp_path: Path, form: str) -> None:
    """No label yet is no mistake: the newest rows of most files have none."""
    for value in VALUES["bad_label"]:
        table, (finding,) = run(tmp_path, changed(7, "fraud", ""), form=form, bad_label=value)
        assert (finding["reason"], finding["rows"], finding["action"]) == ("missing label", 1, "label unknown")
        assert table.label is not None
        assert np.flatnonzero(table.label == -1).tolist() == [7]


def test_examples_are_the_first_few_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [row if i < 4 or i % 5 else row.replace(f",{10 + i}.5,", ",ten,") for i, row in enumerate(GOOD)]
    _, (finding,) = run(tmp_path, rows)
    assert finding["rows"] == 5
    assert finding["examples"] == ["row 6: 'ten'", "row 11: 'ten'", "row 16: 'ten'"]


def test_a_row_with_two_problems_is_counted_for_both_and_dropped_once(tmp_path: Path) -> None:
    rows = changed(7, "user", "")
    rows[7] = rows[7].replace("17.5", "ten")
    table, findings = run(tmp_path, rows, bad_number="drop")
    assert {(f["reason"], f["rows"]) for f in findings} == {("missing user", 1), ("not a number", 1)}
    assert len(table) == 29


def test_a_bad_number_that_was_set_to_missing_is_not_dropped_as_missing(tmp_path: Path) -> None:
    table, _ = run(tmp_path, changed(7, "amount", "ten"), bad_number="missing", missing_number="drop")
    assert len(table) == 30


def test_texts_that_are_no_ip_addresses_are_counted(tmp_path: Path) -> None:
    config = CONFIG.replace('context = ["shop"]', 'ip = ["shop"]')
    shops = {4: "localhost", 6: "4111111111111111"}
    rows = [row.replace(f",s{i % 2},", f",{shops.get(i, '192.0.2.7')},") for i, row in enumerate(GOOD)]
    table, (finding,) = run(tmp_path, rows, config)
    assert (finding["reason"], finding["column"], finding["action"]) == (
        "not an IP address", "shop", "kept without a network"
    )  # fmt: skip
    assert finding["examples"] == ["row 5: 'localhost'", "row 7: (looks like a card number)"]
    assert len(table) == 30


@pytest.mark.parametrize("form", FORMATS)
def test_repetitions(tmp_path: Path, form: str) -> None:
    """The first in arrival order stays, also where a later row of the file is older."""
    rows = [*GOOD, GOOD[3], "4,u1,2025-01-01 00:00:04,99,24,k,s0,0,", "29,u2,2024-12-31 23:00:00,1,1,k,s0,0,"]
    table, findings = run(tmp_path, rows, form=form)
    assert len(table) == 30
    by_reason = {f["reason"]: f for f in findings}
    assert by_reason["repeated id"]["rows"] == 1
    assert by_reason["repeated id"]["examples"] == ["row 31: also in row 4"]
    assert by_reason["repeated id, other content"]["rows"] == 2
    assert 32 in table.file_row
    assert 29 not in table.file_row
    with pytest.raises(DataError) as refusal:
        run(tmp_path, rows, form=form, repeated="error")
    assert str(refusal.value) == (
        "column 'id': repeated id in 1 of 33 rows, first in row 31: also in row 4; expected each id once; "
        'cleaning.repeated is "error"'
    )


def test_repetitions_without_an_id_column(tmp_path: Path) -> None:
    config = CONFIG.replace('transaction = "id"\n', "")
    same_but_the_amount = GOOD[3].replace("13.5", "13.6")
    table, findings = run(tmp_path, [*GOOD, GOOD[3], same_but_the_amount], config)
    assert len(table) == 31
    assert [(f["reason"], f["rows"]) for f in findings if f["reason"].startswith("rep")] == [("repeated id", 1)]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_out_of_order_are_sorted_and_counted(tmp_path: Path, form: str) -> None:
    rows = [*GOOD[:10], GOOD[20], *GOOD[10:20], *GOOD[21:]]
    table, findings = run(tmp_path, rows, form=form)
    assert [(f["reason"], f["rows"], f["action"]) for f in findings] == [("out of order", 10, "sorted by time")]
    assert findings[0]["examples"] == ["row 12: 10 s late", "row 13: 9 s late", "row 14: 8 s late"]
    assert (np.diff(table.time) >= 0).all()


@pytest.mark.parametrize("form", FORMATS)
def test_outliers_are_kept_and_shown(tmp_path: Path, form: str) -> None:
    table, findings = run(tmp_path, changed(9, "amount", "5e9"), form=form)
    assert [(f["reason"], f["column"], f["rows"], f["action"]) for f in findings] == [("outlier", "amount", 1, "kept")]
    assert findings[0]["examples"] == ["row 10: 5e+09"]
    assert table.numbers[9, 0] == 5e9


def test_too_many_dropped_rows_are_an_error(tmp_path: Path) -> None:
    rows = [row.replace(f",u{i % 3},", ",,") if i < 10 else row for i, row in enumerate(GOOD)]
    with pytest.raises(
        DataError,
        match=r"33\.3% of 30 rows would be dropped.*'user', missing user, 10 rows, such as row 1: None; expected text",
    ):
        run(tmp_path, rows)
    table, _ = run(tmp_path, rows, most_dropped=0.5)
    assert len(table) == 20


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row is left; most for: column 'time', unreadable time, 1 rows, such as row 1: "
                                        r"'1\.5'; expected an ISO 8601 time"):  # fmt: skip
        run(tmp_path, ["1,u,1.5,1,1,k,s,0,"], most_dropped=1.0)
