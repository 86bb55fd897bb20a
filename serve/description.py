"""The description of the API as the edge serves it: the OpenAPI document, and the page made from it."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Protocol

import msgspec

from seqfraud.bundle import Bundle
from serve.decoding import TransactionDecoder
from serve.documentation import render
from serve.openapi import CSS, HTML, JSON, STYLE_PATH, describe
from serve.pages import Page

__all__ = ["Described", "Description", "Pages"]

_POLICY = (
    "content-security-policy",
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
)


class Described(Protocol):
    """Whose API is described."""

    bundle: Bundle
    decoder: TransactionDecoder


@dataclass(frozen=True)
class Pages:
    """The description of one bundle's API in its forms."""

    document: Page
    page: Page
    style: Page


class Description:
    """Makes the pages of a bundle once, and again only when another one is in force."""

    def __init__(self, max_body_bytes: int, keys_required: bool) -> None:
        self._max_body_bytes = max_body_bytes
        self._keys_required = keys_required
        self._made: tuple[str, Pages] | None = None

    def of(self, engine: Described) -> Pages:
        """The pages of a bundle. Two threads that come at once may both make them, and the same."""
        made = self._made
        if made is None or made[0] != engine.bundle.id:
            made = self._made = (engine.bundle.id, self._make(engine.bundle, engine.decoder))
        return made[1]

    def _make(self, bundle: Bundle, decoder: TransactionDecoder) -> Pages:
        document = describe(bundle, decoder, self._max_body_bytes, keys_required=self._keys_required)
        return Pages(
            document=Page(msgspec.json.encode(document), JSON),
            page=Page(render(document, STYLE_PATH).encode(), HTML, (_POLICY,)),
            style=Page(files("serve").joinpath("docs.css").read_bytes(), CSS),
        )
