"""Fold many transactions into the users' memory at once: sequence.onnx over batches of users instead of a step each.

What comes out is what appending and inserting them one by one would give, up to the parity of the two graphs: a chunk of
a user's events ends where the ring keeps a state (after W and 2 W events), and a late event waits for those that arrived
before it. Users do not depend on each other, since the context that was read is part of an event.

Letters: N events in arrival order, A users that have some left, B users in a batch, T events in a chunk, W window, C, F, K
as in the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqfraud.context import NEVER
from seqfraud.graph import NEXT
from seqfraud.runtime import SequenceGraph, unpacked
from serve.users import UserTable

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

USERS = 256
"""B at most."""


@dataclass(frozen=True)
class Events:
    """N events in arrival order.

    Attributes:
        slot: int64 [N], the user's slot.
        integers: int64 [N, 1 + C], time (ms) and category ids.
        values: float32 [N, F + K], numbers and the context that was read.
    """

    slot: Int64
    integers: Int64
    values: Float32


def fold_many(users: UserTable, graph: SequenceGraph, events: Events) -> Float32:
    """Put events into the memory of their users; float32 [N]: the probability that the service gives each."""
    probability = np.full(len(events.slot), np.nan, dtype=np.float32)
    order = np.argsort(events.slot, kind="stable")
    slot = events.slot[order]
    begin = np.flatnonzero(np.diff(slot, prepend=-1))
    end = np.append(begin[1:], len(slot))
    late = _late(users, slot, events.integers[order, 0], begin)
    rows = np.arange(len(slot))
    next_late = np.minimum.accumulate(np.where(late, rows, len(rows))[::-1])[::-1]
    np.add.at(users.accepted, slot, 1)
    at = begin
    while len(at):
        until = np.minimum(next_late[at], end)
        for some, length in _chunks(users, slot[at], until - at):
            inside = np.arange(length.max()) < length[:, None]
            source = np.where(inside, at[some, None] + np.arange(inside.shape[1]), at[some, None])
            scores = _append(users, graph, slot[at[some]], length, events, order[source], inside)
            probability[order[source[inside]]] = scores[inside]
            at[some] += length
        waiting = (at == until) & (at < end)
        for row in order[at[waiting]].tolist():
            probability[row] = _take_late(users, graph, events, row)
        at[waiting] += 1
        at, end = at[at < end], end[at < end]
    return probability


def _late(users: UserTable, slot: Int64, time: Int64, begin: Int64) -> npt.NDArray[np.bool_]:
    """Mask [N] of the events that are older than their user's newest when they arrive.

    Args:
        slot, time: int64 [N], by user, then in arrival order.
        begin: int64, the first row of each user.
    """
    user = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(slot)))
    newest = np.where(users.held[slot[begin]] > 0, users.newest[slot[begin]], NEVER)
    # ranks instead of times, shifted by user: a running maximum that starts anew with each user cannot overflow
    ranks = np.unique(np.insert(time, begin, newest), return_inverse=True)[1]
    shift = np.insert(user, begin, np.arange(len(begin))) * len(ranks)
    so_far = np.maximum.accumulate(ranks + shift)
    here = np.arange(len(slot)) + user + 1
    mask: npt.NDArray[np.bool_] = (ranks + shift)[here] < so_far[here - 1]
    return mask


def _chunks(users: UserTable, slot: Int64, wanted: Int64) -> Iterator[tuple[Int64, Int64]]:
    """Places in `slot` [A] of at most USERS users each, and how many of their next events [A] come before a state is kept."""
    window = users.window
    held = users.held[slot]
    room = np.where(held < window, window - held, np.where(held < 2 * window, 2 * window - held, window))
    length = np.minimum(wanted, room)
    some = np.flatnonzero(length)
    some = some[np.argsort(-length[some], kind="stable")]
    for first in range(0, len(some), USERS):
        batch = some[first : first + USERS]
        yield batch, length[batch]


def _append(
    users: UserTable,
    graph: SequenceGraph,
    slot: Int64,
    length: Int64,
    events: Events,
    source: Int64,
    inside: npt.NDArray[np.bool_],
) -> Float32:
    """Append the events `source` [B, T], where `inside`, to the rings of B users; float32 [B, T], their probabilities."""
    spec = users.spec
    users.drop_oldest(slot[users.held[slot] == 2 * users.window])
    states = {s.name: s.to_batch(users.now[s.name][slot]) for s in spec.states}
    integers, values = events.integers[source], events.values[source]
    outputs = graph.run({**unpacked(spec, integers, values), "length": length, **states})
    user, step = np.nonzero(inside)
    place = users.held[slot[user]] + step
    users.integers[slot[user], place] = integers[inside]
    users.values[slot[user], place] = values[inside]
    for state in spec.states:
        users.now[state.name][slot] = state.to_rows(outputs[state.name + NEXT])
    users.held[slot] += length
    users.newest[slot] = integers[np.arange(len(slot)), length - 1, 0]
    users.keep_middle(slot[users.held[slot] == users.window])
    probability: Float32 = outputs["probability"]
    return probability


def _take_late(users: UserTable, graph: SequenceGraph, events: Events, row: int) -> float:
    """Insert a late event, or pass over one that is older than the ring; its probability."""
    slot, integers, values = int(events.slot[row]), events.integers[row], events.values[row]
    time = int(integers[0])
    too_late = users.is_too_late(slot, time)
    place = users.place_of(slot, time)
    states = users.anchor_states(slot) if too_late else users.states_at(slot, place, graph)
    one = unpacked(users.spec, integers[None, None], values[None, None])
    outputs = graph.run({**one, "length": np.ones(1, dtype=np.int64), **states})
    if not too_late:
        users.insert(slot, place, integers, values, graph)
    return float(outputs["probability"][0, 0])
