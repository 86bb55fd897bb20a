"""Which requests are let in: a bound on waiting, deadlines, a budget for large bodies.

Granian puts every request into one queue without saying when it came. A connection has one request in it at most, so the
queue is bounded by `max_connections`; the time is bounded here. A `QueueClock` sends requests of its own through the queue:
those that have not come out yet say how long, at least, what comes out now has been waiting.
"""

import contextlib
import math
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from seqfraud.errors import RequestError
from serve.answers import refusal_body

__all__ = ["ALWAYS_ANSWERED", "Admission", "OverloadSettings", "QueueClock"]

ALWAYS_ANSWERED = ("/healthz", "/readyz", "/metrics")

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
_TIMEOUT_KEY = "HTTP_X_REQUEST_TIMEOUT_MS"

HEAVY_BYTES = 4 * 1024
"""What is longer is a batch: milliseconds of work."""
LARGE_BODY_BYTES = 64 * 1024
"""A body that is longer is probably still on its way when its request is taken."""
_LARGE_DIGITS = len(str(LARGE_BODY_BYTES))


@dataclass(frozen=True)
class OverloadSettings:
    """`[overload]`: how long requests, and clients, may take.

    - max_wait_ms: a request that was not begun so long after it came is refused, with 503 and Retry-After. More than the
      time in which `max_connections` refusals are made, or under the worst load nothing else is done.
    - request_timeout_ms: what a batch has not begun by then is refused; a client may ask for less by the header
      X-Request-Timeout-Ms, which holds for single transactions too.
    - batches_at_a_time: of requests with more than 4 KiB; all of them together only make each other late.
    - retry_after_seconds: what refused clients are told.
    - body_seconds: for a request's body to arrive; much less where half of the threads wait for bodies.
    - large_body_bytes: bodies above 64 KiB that are held at a time, together.
    - unread_seconds: a client that leaves its answer unread for so long is cut off.
    """

    max_wait_ms: float = 500.0
    request_timeout_ms: int = 10_000
    batches_at_a_time: int = 2
    retry_after_seconds: int = 1
    body_seconds: float = 10.0
    large_body_bytes: int = 64 * 1024 * 1024
    unread_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "max_wait_ms", "request_timeout_ms", "batches_at_a_time", "retry_after_seconds", "body_seconds", "unread_seconds",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.large_body_bytes < LARGE_BODY_BYTES:
            raise ValueError(f"large_body_bytes: expected {LARGE_BODY_BYTES} or more, got {self.large_body_bytes}")


class _Request:
    """What one thread is at; in the place of the request's body, whose reading it watches. Used again and again.

    `latest`: when it has to have been begun, in monotonic seconds; inf once it was. `deadline` holds for every part of it.
    """

    __slots__ = ("address", "began", "deadline", "heavy", "latest", "reading", "stream", "take_turn")

    def __init__(self, take_turn: "Callable[[_Request], None]") -> None:
        self.address = ""
        self.began = 0.0
        self.deadline = self.latest = math.inf
        self.reading = False
        self.heavy = False
        self.stream: Any = None
        self.take_turn = take_turn

    def read(self, size: int) -> bytes:
        self.reading = True
        data: bytes = self.stream.read(size)
        self.reading = False
        if len(data) > HEAVY_BYTES and not self.heavy:
            self.take_turn(self)
        return data


class Admission:
    """A WSGI application around the one that answers: it refuses what cannot be answered in time, before it is read."""

    def __init__(
        self,
        app: WSGIApplication,
        settings: OverloadSettings,
        max_body_bytes: int,
        step_aside: Callable[[], None],
        threads: int,
    ) -> None:
        """`step_aside` is called before something is waited for, to let another of the `threads` in meanwhile."""
        self._app = app
        self._max_wait = settings.max_wait_ms / 1000
        self._timeout = settings.request_timeout_ms / 1000
        self._retry_after = settings.retry_after_seconds
        self._max_body_bytes = max_body_bytes
        self._let_in = step_aside
        self._turns = threading.Semaphore(settings.batches_at_a_time)
        self._may_wait = threading.Semaphore(max(1, threads // 2))
        self._large_left = settings.large_body_bytes
        self._lock = threading.Lock()  # for the budget and the list
        self._counting = threading.Lock()
        self._here = threading.local()
        self._requests: list[_Request] = []
        self.clock: QueueClock | None = None
        self.refusals = {"waited": 0, "deadline": 0, "batches": 0, "bodies": 0}
        """How many there were, by what there was not enough of."""

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer, or refuse, in the one shape of errors."""
        try:
            request: _Request = self._here.request
        except AttributeError:
            request = self._new_request()
        request.deadline = request.latest = math.inf
        if environ["PATH_INFO"] in ALWAYS_ANSWERED:
            return self._app(environ, start_response)
        request.began = now = time.monotonic()
        request.address = environ["REMOTE_ADDR"]
        request.stream = environ["wsgi.input"]
        environ["wsgi.input"] = request
        try:
            self._admit(environ, request, now)
            if len(environ.get("CONTENT_LENGTH", "")) >= _LARGE_DIGITS or (
                "HTTP_TRANSFER_ENCODING" in environ or "HTTP_EXPECT" in environ
            ):
                size = _body_bytes(environ, self._max_body_bytes)
                if size > LARGE_BODY_BYTES or "HTTP_EXPECT" in environ:
                    return self._answer_large(environ, start_response, size)
            return self._app(environ, start_response)
        except RequestError as error:
            return _refuse(start_response, error)
        finally:
            request.reading = False
            request.stream = None
            if request.heavy:
                self._end_turn(request)

    def _new_request(self) -> _Request:
        request = self._here.request = _Request(self._take_turn)
        with self._lock:
            self._requests.append(request)
        return request

    def _admit(self, environ: WSGIEnvironment, request: _Request, now: float) -> None:
        """Set the request's deadline, or raise what it is refused with."""
        waited = 0.0 if self.clock is None or now < self.clock.oldest else now - self.clock.oldest
        if waited > self._max_wait:
            raise self._overloaded(
                "waited", f"the service has more to do than it can; this waited {waited * 1000:.0f} ms"
            )
        asked = environ.get(_TIMEOUT_KEY)
        timeout = self._timeout if asked is None else min(_milliseconds(asked) / 1000, self._timeout)
        request.latest = now - waited + self._max_wait
        request.deadline = now - waited + timeout
        if waited >= timeout:
            raise self._too_late()

    def check_deadline(self) -> None:
        """Raise RequestError where this thread's request comes too late; for the last moment before a change."""
        request: _Request | None = getattr(self._here, "request", None)
        if request is None:
            return
        now = time.monotonic()
        if request.latest <= now:
            raise self._overloaded("waited", "the service has more to do than it can; this waited too long")
        request.latest = math.inf
        if request.deadline <= now:
            raise self._too_late()

    def step_aside(self) -> None:
        """Let another in: called by a request that is about to wait for the disk, its work done."""
        request: _Request | None = getattr(self._here, "request", None)
        if request is not None and request.heavy:
            self._end_turn(request)
        self._let_in()

    def _take_turn(self, request: _Request) -> None:
        """Wait until there is a turn for a batch, in at most half of the threads; RequestError where there is none."""
        if not self._turns.acquire(blocking=False):
            if not self._may_wait.acquire(blocking=False):
                raise self._overloaded("batches", "too many batches at a time")
            try:
                self._let_in()
                if not self._turns.acquire(timeout=max(0.0, min(request.latest, request.deadline) - time.monotonic())):
                    raise self._overloaded("batches", "too many batches at a time; this waited too long")
            finally:
                self._may_wait.release()
        request.heavy = True

    def _end_turn(self, request: _Request) -> None:
        request.heavy = False
        self._turns.release()

    def _count(self, cause: str) -> None:
        with self._counting:
            self.refusals[cause] += 1

    def _too_late(self) -> RequestError:
        self._count("deadline")
        message = f"the time for this request ({TIMEOUT_HEADER}, or the service's own) was over before it was begun"
        return RequestError(503, "deadline_exceeded", message, retry_after=self._retry_after)

    def _answer_large(self, environ: WSGIEnvironment, start_response: StartResponse, size: int) -> Iterable[bytes]:
        """Answer a request whose body has to be waited for, within the budget for all such bodies together."""
        with self._lock:
            if size > self._large_left:
                raise self._overloaded("bodies", "too many large bodies at a time")
            self._large_left -= size
        try:
            self._let_in()
            return self._app(environ, start_response)
        finally:
            with self._lock:
                self._large_left += size

    def _overloaded(self, cause: str, message: str) -> RequestError:
        self._count(cause)
        return RequestError(503, "overloaded", message, retry_after=self._retry_after)

    def reading(self) -> list[tuple[str, float]]:
        """The clients whose bodies are being waited for: address, and since when (monotonic seconds)."""
        return [(one.address, one.began) for one in list(self._requests) if one.reading]


def _body_bytes(environ: WSGIEnvironment, limit: int) -> int:
    """How much of the body will be held at most; what is longer than `limit` is refused, and not held."""
    if "HTTP_TRANSFER_ENCODING" in environ:
        return limit
    length = environ.get("CONTENT_LENGTH")
    if length is None or not (length.isascii() and length.isdigit()):
        return 0
    return limit if len(length) > len(str(limit)) else min(int(length), limit)


def _milliseconds(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise RequestError(
            400, "invalid_header", f"{TIMEOUT_HEADER}: expected whole milliseconds, got {text!r:.30}", TIMEOUT_HEADER
        )
    return int(text)


def _refuse(start_response: StartResponse, error: RequestError) -> list[bytes]:
    headers = [("content-type", "application/json")]
    if error.retry_after is not None:
        headers.append(("retry-after", str(error.retry_after)))
    start_response(f"{error.status} {HTTPStatus(error.status).phrase}", headers)
    return [refusal_body(error.code, error.message, error.field)]


class QueueClock:
    """Requests that tell how long the server's queue takes.

    Driven by `tick` from one thread; `arrived` is called on whichever thread takes such a request from the queue. They
    travel over connections of their own, which are kept: where all connections are taken, a new one would not get in, and
    what is sent on one that never got in says nothing about the queue.
    """

    RUNNERS = 8

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext | None, keep_seconds: float) -> None:
        """`keep_seconds`: how long an idle connection stays, by the server's settings."""
        self.path = "/" + secrets.token_urlsafe(18)
        self.oldest = math.inf
        """When the oldest that is still on its way was sent, in monotonic seconds; inf: none is."""
        self._address = address
        self._tls = tls
        self._rest = keep_seconds / 3
        self._sent: dict[int, float] = {}
        self._number = 0
        self._runners: list[_Runner] = []
        self._lock = threading.Lock()

    def tick(self, now: float, busy: bool) -> None:
        """Send one where the service is `busy` (else the queue is empty); replace connections that are gone."""
        for runner in list(self._runners):
            if not runner.collect(now):
                self._runners.remove(runner)
                self.arrived(runner.number)
                runner.close()
        while len(self._runners) < self.RUNNERS:
            fresh = _Runner.connected(self._address, self._tls, now)
            if fresh is None:
                break
            self._runners.append(fresh)
            self._send(fresh, now)
        free = [runner for runner in self._runners if runner.free]
        for runner in free[-1:] if busy else []:
            self._send(runner, now)
        for runner in free:
            if runner.free and now - runner.last > self._rest:
                self._send(runner, now)

    def _send(self, runner: "_Runner", now: float) -> None:
        self._number += 1
        if runner.proven:
            with self._lock:
                self._sent[self._number] = now
                self._update()
        runner.send(self.path, self._number, now)

    def arrived(self, number: int) -> None:
        """One has come out of the queue."""
        with self._lock:
            self._sent.pop(number, None)
            self._update()

    def stood_still(self, seconds: float) -> None:
        """The whole machine did: what waited meanwhile did not wait for others."""
        with self._lock:
            self._sent = {number: sent + seconds for number, sent in self._sent.items()}
            self._update()

    def _update(self) -> None:
        self.oldest = next(iter(self._sent.values()), math.inf)

    def peers(self) -> set[int]:
        """The ports that they come from."""
        return {runner.port for runner in self._runners}

    def close(self) -> None:
        """Close the connections; nothing is waited for then."""
        for runner in self._runners:
            self.arrived(runner.number)
            runner.close()
        self._runners.clear()


class _Runner:
    """One connection of the clock, with at most one request on its way."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self._connection = connection
        self.port: int = connection.getsockname()[1]
        self.number = 0
        self.last = now
        self.free = True
        self.proven = False

    @classmethod
    def connected(cls, address: tuple[str, int], tls: ssl.SSLContext | None, now: float) -> "_Runner | None":
        try:
            connection = socket.create_connection(address, timeout=0.2)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                connection = tls.wrap_socket(connection)
            connection.setblocking(False)
        except OSError:
            return None
        return cls(connection, now)

    def send(self, path: str, number: int, now: float) -> None:
        self.number, self.last, self.free = number, now, False
        with contextlib.suppress(OSError):  # `collect` will find it closed
            self._connection.send(b"GET %b?%d HTTP/1.1\r\nHost: x\r\n\r\n" % (path.encode(), number))

    def collect(self, now: float) -> bool:
        """Take the answer, if there is one; False where the connection is gone."""
        try:
            answer = self._connection.recv(4096)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        self.free = self.proven = True
        self.last = now
        return answer != b""

    def close(self) -> None:
        self._connection.close()
