"""What the other entities of a transaction (merchant, terminal, device, network) have recently been through.

Per entity value there are exponentially decayed sums for several half-lives (transactions, amount, known fraud, known
honest) and the state of its run of known frauds. `ContextTable` is the definition, O(1) in memory and time per entity,
apart from the log that makes corrections exact; `context_columns` is a vectorised scan over a whole file that equals
it.

Order: a transaction reads before it adds itself. A label takes effect before the first transaction in arrival order
whose time is at or after `known_at`; its increment carries the transaction's time. A transaction without a fraud
label counts as known honest one label delay after its time.

The run of known frauds, folded over label effects in the order in which they take effect: a fraud begins a new run if
it is the first, or if an honest transaction newer than the last known fraud is known; else it lengthens the run. Where
a label is corrected, the earlier one is taken out of the fold and the new one appended.

Letters: N rows, E context columns, L half-lives, S numbers read per column, K = E * S.
"""

import heapq
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.config import DAY_MS, Config
from seqfraud.cut import Cut
from seqfraud.schema import Schema
from seqfraud.table import MISSING, Coded, RowNumbers, by_code, row_type

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

NEVER = -(2**62)
"""A time before every time; differences with real times do not overflow int64."""

NO_ENTITY = 0
"""Row of the table that stands for a missing value: reads as an entity that was never seen, never changes."""

COUNT, AMOUNT, FRAUD, HONEST = range(4)
BEGAN, LENGTH, LAST_FRAUD, LAST_HONEST = range(4)
UNKNOWN_AGE = -1.0


@dataclass(frozen=True)
class ContextSpec:
    """What is kept and read per entity; part of the manifest."""

    columns: tuple[str, ...]
    half_lives: tuple[int, ...]
    """Milliseconds."""
    label_delay: int
    """Milliseconds."""

    @property
    def numbers_per_column(self) -> int:
        """S."""
        return 4 * len(self.half_lives) + 4

    @property
    def width(self) -> int:
        """K."""
        return len(self.columns) * self.numbers_per_column

    def names(self) -> list[str]:
        """The K names of what is read, in order."""
        kinds = [f"{kind}_{hl / DAY_MS:g}d" for kind in ("count", "amount", "fraud", "honest")
                 for hl in self.half_lives]  # fmt: skip
        kinds += ["run_age_d", "run_length", "since_fraud_d", "since_honest_d"]
        return [f"{column}.{kind}" for column in self.columns for kind in kinds]


def context_spec(config: Config, schema: Schema) -> ContextSpec:
    """The context that a configuration asks for."""
    return ContextSpec(schema.entities, tuple(map(int, config.features.half_lives)), int(config.data.label_delay))


def fold_fraud(run: list[int], time: int) -> None:
    """One known fraud of transaction time `time` on a run state [began, length, last fraud, last honest]."""
    if run[LENGTH] == 0 or run[LAST_HONEST] > run[LAST_FRAUD]:
        run[BEGAN], run[LENGTH] = time, 1
    else:
        run[BEGAN], run[LENGTH] = min(run[BEGAN], time), run[LENGTH] + 1
    run[LAST_FRAUD] = max(run[LAST_FRAUD], time)


class ContextTable:
    """Live context of every entity value.

    Rows are entities; row 0 is "no entity". Attributes:
        newest: int64 [rows], time of the newest transaction of the entity.
        sums: float64 [rows, 4, L], decayed to `newest`.
        run: int64 [rows, 4], state of the run of known frauds.
    """

    def __init__(self, spec: ContextSpec, capacity: int = 1024) -> None:
        self.spec = spec
        self._rate = np.tile(-1.0 / np.array(spec.half_lives, dtype=np.float64), (4, 1))
        """float64 [4, L], the same for each kind of sum: NumPy is quickest where shapes are equal."""
        self._gain = np.zeros_like(self._rate)
        self._gain[COUNT] = 1.0
        """float64 [4, L]: what the transaction at hand adds; only its amount changes."""
        self.rows: dict[tuple[int, str], int] = {}
        self.newest: Int64 = np.full(capacity, NEVER, dtype=np.int64)
        self.sums: Float64 = np.zeros((capacity, 4, len(spec.half_lives)))
        self.run: Int64 = np.empty((capacity, 4), dtype=np.int64)
        self.run[:] = (NEVER, 0, NEVER, NEVER)
        self.effects: list[array[int]] = [array("q")]
        """Per row, label effects in order, only ever added to: 4 * time + 2 * (correction) + fraud."""
        self.names: list[tuple[int, str]] = []
        """The keys of `rows` in row order, from row 1."""
        self.cut: Cut[SavedRows] | None = None
        """Set while a snapshot reads the rows a piece at a time."""

    def rows_of(self, values: Sequence[str | None]) -> Int64:
        """int64 [E]: the row of each context column's value, made where it is new."""
        rows = self.rows
        out = np.zeros(len(values), dtype=np.int64)
        for column, value in enumerate(values):
            if value is None:
                continue
            row = rows.get((column, value))
            if row is None:
                row = len(self.effects)
                if row == len(self.newest):
                    self._grow()
                rows[(column, value)] = row
                self.names.append((column, value))
                self.effects.append(array("q"))
            out[column] = row
        return out

    def forget_newest(self, left: int) -> None:
        """Forget entities that were made last, and to which nothing happened, until `left` are left."""
        while len(self.rows) > left:
            self.rows.popitem()
            self.names.pop()
            self.effects.pop()

    def _grow(self) -> None:
        more = len(self.newest)
        self.newest = np.concatenate([self.newest, np.full(more, NEVER, dtype=np.int64)])
        self.sums = np.concatenate([self.sums, np.zeros((more, *self.sums.shape[1:]))])
        run = np.empty((more, 4), dtype=np.int64)
        run[:] = (NEVER, 0, NEVER, NEVER)
        self.run = np.concatenate([self.run, run])

    def read(self, rows: Int64, time: int) -> Float64:
        """float64 [K]: what a transaction at `time` (ms) reads of its E entities, before it adds itself."""
        size = self.spec.numbers_per_column
        out = np.empty(len(rows) * size)
        for begin, row in zip(range(0, len(out), size), rows.tolist(), strict=True):
            newest = self.newest.item(row)
            now = max(newest, time)
            sums = self.sums[row] * np.exp2(self._rate * float(now - newest))
            end = begin + size
            out[begin : end - 4] = sums.reshape(-1)
            out[end - 4 : end] = run_read(self.run[row].tolist(), now)
        return out

    def add_transaction(self, rows: Int64, time: int, amount: float) -> None:
        """Count a transaction for its entities; one older than an entity's newest is added already decayed."""
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        gain = self._gain
        gain[AMOUNT] = amount
        for row in rows.tolist():
            if row == NO_ENTITY:
                continue
            newest = self.newest.item(row)
            sums = self.sums[row]
            if time >= newest:
                sums *= np.exp2(self._rate * float(time - newest))
                sums += gain
                self.newest[row] = time
            else:
                sums += gain * np.exp2(self._rate * float(newest - time))

    def add_label(self, rows: Int64, time: int, fraud: bool) -> None:
        """A label of a transaction of that time takes effect."""
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        for row in rows.tolist():
            if row != NO_ENTITY:
                self.sums[row, FRAUD if fraud else HONEST] += self._known(row, time)
                self._fold(row, time, fraud)
                self.effects[row].append(4 * time + fraud)

    def correct_label(self, rows: Int64, time: int, fraud: bool) -> None:
        """The label of a transaction of that time, in effect so far, turns out to be the other one.

        Of several labels of an entity that are alike in time and value, the one that took effect last is taken out.
        """
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        for row in rows.tolist():
            if row != NO_ENTITY:
                known = self._known(row, time)
                self.sums[row, HONEST if fraud else FRAUD] -= known
                self.sums[row, FRAUD if fraud else HONEST] += known
                self.effects[row].append(4 * time + 2 + fraud)
                self.run[row] = last_run(np.array(self.effects[row], dtype=np.int64))

    def save_rows(self, rows: Int64) -> "SavedRows":
        """A copy of some entities, to take back what comes next."""
        return SavedRows(
            rows,
            self.newest.take(rows),
            self.sums.take(rows, axis=0),
            self.run.take(rows, axis=0),
            [len(self.effects[row]) for row in rows.tolist()],
        )

    def restore_rows(self, saved: "SavedRows") -> None:
        """Entities as they were when saved."""
        if self.cut is not None:
            self.cut.keep(saved.rows.tolist())
        self.newest[saved.rows], self.sums[saved.rows] = saved.newest, saved.sums
        self.run[saved.rows] = saved.run
        for row, length in zip(saved.rows.tolist(), saved.effects, strict=True):
            del self.effects[row][length:]

    def begin_cut(self) -> None:
        """From here on `copy_rows` gives the rows as they are now."""
        self.cut = Cut(len(self.effects), lambda row: self.save_rows(np.array([row])))

    def copy_rows(self, count: int) -> dict[str, Any]:
        """Arrays of the next rows of the cut, at most `count`; `effects` has the number of each row's label effects."""
        assert self.cut is not None
        begin, end, kept = self.cut.advance(count)
        out = {name: getattr(self, name)[begin:end].copy() for name in ("newest", "sums", "run")}
        out["effects"] = np.array([len(e) for e in self.effects[begin:end]], dtype=np.int64)
        if kept:
            at = [index for index, _ in kept]
            for name in ("newest", "sums", "run"):
                out[name][at] = np.concatenate([getattr(saved, name) for _, saved in kept])
            out["effects"][at] = [saved.effects[0] for _, saved in kept]
        return out

    def copy_effects(self, spans: Sequence[tuple[int, int, int]]) -> Int64:
        """Label effects of some rows, joined: (row, begin, end) each. Those of a cut do not change after it."""
        return np.frombuffer(b"".join([self.effects[row][begin:end] for row, begin, end in spans]), dtype=np.int64)

    def restore_entities(self, names: Sequence[tuple[int, str]], arrays: Mapping[str, Any]) -> None:
        """More entities in row order, and what `copy_rows` gave of them; row 0, which has no name, comes first."""
        end = 1 + len(self.names) + len(names)
        begin = end - len(arrays["newest"])
        self.rows.update(zip(names, range(end - len(names), end), strict=True))
        self.names.extend(names)
        while len(self.newest) < end:
            self._grow()
        for name in ("newest", "sums", "run"):
            getattr(self, name)[begin:end] = arrays[name]

    def restore_effects(self, lengths: Int64, effects: "array[int]") -> None:
        """The label effects of all rows, joined, and how many each row has [rows]."""
        ends = np.cumsum(lengths).tolist()
        self.effects = [effects[begin:end] for begin, end in pairwise([0, *ends])]

    def _known(self, row: int, time: int) -> Float64:
        """float64 [L]: what one known transaction of that time is by the entity's newest time."""
        known: Float64 = np.exp2(self._rate[0] * float(self.newest.item(row) - time))
        return known

    def _fold(self, row: int, time: int, fraud: bool) -> None:
        if fraud:
            run = self.run[row].tolist()
            fold_fraud(run, time)
            self.run[row] = run
        elif time > self.run.item(row, LAST_HONEST):
            self.run[row, LAST_HONEST] = time


@dataclass(frozen=True)
class SavedRows:
    """Some entities of a ContextTable at one moment."""

    rows: Int64
    newest: Int64
    sums: Float64
    run: Int64
    effects: list[int]
    """How many label effects each has."""


def run_read(run: list[int], now: int) -> tuple[float, int, float, float]:
    """Age of the run (days), its length, days since the last known fraud and honest transaction; or -1.

    Days, because labels come late: on the logarithmic scale of the model a month is then wide enough to be told from five
    weeks, which it is not in seconds.
    """
    began, length, fraud, honest = run
    return (
        UNKNOWN_AGE if began == NEVER else (now - began) / DAY_MS,
        length,
        UNKNOWN_AGE if fraud == NEVER else (now - fraud) / DAY_MS,
        UNKNOWN_AGE if honest == NEVER else (now - honest) / DAY_MS,
    )


def run_numbers(run: Int64, now: Int64) -> Float64:
    """float64 [N, 4]: `run_read` of N states."""
    out = np.empty(run.shape)
    out[:, 1] = run[:, LENGTH]
    for at, state in ((0, BEGAN), (2, LAST_FRAUD), (3, LAST_HONEST)):
        out[:, at] = np.where(run[:, state] == NEVER, UNKNOWN_AGE, (now - run[:, state]) / DAY_MS)
    return out


def last_run(effects: Int64) -> Int64:
    """int64 [4]: the run state after folding the effects [n] of one entity in order, corrections taken out.

    Args:
        effects: 4 * time + 2 * (correction) + fraud, as in `ContextTable.effects`.
    """
    time, fraud = effects >> 2, (effects & 1).astype(bool)
    kept = _uncorrected(time, fraud, (effects & 2).astype(bool))
    time, fraud = time[kept], fraud[kept]
    last_honest = time[~fraud].max(initial=NEVER)
    at = np.flatnonzero(fraud)
    if len(at) == 0:
        return np.array([NEVER, 0, NEVER, last_honest], dtype=np.int64)
    last_fraud = np.maximum.accumulate(time[at])
    honest = np.maximum.accumulate(np.where(fraud, NEVER, time))[at]
    begins = np.flatnonzero(honest[1:] > last_fraud[:-1]) + 1
    run = at[begins[-1] :] if len(begins) else at
    return np.array([time[run].min(), len(run), last_fraud[-1], last_honest], dtype=np.int64)


def _uncorrected(time: Int64, fraud: npt.NDArray[np.bool_], correction: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mask [n] of the effects that no correction has taken out."""
    kept = np.ones(len(time), dtype=bool)
    if not correction.any():
        return kept
    alike: dict[tuple[int, bool], list[int]] = {}
    for at in np.flatnonzero(np.isin(time, time[correction])).tolist():
        moment, is_fraud = int(time[at]), bool(fraud[at])
        if correction[at]:
            kept[alike[moment, not is_fraud].pop()] = False
        alike.setdefault((moment, is_fraud), []).append(at)
    return kept


def context_columns(
    spec: ContextSpec,
    entities: Sequence[Coded],
    time: Int64,
    amount: Float64 | None,
    label: npt.NDArray[np.int8] | None,
    known_at: Int64 | None,
    place: RowNumbers | None = None,
) -> npt.NDArray[np.float32]:
    """What every transaction of a file reads: `ContextTable` over the rows in arrival order, vectorised.

    Args:
        entities: E columns of N rows.
        time: int64 [N], ascending.
        amount: float64 [N], or None: counts as 0.
        label: int8 [N], -1 unknown; None: no label is ever known.
        known_at: int64 [N]; None: one label delay after the transaction.
        place: row numbers [N], the row of the result for each transaction; None: as they are. The result is the largest
            array of a preparation; put in order here, it need not be copied.

    Returns:
        float32 [N, K], the graph's `context` input.
    """
    out = np.empty((len(time), spec.width), dtype=np.float32)
    _fill_columns(out, spec, entities, time, amount, label, known_at, place)
    return out


def _fill_columns(
    out: npt.NDArray[Any],
    spec: ContextSpec,
    entities: Sequence[Coded],
    time: Int64,
    amount: Float64 | None,
    label: npt.NDArray[np.int8] | None,
    known_at: Int64 | None,
    place: RowNumbers | None = None,
) -> None:
    """`context_columns` into an array [N, K] of any float type."""
    weight = np.zeros(len(time)) if amount is None else amount
    effects = _label_effects(time, label, known_at, spec.label_delay)
    size = spec.numbers_per_column
    for column, coded in enumerate(entities):
        _fill_column(out[:, column * size : (column + 1) * size], spec, coded, time, weight, effects, place)


@dataclass(frozen=True)
class _Effects:
    """M label effects in the order in which they are taken; those that no row can hear are left out.

    Attributes:
        source: row numbers [M], the row whose label it is.
        heard: row numbers [M], the first row that can hear it.
        fraud: bool [M].
        correction: bool [M], whether the row was known as honest before.
    """

    source: RowNumbers
    heard: RowNumbers
    fraud: Mask
    correction: Mask


def _label_effects(
    time: Int64, label: npt.NDArray[np.int8] | None, known_at: Int64 | None, label_delay: int
) -> _Effects:
    """The effects of a file's labels, by arrival: rows [N] in, one effect per row and one per late fraud out."""
    n = len(time)
    fraud = np.zeros(n, dtype=bool) if label is None else label == 1
    at = silence = time + label_delay
    late = np.zeros(0, dtype=np.int64)
    if label is not None and known_at is not None:
        at = np.where(label == MISSING, silence, np.clip(known_at, time, silence))
        late = np.flatnonzero(fraud & (known_at > silence))
        at = np.r_[at, known_at[late]]
        fraud = np.r_[fraud, np.ones(len(late), dtype=bool)]
        fraud[late] = False
    source = np.r_[np.arange(n), late]
    correction = np.arange(len(source)) >= n
    # a label waits for its own transaction, however early it is known
    heard = np.maximum(np.searchsorted(time, at), source + 1)
    if len(late) or bool((np.diff(at) < 0).any()):
        order = np.lexsort((source, at))
        order = order[heard[order] < n]
    else:
        order = np.flatnonzero(heard < n)
    kind = row_type(n)
    return _Effects(source[order].astype(kind), heard[order].astype(kind), fraud[order], correction[order])


STEPS, LANES = 128, 128
"""A block of the scan is STEPS * LANES rows: LANES stretches of STEPS rows that advance side by side."""


@dataclass(frozen=True)
class _Rows:
    """The n rows of one context column that have a value, by entity, then arrival: row i is arrival order[i].

    Attributes:
        order: row numbers [n].
        code: int32 [n], the entity.
        time: int64 [n].
        begin: row numbers [n], the first row of the row's entity.
    """

    order: RowNumbers
    code: npt.NDArray[np.int32]
    time: Int64
    begin: RowNumbers


def _by_entity(codes: npt.NDArray[np.int32], time: Int64) -> _Rows:
    """The rows of a context column with `codes` [N]."""
    order = by_code(codes)
    code = codes[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = code[1:] != code[:-1]
    kind = row_type(len(codes))
    begin = np.maximum.accumulate(np.where(first, np.arange(len(order), dtype=kind), 0))
    return _Rows(order.astype(kind), code, time[order], begin)


def _fill_column(
    out: npt.NDArray[Any],
    spec: ContextSpec,
    coded: Coded,
    time: Int64,
    amount: Float64,
    effects: _Effects,
    place: RowNumbers | None,
) -> None:
    """Fill `out` [N, S] for one context column, block by block of its sorted rows."""
    lengths = len(spec.half_lives)
    rate = -1.0 / np.array(spec.half_lives, dtype=np.float64)
    absent = np.flatnonzero(coded.codes == MISSING)
    out[absent if place is None else place[absent]] = np.r_[
        np.zeros(4 * lengths), UNKNOWN_AGE, 0.0, UNKNOWN_AGE, UNKNOWN_AGE
    ]
    rows = _by_entity(coded.codes, time)
    told = _told_effects(rows, coded.codes, effects)
    runs = _runs_told(rows, told)
    n = len(rows.order)

    state = np.zeros((4, lengths))
    for low in range(0, n, STEPS * LANES):
        high = min(low + STEPS * LANES, n)
        lanes = -(-(high - low) // STEPS)
        now, before = rows.time[low:high], np.arange(low - 1, high - 1)
        # after an endless gap nothing is left of the entity before
        gap = np.where(rows.begin[low:high] > before, np.inf, now - rows.time[before])
        decay = np.exp2(_in_lanes(gap, lanes)[:, None, :] * rate[:, None])
        gain = np.empty((STEPS, 4, lengths, lanes))
        # what a row adds after reading has decayed once when the next row reads
        gain[:, COUNT] = decay
        gain[:, AMOUNT] = decay * _in_lanes(np.nan_to_num(amount[rows.order[before]]), lanes)[:, None, :]
        gain[:, FRAUD:] = told.gains(low, high, lanes, rows.time, rate)
        state = _decayed_sums(decay, gain, state)

        block = np.empty((lanes, STEPS, spec.numbers_per_column), dtype=out.dtype)
        for kind in range(4):
            block[:, :, kind * lengths : (kind + 1) * lengths] = gain[:, kind].transpose(2, 0, 1)
        flat = block.reshape(-1, spec.numbers_per_column)[: high - low]
        flat[:, -4:] = run_numbers(runs.read(rows, low, high), now)
        at = rows.order[low:high]
        out[at if place is None else place[at]] = flat


def _in_lanes(values: npt.NDArray[Any], lanes: int) -> npt.NDArray[Any]:
    """[STEPS, lanes]: lane k has the k-th stretch of STEPS values; 0 after the end."""
    padded = np.zeros(lanes * STEPS, dtype=values.dtype)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(lanes, STEPS).T)


def _decayed_sums(decay: Float64, gain: Float64, state: Float64) -> Float64:
    """Turn `gain` into the sums s[row] = decay[row] * s[row - 1] + gain[row], in place; returns the last.

    Rows follow each other along the steps of lane 0, then of lane 1, and so on; a decay of 0 starts a new entity.

    Args:
        decay: float64 [STEPS, L, lanes], overwritten.
        gain: float64 [STEPS, 4, L, lanes].
        state: float64 [4, L], the sums before the first row.
    """
    part = np.empty_like(gain[0])
    for i in range(1, len(gain)):
        gain[i] += np.multiply(decay[i], gain[i - 1], out=part)
        decay[i] *= decay[i - 1]
    lanes = decay.shape[2]
    before = np.empty((lanes, *state.shape))
    whole, own = decay[-1].transpose(1, 0).copy(), gain[-1].transpose(2, 0, 1).copy()
    for lane in range(lanes):
        before[lane] = state
        state = whole[lane] * state + own[lane]
    gain += decay[:, None] * before.transpose(1, 2, 0)
    return state


@dataclass(frozen=True)
class _Told:
    """The m label effects that a row of their own entity hears, by entity, then in the order of effect.

    Attributes:
        speaker: row numbers [m], the row whose label it is.
        heard: row numbers [m], the first row that hears it; ascending.
        fraud, correction: bool [m].
    """

    speaker: RowNumbers
    heard: RowNumbers
    fraud: Mask
    correction: Mask

    def gains(self, low: int, high: int, lanes: int, time: Int64, rate: Float64) -> Float64:
        """float64 [STEPS, 2, L, lanes]: what the rows low to high hear for the first time of known fraud and honest.

        A correction is two gains, the first of which takes out what was known before.
        """
        begin, end = _within(self.heard, low, high)
        which = np.repeat(np.arange(begin, end), 1 + self.correction[begin:end])
        undo = np.zeros(len(which), dtype=bool)
        undo[1:] = which[1:] == which[:-1]
        honest = ~self.fraud[which] | undo
        weight = np.where(undo, -1.0, 1.0)
        heard = self.heard[which]
        age = time[heard] - time[self.speaker[which]]
        lane, step = np.divmod(heard - low, STEPS)
        cell = (step * 2 + honest) * lanes + lane
        out = np.empty((STEPS, 2, len(rate), lanes))
        for i in range(len(rate)):
            gain = np.bincount(cell, weight * np.exp2(age * rate[i]), minlength=STEPS * 2 * lanes)
            out[:, :, i] = gain.reshape(STEPS, 2, lanes)
        return out


def _told_effects(rows: _Rows, codes: npt.NDArray[np.int32], effects: _Effects) -> _Told:
    """The effects of a file as those of one context column with `codes` [N]."""
    by = by_code(codes[effects.source])
    place = np.empty(len(codes), dtype=rows.order.dtype)
    place[rows.order] = np.arange(len(rows.order))
    speaker = place[effects.source[by]]
    del place
    entity = rows.code[speaker]
    heard = _first_heard(rows, entity, effects.heard[by], len(codes))
    told = np.flatnonzero(np.append(rows.code, np.int32(MISSING))[heard] == entity)
    by = by[told]
    return _Told(speaker[told], heard[told], effects.fraud[by], effects.correction[by])


def _first_heard(rows: _Rows, entity: npt.NDArray[np.int32], arrival: RowNumbers, count: int) -> RowNumbers:
    """The first row at or after (entity, arrival) of each [m]; `count` N is more than every arrival."""
    keys = rows.code.astype(np.int64) * count + rows.order
    heard = np.searchsorted(keys, entity.astype(np.int64) * count + arrival)
    return heard.astype(rows.order.dtype)


def _within(ascending: RowNumbers, low: int, high: int) -> tuple[int, int]:
    """Where the rows low to high begin and end. Numbers of another type would have the whole array copied to it."""
    begin, end = np.searchsorted(ascending, np.array((low, high), dtype=ascending.dtype)).tolist()
    return begin, end


@dataclass(frozen=True)
class _Runs:
    """The states of runs of known frauds that rows can read.

    Attributes:
        heard: row numbers [m], ascending: the rows that hear something new.
        honest: row numbers [m + 1], the newest row known as honest for good so far, perhaps of an earlier entity; -1 is
            none.
        changed: row numbers [q], ascending: the rows that hear of a change of the state.
        states: int64 [q + 1, 4], the state from there on, its last honest only of those that are corrected later.
        entity: int32 [q + 1], whose state it is. The last items stand for "nothing heard yet".
    """

    heard: RowNumbers
    honest: RowNumbers
    changed: RowNumbers
    states: Int64
    entity: npt.NDArray[np.int32]

    def read(self, rows: _Rows, low: int, high: int) -> Int64:
        """int64 [high - low, 4]: the state that each row reads."""
        change = _latest(self.changed, low, high)
        own = self.entity[change] == rows.code[low:high]
        run = self.states[np.where(own, change, -1)]
        honest = self.honest[_latest(self.heard, low, high)]
        known = honest >= rows.begin[low:high]
        run[known, LAST_HONEST] = np.maximum(run[known, LAST_HONEST], rows.time[honest[known]])
        return run


def _latest(heard: RowNumbers, low: int, high: int) -> Int64:
    """int64 [high - low]: index of the last item of `heard` (ascending rows) at or before each row; -1 none."""
    begin, end = _within(heard, low, high)
    heard_so_far: Int64 = np.cumsum(np.bincount(heard[begin:end] - low, minlength=high - low))
    heard_so_far += begin - 1
    return heard_so_far


def _runs_told(rows: _Rows, told: _Told) -> _Runs:
    """The fold of `fold_fraud` over the effects of every entity; entities without corrections all at once."""
    n = len(rows.time)
    entity = rows.code[told.speaker]
    revised = np.isin(entity, entity[told.correction])
    for_good = ~told.fraud & ~_at_risk(rows, told)
    honest = np.full(len(for_good) + 1, -1, dtype=told.speaker.dtype)
    np.maximum.accumulate(np.where(for_good, told.speaker, -1), out=honest[:-1])

    at = np.flatnonzero(told.fraud & ~revised)
    fraud, begin = told.speaker[at], rows.begin[told.speaker[at]]
    newest = np.maximum.accumulate(fraud)
    before = np.roll(newest, 1)
    before[:1] = -1
    honest_since = (honest[at] >= begin) & (rows.time[honest[at]] > rows.time[before])
    begins = (before < begin) | honest_since
    run = np.cumsum(begins)
    length = np.arange(len(at)) - np.flatnonzero(begins)[run - 1] + 1
    oldest = run * n - np.maximum.accumulate(run * n - fraud)  # a running minimum that starts anew with each run
    plain = np.stack([rows.time[oldest], length, rows.time[newest], np.full(len(at), NEVER)], axis=1)

    told_again = np.flatnonzero(revised & ~for_good)
    folded = _folded_with_corrections(rows, told, told_again, honest)
    changes = np.r_[at, told_again]
    order = np.argsort(changes, kind="stable")
    changes = changes[order]
    nothing = np.array([[NEVER, 0, NEVER, NEVER]])
    return _Runs(
        heard=told.heard,
        honest=honest,
        changed=told.heard[changes],
        states=np.concatenate([np.concatenate([plain, folded])[order], nothing]),
        entity=np.append(entity[changes], np.int32(MISSING)),
    )


def _at_risk(rows: _Rows, told: _Told) -> Mask:
    """Mask [m] of the honest effects that a correction may take out: those of a corrected row's entity and time."""
    if not told.correction.any():
        return np.zeros(len(told.heard), dtype=bool)
    moment = np.cumsum((np.diff(rows.time, prepend=0) != 0) | (rows.begin == np.arange(len(rows.time))))
    return ~told.fraud & np.isin(moment[told.speaker], moment[told.speaker[told.correction]])


def _folded_with_corrections(rows: _Rows, told: _Told, which: Int64, honest: RowNumbers) -> Int64:
    """int64 [k, 4]: the states after the effects `which` of entities with corrections; `honest` as in `_Runs`."""
    speaker, newest = told.speaker[which], honest[which]
    begin = rows.begin[speaker]
    for_good = np.where(newest >= begin, rows.time[newest], NEVER)
    states = []
    entity, fold = -1, _RevisedFold()
    columns = (begin, rows.time[speaker], told.fraud[which], told.correction[which], for_good)
    for first, time, fraud, correction, known in zip(*(c.tolist() for c in columns), strict=True):
        if first != entity:
            entity, fold = first, _RevisedFold()
        if correction:
            fold.take_out(time)
        if fraud:
            fold.add_fraud(time, known)
        else:
            fold.add_honest(time)
        states.append(fold.state())
    return np.array(states, dtype=np.int64).reshape(-1, 4)


class _RevisedFold:
    """The fold over the effects of one entity where honest transactions turn out to be frauds.

    A fraud began a run because an honest transaction newer than the last known fraud was known. Where all such honest
    ones have been taken out, the run is one with the run before. Honest transactions that are never corrected are not
    kept here: the newest of them is an argument.
    """

    def __init__(self) -> None:
        self._runs: list[list[int]] = []
        """[began, length, last fraud before it, number of the effect that began it]; the first one stays a run."""
        self._honest: dict[int, list[int]] = {}
        """Time -> numbers of the effects in force, ascending."""
        self._newest: list[int] = []
        """Heap of negative times of `_honest`, some of them gone."""
        self._last_fraud = NEVER
        self._number = 0

    def add_honest(self, time: int) -> None:
        self._number += 1
        if time not in self._honest:
            self._honest[time] = []
            heapq.heappush(self._newest, -time)
        self._honest[time].append(self._number)

    def take_out(self, time: int) -> None:
        """Of several honest effects of one time the last is taken out."""
        numbers = self._honest[time]
        numbers.pop()
        if not numbers:
            del self._honest[time]
        while len(self._runs) > 1 and not self._stands(*self._runs[-1][2:]):
            began, length, _, _ = self._runs.pop()
            self._runs[-1][:2] = min(self._runs[-1][0], began), self._runs[-1][1] + length

    def _stands(self, last_fraud: int, number: int) -> bool:
        return any(time > last_fraud and numbers[0] < number for time, numbers in self._honest.items())

    def add_fraud(self, time: int, newest_for_good: int) -> None:
        self._number += 1
        if not self._runs or newest_for_good > self._last_fraud:
            self._runs = [[time, 1, NEVER, 0]]
        elif self._newest_honest() > self._last_fraud:
            self._runs.append([time, 1, self._last_fraud, self._number])
        else:
            run = self._runs[-1]
            run[:2] = min(run[0], time), run[1] + 1
        self._last_fraud = max(self._last_fraud, time)

    def _newest_honest(self) -> int:
        while self._newest and -self._newest[0] not in self._honest:
            heapq.heappop(self._newest)
        return -self._newest[0] if self._newest else NEVER

    def state(self) -> tuple[int, int, int, int]:
        """Began, length, last fraud, last honest."""
        began, length = self._runs[-1][:2] if self._runs else (NEVER, 0)
        return began, length, self._last_fraud, self._newest_honest()


def as_rows(entities: Sequence[Coded], row: int) -> list[str | None]:
    """The E values of one row; for the slow path and tests."""
    codes: list[Any] = [c.codes[row] for c in entities]
    return [None if k == MISSING else c.values[k] for c, k in zip(entities, codes, strict=True)]
