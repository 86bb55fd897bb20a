"""What an operator sets of the service: one TOML file, `seqfraud serve --settings FILE`, and flags that win over it.

A section per concern, each a frozen dataclass beside what it configures. What belongs to the model (columns, window,
batch size) comes with the bundle instead.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from seqfraud.config import from_plain
from seqfraud.errors import ConfigError
from serve.limits import LimitSettings
from serve.overload import OverloadSettings
from serve.server import ServerSettings

__all__ = ["Settings", "load_settings"]


@dataclass(frozen=True)
class Settings:
    """A whole settings file."""

    server: ServerSettings = field(default_factory=ServerSettings)
    overload: OverloadSettings = field(default_factory=OverloadSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)


def load_settings(path: Path | None) -> Settings:
    """Read and check a settings file; None: the defaults. Raises ConfigError that names the file, the key, the value."""
    if path is None:
        return Settings()
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return from_plain(Settings, raw, str(path))
