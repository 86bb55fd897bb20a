"""What the other entities of a transaction (merchant, terminal, device, network) have recently been through.

Per entity value there are exponentially decayed sums for several half-lives (transactions, amount, known fraud, known
honest), its habit, and the state of its run of known frauds. `ContextTable` is the definition, O(1) in memory and time
per entity, apart from the log that makes corrections exact; `context_columns` is a vectorised scan over a whole file
that equals it.

The habit is two more sums, count and amount, with a half-life of their own; it is read as the transaction's amount over
the mean amount so far (`amount_ratio`). The user may be one of the entities.

Order: a transaction reads before it adds itself. A label takes effect before the first transaction in arrival order
whose time is at or after `known_at`; its increment carries the transaction's time. A transaction without a fraud
label counts as known honest one label delay after its time.

The run of known frauds, folded over label effects in the order in which they take effect: a fraud begins a new run if
it is the first, or if an honest transaction newer than the last known fraud is known; else it lengthens the run. Where
a label is corrected, the earlier one is taken out of the fold and the new one appended. A run whose last known fraud is
older than `run_memory` reads as no run at all, and a last known honest transaction as old as none: or the longer a service
runs, the more entities had a fraud once, and the less what is read is what the model was trained on.

Where the user is an entity, a transaction has two ratios to its user's habit: of its amount, and of the mean amount of
late, by the shortest half-life and itself counted. A run has the least of each over its frauds: whether one of them was
ordinary for its user, and whether one came when its user was spending as usual. A transaction's ratios are fixed when it
adds itself, and go with its label; the label that corrects another has those of the one that it takes out.

Letters: N rows, E context columns, L half-lives, S numbers read per column, K = E * S.
"""

import heapq
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.config import CONTEXT_INPUTS, DAY_MS, HABIT_HALF_LIFE, Config, ContextInput
from seqfraud.cut import Cut
from seqfraud.schema import Schema
from seqfraud.table import MISSING, Coded, RowNumbers, by_code, row_type

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

NEVER = -(2**62)
"""A time before every time; differences with real times do not overflow int64."""

FOREVER = 2**62
"""A duration that no age exceeds."""

NO_ENTITY = 0
"""Row of the table that stands for a missing value: reads as an entity that was never seen, never changes."""

COUNT, AMOUNT, FRAUD, HONEST = range(4)
BEGAN, LENGTH, LAST_FRAUD, LAST_HONEST, LEAST = range(5)
NO_RUN = (NEVER, 0, NEVER, NEVER, 0)
UNKNOWN_AGE = -1.0

UNKNOWN_RATIO = -1.0
MOST_RATIO = 10_000.0
LEAST_COUNT = 1e-9
"""An entity whose decayed count is less has no habit left."""
LEAST_MEAN = 1e-6
"""A smaller mean amount is no habit: refunds may leave nothing but what rounding makes of it."""
ORDINARY = 1 << 16
"""The ratio 1 as it is kept with transactions, labels and runs: a whole number, which the order of adding cannot change."""
_OWN = (1 << 31) - 1
USUAL = ORDINARY << 31 | ORDINARY
"""Two ratios are kept in one number, that of late in the upper bits: both 1, which stands for unknown ones too."""


@dataclass(frozen=True)
class ContextSpec:
    """What is kept and read per entity; part of the manifest."""

    columns: tuple[str, ...]
    half_lives: tuple[int, ...]
    """Milliseconds."""
    label_delay: int
    """Milliseconds."""
    habit_half_life: int = HABIT_HALF_LIFE
    """Milliseconds."""
    user: int | None = None
    """Which of the columns is the user; None: none is."""
    inputs: tuple[ContextInput, ...] = CONTEXT_INPUTS
    """What is read of all that is kept, in this order."""
    user_inputs: tuple[ContextInput, ...] = CONTEXT_INPUTS
    """The same of the user's column."""
    run_memory: int = FOREVER
    """Milliseconds after its transaction for which the last known fraud, or the last known honest one, is remembered."""

    @property
    def width(self) -> int:
        """K."""
        return len(self.names())

    def names(self) -> list[str]:
        """The K names of what is read, in order."""
        return [
            f"{name}.{number}"
            for column, name in enumerate(self.columns)
            for kind in self._names(column).values()
            for number in kind
        ]

    def _names(self, column: int) -> dict[ContextInput, list[str]]:
        """The S names of one column by kind, in order."""
        names: dict[ContextInput, list[str]] = {
            kind: [f"{kind}_{half_life / DAY_MS:g}d" for half_life in self.half_lives] for kind in CONTEXT_INPUTS
        }
        names["ratio"] = ["amount_ratio"]
        names["run"] = ["run_age_d", "run_length", "since_fraud_d", "since_honest_d"]
        if self.user is not None:
            names["run"] += ["run_least_ratio", "run_least_lately"]
        return {kind: names[kind] for kind in (self.user_inputs if column == self.user else self.inputs)}

    def numbers_of(self, column: int) -> slice:
        """Where the S numbers of a column are among the K."""
        ends = np.cumsum([0, *(sum(map(len, self._names(c).values())) for c in range(len(self.columns)))]).tolist()
        return slice(ends[column], ends[column + 1])

    def places(self, column: int) -> dict[ContextInput, slice]:
        """Where the numbers of each kind that is read are among the S of a column."""
        names = self._names(column)
        ends = np.cumsum([len(numbers) for numbers in names.values()]).tolist()
        return {kind: slice(*ends) for kind, ends in zip(names, pairwise([0, *ends]), strict=True)}


def context_spec(config: Config, schema: Schema) -> ContextSpec:
    """The context that a configuration asks for."""
    features = config.features
    return ContextSpec(
        schema.entities,
        tuple(map(int, features.half_lives)),
        int(config.data.label_delay),
        int(features.habit_half_life),
        schema.user_entity,
        tuple(kind for kind in CONTEXT_INPUTS if kind in features.context_inputs),
        tuple(kind for kind in CONTEXT_INPUTS if kind in features.user_inputs),
        int(config.data.label_delay + features.run_memory),
    )


def amount_ratio(amount: float, count: float, total: float) -> float:
    """An amount over the mean of an entity's habit, decayed count and amount; 0 to MOST_RATIO, or UNKNOWN_RATIO."""
    if count < LEAST_COUNT or total < LEAST_MEAN * count:
        return UNKNOWN_RATIO
    return min(max(amount * count / total, 0.0), MOST_RATIO)


def _amount_ratios(amount: Float64, count: Float64, total: Float64) -> Float64:
    """float64 [n]: `amount_ratio` of n transactions."""
    known = (count >= LEAST_COUNT) & (total >= LEAST_MEAN * count)
    ratio = np.full(len(amount), UNKNOWN_RATIO)
    ratio[known] = np.clip(amount[known] * count[known] / total[known], 0.0, MOST_RATIO)
    return ratio


def fixed_ratios(ratio: float, lately: float) -> int:
    """Both ratios as they are kept, in units of 1 / ORDINARY; one that is unknown is ordinary."""
    own, late = (ORDINARY if r == UNKNOWN_RATIO else round(r * ORDINARY) for r in (ratio, lately))
    return late << 31 | own


def _fixed(ratio: Float64, lately: Float64) -> Int64:
    """int64 [n]: `fixed_ratios` of n transactions."""
    own, late = (np.rint(np.where(r == UNKNOWN_RATIO, 1.0, r) * ORDINARY).astype(np.int64) for r in (ratio, lately))
    fixed: Int64 = late << 31 | own
    return fixed


def _lesser(a: int, b: int) -> int:
    """The lesser of each of two ratios."""
    return min(a >> 31, b >> 31) << 31 | min(a & _OWN, b & _OWN)


def fold_fraud(run: list[int], time: int, ratios: int) -> None:
    """One known fraud of transaction time `time` on a run state [began, length, last fraud, last honest, least ratios]."""
    if run[LENGTH] == 0 or run[LAST_HONEST] > run[LAST_FRAUD]:
        run[BEGAN], run[LENGTH], run[LEAST] = time, 1, ratios
    else:
        run[BEGAN], run[LENGTH], run[LEAST] = min(run[BEGAN], time), run[LENGTH] + 1, _lesser(run[LEAST], ratios)
    run[LAST_FRAUD] = max(run[LAST_FRAUD], time)


class ContextTable:
    """Live context of every entity value.

    Rows are entities; row 0 is "no entity". Attributes:
        newest: int64 [rows], time of the newest transaction of the entity.
        sums: float64 [rows, 4, L + 1], decayed to `newest`; the last half-life is the habit's.
        run: int64 [rows, 5], state of the run of known frauds.
    """

    def __init__(self, spec: ContextSpec, capacity: int = 1024) -> None:
        self.spec = spec
        half_lives = (*spec.half_lives, spec.habit_half_life)
        self._rate = np.tile(-1.0 / np.array(half_lives, dtype=np.float64), (4, 1))
        """float64 [4, L + 1], the same for each kind of sum: NumPy is quickest where shapes are equal."""
        self._gain = np.zeros_like(self._rate)
        self._gain[COUNT] = 1.0
        """float64 [4, L + 1]: what the transaction at hand adds; only its amount changes."""
        self._shortest = int(np.argmin(spec.half_lives))
        self._width = spec.width
        self._reading = [self._read_of(column) for column in range(len(spec.columns))]
        self.rows: dict[tuple[int, str], int] = {}
        self.newest: Int64 = np.full(capacity, NEVER, dtype=np.int64)
        self.sums: Float64 = np.zeros((capacity, *self._rate.shape))
        self.run: Int64 = np.empty((capacity, len(NO_RUN)), dtype=np.int64)
        self.run[:] = NO_RUN
        self.effects: list[array[int]] = [array("q")]
        """Per row, label effects in order, only ever added to, two numbers each: 4 * time + 2 * (correction) + fraud, and
        the ratios of its transaction; 0 for a correction, which takes them from the earlier one."""
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
        run = np.empty((more, len(NO_RUN)), dtype=np.int64)
        run[:] = NO_RUN
        self.run = np.concatenate([self.run, run])

    def read(self, rows: Int64, time: int, amount: float) -> Float64:
        """float64 [K]: what a transaction at `time` (ms) reads of its E entities, before it adds itself.

        Args:
            amount: of the transaction, 0 where it is missing.
        """
        out = np.empty(self._width)
        for (begin, picked, ratio_at, run_at, end), row in zip(self._reading, rows.tolist(), strict=True):
            newest = self.newest.item(row)
            now = max(newest, time)
            sums = self.sums[row] * np.exp2(self._rate * float(now - newest))
            out[begin:run_at] = sums.take(picked)
            if ratio_at is not None:
                out[ratio_at] = amount_ratio(amount, sums.item(COUNT, -1), sums.item(AMOUNT, -1))
            if run_at < end:
                out[run_at:end] = run_read(self.run[row].tolist(), now, self.spec.run_memory)[: end - run_at]
        return out

    def _read_of(self, column: int) -> tuple[int, Int64, int | None, int, int]:
        """Where a column's numbers begin, which sums they are (that of the ratio stands for its place), where the ratio and
        the run are, and where they end."""
        places, at = self.spec.places(column), self.spec.numbers_of(column)
        sums = np.arange(self._rate.size).reshape(self._rate.shape)[:, :-1]
        of = {"count": sums[COUNT], "amount": sums[AMOUNT], "ratio": [0], "fraud": sums[FRAUD], "honest": sums[HONEST]}
        picked = np.concatenate([[], *(of[kind] for kind in places if kind != "run")]).astype(np.int64)
        ratio = at.start + places["ratio"].start if "ratio" in places else None
        return at.start, picked, ratio, at.start + len(picked), at.stop

    def add_transaction(self, rows: Int64, time: int, amount: float) -> int:
        """Count a transaction for its entities; one older than an entity's newest is added already decayed.

        Returns:
            Its ratios to its user's habit before it, for its labels, as `fixed_ratios`; USUAL where the user is no
            entity.
        """
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        gain = self._gain
        gain[AMOUNT] = amount
        ratios = USUAL
        for column, row in enumerate(rows.tolist()):
            if row == NO_ENTITY:
                continue
            newest = self.newest.item(row)
            sums = self.sums[row]
            if time >= newest:
                sums *= np.exp2(self._rate * float(time - newest))
                self.newest[row] = time
            if column == self.spec.user:
                habit = sums.item(COUNT, -1), sums.item(AMOUNT, -1)
                count, total = sums.item(COUNT, self._shortest) + 1, sums.item(AMOUNT, self._shortest) + amount
                ratios = fixed_ratios(amount_ratio(amount, *habit), amount_ratio(total / count, *habit))
            if time >= newest:
                sums += gain
            else:
                sums += gain * np.exp2(self._rate * float(newest - time))
        return ratios

    def add_label(self, rows: Int64, time: int, fraud: bool, ratios: int) -> None:
        """A label of a transaction of that time takes effect; `ratios` is what `add_transaction` gave for it."""
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        for row in rows.tolist():
            if row != NO_ENTITY:
                self.sums[row, FRAUD if fraud else HONEST] += self._known(row, time)
                self._fold(row, time, fraud, ratios)
                self.effects[row].extend((4 * time + fraud, ratios))

    def correct_label(self, rows: Int64, time: int, fraud: bool) -> None:
        """The label of a transaction of that time, in effect so far, turns out to be the other one.

        Of several labels of an entity that are alike in time and value, the one that took effect last is taken out; its
        ratios become those of the new one.
        """
        if self.cut is not None:
            self.cut.keep(rows.tolist())
        for row in rows.tolist():
            if row != NO_ENTITY:
                known = self._known(row, time)
                self.sums[row, HONEST if fraud else FRAUD] -= known
                self.sums[row, FRAUD if fraud else HONEST] += known
                self.effects[row].extend((4 * time + 2 + fraud, 0))
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
        """Arrays of the next rows of the cut, at most `count`; `effects` has the lengths of `ContextTable.effects`."""
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
        """Parts of `effects` of some rows, joined: (row, begin, end) each. Those of a cut do not change after it."""
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
        """The label effects of all rows, joined, and the length of each row's [rows]."""
        ends = np.cumsum(lengths).tolist()
        self.effects = [effects[begin:end] for begin, end in pairwise([0, *ends])]

    def _known(self, row: int, time: int) -> Float64:
        """float64 [L + 1]: what one known transaction of that time is by the entity's newest time."""
        known: Float64 = np.exp2(self._rate[0] * float(self.newest.item(row) - time))
        return known

    def _fold(self, row: int, time: int, fraud: bool, ratios: int) -> None:
        if fraud:
            run = self.run[row].tolist()
            fold_fraud(run, time, ratios)
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
    """How long the list of each one's label effects is."""


def run_read(run: list[int], now: int, memory: int) -> tuple[float, int, float, float, float, float]:
    """Age of the run (days), its length, days since the last known fraud and honest transaction, least ratios; or -1.

    What is older than `memory` (ms) is as if it had never been. Days, because labels come late: on the logarithmic scale of
    the model a month is then wide enough to be told from five weeks, which it is not in seconds.
    """
    began, length, fraud, honest, least = run
    since = UNKNOWN_AGE if honest == NEVER or now - honest > memory else (now - honest) / DAY_MS
    if length == 0 or now - fraud > memory:
        return UNKNOWN_AGE, 0, UNKNOWN_AGE, since, UNKNOWN_RATIO, UNKNOWN_RATIO
    return (
        (now - began) / DAY_MS,
        length,
        (now - fraud) / DAY_MS,
        since,
        (least & _OWN) / ORDINARY,
        (least >> 31) / ORDINARY,
    )


def run_numbers(run: Int64, now: Int64, memory: int) -> Float64:
    """float64 [N, 6]: `run_read` of N states."""
    out = np.full((len(run), 6), (UNKNOWN_AGE, 0, UNKNOWN_AGE, UNKNOWN_AGE, UNKNOWN_RATIO, UNKNOWN_RATIO))
    known = np.flatnonzero((run[:, LENGTH] > 0) & (now - run[:, LAST_FRAUD] <= memory))
    began, length, fraud, _, least = run[known].T
    out[known, 0] = (now[known] - began) / DAY_MS
    out[known, 1] = length
    out[known, 2] = (now[known] - fraud) / DAY_MS
    out[known, 4] = (least & _OWN) / ORDINARY
    out[known, 5] = (least >> 31) / ORDINARY
    honest = np.flatnonzero((run[:, LAST_HONEST] != NEVER) & (now - run[:, LAST_HONEST] <= memory))
    out[honest, 3] = (now[honest] - run[honest, LAST_HONEST]) / DAY_MS
    return out


def last_run(effects: Int64) -> Int64:
    """int64 [5]: the run state after folding the effects [2 n] of one entity in order, corrections taken out.

    Args:
        effects: as in `ContextTable.effects`.
    """
    what, ratios = effects[0::2], effects[1::2].copy()
    time, fraud = what >> 2, (what & 1).astype(bool)
    kept = _take_out(time, fraud, (what & 2).astype(bool), ratios)
    time, fraud, ratios = time[kept], fraud[kept], ratios[kept]
    last_honest = time[~fraud].max(initial=NEVER)
    at = np.flatnonzero(fraud)
    if len(at) == 0:
        return np.array([NEVER, 0, NEVER, last_honest, 0], dtype=np.int64)
    last_fraud = np.maximum.accumulate(time[at])
    honest = np.maximum.accumulate(np.where(fraud, NEVER, time))[at]
    begins = np.flatnonzero(honest[1:] > last_fraud[:-1]) + 1
    run = at[begins[-1] :] if len(begins) else at
    least = (ratios[run] >> 31).min() << 31 | (ratios[run] & _OWN).min()
    return np.array([time[run].min(), len(run), last_fraud[-1], last_honest, least], dtype=np.int64)


def _take_out(time: Int64, fraud: Mask, correction: Mask, ratios: Int64) -> Mask:
    """Mask [n] of the effects that no correction has taken out; each correction gets the ratios of what it takes out."""
    kept = np.ones(len(time), dtype=bool)
    if not correction.any():
        return kept
    alike: dict[tuple[int, bool], list[int]] = {}
    for at in np.flatnonzero(np.isin(time, time[correction])).tolist():
        moment, is_fraud = int(time[at]), bool(fraud[at])
        if correction[at]:
            out = alike[moment, not is_fraud].pop()
            kept[out], ratios[at] = False, ratios[out]
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
    weight = np.zeros(len(time)) if amount is None else np.nan_to_num(amount)
    effects = _label_effects(time, label, known_at, spec.label_delay)
    ratios = np.full(len(time), USUAL)
    if spec.user is not None and any("run" in spec.places(column) for column in range(len(entities))):
        rows = _by_entity(entities[spec.user].codes, time)
        ratios[rows.order] = _user_ratios(rows, weight, spec)
    for column, coded in enumerate(entities):
        _fill_column(out[:, spec.numbers_of(column)], spec, column, coded, time, weight, effects, ratios, place)


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
    column: int,
    coded: Coded,
    time: Int64,
    amount: Float64,
    effects: _Effects,
    ratios: Int64,
    place: RowNumbers | None,
) -> None:
    """Fill `out` [N, S] for a context column, block by block of its sorted rows; `ratios` [N] as they go with labels."""
    places = spec.places(column)
    absent = np.flatnonzero(coded.codes == MISSING)
    nothing = np.zeros(out.shape[1])
    if "ratio" in places:
        nothing[places["ratio"]] = UNKNOWN_RATIO
    if "run" in places:
        nothing[places["run"]] = run_read(list(NO_RUN), 0, FOREVER)[: len(nothing) - places["run"].start]
    out[absent if place is None else place[absent]] = nothing
    rows = _by_entity(coded.codes, time)
    told = _told_effects(rows, coded.codes, effects)
    runs = _runs_told(rows, told, ratios[rows.order]) if "run" in places else None
    habit = _habit_ratios(rows, amount, spec.habit_half_life) if "ratio" in places else None

    rate = -1.0 / np.array(spec.half_lives, dtype=np.float64)
    for low, high, sums in _sums(rows, amount, rate, told):
        block = np.empty((sums.shape[-1], STEPS, len(nothing)), dtype=out.dtype)
        for kind, name in ((COUNT, "count"), (AMOUNT, "amount"), (FRAUD, "fraud"), (HONEST, "honest")):
            if name in places:
                block[:, :, places[name]] = sums[:, kind].transpose(2, 0, 1)
        flat = block.reshape(-1, len(nothing))[: high - low]
        if habit is not None:
            flat[:, places["ratio"]] = habit[low:high, None]
        if runs is not None:
            numbers = run_numbers(runs.read(rows, low, high), rows.time[low:high], spec.run_memory)
            flat[:, places["run"]] = numbers[:, : len(nothing) - places["run"].start]
        at = rows.order[low:high]
        out[at if place is None else place[at]] = flat


def _habit_ratios(rows: _Rows, amount: Float64, half_life: int) -> Float64:
    """float64 [n]: `amount_ratio` of every row, its amount among `amount` [N]."""
    out = np.empty(len(rows.order))
    for low, high, sums in _sums(rows, amount, np.array([-1.0 / half_life])):
        count, total = (sums[:, kind, 0].T.reshape(-1)[: high - low] for kind in (COUNT, AMOUNT))
        out[low:high] = _amount_ratios(amount[rows.order[low:high]], count, total)
    return out


def _user_ratios(rows: _Rows, amount: Float64, spec: ContextSpec) -> Int64:
    """int64 [n]: the ratios of every row of the user's column, as they go with labels; `amount` [N]."""
    out = np.empty(len(rows.order), dtype=np.int64)
    for low, high, sums in _sums(
        rows, amount, -1.0 / np.array((spec.habit_half_life, min(spec.half_lives)), dtype=np.float64)
    ):
        count, total, few, late = (
            sums[:, kind, i].T.reshape(-1)[: high - low] for i in (0, 1) for kind in (COUNT, AMOUNT)
        )
        own = amount[rows.order[low:high]]
        out[low:high] = _fixed(
            _amount_ratios(own, count, total), _amount_ratios((late + own) / (few + 1), count, total)
        )
    return out


def _sums(
    rows: _Rows, amount: Float64, rate: Float64, told: "_Told | None" = None
) -> Iterator[tuple[int, int, Float64]]:
    """The decayed sums that rows low to high read, float64 [STEPS, 4, L, lanes], row by row along the lanes.

    Args:
        amount: float64 [N].
        rate: float64 [L], -1 / half-life.
        told: None: only count and amount, [STEPS, 2, L, lanes].
    """
    kinds, n = 2 if told is None else 4, len(rows.order)
    state = np.zeros((kinds, len(rate)))
    for low in range(0, n, STEPS * LANES):
        high = min(low + STEPS * LANES, n)
        lanes = -(-(high - low) // STEPS)
        before = np.arange(low - 1, high - 1)
        # after an endless gap nothing is left of the entity before
        gap = np.where(rows.begin[low:high] > before, np.inf, rows.time[low:high] - rows.time[before])
        decay = np.exp2(_in_lanes(gap, lanes)[:, None, :] * rate[:, None])
        gain = np.empty((STEPS, kinds, len(rate), lanes))
        # what a row adds after reading has decayed once when the next row reads
        gain[:, COUNT] = decay
        gain[:, AMOUNT] = decay * _in_lanes(amount[rows.order[before]], lanes)[:, None, :]
        if told is not None:
            gain[:, FRAUD:] = told.gains(low, high, lanes, rows.time, rate)
        state = _decayed_sums(decay, gain, state)
        yield low, high, gain


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
        gain: float64 [STEPS, kinds, L, lanes].
        state: float64 [kinds, L], the sums before the first row.
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
        states: int64 [q + 1, 5], the state from there on, its last honest only of those that are corrected later.
        entity: int32 [q + 1], whose state it is. The last items stand for "nothing heard yet".
    """

    heard: RowNumbers
    honest: RowNumbers
    changed: RowNumbers
    states: Int64
    entity: npt.NDArray[np.int32]

    def read(self, rows: _Rows, low: int, high: int) -> Int64:
        """int64 [high - low, 5]: the state that each row reads."""
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


def _runs_told(rows: _Rows, told: _Told, ratios: Int64) -> _Runs:
    """The fold of `fold_fraud` over the effects of every entity; entities without corrections all at once.

    Args:
        ratios: int64 [n], of the rows, as they go with labels.
    """
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
    run: Int64 = np.cumsum(begins)
    length = np.arange(len(at)) - np.flatnonzero(begins)[run - 1] + 1
    oldest = _least_in_run(run, fraud, n)
    own, late = (
        _least_in_run(run, r, int(MOST_RATIO) * ORDINARY + 1) for r in (ratios[fraud] & _OWN, ratios[fraud] >> 31)
    )
    plain = np.stack([rows.time[oldest], length, rows.time[newest], np.full(len(at), NEVER), late << 31 | own], axis=1)

    told_again = np.flatnonzero(revised & ~for_good)
    folded = _folded_with_corrections(rows, told, told_again, honest, ratios)
    changes = np.r_[at, told_again]
    order = np.argsort(changes, kind="stable")
    changes = changes[order]
    return _Runs(
        heard=told.heard,
        honest=honest,
        changed=told.heard[changes],
        states=np.concatenate([np.concatenate([plain, folded])[order], np.array([NO_RUN])]),
        entity=np.append(entity[changes], np.int32(MISSING)),
    )


def _least_in_run(run: Int64, values: npt.NDArray[Any], bound: int) -> Int64:
    """int64 [n]: a running minimum that starts anew with each run (ascending numbers [n]); 0 <= values [n] < bound."""
    least: Int64 = run * bound - np.maximum.accumulate(run * bound - values)
    return least


def _at_risk(rows: _Rows, told: _Told) -> Mask:
    """Mask [m] of the honest effects that a correction may take out: those of a corrected row's entity and time."""
    if not told.correction.any():
        return np.zeros(len(told.heard), dtype=bool)
    moment = np.cumsum((np.diff(rows.time, prepend=0) != 0) | (rows.begin == np.arange(len(rows.time))))
    return ~told.fraud & np.isin(moment[told.speaker], moment[told.speaker[told.correction]])


def _folded_with_corrections(rows: _Rows, told: _Told, which: Int64, honest: RowNumbers, ratios: Int64) -> Int64:
    """int64 [k, 5]: the states after the effects `which` of entities with corrections; `honest` as in `_Runs`."""
    speaker, newest = told.speaker[which], honest[which]
    begin = rows.begin[speaker]
    for_good = np.where(newest >= begin, rows.time[newest], NEVER)
    states = []
    entity, fold = -1, _RevisedFold()
    columns = (begin, rows.time[speaker], told.fraud[which], told.correction[which], for_good, ratios[speaker])
    for first, time, fraud, correction, known, own in zip(*(c.tolist() for c in columns), strict=True):
        if first != entity:
            entity, fold = first, _RevisedFold()
        told_ratios = fold.take_out(time) if correction else own
        if fraud:
            fold.add_fraud(time, known, told_ratios)
        else:
            fold.add_honest(time, told_ratios)
        states.append(fold.state())
    return np.array(states, dtype=np.int64).reshape(-1, len(NO_RUN))


class _RevisedFold:
    """The fold over the effects of one entity where honest transactions turn out to be frauds.

    A fraud began a run because an honest transaction newer than the last known fraud was known. Where all such honest
    ones have been taken out, the run is one with the run before. Honest transactions that are never corrected are not
    kept here: the newest of them is an argument.
    """

    def __init__(self) -> None:
        self._runs: list[list[int]] = []
        """[began, length, least ratios, last fraud before it, number of the effect that began it]; the first one stays a
        run."""
        self._honest: dict[int, list[tuple[int, int]]] = {}
        """Time -> number and ratios of the effects in force, ascending."""
        self._newest: list[int] = []
        """Heap of negative times of `_honest`, some of them gone."""
        self._last_fraud = NEVER
        self._number = 0

    def add_honest(self, time: int, ratios: int) -> None:
        self._number += 1
        if time not in self._honest:
            self._honest[time] = []
            heapq.heappush(self._newest, -time)
        self._honest[time].append((self._number, ratios))

    def take_out(self, time: int) -> int:
        """Of several honest effects of one time the last is taken out; its ratios."""
        alike = self._honest[time]
        _, ratios = alike.pop()
        if not alike:
            del self._honest[time]
        while len(self._runs) > 1 and not self._stands(*self._runs[-1][3:]):
            self._lengthen(*self._runs.pop()[:3])
        return ratios

    def _stands(self, last_fraud: int, number: int) -> bool:
        return any(time > last_fraud and alike[0][0] < number for time, alike in self._honest.items())

    def add_fraud(self, time: int, newest_for_good: int, ratios: int) -> None:
        self._number += 1
        if not self._runs or newest_for_good > self._last_fraud:
            self._runs = [[time, 1, ratios, NEVER, 0]]
        elif self._newest_honest() > self._last_fraud:
            self._runs.append([time, 1, ratios, self._last_fraud, self._number])
        else:
            self._lengthen(time, 1, ratios)
        self._last_fraud = max(self._last_fraud, time)

    def _lengthen(self, began: int, length: int, least: int) -> None:
        run = self._runs[-1]
        run[:3] = min(run[0], began), run[1] + length, _lesser(run[2], least)

    def _newest_honest(self) -> int:
        while self._newest and -self._newest[0] not in self._honest:
            heapq.heappop(self._newest)
        return -self._newest[0] if self._newest else NEVER

    def state(self) -> tuple[int, int, int, int, int]:
        """Began, length, last fraud, last honest, least ratios."""
        began, length, least = self._runs[-1][:3] if self._runs else (NEVER, 0, 0)
        return began, length, self._last_fraud, self._newest_honest(), least


def as_rows(entities: Sequence[Coded], row: int) -> list[str | None]:
    """The E values of one row; for the slow path and tests."""
    codes: list[Any] = [c.codes[row] for c in entities]
    return [None if k == MISSING else c.values[k] for c, k in zip(entities, codes, strict=True)]
