"""A rate limit per key: token buckets, a bounded number of them."""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass

from seqfraud.errors import RequestError

__all__ = ["LimitSettings", "RateLimiter"]


@dataclass(frozen=True)
class LimitSettings:
    """`[limits]`: how many requests one key may send. A batch counts once; what needs no key does not count.

    Where there are no keys it holds for each address instead.

    - requests_per_second: in the long run; 0: no limit.
    - burst: at once, after a pause.
    - remembered_keys: how many keys are told apart at a time; beyond, the one unseen for longest starts afresh.
    """

    requests_per_second: float = 0.0
    burst: int = 100
    remembered_keys: int = 10_000

    def __post_init__(self) -> None:
        if self.requests_per_second < 0:
            raise ValueError(f"requests_per_second: expected 0 (no limit) or more, got {self.requests_per_second}")
        if self.burst < 1:
            raise ValueError(f"burst: expected 1 or more, got {self.burst}")
        if self.remembered_keys < 1:
            raise ValueError(f"remembered_keys: expected 1 or more, got {self.remembered_keys}")


class RateLimiter:
    """Token buckets by key. Thread-safe; its memory is bounded by `remembered_keys`."""

    def __init__(self, settings: LimitSettings) -> None:
        """With a rate above 0."""
        self._rate = settings.requests_per_second
        self._burst = float(settings.burst)
        self._most = settings.remembered_keys
        self._full_at: OrderedDict[str, float] = OrderedDict()  # by last use, the longest ago first
        self._lock = threading.Lock()

    def allow(self, key: str, now: float) -> float | None:
        """None where the request may pass, and counts; else the seconds until one may. `now` in seconds, never back.

        A bucket is kept as the moment when it is full again: a request moves that by 1 / rate.
        """
        with self._lock:
            full_at = max(self._full_at.get(key, now), now) + 1 / self._rate
            wait = full_at - now - self._burst / self._rate
            if wait > 1e-9:  # the sum of the steps is not exact
                return wait
            self._full_at[key] = full_at
            self._full_at.move_to_end(key)
            if len(self._full_at) > self._most:
                self._full_at.popitem(last=False)
            return None

    def require(self, key: str, now: float) -> None:
        """Return where the request may pass, and count it; else raise RequestError 429."""
        wait = self.allow(key, now)
        if wait is not None:
            seconds = math.ceil(wait)
            message = f"more requests than allowed; ask again in {seconds} s"
            raise RequestError(429, "too_many_requests", message, retry_after=seconds)
