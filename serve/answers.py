"""What the service answers, as types: one is encoded from its type, all are in the API's description."""

import json
from typing import Annotated, Any, Literal

import msgspec

from seqfraud.bundle import LabelSource
from seqfraud.config import CleaningConfig, IdentifiersConfig
from seqfraud.context import ContextSpec
from seqfraud.policy import Decision, Thresholds
from seqfraud.schema import Schema

__all__ = [
    "Answer",
    "Error",
    "GivenAnswer",
    "GivenLabel",
    "LabelCounts",
    "ModelInForce",
    "Reason",
    "Refusal",
    "State",
    "UserEvent",
    "UserHistory",
    "refusal_body",
]


def _said(description: str, **constraints: Any) -> msgspec.Meta:
    """For people and for the description; nothing is checked on the way out."""
    return msgspec.Meta(description=description, extra_json_schema=constraints or None)


class Reason(msgspec.Struct):
    """Why a transaction was not approved."""

    code: Annotated[
        str, _said("A word of a fixed vocabulary, some with the column they are about; `rule:NAME`, `list:NAME`.")
    ]
    text: Annotated[str, _said("The same for people, with the figures of this transaction.")]
    contribution: Annotated[
        float | None,
        _said(
            "By how much the log-odds of fraud fall with the user's usual value in place of what is named; null where "
            "nothing was worked out."
        ),
    ]


class Answer(msgspec.Struct, omit_defaults=True):
    """The answer to one transaction, as HTTP gives it; `degraded` is there only where it is true."""

    transaction_id: Annotated[str, _said("As text; derived from the content where no column holds an id.")]
    fraud_probability: Annotated[
        float | None, _said("Calibrated; null where the answer is degraded.", minimum=0, maximum=1)
    ]
    is_fraud: Annotated[bool, _said("The probability reaches the threshold chosen on validation days.")]
    decision: Annotated[Decision, _said("By the thresholds of the deployment.")]
    reasons: Annotated[
        list[Reason], _said("Why it is not approved, the largest contribution first; empty where it is approved.")
    ]
    model: Annotated[str, _said("Identifies the bundle that scored.")]
    history: Annotated[int, _said("Accepted transactions of the user ordered before this one.", minimum=0)]
    late: Annotated[bool, _said("Older than the user's newest transaction.")]
    duplicate: Annotated[bool, _said("This id was scored before; the answer is the one given then.")]
    degraded: Annotated[bool, _said("Decided by the limits of `[fallback]`: the model could not answer.")] = False


class GivenLabel(msgspec.Struct):
    """A label as it was said."""

    is_fraud: bool
    known_at: Annotated[int, _said("Milliseconds since 1970 from which it counts.")]
    said_at: Annotated[int, _said("Milliseconds since 1970 at which it was stored.")]
    source: Annotated[str, _said("Where it is known from, as it was posted.")]
    author: Annotated[str, _said("Id of the API key that said it, `anonymous` without keys, or a command.")]


class GivenAnswer(Answer, kw_only=True):
    """The answer to a transaction exactly as it was given, and what was said of it since."""

    labels: Annotated[list[GivenLabel], _said("In the order in which they were said; the last one counts.")]


class LabelCounts(msgspec.Struct):
    """What became of the labels of a request."""

    new: Annotated[int, _said("First labels of known transactions.", minimum=0)]
    changed: Annotated[int, _said("Labels that say the opposite of an earlier one.", minimum=0)]
    unchanged: Annotated[int, _said("Labels that repeat what was said.", minimum=0)]
    unknown: Annotated[int, _said("Labels that wait for their transaction.", minimum=0)]


class UserEvent(msgspec.Struct):
    """One accepted transaction and its answer."""

    transaction: Annotated[dict[str, Any], _said("The declared fields as they were posted.")]
    answer: Answer


class UserHistory(msgspec.Struct):
    """Recent events of a user, newest first."""

    user: str
    history: Annotated[int, _said("Accepted transactions over the user's whole life.", minimum=1)]
    events: list[UserEvent]


class ModelInForce(msgspec.Struct):
    """The bundle that scores, and how much it has seen."""

    model: Annotated[str, _said("Identifies the bundle.")]
    kind: str
    schema: Schema
    label: LabelSource
    cleaning: CleaningConfig
    identifiers: IdentifiersConfig
    context: ContextSpec
    thresholds: Thresholds
    metrics: dict[str, Any]
    versions: Annotated[dict[str, str], _said("Of the libraries that made the bundle.")]
    shadow: Annotated[list[str], _said("Challengers; none for now.")]
    users: Annotated[int, _said("Users in memory.", minimum=0)]
    journal_records: Annotated[int, _said("Transactions and labels accepted so far.", minimum=0)]


class State(msgspec.Struct):
    """Whether the service lives, or is ready."""

    status: Literal["ok", "ready", "degraded"]


class Error(msgspec.Struct):
    """What is wrong with a request; nothing was changed by it."""

    code: Annotated[str, _said("A stable word for programs.", minLength=1)]
    message: Annotated[str, _said("For people: the value seen and what is expected.", minLength=1)]
    field: Annotated[str, _said("The offending field, or empty.")]


class Refusal(msgspec.Struct):
    """The one shape of every error."""

    error: Error


def refusal_body(code: str, message: str, field: str = "") -> bytes:
    """A `Refusal` as JSON; by `json`, which also writes what is no Unicode."""
    return json.dumps({"error": {"code": code, "message": message, "field": field}}).encode()
