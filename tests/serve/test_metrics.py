"""Metrics: the text format, what a service counts, and what promtool and Prometheus's readers of docs/ say of both."""

import contextlib
import http.client
import io
import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqfraud.bundle import Bundle
from seqfraud.errors import JournalError, RequestError
from serve.app import create_app
from serve.edgemeasures import RequestMeasures
from serve.fallback import FallbackSettings
from serve.keys import add_key
from serve.measures import MONITOR, SOURCES, STAGES
from serve.metrics import FOREIGN_BYTES, Registry, foreign_text
from serve.service import Service

PROMTOOL = "`apt-get install prometheus` has it, or whatever installs Prometheus on this system"
T = 1_600_000_000_000
DAY = 86_400_000

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_PAIR = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """The samples of an exposition, after checks of its shape: HELP and TYPE first, families whole, each series once."""
    assert text == "" or text.endswith("\n")
    samples: Samples = {}
    seen: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            _, word, name, _ = line.split(" ", 3)
            if word == "HELP":
                assert name not in seen, line
                seen.append(name)
            else:
                assert word == "TYPE" and seen[-1] == name, line
            continue
        found = _SAMPLE.fullmatch(line)
        assert found, line
        name, pairs, value = found[1], _PAIR.findall(found[2] or ""), float(found[3])
        assert re.sub(r"_(bucket|sum|count)$", "", name) == seen[-1] or name == seen[-1], line
        key = (name, frozenset(pairs))
        assert key not in samples, line
        samples[key] = value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


# ---- the format


def test_what_is_counted_is_what_is_shown() -> None:
    registry = Registry()
    counter = registry.counter("seqfraud_things_total", 'Things, of "two" kinds\\sorts\nand more.', ("kind",))
    counter.of("a").value += 1
    counter.of("a").value += 2
    counter.of('quote " back \\ line\n').value += 5
    registry.gauge("seqfraud_level_ratio", "A level.").of().value = 0.25
    assert registry.render() == (
        "# HELP seqfraud_metrics_unreadable_total Metrics that were left out of a scrape because they could not be read.\n"
        "# TYPE seqfraud_metrics_unreadable_total counter\n"
        "seqfraud_metrics_unreadable_total 0\n"
        '# HELP seqfraud_things_total Things, of "two" kinds\\\\sorts\\nand more.\n'
        "# TYPE seqfraud_things_total counter\n"
        'seqfraud_things_total{kind="a"} 3\n'
        'seqfraud_things_total{kind="quote \\" back \\\\ line\\n"} 5\n'
        "# HELP seqfraud_level_ratio A level.\n"
        "# TYPE seqfraud_level_ratio gauge\n"
        "seqfraud_level_ratio 0.25\n"
    )


def test_a_bucket_holds_what_is_at_or_below_its_bound() -> None:
    registry = Registry()
    histogram = registry.histogram("seqfraud_x_seconds", "X.", (0.5, 1, 10.0), ("of",))
    for seconds in (0.5, 0.5000001, 1, 3, 10, 11, -1):
        histogram.of("it").observe(seconds)
    samples = read(registry.render())
    within = {
        bound: value(samples, "seqfraud_x_seconds_bucket", of="it", le=bound) for bound in ("0.5", "1", "10.0", "+Inf")
    }
    assert within == {"0.5": 2, "1": 4, "10.0": 6, "+Inf": 7}
    assert value(samples, "seqfraud_x_seconds_count", of="it") == 7
    assert value(samples, "seqfraud_x_seconds_sum", of="it") == pytest.approx(25.0000001)


def test_a_family_without_series_is_not_shown() -> None:
    registry = Registry()
    registry.counter("seqfraud_none_total", "None.", ("kind",))
    registry.gauge("seqfraud_absent", "None.", ("kind",), dict)
    assert "none" not in registry.render() and "absent" not in registry.render()


def test_what_is_read_at_the_scrape_may_come_and_go() -> None:
    registry = Registry()
    numbers: dict[tuple[str, ...], float] = {("a",): 1, ("b",): math.inf}
    registry.gauge("seqfraud_read", "Read.", ("of",), lambda: numbers)
    assert 'seqfraud_read{of="b"} +Inf\n' in registry.render()
    del numbers["b",]
    numbers["a",] = math.nan
    shown = registry.render()
    assert 'seqfraud_read{of="a"} NaN\n' in shown and '"b"' not in shown


def test_a_number_that_cannot_be_read_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()

    def fails() -> float:
        raise JournalError("the index is away")

    registry.gauge("seqfraud_failing", "Fails.", read=fails)
    registry.gauge("seqfraud_well", "Does not.", read=lambda: 3)
    registry.render()
    samples = read(registry.render())
    assert value(samples, "seqfraud_well") == 3
    assert value(samples, "seqfraud_metrics_unreadable_total") == 1, "of the scrape before"
    assert "seqfraud_failing cannot be read: the index is away" in caplog.text


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda r: r.counter("seqfraud_x", "X."), "ends with _total"),
        (lambda r: r.gauge("seqfraud-x", "X."), "names"),
        (lambda r: r.gauge("seqfraud_x", "X.", ("a-b",)), "names"),
        (lambda r: r.histogram("seqfraud_x", "X.", (1,), ("le",)), "names"),
        (lambda r: r.histogram("seqfraud_x", "X.", (2, 1)), "ascend"),
        (lambda r: r.histogram("seqfraud_x", "X.", (1, math.inf)), "finite"),
        (lambda r: [r.gauge("seqfraud_x", "X.") for _ in range(2)], "twice"),
        (lambda r: r.gauge("seqfraud_x", "X.", ("a",)).of("b", "c"), "expected 1"),
    ],
)
def test_a_wrong_declaration_is_refused(declare: Callable[[Registry], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        declare(Registry())


def test_threads_that_hold_a_lock_lose_nothing_while_others_scrape() -> None:
    registry = Registry()
    measures = RequestMeasures(registry)
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            samples = read(registry.render())
            counted = samples.get(
                ("seqfraud_http_request_seconds_count", frozenset({("route", "/a"), ("method", "GET")})), 0
            )
            assert counted <= 4000

    def count() -> None:
        for _ in range(1000):
            measures({"seqfraud.route": "/a", "REQUEST_METHOD": "GET"}, 200, 10, 0.001)

    watcher, threads = threading.Thread(target=scrape), [threading.Thread(target=count) for _ in range(4)]
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    samples = read(registry.render())
    assert value(samples, "seqfraud_http_requests_total", route="/a", method="GET", status="200") == 4000
    assert value(samples, "seqfraud_http_request_seconds_count", route="/a", method="GET") == 4000


# ---- what others wrote


def test_what_another_program_wrote_stands_behind_ours_each_series_once(tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    file.write_text(
        "# TYPE seqfraud_psi_ratio gauge\n"
        'seqfraud_psi_ratio{field="a",model="m"} 0.5\n'
        "seqfraud_other 1e-3\n"
        'seqfraud_psi_ratio{field="b\\"c"} NaN\n'
        'seqfraud_psi_ratio{model="m",field="a"} 9\n'
        "# HELP seqfraud_psi_ratio Late, and still first.\n"
        "# TYPE seqfraud_psi_ratio counter\n"
        "# a remark\n"
        "\n"
        "seqfraud_users 3\n"
        "seqfraud_stage_seconds_count 3\n"
        "not a sample\n"
        'seqfraud_torn{field="a'
    )
    assert foreign_text(file, {"seqfraud_users", "seqfraud_stage_seconds"}) == (
        "# HELP seqfraud_psi_ratio Late, and still first.\n"
        "# TYPE seqfraud_psi_ratio gauge\n"
        'seqfraud_psi_ratio{field="a",model="m"} 0.5\n'
        'seqfraud_psi_ratio{field="b\\"c"} NaN\n'
        "seqfraud_other 1e-3\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "seqfraud_x", "seqfraud_x one", "seqfraud_x 1 1600000000000", "1x 1", 'seqfraud_x{a="b} 1', "seqfraud_x{a=b} 1",
        'seqfraud_x{a="b",a="c"} 1', 'seqfraud_x{a="b\\t"} 1', "# TYPE seqfraud_x histogram", "# HELP seqfraud_x a\\b",
        "# TYPE seqfraud_x gauge", "seqfraud_x{} 1 # {} 1", "\u20ac 1", "seqfraud_x 0x1F", "seqfraud_x\t1\t",
    ],
)  # fmt: skip
def test_a_line_that_is_no_number_is_left_out(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.prom"
    file.write_text(f"{line}\nseqfraud_y 1\n")
    assert foreign_text(file, ()) == "seqfraud_y 1\n"


def test_no_file_a_binary_one_and_one_that_is_too_large_break_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    assert foreign_text(file, ()) == ""
    file.write_bytes(bytes(range(256)) * 10 + b"\nseqfraud_y 1\n")
    assert foreign_text(file, ()) == "seqfraud_y 1\n"
    file.write_bytes(b"seqfraud_y 1\n" * (FOREIGN_BYTES // 13 + 1))
    assert foreign_text(file, ()) == ""


# ---- a service


@pytest.fixture
def open_service(cards: Bundle, tmp_path: Path):
    """`open_service(**options)`: a measured service on CARDS with a clock at T + 30 days."""
    with contextlib.ExitStack() as opened:

        def start(**options: Any) -> Service:
            return opened.enter_context(
                Service(cards, tmp_path / "state", clock=lambda: T + 30 * DAY, metrics=Registry(), **options)
            )

        yield start


def row(number: int, **more: Any) -> bytes:
    plain = {
        "id": number,
        "user": "ann",
        "time": T + number,
        "amount": 5,
        "kind": "food",
        "merchant": "m",
        "device": "d",
    }
    return json.dumps({**plain, **more}).encode()


def scraped(service: Service) -> Samples:
    return read(service.metrics().decode())


def test_scoring_counts_what_came_and_what_was_said(open_service) -> None:
    service = open_service()
    answers = [json.loads(service.score(row(n, user=f"u{n % 3}", kind=k))) for n, k in enumerate(["food", "new", None])]
    answers.append(json.loads(service.score(row(50, user="u0"))))
    answers.append(json.loads(service.score(row(40, user="u0"))))  # late
    service.score(row(50, user="u0"))  # a duplicate
    with pytest.raises(RequestError):
        service.score(row(50, user="u0", amount=6))
    service.score_batch(b"[" + row(60) + b"," + row(61) + b",{}]")
    answers += [json.loads(service.transaction(str(n))) for n in (60, 61)]
    samples = scraped(service)
    for decision in ("approve", "review", "decline"):
        count = sum(answer["decision"] == decision for answer in answers)
        assert value(samples, "seqfraud_decisions_total", decision=decision) == count
    assert value(samples, "seqfraud_score_ratio_count") == 7
    assert value(samples, "seqfraud_score_ratio_sum") == pytest.approx(sum(a["fraud_probability"] for a in answers))
    assert value(samples, "seqfraud_transactions_flagged_total") == sum(answer["is_fraud"] for answer in answers)
    assert value(samples, "seqfraud_transactions_late_total") == 1
    assert value(samples, "seqfraud_transactions_duplicate_total") == 1
    assert value(samples, "seqfraud_transactions_conflicting_total") == 1
    assert value(samples, "seqfraud_categories_unseen_total", field="kind") == 2
    counts = {stage: value(samples, "seqfraud_stage_seconds_count", stage=stage) for stage in STAGES}
    assert counts == {"decode": 7, "wait": 7, "encode": 7} | dict.fromkeys(STAGES[1:7], 7)
    assert value(samples, "seqfraud_users") == 4
    assert value(samples, "seqfraud_entities") == 2
    assert value(samples, "seqfraud_journal_records") == 7
    assert value(samples, "seqfraud_model_info", model=service.bundle.id) == 1
    assert value(samples, "seqfraud_ready") == 1


def test_the_stages_of_a_transaction_are_within_its_time(open_service) -> None:
    """In order and each once: together they cannot take longer than the whole, and most of it is in one of them."""
    service = open_service()
    began = time.perf_counter()
    for number in range(50):
        service.score(row(number))
    whole = time.perf_counter() - began
    samples = scraped(service)
    spent = [value(samples, "seqfraud_stage_seconds_sum", stage=stage) for stage in STAGES]
    assert all(seconds > 0 for seconds in spent)
    assert sum(spent) < whole


def test_labels_are_counted_by_source_and_outcome_with_their_delay(open_service) -> None:
    service = open_service()
    service.score(row(0))
    service.score(row(1))

    def post(*labels: dict[str, Any]) -> None:
        service.add_labels(json.dumps(labels).encode())

    post({"transaction_id": 0, "is_fraud": True, "known_at": T + 2 * DAY, "source": "chargeback"})
    post({"transaction_id": 0, "is_fraud": False, "source": "analyst"}, {"transaction_id": 1, "is_fraud": False})
    post({"transaction_id": 1, "is_fraud": False}, {"transaction_id": 7, "is_fraud": True})
    samples = scraped(service)
    told = {(dict(labels)["source"], dict(labels)["outcome"]): count
            for (name, labels), count in samples.items() if name == "seqfraud_labels_total"}  # fmt: skip
    assert told == {
        ("chargeback", "new"): 1, ("analyst", "changed"): 1, ("api", "new"): 1, ("api", "unchanged"): 1, ("api", "unknown"): 1,
    }  # fmt: skip
    assert value(samples, "seqfraud_label_delay_seconds_count") == 3
    assert value(samples, "seqfraud_label_delay_seconds_bucket", le=f"{2 * 86400.0}") == 1
    assert value(samples, "seqfraud_label_delay_seconds_bucket", le=f"{30 * 86400.0}") == 3
    assert value(samples, "seqfraud_labels_early") == 1
    service.score(row(7))
    assert value(scraped(service), "seqfraud_labels_early") == 0


def test_nothing_that_a_client_chooses_becomes_a_label_without_bound(open_service) -> None:
    service = open_service()
    for n, source in enumerate(["user 4711", "4000056655665556", "A", "", *[f"s{'x' * i}" for i in range(40)]]):
        service.add_labels(json.dumps([{"transaction_id": n, "is_fraud": True, "source": source}]).encode())
    told = {dict(labels)["source"] for name, labels in scraped(service) if name == "seqfraud_labels_total"}
    assert len(told) == SOURCES + 1 and "other" in told
    assert all(re.fullmatch("[a-z_-]+", source) for source in told)

    registry = Registry()
    measures = RequestMeasures(registry)
    for n in range(100):
        measures({"REQUEST_METHOD": f"M{n}", "seqfraud.route": None}, 405, 0, 0.1)
    assert (
        value(read(registry.render()), "seqfraud_http_requests_total", route="none", method="OTHER", status="405")
        == 100
    )
    assert measures._known == {}


def test_closing_an_alert_counts_as_a_label(open_service, cards: Bundle) -> None:
    service = open_service()
    asked = [json.loads(service.score(row(n, amount=10.0**n))) for n in range(6)]
    alert = next(answer["transaction_id"] for answer in asked if answer["decision"] != "approve")
    for state in ("in_review", "confirmed"):
        service.change_alert(alert, json.dumps({"state": state}).encode(), "ann")
    assert value(scraped(service), "seqfraud_labels_total", source="analyst", outcome="new") == 1


def test_rules_and_lists_count_their_hits(open_service) -> None:
    service = open_service()
    rule = {"expression": "amount > 1.0", "decision": "review", "enabled": True, "why": "a test"}
    service.desk.put_rule("likely", json.dumps(rule).encode(), "ann")
    service.desk.put_list("blocked", json.dumps({"kind": "block", "field": "user", "why": "a test"}).encode(), "ann")
    entries = {"entries": [{"value": "eve"}], "why": "a test"}
    service.desk.add_entries("blocked", json.dumps(entries).encode(), "ann")
    service.score(row(0))
    service.score(row(1, user="eve"))
    samples = scraped(service)
    assert value(samples, "seqfraud_rule_hits_total", rule="likely") == 1
    assert value(samples, "seqfraud_rule_failures_total", rule="likely") == 0
    assert value(samples, "seqfraud_list_hits_total", list="blocked") == 1


def test_a_disk_without_room_is_a_failure_and_a_degraded_answer(open_service, small_disk) -> None:
    service = open_service(disk=small_disk.disk, fallback=FallbackSettings("limits"))
    service.score(row(0))
    small_disk.room = 0
    assert json.loads(service.score(row(1)))["degraded"]
    samples = scraped(service)
    assert value(samples, "seqfraud_scoring_failures_total", cause="storage_unavailable") == 1
    assert value(samples, "seqfraud_degraded_answers_total", cause="storage_unavailable") == 1
    assert value(samples, "seqfraud_degraded_answers_total", cause="model_unavailable") == 0
    assert value(samples, "seqfraud_decisions_total", decision="approve") <= 1, (
        "a degraded answer is no decision of the model"
    )
    assert value(samples, "seqfraud_stage_seconds_count", stage="graph") == 1
    small_disk.room = None


def test_the_journal_and_its_snapshot_are_watched(open_service) -> None:
    service = open_service()
    assert ("seqfraud_snapshot_timestamp_seconds", frozenset()) not in scraped(service)
    service.score(row(0))
    service.score(row(1))
    assert value(scraped(service), "seqfraud_snapshot_behind_records") == 2
    service.snapshot()
    service.score(row(2))
    service.journal.wait_indexed(3, 10)
    samples = scraped(service)
    assert value(samples, "seqfraud_snapshot_behind_records") == 1
    assert value(samples, "seqfraud_snapshot_timestamp_seconds") > 1.6e9
    assert value(samples, "seqfraud_journal_unsynced_records") == 0
    assert value(samples, "seqfraud_journal_unindexed_records") == 0
    assert value(samples, "seqfraud_journal_bytes") > 100
    assert value(samples, "seqfraud_journal_failed") == 0


def test_what_the_monitor_wrote_is_shown_and_may_not_shadow_the_service(open_service, tmp_path: Path) -> None:
    service = open_service()
    own = "# HELP seqfraud_psi_ratio Drift.\n# TYPE seqfraud_psi_ratio gauge\nseqfraud_psi_ratio 0.1\n"
    (tmp_path / "state" / MONITOR).write_text(f"{own}seqfraud_users 9\nseqfraud_score_ratio_count 9\n")
    samples = scraped(service)
    assert value(samples, "seqfraud_users") == value(samples, "seqfraud_score_ratio_count") == 0
    assert value(samples, "seqfraud_monitor_timestamp_seconds") > 1.6e9
    assert service.metrics().decode().endswith(own)


def test_a_service_that_does_not_measure_says_so(service: Service) -> None:
    with pytest.raises(RequestError) as caught:
        service.metrics()
    assert (caught.value.status, caught.value.code) == (404, "not_measured")


def test_the_address_says_what_the_text_is(open_service) -> None:
    app = create_app(open_service())
    started: list[Any] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": "", "SERVER_NAME": "x", "SERVER_PORT": "80",
        "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(), "wsgi.errors": None, "CONTENT_LENGTH": "0",
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, headers, *_: started.append((status, dict(headers)))))
    assert started[0][0] == "200 OK"
    assert started[0][1]["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert read(body.decode())


# ---- a process


def get(port: int, path: str, key: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_live_service_is_scraped_by_a_key_that_can_do_nothing_else(
    serve, tool, tmp_path: Path, secret_file: Path
) -> None:
    """Requests, refusals and the process are there, nobody's name is, and promtool has nothing to say."""
    keys = tmp_path / "keys.json"
    admin, scraper = (add_key(keys, [role], 0)[1] for role in ("admin", "metrics"))  # type: ignore[list-item]
    running = serve("--keys", keys).started()
    for number in range(3):
        assert get(running.port, "/v1/score", admin, "POST", row(number, user="someone-in-particular"))[0] == 200
    assert get(running.port, "/v1/transactions/0", admin)[0] == 200
    assert get(running.port, "/v1/transactions/unknown-one", admin)[0] == 404
    assert get(running.port, "/v1/score", scraper, "POST", row(9))[0] == 403
    assert get(running.port, "/nowhere/at-all", admin)[0] == 404
    status, body = get(running.port, "/metrics", scraper)
    assert status == 200
    samples = read(body.decode())
    requests = {tuple(dict(labels)[x] for x in ("route", "method", "status")): int(count)
                for (name, labels), count in samples.items() if name == "seqfraud_http_requests_total"}  # fmt: skip
    assert requests == {
        ("/v1/score", "POST", "200"): 3, ("/v1/score", "POST", "403"): 1, ("none", "GET", "404"): 1,
        ("/v1/transactions/{transaction_id}", "GET", "200"): 1, ("/v1/transactions/{transaction_id}", "GET", "404"): 1,
    }  # fmt: skip
    assert value(samples, "seqfraud_http_request_seconds_count", route="/v1/score", method="POST") == 4
    assert value(samples, "seqfraud_overload_refusals_total", cause="waited") == 0
    assert value(samples, "seqfraud_http_queue_seconds") >= 0
    assert value(samples, "process_resident_memory_bytes") > 10e6
    assert value(samples, "process_open_fds") > 5
    assert abs(value(samples, "process_start_time_seconds") - running.log.stat().st_ctime) < 30
    for word in (b"someone-in-particular", b"unknown-one", b"at-all", b"127.0.0.1"):
        assert word not in body
    checked = subprocess.run(
        [tool("promtool", PROMTOOL), "check", "metrics"], input=body, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    assert running.stop() == 0
