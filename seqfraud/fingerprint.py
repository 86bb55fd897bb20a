"""The part of a fingerprint that a service's weeks are compared with: distributions of the inputs and of the scores.

Training writes it, monitoring reads it, and both see the inputs through `views`. N rows, F numeric, C categorical inputs,
K numbers of the context.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from seqfraud.config import DAY_MS, HOUR_MS, WEEK_MS, format_instant
from seqfraud.context import ContextSpec
from seqfraud.drift import Codes, Distribution, Floats, bins_of, distribution_of, edges_of, groups_of
from seqfraud.errors import BundleError
from seqfraud.schema import Schema
from seqfraud.vocabulary import FIRST, UNSEEN, Vocabulary

Mask = npt.NDArray[np.bool_]

KEY = "drift"
"""Of the fingerprint."""
CATEGORIES = 30
"""Of a vocabulary, the most frequent ones; the others are one bin."""
LEAST_KNOWN = 0.05
"""A decayed sum of known frauds below it is none in what is compared: the longer a service runs, the more of them are above 0."""
REFERENCE_DAYS = 28
QUIET_DAYS = 56
"""Before the end of the training, in which windows are compared with the reference: earlier, counters were filling up."""
WINDOWS = {"1d": DAY_MS, "7d": WEEK_MS}
Kind = Literal["number", "category", "context", "clock"]


@dataclass(frozen=True)
class Columns:
    """N transactions as a model reads them.

    Attributes:
        time: int64 [N] ms.
        user: codes or texts [N].
        numeric: [N, F], NaN where missing.
        categorical: [N, C] vocabulary ids.
        context: [N, K].
        gap: [N] seconds since the user's event before, NaN where there is none.
        absent: by column with numbers or texts, mask [N] of the rows without a value.
        entity: [N, E] codes of the context's entities, any number for a missing one.
    """

    time: npt.NDArray[np.int64]
    user: npt.NDArray[Any]
    numeric: npt.NDArray[np.floating[Any]]
    categorical: npt.NDArray[np.integer[Any]]
    context: npt.NDArray[np.floating[Any]]
    gap: Floats
    absent: Mapping[str, Mask]
    entity: npt.NDArray[np.integer[Any]]

    def take(self, rows: Mask) -> "Columns":
        """Some of the rows."""
        return Columns(
            self.time[rows],
            self.user[rows],
            self.numeric[rows],
            self.categorical[rows],
            self.context[rows],
            self.gap[rows],
            {name: mask[rows] for name, mask in self.absent.items()},
            self.entity[rows],
        )


class Groupings:
    """What rows hang together: those of one user, and in what is read of an entity those of one entity too.

    One network that many users share, and about which a fraud becomes known, moves the inputs of all of them at once.
    """

    def __init__(self, columns: Columns) -> None:
        self.user = groups_of(columns.user)
        """int [N]."""
        self._columns = columns
        self._of: dict[int, Codes] = {}

    def of(self, view: "View") -> list[Codes]:
        """int [N] each: the groupings that a view is to be counted over; the one that leaves more doubt is right."""
        if view.entity is None:
            return [self.user]
        if view.entity not in self._of:
            self._of[view.entity] = groups_of(self._columns.entity[:, view.entity])
        return [self.user, self._of[view.entity]]


@dataclass(frozen=True)
class View:
    """One input of N rows: numbers that are to be binned by the reference's edges, or bins, of which there are `k`."""

    name: str
    kind: Kind
    values: Floats | None
    bins: npt.NDArray[np.intp] | None = None
    k: int = 0
    entity: int | None = None
    """Of which of the E entities it is read."""

    def binned(self, edges: Sequence[float]) -> tuple[npt.NDArray[np.intp], int]:
        """Bins [N], -1 for none, and how many there are."""
        if self.values is not None:
            return bins_of(self.values, edges), len(edges) + 1
        assert self.bins is not None
        return self.bins, self.k


def views(schema: Schema, context: ContextSpec, vocabularies: Sequence[Vocabulary], columns: Columns) -> Iterator[View]:
    """Every input: numbers, categories (values of the vocabulary only), contexts, the time since the last event, the hour.

    Numbers are float32, as the model reads them.
    """
    for i, name in enumerate(schema.numeric_inputs):
        yield View(name, "number", columns.numeric[:, i].astype(np.float32).astype(np.float64))
    for c, vocabulary in enumerate(vocabularies):
        ids = columns.categorical[:, c]
        known = len(vocabulary.values)
        bins = np.where(ids <= UNSEEN, -1, np.minimum(ids - FIRST, CATEGORIES)).astype(np.intp)
        yield View(vocabulary.column, "category", None, bins, min(known, CATEGORIES + 1))
    numbers = _without_traces(context, columns.context)
    names = context.names()
    for column in range(len(context.columns)):
        of_column = context.numbers_of(column)
        for i in range(of_column.start, of_column.stop):
            yield View(names[i], "context", numbers[:, i], entity=column)
    yield View("time.gap", "clock", columns.gap)
    yield View("time.hour", "clock", None, (columns.time % DAY_MS // HOUR_MS).astype(np.intp), 24)


def _without_traces(spec: ContextSpec, context: npt.NDArray[np.floating[Any]]) -> Floats:
    """float64 [N, K]: contexts without what is left of known fraud of long ago."""
    out = context.astype(np.float64)
    for column in range(len(spec.columns)):
        at, places = spec.numbers_of(column).start, spec.places(column)
        if "fraud" in places:
            sums = out[:, at + places["fraud"].start : at + places["fraud"].stop]
            sums[np.abs(sums) < LEAST_KNOWN] = 0.0
    return out


def drift_reference(
    schema: Schema,
    context: ContextSpec,
    vocabularies: Sequence[Vocabulary],
    columns: Columns,
    probability: Floats,
    begin: int,
    validation: int,
    end: int,
) -> dict[str, Any]:
    """The distributions of the training time, as plain data.

    Inputs are those of its last weeks; scores, and values that a vocabulary lacks, those of the validation days, which
    nothing was fitted on.

    Args:
        columns: of all rows, from whenever.
        probability: [N], NaN where a row was not scored.
        begin, validation, end: of the training time and its validation days, ms.
    """
    time, groupings = columns.time, Groupings(columns)
    first = max(end - REFERENCE_DAYS * DAY_MS, (begin + end) // 2)
    reference = (time >= first) & (time < end)
    held_out = (time >= validation) & (time < end)
    windows = _windows(time, max(begin, end - QUIET_DAYS * DAY_MS), end)
    held_out_windows = _windows(time, validation, end)

    def described(view: View, rows: Mask, apart: Mapping[str, list[Mask]]) -> dict[str, Any] | None:
        edges = edges_of(view.values[rows]) if view.values is not None else []
        bins, k = view.binned(edges)
        found = [distribution_of(bins, edges, k, group, rows, apart) for group in groupings.of(view)]
        least_sure = max((one for one in found if one is not None), key=lambda one: one.noise, default=None)
        return None if least_sure is None else asdict(least_sure)

    inputs = {v.name: described(v, reference, windows) for v in views(schema, context, vocabularies, columns)}
    absent = {name: described(flag_view(name, mask), reference, windows) for name, mask in columns.absent.items()}
    unseen = {
        v.column: described(flag_view(v.column, columns.categorical[:, c] == UNSEEN), held_out, held_out_windows)
        for c, v in enumerate(vocabularies)
    }
    score = described(View("score", "number", probability), held_out, held_out_windows)
    return {
        "first": format_instant(first),
        "last": format_instant(end),
        "rows": int(reference.sum()),
        "rows_per_day": float(reference.sum()) / ((end - first) / DAY_MS),
        "inputs": {name: found for name, found in inputs.items() if found is not None},
        "absent": {name: found for name, found in absent.items() if found is not None},
        "unseen": {name: found for name, found in unseen.items() if found is not None},
        "score": score,
    }


def flag_view(name: str, mask: Mask) -> View:
    """A yes or no of each row: bin 1 is yes."""
    return View(name, "category", None, mask.astype(np.intp), 2)


def _windows(time: npt.NDArray[np.int64], begin: int, end: int) -> dict[str, list[Mask]]:
    """By length, the whole windows from `begin` to `end`, counted from the end."""
    return {
        name: [(time >= last - length) & (time < last) for last in range(end, begin + length - 1, -length)]
        for name, length in WINDOWS.items()
    }


@dataclass(frozen=True)
class DriftReference:
    """`drift_reference` as it is read from a manifest."""

    first: str
    last: str
    rows: int
    rows_per_day: float
    inputs: Mapping[str, Distribution]
    absent: Mapping[str, Distribution]
    unseen: Mapping[str, Distribution]
    score: Distribution | None


def read_reference(fingerprint: Mapping[str, Any]) -> DriftReference | None:
    """What a manifest's fingerprint holds; None where it is from before this was in it. Raises BundleError."""
    raw = fingerprint.get(KEY)
    if raw is None:
        return None
    try:
        parts = {
            part: {str(name): Distribution.from_dict(found) for name, found in raw[part].items()}
            for part in ("inputs", "absent", "unseen")
        }
        score = None if raw["score"] is None else Distribution.from_dict(raw["score"])
        return DriftReference(
            str(raw["first"]), str(raw["last"]), int(raw["rows"]), float(raw["rows_per_day"]), **parts, score=score
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"manifest: fingerprint.{KEY}: not readable: {type(error).__name__}: {error}") from error


def gaps_of(user: npt.NDArray[Any], time: npt.NDArray[np.int64]) -> Floats:
    """[N] seconds since the same user's event before, NaN where there is none; rows in any order of users, each by time."""
    order = np.lexsort((np.arange(len(time)), user))
    gap = np.full(len(time), np.nan)
    same = user[order][1:] == user[order][:-1]
    gap[order[1:]] = np.where(same, np.maximum(np.diff(time[order]), 0) / 1000, np.nan)
    return gap


def stacked(codes: Sequence[npt.NDArray[np.integer[Any]]], rows: int) -> npt.NDArray[np.int32]:
    """int32 [N, E] of E columns [N]; [N, 0] of none."""
    out = np.empty((rows, len(codes)), dtype=np.int32)
    for i, column in enumerate(codes):
        out[:, i] = column
    return out
