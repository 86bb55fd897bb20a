"""docs/nginx.conf, the very file, in front of a real service: TLS, limits, refusals in our shape, nothing of people in its log."""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.app import DEFAULT_MAX_BODY_BYTES
from serve.keys import add_key
from serve.server import ServerSettings
from tests.serve.test_server import JSON

CONF = Path(__file__).resolve().parents[2] / "docs" / "nginx.conf"
LIMIT_S = 10.0
HOW = "`apt-get install nginx-light` has it, or whatever installs nginx on this system"
ROW = {"id": 1, "user": "ann", "time": 1_600_000_000_000, "amount": 5, "kind": "a", "merchant": "m"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rendered(folder: Path, port: int, upstream: int, certificate: Any, changes: dict[str, str]) -> Path:
    """The file with everything marked HERE set, and nginx's temporary files in `folder`."""
    text = CONF.read_text()
    temporary = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    marked = {
        "pid /run/nginx-seqfraud.pid;": f"pid {folder}/pid;",
        "access_log /dev/stdout seqfraud;": f"access_log {folder}/access.log seqfraud;",
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{upstream};",
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/seqfraud/tls.crt": str(certificate.certificate),
        "/etc/seqfraud/tls.key": str(certificate.key),
        "http {\n": f"http {{\n{temporary}",
        # As root nginx becomes another user, who may not enter the folders of a test.
        "worker_processes auto;": "worker_processes 1;" + ("user root;" if os.getuid() == 0 else ""),
        **changes,
    }
    for old, new in marked.items():
        assert text.count(old) == 1, f"{CONF.name}: expected {old!r} once"
        text = text.replace(old, new)
    out = folder / "nginx.conf"
    out.write_text(text)
    return out


class Proxy:
    """An nginx that runs. `access_log` and `error_log` are its own."""

    def __init__(self, folder: Path, port: int, certificate: Any) -> None:
        self.port = port
        self.access_log = folder / "access.log"
        self.error_log = folder / "error.log"
        self._tls = ssl.create_default_context(cafile=str(certificate.certificate))

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, timeout=LIMIT_S, context=self._tls)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body=body, headers=JSON | (headers or {}))
            answer = connection.getresponse()
            return answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read()


@pytest.fixture
def proxy(tool, certificate, tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """`proxy(upstream, changes)`: nginx in front of a port of loopback."""
    nginx = tool("nginx", HOW)
    running: list[subprocess.Popen[bytes]] = []

    def start(upstream: int, changes: dict[str, str] | None = None) -> Proxy:
        folder = tmp_path / "nginx"
        folder.mkdir()
        port = free_port()
        file = rendered(folder, port, upstream, certificate, changes or {})
        made = Proxy(folder, port, certificate)
        command = [nginx, "-p", str(folder), "-e", str(made.error_log), "-c", str(file), "-g", "daemon off;"]
        with made.error_log.open("ab") as errors:
            running.append(subprocess.Popen(command, stdout=errors, stderr=errors))
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert running[-1].poll() is None and time.monotonic() < deadline, made.error_log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return made
            time.sleep(0.02)

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def refusal(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and code, after a check of the one shape."""
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    document = json.loads(body)
    assert set(document) == {"error"} and set(document["error"]) == {"code", "message", "field"}
    assert headers["x-request-id"] and headers["x-content-type-options"] == "nosniff"
    assert headers["strict-transport-security"] == "max-age=31536000"
    return status, document["error"]["code"]


def test_it_agrees_with_the_service_about_sizes_and_times() -> None:
    text = CONF.read_text()
    sizes = {"m": 1024 * 1024}
    number, unit = re.search(r"client_max_body_size (\d+)(m);", text).groups()  # type: ignore[union-attr]
    assert int(number) * sizes[unit] == DEFAULT_MAX_BODY_BYTES == ServerSettings().max_body_bytes
    assert f"larger than {DEFAULT_MAX_BODY_BYTES} bytes" in text
    kept = re.search(r"keepalive 64;.*?keepalive_timeout (\d+)s;", text, re.DOTALL)
    assert kept and int(kept[1]) < ServerSettings().header_seconds


def test_scores_go_through_it_over_tls_with_a_key_and_one_request_id(serve, proxy, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, ["score", "label"], time.time())[1]
    service = serve("--keys", keys, "--access-log").started()
    front = proxy(service.port)
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "checkout-0001"}
    with contextlib.closing(front.connect()) as connection:
        for n in range(20):
            row = json.dumps({**ROW, "id": f"a/b {n}", "time": ROW["time"] + n}).encode()  # type: ignore[operator]
            connection.request("POST", "/v1/score", body=row, headers=JSON | headers)
            answer = connection.getresponse()
            assert answer.status == 200
            assert (json.loads(answer.read())["history"], answer.headers["x-request-id"]) == (n, "checkout-0001")
            assert answer.headers["strict-transport-security"]
    status, _, body = front.request("GET", "/v1/transactions/a%2Fb%203", headers=headers)
    assert (status, json.loads(body)["transaction_id"]) == (200, "a/b 3"), "an encoded slash comes through"
    assert front.request("GET", "/v1/transactions/a//b", headers=headers)[0] == 404
    assert front.request("GET", "/v1/model")[0] == 401
    assert front.request("POST", "/v1/score", b"{}", headers)[0] == 422, "refusals of the service pass as they are"
    large = front.request("POST", "/v1/score", b" " * DEFAULT_MAX_BODY_BYTES, headers)
    assert large[0] == 400, "the largest body is passed on"
    assert refusal(front.request("POST", "/v1/score", b" " * (DEFAULT_MAX_BODY_BYTES + 1), headers)) == (
        413,
        "payload_too_large",
    )
    assert service.stop() == 0
    behind = {json.loads(line)["request_id"] for line in service.log.read_text().splitlines() if "request_id" in line}
    told = [json.loads(line) for line in front.access_log.read_text().splitlines()]
    passed = {line["request_id"] for line in told if line["upstream_status"]}
    assert passed == behind
    assert "checkout-0001" in passed


def test_its_own_refusals_have_the_one_shape(proxy) -> None:
    front = proxy(free_port())  # where nobody answers
    answer = front.request("GET", "/v1/model")
    assert refusal(answer) == (502, "bad_gateway")
    assert answer[1]["retry-after"] == "1"
    assert refusal(front.request("GET", "/" + "a" * 9000)) == (414, "uri_too_long")
    assert refusal(front.request("GET", "/", headers={"X-Long": "a" * 9000})) == (431, "headers_too_large")
    assert refusal(front.request("GET", "/refused-by-nginx")) == (404, "not_found")
    plain = http.client.HTTPConnection("127.0.0.1", front.port, timeout=LIMIT_S)
    with contextlib.closing(plain):
        plain.request("GET", "/healthz")
        answer = plain.getresponse()
        assert refusal((answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())) == (
            400,
            "bad_request",
        )


def test_a_service_that_does_not_answer_in_time_is_a_504(proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        front = proxy(silent.getsockname()[1], {"proxy_read_timeout 30s;": "proxy_read_timeout 100ms;"})
        assert refusal(front.request("GET", "/v1/model")) == (504, "gateway_timeout")


def test_an_address_has_so_many_connections_and_the_next_is_refused(proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        front = proxy(silent.getsockname()[1], {"limit_conn connections 64;": "limit_conn connections 3;"})
        held = [front.connect() for _ in range(3)]
        for connection in held:
            connection.request("GET", "/v1/model")
        behind = [silent.accept()[0] for _ in held]  # what has reached the other side, nginx has counted
        answer = front.request("GET", "/v1/model")
        assert refusal(answer) == (429, "too_many_requests")
        assert answer[1]["retry-after"] == "1"
        for connection in [*held, *behind]:
            connection.close()


def test_a_slow_client_reaches_the_service_with_its_whole_body_or_not_at_all(serve, proxy) -> None:
    service = serve("--access-log").started()
    front = proxy(service.port, {"client_body_timeout 10s;": "client_body_timeout 1s;"})
    with contextlib.closing(front.connect()) as slow:
        slow.putrequest("POST", "/v1/score")
        slow.putheader("Content-Length", "1000")
        slow.endheaders()
        slow.send(b"{")
        assert front.request("GET", "/healthz")[0] == 200
        assert refusal_or_closed(slow) in (None, (408, "request_timeout"))
    assert service.stop() == 0
    routes = [json.loads(line).get("route") for line in service.log.read_text().splitlines()]
    assert "/healthz" in routes and "/v1/score" not in routes


def refusal_or_closed(connection: http.client.HTTPSConnection) -> tuple[int, str] | None:
    """nginx resets a connection whose body does not come, or says so first."""
    try:
        answer = connection.getresponse()
    except (ConnectionError, http.client.HTTPException):
        return None
    return refusal((answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read()))


def test_its_logs_hold_no_address_and_no_identifier(serve, proxy) -> None:
    """Also where nobody answers: nginx's error log would have the whole request line."""
    service = serve().started()
    front = proxy(service.port)
    card = "4111111111111111"
    for answered in (True, False):
        if not answered:
            assert service.stop() == 0
        front.request("GET", f"/v1/users/jane-{card}?jane={card}", headers={"X-Request-Id": card, "Referer": "jane"})
        front.request("GET", "/v1/users/jane", headers={"X-Request-Id": "jane doe"})
        front.request("GET", f"/v1/users/jane{'e' * 9000}")
        front.request("POST", "/v1/score", json.dumps({**ROW, "user": "jane"}).encode() * 100_000)
    deadline = time.monotonic() + LIMIT_S  # the line of a refused body comes once its connection is closed
    while len((written := front.access_log.read_text()).splitlines()) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {json.loads(line)["status"] for line in written.splitlines()} >= {413, 414, 502}
    for text in (written, front.error_log.read_text()):
        assert "jane" not in text
        assert card not in text


def test_nothing_else_is_needed_to_check_the_file(tool, certificate, tmp_path: Path) -> None:
    nginx = tool("nginx", HOW)
    file = rendered(tmp_path, free_port(), 1, certificate, {})
    done = subprocess.run(
        [nginx, "-t", "-q", "-p", str(tmp_path), "-c", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr, done.stderr
