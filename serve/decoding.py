"""JSON of a transaction to what the scorer needs; the decoder is made from the bundle's schema.

What a client may send is checked here and nowhere else, in three layers: JSON and types (msgspec), names that stand twice
in an object (msgspec takes the last without a word), and the limits of `InputSettings`. What was accepted once is read back
without the limits: they may have become tighter since.
"""

import difflib
import json
import math
import re
import time as clock_time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec

from seqfraud.bundle import Manifest
from seqfraud.canonical import (
    EARLIEST_MS,
    LARGEST_NUMBER,
    LATEST_MS,
    TIME_WORDS,
    canonical_text,
    content_digest,
    network_of,
    time_ms,
)
from seqfraud.config import DAY_MS, Duration, Instant, TimeUnit, format_instant
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.schema import Schema
from seqfraud.vocabulary import UNSEEN
from serve.records import TransactionRecord

Text = str | int | float | bool | None
Number = Annotated[float, msgspec.Meta(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=LARGEST_NUMBER)]
NUMBER_AS_TEXT = r"^[ \t\r\n]*-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?[ \t\r\n]*$"
NumberText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": NUMBER_AS_TEXT})]

SHOWN = 60
"""Characters of a value that a message repeats."""

NO_CONTROL_CHARACTERS = "^[^\\u0000-\\u001f\\u007f-\\u009f]*$"

_ID_WORDS = "a string that is not empty or an integer"
_NUMBER_WORDS = f"a number between {-LARGEST_NUMBER:g} and {LARGEST_NUMBER:g}"
_NOT_NEGATIVE_WORDS = f"a number between 0 and {LARGEST_NUMBER:g}"
_TEXT_WORDS = "a string, a number, true, false or null"


@dataclass(frozen=True)
class InputSettings:
    """What is taken of what a client sends: `[input]`.

    - earliest: times before it are refused, also as `known_at`; most are in another unit than the bundle's.
    - latest_ahead: how far ahead of this machine's clock a time may be, also as `known_at`. One transaction from far in
      the future makes every later one of its user late, and lets its entities' counters decay for good.
    - longest_text: characters of an id, a user, a text or the source of a label.
    - control_characters: whether such texts may hold some (U+0000 to U+001F, U+007F to U+009F).
    - numbers_as_text: whether `"12.5"` is taken where the number 12.5 is due.
    - max_labels: of one request.
    """

    earliest: Instant = Instant(0)
    latest_ahead: Duration = Duration(DAY_MS)
    longest_text: int = 256
    control_characters: bool = False
    numbers_as_text: bool = False
    max_labels: int = 10_000

    def __post_init__(self) -> None:
        for key in ("longest_text", "max_labels"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; expected 1 or more")


def _now_ms() -> int:
    return clock_time.time_ns() // 1_000_000


class Limits:
    """The settings against what came: each method raises RequestError 422 for what is beyond them."""

    _CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

    def __init__(self, settings: InputSettings | None = None, now: Callable[[], int] = _now_ms) -> None:
        settings = settings or InputSettings()
        self.settings = settings
        self._longest = settings.longest_text
        self._earliest = max(settings.earliest, EARLIEST_MS)
        self._now = now
        self._latest = EARLIEST_MS
        """What was the latest time allowed when the clock was last asked: it only moves on."""

    def check_texts(self, texts: Sequence[str | None], fields: Sequence[str]) -> None:
        """Ids, users and texts, None where missing; quick where they are short and printable all together."""
        joined = "".join([text for text in texts if text])
        if len(joined) > self._longest or not joined.isprintable():
            for text, field in zip(texts, fields, strict=True):
                if text is not None:
                    self.check_text(text, field)

    def check_text(self, text: str, field: str) -> None:
        """An id, a user, a text."""
        if len(text) > self._longest:
            message = f"{field}: {len(text)} characters; expected at most {self._longest} (input.longest_text)"
            raise RequestError(422, "invalid_field", message, field)
        found = self._CONTROL.search(text)
        if found is not None and not self.settings.control_characters:
            message = f"{field}: {text!r:.60} has the control character U+{ord(found[0]):04X}; expected none"
            raise RequestError(422, "invalid_field", message, field)

    def text_schema(self) -> dict[str, Any]:
        """What `check_text` takes, in JSON schema."""
        pattern = {} if self.settings.control_characters else {"pattern": NO_CONTROL_CHARACTERS}
        return {"maxLength": self._longest, **pattern}

    def check_time(self, time: int, seen: object, field: str) -> None:
        """Milliseconds, spelled `seen`."""
        if self._earliest <= time <= self._latest:
            return
        if time < self._earliest:
            words = f"not before {format_instant(self._earliest)} (input.earliest)"
        else:
            self._latest = min(self._now() + self.settings.latest_ahead, LATEST_MS - 1)
            if time <= self._latest:
                return
            words = f"not after {format_instant(self._latest)} (the clock here and input.latest_ahead)"
        spelled = f" is {format_instant(time)}" if EARLIEST_MS <= time < LATEST_MS else ""
        raise RequestError(422, "invalid_field", f"{field}: {seen!r:.60}{spelled}; expected a time {words}", field)

    def nearest_time(self, time: int) -> int:
        """A time that is taken now, as near as may be."""
        return max(self._earliest, min(time, self._now() + self.settings.latest_ahead, LATEST_MS - 1))

    def time_schema(self, unit: TimeUnit) -> dict[str, Any]:
        """What `check_time` takes at any moment, in JSON schema: the latest moves on with the clock and is not in it."""
        if unit == "iso":
            return {"format": "date-time"}
        per_unit = 1 if unit == "ms" else 1000
        return {"minimum": -(-self._earliest // per_unit), "exclusiveMaximum": LATEST_MS // per_unit}


@dataclass(slots=True, frozen=True)
class Transaction:
    """One decoded transaction, identifiers as they are stored.

    Attributes:
        shown_id: the id as the client sent it, for the answer.
        raw: JSON of the declared fields, as the journal keeps it.
        numbers: schema.numbers, NaN where missing.
        categories: C vocabulary ids.
        entities: E canonical texts, None where missing.
        content: identifies the declared content without the id.
        decoder: whose categories they are.
    """

    id: str
    shown_id: str
    user: str
    time: int
    numbers: list[float]
    categories: list[int]
    entities: list[str | None]
    amount: float
    content: bytes
    raw: bytes
    decoder: "TransactionDecoder" = field(compare=False, repr=False)


class TransactionDecoder:
    """Decodes and validates transactions of one bundle.

    Undeclared fields are ignored; a declared one that is missing, of the wrong type or beyond the limits is a RequestError
    422 that names it, and so is a name that stands twice; malformed JSON is a RequestError 400.
    """

    def __init__(
        self, manifest: Manifest, limits: Limits | None = None, identifiers: Identifiers | None = None
    ) -> None:
        """With `identifiers` what is decoded is hashed by them; what was stored needs none."""
        self.limits = limits or Limits()
        schema = manifest.schema
        self._schema = schema
        self._fields = schema.fields
        self._not_negative = {schema.amount} if manifest.cleaning.negative_amount != "keep" else set()
        optional = {*manifest.missing, *({schema.amount} - set(schema.numeric_inputs))}
        may_lack = optional if manifest.cleaning.missing_number == "keep" else set()
        as_text = self.limits.settings.numbers_as_text
        self.posted, self._words = _struct_of(schema, may_lack, self._not_negative, as_text)
        """The type of a posted transaction, from which the API's description is made too; and words for its fields."""
        self._json = msgspec.json.Decoder(self.posted)
        self._stored_json = msgspec.json.Decoder(_struct_of(schema, optional, set(), as_text)[0])
        self._encode = msgspec.json.Encoder().encode
        get = {column: f"f{i}" for i, column in enumerate(self._fields)}
        self._id = None if schema.transaction is None else get[schema.transaction]
        self._user, self._time = get[schema.user], get[schema.time]
        self._numbers = [get[c] for c in schema.numbers]
        self._texts = [get[c] for c in schema.texts]
        self._lookups: list[tuple[int, dict[str, int]]] = [
            (schema.texts.index(v.column), v.lookup()) for v in manifest.vocabularies
        ]
        plain: list[tuple[int, Callable[[str], str | None] | None]] = [
            (schema.texts.index(c), None) for c in schema.context
        ]
        self._entities = plain + [(schema.texts.index(c), network_of) for c in schema.ip]
        hide = identifiers or Identifiers(schema, manifest.identifiers, None)
        named = enumerate((schema.user, *schema.texts), start=-1)
        self._hashing = [(get[c], i, hide.shortest(c), f) for i, c in named if (f := hide.of(c)) is not None]
        self._hash_id = None if schema.transaction is None else hide.of(schema.transaction)
        self._amount = None if schema.amount is None else schema.numbers.index(schema.amount)
        self._named_texts = (schema.transaction or "", schema.user, *schema.texts)
        columns = (*schema.numbers, *(() if schema.time_unit == "iso" else (schema.time,)))
        self._spelled = [(get[c], c) for c in columns] if self.limits.settings.numbers_as_text else []

    def decode(self, body: bytes | msgspec.Raw) -> Transaction:
        """One transaction from JSON. Raises RequestError."""
        return self._transaction(self._row(bytes(body)), None)

    def decode_stored(self, record: TransactionRecord) -> Transaction:
        """One that was accepted once, perhaps with another bundle: what only this one's policy refuses is taken."""
        return self._transaction(self._parsed(record.raw, self._stored_json), record)

    def decode_again(self, transaction: Transaction) -> Transaction:
        """One that another bundle's decoder had decoded, over the same declared fields. Raises RequestError."""
        again = self._transaction(self._parsed(transaction.raw, self._json), transaction)
        return replace(again, shown_id=transaction.shown_id)

    def amount_of(self, transaction: Transaction) -> float | None:
        """The amount as it was posted: NaN where a transaction has none, None where the schema knows of none."""
        return None if self._amount is None else transaction.numbers[self._amount]

    def decode_batch(self, body: bytes) -> list[msgspec.Raw]:
        """The items of a JSON array, each to be decoded on its own. Raises RequestError."""
        return _items(body, "transactions")

    def _row(self, body: bytes) -> Any:
        """The declared fields of a request, each once. Raises RequestError."""
        _require_utf8(body)
        row = self._parsed(body, self._json)
        for name, column in self._spelled:
            if isinstance(getattr(row, name), str):
                setattr(row, name, self._number_of(getattr(row, name), column))
        if not self._has_each_once(row, body):
            _require_each_once(body)
        return row

    def _parsed(self, body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
        """JSON of the declared fields and their types. Raises RequestError."""
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _invalid_field(error, body, self._words, "the fields of one transaction") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise _invalid_json(error, body) from None

    def _has_each_once(self, row: Any, body: bytes) -> bool:
        """Whether a look that costs little already shows that no name stands twice.

        Every name is followed by a colon, and each field that has a value has one. If there are no more colons than that,
        apart from those in the text of an ISO time (escapes could hide some), nothing stands twice, nor inside of something.
        """
        values = msgspec.structs.astuple(row)
        colons = len(values) - values.count(None)
        time = getattr(row, self._time)
        if isinstance(time, str):
            if b"\\" in body:
                return False
            colons += time.count(":")
        return body.count(b":") == colons

    def _number_of(self, text: str, column: str) -> int | float:
        """A number that came as a text, spelled as JSON spells it."""
        kind: Any = NotNegative if column in self._not_negative else Number
        try:
            number = msgspec.json.decode(text, type=int | Number if column == self._schema.time else kind)
        except (msgspec.DecodeError, UnicodeEncodeError):
            raise _refused(column, f"{text!r:.{SHOWN}}", self._words[column]) from None
        return cast(int | float, number)

    def _transaction(self, row: Any, record: TransactionRecord | Transaction | None) -> Transaction:
        """What the scorer needs of a decoded row; what identifies it is in its record, where there is one."""
        seen = getattr(row, self._time)
        time = self._time_of(seen)
        user = text_of(getattr(row, self._user), self._schema.user)
        numbers = [math.nan if (x := getattr(row, name)) is None else x for name in self._numbers]
        texts = [None if (x := getattr(row, name)) is None or x == "" else canonical_text(x) for name in self._texts]
        if record is None:
            own_id = None if self._id is None else text_of(getattr(row, self._id), self._named_texts[0])
            self.limits.check_texts((own_id, user, *texts), self._named_texts)
            self.limits.check_time(time, seen, self._schema.time)
            user = self._hash(row, user, texts)
            content = content_digest(user, time, numbers, texts)
            identity = shown = content.hex() if own_id is None else own_id
            if self._id is not None and self._hash_id is not None:
                identity = self._hash_id(shown)
                setattr(row, self._id, identity)
            raw = self._encode(row)
        else:
            identity = shown = record.id
            content, raw = record.content, record.raw
        amount = 0.0 if self._amount is None else numbers[self._amount]
        return Transaction(
            id=identity,
            shown_id=shown,
            user=user,
            time=time,
            numbers=numbers,
            categories=[UNSEEN if (x := texts[i]) is None else ids.get(x, UNSEEN) for i, ids in self._lookups],
            entities=[x if (x := texts[i]) is None or fold is None else fold(x) for i, fold in self._entities],
            amount=0.0 if math.isnan(amount) else amount,
            content=content,
            raw=raw,
            decoder=self,
        )

    def _hash(self, row: Any, user: str, texts: list[str | None]) -> str:
        """Put the stored forms of identifiers into a row and its texts; the user's is returned."""
        stored_user = user
        for name, i, shortest, hashed in self._hashing:
            text = user if i < 0 else texts[i]
            if text is not None and len(text) >= shortest and (stored := hashed(text)) is not text:
                setattr(row, name, stored)
                if i < 0:
                    stored_user = stored
                else:
                    texts[i] = stored
        return stored_user

    def _time_of(self, value: str | int | float) -> int:
        column, unit = self._schema.time, self._schema.time_unit
        try:
            time = time_ms(value, unit)
        except (ValueError, OverflowError):
            raise _refused(column, f"{value!r:.{SHOWN}}", TIME_WORDS[unit]) from None
        if not EARLIEST_MS <= time < LATEST_MS:
            raise _refused(column, f"{value!r:.{SHOWN}}", f"{TIME_WORDS[unit]} within the years 1 to 9999")
        return time


def _struct_of(
    schema: Schema, optional: AbstractSet[str | None], not_negative: AbstractSet[str | None], as_text: bool
) -> tuple[type[msgspec.Struct], dict[str, str]]:
    """The type of a transaction in JSON, where field i of the schema is the attribute f{i}; and what to call each field."""
    types: list[tuple[str, Any, Any]] = []
    words: dict[str, str] = {}
    for i, column in enumerate(schema.fields):
        kind: Any = Text
        words[column] = _TEXT_WORDS
        required = False
        if column in (schema.user, schema.transaction):
            kind, words[column], required = str | int, _ID_WORDS, True
        elif column == schema.time:
            kind = str if schema.time_unit == "iso" else int | float
            kind = NumberText | kind if as_text and schema.time_unit != "iso" else kind
            words[column], required = TIME_WORDS[schema.time_unit], True
        elif column in schema.numbers:
            kind, words[column] = (
                (NotNegative, _NOT_NEGATIVE_WORDS) if column in not_negative else (Number, _NUMBER_WORDS)
            )
            kind = NumberText | kind if as_text else kind
            required = column not in optional
            if not required:
                kind, words[column] = kind | None, f"{words[column]}, or null"
        types.append((f"f{i}", kind, msgspec.field(name=column, default=msgspec.NODEFAULT if required else None)))
    # fields with a default have to come last
    types.sort(key=lambda t: t[2].default is not msgspec.NODEFAULT)
    return msgspec.defstruct("Transaction", types, gc=False), words


_raw_list = msgspec.json.Decoder(list[msgspec.Raw])
_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FIELD = re.compile(r" - at `\$\.(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.+)`", re.DOTALL)
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def text_of(value: str | int, field: str) -> str:
    """A user or transaction id as text. Raises RequestError for an empty one."""
    text = value if isinstance(value, str) else str(value)
    if not text:
        raise _refused(field, '""', _ID_WORDS)
    return text


def _refused(field: str, seen: str, expected: str, where: str = "") -> RequestError:
    return RequestError(422, "invalid_field", f"{where}{field}: {seen}; expected {expected}", field)


def _invalid_field(
    error: msgspec.ValidationError, body: bytes, words: Mapping[str, str], whole: str, where: str = ""
) -> RequestError:
    """422 that names the field of an object which msgspec refused, with the value as it was spelled.

    Args:
        words: by field, what is expected there.
        whole: what the object should hold.
        where: the object's place in the body.
    """
    named = [match[1] for match in (_MISSING.search(str(error)), _FIELD.search(str(error))) if match]
    # of what lies deeper, the field of the object that it is in
    named += [re.split(r"[.\[]", path, maxsplit=1)[0] for path in named[-1:]]
    field = next((name for name in named if name in words), None)
    if field is None:
        seen = _shown(body)
        return RequestError(422, "invalid_field", f"{where or 'the body'}: {seen}; expected an object with {whole}")
    try:
        value = _raw_object.decode(body).get(field)
    except (msgspec.DecodeError, RecursionError) as malformed:  # further on than the decoder came
        return _invalid_json(malformed, body)
    return _refused(field, "missing" if value is None else _shown(bytes(value)), words[field], where and f"{where}.")


def _shown(value: bytes) -> str:
    """The beginning of a JSON value on one line."""
    text = " ".join(value[: 4 * SHOWN].decode("utf-8", "replace").split())
    return text if len(text) <= SHOWN and len(value) <= 4 * SHOWN else f"{text[:SHOWN]}..."


def _invalid_json(error: Exception, body: bytes) -> RequestError:
    if isinstance(error, RecursionError):
        words = "arrays or objects are nested too deep"
    elif not body.strip():
        words = "the body is empty; expected JSON"
    elif body.startswith(_BYTE_ORDER_MARKS):
        words = "the body begins with a byte order mark; expected JSON in UTF-8 without one"
    else:
        words = str(error)
    return RequestError(400, "invalid_json", words)


def _require_utf8(body: bytes) -> None:
    """The decoder does not look into what it ignores."""
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise _invalid_json(error, body) from None


class _StandsTwiceError(ValueError):
    """The name that stands twice in an object."""


def _each_once(pairs: list[tuple[str, object]]) -> None:
    """What the scan below calls for every object."""
    names = dict(pairs)
    if len(names) != len(pairs):
        for name, _ in pairs:
            if name not in names:
                raise _StandsTwiceError(name)
            del names[name]


_scan = json.JSONDecoder(object_pairs_hook=_each_once, parse_int=len, parse_float=len).decode


def _require_each_once(body: bytes) -> None:
    """Valid JSON in which no object has a name twice, at any depth. Raises RequestError 422 that has the name."""
    try:
        _scan(body.decode())
    except _StandsTwiceError as error:
        name = str(error).encode("utf-8", "replace").decode()[:SHOWN]
        raise RequestError(
            422, "duplicate_field", f"{name!r}: stands twice in one object; expected once", name
        ) from None
    except RecursionError as error:
        raise _invalid_json(error, body) from None


def _items(body: bytes, what: str) -> list[msgspec.Raw]:
    """The items of a JSON array. Raises RequestError."""
    _require_utf8(body)
    try:
        items: list[msgspec.Raw] = _raw_list.decode(body)
    except msgspec.ValidationError:
        message = f"the body: {_shown(body)}; expected an array of {what}"
        raise RequestError(422, "invalid_field", message) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid_json(error, body) from None
    return items


class Label(msgspec.Struct):
    """One label as it is posted."""

    transaction_id: str | int
    is_fraud: bool | Literal[0, 1]
    known_at: str | int | float | None = None
    source: str = "api"


_label = msgspec.json.Decoder(Label)
_labels = msgspec.json.Decoder(list[Label])
_LABEL_WORDS = {
    "transaction_id": _ID_WORDS,
    "is_fraud": "true, false, 1 or 0",
    "known_at": "an ISO 8601 time or milliseconds since 1970, or null",
    "source": "a string",
}


@dataclass(slots=True, frozen=True)
class SaidLabel:
    """A label with canonical id; `known_at` in ms, None: now."""

    transaction_id: str
    is_fraud: bool
    known_at: int | None
    source: str


def decode_labels(body: bytes, limits: Limits | None = None) -> list[SaidLabel]:
    """The labels of a request. Raises RequestError; none is taken if one is wrong."""
    limits = limits or Limits()
    _require_utf8(body)
    try:
        labels = _labels.decode(body)
    except msgspec.ValidationError:
        raise _wrong_label(body) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid_json(error, body) from None
    most = limits.settings.max_labels
    if len(labels) > most:
        raise RequestError(413, "batch_too_large", f"{len(labels)} labels; at most {most} per request")
    _require_each_once(body)
    out = []
    for i, label in enumerate(labels):
        try:
            out.append(_said(label, limits))
        except RequestError as error:
            raise RequestError(error.status, error.code, f"[{i}].{error.message}", error.field) from None
    return out


def _said(label: Label, limits: Limits) -> SaidLabel:
    """A label within the limits. Raises RequestError."""
    identity = text_of(label.transaction_id, "transaction_id")
    limits.check_text(identity, "transaction_id")
    known_at = None
    if label.known_at is not None:
        known_at = _label_time(label.known_at)
        limits.check_time(known_at, label.known_at, "known_at")
    limits.check_text(label.source, "source")
    return SaidLabel(identity, bool(label.is_fraud), known_at, label.source)


T = TypeVar("T")
_UNKNOWN = re.compile(r"Object contains unknown field `(.+)`", re.DOTALL)


def decode_object(body: bytes, decoder: msgspec.json.Decoder[T], words: Mapping[str, str]) -> T:
    """An object of a request, each name in it once. Raises RequestError.

    Args:
        words: by field, what is expected there.
    """
    _require_utf8(body)
    try:
        decoded = decoder.decode(body)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN.search(str(error))
        if unknown is None:
            raise _invalid_field(error, body, words, ", ".join(words)) from None
        near = difflib.get_close_matches(unknown[1], words, n=1, cutoff=0.0)[0]
        message = f"{unknown[1]:.{SHOWN}}: there is no such field; the nearest is {near}"
        raise RequestError(422, "unknown_field", message, unknown[1][:SHOWN]) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid_json(error, body) from None
    _require_each_once(body)
    return decoded


def _wrong_label(body: bytes) -> RequestError:
    """What is wrong with the first label that is not one."""
    for i, item in enumerate(_items(body, "labels")):
        try:
            _label.decode(item)
        except msgspec.ValidationError as error:
            return _invalid_field(error, bytes(item), _LABEL_WORDS, "transaction_id and is_fraud", f"[{i}]")
    raise AssertionError("the labels are valid one by one")


def _label_time(value: str | int | float) -> int:
    """`known_at`: ISO 8601 text, or a number of milliseconds."""
    try:
        time = time_ms(value, "iso" if isinstance(value, str) else "ms")
    except (ValueError, OverflowError):
        time = LATEST_MS
    if not EARLIEST_MS <= time < LATEST_MS:
        raise _refused("known_at", f"{value!r:.{SHOWN}}", _LABEL_WORDS["known_at"])
    return time
