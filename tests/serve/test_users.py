"""Ring, anchor and middle of each user, with integer ramps and graphs whose state spells out the events it has seen."""

import random
from typing import Any

import numpy as np
import pytest

from seqfraud.graph import NEXT, GraphSpec, StateSpec
from serve.users import FIRST_CAPACITY, UserTable

W = 3
BASE, PRIME = 31, 1_000_003
SPEC = GraphSpec(
    numeric=1,
    categorical=1,
    context=1,
    states=(
        StateSpec("code", "int64", (2, "B"), 0),
        StateSpec("last_time", "int64", ("B",), -1),
    ),
)
"""`code` folds the events in order into a number that no other order has: row 0 their times, row 1 the rest."""


def folded(events: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """The states after events (time, category, number, context), from the beginning."""
    code = [0, 0]
    for time, category, number, context in events:
        code = [(code[0] * BASE + time) % PRIME, (code[1] * BASE + category + number + context) % PRIME]
    return {"code": code, "last_time": events[-1][0] if events else -1}


class Step:
    """The step graph's buffers after `run_bound` on one event."""

    def __init__(self) -> None:
        self.inputs = {"integers": np.zeros((1, 2), np.int64), "values": np.zeros((1, 2), np.float32)}
        self.outputs: dict[str, np.ndarray] = {}

    def run(self, table: UserTable, slot: int, event: tuple[int, int, int, int]) -> "Step":
        self.inputs["integers"][0] = event[:2]
        self.inputs["values"][0] = event[2:]
        code = (table.now["code"][slot] * BASE + [event[0], sum(event[1:])]) % PRIME
        self.outputs = {"code" + NEXT: code[:, None], "last_time" + NEXT: np.array([event[0]])}
        return self


class Sequence:
    """The sequence graph for one user."""

    def __init__(self) -> None:
        self.events = 0

    def states_after(self, integers: Any, values: Any, states: dict[str, Any]) -> dict[str, Any]:
        assert all(array.flags["C_CONTIGUOUS"] for array in states.values())
        code, last = states["code"][:, 0].copy(), states["last_time"].copy()
        for (time, category), others in zip(integers.tolist(), values.tolist(), strict=True):
            code = (code * BASE + [time, int(category + sum(others))]) % PRIME
            last = np.array([time])
        self.events += len(integers)
        return {"code": code[:, None], "last_time": last}


class Twin:
    """A UserTable beside the plain lists that it stands for."""

    def __init__(self, window: int = W) -> None:
        self.table = UserTable(SPEC, window)
        self.graph = Sequence()
        self.dropped: dict[str, list[tuple[int, int, int, int]]] = {}
        self.ring: dict[str, list[tuple[int, int, int, int]]] = {}

    def add(self, user: str, event: tuple[int, int, int, int]) -> None:
        """Append or insert, as the service does."""
        table = self.table
        slot = table.slot(user)
        ring = self.ring.setdefault(user, [])
        dropped = self.dropped.setdefault(user, [])
        late = bool(ring) and event[0] < ring[-1][0]
        assert table.is_late(slot, event[0]) == late
        too_late = late and bool(dropped) and event[0] < dropped[-1][0]
        assert table.is_too_late(slot, event[0]) == too_late
        if too_late:
            return
        place = sum(e[0] <= event[0] for e in ring)
        if late:
            assert table.place_of(slot, event[0]) == place
            integers, values = np.array(event[:2]), np.array(event[2:], np.float32)
            table.insert(slot, place, integers, values, self.graph)  # type: ignore[arg-type]
        else:
            table.append(slot, event[0], Step().run(table, slot, event))  # type: ignore[arg-type]
        ring.insert(place, event)
        if len(ring) > 2 * table.window:
            dropped += ring[: table.window]
            del ring[: table.window]

    def check(self, user: str) -> None:
        table, slot = self.table, self.table.slots[user]
        ring, dropped = self.ring[user], self.dropped[user]
        held = int(table.held[slot])
        assert held == len(ring)
        assert table.dropped[slot] == len(dropped)
        assert table.newest[slot] == ring[-1][0]
        assert table.integers[slot, :held].tolist() == [list(e[:2]) for e in ring]
        assert table.values[slot, :held].tolist() == [list(e[2:]) for e in ring]
        if dropped:
            assert table.anchor_time[slot] == dropped[-1][0]
        w = table.window
        stages = {"anchor": dropped, "now": dropped + ring}
        if held >= w:
            stages["middle"] = dropped + ring[:w]
        for name, events in stages.items():
            states = {state: array[slot].tolist() for state, array in getattr(table, name).items()}
            assert states == folded(events), name
        for place in range(held + 1):
            before = table.states_at(slot, place, self.graph)  # type: ignore[arg-type]
            wanted = folded(dropped + ring[:place])
            assert before["code"][:, 0].tolist() == wanted["code"]
            assert before["last_time"].tolist() == [wanted["last_time"]]
            for at, rows in table.before(slot, place).states:
                assert {state: row.tolist()[0] for state, row in rows.items()} == folded(dropped + ring[:at])
                assert at <= place


def event(time: int, mark: int = 0) -> tuple[int, int, int, int]:
    """An event that no other of a ramp is equal to."""
    return time, mark % 2 + 1, mark % 3, mark % 5


@pytest.mark.parametrize("count", range(1, 4 * W + 2))
def test_appended_events_fill_the_ring_and_move_the_anchor(count):
    twin = Twin()
    for time in range(count):
        twin.add("ann", event(time, time))
        twin.check("ann")
    assert W <= len(twin.ring["ann"]) <= 2 * W or count < W
    assert twin.graph.events < 10 * (W + 1) * count, "states are looked up from the middle, not from the beginning"


@pytest.mark.parametrize("count", range(1, 3 * W + 1))
def test_a_late_event_is_inserted_at_every_place(count):
    """Times 2, 4, 6, ...; one late event before, between and at each of them."""
    for time in range(1, 2 * count):
        twin = Twin()
        for n in range(1, count + 1):
            twin.add("ann", event(2 * n, n))
        twin.add("ann", event(time, 99))
        twin.check("ann")
        for n in range(1, 2 * W + 1):  # and life goes on
            twin.add("ann", event(2 * count + n, n))
            twin.check("ann")


def test_an_insertion_that_overflows_the_ring_drops_the_oldest_and_may_be_among_them():
    for time in (0, 3, 7, 11):
        twin = Twin()
        for n in range(2 * W):
            twin.add("ann", event(2 * n + 1, n))
        twin.add("ann", event(time, 99))
        assert len(twin.ring["ann"]) == W + 1
        twin.check("ann")
    assert twin.table.anchor_time[0] == 5


def test_events_of_one_time_keep_their_order_and_the_anchor_s_own_time_is_not_too_late():
    twin = Twin()
    for mark in range(2 * W + 1):
        twin.add("ann", event(5 + (mark == 2 * W), mark))
    assert len(twin.dropped["ann"]) == W
    twin.add("ann", event(5, 50))  # as old as the last one dropped: after all of its time
    twin.check("ann")
    assert twin.ring["ann"][-2] == event(5, 50)
    twin.add("ann", event(4, 51))  # before the anchor
    twin.check("ann")
    assert event(4, 51) not in twin.ring["ann"]


def test_random_arrivals_of_several_users():
    rng = np.random.default_rng(1)
    twin = Twin(window=4)
    clock = dict.fromkeys("abc", 0)
    for mark in range(600):
        user = rng.choice(list("abc"))
        clock[user] += int(rng.choice([0, 1, 3]))
        twin.add(user, event(max(0, clock[user] - int(rng.choice([0, 0, 0, 2, 9]))), mark))
        if mark % 7 == 0:
            twin.check(user)
    for user in clock:
        twin.check(user)
        assert len(twin.dropped[user]) > 100


def test_the_table_grows_and_keeps_what_it_has():
    twin = Twin()
    users = [f"user {n}" for n in range(2 * FIRST_CAPACITY + 3)]
    for round_ in range(2):
        for n, user in enumerate(users):
            twin.add(user, event(1 + round_ + n % 3, n))
    for user in users:
        twin.check(user)
    assert twin.table.slots[users[-1]] == len(users) - 1
    assert len(twin.table.accepted) == 4 * FIRST_CAPACITY


def test_a_new_user_starts_with_the_initial_states_also_after_growth():
    table = UserTable(SPEC, W)
    for n in range(FIRST_CAPACITY + 1):
        slot = table.slot(str(n))
        assert table.now["last_time"][slot] == -1
        assert table.anchor["last_time"][slot] == -1
        assert table.now["code"][slot].tolist() == [0, 0]
        assert not table.is_late(slot, -(10**15)), "nobody is late for a user without events"


def test_the_newest_users_can_be_forgotten_and_come_back_as_new():
    twin = Twin()
    twin.add("ann", event(1))
    twin.table.slot("bob")
    twin.table.slot("cid")
    twin.table.forget_newest(1)
    assert list(twin.table.slots) == ["ann"]
    twin.add("cid", event(2))
    assert twin.table.slots == {"ann": 0, "cid": 1}
    twin.check("cid")


def test_copied_and_restored_users_go_on_the_same():
    twin = Twin()
    for n in range(11):
        for user in ("ann", "bob"):
            twin.add(user, event(n, n if user == "ann" else 2 * n))
    users = list(twin.table.slots)
    again = Twin()
    again.table.make_room(len(users))
    twin.table.begin_cut()
    for user in users:
        again.table.restore_slots([user], twin.table.copy_slots(1))
    twin.table.cut = None
    again.ring, again.dropped = (
        {user: list(events) for user, events in part.items()} for part in (twin.ring, twin.dropped)
    )
    for array in twin.table.arrays.values():
        array[...] = 0  # these were copies
    for user in users:
        again.check(user)
        again.add(user, event(8, 5))
        again.add(user, event(20, 6))
        again.check(user)
    again.add("cid", event(1))
    again.check("cid")


@pytest.mark.parametrize("seed", range(20))
def test_copies_in_pieces_are_of_one_moment_while_users_come_and_change(monkeypatch, seed):
    """Also while the table grows, and where a ring drops its oldest or has an event put in."""
    monkeypatch.setattr("serve.users.FIRST_CAPACITY", 2)
    monkeypatch.setattr("serve.users.STRETCH", 2)
    rng = random.Random(seed)
    twin, again = Twin(), Twin()

    def some(count: int) -> None:
        for _ in range(count):
            user = f"u{rng.randrange(12)}"
            newest = max([e[0] for e in twin.ring.get(user, [])], default=0)
            twin.add(user, event(max(0, newest + rng.choice([1, 2, 2, -1, -3, -99])), rng.randrange(100)))
            twin.table.count(twin.table.slots[user])

    some(rng.choice([0, 3, 40, 120]))
    users = list(twin.table.slots)
    again.ring, again.dropped = (
        {user: list(events) for user, events in part.items()} for part in (twin.ring, twin.dropped)
    )
    accepted = [int(twin.table.accepted[slot]) for slot in twin.table.slots.values()]
    twin.table.begin_cut()
    again.table.make_room(len(users))
    while len(again.table.slots) < len(users):
        some(rng.choice([0, 1, 5, 20]))
        count = rng.choice([1, 2, 5])
        begin = len(again.table.slots)
        again.table.restore_slots(users[begin : begin + count], twin.table.copy_slots(count))
    twin.table.cut = None
    assert again.table.names == users
    assert again.table.accepted[: len(users)].tolist() == accepted
    for user in users:
        again.check(user)
        twin.check(user)


def test_a_model_without_numbers_and_context_has_no_values():
    spec = GraphSpec(0, 0, 0, (StateSpec("last_time", "int64", ("B",), -1),))
    table = UserTable(spec, 2)

    class Times:
        inputs = {"integers": np.zeros((1, 1), np.int64)}  # noqa: RUF012
        outputs = {"last_time" + NEXT: np.zeros(1, np.int64)}  # noqa: RUF012

        def states_after(self, integers: Any, values: Any, states: dict[str, Any]) -> dict[str, Any]:
            assert (values.shape, set(states)) == ((len(integers), 0), {"last_time"})
            return {"last_time": integers[-1:, 0]}

    graph = Times()
    slot = table.slot("ann")
    for time in (10, 20, 30, 40, 50):
        graph.inputs["integers"][0, 0] = graph.outputs["last_time" + NEXT][0] = time
        table.append(slot, time, graph)  # type: ignore[arg-type]
    table.insert(slot, 1, np.array([35]), None, graph)  # type: ignore[arg-type]
    assert table.integers[slot, : int(table.held[slot]), 0].tolist() == [30, 35, 40, 50]
    assert (table.anchor["last_time"][slot], table.middle["last_time"][slot]) == (20, 35)
