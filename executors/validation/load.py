"""Sends requests open-loop, each at its own time whatever became of the others: Poisson from LoadGen, or a trace.

MLPerf's LoadGen (`mlcommons-loadgen`, server scenario) draws Poisson arrivals and writes its own logs; it cannot replay
a trace, which the second driver does. Either calls an asynchronous `send(number, arrival_s)` on the running loop, and
notes how late that was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from hybridsd_sim.errors import InputError, Problem, RunError
from hybridsd_sim.workload import Trace

from ..live import sleep_until

AnswerT = TypeVar("AnswerT")

Send = Callable[[int, float], Awaitable[AnswerT]]
"""Sends request `number`, counted from 0 in order of arrival, that was due at `arrival_s` (`time.monotonic`)."""

LEAD_S = 0.1
"""From the start of a replay to its first arrival: nobody is late for that one."""


@dataclass(frozen=True, slots=True)
class SentRequest(Generic[AnswerT]):
    """A request that was sent: when it was due, by how many seconds it was sent later, and what came of it."""

    arrival_s: float
    late_s: float
    answer: AnswerT


async def replay_trace(arrivals_s: Sequence[float], send: Send[AnswerT]) -> list[SentRequest[AnswerT]]:
    """Send one request for each arrival, in seconds from the first one, which must not fall; all answers, in order."""
    first_s = time.monotonic() + LEAD_S
    tasks = []
    for number, after_s in enumerate(arrivals_s):
        due_s = first_s + after_s - arrivals_s[0]
        await sleep_until(due_s)
        tasks.append(asyncio.create_task(_sent(send, number, due_s)))
    return list(await asyncio.gather(*tasks))


async def _sent(send: Send[AnswerT], number: int, arrival_s: float) -> SentRequest[AnswerT]:
    late_s = time.monotonic() - arrival_s
    return SentRequest(arrival_s, late_s, await send(number, arrival_s))


def trace_piece(trace: Trace, first: int, count: int, rate_per_s: float) -> list[float]:
    """The arrivals of `count` requests from the `first` on, counted from 0, of a trace that begins anew at its end.

    The trace as a whole has the rate; a piece is as busy as it is in the trace. Raises `InputError` where all arrive at
    once, which is no rate.
    """
    gaps = np.diff(trace.arrival_s)
    if not gaps.sum() > 0.0:
        raise InputError(Problem("--trace", f"{len(trace)} requests", "has two that arrive at different times"))
    mine = np.resize(np.roll(gaps, -first), count - 1) / (gaps.mean() * rate_per_s)
    found: list[float] = np.cumsum(np.append(0.0, mine)).tolist()
    return found


async def drive_loadgen(
    rate_per_s: float, requests: int, send: Send[AnswerT], *, logs: Path, seed: int = 1
) -> list[SentRequest[AnswerT]]:
    """Let LoadGen send `requests` requests at Poisson times of a rate; all answers, in order of arrival.

    A request is due when LoadGen issues it. Its logs go into the folder `logs`. Raises `RunError` if it sends another
    number of requests than it was asked for.
    """
    import mlperf_loadgen

    loop, numbers = asyncio.get_running_loop(), count()
    tasks: list[asyncio.Task[SentRequest[AnswerT]]] = []

    def begin(number: int, query: int, arrival_s: float) -> None:
        task = loop.create_task(_sent(send, number, arrival_s))
        response = mlperf_loadgen.QuerySampleResponse(query, 0, 0)
        task.add_done_callback(lambda _: mlperf_loadgen.QuerySamplesComplete([response]))
        tasks.append(task)

    def issue(samples: Sequence[Any]) -> None:  # in LoadGen's own thread
        for sample in samples:
            loop.call_soon_threadsafe(begin, next(numbers), sample.id, time.monotonic())

    await asyncio.to_thread(_run_loadgen, issue, rate_per_s, requests, logs, seed)
    if len(tasks) != requests:
        raise RunError(f"LoadGen sent {len(tasks)} requests, not the {requests} that it was asked for")
    return list(await asyncio.gather(*tasks))


def _run_loadgen(
    issue: Callable[[Sequence[Any]], None], rate_per_s: float, requests: int, logs: Path, seed: int
) -> None:
    """LoadGen's server scenario, which keeps its thread until the last answer."""
    import mlperf_loadgen

    logs.mkdir(parents=True, exist_ok=True)
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = mlperf_loadgen.TestScenario.Server
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate_per_s
    settings.min_duration_ms = 1
    settings.min_query_count = settings.max_query_count = requests
    settings.schedule_rng_seed = seed
    written = mlperf_loadgen.LogSettings()
    written.log_output.outdir = str(logs)
    written.log_output.copy_summary_to_stdout = False
    written.enable_trace = False
    system = mlperf_loadgen.ConstructSUT(issue, lambda: None)
    library = mlperf_loadgen.ConstructQSL(requests, requests, lambda _: None, lambda _: None)
    try:
        mlperf_loadgen.StartTestWithLogSettings(system, library, settings, written)
    finally:
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(system)
