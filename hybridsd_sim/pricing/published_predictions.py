"""What the model says about a published or measured figure: the plan behind the figure, priced.

A cost row of one device is answered by the device's fit, never by the row itself; one of several devices by the price
of its plan, without the rows that timed such worker groups as a whole. Every other quantity that somebody published has
its function in `QUANTITIES`, by the name in the column `quantity` of `profiles/published/*.csv`: to predict a new one,
write the function and add it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from math import exp, hypot, log
from operator import attrgetter

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.estimate import Estimate
from hybridsd_sim.perf import denoising, find_method, fitted_component_time, fitted_step_time, timed_stage
from hybridsd_sim.plan import Plan, Request, Site, Stage, Tier
from hybridsd_sim.pricing.pricer import PlanCost, plan_flops, price
from hybridsd_sim.profiles import CostRow, Profiles, PublishedRow, timing_kind
from hybridsd_sim.scenario import read_scalar

ACTIVATION_BYTES = 2
"""Of an element that travels, in fp16."""

GUIDED, UNGUIDED = 7.5, 1.0

STEPS_OF_A_RUN = 21
"""Steps of the run of which one step is looked at: one synchronous, and an even number of steady ones."""


def ratio(above: Estimate, below: Estimate) -> Estimate:
    """The ratio of two figures whose errors are taken to be independent; without an interval unless both have one."""
    middle = above.value / below.value
    if above.interval_or_none is None or below.interval_or_none is None:
        return Estimate(middle)
    low = hypot(log(above.value / above.low), log(below.high / below.value))
    high = hypot(log(above.high / above.value), log(below.value / below.low))
    return Estimate(middle, middle * exp(-low), middle * exp(high))


def predict_cost_row(row: CostRow, profiles: Profiles) -> Estimate:
    """Seconds of a timed row. Raises `InputError` where no fit reaches: unknown devices, plans that are not legal."""
    what = timing_kind(row)
    if what == "one_gpu":
        return _fitted_time(row, profiles)
    if what == "multi_gpu":
        return _multi_gpu_step(row, _without_group_times(profiles))
    if what == "exchange":  # the seconds of one steady round that compute does not hide
        known = _without_group_times(profiles)
        stage, request = timed_stage(row.model_copy(update={"guidance": True}))
        phases = find_method(row.method).phases(denoising(stage, request, known), row.degree, dict(stage.options))
        rounds = sum(phase.rounds for phase in phases if phase.name == "steady")
        return Estimate(_price_of(stage, request, known).comm_exposed_s / rounds)
    raise InputError(Problem("component", row.component, "is not a time that a law predicts"))


def predict_figure(row: PublishedRow, profiles: Profiles) -> Estimate:
    """A published figure that is no cost row. Raises `InputError` for quantities without a function, and as above."""
    if row.quantity not in QUANTITIES:
        raise InputError(unknown_name("quantity", row.quantity, list(QUANTITIES)))
    return QUANTITIES[row.quantity](row, profiles)


def _fitted_time(row: CostRow, profiles: Profiles) -> Estimate:
    if row.component == "step":
        return fitted_step_time(row, profiles)
    where = (profiles, row.device, row.runtime, row.precision)
    return row.batch_size * fitted_component_time(*where, row.model, (row.height_px, row.width_px))


# ---- Cost rows of several devices -----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _without_group_times(profiles: Profiles) -> Profiles:
    """The profiles without measured steps of whole worker groups, which a price would repeat; no fit rests on them.

    Made once for each profiles, so that devices are not fitted again for every row.
    """
    return profiles.without(_is_group_time) if any(map(_is_group_time, profiles.costs)) else profiles


def _is_group_time(row: CostRow) -> bool:
    return row.kind == "measured" and row.degree > 1 and row.component in {"step", "step_warmup"}


def _multi_gpu_step(row: CostRow, profiles: Profiles) -> Estimate:
    """The average step of a run where the row says how many steps it had, else one step of the row's phase."""
    if "num_inference_steps" in read_options(row.options):
        cost = _price_of(*timed_stage(row), profiles)
        return _per_step(Estimate(cost.denoise_s, *cost.interval_s), cost.plan.num_inference_steps)
    # A run that has the row's step: one synchronous step, where the method has those, and steady ones.
    stage, request = timed_stage(row)
    options = dict(stage.options)
    if "warmup_steps" in find_method(row.method).defaults:
        options["warmup_steps"] = 1
    stage = replace(stage, stop=STEPS_OF_A_RUN, options=tuple(sorted(options.items())))
    cost = _price_of(stage, replace(request, num_inference_steps=STEPS_OF_A_RUN), profiles)
    name = "denoise_warmup" if row.component == "step_warmup" else "denoise"
    part = next((part for part in cost.parts if part.name == name), None)
    if part is None:
        raise InputError(Problem("component", row.component, f"{row.method} has no such step"))
    count = 1 if name == "denoise_warmup" else stage.num_steps - int(stage.option("warmup_steps", 0))
    return _per_step(part.seconds, count)


def _per_step(seconds: Estimate, steps: int) -> Estimate:
    return Estimate(seconds.value / steps, seconds.low / steps, seconds.high / steps)


def _price_of(stage: Stage, request: Request, profiles: Profiles) -> PlanCost:
    site = stage.site.name
    return price(Plan(stages=(stage,), text_encode_site=site, vae_site=site), request, profiles)


def read_options(text: str) -> dict[str, bool | float | str]:
    """The options of a row, `key=value` with `;` between, as typed values."""
    pairs = (pair.partition("=") for pair in text.split(";") if pair)
    return {key: value if (value := read_scalar(part)) is not None else "" for key, _, part in pairs}


# ---- Published figures that are no cost rows ------------------------------------------------------------------------


def _request(row: PublishedRow, side_px: int) -> Request:
    return Request(
        model=row.model,
        height_px=side_px,
        width_px=side_px,
        num_inference_steps=row.num_inference_steps,
        guidance_scale=GUIDED if row.guidance else UNGUIDED,
        num_images=row.batch_size,
    )


def _plan(row: PublishedRow, *, degree: int = 1, method: str | None = None, tier: Tier = "cloud") -> Plan:
    """The row's plan on one site: its model up to the switch step, then the small one."""
    site = Site(
        name="here", tier=tier, device=row.device or "", runtime=row.runtime, precision=row.precision,
        gpus_per_node=degree,
    )  # fmt: skip
    steps = row.num_inference_steps
    switch = steps if row.switch_step is None else row.switch_step
    method = method or (row.method if degree > 1 else "single")
    known = find_method(method).defaults
    options = tuple(sorted((key, value) for key, value in read_options(row.options).items() if key in known))
    large = Stage(start=0, stop=switch, model=row.model, site=site, method=method, degree=degree, options=options)
    small = Stage(start=switch, stop=steps, model=row.small_model or row.model, site=site)
    stages = tuple(stage for stage in (large, small) if stage.num_steps)
    return Plan(stages=stages, text_encode_site=site.name, vae_site=site.name)


def _flops_without_attention_products(row: PublishedRow, profiles: Profiles) -> Estimate:
    return Estimate(plan_flops(_plan(row), _request(row, row.sides_px[0]), profiles)[1])


def _group_price(
    row: PublishedRow, profiles: Profiles, *, degree: int | None = None, side_px: int | None = None, method: str = ""
) -> PlanCost:
    """The price of the row's plan on one worker group; of its first degree and size where none is given."""
    plan = _plan(row, degree=degree or row.degrees[0], method=method or None)
    return price(plan, _request(row, side_px or row.sides_px[0]), profiles)


def _traffic_saved_against_distrifusion(row: PublishedRow, profiles: Profiles) -> Estimate:
    """Share of DistriFusion's traffic that a steady step saves."""
    costs = (_group_price(row, profiles, method=method) for method in (row.method, "distrifusion"))
    ours, theirs = (sum(p.comm_bytes for p in cost.denoise_parts if p.name == "denoise") for cost in costs)
    return Estimate(1 - ours / theirs)


def _speedups(row: PublishedRow, profiles: Profiles) -> list[Estimate]:
    """The speed-up over one device at every degree and size of the row."""
    found = []
    for degree, side in product(row.degrees, row.sides_px):
        one, many = (_group_price(row, profiles, degree=count, side_px=side) for count in (1, degree))
        low, high = many.interval_s
        found.append(Estimate(one.denoise_s / many.denoise_s, one.denoise_s / high, one.denoise_s / low))
    return found


def _latency_s(row: PublishedRow, profiles: Profiles) -> Estimate:
    """Prompt to picture on one device, alone."""
    cost = price(_plan(row, tier="edge"), _request(row, row.sides_px[0]), profiles)
    return Estimate(cost.latency_s, *cost.latency_interval_s)


def _time_ratio(row: PublishedRow, profiles: Profiles, component: str) -> Estimate:
    """The model at the first size over the small model at the last one, both by the device's fit."""
    above = _one_gpu_row(row, row.model, component, row.sides_px[0])
    below = _one_gpu_row(row, row.small_model or row.model, component, row.sides_px[-1])
    return ratio(_fitted_time(above, profiles), _fitted_time(below, profiles))


def _one_gpu_row(row: PublishedRow, model: str, component: str, side_px: int) -> CostRow:
    """The cost row that would time a model or component on the row's device; its seconds mean nothing."""
    return CostRow.model_validate({
        "device": row.device, "runtime": row.runtime, "precision": row.precision, "model": model,
        "component": component, "height_px": side_px, "width_px": side_px, "batch_size": row.batch_size,
        "guidance": component == "step" and row.guidance, "seconds_median": row.value,
        "kind": row.kind, "source": row.source, "source_date": row.source_date,
    })  # fmt: skip


QUANTITIES: Mapping[str, Callable[[PublishedRow, Profiles], Estimate]] = {
    "comm_s": lambda row, profiles: Estimate(_group_price(row, profiles).comm_exposed_s),
    "decode_flops_without_attention_products": lambda row, profiles: Estimate(
        profiles.component(row.model)
        .model_copy(update={"flop_attention_512": 0.0})
        .flop(row.sides_px[0], row.sides_px[0])
        * row.batch_size
    ),
    "decode_ratio": partial(_time_ratio, component="vae_decode"),
    "flops_without_attention_products": _flops_without_attention_products,
    "latency_s": _latency_s,
    "macs_without_attention_products": lambda row, profiles: 0.5 * _flops_without_attention_products(row, profiles),
    "speedup_least": lambda row, profiles: min(_speedups(row, profiles), key=attrgetter("value")),
    "speedup_most": lambda row, profiles: max(_speedups(row, profiles), key=attrgetter("value")),
    "step_ratio": partial(_time_ratio, component="step"),
    "traffic_elements_per_step": lambda row, profiles: Estimate(
        _group_price(row, profiles).comm_bytes / ACTIVATION_BYTES / row.num_inference_steps
    ),
    "traffic_saved_against_distrifusion": _traffic_saved_against_distrifusion,
}
"""How each published quantity is predicted."""
