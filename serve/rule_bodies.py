"""What is posted to rules and lists and what they answer, as types; the API's description is made from them."""

from typing import Annotated, Any, Literal

import msgspec

from seqfraud.policy import Decision
from serve.expressions import LONGEST
from serve.lists import ListKind
from serve.rulebook import RuleDefinition

__all__ = [
    "Change",
    "DraftPosted",
    "EntriesPosted",
    "EntryCounts",
    "EntryPosted",
    "EntryShown",
    "Gone",
    "History",
    "Hits",
    "ListInForce",
    "ListPage",
    "ListPosted",
    "Lists",
    "RuleInForce",
    "RulePosted",
    "RuleTest",
    "Rules",
    "ValuesPosted",
    "Why",
]

MAX_ENTRIES = 10_000
"""Of one request."""
PAGE = 1000


def _said(description: str, **constraints: Any) -> msgspec.Meta:
    return msgspec.Meta(description=description, extra_json_schema=constraints or None)


_WHY = "Kept with the change, for whoever asks later."
Reasoned = Annotated[str, _said(_WHY, minLength=1)]
Expression = Annotated[str, _said("A condition; see docs/rules.md.", minLength=1, maxLength=LONGEST, format="cel")]
_LARGEST = 10**18
Value = (
    str
    | Annotated[int, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[float, msgspec.Meta(ge=-1e18, le=1e18)]
    | bool
)


# ---- requests


class RulePosted(msgspec.Struct, forbid_unknown_fields=True):
    """A rule, and why it is made or changed."""

    expression: Expression
    decision: Annotated[Decision, _said("At least this strict; approve: approved.")]
    why: Reasoned
    enabled: Annotated[bool, _said("A draft is kept, not evaluated.")] = False
    priority: Annotated[int, msgspec.Meta(ge=0, le=1_000_000, description="Lower comes first.")] = 100
    words: Annotated[str, _said("The reason in an answer; empty: the expression.")] = ""


class Why(msgspec.Struct, forbid_unknown_fields=True):
    """Why something is deleted."""

    why: Reasoned


class ListPosted(msgspec.Struct, forbid_unknown_fields=True):
    """A list, and why it is made."""

    kind: ListKind
    field: Annotated[str, _said("A column that holds texts, or the user.")]
    why: Reasoned


class EntryPosted(msgspec.Struct, forbid_unknown_fields=True):
    """A value for a list."""

    value: Annotated[Value, _said("As in a transaction; of a column with IP addresses also a network.")]
    expires: Annotated[
        str | int | None, _said("ISO 8601, or milliseconds since 1970: not for transactions from then on.")
    ] = None


class EntriesPosted(msgspec.Struct, forbid_unknown_fields=True):
    """Values for a list, and why."""

    entries: list[EntryPosted]
    why: Reasoned


class ValuesPosted(msgspec.Struct, forbid_unknown_fields=True):
    """Values to take off a list, and why."""

    values: list[Value]
    why: Reasoned


class DraftPosted(msgspec.Struct, forbid_unknown_fields=True):
    """A draft to be tested."""

    expression: Expression
    decision: Decision = "review"
    last: Annotated[int, msgspec.Meta(ge=1, le=100_000, description="How many of the newest transactions.")] = 100_000


# ---- answers


class RuleInForce(msgspec.Struct):
    """A rule as it stands."""

    name: str
    expression: str
    decision: Decision
    enabled: bool
    priority: int
    words: str
    at: Annotated[int, _said("Milliseconds since 1970 of its newest change.")]
    author: Annotated[str, _said("The id of an API key; anonymous where there are none.")]
    why: str
    matched: Annotated[int, _said("Transactions since the start.", minimum=0)]
    failed: Annotated[int, _said("Evaluations since the start that a missing value made fail.", minimum=0)]
    broken: Annotated[str, _said("Why it cannot be evaluated with this bundle; empty where it can.")]


class Rules(msgspec.Struct):
    """All rules in their order."""

    rules: list[RuleInForce]


class ListInForce(msgspec.Struct):
    """A list as it stands."""

    name: str
    kind: ListKind
    field: str
    entries: Annotated[int, _said("How many, expired ones among them.", minimum=0)]
    at: Annotated[int, _said("Milliseconds since 1970.")]
    author: str
    why: str


class Lists(msgspec.Struct):
    """All lists in their order."""

    lists: list[ListInForce]


class EntryShown(msgspec.Struct):
    """An entry of a list, its value as it is stored."""

    value: str
    expires: int | None
    at: int
    author: str
    why: str


class ListPage(msgspec.Struct):
    """A list and some of its entries."""

    about: ListInForce
    entries: Annotated[list[EntryShown], _said("At most a thousand, in the order in which they came.")]
    next: Annotated[int | None, _said("`offset` of the next page; null at the end.")]


class EntryCounts(msgspec.Struct):
    """What became of values that were posted, and how many the list then has."""

    new: int
    changed: int
    removed: int
    unknown: int
    entries: int


class Gone(msgspec.Struct):
    """What was deleted."""

    name: str


class Change(msgspec.Struct):
    """One change: who, when, why; what a rule said from then on, or values of a list (the first hundred)."""

    seq: Annotated[int, _said("Its place among transactions, labels and other changes.", minimum=1)]
    at: int
    author: str
    do: Literal["put", "delete", "add", "remove"]
    why: str
    rule: RuleDefinition | None
    kind: ListKind | None
    field: str | None
    count: Annotated[int, _said("Values that were added or removed.", minimum=0)]
    values: list[str]


class History(msgspec.Struct):
    """Every change of a name, oldest first."""

    name: str
    changes: list[Change]


class Hits(msgspec.Struct):
    """How many, and their amounts together."""

    transactions: Annotated[int, _said("How many.", minimum=0)]
    amount: float


class RuleTest(msgspec.Struct):
    """What a rule would have hit among the newest transactions."""

    words: str
    expression: str
    examined: Annotated[int, _said("Transactions that were gone over.", minimum=0)]
    since: Annotated[int | None, _said("Time of the first of them, milliseconds since 1970.")]
    hits: Hits
    fraud: Annotated[Hits, _said("Hits whose label says fraud.")]
    honest: Annotated[Hits, _said("Hits whose label says honest.")]
    unknown: Annotated[Hits, _said("Hits without a label.")]
    not_caught: Annotated[Hits, _said("Hits that were approved then.")]
    fraud_not_caught: Annotated[Hits, _said("Frauds among those.")]
    all_fraud: Annotated[Hits, _said("Frauds among all that were gone over.")]
    changed: Annotated[int, _said("Decisions that this rule alone would have changed.", minimum=0)]
    failed: Annotated[int, _said("Evaluations that a missing value made fail; they hit nothing.", minimum=0)]
    complete: Annotated[bool, _said("False where the time was over before all were gone over.")]
    seconds: float
