"""Whether the reasons of a trained model are true: on frauds whose kind is known, and against raw rows made usual.

The simulator says of each fraud what it is. Nothing of that reaches the model, nor is any of it used by the reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet
import pytest

from export.bundle import export_run
from seqfraud.bulk import read_for_bundle, score_encoded
from seqfraud.bundle import Bundle
from seqfraud.config import parse_instant
from seqfraud.graph import NEXT
from seqfraud.nn.checkpoint import load_run
from seqfraud.runtime import SequenceGraph, StepGraph, initial_states, unpacked
from seqfraud.sequences import Encoded, encode
from seqfraud.table import Transactions
from serve.answers import Reason
from serve.reasons import Explainer, Situation
from serve.users import Past
from training.run import train_run
from training.simulate import Simulation, simulate_to

TRAIN_END = "2025-04-01"
CONFIG = f"""
[data]
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
label_delay = "7d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id", "device_id", "user_id"]
geo = [["lat", "long"]]
half_lives = ["1d", "30d"]
[split]
train_start = "2025-01-15"
validation = "10d"
train_end = "{TRAIN_END}"
[model]
hidden = 24
input_width = 32
head_width = 32
[training]
epochs = 5
users_per_batch = 16
[serve]
window = 16
"""
MATCHING = {
    "large_amount": {"amount_above_habit"},
    "impossible_hop": {"impossible_speed"},
    "merchant_compromise": {"known_fraud:merchant_id"},
}
RING = 24


@dataclass(frozen=True)
class World:
    """A trained bundle, the rows that it never saw, and what is fraud among them."""

    bundle: Bundle
    graph: SequenceGraph
    explainer: Explainer
    table: Transactions
    encoded: Encoded
    probability: npt.NDArray[np.float64]
    """By encoded row."""
    kind: npt.NDArray[Any]
    later: npt.NDArray[np.bool_]
    """After the training."""

    def situation(self, row: int) -> Situation:
        """An encoded row at its place, as the service would have it."""
        spec, user = self.bundle.manifest.graph, int(np.searchsorted(self.encoded.end, row, side="right"))
        integers, values = columns(self.encoded, slice(int(self.encoded.begin[user]), row + 1))
        first = max(len(integers) - 1 - RING, 0)
        states = initial_states(spec, 1)
        if first:
            inputs = unpacked(spec, integers[None, :first], values[None, :first])
            outputs = self.graph.run({**inputs, "length": np.array([first]), **states})
            states = {s.name: outputs[s.name + NEXT] for s in spec.states}
        past = Past(
            integers[first:-1], values[first:-1], ((0, {s.name: s.to_rows(states[s.name]) for s in spec.states}),)
        )
        amount = float(values[-1, 0])
        return Situation(integers[-1], values[-1], amount, self.explainer.states_before(past), past)

    def reasons(self, row: int) -> list[Reason]:
        return self.explainer.reasons(self.situation(row))

    def log_odds(self, encoded: Encoded, row: int) -> float:
        """Of an encoded row, by the sequence graph over all of its user's history."""
        spec, user = self.bundle.manifest.graph, int(np.searchsorted(encoded.end, row, side="right"))
        integers, values = columns(encoded, slice(int(encoded.begin[user]), row + 1))
        inputs = {**unpacked(spec, integers[None], values[None]), "length": np.array([len(integers)])}
        logit = float(self.graph.run({**inputs, **initial_states(spec, 1)})["logit"][0, -1])
        calibration = self.bundle.manifest.calibration
        return float(calibration["scale"]) * logit + float(calibration["shift"])


def columns(encoded: Encoded, rows: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    integers = np.column_stack([encoded.time[rows], encoded.categorical[rows]]).astype(np.int64)
    return integers, np.concatenate([encoded.numeric[rows], encoded.context[rows]], axis=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("trained")
    data, config = folder / "transactions.parquet", folder / "config.toml"
    simulate_to(Simulation(users=500, seed=3), data)
    config.write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.write_run_report", lambda *_: None)  # nobody reads it
        train_run(config, data, folder / "run", "cpu")
    bundle = export_run(load_run(folder / "run"), folder / "bundle")
    manifest = bundle.manifest
    table = read_for_bundle(bundle, data)
    encoded = encode(table, manifest.vocabularies, manifest.context)
    graph = SequenceGraph(bundle.sequence, manifest.graph)
    explainer = Explainer(manifest, StepGraph(bundle.step, manifest.graph), graph)
    kinds = np.array(parquet.read_table(data)["fraud_kind"].to_pylist(), dtype=object)
    return World(
        bundle,
        graph,
        explainer,
        table,
        encoded,
        score_encoded(graph, encoded).astype(np.float64),
        kinds[table.file_row[encoded.arrival]],
        encoded.time >= parse_instant(TRAIN_END),
    )


@pytest.fixture(scope="module")
def alerts(world: World) -> list[int]:
    """The 2 % of later rows with the highest scores."""
    rows = np.flatnonzero(world.later)
    return rows[np.argsort(-world.probability[rows], kind="stable")[: len(rows) // 50]].tolist()


@pytest.fixture(scope="module")
def top(world: World, alerts: list[int]) -> dict[int, str]:
    """By alert the first reason's code."""
    found = {row: world.reasons(row) for row in alerts}
    return {row: reasons[0].code if reasons else "" for row, reasons in found.items()}


def test_nearly_every_alert_has_a_reason(top: dict[int, str]) -> None:
    assert np.mean([bool(code) for code in top.values()]) > 0.95


def test_a_fraud_of_a_known_kind_has_the_matching_reason_first(world: World, top: dict[int, str]) -> None:
    """Several times as often as the other frauds have."""
    frauds = [row for row in top if world.kind[row]]
    for kind, codes in MATCHING.items():
        here = [top[row] in codes for row in frauds if world.kind[row] == kind]
        others = [top[row] in codes for row in frauds if world.kind[row] != kind]
        assert len(here) >= 3, kind
        assert np.mean(here) >= 0.6, kind
        assert np.mean(here) > 2.5 * np.mean(others), kind


def test_what_comes_after_a_test_payment_is_told_from_what_does_not(world: World) -> None:
    """Whether a small model has learned it or not: the condition holds for the frauds of that kind, and seldom else."""

    def holds(rows: npt.NDArray[np.int64]) -> float:
        found = [{change.code for change in world.explainer._changes(world.situation(row))} for row in rows.tolist()]
        return float(np.mean([bool(codes & {"minutes_after_test_payment", "rapid_succession"}) for codes in found]))

    bursts = np.flatnonzero(world.kind == "test_burst")
    honest = np.random.default_rng(0).permutation(np.flatnonzero(world.kind == ""))[:200]
    assert len(bursts) >= 50
    assert holds(bursts) > 0.8
    assert holds(honest) < 0.2


Usual = Callable[[Situation, Transactions, int], Transactions]


def with_usual_amount(situation: Situation, table: Transactions, at: int) -> Transactions:
    numbers = table.numbers.copy()
    past = np.sort(situation.past.values[:, 0])
    numbers[at, table.schema.numbers.index("amount")] = past[len(past) // 2]
    return replace(table, numbers=numbers)


def with_usual_category(situation: Situation, table: Transactions, at: int) -> Transactions:
    column = table.schema.texts.index("category")
    texts = list(table.texts)
    ours = texts[column].codes[table.user.codes == table.user.codes[at]]
    codes = texts[column].codes.copy()
    codes[at] = np.bincount(ours).argmax()
    texts[column] = replace(texts[column], codes=codes)
    return replace(table, texts=tuple(texts))


def at_the_last_place(situation: Situation, table: Transactions, at: int) -> Transactions:
    numbers = table.numbers.copy()
    places = [table.schema.numbers.index(name) for name in ("lat", "long")]
    numbers[at, places] = situation.past.values[-1, [1, 2]]
    return replace(table, numbers=numbers)


THINGS: dict[str, Usual] = {
    "amount_above_habit": with_usual_amount,
    "impossible_speed": at_the_last_place,
    "far_from_last_place": at_the_last_place,
    "new_category:category": with_usual_category,
}


def test_removing_the_named_thing_lowers_the_score_more_than_removing_another(
    world: World, top: dict[int, str]
) -> None:
    """By raw rows: the file with one amount, place or category made usual, encoded and scored from the beginning."""
    compared, more = 0, 0
    for row in [row for row, code in top.items() if code in THINGS][:8]:
        situation, at = world.situation(row), int(world.encoded.arrival[row])
        falls = {}
        for thing in set(THINGS.values()):
            changed = encode(
                thing(situation, world.table, at), world.bundle.manifest.vocabularies, world.bundle.manifest.context
            )
            assert np.array_equal(changed.arrival, world.encoded.arrival)
            falls[thing] = world.log_odds(world.encoded, row) - world.log_odds(changed, row)
        named = falls.pop(THINGS[top[row]])
        assert named > 0
        compared += len(falls)
        more += sum(named > other for other in falls.values())
    assert compared == 16
    assert more >= 15


def test_an_ordinary_transaction_with_one_thing_made_strange_has_that_reason_first(world: World) -> None:
    """A hundred times the usual amount, a place that cannot be reached: of honest rows that nobody suspects."""
    honest = np.flatnonzero(world.later & (world.kind == "") & (world.probability < np.median(world.probability)))
    rows = np.random.default_rng(0).permutation(honest)[:40].tolist()
    situations = [s for s in map(world.situation, rows) if len(s.past.integers) == RING]
    assert len(situations) >= 20
    spec, context = world.bundle.manifest.graph, world.bundle.manifest.context
    ratios = [spec.numeric + k for k, name in enumerate(context.names()) if name.endswith("amount_ratio")]
    amounts, hops = [], []
    for situation in situations:
        values, usual = situation.values.copy(), np.sort(situation.past.values[:, 0])[RING // 2]
        values[ratios] = np.where(values[ratios] > 0, values[ratios] * 100 * usual / values[0], values[ratios])
        values[0] = 100 * usual
        amounts.append(world.explainer.reasons(replace(situation, values=values, amount=float(values[0]))))
        values, integers = situation.values.copy(), situation.integers.copy()
        values[1] = -values[1]
        integers[0] = situation.past.integers[-1, 0] + 20 * 60_000
        hops.append(world.explainer.reasons(replace(situation, values=values, integers=integers)))
    assert np.mean([bool(found) and found[0].code == "amount_above_habit" for found in amounts]) > 0.9
    assert np.mean([bool(found) and found[0].code == "impossible_speed" for found in hops]) > 0.8
