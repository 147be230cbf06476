"""Seconds of a stage's denoising: what one rank computes in a round, and the exchange that it does not hide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybridsd_sim.calibration import speed_of
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.methods import Phase, find_method
from hybridsd_sim.partition import Denoising, RankWork
from hybridsd_sim.plan import Kind, Request, Stage
from hybridsd_sim.profiles import CostRow, Profiles
from hybridsd_sim.transfers import exchange_s, latent_elements
from hybridsd_sim.unet import unet_units


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
    """What `methods` needs to know about a stage of a request."""
    model = profiles.model(stage.model)
    size = (request.height_px, request.width_px)
    return Denoising(
        layers=model.layers(*size),
        units=unet_units(model.config, *size),
        num_steps=stage.num_steps,
        latents=request.unet_batch,
        guided=request.guided,
        latent_elements=latent_elements(request),
        family=model.latent_space,
    )


def stage_times(
    stage: Stage, request: Request, profiles: Profiles, *, prefer: Sequence[str] = ()
) -> Iterator[PhaseTime]:
    """The phases of a stage in order. Raises `IllegalPlanError` for a stage that its method cannot run."""
    job = denoising(stage, request, profiles)
    method, options = find_method(stage.method), dict(stage.options)
    if problems := method.problems(job, stage.degree, options):
        raise IllegalPlanError(problems)
    timer = _Timer(stage, request, profiles, prefer)
    for phase in method.phases(job, stage.degree, options):
        yield timer.time(phase)


class _Timer:
    """Times the phases of one stage."""

    def __init__(self, stage: Stage, request: Request, profiles: Profiles, prefer: Sequence[str]) -> None:
        self.stage, self.request, self.profiles, self.prefer = stage, request, profiles, prefer

    def time(self, phase: Phase) -> PhaseTime:
        row = self._exact_row(phase)
        if row is None:
            return self._modelled(phase)
        seconds = row.seconds_median * phase.rounds * self._calls(phase.work.latents)
        low, high = (bound / row.seconds_median * seconds for bound in row.range_s)
        return PhaseTime(name=phase.name, seconds=seconds, low_s=low, high_s=high, kind=row.kind, sources=(row.source,))

    def _modelled(self, phase: Phase) -> PhaseTime:
        site = self.stage.site
        flop = 2.0 * phase.work.macs
        model = self.profiles.model(self.stage.model)
        speed = speed_of(
            self.profiles, site.device, site.runtime, model=self.stage.model, flop=flop, precision=site.precision,
            prefer=self.prefer,
        )  # fmt: skip
        compute = speed.seconds(flop, model.ops * phase.work.ops_share * self._calls(phase.work.latents))
        exposed, low, high, sources = self._exposed(phase.work, compute)
        return PhaseTime(
            name=phase.name,
            seconds=(compute + exposed) * phase.rounds,
            low_s=(compute * (1 - speed.spread) + low) * phase.rounds,
            high_s=(compute * (1 + speed.spread) + high) * phase.rounds,
            kind="modelled",
            sources=(*speed.sources, *sources),
            note=speed.note,
            comm_bytes=phase.work.received_bytes * phase.rounds,
            comm_exposed_s=exposed * phase.rounds,
            within=speed.within,
        )

    def _exposed(self, rank: RankWork, compute: float) -> tuple[float, float, float, tuple[str, ...]]:
        """Exposed exchange of one round: middle, low, high seconds, and the interconnect's source."""
        if rank.messages == 0:
            return 0.0, 0.0, 0.0, ()
        stage = self.stage
        name = stage.site.interconnect or self.profiles.default_interconnect(stage.site.device)
        link = self.profiles.interconnect(name)
        sharing = 1.0 if link.scales_with_devices else min(1.0, 2.0 / stage.degree)
        rates = (link.bandwidth_bytes_per_s, link.bandwidth_high, link.bandwidth_low)
        middle, low, high = (exchange_s(rank, rate * sharing, link.latency_s, compute) for rate in rates)
        return middle, low, high, (link.source,)

    def _calls(self, latents: float) -> int:
        limit = self.profiles.runtime(self.stage.site.runtime).max_unet_batch
        return -(-int(latents) // limit) if limit else 1

    def _exact_row(self, phase: Phase) -> CostRow | None:
        """The timed row of this very step on one device, if there is one; multi-GPU steps are modelled."""
        if self.stage.degree != 1:
            return None
        site, size = self.stage.site, (self.request.height_px, self.request.width_px)
        return self.profiles.step_row(
            site.device, site.runtime, self.stage.model, size,
            latents=int(phase.work.latents), precision=site.precision, prefer=self.prefer,
        )  # fmt: skip
