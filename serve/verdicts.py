"""What the monitor looks at and what it says: rows, findings, and verdicts with their reasons. N rows, K bins."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from seqfraud.drift import Floats, Moved
from seqfraud.fingerprint import Columns
from seqfraud.metrics import Mask
from seqfraud.watched import Between

Level = Literal["ok", "watch", "alarm", "unknown"]
SEVERITY: dict[Level, int] = {"ok": 0, "unknown": 1, "watch": 2, "alarm": 3}


@dataclass(frozen=True)
class Topic:
    """One verdict and, in plain words, why."""

    name: str
    level: Level
    words: str


@dataclass(frozen=True)
class Rows:
    """N accepted transactions in arrival order, as one bundle sees them.

    Attributes:
        columns: what the model reads; contexts that another model with other contexts read are NaN.
        own: mask, scored by this bundle.
        probability: NaN where none was given.
        alerted: mask, answered with review or decline, rules included.
        declined: mask.
        control: mask, let through at random though the model would have declined.
        amount: NaN where missing; None where the schema has none.
        label: int8, 1 fraud, 0 honest, -1 where nothing was said yet.
    """

    columns: Columns
    own: Mask
    probability: Floats
    alerted: Mask
    declined: Mask
    control: Mask
    amount: Floats | None
    label: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.own)

    def take(self, rows: Mask) -> "Rows":
        """Some of the rows."""
        return Rows(
            self.columns.take(rows),
            self.own[rows],
            self.probability[rows],
            self.alerted[rows],
            self.declined[rows],
            self.control[rows],
            None if self.amount is None else self.amount[rows],
            self.label[rows],
        )


@dataclass(frozen=True)
class Span:
    """What is looked at, ms: inputs and scores from `window` before `now`; quality of `mature` before what has matured."""

    now: int
    window: int
    mature: int


@dataclass(frozen=True)
class Compared:
    """An input, or the scores, beside the reference."""

    name: str
    kind: str
    level: Level
    moved: Moved
    quiet: float
    """How far it moved in the quiet weeks of the training time."""
    reference: tuple[float, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """A part of the matured rows: how often it was fraud, and how often the scores said so."""

    column: str
    name: str
    rows: int
    frauds: int
    expected: float
    more: Between | None
    """Frauds that came for each that was expected."""
    average_precision: Between | None
    flagged: float | None
    """Share of the frauds at or above the threshold of `is_fraud`."""


@dataclass(frozen=True)
class Labels:
    """What is known of the rows whose label delay is over.

    `silent` of them were never labelled and count as honest; `unseen` were declined and so never show what they were.
    `waiting` rows are not that old yet. `control` were let through at random and stand for the declined.
    """

    matured: int
    frauds: int
    silent: int
    unseen: int
    control: int
    waiting: int
    expected: float


def worst(levels: Iterable[Level]) -> Level:
    """The most severe; "ok" of none."""
    return max(levels, key=SEVERITY.__getitem__, default="ok")
