"""Who may import whom, read from the source; and what a running service has really loaded."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("seqfraud", "training", "export", "serve")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
HEAVY = {"torch", "pandas", "sklearn", "onnx", "safetensors", "skl2onnx", "matplotlib"}

FORBIDDEN: dict[str, set[str]] = {
    "seqfraud": {"training", "export", "serve", *HEAVY},
    "seqfraud.nn": {"training", "export", "serve"},
    "training": {"export", "serve"},
    "export": {"training", "serve"},
    "serve": {"seqfraud.nn", "training", "export", *HEAVY},
}
"""What the modules of a package do not import; the longest name counts."""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported anywhere in a module, `from a import b` as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def refused(names: Iterator[tuple[int, str]], forbidden: set[str]) -> list[tuple[int, str]]:
    return [(line, name) for line, name in names if any(name == f or name.startswith(f + ".") for f in forbidden)]


@pytest.mark.parametrize("file", SOURCES, ids=module_of)
def test_a_module_imports_only_what_its_package_may(file):
    module = module_of(file)
    rule = max((p for p in FORBIDDEN if module == p or module.startswith(p + ".")), key=len)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = refused(imported(ast.parse(file.read_text(encoding="utf-8")), package), FORBIDDEN[rule])
    assert not found, f"{file.relative_to(ROOT)} may not import these: {found}"


def test_the_rule_sees_every_way_to_import():
    source = (
        "import training.run\nfrom torch import nn\nfrom seqfraud import nn\ndef f():\n    import seqfraud.nn.model as m\n"
        "from . import labels\nfrom seqfraud.nnn import x\nimport torchlike\n"
    )
    found = refused(imported(ast.parse(source), "serve"), FORBIDDEN["serve"])
    assert {line for line, _ in found} == {1, 2, 3, 5}
    source = "from ..nn import model\nfrom .nn import x\nfrom .. import nn\n"
    relative = refused(imported(ast.parse(source), "seqfraud.deep"), {"seqfraud.nn"})
    assert {line for line, _ in relative} == {1, 3}


def test_there_is_something_to_look_at():
    assert {module_of(file) for file in SOURCES} >= {
        "seqfraud.cli",
        "seqfraud.nn.model",
        "training.run",
        "serve.service",
    }


# ---- what a running service has loaded

SCORE_ONE = """
import json, sys, tempfile
from pathlib import Path
import serve.commands, serve.service, serve.server, serve.app
from seqfraud.bundle import open_bundle
with tempfile.TemporaryDirectory() as state:
    with serve.service.Service(open_bundle(Path(sys.argv[1])), Path(state)) as service:
        row = {"id": 1, "user": "ann", "time": 1600000000000, "amount": 5, "merchant": "m"}
        answer = json.loads(service.score(json.dumps(row).encode()))
        service.add_labels(b'[{"transaction_id": 1, "is_fraud": true}]')
        serve.app.create_app(service)
json.dump({"answer": answer, "modules": sorted({name.partition(".")[0] for name in sys.modules}),
           "ours": sorted(name for name in sys.modules if name.startswith(("seqfraud", "serve")))}, sys.stdout)
"""


@pytest.fixture(scope="module")
def loaded(cards) -> dict:
    args = [sys.executable, "-c", SCORE_ONE, str(cards.path)]
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["answer"]["fraud_probability"] < 1
    return found


@pytest.mark.parametrize("name", [*sorted(HEAVY), "pyarrow", "training", "export"])
def test_a_service_that_scores_has_not_loaded(loaded, name):
    """The service is installed and starts without them."""
    assert name not in loaded["modules"]


def test_a_service_that_scores_has_loaded_what_it_is_made_of(loaded):
    assert {"onnxruntime", "numpy", "msgspec", "hug", "granian", "sqlite3"} <= set(loaded["modules"])
    assert "seqfraud.nn" not in loaded["ours"]
    assert "seqfraud.reading" not in loaded["ours"]


@pytest.mark.parametrize("module", ["training", "export"])
def test_a_command_of_another_part_is_not_loaded_by_the_list_of_commands(module):
    program = f"import sys, seqfraud.cli; seqfraud.cli.main(['--help']); sys.exit('{module}' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 0
