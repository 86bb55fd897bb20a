"""What docs/alerts.md shows: the settings are the defaults, the receiver verifies, and refuses what it should."""

import base64
import re
import threading
import time
import tomllib
from dataclasses import fields
from http.client import HTTPConnection
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest

from seqfraud.config import from_plain
from serve.alerts import _FOLLOWS
from serve.settings import Settings
from serve.webhook import Event, Sender, WebhookSettings, read_secrets, signatures

PAGE = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text(encoding="utf-8")


def test_the_section_shows_every_setting_with_its_default():
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    webhook = from_plain(Settings, tomllib.loads(block), "alerts.md").webhook
    assert webhook == WebhookSettings(webhook.url, webhook.secret)
    assert set(tomllib.loads(block)["webhook"]) == {field.name for field in fields(WebhookSettings)}


def test_the_table_of_lives_is_the_code():
    (table,) = re.findall(r"## A life\n\n\|.*?\n\|---.*?\n(.*?)\n\n", PAGE, re.DOTALL)
    shown: dict[str, set[str]] = {}
    for line in table.splitlines():
        before, after = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:3])
        for state in before:
            shown.setdefault(state, set()).update(after)
    assert shown == {state: set(following) for state, following in _FOLLOWS.items()}


@pytest.fixture
def shown(secret_file):
    """The receiver of the page, running; its class and address."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    receiver = names["Receiver"]
    receiver.secrets = read_secrets(secret_file)
    receiver.log_message = lambda *_: None
    server = HTTPServer(("127.0.0.1", 0), receiver)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield receiver, server.server_address[1]
    server.shutdown()
    server.server_close()


def post(port: int, body: bytes, **headers: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body, {name.replace("_", "-"): value for name, value in headers.items()})
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_receiver_takes_an_event_once_however_often_it_comes(shown, secret_file):
    receiver, port = shown
    sender = Sender(WebhookSettings(f"http://127.0.0.1:{port}/", str(secret_file)))
    assert [sender.send(Event(1, "msg_1_a", b'{"seq":1}')).status for _ in range(2)] == [204, 204]
    assert receiver.events == [{"seq": 1}]


def test_the_receiver_refuses_what_is_forged_or_old(shown, secret_file):
    receiver, port = shown
    (secret,) = read_secrets(secret_file)
    now = int(time.time())

    def status(body: bytes = b"{}", sent: int = now, signed: bytes = b"{}", key: bytes = secret) -> int:
        signature = signatures([key], "msg_1_a", sent, signed)
        headers = {"webhook_id": "msg_1_a", "webhook_timestamp": str(sent), "webhook_signature": signature}
        return post(port, body, **headers)

    assert status(body=b'{"seq":2}') == 401
    assert status(key=b"k" * 32) == 401
    assert status(sent=now - 301) == status(sent=now + 600) == 401, "a message that was recorded, sent again later"
    assert post(port, b"{}", webhook_id="msg_1_a", webhook_timestamp=str(now), webhook_signature="v1,") == 401
    assert receiver.events == []
    assert status() == 204
    both = f"v1,{base64.b64encode(b'0' * 32).decode()} {signatures([secret], 'msg_2_a', now, b'{}')}"
    assert post(port, b"{}", webhook_id="msg_2_a", webhook_timestamp=str(now), webhook_signature=both) == 204
