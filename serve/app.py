"""The HTTP edge: a plain WSGI callable over a scoring service.

`create_app` takes its dependency, reads no environment and starts nothing. Hug routes; a handler
reads the body, calls the service and returns the answer's bytes. What a client did wrong, an
unknown address, a wrong method and a crash all answer in one shape:
`{"error": {"code": ..., "message": ..., "field": ...}}`.

Identifiers in a path (`/v1/transactions/{id}`, `/v1/users/{user}`) are percent-encoded UTF-8 and
may hold spaces, `%` and slashes; a trailing slash belongs to them. WSGI hands out the decoded path
only, hence the limits: an encoded slash and a plain one are the same, and an identifier that is
empty or ends with one of `_ID_SUFFIXES` has no address.

A route says whom it is for where it is declared; its key is asked for before its body is read.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs, quote_from_bytes, unquote_to_bytes
from wsgiref.types import InputStream, StartResponse, WSGIApplication, WSGIEnvironment

from seqfraud.errors import RequestError
from serve.answers import refusal_body
from serve.description import Description
from serve.desk import Desk
from serve.engine import Engine
from serve.hug_compat import falcon, hug
from serve.keys import Keyring
from serve.limits import RateLimiter
from serve.metrics import CONTENT_TYPE
from serve.openapi import ROLES
from serve.pages import Page, Text
from serve.records import ANONYMOUS

__all__ = ["DEFAULT_MAX_BODY_BYTES", "ServiceLike", "create_app"]

DEFAULT_MAX_BODY_BYTES = 4 * 1024 * 1024

_DISCARDED_BODIES = 16
_DISCARD_BYTES = 256 * 1024

_ID_PREFIXES = ("/v1/transactions/", "/v1/users/", "/v1/alerts/")
_ID_SUFFIXES = ("/explanation",)
_ID_PATH = re.compile(f"({'|'.join(_ID_PREFIXES)})(.+?)({'|'.join(_ID_SUFFIXES)})?", re.DOTALL)

_METHODS = frozenset(falcon.COMBINED_METHODS)
_JSON_TYPES = frozenset({"application/json", "application/json; charset=utf-8", "application/json;charset=utf-8"})
"""What nearly every client sends; other spellings cost a search."""
_JSON_TYPE = re.compile(
    r"\s*application/(?:[\w.!#$&^-]+\+)?json\s*(?:;\s*charset\s*=\s*(?P<quote>\"?)utf-?8(?P=quote)\s*)?;?\s*",
    re.IGNORECASE | re.ASCII,
)

_log = logging.getLogger(__name__)

_Handler = TypeVar("_Handler", bound=Callable[..., bytes | Text])


class ServiceLike(Protocol):
    """What the edge needs: JSON bytes in, JSON bytes out, called from several threads at a time.

    `engine` is that of the bundle in force: the description of the API is made from it when it is first asked for.
    Every method raises `RequestError` for what it refuses; anything else is a bug, and a 500.
    """

    engine: Engine
    desk: Desk

    def score(self, body: bytes) -> bytes:
        """One transaction (a JSON object) -> its answer."""

    def score_batch(self, body: bytes) -> bytes:
        """A JSON array of transactions -> `{"results": [...]}`, in order."""

    def add_labels(self, body: bytes, author: str) -> bytes:
        """A JSON array of labels -> how many were new, changed, unknown."""

    def transaction(self, transaction_id: str) -> bytes:
        """The answer as it was given, and the labels said since."""

    def explanation(self, transaction_id: str) -> bytes:
        """What its score is made of."""

    def user(self, user: str) -> bytes:
        """The recent events of a user with scores and decisions."""

    def alerts(self, query: str) -> bytes:
        """Some alerts by the parameters of a query string."""

    def alert(self, transaction_id: str) -> bytes:
        """An alert with its whole life."""

    def change_alert(self, transaction_id: str, body: bytes, author: str) -> bytes:
        """Change an alert's state -> the alert."""

    def outbox(self) -> bytes:
        """How far alerts have come on their way to the webhook."""

    def settle_dead_letter(self, seq: str, body: bytes, author: str) -> bytes:
        """Try an event that was given up once more, or let it go -> the outbox."""

    def model(self) -> bytes:
        """The bundle in force and the challengers in shadow."""

    def change_model(self, body: bytes, author: str) -> bytes:
        """Promote, roll back, begin or end a challenge -> as `model`, when it is done."""

    def ready(self) -> bool:
        """Whether a transaction posted now would get an answer."""

    def degraded(self) -> bool:
        """Whether that answer would be the fallback's."""

    def metrics(self) -> bytes:
        """What it measures, as Prometheus reads it."""


def create_app(
    service: ServiceLike,
    *,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    keys: Keyring | None = None,
    limiter: RateLimiter | None = None,
) -> WSGIApplication:
    """The WSGI application over `service`. Two apps in one process share no routes.

    Without `keys` everybody may do everything; `limiter` counts by key, or by address without. What the application finds out about a request is in
    its environ afterwards: `seqfraud.route` and `seqfraud.key`.
    """
    api = hug.API(None, name="seqfraud")  # None: an API of its own, not the one of a module
    route = functools.partial(_route, api, keys, limiter)
    description = Description(max_body_bytes, keys_required=keys is not None)

    @route("POST", "/v1/score")
    def score(request: Any) -> bytes:
        return service.score(_read_json(request.env, max_body_bytes))

    @route("POST", "/v1/score/batch")
    def score_batch(request: Any) -> bytes:
        return service.score_batch(_read_json(request.env, max_body_bytes))

    @route("POST", "/v1/labels")
    def add_labels(request: Any) -> bytes:
        return service.add_labels(_read_json(request.env, max_body_bytes), _author(request))

    @route("GET", "/v1/transactions/{transaction_id}")
    def transaction(request: Any, transaction_id: str) -> bytes:
        return service.transaction(_identifier(transaction_id))

    @route("GET", "/v1/transactions/{transaction_id}/explanation")
    def explanation(request: Any, transaction_id: str) -> bytes:
        return service.explanation(_identifier(transaction_id))

    @route("GET", "/v1/users/{user}")
    def user(request: Any, user: str) -> bytes:
        return service.user(_identifier(user))

    @route("GET", "/v1/alerts")
    def alerts(request: Any) -> bytes:
        return service.alerts(request.env["QUERY_STRING"])

    @route("GET", "/v1/alerts/{transaction_id}")
    def alert(request: Any, transaction_id: str) -> bytes:
        return service.alert(_identifier(transaction_id))

    @route("POST", "/v1/alerts/{transaction_id}")
    def change_alert(request: Any, transaction_id: str) -> bytes:
        body = _read_json(request.env, max_body_bytes)
        return service.change_alert(_identifier(transaction_id), body, _author(request))

    @route("GET", "/v1/outbox")
    def outbox(request: Any) -> bytes:
        return service.outbox()

    @route("POST", "/v1/outbox/dead/{seq}")
    def settle_dead_letter(request: Any, seq: str) -> bytes:
        return service.settle_dead_letter(seq, _read_json(request.env, max_body_bytes), _author(request))

    @route("GET", "/v1/model")
    def model(request: Any) -> bytes:
        return service.model()

    @route("POST", "/v1/model")
    def change_model(request: Any) -> bytes:
        return service.change_model(_read_json(request.env, max_body_bytes), _author(request))

    @route("GET", "/v1/rules")
    def rules(request: Any) -> bytes:
        return service.desk.rules()

    @route("POST", "/v1/rules/test")
    def test_rule(request: Any) -> bytes:
        return service.desk.test_rule(_read_json(request.env, max_body_bytes))

    @route("GET", "/v1/rules/{name}")
    def rule(request: Any, name: str) -> bytes:
        return service.desk.rule(name)

    @route("PUT", "/v1/rules/{name}")
    def put_rule(request: Any, name: str) -> bytes:
        return service.desk.put_rule(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("DELETE", "/v1/rules/{name}")
    def delete_rule(request: Any, name: str) -> bytes:
        return service.desk.delete_rule(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("GET", "/v1/rules/{name}/history")
    def rule_history(request: Any, name: str) -> bytes:
        return service.desk.rule_history(name)

    @route("GET", "/v1/lists")
    def lists(request: Any) -> bytes:
        return service.desk.lists()

    @route("GET", "/v1/lists/{name}")
    def show_list(request: Any, name: str) -> bytes:
        return service.desk.list(name, _offset(request.env))

    @route("PUT", "/v1/lists/{name}")
    def put_list(request: Any, name: str) -> bytes:
        return service.desk.put_list(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("DELETE", "/v1/lists/{name}")
    def delete_list(request: Any, name: str) -> bytes:
        return service.desk.delete_list(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("POST", "/v1/lists/{name}/entries")
    def add_entries(request: Any, name: str) -> bytes:
        return service.desk.add_entries(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("DELETE", "/v1/lists/{name}/entries")
    def remove_entries(request: Any, name: str) -> bytes:
        return service.desk.remove_entries(name, _read_json(request.env, max_body_bytes), _author(request))

    @route("GET", "/v1/lists/{name}/history")
    def list_history(request: Any, name: str) -> bytes:
        return service.desk.list_history(name)

    @route("GET", "/healthz")
    def healthz(request: Any) -> bytes:
        return b'{"status":"ok"}'

    @route("GET", "/readyz")
    def readyz(request: Any) -> bytes:
        if not service.ready():
            raise RequestError(503, "not_ready", "the service is not ready to score yet; ask again")
        return b'{"status":"degraded"}' if service.degraded() else b'{"status":"ready"}'

    @route("GET", "/metrics")
    def metrics(request: Any) -> Text:
        return Text(service.metrics(), CONTENT_TYPE)

    @route("GET", "/openapi.json")
    def openapi(request: Any) -> Page:
        return description.of(service.engine).document

    @route("GET", "/docs")
    def docs(request: Any) -> Page:
        return description.of(service.engine).page

    @route("GET", "/docs/style.css")
    def style(request: Any) -> Page:
        return description.of(service.engine).style

    return _finish(api)


class _RawHTTP(hug.interface.HTTP):  # type: ignore[misc]
    """Hug's interface without its parsing: the raw request in, the answer's bytes out, or a page.

    Measured per request around a constant handler: Hug's default body 15.7 us, `parse_body=False`
    with an output function 8.5, this 3.7. It also keeps Hug from turning a body's keys or the query
    into arguments.
    """

    def __init__(self, route: Any, function: Callable[..., bytes | Text], catch_exceptions: bool) -> None:
        super().__init__(route, function, catch_exceptions)
        self._handler = function

    def __call__(self, request: Any, response: Any, **params: str) -> None:
        answer = self._handler(request, **params)
        if isinstance(answer, bytes):
            response.data = answer
        else:
            answer.put(request, response)


class _RawRouter(hug.routing.URLRouter):  # type: ignore[misc]
    """Hug's router, making `_RawHTTP` interfaces."""

    def _create_interface(
        self,
        api: Any,
        api_function: Callable[..., bytes | Text],
        catch_exceptions: bool = True,
    ) -> tuple[_RawHTTP, Callable[..., bytes | Text]]:
        return _RawHTTP(self.route, api_function, catch_exceptions), api_function


def _route(
    api: Any, keys: Keyring | None, limiter: RateLimiter | None, method: str, url: str
) -> Callable[[_Handler], Callable[..., bytes | Text]]:
    """Declares a route for whoever has one of its roles."""
    roles = ROLES[method, url]
    accept = ("GET", "HEAD") if method == "GET" else method
    router = _RawRouter(url, accept=accept, api=api)

    def declare(handler: _Handler) -> Callable[..., bytes | Text]:
        def answer(request: Any, **params: str) -> bytes | Text:
            environ = request.env
            environ["seqfraud.route"] = url
            if keys is not None and roles:
                keys.admit(environ, roles)
            if limiter is not None and roles:
                limiter.require(environ.get("seqfraud.key") or environ["REMOTE_ADDR"], time.monotonic())
            return handler(request, **params)

        answered: Callable[..., bytes | Text] = router(answer)
        return answered

    return declare


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
        if (method := environ["REQUEST_METHOD"]) not in _METHODS:
            # Falcon would call a method that it does not know a bad request, and not say which are taken
            environ["REQUEST_METHOD"] = "TRACE"
        body: Iterable[bytes] = routed(environ, start_response)
        environ["REQUEST_METHOD"] = method
        return body

    return application


def _offset(environ: WSGIEnvironment) -> int:
    """`offset` of the query; 0 where it is not there. Raises RequestError 422."""
    text = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).get("offset", ["0"])[-1]
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise RequestError(422, "invalid_field", f"offset: {text!r:.60}; expected a number of entries", "offset")
    return int(text)


def _author(request: Any) -> str:
    """Who does what a request asks for: the id of its key."""
    author: str = request.env.get("seqfraud.key", ANONYMOUS)
    return author


def _read_json(environ: WSGIEnvironment, limit: int) -> bytes:
    """The body of a request that says that it is JSON, or a refusal.

    A request without a content type is refused too: a page in a browser may send one to any address without asking, from
    a `Blob`, but not one that says `application/json`.
    """
    body = _read_body(environ, limit)
    content_type = environ.get("CONTENT_TYPE", "")
    if content_type not in _JSON_TYPES and _JSON_TYPE.fullmatch(content_type) is None:
        seen = f"{content_type!r:.80}" if content_type else "no content type"
        raise _unsupported(f"{seen}; send JSON in UTF-8 with the header Content-Type: application/json")
    if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise _unsupported("the body is compressed; send it as it is, without Content-Encoding")
    if environ.get("HTTP_TRANSFER_ENCODING", "chunked").lower() != "chunked":
        raise _unsupported("the body is encoded for transfer; send it as it is, or in chunks")
    return body


def _unsupported(message: str) -> RequestError:
    return RequestError(415, "unsupported_media_type", message)


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
    if error.status == 401:
        response.set_header("WWW-Authenticate", 'Bearer realm="seqfraud"')
    response.status = falcon.get_http_status(error.status)
    if error.retry_after is not None:
        response.set_header("Retry-After", str(error.retry_after))
    response.data = refusal_body(error.code, error.message, error.field)


def _answer_http_error(request: Any, response: Any, error: Any, params: object) -> None:
    """Falcon's own refusals: no such address, no such method here."""
    response.status = error.status
    request.env["seqfraud.route"] = request.uri_template
    if error.headers is not None:
        response.set_headers(error.headers)
    code = error.status[4:].lower().replace(" ", "_")
    response.data = refusal_body(code, _EXPLANATIONS.get(code, error.status))


_EXPLANATIONS = {
    "not_found": "there is nothing at this address",
    "method_not_allowed": "this address does not take this method; see the Allow header",
}


def _answer_crash(request: Any, response: Any, error: Exception, params: object) -> None:
    # The route, not the path: a path names users.
    noted = {"request_id": request.env.get("seqfraud.request_id")}
    _log.error("%s %s failed", request.method, request.uri_template, exc_info=error, extra=noted)
    response.status = falcon.HTTP_500
    response.data = refusal_body("internal", "the service failed; its log has the reason")
