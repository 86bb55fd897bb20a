"""Bodies that no client should send, by the hundred thousand: is each refused or answered, and nothing else changed?

    python -m benchmarks.fuzz [--decoder 700000] [--app 250000] [--server 60000] [--seed 0] [--write]    # make fuzz

Three parts, each with the bundles of benchmarks/drawn.py: the decoder alone, coverage-guided (benchmarks/fuzz_decoder.py);
the whole WSGI app over a real service in this process; a real server process over keep-alive connections. The last two get
valid transactions, batches and labels that were changed in their values, their names, their bytes or their framing.

Looked for: an answer of 500 or more, an answer that is not of the one shape, a request that takes longer than a deadline,
growth of memory, above all by what is refused, and a change of state by it: the sizes of everything are compared before and
after each refused request, and after every block its refused requests are sent again, which may change no byte.
--write puts the counts in benchmarks/results/fuzz.json.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import http.client
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from benchmarks import processes
from benchmarks.drawn import CARDS, PLAIN, RICH, drawn_bundle
from seqfraud.bundle import Bundle
from seqfraud.canonical import spell_time
from seqfraud.config import parse_config
from seqfraud.schema import Schema
from serve.app import create_app
from serve.service import Service

START = 1_600_000_000_000
BLOCK = 2_000
"""Requests between two looks at the state."""
DEADLINE_S = 5.0
"""For one request."""
STUCK_S = 300.0
"""A block that takes longer is stuck: the process says where and ends."""
EXPECTED = {200, 400, 404, 405, 409, 413, 415, 422}
GROWTH_MB = 32.0
"""More than this after the first half of a part is growth: what is accepted leaves little, known labels and SQLite's cache."""
GROWTH_REFUSED_MB = 4.0
"""The same for what is refused, sent again and again at the end: it may leave nothing."""
AGAIN = 5

SPELLINGS = (
    b"NaN", b"-NaN", b"nan", b"Infinity", b"-Infinity", b"inf", b"1e999", b"-1e999", b"1e-999", b"1e31", b"-1e30", b"0", b"-0",
    b"-0.0", b"1.0", b"1e5", b"01", b"1.", b".5", b"+1", b"0x10", b"1_000", b"9007199254740993", b"9223372036854775808",
    b"18446744073709551616", b"-9223372036854775809", b"9" * 400, b"9" * 5000, b"0." + b"1" * 400, b"true", b"false", b"null",
    b"True", b"undefined", b"", b"[]", b"{}", b"[1]", b'{"a":1}', b'{"a":1,"a":2}', b'""', b'" "', b'"12.5"', b'"NaN"',
    b'"1e999"', b'"null"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\udcb3"', b'"\\u0000"', b'"a\\nb"', b'"\\u007f"',
    b'"\xc2\x85"', b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"\xe2\x80\xae"', b'"\\x41"', b'"\\u12"', b'"a\nb"', b"'a'",
    b'"' + b"x" * 256 + b'"', b'"' + b"x" * 257 + b'"', b'"' + b"y" * 20_000 + b'"', b"[" * 600 + b"]" * 600, b"[" * 5_000,
    b'{"a":' * 900 + b"1" + b"}" * 900, b'"1969-12-31"', b'"9999-12-31T23:59:59"', b'"2025-02-30"', b'"2025-03-01T12:00:00Z"',
    b'"0000-01-01"', b"-1", b"-62135596800001", b"253402300799999", b"253402300800000", b"1e300", b"1600000000", b"4102444800000",
)  # fmt: skip
"""Values as a body spells them: wrong ones, and some that are right in one place and wrong in another."""
TYPES = (
    "", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=nosuch", "application/json; body=x",
    "application/json;charset=UTF-8", "application/problem+json", "multipart/form-data; boundary=x", ";;;", "\x7f",
)  # fmt: skip
PATHS = (
    "/", "/nope", "/v1", "/v1/score/", "/v1/score/x", "/v1/users/", "/v1/users/%ff", "/v1/users/a%2Fb", "/v1/users/%00", "/healthz",
    "/readyz", "/v1/model", "/v1/transactions/%ed%a0%80", "/v1/transactions/x/explanation", "/v1/../healthz", "//healthz",
    "/v1/score?body=1&id=2&%ff=%zz", "/v9/v1/score", "/v1/users/" + "u" * 5000, "/metrics", "/v1/transactions/%25%32",
)  # fmt: skip
METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW")
SCORE, BATCH, LABELS = "/v1/score", "/v1/score/batch", "/v1/labels"


@dataclass(frozen=True)
class Sent:
    """One request."""

    body: bytes
    path: str = SCORE
    method: str = "POST"
    content_type: str = "application/json"
    encoding: str = ""
    chunked: bool = False


class Generator:
    """Requests for one schema. What it draws names from is finite, so that a service comes to know all of it."""

    def __init__(self, schema: Schema, seed: int, prefix: str = "t") -> None:
        self._rng = random.Random(seed)
        self._schema = schema
        self._prefix = prefix
        self._made = 0
        self._clock = START
        self._pools = {
            column: [json.dumps(f"{column}{i}").encode() for i in range(40)] + [b"7", b"1.5", b"true", b'"\xc3\xa9"']
            for column in (schema.user, *schema.texts)
        }
        for column in schema.ip:
            self._pools[column] = [f'"10.{i}.7.1"'.encode() for i in range(30)] + [b'"2001:db8::1"', b'"fe80::1%eth0"']

    def __iter__(self) -> Iterator[Sent]:
        while True:
            yield self.request()

    def request(self) -> Sent:
        """The next one: about a third are as they should be."""
        rng = self._rng
        drawn = rng.random()
        if drawn < 0.70:
            return self._framed(self._changed(self._row()), SCORE)
        if drawn < 0.80:
            items = [self._changed(self._row()) for _ in range(rng.choice((0, 1, 2, 3, 5, 60)))]
            return self._framed(self._bytes_changed(b"[" + b",".join(items) + b"]", 0.1), BATCH)
        if drawn < 0.90:
            labels = [self._changed(self._label()) for _ in range(rng.choice((0, 1, 1, 2, 4)))]
            return self._framed(self._bytes_changed(b"[" + b",".join(labels) + b"]", 0.1), LABELS)
        if drawn < 0.97:
            return self._framed(self._tree(0), rng.choice((SCORE, BATCH, LABELS)))
        return Sent(self._changed(self._row()), rng.choice(PATHS), rng.choice(("POST", "GET", *METHODS)))

    def _row(self) -> list[tuple[bytes, bytes]]:
        """Names and values of a transaction that would be accepted; some ids come again."""
        rng, schema = self._rng, self._schema
        self._clock += rng.choice((0, 1, 20, 60)) * 1000
        late = rng.choice((60, 4000, 10**6)) * 1000 if rng.random() < 0.05 else 0
        pairs = []
        for column in schema.fields:
            if column == schema.transaction:
                self._made += rng.random() < 0.97
                value = b'"%s%d"' % (self._prefix.encode(), self._made)
            elif column == schema.time:
                value = json.dumps(spell_time(self._clock - late, schema.time_unit)).encode()
            elif column in schema.numbers:
                value = b"%.2f" % rng.expovariate(0.02)
            else:
                value = rng.choice(self._pools[column])
            pairs.append((column.encode(), value))
        return pairs

    def _label(self) -> list[tuple[bytes, bytes]]:
        rng = self._rng
        identity = (
            f"{self._prefix}{max(0, self._made - rng.randrange(200))}"
            if rng.random() < 0.9
            else f"early{rng.randrange(50)}"
        )
        return [
            (b"transaction_id", json.dumps(identity).encode()),
            (b"is_fraud", rng.choice((b"true", b"false", b"1", b"0"))),
            (b"known_at", b"%d" % (self._clock + rng.randrange(10**7))),
        ]

    def _changed(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        """JSON of an object, half of the time with something wrong in it."""
        rng = self._rng
        drawn = rng.random()
        if drawn < 0.40:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                at = rng.randrange(len(pairs))
                pairs[at] = (pairs[at][0], self._value())
            if rng.random() < 0.2:
                pairs.insert(
                    rng.randrange(len(pairs) + 1), (rng.choice((b"x", b"", b"body", b"\\u0078")), self._value())
                )
        elif drawn < 0.47:
            name, value = rng.choice(pairs)
            pairs.insert(rng.randrange(len(pairs) + 1), (name, value if rng.random() < 0.5 else self._value()))
        elif drawn < 0.53:
            del pairs[rng.randrange(len(pairs))]
        elif drawn < 0.6:
            rng.shuffle(pairs)
        comma, colon = rng.choice(((b",", b":"), (b", ", b": "), (b" ,\n", b"\t:\r\n")))
        body = b"{" + comma.join([b'"%b"%b%b' % (name, colon, value) for name, value in pairs]) + b"}"
        return self._bytes_changed(body, 0.08)

    def _value(self) -> bytes:
        rng = self._rng
        drawn = rng.random()
        if drawn < 0.7:
            return rng.choice(SPELLINGS)
        if drawn < 0.8:
            return b"%d" % rng.randrange(-(2 ** rng.randrange(90)), 2 ** rng.randrange(90) + 1)
        if drawn < 0.9:
            return b"%.*e" % (rng.randrange(20), rng.uniform(-9, 9) * 10.0 ** rng.randrange(-300, 300))
        return self._tree(2)

    def _tree(self, depth: int) -> bytes:
        """Any JSON value, with the schema's names in it."""
        rng = self._rng
        drawn = rng.random()
        if depth > 4 or drawn < 0.4:
            return rng.choice(SPELLINGS)
        if drawn < 0.6:
            return b"[" + b",".join([self._tree(depth + 1) for _ in range(rng.randrange(4))]) + b"]"
        names = [name.encode() for name in (*self._schema.fields, "transaction_id", "is_fraud", "x")]
        chosen = rng.choices(names, k=rng.randrange(6))
        return b"{" + b",".join([b'"%b":%b' % (name, self._tree(depth + 1)) for name in chosen]) + b"}"

    def _bytes_changed(self, body: bytes, share: float) -> bytes:
        rng = self._rng
        if rng.random() >= share or not body:
            return body
        at = rng.randrange(len(body))
        kind = rng.randrange(7)
        if kind == 0:
            return body[:at]
        if kind == 1:
            return body[:at] + rng.randbytes(rng.choice((1, 1, 2, 8))) + body[at:]
        if kind == 2:
            return body[:at] + rng.randbytes(1) + body[at + 1 :]
        if kind == 3:
            return body[:at] + body[at + rng.randrange(1, 9) :]
        if kind == 4:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"//\n", b" \n", b"\x00", b"[" * 3000)) + body
        if kind == 5:
            return body + rng.choice((b" ", b"\x00", b"{}", b",", b" // x", b"]"))
        return body.decode("latin-1").encode("utf-16")

    def _framed(self, body: bytes, path: str) -> Sent:
        drawn = self._rng.random()
        if drawn < 0.94:
            return Sent(body, path)
        if drawn < 0.96:
            return Sent(body, path, content_type=self._rng.choice(TYPES))
        if drawn < 0.97:
            return Sent(body, path, encoding=self._rng.choice(("gzip", "identity", "br")))
        if drawn < 0.99:
            return Sent(body, path, chunked=True)
        return Sent(body, path, method=self._rng.choice(METHODS))


@dataclass
class Part:
    """What one part found; `five_hundreds`, `wrong_shape`, `hangs` and `changed_by_refused` have to be 0."""

    generated: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    five_hundreds: int = 0
    wrong_shape: int = 0
    hangs: int = 0
    changed_by_refused: int = 0
    slowest_ms: float = 0.0
    growth_mb: float = 0.0
    growth_refused_mb: float = 0.0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)
    """Of what must not be."""

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        grown = self.growth_mb > GROWTH_MB or self.growth_refused_mb > GROWTH_REFUSED_MB
        return not (self.five_hundreds or self.wrong_shape or self.hangs or self.changed_by_refused or grown)

    def count(self, sent: Sent, status: int, body: bytes, seconds: float) -> None:
        """Note the answer to a request."""
        self.generated += 1
        self.slowest_ms = max(self.slowest_ms, seconds * 1000)
        if status == 200:
            self.accepted += 1
        else:
            self.refused[str(status)] = self.refused.get(str(status), 0) + 1
        if seconds > DEADLINE_S:
            self.hangs += 1
            self._note("slow", sent)
        if status >= 500:
            self.five_hundreds += 1
            self._note(str(status), sent)
        elif status not in EXPECTED or not (sent.method == "HEAD" or has_shape(status, body)):
            self.wrong_shape += 1
            self._note(f"{status} {body[:100]!r}", sent)

    def found_change(self, what: str, sent: Sent) -> None:
        """Note that what was refused changed the state."""
        self.changed_by_refused += 1
        self._note(what, sent)

    def _note(self, what: str, sent: Sent) -> None:
        if len(self.examples) < 10:
            self.examples.append(f"{what}: {sent!r:.2000}")


def has_shape(status: int, body: bytes) -> bool:
    """Whether an answer is JSON, or figures for Prometheus, and an error of the one shape."""
    if status == 200:
        return body == b"" or body.startswith(b"# HELP ") or json.loads(body) is not None  # OPTIONS has no body
    error = json.loads(body)["error"]
    return set(error) == {"code", "message", "field"} and 0 < len(error["message"]) < 400


@dataclass(frozen=True)
class Probe:
    """How a part is sent to and looked at.

    Attributes:
        send: a request; status and body.
        digest: of all state; for once a block.
        sizes: of all state; for every request. What is made place for once is no change the second time.
        memory_mb: what the process has in RAM.
    """

    send: Callable[[Sent], tuple[int, bytes]]
    digest: Callable[[], str]
    sizes: Callable[[], object]
    memory_mb: Callable[[], float]


def run_blocks(part: Part, requests: Iterator[Sent], count: int, probe: Probe) -> None:
    """Send requests in blocks, and the refused ones of each block again, which must not change the digest."""
    began, half = time.perf_counter(), 0.0
    refused: list[Sent] = []
    while part.generated < count:
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        refused = []
        sizes = probe.sizes()
        for _ in range(min(BLOCK, count - part.generated)):
            sent = next(requests)
            status = timed(part, sent, probe.send)
            before, sizes = sizes, probe.sizes()
            if 400 <= status < 500:
                refused.append(sent)
                if sizes != before:
                    part.found_change(f"{before} to {sizes}", sent)
        digest = probe.digest()
        again = [probe.send(sent)[0] for sent in refused]
        if 200 in again:
            part.found_change("refused, then accepted", refused[again.index(200)])
        elif probe.digest() != digest:
            part.found_change("one of a block", refused[0])
        if half == 0.0 and part.generated >= count / 2:
            half = probe.memory_mb()
    end = probe.memory_mb()
    for _ in range(AGAIN):
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        for sent in refused:
            probe.send(sent)
    faulthandler.cancel_dump_traceback_later()
    part.growth_mb = round(end - half, 2)
    part.growth_refused_mb = round(probe.memory_mb() - end, 2)
    part.seconds = round(time.perf_counter() - began, 1)
    part.slowest_ms = round(part.slowest_ms, 1)


def timed(part: Part, sent: Sent, send: Callable[[Sent], tuple[int, bytes]]) -> int:
    """Send one and count it; its status."""
    began = time.perf_counter()
    status, body = send(sent)
    part.count(sent, status, body, time.perf_counter() - began)
    return status


def resident_mb(pid: int | str = "self") -> float:
    """Memory of a process that is in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no memory of process {pid}")


# ---- the app in this process


def fuzz_app(bundle: Bundle, count: int, seed: int, folder: Path) -> Part:
    """Requests to the WSGI app over a real service."""
    part = Part()
    with Service(bundle, folder, snapshot_every=None) as service:
        app = create_app(service, max_body_bytes=30_000)
        requests = iter(Generator(bundle.manifest.schema, seed))
        probe = Probe(lambda sent: call(app, sent), lambda: digest_of(service), lambda: sizes_of(service), resident_mb)
        run_blocks(part, requests, count, probe)
    return part


def call(app: Any, sent: Sent) -> tuple[int, bytes]:
    """One request as a WSGI server makes it."""
    path, _, query = sent.path.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": sent.method,
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "fuzz",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(sent.body),
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
    }
    if sent.content_type:
        environ["CONTENT_TYPE"] = sent.content_type
    if sent.encoding:
        environ["HTTP_CONTENT_ENCODING"] = sent.encoding
    if sent.chunked:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    else:
        environ["CONTENT_LENGTH"] = str(len(sent.body))
    statuses: list[str] = []
    body = b"".join(app(environ, lambda status, headers, exc_info=None: statuses.append(status)))
    return int(statuses[-1][:3]), body


def sizes_of(service: Service) -> tuple[int, ...]:
    """How much of everything a service has in memory and in its journal."""
    labels, memory = service.engine.labels, service.engine.memory
    parts = (service.engine.users.slots, service.engine.context.rows, labels.heap, memory.early)
    return (*map(len, parts), labels.open.end, labels._head, service.journal.last_seq)


def digest_of(service: Service) -> str:
    """Of everything that a service has in memory and in its log."""
    users, context, labels, memory = (
        service.engine.users,
        service.engine.context,
        service.engine.labels,
        service.engine.memory,
    )
    digest = hashlib.blake2b(repr((users.names, context.names, memory.early, sorted(labels.heap))).encode())
    for array in users.arrays.values():
        digest.update(array[: len(users.slots)].tobytes())
    for row in context.rows.values():
        for part in (context.newest[row], context.sums[row], context.run[row], context.effects[row]):
            digest.update(part.tobytes())
    for columns in labels.open.copy():
        for column in columns.values():
            digest.update(column.tobytes())
    digest.update(labels.frauds.dump() + repr((labels._head, labels._silence, service.journal.last_seq)).encode())
    digest.update(digest_of_log(service._state).encode())
    return digest.hexdigest()


def digest_of_log(state: Path) -> str:
    """Of the files' lengths, and the last one's bytes: it is only appended to."""
    files = sorted((state / "journal").iterdir())
    digest = hashlib.blake2b(repr([(file.name, file.stat().st_size) for file in files]).encode())
    digest.update(files[-1].read_bytes())
    return digest.hexdigest()


# ---- a real server


def fuzz_server(bundle: Bundle, count: int, seed: int, folder: Path) -> Part:
    """Requests to a server process over a keep-alive connection, which only what closes it by design may end."""
    part = Part()
    settings = folder / "serve.toml"
    settings.write_text("[server]\nmax_body_bytes = 30000\n")
    process = processes.start_service(bundle.path, folder / "state", "--settings", str(settings))
    try:
        client = KeptAlive(processes.address(process))
        requests = iter(Generator(bundle.manifest.schema, seed))

        def digest() -> str:
            records = json.loads(client.send(Sent(b"", "/v1/model", "GET"))[1])
            return f"{records['users']} {records['journal_records']} {digest_of_log(folder / 'state')}"

        run_blocks(part, requests, count, Probe(client.send, digest, lambda: None, lambda: resident_mb(process.pid)))
        part.hangs += client.hangs
        if process.poll() is not None:
            part.five_hundreds += 1
            part.examples.append(f"the server ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait(30)
    return part


class KeptAlive:
    """A connection that is opened again where the server closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=DEADLINE_S)
        self.hangs = 0

    def send(self, sent: Sent) -> tuple[int, bytes]:
        """Status and body; 599 where no answer came within the deadline."""
        for _ in range(2):
            try:
                return self._try(sent)
            except (ConnectionError, http.client.RemoteDisconnected, http.client.CannotSendRequest):
                self._connection.close()  # closed after a body that was not read to its end: once more, on a new one
            except TimeoutError:
                self._connection.close()
                self.hangs += 1
                return 599, b""
        return 599, b""

    def _try(self, sent: Sent) -> tuple[int, bytes]:
        connection = self._connection
        connection.putrequest(sent.method, sent.path, skip_accept_encoding=True)
        if sent.content_type and sent.content_type.isprintable():
            connection.putheader("Content-Type", sent.content_type)
        if sent.encoding:
            connection.putheader("Content-Encoding", sent.encoding)
        if sent.chunked:
            connection.putheader("Transfer-Encoding", "chunked")
            middle = len(sent.body) // 2
            pieces = [piece for piece in (sent.body[:middle], sent.body[middle:]) if piece]
            connection.endheaders(b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
        else:
            connection.putheader("Content-Length", str(len(sent.body)))
            connection.endheaders(sent.body)
        answer = connection.getresponse()
        return answer.status, answer.read()


# ---- the decoder


def fuzz_decoder(bundles: list[Bundle], runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Coverage-guided, in a process of its own. `failed` is what it said where it stopped early, else empty."""
    corpus, out, words = folder / "corpus", folder / "counts.json", folder / "words.txt"
    corpus.mkdir()
    columns: set[str] = {"transaction_id", "is_fraud", "known_at", "source"}
    for number, bundle in enumerate(bundles):
        generator = Generator(bundle.manifest.schema, seed)
        columns |= set(bundle.manifest.schema.fields)
        for i in range(150):
            sent = generator.request()
            kind = {SCORE: 2 + i % 6, BATCH: 1, LABELS: 0}.get(sent.path, 2)
            choice = kind * 2 * len(bundles) + 2 * number + i % 2
            (corpus / f"{number}-{i}").write_bytes(bytes([choice]) + sent.body[:4000])
    tokens = {*(f'"{column}":'.encode() for column in columns), *(s for s in SPELLINGS if 0 < len(s) < 60)}
    words.write_text("".join('"' + "".join([f"\\x{byte:02x}" for byte in token]) + '"\n' for token in sorted(tokens)))
    options = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=4096", f"-dict={words}", f"-artifact_prefix={folder}/"]
    # what it takes for its own peak is the largest that whoever starts it ever had: exec keeps ru_maxrss
    options += ["-rss_limit_mb=0", "-malloc_limit_mb=2048"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.fuzz_decoder",
        str(out),
        *(str(b.path) for b in bundles),
        "--",
        *options,
    ]
    began = time.perf_counter()
    done = subprocess.run([*command, f"-timeout={DEADLINE_S:.0f}", str(corpus)], capture_output=True, text=True, check=False, cwd=processes.ROOT)  # fmt: skip
    counts = json.loads(out.read_text()) if out.exists() else {}
    covered = [line for line in done.stderr.splitlines() if " cov: " in line]
    refused = {name.split()[1]: number for name, number in sorted(counts.items()) if name.startswith("refused")}
    return {
        "generated": counts.get("generated", 0),
        "accepted": counts.get("accepted", 0),
        "refused": refused,
        "covered": int(covered[-1].split(" cov: ")[1].split()[0]) if covered else 0,
        "seconds": round(time.perf_counter() - began, 1),
        "failed": "" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:],
    }


@contextlib.contextmanager
def drawn_bundles() -> Iterator[tuple[list[Bundle], Path]]:
    """The bundles of benchmarks/drawn.py, and a folder that lasts as long."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        texts: list[tuple[str, tuple[str, ...]]] = [(CARDS, ()), (PLAIN, ()), (RICH, ("age",))]
        yield (
            [
                drawn_bundle(folder / f"bundle{i}", parse_config(text, "fuzz"), missing, 0, 2.5)
                for i, (text, missing) in enumerate(texts)
            ],
            folder,
        )


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz")
    parser.add_argument("--decoder", type=int, default=700_000, help="counted in steps of 10,000")
    parser.add_argument("--app", type=int, default=250_000)
    parser.add_argument("--server", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args(arguments)
    with drawn_bundles() as (bundles, folder):
        decoder = fuzz_decoder(bundles, chosen.decoder, chosen.seed, folder)
        print("decoder", json.dumps(decoder), flush=True)
        parts: dict[str, Part] = {}
        for i, name in enumerate(("cards", "plain", "rich")):
            share = chosen.app // 3 + (i < chosen.app % 3)
            parts[f"app_{name}"] = fuzz_app(bundles[i], share, chosen.seed + i, folder / f"app{i}")
            print(f"app_{name}", json.dumps(asdict(parts[f"app_{name}"])), flush=True)
        (folder / "server").mkdir()
        parts["server"] = fuzz_server(bundles[2], chosen.server, chosen.seed, folder / "server")
        print("server", json.dumps(asdict(parts["server"])), flush=True)
    total = decoder["generated"] + sum(part.generated for part in parts.values())
    found = [name for name, part in parts.items() if not part.good] + ["decoder"] * bool(decoder["failed"])
    five_hundreds, hangs = (sum(getattr(p, name) for p in parts.values()) for name in ("five_hundreds", "hangs"))
    print(f"{total:,} bodies, {five_hundreds} answers of 500 or more, {hangs} hangs; found: {found or 'nothing'}")
    if chosen.write:
        result = {"generated": total, "five_hundreds": five_hundreds, "hangs": hangs, "decoder": decoder}
        print(processes.write_result("fuzz", {**result, **{name: asdict(part) for name, part in parts.items()}}))
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
