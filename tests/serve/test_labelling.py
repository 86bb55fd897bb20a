"""Labels in bulk: what files say, what becomes of their rows, and the command against a service in a process."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from seqfraud.bundle import Bundle
from seqfraud.cli import main
from seqfraud.errors import DataError, RequestError, RunError
from seqfraud.reading import LabelColumns
from serve.keys import add_key
from serve.labelling import PATIENCE_S, Post, over_http, post_labels, read_rows
from serve.replay import Client
from serve.service import Service

T = 1_600_000_000_000
COLUMNS = LabelColumns()


def rows_of(path: Path, columns: LabelColumns = COLUMNS, unit: Any = "iso") -> list[dict[str, Any]]:
    total, rows = read_rows(path, columns, unit, "bank")
    numbers, labels = zip(*rows, strict=True)
    assert numbers == tuple(range(1, len(labels) + 1)) and total in (None, len(labels))
    return list(labels)


def said(identity: object, is_fraud: int, known_at: object = None) -> dict[str, Any]:
    label = {"transaction_id": identity, "is_fraud": is_fraud, "source": "bank"}
    return label if known_at is None else {**label, "known_at": known_at}


# ---- files


def test_a_csv_file_says_what_its_cells_say(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(
        "transaction_id,other,is_fraud,known_at\n"
        "007,x,1,2020-09-13T12:26:40Z\n"
        "7,x,false,\n"
        "a b,x,,2020-09-13T12:26:40Z\n"
        "9007199254740993,x,True,2020-09-13T14:26:40.500+02:00\n"
    )
    assert rows_of(file) == [
        said("007", 1, T), said("7", 0), {}, said("9007199254740993", 1, T + 500),
    ]  # fmt: skip


def test_parquet_and_json_lines_say_the_same(tmp_path: Path) -> None:
    table = pa.table(
        {
            "tx": pa.array([1, 9007199254740993, 3], pa.int64()),
            "fraud": pa.array([True, False, None]),
            "since": pa.array([T // 1000, None, 5], pa.int64()),
        }
    )
    columns = LabelColumns("tx", "fraud", "since")
    parquet, lines = tmp_path / "labels.parquet", tmp_path / "labels.jsonl"
    pyarrow.parquet.write_table(table, parquet)
    lines.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    expected = [("1", 1, T), ("9007199254740993", 0, None), None]
    for file in (parquet, lines):
        seen = [
            (str(row["transaction_id"]), row["is_fraud"], row.get("known_at")) if row else None
            for row in rows_of(file, columns, "s")
        ]
        assert seen == expected, file


def test_a_file_without_a_time_says_now_unless_a_column_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("transaction_id,is_fraud\n1,1\n")
    assert rows_of(file) == [said("1", 1)]
    with pytest.raises(DataError, match="there is no column 'since'"):
        rows_of(file, LabelColumns(known_at="since"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "transaction_id,is_fraud\n1,1\n2,maybe\n", r"row 2: is_fraud: 'maybe'; expected 1, 0, true, false"),
        ("a.csv", "transaction_id,is_fraud\n1,2\n", r"row 1: is_fraud: '2'; expected"),
        ("a.csv", "transaction_id,is_fraud\n1,0\n,1\n", r"row 2: transaction_id: .*expected the id"),
        ("a.csv", "transaction_id,is_fraud,known_at\n1,0,soon\n", r"row 1: known_at: 'soon'; expected a time"),
        ("a.csv", "transaction_id,fraud\n1,0\n", r"there is no column 'is_fraud'; the columns are"),
        ("a.jsonl", '{"transaction_id": 1, "is_fraud": 1}\n{"id": 1}\n', r"row 2: .*object with 'transaction_id'"),
        ("a.jsonl", '{"transaction_id": 1, "is_fraud": 1}\n{\n', r"row 2: '\{'; expected a JSON object"),
        ("a.txt", "", r"expected a \.csv"),
    ],
)
def test_what_is_no_label_is_named_with_its_row(tmp_path: Path, name: str, content: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        rows_of(file)


# ---- posting


def posting_to(service: Service) -> Post:
    return lambda labels: json.loads(service.add_labels(json.dumps(labels).encode()))


def transaction(number: int) -> bytes:
    row = {"id": number, "user": "ann", "time": T + number, "amount": 5, "kind": "a", "merchant": "m", "device": "d"}
    return json.dumps(row).encode()


def test_an_interrupted_file_is_posted_again_and_ends_the_same(service: Service) -> None:
    for number in range(6):
        service.score(transaction(number))
    rows = [(number + 1, said(str(number), number % 2, T + 100)) for number in range(8)]  # two that have not come yet
    stored = posting_to(service)
    calls: list[int] = []

    def breaks(labels: list[dict[str, Any]]) -> Any:
        calls.append(len(labels))
        if len(calls) == 2:
            raise RunError("http://x/v1/labels: no answer: reset")
        return stored(labels)

    with pytest.raises(RunError, match=r"row 4: .*reset; the labels before row 4 are stored"):
        post_labels(rows, breaks, 3)
    steps: list[int] = []
    done = post_labels(rows, stored, 3, steps.append)
    assert done.as_dict() == {
        "rows": 8, "new": 3, "changed": 0, "unchanged": 3, "unknown": 2, "without_label": 0,
    }  # fmt: skip
    assert steps == [3, 3, 2]
    before = service.journal.last_seq
    assert post_labels(rows, stored).unchanged == 8
    assert service.journal.last_seq == before, "nothing is written for what is known"


def test_a_label_that_the_service_refuses_is_named_by_its_row(service: Service) -> None:
    rows = [(2, said("1", 1)), (3, said("2", 0)), (5, {**said("3", 1), "is_fraud": "maybe"}), (6, said("4", 1))]
    with pytest.raises(RunError, match=r"row 5: is_fraud: .*maybe.*; the labels before row 5 are stored"):
        post_labels(rows, posting_to(service), 2)
    assert service.journal.last_label("2") is not None and service.journal.last_label("4") is None


class Busy:
    """A client that is told other things first."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    def call(self, method: str, path: str, content: Any) -> Any:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


REFUSED = {"error": {"code": "overloaded", "message": "ask again", "field": ""}}
COUNTS = {"new": 1, "changed": 0, "unchanged": 0, "unknown": 0}


def test_a_service_that_is_overloaded_or_away_is_asked_again() -> None:
    client: Any = Busy((503, REFUSED), RunError("away"), (429, REFUSED), (200, COUNTS))
    waits: list[float] = []
    assert over_http(client, waits.append)([said("1", 1)]) == COUNTS
    assert waits == [0.5, 1.0, 2.0]


def test_but_not_for_ever_and_not_where_it_says_no() -> None:
    forever: Any = Busy(*[(503, REFUSED)] * 100)
    waits: list[float] = []
    with pytest.raises(RequestError, match="ask again"):
        over_http(forever, waits.append)([])
    assert PATIENCE_S <= sum(waits) < 2 * PATIENCE_S
    no: Any = Busy((403, {"error": {"code": "forbidden", "message": "this key's role", "field": ""}}))
    with pytest.raises(RequestError, match="this key's role"):
        over_http(no, waits.append)([])
    assert no.asked == 1


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["labels", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_new_labels_corrections_and_labels_that_come_first_reach_a_running_service(
    serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, key_file = tmp_path / "keys.json", tmp_path / "label.key"
    labeller = add_key(keys, ["label"], 0)
    key_file.write_text(labeller[1])
    scorer = add_key(keys, ["score", "label"], 0)[1]
    running = serve("--keys", keys).started()
    client = Client(running.url, scorer)
    for number in range(3):
        assert client.call("POST", "/v1/score", json.loads(transaction(number)))[0] == 200
    assert client.call("POST", "/v1/labels", [{"transaction_id": 0, "is_fraud": True, "source": "analyst"}])[0] == 200
    file = tmp_path / "labels.csv"
    file.write_text("transaction_id,is_fraud,known_at\n0,0,\n1,1,2020-09-14T00:00:00Z\n2,,\n9,1,2020-09-14T00:00:00Z\n")
    words = (file, "--url", running.url, "--key-file", key_file, "--source", "chargeback", "--json", "--batch", 2)
    code, out, _ = run(capsys, *words)
    assert (code, json.loads(out)) == (
        0, {"rows": 4, "new": 1, "changed": 1, "unchanged": 0, "unknown": 1, "without_label": 1},
    )  # fmt: skip
    code, out, _ = run(capsys, *words)
    assert (code, json.loads(out)["unchanged"]) == (0, 3), "a second time changes nothing"

    def labels(number: int) -> list[tuple[bool, str, str]]:
        status, answer = client.call("GET", f"/v1/transactions/{number}")
        assert status == 200
        return [(one["is_fraud"], one["source"], one["author"]) for one in answer["labels"]]

    assert [(fraud, source) for fraud, source, _ in labels(0)] == [(True, "analyst"), (False, "chargeback")]
    assert labels(1) == [(True, "chargeback", labeller[0].id)]
    assert labels(2) == []
    assert client.call("POST", "/v1/score", json.loads(transaction(9)))[0] == 200
    assert labels(9) == [(True, "chargeback", labeller[0].id)]

    monkeypatch.delenv("SEQFRAUD_API_KEY", raising=False)
    code, _, err = run(capsys, file, "--url", running.url)
    assert code == 2 and "row 1: " in err and "API key" in err
    assert running.stop() == 0


def test_a_service_that_is_not_running_is_told_in_its_state_folder(
    cards: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    with Service(cards, state) as service:
        service.score(transaction(1))
    file = tmp_path / "labels.jsonl"
    file.write_text('{"transaction_id": 1, "is_fraud": true}\n{"transaction_id": "x", "is_fraud": 0}\n')
    code, out, _ = run(capsys, file, "--state", state, "--bundle", cards.path)
    assert (code, out) == (
        0,
        "2 rows: 1 new, 0 changed, 0 unchanged, 1 of transactions that are not known yet, 0 without a label\n",
    )
    with Service(cards, state) as service:
        label = service.journal.last_label("1")
        assert label is not None and (label.is_fraud, label.source, label.author) == (True, "file", "labels")
        code, _, err = run(capsys, file, "--state", state, "--bundle", cards.path)
        assert code == 2 and "another process is using this state folder" in err


@pytest.mark.parametrize("words", [(), ("--url", "http://x", "--state", "s"), ("--state", "s"), ("--bundle", "b")])
def test_one_service_has_to_be_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "labels.csv", *words)
    assert code == 2 and "expected --url, or --state with --bundle" in err
