"""Laws of conflicting constraints: sets that cannot be made smaller, and relaxations that suffice and no more."""

from __future__ import annotations

import pytest

from hybridsd_sim.planning.infeasibility import irreducible_infeasible_set, is_feasible, relaxable_constraints
from hybridsd_sim.planning.planner import solve
from planners import SHORT, planner_of

TIGHT = {
    "budget": {"budget.usd_per_hour": 8.0},
    "budget per image": {"budget.usd_per_image": 0.0002},
    "SLO alone": {"requests.picture.slo_s": 0.5},
    "floor alone": {"requests.picture.quality_floor": 0.4},
    "nodes": {"pools.a100.replicas_max": 2},
    "devices": {"edge.phones.replicas": 8, "pools.a100.replicas_max": 3},
    "edge energy against budget": {"budget.edge_energy_j_per_image": 3.0, "budget.usd_per_hour": 15.0},
    "price": {"requests.picture.usd_per_image": 0.0001},
    "three at once": {"requests.picture.slo_s": 1.0, "pools.a100.replicas_max": 4, "budget.usd_per_hour": 12.0},
}


@pytest.fixture(scope="module", params=TIGHT)
def case(request, quickstart, profiles):
    """A planner of a scenario without any plan, its constraints by name, and the conflict found."""
    planner = planner_of(quickstart, profiles, **SHORT, **TIGHT[request.param])
    return planner, {one.name: one for one in relaxable_constraints(planner)}, irreducible_infeasible_set(planner)


def kept(constraints, names):
    """The changes that lift every constraint but those named."""
    return {one.key: one.lifted for name, one in constraints.items() if name not in names}


def test_a_conflict_cannot_be_met_and_without_any_one_member_it_can(case):
    """All other constraints lifted, the set has no plan, and every smaller one has."""
    planner, constraints, found = case
    names = {relaxation.constraint for relaxation in found}
    assert names
    assert not is_feasible(planner, kept(constraints, names))
    for name in names:
        assert is_feasible(planner, kept(constraints, names - {name}))


def test_a_member_relaxed_by_what_is_needed_makes_a_plan_possible(case):
    """The value told is enough with all else as it is, and a change 2% smaller is not."""
    planner, constraints, found = case
    for relaxation in found:
        if relaxation.needed is None:
            continue
        key, change = constraints[relaxation.constraint].key, relaxation.needed - relaxation.asked
        assert is_feasible(planner, {key: relaxation.needed})
        if isinstance(planner_value(planner, key), int):
            assert not is_feasible(planner, {key: int(relaxation.needed) - 1})
        else:
            assert not is_feasible(planner, {key: relaxation.asked + 0.98 * change})


def planner_value(planner, key):
    """The value of a dotted key of the scenario."""
    value = planner.scenario.to_dict()
    for part in key.split("."):
        value = value[part]
    return value


def test_a_member_without_a_remedy_does_not_help_however_far_it_goes(case):
    """Lifted altogether, it leaves no plan either."""
    planner, constraints, found = case
    for relaxation in found:
        if relaxation.needed is None:
            one = constraints[relaxation.constraint]
            assert not is_feasible(planner, {one.key: one.lifted})


def test_some_member_of_a_single_conflict_has_a_remedy(quickstart, profiles):
    """A budget that is too small is told with the rent of the cheapest plan."""
    planner = planner_of(quickstart, profiles, **SHORT, **TIGHT["budget"])
    needed = {relaxation.constraint: relaxation.needed for relaxation in irreducible_infeasible_set(planner)}["budget"]
    free = solve(planner_of(quickstart, profiles, **SHORT))
    rent = sum(count * planner.sizer.unit_rent[name] for name, count in free.replicas.items())
    assert needed == pytest.approx(rent, rel=0.01)


def test_a_scenario_that_can_be_met_has_no_irreducible_infeasible_set(quickstart, profiles):
    """Where the formula has a plan there is nothing to relax."""
    assert irreducible_infeasible_set(planner_of(quickstart, profiles, **SHORT)) == ()


def test_a_class_that_nothing_can_serve_has_no_conflict_of_limits(quickstart, profiles):
    """Where no plan is legal at all, no limit is to blame."""
    nobody = planner_of(quickstart, profiles, **SHORT)
    nobody.found.by_class["picture"] = ()
    assert irreducible_infeasible_set(nobody) == ()


def test_a_corrected_formula_explains_what_simulation_refused(quickstart, profiles):
    """A plan that the formula believes in and simulation does not is a conflict once the correction is learnt."""
    planner = planner_of(quickstart, profiles, **SHORT, **{"pools.a100.replicas_max": 3})
    assert irreducible_infeasible_set(planner) == ()
    planner.sizer.correction_factors["a100"] = 2.0
    assert "nodes of pool a100" in {relaxation.constraint for relaxation in irreducible_infeasible_set(planner)}
