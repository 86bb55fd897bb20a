"""What an interrupted fit needs to go on to the result it would have had: one file, written after every epoch.

Tensors (weights, the best weights, the optimiser's moments, torch's random state) and, as JSON in the file's metadata, the
history and numpy's random state. Written under a temporary name and renamed: a kill leaves the epoch before.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from seqfraud.errors import RunError
from seqfraud.files import replaced_file

FILE = "resume.safetensors"


@dataclass(frozen=True)
class Epoch:
    """What is reported of one epoch."""

    epoch: int
    loss: float
    validation_average_precision: float
    events_per_second: float
    seconds: float


@dataclass
class Progressed:
    """A fit after some complete epochs."""

    history: list[Epoch]
    best_epoch: int
    best: float
    best_weights: dict[str, Tensor]


@dataclass(frozen=True)
class ResumeFile:
    """Where a fit is kept, and what it must have in common with the fit that goes on."""

    path: Path
    identity: str

    def save(
        self, done: Progressed, model: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator
    ) -> None:
        """Keep a fit after a complete epoch."""
        tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in done.best_weights.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
        state = {
            "identity": self.identity,
            "history": [asdict(epoch) for epoch in done.history],
            "best_epoch": done.best_epoch,
            "best": done.best,
            "random": rng.bit_generator.state,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self.path) as file:
            safetensors.torch.save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(file), {"state": json.dumps(state)}
            )

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator, device: torch.device
    ) -> Progressed | None:
        """Put a kept fit into model, optimiser and random states; None where none is kept.

        Raises:
            RunError: the kept fit is of another configuration or other data, or the file is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(str(self.path), "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}: damaged; remove it to train from the start") from error
        if state["identity"] != self.identity:
            raise RunError(
                f"{self.path}: was kept by a fit with another configuration, other data or another device; "
                "train without --resume, or into another --out"
            )
        try:
            model.load_state_dict(_part(tensors, "model/"))
        except RuntimeError as error:
            raise RunError(f"{self.path}: was kept by another version; train without --resume") from error
        optimizer.load_state_dict({"state": _moments(tensors), "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"])
        rng.bit_generator.state = state["random"]
        best = {k: v.to(device) for k, v in _part(tensors, "best/").items()}
        return Progressed([Epoch(**e) for e in state["history"]], state["best_epoch"], state["best"], best)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "optimizer/").items():
        index, _, moment = name.partition("/")
        moments.setdefault(int(index), {})[moment] = value
    return moments


def identity_of(config: bytes, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device) -> str:
    """Hash of what fixes a fit: the configuration as written, the encoded data, the kind of device."""
    digest = hashlib.sha256(config)
    digest.update(device.type.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
