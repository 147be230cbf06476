"""Why nothing holds: an irreducible infeasible set of constraints, and the least relaxation of each of them.

A set of constraints is infeasible if no plan meets all of them, and irreducible (an IIS) if every smaller part of it
can be met (Chinneck, Feasibility and Infeasibility in Optimization, 2008). One is found by QuickXplain (Junker, AAAI
2004), which asks whether a plan exists some k log(n / k) times for k of n constraints; two orders of the constraints
may find two sets, of which the smaller is returned. A constraint is dropped by lifting it in the scenario (no SLO, no
floor, a hundred thousand nodes), and the formulation says whether a plan exists. It speaks with what simulations taught
the formula, so that it also explains a scenario for which it had a plan at first; while it still has one there is no
set.

The relaxation of a constraint is the least change of it alone, with all others as they are, that makes a plan possible.
Floors, energies and prices move from one plan's figure to the next, nodes and devices are counted; seconds and dollars
are found to within `PRECISION` of the change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybridsd_sim.planning.capacity_plan import Relaxation
from hybridsd_sim.planning.planner import Planner, solve, vary

PRECISION = 0.005
"""Share of a change to which it is known."""

TINY = 1e-6
"""Share of a limit below which a change is none."""

LONGEST = 2.0**20
"""Times a limit in seconds or dollars up to which a relaxation is looked for."""

FEW = 40
"""Constraints up to which a second order of them is tried for a smaller set."""

NODES, DEVICES = 100_000, 1_000_000_000
"""More than anyone has: the most nodes and devices that a scenario may name."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A limit of the scenario: its name, dotted key, value, unit, and the value that lifts it.

    `steps` are the values worth trying, from the next looser one on; None where every value is.
    """

    name: str
    key: str
    asked: float
    unit: str
    lifted: float | None
    steps: tuple[float, ...] | None = None


_Set = tuple[Constraint, ...]


def irreducible_infeasible_set(planner: Planner) -> tuple[Relaxation, ...]:
    """The smallest irreducible infeasible set found, with the least relaxation of each of its members alone.

    Empty where the formula has a plan, and where none would exist even without all these constraints.
    """
    constraints = list(relaxable_constraints(planner))
    orders = [constraints, constraints[::-1]] if len(constraints) <= FEW else [constraints]
    found = [_irreducible_subset(planner, order) for order in orders]
    smallest = min((one for one in found if one), key=len, default=())
    return tuple(
        Relaxation(one.name, one.asked, _relax(planner, one), one.unit) for one in constraints if one in smallest
    )


def relaxable_constraints(planner: Planner) -> Iterator[Constraint]:
    """Every constraint that can be lifted: promises to classes, budgets, and what there is to serve with."""
    scenario = planner.scenario
    for name in scenario.requests:
        yield from _of_class(planner, name)
    budget = scenario.budget
    if budget.usd_per_hour is not None:
        yield Constraint("budget", "budget.usd_per_hour", budget.usd_per_hour, "USD/h", None)
    if budget.usd_per_image is not None:
        yield Constraint("budget per image", "budget.usd_per_image", budget.usd_per_image, "USD/image", None)
    if (limit := budget.edge_energy_j_per_image) is not None:
        steps = sorted({j for name in scenario.requests for j in _energies(planner, name) if j > limit})
        yield Constraint("edge energy budget", "budget.edge_energy_j_per_image", limit, "J/image", None, tuple(steps))
    for name, pool in scenario.pools.items():
        yield Constraint(f"nodes of pool {name}", f"pools.{name}.replicas_max", pool.replicas_max, "nodes", NODES)
    for name, fleet in scenario.edge.items():
        yield Constraint(f"devices of fleet {name}", f"edge.{name}.replicas", fleet.replicas, "devices", DEVICES)


def _of_class(planner: Planner, name: str) -> Iterator[Constraint]:
    spec, options = planner.scenario.requests[name], planner.found.by_class[name]
    key = f"requests.{name}"
    if spec.slo_s is not None:
        yield Constraint(f"SLO of {name}", f"{key}.slo_s", spec.slo_s, "s", None)
    if (floor := spec.quality_floor) is not None:
        scores = sorted({o.quality for o in options if o.quality is not None and o.quality < floor}, reverse=True)
        yield Constraint(f"quality floor of {name}", f"{key}.quality_floor", floor, "CLIP", None, tuple(scores))
    if (limit := spec.edge_energy_j) is not None:
        steps = tuple(sorted(joules for joules in _energies(planner, name) if joules > limit))
        yield Constraint(f"edge energy limit of {name}", f"{key}.edge_energy_j", limit, "J/image", None, steps)
    if (limit := spec.usd_per_image) is not None:
        prices = {o.cost.usd / spec.num_images for o in options if o.cost.usd is not None}
        steps = tuple(sorted(usd for usd in prices if usd > limit))
        yield Constraint(f"price limit of {name}", f"{key}.usd_per_image", limit, "USD/image", None, steps)


def _energies(planner: Planner, name: str) -> set[float]:
    """Joules of the edge device that an image takes, over the plans of a class."""
    images = planner.scenario.requests[name].num_images
    energies = (option.cost.edge_energy_j for option in planner.found.by_class[name])
    return {joules / images for joules in energies if joules is not None}


def is_feasible(planner: Planner, changes: Mapping[str, float | None]) -> bool:
    """Whether the formula has a plan for the scenario with some limits changed."""
    return solve(vary(planner, changes), minimise="nothing") is not None


def _irreducible_subset(planner: Planner, constraints: Sequence[Constraint]) -> _Set:
    """An irreducible infeasible subset, by QuickXplain; what stands first is kept rather than what stands last."""

    def infeasible(kept: Sequence[Constraint]) -> bool:
        return not is_feasible(planner, {one.key: one.lifted for one in constraints if one not in kept})

    def explain(background: _Set, rest: _Set, *, grew: bool) -> _Set:
        if grew and infeasible(background):
            return ()
        if len(rest) == 1:
            return rest
        first, second = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        late = explain((*background, *first), second, grew=True)
        early = explain((*background, *late), first, grew=bool(late))
        return early + late

    if not constraints or not infeasible(constraints) or infeasible(()):
        return ()
    return explain((), tuple(constraints), grew=False)


def _relax(planner: Planner, one: Constraint) -> float | None:
    """The least relaxed value of one constraint alone at which a plan exists; None where none does."""

    def enough(value: float | None) -> bool:
        return is_feasible(planner, {one.key: value})

    if not enough(one.lifted):
        return None
    if one.steps is not None:
        at = bisect_left(range(len(one.steps)), x=True, key=lambda index: enough(one.steps[index]))  # type: ignore[index]
        return one.steps[at] if at < len(one.steps) else None
    if one.lifted is not None:  # counts: by doubling the step, then by halving
        few, many, step = int(one.asked), int(one.lifted), 1
        while few + step < many and not enough(few + step):
            few, step = few + step, 2 * step
        return bisect_left(range(many), x=True, lo=few + 1, hi=min(many, few + step), key=enough)
    low, high = one.asked, 2.0 * one.asked
    while not enough(high):
        if high > LONGEST * one.asked:
            return None
        low, high = high, 2.0 * high
    while high - low > max(PRECISION * (high - one.asked), TINY * one.asked):
        middle = (low + high) / 2.0
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
