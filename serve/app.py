"""The HTTP edge: a plain WSGI callable over a scoring service.

`create_app` takes its dependency, reads no environment and starts nothing. Hug routes; a handler
reads the body, calls the service and returns the answer's bytes. What a client did wrong, an
unknown address, a wrong method and a crash all answer in one shape:
`{"error": {"code": ..., "message": ..., "field": ...}}`.

Identifiers in a path (`/v1/transactions/{id}`, `/v1/users/{user}`) are percent-encoded UTF-8 and
may hold spaces, `%` and slashes; a trailing slash belongs to them. WSGI hands out the decoded path
only, hence the limits: an encoded slash and a plain one are the same, and an identifier that is
empty or ends with one of `_ID_SUFFIXES` has no address.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes
from wsgiref.types import InputStream, StartResponse, WSGIApplication, WSGIEnvironment

from seqfraud.errors import RequestError
from serve.hug_compat import falcon, hug

__all__ = ["DEFAULT_MAX_BODY_BYTES", "ServiceLike", "create_app"]

DEFAULT_MAX_BODY_BYTES = 4 * 1024 * 1024

_DISCARDED_BODIES = 16
_DISCARD_BYTES = 256 * 1024

_ID_PREFIXES = ("/v1/transactions/", "/v1/users/")
_ID_SUFFIXES = ("/explanation",)
_ID_PATH = re.compile(f"({'|'.join(_ID_PREFIXES)})(.+?)({'|'.join(_ID_SUFFIXES)})?", re.DOTALL)

_log = logging.getLogger(__name__)

_Handler = TypeVar("_Handler", bound=Callable[..., bytes])


class ServiceLike(Protocol):
    """What the edge needs: JSON bytes in, JSON bytes out, called from several threads at a time.

    Every method raises `RequestError` for what it refuses; anything else is a bug, and a 500.
    """

    def score(self, body: bytes) -> bytes:
        """One transaction (a JSON object) -> its answer."""

    def score_batch(self, body: bytes) -> bytes:
        """A JSON array of transactions -> `{"results": [...]}`, in order."""

    def add_labels(self, body: bytes) -> bytes:
        """A JSON array of labels -> how many were new, changed, unknown."""

    def transaction(self, transaction_id: str) -> bytes:
        """The answer as it was given."""

    def user(self, user: str) -> bytes:
        """The recent events of a user with scores and decisions."""

    def model(self) -> bytes:
        """The bundle in force and the challengers in shadow."""

    def ready(self) -> bool:
        """Whether a transaction posted now would be scored."""


def create_app(
    service: ServiceLike,
    *,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> WSGIApplication:
    """The WSGI application over `service`. Two apps in one process share no routes."""
    api = hug.API(None, name="seqfraud")  # None: an API of its own, not the one of a module

    @_route(api, "POST", "/v1/score")
    def score(request: Any) -> bytes:
        return service.score(_read_body(request.env, max_body_bytes))

    @_route(api, "POST", "/v1/score/batch")
    def score_batch(request: Any) -> bytes:
        return service.score_batch(_read_body(request.env, max_body_bytes))

    @_route(api, "POST", "/v1/labels")
    def add_labels(request: Any) -> bytes:
        return service.add_labels(_read_body(request.env, max_body_bytes))

    @_route(api, "GET", "/v1/transactions/{transaction_id}")
    def transaction(request: Any, transaction_id: str) -> bytes:
        return service.transaction(_identifier(transaction_id))

    @_route(api, "GET", "/v1/users/{user}")
    def user(request: Any, user: str) -> bytes:
        return service.user(_identifier(user))

    @_route(api, "GET", "/v1/model")
    def model(request: Any) -> bytes:
        return service.model()

    @_route(api, "GET", "/healthz")
    def healthz(request: Any) -> bytes:
        return b'{"status":"ok"}'

    @_route(api, "GET", "/readyz")
    def readyz(request: Any) -> bytes:
        if not service.ready():
            raise RequestError(503, "not_ready", "the service is not ready to score yet; ask again")
        return b'{"status":"ready"}'

    return _finish(api)


class _RawHTTP(hug.interface.HTTP):  # type: ignore[misc]
    """Hug's interface without its parsing: the raw request in, the answer's bytes out.

    Measured per request around a constant handler: Hug's default body 15.7 us, `parse_body=False`
    with an output function 8.5, this 3.7. It also keeps Hug from turning a body's keys or the query
    into arguments.
    """

    def __init__(self, route: Any, function: Callable[..., bytes], catch_exceptions: bool) -> None:
        super().__init__(route, function, catch_exceptions)
        self._handler = function

    def __call__(self, request: Any, response: Any, **params: str) -> None:
        response.data = self._handler(request, **params)


class _RawRouter(hug.routing.URLRouter):  # type: ignore[misc]
    """Hug's router, making `_RawHTTP` interfaces."""

    def _create_interface(
        self,
        api: Any,
        api_function: Callable[..., bytes],
        catch_exceptions: bool = True,
    ) -> tuple[_RawHTTP, Callable[..., bytes]]:
        return _RawHTTP(self.route, api_function, catch_exceptions), api_function


def _route(api: Any, method: str, url: str) -> Callable[[_Handler], _Handler]:
    accept = ("GET", "HEAD") if method == "GET" else method
    router: Callable[[_Handler], _Handler] = _RawRouter(url, accept=accept, api=api)
    return router


def _finish(api: Any) -> WSGIApplication:
    """The routes of `api` as one WSGI callable, with our errors instead of Hug's."""
    # Hug compares the set it gathered here to the tuple (None,), never finds them equal, and so
    # would answer at /v{anything}/v1/score too.
    api.http.versions = (None,)
    routed = api.http.server(None)  # None: an unknown address is a 404, not the documentation
    # Falcon asks the handlers in reverse order of registration.
    routed.add_error_handler(Exception, _answer_crash)
    routed.add_error_handler(falcon.HTTPError, _answer_http_error)
    routed.add_error_handler(RequestError, _answer_refusal)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith(_ID_PREFIXES):
            environ["PATH_INFO"] = _quote_identifier(environ["PATH_INFO"])
        body: Iterable[bytes] = routed(environ, start_response)
        return body

    return application


def _read_body(environ: WSGIEnvironment, limit: int) -> bytes:
    """The whole body, or a refusal: longer than `limit` bytes, or cut off by the client.

    A chunked body has no length: it is read where the server says that it ends the stream itself
    (granian does). One cut off in the middle looks complete; it is then no JSON array or object,
    which is all the service takes.
    """
    stream: InputStream = environ["wsgi.input"]
    length = _declared_length(environ)
    if length is None:
        body = stream.read(limit + 1) if environ.get("wsgi.input_terminated") else b""
        if len(body) > limit:
            _discard(stream, _DISCARDED_BODIES * limit)
            raise _too_large(limit)
        return body
    if length > limit:
        _discard(stream, min(length, _DISCARDED_BODIES * limit))
        raise _too_large(limit)
    body = stream.read(length)
    if len(body) != length:
        message = f"expected {length} bytes of body, received {len(body)}"
        raise RequestError(400, "incomplete_body", message)
    return body


def _declared_length(environ: WSGIEnvironment) -> int | None:
    """The body's length where the request says it reliably: a number, and no other framing."""
    text = environ.get("CONTENT_LENGTH", "")
    if "HTTP_TRANSFER_ENCODING" in environ or not (text.isascii() and text.isdigit()):
        return None
    return int(text)


def _discard(stream: InputStream, length: int) -> None:
    """Reads up to `length` bytes of a body that is refused.

    Most clients write all of it before they read an answer: for them the connection would break and
    the reason be lost.
    """
    while length > 0 and (dropped := stream.read(min(length, _DISCARD_BYTES))):
        length -= len(dropped)


def _too_large(limit: int) -> RequestError:
    message = f"the body is larger than {limit} bytes; send smaller batches"
    return RequestError(413, "payload_too_large", message)


def _quote_identifier(path: str) -> str:
    """`path` with its identifier quoted again: it routes as one segment and is decoded strictly."""
    match = _ID_PATH.fullmatch(path)
    if match is None:
        return path
    prefix, identifier, suffix = match.groups("")
    return prefix + quote_from_bytes(identifier.encode("latin-1"), safe="") + suffix


def _identifier(quoted: str) -> str:
    try:
        return unquote_to_bytes(quoted).decode()
    except UnicodeDecodeError:
        message = "the identifier in the path is not percent-encoded UTF-8"
        raise RequestError(400, "bad_path", message) from None


def _answer_refusal(request: Any, response: Any, error: RequestError, params: object) -> None:
    response.status = falcon.get_http_status(error.status)
    if error.retry_after is not None:
        response.set_header("Retry-After", str(error.retry_after))
    response.data = _error_body(error.code, error.message, error.field)


def _answer_http_error(request: Any, response: Any, error: Any, params: object) -> None:
    """Falcon's own refusals: no such address, no such method here."""
    response.status = error.status
    if error.headers is not None:
        response.set_headers(error.headers)
    code = error.status[4:].lower().replace(" ", "_")
    response.data = _error_body(code, _EXPLANATIONS.get(code, error.status), "")


_EXPLANATIONS = {
    "not_found": "there is nothing at this address",
    "method_not_allowed": "this address does not take this method; see the Allow header",
    "bad_request": "unknown HTTP method",
}


def _answer_crash(request: Any, response: Any, error: Exception, params: object) -> None:
    # The route, not the path: a path names users.
    _log.error("%s %s failed", request.method, request.uri_template, exc_info=error)
    response.status = falcon.HTTP_500
    response.data = _error_body("internal", "the service failed; its log has the reason", "")


def _error_body(code: str, message: str, field: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "field": field}}).encode()
