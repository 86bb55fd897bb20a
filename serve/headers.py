"""What every answer carries: headers so that a browser takes it for nothing else, and the request's id.

A request keeps the id that it came with, if that is one that may be logged, else it gets one; its answer and its lines in
the log have it.
"""

import itertools
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["headers_for", "stamped"]

_Headers = list[tuple[str, str]]

_NO_SNIFFING = ("x-content-type-options", "nosniff")
_API: _Headers = [_NO_SNIFFING, ("cache-control", "no-store")]
_FEATURES = (
    "camera",
    "display-capture",
    "fullscreen",
    "geolocation",
    "microphone",
    "payment",
    "publickey-credentials-get",
)
_POLICY = "content-security-policy"
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE: _Headers = [
    _NO_SNIFFING,
    ("cache-control", "no-cache"),
    ("referrer-policy", "no-referrer"),
    ("permissions-policy", ", ".join(f"{feature}=()" for feature in _FEATURES)),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("x-frame-options", "DENY"),
    (_POLICY, _NOTHING),
]


_NAMES = frozenset(name for name, _ in _PAGE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")


def stamped(app: WSGIApplication) -> WSGIApplication:
    """`app` with these headers on all that it answers, and the request's id in `seqfraud.request_id` of its environ."""
    # Unique among processes too, and no clue to how many requests others make: both start at random.
    prefix, numbers = secrets.token_hex(6), itertools.count(secrets.randbits(40))

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request_id = _request_id(environ) or f"{prefix}{next(numbers):012x}"
        environ["seqfraud.request_id"] = request_id
        return app(environ, _Start(start_response, request_id))

    return application


class _Start:
    """A `start_response` that adds the headers.

    A class: the annotations of a nested function would be evaluated for each request.
    """

    __slots__ = ("_inner", "_request_id")

    def __init__(self, inner: StartResponse, request_id: str) -> None:
        self._inner = inner
        self._request_id = request_id

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        headers += headers_for(headers)
        headers.append(("x-request-id", self._request_id))
        return self._inner(status, headers)


def _request_id(environ: WSGIEnvironment) -> str | None:
    """The id that the client gives, if it is one that may be logged: short, one word, not a number such as a card's."""
    given: str | None = environ.get("HTTP_X_REQUEST_ID")
    return given if given is not None and _REQUEST_ID.fullmatch(given) and not given.isdigit() else None


def headers_for(headers: _Headers) -> _Headers:
    """What is added to an answer with `headers`, whose names are in lower case; what it has itself stays.

    A page that brings no policy of its own may load and run nothing, not even what stands in it.
    """
    added = _API
    has_own = False
    for name, value in headers:
        if name == "content-type":
            if value.startswith("text/html"):
                added = _PAGE
        elif name in _NAMES:
            has_own = True
    if has_own:
        own = {name for name, _ in headers}
        return [header for header in added if header[0] not in own]
    return added
