"""Block and allow lists: values of one field, each with an optional end.

A value compares as the service stores it: identifiers as decimal strings, hashed where the configuration hashes them. A list
of a column with IP addresses also holds networks. Of hashed addresses only the network that is their context entity (/24,
/48) can be told, since that is what is kept of it.
"""

import ipaddress
from collections.abc import Iterable
from typing import Literal

import msgspec

from seqfraud.canonical import HASHED_PREFIX, network_of
from seqfraud.errors import RequestError
from seqfraud.identifiers import Identifiers, is_stored_form
from seqfraud.schema import Schema

__all__ = ["Entry", "ListKind", "NamedList", "stored_value"]

ListKind = Literal["allow", "block"]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Entry(msgspec.Struct, frozen=True, gc=False):
    """Why a value is on a list: said by whom and when (ms); `expires`, ms, is the first time that it is not for.

    Values that were said together share one.
    """

    expires: int | None
    why: str
    at: int
    author: str


class NamedList:
    """One list; changed by the fold of the journal only."""

    def __init__(self, name: str, kind: ListKind, field: str, is_ip: bool) -> None:
        self.name = name
        self.kind = kind
        self.field = field
        self._is_ip = is_ip
        self.matched = 0
        """How often it decided since the start."""
        self.entries: dict[str, Entry] = {}
        self._networks: dict[tuple[int, int], dict[int, str]] = {}
        """(version, length of the prefix) -> the network's address as a number -> the entry's value."""

    def add(self, value: str, entry: Entry) -> None:
        """Put a stored value on the list, or say anew why and until when."""
        self.entries[value] = entry
        if self._is_ip and "/" in value and not value.startswith(HASHED_PREFIX):
            network = ipaddress.ip_network(value)
            self._networks.setdefault((network.version, network.prefixlen), {})[int(network.network_address)] = value

    def remove(self, value: str) -> bool:
        """Take a value off the list; whether it was there."""
        if self.entries.pop(value, None) is None:
            return False
        if self._is_ip and "/" in value and not value.startswith(HASHED_PREFIX):
            network = ipaddress.ip_network(value)
            held = self._networks[network.version, network.prefixlen]
            del held[int(network.network_address)]
            if not held:
                del self._networks[network.version, network.prefixlen]
        return True

    def match(self, value: str | None, time: int) -> Entry | None:
        """The entry that is in force at a time (ms) for a stored value; of networks, the narrowest."""
        if value is None or not self.entries:
            return None
        entry = self.entries.get(value)
        if entry is not None and (entry.expires is None or time < entry.expires):
            return entry
        if not self._is_ip:
            return None
        return next((e for e in self._around(value) if e.expires is None or time < e.expires), None)

    def _around(self, value: str) -> Iterable[Entry]:
        """Entries of the address itself, however it is spelled, and of networks around it."""
        if value.startswith(HASHED_PREFIX):
            alone, _, network = value.partition("/")
            keys: Iterable[str] = (alone, f"{HASHED_PREFIX}{network}")
            return (self.entries[key] for key in keys if key in self.entries)
        address = _address(value)
        if address is None:
            return ()
        number, bits = int(address), address.max_prefixlen
        found = [
            (length, held[masked])
            for (version, length), held in self._networks.items()
            if version == address.version and (masked := number >> (bits - length) << (bits - length)) in held
        ]
        keys = [str(address), *(value for _, value in sorted(found, reverse=True))]
        return (self.entries[key] for key in keys if key in self.entries)


def stored_value(schema: Schema, hidden: Identifiers, field: str, text: str, where: str = "value") -> str:
    """What a value of a list, as canonical text, is stored as: what a transaction's would be. Raises RequestError 422."""
    if not text:
        raise _refused(where, '""', "a value that is not empty")
    if field not in schema.ip:
        return hidden.named(field, text)
    if is_stored_form(text):
        return text.partition("/")[0]
    address = _address(text)
    hashed = hidden.treatments.get(field) == "hash"
    if address is not None:
        return hidden.hashed(text) if hashed else str(address)
    try:
        network = _unmapped(ipaddress.ip_network(text.strip(), strict=False))
    except ValueError:
        raise _refused(where, f"{text!r:.60}", "an IP address, or a network such as 192.0.2.0/24") from None
    if not hashed:
        return str(network)
    if network_of(str(network.network_address)) != str(network):
        raise _refused(
            where, str(network), f"an address, or a network of /24 or /48: addresses in {field} are stored hashed"
        )
    return hidden.hashed(str(network))


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def _unmapped(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return (
        network if mapped is None or network.prefixlen < 96 else ipaddress.ip_network((mapped, network.prefixlen - 96))
    )


def _refused(where: str, seen: str, expected: str) -> RequestError:
    return RequestError(422, "invalid_field", f"{where}: {seen}; expected {expected}", where)
