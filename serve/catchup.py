"""An engine beside the one in force, brought into step with a journal that goes on growing.

It begins with a snapshot of its bundle, if there is one, and folds what came after in batches. It shares the interpreter
with scoring, so it works for half a millisecond at a time and leaves the processor for as long; only where that is not
enough to come nearer, it rests less. A snapshot's frames and a call of the graph are the longest that it holds on to.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from seqfraud.errors import ModelError
from serve.decoding import Transaction
from serve.engine import Engine, ReadsAlike, graphs_may_fail
from serve.following import Follower
from serve.journal import Journal
from serve.records import TransactionRecord
from serve.snapshot import Pause, Piece, read_newest

__all__ = ["CLOSE", "CatchUp", "Folded"]

BLOCK = 256
"""Records that are folded at once."""
WORK_S = 0.0005
"""Seconds of work before a pause."""
CLOSE = 16
"""So few records are folded one by one within a millisecond or two."""
ROUNDS = 64
"""Blocks after which it has to be nearer, or rests half as long."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Folded:
    """N transactions that were folded, in order: their records, what they are to this bundle, its probabilities [N]."""

    records: list[TransactionRecord]
    transactions: list[Transaction]
    probability: npt.NDArray[np.float32]


class CatchUp:
    """See the module. For one thread at a time; what it raises leaves the engine unusable, and nothing else."""

    def __init__(self, engine: Engine, journal: Journal, folders: Sequence[Path], pause: Pause, users: int = 0) -> None:
        """Memory as the newest snapshot in the first of the folders that has one says, or empty.

        Args:
            pause: gives up the processor for so many seconds; what it raises ends the work.
            users: so many are expected at least; to make room for them bit by bit holds others up.
        """
        self.engine = engine
        self.pause = pause
        self._journal = journal
        self._reads_alike = ReadsAlike(journal, engine.bundle.id)
        self._rest = 1.0
        """Seconds of pause for a second of work."""
        self._rounds, self._nearest = 0, journal.last_seq
        self._began = time.perf_counter()
        since = 0
        for folder in folders:
            found = read_newest(folder, engine.bundle.id, journal.last_seq, self._remember)
            if found is not None:
                since = found
                break
        else:
            engine.remember(())
            engine.users.make_room(users)
        self.seq = since
        """Of the last record that is in memory."""
        self._follower = Follower(journal, since)
        engine.memory.stored.lookup = self._follower

    def _remember(self, pieces: Iterable[Piece]) -> None:
        self.engine.remember(self._paced(pieces))

    @property
    def behind(self) -> int:
        """Records that are not in memory yet."""
        return self._journal.last_seq - self.seq

    def advance(self, most: int = BLOCK) -> Folded:
        """Fold the next records, at most so many.

        Raises:
            ModelError: the graph fails, or gives what is no probability.
            RunError: the bundle cannot score what is stored.
            JournalError: the journal cannot be read.
        """
        records = self._follower.next(most)
        folded = Folded([r for r in records if isinstance(r, TransactionRecord)], [], np.zeros(0, dtype=np.float32))
        memory = self.engine.memory
        with graphs_may_fail():
            for some, probability in memory.fold(
                self._paced(records), self._reads_alike.__getitem__, self.engine.sequence
            ):
                if not np.all((probability >= 0) & (probability <= 1)):  # so with NaN
                    raise ModelError("the graph gave something that is no probability")
                folded = Folded(folded.records, folded.transactions + some, np.append(folded.probability, probability))
        self.seq = self._follower.seq
        self._breathe()
        return folded

    def follow_to(self, close: int, progress: Callable[[int], None] = lambda behind: None) -> None:
        """Fold until no more than so many records are left."""
        while (behind := self.behind) > close:
            progress(behind)
            self.advance()
            self._rounds += 1
            if self._rounds % ROUNDS == 0:
                if behind >= self._nearest:
                    self._rest = self._rest / 2 if self._rest > 0.1 else 0.0
                self._nearest = behind

    def finish(self) -> None:
        """Fold what is left one by one, and look transactions up in the journal itself from now on.

        Under the service's lock, so that nothing comes after.
        """
        self.engine.memory.stored.lookup = self._journal
        with graphs_may_fail():
            while records := self._follower.next(BLOCK):
                for record in records:
                    self.engine.replay(record, self._reads_alike)
                self.seq = self._follower.seq

    def close(self) -> None:
        """Let the journal's index go."""
        self._follower.close()

    def _paced(self, things: Iterable[T]) -> Iterator[T]:
        """The same, with a pause whenever the work on them has taken long enough."""
        for thing in things:
            yield thing
            if time.perf_counter() - self._began > WORK_S:
                self._breathe()

    def _breathe(self) -> None:
        self.pause((time.perf_counter() - self._began) * self._rest)
        self._began = time.perf_counter()
