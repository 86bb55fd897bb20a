"""From a journal and a file to a challenger, and to the words that say whether it may be promoted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from benchmarks.drawn import CARDS
from seqfraud.bulk import read_for_bundle
from seqfraud.bundle import Bundle, open_bundle, write_manifest
from seqfraud.cli import main
from seqfraud.config import DAY_MS, HOUR_MS, Config, load_config, parse_config
from seqfraud.errors import ConfigError, RunError
from seqfraud.identifiers import is_stored_form
from seqfraud.reading import read_transactions
from seqfraud.registry import Registry
from seqfraud.schema import schema_of
from serve.load import load
from serve.offline import score_journal
from serve.retraining import Cuts, challenger_config, step_latency, write_training_data
from serve.service import Service

START = 1_600_000_000_000
MINUTE = 60_000
CARD = "4111111111111111"
CONFIG = (
    CARDS.replace('"2h"', '"1d"').replace("window = 3", "window = 8").replace('"1h", "12h"', '"1d", "7d"')
    + """
[split]
validation = "5d"
train_end = 2020-09-20
[training]
epochs = 3
users_per_batch = 8
learning_rate = 1e-2
[decision]
alert_share = 0.05
"""
)
SPAN = 36 * DAY_MS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG)
    return file


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    names = ("id", "user", "time", "amount", "kind", "merchant", "device", "fraud", "known_at")
    usual = {"user": "ann", "amount": 5.0, "kind": "food", "merchant": "m", "device": "d", "fraud": 0}
    columns = {name: [{**usual, **row}.get(name) for row in rows] for name in names}
    columns["known_at"] = pa.array(columns["known_at"], pa.int64())
    parquet.write_table(pa.table(columns), file)
    return file


def post(service: Service, number: int, **changes: Any) -> None:
    row = {"id": f"j{number}", "user": "ann", "time": START + number * HOUR_MS, "amount": 5.0, "kind": "food",
           "merchant": "m", "device": "d"}  # fmt: skip
    service.score(json.dumps({**row, **changes}).encode())


def say(service: Service, **label: Any) -> None:
    service.add_labels(json.dumps([label]).encode())


def written(
    config: Path, state: Path, original: Path | None, now: int, key: Path | None = None
) -> list[dict[str, Any]]:
    """The training file's rows with times in hours since START; what training reads of them is the same."""
    loaded, out = load_config(config), config.parent / "made.parquet"
    write_training_data(loaded, state, original, key, now, out)
    assert out.stat().st_mode & 0o077 == 0
    schema = schema_of(loaded)
    table, problems = read_transactions(out, schema, replace(loaded.data, label_known_at="known_at"))
    assert [p.reason for p in problems] in ([], ["missing label"])
    rows = parquet.read_table(out).to_pylist()
    assert [row["label"] for row in ({"label": None if x < 0 else x} for x in table.label.tolist())] == [
        row["fraud"] for row in rows
    ]
    for i, row in enumerate(rows):
        row["time"] = (int(table.time[i]) - START) / HOUR_MS
        row["known_at"] = None if row["fraud"] is None else (int(table.known_at[i]) - START) / HOUR_MS
    return rows


def labels(rows: list[dict[str, Any]]) -> dict[str, tuple[int | None, float | None]]:
    return {row["id"]: (row["fraud"], row["known_at"]) for row in rows}


# ---- the data


def test_a_user_of_the_file_and_of_the_journal_is_one_and_an_id_of_both_counts_once(
    make_bundle: Callable[..., Bundle], config: Path, tmp_path: Path
):
    state = tmp_path / "state"
    original = write_rows(
        tmp_path / "original.parquet",
        [
            {"id": "o1", "user": CARD, "time": START - 50 * HOUR_MS, "fraud": 1, "known_at": START - 40 * HOUR_MS},
            {"id": "o2", "user": "bob", "time": START - 20 * HOUR_MS, "kind": None},
            {"id": "o3", "user": "bob", "time": START - 10 * HOUR_MS, "fraud": 1, "known_at": START + 200 * HOUR_MS},
            {"id": "o4", "user": "bob", "time": START - 9 * HOUR_MS},
            {"id": "j0", "user": CARD, "time": START - 5 * HOUR_MS, "amount": 777.0},
            {"id": "o5", "user": "late in the file", "time": START + HOUR_MS},
        ],
    )
    with Service(make_bundle(CONFIG), state, clock=lambda: START) as service:
        post(service, 0, user=CARD)
        post(service, 1, kind="", device="4111-1111-1111-1111")
        post(service, 2)
        post(service, 60)
        say(service, transaction_id="j1", is_fraud=True, known_at=START + 5 * HOUR_MS)
        say(service, transaction_id="j2", is_fraud=True, known_at=START + 90 * HOUR_MS)
        say(service, transaction_id="o4", is_fraud=True, known_at=START + 3 * HOUR_MS)
    rows = written(config, state, original, START + 70 * HOUR_MS)
    assert [row["id"] for row in rows] == ["o1", "o2", "o3", "o4", "j0", "j1", "j2", "j60"]
    assert [row["time"] for row in rows] == [-50, -20, -10, -9, 0, 1, 2, 60]
    assert rows[0]["user"] == rows[4]["user"] != CARD
    assert is_stored_form(rows[0]["user"])
    assert is_stored_form(rows[5]["device"])
    assert (rows[4]["amount"], rows[1]["kind"], rows[5]["kind"]) == (5.0, None, None)
    assert labels(rows) == {
        "o1": (1, -40), "o2": (0, 4), "o3": (None, None),  # known later
        "o4": (1, 3),  # said to the service
        "j0": (0, 24), "j1": (1, 5), "j2": (0, 26),  # what is said later is not known yet
        "j60": (None, None),  # not matured
    }  # fmt: skip
    without = written(config, state, None, START + 70 * HOUR_MS)
    assert without == rows[4:]


def test_another_key_or_policy_would_make_two_users_of_one(
    make_bundle: Callable[..., Bundle], config: Path, tmp_path: Path
):
    state, now = tmp_path / "state", START + 70 * HOUR_MS
    with Service(make_bundle(CONFIG), state, clock=lambda: START) as service:
        post(service, 0, user=CARD)
    other = tmp_path / "other.key"
    other.touch(mode=0o600)
    other.write_text("ab" * 32)
    with pytest.raises(RunError, match="not the identifier key"):
        written(config, state, None, now, other)
    kept = (state / "identifier.key").rename(tmp_path / "kept.key")
    with pytest.raises(ConfigError, match="no such identifier key"):
        written(config, state, None, now)
    assert len(written(config, state, None, now, kept)) == 1
    config.write_text(CONFIG + '[identifiers]\ndefault = "keep"\n')
    with pytest.raises(RunError, match="by which a user of the file and of the journal would be two"):
        written(config, state, None, now, kept)


def test_what_was_declined_in_silence_is_not_honest_where_others_were_let_through(
    make_bundle: Callable[..., Bundle], config: Path, tmp_path: Path
):
    drawn = make_bundle(CONFIG)
    for share in (0.0, 0.05):
        folder, state = tmp_path / f"bundle {share}", tmp_path / f"state {share}"
        policy = replace(
            drawn.manifest.policy, thresholds=replace(drawn.manifest.policy.thresholds, review=0.0, decline=0.0)
        )
        with Service(with_manifest(drawn, folder, policy=replace(policy, control_share=share)), state) as service:
            for n in range(150):
                post(service, n)
            answers = [json.loads(service.transaction(f"j{n}")) for n in range(150)]
            say(service, transaction_id="j3", is_fraud=True, known_at=START + 4 * HOUR_MS)
        known = labels(written(config, state, None, START + 1000 * HOUR_MS))
        spared = {a["transaction_id"] for a in answers if a["decision"] == "approve"}
        assert bool(spared) == (share > 0)
        wanted = {f"j{n}" for n in range(150)} if not share else spared | {"j3"}
        assert {one for one, (label, _) in known.items() if label is not None} == wanted


def with_manifest(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    import shutil

    shutil.copytree(bundle.path, folder)
    write_manifest(folder, replace(bundle.manifest, **changes))
    return open_bundle(folder)


# ---- the configuration


def test_the_configuration_is_the_same_but_for_data_and_split(config: Path):
    strange = '[identifiers.columns]\n"merchant" = "keep"\n'
    config.write_text("# why\n" + CONFIG + strange)
    loaded, cuts = load_config(config), Cuts.of(START, DAY_MS, 7 * DAY_MS)
    made: Config = parse_config(challenger_config(config, loaded, Path('/a "b"/data.parquet'), cuts), "made")
    assert made.split is not None
    assert loaded.split is not None
    assert (made.split.train_end, made.split.test_start, made.split.test_end) == (
        START - 9 * DAY_MS, START - 8 * DAY_MS, START - DAY_MS,
    )  # fmt: skip
    assert made.split.validation == loaded.split.validation
    assert made.data == replace(loaded.data, path='/a "b"/data.parquet', label_known_at="known_at")
    assert replace(made, data=loaded.data, split=loaded.split) == loaded


def test_the_column_of_knowing_has_a_name_that_is_free(config: Path):
    text = CONFIG.replace('label_known_at = "known_at"\n', "").replace('"device"', '"label_known_at"')
    config.write_text(text)
    made = parse_config(challenger_config(config, load_config(config), Path("data"), Cuts.of(START, 1, 1)), "made")
    assert made.data.label_known_at == "label_known_at_"


def test_two_steps_are_timed_in_one_run(cards: Bundle):
    measured = step_latency(cards, cards)
    assert measured.champion > 0
    assert measured.challenger > 0


# ---- all of it


def traffic(file: Path) -> Path:
    """Frauds at two of twelve merchants, and large ones; an untrained model cannot know."""
    rng = np.random.default_rng(0)
    rows = []
    for n, time in enumerate(np.sort(rng.integers(START, START + SPAN, 3000)).tolist()):
        merchant, amount = f"m{rng.integers(12)}", float(np.round(rng.lognormal(3, 1), 2))
        fraud = rng.random() < (0.6 if merchant in ("m1", "m2") and amount > 20 else 0.01)
        rows.append({"id": f"t{n}", "user": f"u{rng.integers(80)}", "time": time, "amount": amount,
                     "kind": ("food", "fuel")[n % 2], "merchant": merchant, "device": f"d{rng.integers(40)}",
                     "fraud": int(fraud), "known_at": time + DAY_MS // 2 if fraud else None})  # fmt: skip
    return write_rows(file, rows)


def test_a_challenger_is_trained_passes_and_a_bad_one_is_refused(
    make_bundle: Callable[..., Bundle], config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The first half of the time is in the file alone, the second in the journal alone."""
    data, state = traffic(tmp_path / "data.parquet"), tmp_path / "state"
    said = {"last": "2020-09-13T00:00:00Z"}
    champion = with_manifest(make_bundle(CONFIG), tmp_path / "champion", fingerprint=said)
    half = START + SPAN // 2
    table = read_for_bundle(champion, data)
    with Service(champion, state) as service:
        load(service, table.take(table.time >= half))
    models = Registry(tmp_path / "registry")
    models.promote(models.add(champion.path, "me"), "me", "the first")

    def run(*args: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = main([*map(str, args)])
        return code, capfd.readouterr().out

    out = tmp_path / "out"
    where = ("--state", state, "--registry", models.folder, "--compare", "8d", "--challenge")
    code, words = run("retrain", config, *where, "--data", data, "--out", out, "--device", "cpu", "--threads", "1")
    assert code == 0, words
    report = json.loads((out / "gate.json").read_text())
    new = open_bundle(out / "bundle")
    assert (report["passed"], report["champion"], report["challenger"]) == (True, champion.id, new.id)
    assert words.startswith(f"challenger {new.id} against champion {champion.id}: passed")
    assert (models.champion, models.challengers) == (champion.id, (new.id,))
    assert json.loads(models.attached(new.id)["gate.json"].read_text()) == report
    # trained on both halves, on nothing that it is compared on
    rows = parquet.read_table(out / "data.parquet")
    assert rows["id"].to_pylist() == table.id_texts()
    assert new.manifest.fingerprint["labels_until"] == report["compared"]["from"]
    assert report["compared"]["frauds"] > 30
    # it scores what the service holds as it would have answered
    assert len(score_journal(new, state, 1).ids) == len(table.take(table.time >= half))

    bad = with_manifest(make_bundle(CONFIG, seed=1), tmp_path / "bad", fingerprint=said)
    where = ("--state", state, "--compare", "8d")
    code, words = run("gate", bad.path, *where, "--champion", new.path, "--out", tmp_path / "bad.json")
    assert code == 3
    lines = {line.split("  ")[2]: line for line in words.splitlines()[1:]}
    assert lines["average precision"].strip().startswith("NO")
    assert "surely worse" in lines["average precision"]
    assert "NO" in lines["parity"]  # a drawn bundle's manifest has no check
    assert not json.loads((tmp_path / "bad.json").read_text())["passed"]
    code, words = run("gate", new.path, *where, "--champion", champion.path, "--compare", "20d", "--json")
    assert code == 3
    assert json.loads(words)["criteria"][0]["name"] == "unseen"
    assert not json.loads(words)["criteria"][0]["passed"]


def test_what_cannot_be_tried_is_said_in_one_line(
    make_bundle: Callable[..., Bundle], cards: Bundle, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    champion, state = make_bundle(CONFIG), tmp_path / "state"
    with Service(champion, state, clock=lambda: START) as service:
        post(service, 0)
    where = ("--state", state, "--out", tmp_path / "out")
    models = Registry(tmp_path / "registry")
    models.add(champion.path, "me")
    for args, words in [
        ((), "expected --registry or --champion, one of them"),
        (("--champion", champion.path, "--challenge"), "--challenge: expected --registry with it"),
        (("--registry", models.folder), "there is no champion yet"),
        (("--champion", champion.path, "--compare", "soon"), "--compare: 'soon' is not a duration"),
        (("--champion", champion.path, "--data", tmp_path / "no"), "no such file or folder"),
        (("--champion", champion.path), "seqfraud train failed: "),
    ]:
        assert main(["retrain", *map(str, (config, *where, *args))]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert main(["gate", *map(str, (cards.path, *where[:2], "--champion", champion.path))]) == 2
    assert "the fingerprint does not say" in capsys.readouterr().err
