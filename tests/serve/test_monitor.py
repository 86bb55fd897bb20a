"""The monitor over journals that the real service wrote: what it says, and when it says that nothing can be said."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from seqfraud.bundle import Bundle, open_bundle, write_manifest
from seqfraud.cli import main
from seqfraud.config import DAY_MS, HOUR_MS, format_instant
from seqfraud.drift import LEAST_ROWS
from seqfraud.fingerprint import KEY, drift_reference
from seqfraud.watched import KEY as WATCHED
from seqfraud.watched import Between, Watched, measure_watched
from serve.metrics import foreign_text
from serve.monitor import ModelReport, _alerts, examine, quiet_for
from serve.monitor_page import page
from serve.monitor_quality import below
from serve.monitor_report import Report, look
from serve.monitor_rows import read_rows, rows_of
from serve.replay import Client
from serve.service import Service
from serve.verdicts import Labels, Rows, Span

START = 1_600_000_000_000 // DAY_MS * DAY_MS
DAYS = 16
END = START + DAYS * DAY_MS
DELAY = 2 * HOUR_MS
"""Of CARDS."""
USERS, ROWS = 60, 1600


def traffic(
    seed: int, times: float = 1.0, kinds: tuple[str, ...] = ("food", "fuel", "grocery"), days: int = DAYS
) -> Iterator[dict[str, Any]]:
    """Transactions in time order, spread evenly over the days."""
    rng = np.random.default_rng(seed)
    for i in range(ROWS * days // DAYS):
        yield {
            "id": f"{seed}-{i}", "user": f"u{rng.integers(USERS)}", "time": START + i * (DAYS * DAY_MS // ROWS),
            "amount": round(float(rng.lognormal(3, 1)) * times, 2), "kind": str(rng.choice(kinds)),
            "merchant": f"m{rng.integers(12)}", "device": f"d{rng.integers(30)}",
        }  # fmt: skip


def fill(
    bundle: Bundle, state: Path, rows: Iterator[dict[str, Any]], fraud: Callable[[int, float], bool] | None = None
) -> None:
    """Post rows; `fraud(i, probability)` says which are labelled so, an hour after their time."""
    with Service(bundle, state, clock=lambda: START) as service:
        for i, row in enumerate(rows):
            answer = json.loads(service.score(json.dumps(row).encode()))
            if fraud is not None and fraud(i, answer["fraud_probability"]):
                label = {"transaction_id": row["id"], "is_fraud": True, "known_at": row["time"] + HOUR_MS}
                service.add_labels(json.dumps([label]).encode())


def likely(i: int, probability: float) -> bool:
    """Frauds as often as the probability says."""
    return bool(np.random.default_rng(i).random() < probability)


@pytest.fixture(scope="module")
def known(cards: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """CARDS with the fingerprint and the figures of some quiet traffic of its own."""
    folder = tmp_path_factory.mktemp("known")
    fill(cards, folder / "state", traffic(0), likely)
    rows = rows_of(read_rows(folder / "state", [cards], Span(END, 30 * DAY_MS, 30 * DAY_MS)), cards, [cards.id])
    m = cards.manifest
    drift = drift_reference(
        m.schema, m.context, m.vocabularies, rows.columns, rows.probability, START, END - 8 * DAY_MS, END
    )
    fraud = rows.label == 1
    alerted = m.policy.decide_many(rows.probability, rows.amount) > 0
    quality = measure_watched(
        fraud, rows.probability, rows.columns.time // DAY_MS, rows.columns.user, rows.amount, 0.05
    )
    share = float(alerted.mean())
    watched = {
        "alerts": {"share": share, "low": share * 0.9, "high": share * 1.1, "rows": len(rows)},
        **quality.as_dict(),
    }
    shutil.copytree(cards.path, folder / "bundle")
    write_manifest(folder / "bundle", dataclasses.replace(m, fingerprint={KEY: drift}, metrics={WATCHED: watched}))
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def quiet_state(known: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled traffic like that of the fingerprint."""
    state = tmp_path_factory.mktemp("quiet") / "state"
    fill(known, state, traffic(1), likely)
    return state


def seen(state: Path, bundle: Bundle, now: int = END, window: int = 7 * DAY_MS) -> Report:
    return look(state, [bundle], Span(now, window, 28 * DAY_MS))


def levels(report: Report) -> dict[str, str]:
    return {topic.name: topic.level for topic in report.models[0].topics}


class Nested(HTMLParser):
    """Refuses a page whose elements do not close in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open, self.getpos())


# ---- whole runs


def test_quiet_traffic_is_fine_and_everything_is_written(known, quiet_state, tmp_path: Path, capsys):
    out = tmp_path / "out"
    args = ["--state", str(quiet_state), "--bundle", str(known.path), "--out", str(out), "--until", "newest", "--json"]
    assert main(["monitor", *args]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["level"] in ("ok", "watch") and printed["model_in_service"] == known.id
    (model,) = printed["models"]
    found = {topic["name"]: topic["level"] for topic in model["topics"]}
    assert set(found.values()) <= {"ok", "watch"}, model["topics"]
    assert set(found) == {
        "traffic",
        "inputs",
        "values",
        "scores",
        "alerts",
        "labels",
        "quality",
        "calibration",
        "estimate",
    }
    assert model["quality"]["rows"] > 1000 and model["quality"]["frauds"] > 100
    html = (out / "report.html").read_text()
    assert known.id in html and "<script" not in html and "http" not in html
    Nested().feed(html)
    # what a service shows of it
    text = foreign_text(quiet_state / "monitor.prom", set())
    assert f'seqfraud_monitor_level{{model="{known.id}",role="in service",topic="inputs"}} 0' in text
    assert len(text.splitlines()) == len((quiet_state / "monitor.prom").read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "topic", "word"),
    [({"times": 6.0}, "inputs", "amount"), ({"kinds": ("food", "xyzzy", "plugh")}, "values", "kind unseen"),
     ({"kinds": ("food",)}, "inputs", "kind")],
)  # fmt: skip
def test_a_change_is_an_alarm_that_names_it(known, tmp_path: Path, change, topic, word):
    fill(known, tmp_path, traffic(2, **change), likely)
    report = seen(tmp_path, known)
    assert report.level == "alarm" and report.code == 3
    assert levels(report)[topic] == "alarm"
    assert word in next(t.words for t in report.models[0].topics if t.name == topic)


def test_the_same_change_in_few_transactions_is_none(known, tmp_path: Path):
    fill(known, tmp_path, traffic(2, times=6.0, days=1))
    report = seen(tmp_path, known, START + DAY_MS)
    assert len(list(traffic(2, days=1))) < LEAST_ROWS
    assert levels(report)["inputs"] == levels(report)["scores"] == "unknown"
    assert report.level == "unknown" and report.code == 4


def test_what_cannot_be_said_is_unknown(known, cards, quiet_state, tmp_path: Path, capsys):
    with Service(known, tmp_path / "empty", clock=lambda: START):
        pass
    assert levels(seen(tmp_path / "empty", known))["traffic"] == "unknown"
    assert seen(tmp_path / "empty", known).code == 4
    # data stop
    stopped = seen(quiet_state, known, END + 2 * DAY_MS)
    assert levels(stopped)["traffic"] == "unknown" and stopped.code == 4
    assert "nothing has come for 2 d" in stopped.models[0].topics[0].words
    # a bundle from before, and one that scored nothing here
    old = seen(quiet_state, cards)
    assert "not in this bundle's fingerprint" in next(t.words for t in old.models[0].topics if t.name == "inputs")
    assert [t.name for t in old.topics] == ["model"] and known.id in old.topics[0].words and old.code == 4
    # no journal at all is bad input
    assert main(["monitor", "--state", str(tmp_path / "nowhere"), "--bundle", str(known.path)]) == 2
    assert "there is no journal here" in capsys.readouterr().err
    assert main(["monitor", "--state", str(quiet_state)]) == 2
    assert main(["monitor", "--state", str(quiet_state), "--bundle", str(known.path), "--window", "soon"]) == 2
    assert "--window" in capsys.readouterr().err


def test_labels_that_do_not_come_are_not_taken_for_honest_customers(known, tmp_path: Path):
    fill(known, tmp_path, traffic(3))
    report = seen(tmp_path, known)
    assert levels(report)["labels"] == levels(report)["quality"] == "unknown"
    assert report.models[0].quality is None and report.code != 0


def test_frauds_that_the_scores_do_not_see_are_an_alarm(known, tmp_path: Path):
    fill(known, tmp_path, traffic(4), lambda i, probability: probability < 0.5 and i % 3 == 0)
    report = seen(tmp_path, known)
    assert levels(report)["quality"] == levels(report)["calibration"] == "alarm"
    assert report.code == 3
    # the estimate before labels cannot see it, and does not claim to
    assert levels(report)["estimate"] == "unknown"


def test_a_torn_end_is_left_out(known, quiet_state, tmp_path: Path):
    whole = seen(quiet_state, known)
    shutil.copytree(quiet_state, tmp_path / "torn")
    last = sorted((tmp_path / "torn" / "journal").glob("*.log"))[-1]
    with last.open("ab") as file:
        file.write(last.read_bytes()[-300:-40])
    torn = seen(tmp_path / "torn", known)
    assert [m.topics for m in torn.models] == [m.topics for m in whole.models]


def test_it_runs_beside_a_service_and_its_figures_are_shown_there(known, run_service, tmp_path: Path):
    words = ["--bundle", known.path, "--state", tmp_path / "state", "--port", "0"]
    running = run_service([sys.executable, "-m", "serve", *map(str, words)]).started()
    client = Client(running.url, None)
    for row in traffic(5, days=4):
        assert client.call("POST", "/v1/score", row)[0] == 200
    args = ["--state", str(tmp_path / "state"), "--bundle", str(known.path), "--until", "newest"]
    done = subprocess.run(
        [sys.executable, "-m", "seqfraud.cli", "monitor", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    plain = json.loads((tmp_path / "state" / "monitor" / "report.json").read_text())
    assert done.returncode == plain["exit_code"] and not done.stderr
    assert plain["models"][0]["labels"]["matured"] > 300
    assert "traffic      ok" in done.stdout
    assert client.call("POST", "/v1/score", next(traffic(6)))[0] == 200
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=30) as answer:
        shown = answer.read().decode()
    assert f'seqfraud_monitor_psi{{model="{known.id}",input="amount"}}' in shown
    # again and again, until it is stopped
    figures, words = tmp_path / "state" / "monitor.prom", [sys.executable, "-m", "seqfraud.cli", "monitor", *args]
    looking = subprocess.Popen([*words, "--every", "1s"], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(2):
            before, deadline = figures.stat().st_mtime_ns, time.monotonic() + 120
            while figures.stat().st_mtime_ns == before:
                assert time.monotonic() < deadline and looking.poll() is None
                time.sleep(0.1)
        looking.terminate()
        assert looking.wait(60) == 0
    finally:
        looking.kill()
        looking.communicate()
    assert running.stop() == 0


# ---- challengers


def test_a_challenger_is_measured_on_the_rows_that_it_scored_in_shadow(
    known, cards, quiet_state, tmp_path, monkeypatch
):
    """It says the opposite of the model in service, on every second transaction, and is judged by that."""
    journal = read_rows(quiet_state, [known], Span(END, 7 * DAY_MS, 28 * DAY_MS)).table
    half = journal.take(list(range(0, len(journal), 2)))
    count = len(half)
    flipped = 1 - half["probability"].to_numpy()
    scores = pa.table(
        {
            "model": [cards.id] * count, "seq": half["seq"], "id": half["id"], "probability": flipped,
            "is_fraud": flipped >= 0.6, "decision": ["decline" if p >= 0.8 else "approve" for p in flipped],
        }
    )  # fmt: skip
    monkeypatch.setattr("serve.monitor_report.read_shadow", lambda _: scores)
    report = look(quiet_state, [known, cards], Span(END, 7 * DAY_MS, 28 * DAY_MS))
    champion, challenger = report.models
    assert (champion.role, challenger.role) == ("in service", "shadow")
    assert challenger.labels.matured == pytest.approx(champion.labels.matured / 2, abs=1)
    found = report.agreement[cards.id]
    assert found.rows == count
    assert found.difference is not None and found.difference.high < -0.2
    assert found.mean_difference == pytest.approx(np.abs(2 * flipped - 1).mean())
    said = [a == b for a, b in zip(scores["decision"].to_pylist(), half["decision"].to_pylist(), strict=True)]
    assert found.same_decision == pytest.approx(np.mean(said))
    # what is wrong with a challenger is no alarm of the service
    assert {t.name: t.level for t in challenger.topics}["inputs"] == "unknown" and report.code == 0
    assert cards.id in page(report)


# ---- scores of a model that ages


# ---- labels and time


def small(rows: int, time: np.ndarray, label: list[int], **changes: Any) -> Rows:
    """Rows of `known`-like columns with nothing in them but what is given."""
    from seqfraud.fingerprint import Columns

    no = np.zeros(rows, dtype=bool)
    columns = Columns(
        time=time, user=np.arange(rows) % 50, numeric=np.full((rows, 1), 20.0), categorical=np.full((rows, 1), 2),
        context=np.zeros((rows, 28), dtype=np.float32), gap=np.full(rows, np.nan), absent={},
        entity=np.zeros((rows, 2), dtype=np.int32),
    )  # fmt: skip
    plain = {"own": ~no, "probability": np.full(rows, 0.1), "alerted": no, "declined": no, "control": no,
             "amount": np.full(rows, 20.0), "label": np.array(label, dtype=np.int8)}  # fmt: skip
    return Rows(columns, **{**plain, **changes})


def examined(known: Bundle, rows: Rows) -> ModelReport:
    width = known.manifest.context.width
    columns = dataclasses.replace(rows.columns, context=np.zeros((len(rows), width), dtype=np.float32))
    return examine(
        known.manifest, known.id, "in service", dataclasses.replace(rows, columns=columns), Span(END, DAY_MS, DAY_MS)
    )


def test_a_row_matures_when_its_delay_is_over_to_the_millisecond(known):
    time = np.array([END - DELAY - DAY_MS - 1, END - DELAY - DAY_MS, END - DELAY, END - DELAY + 1, END - 1, END])
    found = examined(known, small(6, time, [1, 0, -1, 1, 1, 1])).labels
    # the first is before the days that are looked at, the last not yet there; early frauds do not count
    assert found == Labels(matured=2, frauds=0, silent=1, unseen=0, control=0, waiting=2, expected=pytest.approx(0.2))


def test_of_the_declined_those_let_through_at_random_stand_for_all(known):
    rows = 1000
    rng = np.random.default_rng(0)
    declined = np.arange(rows) % 5 == 0
    control = declined & (np.arange(rows) % 50 == 0)
    fraud = np.where(declined, rng.random(rows) < 0.8, rng.random(rows) < 0.02)
    shown = fraud & (~declined | control)  # of the other declined ones nothing is ever heard
    probability = np.where(declined, 0.8, 0.02)
    time = END - DELAY - np.arange(rows) * 60_000
    made = small(
        rows, time, np.where(shown, 1, -1).tolist(), declined=declined, control=control, probability=probability
    )
    report = examined(known, made)
    assert (report.labels.unseen, report.labels.control) == (180, 20)
    assert report.quality is not None
    share = report.quality.figures["fraud_share"]
    assert share.estimate == pytest.approx(fraud.mean(), abs=0.04)
    large = report.quality.figures["calibration_in_the_large"]
    assert large.low < 0 < large.high
    without = dataclasses.replace(made, control=np.zeros(rows, dtype=bool))
    # where no control share is logged, declined ones are taken as they are, and seem honest
    assert examined(known, without).quality.figures["calibration_in_the_large"].high < -1


# ---- verdicts


@pytest.mark.parametrize(
    ("now", "then", "level"),
    [((0.5, 0.4, 0.6), (0.55, 0.5, 0.6), "ok"), ((0.48, 0.45, 0.51), (0.6, 0.55, 0.65), "watch"),
     ((0.3, 0.25, 0.35), (0.6, 0.55, 0.65), "alarm"), ((0.3, 0.0, 0.6), (0.6, 0.55, 0.65), "ok"),
     ((0.58, 0.579, 0.581), (0.6, 0.599, 0.601), "ok"), ((0.9, 0.8, 1.0), (0.6, 0.55, 0.65), "ok"),
     ((0.31, 0.25, 0.37), (0.5, 0.42, 0.58), "watch"), ((0.31, 0.25, 0.37), (0.5, 0.49, 0.51), "alarm"),
     ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), "alarm"), ((0.0, 0.0, 0.0), (0.1, 0.0, 0.3), "ok")],
)  # fmt: skip
def test_quality_is_below_only_where_it_is_clearly_so(now, then, level):
    assert below(Between(*now), Between(*then)) == level


def test_rows_of_a_journal_know_their_entities_and_those_of_one_network_are_together(rich, tmp_path: Path):
    addresses = ["10.1.2.3", "10.1.2.77", "10.1.3.3", None, "nowhere", "10.1.2.3"]
    schema = rich.manifest.schema
    with Service(rich, tmp_path / "state", clock=lambda: START) as service:
        for i, address in enumerate(addresses):
            row = {schema.transaction: f"t{i}", schema.user: "ann", schema.time: format_instant(START + i * HOUR_MS)}
            row |= dict.fromkeys(schema.numbers, 1.0) | {schema.ip[0]: address}
            row |= {column: f"{column} {i % 2}" for column in schema.context}
            service.score(json.dumps(row).encode())
    rows = rows_of(read_rows(tmp_path / "state", [rich], Span(END, END - START, DAY_MS)), rich, [rich.id])
    network = rows.columns.entity[:, len(schema.context)].tolist()
    assert network[0] == network[1] == network[5] != network[2]
    assert network[3] == network[4] == -1
    for i in range(len(schema.context)):
        even = rows.columns.entity[:, i]
        assert (even[::2] == even[0]).all() and (even[1::2] == even[1]).all() and even[0] != even[1]


def test_quiet_weeks_are_those_of_the_length_looked_at(known):
    reference = dataclasses.replace(next(iter(_inputs(known))), quiet={"1d": 0.3, "7d": 0.1})
    assert [quiet_for(reference, days * DAY_MS) for days in (1, 3, 7, 30)] == [0.3, 0.3, 0.1, 0.1]
    assert quiet_for(reference, HOUR_MS) == 0.3


def _inputs(bundle: Bundle):
    from seqfraud.fingerprint import read_reference

    return read_reference(bundle.manifest.fingerprint).inputs.values()


def test_alerts_are_compared_with_what_was_chosen():
    from seqfraud.drift import Share

    chosen = {"share": 0.01, "low": 0.009, "high": 0.011}
    for share, level in [(0.01, "ok"), (0.018, "watch"), (0.03, "alarm"), (0.0055, "watch"), (0.003, "alarm")]:
        now = Share(share, share * 0.99, share * 1.01, 100_000)
        assert _alerts(now, now, chosen).level == level, share


def test_the_figures_of_a_bundle_are_read_strictly():
    from seqfraud.errors import BundleError

    quality = Watched(3, 1, 0.01, {"average_precision": Between(0.5, 0.4, 0.6)})
    assert Watched.from_dict(quality.as_dict()) == quality
    with pytest.raises(BundleError, match=r"metrics\.watched"):
        Watched.from_dict({"rows": 3})
