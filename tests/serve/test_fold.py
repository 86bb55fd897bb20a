"""Many transactions folded at once against the same ones scored one by one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from seqfraud.bundle import Bundle
from seqfraud.runtime import SequenceGraph
from serve.fold import Events, fold_many
from serve.service import Service
from serve.users import UserTable

START = 1_600_000_000_000
MINUTE = 60_000


def rows_of(seed: int, count: int, users: int, late: float) -> list[dict]:
    """Random transactions; a share of them is late, by a little or by more than the ring remembers."""
    rng = random.Random(seed)
    clock = START
    rows = []
    for number in range(count):
        clock += rng.choice([0, 1, 30, 600]) * MINUTE
        back = rng.choice([1, 5, 60, 3000, 20_000]) * MINUTE if rng.random() < late else 0
        rows.append({
            "id": number,
            "user": f"u{int(users * rng.random() ** 2)}",  # some have many transactions, some few
            "time": clock - back,
            "amount": rng.choice([1.0, 20.0, 300.0]),
            "kind": rng.choice(["food", "fuel", "never heard of"]),
            "merchant": rng.choice(["m1", "m2", "m3"]),
            "device": "d1",
        })  # fmt: skip
    return rows


def folded(service: Service, bundle: Bundle, cuts: list[int]) -> tuple[UserTable, np.ndarray]:
    """The journal of a service folded into fresh memory in blocks that end at `cuts`."""
    users = UserTable(bundle.manifest.graph, bundle.manifest.serve.window)
    graph = SequenceGraph(bundle.sequence, bundle.manifest.graph)
    slots, integers, values = [], [], []
    for record in service.journal.after(0):
        transaction = service.decoder.decode_stored(record)
        slots.append(users.slot(transaction.user))
        integers.append([transaction.time, *transaction.categories])
        numbers = transaction.numbers[: bundle.manifest.graph.numeric]
        values.append([*numbers, *np.frombuffer(record.context, dtype=np.float32)])
    events = Events(
        np.array(slots),
        np.array(integers, dtype=np.int64),
        np.array(values, dtype=np.float32).reshape(len(slots), -1),
    )
    scores = []
    for begin, end in zip([0, *cuts], [*cuts, len(slots)], strict=True):
        part = Events(events.slot[begin:end], events.integers[begin:end], events.values[begin:end])
        scores.append(fold_many(users, graph, part))
    return users, np.concatenate(scores)


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 50, 51, 300]], ids=["one block", "blocks"])
@pytest.mark.parametrize("late", [0.0, 0.15], ids=["in order", "some late"])
@pytest.mark.parametrize("seed", range(2))
def test_memory_and_scores_are_those_of_one_by_one(cards, tmp_path: Path, seed, late, cuts):
    with Service(cards, tmp_path, clock=lambda: START) as service:
        answers = [json.loads(service.score(json.dumps(row).encode())) for row in rows_of(seed, 500, 12, late)]
        users, scores = folded(service, cards, cuts)
        wanted = service.engine.users
        np.testing.assert_allclose(scores, [a["fraud_probability"] for a in answers], atol=1e-5)
        assert np.std(scores) > 0.05
        assert any(a["late"] for a in answers) == (late > 0)
        assert list(users.slots) == list(wanted.slots)
        assert users.dropped.max() > 4 * users.window
        for name, array in users.arrays.items():
            if name in ("integers", "values"):
                for slot, held in enumerate(wanted.held[: len(users.slots)].tolist()):
                    assert (array[slot, :held] == wanted.arrays[name][slot, :held]).all()
            elif array.dtype == np.int64:
                assert (array == wanted.arrays[name]).all(), name
            else:
                np.testing.assert_allclose(array, wanted.arrays[name], atol=1e-4, err_msg=name)


def test_no_events_change_nothing(cards):
    users = UserTable(cards.manifest.graph, 3)
    graph = SequenceGraph(cards.sequence, cards.manifest.graph)
    nothing = Events(np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64), np.zeros((0, 1), dtype=np.float32))
    assert len(fold_many(users, graph, nothing)) == 0
    assert users.slots == {}


@pytest.mark.parametrize("bundle", ["plain", "rich"])
def test_other_inputs_and_states(bundle, request, tmp_path: Path):
    """Two layers and no context; places, networks and missing numbers."""
    opened = request.getfixturevalue(bundle)
    rng = random.Random(1)
    with Service(opened, tmp_path, clock=lambda: START) as service:
        answers = []
        for number in range(200):
            row = {"user": f"u{rng.randrange(5)}", "amount": rng.choice([1, 30, 900]), "kind": "food"}
            seconds = 1_600_000_000 + 400 * number - rng.choice([0, 0, 0, 5_000])
            if bundle == "plain":
                row |= {"time": seconds}
            else:
                moment = np.datetime_as_string(np.datetime64(seconds, "s"))
                row |= {"id": number, "time": moment, "total": 3.5, "age": rng.choice([None, 20]), "ip": "10.0.0.7",
                        "lat": rng.choice([None, 10.5]), "long": 20.0}  # fmt: skip
            answers.append(json.loads(service.score(json.dumps(row).encode())))
        users, scores = folded(service, opened, [77])
        np.testing.assert_allclose(scores, [a["fraud_probability"] for a in answers], atol=1e-5)
        for name in users.now:
            np.testing.assert_allclose(users.now[name], service.engine.users.now[name], atol=1e-4, err_msg=name)
