"""TLS of the service itself; a proxy in front can do it instead."""

import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seqfraud.errors import ConfigError

__all__ = ["TlsSettings", "own_client", "worker_options"]


@dataclass(frozen=True)
class TlsSettings:
    """HTTPS instead of HTTP. A renewed certificate takes effect at the next start.

    - certificate: PEM file with the certificate and what leads to its root.
    - key: PEM file with its private key, without a passphrase.
    - minimum: the oldest version that is spoken.
    """

    certificate: str
    key: str
    minimum: Literal["1.2", "1.3"] = "1.2"


def worker_options(settings: TlsSettings | None) -> dict[str, Any]:
    """What granian's worker takes. Raises ConfigError where the files are not a pair, or the key is open to others."""
    if settings is None:
        return {}
    _require_pair(settings)
    return {
        "ssl_enabled": True,
        "ssl_cert": str(Path(settings.certificate).resolve()),
        "ssl_key": str(Path(settings.key).resolve()),
        "ssl_protocol_min": f"tls{settings.minimum}",
    }


def own_client() -> ssl.SSLContext:
    """For the service's connections to itself, whatever name its certificate has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _require_pair(settings: TlsSettings) -> None:
    for name, file in (("certificate", settings.certificate), ("key", settings.key)):
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"tls.{name}: {file}: {error.strerror}") from error
    key = Path(settings.key)
    if key.stat().st_mode & stat.S_IRWXO:
        raise ConfigError(f"tls.key: {key}: everybody on this machine may use it; chmod o= {key}")
    try:
        # The password: without one, OpenSSL would ask at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.certificate, settings.key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"tls: {settings.certificate} and {key} are not a certificate and its key in PEM, without a passphrase: {error}"
        ) from error
