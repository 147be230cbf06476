"""Times what requests ask of their workers before a run, on the very workers that will serve it.

First each worker alone, which is enough to choose a switch step and to price the plan. Then in a rehearsal: other
requests, at random times of the same rate as in the run, through the same service. That way a task's seconds hold what
cold caches, client, service and the other workers cost a worker at this load, and still nothing of the run itself. The
pace, last, tells in a few seconds how fast the workers are just now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from executors.calibrate.drive import replay_trace
from executors.calibrate.profiled import Held, Profile, device_of, profile_of
from executors.calibrate.setting import REQUEST_CLASS, plan_of
from executors.live.client import Ask, Client, Outcome
from executors.live.crew import Crew, OnStep
from executors.live.shaping import Link
from executors.live.tasks import Done, Gang, Task
from executors.live.work import Settings
from executors.timing import LEAST_RUNS
from hybridsd_sim.errors import RunError
from hybridsd_sim.parts import PlanCost
from hybridsd_sim.plan import Deployment, Stage
from hybridsd_sim.scenario import Scenario

PROMPT = "a lighthouse at dusk"
WARMUP_RUNS = 4
_CLOUD, _EDGE = "cloud/0", "edge/0"


@dataclass(frozen=True, slots=True)
class Seen:
    """A task that a worker did, and when it was given to it."""

    given_s: float
    done: Done


class WatchedCrew(Crew):
    """A crew that remembers what its workers did, as long as `seen` is a list."""

    seen: list[Seen] | None = None

    async def run(self, worker: str, task: Task, *, on_step: OnStep | None = None) -> Done:
        given_s = time.monotonic()
        done = await super().run(worker, task, on_step=on_step)
        if self.seen is not None:
            self.seen.append(Seen(given_s, done))
        return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The requests of a rehearsal: seconds of their arrivals, their links (None crosses no network), their price."""

    arrivals_s: Sequence[float]
    links: Sequence[Link | None]
    cost: PlanCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Crews:
    """The workers of a calibration, of which the cloud's are `gangs`: one there, one at the edge, or one of them."""

    cloud: WatchedCrew
    edge: WatchedCrew
    gangs: tuple[Gang, ...]

    def of(self, stage: Stage) -> tuple[WatchedCrew, str]:
        """The crew and the worker that do a stage."""
        return (self.cloud, _CLOUD) if stage.site.tier == "cloud" else (self.edge, _EDGE)


async def pace(
    crews: Crews, scenario: Scenario, deployment: Deployment, settings: Settings, for_s: float
) -> dict[str, float]:
    """The median step of each device while all workers do one task after the other and no requests are about."""
    begun, tasks = None, {}
    for stage in plan_of(deployment).stages:
        tasks[device_of(stage)] = (*crews.of(stage), _task(scenario, stage, begun, settings))
        begun = (await _next(*tasks[device_of(stage)])).payload
    until_s = time.monotonic() + for_s
    step_s = await asyncio.gather(*[_steps(*task, until_s) for task in tasks.values()])
    return {device: median(seconds) for device, seconds in zip(tasks, step_s, strict=True)}


async def _steps(crew: Crew, worker: str, task: Task, until_s: float) -> list[float]:
    """Seconds of the steps of a task that is done again and again."""
    found: list[float] = []
    while not found or time.monotonic() < until_s:
        found += (await _next(crew, worker, task)).step_s
    return found


async def _next(crew: Crew, worker: str, task: Task) -> Done:
    return await crew.run(worker, replace(task, key=f"pace/{time.monotonic_ns()}"))


async def alone(crews: Crews, scenario: Scenario, deployment: Deployment, settings: Settings) -> Profile:
    """A few tasks of each worker, one worker after the other, with nothing else to do."""
    plan, begun, held = plan_of(deployment), None, []
    for stage in plan.stages:
        crew, worker = crews.of(stage)
        task = _task(scenario, stage, begun, settings)
        tasks = (replace(task, key=f"alone/{number}", seed=number) for number in range(WARMUP_RUNS + LEAST_RUNS))
        done = [await crew.run(worker, one) for one in tasks][WARMUP_RUNS:]
        held.append([Held(one, one.stop_s - one.start_s) for one in done])
        begun = done[0].payload
    return profile_of(scenario, plan, held, "worker alone")


def _task(scenario: Scenario, stage: Stage, begun: bytes | None, settings: Settings) -> Task:
    spec = scenario.requests[REQUEST_CLASS]
    return Task(
        key="", model=stage.model, prompt=PROMPT, height_px=spec.height_px, width_px=spec.width_px,
        num_inference_steps=spec.num_inference_steps, guidance_scale=spec.guidance_scale, sampler=spec.sampler,
        stop=stage.stop, begun=begun, decode=stage.stop == spec.num_inference_steps, payload=settings.payload,
        checkpoint_every=settings.checkpoint_every,
    )  # fmt: skip


async def rehearse(
    client: Client, crews: Crews, scenario: Scenario, deployment: Deployment, rehearsal: Rehearsal
) -> Profile:
    """Serve other requests at the load of the run, and see what workers do and what the machine adds to the network."""
    plan = plan_of(deployment)
    for number in range(WARMUP_RUNS):
        await _ask(client, number)
    watched = [crews.of(stage)[0] for stage in plan.stages]
    for crew in watched:
        crew.seen = []
    try:
        sent = await replay_trace(rehearsal.arrivals_s, lambda number, _: _ask(client, number, rehearsal.links[number]))
        seen = [list(crew.seen or ()) for crew in watched]
    finally:
        for crew in watched:
            crew.seen = None
    found = profile_of(scenario, plan, [list(held(tasks)) for tasks in seen], "served at the load of the run")
    return replace(found, stack_s=_added_by_the_machine([one.answer for one in sent], rehearsal))


def _added_by_the_machine(outcomes: Sequence[Outcome], rehearsal: Rehearsal) -> float:
    """Median seconds for which requests are in nobody's hands beyond what the model of their links says."""
    cost = rehearsal.cost
    modelled_s = [
        0.0 if link is None else link.up_s(cost.bytes_up) + link.down_s(cost.bytes_down) for link in rehearsal.links
    ]
    return max(0.0, median(outcome.transfer_s - s for outcome, s in zip(outcomes, modelled_s, strict=True)))


async def _ask(client: Client, seed: int, link: Link | None = None) -> Outcome:
    name = f"p{time.monotonic_ns()}"
    outcome = await client.ask(Ask(id=name, request_class=REQUEST_CLASS, prompt=PROMPT, seed=seed, link=link))
    if outcome.status != "served":
        raise RunError(f"a request of the profile was not served: {outcome.reason} {outcome.words}".rstrip())
    return outcome


def held(tasks: Iterable[Seen]) -> Iterator[Held]:
    """For how long each task held its worker: where the next one waited for it already, until that one began.

    Where none waited, to its own end, and then as long as a worker usually takes from one task to the next.
    """
    ordered = sorted(tasks, key=lambda seen: seen.done.start_s)
    pauses = {a.done.start_s: b.done.start_s - a.done.stop_s for a, b in pairwise(ordered) if b.given_s < a.done.stop_s}
    usual_s = median(pauses.values()) if pauses else 0.0
    for seen in ordered:
        done = seen.done
        yield Held(done, done.stop_s - done.start_s + pauses.get(done.start_s, usual_s))
