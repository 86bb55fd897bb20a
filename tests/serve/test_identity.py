"""The service stores hashed identifiers: what it answers, what lies in its folder, and when a key or a policy is refused."""

import json
import shutil
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle, Manifest
from seqfraud.config import IdentifiersConfig
from seqfraud.errors import ConfigError, RequestError, RunError
from seqfraud.identifiers import is_stored_form, make_key, read_key
from serve.identity import CHECK, KEY_FILE, POLICY
from serve.service import Service

START = 1_700_000_000_000
HOUR = 3_600_000
CARD, OTHER_CARD, SPACED = "4111111111111111", "5500005555555559", "3782 822463 10005"
LONG = 6304000000000000000
"""19 digits: beyond what a float64 holds, within int64."""


@pytest.fixture(scope="module")
def bundle_of(make_bundle: Callable[..., Bundle], cards_toml: str) -> Callable[..., Bundle]:
    """`bundle_of("hash", id="hash")`: CARDS with a policy, the same graphs whatever the policy."""

    def make(default: str = "cards", **columns: str) -> Bundle:
        mine = "".join(f'{column} = "{treatment}"\n' for column, treatment in columns.items())
        return make_bundle(f'{cards_toml}[identifiers]\ndefault = "{default}"\n[identifiers.columns]\n{mine}')

    return make


def row(number: int, user: Any = CARD, **fields: Any) -> dict[str, Any]:
    return {"id": number, "user": user, "time": START + number * HOUR, "amount": 20.0 + number, "kind": "a",
            "merchant": "m1", "device": None, **fields}  # fmt: skip


def post(service: Service, content: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(service.score(json.dumps(content).encode()))
    return answer


def said(service: Service, *labels: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = json.loads(service.add_labels(json.dumps(labels).encode()))
    return counts


def bytes_of(state: Path) -> bytes:
    """Every byte of a state folder but the key's file, and the texts of the index once more as SQL gives them."""
    files = [f for f in sorted(state.rglob("*")) if f.is_file() and f.name != KEY_FILE]
    assert any(f.suffix == ".log" for f in files)
    with sqlite3.connect(f"file:{state / 'journal.sqlite'}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT id, user, raw FROM transactions").fetchall() + db.execute(
            "SELECT transaction_id, source FROM labels"
        ).fetchall()  # fmt: skip
    return b"".join(f.read_bytes() for f in files) + repr(rows).encode()


def stream() -> list[dict[str, Any]]:
    """Users and entities that look like cards in every spelling, some late, some again."""
    users = [CARD, int(CARD), SPACED, LONG, "bob", 7, OTHER_CARD]
    merchants = ["m1", OTHER_CARD, float(CARD), None, LONG, "hmac:" + "0" * 32]
    rows = [
        row(n, users[n % 7], merchant=merchants[n % 6], device=[None, SPACED, 5][n % 3], kind="abc"[n % 3])
        for n in range(60)
    ]
    late = [dict(r, id=r["id"] + 100, time=r["time"] - 5 * HOUR) for r in rows[20:60:9]]
    return [*rows[:40], *late, *rows[40:], rows[3]]


# ---- what is stored


def test_no_byte_of_the_state_holds_what_was_hashed(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path) as service:
        for content in stream():
            post(service, content)
        said(service, {"transaction_id": 5, "is_fraud": True, "source": CARD})
        assert post(service, row(300, kind=OTHER_CARD))["history"] == 20
    content = bytes_of(tmp_path)
    for text in (CARD, OTHER_CARD, SPACED, str(LONG)):
        assert text.encode() not in content
    assert b"bob" in content
    assert b"hmac:" in content
    assert b"hmac:" + b"0" * 32 not in content


def test_with_hash_no_value_is_stored_as_it_came(bundle_of, tmp_path):
    with Service(bundle_of("hash", id="hash"), tmp_path) as service:
        post(service, row(1, "marker-user", id="marker-id", merchant="marker-merchant", kind="marker-kind"))
        said(service, {"transaction_id": "marker-id", "is_fraud": True})
    content = bytes_of(tmp_path)
    assert b"marker-kind" in content  # a category is in the bundle as it is
    for marker in (b"marker-user", b"marker-id", b"marker-merchant"):
        assert marker not in content


def test_keep_stores_everything_and_makes_no_key(bundle_of, tmp_path):
    with Service(bundle_of("keep"), tmp_path) as service:
        post(service, row(1))
        assert json.loads(service.user(CARD))["events"][0]["transaction"]["user"] == CARD
    assert not (tmp_path / KEY_FILE).exists()


@pytest.mark.parametrize("policy", [{}, {"default": "hash", "id": "hash"}, {"merchant": "keep"}])
def test_answers_do_not_depend_on_the_policy(bundle_of, tmp_path, policy):
    """Nor on the key; histories, contexts, labels, late events and duplicates included."""
    answers = []
    for name, bundle in (("kept", bundle_of("keep")), ("hashed", bundle_of(**policy))):
        with Service(bundle, tmp_path / name, clock=lambda: START) as service:
            mine = []
            for n, content in enumerate(stream()):
                if n % 8 == 5:
                    said(service, {"transaction_id": n - 4, "is_fraud": True, "known_at": START})
                mine.append({**post(service, content), "model": ""})
            answers.append(mine)
    assert answers[0] == answers[1]
    assert len({a["fraud_probability"] for a in answers[0]}) > 40
    assert {a["late"] for a in answers[0]} == {a["duplicate"] for a in answers[0]} == {False, True}


@pytest.mark.parametrize("fold_above", [0, 10_000])
@pytest.mark.parametrize("default", ["cards", "hash"])
def test_a_restart_does_not_hash_again(bundle_of, tmp_path, crash, memory_of, default, fold_above):
    service = Service(bundle_of(default, id="hash"), tmp_path, clock=lambda: START)
    for content in stream():
        post(service, content)
    said(service, {"transaction_id": 5, "is_fraud": True, "known_at": START})
    before = memory_of(service)
    crash(service)
    with Service(bundle_of(default, id="hash"), tmp_path, fold_above=fold_above) as again:
        if fold_above:
            assert memory_of(again) == before
        assert list(memory_of(again)["users"]) == list(before["users"])
        assert all(post(again, content)["duplicate"] for content in stream())


# ---- what is answered


def test_a_user_is_found_by_the_card_and_by_what_stands_for_it(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path) as service:
        post(service, row(1))
        post(service, row(2, int(CARD)))
        answer = json.loads(service.user(CARD))
        assert answer["history"] == 2
        assert is_stored_form(answer["user"])
        assert {e["transaction"]["user"] for e in answer["events"]} == {answer["user"]}
        assert json.loads(service.user(answer["user"])) == answer
        with pytest.raises(RequestError) as refused:
            service.user(OTHER_CARD)
        assert refused.value.status == 404
        assert OTHER_CARD not in refused.value.message


def test_nobody_passes_for_a_hashed_user(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path) as service:
        post(service, row(1))
        stored = json.loads(service.user(CARD))["user"]
        assert post(service, row(2, stored))["history"] == 0
        assert json.loads(service.user(CARD))["history"] == 1


def test_hashed_ids_are_echoed_as_they_were_sent(bundle_of, tmp_path):
    with Service(bundle_of(id="hash"), tmp_path) as service:
        first = post(service, row(1))
        assert first["transaction_id"] == "1"
        assert post(service, row(1)) == {**first, "duplicate": True}
        assert json.loads(service.transaction("1")) == {**first, "labels": []}
        with pytest.raises(RequestError) as refused:
            post(service, row(1, merchant="another"))
        assert (refused.value.status, refused.value.message) == (
            409, "a transaction of this id was scored before with other content",
        )  # fmt: skip
        (event,) = json.loads(service.user(CARD))["events"]
        stored = event["answer"]["transaction_id"]
        assert event["transaction"]["id"] == stored
        assert is_stored_form(stored)
        assert json.loads(service.transaction(stored)) == {**first, "transaction_id": stored, "labels": []}
        (result,) = json.loads(service.score_batch(json.dumps([row(1)]).encode()))["results"]
        assert result == {**first, "duplicate": True}
        assert said(service, {"transaction_id": 1, "is_fraud": True})["new"] == 1
        assert said(service, {"transaction_id": stored, "is_fraud": True})["unchanged"] == 1


def test_an_id_is_kept_by_default_even_if_it_looks_like_a_card(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path) as service:
        assert post(service, row(1, id=int(CARD)))["transaction_id"] == CARD
        assert json.loads(service.user(CARD))["events"][0]["transaction"]["id"] == int(CARD)


def test_derived_ids_depend_on_the_key(plain, tmp_path):
    """Else who has the journal could try card numbers until user, time and amount give the id that stands there."""
    ids = []
    for name in ("a", "b"):
        with Service(plain, tmp_path / name) as service:
            content = {"user": CARD, "time": START // 1000, "amount": 5, "kind": "a"}
            ids.append(post(service, content)["transaction_id"])
            ids.append(post(service, {**content, "user": "bob"})["transaction_id"])
    assert ids[0] != ids[2]
    assert ids[1] == ids[3]  # nothing in it was hashed


def test_a_category_that_looks_like_a_card_is_an_unseen_one(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path / "a") as a, Service(bundle_of(), tmp_path / "b") as b:
        assert post(a, row(1, kind=CARD)) == post(b, row(1, kind="never seen"))


# ---- the key


def test_the_key_is_made_at_the_first_start_and_stays(bundle_of, tmp_path):
    Service(bundle_of(), tmp_path).close()
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = read_key(path)
    with Service(bundle_of(), tmp_path) as service:
        post(service, row(1))
    assert read_key(path) == key


def test_without_its_key_a_journal_is_refused(bundle_of, tmp_path, memory_of):
    with Service(bundle_of(), tmp_path) as service:
        post(service, row(1))
        before = memory_of(service)
    kept = tmp_path / "copy"
    (tmp_path / KEY_FILE).rename(kept)
    with pytest.raises(RunError, match=r"identifier\.key: the identifier key is gone.*every user would begin anew"):
        Service(bundle_of(), tmp_path)
    assert not (tmp_path / KEY_FILE).exists()
    with Service(bundle_of(), tmp_path, identifier_key=kept) as service:
        assert memory_of(service) == before
    kept.rename(tmp_path / KEY_FILE)
    with Service(bundle_of(), tmp_path) as service:
        assert post(service, row(2))["history"] == 1


def test_another_key_is_refused(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path / "state") as service:
        post(service, row(1))
    make_key(tmp_path / "other")
    with pytest.raises(RunError, match=r"not the identifier key that the journal of .* is written with"):
        Service(bundle_of(), tmp_path / "state", identifier_key=tmp_path / "other")
    (tmp_path / "state" / KEY_FILE).unlink()
    shutil.copy(tmp_path / "other", tmp_path / "state" / KEY_FILE)
    with pytest.raises(RunError, match="not the identifier key"):
        Service(bundle_of(), tmp_path / "state")


def test_a_key_may_be_shared(bundle_of, tmp_path):
    make_key(tmp_path / "shared")
    users = []
    for name in ("a", "b"):
        with Service(bundle_of(), tmp_path / name, identifier_key=tmp_path / "shared") as service:
            post(service, row(1))
            users.append(json.loads(service.user(CARD))["user"])
        assert not (tmp_path / name / KEY_FILE).exists()
    assert users[0] == users[1]
    with pytest.raises(ConfigError, match="no such identifier key"):
        Service(bundle_of(), tmp_path / "c", identifier_key=tmp_path / "typo")


def test_a_lost_key_of_an_empty_journal_is_no_loss(bundle_of, tmp_path):
    Service(bundle_of(), tmp_path).close()
    (tmp_path / KEY_FILE).unlink()
    with Service(bundle_of(), tmp_path) as service:
        post(service, row(1))
    with Service(bundle_of(), tmp_path) as service:
        assert post(service, row(2))["history"] == 1


def test_the_notes_of_the_journal_do_not_hold_the_key(bundle_of, tmp_path):
    with Service(bundle_of(), tmp_path) as service:
        key = read_key(tmp_path / KEY_FILE)
        check = service.journal.meta(CHECK)
        assert json.loads(str(service.journal.meta(POLICY)))["user"] == "cards"
    assert check is not None
    content = bytes_of(tmp_path)
    assert check.encode() in content
    assert key not in content
    assert key.hex().encode() not in content


# ---- another policy


@pytest.mark.parametrize(
    ("before", "after"),
    [("cards", "hash"), ("hash", "cards"), ("hash", "keep"), ("keep", "hash"), ("cards", "keep"), ("keep", "cards")],
)
def test_a_policy_by_which_users_would_begin_anew_is_refused(bundle_of, tmp_path, before, after):
    with Service(bundle_of(before), tmp_path) as service:
        post(service, row(1))
    with pytest.raises(RunError, match=f'the journal holds values of .* policy "{before}".*the bundle says "{after}"'):
        Service(bundle_of(after), tmp_path)
    with Service(bundle_of(before), tmp_path) as service:
        assert post(service, row(2))["history"] == 1


@pytest.mark.parametrize(("before", "after"), [("cards", "keep"), ("keep", "cards")])
def test_a_policy_that_stores_what_is_there_alike_is_taken(bundle_of, tmp_path, before, after):
    with Service(bundle_of(before), tmp_path) as service:
        post(service, row(1, "bob"))
    with Service(bundle_of(after), tmp_path) as service:
        assert post(service, row(2, "bob"))["history"] == 1
        post(service, row(3))
    with pytest.raises(RunError, match="record 3 among them"):
        Service(bundle_of(before), tmp_path)


def test_a_journal_from_before_there_was_a_policy(bundle_of, tmp_path, monkeypatch):
    """Its values are as they came: it goes on where none of them looks like a card, else it says so."""
    for name, user in (("clean", "bob"), ("cards", CARD)):
        with monkeypatch.context() as patched:
            patched.setattr("serve.journal.Journal.set_meta", _only_fields)
            with Service(bundle_of("keep"), tmp_path / name) as service:
                post(service, row(1, user))
                assert service.journal.meta(POLICY) is None
    with Service(bundle_of(), tmp_path / "clean") as service:
        assert post(service, row(2, "bob"))["history"] == 1
    with pytest.raises(RunError, match='values of user stored by the identifier policy "keep", record 1 among them'):
        Service(bundle_of(), tmp_path / "cards")


def _only_fields(journal: Any, key: str, value: str) -> None:
    if key == "fields":
        journal._notes[key] = value


def test_a_policy_is_part_of_the_manifest(cards):
    again = replace(cards.manifest, identifiers=IdentifiersConfig("keep", {"user": "hash"}))
    assert Manifest.from_dict(json.loads(json.dumps(again.as_dict()))).identifiers == again.identifiers
