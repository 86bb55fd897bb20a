"""A small simulation, prepared once for the tests of the quality benchmark."""

from pathlib import Path

import pytest

from seqfraud.config import load_config
from training.prepare import Prepared, prepare
from training.simulate import Simulation, simulate_to

CONFIG = """
[data]
path = "data.parquet"
transaction = "transaction_id"
user = "user_id"
time = "time"
label = "is_fraud"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["category"]
context = ["merchant_id", "user_id"]
user_inputs = ["ratio"]  # says nothing of fraud: no segment
[split]
train_end = "2025-02-10"
validation = "7d"
"""


@pytest.fixture(scope="session")
def small_split(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Sixty users, two months."""
    folder: Path = tmp_path_factory.mktemp("small_split")
    simulate_to(Simulation(users=60, days=60, fraud_share=0.05), folder / "data.parquet")
    (folder / "config.toml").write_text(CONFIG)
    return prepare(load_config(folder / "config.toml"), folder / "data.parquet")
