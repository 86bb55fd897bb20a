"""The app over an injected service, called as WSGI calls it."""

import io
import json
import logging
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from seqfraud.errors import RequestError
from serve.app import create_app


@dataclass
class FakeService:
    """Remembers its calls; raises `error` if there is one."""

    error: Exception | None = None
    is_ready: bool = True
    is_degraded: bool = False
    calls: list[tuple[str, object]] = field(default_factory=list)

    def _call(self, name: str, argument: object) -> bytes:
        self.calls.append((name, argument))
        if self.error is not None:
            raise self.error
        return b'{"from":"%s"}' % name.encode()

    def score(self, body: bytes) -> bytes:
        return self._call("score", body)

    def score_batch(self, body: bytes) -> bytes:
        return self._call("score_batch", body)

    def add_labels(self, body: bytes, author: str) -> bytes:
        return self._call("add_labels", body)

    def transaction(self, transaction_id: str) -> bytes:
        return self._call("transaction", transaction_id)

    def user(self, user: str) -> bytes:
        return self._call("user", user)

    def model(self) -> bytes:
        return self._call("model", None)

    def ready(self) -> bool:
        return self.is_ready

    def degraded(self) -> bool:
        return self.is_degraded


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        """The error, after a check of the one shape that all of them have."""
        document = json.loads(self.body)
        assert set(document) == {"error"}
        error: dict[str, str] = document["error"]
        assert set(error) == {"code", "message", "field"}
        assert all(isinstance(text, str) for text in error.values())
        assert error["code"]
        assert error["message"]
        assert self.headers["content-type"] == "application/json"
        return error


def call(
    app: Any,
    method: str,
    url: str,
    body: bytes = b"",
    stream: io.BytesIO | None = None,
    **environ: Any,
) -> Answer:
    """One request, its path decoded as a WSGI server does. `environ` replaces; None removes."""
    path, _, query = url.partition("?")
    variables = {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": stream or io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
    } | environ
    started: list[tuple[str, dict[str, str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: object) -> None:
        started.append((status, {name.lower(): value for name, value in headers}))

    present = {key: value for key, value in variables.items() if value is not None}
    answer = b"".join(app(present, start_response))
    ((status, headers),) = started
    return Answer(int(status[:3]), headers, answer)


def test_making_an_app_does_not_touch_the_service() -> None:
    service = FakeService()
    create_app(service)
    assert service.calls == []


@pytest.mark.parametrize(
    ("method", "url", "name", "argument"),
    [
        ("POST", "/v1/score", "score", b'{"a": 1}'),
        ("POST", "/v1/score/", "score", b'{"a": 1}'),
        ("POST", "/v1/score/batch", "score_batch", b'{"a": 1}'),
        ("POST", "/v1/labels", "add_labels", b'{"a": 1}'),
        ("GET", "/v1/transactions/T1", "transaction", "T1"),
        ("GET", "/v1/users/U1", "user", "U1"),
        ("GET", "/v1/model", "model", None),
    ],
)
def test_a_route_hands_the_service_what_it_needs_and_returns_its_bytes(
    method: str, url: str, name: str, argument: object
) -> None:
    service = FakeService()
    answer = call(create_app(service), method, url, body=b'{"a": 1}')
    assert service.calls == [(name, argument)]
    assert (answer.status, answer.body) == (200, b'{"from":"%s"}' % name.encode())
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.body))


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json;charset=UTF-8",
        "application/json; charset=utf-8",
        'application/json ; charset = "utf-8"',
        "application/json; charset=utf8",
        "application/json;",
        "application/vnd.shop.payment+json",
    ],
)
def test_a_body_that_says_json_reaches_the_service_as_it_is(content_type: str) -> None:
    service = FakeService()
    app = create_app(service)
    assert call(app, "POST", "/v1/score", body=b"\xff{", CONTENT_TYPE=content_type).status == 200
    assert service.calls == [("score", b"\xff{")]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "json",
        "text/json",
        "text/plain",
        "application/jsonl",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/json; charset=nosuch",
        "application/json; charset=utf-16",
        'application/json; charset="utf-8',
        "application/json; body=x",
        "application/json; charset=utf-8; body=x",
        "application/json, application/json",
        "application/json\u0130",
        "application/+json",
        ";;;",
        "application/" + "a" * 50_000,
    ],
)
def test_another_content_type_or_none_is_a_415_that_says_which_is_right(content_type: str | None, framing: str) -> None:
    """Hug took `charset=nosuch` and `body=x` for a 500. Without a type: see `_read_json`; with curl's: a hint."""
    service = FakeService()
    extra = CHUNKED if framing == "chunked" else {}
    answer = call(create_app(service), "POST", "/v1/score", body=b"{}", CONTENT_TYPE=content_type, **extra)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in answer.error["message"]
    assert len(answer.error["message"]) < 250
    assert service.calls == []


@pytest.mark.parametrize(("encoding", "status"), [("identity", 200), ("gzip", 415), ("br, gzip", 415), ("", 415)])
def test_a_compressed_body_is_a_415(encoding: str, status: int) -> None:
    service = FakeService()
    answer = call(create_app(service), "POST", "/v1/labels", body=b"[]", HTTP_CONTENT_ENCODING=encoding)
    assert answer.status == status
    assert len(service.calls) == (status == 200)


def test_chunks_may_not_be_compressed_either() -> None:
    """Granian takes `gzip, chunked` and hands out what is inside of the chunks as it is."""
    service = FakeService()
    framing = CHUNKED | {"HTTP_TRANSFER_ENCODING": "gzip, chunked"}
    assert call(create_app(service), "POST", "/v1/score", body=b"{}", **framing).status == 415
    assert service.calls == []


def test_keys_of_the_body_and_the_query_are_no_arguments() -> None:
    """Hug merges both into a handler's arguments: `{"body": ...}` replaced the body itself."""
    service = FakeService()
    body = b'{"body": 1, "request": 2, "response": 3, "api_version": 4}'
    query = "body=1&request=2&response=3&api_version=4&transaction_id=other"
    app = create_app(service)
    assert call(app, "POST", f"/v1/score?{query}", body=body).status == 200
    assert call(app, "GET", f"/v1/transactions/T1?{query}").status == 200
    assert service.calls == [("score", body), ("transaction", "T1")]


def test_a_refusal_of_the_service_becomes_the_error_shape() -> None:
    error = RequestError(409, "conflict", "seen with other content: é", "TX_ID")
    answer = call(create_app(FakeService(error)), "POST", "/v1/score", body=b"{}")
    assert answer.status == 409
    assert answer.error == {
        "code": "conflict",
        "message": "seen with other content: é",
        "field": "TX_ID",
    }


@pytest.mark.parametrize(
    "url",
    [
        "/",
        "/nope",
        "/v1",
        "/v1/users",
        "/v1/users/",
        "/v2/v1/score",
        "/vx/healthz",
        "/v1/transactions/a/explanation",
    ],
)
def test_an_unknown_address_is_a_404_and_not_hugs_documentation(url: str) -> None:
    """Hug would answer with its documentation, and also at /v{anything}/ before every route."""
    answer = call(create_app(FakeService()), "GET", url)
    assert answer.status == 404
    assert answer.error["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("GET", "/v1/score", {"POST", "OPTIONS"}),
        ("DELETE", "/v1/labels", {"POST", "OPTIONS"}),
        ("POST", "/v1/users/a%2Fb", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_wrong_method_is_a_405_that_says_which_are_right(
    method: str,
    url: str,
    allowed: set[str],
) -> None:
    service = FakeService()
    answer = call(create_app(service), method, url, body=b"{}")
    assert answer.status == 405
    assert answer.error["code"] == "method_not_allowed"
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert service.calls == []


def test_an_invented_method_is_one_that_is_not_taken() -> None:
    """It was a 400, which does not say what is taken; schemathesis tried QUERY."""
    for method in ("BREW", "QUERY"):
        answer = call(create_app(FakeService()), method, "/v1/score", body=b"{}")
        assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == {"POST", "OPTIONS"}
        assert call(create_app(FakeService()), method, "/nothing").status == 404


def test_head_is_get_without_the_body() -> None:
    answer = call(create_app(FakeService()), "HEAD", "/healthz")
    assert (answer.status, answer.body) == (200, b"")


def test_a_crash_is_a_500_that_tells_the_log_and_not_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = FakeService(error=ValueError("secret detail"))
    with caplog.at_level(logging.ERROR, logger="serve.app"):
        answer = call(create_app(service), "GET", "/v1/users/jane")
    assert answer.status == 500
    assert answer.error["code"] == "internal"
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    assert "GET /v1/users/{user} failed" in caplog.text
    assert "Traceback" in caplog.text
    assert "secret detail" in caplog.text
    assert "jane" not in caplog.text  # a log of crashes is no list of users


def test_the_app_lives_on_after_a_crash() -> None:
    service = FakeService(error=ValueError())
    app = create_app(service)
    call(app, "POST", "/v1/score", body=b"{}")
    service.error = None
    assert call(app, "POST", "/v1/score", body=b"{}").status == 200


@pytest.mark.parametrize(
    ("quoted", "identifier"),
    [
        ("plain", "plain"),
        ("a%20b", "a b"),
        ("a+b", "a+b"),
        ("caf%C3%A9", "café"),
        ("%F0%9F%92%B3", "💳"),
        ("a%2Fb", "a/b"),
        ("a/b/c", "a/b/c"),
        ("a%2F", "a/"),
        ("%2F", "/"),
        ("100%25", "100%"),
        ("%2541", "%41"),
        ("%252F", "%2F"),
        ("a%0Ab", "a\nb"),
        ("%7Bid%7D", "{id}"),
        ("..%2F..", "../.."),
        ("explanation", "explanation"),
        ("a?query", "a"),
        ("a%3Fb", "a?b"),
    ],
)
def test_an_identifier_in_the_path_is_what_the_client_encoded(quoted: str, identifier: str) -> None:
    service = FakeService()
    app = create_app(service)
    assert call(app, "GET", f"/v1/users/{quoted}").status == 200
    assert call(app, "GET", f"/v1/transactions/{quoted}").status == 200
    assert service.calls == [("user", identifier), ("transaction", identifier)]


@pytest.mark.parametrize("quoted", ["%FF", "a%C3", "%ED%A0%80"])
def test_an_identifier_that_is_no_utf_8_is_refused(quoted: str) -> None:
    """Falcon would put U+FFFD in its place and look up somebody else."""
    service = FakeService()
    answer = call(create_app(service), "GET", f"/v1/users/{quoted}")
    assert (answer.status, answer.error["code"]) == (400, "bad_path")
    assert service.calls == []


CHUNKED: dict[str, Any] = {
    "CONTENT_LENGTH": None,
    "HTTP_TRANSFER_ENCODING": "chunked",
    "wsgi.input_terminated": True,
}


@pytest.mark.parametrize("framing", [{}, CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("url", ["/v1/score", "/v1/score/batch", "/v1/labels"])
def test_a_body_is_taken_up_to_the_limit_and_refused_beyond(
    url: str,
    framing: dict[str, Any],
) -> None:
    service = FakeService()
    app = create_app(service, max_body_bytes=10)
    assert call(app, "POST", url, body=b"0123456789", **framing).status == 200
    answer = call(app, "POST", url, body=b"0123456789a", **framing)
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    assert "10 bytes" in answer.error["message"]
    assert [argument for _, argument in service.calls] == [b"0123456789"]


@pytest.mark.parametrize("framing", [{}, CHUNKED], ids=["length", "chunked"])
def test_a_refused_body_is_read_away_but_not_without_end(framing: dict[str, Any]) -> None:
    """So that a client that writes first and reads later gets its 413; a huge one is cut off."""
    app = create_app(FakeService(), max_body_bytes=10)
    moderate, huge = io.BytesIO(bytes(100)), io.BytesIO(bytes(10_000))
    call(app, "POST", "/v1/score", stream=moderate, **{"CONTENT_LENGTH": "100"} | framing)
    call(app, "POST", "/v1/score", stream=huge, **{"CONTENT_LENGTH": "10000"} | framing)
    assert moderate.tell() == 100
    assert huge.tell() < 200


def test_a_body_that_was_cut_off_is_not_scored() -> None:
    service = FakeService()
    answer = call(create_app(service), "POST", "/v1/score", body=b'{"a": 1}', CONTENT_LENGTH="9")
    assert (answer.status, answer.error["code"]) == (400, "incomplete_body")
    assert service.calls == []


def test_chunks_win_over_a_length_beside_them() -> None:
    service = FakeService()
    framing = CHUNKED | {"CONTENT_LENGTH": "3"}
    call(create_app(service), "POST", "/v1/score", body=b"[1, 2]", **framing)
    assert service.calls == [("score", b"[1, 2]")]


@pytest.mark.parametrize("length", [None, "", "x", "-1", "²"])
def test_without_a_length_nothing_is_read_where_the_server_does_not_end_the_stream(
    length: str | None,
) -> None:
    """Reading on would wait for the client's next request."""
    service = FakeService()
    stream = io.BytesIO(b"next request")
    app = create_app(service)
    assert call(app, "POST", "/v1/score", stream=stream, CONTENT_LENGTH=length).status == 200
    assert service.calls == [("score", b"")]
    assert stream.tell() == 0


def test_alive_is_not_ready() -> None:
    service = FakeService(is_ready=False)
    app = create_app(service)
    assert json.loads(call(app, "GET", "/healthz").body) == {"status": "ok"}
    answer = call(app, "GET", "/readyz")
    assert (answer.status, answer.error["code"]) == (503, "not_ready")
    service.is_ready = True
    assert call(app, "GET", "/readyz").status == 200


def test_ready_says_that_answers_come_without_the_model() -> None:
    """A load balancer reads the status and goes on sending; a person reads the word."""
    service = FakeService()
    app = create_app(service)
    assert json.loads(call(app, "GET", "/readyz").body) == {"status": "ready"}
    service.is_degraded = True
    answer = call(app, "GET", "/readyz")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "degraded"})


def test_two_apps_in_one_process_keep_to_themselves() -> None:
    first, second = FakeService(), FakeService()
    apps = [create_app(first, max_body_bytes=2), create_app(second, max_body_bytes=4)]
    answers = [call(app, "POST", "/v1/score", body=b"123").status for app in apps]
    assert answers == [413, 200]
    assert (len(first.calls), len(second.calls)) == (0, 1)
