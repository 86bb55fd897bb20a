"""Awkward files: what is read as it should be, and what is refused in one line with column, value and what is expected."""

import gzip
import re
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfraud.cleaning import clean
from seqfraud.cli import main
from seqfraud.config import CleaningConfig, parse_config
from seqfraud.errors import DataError
from seqfraud.reading import read_transactions
from seqfraud.schema import schema_of
from seqfraud.table import Transactions

CONFIG = """
[data]
path = "."
transaction = "id"
user = "user"
time = "time"
label = "fraud"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["kind"]
context = ["shop"]
[split]
train_end = "2025-01-03"
validation = "1d"
[training]
epochs = 1
"""
HEADER = "id,user,time,amount,kind,shop,fraud"
ROWS = [f"{i},u{i % 3},2025-01-01 00:00:0{i},{10 + i}.5,k,s{i % 2},{int(i == 5)}" for i in range(6)]
CSV = "\n".join([HEADER, *ROWS]) + "\n"
N = 6
START = 1_735_689_600_000

Content = str | bytes | pa.Table


def write(folder: Path, **files: Content) -> Path:
    """Files, by name with _ for the dot; the folder where there are several."""
    paths = []
    for name, content in files.items():
        paths.append(folder / name.replace("_", "."))
        if isinstance(content, pa.Table):
            pq.write_table(content, paths[-1])
        else:
            paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder if len(paths) > 1 else paths[0]


def read(path: Path, config: str = CONFIG) -> tuple[Transactions, list[dict[str, Any]]]:
    parsed = parse_config(config, "test")
    table, problems = read_transactions(path, schema_of(parsed), parsed.data)
    table, report = clean(table, problems, CleaningConfig(most_dropped=1.0))
    return table, report["findings"]


def stored(first_id: int = 0, **columns: Any) -> pa.Table:
    """The good rows as a Parquet table, some columns being others."""
    plain: dict[str, Any] = {
        "id": pa.array(range(first_id, first_id + N)),
        "user": [f"u{i % 3}" for i in range(N)],
        "time": pa.array([datetime(2025, 1, 1, 0, 0, i) for i in range(N)], pa.timestamp("us")),
        "amount": [10.5 + i for i in range(N)],
        "kind": ["k"] * N,
        "shop": [f"s{i % 2}" for i in range(N)],
        "fraud": [int(i == 5) for i in range(N)],
    }
    return pa.table({**plain, **columns})


# ---- CSV


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        "\ufeff" + CSV,
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\n\n"),
        CSV.rstrip("\n"),
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in CSV.splitlines()),
    ],
    ids=["plain", "byte-order mark", "CRLF", "empty lines", "no end of line", "all quoted"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["csv", "csv.gz"])
def test_one_file_however_it_is_written(tmp_path: Path, content: str, packed: bool) -> None:
    path = write(tmp_path, **({"a_csv_gz": gzip.compress(content.encode())} if packed else {"a_csv": content}))
    table, findings = read(path)
    assert findings == []
    assert table.id_texts() == [str(i) for i in range(N)]
    assert table.user.texts() == ["u0", "u1", "u2"] * 2
    assert table.time.tolist() == [START + 1000 * i for i in range(N)]
    assert table.numbers[:, 0].tolist() == [10.5 + i for i in range(N)]
    assert table.text("shop").texts() == ["s0", "s1"] * 3
    assert table.label is not None
    assert table.label.tolist() == [0, 0, 0, 0, 0, 1]


def test_quoted_cells_may_hold_separators_quotes_and_line_breaks(tmp_path: Path) -> None:
    """So many that a block of the reader ends inside a cell: that was an error."""
    rows = [f'{i},u,2025-01-01,1,"a, ""b""\nc",s,0' for i in range(60_000)]
    table, _ = read(write(tmp_path, a_csv="\n".join([HEADER, *rows])))
    assert len(table) == 60_000
    assert set(table.text("kind").texts()) == {'a, "b"\nc'}


def test_texts_stay_texts(tmp_path: Path) -> None:
    """Leading zeros and whole numbers beyond 2^53 are parts of an id; "NA" is a country, but no user."""
    big = 2**53 + 1
    rows = [f"00{big},0042,2025-01-01,1,NA,007,0", f"{big},42,2025-01-02,2,,7,0", "x,NA,2025-01-03,3,k,7,0"]
    table, (finding,) = read(write(tmp_path, a_csv="\n".join([HEADER, *rows])))
    assert table.id_texts() == [f"00{big}", str(big)]
    assert table.user.texts() == ["0042", "42"]
    assert table.text("shop").texts() == ["007", "7"]
    assert table.text("kind").texts() == ["NA", None]
    assert (finding["reason"], finding["rows"]) == ("missing user", 1)


def test_missing_numbers_times_and_labels_may_say_so_in_a_word(tmp_path: Path) -> None:
    words = ["NA", "N/A", "NaN", "null", "NULL", "None"]
    rows = [f"{i},u,2025-01-01 00:00:0{i},{word},k,s,{word}" for i, word in enumerate(words)]
    table, findings = read(write(tmp_path, a_csv="\n".join([HEADER, *rows])))
    assert [(f["reason"], f["column"], f["rows"]) for f in findings] == [
        ("missing number", "amount", N), ("missing label", "fraud", N)
    ]  # fmt: skip
    assert table.label is not None
    assert set(table.label.tolist()) == {-1}


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("true", "false"), ("TRUE", "FALSE"), ("1.0", "0.0")])
def test_labels_may_be_spelled_as_pandas_writes_them(tmp_path: Path, yes: str, no: str) -> None:
    content = CSV.replace(",1\n", f",{yes}\n").replace(",0\n", f",{no}\n")
    table, findings = read(write(tmp_path, a_csv=content))
    assert findings == []
    assert table.label is not None
    assert table.label.tolist() == [0, 0, 0, 0, 0, 1]


# ---- Parquet


@pytest.mark.parametrize(
    ("column", "values", "seen"),
    [
        ("user", pa.array(["a", "b", "a", "b", "a", "b"]).dictionary_encode(), ["a", "b"] * 3),
        ("user", pa.array([2**53, 2**53 + 1] * 3), [str(2**53), str(2**53 + 1)] * 3),
        ("user", pa.array([2**64 - 1] * N, pa.uint64()), [str(2**64 - 1)] * N),
        ("user", pa.array([Decimal(7)] * N, pa.decimal128(38, 0)), ["7"] * N),
        ("user", pa.array([Decimal("7.50"), Decimal("70.00")] * 3, pa.decimal128(9, 2)), ["7.5", "70"] * 3),
        ("user", pa.array([1.0, 20.0] * 3), ["1", "20"] * 3),
        ("user", pa.array(["a"] * N, pa.large_string()), ["a"] * N),
        ("user", pa.array(["a"] * N, pa.string_view()), ["a"] * N),
        ("id", pa.array([2**53 + i for i in range(N)]), [str(2**53 + i) for i in range(N)]),
        ("id", pa.array([2**64 - 1 - i for i in range(N)], pa.uint64()), [str(2**64 - 1 - i) for i in range(N)]),
        ("id", pa.array([Decimal(10**30 + i) for i in range(N)], pa.decimal128(38)), [str(10**30 + i) for i in range(N)]),
        ("id", pa.array([f"00{i}" for i in range(N)]), [f"00{i}" for i in range(N)]),
        ("amount", pa.array([Decimal("1.50")] * N, pa.decimal128(9, 2)), [1.5] * N),
        ("amount", pa.array([3] * N, pa.int8()).dictionary_encode(), [3.0] * N),
        ("amount", pa.array(["1.5"] * N), [1.5] * N),
        ("amount", pa.array([True, False] * 3), [1.0, 0.0] * 3),
        ("time", pa.array([date(2025, 1, 1 + i) for i in range(N)]), [START + 86_400_000 * i for i in range(N)]),
        ("time", pa.array([date(2025, 1, 1 + i) for i in range(N)], pa.date64()),
         [START + 86_400_000 * i for i in range(N)]),
        ("time", pa.array([datetime(2025, 1, 1, 0, 0, i, tzinfo=UTC) for i in range(N)],
                          pa.timestamp("us", "America/New_York")), [START + 1000 * i for i in range(N)]),
        ("time", pa.array([datetime(2025, 1, 1, 0, 0, i) for i in range(N)], pa.timestamp("s")),
         [START + 1000 * i for i in range(N)]),
        ("time", pa.array([START * 10**6 + 1_999_999 + i for i in range(N)], pa.timestamp("ns")), [START + 1] + [START + 2] * 5),
        ("time", pa.array([f"2025-01-01T01:00:0{i}+01:00" for i in range(N)]), [START + 1000 * i for i in range(N)]),
        ("fraud", pa.array([False] * 5 + [True]), [0, 0, 0, 0, 0, 1]),
        ("fraud", pa.array([Decimal(0)] * 5 + [Decimal(1)], pa.decimal128(1, 0)), [0, 0, 0, 0, 0, 1]),
        ("fraud", pa.array([0.0, None, float("nan"), 0.0, 0.0, 1.0]), [0, -1, -1, 0, 0, 1]),
    ],
    ids=lambda x: str(x.type) if isinstance(x, pa.Array) else "" if isinstance(x, list) else x,
)  # fmt: skip
def test_a_column_of_another_type(tmp_path: Path, column: str, values: pa.Array, seen: list[Any]) -> None:
    table, _ = read(write(tmp_path, a_parquet=stored(**{column: values})))
    assert table.label is not None
    got = {
        "user": table.user.texts,
        "id": table.id_texts,
        "amount": lambda: table.numbers[:, 0].tolist(),
        "time": table.time.tolist,
        "fraud": table.label.tolist,
    }[column]()
    assert got == seen


@pytest.mark.parametrize(
    "users", [pa.array([1.0, float("nan"), None, 2.0, 3.0, 4.0]), pa.array(["1", "", None, "2", "3", "4"])]
)
def test_users_that_are_nan_or_empty_texts_are_missing(tmp_path: Path, users: pa.Array) -> None:
    """The service refuses an empty user; offline "" was a user of its own, with the rows of many people."""
    table, (finding,) = read(write(tmp_path, a_parquet=stored(user=users)))
    assert (finding["reason"], finding["rows"], finding["action"]) == ("missing user", 2, "dropped")
    assert [e.partition(":")[0] for e in finding["examples"]] == ["row 2", "row 3"]
    assert table.user.texts() == ["1", "2", "3", "4"]


# ---- folders


@pytest.mark.parametrize(
    ("column", "one", "other", "seen"),
    [
        ("amount", pa.array([1] * N), pa.array([1.5] * N), {1.0, 1.5}),
        ("user", pa.array([7] * N), pa.array(["007"] * N), {"7", "007"}),
        ("user", pa.array(["007"] * N), pa.array([7] * N), {"7", "007"}),
        ("user", pa.array(["a"] * N), pa.array(["b"] * N).dictionary_encode(), {"a", "b"}),
        ("user", pa.array(["a"] * N), pa.array(["b"] * N, pa.large_string()), {"a", "b"}),
        ("user", pa.array([1] * N, pa.int16()), pa.array([2**53 + 1] * N), {"1", str(2**53 + 1)}),
        ("fraud", pa.array([True] * N), pa.array([0] * N), {1, 0}),
        ("fraud", pa.array([1] * N), pa.nulls(N), {1, -1}),
        ("time", pa.array([START] * N, pa.timestamp("ms")), pa.array([START * 1000] * N, pa.timestamp("us", "UTC")), {START}),
        ("time", pa.array([date(2025, 1, 1)] * N), pa.array([START] * N, pa.timestamp("ms")), {START}),
    ],
)  # fmt: skip
def test_files_of_a_folder_may_differ_in_type(
    tmp_path: Path, column: str, one: pa.Array, other: pa.Array, seen: set[Any]
) -> None:
    table, _ = read(write(tmp_path, a_parquet=stored(**{column: one}), b_parquet=stored(N, **{column: other})))
    assert len(table) == 2 * N
    assert table.label is not None
    got = {"user": table.user.texts(), "amount": table.numbers[:, 0], "fraud": table.label, "time": table.time}[column]
    assert set(got) == seen


def test_rows_are_counted_through_the_files_of_a_folder_by_name(tmp_path: Path) -> None:
    second = CSV.replace("\n0,", "\n90,").replace("12.5", "ten")
    folder = write(tmp_path, a_csv=CSV, b_csv=second.replace("\n1,", "\n91,"), c_csv=HEADER + "\n", readme_txt="x")
    _, findings = read(folder)
    assert next(f["examples"] for f in findings if f["reason"] == "not a number") == ["row 9: 'ten'"]


# ---- refusals, through the command line


def latin(text: str) -> bytes:
    return text.encode("latin-1")


REFUSED: dict[str, tuple[dict[str, Content], str]] = {
    "semicolons": ({"a_csv": CSV.replace(",", ";")},
                   r"a\.csv: the header is 'id;user;time;amount;kind;shop;fraud', columns separated by semicolons; expected commas"),
    "tabs": ({"a_csv": CSV.replace(",", "\t")}, r"a\.csv: the header is .*, columns separated by tabs; expected commas"),
    "header only": ({"a_csv": HEADER + "\n"}, r"a\.csv: no rows; expected at least one transaction"),
    "header without an end": ({"a_csv": HEADER}, r"a\.csv: the file is empty; expected a header and at least one row"),
    "zero bytes": ({"a_csv": b""}, r"a\.csv: the file is empty; expected a header and at least one row"),
    "zero bytes of Parquet": ({"a_parquet": b""}, r"a\.parquet: cannot be read as Parquet"),
    "text as Parquet": ({"a_parquet": CSV}, r"a\.parquet: cannot be read as Parquet"),
    "no gzip": ({"a_csv_gz": CSV}, r"a\.csv\.gz: cannot be read as CSV: .*incorrect header"),
    "half a gzip": ({"a_csv_gz": gzip.compress(CSV.encode())[:-30]}, r"a\.csv\.gz: cannot be read as CSV"),
    "no such column": ({"a_csv": CSV.replace("shop", "store")},
                       r"there is no column 'shop'; the columns are: id, user, time, amount, kind, store, fraud"),
    "a column twice": ({"a_csv": "\n".join(line + ",s" if i else line + ",shop" for i, line in enumerate(CSV.splitlines()))},
                       r"the column 'shop' stands there twice"),
    "no such column in the second file": ({"a_csv": CSV, "b_csv": CSV.replace("kind", "Kind")},
                                          r"b\.csv: there is no column 'kind'"),
    "both kinds of files": ({"a_csv": CSV, "b_parquet": stored()}, r"the folder holds both CSV and Parquet files"),
    "no files": ({"a_txt": CSV, "b_txt": CSV}, r"the folder holds neither CSV nor Parquet files"),
    "another kind of file": ({"a_xlsx": b"PK"}, r"a\.xlsx: expected a \.csv, \.csv\.gz or \.parquet file"),
    "too few cells": ({"a_csv": CSV + "9,u1\n"}, r"Row #8: Expected 7 columns, got 2$"),
    "bytes that are not UTF-8": ({"a_csv": latin(CSV.replace("14.5,k,s0", "14.5,café,s0"))},
                                 r"column 'kind': row 5 holds the byte 0xe9, which is not UTF-8 text; save the file as UTF-8"),
    "a header that is not UTF-8": ({"a_csv": latin(CSV.replace("kind", "catégorie"))},
                                   r"the header holds b'cat\\xe9gorie', which is not UTF-8 text"),
    "UTF-16": ({"a_csv": CSV.encode("utf-16")}, r"a\.csv: the file is UTF-16 text; save it as UTF-8"),
    "numbers for times": ({"a_parquet": stored(time=list(range(N)))},
                          r"column 'time' has type int64, but data\.time_unit is \"iso\"; expected timestamps or ISO 8601"),
    "times of day": ({"a_parquet": stored(time=[time(1, 2, i) for i in range(N)])}, r"column 'time' has type time64"),
    "a list": ({"a_parquet": stored(kind=[["k"]] * N)}, r"column 'kind' has type list.*; expected text or integers"),
    "a struct": ({"a_parquet": stored(amount=[{"x": 1}] * N)}, r"column 'amount' has type struct.*; expected numbers"),
    "a list of labels": ({"a_parquet": stored(fraud=[[1]] * N)}, r"column 'fraud' has type list.*; expected numbers"),
    "binary users": ({"a_parquet": stored(user=[b"u"] * N)}, r"column 'user' has type binary; expected text or integers"),
    "times as users": ({"a_parquet": stored(user=[date(2025, 1, 1)] * N)}, r"column 'user' has type date32"),
    "files that disagree": ({"a_parquet": stored(), "b_parquet": stored(amount=["ten"] * N)},
                            r"column 'amount' cannot be read: .*ten"),
    "only bad times": ({"a_csv": CSV.replace("2025-01-01", "1.1.25")},
                       r"no row is left; most for: column 'time', unreadable time, 6 rows, such as row 1: '1\.1\.25 00:00:00'; "
                       r"expected an ISO 8601 time"),
    "too many bad rows": ({"a_csv": CSV.replace(",u1,", ",,")},
                          r"33\.3% of 6 rows would be dropped, at most 10\.0% may \(cleaning\.most_dropped\); most for: "
                          r"column 'user', missing user, 2 rows, such as row 2: None; expected text"),
}  # fmt: skip


OF_ANY_FILE = [
    REFUSED[name][1]
    for name in (
        "semicolons", "tabs", "header without an end", "zero bytes", "zero bytes of Parquet", "text as Parquet", "no gzip",
        "both kinds of files", "no files", "another kind of file", "bytes that are not UTF-8",
        "a header that is not UTF-8", "UTF-16", "a column twice",
    )
]  # fmt: skip
"""What does not depend on a configuration; `init` says it too."""


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", ["train", "init"])
def test_a_refusal_is_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, Content], words: str, command: str
) -> None:
    """`init` looks at the same files without a configuration."""
    (tmp_path / "data").mkdir()
    data = write(tmp_path / "data", **files)
    (tmp_path / "c.toml").write_text(CONFIG)
    if command == "train":
        args = ["train", str(tmp_path / "c.toml"), "--data", str(data), "--out", str(tmp_path / "run")]
    else:
        args = ["init", str(data), "--out", str(tmp_path / "new.toml")]
    code = main(args)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    if command == "train" or words in OF_ANY_FILE:
        assert re.search(words, said), said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new.toml").exists()


def test_one_class_only_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i},u{i % 5},2025-01-{1 + i // 24:02d} {i % 24:02d}:00:00,{i}.5,k,s,{{}}" for i in range(24 * 20)]
    config = CONFIG.replace("2025-01-03", "2025-01-10")
    (tmp_path / "c.toml").write_text(config)
    for value, word in (("0", "fraud"), ("1", "honest transaction")):
        data = write(tmp_path, a_csv="\n".join([HEADER, *(row.format(value) for row in rows)]))
        assert main(["train", str(tmp_path / "c.toml"), "--data", str(data), "--out", str(tmp_path / "run")]) == 2
        assert re.search(rf"hold no {word}; expected both classes: check data\.label", capsys.readouterr().err)


def test_texts_in_parquet_that_are_not_utf8(tmp_path: Path) -> None:
    """Against the format, but some writers do it; it was a traceback."""
    bad = pa.Array.from_buffers(pa.string(), N, pa.array([b"\xff"] * N, pa.binary()).buffers())
    with pytest.raises(DataError, match=r"column 'user' cannot be read: .*Invalid UTF8"):
        read(write(tmp_path, a_parquet=stored(user=bad)))
