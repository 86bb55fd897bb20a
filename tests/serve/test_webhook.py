"""One attempt at a receiver that fails in every way, and who may be one."""

import base64
import logging
import stat
import time

import pytest

from seqfraud.config import from_plain
from seqfraud.errors import ConfigError
from serve.settings import Settings, load_settings
from serve.webhook import Event, Outcome, Sender, WebhookSettings, read_secrets, signatures

EVENT = Event(7, "msg_7_abc", b'{"seq":7}')


@pytest.fixture
def sender(receiver, secret_file):
    return Sender(WebhookSettings(receiver.url, str(secret_file), timeout_seconds=0.5))


# ---- signing


def test_the_signature_is_that_of_the_specification():
    """The example of Standard Webhooks' own test suites."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    signed = signatures([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_message_is_signed_at_each_attempt(receiver, secret_file):
    times = iter([1_700_000_000.9, 1_700_000_060.0])
    sender = Sender(WebhookSettings(receiver.url, str(secret_file)), clock=lambda: next(times))
    assert sender.send(EVENT) == sender.send(EVENT) == Outcome(200)
    assert [m.timestamp for m in receiver.got] == [1_700_000_000, 1_700_000_060]
    assert all(m.valid and m.id == EVENT.id and m.body == EVENT.body for m in receiver.got)
    assert receiver.got[0].headers["webhook-signature"] != receiver.got[1].headers["webhook-signature"]
    assert receiver.got[0].headers["content-type"] == "application/json"
    assert receiver.got[0].path == "/hook?token=hunter2"
    assert receiver.connections == 1, "the connection is kept"


def test_while_a_secret_is_replaced_both_sign(receiver, secret_file):
    new = b"n" * 32
    old = read_secrets(secret_file)[0]
    secret_file.write_text(f"whsec_{base64.b64encode(new).decode()}\n" + secret_file.read_text())
    Sender(WebhookSettings(receiver.url, str(secret_file))).send(EVENT)
    (message,) = receiver.got
    assert message.valid, "the old one is known to the receiver"
    first, second = message.headers["webhook-signature"].split(" ")
    assert first == signatures([new], EVENT.id, message.timestamp, EVENT.body)
    assert second == signatures([old], EVENT.id, message.timestamp, EVENT.body)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "0 lines"),
        ("hunter2hunter2hunter2hunter2hunter2", "line 1 is no webhook secret"),
        ("whsec_aHVudGVyMg==", "line 1 is no webhook secret"),
        ("whsec_!!!!", "line 1 is no webhook secret"),
        ("whsec_" + "A" * 200, "line 1 is no webhook secret"),
        ("\n".join(["whsec_" + "A" * 44] * 5), "5 lines"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_shown(secret_file, content, words):
    secret_file.write_text(content)
    with pytest.raises(ConfigError, match=r"webhook\.secret") as caught:
        read_secrets(secret_file)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "aHVudGVyMg" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602])
def test_a_secret_that_others_may_read_is_refused(secret_file, mode):
    secret_file.chmod(mode)
    with pytest.raises(ConfigError, match="others may read"):
        read_secrets(secret_file)


def test_a_secret_of_the_group_is_warned_of(secret_file, caplog):
    secret_file.chmod(0o640)
    assert len(read_secrets(secret_file)) == 1
    assert "group may read" in caplog.text
    with pytest.raises(ConfigError, match=r"no such webhook secret; make one with"):
        read_secrets(secret_file.with_name("absent"))


def test_the_command_that_the_error_shows_makes_a_secret(tmp_path):
    import subprocess

    file = tmp_path / "made"
    with pytest.raises(ConfigError) as caught:
        read_secrets(file)
    subprocess.run(["sh", "-c", str(caught.value).partition("make one with: ")[2]], check=True)
    assert len(read_secrets(file)[0]) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


# ---- who may be a receiver


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/hook?token=a",
        "https://example.org:8443",
        "https://[2001:db8::1]/x",
        "http://localhost:9000/",
        "http://127.0.0.1/",
        "http://[::1]:1/",
    ],
)
def test_these_may_be_receivers(url):
    WebhookSettings(url, "x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/", "plain http to another machine"),
        ("http://localhost.example.org/", "plain http to another machine"),
        ("http://127.0.0.1.example.org/", "plain http to another machine"),
        ("http://10.0.0.1/", "plain http to another machine"),
        ("ftp://example.org/", "expected https"),
        ("file:///etc/passwd", "expected https"),
        ("//example.org/", "expected https"),
        ("", "expected https"),
        ("https:///x", "expected https"),
        ("https://user:hunter2@example.org/", "no user"),
        ("https://example.org/#a", "fragment"),
        ("https://example.org:0/", "port above 0"),
        ("https://example.org:99999/hunter2", "not an address"),
        ("https://[::1/hunter2", "not an address"),
        ("https://example.org/a b", "ASCII without spaces"),
        ("https://exämple.org/", "ASCII"),
        ("https://example.org/\r\nx-evil: 1", "ASCII without spaces"),
    ],
)
def test_these_may_not(url, words):
    with pytest.raises(ValueError, match="url: ") as caught:
        WebhookSettings(url, "x")
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_settings_file_has_a_section(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('[webhook]\nurl = "http://10.0.0.1/"\nsecret = "s"\nplain_http = true\n')
    webhook = load_settings(file).webhook
    assert webhook is not None
    assert (webhook.url, webhook.begin) == ("http://10.0.0.1/", "now")
    for text, words in (
        ('url = "http://10.0.0.1/"\nsecret = "s"', "plain http to another machine"),
        ('url = "https://a/"', "the key webhook.secret is missing"),
        ('url = "https://a/"\nsecret = "s"\ntimeout_seconds = 0', "timeout_seconds: expected more than 0"),
        ('url = "https://a/"\nsecret = "s"\nbegin = "then"', "'then' is not one of"),
        ('url = "https://a/"\nsecret = "s"\nretries = 1', "the nearest valid key is"),
    ):
        file.write_text(f"[webhook]\n{text}\n")
        with pytest.raises(ConfigError, match=r"serve\.toml") as caught:
            load_settings(file)
        assert words in str(caught.value)
    assert from_plain(Settings, {}, "x").webhook is None


def test_what_may_be_shown_of_an_address(secret_file):
    assert WebhookSettings("https://example.org:8443/a?token=hunter2", "x").origin == "https://example.org:8443"
    assert WebhookSettings("https://[2001:db8::1]/a", "x").origin == "https://[2001:db8::1]"


# ---- a receiver that fails


@pytest.mark.parametrize(
    ("status", "delivered", "rejected", "gone"),
    [
        (200, True, False, False),
        (204, True, False, False),
        (302, False, False, False),
        (400, False, True, False),
        (408, False, False, False),
        (410, False, True, True),
        (422, False, True, False),
        (429, False, False, False),
        (500, False, False, False),
        (503, False, False, False),
    ],
)
def test_what_a_status_means(receiver, reply, sender, status, delivered, rejected, gone):
    receiver.reply = lambda _: reply(status, {"location": receiver.url})
    outcome = sender.send(EVENT)
    assert (outcome.delivered, outcome.rejected, outcome.gone) == (delivered, rejected, gone)
    assert outcome.words == ("" if delivered else f"status {status}")
    assert len(receiver.got) == 1, "a redirect is not followed"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        (" 5 ", 5),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("9" * 400, 999_999_999_999),
    ],
)
def test_retry_after_in_both_spellings(receiver, reply, secret_file, header, seconds):
    sender = Sender(WebhookSettings(receiver.url, str(secret_file)), clock=lambda: 1_700_000_000.0)
    receiver.reply = lambda _: reply(503, {"retry-after": header})
    assert sender.send(EVENT).retry_after == seconds


def test_nobody_listens(receiver, sender):
    receiver.stop()
    assert sender.send(EVENT) == Outcome(None, "connection refused")
    receiver.start()
    assert sender.send(EVENT).delivered


def test_a_connection_that_was_closed_meanwhile_is_made_anew(receiver, reply, sender):
    receiver.reply = lambda _: reply(200, {"connection": "close"})
    assert [sender.send(EVENT).status for _ in range(3)] == [200] * 3
    assert receiver.connections == 3


@pytest.mark.parametrize("how", [{"pause": 3.0}, {"drip": 0.1}], ids=["silent", "a byte at a time"])
def test_a_slow_receiver_is_cut_off(receiver, reply, sender, how):
    """A timeout of the socket alone begins anew with every byte."""
    receiver.reply = lambda _: reply(**how)
    began = time.monotonic()
    assert sender.send(EVENT) == Outcome(None, "no answer within 0.5 s")
    assert time.monotonic() - began < 2.5
    receiver.reply = lambda _: reply()
    assert sender.send(EVENT).delivered, "and asked again on a connection of its own"


def test_an_attempt_ends_when_the_service_stops(receiver, reply, secret_file):
    import threading

    sender = Sender(WebhookSettings(receiver.url, str(secret_file), timeout_seconds=60))
    receiver.reply = lambda _: reply(pause=3.0)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(sender.send(EVENT)))
    thread.start()
    receiver.wait(lambda: receiver.got)
    sender.stop()
    thread.join(2)
    assert outcomes == [Outcome(None, "the service stopped")]


def test_what_is_no_http_is_no_answer(secret_file):
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for words in (b"220 smtp ready\r\n", b""):
                client, _ = listener.accept()
                client.recv(65536)
                client.sendall(words)
                client.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        sender = Sender(WebhookSettings(url, str(secret_file), timeout_seconds=5))
        assert sender.send(EVENT) == Outcome(None, "the answer is no HTTP")
        assert sender.send(EVENT) == Outcome(None, "the connection was closed without an answer")


def test_a_name_that_nobody_has(secret_file):
    sender = Sender(WebhookSettings("https://nobody.invalid/", str(secret_file), timeout_seconds=5))
    assert sender.send(EVENT) == Outcome(None, "the receiver's name cannot be resolved")


def test_certificates_are_verified(tls_receiver, certificate, secret_file, caplog):
    caplog.set_level(logging.DEBUG)
    unknown = Sender(WebhookSettings(tls_receiver.url, str(secret_file)))
    assert unknown.send(EVENT) == Outcome(None, "TLS: self-signed certificate")
    known = Sender(WebhookSettings(tls_receiver.url, str(secret_file), ca_file=str(certificate.certificate)))
    assert known.send(EVENT).delivered
    elsewhere = tls_receiver.url.replace("localhost", "127.0.0.2")
    other_name = Sender(WebhookSettings(elsewhere, str(secret_file), ca_file=str(certificate.certificate)))
    tls_receiver.stop()
    assert other_name.send(EVENT).words == "connection refused"
    assert len(tls_receiver.got) == 1
    assert "hunter2" not in caplog.text
    with pytest.raises(ConfigError, match=r"webhook\.ca_file"):
        Sender(WebhookSettings("https://a/", str(secret_file), ca_file="absent"))


def test_a_certificate_of_another_name_is_refused(certificate, secret_file):
    import socket
    import ssl
    import threading

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with socket.create_server(("127.0.0.2", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            try:
                context.wrap_socket(client, server_side=True)
            except (ssl.SSLError, OSError):
                client.close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://127.0.0.2:{listener.getsockname()[1]}/"
        sender = Sender(WebhookSettings(url, str(secret_file), ca_file=str(certificate.certificate), timeout_seconds=5))
        words = sender.send(EVENT).words
    assert words.startswith("TLS: IP address mismatch")


def test_no_proxy_is_used(receiver, sender, monkeypatch):
    """A proxy of the environment would see every alert."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert sender.send(EVENT).delivered
