"""Reasons and explanations of the service: each figure against the service itself, asked about what is said to be replaced.

`compare` posts the same history to a second service and then the transaction as the reason would have it: with the usual
amount, without the labels, the events before it as another user's. What the reason claims is what that service answers.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import serve.reasons
from seqfraud.bundle import Bundle
from seqfraud.errors import RequestError
from seqfraud.policy import Policy, Thresholds
from serve.reasons import NOTICEABLE, UNEXPLAINED
from serve.service import Service

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
START = 1_600_000_000_000 - 1_600_000_000_000 % DAY
Rows = list[dict[str, Any]]


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def score(service: Service, row: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(service.score(json.dumps(row).encode()))
    return answer


def explain(service: Service, identity: str) -> dict[str, Any]:
    explanation: dict[str, Any] = json.loads(service.explanation(identity))
    return explanation


def suspicious(bundle: Bundle) -> Bundle:
    """The same bundle, but nothing is approved."""
    return replace(bundle, manifest=replace(bundle.manifest, policy=Policy(Thresholds(0.6, 0.0, 1.01))))


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """All reasons that are true, whatever they contribute."""
    monkeypatch.setattr(serve.reasons, "NOTICEABLE", -math.inf)
    monkeypatch.setattr(serve.reasons, "MOST", 99)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[[Bundle], Service]]:
    """`fresh(bundle)`: a service over an empty state folder."""
    opened: list[Service] = []
    numbers = count()

    def make(bundle: Bundle) -> Service:
        opened.append(Service(bundle, tmp_path / str(next(numbers)), clock=lambda: 1000))
        return opened[-1]

    yield make
    for service in opened:
        service.abandon()


def cards_rows(number: int, user: str = "ann") -> Rows:
    """A user's ordinary life: food at noon, day after day."""
    return [
        {"id": f"{user}{n}", "user": user, "time": START + n * DAY + 12 * HOUR, "amount": 20.0 + n, "kind": "food",
         "merchant": f"m{n % 2}", "device": f"d{user}"}
        for n in range(number)
    ]  # fmt: skip


def rich_rows(number: int) -> Rows:
    return [
        {"id": f"r{n}", "user": "ann", "time": f"2020-09-{n + 1:02d}T12:00:00Z", "total": 20.0 + n, "amount": 20.0 + n,
         "age": 40, "kind": "food", "ip": "192.0.2.1", "lat": 48.86 + n % 2, "long": 2.35}
        for n in range(number)
    ]  # fmt: skip


def fall_of(answer: dict[str, Any], code: str) -> float:
    (contribution,) = [reason["contribution"] for reason in answer["reasons"] if reason["code"] == code]
    return float(contribution)


# ---- what is not approved has reasons


def walk(seed: int, number: int) -> Rows:
    """Random transactions of three users, some late, far beyond the ring."""
    rng = random.Random(seed)
    clock, rows = START, []
    for n in range(number):
        clock += rng.choice([0, 5 * MINUTE, HOUR, 9 * HOUR, 30 * HOUR])
        rows.append(
            {"id": str(n), "user": rng.choice(["ann", "bob", "cid"]), "time": clock - rng.choice([0] * 9 + [60 * HOUR]),
             "amount": rng.choice([1.0, 20.0, 25.0, 400.0]), "kind": rng.choice(["food", "food", "fuel", "?", None]),
             "merchant": rng.choice(["m1", "m2", None]), "device": rng.choice(["d1", "d2"])}
        )  # fmt: skip
    return rows


def test_what_is_not_approved_has_reasons_that_stay_in_the_journal(cards, fresh):
    service, decisions = fresh(cards), set()
    for row in walk(1, 150):
        answer = score(service, row)
        decisions.add(answer["decision"])
        assert bool(answer["reasons"]) == (answer["decision"] != "approve")
        fall = [reason["contribution"] for reason in answer["reasons"]]
        if fall != [None]:
            assert fall == sorted(fall, reverse=True)
            assert all(x >= NOTICEABLE for x in fall)
            assert len(fall) <= 4
        assert json.loads(service.transaction(row["id"])) == {**answer, "labels": []}
        assert score(service, row) == {**answer, "duplicate": True}
    assert decisions == {"approve", "review", "decline"}


@pytest.mark.parametrize("name", ["cards", "rich", "plain"])
def test_every_kind_of_model_explains_whatever_comes(name, request, fresh, everything):
    """Also where the amount is no input, numbers are missing, there is no context, or no id."""
    service = fresh(suspicious(request.getfixturevalue(name)))
    codes = set()
    for n, row in enumerate(walk(2, 60)):
        time = (
            f"2020-09-{1 + n // 24:02d}T{n % 24:02d}:00:00Z"
            if name == "rich"
            else row["time"] // (1000 if name == "plain" else 1)
        )
        more = {
            "total": row["amount"],
            "age": None if n % 3 else 40,
            "ip": "192.0.2.1",
            "lat": 40 + n % 7,
            "long": n % 5,
        }
        answer = score(service, {**row, **more, "time": time})
        codes |= {reason["code"] for reason in answer["reasons"]}
        explained = explain(service, answer["transaction_id"])
        assert explained["fraud_probability"] == pytest.approx(answer["fraud_probability"], abs=1e-5)
    amount = "amount_above_habit" if name == "cards" else "number_above_habit:amount"
    assert codes >= {"recent_history", "new_category:kind", amount}


def test_where_reasons_fail_the_score_and_the_decision_go_out_without(cards, fresh, memory_of, monkeypatch, caplog):
    """One line in the log says that it began and one that it is over; all else is as if they had not failed."""
    service, twin = fresh(suspicious(cards)), fresh(suspicious(cards))
    rows = cards_rows(7)
    for row in rows[:3]:
        assert score(service, row) == score(twin, row)
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.step, "logits", lambda inputs: 1 / 0)
        for row in rows[3:5]:
            answer = score(service, row)
            assert answer["reasons"] == [msgspec.to_builtins(UNEXPLAINED)]
            assert {**score(twin, row), "reasons": answer["reasons"]} == answer
    for row in rows[5:]:
        assert score(service, row) == score(twin, row)
    assert memory_of(service) == memory_of(twin)
    assert service.engine.explainer.failures == 2
    said = [record.getMessage() for record in caplog.records if record.name == "serve.reasons"]
    assert said == ["reasons cannot be worked out: ZeroDivisionError", "reasons are worked out again"]


@pytest.mark.parametrize("late", [False, True])
def test_a_history_without_its_end_is_that_of_a_service_that_has_to_run_it_again(
    cards, fresh, everything, monkeypatch, late
):
    """The states before the newest events are kept until one is inserted before them, and never when a service starts."""
    service = fresh(suspicious(cards))
    noon = START + 10 * DAY + 12 * HOUR
    session = [
        {**cards_rows(1)[0], "id": f"s{n}", "time": noon + n * 10 * MINUTE, "amount": 25.0 + n} for n in range(3)
    ]
    for row in [*cards_rows(10), *session[:2]]:
        score(service, row)
    if late:
        score(service, {**session[0], "id": "late", "time": noon - 5 * HOUR})
    runs = []
    real = service.engine.sequence.states_after
    monkeypatch.setattr(service.engine.sequence, "states_after", lambda *args: runs.append(args) or real(*args))
    shutil.copytree(service._state, service._state.parent / "copy")
    answer = score(service, session[2])
    assert "rapid_succession" in {reason["code"] for reason in answer["reasons"]}
    assert bool(runs) == late
    with Service(service.bundle, service._state.parent / "copy", clock=lambda: 1000, fold_above=0) as other:
        again = score(other, session[2])
    assert [(r["code"], r["contribution"]) for r in again["reasons"]] == [
        (r["code"], pytest.approx(r["contribution"], abs=1e-3)) for r in answer["reasons"]
    ]


def test_what_is_approved_costs_nothing(cards, fresh, monkeypatch):
    approving = replace(cards, manifest=replace(cards.manifest, policy=Policy(Thresholds(0.6, 1.01, 1.01))))
    service = fresh(approving)
    for name in ("reasons", "_changes"):
        monkeypatch.setattr(service.engine.explainer, name, lambda *_: 1 / 0)
    monkeypatch.setattr(service.engine.users, "before", lambda *_: 1 / 0)
    assert all(score(service, row)["reasons"] == [] for row in walk(3, 30))


# ---- a contribution is what the service says of the transaction without the thing


def compare(
    fresh: Callable[[Bundle], Service], bundle: Bundle, code: str, ours: Rows, theirs: Rows, labels: Rows = ()
) -> float:
    """Post both; the contribution of `code` to the last of ours must be the difference to the last of theirs."""
    one, other = fresh(suspicious(bundle)), fresh(suspicious(bundle))
    for row in ours[:-1]:
        score(one, row)
    if labels:
        one.add_labels(json.dumps(labels).encode())
    answer = score(one, ours[-1])
    for row in theirs[:-1]:
        score(other, row)
    without = score(other, theirs[-1])
    fall = log_odds(answer["fraud_probability"]) - log_odds(without["fraud_probability"])
    assert fall_of(answer, code) == pytest.approx(fall, abs=2e-3)
    return abs(fall)


def test_an_amount_counts_what_the_usual_amount_would_have(cards, fresh, everything):
    rows = cards_rows(6)
    last = {**rows[-1], "id": "last", "time": START + 6 * DAY + 12 * HOUR}
    usual = sorted(row["amount"] for row in rows)[3]
    here = [*rows, {**last, "amount": 500.0}]
    there = [*rows, {**last, "amount": usual}]
    assert compare(fresh, cards, "amount_above_habit", here, there) > 0.01
    assert compare(fresh, cards, "amount_below_habit", [*rows, {**last, "amount": 2.0}], there) > 0.01


def test_a_category_counts_what_the_usual_one_would_have(cards, fresh, everything):
    rows = cards_rows(6)
    assert compare(fresh, cards, "new_category:kind", [*rows[:5], {**rows[5], "kind": "fuel"}], rows) > 0.01


def test_a_place_counts_what_one_at_the_usual_distance_would_have(rich, fresh, everything):
    """A degree of latitude is usual; ten degrees north of the last place become one."""
    rows = rich_rows(6)
    last = {**rows[-1], "id": "last", "time": "2020-09-07T12:00:00Z"}
    here = [*rows, {**last, "lat": rows[-1]["lat"] + 10}]
    there = [*rows, {**last, "lat": rows[-1]["lat"] + 1}]
    assert compare(fresh, rich, "far_from_last_place", here, there) > 0.01
    soon = {"time": "2020-09-06T12:30:00Z"}
    assert compare(fresh, rich, "impossible_speed", [*rows, here[-1] | soon], [*rows, there[-1] | soon]) > 0.01


def test_known_fraud_counts_what_the_same_without_labels_would_have(cards, fresh, everything):
    rows = cards_rows(6, "bob")
    last = {**rows[-1], "id": "last", "time": rows[-1]["time"] + HOUR}
    label = [{"transaction_id": rows[-1]["id"], "is_fraud": True, "known_at": rows[-1]["time"] + 1}]
    rows[-1]["user"] = "cid"  # the fraud was another user's, at the same merchant
    last["device"] = "new"
    merchant = "known_fraud:merchant"
    assert compare(fresh, cards, merchant, [*rows, last], [*rows, last], label) > 0.01


@pytest.mark.parametrize("before", [4, 7, 9, 10])
@pytest.mark.parametrize("code", ["rapid_succession", "minutes_after_test_payment"])
def test_a_history_counts_what_the_one_without_those_events_would_have(cards, fresh, everything, before, code):
    """Posted for another user, they are in the contexts of merchants and devices all the same. W is 3; the ring then holds at
    least 5."""
    rows = cards_rows(before)
    noon = START + before * DAY + 12 * HOUR
    amounts = [25.0, 30.0, 45.0] if code == "rapid_succession" else [1.0, 30.0, 45.0]
    session = [
        {**rows[0], "id": f"s{n}", "time": noon + n * 10 * MINUTE, "amount": amount} for n, amount in enumerate(amounts)
    ]
    elsewhere = [*({**row, "user": "cid"} for row in session[:-1]), session[-1]]
    assert compare(fresh, cards, code, [*rows, *session], [*rows, *elsewhere]) > 0.01


def test_the_whole_of_a_short_history_counts_what_a_strangers_would_have(plain, fresh, everything):
    """`plain` has no context; a stranger's first transaction has no gap, which stays here: his is not the same by far."""
    rows = [{"user": "ann", "time": (START + n * DAY) // 1000, "amount": 20.0, "kind": "food"} for n in range(4)]
    service = fresh(suspicious(plain))
    answer = [score(service, row) for row in rows][-1]
    explained = explain(service, answer["transaction_id"])
    graph, spec = service.engine.sequence, plain.manifest.graph
    states = {s.name: s.to_batch(s.initial_rows(1)) for s in spec.states}
    states["last_time"] = np.array([rows[2]["time"] * 1000])
    alone = {"event_time": np.array([[rows[3]["time"] * 1000]]), "numeric": np.full((1, 1, 1), 20.0, dtype=np.float32),
             "categorical": np.array([[[2]]]), "length": np.array([1])}  # fmt: skip
    without = float(graph.run({**alone, **states})["probability"][0, 0])
    fall = log_odds(answer["fraud_probability"]) - log_odds(without)
    assert fall_of(answer, "recent_history") == pytest.approx(fall, abs=2e-3)
    strangers = score(service, {**rows[3], "user": "bob"})["fraud_probability"]
    assert explained["without_history"] == pytest.approx(log_odds(strangers), abs=2e-3)


# ---- explanations


def test_the_contributions_of_inputs_add_up(cards, fresh):
    service = fresh(cards)
    for row in walk(4, 40):
        score(service, row)
        explained = explain(service, row["id"])
        total = sum(attribution["contribution"] for attribution in explained["inputs"])
        assert explained["base"] + total == pytest.approx(explained["log_odds"], abs=1e-3)
        names = {attribution["input"] for attribution in explained["inputs"]}
        assert names <= {"amount", "kind", "time.hour", "time.gap", "merchant.known_fraud", "device.known_fraud",
                         "merchant.activity", "device.activity"}  # fmt: skip
        assert names >= {"kind", "merchant.known_fraud", "device.known_fraud"}


def test_an_input_at_its_usual_value_contributes_nothing(cards, fresh):
    service = fresh(cards)
    rows = cards_rows(6)
    for row in rows:
        row["amount"] = 20.0
        score(service, row)
    by_name = {a["input"]: a for a in explain(service, rows[-1]["id"])["inputs"]}
    for name in ("amount", "kind", "merchant.known_fraud"):
        assert by_name[name]["contribution"] == 0
    assert (by_name["kind"]["value"], by_name["kind"]["usual"]) == ("food", "food")


@pytest.mark.parametrize("number", [3, 5, 9, 14])
def test_a_past_event_counts_what_the_history_without_it_would_have(cards, fresh, number):
    """Each was posted for another user instead; those that the ring no longer holds stay what they are."""
    rows = walk(5, 3 * number)[-number:]
    for row in rows:
        row["user"] = "ann"
    rows.sort(key=lambda row: row["time"])
    service = fresh(cards)
    answer = [score(service, row) for row in rows][-1]
    explained = explain(service, rows[-1]["id"])
    held = len(explained["events"])
    assert held == number - 1 if number <= 7 else 3 <= held < 7
    assert [event["transaction_id"] for event in explained["events"]] == [r["id"] for r in rows[-2 : -2 - held : -1]]
    for n, event in enumerate(explained["events"]):
        other = fresh(cards)
        place = number - 2 - n
        for i, row in enumerate(rows[:-1]):
            score(other, {**row, "user": "somebody"} if i == place else row)
        without = score(other, rows[-1])
        fall = log_odds(answer["fraud_probability"]) - log_odds(without["fraud_probability"])
        assert event["contribution"] == pytest.approx(fall, abs=2e-3)


def test_older_transactions_and_late_ones_are_explained_at_their_place(cards, fresh, memory_of):
    """As long as nothing came before them since, the probability is the one that was answered."""
    service, rows = fresh(cards), walk(6, 120)
    answers = {row["id"]: score(service, row) for row in rows}
    before = memory_of(service)
    explained, refused = 0, 0
    times: dict[str, list[tuple[int, int]]] = {}
    for n, row in enumerate(rows):
        times.setdefault(row["user"], []).append((row["time"], n))
    for n, row in enumerate(rows):
        try:
            found = explain(service, row["id"])
        except RequestError as error:
            assert (error.status, error.code) == (409, "too_old")
            refused += 1
            continue
        explained += 1
        assert found["answer"] == answers[row["id"]]
        earlier = sorted(x for x in times[row["user"]] if x < (row["time"], n))
        kept = [event["transaction_id"] for event in found["events"]]
        assert kept == [rows[i]["id"] for _, i in earlier[::-1][: len(kept)]]
        if not any(i > n for _, i in earlier):
            assert found["fraud_probability"] == pytest.approx(answers[row["id"]]["fraud_probability"], abs=1e-5)
    assert explained >= 9
    assert refused >= 60
    assert memory_of(service) == before, "looking changes nothing"


def test_an_unknown_transaction_has_no_explanation(service):
    with pytest.raises(RequestError) as refused:
        service.explanation("T-9")
    assert (refused.value.status, refused.value.code) == (404, "unknown_transaction")


def test_scoring_goes_on_while_an_explanation_is_worked_out(cards, fresh, monkeypatch):
    """What is explained is a copy: the user goes on meanwhile, and nothing of the explanation changes."""
    service, rows = fresh(cards), cards_rows(8)
    for row in rows[:6]:
        score(service, row)
    wanted = explain(service, rows[5]["id"])
    real = service.engine.explainer.explain

    def meanwhile(situation: Any) -> Any:
        assert not service._lock._is_owned()
        for row in rows[6:]:
            score(service, row)
        return real(situation)

    monkeypatch.setattr(service.engine.explainer, "explain", meanwhile)
    assert explain(service, rows[5]["id"]) == wanted
