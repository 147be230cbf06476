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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add

from hybridsd_sim.estimate import Estimate
from hybridsd_sim.perf import StageTimer, WorkTotals, component_time, option_types, timer_of, total_work, unet_layers
from hybridsd_sim.plan import Plan, Request, Site, Stage
from hybridsd_sim.pricing.plan_cost import Part, PlanCost
from hybridsd_sim.pricing.quality import quality_of
from hybridsd_sim.pricing.transfers import (
    PROMPT_BYTES,
    End,
    image_bytes,
    latent_elements,
    latent_transfer_bytes,
    serialisation_time,
    transfer_s,
)
from hybridsd_sim.profiles import Profiles, Runtime, derived

COMPONENTS = ("text_encode", "denoise", "denoise_warmup", "vae_decode")
"""The parts whose sum an edge device exceeds end to end."""


def price(
    plan: Plan, request: Request, profiles: Profiles, *, cold: bool = False, prefer: Sequence[str] = ()
) -> PlanCost:
    """The price of `request` under `plan` with nobody else there; `cold` adds the model load on every cloud site.

    Where sources disagree, measured goes before quoted before modelled, then the newer one; `prefer` names sources (any
    part of their text) that go before all others. Transfers run at the network's median rates; the simulator prices
    sampled rates with `transfer_s`. Raises `IllegalPlanError` for a plan its method cannot run, `MissingDataError` for
    devices that nobody timed.
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
    same rows and laws; every prompt is encoded and every latent serialised for itself. Where the rows of a larger batch
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
    return plan.make, plan.extra_sites, options, what, cold, tuple(prefer), together


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
                parts += self._stage(plan.stages[item], self._timers[item])
        for site, runtime in self._slow_edges:
            if overhead := self._overhead(site, runtime, parts):
                parts.append(overhead)
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
                yield from self._switch(index, here, stage, with_embedding=not own_copy)
            self._timers[index] = timer_of(stage, self._shared(stage.site), self.profiles, self.prefer)
            yield index
            here = stage.site
        if vae.tier != here.tier:
            latent = latent_elements(self.request) * self.request.num_images * 2
            yield from self._send("latent_transfer", here, vae, latent)
        yield self._vae_decode(vae)
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

    def _switch(self, index: int, sender: Site, stage: Stage, *, with_embedding: bool) -> Iterator[Part]:
        model = self.profiles.model(stage.model)
        if index == 0:
            payload, name = model.text_embedding_bytes_fp16 * (2 if self.request.guided else 1), "embedding_transfer"
        else:
            payload = latent_transfer_bytes(self.request, model, with_embedding=with_embedding)
            name = "handover"
        yield from self._send(name, sender, stage.site, payload)

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

    def _overhead(self, site: Site, runtime: Runtime, parts: Sequence[Part]) -> Part | None:
        """What an edge device takes beyond the sum of its components; what runs beside the cloud delays nobody."""
        mine = [part for part in parts if part.tier == "edge" and part.where == site.name and part.critical]
        timed = [part.seconds.value for part in mine if part.name in COMPONENTS]
        if not timed:
            return None
        total, share = sum(timed), runtime.overhead_share
        seconds = Estimate(
            total * share,
            total * runtime.overhead_low,
            total * runtime.overhead_high,
            sources=(runtime.overhead_source,),
            note=f"{share:.1%} of the components' sum; holds no reloading for lack of memory",
        )
        return self._held(site).part("device_overhead", seconds)

    def _transfer(self, name: str, to_tier: str, payload: int) -> Part:
        if self.plan.network is None:
            return Part(name=name, where="no network", tier="network", seconds=Estimate.exact(0.0))
        return _transfer(name, self.plan.network, to_tier, payload, self.profiles)

    def _text_encode(self, site: Site) -> Part:
        encoders = self.profiles.model(self.plan.stages[0].model).text_encoders
        prompts = (2 if self.request.guided else 1) * self._together(site)
        return self._component("text_encode", site, encoders, prompts)

    def _vae_decode(self, site: Site) -> Part:
        return self._component("vae_decode", site, [self.plan.vae], self._shared(site).num_images)

    def _component(self, name: str, site: Site, components: Sequence[str], repeats: int) -> Part:
        """Text encoders or a VAE: from their own rows where they fit, else scaled from the device's UNet speed."""
        times = (repeats * self._component_time(component, site) for component in components)
        return self._held(site).part(name, reduce(add, times))

    def _component_time(self, component: str, site: Site) -> Estimate:
        where, size = (site.device, site.runtime, site.precision), (self.request.height_px, self.request.width_px)
        return component_time(self.profiles, *where, component, size, self.prefer)

    def _stage(self, stage: Stage, timer: StageTimer) -> Iterator[Part]:
        devices = self._held(stage.site)
        for phase in timer.times(stage.num_steps):
            name = "denoise_warmup" if phase.name == "warmup" else "denoise"
            yield devices.part(name, phase.seconds, comm_bytes=phase.comm_bytes, comm_exposed_s=phase.comm_exposed_s)

    def _held(self, site: Site) -> _Devices:
        """The device of the site, or the whole worker group, which is as large as its largest stage."""
        if site.name not in self._devices:
            self._devices[site.name] = self._edge_device(site) if site.tier == "edge" else self._group(site)
        return self._devices[site.name]

    def _edge_device(self, site: Site) -> _Devices:
        power_w = site.power_w or self.profiles.edge_device(site.device).power_w
        return _Devices(site, 1, 0.0, power_w, "" if power_w else f"no power figure for {site.device}")

    def _group(self, site: Site) -> _Devices:
        count = max((stage.degree for stage in self.plan.stages if stage.site.name == site.name), default=1)
        rate = site.usd_per_device_hour
        if rate is None:
            row = self.profiles.gpu_price(site.device, site.purchase, site.provider)
            rate = None if row is None else row.usd
        why = f"no {site.purchase} price for {site.device}" if rate is None else ""
        return _Devices(site, count, rate, 0.0, why)


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
