"""The workers as the scheduler must know them: it is told who came up and who went down before every decision."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from executors.live.crew import Crew
from executors.live.tasks import Gang
from hybridsd_sim.events import WorkerDown, WorkerUp
from hybridsd_sim.plan import Request, Stage
from hybridsd_sim.policies import Decision
from hybridsd_sim.scheduler import Scheduler

_POLL_S = 0.05


class Roster:
    """A crew and its scheduler. Workers that are lost come back by themselves, so that waiting for them is sensible.

    `gangs` are the crew's. Without them a worker is what the scheduler was made with, and does whatever its pool does.
    """

    def __init__(self, scheduler: Scheduler, crew: Crew, gangs: Sequence[Gang] = ()) -> None:
        self.scheduler = scheduler
        self.crew = crew
        self._gangs = {gang.name: gang for gang in gangs}
        known = scheduler.workers(time.monotonic())
        self._told = {worker.name for worker in known}
        self._places = {worker.name: (worker.pool, worker.gpus) for worker in known}
        self._places |= {gang.name: (gang.pool, gang.degree) for gang in gangs}

    @property
    def complete(self) -> bool:
        """Whether every worker is up."""
        return self._places.keys() <= set(self.crew.up())

    def decide(self, request: Request, now: float) -> Decision:
        """The scheduler's decision, on the workers that are up now."""
        self._tell(now)
        return self.scheduler.decide(request, None, now)

    def weigh(self, request: Request, now: float) -> Decision:
        """What `decide` would answer; changes nothing in the ledger."""
        self._tell(now)
        return self.scheduler.weigh(request, None, now).decision

    def _tell(self, now: float) -> None:
        up = set(self.crew.up())
        for name in self._told - up:
            self.scheduler.observe(WorkerDown(name, now))
        for name in up - self._told:
            pool, gpus = self._places.get(name, ("", 0))
            if pool in self.scheduler.scenario.pools:
                self.scheduler.observe(WorkerUp(name, pool, now, gpus))
        self._told = up

    def worker_for(self, stage: Stage, wanted: str | None) -> str | None:
        """The worker that the scheduler wanted, else another one that is up and can do the stage; None if none is."""
        fit = [name for name in self.crew.up() if self._fits(name, stage)]
        if wanted in fit:
            return wanted
        left_s = {worker.name: worker.left_s for worker in self.scheduler.workers(time.monotonic())}
        return min(fit, key=lambda name: left_s.get(name, 0.0), default=None)

    def _fits(self, name: str, stage: Stage) -> bool:
        gang = self._gangs.get(name)
        if gang is None:
            return self._places.get(name, ("", 0))[0] == stage.site.name
        made_for = (gang.pool, gang.method, gang.degree, dict(gang.options))
        asked = (stage.site.name, stage.method, stage.degree, dict(stage.options))
        return stage.model in gang.models and made_for == asked

    async def change(self, until_s: float) -> bool:
        """Wait until other workers are up than now; False if `until_s` comes first."""
        before = self.crew.up()
        while time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
            if self.crew.up() != before:
                return True
        return False
