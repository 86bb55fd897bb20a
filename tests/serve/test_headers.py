"""What every answer carries: headers and the request's id."""

import io
from typing import Any, cast

import pytest

from seqfraud.errors import RequestError
from serve.app import ServiceLike, create_app
from serve.headers import headers_for, stamped


class Service:
    """Answers users with `error`, or else well."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def user(self, user: str) -> bytes:
        if self.error is not None:
            raise self.error
        return b"{}"


def headers_of(service: Service, path: str, **environ: str | None) -> dict[str, str]:
    """Those of the answer to GET `path`; None in `environ` is left out."""
    given = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        **{name: value for name, value in environ.items() if value is not None},
    }
    started: list[dict[str, str]] = []
    app: Any = stamped(create_app(cast(ServiceLike, service)))
    b"".join(app(given, lambda status, headers, *_: started.append(dict(headers))))
    return started[0]


@pytest.mark.parametrize("url", ["/healthz", "/v1/labels", "/nope", "/v1/users/a"])
@pytest.mark.parametrize("error", [None, RequestError(422, "invalid_field", "no"), ValueError()])
def test_every_answer_says_what_it_is_and_is_kept_by_nobody(url: str, error: Exception | None) -> None:
    headers = headers_of(Service(error), url)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["content-type"] == "application/json"


def test_a_page_may_do_nothing_unless_it_brings_a_policy() -> None:
    page = [("content-type", "text/html; charset=utf-8")]
    added = dict(headers_for(page))
    assert added["content-security-policy"].split("; ") == [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    assert added["referrer-policy"] == "no-referrer"
    assert "camera=()" in added["permissions-policy"]
    assert added["x-content-type-options"] == "nosniff"
    own = headers_for([*page, ("content-security-policy", "default-src 'self'")])
    assert "content-security-policy" not in dict(own)
    style = headers_for([("content-type", "text/css"), ("cache-control", "max-age=60")])
    assert style == [("x-content-type-options", "nosniff")], "what an answer says itself stays, and is said once"
    assert dict(own)["x-frame-options"] == "DENY"


# ---- request ids


@pytest.mark.parametrize(
    "given", ["a1b2c3d4", "3fa85f64-5717-4562-b3fc-2c963f66afa6", "4bf92f3577b34da6a3ce929d0e0e4736", "x" * 64]
)
def test_a_request_keeps_the_id_it_came_with(given: str) -> None:
    assert headers_of(Service(), "/healthz", HTTP_X_REQUEST_ID=given)["x-request-id"] == given


@pytest.mark.parametrize(
    "given", [None, "", "short", "x" * 65, "has space", "4111111111111111", "a/../../etc", "é" * 10, "ab\ncdefgh"]
)
def test_a_request_without_a_good_id_gets_one(given: str | None) -> None:
    """A number is none: it could be a card's, and ids are logged."""
    made = [headers_of(Service(), "/nope", HTTP_X_REQUEST_ID=given)["x-request-id"] for _ in range(3)]
    assert len(set(made)) == 3
    assert given not in made
    assert all(headers_of(Service(), "/healthz", HTTP_X_REQUEST_ID=one)["x-request-id"] == one for one in made)
