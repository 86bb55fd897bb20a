"""The model with something taken away: what the benchmarks compare it with.

Letters: B users, T events, W inputs of the GRU, L layers, H hidden units, N encoded rows.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqfraud.graph import GraphSpec
from seqfraud.nn.model import ModelSpec, Network, SequenceModel
from seqfraud.sequences import group_users
from training.loop import EVALUATION_USERS, DeviceData, walk
from training.prepare import Prepared


class _Forgetful(Network):
    """Every event meets the zero state."""

    def recur(self, z: Tensor, h: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What the cells give for each event by itself [B, 1 + T, H], zeros in front, and h as it was at first."""
        batch, events, _ = z.shape
        x = z.reshape(1, batch * events, -1)
        for cell in self.cells:
            x, _ = cell(x)
        states = x.reshape(batch, events, -1)
        return torch.cat([torch.zeros_like(states[:, :1]), states], dim=1), torch.zeros_like(h)


class WithoutRecurrence(SequenceModel):
    """The same layers, context and head, but every event meets the zero state: nothing is remembered.

    The gap and the way from the event before stay, as the trees have them too. There is no forecast: a state that knows
    nothing would forecast the same for everybody, and the head has the event's own numbers in bins already.
    """

    network = _Forgetful

    def __init__(self, spec: ModelSpec, graph: GraphSpec) -> None:
        super().__init__(replace(spec, forecast=False), graph)


def limited_logits(
    model: SequenceModel, prepared: Prepared, rows: npt.NDArray[np.int64], last: int
) -> npt.NDArray[np.float64]:
    """float64 [n]: the logit of each of n encoded rows, its user's history beginning `last` events before it.

    The context is not the user's history and stays. Of the first event that is left the gap is unknown, as a user's first.
    """
    encoded = prepared.encoded
    first = np.repeat(encoded.begin, encoded.lengths())[rows]
    windows = replace(encoded, begin=np.maximum(first, rows - last), end=rows + 1)
    data = DeviceData(encoded, next(model.parameters()).device)
    model.eval()
    out = np.full(len(rows), np.nan)
    for group in group_users(windows.lengths(), EVALUATION_USERS):
        steps = prepared.config.training.events_per_chunk
        for chunk, outputs in walk(model, data, windows, group, steps, lambda _: False, mixed=False):
            logit = outputs["logit"].float().cpu().numpy()
            # of a window that goes on, written again with the next chunk
            out[group[: len(chunk.length)]] = logit[np.arange(len(chunk.length)), chunk.length - 1]
    return out


def without_run_state(prepared: Prepared) -> Prepared:
    """The same data, contexts without what is kept of an entity's run of known frauds.

    A column that never changes has no scale and no bins: the model sees nothing of it.
    """
    names = [name.rsplit(".", 1)[1] for name in prepared.context.names()]
    taken = [name.startswith(("run_", "since_")) for name in names]
    if not any(taken):
        raise ValueError(f"the contexts hold no run state: {names}")
    context = prepared.encoded.context.copy()
    context[:, taken] = 0.0
    return replace(prepared, encoded=replace(prepared.encoded, context=context))
