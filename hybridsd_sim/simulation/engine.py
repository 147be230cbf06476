"""The simulation: carries requests through the stages of their plans on SimPy's event loop.

Pure: no files, no globals, no clock but the simulated one. There is an event where something can be decided or a device
is freed, and nowhere else: the arrival (the policy decides), the prompt's arrival at the pool (queueing), its GPUs'
release, and the latent's arrival at the edge. Random inputs of a request (its device, its link rates, its model) are
drawn with the arrival from named streams, so that every policy meets exactly the same requests on the same links.
Seconds and bytes are those of the candidate that the policy chose.
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
from hybridsd_sim.simulation.fleet import EdgeDevices, GpuPool, PoolJob, Preemption, Route
from hybridsd_sim.simulation.records import (
    IN_FLIGHT,
    SERVED,
    UNSERVED,
    GroupHistory,
    Records,
    RunRecorder,
    Sink,
    check_laws,
)
from hybridsd_sim.simulation.result import SimResult, plan_facts
from hybridsd_sim.workload import Draws, stream

NAN = math.nan

OTHER_MODELS = 1000
"""Distance between the keys of the classes' models; a trace's other base models lie between them."""


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

    - `policy`: a name or an object. `planned` follows `plan`; under a policy with a queue discipline of its own every
      pool has that one.
    - `plan`: fixes the replicas; else a pool's `replicas`, else its `replicas_max` do.
    - `sink`: receives blocks of finished records as they fill.
    - `options`: candidates found before; else every legal plan is priced.
    - `slowdowns`: factors on every second that a request spends at a site, by the name of the pool or edge fleet: 1.1
      is 10% slower. Model loads and transfers keep their time.
    - `replications`: which to run, by default all of the scenario's. Each is the same whichever others run; `joined`
      puts them together.

    Raises `InputError` for names that the profiles do not hold, `RunError` if the run breaks its own laws.
    """
    if seed is not None and seed != scenario.seed:
        scenario = scenario.with_overrides({"seed": seed})
    if plan is not None and (problems := deployment_problems(plan, scenario, profiles, complete=False)):
        raise InputError(problems)
    replicas = {
        name: pool.replicas_max if pool.replicas is None else pool.replicas for name, pool in scenario.pools.items()
    }
    if plan is not None:
        replicas = {name: plan.replicas.get(name, 0) for name in scenario.pools}
    name = policy if isinstance(policy, str) else policy.name
    pricing = Pricing(scenario, profiles, slowdowns or {})
    found = price_deployment(pricing, plan) if name == "planned" else resolve_candidates(pricing, options)
    done, used, timeouts = [], {}, 0
    for replication in range(scenario.replications) if replications is None else replications:
        decider = policy if isinstance(policy, Policy) else policy_for(policy, scenario, plan)
        run = _Replication(pricing, found, decider, replicas, replication, sink)
        done.append(run.run())
        used.update(run.used())
        timeouts += run.timeouts
    rent = rental_usd_per_hour(scenario, profiles, replicas)
    return SimResult(scenario, name, scenario.seed, replicas, tuple(done), used, rent, timeouts)


def preemption_of(scenario: Scenario, pool: str, replication: int) -> Preemption | None:
    """How a pool loses its nodes, None if it never does: after exponential times, as a Poisson process takes them.

    Each node has a random stream of its own, so that one node more shifts the lives of no other.
    """
    spec = scenario.pools[pool]
    if not spec.preemptions_per_s:
        return None
    lives: dict[int, np.random.Generator] = {}

    def up_s(node: int) -> float:
        if node not in lives:
            lives[node] = stream(scenario.seed, replication, f"preemption/{pool}/{node}")
        return float(lives[node].exponential(1.0 / spec.preemptions_per_s))

    return Preemption(up_s, spec.replacement_s)


class _CompiledRoute(Route):
    """A candidate as the hot path reads it: pool and devices, GPUs, seconds, bytes, declared work."""

    __slots__ = (
        "cloud_s", "degree", "devices", "down_bytes", "edge_s", "index", "load_s", "model_key", "pool", "priority",
        "up_bytes", "work",
    )  # fmt: skip

    def __init__(
        self, index: int, candidate: Candidate, pool: GpuPool[_RequestJob] | None, devices: EdgeDevices | None
    ) -> None:
        super().__init__(candidate.batch_s)
        self.index, self.pool, self.devices = index, pool, devices
        self.degree, self.cloud_s, self.edge_s = candidate.degree, candidate.cloud_s, candidate.edge_s
        self.up_bytes, self.down_bytes = candidate.cost.bytes_up, candidate.cost.bytes_down
        request = candidate.cost.request
        self.priority, self.model_key = request.priority, 0
        pixels = request.height_px * request.width_px
        self.work = float(request.num_inference_steps * pixels * request.num_images)
        self.load_s: float | None = None
        """Seconds to load the model where the scenario says so; else they are drawn with the request."""


class _RequestJob(PoolJob):
    """A request on its way through its route."""

    __slots__ = ("arrival_s", "class_index", "device_draw", "down_s", "edge_ready_s", "plan_index", "transfer_s")
    route: _CompiledRoute
    """Set when the request is sent; a rejected one has none, and `plan_index` -1."""

    def __init__(self, number: int, class_index: int, arrival_s: float, deadline_s: float, device_draw: float) -> None:
        # PoolJob.__init__ spelt out: this runs once a request, and a call more is a twentieth of its time. What a pool
        # reads of a job besides (work, priority, model, route) is written when the request is sent there.
        self.number, self.deadline_s = number, deadline_s
        self.node = self.plan_index = -1
        self.degree = self.restarts = 0
        self.hold_s = self.load_s = self.lost_gpu_s = self.down_s = self.transfer_s = 0.0
        self.cloud_ready_s = self.cloud_start_s = self.cloud_stop_s = self.edge_ready_s = NAN
        self.class_index, self.arrival_s, self.device_draw = class_index, arrival_s, device_draw
        self.batch = None


class _Replication:
    """One replication: the event loop, its pools and edge devices, and the records that it fills."""

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
        self._scenario, self._profiles, self._policy = scenario, profiles, policy
        self._env = simpy.Environment()
        self._specs = list(scenario.requests.values())
        self._pools: list[GpuPool[_RequestJob]] = [
            GpuPool(
                self._env,
                nodes=nodes,
                gpus_per_node=scenario.pools[name].gpus_per_node,
                discipline=policy.discipline or scenario.pools[name].discipline,
                done=self._leave_cloud,
                resident_models=scenario.pools[name].resident_models,
                cold_start_s=scenario.pools[name].cold_start_s,
                preemption=preemption_of(scenario, name, replication),
                after_s=lambda job: job.down_s + job.route.edge_s,
            )
            for name, nodes in replicas.items()
        ]
        self._fleets = [
            EdgeDevices(spec.replicas, shared=spec.ownership == "shared") for spec in scenario.edge.values()
        ]
        self._telemetry_s = max((pool.telemetry_period_s for pool in scenario.pools.values()), default=0.0)
        self._view = FleetView([pool.view for pool in self._pools])
        self._draws = Draws(scenario, profiles, replication)
        self._arrivals = iter(self._draws)
        self._slo_s = [promises.deadline_s() for promises in scenario.promises.values()]
        self._candidates = RentedCandidates(pricing, options, replicas)
        self._routes: dict[Candidate, _CompiledRoute] = {}
        self._models = sorted({spec.model for spec in self._specs})
        self._open: dict[int, _RequestJob] = {}
        names = (tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge))
        records = Records(*names, (), REASONS, replication)
        # Memory for the mean of the written rates and five standard deviations more; a trace has no written rate.
        mean = sum(spec.arrivals.rate_per_s or 0.0 for spec in self._specs) * scenario.horizon_s
        expected = math.ceil(mean + 5.0 * math.sqrt(mean))
        self._recorder = RunRecorder(records, scenario.horizon_s, sink, expected=expected)
        self._record = self._recorder.write
        self._draws.on_chunk = self._recorder.flush_if_full

    def run(self) -> Records:
        """Run to the horizon, record what is still in flight, check the laws, and return the records."""
        self._number = -1
        self._schedule_arrival()
        self._env.run(until=self._scenario.horizon_s)
        for job in self._open.values():
            self._write(job, IN_FLIGHT, NAN, NAN, NAN, -1)
        records = self._recorder.close()
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
        """Let the policy decide about the request that arrives now, and send it on its way."""
        draw = self._draw
        now, class_index = draw[0], draw[1]
        self._number += 1
        self.timeouts += 1
        job = _RequestJob(self._number, class_index, now, now + self._slo_s[class_index], draw[2])
        options = (
            self._candidates.own[class_index] if draw[8] is None else self._candidates.resized(class_index, draw[8])
        )
        if self._telemetry_s and (tick := now - now % self._telemetry_s) > self._view.as_of_s:
            # the policy sees the pools as they are when the first request after a telemetry tick arrives
            self._view = FleetView([pool.view.copy() for pool in self._pools], tick)
        decision = self._policy.decide(options, job.deadline_s, self._view, now)
        candidate = decision.candidate
        if candidate is None:
            self._write(job, UNSERVED, NAN, NAN, NAN, -1, REASONS.index(decision.reason))
        else:
            job.route = route = self._routes.get(candidate) or self._compile(candidate)
            job.plan_index = route.index
            self._open[job.number] = job
            if route.pool is None:
                self._serve_at_edge(job)
            else:
                _, _, _, half_rtt_s, up_bytes_per_s, down_bytes_per_s, load_s, base_model, _ = draw
                up_s = half_rtt_s + route.up_bytes / up_bytes_per_s
                job.down_s = down_s = half_rtt_s + route.down_bytes / down_bytes_per_s
                job.transfer_s = up_s + down_s
                job.degree, job.hold_s, job.work, job.priority = route.degree, route.cloud_s, route.work, route.priority
                job.load_s = load_s if route.load_s is None else route.load_s
                job.model_key = route.model_key + base_model
                self.timeouts += 2
                Timeout(self._env, up_s, job).callbacks.append(self._reach_pool)
        self._schedule_arrival()

    def _reach_pool(self, event: simpy.Event) -> None:
        job: _RequestJob = event.value  # type: ignore[assignment]
        job.route.pool.submit(job)  # type: ignore[union-attr]

    def _leave_cloud(self, job: _RequestJob) -> None:
        if job.route.devices is None:
            self._finish(job, NAN, NAN, job.cloud_stop_s + job.down_s, -1)
        else:
            self.timeouts += 1
            Timeout(self._env, job.down_s, job).callbacks.append(self._reach_edge)

    def _reach_edge(self, event: simpy.Event) -> None:
        self._serve_at_edge(event.value)  # type: ignore[arg-type]

    def _serve_at_edge(self, job: _RequestJob) -> None:
        route = job.route
        job.edge_ready_s = ready = self._env.now
        device, start = route.devices.serve(  # type: ignore[union-attr]
            ready, route.edge_s, job.device_draw
        )
        stop = start + route.edge_s
        self._finish(job, start, stop, stop, device)

    def _finish(self, job: _RequestJob, edge_start: float, edge_stop: float, finish: float, device: int) -> None:
        del self._open[job.number]
        status = SERVED if finish <= self._scenario.horizon_s else IN_FLIGHT
        self._write(job, status, edge_start, edge_stop, finish, device)

    def _write(
        self,
        job: _RequestJob,
        status: int,
        edge_start: float,
        edge_stop: float,
        finish: float,
        device: int,
        reason: int = -1,
    ) -> None:
        row = (
            job.number, job.class_index, job.plan_index, status, reason, job.arrival_s,
            job.cloud_ready_s, job.cloud_start_s, job.cloud_stop_s, job.edge_ready_s, edge_start, edge_stop, finish,
            job.deadline_s, job.load_s, job.transfer_s, job.node, device,
        )  # fmt: skip
        if job.batch is None and not job.restarts:
            self._record(row)
        else:
            batch_size = 1 if job.batch is None else len(job.batch)
            self._recorder.write_with_history(row, GroupHistory(batch_size, job.restarts, job.lost_gpu_s))

    def _compile(self, candidate: Candidate) -> _CompiledRoute:
        """The route of a candidate that is taken for the first time; its plan is entered in the records."""
        pool = self._pools[candidate.pool_index] if candidate.pool_index >= 0 else None
        devices = self._fleets[candidate.fleet_index] if candidate.fleet_index >= 0 else None
        index = self._recorder.add_plan(plan_facts(self._scenario, self._profiles, candidate))
        route = self._routes[candidate] = _CompiledRoute(index, candidate, pool, devices)
        route.model_key = OTHER_MODELS * self._models.index(candidate.cost.request.model)
        if pool is not None:
            route.load_s = list(self._scenario.pools.values())[candidate.pool_index].model_load_s
        return route
