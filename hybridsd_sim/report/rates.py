"""What seconds are turned into money and joules with: prices and powers, each with its range, kind and source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hybridsd_sim.plan import Kind, Site

if TYPE_CHECKING:
    from hybridsd_sim.profiles import Price, Profiles

EGRESS = "network"
"""Stands for the way down to the edge, which is paid by the byte."""
OWN = "the scenario's own figure"


@dataclass(frozen=True, slots=True)
class Rate:
    """A price or a power: `value` None where nobody knows it; `low` and `high` are its range where a source has one.

    `where` is the site that it belongs to, `EGRESS` for what leaves the cloud.
    """

    where: str
    item: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    kind: Kind = "quoted"
    sources: tuple[str, ...] = ()
    note: str = ""

    @property
    def reach(self) -> tuple[float, float]:
        """The ends of the range as shares of the value; 1 where there is no range."""
        if not self.value:
            return 1.0, 1.0
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return min(1.0, low / self.value), max(1.0, high / self.value)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rates_of(sites: Mapping[str, Site], profiles: Profiles) -> dict[str, Rate]:
    """The rate of each site by its name, and that of the way down to the edge."""
    rates = [(price_of if site.tier == "cloud" else power_of)(site, profiles) for site in sites.values()]
    return {rate.where: rate for rate in (*rates, *_egress(profiles))}


def price_of(site: Site, profiles: Profiles) -> Rate:
    """US$ per GPU-hour of a cloud site: the scenario's own price, else the catalogue's."""
    item, unit = f"GPU-hour of {site.name} ({site.device}, {site.purchase.replace('_', ' ')})", "US$"
    if site.usd_per_device_hour is not None:
        return Rate(site.name, item, site.usd_per_device_hour, unit, sources=(OWN,))
    row = profiles.gpu_price(site.device, site.purchase, site.provider)
    if row is None:
        return Rate(site.name, item, None, unit, kind="modelled", note=f"no {site.purchase} price for {site.device}")
    return _of_row(site.name, item, unit, row)


def power_of(site: Site, profiles: Profiles) -> Rate:
    """Watts of an edge device while it generates: the scenario's own figure, else the catalogue's."""
    item = f"Power of {site.name} ({site.device})"
    if site.power_w is not None:
        return Rate(site.name, item, site.power_w, "W", sources=(OWN,))
    device = profiles.edge_device(site.device)
    if device.power_w is None:
        return Rate(site.name, item, None, "W", kind="modelled", note=f"no power figure for {site.device}")
    return Rate(
        site.name, item, device.power_w, "W", low=device.power_low_w, high=device.power_high_w,
        kind=device.power_kind or "modelled", sources=(device.power_source,),
    )  # fmt: skip


def _egress(profiles: Profiles) -> Iterator[Rate]:
    row = next((row for row in profiles.prices if row.item == "egress" and row.default), None)
    if row is not None:
        yield _of_row(EGRESS, "GiB sent to the edge", "US$", row)


def _of_row(where: str, item: str, unit: str, row: Price) -> Rate:
    note = "; ".join(filter(None, (row.provider, row.source_date, row.notes)))
    return Rate(where, item, row.usd, unit, low=row.low, high=row.high, kind=row.kind, sources=(row.source,), note=note)
