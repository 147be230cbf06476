"""A part of a live run as it is kept: what was served, the profile known before it, what its requests went through.

A part is two files: `<name>.json` says what was run and how it was measured, `<name>.parquet` has the times of each
request, of which its records are made. The JSON is written last, so that a part which has one is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from executors.calibrate.booking import Floats, booked, rounded
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.plan import Deployment, deployment_from_dict
from hybridsd_sim.profiles import CostRow, Profiles, Quantiles
from hybridsd_sim.records import TIMES, PlanFacts, Records, column, write_atomically
from hybridsd_sim.scenario import Scenario

FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """One part of a live run of one kind at one load, `part` counted from 1; workers and queues are idle between parts.

    `scenario` has the part's own arrivals as a trace of the name `<name>.csv`, wherever that lies. Known before it: the
    cost `rows` of a rehearsal, brought to the pace just before the part, and `stack_s`, what the machine adds to the
    network, or to asking where none is crossed. `step_before_s`, `step_during_s` and `step_after_s` are the median
    steps of each device, before and after while no requests are about. `late_s`: how long after it was due each request
    was sent.
    """

    kind: str
    load: float
    part: int
    rate_per_s: float
    driver: str
    scenario: Scenario
    deployment: Deployment
    rows: tuple[CostRow, ...] = field(repr=False)
    stack_s: float
    step_before_s: Mapping[str, float]
    step_during_s: Mapping[str, float]
    step_after_s: Mapping[str, float]
    drift: float
    drift_limit: float
    facts: PlanFacts
    times_s: Mapping[str, Floats] = field(repr=False)
    late_s: Floats = field(repr=False)

    @property
    def name(self) -> str:
        return f"{name_of(self.kind, self.load)}-{self.part}"

    @property
    def void(self) -> bool:
        """Whether steps took another time after the part than before, so that its profile does not stand for it."""
        return self.drift > self.drift_limit

    def records(self) -> Records:
        """What happened, in the simulator's own format. Raises `RunError` where it broke a law."""
        return booked(self.times_s, self.scenario, self.facts)

    def profiles(self, catalogue: Profiles) -> Profiles:
        """What was known before the run: its rows, and its network as the machine lets requests through."""
        spec = next(iter(self.scenario.edge.values()))
        network = catalogue.network(spec.network)
        points = (point + self.stack_s for point in network.rtt_s.points)
        rtt_s = Quantiles(**dict(zip(Quantiles.model_fields, points, strict=True)))
        slower = network.model_copy(update={"rtt_s": rtt_s})
        return replace(catalogue.with_costs(self.rows), networks={**catalogue.networks, network.name: slower})


def name_of(kind: str, load: float) -> str:
    """What a run is called, all its parts together."""
    return f"{kind}-{load:g}"


def save(observed: Observed, folder: Path) -> None:
    """Write a part into a folder, in the place of one of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_times(folder / f"{observed.name}.parquet", {**observed.times_s, "late_s": observed.late_s})
    said = json.dumps(_said(observed), indent=1, allow_nan=False)
    write_atomically(folder / f"{observed.name}.json", f"{said}\n".encode())


def find(folder: Path) -> list[Observed]:
    """All parts in a folder, by kind, load and number. Raises `InputError` for files of another format."""
    return sorted((load(path) for path in folder.glob("*.json")), key=lambda run: (run.kind, run.load, run.part))


def load(path: Path) -> Observed:
    """The part whose JSON this is."""
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.pop("format", None) != FORMAT:
        rule = f"this version reads runs of format {FORMAT}"
        raise InputError(Problem(str(path), "another format", rule, "Observe it again."))
    times_s = read_times(path.with_suffix(".parquet"))
    return Observed(
        **{
            **said,
            "scenario": Scenario.model_validate_json(json.dumps(said["scenario"])),
            "deployment": deployment_from_dict(said["deployment"]),
            "rows": tuple(CostRow.model_validate(row, strict=False) for row in said["rows"]),
            "facts": _facts(said["facts"]),
            "late_s": times_s.pop("late_s"),
            "times_s": times_s,
        }
    )


def _said(observed: Observed) -> dict[str, Any]:
    """All of a part but its requests, as plain data without folders."""
    plain = ("kind", "load", "part", "rate_per_s", "driver", "stack_s", "drift", "drift_limit")
    medians = ("step_before_s", "step_during_s", "step_after_s")
    facts = {name: _known(value) for name, value in observed.facts._asdict().items()}
    return {
        "format": FORMAT,
        **{name: getattr(observed, name) for name in plain},
        **{name: dict(getattr(observed, name)) for name in medians},
        "scenario": observed.scenario.to_dict(),
        "deployment": observed.deployment.to_dict(),
        "facts": facts,
        "rows": [row.model_dump(mode="json", exclude_defaults=True) for row in observed.rows],
    }


def _facts(said: Mapping[str, Any]) -> PlanFacts:
    found = {name: math.nan if value is None else value for name, value in said.items()}
    return PlanFacts(**{**found, "batch_gpu_s": tuple(found["batch_gpu_s"])})


def _known(value: Any) -> Any:
    """None for what is not a number."""
    return None if isinstance(value, float) and math.isnan(value) else value


def of_records(records: Records) -> dict[str, Floats]:
    """The times of records, as they are kept."""
    return {name: rounded(column(records.rows(), name)) for name in TIMES}


def write_times(path: Path, times_s: Mapping[str, Floats]) -> None:
    """Times of requests, a column each; what no request has is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    table = pa.table({name: values for name, values in times_s.items() if not np.isnan(values).all()})
    pq.write_table(table, part, compression="zstd", use_dictionary=False, use_byte_stream_split=True)
    part.replace(path)


def read_times(path: Path) -> dict[str, Floats]:
    """What `write_times` wrote; NaN for what was left out."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    nothing = dict.fromkeys(TIMES, np.full(table.num_rows, np.nan))
    return nothing | {name: table[name].to_numpy() for name in table.column_names}
