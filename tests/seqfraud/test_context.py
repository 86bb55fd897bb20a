"""The context, online (`ContextTable`) and offline (`context_columns`), against a slow reference that forgets nothing.

The reference keeps every increment of every entity and recomputes every number from all of them, in plain floats.
"""

import heapq
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud import context as context_module
from seqfraud.config import CONTEXT_INPUTS, ContextInput, parse_config
from seqfraud.context import (
    FOREVER,
    NO_ENTITY,
    USUAL,
    ContextSpec,
    ContextTable,
    as_rows,
    context_columns,
    context_spec,
    fixed_ratios,
    last_run,
)
from seqfraud.schema import schema_of
from seqfraud.table import MISSING, Coded, row_type

HOUR = 3_600_000
DAY = 24 * HOUR
UNKNOWN, HONEST, FRAUD = -1, 0, 1

Values = Sequence[str | None]
Ratios = tuple[float, float]
"""Of a transaction to its user's habit: of its amount, and of the mean amount of late."""


@dataclass
class Entity:
    """Everything that ever happened to one entity."""

    transactions: list[tuple[int, float]] = field(default_factory=list)
    """Time and amount."""
    labels: list[tuple[int, bool, Ratios]] = field(default_factory=list)
    """The labels in effect, in the order in which they took effect: transaction time, fraud, ratios to the habit."""


class SlowContext:
    """The definition, word by word."""

    def __init__(self, spec: ContextSpec) -> None:
        self.spec = spec
        self.entities: dict[tuple[int, str], Entity] = {}

    def rows_of(self, values: Values) -> Values:
        return values

    def read(self, values: Values, time: int, amount: float) -> list[float]:
        numbers: list[float] = []
        for column, value in enumerate(values):
            entity = Entity() if value is None else self.entities.get((column, value), Entity())
            numbers += self.numbers(entity, time, amount)
        return numbers

    def ratio(self, entity: Entity, time: int, amount: float) -> float:
        count, total = self.decayed(entity, time, self.spec.habit_half_life)
        if count < 1e-9 or total / count < 1e-6:
            return -1.0
        return min(max(amount / (total / count), 0.0), 10_000.0)

    @staticmethod
    def decayed(entity: Entity, time: int, half_life: int) -> tuple[float, float]:
        now = max([time, *(at for at, _ in entity.transactions)])
        weights = [2.0 ** (-(now - at) / half_life) for at, _ in entity.transactions]
        return math.fsum(weights), math.fsum(
            w * before for w, (_, before) in zip(weights, entity.transactions, strict=True)
        )

    def numbers(self, entity: Entity, time: int, amount: float) -> list[float]:
        now = max([time, *(at for at, _ in entity.transactions)])
        increments = (
            [(at, 1.0) for at, _ in entity.transactions],
            entity.transactions,
            [(at, 1.0) for at, fraud, _ in entity.labels if fraud],
            [(at, 1.0) for at, fraud, _ in entity.labels if not fraud],
        )
        count, total, known_fraud, known_honest = (
            [
                math.fsum(gain * 2.0 ** (-(now - at) / half_life) for at, gain in kind)
                for half_life in self.spec.half_lives
            ]
            for kind in increments
        )
        run, last_fraud, last_honest = run_of(entity.labels)
        began = min((at for at, _ in run), default=None)
        least = [min((ratios[i] for _, ratios in run), default=-1.0) for i in (0, 1)]
        if last_fraud is not None and now - last_fraud > self.spec.run_memory:
            run, began, last_fraud, least = [], None, None, [-1.0, -1.0]
        if last_honest is not None and now - last_honest > self.spec.run_memory:
            last_honest = None
        ages = [-1.0 if at is None else (now - at) / DAY for at in (began, last_fraud, last_honest)]
        numbers = [*count, *total, self.ratio(entity, time, amount), *known_fraud, *known_honest]
        return [*numbers, ages[0], float(len(run)), ages[1], ages[2], *([] if self.spec.user is None else least)]

    def add_transaction(self, values: Values, time: int, amount: float) -> Ratios:
        ratios = [-1.0, -1.0]
        if self.spec.user is not None and (user := values[self.spec.user]) is not None:
            entity = self.entities.get((self.spec.user, user), Entity())
            count, total = self.decayed(entity, time, min(self.spec.half_lives))
            lately = (total + amount) / (count + 1)
            ratios = [self.ratio(entity, time, of) for of in (amount, lately)]
        for entity in self._of(values):
            entity.transactions.append((time, amount))
        own, late = (1.0 if ratio == -1.0 else round(ratio * 65_536) / 65_536 for ratio in ratios)
        return own, late

    def add_label(self, values: Values, time: int, fraud: bool, ratios: Ratios) -> None:
        for entity in self._of(values):
            entity.labels.append((time, fraud, ratios))

    def correct_label(self, values: Values, time: int, fraud: bool) -> None:
        for entity in self._of(values):
            alike = [i for i, label in enumerate(entity.labels) if label[:2] == (time, not fraud)]
            _, _, ratios = entity.labels.pop(alike[-1])
            entity.labels.append((time, fraud, ratios))

    def _of(self, values: Values) -> Iterator[Entity]:
        for column, value in enumerate(values):
            if value is not None:
                yield self.entities.setdefault((column, value), Entity())


def run_of(labels: Sequence[tuple[int, bool, Ratios]]) -> tuple[list[tuple[int, Ratios]], int | None, int | None]:
    """Times and ratios of the frauds of the last run; times of the last known fraud and the last known honest one."""
    run: list[tuple[int, Ratios]] = []
    frauds: list[int] = []
    honest: list[int] = []
    for time, fraud, ratios in labels:
        if not fraud:
            honest.append(time)
            continue
        begins = not frauds or (bool(honest) and max(honest) > max(frauds))
        run = [(time, ratios)] if begins else [*run, (time, ratios)]
        frauds.append(time)
    return run, max(frauds, default=None), max(honest, default=None)


@dataclass(frozen=True)
class Row:
    """One transaction of a file."""

    values: tuple[str | None, ...]
    time: int
    amount: float = 0.0
    label: int = UNKNOWN
    known_at: int = 0


class AnyContext(Protocol):
    """What both `SlowContext` and `ContextTable` can do."""

    def rows_of(self, values: Values, /) -> Any: ...
    def read(self, rows: Any, time: int, amount: float, /) -> Any: ...
    def add_transaction(self, rows: Any, time: int, amount: float, /) -> Any: ...
    def add_label(self, rows: Any, time: int, fraud: bool, ratio: Any, /) -> None: ...
    def correct_label(self, rows: Any, time: int, fraud: bool, /) -> None: ...


def replay(context: AnyContext, rows: Sequence[Row], delay: int, with_known_at: bool) -> npt.NDArray[np.float64]:
    """What every row reads when rows arrive in order and each label takes effect as soon as it is known.

    A label before the first row at or after its moment, silence one delay after the transaction; a fraud that is known
    only after that corrects it.
    """
    pending: list[tuple[int, int, bool]] = []
    """When, whose (by arrival), fraud."""
    said_honest: set[int] = set()
    places: list[Any] = []
    ratios: list[Any] = []
    reads = []
    for arrival, row in enumerate(rows):
        while pending and pending[0][0] <= row.time:
            _, whose, fraud = heapq.heappop(pending)
            if whose in said_honest:
                context.correct_label(places[whose], rows[whose].time, fraud)
            else:
                context.add_label(places[whose], rows[whose].time, fraud, ratios[whose])
            if not fraud:
                said_honest.add(whose)
        places.append(context.rows_of(row.values))
        reads.append(np.array(context.read(places[-1], row.time, row.amount)))
        ratios.append(context.add_transaction(places[-1], row.time, row.amount))

        silence = row.time + delay
        known_at = row.known_at if with_known_at else silence
        if row.label != FRAUD:
            heapq.heappush(pending, (silence if row.label == UNKNOWN else min(known_at, silence), arrival, False))
        else:
            heapq.heappush(pending, (known_at, arrival, True))
            if known_at > silence:
                heapq.heappush(pending, (silence, arrival, False))
    return np.array(reads)


def coded(values: Sequence[str | None]) -> Coded:
    """A column of texts; its values hold one that no row has, as a part of a table may."""
    distinct = ["never seen", *sorted({v for v in values if v is not None})]
    codes = [MISSING if v is None else distinct.index(v) for v in values]
    return Coded(np.array(codes, dtype=np.int32), distinct)


def columns_of(rows: Sequence[Row], with_known_at: bool) -> dict[str, Any]:
    """The arguments of `context_columns` for some rows."""
    return {
        "entities": [coded(column) for column in zip(*(row.values for row in rows), strict=True)],
        "time": np.array([row.time for row in rows], dtype=np.int64),
        "amount": np.array([row.amount for row in rows]),
        "label": np.array([row.label for row in rows], dtype=np.int8),
        "known_at": np.array([row.known_at for row in rows], dtype=np.int64) if with_known_at else None,
    }


def in_float64(spec: ContextSpec, columns: dict[str, Any]) -> npt.NDArray[np.float64]:
    """`context_columns` before the cast to float32."""
    out = np.full((len(columns["time"]), spec.width), np.nan)
    context_module._fill_columns(out, spec, **columns)
    return out


def assert_same(got: npt.NDArray[np.float64], want: npt.NDArray[np.float64]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


SPEC = ContextSpec(("merchant", "device"), (5_000, 60_000), 20_000, habit_half_life=7_000, user=1)

amounts = st.sampled_from([0.0, 1.0, 99.99, -12.5, 1e4])
labels = st.sampled_from([UNKNOWN, HONEST, HONEST, FRAUD, FRAUD])
values = st.tuples(st.sampled_from(["a", "a", "b", None]), st.sampled_from(["a", "x", "y", None]))
"""The text "a" occurs in both columns: they are two entities."""


@st.composite
def files(draw: st.DrawFn) -> list[Row]:
    """Rows in arrival order: equal times, long gaps, and labels known from long before to long after the delay."""
    rows: list[Row] = []
    time = draw(st.sampled_from([0, -3_600_000, 1_600_000_000_000]))
    for _ in range(draw(st.integers(1, 40))):
        time += draw(st.sampled_from([0, 0, 0, 1_000, 5_000, 7_001, 20_000, 90_000_000]))
        known_at = time + draw(st.sampled_from([-9_000, 0, 1_000, 6_000, 12_001, 20_000, 20_001, 25_000, 60_000]))
        rows.append(Row(draw(values), time, draw(amounts), draw(labels), known_at))
    return rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 6 rows, so that short files have several, with several lanes each."""
    monkeypatch.setattr(context_module, "STEPS", 3)
    monkeypatch.setattr(context_module, "LANES", 2)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=250, deadline=None)
@given(
    rows=files(),
    delay=st.sampled_from([0, 1, 5_000, 20_000]),
    user=st.sampled_from([None, 0, 1]),
    memory=st.sampled_from([FOREVER, 5_000, 27_001]),
    with_known_at=st.booleans(),
)
def test_online_and_offline_equal_the_reference(
    rows: list[Row], delay: int, user: int | None, memory: int, with_known_at: bool
) -> None:
    spec = replace(SPEC, label_delay=delay, user=user, run_memory=memory)
    want = replay(SlowContext(spec), rows, delay, with_known_at)

    assert_same(replay(ContextTable(spec, capacity=2), rows, delay, with_known_at), want)

    columns = columns_of(rows, with_known_at)
    assert_same(in_float64(spec, columns), want)
    single = context_columns(spec, **columns)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, want, rtol=1e-6, atol=1e-11)


@dataclass(frozen=True)
class Step:
    """One act on a context: a transaction, or another word on an earlier transaction."""

    row: Row | None
    whose: int = 0
    fraud: bool = False


@st.composite
def acts(draw: st.DrawFn) -> list[Step]:
    """Transactions at any time, many of them late, and labels that go back and forth."""
    steps: list[Step] = []
    count = 0
    for _ in range(draw(st.integers(1, 40))):
        if count and draw(st.booleans()):
            steps.append(Step(None, draw(st.integers(0, count - 1)), draw(st.booleans())))
        else:
            time = 1_600_000_000_000 + 1_000 * draw(st.integers(-30, 30))
            steps.append(Step(Row(draw(values), time, draw(amounts))))
            count += 1
    return steps


@settings(max_examples=250, deadline=None)
@given(steps=acts())
def test_online_takes_late_transactions_and_corrections_in_any_order(steps: list[Step]) -> None:
    slow, table = SlowContext(SPEC), ContextTable(SPEC)
    both: tuple[AnyContext, AnyContext] = (slow, table)
    seen: list[Row] = []
    ratios: list[tuple[Any, Any]] = []
    said: dict[int, bool] = {}
    for step in steps:
        if step.row is not None:
            row, rows = step.row, table.rows_of(step.row.values)
            assert_same(table.read(rows, row.time, row.amount), np.array(slow.read(row.values, row.time, row.amount)))
            ratios.append(tuple(each.add_transaction(each.rows_of(row.values), row.time, row.amount) for each in both))
            seen.append(row)
        elif said.get(step.whose) != step.fraud:
            row = seen[step.whose]
            for context, ratio in zip(both, ratios[step.whose], strict=True):
                if step.whose in said:
                    context.correct_label(context.rows_of(row.values), row.time, step.fraud)
                else:
                    context.add_label(context.rows_of(row.values), row.time, step.fraud, ratio)
            said[step.whose] = step.fraud
        for row in seen[-3:]:
            read = table.read(table.rows_of(row.values), row.time, row.amount)
            assert_same(read, np.array(slow.read(row.values, row.time, row.amount)))


def crowded(seed: int, rows: int) -> list[Row]:
    """One device with most rows, a country column with three values, a merchant column with many."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, 120 * DAY, rows)) // 1000 * 1000
    devices = ["most" if x < 0.8 else f"d{int(x * 1e4)}" for x in rng.random(rows)]
    countries = rng.choice(["at", "ch", "de"], rows)
    merchants = rng.integers(0, 300, rows)
    fraud = (rng.random(rows) < 0.1) | (merchants < 6)
    known_after = rng.choice([0, 1, 3, 7, 10, 40], rows) * DAY
    return [
        Row(
            (device, str(country), f"m{merchant}" if merchant % 7 else None),
            int(time),
            float(amount),
            int(label),
            int(time + after),
        )
        for device, country, merchant, time, amount, label, after in zip(
            devices, countries, merchants, times, rng.exponential(50, rows).round(2), fraud, known_after, strict=True
        )
    ]


CROWD = ContextSpec(("device", "country", "merchant"), (HOUR, 7 * DAY), 7 * DAY, user=2)


@pytest.mark.parametrize("with_known_at", [False, True])
def test_few_entities_with_many_rows(with_known_at: bool) -> None:
    """More rows than a block of the scan has, most of them of one entity; every kind of correction among them."""
    rows = crowded(seed=1, rows=18_000)
    assert len(rows) > context_module.STEPS * context_module.LANES
    want = replay(ContextTable(CROWD), rows, CROWD.label_delay, with_known_at)
    assert_same(in_float64(CROWD, columns_of(rows, with_known_at)), want)


def test_online_equals_the_reference_over_a_long_history() -> None:
    rows = crowded(seed=2, rows=700)
    want = replay(SlowContext(CROWD), rows, CROWD.label_delay, with_known_at=True)
    assert_same(replay(ContextTable(CROWD), rows, CROWD.label_delay, with_known_at=True), want)


def test_many_entities_sort_beyond_sixteen_bits() -> None:
    """Entities with codes above 65,535 are their own: a sort by the low 16 bits alone would mix them."""
    n = 70_000
    codes = np.r_[np.arange(n), [3, 65_538, 65_539, MISSING, 3]].astype(np.int32)
    time = np.arange(len(codes), dtype=np.int64) * 1_000
    spec = ContextSpec(("card",), (10**12,), 10**12)
    out = context_columns(spec, [Coded(codes, [""] * n)], time, time / 1_000, None, None)
    count, amount = out[:, 0], out[:, 1]
    np.testing.assert_allclose(count[:n], 0)
    np.testing.assert_allclose(count[n:], [1, 1, 1, 0, 2], rtol=1e-4)
    np.testing.assert_allclose(amount[n:], [3, 65_538, 65_539, 0, 70_003], rtol=1e-4)


def test_files_of_more_rows_than_int32_counts_have_row_numbers_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row_type(n) for n in (2**31 - 1, 2**31)] == [np.int32, np.int64]
    columns = columns_of(crowded(seed=4, rows=500), with_known_at=True)
    narrow = context_columns(CROWD, **columns)
    monkeypatch.setattr(context_module, "row_type", lambda rows: np.int64)
    assert context_columns(CROWD, **columns).tobytes() == narrow.tobytes()


# One terminal by hand: half-life one day, label delay two days.

HAND = ContextSpec(("terminal",), (DAY,), 2 * DAY)


def named(spec: ContextSpec, read: npt.NDArray[Any]) -> dict[str, float]:
    return dict(zip(spec.names(), read.tolist(), strict=True))


def both_ways(rows: Sequence[Row], spec: ContextSpec = HAND, with_known_at: bool = True) -> list[dict[str, float]]:
    """What every row reads, by name; online and offline are the same."""
    online = replay(ContextTable(spec), rows, spec.label_delay, with_known_at)
    assert_same(in_float64(spec, columns_of(rows, with_known_at)), online)
    return [named(spec, read) for read in online]


def test_first_transaction_reads_nothing() -> None:
    nothing = {
        "terminal.count_1d": 0.0,
        "terminal.amount_1d": 0.0,
        "terminal.amount_ratio": -1.0,
        "terminal.fraud_1d": 0.0,
        "terminal.honest_1d": 0.0,
        "terminal.run_age_d": -1.0,
        "terminal.run_length": 0.0,
        "terminal.since_fraud_d": -1.0,
        "terminal.since_honest_d": -1.0,
    }
    assert both_ways([Row(("t",), 5 * DAY, 10.0)]) == [nothing]


def test_numbers_by_hand() -> None:
    rows = [
        Row(("t",), 0, 8.0, FRAUD, 2 * DAY),
        Row(("t",), DAY, 2.0, HONEST, 3 * DAY),
        Row(("t",), 2 * DAY, 1.0, FRAUD, 4 * DAY),
        Row(("t",), 4 * DAY, 0.0, HONEST, 6 * DAY),
    ]
    reads = both_ways(rows)
    assert reads[1]["terminal.count_1d"] == 0.5
    assert reads[1]["terminal.amount_1d"] == 4.0
    assert reads[2]["terminal.count_1d"] == 0.75
    assert reads[2]["terminal.amount_1d"] == 3.0
    assert reads[2]["terminal.fraud_1d"] == 0.25, "known exactly at this transaction's time, and two half-lives old"
    assert reads[2]["terminal.honest_1d"] == 0.0
    assert reads[2]["terminal.run_age_d"] == 2.0
    assert reads[3] == {
        "terminal.count_1d": 0.0625 + 0.125 + 0.25,
        "terminal.amount_1d": 0.5 + 0.25 + 0.25,
        "terminal.amount_ratio": 0.0,
        "terminal.fraud_1d": 0.0625 + 0.25,
        "terminal.honest_1d": 0.125,
        "terminal.run_age_d": 2.0,  # the honest one of day 1 ended the run of day 0
        "terminal.run_length": 1.0,
        "terminal.since_fraud_d": 2.0,
        "terminal.since_honest_d": 3.0,
    }


def test_a_label_counts_from_the_moment_it_is_known() -> None:
    for known_at, fraud_read in ((DAY, 0.5), (DAY + 1, 0.0)):
        reads = both_ways([Row(("t",), 0, 0.0, FRAUD, known_at), Row(("t",), DAY)])
        assert reads[1]["terminal.fraud_1d"] == fraud_read


def test_silence_counts_as_honest_from_one_delay_on() -> None:
    for time, honest_read in ((2 * DAY - 1, 0.0), (2 * DAY, 0.25)):
        reads = both_ways([Row(("t",), 0), Row(("t",), time)], with_known_at=False)
        assert reads[1]["terminal.honest_1d"] == pytest.approx(honest_read)
        assert reads[1]["terminal.since_honest_d"] == (time / DAY if honest_read else -1.0)


def test_a_late_fraud_was_honest_until_it_is_known() -> None:
    rows = [Row(("t",), 0, 0.0, FRAUD, 3 * DAY), Row(("t",), 2 * DAY), Row(("t",), 3 * DAY, 0.0, HONEST, 9 * DAY)]
    reads = both_ways(rows)
    assert [read["terminal.honest_1d"] for read in reads] == [0.0, 0.25, 0.0]
    assert [read["terminal.fraud_1d"] for read in reads] == [0.0, 0.0, 0.125]
    assert [read["terminal.since_honest_d"] for read in reads] == [-1.0, 2.0, -1.0]
    assert [read["terminal.run_length"] for read in reads] == [0.0, 0.0, 1.0]


def test_a_transaction_never_reads_its_own_label() -> None:
    """A label known at or before its transaction's own time was read by that transaction offline, and by those of the
    same time before it: with `label_delay = "0d"` every row saw its answer."""
    zero = ContextSpec(HAND.columns, HAND.half_lives, 0)
    rows = [Row(("t",), DAY, 0.0, FRAUD, known_at) for known_at in (0, DAY, DAY)]
    reads = both_ways(rows, zero)
    assert [read["terminal.fraud_1d"] for read in reads] == [0.0, 1.0, 2.0]
    reads = both_ways(rows, zero, with_known_at=False)
    assert [read["terminal.run_length"] for read in reads] == [0.0, 1.0, 2.0]


def test_known_at_in_the_far_future_does_not_disturb_other_entities() -> None:
    """The year 9999 as "never" overflowed the search for the first row that hears a label, with many entities."""
    never, n = 253_370_764_800_000, 40_000
    codes = np.r_[np.arange(n), np.arange(n)].astype(np.int32)
    time = np.r_[np.zeros(n), np.full(n, DAY)].astype(np.int64)
    label = np.r_[np.ones(n), np.zeros(n)].astype(np.int8)
    known_at = np.full(2 * n, never)
    known_at[:n:2] = DAY
    spec = ContextSpec(("card",), (DAY,), 2 * DAY)
    out = context_columns(spec, [Coded(codes, [""] * n)], time, None, label, known_at)
    fraud = out[n:, spec.names().index("card.fraud_1d")]
    assert (fraud[0::2] == 0.5).all()
    assert (fraud[1::2] == 0.0).all()


def test_a_corrected_honest_transaction_no_longer_parts_two_runs() -> None:
    """Fraud at 0, honest at 1, fraud at 2 are two runs; once the one in between is a fraud too, they are one of 3."""
    spec = ContextSpec(HAND.columns, HAND.half_lives, 10)
    rows = [
        Row(("t",), 0, 0.0, FRAUD, 5),
        Row(("t",), 1, 0.0, FRAUD, 50),
        Row(("t",), 2, 0.0, FRAUD, 12),
        Row(("t",), 48),
        Row(("t",), 50),
    ]
    reads = both_ways(rows, spec)
    assert [read["terminal.run_length"] for read in reads] == [0.0, 0.0, 0.0, 1.0, 3.0]
    assert [read["terminal.run_age_d"] for read in reads[3:]] == [46 / DAY, 50 / DAY]


def test_missing_values_read_nothing_and_change_nothing() -> None:
    spec = ContextSpec(("merchant", "device"), (DAY,), DAY)
    nothing = [0.0, 0.0, -1.0, 0.0, 0.0, -1.0, 0.0, -1.0, -1.0]
    table = ContextTable(spec)
    rows = table.rows_of((None, None))
    assert rows.tolist() == [NO_ENTITY, NO_ENTITY]
    assert table.add_transaction(rows, 5, 1.0) == USUAL
    table.add_label(rows, 5, True, USUAL)
    table.correct_label(rows, 5, False)
    assert table.read(rows, 10, 1.0).tolist() == nothing * 2
    reads = both_ways([Row((None, "x"), 0, 1.0, FRAUD, DAY), Row((None, "x"), DAY, 3.0)], spec)
    assert list(reads[1].values()) == [*nothing, 0.5, 0.5, 3.0, 0.5, 0.0, 1.0, 1.0, 1.0, -1.0]


def test_a_late_transaction_reads_and_adds_at_the_newest_time() -> None:
    table = ContextTable(HAND)
    rows = table.rows_of(("t",))
    table.add_transaction(rows, 2 * DAY, 4.0)
    late = named(HAND, table.read(rows, DAY, 8.0))
    assert late["terminal.count_1d"] == 1.0, "nothing grows back in time"
    assert late["terminal.amount_ratio"] == 2.0
    table.add_transaction(rows, DAY, 8.0)
    after = named(HAND, table.read(rows, 2 * DAY, 0.0))
    assert after["terminal.count_1d"] == 1.5
    assert after["terminal.amount_1d"] == 8.0
    table.add_label(rows, DAY, True, USUAL)
    assert named(HAND, table.read(rows, 0, 0.0))["terminal.since_fraud_d"] == 1.0


def test_the_last_of_equal_labels_is_corrected() -> None:
    """Labels of one entity that are alike in time and value: the one that took effect last is taken out."""
    table = ContextTable(HAND)
    rows = table.rows_of(("t",))
    for time in (0, 10, 10, 20):
        table.add_transaction(rows, time, 0.0)
    for time, fraud in ((0, True), (10, False), (20, True), (10, False)):
        table.add_label(rows, time, fraud, USUAL)
    table.correct_label(rows, 10, True)
    # the first honest one still parts 0 from 20; were it taken out, the run would be 0, 20, 10
    assert named(HAND, table.read(rows, 20, 0.0))["terminal.run_length"] == 2.0


def test_unknown_amounts_and_no_labels() -> None:
    time = np.array([0, DAY], dtype=np.int64)
    entities = [coded(["t", "t"])]
    out = context_columns(HAND, entities, time, np.array([np.nan, 3.0]), None, None)
    assert named(HAND, out[1])["terminal.amount_1d"] == 0.0
    out = context_columns(HAND, entities, time, np.array([3.0, np.nan]), None, None)
    assert named(HAND, out[1])["terminal.amount_ratio"] == 0.0, "counts as 0 here too"
    out = context_columns(HAND, entities, time, None, None, None)
    assert named(HAND, out[1])["terminal.amount_ratio"] == -1.0
    assert named(HAND, out[1])["terminal.count_1d"] == 0.5
    assert named(HAND, out[1])["terminal.amount_1d"] == 0.0
    # without a label column nobody ever says fraud: silence is honest
    late = context_columns(HAND, entities, time * 3, None, None, None)
    assert named(HAND, late[1])["terminal.honest_1d"] == 0.125


def test_no_rows_and_no_context() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    out = context_columns(HAND, [Coded(nothing.astype(np.int32), [])], nothing, None, None, None)
    assert out.shape == (0, 9)
    none = ContextSpec((), (DAY,), DAY)
    assert context_columns(none, [], np.zeros(3, dtype=np.int64), None, None, None).shape == (3, 0)
    only_missing = [Coded(np.full(2, MISSING, dtype=np.int32), ["t"])]
    out = context_columns(HAND, only_missing, np.zeros(2, dtype=np.int64), None, None, None)
    assert out.tolist() == [[0.0, 0.0, -1.0, 0.0, 0.0, -1.0, 0.0, -1.0, -1.0]] * 2


def test_rows_are_made_once_and_survive_growth() -> None:
    table = ContextTable(ContextSpec(("merchant", "device"), (DAY,), DAY), capacity=2)
    first = table.rows_of(("a", "a")).tolist()
    assert len({*first, NO_ENTITY}) == 3
    table.add_transaction(np.array(first[:1]), 0, 7.0)
    more = [table.rows_of((f"m{i}", None)) for i in range(20)]
    assert len({*first, *(rows[0] for rows in more)}) == 22
    assert table.rows_of(("a", "a")).tolist() == first
    assert table.read(np.array(first), DAY, 0.0)[:2].tolist() == [0.5, 3.5]
    assert [table.read(rows, DAY, 0.0)[0] for rows in more] == [0.0] * 20


def some_table() -> tuple[ContextTable, npt.NDArray[np.int64]]:
    table = ContextTable(SPEC, capacity=2)
    rows = table.rows_of(("a", "x"))
    for time in (0, 5_000, 9_000):
        table.add_transaction(rows, time, 2.0)
    table.add_label(rows, 0, True, fixed_ratios(2.0, 3.0))
    table.add_label(rows, 5_000, False, fixed_ratios(0.5, 4.0))
    table.add_label(rows, 9_000, True, USUAL)
    return table, rows


def test_saved_rows_take_back_what_came_next() -> None:
    table, rows = some_table()
    before = table.read(rows, 20_000, 3.0).tolist()
    assert before[-2:] == [1.0, 1.0]
    saved = table.save_rows(rows)
    table.add_transaction(rows, 15_000, 1.0)
    table.correct_label(rows, 5_000, True)
    table.add_label(rows, 15_000, False, USUAL)
    assert table.read(rows, 20_000, 3.0)[-2:].tolist() == [0.5, 1.0]
    table.restore_rows(saved)
    assert table.read(rows, 20_000, 3.0).tolist() == before
    # the log behind corrections is as it was, too
    table.correct_label(rows, 5_000, True)
    read = named(SPEC, table.read(rows, 20_000, 3.0))
    assert (read["merchant.run_length"], read["merchant.run_least_ratio"]) == (3.0, 0.5)


def test_a_copy_restores_to_the_same_table() -> None:
    table, rows = some_table()
    table.correct_label(rows, 0, False)
    again = ContextTable(SPEC, capacity=1)
    table.begin_cut()
    first, second = table.copy_rows(2), table.copy_rows(9)
    again.restore_entities(table.names[:1], first)
    again.restore_entities(table.names[1:], second)
    lengths = np.concatenate([first["effects"], second["effects"]])
    effects = table.copy_effects([(0, 0, 0), (1, 0, 1), (1, 1, 8), (2, 0, 8)])
    again.restore_effects(lengths, array("q", effects.tobytes()))
    table.cut = None
    for both in (table, again):
        assert both.rows_of(("a", "x")).tolist() == rows.tolist()
        both.correct_label(rows, 5_000, True)
        both.correct_label(rows, 0, True)
        both.add_transaction(both.rows_of(("new", "x")), 30_000, 1.0)
    assert again.read(rows, 40_000, 1.0).tolist() == table.read(rows, 40_000, 1.0).tolist()
    read = named(SPEC, again.read(rows, 40_000, 1.0))
    assert (read["merchant.run_length"], read["merchant.run_least_ratio"]) == (3.0, 0.5)


@pytest.mark.parametrize(
    "change", ["transaction", "older transaction", "label", "correction", "taken back", "new entity"]
)
def test_rows_are_copied_as_they_were_when_the_cut_was_made(change: str) -> None:
    table, rows = some_table()
    saved = table.save_rows(rows)
    if change == "taken back":
        table.add_label(rows, 9_000, False, USUAL)
    before = [array.copy() for array in (table.newest[:3], table.sums[:3], table.run[:3])]
    lengths = [len(effects) for effects in table.effects]
    table.begin_cut()
    if change == "transaction":
        table.add_transaction(rows, 15_000, 1.0)
    elif change == "older transaction":
        table.add_transaction(rows, 1_000, 1.0)
    elif change == "label":
        table.add_label(rows, 9_000, True, USUAL)
    elif change == "correction":
        table.correct_label(rows, 9_000, False)
    elif change == "taken back":
        table.restore_rows(saved)
    else:
        table.add_transaction(table.rows_of(("b", "x")), 15_000, 1.0)
    now = [array.tobytes() for array in (table.newest[:3], table.sums[:3], table.run[:3])]
    assert now != [array.tobytes() for array in before]
    first = table.copy_rows(2)
    table.add_transaction(rows, 16_000, 1.0)  # of rows that were copied and of rows that were not
    second = table.copy_rows(9)
    for name, wanted in zip(("newest", "sums", "run"), before, strict=True):
        assert np.concatenate([first[name], second[name]]).tolist() == wanted.tolist()
    assert [*first["effects"], *second["effects"]] == lengths


def test_an_old_run_reads_as_none_and_a_new_fraud_brings_it_back() -> None:
    spec = replace(HAND, run_memory=10 * DAY, user=0)
    times = [0, 10 * DAY, 10 * DAY + 1, 20 * DAY, 22 * DAY]
    kinds = [FRAUD, UNKNOWN, UNKNOWN, FRAUD, UNKNOWN]
    reads = both_ways([Row(("t",), t, 1.0, k) for t, k in zip(times, kinds, strict=True)], spec, with_known_at=False)
    names = [f"terminal.{name}" for name in ("run_age_d", "run_length", "since_fraud_d", "run_least_ratio")]
    assert [reads[1][name] for name in names] == [10.0, 1.0, 10.0, 1.0], "as long as it is remembered"
    for read in reads[2:4]:
        assert [read[name] for name in names] == [-1.0, 0.0, -1.0, -1.0]
    assert reads[3]["terminal.since_honest_d"] == 10.0 - 1 / DAY
    assert [reads[4][name] for name in names] == [2.0, 1.0, 2.0, 1.0]


def test_last_run_of_no_effects() -> None:
    never = context_module.NEVER
    assert last_run(np.zeros(0, dtype=np.int64)).tolist() == [never, 0, never, never, 0]


def test_names_say_column_kind_and_half_life() -> None:
    spec = ContextSpec(("shop", "ip"), (HOUR, DAY, 14 * DAY), DAY)
    assert [spec.numbers_of(column) for column in (0, 1)] == [slice(0, 17), slice(17, 34)]
    assert spec.width == 34 == len(spec.names())
    assert spec.names()[:4] == ["shop.count_0.0416667d", "shop.count_1d", "shop.count_14d", "shop.amount_0.0416667d"]
    runs = ["ip.run_age_d", "ip.run_length", "ip.since_fraud_d", "ip.since_honest_d"]
    assert spec.names()[-5:] == ["ip.honest_14d", *runs]
    with_user = replace(spec, half_lives=(DAY,), user=0)
    kinds = ["count_1d", "amount_1d", "amount_ratio", "fraud_1d", "honest_1d", *(name[3:] for name in runs)]
    assert with_user.names()[:11] == [f"shop.{kind}" for kind in (*kinds, "run_least_ratio", "run_least_lately")]
    only = replace(with_user, user=1, user_inputs=("ratio",))
    assert only.names()[11:] == ["ip.amount_ratio"]
    assert only.numbers_of(1) == slice(11, 12)


def test_spec_of_a_configuration() -> None:
    config = parse_config(
        """
        data = {user = "u", time = "t", label_delay = "3d"}
        features = {context = ["shop"], ip = ["address"], half_lives = ["1h", "2d"]}
        """,
        "test",
    )
    spec = ContextSpec(
        ("shop", "address"),
        (HOUR, 2 * DAY),
        3 * DAY,
        90 * DAY,
        None,
        CONTEXT_INPUTS,
        ("ratio", "fraud", "run"),
        63 * DAY,
    )
    assert context_spec(config, schema_of(config)) == spec
    config = parse_config(
        """
        data = {user = "u", time = "t"}
        features = {context = ["shop", "u"], habit_half_life = "30d", run_memory = "5d", context_inputs = ["run", "ratio"]}
        """,
        "test",
    )
    spec = context_spec(config, schema_of(config))
    assert (spec.habit_half_life, spec.user, spec.inputs) == (30 * DAY, 1, ("ratio", "run"))
    assert spec.run_memory == 12 * DAY, "from when a fraud could be known"


# ---- habits


HAND_LEAST = replace(HAND, user=0)
BY_USER = ContextSpec(("terminal", "user"), (DAY,), 2 * DAY, habit_half_life=DAY, user=1)


def test_amounts_are_compared_with_the_habit_before() -> None:
    amounts = (0.0, 8.0, 2.0, -3.0, 7.0)
    reads = both_ways(
        [Row(("t",), n * DAY, amount) for n, amount in enumerate(amounts)], replace(HAND, habit_half_life=DAY)
    )
    # means: nothing; 0; (8 / 2) / (3 / 4); (2 / 2 + 8 / 4) / (7 / 8); (-3 / 2 + 2 / 4 + 8 / 8) / (15 / 16)
    assert [read["terminal.amount_ratio"] for read in reads] == [-1.0, -1.0, 2.0 / (4 / 0.75), 0.0, -1.0]


def test_an_amount_far_above_the_habit_is_bounded_and_one_long_ago_is_none() -> None:
    spec = replace(HAND, habit_half_life=DAY)
    rows = [Row(("t",), 0, 1.0), Row(("t",), 29 * DAY, 1e300), Row(("u",), 30 * DAY, 1.0), Row(("u",), 61 * DAY, 1.0)]
    assert [read["terminal.amount_ratio"] for read in both_ways(rows, spec)] == [-1.0, 10_000.0, -1.0, -1.0]
    table = ContextTable(spec)
    rows_of = table.rows_of(("t",))
    table.add_transaction(rows_of, 0, 5e-324)
    for time in (0, 20 * DAY, 1074 * DAY, 10**6 * DAY):
        assert table.read(rows_of, time, 1e300)[2] == -1.0


def test_a_run_has_the_least_ratio_of_its_frauds_amounts_to_their_users_habits() -> None:
    rows = [
        Row(("s", "ann"), 0, 8.0),
        Row(("s", "bob"), 0, 4.0),
        Row(("t", "ann"), 1, 40.0, FRAUD, 10),  # 5 times ann's habit
        Row(("t", "bob"), 1, 12.0, FRAUD, 20),  # 3 times bob's
        Row(("t", "cid"), 2, 99.0, FRAUD, 30),  # unknown: ordinary
        Row(("t", "bob"), 11),
        Row(("t", "bob"), 21),
        Row(("t", "bob"), 31),
        Row(("v", "ann"), 31),
    ]
    spec = replace(BY_USER, half_lives=(10**15,), habit_half_life=10**15)
    reads = both_ways(rows, spec)
    least = [read["terminal.run_least_ratio"] for read in reads]
    assert least == [-1.0] * 5 + [pytest.approx(ratio, abs=2**-16) for ratio in (5.0, 3.0, 1.0)] + [-1.0]
    assert reads[8]["user.run_least_ratio"] == pytest.approx(5.0, abs=2**-16)
    lately = [read["terminal.run_least_lately"] for read in reads[5:8]]
    # ann: 48 / 2 over 8; bob: 16 / 2 over 4
    assert lately == [pytest.approx(ratio, abs=2**-16) for ratio in (3.0, 2.0, 1.0)]
    assert not [name for name in replace(spec, user=None).names() if "least" in name]


def test_an_ended_run_leaves_its_ratio_and_a_correction_takes_over_that_of_what_it_takes_out() -> None:
    """Two honest ones of one terminal and one time, 2 and 4 times the habits: the later effect is the one taken out."""
    spec = replace(BY_USER, label_delay=30, half_lives=(10**15,), habit_half_life=10**15)
    rows = [
        Row(("s", "ann"), 0, 1.0),
        Row(("s", "bob"), 0, 1.0),
        Row(("t", "ann"), 5, 0.5, FRAUD, 6),
        Row(("t", "ann"), 7, 1.5, FRAUD, 40),  # honest at 37, corrected at 40
        Row(("t", "bob"), 7, 4.0, FRAUD, 60),  # honest at 37, corrected at 60
        Row(("t", "dan"), 9, 3.0, FRAUD, 38),
        Row(("t", "dan"), 39),
        Row(("t", "dan"), 41),
        Row(("t", "dan"), 61),
    ]
    reads = both_ways(rows, spec)
    got = [(read["terminal.run_length"], read["terminal.run_least_ratio"]) for read in reads[5:]]
    # the honest ones part 0.5 from dan's unknown one; taken out is bob's 4 first; then ann's 2, and the runs are one
    assert got == [(1.0, 0.5), (1.0, 1.0), (2.0, 1.0), (4.0, 0.5)]
    table = ContextTable(HAND_LEAST)
    at = table.rows_of(("t",))
    table.add_transaction(at, 7, 1.0)
    table.add_label(at, 7, False, fixed_ratios(2.0, 5.0))
    table.add_label(at, 7, False, fixed_ratios(4.0, 3.0))
    table.correct_label(at, 7, True)
    assert table.read(at, 9, 0.0)[-2:].tolist() == [4.0, 3.0]
    table.correct_label(at, 7, True)
    assert table.read(at, 9, 0.0)[-2:].tolist() == [2.0, 3.0]
    table.correct_label(at, 7, False)
    assert table.read(at, 9, 0.0)[-2:].tolist() == [4.0, 3.0]
    table.correct_label(at, 7, True)
    assert table.read(at, 9, 0.0)[-2:].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("inputs", [("run",), ("ratio",), ("amount", "ratio", "honest"), ("count", "fraud", "run")])
@pytest.mark.parametrize("user", [None, 1])
def test_what_is_not_read_is_kept_all_the_same(inputs: tuple[ContextInput, ...], user: int | None) -> None:
    rows = crowded(seed=5, rows=300)
    whole = replace(CROWD, user=user)
    part = replace(whole, inputs=inputs, user_inputs=inputs)
    words: dict[str, str | tuple[str, ...]] = {"ratio": "amount_ratio", "run": ("run_", "since_")}
    kept = [
        n for n, name in enumerate(whole.names())
        if any(name.split(".")[1].startswith(words.get(kind, f"{kind}_")) and (kind != "amount" or "ratio" not in name)
               for kind in inputs)
    ]  # fmt: skip
    assert part.names() == [whole.names()[n] for n in kept]
    assert part.width == len(kept)
    want = in_float64(whole, columns_of(rows, with_known_at=True))[:, kept]
    assert in_float64(part, columns_of(rows, with_known_at=True)).tolist() == want.tolist()
    assert_same(replay(ContextTable(part), rows, part.label_delay, with_known_at=True), want)


def test_as_rows_gives_the_values_of_a_row() -> None:
    entities = [coded(["a", None, "b"]), coded(["x", "x", None])]
    assert [as_rows(entities, row) for row in range(3)] == [["a", "x"], [None, "x"], ["b", None]]
