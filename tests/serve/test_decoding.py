"""JSON to a transaction: what is taken, what is refused and with which words, and that ids are those of offline."""

import json
import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.bulk import read_for_bundle
from seqfraud.bundle import Bundle
from seqfraud.canonical import EARLIEST_MS, LATEST_MS
from seqfraud.config import CleaningConfig, Duration, Instant
from seqfraud.errors import RequestError
from seqfraud.vocabulary import UNSEEN
from serve.decoding import InputSettings, Limits, SaidLabel, Transaction, TransactionDecoder, decode_labels
from serve.records import TransactionRecord

CARD = {"id": 1, "user": "ann", "time": 1_600_000_000_000, "amount": 5.0, "kind": "food", "merchant": "m", "device": 9}


ANY_TIME = InputSettings(earliest=Instant(EARLIEST_MS), latest_ahead=Duration(LATEST_MS))
"""What texts of times can spell at all; the limits have their own tests."""


@pytest.fixture(scope="module")
def cards_decoder(cards: Bundle) -> TransactionDecoder:
    return TransactionDecoder(cards.manifest)


@pytest.fixture(scope="module")
def plain_decoder(plain: Bundle) -> TransactionDecoder:
    return TransactionDecoder(plain.manifest, Limits(ANY_TIME))


@pytest.fixture(scope="module")
def rich_decoder(rich: Bundle) -> TransactionDecoder:
    return TransactionDecoder(rich.manifest, Limits(ANY_TIME))


def decode(decoder: TransactionDecoder, row: dict[str, Any]) -> Transaction:
    return decoder.decode(json.dumps(row).encode())


def refusal(decoder: TransactionDecoder, body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decoder.decode(body)
    return caught.value


# ---- what is taken


def test_every_field_has_its_place(rich_decoder):
    row = {
        "id": "T-1", "user": 42, "time": "2025-03-01T12:00:00Z", "amount": 12.5, "age": 30, "lat": 48.1, "long": 11.5,
        "total": 99.0, "kind": "fuel", "ip": "192.0.2.77",
    }  # fmt: skip
    got = decode(rich_decoder, row)
    assert (got.id, got.user, got.time) == ("T-1", "42", 1_740_830_400_000)
    assert got.numbers == [12.5, 30.0, 48.1, 11.5, 99.0]
    assert got.amount == 99.0
    assert got.categories == [3], "padding, unseen, food, fuel"
    assert got.entities == ["fuel", "192.0.2.0/24"], "a context column as it is, an address as its network"
    assert json.loads(got.raw) == row


def test_ids_and_users_are_strings_or_integers(cards_decoder):
    texts = decode(cards_decoder, {**CARD, "id": "12", "user": "34"})
    numbers = decode(cards_decoder, {**CARD, "id": 12, "user": 34})
    assert (texts.id, texts.user, texts.content) == (numbers.id, numbers.user, numbers.content) == (
        "12", "34", numbers.content
    )  # fmt: skip
    assert decode(cards_decoder, {**CARD, "id": 2**70}).id == str(2**70)
    assert decode(cards_decoder, {**CARD, "id": "012"}).id == "012", "an id is a text, not a number"


def test_undeclared_fields_leave_no_trace(cards_decoder):
    got = decode(cards_decoder, {**CARD, "fraud": 1, "known_at": None, "note": {"deep": [1, {}]}})
    assert got == decode(cards_decoder, CARD)
    assert "note" not in json.loads(got.raw)


def test_texts_may_be_missing_of_any_scalar_type_and_unseen(cards_decoder):
    bare = {name: CARD[name] for name in ("id", "user", "time", "amount")}
    got = decode(cards_decoder, bare)
    assert got.categories == [UNSEEN]
    assert got.entities == [None, None]
    assert got.content == decode(cards_decoder, {**bare, "kind": None, "merchant": None}).content
    for value, text in ((7, "7"), (7.0, "7"), ("7", "7"), (True, "true"), (1.5, "1.5")):
        got = decode(cards_decoder, {**CARD, "kind": value, "merchant": value})
        assert got.entities[0] == text
        assert got.categories[0] > UNSEEN, f"{value!r} is in the vocabulary as {text!r}"
    assert decode(cards_decoder, {**CARD, "kind": "FOOD"}).categories == [UNSEEN]


def test_addresses_become_networks_and_other_texts_nothing(rich_decoder):
    row = {"id": 1, "user": 1, "time": "2025-03-01", "amount": 1, "ip": "2001:db8:1:2::3"}
    assert decode(rich_decoder, row).entities[1] == "2001:db8:1::/48"
    assert decode(rich_decoder, {**row, "ip": " 10.1.2.3 "}).entities[1] == "10.1.2.0/24"
    assert decode(rich_decoder, {**row, "ip": "not an address"}).entities[1] is None


def test_numbers_may_be_missing_only_where_the_manifest_says(rich, rich_decoder):
    """`age` was missing in training, places always may be, the amount that is no input counts as 0 without a value."""
    assert set(rich.manifest.missing) == {"age", "lat", "long"}
    row = {"id": 1, "user": 1, "time": "2025-03-01", "amount": 12.5}
    got = decode(rich_decoder, {**row, "age": None})
    assert got.numbers[0] == 12.5
    assert all(math.isnan(x) for x in got.numbers[1:])
    assert got.amount == 0.0
    refused = refusal(rich_decoder, json.dumps({**row, "amount": None}).encode())
    assert (refused.status, refused.code, refused.field) == (422, "invalid_field", "amount")
    del row["amount"]
    refused = refusal(rich_decoder, json.dumps(row).encode())
    assert (refused.status, refused.code, refused.field) == (422, "invalid_field", "amount")
    assert "missing" in refused.message


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01", 0),
        ("1970-01-01T00:00:01", 1000),
        ("1970-01-01T00:00:01Z", 1000),
        ("1970-01-01T02:00:01+02:00", 1000),
        ("1970-01-01 00:00:00.0019", 1),
        ("1969-12-31T23:59:59.9995Z", -1),
        ("0001-01-01", -62_135_596_800_000),
        ("9999-12-31T23:59:59.999Z", 253_402_300_799_999),
    ],
)
def test_iso_times_are_utc_without_a_zone_and_lose_parts_of_a_millisecond(rich_decoder, text, ms):
    assert decode(rich_decoder, {"id": 1, "user": 1, "amount": 1, "time": text}).time == ms


def test_times_as_numbers_have_the_unit_of_the_schema(cards_decoder, plain_decoder):
    assert decode(cards_decoder, {**CARD, "time": 1500}).time == 1500
    assert decode(cards_decoder, {**CARD, "time": 1500.9}).time == 1500
    row = {"user": "ann", "amount": 1}
    assert decode(plain_decoder, {**row, "time": 1500}).time == 1_500_000
    assert decode(plain_decoder, {**row, "time": -1.0005}).time == -1001
    assert decode(plain_decoder, {**row, "time": 1_234_567_890.123}).time == 1_234_567_890_123


# ---- what is refused


def body(**changes: Any) -> bytes:
    return json.dumps({**CARD, **changes}).encode()


def without(name: str) -> bytes:
    return json.dumps({k: v for k, v in CARD.items() if k != name}).encode()


@pytest.mark.parametrize(
    ("sent", "status", "code", "field"),
    [
        (b"", 400, "invalid_json", ""),
        (b"{", 400, "invalid_json", ""),
        (body() + b" {}", 400, "invalid_json", ""),
        (body(amount=math.nan), 400, "invalid_json", ""),
        (body(amount=math.inf), 400, "invalid_json", ""),
        (body().replace(b"ann", b"\xff"), 400, "invalid_json", ""),
        (body().replace(b"ann", b"\\ud800"), 400, "invalid_json", ""),
        (b"null", 422, "invalid_field", ""),
        (b"[]", 422, "invalid_field", ""),
        (b'"text"', 422, "invalid_field", ""),
        (without("id"), 422, "invalid_field", "id"),
        (without("user"), 422, "invalid_field", "user"),
        (without("time"), 422, "invalid_field", "time"),
        (without("amount"), 422, "invalid_field", "amount"),
        (body(id=None), 422, "invalid_field", "id"),
        (body(id=""), 422, "invalid_field", "id"),
        (body(id=1.5), 422, "invalid_field", "id"),
        (body(id=True), 422, "invalid_field", "id"),
        (body(id=[1]), 422, "invalid_field", "id"),
        (body(user=""), 422, "invalid_field", "user"),
        (body(user=1.5), 422, "invalid_field", "user"),
        (body(user={}), 422, "invalid_field", "user"),
        (body(amount=None), 422, "invalid_field", "amount"),
        (body(amount="5"), 422, "invalid_field", "amount"),
        (body(amount=True), 422, "invalid_field", "amount"),
        (body().replace(b"5.0", b"1e400"), 422, "invalid_field", "amount"),
        (body(amount=1.1e30), 422, "invalid_field", "amount"),
        (body(amount=-1e300), 422, "invalid_field", "amount"),
        (body(amount=10**200), 422, "invalid_field", "amount"),
        (body(kind=["food"]), 422, "invalid_field", "kind"),
        (body(merchant={"id": 1}), 422, "invalid_field", "merchant"),
        (body(time="2025-03-01"), 422, "invalid_field", "time"),
        (body(time=None), 422, "invalid_field", "time"),
        (body(time=True), 422, "invalid_field", "time"),
        (body(time=253_402_300_800_000), 422, "invalid_field", "time"),
        (body(time=-62_135_596_800_001), 422, "invalid_field", "time"),
        (body(time=1e300), 422, "invalid_field", "time"),
        (body(time=10**300), 422, "invalid_field", "time"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_and_names_the_field(cards_decoder, sent, status, code, field):
    refused = refusal(cards_decoder, sent)
    assert (refused.status, refused.code, refused.field) == (status, code, field)
    assert refused.message
    assert len(refused.message) < 300
    assert "\n" not in refused.message
    if field:
        assert field in refused.message


RICH = {
    "id": 1, "user": "u", "time": "2025-03-01", "amount": 5.0, "age": 30, "lat": 48.1, "long": 11.5, "total": 9.0,
    "kind": "food", "ip": "192.0.2.1",
}  # fmt: skip
ALWAYS, NEVER = "accepted", "refused"
KEPT = "accepted if kept"
POLICIES = [
    ("user", None, "bad_row", NEVER),
    ("user", "", "bad_row", NEVER),
    ("id", None, "bad_row", NEVER),
    ("id", "", "bad_row", NEVER),
    ("time", None, "bad_row", NEVER),
    ("time", "yesterday", "bad_row", NEVER),
    ("amount", "ten", "bad_number", NEVER),
    ("amount", 1e300, "bad_number", NEVER),
    ("total", -1e300, "bad_number", NEVER),
    ("amount", None, "missing_number", NEVER),
    ("age", None, "missing_number", KEPT),
    ("lat", None, "missing_number", KEPT),
    ("total", None, "missing_number", KEPT),
    ("total", -3.0, "negative_amount", KEPT),
    ("amount", -3.0, "negative_amount", ALWAYS),
    ("amount", 5e9, "bad_number", ALWAYS),
    ("kind", None, "bad_row", ALWAYS),
    ("kind", "", "bad_row", ALWAYS),
    ("ip", "localhost", "bad_row", ALWAYS),
]
"""Field, value, the policy that decides about it offline, and the service's answer. `amount` was never missing in
training, so the model has no place for that; of "ten" a file is mended ("missing"), a client is told; -3 is of no
consequence in a column that is not the amount; 5e9 is an outlier."""


def stored(t: Transaction) -> TransactionRecord:
    """The record of a transaction."""
    return TransactionRecord(1, t.id, t.user, t.time, t.content, t.raw, b"", b"", "")


@pytest.mark.parametrize(("field", "value", "key", "answer"), POLICIES)
def test_the_service_refuses_what_training_would_have_dropped_or_refused(rich, field, value, key, answer):
    assert set(rich.manifest.missing) == {"age", "lat", "long"}
    for policy in typing.get_args(typing.get_type_hints(CleaningConfig)[key]):
        manifest = replace(rich.manifest, cleaning=CleaningConfig(**{key: policy}))
        decoder = TransactionDecoder(manifest)
        sent = json.dumps({**RICH, field: value}).encode()
        if answer == ALWAYS or (answer == KEPT and policy == "keep"):
            taken = decoder.decode(sent)
            assert repr(decoder.decode_stored(stored(taken))) == repr(taken)
        else:
            refused = refusal(decoder, sent)
            assert (refused.status, refused.code, refused.field) == (422, "invalid_field", field)
            assert field in refused.message


def test_what_was_accepted_once_is_read_again_under_a_stricter_policy(rich):
    """A journal outlives bundles: a row that only the new policy would refuse still counts in a rebuild."""
    strict = replace(rich.manifest, cleaning=CleaningConfig(missing_number="error", negative_amount="drop"))
    sent = json.dumps({**RICH, "age": None, "total": -3.0}).encode()
    taken = TransactionDecoder(rich.manifest).decode(sent)
    assert repr(TransactionDecoder(strict).decode_stored(stored(taken))) == repr(taken)


def test_an_empty_text_is_a_missing_one(rich_decoder):
    """As in a CSV file, which cannot tell them apart."""
    empty, missing = decode(rich_decoder, {**RICH, "kind": ""}), decode(rich_decoder, {**RICH, "kind": None})
    assert (empty.categories, empty.entities, empty.content) == (
        missing.categories, missing.entities, missing.content
    )  # fmt: skip
    assert empty.entities[0] is None


def test_what_is_deep_or_long_is_refused_too(cards_decoder):
    deep = body()[:-1] + b', "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert refusal(cards_decoder, deep).status == 400
    long = refusal(cards_decoder, body().replace(b'"ann"', b"1" + b"0" * 5000))
    assert (long.status, long.field) == (422, "user")
    assert len(long.message) < 300


@pytest.mark.parametrize("time", ["yesterday", "", "2025-13-01", "2025-03-01T25:00", 5, 1.5, "0000-01-01"])
def test_a_time_that_is_no_iso_time_is_refused(rich_decoder, time):
    refused = refusal(rich_decoder, json.dumps({"id": 1, "user": 1, "amount": 1, "time": time}).encode())
    assert (refused.status, refused.code, refused.field) == (422, "invalid_field", "time")


def test_an_offset_may_not_lead_out_of_the_years(rich_decoder):
    for time in ("9999-12-31T23:00:00-02:00", "0001-01-01T00:00:00+01:00"):
        refused = refusal(rich_decoder, json.dumps({"id": 1, "user": 1, "amount": 1, "time": time}).encode())
        assert (refused.status, refused.field) == (422, "time")


def test_a_batch_is_an_array_whose_items_are_decoded_one_by_one(cards_decoder):
    items = cards_decoder.decode_batch(b"[" + body() + b', 7, {"id": 2}]')
    assert cards_decoder.decode(items[0]).id == "1"
    for item in items[1:]:
        with pytest.raises(RequestError):
            cards_decoder.decode(item)
    for wrong, status in ((b"{}", 422), (b"[", 400), (b"[1,]", 400), (b"", 400)):
        with pytest.raises(RequestError) as caught:
            cards_decoder.decode_batch(wrong)
        assert caught.value.status == status


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CARD, "x"]), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.binary(max_size=60)
    | st.builds(lambda v: json.dumps(v).encode(), json_values)
    | st.builds(lambda v: json.dumps({**CARD, **v}).encode(), st.dictionaries(st.sampled_from([*CARD]), json_values))
)
def test_whatever_is_sent_is_taken_or_refused(cards_decoder, sent):  # fmt: skip
    """Nothing but a RequestError, or the answer would be a 500. What is taken can be kept and read again."""
    for attempt in (cards_decoder.decode, cards_decoder.decode_batch, decode_labels):
        try:
            got = attempt(sent)
        except RequestError as error:
            assert error.status in (400, 422)
        else:
            if isinstance(got, Transaction):
                assert cards_decoder.decode(got.raw) == got
                assert all(abs(x) <= 1e30 for x in got.numbers)


# ---- limits and names that stand twice


def limited(bundle: Bundle, now: int = 1_700_000_000_000, **settings: Any) -> TransactionDecoder:
    return TransactionDecoder(bundle.manifest, Limits(InputSettings(**settings), now=lambda: now))


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b'{"amount": 1, ' + body()[1:], "amount"),
        (body()[:-1] + b', "amount": 1}', "amount"),
        (body()[:-1] + b',"amount":5.0}', "amount"),
        (body()[:-1] + b', "am\\u006funt": 1}', "amount"),
        (body()[:-1] + b', "id": 1}', "id"),
        (body(kind=None)[:-1] + b', "kind": null}', "kind"),
        (without("kind")[:-1] + b', "amount": 1}', "amount"),
        (without("kind")[:-1] + b', "note": 1, "note": 2}', "note"),
        (body(fraud=1)[:-1] + b', "fraud": 0}', "fraud"),
        (body()[:-1] + b', "note": {"a": 1, "b": [{"c": 1, "c": 1}]}}', "c"),
        (body()[:-1] + b', "": 1, "": 2}', ""),
        (body(kind="a:b:c")[:-1] + b', "amount": 1}', "amount"),
        (body()[:-1] + b', "' + b"n" * 5000 + b'": 1, "' + b"n" * 5000 + b'": 2}', "n" * 60),
    ],
)
def test_a_name_that_stands_twice_is_refused_at_any_depth(cards_decoder, sent, name):
    """msgspec took the last without a word: a client that meant the first was scored on another amount."""
    refused = refusal(cards_decoder, sent)
    assert (refused.status, refused.code, refused.field) == (422, "duplicate_field", name)
    assert len(refused.message) < 200


def test_a_name_that_stands_twice_hides_behind_no_colon_of_a_time(rich_decoder):
    """The quick look counts colons, and an ISO time has two that could stand for names."""
    row = {"id": 1, "user": "u", "amount": 1, "time": "2025-03-01T12:00:00"}
    plain = json.dumps(row)
    hidden = plain.replace("12:00:00", "12\\u003a00\\u003a00")
    assert rich_decoder.decode(plain.encode()) == rich_decoder.decode(hidden.encode())
    for text in (plain, hidden):
        for more in ('"amount": 2', '"amount": 1, "amount": 1', '"time": "2025-03-01"', '"x": 1, "x": 2'):
            assert refusal(rich_decoder, f"{text[:-1]}, {more}}}".encode()).code == "duplicate_field"


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from([*RICH, "x", "y:z"]), st.sampled_from([*RICH.values(), "a:b", None, "\\:"]))))
def test_the_quick_look_says_what_the_scan_says(rich_decoder, more):  # fmt: skip
    pairs = [*RICH.items(), *more]
    names = [name for name, _ in pairs]
    sent = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"
    try:
        rich_decoder.decode(sent.encode())
        refused = ""
    except RequestError as error:
        refused = error.code
    if len(set(names)) == len(names):
        assert refused in ("", "invalid_field")
    else:
        assert refused in ("duplicate_field", "invalid_field")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"time": -1}, "time"),
        ({"time": -0.5}, "time"),
        ({"time": 1_700_086_400_001}, "time"),
        ({"time": 253_402_300_799_999}, "time"),
        ({"id": "x" * 257}, "id"),
        ({"id": 10**256}, "id"),
        ({"user": "é" * 257}, "user"),
        ({"kind": "k" * 257}, "kind"),
        ({"kind": 1e300}, "kind"),
        ({"merchant": "m" * 100_000}, "merchant"),
        ({"device": 10**300}, "device"),
        ({"user": "a\nb"}, "user"),
        ({"user": "\x00"}, "user"),
        ({"id": "a\x7f"}, "id"),
        ({"kind": "a\x85b"}, "kind"),
        ({"merchant": "\x1b[31m"}, "merchant"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_and_what_was_taken_is_read_again(cards, change, field):
    refused = refusal(limited(cards), body(**change))
    assert (refused.status, refused.code, refused.field) == (422, "invalid_field", field)
    assert refused.message.startswith(f"{field}: ")
    assert len(refused.message) < 250
    assert refused.message.isprintable()
    generous = limited(
        cards,
        earliest=Instant(EARLIEST_MS),
        latest_ahead=Duration(LATEST_MS),
        longest_text=10**6,
        control_characters=True,
    )
    taken = generous.decode(body(**change))
    assert limited(cards).decode_stored(stored(taken)) == taken


def test_what_is_at_a_limit_is_taken(cards):
    now = 1_700_000_000_000
    for change in (
        {"time": 0}, {"time": now + 86_400_000}, {"id": "x" * 256}, {"id": int("9" * 256)}, {"user": "é" * 256},
        {"kind": "a\u200bb"}, {"user": "💳" * 256}, {"user": "e\u0301"}, {"merchant": "\u2028"}, {"user": " "},
    ):  # fmt: skip
        decode(limited(cards, now), {**CARD, **change})
    composed, decomposed = (decode(limited(cards), {**CARD, "user": user}).user for user in ("é", "e\u0301"))
    assert composed != decomposed, "two texts are two users, however they look"


def test_a_derived_id_is_not_held_to_the_limit_of_texts(plain):
    """It is longer than the limit here, and nobody sent it."""
    decoder = limited(plain, longest_text=10)
    assert len(decode(decoder, {"user": "ann", "time": 1_600_000_000, "amount": 1}).id) == 32


def test_the_latest_time_moves_on_with_the_clock(cards):
    now = [1_700_000_000_000]
    decoder = TransactionDecoder(cards.manifest, Limits(InputSettings(latest_ahead=Duration(0)), now=lambda: now[0]))
    sent = body(time=now[0] + 1)
    assert "input.latest_ahead" in refusal(decoder, sent).message
    now[0] += 1
    assert decoder.decode(sent).time == now[0]


def test_integers_keep_their_digits_as_ids(cards_decoder):
    for number in (2**53 + 1, 2**63, 2**64 + 1, -(2**63) - 1, 10**255 + 7):
        taken = decode(cards_decoder, {**CARD, "id": number, "user": number, "device": number})
        assert (taken.id, taken.user, taken.entities[1]) == (str(number),) * 3
        assert cards_decoder.decode_stored(stored(taken)) == taken
    for spelled in (b"1.0", b"1e5", b"-0.0", b"true"):
        assert refusal(cards_decoder, body().replace(b'"id": 1', b'"id": ' + spelled)).field == "id"
    assert decode(cards_decoder, {**CARD, "id": -0}).id == "0"


@pytest.mark.parametrize("text", ["12.5", "-3", "0", "1e3", "1E-2", " 7 "])
def test_a_number_as_text_is_a_number_only_where_the_settings_say_so(cards, text):
    refused = refusal(limited(cards), body(amount=text))
    assert refused.message == f'amount: "{text}"; expected a number between -1e+30 and 1e+30'
    loose = limited(cards, numbers_as_text=True)
    taken = loose.decode(body(amount=text))
    assert taken == loose.decode(body(amount=float(text)))
    assert limited(cards).decode_stored(stored(taken)) == taken, "the journal has a number"
    assert loose.decode(body(time="1600000000000")).time == 1_600_000_000_000


@pytest.mark.parametrize(
    "text",
    ["", " ", "1 2", "1,5", "NaN", "nan", "Infinity", "-inf", "1e999", "1e31", "0x10", "1_000", "٣", "true", "+1"],
)
def test_a_text_that_json_would_not_spell_as_a_number_never_is_one(cards, text):
    for decoder in (limited(cards), limited(cards, numbers_as_text=True)):
        refused = refusal(decoder, body(amount=text))
        assert (refused.status, refused.field) == (422, "amount")


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (body(amount=True), "amount: true; expected a number between -1e+30 and 1e+30"),
        (body(user=1.5), "user: 1.5; expected a string that is not empty or an integer"),
        (body(user=""), 'user: ""; expected a string that is not empty or an integer'),
        (body(kind={"a": [1]}), 'kind: {"a": [1]}; expected a string, a number, true, false or null'),
        (without("time"), "time: missing; expected a time in milliseconds since 1970"),
        (body(time="soon"), 'time: "soon"; expected a time in milliseconds since 1970'),
        (b"[1, 2]", "the body: [1, 2]; expected an object with the fields of one transaction"),
        (b"", "the body is empty; expected JSON"),
        (b" \n", "the body is empty; expected JSON"),
        (b"\xef\xbb\xbf" + body(), "the body begins with a byte order mark; expected JSON in UTF-8 without one"),
        (
            json.dumps(CARD).encode("utf-16"),
            "the body begins with a byte order mark; expected JSON in UTF-8 without one",
        ),
    ],
)
def test_a_message_has_the_field_what_was_seen_and_what_is_expected(cards_decoder, sent, words):
    assert refusal(cards_decoder, sent).message == words


@pytest.mark.parametrize("spelled", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"])
def test_bad_utf_8_is_refused_also_where_nobody_looks(cards_decoder, spelled):
    """msgspec skips what is not declared without decoding it."""
    for sent in (body(note="?").replace(b"?", spelled), body(user="?").replace(b"?", spelled),
                 body()[:-1] + b', "' + spelled + b'": 1}'):  # fmt: skip
        refused = refusal(cards_decoder, sent)
        assert (refused.status, refused.code) == (400, "invalid_json")


@pytest.mark.parametrize("change", [{"longest_text": 0}, {"max_labels": 0}])
def test_a_limit_that_lets_nothing_through_is_no_setting(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is 0; expected 1 or more"):
        InputSettings(**change)


# ---- content and derived ids


def test_content_is_the_same_for_the_same_values_however_spelled(cards_decoder):
    content = decode(cards_decoder, CARD).content
    for change in ({"id": 2}, {"amount": 5}, {"device": "9"}, {"device": 9.0}, {"extra": 1}, {"time": 1.6e12}):
        assert decode(cards_decoder, {**CARD, **change}).content == content, change
    zero = decode(cards_decoder, {**CARD, "amount": 0}).content
    assert decode(cards_decoder, {**CARD, "amount": -0.0}).content == zero


def test_content_differs_where_any_declared_value_does(cards_decoder):
    changes: list[dict[str, Any]] = [
        {}, {"user": "bob"}, {"time": CARD["time"] + 1}, {"amount": 5.01}, {"kind": "fuel"}, {"kind": "unseen"},
        {"kind": None}, {"merchant": "n"}, {"device": 8}, {"merchant": 9, "device": "m"}, {"merchant": "m9", "device": ""},
    ]  # fmt: skip
    contents = {decode(cards_decoder, {**CARD, **change}).content for change in changes}
    assert len(contents) == len(changes)


def test_derived_ids_are_those_of_offline(plain, plain_decoder, tmp_path: Path):
    """The same rows through Parquet, through CSV and spelled in JSON by hand have the same ids."""
    seconds = [1_600_000_000, 1_600_000_000, 1_600_000_001.25, 1_700_000_000.123, 5, -7, 1_650_000_000.001, 9e9]
    users = [1, 42, 7, 1000000, 5, 6, 8, 12]
    amounts = [0.0, -0.0, 0.1, 1e22, 123456.789, 1e-9, -5.0, 3.0]
    kinds = ["food", "", "ünïcode ☃", "a,b", "7", "true", "007", "food"]
    sent = [
        json.dumps({"user": user, "time": time, "amount": amount, "kind": kind})
        for user, time, amount, kind in zip(users, seconds, amounts, kinds, strict=True)
    ]
    online = [plain_decoder.decode(item.encode()).id for item in sent]
    assert len(set(online)) == len(online)
    columns = {"user": users, "time": pa.array(seconds, pa.float64()), "amount": amounts, "kind": kinds}
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    table = read_for_bundle(plain, tmp_path / "rows.parquet")
    back = dict(zip(table.file_row.tolist(), table.id_texts(), strict=True))
    assert [back[i] for i in range(len(users))] == online
    replayed = [plain_decoder.decode(json.dumps(row).encode()).id for row in table.raw_rows()]
    assert replayed == table.id_texts(), "and so do rows as a replay spells them"
    lines = ["user,time,amount,kind", *(f'{u},{t!r},{a!r},"{k}"' for u, t, a, k in zip(users, seconds, amounts, kinds,
                                                                                      strict=True) if k)]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    table = read_for_bundle(plain, tmp_path / "rows.csv")
    assert set(table.id_texts()) == {i for i, k in zip(online, kinds, strict=True) if k}


def test_rows_with_ids_replay_as_they_were_read(rich, rich_decoder, tmp_path: Path):
    """Missing values, addresses, times with parts of a second: content and id survive file -> request."""
    rows = {
        "id": ["a", "b", "c"],
        "user": ["1", "2", "3"],
        "time": pa.array([1_600_000_000_123, 1_600_000_001_000, -1], pa.timestamp("ms")),
        "amount": [1.5, 2.5, 1e20],
        "age": [None, 30.0, 31.0],
        "lat": [1.0, None, 3.0],
        "long": [1.0, 2.0, None],
        "total": [None, 7.0, 8.0],
        "kind": ["food", None, "x"],
        "ip": ["1.2.3.4", "::ffff:1.2.3.4", None],
    }
    parquet.write_table(pa.table(rows), tmp_path / "rows.parquet")
    table = read_for_bundle(rich, tmp_path / "rows.parquet")
    decoded = [decode(rich_decoder, row) for row in table.raw_rows()]
    assert [d.id for d in decoded] == table.id_texts() == ["c", "a", "b"]
    assert [d.time for d in decoded] == table.time.tolist()
    assert [d.entities[1] for d in decoded] == [None, "1.2.3.0/24", "1.2.3.0/24"]
    for got, wanted in zip(decoded, table.numbers.tolist(), strict=True):
        assert str(got.numbers) == str(wanted)


# ---- labels


def test_labels_have_text_ids_times_in_ms_and_a_source():
    sent = [
        {"transaction_id": 5, "is_fraud": True, "known_at": 1500},
        {"transaction_id": "5x", "is_fraud": 0, "known_at": "1970-01-01T00:00:02"},
        {"transaction_id": "a", "is_fraud": 1, "source": "analyst", "other": []},
        {"transaction_id": "b", "is_fraud": False, "known_at": None},
    ]
    assert decode_labels(json.dumps(sent).encode()) == [
        SaidLabel("5", True, 1500, "api"),
        SaidLabel("5x", False, 2000, "api"),
        SaidLabel("a", True, None, "analyst"),
        SaidLabel("b", False, None, "api"),
    ]
    assert decode_labels(b"[]") == []


@pytest.mark.parametrize(
    ("label", "field"),
    [
        ({"is_fraud": True}, "transaction_id"),
        ({"transaction_id": "", "is_fraud": True}, "transaction_id"),
        ({"transaction_id": 1.5, "is_fraud": True}, "transaction_id"),
        ({"transaction_id": 1}, "is_fraud"),
        ({"transaction_id": 1, "is_fraud": None}, "is_fraud"),
        ({"transaction_id": 1, "is_fraud": 2}, "is_fraud"),
        ({"transaction_id": 1, "is_fraud": -1}, "is_fraud"),
        ({"transaction_id": 1, "is_fraud": "yes"}, "is_fraud"),
        ({"transaction_id": 1, "is_fraud": True, "known_at": "soon"}, "known_at"),
        ({"transaction_id": 1, "is_fraud": True, "known_at": 1e300}, "known_at"),
        ({"transaction_id": 1, "is_fraud": True, "known_at": 2**63}, "known_at"),
        ({"transaction_id": 1, "is_fraud": True, "known_at": []}, "known_at"),
        ({"transaction_id": 1, "is_fraud": True, "source": 5}, "source"),
    ],
)
def test_one_wrong_label_refuses_all_and_names_the_field(label, field):
    good = {"transaction_id": 9, "is_fraud": True}
    with pytest.raises(RequestError) as caught:
        decode_labels(json.dumps([good, label]).encode())
    assert (caught.value.status, caught.value.code, caught.value.field) == (422, "invalid_field", field)


@pytest.mark.parametrize(("sent", "status"), [(b"", 400), (b"[", 400), (b"{}", 422), (b'["x"]', 422), (b"null", 422)])
def test_labels_come_as_an_array_of_objects(sent, status):
    with pytest.raises(RequestError) as caught:
        decode_labels(sent)
    assert caught.value.status == status


def labels_refused(sent: bytes, **limits: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode_labels(sent, Limits(InputSettings(**limits), now=lambda: 1_700_000_000_000))
    return caught.value


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"known_at": -1}, "known_at"),
        ({"known_at": "1969-12-31"}, "known_at"),
        ({"known_at": 1_700_086_400_001}, "known_at"),
        ({"transaction_id": "x" * 257}, "transaction_id"),
        ({"transaction_id": "a\tb"}, "transaction_id"),
        ({"source": "s" * 257}, "source"),
        ({"source": "\x1b[2J"}, "source"),
        ({"is_fraud": 10**400}, "is_fraud"),
    ],
)
def test_labels_have_the_limits_of_transactions(change, field):
    good = {"transaction_id": 1, "is_fraud": True}
    refused = labels_refused(json.dumps([good, {**good, **change}]).encode())
    assert (refused.status, refused.code, refused.field) == (422, "invalid_field", field)
    assert refused.message.startswith(f"[1].{field}: ")
    assert len(refused.message) < 250


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b'[{"transaction_id": 1, "is_fraud": true, "is_fraud": false}]', 422, "'is_fraud': stands twice"),
        (b'[{"transaction_id": 1, "is_fraud": true, "x": {"y": 1, "y": 2}}]', 422, "'y': stands twice"),
        (b'[{"transaction_id": 1, "is_fraud": true, "x": "\xff"}]', 400, "utf-8"),
        (b'[{"transaction_id": 1, "is_fraud": 1.0}]', 422, "[0].is_fraud: 1.0; expected true, false, 1 or 0"),
        (
            b'[{"transaction_id": 1, "is_fraud": true}, {"is_fraud": true}]',
            422,
            "[1].transaction_id: missing; expected",
        ),
        (b'[{"transaction_id": 1, "is_fraud": true}, 5]', 422, "[1].: 5; expected an object"),
        (b'{"transaction_id": 1}', 422, "the body: {"),
        (b"[" * 100_000, 400, "nested too deep"),
        (b"[" + b'{"transaction_id": 1, "is_fraud": true},' * 4 + b"{}]", 422, "[4].transaction_id: missing"),
    ],
)
def test_labels_that_are_refused_say_which_and_why(sent, status, words):
    refused = labels_refused(sent)
    assert refused.status == status
    assert words.replace("[1].:", "[1]:") in refused.message


def test_more_labels_than_the_limit_are_a_413():
    one = b'{"transaction_id": 1, "is_fraud": true}'
    assert len(decode_labels(b"[" + b",".join([one] * 3) + b"]", Limits(InputSettings(max_labels=3)))) == 3
    refused = labels_refused(b"[" + b",".join([one] * 4) + b"]", max_labels=3)
    assert (refused.status, refused.code) == (413, "batch_too_large")
