"""`seqfraud score` and `seqfraud verify`."""

from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet
import typer

from seqfraud.bulk import read_with_report, score_table
from seqfraud.bundle import open_bundle
from seqfraud.console import bar, print_cleaning, print_json
from seqfraud.files import replaced_file
from seqfraud.policy import DECISIONS, decide_many, flag_many
from seqfraud.verification import verify_bundle

BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def score(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Argument(help="CSV or Parquet, a file or a folder.", metavar="DATA")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 2,
    json: JsonOption = False,
) -> None:
    """Score a file in arrival order: transaction_id, fraud_probability, is_fraud, decision.

    Rows that repeat an id count once, as the service would have it.

    Example: seqfraud score bundle transactions.parquet --out scores.parquet
    """
    opened = open_bundle(bundle)
    table, cleaning = read_with_report(opened, data)
    print_cleaning(cleaning)
    with bar("scoring", len(table)) as progress:
        probability = score_table(opened, table, threads, progress.advance)
    thresholds = opened.manifest.thresholds
    flagged, decisions = flag_many(probability, thresholds), decide_many(probability, thresholds)
    names = pa.array(DECISIONS)
    scores = pa.table(
        {
            "transaction_id": pa.array(table.id_texts(), pa.string()),
            "fraud_probability": pa.array(probability),
            "is_fraud": pa.array(flagged),
            "decision": pa.DictionaryArray.from_arrays(pa.array(decisions), names),
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(out) as file:
        pa.parquet.write_table(scores, file)
    if json:
        print_json(
            {
                "model": opened.id,
                "rows": len(table),
                "cleaning": cleaning,
                "is_fraud": int(flagged.sum()),
                "out": str(out),
            }
        )
    else:
        print(f"{len(table):,} transactions scored with {opened.id}, {int(flagged.sum()):,} flagged: {out}")


def verify(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Check a bundle's files and the parity of its graphs with the trained module's reference vectors.

    Example: seqfraud verify bundle
    """
    measured = verify_bundle(bundle)
    if json:
        print_json(measured)
        return
    width = max(map(len, measured))
    for name, figures in measured.items():
        print(f"{name:{width}}  " + "  ".join(f"{what} {value:.2g}" for what, value in figures.items()))
    print(f"{bundle}: {len(measured)} checks passed")
