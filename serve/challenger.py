"""A model in shadow: it scores what the journal holds, a moment behind, on a thread of its own, and answers nobody.

It reads the log, so the answer to a transaction does no more where there are challengers than where there are none, and
whatever happens to one of them happens to it alone. Its memory is its own; the context it reads is as of arrival, so a
score is the same however late it is worked out. Under pressure it falls behind and takes more at a time. What is more than
`most_behind` records old when its turn comes goes into memory only: that score is dropped, and counted.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from seqfraud.errors import SeqfraudError
from seqfraud.policy import DECISIONS, Decision, Policy, flag_many
from serve.answers import Agreement, ModelInShadow
from serve.capture import Capture
from serve.catchup import CatchUp, Folded
from serve.engine import Engine
from serve.journal import Journal
from serve.shadow import ROW, Rows, ShadowScores, note_since, read_since, shadow_folder
from serve.snapshot import write_snapshot

__all__ = ["Challenger", "ShadowSettings"]

_log = logging.getLogger(__name__)

POLL_S = 0.05
"""Seconds until it looks whether there is more."""
IN_STEP = 1_000
"""So many records behind, it still counts as in step."""


@dataclass(frozen=True)
class ShadowSettings:
    """`[shadow]`: challengers beside the model in force.

    - most: at a time; each takes as much memory, and as much work per transaction, as the model in force.
    - most_behind: records; a score that is more behind is dropped. The state stays right.
    """

    most: int = 2
    most_behind: int = 50_000

    def __post_init__(self) -> None:
        for name in ("most", "most_behind"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


class _Given(msgspec.Struct):
    """What was answered."""

    fraud_probability: float
    decision: Decision


_given = msgspec.json.Decoder(_Given).decode


class Challenger:
    """See the module. It runs from its making until it is stopped, released, or fails."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        state: Path,
        policy_of: Callable[[str], Policy | None],
        settings: ShadowSettings,
        snapshot_every: float | None,
        snapshot_records: int,
    ) -> None:
        """Begins with the records after those that are there, or where it was when the service stopped. OSError.

        Args:
            engine: of its bundle; memory is made here.
            policy_of: by bundle id, what its decisions follow; None where it is not known any more.
            snapshot_every, snapshot_records: seconds between snapshots, and the records that are worth one.
        """
        self.engine = engine
        self.model = engine.bundle.id
        self.why = ""
        """Why it stopped, in words; empty where it did not."""
        self._journal = journal
        self._state = state
        self._folder = shadow_folder(state, self.model)
        self._policy_of = policy_of
        self._settings = settings
        self._snapshot_every = snapshot_every
        self._snapshot_records = snapshot_records
        self._scores = ShadowScores(self._folder, journal.last_seq)
        since = read_since(self._folder)
        if since is None or since > journal.last_seq:
            since = journal.last_seq
            note_since(self._folder, since)
        self._since = since
        self._catchup: CatchUp | None = None
        self._seq = 0
        """Of the last record that is in memory, and its score among the scores."""
        self._snapshot_seq = 0
        self._snapshot_at = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"shadow-{self.model}", daemon=True)
        self._thread.start()

    # ---- for others

    @property
    def behind(self) -> int:
        """Records that it has not come to."""
        return self._journal.last_seq - self._seq

    @property
    def in_step(self) -> bool:
        """Whether it can come into force at once."""
        return not self.why and self._catchup is not None and self.behind <= IN_STEP

    def shown(self) -> ModelInShadow:
        """How it stands."""
        tally = self._scores.tally
        agreement = None
        if (difference := tally.difference) is not None:
            agreement = Agreement(tally.alike / tally.scored, tally.correlation, difference)
        return ModelInShadow(
            model=self.model,
            state="stopped" if self.why else "in step" if self.in_step else "catching up",
            behind=self.behind,
            scored=tally.scored,
            dropped=tally.dropped,
            agreement=agreement,
            why=self.why,
        )

    def stop(self, snapshot: bool = True) -> None:
        """End; with a snapshot it goes on from here at the next start."""
        self._end()
        if snapshot and self._catchup is not None and not self.why:
            self._try_snapshot()
        self._scores.close()
        if self._catchup is not None:
            self._catchup.close()

    def release(self) -> CatchUp | None:
        """End, and give away what there is in memory; None where it is of no use."""
        self._end()
        self._scores.close()
        return None if self.why else self._catchup

    def forget(self) -> None:
        """Remove what it would go on from; what it said stays. To be called when it has ended."""
        for file in (*self._folder.glob("snapshot-*.bin"), self._folder / "since"):
            file.unlink(missing_ok=True)

    def _end(self) -> None:
        self._stopping.set()
        self._thread.join()

    # ---- its thread

    def _run(self) -> None:
        try:
            self._catchup = CatchUp(self.engine, self._journal, (self._folder, self._state), self._stopping.wait)
            self._snapshot_seq = self._seq = self._catchup.seq
            while not self._stopping.is_set():
                behind = self.behind
                if not behind:
                    self._stopping.wait(POLL_S)
                    continue
                folded = self._catchup.advance()
                self._scores.append(self._rows(folded, behind))
                self._seq = self._catchup.seq
                if self._snapshot_due():
                    self._try_snapshot()
        except Exception as error:  # of any kind: it is alone with it
            self.why = str(error) if isinstance(error, SeqfraudError) else type(error).__name__
            _log.error("the challenger %s stopped: %s", self.model, self.why, exc_info=error)

    def _rows(self, folded: Folded, behind: int) -> Rows:
        """What is to be kept of the transactions that came after the challenge began."""
        seqs = np.array([record.seq for record in folded.records], dtype=np.uint64)
        new = np.flatnonzero(seqs > self._since)
        rows = np.zeros(len(new), dtype=ROW)
        rows["seq"] = seqs[new]
        if behind > self._settings.most_behind:
            rows["probability"] = np.nan
            return rows
        policy = self.engine.policy
        records = [folded.records[i] for i in new]
        amounts = self._amounts(folded, new)
        given = [_given(record.answer) for record in records]
        rows["probability"] = folded.probability[new]
        rows["is_fraud"] = flag_many(rows["probability"], policy.thresholds)
        rows["decision"] = policy.decide_many(rows["probability"], amounts)
        rows["given"] = [answer.fraud_probability for answer in given]
        rows["given_decision"] = [DECISIONS.index(answer.decision) for answer in given]
        models = np.array([record.bundle for record in records], dtype=object)
        for model in set(models.tolist()):
            theirs = self._policy_of(model)
            if theirs is not None:
                at = models == model
                rows["given_decision"][at] = theirs.decide_many(
                    [answer.fraud_probability for answer, his in zip(given, at, strict=True) if his], amounts[at]
                )
        return rows

    def _amounts(self, folded: Folded, at: Rows) -> Rows:
        decoder = self.engine.decoder
        amounts = [decoder.amount_of(folded.transactions[i]) for i in at]
        return np.array([np.nan if amount is None else amount for amount in amounts], dtype=np.float64)

    def _snapshot_due(self) -> bool:
        assert self._catchup is not None
        return (
            self._snapshot_every is not None
            and time.monotonic() - self._snapshot_at >= self._snapshot_every
            and self._catchup.seq - self._snapshot_seq >= self._snapshot_records
        )

    def _try_snapshot(self) -> None:
        assert self._catchup is not None
        memory, seq = self.engine.memory, self._catchup.seq
        parts = memory.users, memory.context, memory.labels, memory.early
        capture = Capture(nullcontext(), *parts, self._stopping.wait)
        try:
            write_snapshot(self._folder, self.model, seq, capture.pieces(), self._journal.wait_durable)
            self._snapshot_seq = seq
        except (OSError, SeqfraudError) as error:  # it only saves time
            _log.error("no snapshot of the challenger %s: %s", self.model, error)
        finally:
            capture.end()
            self._snapshot_at = time.monotonic()
