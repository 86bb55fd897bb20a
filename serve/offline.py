"""Bulk scores in a journal's order: everything worked out anew from what was stored, contexts and histories included.

What the service answered must be the same. It reads the log only and may run beside the service.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import Bundle
from seqfraud.errors import RunError
from seqfraud.runtime import SequenceGraph
from serve.log import read_frames
from serve.memory import Memory
from serve.records import LabelRecord, Note, Record, TransactionRecord, decode_records
from serve.service import FIELDS, require_fields


class Labelled:
    """The transactions so far that a label is about: few, so that a long journal needs no index."""

    def __init__(self, wanted: set[str]) -> None:
        self._wanted = wanted
        self._by_id: dict[str, TransactionRecord] = {}
        self._by_seq: dict[int, TransactionRecord] = {}

    def watched(self, records: Iterator[Record]) -> Iterator[Record]:
        """The same records; those that are wanted are kept as they pass."""
        for record in records:
            if isinstance(record, TransactionRecord) and record.id in self._wanted:
                self._by_id[record.id] = self._by_seq[record.seq] = record
            yield record

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id."""
        record = self._by_id.get(identity)
        return None if record is None else (record.seq, record.time)

    def transaction_at(self, seq: int) -> TransactionRecord:
        """The record of a sequence number."""
        return self._by_seq[seq]


def score_journal(bundle: Bundle, state: Path, threads: int = 2) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Ids of every accepted transaction in arrival order, and its probability float32 [N] by this bundle.

    Raises:
        RunError: there is no journal, it is damaged, or not what the bundle can score.
    """
    folder = state / "journal"
    if not folder.is_dir():
        raise RunError(f"{state}: there is no journal here")
    labelled = Labelled({r.transaction_id for r in _records(folder, bundle) if isinstance(r, LabelRecord)})
    memory = Memory(bundle, labelled)
    graph = SequenceGraph(bundle.sequence, bundle.manifest.graph, threads)
    ids: list[str] = []
    parts = [np.zeros(0, dtype=np.float32)]
    for some, probability in memory.fold(labelled.watched(_records(folder, bundle)), lambda _: False, graph):
        ids += some
        parts.append(probability)
    return ids, np.concatenate(parts)


def _records(folder: Path, bundle: Bundle) -> Iterator[Record]:
    for frame in read_frames(folder):
        for record in decode_records(frame.seq, frame.payload):
            if not isinstance(record, Note):
                yield record
            elif record.key == FIELDS:
                require_fields(record.value, bundle, folder.parent)
