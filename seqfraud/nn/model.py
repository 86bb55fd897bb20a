"""The module that is trained, evaluated and exported: raw columns and state in, logits, probability and state out.

Letters: B users, T events, F numeric inputs, C categorical inputs, K context inputs, L layers, H hidden units,
G places, V values before and after the logarithm, P piecewise-linear units, S steps, D inputs of the first linear layer,
W its outputs for the GRU, M its outputs for the head, Q forecast values, E networks.

The state before an event also forecasts the event's own numbers, a mean and a spread for each. It learns that from every
event, labelled or not, so that few labels are enough: what the head is told is how far from the user's habit a number is.

Several networks may see the same inputs, each drawn and fitted by itself; the model's logit is the mean of theirs (deep
ensembles, Lakshminarayanan et al. 2017, arXiv 1612.01474). They are one graph: h holds their states side by side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqfraud.config import DAY_MS, WEEK_MS
from seqfraud.context import NEVER
from seqfraud.graph import NEXT, GraphSpec

EARTH_KM = 6371.0088
"""Mean radius, IUGG."""
RADIAN = math.pi / 180
CLOCK = ((DAY_MS, 1), (DAY_MS, 2), (WEEK_MS, 1), (WEEK_MS, 2))
"""Periods in ms and harmonics of the clock features; each gives a sine and a cosine."""
SURPRISE_KNOTS = tuple(range(-2, 6))
"""In standard deviations: where the piecewise-linear units of a surprise begin, each one wide."""
LARGEST_SURPRISE = 10.0
LOG_PRECISION = (-4.0, 2.5)
"""Bounds of the logarithm of 1 / spread of a forecast; a narrower one would amplify what two graphs differ by."""
UNKNOWN = -1.0
"""Gap, distance and speed of a first event; its logarithm, -log 2, is below that of every real one."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the module's shapes."""

    numeric: int
    """F, places included."""
    places: int
    """G; their 2 G columns are the last of the numeric inputs."""
    context: int
    vocabularies: tuple[int, ...]
    """Number of ids per categorical input."""
    missing: tuple[int, ...]
    """Numeric inputs that may be missing (NaN)."""
    bins: int
    """P, summed over all values."""
    hidden: int
    layers: int
    input_width: int
    head_width: int
    embedding: int
    dropout: float = 0.0
    forecast: bool = False
    """Whether the state forecasts the next event's numbers."""
    steps: int = 0
    """S, summed over all values."""
    members: int = 1
    """E, the networks whose logits are averaged."""

    @property
    def state_width(self) -> int:
        """Width of h: the hidden units of every network."""
        return self.members * self.hidden

    @property
    def forecasts(self) -> tuple[int, ...]:
        """The Q values that are forecast: plain numbers, gap and distances, as places among the V values."""
        if not self.forecast:
            return ()
        plain = self.numeric - 2 * self.places
        gap = plain + self.context
        return (*range(plain), gap, *range(gap + 1, gap + 1 + self.places))

    @property
    def surprise_width(self) -> int:
        """Inputs of the head that say how surprising an event's numbers are."""
        return len(self.forecasts) * (1 + len(SURPRISE_KNOTS))

    @property
    def values(self) -> int:
        """V: plain numbers, context, gap, distance and speed per place."""
        return self.numeric - 2 * self.places + self.context + 1 + 2 * self.places

    @property
    def dense_width(self) -> int:
        """Inputs of the first layer that are no embeddings."""
        return self.values + self.bins + self.steps + 2 * len(CLOCK) + len(self.missing)

    def embedding_widths(self) -> list[int]:
        """Width of each embedding: at most `embedding`, less for small vocabularies."""
        return [min(self.embedding, math.ceil(n / 2)) for n in self.vocabularies]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "ModelSpec":
        """The specification of a checkpoint."""
        return ModelSpec(**{**raw, "vocabularies": tuple(raw["vocabularies"]), "missing": tuple(raw["missing"])})


def signed_log(x: Tensor) -> Tensor:
    """sign(x) * log(1 + |x|)."""
    return torch.sign(x) * torch.log(1 + torch.abs(x))


def haversine_km(here: Tensor, there: Tensor) -> Tensor:
    """Great-circle distance [..., G] of places [..., 2 G] in degrees (latitude, longitude, ...); haversine formula."""
    half = torch.sin((here - there) * (RADIAN / 2))
    square = half * half
    cosines = torch.cos(here * RADIAN) * torch.cos(there * RADIAN)
    s = square[..., 0::2] + cosines[..., 0::2] * square[..., 1::2]
    return 2 * EARTH_KM * torch.asin(torch.sqrt(torch.clamp(s, 0.0, 1.0)))


class EventEncoder(nn.Module):
    """Raw columns of events to the dense inputs of the first layer; no learned weights, only fitted constants."""

    mean: Tensor
    inverse_std: Tensor
    bin_value: Tensor
    bin_scale: Tensor
    bin_low: Tensor
    step_value: Tensor
    step_threshold: Tensor
    fill: Tensor
    frequency: Tensor
    period: Tensor
    missing_columns: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.zeros(spec.values))
        self.register_buffer("inverse_std", torch.ones(spec.values))
        self.register_buffer("bin_value", torch.zeros(spec.bins, dtype=torch.int64))
        self.register_buffer("bin_scale", torch.ones(spec.bins))
        self.register_buffer("bin_low", torch.zeros(spec.bins))
        self.register_buffer("step_value", torch.zeros(spec.steps, dtype=torch.int64))
        self.register_buffer("step_threshold", torch.zeros(spec.steps))
        self.register_buffer("fill", torch.zeros(spec.numeric))
        self.register_buffer("frequency", torch.tensor([2 * math.pi * k for _, k in CLOCK]))
        self.register_buffer("period", torch.tensor([period for period, _ in CLOCK]), persistent=False)
        self.register_buffer("missing_columns", torch.tensor(spec.missing, dtype=torch.int64))

    def values(
        self,
        event_time: Tensor,
        numeric: Tensor | None,
        context: Tensor | None,
        previous_time: Tensor,
        previous_place: Tensor | None,
    ) -> Tensor:
        """The V numbers of each event; `signed_log` of them is what the bins and the first layer see.

        Args:
            event_time: int64 [..., 1] ms.
            numeric: float [..., F].
            context: float [..., K].
            previous_time: int64 [..., 1] ms, NEVER for a first event.
            previous_place: float [..., 2 G] degrees.
        """
        first = previous_time == NEVER
        # int64 until after the subtraction: as float32, milliseconds since 1970 are minutes coarse
        gap = torch.clamp(event_time - previous_time, min=0).to(torch.float32) / 1000
        gap = gap.masked_fill(first, UNKNOWN)
        parts = []
        if numeric is not None:
            plain = numeric[..., : self.spec.numeric - 2 * self.spec.places]
            if self.spec.missing:
                plain = torch.where(torch.isnan(plain), self.fill[: plain.shape[-1]], plain)
            if plain.shape[-1]:
                parts.append(plain)
        if context is not None:
            parts.append(context)
        parts.append(gap)
        if previous_place is not None:
            assert numeric is not None
            distance = haversine_km(numeric[..., -2 * self.spec.places :], previous_place)
            speed = distance * 3600 / torch.clamp(gap, min=1.0)
            unknown = first | torch.isnan(distance)
            parts += [x.masked_fill(unknown, UNKNOWN) for x in (distance, speed)]
        return torch.cat(parts, dim=-1)

    def bins(self, values: Tensor) -> Tensor:
        """Piecewise-linear encoding [..., P] of values [..., V] after the logarithm (Gorishniy et al. 2022, arXiv 2203.05556)."""
        # subtracted before it is scaled: scale * value + offset would lose digits to cancellation
        return torch.clamp((values[..., self.bin_value] - self.bin_low) * self.bin_scale, 0.0, 1.0)

    def steps(self, values: Tensor) -> list[Tensor]:
        """Whether values [..., V] before the logarithm reach the thresholds [..., S]; an empty list where there are none.

        Numbers that come in as they are and the gap only: two graphs agree on them to the last bit, so that a step may be as
        sharp as it likes.
        """
        if not self.spec.steps:
            return []
        return [(values[..., self.step_value] >= self.step_threshold).to(torch.float32)]

    def clock(self, event_time: Tensor) -> Tensor:
        """Sines and cosines [..., 8] of the time of day and of week; int64 [..., 1] ms."""
        angles = (event_time % self.period).to(torch.float32) * (self.frequency / self.period)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)

    def units(self, plain: Tensor, values: Tensor, event_time: Tensor, numeric: Tensor | None) -> list[Tensor]:
        """What the first layer sees beside the values: bins, steps, clock, flags; before and after the logarithm [..., V]."""
        return [self.bins(values), *self.steps(plain), self.clock(event_time), *self.missing(numeric)]

    def missing(self, numeric: Tensor | None) -> list[Tensor]:
        """Flags [..., len(missing)] of the numbers that may be missing; an empty list where none may."""
        if numeric is None or not self.spec.missing:
            return []
        return [torch.isnan(numeric[..., self.missing_columns]).to(torch.float32)]


class Forecast(nn.Module):
    """What the state before an event says of the event's own numbers, and how far they are from it."""

    which: Tensor
    least: Tensor
    knots: Tensor
    spread: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.count = len(spec.forecasts)
        self.linear = nn.Linear(spec.hidden, 2 * self.count)
        self.register_buffer("which", torch.tensor(spec.forecasts, dtype=torch.int64))
        plain = spec.numeric - 2 * spec.places
        least = [-math.inf] * plain + [UNKNOWN / 2] * (self.count - plain)
        self.register_buffer("least", torch.tensor(least))
        self.register_buffer("knots", torch.tensor(SURPRISE_KNOTS, dtype=torch.float32))
        each = torch.eye(self.count).repeat_interleave(len(SURPRISE_KNOTS), dim=1)
        self.register_buffer("spread", each, persistent=False)

    def surprise(self, state: Tensor, scaled: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """In standard deviations [..., Q], 0 where there is nothing to compare, and its squared error.

        Args:
            state: [..., H], the top layer's before the event.
            scaled: [..., Q], the event's standardised values.
            values: [..., Q], the same before scaling; a gap or distance that is not known is below 0.

        Returns:
            The surprise, and the negative log-likelihood of each value under a normal distribution, without its constant.
        """
        mean, log_precision = torch.split(self.linear(state), self.count, dim=-1)
        log_precision = torch.clamp(log_precision, *LOG_PRECISION)
        known = values >= self.least
        away = torch.clamp((scaled - mean) * torch.exp(log_precision), -LARGEST_SURPRISE, LARGEST_SURPRISE)
        away = torch.where(known, away, 0.0)
        return away, 0.5 * away * away - torch.where(known, log_precision, 0.0)

    def units(self, away: Tensor) -> Tensor:
        """Surprises [..., Q] as inputs of the head [..., Q * (1 + knots)]: as they are, and piecewise-linear."""
        # a product with ones: each surprise as often as there are knots, in fewer operators than a change of shape takes
        steps = torch.clamp(away @ self.spread - torch.cat([self.knots] * self.count), 0.0, 1.0)
        return torch.cat([away / 3, steps], dim=-1)


class Network(nn.Module):
    """Everything that is learned: the first layer, the GRU, the forecast and the head, from encoded events to logits."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = spec.embedding_widths()
        self.embeddings = nn.ModuleList(nn.Embedding(n, w) for n, w in zip(spec.vocabularies, widths, strict=True))
        self.input = nn.Linear(spec.dense_width + sum(widths), spec.input_width + spec.head_width)
        inputs = [spec.input_width] + [spec.hidden] * (spec.layers - 1)
        self.cells = nn.ModuleList(nn.GRU(n, spec.hidden) for n in inputs)
        self.forecast = Forecast(spec) if spec.forecasts else None
        self.head = nn.Linear(spec.hidden + spec.input_width + spec.surprise_width, spec.head_width, bias=False)
        self.output = nn.Linear(spec.head_width, 1)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self, dense: Tensor, values: Tensor, ids: Tensor | None, h: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logit [B, T], h after the event at `length` [L, B, H], and the forecast's loss [B, T], if there is one.

        Args:
            dense: [B, T, dense_width].
            values: [B, T, V], after the logarithm.
            ids: int64 [B, T, C].
            h: [L, B, H].
            length: int64 [B].
        """
        parts = [dense]
        if ids is not None:
            parts += [table(ids[..., c]) for c, table in enumerate(self.embeddings)]
        z, direct = self.first(self.input(torch.cat(parts, dim=-1)))
        states, h_next = self.recur(z, h, length)
        sides = [states[:, 1:], z]
        loss = None
        if self.forecast is not None:
            at = self.forecast.which
            with torch.autocast(dense.device.type, enabled=False):
                away, losses = self.forecast.surprise(states[:, :-1].float(), dense[..., at], values[..., at])
                sides.append(self.forecast.units(away))
                loss = losses.mean(dim=-1)
        return self.score(sides, direct), h_next, loss

    def first(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's output [..., W + M] as the GRU's input [..., W] and what goes to the head directly [..., M]."""
        z, direct = torch.split(out, [self.spec.input_width, self.spec.head_width], dim=-1)
        return self.dropout(torch.relu(z)), direct

    def recur(self, z: Tensor, h: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The GRU.

        Args:
            z: [B, T, W].
            h: [L, B, H].
            length: int64 [B].

        Returns:
            The top layer's states [B, 1 + T, H], the one before the first event in front, and h after the event at
            `length`, [L, B, H].
        """
        x = z.transpose(0, 1)
        index = length[None, :, None].expand(1, -1, self.spec.hidden)
        states = []
        for layer, cell in enumerate(self.cells):
            before = h[layer : layer + 1]
            x, _ = cell(x, before)
            # the state at `length` with the initial one in front, so that length 0 works
            all_states = torch.cat([before.to(x.dtype), x], dim=0)
            states.append(all_states.gather(0, index))
        return all_states.transpose(0, 1), torch.cat(states, dim=0)

    def score(self, sides: list[Tensor], direct: Tensor) -> Tensor:
        """Logit [...] of the head's inputs: the GRU's output, its input, the surprises, and what comes directly."""
        hidden = torch.relu(direct + self.head(torch.cat(sides, dim=-1)))
        logit: Tensor = self.output(self.dropout(hidden))[..., 0]
        return logit


class SequenceModel(nn.Module):
    """GRU over each user's events.

    `forward` takes and returns tensors by the names of `seqfraud.graph`; every state is carried, so that any split of a
    history into calls gives the same result.
    """

    network: type[Network] = Network
    scale: Tensor
    shift: Tensor

    def __init__(self, spec: ModelSpec, graph: GraphSpec) -> None:
        super().__init__()
        self.spec = spec
        self.graph = graph
        self.encoder = EventEncoder(spec)
        self.networks = nn.ModuleList(self.network(spec) for _ in range(spec.members))
        # calibration: probability = sigmoid(scale * logit + shift)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Score every event and carry the states to the event at `length`.

        Args:
            inputs: event_time int64 [B, T], numeric [B, T, F], categorical int64 [B, T, C], context [B, T, K],
                length int64 [B], and the states; those of width 0 are absent.

        Returns:
            logit [B, T] (uncalibrated), probability [B, T], each state with the suffix `_next`, member_logits [E, B, T],
            and, where the model forecasts, forecast_loss [B, T]: the mean negative log-likelihood of the event's own
            numbers, summed over networks.
        """
        time = inputs["event_time"]
        last_time = inputs["last_time"]
        times = torch.cat([last_time[:, None], time], dim=1)
        numeric = inputs.get("numeric")
        places = None
        if self.spec.places:
            assert numeric is not None
            places = torch.cat([inputs["last_place"][:, None], numeric[..., -2 * self.spec.places :]], dim=1)
        values, dense = self.dense(
            time[..., None],
            numeric,
            inputs.get("context"),
            times[:, :-1, None],
            None if places is None else places[:, :-1],
        )
        ids, length = inputs.get("categorical"), inputs["length"]
        states = self.states_of_members(inputs["h"])
        made = [network(dense, values, ids, h, length) for network, h in zip(self.networks, states, strict=True)]
        logits = [logit for logit, _, _ in made]
        logit = mean_of(logits)
        at = length[:, None]
        out = {
            "logit": logit,
            "probability": self.calibrated(logit),
            "h" + NEXT: side_by_side([h for _, h, _ in made]),
            "last_time" + NEXT: times.gather(1, at)[:, 0],
        }
        if places is not None:
            index = at[..., None].expand(-1, 1, 2 * self.spec.places)
            out["last_place" + NEXT] = places.gather(1, index)[:, 0]
        # for training; no exported graph has these
        out["member_logits"] = torch.stack(logits)
        losses = [loss for _, _, loss in made if loss is not None]
        if losses:
            out["forecast_loss"] = torch.stack(losses).sum(dim=0)
        return out

    def dense(
        self,
        event_time: Tensor,
        numeric: Tensor | None,
        context: Tensor | None,
        previous_time: Tensor,
        previous_place: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The V values after the logarithm, and the scaled dense inputs [..., dense_width], which begin with them."""
        encoder = self.encoder
        # in float32 also under mixed precision: amounts and counters exceed what half precision holds
        with torch.autocast(event_time.device.type, enabled=False):
            plain = encoder.values(event_time, numeric, context, previous_time, previous_place)
            values = signed_log(plain)
            scaled = (values - encoder.mean) * encoder.inverse_std
            return values, torch.cat([scaled, *encoder.units(plain, values, event_time, numeric)], dim=-1)

    def states_of_members(self, h: Tensor) -> Sequence[Tensor]:
        """h [L, B, E * H] as that of each network, [L, B, H]."""
        if self.spec.members == 1:
            return [h]
        # cuDNN takes no other than contiguous ones
        return [part.contiguous() for part in torch.split(h, self.spec.hidden, dim=-1)]

    def calibrated(self, logit: Tensor) -> Tensor:
        """Probability of fraud."""
        return torch.sigmoid(self.scale * logit + self.shift)

    def initial_states(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """The states of users who have no history."""
        return {s.name: torch.from_numpy(s.to_batch(s.initial_rows(batch))).to(device) for s in self.graph.states}


def mean_of(logits: list[Tensor]) -> Tensor:
    """The mean [...] of the networks' logits."""
    return logits[0] if len(logits) == 1 else sum(logits[1:], logits[0]) / len(logits)


def side_by_side(states: list[Tensor]) -> Tensor:
    """The states [L, B, H] of networks as h [L, B, E * H]."""
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


class StepModel(nn.Module):
    """The same function for one event per user, folded for a small call.

    Scaling is folded into the first layer, embedding tables are multiplied through it, inputs come packed.
    """

    dense_weight: Tensor
    tables: Tensor
    table_offset: Tensor
    bias: Tensor
    forecast_values: Tensor

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model
        spec = model.spec
        with torch.no_grad():
            folded = [_folded(network, model.encoder) for network in model.networks]
        # the networks' first layers side by side: one product of matrices
        for name, parts in zip(("dense_weight", "bias", "tables"), zip(*folded, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts, dim=-1).float().contiguous())
        offsets = [sum(spec.vocabularies[:c]) for c in range(len(spec.vocabularies))]
        self.register_buffer("table_offset", torch.tensor(offsets, dtype=torch.int64))
        self.register_buffer("forecast_values", torch.tensor(spec.forecasts, dtype=torch.int64))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Score one event per user: integers int64 [B, 1 + C], values float [B, F + K], the states.

        Returns:
            logit [B], probability [B], and each state with the suffix `_next`.
        """
        model, spec, encoder = self.model, self.model.spec, self.model.encoder
        time = inputs["integers"][:, :1]
        packed = inputs.get("values")
        numeric = None if packed is None or not spec.numeric else packed[:, : spec.numeric]
        context = None if packed is None or not spec.context else packed[:, spec.numeric :]
        plain = encoder.values(time, numeric, context, inputs["last_time"][:, None], inputs.get("last_place"))
        values = signed_log(plain)
        # the mean is not folded into the bias: terms of a narrow feature would cancel and lose digits
        centred = values - encoder.mean
        dense = torch.cat([centred, *encoder.units(plain, values, time, numeric)], dim=-1)
        bias = self.bias
        if spec.vocabularies:
            bias = self.tables[inputs["integers"][:, 1:] + self.table_offset].sum(dim=1)
        out = torch.addmm(bias, dense, self.dense_weight)
        width = spec.input_width + spec.head_width
        firsts = [out] if spec.members == 1 else torch.split(out, width, dim=-1)
        befores = model.states_of_members(inputs["h"])
        own = None
        if spec.forecasts:
            at = self.forecast_values
            own = centred[:, at] * encoder.inverse_std[at], values[:, at]
        logits, afters = [], []
        for network, first, before in zip(model.networks, firsts, befores, strict=True):
            logit, after = self._member(network, first, before, own)
            logits.append(logit)
            afters.append(after)
        logit = mean_of(logits)
        made = {"logit": logit, "probability": model.calibrated(logit)}
        made["h" + NEXT] = side_by_side(afters)
        made["last_time" + NEXT] = time[:, 0]
        if spec.places:
            assert numeric is not None
            made["last_place" + NEXT] = numeric[:, -2 * spec.places :]
        return made

    def _member(
        self, network: nn.Module, first: Tensor, h: Tensor, own: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """One network's logit [B] and h after the event [L, B, H], from its first layer's output and h before.

        `own` holds what forecasts are of [B, Q], scaled and before scaling; None where there is no forecast.
        """
        assert isinstance(network, Network)
        spec = self.model.spec
        z, direct = network.first(first)
        x = z[None]
        states = []
        # of one event, the state after it is all that a layer gives
        for before, cell in zip(torch.split(h, 1) if spec.layers > 1 else [h], network.cells, strict=True):
            _, x = cell(x, before)
            states.append(x)
        sides = [x[0], z]
        if own is not None:
            assert network.forecast is not None
            sides.append(network.forecast.units(network.forecast.surprise(h[-1], *own)[0]))
        return network.score(sides, direct), states[0] if len(states) == 1 else torch.cat(states, dim=0)


def _folded(network: nn.Module, encoder: EventEncoder) -> tuple[Tensor, Tensor, Tensor]:
    """A network's first layer with the scaling and the embeddings in it, in float64.

    Returns:
        Weight [D', W + M] of the dense inputs, bias [W + M], and a row [W + M] for each id of every column; no rows
        where there is no column.
    """
    assert isinstance(network, Network)
    spec = network.spec
    weight = network.input.weight.double()  # [W + M, D]
    dense = weight[:, : spec.dense_width].clone()
    dense[:, : spec.values] *= encoder.inverse_std.double()
    bias = network.input.bias.double()
    tables, at = [], spec.dense_width
    for table in network.embeddings:
        assert isinstance(table, nn.Embedding)
        end = at + table.embedding_dim
        tables.append(table.weight.double() @ weight[:, at:end].T)
        if len(tables) == 1:  # each event has one category of the first column, and so the bias once
            tables[0] += bias
        at = end
    return dense.T, bias, torch.cat(tables) if tables else weight.new_zeros(0, len(bias))
