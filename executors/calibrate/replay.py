"""Simulates a live run again: the same arrivals on the same links, under the plan, from the profile known before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from executors.calibrate.observed import Observed
from executors.calibrate.setting import REQUEST_CLASS, plan_of
from executors.live.shaping import Link
from hybridsd_sim.draws import Draws
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.records import TIMES, Records, column
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.simulate import simulate

POLICY = "planned"


def replay(observed: Observed, catalogue: Profiles, folder: Path) -> Records:
    """The records of the simulation of a run. Its arrivals are written into `folder` as a trace, which is played.

    Simulated requests that cross no network begin at once; live ones ask first, and begin `stack_s` later.
    """
    path = folder / f"{observed.name}.csv"
    write_arrivals(path, observed.times_s["arrival_s"])
    scenario = with_arrivals(observed.scenario, path)
    profiles = observed.profiles(catalogue)
    simulated = simulate(scenario, profiles, policy=POLICY, plan=observed.deployment).replications[0]
    return simulated if plan_of(observed.deployment).cloud_stages else _later(simulated, observed.stack_s)


def _later(records: Records, seconds: float) -> Records:
    """The same requests, each in nobody's hands for so long before anything else happens to it."""
    rows = records.rows().copy()
    for name in TIMES:
        if name != "arrival_s":
            column(rows, name)[:] += seconds
    column(rows, "transfer_s")[:] += seconds
    return replace(records, table=rows)


def write_arrivals(path: Path, arrival_s: np.ndarray) -> None:
    """A trace in the plain layout, as `hybridsd-sim trace import` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["arrival_s", *map(repr, arrival_s.tolist())]) + "\n", encoding="utf-8")


def with_arrivals(scenario: Scenario, path: Path) -> Scenario:
    """The scenario with the arrivals of a trace."""
    arrivals = {"process": "trace", "path": str(path), "rate_per_s": None, "time_scale": 1.0}
    return scenario.with_overrides({f"requests.{REQUEST_CLASS}.arrivals": arrivals})


def drawn_links(scenario: Scenario, profiles: Profiles, count: int) -> list[Link]:
    """The links of the first `count` requests of a scenario, in order of arrival: those that a simulation draws.

    They do not depend on when the requests arrive. Expects arrivals that give as many.
    """
    found = []
    for _, _, _, half_rtt_s, up_bytes_per_s, down_bytes_per_s, *_ in Draws(scenario, profiles, 0):
        found.append(Link(half_rtt_s=half_rtt_s, up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=down_bytes_per_s))
        if len(found) == count:
            return found
    raise ValueError(f"the scenario has {len(found)} requests, not {count}")
