"""A journal followed from the side, by one thread with connections of its own, while records go on being appended.

Records come from the log in their order; a transaction is looked up where the journal itself would, in its tail first and
then in the index.
"""

from collections.abc import Iterator

from serve.index import IndexReader
from serve.journal import Journal
from serve.log import Frame
from serve.records import Note, Record, TransactionRecord, decode_records

__all__ = ["Follower"]


class Follower:
    """See the module. It may see transactions that it has not come to yet: a lookup says where they are."""

    def __init__(self, journal: Journal, seq: int) -> None:
        """Begin after a sequence number. sqlite3.Error where the index cannot be opened."""
        self._journal = journal
        self.seq = seq
        """Of the last record that was taken."""
        self._position = journal.position_before(seq + 1)
        self._frames: Iterator[Frame] = iter(())
        self._index = IndexReader(journal.index_path)

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def next(self, most: int) -> list[Record]:
        """The next records, empty where there is none yet: at most so many, and what is in one frame with the last.

        Raises JournalError.
        """
        records: list[Record] = []
        while len(records) < most:
            frame = next(self._frames, None)
            if frame is None:
                self._frames = self._journal.frames(self._position)
                frame = next(self._frames, None)
                if frame is None:
                    break
            self._position = frame.end
            if frame.seq + frame.taken > self.seq + 1:
                decoded = decode_records(frame.seq, frame.payload)
                records += [r for r in decoded if not isinstance(r, Note) and r.seq > self.seq]
        if records:
            self.seq = records[-1].seq
        return records

    # ---- lookups, as the journal's

    def seq_of(self, identity: str) -> tuple[int, int] | None:
        """Sequence number and time of a transaction id. Raises JournalError."""
        record = self._journal.held(identity)
        return self._index.seq_of(identity) if record is None else (record.seq, record.time)

    def transaction_at(self, seq: int) -> TransactionRecord:
        """The record of a sequence number; KeyError where it is no transaction. Raises JournalError."""
        held = self._journal.held_at(seq)
        if held is None:
            position = self._index.position_at(seq)
            if position is None:
                raise KeyError(seq)
            return self._journal.read(position)
        if not isinstance(held, TransactionRecord):
            raise KeyError(seq)
        return held
