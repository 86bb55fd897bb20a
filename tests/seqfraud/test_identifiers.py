"""Identifiers by keyed hashing: what is hashed, that one value and a column come out alike, and the key's file."""

import hashlib
import hmac
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqfraud.canonical import network_of
from seqfraud.config import IdentifiersConfig
from seqfraud.errors import ConfigError
from seqfraud.identifiers import (
    Identifiers,
    is_stored_form,
    key_check,
    looks_like_card,
    make_key,
    read_key,
    treatments,
)
from seqfraud.schema import Schema
from seqfraud.table import Coded, Transactions

KEY = bytes(range(32))
SCHEMA = Schema(
    user="user", time="time", transaction="id", amount="amount", numeric=("amount",), categorical=("kind",),
    context=("merchant",), ip=("ip",),
)  # fmt: skip
CARDS = ("4111111111111111", "378282246310005", "4222222222222", "6304000000000000000", "0000000000000000")


def identifiers(default: str = "cards", key: bytes | None = KEY, **columns: str) -> Identifiers:
    return Identifiers(SCHEMA, IdentifiersConfig(default, columns), key)  # type: ignore[arg-type]


def luhn(text: str) -> bool:
    """The checksum as the standard words it: double every second digit from the right, add the digits of all."""
    total = 0
    for place, digit in enumerate(reversed(text)):
        twice = int(digit) * (2 if place % 2 else 1)
        total += twice // 10 + twice % 10
    return total % 10 == 0


@pytest.mark.parametrize(
    "text",
    [
        *CARDS,
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "3782 822463 10005",
        " 4111111111111111\n",
        "４１１１１１１１１１１１１１１１",
    ],
)
def test_these_look_like_cards(text):
    assert looks_like_card(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4111111111111112",  # the checksum is wrong
        "411111111111",  # 12 digits that satisfy it are too few
        "00000000000000000000",  # 20 are too many
        "4111  1111 1111 1111",
        "4111--111111111111",
        "4111.1111.1111.1111",
        "-4111111111111111",
        "4111111111111111-",
        "card 4111111111111111",
        "²²²²²²²²²²²²²",  # digits to isdigit, not to int
        "hmac:4111111111111111",
    ],
)
def test_these_do_not(text):
    assert not looks_like_card(text)


@given(st.integers(0, 10**21 - 1), st.integers(0, 21))
def test_whatever_the_digits_the_checksum_is_the_standard_one(number, width):
    text = str(number).zfill(width)
    assert looks_like_card(text) == (13 <= len(text) <= 19 and luhn(text))


def test_a_hash_is_half_of_hmac_sha256_of_the_text():
    want = hmac.new(KEY, b"4111111111111111", hashlib.sha256).hexdigest()[:32]
    assert identifiers().stored("user", "4111111111111111") == f"hmac:{want}"
    assert identifiers().stored("merchant", "4111111111111111") == f"hmac:{want}"  # so that columns can be joined
    assert identifiers(key=bytes(32)).stored("user", "4111111111111111") != f"hmac:{want}"
    assert is_stored_form(f"hmac:{want}")


def test_what_is_kept_is_the_same_object():
    """The decoder stores a row as it came where nothing in it was hashed."""
    text = "merchant-".join(["", "1234567890"])
    assert identifiers().stored("merchant", text) is text
    assert identifiers("keep").of("merchant") is None
    assert identifiers(key=None).of("user") is None
    assert identifiers(key=None).without_cards("4111111111111111") == "4111111111111111"


@pytest.mark.parametrize("default", ["cards", "hash"])
def test_a_value_in_the_form_of_a_hash_is_hashed(default):
    """Else a client could post `hmac:...` as it stands in an answer and pass for that user."""
    hide = identifiers(default)
    once = hide.stored("user", "4111111111111111")
    twice = hide.stored("user", once)
    assert is_stored_form(twice)
    assert twice != once
    assert hide.named("user", once) == once  # in a path it names what is stored
    assert hide.named("user", "4111111111111111") == once


def test_what_becomes_of_each_column():
    cards = dict.fromkeys(("user", "kind", "merchant", "ip"), "cards")
    assert treatments(SCHEMA, IdentifiersConfig()) == {**cards, "id": "keep"}  # a counter is a card one time in ten
    everything = dict.fromkeys(("user", "merchant", "ip"), "hash")
    assert treatments(SCHEMA, IdentifiersConfig("hash")) == {**everything, "kind": "cards", "id": "keep"}
    some = IdentifiersConfig("keep", {"user": "hash", "id": "hash"})
    kept = dict.fromkeys(("kind", "merchant", "ip"), "keep")
    assert treatments(SCHEMA, some) == {**kept, "user": "hash", "id": "hash"}


def test_an_address_keeps_its_network():
    """The network is the entity: two addresses of one network still meet there, and are still two addresses."""
    hide = identifiers("hash")
    a, b, c = (hide.stored("ip", ip) for ip in ("10.1.2.3", "10.1.2.4", "10.1.3.4"))
    assert len({a, b, c}) == 3
    assert all(is_stored_form(text) and "10.1" not in text for text in (a, b, c))
    assert network_of(a) == network_of(b) != network_of(c)
    mapped, six = hide.stored("ip", "::ffff:10.1.2.9"), hide.stored("ip", "2001:db8::1")
    assert network_of(mapped) == network_of(a)
    assert network_of(six) not in (None, network_of(a))
    nothing = hide.stored("ip", "no address")
    assert is_stored_form(nothing)
    assert network_of(nothing) is None


VALUES = st.sampled_from([*CARDS, "4111 1111 1111 1111", "a", "10.1.2.3", "2001:db8::1", "x" * 40, "hmac:" + "0" * 32])


@pytest.mark.parametrize("default", ["cards", "hash", "keep"])
@given(rows=st.lists(st.tuples(VALUES, VALUES | st.none(), VALUES | st.none(), VALUES | st.none()), max_size=20))
@example(rows=[])
def test_a_column_is_hashed_like_its_values(default, rows):
    hide = identifiers(default, id="hash", merchant="keep")

    def coded(texts):
        values = list(dict.fromkeys(t for t in texts if t is not None))
        return Coded(np.array([-1 if t is None else values.index(t) for t in texts], dtype=np.int32), values)

    users, kinds, merchants, ips = ([row[i] for row in rows] for i in range(4))
    count = len(rows)
    ids = np.arange(count, dtype=np.int64) // 2 + 4111111111111111
    table = Transactions(
        SCHEMA, coded(users), np.zeros(count, dtype=np.int64), np.zeros((count, 1)),
        (coded(kinds), coded(merchants), coded(ips)), None, None, ids, np.arange(count, dtype=np.int64),
    )  # fmt: skip
    hidden = hide.table(table)

    def one_by_one(column, texts):
        return [None if text is None else hide.stored(column, text) for text in texts]

    assert hidden.user.texts() == one_by_one("user", users)
    for column, texts, got in zip(SCHEMA.texts, (kinds, merchants, ips), hidden.texts, strict=True):
        assert got.texts() == one_by_one(column, texts)
    assert hidden.id_texts() == [hide.stored("id", str(i)) for i in ids.tolist()]
    assert [e.codes.tolist() for e in hidden.entities()] == [e.codes.tolist() for e in table.entities()]


# ---- the key


def test_a_key_is_made_for_its_owner_only(tmp_path):
    path = tmp_path / "identifier.key"
    key = make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path) == key != make_key(tmp_path / "other")
    assert len(key) == 32
    assert sorted(f.name for f in tmp_path.iterdir()) == ["identifier.key", "other"]
    assert key_check(key) != key_check(bytes(32))
    assert key.hex() not in key_check(key)


@pytest.mark.parametrize("mode", [0o604, 0o660, 0o602, 0o644])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "identifier.key"
    make_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}: .*chmod 600"):
        read_key(path)


def test_a_key_that_the_group_may_read_is_warned_of(tmp_path, caplog):
    """A secret mounted into a container often is."""
    path = tmp_path / "identifier.key"
    key = make_key(path)
    path.chmod(0o440)
    assert read_key(path) == key
    assert "group may read the identifier key" in caplog.text


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"00" * 33, b"zz" * 32, b"\xff" * 64])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"not an identifier key; expected 64 hexadecimal digits$"):
        read_key(path)


def test_a_missing_key_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such identifier key; make one with: \(umask 077; openssl rand"):
        read_key(tmp_path / "key")
