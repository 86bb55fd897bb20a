"""The journal as a table, compared with what was posted and answered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.errors import RunError
from serve.journalled import is_fraud, matured, read_journal
from serve.records import LabelRecord, TransactionRecord
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


def score(service: Service, **changes: Any) -> dict[str, Any]:
    return json.loads(service.score(json.dumps({**ROW, **changes}).encode()))


def say(service: Service, **label: Any) -> None:
    service.add_labels(json.dumps([label]).encode())


@pytest.mark.parametrize("seed", range(2))
def test_every_transaction_is_there_as_it_was_answered_while_the_service_runs(cards, tmp_path: Path, live, seed):
    schema = cards.manifest.schema
    with Service(cards, tmp_path, clock=lambda: START) as service:
        answers = live(service, seed, 200)
        records = list(service.journal.after(0))
        read = read_journal(tmp_path, schema, fields=True, context=True)
        table = read.table
        transactions = [r for r in records if isinstance(r, TransactionRecord)]
        newest = {r.transaction_id: r for r in records if isinstance(r, LabelRecord)}
        assert read.last_seq == records[-1].seq
        for name in ("seq", "id", "user", "time"):
            assert table[name].to_pylist() == [getattr(r, name) for r in transactions]
        assert dict(zip(table["id"].to_pylist(), table["probability"].to_pylist(), strict=True)) == answers
        assert set(table["model"].to_pylist()) == {cards.id}
        assert table["decision"].to_pylist() == [json.loads(r.answer)["decision"] for r in transactions]
        assert table["late"].to_pylist() == [json.loads(r.answer)["late"] for r in transactions]
        assert table["amount"].to_pylist() == [json.loads(r.raw)["amount"] for r in transactions]
        assert not any(table["control"].to_pylist())
        said = [newest.get(r.id) for r in transactions]
        assert table["label"].to_pylist() == [None if x is None else int(x.is_fraud) for x in said]
        assert table["label_known_at"].to_pylist() == [None if x is None else x.known_at for x in said]
        assert 0 < table["label"].null_count < len(table)
        # labels of what was never posted are kept aside
        assert set(read.labels["transaction_id"].to_pylist()) == set(newest) - set(answers)
        assert read.fields is not None
        for posted, row in zip(transactions, read.fields.to_pylist(), strict=True):
            raw = json.loads(posted.raw)
            assert row == {**raw, "id": str(raw["id"])}
        for posted, context in zip(transactions, read.context, strict=True):
            assert context.tobytes() == posted.context
            assert len(context) == cards.manifest.context.width


def test_the_newest_label_counts_and_a_moment_knows_only_what_was_said_by_then(cards, tmp_path: Path):
    schema = cards.manifest.schema
    with Service(cards, tmp_path, clock=lambda: START) as service:
        say(service, transaction_id="t2", is_fraud=True, known_at=START + 3 * MINUTE, source="bank")
        say(service, transaction_id="ghost", is_fraud=True, known_at=START)
        for n in range(1, 4):
            score(service, id=f"t{n}", time=START + n * MINUTE)
        say(service, transaction_id="t1", is_fraud=True, known_at=START + 4 * MINUTE)
        say(service, transaction_id="t1", is_fraud=False, known_at=START + 9 * MINUTE)
    whole = read_journal(tmp_path, schema)
    assert whole.table["label"].to_pylist() == [0, 1, None]
    assert whole.table["label_source"].to_pylist() == ["api", "bank", None]
    assert whole.table["label_said_at"].to_pylist() == [START, START, None]
    assert is_fraud(whole.table).tolist() == [False, True, False]
    assert whole.labels.select(["transaction_id", "label"]).to_pylist() == [{"transaction_id": "ghost", "label": 1}]
    assert (whole.fields, whole.context) == (None, [])
    for minutes, labels in [(3, [None, None]), (4, [None, 1, None]), (9, [1, 1, None]), (10, [0, 1, None])]:
        then = read_journal(tmp_path, schema, until=START + minutes * MINUTE).table
        assert then["label"].to_pylist() == labels


def test_a_part_of_the_journal(cards, tmp_path: Path):
    schema = cards.manifest.schema
    with Service(cards, tmp_path, clock=lambda: START) as service:
        for n in range(6):
            score(service, id=f"t{n}", time=START + (n if n != 4 else 1) * MINUTE)
        say(service, transaction_id="t0", is_fraud=True)
    assert read_journal(tmp_path, schema, after_seq=3).table["id"].to_pylist() == ["t3", "t4", "t5"]
    # the label of a transaction before that is not one of an unknown id
    assert len(read_journal(tmp_path, schema, after_seq=3).labels) == 0
    assert read_journal(tmp_path, schema, since=START + 3 * MINUTE).table["id"].to_pylist() == ["t3", "t5"]
    part = read_journal(tmp_path, schema, since=START + MINUTE, until=START + 3 * MINUTE).table
    assert part["id"].to_pylist() == ["t1", "t2", "t4"]
    nothing = read_journal(tmp_path, schema, after_seq=99, fields=True, context=True)
    assert (len(nothing.table), nothing.fields.num_rows, nothing.context) == (0, 0, [])
    assert nothing.table.schema == part.schema


def test_maturity_is_one_label_delay_whatever_was_said(cards, tmp_path: Path):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        for n in range(3):
            score(service, id=f"t{n}", time=START + n * MINUTE)
        say(service, transaction_id="t2", is_fraud=True, known_at=START)
    table = read_journal(tmp_path, cards.manifest.schema).table
    assert matured(table, START + 11 * MINUTE, 10 * MINUTE).tolist() == [True, True, False]
    np.testing.assert_array_equal(matured(table, START, 0), [True, False, False])


def test_missing_numbers_and_texts_are_null(rich, tmp_path: Path):
    row = {"id": 7, "user": 12, "time": "2026-01-01T00:00:00.250Z", "amount": 1, "age": None, "kind": "", "total": None,
           "ip": "10.1.2.3", "lat": 1.5, "long": 2.5}  # fmt: skip
    with Service(rich, tmp_path) as service:
        service.score(json.dumps(row).encode())
    read = read_journal(tmp_path, rich.manifest.schema, fields=True)
    assert read.table["amount"].to_pylist() == [None]
    assert read.fields is not None
    (stored,) = read.fields.to_pylist()
    assert stored.pop("time") == 1767225600250
    wanted = {**row, "id": "7", "user": "12", "kind": None}
    del wanted["time"]
    assert stored == wanted


def test_no_journal_other_fields_and_damage_are_refused(cards, rich, tmp_path: Path, live):
    with pytest.raises(RunError, match="no journal"):
        read_journal(tmp_path, cards.manifest.schema)
    with Service(cards, tmp_path, clock=lambda: START) as service:
        live(service, 0, 20)
    with pytest.raises(RunError, match="holds the fields id,user,time"):
        read_journal(tmp_path, rich.manifest.schema)
    (file,) = (tmp_path / "journal").glob("*.log")
    data = file.read_bytes()
    whole = len(read_journal(tmp_path, cards.manifest.schema).table)
    file.write_bytes(data[:-3])
    assert len(read_journal(tmp_path, cards.manifest.schema).table) in (whole, whole - 1)
    file.with_name("999999999999999.log").write_bytes(data)
    with pytest.raises(RunError, match="after record"):
        read_journal(tmp_path, cards.manifest.schema)
