"""What the edge serves besides answers: pages that change only with the model in force, and texts that always do."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from serve.hug_compat import falcon

__all__ = ["Page", "Text"]


@dataclass(frozen=True)
class Text:
    """Bytes of a type, made for one request."""

    content: bytes
    content_type: str

    def put(self, request: Any, response: Any) -> None:
        """Answers a request."""
        response.content_type = self.content_type
        response.data = self.content


@dataclass(frozen=True)
class Page(Text):
    """Bytes that are made once. Asking again with its ETag costs a 304."""

    headers: tuple[tuple[str, str], ...] = ()
    etag: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "etag", f'"{hashlib.sha256(self.content).hexdigest()[:32]}"')

    def put(self, request: Any, response: Any) -> None:
        """Answers a request."""
        response.set_headers((("etag", self.etag), ("cache-control", "no-cache"), *self.headers))
        known = request.env.get("HTTP_IF_NONE_MATCH", "")
        if known.strip() == "*" or self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            response.status = falcon.HTTP_304
            return
        super().put(request, response)
