"""An interrupted training goes on to the result it would have had."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from seqfraud.errors import RunError
from training.resume import FILE
from training.run import train_run
from training.simulate import Simulation, simulate_to

CONFIG = """
[data]
path = "data.parquet"
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id"]
[split]
train_end = "2025-02-10"
validation = "10d"
[model]
hidden = 8
input_width = 8
head_width = 8
[training]
epochs = 4
users_per_batch = 32
dropout = 0.2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    simulate_to(Simulation(users=150, days=50, fraud_share=0.03), folder / "data.parquet")
    (folder / "config.toml").write_text(CONFIG)
    torch.set_num_threads(1)
    train_run(folder / "config.toml", None, folder / "whole", "cpu")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(str(run / "model.safetensors"))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stopped(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_stopped_in_the_middle_of_an_epoch(folder: Path, after: int) -> None:
    def stop(epoch: int, share: float, events: int, report: object) -> None:
        if epoch == after and report is None and share > 0.4:
            raise Stopped

    out = folder / f"stopped{after}"
    with pytest.raises(Stopped):
        train_run(folder / "config.toml", None, out, "cpu", stop)
    assert (out / FILE).is_file()
    assert not (out / "metrics.json").exists()
    metrics = train_run(folder / "config.toml", None, out, "cpu", resume=True)
    assert [e["epoch"] for e in metrics["epochs"]] == [1, 2, 3, 4]
    assert_same(weights(folder / "whole"), weights(out))
    assert not (out / FILE).exists()


def test_killed_process(folder: Path) -> None:
    """kill -9 as soon as one epoch is kept."""
    out = folder / "killed"
    command = [sys.executable, "-m", "training", str(folder / "config.toml"), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / FILE).is_file():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True)
    assert_same(weights(folder / "whole"), weights(out))


def test_another_configuration_is_refused(folder: Path) -> None:
    def stop(epoch: int, share: float, events: int, report: object) -> None:
        if epoch == 1:
            raise Stopped

    out = folder / "other"
    with pytest.raises(Stopped):
        train_run(folder / "config.toml", None, out, "cpu", stop)
    other = folder / "other.toml"
    other.write_text(CONFIG.replace("dropout = 0.2", "dropout = 0.1"))
    with pytest.raises(RunError, match="another configuration"):
        train_run(other, None, out, "cpu", resume=True)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    out = folder / "damaged"
    out.mkdir()
    (out / FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(RunError, match="damaged"):
        train_run(folder / "config.toml", None, out, "cpu", resume=True)


def test_a_file_of_other_weights_is_refused(folder: Path) -> None:
    """As a version in which the weights had other names left it."""

    def stop(epoch: int, share: float, events: int, report: object) -> None:
        if epoch == 1:
            raise Stopped

    out = folder / "older"
    with pytest.raises(Stopped):
        train_run(folder / "config.toml", None, out, "cpu", stop)
    with safetensors.safe_open(str(out / FILE), "pt") as file:
        state = file.metadata()
        tensors = {name.replace("networks.0.", ""): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, str(out / FILE), state)
    with pytest.raises(RunError, match="was kept by another version; train without --resume"):
        train_run(folder / "config.toml", None, out, "cpu", resume=True)


def test_nothing_to_resume_trains_from_the_start(folder: Path) -> None:
    train_run(folder / "config.toml", None, folder / "fresh", "cpu", resume=True)
    assert_same(weights(folder / "whole"), weights(folder / "fresh"))
