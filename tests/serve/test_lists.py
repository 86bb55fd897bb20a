"""Block and allow lists alone: what is on them, until when, and networks."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfraud.config import IdentifiersConfig
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers
from seqfraud.schema import Schema
from serve.lists import Entry, NamedList, stored_value

SCHEMA = Schema(user="user", time="time", context=("merchant",), ip=("ip",))
PLAIN = Identifiers(SCHEMA, IdentifiersConfig("keep"), None)
HASHED = Identifiers(SCHEMA, IdentifiersConfig("hash"), bytes(32))
VALUES = st.sampled_from(["a", "b", "42", "c d"])
ENDS = st.none() | st.integers(0, 20)
STEPS = st.lists(st.tuples(VALUES, st.booleans(), ENDS), max_size=12)
ADDRESSES = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address) | st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)


def entry(expires: int | None = None, why: str = "because") -> Entry:
    return Entry(expires, why, 5, "key")


@given(STEPS, VALUES, st.integers(0, 20))
def test_the_last_word_counts_until_its_end(steps, value, time):
    held = NamedList("x", "block", "user", is_ip=False)
    slow: dict[str, int | None] = {}
    for name, add, expires in steps:
        if add:
            held.add(name, entry(expires))
            slow[name] = expires
        else:
            assert held.remove(name) == (name in slow)
            slow.pop(name, None)
    expected = value in slow and (slow[value] is None or time < slow[value])
    assert (held.match(value, time) is not None) == expected
    assert held.entries.keys() == slow.keys()
    assert held.match(None, time) is None


@given(ADDRESSES, st.lists(st.tuples(st.integers(0, 128), ENDS), max_size=6), st.data(), st.integers(0, 20))
def test_networks_hold_the_addresses_in_them(address, lengths, data, time):
    """Against `ipaddress` itself; the narrowest network that is in force is the one that is named."""
    held = NamedList("x", "block", "ip", is_ip=True)
    inside: list[tuple[int, str]] = []
    for length, expires in lengths:
        length = min(length, address.max_prefixlen)
        near = data.draw(st.booleans())
        start = address if near else type(address)(int(address) ^ (1 << (address.max_prefixlen - 1)))
        network = ipaddress.ip_network((start, length), strict=False)
        value = stored_value(SCHEMA, PLAIN, "ip", str(network))
        held.add(value, entry(expires, why=value))
        inside = [one for one in inside if one[1] != value]
        if address in network and (expires is None or time < expires):
            inside.append((length, value))
    found = held.match(str(address), time)
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is None:
        assert (found is None) == (not inside)
        assert found is None or found.why == max(inside)[1]
    for value in list(held.entries):
        held.remove(value)
    assert held.match(str(address), time) is None and not held._networks


def test_addresses_are_the_same_however_they_are_spelled():
    held = NamedList("x", "block", "ip", is_ip=True)
    held.add(stored_value(SCHEMA, PLAIN, "ip", "2001:DB8::0001"), entry())
    held.add(stored_value(SCHEMA, PLAIN, "ip", "::ffff:192.0.2.7"), entry())
    held.add(stored_value(SCHEMA, PLAIN, "ip", "198.51.100.77/24"), entry())
    for value in ("2001:db8::1", "2001:0db8:0:0::1", "192.0.2.7", "::ffff:192.0.2.7", "198.51.100.1", " 192.0.2.7 "):
        assert held.match(value, 0), value
    for value in ("192.0.2.8", "198.51.101.1", "no address", ""):
        assert not held.match(value, 0), value


def test_values_compare_as_they_are_stored():
    assert stored_value(SCHEMA, PLAIN, "user", "42") == "42"
    hidden = stored_value(SCHEMA, HASHED, "user", "42")
    assert hidden == HASHED.stored("user", "42") and "42" not in hidden.partition(":")[0]
    assert stored_value(SCHEMA, HASHED, "user", hidden) == hidden, "as an answer shows it"


def test_hashed_addresses_are_found_by_address_and_by_their_network():
    transaction = HASHED.stored("ip", "192.0.2.7")
    for value in ("192.0.2.7", "192.0.2.0/24", transaction):
        held = NamedList("x", "block", "ip", is_ip=True)
        held.add(stored_value(SCHEMA, HASHED, "ip", value), entry())
        assert "192" not in next(iter(held.entries))
        assert held.match(transaction, 0), value
        assert not held.match(HASHED.stored("ip", "203.0.113.9"), 0)
    with pytest.raises(RequestError, match="expected an address, or a network of /24"):
        stored_value(SCHEMA, HASHED, "ip", "192.0.0.0/16")


@pytest.mark.parametrize("value", ["", "no address", "192.0.2.0/33", "1.2.3"])
def test_what_is_no_address_is_refused(value):
    with pytest.raises(RequestError) as caught:
        stored_value(SCHEMA, PLAIN, "ip", value)
    assert (caught.value.status, caught.value.field) == (422, "value")
