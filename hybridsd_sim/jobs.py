"""Jobs of a pool, what jobs of one route share, and how nodes are taken away. Knows no event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

NAN, INFINITY = float("nan"), float("inf")


class Route:
    """What jobs of one class and plan share: `batch_s`, the seconds that 1, 2, ... of them take together."""

    __slots__ = ("batch_s",)

    def __init__(self, batch_s: Sequence[float] = ()) -> None:
        self.batch_s = batch_s


ALONE = Route()
"""The route of jobs that are never batched."""


class Job:
    """Work for a pool: GPUs, seconds, deadline; and, once it ran, when it was where.

    `hold_s` is the work itself, done alone. `load_s` is what loading the model would add (`drawn_load_s`); a pool that
    holds it makes that 0. `gang` are the jobs of its batch, None alone. `restarts` counts the nodes lost under it, and
    `lost_gpu_s` its part of the GPU-seconds that went with them.
    """

    __slots__ = (
        "cloud_ready_s",
        "cloud_start_s",
        "cloud_stop_s",
        "deadline_s",
        "degree",
        "drawn_load_s",
        "gang",
        "hold_s",
        "load_s",
        "lost_gpu_s",
        "model_key",
        "node",
        "number",
        "priority",
        "restarts",
        "route",
        "work",
    )

    def __init__(self, number: int, degree: int, hold_s: float, deadline_s: float = INFINITY) -> None:
        self.number = number
        self.degree = degree
        self.hold_s = hold_s
        self.deadline_s = deadline_s
        self.load_s = self.drawn_load_s = self.lost_gpu_s = self.work = 0.0
        self.model_key = self.priority = self.restarts = 0
        self.route: Route = ALONE
        self.gang: Sequence[Self] | None = None
        self.cloud_ready_s = self.cloud_start_s = self.cloud_stop_s = NAN
        self.node = -1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.number}, {self.degree} GPUs, {self.hold_s:.3f} s)"


@dataclass(frozen=True, slots=True)
class Preemption:
    """How nodes are taken away, in seconds: a node serves for `up_s(node)`, and `replacement_s` later another one does.

    `up_s` is asked once for each life of a node, when it begins.
    """

    up_s: Callable[[int], float]
    replacement_s: float
