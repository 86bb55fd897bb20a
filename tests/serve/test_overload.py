"""Overload, slow clients and too many of them, against a real server process; and the parts by themselves.

No time is asserted: that the others were answered while the slow ones hang, and what a refused request left behind.
"""

import contextlib
import http.client
import json
import math
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle
from seqfraud.errors import RequestError
from serve.overload import HEAVY_BYTES, Admission, OverloadSettings, QueueClock
from serve.service import Service
from tests.serve.test_server import JSON, LIMIT_S, Server, Start, start, wait_until

__all__ = ["start"]

OVERLOADED = (503, "overloaded")


def ask(server: Server, body: bytes = b"[1]", **headers: str) -> tuple[int, str, str | None]:
    """Status, code of the error, Retry-After."""
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/v1/score", body, JSON | headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        code = content["error"]["code"] if isinstance(content, dict) and "error" in content else ""
        return answer.status, code, answer.headers["Retry-After"]


def is_answered(server: Server) -> bool:
    """What comes from the address of a slow client and waits with it may be cut off with it."""
    try:
        return ask(server)[0] == 200
    except (http.client.HTTPException, OSError):
        return False


def held(server: Server, count: int, start: bytes) -> list[socket.socket]:
    """Connections that said so much and then nothing."""
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) for _ in range(count)]
    for one in connections:
        one.sendall(start)
    return connections


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


HALF_HEADER = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nConte"
HALF_BODY = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n[1"


@pytest.mark.parametrize("said", [b"", HALF_HEADER, HALF_BODY], ids=["nothing", "half a header", "half a body"])
def test_more_silent_clients_than_threads_do_not_stall_the_others(start: Start, said: bytes) -> None:
    """Half a body used to hold a thread until its client went away: with all of them held, nobody was answered."""
    server = start(threads=3).started()
    silent = held(server, 50, said)
    wait_until(lambda: all(is_answered(server) for _ in range(5)))
    if said == HALF_BODY:
        told = [everything(one) for one in silent]
        assert all(b'"incomplete_body"' in one or b'"overloaded"' in one for one in told), "told why, then cut off"
    for one in silent:
        one.close()
    assert server.stop()[:2] == (0, ["closed"])


def test_a_body_that_trickles_is_cut_off(start: Start) -> None:
    server = start(threads=2, overload={"body_seconds": 0.2}).started()
    stop = threading.Event()
    (slow,) = held(
        server,
        1,
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n[",
    )

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.02):
                slow.sendall(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        assert b'"incomplete_body"' in slow.recv(1000)
    finally:
        stop.set()
        thread.join()
        slow.close()
    assert ask(server)[0] == 200


def test_idle_connections_make_room_for_new_ones(start: Start) -> None:
    """Granian alone leaves the one beyond its limit in the kernel's queue for as long as the idle ones stay."""
    server = start(max_connections=10).started()
    idle = held(server, 30, b"")
    wait_until(lambda: ask(server)[0] == 200)
    said: list[bytes] = []
    while b"" not in said:  # others may be told that there is no room before one is closed
        closed = select.select(idle, [], [], LIMIT_S)[0]
        assert closed, f"no idle connection was closed: {said}"
        said += [everything(one) for one in closed]
        idle = [one for one in idle if one not in closed]
    for one in idle:
        one.close()


def test_what_there_is_no_room_for_is_told_so_and_health_is_answered(start: Start) -> None:
    """All connections wait for an answer, so none can be closed."""
    server = start(max_connections=3, threads=8).started()
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(server.request, "POST", "/v1/score", b'"wait"') for _ in range(3)]
        assert [server.line() for _ in range(3)] == ["waiting"] * 3
        wait_until(lambda: ask(server) == (503, "overloaded", "1"))  # once the server's own connections are there
        assert server.request("GET", "/healthz") == (200, b'{"status":"ok"}')
        assert server.request("GET", "/readyz") == (200, b'{"status":"ready"}')
        assert not any(one.done() for one in busy)
        server.go.touch()
        assert [one.result() for one in busy] == [(200, b'"wait"')] * 3
    wait_until(lambda: ask(server)[0] == 200)
    assert server.stop()[:2] == (0, ["answered"] * 3 + ["closed"])


def test_what_waited_too_long_is_refused_and_then_all_is_as_before(start: Start) -> None:
    """All threads are taken, the queue stands: what comes out of it is refused unread, health is not."""
    server = start(threads=2, overload={"max_wait_ms": 100}).started()
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(server.request, "POST", "/v1/score", b'"wait"') for _ in range(2)]
        assert [server.line() for _ in range(2)] == ["waiting"] * 2
        queued = [pool.submit(ask, server) for _ in range(5)]
        health = pool.submit(server.request, "GET", "/healthz")
        threading.Event().wait(1.0)  # longer than they may wait, whatever the machine does
        assert not any(one.done() for one in [*queued, health])
        server.go.touch()
        assert [one.result()[0] for one in busy] == [200, 200]
        assert [one.result() for one in queued] == [(503, "overloaded", "1")] * 5
        assert health.result()[0] == 200
    wait_until(lambda: ask(server)[0] == 200)
    assert [ask(server)[0] for _ in range(5)] == [200] * 5
    assert server.stop()[:2] == (0, ["answered"] * 2 + ["closed"])


def test_a_client_that_does_not_read_its_answers_is_cut_off(start: Start) -> None:
    server = start(overload={"unread_seconds": 0.2}).started()
    body = b'"%b"' % (b"x" * 1_000_000)
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.settimeout(LIMIT_S)
    deaf.connect(("127.0.0.1", server.port))
    request = (
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    with contextlib.suppress(OSError):
        for _ in range(30):  # until the buffers of both sides are full, and then until it is cut off
            deaf.sendall(request)
        pytest.fail("30 MB of answers were taken from the server")
    assert ask(server)[0] == 200
    deaf.close()


def test_a_rate_limit_answers_429_and_leaves_health_alone(start: Start) -> None:
    server = start(limits={"requests_per_second": 0.001, "burst": 3}).started()
    assert [ask(server)[0] for _ in range(3)] == [200] * 3
    status, code, retry_after = ask(server)
    assert (status, code) == (429, "too_many_requests")
    assert 990 <= int(retry_after or 0) <= 1000
    assert [server.request("GET", "/healthz")[0] for _ in range(5)] == [200] * 5


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1e3", "soon", "9" * 10, "٣"])
def test_a_timeout_that_is_no_number_of_milliseconds_is_named(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        Part().ask(HTTP_X_REQUEST_TIMEOUT_MS=text)
    assert (caught.value.status, caught.value.field) == (400, "X-Request-Timeout-Ms")


class Part:
    """The admission by itself: the application does what a test says."""

    def __init__(self, **settings: Any) -> None:
        self.app: Callable[[Any], None] = lambda environ: None
        self.let_in = 0
        self.admission = Admission(
            self._run,
            OverloadSettings(**settings),
            1_000_000,
            self._step_aside,
            threads=2,
        )
        self.refused: RequestError | None = None

    def _step_aside(self) -> None:
        self.let_in += 1

    def _run(self, environ: Any, start_response: Any) -> list[bytes]:
        try:
            self.app(environ)
        except RequestError as error:
            self.refused = error
            raise
        start_response("200 OK", [])
        return [b"ok"]

    def ask(self, body: bytes = b"", **headers: str) -> bytes:
        """The answer's body; raises what is refused, as it is told."""
        said: list[Any] = []
        environ = {
            "PATH_INFO": "/v1/score", "REMOTE_ADDR": "::1", "CONTENT_LENGTH": str(len(body)), "wsgi.input": Body(body),
        }  # fmt: skip
        answer = b"".join(
            self.admission(environ | headers, lambda status, headers: said.append((status, dict(headers))))
        )
        status, sent = said[0]
        if status != "200 OK":
            error = json.loads(answer)["error"]
            retry = int(sent["retry-after"]) if "retry-after" in sent else None
            raise RequestError(int(status[:3]), error["code"], error["message"], error["field"], retry)
        return answer


class Body:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, size: int) -> bytes:
        taken, self._content = self._content[:size], self._content[size:]
        return taken


def test_the_time_of_a_request_ends_before_it_is_begun_or_not_at_all() -> None:
    part = Part()
    part.app = lambda environ: part.admission.check_deadline()
    assert part.ask(HTTP_X_REQUEST_TIMEOUT_MS="60000") == b"ok"
    with pytest.raises(RequestError) as caught:
        part.ask(HTTP_X_REQUEST_TIMEOUT_MS="0")
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "deadline_exceeded", 1)

    def late(environ: Any) -> None:
        threading.Event().wait(0.005)
        part.admission.check_deadline()

    part.app = late
    with pytest.raises(RequestError, match="was over before it was begun"):
        part.ask(HTTP_X_REQUEST_TIMEOUT_MS="1")
    part.app = lambda environ: None
    assert part.ask(HTTP_X_REQUEST_TIMEOUT_MS="1") == b"ok", "nothing asked any more: it was begun"
    assert part.admission.refusals == {"waited": 0, "deadline": 2, "batches": 0, "bodies": 0}


def test_what_was_begun_in_time_may_go_on() -> None:
    """`max_wait_ms` is for the first item of a batch, not for its last."""
    part = Part(max_wait_ms=20)

    def batch(environ: Any) -> None:
        part.admission.check_deadline()
        threading.Event().wait(0.05)
        part.admission.check_deadline()

    part.app = batch
    assert part.ask() == b"ok"

    def waits_for_the_lock(environ: Any) -> None:
        threading.Event().wait(0.05)
        part.admission.check_deadline()

    part.app = waits_for_the_lock
    with pytest.raises(RequestError) as caught:
        part.ask()
    assert (caught.value.status, caught.value.code) == OVERLOADED
    assert part.admission.refusals == {"waited": 1, "deadline": 0, "batches": 0, "bodies": 0}


def test_large_bodies_share_a_budget_and_give_it_back() -> None:
    part = Part(large_body_bytes=100_000)
    inside: list[str] = []

    def nested(environ: Any) -> None:
        if not inside:
            inside.append("first")
            with pytest.raises(RequestError, match="too many large bodies") as caught:
                part.ask(bytes(70_000))
            assert caught.value.retry_after == 1
            assert part.ask(bytes(60_000)) == b"ok", "what is not large is not counted"

    part.app = nested
    assert part.ask(bytes(70_000)) == b"ok"
    assert inside
    assert part.let_in == 1
    assert part.ask(bytes(100_000)) == b"ok", "all of it was given back"
    with pytest.raises(RequestError, match="too many large bodies"):
        part.ask(bytes(100_001))
    assert part.admission.refusals == {"waited": 0, "deadline": 0, "batches": 0, "bodies": 2}


@pytest.mark.parametrize("framing", [{"HTTP_TRANSFER_ENCODING": "chunked"}, {"CONTENT_LENGTH": "9" * 30}])
def test_a_body_of_unknown_or_absurd_length_counts_as_the_largest(framing: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="too many large bodies"):
        Part(large_body_bytes=999_999).ask(**framing)
    assert Part(large_body_bytes=1_000_000).ask(**framing) == b"ok"


def test_batches_take_turns_and_those_that_wait_too_long_are_refused() -> None:
    part = Part(batches_at_a_time=1, max_wait_ms=20)
    begun, go_on = threading.Event(), threading.Event()

    def batch(environ: Any) -> None:
        environ["wsgi.input"].read(HEAVY_BYTES + 1)
        if not begun.is_set():
            begun.set()
            assert go_on.wait(LIMIT_S)

    part.app = batch
    body = bytes(HEAVY_BYTES + 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(part.ask, body)
        assert begun.wait(LIMIT_S)
        with pytest.raises(RequestError, match="too many batches") as caught:
            part.ask(body)
        assert (caught.value.status, caught.value.code) == OVERLOADED
        assert part.let_in == 1, "others are let in while it waits"
        assert part.ask(body[1:]) == b"ok", "a single transaction does not wait for a turn"
        go_on.set()
        assert first.result() == b"ok"
    assert part.ask(body) == b"ok"
    assert part.admission.refusals == {"waited": 0, "deadline": 0, "batches": 1, "bodies": 0}


def test_a_batch_that_waits_for_the_disk_ends_its_turn() -> None:
    part = Part(batches_at_a_time=1)
    inner: list[bytes] = []

    def batch(environ: Any) -> None:
        environ["wsgi.input"].read(HEAVY_BYTES + 1)
        if not inner:
            inner.append(b"")
            part.admission.step_aside()
            with ThreadPoolExecutor(1) as pool:
                inner[0] = pool.submit(part.ask, bytes(HEAVY_BYTES + 1)).result(LIMIT_S)

    part.app = batch
    assert part.ask(bytes(HEAVY_BYTES + 1)) == b"ok"
    assert inner == [b"ok"]
    assert part.ask(bytes(HEAVY_BYTES + 1)) == b"ok", "the turn was ended once, not twice"


def test_the_clock_tells_the_oldest_that_is_on_its_way() -> None:
    clock = QueueClock(("127.0.0.1", 1), None, 75.0)
    assert clock.oldest == math.inf
    clock._sent = {1: 5.0, 2: 6.0, 3: 7.0}
    clock.arrived(2)
    assert clock.oldest == 5.0
    clock.arrived(1)
    assert clock.oldest == 7.0
    clock.stood_still(0.5)
    assert clock.oldest == 7.5
    clock.arrived(3)
    assert clock.oldest == math.inf


@pytest.fixture
def scoring(cards: Bundle, tmp_path: Path) -> Iterator[Service]:
    with Service(cards, tmp_path / "state", snapshot_every=None) as service:
        yield service


def transaction(number: int) -> dict[str, Any]:
    return {"id": str(number), "user": "u", "time": 1_700_000_000_000 + number, "amount": 1.0, "kind": "food"}


def too_late() -> None:
    raise RequestError(503, "deadline_exceeded", "over")


def test_what_comes_too_late_changes_nothing(scoring: Service) -> None:
    scoring.score(json.dumps(transaction(1)).encode())
    before = scoring.user("u"), scoring.journal.last_seq
    scoring.check_deadline = too_late
    for act in (
        lambda: scoring.score(json.dumps(transaction(2)).encode()),
        lambda: scoring.add_labels(b'[{"transaction_id": "1", "is_fraud": true}]'),
    ):
        with pytest.raises(RequestError, match="over"):
            act()
    assert (scoring.user("u"), scoring.journal.last_seq) == before


def test_the_items_of_a_batch_after_its_deadline_carry_the_error(scoring: Service) -> None:
    asked = iter(range(10))

    def after_two() -> None:
        if next(asked) >= 2:
            too_late()

    scoring.check_deadline = after_two
    results = json.loads(scoring.score_batch(json.dumps([transaction(i) for i in range(4)]).encode()))["results"]
    assert ["error" in one for one in results] == [False, False, True, True]
    assert results[3]["error"]["code"] == "deadline_exceeded"
    assert scoring.journal.last_seq == 2
    scoring.check_deadline = lambda: None
    again = json.loads(scoring.score_batch(json.dumps([transaction(i) for i in range(4)]).encode()))["results"]
    assert [one["duplicate"] for one in again] == [True, True, False, False]


def test_a_flood_of_connections_that_come_and_go_leaves_the_service_as_it_was(start: Start) -> None:
    server = start(max_connections=50).started()
    descriptors = Path(f"/proc/{server.process.pid}/fd")

    def churn(number: int) -> int:
        answered = 0
        for i in range(60):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if (number + i) % 2:
                    socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S).close()
                else:
                    answered += ask(server)[0] == 200
        return answered

    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(churn, range(8))) > 0
    if descriptors.is_dir():
        wait_until(lambda: len(list(descriptors.iterdir())) <= before + 2 + QueueClock.RUNNERS)
    assert ask(server)[0] == 200
    assert server.stop() == (0, ["closed"], "")
