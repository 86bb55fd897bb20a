"""docs/alert-rules.yml and docs/grafana.json: promtool's word on them, each alert on made-up series, each name on a live scrape."""

import contextlib
import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serve.monitor_report import FAMILIES
from tests.serve.test_metrics import PROMTOOL, read, row

DOCS = Path(__file__).resolve().parents[2] / "docs"
RULES, DASHBOARD = DOCS / "alert-rules.yml", DOCS / "grafana.json"
NAME = re.compile(r"\b(?:seqfraud|process)_[a-z0-9_]+\b")
CHALLENGERS = "seqfraud_shadow_"
"""There where something challenges; `test_models` looks them up."""

SCORED = 'seqfraud_decisions_total{instance="a",decision="approve"}'
STOPPED = 'seqfraud_decisions_total{instance="a",decision="review"}'
REQUESTS = 'seqfraud_http_requests_total{instance="a",route="/v1/score",method="POST",status='
SLOW = 'seqfraud_http_request_seconds_bucket{instance="a",route="/v1/score",method="POST",le='
LABELS = 'seqfraud_labels_total{instance="a",source="bank",outcome='
OUTBOX = 'seqfraud_outbox_events{instance="a",state='
DELIVERED = 'seqfraud_outbox_delivered_total{instance="a"}'
VERDICT = 'seqfraud_monitor_level{instance="a",model="m",'
WRITTEN = 'seqfraud_monitor_timestamp_seconds{instance="a"}'
SNAPSHOT = 'seqfraud_snapshot_timestamp_seconds{instance="a"}'
BEHIND = 'seqfraud_snapshot_behind_records{instance="a"}'

# By alert: series on which it fires at a time, and series on which it does not. Values in Prometheus's notation, first+step x
# count, one every STEPS[alert], else one a minute.
STEPS = {
    "SeqfraudNoTransactions": "5m", "SeqfraudDecisionsShifted": "1h", "SeqfraudNoLabels": "1h", "SeqfraudLabelsOfUnknown": "1h",
    "SeqfraudMonitorSilent": "5m", "SeqfraudMonitorUnknown": "5m",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "SeqfraudDown": ("10m", {'up{job="seqfraud",instance="a"}': "0x20"}, {'up{job="seqfraud",instance="a"}': "1x20"}),
    "SeqfraudNotReady": ("10m", {'seqfraud_ready{instance="a"}': "0x20"}, {'seqfraud_ready{instance="a"}': "1x20"}),
    "SeqfraudJournalFailed": (
        "5m", {'seqfraud_journal_failed{instance="a"}': "1x20"}, {'seqfraud_journal_failed{instance="a"}': "0x20"},
    ),
    "SeqfraudScoringFails": (
        "10m",
        {'seqfraud_scoring_failures_total{instance="a",cause="storage_unavailable"}': "0x7 1x20"},
        {'seqfraud_scoring_failures_total{instance="a",cause="storage_unavailable"}': "7x20"},
    ),
    "SeqfraudErrors": (
        "20m",
        {f'{REQUESTS}"200"}}': "0+1000x30", f'{REQUESTS}"503"}}': "0+20x30"},
        {f'{REQUESTS}"200"}}': "0+1000x30", f'{REQUESTS}"503"}}': "0+5x30", f'{REQUESTS}"409"}}': "0+99x30"},
    ),
    "SeqfraudSlow": (
        "20m",
        {f'{SLOW}"0.025"}}': "0+95x30", f'{SLOW}"0.05"}}': "0+100x30", f'{SLOW}"+Inf"}}': "0+100x30"},
        {f'{SLOW}"0.01"}}': "0+995x30", f'{SLOW}"0.025"}}': "0+999x30", f'{SLOW}"+Inf"}}': "0+1000x30"},
    ),
    "SeqfraudOverloaded": (
        "20m",
        {'seqfraud_overload_refusals_total{instance="a",cause="waited"}': "0+120x30"},
        {'seqfraud_overload_refusals_total{instance="a",cause="waited"}': "0+6x30",
         'seqfraud_overload_refusals_total{instance="a",cause="slow"}': "0+600x30"},
    ),
    "SeqfraudJournalBehind": (
        "10m",
        {'seqfraud_journal_unsynced_records{instance="a"}': "0x20",
         'seqfraud_journal_unindexed_records{instance="a"}': "15000x20"},
        {'seqfraud_journal_unsynced_records{instance="a"}': "500x20",
         'seqfraud_journal_unindexed_records{instance="a"}': "3000x20"},
    ),
    "SeqfraudSnapshotOld": ("2h", {BEHIND: "200000x200", SNAPSHOT: "0x200"}, {BEHIND: "200000x200", SNAPSHOT: "0+60x200"}),
    "SeqfraudMetricsUnreadable": (
        "40m",
        {'seqfraud_metrics_unreadable_total{instance="a"}': "0+1x60"},
        {'seqfraud_metrics_unreadable_total{instance="a"}': "3x60"},
    ),
    "SeqfraudNoTransactions": (
        "1d1h", {SCORED: "0+300x288 86400x24"}, {SCORED: "0+300x288 86400+15x24"},
    ),
    "SeqfraudDecisionsShifted": (
        "7d12h",
        {SCORED: "0+6000x200", STOPPED: "0+60x168 10080+180x30"},
        {SCORED: "0+6000x200", STOPPED: "0+60x200"},
    ),
    "SeqfraudUnseenCategories": (
        "4h",
        {SCORED: "0+100x300", 'seqfraud_categories_unseen_total{instance="a",field="kind"}': "0+30x300"},
        {SCORED: "0+100x300", 'seqfraud_categories_unseen_total{instance="a",field="kind"}': "0+10x300"},
    ),
    "SeqfraudConflicts": (
        "1h",
        {SCORED: "0+100x90", 'seqfraud_transactions_conflicting_total{instance="a"}': "0+2x90"},
        {SCORED: "0+1000x90", 'seqfraud_transactions_conflicting_total{instance="a"}': "0+2x90"},
    ),
    "SeqfraudLateEvents": (
        "4h",
        {SCORED: "0+100x300", 'seqfraud_transactions_late_total{instance="a"}': "0+30x300"},
        {SCORED: "0+100x300", 'seqfraud_transactions_late_total{instance="a"}': "0+5x300"},
    ),
    "SeqfraudRuleFails": (
        "1h",
        {'seqfraud_rule_failures_total{instance="a",rule="likely"}': "0+1x90"},
        {'seqfraud_rule_failures_total{instance="a",rule="likely"}': "9x90"},
    ),
    "SeqfraudNoLabels": (
        "3d", {SCORED: "0+600x80", f'{LABELS}"new"}}': "4x80"}, {SCORED: "0+600x80", f'{LABELS}"new"}}': "0x60 1x20"},
    ),
    "SeqfraudLabelsOfUnknown": (
        "1d4h",
        {f'{LABELS}"new"}}': "0+60x30", f'{LABELS}"unknown"}}': "0+120x30"},
        {f'{LABELS}"new"}}': "0+120x30", f'{LABELS}"unknown"}}': "0+60x30"},
    ),
    "SeqfraudDeadLetters": ("5m", {f'{OUTBOX}"dead"}}': "1x20"}, {f'{OUTBOX}"dead"}}': "0x20", f'{OUTBOX}"waiting"}}': "5x20"}),
    "SeqfraudOutboxStuck": (
        "40m",
        {f'{OUTBOX}"waiting"}}': "5x60", DELIVERED: "7x60"},
        {f'{OUTBOX}"waiting"}}': "5x60", DELIVERED: "0+1x60"},
    ),
    "SeqfraudMonitorAlarm": (
        "10m",
        {f'{VERDICT}role="in service",topic="inputs"}}': "0x5 3x10"},
        {f'{VERDICT}role="in service",topic="inputs"}}': "2x20", f'{VERDICT}role="shadow",topic="inputs"}}': "3x20"},
    ),
    "SeqfraudMonitorUnknown": (
        "8h",
        {f'{VERDICT}role="",topic="all"}}': "0x2 1x200"},
        {f'{VERDICT}role="",topic="all"}}': "1x20 0x200", f'{VERDICT}role="in service",topic="quality"}}': "1x220"},
    ),
    "SeqfraudMonitorSilent": ("8h", {WRITTEN: "0x100"}, {WRITTEN: "0+300x100"}),
}  # fmt: skip


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def expressions() -> Iterator[str]:
    """Every query of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def promtool(tool: Any, *words: object) -> None:
    done = subprocess.run([tool("promtool", PROMTOOL), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_rules(tool) -> None:
    promtool(tool, "check", "rules", "--lint-fatal", RULES)


def test_every_alert_says_how_urgent_it_is_and_what_it_is() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert "instance" in rule["annotations"]["summary"], name


def test_every_alert_fires_on_what_it_is_for_and_only_there(tool, tmp_path: Path) -> None:
    rules = alerts()
    assert set(CASES) == set(rules)
    files = []
    for name, (at, fires, quiet) in CASES.items():
        alone, file = tmp_path / f"{name}.yml", tmp_path / f"{name}-test.yml"
        alone.write_text(json.dumps({"groups": [{"name": "one", "rules": [rules[name]]}]}))
        step = STEPS.get(name, "1m")
        firing = f'count(ALERTS{{alertname="{name}",alertstate="firing"}})'
        tests = [
            {
                "name": f"{name} {'fires' if expected else 'is quiet'}",
                "interval": step,
                "input_series": [{"series": one, "values": values} for one, values in series.items()],
                "promql_expr_test": [{"expr": firing, "eval_time": at, "exp_samples": expected}],
            }
            for series, expected in ((fires, [{"labels": "{}", "value": 1}]), (quiet, []))
        ]
        file.write_text(json.dumps({"rule_files": [str(alone)], "evaluation_interval": step, "tests": tests}))
        files.append(file)
    promtool(tool, "test", "rules", *files)


def test_the_dashboard_asks_what_prometheus_understands(tool, tmp_path: Path) -> None:
    queries = [expr.replace("$__rate_interval", "5m").replace("$instance", ".*") for expr in expressions()]
    assert len(queries) > 20 and not any("$" in query for query in queries)
    rules = [{"record": f"dashboard:query:{n}", "expr": query} for n, query in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool(tool, "check", "rules", file)


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "seqfraud" and dashboard["__inputs"][0]["name"] == "DS_PROMETHEUS"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells and max(x for x, _ in own) < 24, panel["title"]
        cells |= own
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${DS_PROMETHEUS}" and panel["description"] and panel["targets"]


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(
            method, path, body if isinstance(body, bytes) else json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_every_metric_that_is_named_in_docs_is_there_in_a_live_service(
    serve, receiver, secret_file: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text(f'[webhook]\nurl = "{receiver.url}"\nsecret = "{secret_file}"\n')
    first = serve("--settings", settings).started()
    rule = {"expression": "amount > 1.0", "decision": "review", "enabled": True, "why": "a test"}
    assert request(first.port, "PUT", "/v1/rules/likely", rule)[0] == 200
    block = {"kind": "block", "field": "user", "why": "a test"}
    assert request(first.port, "PUT", "/v1/lists/blocked", block)[0] == 200
    assert first.stop() == 0, "a snapshot is there from now on"
    (tmp_path / "state" / "monitor.prom").write_text(
        "".join(f"# HELP {name} X.\n# TYPE {name} gauge\n{name} 1\n" for name in FAMILIES)
    )
    running = serve("--settings", settings).started()
    assert request(running.port, "POST", "/v1/score", row(0))[0] == 200
    assert request(running.port, "POST", "/v1/labels", [{"transaction_id": 0, "is_fraud": True}])[0] == 200
    status, body = request(running.port, "GET", "/metrics")
    assert status == 200
    exposed = {name for name, _ in read(body.decode())}
    for file in (RULES.read_text(), *expressions(), (DOCS / "monitoring.md").read_text()):
        named = {name for name in NAME.findall(file) if not name.startswith(CHALLENGERS)} - {"seqfraud_metrics"}
        assert named - exposed - {name for name in named if f"{name}_bucket" in exposed} == set(), file
    assert running.stop() == 0
