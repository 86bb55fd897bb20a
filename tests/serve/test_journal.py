"""The journal: one sequence over transactions and labels, whole or not at all, and readable by this version."""

import sqlite3
from pathlib import Path

import pytest

from seqfraud.errors import RunError
from serve.journal import Journal, LabelRecord, TransactionRecord


def transaction(seq: int, **changes: object) -> TransactionRecord:
    values = {
        "seq": seq, "id": f"t{seq}", "user": "ann", "time": 1000 * seq, "content": b"c%d" % seq, "raw": b'{"a": 1}',
        "context": b"\x00\x01", "answer": b"{}", "bundle": "b",
    }  # fmt: skip
    return TransactionRecord(**{**values, **changes})  # type: ignore[arg-type]


def label(seq: int, identity: str = "t1", is_fraud: bool = True) -> LabelRecord:
    return LabelRecord(seq, identity, is_fraud, 5000, 6000, "api")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path):
    opened = Journal(path)
    yield opened
    opened.close()


def test_records_come_back_as_they_were_written(journal):
    strange = 'it\'s \x00 \u2603 "quoted" \U0001f600'
    record = transaction(1, id=strange, user=strange, time=-5, content=bytes(range(256)))
    journal.append_transaction(record)
    journal.append_labels([label(2, strange, False)])
    assert journal.transaction(strange) == record
    assert journal.transaction_at(1) == record
    assert journal.last_label(strange) == label(2, strange, False)
    assert journal.seq_of(strange) == (1, -5)


def test_what_is_not_there_is_none(journal):
    journal.append_labels([label(1)])
    assert journal.transaction("t1") is None
    assert journal.seq_of("t1") is None
    assert journal.last_label("other") is None
    assert journal.meta("other") is None
    with pytest.raises(KeyError):
        journal.transaction_at(1)


def test_sequence_numbers_count_both_kinds_and_survive_reopening(path):
    journal = Journal(path)
    assert journal.last_seq == 0
    journal.append_transaction(transaction(1))
    journal.append_labels([label(2), label(3)])
    journal.append_labels([])
    assert journal.last_seq == 3
    journal.close()
    journal = Journal(path)
    assert journal.last_seq == 3, "the newest record is a label"
    journal.append_transaction(transaction(4))
    journal.close()
    journal = Journal(path)
    assert journal.last_seq == 4, "the newest record is a transaction"
    journal.close()


def test_after_merges_both_kinds_in_arrival_order(journal):
    records = [transaction(1), label(2), label(3), transaction(4), transaction(5), label(6, "t4")]
    for record in records:
        if isinstance(record, TransactionRecord):
            journal.append_transaction(record)
        else:
            journal.append_labels([record])
    for seq in range(8):
        assert list(journal.after(seq)) == records[seq:]


def test_after_lets_other_questions_be_asked_in_between(journal):
    """A rebuild looks records up while it walks them."""
    for seq in range(1, 50):
        journal.append_transaction(transaction(seq))
    assert [journal.seq_of(record.id)[0] for record in journal.after(0)] == list(range(1, 50))


def test_the_newest_label_counts_whatever_its_time(journal):
    journal.append_labels([LabelRecord(1, "t", True, 9000, 0, "a"), LabelRecord(2, "t", False, 10, 0, "b")])
    assert journal.last_label("t").seq == 2


def test_history_of_a_user(journal):
    for seq, (user, time) in enumerate([("ann", 30), ("bob", 10), ("ann", 10), ("ann", 20), ("ann", 20)], start=1):
        journal.append_transaction(transaction(seq, user=user, time=time))
    assert [journal.events_before("ann", time) for time in (9, 10, 19, 20, 30, 99)] == [0, 1, 1, 3, 4, 4]
    assert [record.seq for record in journal.recent("ann", 3)] == [1, 5, 4], "newest first, the later arrival first"


def test_an_id_is_there_once(journal):
    journal.append_transaction(transaction(1))
    with pytest.raises(sqlite3.IntegrityError):
        journal.append_transaction(transaction(2, id="t1"))
    assert journal.last_seq == 1
    journal.append_transaction(transaction(2))


def test_labels_are_stored_all_or_none(journal):
    journal.append_labels([label(1)])
    with pytest.raises(sqlite3.Error):
        journal.append_labels([label(2), label(1)])
    assert [record.seq for record in journal.after(0)] == [1]
    assert journal.last_seq == 1
    journal.append_labels([label(2), label(3)])
    assert journal.last_seq == 3


def test_a_record_is_there_for_others_at_once_and_a_group_with_its_end(journal, path):
    other = sqlite3.connect(path)

    def count() -> int:
        return other.execute("SELECT (SELECT count(*) FROM transactions) + (SELECT count(*) FROM labels)").fetchone()[0]

    journal.append_transaction(transaction(1))
    assert count() == 1
    journal.begin()
    journal.append_transaction(transaction(2))
    journal.append_labels([label(3)])
    assert count() == 1
    assert journal.transaction("t2") is not None, "seen by the writer"
    journal.commit()
    assert count() == 3
    other.close()


def test_another_format_is_refused_and_left_as_it_is(path):
    journal = Journal(path)
    journal.append_transaction(transaction(1))
    journal.set_meta("version", "2")
    journal.close()
    with pytest.raises(RunError, match=r"journal\.sqlite: journal format 2; this version reads format 1"):
        Journal(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone() == ("2",)
    db.execute("UPDATE meta SET value = '1' WHERE key = 'version'")
    db.commit()
    db.close()
    journal = Journal(path)
    assert journal.transaction("t1") == transaction(1)
    journal.close()


def test_what_is_no_journal_is_refused_in_one_line(path):
    path.write_bytes(b"this is not a database, and long enough to be seen as such " * 50)
    with pytest.raises(RunError, match="not readable as a journal") as caught:
        Journal(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError):
        Journal(path.parent / "no such folder" / "journal.sqlite")
