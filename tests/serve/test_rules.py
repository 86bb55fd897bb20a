"""Rules and lists in the service: in force within one request, journalled, audited, and the same again on replay."""

import json
from bisect import bisect_right
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfraud.errors import RequestError
from serve.expressions import Expression
from serve.facts import Case, recent_of
from serve.rulebook import RuleBook
from serve.service import Service

START = 1_600_000_000_000
"""A Sunday, 12:26:40."""
MINUTE, HOUR = 60_000, 3_600_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}
WHY = "asked for by a test"


def score(service: Service, **changes: Any) -> dict[str, Any]:
    return json.loads(service.score(json.dumps({**ROW, **changes}).encode()))


def put_rule(service: Service, name: str, expression: str, decision: str = "decline", **more: Any) -> dict[str, Any]:
    body = {"expression": expression, "decision": decision, "enabled": True, "why": WHY, **more}
    return json.loads(service.desk.put_rule(name, json.dumps(body).encode(), "key1"))


def delete_rule(service: Service, name: str) -> None:
    service.desk.delete_rule(name, json.dumps({"why": WHY}).encode(), "key1")


def make_list(service: Service, name: str, kind: str, field: str, *values: Any, expires: Any = None) -> None:
    service.desk.put_list(name, json.dumps({"kind": kind, "field": field, "why": WHY}).encode(), "key1")
    entries = [{"value": value, "expires": expires} for value in values]
    if entries:
        service.desk.add_entries(name, json.dumps({"entries": entries, "why": WHY}).encode(), "key2")


def codes(answer: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in answer["reasons"] if reason["code"].startswith(("rule:", "list:"))]


def refusal(call: Any, *args: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args)
    return caught.value


# ---- what is decided


def test_a_rule_is_in_force_for_the_next_transaction_and_a_duplicate_keeps_its_answer(service):
    before = score(service)
    put_rule(service, "all", "amount > 10", words="a large amount")
    assert score(service) == {**before, "duplicate": True}
    hit = score(service, id="t2")
    assert hit["decision"] == "decline"
    assert {"code": "rule:all", "text": "a large amount", "contribution": None} in hit["reasons"]
    delete_rule(service, "all")
    assert score(service, id="t2") == {**hit, "duplicate": True}
    assert codes(score(service, id="t3")) == []


def test_is_fraud_and_probability_know_nothing_of_rules(cards, tmp_path):
    answers = []
    for folder in "ab":
        with Service(cards, tmp_path / folder) as service:
            if folder == "b":
                put_rule(service, "all", "true")
                make_list(service, "good", "allow", "device", "d2")
            some = [score(service, id=n, time=START + n * MINUTE, amount=2.0**n, device=f"d{n % 3}") for n in range(9)]
            answers.append([(a["fraud_probability"], a["is_fraud"]) for a in some])
            if folder == "b":
                assert {a["decision"] for a in some} == {"decline", "approve"}
    assert answers[0] == answers[1]


def test_allow_lists_come_before_block_lists_before_rules_by_priority(service):
    put_rule(service, "late-one", "true", "review", priority=200)
    put_rule(service, "first", "true", "review", priority=1)
    put_rule(service, "strict", "amount > 100", "decline", priority=50)
    put_rule(service, "trusted", "merchant == 'm7'", "approve", priority=0)
    put_rule(service, "useless", "merchant == 'm8'", "approve", priority=60)
    put_rule(service, "draft", "true", "decline", enabled=False)
    make_list(service, "bad", "block", "device", "d9")
    make_list(service, "good", "allow", "user", "ann")

    def asked(**changes: Any) -> tuple[str, list[str]]:
        asked.n += 1
        answer = score(service, id=asked.n, **{"user": "bob", **changes})
        return answer["decision"], codes(answer)

    asked.n = 0
    assert asked(user="ann", device="d9") == ("approve", ["list:good"])
    assert asked(device="d9", merchant="m7") == ("decline", ["list:bad"])
    assert asked(merchant="m7", amount=500.0) == ("approve", ["rule:trusted"])
    assert asked(amount=500.0) == ("decline", ["rule:first", "rule:strict", "rule:late-one"])
    # a stricter rule came first: the rest is not looked at, and the decision is no milder than the model's
    assert asked(merchant="m8", amount=500.0) == ("decline", ["rule:first", "rule:strict"])


def test_rules_only_make_it_stricter(service, cards):
    """Whatever the model says: a review rule leaves a decline."""
    put_rule(service, "look", "true", "review")
    strictness = ("approve", "review", "decline")
    seen = set()
    for n in range(40):
        answer = score(service, id=n, merchant=n % 5, amount=10 ** (n % 6), time=START + n * n * 7 * MINUTE, kind=n)
        p, t = answer["fraud_probability"], cards.manifest.thresholds
        model = "decline" if p >= t.decline else "review" if p >= t.review else "approve"
        seen.add(model)
        assert answer["decision"] == max(model, "review", key=strictness.index)
    assert "decline" in seen and len(seen) > 1


def test_a_missing_value_does_not_match_and_is_counted(service):
    put_rule(service, "device", "device == 'd1'")
    put_rule(service, "either", "device == 'd1' || amount > 10", "review")
    assert codes(score(service, id=1, device=None)) == ["rule:either"]
    assert codes(score(service, id=2, device=None, amount=1.0)) == []
    assert codes(score(service, id=3)) == ["rule:device", "rule:either"]
    shown = {rule["name"]: (rule["matched"], rule["failed"]) for rule in json.loads(service.desk.rules())["rules"]}
    assert shown == {"device": (1, 2), "either": (2, 1)}


def test_fields_of_time(service):
    put_rule(service, "when", "hour == 12 && weekday == 6 && time == 1600000000 && history == 0 && !late")
    assert codes(score(service)) == ["rule:when"]
    assert codes(score(service, id="t2", user="bob", time=START + 12 * HOUR)) == []


def test_many_rules_are_what_each_alone_would_be(service):
    """More than are evaluated together, in several groups."""
    for n in range(50):
        put_rule(service, f"r{n:02}", f"amount > {n * 10} && merchant == 'm{n % 2}'", "review")
    answer = score(service, amount=255.0)
    assert codes(answer) == [f"rule:r{n:02}" for n in range(1, 26, 2)]
    delete_rule(service, "r03")
    assert codes(score(service, id=2, amount=55.0)) == ["rule:r01", "rule:r05"]


def test_lists_end_at_a_transactions_time(service):
    make_list(service, "until", "block", "user", "ann", expires=START + HOUR)
    assert codes(score(service, id=1, time=START + HOUR - 1)) == ["list:until"]
    assert codes(score(service, id=2, time=START + HOUR)) == []
    assert codes(score(service, id=3, time=START)) == ["list:until"], "a late one, of a time when it held"


def test_ids_on_lists_are_decimal_strings(service):
    make_list(service, "numbers", "block", "user", 42, "43", 44.0)
    assert [codes(score(service, id=n, user=user)) for n, user in enumerate([42, "42", 43, 44, "44", 45])] == [
        ["list:numbers"], ["list:numbers"], ["list:numbers"], ["list:numbers"], ["list:numbers"], [],
    ]  # fmt: skip


def test_networks_block(rich, tmp_path):
    with Service(rich, tmp_path) as service:
        make_list(service, "nets", "block", "ip", "192.0.2.0/25", "2001:db8::/32")
        row = {"user": "u", "time": "2021-01-01T00:00:00", "amount": 5, "age": 3, "total": 5, "lat": 1, "long": 2}
        found = []
        for n, ip in enumerate(["192.0.2.9", "192.0.2.200", "2001:DB8:7::1", None, "nowhere"]):
            answer = json.loads(service.score(json.dumps({**row, "id": n, "ip": ip, "kind": "a"}).encode()))
            found.append(codes(answer))
        assert found == [["list:nets"], [], ["list:nets"], [], []]


# ---- windows


def values(service: Service, transaction: Any, names: tuple[str, ...]) -> dict[str, Any]:
    slot = service.engine.users.slots.get(transaction.user)
    if slot is None:
        slot = service.engine.users.slot(transaction.user)
    case = Case(transaction, 0.5, 0, False, lambda: recent_of(service.engine.users, slot, transaction.time))
    return {name: get(case) for name, get in service.engine.rules.facts.getters(names)}


NAMES = ("count_1h", "total_1h", "distinct_kind_1h", "distinct_amount_1h", "since_last")
EVENT = st.tuples(
    st.sampled_from("ab"), st.integers(-30, 200), st.sampled_from([1.5, 2.0, 4.25]), st.sampled_from("xyz")
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENT, min_size=1, max_size=25))
def test_windows_are_what_a_slow_count_says(cards, tmp_path_factory, events):
    """Late events too: by the newest W at or before a transaction's time, of those that the ring still has."""
    window = cards.manifest.serve.window
    with Service(cards, tmp_path_factory.mktemp("state")) as service:
        rings: dict[str, list[tuple[int, float, str]]] = {}
        for n, (user, minutes, amount, kind) in enumerate(events):
            time = START + minutes * MINUTE
            transaction = service.decode({**ROW, "id": n, "user": user, "time": time, "amount": amount, "kind": kind})
            seen = values(service, transaction, NAMES)
            before = rings.setdefault(user, [])
            before = before[: bisect_right([at for at, _, _ in before], time)][-window:]
            inside = [e for e in before if e[0] > time - HOUR] + [(time, amount, kind)]
            known = {v: i for i, v in enumerate(cards.manifest.vocabularies[0].values)}
            assert seen == {
                "count_1h": len(inside),
                "total_1h": pytest.approx(sum(e[1] for e in inside)),
                "distinct_kind_1h": len({known.get(e[2], "unseen") for e in inside}),
                "distinct_amount_1h": len({np.float32(e[1]) for e in inside}),
                "since_last": (time - before[-1][0]) / 1000 if before else None,
            }
            slot = service.engine.users.slots[user]
            passed_over = service.engine.users.is_late(slot, time) and service.engine.users.is_too_late(slot, time)
            service.score_one(transaction)
            if not passed_over:
                # how many the ring keeps is its own business, tested in test_users.py
                rest = sorted([*rings[user], (time, amount, kind)], key=lambda event: event[0])
                rings[user] = rest[len(rest) - int(service.engine.users.held[slot]) :]


def test_a_velocity_limit_is_a_condition(service):
    put_rule(service, "burst", "count_10m >= 3 && total_10m > 50")
    found = [codes(score(service, id=n, time=START + n * MINUTE)) for n in range(4)]
    assert found == [[], [], ["rule:burst"], ["rule:burst"]]
    assert codes(score(service, id="later", time=START + HOUR)) == []
    assert codes(score(service, id="other", user="bob", time=START + 4 * MINUTE)) == []


# ---- the audit


def test_changes_are_kept_with_author_and_why(service):
    put_rule(service, "a", "amount > 1", "review")
    put_rule(service, "a", "amount > 2", why="one was too little")
    put_rule(service, "b", "amount > 3")
    delete_rule(service, "a")
    history = json.loads(service.desk.rule_history("a"))["changes"]
    assert [(c["do"], c["author"], c["why"], c["at"]) for c in history] == [
        ("put", "key1", WHY, 1000), ("put", "key1", "one was too little", 1000), ("delete", "key1", WHY, 1000),
    ]  # fmt: skip
    assert [c["rule"] and c["rule"]["expression"] for c in history] == ["amount > 1", "amount > 2", None]
    make_list(service, "x", "block", "user", *range(150))
    service.desk.remove_entries("x", json.dumps({"values": [3, 999], "why": "a mistake"}).encode(), "key3")
    history = json.loads(service.desk.list_history("x"))["changes"]
    assert [(c["do"], c["author"], c["count"], len(c["values"])) for c in history] == [
        ("put", "key1", 0, 0), ("add", "key2", 150, 100), ("remove", "key3", 2, 2),
    ]  # fmt: skip
    page = json.loads(service.desk.list("x", 147))
    assert (page["about"]["entries"], [e["value"] for e in page["entries"]], page["next"]) == (
        149,
        ["148", "149"],
        None,
    )
    assert page["entries"][0]["author"] == "key2"


def test_a_start_knows_the_rules_from_the_index_after_a_snapshot(cards, tmp_path):
    with Service(cards, tmp_path) as service:
        put_rule(service, "a", "count_1h >= 2")
        make_list(service, "x", "block", "device", "d5", expires=START + HOUR)
        score(service, id=1)
        service.snapshot()
        delete_rule(service, "a")
        put_rule(service, "b", "count_1h >= 3")
        first = score(service, id=2)
    with Service(cards, tmp_path) as service:
        assert list(service.engine.rules.rules) == ["b"]
        assert score(service, id=2) == {**first, "duplicate": True}
        assert codes(score(service, id=3)) == ["rule:b"]
        assert codes(score(service, id=4, device="d5", user="bob")) == ["list:x"]


def test_the_book_as_of_any_record_decides_as_it_did(cards, tmp_path):
    with Service(cards, tmp_path) as service:
        seen = []
        for n in range(12):
            if n % 3 == 0:
                put_rule(service, "limit", f"amount > {n * 10}")
            if n == 7:
                make_list(service, "x", "allow", "merchant", "m1")
            answer = score(service, id=n, amount=50.0, merchant=f"m{n % 2}")
            seen.append((service._journal.last_seq, answer["decision"], codes(answer)))
        actions = service.actions("rule") + service.actions("list")
        for n, (seq, decision, reasons) in enumerate(seen):
            before = sorted((a for a in actions if a.seq < seq), key=lambda a: a.seq)
            book = RuleBook.as_of(cards.manifest, service.identifiers, before)
            record = service._journal.transaction(str(n))
            answer = json.loads(record.answer)
            case = Case(service.decoder.decode_stored(record), answer["fraud_probability"], n, False, lambda: None)
            t = cards.manifest.thresholds
            p = answer["fraud_probability"]
            ruling = book.decide("decline" if p >= t.decline else "review" if p >= t.review else "approve", case)
            assert (ruling.decision, [r.code for r in ruling.reasons]) == (decision, reasons)


def test_a_failed_write_changes_no_rule(cards, tmp_path, small_disk):
    with Service(cards, tmp_path, disk=small_disk.disk) as service:
        small_disk.room = 0
        assert refusal(put_rule, service, "a", "true").status == 503
        small_disk.room = None
        assert json.loads(service.desk.rules())["rules"] == []
        assert codes(score(service)) == []


# ---- what is refused


def body(**fields: Any) -> bytes:
    return json.dumps({"expression": "amount > 1", "decision": "review", "why": WHY, **fields}).encode()


@pytest.mark.parametrize(
    ("sent", "field", "words"),
    [
        (body(expression="amunt > 1"), "expression", "the nearest is amount"),
        (body(expression=5), "expression", "5; expected a condition"),
        (body(decision="block"), "decision", "approve, review or decline"),
        (body(why=""), "why", "a text that says why"),
        (body(why="  "), "why", "a text that says why"),
        (b'{"expression": "true", "decision": "review"}', "why", "missing"),
        (body(priority=-1), "priority", "-1; expected an integer"),
        (body(enabeld=True), "enabeld", "the nearest is enabled"),
        (body(words="x" * 300), "words", "at most 256"),
        (b'{"why": "a", "why": "b", "expression": "true", "decision": "review"}', "why", "stands twice"),
    ],
)
def test_wrong_rules_are_named(service, sent, field, words):
    error = refusal(service.desk.put_rule, "a", sent, "key1")
    assert (error.status, error.field) == (422, field)
    assert words in error.message
    assert service._journal.last_seq == 0


def test_wrong_lists_and_names(service):
    desk = service.desk
    for name in ("test", "Upper", "1st", "a b", "x" * 65, ""):
        assert refusal(desk.put_rule, name, body(), "k").field == "name"
    assert refusal(desk.rule, "a").code == "unknown_rule"
    assert refusal(desk.delete_rule, "a", b'{"why": "x"}', "k").status == 404
    assert refusal(desk.list_history, "a").code == "unknown_list"
    wrong = refusal(desk.put_list, "x", json.dumps({"kind": "block", "field": "merchnt", "why": WHY}).encode(), "k")
    assert (wrong.field, "the nearest is merchant" in wrong.message) == ("field", True)
    make_list(service, "x", "block", "user", "ann")
    other = refusal(desk.put_list, "x", json.dumps({"kind": "allow", "field": "user", "why": WHY}).encode(), "k")
    assert other.status == 409
    for entries, field in (
        ([{"value": ""}], "entries[0].value"),
        ([{"value": "a"}, {"value": "b", "expires": "soon"}], "entries[1].expires"),
        ([], "entries"),
        ([{"value": "a" * 300}], "entries[0].value"),
    ):
        sent = json.dumps({"entries": entries, "why": WHY}).encode()
        assert refusal(desk.add_entries, "x", sent, "k").field == field
    assert json.loads(desk.list("x", 0))["about"]["entries"] == 1


def test_hashed_values_are_never_raw(make_bundle, cards_toml, tmp_path):
    bundle = make_bundle(cards_toml + '\n[identifiers]\ndefault = "hash"\n')
    with Service(bundle, tmp_path) as service:
        make_list(service, "x", "block", "user", "secret-user")
        put_rule(service, "cards", "kind == '4111111111111111'", why="4111111111111111")
        assert codes(score(service, user="secret-user")) == ["list:x"]
        said = service.desk.list("x", 0) + service.desk.list_history("x") + service.desk.rule_history("cards")
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for raw in (b"secret-user", b"4111111111111111"):
        assert raw not in said and raw not in stored


# ---- drafts against the journal


def draft(service: Service, expression: str, **more: Any) -> dict[str, Any]:
    return json.loads(service.desk.test_rule(json.dumps({"expression": expression, **more}).encode()))


def fill(service: Service, count: int = 60) -> list[dict[str, Any]]:
    """Several users, some late, labels said before and after; what was answered."""
    rng = np.random.default_rng(3)
    answers = []
    for n in range(count):
        time = START + n * 3 * MINUTE - (n % 11 == 10) * 25 * MINUTE
        row = {"id": n, "user": f"u{rng.integers(4)}", "time": time, "amount": float(2 ** rng.integers(8))}
        answers.append({**row, **score(service, **row)})
        if n % 4 == 0:
            said = [{"transaction_id": str(n - n % 3), "is_fraud": n % 8 == 0}]
            service.add_labels(json.dumps(said).encode())
    return answers


@pytest.mark.parametrize(
    "expression", ["amount > 30", "count_30m >= 3", "total_1h > 200 || since_last < 200", "probability > 0.5"]
)
def test_a_draft_hits_what_the_rule_would_have_hit(cards, tmp_path, expression):
    """The same transactions through a service where the rule was in force, late ones included."""
    with Service(cards, tmp_path / "live") as service:
        put_rule(service, "r", expression, "review")
        wanted = [a["id"] for a in fill(service) if codes(a) == ["rule:r"]]
    with Service(cards, tmp_path / "before") as service:
        answers = fill(service)
        tested = draft(service, expression)
        labels: dict[str, bool] = {}
        for record in service._journal.after(0):
            if hasattr(record, "is_fraud"):
                labels[record.transaction_id] = record.is_fraud
    assert 0 < len(wanted) < len(answers)
    hit = [a for a in answers if a["id"] in wanted]
    known = [labels.get(str(a["id"])) for a in hit]
    missed = [a for a in hit if a["decision"] == "approve"]
    assert (tested["examined"], tested["complete"], tested["failed"]) == (len(answers), True, tested["failed"])
    assert tested["hits"] == {"transactions": len(hit), "amount": sum(a["amount"] for a in hit)}
    assert tested["fraud"]["transactions"] == known.count(True)
    assert tested["honest"]["transactions"] == known.count(False)
    assert tested["unknown"]["transactions"] == known.count(None)
    assert tested["not_caught"] == {"transactions": len(missed), "amount": sum(a["amount"] for a in missed)}
    assert tested["changed"] == len(missed)
    assert tested["words"] == f"would have hit {len(hit)} of the last {len(answers)}, {known.count(True)} of them fraud"


def test_a_draft_over_the_last_few_knows_what_was_before(cards, tmp_path):
    """The ring before the first of them comes from the index, wherever the ring is in its round; early labels count."""
    with Service(cards, tmp_path) as service:
        for n in range(30):
            service.add_labels(json.dumps([{"transaction_id": str(n), "is_fraud": n == 29}]).encode())
        for n in range(30):
            score(service, id=n, time=START + n * MINUTE, user=f"u{n % 2}")
            if n > 8:
                few = draft(service, "count_6m >= 3 && count_7m >= 4 && count_90d == 4", last=1 + n % 7)
                assert few["examined"] == few["hits"]["transactions"] == min(1 + n % 7, n - 5)
        assert draft(service, "count_6m >= 4", last=7)["hits"]["transactions"] == 0
        assert draft(service, "true", last=2) | {"seconds": 0} == {
            **draft(service, "amount > 0", last=2), "expression": "true", "seconds": 0,
        }  # fmt: skip
        assert [draft(service, "true", last=2)[kind]["transactions"] for kind in ("fraud", "honest", "unknown")] == [
            1,
            1,
            0,
        ]


def test_a_draft_is_bounded_in_time(cards, tmp_path, monkeypatch):
    with Service(cards, tmp_path) as service:
        fill(service, 12)
        monkeypatch.setattr("serve.hits.BLOCK", 5)
        times = iter(range(0, 10_000, 10))
        monkeypatch.setattr(
            "serve.hits.clock_time", type("Clock", (), {"monotonic": lambda: next(times), "sleep": None})
        )
        import serve.hits

        language = service.engine.rules.language
        tested = serve.hits.rule_hits(
            tmp_path,
            service.decoder,
            service.engine.rules.facts,
            3,
            language.compile("true"),
            "review",
            100,
            25.0,
            lambda s: None,
        )
        assert (tested.complete, tested.examined) == (False, 5)


def test_one_draft_at_a_time(service):
    with service.desk._testing:
        error = refusal(draft, service, "true")
    assert (error.status, error.code) == (503, "busy")
    assert draft(service, "true")["examined"] == 0


def test_an_expression_that_this_bundle_cannot_evaluate_is_kept_and_shown(cards, tmp_path, monkeypatch):
    with Service(cards, tmp_path) as service:
        put_rule(service, "a", "amount > 1")
        compile_as_before = type(service.engine.rules.language).compile

        def compile_other(self: Any, text: str, field: str = "expression") -> Expression:
            if text == "amount > 1":
                raise RequestError(422, "invalid_field", "there is no amount any more", field)
            return compile_as_before(self, text, field)

        monkeypatch.setattr(type(service.engine.rules.language), "compile", compile_other)
        put_rule(service, "b", "amount > 2")
        assert codes(score(service)) == ["rule:b"]
        assert json.loads(service.desk.rule("a"))["broken"] == "there is no amount any more"
