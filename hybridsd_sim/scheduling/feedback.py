"""Feedback from a serving system: the events that it tells the scheduler, and the step times that these teach.

Events may come late, twice, or name what the scheduler has forgotten: then they change nothing. Times are seconds on
the clock that `decide` is given.

`Corrections` learns a factor on the predicted seconds for each kind of step: the median of the last `WINDOW` ratios of
observed to predicted seconds. It follows a lasting change once the change fills half of the window, `WINDOW // 2 + 1`
steps, and outliers, whatever their size, never move it beyond the ordinary ratios while they are fewer than half of the
ratios that count. Factors and the number of kinds are bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from hybridsd_sim.perf import timer_of
from hybridsd_sim.plan import Stage
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.profiles import Profiles

WINDOW = 41
"""Ratios that count. Half of them make a lasting change; the median of 41 has a fifth of the scatter of one."""

MIN_RATIOS = 5
"""With fewer ratios than this the prediction stands."""

MIN_FACTOR, MAX_FACTOR = 0.1, 10.0
"""Bounds of a factor: beyond them something else is wrong than the speed of a device."""

WORTH_CORRECTING = 0.02
"""By how much a factor must differ from the one in use to take its place: every change prices candidates anew, and the
median of steps that scatter by 3% differs by so much once in a thousand steps."""

MAX_KINDS = 4096
"""Kinds of steps remembered; of more, those observed least recently are forgotten."""

Outcome = Literal["served", "failed", "cancelled"]
"""How a request ended."""


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
"""What `Scheduler.observe` takes in."""


class StepKind(NamedTuple):
    """What steps share that differ from their prediction by the same factor: device, runtime, model, shape and group.

    `unet_batch` is the batch of one denoiser call: images, doubled by guidance.
    """

    device: str
    runtime: str
    model: str
    height_px: int
    width_px: int
    unet_batch: int
    method: str
    degree: int


def kind_of(candidate: Candidate, stage: Stage) -> StepKind:
    """The kind of a candidate's steps in one of its stages."""
    request, site = candidate.cost.request, stage.site
    shape = (request.height_px, request.width_px, request.unet_batch)
    return StepKind(site.device, site.runtime, stage.model, *shape, stage.method, stage.degree)


def steps_s(candidate: Candidate, stage: Stage, profiles: Profiles) -> list[float]:
    """The seconds predicted for each step of one of a candidate's stages, in order.

    The mean over the stage would not do: steps of a parallel method's warm-up take longer, most steps take less than
    the mean, and the median ratio to it would say that the worker group is quicker than it is.
    """
    parts, request = iter(candidate.cost.denoise_parts), candidate.cost.request
    for one in candidate.plan.stages:
        counts = timer_of(one, request, profiles).counts(one.num_steps)
        seconds = [seconds for _, steps, _ in counts for seconds in [next(parts).seconds.value / steps] * steps]
        if one is stage:
            return seconds
    return []


class Corrections:
    """Factors on predicted step seconds, learnt from observed ones; 1 for what was not observed often enough.

    `factors` are those in use, of the kinds that differ; they are replaced, never changed.
    """

    def __init__(self) -> None:
        self._ratios: OrderedDict[StepKind, deque[float]] = OrderedDict()
        self.factors: Mapping[StepKind, float] = {}

    def __len__(self) -> int:
        return len(self._ratios)

    def learn(self, kind: StepKind, observed_s: float, predicted_s: float) -> None:
        """Take in the seconds of one step and what was predicted of it; what is no positive number is left out."""
        if not (0.0 < observed_s < float("inf") and 0.0 < predicted_s < float("inf")):
            return
        ratios = self._ratios.setdefault(kind, deque(maxlen=WINDOW))
        self._ratios.move_to_end(kind)
        ratios.append(observed_s / predicted_s)
        if len(self._ratios) > MAX_KINDS:
            forgotten, _ = self._ratios.popitem(last=False)
            self.factors = {other: factor for other, factor in self.factors.items() if other != forgotten}
        factor = self.factor(kind)
        if abs(factor / self.factors.get(kind, 1.0) - 1.0) > WORTH_CORRECTING:
            self.factors = {**self.factors, kind: factor}

    def factor(self, kind: StepKind) -> float:
        """How many times the predicted seconds a step of this kind takes, within `MIN_FACTOR` to `MAX_FACTOR`."""
        ratios = self._ratios.get(kind, ())
        return 1.0 if len(ratios) < MIN_RATIOS else min(max(median(ratios), MIN_FACTOR), MAX_FACTOR)
