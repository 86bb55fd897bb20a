"""API keys: who may ask what; kept as hashes in a file that can change while the service runs.

A key is `sfk_<id>_<secret>` with 256 random bits of secret. The file holds the SHA-256 of the whole key. A slow,
salted hash protects passwords, which can be guessed; nobody guesses 256 random bits, and a slow hash on every request
would be a way to keep the service busy. The hash also ties the secret to the id, so no key answers to another's name.

Looking up by id tells nobody which ids exist: an unknown one is compared too, with the hash of no key, and every key that
is not in force gets the same answer.
"""

import hmac
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args
from wsgiref.types import WSGIEnvironment

import msgspec

from seqfraud.config import parse_instant
from seqfraud.errors import ConfigError, RequestError
from seqfraud.files import locked_folder, replaced_file

__all__ = [
    "ADMIN",
    "LABEL",
    "METRICS",
    "OPEN",
    "SCORE",
    "Key",
    "KeySettings",
    "Keyring",
    "Role",
    "Roles",
    "add_key",
    "key_from",
    "read_keys",
    "revoke_key",
]

Role = Literal["score", "label", "metrics", "admin"]
Roles = frozenset[Role]
"""Whom a route is for; admin is always among them, or nobody needs a key (`OPEN`)."""

OPEN: Roles = frozenset()
ADMIN: Roles = frozenset({"admin"})
SCORE: Roles = frozenset({"score", "admin"})
LABEL: Roles = frozenset({"label", "admin"})
METRICS: Roles = frozenset({"metrics", "admin"})

LOOK_SECONDS = 1.0
"""How often the file is looked at; a revoked key is refused after that at the latest."""
ENVIRONMENT = "SEQFRAUD_API_KEY"

_PREFIX = "sfk_"
_ID_BYTES, _SECRET_BYTES = 6, 32
_ID_END = len(_PREFIX) + 2 * _ID_BYTES
_KEY_LENGTH = _ID_END + 1 + 2 * _SECRET_BYTES
_KEY = re.compile(f"{_PREFIX}[0-9a-f]{{{2 * _ID_BYTES}}}_[0-9a-f]{{{2 * _SECRET_BYTES}}}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeySettings:
    """Who may use the service.

    - file: the keys, as `seqfraud keys add` writes them; "" for none.
    - without: listen on other addresses than loopback though there are no keys.
    """

    file: str = ""
    without: bool = False


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key as the file holds it; times are ISO 8601."""

    id: str
    roles: list[Role]
    sha256: str
    created: str
    expires: str | None = None
    revoked: str | None = None
    note: str = ""

    def state(self, now: float) -> str:
        """What it is at `now` seconds since the epoch: in force, revoked or expired."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and parse_instant(self.expires) <= now * 1000 else "in force"


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal[1]
    keys: list[Key]


# ---- the file


def read_keys(path: Path) -> list[Key]:
    """Every key of a file, revoked ones too. Raises ConfigError that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; `seqfraud keys add` makes one") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path}: others than its owner may write it, and so give themselves keys; chmod go-w {path}")
    try:
        keys = msgspec.json.decode(content, type=_KeyFile).keys
        for key in keys:
            _check(key)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: not a file of keys: {error}") from error
    if len({key.id for key in keys}) != len(keys):
        raise ConfigError(f"{path}: an id is there twice; expected each once")
    return keys


def _check(key: Key) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
        raise ValueError(f"key {key.id!r}: sha256: expected 64 hexadecimal digits")
    if not key.roles:
        raise ValueError(f"key {key.id!r}: roles: expected at least one of {', '.join(get_args(Role))}")
    if key.expires is not None:
        parse_instant(key.expires)


def add_key(path: Path, roles: list[str], now: float, expires: str | None = None, note: str = "") -> tuple[Key, str]:
    """Add a key to a file, which is made if it is not there: what is stored, and the key itself, which is not."""
    known = [role for role in get_args(Role) if role in roles]
    unknown = set(roles).difference(known)
    if unknown or not known:
        raise ConfigError(f"--role: {min(unknown, default='')!r} is not one of {', '.join(get_args(Role))}")
    identity = secrets.token_hex(_ID_BYTES)
    text = f"{_PREFIX}{identity}_{secrets.token_hex(_SECRET_BYTES)}"
    key = Key(identity, known, sha256(text.encode()).hexdigest(), _iso(now), expires, note=note)
    if expires is not None and key.state(now) == "expired":
        raise ConfigError(f"--expires: {expires!r} is past")
    with _alone(path):
        _write(path, [*(read_keys(path) if path.exists() else []), key])
    return key, text


def revoke_key(path: Path, identity: str, now: float) -> None:
    """Mark a key as revoked; it stays in the file, for whoever asks later. Raises ConfigError for an unknown id."""
    with _alone(path):
        keys = read_keys(path)
        if identity not in {key.id for key in keys}:
            raise ConfigError(f"{path}: there is no key {identity!r}; see `seqfraud keys list`")
        revoked = [
            msgspec.structs.replace(key, revoked=key.revoked or _iso(now)) if key.id == identity else key
            for key in keys
        ]
        _write(path, revoked)


def _alone(path: Path) -> AbstractContextManager[None]:
    """One writer of the file at a time: two that add a key at once would lose one."""
    return locked_folder(path.parent, lambda error: ConfigError(f"{path.parent}: {error.strerror}"))


def _write(path: Path, keys: list[Key]) -> None:
    """The file at once, with mode 0600; one that was there keeps its mode and owner, so that the service still reads it."""
    content = msgspec.json.format(msgspec.json.encode(_KeyFile(1, keys)), indent=1) + b"\n"
    try:
        before = path.stat() if path.exists() else None
        with replaced_file(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
                if before is not None:
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
                file.flush()
                os.fsync(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _iso(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def key_from(path: Path | None) -> str | None:
    """The key that a client sends: from a file, else from the environment, else none. Raises ConfigError."""
    if path is None:
        text, where = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
    else:
        where = str(path)
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    text = text.strip()
    if not text and path is None:
        return None
    if not _KEY.fullmatch(text):
        raise ConfigError(f"{where}: holds no key; expected one line, {_PREFIX}..., as `seqfraud keys add` prints it")
    return text


# ---- at the door


@dataclass(slots=True, frozen=True)
class _Entry:
    """A key that is not revoked. `expires` is in seconds since the epoch."""

    id: str
    roles: Roles
    digest: bytes
    expires: float


class Keyring:
    """The keys in force of one file, followed while it changes. Thread-safe."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file. Raises ConfigError where it cannot be used, or holds no key that is in force."""
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._nobody = _Entry("", OPEN, secrets.token_bytes(32), 0.0)
        self._looking = threading.Lock()
        self._seen = _signature(path)
        self._look_at = monotonic() + LOOK_SECONDS
        self._entries = _entries(read_keys(path))
        if all(entry.expires <= clock() for entry in self._entries.values()):
            raise ConfigError(
                f"{path}: holds no key that is in force; make one with `seqfraud keys add --file {path} --role score`"
            )

    def admit(self, environ: WSGIEnvironment, roles: Roles) -> None:
        """Returns if the request's key has one of `roles`; its id is then, and at a 403, in `seqfraud.key`.

        Raises RequestError 401 or 403.
        """
        if self._monotonic() >= self._look_at:
            self._look()
        presented = _presented(environ)
        if presented is None:
            message = "expected an API key in the header `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            raise RequestError(401, "unauthorized", message)
        # Hashing is quick only if it has little to hash.
        text = presented if len(presented) == _KEY_LENGTH else ""
        digest = sha256(text.encode("utf-8", "replace")).digest()
        entry = self._entries.get(text[len(_PREFIX) : _ID_END], self._nobody)
        if not hmac.compare_digest(digest, entry.digest) or entry.expires <= self._clock():
            raise RequestError(401, "unauthorized", "this API key is unknown, expired or revoked")
        environ["seqfraud.key"] = entry.id
        if roles.isdisjoint(entry.roles):
            held, due = " and ".join(sorted(entry.roles)), " or ".join(sorted(roles))
            raise RequestError(403, "forbidden", f"this API key has the role {held}; this address is for {due}")

    def _look(self) -> None:
        """Reads the file again if it is another; a broken one is logged once and changes nothing."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            self._look_at = self._monotonic() + LOOK_SECONDS
            seen = _signature(self._path)
            if seen == self._seen:
                return
            self._seen = seen
            self._entries = _entries(read_keys(self._path))
            _log.info("keys read again: %d not revoked", len(self._entries))
        except ConfigError as error:
            _log.error("the keys stay what they were: %s", error)
        finally:
            self._looking.release()


def _entries(keys: list[Key]) -> dict[str, _Entry]:
    return {
        key.id: _Entry(
            key.id,
            frozenset(key.roles),
            bytes.fromhex(key.sha256),
            float("inf") if key.expires is None else parse_instant(key.expires) / 1000,
        )
        for key in keys
        if key.revoked is None
    }


def _signature(path: Path) -> tuple[int, ...]:
    """What differs between two states of a file; of one that cannot be looked at: nothing."""
    try:
        now = path.stat()
    except OSError:
        return ()
    return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def _presented(environ: WSGIEnvironment) -> str | None:
    """The key that a request carries. Another scheme of authorization is somebody else's business."""
    authorization: str = environ.get("HTTP_AUTHORIZATION", "")
    if authorization[:7].lower() == "bearer ":
        return authorization[7:].strip()
    key: str | None = environ.get("HTTP_X_API_KEY")
    return None if key is None else key.strip()
