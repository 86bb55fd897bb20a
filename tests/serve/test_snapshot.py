"""Snapshots save time and nothing else: one that cannot be trusted is as if it were not there."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.journal import LabelRecord
from serve.snapshot import KEPT, read_newest, write_snapshot

ROW = {"user": "ann", "time": 1_600_000_000_000, "amount": 5, "merchant": "m", "device": "d"}


def write(state: Path, seq: int, bundle: str = "b", mark: int | None = None) -> Path:
    return write_snapshot(
        state,
        bundle,
        seq,
        users=["ann", "\u2603 \x00"],
        arrays={"held": np.array([seq if mark is None else mark, 2]), "now.h": np.zeros((2, 1, 3), np.float32)},
        entities=[(0, "m"), (1, "m")],
        context={"sums": np.full((3, 4, 2), 0.1), "effects": np.array([], dtype=np.int64)},
        labels={"heap": [(2**61, -5, 1, 0, 2, 1)], "open": [(1, 5, [1, 2], -1)], "frauds": [3]},
        early=[LabelRecord(4, "later", True, 5, 6, "api")],
    )


def mark_of(state: Path, bundle: str = "b", last_seq: int = 10**9) -> int | None:
    found = read_newest(state, bundle, last_seq)
    return None if found is None else int(found.arrays["held"][0])


def names(state: Path) -> list[str]:
    return sorted(file.name for file in state.iterdir())


def test_a_snapshot_comes_back_as_it_was_written(tmp_path):
    write(tmp_path, 7)
    found = read_newest(tmp_path, "b", 7)
    assert found is not None
    assert (found.seq, found.users, found.entities) == (7, ["ann", "\u2603 \x00"], [(0, "m"), (1, "m")])
    assert found.early == [LabelRecord(4, "later", True, 5, 6, "api")]
    assert found.labels["heap"] == [[2**61, -5, 1, 0, 2, 1]]
    assert found.labels["frauds"] == [3]
    assert found.arrays["now.h"].shape == (2, 1, 3)
    assert found.arrays["now.h"].dtype == np.float32
    assert (found.context["sums"] == 0.1).all()
    assert found.context["effects"].dtype == np.int64


def test_no_folder_content_no_snapshot(tmp_path):
    assert read_newest(tmp_path, "b", 5) is None
    (tmp_path / "snapshot-notes.txt").write_text("x")
    assert read_newest(tmp_path, "b", 5) is None


def test_the_newest_by_number_is_taken_and_only_two_are_kept(tmp_path):
    for seq in (9, 10, 100, 99):
        write(tmp_path, seq)
        assert len(names(tmp_path)) <= KEPT == 2
    assert mark_of(tmp_path) == 100
    write(tmp_path, 100, mark=5)
    assert mark_of(tmp_path) == 5, "the same number again replaces"
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("at", [0, 31, 32, 200, -1])
def test_one_flipped_byte_and_the_one_before_is_taken(tmp_path, at):
    write(tmp_path, 1)
    file = write(tmp_path, 2)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert mark_of(tmp_path) == 1


@pytest.mark.parametrize("length", [0, 10, 32, 33, 500])
def test_a_file_cut_short_is_passed_over(tmp_path, length):
    write(tmp_path, 1)
    file = write(tmp_path, 2)
    file.write_bytes(file.read_bytes()[:length])
    assert mark_of(tmp_path) == 1


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
    write(tmp_path, 2)
    assert mark_of(tmp_path) == 2


# ---- in the service


def score(service: Any, identity: int, **changes: Any) -> None:
    service.decode({"id": identity, **ROW})
    service.score_one(service.decode({"id": identity, **ROW, **changes}))


def test_a_service_whose_journal_fell_behind_its_snapshot_remembers_the_journal(cards, tmp_path, memory_of, crash):
    from serve.service import Service

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
    from serve.service import Service

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
