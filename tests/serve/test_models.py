"""Another model in force, and models in shadow: over one service in this process."""

import gc
import json
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfraud.bundle import Bundle
from seqfraud.errors import ParityError, RequestError
from seqfraud.registry import Registry
from serve.challenger import ShadowSettings
from serve.metrics import Registry as Metrics
from serve.offline import score_journal
from serve.records import TransactionRecord
from serve.service import Service
from serve.shadow import ROW, ShadowScores, read_shadow, shadow_folder

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"
START = 1_600_000_000_000
MINUTE = 60_000
WHY = "it is better"


@pytest.fixture(scope="session")
def trio(make_bundle: Callable[..., Bundle], cards_toml: str) -> tuple[Bundle, Bundle, Bundle]:
    """Three models over the fields of CARDS; the second reads other half-lives."""
    other = cards_toml.replace('["1h", "12h"]', '["2h", "12h"]')
    return make_bundle(cards_toml), make_bundle(other, seed=1), make_bundle(cards_toml, seed=2)


@pytest.fixture(scope="session")
def filled(trio: tuple[Bundle, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Registry(tmp_path_factory.mktemp("registry") / "models")
    for bundle in trio:
        made.add(bundle.path, "ann")
    made.promote(trio[0].id, "ann", "the first")
    return made.folder


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Registry:
    """One with the three, of which the first is the champion."""
    return Registry(Path(shutil.copytree(filled, tmp_path / "models")))


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose graphs would have been verified, which takes seconds."""
    seen: list[str] = []
    monkeypatch.setattr("serve.models.verify_opened", lambda bundle: seen.append(bundle.id))
    return seen


@pytest.fixture
def start(trio, registry: Registry, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`start(**settings)`: a service on the registry's champion over one state folder."""
    opened: list[Service] = []

    def run(**settings: Any) -> Service:
        champion = registry.champion
        assert champion is not None
        settings = {"clock": lambda: START, "snapshot_every": None, "registry": registry, **settings}
        opened.append(Service(registry.open(champion), tmp_path / "state", **settings))
        return opened[-1]

    yield run
    for service in opened:
        service.abandon()


def change(service: Service, action: str, model: str = "", reason: str = WHY) -> Any:
    body = {"action": action, "reason": reason} | ({"model": model} if model else {})
    return json.loads(service.change_model(json.dumps(body).encode(), "key1"))


def refusal(service: Service, *what: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        change(service, *what)
    return caught.value


def row(number: int, **changes: Any) -> dict[str, Any]:
    plain = {"id": f"next {number}", "user": f"u{number % 6}", "time": START + (20_000 + number) * MINUTE,
             "amount": 50.0 * number, "kind": "food", "merchant": "m1", "device": "d1"}  # fmt: skip
    return plain | changes


def score(service: Service, number: int, **changes: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(service.score(json.dumps(row(number, **changes)).encode()))
    return answer


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shadows(service: Service) -> dict[str, dict[str, Any]]:
    return {one["model"]: one for one in json.loads(service.model())["shadow"]}


def scraped(service: Service) -> dict[str, float]:
    """The figures of challengers by name, of which there is one."""
    found = re.findall(r"^(seqfraud_shadow_\w+)\{model=\"\w+\"\} (\S+)$", service.metrics().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def in_step(service: Service, model: str) -> bool:
    return shadows(service)[model]["behind"] == 0


# ---- another model in force


@pytest.mark.parametrize("to", [1, 2], ids=["another context", "the same context"])
def test_a_promoted_model_answers_as_one_that_scored_everything_from_the_start(
    start, trio, registry, live, to, crash, memory_of
):
    """Late events, labels early and late, retries, corrections among what it folds; then live traffic goes on."""
    service, target = start(), trio[to]
    first = live(service, 0, 120)
    shown = change(service, "promote", target.id)
    assert (shown["model"], registry.champion, shown["changing"]) == (target.id, target.id, "")
    second = live(service, 1, 60, first=120)
    models = {r.id: r.bundle for r in service.journal.after(0) if isinstance(r, TransactionRecord)}
    assert {models[i] for i in first} == {trio[0].id}
    assert {models[i] for i in second} == {target.id}
    offline = score_journal(target, service._state)
    wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
    np.testing.assert_allclose([second[i] for i in second], [wanted[i] for i in second], atol=1e-5)
    mine = memory_of(service)
    crash(service)
    again = start()
    assert again.bundle.id == target.id
    theirs = memory_of(again)
    mine.pop("users"), theirs.pop("users")  # in batches they are the same to the parity of the graphs only
    assert mine == theirs


def test_what_was_done_is_journalled_and_in_the_registry(start, trio, registry):
    service = start()
    change(service, "promote", trio[1].id, "it caught more")
    change(service, "rollback", reason="it alarmed too much")
    done = [(a.author, json.loads(a.body)) for a in service.actions("model")]
    a, b = trio[0].id, trio[1].id
    assert done == [
        ("key1", {"action": "promote", "model": b, "before": a, "reason": "it caught more"}),
        ("key1", {"action": "rollback", "model": a, "before": b, "reason": "it alarmed too much"}),
    ]
    assert [(e.action, e.author, e.model) for e in registry.events()[-2:]] == [
        ("promote", "key1", b),
        ("rollback", "key1", a),
    ]
    assert service.bundle.id == a
    assert service.models.swaps == 2


def test_a_duplicate_gets_the_answer_of_the_model_that_gave_it(start, trio):
    service = start()
    first = score(service, 1)
    change(service, "promote", trio[1].id)
    assert score(service, 1) == {**first, "duplicate": True}
    assert score(service, 2)["model"] == trio[1].id


def test_a_transaction_that_was_decoded_before_the_swap_is_decoded_again(start, make_bundle, cards_toml, registry):
    """Vocabularies differ, so one model's category ids are another's mistakes."""
    service = start()
    waiting = service.decoder.decode(json.dumps(row(1, kind="transport")).encode())
    before = service.decoder
    other = make_bundle(cards_toml, seed=2)
    change(service, "promote", other.id)
    service.decoder._lookups = [(i, {"transport": 2}) for i, _ in service.decoder._lookups]
    answer = service.score_one(waiting)
    assert answer.model == other.id
    assert service.decoder is not before
    slot = service.engine.users.slots["u1"]
    assert service.engine.users.integers[slot, 0, 1] == 2


def test_rules_are_bound_to_the_new_model_and_go_on_counting(start, trio):
    service = start()
    body = {"expression": "amount > 100.0", "decision": "decline", "enabled": True, "why": "x", "words": "too much"}
    service.desk.put_rule("a", json.dumps(body).encode(), "key1")
    assert score(service, 3)["decision"] == "decline"
    change(service, "promote", trio[1].id)
    answer = score(service, 4)
    assert answer["decision"] == "decline"
    assert answer["reasons"][0]["code"] == "rule:a"
    (rule,) = json.loads(service.desk.rules())["rules"]
    assert rule["matched"] == 2
    body["enabled"] = False
    service.desk.put_rule("a", json.dumps(body).encode(), "key1")
    assert all(r["code"] != "rule:a" for r in score(service, 5)["reasons"])


def test_a_desk_from_before_a_swap_changes_nothing(start, trio):
    """It would compile a rule with the language of a model that is gone."""
    service = start()
    old = service.desk
    change(service, "promote", trio[1].id)
    body = {"expression": "amount > 1.0", "decision": "decline", "why": "x"}
    with pytest.raises(RequestError, match="another model came into force meanwhile") as caught:
        old.put_rule("a", json.dumps(body).encode(), "key1")
    assert caught.value.status == 409
    assert json.loads(service.desk.rules())["rules"] == []


def test_the_old_engine_goes_at_once_without_the_garbage_collector(start, trio):
    """What there was at the start is frozen: a cycle would keep a whole memory for good."""
    service = start()
    for number in range(20):
        score(service, number)
    gc.collect()
    engine = weakref.ref(service.engine)
    memory = weakref.ref(service.engine.memory)
    gc.disable()
    try:
        change(service, "promote", trio[1].id)
        assert engine() is None
        assert memory() is None
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_snapshot_of_the_new_model_is_soon_there(start, trio, tmp_path, crash, caplog):
    service = start(snapshot_every=3600.0, snapshot_records=5)
    for number in range(20):
        score(service, number)
    change(service, "promote", trio[1].id)
    wait_for(lambda: list((tmp_path / "state").glob("snapshot-*.bin")))
    wait_for(lambda: not service._snapshot_wanted)
    crash(service)
    caplog.set_level("INFO")
    again = start()
    assert again.bundle.id == trio[1].id
    assert "journal records after 21 folded" in caplog.text or again._snapshot_seq == 21


# ---- what is refused changes nothing


def state_of(service: Service, registry: Registry) -> tuple[Any, ...]:
    return service.engine, service.desk, service.journal.last_seq, len(registry.events()), registry.standing()


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        (("promote", "0123456789abcdef"), 404, "there is no model '0123456789abcdef'"),
        (("promote", "/etc/passwd"), 404, "there is no model"),
        (("promote",), 422, "model: missing; expected an id"),
        (("promote", "champion"), 409, "is in force already"),
        (("rollback",), 404, "there is no previous yet"),
        (("shadow", "champion"), 409, "it cannot challenge itself"),
        (("withdraw", "SECOND"), 409, "does not score in shadow"),
        (("promote", "SECOND", " "), 422, "reason: 1 characters; expected a text that says why"),
        (("burn", "SECOND"), 422, "action: 'burn'; expected promote, rollback, shadow or withdraw"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(start, trio, registry, what, status, words):
    service = start()
    before = state_of(service, registry)
    error = refusal(service, *(trio[1].id if x == "SECOND" else x for x in what))
    assert error.status == status
    assert words in error.message.replace('"', "'")
    assert state_of(service, registry) == before


def test_without_a_registry_no_model_changes(cards, tmp_path):
    with Service(cards, tmp_path / "state") as service:
        error = refusal(service, "promote", "champion")
        assert (error.status, error.code) == (409, "no_registry")
        assert "--registry" in error.message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('context = ["merchant", "device"]', 'context = ["merchant"]', "it declares other fields: texts"),
        ('numeric = ["amount"]', 'numeric = ["amount", "age"]', "it declares other fields: numbers"),
        ('time_unit = "ms"', 'time_unit = "s"', "it declares other fields: time_unit is 's'"),
        ("[serve]", '[identifiers.columns]\nuser = "hash"\n[serve]', "it stores user by the identifier policy 'hash'"),
    ],
)
def test_a_model_over_other_fields_is_refused(start, registry, make_bundle, cards_toml, old, new, words):
    service = start()
    other = make_bundle(cards_toml.replace(old, new))
    registry.add(other.path, "ann")
    before = state_of(service, registry)
    for action in ("promote", "shadow"):
        error = refusal(service, action, other.id)
        assert (error.status, error.code) == (409, "model_refused")
        assert words in error.message
    assert state_of(service, registry) == before


def test_a_rule_that_does_not_fit_refuses_the_promotion(start, trio, registry, monkeypatch):
    service = start()
    body = {"expression": "amount > 100.0", "decision": "decline", "enabled": True, "why": "x"}
    service.desk.put_rule("a", json.dumps(body).encode(), "key1")
    language = type(service.engine.rules.language)
    compile_as_before = language.compile

    def compile_some(self: Any, text: str) -> Any:
        if self is not service.engine.rules.language:
            raise RequestError(422, "invalid_field", "there is no amount any more")
        return compile_as_before(self, text)

    before = state_of(service, registry)
    monkeypatch.setattr(language, "compile", compile_some)
    error = refusal(service, "promote", trio[1].id)
    assert (
        "the rule a does not fit it, and would not be evaluated any more: there is no amount any more" in error.message
    )
    assert state_of(service, registry) == before


def test_a_bundle_that_was_tampered_with_is_refused(start, trio, registry):
    service = start()
    file = registry.path(trio[1].id) / "step.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    before = state_of(service, registry)
    error = refusal(service, "promote", trio[1].id)
    assert (error.status, error.code) == (409, "model_refused")
    assert "step.onnx is not the file the manifest describes" in error.message
    assert state_of(service, registry) == before


def test_a_model_whose_graphs_compute_something_else_is_refused(start, trio, registry, monkeypatch, verified):
    service = start()
    before = state_of(service, registry)

    def differs(bundle: Bundle) -> None:
        raise ParityError("parity check 'step': logit differs by 1; allowed is 0.001")

    with monkeypatch.context() as patched:
        patched.setattr("serve.models.verify_opened", differs)
        for action in ("promote", "shadow"):
            error = refusal(service, action, trio[1].id)
            assert (error.status, error.code) == (409, "model_refused")
            assert "logit differs by 1" in error.message
    assert state_of(service, registry) == before
    change(service, "shadow", trio[1].id)
    assert verified == [trio[1].id]


def broken_engine(service: Service, monkeypatch: pytest.MonkeyPatch, name: str, value: Callable[..., Any]) -> None:
    """Engines made from now on fail in a graph."""
    make = service.new_engine

    def broken(bundle: Bundle) -> Any:
        engine = make(bundle)
        monkeypatch.setattr(getattr(engine, name), "run" if name == "sequence" else "run_bound", value)
        return engine

    monkeypatch.setattr(service, "new_engine", broken)


@pytest.mark.parametrize("graph", ["sequence", "step"])
def test_a_graph_that_fails_on_the_way_leaves_everything_as_it_was(
    start, trio, registry, monkeypatch, memory_of, graph
):
    service = start()
    for number in range(20):
        score(service, number)
    before, memory = state_of(service, registry), memory_of(service)
    with monkeypatch.context() as patched:
        broken_engine(service, patched, graph, lambda *_: 1 / 0)
        if graph == "step":  # which is for the last few, under the lock
            patched.setattr("serve.models.CLOSE", 30)
            patched.setattr("serve.service.CLOSE", 30)
        error = refusal(service, "promote", trio[1].id)
    assert error.code == "model_refused"
    assert memory_of(service) == memory
    assert registry.champion == trio[0].id
    if graph == "sequence":
        assert state_of(service, registry) == before
    else:  # the registry was told first, and then that it came to nothing
        assert [(e.action, e.model) for e in registry.events()[-2:]] == [
            ("promote", trio[1].id),
            ("rollback", trio[0].id),
        ]
    assert score(service, 21)["model"] == trio[0].id
    assert change(service, "promote", trio[1].id)["model"] == trio[1].id


def test_a_journal_that_cannot_be_written_leaves_everything_as_it_was(trio, registry, tmp_path, small_disk, start):
    service = start(disk=small_disk.disk)
    for number in range(5):
        score(service, number)
    change(service, "shadow", trio[1].id)
    small_disk.room = 0
    error = refusal(service, "promote", trio[1].id)
    assert (error.status, error.code) == (503, "storage_unavailable")
    assert (service.bundle.id, registry.champion) == (trio[0].id, trio[0].id)
    assert registry.challengers == (trio[1].id,)
    small_disk.room = None
    wait_for(lambda: in_step(service, trio[1].id))
    assert change(service, "promote", trio[1].id)["model"] == trio[1].id


def test_one_change_at_a_time(start, trio, monkeypatch):
    service = start()
    score(service, 1)
    begun, go = threading.Event(), threading.Event()
    catch_up = service.catch_up

    def slowly(engine: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return catch_up(engine)

    monkeypatch.setattr(service, "catch_up", slowly)
    thread = threading.Thread(target=change, args=(service, "promote", trio[1].id))
    thread.start()
    assert begun.wait(30)
    for what in (("promote", trio[2].id), ("shadow", trio[2].id)):
        error = refusal(service, *what)
        assert (error.status, error.retry_after) == (409, 5)
        assert f"another change goes on: promote {trio[1].id}" in error.message
    assert json.loads(service.model())["changing"] == f"promote {trio[1].id}"
    assert score(service, 2)["model"] == trio[0].id, "scoring goes on"
    go.set()
    thread.join()
    assert score(service, 3)["model"] == trio[1].id


def test_a_service_that_closes_ends_a_swap_that_goes_on(start, trio, registry, monkeypatch):
    service = start()
    for number in range(5):
        score(service, number)
    monkeypatch.setattr("serve.catchup.WORK_S", 0.0)
    monkeypatch.setattr(service, "rest", lambda seconds: (service._closing.wait(30), Service.rest(service, 0)))
    errors: list[RequestError] = []
    thread = threading.Thread(target=lambda: errors.append(refusal(service, "promote", trio[1].id)))
    thread.start()
    wait_for(lambda: service.models.changing)
    service.close()
    thread.join(30)
    assert (errors[0].status, errors[0].code) == (503, "not_ready")
    assert "stopping" in errors[0].message
    assert registry.champion == trio[0].id


def test_work_beside_scoring_rests_only_while_something_is_stored(start, monkeypatch):
    service = start()
    waited: list[float] = []
    monkeypatch.setattr(service._closing, "wait", waited.append)
    monkeypatch.setattr("serve.service.IDLE_S", 3600.0)
    score(service, 1)
    service.rest(0.25)
    long_ago = -(10.0**6)
    service._rested_at = (long_ago, service._rested_at[1])
    service.rest(0.25)
    score(service, 2)
    service.rest(0.25)
    assert waited == [0.25, 0, 0.25]


def test_a_registry_that_was_changed_without_the_service_is_caught_up_with(start, trio, registry):
    service = start()
    registry.promote(trio[1].id, "bob", "by hand")
    assert change(service, "promote", "champion")["model"] == trio[1].id
    assert [e.author for e in registry.events() if e.action == "promote"] == ["ann", "bob"]


# ---- shadow


def test_a_challenger_scores_as_it_would_have_answered(start, trio, registry, live, tmp_path):
    service = start()
    before = live(service, 0, 60)
    change(service, "shadow", trio[1].id)
    assert registry.challengers == (trio[1].id,)
    after = live(service, 1, 60, first=60)
    wait_for(lambda: in_step(service, trio[1].id))
    change(service, "promote", "challenger")
    assert registry.challengers == ()
    offline = score_journal(trio[1], tmp_path / "state")
    wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
    table = read_shadow(tmp_path / "state")
    assert set(table["model"].to_pylist()) == {trio[1].id}
    assert table["id"].to_pylist() == [i for i in offline.ids if i in after and i not in before]
    np.testing.assert_allclose(table["probability"], [wanted[i] for i in table["id"].to_pylist()], atol=1e-5)
    policy = trio[1].manifest.policy
    for scored in table.to_pylist():
        assert scored["is_fraud"] == (scored["probability"] >= policy.thresholds.is_fraud)
        assert scored["decision"] == policy.decide(scored["probability"], None)
    last = live(service, 2, 30, first=120)
    offline = score_journal(trio[1], tmp_path / "state")
    wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
    np.testing.assert_allclose([last[i] for i in last], [wanted[i] for i in last], atol=1e-5)


def test_a_challenger_in_step_comes_into_force_without_a_rebuild(start, trio, monkeypatch):
    service = start()
    for number in range(20):
        score(service, number)
    change(service, "shadow", trio[1].id)
    wait_for(lambda: in_step(service, trio[1].id))
    monkeypatch.setattr(service, "new_engine", lambda bundle: 1 / 0)
    monkeypatch.setattr(service, "catch_up", lambda engine: 1 / 0)
    assert change(service, "promote", trio[1].id)["model"] == trio[1].id
    assert shadows(service) == {}


def test_agreement_is_of_the_models_without_rules(start, trio, tmp_path):
    """A rule that declines everything says nothing about either of them."""
    service = start()
    body = {"expression": "amount >= 0.0", "decision": "decline", "enabled": True, "why": "x"}
    service.desk.put_rule("a", json.dumps(body).encode(), "key1")
    change(service, "shadow", trio[1].id)
    answers = [score(service, number) for number in range(30)]
    assert {answer["decision"] for answer in answers} == {"decline"}
    wait_for(lambda: shadows(service)[trio[1].id]["scored"] == 30)
    shown = shadows(service)[trio[1].id]
    table = read_shadow(tmp_path / "state")
    p, q = np.array(table["probability"]), np.array([answer["fraud_probability"] for answer in answers])
    ours = [trio[0].manifest.policy.decide(x, None) for x in q]
    agreement = shown["agreement"]
    assert agreement["decisions"] == pytest.approx(
        np.mean([a == b for a, b in zip(ours, table["decision"].to_pylist(), strict=True)])
    )
    assert agreement["mean_absolute_difference"] == pytest.approx(np.abs(p - q).mean(), abs=1e-6)
    assert agreement["correlation"] == pytest.approx(np.corrcoef(p, q)[0, 1], abs=1e-4)
    assert (shown["state"], shown["behind"], shown["dropped"], shown["why"]) == ("in step", 0, 0, "")


def test_a_challenger_that_fails_stops_and_says_so_and_nobody_else_notices(start, trio, monkeypatch):
    service = start()
    change(service, "shadow", trio[2].id)
    with monkeypatch.context() as patched:
        broken_engine(service, patched, "sequence", lambda *_: 1 / 0)
        change(service, "shadow", trio[1].id)
        assert score(service, 1)["model"] == trio[0].id
        wait_for(lambda: shadows(service)[trio[1].id]["state"] == "stopped")
    assert shadows(service)[trio[1].id]["why"] == "ZeroDivisionError"
    assert score(service, 2)["decision"]
    wait_for(lambda: shadows(service)[trio[2].id]["scored"] == 2)
    assert shadows(service)[trio[2].id]["state"] == "in step"
    change(service, "shadow", trio[1].id)  # once more, whole
    score(service, 3)
    wait_for(lambda: in_step(service, trio[1].id) and shadows(service)[trio[1].id]["scored"] == 3)


def test_a_challenger_goes_on_after_a_stop_and_after_a_crash(start, trio, tmp_path, crash, live):
    service = start()
    live(service, 0, 40)
    change(service, "shadow", trio[1].id)
    live(service, 1, 30, first=40)
    wait_for(lambda: in_step(service, trio[1].id))
    service.close()
    assert list(shadow_folder(tmp_path / "state", trio[1].id).glob("snapshot-*.bin"))
    service = start()
    live(service, 2, 30, first=70)
    wait_for(lambda: in_step(service, trio[1].id))
    crash(service)  # after the newest snapshot it begins again, and has scored some of that already
    service = start()
    live(service, 3, 30, first=100)
    wait_for(lambda: in_step(service, trio[1].id))
    assert shadows(service)[trio[1].id]["scored"] == 90
    offline = score_journal(trio[1], tmp_path / "state")
    table = read_shadow(tmp_path / "state")
    assert table["id"].to_pylist() == offline.ids[40:]
    np.testing.assert_allclose(table["probability"], offline.probability[40:], atol=1e-5)


def test_what_is_too_far_behind_is_dropped_and_counted_and_the_state_stays_right(start, trio, tmp_path, monkeypatch):
    monkeypatch.setattr("serve.catchup.BLOCK", 10)
    service = start(shadow=ShadowSettings(most_behind=25))
    held = threading.Event()
    from serve.catchup import CatchUp

    advance = CatchUp.advance

    def slowly(self: CatchUp, most: int = 10) -> Any:
        assert held.wait(30)
        return advance(self, 10)

    monkeypatch.setattr(CatchUp, "advance", slowly)
    change(service, "shadow", trio[1].id)
    for number in range(60):
        score(service, number)
    held.set()
    wait_for(lambda: in_step(service, trio[1].id))
    shown = shadows(service)[trio[1].id]
    assert shown["scored"] + shown["dropped"] == 60
    assert 30 <= shown["dropped"] <= 40
    offline = score_journal(trio[1], tmp_path / "state")
    wanted = dict(zip(offline.ids, offline.probability.tolist(), strict=True))
    table = read_shadow(tmp_path / "state")
    assert len(table) == shown["scored"]
    assert table["id"].to_pylist()[-15:] == offline.ids[-15:]
    np.testing.assert_allclose(table["probability"], [wanted[i] for i in table["id"].to_pylist()], atol=1e-5)


def test_there_are_so_many_challengers_and_no_more(start, trio, registry):
    service = start(shadow=ShadowSettings(most=1))
    change(service, "shadow", trio[1].id)
    error = refusal(service, "shadow", trio[2].id)
    assert (error.status, error.message) == (409, "1 models score in shadow; at most 1 (shadow.most)")
    assert "scores in shadow already" in refusal(service, "shadow", trio[1].id).message
    assert registry.challengers == (trio[1].id,)
    change(service, "withdraw", trio[1].id)
    assert registry.challengers == ()
    assert shadows(service) == {}
    change(service, "shadow", trio[2].id)


def test_a_model_without_a_state_may_challenge(start, registry, trio, tmp_path, live):
    """A baseline over the same fields fits the same contract."""
    service = start()
    live(service, 0, 20)
    change(service, "shadow", trio[2].id)
    live(service, 1, 20, first=20)
    wait_for(lambda: in_step(service, trio[2].id))


# ---- the store


def rows(*seqs: int, **values: Any) -> Any:
    made = np.zeros(len(seqs), dtype=ROW)
    made["seq"] = seqs
    for name, value in values.items():
        made[name] = value
    return made


def test_what_a_crash_left_of_the_scores_is_cut_off(tmp_path):
    store = ShadowScores(tmp_path, 100)
    store.append(rows(3, 5, 9, probability=[0.1, np.nan, 0.3]))
    store.close()
    file = tmp_path / "scores.bin"
    whole = file.read_bytes()
    for left, last in ((whole[:-3], 5), (whole + bytes(40), 9), (whole, 9)):
        file.write_bytes(left)
        store = ShadowScores(tmp_path, 100)
        assert store.last_seq == last
        assert file.stat().st_size % ROW.itemsize == 0
        store.append(rows(9, 11))  # the first is there already, where it is
        assert store.last_seq == 11
        store.close()
    file.write_bytes(whole)
    store = ShadowScores(tmp_path, 5)  # the journal lost the rest in a power cut
    assert (store.last_seq, store.tally.scored, store.tally.dropped) == (5, 1, 1)
    store.close()
    assert os.path.getsize(file) == 2 * ROW.itemsize


def test_nothing_was_scored_in_shadow_where_there_never_was_a_challenger(tmp_path):
    table = read_shadow(tmp_path)
    assert table.column_names == ["model", "seq", "id", "probability", "is_fraud", "decision"]
    assert len(table) == 0


def test_a_challenger_is_counted(start, trio):
    service = start(metrics=Metrics())
    assert scraped(service) == {}
    change(service, "shadow", trio[1].id)
    for number in range(5):
        score(service, number)
    wait_for(lambda: in_step(service, trio[1].id) and scraped(service)["seqfraud_shadow_scored_total"] == 5)
    named = set(re.findall(r"seqfraud_shadow_\w+", DOCS.read_text()))
    assert scraped(service).keys() == named
    assert scraped(service)["seqfraud_shadow_dropped_total"] == scraped(service)["seqfraud_shadow_stopped"] == 0
    change(service, "withdraw", trio[1].id)
    assert scraped(service) == {}
