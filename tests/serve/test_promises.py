"""What an answer stands on: with the promise `disk`, no power cut at any moment takes away what was answered."""

import errno
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from seqfraud.errors import JournalError, RequestError
from serve.journal import Journal, LabelRecord
from serve.log import Disk
from serve.service import Service

START = 1_600_000_000_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}
RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def row(**changes: Any) -> bytes:
    return json.dumps({**ROW, **changes}).encode()


class Recorder:
    """A disk that remembers in which order files were written and synced, and requests answered."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any, Any]] = []
        self.disk = Disk(write=self._write, sync=self._sync)

    def _write(self, descriptor: int, data: bytes) -> int:
        written = os.write(descriptor, data)
        self.events.append(("write", name_of(descriptor), data))
        return written

    def _sync(self, descriptor: int) -> None:
        name, begun = name_of(descriptor), len(self.events)
        os.fdatasync(descriptor)
        self.events.append(("sync", name, begun))

    def answered(self, identity: str, answer: Any) -> None:
        self.events.append(("answer", identity, answer))

    def after_power_cut(self, moment: int, draw: random.Random | None) -> dict[str, bytes]:
        """Files as a power cut at a moment may leave them: what was synced, and of the rest what `draw` leaves (None: nothing)."""
        synced: dict[str, int] = {}
        for kind, name, begun in self.events[:moment]:
            if kind == "sync":
                synced[name] = max(begun, synced.get(name, 0))
        files: dict[str, bytes] = {}
        for name in dict.fromkeys(name for kind, name, _ in self.events[:moment] if kind == "write"):
            writes = [
                (i, data) for i, (kind, n, data) in enumerate(self.events[:moment]) if (kind, n) == ("write", name)
            ]
            files[name] = b"".join(data for i, data in writes if i < synced.get(name, 0))
            rest = b"".join(data for i, data in writes if i >= synced.get(name, 0))
            files[name] += rest[: 0 if draw is None else draw.randint(0, len(rest))]
        return {name: data for name, data in files.items() if data}


def name_of(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name


def reopened(files: dict[str, bytes], folder: Path, segment_bytes: int = 64 * 2**20) -> Journal:
    (folder / "journal").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / "journal" / name).write_bytes(data)
    return Journal(folder, segment_bytes=segment_bytes)


def test_whatever_was_answered_is_there_after_a_power_cut(cards, tmp_path):
    """Every answer of concurrent requests, transactions, batches, labels and duplicates, with the power cut right after it."""
    recorder = Recorder()
    with Service(cards, tmp_path, promise="disk", disk=recorder.disk) as service:

        def client(user: int) -> None:
            for n in range(4):
                identity = f"{user}-{n}"
                at = START + n * 60_000
                recorder.answered(identity, service.score(row(id=identity, user=user, time=at)))
                service.add_labels(json.dumps([{"transaction_id": identity, "is_fraud": True}]).encode())
                recorder.answered(f"label of {identity}", None)
                items = [{**ROW, "id": f"{identity}-{i}", "user": user, "time": at + i} for i in (1, 2)]
                for result in json.loads(service.score_batch(json.dumps(items).encode()))["results"]:
                    recorder.answered(result["transaction_id"], json.dumps(result, separators=(",", ":")).encode())
                again = json.loads(
                    service.score(row(id="shared"))
                )  # a duplicate of a record that may not be synced yet
                recorder.answered("shared", json.dumps({**again, "duplicate": False}, separators=(",", ":")).encode())

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(client, range(6)))
    answers = [(i, identity, answer) for i, (kind, identity, answer) in enumerate(recorder.events) if kind == "answer"]
    assert len(answers) == 6 * 4 * 5
    syncs = sum(kind == "sync" for kind, _, _ in recorder.events)
    assert syncs < 6 * 4 * 4, "requests share syncs"
    draws = [None, random.Random(1)]
    for number, (moment, identity, answer) in enumerate(answers):
        for draw in draws if number % 4 == 0 else draws[1:]:
            with tempfile.TemporaryDirectory(dir=RAM) as folder:
                journal = reopened(recorder.after_power_cut(moment, draw), Path(folder))
                if answer is None:
                    assert journal.last_label(identity.removeprefix("label of ")) is not None, identity
                else:
                    record = journal.transaction(identity)
                    assert record is not None, identity
                    assert record.answer == answer
                journal.close()


def test_a_power_cut_while_files_are_begun_loses_nothing_that_was_promised(tmp_path):
    """Sealed files whose ends were never synced, new ones that survive without them: still the longest whole part."""
    recorder = Recorder()
    journal = Journal(tmp_path, "disk", disk=recorder.disk, segment_bytes=300)

    def client(number: int) -> None:
        for _ in range(8):
            with lock:
                seq = journal.last_seq + 1
                journal.append_labels([LabelRecord(seq + i, f"t{seq + i}", True, 1, 2, "api") for i in range(3)])
            journal.wait_durable(seq + 2)
            recorder.answered("label", seq + 2)

    lock = threading.Lock()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    journal.close()
    assert len(list((tmp_path / "journal").glob("*.log"))) > 5
    draw = random.Random(2)
    answers = [i for i, (kind, _, _) in enumerate(recorder.events) if kind == "answer"]
    for moment in answers:
        with tempfile.TemporaryDirectory(dir=RAM) as folder:
            folded = recorder.after_power_cut(draw.choice([0, *(i for i in answers if i < moment)]), None)
            reopened(folded, Path(folder), 300).close()  # an index of some earlier moment
            files = recorder.after_power_cut(moment, draw)
            begun = sorted(files)
            while len(begun) > 1 and draw.random() < 0.5 and not synced(recorder, moment, begun[-1]):
                del files[begun.pop()]  # its name was not synced either
            again = reopened(files, Path(folder), 300)
            assert again.last_seq >= recorder.events[moment][2]
            assert len(list(again.after(0))) == again.last_seq
            again.close()


def synced(recorder: Recorder, moment: int, name: str) -> bool:
    return any(kind == "sync" and which == name for kind, which, _ in recorder.events[:moment])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Held:
    """A disk whose syncs wait to be let through, or fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.fails = False
        self.disk = Disk(sync=self._sync)

    def _sync(self, descriptor: int) -> None:
        self.waiting.set()
        assert self.open.wait(20)
        if self.fails:
            raise OSError(errno.EIO, "I/O error")


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.mark.parametrize("call", ["score", "duplicate", "score_batch", "add_labels"])
def test_an_answer_waits_for_the_sync_and_the_service_does_not(cards, tmp_path, held, call):
    """A duplicate waits too: its record may be younger than the last sync."""
    with Service(cards, tmp_path, promise="disk", disk=held.disk) as service:
        service.score(row(id="before"))
        held.open.clear()
        asked = {
            "score": lambda: service.score(row()),
            "duplicate": lambda: service.score(row()),
            "score_batch": lambda: service.score_batch(b"[" + row() + b"]"),
            "add_labels": lambda: service.add_labels(b'[{"transaction_id": "before", "is_fraud": true}]'),
        }[call]
        aside: list[int] = []
        service.before_waiting = lambda: aside.append(threading.get_ident())
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(asked())) for _ in range(2)]
        threads[0].start()
        assert held.waiting.wait(20)
        if call in ("score", "duplicate"):
            threads[1].start()
        count = 2 if threads[1].ident else 1
        until(lambda: len(aside) == count)
        assert json.loads(service.transaction("before"))["transaction_id"] == "before", "the lock is free"
        assert not answers
        held.open.set()
        for thread in threads[:count]:
            thread.join(20)
        assert len(answers) == count
        assert len(set(aside)) == count, "each lets others in before it waits"
        if count == 2:
            assert sorted(json.loads(answer)["duplicate"] for answer in answers) == [False, True]


def test_the_promise_of_the_process_does_not_wait(cards, tmp_path, held):
    with Service(cards, tmp_path, disk=held.disk) as service:
        held.open.clear()
        assert json.loads(service.score(row()))["duplicate"] is False
        held.open.set()


@pytest.mark.parametrize("promise", ["process", "disk"])
def test_a_sync_that_fails_is_a_503_and_the_end_of_storing(cards, tmp_path, held, promise):
    with Service(cards, tmp_path, promise=promise, disk=held.disk) as service:
        service.score(row(id="before"))
        held.fails = True
        if promise == "disk":
            with pytest.raises(RequestError) as caught:
                service.score(row())
            assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
        else:
            service.score(row())
        until(lambda: bool(service.journal.failed))
        held.fails = False
        assert not service.ready()
        for asked in (
            lambda: service.score(row(id="after")),
            lambda: service.add_labels(b'[{"transaction_id": "before", "is_fraud": true}]'),
        ):
            with pytest.raises(RequestError) as caught:
                asked()
            assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
        with pytest.raises(JournalError, match="could not be synced"):
            service.journal.set_meta("a", "b")
    with Service(cards, tmp_path) as again:
        assert json.loads(again.score(row(id="before")))["duplicate"] is True
