"""Every kind of bad request, against the app over a real service and against a real server process.

One shape, the right status, and not a byte of state that is another one afterwards.
"""

import hashlib
import io
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pytest

from benchmarks import processes
from serve.app import create_app
from serve.service import Service

START = 1_600_000_000_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}
LIMIT_S = 10.0
MAX_BODY = 50_000
JSON = "application/json"


def row(**changes: Any) -> bytes:
    """A transaction that would be accepted but for the changes."""
    return json.dumps({**ROW, "id": "new", **changes}).encode()


def spelled(field_name: str, text: bytes) -> bytes:
    """A transaction with one value spelled by hand."""
    return row(**{field_name: "<here>"}).replace(b'"<here>"', text)


@dataclass(frozen=True)
class Bad:
    """A request that is refused, and how."""

    status: int
    code: str
    body: bytes = b""
    path: str = "/v1/score"
    method: str = "POST"
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    field: str = ""


LABEL = {"transaction_id": "t1", "is_fraud": True}
SCORE: dict[str, Bad] = {
    "empty": Bad(400, "invalid_json"),
    "blank": Bad(400, "invalid_json", b" \n\t"),
    "truncated": Bad(400, "invalid_json", row()[:-1]),
    "cut in a string": Bad(400, "invalid_json", row()[:30]),
    "more after it": Bad(400, "invalid_json", row() + b" {}"),
    "comments": Bad(400, "invalid_json", row() + b" // so"),
    "comment inside": Bad(400, "invalid_json", row().replace(b",", b", /* so */", 1)),
    "single quotes": Bad(400, "invalid_json", row().replace(b'"', b"'")),
    "trailing comma": Bad(400, "invalid_json", row()[:-1] + b",}"),
    "byte order mark": Bad(400, "invalid_json", b"\xef\xbb\xbf" + row()),
    "UTF-16": Bad(400, "invalid_json", row().decode().encode("utf-16")),
    "UTF-32": Bad(400, "invalid_json", row().decode().encode("utf-32-le")),
    "latin-1": Bad(400, "invalid_json", spelled("user", b'"M\xfcller"')),
    "bad UTF-8 in what is ignored": Bad(400, "invalid_json", spelled("note", b'"\xff"')),
    "overlong UTF-8": Bad(400, "invalid_json", spelled("user", b'"\xc0\xaf"')),
    "surrogate in UTF-8": Bad(400, "invalid_json", spelled("user", b'"\xed\xa0\x80"')),
    "lone surrogate": Bad(400, "invalid_json", spelled("user", b'"\\ud800"')),
    "lone low surrogate": Bad(400, "invalid_json", spelled("id", b'"\\udc00x"')),
    "raw control character": Bad(400, "invalid_json", spelled("user", b'"a\nb"')),
    "deep arrays": Bad(422, "invalid_field", b"[" * 20_000),
    "deep objects": Bad(400, "invalid_json", b'{"a":' * 8_000 + b"1" + b"}" * 8_000),
    "deep after a wrong field": Bad(400, "invalid_json", spelled("user", b"[" * 20_000)),
    "deep after a missing field": Bad(400, "invalid_json", b'{"amount": null, "x": ' + b"[" * 20_000),
    "deep in what is ignored": Bad(400, "invalid_json", spelled("note", b"[" * 20_000 + b"]" * 20_000)),
    **{f"number {n.decode()}": Bad(400, "invalid_json", spelled("amount", n))
       for n in (b"NaN", b"nan", b"Infinity", b"-Infinity", b"inf", b"01", b"1.", b".5", b"+1", b"0x1F", b"1e", b"True")},
    **{f"whole {v.decode()[:12]}": Bad(422, "invalid_field", v)
       for v in (b"null", b"true", b"5", b'"text"', b"[]", b"[" + row() + b"]")},
    **{f"amount {v.decode()[:12]}": Bad(422, "invalid_field", spelled("amount", v), field="amount")
       for v in (b"1e999", b"-1e999", b"1e31", b"9" * 5000, b"true", b"null", b'"12.5"', b'"NaN"', b'"Infinity"', b"[1]",
                 b"{}")},
    **{f"id {v.decode()[:12]}": Bad(422, "invalid_field", spelled("id", v), field="id")
       for v in (b"9" * 5000, b"1" * 257, b"1.0", b"1e5", b"true", b"null", b'""', b"[]", b"1e999", b'"%s"' % (b"x" * 257),
                 b'"a\\u0000"', b'"a\\nb"', b'"\\u007f"', b'"\xc2\x85"')},
    **{f"user {v.decode()[:12]}": Bad(422, "invalid_field", spelled("user", v), field="user")
       for v in (b"9" * 5000, b"1.5", b"null", b'""', b"{}", b'"%s"' % ("é" * 257).encode(), b'"\\u001b[2J"')},
    **{f"kind {v.decode()[:12]}": Bad(422, "invalid_field", spelled("kind", v), field="kind")
       for v in (b"[]", b"{}", b"9" * 5000, b"1e300", b'"%s"' % (b"k" * 257), b'"a\\tb"')},
    **{f"time {v.decode()[:12]}": Bad(422, "invalid_field", spelled("time", v), field="time")
       for v in (b"-1", b"-1e300", b"253402300799999", b"253402300800000", b"1e300", b"9" * 300, b"9" * 5000, b"null", b"true",
                 b'"2025-03-01"', b'"1600000000000"')},
    "no amount": Bad(422, "invalid_field", b'{"id":"new","user":"u","time":1600000000000}', field="amount"),
    "a name twice": Bad(422, "duplicate_field", row()[:-1] + b', "amount": 1}', field="amount"),
    "a name twice, escaped": Bad(422, "duplicate_field", row()[:-1] + b', "\\u0061mount": 1}', field="amount"),
    "an ignored name twice": Bad(422, "duplicate_field", row(x=1)[:-1] + b', "x": 2}', field="x"),
    "other content": Bad(409, "conflict", row(id="t1", amount=21.0), field="id"),
    "too large": Bad(413, "payload_too_large", row(note="x" * MAX_BODY)),
    **{f"type {t}": Bad(415, "unsupported_media_type", row(), content_type=t)
       for t in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                 f"{JSON}; charset=nosuch", f"{JSON}; charset=utf-16", f"{JSON}; body=x", ";;;")},
    "gzip": Bad(415, "unsupported_media_type", row(), headers={"Content-Encoding": "gzip"}),
}  # fmt: skip
BATCH: dict[str, Bad] = {
    "batch empty": Bad(400, "invalid_json", path="/v1/score/batch"),
    "batch cut": Bad(400, "invalid_json", b"[" + row(), path="/v1/score/batch"),
    "batch trailing comma": Bad(400, "invalid_json", b"[" + row() + b",]", path="/v1/score/batch"),
    "batch of one object": Bad(422, "invalid_field", row(), path="/v1/score/batch"),
    "batch null": Bad(422, "invalid_field", b"null", path="/v1/score/batch"),
    "batch bad UTF-8": Bad(400, "invalid_json", b'["\xff",' + row() + b"]", path="/v1/score/batch"),
    "batch deep": Bad(400, "invalid_json", b"[" * 20_000, path="/v1/score/batch"),
    "batch of too many": Bad(413, "batch_too_large", b"[" + b",".join([row()] * 51) + b"]", path="/v1/score/batch"),
    "batch too large": Bad(413, "payload_too_large", b" " * (MAX_BODY + 1), path="/v1/score/batch"),
    "batch type": Bad(415, "unsupported_media_type", b"[]", path="/v1/score/batch", content_type="text/csv"),
}


def label(status: int, code: str, body: Any, name: str = "") -> Bad:
    """A request of labels in which a good one comes first."""
    sent = body if isinstance(body, bytes) else json.dumps([LABEL, {**LABEL, **body}]).encode()
    return Bad(status, code, sent, path="/v1/labels", field=name)


LABELS: dict[str, Bad] = {
    "labels empty": label(400, "invalid_json", b""),
    "labels cut": label(400, "invalid_json", b"["),
    "labels object": label(422, "invalid_field", json.dumps(LABEL).encode()),
    "labels null": label(422, "invalid_field", b"[null]"),
    "labels twice": label(422, "duplicate_field", json.dumps([LABEL]).encode()[:-2] + b', "is_fraud": 0}]', "is_fraud"),
    "labels bad UTF-8": label(400, "invalid_json", json.dumps([{**LABEL, "x": "?"}]).encode().replace(b"?", b"\xff")),
    "labels bad UTF-8 in an id": label(400, "invalid_json", b'[{"transaction_id": "\xff", "is_fraud": true}]'),
    "labels too many": label(413, "payload_too_large", json.dumps([LABEL] * 2000).encode()),
    "label id": label(422, "invalid_field", {"transaction_id": "x" * 257}, "transaction_id"),
    "label id empty": label(422, "invalid_field", {"transaction_id": ""}, "transaction_id"),
    "label id control": label(422, "invalid_field", {"transaction_id": "\x00"}, "transaction_id"),
    "label fraud": label(422, "invalid_field", {"is_fraud": "true"}, "is_fraud"),
    "label fraud 2": label(422, "invalid_field", {"is_fraud": 2}, "is_fraud"),
    "label source": label(422, "invalid_field", {"source": "s" * 257}, "source"),
    "label source control": label(422, "invalid_field", {"source": "\x1b[0m"}, "source"),
    "label time": label(422, "invalid_field", {"known_at": "soon"}, "known_at"),
    "label before 1970": label(422, "invalid_field", {"known_at": -1}, "known_at"),
    "label far ahead": label(422, "invalid_field", {"known_at": "9999-01-01"}, "known_at"),
}
ADDRESSES: dict[str, Bad] = {
    **{f"address {p}": Bad(404, "not_found", path=p, method="GET")
       for p in ("/nope", "/v1", "/v1/users/", "/v1/score/batch/x", "/v1/../healthz", "/healthz;x=1", "/%ff", "/v9/healthz")},
    "post nowhere": Bad(404, "not_found", row(), path="/v2/score"),
    "unknown user": Bad(404, "unknown_user", path="/v1/users/nobody", method="GET"),
    "unknown transaction": Bad(404, "unknown_transaction", path="/v1/transactions/%00", method="GET"),
    "long identifier": Bad(404, "unknown_user", path="/v1/users/" + "u" * 20_000, method="GET"),
    "identifier no UTF-8": Bad(400, "bad_path", path="/v1/users/%ff", method="GET"),
    "surrogate in the path": Bad(400, "bad_path", path="/v1/transactions/%ed%a0%80", method="GET"),
    **{f"{m} {p}": Bad(405, "method_not_allowed", row(), path=p, method=m)
       for m, p in (("GET", "/v1/score"), ("PUT", "/v1/score"), ("DELETE", "/v1/users/ann"), ("PATCH", "/v1/labels"),
                    ("TRACE", "/v1/score"), ("DELETE", "/v1/model"), ("POST", "/healthz"))},
    "invented method": Bad(405, "method_not_allowed", row(), method="BREW"),
}  # fmt: skip
ALL = {**SCORE, **BATCH, **LABELS, **ADDRESSES}


def check_error(bad: Bad, status: int, content_type: str, body: bytes) -> None:
    """The one shape, with what is expected in it."""
    assert content_type == JSON
    error = json.loads(body)["error"]
    assert set(error) == {"code", "message", "field"}
    assert (status, error["code"], error["field"]) == (bad.status, bad.code, bad.field)
    assert 10 < len(error["message"]) < 300
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]


# ---- the app over a real service


def fill(service: Service) -> None:
    """Some of everything that a service can hold."""
    service.score(json.dumps(ROW).encode())
    for n in range(8):
        at = START + n * 60_000
        service.score(row(id=f"f{n}", user=f"u{n % 3}", time=at - (n == 5) * 200_000, merchant=f"m{n % 2}"))
        service.add_labels(json.dumps([{**LABEL, "transaction_id": f"f{n}", "known_at": at + n * 9_000}]).encode())
    service.add_labels(json.dumps([{**LABEL, "transaction_id": "early", "known_at": START}]).encode())


def digest_of_files(state: Path) -> str:
    """Of every byte of the log, and of everything that the index says."""
    digest = hashlib.sha256()
    for file in sorted((state / "journal").iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    with closing(sqlite3.connect(f"file:{state / 'journal.sqlite'}?mode=ro", uri=True)) as db:
        for line in db.iterdump():
            digest.update(line.encode())
    return digest.hexdigest()


def wait_until_indexed(service: Service) -> None:
    deadline = time.monotonic() + LIMIT_S
    while service.journal._tail.by_seq:
        assert time.monotonic() < deadline, "the index never caught up"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def opened(cards, tmp_path_factory) -> Iterator[Service]:
    with Service(cards, tmp_path_factory.mktemp("opened") / "state", clock=lambda: START) as service:
        fill(service)
        wait_until_indexed(service)
        yield service


def call(app: Any, bad: Bad) -> tuple[int, str, bytes]:
    path, _, query = bad.path.partition("?")
    environ = {
        "REQUEST_METHOD": bad.method,
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "CONTENT_TYPE": bad.content_type,
        "CONTENT_LENGTH": str(len(bad.body)),
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(bad.body),
        "wsgi.errors": io.StringIO(),
        **{f"HTTP_{k.upper().replace('-', '_')}": v for k, v in bad.headers.items()},
    }
    started: list[tuple[str, dict[str, str]]] = []
    body = b"".join(app(environ, lambda status, headers, *_: started.append((status, dict(headers)))))
    ((status, headers),) = started
    return int(status[:3]), headers["content-type"], body


@pytest.mark.parametrize("name", ALL)
def test_a_refused_request_changes_nothing(opened: Service, memory_of: Callable[[Service], Any], name: str) -> None:
    """Memory, the log's bytes and the index are compared with what they were."""
    app = create_app(opened, max_body_bytes=MAX_BODY)
    before = memory_of(opened), digest_of_files(opened._state)
    check_error(ALL[name], *call(app, ALL[name]))
    assert (memory_of(opened), digest_of_files(opened._state)) == before


def test_the_refused_items_of_a_batch_change_nothing(opened: Service, memory_of: Callable[[Service], Any]) -> None:
    """All of a batch is refused here, item by item, which is a 200."""
    refused = [bad for name, bad in SCORE.items() if bad.status in (409, 422) and name != "deep arrays"]
    before = memory_of(opened), digest_of_files(opened._state)
    for at in range(0, len(refused), 50):
        some = refused[at : at + 50]
        results = json.loads(opened.score_batch(b"[" + b",".join(bad.body for bad in some) + b"]"))["results"]
        assert [(r["error"]["code"], r["error"]["field"]) for r in results] == [(bad.code, bad.field) for bad in some]
    assert (memory_of(opened), digest_of_files(opened._state)) == before


def test_a_good_request_changes_every_digest(cards, tmp_path, memory_of: Callable[[Service], Any]) -> None:
    """Or the tests above would show nothing."""
    with Service(cards, tmp_path, clock=lambda: START) as service:
        fill(service)
        wait_until_indexed(service)
        before = memory_of(service), digest_of_files(tmp_path)
        status, _, _ = call(create_app(service), Bad(200, "", row()))
        assert status == 200
        wait_until_indexed(service)
        after = memory_of(service), digest_of_files(tmp_path)
    assert before[0] != after[0]
    assert before[1] != after[1]


# ---- a real server process


@dataclass(frozen=True)
class Edge:
    """A running service and its state folder."""

    port: int
    state: Path

    def send(self, data: bytes, half_closed: bool = False) -> "Answers":
        """Raw bytes over a connection of their own."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        with closing(connection):
            connection.sendall(data)
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
            return Answers(connection)

    def digest(self) -> str:
        """Of every byte of the log."""
        files = sorted((self.state / "journal").iterdir())
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Answers:
    """What came back until the other side closed: requests say that it should."""

    def __init__(self, connection: socket.socket) -> None:
        got = io.BytesIO(b"".join(iter(lambda: connection.recv(65536), b"")))
        self.all: list[tuple[int, dict[str, str], bytes]] = []
        while line := got.readline():
            status = int(line.split()[1])
            headers: dict[str, str] = {}
            while (line := got.readline().strip()) != b"":
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            self.all.append((status, headers, got.read(int(headers.get("content-length", 0)))))

    @property
    def statuses(self) -> list[int]:
        return [status for status, _, _ in self.all]


@pytest.fixture(scope="module")
def edge(cards, tmp_path_factory) -> Iterator[Edge]:
    """A real service with some state; at the end it must still be what it was, and end well."""
    folder = tmp_path_factory.mktemp("edge")
    settings = folder / "serve.toml"
    settings.write_text(f"[server]\nmax_body_bytes = {MAX_BODY}\n")
    with Service(cards, folder / "state") as service:
        fill(service)
    with processes.service(cards.path, folder / "state", "--settings", str(settings)) as url:
        server = Edge(int(urlsplit(url).port or 0), folder / "state")
        before = server.digest()
        yield server
        assert server.send(request("GET", "/readyz")).statuses == [200]
        assert server.digest() == before


def request(
    method: str, path: str, body: bytes = b"", content_type: str = JSON, close: bool = True, **headers: str
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {content_type}"] * bool(content_type) + ["Connection: close"] * close
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bad_request(bad: Bad, close: bool = True) -> bytes:
    headers = {name.replace("-", "_"): value for name, value in bad.headers.items()}
    return request(bad.method, bad.path, bad.body, bad.content_type, close, **headers)


@pytest.mark.parametrize("name", ALL)
def test_a_server_refuses_in_the_one_shape_and_keeps_the_connection(edge: Edge, name: str) -> None:
    """A good request on the same connection is answered too: the refused body was read to its end."""
    answers = edge.send(bad_request(ALL[name], close=False) + request("GET", "/healthz")).all
    status, headers, body = answers[0]
    check_error(ALL[name], status, headers["content-type"], body)
    if ALL[name].status == 405:
        assert headers["allow"]
    assert [status for status, _, _ in answers[1:]] == [200]


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (request("GET", "http://elsewhere/healthz"), [200]),
        (request("OPTIONS", "/v1/score"), [200]),
        (request("OPTIONS", "*"), [404]),
        (request("CONNECT", "a:80"), [404]),
        (request("POST", "/v1/score?user=eve&body=x&id=5", b"{}"), [422]),
        (request("GET", "/healthz?" + "a=b&" * 10_000), [200]),
        (request("GET", "/healthz?%ff=%zz&&=;[]"), [200]),
        (request("GET", "/v1/users/" + "u" * 70_000), [414]),
        (request("GET", "/v1/users/" + "u" * 1_000_000), [431]),
        (request("GET", "/healthz", **{f"X{i}": "y" for i in range(200)}), [431]),
        (request("GET", "/healthz", X="y" * 1_000_000), [431]),
        (request("GET", "/healthz", X="a\0b"), [400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", [400]),
        (b"GET /healthz\r\n\r\n", [400]),
        (b"GET /healthz HTTP/3.0\r\n\r\n", [400]),
        (b"GET /v1/users/a b HTTP/1.1\r\n\r\n", [400]),
        (b"GET /v1/users/\xff HTTP/1.1\r\n\r\n", [400]),
        (b"POST /v1/score HTTP/1.1\r\nContent-Length: -1\r\n\r\n", [400]),
        (b"POST /v1/score HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", [400]),
        (b"POST /v1/score HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n{}", [400]),
        (b"POST /v1/score HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n{}", [400]),
        (request("POST", "/v1/score", b"{}", Expect="100-continue"), [100, 422]),
        (request("POST", "/v1/score", b"{}", Expect="nonsense"), [422]),
        (request("GET", "/healthz", Upgrade="websocket"), [200]),
        (b"HEAD /nope HTTP/1.1\r\n\r\n" + request("GET", "/healthz"), [404, 200]),
        (b"HEAD /v1/score HTTP/1.1\r\n\r\n" + request("GET", "/healthz"), [405, 200]),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)  # fmt: skip
def test_what_http_itself_refuses_and_what_it_takes(edge: Edge, sent: bytes, statuses: list[int]) -> None:
    """What is no HTTP, or too much of it, is answered by granian before us: a status, no body, the connection closed."""
    answers = edge.send(sent).all
    assert [status for status, _, _ in answers] == statuses
    assert edge.send(request("GET", "/healthz")).statuses == [200]


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", **headers: str) -> bytes:
    lines = ["POST /v1/score HTTP/1.1", "Host: x", f"Content-Type: {JSON}", "Connection: close", ""]
    lines[-1:-1] = [
        f"{name.replace('_', '-')}: {value}" for name, value in {"Transfer_Encoding": "chunked", **headers}.items()
    ]
    return "\r\n".join([*lines, ""]).encode() + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + end


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (chunked(row(id="t1", amount=21)[:20], row(id="t1", amount=21)[20:]), 409, "conflict"),
        (chunked(b'{"id"'), 400, "invalid_json"),
        (chunked(b"{}", Content_Length="9"), 422, "invalid_field"),
        (chunked(end=b"zz\r\n{}\r\n0\r\n\r\n"), 400, "invalid_json"),
        (chunked(end=b"ffffffffffffffffffff\r\n{}\r\n0\r\n\r\n"), 400, "invalid_json"),
        (chunked(b" " * MAX_BODY, b"{}"), 413, "payload_too_large"),
        (chunked(b"{}", Transfer_Encoding="gzip, chunked"), 415, "unsupported_media_type"),
        (chunked(b"{}", Content_Encoding="deflate"), 415, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_a_chunked_body_is_held_to_the_same(edge: Edge, sent: bytes, status: int, code: str) -> None:
    ((got, _, body),) = edge.send(sent).all
    assert (got, json.loads(body)["error"]["code"]) == (status, code)


def test_a_length_that_lies_is_a_400_and_never_another_request(edge: Edge) -> None:
    """Too short: the rest is no request. Too long: the body never ends."""
    short = b"POST /v1/score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n" + row()
    assert edge.send(short).statuses == [400, 400]
    long = short.replace(b"Length: 5", b"Length: 5000")
    ((status, _, body),) = edge.send(long, half_closed=True).all
    assert (status, json.loads(body)["error"]["code"]) == (400, "incomplete_body")
