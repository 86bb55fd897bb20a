"""Whether a journal is still what was written: `seqfraud verify --state`.

A start verifies checksums, which tell of accidents. Here every head of the chain is worked out anew from the payloads, so
that whoever changed, removed, moved or inserted a record must have rewritten the chain from there on. Who may write the
folder can do that; what he cannot change is a head that was noted elsewhere before. Heads that others noted are claims:
the command's `--head`, the index's and the snapshots' own. Nothing is changed, and a service may be running.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seqfraud.errors import ConfigError, RunError
from serve.index import read_folded
from serve.log import BEGINNING, HEAD_BYTES, HEADER_BYTES, BadFrameError, End, next_head, read_header, spell_head, walk
from serve.recovery import misfit, with_digest
from serve.snapshot import noted_heads

AGAIN = 3
AGAIN_SECONDS = 0.1
"""A record that is being written is whole when it is read again."""


@dataclass(frozen=True)
class Claim:
    """Somebody (`who`) noted that the chain had this head, in hexadecimal, after record `seq`."""

    who: str
    seq: int
    head: str


@dataclass
class Audited:
    """What became of it.

    Attributes:
        records: how many are as they were written, from the first on.
        head: the one after them, `SEQ:HASH`.
        files: of the log.
        agrees: whose claims are met.
        first_bad: number of the first record that is not, or need not be, as it was written; None where all are.
        reason: why; empty where all are.
    """

    records: int = 0
    head: str = ""
    files: int = 0
    agrees: list[str] = field(default_factory=list)
    first_bad: int | None = None
    reason: str = ""


def parse_head(text: str) -> Claim:
    """A `--head` as the service logs it. Raises ConfigError."""
    seq, _, head = text.partition(":")
    try:
        if seq.isdecimal() and len(bytes.fromhex(head)) == HEAD_BYTES:
            return Claim(f"--head {seq}", int(seq), head.lower())
    except ValueError:
        pass
    raise ConfigError(f"--head: {text!r:.100}; expected SEQ:HASH with {2 * HEAD_BYTES} hexadecimal digits")


def audit(state: Path, heads: Sequence[Claim] = (), progress: Callable[[int], None] | None = None) -> Audited:
    """Verify the chain of a state folder's log, and the claims about it.

    Args:
        heads: noted elsewhere.
        progress: called with the bytes of each file.

    Raises:
        RunError: there is no journal, or it is of another format.
        OSError: it cannot be read.
    """
    folder = state / "journal"
    if not folder.is_dir():
        raise RunError(f"{state}: there is no journal here")
    claims = [*heads, *_own_claims(state)]  # before the log is read: a running service goes on
    walked = _Walk({claim.seq for claim in claims})
    out = Audited()
    files = sorted(folder.glob("*.log"))
    for number, file in enumerate(files, start=1):
        try:
            walked.through(file, is_last=number == len(files))
        except BadFrameError as bad:
            out.first_bad = walked.end.seq
            out.reason = f"{file.name}, byte {bad.offset}: {bad.reason}"
            break
        out.files += 1
        if progress is not None:
            progress(walked.size)
    out.records, out.head = walked.end.seq - 1, spell_head(walked.end)
    _check(claims, walked, out)
    return out


def _own_claims(state: Path) -> list[Claim]:
    """What the index and the snapshots say of the log; one that cannot be read says nothing, and would be made again."""
    claims = [Claim(name, seq, head) for name, seq, head in noted_heads(state)]
    try:
        folded = read_folded(state / "journal.sqlite")
    except sqlite3.Error:
        return claims
    return [*claims, Claim("journal.sqlite", folded.seq - 1, folded.head.hex())]


class _Walk:
    """Goes through the files of a log and remembers the heads after some records."""

    def __init__(self, wanted: set[int]) -> None:
        self.end = BEGINNING
        self.size = 0
        """Bytes of the newest file."""
        self.heads: dict[int, set[str]] = {seq: set() for seq in wanted}
        """Several after one record where notes follow it."""
        self._note()

    def _note(self) -> None:
        seq = self.end.seq - 1
        if seq in self.heads:
            self.heads[seq].add(self.end.head.hex())

    def through(self, file: Path, is_last: bool) -> None:
        """Go on with the next file. Raises BadFrameError where it is not what was written."""
        data = file.read_bytes()
        begin, at = self.end.position, HEADER_BYTES
        reason = misfit(file, read_header(data[:HEADER_BYTES], str(file)), self.end)
        if reason:
            raise BadFrameError(0, reason)
        for tries in range(AGAIN + 1):
            try:
                at = self._frames(data, at, begin)
                break
            except BadFrameError as bad:
                if not is_last or tries == AGAIN or bad.reason == _OTHER_HEAD:
                    raise
                at = bad.offset
            time.sleep(AGAIN_SECONDS)
            data = file.read_bytes()
        self.size = len(data)
        self.end = with_digest(self.end._replace(position=begin + at), data, begin)

    def _frames(self, data: bytes, offset: int, begin: int) -> int:
        for frame in walk(data, offset, self.end.seq, begin):
            if frame.head != next_head(self.end.head, frame.seq, frame.taken, frame.payload):
                raise BadFrameError(frame.position - begin, _OTHER_HEAD)
            self.end = End(frame.end, frame.seq + frame.taken, frame.head, 0)
            self._note()
            offset = frame.end - begin
        return offset


_OTHER_HEAD = "the head of the chain does not follow from the record and the head before"


def _check(claims: Sequence[Claim], walked: _Walk, out: Audited) -> None:
    """Note whose claims are met, and the first that is not where no record was found bad before it."""
    met = 0
    for claim in sorted(claims, key=lambda claim: claim.seq):
        if claim.head in walked.heads[claim.seq]:
            out.agrees.append(claim.who)
            met = claim.seq
        elif out.first_bad is None and claim.seq > out.records:
            out.first_bad = out.records + 1
            out.reason = f"the log ends with record {out.records}, and {claim.who} knows of record {claim.seq}"
        elif out.first_bad is None:
            out.first_bad = met + 1
            out.reason = (
                f"by {claim.who} the chain had another head at record {claim.seq}: it was written anew from some record "
                f"between {met + 1} and {claim.seq} on"
            )
