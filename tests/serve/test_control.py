"""The control share: what is let through at random, and that it stays so."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle, open_bundle, write_manifest
from seqfraud.policy import Policy, Thresholds
from serve.control import KEY, control_shares
from serve.journalled import read_journal, weights
from serve.retrace import retrace
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
DECLINES = Thresholds(is_fraud=0.6, review=0.0, decline=0.0)
"""Everything is declined."""
SHARE = 0.05


def with_policy(bundle: Bundle, policy: Policy, folder: Path) -> Bundle:
    shutil.copytree(bundle.path, folder)
    write_manifest(folder, replace(bundle.manifest, policy=policy))
    return open_bundle(folder)


@pytest.fixture(scope="module")
def controlled(cards: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_policy(cards, Policy(DECLINES, control_share=SHARE), tmp_path_factory.mktemp("control") / "bundle")


def row(n: int, **changes: Any) -> bytes:
    fields = {"id": f"t{n}", "user": f"u{n % 5}", "time": START + n * MINUTE, "amount": 20.0, "kind": "food",
              "merchant": "m1", "device": "d1"}  # fmt: skip
    return json.dumps({**fields, **changes}).encode()


def post(service: Service, count: int, **changes: Any) -> list[dict[str, Any]]:
    return [json.loads(service.score(row(n, **changes))) for n in range(count)]


def test_a_share_of_what_is_declined_is_let_through_for_good(
    controlled, tmp_path: Path, crash: Callable[[Service], None]
):
    service = Service(controlled, tmp_path, clock=lambda: START)
    answers = post(service, 300)
    spared = [a for a in answers if a.get("control")]
    assert 3 < len(spared) < 35  # 15 expected, 6 standard deviations
    for answer in answers:
        assert answer["reasons"]  # why it is, or would have been, declined
        assert (answer["decision"] == "approve") == answer.get("control", False)
        assert "control" not in answer or answer["control"] is True
    crash(service)
    with Service(controlled, tmp_path, clock=lambda: START) as again:
        assert [a | {"duplicate": False} for a in post(again, 300)] == answers
        alerts = {a["transaction_id"] for a in json.loads(again.alerts("limit=200"))["alerts"]}
        newest = answers[-len(alerts) :]
        assert {a["transaction_id"] for a in newest if not a.get("control")} <= alerts
        assert not alerts & {a["transaction_id"] for a in spared}
        for answer in (spared[0], next(a for a in answers if not a.get("control"))):
            found = retrace(controlled, tmp_path, answer["transaction_id"])
            assert (found.differs, found.answered.control) == ((), answer.get("control", False))
    # another journal has another key, and so other transactions
    with Service(controlled, tmp_path / "other", clock=lambda: START) as other:
        assert [a.get("control") for a in post(other, 300)] != [a.get("control") for a in answers]


def test_what_was_let_through_stands_for_what_was_declined(controlled, cards, tmp_path: Path):
    with Service(controlled, tmp_path, clock=lambda: START) as service:
        spared = sum(a.get("control", False) for a in post(service, 200))
    with Service(cards, tmp_path, clock=lambda: START) as service:
        for n in range(200, 220):
            service.score(row(n))
    read = read_journal(tmp_path, cards.manifest.schema)
    weight = weights(read)
    assert control_shares(read.notes) == {controlled.id: SHARE}
    control = read.table["control"].to_numpy(zero_copy_only=False)
    assert control.sum() == spared
    assert weight[:200].tolist() == [1 / SHARE if c else 0.0 for c in control[:200]]
    assert weight[200:].tolist() == [1.0] * 20


def test_what_a_rule_or_a_list_speaks_of_is_never_let_through(controlled, tmp_path: Path):
    def put(service: Service, kind: str, body: dict[str, Any]) -> None:
        service.act(kind, "key-1", json.dumps(body).encode())

    with Service(controlled, tmp_path, clock=lambda: START) as service:
        rule = {"expression": "amount > 10.0", "decision": "decline", "enabled": True}
        put(service, "rule", {"do": "put", "name": "large", "rule": rule, "why": "w"})
        assert {a["decision"] for a in post(service, 200)} == {"decline"}
        put(service, "rule", {"do": "delete", "name": "large", "why": "w"})
        put(service, "list", {"do": "put", "name": "bad", "kind": "block", "field": "merchant", "why": "w"})
        put(service, "list", {"do": "add", "name": "bad", "entries": [{"value": "m9"}], "why": "w"})
        blocked = [json.loads(service.score(row(n, id=f"b{n}", merchant="m9"))) for n in range(200)]
        assert {a["decision"] for a in blocked} == {"decline"}
        others = [json.loads(service.score(row(n, id=f"c{n}"))) for n in range(200)]
        assert any(a.get("control") for a in others)


def test_without_a_share_nothing_is_drawn_or_noted(cards, tmp_path: Path):
    bundle = with_policy(cards, Policy(DECLINES), tmp_path / "bundle")
    assert "control_share" not in (bundle.path / "manifest.json").read_text()
    with Service(bundle, tmp_path / "state", clock=lambda: START) as service:
        assert not any("control" in a for a in post(service, 100))
        assert service.journal.meta(KEY) is None
