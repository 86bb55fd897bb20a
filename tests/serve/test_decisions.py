"""Under a policy by the amount the service, bulk scoring of a file and of the journal decide the same."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfraud.bulk import Scores, read_for_bundle, score_table, write_scores
from seqfraud.bundle import Bundle, open_bundle, write_manifest
from seqfraud.policy import Costs, Policy, Thresholds
from serve.offline import score_journal
from serve.service import Service

START = datetime(2025, 1, 1, tzinfo=UTC)
THRESHOLDS = Thresholds(is_fraud=0.6, review=0.4, decline=0.8)
BY_COST = Policy(THRESHOLDS, costs=Costs(30.0, insult_cost=20.0, insult_share=0.2, fraud_cost=10.0, review_catches=0.7))
BY_LOSS = Policy(THRESHOLDS, review_loss=40.0)


def with_policy(bundle: Bundle, policy: Policy, folder: Path) -> Bundle:
    shutil.copytree(bundle.path, folder)
    write_manifest(folder, replace(bundle.manifest, policy=policy))
    return open_bundle(folder)


def rows() -> list[dict[str, Any]]:
    """Amounts from nothing to thousands, some missing."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"t{n}",
            "user": f"u{n % 7}",
            "time": (START + timedelta(minutes=11 * n)).isoformat(),
            "total": None if n % 6 == 0 else float(np.round(rng.lognormal(4, 2), 2)),
            "amount": float(np.round(rng.lognormal(3, 2), 2)),
            "age": float(20 + n % 50),
            "kind": ("food", "fuel", "other")[n % 3],
            "ip": f"198.51.{n % 5}.7",
            "lat": 48.0 + n % 4,
            "long": 11.0,
        }
        for n in range(180)
    ]


@pytest.mark.parametrize("policy", [BY_COST, BY_LOSS], ids=["cost", "expected loss"])
def test_the_service_and_bulk_scoring_decide_the_same(rich: Bundle, policy: Policy, tmp_path: Path) -> None:
    bundle = with_policy(rich, policy, tmp_path / "bundle")
    posted = rows()
    with Service(bundle, tmp_path / "state") as service:
        answers = [json.loads(service.score(json.dumps(row).encode())) for row in posted]
        assert json.loads(service.model())["decision"] == policy.as_dict()["decision"]
    decisions = [answer["decision"] for answer in answers]
    assert set(decisions) == {"approve", "review", "decline"}
    flat = [Policy(THRESHOLDS).decide(answer["fraud_probability"], None) for answer in answers]
    assert decisions != flat, "the amount matters"
    assert decisions[::6] == flat[::6], "where there is none, the thresholds decide"
    assert [answer["is_fraud"] for answer in answers] == [answer["fraud_probability"] >= 0.6 for answer in answers]

    pq.write_table(pa.Table.from_pylist(posted), tmp_path / "data.parquet")
    table = read_for_bundle(bundle, tmp_path / "data.parquet")
    scored = Scores(table.id_texts(), score_table(bundle, table, threads=1), table.amount())
    for scores in (scored, score_journal(bundle, tmp_path / "state", threads=1)):
        write_scores(tmp_path / "scores.parquet", scores, bundle.manifest.policy)
        written = pq.read_table(tmp_path / "scores.parquet").to_pydict()
        assert written["transaction_id"] == [row["id"] for row in posted]
        assert written["decision"] == decisions
        assert written["is_fraud"] == [answer["is_fraud"] for answer in answers]
