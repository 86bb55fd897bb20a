"""When labels take effect, in which order, and that taking them back leaves no trace."""

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.context import ContextSpec, ContextTable
from serve.labels import FRAUD, SAID, SILENCE, LabelBook, LabelDump, Sequences

DELAY = 100
SPEC = ContextSpec(("merchant", "device"), (50, 1000), DELAY, user=1)


class World:
    """A book over a table, and the transactions that it may have to find."""

    def __init__(self) -> None:
        self.table = ContextTable(SPEC, capacity=2)
        self.book = LabelBook(self.table, self.find, block=4)
        self.known: dict[int, tuple[int, list[str | None]]] = {}
        self.broken = False

    def find(self, seq: int) -> tuple[int, Any]:
        if self.broken:
            raise OSError("the journal cannot be read")
        time, entities = self.known[seq]
        return time, self.table.rows_of(entities)

    def transaction(self, seq: int, time: int, merchant: str | None = "m", device: str | None = "d") -> None:
        self.known[seq] = (time, [merchant, device])
        rows = self.table.rows_of([merchant, device])
        self.book.opened(seq, time, rows, self.table.add_transaction(rows, time, 1.0 + seq % 3))

    def label(self, number: int, seq: int, known_at: int, fraud: bool) -> None:
        self.book.said(number, seq, self.known[seq][0], known_at, fraud)


def restored(world: World) -> World:
    """Another world, from what a snapshot would keep of this one."""
    again = World()
    again.known = world.known
    dumped = world.book.dump()
    world.table.begin_cut()
    arrays = world.table.copy_rows(10**6)
    spans = [(row, 0, int(length)) for row, length in enumerate(arrays["effects"])]
    effects = array("q", world.table.copy_effects(spans).tobytes())
    world.table.cut = None
    again.table.restore_entities(world.table.names, arrays)
    again.table.restore_effects(arrays["effects"], effects)
    remember_book(again, dumped)
    return again


def remember_book(world: World, dumped: LabelDump) -> None:
    for columns in dumped.open:
        world.book.restore_open(columns)
    world.book.restore_said([entry for entry in dumped.heap if entry[3] == SAID])
    world.book.frauds = Sequences(dumped.frauds)


@pytest.fixture(scope="session")
def dump(labels_of: Any) -> Callable[[World], dict[str, Any]]:
    """Everything that a world remembers."""

    def dump(world: World) -> dict[str, Any]:
        table, used = world.table, len(world.table.effects)
        arrays = (table.newest[:used], table.sums[:used], table.run[:used])
        return {**labels_of(world.book), "table": [a.tobytes() for a in arrays], "effects": list(table.effects)}

    return dump


@pytest.fixture
def world() -> World:
    made = World()
    made.transaction(1, 1000)
    return made


def known(world: World) -> tuple[int, int]:
    """Numbers of known frauds and honest ones of "m", for transactions that are all of one time."""
    sums = world.table.sums[world.table.rows_of(["m"])[0]]
    return round(sums[2, 1]), round(sums[3, 1])


def test_silence_becomes_honesty_one_delay_later_and_not_before(world, dump):
    assert world.book.advance(1000 + DELAY - 1) == []
    assert known(world) == (0, 0)
    world.book.advance(1000 + DELAY)
    assert known(world) == (0, 1)
    assert not dump(world)["open"]
    assert not dump(world)["pending"]
    world.book.advance(10**9)
    assert known(world) == (0, 1), "once"


def test_a_label_takes_effect_at_its_time_and_not_before(world):
    world.label(2, 1, 1050, True)
    world.book.advance(1049)
    assert known(world) == (0, 0)
    world.book.advance(1050)
    assert known(world) == (1, 0)
    world.book.advance(10**9)
    assert known(world) == (1, 0), "silence has nothing to say of a known fraud"
    assert set(world.book.frauds) == {1}


def test_at_the_end_of_the_delay_what_was_said_comes_before_silence(world):
    world.label(2, 1, 1000 + DELAY, True)
    undo = world.book.advance(1000 + DELAY)
    assert known(world) == (1, 0)
    assert [step.saved is not None for step in undo] == [True, False], "no honesty in between"


@pytest.mark.parametrize("known_at", [1050, 1000 + DELAY, 1500])
def test_a_correction_takes_the_earlier_label_out(world, known_at):
    world.label(2, 1, known_at - 40, False)
    world.label(3, 1, known_at, True)
    world.book.advance(known_at - 1)
    assert known(world)[0] == 0
    world.book.advance(known_at)
    assert known(world) == (1, 0)
    world.label(4, 1, known_at + 7, False)
    world.book.advance(10**9)
    assert known(world) == (0, 1)
    assert set(world.book.frauds) == set()


def test_the_same_label_again_does_nothing(world):
    for number, known_at in ((2, 1010), (3, 1020), (4, 2000)):
        world.label(number, 1, known_at, True)
    world.book.advance(10**9)
    assert known(world) == (1, 0)
    assert set(world.book.frauds) == {1}


def test_effects_come_by_when_they_are_known_then_by_transaction_then_as_they_were_said():
    world = World()
    for seq, time in ((1, 1000), (2, 1000), (3, 900)):
        world.transaction(seq, time)
    for number, seq, known_at in ((10, 2, 1060), (11, 1, 1060), (12, 3, 1060), (13, 1, 1040)):
        world.label(number, seq, known_at, number != 13)
    order = [(step.entry[0], step.entry[2], step.entry[3], step.entry[4]) for step in world.book.advance(1100)]
    assert order == [
        (1000, 3, 1, 3),
        (1040, 1, 0, 13),
        (1060, 3, 0, 12),
        (1060, 1, 0, 11),
        (1060, 2, 0, 10),
        (1100, 1, 1, 1),
        (1100, 2, 1, 2),
    ]


def test_missing_entities_stay_as_they_are():
    world = World()
    world.transaction(1, 1000, merchant=None)
    world.label(2, 1, 1010, True)
    world.book.advance(10**9)
    assert world.table.sums[0].sum() == 0
    assert world.table.sums[world.table.rows_of([None, "d"])[1], 2, 1] > 0


# ---- taking back


operation = st.one_of(
    st.tuples(
        st.just("new"), st.integers(0, 30), st.sampled_from(["m", "m", "n", None]), st.sampled_from(["d", "m", None])
    ),
    st.tuples(st.just("label"), st.integers(0, 20), st.integers(-10, 30), st.booleans()),
    st.tuples(st.just("advance"), st.integers(0, 40), st.booleans(), st.none()),
)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(operation, min_size=3, max_size=40), st.integers(0, 40))
def test_take_back_is_the_exact_inverse_of_advance(dump, operations, last):
    """Bit for bit; and what is taken back can take effect again, with the same result as in a book that never was."""
    world, control = World(), World()
    now = 1000
    for number, (kind, a, b, c) in enumerate([*operations, ("advance", last, True, None)], start=1):
        now += 10 if kind == "new" else 0
        for each in (world, control):
            if kind == "new":
                each.transaction(number, now - a, b, c)
            elif kind == "label" and each.known:
                seq = sorted(each.known)[a % len(each.known)]
                each.label(number, seq, now + 10 * b, c)
        if kind != "advance":
            continue
        if b:  # in vain at first
            before = dump(world)
            undo = world.book.advance(now + 10 * a)
            world.book.take_back(undo)
            assert dump(world) == before
        world.book.advance(now + 5 * a)
        control.book.advance(now + 5 * a)
        assert dump(world) == dump(control)


def test_an_effect_that_cannot_be_worked_out_takes_back_those_before_it(dump):
    """A correction looks its transaction up in the journal; if that fails, nothing has changed."""
    world = World()
    for seq in (1, 2, 3):
        world.transaction(seq, 1000 + seq)
    world.book.advance(1150)
    world.transaction(4, 1160)
    world.label(5, 4, 1170, True)  # open: takes effect from memory
    world.label(6, 2, 1180, True)  # settled: has to be found
    before = dump(world)
    world.broken = True
    with pytest.raises(OSError, match="cannot be read"):
        world.book.advance(1200)
    assert dump(world) == before
    world.broken = False
    world.book.advance(1200)
    assert set(world.book.frauds) == {2}
    assert dump(world)["open"][4][-1] == FRAUD


def test_dump_and_restore_go_on_the_same(dump):
    rng = random.Random(0)
    world = World()
    for seq in range(1, 60):
        world.transaction(seq, 1000 + 5 * seq - rng.choice([0, 0, 0, 40]), rng.choice(["m", "n"]))
        world.label(1000 + seq, rng.randint(1, seq), 1000 + 5 * seq + rng.randint(-50, 300), rng.random() < 0.5)
        world.book.advance(1000 + 5 * seq)
    again = restored(world)
    assert dump(again) == dump(world)
    assert {entry[3] for entry in world.book.heap} == {SAID, SILENCE}
    assert dump(world)["open"]
    assert dump(world)["frauds"]
    for each in (world, again):
        each.book.advance(10**6)
    assert dump(again) == dump(world)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(operation, min_size=3, max_size=60), st.data())
def test_a_dump_is_of_its_moment_whatever_happens_before_it_is_read(dump, operations, data):
    world = World()
    moment = data.draw(st.integers(0, len(operations)))
    now = 1000
    for number, (kind, a, b, c) in enumerate([*operations, ("end", 0, 0, None)], start=1):
        if number == moment + 1:
            before, dumped = dump(world), world.book.dump()
        now += 10 if kind == "new" else 0
        if kind == "new":
            world.transaction(number, now - a, b, c)
        elif kind == "label" and world.known:
            world.label(number, sorted(world.known)[a % len(world.known)], now + 10 * b, c)
        elif kind == "advance":
            world.book.advance(now + 10 * a)
    again = World()
    remember_book(again, dumped)
    for part in ("open", "pending", "frauds"):
        assert dump(again)[part] == before[part]
