"""Card numbers through real processes: score, load, serve and replay agree, and nothing on disk or in a log has one.

The data are as Sparkov's: users are card numbers of 13 to 19 digits, and there is no id column.
"""

import json
import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from seqfraud.bundle import Bundle
from seqfraud.config import format_instant
from seqfraud.identifiers import looks_like_card
from serve.identity import KEY_FILE
from serve.replay import Client

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
START = 1_736_899_200_000
HOUR = 3_600_000
SINCE = START + 60 * HOUR
TOML = """
[data]
{ids}
user = "cc_num"
time = "time"
label = "is_fraud"
label_delay = "20h"
amount = "amt"
[features]
numeric = ["amt"]
categorical = ["kind"]
context = ["merchant", "payee"]
half_lives = ["1h", "12h"]
[serve]
window = 3
[model]
hidden = 8
input_width = 8
head_width = 8
embedding = 4
"""
SCRIPT = textwrap.dedent(
    """
    import sys
    from seqfraud.cli import main
    from serve.engine import Engine

    score = Engine._score

    def crash(self, transaction, context):
        if transaction.amount == 666:
            raise KeyError(transaction.user, transaction.raw, "marker-crash")
        return score(self, transaction, context)

    Engine._score = crash
    sys.exit(main(sys.argv[1:]))
    """
)
"""The `seqfraud` command with a bug, whose exception quotes the request."""


def card(digits: int, number: int) -> str:
    """A number of so many digits that satisfies Luhn's checksum."""
    body = f"4{number:0{digits - 2}d}"
    return next(text for check in range(10) if looks_like_card(text := f"{body}{check}"))


OWN = 'transaction = "trans_num"'
CARDS = [int(card(13 + n % 7, 7919 * n + 1)) for n in range(12)]
PAYEES = [card(16, 31 * n) for n in range(5)]


def seqfraud(*args: str | Path, code: int = 0) -> tuple[Any, str]:
    """Run a command to its end; its JSON and what it said on stderr."""
    command = [sys.executable, "-c", SCRIPT, *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return (json.loads(done.stdout) if not code else None), done.stderr


@contextmanager
def serving(bundle: Bundle, state: Path, *args: str | Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The address of a server, and a function that stops it and returns everything that it said."""
    log = state.with_suffix(".log")
    command = [sys.executable, "-c", SCRIPT, "serve", "--bundle", str(bundle.path), "--state", str(state)]
    command += ["--port", "0", "--access-log", *map(str, args)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=ENVIRONMENT)

    def stop() -> str:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return log.read_text() + rest

    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        found = re.fullmatch(r"seqfraud serving on (\S+)\n", process.stdout.readline() if ready else "")
        assert found, log.read_text()
        yield found[1], stop
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 transactions, 2 an hour; card numbers as integers, payees as texts of which some are cards."""
    rng = np.random.default_rng(5)
    time = START + np.arange(180) * HOUR // 2
    columns = {
        "trans_num": [f"t{n}" for n in range(180)],
        "cc_num": pa.array(rng.choice(CARDS, 180), pa.int64()),
        "time": [format_instant(int(t)) for t in time],
        "amt": rng.choice([1.5, 20.0, 300.0], 180) + np.arange(180) / 1000,
        "kind": rng.choice(["a", "b", "c"], 180),
        "merchant": rng.choice(["m1", "m2", "m3"], 180),
        "payee": rng.choice([*PAYEES, "p1", "p2"], 180),
        "is_fraud": (rng.random(180) < 0.3).astype(np.int8),
    }
    path = tmp_path_factory.mktemp("sparkov") / "transactions.parquet"
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("ids", "policy", "key"),
    [("", "cards", False), ("", "cards", True), ("", "hash", False), (OWN, "hash", False), (OWN, "hash", True)],
)
def test_score_load_serve_and_replay_agree(make_bundle, data, tmp_path, ids, policy, key):
    own = bool(ids)
    columns = '\n[identifiers.columns]\ntrans_num = "hash"\n' if own and policy == "hash" else ""
    bundle = make_bundle(TOML.format(ids=ids) + f'[identifiers]\ndefault = "{policy}"{columns}\n')
    scores, journal, state = tmp_path / "scores.parquet", tmp_path / "journal.parquet", tmp_path / "state"
    since = format_instant(SINCE)
    loaded, _ = seqfraud("load", data, "--bundle", bundle.path, "--state", state, "--until", since)
    assert (loaded["transactions"], loaded["duplicates"]) == (120, 0)
    assert loaded["labels"] > 10
    given = ["--identifier-key", state / KEY_FILE] if key else []
    seqfraud("score", bundle.path, data, "--out", scores, *given)
    with serving(bundle, state) as (url, stop):
        replay = ["replay", data, "--url", url, "--since", since, "--against", scores, *given]
        first, _ = seqfraud(*replay)
        assert (first["transactions"], first["compared"], first["duplicates"]) == (60, 60, 0)
        assert first["labels"] > 10
        assert first["largest_difference"] <= 1e-5
        again, _ = seqfraud(*replay)
        assert (again["compared"], again["duplicates"]) == (60, 60)
        assert Client(url).call("GET", "/v1/model")[1]["journal_records"] == 180 + loaded["labels"] + first["labels"]
        stop()
    seqfraud("score", bundle.path, "--state", state, "--out", journal)
    offline, online = parquet.read_table(scores), parquet.read_table(journal)
    if key:  # the ids of the service, row by row
        assert offline["transaction_id"].to_pylist() == online["transaction_id"].to_pylist()
    elif own:
        assert offline["transaction_id"].to_pylist() == [f"t{n}" for n in range(180)]
    difference = np.abs(offline["fraud_probability"].to_numpy() - online["fraud_probability"].to_numpy())
    assert difference.max() <= 1e-5
    assert offline["fraud_probability"].to_numpy().std() > 0.05
    with sqlite3.connect(f"file:{state / 'journal.sqlite'}?mode=ro", uri=True) as db:
        (unknown,) = db.execute(
            "SELECT count(*) FROM labels WHERE transaction_id NOT IN (SELECT id FROM transactions)"
        ).fetchone()  # fmt: skip
    assert unknown == 0


def test_a_label_of_a_transaction_that_was_not_loaded_ends_a_replay_without_the_key(make_bundle, data, tmp_path):
    """It cannot be named, and leaving it out would silently change what is scored."""
    bundle = make_bundle(TOML.format(ids=""))
    with serving(bundle, tmp_path / "state") as (url, stop):
        _, words = seqfraud("replay", data, "--url", url, "--since", format_instant(SINCE), code=2)
        assert re.search(r"/v1/score row \d+: a label is about this transaction, which had not been loaded", words)
        stop()


def test_no_file_and_no_log_line_has_an_identifier(make_bundle, data, tmp_path):
    """Good, bad and crashing requests with card numbers and marked identifiers; then every byte is searched."""
    toml = TOML.format(ids=OWN) + (
        '[identifiers]\ndefault = "cards"\n[identifiers.columns]\ntrans_num = "hash"\nmerchant = "hash"\n'
    )
    bundle, state = make_bundle(toml), tmp_path / "state"
    _, loading = seqfraud("load", data, "--bundle", bundle.path, "--state", state)
    spaced, newest = "4111 1111 1111 1111", format_instant(START + 200 * HOUR)
    good = {"trans_num": "marker-id", "cc_num": "marker-user", "time": newest, "amt": 5, "kind": "marker-kind",
            "merchant": "marker-merchant", "payee": spaced}  # fmt: skip
    posts: list[tuple[str, Any, int]] = [
        ("/v1/score", good, 200),
        ("/v1/score", good, 200),
        ("/v1/score", {**good, "amt": 6}, 409),
        ("/v1/score", {**good, "trans_num": PAYEES[0], "cc_num": CARDS[0], "merchant": float(CARDS[1])}, 200),
        ("/v1/score", {**good, "trans_num": "marker-2", "cc_num": spaced, "kind": PAYEES[1]}, 200),
        ("/v1/score", {**good, "trans_num": "marker-3", "amt": 666}, 503),
        ("/v1/score", {**good, "trans_num": "marker-4", "cc_num": CARDS[2], "amt": "marker-amount"}, 422),
        ("/v1/score", {**good, "trans_num": "marker-5", "cc_num": ["marker-user"]}, 422),
        ("/v1/score", {**good, "trans_num": "", "cc_num": CARDS[2]}, 422),
        ("/v1/score/batch", [{**good, "trans_num": f"marker-b{n}", "cc_num": CARDS[n]} for n in range(5)] + ["x"], 200),
        ("/v1/labels", [{"transaction_id": "marker-id", "is_fraud": 1, "source": PAYEES[2]}], 200),
        ("/v1/labels", [{"transaction_id": "marker-unknown", "is_fraud": 1}], 200),
        ("/v1/labels", [{"transaction_id": "marker-id", "is_fraud": 7}], 422),
    ]
    gets = [("/v1/users/marker-user", 200), (f"/v1/users/{CARDS[0]}", 200), (f"/v1/users/{quote(spaced)}", 200),
            ("/v1/users/marker-none", 404), ("/v1/transactions/marker-id", 200), ("/v1/transactions/marker-none", 404),
            (f"/v1/transactions/{PAYEES[0]}", 200), (f"/v1/marker-address/{PAYEES[0]}", 404)]  # fmt: skip
    with serving(bundle, state) as (url, stop):
        client = Client(url)
        for path, content, status in posts:
            assert client.call("POST", path, content)[0] == status, (path, content)
        for path, status in gets:
            assert client.call("GET", path)[0] == status, path
        assert client.call("GET", "/v1/transactions/marker-id")[1]["transaction_id"] == "marker-id"
        said = stop()
    assert said.count("model_unavailable: KeyError") == 1
    assert said.count("/v1/users/{user}") == 4
    cards = [*map(str, CARDS), *PAYEES, spaced]
    for text in (*cards, "marker"):
        assert text not in said, text
        assert text not in loading, text
    files = [f for f in sorted(state.rglob("*")) if f.is_file()]
    assert {"journal.sqlite", KEY_FILE} < {f.name for f in files}
    assert any(f.name.startswith("snapshot-") for f in files)
    content = b"".join(f.read_bytes() for f in files)
    for text in (*cards, "marker-id", "marker-merchant", "marker-unknown", "marker-2", "marker-b1", "marker-3"):
        assert text.encode() not in content, text
    for text in ("marker-user", "marker-kind"):  # the policy keeps these; they show that the search can find
        assert text.encode() in content
