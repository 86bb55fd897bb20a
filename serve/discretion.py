"""What a log may say of a request and of a crash in one: never an identifier, never a body."""

import traceback

ROUTES = (
    "/v1/score", "/v1/score/batch", "/v1/labels", "/v1/model", "/v1/alerts", "/healthz", "/readyz", "/metrics",
    "/openapi.json", "/docs", "/",
)  # fmt: skip
"""Addresses that may be logged as they are."""
OTHER = "(other)"


def route_of(path: str) -> str:
    """A request's path without what it names: `/v1/users/{user}`; anything that is no address of ours is OTHER."""
    if path in ROUTES:
        return path
    for prefix, name in (("/v1/users/", "{user}"), ("/v1/transactions/", "{transaction_id}")):
        if path.startswith(prefix):
            return prefix + name + ("/explanation" if path.endswith("/explanation") else "")
    return OTHER


def stack_of(error: BaseException) -> str:
    """Kinds and places of an exception and of those that it came from, without their words, which may quote a request."""
    parts = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        frames = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(one).__qualname__}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\nafter\n".join(parts)
