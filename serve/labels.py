"""Labels that wait for their time, and silence that becomes honesty.

A label takes effect before the first transaction in arrival order whose time is at or after `known_at`. A transaction
of which nothing was said counts as known honest one label delay after its time. What an effect does to the entities'
context is `ContextTable`'s business; this book decides when and what.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.context import ContextTable

SAID, SILENCE = 0, 1
"""Order of two effects on one transaction at one moment: what was said comes before silence."""

UNSAID = -1

Rows = npt.NDArray[np.int64]


@dataclass(slots=True)
class OpenTransaction:
    """A transaction whose label delay is not over: its entities' rows and the label in effect so far."""

    time: int
    rows: Rows
    effective: int = UNSAID


Find = Callable[[int], tuple[int, Rows]]
"""Time and entity rows of a transaction by sequence number, for those that are no longer open."""


class LabelBook:
    """Pending effects, open transactions, and which of the settled transactions are known frauds."""

    def __init__(self, context: ContextTable, find: Find) -> None:
        self._context = context
        self._find = find
        self._delay = context.spec.label_delay
        self.heap: list[tuple[int, int, int, int, int, int]] = []
        """(known_at, transaction time, transaction seq, SAID or SILENCE, label seq, fraud)."""
        self.open: dict[int, OpenTransaction] = {}
        self.frauds: set[int] = set()
        """Sequence numbers of settled transactions that are known frauds; the other settled ones are honest."""

    def opened(self, seq: int, time: int, rows: Rows) -> None:
        """A transaction was accepted: silence about it becomes honesty one delay later."""
        self.open[seq] = OpenTransaction(time, rows)
        heapq.heappush(self.heap, (time + self._delay, time, seq, SILENCE, seq, 0))

    def said(self, label_seq: int, seq: int, time: int, known_at: int, fraud: bool) -> None:
        """A label was said of the transaction `seq` of that time."""
        heapq.heappush(self.heap, (known_at, time, seq, SAID, label_seq, int(fraud)))

    def advance(self, time: int) -> "list[Undo]":
        """Let everything take effect that is known before a transaction of that time; returns how to take it back."""
        undo: list[Undo] = []
        try:
            while self.heap and self.heap[0][0] <= time:
                undo.append(self._take_effect(self.heap[0]))
                heapq.heappop(self.heap)
        except BaseException:
            self.take_back(undo)
            raise
        return undo

    def take_back(self, undo: "Iterable[Undo]") -> None:
        """Undo `advance`, newest first: the transaction that asked for it was not accepted after all."""
        for step in reversed(list(undo)):
            heapq.heappush(self.heap, step.entry)
            seq = step.entry[2]
            if step.reopened is not None:
                self.open[seq] = step.reopened
            if seq in self.open:
                self.open[seq].effective = step.effective
            (self.frauds.add if step.was_fraud else self.frauds.discard)(seq)
            if step.saved is not None:
                self._context.restore_rows(step.saved)

    def _take_effect(self, entry: tuple[int, int, int, int, int, int]) -> "Undo":
        _, time, seq, kind, _, fraud = entry
        waiting = self.open.get(seq)
        before = waiting.effective if waiting is not None else int(seq in self.frauds)
        undo = Undo(entry, before, seq in self.frauds)
        if kind == SILENCE:
            assert waiting is not None
            del self.open[seq]
            undo.reopened = waiting
            if before == UNSAID:
                undo.saved = self._context.save_rows(waiting.rows)
                self._context.add_label(waiting.rows, time, False)
            elif before == 1:
                self.frauds.add(seq)
            return undo
        if before == fraud:
            return undo
        rows = waiting.rows if waiting is not None else self._find(seq)[1]
        undo.saved = self._context.save_rows(rows)
        if before == UNSAID:
            self._context.add_label(rows, time, bool(fraud))
        else:
            self._context.correct_label(rows, time, bool(fraud))
        if waiting is not None:
            waiting.effective = fraud
        else:
            (self.frauds.add if fraud else self.frauds.discard)(seq)
        return undo

    def dump(self) -> dict[str, Any]:
        """Plain data for a snapshot."""
        return {
            "heap": self.heap,
            "open": [(seq, o.time, o.rows.tolist(), o.effective) for seq, o in self.open.items()],
            "frauds": sorted(self.frauds),
        }

    def restore(self, raw: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        self.heap = [tuple(entry) for entry in raw["heap"]]
        self.open = {
            seq: OpenTransaction(time, np.array(rows, dtype=np.int64), effective)
            for seq, time, rows, effective in raw["open"]
        }
        self.frauds = set(raw["frauds"])


@dataclass(slots=True)
class Undo:
    """How to take one effect back."""

    entry: tuple[int, int, int, int, int, int]
    effective: int
    was_fraud: bool
    reopened: OpenTransaction | None = None
    saved: Any = None
