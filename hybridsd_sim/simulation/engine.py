"""Carries requests through their stages. Pure: no files, no globals, no clock but the simulated one.

One event where something can be decided or a device is freed, and nowhere else: the arrival (the policy decides), the
prompt's arrival at the pool (queueing), the gang's release, and the latent's arrival at the edge. Random inputs of a
request (its device, its link rates, its model) are drawn with the arrival from named streams, so that every policy
meets exactly the same requests on the same links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import simpy
from simpy.events import Timeout

from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import (
    Candidate,
    CandidateSet,
    Pricing,
    RentedCandidates,
    deployment_problems,
    price_deployment,
    rental_usd_per_hour,
    resolve_candidates,
)
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling import REASONS, FleetView, Policy, policy_for
from hybridsd_sim.simulation.fleet import EdgeFleet, Job, Pool, Preemption, Route
from hybridsd_sim.simulation.records import IN_FLIGHT, SERVED, UNSERVED, Book, Marks, Records, Sink, check_laws
from hybridsd_sim.simulation.result import SimResult, plan_facts
from hybridsd_sim.workload import Draw, Draws, stream

NAN = math.nan

OTHER_MODELS = 1000
"""Model keys of one class's model and of the other base models of a trace lie this far apart."""


def simulate(
    scenario: Scenario,
    profiles: Profiles,
    *,
    policy: str | Policy,
    seed: int | None = None,
    plan: Deployment | None = None,
    sink: Sink | None = None,
    options: CandidateSet | None = None,
    slowdowns: Mapping[str, float] | None = None,
    replications: range | None = None,
) -> SimResult:
    """Simulate a scenario under one policy.

    `policy` is a name or an object; `planned` follows `plan`, and under a policy with a queue discipline of its own
    every pool has that one. `plan` fixes the replicas; else a pool's `replicas`, else its `replicas_max` do. `sink`
    receives blocks of finished records as they fill. `options` passes candidates found before. `slowdowns` are factors
    on every second that a request spends at a site, by the name of the pool or edge fleet: 1.1 is 10% slower; model
    loads and transfers keep their time. `replications` says which to run, None all of the scenario's; each is the same
    whichever others run, and `joined` puts them together. Raises `InputError` for names that
    the profiles do not hold, `RunError` if the run breaks its own laws.
    """
    if seed is not None and seed != scenario.seed:
        scenario = scenario.with_overrides({"seed": seed})
    if plan is not None and (problems := deployment_problems(plan, scenario, profiles, complete=False)):
        raise InputError(problems)
    replicas = _replicas(scenario, plan)
    name = policy if isinstance(policy, str) else policy.name
    pricing = Pricing(scenario, profiles, slowdowns or {})
    found = price_deployment(pricing, plan) if name == "planned" else resolve_candidates(pricing, options)
    done, used, timeouts = [], {}, 0
    for replication in range(scenario.replications) if replications is None else replications:
        decider = policy if isinstance(policy, Policy) else policy_for(policy, scenario, plan)
        run = _Run(pricing, found, decider, replicas, replication, sink)
        done.append(run.run())
        used.update(run.used())
        timeouts += run.timeouts
    rent = rental_usd_per_hour(scenario, profiles, replicas)
    return SimResult(scenario, name, scenario.seed, replicas, tuple(done), used, rent, timeouts)


def _replicas(scenario: Scenario, plan: Deployment | None) -> dict[str, int]:
    if plan is not None:
        return {name: plan.replicas.get(name, 0) for name in scenario.pools}
    return {
        name: pool.replicas_max if pool.replicas is None else pool.replicas for name, pool in scenario.pools.items()
    }


class _Route(Route):
    """A candidate compiled for the hot path: which pool and fleet, how long, how many bytes."""

    __slots__ = (
        "cloud_s", "degree", "down_bytes", "edge_s", "fleet", "index", "load_s", "model_key", "pool", "priority",
        "up_bytes", "work",
    )  # fmt: skip

    def __init__(self, index: int, pool: Pool[_Trip] | None, fleet: EdgeFleet | None) -> None:
        super().__init__()
        self.index, self.pool, self.fleet = index, pool, fleet
        self.degree = self.up_bytes = self.down_bytes = self.model_key = self.priority = 0
        self.cloud_s = self.edge_s = self.work = 0.0
        self.load_s: float | None = None

    def follow(self, candidate: Candidate) -> None:
        """Take the candidate's figures."""
        self.degree = candidate.degree
        self.cloud_s = candidate.cloud_s
        self.batch_s = candidate.batch_s
        self.edge_s = candidate.edge_s
        self.up_bytes = candidate.cost.bytes_up
        self.down_bytes = candidate.cost.bytes_down
        request = candidate.cost.request
        self.priority = request.priority
        pixels = request.height_px * request.width_px
        self.work = float(request.num_inference_steps * pixels * request.num_images)


NOWHERE = _Route(-1, None, None)
"""The route of a rejected request."""


class _Trip(Job):
    """A request on its way through its route."""

    __slots__ = ("arrival_s", "class_index", "device_draw", "down_s", "edge_ready_s", "transfer_s")

    def __init__(self, number: int, class_index: int, arrival_s: float, deadline_s: float, device_draw: float) -> None:
        # Job.__init__ spelt out: this line runs once a request, and a call more is a twentieth of its time. What a pool
        # asks of a job besides (work, priority, model) is written when the request is sent there.
        self.number, self.deadline_s, self.node = number, deadline_s, -1
        self.degree = self.restarts = 0
        self.hold_s = self.load_s = self.lost_gpu_s = self.down_s = self.transfer_s = 0.0
        self.cloud_ready_s = self.cloud_start_s = self.cloud_stop_s = self.edge_ready_s = NAN
        self.class_index, self.arrival_s, self.device_draw = class_index, arrival_s, device_draw
        self.route: _Route = NOWHERE
        self.gang = None


class _Run:
    """One replication: the event loop, its pools and fleets, and the book it fills."""

    def __init__(
        self,
        pricing: Pricing,
        options: CandidateSet,
        policy: Policy,
        replicas: Mapping[str, int],
        replication: int,
        sink: Sink | None,
    ) -> None:
        self.timeouts = 0
        scenario, profiles = pricing.scenario, pricing.profiles
        self._scenario, self._profiles, self._policy, self._replication = scenario, profiles, policy, replication
        self._env = simpy.Environment()
        self._specs = list(scenario.requests.values())
        self._pools = [self._make_pool(name, nodes) for name, nodes in replicas.items()]
        self._fleets = [EdgeFleet(spec.replicas, shared=spec.ownership == "shared") for spec in scenario.edge.values()]
        self._telemetry_s = max((pool.telemetry_period_s for pool in scenario.pools.values()), default=0.0)
        self._view = FleetView([pool.view for pool in self._pools])
        self._draws = Draws(scenario, profiles, replication)
        self._arrivals = iter(self._draws)
        self._slo_s = [promises.deadline_s() for promises in scenario.promises.values()]
        self._offers = RentedCandidates(pricing, options, replicas)
        self._routes: dict[Candidate, _Route] = {}
        self._models = sorted({spec.model for spec in self._specs})
        self._open: dict[int, _Trip] = {}
        names = (tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge))
        records = Records(*names, (), REASONS, replication)
        self._book = Book(records, scenario.horizon_s, sink, expected=_expected_requests(scenario))
        self._record = self._book.write
        self._draws.on_chunk = self._book.flush_if_full

    def _make_pool(self, name: str, nodes: int) -> Pool[_Trip]:
        spec = self._scenario.pools[name]
        return Pool(
            self._env,
            nodes=nodes,
            gpus_per_node=spec.gpus_per_node,
            discipline=self._policy.discipline or spec.discipline,
            done=self._leave_cloud,
            resident_models=spec.resident_models,
            cold_start_s=spec.cold_start_s,
            preemption=self._preemption(name),
            after_s=lambda job: job.down_s + job.route.edge_s,
        )

    def _preemption(self, name: str) -> Preemption | None:
        """How a pool loses its nodes: at random, each node from its own stream, so that one more shifts no other."""
        spec = self._scenario.pools[name]
        if not spec.preemptions_per_s:
            return None
        lives: dict[int, np.random.Generator] = {}

        def up_s(node: int) -> float:
            if node not in lives:
                lives[node] = stream(self._scenario.seed, self._replication, f"preemption/{name}/{node}")
            return float(lives[node].exponential(1.0 / spec.preemptions_per_s))

        return Preemption(up_s, spec.replacement_s)

    def run(self) -> Records:
        """Run to the horizon, book what is still in flight, check the laws, and return the records."""
        self._number = -1
        self._schedule_arrival()
        self._env.run(until=self._scenario.horizon_s)
        for job in self._open.values():
            self._write(job, IN_FLIGHT, NAN, NAN, NAN, -1)
        records = self._book.close()
        if len(records) != self._draws.drawn:
            raise RunError(f"the run lost requests: {self._draws.drawn} arrived, {len(records)} were recorded")
        gpus = {name: pool.view.gpus for name, pool in zip(self._scenario.pools, self._pools, strict=True)}
        check_laws(records, gpus, {name: fleet.replicas for name, fleet in self._scenario.edge.items()})
        return records

    def used(self) -> dict[tuple[str, str], Candidate]:
        return {(candidate.request_class, candidate.plan.label): candidate for candidate in self._routes}

    def _schedule_arrival(self) -> None:
        draw = next(self._arrivals, None)
        if draw is not None:
            self._draw = draw
            delay = draw[0] - self._env.now
            Timeout(self._env, max(0.0, delay)).callbacks.append(self._arrive)

    def _arrive(self, event: simpy.Event) -> None:
        draw = self._draw
        now, class_index = draw[0], draw[1]
        self._number += 1
        self.timeouts += 1
        job = _Trip(self._number, class_index, now, now + self._slo_s[class_index], draw[2])
        options = self._offers.own[class_index] if draw[8] is None else self._offers.resized(class_index, draw[8])
        view = self._view if self._telemetry_s == 0.0 else self._fresh_view(now)
        decision = self._policy.decide(options, job.deadline_s, view, now)
        candidate = decision.candidate
        if candidate is None:
            self._write(job, UNSERVED, NAN, NAN, NAN, -1, REASONS.index(decision.reason))
        else:
            self._send(job, self._routes.get(candidate) or self._compile(candidate), draw)
        self._schedule_arrival()

    def _fresh_view(self, now: float) -> FleetView:
        """A snapshot of the pools taken at the last telemetry tick."""
        tick = now - now % self._telemetry_s
        if tick > self._view.as_of_s:
            self._view = FleetView([pool.view.copy() for pool in self._pools], tick)
        return self._view

    def _send(self, job: _Trip, route: _Route, draw: Draw) -> None:
        job.route = route
        self._open[job.number] = job
        if route.pool is None:
            self._serve_at_edge(job)
            return
        _, _, _, half_rtt_s, up_bytes_per_s, down_bytes_per_s, load_s, base_model, _ = draw
        up_s = half_rtt_s + route.up_bytes / up_bytes_per_s
        job.down_s = down_s = half_rtt_s + route.down_bytes / down_bytes_per_s
        job.transfer_s = up_s + down_s
        job.degree, job.hold_s, job.work, job.priority = route.degree, route.cloud_s, route.work, route.priority
        job.load_s = load_s if route.load_s is None else route.load_s
        job.model_key = route.model_key + base_model
        self.timeouts += 2
        Timeout(self._env, up_s, job).callbacks.append(self._reach_pool)

    def _reach_pool(self, event: simpy.Event) -> None:
        job: _Trip = event.value  # type: ignore[assignment]
        job.route.pool.submit(job)  # type: ignore[union-attr]

    def _leave_cloud(self, job: _Trip) -> None:
        if job.route.fleet is None:
            self._finish(job, NAN, NAN, job.cloud_stop_s + job.down_s, -1)
        else:
            self.timeouts += 1
            Timeout(self._env, job.down_s, job).callbacks.append(self._reach_edge)

    def _reach_edge(self, event: simpy.Event) -> None:
        self._serve_at_edge(event.value)  # type: ignore[arg-type]

    def _serve_at_edge(self, job: _Trip) -> None:
        route = job.route
        job.edge_ready_s = ready = self._env.now
        device, start = route.fleet.serve(  # type: ignore[union-attr]
            ready, route.edge_s, job.device_draw
        )
        stop = start + route.edge_s
        self._finish(job, start, stop, stop, device)

    def _finish(self, job: _Trip, edge_start: float, edge_stop: float, finish: float, device: int) -> None:
        del self._open[job.number]
        status = SERVED if finish <= self._scenario.horizon_s else IN_FLIGHT
        self._write(job, status, edge_start, edge_stop, finish, device)

    def _write(
        self, job: _Trip, status: int, edge_start: float, edge_stop: float, finish: float, device: int, reason: int = -1
    ) -> None:
        row = (
            job.number, job.class_index, job.route.index, status, reason, job.arrival_s,
            job.cloud_ready_s, job.cloud_start_s, job.cloud_stop_s, job.edge_ready_s, edge_start, edge_stop, finish,
            job.deadline_s, job.load_s, job.transfer_s, job.node, device,
        )  # fmt: skip
        if job.gang is None and not job.restarts:
            self._record(row)
        else:
            batch_size = 1 if job.gang is None else len(job.gang)
            self._book.write_marked(row, Marks(batch_size, job.restarts, job.lost_gpu_s))

    def _compile(self, candidate: Candidate) -> _Route:
        pool = self._pools[candidate.pool_index] if candidate.pool_index >= 0 else None
        fleet = self._fleets[candidate.fleet_index] if candidate.fleet_index >= 0 else None
        facts = plan_facts(self._scenario, self._profiles, candidate)
        route = self._routes[candidate] = _Route(self._book.add_plan(facts), pool, fleet)
        route.follow(candidate)
        route.model_key = OTHER_MODELS * self._models.index(candidate.cost.request.model)
        if pool is not None:
            route.load_s = list(self._scenario.pools.values())[candidate.pool_index].model_load_s
        return route


def _expected_requests(scenario: Scenario) -> int:
    """Requests to reserve memory for: the mean of the written rates and five standard deviations; 0 for a trace."""
    rates = [spec.arrivals.rate_per_s or 0.0 for spec in scenario.requests.values()]
    mean = sum(rates) * scenario.horizon_s
    return math.ceil(mean + 5.0 * math.sqrt(mean))
