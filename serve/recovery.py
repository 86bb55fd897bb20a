"""Whether a log is whole, and what to do where it is not: cut a torn tail, refuse anything else, repair when told to.

A power cut tears the end of the log: the bytes after the last sync may be there, or not, or in part. What the index
holds was synced before it was folded, so a bad record from there on is such a tail and is cut; one before it is damage,
and nothing is thrown away without being asked. Without an index, a bad record that whole ones follow is damage.
"""

import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from seqfraud.errors import RunError
from seqfraud.files import sync_folder
from serve.index import Folded
from serve.log import (
    BEGINNING,
    HEADER_BYTES,
    MARKER,
    BadFrameError,
    End,
    Segment,
    read_header,
    segment_name,
    walk,
    write_header,
)

_log = logging.getLogger(__name__)
_CHUNK = 2**20


@dataclass(frozen=True)
class Damage:
    """The first bytes that are not what they should be; `followed` by whole records or not."""

    file: Path
    offset: int
    position: int
    last_seq: int
    reason: str
    followed: bool

    def __str__(self) -> str:
        return f"{self.file}, byte {self.offset}, after record {self.last_seq}: {self.reason}"

    def is_torn_tail(self, folded: Folded | None) -> bool:
        """Whether a power cut explains it."""
        return not self.followed if folded is None else self.position >= folded.position


@dataclass(frozen=True)
class Found:
    """The whole part of a log, and what is wrong after it."""

    segments: list[Segment]
    end: End
    damage: Damage | None


def inspect(folder: Path, folded: Folded | None) -> Found:
    """Verify a log: all but the last segment by the digest in the next header, the last one record by record.

    Raises RunError for a segment of a newer format.
    """
    found = _verify(sorted(folder.glob("*.log")))
    if found.damage is None and folded is not None and folded.segment not in {s.seq for s in found.segments}:
        missing = folder / segment_name(folded.segment)
        reason = f"the file is missing; the index has records up to {folded.seq - 1}"
        damage = Damage(missing, 0, found.end.position, found.end.seq - 1, reason, followed=True)
        return Found(found.segments, found.end, damage)
    return found


def _verify(files: list[Path]) -> Found:
    heads = [_head(file) for file in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(_sum, files[:-1]))
    segments: list[Segment] = []
    end = BEGINNING
    for i, (file, head) in enumerate(zip(files, heads, strict=True)):
        reason = misfit(file, head, end)
        if reason:
            return Found(segments, end, _damage(files[i:], 0, end, reason))
        segments.append(Segment(file, end.seq, end.position))
        after = heads[i + 1] if i + 1 < len(files) else None
        if isinstance(after, End) and sums[i] == (after.position - end.position, after.digest):
            end = after
            continue
        data = file.read_bytes()
        end = write_header(end)[1]
        begin = segments[-1].position
        try:
            for frame in walk(data, HEADER_BYTES, end.seq, begin):
                end = End(frame.end, frame.seq + frame.taken, frame.head, 0)
        except BadFrameError as bad:
            return Found(segments, with_digest(end, data, begin), _damage(files[i:], bad.offset, end, bad.reason))
        end = with_digest(end, data, begin)
    return Found(segments, end, None)


def _head(file: Path) -> End | BadFrameError:
    with file.open("rb") as stream:
        try:
            return read_header(stream.read(HEADER_BYTES), str(file))
        except BadFrameError as bad:
            return bad


def _sum(file: Path) -> tuple[int, int]:
    """Length and CRC-32; the interpreter is free for other threads meanwhile."""
    size = digest = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            size, digest = size + len(chunk), zlib.crc32(chunk, digest)
    return size, digest


def misfit(file: Path, head: End | BadFrameError, end: End) -> str:
    """Why a segment cannot be the next one after `end`."""
    if isinstance(head, BadFrameError):
        return head.reason
    if head != end:
        return (
            f"it follows record {head.seq - 1} at byte {head.position}, and the files before it end with record "
            f"{end.seq - 1} at byte {end.position}: one is missing or not as it was"
        )
    return "" if file.name == segment_name(end.seq) else f"it begins with record {end.seq}"


def with_digest(end: End, data: bytes, begin: int) -> End:
    """An end with the digest of its segment, whose bytes are `data` and begin at a position."""
    return end._replace(digest=zlib.crc32(memoryview(data)[: end.position - begin]))


def _damage(files: list[Path], offset: int, end: End, reason: str) -> Damage:
    """Damage in the first of `files`."""
    followed = any(isinstance(_head(later), End) for later in files[1:]) or _has_frame(files[0].read_bytes(), offset)
    return Damage(files[0], offset, end.position, end.seq - 1, reason, followed)


def _has_frame(data: bytes, offset: int) -> bool:
    at = data.find(MARKER, max(offset + 1, HEADER_BYTES))
    while at >= 0:
        try:
            next(walk(data, at, None))
        except BadFrameError:
            at = data.find(MARKER, at + 1)
        else:
            return True
    return False


def recover(folder: Path, folded: Folded | None) -> Found:
    """The whole log, its torn tail cut off and kept aside. Raises RunError for any other damage."""
    found = inspect(folder, folded)
    damage = found.damage
    if damage is None:
        return found
    if not damage.is_torn_tail(folded):
        raise RunError(
            f"the journal is damaged: {damage}; restore the file from a copy, or give up the records from there on "
            f"with: seqfraud repair {folder.parent} --cut"
        )
    kept = cut(damage)
    size = sum(file.stat().st_size for file in kept)
    _log.warning("torn tail cut: %s; %d bytes are kept in %s", damage, size, ", ".join(f.name for f in kept))
    return replace(found, damage=None)


def cut(damage: Damage) -> list[Path]:
    """Move everything from the first bad byte on aside, the newest file first; returns where it is."""
    folder, file = damage.file.parent, damage.file
    kept = []
    for later in sorted(folder.glob("*.log"), reverse=True):
        if later.name > file.name or (later == file and not damage.offset):
            kept.append(_aside(later, 0))
            later.rename(kept[-1])
    if damage.offset:
        kept.append(_aside(file, damage.offset))
        with file.open("r+b") as stream, kept[-1].open("wb") as copy:
            stream.seek(damage.offset)
            while chunk := stream.read(_CHUNK):
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
            stream.truncate(damage.offset)
            os.fsync(stream.fileno())
    sync_folder(folder)
    return kept


def _aside(file: Path, offset: int) -> Path:
    name = file.with_name(f"cut-{file.stem}-{offset}")
    tries = 1
    while name.exists():
        tries += 1
        name = file.with_name(f"cut-{file.stem}-{offset}-{tries}")
    return name
