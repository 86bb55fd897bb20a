"""One spelling of identifiers, networks and times, and a digest that tells different contents apart."""

import math
import struct
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqfraud.canonical import canonical_text, content_digest, network_of, spell_time, time_ms
from seqfraud.config import TimeUnit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        ("42", "42"),
        (42.0, "42"),
        ("007", "007"),
        (-3, "-3"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (4_716_123_456_789_012_345, "4716123456789012345"),
        (9_999_999_999_999_999_999, "9999999999999999999"),
        (1e15, "1000000000000000"),
        (True, "true"),
        (False, "false"),
        ("True", "True"),
        ("", ""),
        (" 42", " 42"),
        (Decimal("5"), "5"),
        (np.float64(7.0), "7"),
        (np.int64(7), "7"),
        (math.inf, "inf"),
    ],
)
def test_canonical_text(value: object, text: str) -> None:
    assert canonical_text(value) == text


@given(st.integers(-(2**63), 2**64))
def test_integers_keep_every_digit(value: int) -> None:
    assert canonical_text(value) == str(value) == canonical_text(str(value))


@given(st.integers(-(2**53), 2**53))
def test_whole_floats_are_integers(value: int) -> None:
    assert canonical_text(float(value)) == str(value)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.77", "203.0.113.0/24"),
        ("203.0.113.0", "203.0.113.0/24"),
        (" 203.0.113.77\n", "203.0.113.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("2001:0DB8:0001:ffff::", "2001:db8:1::/48"),
        ("::ffff:203.0.113.77", "203.0.113.0/24"),
        ("::ffff:cb00:714d", "203.0.113.0/24"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", None),
        ("203.0.113", None),
        ("203.0.113.256", None),
        ("203.0.113.077", None),
        ("203.0.113.0/24", None),
        ("example.org", None),
        ("3405803853", None),
    ],
)
def test_network_of(address: str, network: str | None) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("value", "unit", "ms"),
    [
        ("2018-04-01", "iso", 1_522_540_800_000),
        ("2018-04-01T10:30:00", "iso", 1_522_578_600_000),
        ("2018-04-01 10:30:00+02:00", "iso", 1_522_571_400_000),
        ("2018-04-01T10:30:00.123456Z", "iso", 1_522_578_600_123),
        ("2018-04-01T10:30:00.1239999999Z", "iso", 1_522_578_600_123),
        ("1969-12-31T23:59:59.999", "iso", -1),
        ("1969-12-31T23:59:59.9989", "iso", -2),
        ("0001-01-01", "iso", -62_135_596_800_000),
        (1_522_540_800, "s", 1_522_540_800_000),
        ("1522540800", "s", 1_522_540_800_000),
        (1_522_540_800.5, "s", 1_522_540_800_500),
        ("1522540800.123", "s", 1_522_540_800_123),
        (1.0019, "s", 1001),
        (-0.0015, "s", -2),
        (-5, "s", -5000),
        (1_522_540_800_123, "ms", 1_522_540_800_123),
        ("1522540800123", "ms", 1_522_540_800_123),
        (1_522_540_800_123.9, "ms", 1_522_540_800_123),
        (-0.5, "ms", -1),
    ],
)
def test_time_ms(value: str | float, unit: TimeUnit, ms: int) -> None:
    got = time_ms(value, unit)
    assert got == ms
    assert type(got) is int


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (1_522_540_800, "iso"), ("now", "iso"), ("", "iso"), ("2018-02-30", "iso"), ("1522540800", "iso"),
        ("2018-04-01", "s"), ("2018-04-01", "ms"), ("", "s"), (math.nan, "s"), (math.nan, "ms"),
        (math.inf, "s"), (-math.inf, "s"), (1e306, "s"), ("inf", "ms"), (-math.inf, "ms"),
    ],
)  # fmt: skip
def test_no_times(value: str | float, unit: TimeUnit) -> None:
    with pytest.raises(ValueError, match=r".+"):
        time_ms(value, unit)


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999), st.sampled_from(["iso", "s", "ms"]))
@example(1001, "s")
@example(1_522_540_800_001, "s")
@example(-1001, "s")
def test_a_spelled_time_is_read_back(ms: int, unit: TimeUnit) -> None:
    """1.001 s times 1000 is 1000.9999999999999 in floats: cut off, a replayed file had other times than the table."""
    assert time_ms(spell_time(ms, unit), unit) == ms
    if unit != "iso":
        assert time_ms(str(spell_time(ms, unit)), unit) == ms


@given(st.datetimes(), st.sampled_from(["", "Z", "+05:30", "-11:00"]))
def test_iso_times_equal_python_s_own(moment: datetime, zone: str) -> None:
    text = moment.isoformat() + zone
    aware = datetime.fromisoformat(text)
    aware = aware if aware.tzinfo else aware.replace(tzinfo=UTC)
    assert time_ms(text, "iso") == (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def test_spellings() -> None:
    assert spell_time(1_522_540_800_000, "iso") == "2018-04-01T00:00:00Z"
    assert spell_time(1_522_540_800_000, "s") == 1_522_540_800
    assert isinstance(spell_time(1_522_540_800_000, "s"), int)
    assert spell_time(1_522_540_800_250, "s") == 1_522_540_800.25
    assert spell_time(1_522_540_800_250, "ms") == 1_522_540_800_250


BASE = ("ann", 1_000, [1.5, None], ["shop", None])


def test_digest_is_the_same_for_the_same_content() -> None:
    digest = content_digest(*BASE)
    assert len(digest) == 16
    assert digest == content_digest("ann", 1_000, (1.5, math.nan), ("shop", None))


@pytest.mark.parametrize(
    "other",
    [
        ("anna", 1_000, [1.5, None], ["shop", None]),
        ("ann", 1_001, [1.5, None], ["shop", None]),
        ("ann", -1_000, [1.5, None], ["shop", None]),
        ("ann", 1_000, [-1.5, None], ["shop", None]),
        ("ann", 1_000, [1.5000000000000002, None], ["shop", None]),
        ("ann", 1_000, [1.5, 0.0], ["shop", None]),
        ("ann", 1_000, [None, 1.5], ["shop", None]),
        ("ann", 1_000, [1.5, None], ["shop", ""]),
        ("ann", 1_000, [1.5, None], [None, "shop"]),
        ("ann", 1_000, [1.5, None], ["Shop", None]),
        ("ann", 1_000, [1.5, None], ["sho", "p"]),
        ("ann", 1_000, [1.5, None], ["shop", "None"]),
    ],
)
def test_digest_tells_fields_apart(other: tuple[str, int, list[float | None], list[str | None]]) -> None:
    assert content_digest(*other) != content_digest(*BASE)


def test_digest_equates_what_is_equal() -> None:
    assert content_digest("u", 0, [-0.0], []) == content_digest("u", 0, [0.0], [])
    assert content_digest("u", 0, [3], []) == content_digest("u", 0, [3.0], [])
    lone_surrogate = "\ud800"
    assert content_digest(lone_surrogate, 0, [], [lone_surrogate]) != content_digest("?", 0, [], ["?"])


def test_digest_has_no_ambiguous_concatenation() -> None:
    """A missing number was one byte, a present one eight: "-" and x could read as y and "-"."""
    x = struct.unpack("<d", b"abcdefg-")[0]
    y = struct.unpack("<d", b"-abcdefg")[0]
    assert content_digest("u", 0, [None, x], []) != content_digest("u", 0, [y, None], [])
    # and the same between the user and the first number
    assert content_digest("u", 0, [x], []) != content_digest("uabcdefg", 0, [None], [])


@given(
    st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=3)), st.one_of(st.none(), st.floats())),
             min_size=2, max_size=8)
)  # fmt: skip
def test_digests_are_equal_exactly_where_contents_are(contents: list[tuple[str, str | None, float | None]]) -> None:
    def same(number: float | None) -> float | None:
        return None if number is None or math.isnan(number) else number + 0.0

    seen = {(user, text, same(number)) for user, text, number in contents}
    assert len({content_digest(user, 5, [number], [text]) for user, text, number in contents}) == len(seen)
