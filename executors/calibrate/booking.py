"""What the client saw of a live run, as records in the simulator's own format, under the simulator's own laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

from executors.calibrate.drive import Sent
from executors.calibrate.setting import POOL, candidate_of
from executors.live.client import Outcome
from hybridsd_sim.errors import RunError
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.records import TIMES, Book, PlanFacts, Records, check_laws
from hybridsd_sim.results import plan_facts
from hybridsd_sim.scenario import Scenario

Floats = npt.NDArray[np.float64]
TICK_S = 2.0**-22
"""Times are kept to a quarter of a microsecond, in binary, so that sums of them stay exact and files small."""


def facts_of(
    sent: Sequence[Sent[Outcome]], scenario: Scenario, deployment: Deployment, profiles: Profiles
) -> PlanFacts:
    """What the plan says of every request, with the bytes that really came down."""
    facts = plan_facts(scenario, profiles, candidate_of(scenario, deployment, profiles))
    return facts._replace(bytes_down=round(median(one.answer.bytes_down for one in sent)))


def times_of(sent: Sequence[Sent[Outcome]]) -> dict[str, Floats]:
    """The times of every request, from the first arrival on. Raises `RunError` unless all were served undisturbed."""
    outcomes = [one.answer for one in sent]
    if reasons := sorted({one.reason for one in outcomes if one.status != "served"}):
        raise RunError(f"requests of the live run were not served: {', '.join(reasons)}")
    if lost := sum(one.restarts + one.retries for one in outcomes):
        raise RunError(f"workers or answers were lost {lost} times in the live run")
    return {name: rounded(np.array([getattr(one, name) for one in outcomes]) - sent[0].arrival_s) for name in TIMES}


def rounded(times_s: Floats) -> Floats:
    """Times to the next tick."""
    ticks: Floats = np.round(times_s / TICK_S) * TICK_S
    return ticks


def booked(times_s: Mapping[str, Floats], scenario: Scenario, facts: PlanFacts) -> Records:
    """The records of a run in which all requests were served. Raises `RunError` where it broke a law.

    `transfer_s` is the part of the latency in which neither side held the request or let it wait: the network, and what
    clients and servers add to it.
    """
    arrival_s, finish_s = times_s["arrival_s"], times_s["finish_s"]
    held = {side: np.nan_to_num(times_s[f"{side}_stop_s"] - times_s[f"{side}_ready_s"]) for side in ("cloud", "edge")}
    slo_s = next(iter(scenario.requests.values())).slo_s
    records = Records(tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge), (), ())
    book = Book(records, scenario.horizon_s)
    book.add_plan(facts)
    columns: dict[str, Floats | float] = {
        **times_s, "request": np.arange(len(arrival_s), dtype=float), "class_index": 0.0, "plan_index": 0.0,
        "status": 0.0, "reason": -1.0, "deadline_s": arrival_s + (math.inf if slo_s is None else slo_s),
        "model_load_s": 0.0, "transfer_s": finish_s - arrival_s - held["cloud"] - held["edge"],
        "node": min(facts.pool_index, 0), "device": min(facts.fleet_index, 0),
    }  # fmt: skip
    book.write_all(len(arrival_s), columns)
    done = book.close()
    gpus = scenario.pools[POOL].gpus_per_node
    check_laws(done, {POOL: gpus}, {name: fleet.replicas for name, fleet in scenario.edge.items()})
    return done
