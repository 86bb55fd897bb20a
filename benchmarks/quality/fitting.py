"""The GRU on one split: fitted for a number of epochs that was chosen before, every row up to the test end scored."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from seqfraud.nn.model import SequenceModel
from training.loop import DeviceData, fit, pick_device, score_logits
from training.prepare import Prepared, fit_scaling


@dataclass(frozen=True)
class FittedGru:
    """A model that was fitted on train and validation rows, and what it says.

    Attributes:
        logit: float64 [N], over encoded rows; NaN after the end of the test.
    """

    model: SequenceModel
    logit: npt.NDArray[np.float64]


def fit_gru(prepared: Prepared, kind: type[SequenceModel] = SequenceModel) -> FittedGru:
    """Fit by the prepared configuration, its seed and epochs; nothing is measured on the way."""
    model = _unfitted(prepared, kind, refit=True)
    fit(model, prepared, pick_device("auto"), prepared.config.training, refit=True)
    return FittedGru(model, logits_until(model, prepared, prepared.split.test_end))


@dataclass(frozen=True)
class Tuned:
    """A model that was fitted on train rows, the number of its epochs chosen on the validation rows.

    Attributes:
        logit: float64 [N], over encoded rows; NaN after the validation days.
    """

    model: SequenceModel
    epochs: int
    logit: npt.NDArray[np.float64]


def fit_to_validation(prepared: Prepared) -> Tuned:
    """Fit by the prepared configuration on train rows and keep the epoch that is best on the validation rows."""
    model = _unfitted(prepared, SequenceModel, refit=False)
    found = fit(model, prepared, pick_device("auto"), prepared.config.training)
    return Tuned(model, found.best_epoch, logits_until(model, prepared, prepared.split.train_end))


def _unfitted(prepared: Prepared, kind: type[SequenceModel], refit: bool) -> SequenceModel:
    torch.manual_seed(prepared.config.training.seed)
    scaling, spec, graph = fit_scaling(prepared, refit=refit)
    model = kind(spec, graph)
    scaling.apply(model.encoder)
    return model


def logits_until(model: SequenceModel, prepared: Prepared, end: int) -> npt.NDArray[np.float64]:
    """float64 [N]: the logit of every encoded row before `end` (ms), state carried over whole histories; else NaN."""
    encoded = prepared.encoded.until(end)
    device = next(model.parameters()).device
    logit = score_logits(model, DeviceData(encoded, device), encoded, prepared.config.training.events_per_chunk)
    return logit.astype(np.float64)
