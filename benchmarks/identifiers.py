"""What hashing identifiers costs a request: decoding a transaction without a policy, and with each, by kind of user.

    python -m benchmarks.identifiers [--rounds 200]

Writes benchmarks/results/identifiers.json. Microseconds of CPU per transaction with a user and three other texts, the
least of many short rounds in turn, so that a busy machine disturbs all alike.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.drawn import CARDS, drawn_bundle
from benchmarks.processes import write_result
from seqfraud.config import IdentifiersConfig, parse_config
from seqfraud.identifiers import Identifiers
from serve.decoding import TransactionDecoder

CALLS = 500
USERS = {
    "short": "u12345",
    "uuid": "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
    "16 digits, no card": "4111111111111112",
    "card": "4111111111111111",
}
POLICIES = {
    "none": None,
    "keep": IdentifiersConfig("keep"),
    "cards": IdentifiersConfig("cards"),
    "hash": IdentifiersConfig("hash"),
}


def body(user: str) -> bytes:
    """One request."""
    content = {
        "id": 5,
        "user": user,
        "time": 1_700_000_000_000,
        "amount": 5.5,
        "kind": "a",
        "merchant": "m123",
        "device": "d9",
    }
    return json.dumps(content).encode()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        manifest = drawn_bundle(Path(folder) / "bundle", parse_config(CARDS, "CARDS"), (), 0, 2.5).manifest
    decoders = {
        name: TransactionDecoder(
            manifest, identifiers=None if policy is None else Identifiers(manifest.schema, policy, bytes(32))
        )
        for name, policy in POLICIES.items()
    }
    bodies = {name: body(user) for name, user in USERS.items()}
    least = {policy: dict.fromkeys(USERS, float("inf")) for policy in POLICIES}
    for _ in range(rounds):
        for policy, decoder in decoders.items():
            for user, sent in bodies.items():
                began = time.process_time()
                for _ in range(CALLS):
                    decoder.decode(sent)
                least[policy][user] = min(least[policy][user], (time.process_time() - began) / CALLS * 1e6)
    for policy, figures in least.items():
        print(f"{policy:6}" + "".join(f"  {user} {figure:.2f} us" for user, figure in figures.items()))
    write_result("identifiers", {"microseconds": {p: {u: round(f, 2) for u, f in v.items()} for p, v in least.items()}})


if __name__ == "__main__":
    sys.exit(main())
