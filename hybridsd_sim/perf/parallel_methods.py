"""Parallel methods as the planner sees them: legal degrees, work per rank, bytes, overlap. One class each.

A method says how the UNet evaluations of a stage are spread over `degree` GPUs: how many rounds there are, what the
busiest rank computes in one round, what it receives, and behind how much of its own compute the exchange may hide. How
long that takes on a given GPU and interconnect is the business of `stage_time`. Executors ask here what is legal, so
a rule is stated once. To add a method, write a subclass of `Method` and decorate it with `@register`.

Sources: DistriFusion (arXiv 2402.19481, code mit-han-lab/distrifuser), PCPP (arXiv 2412.02962, code xiuyuz/pcpp),
AsyncDiff (arXiv 2406.06911, code czg1225/AsyncDiff).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hybridsd_sim.errors import IllegalPlanError, Problem, unknown_name
from hybridsd_sim.perf.partition import Denoising, RankWork, component_works, halo_bytes, kv_bytes, stripe_work, whole
from hybridsd_sim.plan import Options

Option = bool | int | float | str

Count = tuple[str, int, int]
"""A phase's name, its denoising steps and its rounds."""


SYNC_MODES = ("full_sync", "sync_gn", "corrected_async_gn", "stale_gn", "separate_gn", "no_sync")
"""GroupNorm and exchange modes of DistriFusion's public code; the third is its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`steps` denoising steps of the same cost in `rounds` rounds, fewer than steps under stride 2.

    `ranks` are the different loads that ranks carry at the same time in a round; the slowest of them sets its pace.
    """

    name: str
    steps: int
    rounds: int
    ranks: tuple[RankWork, ...]

    @property
    def work(self) -> RankWork:
        """The load with the most FLOPs."""
        return heaviest(self.ranks)


def heaviest(ranks: Sequence[RankWork]) -> RankWork:
    """The load with the most FLOPs."""
    return max(ranks, key=lambda rank: rank.macs)


_TYPES = {bool: "must be true or false", int: "must be a whole number", float: "must be a number", str: "must be text"}


class Method(ABC):
    """A way to spread a stage over GPUs; `register` offers a subclass under its `name`.

    Degree 1 of any method is `single`. `defaults` are the options that it has, each with the value it takes if unsaid.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Option]] = {}

    def problems(self, job: Denoising, degree: int, options: Mapping[str, Option]) -> list[Problem]:
        """Every reason why this method cannot run `job` at `degree`; empty when it can."""
        bad_degree = [] if degree >= 1 else [Problem("degree", str(degree), "counts GPUs, so it is at least 1")]
        general = [*self.option_problems(options), *bad_degree]
        return general or self._rule_problems(job, degree, self.settings(job, options))

    def option_problems(self, options: Mapping[str, Option]) -> Iterator[Problem]:
        """Options that the method does not have, and values of another type than their default's."""
        place = f"{self.name} option"
        if options and not self.defaults:
            given = ", ".join(f"{key}={_written(value)}" for key, value in options.items())
            remedy = "Leave it out, or choose the method that it belongs to."
            yield Problem(place, given, f"{self.name} has no options", remedy)
            return
        for key, value in options.items():
            if key not in self.defaults:
                yield replace(unknown_name(place, key, list(self.defaults)), rule=f"{self.name} has no such option")
                continue
            wanted = type(self.defaults[key])
            # a whole number may stand for a float, and nothing may stand for another type: true is no 1 here
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number if wanted is float else type(value) is wanted):
                remedy = f"The default is {_written(self.defaults[key])}."
                yield Problem(f"{place} {key}", _written(value), _TYPES[wanted], remedy)

    def phases(self, job: Denoising, degree: int, options: Mapping[str, Option]) -> tuple[Phase, ...]:
        """The stage as phases of equal rounds; the steps sum to `job.num_steps`."""
        settings = self.settings(job, options)
        return tuple(
            Phase(name=name, steps=steps, rounds=rounds, ranks=self.ranks(job, degree, settings, name))
            for name, steps, rounds in self.counts(job.num_steps, degree, settings)
        )

    def counts(self, num_steps: int, degree: int, settings: Mapping[str, Option]) -> list[Count]:
        """How many steps and rounds each phase of a stage has; phases without a step are left out."""
        counts = [("steady", num_steps, num_steps)] if degree == 1 else self._counts(num_steps, settings)
        return [count for count in counts if count[1]]

    def ranks(self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str) -> tuple[RankWork, ...]:
        """The loads of a round of a phase, however many rounds it has: `job.num_steps` does not matter."""
        return (whole(job),) if degree == 1 else self._ranks(job, degree, settings, phase)

    def settings(self, job: Denoising, options: Mapping[str, Option]) -> dict[str, Option]:
        """Every option with the value that it takes for this job: as given, else the default."""
        return {**self.defaults, **options}

    @abstractmethod
    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]: ...

    def _counts(self, num_steps: int, settings: Mapping[str, Option]) -> list[Count]:
        return [("steady", num_steps, num_steps)]

    @abstractmethod
    def _ranks(
        self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str
    ) -> tuple[RankWork, ...]: ...


METHODS: dict[str, Method] = {}
"""Every registered method by its name; commands list them in this order."""


def register(method: type[Method]) -> type[Method]:
    """Enter a method under its name; a class decorator."""
    METHODS[method.name] = method()
    return method


def find_method(name: str) -> Method:
    """The registered method of that name. Raises `IllegalPlanError` with the closest names for any other."""
    if name not in METHODS:
        raise IllegalPlanError(unknown_name("method", name, list(METHODS)))
    return METHODS[name]


@register
class Single(Method):
    """One GPU does everything."""

    name = "single"

    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]:
        remedy = "Choose a parallel method or degree 1."
        return [] if degree == 1 else [Problem("degree", str(degree), "single runs on exactly 1 GPU", remedy)]

    def _ranks(self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str) -> tuple[RankWork, ...]:
        return (whole(job),)


@register
class CfgParallel(Method):
    """Guidance parallelism: one GPU evaluates the prompt, the other the empty prompt; the noises are exchanged."""

    name = "cfg_parallel"

    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]:
        if degree not in (1, 2):
            return [Problem("degree", str(degree), "cfg_parallel has two branches, so it runs on 1 or 2 GPUs")]
        return _guidance_problems(job, degree)

    def _ranks(self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str) -> tuple[RankWork, ...]:
        half = whole(job, job.latents / 2)
        return (replace(half, exchange="gather", received_bytes=job.noise_bytes() / 2, messages=1),)


def _guidance_problems(job: Denoising, degree: int) -> list[Problem]:
    if degree == 1 or job.guided:
        return []
    return [
        Problem("guidance_scale", "1 or less", "splitting guidance needs guidance", "Raise guidance_scale above 1.")
    ]


class PatchMethod(Method):
    """Horizontal stripes, one a GPU: what DistriFusion and PCPP share.

    `unbiased_variance` multiplies every GroupNorm's variance by n / (n - 1) as the public code does.
    """

    defaults: ClassVar[Mapping[str, Option]] = {
        "warmup_steps": 5,
        "sync_mode": "corrected_async_gn",
        "guidance_split": False,
        "unbiased_variance": False,
    }

    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]:
        mode = settings["sync_mode"]
        problems = [] if mode in SYNC_MODES else [unknown_name("sync_mode", str(mode), SYNC_MODES)]
        problems += _warmup_problems(settings)
        if settings["guidance_split"]:
            problems += _guidance_problems(job, degree)
            if degree % 2:
                problems.append(Problem("degree", str(degree), "guidance_split needs an even number of GPUs"))
        return problems or _stripe_problems(job, _branch(degree, settings))

    def _counts(self, num_steps: int, settings: Mapping[str, Option]) -> list[Count]:
        warmup = min(int(settings["warmup_steps"]), num_steps)
        if settings["sync_mode"] == "full_sync":
            warmup = num_steps
        rest = num_steps - warmup
        return [("warmup", warmup, warmup), ("steady", rest, rest)]

    def _ranks(self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str) -> tuple[RankWork, ...]:
        branch = _branch(degree, settings)
        latents = job.latents / (2 if settings["guidance_split"] and degree > 1 else 1)
        if phase == "warmup":
            return (self._synchronous(job, branch, latents, degree),)
        return (self._steady(job, branch, latents, degree, settings),)

    def _synchronous(self, job: Denoising, branch: int, latents: float, degree: int) -> RankWork:
        """A warm-up step: the stripe's share of every layer, attention over the whole image, all gathered first."""
        traffic = kv_bytes(job, latents) * (branch - 1) / branch + halo_bytes(job, latents) * (branch - 1)
        exchanged = job.table.exchanged
        layers = exchanged.layers + exchanged.group_norms if branch > 1 else 0
        return replace(
            stripe_work(job, branch, latents, key_share=1.0),
            exchange="stripes",
            received_bytes=traffic + _noise_gather(job, degree),
            messages=layers + 1,
            blocking_messages=layers + 1,
        )

    @abstractmethod
    def _steady(
        self, job: Denoising, branch: int, latents: float, degree: int, settings: Mapping[str, Option]
    ) -> RankWork: ...


@register
class DistriFusion(PatchMethod):
    """Displaced patch parallelism: neighbours' activations of the previous step, gathered behind a whole step."""

    name = "distrifusion"

    def _steady(
        self, job: Denoising, branch: int, latents: float, degree: int, settings: Mapping[str, Option]
    ) -> RankWork:
        sync = self._synchronous(job, branch, latents, degree)
        if settings["sync_mode"] == "no_sync":
            return replace(sync, received_bytes=_noise_gather(job, degree), messages=1, blocking_messages=1)
        messages, blocking = _steady_messages(job, branch, settings)
        return replace(sync, window=1.0, messages=messages, blocking_messages=blocking)


@register
class Pcpp(PatchMethod):
    """Partially conditioned patch parallelism: attention sees a part of each neighbour's stripe only.

    `partial` is that part (0.3 in the public code). `whole_stripes` sends neighbours the whole stripe as the public
    code does; by default only the part that is used travels. A transfer hides behind one interval between
    self-attentions.
    """

    name = "pcpp"
    defaults: ClassVar[Mapping[str, Option]] = {**PatchMethod.defaults, "partial": 0.3, "whole_stripes": False}

    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]:
        partial = settings["partial"]
        in_range = isinstance(partial, int | float) and 0.0 <= partial <= 1.0
        bad = [] if in_range else [Problem("partial", str(partial), "is a share of a neighbour's stripe, from 0 to 1")]
        return [*bad, *super()._rule_problems(job, degree, settings)]

    def _steady(
        self, job: Denoising, branch: int, latents: float, degree: int, settings: Mapping[str, Option]
    ) -> RankWork:
        partial = float(settings["partial"])
        neighbours = min(2, branch - 1)
        own = stripe_work(job, branch, latents, key_share=min(1.0, (1 + neighbours * partial) / branch))
        sent = 1.0 if settings["whole_stripes"] else partial
        traffic = kv_bytes(job, latents) * neighbours * sent / branch + halo_bytes(job, latents) * (branch - 1)
        messages, blocking = _steady_messages(job, branch, settings)
        return replace(
            own,
            exchange="stripes",
            received_bytes=traffic + _noise_gather(job, degree),
            messages=messages,
            blocking_messages=blocking,
            window=1.0 / max(1, job.table.exchanged.self_attentions),
        )


@register
class AsyncDiff(Method):
    """Asynchronous denoising: the UNet cut into N components that run side by side on one-step-old inputs.

    N = degree - stride + 1. Every GPU holds the whole model; tensors between components block. With stride 2, two
    denoising steps share one round and an extra GPU predicts the noise of the first. `public_cut` takes the components
    and broadcasts of the public code for the networks that it knows; without it, and for any other network, the cut is
    balanced and only tensors that cross it travel.
    """

    name = "asyncdiff"
    defaults: ClassVar[Mapping[str, Option]] = {"stride": 1, "warmup_steps": 1, "public_cut": True}

    def settings(self, job: Denoising, options: Mapping[str, Option]) -> dict[str, Option]:
        warmup = {"warmup_steps": 3 if job.family == "sdxl" else 1}
        return {**self.defaults, **warmup, **options}

    def _rule_problems(self, job: Denoising, degree: int, settings: Mapping[str, Option]) -> list[Problem]:
        stride = settings["stride"]
        if stride not in (1, 2):
            return [Problem("stride", str(stride), "AsyncDiff has stride 1 or 2")]
        components = degree - int(stride) + 1
        if degree > 1 and components not in (2, 3, 4):
            allowed = ", ".join(str(count + int(stride) - 1) for count in (2, 3, 4))
            rule = f"components N = degree - stride + 1 must be 2, 3 or 4; here N = {components}"
            return [Problem("degree", str(degree), rule, f"With stride {stride} choose a degree of {allowed}.")]
        return _warmup_problems(settings)

    def _counts(self, num_steps: int, settings: Mapping[str, Option]) -> list[Count]:
        warmup = min(int(settings["warmup_steps"]), num_steps)
        rest = num_steps - warmup
        return [("warmup", warmup, warmup), ("steady", rest, -(-rest // int(settings["stride"])))]

    def _ranks(self, job: Denoising, degree: int, settings: Mapping[str, Option], phase: str) -> tuple[RankWork, ...]:
        if phase == "warmup":
            return (whole(job),)
        stride = int(settings["stride"])
        works = component_works(job, degree - stride + 1, public_cut=bool(settings["public_cut"]))
        passes = stride * job.table.ops
        return tuple(replace(work, reused_ops=passes - work.kernels.ops) for work in works)


def option_types(options: Options) -> tuple[type, ...]:
    """What tells 1, 1.0 and true apart in a key: they are equal, and not all of them are legal."""
    return tuple(type(value) for _, value in options)


def _written(value: object) -> str:
    """A value as a person types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _branch(degree: int, settings: Mapping[str, Option]) -> int:
    return degree // 2 if settings["guidance_split"] and degree > 1 else degree


def _noise_gather(job: Denoising, degree: int) -> float:
    return job.noise_bytes() * (degree - 1) / degree


def _steady_messages(job: Denoising, branch: int, settings: Mapping[str, Option]) -> tuple[int, int]:
    """Messages of a steady step and those of them that block: the noise always, GroupNorms as the mode says."""
    if branch == 1:
        return 1, 1
    exchanged = job.table.exchanged
    norms = 0 if settings["sync_mode"] == "separate_gn" else exchanged.group_norms
    blocking = norms if settings["sync_mode"] == "sync_gn" else 0
    return exchanged.layers + norms + 1, blocking + 1


def _warmup_problems(settings: Mapping[str, Option]) -> list[Problem]:
    steps = settings["warmup_steps"]
    if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1:
        return []
    rule = "counts synchronous steps: at least 1, since the first step has no earlier one to reuse"
    return [Problem("warmup_steps", str(steps), rule)]


def _stripe_problems(job: Denoising, branch: int) -> list[Problem]:
    """Every activation's rows must divide evenly over the stripes (distrifuser issue 17: 12 rows on 8 GPUs fail)."""
    rows = sorted({layer.rows for layer in job.layers if layer.rows})
    uneven = [count for count in rows if count % branch]
    if not uneven:
        return []
    fitting = [count for count in range(1, rows[0] + 1) if all(row % count == 0 for row in rows)]
    rule = f"every activation's rows must divide by the stripes; {uneven[0]} rows do not divide by {branch}"
    remedy = f"Stripe counts that fit this size: {', '.join(map(str, fitting))}."
    return [Problem("degree", f"{branch} stripes", rule, remedy)]
