"""The server's connections seen from outside granian: the slow, the idle, and those it has no room for.

Granian has a bound on connections and leaves what comes beyond it in the kernel's queue, without a word and for as long as
the others stay; it waits for a body, and for an answer to be read, as long as the client likes. What is needed to do better
the kernel knows of each socket (TCP_INFO); a shutdown of a socket is a client that went away, as far as granian can tell.
Linux only: elsewhere nothing here is done.
"""

import ctypes
import errno
import logging
import math
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve.answers import refusal_body
from serve.overload import Admission, OverloadSettings, QueueClock

__all__ = ["Guard"]

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.025
STANDING_TICKS = 4
"""Connections that waited at the door for so many ticks wait for room, not for granian's next look."""
STALL_SECONDS = 0.1
"""A tick that comes so late, while this process did not run either, is the machine's fault."""
HURRIED_SECONDS = 0.25
"""For a body to arrive where half of the threads wait for one."""
IDLE_SECONDS = 1.0
"""A connection may be closed for a new one after so long without a byte."""
LINGER_SECONDS = 5.0
"""For a request to be answered, where there is no room for another connection."""
TIMES_DIFFER_SECONDS = 0.01
"""Between the kernel's time of a request and ours."""
SCAN_SECONDS = 5.0
RESCAN_SECONDS = 0.1
"""Between two scans where something is to be done: a thousand connections take some milliseconds."""
SCANNED_AT_ONCE = 64

GUESTS = 512
GUESTS_AT_ONCE = 128
GUEST_SECONDS = 0.25
FAREWELL_SECONDS = 1.0

# struct tcp_info of Linux: state, unacked, last_data_sent, last_data_recv, bytes_acked, bytes_received, notsent_bytes
_TCP_INFO = struct.Struct("<B23xI16xI4xI64xQQ8xI")
_LINUX = sys.platform == "linux"


class Gateway(Protocol):
    """What is asked of the server's gateway."""

    @property
    def is_busy(self) -> bool:
        """Whether the thread that takes requests is at one."""


@dataclass(slots=True, frozen=True)
class Connection:
    """A connection to the service's port; times in monotonic seconds, to about 10 ms.

    `since`: when the request came that is not answered yet; inf where there is none.
    """

    descriptor: int
    peer: tuple[str, int]
    heard: float
    spoke: float
    acked: int
    unread: bool
    since: float


class Kernel:
    """The calls that are needed of the C library, on descriptors, all of them quick.

    Python's own give the interpreter up and, beside a thread that computes, wait up to 5 ms to have it back: for a thousand
    connections that is seconds. These keep it.
    """

    def __init__(self) -> None:
        self._libc = ctypes.PyDLL(None, use_errno=True)
        self._buffer = ctypes.create_string_buffer(4096)
        self._length = ctypes.c_uint()

    def own_port(self, descriptor: int) -> int | None:
        """The local port of a socket; None: it has none."""
        address = self._address(self._libc.getsockname, descriptor)
        return None if address is None else address[1]

    def peer(self, descriptor: int) -> tuple[str, int] | None:
        """Address and port at the other end; None: not connected, or no socket."""
        return self._address(self._libc.getpeername, descriptor)

    def _address(self, ask: Callable[..., int], descriptor: int) -> tuple[str, int] | None:
        self._length.value = 128
        if ask(descriptor, self._buffer, ctypes.byref(self._length)):
            return None
        raw = self._buffer.raw[: self._length.value]
        family = int.from_bytes(raw[:2], sys.byteorder)
        if family not in (socket.AF_INET, socket.AF_INET6):
            return None
        host = raw[4:8] if family == socket.AF_INET else raw[8:24]
        return socket.inet_ntop(family, host), int.from_bytes(raw[2:4], "big")

    def tcp_info(self, descriptor: int) -> tuple[int, ...] | None:
        """As _TCP_INFO has it."""
        self._length.value = _TCP_INFO.size
        failed = self._libc.getsockopt(
            descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, self._buffer, ctypes.byref(self._length)
        )
        if failed or self._length.value < _TCP_INFO.size:
            return None
        return _TCP_INFO.unpack_from(self._buffer)

    def accept(self, listener: int) -> int:
        """A new connection that does not block; negative: there is none."""
        return int(self._libc.accept4(listener, None, None, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))

    def receive(self, descriptor: int) -> bytes | None:
        """What has come, empty at the end; None: nothing yet."""
        count = self._libc.recv(descriptor, self._buffer, len(self._buffer), socket.MSG_DONTWAIT)
        if count < 0:
            return None if ctypes.get_errno() == errno.EAGAIN else b""
        return self._buffer.raw[:count]

    def send(self, descriptor: int, data: bytes) -> None:
        """As far as there is room."""
        self._libc.send(descriptor, data, len(data), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def shutdown(self, descriptor: int, how: int) -> None:
        """Whether or not it is a connection."""
        self._libc.shutdown(descriptor, how)

    def close(self, descriptor: int) -> None:
        """Of one that `accept` gave."""
        self._libc.close(descriptor)


class Scanner:
    """Finds the connections, and remembers since when each has owed an answer."""

    def __init__(self, kernel: Kernel, port: int) -> None:
        self._kernel = kernel
        self._port = port
        self._owed: dict[tuple[str, int], tuple[int, float]] = {}

    def shutdown(self, one: Connection, how: int) -> bool:
        """Shut a connection down, if it is still there: its descriptor may be closed or another's any time."""
        there = self._kernel.peer(one.descriptor) == one.peer
        if there:
            self._kernel.shutdown(one.descriptor, how)
        return there

    def scan(self, now: float) -> list[Connection]:
        """Every connection to the port from elsewhere."""
        found: list[Connection] = []
        for at, name in enumerate(os.listdir("/proc/self/fd")):
            if at % SCANNED_AT_ONCE == SCANNED_AT_ONCE - 1:
                time.sleep(0)  # lets the threads that answer in
            connection = self._look(int(name), now)
            if connection is not None:
                found.append(connection)
        self._owed = {one.peer: (one.acked, one.since) for one in found if one.since < math.inf}
        return found

    def _look(self, descriptor: int, now: float) -> Connection | None:
        if self._kernel.own_port(descriptor) != self._port:
            return None
        peer, info = self._kernel.peer(descriptor), self._kernel.tcp_info(descriptor)
        if peer is None or info is None:
            return None
        _, unacked, sent_ms, received_ms, acked, received, unsent = info
        owes = received > 0 and (acked == 0 or received_ms < sent_ms) and not unacked and not unsent
        since = math.inf
        if owes:
            before = self._owed.get(peer)
            since = before[1] if before is not None and before[0] == acked else now - received_ms / 1000
        return Connection(
            descriptor=descriptor,
            peer=peer,
            heard=now - received_ms / 1000,
            spoke=now - sent_ms / 1000,
            acked=acked,
            unread=unacked + unsent > 0,
            since=since,
        )


class Door:
    """Turns away the connections that granian has no room for: 503 at once, instead of silence."""

    def __init__(
        self, kernel: Kernel, listener: socket.socket, ready: Callable[[], bool], retry_after: int, tls: bool
    ) -> None:
        self._kernel = kernel
        self._listener = listener
        self._ready = ready
        self._tls = tls
        body = refusal_body("overloaded", "the service has as many connections as it can; ask again")
        self._refusal = _response("503 Service Unavailable", body, retry_after)
        self.turned_away = 0
        self._standing = 0
        self._guests: dict[int, float] = {}
        self._leaving: dict[int, float] = {}

    def waiting(self) -> int:
        """Connections that have been standing at the door, now; 0 where they come and go."""
        info = self._kernel.tcp_info(self._listener.fileno())
        count = 0 if info is None else info[1]  # of a listening socket: the length of its queue
        self._standing = self._standing + 1 if count else 0
        return count if self._standing >= STANDING_TICKS else 0

    def let_in(self, count: int, now: float) -> None:
        """Accept up to `count` of those that stand there, to be told that there is no room."""
        for _ in range(min(count, GUESTS_AT_ONCE, GUESTS - len(self._guests) - len(self._leaving))):
            guest = self._kernel.accept(self._listener.fileno())
            if guest < 0:
                return
            self.turned_away += 1
            self._guests[guest] = now

    def attend(self, now: float) -> None:
        """Answer those that have asked or waited, and close those that have read it."""
        for guest, came in list(self._guests.items()):
            asked = b"" if self._tls else self._kernel.receive(guest)
            if asked is None and now - came < GUEST_SECONDS:
                continue
            del self._guests[guest]
            self._leaving[guest] = now
            if not self._tls:
                self._kernel.send(guest, self._answer(asked or b""))
            self._kernel.shutdown(guest, socket.SHUT_WR)
        for guest, left in list(self._leaving.items()):
            # with unread data a close would be a reset, and the answer lost
            if now - left > FAREWELL_SECONDS or self._kernel.receive(guest) == b"":
                del self._leaving[guest]
                self._kernel.close(guest)

    def _answer(self, asked: bytes) -> bytes:
        if asked.startswith(b"GET /healthz "):
            return _response("200 OK", b'{"status":"ok"}')
        if asked.startswith(b"GET /readyz ") and self._ready():
            return _response("200 OK", b'{"status":"ready"}')
        return self._refusal

    def close(self) -> None:
        """Close the door's own end; granian's stays."""
        for guest in [*self._guests, *self._leaving]:
            self._kernel.close(guest)
        self._listener.close()


def _response(status: str, body: bytes, retry_after: int | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if retry_after is not None:
        lines.append(f"retry-after: {retry_after}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Guard:
    """The thread that drives the clock and looks after the connections."""

    def __init__(
        self,
        listener: socket.socket,
        gateway: Gateway,
        admission: Admission,
        clock: QueueClock,
        ready: Callable[[], bool],
        settings: OverloadSettings,
        threads: int,
        tls: bool,
    ) -> None:
        """`listener`: the Guard's own, to be closed by it."""
        self._gateway = gateway
        self._admission = admission
        self._clock = clock
        self._settings = settings
        self._threads = threads
        kernel = Kernel()
        self._scanner = Scanner(kernel, listener.getsockname()[1])
        self._door = Door(kernel, listener, ready, settings.retry_after_seconds, tls)
        self._cut: set[tuple[str, int]] = set()
        self._cut_off = 0
        self._urgency = 1
        self._full = False
        self._scan_at = -math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="overload-guard", daemon=True)

    def start(self) -> None:
        """Begin; the clock's connections are the first in."""
        self._clock.tick(time.monotonic(), busy=False)
        self._thread.start()

    def stop(self) -> None:
        """End; the port is granian's alone after that."""
        self._closing.set()
        self._thread.join()
        self._clock.close()
        self._door.close()

    def owes_nothing(self) -> bool:
        """Whether every connection has been answered, and has taken the answer; False where that cannot be seen."""
        return _LINUX and all(one.since == math.inf and not one.unread for one in self._scanner.scan(time.monotonic()))

    @property
    def refusals(self) -> dict[str, int]:
        """Connections turned away for want of room, and clients cut off because they were slow."""
        return {"connections": self._door.turned_away, "slow": self._cut_off}

    def _watch(self) -> None:
        before, ran_before = time.monotonic(), time.process_time()
        while not self._closing.wait(TICK_SECONDS):
            now, ran = time.monotonic(), time.process_time()
            late = now - before - TICK_SECONDS
            if late > STALL_SECONDS and ran - ran_before < late / 10:
                self._clock.stood_still(late)
            before, ran_before = now, ran
            try:
                self._clock.tick(now, self._gateway.is_busy)
                if _LINUX:
                    self._look_after(now)
            except Exception:  # of any kind: with a clock that stands, everything would be refused
                _log.exception("the overload guard failed; it goes on")
                self._clock.close()

    def _look_after(self, now: float) -> None:
        late, newest = self._late_bodies(now)
        waiting = self._door.waiting()
        if now - self._scan_at > (RESCAN_SECONDS if late or waiting else SCAN_SECONDS):
            own = self._clock.peers()
            connections = [one for one in self._scanner.scan(now) if one.peer[1] not in own]
            self._scan_at = now
            self._cut_late(connections, late, newest + TIMES_DIFFER_SECONDS, now)
            for one in connections:
                if one.unread and one.spoke < now - self._settings.unread_seconds:
                    self._cut_off += self._scanner.shutdown(one, socket.SHUT_RDWR)
            self._full = waiting > self._make_room(connections, waiting, now)
        if waiting and self._full:
            self._door.let_in(waiting, now)
        self._door.attend(now)

    def _cut_late(self, connections: list[Connection], late: Counter[str], before: float, now: float) -> None:
        """End as many requests as there are late bodies, by the client's address: they are told that they are incomplete.

        Which those are granian does not say. Requests are taken in order, so what came first and is not answered is what the
        threads wait for, but for what came within a few milliseconds: where it was not those, twice as many are next.
        """
        self._cut.intersection_update([one.peer for one in connections])
        self._urgency = min(2 * self._urgency, 1024) if late else 1
        cut: Counter[str] = Counter()
        for one in sorted(connections, key=_since):
            still_sending = one.since < now - HURRIED_SECONDS and one.heard > one.since + TIMES_DIFFER_SECONDS
            if one.since >= before and not still_sending:
                continue
            if cut[one.peer[0]] < late[one.peer[0]] * self._urgency and one.peer not in self._cut:
                cut[one.peer[0]] += 1
                self._cut.add(one.peer)
                self._cut_off += self._scanner.shutdown(one, socket.SHUT_RD)

    def _late_bodies(self, now: float) -> tuple[Counter[str], float]:
        """How many bodies took too long, by the client's address; and since when the newest of them has been waited for."""
        reading = self._admission.reading()
        hurried = 2 * len(reading) >= self._threads
        patience = min(HURRIED_SECONDS, self._settings.body_seconds) if hurried else self._settings.body_seconds
        late = [(address, began) for address, began in reading if began < now - patience]
        return Counter(address for address, _ in late), max((began for _, began in late), default=-math.inf)

    def _make_room(self, connections: list[Connection], count: int, now: float) -> int:
        """Close up to `count` that do nothing, for those that stand at the door; how many there were."""
        idle = [one for one in connections if one.since == math.inf and not one.unread]
        can_go = [one for one in sorted(idle, key=_last) if _last(one) < now - IDLE_SECONDS]
        can_go += [one for one in sorted(connections, key=_since) if one.since < now - LINGER_SECONDS]
        return sum(self._scanner.shutdown(one, socket.SHUT_RD) for one in can_go[:count])


def _since(one: Connection) -> tuple[float, int]:
    return one.since, one.descriptor  # of those that came together, the lower was accepted first


def _last(one: Connection) -> float:
    return max(one.heard, one.spoke)
