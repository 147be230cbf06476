"""What a price is made of: parts with seconds, dollars, joules and bytes, and the totals that they sum to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hybridsd_sim.estimate import Estimate, Kind, merged, weakest
from hybridsd_sim.plan import Plan, Promises, Request
from hybridsd_sim.pricing.quality import Quality


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

    def meets_floor(self, promises: Promises) -> bool:
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
