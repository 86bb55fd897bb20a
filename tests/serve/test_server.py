"""A real server process over a fake service: granian, the gateway and the signals together."""

import contextlib
import http.client
import io
import json
import selectors
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from serve.app import ServiceLike
from serve.server import ServerSettings, _Gateway, _Mailbox

LIMIT_S = 10.0
JSON = {"Content-Type": "application/json"}

SCRIPT = textwrap.dedent(
    '''
    """Serves a fake service. Arguments: a folder for signs, then settings as JSON."""
    import json, os, sys, time
    from pathlib import Path
    from seqfraud.errors import ConfigError, RequestError
    from serve.limits import LimitSettings
    from serve.logs import AccessLog, LogSettings, configure_logs
    from serve.overload import OverloadSettings
    from serve.server import Door, ServerSettings, serve_forever

    signs = Path(sys.argv[1])
    settings = json.loads(sys.argv[2])

    def say(word):  # one write: several threads say something
        os.write(1, word.encode() + bytes([10]))

    class Service:
        def score(self, body):
            if body == b'"wait"':
                say("waiting")
                while not (signs / "go").exists():
                    time.sleep(0.005)
                say("answered")
            elif body == b'"exit"':
                os._exit(7)
            elif body == b'"quit"':
                sys.exit(3)
            elif body == b'"refuse"':
                raise RequestError(422, "invalid_field", "no", "TX")
            elif body.startswith(b'{"nap"'):
                time.sleep(0.001)
            return body

        def score_batch(self, body):
            return b'{"bytes":%d}' % len(body)

        def add_labels(self, body, author):
            return b"{}"

        def transaction(self, transaction_id):
            return json.dumps(transaction_id).encode()

        explanation = transaction

        def user(self, user):
            return b"{}"

        def model(self):
            return b"{}"

        def ready(self):
            return True

        def degraded(self):
            return False

        def close(self):
            say("closed")

    broken = settings.pop("broken", False)
    overload = OverloadSettings(**settings.pop("overload", {}))
    limits = LimitSettings(**settings.pop("limits", {}))

    def make():
        say("making")
        if broken:
            raise ConfigError("the bundle is broken")
        return Service()

    door = Door()
    if settings.pop("log_access", False):
        door = Door(access=AccessLog(configure_logs(LogSettings(access=True), descriptor=1)))
    try:
        sys.exit(serve_forever(make, ServerSettings(**settings), door, overload, limits))
    except ConfigError as error:
        sys.exit(str(error))
    '''
)


class Server:
    """A server process; every wait on it ends after `LIMIT_S`."""

    def __init__(self, folder: Path, **settings: object) -> None:
        script = folder / "server.py"
        script.write_text(SCRIPT)
        self.go = folder / "go"
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps({"port": 0} | settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._lines = selectors.DefaultSelector()
        self._lines.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        self.port = 0

    def started(self) -> "Server":
        assert self.line() == "making"
        line = self.line()
        assert line.startswith("seqfraud serving on http://127.0.0.1:")
        self.port = int(line.rpartition(":")[2])
        return self

    def line(self) -> str:
        """The next line on standard output."""
        assert self._lines.select(LIMIT_S), "no line came"
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def end(self) -> tuple[int, list[str], str]:
        """Waits for the end: exit code, the lines left on stdout, stderr."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out.decode().splitlines(), err.decode()

    def stop(self) -> tuple[int, list[str], str]:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)

    def request(self, method: str, url: str, body: bytes | None = None) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, url, body, JSON)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def half_a_request(self) -> socket.socket:
        """A connection of a client that announces a body and then falls silent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n[1")
        return connection

    def refuses_connections(self) -> bool:
        """A connection that the closing listener had in its queue is reset; the next one is refused."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            return False
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers; whatever still runs at the end of the test is killed."""
    servers: list[Server] = []

    def start_one(**settings: object) -> Server:
        servers.append(Server(tmp_path, **settings))
        return servers[-1]

    yield start_one
    for server in servers:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that leave it as it was; it has to end well too."""
    settings = {"threads": 4, "max_body_bytes": 1000}
    server = Server(tmp_path_factory.mktemp("shared"), **settings).started()
    yield server
    assert server.stop() == (0, ["closed"], "")


def test_answers_and_keeps_the_connection(shared: Server) -> None:
    with contextlib.closing(shared.connect()) as connection:
        ports = set()
        for i in range(3):
            connection.request("POST", "/v1/score", b"[%d]" % i, JSON)
            ports.add(connection.sock.getsockname()[1])
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"[%d]" % i)
            assert answer.headers["content-type"] == "application/json"
        assert len(ports) == 1


def test_a_slash_in_an_identifier_comes_through(shared: Server) -> None:
    assert shared.request("GET", "/v1/transactions/a%2Fb%20%C3%A9%25") == (200, b'"a/b \\u00e9%"')


def test_errors_come_through(shared: Server) -> None:
    assert shared.request("GET", "/nope")[0] == 404
    assert shared.request("DELETE", "/v1/score")[0] == 405
    status, body = shared.request("POST", "/v1/score", body=b'"refuse"')
    assert (status, json.loads(body)["error"]["field"]) == (422, "TX")


@pytest.mark.parametrize("url", ["/v1/score", "/v1/score/batch"])
@pytest.mark.parametrize("size", [1001, 3_000_000])
def test_a_body_too_large_is_told_so(shared: Server, url: str, size: int) -> None:
    """The larger one is more than the server reads: it may also find the connection closed."""
    try:
        status, body = shared.request("POST", url, body=bytes(size))
    except (BrokenPipeError, ConnectionResetError):
        assert size > 16_000
    else:
        assert (status, json.loads(body)["error"]["code"]) == (413, "payload_too_large")
    assert shared.request("POST", url, body=b"[]")[0] == 200


@pytest.mark.parametrize("url", ["/v1/score", "/v1/score/batch"])
def test_a_chunked_body_is_read_up_to_the_limit(shared: Server, url: str) -> None:
    for chunks, status in (([b"[1,", b"2]"], 200), ([b"x" * 600, b"y" * 600], 413)):
        with contextlib.closing(shared.connect()) as connection:
            connection.request("POST", url, iter(chunks), JSON, encode_chunked=True)
            assert connection.getresponse().status == status


def test_a_client_that_goes_away_mid_body_changes_nothing(shared: Server) -> None:
    with contextlib.closing(shared.half_a_request()) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert not answer.startswith(b"HTTP/1.1 2")
    assert shared.request("POST", "/v1/score", body=b"[1]") == (200, b"[1]")


def test_concurrent_requests_get_their_own_answers(shared: Server) -> None:
    def client(number: int) -> list[bool]:
        with contextlib.closing(shared.connect()) as connection:
            good = []
            for i in range(20):
                body = json.dumps({"nap": [number, i]}).encode()
                connection.request("POST", "/v1/score", body, JSON)
                answer = connection.getresponse()
                good.append((answer.status, answer.read()) == (200, body))
            return good

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(client, range(12)))
    assert all(all(good) and len(good) == 20 for good in results)


def test_what_leaves_a_handler_by_force_is_a_500_and_the_next_is_served(start: Start) -> None:
    server = start().started()
    status, body = server.request("POST", "/v1/score", body=b'"quit"')
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal")
    assert server.request("POST", "/v1/score", body=b"[1]") == (200, b"[1]")
    code, lines, err = server.stop()
    assert (code, lines) == (0, ["closed"])
    assert "SystemExit: 3" in err


def test_clients_that_do_not_send_their_body_hold_nothing_but_a_thread(start: Start) -> None:
    """With one thread, one such client stops the service."""
    server = start(threads=4).started()
    silent = [server.half_a_request() for _ in range(3)]
    for _ in range(5):
        assert server.request("POST", "/v1/score", body=b"[1]") == (200, b"[1]")
    for connection in silent:
        connection.close()
    assert server.stop()[:2] == (0, ["closed"])


def test_a_long_request_holds_up_nobody_else(start: Start) -> None:
    server = start().started()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.request, "POST", "/v1/score", b'"wait"')
        assert server.line() == "waiting"
        assert server.request("GET", "/healthz")[0] == 200
        assert server.request("POST", "/v1/score", b"[1]") == (200, b"[1]")
        assert not long.done()
        server.go.touch()
        assert long.result() == (200, b'"wait"')
    assert server.stop()[:2] == (0, ["answered", "closed"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_requests_in_flight_finish_then_closes(
    start: Start,
    number: signal.Signals,
) -> None:
    server = start().started()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.request, "POST", "/v1/score", b'"wait"')
        assert server.line() == "waiting"
        server.process.send_signal(number)
        wait_until(server.refuses_connections)
        server.go.touch()
        assert answer.result() == (200, b'"wait"')
    assert server.end() == (0, ["answered", "closed"], "")


def test_a_stop_signal_right_after_the_line_is_not_lost(start: Start) -> None:
    """On a lock, a signal in the moment before the main thread sleeps did not wake it."""
    for _ in range(2):
        assert start().started().stop() == (0, ["closed"], "")


def test_a_silent_client_delays_the_end_no_longer_than_the_setting(start: Start) -> None:
    server = start(drain_seconds=0.1).started()
    with contextlib.closing(server.half_a_request()):
        assert server.request("GET", "/healthz")[0] == 200
        code, lines, err = server.stop()
    assert (code, lines) == (0, ["closed"])
    assert "still in flight after 0.1 s" in err


def test_a_second_signal_ends_the_waiting(start: Start) -> None:
    server = start(drain_seconds=3600.0).started()
    with contextlib.closing(server.half_a_request()):
        assert server.request("GET", "/healthz")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        wait_until(server.refuses_connections)
        assert server.process.poll() is None
        code, lines, _ = server.stop()
    assert (code, lines) == (0, ["closed"])


def test_a_crash_ends_the_process_and_frees_the_port(start: Start) -> None:
    """Nothing is left behind: there is no other process to hang or to keep the port."""
    server = start().started()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.request("POST", "/v1/score", body=b'"exit"')
    assert server.end() == (7, [], "")
    assert start(port=server.port).started().stop()[0] == 0


def test_a_killed_process_leaves_no_other(start: Start) -> None:
    server = start().started()
    tasks = Path(f"/proc/{server.process.pid}/task")
    if tasks.is_dir():
        assert "".join((task / "children").read_text() for task in tasks.iterdir()) == ""
    server.process.kill()
    assert server.end()[0] == -signal.SIGKILL
    assert server.refuses_connections()


def test_a_port_in_use_is_an_error_before_the_service_is_made(start: Start) -> None:
    """Granian alone would share the port and split the state."""
    server = start().started()
    code, lines, err = start(port=server.port).end()
    assert (code, lines) == (1, [])
    assert f"cannot listen on host '127.0.0.1', port {server.port}: Address already in use" in err
    assert server.stop()[0] == 0


def test_a_service_that_cannot_be_made_is_an_error_and_never_listens(start: Start) -> None:
    code, lines, err = start(broken=True).end()
    assert (code, lines, err.strip()) == (1, ["making"], "the bundle is broken")


def test_the_access_log_is_said_when_asked_for(start: Start) -> None:
    server = start(log_access=True).started()
    assert server.request("POST", "/v1/score", body=b"[1]") == (200, b"[1]")
    assert server.request("GET", "/v1/users/a%20b") == (200, b"{}")
    code, lines, _ = server.stop()
    assert code == 0
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(line["method"], line["route"], line["status"], line["bytes_out"]) for line in said] == [
        ("POST", "/v1/score", 200, 3),
        ("GET", "/v1/users/{user}", 200, 2),
    ]


class Gate:
    """A WSGI service for `_Gateway` itself: `ready` waits until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def ready(self) -> bool:
        self.entered.set()
        return self.open.wait(LIMIT_S)

    def degraded(self) -> bool:
        return False


class Caller(threading.Thread):
    """Stands for one of granian's threads: ends when the gateway returns to granian."""

    def __init__(self, gateway: _Gateway, path: str) -> None:
        super().__init__(daemon=True)
        self.gateway = gateway
        self.path = path
        self.answered = threading.Event()
        self.start()

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        assert status == 200
        self.answered.set()

    def run(self) -> None:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": self.path, "wsgi.input": io.BytesIO()}
        self.gateway(self, environ)

    def is_back(self) -> bool:
        self.join(LIMIT_S)
        return not self.is_alive()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gateway(gate: Gate) -> Iterator[_Gateway]:
    gateway = _Gateway(cast(ServiceLike, gate), ServerSettings())
    yield gateway
    gate.open.set()
    gateway.close()


def test_one_thread_takes_requests_and_another_waits(gateway: _Gateway, gate: Gate) -> None:
    first = Caller(gateway, "/readyz")
    assert gate.entered.wait(LIMIT_S)
    second = Caller(gateway, "/healthz")
    assert second.answered.wait(LIMIT_S)
    gate.open.set()
    assert first.is_back()
    assert second.is_alive()
    gateway.close()
    assert second.is_back()


def test_the_one_that_waits_is_let_in_for_one_that_is_held_up(
    gateway: _Gateway,
    gate: Gate,
) -> None:
    first = Caller(gateway, "/readyz")
    assert gate.entered.wait(LIMIT_S)
    second = Caller(gateway, "/healthz")
    assert second.answered.wait(LIMIT_S)
    threading.Thread(target=gateway.watch, daemon=True).start()
    assert second.is_back()
    gate.open.set()
    assert first.answered.wait(LIMIT_S)
    first.join(0.05)
    assert first.is_alive()  # now it waits in the place of the other
    gateway.close()
    assert first.is_back()


def test_the_only_thread_goes_on_after_it_was_held_up(gateway: _Gateway, gate: Gate) -> None:
    threading.Thread(target=gateway.watch, daemon=True).start()
    only = Caller(gateway, "/readyz")
    assert gate.entered.wait(LIMIT_S)
    wait_until(lambda: gateway._taking is None)
    gate.open.set()
    assert only.is_back()


def test_an_idle_place_goes_to_whoever_comes_with_a_request(gateway: _Gateway, gate: Gate) -> None:
    assert Caller(gateway, "/healthz").is_back()
    assert Caller(gateway, "/healthz").is_back()


class DiskGate(Gate):
    """Its `ready` waits for a disk, and says so before."""

    def ready(self) -> bool:
        self.entered.set()
        assert self.goes_to_disk.wait(LIMIT_S)
        self.before_waiting()
        return self.open.wait(LIMIT_S)

    def __init__(self) -> None:
        super().__init__()
        self.goes_to_disk = threading.Event()
        self.before_waiting: Callable[[], None] = lambda: None


def test_a_stop_waits_for_requests_and_not_for_connections_that_ask_nothing() -> None:
    """Granian does not say that it has drained: nothing is in flight after the fifth look."""
    looks = 0

    def idle() -> bool:
        nonlocal looks
        looks += 1
        return looks > 5

    mailbox = _Mailbox()
    try:
        assert not mailbox.wait_for_drained(1.5, lambda: False)
        assert mailbox.wait_for_drained(LIMIT_S, idle)
    finally:
        mailbox.close()
    assert looks > 6


def test_one_that_waits_for_the_disk_lets_the_next_in_at_once() -> None:
    """Nobody watches here: without `step_aside` the second would wait for the first, and for a sync of its own after it."""
    gate = DiskGate()
    gateway = _Gateway(cast(ServiceLike, gate), ServerSettings())
    gate.before_waiting = gateway.step_aside
    first = Caller(gateway, "/readyz")
    assert gate.entered.wait(LIMIT_S)
    second = Caller(gateway, "/healthz")
    assert second.answered.wait(LIMIT_S)
    second.join(0.02)
    assert second.is_alive(), "the first may still be quick"
    gate.goes_to_disk.set()
    assert second.is_back()
    gate.open.set()
    assert first.answered.wait(LIMIT_S)
    first.join(0.02)
    assert first.is_alive(), "the other takes requests now"
    gateway.close()
    assert first.is_back()
