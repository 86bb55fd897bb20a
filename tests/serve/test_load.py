"""A file as the service meets it: which label is said when, and a backfill that live traffic goes on from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.bundle import Bundle
from seqfraud.errors import RequestError, RunError
from seqfraud.table import MISSING, Transactions
from serve import replay as replaying
from serve.arrivals import arrivals
from serve.load import GROUP, load
from serve.replay import Client, replay
from serve.service import Service

HOUR = 3_600_000
START = 1_600_000_000_000
DELAY = 2 * HOUR


def table_of(bundle: Bundle, folder: Path, rows: list[dict[str, Any]]) -> Transactions:
    """Rows of CARDS through a file; `fraud` and `known_at` (ms) may be None."""
    names = ("id", "user", "time", "amount", "kind", "merchant", "device", "fraud", "known_at")
    defaults = {"user": "ann", "amount": 5.0, "kind": "food", "merchant": "m", "device": "d", "fraud": 0}
    columns = {name: [{**defaults, **row}.get(name) for row in rows] for name in names}
    columns["known_at"] = pa.array(columns["known_at"], pa.int64())
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), folder / "rows.parquet")
    return read_for_bundle(bundle, folder / "rows.parquet")


@pytest.fixture(scope="module")
def history(cards, tmp_path_factory) -> Transactions:
    """300 rows over 75 hours, several of one time, with labels before, at and after the label delay and none."""
    rng = np.random.default_rng(5)
    rows: list[dict[str, Any]] = []
    for n in range(300):
        time = START + n // 2 * HOUR // 2
        known = int(rng.choice([0, HOUR, DELAY, DELAY + 1, 9 * HOUR]))
        rows.append({
            "id": n, "user": f"u{rng.integers(6)}", "time": time, "amount": float(rng.choice([1, 20, 300])),
            "merchant": f"m{rng.integers(3)}", "device": f"d{rng.integers(9)}",
            "fraud": [1, 0, None][rng.choice(3, p=[0.3, 0.6, 0.1])], "known_at": time + known,
        })  # fmt: skip
    return table_of(cards, tmp_path_factory.mktemp("history"), rows)


def post(service: Service, table: Transactions, since: int | None = None, until: int | None = None) -> dict[str, float]:
    """The rest of a file as requests; probabilities by id."""
    out = {}
    for arrival in arrivals(table, DELAY, since, until):
        if arrival.labels:
            service.add_labels(json.dumps([vars(said) for said in arrival.labels]).encode())
        if arrival.row is not None:
            answer = json.loads(service.score(json.dumps(arrival.transaction).encode()))
            assert not answer["duplicate"]
            out[answer["transaction_id"]] = answer["fraud_probability"]
    return out


# ---- arrivals


def said(table: Transactions, since: int | None = None, until: int | None = None) -> list[tuple[Any, ...]]:
    """Arrivals in short: labels as (id, fraud, hours), transactions as their id."""
    out: list[tuple[Any, ...]] = []
    for arrival in arrivals(table, DELAY, since, until):
        out += [(d.transaction_id, d.is_fraud, (d.known_at - START) / HOUR) for d in arrival.labels]
        if arrival.row is not None:
            assert table.id_texts()[arrival.row] == arrival.transaction["id"]
            out.append((arrival.transaction["id"],))
        else:
            assert arrival.labels
    return out


@pytest.fixture
def small(cards, tmp_path) -> Transactions:
    rows = [
        {"id": 1, "time": START, "fraud": 1, "known_at": START + HOUR},
        {"id": 2, "time": START, "fraud": 0, "known_at": START + HOUR},
        {"id": 3, "time": START + HOUR, "fraud": 1, "known_at": None},
        {"id": 4, "time": START + HOUR, "fraud": 0, "known_at": None},
        {"id": 5, "time": START + 2 * HOUR, "fraud": None, "known_at": START + 2 * HOUR},
        {"id": 6, "time": START + 3 * HOUR, "fraud": 1, "known_at": START + 9 * HOUR},
        {"id": 7, "time": START + 4 * HOUR, "fraud": 0, "known_at": START + 6 * HOUR},
    ]
    return table_of(cards, tmp_path / "small", rows)


def test_labels_are_said_before_the_first_transaction_that_may_know_them(small):
    """Honest ones that silence would say by then are not said; a label that nobody heard comes at the end."""
    assert said(small) == [
        ("1",), ("2",),
        ("1", True, 1), ("2", False, 1), ("3",), ("4",),
        ("5",),
        ("3", True, 3), ("6",),
        ("7",),
        ("6", True, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [-1, 0, 1, 2, 2.5, 3, 9, 10])
def test_two_parts_of_a_file_say_everything_once(small, cut):
    at = START + int(cut * HOUR)
    first, second = said(small, until=at), said(small, since=at)
    assert sorted(map(str, first + second)) == sorted(map(str, said(small)))
    assert [x for x in first + second if len(x) == 1] == [x for x in said(small) if len(x) == 1]
    assert all(hours < cut for _, _, hours in (x for x in first if len(x) == 3))
    assert all(hours >= cut for _, _, hours in (x for x in second if len(x) == 3))


def test_without_labels_there_are_only_transactions(small):
    bare = Transactions(**{**vars(small), "label": None, "known_at": None})
    assert said(bare) == [(str(n),) for n in range(1, 8)]


# ---- load


def test_a_backfill_and_live_traffic_after_it_score_as_in_bulk(cards, history, tmp_path, memory_of):
    wanted = dict(zip(history.id_texts(), score_table(cards, history, threads=1).tolist(), strict=True))
    cut = int(history.time[200])
    with Service(cards, tmp_path / "a") as service:
        seen: list[int] = []
        done = load(service, history, cut, seen.append)
        assert done.transactions == int((history.time < cut).sum())
        assert done.duplicates == 0
        assert done.labels > 20
        assert list((tmp_path / "a").glob("snapshot-*")), "the next start is quick"
    with Service(cards, tmp_path / "a") as service:
        got = post(service, history, since=cut)
        parts = memory_of(service)
    assert len(got) == int((history.time >= cut).sum()) > 80
    assert max(abs(p - wanted[i]) for i, p in got.items()) <= 1e-5
    with Service(cards, tmp_path / "b") as service:
        got = post(service, history)
        assert max(abs(p - wanted[i]) for i, p in got.items()) <= 1e-5
        whole = memory_of(service)
    assert parts == whole, "a load is what posting is"


def test_a_load_run_again_finds_everything_there(cards, history, tmp_path, memory_of):
    with Service(cards, tmp_path) as service:
        first = load(service, history, int(history.time[150]))
        assert first.transactions == 150
        before = memory_of(service)
        again = load(service, history, int(history.time[150]))
        assert (again.transactions, again.duplicates, again.labels) == (150, 150, 0)
        assert memory_of(service) == before
        rest = load(service, history)
        assert (rest.transactions, rest.duplicates) == (300, 150)


def test_a_row_that_is_refused_is_named_and_those_before_it_stay(cards, history, tmp_path, memory_of):
    with Service(cards, tmp_path) as service:
        load(service, history, int(history.time[10]))
        changed = history.numbers.copy()
        changed[5] += 1
        other = Transactions(**{**vars(history), "numbers": changed})
        before = memory_of(service)
        with pytest.raises(RequestError, match=r"row 6: a transaction of this id was scored before with other content"):
            load(service, other)
        assert memory_of(service) == before
    with Service(cards, tmp_path) as service:
        assert memory_of(service) == before


def test_a_disk_that_fills_up_loses_a_group_and_no_more(cards, history, tmp_path, memory_of, monkeypatch, small_disk):
    """The whole group is taken back; memory was ahead of the journal, and its snapshot was kept for later."""
    monkeypatch.setattr("serve.load.GROUP", 40)
    with Service(cards, tmp_path / "control") as control:
        load(control, history)
        wanted = memory_of(control)
    with Service(cards, tmp_path / "a", disk=small_disk.disk) as service:
        small_disk.room = 60_000
        with pytest.raises(RunError, match=r"the journal cannot be written: .*; make room and load again") as caught:
            load(service, history)
        assert "\n" not in str(caught.value)
        assert not service.ready()
    assert not list((tmp_path / "a").glob("snapshot-*")), "memory was ahead of the journal"
    with Service(cards, tmp_path / "a") as service:
        kept = service.journal.last_seq
        assert 0 < kept < wanted["last_seq"]
        done = load(service, history)
        assert done.duplicates % 40 == 0
        assert memory_of(service) == wanted


def test_a_load_that_is_interrupted_keeps_its_groups_and_no_snapshot(cards, history, tmp_path, monkeypatch):
    assert GROUP >= 100
    monkeypatch.setattr("serve.load.GROUP", 50)
    steps: list[int] = []

    def stop(count: int) -> None:
        steps.append(count)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Service(cards, tmp_path) as service:
        load(service, history, None, stop)
    assert steps == [50, 50, 50]
    assert not list(tmp_path.glob("snapshot-*")), "it may have come in the middle of a record"
    with Service(cards, tmp_path) as again:
        done = load(again, history)
        assert (done.transactions, done.duplicates) == (300, 150)


def test_missing_labels_are_never_said(history):
    unknown = set(np.array(history.id_texts())[history.label == MISSING])
    assert len(unknown) > 10
    assert unknown.isdisjoint(x[0] for x in said(history) if len(x) == 3)


class Recorder(Client):
    """Takes what a replay sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def call(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        self.sent.append((path, content))
        return 200, {"transaction_id": "x", "fraud_probability": 0.5, "decision": "review", "duplicate": False}


def test_a_replay_sends_no_more_labels_at_once_than_a_service_takes(history, monkeypatch):
    whole, pieces = Recorder(), Recorder()
    replay(whole, history, DELAY)
    monkeypatch.setattr(replaying, "LABELS", 2)
    done = replay(pieces, history, DELAY)
    sizes = [[len(content) for path, content in r.sent if path == "/v1/labels"] for r in (whole, pieces)]
    assert max(sizes[0]) > 2
    assert max(sizes[1]) == 2
    assert done.labels == sum(sizes[0]) == sum(sizes[1])
    labels = [[label for path, content in r.sent if path == "/v1/labels" for label in content] for r in (whole, pieces)]
    assert labels[0] == labels[1]


def test_what_is_loaded_makes_no_alerts(cards, history, tmp_path):
    """However often, and in how many parts; what comes live afterwards does."""
    with Service(cards, tmp_path / "state") as service:
        service.engine.policy = replace(
            service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=0.0)
        )
        half = int(history.time[150])
        load(service, history, half)
        last = service.journal.last_seq
        load(service, history)
        assert json.loads(service.alerts(""))["alerts"] == []
        assert json.loads(service.journal.meta("backfills") or "") == [[0, service.journal.last_seq]]
        assert service.journal.last_seq > last
        row = {"id": "live", "user": "ann", "time": int(history.time[-1]) + 1, "amount": 5}
        service.score(json.dumps(row).encode())
        assert [a["transaction_id"] for a in json.loads(service.alerts(""))["alerts"]] == ["live"]
