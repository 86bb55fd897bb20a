"""Stream a file through a running service over HTTP, one transaction at a time, labels when they become known."""

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from seqfraud.config import IdentifiersConfig
from seqfraud.errors import RunError
from seqfraud.identifiers import KEY_BYTES, Identifiers
from seqfraud.table import Transactions
from serve.arrivals import arrivals

TIMEOUT_S = 30.0
KEPT = IdentifiersConfig("keep")
SOURCE = "replay"
LABELS = 1000
"""Labels of one request at most; a service takes so many."""


class Client:
    """One keep-alive connection to a service; a certificate has to lead to a root that this machine trusts."""

    def __init__(self, url: str, key: str | None = None, timeout: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RunError(f"--url: {url!r} is not an address such as http://127.0.0.1:8000")
        self._url = url
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = connect(parts.hostname, parts.port or (443 if secure else 80), timeout=timeout)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def call(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        """Status and decoded JSON of a request. Raises RunError where nobody answers."""
        body = None if content is None else json.dumps(content).encode()
        try:
            self._connection.request(method, path, body, self._headers)
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise RunError(f"{self._url}{path}: no answer: {error}") from error


@dataclass
class Replayed:
    """What came back.

    Attributes:
        probability: by the id that the file gives the row, which the service's answer need not have.
        seconds: request to answer of every transaction, in order.
    """

    probability: dict[str, float] = field(default_factory=dict)
    decisions: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    labels: int = 0
    seconds: list[float] = field(default_factory=list)

    def largest_difference(self, against: Mapping[str, float]) -> tuple[float, int]:
        """Largest difference to other probabilities by id, and the number compared."""
        shared = [abs(p - against[i]) for i, p in self.probability.items() if i in against]
        return max(shared, default=0.0), len(shared)


def replay(
    client: Client,
    table: Transactions,
    label_delay: int,
    policy: IdentifiersConfig = KEPT,
    key: bytes | None = None,
    *,
    since: int | None = None,
    until: int | None = None,
    limit: int | None = None,
    rate: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replayed:
    """Post transactions in arrival order, at most `rate` per second, and labels before the first that may know them.

    Args:
        policy: the service's identifier policy, by which the ids that it derives may depend on its key.
        key: that key; without it the service is asked for such ids, a loaded transaction's by posting it again.
        since, until: ms.

    Raises:
        RunError: the service refuses something; the message has its words.
    """
    out = Replayed()
    began = time.perf_counter()
    names = _Names(client, table, policy, key)
    for arrival in arrivals(table, label_delay, since, until):
        if limit is not None and len(out.seconds) >= limit:
            break
        for at in range(0, len(arrival.labels), LABELS):
            said = [
                {"transaction_id": names.of(d.row), "is_fraud": d.is_fraud, "known_at": d.known_at, "source": SOURCE}
                for d in arrival.labels[at : at + LABELS]
            ]
            status, answer = client.call("POST", "/v1/labels", said)
            _require(status, answer, "/v1/labels")
            out.labels += len(said)
        if arrival.row is None:
            continue
        if rate is not None:
            wait = began + len(out.seconds) / rate - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
        sent = time.perf_counter()
        status, answer = client.call("POST", "/v1/score", arrival.transaction)
        out.seconds.append(time.perf_counter() - sent)
        _require(status, answer, f"/v1/score row {int(table.file_row[arrival.row]) + 1}")
        if answer.get("degraded"):
            raise RunError(
                f"row {int(table.file_row[arrival.row]) + 1}: the service answers without its model: "
                f"{answer['reasons'][0]['text']}"
            )
        names.heard(arrival.row, answer["transaction_id"])
        out.probability[names.local[arrival.row]] = answer["fraud_probability"]
        out.decisions[answer["decision"]] = out.decisions.get(answer["decision"], 0) + 1
        out.duplicates += answer["duplicate"]
        if progress:
            progress(1)
    return out


class _Names:
    """What the service calls the rows of a table."""

    def __init__(self, client: Client, table: Transactions, policy: IdentifiersConfig, key: bytes | None) -> None:
        self._client = client
        self._table = table
        self.local = Identifiers(table.schema, policy, key).table(table).id_texts()
        """By row, as `seqfraud score` writes them with the same key or without."""
        self._names = self.local.copy()
        self._unknown: set[int] = set()
        """Rows whose ids the service derives from hashed values, with a key that is not here."""
        if key is None and table.ids is None:
            otherwise = Identifiers(table.schema, policy, bytes(KEY_BYTES)).table(table).id_texts()
            self._unknown = {row for row, (a, b) in enumerate(zip(self.local, otherwise, strict=True)) if a != b}

    def of(self, row: int) -> str:
        """The id of a row for a label. A transaction that the service knows already says it when it is posted again."""
        if row in self._unknown:
            where = f"/v1/score row {int(self._table.file_row[row]) + 1}"
            (transaction,) = self._table.take(np.array([row])).raw_rows()
            status, answer = self._client.call("POST", "/v1/score", transaction)
            _require(status, answer, where)
            if not answer["duplicate"]:
                raise RunError(f"{where}: a label is about this transaction, which had not been loaded")
            self.heard(row, answer["transaction_id"])
        return self._names[row]

    def heard(self, row: int, name: str) -> None:
        """The service has said what it calls a row."""
        if row in self._unknown:
            self._unknown.discard(row)
            self._names[row] = name


def _require(status: int, answer: Any, where: str) -> None:
    if status != 200:
        raise RunError(f"{where}: the service answered {status}: {answer.get('error', {}).get('message', answer)}")
