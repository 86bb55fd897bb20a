"""Everything in real processes: from nothing to a service that answers what bulk scoring says, and survives kill -9."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import pytest

from seqfraud.signature import new_key
from serve.replay import Client

INSTALLED = Path(sys.executable).with_name("seqfraud")
SEQFRAUD = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "seqfraud.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SINCE = "2025-01-22"
CONFIG = """
[data]
path = "transactions.parquet"
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
label_delay = "2d"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id", "device_id", "user_id"]
ip = ["ip"]
geo = [["lat", "long"]]
half_lives = ["1h", "1d", "7d"]
[split]
validation = "6d"
train_end = "2025-01-20"
[model]
members = 2
hidden = 8
input_width = 16
head_width = 16
[training]
epochs = 2
users_per_batch = 8
[serve]
window = 8
"""


def seqfraud(*args: str | Path, code: int = 0) -> Any:
    """Run a command to its end; its JSON where `--json` asks for it, else its last line on stderr."""
    command = [*SEQFRAUD, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    if code:
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout) if "--json" in args else done.stdout


@dataclass(frozen=True)
class World:
    """Files that the tests of this module start from. `state` is loaded up to SINCE and served by nobody."""

    folder: Path
    data: Path
    bundle: Path
    scores: Path
    state: Path
    model: str
    loaded: dict[str, Any]
    rest: int

    def copy_of_state(self, name: str) -> Path:
        return Path(shutil.copytree(self.state, self.folder / name))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """simulate -> train -> export -> verify -> score -> load, as a person would."""
    folder = tmp_path_factory.mktemp("world")
    data, bundle, scores, state = (folder / n for n in ("transactions.parquet", "bundle", "scores.parquet", "state"))
    (folder / "config.toml").write_text(CONFIG)
    simulated = seqfraud("simulate", "--out", data, "--users", "60", "--days", "25", "--seed", "10", "--json")
    trained = seqfraud("train", folder / "config.toml", "--out", folder / "run", "--device", "cpu", "--json")
    assert len(trained["epochs"]) <= 2
    new_key(folder / "release.key")
    exported = seqfraud("export", folder / "run", "--out", bundle, "--sign", folder / "release.key", "--json")
    verified = seqfraud("verify", bundle, "--trusted-keys", folder / "release.key.pub", "--json")
    assert all(figures["probability"] <= 1e-5 for figures in verified.values())
    scored = seqfraud("score", bundle, data, "--out", scores, "--json")
    assert scored["rows"] == simulated["rows"] > 800
    loaded = seqfraud("load", data, "--bundle", bundle, "--state", state, "--until", SINCE, "--json")
    assert exported["model"] == scored["model"] == loaded["model"]
    times = parquet.read_table(data)["time"]
    rest = pc.sum(pc.greater_equal(times, pa.scalar(f"{SINCE}T00:00:00Z").cast(times.type))).as_py()
    assert loaded["transactions"] == simulated["rows"] - rest
    assert loaded["labels"] > 0
    return World(folder, data, bundle, scores, state, exported["model"], loaded, rest)


@dataclass
class Server:
    """One `seqfraud serve`."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def get(self, path: str) -> Any:
        status, answer = Client(self.url).call("GET", path)
        assert status == 200, answer
        return answer

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(bundle: Path, state: Path) -> Iterator[Server]:
    """A server on a free port; ended the hard way if the test did not end it."""
    log = state.with_suffix(".log")
    with log.open("a") as stream:
        process = subprocess.Popen(
            [*SEQFRAUD, "serve", "--bundle", str(bundle), "--state", str(state), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=ENVIRONMENT,
        )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if ready else "nothing within a minute"
        found = re.fullmatch(r"seqfraud serving on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, f"{line!r}\n{log.read_text()}"
        yield Server(process, found[1], log)
    finally:
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def replay(world: World, server: Server, *args: str | Path, code: int = 0) -> Any:
    return seqfraud("replay", world.data, "--url", server.url, "--since", SINCE, *args, "--json", code=code)


def test_a_served_stream_is_what_bulk_scoring_says(world):
    """And a second one gets the same as duplicates, SIGTERM is a clean end, and a restart remembers everything."""
    state = world.copy_of_state("stream")
    with serving(world.bundle, state) as server:
        first = replay(world, server, "--against", world.scores)
        assert (first["transactions"], first["compared"]) == (world.rest, world.rest)
        assert first["largest_difference"] <= 1e-5
        assert (first["duplicates"], first["model"]) == (0, world.model)
        assert first["labels"] > 0
        assert sum(first["decisions"].values()) == world.rest
        again = replay(world, server, "--against", world.scores)
        assert (again["duplicates"], again["largest_difference"]) == (world.rest, first["largest_difference"])
        before = server.get("/v1/model")
        assert before["journal_records"] > world.loaded["transactions"] + world.rest
        newest = parquet.read_table(world.data).to_pylist()[-1]
        user = server.get(f"/v1/users/{newest['user_id']}")
        assert server.stop() == 0
        assert '"exception"' not in server.log.read_text()
    with serving(world.bundle, state) as server:
        assert server.get("/v1/model") == before
        assert server.get(f"/v1/users/{newest['user_id']}") == user
        label = [{"transaction_id": newest["transaction_id"], "is_fraud": True}]
        assert Client(server.url).call("POST", "/v1/labels", label)[1]["new"] == 1
        answer = server.get(f"/v1/transactions/{newest['transaction_id']}")
        (said,) = answer.pop("labels")
        assert (said["is_fraud"], said["source"], said["author"]) == (True, "api", "anonymous")
        repeated = {**newest, "time": newest["time"].isoformat(), "is_fraud": None}
        assert Client(server.url).call("POST", "/v1/score", repeated) == (200, {**answer, "duplicate": True})
        assert server.stop() == 0


def test_kill_9_in_the_middle_of_a_replay_loses_nothing_that_was_answered(world):
    state = world.copy_of_state("killed")
    with serving(world.bundle, state) as server:
        at_start = server.get("/v1/model")["journal_records"]
        command = [*SEQFRAUD, "replay", str(world.data), "--url", server.url, "--since", SINCE, "--rate", "150"]
        streaming = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        deadline = time.monotonic() + 60
        while (stored := server.get("/v1/model")["journal_records"] - at_start) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.process.send_signal(signal.SIGKILL)
        _, words = streaming.communicate(timeout=60)
        assert streaming.returncode == 2
        assert re.fullmatch(r"error: http://.*: no answer: .*\n", words)
    with serving(world.bundle, state) as server:
        assert server.get("/v1/model")["journal_records"] - at_start >= stored
        done = replay(world, server, "--against", world.scores)
        assert 0 < done["duplicates"] < world.rest == done["compared"]
        assert done["largest_difference"] <= 1e-5
        assert server.stop() == 0


def test_a_difference_to_bulk_scoring_is_an_exit_code(world):
    """The comparison can fail: a service without the history does not say what bulk scoring says."""
    with serving(world.bundle, world.folder / "empty") as server:
        words = replay(world, server, "--against", world.scores, code=1)
        assert words == f"error: the probabilities differ from {world.scores} by more than 1e-05"
        words = seqfraud("load", world.data, "--bundle", world.bundle, "--state", world.folder / "empty", code=2)
        assert words.endswith("another process is using this state folder")
