"""A real service at its door: keys, addresses, TLS, and what its log says of the people in its requests."""

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from seqfraud.cli import main
from seqfraud.errors import ConfigError
from serve.keys import add_key, revoke_key
from serve.replay import Client
from serve.server import Door, ServerSettings, _bind, _require_keys
from serve.tls import TlsSettings, worker_options
from tests.serve.test_server import JSON

LIMIT_S = 10.0
ROW = {"id": 1, "user": "ann", "time": 1_600_000_000_000, "amount": 5, "kind": "a", "merchant": "m"}


def new_key(file: Path, *roles: str) -> str:
    return add_key(file, list(roles), time.time())[1]


def request(
    url: str, method: str, path: str, body: bytes | None = None, key: str | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and decoded JSON."""
    connection = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers=JSON if key is None else JSON | {"X-API-Key": key})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read())


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


# ---- keys


def test_a_service_with_keys_asks_for_them_and_follows_the_file(serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    old = new_key(file, "score")
    service = serve("--keys", file, "--access-log").started()
    body = json.dumps(ROW).encode()
    status, headers, answer = request(service.url, "POST", "/v1/score", body)
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="seqfraud"')
    assert answer["error"]["code"] == "unauthorized"
    assert request(service.url, "POST", "/v1/score", body, old)[0] == 200
    assert request(service.url, "GET", "/v1/users/ann", None, old)[0] == 403
    assert request(service.url, "GET", "/readyz")[0] == 200
    new = new_key(file, "label")
    revoke_key(file, old.split("_")[1], time.time())
    deadline = time.monotonic() + LIMIT_S
    while request(service.url, "GET", "/v1/users/ann", None, new)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert request(service.url, "POST", "/v1/score", body, old)[0] == 401
    file.write_text("{")
    time.sleep(1.1)
    assert request(service.url, "GET", "/v1/users/ann", None, new)[0] == 200
    assert service.stop() == 0
    said = lines(service.log)
    assert sum(line["event"].startswith("the keys stay what they were") for line in said) == 1
    asked = [(line["status"], line["key"]) for line in said if line["logger"] == "serve.access"]
    ids = [key.split("_")[1] for key in (old, new)]
    assert asked[:4] == [(401, None), (200, ids[0]), (403, ids[0]), (200, None)]
    assert asked[-1] == (200, ids[1])
    text = service.log.read_text()
    assert not any(key.split("_")[2] in text for key in (old, new))


@pytest.mark.parametrize("size", [2, 10_000, 3_000_000])
def test_a_stranger_is_answered_before_the_body_and_the_connection_ends_well(serve, tmp_path: Path, size: int) -> None:
    """Nothing of the largest is read: its sender may also find the connection closed."""
    file = tmp_path / "keys.json"
    key = new_key(file, "score")
    service = serve("--keys", file).started()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        for _ in range(2):  # http.client connects again where the server said that it closes
            try:
                connection.request("POST", "/v1/score", body=bytes(size))
                answer = connection.getresponse()
            except (BrokenPipeError, ConnectionResetError):
                assert size > 1_000_000
                connection.close()
            else:
                assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "unauthorized")
        connection.request("GET", "/v1/model", headers={"Authorization": f"Bearer {key}"})
        assert connection.getresponse().status == 200


def test_a_stranger_who_never_sends_the_body_holds_no_thread(serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "score")
    settings = tmp_path / "serve.toml"
    settings.write_text(f'[server]\nthreads = 1\n[keys]\nfile = "{file}"\n')
    service = serve("--settings", settings).started()
    silent = [socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT_S) for _ in range(5)]
    for one in silent:
        one.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert request(service.url, "POST", "/v1/score", json.dumps(ROW).encode(), key)[0] == 200
    for one in silent:
        assert one.recv(100).startswith(b"HTTP/1.1 401 ")
        one.close()


# ---- addresses


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("localhost", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", True),
        ("::", True),
    ],
)
def test_without_keys_only_loopback_may_be_bound(host: str, open_to_others: bool) -> None:
    try:
        listener = _bind(ServerSettings(host=host, port=0))
    except ConfigError:
        assert ":" in host, "only a machine without IPv6 cannot"
        return
    with listener, pytest.raises(ConfigError) if open_to_others else contextlib.nullcontext() as caught:
        _require_keys(listener, Door())
    with listener:
        if caught is not None:
            assert "make one with `seqfraud keys add --file keys.json" in str(caught.value)


def test_a_service_that_others_would_reach_does_not_start(serve) -> None:
    service = serve("--host", "0.0.0.0")
    assert service.process.wait(60) == 2
    assert "error: 0.0.0.0 is reached by others, and there are no keys" in service.log.read_text()


@pytest.mark.parametrize("how", ["flag", "settings", "keys"])
def test_other_addresses_are_served_with_keys_or_by_word(serve, tmp_path: Path, how: str) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text("[keys]\nwithout = true\n")
    file = tmp_path / "keys.json"
    new_key(file, "admin")
    flags = {"flag": ["--without-keys"], "settings": ["--settings", settings], "keys": ["--keys", file]}[how]
    service = serve("--host", "0.0.0.0", *flags).started()
    status = request(f"http://127.0.0.1:{service.port}", "GET", "/v1/model")[0]
    assert status == (401 if how == "keys" else 200)


def test_keys_and_without_keys_at_once_are_an_error(serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "admin")
    service = serve("--keys", file, "--without-keys")
    assert service.process.wait(60) == 2
    assert "expected one of them" in service.log.read_text()


# ---- TLS


def tls_settings(folder: Path, certificate: Path, key: Path, more: str = "") -> Path:
    file = folder / "serve.toml"
    file.write_text(f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n{more}')
    return file


def handshake(port: int, certificate: Path, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(certificate))
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        return secure.version()


def test_tls_is_served_and_a_replay_goes_through_it_with_a_key(
    serve, certificate, cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    key = tmp_path / "key"
    key.write_text(new_key(keys, "score", "label"))
    data = tmp_path / "rows.csv"
    data.write_text(
        "id,user,time,amount,kind,merchant,device,fraud,known_at\n"
        "1,ann,1600000000000,5,a,m,d,0,1600000001000\n2,ann,1600000009000,6,a,m,d,1,1600000010000\n"
    )
    settings = tls_settings(tmp_path, certificate.certificate, certificate.key, f'[keys]\nfile = "{keys}"\n')
    service = serve("--settings", settings).started()
    assert service.url.startswith("https://127.0.0.1:")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    monkeypatch.delenv("SEQFRAUD_API_KEY", raising=False)
    words = ["replay", str(data), "--url", service.url, "--json"]
    assert main(words) == 2
    assert "answered 401" in capsys.readouterr().err
    assert main([*words, "--key-file", str(key)]) == 0
    assert json.loads(capsys.readouterr().out)["transactions"] == 2
    monkeypatch.setenv("SEQFRAUD_API_KEY", key.read_text())
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["duplicates"] == 2
    monkeypatch.delenv("SSL_CERT_FILE")
    assert main(words) == 2, "a certificate that nobody vouches for"
    assert service.stop() == 0


def test_the_oldest_version_of_tls_is_a_setting(serve, certificate, tmp_path: Path) -> None:
    settings = tls_settings(tmp_path, certificate.certificate, certificate.key, 'minimum = "1.3"\n')
    port = serve("--settings", settings).started().port
    assert handshake(port, certificate.certificate, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        handshake(port, certificate.certificate, ssl.TLSVersion.TLSv1_2)


def test_tls_1_2_is_spoken_by_default_and_plain_text_is_not(serve, certificate, tmp_path: Path) -> None:
    port = serve("--settings", tls_settings(tmp_path, certificate.certificate, certificate.key)).started().port
    assert handshake(port, certificate.certificate, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.raises((OSError, http.client.HTTPException)):
        request(f"http://127.0.0.1:{port}", "GET", "/healthz")
    half = [socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) for _ in range(50)]
    assert handshake(port, certificate.certificate, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    for one in half:
        one.close()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("absent", "tls.key: {key}: No such file or directory"),
        ("open", "tls.key: {key}: everybody on this machine may use it; chmod o= {key}"),
        ("other", "are not a certificate and its key in PEM"),
        ("text", "are not a certificate and its key in PEM"),
    ],
)
def test_tls_that_cannot_work_is_said_at_the_start(certificate, tmp_path: Path, harm: str, words: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = tmp_path / "mine.key"
    if harm != "absent":
        key.touch(0o600)
    if harm == "open":
        key.write_bytes(certificate.key.read_bytes())
        key.chmod(0o644)
    elif harm == "other":
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        key.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*form))
    elif harm == "text":
        key.write_text("a key")
    with pytest.raises(ConfigError) as caught:
        worker_options(TlsSettings(str(certificate.certificate), str(key)))
    assert words.format(key=key) in str(caught.value)


# ---- what the log says


LEAKY = textwrap.dedent(
    '''
    """The real service, except that some requests crash in ways that quote what was sent."""
    import sys
    from pathlib import Path
    from seqfraud.bundle import open_bundle
    from serve.keys import Keyring
    from serve.logs import AccessLog, LogSettings, configure_logs
    from serve.server import Door, ServerSettings, serve_forever
    from serve.service import Service

    class Leaky(Service):
        def score(self, body):
            if b"crash" in body:
                raise ValueError(f"could not read {body!r}")
            if b"leave" in body:
                sys.exit(body.decode())
            if b"print" in body:
                int(body)
            return super().score(body)

        def user(self, user):
            if "crash" in user:
                try:
                    {}[user]
                except KeyError as error:
                    raise RuntimeError(user) from error
            return super().user(user)

    bundle, state, keys, form = sys.argv[1:]
    writer = configure_logs(LogSettings(format=form, access=True))
    opened = open_bundle(Path(bundle))
    door = Door(keys=Keyring(Path(keys)), access=AccessLog(writer))
    sys.exit(serve_forever(lambda: Leaky(opened, Path(state)), ServerSettings(port=0), door))
    '''
)
CARD = "4111111111111111"


def raw(port: int, content: bytes) -> None:
    """Bytes that are no request, perhaps; whatever is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_line_of_the_log_holds_what_a_request_held(run_service, cards, tmp_path: Path, form: str) -> None:
    """Good ones, refused ones, ones that crash the handler, and bytes that are no HTTP."""
    script, keys = tmp_path / "leaky.py", tmp_path / "keys.json"
    script.write_text(LEAKY)
    key = new_key(keys, "admin")
    service = run_service(
        [sys.executable, str(script), str(cards.path), str(tmp_path / "state"), str(keys), form]
    ).started()
    secret = "Zq7Jane"
    row = {**ROW, "user": f"{secret}-{CARD}", "merchant": f"{secret}-m", "kind": f"{secret}-k", "more": secret}
    bodies = [
        json.dumps(one).encode()
        for n in range(40)
        for one in (
            {**row, "id": f"{secret}{n}"},
            {**row, "id": f"{secret}{n}", "amount": 1 + n},
            {**row, "id": CARD, "amount": secret},
            {**row, "time": secret},
            {**row, "user": None, secret: secret},
            [secret],
            secret,
            {**row, "id": f"crash {secret}"},
            {**row, "id": f"leave {secret}"},
            {**row, "id": f"print {secret}"},
        )
    ]
    bodies += [
        f'{{"id": "{secret}'.encode(),
        secret.encode(),
        b"\xff" + secret.encode(),
        b"[" * 100_000 + secret.encode(),
    ]
    seen = set()
    for body in bodies:
        seen.add(request(service.url, "POST", "/v1/score", body, key)[0])
    assert seen >= {200, 400, 409, 422, 500}
    name = quote(f"{secret} {CARD}", safe="")
    labels = json.dumps([{"transaction_id": secret, "is_fraud": True, "known_at": secret}]).encode()
    for method, path, body in (
        ("POST", "/v1/labels", labels),
        ("POST", "/v1/score/batch", json.dumps([row, secret, {}]).encode()),
        ("GET", f"/v1/users/{name}", None),
        ("GET", f"/v1/users/crash{name}", None),
        ("GET", f"/v1/users/%FF{secret}", None),
        ("GET", f"/v1/transactions/{name}", None),
        ("DELETE", f"/v1/transactions/{name}", None),
        ("GET", f"/{name}?{name}={name}", None),
        (secret.upper(), "/v1/score", None),
    ):
        request(service.url, method, path, body, key)
        request(service.url, method, path, body, f"sfk_{secret}")
    for content in (
        f"{secret} / HTTP/1.1\r\nHost: {secret}\r\n\r\n",
        f"GET /{secret} HTTP/9.9\r\n\r\n",
        f"POST /v1/score HTTP/1.1\r\nContent-Length: {secret}\r\n\r\n{secret}",
        f"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: {CARD}\r\n\r\n",
        f"GET /healthz HTTP/1.1\r\n{secret}\r\n\r\n",
        f"POST /v1/score HTTP/1.1\r\nX-API-Key: {key}\r\nTransfer-Encoding: chunked\r\n\r\n{secret}\r\n",
    ):
        raw(service.port, content.encode())
    assert service.stop() == 0
    text = service.log.read_text()
    for word in (secret, secret.lower(), CARD, key.split("_")[2], "ann", "crash", "leave", "print"):
        assert word.lower() not in text.lower(), word
    assert len(text.splitlines()) > len(bodies), "everything was logged"
    if form == "json":
        said = lines(service.log)
        assert {line["exception"]["type"] for line in said if "exception" in line} >= {
            "ValueError",
            "SystemExit",
            "RuntimeError",
        }
        crashes = {line["request_id"] for line in said if line["event"] == "POST /v1/score failed"}
        failed = {line["request_id"] for line in said if line.get("status") == 500 and line["route"] == "/v1/score"}
        assert crashes <= failed and len(crashes) == 80


def test_the_access_log_is_off_unless_asked_for(serve) -> None:
    service = serve().started()
    assert request(service.url, "POST", "/v1/score", json.dumps(ROW).encode())[0] == 200
    assert service.stop() == 0
    assert all(line["logger"] != "serve.access" for line in lines(service.log))


def test_a_log_that_nobody_reads_stops_no_request(cards, tmp_path: Path) -> None:
    """Stderr is a pipe, full after 64 KiB: some 300 lines."""
    command = [
        sys.executable, "-m", "serve", "--bundle", str(cards.path), "--state", str(tmp_path / "state"), "--port", "0",
        "--access-log",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        client = Client(process.stdout.readline().split()[-1])
        for n in range(1000):
            assert client.call("POST", "/v1/score", {**ROW, "id": n, "time": ROW["time"] + n})[0] == 200  # type: ignore[operator]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
