"""What the other entities of a transaction (merchant, terminal, device, network) have recently been through.

Per entity value there are exponentially decayed sums for several half-lives (transactions, amount, known fraud, known
honest) and the state of its run of known frauds. `ContextTable` is the definition, O(1) in memory and time per entity,
apart from the log that makes corrections exact; `context_columns` is a vectorised scan over a whole file that equals it.

Order: a transaction reads before it adds itself. A label takes effect before the first transaction in arrival order
whose time is at or after `known_at`; its increment carries the transaction's time. A transaction without a fraud
label counts as known honest one label delay after its time.

The run of known frauds, folded over label effects in the order in which they take effect: a fraud begins a new run if
it is the first, or if an honest transaction newer than the last known fraud is known; else it lengthens the run. Where a
label is corrected, the earlier one is taken out of the fold and the new one appended.

Letters: N rows, E context columns, L half-lives, S numbers read per column, K = E * S.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.config import Config
from seqfraud.reading import MISSING, Coded
from seqfraud.schema import Schema

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

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
        kinds = [f"{kind}_{hl / 86_400_000:g}d" for kind in ("count", "amount", "fraud", "honest")
                 for hl in self.half_lives]  # fmt: skip
        kinds += ["run_age_s", "run_length", "since_fraud_s", "since_honest_s"]
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
        self._rate = -1.0 / np.array(spec.half_lives, dtype=np.float64)
        self.rows: dict[tuple[int, str], int] = {}
        self.newest: Int64 = np.full(capacity, NEVER, dtype=np.int64)
        self.sums: Float64 = np.zeros((capacity, 4, len(spec.half_lives)))
        self.run: Int64 = np.empty((capacity, 4), dtype=np.int64)
        self.run[:] = (NEVER, 0, NEVER, NEVER)
        self.effects: list[array[int]] = [array("q")]
        """Per row, label effects in order: 2 * time + fraud."""

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
                self.effects.append(array("q"))
            out[column] = row
        return out

    def _grow(self) -> None:
        more = len(self.newest)
        self.newest = np.concatenate([self.newest, np.full(more, NEVER, dtype=np.int64)])
        self.sums = np.concatenate([self.sums, np.zeros((more, *self.sums.shape[1:]))])
        run = np.empty((more, 4), dtype=np.int64)
        run[:] = (NEVER, 0, NEVER, NEVER)
        self.run = np.concatenate([self.run, run])

    def read(self, rows: Int64, time: int) -> Float64:
        """float64 [K]: what a transaction at `time` (ms) reads of its E entities, before it adds itself."""
        newest = self.newest[rows]
        now = np.maximum(newest, time)
        decay = np.exp2((now - newest)[:, None] * self._rate)
        out = np.empty((len(rows), self.spec.numbers_per_column))
        out[:, :-4] = (self.sums[rows] * decay[:, None, :]).reshape(len(rows), -1)
        out[:, -4:] = run_numbers(self.run[rows], now)
        return out.reshape(-1)

    def add_transaction(self, rows: Int64, time: int, amount: float) -> None:
        """Count a transaction for its entities; one older than an entity's newest is added already decayed."""
        rows = rows[rows != NO_ENTITY]
        newest = self.newest[rows]
        now = np.maximum(newest, time)
        sums = self.sums[rows] * np.exp2((now - newest)[:, None] * self._rate)[:, None, :]
        part = np.exp2((now - time)[:, None] * self._rate)
        sums[:, COUNT] += part
        sums[:, AMOUNT] += amount * part
        self.sums[rows] = sums
        self.newest[rows] = now

    def add_label(self, rows: Int64, time: int, fraud: bool) -> None:
        """A label of a transaction of that time takes effect."""
        self._shift_known(rows, time, FRAUD if fraud else HONEST, 1.0)
        for row in rows.tolist():
            if row != NO_ENTITY:
                self._fold(row, time, fraud)
                self.effects[row].append(2 * time + fraud)

    def correct_label(self, rows: Int64, time: int, fraud: bool) -> None:
        """The label of a transaction of that time, in effect so far, turns out to be the other one."""
        self._shift_known(rows, time, HONEST if fraud else FRAUD, -1.0)
        self._shift_known(rows, time, FRAUD if fraud else HONEST, 1.0)
        for row in rows.tolist():
            if row == NO_ENTITY:
                continue
            effects = self.effects[row]
            earlier = 2 * time + (not fraud)
            effects.pop(len(effects) - 1 - effects[::-1].index(earlier))
            effects.append(2 * time + fraud)
            self.run[row] = last_run(np.array(effects, dtype=np.int64))

    def save_rows(self, rows: Int64) -> "SavedRows":
        """A copy of some entities, to take back what comes next."""
        return SavedRows(
            rows, self.newest[rows], self.sums[rows], self.run[rows], [self.effects[r][:] for r in rows.tolist()]
        )

    def restore_rows(self, saved: "SavedRows") -> None:
        """Entities as they were when saved."""
        self.newest[saved.rows], self.sums[saved.rows] = saved.newest, saved.sums
        self.run[saved.rows] = saved.run
        for row, effects in zip(saved.rows.tolist(), saved.effects, strict=True):
            self.effects[row] = effects

    def dump(self) -> dict[str, Any]:
        """Arrays of every entity for a snapshot; the entities' names are the keys of `rows` in row order."""
        used = len(self.effects)
        lengths = np.array([len(e) for e in self.effects], dtype=np.int64)
        joined = np.concatenate([np.array(e, dtype=np.int64) for e in self.effects])
        return {
            "newest": self.newest[:used].copy(),
            "sums": self.sums[:used].copy(),
            "run": self.run[:used].copy(),
            "effect_lengths": lengths,
            "effects": joined,
        }

    def restore(self, names: Sequence[tuple[int, str]], arrays: dict[str, Any]) -> None:
        """The inverse of `dump`."""
        used = len(names) + 1
        while len(self.newest) < used:
            self._grow()
        self.rows = {(column, value): row for row, (column, value) in enumerate(names, start=1)}
        self.newest[:used], self.sums[:used], self.run[:used] = arrays["newest"], arrays["sums"], arrays["run"]
        ends = np.cumsum(arrays["effect_lengths"])
        parts = np.split(arrays["effects"], ends[:-1])
        self.effects = [array("q", part.tobytes()) for part in parts]

    def _shift_known(self, rows: Int64, time: int, kind: int, by: float) -> None:
        rows = rows[rows != NO_ENTITY]
        self.sums[rows, kind] += by * np.exp2((self.newest[rows] - time)[:, None] * self._rate)

    def _fold(self, row: int, time: int, fraud: bool) -> None:
        if fraud:
            run = self.run[row].tolist()
            fold_fraud(run, time)
            self.run[row] = run
        elif time > self.run[row, LAST_HONEST]:
            self.run[row, LAST_HONEST] = time


@dataclass(frozen=True)
class SavedRows:
    """Some entities of a ContextTable at one moment."""

    rows: Int64
    newest: Int64
    sums: Float64
    run: Int64
    effects: "list[array[int]]"


def run_numbers(run: Int64, now: Int64) -> Float64:
    """float64 [N, 4] as read: age of the run (s), its length, seconds since the last known fraud and honest; -1 never."""
    out = np.empty(run.shape)
    out[:, 1] = run[:, LENGTH]
    for at, state in ((0, BEGAN), (2, LAST_FRAUD), (3, LAST_HONEST)):
        out[:, at] = np.where(run[:, state] == NEVER, UNKNOWN_AGE, (now - run[:, state]) / 1000)
    return out


def last_run(effects: Int64) -> Int64:
    """int64 [4]: the run state after folding the effects (2 * time + fraud) [n] of one entity in order."""
    if len(effects) == 0:
        return np.array([NEVER, 0, NEVER, NEVER], dtype=np.int64)
    states = _run_states(effects >> 1, (effects & 1).astype(bool), np.zeros(1, dtype=np.int64))
    return states[-1]


def _run_states(time: Int64, fraud: npt.NDArray[np.bool_], starts: Int64) -> Int64:
    """int64 [n, 4]: the run state after each of n effects, sorted by entity; entity e begins at index starts[e]."""
    n = len(time)
    index = np.arange(n)
    first = np.zeros(n, dtype=bool)
    first[starts] = True
    segment = np.cumsum(first) - 1
    last_fraud = _running_max(np.where(fraud, time, NEVER), segment)
    last_honest = _running_max(np.where(fraud, NEVER, time), segment)
    fraud_before = np.where(first, NEVER, np.roll(last_fraud, 1))
    honest_before = np.where(first, NEVER, np.roll(last_honest, 1))
    begins = fraud & ((fraud_before == NEVER) | (honest_before > fraud_before))
    run = np.maximum.accumulate(np.where(begins, index, 0))
    has_run = last_fraud != NEVER
    frauds = np.cumsum(fraud)
    length = np.where(has_run, frauds - frauds[run] + 1, 0)
    # begin = least time of the run's frauds: a running minimum that starts anew with each run
    run_number = np.cumsum(begins | first)
    began = -_running_max(np.where(fraud, -time, NEVER), run_number)
    return np.stack([np.where(has_run, began, NEVER), length, last_fraud, last_honest], axis=1)


def _running_max(values: Int64, segment: Int64) -> Int64:
    """Running maximum within segments (numbered upwards), exact: over ranks, shifted by segment."""
    distinct, rank = np.unique(values, return_inverse=True)
    shifted = rank + segment.astype(np.int64) * len(distinct)
    running = np.maximum.accumulate(shifted)
    return distinct[running - segment.astype(np.int64) * len(distinct)]


def context_columns(
    spec: ContextSpec,
    entities: Sequence[Coded],
    time: Int64,
    amount: Float64 | None,
    label: npt.NDArray[np.int8] | None,
    known_at: Int64 | None,
) -> npt.NDArray[np.float32]:
    """What every transaction of a file reads: `ContextTable` over the rows in arrival order, vectorised.

    Args:
        entities: E columns of N rows.
        time: int64 [N], ascending.
        amount: float64 [N], or None: counts as 0.
        label: int8 [N], -1 unknown; None: no label is ever known.
        known_at: int64 [N]; None: one label delay after the transaction.

    Returns:
        float32 [N, K], the graph's `context` input.
    """
    n = len(time)
    out = np.empty((n, spec.width), dtype=np.float32)
    fraud = np.zeros(n, dtype=bool) if label is None else label == 1
    silence = time + spec.label_delay
    effect_at = silence
    corrected = np.zeros(0, dtype=np.int64)
    if known_at is not None and label is not None:
        effect_at = np.where(label == MISSING, silence, np.minimum(known_at, silence))
        corrected = np.flatnonzero(fraud & (known_at > silence))
    weight = np.zeros(n) if amount is None else np.nan_to_num(amount)
    corrected_at = np.zeros(0, dtype=np.int64) if known_at is None else known_at[corrected]
    size = spec.numbers_per_column
    for column, coded in enumerate(entities):
        block = out[:, column * size : (column + 1) * size]
        _scan_column(spec, coded, time, weight, fraud, effect_at, corrected, corrected_at, block)
    return out


def _scan_column(
    spec: ContextSpec,
    coded: Coded,
    time: Int64,
    amount: Float64,
    fraud: npt.NDArray[np.bool_],
    effect_at: Int64,
    corrected: Int64,
    corrected_at: Int64,
    out: npt.NDArray[np.float32],
) -> None:
    """Fill `out` [N, S] for one context column."""
    present = np.flatnonzero(coded.codes != MISSING)
    out[:, :-4] = 0.0
    out[:, -4:] = (UNKNOWN_AGE, 0.0, UNKNOWN_AGE, UNKNOWN_AGE)
    if len(present) == 0:
        return
    code = coded.codes[present]
    order = present[np.argsort(code, kind="stable")]  # by entity, then arrival
    code = coded.codes[order]
    t = time[order]
    n = len(order)
    first = np.r_[True, code[1:] != code[:-1]]
    starts = np.flatnonzero(first)
    place = np.full(len(time), -1, dtype=np.int64)
    place[order] = np.arange(n)

    # label effects [M] on sorted rows: their own transaction, when, and as what; corrected frauds are honest first
    source = np.r_[np.arange(n), place[corrected][place[corrected] >= 0]]
    is_correction = np.arange(len(source)) >= n
    at = np.r_[effect_at[order], corrected_at[place[corrected] >= 0]]
    honest_first = np.zeros(len(time), dtype=bool)
    honest_first[corrected] = True
    as_fraud = np.r_[fraud[order] & ~honest_first[order], np.ones(len(source) - n, dtype=bool)]
    reader = _first_row_at(at, source, code, t, starts)
    read_after = reader < n
    heard, speaker = reader[read_after], source[read_after]
    heard_fraud, heard_correction = as_fraud[read_after], is_correction[read_after]

    gap = np.where(first, 0, np.diff(t, prepend=t[0]))
    lengths = len(spec.half_lives)
    for i, half_life in enumerate(spec.half_lives):
        rate = -1.0 / half_life
        decay = np.exp2(gap * rate)
        decay[first] = 0.0
        late = np.exp2((t[heard] - t[speaker]) * rate)
        before = np.r_[0.0, np.ones(n - 1)]
        for kind, gain in (
            (COUNT, before),
            (AMOUNT, np.r_[0.0, amount[order][:-1]]),
        ):
            # what is added after reading row i-1 has decayed once when row i reads
            out[order, kind * lengths + i] = _decayed_sum(decay, gain * decay)
        inc_fraud = np.bincount(heard[heard_fraud], late[heard_fraud], minlength=n)
        inc_honest = np.bincount(heard[~heard_fraud], late[~heard_fraud], minlength=n)
        inc_honest -= np.bincount(heard[heard_correction], late[heard_correction], minlength=n)
        out[order, FRAUD * lengths + i] = _decayed_sum(decay, inc_fraud)
        out[order, HONEST * lengths + i] = _decayed_sum(decay, inc_honest)

    run = _runs_read(code, t, starts, source, at, as_fraud, is_correction, reader)
    out[order, -4:] = run_numbers(run, t)


def _first_row_at(at: Int64, source: Int64, code: npt.NDArray[np.int32], t: Int64, starts: Int64) -> Int64:
    """int64 [M]: first row of the effect's entity that arrives at or after `at`; n where there is none."""
    n = len(t)
    ends = np.r_[starts[1:], n]
    entity = np.cumsum(np.r_[True, code[1:] != code[:-1]]) - 1
    low = int(t.min())
    span = int(max(t.max(), at.max())) - low + 2
    key = entity * span + (t - low)
    wanted = entity[source] * span + np.clip(at - low, 0, span - 1)
    found = np.searchsorted(key, wanted, side="left")
    return np.where(found < ends[entity[source]], found, n)


BLOCK = 64


def _decayed_sum(decay: Float64, gain: Float64) -> Float64:
    """s[i] = decay[i] * s[i-1] + gain[i], s[-1] = 0, over [n], in two passes over blocks of 64 rows.

    A decay of 0 starts a new entity, so that the length of a single entity's history does not matter.
    """
    n = len(gain)
    if n <= BLOCK:
        out = np.empty(n)
        state = 0.0
        for i in range(n):
            state = out[i] = decay[i] * state + gain[i]
        return out
    blocks = -(-n // BLOCK)
    a = np.zeros(blocks * BLOCK)
    b = np.zeros(blocks * BLOCK)
    a[:n], b[:n] = decay, gain
    a = np.ascontiguousarray(a.reshape(blocks, BLOCK).T)
    b = np.ascontiguousarray(b.reshape(blocks, BLOCK).T)
    for i in range(1, BLOCK):
        b[i] += a[i] * b[i - 1]
        a[i] *= a[i - 1]
    carried = np.r_[0.0, _decayed_sum(a[-1], b[-1])[:-1]]
    b += a * carried
    return np.ascontiguousarray(b.T).reshape(-1)[:n]


def _runs_read(
    code: npt.NDArray[np.int32],
    t: Int64,
    starts: Int64,
    source: Int64,
    at: Int64,
    as_fraud: npt.NDArray[np.bool_],
    is_correction: npt.NDArray[np.bool_],
    reader: Int64,
) -> Int64:
    """int64 [n, 4]: the run state that each row reads."""
    n = len(t)
    run = np.empty((n, 4), dtype=np.int64)
    run[:] = (NEVER, 0, NEVER, NEVER)
    order = np.lexsort((source, at, code[source]))  # ties: by transaction time and file row, which `source` has
    order = order[reader[order] < n]
    if len(order) == 0:
        return run
    who = code[source[order]]
    effect_starts = np.flatnonzero(np.r_[True, who[1:] != who[:-1]])
    states = _run_states(t[source[order]], as_fraud[order], effect_starts)
    # the last effect heard at or before each row, if it is of the row's entity
    key = reader[order]
    last = np.searchsorted(key, np.arange(n), side="right") - 1
    own = (last >= 0) & (code[source[order]][last] == code)
    run[own] = states[last[own]]
    for entity in np.unique(code[source[is_correction & (reader < n)]]):
        rows = slice(int(np.searchsorted(code, entity)), int(np.searchsorted(code, entity, side="right")))
        mine = order[who == entity]
        run[rows] = _corrected_runs(rows, t, source[mine], as_fraud[mine], is_correction[mine], reader[mine])
    return run


def _corrected_runs(
    rows: slice,
    t: Int64,
    source: Int64,
    as_fraud: npt.NDArray[np.bool_],
    is_correction: npt.NDArray[np.bool_],
    reader: Int64,
) -> Int64:
    """The runs read by one entity's rows where labels are corrected: one fold per stretch between corrections."""
    out = np.empty((rows.stop - rows.start, 4), dtype=np.int64)
    out[:] = (NEVER, 0, NEVER, NEVER)
    kept = np.ones(len(source), dtype=bool)
    bounds = np.r_[np.flatnonzero(is_correction), len(source)]
    begin = 0
    for end in bounds.tolist():
        if begin:  # the correction at begin - 1 takes its transaction's earlier effect out
            kept[np.flatnonzero((source[:begin - 1] == source[begin - 1]) & kept[: begin - 1])] = False
        alive = np.flatnonzero(kept[:end])
        if len(alive):
            states = _run_states(t[source[alive]], as_fraud[alive], np.zeros(1, dtype=np.int64))
            from_row = reader[begin - 1] if begin else rows.start
            to_row = reader[end] if end < len(source) else rows.stop
            reads = np.arange(from_row, to_row)
            last = np.searchsorted(reader[alive], reads, side="right") - 1
            heard = last >= 0
            out[reads[heard] - rows.start] = states[last[heard]]
        begin = end + 1
    return out


def as_rows(entities: Sequence[Coded], row: int) -> list[str | None]:
    """The E values of one row; for the slow path and tests."""
    codes: list[Any] = [c.codes[row] for c in entities]
    return [None if k == MISSING else c.values[k] for c, k in zip(entities, codes, strict=True)]
