"""Bundles without training: real graphs, drawn weights, constants of about the right size for the scaling.

The weights are enlarged, so that probabilities spread over (0, 1) and follow the user's history, the contexts and so the
labels: over constant answers a test or a benchmark would show nothing. torch is imported only when a bundle is made.
"""

from pathlib import Path

import numpy as np

from seqfraud.bundle import Bundle, LabelSource, Manifest, Parity, ServeDefaults, open_bundle, write_manifest
from seqfraud.config import Config
from seqfraud.context import context_spec
from seqfraud.graph import gru_graph
from seqfraud.policy import Policy, Thresholds
from seqfraud.schema import schema_of
from seqfraud.vocabulary import Vocabulary

CARDS = """
[data]
transaction = "id"
user = "user"
time = "time"
time_unit = "ms"
label = "fraud"
label_known_at = "known_at"
label_delay = "2h"
amount = "amount"
[features]
numeric = ["amount"]
categorical = ["kind"]
context = ["merchant", "device"]
half_lives = ["1h", "12h"]
[serve]
window = 3
max_batch = 50
[model]
hidden = 8
input_width = 8
head_width = 8
embedding = 4
"""
"""The configuration of most tests: ids, one number, one category, two context columns, W = 3."""

PLAIN = """
[data]
user = "user"
time = "time"
time_unit = "s"
[features]
numeric = ["amount"]
categorical = ["kind"]
[serve]
window = 4
[model]
hidden = 6
layers = 2
input_width = 8
head_width = 8
embedding = 4
"""
"""No id column, no context, times in seconds, two layers."""

RICH = """
[data]
transaction = "id"
user = "user"
time = "time"
amount = "total"
[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["kind"]
ip = ["ip"]
geo = [["lat", "long"]]
half_lives = ["1d"]
[serve]
window = 4
[model]
hidden = 6
input_width = 8
head_width = 8
embedding = 4
"""
"""ISO times, an amount that is no input, a number that may be missing ("age"), places, networks, a shared column."""

KINDS = ("food", "fuel", "7", "true", "1.5", "grocery", "restaurant", "transport")
"""The vocabulary of the column "kind"; other values are unseen."""


def drawn_bundle(folder: Path, config: Config, missing: tuple[str, ...], seed: int, gain: float) -> Bundle:
    """A bundle of a model with random weights, and its reference vectors, so that `verify` passes."""
    import torch
    from torch import nn

    from export.graphs import export_graphs
    from export.reference import reference_cases
    from seqfraud.nn.model import ModelSpec, SequenceModel

    schema = schema_of(config)
    context = context_spec(config, schema)
    vocabularies = tuple(Vocabulary(column, KINDS) for column in schema.categorical)
    edges = np.log1p([0.0, 10.0, 100.0, 1000.0])
    spec = ModelSpec(
        numeric=len(schema.numeric_inputs),
        places=len(schema.geo),
        context=context.width,
        vocabularies=tuple(len(v) for v in vocabularies),
        missing=tuple(schema.numeric_inputs.index(column) for column in missing),
        bins=len(edges) - 1,
        hidden=config.model.hidden,
        layers=config.model.layers,
        input_width=config.model.input_width,
        head_width=config.model.head_width,
        embedding=config.model.embedding,
        forecast=config.model.forecast,
        members=config.model.members,
    )
    graph = gru_graph(schema, context, spec.layers, spec.state_width)
    torch.manual_seed(seed)
    model = SequenceModel(spec, graph)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.GRU):
                for weight in part.parameters():
                    weight.mul_(gain)
        encoder = model.encoder
        encoder.mean.fill_(2.0)
        encoder.inverse_std.fill_(0.4)
        encoder.bin_scale.copy_(torch.from_numpy(1 / np.diff(edges)))
        encoder.bin_low.copy_(torch.from_numpy(edges[:-1]))
        encoder.fill.fill_(30.0)
        rng = np.random.default_rng(seed)
        size = (200, 5)
        drawn = {
            "event_time": 1_600_000_000_000 + rng.integers(0, 7_200_000, size).cumsum(axis=1),
            "numeric": rng.lognormal(3, 1.5, (*size, spec.numeric)).astype(np.float32),
            "categorical": rng.integers(1, 2 + len(KINDS), (*size, len(vocabularies))),
            "context": rng.choice([-1.0, 0.0, 0.01, 0.3, 1.0, 3.0], (*size, spec.context)).astype(np.float32),
            "length": np.full(size[0], size[1]),
        }
        states = model.initial_states(size[0], torch.device("cpu"))
        logit = model.eval()({**{k: torch.from_numpy(v) for k, v in drawn.items()}, **states})["logit"]
        # half of the probabilities above 1/2, and few of them so close to 0 or 1 that they hide a difference
        model.scale.copy_(1.5 / logit.std())
        model.shift.copy_(-model.scale * logit.median())
    rows = {name: drawn[name].reshape(size[0] * size[1], *drawn[name].shape[2:]) for name in drawn if name != "length"}
    cases, _ = reference_cases(model, rows)
    places = tuple(column for pair in schema.geo for column in pair)
    manifest = Manifest(
        kind="gru",
        schema=schema,
        label=LabelSource(config.data.label, config.data.label_known_at),
        context=context,
        vocabularies=vocabularies,
        graph=graph,
        missing=(*missing, *places),
        calibration={"method": "platt", "scale": float(model.scale), "shift": float(model.shift)},
        policy=Policy(Thresholds(is_fraud=0.6, review=0.4, decline=0.8)),
        serve=ServeDefaults(config.serve.window, config.serve.max_batch),
        fingerprint={},
        metrics={},
        versions={},
        parity=Parity(1e-5, 1e-3, {}),
        cleaning=config.cleaning,
        identifiers=config.identifiers,
    )
    folder.mkdir(parents=True)
    export_graphs(model, folder)
    with (folder / "reference.npz").open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **cases)
    write_manifest(folder, manifest)
    return open_bundle(folder)
