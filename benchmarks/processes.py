"""Commands and a service as processes: what the demonstration and the benchmarks have in common."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"
SEQFRAUD = Path(sys.executable).parent / "seqfraud"


def command(*args: object) -> None:
    """Run a subcommand; it prints for itself."""
    words = [str(a) for a in args]
    print("\n$ seqfraud", *words, flush=True)
    subprocess.run([SEQFRAUD, *words], check=True, cwd=ROOT)


def command_json(*args: object, codes: Collection[int] = (0,)) -> Any:
    """Run a subcommand with --json and return its result; `codes` are the exit codes with which there is one."""
    words = [*(str(a) for a in args), "--json"]
    print("\n$ seqfraud", *words, flush=True)
    done = subprocess.run([SEQFRAUD, *words], stdout=subprocess.PIPE, check=False, cwd=ROOT)
    if done.returncode not in codes:
        raise subprocess.CalledProcessError(done.returncode, done.args)
    return json.loads(done.stdout)


def start_service(bundle: Path, state: Path, *options: str, models: str = "--bundle") -> subprocess.Popen[str]:
    """A service process on a free port; `address` waits until it answers. With `models` "--registry", `bundle` is one."""
    words = ["serve", models, str(bundle), "--state", str(state), "--port", "0", *options]
    return subprocess.Popen([SEQFRAUD, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def address(process: subprocess.Popen[str]) -> str:
    """Where a service that was started answers. Raises RuntimeError where it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the service did not start")
    return line.split()[-1]


@contextmanager
def service(bundle: Path, state: Path, *options: str, models: str = "--bundle") -> Iterator[str]:
    """A running service; its address, once it answers. SIGTERM at the end."""
    print("\n$ seqfraud serve", models, bundle, "--state", state, *options, flush=True)
    process = start_service(bundle, state, *options, models=models)
    try:
        url = address(process)
        print(f"seqfraud serving on {url}", flush=True)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def environment() -> dict[str, Any]:
    """What ran: for the record beside figures."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "onnxruntime", "granian", "hug", "msgspec")},
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{name}.json"
    out.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n", encoding="utf-8")
    return out
