"""The log: checksummed frames in segment files, only ever appended to. Bytes in, bytes out: records are `records.py`'s.

A segment file is named by its first sequence number and holds a header and frames, little-endian throughout:

    header  magic 8s, version u32, then of everything before it: next sequence number u64, bytes u64, CRC-32 of the whole
            segment before u32, head 32s; link u32
    frame   marker 4s, payload length u32, first sequence number u64, numbers it takes u32; payload; head 32s; link u32

Two things chain the frames. A *head* is a cryptographic hash of the frame's numbers, its payload's digest and the head
before: whoever noted one can tell later that nothing up to there was changed (`audit.py`). It costs too much for every
start. A *link* is a checksum of what it ends, seeded by the head before: quick, for damage of every kind, and it does not
reach further than its frame, so that a payload can be blanked, with its digest kept, without touching the frames after it.
The head before stands in the bytes before a frame (in a header, for the first one), so that any frame can be verified
alone. A *position* counts the bytes of all segments before as well.
"""

import bisect
import errno
import hashlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from seqfraud.errors import RunError
from seqfraud.files import sync_folder

_log = logging.getLogger(__name__)

VERSION = 2
"""Of the format. 1 had no heads."""
SEGMENT_BYTES = 64 * 2**20
MAGIC = b"seqfraud"
MARKER = b"\xf5\xffSQ"
"""No UTF-8 text contains it."""

HEAD_BYTES = 32

_HEADER = struct.Struct(f"<8sIQQI{HEAD_BYTES}s")
_UNCHAINED_HEADER = struct.Struct("<8sIQQII")
"""Of version 1."""
_FRAME = struct.Struct("<4sIQI")
_NUMBERS = struct.Struct("<QI")
_LINK = struct.Struct("<I")
_TRAILER_BYTES = HEAD_BYTES + _LINK.size
HEADER_BYTES = _HEADER.size + _LINK.size
_FIRST_READ = 2048


def next_head(before: bytes, seq: int, taken: int, payload: bytes) -> bytes:
    """BLAKE2b-256 of the head before, a frame's numbers and the digest of its payload."""
    digest = hashlib.blake2b(payload, digest_size=HEAD_BYTES).digest()
    return hashlib.blake2b(before + _NUMBERS.pack(seq, taken) + digest, digest_size=HEAD_BYTES).digest()


def link(data: bytes | memoryview, before: bytes) -> int:
    """Checksum of `data` after the head before it.

    Rotated and shifted, as LevelDB masks its checksums: a CRC over bytes that contain their own plain CRC does not
    depend on them, and the digest of a segment would pass any frame that is only consistent in itself.
    """
    crc = zlib.crc32(data, int.from_bytes(before[: _LINK.size], "little"))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class End(NamedTuple):
    """Where a log, or a part of it, ends.

    Attributes:
        position: of the next byte.
        seq: next sequence number.
        head: the last one.
        digest: CRC-32 of the bytes of the segment so far.
    """

    position: int
    seq: int
    head: bytes
    digest: int


def spell_head(end: End) -> str:
    """The last record's number and the head there, in hexadecimal: `SEQ:HASH`."""
    return f"{end.seq - 1}:{end.head.hex()}"


BEGINNING = End(0, 1, bytes(HEAD_BYTES), 0)


class Frame(NamedTuple):
    """A frame that takes `taken` numbers; its link was verified, its `head` is what it says."""

    position: int
    seq: int
    taken: int
    payload: bytes
    head: bytes

    @property
    def end(self) -> int:
        """Position after it."""
        return self.position + _FRAME.size + len(self.payload) + _TRAILER_BYTES


class Segment(NamedTuple):
    """A segment file: its first sequence number and the position of its first byte."""

    path: Path
    seq: int
    position: int


class BadFrameError(Exception):
    """Bytes at an offset that are no frame, or not the one that belongs there."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True)
class Disk:
    """What the log does to files, so that tests can let it fail or remember it."""

    write: Callable[[int, bytes], int] = os.write
    truncate: Callable[[int, int], None] = os.ftruncate
    sync: Callable[[int], None] = os.fdatasync


SYSTEM_DISK = Disk()


def segment_name(seq: int) -> str:
    """File name of the segment that begins with a sequence number."""
    return f"{seq:015d}.log"


def write_header(before: End) -> tuple[bytes, End]:
    """A segment's header, and the end after it."""
    front = _HEADER.pack(MAGIC, VERSION, before.seq, before.position, before.digest, before.head)
    header = front + _LINK.pack(link(front, before.head))
    return header, End(before.position + len(header), before.seq, before.head, zlib.crc32(header))


def read_header(data: bytes, name: str) -> End:
    """What a segment's header says of everything before it. Raises BadFrameError; RunError for another format."""
    if _is_unchained(data):
        raise RunError(
            f"{name}: log format 1, from before its records were chained; this version reads format {VERSION}: read it with "
            "the version that wrote it, and load its data into a new state folder"
        )
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise BadFrameError(0, "it does not begin as a log file does")
    _, version, seq, position, digest, head = _HEADER.unpack_from(data)
    if link(data[: _HEADER.size], head) != _LINK.unpack_from(data, _HEADER.size)[0]:
        raise BadFrameError(0, "the checksum of its header is wrong")
    if version != VERSION:
        raise RunError(f"{name}: log format {version}; this version reads format {VERSION}")
    return End(position, seq, head, digest)


def _is_unchained(data: bytes) -> bool:
    """Whether a file begins with a whole header of version 1, which ended with a link that followed the one before."""
    size = _UNCHAINED_HEADER.size
    if len(data) < size + _LINK.size or data[:8] != MAGIC:
        return False
    _, version, _, _, before, _ = _UNCHAINED_HEADER.unpack_from(data)
    own: int = _LINK.unpack_from(data, size)[0]
    return version == 1 and own == link(data[:size], _LINK.pack(before))


def walk(data: bytes, offset: int, seq: int | None, begin: int = 0) -> Iterator[Frame]:
    """The frames in `data` from `offset` on, of which the first begins with `seq` (None: whatever it says).

    `begin` is the position of the first byte of `data`. Raises BadFrameError at the first that is not whole.
    """
    view = memoryview(data)
    before = data[offset - _TRAILER_BYTES : offset - _LINK.size]
    while offset < len(data):
        body = offset + _FRAME.size
        if body > len(data):
            raise BadFrameError(offset, "it ends in the middle of a record")
        marker, length, first, count = _FRAME.unpack_from(data, offset)
        stop = body + length
        if marker != MARKER:
            raise BadFrameError(offset, "there is no record where one should begin")
        end = stop + _TRAILER_BYTES
        if end > len(data):
            raise BadFrameError(offset, "it ends in the middle of a record")
        if link(view[offset : end - _LINK.size], before) != _LINK.unpack_from(data, end - _LINK.size)[0]:
            raise BadFrameError(offset, "the checksum of a record is wrong")
        if seq is not None and first != seq:
            raise BadFrameError(offset, f"record {first} stands where {seq} belongs")
        head = data[stop : stop + HEAD_BYTES]
        yield Frame(begin + offset, first, count, data[body:stop], head)
        seq, before, offset = first + count, head, end


def read_frames(folder: Path) -> Iterator[Frame]:
    """Every whole frame of a log that a service may be writing to meanwhile; nothing is changed, no index is needed.

    What is torn off or being written at the end is left out. RunError where anything else is not whole.
    """
    files = sorted(folder.glob("*.log"))
    seq, before = BEGINNING.seq, BEGINNING.head
    for number, file in enumerate(files, start=1):
        data = file.read_bytes()
        try:
            head = read_header(data[:HEADER_BYTES], str(file))
            if (head.seq, head.head) != (seq, before):
                raise BadFrameError(
                    0, f"it follows record {head.seq - 1}, the file before it ends with record {seq - 1}"
                )
            for frame in walk(data, HEADER_BYTES, seq):
                seq, before = frame.seq + frame.taken, frame.head
                yield frame
        except BadFrameError as bad:
            if number < len(files):
                raise RunError(f"{file}, byte {bad.offset}, after record {seq - 1}: {bad.reason}") from bad


class Log:
    """The end of a log that was found whole: append, sync, read.

    One thread appends; `sync` may run on another, and any may read. A log that failed to take back a write, or to sync
    one, is poisoned (`failed` says why): what the file holds is not known any more, and every append raises.
    """

    def __init__(
        self, folder: Path, segments: list[Segment], end: End, synced: int, disk: Disk, segment_bytes: int
    ) -> None:
        """Go on after `end`; files that reach beyond the position `synced` are synced again. OSError."""
        self.failed = ""
        self._folder = folder
        self._segments = segments
        self._disk = disk
        self._segment_bytes = segment_bytes
        self.written = end
        """End of what is in the file."""
        self.head = end
        """The same, and what a group holds back."""
        self._group: list[bytes] | None = None
        self._descriptors = threading.Lock()
        self._new_names = True
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._unsynced: list[int] = []
        for before, after in pairwise(segments):
            if after.position > synced:
                descriptor = os.open(before.path, flags)
                disk.sync(descriptor)
                os.close(descriptor)
        self._current = os.open(segments[-1].path, flags) if segments else -1
        if not segments:
            self._start_segment()

    def close(self) -> None:
        """Close the files; nothing is synced by it."""
        for descriptor in (*self._unsynced, self._current):
            os.close(descriptor)

    # ---- appending

    def append(self, count: int, payload: bytes) -> int:
        """Add a frame that takes `count` sequence numbers and return its position. OSError: nothing is changed."""
        if self.failed:
            raise OSError(errno.EIO, self.failed)
        if self._group is None:
            self._make_room()
        end = self.head
        position, own = end.position, next_head(end.head, end.seq, count, payload)
        data = _FRAME.pack(MARKER, len(payload), end.seq, count) + payload + own
        frame = data + _LINK.pack(link(data, end.head))
        end = End(position + len(frame), end.seq + count, own, zlib.crc32(frame, end.digest))
        if self._group is None:
            self._write(frame, end)
        else:
            self._group.append(frame)
            self.head = end
        return position

    def begin_group(self) -> None:
        """Hold frames back until `end_group`."""
        if self.failed:
            raise OSError(errno.EIO, self.failed)
        self._make_room()
        self.head = self.written
        self._group = []

    def end_group(self) -> None:
        """Write what was held back at once. OSError: none of it is there."""
        frames, self._group = self._group or [], None
        if frames:
            self._write(b"".join(frames), self.head)

    def _write(self, data: bytes, end: End) -> None:
        try:
            written = self._disk.write(self._current, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written")
            self.written = self.head = end
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        self.head = self.written
        try:
            self._disk.truncate(self._current, self.written.position - self._segments[-1].position)
        except OSError as error:
            self.failed = f"a failed write could not be taken back: {error}"
            _log.error("%s: %s", self._segments[-1].path, self.failed)

    def _make_room(self) -> None:
        """Begin a new segment where the last is full and holds a record: two cannot have one name."""
        newest, end = self._segments[-1], self.written
        if end.position - newest.position >= self._segment_bytes and end.seq > newest.seq:
            self._start_segment()

    def _start_segment(self) -> None:
        path = self._folder / segment_name(self.written.seq)
        header, end = write_header(self.written)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if self._disk.write(descriptor, header) != len(header):
                raise OSError(errno.ENOSPC, "the header of a new file was not written")
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        with self._descriptors:
            if self._current >= 0:
                self._unsynced.append(self._current)
            self._segments.append(Segment(path, self.written.seq, self.written.position))
            self._current, self._new_names = descriptor, True
            self.written = self.head = end

    def sync(self) -> End:
        """Put everything written so far on disk; returns its end. OSError poisons the log: never try again.

        After a failed sync the system may count lost pages as written, and the next one would succeed.
        """
        with self._descriptors:
            end, new_names = self.written, self._new_names
            sealed, current = list(self._unsynced), self._current
            self._new_names = False
        try:
            for descriptor in (*sealed, current):
                self._disk.sync(descriptor)
                if os.fstat(descriptor).st_nlink == 0:  # it can be written and synced, and ends with the process
                    raise OSError(errno.ENOENT, "its file was removed")
            if new_names:
                sync_folder(self._folder)
        except OSError as error:
            self.failed = f"what was written could not be synced: {error}"
            raise
        with self._descriptors:
            del self._unsynced[: len(sealed)]
        for descriptor in sealed:
            os.close(descriptor)
        return end

    # ---- reading

    def segment_at(self, position: int) -> Segment:
        """The segment that holds the byte of a position."""
        return self._segments[self._index_at(position)]

    def _index_at(self, position: int) -> int:
        return bisect.bisect_right(self._segments, position, key=lambda s: s.position) - 1

    def position_before(self, seq: int) -> int:
        """Position of the segment that holds a sequence number, or would."""
        at = bisect.bisect_right(self._segments, seq, key=lambda s: s.seq) - 1
        return self._segments[max(at, 0)].position

    def head_before(self, position: int) -> bytes | None:
        """The head that was reached at a position, None where the log does not reach it."""
        if not 0 < position <= self.written.position:
            return None
        segment = self.segment_at(position - 1)
        with segment.path.open("rb") as file:
            data = os.pread(file.fileno(), HEAD_BYTES, position - segment.position - _TRAILER_BYTES)
        return data if len(data) == HEAD_BYTES else None

    def read(self, position: int) -> Frame:
        """The frame at a position. OSError where it cannot be read; BadFrameError where it is not whole."""
        segment = self.segment_at(position)
        start = position - segment.position - _TRAILER_BYTES
        with segment.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), _FIRST_READ, start)
            if len(data) < _TRAILER_BYTES + _FRAME.size:
                raise BadFrameError(start, "it ends before the record")
            size = 2 * _TRAILER_BYTES + _FRAME.size + _FRAME.unpack_from(data, _TRAILER_BYTES)[1]
            if size > len(data):
                data = os.pread(file.fileno(), size, start)
        return next(walk(data[:size], _TRAILER_BYTES, None, position - _TRAILER_BYTES))

    def frames(self, position: int) -> Iterator[Frame]:
        """Every frame from a position (of a frame, a segment or the end) to what is the end now.

        At most one segment is in memory at a time, and of the first one nothing before the position.

        OSError where a file cannot be read; BadFrameError where one is not whole.
        """
        stop = self.written.position
        segments = self._segments[self._index_at(position) :]
        for i, (path, seq, begin) in enumerate(segments):
            size = (segments[i + 1].position if i + 1 < len(segments) else stop) - begin
            offset = max(position - begin, HEADER_BYTES)
            first = None if offset > HEADER_BYTES else seq
            start = offset - _TRAILER_BYTES
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(max(size - start, 0))
            if start + len(data) < size:
                raise BadFrameError(len(data), f"{path.name} has {start + len(data)} bytes; {size} were written")
            yield from walk(data, _TRAILER_BYTES, first, begin + start)
