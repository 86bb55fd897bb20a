"""Every check of a bundle that needs no torch.

The reference vectors inside the bundle were computed by the trained model itself (torch; scikit-learn for a baseline); the
graphs must give the same at other batch sizes and lengths than those they were exported with, through `run` and through IOBinding, event by event
and all at once. Probabilities alone would let a wrong graph pass where they are near 0, so logits are compared too.
"""

import io
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seqfraud.bundle import REFERENCE, Bundle, open_bundle
from seqfraud.errors import BundleError, ParityError
from seqfraud.graph import NEXT, GraphSpec
from seqfraud.runtime import SequenceGraph, StepGraph, initial_states, next_states
from seqfraud.signature import TrustedKeys

PROBABILITY_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-3
REFERENCE_ARRAYS = 64
REFERENCE_BYTES = 256 * 1024**2
"""Unpacked; those of an export have a few MB."""
Arrays = dict[str, npt.NDArray[Any]]
Figures = dict[str, float]


def load_cases(content: bytes) -> dict[str, Arrays]:
    """The reference cases by name: "ragged" and "long", each with inputs and the model's outputs (prefix `out.`).

    Nothing is unpacked before its size is known, and no array is made that is larger than what was unpacked.
    """
    cases: dict[str, Arrays] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if len(members) > REFERENCE_ARRAYS or unpacked > REFERENCE_BYTES:
                raise BundleError(
                    f"{REFERENCE}: {len(members)} arrays of {unpacked:,} bytes in all; "
                    f"at most {REFERENCE_ARRAYS} of {REFERENCE_BYTES:,}"
                )
            for member in members:
                case, _, name = member.filename.removesuffix(".npy").partition("/")
                cases.setdefault(case, {})[name] = _array(archive.read(member))
    # zipfile has many ways to say that a file is not what it seems: RuntimeError where it asks for a password
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{REFERENCE}: the reference vectors cannot be read: {error}") from error
    if set(cases) != {"ragged", "long"}:
        raise BundleError(f"{REFERENCE}: holds the cases {sorted(cases)!r:.200}, expected long and ragged")
    return cases


def _array(content: bytes) -> npt.NDArray[Any]:
    """An array from an .npy file; nothing is unpickled. Raises ValueError."""
    stream = io.BytesIO(content)
    lib = np.lib.format
    try:
        read = lib.read_array_header_1_0 if lib.read_magic(stream) == (1, 0) else lib.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # the header is a Python literal, and fails in as many ways
        raise ValueError(f"an array whose header is {type(error).__name__}") from error
    held = len(content) - stream.tell()
    if dtype.kind not in "fi" or any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"an array {dtype} {shape!r:.80} with {held} bytes")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def verify_bundle(path: Path, trusted: TrustedKeys | None = None) -> dict[str, Figures]:
    """Open a bundle, check its files and its graphs; returns the largest differences per check.

    Raises:
        BundleError: a file is missing, changed or not what the manifest says, or a graph does not run.
        ParityError: a graph computes something else than the trained model; the message has the figures.
    """
    return verify_opened(open_bundle(path, trusted))


def verify_opened(bundle: Bundle) -> dict[str, Figures]:
    """Check the graphs of an open bundle as `verify_bundle` does; raises the same."""
    passed: dict[str, Figures] = {}
    try:
        for name, figures in _checks(bundle):
            passed[name] = checked(name, figures)
    except Exception as error:
        # what a graph with a frozen axis fails with: onnxruntime's exceptions have no common root, and through
        # IOBinding they are plain RuntimeErrors
        if not (isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")):
            raise
        after = f"after {len(passed)} checks that passed" if passed else "at the first check"
        raise BundleError(
            f"{bundle.path}: onnxruntime cannot run a graph, {after}: {str(error).splitlines()[0]}"
        ) from error
    return passed


def checked(name: str, figures: Figures) -> Figures:
    """The figures, or ParityError with the observed and the allowed difference."""
    allowed = {"probability": PROBABILITY_TOLERANCE, "logit": LOGIT_TOLERANCE}
    for what, observed in figures.items():
        limit = allowed.get(what, 0.0 if what == "integer state" else LOGIT_TOLERANCE)
        if not observed <= limit:  # NaN is refused too
            raise ParityError(f"parity check {name!r}: {what} differs by {observed:.3g}; allowed is {limit:g}")
    return figures


def _checks(bundle: Bundle) -> Iterator[tuple[str, Figures]]:
    spec = bundle.manifest.graph
    sequence = SequenceGraph(bundle.sequence, spec)
    step = StepGraph(bundle.step, spec)
    cases = load_cases(bundle.reference)
    ragged, long = cases["ragged"], cases["long"]
    for case in (ragged, long):
        _check_shapes(spec, case)
    got = sequence.run(_inputs(spec, ragged))
    yield "sequence, ragged lengths, run", differences(spec, got, ragged, ragged["length"])
    got = run_through_binding(sequence, _inputs(spec, ragged))
    yield "sequence, ragged lengths, IOBinding", differences(spec, got, ragged, ragged["length"])
    for cut in (1, 2, int(ragged["event_time"].shape[1] // 2)):
        got = _in_two_calls(sequence, ragged, cut)
        yield f"sequence, cut after {cut}, state carried", differences(spec, got, ragged, ragged["length"])
    got = sequence.run(_inputs(spec, long))
    yield "sequence, long", differences(spec, got, long, long["length"])
    events = int(long["event_time"].shape[1])
    got = event_by_event(step, long, range(len(long["length"])), bound=False)
    yield f"step, {events} carried events, run", differences(spec, got, long, long["length"])
    for user in range(len(long["length"])):
        one = {k: _users(spec, k, v, [user]) for k, v in long.items()}
        got = event_by_event(step, one, range(1), bound=True)
        yield f"step, {events} carried events, IOBinding, user {user}", differences(spec, got, one, one["length"])
    against = sequence.run(_inputs(spec, long))
    reference = {**long, **{f"out.{k}": v for k, v in against.items()}}
    got = event_by_event(step, long, range(len(long["length"])), bound=False)
    yield "step against sequence", differences(spec, got, reference, long["length"])


def _check_shapes(spec: GraphSpec, case: Mapping[str, npt.NDArray[Any]]) -> None:
    if "event_time" not in case or case["event_time"].ndim != 2:
        raise BundleError(f"{REFERENCE}: event_time is missing or has other axes than users and events")
    batch, events = case["event_time"].shape
    wanted = {t.name: t for t in (*spec.sequence_inputs(), *spec.state_inputs())}
    wanted |= {f"out.{t.name}": t for t in (*spec.sequence_outputs(), *spec.state_outputs())}
    for name, tensor in wanted.items():
        if name not in case or case[name].shape != tensor.shape(B=batch, T=events):
            raise BundleError(f"{REFERENCE}: {name} is missing or has another shape than the manifest says")


def _inputs(spec: GraphSpec, case: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    return {t.name: case[t.name] for t in (*spec.sequence_inputs(), *spec.state_inputs())}


def differences(
    spec: GraphSpec,
    got: Mapping[str, npt.NDArray[Any]],
    case: Mapping[str, npt.NDArray[Any]],
    length: npt.NDArray[Any],
) -> Figures:
    """Largest absolute differences to the case's outputs, NaN where one is not a number.

    Events beyond a row's length do not count. A place may be missing in a state; a logit never may.
    """
    real = np.arange(case["out.logit"].shape[1])[None] < length[:, None]
    for name in ("probability", "logit", *(state.name + NEXT for state in spec.states)):
        if got[name].shape != case[f"out.{name}"].shape:
            raise ParityError(f"{name} has shape {got[name].shape}, expected {case[f'out.{name}'].shape}")
    figures: Figures = {}
    for name in ("probability", "logit"):
        figures[name] = _largest(got[name][real], case[f"out.{name}"][real])
    for state in spec.states:
        what = "state" if state.dtype == "float32" else "integer state"
        a, b = got[state.name + NEXT], case[f"out.{state.name}{NEXT}"]
        known = ~(np.isnan(a) & np.isnan(b))
        # np.maximum keeps a NaN, max() would drop it
        figures[what] = float(np.maximum(figures.get(what, 0.0), _largest(a[known], b[known])))
    return figures


def _largest(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    if a.dtype.kind == "i":
        return float(np.abs(a - b).max(initial=0))
    return float(np.abs(a.astype(np.float64) - b).max(initial=0.0))


def run_through_binding(graph: SequenceGraph, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """The sequence graph through IOBinding, which refuses what `run` lets pass in declared shapes."""
    binding = graph.session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    names = [o.name for o in graph.session.get_outputs()]
    for name in names:
        binding.bind_output(name, "cpu")
    graph.session.run_with_iobinding(binding)
    return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


def _in_two_calls(graph: SequenceGraph, case: Mapping[str, npt.NDArray[Any]], cut: int) -> Arrays:
    spec = graph.spec
    columns = {t.name: case[t.name] for t in spec.sequence_inputs() if t.name != "length"}
    length = case["length"]
    batch = len(length)
    first = graph.run(
        {
            **{k: v[:, :cut] for k, v in columns.items()},
            "length": np.minimum(length, cut),
            **{s.name: case[s.name] for s in spec.states},
        }
    )
    second = graph.run(
        {
            **{k: v[:, cut:] for k, v in columns.items()},
            "length": np.maximum(length - cut, 0),
            **next_states(spec, first, batch),
        }
    )
    joined = {name: np.concatenate([first[name], second[name]], axis=1) for name in ("logit", "probability")}
    return {**joined, **{s.name + NEXT: second[s.name + NEXT] for s in spec.states}}


def event_by_event(step: StepGraph, case: Mapping[str, npt.NDArray[Any]], users: range, bound: bool) -> Arrays:
    """Every event of a case whose rows are all full, one call of the step graph per event."""
    spec = step.spec
    batch, events = case["event_time"].shape
    states = {s.name: case[s.name] for s in spec.states} if spec.states else initial_states(spec, batch)
    integers, values = pack(spec, case)
    logits, probabilities = np.empty((batch, events), np.float32), np.empty((batch, events), np.float32)
    outputs: Arrays = {}
    for t in range(events):
        inputs: Arrays = {"integers": integers[:, t], **states}
        if values is not None:
            inputs["values"] = values[:, t]
        if bound:
            for name, value in inputs.items():
                step.inputs[name][...] = value
            step.run_bound()
            outputs = {name: value.copy() for name, value in step.outputs.items()}
        else:
            outputs = step.run({k: np.ascontiguousarray(v) for k, v in inputs.items()})
        logits[:, t], probabilities[:, t] = outputs["logit"], outputs["probability"]
        states = next_states(spec, outputs, batch)
    last = {s.name + NEXT: outputs[s.name + NEXT] for s in spec.states}
    return {"logit": logits, "probability": probabilities, **last}


def pack(spec: GraphSpec, case: Mapping[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Sequence inputs as the step graph's packed columns: integers [B, T, 1 + C], values [B, T, F + K]."""
    integers = [case["event_time"][..., None]]
    if spec.categorical:
        integers.append(case["categorical"])
    values = [case[name] for name in ("numeric", "context") if name in case]
    return np.concatenate(integers, axis=-1), np.concatenate(values, axis=-1) if values else None


def _users(spec: GraphSpec, name: str, value: npt.NDArray[Any], users: list[int]) -> npt.NDArray[Any]:
    state = name.removeprefix("out.").removesuffix(NEXT)
    axis = next((s.batch_axis for s in spec.states if s.name == state), 0)
    return np.take(value, users, axis=axis)


def main() -> int:
    """`python -m seqfraud.verification BUNDLE`: figures as JSON, or one line and exit code 2."""
    try:
        print(json.dumps(verify_bundle(Path(sys.argv[1]))))
    except BundleError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
