"""Why the plan is what it is: sentences for a person, from the candidates that were not chosen.

Each function answers one question: what was chosen and what it saves, why this switch step, why not at the edge alone,
why this degree and not on the other pool, and, where nothing holds, which constraint binds and what would lift it.
How the plan's own figures read stands in `sentences`, which pages and terminal use without the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridsd_sim.estimate import exact, interval, money, number, percent, score
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.capacity_plan import CapacityPlan
from hybridsd_sim.planning.sentences import (
    Mix,
    describe_infeasible_set,
    describe_relaxation,
    describe_savings,
    turned_away_share,
)
from hybridsd_sim.pricing import Candidate, CandidateSet
from hybridsd_sim.workload import arrival_source


def explain(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """Every sentence of a capacity plan, the most important first."""
    if not plan.feasible:
        yield from _why_not(plan, found, sizer)
    yield from _rent(plan)
    yield from _prices(plan, sizer)
    yield from describe_savings(plan)
    for name, mix in plan.mixes.items():
        yield from _shares(name, mix)
        yield from _why_edge(plan, name, found.by_class[name])
        for _, option in mix:
            yield from _why_switch(option, found.by_class[name])
            yield from _why_degree(option, found.by_class[name], plan)
    yield from _unused_pools(plan, found, sizer)
    yield from _arrivals(plan)


def _why_not(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """Which promise breaks, or how sure the surest plan is; and what conflicts, or what would lift it."""
    broken, sure = plan.chosen_result.verdict.feasible, plan.confidence
    if broken.ok and sure is not None and sure.asked is not None:
        yield (
            f"No plan that was found holds with probability {exact(sure.asked)}: the surest one, shown here, holds "
            f"with {exact(sure.probability, 3)}, given the intervals of the modelled step costs."
        )
        return
    yield f"No plan holds every promise: {broken.reason}"
    if plan.conflict:
        yield describe_infeasible_set(plan.conflict)
        yield from (describe_relaxation(each) for each in plan.conflict)
        return
    yield "By formula there is no conflict: every plan within its reach was late when it was tried."
    yield from _lifts(plan, found, sizer)


def _shares(name: str, mix: Mix) -> Iterator[str]:
    """Who gets what where a class has several plans, and what is turned away; nothing for one plan that serves all."""
    if len(mix) > 1:
        parts = "; ".join(f"{percent(share)} by {option.plan.label}" for share, option in mix)
        yield f"{name}: its requests are shared out: {parts}."
    if away := turned_away_share(mix):
        yield f"{name}: {percent(away)} of its requests are turned away: there is no room for them."


def _arrivals(plan: CapacityPlan) -> Iterator[str]:
    """Whether a trace was played or its stand-in: a reader must not take one for the other."""
    for name, spec in plan.scenario.requests.items():
        if spec.arrivals.process in ("trace", "gentd26"):
            yield f"{name}: its arrivals come from {arrival_source(spec.arrivals)}."


def _rent(plan: CapacityPlan) -> Iterator[str]:
    rented = [f"{count} x {name}" for name, count in plan.replicas_opt.items() if count]
    dollars = "an unknown price" if plan.usd_per_hour is None else f"{money(plan.usd_per_hour)} USD an hour"
    yield f"Rent {', '.join(rented)} for {dollars}." if rented else "Rent nothing: the edge does everything."


def _prices(plan: CapacityPlan, sizer: Sizer) -> Iterator[str]:
    """Where the price of each rented GPU comes from."""
    for name, spec in plan.scenario.pools.items():
        if not plan.replicas_opt.get(name, 0):
            continue
        if spec.usd_per_gpu_hour is not None:
            yield f"A GPU-hour of {name} costs {exact(spec.usd_per_gpu_hour)} USD: the scenario's own price."
            continue
        row = sizer.profiles.gpu_price(spec.gpu, spec.purchase, spec.provider)
        if row is not None:
            how = spec.purchase.replace("_", " ")
            yield f"A GPU-hour of {name} costs {exact(row.usd)} USD {how} at {row.provider} ({row.kind}: {row.source})."


def _why_switch(option: Candidate, options: Sequence[Candidate]) -> Iterator[str]:
    """Why not one step earlier: what the next earlier hand-over of the same kind would break."""
    if not (option.cloud_steps and option.edge_steps):
        return
    small = option.plan.edge_stages[0].model
    earlier = [
        other
        for other in options
        if other.pool_index == option.pool_index
        and other.degree == option.degree
        and other.edge_steps
        and 0 < other.cloud_steps < option.cloud_steps
        and other.plan.edge_stages[0].model == small
    ]
    if not earlier:
        return
    other = max(earlier, key=lambda one: one.cloud_steps)
    name = option.request_class
    if not other.meets_floor and other.quality is not None and option.quality is not None:
        floor = option.promises.quality_floor
        yield (
            f"{name}: handing over at step {other.cloud_steps} instead of {option.cloud_steps} would need fewer "
            f"GPU-seconds, but its CLIP score of {score(other.quality)} is under the floor of {score(floor)}."
        )
    elif not other.meets_slo:
        yield (
            f"{name}: handing over at step {other.cloud_steps} takes {number(other.latency_s)} s even on an idle "
            f"fleet, over the SLO of {exact(option.promises.slo_s)} s."
        )


def _why_edge(plan: CapacityPlan, name: str, options: Sequence[Candidate]) -> Iterator[str]:
    """Why a class is served at the edge alone, or why it is not."""
    at_edge = [option for _, option in plan.mixes[name] if option.cloud_steps == 0]
    could = [option for option in options if option.cloud_steps == 0]
    if not at_edge and could:
        best = max(could, key=lambda one: (one.meets_floor, one.meets_slo, one.quality or 0.0, -one.latency_s))
        yield f"{name}: the edge alone ({best.plan.stages[0].model}) {_edge_fault(best, plan)}."
    elif not at_edge:
        reasons = [reason for (cls, reason) in plan.refusals if cls == name and "memory" in reason]
        yield f"{name}: the edge alone cannot: {reasons[0] if reasons else 'no model runs there'}."
    elif not (at_edge[0].meets_floor and at_edge[0].meets_slo):
        yield f"{name}: the edge alone ({at_edge[0].plan.stages[0].model}) {_edge_fault(at_edge[0], plan)}."
    elif len(plan.mixes[name]) == 1:
        yield f"{name}: the device alone holds every promise, so nothing is rented for it."


def _edge_fault(best: Candidate, plan: CapacityPlan) -> str:
    promises, images = best.promises, best.cost.request.num_images
    faults = []
    if not promises.meets_floor(best.quality):
        known = "an unknown CLIP score" if best.quality is None else f"a CLIP score of {score(best.quality)}"
        faults.append(f"gives {known}, under the floor of {score(promises.quality_floor)}")
    if not best.meets_slo:
        faults.append(f"takes {number(best.latency_s)} s, over the SLO of {exact(promises.slo_s)} s")
    limit = plan.scenario.promises[best.request_class].edge_energy_j
    energy = None if best.cost.edge_energy_j is None else best.cost.edge_energy_j / images
    if limit is not None and (energy is None or energy > limit):
        used = "an unknown energy" if energy is None else f"{number(energy)} J"
        faults.append(f"uses {used} of {exact(limit)} J a picture")
    return " and ".join(faults) if faults else "would hold, but is dearer at this load"


def _why_degree(option: Candidate, options: Sequence[Candidate], plan: CapacityPlan) -> Iterator[str]:
    """Why several GPUs: what one GPU would take; and why the other pools do not get the same gang."""
    if option.degree <= 1:
        return
    name, pools = option.request_class, list(plan.scenario.pools)
    slo, method = option.promises.slo_s, option.plan.stages[0].method
    alone = [
        one
        for one in options
        if one.degree == 1 and one.pool_index == option.pool_index and one.cloud_steps == option.cloud_steps
    ]
    if alone:
        yield (
            f"{name}: one GPU takes {number(alone[0].latency_s)} s, {method} on {option.degree} takes "
            f"{number(option.latency_s)} s; the SLO is {exact(slo)} s."
        )
    for index in {one.pool_index for one in options if one.pool_index not in (-1, option.pool_index)}:
        rivals = [
            one
            for one in options
            if one.pool_index == index and one.degree > 1 and one.cloud_steps == option.cloud_steps
        ]
        if rivals:
            best = min(rivals, key=lambda one: one.latency_s)
            alike = (one for one in rivals if one.plan.stages[0].method == method and one.degree == option.degree)
            same = next(alike, best)
            there, here = same.cost.comm_exposed_s, option.cost.comm_exposed_s
            low, high = same.cost.latency_interval_s
            caution = f" Its steps were not timed there: {interval(low, high)} s at 90%."
            yield (
                f"{name}: on {pools[index]} the same gang takes {number(same.latency_s)} s, of which {number(there)} s "
                f"are exchange that nothing hides (here {number(here)} s); the fastest there takes "
                f"{number(best.latency_s)} s."
                f"{caution if same.cost.outside else ''}"
            )


def _unused_pools(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """Why a pool is not rented: which classes it cannot serve, and what it would cost for the others."""
    for index, pool in enumerate(plan.scenario.pools):
        if plan.replicas_opt.get(pool, 0):
            continue
        served: dict[str, Candidate] = {}
        for option in (option for mix in plan.mixes.values() for _, option in mix if option.pool_index >= 0):
            served.setdefault(option.request_class, option)
        if not served:
            yield f"Pool {pool} is not rented: no class needs it."
        for name, chosen in served.items():
            options = [one for one in found.by_class[name] if one.pool_index == index]
            yield f"Pool {pool} is not rented for {name}: {_fault_of_pool(options, chosen, sizer)}."


def _fault_of_pool(options: Sequence[Candidate], chosen: Candidate, sizer: Sizer) -> str:
    holding = [
        one for one in options if one.meets_floor and sizer.idle_attainment(one) >= sizer.wanted(one.request_class)
    ]
    keeping = [one for one in options if one.meets_floor]
    if not holding:
        if not keeping:
            return "no plan on it keeps the class's floor and limits"
        fastest = min(one.latency_s for one in keeping)
        return f"its fastest plan that keeps the floor takes {number(fastest)} s even on an idle pool"
    dollars, ours = min(one.usd_or_inf for one in holding), chosen.usd_or_inf
    costs = f"{money(1000 * dollars)} USD per 1,000 requests in GPU time and egress against {money(1000 * ours)}"
    if dollars < ours:
        return f"it would cost {costs}, but the nodes rented for the other classes have room"
    return f"its cheapest plan costs {costs}"


def _lifts(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """What would make an infeasible class feasible: the least change of each of its promises by itself."""
    for name, spec in plan.scenario.requests.items():
        options = found.by_class[name]
        if not options:
            reasons = [reason for (cls, reason) in plan.refusals if cls == name]
            first = reasons[0] if reasons else "the search space is empty"
            yield f"{name}: every plan was refused; the first reason: {first}"
            continue
        if any(one.meets_floor and sizer.idle_attainment(one) >= sizer.wanted(name) for one in options):
            continue
        keeping = [one for one in options if one.meets_floor]
        if keeping and spec.slo_s is not None:
            fastest = min(keeping, key=lambda one: one.latency_s)
            changed = f"with an SLO of {number(fastest.latency_s)} s instead of {exact(spec.slo_s)} s"
            yield f"{name}: {changed} the {fastest.plan.label} would do on an idle fleet."
        yield from _floor_lifts(name, [one for one in options if one.meets_slo], plan)
    budget = plan.scenario.budget.usd_per_hour
    if budget is not None and plan.usd_per_hour is not None and plan.usd_per_hour > budget:
        needed = money(plan.usd_per_hour)
        yield f"A budget of {needed} USD an hour instead of {exact(budget)} would pay for the plan shown."
    full = [name for name, spec in plan.scenario.pools.items() if plan.replicas_opt.get(name, 0) >= spec.replicas_max]
    for name in full:
        most = plan.scenario.pools[name].replicas_max
        yield f"Pool {name} is at its replicas_max of {most}; more nodes may lift the limit."


def _floor_lifts(name: str, in_time: Sequence[Candidate], plan: CapacityPlan) -> Iterator[str]:
    """A lower quality floor or a higher energy limit under which something in time would do."""
    promises = plan.scenario.promises[name]
    floor, limit = promises.quality_floor, promises.edge_energy_j
    scored = [one for one in in_time if one.quality is not None]
    thrifty = [one for one in scored if limit is None or (one.cost.edge_energy_j or 0.0) <= limit]
    if floor is not None and thrifty:
        best = max(thrifty, key=lambda one: one.quality or 0.0)
        if (best.quality or 0.0) < floor:
            changed = f"with a quality floor of {score(best.quality)} instead of {score(floor)}"
            yield f"{name}: {changed} the {best.plan.label} would do."
    good = [one for one in scored if floor is None or (one.quality or 0.0) >= floor]
    if limit is not None and good:
        best = min(good, key=lambda one: one.cost.edge_energy_j or 0.0)
        if (used := best.cost.edge_energy_j or 0.0) > limit:
            yield f"{name}: with {number(used)} J a picture instead of {exact(limit)} J the {best.plan.label} would do."
    if floor is not None and in_time and not scored:
        why = in_time[0].cost.quality.clip.note
        yield f"{name}: nobody published a score for these pictures ({why}); drop the floor."
