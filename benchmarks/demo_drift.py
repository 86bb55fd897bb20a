"""`make demo-drift`: months in which a new kind of fraud appears, and what is done about it, by the commands alone.

A champion is trained on simulated weeks and served; later weeks are streamed through the running service one by one, labels
as they become known, and after each the monitor looks. From some week on a fraud comes that the champion has never seen. When
the monitor raises its alarm, labels are given time to mature; a challenger is trained on the journal and judged by the gate;
it scores in shadow, is promoted in the running service, and more weeks come. Then a challenger whose labels were mixed up is
refused by the gate, promoted all the same by hand, and rolled back.

Writes benchmarks/results/demo_drift.json and demo_drift.svg; everything else lies in demo-drift/.
"""

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.drift_figures import Told, Week, draw, figures, summary
from benchmarks.processes import RESULTS, ROOT, command, command_json, service, write_result
from seqfraud.files import replaced_file
from serve.replay import Client

FOLDER = ROOT / "demo-drift"
DAY = timedelta(days=1)
WEEK = timedelta(days=7)
LOOKED = (0, 3, 4)
"""Exit codes of the monitor: fine or to be watched, an alarm, it cannot be said."""
JUDGED = (0, 3)
"""Exit codes of the gate: passed, refused."""
ATTEMPTS = 2
"""Retrainings, a week apart, of which one has to pass the gate."""
IN_STEP_S = 120.0
"""How long a challenger may take to score what is left."""


@dataclass(frozen=True)
class Story:
    """What happens when.

    Attributes:
        config: of the champion and so of the challenger; its test days end where the new kind begins.
        live: the first day that is streamed; what came before is loaded.
        new_kind: the first day of the new kind of fraud, `factor` times 0.2 % of the transactions.
        patience: weeks in which the alarm has to come.
        maturing: weeks from the alarm to the retraining: until then few labels of the new kind are known.
        compared: time on which the gate compares.
        after: weeks after the promotion.
        insists: whether the gate has to let a challenger pass; else the first one goes on whatever it says.
    """

    users: int
    fraud_share: float
    config: Path
    live: date
    new_kind: date
    factor: float
    patience: int
    maturing: int
    compared: str
    after: int
    insists: bool = True

    @property
    def days(self) -> int:
        """Simulated days: two more than the longest course of things takes."""
        weeks = self.patience + self.maturing + ATTEMPTS + self.after
        return (self.live - date(2025, 1, 1)).days + 7 * weeks + 2


STORY = Story(
    users=700,
    fraud_share=0.015,
    config=ROOT / "configs" / "drift.toml",
    live=date(2025, 3, 19),
    new_kind=date(2025, 4, 2),
    factor=12,
    patience=6,
    maturing=3,
    compared="7d",
    after=2,
)


def main() -> None:
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    told = tell(STORY, FOLDER)
    found = figures(told)
    picture = draw(told, found)
    for file in (FOLDER / "weeks.svg", RESULTS / "demo_drift.svg"):
        with replaced_file(file) as temporary:
            temporary.write_text(picture, encoding="utf-8")
    seconds = time.perf_counter() - began
    story = {**asdict(STORY), "config": STORY.config.name, "live": str(STORY.live), "new_kind": str(STORY.new_kind)}
    out = write_result("demo_drift", {"seconds": round(seconds), "story": story, **found})
    print(summary(told, found))
    print(f"""
Where it lies
  figures    {out.relative_to(ROOT)}
  picture    {(FOLDER / "weeks.svg").relative_to(ROOT)}
  reports    {FOLDER.relative_to(ROOT)}/monitor/, one of each week
  gate       {FOLDER.relative_to(ROOT)}/challenger-*/gate.json
  models     .venv/bin/seqfraud models list --registry {FOLDER.relative_to(ROOT)}/models

{seconds:.0f} s in all""")


def tell(story: Story, folder: Path) -> Told:
    """Everything that happens, in order. Raises RuntimeError where it does not happen."""
    loop = Loop(story, folder)
    loop.begin()
    with loop.serving():
        loop.wait_for_the_alarm()
        for _ in range(story.maturing):
            loop.week()
        challenger = loop.retrain()
        loop.ask("challenge", challenger, "what the gate said is in gate.json")
        loop.week()
        loop.wait_in_step(challenger)
        loop.ask("promote", challenger, "as good in shadow as the gate said")
        for _ in range(story.after):
            loop.week()
        bad = loop.spoil()
        loop.ask("promote", bad, "by hand, whatever the gate says")
        loop.stream(loop.now + DAY)
        loop.ask("rollback", None, "the gate was right")
        loop.stream(loop.now + DAY)
    loop.score_all()
    return loop.told


@dataclass
class Loop:
    """The service, the registry beside it, and how far time has come."""

    story: Story
    folder: Path
    url: str = ""
    now: date = field(init=False)
    trained: Path = field(init=False)
    told: Told = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.story.live
        self.told = Told(self.folder, self.story.live, self.story.new_kind)
        self.data = self.told.data
        self.models = self.folder / "models"

    def say(self, words: str) -> None:
        """A line of the story."""
        self.told.lines.append(f"{self.now}  {words}")
        print(f"\n== {self.now}  {words}", flush=True)

    def begin(self) -> None:
        """Transactions, a champion, and its service's state as of the first live day."""
        story, run, bundle = self.story, self.folder / "run", self.folder / "bundle"
        drift = f"new_pattern@{story.new_kind}:{story.factor:g}"
        size = ("--users", story.users, "--days", story.days, "--fraud-share", story.fraud_share)
        command("simulate", "--out", self.data, *size, "--drift", drift)
        command("train", story.config, "--data", self.data, "--out", run)
        command("export", run, "--out", bundle)
        champion = self.add(bundle, "the first one")
        command_json("models", "promote", champion, "--registry", self.models, "--reason", "the first one")
        command("load", self.data, "--bundle", bundle, "--state", self.told.state, "--until", self.now)
        self.told.champion = champion
        self.say(f"champion {champion[:8]} answers")

    def add(self, bundle: Path, reason: str) -> str:
        """Into the registry; the content id."""
        added = command_json("models", "add", bundle, "--registry", self.models, "--reason", reason)
        return str(added["model"])

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The service, running on the registry."""
        with service(self.models, self.told.state, models="--registry") as self.url:
            yield

    # ---- time goes on

    def stream(self, until: date) -> None:
        """Transactions of some days and what becomes known in them, through the running service."""
        command_json("replay", self.data, "--url", self.url, "--since", self.now, "--until", until)
        self.now = until

    def week(self) -> Week:
        """A week, and what the monitor says at its end."""
        since = self.now
        self.stream(since + WEEK)
        out = self.folder / "monitor" / str(self.now)
        words = ("--registry", self.models, "--until", self.now, "--quality-window", "7d", "--out", out)
        week = Week(since, command_json("monitor", "--state", self.told.state, *words, codes=LOOKED))
        self.told.weeks.append(week)
        self.say(f"monitor: {week.words}")
        return week

    def wait_for_the_alarm(self) -> None:
        """Weeks until the monitor raises one; one in a quiet week is a false alarm, told in the figures and passed over."""
        for _ in range(self.story.patience):
            week = self.week()
            if week.level == "alarm" and self.now > self.story.new_kind:
                self.told.alarm = self.now
                return
        raise RuntimeError(f"the monitor raised no alarm in {self.story.patience} weeks")

    # ---- models

    def ask(self, action: str, model: str | None, reason: str) -> None:
        """Ask the running service to change its models."""
        words = [action] if model is None else [action, model]
        answer = command_json("models", *words, "--url", self.url, "--reason", reason)
        self.told.changes.append((self.now, action, answer["model"]))
        shadow = ", ".join(str(one["model"])[:8] for one in answer["shadow"]) or "nothing"
        self.say(f"{action}: {answer['model'][:8]} answers, {shadow} in shadow ({reason})")

    def wait_in_step(self, model: str) -> None:
        """Until a challenger has scored what came while it was in shadow: it is a moment behind."""
        client = Client(self.url)
        deadline = time.monotonic() + IN_STEP_S
        while time.monotonic() < deadline:
            _, answer = client.call("GET", "/v1/model")
            (shadow,) = (one for one in answer["shadow"] if one["model"] == model)
            if not shadow["behind"]:
                self.say(f"in shadow: {shadow['scored']:,} transactions scored, {shadow['dropped']:,} dropped")
                return
            time.sleep(0.2)
        raise RuntimeError(f"the challenger is still behind after {IN_STEP_S:g} s: {shadow}")

    def retrain(self) -> str:
        """A challenger that the gate lets pass, if need be after another week; its id."""
        for attempt in range(ATTEMPTS if self.story.insists else 1):
            if attempt:
                self.week()
            self.trained = self.folder / f"challenger-{self.now}"
            words = ("--state", self.told.state, "--registry", self.models, "--out", self.trained, "--until", self.now)
            report = command_json("retrain", self.story.config, *words, "--compare", self.story.compared, codes=JUDGED)
            self.told.challenger = self.judged("challenger", report)
            if report["passed"]:
                return self.told.challenger
        if self.story.insists:
            raise RuntimeError("the gate refused every challenger")
        return self.told.challenger

    def judged(self, name: str, report: dict[str, Any]) -> str:
        """Tell what the gate said; the challenger's id."""
        self.told.gates[name] = report
        outcome = "passed" if report["passed"] else "refused"
        lines = [f"the gate: {report['challenger'][:8]} against {report['champion'][:8]}: {outcome}"]
        lines += [f"  {'ok' if c['passed'] else 'NO'}  {c['name']}: {c['words']}" for c in report["criteria"]]
        self.say("\n".join(lines))
        return str(report["challenger"])

    def spoil(self) -> str:
        """The challenger of somebody who joined the labels to other transactions; the gate refuses it. Its id."""
        source, folder = self.trained, self.folder / "bad"
        folder.mkdir()
        table = pq.read_table(source / "data.parquet")
        label = table.column_names.index("is_fraud")
        order = np.random.default_rng(0).permutation(len(table))
        mixed = table.set_column(label, "is_fraud", table["is_fraud"].take(pa.array(order)))
        pq.write_table(mixed, folder / "data.parquet")
        config = (source / "config.toml").read_text(encoding="utf-8")
        brief = re.sub(r'(?m)^"epochs" = \d+$', '"epochs" = 1', config)
        (folder / "config.toml").write_text(brief, encoding="utf-8")
        command("train", folder / "config.toml", "--data", folder / "data.parquet", "--out", folder / "run")
        command("export", folder / "run", "--out", folder / "bundle")
        words = ("--state", self.told.state, "--registry", self.models, "--until", self.now)
        report = command_json("gate", folder / "bundle", *words, "--compare", self.story.compared, codes=JUDGED)
        self.told.bad = self.judged("bad", report)
        if report["passed"]:
            raise RuntimeError("the gate let pass what was trained on other transactions' labels")
        return self.told.bad

    def score_all(self) -> None:
        """What the champion and the challenger say of every transaction, whoever answered: for the figures."""

        def score(model: str) -> None:
            command("score", self.models / "bundles" / model, self.data, "--out", self.told.scores(model))

        with ThreadPoolExecutor() as both:
            list(both.map(score, (self.told.champion, self.told.challenger)))


if __name__ == "__main__":
    main()
