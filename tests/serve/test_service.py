"""The scoring service without HTTP: what it answers, and what it does when something goes wrong."""

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seqfraud.errors import JournalError, RequestError, RunError
from serve.offline import score_journal
from serve.records import ActionRecord
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


def score(service: Service, **changes: Any) -> dict[str, Any]:
    return json.loads(service.score(json.dumps({**ROW, **changes}).encode()))


def label(service: Service, *labels: tuple[str, bool] | tuple[str, bool, int]) -> dict[str, int]:
    names = ("transaction_id", "is_fraud", "known_at")
    body = json.dumps([dict(zip(names, said, strict=False)) for said in labels])
    return json.loads(service.add_labels(body.encode()))


def refusal(call: Any, *args: Any, **changes: Any) -> tuple[int, str, str]:
    with pytest.raises(RequestError) as caught:
        call(*args, **changes)
    assert caught.value.message
    return caught.value.status, caught.value.code, caught.value.field


def until_folded(service: Service) -> None:
    deadline = time.monotonic() + 20
    while service.journal._tail.by_seq:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fill(service: Service, count: int = 12) -> None:
    """Some users, some merchants, late events and labels of every kind, pending ones too."""
    for n in range(count):
        time = START + n * 30 * MINUTE - (n % 5 == 4) * 100 * MINUTE
        score(service, id=f"f{n}", user=f"u{n % 2}", time=time, merchant=f"m{n % 3}", amount=2.0**n)
        label(service, (f"f{n - n % 3}", n % 2 == 0, time + (n % 4) * 60 * MINUTE))
    label(service, ("not yet", True, START))


def followed(service: Service, *kinds: str) -> list[ActionRecord]:
    """A list that holds every action of some kinds, and gets those to come."""
    heard: list[ActionRecord] = []
    service.follow(kinds, heard.append)
    return heard


# ---- answers


def test_an_answer_has_the_names_of_the_contract(service, cards):
    answer = score(service)
    probability, reasons = answer.pop("fraud_probability"), answer.pop("reasons")
    assert 0 < probability < 1
    assert bool(reasons) == (answer["decision"] != "approve")
    assert all(list(reason) == ["code", "text", "contribution"] for reason in reasons)
    thresholds = cards.manifest.thresholds
    assert answer == {
        "transaction_id": "t1",
        "is_fraud": probability >= thresholds.is_fraud,
        "decision": "decline"
        if probability >= thresholds.decline
        else "review"
        if probability >= thresholds.review
        else "approve",
        "model": cards.id,
        "history": 0,
        "late": False,
        "duplicate": False,
    }


def test_decisions_follow_the_thresholds_of_the_manifest(service, cards):
    seen = set()
    for n in range(60):
        answer = score(service, id=n, merchant=n % 5, amount=10 ** (n % 6), time=START + n * n * 7 * MINUTE, kind=n)
        label(service, (str(n), n % 2 == 0, START + n * n * 7 * MINUTE))
        p, thresholds = answer["fraud_probability"], cards.manifest.thresholds
        assert answer["is_fraud"] == (p >= 0.6)
        wanted = "decline" if p >= thresholds.decline else "review" if p >= thresholds.review else "approve"
        assert answer["decision"] == wanted
        seen.add(wanted)
    assert seen == {"approve", "review", "decline"}


def test_a_repeated_id_gets_the_first_answer_and_other_content_a_conflict(service, memory_of):
    first = score(service)
    score(service, id="t2", time=START + MINUTE)
    before = memory_of(service)
    assert score(service) == {**first, "duplicate": True}
    assert score(service, undeclared=1) == {**first, "duplicate": True}
    assert score(service, amount=20) == {**first, "duplicate": True}
    assert refusal(score, service, amount=21) == (409, "conflict", "id")
    assert refusal(score, service, user="bob") == (409, "conflict", "id")
    assert refusal(score, service, merchant=None) == (409, "conflict", "id")
    assert memory_of(service) == before


def test_an_early_repetition_lets_no_label_take_effect(service, memory_of):
    """A duplicate is no arrival: what is due by its time stays pending."""
    score(service)
    label(service, ("t1", True, START - 5))
    before = memory_of(service)
    score(service)
    assert memory_of(service) == before
    score(service, id="t2")
    assert memory_of(service)["open"][1][-1] == 1


def test_ids_are_derived_where_no_column_is_declared(plain, tmp_path):
    with Service(plain, tmp_path) as service:
        row = {"user": "ann", "time": 1_600_000_000, "amount": 5}
        first = json.loads(service.score(json.dumps(row).encode()))
        assert len(first["transaction_id"]) == 32
        again = json.loads(service.score(json.dumps({**row, "note": "undeclared"}).encode()))
        assert again == {**first, "duplicate": True}
        other = json.loads(service.score(json.dumps({**row, "amount": 6}).encode()))
        assert other["transaction_id"] != first["transaction_id"]
        assert other["history"] == 1


def test_the_largest_numbers_leave_user_and_merchant_alive(service):
    """Beyond float32 they became infinite, and the user's state and the merchant's context NaN for ever."""
    for n, amount in enumerate([1e30, -1e30, 1e30, 1e30, 5.0]):
        answer = score(service, id=n, amount=amount, time=START + n)
        assert math.isfinite(answer["fraud_probability"])
    assert refusal(score, service, id="too large", amount=1e31)[::2] == (422, "amount")
    assert 0 < score(service, id="ordinary", user="bob", time=START + 9)["fraud_probability"] < 1


def test_a_batch_holds_errors_in_their_place(service):
    items = [ROW, {**ROW, "id": "t2", "amount": None}, {**ROW, "amount": 1}, 7, {**ROW, "id": "t3"}]
    results = json.loads(service.score_batch(json.dumps(items).encode()))["results"]
    assert [r["error"]["code"] if "error" in r else r["transaction_id"] for r in results] == [
        "t1", "invalid_field", "conflict", "invalid_field", "t3",
    ]  # fmt: skip
    assert results[1]["error"]["field"] == "amount"
    assert set(results[1]["error"]) == {"code", "message", "field"}
    assert results[4]["history"] == 1
    assert json.loads(service.score_batch(b"[]")) == {"results": []}


def test_a_batch_has_at_most_the_configured_number(service, memory_of):
    before = memory_of(service)
    body = json.dumps([{**ROW, "id": n} for n in range(51)]).encode()
    assert refusal(service.score_batch, body) == (413, "batch_too_large", "")
    assert memory_of(service) == before
    assert (
        len(json.loads(service.score_batch(json.dumps([{**ROW, "id": n} for n in range(50)]).encode()))["results"])
        == 50
    )


def test_labels_are_counted_as_new_changed_unchanged_and_unknown(service):
    score(service)
    score(service, id="t2")
    assert label(service, ("t1", True), ("t2", False), ("t9", True)) == {
        "new": 2, "changed": 0, "unchanged": 0, "unknown": 1,
    }  # fmt: skip
    assert label(service, ("t1", True), ("t2", True), ("t9", False), ("t9", False)) == {
        "new": 0, "changed": 1, "unchanged": 2, "unknown": 1,
    }  # fmt: skip
    assert label(service, ("t1", False), ("t1", True), ("t1", True)) == {
        "new": 0, "changed": 2, "unchanged": 1, "unknown": 0,
    }  # fmt: skip
    assert label(service) == {"new": 0, "changed": 0, "unchanged": 0, "unknown": 0}


def test_a_label_without_a_time_is_known_now(service):
    score(service)
    label(service, ("t1", True))
    record = service.journal.last_label("t1")
    seen = (record.known_at, record.said_at, record.source, record.author)
    assert seen == (1000, 1000, "api", "anonymous"), "the clock stands at 1000 ms"
    score(service, id="t2")
    context = np.frombuffer(service.journal.transaction("t2").context, dtype=np.float32)
    assert context[4:6].tolist() == [1.0, 1.0], "known fraud of the merchant"


def test_looking_up_gives_what_was_answered(service, cards):
    assert refusal(service.transaction, "t1") == (404, "unknown_transaction", "")
    assert refusal(service.user, "ann") == (404, "unknown_user", "")
    answers = [score(service, id=n, time=START + n * MINUTE) for n in (0, 1, 2)]
    answers.append(score(service, id=3, time=START + MINUTE + 1))
    assert json.loads(service.transaction("2")) == {**answers[2], "labels": []}
    seen = json.loads(service.user("ann"))
    assert (seen["user"], seen["history"]) == ("ann", 4)
    assert [event["answer"] for event in seen["events"]] == [answers[2], answers[3], answers[1], answers[0]]
    assert seen["events"][0]["transaction"] == {**ROW, "id": 2, "time": START + 2 * MINUTE}
    for n in range(10):
        score(service, id=10 + n, time=START + n * 60 * MINUTE)
    seen = json.loads(service.user("ann"))
    assert seen["history"] == 14
    assert len(seen["events"]) == 2 * cards.manifest.serve.window


def test_what_was_said_of_a_transaction_is_shown_with_who_said_it(service):
    answer = score(service)
    said = [{"transaction_id": "t1", "is_fraud": True, "known_at": START, "source": "chargeback"}]
    service.add_labels(json.dumps(said).encode(), "key-1")
    service.add_labels(b'[{"transaction_id": "t1", "is_fraud": false}, {"transaction_id": "t2", "is_fraud": true}]')
    given = {**answer, "labels": [
        {"is_fraud": True, "known_at": START, "said_at": 1000, "source": "chargeback", "author": "key-1"},
        {"is_fraud": False, "known_at": 1000, "said_at": 1000, "source": "api", "author": "anonymous"},
    ]}  # fmt: skip
    assert json.loads(service.transaction("t1")) == given
    until_folded(service)
    assert json.loads(service.transaction("t1")) == given, "from the index"


def test_the_model_in_force_says_how_to_talk_to_it(service, cards):
    score(service)
    label(service, ("t1", True))
    model = json.loads(service.model())
    assert model["model"] == cards.id
    assert (model["users"], model["journal_records"]) == (1, 2)
    assert model["schema"]["user"] == "user"
    assert model["label"] == {"column": "fraud", "known_at": "known_at"}
    assert model["context"]["label_delay"] == 7_200_000
    assert model["thresholds"] == cards.manifest.thresholds.as_dict()


# ---- the journal fails


def broken(*_: Any, **__: Any) -> Any:
    raise JournalError("disk I/O error")


NEXT = {
    "in order": {"id": "n", "user": "u0", "time": START + 900 * MINUTE},
    "late": {"id": "n", "user": "u0", "time": START + 290 * MINUTE},
    "too late": {"id": "n", "user": "u0", "time": START - 5000 * MINUTE},
    "new user and merchant": {
        "id": "n",
        "user": "new",
        "merchant": "new",
        "device": "new",
        "time": START + 900 * MINUTE,
    },
}


@pytest.mark.parametrize("case", NEXT)
def test_a_transaction_that_cannot_be_stored_changes_nothing(service, monkeypatch, memory_of, case, tmp_path, cards):
    fill(service, 20)
    before = memory_of(service)
    due = [entry for entry in before["pending"] if entry[0] <= NEXT[case]["time"]]
    assert due or "late" in case, "labels would have taken effect"
    with monkeypatch.context() as patched:
        patched.setattr(service.journal, "append_transaction", broken)
        assert refusal(score, service, **NEXT[case]) == (503, "storage_unavailable", "")
        assert memory_of(service) == before
        batch = json.dumps([{**ROW, **NEXT[case]}]).encode()
        (result,) = json.loads(service.score_batch(batch))["results"]
        assert result["error"]["code"] == "storage_unavailable"
        assert memory_of(service) == before
    got = score(service, **NEXT[case])
    with Service(cards, tmp_path / "control", clock=lambda: 1000) as control:
        fill(control, 20)
        assert got == score(control, **NEXT[case]), "as if nothing had happened"
        assert memory_of(service) == memory_of(control)
    assert (got["duplicate"], got["late"]) == (False, "late" in case)


def test_a_full_disk_is_a_503_and_not_the_end(cards, tmp_path, memory_of, small_disk):
    with Service(cards, tmp_path, disk=small_disk.disk) as service:
        fill(service)
        before = memory_of(service)
        small_disk.room = 20_000
        rows = [{"id": f"n{n}", "time": START + 900 * MINUTE + n} for n in range(500)]
        stored = 0

        def until_it_is_full() -> None:
            nonlocal stored
            for row in rows:
                score(service, **row)
                stored += 1

        assert refusal(until_it_is_full)[:2] == (503, "storage_unavailable")
        assert stored > 10
        assert memory_of(service)["last_seq"] == before["last_seq"] + stored
        assert service.ready(), "a full disk may be given room"
        small_disk.room = 10**9
        assert score(service, **rows[stored])["duplicate"] is False
        before = memory_of(service)
    with Service(cards, tmp_path) as again:
        assert memory_of(again) == before


def test_labels_that_cannot_be_stored_change_nothing(service, monkeypatch, memory_of):
    fill(service)
    before = memory_of(service)
    with monkeypatch.context() as patched:
        patched.setattr(service.journal, "append_labels", broken)
        with pytest.raises(RequestError) as caught:
            label(service, ("f0", False), ("f1", True), ("nobody", True))
        assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
    assert memory_of(service) == before
    assert sum(label(service, ("f0", False), ("f1", True), ("nobody", True)).values()) == 3


@pytest.mark.parametrize("question", ["transaction", "seq_of", "last_label", "events_before", "transaction_at"])
def test_a_journal_that_cannot_be_read_is_a_503_too(service, monkeypatch, memory_of, question):
    """Also in the middle of a label's effect: `transaction_at` is asked for the entities of a settled transaction."""
    fill(service, 20)
    score(service, id="f20", user="u0", time=START + 900 * MINUTE)
    label(service, ("f1", True, START + 950 * MINUTE))
    before = memory_of(service)
    with monkeypatch.context() as patched:
        patched.setattr(service.journal, question, broken)
        if question in ("seq_of", "last_label"):
            assert refusal(label, service, ("f2", True))[:2] == (503, "storage_unavailable")
        elif question == "events_before":
            assert refusal(score, service, id="late", user="u0", time=START)[:2] == (503, "storage_unavailable")
        else:
            row = {"id": "next", "user": "bob", "time": START + 1000 * MINUTE}
            assert refusal(score, service, **row)[:2] == (503, "storage_unavailable")
    assert memory_of(service) == before
    score(service, id="next", time=START + 1000 * MINUTE)


# ---- starting, stopping, crashing


def test_what_was_stored_but_not_answered_is_a_duplicate_for_the_retry(cards, tmp_path, monkeypatch, crash):
    service = Service(cards, tmp_path)
    score(service, id="t0")
    with monkeypatch.context() as patched:
        patched.setattr(service.engine.memory, "settle", broken)  # the process dies after the record, before the answer
        with pytest.raises(RequestError):
            score(service)
    crash(service)
    with Service(cards, tmp_path) as again:
        retry = score(again)
        assert (retry["duplicate"], retry["history"]) == (True, 1)
        assert score(again, id="t2")["history"] == 2


def test_a_closed_service_says_so_and_closing_twice_is_nothing(cards, tmp_path):
    service = Service(cards, tmp_path)
    assert service.ready()
    service.close()
    service.close()
    assert not service.ready()
    assert refusal(score, service) == (503, "not_ready", "")
    with pytest.raises(RequestError) as caught:
        label(service, ("t1", True))
    assert caught.value.status == 503


def test_a_snapshot_that_cannot_be_written_does_not_keep_the_service_from_closing(
    cards, tmp_path, monkeypatch, memory_of
):
    service = Service(cards, tmp_path)
    fill(service)
    before = memory_of(service)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("serve.service.write_snapshot", full)
        service.close()
    assert not list(tmp_path.glob("snapshot-*"))
    with Service(cards, tmp_path) as again:
        assert memory_of(again) == before


def test_a_state_folder_has_one_process(cards, tmp_path):
    program = (
        "import sys; from pathlib import Path; from seqfraud.bundle import open_bundle; from seqfraud.errors import *\n"
        "from serve.service import Service\n"
        "try: Service(open_bundle(Path(sys.argv[1])), Path(sys.argv[2])).close()\n"
        "except RunError as error: sys.exit(f'refused: {error}')"
    )

    def second() -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", program, str(cards.path), str(tmp_path)]
        return subprocess.run(args, capture_output=True, text=True, check=False, timeout=60)

    with Service(cards, tmp_path) as service:
        score(service)
        done = second()
        assert done.returncode == 1
        assert done.stderr == f"refused: {tmp_path}: another process is using this state folder\n"
        with pytest.raises(RunError, match="another process is using this state folder"):
            Service(cards, tmp_path)
        assert score(service, id="t2")["history"] == 1, "the first one does not notice"
    assert second().returncode == 0


def test_a_start_that_fails_lets_the_folder_go(cards, plain, tmp_path):
    with Service(cards, tmp_path) as service:
        score(service)
    with pytest.raises(RunError, match=r"the journal holds the fields id,user,.*; the bundle declares user,time"):
        Service(plain, tmp_path)
    with Service(cards, tmp_path) as service:
        assert score(service)["duplicate"] is True
    db = sqlite3.connect(tmp_path / "journal.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    for _ in range(2):
        with pytest.raises(RunError, match=r"journal\.sqlite: index format 99; this version reads format 3"):
            Service(cards, tmp_path)


def test_what_cannot_be_a_state_folder_is_refused_in_one_line(cards, tmp_path):
    (tmp_path / "file").write_text("x")
    for state in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match="cannot be used as a state folder"):
            Service(cards, state)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal").write_bytes(b"not a folder")
    with pytest.raises(RunError, match=r"the journal cannot be opened: .*File exists"):
        Service(cards, tmp_path / "other")


# ---- another bundle on the same journal


def test_a_new_model_takes_over_the_history_and_leaves_the_old_answers(
    cards, cards_toml, make_bundle, tmp_path, memory_of
):
    """Its memory is what it would be had it scored everything itself: the contexts are the same, the weights are not."""
    newer = make_bundle(cards_toml, seed=1)
    assert newer.id != cards.id
    with Service(cards, tmp_path / "a", clock=lambda: 1000) as service:
        fill(service, 20)
        old = score(service)
    with Service(newer, tmp_path / "b", clock=lambda: 1000) as fresh:
        fill(fresh, 20)
        score(fresh)
        wanted = memory_of(fresh)
    with Service(newer, tmp_path / "a") as service:
        assert memory_of(service) == wanted
        assert score(service) == {**old, "duplicate": True}, "the model that answered is named"
        assert score(service, id="t2")["model"] == newer.id
        wanted = memory_of(service)
    with Service(newer, tmp_path / "a") as service:
        assert memory_of(service) == wanted
    with Service(cards, tmp_path / "a") as service:  # and back
        assert score(service, id="t3")["history"] == score(service, id="t4")["history"] - 1 == 2


def test_a_rebuild_takes_contexts_as_they_were_recorded(cards, tmp_path):
    """Never revised: what the event read is what every later state of its user stands on."""
    recorded = np.arange(cards.manifest.context.width, dtype=np.float32)
    with Service(cards, tmp_path / "a") as service:
        score(service)
        with Service(cards, tmp_path / "b") as other:  # notes what this bundle reads as context
            other.journal.append_transaction(replace(service.journal.transaction("t1"), context=recorded.tobytes()))
            other.abandon()
    with Service(cards, tmp_path / "b") as again:
        assert again.engine.users.values[0, 0, 1:].tolist() == recorded.tolist()


def test_a_model_that_reads_another_context_has_it_worked_out_anew(cards, cards_toml, make_bundle, tmp_path, memory_of):
    """Half-lives of the same number: the contexts have the same width, and the recorded ones mean something else."""
    other = make_bundle(cards_toml.replace('["1h", "12h"]', '["3h", "90h"]'))
    assert other.manifest.context.width == cards.manifest.context.width
    with Service(cards, tmp_path / "a", clock=lambda: 1000) as service:
        fill(service, 20)
    with Service(other, tmp_path / "b", clock=lambda: 1000) as fresh:
        fill(fresh, 20)
        wanted = memory_of(fresh)
    with Service(other, tmp_path / "a") as service:
        assert memory_of(service) == wanted


def test_a_new_policy_refuses_what_comes_and_takes_what_is_there(cards, cards_toml, make_bundle, tmp_path):
    """A journal with a negative amount must not keep a bundle that refuses such from starting."""
    strict = make_bundle(cards_toml + '[cleaning]\nnegative_amount = "drop"\n')
    with Service(cards, tmp_path) as service:
        score(service, amount=-5)
    for _ in range(2):
        with Service(strict, tmp_path) as service:
            assert refusal(score, service, id="t2", amount=-5) == (422, "invalid_field", "amount")
        for file in tmp_path.glob("snapshot-*"):
            file.unlink()
    with Service(strict, tmp_path) as service:
        assert score(service, id="t3")["history"] == 1


def test_a_record_that_a_new_bundle_cannot_score_is_named(rich, rich_toml, make_bundle, tmp_path):
    """ "age" was missing in a record, and is not a number that the new model takes without a value."""
    with Service(rich, tmp_path) as service:
        row = {"id": 1, "user": "ann", "time": "2025-03-01", "amount": 5, "age": None}
        service.score(json.dumps(row).encode())
    narrow = make_bundle(rich_toml)
    with pytest.raises(RunError, match="record 1 of the journal is not what this bundle can score: age"):
        Service(narrow, tmp_path)


def test_threads_share_one_sequence(cards, tmp_path, memory_of, crash):
    service = Service(cards, tmp_path)
    errors: list[BaseException] = []

    def work(user: int) -> None:
        try:
            for n in range(25):
                score(service, id=f"{user}-{n}", user=user, merchant=n % 3, time=START + n * MINUTE)
                label(service, (f"{user}-{n}", n % 2 == 0, START + n * MINUTE))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert service.journal.last_seq == 4 * 25 * 2
    for user in range(4):
        histories = [json.loads(service.transaction(f"{user}-{n}"))["history"] for n in range(25)]
        assert histories == list(range(25))
    before = memory_of(service)
    crash(service)
    with Service(cards, tmp_path) as again:
        assert memory_of(again) == before


# ---- actions


@pytest.mark.parametrize("end", ["close", "crash"])
def test_whoever_follows_a_kind_gets_its_actions_each_once_live_and_at_the_next_start(cards, tmp_path, crash, end):
    service = Service(cards, tmp_path, clock=lambda: 1000)
    first = service.act("tea", "key-1", b'{"n":1}')
    fill(service)
    heard, others = followed(service, "tea", "cake"), followed(service, "toast")
    assert heard == [first] == [ActionRecord(1, "tea", 1000, "key-1", b'{"n":1}')]
    service.snapshot()
    service.act("cake", "anonymous", b"{}")
    service.act("toast", "key-2", b"{}")
    last = service.journal.last_seq
    assert ([r.seq for r in heard], [r.seq for r in others]) == ([1, last - 1], [last])
    crash(service) if end == "crash" else service.close()
    with Service(cards, tmp_path) as again:
        assert followed(again, "tea", "cake") == heard
        assert followed(again, "toast") == others
        assert followed(again, "other") == []


def test_actions_change_nothing_that_scores(cards, tmp_path, memory_of, crash):
    """Live, folded one by one and in batches, and worked out anew."""
    scored = []
    for name, between in (("without", False), ("with", True)):
        service = Service(cards, tmp_path / name, clock=lambda: 1000)
        for n in range(20):
            score(service, id=f"{n}", time=START + n * MINUTE, merchant=f"m{n % 3}")
            if between:
                service.act("tea", "key-1", b"{}")
        found = score_journal(cards, tmp_path / name)
        scored.append((found.ids, found.probability))
        memory = memory_of(service)
        crash(service)
    (ids, without), (again, with_actions) = scored
    assert ids == again
    np.testing.assert_array_equal(without, with_actions)
    for fold_above in (10_000, 0):
        rebuilt = Service(cards, tmp_path / "with", fold_above=fold_above)
        found = memory_of(rebuilt)
        crash(rebuilt)
        assert found["last_seq"] == 40
        assert found == memory if fold_above else found["users"].keys() == memory["users"].keys()


def test_an_action_that_may_not_be_done_or_cannot_be_stored_is_not_there(service, monkeypatch):
    def taken() -> None:
        raise RequestError(409, "conflict", "somebody else took it")

    heard = followed(service, "toast")
    assert refusal(service.act, "toast", "key-1", b"{}", taken) == (409, "conflict", "")
    monkeypatch.setattr(service.journal, "append_action", broken)
    assert refusal(service.act, "toast", "key-1", b"{}") == (503, "storage_unavailable", "")
    assert (heard, service.journal.last_seq) == ([], 0)
