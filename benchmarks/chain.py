"""The hash chain of the log: what it adds to an append, for each hash, and how quickly a journal is verified.

    python -m benchmarks.chain

Microseconds of processor time per append of a record of usual size to the log alone, and to the whole journal (encoding and
locks, the disk synced and the index folded meanwhile), with the chain, without, and with other hashes; rounds are
interleaved, so the ratios are of one run, on a machine that may have other work. Writes benchmarks/results/chain.json.
"""

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.processes import write_result
from serve import log as log_module
from serve.audit import audit
from serve.journal import Journal
from serve.log import BEGINNING, HEAD_BYTES, SEGMENT_BYTES, SYSTEM_DISK, Log
from serve.records import TransactionRecord, encode_transaction

ROUNDS = 15
APPENDS = 1_000
VERIFIED = 50_000
START_MS = 1_750_000_000_000
HASHES = ("blake2b", "blake2s", "sha1", "sha256", "sha512", "sha3_256")
Head = Callable[[bytes, int, int, bytes], bytes]


def record(seq: int) -> TransactionRecord:
    """As in benchmarks.journal: five fields, 64 numbers of context."""
    raw = {"id": f"t{seq}", "user": f"u{seq % 1000}", "time": START_MS + seq, "amount": 81.5, "category": "groceries"}
    answer = {"transaction_id": f"t{seq}", "fraud_probability": 0.0123456789, "is_fraud": False, "decision": "approve",
              "reasons": [], "model": "b" * 16, "history": 7, "late": False, "duplicate": False}  # fmt: skip
    return TransactionRecord(
        seq, f"t{seq}", f"u{seq % 1000}", START_MS + seq, bytes(16), json.dumps(raw).encode(), bytes(256),
        json.dumps(answer).encode(), "b" * 16,
    )  # fmt: skip


def no_head(before: bytes, seq: int, taken: int, payload: bytes) -> bytes:
    """The log as it was before there was a chain, but for the room that a head takes."""
    return before


def head_by(name: str) -> Head:
    """`next_head` with another hash, of which it keeps 32 bytes or fewer."""
    make = getattr(hashlib, name)

    def head(before: bytes, seq: int, taken: int, payload: bytes) -> bytes:
        numbers = log_module._NUMBERS.pack(seq, taken)
        digest: bytes = make(before + numbers + make(payload).digest()[:HEAD_BYTES]).digest()[:HEAD_BYTES]
        return digest.ljust(HEAD_BYTES, b"\0")

    return head


HEADS: dict[str, Head] = {"none": no_head, "chain": log_module.next_head, **{name: head_by(name) for name in HASHES}}


def rounds(append: Callable[[str], Callable[[int], object]], names: list[str]) -> dict[str, dict[str, float]]:
    """Median over the rounds of the microseconds per append under each head, and its ratio to none."""
    appends = {name: append(name) for name in names}
    counts = {name: itertools.count(1) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            with mock.patch.object(log_module, "next_head", HEADS[name]):
                began = time.thread_time()
                for _ in range(APPENDS):
                    appends[name](next(counts[name]))
                taken[name].append((time.thread_time() - began) / APPENDS * 1e6)
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {name: {"us": round(us, 2), "ratio": round(us / middle["none"], 2)} for name, us in middle.items()}


def log_appends(work: Path) -> dict[str, dict[str, float]]:
    payload = encode_transaction(record(1))

    def append(name: str) -> Callable[[int], object]:
        folder = work / f"log-{name}"
        folder.mkdir()
        log = Log(folder, [], BEGINNING, 0, SYSTEM_DISK, SEGMENT_BYTES)
        return lambda _: log.append(1, payload)

    return rounds(append, list(HEADS))


def journal_appends(work: Path) -> dict[str, dict[str, float]]:
    opened: list[Journal] = []

    def append(name: str) -> Callable[[int], object]:
        folder = work / f"journal-{name}"
        folder.mkdir()
        journal = Journal(folder)
        opened.append(journal)
        return lambda seq: journal.append_transaction(record(seq))

    result = rounds(append, ["none", "chain"])
    for journal in opened:
        journal.close()
    return result


def verified(work: Path) -> float:
    """Records per second of processor time of `seqfraud verify --state`."""
    journal = Journal(work)
    with journal.group():
        for seq in range(1, VERIFIED + 1):
            journal.append_transaction(record(seq))
    journal.close()
    began = time.thread_time()
    found = audit(work)
    if found.first_bad is not None or found.records != VERIFIED:
        raise SystemExit(f"the journal is not whole: {found.reason}")
    return round(VERIFIED / (time.thread_time() - began))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="seqfraud-chain-") as folder:
        work = Path(folder)
        (work / "verified").mkdir()
        result = {
            "payload_bytes": len(encode_transaction(record(1))),
            "head_bytes": HEAD_BYTES,
            "log_append": log_appends(work),
            "journal_append": journal_appends(work),
            "verified_per_second": verified(work / "verified"),
        }
    write_result("chain", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
