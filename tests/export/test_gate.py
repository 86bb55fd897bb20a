"""The parity gate: graphs that are wrong in the ways that graphs go wrong are refused with a figure and leave nothing.

Every wrong graph here is exported by `export_module` like a good one, stands in an otherwise good bundle and has the
right hash: only what it computes is wrong.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import export.bundle
from export.bundle import export_run, spans
from export.graphs import EXAMPLE_EVENTS, export_graphs, export_module
from seqfraud.bundle import MANIFEST, REFERENCE, Manifest, open_bundle, write_manifest
from seqfraud.config import parse_config
from seqfraud.context import NEVER, context_spec
from seqfraud.errors import BundleError, ParityError
from seqfraud.graph import TensorSpec, gru_graph
from seqfraud.nn.checkpoint import Run
from seqfraud.nn.model import EventEncoder, ModelSpec, SequenceModel, StepModel
from seqfraud.policy import Policy, Thresholds
from seqfraud.runtime import SequenceGraph
from seqfraud.schema import schema_of
from seqfraud.verification import (
    LOGIT_TOLERANCE,
    PROBABILITY_TOLERANCE,
    checked,
    differences,
    load_cases,
    verify_bundle,
)
from seqfraud.vocabulary import Vocabulary

torch.set_num_threads(1)

JUNE_2025 = 1_748_736_000_123
CONFIG = """
[data]
user = "user"
time = "time"
[features]
numeric = ["amount", "age"]
categorical = ["kind"]
context = ["shop"]
geo = [["lat", "long"]]
half_lives = ["1d"]
"""
Tensors = Mapping[str, Tensor]
Change = Callable[[SequenceModel], nn.Module]


def make_run(folder: Path) -> Run:
    """A run with random weights whose probabilities depend on every input, with the rows that export needs."""
    config = parse_config(CONFIG, "config.toml")
    schema = schema_of(config)
    context = context_spec(config, schema)
    graph = gru_graph(schema, context, layers=2, hidden=6)
    values = graph.numeric + graph.context + 1
    spec = ModelSpec(
        numeric=graph.numeric,
        places=1,
        context=graph.context,
        vocabularies=(5,),
        missing=(1,),
        bins=2 * values,
        steps=graph.numeric,
        hidden=6,
        layers=2,
        input_width=8,
        head_width=6,
        forecast=True,
        embedding=3,
    )
    torch.manual_seed(1)
    model = SequenceModel(spec, graph)
    encoder = model.encoder
    encoder.inverse_std.fill_(0.5)
    encoder.bin_value.copy_(torch.arange(spec.bins) // 2)
    encoder.bin_scale.fill_(0.5)
    encoder.bin_low.uniform_(0.0, 2.0)
    encoder.step_value.copy_(torch.arange(spec.steps))
    encoder.step_threshold.uniform_(-1.0, 5.0)
    with torch.no_grad():
        model.networks[0].input.weight.mul_(3)
        model.networks[0].output.weight.mul_(8)
    model.scale.fill_(1.5)
    model.shift.fill_(-1.0)
    rng = np.random.default_rng(0)
    numeric = rng.normal(0, 30, (300, 4)).astype(np.float32)
    numeric[rng.random((300, 4)) < 0.1] = np.nan
    numeric[:, 0] = np.abs(rng.normal(0, 30, 300))
    folder.mkdir()
    np.savez_compressed(
        folder / REFERENCE,
        event_time=JUNE_2025 + rng.integers(0, 10**9, 300),
        numeric=numeric,
        categorical=rng.integers(1, 5, (300, 1)),
        context=rng.exponential(3, (300, graph.context)).astype(np.float32),
    )
    return Run(
        path=folder,
        data=folder / "data.parquet",
        config=config,
        schema=schema,
        graph=graph,
        model=model.eval(),
        vocabularies=(Vocabulary("kind", ("a", "b", "c")),),
        calibration={"method": "platt", "scale": 1.5, "shift": -1.0},
        policy=Policy(Thresholds(0.5, 0.3, 0.9)),
        fingerprint={"rows": 300},
        metrics={"test": {"average_precision": 0.5}, "device": "cpu"},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("gate") / "run")


@pytest.fixture(scope="module")
def good(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle; copied, never changed."""
    return export_run(run, tmp_path_factory.mktemp("gate") / "good").path


def export_changed(run: Run, which: str, module: nn.Module, folder: Path) -> None:
    """Export a module as one of a bundle's graphs, with the declared signature."""
    graph = run.graph
    inputs = graph.sequence_inputs() if which == "sequence" else graph.step_inputs()
    outputs = graph.sequence_outputs() if which == "sequence" else graph.step_outputs()
    file = folder / f"{which}.onnx"
    export_module(module, [*inputs, *graph.state_inputs()], [*outputs, *graph.state_outputs()], file)


def resign(folder: Path) -> None:
    """Write the same manifest with the hashes of the files as they are now."""
    write_manifest(folder, Manifest.from_dict(json.loads((folder / MANIFEST).read_text())))


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy of the good bundle to be spoilt."""
    copied = tmp_path / "bundle"
    shutil.copytree(good, copied)
    return copied


class Wrong(nn.Module):
    """A module with the states that go in and the outputs changed by two functions."""

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[Tensors], dict[str, Tensor]] = lambda _: {},
        after: Callable[[Tensors, Tensors], dict[str, Tensor]] = lambda _, __: {},
    ) -> None:
        super().__init__()
        self.module = module
        self.before = before
        self.after = after

    def forward(self, inputs: Tensors) -> dict[str, Tensor]:
        out = self.module({**inputs, **self.before(inputs)})
        return {**out, **self.after(inputs, out)}


# --- The good bundle ---------------------------------------------------------------------------------------------


def test_the_good_bundle_passes_every_check_and_says_what_was_measured(good: Path, run: Run) -> None:
    measured = verify_bundle(good)
    kinds = [name.split(",")[0] for name in measured]
    assert {kind: kinds.count(kind) for kind in kinds} == {"sequence": 6, "step": 4, "step against sequence": 1}
    for figures in measured.values():
        assert set(figures) == {"probability", "logit", "state", "integer state"}
        assert figures["logit"] < LOGIT_TOLERANCE / 10
        assert figures["integer state"] == 0
    manifest = open_bundle(good).manifest
    recorded = dict(manifest.parity.measured)
    visited = recorded.pop("probabilities visited")
    assert recorded == measured
    assert (manifest.parity.probability, manifest.parity.logit) == (PROBABILITY_TOLERANCE, LOGIT_TOLERANCE)
    assert visited["lowest"] < 0.05  # the wrong graphs below are measured where probabilities differ
    assert visited["highest"] > 0.9
    assert manifest.missing == ("age", "lat", "long")
    assert manifest.metrics == {"test": {"average_precision": 0.5}}
    assert sorted(f.name for f in good.parent.iterdir()) == ["good"]


def test_probabilities_that_were_not_visited_are_told() -> None:
    assert spans({"lowest": 0.001, "highest": 0.99})
    assert not spans({"lowest": 0.002, "highest": 0.99})
    assert not spans({"lowest": 0.001, "highest": 0.98})


def test_the_gate_needs_no_torch_and_runs_alone(good: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('seqfraud.verification', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert json.loads(done.stdout) == verify_bundle(good)


# --- Wrong graphs ------------------------------------------------------------------------------------------------


def refused(folder: Path, message: str) -> str:
    """The refusal's message, which must match and must have a figure above the one that it says is allowed."""
    resign(folder)
    with pytest.raises(ParityError, match=message) as caught:
        verify_bundle(folder)
    text = str(caught.value)
    figure = re.search(r"differs by (\S+); allowed is (\S+)$", text)
    assert figure is not None
    assert float(figure[1]) > float(figure[2]) or figure[1] == "nan"
    return text


DROPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "h is read as zero": lambda m: Wrong(m, before=lambda i: {"h": torch.zeros_like(i["h"])}),
    "h of the second layer is read as zero": lambda m: Wrong(
        m, before=lambda i: {"h": i["h"] * torch.tensor([1.0, 0.0])[:, None, None]}
    ),
    "h is given back as it came": lambda m: Wrong(m, after=lambda i, o: {"h_next": i["h"] + 0}),
    "layers of h are swapped": lambda m: Wrong(m, after=lambda i, o: {"h_next": o["h_next"].flip(0)}),
    "last_time is never known": lambda m: Wrong(m, before=lambda i: {"last_time": i["last_time"] * 0 + NEVER}),
    "last_time is given back as it came": lambda m: Wrong(m, after=lambda i, o: {"last_time_next": i["last_time"] + 0}),
    "last_time is a millisecond late": lambda m: Wrong(
        m, after=lambda i, o: {"last_time_next": o["last_time_next"] + 1}
    ),
    "last_place is read as zero": lambda m: Wrong(
        m, before=lambda i: {"last_place": torch.zeros_like(i["last_place"])}
    ),
    "last_place is given back as it came": lambda m: Wrong(
        m, after=lambda i, o: {"last_place_next": i["last_place"] + 0}
    ),
    "last_place is turned round": lambda m: Wrong(
        m, after=lambda i, o: {"last_place_next": o["last_place_next"].flip(1)}
    ),
}


@pytest.mark.parametrize("which", ["sequence", "step"])
@pytest.mark.parametrize("form", DROPPED)
def test_a_dropped_state_is_refused(run: Run, bundle: Path, which: str, form: str) -> None:
    module = run.model if which == "sequence" else StepModel(run.model)
    export_changed(run, which, DROPPED[form](module), bundle)
    refused(bundle, rf"^parity check '{which}, .*': (probability|logit|state|integer state) differs by")


def test_a_time_axis_that_is_frozen_in_the_declaration_is_refused(run: Run, bundle: Path) -> None:
    """As an exporter does that takes the example's five events for a constant."""
    graph = run.graph

    def frozen(specs: list[TensorSpec]) -> list[TensorSpec]:
        return [TensorSpec(s.name, s.dtype, tuple(EXAMPLE_EVENTS if a == "T" else a for a in s.axes)) for s in specs]

    inputs, outputs = frozen(graph.sequence_inputs()), frozen(graph.sequence_outputs())
    file = bundle / "sequence.onnx"
    export_module(run.model, [*inputs, *graph.state_inputs()], [*outputs, *graph.state_outputs()], file)
    resign(bundle)
    with pytest.raises(BundleError, match=r"the axis T of input event_time is frozen at \['B', 5\]"):
        verify_bundle(bundle)


class UnrolledLoop(nn.Module):
    """One event after the other in a Python loop, which tracing unrolls to as many steps as the example has."""

    def __init__(self, model: SequenceModel, filled_up: bool) -> None:
        super().__init__()
        self.model = model
        self.filled_up = filled_up

    def forward(self, inputs: Tensors) -> dict[str, Tensor]:
        states = {s.name for s in self.model.graph.states}
        columns = {k: v for k, v in inputs.items() if k not in states and k != "length"}
        carried = {name: inputs[name] for name in states}
        outs = []
        for t in range(columns["event_time"].shape[1]):
            here = (inputs["length"] - t).clamp(0, 1)  # the state stays where a row has ended
            out = self.model({**{k: v[:, t : t + 1] for k, v in columns.items()}, **carried, "length": here})
            carried = {name: out[f"{name}_next"] for name in states}
            outs.append(out)
        both = {name: torch.cat([out[name] for out in outs], dim=1) for name in ("logit", "probability")}
        if self.filled_up:
            rest = torch.zeros_like(columns["event_time"][:, EXAMPLE_EVENTS:]).float()
            both = {name: torch.cat([value, rest], dim=1) for name, value in both.items()}
        return {**both, **{f"{name}_next": carried[name] for name in states}}


def test_the_unrolled_loop_is_right_for_the_length_of_the_example(run: Run) -> None:
    """So that the two tests after this one show a frozen number of steps and nothing else."""
    case = load_one(run, EXAMPLE_EVENTS)
    with torch.no_grad():
        expected, got = run.model(case), UnrolledLoop(run.model, filled_up=True)(case)
    real = torch.arange(EXAMPLE_EVENTS) < case["length"][:, None]
    for name, value in expected.items():
        if name in ("forecast_loss", "member_logits"):  # of training, no output of a graph
            continue
        pair = (got[name][real], value[real]) if name in ("logit", "probability") else (got[name], value)
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5, equal_nan=True)


def load_one(run: Run, events: int) -> dict[str, Tensor]:
    with np.load(run.path / REFERENCE) as rows:
        case = {k: torch.from_numpy(rows[k][: 2 * events].reshape(2, events, *rows[k].shape[1:])) for k in rows.files}
    case["event_time"] = case["event_time"].sort(dim=1).values
    return {**case, "length": torch.tensor([events, 3]), **run.model.initial_states(2, torch.device("cpu"))}


def test_a_number_of_steps_that_is_frozen_behind_a_dynamic_declaration_is_refused(run: Run, bundle: Path) -> None:
    export_changed(run, "sequence", UnrolledLoop(run.model, filled_up=True), bundle)
    refused(bundle, r"^parity check 'sequence, ragged lengths, run': (probability|logit) differs by")


def test_an_output_of_frozen_length_is_refused(run: Run, bundle: Path) -> None:
    export_changed(run, "sequence", UnrolledLoop(run.model, filled_up=False), bundle)
    resign(bundle)
    with pytest.raises(ParityError, match=r"logit has shape \(7, 5\), expected \(7, 37\)|probability has shape"):
        verify_bundle(bundle)


@pytest.mark.parametrize("which", ["sequence", "step"])
def test_a_graph_that_runs_for_the_example_only_is_refused(run: Run, bundle: Path, which: str) -> None:
    """A Reshape to the example's 3 users (and 5 events): onnxruntime fails at another size, or at 1 user, not at 3."""
    shape = (3, EXAMPLE_EVENTS) if which == "sequence" else (3,)
    module = run.model if which == "sequence" else StepModel(run.model)
    wrong = Wrong(module, after=lambda i, o: {"logit": o["logit"].reshape(shape) + 0})
    export_changed(run, which, wrong, bundle)
    resign(bundle)
    reason = {
        "sequence": "at the first check: .*Reshape",
        "step": "after 7 checks that passed: .*invalid dimensions for output: logit",
    }
    with pytest.raises(BundleError, match=f"onnxruntime cannot run a graph, {reason[which]}"):
        verify_bundle(bundle)


class Float32Times(EventEncoder):
    """Milliseconds cast to float32 before they are subtracted: in 2025 two minutes coarse."""

    def values(
        self,
        event_time: Tensor,
        numeric: Tensor | None,
        context: Tensor | None,
        previous_time: Tensor,
        previous_place: Tensor | None,
    ) -> Tensor:
        coarse = [time.to(torch.float32).to(torch.int64) for time in (event_time, previous_time)]
        return super().values(coarse[0], numeric, context, coarse[1], previous_place)


class Float32Clock(EventEncoder):
    """The time of day taken after the cast."""

    def clock(self, event_time: Tensor) -> Tensor:
        return super().clock(event_time.to(torch.float32).to(torch.int64))


@pytest.mark.parametrize("which", ["sequence", "step"])
@pytest.mark.parametrize("encoder", [Float32Times, Float32Clock])
def test_milliseconds_in_float32_are_refused(run: Run, bundle: Path, which: str, encoder: type[EventEncoder]) -> None:
    changed = copy.deepcopy(run.model)
    changed.encoder.__class__ = encoder
    export_changed(run, which, changed if which == "sequence" else StepModel(changed), bundle)
    refused(bundle, rf"^parity check '{which}, .*': (probability|logit) differs by")


@pytest.mark.parametrize("name", ["h", "last_time", "last_place"])
def test_a_state_taken_at_the_last_column_instead_of_length_is_refused(run: Run, bundle: Path, name: str) -> None:
    """Right in every row that is full, wrong where there is padding."""

    class AtTheEnd(nn.Module):
        def __init__(self, model: SequenceModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensors) -> dict[str, Tensor]:
            full = {**inputs, "length": torch.ones_like(inputs["event_time"]).sum(dim=1)}
            return {**self.model(inputs), f"{name}_next": self.model(full)[f"{name}_next"]}

    export_changed(run, "sequence", AtTheEnd(run.model), bundle)
    kind = "integer state" if name == "last_time" else "state"
    refused(bundle, rf"^parity check 'sequence, ragged lengths, run': {kind} differs by")


@pytest.mark.parametrize("which", ["step", "sequence"])
def test_a_dropped_calibration_is_refused(run: Run, bundle: Path, which: str) -> None:
    changed = copy.deepcopy(run.model)
    changed.scale.fill_(1.0)
    changed.shift.fill_(0.0)
    export_changed(run, which, changed if which == "sequence" else StepModel(changed), bundle)
    refused(bundle, rf"^parity check '{which}, .*': probability differs by \S+; allowed is 1e-05$")


def test_a_gru_without_linear_before_reset_is_refused(bundle: Path) -> None:
    """Older exporters dropped this attribute, which changes every state by some percent."""
    file = onnx.load(bundle / "sequence.onnx")
    cells = [node for node in file.graph.node if node.op_type == "GRU"]
    assert len(cells) == 2
    for cell in cells:
        kept = [a for a in cell.attribute if a.name != "linear_before_reset"]
        assert len(kept) == len(cell.attribute) - 1
        del cell.attribute[:]
        cell.attribute.extend(kept)
    onnx.save(file, bundle / "sequence.onnx")
    refused(bundle, r"^parity check 'sequence, ragged lengths, run': (probability|logit) differs by")


def test_two_graphs_of_different_models_are_refused(run: Run, bundle: Path) -> None:
    changed = copy.deepcopy(run.model)
    with torch.no_grad():
        changed.networks[0].head.weight[0, 0] += 0.05
    export_changed(run, "step", StepModel(changed), bundle)
    refused(bundle, r"^parity check 'step, 1000 carried events, run': (probability|logit) differs by")


@pytest.mark.parametrize("which", ["sequence", "step"])
def test_logits_that_are_off_where_probabilities_are_tiny_are_refused(tmp_path: Path, which: str) -> None:
    """At p = 1e-4 a logit wrong by 0.005 moves the probability by 5e-7: a check of probabilities lets it pass."""
    run = make_run(tmp_path / "run")
    with torch.no_grad():
        run.model.networks[0].output.weight.mul_(0.1)
        run.model.networks[0].output.bias.fill_(-9.0)
    run.model.scale.fill_(1.0)
    run.model.shift.fill_(0.0)
    bundle = export_run(run, tmp_path / "bundle")
    folder = bundle.path
    assert bundle.manifest.parity.measured["probabilities visited"]["highest"] < 1e-3
    changed = copy.deepcopy(run.model)
    with torch.no_grad():
        changed.networks[0].output.bias.add_(0.005)
    export_changed(run, which, changed if which == "sequence" else StepModel(changed), folder)
    text = refused(folder, rf"^parity check '{which}, .*': logit differs by 0\.005\d*; allowed is 0\.001$")
    assert "probability" not in text  # checked first, and it passed


# --- What is compared --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(good: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Specification, the ragged case and the good graph's outputs for it."""
    graph = open_bundle(good).manifest.graph
    case = load_cases((good / REFERENCE).read_bytes())["ragged"]
    sequence = SequenceGraph((good / "sequence.onnx").read_bytes(), graph)
    inputs = {t.name: case[t.name] for t in (*graph.sequence_inputs(), *graph.state_inputs())}
    return graph, case, sequence.run(inputs)


def test_figures_are_the_largest_differences_of_events_within_length(compared: Any) -> None:
    graph, case, got = compared
    length = case["length"]
    shifted = {k: v.copy() for k, v in got.items()}
    shifted["logit"][1, int(length[1]) :] += 100  # padding
    within = differences(graph, shifted, case, length)
    assert within["logit"] < 1e-4
    shifted["logit"][0, int(length[0]) - 1] += 0.5
    shifted["probability"][3, 0] -= 0.25
    shifted["last_time_next"][2] += 3
    shifted["h_next"][1, 4, 5] += 0.125
    figures = differences(graph, shifted, case, length)
    assert figures["logit"] == pytest.approx(0.5, abs=1e-4)
    assert figures["probability"] == pytest.approx(0.25, abs=1e-4)
    assert figures["state"] == pytest.approx(0.125, abs=1e-4)
    assert figures["integer state"] == 3


@pytest.mark.parametrize("name", ["logit", "probability", "h_next", "last_place_next"])
def test_a_figure_that_is_not_a_number_is_refused(compared: Any, name: str) -> None:
    """Python's max() drops a NaN that comes second, so that a state of NaN once passed."""
    graph, case, got = compared
    known = np.flatnonzero(np.isfinite(case[f"out.{name}"]).ravel())[0]
    spoilt = {**got, name: got[name].copy()}
    spoilt[name].ravel()[known] = np.nan
    figures = differences(graph, spoilt, case, case["length"])
    with pytest.raises(ParityError, match=r"'x': (logit|probability|state) differs by nan"):
        checked("x", figures)


def test_not_a_number_on_both_sides_passes_for_a_place_but_never_for_a_logit(compared: Any) -> None:
    graph, case, got = compared
    assert np.isnan(case["out.last_place_next"]).any()
    assert differences(graph, got, case, case["length"])["state"] < LOGIT_TOLERANCE
    both = {**case, "out.logit": case["out.logit"].copy()}
    both["out.logit"][0, 0] = np.nan
    spoilt = {**got, "logit": both["out.logit"]}
    assert np.isnan(differences(graph, spoilt, both, case["length"])["logit"])


def test_a_state_that_would_broadcast_is_refused(compared: Any) -> None:
    graph, case, got = compared
    with pytest.raises(ParityError, match=r"h_next has shape \(1, 7, 6\), expected \(2, 7, 6\)"):
        differences(graph, {**got, "h_next": got["h_next"][:1]}, case, case["length"])


def test_tolerances_are_inclusive_and_states_follow_the_logits(good: Path) -> None:
    figures = {"probability": 1e-5, "logit": 1e-3, "state": 1e-3, "integer state": 0.0}
    assert checked("x", figures) == figures
    for what, observed in (("probability", 1.01e-5), ("logit", 1.01e-3), ("state", 1.01e-3), ("integer state", 1.0)):
        with pytest.raises(ParityError, match=f"parity check 'x': {what} differs by {observed:.3g}; allowed is"):
            checked("x", {**figures, what: observed})


# --- Reference vectors -------------------------------------------------------------------------------------------


def change_reference(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(folder / REFERENCE) as stored:
        arrays = {key: stored[key] for key in stored.files}
    change(arrays)
    np.savez_compressed(folder / REFERENCE, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("long/h"), "reference.npz: h is missing or has another shape"),
        (lambda a: a.pop("ragged/out.logit"), "out.logit is missing"),
        (lambda a: a.pop("ragged/out.last_place_next"), "out.last_place_next is missing"),
        (lambda a: a.pop("ragged/event_time"), "event_time is missing"),
        (lambda a: a.update({"ragged/context": a["ragged/context"][..., :3]}), "context is missing or has another"),
        (lambda a: [a.pop(k) for k in list(a) if k.startswith("long/")], r"holds the cases \['ragged'\]"),
        (lambda a: a.update({"long/numeric": np.array([{}], dtype=object)}), "cannot be read"),
    ],
)
def test_reference_vectors_that_lack_something_are_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_reference(bundle, change)
    resign(bundle)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


@pytest.mark.parametrize("content", [b"nothing", b"PK\x03\x04 a broken archive", b""])
def test_a_file_without_reference_vectors_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / REFERENCE).write_bytes(content or b" ")
    resign(bundle)
    with pytest.raises(BundleError, match="reference vectors cannot be read"):
        verify_bundle(bundle)


def test_reference_vectors_of_another_model_are_refused(bundle: Path) -> None:
    """Torch's logits moved: the graphs no longer compute what was trained."""
    change_reference(bundle, lambda a: a["long/out.logit"].__iadd__(0.01))
    refused(bundle, r"^parity check 'sequence, long': logit differs by 0\.01; allowed is 0\.001$")


def test_a_changed_file_is_refused_before_onnxruntime_sees_it(bundle: Path) -> None:
    content = (bundle / "step.onnx").read_bytes()
    (bundle / "step.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"step\.onnx is not the file the manifest describes"):
        verify_bundle(bundle)
    resign(bundle)
    with pytest.raises(BundleError, match=r"step\.onnx: .* says \d+ bytes, \d+ are left, at byte \d+$"):
        verify_bundle(bundle)


# --- What a refusal leaves behind --------------------------------------------------------------------------------


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder and the content of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def forgetful_export(model: SequenceModel, folder: Path) -> None:
    """An exporter whose step graph forgets h."""
    export_graphs(model, folder)
    graph = model.graph
    export_module(
        Wrong(StepModel(model), before=lambda i: {"h": torch.zeros_like(i["h"])}),
        [*graph.step_inputs(), *graph.state_inputs()],
        [*graph.step_outputs(), *graph.state_outputs()],
        folder / "step.onnx",
    )


def test_a_refused_export_says_the_check_and_the_figure_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.bundle, "export_graphs", forgetful_export)
    with pytest.raises(
        ParityError, match=r"^export refused: parity check 'step, 1000 carried events, run': \w+ differs by [\d.e+-]+; "
    ):
        export_run(run, tmp_path / "bundle")
    assert everything_below(tmp_path) == {}


def test_a_refused_export_leaves_the_older_bundle_untouched(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(good, tmp_path / "bundle")
    before = everything_below(tmp_path)
    monkeypatch.setattr(export.bundle, "export_graphs", forgetful_export)
    with pytest.raises(ParityError, match="differs by"):
        export_run(run, tmp_path / "bundle")
    assert everything_below(tmp_path) == before
    verify_bundle(tmp_path / "bundle")


def test_an_export_that_breaks_off_leaves_the_older_bundle_untouched(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(model: SequenceModel, folder: Path) -> None:
        (folder / "sequence.onnx").write_bytes(b"half a")
        raise RuntimeError("the exporter broke")

    shutil.copytree(good, tmp_path / "bundle")
    before = everything_below(tmp_path)
    monkeypatch.setattr(export.bundle, "export_graphs", breaks_off)
    with pytest.raises(RuntimeError, match="the exporter broke"):
        export_run(run, tmp_path / "bundle")
    assert everything_below(tmp_path) == before


def test_a_graph_that_does_not_load_is_refused_in_the_fresh_process(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(model: SequenceModel, folder: Path) -> None:
        export_graphs(model, folder)
        content = (folder / "sequence.onnx").read_bytes()
        (folder / "sequence.onnx").write_bytes(content[: len(content) // 2])

    monkeypatch.setattr(export.bundle, "export_graphs", half)
    with pytest.raises(ParityError, match=r"^export refused: .*sequence\.onnx: .* says \d+ bytes, \d+ are left"):
        export_run(run, tmp_path / "bundle")
    assert everything_below(tmp_path) == {}


def test_a_folder_that_is_no_bundle_is_never_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("years of work")
    before = everything_below(tmp_path)
    with pytest.raises(BundleError, match="exists and is not a bundle; choose another --out"):
        export_run(run, tmp_path / "bundle")
    assert everything_below(tmp_path) == before


def test_a_good_export_replaces_an_older_bundle_whole(run: Run, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bundle")
    (tmp_path / "bundle" / "left over").touch()
    (tmp_path / "bundle" / "step.onnx").write_bytes(b"spoilt")
    bundle = export_run(run, tmp_path / "bundle")
    assert bundle == open_bundle(tmp_path / "bundle")
    assert sorted(everything_below(tmp_path)) == sorted(
        ["bundle", *(f"bundle/{name}" for name in (MANIFEST, REFERENCE, "sequence.onnx", "step.onnx"))]
    )
    assert bundle.id == open_bundle(good).id  # the same run, the same content
