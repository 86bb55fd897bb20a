"""JSON of a transaction to what the scorer needs; the decoder is made from the bundle's schema."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

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
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.vocabulary import UNSEEN
from serve.records import TransactionRecord

Text = str | int | float | bool | None
Number = Annotated[float, msgspec.Meta(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


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


class TransactionDecoder:
    """Decodes and validates transactions of one bundle.

    Undeclared fields are ignored; a declared one that is missing or of the wrong type is a RequestError 422 that names
    it, malformed JSON a RequestError 400.
    """

    def __init__(self, manifest: Manifest, identifiers: Identifiers | None = None) -> None:
        """Args:
        identifiers: hash what is decoded; None: nothing is, which is for what was stored.
        """
        schema = manifest.schema
        self._schema = schema
        self._fields = schema.fields
        optional = {*manifest.missing, *({schema.amount} - set(schema.numeric_inputs))}
        types: list[tuple[str, Any, Any]] = []
        for i, column in enumerate(self._fields):
            if column in (schema.user, schema.transaction):
                types.append((f"f{i}", str | int, msgspec.field(name=column)))
            elif column == schema.time:
                kind = str if schema.time_unit == "iso" else int | float
                types.append((f"f{i}", kind, msgspec.field(name=column)))
            elif column in schema.numbers and column in optional:
                types.append((f"f{i}", Number | None, msgspec.field(name=column, default=None)))
            elif column in schema.numbers:
                types.append((f"f{i}", Number, msgspec.field(name=column)))
            else:
                types.append((f"f{i}", Text, msgspec.field(name=column, default=None)))
        # fields with a default have to come last
        types.sort(key=lambda t: t[2].default is not msgspec.NODEFAULT)
        self._struct = msgspec.defstruct("Transaction", types, gc=False)
        self._json = msgspec.json.Decoder(self._struct)
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
        self._refuse_negative = manifest.cleaning.negative_amount != "keep"
        self._refuse_missing = (
            []
            if manifest.cleaning.missing_number == "keep"
            else [(i, column) for i, column in enumerate(schema.numbers) if column in optional]
        )
        self._amount = None if schema.amount is None else schema.numbers.index(schema.amount)

    def decode(self, body: bytes | msgspec.Raw) -> Transaction:
        """One transaction from JSON. Raises RequestError."""
        transaction = self._transaction(decode_as(body, self._json), None)
        if transaction.amount < 0 and self._refuse_negative:
            column = str(self._schema.amount)
            message = f"{column}: {transaction.amount:g} is negative; expected 0 or more, as in training"
            raise RequestError(422, "invalid_field", message, column)
        for i, column in self._refuse_missing:
            if math.isnan(transaction.numbers[i]):
                message = f"{column}: no number; expected one, as in training"
                raise RequestError(422, "invalid_field", message, column)
        return transaction

    def decode_stored(self, record: TransactionRecord) -> Transaction:
        """One that was accepted once, perhaps with another bundle: what only this one's policy refuses is taken."""
        return self._transaction(decode_as(record.raw, self._json), record)

    def decode_batch(self, body: bytes) -> list[msgspec.Raw]:
        """The items of a JSON array, each to be decoded on its own. Raises RequestError."""
        items: list[msgspec.Raw] = decode_as(body, _raw_list)
        return items

    def _transaction(self, row: Any, record: TransactionRecord | None) -> Transaction:
        """What the scorer needs of a decoded row; what identifies it is in its record, where there is one."""
        time = self._time_of(getattr(row, self._time))
        user = text_of(getattr(row, self._user), self._schema.user)
        numbers = [math.nan if (x := getattr(row, name)) is None else x for name in self._numbers]
        texts = [None if (x := getattr(row, name)) is None or x == "" else canonical_text(x) for name in self._texts]
        if record is None:
            user = self._hash(row, user, texts)
            content = content_digest(user, time, numbers, texts)
            shown = (
                content.hex() if self._id is None else text_of(getattr(row, self._id), str(self._schema.transaction))
            )
            identity = shown
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
            raise RequestError(
                422, "invalid_field", f"{column}: {value!r:.60} is not {TIME_WORDS[unit]}", column
            ) from None
        if not EARLIEST_MS <= time < LATEST_MS:
            raise RequestError(422, "invalid_field", f"{column}: {value!r:.60} is outside the years 1 to 9999", column)
        return time


_raw_list = msgspec.json.Decoder(list[msgspec.Raw])
_PATH = re.compile(r" - at `\$(?:\[[^\]]*\])?\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `(.+?)`")


def text_of(value: str | int, field: str) -> str:
    """A user or transaction id as text. Raises RequestError for an empty one."""
    text = value if isinstance(value, str) else str(value)
    if not text:
        raise RequestError(422, "invalid_field", f"{field}: expected a string that is not empty or an integer", field)
    return text


def validation_error(error: msgspec.ValidationError) -> RequestError:
    """422 with the field that msgspec names."""
    message = str(error)
    missing = _MISSING.search(message)
    path = _PATH.search(message)
    field = missing[1] if missing else path[1] if path else ""
    words = message.split(" - at ")[0]
    return RequestError(422, "invalid_field", f"{field}: {words}" if field and not missing else words, field)


def decode_as(body: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[Any]) -> Any:
    """JSON by a decoder, with the errors of the HTTP edge."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise validation_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "invalid_json", str(error)) from None


class Label(msgspec.Struct):
    """One label as it is posted."""

    transaction_id: str | int
    is_fraud: bool | int
    known_at: str | int | float | None = None
    source: str = "api"


_labels = msgspec.json.Decoder(list[Label])


@dataclass(slots=True, frozen=True)
class SaidLabel:
    """A label with canonical id; `known_at` in ms, None: now."""

    transaction_id: str
    is_fraud: bool
    known_at: int | None
    source: str


def decode_labels(body: bytes) -> list[SaidLabel]:
    """The labels of a request. Raises RequestError; none is taken if one is wrong."""
    out = []
    for i, label in enumerate(decode_as(body, _labels)):
        if label.is_fraud not in (0, 1):
            raise RequestError(422, "invalid_field", f"[{i}].is_fraud: expected true, false, 1 or 0", "is_fraud")
        known_at = None if label.known_at is None else label_time(label.known_at, i)
        identity = text_of(label.transaction_id, "transaction_id")
        out.append(SaidLabel(identity, bool(label.is_fraud), known_at, label.source))
    return out


def label_time(value: str | int | float, index: int) -> int:
    """`known_at`: ISO 8601 text, or a number of milliseconds."""
    try:
        time = time_ms(value, "iso" if isinstance(value, str) else "ms")
    except (ValueError, OverflowError):
        time = LATEST_MS
    if not EARLIEST_MS <= time < LATEST_MS:
        raise RequestError(
            422, "invalid_field", f"[{index}].known_at: {value!r:.60} is no ISO 8601 time or milliseconds", "known_at"
        )
    return time
