"""Seconds of a stage's denoising, phase by phase (synchronous warm-up, then steady), with their intervals.

A phase takes its number of collective steps times the seconds of one. A step that was timed is used as it stands; where
only the device's own time of the whole step is known, the device fit says which share of it a rank needs. What does not
depend on the number of steps is worked out once for every stage that differs in nothing else.

A *collective step* of a worker group takes as long as its slowest rank: the rank's kernels under the device fit, the
modules whose cached outputs AsyncDiff only hands on, and the part of the exchange that compute does not hide. Its
interval follows from the covariance of the device's parameters, the spread of the method constants and of the
interconnect, and what the fit left unexplained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log, sqrt

import numpy as np

from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.estimate import Z90, Estimate
from hybridsd_sim.perf.device_fit import (
    PRIOR_ROWS,
    SOURCE_SPREAD,
    Fit,
    call_kernels,
    calls,
    fit_of,
    latents_per_call,
)
from hybridsd_sim.perf.parallel_methods import Count, Option, find_method, heaviest, option_types
from hybridsd_sim.perf.partition import Denoising, RankWork, elements_of
from hybridsd_sim.perf.roofline import ELEMENT_BYTES, Batch, Floats, layer_table
from hybridsd_sim.perf.unet import unet_units
from hybridsd_sim.plan import Request, Stage
from hybridsd_sim.profiles import CostRow, Interconnect, Profiles, alike, derived


@dataclass(frozen=True, slots=True)
class Constant:
    """What a parallel method costs beside compute and bytes, the same on every device: where the fit starts.

    `value` and `spread` (standard deviation of the logarithm) are the prior: orders of magnitude of NCCL calls, copies
    and hooks, chosen by people who had seen the published tables. Other centres, or spreads three times as wide, leave
    the held-out errors below 5%.
    """

    name: str
    value: float
    spread: float
    meaning: str


CONSTANTS = (
    Constant("message_s", 3e-5, 1.0, "seconds a layer's exchange costs a rank beside the link: pack, post, wait"),
    Constant("hidden_share", 0.5, 0.5, "part of an asynchronous exchange that hides behind compute"),
    Constant("stripes_link_share", 0.6, 0.5, "part of the link's bandwidth that many small gathers reach"),
    # The catalogue's bandwidths were measured with messages of this size, hence so narrow a prior.
    Constant("broadcasts_link_share", 1.0, 0.08, "part of the link's bandwidth that whole activations reach"),
    Constant("walk_share", 0.1, 1.0, "part of a launch that a cached module costs the host"),
)
"""The method constants, in the order of every vector of them."""

_NAMES = tuple(constant.name for constant in CONSTANTS)


@derived()
def constants_of(profiles: Profiles) -> tuple[Floats, Floats]:
    """Natural logarithms of the method constants as fitted and their covariance; where none was, their prior."""
    rows = [profiles.constants.get(constant.name) for constant in CONSTANTS]
    values = [row.value if row else start.value for row, start in zip(rows, CONSTANTS, strict=True)]
    spreads = [row.spread if row else start.spread for row, start in zip(rows, CONSTANTS, strict=True)]
    return np.log(values), np.diag(np.square(spreads))


def unexplained_share(profiles: Profiles) -> float:
    """Standard deviation that published multi-GPU times keep around the model, relative; 10% before any were seen."""
    row = profiles.constants.get("unexplained_share")
    return row.value if row else 0.10


def contention(profiles: Profiles, link: Interconnect | None, device: str) -> tuple[float, float]:
    """By how much ranks of one machine's CPU slow each other's compute, and the spread of its logarithm."""
    shared = link is not None and link.shares_memory and device not in profiles.gpus
    row = profiles.constants.get("contention") if shared else None
    return (row.value, row.spread) if row else (1.0, 0.0)


def link_bytes_per_s(link: Interconnect, rank: RankWork, degree: int, constants: Floats) -> float:
    """Bytes a second that one rank receives in this kind of exchange.

    Over a shared bus, gathers of more than two GPUs slow down with the square root of their number (PCIe 5.0: 54 GB/s
    between two, 35 among four, 28 among eight; NVIDIA/nccl#1639); a broadcast has one sender at a time.
    """
    bandwidth = link.bandwidth_bytes_per_s
    if rank.exchange == "broadcasts":
        return bandwidth * exp(constants[_NAMES.index("broadcasts_link_share")])
    shared = 1.0 if link.scales_with_devices else min(1.0, sqrt(2.0 / degree))
    small = exp(constants[_NAMES.index("stripes_link_share")]) if rank.exchange == "stripes" else 1.0
    return bandwidth * shared * small


def exchange_s(rank: RankWork, bytes_per_s: float, latency_s: float, compute_s: float, constants: Floats) -> float:
    """Seconds of a round's exchange that its compute does not hide.

    Blocking messages show whole. Of the others a share hides, each up to its `window` of the compute, and all of them
    up to the compute itself: they share one link.
    """
    if rank.messages == 0:
        return 0.0
    message_s = latency_s + (exp(constants[_NAMES.index("message_s")]) if rank.exchange == "stripes" else 0.0)
    total = rank.received_bytes / bytes_per_s + rank.messages * message_s
    free = rank.messages - rank.blocking_messages
    if rank.window == 0.0 or free == 0:
        return total
    hideable = total - rank.blocking_messages * message_s
    share = min(1.0, exp(constants[_NAMES.index("hidden_share")]))
    return total - min(share * hideable, min(1.0, free * rank.window) * compute_s)


def reused_modules_s(rank: RankWork, launch_s_per_op: float, constants: Floats) -> float:
    """Seconds in which the host walks over modules that only hand their cached outputs on (AsyncDiff)."""
    return rank.reused_ops * launch_s_per_op * exp(constants[_NAMES.index("walk_share")])


def actual_link(profiles: Profiles, name: str, degree: int) -> Interconnect:
    """The interconnect of a worker group of `degree` GPUs: a bridge joins two cards, more meet on the bus below."""
    link = profiles.interconnect(name)
    return profiles.interconnect(link.beyond_pairs) if link.beyond_pairs and degree > 2 else link


_STEP = 1e-4
"""Nudge of a logarithm in numeric derivatives."""


class CollectiveStep:
    """One round of a phase as a function of everything it rests on, each as a logarithm.

    The vector holds the device's parameters, the method constants, and the link's bandwidth relative to its middle.
    """

    def __init__(
        self,
        ranks: Sequence[RankWork],
        fit: Fit,
        anchor: tuple[CostRow, float] | None,
        link: Interconnect | None,
        degree: int,
        profiles: Profiles,
    ) -> None:
        self.ranks, self.link, self.degree = ranks, link, degree
        row, level_spread = anchor or (None, fit.sigma)
        whole = [call_kernels(profiles, row)] if row else []
        self._anchor_s = row.seconds_median / calls(profiles, row.runtime, row.latents) if row else None
        self._batch = Batch([*whole, *(rank.kernels for rank in ranks)])
        self._log_parameters, self._middle_s = fit.log_parameters, self._computed_s(fit.log_parameters)
        constants, constants_covariance = constants_of(profiles)
        self.middle: Floats = np.concatenate([fit.log_parameters, constants, [0.0]])
        link_spread = log(link.bandwidth_high / link.bandwidth_low) / (2 * Z90) if link else 0.0
        count = len(fit.log_parameters)
        self._covariance = np.zeros((len(self.middle), len(self.middle)))  # the three groups are independent
        self._covariance[:count, :count] = fit.covariance
        self._covariance[count:-1, count:-1] = constants_covariance
        self._covariance[-1, -1] = link_spread**2
        self._slower, slower_spread = contention(profiles, link, fit.device)
        self._noise = sqrt(level_spread**2 + slower_spread**2 + (unexplained_share(profiles) ** 2 if link else 0.0))

    def seconds(self, vector: Floats) -> tuple[float, float]:
        """Seconds of the slowest rank, and those of its exchange that show."""
        log_parameters, constants, width = self._split(vector)
        times = self._middle_s if (log_parameters == self._log_parameters).all() else self._computed_s(log_parameters)
        slowest = (0.0, 0.0)
        for rank, compute in zip(self.ranks, (times * self._slower).tolist(), strict=True):
            busy, shown = compute + reused_modules_s(rank, exp(log_parameters[-1]), constants), 0.0
            if self.link:
                rate = link_bytes_per_s(self.link, rank, self.degree, constants) * exp(width[0])
                shown = exchange_s(rank, rate, self.link.latency_s, compute, constants)
            slowest = max(slowest, (busy + shown, shown))
        return slowest

    def _split(self, vector: Floats) -> tuple[Floats, Floats, Floats]:
        """The device's parameters, the method constants, and the link's relative bandwidth."""
        return vector[: len(self._log_parameters)], vector[len(self._log_parameters) : -1], vector[-1:]

    def _computed_s(self, log_parameters: Floats) -> Floats:
        """Seconds that each rank computes under a device's `log_parameters`."""
        times = self._batch.seconds(log_parameters)
        return times[1:] * (self._anchor_s / times[0]) if self._anchor_s else times

    def seconds_with(self, constants: Floats) -> float:
        """Seconds with other method constants (logarithms), all else in its middle."""
        log_parameters, _, width = self._split(self.middle)
        return self.seconds(np.concatenate([log_parameters, constants, width]))[0]

    def log_spread(self) -> float:
        """Standard deviation of the logarithm of the round's seconds."""
        middle = self.seconds(self.middle)[0]
        nudges = np.eye(len(self.middle)) * _STEP
        gradient = np.array([log(self.seconds(self.middle + nudge)[0] / middle) for nudge in nudges]) / _STEP
        return sqrt(float(gradient @ self._covariance @ gradient) + self._noise**2)


SIMULTANEOUS = ("gloo", "nccl")
"""What carries ranks that run at the same time; those of loopback take turns on one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """How long one phase of a stage takes, warm-up or steady, all its rounds together, at 90%.

    `comm_bytes` are what one GPU receives, `comm_exposed_s` the seconds of exchange that compute does not hide. The
    seconds are `within` as long as the device was timed on calls of about this size.
    """

    name: str
    seconds: Estimate
    comm_bytes: float = 0.0
    comm_exposed_s: float = 0.0


def denoising(stage: Stage, request: Request, profiles: Profiles) -> Denoising:
    """What a parallel method needs to know about a stage of a request; its latents are those of one UNet call."""
    return replace(job_of(stage, request, profiles), num_steps=stage.num_steps)


JobKey = tuple[str, int, int, int, bool, str]
"""What a job depends on besides its steps: model, height and width in px, latents a call, guidance, precision."""


def _job_key(stage: Stage, request: Request, profiles: Profiles) -> JobKey:
    latents = -(-request.unet_batch // calls(profiles, stage.site.runtime, request.unet_batch))
    return stage.model, request.height_px, request.width_px, latents, request.guided, stage.site.precision


@derived(key=_job_key, most=1024)
def job_of(stage: Stage, request: Request, profiles: Profiles) -> Denoising:
    """The same as `denoising` whatever the number of steps, of which it has one."""
    name, height_px, width_px, latents, guided, precision = _job_key(stage, request, profiles)
    model = profiles.model(name)
    return Denoising(
        table=layer_table(model.config, height_px, width_px, model.ops),
        units=unet_units(model.config, height_px, width_px),
        num_steps=1,
        latents=latents,
        guided=guided,
        latent_elements=elements_of(height_px, width_px),
        family=model.latent_space,
        element_bytes=4.0 if precision == "fp32" else 2.0,
        weight_bytes=ELEMENT_BYTES.get(precision, 2.0),
        public_cuts=profiles.public_cuts(name),
    )


def stage_times(stage: Stage, request: Request, profiles: Profiles, prefer: tuple[str, ...] = ()) -> list[PhaseTime]:
    """The phases of a stage in order. Raises `IllegalPlanError` for a stage that its method cannot run."""
    return timer_of(stage, request, profiles, prefer).times(stage.num_steps)


@derived(
    key=lambda stage, request, _, prefer=(): (
        *(stage.site.device, stage.site.runtime, stage.site.precision, stage.site.interconnect),
        *(stage.model, stage.method, stage.degree, stage.options, option_types(stage.options)),
        *(request.height_px, request.width_px, request.unet_batch, request.guided, prefer),
    )
)
def timer_of(stage: Stage, request: Request, profiles: Profiles, prefer: tuple[str, ...] = ()) -> StageTimer:
    """Times the stage and every other that differs from it in its steps, or in what its site is called and costs.

    Raises `IllegalPlanError` for a stage that its method cannot run.
    """
    timer = StageTimer(stage, request, profiles, prefer)
    if problems := timer.method.problems(timer.job, stage.degree, dict(stage.options)):
        raise IllegalPlanError(problems)
    return timer


def stage_collectives(stage: Stage, request: Request, profiles: Profiles) -> list[tuple[int, CollectiveStep]]:
    """The rounds of a stage on several GPUs, phase by phase, with how many there are of each."""
    timer = StageTimer(stage, request, profiles, ())
    return [(rounds * timer.calls, timer.round(name)) for name, _, rounds in timer.counts(stage.num_steps)]


class StageTimer:
    """Times the phases of a stage. All that does not depend on its number of steps is worked out once."""

    def __init__(self, stage: Stage, request: Request, profiles: Profiles, prefer: Sequence[str]) -> None:
        self.stage, self.profiles, self.latents = stage, profiles, request.unet_batch
        self.size = (request.height_px, request.width_px)
        site = stage.site
        self.calls = calls(profiles, site.runtime, request.unet_batch)
        self.method, self.job = find_method(stage.method), job_of(stage, request, profiles)
        self.settings = self.method.settings(self.job, dict(stage.options))
        self.ranks_key = (stage.method, stage.degree, stage.options, *_job_key(stage, request, profiles))
        self._by_phase: dict[str, Callable[[int, int], PhaseTime]] = {}
        where = (site.device, site.runtime, stage.model)
        rows = profiles.step_rows(*where, site.precision, prefer=prefer)
        self.row = profiles.step_row(
            *where, self.size, latents=request.unet_batch, precision=site.precision, prefer=prefer
        )
        wanted = self.size[0] * self.size[1] * self.latents / self.calls

        def distance(row: CostRow) -> float:
            """How far a row's call lies from the wanted one, in logarithms of image area times latents."""
            return abs(log(row.height_px * row.width_px * latents_per_call(profiles, row) / wanted))

        self.anchor = self.row or min(rows, key=distance, default=None)
        self.level_spread = self._level_spread(rows)

    def counts(self, num_steps: int) -> list[Count]:
        """The phases of so many steps."""
        return self.method.counts(num_steps, self.stage.degree, self.settings)

    def times(self, num_steps: int) -> list[PhaseTime]:
        """How long the phases of so many steps take."""
        found = []
        for name, steps, rounds in self.counts(num_steps):
            if name not in self._by_phase:
                self._by_phase[name] = self._phase_timer(name)
            found.append(self._by_phase[name](steps, rounds))
        return found

    def _level_spread(self, rows: Sequence[CostRow]) -> float:
        """Standard deviation of the anchor's logarithm: its repetition and, unless measured, what sources differ by."""
        anchor = self.anchor
        if anchor is None:
            return 0.0
        repetition = log(anchor.seconds.high / anchor.seconds.low) / (2 * Z90)
        if anchor.kind == "measured":
            return repetition
        call = (anchor.height_px, anchor.width_px, anchor.latents)
        same = [row for row in rows if (row.height_px, row.width_px, row.latents) == call]
        gaps = [log(row.seconds_median / anchor.seconds_median) for row in same]
        variance = PRIOR_ROWS * SOURCE_SPREAD**2 + sum(gap**2 for gap in gaps)
        return hypot(repetition, sqrt(variance / (PRIOR_ROWS + len(gaps) - 1)))

    def _phase_timer(self, phase: str) -> Callable[[int, int], PhaseTime]:
        """What times a phase from its steps and rounds: the row that timed it, else the model."""
        calls, row = self.calls, self.row
        if self.stage.degree == 1 and row is not None:
            each = row.seconds
            if row.kind != "measured":
                each = Estimate.by_factor(each.value, exp(Z90 * self.level_spread), each.kind, each.sources)
            return lambda _, rounds: _timed(phase, row, each, rounds * calls)
        if self.stage.degree > 1 and (group := self._group_row(phase)) is not None:
            whole = replace(group.seconds, note="measured as a whole, its exchange inside")
            return lambda steps, _: _timed(phase, group, whole, steps)
        return self._model_timer(phase)

    def _group_row(self, phase: str) -> CostRow | None:
        """The measured step of this very worker group, if there is one, over the device's own interconnect.

        It timed the stage's network, latents, precision and options, each rank on its own device.
        """
        stage, component = self.stage, "step_warmup" if phase == "warmup" else "step"
        if stage.site.interconnect is not None:
            return None
        architecture_of, precision = self.profiles.architecture_of, alike(stage.site.precision)
        key = (stage.site.device, stage.site.runtime, component, stage.method, stage.degree, *self.size)
        for row in _rows_of_groups(self.profiles).get(key, ()):
            options = row.option_texts
            at_once = row.rank is None and options.pop("ranks", "") in SIMULTANEOUS
            same_network = architecture_of(row.model) == architecture_of(stage.model)
            same_call = same_network and row.latents == self.latents and alike(row.precision) == precision
            if at_once and same_call and _texts(self.settings) == _texts({**self.method.defaults, **options}):
                return row
        return None

    def _model_timer(self, phase: str) -> Callable[[int, int], PhaseTime]:
        """What times a phase from its rounds where nobody timed it."""
        fit, round_, calls = self._fit, self.round(phase), self.calls
        seconds, exposed = round_.seconds(round_.middle)
        width, work = exp(Z90 * round_.log_spread()), heaviest(round_.ranks)
        within = self.row is not None or fit.holds(work.kernels.flops)
        note, own, anchor = fit.note, fit.sources, self.anchor
        if anchor is not None:
            note += (
                f"; anchored on its step of {anchor.seconds_median:.4g} s at {anchor.height_px}x{anchor.width_px} px"
            )
            own = (anchor.source,)
        elif not within and fit.flops:
            call, least, most = (flop / 1e12 for flop in (work.kernels.flops, min(fit.flops), max(fit.flops)))
            note += f"; a call of {call:.3g} TFLOPs, where {least:.3g} to {most:.3g} were timed"
        sources = tuple(dict.fromkeys((*own, *([round_.link.source] if round_.link else []))))

        def time_rounds(_: int, rounds: int) -> PhaseTime:
            count = rounds * calls
            return PhaseTime(
                name=phase,
                # from the factor, as the ends of many rounds were always rounded
                seconds=Estimate.by_factor(seconds * count, width, sources=sources, note=note, within=within),
                comm_bytes=work.received_bytes * count,
                comm_exposed_s=exposed * count,
            )

        return time_rounds

    @property
    def _fit(self) -> Fit:
        site = self.stage.site
        return fit_of(self.profiles, site.device, site.runtime, site.precision)

    def round(self, phase: str) -> CollectiveStep:
        """One round of a phase."""
        anchor = None if self.anchor is None else (self.anchor, self.level_spread)
        ranks, link, site = _ranks(self, phase, self.profiles), None, self.stage.site
        if heaviest(ranks).messages:
            name = site.interconnect or self.profiles.default_interconnect(site.device)
            link = actual_link(self.profiles, name, self.stage.degree)
        return CollectiveStep(ranks, self._fit, anchor, link, self.stage.degree, self.profiles)


@derived(key=lambda timer, phase, _: (phase, *timer.ranks_key), most=256)
def _ranks(timer: StageTimer, phase: str, profiles: Profiles) -> tuple[RankWork, ...]:  # noqa: ARG001 it keeps them
    """The loads of a round, which no device changes."""
    return timer.method.ranks(timer.job, timer.stage.degree, timer.settings, phase)


@derived()
def _rows_of_groups(profiles: Profiles) -> dict[tuple[object, ...], list[CostRow]]:
    """The measured steps of several ranks as a whole, by what they timed."""
    found: dict[tuple[object, ...], list[CostRow]] = {}
    for row in profiles.costs:
        if row.kind == "measured" and row.degree > 1 and row.rank is None:
            key = (row.device, row.runtime, row.component, row.method, row.degree, row.height_px, row.width_px)
            found.setdefault(key, []).append(row)
    return found


def _texts(options: Mapping[str, Option]) -> dict[str, str]:
    """Options as a row writes them; the cost of a step does not depend on how many steps are synchronous."""
    return {name: str(value).lower() for name, value in options.items() if name != "warmup_steps"}


def _timed(name: str, row: CostRow, each: Estimate, count: int) -> PhaseTime:
    """As many of a timed row as the phase has, of which one takes `each`."""
    return PhaseTime(name=name, seconds=count * each, comm_bytes=float(row.comm_bytes or 0) * count)
