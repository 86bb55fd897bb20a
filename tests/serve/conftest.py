"""Real processes for the tests of the edge: a service, a certificate, and tools that may be missing."""

import base64
import datetime
import hashlib
import hmac
import ipaddress
import json
import os
import random
import select
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve.service import Service

START_S = 60.0
START = 1_600_000_000_000
MINUTE = 60_000


@dataclass(frozen=True)
class Certificate:
    """A self-signed one for localhost and 127.0.0.1, and its key, in PEM."""

    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))],
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    out = Certificate(folder / "tls.crt", folder / "tls.key")
    out.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    out.key.touch(mode=0o600)
    out.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return out


class Running:
    """A service in a process of its own; stderr goes to `log`."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, env=env, text=True)
        self.url = ""

    def started(self) -> "Running":
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else "nothing came"
        assert line.startswith("seqfraud serving on "), f"{line!r}\n{self.log.read_text()}"
        self.url = line.split()[-1]
        return self

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


Serve = Callable[..., Running]


@pytest.fixture
def run_service(tmp_path: Path) -> Iterator[Serve]:
    """`run_service(command)` starts one that prints where it serves; what still runs at the end is killed."""
    running: list[Running] = []

    def run(command: list[str], **env: str) -> Running:
        log = tmp_path / f"service-{len(running)}.log"
        running.append(Running(command, log, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}))
        return running[-1]

    yield run
    for one in running:
        one.process.kill()
        one.process.wait(30)
        if one.process.stdout is not None:
            one.process.stdout.close()


@pytest.fixture
def serve(run_service: Serve, cards, tmp_path: Path) -> Serve:
    """`serve(*flags)`: `seqfraud serve` with the bundle of CARDS on a free port of loopback, an empty state folder."""

    def start(*flags: str | Path, **env: str) -> Running:
        words = ["--bundle", cards.path, "--state", tmp_path / "state", "--port", "0", *flags]
        return run_service([sys.executable, "-m", "serve", *map(str, words)], **env)

    return start


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], str]:
    """`tool(name, how)`: the path of a program. Where it is missing: a failure in CI (CI=true), else a skip that says `how`."""

    def find(name: str, how: str) -> str:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if found:
            return found
        words = f"{name} is not installed; {how}"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)

    return find


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwc0JzT2bsVkE="


@dataclass(frozen=True)
class Message:
    """What came to a receiver; `valid` by the few lines that anybody would write."""

    id: str
    timestamp: int
    body: bytes
    headers: dict[str, str]
    path: str

    @property
    def valid(self) -> bool:
        signed = f"{self.id}.{self.timestamp}.".encode() + self.body
        digest = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, hashlib.sha256).digest()
        return f"v1,{base64.b64encode(digest).decode()}" in self.headers["webhook-signature"].split(" ")

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def seq(self) -> int:
        seq: int = self.content["seq"]
        return seq


@dataclass(frozen=True)
class Reply:
    """What a receiver does with a message: after a pause it answers, all at once or a byte every `drip` seconds."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: float = 0.0
    drip: float = 0.0


class Receiver:
    """A webhook's receiver in threads of its own, which can fail in every way."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.reply: Callable[[Message], Reply] = lambda _: Reply()
        self.got: list[Message] = []
        self.taken: list[Message] = []
        """Those that were answered 2xx."""
        self.connections = 0
        self._certificate = certificate
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"{'http' if self._certificate is None else 'https'}://localhost:{self._port}/hook?token=hunter2"

    def start(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                receiver.connections += 1

            def do_POST(self) -> None:
                receiver._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate.certificate, self._certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, until it is started again at the same address."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        message = Message(headers["webhook-id"], int(headers["webhook-timestamp"]), body, headers, handler.path)
        self.got.append(message)
        reply = self.reply(message)
        time.sleep(reply.pause)
        head = f"HTTP/1.1 {reply.status} x\r\ncontent-length: 0\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items()) + "\r\n"
        for piece in head if reply.drip else [head]:
            handler.wfile.write(piece.encode())
            time.sleep(reply.drip)
        if 200 <= reply.status < 300:
            self.taken.append(message)

    def wait(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Until it holds; an assertion after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [(m.id, m.headers) for m in self.got]
            time.sleep(0.005)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.stop()


@pytest.fixture
def tls_receiver(certificate: Certificate) -> Iterator[Receiver]:
    one = Receiver(certificate)
    yield one
    one.stop()


@pytest.fixture
def reply() -> type[Reply]:
    """The type of what a receiver does."""
    return Reply


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """The secret that a receiver verifies with."""
    file = tmp_path / "webhook.secret"
    file.touch(0o600)
    file.write_text(f"{SECRET}\n")
    return file


@pytest.fixture(scope="session")
def live() -> Callable[..., dict[str, float]]:
    """`live(service, seed, count, first=0)`: random traffic for a service on CARDS; the probability of every id."""
    return _live


def _live(service: Service, seed: int, count: int, first: int = 0) -> dict[str, float]:
    """Random transactions, late ones, retries and labels (early, corrected, after the delay) posted; the answers."""
    rng = random.Random(seed)
    clock = START
    rows: list[dict[str, Any]] = []
    answers = {}
    for number in range(first, first + count):
        clock += rng.choice([0, 1, 5, 40]) * MINUTE
        back = rng.choice([1, 30, 200, 9000]) * MINUTE if rng.random() < 0.1 else 0
        row = {"id": number, "user": f"u{rng.randrange(6)}", "time": clock - back, "amount": rng.choice([1.0, 20.0, 300.0]),
               "kind": rng.choice(["food", "fuel", None]), "merchant": rng.choice(["m1", "m2"]), "device": "d1"}  # fmt: skip
        rows.append(row)
        answer = json.loads(service.score(json.dumps(row).encode()))
        answers[answer["transaction_id"]] = answer["fraud_probability"]
        if rng.random() < 0.3:
            target = rng.choice([number, max(0, number - 3), max(0, number - 40), number + 2])
            known_at = clock + rng.choice([-50, 0, 3, 60]) * MINUTE
            label = {"transaction_id": target, "is_fraud": rng.random() < 0.6, "known_at": known_at}
            service.add_labels(json.dumps([label]).encode())
        if rng.random() < 0.1:
            service.score(json.dumps(rng.choice(rows)).encode())
    return answers
