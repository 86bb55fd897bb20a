"""What the server's edge and its process are measured by.

Requests are told apart by the template of their route, never by their path: a path names users.
"""

import math
import os
import threading
import time
from pathlib import Path
from wsgiref.types import WSGIEnvironment

from serve.connections import Guard
from serve.logs import METHODS
from serve.metrics import Distribution, Number, Registry
from serve.overload import Admission

__all__ = ["RequestMeasures", "declare_edge", "declare_process"]

REQUEST_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
NO_ROUTE = "none"


class RequestMeasures:
    """Requests by route, method and status, and how long they took. For any thread."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter(
            "seqfraud_http_requests_total", "Requests answered.", ("route", "method", "status")
        )
        self._seconds = registry.histogram(
            "seqfraud_http_request_seconds",
            "From a request's taking to its answer's handing over; the wait before is seqfraud_http_queue_seconds.",
            REQUEST_SECONDS,
            ("route", "method"),
        )
        self._known: dict[tuple[str | None, str, int], tuple[Number, Distribution]] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, status: int, sent: int, seconds: float) -> None:
        """Count a request that was answered with `status` after so many seconds."""
        key = (environ.get("seqfraud.route"), environ["REQUEST_METHOD"], status)
        with self._lock:
            number, distribution = self._known.get(key) or self._told_apart(*key)
            number.value += 1
            distribution.observe(seconds)

    def _told_apart(self, route: str | None, method: str, status: int) -> tuple[Number, Distribution]:
        """The series of a request; kept at hand where clients cannot make up more and more of them."""
        shown = route or NO_ROUTE, method if method in METHODS else "OTHER"
        series = self._requests.of(*shown, str(status)), self._seconds.of(*shown)
        if method in METHODS:
            self._known[route, method, status] = series
        return series


def declare_edge(registry: Registry, admission: Admission, guard: Guard) -> None:
    """What the door knows: refusals, and how long what comes out of the queue has waited."""
    registry.counter(
        "seqfraud_overload_refusals_total",
        "Refused for want of time or room: waited, deadline, batches, bodies, connections; or cut off: slow.",
        ("cause",),
        lambda: {(c,): n for c, n in (*admission.refusals.items(), *guard.refusals.items())},
    )

    def waiting() -> float:
        clock = admission.clock
        since = math.inf if clock is None else clock.oldest
        return 0.0 if since == math.inf else max(0.0, time.monotonic() - since)

    registry.gauge("seqfraud_http_queue_seconds", "How long requests wait now, at least.", read=waiting)


def declare_process(registry: Registry) -> None:
    """The usual figures of a process under their usual names (Linux; elsewhere none)."""
    here = Path("/proc/self")
    if not (here / "stat").is_file():
        return
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")

    def stat() -> list[str]:
        return (here / "stat").read_text().rpartition(")")[2].split()

    boot = next(
        int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")
    )
    started = boot + int(stat()[19]) / ticks
    registry.gauge("process_start_time_seconds", "When the process began.", read=lambda: started)
    registry.gauge(
        "process_resident_memory_bytes",
        "Resident memory.",
        read=lambda: int((here / "statm").read_text().split()[1]) * page,
    )
    registry.gauge("process_open_fds", "Open files and sockets.", read=lambda: len(os.listdir(here / "fd")))
    registry.counter("process_cpu_seconds_total", "Processor time.", read=lambda: sum(map(int, stat()[11:13])) / ticks)
