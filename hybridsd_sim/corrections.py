"""What a running fleet teaches about step times: a factor on the predicted seconds, for each kind of step.

A factor is the median of the last `WINDOW` ratios of observed to predicted seconds. It follows a lasting change once
the change fills half of the window, `WINDOW // 2 + 1` steps, and fewer outliers than that never move it beyond the
ordinary ratios, whatever their size. Factors and the number of kinds are bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from statistics import median
from typing import NamedTuple

from hybridsd_sim.candidates import Candidate
from hybridsd_sim.plan import Stage

__all__ = ["LOWEST", "MOST_KINDS", "WINDOW", "Corrections", "StepKind", "kind_of", "step_s"]

WINDOW = 25
"""Ratios that count. Half of them make a lasting change; the median of 25 has a quarter of the scatter of one."""
FEWEST = 5
"""With fewer ratios than this the prediction stands."""
LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of a factor: beyond them something else is wrong than the speed of a device."""
MOST_KINDS = 4096
"""Kinds of steps remembered; of more, those that were told of least recently are forgotten."""


class StepKind(NamedTuple):
    """Steps that take equally long: one device and runtime, model, shape, method and degree."""

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


def step_s(candidate: Candidate, stage: Stage) -> float:
    """The seconds predicted for a step of a stage, the mean over its steps, warm-up included."""
    held = [part.seconds for part in candidate.cost.denoise_parts if part.where == stage.site.name]
    return sum(held) / stage.num_steps


class Corrections:
    """Factors on predicted step seconds, learnt from observed ones; 1 for what was not observed often enough."""

    def __init__(self) -> None:
        self._ratios: OrderedDict[StepKind, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ratios)

    def learn(self, kind: StepKind, observed_s: float, predicted_s: float) -> None:
        """Take in the seconds of one step and what was predicted of it; what is no positive number is left out."""
        if not (0.0 < observed_s < float("inf") and 0.0 < predicted_s < float("inf")):
            return
        ratios = self._ratios.get(kind)
        if ratios is None:
            ratios = self._ratios[kind] = deque(maxlen=WINDOW)
            if len(self._ratios) > MOST_KINDS:
                self._ratios.popitem(last=False)
        self._ratios.move_to_end(kind)
        ratios.append(observed_s / predicted_s)

    def factor(self, kind: StepKind) -> float:
        """How many times the predicted seconds a step of this kind takes, within `LOWEST` to `HIGHEST`."""
        ratios = self._ratios.get(kind, ())
        return 1.0 if len(ratios) < FEWEST else min(max(median(ratios), LOWEST), HIGHEST)
