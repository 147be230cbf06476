"""Observes live runs: profile, serve, profile again; a run whose steps drifted is void.

All loads of a kind are served by the same processes, one after the other, so that the profile behind a run is that of
the very workers. A run is kept as soon as it is done and a sound one is not made again, so that a calibration can be
cut off at any moment.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from executors.calibrate import observed as kept
from executors.calibrate.booking import facts_of, times_of
from executors.calibrate.drive import Sent, drive_loadgen, replay_trace
from executors.calibrate.observed import Observed
from executors.calibrate.profiled import Profile, drift, write_profile
from executors.calibrate.rehearse import PROMPT, WARMUP_RUNS, Crews, Rehearsal, alone, rehearse
from executors.calibrate.replay import drawn_links
from executors.calibrate.setting import (
    REQUEST_CLASS,
    SLO_LATENCIES,
    Kind,
    balanced_switch_step,
    bottleneck_s,
    candidate_of,
    deployment_of,
    scenario_of,
    trace_arrivals,
)
from executors.calibrate.site import serving, working
from executors.calibrate.testbed import CLOUD, EDGE, Testbed
from executors.live.client import Ask, Client, Outcome
from executors.live.shaping import Link
from executors.live.work import Settings
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.traces import Trace

Say = Callable[[str], None]
FEWEST_REHEARSED = 24
"""Requests of a rehearsal, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How runs are made: seconds for which the workers are profiled, and the drift that voids a run.

    `trace` gives the arrivals their shape; None means Poisson arrivals from LoadGen.
    """

    profile_s: float = 12.0
    drift_limit: float = 0.01
    seed: int = 1
    trace: Trace | None = None


async def observe(
    kind: Kind, requests: Mapping[float, int], testbed: Testbed, out: Path, protocol: Protocol, say: Say
) -> None:
    """Run a kind once at every load of which no sound run is there yet, and keep the runs in `out`.

    `requests` are those of each load. Of several void runs the one that drifted least is kept.
    """
    before = {load: _kept(kind, load, out) for load in requests}
    todo = [load for load, run in before.items() if run is None or run.void]
    if not todo:
        return
    catalogue = load_profiles(testbed.profiles)
    middle = kind.num_inference_steps // 2
    deployment = deployment_of(kind, _endless(kind, protocol.seed), catalogue, switch_step=middle)
    say(f"{kind.name}: loading the models")
    async with working(deployment, testbed) as crews:
        bench = _Bench(kind, crews, catalogue, protocol, say)
        await bench.settle(deployment)
        for load in todo:
            run = await bench.observe(load, requests[load], out / "logs" / kept.name_of(kind.name, load))
            _keep(before[load], run, out)


def _kept(kind: Kind, load: float, out: Path) -> Observed | None:
    path = out / f"{kept.name_of(kind.name, load)}.json"
    return kept.load(path) if path.is_file() else None


def _keep(before: Observed | None, run: Observed, out: Path) -> None:
    """Keep the run of the two that drifted less; it counts the tries of both."""
    tries = 1 + (0 if before is None else before.tries)
    best = run if before is None or run.drift < before.drift else before
    write_profile(best.rows, out / "profiles" / best.name, warmup_runs=WARMUP_RUNS)
    kept.save(replace(best, tries=tries), out)


def _endless(kind: Kind, seed: int) -> Scenario:
    """A request a second for as long as anybody asks: for whatever does not depend on when requests arrive."""
    return scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1e6, seed=seed)


class _Bench:
    """The workers of one kind, the plan that suits them, and what was last known of their costs."""

    def __init__(self, kind: Kind, crews: Crews, catalogue: Profiles, protocol: Protocol, say: Say) -> None:
        self.kind, self.crews, self.catalogue, self.protocol, self.say = kind, crews, catalogue, protocol, say
        self.settings = Settings()
        self.scenario = _endless(kind, protocol.seed)
        self.deployment: Deployment
        self.known: Profiles

    async def settle(self, deployment: Deployment) -> None:
        """Choose the switch step from the workers alone."""
        first = await alone(self.crews, self.scenario, deployment, self.settings)
        step = balanced_switch_step(self.kind, self.catalogue.with_costs(first.rows))
        self.deployment = deployment_of(self.kind, self.scenario, self.catalogue, switch_step=step)
        self.known = self.catalogue.with_costs(
            (await alone(self.crews, self.scenario, self.deployment, self.settings)).rows
        )

    def _serving(self, scenario: Scenario, profiles: Profiles) -> AbstractAsyncContextManager[Client]:
        return serving(self.crews, scenario, self.deployment, profiles, self.settings)

    async def _rehearse(self, client: Client, rate_per_s: float, seed: int) -> Profile:
        """What requests take at that rate; those of another seed than the run's."""
        count = max(FEWEST_REHEARSED, math.ceil(self.protocol.profile_s * rate_per_s))
        draws = np.random.default_rng(seed)
        arrivals_s: list[float] = np.cumsum(draws.exponential(1.0 / rate_per_s, count)).tolist()
        links = self._links(self.known, count, seed)
        cost = candidate_of(self.scenario, self.deployment, self.known).cost
        rehearsal = Rehearsal(arrivals_s=arrivals_s, links=links, cost=cost)
        return await rehearse(client, self.crews, self.scenario, self.deployment, rehearsal)

    async def observe(self, load: float, count: int, logs: Path) -> Observed:
        """Serve `count` requests at a load of the last profile, and profile again."""
        rate_per_s = load / bottleneck_s(candidate_of(self.scenario, self.deployment, self.known))
        seed = self._seed(load)
        async with self._serving(self.scenario, self.known) as client:
            before = await self._rehearse(client, rate_per_s, seed + 1)
        self.known = profiles = self.catalogue.with_costs(before.rows)
        candidate = candidate_of(self.scenario, self.deployment, profiles)
        rate_per_s = load / bottleneck_s(candidate)
        name = kept.name_of(self.kind.name, load)
        scenario = scenario_of(
            self.kind,
            arrivals=trace_arrivals(Path(f"{name}.csv")),
            span_s=2.0 * count / rate_per_s,
            seed=seed,
            slo_s=round(SLO_LATENCIES * candidate.latency_s, 3),
        )
        self.say(f"{name}: {count} requests in {count / rate_per_s:.0f} s")
        async with self._serving(scenario, profiles) as client:
            sent = await self._drive(client, self._links(profiles, count, seed), rate_per_s, seed, logs)
            after = await self._rehearse(client, rate_per_s, seed + 2)
        drifted = drift(before.step_median_s, after.step_median_s)
        void = " (void)" if drifted > self.protocol.drift_limit else ""
        self.say(f"{name}: {count} requests served, steps drifted by {drifted:.2%}{void}")
        return Observed(
            kind=self.kind.name,
            load=load,
            rate_per_s=rate_per_s,
            driver="trace" if self.protocol.trace else "mlcommons-loadgen",
            scenario=scenario,
            deployment=self.deployment,
            rows=before.rows,
            stack_s=before.stack_s,
            step_before_s=before.step_median_s,
            step_during_s=_steps(sent),
            step_after_s=after.step_median_s,
            drift=drifted,
            drift_limit=self.protocol.drift_limit,
            facts=facts_of(sent, scenario, self.deployment, profiles),
            times_s=times_of(sent),
            late_s=np.array([one.late_s for one in sent]),
        )

    def _links(self, profiles: Profiles, count: int, seed: int) -> list[Link | None]:
        """Each request's own link; none for requests that cross no network."""
        if not self.kind.in_cloud:
            return [None] * count
        return [*drawn_links(_endless(self.kind, seed), profiles, count)]

    def _seed(self, load: float) -> int:
        """A seed of its own for every kind and load: no two runs have the same gaps between arrivals."""
        return 10 * zlib.crc32(f"{self.protocol.seed} {self.kind.name} {load:g}".encode())

    async def _drive(
        self, client: Client, links: Sequence[Link | None], rate_per_s: float, seed: int, logs: Path
    ) -> list[Sent[Outcome]]:
        async def send(number: int, arrival_s: float) -> Outcome:
            return await client.ask(replace(_ask(f"r{number}", number, links[number]), arrival_s=arrival_s))

        if self.protocol.trace is not None:
            return await replay_trace(_scaled(self.protocol.trace, len(links), rate_per_s), send)
        return await drive_loadgen(rate_per_s, len(links), send, logs=logs, seed=seed)


def _ask(name: str, seed: int, link: Link | None) -> Ask:
    return Ask(id=name, request_class=REQUEST_CLASS, prompt=PROMPT, seed=seed, link=link)


def _scaled(trace: Trace, count: int, rate_per_s: float) -> list[float]:
    """The first arrivals of a trace at another rate, begun anew where it ends."""
    gaps = np.resize(np.diff(trace.arrival_s), count - 1)
    found: list[float] = np.cumsum(np.append(0.0, gaps * ((count - 1) / rate_per_s / gaps.sum()))).tolist()
    return found


def _steps(sent: Sequence[Sent[Outcome]]) -> dict[str, float]:
    """The median step of each device while it served."""
    by_device = {
        CLOUD: [second for one in sent for second in one.answer.cloud_step_s],
        EDGE: [second for one in sent for second in one.answer.edge_step_s],
    }
    return {device: median(seconds) for device, seconds in by_device.items() if seconds}
