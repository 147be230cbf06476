"""Request, Promises, Stage, Plan, Deployment: what is asked for and how it is carried out.

A plan is a tuple of stages; a stage is a half-open run of denoising steps `[start, stop)` done by one model, at one
site, with one parallel method at one degree. Cloud-only, edge-only, Hybrid SD at switch step k, and any of them with a
parallel cloud stage are the same type. A plan names everything needed to price it and checks its own consistency; what
it costs and whether it is legal on a device is for `pricing` to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hybridsd_sim.errors import IllegalPlanError, Problem

Tier = Literal["edge", "cloud"]

Options = tuple[tuple[str, bool | int | float | str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one user asks for: a picture (or several), how it is denoised, and what is promised about it.

    `guidance_scale` above 1 means classifier-free guidance: two UNet evaluations a step. `slo_s` is counted from
    arrival to image. `quality_floor` is a CLIP score in 0..1; None promises nothing. The embedded scheduler takes None
    as the class's own, and another `slo_s` for the deadline of this request alone: whether a plan is fast enough on an
    idle fleet, which static policies choose by, is judged by the SLO of its class.
    """

    model: str
    height_px: int = 512
    width_px: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    num_images: int = 1
    sampler: str = "ddim"
    request_class: str = "request"
    slo_s: float | None = None
    quality_floor: float | None = None
    priority: int = 0

    @property
    def guided(self) -> bool:
        """Whether every step evaluates the UNet for the prompt and for the empty prompt."""
        return self.guidance_scale > 1.0

    @property
    def unet_batch(self) -> int:
        """Latents per UNet call: images, doubled by classifier-free guidance."""
        return self.num_images * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What a request class is promised; None is no promise, here as in scenarios, requests and reports.

    `slo_percentile` per cent of the requests have their image `slo_s` seconds after their arrival, of a CLIP score in
    0..1 of at least `quality_floor`. One image takes at most `edge_energy_j` joules from the user's device and costs at
    most `usd` dollars. Where the budget limits the joules of an image too, the tighter of both counts. A moment by
    which something is due is a number: infinite where nothing is promised.
    """

    slo_s: float | None = None
    slo_percentile: float = 95.0
    quality_floor: float | None = None
    edge_energy_j: float | None = None
    usd: float | None = None

    @property
    def slo_share(self) -> float:
        """The share of the requests that must be in time, 0 to 1."""
        return self.slo_percentile / 100.0

    def deadline_s(self, arrival_s: float = 0.0) -> float:
        """When the image of a request that arrives then is due; infinite without an SLO."""
        return deadline_of(arrival_s, self.slo_s)

    def in_time(self, latency_s: float) -> bool:
        """Whether a request of this latency keeps the SLO."""
        return self.slo_s is None or latency_s <= self.slo_s

    def meets_floor(self, quality: float | None) -> bool:
        """Whether a CLIP score reaches the floor, which an unknown one never does."""
        return self.quality_floor is None or (quality is not None and quality >= self.quality_floor)

    def within_limits(self, edge_energy_j: float | None, usd: float | None) -> bool:
        """Whether the joules and dollars of one image keep their limits, which unknown ones never do."""
        return _at_most(edge_energy_j, self.edge_energy_j) and _at_most(usd, self.usd)

    def asked_by(self, request: Request) -> Promises:
        """The promises of the class with the request's own SLO and quality floor in place of the class's."""
        if (self.slo_s, self.quality_floor) == (request.slo_s, request.quality_floor):
            return self
        return replace(self, slo_s=request.slo_s, quality_floor=request.quality_floor)


def deadline_of(arrival_s: float, slo_s: float | None) -> float:
    """When an image is due that was asked for at `arrival_s` under an SLO; infinite without one."""
    return math.inf if slo_s is None else arrival_s + slo_s


def tightest(*limits: float | None) -> float | None:
    """The smallest of some limits, None being no limit; None without any."""
    return min((limit for limit in limits if limit is not None), default=None)


def _at_most(figure: float | None, limit: float | None) -> bool:
    return limit is None or (figure is not None and figure <= limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place where components run: one edge device, or one node of a cloud pool.

    `device` names an edge device or a GPU of the catalogue. `usd_per_device_hour` None lets the profiles' default price
    for `purchase` decide; edge devices that users own cost nothing. `power_w` replaces the catalogue's power of an edge
    device.
    """

    name: str
    tier: Tier
    device: str
    runtime: str = "eager"
    precision: str = "fp16"
    gpus_per_node: int = 1
    interconnect: str | None = None
    purchase: str = "on_demand"
    provider: str | None = None
    usd_per_device_hour: float | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous run of denoising steps `[start, stop)` by one model at one site, with one method at one degree.

    `degree` is the number of GPUs. `options` are the method's own, sorted by key (`stride`, `partial`, `warmup_steps`,
    `sync_mode`, `guidance_split`).
    """

    start: int
    stop: int
    model: str
    site: Site
    method: str = "single"
    degree: int = 1
    options: Options = ()

    @property
    def num_steps(self) -> int:
        return self.stop - self.start

    def option(self, key: str, default: Any) -> Any:
        return dict(self.options).get(key, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where every component of a request runs: the stages in order, and the sites of the text encoder and the VAE.

    `text_encode_site` and `vae_site` name the site of one of the stages or of `extra_sites`. `network` is the class of
    the access network between the user's edge and the cloud; None leaves transfers out (a measurement inside one
    machine room). `batch_cap` is the most requests of this plan that one worker group of the pool denoises
    together: those that wait when it becomes free, never waiting for more. Raises `IllegalPlanError` with every rule
    that it breaks.
    """

    stages: tuple[Stage, ...]
    text_encode_site: str
    vae_site: str
    vae: str = "autoencoder-kl"
    network: str | None = None
    extra_sites: tuple[Site, ...] = field(default=())
    batch_cap: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not self.stages:
            problems.append(Problem("plan.stages", "()", "a plan needs at least one stage"))
        elif self.batch_cap < 1 or (self.batch_cap > 1 and not self.cloud_stages):
            rule = "must be at least 1, and 1 without a cloud stage"
            problems.append(Problem("plan.batch_cap", str(self.batch_cap), rule))
        expected = 0
        for index, stage in enumerate(self.stages):
            if stage.start != expected or stage.stop <= stage.start:
                rule = f"stages must be non-empty and follow one another; this one must start at {expected}"
                problems.append(Problem(f"plan.stages[{index}]", f"[{stage.start}, {stage.stop})", rule))
            expected = stage.stop
        known = self.sites
        for key, name in (("text_encode_site", self.text_encode_site), ("vae_site", self.vae_site)):
            if name not in known:
                rule, remedy = "must name a site of the plan", f"Sites: {', '.join(known)}."
                problems.append(Problem(f"plan.{key}", repr(name), rule, remedy))
        if problems:
            raise IllegalPlanError(problems)

    @property
    def sites(self) -> dict[str, Site]:
        """Every site of the plan by name, in the order of the stages."""
        return {site.name: site for site in (*(stage.site for stage in self.stages), *self.extra_sites)}

    @property
    def num_inference_steps(self) -> int:
        return self.stages[-1].stop

    @property
    def cloud_stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.site.tier == "cloud")

    @property
    def edge_stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.site.tier == "edge")

    @property
    def switch_step(self) -> int:
        """Index of the first step done at the edge: 0 is edge-only, `num_inference_steps` is cloud-only."""
        return next((stage.start for stage in self.stages if stage.site.tier == "edge"), self.num_inference_steps)

    @property
    def without_step_count(self) -> tuple[object, ...]:
        """What stays the same when a plan is scaled to another number of steps: models, sites, methods, degrees."""
        stages = tuple((stage.model, stage.site, stage.method, stage.degree, stage.options) for stage in self.stages)
        return stages, self.text_encode_site, self.vae_site, self.vae, self.network, self.batch_cap

    @property
    def label(self) -> str:
        """A short name that a person can read: `sd14 on a100 distrifusion x4 [0,10) -> small-sd on phone [10,25)`.

        The steps of a stage stand there where the plan has several, a batch cap above 1 and a decoder that is not the
        model's own, or not where the last stage ran, behind all stages.
        """
        stages = []
        for stage in self.stages:
            how = "" if stage.degree == 1 else f" {stage.method} x{stage.degree}"
            options = "".join(f" {key}={value}" for key, value in stage.options)
            steps = f" [{stage.start},{stage.stop})" if len(self.stages) > 1 else ""
            stages.append(f"{stage.model} on {stage.site.name}{how}{options}{steps}")
        decoded = "" if self.vae_site == self.stages[-1].site.name else f", decoded on {self.vae_site}"
        batched = "" if self.batch_cap == 1 else f", up to {self.batch_cap} together"
        vae = "" if self.vae == "autoencoder-kl" else f" + {self.vae}"
        return f"{' -> '.join(stages)}{batched}{decoded}{vae}"

    def rescaled(self, steps: int) -> Plan:
        """The same plan for another number of steps: switch steps keep their share, and every stage keeps a step."""
        count = len(self.stages)
        bounds = [round(stage.start * steps / self.num_inference_steps) for stage in self.stages] + [steps]
        for index in range(1, count):
            bounds[index] = min(max(bounds[index], bounds[index - 1] + 1), steps - count + index)
        stages = [replace(s, start=bounds[i], stop=bounds[i + 1]) for i, s in enumerate(self.stages)]
        return replace(self, stages=tuple(stages))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON and YAML; `plan_from_dict` reads it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a class's requests, 0 to 1, and the plan that serves it."""

    share: float
    plan: Plan


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is rented and how each class is served: nodes per pool, a mix of plans per class. Written as `plan.yaml`.

    The shares of a class add up to at most 1; what is missing to 1 is turned away, so that the rest is served in time.
    """

    replicas: Mapping[str, int]
    plans: Mapping[str, tuple[Share, ...]]

    @classmethod
    def pure(cls, replicas: Mapping[str, int], plans: Mapping[str, Plan]) -> Deployment:
        """The deployment in which every class has one plan."""
        return cls(dict(replicas), {name: (Share(1.0, plan),) for name, plan in plans.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML; `deployment_from_dict` reads it back."""
        plans = {
            name: [{"share": part.share, "plan": part.plan.to_dict()} for part in mix]
            for name, mix in self.plans.items()
        }
        return {"replicas": dict(self.replicas), "plans": plans}


def deployment_from_dict(data: Mapping[str, Any]) -> Deployment:
    """Read back what `Deployment.to_dict` wrote."""
    plans = {
        name: tuple(Share(part["share"], plan_from_dict(part["plan"])) for part in mix)
        for name, mix in data["plans"].items()
    }
    return Deployment(dict(data["replicas"]), plans)


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """Read back what `Plan.to_dict` wrote (lists for tuples allowed). Raises `IllegalPlanError` as `Plan` does."""
    stages = []
    for stage in data["stages"]:
        options = tuple((key, value) for key, value in stage.get("options", ()))
        stages.append(Stage(**{**stage, "site": Site(**stage["site"]), "options": options}))
    extra = tuple(Site(**site) for site in data.get("extra_sites", ()))
    rest = {key: data[key] for key in ("text_encode_site", "vae_site", "vae", "network", "batch_cap") if key in data}
    return Plan(stages=tuple(stages), extra_sites=extra, **rest)
