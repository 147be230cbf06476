"""What a report says: plain data taken from a capacity plan or from simulations, before any page or figure.

Everything here can be written as JSON and drawn again later. A figure nobody knows is null beside a `note` that says
why; shares, seconds and dollars keep full precision, since rounding is the pages' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsd_sim.candidates import pool_site, request_of
from hybridsd_sim.cost import price
from hybridsd_sim.report.breakdown import breakdowns
from hybridsd_sim.report.fits import constants_of, fits_of
from hybridsd_sim.report.planned import planned
from hybridsd_sim.report.rates import rates_of
from hybridsd_sim.report.tally import tally

if TYPE_CHECKING:
    from hybridsd_sim.candidates import Candidate
    from hybridsd_sim.capacity import CapacityPlan, Evaluated
    from hybridsd_sim.cost import PlanCost
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario
    from hybridsd_sim.simulate import SimResult

Data = dict[str, Any]
CHOSEN = "chosen"
"""Name of the run that follows the chosen plan."""


def contents(result: CapacityPlan | Sequence[SimResult], profiles: Profiles) -> Data:
    """Everything that the pages, figures and tables of a report need, as plain data."""
    if isinstance(result, Sequence):
        runs = named(result)
        served = [(name, *one) for name, run in runs.items() for one in _used(run)]
        return _clean({"kind": "simulation", **_shared(result[0].scenario, runs, served, profiles)})
    runs = {CHOSEN: result.chosen_result, **result.baseline_results}
    chosen = [option for mix in result.mixes.values() for _, option in mix]
    served = [(CHOSEN, option.request_class, option.cost) for option in chosen]
    served += [(name, *one) for name, run in result.baseline_results.items() for one in _used(run)]
    served += [(point.name, *one) for point in result.alternatives for one in _by_formula(point, result, profiles)]
    shared = _shared(result.scenario, runs, served, profiles, chosen)
    return _clean({"kind": "plan", **shared, **planned(result)})


def _used(run: SimResult) -> Iterator[tuple[str, PlanCost]]:
    """The plans by which a run served each class, in the order of the classes."""
    order = list(run.scenario.requests)
    for option in sorted(run.used.values(), key=lambda option: (order.index(option.request_class), option.plan.label)):
        yield option.request_class, option.cost


def _by_formula(point: Evaluated, plan: CapacityPlan, profiles: Profiles) -> Iterator[tuple[str, PlanCost]]:
    """The plans of a capacity plan that was not simulated, priced again."""
    prefer = plan.scenario.search.prefer_sources
    for name, mix in (point.deployment.plans if point.deployment else {}).items():
        for part in mix:
            yield name, price(part.plan, request_of(name, plan.scenario.requests[name]), profiles, prefer=prefer)


def _clean(data: Data) -> Data:
    return {key: plain(value) for key, value in data.items()}


def named(results: Sequence[SimResult]) -> dict[str, SimResult]:
    """Simulations by policy; numbered where one policy ran twice."""
    runs: dict[str, SimResult] = {}
    for result in results:
        again = sum(name.split(" #")[0] == result.policy for name in runs)
        runs[f"{result.policy} #{again + 1}" if again else result.policy] = result
    return runs


def _shared(
    scenario: Scenario,
    runs: Mapping[str, SimResult],
    served: Sequence[tuple[str, str, PlanCost]],
    profiles: Profiles,
    chosen: Sequence[Candidate] = (),
) -> Data:
    plans = [cost.plan for *_, cost in served]
    sites = [pool_site(name, pool) for name, pool in scenario.pools.items()]
    sites += [site for plan in plans for site in plan.sites.values()]
    rates = rates_of({site.name: site for site in sites}, profiles)
    return {
        "scenario": _scenario(scenario),
        "runs": [
            tally(name, result, chosen if index == 0 else (), rates)
            for index, (name, result) in enumerate(runs.items())
        ],
        "plans": breakdowns(served, rates),
        "rates": [rate.to_dict() for rate in rates.values()],
        "calibration": fits_of(sites, profiles),
        "constants": constants_of(profiles),
    }


def _scenario(scenario: Scenario) -> Data:
    classes = {
        name: {key: getattr(spec, key) for key in ("slo_s", "slo_percentile", "quality_floor", "num_inference_steps")}
        | {"fleet": spec.origin, "device": scenario.edge[spec.origin].device, "num_images": spec.num_images}
        | {"model": spec.model, "height_px": spec.height_px, "width_px": spec.width_px}
        for name, spec in scenario.requests.items()
    }
    pools = {name: {"gpu": pool.gpu, "gpus_per_node": pool.gpus_per_node} for name, pool in scenario.pools.items()}
    keys = ("name", "seed", "horizon_s", "warmup_s", "replications")
    return {**{key: getattr(scenario, key) for key in keys}, "classes": classes, "pools": pools}


def plain(value: Any) -> Any:
    """JSON's own types: no NaN or infinity, no tuples, no arrays."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
