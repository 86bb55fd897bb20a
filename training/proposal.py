"""A configuration proposed from a file of transactions: facts about columns -> roles -> TOML text.

`inspect_file` takes a random sample of rows in one pass and collects facts per column; `propose` turns facts into roles
and dates, each with the reason; `to_toml` writes them down; `check` reads the file as training would, so that what the
proposal got wrong is said at once. Only `inspect_file`, `check` and `write_config` touch files.

Reasons never quote a value that could name a person or an account: the text is made to be kept in a repository.

Letters: n sampled rows, N rows of the file, D distinct values.
"""

import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset

from seqfraud.canonical import network_of, time_ms
from seqfraud.cleaning import clean
from seqfraud.config import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    SECOND_MS,
    Config,
    TimeUnit,
    format_instant,
    parse_config,
    parse_instant,
)
from seqfraud.errors import ConfigError, DataError, SeqfraudError
from seqfraud.files import replaced_file
from seqfraud.identifiers import looks_like_card
from seqfraud.reading import CSV_FORMAT, column_names, csv_error, csv_texts, data_files, read_transactions
from seqfraud.schema import schema_of
from training.split import rows_of, split_of

Codes = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Kind = Literal["integer", "number", "boolean", "time", "ip", "text", "nothing", "other"]
Role = Literal[
    "transaction", "user", "time", "label", "label known at", "amount",
    "numeric", "categorical", "context", "geo", "ip", "left out",
]  # fmt: skip
Progress = Callable[[int], None]
"""Called with the number of rows read since the last call."""

SAMPLE_ROWS = 1_000_000
"""Files with more rows are judged by a random sample of at most so many; memory depends on this and not on the file."""
READABLE = 0.98
"""Share of a column's texts that must read as numbers, times or addresses for the column to be of that kind."""
FEW_VALUES = 1000
"""Up to so many distinct values are a category with an embedding each; more are entities with a context."""
NAMES_USER = 5
"""A user's attribute that fewer than so many users share on average says who the user is, not what happens."""
LEAK_RECALL = 0.5
LEAK_PRECISION = 0.95
"""A column that alone finds half of the later frauds at this precision is an answer, not an observation."""
LEAST_FRAUDS = 10
"""Frauds needed in each half of the time to judge leaks."""
VALIDATION_FRAUDS = 30
"""Validation days are widened until they hold so many frauds."""
EPOCH_RANGE_MS = (parse_instant("2000-01-01"), parse_instant("2100-01-01"))
"""Whole numbers in this range, in seconds or milliseconds, can be times."""

# --- what names say -------------------------------------------------------------------------------

USER_WORDS = (
    "user", "customer", "client", "cust", "card", "cc", "pan", "account", "acct", "acc", "member", "holder",
    "subscriber", "payer", "sender", "orig", "originator", "iban", "consumer", "buyer", "person",
)  # fmt: skip
ENTITY_WORDS = (
    "merchant", "merch", "terminal", "device", "shop", "store", "seller", "vendor", "pos", "atm", "beneficiary",
    "payee", "recipient", "receiver", "dest", "destination", "counterparty", "mail", "phone", "browser", "fingerprint",
    "imei", "issuer", "bank", "bin", "agent", "session",
)  # fmt: skip
ID_WORDS = ("id", "uid", "uuid", "guid", "key", "hash", "ref", "reference", "identifier")
LAST_ID_WORDS = ("num", "no", "nr", "number")
"""Ids as a name's end, as in "card_num"; at its beginning they count something."""
KIND_WORDS = (
    "code", "category", "cat", "type", "class", "kind", "status", "channel", "country", "region", "state", "currency",
    "gender", "sex", "group", "segment", "brand", "zip", "postal", "postcode", "mcc", "city", "job", "mode",
)  # fmt: skip
TRANSACTION_WORDS = (
    "transaction", "trans", "tx", "txn", "trx", "payment", "order", "event", "authorization", "auth", "purchase",
    "transfer", "record",
)  # fmt: skip
INDEX_WORDS = ("index", "unnamed", "row", "rownum")
TIME_WORDS = ("time", "date", "ts", "unix", "epoch", "created", "when")
OTHER_TIME_WORDS = (
    "birth", "dob", "born", "expiry", "expires", "expiration", "exp", "signup", "open", "opened", "issued", "joined",
    "registered", "registration", "since", "valid", "settled", "settlement", "posted", "update", "updated",
)  # fmt: skip
KNOWN_WORDS = ("known", "reported", "report", "chargeback", "confirmed", "dispute", "disputed", "investigated", "label")
FRAUD_WORDS = ("fraud", "fraudulent", "fraudster", "chargeback", "scam", "dispute", "disputed", "label", "laundering")
LABEL_WORDS = (*FRAUD_WORDS, "class", "target", "anomaly", "y", "outcome")
FORECAST_WORDS = (
    "flag", "flagged", "pred", "predicted", "score", "rule", "alert", "suspected", "model", "probability",
)  # fmt: skip
LATER_WORDS = (
    "status", "decision", "declined", "approved", "blocked", "response", "score", "risk", "reversed", "refund", "flag",
    "flagged", "alert", "review", "reviewed", "newbalance",
)  # fmt: skip
AMOUNT_WORDS = ("amount", "amt", "value", "price", "total", "sum", "paid", "money", "usd", "eur", "gbp", "cost")
MEASURE_WORDS = (
    "balance", "limit", "avg", "mean", "count", "pop", "population", "fee", "tax", "age", "year", "month", "day",
    "hour", "items", "qty", "quantity", "rate", "ratio", "share", "old", "new", "lat", "latitude", "long", "lon", "lng",
)  # fmt: skip
"""Numbers that are neither money nor names of something."""
LATITUDE_WORDS = ("lat", "latitude")
LONGITUDE_WORDS = ("long", "lon", "lng", "longitude")
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
MOSTLY = 0.5
"""Of numbers with 13 to 19 digits that count something else, one in ten looks like a card's."""
_SHORTEST_PART = 4
"""Shorter words count only as a whole token: "card" is in "cardholder", "cc" is not in "account"."""
_WHOLE = ("count",)
"""Longer words that count only as a whole token, too: others hold them by chance, such as "account" and "country"."""


def tokens_of(name: str) -> list[str]:
    """Lower-case words of a column name: "TX_FRAUD", "txFraud" and "tx fraud" are the same."""
    return [token.lower() for token in _TOKEN.findall(name)]


def says(name: str, words: Iterable[str]) -> bool:
    """Whether a name has one of the words as a token, or, for longer ones, as a token's beginning or end."""
    tokens = tokens_of(name)
    return any(
        token == word
        or (len(word) >= _SHORTEST_PART and word not in _WHOLE and (token.startswith(word) or token.endswith(word)))
        for word in words
        for token in tokens
    )


def says_id(name: str) -> bool:
    """Whether a name says that its values are names of something."""
    tokens = tokens_of(name)
    return says(name, ID_WORDS) or (len(tokens) > 1 and tokens[-1] in LAST_ID_WORDS)


def says_index(name: str) -> bool:
    """Whether a name is no more than that of a row's number."""
    return all(token in INDEX_WORDS or token.isdigit() for token in tokens_of(name))


# --- facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnFacts:
    """What was seen in one column. Counts are of the n sampled rows, which are all rows where the file is small."""

    name: str
    type: str
    """The Arrow type as stored; texts in CSV files."""
    kind: Kind
    """What the values are, however they are stored; a float without fractions is an integer."""
    rows: int
    """N."""
    sampled: int
    """n."""
    nulls: int = 0
    distinct: int = 0
    """D, missing values not counted."""
    repeats: float = 1.0
    """Rows of the file that share a value with an average row, that row included; estimated without bias."""
    smallest: float | None = None
    """Of numbers and times; times in milliseconds since the epoch."""
    largest: float | None = None
    median: float | None = None
    mean: float | None = None
    examples: tuple[str, ...] = ()
    number_share: float = 0.0
    """Share of the present values that read as numbers; likewise times and IP addresses."""
    time_share: float = 0.0
    ip_share: float = 0.0
    card_share: float = 0.0
    """Share of the distinct values that look like card numbers."""
    cents: bool = False
    """Fractions of at most two digits."""
    increasing: bool = False
    """Never falls from one row of the file to the next."""
    ones: float | None = None
    """Share of 1 where the values are 0 and 1, else None."""
    words: float = 0.0
    """Words per text."""

    @property
    def exact(self) -> bool:
        """Whether every row was looked at."""
        return self.sampled == self.rows

    @property
    def unique(self) -> bool:
        """No value stands in two rows; a few repeated rows are forgiven."""
        return self.distinct > 1 and self.repeats <= 1.02

    @property
    def present(self) -> int:
        """Sampled rows with a value."""
        return self.sampled - self.nulls

    @property
    def numeric(self) -> bool:
        """Whether the values are numbers."""
        return self.kind in ("integer", "number", "boolean")

    def per_value(self) -> float:
        """Rows of the file per distinct value."""
        if self.exact or self.present >= 5 * self.distinct:
            return self.present / max(self.distinct, 1) * self.rows / self.sampled
        return self.repeats

    def values_text(self) -> str:
        """The cardinality in words."""
        bound = "" if self.exact else "about " if self.present >= 5 * self.distinct else "at least "
        return f"{bound}{self.distinct:,} values with {_round(self.per_value())} transactions each"


@dataclass(frozen=True)
class Inspection:
    """The sampled rows in the form in which relations between columns are asked for.

    Attributes:
        codes: per column int32 [n], equal for equal values, -1 where missing.
        values: float64 [n] of numbers and times (milliseconds), NaN where missing or unreadable.
    """

    path: Path
    rows: int
    columns: tuple[ColumnFacts, ...]
    codes: dict[str, Codes]
    values: dict[str, Floats]

    @property
    def sampled(self) -> int:
        """n."""
        return self.columns[0].sampled

    def times(self, name: str, unit: TimeUnit) -> Floats:
        """float64 [n]: a time column in milliseconds; `unit` is what its numbers mean."""
        return self.values[name] * (SECOND_MS if unit == "s" else 1)

    def same_groups(self, a: ColumnFacts, b: ColumnFacts) -> bool:
        """Whether two columns are equal up to spelling: the same rows have equal values."""
        if a.distinct != b.distinct or a.nulls != b.nulls or a.distinct < 2:
            return False
        if a.unique:  # any two such columns have a group for each row
            one, other = self.values.get(a.name), self.values.get(b.name)
            return one is not None and other is not None and bool(np.array_equal(one, other, equal_nan=True))
        return self._pairs(a.name, b.name) == a.distinct + (a.nulls > 0)

    def constant_within(self, column: ColumnFacts, user: str) -> bool:
        """Whether the column hardly ever changes within a user; False where no user comes twice."""
        codes, users = self.codes[column.name], self.codes[user]
        known = (codes >= 0) & (users >= 0)
        often = np.bincount(users[known], minlength=1) >= 2
        rows = known & often[np.maximum(users, 0)]
        count = int(often.sum())
        return count > 0 and self._pairs(column.name, user, rows) <= 1.02 * count

    def users_per_value(self, column: ColumnFacts, user: str) -> float:
        """Distinct users per value of a column."""
        rows = self.codes[column.name] >= 0
        return self._pairs(column.name, user, rows) / max(column.distinct, 1)

    def _pairs(self, a: str, b: str, rows: Mask | None = None) -> int:
        """Number of distinct pairs of values, missing ones being a value."""
        first, second = self.codes[a].astype(np.int64) + 1, self.codes[b].astype(np.int64) + 1
        pairs = first * (int(second.max(initial=0)) + 1) + second
        return len(np.unique(pairs if rows is None else pairs[rows]))


# --- the sample -----------------------------------------------------------------------------------


def inspect_file(path: Path, limit: int = SAMPLE_ROWS, progress: Progress | None = None) -> Inspection:
    """Read a CSV or Parquet file, or a folder of them, once and collect facts from at most `limit` rows.

    Raises:
        DataError: the file cannot be read or has no rows.
    """
    names = column_names(path)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} stands there twice; rename one of the two")
    table, rows = _sample(_batches(path, names), limit, progress or (lambda _: None))
    if table is None:
        raise DataError(f"{path}: no rows; expected at least one transaction")
    facts, codes, values = [], {}, {}
    for name in names:
        seen = _look_at(table.column(name))
        facts.append(_facts_of(name, seen, rows))
        codes[name] = seen.codes
        if seen.values is not None:
            values[name] = seen.row_values()
    return Inspection(path, rows, tuple(facts), codes, values)


def _batches(path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    """All rows, a bounded piece at a time. Columns of CSV files are texts."""
    files = data_files(path)
    try:
        if files[0].name.endswith((".csv", ".csv.gz")):
            for file in files:
                yield from _csv_batches(file, names)
        else:
            parquet = pa.dataset.dataset([str(file) for file in files], format="parquet")
            yield from parquet.to_batches(batch_size=65_536)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowKeyError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _csv_batches(file: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pa.csv.open_csv(file, parse_options=CSV_FORMAT, convert_options=csv_texts(names)) as reader:
            yield from reader
    except (pa.ArrowInvalid, OSError) as error:
        raise csv_error(file, error, names) from error


def _sample(batches: Iterator[pa.RecordBatch], limit: int, progress: Progress) -> tuple[pa.Table | None, int]:
    """A random sample in file order and the number of rows; every row has the same chance.

    The chance is halved whenever the sample grows past `limit`, so the length of the file need not be known.
    """
    rng = np.random.default_rng(0)
    kept: list[pa.RecordBatch] = []
    rows, size, share = 0, 0, 1.0
    for batch in batches:
        rows += len(batch)
        progress(len(batch))
        kept.append(_thinned(batch, share, rng))
        size += len(kept[-1])
        while size > limit:
            share /= 2
            kept = [_thinned(piece, 0.5, rng) for piece in kept]
            size = sum(map(len, kept))
    return (pa.Table.from_batches(kept) if size else None), rows


def _thinned(batch: pa.RecordBatch, share: float, rng: np.random.Generator) -> pa.RecordBatch:
    return batch if share == 1.0 else batch.filter(pa.array(rng.random(len(batch)) < share))


# --- facts of one column --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A sampled column taken apart: n codes into D distinct values, and what those are."""

    type: str
    kind: Kind
    codes: Codes
    counts: npt.NDArray[np.int64]
    """[D]."""
    values: Floats | None = None
    """[D]; NaN where unreadable."""
    shares: dict[str, float] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    words: float = 0.0

    def row_values(self) -> Floats:
        """float64 [n]."""
        assert self.values is not None
        return np.append(self.values, np.nan)[self.codes]


def _look_at(raw: pa.ChunkedArray) -> _Seen:
    """Codes, distinct values and their kind."""
    stored = raw.type.value_type if pa.types.is_dictionary(raw.type) else raw.type
    absent = np.full(len(raw), -1, dtype=np.int32)
    if pa.types.is_null(stored) or raw.null_count == len(raw):
        return _Seen(str(stored), "nothing", absent, np.zeros(0, np.int64))
    if _has_no_use(stored):
        return _Seen(str(stored), "other", absent, np.zeros(0, np.int64))
    codes, values = _coded(raw)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    if pa.types.is_string(values.type):
        kind, figures, shares = _read_texts(values, counts)
    else:
        kind, figures, shares = _read_figures(values)
    texts = values.slice(0, 1000).cast(pa.string(), safe=False).to_pylist()
    shares["card"] = float(np.mean([looks_like_card(text) for text in texts])) if texts else 0.0
    return _Seen(
        type=str(stored),
        kind=kind,
        codes=codes,
        counts=counts,
        values=figures,
        shares=shares,
        examples=tuple(_printable(text) for text in texts[:5]),
        words=float(np.mean([len(text.split()) for text in texts])) if texts else 0.0,
    )


def _has_no_use(kind: pa.DataType) -> bool:
    types = pa.types
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    clock = types.is_time(kind) or types.is_duration(kind) or types.is_interval(kind)
    return bool(types.is_nested(kind) or binary or clock)


def _coded(raw: pa.ChunkedArray) -> tuple[Codes, pa.Array]:
    """int32 [n] into the distinct values that occur; NaN counts as missing."""
    if pa.types.is_floating(raw.type):
        raw = pc.if_else(pc.is_nan(raw), None, raw)
    if not pa.types.is_dictionary(raw.type):
        raw = pc.dictionary_encode(raw)
    combined = raw.unify_dictionaries().combine_chunks()
    array = combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
    indices = np.asarray(pc.fill_null(array.indices.cast(pa.int32()), -1))
    used = np.unique(indices[indices >= 0])
    renumbered = np.full(len(array.dictionary) + 1, -1, dtype=np.int32)
    renumbered[used] = np.arange(len(used))
    values = array.dictionary.take(pa.array(used))
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    return renumbered[indices], values


def _read_figures(values: pa.Array) -> tuple[Kind, Floats, dict[str, float]]:
    """Kind and float64 [D] of stored numbers, booleans and times."""
    if pa.types.is_temporal(values.type):
        stamps = values.cast(pa.timestamp("ms", getattr(values.type, "tz", None)), safe=False)
        return "time", np.asarray(stamps.cast(pa.int64())).astype(np.float64), {"time": 1.0}
    figures = np.asarray(values.cast(pa.float64(), safe=False))
    if pa.types.is_boolean(values.type):
        return "boolean", figures, {"number": 1.0}
    return _number_kind(figures), figures, {"number": 1.0}


def _number_kind(figures: Floats) -> Kind:
    known = figures[np.isfinite(figures)]
    return "integer" if len(known) and bool((known == np.floor(known)).all()) else "number"


def _read_texts(values: pa.Array, counts: npt.NDArray[np.int64]) -> tuple[Kind, Floats | None, dict[str, float]]:
    """Kind of texts, their figures [D] where they have some, and the shares of rows that could be read as each kind."""
    shares = {}
    if len(values) <= 4 and {text.lower() for text in values.to_pylist()} <= {"true", "false"}:
        return "boolean", np.array([float(text.lower() == "true") for text in values.to_pylist()]), {"number": 1.0}
    readers: tuple[tuple[str, Callable[[pa.Array], Floats]], ...] = (("number", _numbers), ("time", _times))
    for name, reader in readers:
        shares[name], figures = _share_read(values, counts, reader)
        if shares[name] >= READABLE:
            return ("time" if name == "time" else _number_kind(figures)), figures, shares
    shares["ip"], _ = _share_read(values, counts, _addresses)
    return ("ip" if shares["ip"] >= READABLE else "text"), None, shares


def _share_read(
    values: pa.Array, counts: npt.NDArray[np.int64], reader: Callable[[pa.Array], Floats]
) -> tuple[float, Floats]:
    """Share of rows that a reader understands, and its figures [D]; a thousand values say whether to try the rest."""
    first = ~np.isnan(reader(values.slice(0, 1000)))
    if not first.mean() > 0.5:
        return float((first * counts[:1000]).sum() / counts[:1000].sum()), np.full(len(values), np.nan)
    figures = reader(values)
    return float((~np.isnan(figures) * counts).sum() / counts.sum()), figures


def _numbers(texts: pa.Array) -> Floats:
    try:
        return np.asarray(texts.cast(pa.float64()))
    except pa.ArrowInvalid:
        return _one_by_one(texts, float)


def _times(texts: pa.Array) -> Floats:
    for target in (pa.timestamp("ms"), pa.timestamp("ms", "UTC")):
        try:
            return np.asarray(texts.cast(target).cast(pa.int64())).astype(np.float64)
        except pa.ArrowInvalid:
            continue
    return _one_by_one(texts, lambda text: time_ms(text, "iso"))


def _addresses(texts: pa.Array) -> Floats:
    """1 where a text is an IP address."""
    return np.array([np.nan if network_of(text) is None else 1.0 for text in texts.to_pylist()])


def _one_by_one(texts: pa.Array, reader: Callable[[str], float]) -> Floats:
    out = np.full(len(texts), np.nan)
    for i, text in enumerate(texts.to_pylist()):
        try:
            out[i] = reader(text)
        except (ValueError, OverflowError):
            continue
    return out


def _facts_of(name: str, seen: _Seen, rows: int) -> ColumnFacts:
    """The facts of a column of a file with `rows` rows."""
    sampled, present = len(seen.codes), int(seen.counts.sum())
    facts = ColumnFacts(
        name=name,
        type=seen.type,
        kind=seen.kind,
        rows=rows,
        sampled=sampled,
        nulls=sampled - present,
        distinct=len(seen.counts),
        repeats=_repeats(seen.counts, rows * present / sampled),
        examples=seen.examples,
        number_share=seen.shares.get("number", 0.0),
        time_share=seen.shares.get("time", 0.0),
        ip_share=seen.shares.get("ip", 0.0),
        card_share=seen.shares.get("card", 0.0),
        words=seen.words,
    )
    if seen.values is None:
        return facts
    read = np.isfinite(seen.values)
    distinct, counts = seen.values[read], seen.counts[read]
    if len(distinct) == 0:
        return facts
    known = seen.row_values()
    known = known[np.isfinite(known)]
    binary = seen.kind in ("integer", "boolean") and bool(np.isin(distinct, (0.0, 1.0)).all())
    cents = np.abs(distinct * 100 - np.round(distinct * 100)) <= 1e-6
    return replace(
        facts,
        smallest=float(distinct.min()),
        largest=float(distinct.max()),
        median=float(np.median(known)),
        mean=float(known.mean()),
        cents=bool((cents * counts).sum() >= READABLE * counts.sum()),
        increasing=bool((np.diff(known) >= 0).all()),
        ones=float(known.mean()) if binary else None,
    )


def _repeats(counts: npt.NDArray[np.int64], rows: float) -> float:
    """Rows that share a value with an average row of `rows` rows, from the equal pairs in a random sample [D]."""
    n = int(counts.sum())
    if n < 2:
        return 1.0
    return 1.0 + (rows - 1) * float((counts * (counts - 1)).sum()) / (n * (n - 1))


# --- relations to the label -----------------------------------------------------------------------


def caught_alone(inspection: Inspection, column: ColumnFacts, label: str, times: Floats) -> float | None:
    """Share of the later half's frauds that the column alone finds at LEAK_PRECISION, having seen the earlier half.

    None where there are too few frauds to say. Halves are of the time, so that a device or merchant that went bad for
    some days does not count; and a value is judged by its fraud rate, so that it needs no order.
    """
    fraud = inspection.values[label]
    known = ~np.isnan(fraud) & ~np.isnan(times)
    at_fraud = times[known & (fraud == 1)]
    if len(at_fraud) < 2 * LEAST_FRAUDS:
        return None
    early = times < np.median(at_fraud)
    best = 0.0
    for groups in _groupings(inspection, column):
        best = max(best, _recall(groups, fraud == 1, known & early, known & ~early))
    return best


def _groupings(inspection: Inspection, column: ColumnFacts) -> Iterator[npt.NDArray[np.int64]]:
    """int64 [n], twice: the commonest value, which may be "missing", against the rest; values or ranges of values."""
    codes = inspection.codes[column.name].astype(np.int64) + 1
    yield (codes == np.bincount(codes).argmax()).astype(np.int64)
    figures = inspection.values.get(column.name)
    if figures is None or column.distinct <= FEW_VALUES:
        yield codes
        return
    tail = [0.0, 0.0001, 0.0005, 0.001, 0.002, 0.005]
    levels = [*tail, *np.linspace(0.01, 0.99, 99), *(1 - x for x in reversed(tail))]
    edges = np.unique(np.quantile(figures[np.isfinite(figures)], levels))
    ranges = np.searchsorted(edges, figures, side="left") + 1
    yield np.where(np.isnan(figures), 0, ranges)


def _recall(groups: npt.NDArray[np.int64], fraud: Mask, early: Mask, late: Mask) -> float:
    """Best recall on the late rows at LEAK_PRECISION, groups being ranked by their fraud rate on the early rows."""
    size = int(groups.max()) + 1
    seen = np.bincount(groups[early], minlength=size)
    bad = np.bincount(groups[early & fraud], minlength=size)
    rate = (bad + fraud[early].mean()) / (seen + 1)
    order = np.argsort(-rate, kind="stable")
    hits = np.cumsum(np.bincount(groups[late & fraud], minlength=size)[order])
    flagged = np.cumsum(np.bincount(groups[late], minlength=size)[order])
    precise = (hits >= LEAK_PRECISION * flagged) & (flagged > 0)
    return float(hits[precise].max(initial=0) / max(int((late & fraud).sum()), 1))


# --- the proposal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The role of a column and why; `also` names other columns that could have had it."""

    column: str
    role: Role
    why: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProposedSplit:
    """Dates of the split in milliseconds since the epoch, and the label delay they assume."""

    first: int
    last: int
    train_start: int
    validation: int
    """Duration."""
    train_end: int
    test_start: int
    test_end: int
    label_delay: int
    """Duration."""


@dataclass(frozen=True)
class Given:
    """Columns that the caller knows; None is guessed."""

    user: str | None = None
    time: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Proposal:
    """A role for every column of a file, and a split."""

    path: Path
    rows: int
    sampled: int
    choices: tuple[Choice, ...]
    """In file order, each column once; an amount is a numeric feature too."""
    places: tuple[tuple[str, str], ...]
    time_unit: TimeUnit
    split: ProposedSplit
    notes: tuple[str, ...]
    """What the caller should know before training."""
    user_is_card: bool = False
    """Most users look like card numbers."""

    def of(self, *roles: Role) -> list[Choice]:
        """The choices of some roles."""
        return [choice for choice in self.choices if choice.role in roles]

    def one(self, role: Role) -> Choice | None:
        """The choice of a role that at most one column has."""
        return next(iter(self.of(role)), None)


def propose(inspection: Inspection, given: Given | None = None) -> Proposal:
    """Roles and dates from facts.

    Raises:
        DataError: no column can be the time or the user, or nothing is left as a feature; the message has candidates.
    """
    draft = _Draft(inspection, given or Given())
    draft.choose_time()
    draft.choose_user()
    draft.choose_transaction()
    draft.choose_label()
    draft.choose_known_at()
    for facts in draft.rest():
        draft.leave_out(facts)
    draft.choose_amount()
    draft.choose_places()
    for facts in draft.rest():
        draft.choose_feature(facts)
    return draft.proposal()


class _Draft:
    """A proposal in the making: roles are given one after the other, and a column that has one keeps it."""

    def __init__(self, inspection: Inspection, given: Given) -> None:
        self.inspection = inspection
        self.given = given
        self.facts = {facts.name: facts for facts in inspection.columns}
        self.choices: dict[str, Choice] = {}
        self.places: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.unit: TimeUnit = "iso"
        self.delay: int | None = None
        self.time = self.user = ""
        self.label: str | None = None
        for name in (given.user, given.time, given.label):
            if name is not None and name not in self.facts:
                raise ConfigError(f"there is no column {name!r}; the columns are: {', '.join(self.facts)}")

    def rest(self) -> list[ColumnFacts]:
        """Columns without a role."""
        return [facts for name, facts in self.facts.items() if name not in self.choices]

    def give(self, facts: ColumnFacts, role: Role, why: str, also: Iterable[str] = ()) -> None:
        """Give a column its role."""
        if facts.number_share < 1 and role in ("label", "amount", "numeric", "geo"):
            why += f"; {_share(1 - facts.number_share)} of its cells are no numbers"
        self.choices[facts.name] = Choice(facts.name, role, why, tuple(also))

    def ranked(self, score: Callable[[ColumnFacts], float | None], least: float) -> list[ColumnFacts]:
        """Columns without a role whose score reaches `least`, best first, equal ones in file order."""
        scored = [(score(facts), facts) for facts in self.rest()]
        good = [(value, facts) for value, facts in scored if value is not None and value >= least]
        return [facts for _, facts in sorted(good, key=lambda pair: -pair[0])]

    # --- the columns of [data]

    def choose_time(self) -> None:
        """The time of the transaction. Raises DataError."""
        ranked = self.ranked(_time_score, 1.0)
        if self.given.time is not None:
            ranked = [self.facts[self.given.time]]
            if _time_unit(ranked[0]) is None:
                raise DataError(f"column {self.given.time!r} cannot be the time: {_no_time(ranked[0])}")
        if not ranked:
            near = [facts for facts in self.rest() if says(facts.name, (*TIME_WORDS, "dt", "step", "day", "hour"))]
            seen = "; ".join(f"{facts.name}: {_no_time(facts)}" for facts in near)
            raise DataError(
                f"{self.inspection.path}: no column looks like the time of a transaction; expected timestamps, "
                f"ISO 8601 texts, or seconds or milliseconds since 1970. Candidates: {seen or 'none, by name'}"
            )
        best = ranked[0]
        self.time, unit = best.name, _time_unit(best)
        assert unit is not None
        self.unit = unit
        times = self.inspection.times(best.name, unit)
        low, high = (_moment(float(bound)) for bound in (np.nanmin(times), np.nanmax(times)))
        order = "in time order" if best.increasing else "rows are not in time order, which does no harm"
        self.give(best, "time", f"{_TIME_KINDS[unit, best.type.endswith('string')]} from {low} to {high}, {order}",
                  (facts.name for facts in ranked[1:]))  # fmt: skip

    def choose_user(self) -> None:
        """Whose sequence a transaction belongs to. Raises DataError."""
        ranked = self.ranked(_user_score, 2.0)
        if self.given.user is not None:
            ranked = [self.facts[self.given.user]]
            if ranked[0].kind in ("nothing", "other", "time"):
                raise DataError(f"column {self.given.user!r} cannot be the user: it is of type {ranked[0].type}")
        if not ranked:
            repeated = [facts for facts in self.rest() if facts.kind in ("integer", "text") and facts.repeats >= 1.5]
            repeated = sorted((facts for facts in repeated if facts.ones is None), key=lambda facts: -facts.distinct)
            seen = ", ".join(f"{facts.name} ({facts.values_text()})" for facts in repeated[:5]) or "none"
            raise DataError(
                f"{self.inspection.path}: no column looks like a user; expected one whose values come back and whose "
                f"name says so, such as user_id, customer or card. Columns with repeated values: {seen}. "
                "Name it with --user COLUMN"
            )
        best = ranked[0]
        self.user = best.name
        word = "given" if self.given.user else "named like a user" if says(best.name, USER_WORDS) else "repeated ids"
        missing = f"; missing in {_share(best.nulls / best.sampled)} of the rows" if best.nulls else ""
        self.give(best, "user", f"{word}: {best.values_text()}{missing}", (facts.name for facts in ranked[1:]))

    def choose_transaction(self) -> None:
        """The id of a transaction, if there is one."""
        ranked = self.ranked(_transaction_score, 1.5)
        if ranked:
            best = ranked[0]
            order = ", growing down the file" if best.increasing else ""
            seen = "" if best.exact else " in the sample"
            self.give(best, "transaction", f"a different value in each row{seen}{order}", (f.name for f in ranked[1:]))

    def choose_label(self) -> None:
        """0 and 1, named like a label."""
        ranked = self.ranked(_label_score, 1.0)
        if self.given.label is not None:
            ranked = [self.facts[self.given.label]]
            if ranked[0].ones is None:
                raise DataError(f"column {self.given.label!r} cannot be the label: expected 0 and 1")
        if not ranked:
            self.notes.append(self._no_label())
            return
        best = ranked[0]
        self.label = best.name
        assert best.ones is not None
        unknown = f", unknown in {_share(best.nulls / best.sampled)}" if best.nulls else ""
        self.give(best, "label", f"0 and 1, {_share(best.ones)} are 1{unknown}", (facts.name for facts in ranked[1:]))

    def _no_label(self) -> str:
        named = [facts for facts in self.rest() if 2 <= facts.distinct <= 5 and says(facts.name, LABEL_WORDS)]
        if named:
            seen = f"{named[0].name!r} is named like one, but holds {', '.join(map(repr, named[0].examples))}"
            return f"no label was found: {seen}; write 1 for fraud and 0 for honest there and run this again"
        binary = [facts.name for facts in self.rest() if facts.ones is not None and 0 < facts.ones < 0.5]
        seen = f"; columns of 0 and 1: {', '.join(binary)}; name one with --label COLUMN" if binary else ""
        return f"no label was found: training needs a column of 0 (honest) and 1 (fraud){seen}"

    def choose_known_at(self) -> None:
        """When a label became known, if the file says so in the way in which it says the time."""
        if self.label is None:
            return
        base = self.inspection.times(self.time, self.unit)
        for facts in self.rest():
            if _time_unit(facts) != self.unit or not says(facts.name, KNOWN_WORDS):
                continue
            later = self.inspection.times(facts.name, self.unit) - base
            later = later[~np.isnan(later)]
            if len(later) >= LEAST_FRAUDS and (later >= 0).mean() > 0.99:
                late = float(np.quantile(later, 0.9))
                grain = DAY_MS if late >= DAY_MS else HOUR_MS
                self.delay = max(1, math.ceil(late / grain)) * grain
                why = f"a time after the transaction's, at most {_duration(self.delay)} later in nine of ten rows"
                self.give(facts, "label known at", why)
                return

    # --- columns that must not or need not be features

    def leave_out(self, facts: ColumnFacts) -> None:
        """Leave out what holds nothing, repeats another column or gives the answer away."""
        why = self._repeated(facts) or _useless(facts) or self._leak(facts)
        if why:
            self.give(facts, "left out", why)

    def _repeated(self, facts: ColumnFacts) -> str | None:
        """Why the column says what the time or the user's column says already."""
        unit = _time_unit(facts)
        if unit is not None and (facts.kind == "time" or says(facts.name, TIME_WORDS)):
            apart = self.inspection.times(facts.name, unit) - self.inspection.times(self.time, self.unit)
            apart = apart[~np.isnan(apart)]
            offset = float(np.median(apart)) if len(apart) else 0.0
            if len(apart) and (np.abs(apart - offset) <= SECOND_MS).mean() > 0.99:
                shift = "" if abs(offset) <= SECOND_MS else f", always {_span(abs(offset))} apart"
                return f"repeats {self.time}{shift}"
        if self.inspection.same_groups(facts, self.facts[self.user]):
            return f"repeats {self.user}: one value for each user"
        return None

    def _leak(self, facts: ColumnFacts) -> str | None:
        """Why the column gives the label away."""
        named = "a leak: its name says that it is about the label" if says(facts.name, FRAUD_WORDS) else None
        if self.label is None or facts.kind == "other" or (facts.kind == "text" and facts.unique):
            return named
        times = self.inspection.times(self.time, self.unit)
        caught = caught_alone(self.inspection, facts, self.label, times)
        if caught is not None and caught >= LEAK_RECALL:
            return f"a leak: alone it finds {_share(caught)} of the frauds; use it only if it is known beforehand"
        return named

    # --- features

    def choose_amount(self) -> None:
        """Money, for the figures in money and the sums of the contexts."""
        ranked = self.ranked(self._amount_score, 2.5)
        if ranked:
            self.give(ranked[0], "amount", _range(ranked[0]), (facts.name for facts in ranked[1:]))

    def _amount_score(self, facts: ColumnFacts) -> float | None:
        score = _amount_score(facts)
        return None if score is None or self.inspection.constant_within(facts, self.user) else score

    def choose_places(self) -> None:
        """Pairs of latitude and longitude; a place that never changes within a user has no distance to tell."""
        pairs = list(_place_pairs(self.rest()))
        moving = [pair for pair in pairs if not self.inspection.constant_within(pair[0], self.user)]
        for lat, long in pairs:
            if (lat, long) in moving:
                self.places.append((lat.name, long.name))
                for facts in (lat, long):
                    self.give(facts, "geo", f"with {(long if facts is lat else lat).name}: a place that changes from "
                                            "transaction to transaction")  # fmt: skip
            else:
                better = f"; {moving[0][0].name} and {moving[0][1].name} are where it happens" if moving else ""
                for facts in (lat, long):
                    self.give(facts, "left out", f"the user's home: it never changes within a user{better}")

    def choose_feature(self, facts: ColumnFacts) -> None:
        """Give a column its place among the features, or leave it out."""
        twin = self._twin(facts)
        own = self.inspection.constant_within(facts, self.user)
        doubt = "; make sure that it is known when the transaction happens" if says(facts.name, LATER_WORDS) else ""
        if twin:
            self.give(facts, "left out", f"repeats {twin}: equal in the same rows")
        elif facts.kind == "ip":
            self.give(facts, "ip", f"IP addresses ({facts.values_text()}); their networks become contexts")
        elif own and self._names_user(facts):
            why = f"nearly says who the user is: {facts.distinct:,} values that never change within a user"
            self.give(facts, "left out", why)
        elif facts.kind == "time":
            why = "a second time, for which there is no place; a number made from it (an age, a delay) could be used"
            self.give(facts, "left out", why)
        elif self._is_entity(facts):
            self.give(facts, "context", f"{facts.values_text()}{self._sharing(facts)}{doubt}")
        elif _is_number(facts):
            self.give(facts, "numeric", f"{_range(facts)}{self._attribute(own)}{doubt}")
        elif facts.distinct <= FEW_VALUES and facts.per_value() >= 5:
            self.give(facts, "categorical", f"{facts.values_text()}{self._attribute(own)}{doubt}")
        else:
            self.give(facts, "left out", f"too rarely the same: {facts.values_text()}")

    def _twin(self, facts: ColumnFacts) -> str | None:
        """An earlier feature that is equal up to spelling."""
        features = [c for c in self.choices.values() if c.role in ("amount", "numeric", "categorical", "context", "ip")]
        return next((c.column for c in features if self.inspection.same_groups(facts, self.facts[c.column])), None)

    def _names_user(self, facts: ColumnFacts) -> bool:
        """An attribute with so many values that a model would learn people by heart; ids of entities are meant to."""
        users = self.facts[self.user].distinct
        named = says(facts.name, (*ENTITY_WORDS, *USER_WORDS)) and says_id(facts.name)
        return facts.distinct * NAMES_USER > users and not (named and facts.distinct < 0.9 * users)

    def _is_entity(self, facts: ColumnFacts) -> bool:
        """Something with a life of its own, in which several users or transactions meet."""
        if facts.kind not in ("integer", "text") or facts.repeats < 2 or facts.distinct < 10:
            return False
        if facts.distinct <= FEW_VALUES and says(facts.name, KIND_WORDS):
            return False
        if says(facts.name, (*ENTITY_WORDS, *USER_WORDS)):
            return facts.kind == "text" or not says(facts.name, MEASURE_WORDS)
        many = facts.distinct > FEW_VALUES and (facts.kind == "text" or _is_code(facts))
        return many and self.inspection.users_per_value(facts, self.user) >= 2

    def _sharing(self, facts: ColumnFacts) -> str:
        shared = self.inspection.users_per_value(facts, self.user)
        return f", {_round(shared)} users each" if shared >= 1.5 else ", mostly one user each"

    @staticmethod
    def _attribute(own: bool) -> str:
        return "; an attribute of the user, it never changes" if own else ""

    # --- the whole

    def proposal(self) -> Proposal:
        """The finished proposal. Raises DataError where no feature is left."""
        features = ("amount", "numeric", "categorical", "context", "geo", "ip")
        if not any(choice.role in features for choice in self.choices.values()):
            seen = "; ".join(f"{choice.column}: {choice.why}" for choice in self.choices.values())
            raise DataError(f"{self.inspection.path}: no column is left as a feature. {seen}")
        times = self.inspection.times(self.time, self.unit)
        first, last = self._bulk(times[~np.isnan(times)])
        split = propose_split(first, last, self.delay)
        if self.label is not None:
            scale = self.inspection.rows / self.inspection.sampled
            split = _widened(split, times[self.inspection.values[self.label] == 1], scale)
        return Proposal(
            path=self.inspection.path,
            rows=self.inspection.rows,
            sampled=self.inspection.sampled,
            choices=tuple(self.choices[name] for name in self.facts),
            places=tuple(self.places),
            time_unit=self.unit,
            split=split,
            notes=tuple(self.notes),
            user_is_card=self.facts[self.user].card_share > MOSTLY,
        )

    def _bulk(self, times: Floats) -> tuple[int, int]:
        """First and last time, without a few rows that lie far from all others."""
        low, high = np.quantile(times, (0.001, 0.999))
        first, last = float(times.min()), float(times.max())
        reach = max(high - low, HOUR_MS)
        if low - first > reach / 2 or last - high > reach / 2:
            kept = times[(times >= low - reach / 2) & (times <= high + reach / 2)]
            first, last = float(kept.min()), float(kept.max())
            self.notes.append(
                f"a few times lie far outside {_moment(first)} to {_moment(last)}; the split follows the others"
            )
        return int(first), int(last)


# --- judgements about one column ------------------------------------------------------------------

_TIME_KINDS: dict[tuple[TimeUnit, bool], str] = {
    ("iso", False): "timestamps",
    ("iso", True): "ISO 8601 texts",
    ("s", False): "seconds since 1970",
    ("s", True): "seconds since 1970",
    ("ms", False): "milliseconds since 1970",
    ("ms", True): "milliseconds since 1970",
}


def _time_unit(facts: ColumnFacts) -> TimeUnit | None:
    """How the column spells times, or None where it holds none."""
    if facts.kind == "time":
        return "iso"
    if facts.kind not in ("integer", "number") or facts.smallest is None or facts.largest is None:
        return None
    low, high = EPOCH_RANGE_MS
    units: tuple[tuple[TimeUnit, int], ...] = (("s", SECOND_MS), ("ms", 1))
    return next((unit for unit, ms in units if low <= facts.smallest * ms and facts.largest * ms < high), None)


def _time_score(facts: ColumnFacts) -> float | None:
    unit = _time_unit(facts)
    if unit is None or facts.present < 0.95 * facts.sampled:
        return None
    named = says(facts.name, TIME_WORDS) or tokens_of(facts.name)[-1:] == ["dt"]
    if facts.kind != "time" and not named:
        return None
    score = 2.0 * (facts.kind == "time") + 3.0 * named + 2.0 * facts.increasing + 2.0 * facts.distinct / facts.present
    return score - 5.0 * says(facts.name, (*OTHER_TIME_WORDS, *KNOWN_WORDS))


def _no_time(facts: ColumnFacts) -> str:
    """What a column that is named like a time holds instead, and what to do about it."""
    if facts.kind == "text":
        return f"texts such as {', '.join(map(repr, facts.examples[:1]))}, not ISO 8601 such as '2018-04-01T12:30:00'"
    if facts.smallest is not None and facts.largest is not None and facts.numeric:
        bounds = f"numbers from {_figure(facts.smallest)} to {_figure(facts.largest)}"
        if EPOCH_RANGE_MS[0] * 1000 <= facts.smallest:
            return f"{bounds}: microseconds or finer; divide them to milliseconds"
        return f"{bounds}: a clock of its own; add the moment at which it starts, in seconds since 1970"
    return f"values of type {facts.type}"


def _user_score(facts: ColumnFacts) -> float | None:
    if facts.kind not in ("integer", "text") or facts.distinct < 2 or facts.repeats < 1.5 or facts.ones is not None:
        return None
    named = 4.0 * says(facts.name, USER_WORDS) + 1.0 * says_id(facts.name) + 0.5 * (facts.kind == "text")
    other = 3.0 * says(facts.name, ENTITY_WORDS) + 4.0 * says(facts.name, (*KIND_WORDS, *LABEL_WORDS))
    money = 4.0 * says(facts.name, (*AMOUNT_WORDS, *MEASURE_WORDS))
    doubt = 2.0 * (facts.distinct < 20 and facts.distinct * 50 < facts.present) + 1.0 * (facts.nulls > 0)
    return named - other - money - doubt + min(2.0, math.log10(facts.distinct) / 2)


def _transaction_score(facts: ColumnFacts) -> float | None:
    if facts.kind not in ("integer", "text") or not facts.unique or facts.nulls:
        return None
    if _time_unit(facts) is not None and says(facts.name, TIME_WORDS):
        return None
    if says_index(facts.name):
        return None  # a row number, which no request would carry
    score = 3.0 * says(facts.name, TRANSACTION_WORDS) + 3.0 * says_id(facts.name)
    score += 1.5 * (facts.kind == "integer" and facts.increasing)
    return score - 3.0 * says(facts.name, (*ENTITY_WORDS, *USER_WORDS))


def _label_score(facts: ColumnFacts) -> float | None:
    if facts.ones is None or not says(facts.name, LABEL_WORDS):
        return None
    score = 2.0 + 3.0 * says(facts.name, ("fraud", "fraudulent")) + 1.0 * (0 < facts.ones < 0.3)
    return score - 3.0 * says(facts.name, FORECAST_WORDS)


def _amount_score(facts: ColumnFacts) -> float | None:
    if facts.kind not in ("integer", "number") or facts.ones is not None:
        return None
    if facts.median is None or facts.mean is None or facts.smallest is None:
        return None
    other = says(facts.name, (*MEASURE_WORDS, *KIND_WORDS)) or says_id(facts.name)
    score = 4.0 * says(facts.name, AMOUNT_WORDS) - 3.0 * other
    score += 1.5 * (facts.kind == "number" and facts.cents)
    return score + 0.5 * (facts.smallest >= 0) + 0.5 * (facts.mean > facts.median)


def _useless(facts: ColumnFacts) -> str | None:
    """Why a column holds nothing that a model could learn from."""
    if facts.kind == "other":
        return f"of type {facts.type}, which no feature can be made of"
    if facts.kind == "nothing" or facts.nulls >= 0.995 * facts.sampled:
        return "almost always missing" if facts.distinct else "always missing"
    if facts.distinct == 1 and (facts.numeric or facts.nulls == 0):
        return "always the same"
    if says_index(facts.name) and facts.kind == "integer":
        return "a row number"
    if not facts.name:
        return "it has no name"
    if facts.unique and facts.kind in ("integer", "text") and not says(facts.name, AMOUNT_WORDS):
        return "a different value in each row"
    if facts.kind == "text" and facts.words > 4 and facts.distinct > FEW_VALUES:
        return "free text"
    if facts.kind == "integer" and says(facts.name, ("ip", "ipv4", "ipaddr")) and facts.distinct > FEW_VALUES:
        return "IP addresses as numbers; write them as texts such as '192.0.2.1'"
    return None


def _place_pairs(columns: list[ColumnFacts]) -> Iterator[tuple[ColumnFacts, ColumnFacts]]:
    """Latitude and longitude whose names are otherwise equal and whose values can be degrees."""
    longitudes = {_place_name(facts, LONGITUDE_WORDS, 180): facts for facts in columns}
    for facts in columns:
        name = _place_name(facts, LATITUDE_WORDS, 90)
        if name is not None and name in longitudes:
            yield facts, longitudes[name]


def _place_name(facts: ColumnFacts, words: tuple[str, ...], bound: float) -> tuple[str, ...] | None:
    """The other words of a coordinate's name, or None where the column is no such coordinate."""
    tokens = tokens_of(facts.name)
    if not any(token in words for token in tokens) or facts.kind not in ("number", "integer"):
        return None
    if facts.smallest is None or facts.largest is None or max(-facts.smallest, facts.largest) > bound:
        return None
    return tuple(token for token in tokens if token not in words)


def _is_code(facts: ColumnFacts) -> bool:
    """Whether numbers are names of something: adding them up would be no use."""
    named = says(facts.name, (*KIND_WORDS, *ENTITY_WORDS, *USER_WORDS)) or says_id(facts.name)
    named = named and facts.ones is None and not says(facts.name, (*MEASURE_WORDS, *AMOUNT_WORDS))
    return facts.kind == "integer" and (named or (facts.largest or 0) >= 1e10)


def _is_number(facts: ColumnFacts) -> bool:
    return facts.kind == "number" or (facts.kind == "integer" and not _is_code(facts))


# --- the split ------------------------------------------------------------------------------------


def propose_split(first: int, last: int, label_delay: int | None = None) -> ProposedSplit:
    """Dates for data from `first` to `last` (ms): history to fill contexts, train, validation, a gap, test.

    Raises:
        DataError: the data span less than an hour.
    """
    span = last - first
    if span < HOUR_MS:
        raise DataError(
            f"the times reach only from {_moment(first)} to {_moment(last)}; a split by time needs an hour at the least"
        )
    grain = DAY_MS if span >= 14 * DAY_MS else HOUR_MS if span >= DAY_MS else MINUTE_MS
    delay = label_delay if label_delay is not None else min(7 * DAY_MS, _whole(span / 10, grain))
    gap = min(delay, _whole(0.3 * span, grain))
    test_end = -(-(last + 1) // grain) * grain
    test_start = test_end - _whole(0.15 * span, grain)
    train_start = first // grain * grain + min(21 * DAY_MS, _whole(span / 8, grain))
    return ProposedSplit(
        first=first,
        last=last,
        train_start=train_start,
        validation=min(28 * DAY_MS, _whole(0.08 * span, grain)),
        train_end=test_start - gap,
        test_start=test_start,
        test_end=test_end,
        label_delay=delay,
    )


def _whole(duration: float, grain: int) -> int:
    """A duration in whole grains, at least one."""
    return max(1, round(duration / grain)) * grain


def _widened(split: ProposedSplit, fraud_times: Floats, scale: float) -> ProposedSplit:
    """More validation days where frauds are rare, up to a third of the time before `train_end`.

    `fraud_times` are of a sample, each standing for `scale` frauds.
    """
    most = (split.train_end - split.train_start) // 3
    grain = DAY_MS if split.validation % DAY_MS == 0 else MINUTE_MS
    while True:
        begin = split.train_end - split.validation
        frauds = scale * int(((fraud_times >= begin) & (fraud_times < split.train_end)).sum())
        wider = replace(split, validation=_whole(1.6 * split.validation, grain))
        if frauds >= VALIDATION_FRAUDS or wider.validation > most:
            return split
        split = wider


# --- reading the file as training would -----------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What training would make of the file: rows and frauds per part of the split, or why it would refuse."""

    rows: int = 0
    repeated: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and frauds of train, validation and test."""
    refusal: str | None = None


def check(config: Config, data: Path) -> Check:
    """Read, clean and split the whole file by the code that training uses."""
    report = Check()
    try:
        table, problems = read_transactions(data, schema_of(config), config.data)
        table, cleaning = clean(table, problems, config.cleaning)
        report = replace(
            report,
            rows=cleaning["rows_read"],
            repeated=sum(f["rows"] for f in cleaning["findings"] if f["reason"].startswith("repeated")),
        )
        if table.label is None:
            return report
        rows = rows_of(split_of(config, table), table, config.data.label_delay)
        parts = {name: getattr(rows, name) for name in ("train", "validation", "test")}
        report = replace(
            report, parts={name: (int(m.sum()), int((table.label[m] == 1).sum())) for name, m in parts.items()}
        )
        empty = np.isnan(table.numeric_inputs()[rows.before_validation]).all(axis=0)
        if empty.any():
            column = table.schema.numeric_inputs[int(empty.argmax())]
            raise DataError(f"column {column!r} has no value in the training rows")
    except SeqfraudError as error:
        return replace(report, refusal=str(error))
    return report


# --- TOML -----------------------------------------------------------------------------------------

WIDTH = 118


def to_toml(proposal: Proposal, folder: Path, checked: Check | None = None) -> str:
    """The configuration as text, every guess with a comment; paths are relative to `folder`."""
    sections = (
        _head_lines(proposal, checked),
        _data_lines(proposal, folder),
        _feature_lines(proposal),
        _split_lines(proposal, checked),
        _identifier_lines(proposal),
        _comment("[model], [training], [calibration], [decision] and [serve] have defaults that work."),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _head_lines(proposal: Proposal, checked: Check | None) -> list[str]:
    split = proposal.split
    judged = f", judged by a random sample of {proposal.sampled:,}" if proposal.sampled < proposal.rows else ""
    text = (
        f"Proposed by `seqfraud init` for {proposal.path.name}: {proposal.rows:,} transactions from "
        f"{_moment(split.first)} to {_moment(split.last)}{judged}. "
        "Every guess is explained; change what you know better."
    )
    lines = _comment(text)
    for note in proposal.notes:
        lines += _comment(f"NOTE: {note}.")
    if checked is not None and checked.refusal:
        lines += _comment(f"NOTE: training refuses the file as it is: {checked.refusal}.")
    if checked is not None and checked.repeated:
        lines += _comment(f"{checked.repeated:,} rows repeat an earlier one (the same id or content) and count once.")
    return lines


def _data_lines(proposal: Proposal, folder: Path) -> list[str]:
    path = os.path.relpath(proposal.path.resolve(), folder.resolve())
    lines = ["[data]", f"path = {_quoted(Path(path).as_posix())}  # relative to this file's folder"]
    no_id = "No column is an id of transactions: seqfraud derives one from the declared columns."
    lines += _key(proposal, "transaction", "transaction", no_id)
    lines += _key(proposal, "user", "user", "")
    lines += _key(proposal, "time", "time", "")
    if proposal.time_unit != "iso":
        lines.append(f'time_unit = "{proposal.time_unit}"')
    missing = "No label was found. Training needs a column of 0 (honest) and 1 (fraud); put its name here:"
    lines += _key(proposal, "label", "label", missing)
    if proposal.one("label") is None:
        lines.append('# label = "is_fraud"')
    lines += _key(proposal, "label_known_at", "label known at", "")
    source = "nine of ten in the column above" if proposal.one("label known at") else "assumed, the file does not say"
    lines += _comment(f"How long after its transaction a fraud is known ({source}). It sets the gap before the test "
                      "days and when contexts learn of a fraud.")  # fmt: skip
    lines.append(f'label_delay = "{_duration(proposal.split.label_delay)}"')
    lines += _key(proposal, "amount", "amount", "No column looks like money: figures in money are left out.")
    return lines


def _key(proposal: Proposal, key: str, role: Role, otherwise: str) -> list[str]:
    """A key of [data] with its comment, or the comment that says why it is not there."""
    choice = proposal.one(role)
    if choice is None:
        return _comment(otherwise) if otherwise else []
    also = f" Also possible: {', '.join(choice.also)}." if choice.also else ""
    return [*_comment(f"{_sentence(choice.why)}{also}"), f"{key} = {_quoted(choice.column)}"]


def _feature_lines(proposal: Proposal) -> list[str]:
    lines = ["[features]", *_comment("Numbers: scaled and cut into bins, both fitted on the training days.")]
    lines += _list("numeric", [(_quoted(c.column), c.why) for c in proposal.of("amount", "numeric")])
    lines += _comment("Categories: embedded; values not seen in training are allowed.")
    lines += _list("categorical", [(_quoted(c.column), c.why) for c in proposal.of("categorical")])
    lines += _comment("Entities whose recent activity and known frauds inform the score.")
    lines += _list("context", [(_quoted(c.column), c.why) for c in proposal.of("context")])
    lines += _comment("Latitude and longitude: distance and speed since the user's last transaction.")
    place = "a place that changes from transaction to transaction"
    lines += _list("geo", [(f"[{_quoted(lat)}, {_quoted(long)}]", place) for lat, long in proposal.places])
    lines += _comment("IP addresses: their networks are contexts too.")
    lines += _list("ip", [(_quoted(c.column), c.why) for c in proposal.of("ip")])
    dropped = proposal.of("left out")
    if dropped:
        lines += ["", "# Left out:"]
        for choice in dropped:
            lines += _comment(f"{_printable(choice.column) or '(no name)'}: {choice.why}.", "#   ", "#     ")
    return lines


def _identifier_lines(proposal: Proposal) -> list[str]:
    user = proposal.one("user")
    if not proposal.user_is_card or user is None:
        return []
    column = _quoted(user.column)
    return [
        *_comment(
            f"The values of {_printable(user.column)} look like card numbers: the service stores a keyed hash of such "
            "values in their place (docs/service.md, Identifiers). To hash every value of the column:"
        ),
        "# [identifiers]",
        f'# columns = {{ {column} = "hash" }}',
    ]


def _list(key: str, entries: list[tuple[str, str]]) -> list[str]:
    if not entries:
        return [f"{key} = []"]
    lines = [f"{key} = ["]
    for value, why in entries:
        inline = f"    {value},  # {_printable(why, WIDTH)}"
        lines += [inline] if len(inline) <= WIDTH else [*_comment(why, "    # ", "    # "), f"    {value},"]
    return [*lines, "]"]


def _split_lines(proposal: Proposal, checked: Check | None) -> list[str]:
    split = proposal.split
    counts = {} if checked is None else checked.parts
    seen = {name: f"{rows:,} rows, {frauds:,} frauds" for name, (rows, frauds) in counts.items()}
    lines = [
        "[split]",
        *_comment(
            f"By time. The first {_span(split.train_start - split.first)} are history only, so that users and contexts "
            f"have a past; then training; then validation (early stop, thresholds, calibration); then a gap of "
            f"{_span(split.test_start - split.train_end)} in which labels are not known yet; then the test."
        ),
    ]
    entries = (
        ("train_start", _date(split.train_start), seen.get("train", "")),
        ("validation", _duration(split.validation), seen.get("validation", "")),
        ("train_end", _date(split.train_end), ""),
        ("test_start", _date(split.test_start), seen.get("test", "")),
        ("test_end", _date(split.test_end), ""),
    )
    return lines + [f'{key} = "{value}"' + (f"  # {comment}" if comment else "") for key, value, comment in entries]


def write_config(
    data: Path,
    out: Path,
    given: Given | None = None,
    *,
    force: bool = False,
    read_all: bool = True,
    progress: Progress | None = None,
) -> tuple[Proposal, Check | None]:
    """Inspect `data` and write the proposed configuration to `out`, which is whole or not there.

    Raises:
        ConfigError: `out` is there already and `force` is not set.
        DataError: the file cannot be read, or no configuration could be made of it.
    """
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; expected a file such as {out / 'config.toml'}")
    if out.exists() and not force:
        raise ConfigError(f"--out: {out} is there already; choose another name, or --force to write over it")
    proposal = propose(inspect_file(data, progress=progress), given)
    config = parse_config(to_toml(proposal, out.parent), str(out))
    schema_of(config, str(out))
    checked = check(config, data) if read_all else None
    text = to_toml(proposal, out.parent, checked)
    parse_config(text, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as file:
        file.write_text(text, encoding="utf-8")
    return proposal, checked


def as_plain(proposal: Proposal, checked: Check | None, out: Path) -> dict[str, Any]:
    """The proposal as plain data for `--json`."""
    split = proposal.split
    return {
        "config": str(out),
        "rows": proposal.rows,
        "sampled": proposal.sampled,
        "columns": [
            {"column": c.column, "role": c.role, "why": c.why, "also": list(c.also)} for c in proposal.choices
        ],
        "time_unit": proposal.time_unit,
        "label_delay": _duration(split.label_delay),
        "geo": [list(pair) for pair in proposal.places],
        "split": {
            "train_start": _date(split.train_start),
            "validation": _duration(split.validation),
            "train_end": _date(split.train_end),
            "test_start": _date(split.test_start),
            "test_end": _date(split.test_end),
        },
        "check": None if checked is None else {
            "refusal": checked.refusal,
            "rows": checked.rows,
            "repeated": checked.repeated,
            "parts": {name: {"rows": rows, "frauds": frauds} for name, (rows, frauds) in checked.parts.items()},
        },
        "notes": list(proposal.notes),
    }  # fmt: skip


# --- words ----------------------------------------------------------------------------------------


def _printable(text: str, width: int = 40) -> str:
    """Without line breaks and other characters that a comment cannot hold, and not too long."""
    clean_text = "".join(c if c.isprintable() else " " for c in text).strip()
    return clean_text if len(clean_text) <= width else clean_text[: width - 3] + "..."


def _comment(text: str, first: str = "# ", later: str = "# ") -> list[str]:
    return textwrap.wrap("".join(c if c.isprintable() else " " for c in text), WIDTH, initial_indent=first,
                         subsequent_indent=later, break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's differs only in DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"


def _share(share: float) -> str:
    return f"{100 * share:.3g} %"


def _range(facts: ColumnFacts) -> str:
    low, middle, high = (x if x is not None else math.nan for x in (facts.smallest, facts.median, facts.largest))
    missing = f", missing in {_share(facts.nulls / facts.sampled)}" if facts.nulls else ""
    return f"{_figure(low)} to {_figure(high)}, half are below {_figure(middle)}{missing}"


def _moment(ms: float) -> str:
    """A time in words, without fractions of a second."""
    return _date(int(ms) // SECOND_MS * SECOND_MS).removesuffix("Z").replace("T", " ")


def _date(ms: int) -> str:
    """A time in the configuration's spelling; dates alone at midnight."""
    return format_instant(ms).removesuffix("T00:00:00Z")


def _duration(ms: int) -> str:
    """A duration in the configuration's spelling, in the largest unit that divides it."""
    units = ((DAY_MS, "d"), (HOUR_MS, "h"), (MINUTE_MS, "m"), (SECOND_MS, "s"), (1, "ms"))
    return next(f"{ms // unit}{letter}" for unit, letter in units if ms % unit == 0)


def _span(ms: float) -> str:
    """A duration in words."""
    for unit, word in ((DAY_MS, "days"), (HOUR_MS, "hours"), (MINUTE_MS, "minutes")):
        if ms >= 1.5 * unit:
            return f"{ms / unit:,.0f} {word}"
    return f"{ms / SECOND_MS:,.0f} seconds"
