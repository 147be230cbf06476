"""One request, one plan, nobody else there: from plain names and numbers to a price with its sources.

What `hybridsd-sim predict` asks. With `--measured-step-s` the user's own one-GPU step joins the profiles as a measured
row that goes before all others, and everything else is predicted from it.

A plan with several GPUs is also compared with the same on one. Exchange takes the longer the slower the interconnect,
so that below some bandwidth a worker group is slower than one of its GPUs (DistriFusion on PCIe may be). That bandwidth
is found by bisection over `price`. What every message costs besides its bytes stays, so that a group may also lose at
any.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log
from typing import Any

from hybridsd_sim.errors import IllegalPlanError, InputError, Problem
from hybridsd_sim.perf import METHODS, actual_link, find_method
from hybridsd_sim.plan import Options, Plan, Request, Site, Stage
from hybridsd_sim.pricing.pricer import Part, PlanCost, price
from hybridsd_sim.pricing.search_space import plan_problems
from hybridsd_sim.profiles import CostRow, Gpu, Interconnect, Profiles

CLOUD, EDGE = "cloud", "edge"

OWN_STEP = "--measured-step-s"

MOST_GPUS, MOST_PX, MOST_STEPS, MOST_GUIDANCE, MOST_IMAGES = 64, 16384, 1000, 100, 64
"""The largest values that a scenario takes too."""

BANDWIDTH_STEP = 1.01
"""Bandwidths are tried this factor apart, so that the break-even one is known to 1%."""

SLOWEST, FASTEST = 1e-3, 1e6
"""Shares of the interconnect's own bandwidth between which they are tried; the fastest stands for infinity."""

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionQuery:
    """The question: a model on a GPU, perhaps handed over to a small model on an edge device.

    Without an edge device the small model runs on the cloud's GPU, as in the papers; without a network no transfer is
    counted. One side of the image alone means a square; none means the model's native size. `num_images` are denoised
    together.
    """

    model: str
    gpu: str
    interconnect: str | None = None
    method: str = "single"
    degree: int = 1
    options: Options = ()
    small_model: str | None = None
    switch_step: int | None = None
    edge_device: str | None = None
    network: str | None = None
    height_px: int | None = None
    width_px: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    num_images: int = 1
    measured_step_s: float | None = None
    runtime: str = "eager"


@dataclass(frozen=True, slots=True)
class BreakEven:
    """A plan compared with the same on one GPU.

    `speedup` is one GPU's `denoise_s` over the plan's. From `bandwidth_bytes_per_s` up the plan is no slower: 0 where
    it is the faster even at `SLOWEST` of its interconnect's bandwidth, infinite where it is the slower at any. The 90%
    intervals are those of the plan's own time; one GPU's is taken as it stands, since both share the device's errors.
    """

    speedup: float
    speedup_interval: Pair
    bandwidth_bytes_per_s: float
    bandwidth_interval: Pair
    sentence: str


def predict_plan(query: PredictionQuery, profiles: Profiles) -> dict[str, Any]:
    """What `predict` prints: the figures of `to_json`, then the plan against the same on one GPU.

    `against_one_gpu` says in words what `speedup` and `break_even_bandwidth_bytes_per_s` are, and why there is no such
    bandwidth where that is None; all of them are None on one GPU. Raises `InputError` as `predict_cost` does.
    """
    known, cost = _resolve(query, profiles)
    found = compare_with_one_gpu(cost, known, prefer=(OWN_STEP,))
    keys = ("speedup", "speedup_interval", "break_even_bandwidth_bytes_per_s", "break_even_interval_bytes_per_s")
    if found is None:
        return to_json(cost) | dict.fromkeys((*keys, "against_one_gpu"))
    # A bandwidth of nothing or of infinity is one that no interconnect has.
    bandwidths = (found.bandwidth_bytes_per_s, *found.bandwidth_interval)
    even, *interval = (value if 0 < value < math.inf else None for value in bandwidths)
    figures = (found.speedup, list(found.speedup_interval), even, interval)
    return to_json(cost) | dict(zip(keys, figures, strict=True)) | {"against_one_gpu": found.sentence}


def predict_cost(query: PredictionQuery, profiles: Profiles) -> PlanCost:
    """The price of the asked plan. Raises `InputError` with everything that is wrong with the question."""
    return _resolve(query, profiles)[1]


def _resolve(query: PredictionQuery, profiles: Profiles) -> tuple[Profiles, PlanCost]:
    """The profiles with the user's own measurement, and the price by them."""
    profiles = _with_own_gpu(query, profiles)
    _check_query(query, profiles)
    native = profiles.model(query.model).native_px
    request = Request(
        model=query.model,
        height_px=query.height_px or query.width_px or native,
        width_px=query.width_px or query.height_px or native,
        num_inference_steps=query.num_inference_steps,
        guidance_scale=query.guidance_scale,
        num_images=query.num_images,
    )
    if query.measured_step_s is not None:
        # One guided step of one image, whatever the request's own guidance and images.
        own = CostRow(
            device=query.gpu, runtime=query.runtime, precision="fp16", model=query.model, component="step",
            height_px=request.height_px, width_px=request.width_px, batch_size=1, guidance=True, method="single",
            degree=1, seconds_median=query.measured_step_s, kind="measured", source=OWN_STEP, source_date="now",
        )  # fmt: skip
        profiles = profiles.with_costs((own,))
    try:
        return profiles, _priced(plan_of(query, profiles), request, profiles)
    except InputError as error:
        raise type(error)(_at_flag(problem, query) for problem in error.problems) from None


def _with_own_gpu(query: PredictionQuery, profiles: Profiles) -> Profiles:
    """The profiles and, where a step was measured on a GPU that they lack, that GPU: its memory and price unknown."""
    if query.measured_step_s is None or query.gpu in profiles.gpus:
        return profiles
    if query.interconnect is None and query.degree > 1:
        rule = f"the catalogue does not have {query.gpu} and what joins several of it"
        raise InputError(Problem("--interconnect", "not given", rule, f"One of {', '.join(profiles.interconnects)}."))
    own = Gpu(
        name=query.gpu, label=query.gpu, default_interconnect=query.interconnect or next(iter(profiles.interconnects)),
        usable_memory_fraction=1.0, kind="modelled", source=OWN_STEP, source_date="now",
    )  # fmt: skip
    return replace(profiles, gpus={**profiles.gpus, query.gpu: own})


def _priced(plan: Plan, request: Request, profiles: Profiles) -> PlanCost:
    if problems := plan_problems(plan, request, profiles):
        raise IllegalPlanError(problems)
    return price(plan, request, profiles, prefer=(OWN_STEP,))


def _at_flag(problem: Problem, query: PredictionQuery) -> Problem:
    """The problem at the option of the command line that the rule's place stands for."""
    place = problem.place
    flags = {query.small_model: "--small-model", f"memory of {CLOUD}": "--gpu", f"memory of {EDGE}": "--edge-device"}
    if place in {"degree", "guidance_scale", "height_px", "width_px"}:
        place = f"--{place.replace('_', '-')}"
    elif place in find_method(query.method).defaults:
        place = f"--option {place}"
    elif place == "device":
        place = "--edge-device" if problem.value == query.edge_device else "--gpu"
    place = flags.get(place, place)
    return replace(problem, place=place, remedy=problem.remedy or f"Choose another {place}.")


def plan_of(query: PredictionQuery, profiles: Profiles) -> Plan:
    """The plan in question: cloud-only, hybrid, or edge-only at switch step 0."""
    steps = query.num_inference_steps
    switch = steps if query.switch_step is None else query.switch_step
    cloud = Site(
        name=CLOUD, tier="cloud", device=query.gpu, runtime=query.runtime, gpus_per_node=query.degree,
        interconnect=query.interconnect,
    )  # fmt: skip
    stages = []
    if switch > 0:
        spread = Stage(start=0, stop=switch, model=query.model, site=cloud, method=query.method, degree=query.degree)
        stages.append(replace(spread, options=query.options))
    if switch < steps:
        site = cloud
        if query.edge_device is not None:
            device = profiles.edge_device(query.edge_device)
            runtime, precision = device.default_runtime, device.default_precision
            site = Site(name=EDGE, tier="edge", device=device.name, runtime=runtime, precision=precision)
        stages.append(Stage(start=switch, stop=steps, model=query.small_model or query.model, site=site))
    last = stages[-1].site.name
    return Plan(stages=tuple(stages), text_encode_site=last, vae_site=last, network=query.network)


def _check_query(query: PredictionQuery, profiles: Profiles) -> None:
    """Raise one `InputError` with every unknown name, every number out of range and every option that does not fit."""
    problems: list[Problem] = []
    looked_up = [
        ("--model", profiles.model, query.model),
        ("--gpu", profiles.gpu, query.gpu),
        ("--interconnect", profiles.interconnect, query.interconnect),
        ("--method", find_method, query.method),
        ("--small-model", profiles.model, query.small_model),
        ("--edge-device", profiles.edge_device, query.edge_device),
        ("--network", profiles.network, query.network),
        ("--runtime", profiles.runtime, query.runtime),
    ]
    for flag, look_up, name in looked_up:
        if name is not None:
            try:
                look_up(name)
            except InputError as error:
                problems += [replace(problem, place=flag) for problem in error.problems]
    problems += _number_problems(query)
    if query.method in METHODS:
        for problem in METHODS[query.method].option_problems(dict(query.options)):
            key = problem.place.removeprefix(f"{query.method} option")
            problems.append(replace(problem, place=f"--option{key}"))
    if problems:
        raise InputError(problems)


def _number_problems(query: PredictionQuery) -> Iterator[Problem]:
    steps, switch, small, own = query.num_inference_steps, query.switch_step, query.small_model, query.measured_step_s
    default = "Leave it out for the default."
    for flag, value, low, high in (
        ("--degree", query.degree, 1, MOST_GPUS),
        ("--height-px", query.height_px, 64, MOST_PX),
        ("--width-px", query.width_px, 64, MOST_PX),
        ("--num-inference-steps", steps, 1, MOST_STEPS),
        ("--guidance-scale", query.guidance_scale, 0, MOST_GUIDANCE),
        ("--num-images", query.num_images, 1, MOST_IMAGES),
        ("--switch-step", switch, 0, max(1, steps)),
    ):
        if value is not None and not low <= value <= high:
            yield Problem(flag, str(value), f"must lie between {low} and {high}", default)
    if own is not None and not 0 < own < math.inf:
        yield Problem(OWN_STEP, str(own), "must be a finite number of seconds above 0", default)
    if small is not None and switch is None:
        yield Problem("--small-model", small, "needs a --switch-step", "Give the first step that it does.")
    if small is None and switch is not None and switch != steps:
        yield Problem("--switch-step", str(switch), "needs a --small-model", "Name the model that goes on.")


def to_json(cost: PlanCost) -> dict[str, Any]:
    """What `predict --format json` prints; what nobody knows is None, with the reason by figure under `unknown`.

    `quality` is the CLIP score, `quality_fid` the FID (lower is better); `quality_note` says where the former was not
    published as it stands. Where both are unknown for one reason, `unknown` gives it once, under `quality`. `outside`
    lists the parts that lie outside what was timed; `parts` has every component with kind and sources.
    """
    rounds, clip, fid = sum(stage.num_steps for stage in cost.plan.stages), cost.quality.clip, cost.quality.fid
    one_reason = not clip.known and clip.note == fid.note
    reasons = {
        "usd": [part.unknown for part in cost.parts if part.usd is None],
        "edge_energy_j": [part.unknown for part in cost.parts if part.energy_j is None],
        "quality": [] if clip.known else [clip.note],
        "quality_fid": [] if fid.known or one_reason else [fid.note],
    }
    return {
        "latency_s": cost.latency_s,
        "latency_interval_s": list(cost.latency_interval_s),
        "images": cost.request.num_images,
        "seconds_per_image": cost.latency_s / cost.request.num_images,
        "denoise_s": cost.denoise_s,
        "step_s": cost.denoise_s / rounds,
        "compute_s": cost.compute_s,
        "comm_exposed_s": cost.comm_exposed_s,
        "comm_bytes": cost.comm_bytes,
        "bytes_up": cost.bytes_up,
        "bytes_down": cost.bytes_down,
        "flops": cost.flops,
        "flops_without_attention_products": cost.flops_without_attention_products,
        "gpu_seconds": cost.gpu_seconds,
        "usd": cost.usd,
        "edge_energy_j": cost.edge_energy_j,
        "quality": clip.value_or_none,
        "quality_kind": clip.kind if clip.known else None,
        "quality_interval": clip.interval_or_none,
        "quality_note": clip.note if clip.known else None,
        "quality_fid": fid.value_or_none,
        "quality_fid_interval": fid.interval_or_none,
        "quality_fid_kind": fid.kind if fid.known else None,
        "interval_s": list(cost.interval_s),
        "kind": cost.kind,
        "plan": cost.plan.label,
        "sources": list(dict.fromkeys((*cost.sources, *fid.sources))),
        "unknown": {name: "; ".join(dict.fromkeys(why)) for name, why in reasons.items() if why},
        "outside": list(cost.outside),
        "parts": [_part(part) for part in cost.parts],
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "where": part.where,
        "seconds": part.seconds.value,
        "low_s": part.seconds.low,
        "high_s": part.seconds.high,
        "devices": part.devices,
        "usd": part.usd,
        "edge_energy_j": part.energy_j,
        "bytes_up": part.bytes_up,
        "bytes_down": part.bytes_down,
        "comm_bytes": part.comm_bytes,
        "kind": part.seconds.kind,
        "critical": part.critical,
        "note": part.seconds.note,
        "sources": list(part.seconds.sources),
    }


# ---- Against one GPU ------------------------------------------------------------------------------------------------


def compare_with_one_gpu(cost: PlanCost, profiles: Profiles, *, prefer: Sequence[str] = ()) -> BreakEven | None:
    """What the worker group of a priced plan is worth; None for a plan of one GPU.

    `profiles` and `prefer` are those that the plan was priced with.
    """
    group = max(cost.plan.stages, key=lambda stage: stage.degree)
    if group.degree == 1:
        return None
    alone = tuple(replace(stage, method="single", degree=1, options=()) for stage in cost.plan.stages)
    one_s = price(replace(cost.plan, stages=alone), cost.request, profiles, prefer=prefer).denoise_s
    name = group.site.interconnect or profiles.default_interconnect(group.site.device)
    link = actual_link(profiles, name, group.degree)
    bandwidths = _Bandwidths(cost, profiles, prefer, link)
    even = bandwidths.first_within(lambda tried: tried.denoise_s, one_s)
    interval = (
        bandwidths.first_within(lambda tried: tried.interval_s[0], one_s),
        bandwidths.first_within(lambda tried: tried.interval_s[1], one_s),
    )
    low_s, high_s = cost.interval_s
    speedup = one_s / cost.denoise_s
    how = "slower than one GPU" if speedup < 1 else f"{speedup:.3g} times as fast as one GPU"
    if even == 0:
        why = f"it would be the faster even at 1/{1 / SLOWEST:g} of the bandwidth"
    elif even == inf:
        why = "no bandwidth would make it the faster"
    else:
        why = f"it pays from {even / 1e9:.3g} GB/s up, and {link.name} has {link.bandwidth_bytes_per_s / 1e9:.3g}"
    return BreakEven(
        speedup=speedup,
        speedup_interval=(one_s / high_s, one_s / low_s),
        bandwidth_bytes_per_s=even,
        bandwidth_interval=interval,
        sentence=f"On {link.name} {group.method} x{group.degree} is {how}; {why}.",
    )


class _Bandwidths:
    """An interconnect at other bandwidths, slowest first, alike in all else; one set of profiles holds them all."""

    def __init__(self, cost: PlanCost, profiles: Profiles, prefer: Sequence[str], link: Interconnect) -> None:
        self._cost, self._prefer = cost, prefer
        self._links: list[Interconnect] = []
        for index in range(ceil(log(FASTEST / SLOWEST, BANDWIDTH_STEP)) + 1):
            share = SLOWEST * BANDWIDTH_STEP**index
            keys = ("bandwidth_bytes_per_s", "bandwidth_low", "bandwidth_high")
            rates = {key: getattr(link, key) * share for key in keys}
            named = {"name": f"{link.name} x {share!r}", "beyond_pairs": None}
            self._links.append(link.model_copy(update=named | rates))
        known = {**profiles.interconnects, **{link.name: link for link in self._links}}
        self._profiles = replace(profiles, interconnects=known)
        self._tried: dict[str, PlanCost] = {}

    def first_within(self, seconds: Callable[[PlanCost], float], at_most: float) -> float:
        """The bandwidth from which a figure that falls with it is at most that: 0 below all of them, inf above.

        Where an interval has a kink, because an exchange begins to hide, it is one of the crossings.
        """
        index = bisect_left(self._links, -at_most, key=lambda tried: -seconds(self._priced(tried)))
        if index == 0:
            return 0.0
        return inf if index == len(self._links) else self._links[index].bandwidth_bytes_per_s

    def _priced(self, link: Interconnect) -> PlanCost:
        if link.name not in self._tried:
            stages = (
                replace(stage, site=replace(stage.site, interconnect=link.name)) for stage in self._cost.plan.stages
            )
            plan = replace(self._cost.plan, stages=tuple(stages))
            self._tried[link.name] = price(plan, self._cost.request, self._profiles, prefer=self._prefer)
        return self._tried[link.name]
