"""Hug imports beside a current NumPy, quietly, and leaves nothing behind."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def run(code: str, *options: str) -> str:
    """What `code` prints in a fresh interpreter, which must end well and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_imports_beside_numpy_2_without_a_warning() -> None:
    code = "from serve.hug_compat import hug; print(hug.__version__)"
    assert run(code, "-W", "error") == "2.6.1"


def test_nobody_imports_hug_or_falcon_past_it() -> None:
    """An `import falcon` before it, and Falcon's warning is out."""
    assert run("import serve.server; print('ok')", "-W", "error::DeprecationWarning") == "ok"


def test_is_quiet_when_hug_is_compiled_for_the_first_time(tmp_path: Path) -> None:
    """Hug's source warns (invalid escapes, `is` with a literal) only while it is compiled."""
    (installed,) = map(Path, find_spec("hug").submodule_search_locations)  # type: ignore
    shutil.copytree(installed, tmp_path / "hug", ignore=shutil.ignore_patterns("__pycache__"))
    fresh = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = f"{fresh}; from serve.hug_compat import hug; print(hug.__file__)"
    assert run(code, "-W", "error") == str(tmp_path / "hug" / "__init__.py")


def test_the_warnings_of_others_are_as_they_were() -> None:
    code = (
        "import warnings, numpy; before = list(warnings.filters)\n"
        "import serve.hug_compat; print(warnings.filters == before)"
    )
    assert run(code) == "True"


def test_numpy_is_left_as_it_was() -> None:
    code = "import serve.hug_compat, numpy; print(hasattr(numpy, 'unicode_'))"
    assert run(code) == "False"


def test_an_older_numpy_keeps_its_name() -> None:
    code = (
        "import numpy\n"
        "class Old(str): pass\n"
        "numpy.unicode_ = Old\n"
        "import serve.hug_compat; print(numpy.unicode_ is Old)"
    )
    assert run(code) == "True"


def test_the_edge_needs_neither_torch_nor_pandas() -> None:
    heavy = {"torch", "pandas", "sklearn", "onnx"}
    code = f"import sys, serve.server; print(sorted({heavy!r} & set(sys.modules)))"
    assert run(code) == "[]"
