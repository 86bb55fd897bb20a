"""A run folder: train, calibrate, choose thresholds, evaluate, write; and read it again.

config.toml          the configuration as used, byte for byte; with --select without the inputs that were dropped
model.safetensors    the weights
model.json           data, shapes, schema, context, vocabularies, calibration, thresholds, fingerprint
reference.npz        rows of the training time from which export makes its parity checks (no identifiers)
metrics.json         figures on validation and test rows
importance.json      what the model uses, where that was measured
report.html          the same for people, with pictures
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from seqfraud.choosing import ScoredDays, choose_policy
from seqfraud.config import DAY_MS, HOUR_MS, Config, format_instant, load_config
from seqfraud.drift import groups_of, share_of
from seqfraud.errors import RunError
from seqfraud.files import replaced_file
from seqfraud.fingerprint import KEY as DRIFT
from seqfraud.fingerprint import Columns, drift_reference, gaps_of, stacked
from seqfraud.metrics import measure_quality
from seqfraud.nn.checkpoint import Run, described, may_be_missing, versions
from seqfraud.nn.model import SequenceModel
from seqfraud.policy import Policy, Thresholds, flag_many
from seqfraud.sequences import require_numbers
from seqfraud.table import MISSING
from seqfraud.watched import ALERT_SHARE, measure_watched
from seqfraud.watched import KEY as WATCHED
from training.calibrate import platt
from training.dropping import dropped_text
from training.importance import FILE as IMPORTANCE_FILE
from training.importance import REPEATS, Importance, inputs_of, measure_importance, read_importance
from training.importance import Progress as Permuting
from training.loop import DeviceData, Fitted, Progress, fit, pick_device, score_logits
from training.prepare import Prepared, fit_scaling, prepare
from training.resume import FILE as RESUME_FILE
from training.resume import ResumeFile, identity_of
from training.selection import Say, Selection, select_inputs
from training.worth import described_choice, scored_days, validation_days, worth

REFERENCE_ROWS = 2000
DECILES = np.linspace(0, 1, 11)


def train_run(
    config_path: Path,
    data: Path | None,
    out: Path,
    device_name: str,
    progress: Progress | None = None,
    resume: bool = False,
    select: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Train by a configuration and write the run folder; returns the metrics.

    With `resume` an interrupted training in that folder goes on to the result it would have had. With `select` the
    inputs that the model does not need are dropped (`training.selection`), and `say` is told of every step.
    """
    config = load_config(config_path)
    text = config_path.read_bytes()
    device = pick_device(device_name)
    source = data_path(config, config_path, data)
    if select:  # what cannot be written at the end is refused at the start
        dropped_text(text.decode(), str(config_path), config, dict.fromkeys(inputs_of(config.features)[1:], ""), "")
    numbers = itertools.count()

    def train(to: Config) -> Fitted:
        number = next(numbers)
        keep_at = out / (f"without-{number}-{RESUME_FILE}" if number else RESUME_FILE)
        return fit_model(to, source, device, progress, keep_at, text, resume)

    selection = select_inputs(config, train, device, say) if select else None
    fitted = train(config) if selection is None else selection.chosen
    if selection is not None and selection.dropped:
        text = selected_text(text.decode(), config_path, config, selection).encode()
    config, prepared, model = fitted.prepared.config, fitted.prepared, fitted.model
    logits = all_logits(model, prepared, device)
    validation = prepared.rows.validation
    calibrate(model, config, logits[validation], prepared.label[validation])
    probability = calibrated(model, logits)
    decided = decide(prepared, probability)
    metrics = {
        "model": "gru",
        "chosen_on": f"validation rows: {'inputs, ' if selection else ''}epochs, calibration, thresholds, decisions",
        "split": prepared.split.as_dict(),
        "rows": {name: int(mask.sum()) for name, mask in vars(prepared.rows).items()},
        "device": device.type,
        "best_epoch": fitted.fit.best_epoch,
        "epochs": [asdict(epoch) for epoch in fitted.fit.history],
        **({"selection": selection.as_dict()} if selection else {}),
        "cleaning": prepared.cleaning,
        **decided.metrics,
        **qualities(prepared, probability, decided.policy.thresholds),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_model(out, text, source, prepared, model, decided.policy, probability)
    write_json(out / "metrics.json", metrics)
    if selection is None:
        (out / IMPORTANCE_FILE).unlink(missing_ok=True)  # of the model that was here before
    else:
        write_json(out / IMPORTANCE_FILE, selection.importance.as_dict())
    write_run_report(out, prepared, probability, metrics, decided.policy)
    for file in out.glob(f"*{RESUME_FILE}"):
        file.unlink()
    return metrics


def fit_model(
    config: Config,
    source: Path,
    device: torch.device,
    progress: Progress | None,
    keep_at: Path,
    text: bytes,
    resume: bool,
) -> Fitted:
    """Read, prepare and fit; the fit is kept at `keep_at` after every epoch."""
    prepared = prepare(config, source)
    torch.manual_seed(config.training.seed)
    scaling, spec, graph = fit_scaling(prepared)
    require_numbers(prepared.table, may_be_missing(prepared.schema, spec))
    model = SequenceModel(spec, graph)
    scaling.apply(model.encoder)
    arrays = {**vars(prepared.encoded), **vars(prepared.rows), "label": prepared.label}
    keep = ResumeFile(keep_at, identity_of(text, arrays, device))
    return Fitted(prepared, model, fit(model, prepared, device, config.training, progress, keep, resume))


def selected_text(text: str, config_path: Path, config: Config, selection: Selection) -> str:
    """The configuration's text without what was dropped, and why at its head."""
    before = {figure.input: figure for figure in selection.full.figures}
    reasons = {
        one: f"importance {before[one].mean:.4f} in the full model, standard deviation {before[one].deviation:.4f}"
        for one in selection.dropped
    }
    accepted = [trial for trial in selection.trials if trial.accepted][-1]
    heading = (
        f"By seqfraud train --select from {config_path.name}: dropped from [features], for the average precision on the "
        f"validation days is {accepted.average_precision:.4f} without and {selection.full.average_precision:.4f} with"
    )
    return dropped_text(text, str(config_path), config, reasons, heading)


def write_run_report(
    out: Path,
    prepared: Prepared,
    probability: npt.NDArray[np.float64],
    metrics: Mapping[str, Any],
    policy: Policy,
    page: str = "report.html",
) -> None:
    """The report of a run folder that holds everything else; with the baselines, where they are there."""
    # fonts and figures are loaded only where a report is made
    from training.report import read_baselines, report_content, write_report

    content = report_content(
        prepared,
        probability,
        metrics,
        policy,
        title=out.resolve().name,
        config_text=(out / "config.toml").read_text(encoding="utf-8"),
        command=(f"seqfraud train {out.name}/config.toml", f"seqfraud evaluate {out.name}"),
        baselines=read_baselines(out),
        importance=read_importance(out),
        versions=versions(),
    )
    write_report(out / page, content)


def data_path(config: Config, config_path: Path, data: Path | None) -> Path:
    """--data, or data.path relative to the configuration's folder; absolute. Raises RunError."""
    if data is not None:
        return data.resolve()
    if not config.data.path:
        raise RunError(f"{config_path}: data.path is missing and no --data is given")
    return (config_path.parent / config.data.path).resolve()


def all_logits(model: SequenceModel, prepared: Prepared, device: torch.device) -> npt.NDArray[np.float32]:
    """Uncalibrated logits of all rows up to the end of the test, NaN later."""
    until = prepared.encoded.until(max(prepared.split.test_end, prepared.split.train_end))
    return score_logits(model, DeviceData(prepared.encoded, device), until, prepared.config.training.events_per_chunk)


def calibrate(
    model: SequenceModel, config: Config, logit: npt.NDArray[np.float32], label: npt.NDArray[np.int8]
) -> None:
    """Fit the module's calibration on validation rows."""
    if config.calibration.method == "platt":
        scale, shift = platt(logit.astype(np.float64), label)
        model.scale.fill_(scale)
        model.shift.fill_(shift)


def calibrated(model: SequenceModel, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities of logits, by the module."""
    with torch.no_grad():
        return model.cpu().calibrated(torch.from_numpy(logits)).numpy().astype(np.float64)


@dataclass(frozen=True)
class Decided:
    """A policy, and what metrics.json says of it."""

    policy: Policy
    metrics: dict[str, Any]


def decide(prepared: Prepared, probability: npt.NDArray[np.float64]) -> Decided:
    """Choose the policy of the configuration on the validation days; what it is worth there and on the test days."""
    settings = prepared.config.decision
    validation = validation_days(prepared, probability)
    choice = choose_policy(settings, validation)
    described = described_choice(settings, validation, choice)
    figures = {
        **choice.policy.as_dict(),
        "choice": described,
        "worth": measure_worth(prepared, probability, choice.policy, described["alternatives"]),
        WATCHED: watched(prepared, probability, choice.policy),
    }
    return Decided(choice.policy, figures)


def watched(prepared: Prepared, probability: npt.NDArray[np.float64], policy: Policy) -> dict[str, Any]:
    """What monitoring compares with: the share of alerts on the validation days, and the quality on their labelled rows."""
    rows = validation_days(prepared, probability)
    alerts = share_of(policy.decide_many(rows.probability, rows.amount) > 0, groups_of(rows.user))
    assert alerts is not None
    known = rows.known
    amount = None if rows.amount is None else rows.amount[known]
    quality = measure_watched(
        rows.label[known],
        rows.probability[known],
        rows.day[known],
        rows.user[known],
        amount,
        alerts.share or ALERT_SHARE,
    )
    return {"alerts": asdict(alerts), **quality.as_dict()}


def measure_worth(
    prepared: Prepared,
    probability: npt.NDArray[np.float64],
    policy: Policy,
    others: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What a policy and others are worth on the days that are there; as metrics.json holds it."""
    days: dict[str, ScoredDays] = {}
    for part in ("validation", "test"):
        rows = scored_days(prepared, probability, part)
        if rows is not None and rows.known.any():
            days[part] = rows
    return worth(prepared.config.decision, policy, others, days)


def qualities(
    prepared: Prepared, probability: npt.NDArray[np.float64], thresholds: Thresholds
) -> dict[str, dict[str, Any]]:
    """Figures on validation and, where the data reach it, test rows."""
    table, encoded = prepared.table, prepared.encoded
    amount = table.amount()
    out = {}
    for name in ("validation", "test"):
        mask = getattr(prepared.rows, name)
        if not mask.any():
            continue
        arrival = encoded.arrival[mask]
        label = prepared.label[mask]
        quality = measure_quality(
            label,
            probability[mask],
            user=table.user.codes[arrival],
            time_ms=table.time[arrival],
            amount=None if amount is None else np.nan_to_num(amount[arrival]),
        )
        flagged = flag_many(probability[mask], thresholds)
        out[name] = {
            **quality.as_dict(),
            "flagged": int(flagged.sum()),
            "precision": float((label[flagged] == 1).mean()) if flagged.any() else None,
            "recall": float(flagged[label == 1].mean()) if (label == 1).any() else None,
        }
    return out


def fingerprint(prepared: Prepared, probability: npt.NDArray[np.float64]) -> dict[str, Any]:
    """What the training rows looked like, for the manifest and for drift."""
    rows, encoded = prepared.rows.before_validation, prepared.encoded
    time = encoded.time[rows]
    numeric = encoded.numeric[rows].astype(np.float64)
    context = encoded.context[rows]
    gaps = np.diff(encoded.time, prepend=0)
    gaps[encoded.begin[encoded.end > encoded.begin]] = -1  # a first event has none
    gaps = gaps[rows & (gaps >= 0)] / 1000
    return {
        "rows": int(rows.sum()),
        "frauds": int((prepared.label[prepared.rows.train] == 1).sum()),
        "users": len(np.unique(prepared.table.user.codes[encoded.arrival[rows]])),
        "first": format_instant(int(time.min())),
        "last": format_instant(int(time.max())),
        "labels_until": format_instant(prepared.split.test_start),
        "numeric_deciles": {
            column: np.nanquantile(numeric[:, i], DECILES).tolist()
            for i, column in enumerate(prepared.schema.numeric_inputs)
        },
        "numeric_missing": {
            column: float(np.isnan(numeric[:, i]).mean()) for i, column in enumerate(prepared.schema.numeric_inputs)
        },
        "context_deciles": {
            name: np.quantile(context[:, k], DECILES).tolist() for k, name in enumerate(prepared.context.names())
        },
        "gap_deciles_s": np.quantile(gaps, DECILES).tolist() if len(gaps) else [],
        "hour": int(np.bincount(time % DAY_MS // HOUR_MS, minlength=24).argmax()),
        "unseen": {
            v.column: float((encoded.categorical[prepared.rows.validation][:, c] == 1).mean())
            for c, v in enumerate(prepared.vocabularies)
        },
        "probability_deciles": np.quantile(probability[prepared.rows.validation], DECILES).tolist(),
        DRIFT: drift_reference(
            prepared.schema,
            prepared.context,
            prepared.vocabularies,
            columns_of(prepared),
            probability,
            prepared.split.train_start,
            prepared.split.validation_start,
            prepared.split.train_end,
        ),
    }


def columns_of(prepared: Prepared) -> Columns:
    """All rows as the model reads them, by user."""
    table, encoded = prepared.table, prepared.encoded
    user = table.user.codes[encoded.arrival]
    absent = {column: np.isnan(table.numbers[encoded.arrival, i]) for i, column in enumerate(table.schema.numbers)}
    absent |= {column: table.text(column).codes[encoded.arrival] == MISSING for column in table.schema.texts}
    return Columns(
        time=encoded.time,
        user=user,
        numeric=encoded.numeric,
        categorical=encoded.categorical,
        context=encoded.context,
        gap=gaps_of(user, encoded.time),
        absent=absent,
        entity=stacked([column.codes[encoded.arrival] for column in table.entities()], len(table)),
    )


def _write_model(
    out: Path,
    config_text: bytes,
    source: Path,
    prepared: Prepared,
    model: SequenceModel,
    policy: Policy,
    probability: npt.NDArray[np.float64],
) -> None:
    with replaced_file(out / "config.toml") as file:
        file.write_bytes(config_text)
    with replaced_file(out / "model.safetensors") as file:
        safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(file))
    write_json(
        out / "model.json",
        {
            "kind": "gru",
            "data": str(source),
            "model": model.spec.as_dict(),
            **described(prepared.schema, prepared.context),
            "vocabularies": [asdict(v) for v in prepared.vocabularies],
            "calibration": {
                "method": prepared.config.calibration.method,
                "scale": float(model.scale),
                "shift": float(model.shift),
            },
            **policy.as_dict(),
            "decided_by": asdict(prepared.config.decision),
            "fingerprint": fingerprint(prepared, probability),
            "versions": versions(),
        },
    )
    with replaced_file(out / "reference.npz") as file, file.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **reference_rows(prepared, probability))


def reference_rows(prepared: Prepared, probability: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """Rows of the training time, half of them those with the highest scores: columns of the graph, no identifiers."""
    encoded = prepared.encoded
    rows = np.flatnonzero(encoded.time < prepared.split.train_end)
    by_score = rows[np.argsort(-probability[rows], kind="stable")]
    half = min(REFERENCE_ROWS // 2, len(rows))
    others = np.random.default_rng(0).choice(rows, half, replace=False)
    chosen = np.unique(np.r_[by_score[:half], others])
    return {
        "event_time": encoded.time[chosen],
        "numeric": encoded.numeric[chosen],
        "categorical": encoded.categorical[chosen].astype(np.int64),
        "context": encoded.context[chosen],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then rename."""
    with replaced_file(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def evaluate_run(run: Run, data: Path | None, device_name: str = "auto") -> dict[str, Any]:
    """Figures of a run on its own or on other data, and the report again; nothing is fitted.

    On other data the report is report-NAME.html in the run folder, NAME being that of the data.
    """
    prepared = prepare(run.config, run.data if data is None else data, run.vocabularies, later=data is not None)
    require_numbers(prepared.table, may_be_missing(run.schema, run.model.spec))
    device = pick_device(device_name)
    run.model.to(device)
    probability = calibrated(run.model, all_logits(run.model, prepared, device))
    figures = {
        "split": prepared.split.as_dict(),
        "rows": {name: int(mask.sum()) for name, mask in vars(prepared.rows).items()},
        "cleaning": prepared.cleaning,
        "worth": measure_worth(prepared, probability, run.policy, run.metrics["choice"]["alternatives"]),
        **qualities(prepared, probability, run.policy.thresholds),
    }
    page = "report.html" if data is None else f"report-{data.stem}.html"
    write_run_report(run.path, prepared, probability, {**run.metrics, **figures}, run.policy, page)
    return figures


def decide_run(run: Run, data: Path | None, device_name: str = "auto") -> dict[str, Any]:
    """Choose a run's policy again, by the [decision] of its config.toml as it is now, and write it and the report.

    The weights and the calibration stay; what the policy is worth is measured on the run's own days. Returns the metrics.
    """
    prepared = prepare(run.config, run.data if data is None else data, run.vocabularies)
    require_numbers(prepared.table, may_be_missing(run.schema, run.model.spec))
    device = pick_device(device_name)
    run.model.to(device)
    probability = calibrated(run.model, all_logits(run.model, prepared, device))
    decided = decide(prepared, probability)
    metrics = {**run.metrics, **decided.metrics, **qualities(prepared, probability, decided.policy.thresholds)}
    described = json.loads((run.path / "model.json").read_text(encoding="utf-8"))
    settings = {"decided_by": asdict(run.config.decision)}
    write_json(run.path / "model.json", {**described, **decided.policy.as_dict(), **settings})
    write_json(run.path / "metrics.json", metrics)
    write_run_report(run.path, prepared, probability, metrics, decided.policy)
    return metrics


def importance_of_run(
    run: Run,
    data: Path | None,
    device_name: str = "auto",
    repeats: int = REPEATS,
    progress: Permuting | None = None,
) -> Importance:
    """What a run uses, on its own validation days or on those of a copy of its data; importance.json, the report again."""
    prepared = prepare(run.config, run.data if data is None else data, run.vocabularies)
    require_numbers(prepared.table, may_be_missing(run.schema, run.model.spec))
    device = pick_device(device_name)
    importance = measure_importance(run.model, prepared, device, repeats, progress=progress)
    write_json(run.path / IMPORTANCE_FILE, importance.as_dict())
    probability = calibrated(run.model, all_logits(run.model, prepared, device))
    write_run_report(run.path, prepared, probability, run.metrics, run.policy)
    return importance
