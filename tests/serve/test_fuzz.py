"""The short form of `make fuzz`, and that it would find what it looks for."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import Generator, Part, Probe, Sent, fuzz_app, fuzz_decoder, fuzz_server, run_blocks
from seqfraud.bundle import Bundle
from serve.service import Service


@pytest.fixture(params=["cards", "plain", "rich"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    drawn: Bundle = request.getfixturevalue(request.param)
    return drawn


def check_part(part: Part, count: int) -> None:
    assert part.examples == []
    assert part.good
    assert part.generated == count
    assert part.accepted > count / 10
    assert {"400", "404", "405", "413", "415", "422"} <= set(part.refused)


def test_the_app_answers_whatever_is_sent(bundle: Bundle, tmp_path: Path) -> None:
    check_part(fuzz_app(bundle, 1200, 1, tmp_path / "state"), 1200)


def test_a_server_answers_whatever_is_sent(rich: Bundle, tmp_path: Path) -> None:
    check_part(fuzz_server(rich, 1200, 2, tmp_path), 1200)


def test_the_decoder_refuses_or_takes_whatever_is_sent(
    cards: Bundle, plain: Bundle, rich: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("atheris")
    found = fuzz_decoder([cards, plain, rich], 20_000, 0, tmp_path)
    assert found["failed"] == ""
    assert found["generated"] == 20_000
    assert found["accepted"] > 300


def test_the_same_seed_makes_the_same_requests(rich: Bundle) -> None:
    def first(seed: int) -> list[Sent]:
        generator = Generator(rich.manifest.schema, seed)
        return [generator.request() for _ in range(200)]

    assert first(1) == first(1)
    assert first(1) != first(2)


Broken = Callable[[Sent], tuple[int, bytes]]


def found_in(send: Broken, **changes: Any) -> Part:
    part = Part()
    requests: Iterator[Sent] = iter([Sent(b"%d" % i) for i in range(20)])
    probe = replace(Probe(send, lambda: "", lambda: 0, lambda: 1.0), **changes)
    run_blocks(part, requests, 20, probe)
    return part


def refuse(sent: Sent) -> tuple[int, bytes]:
    return 422, json.dumps({"error": {"code": "c", "message": "m", "field": ""}}).encode()


def test_what_must_not_be_is_found() -> None:
    assert found_in(refuse).good
    assert found_in(lambda sent: (500, b"{}")).five_hundreds == 20
    assert found_in(lambda sent: (422, b'{"error": {"code": "c"}}')).wrong_shape == 20
    assert found_in(lambda sent: (418, refuse(sent)[1])).wrong_shape == 20
    digests, sizes, memory = iter("ab"), iter(range(21)), iter([10.0, 100.0, 100.0])
    assert found_in(refuse, digest=lambda: next(digests)).changed_by_refused == 1
    assert found_in(refuse, sizes=lambda: next(sizes)).changed_by_refused == 20
    assert not found_in(refuse, memory_mb=lambda: next(memory)).good
    memory = iter([10.0, 10.0, 20.0])
    assert found_in(refuse, memory_mb=lambda: next(memory)).growth_refused_mb == 10.0
    seen: set[bytes] = set()

    def accept_the_second_time(sent: Sent) -> tuple[int, bytes]:
        if sent.body in seen:
            return 200, b"{}"
        seen.add(sent.body)
        return refuse(sent)

    assert found_in(accept_the_second_time).changed_by_refused == 1


def test_a_change_by_a_refused_request_is_seen_in_a_real_service(
    cards: Bundle, tmp_path: Path, monkeypatch: Any
) -> None:
    """A service that makes place for a user before it looks at the rest, as a careless edit would have it."""
    decode = Service.score

    def careless(service: Service, body: bytes) -> bytes:
        service.engine.users.slot(f"user of {len(body)}")
        return decode(service, body)

    monkeypatch.setattr(Service, "score", careless)
    assert fuzz_app(cards, 300, 1, tmp_path / "state").changed_by_refused > 10
