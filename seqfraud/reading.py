"""CSV or Parquet, a file or a folder of files, as arrays in arrival order.

Columns are read one after the other, so that the peak is the result and one raw column. What a row cannot be used for
is collected as `Problem`s; `seqfraud.cleaning` decides what becomes of those rows.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet

from seqfraud.canonical import (
    EARLIEST_MS,
    FLOAT_SECONDS_ERROR,
    LARGEST_NUMBER,
    LATEST_MS,
    canonical_text,
    time_ms,
)
from seqfraud.config import DataConfig, TimeUnit
from seqfraud.errors import DataError
from seqfraud.schema import Schema
from seqfraud.table import MISSING, Coded, Transactions

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


EXAMPLES = 3
"""Rows shown of each problem."""
BEYOND = f"number beyond {LARGEST_NUMBER:g}"
CSV_NULLS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
"""What a missing cell of a CSV file may say. Of a category or an entity only an empty cell is missing: "NA" is a country."""
CSV_FORMAT = pa.csv.ParseOptions(newlines_in_values=True)
"""Without it a quoted line break at the edge of a block is an error."""


@dataclass(frozen=True)
class Problem:
    """Rows (a mask [N]) with one thing wrong in one column; `examples` say what was seen in the first few."""

    reason: str
    column: str
    rows: Mask
    examples: tuple[str, ...]


def read_transactions(path: Path, schema: Schema, data: DataConfig | None = None) -> tuple[Transactions, list[Problem]]:
    """Read the declared columns, in file order.

    Args:
        path: a CSV or Parquet file, or a folder of them.
        schema: what is read as features.
        data: names the label columns; None reads no labels.

    Raises:
        DataError: the file or a column is missing, empty, or of a type that cannot hold what it should.
    """
    label = None if data is None else data.label
    known_at = None if data is None else data.label_known_at
    wanted = tuple(dict.fromkeys((*schema.fields, *(c for c in (label, known_at) if c is not None))))
    spelled = {schema.user, schema.time, schema.transaction, label, known_at, *schema.numbers}
    source = _open(path, wanted, spelled)
    problems: list[Problem] = []

    def note(reason: str, column: str, rows: Mask, raw: pa.ChunkedArray) -> None:
        if rows.any():
            shown = np.flatnonzero(rows)[:EXAMPLES].tolist()
            examples = tuple(f"row {i + 1}: {_shown(raw[i]):.80}" for i in shown)
            problems.append(Problem(reason, column, rows, examples))

    raw = source(schema.time)
    count = len(raw)
    if count == 0:
        raise DataError(f"{path}: no rows; expected at least one transaction")
    time, bad = _times(raw, schema.time_unit, path, schema.time)
    missing = _nulls(raw)
    note("missing time", schema.time, missing, raw)
    note("unreadable time", schema.time, bad & ~missing, raw)

    raw = source(schema.user)
    user = _coded(raw, path, schema.user)
    note("missing user", schema.user, user.codes == MISSING, raw)

    values = np.empty((count, len(schema.numbers)))
    for i, column in enumerate(schema.numbers):
        raw = source(column)
        values[:, i], bad = _floats(raw, path, column)
        note("not a number", column, bad, raw)
        size = np.abs(values[:, i])
        note("infinite number", column, np.isinf(size), raw)
        note(BEYOND, column, (size > LARGEST_NUMBER) & ~np.isinf(size), raw)
        note("missing number", column, np.isnan(values[:, i]) & ~bad, raw)
    texts = tuple(_coded(source(column), path, column) for column in schema.texts)

    ids: Coded | Int64 | None = None
    if schema.transaction is not None:
        raw = source(schema.transaction)
        if pa.types.is_integer(raw.type) and raw.type != pa.uint64() and raw.null_count == 0:
            ids = raw.to_numpy().astype(np.int64)
        else:
            ids = _coded(raw, path, schema.transaction)
            note("missing id", schema.transaction, ids.codes == MISSING, raw)
    labels: npt.NDArray[np.int8] | None = None
    if label is not None:
        raw = source(label)
        figures, bad = _floats(_true_as_one(raw), path, label)
        unknown = np.isnan(figures) & ~bad
        bad |= ~unknown & (figures != 0) & (figures != 1)
        note("label neither 0 nor 1", label, bad, raw)
        note("missing label", label, unknown, raw)
        labels = np.where(unknown | bad, MISSING, figures).astype(np.int8)
    known: Int64 | None = None
    if known_at is not None:
        raw = source(known_at)
        known, bad = _times(raw, schema.time_unit, path, known_at)
        missing = _nulls(raw)
        note("unreadable label time", known_at, bad & ~missing, raw)
        # without a time of its own a label is known one delay after its transaction, like silence
        assert data is not None
        known = np.where(missing | bad, time + int(data.label_delay), known)
    del raw, source
    # Arrow keeps the pages of freed columns for the next ones, up to half as much again as the result; none follow
    pa.default_memory_pool().release_unused()
    table = Transactions(schema, user, time, values, texts, labels, known, ids, np.arange(count, dtype=np.int64))
    return table, problems


@dataclass(frozen=True)
class LabelColumns:
    """Which column of a file of labels is what; `known_at` None: it does not say since when they are known."""

    transaction: str = "transaction_id"
    is_fraud: str = "is_fraud"
    known_at: str | None = "known_at"


@dataclass(frozen=True)
class LabelRows:
    """N rows of a file of labels: ids as texts, `is_fraud` int8 [N], `known_at` (ms) int64 [N], each MISSING where empty."""

    ids: Coded
    is_fraud: npt.NDArray[np.int8]
    known_at: Int64

    def __len__(self) -> int:
        return len(self.is_fraud)


def read_labels(path: Path, columns: LabelColumns, unit: TimeUnit) -> LabelRows:
    """Read a CSV or Parquet file of labels, or a folder of them, in file order.

    Raises:
        DataError: a file or a column is missing, or a row says what is no label: its number, and what was seen.
    """
    wanted = tuple(c for c in (columns.transaction, columns.is_fraud, columns.known_at) if c is not None)
    source = _open(path, wanted, set(wanted))

    def refuse(rows: Mask, column: str, raw: pa.ChunkedArray, expected: str) -> None:
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            raise DataError(f"{path}: row {row + 1}: {column}: {_shown(raw[row]):.80}; expected {expected}")

    raw = source(columns.transaction)
    ids = _coded(raw, path, columns.transaction)
    refuse(ids.codes == MISSING, columns.transaction, raw, "the id of a transaction")
    raw = source(columns.is_fraud)
    figures, bad = _floats(_true_as_one(raw), path, columns.is_fraud)
    unsaid = np.isnan(figures) & ~bad
    refuse(bad | ~(unsaid | (figures == 0) | (figures == 1)), columns.is_fraud, raw, "1, 0, true, false or nothing")
    labels = np.where(unsaid, MISSING, figures).astype(np.int8)
    known = np.full(len(labels), MISSING, dtype=np.int64)
    if columns.known_at is not None:
        raw = source(columns.known_at)
        empty = _nulls(raw)
        if not empty.all():
            known, bad = _times(raw, unit, path, columns.known_at)
            refuse(bad & ~empty, columns.known_at, raw, "a time, by its unit")
            known[empty] = MISSING
    return LabelRows(ids, labels, known)


Source = Callable[[str], pa.ChunkedArray]


def _open(path: Path, wanted: tuple[str, ...], spelled: Collection[str | None]) -> Source:
    """A function that reads one column by name; in CSV files a missing cell of a `spelled` one may say so in a word."""
    files = data_files(path)
    if files[0].suffix.lower() in (".csv", ".gz"):
        return _open_csv(files, wanted, spelled)
    schemas = []
    for file in files:
        schemas.append(_parquet_schema(file))
        _require(file, wanted, schemas[-1].names)
    fields = [pa.field(name, _common_type([schema.field(name).type for schema in schemas])) for name in wanted]
    parquet = pa.dataset.dataset([str(f) for f in files], schema=pa.schema(fields), format="parquet")

    def column(name: str) -> pa.ChunkedArray:
        try:
            raw = parquet.to_table(columns=[name]).column(0)
            raw.validate(full=True)  # texts that are not UTF-8
            return raw
        except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
            raise DataError(f"{path}: column {name!r} cannot be read: {_first_line(error)}") from error

    return column


def _common_type(types: list[pa.DataType]) -> pa.DataType:
    """One type for a column whose files say, for instance, integers here and floats or nothing there."""
    types = [pa.string() if pa.types.is_string_view(kind) else kind for kind in types]
    texts = [kind for kind in types if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    if texts and all(kind in texts or pa.types.is_integer(kind) for kind in types):
        return texts[0]  # "007" here and 7 there are texts
    try:
        merged = pa.unify_schemas([pa.schema([("", kind)]) for kind in types], promote_options="permissive")
    except pa.ArrowTypeError:
        return types[0]
    return merged.field(0).type


def _open_csv(files: list[Path], wanted: tuple[str, ...], spelled: Collection[str | None]) -> Source:
    """All declared columns of CSV files; numbers stay texts here, so that one bad cell is a problem of its row."""
    convert = csv_texts(wanted, [""])
    tables = []
    for file in files:
        _require(file, wanted, _csv_names(file))
        try:
            tables.append(pa.csv.read_csv(file, parse_options=CSV_FORMAT, convert_options=convert))
        except (pa.ArrowInvalid, OSError) as error:
            raise csv_error(file, error, wanted) from error
    table = pa.concat_tables(tables)
    nulls = pa.array(CSV_NULLS)

    def column(name: str) -> pa.ChunkedArray:
        raw = table.column(name)
        return pc.if_else(pc.is_in(raw, nulls), None, raw) if name in spelled else raw

    return column


def csv_texts(names: Sequence[str], nulls: Sequence[str] = CSV_NULLS) -> pa.csv.ConvertOptions:
    """Columns of a CSV file as texts, those that read as one of `nulls` as missing."""
    return pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        include_columns=list(names),
        strings_can_be_null=True,
        null_values=list(nulls),
    )


def csv_error(file: Path, error: Exception, wanted: Sequence[str]) -> DataError:
    """What is wrong with a CSV file, in a line that names the column and the cell where there is one."""
    if "invalid UTF8" in str(error):
        convert = pa.csv.ConvertOptions(
            column_types={name: pa.binary() for name in wanted}, include_columns=list(wanted)
        )
        table = pa.csv.read_csv(file, parse_options=CSV_FORMAT, convert_options=convert)
        for name in wanted:
            for i, cell in enumerate(table.column(name).to_pylist()):
                try:
                    cell.decode()
                except UnicodeDecodeError as bad:  # the byte only: the cell may be somebody's identifier
                    return DataError(
                        f"{file}: column {name!r}: row {i + 1} holds the byte 0x{cell[bad.start]:02x}, which is not "
                        "UTF-8 text; save the file as UTF-8"
                    )
    return _not_csv(file, error)


def _not_csv(file: Path, error: Exception) -> DataError:
    if " columns, got " in str(error):
        try:
            pa.csv.read_csv(file, pa.csv.ReadOptions(use_threads=False), parse_options=CSV_FORMAT)
        except pa.ArrowInvalid as named:  # in one thread it is known which row it is
            error = named
    before, between, after = _first_line(error).partition(" columns, got ")
    words = before + between + after.partition(":")[0]  # Arrow goes on with the row, which may name somebody
    return DataError(f"{file}: cannot be read as CSV: {words:.200}")


def column_names(path: Path) -> list[str]:
    """The columns of the first file. Raises DataError."""
    file = data_files(path)[0]
    if file.suffix.lower() in (".csv", ".gz"):
        return _csv_names(file)
    names: list[str] = _parquet_schema(file).names
    return names


def _parquet_schema(file: Path) -> pa.Schema:
    try:
        return pa.parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {_first_line(error)}") from error


def _csv_names(file: Path) -> list[str]:
    """The header of a CSV file. Raises DataError for one of another kind."""
    try:
        with pa.csv.open_csv(file, parse_options=CSV_FORMAT) as reader:
            names: list[str] = reader.schema.names
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: the header holds {error.object!r:.80}, which is not UTF-8 text; save the file as UTF-8"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        with file.open("rb") as stream:
            start = stream.read(2)
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{file}: the file is UTF-16 text; save it as UTF-8") from error
        if not start or "Empty CSV" in str(error):
            raise DataError(f"{file}: the file is empty; expected a header and at least one row") from error
        raise _not_csv(file, error) from error
    for separator, words in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and separator in names[0]:
            raise DataError(
                f"{file}: the header is {names[0]!r:.80}, columns separated by {words}; expected commas: save it so"
            )
    return names


def data_files(path: Path) -> list[Path]:
    """The file, or the CSV or Parquet files of a folder in name order. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        if path.name.endswith((".parquet", ".pq", ".csv", ".csv.gz")):
            return [path]
        raise DataError(f"{path}: expected a .csv, .csv.gz or .parquet file, or a folder of them")
    by_kind = [sorted(f for f in path.iterdir() if f.name.endswith(ends) and not f.name.startswith((".", "_")))
               for ends in ((".parquet", ".pq"), (".csv", ".csv.gz"))]  # fmt: skip
    kinds = [files for files in by_kind if files]
    if len(kinds) != 1:
        seen = "both CSV and Parquet files" if kinds else "neither CSV nor Parquet files"
        raise DataError(f"{path}: the folder holds {seen}; expected files of one kind")
    return kinds[0]


def _require(path: Path, wanted: tuple[str, ...], names: list[str]) -> None:
    absent = [name for name in wanted if name not in names]
    if absent:
        raise DataError(f"{path}: there is no column {absent[0]!r}; the columns are: {', '.join(names)}")
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} stands there twice")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _shown(seen: pa.Scalar) -> str:
    try:
        return repr(seen.as_py())
    except (OverflowError, ValueError):  # a time that Python has no name for
        return str(seen.value)


def _nulls(raw: pa.ChunkedArray) -> Mask:
    return np.asarray(pc.is_null(raw), dtype=bool)


def _decoded(raw: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(raw, raw.type.value_type) if pa.types.is_dictionary(raw.type) else raw


def _coded(raw: pa.ChunkedArray, path: Path, column: str) -> Coded:
    """Texts as codes; raises DataError for types that have no text (lists, structs, times)."""
    kind = raw.type.value_type if pa.types.is_dictionary(raw.type) else raw.type
    bytes_like = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if pa.types.is_nested(kind) or pa.types.is_temporal(kind) or bytes_like:
        raise DataError(f"{path}: column {column!r} has type {raw.type}; expected text or integers")
    if not pa.types.is_dictionary(raw.type):
        raw = pc.dictionary_encode(raw)
    combined = raw.unify_dictionaries().combine_chunks()
    array = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    # NaN in a column of floats and an empty text are missing values, too
    texts = [None if v is None or v != v or v == "" else canonical_text(v) for v in array.dictionary.to_pylist()]
    codes: dict[str, int] = {}
    map_to = np.array([MISSING if t is None else codes.setdefault(t, len(codes)) for t in texts] + [MISSING])
    indices = np.asarray(pc.fill_null(array.indices.cast(pa.int32()), MISSING))
    return Coded(map_to[indices].astype(np.int32), list(codes))


def _floats(raw: pa.ChunkedArray, path: Path, column: str) -> tuple[npt.NDArray[np.float64], Mask]:
    """float64 [N] with NaN for missing or unreadable, and the mask of the unreadable."""
    raw = _decoded(raw)
    kind = raw.type
    none = np.zeros(len(raw), dtype=bool)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return _as_numpy(pc.cast(raw, pa.float64())), none
        except pa.ArrowInvalid:
            return _floats_one_by_one(raw)
    if (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
    ):
        return _as_numpy(pc.cast(raw, pa.float64(), safe=False)), none
    raise DataError(f"{path}: column {column!r} has type {kind}; expected numbers")


def _true_as_one(raw: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts "true" and "false", in whatever case, as the labels 1 and 0: a CSV file has no better way to say them."""
    if not pa.types.is_string(raw.type):
        return raw
    lower = pc.utf8_lower(raw)
    return pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", raw))


def _floats_one_by_one(raw: pa.ChunkedArray) -> tuple[npt.NDArray[np.float64], Mask]:
    """Texts of which some are no numbers; each distinct text is tried once."""
    coded = pc.dictionary_encode(raw).unify_dictionaries().combine_chunks()
    array = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
    figures, wrong = [], []
    for text in array.dictionary.to_pylist():
        try:
            figures.append(float(text))
            wrong.append(False)
        except ValueError:
            figures.append(np.nan)
            wrong.append(True)
    indices = np.asarray(pc.fill_null(array.indices.cast(pa.int64()), len(figures)))
    return np.array([*figures, np.nan])[indices], np.array([*wrong, False])[indices]


def _as_numpy(raw: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    return np.asarray(raw.to_numpy(), dtype=np.float64)


def _times(raw: pa.ChunkedArray, unit: TimeUnit, path: Path, column: str) -> tuple[Int64, Mask]:
    """int64 [N] milliseconds (0 where missing or unreadable) and the mask of those."""
    raw = _decoded(raw)
    kind = raw.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _times_from_stamps(raw)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _times_from_text(raw, unit)
    if unit == "iso":
        raise DataError(
            f'{path}: column {column!r} has type {kind}, but data.time_unit is "iso"; '
            'expected timestamps or ISO 8601 text, or time_unit = "s" or "ms"'
        )
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return _filled_integers(raw, unit)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _filled_floats(_as_numpy(pc.cast(raw, pa.float64(), safe=False)), unit)
    raise DataError(f"{path}: column {column!r} has type {kind}; expected times")


def _filled(raw: pa.ChunkedArray) -> Int64:
    return np.asarray(pc.fill_null(raw, 0).to_numpy(), dtype=np.int64)


def _times_from_stamps(raw: pa.ChunkedArray) -> tuple[Int64, Mask]:
    """Timestamps and dates; parts of a millisecond are dropped downwards, before 1970 as well as after."""
    unit = getattr(raw.type, "unit", None)
    if unit not in ("us", "ns"):
        return _in_range(_filled(pc.cast(pc.cast(raw, pa.timestamp("ms"), safe=False), pa.int64())), _nulls(raw))
    parts = 1000 if unit == "us" else 1_000_000
    return _in_range(np.floor_divide(_filled(pc.cast(raw, pa.int64())), parts), _nulls(raw))


def _filled_integers(raw: pa.ChunkedArray, unit: TimeUnit) -> tuple[Int64, Mask]:
    scale = 1000 if unit == "s" else 1
    figures = _filled(pc.cast(raw, pa.int64()))
    bad = (figures < EARLIEST_MS // scale) | (figures >= LATEST_MS // scale)
    return np.where(bad, 0, figures) * scale, bad | _nulls(raw)


def _filled_floats(figures: npt.NDArray[np.float64], unit: TimeUnit) -> tuple[Int64, Mask]:
    """As `time_ms`, number by number."""
    ms = figures * 1000 if unit == "s" else figures
    if unit == "s":
        ms = ms + np.abs(ms) * FLOAT_SECONDS_ERROR
    bad = ~((ms >= EARLIEST_MS) & (ms < LATEST_MS))
    return np.floor(np.where(bad, 0, ms)).astype(np.int64), bad


def _in_range(ms: Int64, bad: Mask) -> tuple[Int64, Mask]:
    bad = bad | (ms < EARLIEST_MS) | (ms >= LATEST_MS)
    return np.where(bad, 0, ms), bad


def _times_from_text(raw: pa.ChunkedArray, unit: TimeUnit) -> tuple[Int64, Mask]:
    """Texts as times, quickly where Arrow reads them all, else text by text."""
    if unit != "iso":
        figures, _ = _floats_one_by_one(raw)
        return _filled_floats(figures, unit)
    for target in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            stamps = pc.cast(raw, target)
        except pa.ArrowInvalid:
            continue
        return _times_from_stamps(stamps)
    out = np.zeros(len(raw), dtype=np.int64)
    bad = np.zeros(len(raw), dtype=bool)
    for i, text in enumerate(raw.to_pylist()):
        try:
            out[i] = time_ms(text, unit)
        except (ValueError, TypeError, OverflowError):
            bad[i] = True
    return out, bad
