"""Fits what devices share: the populations of their fits, and the constants of the parallel methods.

Populations are estimated by expectation and maximisation over all one-GPU step rows: every device is fitted against
the population, and the population is then the mean and spread of those fits, their own uncertainty included. The
method constants are fitted by least squares in logarithms to published multi-GPU times, on top of device fits that
only ever saw one GPU. `refit` does both again with rows left out, which is how held-out errors are found.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from math import exp, log, sqrt
from pathlib import Path

import numpy as np

from hybridsd_sim.files import write_atomically
from hybridsd_sim.perf.device_fit import (
    Fit,
    fit_of,
    fitted_component_time,
    memory_bytes_per_s,
    peak_flop_per_s,
    starting_prior,
)
from hybridsd_sim.perf.parallel_methods import METHODS
from hybridsd_sim.perf.roofline import NO_LIMIT, Floats
from hybridsd_sim.perf.stage_time import CONSTANTS, CollectiveStep, constants_of, stage_collectives
from hybridsd_sim.plan import Request, Site, Stage
from hybridsd_sim.profiles import EFFICIENCIES, CostRow, MethodConstant, Population, Profiles, alike

ITERATIONS = 6
"""Rounds of expectation and maximisation; thirty move a fit's seconds by about 1.5%."""

START_DEVICES = 1.0
"""How many devices the starting prior of a runtime weighs."""

MULTI_GPU_SPREAD = 0.03
"""Standard deviation of a published multi-GPU time's logarithm, before the residuals narrow or widen it."""

PRIOR_ROWS = 4.0

LONG_RUN = 10_000
"""Steps of a run whose warm-up hardly shows in the mean."""

LINKS = {"gloo": "tcp-one-host"}
"""Interconnects of process groups that do not use the device's own."""

METHOD_CONSTANTS = (*(constant.name for constant in CONSTANTS), "unexplained_share")

LEAST_RATIO_SPREAD = 0.2

SOURCE = "fitted to the rows of this folder by hybridsd_sim.fitting"
"""Written into the fitted tables and from there into saved results: it stays as it was first published."""


def refit(profiles: Profiles, *, without: Callable[[CostRow], bool]) -> Profiles:
    """The profiles without some cost rows, with populations and method constants fitted again without them."""
    kept = profiles.without(without)
    gone = [row for row in profiles.costs if without(row)]
    if touched := {(row.runtime, alike(row.precision)) for row in gone if is_one_gpu_step(row)}:
        # from nothing: populations that saw the rows would still remember them
        rest = tuple(row for row in kept.populations if (row.runtime, row.precision) not in touched)
        kept = with_populations(replace(kept, populations=rest), only=touched)
    if any(is_multi_gpu_time(row) for row in gone):
        return with_constants(kept)
    methods = {name: row for name, row in kept.constants.items() if name in METHOD_CONSTANTS}
    return _with_shared(replace(kept, constants=methods))


def fitted(profiles: Profiles) -> Profiles:
    """The profiles with everything fitted anew from their rows."""
    bare = replace(profiles, populations=(), constants={})
    return with_constants(with_populations(bare))


# ---- Populations ----------------------------------------------------------------------------------------------------


def is_one_gpu_step(row: CostRow) -> bool:
    """Whether a row enters a device's fit."""
    return row.component == "step" and row.method == "single" and row.degree == 1 and row.rank is None


def own_fits(profiles: Profiles, only: Collection[tuple[str, str]] | None = None) -> list[Fit]:
    """The fits of all (device, runtime, precision) that were timed, by name; `only` of these (runtime, precision)s."""
    keys = {(row.device, row.runtime, alike(row.precision)) for row in profiles.costs if is_one_gpu_step(row)}
    return [fit_of(profiles, *key) for key in sorted(keys) if only is None or key[1:] in only]


def with_populations(
    profiles: Profiles, *, iterations: int = ITERATIONS, only: Collection[tuple[str, str]] | None = None
) -> Profiles:
    """The profiles with the populations estimated from their one-GPU rows.

    A spread never grows beyond the starting prior's: more disagreement than that is the sources', not the devices'.
    """
    others = () if only is None else [row for row in profiles.populations if (row.runtime, row.precision) not in only]
    for _ in range(iterations):
        groups: dict[tuple[str, str], list[Fit]] = {}
        for fit in own_fits(profiles, only):
            groups.setdefault((fit.runtime, fit.precision), []).append(fit)
        found = [row for key, fits in groups.items() for row in _population(profiles, *key, fits)]
        profiles = replace(profiles, populations=(*others, *found))
    return profiles


def _population(profiles: Profiles, runtime: str, precision: str, fits: Sequence[Fit]) -> Iterator[Population]:
    start = starting_prior(profiles, runtime, precision)
    shares = []  # each fit's logarithms relative to its device's datasheet; infinite where that says nothing
    for fit in fits:
        peak, bandwidth = peak_flop_per_s(profiles, fit.device), memory_bytes_per_s(profiles, fit.device)
        offsets = np.zeros(len(fit.log_parameters))
        offsets[0] = log(peak) if peak else np.inf
        offsets[3] = log(bandwidth) if bandwidth else np.inf
        shares.append(fit.log_parameters - offsets)
    newest = max(row.source_date for fit in fits for row in fit.rows)
    for index, name in enumerate(EFFICIENCIES):
        seen = [
            (share[index], fit.covariance[index, index])
            for share, fit in zip(shares, fits, strict=True)
            if np.isfinite(share[index])
        ]
        weight = START_DEVICES + len(seen)
        mean = (START_DEVICES * start.mean[index] + sum(value for value, _ in seen)) / weight
        moments = sum((value - mean) ** 2 + variance for value, variance in seen)
        start_moment = start.spread[index] ** 2 + (start.mean[index] - mean) ** 2
        spread = min(sqrt((START_DEVICES * start_moment + moments) / weight), float(start.spread[index]))
        yield Population(
            runtime=runtime, precision=precision, parameter=name, mean=_rounded(exp(mean)), spread=_rounded(spread),
            devices=len(seen), kind="modelled", source=SOURCE, source_date=newest,
        )  # fmt: skip


# ---- Method constants -----------------------------------------------------------------------------------------------


def is_multi_gpu_time(row: CostRow) -> bool:
    """Whether a row is a published time of several GPUs that says enough to be predicted: steps and warm-up."""
    says_warmup = any(word in row.options for word in ("warmup_steps=", "sync_mode=full_sync", "sync_mode=no_sync"))
    several = row.component == "step" and row.degree > 1 and row.rank is None
    return several and row.kind == "quoted" and says_warmup


def is_shared_memory_time(row: CostRow) -> bool:
    """Whether a row is a measured steady step of several processes on one machine, with the method's usual modes."""
    several = row.component == "step" and row.degree > 1 and row.rank is None
    return several and row.kind == "measured" and "ranks=gloo" in row.options


def timed_stage(row: CostRow) -> tuple[Stage, Request]:
    """The stage and request whose average step a row timed."""
    texts = row.option_texts
    steps = int(texts.pop("num_inference_steps", "50"))
    defaults = METHODS[row.method].defaults
    options = tuple(
        (name, value == "true" if isinstance(defaults[name], bool) else type(defaults[name])(value))
        for name, value in sorted(texts.items())
        if name in defaults
    )
    site = Site(
        name="cloud", tier="cloud", device=row.device, runtime=row.runtime, precision=row.precision,
        gpus_per_node=row.degree, interconnect=LINKS.get(texts.pop("ranks", "")),
    )  # fmt: skip
    stage = Stage(
        start=0, stop=steps, model=row.model, site=site, method=row.method, degree=row.degree, options=options
    )
    request = Request(
        model=row.model, height_px=row.height_px, width_px=row.width_px, num_inference_steps=steps,
        num_images=row.batch_size, guidance_scale=7.5 if row.guidance else 1.0,
    )  # fmt: skip
    return stage, request


def with_constants(profiles: Profiles) -> Profiles:
    """The profiles with the method constants fitted to their published multi-GPU times."""
    rows = [row for row in profiles.costs if is_multi_gpu_time(row)]
    return _with_shared(replace(profiles, constants={row.name: row for row in _method_constants(profiles, rows)}))


def _with_shared(profiles: Profiles) -> Profiles:
    """The profiles with their method constants, and the ratios that other rows tell.

    Those are how much longer components take than the fit of UNet steps says, and ranks that share one machine's memory
    than the model says with all the other constants.
    """
    known = dict(profiles.constants)
    fitted_keys = {(fit.device, fit.runtime, fit.precision) for fit in own_fits(profiles)}
    plain = replace(profiles, constants={})
    for name in ("vae_decode", "text_encode"):
        gaps, rows = [], []
        for row in profiles.cost_rows(component=name, batch_size=1, degree=1):
            if (row.device, row.runtime, alike(row.precision)) in fitted_keys:
                where, size = (row.device, row.runtime, row.precision), (row.height_px, row.width_px)
                gaps.append(log(row.seconds_median / fitted_component_time(plain, *where, row.model, size).value))
                rows.append(row)
        if rows:
            meaning = f"seconds of a timed {name} over those of its FLOPs under the law of UNet steps"
            known[f"{name}_ratio"] = _ratio_constant(f"{name}_ratio", gaps, rows, meaning)
    alone = replace(profiles, constants={name: row for name, row in known.items() if name != "contention"})
    rows = [row for row in profiles.costs if is_shared_memory_time(row)]
    if rows:
        gaps = [-_Timed(row, alone).error(constants_of(alone)[0]) for row in rows]
        meaning = "seconds of ranks that share one machine's memory over those of the law"
        known["contention"] = _ratio_constant("contention", gaps, rows, meaning)
    return replace(profiles, constants=known)


def _method_constants(profiles: Profiles, rows: Sequence[CostRow]) -> Iterator[MethodConstant]:
    from scipy.optimize import least_squares

    if not rows:
        return
    mean = np.log([constant.value for constant in CONSTANTS])
    spread = np.array([constant.spread for constant in CONSTANTS])
    timed = [_Timed(row, profiles) for row in rows]

    def misfits(z: Floats) -> Floats:
        errors = np.array([item.error(mean + spread * z) for item in timed])
        return np.concatenate([errors / MULTI_GPU_SPREAD, z])

    found = least_squares(misfits, np.zeros(len(mean)))
    errors = found.fun[: len(rows)] * MULTI_GPU_SPREAD
    unexplained = sqrt((PRIOR_ROWS * MULTI_GPU_SPREAD**2 + float(errors @ errors)) / (PRIOR_ROWS + len(rows)))
    jacobian = np.asarray(found.jac)[: len(rows)] * MULTI_GPU_SPREAD / unexplained
    covariance = np.linalg.inv(jacobian.T @ jacobian + np.eye(len(mean)))
    widths = spread * np.sqrt(np.diag(covariance))
    for constant, value, width in zip(CONSTANTS, mean + spread * found.x, widths, strict=True):
        yield _constant(constant.name, exp(value), float(width), rows, constant.meaning)
    meaning = "standard deviation that these times keep around the model, relative"
    yield _constant("unexplained_share", unexplained, 0.0, rows, meaning)


class _Timed:
    """A published multi-GPU time beside the rounds that predict it."""

    def __init__(self, row: CostRow, profiles: Profiles) -> None:
        stage, request = timed_stage(row)
        if row.kind == "measured":  # one steady step: of a run so long that its synchronous steps do not count
            stage, request = replace(stage, stop=LONG_RUN), replace(request, num_inference_steps=LONG_RUN)
        self._rounds: list[tuple[int, CollectiveStep]] = stage_collectives(stage, request, profiles)
        self._observed = row.seconds_median * stage.num_steps

    def error(self, constants: Floats) -> float:
        """log(predicted / published)."""
        total = sum(count * round_.seconds_with(constants) for count, round_ in self._rounds)
        return log(total / self._observed)


def _ratio_constant(name: str, gaps: Sequence[float], rows: Sequence[CostRow], meaning: str) -> MethodConstant:
    """The median ratio of timed to modelled seconds from its logarithms, and how far single rows lie from it.

    The spread begins at `LEAST_RATIO_SPREAD`, which weighs as much as one row.
    """
    spread = sqrt((LEAST_RATIO_SPREAD**2 + float(np.var(gaps)) * len(gaps)) / (1 + len(gaps)))
    return _constant(name, exp(float(np.median(gaps))), spread, rows, meaning)


def _constant(name: str, value: float, spread: float, rows: Sequence[CostRow], meaning: str) -> MethodConstant:
    return MethodConstant(
        name=name, value=_rounded(value), spread=_rounded(spread), rows=len(rows), kind="modelled", source=SOURCE,
        source_date=max(row.source_date for row in rows), notes=meaning,
    )  # fmt: skip


def _rounded(value: float) -> float:
    """Five digits: the last ones of a fit differ between machines."""
    return float(f"{value:.5g}")


LAW_COLUMNS = ("device", "runtime", "precision", "parameter", "value", "low", "high", "rows")

RESIDUAL_COLUMNS = (
    "device", "runtime", "precision", "model", "height_px", "width_px", "latents", "kind", "seconds", "law_s",
    "relative_error", "source",
)  # fmt: skip


# ---- Written tables -------------------------------------------------------------------------------------------------


def write_fitted(profiles: Profiles, folder: Path) -> None:
    """Write what was fitted to `folder`: populations and constants, which are read again, and fits and residuals.

    `laws.csv` has every (device, runtime, precision) with its parameters and their 90% intervals, `residuals.csv` every
    row behind them with what its fit says. Raises `InputError` where the folder cannot be written.
    """
    fits = own_fits(profiles)
    folder.mkdir(parents=True, exist_ok=True)
    populations, constants = [row.model_dump() for row in profiles.populations], profiles.constants.values()
    _write(folder / "populations.csv", list(Population.model_fields), populations)
    _write(folder / "constants.csv", list(MethodConstant.model_fields), [row.model_dump() for row in constants])
    _write(folder / "laws.csv", LAW_COLUMNS, [line for fit in fits for line in law_lines(fit)])
    _write(folder / "residuals.csv", RESIDUAL_COLUMNS, [line for fit in fits for line in residual_lines(fit)])


def _write(path: Path, columns: Sequence[str], lines: Sequence[Mapping[str, object]]) -> None:
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue().encode())


def law_lines(fit: Fit) -> Iterator[dict[str, object]]:
    """A fit's parameters with their 90% intervals, a line each; a memory rate that nobody knows is left out."""
    for name, found in fit.parameters.items():
        if found.value < NO_LIMIT / 10:
            yield {
                "device": fit.device, "runtime": fit.runtime, "precision": fit.precision, "parameter": name,
                "value": _rounded(found.value), "low": _rounded(found.low), "high": _rounded(found.high),
                "rows": len(fit.rows),
            }  # fmt: skip


def residual_lines(fit: Fit) -> Iterator[dict[str, object]]:
    """The rows behind a fit, a line each, with what the fit says and its error relative to the row."""
    for row, error in zip(fit.rows, fit.residuals, strict=True):
        yield {
            "device": fit.device, "runtime": fit.runtime, "precision": fit.precision, "model": row.model,
            "height_px": row.height_px, "width_px": row.width_px, "latents": row.latents, "kind": row.kind,
            "seconds": row.seconds_median, "law_s": _rounded(row.seconds_median * exp(error)),
            "relative_error": round(float(np.expm1(error)), 4), "source": row.source,
        }  # fmt: skip
