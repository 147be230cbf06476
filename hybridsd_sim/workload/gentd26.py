"""A generator of requests like those of Alibaba's GenTD26 trace, fitted to its published statistics.

The trace itself (Yan et al., SoCC '25, "Understanding Diffusion Model Serving in Production"; alibaba/clusterdata,
cluster-trace-v2026-GenAI) is for research only and is not shipped. Matched here:

- gaps with median 15 s, mean 74 s, a CV of 3.6 without gaps over an hour and 12 with them, 66 such gaps in 23 days; a
  peak hour of 6 times the mean busy hour and a peak day of 2.4 times the mean one;
- 86 base models, of which the first, five and ten commonest take 30.7, 70.5 and 86.7% of the requests; 75% of
  consecutive requests changing the base model;
- 30 steps in 90.6% and 40 in 5.1%; 1, 4, 8 or 2 images in 58, 19, 15 and 8%; a LoRA in 17%.

Modelled, because nothing is published: the shape between those points, and that steps, images, LoRA and base model do
not depend on one another. Left out: bursts inside one minute (the trace's peak minute has 64 requests, the generator's
about 16), and failed requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count

import numpy as np

from hybridsd_sim.workload.traces import Floats, Ints, Texts, Trace

StreamOf = Callable[[str], np.random.Generator]


DAY_S = 86_400

MEAN_GAP_S = 74.17

BASE_MODELS = 86

SWITCH_SHARE = 0.75
"""Share of consecutive requests that change the base model."""

LORA_SHARE = 0.17

# (ranks, their share of the requests, decline from rank to rank). Shares are published; declines are modelled: the
# mildest round figures that let popularity fall across the borders too.
_RANKS = ((1, 0.307, 1.0), (4, 0.705 - 0.307, 0.8), (5, 0.867 - 0.705, 0.9), (BASE_MODELS - 10, 1.0 - 0.867, 0.94))

# The 4.3% whose steps are not published take common settings of samplers, evenly.
_STEPS = ((30, 0.906), (40, 0.051), (20, 0.0086), (25, 0.0086), (28, 0.0086), (35, 0.0086), (50, 0.0086))

_IMAGES = ((1, 0.58), (4, 0.19), (8, 0.15), (2, 0.08))

# The rate of requests is a logistic function of a day-night cosine plus an Ornstein-Uhlenbeck process: bounded above,
# as the published peak is, with nights and lulls as deep as the published long gaps. The four figures minimise the
# squared log errors of the gap statistics above, over realisations of the trace's 23 days.
_CELL_S = 60

_LEVEL = -4.8

_DAY_SWING = 4.1

_LULL_SPREAD = 1.3

_LULL_S = 4 * 3600


@dataclass(frozen=True, slots=True, eq=False)
class GenTD26Block:
    """Requests in order of arrival: seconds, what they ask for, and the rank of the base model (0 is the commonest)."""

    arrival_s: Floats
    num_inference_steps: Ints
    num_images: Ints
    num_lora: Ints
    base_model: Ints


@dataclass(frozen=True, slots=True)
class GenTD26Generator:
    """Requests like those of the GenTD26 trace, without end; `time_scale` multiplies every gap.

    Time 0 is the moment of the day when the expected rate rises through its mean. A day is `time_scale` times 86,400 s
    long and brings 1,165 requests on average. `stream_of` gives a random stream for each of `rate`, `arrivals`,
    `steps`, `images`, `lora` and `base_model`.
    """

    time_scale: float = 1.0

    def blocks(self, stream_of: StreamOf) -> Iterator[GenTD26Block]:
        """Requests, one day to a block; a block may be empty.

        A request keeps the base model of the one before it with the probability `stickiness()`, and draws one by
        `popularity()` else.
        """
        steps, images, lora = stream_of("steps"), stream_of("images"), stream_of("lora")
        models, model = stream_of("base_model"), -1
        for arrival_s in _arrivals(stream_of("rate"), stream_of("arrivals")):
            size = len(arrival_s)
            chances, draws = models.random((size, 2)).T
            drawn = np.searchsorted(np.cumsum(popularity())[:-1], draws, side="right")
            fresh = chances >= stickiness()
            if size and model < 0:  # the very first request has none before it
                fresh[0] = True
            since = np.maximum.accumulate(np.where(fresh, np.arange(size), -1))
            base_model = np.where(since < 0, model, drawn[since])
            model = int(base_model[-1]) if size else model
            yield GenTD26Block(
                arrival_s=arrival_s * self.time_scale,
                num_inference_steps=_pick(steps, _STEPS, size),
                num_images=_pick(images, _IMAGES, size),
                num_lora=(lora.random(size) < LORA_SHARE).astype(np.int64),
                base_model=base_model,
            )

    def trace(self, stream_of: StreamOf, span_s: float) -> Trace:
        """The requests of the first `span_s` seconds as a trace. Raises `ValueError` when there are none."""
        blocks: list[GenTD26Block] = []
        for block in self.blocks(stream_of):
            blocks.append(block)
            if len(block.arrival_s) and block.arrival_s[-1] >= span_s:
                break
        joined = {name: np.concatenate([getattr(b, name) for b in blocks]) for name in GenTD26Block.__slots__}
        size = int(np.searchsorted(joined["arrival_s"], span_s))
        if not size:
            raise ValueError(f"no request arrives within {span_s} s")
        blank: Texts = np.full(size, "")
        return Trace(
            layout="GenTD26 generator",
            start=None,
            arrival_s=joined["arrival_s"][:size] - joined["arrival_s"][0],
            num_inference_steps=joined["num_inference_steps"][:size],
            num_images=joined["num_images"][:size],
            num_lora=joined["num_lora"][:size],
            base_model=np.char.mod("M%04d", joined["base_model"][:size]),
            status=blank,
            request_type=blank,
            user=blank,
            execution_s=np.full(size, math.nan),
        )


@cache
def popularity() -> Floats:
    """Share of the requests that each base model takes, by rank."""
    parts = [share * decline ** np.arange(ranks) for ranks, share, decline in _RANKS]
    shares = np.concatenate([part * share / part.sum() for part, (_, share, _) in zip(parts, _RANKS, strict=True)])
    shares.setflags(write=False)  # it is shared by all callers
    return shares


def stickiness() -> float:
    """Probability that a request repeats its predecessor's base model instead of drawing one by popularity.

    Independent draws would change the base model in 1 - sum p^2 of all cases, more often than was published.
    """
    independent = 1.0 - float((popularity() ** 2).sum())
    return 1.0 - SWITCH_SHARE / independent


def _pick(rng: np.random.Generator, table: tuple[tuple[int, float], ...], size: int) -> Ints:
    values, shares = np.array([value for value, _ in table]), np.array([share for _, share in table])
    return values[np.searchsorted(np.cumsum(shares)[:-1], rng.random(size), side="right")]


def _arrivals(rate: np.random.Generator, arrivals: np.random.Generator) -> Iterator[Floats]:
    """Arrival times in seconds of the trace, one day to a block: a Poisson process of a rate that is itself random."""
    keep = math.exp(-_CELL_S / _LULL_S)
    noise = _LULL_SPREAD * math.sqrt(1.0 - keep * keep)
    swing, borders = _day(), np.arange(0.0, DAY_S + _CELL_S, _CELL_S)
    per_cell = _CELL_S / MEAN_GAP_S / _expected(swing).mean()
    lull = _LULL_SPREAD * float(rate.standard_normal())
    for day in count():
        steps = (noise * rate.standard_normal(len(swing))).tolist()
        lulls = list(accumulate(steps, lambda level, step: keep * level + step, initial=lull))
        lull = lulls.pop()
        requests = np.concatenate([[0.0], np.cumsum(per_cell * _logistic(_LEVEL + swing + np.array(lulls)))])
        at = np.sort(arrivals.random(arrivals.poisson(requests[-1]))) * requests[-1]
        yield day * DAY_S + np.interp(at, requests, borders)


@cache
def _day() -> Floats:
    """The day-night cosine, a value a cell, turned so that the expected rate rises through its mean at time 0."""
    cells = (np.arange(DAY_S // _CELL_S) + 0.5) * _CELL_S
    swing = -_DAY_SWING * np.cos(2 * math.pi * cells / DAY_S)
    swing = np.roll(swing, -int(np.argmax(_expected(swing) >= _expected(swing).mean())))
    swing.setflags(write=False)  # it is shared by all callers
    return swing


def _expected(swing: Floats) -> Floats:
    """Mean of the logistic function over the lulls' normal distribution, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    rate: Floats = _logistic(_LEVEL + swing[:, None] + _LULL_SPREAD * nodes) @ (weights / weights.sum())
    return rate


def _logistic(value: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-value))
