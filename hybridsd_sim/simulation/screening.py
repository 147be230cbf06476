"""Tries a deployment on a scenario's own requests without an event loop: what planning screens candidates with.

The same arrivals, links and devices as `simulate` draws (common random numbers) pass through pools and edge fleets by
the compiled recursion of `replay`. Where nothing speaks against that (`recursion_obstacle`), it gives what `simulate`
gives, request by request, to rounding. What does not depend on the deployment is drawn once, as `Inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.plan import Deployment, Plan
from hybridsd_sim.pricing import Candidate, deployment_problems, make_candidate, rental_usd_per_hour, request_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.scheduling import REASONS
from hybridsd_sim.simulation.metrics import quantile_of
from hybridsd_sim.simulation.records import SERVED, TOLERANCE_S, Records, RunRecorder
from hybridsd_sim.simulation.result import SimResult, plan_facts
from hybridsd_sim.workload import Floats, Ints, Requests, arrival_chunks, draw_requests, own_size

if TYPE_CHECKING:
    from hybridsd_sim.simulation.replay import MixParts, Replayed


TALLIED = ("requests", "served", "unserved", "in_flight", "in_time", "judged")
"""What `replay.tally` counts, in its order: `metrics.COUNTS`, and what attainment is the share of."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Everything about a scenario that no deployment changes: its requests, and the plans priced so far."""

    scenario: Scenario
    profiles: Profiles
    replications: tuple[Requests, ...]
    priced: dict[tuple[str, Plan], Candidate] = field(default_factory=dict)

    @classmethod
    def of(cls, scenario: Scenario, profiles: Profiles, *, replications: Sequence[int] | None = None) -> Inputs:
        """Draw the requests of some replications, of all without a word. Raises `InputError` for unknown names."""
        numbers = range(scenario.replications) if replications is None else replications
        return cls(scenario, profiles, tuple(draw_requests(scenario, profiles, number) for number in numbers))

    def candidate(self, request_class: str, plan: Plan) -> Candidate:
        """A class's plan, priced; checked and priced once."""
        key = request_class, plan
        if key not in self.priced:
            request = request_of(request_class, self.scenario.requests[request_class])
            self.priced[key] = make_candidate(self.scenario, self.profiles, request, plan)
        return self.priced[key]


class ScreenError(RunError):
    """The recursion does not apply to a deployment; the message says why."""


def recursion_obstacle(scenario: Scenario, deployment: Deployment, inputs: Inputs | None = None) -> str:
    """Why the recursion does not apply, as a clause; empty where it does. A pool that is not used does not matter.

    `inputs` saves drawing the requests of a trace to see whether they differ from their class.
    """
    plans = [part.plan for mix in deployment.plans.values() for part in mix]
    rented = {name for name, nodes in deployment.replicas.items() if nodes}
    used = {stage.site.name for plan in plans for stage in plan.cloud_stages} & rented
    for name, pool in scenario.pools.items():
        if name not in used:
            continue
        if pool.discipline == "edf":
            return f"pool {name} serves by deadline (edf)"
        if pool.resident_models is not None:
            return f"pool {name} loads models as they are asked for (resident_models)"
        if pool.preemptions_per_s > 0.0:
            return f"nodes of pool {name} may be taken away (preemptions_per_node_hour)"
    if any(plan.batch_cap > 1 and plan.cloud_stages[0].site.name in used for plan in plans):
        return "a plan denoises several requests together (batch_cap)"
    if inputs:
        varied = any(requests.varied for requests in inputs.replications)
    else:  # only the requests of a trace can differ from their class
        traced = any(spec.arrivals.process in {"trace", "gentd26"} for spec in scenario.requests.values())
        varied = traced and not all(own_size(scenario, chunk).all() for chunk in arrival_chunks(scenario, 0))
    return "requests of a trace differ from their class in steps or images" if varied else ""


@dataclass(frozen=True, eq=False)
class Screened:
    """A deployment on a scenario's own requests, as the recursion has it.

    Attainment, latency and counts are quick; `records` and what is made of them, `result` with its summary and verdict,
    take longer and are made when asked for. Figures are by request class and for "all", over the requests that arrived
    in `[warmup_s, horizon_s)`; NaN where nothing is to be had.
    """

    inputs: Inputs
    replicas: Mapping[str, int]
    parts: MixParts
    played: tuple[Replayed, ...]

    @property
    def scenario(self) -> Scenario:
        return self.inputs.scenario

    @property
    def names(self) -> tuple[str, ...]:
        return *self.scenario.requests, ALL

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """By request class and "all": how many of each of `TALLIED`."""
        from hybridsd_sim.simulation.replay import tally

        slo_s = [promises.deadline_s() for promises in self.scenario.promises.values()]
        limits_s, by_class = np.array([*slo_s, TOLERANCE_S, self.scenario.horizon_s]), np.zeros((len(slo_s), 6), int)
        for each in self.played:
            requests, played = each.requests, (each.finish_s, each.status)
            begin = int(np.searchsorted(requests.arrival_s, self.scenario.warmup_s))
            by_class += tally(begin, requests.class_index, requests.arrival_s, played, limits_s)
        rows = [*by_class.tolist(), by_class.sum(axis=0).tolist()]
        return {name: dict(zip(TALLIED, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}

    def _ratios(self, above: str, below: str) -> dict[str, float]:
        return {name: row[above] / row[below] if row[below] else np.nan for name, row in self.counts.items()}

    @property
    def attainment(self) -> dict[str, float]:
        """Share of the requests served in time, of all that are served, unserved, or in flight past their deadline."""
        return self._ratios("in_time", "judged")

    @property
    def unserved_share(self) -> dict[str, float]:
        return self._ratios("unserved", "requests")

    @property
    def unfinished_share(self) -> dict[str, float]:
        """Share of the requests in flight at the horizon: many of them mean that a queue grows."""
        return self._ratios("in_flight", "requests")

    @cached_property
    def latency_p95_s(self) -> dict[str, float]:
        return self.latency_s(0.95)

    def latency_s(self, p: float) -> dict[str, float]:
        """A quantile of the latency of served requests."""
        latency_s, class_index = [], []
        for each in self.played:
            counted = (each.requests.arrival_s >= self.scenario.warmup_s) & (each.status == SERVED)
            latency_s.append((each.finish_s - each.requests.arrival_s)[counted])
            class_index.append(each.requests.class_index[counted])
        values, classes = np.concatenate(latency_s), np.concatenate(class_index)
        groups = [*(values[classes == index] for index in range(len(self.scenario.requests))), values]
        return {name: quantile_of(group, p) for name, group in zip(self.names, groups, strict=True)}

    @cached_property
    def records(self) -> tuple[Records, ...]:
        """The records of every replication, as `simulate` makes them."""
        scenario, parts, found = self.scenario, self.parts, []
        names = (tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge))
        for played in self.played:
            records = Records(*names, (), REASONS, played.requests.replication)
            recorder = RunRecorder(records, scenario.horizon_s)
            numbers = []
            for option in parts.options:
                facts = None if option is None else plan_facts(scenario, self.inputs.profiles, option)
                numbers.append(-1 if facts is None else recorder.add_plan(facts))
            recorder.write_all(len(played.part), _columns(scenario, parts, played, np.array(numbers)))
            found.append(recorder.close())
        return tuple(found)

    @cached_property
    def used(self) -> dict[tuple[str, str], Candidate]:
        """The candidates that requests were sent to, by request class and plan label."""
        taken = {index for played in self.played for index in np.flatnonzero(np.bincount(played.part)).tolist()}
        options = [self.parts.options[index] for index in sorted(taken)]
        return {(option.request_class, option.plan.label): option for option in options if option is not None}

    @cached_property
    def result(self) -> SimResult:
        """The same in the form of a simulation: summary with intervals, verdict, table of requests."""
        scenario = self.scenario
        rent = rental_usd_per_hour(scenario, self.inputs.profiles, self.replicas)
        return SimResult(scenario, "planned", scenario.seed, self.replicas, self.records, self.used, rent, 0)


def screen(
    scenario: Scenario,
    profiles: Profiles,
    deployment: Deployment,
    *,
    slowdowns: Mapping[str, float] | None = None,
    inputs: Inputs | None = None,
) -> Screened:
    """Try a deployment on a scenario's own requests by the recursion.

    `slowdowns` are factors on every second spent at a site (pool or edge fleet). `inputs` are the scenario's, drawn
    before; they set the replications. Raises `ScreenError` where the recursion does not apply or the inputs are of
    another scenario, `InputError` for a deployment that does not fit the scenario.
    """
    from hybridsd_sim.simulation.replay import mix_parts, replay  # numba takes a moment to load

    inputs = inputs or Inputs.of(scenario, profiles)
    if inputs.scenario is not scenario and inputs.scenario != scenario:
        raise ScreenError("these inputs were drawn for another scenario")
    new = {name: mix for name, mix in deployment.plans.items() if any((name, s.plan) not in inputs.priced for s in mix)}
    if problems := deployment_problems(replace(deployment, plans=new), scenario, inputs.profiles, complete=False):
        raise InputError(problems)
    if reason := recursion_obstacle(scenario, deployment, inputs):
        raise ScreenError(f"the recursion does not apply: {reason}")
    replicas = {name: deployment.replicas.get(name, 0) for name in scenario.pools}
    parts = mix_parts(scenario, deployment, slowdowns or {}, inputs.candidate)
    played = tuple(replay(scenario, requests, parts, replicas) for requests in inputs.replications)
    return Screened(inputs, replicas, parts, played)


def _columns(scenario: Scenario, parts: MixParts, played: Replayed, plan_index: Ints) -> dict[str, Any]:
    """The columns of the rows; what lies beyond the horizon did not happen."""
    requests, part, table, horizon_s = played.requests, played.part, parts.table, scenario.horizon_s
    slo_s = np.array([promises.deadline_s() for promises in scenario.promises.values()])
    in_cloud, at_edge = (table.pool >= 0)[part], (table.fleet >= 0)[part]
    up_s = requests.half_rtt_s + table.up_bytes[part] / requests.up_bytes_per_s
    down_s = requests.half_rtt_s + table.down_bytes[part] / requests.down_bytes_per_s
    stop_s = played.cloud_start_s + table.cloud_s[part]
    started = played.cloud_start_s < horizon_s
    # A request that reaches its device before the horizon is recorded with its whole edge stage, beyond it too.
    reached = at_edge & (played.home_s < horizon_s)
    at_end = reached | (in_cloud & ~at_edge & (stop_s < horizon_s))
    return {
        "request": np.arange(len(part)),
        "class_index": requests.class_index,
        "plan_index": plan_index[part],
        "status": played.status,
        "reason": table.reason[part],
        "arrival_s": requests.arrival_s,
        "cloud_ready_s": _if_happened(played.cloud_ready_s < horizon_s, played.cloud_ready_s),
        "cloud_start_s": _if_happened(started, played.cloud_start_s),
        "cloud_stop_s": _if_happened(started, stop_s),
        "edge_ready_s": _if_happened(reached, played.home_s),
        "edge_start_s": _if_happened(reached, played.edge_start_s),
        "edge_stop_s": _if_happened(reached, played.edge_start_s + table.edge_s[part]),
        "finish_s": _if_happened(at_end, played.finish_s),
        "deadline_s": requests.arrival_s + slo_s[requests.class_index],
        "model_load_s": 0.0,
        "transfer_s": np.where(in_cloud, up_s + down_s, 0.0),
        "node": np.where(started, played.node, -1),
        "device": np.where(reached, played.device, -1),
    }


def _if_happened(happened: npt.NDArray[np.bool_], seconds: Floats) -> Floats:
    return np.where(happened, seconds, np.nan)
