"""Headers that every answer carries so that a browser takes it for nothing else, and the policy of a page."""

import base64
import re
from hashlib import sha256

__all__ = ["headers_for", "page_policy"]

_Headers = list[tuple[str, str]]

_NO_SNIFFING = ("x-content-type-options", "nosniff")
_API: _Headers = [_NO_SNIFFING, ("cache-control", "no-store")]
_FEATURES = (
    "camera",
    "display-capture",
    "fullscreen",
    "geolocation",
    "microphone",
    "payment",
    "publickey-credentials-get",
)
_PAGE: _Headers = [
    _NO_SNIFFING,
    ("cache-control", "no-cache"),
    ("referrer-policy", "no-referrer"),
    ("permissions-policy", ", ".join(f"{feature}=()" for feature in _FEATURES)),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("x-frame-options", "DENY"),
]
_POLICY = "content-security-policy"
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE_WITH_NOTHING: _Headers = [*_PAGE, (_POLICY, _NOTHING)]

_INLINE = re.compile(rb"<(style|script)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)


def headers_for(headers: _Headers) -> _Headers:
    """What is added to an answer with `headers`, whose names are in lower case.

    A page that brings no policy of its own may load and run nothing, not even what stands in it.
    """
    for name, value in headers:
        if name == "content-type" and value.startswith("text/html"):
            has_policy = any(name == _POLICY for name, _ in headers)
            return _PAGE if has_policy else _PAGE_WITH_NOTHING
    return _API


def page_policy(page: bytes) -> str:
    """A Content-Security-Policy that lets a page use what stands in it, by hash, and fetch from its own service.

    Only for pages that hold nothing that anybody sent: what is in the page when this is called is what may run.
    """
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for tag, content in _INLINE.findall(page):
        digest = base64.b64encode(sha256(content).digest()).decode()
        hashes[tag.decode().lower()].append(f"'sha256-{digest}'")
    allowed = [f"{tag}-src {' '.join(found)}" for tag, found in hashes.items() if found]
    return "; ".join([_NOTHING, *allowed, "connect-src 'self'", "img-src data:"])
