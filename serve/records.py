"""What the journal holds, and how each of it is spelled in the log (MessagePack arrays that begin with their kind)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

TRANSACTION, LABELS, NOTE, ACTION = 0, 1, 2, 3

ANONYMOUS = "anonymous"
"""Author of what is done where there are no API keys."""


@dataclass(slots=True, frozen=True)
class TransactionRecord:
    """An accepted transaction. `context` is float32 [K] as read; `answer` the JSON that was given."""

    seq: int
    id: str
    user: str
    time: int
    content: bytes
    raw: bytes
    context: bytes
    answer: bytes
    bundle: str


@dataclass(slots=True, frozen=True)
class LabelRecord:
    """A label as it was said: by `author` (id of an API key, a command), who knows it from `source`."""

    seq: int
    transaction_id: str
    is_fraud: bool
    known_at: int
    said_at: int
    source: str
    author: str = ""
    """Empty in records from before labels had one."""


@dataclass(slots=True, frozen=True)
class ActionRecord:
    """What a person did beside labelling: a rule was changed, an alert taken up. `body` is JSON, `at` milliseconds.

    Memory's histories and contexts do not depend on it; whoever follows its `kind` does.
    """

    seq: int
    kind: str
    at: int
    author: str
    body: bytes


@dataclass(slots=True, frozen=True)
class Note:
    """A setting kept in the journal; it takes no sequence number."""

    key: str
    value: str


Record = TransactionRecord | LabelRecord | ActionRecord

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list).decode


def encode_transaction(r: TransactionRecord) -> bytes:
    """Payload of a transaction's frame; its sequence number is the frame's."""
    return _encode((TRANSACTION, r.id, r.user, r.time, r.content, r.raw, r.context, r.answer, r.bundle))


def encode_labels(records: Sequence[LabelRecord]) -> bytes:
    """Payload of the frame of labels that are stored together; the first one's sequence number is the frame's."""
    return _encode((LABELS, _plain(records)))


def encode_action(r: ActionRecord, labels: Sequence[LabelRecord] = ()) -> bytes:
    """Payload of the frame of an action, whose sequence number is the frame's, and of the labels that come with it."""
    return _encode((ACTION, r.kind, r.at, r.author, r.body, *([_plain(labels)] if labels else [])))


def _plain(labels: Sequence[LabelRecord]) -> list[tuple[object, ...]]:
    return [(r.transaction_id, r.is_fraud, r.known_at, r.said_at, r.source, r.author) for r in labels]


def encode_note(note: Note) -> bytes:
    """Payload of a note's frame."""
    return _encode((NOTE, note.key, note.value))


def decode_records(seq: int, payload: bytes) -> Sequence[Record | Note]:
    """The records of a frame whose first sequence number is `seq`."""
    kind, *fields = _decode(payload)
    if kind == TRANSACTION:
        return (TransactionRecord(seq, *fields),)
    if kind == LABELS:
        return _labels(seq, fields[0])
    if kind == ACTION:
        return (ActionRecord(seq, *fields[:4]), *(label for labels in fields[4:] for label in _labels(seq + 1, labels)))
    return (Note(*fields),)


def _labels(seq: int, plain: list[list[Any]]) -> list[LabelRecord]:
    return [LabelRecord(seq + i, *label) for i, label in enumerate(plain)]
