"""What a serving system tells the scheduler after a decision: steps, parts and requests done, workers up and down.

Events may come late, twice, or name what the scheduler has forgotten: then they change nothing. Times are seconds on
the clock that `decide` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CloudDone", "Event", "Outcome", "RequestDone", "StepDone", "WorkerDown", "WorkerUp"]

Outcome = Literal["served", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One denoising step of a stage of decision `number` took `seconds`."""

    number: int
    seconds: float
    stage: int = 0


@dataclass(frozen=True, slots=True)
class CloudDone:
    """The worker has done its part of decision `number` and is free for the next; the edge goes on."""

    number: int
    at_s: float


@dataclass(frozen=True, slots=True)
class RequestDone:
    """Decision `number` has ended: the image is there, or never will be."""

    number: int
    at_s: float
    outcome: Outcome = "served"


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker of a pool takes requests from now on; `gpus` None are those of one of the pool's nodes."""

    worker: str
    pool: str
    at_s: float
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """A worker is gone with everything it was given; each of its requests wants a new decision."""

    worker: str
    at_s: float


Event = StepDone | CloudDone | RequestDone | WorkerUp | WorkerDown
