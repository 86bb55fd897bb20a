"""The journal as a table: every accepted transaction in arrival order, what was answered, and the newest that was said of it.

For what looks back: monitoring, retraining. It reads the log only and may run beside the service; what is torn off or
being written at the end is left out. Letters: N transactions, K numbers of a context.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from seqfraud.canonical import canonical_text
from seqfraud.errors import RunError
from seqfraud.schema import Schema
from serve.control import control_shares
from serve.log import read_frames
from serve.records import LabelRecord, Note, TransactionRecord, decode_records
from serve.service import FIELDS

__all__ = ["Journalled", "is_fraud", "matured", "read_journal", "weights"]

_TABLE = pa.schema(
    [
        ("seq", pa.int64()),
        ("id", pa.string()),
        ("user", pa.string()),
        ("time", pa.int64()),
        ("model", pa.string()),
        ("probability", pa.float64()),
        ("is_fraud", pa.bool_()),
        ("decision", pa.string()),
        ("late", pa.bool_()),
        ("control", pa.bool_()),
        ("amount", pa.float64()),
        ("label", pa.int8()),
        ("label_known_at", pa.int64()),
        ("label_said_at", pa.int64()),
        ("label_source", pa.string()),
    ]
)
_LABELS = pa.schema(
    [
        ("seq", pa.int64()),
        ("transaction_id", pa.string()),
        ("label", pa.int8()),
        ("known_at", pa.int64()),
        ("said_at", pa.int64()),
        ("source", pa.string()),
        ("author", pa.string()),
    ]
)


class _Said(msgspec.Struct):
    """What of an answer is in the table."""

    fraud_probability: float | None = None
    is_fraud: bool | None = None
    decision: str | None = None
    late: bool | None = None
    control: bool = False


_said = msgspec.json.Decoder(_Said).decode
_row = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True)
class Journalled:
    """What a journal holds, as of its end or of a moment.

    Attributes:
        table: one row for each transaction, in arrival order: `seq, id, user, time` (ms), `model` (bundle id),
            `probability, is_fraud, decision, late, control` (let through at random though it would have been declined),
            `amount` (null where missing), and of the newest label `label` (1, 0, null where nothing was said),
            `label_known_at, label_said_at` (ms), `label_source`. Ids, users and texts are as they are stored.
        labels: the newest label of every id that no transaction of the journal has: `seq, transaction_id, label,
            known_at, said_at, source, author`.
        fields: the declared fields of the same rows, `time` in milliseconds; None where they were not asked for.
        context: what each row read of its entities, one float32 [K] each, K that of the bundle which scored it; empty
            where it was not asked for.
        notes: the settings kept in the journal, by key.
        last_seq: number of the last record that was read, 0 where there is none.
    """

    table: pa.Table
    labels: pa.Table
    fields: pa.Table | None
    context: list[npt.NDArray[np.float32]] = field(repr=False)
    notes: dict[str, str] = field(repr=False)
    last_seq: int


def read_journal(
    state: Path,
    schema: Schema,
    *,
    after_seq: int = 0,
    since: int | None = None,
    until: int | None = None,
    fields: bool = False,
    context: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Journalled:
    """The journal of a state folder as a table.

    Args:
        state: the service's state folder.
        schema: which declared field is what; it must have the fields that the journal's transactions have.
        after_seq: only transactions with a number above this.
        since: only transactions of this time (ms) or later.
        until: what was known at this moment (ms): transactions of an earlier time, labels known before it.
        fields: the declared fields too.
        context: what was read of the entities too.
        progress: called with the number of records that were read.

    Raises:
        RunError: there is no journal, it is damaged, or holds other fields.
    """
    folder = state / "journal"
    if not folder.is_dir():
        raise RunError(f"{state}: there is no journal here")
    begin, end = -math.inf if since is None else since, math.inf if until is None else until
    known: set[str] = set()
    kept: list[TransactionRecord] = []
    labels: dict[str, LabelRecord] = {}
    notes: dict[str, str] = {}
    last_seq = 0
    for frame in read_frames(folder):
        for record in decode_records(frame.seq, frame.payload):
            if isinstance(record, Note):
                notes[record.key] = record.value
                if record.key == FIELDS:
                    _require_fields(record.value, schema, state)
            elif isinstance(record, LabelRecord):
                if record.known_at < end:
                    labels[record.transaction_id] = record
            elif isinstance(record, TransactionRecord):
                known.add(record.id)
                if record.seq > after_seq and begin <= record.time < end:
                    kept.append(record)
        last_seq = frame.seq + frame.taken - 1
        if progress is not None:
            progress(frame.taken)
    rows = _rows(kept) if fields or schema.amount is not None else []
    return Journalled(
        table=_table(kept, labels, rows, schema),
        labels=_labels(record for identity, record in labels.items() if identity not in known),
        fields=_fields(kept, rows, schema) if fields else None,
        context=[np.frombuffer(record.context, dtype=np.float32) for record in kept] if context else [],
        notes=notes,
        last_seq=last_seq,
    )


def matured(table: pa.Table, now_ms: int, label_delay_ms: int) -> npt.NDArray[np.bool_]:
    """Mask [N]: one label delay has passed since the transaction, so that silence about it counts as honest.

    A label that came sooner does not mature its transaction: frauds are heard of first, and the newest days would hold
    nothing else.
    """
    out: npt.NDArray[np.bool_] = table["time"].to_numpy() + label_delay_ms <= now_ms
    return out


def is_fraud(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Mask [N]: the newest label says fraud; silence is no fraud."""
    out: npt.NDArray[np.bool_] = table["label"].fill_null(0).to_numpy() == 1
    return out


def weights(read: Journalled) -> npt.NDArray[np.float64]:
    """How many transactions each row stands for [N], so that sums over rows whose truth is known estimate those over all.

    Where a bundle let a share of what it declined through at random, those stand for 1 / share each, and what was declined
    for nothing: of it only that is known which somebody spoke of (Horvitz & Thompson 1952). Everything else counts once.
    What rules and lists declined is left out with it, and is nobody's figure.
    """
    shares = control_shares(read.notes)
    table = read.table
    share = np.array([shares.get(model, 0.0) for model in table["model"].to_pylist()], dtype=np.float64)
    control = table["control"].to_numpy(zero_copy_only=False).astype(bool)
    declined = np.array([decision == "decline" for decision in table["decision"].to_pylist()], dtype=bool)
    out: npt.NDArray[np.float64] = np.where(declined & (share > 0), 0.0, 1.0)
    return np.where(control, 1 / np.where(control, share, 1.0), out)


def _require_fields(seen: str, schema: Schema, state: Path) -> None:
    declared = ",".join(schema.fields)
    if seen != declared:
        raise RunError(f"{state}: the journal holds the fields {seen}; expected {declared}")


def _rows(kept: list[TransactionRecord]) -> list[dict[str, Any]]:
    try:
        return [_row(record.raw) for record in kept]
    except msgspec.MsgspecError as error:
        raise RunError(f"the journal holds a transaction that is no object of JSON: {error}") from error


def _table(
    kept: list[TransactionRecord], labels: dict[str, LabelRecord], rows: list[dict[str, Any]], schema: Schema
) -> pa.Table:
    answers = [_said(record.answer) for record in kept]
    newest = [labels.get(record.id) for record in kept]
    amounts = [row.get(schema.amount) for row in rows] if schema.amount is not None else [None] * len(kept)
    columns: list[list[Any]] = [
        [record.seq for record in kept],
        [record.id for record in kept],
        [record.user for record in kept],
        [record.time for record in kept],
        [record.bundle for record in kept],
        [answer.fraud_probability for answer in answers],
        [answer.is_fraud for answer in answers],
        [answer.decision for answer in answers],
        [answer.late for answer in answers],
        [answer.control for answer in answers],
        amounts,
        [None if label is None else int(label.is_fraud) for label in newest],
        [None if label is None else label.known_at for label in newest],
        [None if label is None else label.said_at for label in newest],
        [None if label is None else label.source for label in newest],
    ]
    return _arrow(columns, _TABLE)


def _labels(records: Iterable[LabelRecord]) -> pa.Table:
    said: list[tuple[Any, ...]] = [
        (r.seq, r.transaction_id, int(r.is_fraud), r.known_at, r.said_at, r.source, r.author)
        for r in sorted(records, key=lambda record: record.seq)
    ]
    columns: list[list[Any]] = [[row[i] for row in said] for i in range(len(_LABELS))]
    return _arrow(columns, _LABELS)


def _fields(kept: list[TransactionRecord], rows: list[dict[str, Any]], schema: Schema) -> pa.Table:
    """Numbers as numbers, everything else as the texts that it is compared as, the time in ms."""
    numbers = set(schema.numbers)
    columns: list[list[Any]] = []
    types: list[tuple[str, pa.DataType]] = []
    for name in schema.fields:
        if name == schema.time:
            columns.append([record.time for record in kept])
            types.append((name, pa.int64()))
        elif name in numbers:
            columns.append([row.get(name) for row in rows])
            types.append((name, pa.float64()))
        else:
            values = (row.get(name) for row in rows)
            columns.append([None if x is None or x == "" else canonical_text(x) for x in values])
            types.append((name, pa.string()))
    return _arrow(columns, pa.schema(types))


def _arrow(columns: list[list[Any]], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(x, f.type) for x, f in zip(columns, schema, strict=True)], schema=schema)
