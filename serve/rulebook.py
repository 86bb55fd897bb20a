"""The rules and lists in force: a fold of the journal's actions of the kinds `rule` and `list`, and what they decide.

Order: allow lists, then block lists, then rules by priority. The first allow list with a value of the transaction approves
it, the first block list declines it, whatever the model said, and nothing after is looked at. Rules may only make the
decision stricter, unless one says `approve` itself: the first such rule that is true ends the walk, and approves where no
stricter rule came before it.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from seqfraud.bundle import Manifest
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.policy import DECISIONS, Decision
from serve.answers import Reason
from serve.expressions import Expression, Language, Value, activation, ever_true, holds
from serve.facts import Case, Facts, Getter
from serve.lists import Entry, ListKind, NamedList
from serve.records import ActionRecord

__all__ = ["KINDS", "Added", "Rule", "RuleBook", "RuleDefinition", "Ruling", "encode_change"]

_log = logging.getLogger(__name__)

KINDS = ("rule", "list")
TOGETHER = 16
"""Rules that are evaluated in one call before any is alone."""


class RuleDefinition(msgspec.Struct, frozen=True):
    """What a rule says. Lower priorities come first; a draft is not evaluated. `words` are the reason, for people."""

    expression: str
    decision: Decision
    enabled: bool = False
    priority: int = 100
    words: str = ""


class Added(msgspec.Struct, frozen=True):
    """A stored value that is put on a list, until `expires` (ms)."""

    value: str
    expires: int | None = None


# what the journal holds, one body per action


class RulePut(msgspec.Struct, frozen=True, tag_field="do", tag="put"):
    """A rule is made or changed."""

    name: str
    rule: RuleDefinition
    why: str


class RuleDeleted(msgspec.Struct, frozen=True, tag_field="do", tag="delete"):
    """A rule is gone."""

    name: str
    why: str


class ListPut(msgspec.Struct, frozen=True, tag_field="do", tag="put"):
    """A list is made, or said anew."""

    name: str
    kind: ListKind
    field: str
    why: str


class ListDeleted(msgspec.Struct, frozen=True, tag_field="do", tag="delete"):
    """A list is gone, with its entries."""

    name: str
    why: str


class EntriesAdded(msgspec.Struct, frozen=True, tag_field="do", tag="add"):
    """Values are put on a list."""

    name: str
    entries: list[Added]
    why: str


class EntriesRemoved(msgspec.Struct, frozen=True, tag_field="do", tag="remove"):
    """Values are taken off a list."""

    name: str
    values: list[str]
    why: str


RuleChange = RulePut | RuleDeleted
ListChange = ListPut | ListDeleted | EntriesAdded | EntriesRemoved
encode_change = msgspec.json.Encoder().encode
decode_rule_change = msgspec.json.Decoder(RuleChange).decode
decode_list_change = msgspec.json.Decoder(ListChange).decode


@dataclass(slots=True)
class Rule:
    """A rule as it stands: since when (ms), by whom and why; how often it was true, and failed, since the start."""

    name: str
    definition: RuleDefinition
    at: int
    author: str
    why: str
    matched: int = 0
    failed: int = 0
    broken: str = ""
    """Why it cannot be evaluated with this bundle; it then never matches."""


@dataclass(slots=True, frozen=True)
class Ruling:
    """What rules and lists make of a decision, and the reasons that they add."""

    decision: Decision
    reasons: list[Reason]


@dataclass(slots=True, frozen=True)
class _Group:
    """Rules with their programs; `any` is false where all are, None where it could not be made."""

    rules: tuple[tuple[Rule, Any], ...]
    any: Any | None


@dataclass(slots=True, frozen=True)
class _Plan:
    getters: list[tuple[str, Getter]]
    groups: list[_Group]


class RuleBook:
    """See the module. Not thread-safe: the service's lock is around it."""

    def __init__(self, manifest: Manifest, identifiers: Identifiers) -> None:
        self.language = Language(manifest, identifiers)
        self.facts = Facts(manifest, self.language)
        self._schema = manifest.schema
        self.rules: dict[str, Rule] = {}
        self.lists: dict[str, NamedList] = {}
        self.said: dict[str, tuple[int, str, str]] = {}
        """When (ms), by whom and why each list was made."""
        self.seq = 0
        """Of the newest action."""
        self.active = False
        """Whether anything can change a decision."""
        self._walked: list[NamedList] = []
        """The lists that hold something, in the order in which they are asked."""
        self._plan: _Plan | None = None
        self._expressions: dict[str, Expression] = {}
        """Compiled, by their text; and groups of them, by their sources: what a change leaves as it was."""
        self._made: dict[tuple[str, ...], Any | None] = {}

    @classmethod
    def as_of(cls, manifest: Manifest, identifiers: Identifiers, actions: Iterable[ActionRecord]) -> "RuleBook":
        """The book after some actions in the journal's order, those of other kinds among them."""
        book = cls(manifest, identifiers)
        for action in actions:
            book.fold(action)
        return book

    def fold(self, action: ActionRecord) -> None:
        """Take in what somebody did."""
        self.seq = action.seq
        try:
            if action.kind == "rule":
                self._fold_rule(decode_rule_change(action.body), action)
            elif action.kind == "list":
                self._fold_list(decode_list_change(action.body), action)
        except msgspec.MsgspecError:
            _log.error("record %d of the journal changes rules in a way that this version does not know", action.seq)
        self._walked = sorted((x for x in self.lists.values() if x.entries), key=lambda x: (x.kind != "allow", x.name))
        self.active = bool(self._walked) or any(rule.definition.enabled for rule in self.rules.values())

    def _fold_rule(self, change: RuleChange, action: ActionRecord) -> None:
        self._plan = None
        if isinstance(change, RuleDeleted):
            self.rules.pop(change.name, None)
        else:
            self.rules[change.name] = Rule(change.name, change.rule, action.at, action.author, change.why)

    def _fold_list(self, change: ListChange, action: ActionRecord) -> None:
        name = change.name
        if isinstance(change, ListDeleted):
            self.lists.pop(name, None)
            self.said.pop(name, None)
        elif isinstance(change, ListPut):
            if name not in self.lists:
                self.lists[name] = NamedList(name, change.kind, change.field, change.field in self._schema.ip)
            self.said[name] = (action.at, action.author, change.why)
        elif (held := self.lists.get(name)) is None:
            return
        elif isinstance(change, EntriesRemoved):
            for value in change.values:
                held.remove(value)
        else:
            shared: dict[int | None, Entry] = {}
            for added in change.entries:
                entry = shared.get(added.expires)
                if entry is None:
                    entry = shared[added.expires] = Entry(added.expires, change.why, action.at, action.author)
                held.add(added.value, entry)

    # ---- deciding

    def decide(self, decision: Decision, case: Case) -> Ruling:
        """What becomes of the model's decision on a transaction."""
        for held in self._walked:
            entry = held.match(case.text(held.field), case.transaction.time)
            if entry is not None:
                held.matched += 1
                words = f"{held.field} is on the {held.kind} list {held.name}: {entry.why}"
                reason = Reason(f"list:{held.name}", words, None)
                return Ruling("approve" if held.kind == "allow" else "decline", [reason])
        reasons: list[Reason] = []
        strictest = DECISIONS.index(decision)
        for rule in self._true_rules(case):
            wanted = DECISIONS.index(rule.definition.decision)
            if wanted == 0:
                if reasons:
                    break
                return Ruling("approve", [_reason(rule)])
            strictest = max(strictest, wanted)
            reasons.append(_reason(rule))
        return Ruling(DECISIONS[strictest], reasons)

    def _true_rules(self, case: Case) -> list[Rule]:
        """The enabled rules that are true of a transaction, in their order."""
        plan = self._plan or self._planned()
        if not plan.groups:
            return []
        values = activation(values_of(plan.getters, case))
        found: list[Rule] = []
        for group in plan.groups:
            if group.any is not None and holds(group.any, values) is False:
                continue
            for rule, program in group.rules:
                said = holds(program, values)
                if said is None:
                    rule.failed += 1
                elif said:
                    rule.matched += 1
                    found.append(rule)
        return sorted(found, key=lambda rule: (rule.definition.priority, rule.name))

    def broken(self) -> dict[str, str]:
        """The enabled rules that cannot be evaluated with this bundle, and why."""
        plan = self._planned()
        works = {rule.name for group in plan.groups for rule, _ in group.rules}
        return {
            rule.name: rule.broken for rule in self.rules.values() if rule.definition.enabled and rule.name not in works
        }

    def count_on(self, book: "RuleBook") -> None:
        """Go on with the counts of another book for what both have alike."""
        for rule in self.rules.values():
            before = book.rules.get(rule.name)
            if before is not None and before.at == rule.at:
                rule.matched, rule.failed = before.matched, before.failed
        for held in self.lists.values():
            if held.name in book.lists:
                held.matched = book.lists[held.name].matched

    def _planned(self) -> _Plan:
        """Compile what is enabled; programs of groups that were there before are kept."""
        compiled: list[tuple[Rule, Expression]] = []
        names: set[str] = set()
        for rule in self.rules.values():
            if not rule.definition.enabled:
                continue
            text = rule.definition.expression
            try:
                expression = self._expressions.get(text) or self.language.compile(text)
            except RequestError as error:
                if not rule.broken:
                    _log.warning("the rule %s cannot be evaluated with this bundle: %s", rule.name, error)
                rule.broken = str(error)
                continue
            compiled.append((rule, expression))
            names |= expression.names
        groups, made = [], {}
        for begin in range(0, len(compiled), TOGETHER):
            some = compiled[begin : begin + TOGETHER]
            sources = tuple(expression.source for _, expression in some)
            if len(some) > 1:
                made[sources] = self._made[sources] if sources in self._made else ever_true(sources)
            groups.append(_Group(tuple((r, e.program) for r, e in some), made.get(sources)))
        self._made, self._expressions = made, {r.definition.expression: e for r, e in compiled}
        self._plan = _Plan(self.facts.getters(names), groups)
        return self._plan


def values_of(getters: list[tuple[str, Getter]], case: Case) -> dict[str, Value]:
    """Values by name; what is missing is not there."""
    return {name: value for name, get in getters if (value := get(case)) is not None}


def _reason(rule: Rule) -> Reason:
    return Reason(f"rule:{rule.name}", rule.definition.words or rule.definition.expression, None)
