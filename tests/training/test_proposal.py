"""`seqfraud init`: roles proposed for the simulator's and the public files, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfraud.config import Config, load_config
from seqfraud.errors import ConfigError, DataError
from training.proposal import Proposal, write_config
from training.simulate import Simulation, simulate

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def proposed(data: Path, tmp_path: Path, read_all: bool = True) -> tuple[Config, Proposal]:
    proposal, checked = write_config(data, tmp_path / "my.toml", read_all=read_all)
    assert checked is None or checked.refusal is None
    return load_config(tmp_path / "my.toml"), proposal


def test_the_simulator(tmp_path: Path) -> None:
    pq.write_table(simulate(Simulation(users=300, days=90)), tmp_path / "data.parquet")
    config, proposal = proposed(tmp_path / "data.parquet", tmp_path)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time, data.label) == ("transaction_id", "user_id", "time", "is_fraud")
    assert data.amount == "amount"
    assert features.numeric == ("amount",)
    assert features.categorical == ("category",)
    assert "merchant_id" in features.context
    assert features.geo == (("lat", "long"),)
    assert features.ip == ("ip",)
    left_out = {choice.column: choice.why for choice in proposal.of("left out")}
    assert "fraud_kind" in left_out
    assert (config.data.path, config.split is not None) == ("data.parquet", True)


def test_every_column_has_a_reason_and_the_text_has_comments(tmp_path: Path) -> None:
    table = simulate(Simulation(users=100, days=60))
    pq.write_table(table, tmp_path / "data.parquet")
    _, proposal = proposed(tmp_path / "data.parquet", tmp_path)
    assert [choice.column for choice in proposal.choices] == table.column_names
    assert all(choice.why for choice in proposal.choices)
    lines = (tmp_path / "my.toml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 10


def test_an_existing_file_stays_without_force(tmp_path: Path) -> None:
    pq.write_table(simulate(Simulation(users=50, days=60)), tmp_path / "data.parquet")
    (tmp_path / "my.toml").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        write_config(tmp_path / "data.parquet", tmp_path / "my.toml")
    assert (tmp_path / "my.toml").read_text() == "mine"
    write_config(tmp_path / "data.parquet", tmp_path / "my.toml", force=True)
    load_config(tmp_path / "my.toml")


def test_a_file_without_a_time_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["a", "b"] * 50, "amount": [1.5, 2.5] * 50}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="time"):
        write_config(tmp_path / "data.parquet", tmp_path / "my.toml")
    assert not (tmp_path / "my.toml").exists()


def public(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not beside the checkout in shared/data; this test needs it")
    return DATA / name


def test_the_handbook_data(tmp_path: Path) -> None:
    config, proposal = proposed(public("handbook.parquet"), tmp_path, read_all=False)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time) == ("TRANSACTION_ID", "CUSTOMER_ID", "TX_DATETIME")
    assert (data.label, data.amount) == ("TX_FRAUD", "TX_AMOUNT")
    assert (features.numeric, features.context) == (("TX_AMOUNT",), ("TERMINAL_ID",))
    assert [choice.column for choice in proposal.of("left out")] == ["TX_FRAUD_SCENARIO"]


def test_the_sparkov_data(tmp_path: Path) -> None:
    config, proposal = proposed(public("sparkov_gen.parquet"), tmp_path, read_all=False)
    data, features = config.data, config.features
    assert (data.transaction, data.user, data.time) == (None, "cc_num", "trans_date_trans_time")
    assert (data.label, data.amount) == ("is_fraud", "amt")
    assert "merchant" in features.context
    assert "category" in features.categorical
    assert features.geo == (("merch_lat", "merch_long"),)
    assert "unix_time" in [choice.column for choice in proposal.of("left out")]
