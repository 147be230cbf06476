"""The shape of every row of the profiles: what a CSV column may hold, in which unit, and what it means.

Rows come from CSV cells, so that numbers arrive as text; an empty cell stands for a column left out. Each row says
whether it is measured, quoted or modelled, and where it comes from.

Three families: the catalogue (devices, models, links, prices, scores), timed rows with the meta beside a measured file,
and what `perf` fitted to those rows, kept in `fitted/` so that a planner can look at every number the model rests on.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hybridsd_sim.errors import Problem, validation_rule
from hybridsd_sim.estimate import Estimate, Kind

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray


COUNTED_PX = 512
"""Side of the square image for which a component's FLOPs are counted."""

_KNOTS = (0.05, 0.25, 0.5, 0.75, 0.95)

_QUANTILE = re.compile(r"(?P<what>[a-z]+)_(?P<point>p\d+)_(?P<unit>\w+)")


def _refuse_blank_ends(text: str) -> str:
    if text != text.strip():
        raise ValueError("must not begin or end with a blank")
    return text


Positive = Annotated[float, Field(gt=0)]

NotNegative = Annotated[float, Field(ge=0)]

Count = Annotated[int, Field(gt=0)]

Share = Annotated[float, Field(ge=0, le=1)]

Name = Annotated[str, Field(min_length=1), AfterValidator(_refuse_blank_ends)]


class Record(BaseModel):
    """Anything read from a profiles folder: frozen, strict, no unknown fields, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Row(Record):
    """What every row says about itself: its kind covers the whole row, `notes` name the fields that follow a rule."""

    kind: Kind
    source: Name
    source_date: Name
    notes: str = ""


class Gpu(Row):
    """A data-centre or desktop GPU. `fp16_flop_per_s` is the dense tensor peak with fp32 accumulation."""

    name: Name
    label: Name
    memory_gib: Positive | None = None
    memory_bandwidth_bytes_per_s: Positive | None = None
    fp16_flop_per_s: Positive | None = None
    tdp_w: Positive | None = None
    default_interconnect: Name
    usable_memory_fraction: Share


class EdgeDevice(Row):
    """A user's device. `power_w` is what it draws while it denoises, with its own kind, source and range."""

    name: Name
    label: Name
    device_class: Literal["phone", "tablet", "laptop", "desktop", "embedded", "gpu", "cpu"]
    memory_gib: Positive | None = None
    usable_memory_fraction: Share
    power_w: Positive | None = None
    power_kind: Kind | None = None
    power_source: Name
    power_low_w: Positive | None = None
    power_high_w: Positive | None = None
    default_runtime: Name
    default_precision: Name
    fp16_flop_per_s: Positive | None = None


class Model(Row):
    """A UNet and what belongs to it. Models of one `latent_space` may hand a latent over to each other.

    `config` holds the fields of diffusers' `UNet2DConditionModel` that differ from its defaults; `ops` are the kernel
    launches of one call; `text_embedding_bytes_fp16` are those of one prompt.
    """

    name: Name
    label: Name
    latent_space: Literal["sd1", "sd2", "sdxl"]
    prediction: Literal["epsilon", "v"]
    native_px: Count
    config: Mapping[str, Any]
    params: Count
    ops: Count
    text_encoders: tuple[Name, ...]
    text_embedding_bytes_fp16: Count
    cross_attention_dim: Count
    vae: Name
    small_vae: Name

    @field_validator("config", mode="before")
    @classmethod
    def _read_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("text_encoders", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(";")) if isinstance(value, str) else value

    @property
    def architecture(self) -> str:
        """A text that is the same for models of one architecture, such as SD 1.4 and 1.5: its config."""
        return json.dumps(self.config, sort_keys=True)


class Component(Row):
    """A text encoder or VAE decoder: FLOPs (2 x MACs) of one prompt or of one 512 x 512 px image."""

    name: Name
    component: Literal["vae_decode", "text_encode"]
    params: Count
    ops: Count
    flop_conv_512: NotNegative
    flop_linear_512: NotNegative
    flop_attention_512: NotNegative

    def area(self, height_px: int, width_px: int) -> float:
        """The image relative to the counted one; 1 for a prompt."""
        return height_px * width_px / COUNTED_PX**2 if self.component == "vae_decode" else 1.0

    def flop(self, height_px: int, width_px: int) -> float:
        """FLOPs at this image size: attention products grow with the pixels squared, the rest with the pixels."""
        area = self.area(height_px, width_px)
        return (self.flop_conv_512 + self.flop_linear_512) * area + self.flop_attention_512 * area**2


class Interconnect(Row):
    """GPU to GPU, as achieved by collectives: bytes per second, per GPU and direction, with a range.

    `scales_with_devices`: every pair talks at full speed at once (a switch); otherwise the devices share.
    `beyond_pairs` names what carries more than two devices where this joins only two. `shares_memory`: the ranks are
    processes of one machine, which slow each other.
    """

    name: Name
    label: Name
    bandwidth_bytes_per_s: Positive
    bandwidth_low: Positive
    bandwidth_high: Positive
    latency_s: Positive
    peer_access: bool
    scales_with_devices: bool
    beyond_pairs: Name | None = None
    shares_memory: bool = False


class Quantiles(Record):
    """Five points of a distribution over users and moments."""

    p5: Positive
    p25: Positive
    p50: Positive
    p75: Positive
    p95: Positive

    @model_validator(mode="after")
    def _must_rise(self) -> Self:
        if sorted(self.points) != list(self.points):
            raise ValueError("quantiles must not fall from p5 to p95")
        return self

    @property
    def points(self) -> tuple[float, float, float, float, float]:
        return self.p5, self.p25, self.p50, self.p75, self.p95

    @property
    def median(self) -> float:
        return self.p50

    def at(self, u: float) -> float:
        """The quantile at `u` in 0..1: linear in the logarithm between the points, flat outside p5 and p95."""
        points = self.points
        if not _KNOTS[0] < u < _KNOTS[-1]:
            return points[0] if u <= _KNOTS[0] else points[-1]
        index = bisect_right(_KNOTS, u) - 1
        share = (u - _KNOTS[index]) / (_KNOTS[index + 1] - _KNOTS[index])
        return points[index] * math.pow(points[index + 1] / points[index], share)

    def at_many(self, u: NDArray[float64]) -> NDArray[float64]:
        """The same for many draws at once."""
        import numpy as np

        return np.exp(np.interp(u, _KNOTS, np.log(self.points)))


class Network(Row):
    """A class of access network between a user's device and the cloud; round trips include the path to a server."""

    name: Name
    label: Name
    down_bytes_per_s: Quantiles
    up_bytes_per_s: Quantiles
    rtt_s: Quantiles

    @model_validator(mode="before")
    @classmethod
    def _fold(cls, data: object) -> object:
        """Gather `down_p5_bytes_per_s`, `rtt_p50_s` and so on into one field for each quantity."""
        if not isinstance(data, Mapping):
            return data
        folded: dict[str, Any] = {}
        for column, value in data.items():
            if found := _QUANTILE.fullmatch(column):
                folded.setdefault(f"{found['what']}_{found['unit']}", {})[found["point"]] = value
            else:
                folded[column] = value
        return folded


class Price(Row):
    """What a thing costs: `gpu:<name>` in USD per GPU-hour, `egress` per GiB, `electricity` per kWh."""

    item: Name
    provider: Name
    purchase: Literal["on_demand", "spot", ""] = ""
    region: str = ""
    usd: NotNegative
    unit: Literal["usd_per_gpu_hour", "usd_per_gib", "usd_per_kwh"]
    low: NotNegative | None = None
    high: NotNegative | None = None
    default: bool


class QualityRow(Row):
    """A published score of a model, of a pair switched at `switch_step`, or of a parallel method. CLIP in 0..1."""

    table: Name
    large_model: Name
    small_model: Name | None = None
    switch_step: Annotated[int, Field(ge=0)] | None = None
    num_inference_steps: Count
    method: Name = "single"
    degree: Count = 1
    options: str = ""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    clip: Share | None = None
    fid: Positive | None = None
    inception_score: Positive | None = None
    lpips: NotNegative | None = None


class PublicCut(Row):
    """One component of the cut of a network in AsyncDiff's public code: the modules that it computes, in order."""

    model: Name
    components: Count
    component: Annotated[int, Field(ge=0)]
    modules: tuple[Name, ...]

    @field_validator("modules", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value


class Runtime(Row):
    """What a runtime adds to arithmetic: seconds an operation on the device, seconds a launch on the host.

    These and `efficiency`, the share of the datasheet peak, are what is believed before any row is looked at.
    `max_unet_batch` latents fit one UNet call (None: any number). `overhead_share`: what an edge device takes end to
    end beyond the sum of its components, as a share of that sum, with its 90% interval and its own source; 0: none
    known.
    """

    name: Name
    label: Name
    seconds_per_op: NotNegative
    launch_s_per_op: NotNegative
    max_unet_batch: Count | None = None
    efficiency: Share
    overhead_share: NotNegative = 0.0
    overhead_low: NotNegative = 0.0
    overhead_high: NotNegative = 0.0
    overhead_source: str = ""


def columns_of(shape: type[Row]) -> dict[str, bool]:
    """The columns of a row's file and whether each is required; quantiles take one column for each point."""
    columns: dict[str, bool] = {}
    for name, described in shape.model_fields.items():
        if described.annotation is Quantiles:
            what, unit = name.split("_", 1)
            columns |= {f"{what}_{point}_{unit}": True for point in Quantiles.model_fields}
        else:
            columns[name] = described.is_required()
    return columns


def row_problems(error: ValidationError, place: str, cells: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a row at `place` with these `cells`, a problem for each column."""
    for found in error.errors():
        loc = [str(part) for part in found["loc"]]
        column = ".".join(loc)
        if len(loc) == 2 and loc[1] in Quantiles.model_fields:
            what, unit = loc[0].split("_", 1)
            column = f"{what}_{loc[1]}_{unit}"
        given = cells.get(column, found["input"] if loc else "this row")
        value = "empty" if found["type"] == "missing" else repr(given)
        yield Problem(f"{place}: {column}" if column else place, value, validation_rule(found))


TABLES: Mapping[str, type[Row]] = {
    "gpus": Gpu,
    "edge_devices": EdgeDevice,
    "models": Model,
    "components": Component,
    "interconnects": Interconnect,
    "networks": Network,
    "runtimes": Runtime,
    "prices": Price,
    "quality": QualityRow,
    "cuts": PublicCut,
}
"""The tables of the catalogue: `catalog/<name>.csv` holds one of these rows a line."""


ALIKE = {"bf16": "fp16"}
"""Precisions that run at one speed."""


def alike(precision: str) -> str:
    """The precision under whose name rows of this one are used and fitted."""
    return ALIKE.get(precision, precision)


class CostRow(Row):
    """Seconds of one component on one device. Sizes are 0 where the image does not matter; `*` stands for any name.

    `model` names a component for `vae_decode` and `text_encode`. `guidance`: the row is one guided step, a UNet call on
    2 x `batch_size` latents. A row of several GPUs averages over the steps named in its options, warm-up included.
    """

    device: Name
    runtime: Name
    precision: Name
    model: Name
    component: Literal[
        "text_encode",
        "step",
        "step_warmup",
        "vae_decode",
        "model_load",
        "handover_serialise",
        "handover_parse",
        "exchange",
    ]
    rank: Annotated[int, Field(ge=0)] | None = None
    height_px: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    width_px: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    batch_size: Count = 1
    guidance: bool = False
    method: Name = "single"
    degree: Count = 1
    options: str = ""
    seconds_median: Positive
    seconds_p05: Positive | None = None
    seconds_p95: Positive | None = None
    num_samples: Count | None = None
    peak_memory_bytes: Count | None = None
    comm_bytes: Annotated[int, Field(ge=0)] | None = None
    energy_j: NotNegative | None = None

    @property
    def option_texts(self) -> dict[str, str]:
        """The options by name, as texts."""
        return dict(part.split("=", 1) for part in self.options.split(";") if "=" in part)

    @property
    def latents(self) -> int:
        """Latents of the UNet call."""
        return self.batch_size * (2 if self.guidance else 1)

    @property
    def seconds(self) -> Estimate:
        """The median, between the 5th and the 95th percentile.

        Where the source gives no percentiles (modelled): 3.5% to either side, which is what repetition does, and 10%
        for a row that was derived by a rule.
        """
        middle, share = self.seconds_median, 0.1 if self.kind == "modelled" else 0.035
        low = (1 - share) * middle if self.seconds_p05 is None else self.seconds_p05
        high = (1 + share) * middle if self.seconds_p95 is None else self.seconds_p95
        return Estimate(middle, low, high, self.kind, (self.source,))

    @model_validator(mode="after")
    def _percentiles_must_rise(self) -> Self:
        known = [value for value in (self.seconds_p05, self.seconds_median, self.seconds_p95) if value is not None]
        if sorted(known) != known:
            raise ValueError("seconds_p05 <= seconds_median <= seconds_p95")
        if self.component in ("step", "step_warmup", "vae_decode") and not (self.height_px and self.width_px):
            raise ValueError(f"a {self.component} row needs height_px and width_px")
        return self


class TimingProtocol(Record):
    """How a measurement was made: runs before the clock counts, runs counted, and what was dropped from those."""

    warmup_runs: Annotated[int, Field(ge=0)]
    runs: Count
    trimming: str = ""


class Meta(Record):
    """What stands beside a measured file: the machine, the software, the protocol. No paths, no host names.

    `processor` is what the chip calls itself. `ceilings` are the machine's own limits, measured in the same run, with
    units in their names.
    """

    device: Name
    processor: str = ""
    driver: str = ""
    libraries: Mapping[str, str] = Field(default_factory=dict)
    date: Name
    protocol: TimingProtocol
    commit: str = ""
    fit_errors: Mapping[str, float] = Field(default_factory=dict)
    ceilings: Mapping[str, Positive] = Field(default_factory=dict)


Efficiency = Literal[
    "linear_efficiency", "conv_share", "attention_share", "memory_efficiency", "seconds_per_op", "launch_s_per_op"
]

EFFICIENCIES: tuple[Efficiency, ...] = get_args(Efficiency)
"""A device's law in terms that compare between devices: efficiencies are shares of the datasheet's figures,
`conv_share` and `attention_share` are rates relative to linear layers."""


class Population(Row):
    """One parameter of the devices that were timed under a runtime: their middle and the spread between them.

    `spread` is the standard deviation of the natural logarithm.
    """

    runtime: Name
    precision: Name
    parameter: Efficiency
    mean: Positive
    spread: NotNegative
    devices: Annotated[int, Field(ge=0)]


class MethodConstant(Row):
    """A constant of the parallel methods, shared by all devices; `spread` is its logarithm's standard deviation."""

    name: Name
    value: Positive
    spread: NotNegative
    rows: Annotated[int, Field(ge=0)]


FITTED: Mapping[str, type[Row]] = {"populations": Population, "constants": MethodConstant}
"""The fitted tables: `fitted/<name>.csv` holds one of these rows a line."""
