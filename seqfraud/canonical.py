"""One spelling for every identifier, category, network and time, offline and online alike.

A user `42` in a Parquet file, `"42"` in a CSV file and `42` in a request are the same user: identifiers and categories
are compared as the texts made here.
"""

import hashlib
import ipaddress
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

from seqfraud.config import TimeUnit, format_instant, instant_ms

HASHED_PREFIX = "hmac:"
"""How the stored form of a hashed identifier begins (`seqfraud.identifiers`)."""

IPV4_PREFIX = 24
IPV6_PREFIX = 48

LARGEST_NUMBER = 1e30
"""The largest number, up or down: sums of many such still fit float32; one infinity would spoil a state for good."""

EARLIEST_MS = -62_135_596_800_000
"""The year 1; ISO 8601 texts have no earlier time."""
LATEST_MS = 253_402_300_800_000
"""The year 10000; ISO 8601 texts have no later time."""

TIME_WORDS: dict[TimeUnit, str] = {
    "iso": "an ISO 8601 time",
    "s": "a time in seconds since 1970",
    "ms": "a time in milliseconds since 1970",
}
"""What is expected of a time, for messages."""

FLOAT_SECONDS_ERROR = 2.0**-51
"""How far, relatively, a float of seconds times 1000 may lie off what it spells: 1.001 * 1000 is below 1001."""


def canonical_text(value: object) -> str:
    """Text of an identifier or category: integers in decimal, whole numbers like integers, strings as they are.

    An empty text is a missing one, which callers see to.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)


def network_of(text: str) -> str | None:
    """The network an IP address belongs to (/24 or /48), which stands for the address as a context entity.

    None where the text is no IP address. Of a hashed address it is the hash that the address carries.
    """
    if text.startswith(HASHED_PREFIX):
        return text.partition("/")[2] or None
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    prefix = IPV4_PREFIX if address.version == 4 else IPV6_PREFIX
    return str(ipaddress.ip_network((address, prefix), strict=False))


def time_ms(value: str | int | float, unit: TimeUnit) -> int:
    """Milliseconds since the epoch of a time as a request or a text file spells it.

    ISO 8601 text without a zone is UTC; parts of a millisecond are dropped. Raises ValueError.
    """
    if unit == "iso":
        if not isinstance(value, str):
            raise ValueError("expected an ISO 8601 time")
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return instant_ms(moment)
    number = float(value) if isinstance(value, str) else value
    if unit == "ms":
        return int(number // 1)
    if isinstance(number, int):
        return number * 1000
    ms = number * 1000
    return int((ms + abs(ms) * FLOAT_SECONDS_ERROR) // 1)


def spell_time(ms: int, unit: TimeUnit) -> str | int | float:
    """A time as a request spells it in this unit."""
    if unit == "iso":
        return format_instant(ms)
    if unit == "ms":
        return ms
    return ms // 1000 if ms % 1000 == 0 else ms / 1000


def content_digest(user: str, time: int, numbers: Sequence[float | None], texts: Sequence[str | None]) -> bytes:
    """16 bytes that identify the declared content of a transaction without its id.

    Args:
        user: canonical text.
        time: milliseconds since the epoch.
        numbers: numeric inputs and the amount, None or NaN where missing.
        texts: canonical texts of the other declared columns, None where missing.
    """
    parts = [struct.pack("<q", time), _sized(user)]
    parts += [b"-" if x is None or x != x else b"+" + struct.pack("<d", x + 0.0) for x in numbers]
    parts += [b"-" if text is None else b"+" + _sized(text) for text in texts]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _sized(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<I", len(data)) + data
