"""Labels that wait for their time, and silence that becomes honesty.

A label takes effect before the first transaction in arrival order whose time is at or after `known_at`. A transaction
of which nothing was said counts as known honest one label delay after its time. What an effect does to the entities'
context is `ContextTable`'s business; this book decides when and what.

One label delay of traffic is open at a time, so the open transactions are columns, in blocks, in arrival order. Silence
about those that arrived in time order becomes due in that same order: they are their own queue. Only what was said, and
silence about transactions older than one before them, waits in a heap.
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.context import NEVER, ContextTable, SavedRows

SAID, SILENCE = 0, 1
"""Order of two effects on one transaction at one moment: what was said comes before silence."""

HONEST, FRAUD, UNSAID, SETTLED = range(4)
"""The label of an open transaction that is in effect so far; settled: its label delay is over."""

BLOCK = 1 << 14
FOREVER = 2**63 - 1

Rows = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Entry = tuple[int, int, int, int, int, int]
"""(known_at, transaction time, transaction seq, SAID or SILENCE, label seq, fraud): effects are taken in this order."""

Find = Callable[[int], tuple[int, Rows]]
"""Time and entity rows of a transaction by sequence number, for those that are no longer open."""


class Block:
    """Some consecutive open transactions: plain columns, for single items of NumPy's take several times as long."""

    __slots__ = ("effective", "ratio", "rows", "seq", "time", "used")

    def __init__(self, size: int, entities: int) -> None:
        self.used = 0
        self.seq = array("q", bytes(8 * size))
        self.time = array("q", bytes(8 * size))
        self.ratio = array("q", bytes(8 * size))
        self.rows = np.zeros((size, entities), dtype=np.int64)
        self.effective = bytearray(size)


class OpenTransactions:
    """Columns of the transactions whose label delay is not over, by place: places count up in arrival order.

    A place stays with its transaction. Blocks in front are let go when all in them is settled.
    """

    def __init__(self, entities: int, block: int = BLOCK) -> None:
        self._entities = entities
        self._size = block
        self._blocks: list[Block] = []
        self.first = 0
        self.end = 0

    def append(self, seq: int, time: int, rows: Rows, ratio: int) -> int:
        """Add a transaction, its seq above those before; its place."""
        block, at = self._last()
        block.seq[at], block.time[at], block.rows[at], block.effective[at] = seq, time, rows, UNSAID
        block.ratio[at] = ratio
        block.used += 1
        self.end += 1
        return self.end - 1

    def _last(self) -> tuple[Block, int]:
        """The block with room for one more, and its index there."""
        at = (self.end - self.first) % self._size
        if at == 0 and self.end - self.first == self._size * len(self._blocks):
            while self._blocks and self._blocks[0].effective.count(SETTLED) == self._size:
                del self._blocks[0]
                self.first += self._size
            self._blocks.append(Block(self._size, self._entities))
        return self._blocks[-1], at

    def extend(self, columns: Mapping[str, Array]) -> None:
        """Add many: `seq`, `time`, `ratio`, `effective` [N], `rows` [N, E]."""
        done = 0
        while done < len(columns["seq"]):
            block, at = self._last()
            count = min(self._size - at, len(columns["seq"]) - done)
            to, piece = slice(at, at + count), slice(done, done + count)
            np.frombuffer(block.seq, dtype=np.int64)[to] = columns["seq"][piece]
            np.frombuffer(block.time, dtype=np.int64)[to] = columns["time"][piece]
            np.frombuffer(block.ratio, dtype=np.int64)[to] = columns["ratio"][piece]
            np.frombuffer(block.effective, dtype=np.uint8)[to] = columns["effective"][piece]
            block.rows[to] = columns["rows"][piece]
            block.used += count
            self.end += count
            done += count

    def place_of(self, seq: int) -> int | None:
        """The place of a transaction; None where it is settled."""
        number = bisect_right(self._blocks, seq, key=_first_seq) - 1
        if number < 0:
            return None
        block = self._blocks[number]
        at = bisect_left(block.seq, seq, 0, block.used)
        if at == block.used or block.seq[at] != seq or block.effective[at] == SETTLED:
            return None
        return self.first + number * self._size + at

    def at(self, place: int) -> tuple[Block, int]:
        """Where the transaction of a place is: the block and the index there."""
        number, at = divmod(place - self.first, self._size)
        return self._blocks[number], at

    def copy(self) -> "Iterator[dict[str, Array]]":
        """Columns of what is open now, in pieces, whatever happens before they are asked for."""
        # of what is there, only the label in effect ever changes
        parts = [(block, bytes(memoryview(block.effective)[: block.used])) for block in self._blocks]
        return (_open_columns(block, np.frombuffer(effective, dtype=np.uint8)) for block, effective in parts)


def _first_seq(block: Block) -> int:
    return block.seq[0]


def _open_columns(block: Block, effective: Array) -> dict[str, Array]:
    held = np.flatnonzero(effective != SETTLED)
    numbers = {name: np.frombuffer(getattr(block, name), dtype=np.int64)[held] for name in ("seq", "time", "ratio")}
    return {**numbers, "rows": block.rows[held], "effective": effective[held]}


class Sequences:
    """A set of sequence numbers, one bit each."""

    def __init__(self, bits: bytes | bytearray = b"") -> None:
        self._bits = bytearray(bits)

    def __contains__(self, seq: int) -> bool:
        at = seq >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (seq & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        bits = np.unpackbits(np.frombuffer(self.dump(), dtype=np.uint8), bitorder="little")
        return iter(np.flatnonzero(bits).tolist())

    def add(self, seq: int) -> None:
        """Put a number in."""
        at = seq >> 3
        if at >= len(self._bits):
            self._bits.extend(bytes(at + 1 - len(self._bits)))
        self._bits[at] |= 1 << (seq & 7)

    def discard(self, seq: int) -> None:
        """Take a number out."""
        at = seq >> 3
        if at < len(self._bits):
            self._bits[at] &= ~(1 << (seq & 7))

    def dump(self) -> bytes:
        """Its bits: number 8 i + j is bit j of byte i."""
        return bytes(self._bits)


@dataclass(slots=True, frozen=True)
class LabelDump:
    """A `LabelBook` at one moment.

    Attributes:
        open: columns of the open transactions, in pieces.
        heap: what waits, as in the book; silence in it also follows from the open transactions.
        frauds: as `Sequences.dump`.
    """

    open: Iterator[dict[str, Array]]
    heap: list[Entry]
    frauds: bytes


class LabelBook:
    """Pending effects, open transactions, and which of the settled transactions are known frauds."""

    def __init__(self, context: ContextTable, find: Find, block: int = BLOCK) -> None:
        self._context = context
        self._find = find
        self._delay = context.spec.label_delay
        self.heap: list[Entry] = []
        """What was said, and silence about transactions that came out of time order."""
        self.open = OpenTransactions(len(context.spec.columns), block)
        self.frauds = Sequences()
        """Sequence numbers of settled transactions that are known frauds; the other settled ones are honest."""
        self._newest = NEVER
        """Time of the newest transaction: one that is older came out of time order."""
        self._head = 0
        """Place of the next transaction in time order whose delay is not over; the end, where there is none."""
        self._silence = FOREVER
        """When silence about that one is due."""

    def opened(self, seq: int, time: int, rows: Rows, ratio: int) -> None:
        """A transaction was accepted, its seq above those before: silence becomes honesty one delay later.

        Args:
            ratio: what `ContextTable.add_transaction` gave for it.
        """
        place = self.open.append(seq, time, rows, ratio)
        if time >= self._newest:
            self._newest = time
            if place == self._head:
                self._silence = time + self._delay
        else:
            heapq.heappush(self.heap, self._silent(seq, time))
            if place == self._head:
                self._head = place + 1

    def _silent(self, seq: int, time: int) -> Entry:
        return (time + self._delay, time, seq, SILENCE, seq, 0)

    def said(self, label_seq: int, seq: int, time: int, known_at: int, fraud: bool) -> None:
        """A label was said of the transaction `seq` of that time."""
        heapq.heappush(self.heap, (known_at, time, seq, SAID, label_seq, int(fraud)))

    def advance(self, time: int) -> "list[Undo]":
        """Let everything take effect that is known before a transaction of that time; returns how to take it back."""
        undo: list[Undo] = []
        if time < self._silence and (not self.heap or time < self.heap[0][0]):
            return undo
        try:
            while True:
                if self._silence <= time and (not self.heap or self._speaks_first()):
                    undo.append(self._silent_in_turn())
                elif self.heap and self.heap[0][0] <= time:
                    undo.append(self._take_effect(self.heap[0]))
                    heapq.heappop(self.heap)
                else:
                    return undo
        except BaseException:
            self.take_back(undo)
            raise

    def _speaks_first(self) -> bool:
        """Whether the next silence of the queue comes before what is first in the heap."""
        first = self.heap[0]
        if self._silence != first[0]:
            return self._silence < first[0]
        block, at = self.open.at(self._head)
        return self._silent(block.seq[at], block.time[at]) < first

    def _silent_in_turn(self) -> "Undo":
        """Silence about the next transaction of the queue takes effect."""
        place = self._head
        block, at = self.open.at(place)
        time = block.time[at]
        undo = self._fall_silent(self._silent(block.seq[at], time), place, block, at)
        undo.queued = True
        self._silence = FOREVER
        for head in range(place + 1, self.open.end):
            block, at = self.open.at(head)
            if block.time[at] >= time:  # the others came out of time order
                self._head, self._silence = head, block.time[at] + self._delay
                return undo
        self._head = self.open.end
        return undo

    def take_back(self, undo: "Iterable[Undo]") -> None:
        """Undo `advance`, newest first: the transaction that asked for it was not accepted after all."""
        for step in reversed(list(undo)):
            if step.place is not None:
                block, at = self.open.at(step.place)
                block.effective[at] = step.effective
            if step.queued:
                assert step.place is not None
                self._head, self._silence = step.place, step.entry[0]
            else:
                heapq.heappush(self.heap, step.entry)
            seq = step.entry[2]
            (self.frauds.add if step.was_fraud else self.frauds.discard)(seq)
            if step.saved is not None:
                self._context.restore_rows(step.saved)

    def _fall_silent(self, entry: Entry, place: int, block: Block, at: int) -> "Undo":
        """The delay of an open transaction is over."""
        before = block.effective[at]
        undo = Undo(entry, place, before, False)
        if before == UNSAID:
            rows = block.rows[at]
            undo.saved = self._context.save_rows(rows)
            self._context.add_label(rows, entry[1], False, block.ratio[at])
        elif before == FRAUD:
            self.frauds.add(entry[2])
        block.effective[at] = SETTLED
        return undo

    def _take_effect(self, entry: Entry) -> "Undo":
        _, time, seq, kind, _, fraud = entry
        place = self.open.place_of(seq)
        if place is None:
            return self._correct(entry)
        block, at = self.open.at(place)
        if kind == SILENCE:
            return self._fall_silent(entry, place, block, at)
        before = block.effective[at]
        undo = Undo(entry, place, before, False)
        if before != fraud:
            rows = block.rows[at]
            undo.saved = self._context.save_rows(rows)
            if before == UNSAID:
                self._context.add_label(rows, time, bool(fraud), block.ratio[at])
            else:
                self._context.correct_label(rows, time, bool(fraud))
            block.effective[at] = fraud
        return undo

    def _correct(self, entry: Entry) -> "Undo":
        """A label of a settled transaction takes effect."""
        _, time, seq, _, _, fraud = entry
        before = seq in self.frauds
        undo = Undo(entry, None, SETTLED, before)
        if before != fraud:
            rows = self._find(seq)[1]
            undo.saved = self._context.save_rows(rows)
            self._context.correct_label(rows, time, bool(fraud))
            (self.frauds.add if fraud else self.frauds.discard)(seq)
        return undo

    # ---- snapshots

    def dump(self) -> LabelDump:
        """Everything at this moment; quick, for most of it is not copied but never changes."""
        return LabelDump(self.open.copy(), self.heap.copy(), self.frauds.dump())

    def restore_open(self, columns: Mapping[str, Array]) -> None:
        """More open transactions in arrival order, a piece of `LabelDump.open`, into a book that was empty."""
        seq, time = columns["seq"], columns["time"]
        if len(seq) == 0:
            return
        if self.open.end == 0:
            self._silence = int(time[0]) + self._delay
        self.open.extend(columns)
        newest = np.maximum.accumulate(np.r_[self._newest, time])
        for late in np.flatnonzero(time < newest[:-1]).tolist():
            heapq.heappush(self.heap, self._silent(int(seq[late]), int(time[late])))
        self._newest = int(newest[-1])

    def restore_said(self, said: Iterable[Entry]) -> None:
        """More labels that wait."""
        self.heap.extend(said)
        heapq.heapify(self.heap)


@dataclass(slots=True)
class Undo:
    """How to take one effect back."""

    entry: Entry
    place: int | None
    """Its transaction's place; None where that was settled before."""
    effective: int
    """The label in effect before, where that was open."""
    was_fraud: bool
    """Whether that was known as fraud before, where it was settled."""
    saved: SavedRows | None = None
    queued: bool = False
    """Whether it was silence in its turn, not from the heap."""
