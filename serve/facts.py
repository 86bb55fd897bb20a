"""What rules know of a transaction: its fields, what the model said, and the user's recent events.

The recent events are those that the user's ring in memory keeps (`users.py`): the newest W before the transaction's place,
W the bundle's `serve.window`; of each its time, the numbers and the categories that the model reads. The transaction itself
belongs to every window.

Letters: n events, C, F, K as in the graph.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Manifest
from seqfraud.canonical import canonical_text
from seqfraud.config import DAY_MS
from serve.decoding import Transaction
from serve.expressions import Language, Value, Window
from serve.users import UserTable

__all__ = ["Case", "Facts", "Recent", "recent_of"]

_HOUR_MS = 3_600_000
_THURSDAY = 3
"""The weekday of 1970-01-01, Monday being 0."""

_row = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(slots=True, frozen=True)
class Recent:
    """The user's newest events at or before a time, oldest first.

    Attributes:
        integers: int64 [n, 1 + C], time (ms) and category ids.
        values: float32 [n, at least F], numbers first.
    """

    integers: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def recent_of(users: UserTable, slot: int, time: int) -> Recent:
    """What the ring says before a transaction of that time; views, to be read before the user changes."""
    end = int(users.held[slot])
    if end and time < users.newest[slot]:
        end = users.place_of(slot, time)
    begin = max(0, end - users.window)
    return Recent(users.integers[slot, begin:end], users.values[slot, begin:end])


class Case:
    """One transaction as rules and lists see it."""

    __slots__ = ("_look", "_recent", "_row", "history", "late", "probability", "transaction")

    def __init__(
        self, transaction: Transaction, probability: float, history: int, late: bool, recent: Callable[[], Recent]
    ) -> None:
        """`recent` is called where something asks for it, once."""
        self.transaction = transaction
        self.probability = probability
        self.history = history
        self.late = late
        self._look = recent
        self._recent: Recent | None = None
        self._row: dict[str, Any] | None = None

    def recent(self) -> Recent:
        """The user's newest events before this one's place."""
        if self._recent is None:
            self._recent = self._look()
        return self._recent

    def text(self, column: str) -> str | None:
        """A text as it is stored, None where it is missing."""
        if self._row is None:
            self._row = _row(self.transaction.raw)
        value = self._row.get(column)
        return None if value is None or value == "" else canonical_text(value)


Getter = Callable[[Case], Value | None]


class Facts:
    """Works out the values of names; None of a name is a value that is missing."""

    def __init__(self, manifest: Manifest, language: Language) -> None:
        self._schema = manifest.schema
        self._categories = [v.column for v in manifest.vocabularies]
        self._language = language

    def getters(self, names: Iterable[str]) -> list[tuple[str, Getter]]:
        """What gives the value of each of these names, which the language knows."""
        return [(name, self._getter(name)) for name in sorted(names)]

    def needs_events(self, names: Iterable[str]) -> bool:
        """Whether some name is about the user's recent events."""
        return any(name == "since_last" or self._language.window_of(name) is not None for name in names)

    def _getter(self, name: str) -> Getter:
        columns = self._language.columns
        window = self._language.window_of(name)
        if window is not None:
            return self._window(window)
        if (column := columns.get(name)) is not None:
            return self._field(column)
        if name.startswith("has_") and (column := columns.get(name.removeprefix("has_"))) is not None:
            field = self._field(column)
            return lambda case: field(case) is not None
        getters: dict[str, Getter] = {
            "probability": lambda case: case.probability,
            "hour": lambda case: case.transaction.time % DAY_MS // _HOUR_MS,
            "weekday": lambda case: (case.transaction.time // DAY_MS + _THURSDAY) % 7,
            "history": lambda case: case.history,
            "late": lambda case: case.late,
            "since_last": _since_last,
        }
        return getters[name]

    def _field(self, column: str) -> Getter:
        if column == self._schema.time:
            return lambda case: case.transaction.time / 1000
        if column == self._schema.user:
            return lambda case: case.transaction.user
        if column not in self._schema.numbers:
            return lambda case: case.text(column)
        at = self._schema.numbers.index(column)

        def number(case: Case) -> float | None:
            value = case.transaction.numbers[at]
            return None if math.isnan(value) else value

        return number

    def _window(self, window: Window) -> Getter:
        span, column, schema = window.span, window.column, self._schema

        def begin(case: Case, recent: Recent) -> int:
            """Index of the first event that is younger than the window is long."""
            return int(np.searchsorted(recent.integers[:, 0], case.transaction.time - span, side="right"))

        def count(case: Case) -> float:
            recent = case.recent()
            return len(recent.integers) - begin(case, recent) + 1

        if window.what == "count":
            return count
        if column in schema.numeric_inputs:
            at = schema.numeric_inputs.index(column)

            def numbers(case: Case) -> npt.NDArray[np.float64]:
                recent = case.recent()
                kept = recent.values[begin(case, recent) :, at].astype(np.float64)
                # rounded as the ring would keep it
                both = np.append(kept, np.float64(np.float32(case.transaction.numbers[at])))
                return both[~np.isnan(both)]

            if window.what == "total":
                return lambda case: float(numbers(case).sum())
            return lambda case: len(np.unique(numbers(case)))
        place = self._categories.index(column)

        def categories(case: Case) -> float:
            recent = case.recent()
            return len(
                {*recent.integers[begin(case, recent) :, 1 + place].tolist(), case.transaction.categories[place]}
            )

        return categories


def _since_last(case: Case) -> float | None:
    times = case.recent().integers
    return (case.transaction.time - int(times[-1, 0])) / 1000 if len(times) else None
