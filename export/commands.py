"""`seqfraud export`."""

from pathlib import Path
from typing import Annotated

import typer

from export.bundle import export_baseline, export_run, spans
from seqfraud.bundle import sign_bundle
from seqfraud.console import print_json
from seqfraud.nn.checkpoint import load_run
from seqfraud.signature import read_signing_key

GRU = "gru"


def export(
    run: Annotated[Path, typer.Argument(help="A run folder written by `seqfraud train`.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    model: Annotated[
        str, typer.Option(help="gru, or a baseline without history that `seqfraud baselines` fitted.")
    ] = GRU,
    sign: Annotated[Path | None, typer.Option(help="Private key to sign the bundle with; see seqfraud sign.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export a run to ONNX, verify it from disk in a fresh process, write the bundle or refuse.

    Example: seqfraud export runs/demo --out bundles/demo
    """
    key = None if sign is None else read_signing_key(sign)
    trained = load_run(run)
    bundle = export_run(trained, out) if model == GRU else export_baseline(trained, model, out)
    if key is not None:
        sign_bundle(out, key)
    measured = bundle.manifest.parity.measured
    visited = measured["probabilities visited"]
    checks = {name: figures for name, figures in measured.items() if name != "probabilities visited"}
    worst = {
        what: max((figures[what] for figures in checks.values() if what in figures), default=0.0)
        for what in ("probability", "logit", "state")
    }
    if json:
        print_json({"model": bundle.id, "out": str(out), "largest_differences": worst, "visited": visited})
        return
    print(
        f"bundle {bundle.id}: {out}\n{len(checks)} parity checks, largest difference of a probability "
        f"{worst['probability']:.1e}, of a logit {worst['logit']:.1e}"
    )
    if not spans(dict(visited)):
        print(f"note: the checks visited probabilities from {visited['lowest']:.2g} to {visited['highest']:.2g} only")
