"""Runs of a validation as tests make them: simulated from a made-up profile of the testbed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from executors.live import RequestOutcome
from executors.validation import recording as kept
from executors.validation.load import SentRequest
from executors.validation.recording import facts_of, times_of, with_arrivals, write_arrivals
from executors.validation.testbed import (
    CLOUD,
    EDGE,
    LARGE,
    REQUEST_CLASS,
    SIZE_PX,
    SMALL,
    TEXT_ENCODER,
    VAE,
    ServingKind,
    balanced_switch_step,
    bottleneck_s,
    candidate_of,
    deployment_of,
    scenario_of,
    write_catalogue,
)
from hybridsd_sim import load_profiles
from hybridsd_sim.profiles import CostRow, Profiles
from hybridsd_sim.simulation import Records, column, simulate

if TYPE_CHECKING:
    from pathlib import Path

    from hybridsd_sim.plan import Deployment
    from hybridsd_sim.scenario import Scenario

GUIDED = {"height_px": SIZE_PX, "width_px": SIZE_PX, "guidance": True}


def timed(device: str, model: str, component: str, seconds: float, **more: object) -> CostRow:
    """A measured row of the testbed."""
    said = {"runtime": "eager", "precision": "fp32", "kind": "measured", "source": "a test", "source_date": "2026"}
    what = {"device": device, "model": model, "component": component, "seconds_median": seconds}
    return CostRow.model_validate({**said, **what, **more}, strict=False)


def rows(large_s: float = 0.06, small_s: float = 0.045) -> list[CostRow]:
    """A profile of all kinds, by the seconds of a step of the two models."""
    size = {"height_px": SIZE_PX, "width_px": SIZE_PX}
    spec = {"method": "cfg_parallel", "degree": 2, "options": "ranks=gloo"}
    found = [timed(CLOUD, LARGE, "step", large_s, **GUIDED), timed(EDGE, SMALL, "step", small_s, **GUIDED)]
    found.append(timed(CLOUD, LARGE, "step", 0.55 * large_s, **GUIDED, **spec))
    for device in (CLOUD, EDGE):
        found.append(timed(device, TEXT_ENCODER, "text_encode", 0.006))
        found.append(timed(device, VAE, "vae_decode", 0.015, **size))
    found.append(timed(CLOUD, LARGE, "handover_serialise", 0.001, comm_bytes=81_000, **GUIDED))
    return [*found, timed(EDGE, SMALL, "handover_parse", 0.001, comm_bytes=81_000, **GUIDED)]


def made_up(folder: Path) -> Profiles:
    """The testbed's catalogue, written into a folder, with a made-up profile."""
    return load_profiles(write_catalogue(folder)).with_costs(rows())


def set_up(kind: ServingKind, profiles: Profiles, load: float = 0.7) -> tuple[Scenario, Deployment]:
    """Poisson arrivals at a load of the kind's own bottleneck, for a hundred requests or so."""
    endless = scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1.0)
    deployment = deployment_of(kind, endless, profiles, switch_step=balanced_switch_step(kind, profiles))
    rate = load / bottleneck_s(candidate_of(endless, deployment, profiles))
    scenario = scenario_of(kind, arrivals={"process": "poisson", "rate_per_s": rate}, span_s=1.0, slo_s=0.8)
    return scenario.with_overrides({"horizon_s": 100 / rate + 100.0}), deployment


def run_of(kind: ServingKind, profiles: Profiles, tmp_path: Path, count: int = 100) -> Records:
    """A simulated run of a kind in which every request was served."""
    scenario, deployment = set_up(kind, profiles)
    first = simulate(scenario, profiles, policy="planned", plan=deployment).replications[0]
    arrival_s = column(first.rows(), "arrival_s")[:count]
    write_arrivals(tmp_path / "arrivals.csv", arrival_s - arrival_s[0])
    played = with_arrivals(scenario, tmp_path / "arrivals.csv")
    return simulate(played, profiles, policy="planned", plan=deployment).replications[0]


def slower(run: Records, factor: float) -> Records:
    """The same run on a slower clock: every time is `factor` times as late, what was promised too."""
    frame = run.rows().copy()
    for name in (*kept.TIME_COLUMNS, "deadline_s", "transfer_s"):
        column(frame, name)[:] *= factor
    return replace(run, table=frame)


def outcomes_of(run: Records, *, at_s: float = 1000.0) -> list[SentRequest[RequestOutcome]]:
    """A run as a client on a clock that began long ago would have seen it."""
    frame = run.rows()
    return [
        SentRequest(
            float(row[5]) + at_s,
            0.001,
            RequestOutcome(
                id=f"r{number}",
                request_class=REQUEST_CLASS,
                status="served",
                bytes_down=81_000,
                **{name: float(column(frame, name)[number]) + at_s for name in kept.TIME_COLUMNS},
            ),
        )
        for number, row in enumerate(frame)
    ]


def observed_of(
    run: Records, profiles: Profiles, kind: ServingKind, *, part: int = 1, drift: float = 0.0
) -> kept.ObservedPart:
    """A part of a run as it is kept."""
    scenario, deployment = set_up(kind, profiles)
    sent = outcomes_of(run)
    steps = {CLOUD: 0.06, EDGE: 0.045}
    return kept.ObservedPart(
        kind=kind.name, load=0.7, part=part, rate_per_s=3.0, driver="mlcommons-loadgen",
        scenario=with_arrivals(scenario, scenario.name), deployment=deployment, rows=tuple(rows()), stack_s=0.0,
        step_before_s=steps, step_during_s=steps, step_after_s=steps, drift=drift, drift_limit=0.01,
        facts=facts_of(sent, scenario, deployment, profiles), times_s=times_of(sent), late_s=np.full(len(run), 0.001),
    )  # fmt: skip
