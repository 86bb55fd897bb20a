"""What the service says while it runs: one line per event on stderr, JSON by default; nothing of a body or an identifier.

Lines are written by a thread of their own: whoever reads stderr slowly, or not at all, holds up no request. What finds
the queue full is dropped, and the next line that can be written says how many were.

An exception is logged as its type and its places in the code. Its message is left out, because Python's own messages
quote values ("could not convert string to float: ..."), except where the message is ours or the system's.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from types import TracebackType
from typing import Any, Literal
from wsgiref.types import WSGIEnvironment

import msgspec

from seqfraud.errors import BundleError, ConfigError, JournalError, RunError

__all__ = ["AccessLog", "LineWriter", "LogFormat", "LogSettings", "configure_logs"]

LogFormat = Literal["json", "text"]
Fields = dict[str, Any]

PAUSE_SECONDS = 0.05
"""Between two writes. A thread that is woken by every line would take the interpreter from scoring each time."""
END_SECONDS = 2.0
"""How long the end of the process waits for a reader of stderr."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
"""Others are logged as OTHER: a client can send any word."""

_SAID_BY_US = (BundleError, ConfigError, JournalError, RunError)
_LARGEST_FRAMES = 24


@dataclass(frozen=True)
class LogSettings:
    """What is logged, and how.

    - format: JSON lines, or text for people.
    - access: one line per request.
    - queued: lines that wait to be written at most; what comes beyond is dropped and counted.
    """

    format: LogFormat = "json"
    access: bool = False
    queued: int = 10_000


class LineWriter:
    """Lines to a file descriptor, written by a thread of its own and never waited for."""

    def __init__(self, descriptor: int, encode: Callable[[Fields], bytes], limit: int) -> None:
        self.dropped = 0
        """Lines that were never written."""
        self._told = 0
        self._descriptor = descriptor
        self._encode = encode
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, fields: Fields, urgent: bool = False) -> None:
        """Queue a line; an urgent one is written at once."""
        line = self._encode(fields)
        with self._lock:
            if len(self._lines) >= self._limit:
                self.dropped += 1
                return
            self._lines.append(line)
        if urgent:
            self._wake.set()

    def close(self) -> None:
        """Write what is queued, for at most END_SECONDS."""
        self._closed = True
        self._wake.set()
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        while True:
            self._wake.wait(PAUSE_SECONDS)
            self._wake.clear()
            closing = self._closed
            self._write_queued()
            if closing:
                return

    def _write_queued(self) -> None:
        while True:
            with self._lock:
                chunk, dropped = list(self._lines), self.dropped
                # they stay in the queue until they are written, and so count towards its limit
            if dropped > self._told:
                words = {
                    **_head(time.time(), "WARNING", __name__, "log lines dropped"),
                    "dropped": dropped - self._told,
                }
                self._write([self._encode(words)])
                self._told = dropped
            if not chunk:
                return
            written = self._write(chunk)
            with self._lock:
                for _ in chunk:
                    self._lines.popleft()
                if not written:
                    self.dropped += len(chunk)
                    self._told = self.dropped  # nobody is there to be told

    def _write(self, lines: list[bytes]) -> bool:
        """False if nobody can read any more."""
        rest = memoryview(b"".join(lines))
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody made the pipe non-blocking
                if self._closed:
                    return False
                time.sleep(PAUSE_SECONDS)
            except OSError:
                return False
        return True


class AccessLog:
    """One line per request: which, by whom, how it ended and how long it took."""

    def __init__(self, writer: LineWriter) -> None:
        self._put = writer.put

    def __call__(self, environ: WSGIEnvironment, status: int, sent: int, seconds: float) -> None:
        """A request that was answered with `status` and `sent` bytes; `environ` as the app left it."""
        method = environ["REQUEST_METHOD"]
        length = environ.get("CONTENT_LENGTH", "")
        self._put(
            {
                **_head(time.time(), "INFO", "serve.access", "request"),
                "request_id": environ.get("seqfraud.request_id"),
                "method": method if method in METHODS else "OTHER",
                "route": environ.get("seqfraud.route"),
                "status": status,
                "ms": round(seconds * 1e3, 3),
                "bytes_in": int(length) if length.isascii() and length.isdigit() and len(length) < 16 else None,
                "bytes_out": sent,
                "key": environ.get("seqfraud.key"),
                "client": environ.get("REMOTE_ADDR"),
            }
        )


class _QueuedHandler(logging.Handler):
    """Python's logging into a LineWriter."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = _head(record.created, record.levelname, record.name, record.getMessage())
            request_id = getattr(record, "request_id", None)
            if request_id is not None:
                fields["request_id"] = request_id
            if record.exc_info and record.exc_info[1] is not None:
                fields["exception"] = describe(record.exc_info[1])
            self._writer.put(fields, urgent=record.levelno >= logging.WARNING)
        except Exception:  # logging must not be what fails a request, and its own report would quote the arguments
            self._writer.put(_head(record.created, "ERROR", record.name, "a line could not be made"))

    def close(self) -> None:
        self._writer.close()
        super().close()


def configure_logs(settings: LogSettings, descriptor: int = 2) -> LineWriter:
    """Send all that is logged, warned of or dies uncaught in this process through one writer to `descriptor`."""
    writer = LineWriter(descriptor, _ENCODERS[settings.format], settings.queued)
    root = logging.getLogger()
    root.handlers = [_QueuedHandler(writer)]
    root.setLevel(logging.INFO)
    logging.getLogger("_granian").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    log = logging.getLogger(__name__)

    def of_a_thread(args: threading.ExceptHookArgs) -> None:
        log.critical("a thread died", exc_info=args.exc_value)

    def of_the_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("the process ends", exc_info=error)

    threading.excepthook = of_a_thread
    sys.excepthook = of_the_process
    return writer


def describe(error: BaseException) -> Fields:
    """An exception without what it may quote: type, places, the same of its cause, and a message where it is safe."""
    frames = traceback.extract_tb(error.__traceback__)[-_LARGEST_FRAMES:]
    fields: Fields = {
        "type": type(error).__name__,
        "at": [f"{'/'.join(PurePath(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames],
    }
    if isinstance(error, _SAID_BY_US):
        fields["message"] = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        fields["message"] = os.strerror(error.errno)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        fields["cause"] = describe(cause)
    return fields


def _head(now: float, level: str, logger: str, event: str) -> Fields:
    return {"time": datetime.fromtimestamp(now, UTC), "level": level, "logger": logger, "event": event}


_to_json = msgspec.json.Encoder().encode


def _json_line(fields: Fields) -> bytes:
    return _to_json(fields) + b"\n"


def _text_line(fields: Fields) -> bytes:
    """Time, level, logger and event, then the rest as key=JSON. A line break in an event stays on its line."""
    time, level, logger, event = (fields[name] for name in ("time", "level", "logger", "event"))
    stamp = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    words = event.replace("\r", "\\r").replace("\n", "\\n")
    rest = "".join(f" {name}={_to_json(value).decode()}" for name, value in list(fields.items())[4:])
    return f"{stamp} {level} {logger} {words}{rest}\n".encode("utf-8", "backslashreplace")


_ENCODERS: dict[LogFormat, Callable[[Fields], bytes]] = {"json": _json_line, "text": _text_line}
