"""A model's card says what the manifest and the events say, warns by rules, and cannot be made to say more."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle, Parity, open_bundle, write_manifest
from seqfraud.card import card, cautions, role
from seqfraud.modelevents import Event, Standing
from seqfraud.policy import NEVER, Costs, Policy, Thresholds

OTHER = "00000000000000ff"
FIGURES = {
    "rows": 20_000,
    "frauds": 400,
    "average_precision": 0.5,
    "roc_auc": None,
    "calibration_slope": 1.05,
    "alerts_per_day": 100,
    "precision_at_budget": 0.125,
}
FINGERPRINT = {
    "rows": 52_087,
    "frauds": 404,
    "users": 800,
    "first": "2025-01-15T00:04:08.906Z",
    "last": "2025-03-21T23:58:07.484Z",
    "numeric_missing": {"amount": 0.25},
    "unseen": {"kind": 0.01},
}


@pytest.fixture
def described(cards: Bundle, tmp_path: Path) -> Any:
    """`described(**changes)`: the bundle of CARDS with a manifest that has figures, and these changes."""

    def make(**changes: Any) -> Bundle:
        folder = Path(shutil.copytree(cards.path, tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"))
        manifest = dataclasses.replace(
            cards.manifest,
            **{
                "fingerprint": FINGERPRINT,
                "metrics": {"validation": FIGURES, "test": FIGURES},
                "versions": {"torch": "2.13.0"},
                "parity": Parity(
                    1e-5,
                    1e-3,
                    {
                        "run": {"probability": 2e-7, "logit": 3e-6},
                        "probabilities visited": {"lowest": 0.001, "highest": 0.99},
                    },
                ),
                **changes,
            },
        )
        write_manifest(folder, manifest)
        return open_bundle(folder)

    return make


def sections(text: str) -> dict[str, str]:
    parts = text.split("\n## ")
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts[1:]}


def test_a_card_says_what_the_manifest_and_the_events_say(described: Any) -> None:
    bundle = described()
    events = [
        Event("2025-04-01T00:00:00Z", "ann", "add", OTHER, "", None),
        Event("2025-04-01T10:00:00Z", "ann", "add", bundle.id, "nightly", OTHER),
        Event("2025-04-02T10:00:00Z", "ann", "challenge", bundle.id, "looks better", OTHER),
        Event("2025-04-09T10:00:00Z", "bob", "promote", bundle.id, "passed\nthe gate", OTHER),
        Event("2025-04-10T10:00:00Z", "eve", "rollback", OTHER, "too many declined", bundle.id),
        Event("2025-04-11T10:00:00Z", "eve", "promote", bundle.id, "repaired", OTHER),
        Event("2025-04-12T10:00:00Z", "eve", "add", "0" * 16, "not about it", bundle.id),
        Event("2025-04-13T10:00:00Z", "eve", "promote", "0" * 16, "newer", bundle.id),
    ]
    standing = Standing((OTHER, bundle.id, "0" * 16), (OTHER, bundle.id, "0" * 16))
    criteria = [{"name": "better", "passed": True, "words": "0.5, the champion's 0.4"}, {"name": "parity"}]
    gate = json.dumps({"passed": True, "champion": OTHER, "criteria": criteria}).encode()
    text = card(bundle, standing, events, {"gate.json": gate})
    said = sections(text)
    assert text.startswith(f"# Model {bundle.id}\n")
    assert "| role | champion before |" in said["Model details"]
    assert "| made with | torch 2.13.0 |" in said["Model details"]
    assert f"| step.onnx | {len(bundle.step):,} bytes |" in said["Model details"]
    assert "| kind | category | 8 known values |" in said["Inputs"]
    assert "half-lives of 60 min, 12 h; 26 numbers in all" in said["Inputs"]
    for words in ("| rows | 52,087 |", "| last row | 2025-03-21T23:58:07.484Z |", "| missing values | amount 25.00% |"):
        assert words in said["Training data"]
    assert "| average precision | 0.5 | 0.5 |" in said["Evaluation"]
    assert "100 alerts a day" in said["Evaluation"]
    assert "area under ROC" not in said["Evaluation"]
    assert "| threshold review | 0.4 |" in said["Calibration and decisions"]
    assert said["Parity of the exported graphs"] == (
        "1 checks against the trained model; the largest difference of a probability was 2e-07 (allowed 1e-05), of a "
        "logit 3e-06 (allowed 0.001). Probabilities from 0.001 to 0.99 were visited."
    )
    assert said["Gate"].splitlines() == [
        f"It passed against {OTHER}.",
        "",
        "| criterion | passed |  |",
        "| --- | --- | --- |",
        "| better | True | 0.5, the champion's 0.4 |",
        "| parity |  |  |",
    ]
    assert said["History"].splitlines()[2:] == [
        "| 2025-04-01T10:00:00Z | added | ann | nightly |",
        "| 2025-04-02T10:00:00Z | challenger | ann | looks better |",
        f"| 2025-04-09T10:00:00Z | champion, after {OTHER} | bob | passed the gate |",
        f"| 2025-04-10T10:00:00Z | taken back for {OTHER} | eve | too many declined |",
        f"| 2025-04-11T10:00:00Z | champion, after {OTHER} | eve | repaired |",
        f"| 2025-04-13T10:00:00Z | replaced by {'0' * 16} | eve | newer |",
    ]
    assert f"| gate.json | {len(gate)} | " in said["Attached"]


def test_what_is_not_known_is_not_made_up(cards: Bundle) -> None:
    said = sections(card(cards, Standing(), [], {}))
    assert "| last row | not said |" in said["Training data"]
    assert said["Evaluation"] == "No figures are in the manifest."
    assert said["Parity of the exported graphs"].startswith("No measured differences")
    assert said["Gate"].startswith("No gate.json is attached")
    assert said["History"] == "Nothing is recorded."
    assert said["Attached"] == "Nothing is attached."


def test_roles() -> None:
    standing = Standing(("a", "b", "c", "d"), ("a", "b"), ("c",))
    assert [role(m, standing) for m in "abcd"] == ["champion before", "champion", "challenger", "in the registry"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": {"validation": FIGURES}}, "no figures on test days"),
        ({"metrics": {"test": {**FIGURES, "frauds": 99}}}, "Only 99 frauds are in the test days"),
        ({"metrics": {"validation": {**FIGURES, "frauds": 12}, "test": FIGURES}}, "rest on 12 frauds"),
        (
            {"metrics": {"validation": {**FIGURES, "average_precision": 0.75}, "test": FIGURES}},
            "The test days are worse than the validation days (average precision 0.5000 against 0.7500)",
        ),
        ({"metrics": {"test": {**FIGURES, "calibration_slope": 0.5}}}, "calibration slope of the test days is 0.50"),
        ({"fingerprint": {"unseen": {"kind": 0.125}}}, "kind: 12.5% of the validation rows had a value"),
        ({"policy": Policy(Thresholds(0.5, 0.4, NEVER))}, "Nothing is declined"),
    ],
)
def test_a_caution_is_there_if_and_only_if_its_reason_is(described: Any, changes: dict[str, Any], words: str) -> None:
    assert any(words in caution for caution in cautions(described(**changes)))
    assert not any(words in caution for caution in cautions(described()))


def test_a_policy_by_cost_declines_without_a_threshold(described: Any) -> None:
    by_cost = described(policy=Policy(Thresholds(0.5, 0.4, NEVER), costs=Costs(review_cost=5.0, insult_cost=20.0)))
    assert not any("Nothing is declined" in caution for caution in cautions(by_cost))
    said = sections(card(by_cost, Standing(), [], {}))["Calibration and decisions"]
    assert "| insult_cost | 20 |" in said
    assert "| threshold decline | never |" in said
    assert said.endswith("for transactions without an amount.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "does not say whether it passed"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"passed": "yes"}', "does not say whether it passed"),
        (b'{"passed": false, "criteria": "worse"}', "It did not pass."),
        (b'{"passed": false, "criteria": [3, {"name": "<b>"}]}', "|  |  |  |\n| \\<b\\> |  |  |"),
    ],
)
def test_a_gate_file_may_hold_anything(cards: Bundle, content: bytes, words: str) -> None:
    assert words in sections(card(cards, Standing(), [], {"gate.json": content}))["Gate"]


def test_words_of_others_are_shown_and_not_obeyed(described: Any) -> None:
    """A reason, a version or a figure may hold Markdown, HTML, ends of lines and control characters."""
    hostile = "a | b\n# Model 0\n<script>[x](javascript:y)`\u202e\x07"
    bundle = described(
        versions={hostile: hostile},
        metrics={"test": {"rows": hostile, "frauds": True, "average_precision": 10**400, "alerts_per_day": hostile}},
        fingerprint={"rows": [1], "unseen": 3, "numeric_missing": {hostile: 0.5}},
    )
    events = [
        Event("2025-04-01T00:00:00Z", "<b>", "promote", bundle.id, hostile.replace("\x07", "").replace("\u202e", ""))
    ]
    text = card(bundle, Standing(), events, {})
    assert "<" not in text.replace("\\<", "")
    assert "`" not in text.replace("\\`", "")
    assert "[x]" not in text
    assert "\u202e" not in text and "\x07" not in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# Model {bundle.id}"]
    row = next(line for line in text.splitlines() if line.startswith("| 2025-04-01"))
    assert row.replace("\\|", "").count("|") == 5
