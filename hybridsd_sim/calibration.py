"""How fast a device computes, fitted from its own rows: seconds a FLOP, seconds an operation, and how sure that is.

The law of one UNet evaluation round on one device is

    seconds = max(flop * seconds_per_flop + ops * seconds_per_op,  ops * launch_s_per_op)

The first term is arithmetic, the second the part of every kernel that does not shrink with its shape, the bound what
the host needs to launch eager kernels (eager SD 1.5 takes 44 to 53 ms on V100, RTX 3090 and A100 alike). The two
per-operation constants belong to the runtime (catalogue `runtimes`); `seconds_per_flop` is solved from each step row of
the device. A device without rows gets the datasheet peak times the catalogue's efficiency, with a wider interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log, sqrt
from typing import Any

from hybridsd_sim.errors import MissingDataError, Problem
from hybridsd_sim.plan import KIND_ORDER, Kind
from hybridsd_sim.profiles import CostRow, Profiles, Runtime
from hybridsd_sim.unet import work

SPREAD_SAME_MODEL = 0.15
"""Relative half-width (90%) when the same model was timed on the device at another size or batch. Modelled."""
SPREAD_OTHER_MODEL = 0.30
"""The same when only other models were timed on the device. Modelled."""
SPREAD_OTHER_RUNTIME = 0.40
"""The same when the device was timed under another runtime or in another precision. Modelled."""
SPREAD_DATASHEET = 0.60
"""The same when the device was never timed. Modelled."""
DOMAIN_FACTOR = 2.0
"""A round of FLOPs lies inside what was timed up to this factor beyond the smallest and the largest timed one."""
ALIKE = {"bf16": "fp16"}
"""Precisions that run at one speed."""
LEAST_ARITHMETIC = 0.2
"""Least share of a timed step that is taken to be arithmetic, whatever the runtime's per-operation constant says."""
LAUNCH_BOUND = 1.15
"""Rows within this factor of their launch floor say nothing about arithmetic speed."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The law's parameters for one (device, runtime), as seen from one asked (model, size).

    `spread` is the relative half-width of the 90% interval. `within` tells whether the FLOPs asked for lie inside the
    range that was timed, give or take `DOMAIN_FACTOR`.
    """

    seconds_per_flop: float
    seconds_per_op: float
    launch_s_per_op: float
    spread: float
    kind: Kind
    sources: tuple[str, ...]
    note: str
    within: bool

    def seconds(self, flop: float, ops: float) -> float:
        """Seconds of one round of `flop` floating-point operations in `ops` kernel launches."""
        return max(flop * self.seconds_per_flop + ops * self.seconds_per_op, ops * self.launch_s_per_op)


@dataclass(frozen=True, slots=True)
class _Anchor:
    """One timed step row with the arithmetic speed that the law gives it."""

    row: CostRow
    config: Mapping[str, Any]
    flop: float
    seconds_per_flop: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a speed is wanted for."""

    runtime: str
    precision: str
    config: Mapping[str, Any]
    flop: float
    prefer: tuple[str, ...]


def speed_of(
    profiles: Profiles,
    device: str,
    runtime: str,
    *,
    model: str,
    flop: float,
    precision: str = "fp16",
    prefer: Sequence[str] = (),
) -> Speed:
    """The device's speed law for a round of `flop` of `model`, from its nearest rows, else from its datasheet.

    Near is the same runtime, then precision, then model, then size; among equals measured goes before quoted before
    modelled, then the newer. `prefer` names sources to use before others. Raises `MissingDataError` when neither rows
    nor a datasheet peak exist.
    """
    law = profiles.runtime(runtime)
    anchors = _anchors(profiles, device)
    launch_s = _launch_s_per_op(profiles, device, law)
    if not anchors:
        return _datasheet_speed(profiles, device, law, launch_s)
    asked = _Asked(runtime, ALIKE.get(precision, precision), profiles.model(model).config, flop, tuple(prefer))
    ordered = sorted(anchors, key=lambda anchor: anchor.row.source_date, reverse=True)  # sorting is stable: newer first
    nearest = min(ordered, key=lambda anchor: _distance(anchor, asked))
    comparable = [anchor.flop for anchor in anchors if anchor.row.runtime == nearest.row.runtime]
    same_make = nearest.row.runtime == runtime and _precision(nearest.row) == asked.precision
    return Speed(
        seconds_per_flop=_between_runtimes(profiles, nearest, law),
        seconds_per_op=law.seconds_per_op,
        launch_s_per_op=launch_s,
        spread=_spread(nearest, asked),
        kind="modelled",
        sources=(nearest.row.source,),
        note=_note(nearest.row, device, asked),
        within=same_make and _holds(comparable, flop),
    )


def _between_runtimes(profiles: Profiles, nearest: _Anchor, law: Runtime) -> float:
    """The anchor's speed; timed under another runtime, its geometric mean with the datasheet's under this one."""
    peak = profiles.peak_flop_per_s(nearest.row.device)
    if nearest.row.runtime == law.name or peak is None:
        return nearest.seconds_per_flop
    return sqrt(nearest.seconds_per_flop / (peak * law.efficiency))


def _holds(timed: Sequence[float], flop: float) -> bool:
    return min(timed) / DOMAIN_FACTOR <= flop <= max(timed) * DOMAIN_FACTOR


@lru_cache(maxsize=1024)
def _launch_s_per_op(profiles: Profiles, device: str, law: Runtime) -> float:
    """Seconds a launch: the runtime's, or less where a row shows that the device's host launches faster."""
    rows = [row for row in profiles.cost_rows(device=device, runtime=law.name) if row.degree == 1]
    seen = [row.seconds_median / _ops(profiles, row) for row in rows]
    return min([law.launch_s_per_op, *seen])


def _ops(profiles: Profiles, row: CostRow) -> int:
    """Kernel launches behind one step row: a fixed-batch runtime evaluates guided latents one after the other."""
    limit = profiles.runtime(row.runtime).max_unet_batch
    return profiles.model(row.model).ops * (-(-row.latents // limit) if limit else 1)


@lru_cache(maxsize=1024)
def _anchors(profiles: Profiles, device: str) -> tuple[_Anchor, ...]:
    """The device's one-GPU step rows that say something about arithmetic: launch-bound ones do not."""
    rows = [row for row in profiles.cost_rows(device=device) if row.degree == 1]
    anchors = (_anchor(profiles, row) for row in rows)
    return tuple(anchor for anchor in anchors if anchor is not None)


def _anchor(profiles: Profiles, row: CostRow) -> _Anchor | None:
    law, model = profiles.runtime(row.runtime), profiles.model(row.model)
    ops = _ops(profiles, row)
    if row.seconds_median < LAUNCH_BOUND * ops * _launch_s_per_op(profiles, row.device, law):
        return None
    flop = 2.0 * work(model.layers(row.height_px, row.width_px)).macs * row.latents
    arithmetic = max(row.seconds_median - ops * law.seconds_per_op, LEAST_ARITHMETIC * row.seconds_median)
    return _Anchor(row, model.config, flop, arithmetic / flop)


def _precision(row: CostRow) -> str:
    return ALIKE.get(row.precision, row.precision)


def _distance(anchor: _Anchor, asked: _Asked) -> tuple[bool, bool, bool, bool, float, int]:
    row = anchor.row
    return (
        not any(name in row.source for name in asked.prefer),
        row.runtime != asked.runtime,
        _precision(row) != asked.precision,
        anchor.config != asked.config,
        round(abs(log(anchor.flop / asked.flop)), 1),
        KIND_ORDER[row.kind],
    )


def _spread(anchor: _Anchor, asked: _Asked) -> float:
    if anchor.row.runtime != asked.runtime or _precision(anchor.row) != asked.precision:
        return SPREAD_OTHER_RUNTIME
    return SPREAD_SAME_MODEL if anchor.config == asked.config else SPREAD_OTHER_MODEL


def _note(row: CostRow, device: str, asked: _Asked) -> str:
    timed = f"{row.model} at {row.height_px}x{row.width_px} px under {row.runtime} in {row.precision}"
    return f"scaled by FLOPs and launches from {device} {timed} to {asked.runtime} in {asked.precision}"


def _datasheet_speed(profiles: Profiles, device: str, law: Runtime, launch_s: float) -> Speed:
    peak = profiles.peak_flop_per_s(device)
    if peak is None:
        known = sorted({row.device for row in profiles.cost_rows(component="step")})
        rule = "no timed step and no datasheet peak, so its speed is unknown"
        raise MissingDataError(Problem("device", device, rule, f"Timed devices: {', '.join(known)}."))
    return Speed(
        seconds_per_flop=1.0 / (peak * law.efficiency),
        seconds_per_op=law.seconds_per_op,
        launch_s_per_op=launch_s,
        spread=SPREAD_DATASHEET,
        kind="modelled",
        sources=(law.source,),
        note=f"{device} was never timed: datasheet peak x {law.efficiency:g}",
        within=False,
    )
