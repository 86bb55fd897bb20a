"""What challengers said of live transactions: a file of their own per model, beside the journal, only ever appended to.

<state>/shadow/MODEL/scores.bin   rows of fixed size, in the journal's order
<state>/shadow/MODEL/since        the last record before the challenge; what came before is never scored here
<state>/shadow/MODEL/snapshot-... memory, as the service's own

The rows can be worked out again, so nothing waits for them to be on disk. A row holds numbers only: which transaction it is
about, the journal says. Its `decision` is the policy's alone: rules and lists are left out, on both sides.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from seqfraud.files import replaced_file
from seqfraud.policy import DECISIONS
from serve.log import read_frames
from serve.records import TransactionRecord, decode_records

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ROW", "ShadowScores", "Tally", "read_shadow", "shadow_folder"]

ROW = np.dtype(
    [
        ("seq", "<u8"),
        ("probability", "<f4"),
        ("given", "<f4"),
        ("is_fraud", "u1"),
        ("decision", "u1"),
        ("given_decision", "u1"),
        ("unused", "u1"),
    ]
)
"""`probability`: NaN where the score was dropped; `given`: that of the model in force then; decisions: indices into DECISIONS."""
SCORES = "scores.bin"
SINCE = "since"

Rows = npt.NDArray[Any]


def shadow_folder(state: Path, model: str) -> Path:
    """Where a challenger keeps what it says."""
    return state / "shadow" / model


@dataclass
class Tally:
    """How far two models agree, over the rows that were counted."""

    scored: int = 0
    dropped: int = 0
    alike: int = 0
    """Of equal decisions."""
    _difference: float = 0.0
    _sums: npt.NDArray[np.float64] | None = None
    """Of p, q, p^2, q^2 and p q."""

    def add(self, rows: Rows) -> None:
        """Count some rows."""
        kept = rows[~np.isnan(rows["probability"])]
        self.scored += len(kept)
        self.dropped += len(rows) - len(kept)
        self.alike += int((kept["decision"] == kept["given_decision"]).sum())
        p, q = kept["probability"].astype(np.float64), kept["given"].astype(np.float64)
        self._difference += float(np.abs(p - q).sum())
        sums = np.array([p.sum(), q.sum(), p @ p, q @ q, p @ q])
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def difference(self) -> float | None:
        """Mean absolute difference of the probabilities; None where nothing was scored."""
        return self._difference / self.scored if self.scored else None

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the probabilities; None where one of them does not vary."""
        if self._sums is None or self.scored < 2:
            return None
        p, q, pp, qq, pq = self._sums / self.scored
        spread = (pp - p * p) * (qq - q * q)
        return None if spread <= 1e-24 else float(np.clip((pq - p * q) / np.sqrt(spread), -1.0, 1.0))


class ShadowScores:
    """The scores of one challenger, to be appended to. For one thread."""

    def __init__(self, folder: Path, last_seq: int) -> None:
        """Open or make them. What is torn off at the end, or beyond the journal's last record, is cut off. OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / SCORES).open("ab", buffering=0)
        rows = _read_rows(folder / SCORES)
        rows = rows[rows["seq"] <= last_seq]
        self._file.truncate(rows.nbytes)
        self.last_seq = int(rows["seq"][-1]) if len(rows) else 0
        """Of the newest row."""
        self.tally = Tally()
        self.tally.add(rows)

    def append(self, rows: Rows) -> None:
        """Add rows; those that are there already, from before a crash, are left out. OSError."""
        rows = rows[rows["seq"] > self.last_seq]
        if len(rows):
            self._file.write(rows.tobytes())
            self.last_seq = int(rows["seq"][-1])
            self.tally.add(rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_since(folder: Path) -> int | None:
    """The last record before a challenge; None where none was noted."""
    try:
        return int((folder / SINCE).read_text("ascii"))
    except (OSError, ValueError):
        return None


def note_since(folder: Path, seq: int) -> None:
    """Keep the last record before a challenge. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / SINCE) as temporary:
        temporary.write_text(f"{seq}\n", "ascii")


def _read_rows(file: Path) -> Rows:
    """Whole rows in order; a crash of the machine may leave a part of one, or zeros, at the end."""
    content = file.read_bytes()
    rows = np.frombuffer(content[: len(content) // ROW.itemsize * ROW.itemsize], dtype=ROW)
    steps = np.diff(rows["seq"].astype(np.int64), prepend=0)
    wrong = np.flatnonzero(steps <= 0)
    return rows[: wrong[0]] if len(wrong) else rows


def read_shadow(state: Path) -> "pa.Table":
    """Every score that a challenger of a state folder kept: model, seq, id, probability, is_fraud, decision.

    By model, then in arrival order; ids are those of the journal. Nothing is locked: a service may be running. What was
    dropped is left out.

    Raises:
        RunError: the journal is damaged.
    """
    import pyarrow as pa

    held: list[tuple[str, Rows]] = []
    for file in sorted((state / "shadow").glob(f"*/{SCORES}")):
        rows = _read_rows(file)
        held.append((file.parent.name, rows[~np.isnan(rows["probability"])]))
    ids = _ids(state / "journal") if any(len(rows) for _, rows in held) else {}
    known = [(model, rows[[int(seq) in ids for seq in rows["seq"]]] if len(rows) else rows) for model, rows in held]
    rows = np.concatenate([np.zeros(0, dtype=ROW), *(rows for _, rows in known)])
    models = [model for model, rows in known for _ in range(len(rows))]
    return pa.table(
        {
            "model": pa.array(models, pa.string()),
            "seq": pa.array(rows["seq"].astype(np.int64)),
            "id": pa.array([ids[seq] for seq in rows["seq"].tolist()], pa.string()),
            "probability": pa.array(rows["probability"].astype(np.float64)),
            "is_fraud": pa.array(rows["is_fraud"] == 1),
            "decision": pa.array([DECISIONS[code] for code in rows["decision"].tolist()], pa.string()),
        }
    )


def _ids(journal: Path) -> dict[int, str]:
    """Transaction ids by sequence number."""
    return {
        record.seq: record.id
        for frame in read_frames(journal)
        for record in decode_records(frame.seq, frame.payload)
        if isinstance(record, TransactionRecord)
    }
