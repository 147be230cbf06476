"""A part of a live run as it is kept: what was served, the profile known before it, what its requests went through.

A part is two files: `<name>.json` says what was run and how it was measured, `<name>.parquet` has the times of each
request. The JSON is written last, so that a part which has one is whole. The times of a part become records in the
simulator's own format, under the simulator's own laws (`build_records`), and its arrivals are simulated again: on the
same links, under the same plan, from the profile known before (`replay`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridsd_sim.errors import InputError, Problem, RunError
from hybridsd_sim.files import atomic_path, write_atomically
from hybridsd_sim.plan import Deployment, deployment_from_dict
from hybridsd_sim.profiles import CostRow, Profiles, Quantiles
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulation import (
    TIME_COLUMNS,
    PlanFacts,
    Records,
    RunRecorder,
    check_laws,
    column,
    plan_facts,
    simulate,
)
from hybridsd_sim.workload import Draws

from ..live import Link, RequestOutcome
from .load import SentRequest
from .testbed import POOL, REQUEST_CLASS, candidate_of, plan_of

Floats = npt.NDArray[np.float64]

FORMAT = 3
"""Of the files of a part; others are refused."""

POLICY = "planned"
"""Requests follow the plan, live and simulated."""

TICK_S = 2.0**-22
"""Times are kept to a quarter of a microsecond, in binary, so that sums of them stay exact and files small."""


def facts_of(
    sent: Sequence[SentRequest[RequestOutcome]], scenario: Scenario, deployment: Deployment, profiles: Profiles
) -> PlanFacts:
    """What the plan says of every request, with the bytes that really came down."""
    facts = plan_facts(scenario, profiles, candidate_of(scenario, deployment, profiles))
    return facts._replace(bytes_down=round(median(one.answer.bytes_down for one in sent)))


def times_of(sent: Sequence[SentRequest[RequestOutcome]]) -> dict[str, Floats]:
    """The times of every request, from the first arrival on. Raises `RunError` unless all were served undisturbed."""
    outcomes = [one.answer for one in sent]
    if reasons := sorted({one.reason for one in outcomes if one.status != "served"}):
        raise RunError(f"requests of the live run were not served: {', '.join(reasons)}")
    if lost := sum(one.restarts + one.retries for one in outcomes):
        raise RunError(f"workers or answers were lost {lost} times in the live run")
    return {
        name: round_times(np.array([getattr(one, name) for one in outcomes]) - sent[0].arrival_s)
        for name in TIME_COLUMNS
    }


def round_times(times_s: Floats) -> Floats:
    """Times to the next tick.

    A tick is `TICK_S`, a power of two, so that rounded times add up without an error.
    """
    ticks: Floats = np.round(times_s / TICK_S) * TICK_S
    return ticks


def build_records(times_s: Mapping[str, Floats], scenario: Scenario, facts: PlanFacts) -> Records:
    """The records of a run in which all requests were served. Raises `RunError` where it broke a law.

    `transfer_s` is the part of the latency in which neither side held the request or let it wait: the network, and what
    clients and servers add to it.
    """
    arrival_s, finish_s = times_s["arrival_s"], times_s["finish_s"]
    held = {side: np.nan_to_num(times_s[f"{side}_stop_s"] - times_s[f"{side}_ready_s"]) for side in ("cloud", "edge")}
    promises = next(iter(scenario.promises.values()))
    records = Records(tuple(scenario.requests), tuple(scenario.pools), tuple(scenario.edge), (), ())
    recorder = RunRecorder(records, scenario.horizon_s)
    recorder.add_plan(facts)
    columns: dict[str, Floats | float] = {
        **times_s, "request": np.arange(len(arrival_s), dtype=float), "class_index": 0.0, "plan_index": 0.0,
        "status": 0.0, "reason": -1.0, "deadline_s": arrival_s + promises.deadline_s(),
        "model_load_s": 0.0, "transfer_s": finish_s - arrival_s - held["cloud"] - held["edge"],
        "node": min(facts.pool_index, 0), "device": min(facts.fleet_index, 0),
    }  # fmt: skip
    recorder.write_all(len(arrival_s), columns)
    done = recorder.close()
    gpus = scenario.pools[POOL].gpus_per_node
    check_laws(done, {POOL: gpus}, {name: fleet.replicas for name, fleet in scenario.edge.items()})
    return done


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ObservedPart:
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
        return build_records(self.times_s, self.scenario, self.facts)

    def profiles(self, catalogue: Profiles) -> Profiles:
        """What was known before the run: its rows, and its network as the machine lets requests through.

        All quantiles of the round trip are longer by `stack_s`, which is added in one piece.
        """
        spec = next(iter(self.scenario.edge.values()))
        network = catalogue.network(spec.network)
        points = (point + self.stack_s for point in network.rtt_s.points)
        rtt_s = Quantiles(**dict(zip(Quantiles.model_fields, points, strict=True)))
        slower = network.model_copy(update={"rtt_s": rtt_s})
        return replace(catalogue.with_costs(self.rows), networks={**catalogue.networks, network.name: slower})


def name_of(kind: str, load: float) -> str:
    """What a run is called, all its parts together."""
    return f"{kind}-{load:g}"


def save(observed: ObservedPart, folder: Path) -> None:
    """Write a part into a folder, in the place of one of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_times(folder / f"{observed.name}.parquet", {**observed.times_s, "late_s": observed.late_s})
    plain = ("kind", "load", "part", "rate_per_s", "driver", "stack_s", "drift", "drift_limit")
    medians = ("step_before_s", "step_during_s", "step_after_s")
    facts = observed.facts._asdict()
    text = json.dumps(
        {
            "format": FORMAT,
            **{name: getattr(observed, name) for name in plain},
            **{name: dict(getattr(observed, name)) for name in medians},
            "scenario": observed.scenario.to_dict(),
            "deployment": observed.deployment.to_dict(),
            # None for what is not a number
            "facts": {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in facts.items()},
            "rows": [row.model_dump(mode="json", exclude_defaults=True) for row in observed.rows],
        },
        indent=1,
        allow_nan=False,
    )
    write_atomically(folder / f"{observed.name}.json", f"{text}\n".encode())


def find(folder: Path) -> list[ObservedPart]:
    """All parts in a folder, by kind, load and number. Raises `InputError` for files of another format.

    A folder that is not there holds none.
    """
    return sorted((load(path) for path in folder.glob("*.json")), key=lambda run: (run.kind, run.load, run.part))


def load(path: Path) -> ObservedPart:
    """The part whose JSON this is.

    Raises `InputError` for a file of another format.
    """
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.pop("format", None) != FORMAT:
        rule = f"this version reads runs of format {FORMAT}"
        raise InputError(Problem(str(path), "another format", rule, "Observe it again."))
    times_s = read_times(path.with_suffix(".parquet"))
    facts: dict[str, Any] = {name: math.nan if value is None else value for name, value in saved["facts"].items()}
    return ObservedPart(
        **{
            **saved,
            "scenario": Scenario.model_validate_json(json.dumps(saved["scenario"])),
            "deployment": deployment_from_dict(saved["deployment"]),
            "rows": tuple(CostRow.model_validate(row, strict=False) for row in saved["rows"]),
            "facts": PlanFacts(**{**facts, "batch_gpu_s": tuple(facts["batch_gpu_s"])}),
            "late_s": times_s.pop("late_s"),
            "times_s": times_s,
        }
    )


def of_records(records: Records) -> dict[str, Floats]:
    """The times of records, as they are kept."""
    return {name: round_times(column(records.rows(), name)) for name in TIME_COLUMNS}


def write_times(path: Path, times_s: Mapping[str, Floats]) -> None:
    """Times of requests, a column each; what no request has is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: values for name, values in times_s.items() if not np.isnan(values).all()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False, use_byte_stream_split=True)


def read_times(path: Path) -> dict[str, Floats]:
    """What `write_times` wrote; NaN for what was left out."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    nothing = dict.fromkeys(TIME_COLUMNS, np.full(table.num_rows, np.nan))
    return nothing | {name: table[name].to_numpy() for name in table.column_names}


def replay(observed: ObservedPart, catalogue: Profiles, folder: Path) -> Records:
    """The records of the simulation of a run. Its arrivals are written into `folder` as a trace, which is played.

    Simulated requests that cross no network begin at once; live ones ask first, and begin `stack_s` later.
    """
    path = folder / f"{observed.name}.csv"
    write_arrivals(path, observed.times_s["arrival_s"])
    scenario = with_arrivals(observed.scenario, path)
    profiles = observed.profiles(catalogue)
    simulated = simulate(scenario, profiles, policy=POLICY, plan=observed.deployment).replications[0]
    if plan_of(observed.deployment).cloud_stages:
        return simulated
    rows = simulated.rows().copy()
    for name in (*TIME_COLUMNS, "transfer_s"):
        if name != "arrival_s":
            column(rows, name)[:] += observed.stack_s
    return replace(simulated, table=rows)


def write_arrivals(path: Path, arrival_s: np.ndarray) -> None:
    """A trace in the plain layout, as `hybridsd-sim trace import` writes it."""
    write_atomically(path, ("\n".join(["arrival_s", *map(repr, arrival_s.tolist())]) + "\n").encode())


def with_arrivals(scenario: Scenario, path: Path) -> Scenario:
    """The scenario with the arrivals of a trace."""
    arrivals = {"process": "trace", "path": str(path), "rate_per_s": None, "time_scale": 1.0}
    return scenario.with_overrides({f"requests.{REQUEST_CLASS}.arrivals": arrivals})


def draw_links(scenario: Scenario, profiles: Profiles, count: int) -> list[Link]:
    """The links of the first `count` requests of a scenario, in order of arrival: those that a simulation draws.

    They do not depend on when the requests arrive. Expects arrivals that give as many.
    """
    found = []
    for _, _, _, half_rtt_s, up_bytes_per_s, down_bytes_per_s, *_ in Draws(scenario, profiles, 0):
        found.append(Link(half_rtt_s=half_rtt_s, up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=down_bytes_per_s))
        if len(found) == count:
            return found
    raise ValueError(f"the scenario has {len(found)} requests, not {count}")
