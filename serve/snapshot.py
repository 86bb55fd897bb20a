"""Snapshots of memory: one file each, named by the last record they include.

They only save time. A snapshot that is damaged or of another bundle is passed over. One newer than the journal is of
records that a crash of the machine took away; it is removed, for the journal will get to its number with other records.

A file is a row of frames; a frame is a header of fixed size with its own checksum, and a head and a body under another
one. The first frame says whose snapshot it is, the last how many frames there are. So any changed byte is noticed, and
any that is missing, while a file is neither written nor read as a whole. `serve.capture` says what the frames between
hold. Frames are read and checked one ahead of the one that is being taken in.
"""

import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.files import replaced_file, sync_folder

_log = logging.getLogger(__name__)

VERSION = 4
KEPT = 2
SYNC_BYTES = 1 << 26
"""So much is written between syncs: the journal's own syncs wait for all that is yet to be written."""

Array = npt.NDArray[Any]
Pause = Callable[[float], object]
"""Gives up the processor for so many seconds."""

_HEADER = struct.Struct("<8sIQI")
"""Mark, bytes of the head, bytes of the body, checksum of both; followed by the checksum of these."""
_MARK = b"seqfraud"
_SUM = struct.Struct("<I")
_ALIGNED = 8


@dataclass(frozen=True)
class Piece:
    """A part of memory: msgpack in `plain`, and arrays by name."""

    kind: str
    plain: bytes = b""
    arrays: Mapping[str, Array] = field(default_factory=dict)


class _Head(msgspec.Struct):
    kind: str
    plain: bytes
    arrays: list[tuple[str, str, list[int]]]


class _Whose(msgspec.Struct):
    version: int
    bundle: str
    seq: int
    head: str = ""
    """Of the journal's chain after `seq`, as `SEQ:HASH`."""


class _UnusableError(Exception):
    """Why a file is passed over."""


def write_snapshot(
    state: Path,
    bundle: str,
    seq: int,
    pieces: Iterable[Piece],
    wait_durable: Callable[[int], object] | None = None,
    head: str = "",
) -> Path:
    """Write a snapshot under its final name or not at all, and remove all but the newest.

    Args:
        wait_durable: called with `seq` before the file gets its name; returns when the journal is sure to have that.
        head: of the journal's chain after `seq`, as `SEQ:HASH`.
    """
    final = state / f"snapshot-{seq:015d}.bin"
    with replaced_file(final) as file:
        with file.open("wb") as stream:
            _write(stream, _Whose(VERSION, bundle, seq, head), pieces)
        if wait_durable is not None:
            wait_durable(seq)
    sync_folder(state)
    for old in sorted(state.glob("snapshot-*.bin"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return final


def _write(stream: IO[bytes], whose: _Whose, pieces: Iterable[Piece]) -> None:
    _write_frame(stream, Piece("whose", msgspec.msgpack.encode(whose)))
    frames = written = synced = 0
    for frames, piece in enumerate(pieces, start=1):  # noqa: B007
        written += _write_frame(stream, piece)
        if written - synced > SYNC_BYTES:
            _sync(stream)
            synced = written
    _write_frame(stream, Piece("end", msgspec.msgpack.encode(frames)))
    _sync(stream)


def _write_frame(stream: IO[bytes], piece: Piece) -> int:
    arrays = {name: np.ascontiguousarray(array) for name, array in piece.arrays.items()}
    head = msgspec.msgpack.encode(
        _Head(piece.kind, piece.plain, [(name, a.dtype.str, list(a.shape)) for name, a in arrays.items()])
    )
    body: list[Any] = []
    for array in arrays.values():
        body += [array.reshape(-1).view(np.uint8), bytes(-array.nbytes % _ALIGNED)]
    # one call each: after a long one a busy interpreter gives this thread the next turn only milliseconds later
    content = b"".join([head, *body])
    header = _HEADER.pack(_MARK, len(head), len(content) - len(head), zlib.crc32(content))
    stream.write(header + _SUM.pack(zlib.crc32(header)))
    stream.write(content)
    return len(content)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def remove_unfinished(state: Path) -> None:
    """Remove what a crash left of snapshots that were being written; for a start, when nobody writes one."""
    for left in state.glob(".snapshot-*.tmp"):
        left.unlink(missing_ok=True)


def read_newest(state: Path, bundle: str, last_seq: int, take: Callable[[Iterator[Piece]], None]) -> int | None:
    """Give the newest usable snapshot's pieces to `take`; its sequence number, or None where there is none.

    Usable is what is whole, of this bundle, and of this journal's past; what is of the journal's future is removed.

    Args:
        take: has to begin anew at every call, for damage may be found after a part was taken; has to take every piece,
            and to copy what it keeps of the arrays before it asks for the next.
    """
    for file in sorted(state.glob("snapshot-*.bin"), reverse=True):
        if file.stem > f"snapshot-{last_seq:015d}":
            _log.warning("%s is removed: it is newer than the journal, which ends with record %d", file.name, last_seq)
            file.unlink()
            continue
        try:
            with file.open("rb") as stream:
                return _read(stream, bundle, take)
        except (OSError, _UnusableError, msgspec.MsgspecError) as error:
            _log.warning("%s is passed over: %s", file.name, error)
    return None


def newest_file(state: Path) -> Path | None:
    """The newest snapshot, usable or not."""
    return max(state.glob("snapshot-*.bin"), default=None)


def noted_heads(state: Path) -> Iterator[tuple[str, int, str]]:
    """Name of each snapshot, and of the journal's chain when it was taken: the last record and the head, hexadecimal."""
    for file in sorted(state.glob("snapshot-*.bin")):
        try:
            with file.open("rb") as stream:
                whose = msgspec.msgpack.decode(_Buffer(stream).next_frame().plain, type=_Whose)
        except (OSError, _UnusableError, msgspec.MsgspecError):
            continue
        if whose.head:
            yield file.name, whose.seq, whose.head.partition(":")[2]


def _read(stream: IO[bytes], bundle: str, take: Callable[[Iterator[Piece]], None]) -> int:
    frames = _frames(stream)
    whose = msgspec.msgpack.decode(next(frames).plain, type=_Whose)
    if whose.version != VERSION:
        raise _UnusableError(f"format {whose.version}, this version reads format {VERSION}")
    if whose.bundle != bundle:
        raise _UnusableError(f"of another bundle, {whose.bundle}")
    take(frames)
    return whose.seq


def _frames(stream: IO[bytes]) -> Iterator[Piece]:
    """The frames before the last one. Arrays are good until the next frame is asked for."""
    buffers = (_Buffer(stream), _Buffer(stream))
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(buffers[0].next_frame)
        for number in count(1):
            piece = coming.result()
            if piece.kind == "end":
                if msgspec.msgpack.decode(piece.plain) != number - 2 or stream.read(1):
                    raise _UnusableError("damaged")
                return
            coming = reader.submit(buffers[number % 2].next_frame)
            yield piece


class _Buffer:
    """Memory for the body of a frame, used again for another one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._memory = memoryview(bytearray())

    def next_frame(self) -> Piece:
        """The next frame of the file, checked; its arrays are in this buffer."""
        start = self._stream.read(_HEADER.size + _SUM.size)
        header = start[: _HEADER.size]
        if start != header + _SUM.pack(zlib.crc32(header)) or len(header) < _HEADER.size:
            raise _UnusableError("damaged")
        mark, head_size, body_size, checksum = _HEADER.unpack(header)
        if mark != _MARK:
            raise _UnusableError("damaged")
        encoded = self._stream.read(head_size)
        if len(self._memory) < body_size:
            self._memory = memoryview(bytearray(body_size))
        body = self._memory[:body_size]
        read = self._stream.readinto(body)  # type: ignore[attr-defined]
        if read != body_size or zlib.crc32(body, zlib.crc32(encoded)) != checksum:
            raise _UnusableError("damaged")
        head = msgspec.msgpack.decode(encoded, type=_Head)
        arrays: dict[str, Array] = {}
        at = 0
        for name, dtype, shape in head.arrays:
            array: Array = np.ndarray(tuple(shape), dtype=dtype, buffer=body, offset=at)
            arrays[name] = array
            at += array.nbytes + -array.nbytes % _ALIGNED
        return Piece(head.kind, head.plain, arrays)


class Snapshotter:
    """A thread that takes a snapshot every so many seconds, if one is due. Errors are logged.

    `take` is called with a function that pauses for so many seconds, until the thread is to stop.
    """

    def __init__(self, take: Callable[[Pause], object], due: Callable[[], bool], every: float) -> None:
        self._take = take
        self._due = due
        self._every = every
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._every)
            self._wake.clear()
            if self._stopped.is_set():
                return
            if self._due():
                try:
                    self._take(self._stopped.wait)
                except Exception as error:  # it only saves time
                    _log.error("no snapshot: %s", error, exc_info=not isinstance(error, OSError))

    def stop(self) -> None:
        """Take no more; waits for one that is being taken."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def soon(self) -> None:
        """Take one now, if one is due."""
        self._wake.set()
