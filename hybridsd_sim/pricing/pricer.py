"""The price of a plan when nobody else is there: seconds, dollars, joules, bytes and quality, by component.

`price` walks the plan's components in order (text encoder, denoising stages, VAE decoder, delivery), puts a transfer
wherever the next component runs on the other side of the access network, and returns parts that sum to the total. A
worker group holds all its GPUs from its first component to its last, so that every cloud part is charged for all.

What crosses the network: the prompt on the way up; at a switch step the latent, for multistep samplers the solver's
history, and the text embedding unless the edge encodes the prompt itself (then both sides encode, and the edge does so
while the cloud works); the latent alone before a VAE on the other side; the finished image on the way down. Tensors are
serialised at the sender and parsed at the receiver, each with its checksum.

What a phone takes end to end is more than the sum of its components. Where published pairs of both show such a gap, it
is a part of its own, `device_overhead`, a share of what the components took there. Reloading models for lack of memory,
which more than doubles a phone's time (Apple, SDXL: 77 s against 31 s at the same speed), is not modelled.

Only denoising, and what follows from it, depends on how many steps a stage has. Everything else is priced once for all
plans that differ in their switch steps alone, and their prices share these parts.

Serialisation is tensors into bytes with their checksum, and out of them again. It depends on the payload alone, so that
timed rows of every model and size serve: their rate is that of the device, and seconds are in proportion to the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add
from statistics import median
from typing import Literal

from hybridsd_sim.estimate import KIND_ORDER, Estimate, Kind, merged, weakest
from hybridsd_sim.perf import (
    StageTimer,
    WorkTotals,
    component_time,
    elements_of,
    option_types,
    timer_of,
    total_work,
    unet_layers,
)
from hybridsd_sim.plan import Plan, Promises, Request, Site
from hybridsd_sim.pricing.quality import Quality, quality_of
from hybridsd_sim.profiles import CostRow, Model, Profiles, derived


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component of a price: what, where, how long at 90%, and what it costs.

    `devices` are GPUs (or the one edge device) held for `seconds`; 0 for a transfer. `critical` parts add to the
    latency; the edge's own text encoding runs beside the cloud and does not. `usd` or `energy_j` None means unknown,
    with the reason in `unknown`. The seconds are not `within` where they lie outside what was measured or quoted for
    that device. `comm_bytes` are what one GPU receives from the others, `comm_exposed_s` the seconds of exchange that
    compute does not hide.
    """

    name: str
    where: str
    tier: str
    seconds: Estimate
    devices: int = 0
    usd: float | None = 0.0
    energy_j: float | None = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    comm_bytes: float = 0.0
    comm_exposed_s: float = 0.0
    unknown: str = ""
    critical: bool = True

    def slowed(self, factors: Mapping[str, float]) -> Part:
        """The part at a site whose every second takes `factors[name of the site]` times as long; transfers stay."""
        factor = 1.0 if self.tier == "network" else factors.get(self.where, 1.0)
        if factor == 1.0:
            return self
        return replace(
            self,
            seconds=factor * self.seconds,
            usd=None if self.usd is None else factor * self.usd,
            energy_j=None if self.energy_j is None else factor * self.energy_j,
            comm_exposed_s=factor * self.comm_exposed_s,
        )


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
        return sum(part.seconds.value for part in self.parts if part.critical)

    @property
    def denoise_parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.name.startswith("denoise"))

    @property
    def denoise_s(self) -> float:
        """The UNet loop alone, which is what the papers time."""
        return sum(part.seconds.value for part in self.denoise_parts)

    @property
    def interval_s(self) -> tuple[float, float]:
        """90% interval of `denoise_s`."""
        return _ends(self.denoise_parts)

    @property
    def latency_interval_s(self) -> tuple[float, float]:
        """90% interval of `latency_s`, as wide as if every part were at the same end of its own."""
        return _ends([part for part in self.parts if part.critical])

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
    def cloud_s(self) -> float:
        """Seconds for which a worker group is held."""
        return sum(part.seconds.value for part in self.parts if part.tier == "cloud")

    @property
    def gpu_seconds(self) -> float:
        return sum(part.seconds.value * part.devices for part in self.parts if part.tier == "cloud")

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
        return weakest(part.seconds.kind for part in self.parts if part.seconds.value > 0)

    @property
    def steps_kind(self) -> Kind:
        """The weakest kind among the denoising steps, transfers and all else apart."""
        return weakest(part.seconds.kind for part in self.denoise_parts)

    @property
    def sources(self) -> tuple[str, ...]:
        return merged(*(part.seconds.sources for part in self.parts), self.quality.clip.sources)

    @property
    def unknowns(self) -> tuple[str, ...]:
        """Why figures are None, for the reader."""
        notes = [part.unknown for part in self.parts if part.unknown]
        return tuple(dict.fromkeys([*notes, *([] if self.quality.clip.known else [self.quality.clip.note])]))

    def keeps_limits(self, promises: Promises) -> bool:
        """Whether the price reaches the quality floor and keeps every limit of an image; unknown figures do neither."""
        images = self.request.num_images
        energy_j, usd = (None if total is None else total / images for total in (self.edge_energy_j, self.usd))
        return promises.meets_floor(self.quality.clip.value_or_none) and promises.within_limits(energy_j, usd)

    @property
    def outside(self) -> tuple[str, ...]:
        """Parts whose figure lies outside what was timed, each with its reason."""
        return tuple(
            f"{part.name} on {part.where}: {part.seconds.note}" for part in self.parts if not part.seconds.within
        )


def _ends(parts: Sequence[Part]) -> tuple[float, float]:
    return sum(part.seconds.low for part in parts), sum(part.seconds.high for part in parts)


def _total(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value or 0.0 for value in known)


SOLVER_HISTORY = {"dpmsolver++": 1, "dpmsolver": 1, "unipc": 1, "pndm": 3, "ddim": 0, "euler": 0, "lcm": 0}
"""Latent-sized tensors of past model outputs that a sampler must keep across a switch."""

PROMPT_BYTES = 1024
"""A prompt with its parameters as JSON. Modelled."""

IMAGE_BYTES_PER_PX = 0.3
"""A JPEG at about 2.4 bits a pixel (300 kB at 1024 px). Modelled."""

SERIALISE_BYTES_PER_S = 1e9
"""Checksum and copy of a payload on one core. Modelled; measured on a CPU core: 0.7 to 1.0 GB/s."""


HEADER_SHARE = 0.01
"""A payload counts as timed up to this share below a timed one, which has a header besides its tensors."""

End = Literal["serialise", "parse"]
"""The sender's or the receiver's side of a transfer."""


def latent_elements(request: Request) -> int:
    """Elements of one latent of the request."""
    return elements_of(request.height_px, request.width_px)


def latent_transfer_bytes(request: Request, model: Model, *, with_embedding: bool) -> int:
    """Bytes that cross at a switch step, fp16: latents, solver history, and the embeddings if the edge lacks them."""
    tensors = 1 + SOLVER_HISTORY.get(request.sampler, 0)
    latents = latent_elements(request) * request.num_images * tensors * 2
    prompts = 2 if request.guided else 1
    return latents + (model.text_embedding_bytes_fp16 * prompts if with_embedding else 0)


def image_bytes(request: Request) -> int:
    """Bytes of the finished pictures as sent to the user."""
    return round(request.height_px * request.width_px * IMAGE_BYTES_PER_PX) * request.num_images


def transfer_s(bytes_moved: int, rate_bytes_per_s: float, rtt_s: float) -> float:
    """Seconds of one transfer: half a round trip, then the payload at the link's rate."""
    return rtt_s / 2 + bytes_moved / rate_bytes_per_s


@derived()
def serialisation_time(
    profiles: Profiles, device: str, end: End, payload_bytes: int, *, prefer: tuple[str, ...] = ()
) -> Estimate:
    """Seconds that `device` takes to serialise or to parse a payload, with their 90% interval.

    Its own rows go before those of any device (`*`), then measured before quoted; `prefer` names sources to take before
    all others. A row's `comm_bytes` are its payload. The seconds have the rows' kind inside the payloads that were
    timed and are modelled outside.
    """
    ranked: dict[tuple[bool, bool, int], list[CostRow]] = {}
    for row in profiles.cost_rows(component=f"handover_{end}"):
        if row.comm_bytes and row.device in (device, "*"):
            preferred = any(name in row.source for name in prefer)
            ranked.setdefault((not preferred, row.device == "*", KIND_ORDER[row.kind]), []).append(row)
    rows = ranked[min(ranked)] if ranked else []
    if not rows:
        seconds = payload_bytes / SERIALISE_BYTES_PER_S
        return Estimate(seconds, 0.0, 10 * seconds, note=f"checksum and copy at {SERIALISE_BYTES_PER_S / 1e9:g} GB/s")
    timed = sorted(row.comm_bytes or 0 for row in rows)
    within = (1 - HEADER_SHARE) * timed[0] <= payload_bytes <= timed[-1]
    # From the fastest to the slowest rate; a small payload may take as long as the quickest timed one.
    lows = [row.seconds.low / (row.comm_bytes or 1) for row in rows]
    highs = [row.seconds.high / (row.comm_bytes or 1) for row in rows]
    return Estimate(
        payload_bytes * median(row.seconds_median / (row.comm_bytes or 1) for row in rows),
        payload_bytes * min(lows),
        max(payload_bytes * max(highs), min(row.seconds.high for row in rows)),
        rows[0].kind if within else "modelled",
        merged(row.source for row in rows),
        f"in proportion to its bytes, from {timed[0]:,} to {timed[-1]:,} bytes on {device}",
    )


COMPONENTS = ("text_encode", "denoise", "denoise_warmup", "vae_decode")
"""The parts whose sum an edge device exceeds end to end."""


def price(
    plan: Plan, request: Request, profiles: Profiles, *, cold: bool = False, prefer: Sequence[str] = ()
) -> PlanCost:
    """The price of `request` under `plan` with nobody else there; `cold` adds the model load on every cloud site.

    Where sources disagree, measured goes before quoted before modelled, then the newer one; `prefer` names sources (any
    part of their text) that go before all others. Transfers run at the network's median rates; the simulator
    draws rates for every request. Raises `IllegalPlanError` for a plan its method cannot run, `MissingDataError` for
    devices that nobody timed.

    >>> from hybridsd_sim import Plan, Request, Site, Stage, load_profiles
    >>> cloud = Site(name="cloud", tier="cloud", device="a100-sxm-80gb", runtime="compiled")
    >>> steps = Stage(start=0, stop=25, model="sd15", site=cloud)
    >>> alone = Plan(stages=(steps,), text_encode_site="cloud", vae_site="cloud", network="lte")
    >>> cost = price(alone, Request(model="sd15", num_inference_steps=25), load_profiles())
    >>> [part.name for part in cost.parts]
    ['prompt_transfer', 'text_encode', 'denoise', 'vae_decode', 'image_transfer']
    >>> cost.latency_s > cost.denoise_s > 0, cost.parts[2].seconds.kind
    (True, 'quoted')
    """
    pricer = _pricer_of(plan, request, profiles, cold=cold, prefer=prefer)
    size = (request.height_px, request.width_px)
    flop, bare = plan_flops(plan, request, profiles)
    return PlanCost(
        plan=plan,
        request=request,
        parts=pricer.parts(plan),
        quality=quality_of(
            plan, profiles, wanted=request.model, guided=request.guided, size=size, sampler=request.sampler
        ),
        flops=flop,
        flops_without_attention_products=bare,
    )


def batch_seconds(plan: Plan, request: Request, profiles: Profiles, *, prefer: Sequence[str] = ()) -> tuple[float, ...]:
    """For how long a worker group is held by 1, 2, ... `plan.batch_cap` requests that it denoises together, in seconds.

    The denoising and the VAE of n requests take what those of one request for n times as many images take, from the
    same rows and fits; every prompt is encoded and every latent serialised for itself. Where the rows of a larger batch
    say less than those of a smaller one, the smaller one's seconds count: more requests never take less time.
    """
    counts = range(1, plan.batch_cap + 1)
    pricers = (_pricer_of(plan, request, profiles, cold=False, prefer=prefer, together=count) for count in counts)
    return tuple(accumulate((pricer.cloud_s(plan) for pricer in pricers), max))


def plan_flops(plan: Plan, request: Request, profiles: Profiles) -> tuple[float, float]:
    """FLOPs (2 x MACs) of all UNet evaluations, guidance included: with and without attention products."""
    flop = bare = 0.0
    for stage in plan.stages:
        total = _work_of(stage.model, request.height_px, request.width_px, profiles)
        evaluations = stage.num_steps * request.unet_batch
        flop += 2.0 * total.macs * evaluations
        bare += 2.0 * total.macs_without_attention * evaluations
    return flop, bare


@derived()
def _work_of(model: str, height_px: int, width_px: int, profiles: Profiles) -> WorkTotals:
    return total_work(unet_layers(profiles.model(model).config, height_px, width_px))


def _pricer_key(
    plan: Plan, request: Request, _: Profiles, *, cold: bool, prefer: Sequence[str], together: int = 1
) -> tuple[object, ...]:
    options = tuple(option_types(stage.options) for stage in plan.stages)
    what = (request.height_px, request.width_px, request.num_images, request.guided, request.sampler)
    return plan.without_step_count, plan.extra_sites, options, what, cold, tuple(prefer), together


@derived(key=_pricer_key)
def _pricer_of(
    plan: Plan, request: Request, profiles: Profiles, *, cold: bool, prefer: Sequence[str], together: int = 1
) -> _Pricer:
    """The one pricer of all plans and requests that differ in steps and promises alone."""
    return _Pricer(plan, request, profiles, cold=cold, prefer=prefer, together=together)


@dataclass(frozen=True, slots=True)
class _Devices:
    """The devices of a site that a part holds, and what they are charged: GPUs by the hour, an edge device in watts.

    `rate` (USD a device-hour) or `power_w` is None where it is unknown, for the reason in `unknown`.
    """

    site: Site
    count: int
    rate: float | None
    power_w: float | None
    unknown: str

    def part(
        self,
        name: str,
        seconds: Estimate,
        *,
        comm_bytes: float = 0.0,
        comm_exposed_s: float = 0.0,
        critical: bool = True,
    ) -> Part:
        """A part that holds these devices for so many seconds, with its dollars or joules."""
        usd: float | None = 0.0
        energy_j: float | None = 0.0
        if self.site.tier == "edge":
            energy_j = None if self.power_w is None else self.power_w * seconds.value
        else:
            usd = None if self.rate is None else self.rate * self.count * seconds.value / 3600
        return Part(
            name=name, where=self.site.name, tier=self.site.tier, seconds=seconds, devices=self.count, usd=usd,
            energy_j=energy_j, comm_bytes=comm_bytes, comm_exposed_s=comm_exposed_s, unknown=self.unknown,
            critical=critical,
        )  # fmt: skip


class _Pricer:
    """Prices plans of one make, which differ in steps alone: what no step changes is priced once.

    `together` requests share the worker group: the cloud's parts last as long as for all of them.
    """

    def __init__(
        self, plan: Plan, request: Request, profiles: Profiles, *, cold: bool, prefer: Sequence[str], together: int
    ) -> None:
        self.plan, self.request, self.profiles, self.cold = plan, request, profiles, cold
        self.prefer, self.together = tuple(prefer), together
        self._devices: dict[str, _Devices] = {}
        self._timers: dict[int, StageTimer] = {}
        self._outline = tuple(self._components())
        runtimes = ((site, profiles.runtime(site.runtime)) for site in plan.sites.values() if site.tier == "edge")
        self._slow_edges = [(site, runtime) for site, runtime in runtimes if runtime.overhead_share]

    def parts(self, plan: Plan) -> tuple[Part, ...]:
        """Every component of a plan of this make in order, then what the edge adds to its own."""
        parts: list[Part] = []
        for item in self._outline:
            if isinstance(item, Part):
                parts.append(item)
            else:
                stage = plan.stages[item]
                devices = self._held(stage.site)
                for phase in self._timers[item].times(stage.num_steps):
                    name = "denoise_warmup" if phase.name == "warmup" else "denoise"
                    bytes_, exposed_s = phase.comm_bytes, phase.comm_exposed_s
                    parts.append(devices.part(name, phase.seconds, comm_bytes=bytes_, comm_exposed_s=exposed_s))
        for site, runtime in self._slow_edges:
            # What runs beside the cloud delays nobody, so that only critical parts make the device take longer.
            mine = [part for part in parts if part.tier == "edge" and part.where == site.name and part.critical]
            if timed := [part.seconds.value for part in mine if part.name in COMPONENTS]:
                total, share = sum(timed), runtime.overhead_share
                seconds = Estimate(
                    total * share,
                    total * runtime.overhead_low,
                    total * runtime.overhead_high,
                    sources=(runtime.overhead_source,),
                    note=f"{share:.1%} of the components' sum; holds no reloading for lack of memory",
                )
                parts.append(self._held(site).part("device_overhead", seconds))
        return tuple(parts)

    def cloud_s(self, plan: Plan) -> float:
        """Seconds for which a plan of this make holds its worker group: what its cloud parts sum to."""
        held: list[Estimate] = []
        for item in self._outline:
            if isinstance(item, Part):
                held += [item.seconds] if item.tier == "cloud" else []
            elif (stage := plan.stages[item]).site.tier == "cloud":
                held += (phase.seconds for phase in self._timers[item].times(stage.num_steps))
        return sum(seconds.value for seconds in held)

    def _components(self) -> Iterator[Part | int]:
        """The components in order, with the index of a stage in place of its parts."""
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
                model = self.profiles.model(stage.model)
                if index:
                    payload = latent_transfer_bytes(self.request, model, with_embedding=not own_copy)
                    yield from self._send("handover", here, stage.site, payload)
                else:
                    prompts = 2 if self.request.guided else 1
                    payload = model.text_embedding_bytes_fp16 * prompts
                    yield from self._send("embedding_transfer", here, stage.site, payload)
            self._timers[index] = timer_of(stage, self._shared(stage.site), self.profiles, self.prefer)
            yield index
            here = stage.site
        if vae.tier != here.tier:
            latent = latent_elements(self.request) * self.request.num_images * 2
            yield from self._send("latent_transfer", here, vae, latent)
        yield self._component("vae_decode", vae, [plan.vae], self._shared(vae).num_images)
        if vae.tier == "cloud" and plan.network:
            yield self._transfer("image_transfer", "edge", image_bytes(self.request))

    def _shared(self, site: Site) -> Request:
        """What a device of the site denoises at a time, as a request of its own."""
        count = self._together(site)
        return self.request if count == 1 else replace(self.request, num_images=self.request.num_images * count)

    def _together(self, site: Site) -> int:
        return self.together if site.tier == "cloud" else 1

    def _loads(self) -> Iterator[Part]:
        if not self.cold:
            return
        for name, site in self.plan.sites.items():
            models = [stage.model for stage in self.plan.cloud_stages if stage.site.name == name]
            for model in dict.fromkeys(models or ["*"] * (site.tier == "cloud")):
                row = self.profiles.model_load(site.device, model)
                yield self._held(site).part("model_load", row.seconds)

    def _send(self, name: str, sender: Site, receiver: Site, payload: int) -> Iterator[Part]:
        """Tensors on their way to the other side: serialised, sent, parsed."""
        yield self._serialisation(name, "serialise", sender, payload)
        yield self._transfer(name, receiver.tier, payload)
        yield self._serialisation(name, "parse", receiver, payload)

    def _serialisation(self, name: str, end: End, site: Site, payload: int) -> Part:
        """One end of a transfer; in the cloud of all the requests that share the worker group."""
        whole = payload * self._together(site)
        seconds = serialisation_time(self.profiles, site.device, end, whole, prefer=self.prefer)
        return self._held(site).part(f"{name}_{end}", seconds)

    def _transfer(self, name: str, to_tier: str, payload: int) -> Part:
        if self.plan.network is None:
            return Part(name=name, where="no network", tier="network", seconds=Estimate.exact(0.0))
        return _transfer(name, self.plan.network, to_tier, payload, self.profiles)

    def _text_encode(self, site: Site) -> Part:
        encoders = self.profiles.model(self.plan.stages[0].model).text_encoders
        prompts = (2 if self.request.guided else 1) * self._together(site)
        return self._component("text_encode", site, encoders, prompts)

    def _component(self, name: str, site: Site, components: Sequence[str], repeats: int) -> Part:
        """Text encoders or a VAE: from their own rows where they fit, else scaled from the device's UNet speed."""
        where, size = (site.device, site.runtime, site.precision), (self.request.height_px, self.request.width_px)
        times = (component_time(self.profiles, *where, each, size, self.prefer) for each in components)
        return self._held(site).part(name, reduce(add, (repeats * seconds for seconds in times)))

    def _held(self, site: Site) -> _Devices:
        """The device of the site, or the whole worker group, which is as large as its largest stage."""
        if site.name in self._devices:
            return self._devices[site.name]
        if site.tier == "edge":
            power_w = site.power_w or self.profiles.edge_device(site.device).power_w
            devices = _Devices(site, 1, 0.0, power_w, "" if power_w else f"no power figure for {site.device}")
        else:
            count = max((stage.degree for stage in self.plan.stages if stage.site.name == site.name), default=1)
            rate = site.usd_per_device_hour
            if rate is None:
                row = self.profiles.gpu_price(site.device, site.purchase, site.provider)
                rate = None if row is None else row.usd
            why = f"no {site.purchase} price for {site.device}" if rate is None else ""
            devices = _Devices(site, count, rate, 0.0, why)
        self._devices[site.name] = devices
        return devices


@derived()
def _transfer(name: str, carrier: str, to_tier: str, payload: int, profiles: Profiles) -> Part:
    """A payload on its way over a network at its median rates; the ends are those of its 5% and 95% quantiles."""
    network = profiles.network(carrier)
    rates = network.down_bytes_per_s if to_tier == "edge" else network.up_bytes_per_s
    middle, low, high = (transfer_s(payload, rates.at(u), network.rtt_s.at(1 - u)) for u in (0.5, 0.95, 0.05))
    return Part(
        name=name,
        where=network.name,
        tier="network",
        seconds=Estimate(middle, low, high, network.kind, (network.source,)),
        usd=profiles.egress_usd_per_gib() * payload / 2**30 if to_tier == "edge" else 0.0,
        bytes_down=payload if to_tier == "edge" else 0,
        bytes_up=0 if to_tier == "edge" else payload,
    )
