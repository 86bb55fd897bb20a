"""Log lines: whole, without what requests hold, and never waited for."""

import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from seqfraud.errors import JournalError, RequestError
from serve import logs
from serve.logs import AccessLog, LineWriter, LogSettings, configure_logs, describe

LIMIT_S = 10.0
PIPE_HOLDS = 65_536


class Pipe:
    """A pipe that a test reads when it wants to."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()

    def read(self) -> list[str]:
        """Every line so far; at least one."""
        return os.read(self.out, 10**7).decode().splitlines()

    def close_reader(self) -> None:
        os.close(self.out)
        self.out = -1

    def close(self) -> None:
        for descriptor in (self.out, self.into):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def configured() -> Iterator[None]:
    """Puts logging back as it was."""
    root = logging.getLogger()
    before = (root.handlers, root.level, threading.excepthook, sys.excepthook, logging.getLogger("_granian").level)
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers, root.level = before[0], before[1]
    threading.excepthook, sys.excepthook = before[2], before[3]
    logging.getLogger("_granian").setLevel(before[4])


def encode(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, default=str).encode() + b"\n"


def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.usefixtures("configured")
def test_a_line_of_json_has_its_time_level_logger_and_event(pipe: Pipe) -> None:
    writer = configure_logs(LogSettings(), pipe.into)
    logging.getLogger("serve.x").warning("so %d\nand so", 3, extra={"request_id": "abc"})
    (line,) = map(json.loads, pipe.read())
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {"level": "WARNING", "logger": "serve.x", "event": "so 3\nand so", "request_id": "abc"}
    logging.getLogger("serve.x").debug("not said")
    logging.getLogger("_granian").info("not said")
    writer.close()
    os.set_blocking(pipe.out, False)
    with pytest.raises(BlockingIOError):
        os.read(pipe.out, 1)


@pytest.mark.usefixtures("configured")
def test_a_line_of_text_is_one_line(pipe: Pipe) -> None:
    configure_logs(LogSettings(format="text"), pipe.into)
    logging.getLogger("serve.x").warning("so\nand so", extra={"request_id": "abc"})
    (line,) = pipe.read()
    assert line.partition(" ")[2] == 'WARNING serve.x so\\nand so request_id="abc"'


def failing(value: str) -> BaseException:
    """An exception whose message, cause and notes all quote `value`."""
    try:
        try:
            float(value)
        except ValueError as error:
            raise KeyError(value) from error
    except KeyError as error:
        error.add_note(value)
        return error
    raise AssertionError


@pytest.mark.usefixtures("configured")
def test_an_exception_is_its_type_and_places_and_not_its_words(pipe: Pipe) -> None:
    configure_logs(LogSettings(), pipe.into)
    logging.getLogger("serve.x").error("failed", exc_info=failing("jane-4111"))
    (text,) = pipe.read()
    assert "jane" not in text
    said = json.loads(text)["exception"]
    assert (said["type"], said["cause"]["type"]) == ("KeyError", "ValueError")
    assert said["at"][0].startswith("serve/test_logs.py:") and said["at"][0].endswith(" failing")
    assert "message" not in said


def test_our_own_words_and_the_systems_are_kept() -> None:
    assert describe(JournalError("the disk is full"))["message"] == "the disk is full"
    assert describe(OSError(28, "x", "/home/jane"))["message"] == os.strerror(28)
    for error in (RequestError(422, "invalid_field", "amount: 'jane'"), OSError("jane"), ValueError("jane")):
        assert "message" not in describe(error)


@pytest.mark.usefixtures("configured")
def test_a_thread_that_dies_does_not_print_its_words(pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(), pipe.into)

    def die() -> None:
        raise ValueError("jane")

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    (line,) = map(json.loads, pipe.read())
    assert (line["level"], line["exception"]["type"]) == ("CRITICAL", "ValueError")
    assert "jane" not in capfd.readouterr().err


@pytest.mark.usefixtures("configured")
def test_a_line_that_cannot_be_made_fails_nobody(pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    """Python's own report of it would print the arguments."""
    configure_logs(LogSettings(), pipe.into)
    logging.getLogger("serve.x").error("%d", "jane")
    logging.getLogger("serve.x").error("\ud800 %s", "lone")
    lines = []
    while len(lines) < 2:
        lines += pipe.read()
    assert "jane" not in "".join(lines)
    assert all(json.loads(line)["event"] == "a line could not be made" for line in lines)
    assert capfd.readouterr().err == ""


def test_a_reader_that_does_not_read_holds_nobody_up_and_is_told_what_it_missed(pipe: Pipe) -> None:
    writer = LineWriter(pipe.into, encode, limit=10)
    writer.put({"n": 0, "long": "x" * 2 * PIPE_HOLDS}, urgent=True)
    assert select.select([pipe.out], [], [], LIMIT_S)[0]  # it is being written, alone
    for n in range(1, 31):  # the pipe is full: each of these would wait for the reader
        writer.put({"n": n})
    assert writer.dropped == 21, "one of the ten places is taken by the line that is being written"
    text = ""
    while '"n": 9' not in text:
        text += os.read(pipe.out, PIPE_HOLDS).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["n"] for line in lines if "n" in line] == list(range(10))
    assert [line["dropped"] for line in lines if line.get("event") == "log lines dropped"] == [21]
    until(lambda: not writer._lines)  # what was read leaves the queue a moment later
    writer.put({"n": 99}, urgent=True)
    assert [json.loads(line)["n"] for line in pipe.read()] == [99], "what was dropped is said once"
    writer.close()


def test_closing_writes_what_is_queued(pipe: Pipe) -> None:
    writer = LineWriter(pipe.into, encode, limit=1000)
    for n in range(500):
        writer.put({"n": n})
    writer.close()
    assert [json.loads(line)["n"] for line in pipe.read()] == list(range(500))


def test_closing_does_not_wait_for_a_reader_without_end(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "END_SECONDS", 0.05)
    writer = LineWriter(pipe.into, encode, limit=10)
    writer.put({"long": "x" * 2 * PIPE_HOLDS}, urgent=True)
    writer.close()
    assert writer._thread.is_alive()
    os.read(pipe.out, 10**7)
    os.read(pipe.out, 10**7)
    writer._thread.join(LIMIT_S)
    assert not writer._thread.is_alive()


def test_a_reader_that_is_gone_is_no_error(pipe: Pipe) -> None:
    writer = LineWriter(pipe.into, encode, limit=10)
    pipe.close_reader()
    for _ in range(3):
        writer.put({"n": 1}, urgent=True)
    until(lambda: writer.dropped == 3)
    assert not writer._lines
    writer.close()


def test_a_pipe_that_somebody_made_non_blocking_gets_everything(pipe: Pipe) -> None:
    os.set_blocking(pipe.into, False)
    writer = LineWriter(pipe.into, encode, limit=10)
    writer.put({"long": "x" * 3 * PIPE_HOLDS}, urgent=True)
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(pipe.out, 1000)
    assert len(json.loads(text)["long"]) == 3 * PIPE_HOLDS
    writer.close()


def test_a_request_is_logged_by_its_route_and_key(pipe: Pipe) -> None:
    writer = LineWriter(pipe.into, logs._json_line, limit=10)
    log = AccessLog(writer)
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/v1/users/jane",
        "QUERY_STRING": "user=jane",
        "CONTENT_LENGTH": "12",
        "REMOTE_ADDR": "10.0.0.1",
        "HTTP_AUTHORIZATION": "Bearer jane",
        "seqfraud.request_id": "abcdefgh",
        "seqfraud.route": "/v1/users/{user}",
        "seqfraud.key": "0123",
    }
    log(environ, 200, 345, 0.0012345)
    log({"REQUEST_METHOD": "JANE", "CONTENT_LENGTH": "9" * 40}, 400, 0, 0.0)
    writer.close()
    first, second = map(json.loads, pipe.read())
    assert first.pop("time")
    assert first == {
        "level": "INFO", "logger": "serve.access", "event": "request", "request_id": "abcdefgh", "method": "GET",
        "route": "/v1/users/{user}", "status": 200, "ms": 1.234, "bytes_in": 12, "bytes_out": 345, "key": "0123",
        "client": "10.0.0.1",
    }  # fmt: skip
    assert (second["method"], second["route"], second["bytes_in"]) == ("OTHER", None, None)
