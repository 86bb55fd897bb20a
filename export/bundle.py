"""Run folder -> verified bundle, or a refusal that says which check failed and by how much."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.baseline import baseline_graphs
from export.graphs import export_graphs
from export.reference import SPAN, Arrays, arranged_cases, reference_cases
from seqfraud.bundle import (
    REFERENCE,
    Bundle,
    LabelSource,
    Manifest,
    Parity,
    ServeDefaults,
    open_bundle,
    put_in_place,
    write_manifest,
)
from seqfraud.context import context_spec
from seqfraud.errors import BundleError, ParityError
from seqfraud.nn.baseline import Baseline, baseline_folder, load_baseline
from seqfraud.nn.checkpoint import Run, may_be_missing, versions
from seqfraud.verification import LOGIT_TOLERANCE, PROBABILITY_TOLERANCE, Figures
from seqfraud.watched import KEY as WATCHED


def export_run(run: Run, out: Path) -> Bundle:
    """Write the bundle of a run's GRU to `out`; nothing is left there or beside it where a check fails.

    Raises:
        ParityError: the graphs read back in a fresh process do not compute what the module does.
    """
    with np.load(run.path / REFERENCE, allow_pickle=False) as rows:
        cases, span = reference_cases(run.model, {k: rows[k] for k in rows.files})
    return _write_verified(manifest_of(run), cases, span, lambda folder: export_graphs(run.model, folder), out)


def export_baseline(run: Run, kind: str, out: Path) -> Bundle:
    """The same of a baseline without a state; the reference is what scikit-learn gave when the baselines ran.

    Raises:
        RunError: the run has no such baseline, or it is one with hand-made history features.
        ParityError: the graphs read back in a fresh process do not compute what scikit-learn did.
    """
    baseline = load_baseline(run, kind)
    folder = baseline_folder(run.path, kind)
    with np.load(folder / REFERENCE, allow_pickle=False) as rows:
        cases, span = arranged_cases({k: rows[k] for k in rows.files})
    manifest = baseline_manifest(run, baseline)
    return _write_verified(manifest, cases, span, lambda to: baseline_graphs(baseline, folder, to), out)


def _write_verified(
    manifest: Manifest, cases: Arrays, span: Figures, write_graphs: Callable[[Path], None], out: Path
) -> Bundle:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out / "manifest.json").is_file():
        raise BundleError(f"{out}: exists and is not a bundle; choose another --out or remove it")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_graphs(temporary)
        with (temporary / REFERENCE).open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **cases)
        write_manifest(temporary, manifest)
        measured = verify_in_fresh_process(temporary)
        measured["probabilities visited"] = span
        final = replace(manifest, parity=replace(manifest.parity, measured=measured))
        write_manifest(temporary, final)
        put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_bundle(out)


def spans(figures: Figures) -> bool:
    """Whether the checks visited both ends of the probabilities that they should."""
    return figures["lowest"] <= SPAN[0] and figures["highest"] >= SPAN[1]


def manifest_of(run: Run) -> Manifest:
    """The manifest before verification."""
    return Manifest(
        kind="gru",
        schema=run.schema,
        label=LabelSource(run.config.data.label, run.config.data.label_known_at),
        context=context_spec(run.config, run.schema),
        vocabularies=run.vocabularies,
        graph=run.graph,
        missing=may_be_missing(run.schema, run.model.spec),
        calibration=run.calibration,
        policy=run.policy,
        serve=ServeDefaults(run.config.serve.window, run.config.serve.max_batch),
        cleaning=run.config.cleaning,
        identifiers=run.config.identifiers,
        fingerprint=run.fingerprint,
        metrics={k: run.metrics[k] for k in ("validation", "test", WATCHED) if k in run.metrics},
        versions=versions(),
        parity=Parity(PROBABILITY_TOLERANCE, LOGIT_TOLERANCE, {}),
    )


def baseline_manifest(run: Run, baseline: Baseline) -> Manifest:
    """The run's manifest with what is the baseline's own; it refuses the same rows as the GRU."""
    return replace(
        manifest_of(run),
        kind=baseline.kind,
        graph=baseline.rows.graph,
        calibration=baseline.calibration,
        policy=baseline.policy,
        fingerprint=baseline.fingerprint,
        metrics=baseline.metrics,
        versions={**versions(), **baseline.versions},
    )


def verify_in_fresh_process(folder: Path) -> dict[str, Figures]:
    """Verify from disk in a process that has seen neither the module nor the exporter. Raises ParityError."""
    done = subprocess.run(
        [sys.executable, "-m", "seqfraud.verification", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["the verifying process ended without a word"]
        raise ParityError(f"export refused: {lines[-1]}")
    measured: dict[str, Figures] = json.loads(done.stdout)
    return measured
