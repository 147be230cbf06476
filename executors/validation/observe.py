"""Observes live runs in parts of some seconds, between which the pace of the workers is taken.

The pace is the median step of workers that do one task after the other while no requests are about. Machines that
others share change theirs within a minute. So what requests cost is measured in a rehearsal, its rows are brought to
the pace just before each part, and a part whose workers have another pace behind it is void: its rows do not stand for
it, and it has to be made again. The pace after a part is the one before the next, but after a void one it is waited
until the pace is steady. All loads of a kind are served by the same processes, so that the profile behind a part is
that of the very workers. A part is kept as soon as it is done, so that a validation can be cut off at any moment and
goes on where it was.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from statistics import median

import numpy as np

from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment
from hybridsd_sim.profiles import Profiles, load_profiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.workload import Trace

from ..live import Client, ClientRequest, Link, RequestOutcome, ServiceSettings
from . import recording
from .cost_rows import WorkerProfile, drift, write_profile
from .load import SentRequest, drive_loadgen, replay_trace, trace_piece
from .recording import ObservedPart, draw_links, facts_of, times_of
from .rehearse import (
    PROMPT,
    WARMUP_RUNS,
    ProcessPools,
    Rehearsal,
    measure_pace,
    open_client,
    rehearse,
    start_workers,
    time_alone,
)
from .testbed import (
    CLOUD,
    EDGE,
    REQUEST_CLASS,
    SLO_LATENCIES,
    ServingKind,
    Testbed,
    balanced_switch_step,
    bottleneck_s,
    candidate_of,
    deployment_of,
    scenario_of,
    trace_arrivals,
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationProtocol:
    """How runs are made: seconds of a part, of a rehearsal and of taking the pace, and the drift that voids a part.

    A rehearsal has `fewest_rehearsed` requests or more, and is made anew, up to `rehearsals` times, if the pace drifted
    around it. All parts of a run together have `attempts` for each sound one that is wanted. `patience` is how often
    the pace is taken until two in a row agree; then things go on all the same. `trace` gives the arrivals their shape;
    None means Poisson arrivals from LoadGen.
    """

    part_s: float = 10.0
    rehearsal_s: float = 20.0
    pace_s: float = 3.0
    drift_limit: float = 0.01
    fewest_rehearsed: int = 24
    rehearsals: int = 3
    attempts: int = 6
    patience: int = 12
    seed: int = 1
    trace: Trace | None = None

    @property
    def driver(self) -> str:
        """What sends the requests."""
        return "trace" if self.trace else "mlcommons-loadgen"


async def observe(
    kind: ServingKind,
    requests: Mapping[float, int],
    testbed: Testbed,
    out: Path,
    protocol: ObservationProtocol,
    say: Say,
) -> None:
    """Serve a kind at every load as many requests as the sound parts in `out` lack of the `requests` of that load.

    What is void of it has to be made again. Raises `InputError` if another driver sent the requests in `out`.
    """
    before: dict[float, list[ObservedPart]] = {load: [] for load in requests}
    for part in recording.find(out):
        if part.kind == kind.name and part.load in before:
            if part.driver != protocol.driver:
                rule = f"was driven by {part.driver}, not by {protocol.driver}"
                raise InputError(Problem(str(out / part.name), "a part of a run", rule, "Name another folder."))
            before[part.load].append(part)
    todo = [load for load, parts in before.items() if missing_requests(requests[load], parts)]
    if not todo:
        return
    catalogue = load_profiles(testbed.profiles)
    middle = kind.num_inference_steps // 2
    deployment = deployment_of(kind, _endless(kind, protocol.seed), catalogue, switch_step=middle)
    say(f"{kind.name}: loading the models")
    async with start_workers(deployment, testbed) as pools:
        observer = RunObserver(kind, pools, catalogue, protocol, out, say)
        await observer.settle(deployment, next((part.deployment for parts in before.values() for part in parts), None))
        for load in todo:
            await observer.serve(load, requests[load], before[load])


def missing_requests(wanted: int, parts: Iterable[ObservedPart]) -> int:
    """Requests that sound parts do not have yet."""
    return max(0, wanted - _served(parts))


def _served(parts: Iterable[ObservedPart]) -> int:
    """Requests of the sound parts."""
    return sum(len(part.late_s) for part in parts if not part.void)


def _endless(kind: ServingKind, seed: int) -> Scenario:
    """A request a second for as long as anybody asks: for whatever does not depend on when requests arrive."""
    return scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1e6, seed=seed)


class RunObserver:
    """The workers of one kind, the plan that suits them, and what was last known of their costs."""

    def __init__(
        self,
        kind: ServingKind,
        pools: ProcessPools,
        catalogue: Profiles,
        protocol: ObservationProtocol,
        out: Path,
        say: Say,
    ) -> None:
        self.kind, self.pools, self.catalogue = kind, pools, catalogue
        self.protocol, self.out, self.say = protocol, out, say
        self.settings = ServiceSettings()
        self.scenario = _endless(kind, protocol.seed)
        self.deployment: Deployment
        self.known: Profiles

    async def settle(self, deployment: Deployment, before: Deployment | None) -> None:
        """Time the workers alone, and choose the switch step by that unless parts `before` have one."""
        if before is None:
            first = await time_alone(self.pools, self.scenario, deployment, self.settings)
            step = balanced_switch_step(self.kind, self.catalogue.with_costs(first.rows))
            before = deployment_of(self.kind, self.scenario, self.catalogue, switch_step=step)
        self.deployment = before
        alone_now = await time_alone(self.pools, self.scenario, self.deployment, self.settings)
        self.known = self.catalogue.with_costs(alone_now.rows)

    def _serving(self, scenario: Scenario, profiles: Profiles) -> AbstractAsyncContextManager[Client]:
        return open_client(self.pools, scenario, self.deployment, profiles, self.settings)

    async def rehearse_load(self, rate_per_s: float, seed: int) -> WorkerProfile:
        """What requests take at that rate; those of another seed than any part's."""
        count = max(self.protocol.fewest_rehearsed, math.ceil(self.protocol.rehearsal_s * rate_per_s))
        draws = np.random.default_rng(seed)
        arrivals_s: list[float] = np.cumsum(draws.exponential(1.0 / rate_per_s, count)).tolist()
        links = self._links(self.known, count, seed)
        cost = candidate_of(self.scenario, self.deployment, self.known).cost
        rehearsal = Rehearsal(arrivals_s=arrivals_s, links=links, cost=cost)
        async with self._serving(self.scenario, self.known) as client:
            return await rehearse(client, self.pools, self.scenario, self.deployment, rehearsal)

    async def serve(self, load: float, wanted: int, parts: Sequence[ObservedPart]) -> None:
        """Serve what a run misses after its `parts`, in further parts of about the same length.

        A void part is tried again as long as there are attempts.
        """
        profile, before = await self._rehearsed_profile(load)
        folder = self.out / "profiles" / recording.name_of(self.kind.name, load)
        write_profile(profile.rows, folder, warmup_runs=WARMUP_RUNS)
        more = math.ceil(missing_requests(wanted, parts) / self._rate(load) / self.protocol.part_s)
        count = math.ceil(missing_requests(wanted, parts) / more)
        done, part = list(parts), None
        for _ in range(self.protocol.attempts * more):
            if part is not None:
                before = await self._steady_pace() if part.void else part.step_after_s
            part = await self.observe_part(load, done, count, profile.at(before))
            recording.save(part, self.out)
            done.append(part)
            if not missing_requests(wanted, done):
                return
        self.say(
            f"{recording.name_of(self.kind.name, load)}: given up for now, "
            f"{missing_requests(wanted, done)} requests are missing"
        )

    async def _rehearsed_profile(self, load: float) -> tuple[WorkerProfile, Mapping[str, float]]:
        """What is measured in a rehearsal, at the mean of the paces around it, and the pace just now."""
        tried: list[tuple[float, WorkerProfile]] = []
        after: Mapping[str, float] = {}
        for number in range(self.protocol.rehearsals):
            before = await self._steady_pace()
            rehearsed = await self.rehearse_load(self._rate(load), self._seed(load, -number))
            after = await self.take_pace()
            mean = {device: (before[device] + after[device]) / 2.0 for device in before}
            tried.append((drift(before, after), replace(rehearsed, pace=mean)))
            if tried[-1][0] <= self.protocol.drift_limit:
                break
        drifted, profile = min(tried, key=itemgetter(0))
        self.say(f"{recording.name_of(self.kind.name, load)}: rehearsed, steps drifted by {drifted:.2%}")
        return profile, after

    async def _steady_pace(self) -> Mapping[str, float]:
        """The pace, as soon as it is the same twice in a row."""
        last = await self.take_pace()
        for _ in range(1, self.protocol.patience):
            before, last = last, await self.take_pace()
            if drift(before, last) <= self.protocol.drift_limit:
                return last
        self.say(f"{self.kind.name}: steps do not get steady")
        return last

    async def take_pace(self) -> Mapping[str, float]:
        return await measure_pace(self.pools, self.scenario, self.deployment, self.settings, self.protocol.pace_s)

    def _rate(self, load: float) -> float:
        """Requests a second that make this load, by what is known now."""
        return load / bottleneck_s(candidate_of(self.scenario, self.deployment, self.known))

    async def observe_part(
        self, load: float, done: Sequence[ObservedPart], count: int, profile: WorkerProfile
    ) -> ObservedPart:
        """The part of `count` requests after those that are `done`, by the profile at the pace before it."""
        profiles = self.known = self.catalogue.with_costs(profile.rows)
        number = 1 + max((part.part for part in done), default=0)
        rate_per_s, seed = self._rate(load), self._seed(load, number)
        name = f"{recording.name_of(self.kind.name, load)}-{number}"
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
            sent = await self._drive(client, links, rate_per_s, _served(done), seed, self.out / "logs" / name)
        after = await self.take_pace()
        drifted = drift(profile.pace, after)
        void = " (void)" if drifted > self.protocol.drift_limit else ""
        self.say(f"{name}: {count} requests served, steps drifted by {drifted:.2%}{void}")
        return ObservedPart(
            kind=self.kind.name,
            load=load,
            part=number,
            rate_per_s=rate_per_s,
            driver=self.protocol.driver,
            scenario=scenario,
            deployment=self.deployment,
            rows=profile.rows,
            stack_s=profile.stack_s,
            step_before_s=profile.pace,
            step_during_s=_median_steps(sent),
            step_after_s=after,
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
        return [*draw_links(_endless(self.kind, seed), profiles, count)]

    def _seed(self, load: float, number: int) -> int:
        """A seed of its own for every part of every run: no two have the same gaps between arrivals."""
        return zlib.crc32(f"{self.protocol.seed} {self.kind.name} {load:g} {number}".encode())

    async def _drive(
        self, client: Client, links: Sequence[Link | None], rate_per_s: float, first: int, seed: int, logs: Path
    ) -> list[SentRequest[RequestOutcome]]:
        async def send(number: int, arrival_s: float) -> RequestOutcome:
            request = ClientRequest(
                id=f"r{number}", request_class=REQUEST_CLASS, prompt=PROMPT, seed=number, link=links[number],
                arrival_s=arrival_s,
            )  # fmt: skip
            return await client.ask(request)

        if self.protocol.trace is not None:
            return await replay_trace(trace_piece(self.protocol.trace, first, len(links), rate_per_s), send)
        return await drive_loadgen(rate_per_s, len(links), send, logs=logs, seed=seed)


def _median_steps(sent: Sequence[SentRequest[RequestOutcome]]) -> dict[str, float]:
    """The median step of each device while it served."""
    by_device = {
        CLOUD: [second for one in sent for second in one.answer.cloud_step_s],
        EDGE: [second for one in sent for second in one.answer.edge_step_s],
    }
    return {device: median(seconds) for device, seconds in by_device.items() if seconds}
