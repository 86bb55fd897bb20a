"""Everything that belongs to one bundle: its graphs, its decoder and its rules, and memory as it knows it.

A service holds the one in force, and may hold others beside it: one that is being made ready to come into force, and those
that score in shadow. An engine knows nothing of requests and answers nobody; it reads the journal and writes nothing.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle, Manifest
from seqfraud.errors import ModelError, RunError, SeqfraudError
from seqfraud.identifiers import Identifiers, treatments
from seqfraud.runtime import SequenceGraph, StepGraph, initial_states
from serve.answers import Answer
from serve.control import Control
from serve.decoding import Limits, Transaction, TransactionDecoder
from serve.facts import Case, recent_of
from serve.journal import Journal, LabelRecord, TransactionRecord
from serve.memory import Memory
from serve.reasons import COMBINATION, Explainer, Situation
from serve.records import Record
from serve.rulebook import RuleBook
from serve.snapshot import Pause, Piece

__all__ = ["Engine", "ReadsAlike", "Scored", "context_key", "graphs_may_fail", "require_same_fields"]

Array = npt.NDArray[Any]

AT_ONCE = 4096
"""Users and entities that are let go at once."""
_NO_VALUES = np.zeros(0, dtype=np.float32)


@dataclass(slots=True, frozen=True)
class Scored:
    """What the graph said of a transaction and what it takes to commit it.

    `place` is where it belongs among the `slot`'s events in the ring; 0 also where it is older than all that is kept.
    """

    probability: float
    history: int
    late: bool
    slot: int
    place: int
    commit: Callable[[], None]


class Engine:
    """See the module. Not thread-safe: the service's lock is around the one in force."""

    def __init__(self, bundle: Bundle, journal: Journal, identifiers: Identifiers, limits: Limits) -> None:
        """Memory is empty. Raises BundleError where the graphs cannot be loaded."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.policy = manifest.policy
        self.max_batch = manifest.serve.max_batch
        self.identifiers = identifiers
        self.decoder = TransactionDecoder(manifest, limits, identifiers)
        self.step = StepGraph(bundle.step, manifest.graph)
        self.sequence = SequenceGraph(bundle.sequence, manifest.graph)
        self.explainer = Explainer(manifest, self.step, self.sequence)
        self.rules = RuleBook(manifest, identifiers)
        self.control: Control | None = None
        """What lets some that are declined through, if anything."""
        self._journal = journal
        self._spec = manifest.graph
        self.judged = 0.0
        """perf_counter when the graph had said what it thinks of the last transaction."""
        self.remember(())

    def remember(self, pieces: Iterable[Piece]) -> None:
        """Memory from a snapshot's pieces and nothing else."""
        self.memory = Memory(self.bundle, self._journal, pieces, self.decoder)
        self.users, self.context, self.labels = self.memory.users, self.memory.context, self.memory.labels

    def replay(self, record: Record, reads_alike: "ReadsAlike") -> None:
        """Fold one record into memory by the graph that scores; a context as recorded, if it is defined alike."""
        if isinstance(record, LabelRecord):
            self.memory.hear(record)
        if not isinstance(record, TransactionRecord):
            return
        taken = self.memory.take(record, reads_alike[record.bundle])
        self._score(taken.transaction, taken.context).commit()
        self.memory.settle(record.seq, taken.transaction, taken.rows)

    def judge(self, transaction: Transaction, context: npt.NDArray[np.float32]) -> tuple[Scored, Answer]:
        """What the graph says of a transaction at its place in its user's history, and the answer that follows from it.

        The whole way from a stored state to an answer, for one that arrives and for one that is gone over again; memory
        is changed only by `commit`. Raises ModelError.
        """
        with graphs_may_fail():
            scored = self._score(transaction, context)
        self.judged = perf_counter()
        answer = self._answer(transaction, scored)
        if self.rules.active:
            self._apply_rules(transaction, scored, answer)
        if answer.decision != "approve":
            spared = self.control is not None and self.control.spares(answer)
            answer.reasons += self.explainer.given(self._situation(transaction, scored))
            answer.reasons = answer.reasons or [COMBINATION]
            if spared:
                answer.decision, answer.control = "approve", True
        return scored, answer

    def answers(self) -> bool:
        """Whether the graph answers, tried with a user without history."""
        for name in ("integers", "values"):
            if name in self.step.inputs:
                self.step.inputs[name][...] = 0
        try:
            self._run_step(initial_states(self._spec, 1))
            self._probability()
        except Exception:
            return False
        return True

    def dismantle(self, pause: Pause) -> None:
        """Let memory go a little at a time: to free millions of texts at once would hold everybody up.

        For an engine that nobody uses any more; what was copied out of it stays good.
        """
        users, context = self.users, self.context
        keyed: tuple[dict[Any, int], ...] = (users.slots, context.rows)
        listed: tuple[list[Any], ...] = (users.names, context.names, context.effects)
        while any(map(len, (*keyed, *listed))):
            began = perf_counter()
            for table in keyed:
                for _ in range(min(AT_ONCE, len(table))):
                    table.popitem()
            for names in listed:
                del names[-AT_ONCE:]
            pause(perf_counter() - began)

    def _apply_rules(self, transaction: Transaction, scored: Scored, answer: Answer) -> None:
        recent = functools.partial(recent_of, self.users, scored.slot, transaction.time)
        case = Case(transaction, scored.probability, scored.history, scored.late, recent)
        ruling = self.rules.decide(answer.decision, case)
        answer.decision = ruling.decision
        answer.reasons = ruling.reasons + answer.reasons

    def _answer(self, transaction: Transaction, scored: Scored) -> Answer:
        return Answer(
            transaction_id=transaction.id,
            fraud_probability=scored.probability,
            is_fraud=scored.probability >= self.policy.thresholds.is_fraud,
            decision=self.policy.decide(scored.probability, self.decoder.amount_of(transaction)),
            reasons=[],
            model=self.bundle.id,
            history=scored.history,
            late=scored.late,
            duplicate=False,
        )

    def _score(self, transaction: Transaction, context: npt.NDArray[np.float32]) -> Scored:
        """Run the step graph at the transaction's place in its user's history; memory is changed only by `commit`."""
        users, step, spec = self.users, self.step, self._spec
        slot = users.slot(transaction.user)
        step.inputs["integers"][0, 0] = transaction.time
        step.inputs["integers"][0, 1:] = transaction.categories
        if "values" in step.inputs:
            step.inputs["values"][0, : spec.numeric] = transaction.numbers[: spec.numeric]
            step.inputs["values"][0, spec.numeric :] = context
        if not users.is_late(slot, transaction.time):
            self._run_step({s.name: s.to_batch(users.now[s.name][slot : slot + 1]) for s in spec.states})
            history = int(users.accepted[slot])

            def commit() -> None:
                users.append(slot, transaction.time, step)
                users.count(slot)

            return Scored(self._probability(), history, False, slot, int(users.held[slot]), commit)
        history = self._journal.events_before(transaction.user, transaction.time)
        if users.is_too_late(slot, transaction.time):
            self._run_step(users.anchor_states(slot))

            def count() -> None:
                users.count(slot)

            return Scored(self._probability(), history, True, slot, 0, count)
        place = users.place_of(slot, transaction.time)
        self._run_step(users.states_at(slot, place, self.sequence))
        integers = step.inputs["integers"][0].copy()
        values = step.inputs["values"][0].copy() if "values" in step.inputs else None

        probability = self._probability()
        # before the journal has it: a graph that fails must not leave memory behind what is stored
        write = users.prepare_insert(slot, place, integers, values, self.sequence)

        def insert() -> None:
            write()
            users.count(slot)

        return Scored(probability, history, True, slot, place, insert)

    def _situation(self, transaction: Transaction, scored: Scored) -> Situation:
        """What was scored last, as views: it is good until the next one or the commit."""
        inputs = self.step.inputs
        return Situation(
            inputs["integers"][0],
            inputs["values"][0] if "values" in inputs else _NO_VALUES,
            transaction.amount,
            {s.name: inputs[s.name] for s in self._spec.states},
            self.users.before(scored.slot, scored.place),
        )

    def _probability(self) -> float:
        probability = float(self.step.outputs["probability"][0])
        if not 0 <= probability <= 1:  # so with NaN
            raise ModelError(f"the graph gave {probability} as a probability")
        return probability

    def _run_step(self, states: dict[str, Array]) -> None:
        for name, value in states.items():
            self.step.inputs[name][...] = value
        self.step.run_bound()


@contextmanager
def graphs_may_fail() -> Iterator[None]:
    """Whatever the graphs may fail with as ModelError: onnxruntime's exceptions have no common root.

    Of those only the type is kept: words that are not ours may quote a value, and this goes to the log.
    """
    try:
        yield
    except SeqfraudError:
        raise
    except Exception as error:
        raise ModelError(type(error).__name__) from error


def context_key(bundle_id: str) -> str:
    """Key of the journal's note with a bundle's definition of the context."""
    return f"context of {bundle_id}"


def require_same_fields(new: Manifest, old: Manifest) -> None:
    """A journal belongs to one set of declared fields, and to one way to tell and to store them.

    Raises RunError for a bundle that reads transactions in another way than the one that is in force.
    """
    for name in ("transaction", "user", "time", "time_unit", "amount", "numbers", "texts"):
        ours, theirs = getattr(old.schema, name), getattr(new.schema, name)
        if ours != theirs:
            raise RunError(f"it declares other fields: {name} is {theirs!r}; the journal is written with {ours!r}")
    ours, theirs = (treatments(manifest.schema, manifest.identifiers) for manifest in (old, new))
    for column, treatment in ours.items():
        if theirs.get(column) != treatment:
            raise RunError(
                f"it stores {column} by the identifier policy {theirs.get(column)!r}; the journal is written with "
                f"{treatment!r}"
            )


class ReadsAlike(dict[str, bool]):
    """Bundle id -> whether what it read as context is what the bundle `own` would read."""

    def __init__(self, journal: Journal, own: str) -> None:
        self._journal = journal
        self._own = journal.meta(context_key(own))

    def __missing__(self, bundle_id: str) -> bool:
        self[bundle_id] = self._journal.meta(context_key(bundle_id)) == self._own
        return self[bundle_id]
