"""History loaded, then transactions streamed over HTTP one at a time with their labels: equal to bulk scoring?

    python -m benchmarks.stream_parity                 # handbook data, 100,000 transactions from 2018-08-08 on
    python -m benchmarks.stream_parity --config configs/sparkov.toml --data ../shared/data/sparkov_gen.parquet \
        --since 2020-06-21

Trains and exports first, unless --bundle names a bundle. Writes benchmarks/results/stream_parity_NAME.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.processes import DATA, ROOT, command, command_json, service, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "handbook.toml")
    parser.add_argument("--data", type=Path, default=DATA / "handbook.parquet")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--since", default="2018-08-08")
    parser.add_argument("--limit", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seqfraud-parity-") as folder:
        work = Path(folder)
        bundle = args.bundle
        if bundle is None:
            bundle = work / "bundle"
            command("train", args.config, "--data", args.data, "--out", work / "run")
            command("export", work / "run", "--out", bundle)
        scores, state = work / "scores.parquet", work / "state"
        command("score", bundle, args.data, "--out", scores)
        began = time.perf_counter()
        loaded = command_json("load", args.data, "--bundle", bundle, "--state", state, "--until", args.since)
        load_seconds = time.perf_counter() - began
        with service(bundle, state) as url:
            began = time.perf_counter()
            replayed = command_json(
                "replay", args.data, "--url", url, "--since", args.since, "--limit", args.limit, "--against", scores
            )
            replay_seconds = time.perf_counter() - began
    result = {
        "data": args.data.name,
        "since": args.since,
        "loaded": loaded,
        "load_seconds": round(load_seconds, 1),
        "loaded_per_second": round(loaded["transactions"] / load_seconds),
        "replay_seconds": round(replay_seconds, 1),
        **replayed,
    }
    write_result(f"stream_parity_{args.data.stem}", result)
    print(json.dumps(result, indent=1))
    print(f"largest difference over {replayed['compared']:,} transactions: {replayed['largest_difference']:.2e}")


if __name__ == "__main__":
    main()
