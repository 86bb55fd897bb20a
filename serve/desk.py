"""Rules and lists as the API manages them: what is posted is checked, journalled with its author and why, and in force.

A change is an action in the journal, given to the rule book under the service's lock: the next transaction is decided by it.
"""

import re
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from seqfraud.canonical import EARLIEST_MS, LATEST_MS, canonical_text, time_ms
from seqfraud.errors import RequestError, RunError
from serve.decoding import Limits, decode_object
from serve.engine import Engine
from serve.expressions import nearest
from serve.hits import rule_hits
from serve.lists import NamedList, stored_value
from serve.records import ActionRecord
from serve.rule_bodies import (
    MAX_ENTRIES,
    PAGE,
    Change,
    DraftPosted,
    EntriesPosted,
    EntryCounts,
    EntryPosted,
    EntryShown,
    Gone,
    History,
    ListInForce,
    ListPage,
    ListPosted,
    Lists,
    RuleInForce,
    RulePosted,
    Rules,
    ValuesPosted,
    Why,
)
from serve.rulebook import (
    Added,
    EntriesAdded,
    EntriesRemoved,
    ListChange,
    ListDeleted,
    ListPut,
    Rule,
    RuleChange,
    RuleDefinition,
    RuleDeleted,
    RulePut,
    decode_list_change,
    decode_rule_change,
    encode_change,
)

__all__ = ["NAME", "Desk", "Office"]

MOST_RULES = 500
MOST_LISTS = 100
MOST_ENTRIES = 5_000_000
"""Of all lists together."""
SHOWN_VALUES = 100

NAME = r"^(?!test$)[a-z][a-z0-9_-]{0,63}$"
"""Of a rule or a list; `/v1/rules/test` is an address of its own."""
_NAME = re.compile(NAME)
_NAME_WORDS = "a letter a-z, then at most 63 of a-z, 0-9, - and _, but not `test`"

_WHY = {"why": "a text that says why"}
_RULE = msgspec.json.Decoder(RulePosted)
_RULE_WORDS = {
    "expression": "a condition, such as amount > 100 && count_1h > 3",
    "decision": "approve, review or decline",
    **_WHY,
    "enabled": "true or false",
    "priority": "an integer from 0 to 1,000,000",
    "words": "a text",
}
_DELETED = msgspec.json.Decoder(Why)
_LIST = msgspec.json.Decoder(ListPosted)
_LIST_WORDS = {"kind": "allow or block", "field": "a column that holds texts, or the user", **_WHY}
_ENTRIES = msgspec.json.Decoder(EntriesPosted)
_ENTRIES_WORDS = {"entries": 'an array of {"value", "expires"}', **_WHY}
_VALUES = msgspec.json.Decoder(ValuesPosted)
_VALUES_WORDS = {"values": "an array of texts or numbers", **_WHY}
_TEST = msgspec.json.Decoder(DraftPosted)
_TEST_WORDS = {
    "expression": _RULE_WORDS["expression"],
    "decision": _RULE_WORDS["decision"],
    "last": "an integer from 1 to 100,000",
}
_ENTRY_WORDS = "ISO 8601, or milliseconds since 1970, or null"


class Office(Protocol):
    """What stores actions: the service."""

    engine: Engine
    """Of the bundle in force."""

    def act(self, kind: str, author: str, body: bytes, require: Callable[[], None] = ...) -> ActionRecord:
        """Store what somebody did and fold it, under the lock."""

    def actions(self, kind: str) -> list[ActionRecord]:
        """What was done of a kind, in order, under the lock."""

    def reading(self) -> threading.RLock:
        """The lock under which the book may be read."""


class Desk:
    """See the module. Every method takes and gives JSON, and raises RequestError for what it refuses."""

    def __init__(self, office: Office, engine: Engine, limits: Limits, state: Path) -> None:
        """`engine`: whose rules they are."""
        manifest = engine.bundle.manifest
        self._engine = engine
        self._office = office
        self._book = engine.rules
        self._schema = manifest.schema
        self._window = manifest.serve.window
        self._hide = engine.identifiers
        self._limits = limits
        self._decoder = engine.decoder
        self._state = state
        self._testing = threading.Lock()
        self._encode = msgspec.json.Encoder().encode
        self.list_fields = tuple(dict.fromkeys((self._schema.user, *self._schema.texts)))
        """Columns that a list may be of."""

    # ---- rules

    def rules(self) -> bytes:
        """Every rule, in their order."""
        with self._office.reading():
            held = sorted(self._book.rules.values(), key=lambda r: (r.definition.priority, r.name))
            shown = [_rule(rule) for rule in held]
        return self._encode(Rules(shown))

    def rule(self, name: str) -> bytes:
        """One rule."""
        with self._office.reading():
            return self._encode(_rule(self._known_rule(name)))

    def put_rule(self, name: str, body: bytes, author: str) -> bytes:
        """Make or change a rule."""
        _check_name(name)
        posted = decode_object(body, _RULE, _RULE_WORDS)
        why = self._why(posted.why)
        self._limits.check_text(posted.words, "words")
        expression = self._book.language.compile(posted.expression)
        words = self._hide.without_cards(posted.words)
        definition = RuleDefinition(expression.text, posted.decision, posted.enabled, posted.priority, words)

        def require() -> None:
            if name not in self._book.rules and len(self._book.rules) >= MOST_RULES:
                raise RequestError(409, "conflict", f"there are {MOST_RULES} rules; expected fewer: delete one first")

        self._change_rules(RulePut(name, definition, why), author, require)
        return self.rule(name)

    def delete_rule(self, name: str, body: bytes, author: str) -> bytes:
        """Delete a rule."""
        why = self._why(decode_object(body, _DELETED, _WHY).why)

        def require() -> None:
            self._known_rule(name)

        self._change_rules(RuleDeleted(name, why), author, require)
        return self._encode(Gone(name))

    def rule_history(self, name: str) -> bytes:
        """Every change of a rule."""
        changes = []
        for action in self._office.actions("rule"):
            change = decode_rule_change(action.body)
            if change.name == name:
                changes.append(_rule_change(action, change))
        if not changes:
            raise _unknown("rule", name)
        return self._encode(History(name, changes))

    def test_rule(self, body: bytes) -> bytes:
        """What a draft would have hit among the newest transactions; scoring goes on meanwhile."""
        posted = decode_object(body, _TEST, _TEST_WORDS)
        expression = self._book.language.compile(posted.expression)
        if not self._testing.acquire(blocking=False):
            raise RequestError(503, "busy", "another rule is being tested; ask again", retry_after=5)
        try:
            tested = rule_hits(
                self._state, self._decoder, self._book.facts, self._window, expression, posted.decision, posted.last
            )
        except RunError as error:
            raise RequestError(503, "storage_unavailable", "the journal cannot be read now") from error
        finally:
            self._testing.release()
        return self._encode(tested)

    def _change_rules(self, change: RuleChange, author: str, require: Callable[[], None]) -> None:
        self._act("rule", author, encode_change(change), require)

    def _known_rule(self, name: str) -> Rule:
        rule = self._book.rules.get(name)
        if rule is None:
            raise _unknown("rule", name)
        return rule

    # ---- lists

    def lists(self) -> bytes:
        """Every list, in their order."""
        with self._office.reading():
            held = sorted(self._book.lists.values(), key=lambda x: (x.kind != "allow", x.name))
            shown = [self._list(one) for one in held]
        return self._encode(Lists(shown))

    def list(self, name: str, offset: int) -> bytes:
        """One list and a page of its entries."""
        with self._office.reading():
            held = self._known_list(name)
            some = list(islice(held.entries.items(), offset, offset + PAGE))
            after = offset + len(some)
            page = ListPage(
                about=self._list(held),
                entries=[EntryShown(value, e.expires, e.at, e.author, e.why) for value, e in some],
                next=after if after < len(held.entries) else None,
            )
        return self._encode(page)

    def put_list(self, name: str, body: bytes, author: str) -> bytes:
        """Make a list; kind and field of one that is there stay."""
        _check_name(name)
        posted = decode_object(body, _LIST, _LIST_WORDS)
        why = self._why(posted.why)
        if posted.field not in self.list_fields:
            near = nearest(posted.field, self.list_fields)
            raise _refused("field", f"{posted.field!r:.60}", f"{_LIST_WORDS['field']}{near}")

        def require() -> None:
            held = self._book.lists.get(name)
            if held is None and len(self._book.lists) >= MOST_LISTS:
                raise RequestError(409, "conflict", f"there are {MOST_LISTS} lists; expected fewer: delete one first")
            if held is not None and (held.kind, held.field) != (posted.kind, posted.field):
                message = f"this list is for {held.kind} and {held.field}; delete it first to make another of this name"
                raise RequestError(409, "conflict", message)

        self._change_lists(ListPut(name, posted.kind, posted.field, why), author, require)
        with self._office.reading():
            return self._encode(self._list(self._known_list(name)))

    def delete_list(self, name: str, body: bytes, author: str) -> bytes:
        """Delete a list with its entries."""
        why = self._why(decode_object(body, _DELETED, _WHY).why)

        def require() -> None:
            self._known_list(name)

        self._change_lists(ListDeleted(name, why), author, require)
        return self._encode(Gone(name))

    def add_entries(self, name: str, body: bytes, author: str) -> bytes:
        """Put values on a list, all or none."""
        posted = decode_object(body, _ENTRIES, _ENTRIES_WORDS)
        why = self._why(posted.why)
        _check_count(len(posted.entries))
        with self._office.reading():
            field = self._known_list(name).field
        added = [self._entry(field, entry, i) for i, entry in enumerate(posted.entries)]
        values = {entry.value for entry in added}
        counts = EntryCounts(0, 0, 0, 0, 0)

        def require() -> None:
            held = self._same_list(name, field)
            counts.changed = sum(value in held.entries for value in values)
            counts.new = len(values) - counts.changed
            if sum(len(one.entries) for one in self._book.lists.values()) + counts.new > MOST_ENTRIES:
                raise RequestError(409, "conflict", f"the lists would hold more than {MOST_ENTRIES:,} entries together")
            counts.entries = len(held.entries) + counts.new

        self._change_lists(EntriesAdded(name, added, why), author, require)
        return self._encode(counts)

    def remove_entries(self, name: str, body: bytes, author: str) -> bytes:
        """Take values off a list; those that are not on it are counted."""
        posted = decode_object(body, _VALUES, _VALUES_WORDS)
        why = self._why(posted.why)
        _check_count(len(posted.values))
        with self._office.reading():
            field = self._known_list(name).field
        values = list(dict.fromkeys(self._value(field, v, f"values[{i}]") for i, v in enumerate(posted.values)))
        counts = EntryCounts(0, 0, 0, 0, 0)

        def require() -> None:
            held = self._same_list(name, field)
            counts.removed = sum(value in held.entries for value in values)
            counts.unknown = len(values) - counts.removed
            counts.entries = len(held.entries) - counts.removed

        self._change_lists(EntriesRemoved(name, values, why), author, require)
        return self._encode(counts)

    def list_history(self, name: str) -> bytes:
        """Every change of a list."""
        changes = []
        for action in self._office.actions("list"):
            change = decode_list_change(action.body)
            if change.name == name:
                changes.append(_list_change(action, change))
        if not changes:
            raise _unknown("list", name)
        return self._encode(History(name, changes))

    def _change_lists(self, change: ListChange, author: str, require: Callable[[], None]) -> None:
        self._act("list", author, encode_change(change), require)

    def _act(self, kind: str, author: str, body: bytes, require: Callable[[], None]) -> None:
        def still() -> None:
            if self._office.engine is not self._engine:
                raise RequestError(409, "conflict", "another model came into force meanwhile; ask again")
            require()

        self._office.act(kind, author, body, still)

    def _known_list(self, name: str) -> NamedList:
        held = self._book.lists.get(name)
        if held is None:
            raise _unknown("list", name)
        return held

    def _same_list(self, name: str, field: str) -> NamedList:
        """The list whose field the values were made for, if it did not become another one meanwhile."""
        held = self._known_list(name)
        if held.field != field:
            raise RequestError(409, "conflict", "the list was made anew meanwhile; ask again")
        return held

    def _list(self, held: NamedList) -> ListInForce:
        at, author, why = self._book.said[held.name]
        return ListInForce(held.name, held.kind, held.field, len(held.entries), at, author, why)

    def _entry(self, field: str, entry: EntryPosted, i: int) -> Added:
        value = self._value(field, entry.value, f"entries[{i}].value")
        return Added(value, None if entry.expires is None else _expires(entry.expires, i))

    def _value(self, field: str, value: str | int | float | bool, where: str) -> str:
        text = canonical_text(value)
        self._limits.check_text(text, where)
        return stored_value(self._schema, self._hide, field, text, where)

    def _why(self, why: str) -> str:
        self._limits.check_text(why, "why")
        if not why.strip(" "):
            raise _refused("why", f"{why!r}", _WHY["why"])
        return self._hide.without_cards(why)


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise _refused("name", f"{name!r:.70}", _NAME_WORDS)


def _check_count(count: int) -> None:
    if count > MAX_ENTRIES:
        raise RequestError(413, "batch_too_large", f"{count} values; at most {MAX_ENTRIES} per request")
    if not count:
        raise _refused("entries", "none", "at least one value")


def _expires(value: str | int, i: int) -> int:
    try:
        time = time_ms(value, "iso" if isinstance(value, str) else "ms")
    except (ValueError, OverflowError):
        time = LATEST_MS
    if not EARLIEST_MS <= time < LATEST_MS:
        raise _refused(f"entries[{i}].expires", f"{value!r:.60}", _ENTRY_WORDS)
    return time


def _rule(rule: Rule) -> RuleInForce:
    d = rule.definition
    return RuleInForce(
        rule.name, d.expression, d.decision, d.enabled, d.priority, d.words,
        rule.at, rule.author, rule.why, rule.matched, rule.failed, rule.broken,
    )  # fmt: skip


def _rule_change(action: ActionRecord, change: RuleChange) -> Change:
    put = change.rule if isinstance(change, RulePut) else None
    return Change(
        action.seq, action.at, action.author, "put" if put else "delete", change.why, put, None, None, 0, []
    )  # fmt: skip


def _list_change(action: ActionRecord, change: ListChange) -> Change:
    said = Change(action.seq, action.at, action.author, "delete", change.why, None, None, None, 0, [])
    if isinstance(change, ListPut):
        said.do, said.kind, said.field = "put", change.kind, change.field
    elif isinstance(change, EntriesAdded | EntriesRemoved):
        added = isinstance(change, EntriesAdded)
        values = [entry.value for entry in change.entries] if isinstance(change, EntriesAdded) else change.values
        said.do, said.count, said.values = "add" if added else "remove", len(values), values[:SHOWN_VALUES]
    return said


def _unknown(what: str, name: str) -> RequestError:
    return RequestError(404, f"unknown_{what}", f"there is no {what} of the name {name!r:.70}")


def _refused(field: str, seen: str, expected: str) -> RequestError:
    return RequestError(422, "invalid_field", f"{field}: {seen}; expected {expected}", field)
