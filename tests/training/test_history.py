"""Hand-made history features against a slow reference, and that they know only the past."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from seqfraud.config import parse_config
from seqfraud.context import ContextSpec
from seqfraud.reading import read_transactions
from seqfraud.schema import schema_of
from seqfraud.sequences import Encoded, encode
from seqfraud.table import Transactions
from seqfraud.vocabulary import Vocabulary
from training.history import LAGS, WINDOWS, Features, history_features

CONFIG = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "s"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["kind"]
context = ["shop"]
"""
Rows = list[tuple[int, int, float | None, str, str]]
"""User, second, amount, kind, shop; in arrival order."""


def random_rows(seed: int, count: int = 300) -> Rows:
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.integers(0, 40 * 86_400, count) // 1800 * 1800)
    return [
        (int(rng.integers(5)), int(s), None if rng.random() < 0.1 else float(rng.integers(1, 50)),
         str(rng.choice(["a", "b", "c"])), f"s{rng.integers(3)}")
        for s in seconds
    ]  # fmt: skip


def features_of(rows: Rows, tmp_path: Path) -> tuple[Features, Transactions, Encoded]:
    """Features of all rows, in encoded order."""
    lines = [f"{i},{u},{s},{'' if a is None else a},{k},{shop}" for i, (u, s, a, k, shop) in enumerate(rows)]
    (tmp_path / "data.csv").write_text("\n".join(["id,user,time,amount,kind,shop", *lines]) + "\n")
    config = parse_config(CONFIG, "test")
    schema = schema_of(config)
    table, _ = read_transactions(tmp_path / "data.csv", schema)
    spec = ContextSpec(("shop",), (86_400_000,), 86_400_000)
    encoded = encode(table, [Vocabulary("kind", ("a", "b", "c"))], spec)
    return history_features(table, encoded, np.arange(len(encoded))), table, encoded


def column(features: Features, name: str) -> npt.NDArray[np.float32]:
    return features.values[:, features.names.index(name)]


@pytest.mark.parametrize("seed", range(4))
def test_against_a_slow_reference(seed: int, tmp_path: Path) -> None:
    rows = random_rows(seed)
    features, _, encoded = features_of(rows, tmp_path)
    for at, arrival in enumerate(encoded.arrival.tolist()):
        user, second, amount, kind, shop = rows[arrival]
        past = [r for r in rows[:arrival] if r[0] == user]
        expected: dict[str, float] = {"events before": len(past)}
        for lag in LAGS:
            there = past[-lag] if len(past) >= lag else None
            expected[f"seconds since {lag} before"] = np.nan if there is None else second - there[1]
            expected[f"amount {lag} before"] = np.nan if there is None or there[2] is None else there[2]
        for name, window in WINDOWS.items():
            recent = [r for r in past if second - r[1] <= window / 1000]
            amounts = [r[2] for r in recent if r[2] is not None]
            expected[f"count {name}"] = len(recent)
            expected[f"sum {name}"] = sum(amounts)
            expected[f"mean {name}"] = float(np.mean(amounts)) if amounts else np.nan
        amounts = [r[2] for r in past if r[2] is not None]
        expected["mean before"] = float(np.mean(amounts)) if amounts else np.nan
        if amounts and amount is not None:
            expected["amount / largest before"] = amount / max(amounts)
        same = [r for r in past if r[4] == shop]
        expected["shop: times before"] = len(same)
        expected["shop: seconds since"] = second - same[-1][1] if same else np.nan
        expected["shop: values before"] = len({r[4] for r in past})
        expected["kind: same as before"] = np.nan if not past else float(past[-1][3] == kind)
        for name, value in expected.items():
            got = column(features, name)[at]
            assert got == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), (name, at)


def test_the_future_changes_nothing(tmp_path: Path) -> None:
    rows = random_rows(9)
    cut = 180
    changed = [*rows[:cut], *[(u, s + 7200, 1000.0, "c", "s2") for u, s, *_ in rows[cut:]]]
    before, _, encoded = features_of(rows, tmp_path)
    after, _, other = features_of(changed, tmp_path)
    early, same = encoded.arrival < cut, other.arrival < cut
    order = np.argsort(encoded.arrival[early]), np.argsort(other.arrival[same])
    np.testing.assert_array_equal(before.values[early][order[0]], after.values[same][order[1]])


def test_names_are_distinct_and_ids_are_marked(tmp_path: Path) -> None:
    features, *_ = features_of(random_rows(1), tmp_path)
    assert len(set(features.names)) == len(features.names)
    assert [features.names[i] for i in features.categorical] == [f"kind {lag} before id" for lag in LAGS]
