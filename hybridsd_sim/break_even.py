"""When several GPUs pay: a plan against the same on one GPU, over its own interconnect and over slower and faster ones.

Exchange takes the longer the slower the interconnect, so that below some bandwidth a gang is slower than one of its
GPUs (DistriFusion on PCIe may be). That bandwidth is found by bisection over `price`. What every message costs besides
its bytes stays, so that a gang may also lose at any bandwidth.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log

from hybridsd_sim.cost import PlanCost, price
from hybridsd_sim.plan import Plan, Stage
from hybridsd_sim.profiles import Interconnect, Profiles
from hybridsd_sim.transfers import actual_link

RUNG = 1.01
"""Bandwidths are tried this factor apart, so that the break-even one is known to 1%."""
SLOWEST, FASTEST = 1e-3, 1e6
"""Shares of the interconnect's own bandwidth between which they are tried; the fastest stands for infinity."""
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """A plan against the same on one GPU.

    `speedup` is one GPU's `denoise_s` over the plan's. From `bandwidth_bytes_per_s` up the plan is no slower: 0 where
    it is the faster even at `SLOWEST` of its interconnect's bandwidth, infinite where it is the slower at any. The 90%
    intervals are those of the plan's own time; one GPU's is taken as it stands, since both share the device's errors.
    """

    speedup: float
    speedup_interval: Pair
    bandwidth_bytes_per_s: float
    bandwidth_interval: Pair
    sentence: str


def against_one_gpu(cost: PlanCost, profiles: Profiles, *, prefer: Sequence[str] = ()) -> BreakEven | None:
    """What the gang of a priced plan is worth; None for a plan of one GPU.

    `profiles` and `prefer` are those that the plan was priced with.
    """
    gang = max(cost.plan.stages, key=lambda stage: stage.degree)
    if gang.degree == 1:
        return None
    one_s = price(_on_one_gpu(cost.plan), cost.request, profiles, prefer=prefer).denoise_s
    name = gang.site.interconnect or profiles.default_interconnect(gang.site.device)
    link = actual_link(profiles, name, gang.degree)
    ladder = _Ladder(cost, profiles, prefer, link)
    even = ladder.first(lambda tried: tried.denoise_s, one_s)
    interval = (
        ladder.first(lambda tried: tried.interval_s[0], one_s),
        ladder.first(lambda tried: tried.interval_s[1], one_s),
    )
    low_s, high_s = cost.interval_s
    return BreakEven(
        speedup=one_s / cost.denoise_s,
        speedup_interval=(one_s / high_s, one_s / low_s),
        bandwidth_bytes_per_s=even,
        bandwidth_interval=interval,
        sentence=_sentence(gang, link, one_s / cost.denoise_s, even),
    )


def _sentence(gang: Stage, link: Interconnect, speedup: float, even: float) -> str:
    how = "slower than one GPU" if speedup < 1 else f"{speedup:.3g} times as fast as one GPU"
    if even == 0:
        why = f"it would be the faster even at 1/{1 / SLOWEST:g} of the bandwidth"
    elif even == inf:
        why = "no bandwidth would make it the faster"
    else:
        why = f"it pays from {even / 1e9:.3g} GB/s up, and {link.name} has {link.bandwidth_bytes_per_s / 1e9:.3g}"
    return f"On {link.name} {gang.method} x{gang.degree} is {how}; {why}."


def _on_one_gpu(plan: Plan) -> Plan:
    stages = (replace(stage, method="single", degree=1, options=()) for stage in plan.stages)
    return replace(plan, stages=tuple(stages))


class _Ladder:
    """An interconnect at other bandwidths, slowest first, alike in all else; one set of profiles holds every rung."""

    def __init__(self, cost: PlanCost, profiles: Profiles, prefer: Sequence[str], link: Interconnect) -> None:
        count = ceil(log(FASTEST / SLOWEST, RUNG)) + 1
        self._cost, self._prefer = cost, prefer
        self._rungs = [_at(link, SLOWEST * RUNG**index) for index in range(count)]
        known = {**profiles.interconnects, **{rung.name: rung for rung in self._rungs}}
        self._profiles = replace(profiles, interconnects=known)
        self._tried: dict[str, PlanCost] = {}

    def first(self, seconds: Callable[[PlanCost], float], at_most: float) -> float:
        """The bandwidth from which a figure that falls with it is at most that: 0 below all rungs, inf above them.

        Where an interval has a kink, because an exchange begins to hide, it is one of the crossings.
        """
        index = bisect_left(self._rungs, -at_most, key=lambda rung: -seconds(self._priced(rung)))
        if index == 0:
            return 0.0
        return inf if index == len(self._rungs) else self._rungs[index].bandwidth_bytes_per_s

    def _priced(self, rung: Interconnect) -> PlanCost:
        if rung.name not in self._tried:
            stages = (
                replace(stage, site=replace(stage.site, interconnect=rung.name)) for stage in self._cost.plan.stages
            )
            plan = replace(self._cost.plan, stages=tuple(stages))
            self._tried[rung.name] = price(plan, self._cost.request, self._profiles, prefer=self._prefer)
        return self._tried[rung.name]


def _at(link: Interconnect, share: float) -> Interconnect:
    keys = ("bandwidth_bytes_per_s", "bandwidth_low", "bandwidth_high")
    rates = {key: getattr(link, key) * share for key in keys}
    return link.model_copy(update={"name": f"{link.name} x {share!r}", "beyond_pairs": None, **rates})
