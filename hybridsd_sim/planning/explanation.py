"""Why the plan is what it is, in sentences for a person; terminal and pages say the same, as both take it from here.

`explain` answers one question after another from the candidates that were not chosen: what was chosen and what it
saves, why this switch step, why not at the edge alone, why this degree and not on the other pool, and, where nothing
holds, which constraint binds and what would lift it. The functions below it need the plan alone: savings, bound,
margins, conflict, confidence, evidence. Every sentence names its unit and by what the number is known: simulation,
compiled recursion or formula.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from hybridsd_sim.estimate import exact, interval, money, number, percent, score, signed
from hybridsd_sim.planning.analytic import Sizer
from hybridsd_sim.planning.capacity_plan import CapacityPlan, Confidence, Margin, Relaxation, Saving
from hybridsd_sim.planning.evaluation import EvaluatedPlan
from hybridsd_sim.pricing import Candidate, CandidateSet
from hybridsd_sim.scenario import ALL
from hybridsd_sim.workload import arrival_source


def explain(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """Every sentence of a capacity plan, the most important first."""
    if not plan.feasible:
        yield from _why_not(plan, found, sizer)
    yield from _rent(plan, sizer)
    yield from describe_savings(plan)
    for name, mix in plan.mixes.items():
        if len(mix) > 1:
            parts = "; ".join(f"{percent(share)} by {option.plan.label}" for share, option in mix)
            yield f"{name}: its requests are shared out: {parts}."
        if away := turned_away_share(mix):
            yield f"{name}: {percent(away)} of its requests are turned away: there is no room for them."
        yield from _why_edge(plan, name, found.by_class[name])
        for _, option in mix:
            yield from _why_switch(option, found.by_class[name])
            yield from _why_degree(option, found.by_class[name], plan)
    yield from _unused_pools(plan, found, sizer)
    for name, spec in plan.scenario.requests.items():
        # Whether a trace was played or its stand-in: a reader must not take one for the other.
        if spec.arrivals.process in ("trace", "gentd26"):
            yield f"{name}: its arrivals come from {arrival_source(spec.arrivals)}."


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


def _rent(plan: CapacityPlan, sizer: Sizer) -> Iterator[str]:
    """What is rented for how much, and where the price of each rented GPU comes from."""
    rented = [f"{count} x {name}" for name, count in plan.replicas_opt.items() if count]
    dollars = "an unknown price" if plan.usd_per_hour is None else f"{money(plan.usd_per_hour)} USD an hour"
    yield f"Rent {', '.join(rented)} for {dollars}." if rented else "Rent nothing: the edge does everything."
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
    if not other.keeps_limits and other.quality is not None and option.quality is not None:
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
        best = max(could, key=lambda one: (one.keeps_limits, one.meets_slo, one.quality or 0.0, -one.latency_s))
        yield f"{name}: the edge alone ({best.plan.stages[0].model}) {_edge_fault(best, plan)}."
    elif not at_edge:
        reasons = [reason for (cls, reason) in plan.refusals if cls == name and "memory" in reason]
        yield f"{name}: the edge alone cannot: {reasons[0] if reasons else 'no model runs there'}."
    elif not (at_edge[0].keeps_limits and at_edge[0].meets_slo):
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
    """Why several GPUs: what one GPU would take; and why the other pools do not get the same worker group."""
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
                f"{name}: on {pools[index]} the same worker group takes {number(same.latency_s)} s, of which "
                f"{number(there)} s are exchange that nothing hides (here {number(here)} s); the fastest there takes "
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
            keeping = [one for one in found.by_class[name] if one.pool_index == index and one.keeps_limits]
            holding = [one for one in keeping if sizer.idle_attainment(one) >= sizer.wanted(name)]
            if holding:
                dollars, ours = min(one.usd_or_inf for one in holding), chosen.usd_or_inf
                against = f"against {money(1000 * ours)}"
                costs = f"{money(1000 * dollars)} USD per 1,000 requests in GPU time and egress {against}"
                fault = f"its cheapest plan costs {costs}"
                if dollars < ours:
                    fault = f"it would cost {costs}, but the nodes rented for the other classes have room"
            elif keeping:
                fastest_s = min(one.latency_s for one in keeping)
                fault = f"its fastest plan that keeps the floor takes {number(fastest_s)} s even on an idle pool"
            else:
                fault = "no plan on it keeps the class's floor and limits"
            yield f"Pool {pool} is not rented for {name}: {fault}."


def _lifts(plan: CapacityPlan, found: CandidateSet, sizer: Sizer) -> Iterator[str]:
    """What would make an infeasible class feasible: the least change of each of its promises by itself."""
    for name, spec in plan.scenario.requests.items():
        options = found.by_class[name]
        if not options:
            reasons = [reason for (cls, reason) in plan.refusals if cls == name]
            first = reasons[0] if reasons else "the search space is empty"
            yield f"{name}: every plan was refused; the first reason: {first}"
            continue
        if any(one.keeps_limits and sizer.idle_attainment(one) >= sizer.wanted(name) for one in options):
            continue
        keeping = [one for one in options if one.keeps_limits]
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


KNOWN_BY: Mapping[str, str] = {
    "simulate": "simulation", "screen": "compiled recursion", "screened": "compiled recursion", "formula": "formula",
}  # fmt: skip
"""By what a figure is known, by `EvaluatedPlan.level`, and by `Confidence.level`, which may say more."""

BETTER: Mapping[str, tuple[str, int, str, str]] = {
    "usd_per_hour": ("USD/h", 2, "save {}", "cost {} more"),
    "latency_p95_s": ("s", 2, "lower the p95 latency by {}", "raise the p95 latency by {}"),
    "quality": ("CLIP", 4, "lower the CLIP score by {}", "raise the CLIP score by {}"),
}
"""Unit and decimals of what a margin moves, and what its falling and its rising are called.

All three numbers of such a sentence have the same decimals, so that the difference is that of the two others.
"""

Mix = Sequence[tuple[float, Candidate]]
"""How a class's requests are shared out over plans."""

ROUNDING = 1e-6
"""Shares whose sum is this close to 1 leave nobody out."""

LEAST_SHARE = 0.001
"""Shares of requests below this are not worth a word."""

NORMAL_95 = 1.959964
"""Two-sided 95% point of the normal distribution, to the digits that saved intervals were written with."""


def capitalise(text: str) -> str:
    """The text with its first letter in capitals and the rest as it is, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]


def turned_away_share(mix: Mix) -> float:
    """The share of a class's requests that no plan serves; 0 within rounding."""
    missing = 1.0 - sum(share for share, _ in mix)
    return missing if mix and missing > ROUNDING else 0.0


# ---- Savings --------------------------------------------------------------------------------------------------------


def describe_savings(plan: CapacityPlan) -> Iterator[str]:
    """A sentence for each plan of another kind: dollars and quality, or why it does not hold."""
    own = plan.usd_per_hour
    for saving in plan.savings:
        if not saving.holds:
            yield f"{capitalise(saving.other)} does not hold: {saving.reason.rstrip('.')}."
        elif saving.usd_per_hour is None or own is None:
            yield f"What the plan saves against {saving.other} is not known: a price is missing."
        else:
            saved, share = saving.usd_per_hour, saving.share
            compared = "as much as"
            if abs(saved) >= 0.005 and (share is None or abs(share) >= 0.005):
                amount = f"{money(abs(saved))} USD/h" if share is None else percent(abs(share))
                compared = f"{amount} {'less' if saved > 0 else 'more'} than"
            known = next((other.level for other in plan.baselines if other.name == saving.other), "simulate")
            dollars = f"{money(own)} USD/h of rent against {money(own + saved)}"
            mine, theirs = map(percent, saving.unserved)
            unserved = f", leaving {mine} of the requests unserved against {theirs}"
            rest = _loss(saving, plan) + (unserved if max(saving.unserved) >= LEAST_SHARE else "")
            yield f"It costs {compared} {saving.other}: {dollars}, both by {KNOWN_BY[known]}{rest}."


def _loss(saving: Saving, plan: CapacityPlan) -> str:
    """What a saving costs in CLIP score, as the end of its sentence."""
    quality = float(plan.chosen_result.summary.xs(ALL, level="request_class").iloc[0]["quality_mean"])
    own, change = None if math.isnan(quality) else quality, saving.quality
    if change is None:
        return "; the change in CLIP score is not known"
    if abs(change) < 5e-5:
        return ", with the same CLIP score" + ("" if own is None else f" of {score(own)}")
    if own is None:
        return f", with a CLIP score {'lower' if change < 0 else 'higher'} by {score(abs(change))}"
    return f", with a CLIP score of {score(own)} against {score(own - change)} ({signed(change, score)})"


# ---- The bound ------------------------------------------------------------------------------------------------------


def optimality_gap(plan: CapacityPlan) -> tuple[float, float, float] | None:
    """The bound, what the chosen plan costs (rent and metered egress), in USD an hour, and the gap as a share of it.

    None where the plan does not hold, where no bound is known or where a price is missing.
    """
    bound, cost = plan.bound_usd_per_hour, plan.cost_usd_per_hour
    if bound is None or cost is None or not plan.feasible:
        return None
    return bound, cost, max(0.0, 1.0 - bound / cost) if cost else 0.0


def describe_bound(plan: CapacityPlan) -> str:
    """How far the chosen plan can be from the cheapest that holds; empty where no bound is known."""
    found = optimality_gap(plan)
    if found is None:
        return ""
    bound, cost, gap = found
    return (
        f"The search found no plan under {money(bound)} USD/h: what the formula puts within reach was tried, each part "
        f"of a mix in time by itself. The plan costs {money(cost)} USD/h with what is sent to the edge: gap "
        f"{percent(gap)}."
    )


# ---- Margins, conflict, confidence, evidence ------------------------------------------------------------------------


def describe_margin(margin: Margin) -> str:
    """What one more second, dollar or point buys, or what it costs."""
    change, (before, after) = capitalise(margin.change), (margin.before, margin.after)
    unit, decimals, falls, rises = BETTER.get(
        margin.figure, ("", 4, f"lower {margin.figure} by {{}}", f"raise {margin.figure} by {{}}")
    )

    def amount(value: float) -> str:
        return f"{value:.{decimals}f} {unit}".rstrip()

    if after is None:
        return f"{change}: no plan would hold (by formula)." if before is not None else f"{change} does not help."
    if before is None:
        return f"{change} would make a plan possible, at {amount(after)} (by formula)."
    moved = after - before
    if abs(moved) < 0.5 * 10**-decimals:
        return f"{change} buys nothing and costs nothing: {amount(after)} with and without (by formula)."
    what = (falls if moved < 0 else rises).format(amount(abs(moved)))
    return f"{change} would {what}: {after:.{decimals}f} instead of {amount(before)} (by formula)."


def describe_infeasible_set(conflict: Sequence[Relaxation]) -> str:
    """How many constraints cannot be met together."""
    return (
        "This constraint cannot hold by itself."
        if len(conflict) == 1
        else f"These {len(conflict)} constraints cannot hold together; any {len(conflict) - 1} of them could."
    )


def describe_relaxation(relaxation: Relaxation) -> str:
    """A constraint of the conflict, and the least change of it alone that makes a plan possible."""
    name, asked, needed, unit = relaxation.constraint, relaxation.asked, relaxation.needed, relaxation.unit

    def quantity(value: float, digits: int = 4) -> str:
        return f"{score(value) if unit == 'CLIP' and digits == 4 else exact(value, digits)} {unit}".rstrip()

    if needed is None:
        stands = "" if asked is None else f", {quantity(asked)} asked"
        return f"{capitalise(name)}{stands}: no change of it alone helps."
    if asked is None:
        return f"{capitalise(name)}: {quantity(needed)} would do, all else as it is (by formula)."
    digits = next(n for n in (4, 6, 9, 17) if n == 17 or quantity(asked, n) != quantity(needed, n))
    changed = f"{quantity(needed, digits)} instead of {quantity(asked, digits)}"
    return f"{capitalise(name)}: {changed} would do, all else as it is (by formula)."


def probability_interval(share: float, draws: int) -> tuple[float, float]:
    """The 95% interval of a share of independent draws (Wilson, J. Am. Stat. Assoc. 22, 1927); 0 to 1 without draws."""
    if draws <= 0:
        return 0.0, 1.0
    square = NORMAL_95**2 / draws
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def describe_confidence(confidence: Confidence) -> str:
    """How sure the plan is, given the intervals of the modelled step costs, and whether that is what was asked."""
    low, high = probability_interval(confidence.probability, confidence.draws)
    grounds = f"{confidence.draws:,} draws by {KNOWN_BY.get(confidence.level, confidence.level)}"
    text = (
        "With the intervals of the modelled step costs the plan holds with probability "
        f"{exact(confidence.probability, 3)} ({grounds}, 95% interval {interval(low, high)})"
    )
    if confidence.asked is None:
        return f"{text}."
    reached = "" if confidence.probability >= confidence.asked else ", which it does not reach"
    return f"{text}; asked {exact(confidence.asked)}{reached}."


def describe_evidence(evidence: Sequence[EvaluatedPlan]) -> str:
    """How many capacity plans were tried, and how; empty for none."""
    if not evidence:
        return ""
    ways = Counter(KNOWN_BY[point.level] for point in evidence)
    counted = ", ".join(f"{count} by {way}" for way, count in ways.most_common())
    plans = "1 capacity plan was" if len(evidence) == 1 else f"{len(evidence)} capacity plans were"
    return f"{plans} tried in the search, on the same requests: {counted}."
