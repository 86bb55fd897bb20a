"""Snapshots of memory: one file each, named by the last record they include, checked by a digest when read.

They only save time. A snapshot that is damaged or of another bundle is passed over. One newer than the journal is of
records that a crash of the machine took away; it is removed, for the journal will get to its number with other records.
"""

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from seqfraud.files import replaced_file
from serve.journal import LabelRecord

_log = logging.getLogger(__name__)

VERSION = 1
KEPT = 2
Array = npt.NDArray[Any]


class _Head(msgspec.Struct):
    version: int
    bundle: str
    seq: int
    users: list[str]
    entities: list[tuple[int, str]]
    labels: dict[str, Any]
    early: list[LabelRecord]


@dataclass(frozen=True)
class Snapshot:
    """Memory after the record `seq`."""

    seq: int
    users: list[str]
    arrays: dict[str, Array]
    entities: list[tuple[int, str]]
    context: dict[str, Array]
    labels: dict[str, Any]
    early: list[LabelRecord]


def write_snapshot(
    state: Path,
    bundle: str,
    seq: int,
    *,
    users: list[str],
    arrays: Mapping[str, Array],
    entities: list[tuple[int, str]],
    context: Mapping[str, Array],
    labels: dict[str, Any],
    early: list[LabelRecord],
) -> Path:
    """Write a snapshot under its final name or not at all, and remove all but the newest."""
    head = msgspec.msgpack.encode(_Head(VERSION, bundle, seq, users, entities, labels, early))
    final = state / f"snapshot-{seq:015d}.bin"
    body = io.BytesIO()
    parts = {"head": np.frombuffer(head, dtype=np.uint8)}
    parts |= {f"users/{name}": array for name, array in arrays.items()}
    parts |= {f"context/{name}": array for name, array in context.items()}
    np.savez(body, allow_pickle=False, **parts)
    data = body.getbuffer()
    with replaced_file(final) as file, file.open("wb") as stream:
        stream.write(hashlib.sha256(data).digest())
        stream.write(data)
    for old in sorted(state.glob("snapshot-*.bin"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return final


def read_newest(state: Path, bundle: str, last_seq: int) -> Snapshot | None:
    """The newest snapshot that is whole, of this bundle, and of this journal's past; removes those of its future."""
    for file in sorted(state.glob("snapshot-*.bin"), reverse=True):
        if file.stem > f"snapshot-{last_seq:015d}":
            _log.warning("%s is removed: it is newer than the journal, which ends with record %d", file.name, last_seq)
            file.unlink()
            continue
        found = _read(file, bundle)
        if found is not None:
            return found
        _log.warning("%s is passed over: damaged or of another bundle", file.name)
    return None


def _read(file: Path, bundle: str) -> Snapshot | None:
    data = file.read_bytes()
    if hashlib.sha256(memoryview(data)[32:]).digest() != data[:32]:
        return None
    with np.load(io.BytesIO(memoryview(data)[32:]), allow_pickle=False) as stored:
        try:
            head = msgspec.msgpack.decode(stored["head"].tobytes(), type=_Head)
        except msgspec.ValidationError:
            return None
        if head.version != VERSION or head.bundle != bundle:
            return None
        parts: dict[str, dict[str, Array]] = {"users": {}, "context": {}}
        for key in stored.files:
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = stored[key]
    return Snapshot(head.seq, head.users, parts["users"], head.entities, parts["context"], head.labels, head.early)
