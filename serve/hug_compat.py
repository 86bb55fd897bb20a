"""The one place that imports Hug, which was frozen in 2020.

Everything else writes `from serve.hug_compat import falcon, hug`. Three things stand between Hug
2.6.1 and a current installation, and all three are dealt with here:

- `hug.output_format` asks for `numpy.unicode_`, which NumPy 2 removed: it is there while Hug is
  imported, and only then, so that nothing else takes this NumPy for an old one.
- Hug and its Falcon 2 warn about their own age (`cgi`, invalid escapes): those warnings, and no
  others, are dropped.
- Python 3.12 needs setuptools for `distutils`, 3.13 also `legacy-cgi`; this project pins 3.11.

Hug also changes the process that imports it: with uvloop installed it sets uvloop's event loop
policy; with ujson installed it uses that for its own JSON (ours never goes through it).
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

__all__ = ["falcon", "hug"]

# A warning at compile time carries the file's path without `.py` where others carry the module.
_OWN_CODE = r"(.*/)?(hug|falcon)([./]|\Z)"


@contextmanager
def _numpy_1_names() -> Iterator[None]:
    """Lends NumPy 2 the name that Hug looks for at import; an older NumPy is left as it is."""
    if hasattr(numpy, "unicode_"):
        yield
        return
    numpy.unicode_ = numpy.str_  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del numpy.unicode_  # type: ignore[attr-defined]


def _import_hug() -> Any:
    with warnings.catch_warnings(), _numpy_1_names():
        for category in (DeprecationWarning, SyntaxWarning):
            warnings.filterwarnings("ignore", category=category, module=_OWN_CODE)
        return importlib.import_module("hug")


hug: Any = _import_hug()
falcon: Any = hug.interface.falcon
