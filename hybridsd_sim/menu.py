"""What a policy may choose from in a running service: candidates for any request, as fast as the fleet really is.

The plan's classes are priced when the plan is loaded. A request of another size, step count or picture count is priced
when it first comes, which takes milliseconds once; the sizes met last are kept. Candidates follow the corrections that
`observe` has learnt, and those that no worker could run are left out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from hybridsd_sim.candidates import Candidate, CandidateSet, request_of, slowed
from hybridsd_sim.corrections import StepKind, kind_of
from hybridsd_sim.errors import HybridSDError
from hybridsd_sim.offers import Pricing
from hybridsd_sim.plan import Request

__all__ = ["MOST_SIZES", "Menu"]

MOST_SIZES = 512
"""Kinds of requests whose candidates are kept; of more, those asked for least recently are priced anew."""
Options = tuple[Candidate, ...]
Size = tuple[str, str, int, int, int, bool, int, str, float | None]


@dataclass(frozen=True, slots=True)
class _Listed:
    """Candidates as priced, as they are now, and what made them so."""

    priced: Options
    now: Options
    factors: Mapping[StepKind, float]
    widest: Sequence[int]


class Menu:
    """The candidates of every request of a scenario, by class and size.

    `factors` are those on the seconds of each kind of step; they are replaced, never changed.
    """

    def __init__(self, pricing: Pricing, found: CandidateSet) -> None:
        self._pricing = pricing
        self.own = {name: request_of(name, spec) for name, spec in pricing.scenario.requests.items()}
        self.factors: Mapping[StepKind, float] = {}
        self._found = found.by_class
        self._listed: OrderedDict[Size, _Listed] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._listed)

    def options(self, request: Request, widest: Sequence[int]) -> Options:
        """The candidates of a request on pools whose largest worker has so many GPUs, the cheapest first.

        Empty for a request that no plan of its class can serve: of another model, or of an illegal size.
        """
        size = _size(request, self.own[request.request_class])
        with self._lock:
            listed = self._listed.get(size)
            if listed is not None:
                self._listed.move_to_end(size)
        factors = self.factors
        if listed is None or listed.factors is not factors or listed.widest != widest:
            priced = self._priced(size) if listed is None else listed.priced
            listed = _Listed(priced, _possible(priced, factors, widest), factors, widest)
            self._keep(size, listed)
        return listed.now

    def correct(self, kind: StepKind, factor: float) -> None:
        """From now on steps of this kind take so many times the seconds that were predicted."""
        self.factors = {**self.factors, kind: factor}

    def _keep(self, size: Size, listed: _Listed) -> None:
        with self._lock:
            self._listed[size] = listed
            if len(self._listed) > MOST_SIZES:
                self._listed.popitem(last=False)

    def _priced(self, size: Size) -> Options:
        """The class's own candidates, or what becomes of their plans for a request of another size."""
        own, found = self.own[size[0]], self._found[size[0]]
        if size == _size(own, own):
            return tuple(found)
        _, model, height_px, width_px, steps, guided, images, sampler, floor = size
        if model != own.model:
            return ()
        request = replace(
            own, height_px=height_px, width_px=width_px, num_inference_steps=steps, num_images=images, sampler=sampler,
            guidance_scale=own.guidance_scale if guided == own.guided else 7.5 if guided else 1.0, quality_floor=floor,
        )  # fmt: skip
        priced = [candidate for option in found if (candidate := self._variant(request, option)) is not None]
        return tuple(sorted(priced, key=lambda option: (option.usd_or_inf, option.latency_s)))

    def _variant(self, request: Request, option: Candidate) -> Candidate | None:
        try:
            return self._pricing.priced(request, option.plan.rescaled(request.num_inference_steps))
        except HybridSDError:
            return None


def _size(request: Request, own: Request) -> Size:
    """What candidates depend on. Promise and priority do not change them: everybody may name their own."""
    floor = own.quality_floor if request.quality_floor is None else request.quality_floor
    return (
        request.request_class, request.model, request.height_px, request.width_px, request.num_inference_steps,
        request.guidance_scale > 1.0, request.num_images, request.sampler, floor,
    )  # fmt: skip


def _possible(priced: Options, factors: Mapping[StepKind, float], widest: Sequence[int]) -> Options:
    return tuple(
        _corrected(option, factors)
        for option in priced
        if option.pool_index < 0 or option.degree <= widest[option.pool_index]
    )


def _corrected(candidate: Candidate, factors: Mapping[StepKind, float]) -> Candidate:
    """The candidate at the pace that was observed: a site's factor is that of the steps done there."""
    if not factors:
        return candidate
    paces = {stage.site.name: factors.get(kind_of(candidate, stage), 1.0) for stage in candidate.plan.stages}
    return slowed(candidate, paces)
