"""Observes live runs in parts: profile, serve, profile again; a part whose steps drifted is void and made again.

Parts are a minute long, because machines that others share seldom keep their pace for longer; and so are the profiles,
because the median of a few hundred steps is itself uncertain by half a per cent. The profile after a part is the one
before the next. All loads of a kind are served by the same processes, so that the profile behind a part is that of the
very workers. A part is kept as soon as it is done, so that a calibration can be cut off at any moment and goes on where
it was.
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
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.traces import Trace

Say = Callable[[str], None]
FEWEST_REHEARSED = 24
"""Requests of a rehearsal, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How runs are made: seconds of a part and of the profiles around it, and the drift that voids a part.

    `trace` gives the arrivals their shape; None means Poisson arrivals from LoadGen.
    """

    part_s: float = 60.0
    profile_s: float = 60.0
    drift_limit: float = 0.01
    seed: int = 1
    trace: Trace | None = None

    @property
    def driver(self) -> str:
        """What sends the requests."""
        return "trace" if self.trace else "mlcommons-loadgen"


async def observe(
    kind: Kind, requests: Mapping[float, int], testbed: Testbed, out: Path, protocol: Protocol, say: Say
) -> None:
    """Serve a kind at every load as many requests as the sound parts in `out` lack of the `requests` of that load.

    What is void of it has to be made again. Raises `InputError` if another driver sent the requests in `out`.
    """
    before = {load: _kept(kind, load, out, protocol) for load in requests}
    todo = [load for load, parts in before.items() if _missing(requests[load], parts)]
    if not todo:
        return
    catalogue = load_profiles(testbed.profiles)
    middle = kind.num_inference_steps // 2
    deployment = deployment_of(kind, _endless(kind, protocol.seed), catalogue, switch_step=middle)
    say(f"{kind.name}: loading the models")
    async with working(deployment, testbed) as crews:
        bench = _Bench(kind, crews, catalogue, protocol, say)
        await bench.settle(deployment, next((part.deployment for parts in before.values() for part in parts), None))
        for load in todo:
            number = 1 + max((part.part for part in before[load]), default=0)
            await bench.serve(load, _missing(requests[load], before[load]), number, out)


def _kept(kind: Kind, load: float, out: Path, protocol: Protocol) -> list[Observed]:
    """The parts that `out` holds of a run."""
    mine = [part for part in kept.find(out) if (part.kind, part.load) == (kind.name, load)]
    for part in mine:
        if part.driver != protocol.driver:
            rule = f"was driven by {part.driver}, not by {protocol.driver}"
            raise InputError(Problem(str(out / part.name), "a part of a run", rule, "Name another folder."))
    return mine


def _missing(wanted: int, parts: Sequence[Observed]) -> int:
    """Requests that sound parts do not have yet."""
    return max(0, wanted - sum(len(part.late_s) for part in parts if not part.void))


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

    async def settle(self, deployment: Deployment, before: Deployment | None) -> None:
        """Time the workers alone, and choose the switch step by that unless parts `before` have one."""
        if before is None:
            first = await alone(self.crews, self.scenario, deployment, self.settings)
            step = balanced_switch_step(self.kind, self.catalogue.with_costs(first.rows))
            before = deployment_of(self.kind, self.scenario, self.catalogue, switch_step=step)
        self.deployment = before
        alone_now = await alone(self.crews, self.scenario, self.deployment, self.settings)
        self.known = self.catalogue.with_costs(alone_now.rows)

    def _serving(self, scenario: Scenario, profiles: Profiles) -> AbstractAsyncContextManager[Client]:
        return serving(self.crews, scenario, self.deployment, profiles, self.settings)

    async def _rehearse(self, client: Client, rate_per_s: float, seed: int) -> Profile:
        """What requests take at that rate; those of another seed than any part's."""
        count = max(FEWEST_REHEARSED, math.ceil(self.protocol.profile_s * rate_per_s))
        draws = np.random.default_rng(seed)
        arrivals_s: list[float] = np.cumsum(draws.exponential(1.0 / rate_per_s, count)).tolist()
        links = self._links(self.known, count, seed)
        cost = candidate_of(self.scenario, self.deployment, self.known).cost
        rehearsal = Rehearsal(arrivals_s=arrivals_s, links=links, cost=cost)
        return await rehearse(client, self.crews, self.scenario, self.deployment, rehearsal)

    async def serve(self, load: float, missing: int, number: int, out: Path) -> None:
        """Serve the requests that a run misses, in parts of about the same length, the first of which is `number`."""
        async with self._serving(self.scenario, self.known) as client:
            before = await self._rehearse(client, self._rate(load), self._seed(load, 0))
        parts = max(1, round(missing / self._rate(load) / self.protocol.part_s))
        for each in range(number, number + parts):
            self.known = self.catalogue.with_costs(before.rows)
            part, before = await self._observe(load, each, math.ceil(missing / parts), before, out)
            kept.save(part, out)
            if not part.void:
                write_profile(part.rows, out / "profiles" / kept.name_of(part.kind, load), warmup_runs=WARMUP_RUNS)

    def _rate(self, load: float) -> float:
        """Requests a second that make this load, by what is known now."""
        return load / bottleneck_s(candidate_of(self.scenario, self.deployment, self.known))

    async def _observe(
        self, load: float, number: int, count: int, before: Profile, out: Path
    ) -> tuple[Observed, Profile]:
        """One part of `count` requests, and the profile after it."""
        profiles, rate_per_s, seed = self.known, self._rate(load), self._seed(load, number)
        name = f"{kept.name_of(self.kind.name, load)}-{number}"
        scenario = scenario_of(
            self.kind,
            arrivals=trace_arrivals(Path(f"{name}.csv")),
            span_s=2.0 * count / rate_per_s,
            seed=seed,
            slo_s=round(SLO_LATENCIES * candidate_of(self.scenario, self.deployment, profiles).latency_s, 3),
        )
        self.say(f"{name}: {count} requests in {count / rate_per_s:.0f} s")
        async with self._serving(scenario, profiles) as client:
            links = self._links(profiles, count, seed)
            sent = await self._drive(client, links, rate_per_s, number, seed, out / "logs" / name)
            after = await self._rehearse(client, rate_per_s, seed + 1)
        drifted = drift(before.step_median_s, after.step_median_s)
        void = " (void)" if drifted > self.protocol.drift_limit else ""
        self.say(f"{name}: {count} requests served, steps drifted by {drifted:.2%}{void}")
        part = Observed(
            kind=self.kind.name,
            load=load,
            part=number,
            rate_per_s=rate_per_s,
            driver=self.protocol.driver,
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
        return part, after

    def _links(self, profiles: Profiles, count: int, seed: int) -> list[Link | None]:
        """Each request's own link; none for requests that cross no network."""
        if not self.kind.in_cloud:
            return [None] * count
        return [*drawn_links(_endless(self.kind, seed), profiles, count)]

    def _seed(self, load: float, number: int) -> int:
        """A seed of its own for every part of every run: no two have the same gaps between arrivals."""
        return 10 * zlib.crc32(f"{self.protocol.seed} {self.kind.name} {load:g} {number}".encode())

    async def _drive(
        self, client: Client, links: Sequence[Link | None], rate_per_s: float, part: int, seed: int, logs: Path
    ) -> list[Sent[Outcome]]:
        async def send(number: int, arrival_s: float) -> Outcome:
            return await client.ask(replace(_ask(f"r{number}", number, links[number]), arrival_s=arrival_s))

        if self.protocol.trace is not None:
            return await replay_trace(_scaled(self.protocol.trace, part, len(links), rate_per_s), send)
        return await drive_loadgen(rate_per_s, len(links), send, logs=logs, seed=seed)


def _ask(name: str, seed: int, link: Link | None) -> Ask:
    return Ask(id=name, request_class=REQUEST_CLASS, prompt=PROMPT, seed=seed, link=link)


def _scaled(trace: Trace, part: int, count: int, rate_per_s: float) -> list[float]:
    """The arrivals of a part of `count` requests, from where the part before ended in a trace that begins anew.

    The trace as a whole has the rate; a part is as busy as its piece of it. Raises `InputError` where all arrive at
    once, which is no rate.
    """
    gaps = np.diff(trace.arrival_s)
    if not gaps.sum() > 0.0:
        raise InputError(Problem("--trace", f"{len(trace)} requests", "has two that arrive at different times"))
    mine = np.resize(np.roll(gaps, (1 - part) * count), count - 1) / (gaps.mean() * rate_per_s)
    found: list[float] = np.cumsum(np.append(0.0, mine)).tolist()
    return found


def _steps(sent: Sequence[Sent[Outcome]]) -> dict[str, float]:
    """The median step of each device while it served."""
    by_device = {
        CLOUD: [second for one in sent for second in one.answer.cloud_step_s],
        EDGE: [second for one in sent for second in one.answer.edge_step_s],
    }
    return {device: median(seconds) for device, seconds in by_device.items() if seconds}
