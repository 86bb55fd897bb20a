"""What an operator sets of the service: one TOML file, `seqfraud serve --settings FILE`, and flags that win over it.

A section per concern, each a frozen dataclass beside what it configures. What belongs to the model (columns, window,
batch size) comes with the bundle instead.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from seqfraud.config import from_plain
from seqfraud.errors import ConfigError
from serve.challenger import ShadowSettings
from serve.decoding import InputSettings
from serve.fallback import FallbackSettings
from serve.keys import KeySettings
from serve.limits import LimitSettings
from serve.logs import LogSettings
from serve.overload import OverloadSettings
from serve.server import ServerSettings
from serve.tls import TlsSettings
from serve.webhook import WebhookSettings

__all__ = ["IdentifierSettings", "Settings", "load_settings"]


@dataclass(frozen=True)
class IdentifierSettings:
    """How identifiers are hashed before they are stored; which ones are is the bundle's policy.

    - key: file of the key; empty: `identifier.key` in the state folder, made at the first start.
    """

    key: str = ""

    def key_file(self, option: Path | None) -> Path | None:
        """The key's file, where the command's option or the settings name one."""
        return option or (Path(self.key) if self.key else None)


@dataclass(frozen=True)
class BundleSettings:
    """Which bundles the service opens.

    - registry: folder of models, of which the champion is served; instead of the command's --bundle.
    - trusted_keys: file of public keys; a bundle that none of them signed is refused. See `seqfraud sign`.
    """

    trusted_keys: str | None = None
    registry: str | None = None


@dataclass(frozen=True)
class Settings:
    """A whole settings file."""

    server: ServerSettings = field(default_factory=ServerSettings)
    keys: KeySettings = field(default_factory=KeySettings)
    tls: TlsSettings | None = None
    log: LogSettings = field(default_factory=LogSettings)
    overload: OverloadSettings = field(default_factory=OverloadSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    bundle: BundleSettings = field(default_factory=BundleSettings)
    fallback: FallbackSettings = field(default_factory=FallbackSettings)
    identifiers: IdentifierSettings = field(default_factory=IdentifierSettings)
    input: InputSettings = field(default_factory=InputSettings)
    webhook: WebhookSettings | None = None
    shadow: ShadowSettings = field(default_factory=ShadowSettings)


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
