"""Alerts: what is one, what becomes of it, the label that closing it is, and pages that lose nothing."""

import base64
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.errors import JournalError, RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.schema import Schema
from serve.alertindex import Filters, amount_of, is_backfilled
from serve.alerts import AlertQuery, Alerts, Events, begin_backfill, decode_query, end_backfill
from serve.answers import Alert, AlertPage
from serve.journal import ActionRecord, Journal, LabelRecord, TransactionRecord
from serve.log import read_frames
from serve.records import decode_records, encode_action
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


def strict(service: Service) -> Service:
    """Everything is reviewed, nothing declined."""
    service.engine.policy = replace(
        service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=0.0, decline=1.01)
    )
    return service


@pytest.fixture
def strict_service(service):
    return strict(service)


def score(service: Service, **changes: Any) -> dict[str, Any]:
    return json.loads(service.score(json.dumps({**ROW, **changes}).encode()))


def asked(service: Service, **query: Any) -> list[dict[str, Any]]:
    return json.loads(service.alerts(urlencode(query)))["alerts"]


def alert(service: Service, identity: str = "t1") -> dict[str, Any]:
    return json.loads(service.alert(identity))


def act(service: Service, state: str, identity: str = "t1", author: str = "ann", **more: Any) -> dict[str, Any]:
    return json.loads(service.change_alert(identity, json.dumps({"state": state, **more}).encode(), author))


def refusal(call: Any, *args: Any, **more: Any) -> tuple[int, str, str]:
    with pytest.raises(RequestError) as caught:
        call(*args, **more)
    assert caught.value.message
    return caught.value.status, caught.value.code, caught.value.field


def label(service: Service, identity: str, is_fraud: bool, source: str = "chargeback") -> None:
    service.add_labels(json.dumps([{"transaction_id": identity, "is_fraud": is_fraud, "source": source}]).encode())


# ---- what is an alert


def test_what_is_not_approved_is_an_alert_at_once(strict_service, cards):
    """Whatever the index has by then."""
    answer = score(strict_service)
    (seen,) = asked(strict_service)
    probability = answer["fraud_probability"]
    assert seen == {
        "transaction_id": "t1", "seq": 1, "user": "ann", "time": "2020-09-13T12:26:40Z", "decision": "review",
        "fraud_probability": probability, "amount": 20.0, "risk": probability * 20.0, "reasons": answer["reasons"], "model": cards.id,
        "state": "open", "assigned_to": None, "author": None, "note": "", "changed_at": None, "label": None,
    }  # fmt: skip
    assert alert(strict_service) == {**seen, "changes": []}


def test_what_is_approved_is_none(service):
    service.engine.policy = replace(
        service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=1.01, decline=1.01)
    )
    score(service)
    assert asked(service) == []
    assert refusal(service.alert, "t1") == (404, "unknown_alert", "")
    assert refusal(act, service, "in_review") == (404, "unknown_alert", "")
    assert refusal(service.alert, "nobody") == (404, "unknown_alert", "")


def test_a_degraded_answer_is_none(cards, tmp_path, monkeypatch):
    """It is not in the journal, so there is nothing to look at."""
    from serve.fallback import FallbackSettings

    with Service(cards, tmp_path / "state", fallback=FallbackSettings("limits", without_amount="decline")) as service:

        def fail(*_: object) -> None:
            raise RuntimeError

        monkeypatch.setattr(service.engine.step, "run_bound", fail)
        assert score(service)["degraded"]
        assert asked(service) == []


def test_a_backfill_makes_none_and_what_comes_after_it_does(cards, tmp_path):
    with strict(Service(cards, tmp_path / "state")) as service:
        score(service, id="before")
        begin_backfill(service.journal)
        score(service, id="loaded")
        end_backfill(service.journal)
        score(service, id="after")
        assert [a["transaction_id"] for a in asked(service)] == ["after", "before"]
        assert refusal(service.alert, "loaded")[0] == 404
    with Service(cards, tmp_path / "state") as service:
        begin_backfill(service.journal)  # and is killed
        strict(service)
        score(service, id="loaded too")
        service.abandon()
    (tmp_path / "state" / "journal.sqlite").unlink()
    with strict(Service(cards, tmp_path / "state")) as service:
        score(service, id="last")
        assert [a["transaction_id"] for a in asked(service)] == ["last", "after", "before"]
        assert refusal(service.alert, "loaded too")[0] == 404


@pytest.mark.parametrize(
    ("ranges", "seqs"), [([], []), ([(0, 3)], [1, 2, 3]), ([(1, 2), (4, None)], [2, 5, 6, 7]), ([(3, 3)], [])]
)
def test_ranges_of_backfills(ranges, seqs):
    assert [seq for seq in range(1, 8) if is_backfilled(ranges, seq)] == seqs


# ---- a life


def test_a_life(strict_service):
    score(strict_service)
    taken = act(strict_service, "in_review", note="looks odd")
    assert (taken["state"], taken["assigned_to"], taken["author"], taken["note"], taken["changed_at"]) == (
        "in_review", "ann", "ann", "looks odd", "1970-01-01T00:00:01Z",
    )  # fmt: skip
    over = act(strict_service, "in_review", author="bob")
    assert (over["assigned_to"], over["author"], over["note"]) == ("bob", "bob", "")
    assert act(strict_service, "open", author="bob")["assigned_to"] is None
    closed = act(strict_service, "dismissed", author="cy")
    assert (closed["state"], closed["assigned_to"]) == ("dismissed", "cy")
    assert [(c["seq"], c["state"], c["author"]) for c in closed["changes"]] == [
        (2, "in_review", "ann"), (3, "in_review", "bob"), (4, "open", "bob"), (5, "dismissed", "cy"),
    ]  # fmt: skip
    (listed,) = asked(strict_service)
    assert {**listed, "changes": closed["changes"]} == closed == alert(strict_service)


STATES = ("open", "in_review", "confirmed", "dismissed")
ALLOWED = {
    ("open", "in_review"), ("open", "confirmed"), ("open", "dismissed"), ("in_review", "open"),
    ("in_review", "in_review"), ("in_review", "confirmed"), ("in_review", "dismissed"), ("confirmed", "in_review"),
    ("dismissed", "in_review"),
}  # fmt: skip


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_every_transition(strict_service, before, after):
    score(strict_service)
    if before != "open":
        act(strict_service, before)
    last = strict_service.journal.last_seq
    if (before, after) in ALLOWED:
        assert act(strict_service, after, author="bob")["state"] == after
    else:
        assert refusal(act, strict_service, after, author="bob") == (409, "conflict", "state")
        assert strict_service.journal.last_seq == last
        assert alert(strict_service)["state"] == before


def test_two_that_take_the_same_alert(strict_service):
    """Who was second is told so, if he says what he saw."""
    score(strict_service)
    act(strict_service, "in_review", expected="open")
    assert refusal(act, strict_service, "in_review", author="bob", expected="open") == (409, "conflict", "expected")
    with pytest.raises(RequestError, match="the alert is in_review, by ann; expected open"):
        act(strict_service, "confirmed", author="bob", expected="open")
    assert act(strict_service, "confirmed", author="bob", expected="in_review")["state"] == "confirmed"


def test_an_answer_that_was_lost_is_asked_for_again(strict_service):
    score(strict_service)
    first = act(strict_service, "confirmed", note="stolen", expected="open")
    last = strict_service.journal.last_seq
    assert act(strict_service, "confirmed", note="stolen", expected="open") == first
    assert strict_service.journal.last_seq == last
    assert refusal(act, strict_service, "confirmed", note="lost", expected="open")[0] == 409
    assert refusal(act, strict_service, "confirmed", author="bob", note="stolen")[0] == 409


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"", (400, "invalid_json", "")),
        (b"[]", (422, "invalid_field", "")),
        (b"{}", (422, "invalid_field", "state")),
        (b'{"state": "gone"}', (422, "invalid_field", "state")),
        (b'{"state": "open", "note": 1}', (422, "invalid_field", "note")),
        (b'{"state": "open", "expected": "x"}', (422, "invalid_field", "expected")),
        (b'{"state": "open", "state": "open"}', (422, "duplicate_field", "state")),
        (b'{"state": "open", "note": "' + b"x" * 2001 + b'"}', (422, "invalid_field", "note")),
    ],
)
def test_a_wrong_change_is_refused(strict_service, body, wanted):
    score(strict_service)
    assert refusal(strict_service.change_alert, "t1", body, "ann") == wanted
    assert strict_service.journal.last_seq == 1


# ---- a label


def test_closing_an_alert_is_a_label(strict_service):
    score(strict_service)
    confirmed = act(strict_service, "confirmed")
    one_second = "1970-01-01T00:00:01Z"
    said = {"source": "analyst", "author": "ann", "known_at": one_second, "said_at": one_second}
    assert confirmed["label"] == {"is_fraud": True, **said}
    assert strict_service.journal.last_label("t1") == LabelRecord(3, "t1", True, 1000, 1000, "analyst", "ann")
    assert strict_service.engine.labels.heap, "it waits for its time as one that was posted does"
    assert act(strict_service, "in_review")["label"]["is_fraud"], "a second look takes nothing back"
    assert act(strict_service, "dismissed")["label"] == {"is_fraud": False, **said}
    assert strict_service.journal.last_seq == 6


def test_a_label_that_says_the_same_is_not_said_again(strict_service):
    score(strict_service)
    label(strict_service, "t1", True)
    confirmed = act(strict_service, "confirmed")
    assert (confirmed["label"]["source"], strict_service.journal.last_seq) == ("chargeback", 3)


def test_a_label_from_elsewhere_is_shown_and_changes_no_state(strict_service):
    score(strict_service)
    label(strict_service, "t1", True)
    for seen in (alert(strict_service), *asked(strict_service)):
        assert (seen["state"], seen["label"]["is_fraud"], seen["label"]["source"]) == ("open", True, "chargeback")


def test_a_closed_alert_teaches_like_a_posted_label(cards, tmp_path, memory_of):
    """Memory, and what is scored next, are the same."""
    answers = []
    for name, say in (
        ("closed", lambda s: act(s, "confirmed")),
        ("posted", lambda s: [s.act("other", "ann", b"{}"), label(s, "t1", True)]),
    ):
        with strict(Service(cards, tmp_path / name, clock=lambda: START + 5)) as service:
            score(service)
            say(service)
            after = score(service, id="t2", user="bob", time=START + MINUTE)
            answers.append((after, memory_of(service)))
        with Service(cards, tmp_path / name, clock=lambda: START + 5) as service:
            answers.append((after, memory_of(service)))
    assert answers[1:] == answers[:-1]


def test_state_and_label_are_one_frame_of_the_log(strict_service, tmp_path):
    """So a crash leaves both or neither."""
    score(strict_service)
    act(strict_service, "confirmed")
    frames = list(read_frames(tmp_path / "state" / "journal"))
    kinds = [[type(record).__name__ for record in decode_records(f.seq, f.payload)] for f in frames]
    assert kinds[-1] == ["ActionRecord", "LabelRecord"]
    assert frames[-1].taken == 2


@pytest.mark.parametrize("missing", range(1, 60, 4))
def test_a_log_that_was_cut_off_in_the_change_has_neither_state_nor_label(cards, tmp_path, missing):
    with strict(Service(cards, tmp_path / "state")) as service:
        score(service)
        service.journal.wait_indexed(1, 10)
        act(service, "confirmed")
        service.abandon()
    (segment,) = (tmp_path / "state" / "journal").glob("*.log")
    (tmp_path / "state" / "journal.sqlite").unlink()
    content = segment.read_bytes()
    segment.write_bytes(content[:-missing])
    with Service(cards, tmp_path / "state") as service:
        assert service.journal.last_seq == 1
        (seen,) = asked(service)
        assert (seen["state"], seen["label"]) == ("open", None)
        assert act(service, "confirmed")["label"]["is_fraud"]


def test_what_cannot_be_stored_changes_nothing(cards, tmp_path, memory_of):
    import errno
    import os

    from serve.log import Disk

    full = threading.Event()

    def write(descriptor: int, data: bytes) -> int:
        if full.is_set():
            raise OSError(errno.ENOSPC, "full")
        return os.write(descriptor, data)

    with strict(Service(cards, tmp_path / "state", disk=Disk(write=write))) as service:
        score(service)
        before = memory_of(service), alert(service)
        full.set()
        assert refusal(act, service, "confirmed") == (503, "storage_unavailable", "")
        full.clear()
        assert (memory_of(service), alert(service)) == before
        assert act(service, "confirmed")["state"] == "confirmed"


def test_it_is_there_after_a_start_with_or_without_the_index(cards, tmp_path):
    with strict(Service(cards, tmp_path / "state")) as service:
        for n in range(6):
            score(service, id=f"t{n}", time=START + n)
        act(service, "confirmed", "t1", note="stolen")
        act(service, "in_review", "t2")
        before = asked(service), [alert(service, f"t{n}") for n in range(6)]
    for index in ("kept", "lost"):
        if index == "lost":
            (tmp_path / "state" / "journal.sqlite").unlink()
        with Service(cards, tmp_path / "state") as service:
            assert (asked(service), [alert(service, f"t{n}") for n in range(6)]) == before


def test_hashed_ids_are_found_by_either_form_and_shown_as_stored(make_bundle, cards_toml, tmp_path):
    bundle = make_bundle(cards_toml + '[identifiers]\ncolumns = { id = "hash", user = "hash" }\n')
    with strict(Service(bundle, tmp_path / "state")) as service:
        score(service)
        seen = alert(service)
        assert seen["transaction_id"].startswith("hmac:")
        assert seen["user"].startswith("hmac:")
        assert act(service, "confirmed")["label"]["is_fraud"]
        assert alert(service, seen["transaction_id"])["state"] == "confirmed"
        assert len(asked(service, user="ann")) == len(asked(service, user=seen["user"])) == 1
        assert asked(service, user="bob") == []
        assert "ann" not in service.alerts("").decode().replace('"author":"ann"', "").replace('"assigned_to":"ann"', "")


# ---- what is asked


@pytest.fixture
def many(strict_service) -> Service:
    for n in range(12):
        amount = [5.0, 500.0, 50.0][n % 3]
        score(strict_service, id=f"t{n}", user=f"u{n % 2}", time=START + n * MINUTE, amount=amount, merchant=f"m{n}")
    act(strict_service, "in_review", "t3")
    act(strict_service, "confirmed", "t4", author="bob")
    return strict_service


def ids(service: Service, **query: Any) -> list[str]:
    return [a["transaction_id"] for a in asked(service, **query)]


def test_filters(many, cards):
    everything = asked(many, limit=200)
    by = {a["transaction_id"]: a for a in everything}
    assert ids(many) == [f"t{n}" for n in range(11, -1, -1)]
    assert ids(many, state="in_review") == ["t3"]
    assert ids(many, state="confirmed", assigned_to="bob") == ["t4"]
    assert ids(many, assigned_to="nobody") == []
    assert len(ids(many, state="open")) == 10
    assert ids(many, user="u1") == ["t11", "t9", "t7", "t5", "t3", "t1"]
    assert ids(many, min_amount=500) == ["t10", "t7", "t4", "t1"]
    assert ids(many, decision="decline") == []
    assert len(ids(many, decision="review", model=cards.id)) == 12
    assert ids(many, model="another") == []
    begin, end = by["t4"]["time"], by["t6"]["time"]
    assert ids(many, **{"from": begin, "to": end}) == ["t5", "t4"]
    middle = sorted(a["fraud_probability"] for a in everything)[6]
    assert set(ids(many, min_probability=middle)) == {i for i, a in by.items() if a["fraud_probability"] >= middle}
    for sort in ("probability", "risk"):
        value = {"probability": "fraud_probability", "risk": "risk"}[sort]
        wanted = sorted(everything, key=lambda a: (a[value], a["seq"]), reverse=True)
        assert ids(many, sort=sort) == [a["transaction_id"] for a in wanted]
        assert (
            ids(many, sort=sort, state="open", limit=3)
            == [a["transaction_id"] for a in wanted if a["state"] == "open"][:3]
        )


def test_reasons_are_found_by_code(journal_of_alerts):
    journal, alerts = journal_of_alerts
    for n, codes in enumerate([["rule:night"], ["rule:night", "amount"], [], ["amount", "amount"]], start=1):
        journal.append_transaction(transaction(n, 0.5, codes=codes))
    assert [a.seq for a in alerts.page("reason=rule:night", nothing).alerts] == [2, 1]
    assert [a.seq for a in alerts.page("reason=amount", nothing).alerts] == [4, 2]
    assert alerts.page("reason=rule:night", nothing).alerts[0].reasons[1].code == "amount"
    assert alerts.page("reason=rule", nothing).alerts == []


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("state=closed", "invalid_field", "state"),
        ("state=", "invalid_field", "state"),
        ("decision=approve", "invalid_field", "decision"),
        ("limit=0", "invalid_field", "limit"),
        ("limit=201", "invalid_field", "limit"),
        ("limit=ten", "invalid_field", "limit"),
        ("limit=1.5", "invalid_field", "limit"),
        ("limit=true", "invalid_field", "limit"),
        ("limit=1&limit=2", "duplicate_field", "limit"),
        ("min_probability=1.1", "invalid_field", "min_probability"),
        ("min_probability=NaN", "invalid_field", "min_probability"),
        ("min_probability=-0.1", "invalid_field", "min_probability"),
        ("min_amount=1e999", "invalid_field", "min_amount"),
        ("min_amount=1_0", "invalid_field", "min_amount"),
        ("from=yesterday", "invalid_field", "from"),
        ("to=2020-13-01", "invalid_field", "to"),
        ("sort=oldest", "invalid_field", "sort"),
        ("cursor=abc", "invalid_field", "cursor"),
        ("cursor=%00", "invalid_field", "cursor"),
        ("cursor=", "invalid_field", "cursor"),
        ("cursr=abc", "invalid_field", "cursr"),
        ("state", "invalid_field", ""),
        ("user=%ff", "invalid_field", ""),
        ("user=" + "&user=" * 3, "duplicate_field", "user"),
    ],
)
def test_a_wrong_question_names_the_parameter(service, query, code, field):
    assert refusal(service.alerts, query) == (422, code, field)


def test_texts_of_a_question_are_only_compared(many):
    for text in ("'; DROP TABLE alerts; --", "\x00", "é", "%", "_", '"'):
        assert ids(many, user=text, reason=text, model=text) == []
    assert len(ids(many)) == 12


def test_every_parameter_is_described_and_taken(service):
    assert {f.encode_name for f in msgspec.structs.fields(AlertQuery)} >= {"from", "to", "cursor", "limit"}
    taken = decode_query("from=2020-01-01T00%3A00%3A00%2B02%3A00&limit=200&min_amount=-5&min_probability=0")
    assert (taken.since, taken.limit, taken.min_amount) == ("2020-01-01T00:00:00+02:00", 200, -5.0)


# ---- pages


def nothing() -> None:
    """Nobody is let in meanwhile."""


def transaction(
    seq: int,
    probability: float,
    amount: float | None = 10.0,
    codes: Sequence[str] = (),
    **changes: Any,
) -> TransactionRecord:
    reasons = [{"code": code, "text": code, "contribution": 0.5} for code in codes]
    answer = {"decision": "review", "fraud_probability": probability, "reasons": reasons}
    values = {
        "seq": seq, "id": f"t{seq}", "user": "ann", "time": 1000 * seq, "content": b"c", "context": b"", "bundle": "b",
        "raw": json.dumps({"amount": amount}).encode(), "answer": json.dumps(answer).encode(),
    }  # fmt: skip
    return TransactionRecord(**{**values, **changes})


SCHEMA = Schema(transaction="id", user="user", time="time", time_unit="ms", amount="amount", numeric=("amount",))


@pytest.fixture
def journal_of_alerts(tmp_path) -> Iterator[tuple[Journal, Alerts]]:
    journal = Journal(tmp_path, sync_ms=1)
    alerts = Alerts(journal, _plain(), SCHEMA)
    yield journal, alerts
    alerts.close()
    journal.close()


def _plain() -> Identifiers:
    from seqfraud.config import IdentifiersConfig

    return Identifiers(SCHEMA, IdentifiersConfig(), None)


def act_on(journal: Journal, seq: int, state: str) -> None:
    body = {"alert": seq, "transaction_id": f"t{seq}", "state": state, "assigned_to": None, "note": ""}
    journal.append_action(ActionRecord(journal.last_seq + 1, "alert", 5, "ann", json.dumps(body).encode()))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4), max_size=8),
    st.sampled_from(["newest", "probability", "risk"]),
    st.integers(1, 4),
)
def test_whatever_is_added_between_pages_none_is_lost_and_none_comes_twice(before, between, sort, limit):
    """And no page is longer than it may be. Probabilities and amounts are often equal."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        journal = Journal(Path(folder), sync_ms=0.1)
        alerts = Alerts(journal, _plain(), SCHEMA)

        def add(drawn: list[tuple[int, int]]) -> None:
            for p, amount in drawn:
                journal.append_transaction(transaction(journal.last_seq + 1, p / 4, None if amount == 3 else amount))

        add(before)
        last, seen, query = journal.last_seq, list[Alert](), f"sort={sort}&limit={limit}"
        page: AlertPage = alerts.page(query, nothing)
        while True:
            seen += page.alerts
            assert len(page.alerts) == limit or page.next is None
            if page.next is None:
                break
            if between:
                add(between.pop())
                act_on(journal, seen[-1].seq, "in_review")
            page = alerts.page(f"{query}&cursor={page.next}", nothing)
        keys = [{"newest": a.seq, "probability": a.fraud_probability, "risk": a.risk}[sort] for a in seen]
        assert sorted(a.seq for a in seen) == list(range(1, last + 1))
        assert list(zip(keys, (a.seq for a in seen), strict=True)) == sorted(
            zip(keys, (a.seq for a in seen), strict=True), reverse=True
        )
        alerts.close()
        journal.close()


def test_a_cursor_belongs_to_its_question(many):
    cursor = json.loads(many.alerts("sort=risk&limit=2"))["next"]
    assert len(asked(many, sort="risk", limit=5, cursor=cursor)) == 5, "another limit is no other question"
    for other in ("sort=probability", "state=open&sort=risk", "sort=risk&min_amount=1"):
        assert refusal(many.alerts, f"{other}&cursor={cursor}") == (422, "invalid_field", "cursor")
    for wrong in (cursor[:-4], cursor + "AAAA", base64.urlsafe_b64encode(b"\x90").decode(), quote(cursor[:-1] + "é")):
        assert refusal(many.alerts, f"sort=risk&cursor={wrong}") == (422, "invalid_field", "cursor")


def test_the_whole_queue_by_pages_is_the_queue(many):
    for sort in ("newest", "probability", "risk"):
        pages, cursor = [], None
        while True:
            query = {"sort": sort, "limit": 5} | ({} if cursor is None else {"cursor": cursor})
            answer = json.loads(many.alerts(urlencode(query)))
            pages += answer["alerts"]
            cursor = answer["next"]
            if cursor is None:
                break
        assert pages == asked(many, sort=sort, limit=200)


def test_questions_hold_up_no_scoring(strict_service, monkeypatch):
    """They use a connection of their own, outside of the service's lock."""
    score(strict_service)
    strict_service.journal.wait_indexed(1, 10)
    with strict_service._lock:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(len(asked(strict_service))))
        thread.start()
        thread.join(10)
    assert answers == [1]


def test_an_index_that_cannot_follow_is_said(tmp_path):
    journal = Journal(tmp_path, sync_ms=1e7)
    alerts = Alerts(journal, _plain(), SCHEMA)
    journal.append_transaction(transaction(1, 0.5))
    with pytest.raises(JournalError, match="falls behind: not within"):
        journal.wait_indexed(1, 0.01)
    alerts.close()
    journal.close()


def test_another_column_as_the_amount_counts_for_what_was_stored_before(tmp_path):
    journal = Journal(tmp_path, sync_ms=1)
    Alerts(journal, _plain(), Schema(**{**vars(SCHEMA), "amount": None})).close()
    journal.append_transaction(transaction(1, 0.5, raw=b'{"amount": 3, "total": 8}'))
    journal.append_transaction(transaction(2, 0.5, raw=b'{"amount": null}'))
    without = Alerts(journal, _plain(), Schema(**{**vars(SCHEMA), "amount": None}))
    assert [(a.amount, a.risk) for a in without.page("", nothing).alerts] == [(None, 0.0)] * 2
    without.close()
    for column, amount in (("amount", 3.0), ("total", 8.0)):
        other = Alerts(journal, _plain(), Schema(**{**vars(SCHEMA), "amount": column, "numeric": (column,)}))
        journal.append_labels([LabelRecord(journal.last_seq + 1, "x", True, 1, 1, "api", "ann")])
        assert [(a.amount, a.risk) for a in other.page("", nothing).alerts] == [(None, 0.0), (amount, amount / 2)]
        other.close()
    journal.close()


@pytest.mark.parametrize(
    ("raw", "amount"),
    [(b'{"a": 5}', 5.0), (b'{"a": -0.5}', -0.5), (b'{"a": null}', None), (b"{}", None), (b'{"a": "x"}', None)],
)
def test_the_amount_of_a_row(raw, amount):
    assert amount_of(raw, "a") == amount
    assert amount_of(raw, None) is None


def test_filters_have_a_condition_each():
    from serve.alertindex import _CONDITIONS

    assert set(_CONDITIONS) == set(Filters._fields)


# ---- events


def test_events_are_alerts_and_their_changes_in_order_and_the_same_bytes_again(journal_of_alerts):
    journal, _ = journal_of_alerts
    approved = b'{"decision": "approve", "fraud_probability": 0.1, "reasons": []}'
    journal.append_transaction(transaction(1, 0.5, codes=["rule:night"]))
    journal.append_transaction(transaction(2, 0.1, answer=approved))
    act_on(journal, 1, "in_review")
    journal.append_labels([LabelRecord(4, "t1", True, 5, 5, "api", "ann")])
    act_on(journal, 1, "confirmed")
    journal.append_transaction(transaction(6, 0.25))
    journal.append_action(ActionRecord(7, "rules", 5, "ann", b"{}"))
    journal.wait_indexed(7, 10)
    events = Events(journal, "amount")
    found, after = [], 0
    while (event := events.next_event(after)) is not None:
        found.append(event)
        after = event.seq
    assert [(e.seq, json.loads(e.body)["type"], json.loads(e.body)["data"]["state"]) for e in found] == [
        (1, "alert.opened", "open"), (3, "alert.changed", "in_review"), (5, "alert.changed", "confirmed"),
        (6, "alert.opened", "open"),
    ]  # fmt: skip
    assert [events.event(e.seq) for e in found] == found
    assert len({e.id for e in found}) == 4
    assert all("." not in e.id for e in found), "the signed text is id.timestamp.body"
    first = json.loads(found[0].body)
    assert first["data"]["reasons"] == [{"code": "rule:night", "text": "rule:night", "contribution": 0.5}]
    assert "label" not in first["data"], "it may change"
    assert [events.waiting(seq) for seq in (0, 1, 5, 7)] == [4, 3, 1, 0]
    assert events.event(2) is events.event(7) is events.event(99) is None
    events.close()


def test_an_action_without_labels_is_what_it_was_before_it_could_have_some():
    record = ActionRecord(7, "alert", 5, "ann", b"{}")
    said = [LabelRecord(8, "t1", True, 1, 2, "analyst", "ann")]
    assert decode_records(7, encode_action(record)) == (record,)
    assert decode_records(7, encode_action(record, said)) == (record, *said)
