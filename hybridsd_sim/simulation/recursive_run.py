"""Carries a replication's requests through pools, links and edge devices by recursion instead of an event loop.

The requests of a mix take turns as under the policy `planned`. The work is `recursion`'s; here it is told what to do.

The compiled queue recursion for screening: a deployment tried on a scenario's own requests without an event loop.

The same arrivals, links and devices as `simulate` draws (common random numbers) pass through pools and edge fleets; the
requests of a mix take turns as under the policy `planned`. Where the recursion applies (`why_not`), it gives what
`simulate` gives, request by request, to rounding. What does not depend on the deployment is drawn once, as `Inputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.plan import Deployment, Plan
from hybridsd_sim.pricing import Candidate, deployment_problems, make_candidate, rental_usd_per_hour, request_of, slowed
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import ALL, Scenario
from hybridsd_sim.scheduling import ALL_SHARES, NO_CANDIDATE, REASONS, TURNED_AWAY
from hybridsd_sim.simulation.metrics import value_at
from hybridsd_sim.simulation.records import IN_FLIGHT, SERVED, TOLERANCE_S, UNSERVED, Book, Records
from hybridsd_sim.simulation.recursion import (
    Owners,
    Queue,
    compiled,
    owned_devices,
    pool_queue,
    shared_devices,
    take_turns,
)
from hybridsd_sim.simulation.result import SimResult, plan_facts
from hybridsd_sim.workload import Floats, Ints, Requests, arrival_chunks, draw_requests, own_size


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


class Links(NamedTuple):
    """When each request is made, and how fast it and its answer travel."""

    asked_s: Floats
    half_rtt_s: Floats
    up_bytes_per_s: Floats
    down_bytes_per_s: Floats


class Table(NamedTuple):
    """Figures by part of a mix. Pools, fleets and reasons of rejection are indices, -1 where there is none."""

    pool: Ints
    fleet: Ints
    reason: Ints
    degree: Ints
    cloud_s: Floats
    edge_s: Floats
    up_bytes: Floats
    down_bytes: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of all classes' mixes, one after the other: those of class `c` from `first[c]` to `first[c + 1]`.

    A part that is rejected has no option.
    """

    options: tuple[Candidate | None, ...]
    first: Ints
    share: Floats
    table: Table


def parts_of(inputs: Inputs, deployment: Deployment, slowdowns: Mapping[str, float]) -> Parts:
    """The mixes as the policy `planned` follows them: what goes to a pool without nodes is rejected."""
    rented = {index for index, name in enumerate(inputs.scenario.pools) if deployment.replicas.get(name, 0)} | {-1}
    options: list[Candidate | None] = []
    share, reason, first = [], [], [0]
    for name in inputs.scenario.requests:
        mix = deployment.plans.get(name, ())
        found = [slowed(inputs.candidate(name, part.plan), slowdowns) for part in mix]
        shares = [part.share for part in mix]
        if not any(option.pool_index in rented for option in found):
            found, shares = [], []
        options += [option if option.pool_index in rented else None for option in found]
        reason += [-1 if option.pool_index in rented else REASONS.index(NO_CANDIDATE) for option in found]
        if sum(shares) <= ALL_SHARES:
            options.append(None)
            reason.append(REASONS.index(TURNED_AWAY))
            shares.append(1.0 - sum(shares))
        share += shares
        first.append(len(options))
    return Parts(tuple(options), np.array(first), np.array(share), _table(options, reason))


def _table(options: Sequence[Candidate | None], reason: Sequence[int]) -> Table:
    rows = [
        (-1, -1, why, 0, 0.0, 0.0, 0.0, 0.0)
        if o is None
        else (o.pool_index, o.fleet_index, why, o.degree, o.cloud_s, o.edge_s, o.cost.bytes_up, o.cost.bytes_down)
        for o, why in zip(options, reason, strict=True)
    ]
    kinds = [np.int64] * 4 + [np.float64] * 4
    columns: list[Any] = [np.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    return Table(*columns)


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """One replication, by request in order of arrival, as if it went on beyond the horizon.

    Seconds are infinite, and nodes -1, for what never happens. `part` is an index into the parts of all mixes, `home_s`
    when the user's device has what the cloud made, or was asked to do it all.
    """

    requests: Requests
    part: Ints
    cloud_ready_s: Floats
    cloud_start_s: Floats
    node: Ints
    home_s: Floats
    edge_start_s: Floats
    device: Ints
    finish_s: Floats
    status: Ints


def play(inputs: Inputs, requests: Requests, parts: Parts, replicas: Mapping[str, int]) -> Played:
    """Carry the requests of a replication through pools, links and devices."""
    scenario, table = inputs.scenario, parts.table
    links = Links(requests.asked_s, requests.half_rtt_s, requests.up_bytes_per_s, requests.down_bytes_per_s)
    part = take_turns(requests.class_index, parts.first, parts.share)
    ready_s = to_pools(part, links, table)
    start_s, node = _through_pools(scenario, table, replicas, part, ready_s)
    home_s, edge_ready_s = to_users(part, links, table, start_s)
    edge_start_s, device = _over_devices(scenario, table, requests, part, edge_ready_s)
    finish_s, status = finished(part, table, home_s, edge_start_s, scenario.horizon_s)
    return Played(requests, part, ready_s, start_s, node, home_s, edge_start_s, device, finish_s, status)


def _through_pools(
    scenario: Scenario, table: Table, replicas: Mapping[str, int], part: Ints, ready_s: Floats
) -> tuple[Floats, Ints]:
    """When every request starts in its pool, and on which node."""
    start_s, node = np.full(len(part), np.inf), np.full(len(part), -1)
    for index, (name, pool) in enumerate(scenario.pools.items()):
        turn = _line(table.pool == index, part, ready_s)
        jobs = Queue(turn, ready_s, part, table.cloud_s, table.degree, start_s, node)
        pool_queue(
            jobs,
            nodes=replicas[name],
            gpus_per_node=pool.gpus_per_node,
            discipline=pool.discipline,
            cold_start_s=pool.cold_start_s,
        )
    return start_s, node


def _line(served: npt.NDArray[np.bool_], part: Ints, ready_s: Floats) -> Ints:
    """The requests of some parts in the order in which they are ready, ties in order of arrival."""
    if served.all():
        return np.argsort(ready_s, kind="stable")
    mine = np.flatnonzero(served[part]) if served.any() else np.empty(0, np.int64)
    return mine[np.argsort(ready_s[mine], kind="stable")]


def _over_devices(
    scenario: Scenario, table: Table, requests: Requests, part: Ints, ready_s: Floats
) -> tuple[Floats, Ints]:
    """When every request starts on its edge device, and on which; those without an edge stage never do."""
    if (table.fleet < 0).all():
        return ready_s, requests.device
    owners = Owners(requests.asks, requests.first, requests.owner, requests.before)
    start_s, device = owned_devices(ready_s, part, table.edge_s, owners), requests.device
    for index, fleet in enumerate(scenario.edge.values()):
        if fleet.ownership == "shared" and (turn := _line(table.fleet == index, part, ready_s)).size:
            device = device.copy()
            shared_devices(Queue(turn, ready_s, part, table.edge_s, table.degree, start_s, device), fleet.replicas)
    return start_s, device


@compiled
def to_pools(part: Ints, links: Links, table: Table) -> Floats:
    """When each request reaches its pool; infinity without one."""
    ready_s = np.empty(len(part))
    for request in range(len(part)):
        mine = part[request]
        ready_s[request] = np.inf
        if table.pool[mine] >= 0:
            up_s = links.half_rtt_s[request] + table.up_bytes[mine] / links.up_bytes_per_s[request]
            ready_s[request] = links.asked_s[request] + up_s
    return ready_s


@compiled
def to_users(part: Ints, links: Links, table: Table, start_s: Floats) -> tuple[Floats, Floats]:
    """When the user's device has what the cloud made, or is asked to do it all; and when its edge stage may begin."""
    home_s, edge_ready_s = np.empty(len(part)), np.empty(len(part))
    for request in range(len(part)):
        mine = part[request]
        home_s[request] = links.asked_s[request]
        if table.pool[mine] >= 0:
            down_s = links.half_rtt_s[request] + table.down_bytes[mine] / links.down_bytes_per_s[request]
            home_s[request] = start_s[request] + table.cloud_s[mine] + down_s
        edge_ready_s[request] = home_s[request] if table.fleet[mine] >= 0 else np.inf
    return home_s, edge_ready_s


@compiled
def finished(part: Ints, table: Table, home_s: Floats, edge_start_s: Floats, horizon_s: float) -> tuple[Floats, Ints]:
    """When each user has the picture, and what became of the request by the horizon."""
    finish_s, status = np.empty(len(part)), np.empty(len(part), np.int64)
    for request in range(len(part)):
        mine = part[request]
        at_edge = table.fleet[mine] >= 0
        finish_s[request] = edge_start_s[request] + table.edge_s[mine] if at_edge else home_s[request]
        status[request] = SERVED if finish_s[request] <= horizon_s else IN_FLIGHT
        if table.reason[mine] >= 0:
            status[request] = UNSERVED
    return finish_s, status


@compiled
def tally(begin: int, class_index: Ints, arrival_s: Floats, played: tuple[Floats, Ints], limits_s: Floats) -> Ints:
    """By class, of the requests from `begin` on: all, served, unserved, in flight, in time and judged.

    `played` are finish and status; `limits_s` the SLO of every class, then the tolerance and the horizon.
    """
    finish_s, status = played
    tolerance_s, horizon_s = limits_s[len(limits_s) - 2], limits_s[len(limits_s) - 1]
    counts = np.zeros((len(limits_s) - 2, 6), np.int64)
    for request in range(begin, len(arrival_s)):
        kind, what = class_index[request], status[request]
        late_s = arrival_s[request] + limits_s[kind]
        counts[kind, 0] += 1
        counts[kind, 1 + what] += 1
        counts[kind, 4] += what == SERVED and finish_s[request] <= late_s + tolerance_s
        counts[kind, 5] += what != IN_FLIGHT or late_s <= horizon_s
    return counts


COUNTS = ("requests", "served", "unserved", "in_flight", "in_time", "judged")
"""What is counted by request class, as in `metrics`: over the requests that arrived in `[warmup_s, horizon_s)`."""


class ScreenError(RunError):
    """The recursion does not apply to a deployment; the message says why."""


def why_not(scenario: Scenario, deployment: Deployment, inputs: Inputs | None = None) -> str:
    """Why the recursion does not apply, in words; empty where it does. A pool that is not used does not matter.

    `inputs` saves drawing the requests of a trace to see whether they differ from their class.
    """
    return next(_obstacles(scenario, deployment, inputs), "")


def _obstacles(scenario: Scenario, deployment: Deployment, inputs: Inputs | None) -> Iterator[str]:
    plans = [part.plan for mix in deployment.plans.values() for part in mix]
    rented = {name for name, nodes in deployment.replicas.items() if nodes}
    used = {stage.site.name for plan in plans for stage in plan.cloud_stages} & rented
    for name, pool in scenario.pools.items():
        if name not in used:
            continue
        if pool.discipline == "edf":
            yield f"pool {name} serves by deadline (edf)"
        if pool.resident_models is not None:
            yield f"pool {name} loads models as they are asked for (resident_models)"
        if pool.preemptions_per_s > 0.0:
            yield f"nodes of pool {name} may be taken away (preemptions_per_node_hour)"
    if any(plan.batch_cap > 1 and plan.cloud_stages[0].site.name in used for plan in plans):
        yield "a plan denoises several requests together (batch_cap)"
    if any(requests.varied for requests in inputs.replications) if inputs else _varied(scenario):
        yield "requests of a trace differ from their class in steps or images"


def _varied(scenario: Scenario) -> bool:
    """Whether some requests ask for other steps or images than their class; only those of a trace can."""
    if not any(spec.arrivals.process in {"trace", "gentd26"} for spec in scenario.requests.values()):
        return False
    return not all(own_size(scenario, chunk).all() for chunk in arrival_chunks(scenario, 0))


@dataclass(frozen=True, eq=False)
class Screened:
    """A deployment on a scenario's own requests, as the recursion has it.

    Attainment, latency and counts are quick; `records` and what is made of them, `result` with its summary and verdict,
    take longer and are made when asked for. Figures are by request class and for "all", over the requests that arrived
    in `[warmup_s, horizon_s)`; NaN where nothing is to be had.
    """

    inputs: Inputs
    replicas: Mapping[str, int]
    parts: Parts
    played: tuple[Played, ...]

    @property
    def scenario(self) -> Scenario:
        return self.inputs.scenario

    @property
    def names(self) -> tuple[str, ...]:
        return *self.scenario.requests, ALL

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """By request class and "all": how many of each of `COUNTS`."""
        slo_s = [promises.deadline_s() for promises in self.scenario.promises.values()]
        limits_s, by_class = np.array([*slo_s, TOLERANCE_S, self.scenario.horizon_s]), np.zeros((len(slo_s), 6), int)
        for each in self.played:
            requests, played = each.requests, (each.finish_s, each.status)
            begin = int(np.searchsorted(requests.arrival_s, self.scenario.warmup_s))
            by_class += tally(begin, requests.class_index, requests.arrival_s, played, limits_s)
        rows = [*by_class.tolist(), by_class.sum(axis=0).tolist()]
        return {name: dict(zip(COUNTS, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}

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
        values, kind = np.concatenate(latency_s), np.concatenate(class_index)
        groups = [*(values[kind == index] for index in range(len(self.scenario.requests))), values]
        return {name: _quantile(group, p) for name, group in zip(self.names, groups, strict=True)}

    @cached_property
    def records(self) -> tuple[Records, ...]:
        """The records of every replication, as `simulate` makes them."""
        return tuple(_records(self, played) for played in self.played)

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


def _quantile(values: Floats, p: float) -> float:
    """As `estimates.quantile` has it, without sorting more than it takes; the values change places."""
    if not len(values):
        return np.nan
    below = int(p * (len(values) - 1))
    places = [below, min(below + 1, len(values) - 1)]
    values.partition(places)
    values[places] = np.round(values[places], 9)
    return value_at(values, p)


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
    inputs = inputs or Inputs.of(scenario, profiles)
    if inputs.scenario is not scenario and inputs.scenario != scenario:
        raise ScreenError("these inputs were drawn for another scenario")
    new = {name: mix for name, mix in deployment.plans.items() if any((name, s.plan) not in inputs.priced for s in mix)}
    if problems := deployment_problems(replace(deployment, plans=new), scenario, inputs.profiles, complete=False):
        raise InputError(problems)
    if reason := why_not(scenario, deployment, inputs):
        raise ScreenError(f"the recursion does not apply: {reason}")
    replicas = {name: deployment.replicas.get(name, 0) for name in scenario.pools}
    parts = parts_of(inputs, deployment, slowdowns or {})
    played = tuple(play(inputs, requests, parts, replicas) for requests in inputs.replications)
    return Screened(inputs, replicas, parts, played)


def _records(screened: Screened, played: Played) -> Records:
    """The rows that `simulate` would have booked."""
    scenario, parts = screened.scenario, screened.parts
    names = (tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge))
    book = Book(Records(*names, (), REASONS, played.requests.replication), scenario.horizon_s)
    facts = partial(plan_facts, scenario, screened.inputs.profiles)
    numbers = [-1 if option is None else book.add_plan(facts(option)) for option in parts.options]
    book.write_all(len(played.part), _columns(scenario, parts, played, np.array(numbers)))
    return book.close()


def _columns(scenario: Scenario, parts: Parts, played: Played, plan_index: Ints) -> dict[str, Any]:
    """The columns of the rows; what lies beyond the horizon did not happen."""
    requests, part, table, horizon_s = played.requests, played.part, parts.table, scenario.horizon_s
    slo_s = np.array([promises.deadline_s() for promises in scenario.promises.values()])
    in_cloud, at_edge = (table.pool >= 0)[part], (table.fleet >= 0)[part]
    up_s = requests.half_rtt_s + table.up_bytes[part] / requests.up_bytes_per_s
    down_s = requests.half_rtt_s + table.down_bytes[part] / requests.down_bytes_per_s
    stop_s = played.cloud_start_s + table.cloud_s[part]
    started = played.cloud_start_s < horizon_s
    # The device hears of a request when the event loop still runs; what it then says of the future is kept.
    reached = at_edge & (played.home_s < horizon_s)
    at_end = reached | (in_cloud & ~at_edge & (stop_s < horizon_s))
    return {
        "request": np.arange(len(part)),
        "class_index": requests.class_index,
        "plan_index": plan_index[part],
        "status": played.status,
        "reason": table.reason[part],
        "arrival_s": requests.arrival_s,
        "cloud_ready_s": _where(played.cloud_ready_s < horizon_s, played.cloud_ready_s),
        "cloud_start_s": _where(started, played.cloud_start_s),
        "cloud_stop_s": _where(started, stop_s),
        "edge_ready_s": _where(reached, played.home_s),
        "edge_start_s": _where(reached, played.edge_start_s),
        "edge_stop_s": _where(reached, played.edge_start_s + table.edge_s[part]),
        "finish_s": _where(at_end, played.finish_s),
        "deadline_s": requests.arrival_s + slo_s[requests.class_index],
        "model_load_s": 0.0,
        "transfer_s": np.where(in_cloud, up_s + down_s, 0.0),
        "node": np.where(started, played.node, -1),
        "device": np.where(reached, played.device, -1),
    }


def _where(happened: npt.NDArray[np.bool_], seconds: Floats) -> Floats:
    return np.where(happened, seconds, np.nan)
