"""Real processes for the tests of the edge: a service, a certificate, and tools that may be missing."""

import datetime
import ipaddress
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
