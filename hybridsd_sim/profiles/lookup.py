"""Step costs, devices, GPUs, models, links, prices, quality: typed rows with sources; says what it does not have.

A profiles folder holds `catalog/*.csv` (one table a file), `fitted/*.csv` (what `population_fit` made of the rows),
`quoted/*.csv` (published cost rows) and `measured/<device>/<model>.csv` with `<model>.meta.yaml` beside it (written by
the executors). Sources that disagree are all kept. Where one row must be chosen, measured goes before quoted before
modelled, then the newer source before the older, then the earlier line; `prefer` names sources to take before all
others, best first (any part of their text will do). Nothing is extrapolated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from inspect import signature
from itertools import product
from typing import Any, ParamSpec, TypeVar, cast

from hybridsd_sim.errors import MissingDataError, Problem, unknown_name
from hybridsd_sim.estimate import KIND_ORDER
from hybridsd_sim.profiles.schema import (
    Component,
    CostRow,
    EdgeDevice,
    Gpu,
    Interconnect,
    Meta,
    MethodConstant,
    Model,
    Network,
    Population,
    Price,
    PublicCut,
    QualityRow,
    Runtime,
    alike,
)

_StepKey = tuple[str, str, str, tuple[int, int], int]

NamedT = TypeVar("NamedT")

ParamsT = ParamSpec("ParamsT")

ResultT = TypeVar("ResultT")


def derived(
    *, key: Callable[..., Hashable] | None = None, most: int = 16_384
) -> Callable[[Callable[ParamsT, ResultT]], Callable[ParamsT, ResultT]]:
    """Keeps what a function of `profiles` gives, with those profiles, so that it is worked out once.

    The function names one parameter `profiles`, which callers pass by position. What it gives must depend on nothing
    but the profiles and what `key` makes of its arguments; without `key` all the other arguments must be hashable. An
    exception is not kept. A table that holds `most` results starts over, so that memory stays bounded.
    """

    def decorate(function: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
        place = list(signature(function).parameters).index("profiles")

        @wraps(function)
        def kept(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
            profiles = cast("Profiles", args[place])
            what = key(*args, **kwargs) if key else (*args[:place], *args[place + 1 :], *kwargs.items())
            results: dict[Hashable, ResultT] = profiles.results_of(function)
            try:
                return results[what]
            except KeyError:
                result = function(*args, **kwargs)
            if len(results) >= most:
                results.clear()
            results[what] = result
            return result

        return kept

    return decorate


@dataclass(frozen=True, eq=False, repr=False)
class Profiles:
    """Everything that is known about hardware, models, links, prices and quality, by name; see `load_profiles`.

    `costs` are the quoted rows and then the measured ones. `metas` describe the measured files, as `device/model`.
    `digest` is the SHA-256 of all the files. Asking for a name that is not there raises `MissingDataError`. What is
    `derived` from profiles is kept with them; copies and pickles hold the facts alone.
    """

    gpus: Mapping[str, Gpu]
    edge_devices: Mapping[str, EdgeDevice]
    models: Mapping[str, Model]
    components: Mapping[str, Component]
    interconnects: Mapping[str, Interconnect]
    networks: Mapping[str, Network]
    runtimes: Mapping[str, Runtime]
    prices: tuple[Price, ...]
    quality: tuple[QualityRow, ...]
    cuts: tuple[PublicCut, ...]
    populations: tuple[Population, ...]
    constants: Mapping[str, MethodConstant]
    costs: tuple[CostRow, ...]
    metas: Mapping[str, Meta]
    digest: str

    def __getstate__(self) -> dict[str, object]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def forget(self) -> None:
        """Drop what functions derived from these profiles: what is asked for again is worked out again."""
        self._derived.clear()

    def results_of(self, function: Callable[..., Any]) -> dict[Hashable, Any]:
        """What a `derived` function gave so far, by its key."""
        return self._derived.setdefault(function, {})

    @cached_property
    def _derived(self) -> dict[Callable[..., Any], dict[Hashable, Any]]:
        return {}

    def __repr__(self) -> str:
        counts = f"{len(self.gpus)} GPUs, {len(self.models)} models, {len(self.costs)} cost rows"
        return f"Profiles({counts}, {self.digest[:8]})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 the protocol of pretty printers
        printer.text(repr(self))

    def gpu(self, name: str) -> Gpu:
        return _named("gpu", name, self.gpus)

    def edge_device(self, name: str) -> EdgeDevice:
        return _named("edge device", name, self.edge_devices)

    def model(self, name: str) -> Model:
        return _named("model", name, self.models)

    def component(self, name: str) -> Component:
        return _named("component", name, self.components)

    def interconnect(self, name: str) -> Interconnect:
        return _named("interconnect", name, self.interconnects)

    def network(self, name: str) -> Network:
        return _named("network", name, self.networks)

    def runtime(self, name: str) -> Runtime:
        return _named("runtime", name, self.runtimes)

    def device(self, name: str) -> Gpu | EdgeDevice:
        """The GPU or edge device of that name; a card that is both is given as a GPU."""
        if (found := self.gpus.get(name) or self.edge_devices.get(name)) is not None:
            return found
        both: dict[str, Gpu | EdgeDevice] = {**self.edge_devices, **self.gpus}
        return _named("device", name, both)

    def architecture_of(self, model: str) -> str:
        """A text that is the same for models of one architecture, such as SD 1.4 and 1.5."""
        return self._architectures.get(model) or self.model(model).architecture

    @cached_property
    def _architectures(self) -> dict[str, str]:
        return {name: model.architecture for name, model in self.models.items()}

    def default_interconnect(self, device: str) -> str:
        """The interconnect between GPUs of this kind. Raises `MissingDataError` for a device that has none."""
        if isinstance(found := self.device(device), Gpu):
            return found.default_interconnect
        rule = "has no interconnect of its own"
        raise MissingDataError(Problem("interconnect", device, rule, "Name one, or choose degree 1."))

    def peak_flop_per_s(self, device: str) -> float | None:
        """The datasheet's dense fp16 peak of a GPU or edge device; None where no datasheet gives one."""
        return self.device(device).fp16_flop_per_s

    def cost_rows(
        self, *, device: str | None = None, model: str | None = None, component: str | None = "step", **more: object
    ) -> tuple[CostRow, ...]:
        """The cost rows that hold these values, None standing for any; `more` names other columns."""
        rows = self._rows_by_device.get((component, device), ())
        tests = [(key, value) for key, value in {"model": model, **more}.items() if value is not None]
        return tuple(row for row in rows if all(getattr(row, key) == value for key, value in tests))

    @cached_property
    def _rows_by_device(self) -> dict[tuple[str | None, str | None], list[CostRow]]:
        """The rows by component and device, None standing for any of them, each list in the order of the rows."""
        found: dict[tuple[str | None, str | None], list[CostRow]] = {}
        for row in self.costs:
            for key in product((row.component, None), (row.device, None)):
                found.setdefault(key, []).append(row)
        return found

    def step_row(
        self,
        device: str,
        runtime: str,
        model: str,
        size: tuple[int, int],
        *,
        latents: int,
        precision: str | None = None,
        prefer: Sequence[str] = (),
    ) -> CostRow | None:
        """The row that timed this very UNet call on one device (`size`: height and width in px), or None.

        A model of the same config serves as well (SD 1.4 and 1.5 are one architecture). Where the runtime's calls hold
        at most `max_unet_batch` latents, the row is that of a full call, of which the caller makes several.
        """
        limit = self.runtime(runtime).max_unet_batch
        held = min(latents, limit) if limit else latents
        rows = self._steps_by_call.get((device, runtime, self.architecture_of(model), size, held), ())
        matching = [row for row in rows if precision is None or alike(row.precision) == alike(precision)]
        return min(matching, key=lambda row: _rank(row, prefer), default=None)

    def step_rows(
        self, device: str, runtime: str, model: str, precision: str | None = None, *, prefer: Sequence[str] = ()
    ) -> list[CostRow]:
        """All steps of this architecture that were timed on one such device under the runtime, best known first."""
        rows = self._steps_by_architecture.get((device, runtime, self.architecture_of(model)), ())
        matching = [row for row in rows if precision is None or alike(row.precision) == alike(precision)]
        return sorted(matching, key=lambda row: _rank(row, prefer))

    @cached_property
    def _steps_by_call(self) -> dict[_StepKey, list[CostRow]]:
        """The one-GPU step rows by the UNet call that they timed, each list in the order of the rows."""
        steps: dict[_StepKey, list[CostRow]] = {}
        for row in self.costs:
            if row.component == "step" and row.degree == 1 and row.rank is None:
                size = (row.height_px, row.width_px)
                key = (row.device, row.runtime, self.architecture_of(row.model), size, row.latents)
                steps.setdefault(key, []).append(row)
        return steps

    @cached_property
    def _steps_by_architecture(self) -> dict[tuple[str, str, str], list[CostRow]]:
        """The one-GPU step rows by device, runtime and architecture."""
        found: dict[tuple[str, str, str], list[CostRow]] = {}
        for key, rows in self._steps_by_call.items():
            found.setdefault(key[:3], []).extend(rows)
        return found

    def component_row(
        self, device: str, runtime: str, component: Component, size: tuple[int, int], *, prefer: Sequence[str] = ()
    ) -> CostRow | None:
        """The row that timed one prompt or image (`size`: height and width in px) on one device, or None."""
        wanted = size if component.component == "vae_decode" else (0, 0)
        rows = self.cost_rows(
            device=device, model=component.name, component=component.component, runtime=runtime, batch_size=1, degree=1
        )
        matching = [row for row in rows if (row.height_px, row.width_px) == wanted]
        return min(matching, key=lambda row: _rank(row, prefer), default=None)

    def model_load(self, device: str, model: str = "*", *, prefer: Sequence[str] = ()) -> CostRow:
        """Seconds until another model is ready: this architecture's row on the device, else the one for any of them."""
        architecture = self.models[model].architecture if model in self.models else ""
        alike = {"*", *(name for name, other in self.models.items() if other.architecture == architecture)}
        rows = [row for row in self.costs if row.component == "model_load" and row.device in (device, "*")]
        rows = [row for row in rows if row.model in alike]
        if not rows:
            raise MissingDataError(Problem("model_load", device, "no row says how long a model load takes"))
        return min(rows, key=lambda row: (row.device == "*", row.model == "*", _rank(row, prefer)))

    def gpu_price(self, gpu: str, purchase: str = "on_demand", provider: str | None = None) -> Price | None:
        """USD per GPU-hour: the first row of `provider`, else the row marked default; None where nobody sells it."""
        return self._price(f"gpu:{gpu}", purchase, provider)

    def usd(self, item: str, provider: str | None = None) -> float:
        """USD for a GiB of `egress` or a kWh of `electricity`: the first row of `provider`, else the default one."""
        if price := self._price(item, "", provider):
            return price.usd
        known = [row.provider for row in self.prices if row.item == item]
        raise MissingDataError(unknown_name(f"price of {item}", provider or "default", known))

    def _price(self, item: str, purchase: str, provider: str | None) -> Price | None:
        rows = self._prices_by_item.get((item, purchase), ())
        return next((row for row in rows if (row.provider == provider if provider else row.default)), None)

    @cached_property
    def _prices_by_item(self) -> dict[tuple[str, str], list[Price]]:
        found: dict[tuple[str, str], list[Price]] = {}
        for row in self.prices:
            found.setdefault((row.item, row.purchase), []).append(row)
        return found

    def egress_usd_per_gib(self, provider: str | None = None) -> float:
        return self.usd("egress", provider)

    def public_cuts(self, model: str) -> dict[int, tuple[tuple[str, ...], ...]]:
        """AsyncDiff's public cuts of this architecture by number of components: the modules of each, in order."""
        architecture = self.architecture_of(model)
        rows = [row for row in self.cuts if self.architecture_of(row.model) == architecture]
        counts = sorted({row.components for row in rows})
        return {count: tuple(row.modules for row in rows if row.components == count) for count in counts}

    def without(self, left_out: Callable[[CostRow], bool]) -> Profiles:
        """The same without the cost rows of which this is true."""
        costs = tuple(row for row in self.costs if not left_out(row))
        digest = hashlib.sha256(f"{self.digest}{len(costs)}".encode()).hexdigest()
        return replace(self, costs=costs, digest=digest)

    def with_costs(self, rows: Sequence[CostRow]) -> Profiles:
        """The same with these cost rows in front, such as a user's own measurement."""
        costs = (*rows, *self.costs)
        added = "".join(row.model_dump_json() for row in rows)
        digest = hashlib.sha256(f"{self.digest}{added}".encode()).hexdigest()
        return replace(self, costs=costs, digest=digest)

    def nearest(self, device: str, model: str, *, component: str = "step") -> str:
        """A sentence that names the rows nearest to a device and model, for messages about missing rows."""
        rows = sorted(
            (row for row in self.costs if row.component == component and row.degree == 1),
            key=lambda row: (row.device != device, row.model != model, _rank(row, ())),
        )
        close = (row for row in rows if device == row.device or model == row.model)
        names = dict.fromkeys(
            f"{row.model} {row.height_px}x{row.width_px} on {row.device} ({row.runtime})" for row in close
        )
        if not names:
            return f"No {component} row has {device} or {model}."
        return f"Nearest rows: {', '.join(list(names)[:3])}."


def _named(what: str, name: str, known: Mapping[str, NamedT]) -> NamedT:
    if name not in known:
        raise MissingDataError(unknown_name(what, name, tuple(known)))
    return known[name]


def _rank(row: CostRow, prefer: Sequence[str]) -> tuple[int, int, _Newest]:
    place = next((index for index, name in enumerate(prefer) if name in row.source), len(prefer))
    return place, KIND_ORDER[row.kind], _Newest(row.source_date)


class _Newest(str):
    """A date that sorts before older ones; what does not begin with a year sorts last."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        mine, theirs = (text if text[:1].isdigit() else "" for text in (self[:], other[:]))
        return mine > theirs
