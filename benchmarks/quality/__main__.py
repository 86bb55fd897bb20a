"""Detection quality, measured.

    python -m benchmarks.quality [--setting week|all] [--seeds 3] [--validation]

Writes benchmarks/results/handbook_quality.json, and the scores of every test transaction: of seed 0 as handbook_scores.parquet
beside it, of other seeds in build/quality. A run that is in the result already is not made again. `make bench-quality` makes
the rest too: `benchmarks.quality.compare`, `order`, `ablation`, `pictures`, `page`.
"""

import argparse
import json

import pyarrow as pa
import pyarrow.parquet as parquet

from benchmarks.processes import RESULTS, environment
from benchmarks.quality.handbook import FOLDS, VALIDATION_FOLD, read_fold, run, scores_file, seeded, summary
from benchmarks.quality.results import kept
from seqfraud.files import replaced_file

RESULT = "handbook_quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("week", "all"), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation", action="store_true", help="the weeks that settings are chosen on; writes nothing"
    )
    options = parser.parse_args()
    settings = options.setting or ["week", "all"]
    if options.validation:
        for setting in settings:
            print(json.dumps(run(read_fold(setting, VALIDATION_FOLD, 0))[0]), flush=True)
        return
    file = RESULTS / RESULT
    for setting in settings:
        for first in FOLDS:
            made = {(r["setting"], r["fold"], r["seed"]) for r in kept(file, "runs")}
            missing = [seed for seed in range(options.seeds) if (setting, first, seed) not in made]
            fold = read_fold(setting, first, 0) if missing else None
            for seed in missing:
                assert fold is not None
                row, table = run(seeded(fold, seed))
                print(json.dumps(row), flush=True)
                # read again: two processes, a setting each, may write by turns
                rows = sorted([*kept(file, "runs"), row], key=lambda r: (r["setting"], r["seed"], r["fold"]))
                result = {**environment(), "summary": summary(rows), "runs": rows}
                with replaced_file(file) as temporary:
                    temporary.write_text(json.dumps(result, indent=1) + "\n")
                scores = scores_file(seed)
                scores.parent.mkdir(parents=True, exist_ok=True)
                before = [parquet.read_table(scores)] if scores.is_file() else []
                with replaced_file(scores) as temporary:
                    parquet.write_table(pa.concat_tables([*before, table]), temporary, compression="zstd")
    print(json.dumps(json.loads(file.read_text())["summary"], indent=1))


if __name__ == "__main__":
    main()
