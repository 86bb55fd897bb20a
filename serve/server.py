"""Runs the app behind granian, in this process.

Granian's own server starts its workers in child processes. The state of this service lives in
memory, so there is one worker, and it runs right here: nothing to supervise, no orphan that keeps
the port and the state when its parent is killed, a crash ends the process, and `close()` runs where
the state is. For that, granian's worker is driven directly, as granian's own `server/mp.py` does;
the names are granian's internals, hence the exact pin and the tests over a real process.

The socket is bound here too, without SO_REUSEPORT, which granian sets: with it a second service on
the same port would start without a word and take half of the requests, and so of the state.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from wsgiref.types import WSGIEnvironment

from granian import _futures, _granian
from granian.http import HTTP1Settings

from seqfraud.errors import ConfigError
from serve.answers import refusal_body
from serve.app import DEFAULT_MAX_BODY_BYTES, ServiceLike, create_app
from serve.connections import Guard
from serve.edgemeasures import RequestMeasures, declare_edge, declare_process
from serve.headers import stamped
from serve.keys import Keyring
from serve.limits import LimitSettings, RateLimiter
from serve.logs import AccessLog
from serve.metrics import Registry
from serve.overload import Admission, OverloadSettings, QueueClock
from serve.tls import TlsSettings, own_client, worker_options

__all__ = ["ClosableService", "Door", "ServerSettings", "serve_forever"]

_log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_INTERNAL = refusal_body("internal", "the server failed")

_FOREVER_SECONDS = 10**8
_IDLE_DRAIN_SECONDS = 1.0
"""A stop does not wait longer for connections on which nothing is asked."""

_OTHER_DESCRIPTORS = 1024
"""Files that are no client's connection: of the service, and of the guard at the door."""

# The stubs of these are a release behind.
_WSGIWorker: Any = _granian.WSGIWorker
_SocketHolder: Any = _granian.SocketHolder
_new_scheduler: Any = _futures._new_cbscheduler


class ClosableService(ServiceLike, Protocol):
    """A service that is told when no request will come any more.

    Two are set by the server: `before_waiting`, to be called by a request that is about to wait for something outside
    Python, and `check_deadline`, to be called by one that is about to change something: it raises `RequestError` where the
    request's time is over.
    """

    before_waiting: Callable[[], None]
    check_deadline: Callable[[], None]

    def close(self) -> None:
        """Called once, after the last answer (or past `drain_seconds`, whatever still runs)."""


@dataclass(frozen=True)
class ServerSettings:
    """How the service listens.

    - port: 0 takes a free one; the line on stdout says which.
    - threads: how many requests can be inside Python at a time. Not a measure of parallelism (see
      `_Gateway`) but of patience: a client that sends its headers and then not its body holds one
      thread, for as long as `OverloadSettings.body_seconds` says.
    - max_connections: at a time; where there are more, idle ones are closed, or the new ones told so.
    - max_header_bytes: of a request's line and headers together; also what is read ahead of a body.
    - batch_scheduling: see `_schedule_as_batch`; off where other programs keep every core busy.
    - header_seconds: for a request's headers to arrive, so also how long an idle connection stays.
    - drain_seconds: for requests in flight at SIGTERM; container runtimes kill after 10.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 32
    backlog: int = 1024
    max_connections: int = 1024
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    header_seconds: float = 75.0
    drain_seconds: float = 8.0
    batch_scheduling: bool = True


@dataclass(frozen=True)
class Door:
    """Who comes in, and what is kept of it.

    - keys: None lets everybody do everything, which needs a loopback address or `without_keys`.
    - tls: checked by the time the service is made.
    - access: called after each answer.
    - metrics: where requests are counted, if anywhere.
    """

    keys: Keyring | None = None
    without_keys: bool = False
    tls: TlsSettings | None = None
    access: AccessLog | None = None
    metrics: Registry | None = None


_LOCAL = Door()


def serve_forever(
    make_service: Callable[[], ClosableService],
    settings: ServerSettings,
    door: Door = _LOCAL,
    overload: OverloadSettings | None = None,
    limits: LimitSettings | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT, then drains, closes the service and returns 0.

    Main thread only. The port is taken before `make_service` is called and answers once it has
    returned. Until then signals have their ordinary effect; later, a second one ends the draining.
    Raises `ConfigError` where the port cannot be had or must not be open to all, and what `make_service` raises. Where threads
    of granian do not end, the process ends in here instead, with exit code 0.
    """
    before = _native_threads()
    overload = overload or OverloadSettings()
    _allow_descriptors(settings.max_connections)
    with contextlib.closing(_bind(settings)) as listener:
        _require_keys(listener, door)
        tls = worker_options(door.tls)
        service = make_service()
        gc.freeze()  # it stays; a full collection would look through all of it
        gateway = _Gateway(service, settings, door, overload, limits)
        service.before_waiting = gateway.admission.step_aside
        service.check_deadline = gateway.admission.check_deadline
        with _stop_signals() as mailbox:
            try:
                address = _listen(listener, settings, "https" if tls else "http")
                guard = _make_guard(gateway, listener.dup(), service, settings, overload, door.tls)
                if door.metrics is not None:
                    declare_edge(door.metrics, gateway.admission, guard)
                    declare_process(door.metrics)
                worker = _start(gateway, listener, settings, tls, on_drained=mailbox.drained)
                guard.start()
                print(f"seqfraud serving on {address}", flush=True)
                mailbox.wait_for_stop()
                guard.stop()
                worker.set()
                drained = mailbox.wait_for_drained(
                    settings.drain_seconds, lambda: gateway.is_idle and guard.owes_nothing()
                )
            finally:
                gateway.close()
                service.close()
    if not drained:
        _log.warning("requests still in flight after %.1f s were abandoned", settings.drain_seconds)
    _leave_if_unsafe(before, seconds=1.0 if drained else 0.0)
    return 0


class _Thread:
    """One of granian's threads: how far it is, and the gate where it waits until it is needed."""

    __slots__ = ("answered", "busy", "gate")

    def __init__(self) -> None:
        self.busy = False
        self.answered = 0
        self.gate = threading.Lock()
        self.gate.acquire()


class _Gateway:
    """What granian calls for each request, on one of its threads: WSGI, and one thread at a time.

    Python runs one thread at a time and the service has one lock, so several threads only fight
    over both: measured on two cores with 8 connections and 70 us of service, 8 threads gave 10,500
    requests/s with a p99 of 6 ms, one thread 13,800 with 0.7 ms. One thread, however, stands still
    for a client that does not send its body, and for a long batch. So one thread takes requests
    from granian's queue and the others wait here. When it has been at one request for a tick of
    `watch`, one of them is let in to take its place, and it joins the others once it is done: that
    measures like one thread. A request that is about to wait for the disk lets the next one in at
    once (`step_aside`), so that many wait for one sync.

    A thread that granian starts comes with a request: it answers that, then joins the others too.
    """

    TICK_SECONDS = 0.005

    def __init__(
        self,
        service: ServiceLike,
        settings: ServerSettings,
        door: Door = _LOCAL,
        overload: OverloadSettings | None = None,
        limits: LimitSettings | None = None,
    ) -> None:
        limiter = RateLimiter(limits) if limits is not None and limits.requests_per_second else None
        self.admission = Admission(
            create_app(service, max_body_bytes=settings.max_body_bytes, keys=door.keys, limiter=limiter),
            overload or OverloadSettings(),
            settings.max_body_bytes,
            self.step_aside,
            settings.threads,
        )
        self._app = stamped(self.admission)
        self._notes: list[Callable[[WSGIEnvironment, int, int, float], object]] = []
        if door.metrics is not None:
            self._notes.append(RequestMeasures(door.metrics))
        if door.access is not None:
            self._notes.append(door.access)
        self._answer = self._answer_noted if self._notes else self._answer_now
        self._here = threading.local()
        self._change = threading.Lock()  # for the three below
        self._taking: _Thread | None = None
        self._waiting: list[_Thread] = []
        self._threads: list[_Thread] = []
        self._closed = threading.Event()
        self._environ = {
            "SCRIPT_NAME": "",
            "wsgi.errors": sys.stderr,
            "wsgi.input_terminated": True,
            "wsgi.multiprocess": False,
            "wsgi.multithread": True,
            "wsgi.run_once": False,
            "wsgi.version": (1, 0),
        }

    def __call__(self, protocol: Any, environ: WSGIEnvironment) -> None:
        thread = self._this_thread()
        if self._taking is not thread:
            self._take_place(thread)
        thread.busy = True
        clock = self.admission.clock
        if clock is not None and environ["PATH_INFO"] == clock.path:
            clock.arrived(int(environ["QUERY_STRING"]))
            protocol.response_bytes(204, [], b"")
        else:
            environ.update(self._environ)
            self._answer(protocol, environ)
        thread.answered += 1
        thread.busy = False
        if self._taking is not thread:
            environ.clear()  # granian keeps it, and so the body, until this call returns
            self._wait_for_place(thread)

    @property
    def is_idle(self) -> bool:
        """Whether no thread is at a request."""
        return not any(thread.busy for thread in self._threads)

    @property
    def is_busy(self) -> bool:
        """Whether the one that takes requests is at one, or there is none to take them."""
        taking = self._taking
        return taking is None or taking.busy

    def watch(self) -> None:
        """Lets another thread in where the one that takes requests is held up; until `close`."""
        seen: tuple[_Thread | None, int] = (None, 0)
        while not self._closed.wait(self.TICK_SECONDS):
            with self._change:
                taking = self._taking
                now = (taking, taking.answered if taking else 0)
                if taking is not None and taking.busy and now == seen:
                    self._let_in()
                seen = now

    def step_aside(self) -> None:
        """Lets another thread in; called by the one that takes requests before it waits in one."""
        with self._change:
            if self._taking is self._this_thread():
                self._let_in()

    def _let_in(self) -> None:
        self._taking = self._waiting.pop() if self._waiting else None
        if self._taking is not None:
            self._taking.gate.release()

    def close(self) -> None:
        """Sends the threads home; call it when there are no more requests."""
        with self._change:
            self._closed.set()
            for thread in self._waiting:
                thread.gate.release()
            self._waiting.clear()

    def _this_thread(self) -> _Thread:
        try:
            thread: _Thread = self._here.thread
        except AttributeError:
            thread = self._here.thread = _Thread()
            self._threads.append(thread)
        return thread

    def _take_place(self, thread: _Thread) -> None:
        """Takes the place of nobody, or of one that is as idle as this one was."""
        with self._change:
            if self._taking is None or not self._taking.busy:
                self._taking = thread

    def _wait_for_place(self, thread: _Thread) -> None:
        """Returns when this thread is to take requests: there must always be one that does."""
        with self._change:
            if self._taking is None:
                self._taking = thread
            if self._taking is thread or self._closed.is_set():
                return
            self._waiting.append(thread)
        thread.gate.acquire()

    def _answer_now(self, protocol: Any, environ: WSGIEnvironment) -> tuple[int, int]:
        """Runs the app and hands its answer to granian: status and bytes of it. Never raises."""
        try:
            response = _Response()
            body = b"".join(self._app(environ, response))
            protocol.response_bytes(response.status, response.headers, body)
        except BaseException:
            noted = {"request_id": environ.get("seqfraud.request_id")}
            _log.exception("a request failed outside the app", extra=noted)
            protocol.response_bytes(500, [("content-type", "application/json")], _INTERNAL)
            return 500, len(_INTERNAL)
        return response.status, len(body)

    def _answer_noted(self, protocol: Any, environ: WSGIEnvironment) -> None:
        start = time.perf_counter()
        status, sent = self._answer_now(protocol, environ)
        seconds = time.perf_counter() - start
        for note in self._notes:
            note(environ, status, sent, seconds)


class _Response:
    """A WSGI `start_response` that remembers."""

    __slots__ = ("headers", "status")

    def __init__(self) -> None:
        self.status = 500
        self.headers: list[tuple[str, str]] = []

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None, /
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        self.headers = headers
        return _no_write


def _no_write(data: bytes) -> object:
    raise NotImplementedError("the app returns its body")


def _bind(settings: ServerSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        # For a restart with connections in TIME_WAIT; TCP_NODELAY is for the accepted to inherit.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(settings, error) from error
    return listener


def _require_keys(listener: socket.socket, door: Door) -> None:
    """Refuses to be open to all at an address that others reach; the one that is bound counts, whatever its name."""
    if door.keys is not None or door.without_keys:
        return
    bound = listener.getsockname()[0]
    address = ipaddress.ip_address(bound.partition("%")[0])
    if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
        raise ConfigError(
            f"{bound} is reached by others, and there are no keys: make one with `seqfraud keys add --file keys.json "
            "--role score` and start with --keys keys.json; or --without-keys lets everybody do everything"
        )


def _listen(listener: socket.socket, settings: ServerSettings, scheme: str) -> str:
    """The address in force. With SO_REUSEADDR two can be bound to one port; only one can listen."""
    try:
        listener.listen(settings.backlog)
    except OSError as error:
        raise _cannot_listen(settings, error) from error
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _cannot_listen(settings: ServerSettings, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(
        f"cannot listen on host {settings.host!r}, port {settings.port}: {reason}; "
        "choose another with --host and --port (0 takes a free port)"
    )


def _allow_descriptors(connections: int) -> None:
    """Raises the limit of this process on open files where it is too low; granian spins where it is reached."""
    needed = connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"server.max_connections: {connections} connections need {needed} open files, this process may have {hard}; "
            "lower the setting or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _make_guard(
    gateway: "_Gateway",
    listener: socket.socket,
    service: ClosableService,
    settings: ServerSettings,
    overload: OverloadSettings,
    tls: TlsSettings | None,
) -> Guard:
    client = None if tls is None else own_client()
    clock = gateway.admission.clock = QueueClock(listener.getsockname()[:2], client, settings.header_seconds)
    return Guard(
        listener,
        gateway,
        gateway.admission,
        clock,
        service.ready,
        overload,
        threads=settings.threads,
        tls=tls is not None,
    )


def _start(
    gateway: _Gateway,
    listener: socket.socket,
    settings: ServerSettings,
    tls: dict[str, Any],
    on_drained: Callable[[], None],
) -> Any:
    """Starts granian's threads; `set()` on what is returned lets them finish what they have."""
    if settings.batch_scheduling:
        _schedule_as_batch()
    worker = _WSGIWorker(
        worker_id=1,
        sock=(None, _SocketHolder(listener.detach(), False, settings.backlog)),
        ipc=None,
        threads=1,  # for I/O; more than Python keeps busy
        blocking_threads=1,  # for files, of which none are served
        py_threads=settings.threads,
        py_threads_idle_timeout=_FOREVER_SECONDS,  # one that waits in the gateway has to be there
        backpressure=settings.max_connections + QueueClock.RUNNERS,
        http_mode="1",
        http1_opts=HTTP1Settings(
            header_read_timeout=int(settings.header_seconds * 1000),
            max_buffer_size=settings.max_header_bytes,
        ),
        **tls,
    )
    loop = asyncio.new_event_loop()  # wanted by the signature, never run for WSGI
    stop = _granian.WorkerSignal()
    stop.add_cb(on_drained)
    threading.Thread(target=gateway.watch, name="gateway-watch", daemon=True).start()
    worker.serve_mtr(_new_scheduler(loop, gateway, impl_asyncio=True), loop, stop)
    loop.close()
    return stop


def _schedule_as_batch() -> None:
    """Tells Linux not to preempt the Python thread each time a packet wakes granian's I/O thread.

    Where both have to share one core that is 18 instead of 31 us of CPU per request; with a core
    each it makes no difference. The price: the service does not preempt others either, so its tail
    grows where they keep every core busy. Threads inherit it.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class _Mailbox:
    """What the main thread waits for: a stop signal, or that granian has drained.

    A socket, not a lock or a queue: a signal that arrives just before the main thread goes to sleep
    on a lock does not wake it, and the service would not stop (seen on a busy machine).
    """

    _DRAINED = 0

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Leaves the sockets to the end of the process: granian may still report."""
        signal.set_wakeup_fd(-1)

    def drained(self) -> None:
        """Called by granian on a thread of its own."""
        self._sender.send(bytes([self._DRAINED]))

    def wait_for_stop(self) -> None:
        """Returns at the first stop signal."""
        while self._receiver.recv(1)[0] not in _STOP_SIGNALS:
            pass

    def wait_for_drained(self, seconds: float, idle: Callable[[], bool]) -> bool:
        """False after `seconds` or at another stop signal.

        Granian also waits for connections on which nothing was asked; where all is `idle` for a while they are not waited for.
        """
        deadline = time.monotonic() + seconds
        busy = time.monotonic()
        while (left := deadline - time.monotonic()) > 0:
            self._receiver.settimeout(min(left, _IDLE_DRAIN_SECONDS / 4))
            try:
                event = self._receiver.recv(1)[0]
            except TimeoutError:
                if not idle():
                    busy = time.monotonic()
                elif time.monotonic() - busy > _IDLE_DRAIN_SECONDS:
                    return True
                continue
            if event == self._DRAINED or event in _STOP_SIGNALS:
                return event == self._DRAINED
        return False


@contextmanager
def _stop_signals() -> Iterator[_Mailbox]:
    # The handlers do nothing; that they exist is what makes Python write to the mailbox.
    previous = {number: signal.signal(number, lambda *_: None) for number in _STOP_SIGNALS}
    mailbox = _Mailbox()
    try:
        yield mailbox
    finally:
        mailbox.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _native_threads() -> set[int]:
    """The ids of the threads that Python did not start (Linux; elsewhere nothing is known)."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return set()
    # A thread from outside that once asked for its name is listed by `threading`, as a dummy.
    dummy = threading._DummyThread
    own = {thread.native_id for thread in threading.enumerate() if not isinstance(thread, dummy)}
    return {int(task.name) for task in tasks.iterdir()} - own


def _leave_if_unsafe(before: set[int], seconds: float) -> None:
    """Waits for granian's threads to end; if they do not, ends the process here, with exit code 0.

    One that asks for the interpreter while that is being torn down aborts the process (SIGABRT,
    seen in a tenth of the runs on a busy machine).
    """
    deadline = time.monotonic() + seconds
    while _native_threads() - before:
        if time.monotonic() > deadline:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        time.sleep(0.002)
