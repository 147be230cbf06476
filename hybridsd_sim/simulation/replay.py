"""Carries the requests of a replication through pools, links and edge devices, array by array, without an event loop.

The requests of a mix take turns as under the policy `planned`; queues are those of `recursion`. Seconds that never come
are infinite here. Loading this module loads numba, hence `screening` asks for it only when something is screened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridsd_sim.plan import Deployment, Plan
from hybridsd_sim.pricing import Candidate, slowed
from hybridsd_sim.scenario import Scenario
from hybridsd_sim.scheduling import ALL_SHARES, NO_CANDIDATE, REASONS, TURNED_AWAY
from hybridsd_sim.simulation.records import IN_FLIGHT, SERVED, UNSERVED
from hybridsd_sim.simulation.recursion import (
    JobArrays,
    Owners,
    compiled,
    owned_devices,
    pool_queue,
    shared_devices,
    take_turns,
)
from hybridsd_sim.workload import Floats, Ints, Requests


class Links(NamedTuple):
    """When each request is made, and how fast it and its answer travel."""

    asked_s: Floats
    half_rtt_s: Floats
    up_bytes_per_s: Floats
    down_bytes_per_s: Floats


class MixTable(NamedTuple):
    """Figures by part of a mix. Pools, fleets and reasons of rejection are indices, -1 where there is none."""

    pool: Ints
    fleet: Ints
    reason: Ints
    degree: Ints
    cloud_s: Floats
    edge_s: Floats
    up_bytes: Floats
    down_bytes: Floats


@dataclass(frozen=True, slots=True, eq=False)
class MixParts:
    """The parts of all classes' mixes, one after the other: those of class `c` from `first[c]` to `first[c + 1]`.

    A part that is rejected has no option.
    """

    options: tuple[Candidate | None, ...]
    first: Ints
    share: Floats
    table: MixTable


def mix_parts(
    scenario: Scenario,
    deployment: Deployment,
    slowdowns: Mapping[str, float],
    priced: Callable[[str, Plan], Candidate],
) -> MixParts:
    """The mixes as the policy `planned` follows them: what goes to a pool without nodes is rejected."""
    rented = {index for index, name in enumerate(scenario.pools) if deployment.replicas.get(name, 0)} | {-1}
    options: list[Candidate | None] = []
    share, reason, first = [], [], [0]
    for name in scenario.requests:
        mix = deployment.plans.get(name, ())
        found = [slowed(priced(name, part.plan), slowdowns) for part in mix]
        shares = [part.share for part in mix]
        if not any(option.pool_index in rented for option in found):
            found, shares = [], []
        options += [option if option.pool_index in rented else None for option in found]
        reason += [-1 if option.pool_index in rented else REASONS.index(NO_CANDIDATE) for option in found]
        if sum(shares) <= ALL_SHARES:
            options.append(None)
            reason.append(REASONS.index(TURNED_AWAY))
            shares.append(1.0 - sum(shares))
        share += shares
        first.append(len(options))
    rows = [
        (-1, -1, why, 0, 0.0, 0.0, 0.0, 0.0)
        if o is None
        else (o.pool_index, o.fleet_index, why, o.degree, o.cloud_s, o.edge_s, o.cost.bytes_up, o.cost.bytes_down)
        for o, why in zip(options, reason, strict=True)
    ]
    kinds = [np.int64] * 4 + [np.float64] * 4
    columns: list[Any] = [np.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    return MixParts(tuple(options), np.array(first), np.array(share), MixTable(*columns))


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """One replication, by request in order of arrival, as if it went on beyond the horizon.

    Seconds are infinite, and nodes -1, for what never happens. `part` is an index into the parts of all mixes, `home_s`
    when the user's device has what the cloud made, or was asked to do it all.
    """

    requests: Requests
    part: Ints
    cloud_ready_s: Floats
    cloud_start_s: Floats
    node: Ints
    home_s: Floats
    edge_start_s: Floats
    device: Ints
    finish_s: Floats
    status: Ints


def replay(scenario: Scenario, requests: Requests, parts: MixParts, replicas: Mapping[str, int]) -> Replayed:
    """Carry the requests of a replication through pools, links and devices."""
    table = parts.table
    links = Links(requests.asked_s, requests.half_rtt_s, requests.up_bytes_per_s, requests.down_bytes_per_s)
    part = take_turns(requests.class_index, parts.first, parts.share)
    ready_s = to_pools(part, links, table)
    start_s, node = np.full(len(part), np.inf), np.full(len(part), -1)
    for index, (name, pool) in enumerate(scenario.pools.items()):
        turn = _in_order(table.pool == index, part, ready_s)
        pool_queue(
            JobArrays(turn, ready_s, part, table.cloud_s, table.degree, start_s, node),
            nodes=replicas[name],
            gpus_per_node=pool.gpus_per_node,
            discipline=pool.discipline,
            cold_start_s=pool.cold_start_s,
        )
    home_s, edge_ready_s = to_users(part, links, table, start_s)
    edge_start_s, device = edge_ready_s, requests.device
    if (table.fleet >= 0).any():
        owners = Owners(requests.asks, requests.first, requests.owner, requests.before)
        edge_start_s = owned_devices(edge_ready_s, part, table.edge_s, owners)
        for index, fleet in enumerate(scenario.edge.values()):
            if fleet.ownership == "shared" and (turn := _in_order(table.fleet == index, part, edge_ready_s)).size:
                device = device.copy()
                jobs = JobArrays(turn, edge_ready_s, part, table.edge_s, table.degree, edge_start_s, device)
                shared_devices(jobs, fleet.replicas)
    finish_s, status = finished(part, table, home_s, edge_start_s, scenario.horizon_s)
    return Replayed(requests, part, ready_s, start_s, node, home_s, edge_start_s, device, finish_s, status)


def _in_order(served: npt.NDArray[np.bool_], part: Ints, ready_s: Floats) -> Ints:
    """The requests of the parts served here in the order in which they are ready, ties in order of arrival."""
    if served.all():
        return np.argsort(ready_s, kind="stable")
    mine = np.flatnonzero(served[part]) if served.any() else np.empty(0, np.int64)
    return mine[np.argsort(ready_s[mine], kind="stable")]


@compiled
def to_pools(part: Ints, links: Links, table: MixTable) -> Floats:
    """When each request reaches its pool; infinity without one."""
    ready_s = np.empty(len(part))
    for request in range(len(part)):
        mine = part[request]
        ready_s[request] = np.inf
        if table.pool[mine] >= 0:
            up_s = links.half_rtt_s[request] + table.up_bytes[mine] / links.up_bytes_per_s[request]
            ready_s[request] = links.asked_s[request] + up_s
    return ready_s


@compiled
def to_users(part: Ints, links: Links, table: MixTable, start_s: Floats) -> tuple[Floats, Floats]:
    """When the user's device has what the cloud made, or is asked to do it all; and when its edge stage may begin."""
    home_s, edge_ready_s = np.empty(len(part)), np.empty(len(part))
    for request in range(len(part)):
        mine = part[request]
        home_s[request] = links.asked_s[request]
        if table.pool[mine] >= 0:
            down_s = links.half_rtt_s[request] + table.down_bytes[mine] / links.down_bytes_per_s[request]
            home_s[request] = start_s[request] + table.cloud_s[mine] + down_s
        edge_ready_s[request] = home_s[request] if table.fleet[mine] >= 0 else np.inf
    return home_s, edge_ready_s


@compiled
def finished(
    part: Ints, table: MixTable, home_s: Floats, edge_start_s: Floats, horizon_s: float
) -> tuple[Floats, Ints]:
    """When each user has the picture, and what became of the request by the horizon."""
    finish_s, status = np.empty(len(part)), np.empty(len(part), np.int64)
    for request in range(len(part)):
        mine = part[request]
        at_edge = table.fleet[mine] >= 0
        finish_s[request] = edge_start_s[request] + table.edge_s[mine] if at_edge else home_s[request]
        status[request] = SERVED if finish_s[request] <= horizon_s else IN_FLIGHT
        if table.reason[mine] >= 0:
            status[request] = UNSERVED
    return finish_s, status


@compiled
def tally(begin: int, class_index: Ints, arrival_s: Floats, played: tuple[Floats, Ints], limits_s: Floats) -> Ints:
    """By class, of the requests from `begin` on: all, served, unserved, in flight, in time and judged.

    The latter two by the rules of `records.in_time` and `records.judged`, in a form that can be compiled. `played` are
    finish and status; `limits_s` the SLO of every class, then the tolerance and the horizon.
    """
    finish_s, status = played
    tolerance_s, horizon_s = limits_s[len(limits_s) - 2], limits_s[len(limits_s) - 1]
    counts = np.zeros((len(limits_s) - 2, 6), np.int64)
    for request in range(begin, len(arrival_s)):
        row, what = class_index[request], status[request]
        due_s = arrival_s[request] + limits_s[row]
        counts[row, 0] += 1
        counts[row, 1 + what] += 1
        counts[row, 4] += what == SERVED and finish_s[request] <= due_s + tolerance_s
        counts[row, 5] += what != IN_FLIGHT or due_s <= horizon_s
    return counts
