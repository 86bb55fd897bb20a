"""What many tests need: small bundles with drawn weights, built once per session, and a look into a service's memory."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.drawn import CARDS, PLAIN, RICH, drawn_bundle
from seqfraud.bundle import Bundle
from seqfraud.config import parse_config
from seqfraud.context import NEVER
from serve.labels import FOREVER, SETTLED, LabelBook
from serve.log import Disk
from serve.service import Service


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """`make_bundle(toml, missing=(), seed=0, gain=2.5)`; the same arguments give the same bundle, made once."""
    made: dict[Any, Bundle] = {}

    def make(toml: str, missing: tuple[str, ...] = (), seed: int = 0, gain: float = 2.5) -> Bundle:
        key = (toml, missing, seed, gain)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle") / "bundle"
            made[key] = drawn_bundle(folder, parse_config(toml, "test"), missing, seed, gain)
        return made[key]

    return make


@pytest.fixture(scope="session")
def cards_toml() -> str:
    """CARDS, for variations of it."""
    return CARDS


@pytest.fixture(scope="session")
def plain_toml() -> str:
    """PLAIN, for variations of it."""
    return PLAIN


@pytest.fixture(scope="session")
def rich_toml() -> str:
    """RICH, for variations of it."""
    return RICH


@pytest.fixture(scope="session")
def cards(make_bundle: Callable[..., Bundle]) -> Bundle:
    """The bundle of CARDS."""
    return make_bundle(CARDS)


@pytest.fixture(scope="session")
def plain(make_bundle: Callable[..., Bundle]) -> Bundle:
    """The bundle of PLAIN."""
    return make_bundle(PLAIN)


@pytest.fixture(scope="session")
def rich(make_bundle: Callable[..., Bundle]) -> Bundle:
    """The bundle of RICH."""
    return make_bundle(RICH, missing=("age",))


@pytest.fixture
def service(cards: Bundle, tmp_path: Path) -> Iterator[Service]:
    """A service on CARDS over an empty state folder; its clock stands at 1000 ms."""
    with Service(cards, tmp_path / "state", clock=lambda: 1000) as opened:
        yield opened


@pytest.fixture(scope="session")
def memory_of() -> Callable[[Service], dict[str, Any]]:
    """`memory_of(service)`: everything a service keeps in memory, by name, so that two can be compared with `==`."""
    return _memory_of


def _memory_of(service: Service) -> dict[str, Any]:
    users, context = service.engine.users, service.engine.context
    assert users.names == list(users.slots)
    assert users.cut is None
    by_user = {}
    for user, slot in users.slots.items():
        held = int(users.held[slot])
        mine = {name: array[slot] for name, array in users.arrays.items()}
        for ring in ("integers", "values"):
            mine[ring] = mine[ring][:held]
        by_user[user] = {name: array.tobytes() for name, array in mine.items()}
    by_entity = {}
    assert context.names == list(context.rows)
    for key, row in context.rows.items():
        parts = (context.newest[row], context.sums[row], context.run[row], context.effects[row])
        by_entity[key] = tuple(part.tobytes() for part in parts)
    return {
        "users": by_user,
        "entities": by_entity,
        **_labels_of(service.engine.labels),
        "early": dict(service.engine.memory.early),
        "last_seq": service.journal.last_seq,
    }


@pytest.fixture(scope="session")
def labels_of() -> Callable[[LabelBook], dict[str, Any]]:
    """`labels_of(book)`: everything that a book of labels keeps, whichever way."""
    return _labels_of


def _labels_of(book: LabelBook) -> dict[str, Any]:
    def at(place: int) -> tuple[int, int, int, list[int], int]:
        block, i = book.open.at(place)
        return block.seq[i], block.time[i], block.ratio[i], block.rows[i].tolist(), block.effective[i]

    queue: list[tuple[int, int]] = []  # as the book walks it
    newest = NEVER
    for place in range(book._head, book.open.end):
        seq, time, *_ = at(place)
        if time >= newest:
            queue.append((seq, time))
            newest = time
    assert book._silence == (queue[0][1] + book._delay if queue else FOREVER)
    kept = [at(place) for place in range(book.open.first, book.open.end)]
    return {
        "pending": sorted([*book.heap, *(book._silent(seq, time) for seq, time in queue)]),
        "open": {seq: rest for seq, *rest in kept if rest[-1] != SETTLED},
        "frauds": set(book.frauds),
    }


@pytest.fixture(scope="session")
def crash() -> Callable[[Service], None]:
    """`crash(service)`: what a killed process leaves: no snapshot, the journal as it is, the folder free."""
    return Service.abandon


class SmallDisk:
    """A disk that has `room` bytes left for the log; None: enough."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.disk = Disk(write=self._write)

    def _write(self, descriptor: int, data: bytes) -> int:
        if self.room is None:
            return os.write(descriptor, data)
        taken = min(self.room, len(data))
        if not taken:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.room -= taken
        return os.write(descriptor, data[:taken])


@pytest.fixture
def small_disk() -> SmallDisk:
    """A disk that can be full: `Service(..., disk=small_disk.disk)`, then `small_disk.room = 0`."""
    return SmallDisk()
