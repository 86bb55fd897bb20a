"""The journal: one sequence over transactions and labels, whole or not at all, wherever a record is at the moment."""

import contextlib
import errno
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.cli import main
from seqfraud.errors import JournalError, RunError
from serve.journal import ActionRecord, Journal, LabelRecord, TransactionRecord
from serve.log import HEADER_BYTES, Disk
from serve.records import Record
from serve.service import lock_folder

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
NEVER = 1e7
"""Milliseconds to the first sync: everything stays in memory."""


def transaction(seq: int, **changes: Any) -> TransactionRecord:
    values = {
        "seq": seq, "id": f"t{seq}", "user": "ann", "time": 1000 * seq, "content": b"c%d" % seq, "raw": b'{"a": 1}',
        "context": b"\x00\x01", "answer": b"{}", "bundle": "b",
    }  # fmt: skip
    return TransactionRecord(**{**values, **changes})


def label(seq: int, identity: str = "t1", is_fraud: bool = True) -> LabelRecord:
    return LabelRecord(seq, identity, is_fraud, 5000, 6000, "api", "key-1")


def action(seq: int, kind: str = "rule") -> ActionRecord:
    return ActionRecord(seq, kind, 7000, "key-1", b'{"name": "\xe2\x98\x83"}')


def fill(journal: Journal, count: int = 9) -> list[Record]:
    """Transactions and groups of two labels, and a note."""
    records: list[Record] = []
    journal.set_meta("fields", "a,b")
    while len(records) < count:
        seq = journal.last_seq + 1
        if seq % 3 == 1:
            records.append(transaction(seq))
            journal.append_transaction(transaction(seq))
        else:
            labels = [label(seq, f"t{seq - 1}"), label(seq + 1, "later")]
            records += labels
            journal.append_labels(labels)
    return records


def query(state: Path, sql: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(state / "journal.sqlite")
    try:
        return db.execute(sql).fetchall()
    finally:
        db.commit()
        db.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_folded(journal: Journal) -> bool:
    return not journal._tail.by_seq


class Place:
    """Where the records are when they are looked up: all in memory, or all in the index."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sync_ms = NEVER if name == "tail" else 1.0

    def settle(self, journal: Journal) -> None:
        if self.name == "index":
            until(lambda: is_folded(journal))
        else:
            assert not is_folded(journal)


@pytest.fixture(params=["tail", "index"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def journal(tmp_path: Path, place: Place) -> Iterator[Journal]:
    opened = Journal(tmp_path, sync_ms=place.sync_ms)
    yield opened
    opened.close()


def test_records_come_back_as_they_were_written(journal, place):
    strange = 'it\'s \x00 \u2603 "quoted" \U0001f600'
    record = transaction(1, id=strange, user=strange, time=-5, content=bytes(range(256)), raw=b'"\xe2\x98\x83"' * 999)
    journal.append_transaction(record)
    journal.append_labels([label(2, strange, False)])
    place.settle(journal)
    assert journal.transaction(strange) == record
    assert journal.transaction_at(1) == record
    assert journal.last_label(strange) == label(2, strange, False)
    assert journal.seq_of(strange) == (1, -5)
    assert journal.recent(strange, 1) == [record]
    assert list(journal.after(0)) == [record, label(2, strange, False)]


def test_what_is_not_there_is_none(journal, place):
    journal.append_labels([label(1)])
    place.settle(journal)
    assert journal.transaction("t1") is None
    assert journal.seq_of("t1") is None
    assert journal.last_label("other") is None
    assert journal.meta("other") is None
    for seq in (0, 1, 2):
        with pytest.raises(KeyError):
            journal.transaction_at(seq)


def test_sequence_numbers_count_both_kinds_and_survive_reopening(tmp_path):
    journal = Journal(tmp_path)
    assert journal.last_seq == 0
    journal.append_transaction(transaction(1))
    journal.append_labels([label(2), label(3)])
    journal.append_labels([])
    journal.set_meta("key", "value")
    assert journal.last_seq == 3, "notes do not count"
    journal.close()
    journal = Journal(tmp_path)
    assert journal.last_seq == 3, "the newest record is a label"
    assert journal.meta("key") == "value"
    journal.append_transaction(transaction(4))
    journal.close()
    journal = Journal(tmp_path)
    assert journal.last_seq == 4, "the newest record is a transaction"
    journal.close()


def test_a_number_out_of_turn_is_a_bug_and_not_stored(journal):
    journal.append_transaction(transaction(1))
    for attempt in (lambda: journal.append_transaction(transaction(3)), lambda: journal.append_labels([label(1)])):
        with pytest.raises(ValueError, match="the next is 2"):
            attempt()
    assert list(journal.after(0)) == [transaction(1)]


def test_after_gives_both_kinds_in_arrival_order(tmp_path):
    for segment_bytes in (10**6, 300):
        state = tmp_path / str(segment_bytes)
        state.mkdir()
        journal = Journal(state, segment_bytes=segment_bytes)
        records = fill(journal, 30)
        for seq in range(32):
            assert list(journal.after(seq)) == records[seq:]
        journal.close()


def test_after_lets_other_questions_be_asked_and_records_come_in_between(journal):
    """A rebuild looks records up while it walks them; it ends with what was there when it began."""
    for seq in range(1, 50):
        journal.append_transaction(transaction(seq))
    seen = []
    for record in journal.after(0):
        seen.append(journal.seq_of(record.id)[0])
        journal.append_labels([label(journal.last_seq + 1)])
    assert seen == list(range(1, 50))


def test_the_newest_label_counts_whatever_its_time(journal, place):
    journal.append_labels([LabelRecord(1, "t", True, 9000, 0, "a"), LabelRecord(2, "t", False, 10, 0, "b")])
    place.settle(journal)
    assert journal.last_label("t").seq == 2
    journal.append_labels([label(3, "t")])
    assert journal.last_label("t").seq == 3


def test_history_of_a_user(journal, place):
    for seq, (user, at) in enumerate([("ann", 30), ("bob", 10), ("ann", 10), ("ann", 20), ("ann", 20)], start=1):
        journal.append_transaction(transaction(seq, user=user, time=at))
    place.settle(journal)
    assert [journal.events_before("ann", at) for at in (9, 10, 19, 20, 30, 99)] == [0, 1, 1, 3, 4, 4]
    assert [record.seq for record in journal.recent("ann", 3)] == [1, 5, 4], "newest first, the later arrival first"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("tlafr"), st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_memory_and_index_together_are_always_complete(steps):
    """Transactions, labels, actions, waiting for the index and opening anew, in any order; asked after every step."""
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        folder = Path(name)
        journal = Journal(folder, sync_ms=1, segment_bytes=500)
        said: list[Record] = []
        try:
            for step, user, at in steps:
                seq = len(said) + 1
                if step == "t":
                    said.append(transaction(seq, user=f"u{user}", time=at))
                    journal.append_transaction(said[-1])
                elif step == "l":
                    said.append(label(seq, f"t{user}", at % 2 == 0))
                    journal.append_labels([said[-1]])
                elif step == "a":
                    said.append(action(seq, f"kind {user}"))
                    journal.append_action(said[-1])
                elif step == "f":
                    until(partial(is_folded, journal))
                else:
                    journal.close()
                    journal = Journal(folder, sync_ms=1, segment_bytes=500)
                transactions = [r for r in said if isinstance(r, TransactionRecord)]
                labels = [r for r in said if isinstance(r, LabelRecord)]
                mine = sorted((r for r in transactions if r.user == f"u{user}"), key=lambda r: (-r.time, -r.seq))
                assert journal.recent(f"u{user}", 4) == mine[:4]
                assert journal.events_before(f"u{user}", at) == sum(r.time <= at for r in mine)
                assert journal.last_label(f"t{user}") == next(
                    (r for r in reversed(labels) if r.transaction_id == f"t{user}"), None
                )
                assert journal.labels_of(f"t{user}") == [r for r in labels if r.transaction_id == f"t{user}"]
                actions = [r for r in said if isinstance(r, ActionRecord)]
                kinds = (f"kind {user}", "kind 3")
                assert journal.actions(kinds, at) == [r for r in actions if r.kind in kinds and r.seq > at]
                assert [journal.transaction(r.id) for r in transactions] == transactions
                assert [journal.transaction_at(r.seq) for r in transactions] == transactions
                assert list(journal.after(0)) == said
        finally:
            journal.close()


# ---- groups, failing


def test_a_group_is_seen_inside_and_written_at_its_end(tmp_path):
    writes: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        writes.append(len(data))
        return os.write(descriptor, data)

    journal = Journal(tmp_path, disk=Disk(write=write))
    writes.clear()
    with journal.group():
        journal.append_transaction(transaction(1))
        journal.append_labels([label(2), label(3)])
        journal.set_meta("key", "value")
        assert journal.transaction("t1") == transaction(1)
        assert journal.last_label("t1") == label(3)
        assert journal.last_seq == 3
        assert not writes
        assert list(journal.after(0)) == []
    assert len(writes) == 1
    assert list(journal.after(0)) == [transaction(1), label(2), label(3)]
    with contextlib.suppress(ZeroDivisionError), journal.group():
        journal.append_transaction(transaction(4))
        _ = 1 / 0
    assert len(writes) == 2, "what was accepted before an error stays"
    journal.close()
    journal = Journal(tmp_path)
    assert list(journal.after(0)) == [transaction(1), label(2), label(3), transaction(4)]
    assert journal.meta("key") == "value"
    journal.close()


def test_a_group_that_cannot_be_written_is_gone(tmp_path, small_disk):
    journal = Journal(tmp_path, disk=small_disk.disk, sync_ms=NEVER)
    journal.append_transaction(transaction(1))
    journal.append_labels([label(2)])
    small_disk.room = 100

    def group() -> None:
        with journal.group():
            journal.append_labels([label(3, "t1", False)])
            journal.append_transaction(transaction(4))

    with pytest.raises(JournalError, match="100 of"):
        group()
    assert journal.last_seq == 2
    assert journal.transaction("t4") is None
    assert journal.last_label("t1") == label(2), "the one before is the newest again"
    small_disk.room = None
    journal.append_transaction(transaction(3))
    assert list(journal.after(0)) == [transaction(1), label(2), transaction(3)]
    journal.close()


def test_what_cannot_be_written_changes_nothing(tmp_path, small_disk):
    journal = Journal(tmp_path, disk=small_disk.disk)
    journal.append_transaction(transaction(1))
    small_disk.room = 0
    attempts: list[Callable[[], None]] = [
        lambda: journal.append_transaction(transaction(2)),
        lambda: journal.append_labels([label(2), label(3)]),
        lambda: journal.set_meta("key", "value"),
    ]
    for attempt in attempts:
        with pytest.raises(JournalError, match=r"cannot be written: .*no space left"):
            attempt()
        assert journal.last_seq == 1
        assert journal.transaction("t2") is None
        assert journal.last_label("t1") is None
        assert journal.meta("key") is None
        assert not journal.failed
    small_disk.room = None
    journal.append_transaction(transaction(2))
    journal.close()
    journal = Journal(tmp_path)
    assert list(journal.after(0)) == [transaction(1), transaction(2)]
    journal.close()


def test_appending_waits_for_an_index_that_is_far_behind(tmp_path, monkeypatch):
    """It waits while the index comes on; where that cannot be written, it says so."""
    journal = Journal(tmp_path, sync_ms=1, tail_records=50)
    for seq in range(1, 500):
        journal.append_transaction(transaction(seq))
        assert len(journal._tail.by_seq) <= 50

    def broken(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    until(lambda: is_folded(journal))
    with monkeypatch.context() as patched:
        patched.setattr(journal._index, "fold", broken)
        patched.setattr("serve.journal.RETRY_SECONDS", 0.01)
        for seq in range(500, 550):
            journal.append_transaction(transaction(seq))
        with pytest.raises(JournalError, match="50 records behind: database or disk is full"):
            journal.append_transaction(transaction(550))
    assert journal.last_seq == 549
    assert journal.transaction("t549") == transaction(549)
    until(lambda: is_folded(journal))
    journal.append_transaction(transaction(550))
    journal.close()
    assert query(tmp_path, "SELECT count(*) FROM transactions") == [(550,)]


# ---- the index


def test_the_index_can_be_asked_with_sql(tmp_path):
    journal = Journal(tmp_path)
    answer = (
        b'{"transaction_id":"t1","fraud_probability":0.75,"is_fraud":true,"decision":"review","reasons":[],'
        b'"model":"b","history":4,"late":false,"duplicate":false}'
    )
    journal.append_transaction(transaction(1, answer=answer, raw='{"kind": "\u2603"}'.encode()))
    journal.append_labels([label(2)])
    journal.append_action(action(3))
    journal.close()
    columns = "seq, id, user, time, probability, is_fraud, decision, history, late, bundle, raw ->> 'kind'"
    assert query(tmp_path, f"SELECT {columns} FROM transactions") == [
        (1, "t1", "ann", 1000, 0.75, 1, "review", 4, 0, "b", "\u2603")
    ]
    assert query(tmp_path, "SELECT * FROM labels") == [(2, "t1", 1, 5000, 6000, "api", "key-1")]
    assert query(tmp_path, "SELECT seq, kind, at, author, body ->> 'name' FROM actions") == [
        (3, "rule", 7000, "key-1", "\u2603")
    ]
    (position,) = query(tmp_path, "SELECT position FROM transactions")[0]
    assert (tmp_path / "journal" / "000000000000001.log").read_bytes()[position:].startswith(b"\xf5\xffSQ")


def change(state: Path, what: str) -> None:
    path = state / "journal.sqlite"
    if what == "gone":
        path.unlink()
    elif what == "no database":
        path.write_bytes(b"this is not a database, and long enough to be seen as such " * 50)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cut short":
        path.write_bytes(path.read_bytes()[:5000])
    elif what == "older":
        query(state, "PRAGMA user_version = 1")
    elif what == "not finished":
        query(state, "DELETE FROM folded")
    elif what == "behind":
        records, begin = query(state, "SELECT position FROM transactions WHERE seq = 4"), "seq >= 4"
        log = (state / "journal" / "000000000000001.log").read_bytes()
        head = log[records[0][0] - 36 : records[0][0] - 4]
        db = sqlite3.connect(path)
        db.execute(f"DELETE FROM transactions WHERE {begin}")
        db.execute(f"DELETE FROM labels WHERE {begin}")
        db.execute("UPDATE folded SET seq = 4, position = ?, head = ?", (records[0][0], head))
        db.commit()
        db.close()
    elif what == "of another log":
        query(state, "UPDATE transactions SET id = 'other' || id")
        query(state, "UPDATE folded SET head = zeroblob(32)")


@pytest.mark.parametrize(
    "what",
    ["gone", "no database", "empty", "cut short", "older", "not finished", "behind", "of another log"],
)
def test_an_index_that_is_not_what_it_should_be_is_made_from_the_log(tmp_path, what):
    journal = Journal(tmp_path)
    records = fill(journal)
    journal.close()
    tables = ("transactions", "labels", "notes", "folded", "alerts", "alert_reasons")
    before = [query(tmp_path, f"SELECT * FROM {table}") for table in tables]
    change(tmp_path, what)
    journal = Journal(tmp_path)
    assert journal.transaction("t4") == records[3]
    assert journal.last_label("later") == records[8]
    assert journal.meta("fields") == "a,b"
    journal.close()
    assert [query(tmp_path, f"SELECT * FROM {table}") for table in tables] == before
    assert query(tmp_path, "PRAGMA user_version") == [(3,)]
    assert len(query(tmp_path, "SELECT 1 FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")) == 9


def test_an_index_ahead_of_the_log_loses_what_it_has_more(tmp_path, caplog):
    """An older copy of the log was put back, or a disk lied about a sync."""
    journal = Journal(tmp_path)
    records = fill(journal)
    journal.close()
    ((position,),) = query(tmp_path, "SELECT position FROM transactions WHERE seq = 7")
    os.truncate(tmp_path / "journal" / "000000000000001.log", position)
    journal = Journal(tmp_path)
    assert "holds records up to 9 that are not the log's" in caplog.text
    assert journal.last_seq == 6
    assert journal.seq_of("t7") is None
    journal.append_transaction(transaction(7, id="other"))
    assert list(journal.after(0)) == [*records[:6], transaction(7, id="other")]
    journal.close()
    assert query(tmp_path, "SELECT seq, id FROM transactions WHERE seq > 4") == [(7, "other")]
    assert query(tmp_path, "SELECT max(seq) FROM labels") == [(6,)]


def test_a_newer_index_is_refused_and_left_as_it_is(tmp_path):
    journal = Journal(tmp_path)
    fill(journal)
    journal.close()
    query(tmp_path, "PRAGMA user_version = 4")
    with pytest.raises(RunError, match=r"journal\.sqlite: index format 4; this version reads format 3"):
        Journal(tmp_path)
    assert query(tmp_path, "PRAGMA user_version") == [(4,)]


def test_a_journal_from_before_the_log_is_refused_and_left_as_it_is(tmp_path):
    """It is the only copy of its records; taken for an old index it would have been removed."""
    query(tmp_path, "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    with pytest.raises(RunError, match="from before there was a log; load its data into a new state folder"):
        Journal(tmp_path)
    assert query(tmp_path, "SELECT count(*) FROM meta") == [(0,)]


def test_an_index_in_use_by_somebody_else_is_not_taken_for_a_damaged_one(tmp_path):
    journal = Journal(tmp_path)
    journal.append_transaction(transaction(1))
    journal.close()
    other = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match="database is locked"):
        Journal(tmp_path, sync_ms=NEVER)
    other.close()
    assert query(tmp_path, "SELECT id FROM transactions") == [("t1",)]


def test_a_record_that_is_damaged_under_a_running_service_is_not_given_out(tmp_path):
    journal = Journal(tmp_path, sync_ms=1)
    for seq in (1, 2, 3):
        journal.append_transaction(transaction(seq))
    until(lambda: is_folded(journal))
    (file,) = (tmp_path / "journal").glob("*.log")
    data = bytearray(file.read_bytes())
    data[data.index(b"t2") + 20] ^= 1
    file.write_bytes(data)
    assert journal.transaction("t1") == transaction(1)
    assert journal.transaction("t3") == transaction(3)
    with pytest.raises(JournalError, match=r"the log cannot be read at .* checksum"):
        journal.transaction("t2")
    with pytest.raises(JournalError, match="the log cannot be read"):
        list(journal.after(0))
    journal.close()


# ---- the promises


class Gate:
    """A disk whose syncs wait to be let through, and may fail."""

    def __init__(self) -> None:
        self.begun = 0
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | None = None
        self.disk = Disk(sync=self._sync)

    def _sync(self, descriptor: int) -> None:
        self.begun += 1
        assert self.open.wait(20)
        if self.error:
            raise self.error
        os.fdatasync(descriptor)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_the_promise_of_the_process_waits_for_nothing(tmp_path, gate):
    journal = Journal(tmp_path, disk=gate.disk)
    gate.open.clear()
    journal.append_transaction(transaction(1))
    journal.wait_durable(1)
    until(lambda: gate.begun == 2)  # the first was at the opening
    journal.append_transaction(transaction(2))
    assert journal.transaction("t2") == transaction(2), "looking up and appending do not wait either"
    assert journal.transaction("t9") is None
    assert query(tmp_path, "SELECT count(*) FROM transactions") == [(0,)], "what is not synced is not in the index"
    gate.open.set()
    journal.close()
    assert query(tmp_path, "SELECT count(*) FROM transactions") == [(2,)]


def test_the_promise_of_the_disk_waits_for_the_sync_and_many_share_one(tmp_path, gate):
    journal = Journal(tmp_path, "disk", disk=gate.disk)
    gate.open.clear()
    lock = threading.Lock()
    waiting: list[int] = []
    kept: list[int] = []

    def ask() -> None:
        with lock:
            seq = journal.last_seq + 1
            journal.append_transaction(transaction(seq))
        journal.wait_durable(seq, lambda: waiting.append(seq))
        kept.append(seq)

    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    until(lambda: len(waiting) == 32)
    assert kept == []
    begun = gate.begun
    assert begun == 2, "the one at the opening and the one that all wait for"
    gate.open.set()
    for thread in threads:
        thread.join(20)
    assert sorted(kept) == list(range(1, 33))
    assert gate.begun <= begun + 1, "what came while it ran shares the next"
    journal.wait_durable(32, lambda: waiting.append(0))
    assert 0 not in waiting, "nothing to wait for"
    journal.close()


def test_a_sync_that_fails_is_told_to_all_who_wait_and_the_journal_stores_nothing_more(tmp_path, gate):
    journal = Journal(tmp_path, "disk", disk=gate.disk)
    journal.append_transaction(transaction(1))
    journal.wait_durable(1)
    until(lambda: is_folded(journal))
    gate.open.clear()
    gate.error = OSError(errno.EIO, "I/O error")
    journal.append_transaction(transaction(2))
    errors: list[str] = []

    def ask() -> None:
        try:
            journal.wait_durable(2)
        except JournalError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4
    assert "could not be synced" in errors[0]
    assert journal.failed
    gate.error = None
    attempts: list[Callable[[], None]] = [
        lambda: journal.append_transaction(transaction(3)),
        lambda: journal.append_labels([label(3)]),
        lambda: journal.wait_durable(2),
    ]
    for attempt in attempts:
        with pytest.raises(JournalError, match="could not be synced"):
            attempt()
    journal.wait_durable(1)
    journal.close()
    assert query(tmp_path, "SELECT id FROM transactions") == [("t1",)]


@pytest.mark.parametrize("promise", ["process", "disk"])
def test_the_log_is_synced_soon_without_anybody_asking(tmp_path, gate, promise):
    journal = Journal(tmp_path, promise, disk=gate.disk, sync_ms=5)
    begun = gate.begun
    journal.append_transaction(transaction(1))
    until(lambda: gate.begun > begun)
    until(lambda: is_folded(journal))
    begun = gate.begun
    time.sleep(0.03)
    assert gate.begun == begun, "nothing new, no sync"
    journal.close()


# ---- repair


def repair(state: Path, *args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["repair", str(state), *args])
    out, err = capsys.readouterr()
    return code, out + err


def test_repair_gives_up_what_is_told_to(tmp_path, capsys):
    journal = Journal(tmp_path, segment_bytes=600)
    records = fill(journal, 30)
    journal.close()
    assert repair(tmp_path, capsys=capsys) == (0, f"{tmp_path / 'journal'} is whole: 30 records in 4 files\n")
    file = sorted((tmp_path / "journal").glob("*.log"))[1]
    data = bytearray(file.read_bytes())
    data[HEADER_BYTES + 20] ^= 1
    file.write_bytes(data)
    last = int(file.stem) - 1
    for seq in (last - 1, last, last + 1, 30):
        (tmp_path / f"snapshot-{seq:015d}.bin").write_bytes(b"")
    code, words = repair(tmp_path, capsys=capsys)
    assert code == 1
    assert words.startswith(f"{file}, byte {HEADER_BYTES}, after record {last}: the checksum of a record is wrong")
    assert "--cut" in words
    with pytest.raises(RunError, match="the journal is damaged"):
        Journal(tmp_path)
    lock = lock_folder(tmp_path)
    code, words = repair(tmp_path, "--cut", capsys=capsys)
    assert (code, "another process is using this state folder" in words) == (2, True)
    lock.release()
    code, words = repair(tmp_path, "--cut", capsys=capsys)
    assert code == 0
    assert f"cut after record {last}; kept aside: " in words
    assert len(list((tmp_path / "journal").glob("cut-*"))) == 3
    assert sorted(int(f.stem[-15:]) for f in tmp_path.glob("snapshot-*")) == [last - 1, last]
    assert not (tmp_path / "journal.sqlite").exists()
    journal = Journal(tmp_path)
    assert list(journal.after(0)) == records[:last]
    journal.append_transaction(transaction(last + 1))
    journal.close()


def test_repair_of_a_log_whose_last_file_is_missing(tmp_path, capsys):
    journal = Journal(tmp_path, segment_bytes=400)
    records = fill(journal, 30)
    journal.close()
    file = sorted((tmp_path / "journal").glob("*.log"))[-1]
    file.unlink()
    with pytest.raises(RunError, match=f"{file.name}, byte 0, .*: the file is missing; the index has records up to 30"):
        Journal(tmp_path)
    assert repair(tmp_path, "--cut", capsys=capsys)[0] == 0
    journal = Journal(tmp_path)
    assert list(journal.after(0)) == records[: int(file.stem) - 1]
    journal.close()


def test_repair_where_there_is_no_journal(tmp_path, capsys):
    assert repair(tmp_path, capsys=capsys) == (2, f"error: {tmp_path}: there is no journal here\n")
