"""Kill -9 under load, a few times; `make crash` does it 200 times."""

from pathlib import Path

import pytest

from benchmarks.crash import CLIENTS, TOLERANCE, crash


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("promise", "kills", "seed"), [("process", 4, 1), ("disk", 2, 2)])
def test_what_was_acknowledged_is_there_after_every_kill(cards, tmp_path: Path, promise, kills, seed):
    options = ("--promise", promise, "--snapshot-seconds", "0.2")
    outcome = crash(cards.path, tmp_path / "state", kills, seed, tmp_path / "scores.parquet", options)
    print(outcome)
    assert outcome.kills == kills
    assert outcome.acknowledged > 10 * CLIENTS, "hardly anything happened"
    assert outcome.labels_acknowledged > 0
    assert (outcome.lost, outcome.changed, outcome.labels_lost) == (0, 0, 0)
    assert outcome.journalled >= outcome.acknowledged
    assert outcome.largest_difference <= TOLERANCE
