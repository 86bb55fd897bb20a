"""Memory as it is at one moment, read piece by piece while scoring goes on; and memory from such pieces.

A capture begins under the service's lock, in a moment that hardly depends on the size: it notes how many users and
entities there are, and takes what is small or never changes: the open transactions' columns (only the label in effect
is copied, a byte each), labels that wait, known frauds (a bit per record). The two large tables are read later, some
hundred rows under the lock at a time; whoever changes a row that was not read yet sets the old one aside first
(`seqfraud.cut`), which costs a transaction one comparison where no capture is under way. The label effects of an
entity are only ever added to, so the number of them says which belong to the capture.

Between two pieces the reader leaves the lock, and by default the processor, for as long as it had it.
"""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import msgpack

from seqfraud.context import ContextTable
from serve.journal import LabelRecord
from serve.labels import SAID, Entry, LabelBook, Sequences
from serve.snapshot import Pause, Piece
from serve.users import UserTable

SLOTS = 256
"""Users under the lock at a time."""
ROWS = 4096
"""Entities under the lock at a time, and things in a list that is written at once."""
EFFECTS = 1 << 16
"""Numbers of label effects under the lock at a time."""

Early = dict[str, tuple[LabelRecord, ...]]
A = TypeVar("A")
T = TypeVar("T")
Int64 = npt.NDArray[np.int64]


class Capture:
    """Memory as it is when this is made, under the lock. One at a time; `end` it."""

    def __init__(
        self,
        lock: AbstractContextManager[Any],
        users: UserTable,
        context: ContextTable,
        labels: LabelBook,
        early: Early,
        pause: Pause = time.sleep,
    ) -> None:
        self._lock = lock
        self._pause = pause
        self._users = users
        self._context = context
        self._sizes = len(users.names), len(context.names)
        self._labels = labels.dump()
        self._early = early.copy()
        users.begin_cut()
        context.begin_cut()

    def end(self) -> None:
        """Changes need no longer be noticed. To be called under the lock."""
        self._users.cut = self._context.cut = None

    def pieces(self) -> Iterator[Piece]:
        """Everything, once. Takes the lock for each piece of the tables."""
        users, entities = self._sizes
        lengths: list[Int64] = []
        yield Piece("sizes", msgpack.encode(self._sizes))
        for begin in range(0, entities + 1, ROWS):
            arrays = self._locked(self._context.copy_rows, ROWS)
            lengths.append(arrays["effects"])
            names = self._context.names[max(begin - 1, 0) : min(begin + ROWS - 1, entities)]  # row 0 has none
            yield Piece("entities", msgpack.encode(names), arrays)
        for spans in _spans(np.concatenate(lengths)):
            yield Piece("effects", b"", {"effects": self._locked(self._context.copy_effects, spans)})
        for begin in range(0, users, SLOTS):
            arrays = self._locked(self._users.copy_slots, SLOTS)
            yield Piece("users", msgpack.encode(self._users.names[begin : min(begin + SLOTS, users)]), arrays)
        for columns in self._labels.open:
            yield Piece("open", b"", columns)
        yield Piece("frauds", self._labels.frauds)
        for begin in range(0, len(self._labels.heap), ROWS):
            said = [entry for entry in self._labels.heap[begin : begin + ROWS] if entry[3] == SAID]
            yield Piece("said", msgpack.encode(said))
        early = list(self._early.items())
        for begin in range(0, len(early), ROWS):
            yield Piece("early", msgpack.encode(dict(early[begin : begin + ROWS])))

    def _locked(self, copy: Callable[[A], T], what: A) -> T:
        with self._lock:
            began = time.perf_counter()
            copied = copy(what)
            held = time.perf_counter() - began
        self._pause(held)
        return copied


def _spans(lengths: Int64) -> Iterator[list[tuple[int, int, int]]]:
    """All label effects as (row, begin, end), in lists of at most ROWS spans and EFFECTS numbers."""
    spans: list[tuple[int, int, int]] = []
    room = EFFECTS
    for row in np.flatnonzero(lengths).tolist():
        begin, length = 0, int(lengths[row])
        while begin < length:
            end = min(length, begin + room)
            spans.append((row, begin, end))
            room -= end - begin
            begin = end
            if room == 0 or len(spans) == ROWS:
                yield spans
                spans, room = [], EFFECTS
    if spans:
        yield spans


def remember(pieces: Iterator[Piece], users: UserTable, context: ContextTable, labels: LabelBook) -> Early:
    """Put what a capture gave into empty tables; the early labels."""
    early: Early = {}
    lengths: list[Int64] = []
    effects = array("q")
    for piece in pieces:
        if piece.kind == "sizes":
            users.make_room(msgpack.decode(piece.plain, type=tuple[int, int])[0])
        elif piece.kind == "users":
            users.restore_slots(msgpack.decode(piece.plain, type=list[str]), piece.arrays)
        elif piece.kind == "entities":
            context.restore_entities(msgpack.decode(piece.plain, type=list[tuple[int, str]]), piece.arrays)
            lengths.append(piece.arrays["effects"].copy())
        elif piece.kind == "effects":
            effects.frombytes(piece.arrays["effects"].tobytes())
        elif piece.kind == "open":
            labels.restore_open(piece.arrays)
        elif piece.kind == "frauds":
            labels.frauds = Sequences(piece.plain)
        elif piece.kind == "said":
            labels.restore_said(msgpack.decode(piece.plain, type=list[Entry]))
        elif piece.kind == "early":
            early.update(msgpack.decode(piece.plain, type=Early))
    if lengths:
        context.restore_effects(np.concatenate(lengths), effects)
    return early
