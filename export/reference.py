"""Inputs for the parity checks, made from real rows, and the trained model's outputs for them."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqfraud.nn.model import SequenceModel

LONG_USERS = 3
LONG_EVENTS = 1000
RAGGED_LENGTHS = (37, 1, 0, 19, 36, 2, 11)
CANDIDATES = 256
SPAN = (0.001, 0.99)
"""Probabilities that the checks should reach on both sides."""
GAPS_MS = (0, 1_000, 47_000, 600_000, 5_400_000, 86_400_000, 9 * 86_400_000)

Arrays = dict[str, npt.NDArray[Any]]


def reference_cases(model: SequenceModel, rows: Arrays, seed: int = 0) -> tuple[Arrays, dict[str, float]]:
    """The cases "ragged" and "long" with torch's outputs, keys `case/name`, and the probabilities that they span.

    Histories are drawn from the rows with gaps from none to days. Among many candidates those are kept that reach
    furthest to both sides; numbers are widened in some so that the tails are visited too.
    """
    rng = np.random.default_rng(seed)
    candidates = _histories(model, rows, CANDIDATES, max(RAGGED_LENGTHS), rng)
    candidates["length"] = np.full(CANDIDATES, max(RAGGED_LENGTHS))
    picked = pick_users(_torch_outputs(model, candidates)["probability"], np.array(RAGGED_LENGTHS))
    axes = {s.name: s.batch_axis for s in model.graph.states}
    ragged = {k: np.take(v, picked, axis=axes.get(k, 0)) for k, v in candidates.items()}
    ragged["length"] = np.array(RAGGED_LENGTHS)
    long = _histories(model, rows, LONG_USERS, LONG_EVENTS, rng)
    long["length"] = np.full(LONG_USERS, LONG_EVENTS)
    cases: Arrays = {}
    low, high = 1.0, 0.0
    for name, case in (("ragged", ragged), ("long", long)):
        out = _torch_outputs(model, case)
        real = np.arange(out["logit"].shape[1])[None] < case["length"][:, None]
        low = min(low, float(out["probability"][real].min()))
        high = max(high, float(out["probability"][real].max()))
        cases |= {f"{name}/{k}": v for k, v in case.items()}
        cases |= {f"{name}/out.{k}": v for k, v in out.items()}
    return cases, {"lowest": low, "highest": high}


def arranged_cases(rows: Arrays) -> tuple[Arrays, dict[str, float]]:
    """The cases "ragged" and "long" of a model without a state, from rows with its logits and probabilities.

    Any rows in any order are a history to such a model; there are as many different ones as the rows give.
    """
    order = np.random.default_rng(0).permutation(len(rows["event_time"]))
    at = 0
    cases: Arrays = {}
    for name, lengths in (("ragged", np.array(RAGGED_LENGTHS)), ("long", np.full(LONG_USERS, LONG_EVENTS))):
        shape = (len(lengths), int(lengths.max()))
        take = order[np.arange(at, at + shape[0] * shape[1]) % len(order)].reshape(shape)
        at += take.size
        for key, values in rows.items():
            cases[f"{name}/out.{key}" if key in ("logit", "probability") else f"{name}/{key}"] = values[take]
        cases[f"{name}/length"] = lengths
    # the first row of the ragged case is full length
    visited = np.r_[cases["ragged/out.probability"][0], cases["long/out.probability"].ravel()]
    return cases, {"lowest": float(visited.min()), "highest": float(visited.max())}


def pick_users(probability: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [B]: which of N candidates become the rows of B lengths.

    The longest row gets the candidate with the highest probability [N, T] of all, the next one that with the lowest
    within its length, the others are spread evenly between.
    """
    places = np.argsort(-lengths, kind="stable")
    peaks = probability[:, : lengths.max()].max(axis=1)
    lowest = probability[:, : lengths[places[1]]].min(axis=1).argmin()
    spread = np.argsort(peaks, kind="stable")[np.linspace(0, len(peaks) - 1, len(lengths)).astype(np.int64)]
    picked = np.empty(len(lengths), dtype=np.int64)
    picked[places] = np.r_[peaks.argmax(), lowest, spread[1:-1]]
    return picked


def _histories(model: SequenceModel, rows: Arrays, users: int, events: int, rng: np.random.Generator) -> Arrays:
    """Inputs and states of users with random histories; half of the users go on from a state that is not the first."""
    spec = model.spec
    take = rng.integers(0, len(rows["event_time"]), (users, events))
    gaps = rng.choice(GAPS_MS, (users, events)) + rng.integers(0, 2000, (users, events))
    start = rng.choice(rows["event_time"], users)
    case: Arrays = {"event_time": start[:, None] + np.cumsum(gaps, axis=1)}
    for name, width in (("numeric", spec.numeric), ("categorical", len(spec.vocabularies)), ("context", spec.context)):
        if width:
            case[name] = rows[name][take]
    widened = rng.random((users, events)) < 0.1
    plain = spec.numeric - 2 * spec.places
    if plain:
        case["numeric"][..., :plain][widened] *= rng.lognormal(0, 2, (int(widened.sum()), plain)).astype(np.float32)
    for state in model.graph.states:
        fresh = state.initial_rows(users)
        older = rng.uniform(-0.5, 0.5, fresh.shape) if state.dtype == "float32" else start - 12_345
        known = rng.random(users) < 0.5
        fresh[known] = older.astype(fresh.dtype)[known]
        case[state.name] = state.to_batch(fresh)
    return case


def _torch_outputs(model: SequenceModel, case: Arrays) -> Arrays:
    """What the exported graph gives too; what only training reads is left out."""
    outputs = [*model.graph.sequence_outputs(), *model.graph.state_outputs()]
    with torch.no_grad():
        out = model.eval()({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in case.items()})
    return {spec.name: out[spec.name].numpy() for spec in outputs}
