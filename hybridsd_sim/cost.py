"""The price of a plan when nobody else is there: seconds, dollars, joules, bytes and quality, by component.

`price` walks the plan's components in order (text encoder, denoising stages, VAE decoder, delivery), puts a transfer
wherever the next component runs on the other side of the access network, and returns parts that sum to the total. A
gang holds all its GPUs from its first component to its last, so every cloud part is charged for the whole gang.

What crosses the network: the prompt on the way up; at a switch step the latent, for multistep samplers the solver's
history, and the text embedding unless the edge encodes the prompt itself (then both sides encode, and the edge does so
while the cloud works); the latent alone before a VAE on the other side; the finished image on the way down. Tensors are
serialised at the sender and parsed at the receiver, each with its checksum.

What a phone takes end to end is more than the sum of its components. Where published pairs of both show such a gap, it
is a part of its own, `device_overhead`, a share of what the components took there. Reloading models for lack of memory,
which more than doubles a phone's time (Apple, SDXL: 77 s against 31 s at the same speed), is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hybridsd_sim.calibration import component_law_s
from hybridsd_sim.handover import End, handling
from hybridsd_sim.plan import KIND_ORDER, Kind, Plan, Request, Site, Stage
from hybridsd_sim.profiles import Component, Profiles
from hybridsd_sim.quality import Quality, quality_of
from hybridsd_sim.steps import stage_times
from hybridsd_sim.transfers import (
    PROMPT_BYTES,
    handover_bytes,
    image_bytes,
    latent_elements,
    transfer_s,
)
from hybridsd_sim.unet import work

COMPONENTS = ("text_encode", "denoise", "denoise_warmup", "vae_decode")
"""The parts whose sum an edge device exceeds end to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component of a price: what, where, how long, and what it costs.

    `devices` are GPUs (or the one edge device) held; 0 for a transfer. `low_s` and `high_s` bound the seconds at 90%.
    `critical` parts add to the latency; the edge's own text encoding runs beside the cloud and does not. `usd` or
    `energy_j` None means unknown, with the reason in `unknown`. `within` is false where the figure lies outside what
    was measured or quoted for that device.
    """

    name: str
    where: str
    tier: str
    seconds: float
    low_s: float
    high_s: float
    devices: int = 0
    usd: float | None = 0.0
    energy_j: float | None = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    comm_bytes: float = 0.0
    comm_exposed_s: float = 0.0
    kind: Kind = "modelled"
    sources: tuple[str, ...] = ()
    note: str = ""
    unknown: str = ""
    within: bool = True
    critical: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What one request under one plan costs without contention. Every total is the sum of its parts."""

    plan: Plan
    request: Request
    parts: tuple[Part, ...]
    quality: Quality
    flops: float
    flops_without_attention_products: float

    @property
    def latency_s(self) -> float:
        """Arrival to image."""
        return sum(part.seconds for part in self.parts if part.critical)

    @property
    def denoise_parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.name.startswith("denoise"))

    @property
    def denoise_s(self) -> float:
        """The UNet loop alone, which is what the papers time."""
        return sum(part.seconds for part in self.denoise_parts)

    @property
    def interval_s(self) -> tuple[float, float]:
        """90% interval of `denoise_s`."""
        return sum(part.low_s for part in self.denoise_parts), sum(part.high_s for part in self.denoise_parts)

    @property
    def latency_interval_s(self) -> tuple[float, float]:
        """90% interval of `latency_s`, as wide as if every part were at the same end of its own."""
        critical = [part for part in self.parts if part.critical]
        return sum(part.low_s for part in critical), sum(part.high_s for part in critical)

    @property
    def comm_exposed_s(self) -> float:
        return sum(part.comm_exposed_s for part in self.denoise_parts)

    @property
    def compute_s(self) -> float:
        return self.denoise_s - self.comm_exposed_s

    @property
    def comm_bytes(self) -> float:
        """Bytes that one GPU receives from the others over the whole request."""
        return sum(part.comm_bytes for part in self.parts)

    @property
    def gpu_seconds(self) -> float:
        return sum(part.seconds * part.devices for part in self.parts if part.tier == "cloud")

    @property
    def usd(self) -> float | None:
        return _total(part.usd for part in self.parts)

    @property
    def edge_energy_j(self) -> float | None:
        return _total(part.energy_j for part in self.parts)

    @property
    def bytes_down(self) -> int:
        return sum(part.bytes_down for part in self.parts)

    @property
    def bytes_up(self) -> int:
        return sum(part.bytes_up for part in self.parts)

    @property
    def kind(self) -> Kind:
        """The weakest kind among the parts that take time."""
        return _weakest([part for part in self.parts if part.seconds > 0])

    @property
    def steps_kind(self) -> Kind:
        """The weakest kind among the denoising steps, transfers and all else apart."""
        return _weakest(self.denoise_parts)

    @property
    def sources(self) -> tuple[str, ...]:
        found = (source for part in self.parts for source in part.sources)
        return tuple(dict.fromkeys((*found, *self.quality.sources)))

    @property
    def unknowns(self) -> tuple[str, ...]:
        """Why figures are None, for the reader."""
        notes = [part.unknown for part in self.parts if part.unknown]
        return tuple(dict.fromkeys([*notes, *([self.quality.note] if self.quality.clip is None else [])]))

    @property
    def outside(self) -> tuple[str, ...]:
        """Parts whose figure lies outside what was timed, each with its reason."""
        return tuple(f"{part.name} on {part.where}: {part.note}" for part in self.parts if not part.within)


def _weakest(parts: Sequence[Part]) -> Kind:
    return max((part.kind for part in parts), key=KIND_ORDER.__getitem__, default="modelled")


def _total(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value or 0.0 for value in known)


def price(
    plan: Plan, request: Request, profiles: Profiles, *, cold: bool = False, prefer: Sequence[str] = ()
) -> PlanCost:
    """The price of `request` under `plan` with nobody else there; `cold` adds the model load on every cloud site.

    Where sources disagree, measured goes before quoted before modelled, then the newer one; `prefer` names sources (any
    part of their text) that go before all others. Transfers run at the network's median rates; the simulator prices
    sampled rates with `transfer_s`. Raises `IllegalPlanError` for a plan its method cannot run, `MissingDataError` for
    devices that nobody timed.
    """
    pricer = _Pricer(plan, request, profiles, cold=cold, prefer=prefer)
    size = (request.height_px, request.width_px)
    flop, bare = plan_flops(plan, request, profiles)
    return PlanCost(
        plan=plan,
        request=request,
        parts=tuple(pricer.parts()),
        quality=quality_of(
            plan, profiles, wanted=request.model, guided=request.guided, size=size, sampler=request.sampler
        ),
        flops=flop,
        flops_without_attention_products=bare,
    )


def plan_flops(plan: Plan, request: Request, profiles: Profiles) -> tuple[float, float]:
    """FLOPs (2 x MACs) of all UNet evaluations, guidance included: with and without attention products."""
    flop = bare = 0.0
    for stage in plan.stages:
        total = work(profiles.model(stage.model).layers(request.height_px, request.width_px))
        evaluations = stage.num_steps * request.unet_batch
        flop += 2.0 * total.macs * evaluations
        bare += 2.0 * total.macs_without_attention * evaluations
    return flop, bare


class _Pricer:
    """Walks one plan's components in order and yields their parts."""

    def __init__(self, plan: Plan, request: Request, profiles: Profiles, *, cold: bool, prefer: Sequence[str]) -> None:
        self.plan, self.request, self.profiles, self.cold, self.prefer = plan, request, profiles, cold, prefer
        self.gang = {site.name: 1 for site in plan.sites.values()}
        for stage in plan.stages:
            self.gang[stage.site.name] = max(self.gang[stage.site.name], stage.degree)

    def parts(self) -> Iterator[Part]:
        """Every component in order, then what the edge adds to its own."""
        walked = tuple(self._walk())
        yield from walked
        yield from self._overheads(walked)

    def _walk(self) -> Iterator[Part]:
        plan, encode, vae = self.plan, self.plan.sites[self.plan.text_encode_site], self.plan.sites[self.plan.vae_site]
        first = plan.stages[0].site
        at = "edge" if plan.network else first.tier
        own_copy = encode.tier == "edge" and first.tier == "cloud"
        if own_copy:
            yield replace(self._text_encode(encode), name="text_encode_edge", critical=False)
            encode = first
        if at != encode.tier:
            yield self._transfer("prompt_transfer", "cloud", PROMPT_BYTES)
        yield from self._loads()
        yield self._text_encode(encode)
        here = encode
        for index, stage in enumerate(plan.stages):
            if stage.site.tier != here.tier:
                yield from self._handover(index, here, stage, with_embedding=not own_copy)
            yield from self._stage(stage)
            here = stage.site
        if vae.tier != here.tier:
            latent = latent_elements(self.request) * self.request.num_images * 2
            yield from self._crossing("latent_transfer", here, vae, latent)
        yield self._vae_decode(vae)
        if vae.tier == "cloud" and plan.network:
            yield self._transfer("image_transfer", "edge", image_bytes(self.request))

    def _loads(self) -> Iterator[Part]:
        if not self.cold:
            return
        for name, site in self.plan.sites.items():
            models = [stage.model for stage in self.plan.cloud_stages if stage.site.name == name]
            for model in dict.fromkeys(models or ["*"] * (site.tier == "cloud")):
                row = self.profiles.model_load(site.device, model)
                yield self._held("model_load", site, row.seconds_median, row.range_s, row.kind, (row.source,))

    def _handover(self, index: int, sender: Site, stage: Stage, *, with_embedding: bool) -> Iterator[Part]:
        model = self.profiles.model(stage.model)
        if index == 0:
            payload, name = model.text_embedding_bytes_fp16 * (2 if self.request.guided else 1), "embedding_transfer"
        else:
            payload = handover_bytes(self.request, model, with_embedding=with_embedding)
            name = "handover"
        yield from self._crossing(name, sender, stage.site, payload)

    def _crossing(self, name: str, sender: Site, receiver: Site, payload: int) -> Iterator[Part]:
        """Tensors on their way to the other side: serialised, sent, parsed."""
        yield self._handled(name, "serialise", sender, payload)
        yield self._transfer(name, receiver.tier, payload)
        yield self._handled(name, "parse", receiver, payload)

    def _handled(self, name: str, end: End, site: Site, payload: int) -> Part:
        """One end of a hand-over."""
        found = handling(self.profiles, site.device, end, payload, prefer=self.prefer)
        return self._held(f"{name}_{end}", site, found.seconds, found.bounds_s, found.kind, found.sources, found.note)

    def _overheads(self, walked: Sequence[Part]) -> Iterator[Part]:
        """What edge devices take beyond the sum of their components; what runs beside the cloud delays nobody."""
        for site in self.plan.sites.values():
            law = self.profiles.runtime(site.runtime)
            mine = [part for part in walked if (part.tier, part.where) == ("edge", site.name) and part.critical]
            timed = [part for part in mine if part.name in COMPONENTS]
            if law.overhead_share and timed:
                seconds = sum(part.seconds for part in timed)
                figures = (seconds * law.overhead_share, (seconds * law.overhead_low, seconds * law.overhead_high))
                note = f"{law.overhead_share:.1%} of the components' sum; holds no reloading for lack of memory"
                yield self._held("device_overhead", site, *figures, "modelled", (law.overhead_source,), note)

    def _transfer(self, name: str, to_tier: str, payload: int) -> Part:
        if self.plan.network is None:
            return Part(name=name, where="no network", tier="network", seconds=0.0, low_s=0.0, high_s=0.0)
        network = self.profiles.network(self.plan.network)
        rates = network.down_bytes_per_s if to_tier == "edge" else network.up_bytes_per_s
        times = [transfer_s(payload, rates.at(u), network.rtt_s.at(1 - u)) for u in (0.5, 0.95, 0.05)]
        egress = self.profiles.egress_usd_per_gib() * payload / 2**30 if to_tier == "edge" else 0.0
        return Part(
            name=name, where=network.name, tier="network", seconds=times[0], low_s=times[1], high_s=times[2],
            usd=egress, bytes_down=payload if to_tier == "edge" else 0, bytes_up=0 if to_tier == "edge" else payload,
            kind=network.kind, sources=(network.source,),
        )  # fmt: skip

    def _text_encode(self, site: Site) -> Part:
        encoders = self.profiles.model(self.plan.stages[0].model).text_encoders
        prompts = 2 if self.request.guided else 1
        return self._component("text_encode", site, [self.profiles.component(name) for name in encoders], prompts)

    def _vae_decode(self, site: Site) -> Part:
        return self._component("vae_decode", site, [self.profiles.component(self.plan.vae)], self.request.num_images)

    def _component(self, name: str, site: Site, components: Sequence[Component], repeats: int) -> Part:
        """A text encoder or VAE: from its own row where one fits, else scaled from the device's UNet speed."""
        seconds = low = high = 0.0
        kinds: list[Kind] = []
        sources: list[str] = []
        notes: list[str] = []
        for component in components:
            row = self.profiles.component_row(site.device, site.runtime, component, self._size, prefer=self.prefer)
            if row is not None:
                times = (row.seconds_median, *row.range_s)
                kinds.append(row.kind)
                sources.append(row.source)
            else:
                where = (self.profiles, site.device, site.runtime, site.precision)
                times, fit = component_law_s(*where, component, *self._size)
                kinds.append("modelled")
                sources += fit.sources
                notes.append(f"{component.name} from the law of UNet steps: {fit.note}")
            seconds, low, high = (a + b * repeats for a, b in zip((seconds, low, high), times, strict=True))
        kind = max(kinds, key=KIND_ORDER.__getitem__)
        return self._held(name, site, seconds, (low, high), kind, tuple(dict.fromkeys(sources)), "; ".join(notes))

    @property
    def _size(self) -> tuple[int, int]:
        return self.request.height_px, self.request.width_px

    def _stage(self, stage: Stage) -> Iterator[Part]:
        for phase in stage_times(stage, self.request, self.profiles, prefer=self.prefer):
            name = "denoise_warmup" if phase.name == "warmup" else "denoise"
            bounds = (phase.low_s, phase.high_s)
            part = self._held(name, stage.site, phase.seconds, bounds, phase.kind, phase.sources, phase.note)
            yield replace(part, comm_bytes=phase.comm_bytes, comm_exposed_s=phase.comm_exposed_s, within=phase.within)

    def _held(
        self, name: str, site: Site, seconds: float, bounds: tuple[float, float], kind: Kind,
        sources: tuple[str, ...], note: str = "",
    ) -> Part:  # fmt: skip
        """A part that holds a device (or the whole gang) for `seconds`, with its dollars or joules."""
        devices = self.gang[site.name] if site.tier == "cloud" else 1
        usd, energy, why = self._charge(site, seconds, devices)
        return Part(
            name=name, where=site.name, tier=site.tier, seconds=seconds, low_s=bounds[0], high_s=bounds[1],
            devices=devices, usd=usd, energy_j=energy, kind=kind, sources=sources, note=note, unknown=why,
        )  # fmt: skip

    def _charge(self, site: Site, seconds: float, devices: int) -> tuple[float | None, float | None, str]:
        if site.tier == "edge":
            power = site.power_w or self.profiles.edge_device(site.device).power_w
            energy = None if power is None else power * seconds
            return 0.0, energy, "" if power else f"no power figure for {site.device}"
        rate = site.usd_per_device_hour
        if rate is None:
            row = self.profiles.gpu_price(site.device, site.purchase, site.provider)
            rate = None if row is None else row.usd
        if rate is None:
            return None, 0.0, f"no {site.purchase} price for {site.device}"
        return rate * devices * seconds / 3600, 0.0, ""
