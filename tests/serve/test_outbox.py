"""The outbox: in order, at least once, whatever the receiver does and whenever the service dies."""

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from seqfraud.errors import ConfigError, JournalError, RequestError, RunError
from serve.outbox import Outbox
from serve.replay import Client
from serve.service import Service
from serve.webhook import Event, WebhookSettings

START = 1_600_000_000_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


class Source:
    """Events by number, added by the test."""

    def __init__(self, *seqs: int) -> None:
        self.events = {seq: Event(seq, f"msg_{seq}_a", json.dumps({"seq": seq}).encode()) for seq in seqs}
        self.broken = ""

    def next_event(self, after: int) -> Event | None:
        if self.broken:
            raise JournalError(self.broken)
        later = [seq for seq in sorted(self.events) if seq > after]
        return self.events[later[0]] if later else None

    def event(self, seq: int) -> Event | None:
        return self.events.get(seq)

    def waiting(self, after: int) -> int:
        return sum(seq > after for seq in self.events)


class Clock:
    """Stands where it was put, or goes with the real one."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


Open = Callable[..., Outbox]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_outbox(receiver, secret_file, tmp_path, clock) -> Iterator[Open]:
    """`open_outbox(source, last_seq=99, **settings)`: a started one over `tmp_path`, quick to try again."""
    opened: list[Outbox] = []

    def make(source: Source, last_seq: int = 99, **changes: Any) -> Outbox:
        quick = {
            "first_delay_seconds": 0.01,
            "longest_delay_seconds": 0.05,
            "timeout_seconds": 0.3,
            "begin": "beginning",
        }
        settings = WebhookSettings(receiver.url, str(secret_file), **{**quick, **changes})
        outbox = Outbox(tmp_path, settings, source, last_seq, clock)
        outbox.start()
        opened.append(outbox)
        return outbox

    yield make
    for outbox in opened:
        outbox.stop()


def seqs(messages: list[Any]) -> list[int]:
    return [m.seq for m in messages]


# ---- order, and at least once


def test_events_arrive_in_order_each_once_where_nothing_fails(receiver, open_outbox):
    source = Source(*range(1, 30))
    outbox = open_outbox(source)
    receiver.wait(lambda: len(receiver.taken) == 29)
    source.events[40] = Event(40, "msg_40_a", b'{"seq": 40}')
    outbox.wake()
    receiver.wait(lambda: len(receiver.taken) == 30)
    assert seqs(receiver.got) == [*range(1, 30), 40]
    assert all(m.valid for m in receiver.got)
    assert receiver.connections == 1
    receiver.wait(lambda: outbox.state(99).delivered_to == 40)
    state = outbox.state(99)
    assert (state.status, state.waiting, state.dead_letters) == ("sending", 0, 0)


@pytest.mark.parametrize(
    "fail",
    [{"status": 500}, {"status": 408}, {"status": 429}, {"status": 302}, {"pause": 1.0}, {"drip": 0.1}],
    ids=["500", "408", "429", "302", "silent", "slow"],
)
def test_an_event_is_sent_until_it_arrives_and_the_next_waits(receiver, reply, open_outbox, fail):
    failing = [3]

    def answer(message: Any) -> Any:
        if message.seq == 2 and failing[0]:
            failing[0] -= 1
            return reply(**fail)
        return reply()

    receiver.reply = answer
    open_outbox(Source(1, 2, 3))
    receiver.wait(lambda: 3 in seqs(receiver.got))
    assert seqs(receiver.got) == [1, 2, 2, 2, 2, 3]
    assert len({m.id for m in receiver.got if m.seq == 2}) == 1
    assert len({m.body for m in receiver.got if m.seq == 2}) == 1


def test_a_receiver_that_is_away_for_a_while_misses_nothing(receiver, open_outbox):
    receiver.stop()
    source = Source(1, 2, 3)
    outbox = open_outbox(source)
    receiver.wait(lambda: outbox.state(99).trying is not None and outbox.state(99).trying.attempts >= 3)
    state = outbox.state(99)
    assert (state.status, state.delivered_to, state.waiting) == ("failing", 0, 3)
    assert (state.trying.seq, state.trying.status, state.trying.words) == (1, None, "connection refused")
    receiver.start()
    receiver.wait(lambda: len(receiver.taken) == 3)
    assert seqs(receiver.taken) == [1, 2, 3]


def test_one_is_in_flight_at_a_time(receiver, reply, open_outbox):
    receiver.reply = lambda _: reply(pause=0.1)
    open_outbox(Source(*range(1, 6)))
    began = time.monotonic()
    receiver.wait(lambda: len(receiver.taken) == 5)
    assert time.monotonic() - began >= 0.5


# ---- giving up


def test_what_is_rejected_becomes_a_dead_letter_and_the_next_goes_on(receiver, reply, open_outbox):
    receiver.reply = lambda m: reply(422 if m.seq == 2 else 200)
    outbox = open_outbox(Source(1, 2, 3), rejected_attempts=2)
    receiver.wait(lambda: outbox.state(99).delivered_to == 3)
    assert seqs(receiver.got) == [1, 2, 2, 3]
    (dead,) = outbox.state(99).dead
    assert (dead.seq, dead.attempts, dead.status, dead.words, dead.retry) == (2, 2, 422, "status 422", False)


def test_what_cannot_be_delivered_for_too_long_becomes_a_dead_letter(receiver, reply, open_outbox, clock):
    receiver.reply = lambda m: reply(500 if m.seq == 1 else 200)
    outbox = open_outbox(Source(1, 2), give_up_seconds=3600)
    receiver.wait(lambda: len(receiver.got) >= 4)
    assert outbox.state(99).dead_letters == 0
    clock.ahead = 3601
    receiver.wait(lambda: outbox.state(99).delivered_to == 2)
    assert [d.seq for d in outbox.state(99).dead] == [1]


def test_a_receiver_that_is_gone_is_left_alone_until_the_next_start(receiver, reply, open_outbox):
    """410: nobody wants them any more. They are kept, for that may be a mistake."""
    receiver.reply = lambda m: reply(410)
    outbox = open_outbox(Source(1, 2))
    receiver.wait(lambda: outbox.state(99).status == "stopped")
    outbox.wake()
    time.sleep(0.2)
    assert seqs(receiver.got) == [1]
    assert (outbox.state(99).waiting, outbox.state(99).dead_letters) == (2, 0)
    outbox.stop()
    receiver.reply = lambda m: reply()
    open_outbox(Source(1, 2))
    receiver.wait(lambda: len(receiver.taken) == 2)
    assert seqs(receiver.taken) == [1, 2]


def test_a_dead_letter_is_tried_once_more_or_dropped(receiver, reply, open_outbox):
    refuse = {2, 3, 4}
    receiver.reply = lambda m: reply(400 if m.seq in refuse else 200)
    outbox = open_outbox(Source(1, 2, 3, 4, 5), rejected_attempts=1)
    # the last one too: what is tried again may else come before it
    receiver.wait(lambda: outbox.state(99).dead_letters == 3 and 5 in seqs(receiver.got))
    refuse -= {2}
    for seq in ("2", "3"):
        outbox.settle(outbox.require_dead(seq), "retry")
    receiver.wait(
        lambda: [(d.seq, d.attempts, d.retry) for d in outbox.state(99).dead] == [(3, 2, False), (4, 1, False)]
    )
    assert seqs(receiver.got)[-2:] == [2, 3]
    outbox.settle(4, "drop")
    assert [d.seq for d in outbox.state(99).dead] == [3]
    for unknown in ("4", "1", "0", "-3", "3.0", "x", "", "٣", "9" * 30):
        with pytest.raises(RequestError) as caught:
            outbox.require_dead(unknown)
        assert (caught.value.status, caught.value.code) == (404, "unknown_dead_letter")


# ---- delays


def delays(settings: dict[str, Any], chance: float, attempts: int, tmp_path: Path, secret_file: Path) -> list[float]:
    from serve.webhook import Outcome

    outbox = Outbox(
        tmp_path,
        WebhookSettings("http://localhost:1/", str(secret_file), **settings),
        Source(),
        0,
        chance=lambda: chance,
    )
    try:
        return [outbox._delay(n, Outcome(500)) for n in range(1, attempts + 1)]
    finally:
        outbox.stop()


def test_delays_double_up_to_the_longest_with_jitter(tmp_path, secret_file):
    settings = {"first_delay_seconds": 1, "longest_delay_seconds": 10}
    assert delays(settings, 0.0, 6, tmp_path, secret_file) == [0.5, 1, 2, 4, 5, 5]
    assert delays(settings, 1.0, 6, tmp_path, secret_file) == [1, 2, 4, 8, 10, 10]
    assert delays({}, 0.0, 10_000, tmp_path, secret_file)[-1] == 150


def test_the_receiver_says_when_to_come_again(receiver, reply, open_outbox):
    receiver.reply = lambda m: reply(503, {"retry-after": "1"}) if len(receiver.got) == 1 else reply()
    open_outbox(Source(1))
    began = time.monotonic()
    receiver.wait(lambda: len(receiver.taken) == 1)
    assert time.monotonic() - began >= 0.9


def test_a_receiver_cannot_send_an_event_away_for_ever(tmp_path, secret_file):
    from serve.webhook import Outcome

    settings = WebhookSettings("http://localhost:1/", str(secret_file), give_up_seconds=60)
    outbox = Outbox(tmp_path, settings, Source(), 0)
    assert outbox._delay(1, Outcome(503, retry_after=1e12)) == 60
    outbox.stop()


# ---- starts


def test_where_an_outbox_begins(receiver, open_outbox):
    first = open_outbox(Source(1, 2, 3), last_seq=2, begin="now")
    receiver.wait(lambda: len(receiver.taken) == 1)
    first.stop()
    open_outbox(Source(1, 2, 3, 4), last_seq=4, begin="beginning")
    receiver.wait(lambda: len(receiver.taken) == 2)
    assert seqs(receiver.got) == [3, 4], "the cursor counts, once there is one"


def test_from_the_beginning_if_so_wanted(receiver, open_outbox):
    open_outbox(Source(1, 2), last_seq=2, begin="beginning")
    receiver.wait(lambda: len(receiver.taken) == 2)


def test_attempts_and_the_time_of_the_next_are_kept_over_a_start(receiver, reply, open_outbox):
    receiver.reply = lambda m: reply(503, {"retry-after": "3600"})
    first = open_outbox(Source(1))
    receiver.wait(lambda: first.state(99).trying is not None)
    before = first.state(99).trying
    first.stop()
    second = open_outbox(Source(1))
    time.sleep(0.2)
    assert second.state(99).trying == before
    assert len(receiver.got) == 1


def test_a_journal_that_was_cut_back_is_followed_from_its_end(receiver, open_outbox, caplog):
    first = open_outbox(Source(*range(1, 9)), last_seq=8)
    receiver.wait(lambda: len(receiver.taken) == 8)
    first.stop()
    open_outbox(Source(1, 2, 3, 6), last_seq=5)
    receiver.wait(lambda: len(receiver.taken) == 9)
    assert receiver.got[-1].seq == 6
    assert "had come to 8 of a journal that now ends with 5" in caplog.text


def test_a_file_that_is_none_is_said(tmp_path, secret_file):
    settings = WebhookSettings("http://localhost:1/", str(secret_file))
    (tmp_path / "outbox.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(RunError, match=r"outbox\.sqlite"):
        Outbox(tmp_path, settings, Source(), 0)
    (tmp_path / "outbox.sqlite").unlink()
    with sqlite3.connect(tmp_path / "outbox.sqlite") as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(RunError, match="format 9"):
        Outbox(tmp_path, settings, Source(), 0)
    with pytest.raises(ConfigError, match="no such webhook secret"):
        Outbox(tmp_path, replace(settings, secret="absent"), Source(), 0)


def test_a_journal_that_cannot_be_read_for_a_while(receiver, open_outbox, caplog, monkeypatch):
    monkeypatch.setattr("serve.outbox.RETRY_SECONDS", 0.02)
    source = Source(1)
    source.broken = "the disk is gone"
    outbox = open_outbox(source)
    receiver.wait(lambda: "the disk is gone" in caplog.text)
    time.sleep(0.1)
    assert caplog.text.count("the disk is gone") == 1
    assert outbox.state(99).status == "failing"
    source.broken = ""
    receiver.wait(lambda: len(receiver.taken) == 1)


def test_an_outage_is_one_line_and_none_shows_the_secret_or_the_path(receiver, reply, open_outbox, caplog, secret_file):
    receiver.reply = lambda m: reply(500 if len(receiver.got) < 5 else 200)
    outbox = open_outbox(Source(1))
    receiver.wait(lambda: receiver.taken)
    receiver.wait(lambda: "takes them again" in caplog.text)
    assert caplog.text.count("does not take alerts") == 1
    shown = caplog.text + msgspec.json.encode(outbox.state(99)).decode()
    assert "hunter2" not in shown and "/hook" not in shown
    assert secret_file.read_text().strip().removeprefix("whsec_") not in shown


# ---- the service


def strict(service: Service) -> Service:
    service.engine.policy = replace(
        service.engine.policy, thresholds=replace(service.engine.policy.thresholds, review=0.0, decline=1.01)
    )
    return service


def score(service: Service, **changes: Any) -> None:
    service.score(json.dumps({**ROW, **changes}).encode())


@pytest.fixture
def webhook(receiver, secret_file) -> WebhookSettings:
    return WebhookSettings(receiver.url, str(secret_file), first_delay_seconds=0.01)


def test_alerts_and_their_changes_leave_the_service(receiver, cards, tmp_path, webhook):
    with strict(Service(cards, tmp_path / "state", webhook=webhook)) as service:
        score(service)
        score(service, id="t2", user="bob")
        service.change_alert("t1", b'{"state": "confirmed", "note": "stolen"}', "ann")
        service.add_labels(b'[{"transaction_id": "t2", "is_fraud": true}]')
        receiver.wait(lambda: len(receiver.taken) == 3)
        state = json.loads(service.outbox())
    assert [(m.seq, m.content["type"]) for m in receiver.got] == [
        (1, "alert.opened"), (2, "alert.opened"), (3, "alert.changed"),
    ]  # fmt: skip
    assert all(m.valid for m in receiver.got)
    changed = receiver.got[2].content["data"]
    assert (changed["transaction_id"], changed["state"], changed["author"], changed["note"]) == (
        "t1", "confirmed", "ann", "stolen",
    )  # fmt: skip
    assert state["receiver"].startswith("http://localhost:") and "hunter2" not in json.dumps(state)


def test_nothing_leaves_before_it_is_synced(receiver, cards, tmp_path, webhook):
    """What is only in the process's or the system's memory may be gone after a power cut."""
    import os
    import threading

    from serve.log import Disk

    may_sync = threading.Event()

    def sync(descriptor: int) -> None:
        may_sync.wait()
        os.fdatasync(descriptor)

    may_sync.set()
    with strict(Service(cards, tmp_path / "state", webhook=webhook, disk=Disk(sync=sync))) as service:
        may_sync.clear()
        score(service)
        time.sleep(0.3)
        assert receiver.got == []
        may_sync.set()
        receiver.wait(lambda: receiver.taken)


def test_a_new_webhook_on_an_old_journal_begins_now_and_a_backfill_sends_nothing(receiver, cards, tmp_path, webhook):
    from serve.alerts import begin_backfill, end_backfill

    with strict(Service(cards, tmp_path / "state")) as service:
        score(service, id="old")
    with strict(Service(cards, tmp_path / "state", webhook=webhook)) as service:
        begin_backfill(service.journal)
        score(service, id="loaded")
        end_backfill(service.journal)
        score(service, id="new")
        receiver.wait(lambda: receiver.taken)
    assert [m.content["data"]["transaction_id"] for m in receiver.got] == ["new"]


def test_a_service_without_a_webhook_says_so(service):
    state = json.loads(service.outbox())
    assert (state["status"], state["receiver"], state["dead"]) == ("off", "", [])
    with pytest.raises(RequestError, match="no dead letter"):
        service.settle_dead_letter("1", b'{"action": "retry"}', "ann")
    assert not (Path(service._state) / "outbox.sqlite").exists()


def test_who_settles_a_dead_letter_is_in_the_journal(receiver, reply, cards, tmp_path, webhook):
    receiver.reply = lambda m: reply(400)
    settings = replace(webhook, rejected_attempts=1)
    with strict(Service(cards, tmp_path / "state", webhook=settings)) as service:
        score(service)
        receiver.wait(lambda: json.loads(service.outbox())["dead_letters"] == 1)
        for body, wanted in ((b"{}", 422), (b'{"action": "burn"}', 422), (b"", 400)):
            with pytest.raises(RequestError) as caught:
                service.settle_dead_letter("1", body, "ann")
            assert caught.value.status == wanted
        assert service.journal.last_seq == 1
        assert json.loads(service.settle_dead_letter("1", b'{"action": "drop"}', "ann"))["dead_letters"] == 0
        (action,) = service.journal.actions(("outbox",))
        assert (action.author, json.loads(action.body)) == ("ann", {"seq": 1, "action": "drop"})


# ---- a real process


@pytest.mark.timeout(300)
def test_nothing_is_lost_when_the_service_is_killed_and_the_order_is_kept(
    receiver, reply, serve, cards, secret_file, tmp_path
):
    """Killed while the receiver is slow, and while it refuses."""
    settings = tmp_path / "serve.toml"
    settings.write_text(
        f'[webhook]\nurl = "{receiver.url}"\nsecret = "{secret_file}"\nfirst_delay_seconds = 0.02\n'
        "longest_delay_seconds = 0.1\ntimeout_seconds = 2\n"
    )
    ways = [reply(pause=0.1), reply(500)]
    alerts: list[str] = []
    number = 0
    for way in ways:
        receiver.reply = lambda _, way=way: way
        running = serve("--settings", settings).started()
        client = Client(running.url, None)
        for _ in range(40):
            number += 1
            row = {**ROW, "id": f"t{number}", "user": f"u{number}", "amount": 10.0 ** (number % 7), "kind": number}
            row |= {"time": START + number * 60_000, "merchant": f"m{number % 3}"}
            status, answer = client.call("POST", "/v1/score", row)
            assert status == 200
            if answer["decision"] != "approve":
                alerts.append(row["id"])
                if len(alerts) % 3 == 0:
                    assert client.call("POST", f"/v1/alerts/{row['id']}", {"state": "confirmed"})[0] == 200
                    alerts.append(row["id"])
        time.sleep(0.3)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(30)
    receiver.reply = lambda _: reply()
    running = serve("--settings", settings).started()
    client = Client(running.url, None)
    receiver.wait(lambda: client.call("GET", "/v1/outbox")[1]["waiting"] == 0)
    assert running.stop() == 0
    assert len(alerts) > 20, "hardly anything was sent"
    assert all(m.valid for m in receiver.got)
    first_time = list(dict.fromkeys((m.seq, m.content["data"]["transaction_id"]) for m in receiver.taken))
    assert [identity for _, identity in first_time] == alerts, "each at least once, in order"
    taken = seqs(receiver.taken)
    assert all(b >= a for a, b in pairwise(taken)), "one comes again only before the next"
