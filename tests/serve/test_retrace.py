"""`seqfraud replay --decision`: a decision worked out again from the journal and the bundle that decided."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from seqfraud.cli import main
from seqfraud.errors import RunError
from seqfraud.identifiers import is_stored_form
from serve.journal import Journal
from serve.records import ActionRecord, LabelRecord, Record, TransactionRecord
from serve.retrace import LOG_ODDS_TOLERANCE, TOLERANCE, _alike, retrace
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}
CARD = "4111111111111111"


def score(service: Service, **changes: Any) -> dict[str, Any]:
    return json.loads(service.score(json.dumps({**ROW, **changes}).encode()))


def transactions(state: Path) -> list[TransactionRecord]:
    journal = Journal(state)
    records = [r for r in journal.after(0) if isinstance(r, TransactionRecord)]
    journal.close()
    return records


def rewritten(state: Path, out: Path, change: Callable[[Record], Record | None]) -> Path:
    """A state folder with a journal that is whole, and says something else."""
    out.mkdir()
    journal, other = Journal(state), Journal(out)
    for key, value in journal._index.notes().items():
        other.set_meta(key, value)
    for record in journal.after(0):
        changed = change(record)
        if changed is None:
            continue
        changed = replace(changed, seq=other.last_seq + 1)
        if isinstance(changed, TransactionRecord):
            other.append_transaction(changed)
        elif isinstance(changed, LabelRecord):
            other.append_labels([changed])
        else:
            other.append_action(changed)
    journal.close()
    other.close()
    return out


@pytest.mark.parametrize("seed", range(2))
def test_every_decision_comes_out_again_while_the_service_runs(cards, tmp_path: Path, live, crash, seed):
    """Late events, labels early and corrected, a restart from a snapshot and one without."""
    service = Service(cards, tmp_path, clock=lambda: START)
    for part in range(3):
        live(service, seed + 10 * part, 60, first=60 * part)
        service.act("note", "key-1", b"{}")
        service.close() if part == 1 else crash(service)
        service = Service(cards, tmp_path, clock=lambda: START)
    with service:
        records = [r for r in service.journal.after(0) if isinstance(r, TransactionRecord)]
        late = [r for r in records if msgspec.json.decode(r.answer)["late"]]
        assert len(late) > 3
        for record in [*records[:2], *late[:3], *records[-1:]]:
            found = retrace(cards, tmp_path, record.id)
            assert (found.differs, found.seq, found.context_difference) == ((), record.seq, 0.0)
            assert found.derived.fraud_probability == pytest.approx(found.answered.fraud_probability, abs=TOLERANCE)
            assert found.answered == msgspec.json.decode(record.answer, type=type(found.answered))


def changed_answer(record: TransactionRecord, **changes: Any) -> TransactionRecord:
    return replace(record, answer=json.dumps(json.loads(record.answer) | changes).encode())


def other_decision(record: TransactionRecord) -> TransactionRecord:
    return changed_answer(record, decision="approve" if b'"decline"' in record.answer else "decline")


def changed_row(record: TransactionRecord, **changes: Any) -> TransactionRecord:
    return replace(record, raw=json.dumps(json.loads(record.raw) | changes).encode())


FORGED: dict[str, tuple[Callable[[Record], Record | None], Sequence[str]]] = {
    "nothing": (lambda r: r, ()),
    "another's transaction": (lambda r: None if getattr(r, "id", "") == "other" else r, ()),
    "the probability": (
        lambda r: changed_answer(r, fraud_probability=0.5) if is_target(r) else r,
        ("fraud_probability",),
    ),
    "the decision": (lambda r: other_decision(r) if is_target(r) else r, ("decision",)),
    "the reasons": (
        lambda r: (
            changed_answer(r, reasons=[{"code": "because", "text": "because", "contribution": 1.0}])
            if is_target(r)
            else r
        ),
        ("reasons",),
    ),
    "its amount": (lambda r: changed_row(r, amount=9000.0) if is_target(r) else r, ("fraud_probability",)),
    "an amount before": (lambda r: changed_row(r, amount=9000.0) if getattr(r, "id", "") == "t2" else r, ("context",)),
    "a transaction before": (lambda r: None if getattr(r, "id", "") == "t2" else r, ("history", "context")),
    "a label before": (lambda r: None if isinstance(r, LabelRecord) else r, ("context",)),
    "the context": (
        lambda r: replace(r, context=(np.frombuffer(r.context, np.float32) + 1).tobytes()) if is_target(r) else r,
        ("fraud_probability", "context"),
    ),
}


def is_target(record: Record) -> bool:
    return isinstance(record, TransactionRecord) and record.id == "t4"


@pytest.fixture(scope="module")
def lived(cards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which t4 was decided after three of its user, one of another and a label that counts."""
    state = tmp_path_factory.mktemp("lived")
    with Service(cards, state, clock=lambda: START) as service:
        for n in range(4):
            score(service, id=f"t{n}", time=START + n * MINUTE, amount=10.0 * n)
        score(service, id="other", user="bob", time=START + 5 * MINUTE, merchant="m9", device="d9")
        service.add_labels(b'[{"transaction_id": "t1", "is_fraud": true}]')
        score(service, id="t4", time=START + 6 * MINUTE)
    return state


@pytest.mark.parametrize("what", FORGED)
def test_what_was_not_answered_so_does_not_come_out(cards, lived, tmp_path: Path, what):
    change, differs = FORGED[what]
    found = retrace(cards, rewritten(lived, tmp_path / "forged", change), "t4")
    assert set(differs) <= set(found.differs)
    assert bool(found.differs) == bool(differs)
    if "context" in differs:
        assert found.context_difference is not None
        assert found.context_difference > TOLERANCE


def test_the_context_need_not_be_worked_out(cards, lived, tmp_path: Path):
    found = retrace(cards, lived, "t4", with_context=False)
    assert (found.context_difference, found.differs) == (None, ())
    forged = rewritten(lived, tmp_path / "forged", FORGED["a label before"][0])
    assert retrace(cards, forged, "t4", with_context=False).differs == ()


def test_another_bundle_decided(cards, cards_toml, make_bundle, tmp_path: Path):
    """Its name is said; and what one bundle scored before is history for the next one, read as that one reads."""
    other = make_bundle(cards_toml.replace('["1h", "12h"]', '["2h", "12h"]'), seed=1)
    for bundle, numbers in ((cards, range(5)), (other, range(5, 9))):
        with Service(bundle, tmp_path, clock=lambda: START) as service:
            for n in numbers:
                score(service, id=f"t{n}", time=START + n * MINUTE, merchant=f"m{n % 2}")
    with pytest.raises(
        RunError, match=f"scored by the bundle {cards.id}; .* is {other.id}: name the one that scored it"
    ):
        retrace(other, tmp_path, "t4")
    assert retrace(cards, tmp_path, "t4").differs == ()
    for with_context in (True, False):
        found = retrace(other, tmp_path, "t8", with_context=with_context)
        assert (found.differs, found.derived.history) == ((), 8)


def test_the_actions_before_are_known_and_those_after_are_not(cards, tmp_path: Path, monkeypatch):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        before = [service.act("note", "key-1", b'{"n":1}'), service.act("word", "key-2", b'{"n":2}')]
        score(service)
        service.act("note", "key-1", b'{"n":3}')
    seen: list[ActionRecord] = []
    real = Service.judge_again

    def look(service: Service, record: TransactionRecord) -> Any:
        seen.extend(service.journal.actions(("note", "word")))
        return real(service, record)

    monkeypatch.setattr(Service, "judge_again", look)
    assert retrace(cards, tmp_path, "t1").differs == ()
    assert seen == before


def test_a_hashed_id_is_found_by_the_one_that_was_posted(cards_toml, make_bundle, tmp_path: Path):
    bundle = make_bundle(cards_toml + '[identifiers.columns]\nid = "hash"\n')
    with Service(bundle, tmp_path, clock=lambda: START) as service:
        score(service, user=CARD)
    (record,) = transactions(tmp_path)
    assert is_stored_form(record.id)
    for name in ("t1", record.id):
        assert retrace(bundle, tmp_path, name).differs == ()
    key = (tmp_path / "identifier.key").rename(tmp_path.parent / f"{tmp_path.name}.key")
    with pytest.raises(RunError, match="no transaction of this id"):
        retrace(bundle, tmp_path, "t1")
    assert retrace(bundle, tmp_path, "t1", key).differs == ()


# ---- the command


def test_the_command_says_whether_they_agree(cards, lived, tmp_path: Path, capsys):
    def replay(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main(["replay", *map(str, args)]), *capsys.readouterr())

    with_bundle = ("--bundle", cards.path)
    code, out, err = replay("--decision", "t4", "--state", lived, *with_bundle)
    assert (code, err) == (0, "")
    assert out.startswith(f"record 7, by the bundle {cards.id}\n")
    code, out, err = replay("--decision", "t4", "--state", lived, *with_bundle, "--json")
    found = json.loads(out)
    assert (code, found["agrees"], found["differs"], found["context_difference"]) == (0, True, [], 0.0)
    assert found["derived"] == found["answered"]
    forged = rewritten(lived, tmp_path / "forged", FORGED["the decision"][0])
    code, out, err = replay("--decision", "t4", "--state", forged, *with_bundle)
    assert (code, err) == (1, "error: decision of 't4' cannot be derived again to 1e-05\n")
    for args, words in [
        (["--decision", "t9", "--state", lived, *with_bundle], "no transaction of this id was accepted here"),
        (["--decision", "t4", "--state", tmp_path / "no", *with_bundle], "there is no journal here"),
        (["--decision", "t4", "--state", lived], "expected --state and --bundle with --decision"),
        (["data", "--decision", "t4", "--state", lived, *with_bundle], "expected --state and --bundle with --decision"),
        (["data"], "expected DATA and --url, or --decision"),
        (["data", "--url", "http://x", "--state", lived], "expected DATA and --url, or --decision"),
    ]:
        code, out, err = replay(*args)
        assert (code, out) == (2, "")
        assert words in err


def test_what_counts_as_the_same():
    reasons = [{"code": "amount", "contribution": 1.0}, {"code": "rule:a", "contribution": None}]
    assert _alike(reasons, [{"code": "amount", "contribution": 1.009}, reasons[1]], LOG_ODDS_TOLERANCE)
    for other in (
        [{"code": "amount", "contribution": 1.011}, reasons[1]],
        [{"code": "amount", "contribution": None}, reasons[1]],
        [{"code": "place", "contribution": 1.0}, reasons[1]],
        reasons[::-1],
        reasons[:1],
        [],
    ):
        assert not _alike(reasons, other, LOG_ODDS_TOLERANCE)
    assert not _alike(0.5, float("nan"), TOLERANCE)
