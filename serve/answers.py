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
    "Agreement",
    "Alert",
    "AlertChange",
    "AlertDetail",
    "AlertLabel",
    "AlertPage",
    "AlertRecord",
    "AlertState",
    "Answer",
    "Attribution",
    "DeadLetter",
    "Error",
    "Explanation",
    "GivenAnswer",
    "GivenLabel",
    "LabelCounts",
    "ModelInForce",
    "ModelInShadow",
    "OutboxState",
    "PastEvent",
    "Reason",
    "Refusal",
    "State",
    "Trying",
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
    """The answer to one transaction, as HTTP gives it; `degraded` and `control` are there only where true."""

    transaction_id: Annotated[str, _said("As text; derived from the content where no column holds an id.")]
    fraud_probability: Annotated[
        float | None, _said("Calibrated; null where the answer is degraded.", minimum=0, maximum=1)
    ]
    is_fraud: Annotated[bool, _said("The probability reaches the threshold chosen on validation days.")]
    decision: Annotated[Decision, _said("By the policy of the deployment, from probability and amount.")]
    reasons: Annotated[
        list[Reason],
        _said(
            "Why it is not approved, or would not have been, the largest contribution first; empty where it is approved."
        ),
    ]
    model: Annotated[str, _said("Identifies the bundle that scored.")]
    history: Annotated[int, _said("Accepted transactions of the user ordered before this one.", minimum=0)]
    late: Annotated[bool, _said("Older than the user's newest transaction.")]
    duplicate: Annotated[bool, _said("This id was scored before; the answer is the one given then.")]
    degraded: Annotated[bool, _said("Decided by the limits of `[fallback]`: the model could not answer.")] = False
    control: Annotated[
        bool, _said("It would have been declined, and was let through at random, so that its truth becomes known.")
    ] = False


class Attribution(msgspec.Struct):
    """What one input of a transaction contributes to its score."""

    input: Annotated[
        str,
        _said(
            "The columns, and what of them: the time's hour of the day and gap since the last transaction, a context "
            "column's activity and known fraud."
        ),
    ]
    value: Annotated[float | str | None, _said("As it is; null where it is missing or a category that is not known.")]
    usual: Annotated[float | str | None, _said("What is usual for the user, or for all where the user is young.")]
    contribution: Annotated[float, _said("In log-odds, compared with the usual value; a Shapley value.")]


class PastEvent(msgspec.Struct):
    """What one earlier transaction of the user contributes to the score of this one."""

    transaction_id: str
    time: Annotated[str, _said("ISO 8601, UTC.")]
    contribution: Annotated[float, _said("By how much the log-odds fall where the history is without it.")]


class Explanation(msgspec.Struct):
    """What the score of a transaction is made of, worked out now by the model in force."""

    transaction_id: str
    model: Annotated[str, _said("Identifies the bundle that explains.")]
    fraud_probability: Annotated[
        float, _said("By that bundle, with the user's history as it is now.", minimum=0, maximum=1)
    ]
    answer: Annotated[Answer, _said("As it was given, with its reasons.")]
    log_odds: Annotated[float, _said("Of that probability.")]
    base: Annotated[float, _said("Log-odds with every input at its usual value; all contributions of inputs above it.")]
    inputs: Annotated[
        list[Attribution], _said("The largest contribution first; with `base` they add up to `log_odds`.")
    ]
    without_history: Annotated[float, _said("Log-odds with none of `events` before it.")]
    events: Annotated[
        list[PastEvent], _said("The user's transactions before it that are kept in memory, newest first.")
    ]


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


AlertState = Literal["open", "in_review", "confirmed", "dismissed"]


class AlertRecord(msgspec.Struct):
    """A transaction that was not approved, and how far people are with it: what an event of the webhook carries."""

    transaction_id: Annotated[str, _said("As it is stored.")]
    seq: Annotated[int, _said("The transaction's number in the journal.", minimum=1)]
    user: Annotated[str, _said("As it is stored.")]
    time: Annotated[str, _said("Of the transaction; ISO 8601 in UTC.", format="date-time")]
    decision: Literal["review", "decline"]
    fraud_probability: Annotated[float, _said("Calibrated.", minimum=0, maximum=1)]
    amount: Annotated[float | None, _said("In the currency of the training data; null where there is none.")]
    risk: Annotated[float, _said("Money at risk: probability times amount.")]
    reasons: list[Reason]
    model: Annotated[str, _said("Identifies the bundle that scored.")]
    state: AlertState
    assigned_to: Annotated[str | None, _said("Who took it up: the id of an API key.")]
    author: Annotated[str | None, _said("Who changed its state last.")]
    note: Annotated[str, _said("What was said with that.")]
    changed_at: Annotated[str | None, _said("When; ISO 8601 in UTC.", format="date-time")]


class AlertLabel(msgspec.Struct):
    """The newest label of an alert's transaction, whoever said it."""

    is_fraud: bool
    source: Annotated[str, _said("`analyst` where it came from closing the alert.")]
    author: Annotated[str, _said("Who said it; empty in records from before labels had one.")]
    known_at: Annotated[str, _said("From when it counts.", format="date-time")]
    said_at: Annotated[str, _said("When it was said.", format="date-time")]


class Alert(AlertRecord):
    """An alert, and what is known of its transaction."""

    label: AlertLabel | None


class AlertChange(msgspec.Struct):
    """One change of an alert's state."""

    seq: Annotated[int, _said("Its number in the journal.", minimum=1)]
    state: AlertState
    assigned_to: str | None
    author: str
    note: str
    at: Annotated[str, _said("ISO 8601 in UTC.", format="date-time")]


class AlertDetail(Alert):
    """An alert with its whole life."""

    changes: Annotated[list[AlertChange], _said("Oldest first; empty while it is as it was opened.")]


class AlertPage(msgspec.Struct):
    """Some alerts, and where the next ones are."""

    alerts: list[Alert]
    next: Annotated[str | None, _said("For `cursor`, with the same filters and order; null at the end.")]


class Trying(msgspec.Struct):
    """The event whose turn it is, after a failed attempt."""

    seq: Annotated[int, _said("Of its record in the journal.", minimum=1)]
    attempts: Annotated[int, _said("So far.", minimum=1)]
    since: Annotated[str, _said("The first one.", format="date-time")]
    due: Annotated[str, _said("The next one.", format="date-time")]
    status: Annotated[int | None, _said("What the receiver answered last; null where it did not.")]
    words: Annotated[str, _said("Why that was no success.")]


class DeadLetter(msgspec.Struct):
    """An event that was given up."""

    seq: Annotated[int, _said("Of its record in the journal.", minimum=1)]
    attempts: Annotated[int, _said("Made so far.", minimum=1)]
    since: Annotated[str, _said("The first one.", format="date-time")]
    at: Annotated[str, _said("The last one.", format="date-time")]
    status: Annotated[int | None, _said("What the receiver answered last; null where it did not.")]
    words: Annotated[str, _said("Why that was no success.")]
    retry: Annotated[bool, _said("It is about to be tried once more.")]


class OutboxState(msgspec.Struct):
    """How far alerts and their changes have come on their way to the webhook."""

    status: Annotated[
        Literal["off", "sending", "failing", "stopped"],
        _said("`off`: there is no webhook. `stopped`: the receiver answered 410; until the next start."),
    ]
    receiver: Annotated[str, _said("Scheme, host and port; empty where there is none.")]
    delivered_to: Annotated[int, _said("All events up to this number were delivered or are dead.", minimum=0)]
    journal: Annotated[int, _said("Number of the journal's newest record.", minimum=0)]
    waiting: Annotated[int, _said("Events that were neither delivered nor given up.", minimum=0)]
    trying: Trying | None
    dead_letters: Annotated[int, _said("How many there are.", minimum=0)]
    dead: Annotated[list[DeadLetter], _said("The oldest 100.")]


class UserEvent(msgspec.Struct):
    """One accepted transaction and its answer."""

    transaction: Annotated[dict[str, Any], _said("The declared fields as they were posted.")]
    answer: Answer


class UserHistory(msgspec.Struct):
    """Recent events of a user, newest first."""

    user: str
    history: Annotated[int, _said("Accepted transactions over the user's whole life.", minimum=1)]
    events: list[UserEvent]


class Agreement(msgspec.Struct):
    """How far a challenger agrees with the models that answered, over what it scored."""

    decisions: Annotated[
        float, _said("Share of equal decisions, rules and lists left out on both sides.", minimum=0, maximum=1)
    ]
    correlation: Annotated[float | None, _said("Of the probabilities; null where one of them does not vary.")]
    mean_absolute_difference: Annotated[float, _said("Of the probabilities.", minimum=0, maximum=1)]


class ModelInShadow(msgspec.Struct):
    """A challenger: it scores what the model in force scores, and answers nobody."""

    model: str
    state: Literal["catching up", "in step", "stopped"]
    behind: Annotated[int, _said("Records of the journal that it has not come to.", minimum=0)]
    scored: Annotated[int, _said("Live transactions that it scored.", minimum=0)]
    dropped: Annotated[int, _said("Those whose scores were dropped, since it was too far behind.", minimum=0)]
    agreement: Agreement | None
    why: Annotated[str, _said("Why it stopped; empty where it did not.")]


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
    decision: Annotated[dict[str, Any], _said("What decides: `by`, and its numbers.")]
    metrics: dict[str, Any]
    versions: Annotated[dict[str, str], _said("Of the libraries that made the bundle.")]
    shadow: Annotated[list[ModelInShadow], _said("Challengers.")]
    changing: Annotated[str, _said("The change of models that goes on; empty where none does.")]
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
