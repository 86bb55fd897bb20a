"""One attempt to deliver one event to the receiver of `[webhook]`: signed, bounded in time, to that address and no other.

Signed by Standard Webhooks 1.0 (https://www.standardwebhooks.com): `webhook-id`, `webhook-timestamp` of the attempt, and
`webhook-signature`, which is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; one per secret of the file, so
that a secret can be replaced while both sides run.
"""

import base64
import binascii
import contextlib
import hmac
import http.client
import ipaddress
import logging
import os
import socket
import ssl
import threading
import time as clock_time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError

import seqfraud
from seqfraud.errors import ConfigError

__all__ = ["Event", "Outcome", "Sender", "WebhookSettings", "read_secrets", "signatures"]

_log = logging.getLogger(__name__)

SECRET_PREFIX = "whsec_"
FEWEST_BYTES, MOST_BYTES = 24, 64
"""Of a secret; Standard Webhooks says so."""
MOST_SECRETS = 4

_LARGEST_ANSWER = 64 * 1024
"""A connection whose answer is longer is closed instead of read to its end."""


@dataclass(frozen=True)
class WebhookSettings:
    """Where alerts go.

    - url: the receiver; https, or http to this machine.
    - secret: file with the signing secret, `whsec_` and base64, one per line where it is being replaced.
    - begin: where a state folder that has never sent anything begins: with what comes after the start, or with its first
      alert.
    - timeout_seconds: for one attempt, all of it.
    - first_delay_seconds, longest_delay_seconds: before the second attempt, and at most; doubled each time, of which a
      random half to the whole is waited.
    - give_up_seconds: after so long an event goes to the dead letters and the next one has its turn.
    - rejected_attempts: so many answers 4xx (but 408 and 429) do the same.
    - ca_file: PEM file of the authorities that the receiver's certificate may be from; empty: the system's.
    - plain_http: http to other machines too.
    """

    url: str
    secret: str
    begin: Literal["now", "beginning"] = "now"
    timeout_seconds: float = 15.0
    first_delay_seconds: float = 1.0
    longest_delay_seconds: float = 300.0
    give_up_seconds: float = 86_400.0
    rejected_attempts: int = 3
    ca_file: str = ""
    plain_http: bool = False

    def __post_init__(self) -> None:
        for name in (
            "timeout_seconds", "first_delay_seconds", "longest_delay_seconds", "give_up_seconds", "rejected_attempts",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        parts = _parts(self.url)
        if parts.scheme == "http" and not self.plain_http and not _is_loopback(parts.hostname or ""):
            raise ValueError("url: plain http to another machine; expected https, or plain_http = true")

    @property
    def origin(self) -> str:
        """Scheme, host and port: what may be shown; a path or a query may hold a token."""
        parts = _parts(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}{'' if parts.port is None else f':{parts.port}'}"


def _parts(url: str) -> SplitResult:
    """The parts of a receiver's address. Raises ValueError that does not repeat it, for it may hold a token."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("url: not an address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("url: expected https://HOST[:PORT][/PATH]")
    if parts.username is not None or parts.password is not None or parts.fragment or port == 0:
        raise ValueError("url: expected no user, password or fragment, and a port above 0")
    if not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise ValueError("url: expected ASCII without spaces; percent-encode the rest")
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_secrets(path: Path) -> list[bytes]:
    """The signing secrets in a file, the newest first as they stand there.

    Raises ConfigError where there is none, where others may read it, or where one is not a secret.
    """
    how = f"make one with: (umask 077; echo {SECRET_PREFIX}$(openssl rand -base64 32) > {path})"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(4096).decode("ascii", "replace").split()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such webhook secret; {how}") from None
    except OSError as error:
        raise ConfigError(f"{path}: the webhook secret cannot be read: {error.strerror}") from error
    if mode & 0o027:
        raise ConfigError(f"{path}: mode {mode & 0o777:04o}: others may read the webhook secret; chmod 600 {path}")
    if mode & 0o040:
        _log.warning("%s: the file's group may read the webhook secret", path)
    if not 1 <= len(lines) <= MOST_SECRETS:
        raise ConfigError(f"{path}: {len(lines)} lines; expected 1 to {MOST_SECRETS} webhook secrets; {how}")
    secrets = []
    for number, line in enumerate(lines, start=1):
        try:
            secret = base64.b64decode(line.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            secret = b""
        if not line.startswith(SECRET_PREFIX) or not FEWEST_BYTES <= len(secret) <= MOST_BYTES:
            raise ConfigError(
                f"{path}: line {number} is no webhook secret; expected {SECRET_PREFIX} and the base64 of {FEWEST_BYTES} "
                f"to {MOST_BYTES} bytes; {how}"
            )
        secrets.append(secret)
    return secrets


def signatures(secrets: list[bytes], identity: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` of a message sent at `timestamp`, in seconds."""
    signed = b"%s.%d.%s" % (identity.encode("ascii"), timestamp, body)
    return " ".join(f"v1,{base64.b64encode(hmac.digest(secret, signed, 'sha256')).decode()}" for secret in secrets)


@dataclass(frozen=True, slots=True)
class Event:
    """What is delivered: the same bytes under the same id at every attempt."""

    seq: int
    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt.

    Attributes:
        status: of the answer, None where there was none.
        words: why it was no success; nothing of the answer's body or of the address's path.
        retry_after: seconds that the receiver asks to wait.
    """

    status: int | None
    words: str = ""
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """The receiver has it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def rejected(self) -> bool:
        """The receiver will not take this one, however often it is sent."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)

    @property
    def gone(self) -> bool:
        """The receiver wants nothing any more."""
        return self.status == 410


class Sender:
    """One connection to the receiver, kept open between events. Straight to it: no proxy, no redirect.

    `send` is for one thread, `stop` for any.
    """

    def __init__(self, settings: WebhookSettings, clock: Callable[[], float] = clock_time.time) -> None:
        """Reads the secret. Raises ConfigError."""
        self._settings = settings
        self._clock = clock
        self._secrets = read_secrets(Path(settings.secret))
        parts = _parts(settings.url)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.hostname or ""
        self._connection: HTTPConnection
        if parts.scheme == "https":
            self._connection = HTTPSConnection(
                host, parts.port, timeout=settings.timeout_seconds, ssl_context=_tls(settings.ca_file)
            )
        else:
            self._connection = HTTPConnection(host, parts.port, timeout=settings.timeout_seconds)
        self._stopped = False

    def send(self, event: Event) -> Outcome:
        """One attempt; what may go wrong with it is in the outcome."""
        late = threading.Event()
        watch = threading.Timer(self._settings.timeout_seconds, self._cut_off, [late])
        watch.daemon = True
        watch.start()
        try:
            return self._send(event)
        except (OSError, HTTPError, http.client.HTTPException) as error:
            self._connection.close()
            if self._stopped:
                return Outcome(None, "the service stopped")
            return Outcome(None, self._words(error, late.is_set()))
        finally:
            watch.cancel()

    def _send(self, event: Event) -> Outcome:
        connection = self._connection
        if not connection.is_closed and not connection.is_connected:
            connection.close()  # by the receiver, since the last event
        now = self._clock()
        headers = {
            "content-type": "application/json",
            "user-agent": f"seqfraud/{seqfraud.__version__}",
            "webhook-id": event.id,
            "webhook-timestamp": str(int(now)),
            "webhook-signature": signatures(self._secrets, event.id, int(now), event.body),
        }
        connection.request("POST", self._target, event.body, headers, preload_content=False, decode_content=False)
        response = connection.getresponse()
        retry_after = _seconds(response.headers.get("retry-after"), now)
        outcome = Outcome(response.status, "", retry_after)
        if not outcome.delivered:
            outcome = Outcome(response.status, f"status {response.status}", retry_after)
        try:
            rest = response.read(_LARGEST_ANSWER)
        except (OSError, HTTPError, http.client.HTTPException):
            rest = b""
            connection.close()  # the status counts
        if len(rest) == _LARGEST_ANSWER or response.headers.get("connection", "").lower() == "close":
            connection.close()
        return outcome

    def stop(self) -> None:
        """End an attempt that is being made, and all that come."""
        self._stopped = True
        self._cut_off(threading.Event())

    def _cut_off(self, late: threading.Event) -> None:
        """A socket's own timeout begins anew with every byte."""
        late.set()
        held = self._connection.sock
        if held is not None:
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def _words(self, error: Exception, late: bool) -> str:
        cause = error if isinstance(error, OSError) else error.__cause__
        if late or isinstance(cause, TimeoutError):
            return f"no answer within {self._settings.timeout_seconds:g} s"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"TLS: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return f"TLS: {error.reason or 'failed'}"
        if isinstance(error, NameResolutionError):
            return "the receiver's name cannot be resolved"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        return "the connection was closed without an answer" if _is_closing(error) else "the answer is no HTTP"


def _is_closing(error: Exception) -> bool:
    return isinstance(error, ConnectionError | http.client.RemoteDisconnected)


def _tls(ca_file: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"webhook.ca_file: {ca_file}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _seconds(retry_after: str | None, now: float) -> float | None:
    """Seconds from now that the header `Retry-After` asks for; None where it says nothing that can be understood."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)
