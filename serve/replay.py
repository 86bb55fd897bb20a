"""Stream a file through a running service over HTTP, one transaction at a time, labels when they become known."""

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from seqfraud.errors import RunError
from seqfraud.table import Transactions
from serve.arrivals import arrivals

TIMEOUT_S = 30.0
LABELS = 1000
"""Labels of one request at most; a service takes so many."""


class Client:
    """One keep-alive connection to a service; a certificate has to lead to a root that this machine trusts."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RunError(f"--url: {url!r} is not an address such as http://127.0.0.1:8000")
        self._url = url
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = connect(parts.hostname, parts.port or (443 if secure else 80), timeout=TIMEOUT_S)
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
        probability: by transaction id.
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
    *,
    since: int | None = None,
    until: int | None = None,
    limit: int | None = None,
    rate: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replayed:
    """Post transactions in arrival order, at most `rate` per second, and labels before the first that may know them.

    Raises:
        RunError: the service refuses something; the message has its words.
    """
    out = Replayed()
    began = time.perf_counter()
    for arrival in arrivals(table, label_delay, since, until):
        if limit is not None and len(out.seconds) >= limit:
            break
        for at in range(0, len(arrival.labels), LABELS):
            said = [vars(label) for label in arrival.labels[at : at + LABELS]]
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
                f"row {int(table.file_row[arrival.row]) + 1}: the service answers without its model: {answer['reasons'][0]}"
            )
        out.probability[answer["transaction_id"]] = answer["fraud_probability"]
        out.decisions[answer["decision"]] = out.decisions.get(answer["decision"], 0) + 1
        out.duplicates += answer["duplicate"]
        if progress:
            progress(1)
    return out


def _require(status: int, answer: Any, where: str) -> None:
    if status != 200:
        raise RunError(f"{where}: the service answered {status}: {answer.get('error', {}).get('message', answer)}")
