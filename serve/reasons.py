"""The reasons of an answer, and the explanation of one on demand: a transaction scored again with things replaced.

`Explainer.reasons` is what a transaction gets that is not approved: each reason that is true of it (`seqfraud.reasons`)
becomes one row of one call of the step graph, with the usual value in place of what it names; its contribution is by how
much the log-odds of fraud fall. Contributions of things that work together do not add up.

`Explainer.explain` attributes the log-odds to every input (Shapley values, which add up) and to every past event
(occlusion: the history without it).

Both are functions of a `Situation` alone, so that an audit can work them out from the journal.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Manifest
from seqfraud.context import NEVER
from seqfraud.errors import BundleError
from seqfraud.graph import LAST_PLACE, LAST_TIME
from seqfraud.reasons import Change, Event, Replacements
from seqfraud.runtime import SequenceGraph, StepGraph, unpacked
from serve.answers import Attribution, Reason
from serve.users import Past

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Rows = slice | npt.NDArray[np.int64]

MOST = 4
"""Reasons of an answer."""
NOTICEABLE = 0.2
"""A contribution in log-odds below which nothing is a reason: the odds change by a fifth."""
ORDERS = 32
"""Orders of the inputs over which a Shapley value is averaged."""
COMBINATION = Reason(
    "combination", "no single thing explains the score; several that are usual alone come together", None
)
"""The reason where no other is noticeable."""
UNEXPLAINED = Reason("unexplained", "what raised the score could not be worked out", None)
"""The reason where the graph fails that finds them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Situation:
    """A transaction at its place in its user's history.

    Attributes:
        integers: int64 [1 + C], as the step graph has it.
        values: float32 [F + K], the context as it was read among them; empty where there are none.
        amount: 0 where it is missing.
        states: graph inputs of batch 1 before the transaction.
        past: the events before it that the ring holds.
    """

    integers: Array
    values: Array
    amount: float
    states: Mapping[str, Array]
    past: Past


@dataclass(frozen=True, slots=True)
class Explained:
    """Log-odds of a transaction and what they are made of.

    Attributes:
        log_odds: of the transaction as it is.
        base: with every input at its usual value and the same history; the contributions of `inputs` add up to the
            difference.
        inputs: Shapley values, the largest first.
        without_history: as it is, with nothing of the n events before.
        events: by how much the log-odds fall without each of the n events, oldest first.
    """

    log_odds: float
    base: float
    inputs: list[Attribution]
    without_history: float
    events: list[float]

    @property
    def probability(self) -> float:
        """Of fraud."""
        return 1 / (1 + math.exp(-self.log_odds)) if self.log_odds >= 0 else 1 - 1 / (1 + math.exp(self.log_odds))


class Explainer:
    """Explains with the graphs of one bundle. `reasons` and `explain` are thread-safe and keep nothing from call to call."""

    def __init__(self, manifest: Manifest, step: StepGraph, sequence: SequenceGraph) -> None:
        """Raises BundleError where the calibration has no usable scale."""
        self._spec = manifest.graph
        self._replacements = Replacements(manifest)
        self._step = step
        self._sequence = sequence
        self._scale, self._shift = (_calibration(manifest, name, default) for name, default in _CALIBRATION)
        self._has_values = bool(manifest.graph.numeric + manifest.graph.context)
        self.failures = 0
        """Answers that went out unexplained."""
        self._failing = False

    def reasons(self, situation: Situation) -> list[Reason]:
        """What raises the score most, the largest contribution first; empty where nothing is noticeable."""
        changes = self._changes(situation, unusual=True)
        if not changes:
            return []
        rows = [slice(i, i + 1) for i in range(1, 1 + len(changes))]
        logit = self._logits(situation, changes, rows, 1 + len(changes))
        fall = (self._scale * (logit[0] - logit[1:])).tolist()
        named = sorted(zip(fall, changes, strict=True), key=lambda pair: -pair[0])
        return [Reason(c.code, c.text, round(x, 4)) for x, c in named[:MOST] if x >= NOTICEABLE]

    def given(self, situation: Situation) -> list[Reason]:
        """The same for an answer, which goes out unexplained where a graph fails: score and decision stand without it."""
        try:
            reasons = self.reasons(situation)
        except Exception as error:  # onnxruntime's exceptions have no common root, and their words may quote a value
            self.failures += 1
            if not self._failing:
                _log.error("reasons cannot be worked out: %s", type(error).__name__)
            self._failing = True
            return [UNEXPLAINED]
        if self._failing:
            _log.warning("reasons are worked out again")
            self._failing = False
        return reasons

    def explain(self, situation: Situation) -> Explained:
        """Everything: about thirty rows per input, and a history per past event."""
        changes = [change for change in self._changes(situation) if not change.of_history]
        orders = _orders(len(changes))
        replaced, which = np.unique(_steps(orders), axis=0, return_inverse=True)
        rows = [np.flatnonzero(mask) for mask in replaced.T]
        odds = self._log_odds(self._logits(situation, changes, rows, len(replaced)))[which].reshape(len(orders), -1)
        falls = np.empty(orders.shape)
        np.put_along_axis(falls, orders, odds[:, :-1] - odds[:, 1:], axis=1)
        inputs = [
            Attribution(change.input, change.value, change.usual, round(x, 4))
            for change, x in zip(changes, falls.mean(axis=0).tolist(), strict=True)
        ]
        inputs.sort(key=lambda attribution: -abs(attribution.contribution))
        history = self._occluded(situation)
        return Explained(
            float(odds[0, 0]), float(odds[0, -1]), inputs, float(history[-1]), (history[0] - history[1:-1]).tolist()
        )

    def _changes(self, situation: Situation, unusual: bool = False) -> list[Change]:
        past = situation.past
        event = Event(situation.integers, situation.values, situation.amount, past.integers, past.values)
        return self._replacements.of(event, unusual)

    def _log_odds(self, logit: Array) -> Array:
        return self._scale * logit.astype(np.float64) + self._shift

    def _logits(self, situation: Situation, changes: list[Change], rows: Sequence[Rows], count: int) -> Array:
        """float32 [count]: logits with each change made in the rows that are said."""
        spec = self._spec
        integers = situation.integers[None].repeat(count, axis=0)
        values = situation.values[None].repeat(count, axis=0)
        states = {s.name: situation.states[s.name].repeat(count, axis=s.batch_axis) for s in spec.states}
        last = states.get(LAST_TIME)
        for change, at in zip(changes, rows, strict=True):
            if change.of_history:
                past, left = situation.past, change.left_out
                before = spec.to_batch(past.states[0][1]) if left is None else self._states_without(past, left)
                for s in spec.states:
                    if not (change.forgotten and s.name in (LAST_TIME, LAST_PLACE)):
                        states[s.name][(slice(None),) * s.batch_axis + (at,)] = before[s.name]
            for place, put in zip(change.at, change.put, strict=True):
                values[at, place] = put
            if change.category is not None:
                integers[at, 1 + change.category[0]] = change.category[1]
            if change.moved:
                integers[at, 0] += change.moved
            if last is not None and (change.moved or change.closer) and situation.states[LAST_TIME][0] != NEVER:
                last[at] += change.moved + change.closer
        inputs = {"integers": integers, **states}
        if self._has_values:
            inputs["values"] = values
        return self._step.logits(inputs)

    def states_before(self, past: Past) -> Mapping[str, Array]:
        """The states, as graph inputs of batch 1, after all events of a past."""
        return self._states_without(past, range(len(past.integers), len(past.integers)))

    def _states_without(self, past: Past, left: range) -> Mapping[str, Array]:
        """The same without some of the events."""
        place, rows = max((kept for kept in past.states if kept[0] <= left.start), key=lambda kept: kept[0])
        states = self._spec.to_batch(rows)
        integers, values = past.integers[place : left.start], past.values[place : left.start]
        if left.stop < len(past.integers):
            integers = np.concatenate([integers, past.integers[left.stop :]])
            values = np.concatenate([values, past.values[left.stop :]])
        return self._sequence.states_after(integers, values, states) if len(integers) else states

    def _occluded(self, situation: Situation) -> Array:
        """Log-odds [1 + n + 1] with the whole history, without each of the n events, and without all of them.

        Each history is run again from before its oldest event. The gap of an event that follows the one left out is that to
        the one before; contexts stay as they were read.
        """
        past, spec = situation.past, self._spec
        integers = np.concatenate([past.integers, situation.integers[None]])
        values = np.concatenate([past.values, situation.values[None]])
        n = len(past.integers)
        everything = np.arange(n + 1)
        histories = [everything, *(np.delete(everything, i) for i in range(n)), everything[n:]]
        length = np.array([len(history) for history in histories])
        events = np.zeros((len(histories), n + 1), dtype=np.int64)
        for row, history in zip(events, histories, strict=True):
            row[: len(history)] = history
        states = spec.to_batch(past.states[0][1]) if n else situation.states
        outputs = self._sequence.run(
            {
                **unpacked(spec, integers[events], values[events]),
                "length": length,
                **{s.name: np.repeat(states[s.name], len(histories), axis=s.batch_axis) for s in spec.states},
            }
        )
        return self._log_odds(outputs["logit"][np.arange(len(histories)), length - 1])


_CALIBRATION = (("scale", 1.0), ("shift", 0.0))


def _calibration(manifest: Manifest, name: str, default: float) -> float:
    """scale and shift: log-odds = scale * logit + shift. Raises BundleError."""
    seen = manifest.calibration.get(name, default)
    if not isinstance(seen, int | float) or isinstance(seen, bool):
        raise BundleError(f"manifest: calibration.{name}: seen {seen!r:.60}; expected a number")
    return float(seen)


def _orders(count: int) -> npt.NDArray[np.int64]:
    """int64 [ORDERS, count]: orders in which inputs are replaced, always the same; every one is there backwards too."""
    rng = np.random.default_rng(0)
    half = np.array([rng.permutation(count) for _ in range(ORDERS // 2)], dtype=np.int64).reshape(-1, count)
    return np.concatenate([half, half[:, ::-1]])


def _steps(orders: npt.NDArray[np.int64]) -> Mask:
    """bool [orders * (1 + inputs), inputs]: of each order, what is replaced after 0, 1, ... of its inputs."""
    count = orders.shape[1]
    rank = np.argsort(orders, axis=1)
    masks: Mask = rank[:, None, :] < np.arange(count + 1)[None, :, None]
    return masks.reshape(-1, count)
