"""The shape of a scenario: who asks for what, the edge fleets and cloud pools that serve it, budget and search space.

Frozen pydantic models; the sentence under each field is its documentation here, in the JSON Schema and in messages.
Rules between fields are each model's `broken_rules`. How a file becomes a `Scenario` is in `loader`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field

from hybridsd_sim.errors import unknown_name
from hybridsd_sim.plan import Promises, tightest
from hybridsd_sim.scenario.overrides import Blocks, apply_changes, entries
from hybridsd_sim.scenario.yaml_source import (
    Broken,
    Entries,
    Name,
    NonNegative,
    Positive,
    Reading,
    Text,
    Written,
    plain,
)

SPOT_PREEMPTIONS_PER_NODE_HOUR = 0.05
"""Assumption: a spot node is taken away every twenty hours, in the mean."""


class EdgeFleet(Written):
    """Devices of one kind in users' hands, and the network they sit on."""

    device: Text
    """Edge device of the catalogue (for example snapdragon-8-elite)."""
    replicas: Annotated[int, Field(ge=1, le=1_000_000_000)]
    """Number of devices."""
    network: Text
    """Access network of the catalogue between device and cloud: lte, 5g, wifi5, wifi6 or ethernet."""
    ownership: Literal["user", "shared"] = "user"
    """user: a device serves its owner's requests only; shared: any request may use any device."""
    runtime: Text | None = None
    """Runtime of the device's cost rows; null takes the device's default."""
    precision: Text | None = None
    """Precision of weights and activations; null takes the device's default."""
    power_w: Positive | None = None
    """Watts drawn while generating; null takes the catalogue's figure."""
    encodes_prompt: bool = True
    """Whether the device runs the text encoder itself, so that no embedding travels at a switch step."""


class Pool(Written):
    """Cloud nodes of one kind behind one queue."""

    gpu: Text
    """GPU of the catalogue (for example a100-sxm-80gb), or any other device that is rented as a node."""
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs in one node; a worker group of parallel GPUs never leaves its node."""
    interconnect: Text | None = None
    """Link between the GPUs of a node (for example nvlink3-switch); null takes the GPU's default."""
    runtime: Text = "cudagraph"
    """How the UNet is run: eager, cudagraph, compiled or tensorrt."""
    precision: Text = "fp16"
    """Precision of weights and activations."""
    purchase: Literal["on_demand", "spot"] = "on_demand"
    """How the nodes are bought; for a mix of both, write two pools: the optimiser shares the requests out."""
    provider: Text | None = None
    """Price list to use; null takes the catalogue's default."""
    usd_per_gpu_hour: NonNegative | None = None
    """Own price of one GPU for an hour; null takes the catalogue's."""
    replicas: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Nodes that simulate runs; null runs replicas_max, and plan always searches."""
    replicas_min: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Fewest nodes that a plan may rent."""
    replicas_max: Annotated[int, Field(ge=0, le=100_000)]
    """Most nodes that a plan may rent."""
    cold_start_s: NonNegative = 0.0
    """Seconds from renting a node until it serves; every node is rented at time 0, so let warmup_s cover it."""
    preemptions_per_node_hour: NonNegative | None = None
    """How often a node is taken away; null means never on demand, and 0.05 on spot (an assumption)."""
    replacement_s: NonNegative = 180.0
    """Seconds from a node's preemption until another one serves in its place; the rent runs on."""
    discipline: Literal["fifo", "gang_fifo", "backfill", "edf"] = "fifo"
    """Order of the queue: fifo, gang_fifo (the head reserves a node), backfill (short jobs pass), edf (deadlines)."""
    resident_models: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Models that one node keeps in memory; null means all of them, always loaded."""
    model_load_s: NonNegative | None = None
    """Seconds to load a model that is not resident; null takes the catalogue's figure."""
    telemetry_period_s: NonNegative = 0.0
    """Age at which a policy's view is renewed; 0 is always fresh. The longest of all pools holds for the whole view."""

    @property
    def preemptions_per_s(self) -> float:
        """How often a node is taken away, per second."""
        own = self.preemptions_per_node_hour
        return (own if own is not None else SPOT_PREEMPTIONS_PER_NODE_HOUR * (self.purchase == "spot")) / 3600

    @property
    def availability(self) -> float:
        """Share of the time that a node is there."""
        return 1.0 / (1.0 + self.preemptions_per_s * self.replacement_s)

    def broken_rules(self) -> Iterator[Broken]:
        low, high = self.replicas_min, self.replicas_max
        if low > high:
            yield (
                "replicas_min",
                low,
                f"must not exceed replicas_max, which is {high}",
                "Lower it or raise replicas_max.",
            )
        elif self.replicas is not None and not low <= self.replicas <= high:
            yield "replicas", self.replicas, f"must lie between replicas_min and replicas_max, {low} to {high}", ""


Share = Annotated[float, Field(ge=0, le=1)]

Pixels = Annotated[int, Field(ge=64, le=16384, multiple_of=8)]

Sampler = Literal["ddim", "euler", "dpmsolver", "dpmsolver++", "unipc", "pndm", "lcm"]

ALL = "all"
"""The row of a summary over every request class; no class may have this name."""


class ArrivalSpec(Written):
    """When requests of a class arrive."""

    process: Literal["poisson", "gamma", "constant", "daily", "trace", "gentd26"]
    """Arrival process: gamma comes in bursts, constant is evenly spaced, daily has a day-night cycle."""
    rate_per_s: Positive | None = None
    """Mean requests a second. Null is for trace and gentd26 only: the trace's own rate."""
    cv: Positive = 1.0
    """Coefficient of variation of the gaps, for gamma: 1 is Poisson, above 1 comes in bursts."""
    peak_to_mean: Annotated[float, Field(ge=1, le=24)] = 2.0
    """Rate of the busiest moment over the mean rate, for daily."""
    path: Text | None = None
    """File of the trace, relative to the scenario's file. Null with gentd26 means the shipped generator."""
    time_scale: Positive = 1.0
    """Factor on every gap of a trace or of gentd26: 0.01 plays it a hundred times as fast."""

    def broken_rules(self) -> Iterator[Broken]:
        if self.process == "trace" and self.path is None:
            yield "path", None, "must name a file when process is trace", "Give the path of a trace."
        if self.process not in ("trace", "gentd26") and self.rate_per_s is None:
            yield "rate_per_s", None, f"must be a number when process is {self.process}", "Give requests a second."
        for key, processes in READ_BY.items():
            value = getattr(self, key)
            if self.process not in processes and value != type(self).model_fields[key].default:
                rule = f"is for {' and '.join(processes)} only, and process is {self.process}"
                yield key, value, rule, "Remove it, or choose another process."


READ_BY: Mapping[str, tuple[str, ...]] = {
    "cv": ("gamma",),
    "peak_to_mean": ("daily",),
    "path": ("trace", "gentd26"),
    "time_scale": ("trace", "gentd26"),
}
"""The keys of arrivals that only some processes read."""


class RequestClass(Written):
    """Requests of one kind: where they come from, what they ask for, and what they are promised."""

    origin: Name
    """Edge fleet whose users ask."""
    model: Text
    """Large model of the catalogue, run in the cloud (for example sd14)."""
    small_models: tuple[Text, ...] = ()
    """Small models that may finish at the edge after a switch step, or do everything there."""
    height_px: Pixels
    """Height of the image in pixels, a multiple of 8."""
    width_px: Pixels
    """Width of the image in pixels, a multiple of 8."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)]
    """Denoising steps of one image."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    """Classifier-free guidance; above 1 every step evaluates the UNet twice."""
    num_images: Annotated[int, Field(ge=1, le=64)] = 1
    """Images a request."""
    sampler: Sampler = "ddim"
    """Noise sampler; multistep samplers hand over their history at a switch step."""
    arrivals: ArrivalSpec
    """When requests arrive."""
    slo_s: Positive | None = None
    """Promised seconds from arrival to image; null promises nothing."""
    slo_percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    """Per cent of the requests that must keep the promise."""
    quality_floor: Share | None = None
    """Lowest CLIP score accepted, 0 to 1; null accepts any, also an unknown one."""
    edge_energy_j: Positive | None = None
    """Most joules that one image may take from the user's device; null for no limit."""
    usd_per_image: Positive | None = None
    """Most dollars that one image may cost; null for no limit."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Higher goes first in pools with the discipline edf; other disciplines do not look at it."""


class Budget(Written):
    """What the whole scenario may spend; null is no limit."""

    usd_per_hour: Positive | None = None
    """Most dollars an hour for all pools together."""
    usd_per_image: Positive | None = None
    """Most dollars of rent an image, averaged over all request classes."""
    edge_energy_j_per_image: Positive | None = None
    """Most joules an image from any user's device."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    """Probability with which a plan must hold, over the intervals of modelled step costs; null takes the medians."""


class Search(Written):
    """What the optimiser may choose from."""

    minimise: Literal["usd_per_hour", "latency_p95_s", "quality_loss", "turned_away_per_s"] = "usd_per_hour"
    """What a plan makes as small as it can while keeping every promise; turned_away_per_s serves all it can in time."""
    switch_steps: tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None = None
    """Switch steps to try; null tries every fifth. Edge-only and cloud-only are always tried."""
    methods: Annotated[tuple[Text, ...], Field(min_length=1)] = ("single",)
    """Parallel methods to try: single, cfg_parallel, distrifusion, pcpp, asyncdiff."""
    degrees: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)] = (1,)
    """Numbers of GPUs for one request to try."""
    options: Entries[Entries[Annotated[tuple[bool | int | float | str, ...], Field(min_length=1)]]] = Field(
        default_factory=dict
    )
    """Values of each method's own options to try, as lists: `asyncdiff: {stride: [1, 2]}`."""
    batch_caps: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)] = (1,)
    """Most requests that one worker group denoises together, to try; always waiting ones of the same class and plan."""
    vaes: Annotated[tuple[Text, ...], Field(min_length=1)] = ("autoencoder-kl",)
    """Image decoders to try: autoencoder-kl, taesd."""
    policies: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        "cloud_only",
        "edge_only",
        "static_switch",
        "cost_aware",
    )
    """Policies that simulate compares."""
    replications_max: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Most replications of a plan whose promises are undecided; null means four times `replications`."""
    static_switch: Share = 0.4
    """Share of the steps that static_switch leaves to the cloud; 0.4 is Hybrid SD's published 10 of 25."""
    profiles: tuple[Text, ...] = ()
    """Folders of your own cost rows, as the executors write them; they replace shipped rows that timed the same."""
    prefer_sources: tuple[Text, ...] = ()
    """Sources of cost rows to prefer where several disagree, best first."""


class Scenario(Written):
    """A resolved scenario: who asks for what, on which devices and pools, under which promises and limits."""

    name: Name
    """Name of the scenario."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Root of every random stream; the same seed gives the same bytes."""
    horizon_s: Positive
    """Simulated seconds of one replication, warm-up included."""
    warmup_s: NonNegative = 0.0
    """Seconds at the start whose requests are simulated and not counted."""
    replications: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Independent repetitions, for the confidence intervals."""
    requests: Annotated[Entries[RequestClass], Field(min_length=1)]
    """Request classes by name."""
    edge: Annotated[Entries[EdgeFleet], Field(min_length=1)]
    """Edge fleets by name."""
    pools: Entries[Pool] = Field(default_factory=dict)
    """Cloud pools by name."""
    budget: Budget = Budget()
    """Limits on money and energy."""
    search: Search = Search()
    """The search space of the optimiser."""
    overrides_applied: tuple[str, ...] = ()
    """Every change to the base, in order, as `key: old -> new`. Written when the scenario is resolved."""

    def broken_rules(self) -> Iterator[Broken]:
        if self.warmup_s >= self.horizon_s:
            yield "warmup_s", self.warmup_s, f"must be shorter than horizon_s, {self.horizon_s:g}", ""
        yield from class_problems({name: spec.origin for name, spec in self.requests.items()}, self.edge)

    @cached_property
    def promises(self) -> Mapping[str, Promises]:
        """What every request class is promised, with the tighter of its own limits and the budget's."""
        return {
            name: Promises(
                slo_s=spec.slo_s,
                slo_percentile=spec.slo_percentile,
                quality_floor=spec.quality_floor,
                edge_energy_j=tightest(spec.edge_energy_j, self.budget.edge_energy_j_per_image),
                usd=spec.usd_per_image,
            )
            for name, spec in self.requests.items()
        }

    @classmethod
    def known_keys(cls) -> list[str]:
        return [key for key in (*cls.model_fields, *Blocks.model_fields) if key != "overrides_applied"]

    def to_dict(self) -> dict[str, Any]:
        """The resolved scenario as plain data: every default written out, lists for tuples."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that shapes a result; the same whichever way the scenario was resolved."""
        content = {key: value for key, value in self.to_dict().items() if key != "overrides_applied"}
        return sha256(json.dumps(content, separators=(",", ":"), allow_nan=False).encode()).hexdigest()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Scenario:
        """A changed copy, validated as a whole; keys nested or dotted, values as they are. Raises `InputError`."""
        reading = Reading(self.name, call="with_overrides", lines={"": 0})
        data = self.to_dict()
        changes = json.loads(json.dumps(overrides, default=plain))
        data["overrides_applied"] += apply_changes(reading, data, changes, reading.call, known=entries(data, [changes]))
        return reading.finish(reading.check(Scenario, data))


def scenario_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario's file, so that editors complete and check it."""
    schema = Scenario.model_json_schema()
    blocks = Blocks.model_json_schema()["properties"]
    del schema["properties"]["overrides_applied"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hybridsd_sim scenario"}
    return {**head, **schema, "title": head["title"], "properties": {**schema["properties"], **blocks}}


def class_problems(origins: Mapping[str, Any], fleets: Collection[str]) -> Iterator[Broken]:
    """What is wrong with request classes beyond their own keys, from their names and origins."""
    if ALL in origins:
        rule = "must not be a class's name, because the summary's row over every class has it"
        yield f"requests.{ALL}", ALL, rule, "Give the class another name."
    for name, origin in origins.items():
        if isinstance(origin, str) and origin not in fleets:
            remedy = unknown_name("", origin, list(fleets)).remedy
            yield f"requests.{name}.origin", origin, "must name an edge fleet of this scenario", remedy
