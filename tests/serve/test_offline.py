"""`seqfraud score --state` and rebuilding in batches: what was answered, worked out anew from the journal."""

import json
from pathlib import Path

import numpy as np
import pytest

from seqfraud.errors import RunError
from serve.offline import score_journal
from serve.records import TransactionRecord
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000


@pytest.mark.parametrize("seed", range(3))
def test_a_journal_scores_as_it_was_answered_while_the_service_runs(cards, tmp_path: Path, live, seed):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        answers = live(service, seed, 300)
        scored = score_journal(cards, tmp_path, threads=1)
        probability = scored.probability
        accepted = [record.raw for record in service.journal.after(0) if isinstance(record, TransactionRecord)]
    assert scored.ids == list(answers)
    assert scored.amount is not None
    assert scored.amount.tolist() == [json.loads(raw)["amount"] for raw in accepted]
    np.testing.assert_allclose(probability, list(answers.values()), atol=1e-5)
    assert np.std(probability) > 0.05
    # labels matter, or this could not see one that is lost or heard at another time
    with Service(cards, tmp_path / "other", clock=lambda: START) as service:
        for raw in accepted:
            service.score(raw)
        without = score_journal(cards, tmp_path / "other", threads=1).probability
    assert np.abs(without - probability).max() > 1e-3


@pytest.mark.parametrize("other", ["the same", "other weights", "another context"])
def test_memory_rebuilt_in_batches_goes_on_as_if_nothing_had_been(
    cards, make_bundle, cards_toml, tmp_path: Path, crash, memory_of, live, other
):
    """By the bundle that scored, and by a new one on the old journal."""
    with Service(cards, tmp_path, clock=lambda: START) as service:
        live(service, 1, 400)
        crash(service)
    toml = cards_toml.replace('["1h", "12h"]', '["2h", "12h"]') if other == "another context" else cards_toml
    bundle = make_bundle(toml, seed=0 if other == "the same" else 1)
    rows = [{"id": f"next {i}", "user": f"u{i % 6}", "time": START + (10_000 + i) * MINUTE, "amount": 50.0 * i,
             "kind": "food", "merchant": "m1", "device": "d1"} for i in range(12)]  # fmt: skip
    after = []
    for fold_above in (10_000, 0):
        again = Service(bundle, tmp_path, clock=lambda: START, fold_above=fold_above)
        memory = memory_of(again)
        scored = [
            again.engine._score(
                again.decoder.decode(json.dumps(row).encode()), np.zeros(bundle.manifest.context.width, np.float32)
            )
            for row in rows
        ]
        after.append((memory, [s.probability for s in scored]))
        crash(again)
    (one_by_one, wanted), (in_batches, got) = after
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert list(one_by_one.pop("users")) == list(in_batches.pop("users"))
    assert one_by_one == in_batches


def test_what_is_torn_off_at_the_end_is_left_out_and_damage_before_it_refused(cards, tmp_path: Path, live):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        answers = live(service, 0, 20)
    (file,) = (tmp_path / "journal").glob("*.log")
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    assert score_journal(cards, tmp_path).ids in (list(answers), list(answers)[:-1])
    later = file.with_name("999999999999999.log")
    later.write_bytes(data)
    with pytest.raises(RunError, match="after record"):
        score_journal(cards, tmp_path)


def test_other_fields_and_no_journal_are_refused(cards, rich, tmp_path: Path, live):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        live(service, 0, 3)
    with pytest.raises(RunError, match="holds the fields"):
        score_journal(rich, tmp_path)
    with pytest.raises(RunError, match="no journal"):
        score_journal(cards, tmp_path / "nowhere")
