"""Per user in memory: the declared states, a ring of recent events, and the anchor before the oldest of them.

Struct of arrays, one slot per user. The ring holds at most 2 W events. When it overflows, the oldest W are dropped and
the anchor moves to the state after them, which was copied when it was current: no graph call. A late event is inserted
at its place in the ring and the later state rebuilt from the anchor with sequence.onnx, and so is exact.

Letters: N slots, W window, C, F, K as in the graph.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.cut import Cut
from seqfraud.graph import NEXT, GraphSpec
from seqfraud.runtime import SequenceGraph, StepGraph, unpacked

Array = npt.NDArray[Any]
FIRST_CAPACITY = 256
RINGS = ("integers", "values")


class UserTable:
    """State of every user seen; see the module."""

    def __init__(self, spec: GraphSpec, window: int) -> None:
        self.spec = spec
        self.window = window
        self.slots: dict[str, int] = {}
        wide = 2 * window + 1  # one more: a late event is inserted before the oldest are dropped
        self._shapes: dict[str, tuple[tuple[int, ...], Any, Any]] = {
            "accepted": ((), np.int64, 0),
            "held": ((), np.int64, 0),
            "dropped": ((), np.int64, 0),
            "newest": ((), np.int64, 0),
            "anchor_time": ((), np.int64, 0),
            "integers": ((wide, 1 + spec.categorical), np.int64, 0),
            "values": ((wide, spec.numeric + spec.context), np.float32, 0),
        }
        for state in spec.states:
            for stage in ("now", "middle", "anchor"):
                self._shapes[f"{stage}.{state.name}"] = (state.row_shape, np.dtype(state.dtype), state.initial)
        self.names: list[str] = []
        """The keys of `slots` in slot order."""
        self.cut: Cut[dict[str, Array]] | None = None
        """Set while a snapshot reads the slots a piece at a time."""
        self.arrays: dict[str, Array] = {name: self._block(name, FIRST_CAPACITY) for name in self._shapes}
        self._bind()

    def _block(self, name: str, rows: int) -> Array:
        shape, dtype, initial = self._shapes[name]
        # zeros are not touched until they are written, so that empty rings cost no memory
        return np.zeros((rows, *shape), dtype) if initial == 0 else np.full((rows, *shape), initial, dtype)

    def _bind(self) -> None:
        a = self.arrays
        self.accepted, self.held, self.dropped = a["accepted"], a["held"], a["dropped"]
        self.newest, self.anchor_time = a["newest"], a["anchor_time"]
        self.integers, self.values = a["integers"], a["values"]
        self.now = {s.name: a[f"now.{s.name}"] for s in self.spec.states}
        self.middle = {s.name: a[f"middle.{s.name}"] for s in self.spec.states}
        self.anchor = {s.name: a[f"anchor.{s.name}"] for s in self.spec.states}

    def slot(self, user: str) -> int:
        """The slot of a user, made where the user is new."""
        slot = self.slots.get(user)
        if slot is None:
            slot = len(self.slots)
            if slot == len(self.accepted):
                self.arrays = {
                    name: np.concatenate([array, self._block(name, len(array))]) for name, array in self.arrays.items()
                }
                self._bind()
            self.slots[user] = slot
            self.names.append(user)
        return slot

    def forget_newest(self, left: int) -> None:
        """Forget users that were made last, and to whom nothing happened, until `left` are left."""
        while len(self.slots) > left:
            self.slots.popitem()
            self.names.pop()

    def is_late(self, slot: int, time: int) -> bool:
        """Whether an event is older than its user's newest."""
        return bool(self.held[slot] and time < self.newest[slot])

    def is_too_late(self, slot: int, time: int) -> bool:
        """Whether a late event belongs before the anchor, where nothing can be inserted any more."""
        return bool(self.dropped[slot] and time < self.anchor_time[slot])

    def count(self, slot: int) -> None:
        """One more transaction of the user was accepted."""
        if self.cut is not None:
            self.cut.keep((slot,))
        self.accepted[slot] += 1

    def append(self, slot: int, time: int, step: StepGraph) -> None:
        """Keep the event that the step graph's buffers hold, and the states that it gave."""
        if self.cut is not None:
            self.cut.keep((slot,))
        held = int(self.held[slot])
        if held == 2 * self.window:
            self.drop_oldest(slot)
            held = self.window
        self.integers[slot, held] = step.inputs["integers"][0]
        if "values" in step.inputs:
            self.values[slot, held] = step.inputs["values"][0]
        for state in self.spec.states:
            self.now[state.name][slot] = state.to_rows(step.outputs[state.name + NEXT])[0]
        held += 1
        self.held[slot] = held
        self.newest[slot] = time
        if held == self.window:
            self.keep_middle(slot)

    def keep_middle(self, slot: int | Array) -> None:
        """Copy the state after the oldest W events, which the anchor moves to when they are dropped."""
        for name, middle in self.middle.items():
            middle[slot] = self.now[name][slot]

    def drop_oldest(self, slot: int | Array) -> None:
        """Drop the oldest W of 2 W events of one user or several: the anchor moves to the state after them."""
        w = self.window
        self.anchor_time[slot] = self.integers[slot, w - 1, 0]
        for array in (self.integers, self.values):
            array[slot, :w] = array[slot, w : 2 * w]
        for name, anchor in self.anchor.items():
            anchor[slot] = self.middle[name][slot]
        self.dropped[slot] += w
        self.held[slot] = w
        self.keep_middle(slot)

    def place_of(self, slot: int, time: int) -> int:
        """Index in the ring at which an event of that time belongs: after those of the same time."""
        held = int(self.held[slot])
        return int(np.searchsorted(self.integers[slot, :held, 0], time, side="right"))

    def states_at(self, slot: int, place: int, graph: SequenceGraph) -> dict[str, Array]:
        """The states, as graph inputs of batch 1, before the ring's event `place`."""
        if place < self.window:
            begin, before = 0, self.anchor_states(slot)
        else:
            begin, before = self.window, self._as_inputs(self.middle, slot)
        if place == begin:
            return before
        return self._advance(slot, begin, place, before, graph)

    def anchor_states(self, slot: int) -> dict[str, Array]:
        """The states, as graph inputs of batch 1, before the ring's oldest event."""
        return self._as_inputs(self.anchor, slot)

    def _as_inputs(self, stage: Mapping[str, Array], slot: int) -> dict[str, Array]:
        return {s.name: s.to_batch(stage[s.name][slot : slot + 1]) for s in self.spec.states}

    def insert(self, slot: int, place: int, integers: Array, values: Array | None, graph: SequenceGraph) -> None:
        """Insert a late event at its place and rebuild the later states."""
        if self.cut is not None:
            self.cut.keep((slot,))
        held = int(self.held[slot])
        new = {"integers": np.insert(self.integers[slot, :held], place, integers, axis=0)}
        new["values"] = np.insert(self.values[slot, :held], place, 0 if values is None else values, axis=0)
        w = self.window
        states = self.anchor_states(slot)
        # states at every multiple of W, then at the end
        self.integers[slot, : held + 1] = new["integers"]
        self.values[slot, : held + 1] = new["values"]
        stages: list[Mapping[str, Array]] = []
        at = 0
        while at < held + 1:
            upto = min(at + w, held + 1)
            states = self._advance(slot, at, upto, states, graph)
            stages.append(states)
            at = upto
        self.held[slot] = held + 1
        if held + 1 >= w:
            self._write(self.middle, slot, stages[0])
        self._write(self.now, slot, stages[-1])
        if held + 1 > 2 * w:
            self.anchor_time[slot] = self.integers[slot, w - 1, 0]
            for array in (self.integers, self.values):
                array[slot, : w + 1] = array[slot, w : 2 * w + 1].copy()
            self._write(self.anchor, slot, stages[0])
            self._write(self.middle, slot, stages[1])
            self.dropped[slot] += w
            self.held[slot] = w + 1

    def _write(self, stage: Mapping[str, Array], slot: int, states: Mapping[str, Array]) -> None:
        for state in self.spec.states:
            stage[state.name][slot] = state.to_rows(states[state.name])[0]

    def _advance(
        self, slot: int, begin: int, end: int, states: Mapping[str, Array], graph: SequenceGraph
    ) -> dict[str, Array]:
        """States after the ring's events begin to end, from the states before them."""
        inputs = unpacked(self.spec, self.integers[slot, None, begin:end], self.values[slot, None, begin:end])
        outputs = graph.run({**inputs, "length": np.array([end - begin]), **states})
        return {s.name: outputs[s.name + NEXT] for s in self.spec.states}

    # ---- snapshots

    def begin_cut(self) -> None:
        """From here on `copy_slots` gives the slots as they are now."""
        self.cut = Cut(len(self.slots), self._save)

    def _save(self, slot: int) -> dict[str, Array]:
        here = slice(slot, slot + 1)
        used = self._used(self.held[here], self.dropped[here])
        return {name: _packed(self._rows(name, here), used[name]) for name in self.arrays}

    def _used(self, held: Array, dropped: Array) -> dict[str, Array]:
        """How many rows of each array are in use by each user [N]; the others are as they were made, or left over."""
        stages = {"middle": held >= self.window, "anchor": dropped > 0}
        used = {name: stages.get(name.partition(".")[0], np.ones(len(held))).astype(np.int64) for name in self.arrays}
        return used | dict.fromkeys(RINGS, held)

    def _rows(self, name: str, slots: slice) -> Array:
        """A view [N, rows per user, ...] of an array: of the rings many rows, else one."""
        array = self.arrays[name][slots]
        return array if name in RINGS else array[:, None]

    def copy_slots(self, count: int) -> dict[str, Array]:
        """The next slots of the cut, at most `count`: of each array [sum of the rows in use, ...] what is in use."""
        assert self.cut is not None
        begin, end, kept = self.cut.advance(count)
        slots = slice(begin, end)
        held, dropped = self.held[slots].copy(), self.dropped[slots].copy()
        for at, saved in kept:
            held[at], dropped[at] = saved["held"][0], saved["dropped"][0]
        out = {}
        for name, used in self._used(held, dropped).items():
            packed = out[name] = _packed(self._rows(name, slots), used)
            ends = np.cumsum(used)
            for at, saved in kept:
                packed[ends[at] - used[at] : ends[at]] = saved[name]
        return out

    def make_room(self, users: int) -> None:
        """Arrays for so many users, for an empty table."""
        room = FIRST_CAPACITY
        while room < users:
            room *= 2
        self.arrays = {name: self._block(name, room) for name in self._shapes}
        self._bind()

    def restore_slots(self, users: list[str], arrays: Mapping[str, Array]) -> None:
        """More users in slot order, and what `copy_slots` gave of them; there has to be room."""
        slots = slice(len(self.names), len(self.names) + len(users))
        self.slots.update(zip(users, range(slots.start, slots.stop), strict=True))
        self.names.extend(users)
        for name, used in self._used(arrays["held"], arrays["dropped"]).items():
            _unpack(self._rows(name, slots), used, arrays[name])


def _packed(rows: Array, used: Array) -> Array:
    """The first rows [N, rows per user, ...] of each user, as many as used [N] says, one after the other; a copy."""
    most = int(used.max(initial=0))
    if most == used.min(initial=most):
        return rows[:, :most].copy().reshape(len(rows) * most, *rows.shape[2:])
    packed: Array = rows[:, :most][np.arange(most) < used[:, None]]
    return packed


def _unpack(rows: Array, used: Array, packed: Array) -> None:
    """The inverse of `_packed`, into `rows`."""
    most = int(used.max(initial=0))
    if most == used.min(initial=most):
        rows[:, :most] = packed.reshape(len(rows), most, *rows.shape[2:])
    else:
        rows[:, :most][np.arange(most) < used[:, None]] = packed
