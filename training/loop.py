"""Fit the GRU: chunks with carried state, loss on labelled training events, early stop on the validation days."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from seqfraud.config import TrainingConfig
from seqfraud.errors import ConfigError
from seqfraud.graph import NEXT
from seqfraud.metrics import average_precision
from seqfraud.nn.model import SequenceModel
from seqfraud.sequences import Chunk, Encoded, chunks, group_users
from training.prepare import Prepared
from training.resume import Epoch, Progressed, ResumeFile

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""
EVALUATION_USERS = 512
FINAL_RATE = 0.02
"""Share of the learning rate that is left at the end of the cosine."""


@dataclass
class Fit:
    """Outcome of a fit; the model holds the weights of the best epoch."""

    best_epoch: int
    history: list[Epoch] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """A fitted model, not yet calibrated, with what it was fitted on."""

    prepared: Prepared
    model: SequenceModel
    fit: Fit


Progress = Callable[[int, float, int, Epoch | None], None]
"""Called with (epoch, share of the epoch done, events seen in it, the epoch when it is complete)."""


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: {name!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


class DeviceData:
    """The encoded columns as tensors on the training device; on the CPU they share the arrays' memory."""

    def __init__(self, encoded: Encoded, device: torch.device) -> None:
        self.device = device
        self.columns = {"event_time": torch.from_numpy(encoded.time).to(device)}
        for name in ("numeric", "categorical", "context"):
            column = getattr(encoded, name)
            if column.shape[1]:
                self.columns[name] = torch.from_numpy(column).to(device)

    def inputs(self, chunk: Chunk) -> dict[str, Tensor]:
        """Sequence inputs of a chunk without states."""
        rows = torch.from_numpy(np.maximum(chunk.rows, 0)).to(self.device)
        inputs = {name: column[rows] for name, column in self.columns.items()}
        if "categorical" in inputs:
            inputs["categorical"] = inputs["categorical"].long()
        inputs["length"] = torch.from_numpy(chunk.length).to(self.device)
        return inputs


def carried(model: SequenceModel, outputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The next chunk's states: those of its users, detached, in the declared types."""
    states = {}
    for spec in model.graph.states:
        value = outputs[spec.name + NEXT].narrow(spec.batch_axis, 0, batch).detach()
        states[spec.name] = value.float() if spec.dtype == "float32" else value
    return states


def walk(
    model: SequenceModel,
    data: DeviceData,
    encoded: Encoded,
    users: npt.NDArray[np.int64],
    events: int,
    wants_gradient: Callable[[Chunk], bool],
    mixed: bool,
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Chunk, dict[str, Tensor]]]:
    """What the model gives for each chunk of a group of users, states carried from chunk to chunk.

    `start` holds the group's states before its first events, if it has any.
    """
    outputs: dict[str, Tensor] = {}
    for chunk in chunks(encoded, users, events):
        batch = len(chunk.length)
        if not chunk.first:
            states = carried(model, outputs, batch)
        elif start is None:
            states = model.initial_states(batch, data.device)
        else:
            states = {spec.name: start[spec.name].narrow(spec.batch_axis, 0, batch) for spec in model.graph.states}
        gradient = torch.is_grad_enabled() and wants_gradient(chunk)
        with (
            torch.set_grad_enabled(gradient),
            torch.autocast(data.device.type, dtype=torch.bfloat16, enabled=mixed),
        ):
            outputs = model({**data.inputs(chunk), **states})
        yield chunk, outputs


def score_logits(
    model: SequenceModel,
    data: DeviceData,
    encoded: Encoded,
    events: int,
    start: Mapping[str, Tensor] | None = None,
) -> npt.NDArray[np.float32]:
    """float32 [N] uncalibrated logits of every encoded row up to each user's end; NaN beyond it.

    `start` holds the states of all users before their first rows; left out, they are the initial ones.
    """
    out = np.full(len(encoded), np.nan, dtype=np.float32)
    for chunk, _, outputs in _scored(model, data, encoded, events, start):
        real = chunk.rows >= 0
        out[chunk.rows[real]] = outputs["logit"].float().cpu().numpy()[real]
    return out


def states_after(model: SequenceModel, data: DeviceData, encoded: Encoded, events: int) -> dict[str, Tensor]:
    """The states of all users after their last rows; of users who have none, the initial ones."""
    states = model.initial_states(len(encoded.begin), data.device)
    for chunk, users, outputs in _scored(model, data, encoded, events):
        batch = len(chunk.length)
        after = carried(model, outputs, batch)
        at = torch.from_numpy(users[:batch]).to(data.device)
        for spec in model.graph.states:
            # a user who goes on is written again with the next chunk
            states[spec.name].index_copy_(spec.batch_axis, at, after[spec.name])
    return states


def _scored(
    model: SequenceModel, data: DeviceData, encoded: Encoded, events: int, start: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Chunk, npt.NDArray[np.int64], dict[str, Tensor]]]:
    """Every chunk with its group of users and what the model gives for it, without gradients."""
    model.eval()
    for users in group_users(encoded.lengths(), EVALUATION_USERS):
        theirs = None
        if start is not None:
            at = torch.from_numpy(users).to(data.device)
            theirs = {spec.name: start[spec.name].index_select(spec.batch_axis, at) for spec in model.graph.states}
        walked = walk(model, data, encoded, users, events, lambda _: False, mixed=False, start=theirs)
        for chunk, outputs in walked:
            yield chunk, users, outputs


def positive_weight(setting: float | str, label: npt.NDArray[np.int8]) -> float:
    """Weight of a fraud in the loss, from the labels that are fitted."""
    if isinstance(setting, float):
        return setting
    ratio = float((label == 0).sum() / max((label == 1).sum(), 1))
    return ratio if setting == "balanced" else math.sqrt(ratio)


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up, then a cosine to FINAL_RATE of the peak; `done` is the share of all steps."""
    if done < WARM_UP:
        return peak * max(done, 1e-3) / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
    return peak * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def fit(
    model: SequenceModel,
    prepared: Prepared,
    device: torch.device,
    settings: TrainingConfig,
    progress: Progress | None = None,
    keep: ResumeFile | None = None,
    resume: bool = False,
    refit: bool = False,
) -> Fit:
    """Train in place and leave the weights of the best validation epoch in the model.

    With `refit` the number of epochs was chosen before: validation rows are train rows too, nothing is measured, and the
    last epoch's weights stay.

    With `keep` the fit is written to that file after every epoch, and with `resume` it goes on from there, to the result
    that it would have had.

    The loss is the binary cross-entropy of every train event and, with a weight, the forecast's error of every event;
    without a forecast, chunks without a train event only carry state. The best epoch has the highest average precision on the validation rows.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    encoded = prepared.encoded
    trained = encoded.until(prepared.split.train_end if refit else prepared.split.validation_start)
    watched = encoded.until(prepared.split.train_end)
    target = torch.from_numpy((prepared.label == 1).astype(np.float32)).to(device)
    use = prepared.rows.fitted(refit)
    data = DeviceData(encoded, device)
    model.to(device)
    mixed = settings.mixed_precision and device.type == "cuda"
    weight = torch.tensor(positive_weight(settings.positive_weight, prepared.label[use]), device=device)
    criterion = nn.BCEWithLogitsLoss(reduction="sum", pos_weight=weight)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    validation = prepared.rows.validation

    forecasts = bool(model.spec.forecasts) and settings.forecast_weight > 0

    def has_loss(chunk: Chunk) -> bool:
        return forecasts or bool(use[chunk.rows[chunk.rows >= 0]].any())

    done = keep.load(model, optimizer, rng, device) if keep and resume else None
    if done is None:
        done = Progressed([], 0, -1.0, _copy(model))
    for epoch in range(len(done.history), settings.epochs):
        if epoch - done.best_epoch >= settings.patience:
            break
        began, loss_sum, labelled, events = time.perf_counter(), 0.0, 0, 0
        groups = group_users(trained.lengths(), settings.users_per_batch, rng)
        model.train()
        for g, users in enumerate(groups):
            share = (epoch + g / len(groups)) / settings.epochs
            for param in optimizer.param_groups:
                param["lr"] = learning_rate(share, settings.learning_rate)
            for chunk, outputs in walk(model, data, trained, users, settings.events_per_chunk, has_loss, mixed):
                events += int(chunk.length.sum())
                member_logits = outputs["member_logits"].float()
                if not member_logits.requires_grad:
                    continue
                real = chunk.rows >= 0
                fitted = real & use[np.maximum(chunk.rows, 0)]
                rows = torch.from_numpy(chunk.rows[fitted]).to(device)
                where = torch.from_numpy(fitted).to(device)
                # each network learns by itself: the sum of their losses, no loss of their mean
                loss = criterion(member_logits[:, where], target[rows].expand(len(member_logits), -1))
                total = loss
                if forecasts:
                    own = outputs["forecast_loss"][torch.from_numpy(real).to(device)].sum()
                    total = loss + settings.forecast_weight * own
                # over the nominal size of a chunk: the few events of a late chunk are not worth a full step
                (total / (settings.users_per_batch * settings.events_per_chunk)).backward()
                for network in model.networks:
                    nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += loss.item() / len(member_logits)
                labelled += int(fitted.sum())
            if progress:
                progress(epoch, (g + 1) / len(groups), events, None)
        seconds = time.perf_counter() - began
        figure = math.nan
        if not refit:
            logits = score_logits(model, data, watched, settings.events_per_chunk)
            measured = average_precision(prepared.label[validation], logits[validation].astype(np.float64))
            assert measured is not None  # `rows_of` refuses validation rows without a fraud
            figure = measured
        report = Epoch(epoch + 1, loss_sum / max(labelled, 1), figure, events / seconds, seconds)
        done.history.append(report)
        if refit or figure > done.best:
            done.best, done.best_epoch, done.best_weights = figure, epoch + 1, _copy(model)
        if keep:
            keep.save(done, model, optimizer, rng)
        if progress:
            progress(epoch, 1.0, events, report)
    model.load_state_dict(done.best_weights)
    return Fit(done.best_epoch, done.history)


def _copy(model: SequenceModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
