"""The shape of the YAML, and the only reader of scenarios, their overrides and the order of precedence.

A file holds a base, `overrides` (named blocks that set anything, nested or by dotted key) and `scenarios` (names for
lists of overrides or of other scenarios). Precedence: call > override > base. The room `overrides` says how they merge.

Scalars are those of YAML 1.2: `1e-3` is a number, `010` is 10, `no` and `on` are text. Duplicate keys, tags, NaN and
infinity are refused. Every problem is reported, each as `file:line: dotted.path: value; rule. remedy`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.overrides import Blocks, apply_changes, check_blocks, entries, flag_alone
from hybridsd_sim.supply import SPOT_PREEMPTIONS_PER_NODE_HOUR, EdgeFleet, Pool
from hybridsd_sim.written import (
    Broken,
    Entries,
    Name,
    NonNegative,
    Positive,
    Reading,
    Text,
    Written,
    dump_yaml,
    load_yaml,
    plain,
    read_value,
    shown,
)

__all__ = [
    "ALL",
    "SPOT_PREEMPTIONS_PER_NODE_HOUR",
    "ArrivalSpec",
    "Budget",
    "EdgeFleet",
    "Pool",
    "RequestClass",
    "Scenario",
    "Search",
    "dump_yaml",
    "load_scenario",
    "load_yaml",
    "scenario_schema",
]

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=64, le=16384, multiple_of=8)]
Sampler = Literal["ddim", "euler", "dpmsolver", "dpmsolver++", "unipc", "pndm", "lcm"]
ALL = "all"
"""The row of a summary over every request class; no class may have this name."""


class ArrivalSpec(Written):
    """When requests of a class arrive."""

    process: Literal["poisson", "gamma", "constant", "daily", "trace", "gentd26"]
    """Arrival process: gamma comes in bursts, constant is evenly spaced, daily has a day-night cycle."""
    rate_per_s: Positive | None = None
    """Mean requests a second. Null is for trace and gentd26 only: the trace's own rate."""
    cv: Positive = 1.0
    """Coefficient of variation of the gaps, for gamma: 1 is Poisson, above 1 comes in bursts."""
    peak_to_mean: Annotated[float, Field(ge=1, le=24)] = 2.0
    """Rate of the busiest moment over the mean rate, for daily."""
    path: Text | None = None
    """File of the trace, relative to the scenario's file. Null with gentd26 means the shipped generator."""
    time_scale: Positive = 1.0
    """Factor on every gap of a trace or of gentd26: 0.01 plays it a hundred times as fast."""

    def _broken(self) -> Iterator[Broken]:
        if self.process == "trace" and self.path is None:
            yield "path", None, "must name a file when process is trace", "Give the path of a trace."
        if self.process not in ("trace", "gentd26") and self.rate_per_s is None:
            yield "rate_per_s", None, f"must be a number when process is {self.process}", "Give requests a second."


class RequestClass(Written):
    """Requests of one kind: where they come from, what they ask for, and what they are promised."""

    origin: Name
    """Edge fleet whose users ask."""
    model: Text
    """Large model of the catalogue, run in the cloud (for example sd14)."""
    small_models: tuple[Text, ...] = ()
    """Small models that may finish at the edge after a switch step, or do everything there."""
    height_px: Pixels
    """Height of the image in pixels, a multiple of 8."""
    width_px: Pixels
    """Width of the image in pixels, a multiple of 8."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)]
    """Denoising steps of one image."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    """Classifier-free guidance; above 1 every step evaluates the UNet twice."""
    num_images: Annotated[int, Field(ge=1, le=64)] = 1
    """Images a request."""
    sampler: Sampler = "ddim"
    """Noise sampler; multistep samplers hand over their history at a switch step."""
    arrivals: ArrivalSpec
    """When requests arrive."""
    slo_s: Positive | None = None
    """Promised seconds from arrival to image; null promises nothing."""
    slo_percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    """Per cent of the requests that must keep the promise."""
    quality_floor: Share | None = None
    """Lowest CLIP score accepted, 0 to 1; null accepts any, also an unknown one."""
    edge_energy_j: Positive | None = None
    """Most joules that one image may take from the user's device; null for no limit."""
    usd_per_image: Positive | None = None
    """Most dollars that one image may cost; null for no limit."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Higher goes first in pools with the discipline edf; other disciplines do not look at it."""


class Budget(Written):
    """What the whole scenario may spend; null is no limit."""

    usd_per_hour: Positive | None = None
    """Most dollars an hour for all pools together."""
    usd_per_image: Positive | None = None
    """Most dollars of rent an image, averaged over all request classes."""
    edge_energy_j_per_image: Positive | None = None
    """Most joules an image from any user's device."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    """Probability with which a plan must hold, over the intervals of modelled step costs; null takes the medians."""


class Search(Written):
    """What the optimiser may choose from."""

    minimise: Literal["usd_per_hour", "latency_p95_s", "quality_loss", "turned_away_per_s"] = "usd_per_hour"
    """What a plan makes as small as it can while keeping every promise; turned_away_per_s serves all it can in time."""
    switch_steps: tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None = None
    """Switch steps to try; null tries every fifth. Edge-only and cloud-only are always tried."""
    methods: Annotated[tuple[Text, ...], Field(min_length=1)] = ("single",)
    """Parallel methods to try: single, cfg_parallel, distrifusion, pcpp, asyncdiff."""
    degrees: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)] = (1,)
    """Numbers of GPUs for one request to try."""
    options: Entries[Entries[Annotated[tuple[bool | int | float | str, ...], Field(min_length=1)]]] = Field(
        default_factory=dict
    )
    """Values of each method's own options to try, as lists: `asyncdiff: {stride: [1, 2]}`."""
    batch_caps: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)] = (1,)
    """Most requests that one gang denoises together, to try; always waiting ones of the same class and plan."""
    vaes: Annotated[tuple[Text, ...], Field(min_length=1)] = ("autoencoder-kl",)
    """Image decoders to try: autoencoder-kl, taesd."""
    policies: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        "cloud_only",
        "edge_only",
        "static_switch",
        "cost_aware",
    )
    """Policies that simulate compares."""
    replications_max: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Most replications of a plan whose promises are undecided; null means four times `replications`."""
    static_switch: Share = 0.4
    """Share of the steps that static_switch leaves to the cloud; 0.4 is Hybrid SD's published 10 of 25."""
    profiles: tuple[Text, ...] = ()
    """Folders of your own cost rows, as the executors write them; they replace shipped rows that timed the same."""
    prefer_sources: tuple[Text, ...] = ()
    """Sources of cost rows to prefer where several disagree, best first."""


class Scenario(Written):
    """A resolved scenario: who asks for what, on which devices and pools, under which promises and limits."""

    name: Name
    """Name of the scenario."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Root of every random stream; the same seed gives the same bytes."""
    horizon_s: Positive
    """Simulated seconds of one replication, warm-up included."""
    warmup_s: NonNegative = 0.0
    """Seconds at the start whose requests are simulated and not counted."""
    replications: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Independent repetitions, for the confidence intervals."""
    requests: Annotated[Entries[RequestClass], Field(min_length=1)]
    """Request classes by name."""
    edge: Annotated[Entries[EdgeFleet], Field(min_length=1)]
    """Edge fleets by name."""
    pools: Entries[Pool] = Field(default_factory=dict)
    """Cloud pools by name."""
    budget: Budget = Budget()
    """Limits on money and energy."""
    search: Search = Search()
    """The search space of the optimiser."""
    overrides_applied: tuple[str, ...] = ()
    """Every change to the base, in order, as `key: old -> new`. Written when the scenario is resolved."""

    def _broken(self) -> Iterator[Broken]:
        if self.warmup_s >= self.horizon_s:
            yield "warmup_s", self.warmup_s, f"must be shorter than horizon_s, {self.horizon_s:g}", ""
        yield from _wrong_classes({name: spec.origin for name, spec in self.requests.items()}, self.edge)

    @classmethod
    def known_keys(cls) -> list[str]:
        return [key for key in (*cls.model_fields, *Blocks.model_fields) if key != "overrides_applied"]

    def to_dict(self) -> dict[str, Any]:
        """The resolved scenario as plain data: every default written out, lists for tuples."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that shapes a result; the same whichever way the scenario was resolved."""
        content = {key: value for key, value in self.to_dict().items() if key != "overrides_applied"}
        return sha256(json.dumps(content, separators=(",", ":"), allow_nan=False).encode()).hexdigest()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Scenario:
        """A changed copy, validated as a whole; keys nested or dotted, values as they are. Raises `InputError`."""
        reading = Reading(self.name, call="with_overrides", lines={"": 0})
        data = self.to_dict()
        changes = json.loads(json.dumps(overrides, default=plain))
        data["overrides_applied"] += apply_changes(reading, data, changes, reading.call, known=entries(data, [changes]))
        return reading.finish(reading.check(Scenario, data))


def scenario_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario's file, so that editors complete and check it."""
    schema = Scenario.model_json_schema()
    blocks = Blocks.model_json_schema()["properties"]
    del schema["properties"]["overrides_applied"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hybridsd_sim scenario"}
    return {**head, **schema, "title": head["title"], "properties": {**schema["properties"], **blocks}}


def load_scenario(
    path: str | Path, *, scenario: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Scenario:
    """Read a scenario from a file, or a shipped one by its bare name, and resolve it.

    `scenario` names one of the file's scenarios or overrides. `overrides` are `{"dotted.key": value}` and outrank the
    file; their text is read as YAML, so that what a command line passes (`"1e-3"`, `"[1, 2]"`) means what it means in a
    file. Paths in the file are relative to it, those in `overrides` to the working directory. Raises `InputError` with
    all problems at once.
    """
    file = _find(path)
    reading = Reading(str(file), call="--set")
    data = reading.read(_read_text(file))
    if not isinstance(data, dict):
        reading.flag("", shown(data), "must be a mapping of keys", "See scenarios/quickstart.yaml.")
        return reading.finish(None)
    given = {key: data.pop(key) for key in ("overrides", "scenarios") if key in data}
    blocks = reading.check(Blocks, given) or Blocks()
    values = {key: read_value(value, f"--set {key}") for key, value in (overrides or {}).items()}
    call = json.loads(json.dumps(values, default=plain))
    return _resolve(reading, data, blocks, chosen=scenario, folder=file.absolute().parent, call=call)


def named_blocks(path: str | Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a file's scenarios, and those of its overrides: what `load_scenario` takes as `scenario`."""
    data = load_yaml(_read_text(file := _find(path)), str(file))
    return tuple(data.get("scenarios") or ()), tuple(data.get("overrides") or ())


def _resolve(
    reading: Reading, base: dict[str, Any], blocks: Blocks, *, chosen: str | None, folder: Path, call: Mapping[str, Any]
) -> Scenario:
    names = check_blocks(reading, blocks, chosen)
    known = entries(base, [*blocks.overrides.values(), call])
    for name, block in blocks.overrides.items():
        if name not in names:
            flag_alone(reading, Scenario, base, name=name, block=block, known=known)
    whole = Reading("").check(Scenario, base)  # for the log: None if the base needs an override to be valid
    data, defaults = deepcopy(base), whole.to_dict() if whole else {}
    log: list[str] = []
    for name in names:
        log += apply_changes(reading, data, blocks.overrides[name], f"overrides.{name}", known=known, defaults=defaults)
    _anchor(data, folder)
    log += apply_changes(reading, data, call, reading.call, known=known, defaults=defaults)
    if log:
        before = data.get("overrides_applied")
        data["overrides_applied"] = [*(before if isinstance(before, list) else ()), *log]
    result = reading.check(Scenario, data)
    if result is None:
        _flag_classes(reading, data)
    return reading.finish(result)


def _find(path: str | Path) -> Path:
    """The file itself, or the shipped scenario of that bare name."""
    file = Path(path)
    if file.is_file() or file.name != str(path):
        return file
    shipped = _shipped_folder() / f"{path}.yaml"
    return shipped if shipped.is_file() else file


def _shipped_folder() -> Path:
    from hybridsd_sim.profiles import data_folder

    return data_folder("scenarios")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problem = Problem(str(file), "not text", "a scenario is UTF-8 text", "Save the file as UTF-8.")
    except OSError as error:
        shipped = sorted(other.stem for other in _shipped_folder().glob("*.yaml"))
        remedy = f"Shipped scenarios: {', '.join(shipped)}."
        problem = Problem(str(file), error.strerror or "unreadable", "must be a file that can be read", remedy)
    raise InputError(problem)


def _anchor(data: Mapping[str, Any], folder: Path) -> None:
    """Make the paths that the file names absolute."""
    requests = data.get("requests")
    for spec in requests.values() if isinstance(requests, Mapping) else ():
        arrivals = spec.get("arrivals") if isinstance(spec, Mapping) else None
        if isinstance(arrivals, dict) and isinstance(arrivals.get("path"), str):
            arrivals["path"] = str((folder / arrivals["path"]).resolve())
    search = data.get("search")
    if isinstance(search, dict) and isinstance(search.get("profiles"), list):
        search["profiles"] = [str((folder / str(given)).resolve()) for given in search["profiles"]]


def _wrong_classes(origins: Mapping[str, Any], fleets: Collection[str]) -> Iterator[Broken]:
    """What is wrong with request classes beyond their own keys, from their names and origins."""
    if ALL in origins:
        rule = "must not be a class's name, because the summary's row over every class has it"
        yield f"requests.{ALL}", ALL, rule, "Give the class another name."
    for name, origin in origins.items():
        if isinstance(origin, str) and origin not in fleets:
            remedy = unknown_name("", origin, list(fleets)).remedy
            yield f"requests.{name}.origin", origin, "must name an edge fleet of this scenario", remedy


def _flag_classes(reading: Reading, data: Mapping[str, Any]) -> None:
    """Check names and origins of classes although something else is wrong, so that all problems show at once."""
    requests, fleets = data.get("requests"), data.get("edge")
    if isinstance(requests, Mapping) and isinstance(fleets, Mapping):
        origins = {name: spec.get("origin") for name, spec in requests.items() if isinstance(spec, Mapping)}
        for key, value, rule, remedy in _wrong_classes(origins, fleets):
            reading.flag(key, shown(value), rule, remedy)
