"""The whole loop on a small simulation: one service process from the first champion to the rollback."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Collection
from datetime import date
from typing import Any

import pytest

from benchmarks import demo_drift, drift_figures
from seqfraud import cli
from seqfraud.registry import Registry

SMALL = dataclasses.replace(
    demo_drift.STORY,
    users=100,
    fraud_share=0.05,
    live=date(2025, 3, 26),
    factor=40,
    patience=3,
    maturing=1,
    after=1,
    insists=False,
)
"""One quiet week, and so much of the new kind that a hundred users are enough to see it. They are too few for a challenger to be
surely better, whatever it is: how much is gained is for the demonstration to show."""


pytestmark = pytest.mark.timeout(900)


def run_here(*args: object) -> None:
    """A subcommand in this process: forty of them would spend the test's time on importing torch."""
    words = [str(word) for word in args]
    assert cli.run(words[0], words[1:]) == 0, args


def call(*args: object) -> tuple[int, str]:
    words = [str(word) for word in args]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.run(words[0], words[1:])
    return code, out.getvalue()


def run_here_json(*args: object, codes: Collection[int] = (0,)) -> Any:
    code, out = call(*args, "--json")
    assert code in codes, args
    return json.loads(out)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> drift_figures.Told:
    config = tmp_path_factory.mktemp("config") / "brief.toml"
    config.write_text(SMALL.config.read_text().replace("epochs = 8", "epochs = 4"))
    small = dataclasses.replace(SMALL, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_drift, "command", run_here)
        patch.setattr(demo_drift, "command_json", run_here_json)
        return demo_drift.tell(small, tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def found(told: drift_figures.Told) -> dict[str, Any]:
    return drift_figures.figures(told)


def test_the_alarm_comes_after_the_new_kind_and_not_before(told: drift_figures.Told) -> None:
    quiet, *_ = told.weeks
    assert quiet.level != "alarm"
    assert told.alarm is not None
    assert told.new_kind < told.alarm < told.promoted


def test_the_gate_judges_the_challenger_and_refuses_the_other_in_words(told: drift_figures.Told) -> None:
    judged, refused = told.gates["challenger"], told.gates["bad"]
    criteria = {c["name"]: c for c in judged["criteria"]}
    assert judged["passed"] == all(c["passed"] for c in criteria.values())
    assert all(criteria[name]["passed"] for name in ("unseen", "enough to compare", "parity"))
    assert judged["champion"] == told.champion
    assert not refused["passed"]
    assert refused["champion"] == told.challenger
    assert "surely worse" in {c["name"]: c for c in refused["criteria"]}["average precision"]["words"]


def test_each_span_is_answered_by_the_model_in_force_alone(told: drift_figures.Told, found: dict[str, Any]) -> None:
    answered = [set(part) - {"since"} for part in found["answered"]]
    a, b, c = told.champion, told.challenger, told.bad
    assert answered == [{a}, {a}, {b}, {c}, {b}]
    assert [action for _, action, _ in told.changes] == ["challenge", "promote", "promote", "rollback"]


def test_live_answers_and_shadow_scores_are_those_of_a_bulk_run(
    told: drift_figures.Told, found: dict[str, Any]
) -> None:
    parity = found["parity"]
    (shadowed,) = (week for week in found["weeks"] if week["since"] == str(told.weeks[-2].since))
    assert parity["answers"] < 1e-5
    assert parity["shadow"] < 1e-5
    assert parity["shadow_rows"] == shadowed["rows"]


def test_the_registry_tells_the_same_story(told: drift_figures.Told) -> None:
    registry = Registry(told.folder / "models")
    assert registry.champion == told.challenger
    assert registry.challengers == ()
    done = [(event.action, event.model) for event in registry.events() if event.action != "add"]
    assert done == [
        ("promote", told.champion),
        ("challenge", told.challenger),
        ("promote", told.challenger),
        ("promote", told.bad),
        ("rollback", told.challenger),
    ]


def test_what_is_shown(told: drift_figures.Told, found: dict[str, Any]) -> None:
    words = drift_figures.summary(told, found)
    assert "after the promotion: average precision" in words
    assert all(str(week.since) in words for week in told.weeks)
    assert drift_figures.draw(told, found).startswith("<svg")
