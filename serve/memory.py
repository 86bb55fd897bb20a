"""What a service knows: the fold of its journal. Users' histories, entities' contexts, labels that wait.

The same fold serves three ends: the service takes one record at a time as it arrives, a start takes those that came after
the newest snapshot, and `seqfraud score --state` takes all of them and keeps the probabilities.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle
from seqfraud.context import ContextTable
from seqfraud.errors import RequestError, RunError
from seqfraud.runtime import SequenceGraph
from serve.capture import Early, remember
from serve.decoding import Transaction, TransactionDecoder
from serve.fold import Events, fold_many
from serve.labels import LabelBook
from serve.records import LabelRecord, Record, TransactionRecord
from serve.snapshot import Piece
from serve.users import UserTable

BLOCK = 50_000
"""Transactions that are folded at once."""

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Lookup(Protocol):
    """Where transactions that a label is about are found."""

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id."""

    def transaction_at(self, seq: int) -> TransactionRecord:
        """The record of a sequence number."""


class Stored:
    """The stored transactions that labels are about.

    An object of its own, so that a memory is in no cycle and goes as soon as nobody holds it: it may be large, and what
    there was at the start is out of the garbage collector's sight.
    """

    def __init__(self, lookup: Lookup, decoder: TransactionDecoder, context: ContextTable) -> None:
        self.lookup = lookup
        self._decoder = decoder
        self._context = context

    def find(self, seq: int) -> tuple[int, Rows]:
        """Time and entity rows of a transaction."""
        transaction = self._decoder.decode_stored(self.lookup.transaction_at(seq))
        return transaction.time, self._context.rows_of(transaction.entities)


@dataclass(slots=True, frozen=True)
class Taken:
    """A transaction at its place in the arrival order: its entities' rows int64 [E] and what it read of them [K]."""

    transaction: Transaction
    rows: Rows
    context: Float32


class Memory:
    """See the module. Not thread-safe."""

    def __init__(
        self, bundle: Bundle, lookup: Lookup, pieces: Iterable[Piece] = (), decoder: TransactionDecoder | None = None
    ) -> None:
        """Empty, or as the pieces of a snapshot say; with a decoder of the bundle, where there is one already."""
        manifest = bundle.manifest
        self.decoder = decoder or TransactionDecoder(manifest)
        self.context = ContextTable(manifest.context)
        self.users = UserTable(manifest.graph, manifest.serve.window)
        self.stored = Stored(lookup, self.decoder, self.context)
        self.labels = LabelBook(self.context, self.stored.find)
        self.early: Early = remember(iter(pieces), self.users, self.context, self.labels)
        """Labels of transactions that are not known yet."""

    def hear(self, record: LabelRecord) -> None:
        """Let a stored label wait for its time, or for its transaction."""
        found = self.stored.lookup.seq_of(record.transaction_id)
        if found is None or found[0] > record.seq:
            self.early[record.transaction_id] = (*self.early.get(record.transaction_id, ()), record)
        else:
            self.labels.said(record.seq, found[0], found[1], record.known_at, record.is_fraud)

    def take(self, record: TransactionRecord, as_recorded: bool) -> Taken:
        """Let the labels take effect that are known before a stored transaction, and read its context.

        Args:
            as_recorded: the context is the one that was recorded, rather than what the entities say now.

        Raises:
            RunError: the bundle cannot score what is stored.
        """
        try:
            transaction = self.decoder.decode_stored(record)
        except RequestError as error:
            # without the value: this may end in a log
            raise RunError(
                f"record {record.seq} of the journal is not what this bundle can score: {error.field or error.code}"
            ) from None
        self.labels.advance(transaction.time)
        rows = self.context.rows_of(transaction.entities)
        if as_recorded:
            context = np.frombuffer(record.context, dtype=np.float32)
        else:
            context = self.context.read(rows, transaction.time, transaction.amount).astype(np.float32)
        return Taken(transaction, rows, context)

    def settle(self, seq: int, transaction: Transaction, rows: Rows) -> None:
        """Count an accepted transaction for its entities and start its label delay."""
        ratio = self.context.add_transaction(rows, transaction.time, transaction.amount)
        self.labels.opened(seq, transaction.time, rows, ratio)
        for record in self.early.pop(transaction.id, ()):
            self.labels.said(record.seq, seq, transaction.time, record.known_at, record.is_fraud)

    def fold(
        self, records: Iterable[Record], as_recorded: Callable[[str], bool], graph: SequenceGraph
    ) -> Iterator[tuple[list[Transaction], Float32]]:
        """Take many records in order, users' histories in batches through the graph.

        Args:
            as_recorded: by bundle id, whether contexts are the recorded ones.

        Yields:
            Some transactions in order, and what the model says of each at its place.
        """
        block: list[tuple[int, Taken]] = []
        for record in records:
            if isinstance(record, LabelRecord):
                self.hear(record)
            if not isinstance(record, TransactionRecord):
                continue
            taken = self.take(record, as_recorded(record.bundle))
            self.settle(record.seq, taken.transaction, taken.rows)
            block.append((self.users.slot(taken.transaction.user), taken))
            if len(block) == BLOCK:
                yield self._fold_block(block, graph)
                block = []
        if block:
            yield self._fold_block(block, graph)

    def _fold_block(self, block: list[tuple[int, Taken]], graph: SequenceGraph) -> tuple[list[Transaction], Float32]:
        numeric = self.users.spec.numeric
        transactions = [taken.transaction for _, taken in block]
        integers = [(t.time, *t.categories) for t in transactions]
        numbers = np.array([t.numbers[:numeric] for t in transactions], dtype=np.float32).reshape(len(block), numeric)
        context = np.stack([taken.context for _, taken in block])
        events = Events(
            slot=np.array([slot for slot, _ in block], dtype=np.int64),
            integers=np.array(integers, dtype=np.int64),
            values=np.concatenate([numbers, context], axis=1),
        )
        return transactions, fold_many(self.users, graph, events)
