"""Per user in memory: the declared states, a ring of recent events, and the anchor before the oldest of them.

Struct of arrays, one slot per user. The ring holds at most 2 W events. When it overflows, the oldest W are dropped and
the anchor moves to the state after them, which was copied when it was current: no graph call. A late event is inserted
at its place in the ring and the later state rebuilt from the anchor with sequence.onnx, and so is exact.

Letters: N slots, W window, C, F, K as in the graph.
"""

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.admission import RECENT
from seqfraud.cut import Cut
from seqfraud.graph import NEXT, GraphSpec
from seqfraud.runtime import SequenceGraph, StepGraph

Array = npt.NDArray[Any]
FIRST_CAPACITY = 256
RINGS = ("integers", "values")
STRETCH = 4096
"""Slots that are copied at a time when the table grows."""


@dataclass(frozen=True, slots=True)
class Past:
    """Some events of a user, oldest first, and what is known of the states between them.

    Attributes:
        integers: int64 [n, 1 + C].
        values: float32 [n, F + K].
        states: (place, rows [1, *row_shape] of the states before event `place`, as the table has them); the first is at 0.
    """

    integers: Array
    values: Array
    states: tuple[tuple[int, Mapping[str, Array]], ...]


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
        }
        for state in spec.states:
            for stage in ("now", "middle", "anchor"):
                self._shapes[f"{stage}.{state.name}"] = (state.row_shape, np.dtype(state.dtype), state.initial)
        self._record = np.dtype([(name, dtype, shape) for name, (shape, dtype, _) in self._shapes.items()])
        """Everything of a slot but the rings."""
        self._shapes["integers"] = ((wide, 1 + spec.categorical), np.int64, 0)
        self._shapes["values"] = ((wide, spec.numeric + spec.context), np.float32, 0)
        self.names: list[str] = []
        """The keys of `slots` in slot order."""
        self.cut: Cut[bytes] | None = None
        """Set while a snapshot reads the slots a piece at a time."""
        self.arrays: dict[str, Array] = {name: self._block(name, FIRST_CAPACITY) for name in self._shapes}
        self._bind()

    def _block(self, name: str, rows: int) -> Array:
        shape, dtype, initial = self._shapes[name]
        if initial != 0:
            return np.full((rows, *shape), initial, dtype)
        if name in RINGS:
            # event by event in memory: rings that are short everywhere leave whole pages untouched, which cost nothing
            return _untouched((shape[0], rows, *shape[1:]), dtype).swapaxes(0, 1)
        return _untouched((rows, *shape), dtype)

    def _bind(self) -> None:
        a = self.arrays
        self.accepted, self.held, self.dropped = a["accepted"], a["held"], a["dropped"]
        self.newest, self.anchor_time = a["newest"], a["anchor_time"]
        self.integers, self.values = a["integers"], a["values"]
        self.now = {s.name: a[f"now.{s.name}"] for s in self.spec.states}
        self.middle = {s.name: a[f"middle.{s.name}"] for s in self.spec.states}
        self.anchor = {s.name: a[f"anchor.{s.name}"] for s in self.spec.states}
        # in no snapshot and not moved when the table grows: what is not here is worked out by the graph
        rows = (len(self.accepted), RECENT)
        self.recent_at = _untouched(rows, np.int64)
        """Of which event: one more than how many of the user's came before it, dropped ones too; 0 where it is none."""
        self.recent = {s.name: _untouched((*rows, *s.row_shape), np.dtype(s.dtype)) for s in self.spec.states}

    def slot(self, user: str) -> int:
        """The slot of a user, made where the user is new."""
        slot = self.slots.get(user)
        if slot is None:
            slot = len(self.slots)
            if slot == len(self.accepted):
                self._grow()
            self.slots[user] = slot
            self.names.append(user)
        return slot

    def _grow(self) -> None:
        size = len(self.accepted)
        grown = {name: self._block(name, 2 * size) for name in self._shapes}
        for begin in range(0, size, STRETCH):
            end = begin + STRETCH
            masks = self._in_use(self.held[begin:end], self.dropped[begin:end])
            for name, array in self.arrays.items():
                mask = masks.get(name)
                _put(grown[name][begin : min(end, size)], mask, _taken(array[begin:end], mask))
        self.arrays = grown
        self._bind()

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
        at = int(self.dropped[slot]) + held
        self.recent_at[slot, at % RECENT] = at + 1
        for state in self.spec.states:
            now = self.now[state.name]
            self.recent[state.name][slot, at % RECENT] = now[slot]
            now[slot] = state.to_rows(step.outputs[state.name + NEXT])[0]
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
        return graph.states_after(self.integers[slot, begin:place], self.values[slot, begin:place], before)

    def before(self, slot: int, place: int) -> Past:
        """The ring's events before `place`, as views, and the states that are kept of that time."""
        kept = [(0, _rows(self.anchor, slot))]
        if self.window <= place:
            kept.append((self.window, _rows(self.middle, slot)))
        dropped = int(self.dropped[slot])
        for i, at in enumerate(self.recent_at[slot].tolist()):
            if 0 < at - dropped <= place + 1:
                kept.append((at - 1 - dropped, {name: rows[slot, i : i + 1] for name, rows in self.recent.items()}))
        return Past(self.integers[slot, :place], self.values[slot, :place], tuple(kept))

    def anchor_states(self, slot: int) -> dict[str, Array]:
        """The states, as graph inputs of batch 1, before the ring's oldest event."""
        return self._as_inputs(self.anchor, slot)

    def _as_inputs(self, stage: Mapping[str, Array], slot: int) -> dict[str, Array]:
        return self.spec.to_batch(_rows(stage, slot))

    def insert(self, slot: int, place: int, integers: Array, values: Array | None, graph: SequenceGraph) -> None:
        """Insert a late event at its place and rebuild the later states."""
        self.prepare_insert(slot, place, integers, values, graph)()

    def prepare_insert(
        self, slot: int, place: int, integers: Array, values: Array | None, graph: SequenceGraph
    ) -> Callable[[], None]:
        """What inserts a late event at its place with the later states, which are computed here: it cannot fail any more.

        It is to be called before the user changes, or never.
        """
        held = int(self.held[slot])
        new_integers = np.insert(self.integers[slot, :held], place, integers, axis=0)
        new_values = np.insert(self.values[slot, :held], place, 0 if values is None else values, axis=0)
        w = self.window
        states = self.anchor_states(slot)
        # states at every multiple of W, then at the end
        stages: list[Mapping[str, Array]] = []
        for at in range(0, held + 1, w):
            upto = min(at + w, held + 1)
            states = graph.states_after(new_integers[at:upto], new_values[at:upto], states)
            stages.append(states)

        def insert() -> None:
            if self.cut is not None:
                self.cut.keep((slot,))
            self.recent_at[slot] = 0
            self.integers[slot, : held + 1] = new_integers
            self.values[slot, : held + 1] = new_values
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

        return insert

    def _write(self, stage: Mapping[str, Array], slot: int, states: Mapping[str, Array]) -> None:
        for state in self.spec.states:
            stage[state.name][slot] = state.to_rows(states[state.name])[0]

    def _in_use(self, held: Array, dropped: Array) -> dict[str, Array]:
        """Masks of the arrays that are partly in use, [N] or [N, events]; the rest is as it was made, or left over."""
        by_stage = {"middle": held >= self.window, "anchor": dropped > 0}
        masks = {f"{stage}.{s.name}": mask for stage, mask in by_stage.items() for s in self.spec.states}
        return masks | dict.fromkeys(RINGS, np.arange(2 * self.window + 1) < held[:, None])

    # ---- snapshots

    def begin_cut(self) -> None:
        """From here on `copy_slots` gives the slots as they are now."""
        self.cut = Cut(len(self.slots), self._save)

    def _save(self, slot: int) -> bytes:
        """A slot as a `_record` and what the rings hold: one thing, of which hundred thousands may have to be kept."""
        held = self.held[slot]
        parts = [a[slot, :held] if name in RINGS else a[slot] for name, a in self.arrays.items()]
        return b"".join([part.tobytes() for part in parts])

    def copy_slots(self, count: int) -> dict[str, Array]:
        """The next slots of the cut, at most `count`: of each array [N, ...], or of what is in use of it [n, ...]."""
        assert self.cut is not None
        begin, end, kept = self.cut.advance(count)
        if not kept:
            masks = self._in_use(self.held[begin:end], self.dropped[begin:end])
            return {name: _taken(array[begin:end], masks.get(name)) for name, array in self.arrays.items()}
        at = [index for index, _ in kept]
        rows = np.frombuffer(b"".join([saved[: self._record.itemsize] for _, saved in kept]), self._record)
        held, dropped = self.held[begin:end].copy(), self.dropped[begin:end].copy()
        held[at], dropped[at] = rows["held"], rows["dropped"]
        masks = self._in_use(held, dropped)
        out = {name: _taken(array[begin:end], masks.get(name)) for name, array in self.arrays.items()}
        for name in self._record.names or ():
            if name in masks:
                used = masks[name][at]
                out[name][np.cumsum(masks[name])[at][used] - 1] = rows[name][used]
            else:
                out[name][at] = rows[name]
        ours = np.zeros(len(held), dtype=bool)
        ours[at] = True
        start = np.full(len(kept), self._record.itemsize)
        for name in RINGS:
            ring = out[name]
            stop = start + rows["held"] * ring.shape[-1] * ring.itemsize
            parts = [saved[i:j] for (_, saved), i, j in zip(kept, start.tolist(), stop.tolist(), strict=True)]
            if ring.size:
                ring[np.repeat(ours, held)] = np.frombuffer(b"".join(parts), ring.dtype).reshape(-1, ring.shape[-1])
            start = stop
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
        masks = self._in_use(arrays["held"], arrays["dropped"])
        for name, array in self.arrays.items():
            _put(array[slots], masks.get(name), arrays[name])


def _rows(stage: Mapping[str, Array], slot: int) -> dict[str, Array]:
    """Views of what a stage has of one user, [1, *row_shape]."""
    return {name: rows[slot : slot + 1] for name, rows in stage.items()}


def _taken(array: Array, mask: Array | None) -> Array:
    """A copy of what a mask says of an array, or of all of it."""
    if mask is None:
        return array.copy()
    rest = array.shape[mask.ndim :]
    if math.prod(rest) == 0:
        return array[mask]
    taken = _items(array, mask.ndim)[mask]
    return taken.view(array.dtype).reshape(len(taken), *rest)


def _put(array: Array, mask: Array | None, values: Array) -> None:
    """The inverse: write values where a mask says, or everywhere."""
    if mask is None:
        array[...] = values
    elif values.size:
        _items(array, mask.ndim)[mask] = _items(values, 1)


def _items(array: Array, axes: int) -> Array:
    """A view with the first axes only: what lies behind them is one item, which NumPy copies several times as fast."""
    shape, width = array.shape[:axes], math.prod(array.shape[axes:])
    return array.reshape(*shape, width, copy=False).view(np.dtype((np.void, width * array.itemsize)))[..., 0]


def _untouched(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros whose memory is given by the system in small pages, when they are written; NumPy asks for huge pages."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
