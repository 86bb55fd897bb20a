"""A model's card in Markdown, made from its manifest and the registry's events, and so never older than they are.

Sections and their order: Mitchell et al. 2019, "Model Cards for Model Reporting" (FAT*), with the decisions and the record of
who put the model where. What the manifest does not say the card says it does not know; cautions follow from rules.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seqfraud.bundle import FILES, Bundle
from seqfraud.config import duration_words
from seqfraud.context import ContextSpec
from seqfraud.graph import StateSpec
from seqfraud.modelevents import Event, Standing
from seqfraud.policy import NEVER, Policy

GATE = "gate.json"
"""The attachment in which a gate says whether a challenger `passed`, and why: `criteria`, each with `words`."""
LITTLE_FRAUD = 100
"""Fewer frauds than that leave every figure uncertain."""
OFF_SLOPE = (0.8, 1.25)
"""Calibration slopes outside are worth a caution."""
OFTEN_UNSEEN = 0.05
FIGURES = {
    "rows": "rows",
    "frauds": "frauds",
    "average_precision": "average precision",
    "roc_auc": "area under ROC",
    "recall_at_1pct_fpr": "recall at 1 % false positives",
    "precision_at_budget": "precision at the alert budget",
    "card_precision_at_100": "card precision at 100",
    "money_caught": "money caught at the alert budget",
    "precision": "precision where is_fraud",
    "recall": "recall where is_fraud",
    "log_loss": "log loss",
    "brier": "Brier score",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
}
"""What a table of figures shows, by the manifest's name."""
PARTS = ("validation", "test")
_MARKUP = re.compile(r"([\\`*_\[\]<>#|~])")


def card(bundle: Bundle, standing: Standing, events: Sequence[Event], attached: Mapping[str, bytes]) -> str:
    """The card of a model.

    Args:
        events: those of the registry; other models' are passed over.
        attached: the files kept by it, by name.
    """
    manifest = bundle.manifest
    mine = [event for event in events if concerns(event, bundle.id)]
    sections = [
        ("Model details", _details(bundle, standing)),
        ("Intended use", _use(bundle)),
        ("Inputs", _inputs(bundle)),
        ("Training data", _training(manifest.fingerprint, bundle)),
        ("Evaluation", _evaluation(manifest.metrics)),
        ("Calibration and decisions", _decisions(manifest.calibration, manifest.policy)),
        ("Parity of the exported graphs", _parity(bundle)),
        ("Gate", _gate(attached.get(GATE))),
        ("Caveats", [f"- {words}" for words in cautions(bundle)]),
        ("History", _history(bundle.id, mine)),
        ("Attached", _attached(attached)),
    ]
    out = [f"# Model {bundle.id}", ""]
    for title, lines in sections:
        out += [f"## {title}", "", *lines, ""]
    return "\n".join(out)


def role(model: str, standing: Standing) -> str:
    """What a model is at present, in words."""
    if model == standing.champion:
        return "champion"
    if model in standing.challengers:
        return "challenger"
    return "champion before" if model in standing.champions else "in the registry"


def concerns(event: Event, model: str) -> bool:
    """Whether an event changed what a model is: it is about it, or took the championship from it."""
    return event.model == model or (event.before == model and event.action in ("promote", "rollback"))


def cautions(bundle: Bundle) -> list[str]:
    """What to keep in mind, by rules; never empty."""
    manifest = bundle.manifest
    out: list[str] = []
    test, validation = (_mapping(manifest.metrics.get(part)) for part in ("test", "validation"))
    frauds = _number(test.get("frauds"))
    if not test:
        out.append(
            "The bundle holds no figures on test days: how good the model is on days after its choices is not known."
        )
    elif frauds is not None and frauds < LITTLE_FRAUD:
        out.append(f"Only {frauds:,.0f} frauds are in the test days: every figure is uncertain.")
    if 0 < (_number(validation.get("frauds")) or 0) < LITTLE_FRAUD:
        out.append(f"Calibration and thresholds rest on {validation['frauds']:,} frauds in the validation days.")
    before, after = _number(validation.get("average_precision")), _number(test.get("average_precision"))
    if before is not None and after is not None and after < before:
        out.append(
            f"The test days are worse than the validation days (average precision {after:.4f} against {before:.4f}): fraud "
            "has changed since, or the choices fit the validation days too closely."
        )
    slope = _number(test.get("calibration_slope"))
    if slope is not None and not OFF_SLOPE[0] <= slope <= OFF_SLOPE[1]:
        out.append(f"The calibration slope of the test days is {slope:.2f}: probabilities are not shares there.")
    for column, share in _mapping(manifest.fingerprint.get("unseen")).items():
        if (_number(share) or 0) > OFTEN_UNSEEN:
            out.append(f"{_text(column)}: {share:.1%} of the validation rows had a value that training had not seen.")
    if manifest.policy.by != "cost" and manifest.policy.thresholds.decline == NEVER:
        out.append("Nothing is declined: no threshold for it was found, or none was asked for.")
    if manifest.schema.geo:
        out.append("Places are inputs: where people live may stand for what they are; look at alerts by region.")
    out += [
        "The figures are points; a run's report.html has their intervals, and a monitor those of live days.",
        "Labels are what was reported: fraud that nobody noticed counts as honest, and of declined transactions the truth "
        "is not known unless a control share is let through.",
        f"A label is believed to be known {duration_words(manifest.context.label_delay)} after its transaction; whatever is "
        "not said by then counts as honest.",
        "Segments (new customers, regions, amounts) are not in the manifest; they are in the run's report.",
    ]
    return out


def _details(bundle: Bundle, standing: Standing) -> list[str]:
    manifest = bundle.manifest
    versions = ", ".join(f"{_text(name)} {_text(of)}" for name, of in manifest.versions.items())
    return _table(
        ("", ""),
        [
            ("id", bundle.id),
            ("role", role(bundle.id, standing)),
            ("kind", _text(manifest.kind)),
            ("state", "; ".join(_state(state) for state in manifest.graph.states) or "none"),
            ("signed by", bundle.signed_by or "nobody whose signature was asked for"),
            ("made with", versions or "not said"),
            *((name, f"{_bytes(bundle, name):,} bytes") for name in FILES),
        ],
    )


def _bytes(bundle: Bundle, name: str) -> int:
    return len(dict(zip(FILES, (bundle.sequence, bundle.step, bundle.reference), strict=True))[name])


def _state(state: StateSpec) -> str:
    shape = " × ".join(str(axis) for axis in state.row_shape) or "1"
    return f"{_text(state.name)} {state.dtype} [{shape}] by {_text(state.key)}"


def _use(bundle: Bundle) -> list[str]:
    schema = bundle.manifest.schema
    return [
        f"Scores one transaction of a {_text(schema.user)} at a time, in the order of arrival, from what the "
        f"{_text(schema.user)} and the other entities of the transaction did before: a probability of fraud, and a decision "
        "(approve, review or decline). Meant for transactions like those it was trained on, with a person behind reviews.",
        "",
        "Not meant for other decisions about people (credit, employment, insurance), nor for a score without the history: "
        "the first transactions of a user are judged by what others did.",
    ]


def _inputs(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    schema = manifest.schema
    sizes = {v.column: len(v.values) for v in manifest.vocabularies}
    may_miss = set(manifest.missing)
    rows = [
        (_text(schema.user), "user", "whose sequence it is"),
        (_text(schema.time), "time", schema.time_unit),
        *([(_text(schema.amount), "amount", "for decisions and contexts")] if schema.amount else []),
        *((_text(c), "number", "may be missing" if c in may_miss else "") for c in schema.numeric_inputs),
        *((_text(c), "category", f"{sizes.get(c, 0):,} known values") for c in schema.categorical),
        *((_text(c), "entity", _context(manifest.context, i)) for i, c in enumerate(schema.entities)),
    ]
    identifiers = manifest.identifiers
    return [
        *_table(("column", "as", ""), rows),
        "",
        f"Context of an entity: decayed sums with half-lives of "
        f"{', '.join(duration_words(ms) for ms in manifest.context.half_lives)}; "
        f"{manifest.context.width} numbers in all. "
        f"Identifiers are stored by the policy {_text(identifiers.default)}"
        + (
            f" ({', '.join(f'{_text(c)}: {_text(p)}' for c, p in identifiers.columns.items())})"
            if identifiers.columns
            else ""
        )
        + ". Fields that are not listed never reach the model.",
    ]


def _context(context: ContextSpec, column: int) -> str:
    kinds = context.user_inputs if column == context.user else context.inputs
    return f"what was seen of it before: {', '.join(kinds) or 'nothing'}"


def _training(fingerprint: Mapping[str, Any], bundle: Bundle) -> list[str]:
    label = bundle.manifest.label
    said = [
        ("first row", fingerprint.get("first")),
        ("last row", fingerprint.get("last")),
        ("rows", fingerprint.get("rows")),
        ("known frauds", fingerprint.get("frauds")),
        ("users", fingerprint.get("users")),
        ("label", label.column),
        ("known at", label.known_at or f"{duration_words(bundle.manifest.context.label_delay)} after the transaction"),
    ]
    missing = _mapping(fingerprint.get("numeric_missing"))
    some = ", ".join(f"{_text(c)} {share:.2%}" for c, share in missing.items() if (_number(share) or 0) > 0)
    rows = [(name, "not said" if value is None else _figure(value)) for name, value in said]
    return [*_table(("", ""), [*rows, ("missing values", some or ("none" if missing else "not said"))])]


def _evaluation(metrics: Mapping[str, Any]) -> list[str]:
    parts = [part for part in PARTS if _mapping(metrics.get(part))]
    if not parts:
        return ["No figures are in the manifest."]
    rows = [
        (words, *(_figure(metrics[part].get(name)) for part in parts))
        for name, words in FIGURES.items()
        if any(metrics[part].get(name) is not None for part in parts)
    ]
    last = metrics[parts[-1]]
    alerts = last.get("alerts_per_day")
    budget = "a share of the day's transactions" if alerts is None else f"{_figure(alerts)} alerts a day"
    return [
        "Validation days chose the epochs, the calibration and the decisions; test days come after them and chose nothing. "
        "Rows are scored in the order of arrival, with the labels that were known by then. The alert budget is "
        f"{budget}.",
        "",
        *_table(("", *parts), rows),
    ]


def _decisions(calibration: Mapping[str, Any], policy: Policy) -> list[str]:
    rules = {
        "thresholds": "by thresholds of the probability",
        "expected_loss": "review where probability times amount is at least `review`, decline by the threshold",
        "cost": "the least expected cost of approving, reviewing and declining",
    }
    thresholds = policy.as_dict()["thresholds"]
    rows = [
        *((f"calibration {_text(name)}", _figure(value)) for name, value in calibration.items()),
        ("decides", rules[policy.by]),
        *((name, _figure(value)) for name, value in policy.as_dict()["decision"].items() if name != "by"),
        *((f"threshold {name}", "never" if value == NEVER else _figure(value)) for name, value in thresholds.items()),
    ]
    if policy.by != "cost":
        return _table(("", ""), rows)
    return [*_table(("", ""), rows), "", "The thresholds of review and decline are for transactions without an amount."]


def _parity(bundle: Bundle) -> list[str]:
    parity = bundle.manifest.parity
    checks = {name: of for name, of in parity.measured.items() if "logit" in of}
    if not checks:
        return [
            "No measured differences are in the manifest; the registry verified the graphs when the bundle was added."
        ]
    largest = {what: max(_number(of.get(what)) or 0.0 for of in checks.values()) for what in ("probability", "logit")}
    visited = parity.measured.get("probabilities visited", {})
    span = ""
    if {"lowest", "highest"} <= set(visited):
        span = f" Probabilities from {_figure(visited['lowest'])} to {_figure(visited['highest'])} were visited."
    return [
        f"{len(checks)} checks against the trained model; the largest difference of a probability was "
        f"{largest['probability']:.2g} (allowed {parity.probability:g}), of a logit {largest['logit']:.2g} (allowed "
        f"{parity.logit:g}).{span}",
    ]


def _gate(content: bytes | None) -> list[str]:
    if content is None:
        return [f"No {GATE} is attached: nothing says that it was compared with the champion."]
    try:
        found = _mapping(json.loads(content))
    except (ValueError, RecursionError):
        return [f"{GATE} is attached and cannot be read."]
    passed, criteria = found.get("passed"), found.get("criteria")
    if not isinstance(passed, bool):
        return [f"{GATE} does not say whether it passed."]
    against = f" against {_text(found['champion'])}" if "champion" in found else ""
    out = [f"It {'passed' if passed else 'did not pass'}{against}."]
    rows = [
        (_text(one.get("name", "")), _text(one.get("passed", "")), _text(one.get("words", "")))
        for one in map(_mapping, criteria if isinstance(criteria, list) else [])
    ]
    return [*out, "", *_table(("criterion", "passed", ""), rows)] if rows else out


def _history(model: str, events: Iterable[Event]) -> list[str]:
    rows = []
    for event in events:
        if event.model != model:
            what = f"replaced by {event.model}" if event.action == "promote" else f"taken back for {event.model}"
        elif event.action == "rollback":
            what = f"champion again, after {event.before}"
        elif event.action == "promote":
            what = "champion" if event.before is None else f"champion, after {event.before}"
        else:
            what = {"add": "added", "challenge": "challenger", "withdraw": "withdrawn"}[event.action]
        rows.append((event.at, what, _text(event.author), _text(event.reason)))
    return _table(("when", "what", "who", "why"), rows) if rows else ["Nothing is recorded."]


def _attached(attached: Mapping[str, bytes]) -> list[str]:
    rows = [(_text(n), f"{len(c):,}", hashlib.sha256(c).hexdigest()[:16]) for n, c in attached.items()]
    return _table(("file", "bytes", "sha256 begins"), rows) if rows else ["Nothing is attached."]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _text(value: object) -> str:
    """Words that may hold anything, as Markdown that shows them on one line."""
    words = " ".join(str(value).split())
    return _MARKUP.sub(r"\\\1", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words))


def _figure(value: object) -> str:
    """A number, or whatever stands in its place."""
    number = _number(value)
    if number is None:
        return "–" if value is None else _text(value)
    return f"{number:,.0f}" if isinstance(value, int) else f"{number:.4g}"


def _number(value: object) -> float | None:
    """A finite number; None for anything else that a manifest may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
