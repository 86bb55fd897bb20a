"""An open-loop client on one core: requests are due at a fixed rate, whatever became of those before.

    python -m benchmarks.open_loop PORT --rate 5000 --seconds 3 --connections 800

A request goes out on a connection that is free; where none is, on a new one, up to --connections; else it waits here, and is
given up after half of --patience; it is in time where it is answered within --patience. Latency counts from the moment when it was due, so what waits here counts too. --rate 0 is a
closed loop instead. Prints one line of JSON.
"""

import argparse
import collections
import json
import resource
import select
import socket
import time
from typing import Any

START_S = 1_750_000_000


class Client:
    """The connections, the requests that are due, and what became of them."""

    def __init__(self, port: int, first: int, most: int, batch: int) -> None:
        self._address = ("127.0.0.1", port)
        self._number = first
        self._most = most
        self._batch = batch
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._due: dict[int, float] = {}
        self._parts: dict[int, bytes] = {}
        self._free: list[int] = []
        self.waiting: collections.deque[float] = collections.deque()
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def request(self) -> bytes:
        """The next transaction, never the same again, or an array of so many as a batch has."""
        if self._batch == 1:
            return b"POST /v1/score" + _framed(self._transaction())
        return b"POST /v1/score/batch" + _framed(b"[%b]" % b",".join(self._transaction() for _ in range(self._batch)))

    def _transaction(self) -> bytes:
        n = self._number = self._number + 1
        return b'{"id":"o%d","user":"u%d","time":%d,"amount":%d.5,"kind":"a","merchant":"m%d","device":"d%d"}' % (
            n, n % 5000, (START_S + n // 1000) * 1000, n % 97, n % 300, n % 2000,
        )  # fmt: skip

    def open(self) -> bool:
        """One more connection, if there may be one."""
        if len(self._sockets) >= self._most:
            return False
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        if connection.connect_ex(self._address) not in (0, 115):
            self.counts["broken"] += 1
            return False
        number = connection.fileno()
        self._sockets[number] = connection
        self._poll.register(number, select.EPOLLIN)
        self._free.append(number)
        return True

    def send_due(self) -> None:
        """Send what is due, as far as there are connections."""
        while self.waiting and (self._free or self.open()):
            number = self._free.pop()
            self._due[number] = self.waiting.popleft()
            try:
                self._sockets[number].send(self.request())
                self.counts["sent"] += 1
            except OSError:
                self._drop(number)

    def give_up(self, before: float) -> None:
        """Forget what was due before a time and found no connection."""
        while self.waiting and self.waiting[0] < before:
            self.waiting.popleft()
            self.counts["given_up"] += 1

    def receive(self, seconds: float) -> None:
        """Take what answers there are."""
        for number, _ in self._poll.poll(max(0.0, seconds)):
            try:
                data = self._sockets[number].recv(65536)
            except OSError:
                data = b""
            if not data:
                self._drop(number)
                continue
            if number in self._parts:
                data = self._parts.pop(number) + data
            if not _whole(data):
                self._parts[number] = data
                continue
            latency = time.perf_counter() - self._due.pop(number)
            status = data[9:12].decode()
            self.counts[status] += 1
            (self.latencies if status == "200" else self.refusals).append(latency)
            if b"\r\nconnection: close\r\n" in data:
                self.counts["turned_away"] += 1
                self._drop(number)
            else:
                self._free.append(number)

    def _drop(self, number: int) -> None:
        self._poll.unregister(number)
        self._sockets.pop(number).close()
        self._parts.pop(number, None)
        if self._due.pop(number, None) is not None:
            self.counts["broken"] += 1
        elif number in self._free:
            self._free.remove(number)

    @property
    def outstanding(self) -> int:
        """Requests without an answer yet."""
        return len(self._due)

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._sockets)


def _framed(body: bytes) -> bytes:
    return b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _whole(data: bytes) -> bool:
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    at = data.find(b"content-length: ")
    return len(data) >= head + 4 + int(data[at + 16 : data.find(b"\r", at)])


def open_loop(client: Client, rate: float, seconds: float, patience: float) -> None:
    """Requests due at begin + k / rate."""
    begin = time.perf_counter()
    made, total = 0, int(rate * seconds)
    while made < total or client.waiting or client.outstanding:
        now = time.perf_counter()
        if now - begin > seconds + patience + 1:
            break
        due = min(total, int((now - begin) * rate) + 1)
        client.waiting.extend(begin + k / rate for k in range(made, due))
        made = due
        client.give_up(now - patience / 2)
        client.send_due()
        pause = begin + made / rate - time.perf_counter() if made < total else 0.05
        client.receive(min(pause, 0.05))
    client.counts["due"] = made


def closed_loop(client: Client, connections: int, seconds: float) -> None:
    """The next request once there is an answer."""
    stop = time.perf_counter() + seconds
    for _ in range(connections):
        client.open()
    while (now := time.perf_counter()) < stop:
        client.waiting.extend([now] * (connections - client.outstanding))
        client.send_due()
        client.receive(0.5)
    client.waiting.clear()
    client.counts["due"] = client.counts["sent"]


def at(ordered: list[float], share: float) -> float | None:
    """Milliseconds of a quantile."""
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 2) if ordered else None


def run(
    port: int, rate: float, seconds: float, connections: int, patience: float, first: int, batch: int
) -> dict[str, Any]:
    """One run and its figures."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, connections + 100), hard))
    client = Client(port, first, connections, batch)
    began = time.perf_counter()
    if rate:
        open_loop(client, rate, seconds, patience)
    else:
        closed_loop(client, connections, seconds)
    took = time.perf_counter() - began
    accepted, refused = sorted(client.latencies), sorted(client.refusals)
    in_time = sum(latency <= patience for latency in accepted)
    return {
        "due_per_second": round(client.counts["due"] / seconds),
        "sent_per_second": round(client.counts["sent"] / seconds),
        "goodput_per_second": round(in_time / seconds),
        "accepted": len(accepted),
        "in_time": in_time,
        "refused": len(refused),
        "turned_away": client.counts["turned_away"],
        "given_up": client.counts["given_up"],
        "broken": client.counts["broken"],
        "statuses": {k: v for k, v in sorted(client.counts.items()) if k.isdigit()},
        "accepted_ms": {"p50": at(accepted, 0.5), "p99": at(accepted, 0.99)},
        "refused_ms": {"p50": at(refused, 0.5), "p99": at(refused, 0.99)},
        "connections": client.connections,
        "seconds": round(took, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--patience", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(run(**vars(args))))


if __name__ == "__main__":
    main()
