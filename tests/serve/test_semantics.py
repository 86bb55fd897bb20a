"""The event semantics of the service against a slow reference.

`Reference` is written from the design, not from the service: it keeps what was said and nothing else, and works every
answer out from the beginning: contexts as sums over all that happened, probabilities by sequence.onnx over the user's
whole history. hypothesis and seeded random walks drive both with the same arrivals.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfraud.bulk import read_for_bundle, score_table
from seqfraud.bundle import Bundle
from seqfraud.config import DAY_MS
from seqfraud.errors import JournalError, RequestError
from seqfraud.runtime import SequenceGraph, initial_states
from seqfraud.sequences import encode
from seqfraud.vocabulary import UNSEEN
from serve.capture import Capture
from serve.load import load
from serve.service import Service
from serve.snapshot import Piece, read_newest, write_snapshot

MINUTE = 60_000
STEP = 20 * MINUTE
START = 1_600_000_000_000
WINDOW = 3
DELAY = 120 * MINUTE
HALF_LIVES = (60 * MINUTE, 720 * MINUTE)
HABIT = 360 * MINUTE
EVERYTHING_OF_USERS = 'user_inputs = ["count", "amount", "ratio", "fraud", "honest", "run"]'
COLUMNS = ("merchant", "device", "user")
"""The user is an entity here."""
TOLERANCE = 1e-5
CLOCK = START
RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Hundreds of short-lived journals need no disk."""


# ---- the reference


Effect = tuple[int, bool, tuple[float, float]]
"""A label: time of the transaction, fraud, its ratios."""


@dataclass
class Event:
    """One accepted transaction."""

    row: dict[str, Any]
    answer: dict[str, Any]
    context: list[float]
    ratios: tuple[float, float]
    """Of the amount, and of the mean amount of late, to the user's habit before, in whole 65536ths; 1 where unknown."""
    label: bool | None = None
    """In effect so far."""
    silence_is_over: bool = False

    @property
    def time(self) -> int:
        return self.row["time"]


@dataclass
class Said:
    """One label as it was said."""

    identity: str
    fraud: bool
    known_at: int
    done: bool = False


@dataclass
class Reference:
    """The service as the design describes it, without any state that could be carried wrongly."""

    bundle: Bundle
    graph: SequenceGraph
    events: list[Event] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    effects: dict[tuple[str, str], list[Effect]] = field(default_factory=dict)
    """Per entity the labels in force in the order in which they took effect."""

    def score(self, row: dict[str, Any]) -> dict[str, Any]:
        for event in self.events:
            if str(event.row["id"]) == str(row["id"]):
                if {**event.row, "id": ""} != {**row, "id": ""}:
                    return {"error": 409}
                return {**event.answer, "duplicate": True}
        self.let_labels_take_effect(row["time"])
        dropped, ring = self.history(row["user"])
        too_late = bool(dropped) and row["time"] < dropped[-1].time
        before = dropped if too_late else dropped + [e for e in ring if e.time <= row["time"]]
        ratios = self.habit(row, "user"), self.habit({**row, "amount": self.lately(row)}, "user")
        own, late = (1.0 if ratio == -1 else round(ratio * 65536) / 65536 for ratio in ratios)
        event = Event(row, {}, self.context(row), (own, late))
        mine = [e for e in self.events if e.row["user"] == row["user"]]
        probability = self.probability([*before, event])
        policy = self.bundle.manifest.policy
        event.answer = {
            "transaction_id": str(row["id"]),
            "fraud_probability": probability,
            "is_fraud": probability >= policy.thresholds.is_fraud,
            "decision": policy.decide(probability, row["amount"]),
            "reasons": [],
            "model": self.bundle.id,
            "history": sum(e.time <= row["time"] for e in mine),
            "late": any(e.time > row["time"] for e in mine),
            "duplicate": False,
        }
        self.events.append(event)
        return event.answer

    def history(self, user: str) -> tuple[list[Event], list[Event]]:
        """What the user's state stands on: events that left the ring, and the ring. At most 2 W; then W leave."""
        dropped: list[Event] = []
        ring: list[Event] = []
        for event in self.events:
            if event.row["user"] != user or (dropped and event.time < dropped[-1].time):
                continue
            ring.insert(sum(e.time <= event.time for e in ring), event)
            if len(ring) > 2 * WINDOW:
                dropped += ring[:WINDOW]
                del ring[:WINDOW]
        return dropped, ring

    def probability(self, events: list[Event]) -> float:
        """The last event's, by the sequence graph over all of them."""
        vocabulary = self.bundle.manifest.vocabularies[0].lookup()
        inputs = {
            "event_time": np.array([[e.time for e in events]]),
            "numeric": np.array([[[e.row["amount"]] for e in events]], dtype=np.float32),
            "categorical": np.array([[[vocabulary.get(str(e.row.get("kind")), UNSEEN)] for e in events]]),
            "context": np.array([[e.context for e in events]], dtype=np.float32),
            "length": np.array([len(events)]),
            **initial_states(self.graph.spec, 1),
        }
        return float(self.graph.run(inputs)["probability"][0, -1])

    def let_labels_take_effect(self, now: int) -> None:
        """Everything known at or before `now`, by when it is known, then by transaction; silence speaks last."""
        index = {str(e.row["id"]): i for i, e in enumerate(self.events)}
        due: list[tuple[int, int, int, int, int]] = []
        for i, event in enumerate(self.events):
            if not event.silence_is_over and event.time + DELAY <= now:
                due.append((event.time + DELAY, event.time, i, 1, -1))
        for n, said in enumerate(self.said):
            if not said.done and said.identity in index and said.known_at <= now:
                i = index[said.identity]
                due.append((said.known_at, self.events[i].time, i, 0, n))
        for _, _, i, _, n in sorted(due):
            event = self.events[i]
            if n < 0:
                event.silence_is_over = True
                fraud = event.label if event.label is not None else False
            else:
                self.said[n].done = True
                fraud = self.said[n].fraud
            if event.label == fraud:
                continue
            for column in COLUMNS:
                if event.row.get(column) is not None:
                    told = self.effects.setdefault((column, event.row[column]), [])
                    ratios = event.ratios
                    if event.label is not None:  # a correction: of those that are alike, the last is taken out
                        alike = [i for i, e in enumerate(told) if e[:2] == (event.time, event.label)]
                        ratios = told.pop(alike[-1])[2]
                    told.append((event.time, fraud, ratios))
            event.label = fraud

    def context(self, row: dict[str, Any]) -> list[float]:
        """The sums over everything that happened to each entity, its habit and its run of known frauds."""
        numbers: list[float] = []
        for column in COLUMNS:
            value, mine, now = self.of(row, column)
            weights: list[Callable[[Event], float]] = [
                lambda e: 1.0,
                lambda e: e.row["amount"],
                lambda e: float(e.label is True),
                lambda e: float(e.label is False),
            ]
            for kind, weight in enumerate(weights):
                if kind == 2:
                    numbers.append(self.habit(row, column))
                for half_life in HALF_LIVES:
                    numbers.append(sum(weight(e) * 2.0 ** ((e.time - now) / half_life) for e in mine))
            told = [] if value is None else self.effects.get((column, value), [])
            began, length, fraud_at, honest_at, least = self.run(told)
            ages = [-1.0 if t is None else (now - t) / DAY_MS for t in (began, fraud_at, honest_at)]
            numbers += [ages[0], length, *ages[1:], *least]
        return numbers

    def of(self, row: dict[str, Any], column: str) -> tuple[str | None, list[Event], int]:
        """The row's entity, its transactions before, and the time at which they are seen."""
        value = row.get(column)
        mine = [e for e in self.events if value is not None and e.row.get(column) == value]
        return value, mine, max([row["time"], *(e.time for e in mine)])

    def habit(self, row: dict[str, Any], column: str) -> float:
        """The row's amount over the mean amount of its entity; no amount here is 0 or less."""
        _, mine, now = self.of(row, column)
        weights = [2.0 ** ((e.time - now) / HABIT) for e in mine]
        total = sum(w * e.row["amount"] for w, e in zip(weights, mine, strict=True))
        return row["amount"] * sum(weights) / total if mine else -1.0

    def lately(self, row: dict[str, Any]) -> float:
        """The mean amount of the user by the shortest half-life, the row's counted."""
        _, mine, now = self.of(row, "user")
        weights = [2.0 ** ((e.time - now) / min(HALF_LIVES)) for e in mine]
        total = sum(w * e.row["amount"] for w, e in zip(weights, mine, strict=True))
        return (total + row["amount"]) / (sum(weights) + 1)

    def run(self, effects: list[Effect]) -> tuple[int | None, int, int | None, int | None, tuple[float, float]]:
        """When the run of known frauds began, its length, the newest known fraud, the newest known honest one, and the
        least ratios of the run."""
        began = fraud_at = honest_at = None
        length, least = 0, (-1.0, -1.0)
        for time, fraud, ratios in effects:
            if not fraud:
                honest_at = time if honest_at is None else max(honest_at, time)
                continue
            if began is None or (honest_at is not None and fraud_at is not None and honest_at > fraud_at):
                began, length, least = time, 1, ratios
            else:
                began, length = min(began, time), length + 1
                least = min(least[0], ratios[0]), min(least[1], ratios[1])
            fraud_at = time if fraud_at is None else max(fraud_at, time)
        return began, length, fraud_at, honest_at, least

    def hear(self, labels: list[dict[str, Any]]) -> dict[str, int]:
        counts = {"new": 0, "changed": 0, "unchanged": 0, "unknown": 0}
        for label in labels:
            identity = str(label["transaction_id"])
            before = [s.fraud for s in self.said if s.identity == identity][-1:]
            if before == [bool(label["is_fraud"])]:
                counts["unchanged"] += 1
                continue
            known = any(str(e.row["id"]) == identity for e in self.events)
            counts["unknown" if not known else "changed" if before else "new"] += 1
            known_at = CLOCK if label.get("known_at") is None else label["known_at"]
            self.said.append(Said(identity, bool(label["is_fraud"]), known_at))
        return counts


# ---- arrivals


@st.composite
def arrival(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """One thing that happens; times are in STEPs, relative to a clock that `advance` moves."""
    kind = draw(st.sampled_from(["new"] * 7 + ["label"] * 3 + ["again", "other content"]))
    pick = st.integers(0, 30)
    if kind == "new":
        return kind, {
            "user": draw(st.sampled_from(["ann", "ann", "bob"])),
            "advance": draw(st.sampled_from([0, 1, 1, 2, 7])),
            "back": draw(st.sampled_from([0, 0, 0, 0, 1, 2, 6, 15])),
            "amount": draw(st.sampled_from([1.0, 20.0, 300.0])),
            "kind": draw(st.sampled_from(["food", "fuel", "unheard of", None])),
            "merchant": draw(st.sampled_from(["m1", "m1", "m2", None])),
            "device": draw(st.sampled_from(["d1", "d2"])),
        }
    if kind == "label":
        return kind, {
            "pick": draw(pick),
            "is_fraud": draw(st.booleans()),
            "after": draw(st.sampled_from([-6, -1, 0, 1, 2, 6, 9])),
            "now": draw(st.sampled_from([False] * 5 + [True])),
        }
    return kind, {"pick": draw(pick)}


def requests(arrivals: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, Any]]:
    """Arrivals as requests: ("score", a transaction) or ("labels", one label). Ids are numbers of arrivals."""
    clock = 0
    rows: list[dict[str, Any]] = []
    out: list[tuple[str, Any]] = []
    for number, (kind, said) in enumerate(arrivals):
        if kind == "new":
            clock += said["advance"]
            row = {name: said[name] for name in ("user", "amount", "kind", "merchant", "device")}
            row |= {"id": number if number % 2 else str(number), "time": START + (clock - said["back"]) * STEP}
            rows.append(row)
            out.append(("score", row))
        elif kind == "label":
            # an id that may be there, may come later and may never come
            label = {"transaction_id": said["pick"], "is_fraud": said["is_fraud"]}
            if not said["now"]:
                label["known_at"] = START + (clock + said["after"]) * STEP
            out.append(("labels", label))
        elif rows:
            row = rows[said["pick"] % len(rows)]
            out.append(("score", row if kind == "again" else {**row, "amount": row["amount"] + 1}))
    return out


def walk(seed: int, length: int) -> list[tuple[str, Any]]:
    """A long random sequence of requests, without hypothesis: histories much longer than the ring."""
    rng = random.Random(seed)
    arrivals: list[tuple[str, dict[str, Any]]] = []
    told: list[int] = []
    for number in range(length):
        kind = rng.choices(["new", "label", "again", "other content"], [12, 5, 1, 1])[0]
        pick = max(0, number - rng.choice([-2, 0, 1, 2, 5, 20]))
        if kind == "label":  # often about one that was labelled before: corrections within the delay and after it
            pick = rng.choice(told[-9:]) if told and rng.random() < 0.5 else pick
            told.append(pick)
        arrivals.append((
            kind,
            {
                "user": rng.choice(["ann", "bob", "cid"]),
                "advance": rng.choice([0, 0, 1, 1, 2]),
                "back": rng.choices([0, 1, 2, 4, 9, 25], [20, 1, 1, 1, 1, 2])[0],
                "amount": rng.choice([1.0, 5.0, 20.0, 300.0]),
                "kind": rng.choice(["food", "fuel", "7", None]),
                "merchant": rng.choice(["m1", "m2", "m3", None]),
                "device": rng.choice(["d1", "d2"]),
                "pick": pick,
                "is_fraud": rng.random() < 0.6,
                "after": rng.choice([-3, 0, 0, 1, 2, 6, 9]),
                "now": rng.random() < 0.1,
            },
        ))  # fmt: skip
    return requests(arrivals)


@pytest.fixture(scope="module")
def cards(make_bundle: Callable[..., Bundle], cards_toml: str) -> Bundle:
    """CARDS, with the user as one more entity."""
    here = cards_toml.replace('"device"]', f'"device", "user"]\nhabit_half_life = "6h"\n{EVERYTHING_OF_USERS}')
    bundle = make_bundle(here)
    assert bundle.manifest.context.columns == COLUMNS
    assert bundle.manifest.context.user == 2
    return bundle


@pytest.fixture(scope="module")
def graph(cards: Bundle) -> SequenceGraph:
    return SequenceGraph(cards.sequence, cards.manifest.graph)


@contextmanager
def opened(bundle: Bundle, state: str | Path) -> Iterator[Service]:
    with Service(bundle, Path(state), clock=lambda: CLOCK) as service:
        yield service


def ask(service: Service, kind: str, content: Any) -> dict[str, Any]:
    """What the service answers, as the reference spells it."""
    try:
        if kind == "labels":
            return json.loads(service.add_labels(json.dumps([content]).encode()))
        return json.loads(service.score(json.dumps(content).encode()))
    except RequestError as error:
        return {"error": error.status}


def compare(service: Service, reference: Reference, kind: str, content: Any) -> None:
    """The same request to both; answers, and the context that was recorded, must agree."""
    got = ask(service, kind, content)
    wanted = reference.hear([content]) if kind == "labels" else reference.score(content)
    if "fraud_probability" not in wanted:
        assert got == wanted
        return
    assert got["fraud_probability"] == pytest.approx(wanted["fraud_probability"], abs=TOLERANCE)
    p, policy = got["fraud_probability"], reference.bundle.manifest.policy
    assert got == {
        **wanted,
        "fraud_probability": p,
        "is_fraud": p >= policy.thresholds.is_fraud,
        "decision": policy.decide(p, content["amount"]),
        "reasons": got["reasons"],  # see test_reasons.py
    }
    event = next(e for e in reference.events if e.answer["transaction_id"] == got["transaction_id"])
    record = service.journal.transaction(got["transaction_id"])
    assert record is not None
    read = np.frombuffer(record.context, dtype=np.float32)
    np.testing.assert_allclose(read, np.array(event.context), rtol=1e-6, atol=1e-9)


# ---- one by one


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@relaxed
@given(st.lists(arrival(), min_size=1, max_size=30))
def test_every_answer_is_what_the_design_says(cards, graph, arrivals):
    reference = Reference(cards, graph)
    with tempfile.TemporaryDirectory(dir=RAM) as state, opened(cards, state) as service:
        for kind, content in requests(arrivals):
            compare(service, reference, kind, content)


@pytest.mark.parametrize("seed", range(3))
def test_long_histories_answer_what_the_design_says(cards, graph, tmp_path, seed):
    reference = Reference(cards, graph)
    with opened(cards, tmp_path) as service:
        for kind, content in walk(seed, 400):
            compare(service, reference, kind, content)
    answers = [e.answer for e in reference.events]
    assert {a["late"] for a in answers} == {True, False}
    assert np.std([a["fraud_probability"] for a in answers]) > 0.1, "constant answers would prove nothing"
    dropped, ring = reference.history("ann")
    assert len(dropped) > 2 * WINDOW
    assert sum(e.row["user"] == "ann" for e in reference.events) > len(dropped) + len(ring), "some came too late"
    assert any(s.done for s in reference.said)
    assert {e.label for e in reference.events} >= {True, False}


def test_the_reference_can_tell_a_lost_label_a_lost_event_and_a_wrong_order(cards, graph):
    """Each of the things that the comparison is to find moves a probability by far more than the tolerance."""

    def last(rows: list[dict[str, Any]], labels: list[dict[str, Any]] = ()) -> float:  # type: ignore[assignment]
        reference = Reference(cards, graph)
        for row in rows[:-1]:
            reference.score(row)
        reference.hear(list(labels))
        return reference.score(rows[-1])["fraud_probability"]

    rows = [
        {"id": n, "user": "ann", "time": START + n * STEP, "amount": 10.0 * 3**n, "kind": "food", "merchant": "m1",
         "device": "d1"} for n in range(5)
    ]  # fmt: skip
    whole = last(rows)
    label = {"transaction_id": 1, "is_fraud": True, "known_at": rows[-1]["time"]}
    assert abs(last(rows, [label]) - whole) > 20 * TOLERANCE
    assert last(rows, [{**label, "known_at": label["known_at"] + 1}]) == whole
    assert abs(last([rows[0], *rows[2:]]) - whole) > 20 * TOLERANCE
    swapped = [rows[0], {**rows[1], "time": rows[2]["time"]}, {**rows[2], "time": rows[1]["time"]}, *rows[3:]]
    assert abs(last(swapped) - whole) > 20 * TOLERANCE


# ---- restarts


@relaxed
@given(st.lists(arrival(), min_size=2, max_size=30), st.data())
def test_a_restart_changes_nothing(cards, graph, memory_of, crash, arrivals, data):
    """From the snapshot, from an older snapshot and the records after it, and from the journal alone."""
    asked = requests(arrivals)
    stops = sorted(data.draw(st.lists(st.integers(0, len(asked)), min_size=2, max_size=2)))
    reference = Reference(cards, graph)
    with tempfile.TemporaryDirectory(dir=RAM) as folder:
        state = Path(folder)
        service = Service(cards, state, clock=lambda: CLOCK)
        for number, (kind, content) in enumerate([*asked, ("end", None)]):
            if number == stops[0]:
                service.snapshot()
            if number == stops[1]:
                before = memory_of(service)
                crash(service)
                with opened(cards, state) as again:
                    assert memory_of(again) == before, "older snapshot and journal"
                assert len(list(state.glob("snapshot-*.bin"))) >= 1
                with opened(cards, state) as again:
                    assert memory_of(again) == before, "snapshot"
                for file in state.glob("snapshot-*.bin"):
                    file.unlink()
                service = Service(cards, state, clock=lambda: CLOCK)
                assert memory_of(service) == before, "journal alone"
            if kind != "end":
                compare(service, reference, kind, content)
        service.close()


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for size, count in (("SLOTS", 1), ("ROWS", 2), ("EFFECTS", 3)):
            patched.setattr(f"serve.capture.{size}", count)
        yield


def no_pause(seconds: float) -> None:
    pass


def fails(*_: Any) -> None:
    raise JournalError("disk I/O error")


@relaxed
@given(st.lists(arrival(), min_size=5, max_size=60), st.data())
def test_a_snapshot_is_of_one_moment_whatever_happens_while_it_is_taken(cards, small_pieces, memory_of, arrivals, data):
    """Users, entities and labels that come, change and are taken back between its pieces."""
    asked = requests(arrivals)
    begin = data.draw(st.integers(0, len(asked) - 1))
    with (
        tempfile.TemporaryDirectory(dir=RAM) as a,
        tempfile.TemporaryDirectory(dir=RAM) as b,
        opened(cards, a) as service,
        opened(cards, b) as again,
    ):
        for kind, content in asked[:begin]:
            ask(service, kind, content)
        before, seq = memory_of(service), service.journal.last_seq
        capture = Capture(
            service._lock,
            service.engine.users,
            service.engine.context,
            service.engine.labels,
            service.engine.memory.early,
            no_pause,
        )
        coming = capture.pieces()
        pieces: list[Piece] = []
        for kind, content in asked[begin:]:
            pieces += islice(coming, data.draw(st.integers(0, 3)))
            with pytest.MonkeyPatch.context() as patched:
                if data.draw(st.sampled_from([False, False, True])):
                    patched.setattr(service.journal, "append_transaction", fails)
                ask(service, kind, content)
        pieces += coming
        capture.end()
        write_snapshot(Path(b), cards.id, seq, pieces)
        assert read_newest(Path(b), cards.id, seq, again.engine.remember) == seq
        assert {**memory_of(again), "last_seq": seq} == before
        memory_of(service)  # which sees that it is in order, too


# ---- batches


@relaxed
@given(st.lists(arrival(), min_size=1, max_size=30), st.data())
def test_a_batch_is_what_its_items_one_by_one_would_be(cards, memory_of, arrivals, data):
    asked = requests(arrivals)
    groups: list[list[tuple[str, Any]]] = []
    for request in asked:
        joins = request[0] == "score" and groups and groups[-1][0][0] == "score" and data.draw(st.booleans())
        if joins:
            groups[-1].append(request)
        else:
            groups.append([request])
    with (
        tempfile.TemporaryDirectory(dir=RAM) as a,
        tempfile.TemporaryDirectory(dir=RAM) as b,
        opened(cards, a) as single,
        opened(cards, b) as batched,
    ):
        for group in groups:
            wanted = [ask(single, kind, content) for kind, content in group]
            if group[0][0] == "labels":
                got = [ask(batched, *group[0])]
            else:
                body = json.dumps([content for _, content in group]).encode()
                got = json.loads(batched.score_batch(body))["results"]
                for item in got:
                    if "error" in item:
                        assert item["error"]["code"] == "conflict"
                        item["error"] = 409
            assert got == wanted
        assert memory_of(batched) == memory_of(single)


def test_items_of_one_batch_see_each_other(service):
    """Same user and same merchant twice in one batch: the second has the first in its history and its context."""
    row = {"id": 1, "user": "ann", "time": START, "amount": 5, "merchant": "m1", "device": "d1"}
    body = json.dumps([row, {**row, "id": 2}, {**row, "id": 1}]).encode()
    first, second, again = json.loads(service.score_batch(body))["results"]
    assert (first["history"], second["history"]) == (0, 1)
    context = np.frombuffer(service.journal.transaction("2").context, dtype=np.float32)
    assert context[0] == 1.0
    assert context[2] == 5.0
    assert again == {**first, "duplicate": True}


# ---- order within the window


@relaxed
@given(st.data())
def test_without_context_the_order_within_the_window_does_not_matter(plain, data):
    window = plain.manifest.serve.window
    count = data.draw(st.integers(1, 3 * window))
    # nobody is displaced by more than the window that the ring has at least
    jitter = data.draw(st.lists(st.integers(0, window - 1), min_size=count, max_size=count))
    order = sorted(range(count), key=lambda i: (i + jitter[i], -i))
    rows = [
        {
            "user": "ann",
            "time": 1_600_000_000 + 700 * i + (i % 3) * 100_000 * (i > 4),
            "amount": float(2**i),
            "kind": "7",
        }
        for i in range(count)
    ]
    rows.sort(key=lambda row: row["time"])
    last = {**rows[-1], "time": rows[-1]["time"] + 50, "amount": 3.0}
    states, answers = [], []
    for arrived in (range(count), order):
        with tempfile.TemporaryDirectory(dir=RAM) as state, opened(plain, state) as service:
            for i in arrived:
                ask(service, "score", rows[i])
            states.append({name: array.copy() for name, array in service.engine.users.arrays.items()})
            answers.append(ask(service, "score", last))
    in_order, shuffled = states
    held = int(in_order["held"][0])
    for name, array in in_order.items():
        if name in ("integers", "values"):
            assert (array[0, :held] == shuffled[name][0, :held]).all()
        elif not name.startswith("middle.") or held >= window:
            np.testing.assert_allclose(array[0], shuffled[name][0], atol=1e-5)
    assert answers[0]["fraud_probability"] == pytest.approx(answers[1]["fraud_probability"], abs=TOLERANCE)
    assert answers[0]["history"] == answers[1]["history"] == count


# ---- the same as offline


SIMULATED = """
[data]
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
label_delay = "1d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id", "device_id", "user_id"]
user_inputs = ["count", "amount", "ratio", "fraud", "honest", "run"]
ip = ["ip"]
geo = [["lat", "long"]]
half_lives = ["1h", "1d", "7d"]
[serve]
window = 5
[model]
hidden = 8
input_width = 8
head_width = 8
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A small file with much fraud at few merchants, and a column that says when each label was known."""
    from training.simulate import Simulation, simulate

    table = simulate(Simulation(users=12, days=25, seed=3, fraud_share=0.15, merchants_per_user=1.0))
    rng = np.random.default_rng(0)
    time = np.asarray(table["time"].cast(pa.int64())) // (1000 if str(table["time"].type.unit) == "us" else 1)
    hours = rng.choice([0, 1, 24, 30, 72], len(table))  # before, at and after the label delay: corrections too
    known = pa.array(time + hours * 3_600_000).cast(pa.timestamp("ms", table["time"].type.tz))
    file = tmp_path_factory.mktemp("simulated") / "transactions.parquet"
    parquet.write_table(table.append_column("known_at", known), file)
    return file


@pytest.mark.parametrize("known_at", [False, True], ids=["label delay", "label_known_at"])
def test_a_file_loaded_in_order_scores_as_in_bulk(make_bundle, simulated, tmp_path, known_at):
    toml = SIMULATED.replace('label_delay = "1d"', 'label_delay = "1d"\nlabel_known_at = "known_at"')
    bundle = make_bundle(toml if known_at else SIMULATED)
    table = read_for_bundle(bundle, simulated)
    assert len(table) > 250
    wanted = score_table(bundle, table, threads=1)
    encoded = encode(table, bundle.manifest.vocabularies, bundle.manifest.context)
    context = np.empty_like(encoded.context)
    context[encoded.arrival] = encoded.context
    with opened(bundle, tmp_path) as service:
        done = load(service, table)
        assert (done.transactions, done.duplicates) == (len(table), 0)
        records = [service.journal.transaction(identity) for identity in table.id_texts()]
    got = np.array([json.loads(record.answer)["fraud_probability"] for record in records])
    read = np.array([np.frombuffer(record.context, dtype=np.float32) for record in records])
    np.testing.assert_allclose(read, context, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
    assert np.std(wanted) > 0.05
    without = score_table(bundle, type(table)(**{**vars(table), "label": None, "known_at": None}), threads=1)
    assert np.abs(without - wanted).max() > 0.01, "labels must matter, or this test could not see them"
