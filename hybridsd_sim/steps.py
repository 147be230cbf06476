"""Seconds of a stage's denoising: what one rank computes in a round, and the exchange that it does not hide.

A round takes as long as its slowest rank: the rank's kernels under the device's law (`calibration`), AsyncDiff's walks,
and the part of the exchange that stays visible (`transfers`). Where the device's own time of the whole step is known,
the law only says which share of it a rank needs. Intervals follow from the covariance of the device's parameters, the
spread of the method constants and of the link, and what the law left unexplained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, hypot, log, sqrt

import numpy as np

from hybridsd_sim.calibration import ROWS_OF_DOUBT, SOURCE_SPREAD, Z90, Fit, call_kernels, calls, fit_of
from hybridsd_sim.cost_rows import alike
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.methods import Option, Phase, find_method
from hybridsd_sim.partition import Denoising
from hybridsd_sim.plan import Kind, Request, Stage
from hybridsd_sim.profiles import CostRow, Interconnect, Profiles
from hybridsd_sim.roofline import ELEMENT_BYTES, Batch, Floats, layer_table
from hybridsd_sim.transfers import (
    actual_link,
    constants_of,
    contention,
    exchange_s,
    latent_elements,
    link_bytes_per_s,
    unexplained_share,
    walk_s,
)
from hybridsd_sim.unet import unet_units

SIMULTANEOUS = ("gloo", "nccl")
"""What carries ranks that run at the same time; those of loopback take turns on one device."""
_STEP = 1e-4
"""Nudge of a logarithm in numeric derivatives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """How long one phase of a stage takes, warm-up or steady, all its rounds together.

    `low_s` and `high_s` bound the seconds at 90%. `comm_bytes` are what one GPU receives, `comm_exposed_s` the seconds
    of exchange that compute does not hide. `within` is false outside what was timed on the device.
    """

    name: str
    seconds: float
    low_s: float
    high_s: float
    kind: Kind
    sources: tuple[str, ...]
    note: str = ""
    comm_bytes: float = 0.0
    comm_exposed_s: float = 0.0
    within: bool = True


def denoising(stage: Stage, request: Request, profiles: Profiles) -> Denoising:
    """What `methods` needs to know about a stage of a request; its latents are those of one UNet call."""
    model, precision = profiles.model(stage.model), stage.site.precision
    size = (request.height_px, request.width_px)
    return Denoising(
        table=layer_table(model.config, *size, model.ops),
        units=unet_units(model.config, *size),
        num_steps=stage.num_steps,
        latents=-(-request.unet_batch // calls(profiles, stage.site.runtime, request.unet_batch)),
        guided=request.guided,
        latent_elements=latent_elements(request),
        family=model.latent_space,
        element_bytes=4.0 if precision == "fp32" else 2.0,
        weight_bytes=ELEMENT_BYTES.get(precision, 2.0),
        public_cuts=profiles.public_cuts(stage.model),
    )


def stage_times(
    stage: Stage, request: Request, profiles: Profiles, *, prefer: Sequence[str] = ()
) -> Iterator[PhaseTime]:
    """The phases of a stage in order. Raises `IllegalPlanError` for a stage that its method cannot run."""
    job = denoising(stage, request, profiles)
    method, options = find_method(stage.method), dict(stage.options)
    if problems := method.problems(job, stage.degree, options):
        raise IllegalPlanError(problems)
    timer = _Timer(stage, request, profiles, prefer, method.settings(job, options))
    for phase in method.phases(job, stage.degree, options):
        yield timer.time(phase)


def stage_rounds(stage: Stage, request: Request, profiles: Profiles) -> list[tuple[int, Round]]:
    """The rounds of a stage on several GPUs, phase by phase, with how many there are of each."""
    job, timer = denoising(stage, request, profiles), _Timer(stage, request, profiles, (), {})
    site = stage.site
    fit = fit_of(profiles, site.device, site.runtime, site.precision)
    phases = find_method(stage.method).phases(job, stage.degree, dict(stage.options))
    return [(phase.rounds * timer.calls, timer.round(phase, fit)) for phase in phases]


def law_s(row: CostRow, profiles: Profiles) -> tuple[float, float, float]:
    """Seconds that the device's law gives the step of a one-GPU row, and the ends of their 90% interval."""
    fit, kernels = fit_of(profiles, row.device, row.runtime, row.precision), call_kernels(profiles, row)
    middle = fit.seconds(kernels) * calls(profiles, row.runtime, row.latents)
    width = exp(Z90 * fit.log_spread(kernels))
    return middle, middle / width, middle * width


class _Timer:
    """Times the phases of one stage."""

    def __init__(
        self,
        stage: Stage,
        request: Request,
        profiles: Profiles,
        prefer: Sequence[str],
        settings: Mapping[str, Option],
    ) -> None:
        self.settings = settings
        self.stage, self.profiles, self.latents = stage, profiles, request.unet_batch
        self.size = (request.height_px, request.width_px)
        site = stage.site
        self.calls = calls(profiles, site.runtime, request.unet_batch)
        where = (site.device, site.runtime, stage.model)
        rows = profiles.step_rows(*where, site.precision, prefer=prefer)
        self.row = profiles.step_row(
            *where, self.size, latents=request.unet_batch, precision=site.precision, prefer=prefer
        )
        self.anchor = self.row or min(rows, key=self._distance, default=None)
        self.level_spread = self._level_spread(rows)

    def _distance(self, row: CostRow) -> float:
        """How far a row's call lies from the wanted one, in logarithms of image area times latents."""
        held = row.latents / calls(self.profiles, row.runtime, row.latents)
        wanted = self.size[0] * self.size[1] * self.latents / self.calls
        return abs(log(row.height_px * row.width_px * held / wanted))

    def _level_spread(self, rows: Sequence[CostRow]) -> float:
        """Standard deviation of the anchor's logarithm: its repetition and, unless measured, what sources differ by."""
        anchor = self.anchor
        if anchor is None:
            return 0.0
        low, high = anchor.range_s
        repetition = log(high / low) / (2 * Z90)
        if anchor.kind == "measured":
            return repetition
        gaps = [log(row.seconds_median / anchor.seconds_median) for row in rows if self._timed_the_same(row, anchor)]
        doubt = ROWS_OF_DOUBT * SOURCE_SPREAD**2 + sum(gap**2 for gap in gaps)
        return hypot(repetition, sqrt(doubt / (ROWS_OF_DOUBT + len(gaps) - 1)))

    @staticmethod
    def _timed_the_same(row: CostRow, anchor: CostRow) -> bool:
        return (row.height_px, row.width_px, row.latents) == (anchor.height_px, anchor.width_px, anchor.latents)

    def time(self, phase: Phase) -> PhaseTime:
        if self.stage.degree == 1 and self.row is not None:
            width = exp(Z90 * self.level_spread)
            seconds = self.row.seconds_median
            bounds = self.row.range_s if self.row.kind == "measured" else (seconds / width, seconds * width)
            return _timed(phase.name, self.row, phase.rounds * self.calls, bounds=bounds)
        if self.stage.degree > 1 and (row := self._gang_row(phase)) is not None:
            note = "measured as a whole, its exchange inside"
            return _timed(phase.name, row, phase.steps, bounds=row.range_s, note=note)
        return self._modelled(phase)

    def _gang_row(self, phase: Phase) -> CostRow | None:
        """The measured step of this very gang, if there is one, over the device's own interconnect."""
        stage, component = self.stage, "step_warmup" if phase.name == "warmup" else "step"
        if stage.site.interconnect is not None:
            return None
        key = (stage.site.device, stage.site.runtime, component, stage.method, stage.degree, *self.size)
        rows = _gangs(self.profiles).get(key, ())
        return next((row for row in rows if self._is_of(row)), None)

    def _is_of(self, row: CostRow) -> bool:
        """Whether a row timed this stage's network, latents, precision and options, each rank on its own device."""
        said = row.said
        carried = row.rank is None and said.pop("ranks", "") in SIMULTANEOUS
        mine, usual = (_texts(options) for options in (self.settings, find_method(row.method).defaults))
        models = {self.profiles.model(name).network for name in (row.model, self.stage.model)}
        same_precision = alike(row.precision) == alike(self.stage.site.precision)
        same_work = len(models) == 1 and row.latents == self.latents and same_precision
        return carried and same_work and mine == _texts({**usual, **said})

    def _modelled(self, phase: Phase) -> PhaseTime:
        site = self.stage.site
        fit = fit_of(self.profiles, site.device, site.runtime, site.precision)
        round_ = self.round(phase, fit)
        seconds, exposed = round_.seconds(round_.middle)
        width, count = exp(Z90 * round_.log_spread()), phase.rounds * self.calls
        within = self.row is not None or fit.holds(phase.work.kernels.flops)
        return PhaseTime(
            name=phase.name,
            seconds=seconds * count,
            low_s=seconds * count / width,
            high_s=seconds * count * width,
            kind="modelled",
            sources=self._sources(fit, round_.link),
            note=self._note(fit, phase, within=within),
            comm_bytes=phase.work.received_bytes * count,
            comm_exposed_s=exposed * count,
            within=within,
        )

    def _note(self, fit: Fit, phase: Phase, *, within: bool) -> str:
        if self.anchor is not None:
            row = self.anchor
            return (
                f"{fit.note}; anchored on its step of {row.seconds_median:.4g} s at {row.height_px}x{row.width_px} px"
            )
        if within or not fit.flops:
            return fit.note
        call, least, most = (flop / 1e12 for flop in (phase.work.kernels.flops, min(fit.flops), max(fit.flops)))
        return f"{fit.note}; a call of {call:.3g} TFLOPs, where {least:.3g} to {most:.3g} were timed"

    def round(self, phase: Phase, fit: Fit) -> Round:
        anchor = None if self.anchor is None else (self.anchor, self.level_spread)
        return Round(phase, fit, anchor, self._link(phase), self.stage.degree, self.profiles)

    def _link(self, phase: Phase) -> Interconnect | None:
        if not phase.work.messages:
            return None
        site = self.stage.site
        name = site.interconnect or self.profiles.default_interconnect(site.device)
        return actual_link(self.profiles, name, self.stage.degree)

    def _sources(self, fit: Fit, link: Interconnect | None) -> tuple[str, ...]:
        own = (self.anchor.source,) if self.anchor else fit.sources
        return tuple(dict.fromkeys((*own, *([link.source] if link else []))))


@lru_cache(maxsize=64)
def _gangs(profiles: Profiles) -> dict[tuple[object, ...], list[CostRow]]:
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


def _timed(name: str, row: CostRow, count: int, *, bounds: tuple[float, float], note: str = "") -> PhaseTime:
    """As many of a timed row as the phase has; `bounds` are those of one."""
    low, high = bounds
    return PhaseTime(
        name=name,
        seconds=row.seconds_median * count,
        low_s=low * count,
        high_s=high * count,
        kind=row.kind,
        sources=(row.source,),
        note=note,
        comm_bytes=float(row.comm_bytes or 0) * count,
    )


class Round:
    """One round of a phase as a function of everything it rests on, each as a logarithm.

    The vector holds the device's law, then the method constants, then the link's bandwidth relative to its middle.
    """

    def __init__(
        self,
        phase: Phase,
        fit: Fit,
        anchor: tuple[CostRow, float] | None,
        link: Interconnect | None,
        degree: int,
        profiles: Profiles,
    ) -> None:
        self.ranks, self.link, self.degree = phase.ranks, link, degree
        row, level_spread = anchor or (None, fit.sigma)
        whole = [call_kernels(profiles, row)] if row else []
        self._anchor_s = row.seconds_median / calls(profiles, row.runtime, row.latents) if row else None
        self._batch = Batch([*whole, *(rank.kernels for rank in phase.ranks)])
        constants, doubts = constants_of(profiles)
        self._parts = np.cumsum([len(fit.law), len(constants)])
        self.middle: Floats = np.concatenate([fit.law, constants, [0.0]])
        link_spread = log(link.bandwidth_high / link.bandwidth_low) / (2 * Z90) if link else 0.0
        self._covariance = _blocks(fit.covariance, doubts, np.array([[link_spread**2]]))
        self._slower, doubt = contention(profiles, link, fit.device)
        self._noise = sqrt(level_spread**2 + doubt**2 + (unexplained_share(profiles) ** 2 if link else 0.0))

    def seconds(self, vector: Floats) -> tuple[float, float]:
        """Seconds of the slowest rank, and those of its exchange that show."""
        law, constants, width = np.split(vector, self._parts)
        times = self._batch.seconds(law)
        if self._anchor_s:
            times = times[1:] * (self._anchor_s / times[0])
        slowest = (0.0, 0.0)
        for rank, compute in zip(self.ranks, (times * self._slower).tolist(), strict=True):
            busy, shown = compute + walk_s(rank, exp(law[-1]), constants), 0.0
            if self.link:
                rate = link_bytes_per_s(self.link, rank, self.degree, constants) * exp(width[0])
                shown = exchange_s(rank, rate, self.link.latency_s, compute, constants)
            slowest = max(slowest, (busy + shown, shown))
        return slowest

    def seconds_with(self, constants: Floats) -> float:
        """Seconds with other method constants (logarithms), all else in its middle."""
        law, _, width = np.split(self.middle, self._parts)
        return self.seconds(np.concatenate([law, constants, width]))[0]

    def log_spread(self) -> float:
        """Standard deviation of the logarithm of the round's seconds."""
        middle = self.seconds(self.middle)[0]
        nudges = np.eye(len(self.middle)) * _STEP
        gradient = np.array([log(self.seconds(self.middle + nudge)[0] / middle) for nudge in nudges]) / _STEP
        return sqrt(float(gradient @ self._covariance @ gradient) + self._noise**2)


def _blocks(*parts: Floats) -> Floats:
    """A covariance of independent groups."""
    size = sum(len(part) for part in parts)
    whole, at = np.zeros((size, size)), 0
    for part in parts:
        whole[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    return whole
