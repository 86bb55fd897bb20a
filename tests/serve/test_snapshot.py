"""Snapshots save time and nothing else: one that cannot be trusted is as if it were not there."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve.snapshot
from serve.engine import Engine
from serve.service import Service
from serve.snapshot import KEPT, Piece, Snapshotter, read_newest, remove_unfinished, write_snapshot

ROW = {"user": "ann", "time": 1_600_000_000_000, "amount": 5, "merchant": "m", "device": "d"}
LIMIT_S = 30.0


def pieces(mark: int = 0) -> list[Piece]:
    arrays = {
        "held": np.array([mark, 2, 3]),
        "now.h": np.arange(6, dtype=np.float32).reshape(3, 1, 2),
        "none": np.zeros((3, 0), np.float32),
        "odd": np.array([1, 2, 3], dtype=np.uint8),
        "ring": np.arange(12).reshape(2, 6).T,
    }
    return [Piece("first", b"\x81\xa1a\x01"), Piece("second", b"", arrays), Piece("third", b"", {"held": np.arange(9)})]


def write(state: Path, seq: int, bundle: str = "b", mark: int | None = None, **more: Any) -> Path:
    return write_snapshot(state, bundle, seq, pieces(seq if mark is None else mark), **more)


class Taken:
    """What `read_newest` gives, copied as it asks for."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, given: Iterator[Piece]) -> None:
        self.pieces = []
        for piece in given:
            self.pieces.append(Piece(piece.kind, piece.plain, {k: v.copy() for k, v in piece.arrays.items()}))


def mark_of(state: Path, bundle: str = "b", last_seq: int = 10**9) -> int | None:
    taken = Taken()
    seq = read_newest(state, bundle, last_seq, taken)
    return None if seq is None else int(taken.pieces[1].arrays["held"][0])


def names(state: Path) -> list[str]:
    return sorted(file.name for file in state.iterdir())


def test_a_snapshot_comes_back_as_it_was_written(tmp_path):
    write(tmp_path, 7)
    taken = Taken()
    assert read_newest(tmp_path, "b", 7, taken) == 7
    assert [(p.kind, p.plain) for p in taken.pieces] == [(p.kind, p.plain) for p in pieces(7)]
    for got, wanted in zip(taken.pieces, pieces(7), strict=True):
        assert list(got.arrays) == list(wanted.arrays)
        for name, array in wanted.arrays.items():
            assert (got.arrays[name].dtype, got.arrays[name].shape) == (array.dtype, array.shape)
            assert (got.arrays[name] == array).all()


def test_no_folder_content_no_snapshot(tmp_path):
    assert mark_of(tmp_path) is None
    (tmp_path / "snapshot-notes.txt").write_text("x")
    assert mark_of(tmp_path) is None


def test_the_newest_by_number_is_taken_and_only_two_are_kept(tmp_path):
    for seq in (9, 10, 100, 99):
        write(tmp_path, seq)
        assert len(names(tmp_path)) <= KEPT == 2
    assert mark_of(tmp_path) == 100
    write(tmp_path, 100, mark=5)
    assert mark_of(tmp_path) == 5, "the same number again replaces"
    assert len(names(tmp_path)) == 2


def test_a_damaged_one_is_passed_over_and_the_one_before_is_taken(tmp_path, caplog):
    write(tmp_path, 1)
    file = write(tmp_path, 2)
    data = bytearray(file.read_bytes())
    data[-60] ^= 1
    file.write_bytes(data)
    assert mark_of(tmp_path) == 1
    assert caplog.messages == [f"{file.name} is passed over: damaged"]


def test_any_flipped_byte_is_noticed(tmp_path):
    file = write(tmp_path, 2)
    data = bytearray(file.read_bytes())
    assert len(data) < 1500
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        file.write_bytes(data)
        assert mark_of(tmp_path) is None, at
        data[at] ^= 1 << at % 8
    file.write_bytes(data)
    assert mark_of(tmp_path) == 2


def test_a_file_of_any_other_length_is_noticed(tmp_path):
    file = write(tmp_path, 2)
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert mark_of(tmp_path) is None, length
    file.write_bytes(data + b"x")
    assert mark_of(tmp_path) is None


def test_frames_that_are_missing_are_missed(tmp_path):
    """Each frame is whole, and so are their checksums; one in the middle is not there."""
    file = write(tmp_path, 2)
    whole = file.read_bytes()
    start, end = (whole.rindex(b"seqfraud", 0, whole.index(kind)) for kind in (b"second", b"third"))
    file.write_bytes(whole[:start] + whole[end:])
    assert mark_of(tmp_path) is None


def test_of_another_format_is_passed_over(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr("serve.snapshot.VERSION", 99)
        write(tmp_path, 2)
    assert mark_of(tmp_path) == 1
    assert "format 99" in caplog.text


def test_of_another_bundle_is_passed_over_and_left_there(tmp_path):
    write(tmp_path, 1, "b")
    write(tmp_path, 2, "another")
    assert mark_of(tmp_path, "b") == 1
    assert mark_of(tmp_path, "another") == 2
    assert mark_of(tmp_path, "third") is None


def test_newer_than_the_journal_is_removed_before_the_journal_gets_there(tmp_path):
    """The story: a machine loses power; the last records are gone from the journal, the snapshot that has them is not.

    Passed over only, it was taken for good after the next crash, when the journal had come to its number again with
    other records. And as one of the two newest it made every snapshot written in between be deleted at once.
    """
    write(tmp_path, 20)
    write(tmp_path, 30)
    assert mark_of(tmp_path, last_seq=10) is None
    assert names(tmp_path) == []
    write(tmp_path, 11)
    assert mark_of(tmp_path, last_seq=40) == 11


def test_one_as_new_as_the_journal_is_taken(tmp_path):
    write(tmp_path, 20)
    assert mark_of(tmp_path, last_seq=20) == 20


def test_a_snapshot_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)
    seen: list[Any] = []

    def power_cut(self: Path, target: Path) -> None:
        seen.append((self.name, names(tmp_path)))
        raise OSError("no power")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", power_cut)
        with pytest.raises(OSError, match="no power"):
            write(tmp_path, 2)
    assert seen[0][0].startswith(".snapshot-"), "written under another name first"
    assert names(tmp_path) == ["snapshot-000000000000001.bin"]
    (tmp_path / f".snapshot-000000000000009.bin.{os.getpid()}.tmp").write_bytes(b"left by a crash")
    assert mark_of(tmp_path) == 1
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["snapshot-000000000000001.bin"], "what a crash left is not kept for ever"
    write(tmp_path, 2)
    assert mark_of(tmp_path) == 2


def test_a_snapshot_has_its_name_only_when_the_journal_has_its_records(tmp_path):
    asked: list[int] = []

    def wait(seq: int) -> None:
        assert not [name for name in names(tmp_path) if name.startswith("snapshot-")]
        asked.append(seq)

    write(tmp_path, 3, wait_durable=wait)
    assert asked == [3]
    assert mark_of(tmp_path) == 3

    def never(seq: int) -> None:
        raise OSError("the journal cannot be synced")

    with pytest.raises(OSError, match="cannot be synced"):
        write(tmp_path, 4, wait_durable=never)
    assert names(tmp_path) == ["snapshot-000000000000003.bin"]


def test_snapshots_are_taken_when_they_are_due_and_an_error_is_not_the_end(caplog):
    due = iter([True, False, True, True, True])
    taken: list[int] = []
    done = threading.Event()

    def take(pause: Any) -> None:
        taken.append(len(taken))
        if len(taken) == 2:
            raise RuntimeError("something else")
        if len(taken) == 3:
            raise OSError("no space left on device")
        if len(taken) == 4:
            done.set()

    snapshotter = Snapshotter(take, lambda: next(due, False), 0.001)
    assert done.wait(LIMIT_S)
    snapshotter.stop()
    assert taken == [0, 1, 2, 3]
    assert "something else" in caplog.text
    assert "no space left on device" in caplog.text


# ---- in the service


def score(service: Any, identity: int, **changes: Any) -> None:
    service.decode({"id": identity, **ROW})
    service.score_one(service.decode({"id": identity, **ROW, **changes}))


def test_a_service_whose_journal_fell_behind_its_snapshot_remembers_the_journal(cards, tmp_path, memory_of, crash):
    state, control = tmp_path / "state", tmp_path / "control"
    service = Service(cards, state)
    for n in range(3):
        score(service, n)
    (log,) = (state / "journal").iterdir()
    journal = log.read_bytes()
    for n in range(3, 6):
        score(service, n, amount=300)
    service.close()  # snapshot 6
    log.write_bytes(journal)  # the index is ahead of it, too
    service = Service(cards, state)
    assert service.journal.last_seq == 3
    for n in range(13, 17):
        score(service, n, amount=1)
    crash(service)
    with Service(cards, state) as again, Service(cards, control) as fresh:
        for n in (0, 1, 2):
            score(fresh, n)
        for n in range(13, 17):
            score(fresh, n, amount=1)
        assert memory_of(again) == memory_of(fresh)


@pytest.mark.parametrize("damage", ["flip", "empty", "foreign"])
def test_a_service_starts_the_same_with_a_snapshot_that_cannot_be_used(cards, tmp_path, memory_of, damage):
    service = Service(cards, tmp_path)
    for n in range(9):
        score(service, n, merchant=f"m{n % 2}")
    before = memory_of(service)
    service.close()
    (file,) = tmp_path.glob("snapshot-*.bin")
    if damage == "foreign":
        write(tmp_path, 9, "another bundle")
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1] + b"x")
    with Service(cards, tmp_path) as again:
        assert memory_of(again) == before


class SlowDisk:
    """Frames of the given kind wait to be written until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "users") -> None:
        self.go = threading.Event()
        self.reached = threading.Event()
        write_frame = serve.snapshot._write_frame

        def slowly(stream: Any, piece: Piece) -> int:
            if piece.kind == kind:
                self.reached.set()
                assert self.go.wait(LIMIT_S)
            return write_frame(stream, piece)

        monkeypatch.setattr("serve.snapshot._write_frame", slowly)


def started(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


def test_scoring_goes_on_while_a_snapshot_is_written(cards, tmp_path, memory_of, monkeypatch):
    disk = SlowDisk(monkeypatch)
    with Service(cards, tmp_path / "a", snapshot_every=None) as service, Service(cards, tmp_path / "b") as again:
        for n in range(9):
            score(service, n, user=f"u{n % 3}", merchant=f"m{n % 4}")
        before = memory_of(service)
        snapshot = started(service.snapshot)
        assert disk.reached.wait(LIMIT_S)
        for n in range(9, 30):
            score(service, n, user=f"u{n % 5}", merchant=f"m{n % 6}", time=ROW["time"] + 7_200_000 * (n % 3))
        disk.go.set()
        snapshot.join(LIMIT_S)
        assert read_newest(tmp_path / "a", cards.id, 30, again.engine.remember) == 9
        assert {**memory_of(again), "last_seq": 9} == before


def test_a_running_service_takes_snapshots_and_the_next_start_reads_no_more_than_what_came_after(
    cards, tmp_path, memory_of, crash, monkeypatch
):
    service = Service(cards, tmp_path, snapshot_every=0.01, snapshot_records=4)
    for n in range(3):
        score(service, n)
    assert not service._snapshot_due()
    score(service, 3)
    file = tmp_path / "snapshot-000000000000004.bin"
    for _ in range(int(LIMIT_S / 0.01)):
        if file.exists():
            break
        threading.Event().wait(0.01)
    assert file.exists()
    with service._snapshotting:
        assert not service._snapshot_due(), "those that it has do not count again"
    score(service, 4)
    before = memory_of(service)
    crash(service)
    assert names(tmp_path)[-1] == file.name, "a crash takes none"
    replayed: list[int] = []
    replay = Engine.replay
    monkeypatch.setattr(Engine, "replay", lambda s, r, as_recorded: (replayed.append(r.seq), replay(s, r, as_recorded)))
    with Service(cards, tmp_path) as again:
        assert memory_of(again) == before
    assert replayed == [5]


def test_closing_waits_for_a_snapshot_under_way_and_takes_the_last_one(cards, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    service = Service(cards, tmp_path, snapshot_every=0.01, snapshot_records=1)
    score(service, 0)
    assert disk.reached.wait(LIMIT_S)
    score(service, 1)
    closing = started(service.close)
    assert service.ready()
    disk.go.set()
    closing.join(LIMIT_S)
    assert not service.ready()
    assert [n for n in names(tmp_path) if n.startswith(("snap", ".snap"))] == [f"snapshot-{n:015d}.bin" for n in (1, 2)]


def test_a_snapshot_under_way_when_the_service_is_abandoned_gets_no_name(cards, tmp_path, monkeypatch, caplog):
    """Who abandons a service may have a memory that is ahead of the journal."""
    disk = SlowDisk(monkeypatch)
    service = Service(cards, tmp_path, snapshot_every=0.01, snapshot_records=1)
    score(service, 0)
    assert disk.reached.wait(LIMIT_S)
    abandoning = started(service.abandon)
    while service.ready():
        threading.Event().wait(0.001)
    disk.go.set()
    abandoning.join(LIMIT_S)
    assert not [n for n in names(tmp_path) if n.startswith(("snap", ".snap"))]
    assert "abandoned" in caplog.text


def test_a_service_waits_for_its_journal_before_a_snapshot_gets_its_name(cards, tmp_path, monkeypatch):
    with Service(cards, tmp_path, snapshot_every=None) as service:
        score(service, 0)
        waited: list[tuple[int, bool]] = []
        monkeypatch.setattr(
            service.journal,
            "wait_durable",
            lambda seq: waited.append((seq, bool(list(tmp_path.glob("snapshot-*"))))),
            raising=False,
        )
        service.snapshot()
        assert waited == [(1, False)]
