"""Device fits: how fast a device computes, from its own one-GPU rows, in six parameters, and how sure they are.

A (device, runtime, precision) has a `Fit`: the six parameters of the roofline that agree best with the device's
one-GPU step rows and with the population of devices under that runtime, each weighed by how sure it is (maximum a
posteriori, least squares in logarithms). Where rows are few the population decides what they leave open; a device
without rows under a runtime has the population's parameters, shifted half of the way by which it differs under the
runtimes it was timed in, and wider intervals; one that nobody timed has those of its datasheet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, hypot, inf, log, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybridsd_sim.errors import MissingDataError, Problem
from hybridsd_sim.estimate import Z90, Estimate, Kind
from hybridsd_sim.perf.roofline import (
    ELEMENT_BYTES,
    NO_LIMIT,
    PARAMETERS,
    Batch,
    Floats,
    Kernels,
    layer_table,
    plain_kernels,
)
from hybridsd_sim.profiles import EFFICIENCIES, CostRow, Gpu, Profiles, alike, derived

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult


DOMAIN_FACTOR = 2.0
"""A round of FLOPs lies inside what was timed up to this factor beyond the smallest and the largest timed one."""

ROW_SPREAD: Mapping[Kind, float] = {"measured": 0.02, "quoted": 0.02, "modelled": 0.05}
"""Standard deviation of a row's logarithm among those of its source, by kind, before the residuals narrow or widen it:
repetition, and what a row derived by a rule has left out."""

SOURCE_SPREAD = 0.07
"""The same between sources that timed one device under one runtime: versions, hosts, cooling. At least this: with each
source of the quoted rows left out in turn, 85 to 90% of it lies inside the intervals."""

PRIOR_ROWS = 4.0
"""How many rows `ROW_SPREAD` weighs against the residuals of the device's own."""

START_SPREAD: Mapping[str, float] = {
    "linear_efficiency": 0.35, "conv_share": 0.2, "attention_share": 0.25, "memory_efficiency": 0.15,
    "seconds_per_op": 0.6, "launch_s_per_op": 0.35,
}  # fmt: skip

START_MEAN: Mapping[str, float] = {"conv_share": 0.85, "attention_share": 0.75, "memory_efficiency": 0.8}
"""Prior means for a runtime without rows; the other means are the catalogue's (`runtimes`)."""

OTHER_PRECISION_SPREAD = 0.4
"""Added spread of the rate where a runtime was only timed in another precision. Modelled."""

SHIFT = 0.5
"""How much of a device's difference under other runtimes is taken to hold under this one. Modelled."""

FP16_SUMS = 2.0
"""GeForce cards multiply in fp16 twice as fast with fp16 sums as the datasheet says for fp32 ones, and libraries use
that: OneDiff's rows lie beyond the datasheet's figure. Their efficiencies are shares of the faster one."""

EIGHT_BITS = 2.0
"""By how much a tensor core's rate in 8 bits exceeds that in 16."""

LEAST_S = 1e-9
"""Seconds an operation where a runtime puts no cost on one; logarithms need more than 0."""

UNKNOWN_PEAK_SPREAD = 1.0

COMPONENT_SPREAD = 0.5
"""Standard deviation of a component's logarithm around the fit of UNet steps before any component row is seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """Means and standard deviations of the logarithms of a device's parameters; no rate goes beyond `highest_rate`."""

    mean: Floats
    spread: Floats
    highest_rate: float = inf


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The device fit of a (device, runtime, precision), as far as its rows tell.

    `log_parameters` are the natural logarithms of `PARAMETERS`, `covariance` theirs. `sigma` is the standard deviation
    of a timed step's logarithm around the fit. `residuals` are log(fitted / timed) for each of `rows`; without rows
    `origin` says what the fit rests on instead. `flops` are those of each row's call.
    """

    device: str
    runtime: str
    precision: str
    log_parameters: Floats
    covariance: Floats
    sigma: float
    rows: tuple[CostRow, ...] = ()
    residuals: tuple[float, ...] = ()
    flops: tuple[float, ...] = ()
    origin: str = ""
    sources: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, Estimate]:
        """Each parameter, by its name in `PARAMETERS`, with its 90% interval."""
        widths = Z90 * np.sqrt(np.diag(self.covariance))
        return {
            name: Estimate(exp(value), exp(value - width), exp(value + width), "modelled", self.sources, self.note)
            for name, value, width in zip(PARAMETERS, self.log_parameters, widths, strict=True)
        }

    @property
    def note(self) -> str:
        """One sentence on what the fit rests on."""
        where = f"{self.device} under {self.runtime} in {self.precision}"
        if not self.rows:
            return f"{where} was never timed: {self.origin}"
        error = float(np.mean(np.abs(np.expm1(self.residuals))))
        rows = f"{len(self.rows)} one-GPU row{'s' * (len(self.rows) > 1)}"
        return f"law fitted to {rows} of {where}, typical error {error:.1%}"

    def seconds(self, kernels: Kernels) -> float:
        """Seconds of one call."""
        return float(Batch([kernels]).seconds(self.log_parameters)[0])

    def log_spread(self, kernels: Kernels) -> float:
        """Standard deviation of the logarithm of a timed call around `seconds`."""
        gradient = Batch([kernels]).gradient(self.log_parameters)[0]
        return sqrt(float(gradient @ self.covariance @ gradient) + self.sigma**2)

    def holds(self, flop: float) -> bool:
        """Whether this many FLOPs a call lie inside what was timed, give or take `DOMAIN_FACTOR`."""
        if not self.flops:
            return False
        return min(self.flops) / DOMAIN_FACTOR <= flop <= max(self.flops) * DOMAIN_FACTOR


def calls(profiles: Profiles, runtime: str, latents: float) -> int:
    """UNet calls of one evaluation: a fixed-batch runtime evaluates guided latents one after the other."""
    limit = profiles.runtime(runtime).max_unet_batch
    return -(-int(latents) // limit) if limit else 1


def latents_per_call(profiles: Profiles, row: CostRow) -> float:
    """Latents that each UNet call of a step row holds; `calls` of them make the row's evaluation."""
    return row.latents / calls(profiles, row.runtime, row.latents)


@derived(
    key=lambda profiles, row: (
        *(row.model, row.height_px, row.width_px, row.precision),
        latents_per_call(profiles, row),
    ),
    most=512,
)
def call_kernels(profiles: Profiles, row: CostRow) -> Kernels:
    """What one UNet call of a step row executes."""
    model = profiles.model(row.model)
    return layer_table(model.config, row.height_px, row.width_px, model.ops).kernels(
        latents_per_call(profiles, row),
        weight_bytes=ELEMENT_BYTES.get(row.precision, 2.0),
        element_bytes=4.0 if row.precision == "fp32" else 2.0,
    )


def fitted_step_time(row: CostRow, profiles: Profiles) -> Estimate:
    """Seconds that the device fit gives the step of a one-GPU row, at 90%, whatever the row itself says."""
    fit, kernels = fit_of(profiles, row.device, row.runtime, row.precision), call_kernels(profiles, row)
    middle = fit.seconds(kernels) * calls(profiles, row.runtime, row.latents)
    return Estimate.by_factor(middle, exp(Z90 * fit.log_spread(kernels)), "modelled", fit.sources, fit.note)


@derived()
def component_time(
    profiles: Profiles,
    device: str,
    runtime: str,
    precision: str,
    name: str,
    size: tuple[int, int],
    prefer: tuple[str, ...] = (),
) -> Estimate:
    """Seconds of one prompt, or of one image of this `size` (height and width in px), on a device, at 90%.

    `name` is that of a text encoder or VAE decoder. Its own row serves where there is one, else the device fit.
    `prefer` names sources of rows to take before all others. Raises `MissingDataError` where neither exists.
    """
    row = profiles.component_row(device, runtime, profiles.component(name), size, prefer=prefer)
    return row.seconds if row else fitted_component_time(profiles, device, runtime, precision, name, size)


def fitted_component_time(
    profiles: Profiles, device: str, runtime: str, precision: str, name: str, size: tuple[int, int]
) -> Estimate:
    """Seconds of one prompt or image under the device's fit of UNet steps, at 90%, whatever rows of its own say.

    Encoders and decoders run slower than their FLOPs say (small prompts, float32 decoders), by a ratio that all timed
    devices share (`<component>_ratio` of the fitted constants).
    """
    component, (height_px, width_px) = profiles.component(name), size
    fit, area = fit_of(profiles, device, runtime, precision), component.area(height_px, width_px)
    conv, linear = component.flop_conv_512 * area, component.flop_linear_512 * area
    kernels = plain_kernels(conv, linear, component.flop_attention_512 * area**2, component.ops)
    ratio = profiles.constants.get(f"{component.component}_ratio")
    value, spread = (ratio.value, ratio.spread) if ratio else (1.0, COMPONENT_SPREAD)
    factor = exp(Z90 * sqrt(fit.log_spread(kernels) ** 2 + spread**2))
    note = f"{name} from the law of UNet steps: {fit.note}"
    return Estimate.by_factor(fit.seconds(kernels) * value, factor, "modelled", fit.sources, note)


@lru_cache(maxsize=512)
def fit_of(profiles: Profiles, device: str, runtime: str, precision: str) -> Fit:
    """The fit of a device under a runtime in a precision.

    Raises `MissingDataError` when neither rows of the device nor a datasheet peak exist.
    """
    where = (profiles, device, runtime, alike(precision))
    return _own_fit(*where) or _fit_without_rows(*where)


@lru_cache(maxsize=512)
def _own_fit(profiles: Profiles, device: str, runtime: str, precision: str) -> Fit | None:
    rows = tuple(
        row
        for row in profiles.cost_rows(device=device, runtime=runtime, method="single", degree=1)
        if alike(row.precision) == precision and row.rank is None
    )
    if not rows:
        return None
    kernels = [call_kernels(profiles, row) for row in rows]
    seconds = [row.seconds_median / calls(profiles, runtime, row.latents) for row in rows]
    shares = population(profiles, runtime, precision)
    rates = [item.flops / time for item, time in zip(kernels, seconds, strict=True)]
    prior = _absolute(profiles, device, precision, shares, float(np.median(rates)))
    sources = tuple(dict.fromkeys(row.source for row in rows))
    groups = np.array([sources.index(row.source) for row in rows])
    spreads = [ROW_SPREAD[row.kind] for row in rows]
    log_parameters, covariance, residuals, sigma = maximum_a_posteriori(kernels, seconds, spreads, groups, prior)
    return Fit(
        device=device,
        runtime=runtime,
        precision=precision,
        log_parameters=log_parameters,
        covariance=covariance,
        sigma=sigma,
        rows=rows,
        residuals=tuple(residuals.tolist()),
        flops=tuple(item.flops for item in kernels),
        sources=sources,
    )


def maximum_a_posteriori(
    kernels: Sequence[Kernels],
    seconds: Sequence[float],
    spreads: Sequence[float],
    groups: NDArray[np.int_],
    prior: Prior,
) -> tuple[Floats, Floats, Floats, float]:
    """The fit nearest to both rows and prior: its logarithms, their covariance, residuals log(fit / row), and sigma.

    Rows of one of the `groups` (0, 1, ...) share an offset, which is what sources disagree by; sources that disagree by
    more than `SOURCE_SPREAD` widen it. `spreads` are the rows' standard deviations; by how much the residuals say that
    these are too small or too large widens or narrows the covariance. Sigma is the standard deviation of a timed step's
    logarithm around the fit.
    """
    between = SOURCE_SPREAD
    found = _solve(kernels, seconds, spreads, groups, prior, between)
    offsets = between * found.x[len(prior.mean) :]
    variance = PRIOR_ROWS * SOURCE_SPREAD**2 + float(offsets @ offsets)
    wider = sqrt(variance / (PRIOR_ROWS + len(offsets)))
    if wider > between:  # sources that contradict each other are worth less
        between = wider
        found = _solve(kernels, seconds, spreads, groups, prior, between)
    size, count = len(prior.mean), len(seconds)
    scale = sqrt((PRIOR_ROWS + float(np.sum(found.fun[:count] ** 2))) / (PRIOR_ROWS + count))
    rows = np.asarray(found.jac)[:count] / scale
    inverse = np.linalg.inv(rows.T @ rows + np.eye(len(found.x)))[:size, :size]
    log_parameters = prior.mean + prior.spread * found.x[:size]
    residuals: Floats = np.log(Batch(kernels).seconds(log_parameters)) - np.log(seconds)
    return (
        log_parameters,
        inverse * np.outer(prior.spread, prior.spread),
        residuals,
        hypot(between, ROW_SPREAD["quoted"] * scale),
    )


def _solve(
    kernels: Sequence[Kernels],
    seconds: Sequence[float],
    spreads: Sequence[float],
    groups: NDArray[np.int_],
    prior: Prior,
    between: float,
) -> OptimizeResult:
    """Least squares over the parameters and the offsets of the sources, both in standard deviations of their prior."""
    from scipy.optimize import least_squares

    batch, observed, widths, size = Batch(kernels), np.log(seconds), np.asarray(spreads), len(prior.mean)

    def misfits(z: Floats) -> Floats:
        errors: Floats = np.log(batch.seconds(prior.mean + prior.spread * z[:size])) - observed
        return np.concatenate([(errors + between * z[size:][groups]) / widths, z])

    start = np.zeros(size + int(groups.max()) + 1)
    highest = np.full_like(start, inf)
    highest[0] = max(0.01, (log(prior.highest_rate) - prior.mean[0]) / prior.spread[0])
    return least_squares(misfits, start, bounds=(-inf, highest))


def starting_prior(profiles: Profiles, runtime: str, precision: str) -> Prior:
    """The prior for devices under a runtime that no row timed, in the terms of `EFFICIENCIES`."""
    known = profiles.runtime(runtime)
    slower = 2.0 / max(2.0, ELEMENT_BYTES.get(precision, 2.0))
    means = {
        **START_MEAN,
        "linear_efficiency": max(known.efficiency, 0.01) * slower,
        "seconds_per_op": max(known.seconds_per_op, LEAST_S),
        "launch_s_per_op": max(known.launch_s_per_op, LEAST_S),
    }
    return _prior(means, START_SPREAD)


def _prior(means: Mapping[str, float], spreads: Mapping[str, float]) -> Prior:
    return Prior(np.log([means[name] for name in EFFICIENCIES]), np.array([spreads[name] for name in EFFICIENCIES]))


def population(profiles: Profiles, runtime: str, precision: str) -> Prior:
    """What devices under a runtime have in common, in the terms of `EFFICIENCIES`, before one's own rows are seen.

    Where the runtime was never timed in the precision, that of its other precision with another rate, less surely.
    """
    for timed in (precision, "fp16"):
        rows = [row for row in profiles.populations if (row.runtime, row.precision) == (runtime, timed)]
        if rows:
            prior = _prior({row.parameter: row.mean for row in rows}, {row.parameter: row.spread for row in rows})
            if timed == precision:
                return prior
            mean, spread = prior.mean.copy(), prior.spread.copy()
            mean[0] -= log(max(2.0, ELEMENT_BYTES.get(precision, 2.0)) / 2.0)
            spread[0] = sqrt(spread[0] ** 2 + OTHER_PRECISION_SPREAD**2)
            return Prior(mean, spread)
    return starting_prior(profiles, runtime, precision)


def _absolute(profiles: Profiles, device: str, precision: str, shares: Prior, rate: float | None) -> Prior:
    """The prior of a device's fit: the population's shares of its datasheet, or of the `rate` its rows imply."""
    mean, spread = shares.mean.copy(), shares.spread.copy()
    ceiling, peak = inf, peak_flop_per_s(profiles, device)
    if peak is not None:
        mean[0] += log(peak)
        ceiling = peak * (EIGHT_BITS if ELEMENT_BYTES.get(precision, 2.0) < 2.0 else 1.0)
    elif rate is not None:
        mean[0], spread[0] = log(rate), UNKNOWN_PEAK_SPREAD
    else:
        known = sorted({row.device for row in profiles.cost_rows(component="step")})
        rule = "no timed step and no datasheet peak, so its speed is unknown"
        raise MissingDataError(Problem("device", device, rule, f"Timed devices: {', '.join(known)}."))
    bandwidth = memory_bytes_per_s(profiles, device)
    mean[3] = mean[3] + log(bandwidth) if bandwidth else log(NO_LIMIT)
    return Prior(mean, spread, ceiling)


def peak_flop_per_s(profiles: Profiles, device: str) -> float | None:
    """The fp16 rate of which a device's efficiency is a share; None where no datasheet gives one."""
    peak = profiles.peak_flop_per_s(device)
    return peak and peak * (FP16_SUMS if "GeForce" in profiles.device(device).label else 1.0)


def memory_bytes_per_s(profiles: Profiles, device: str) -> float | None:
    """What the memory does at best: a GPU's datasheet, else the fastest copy measured; None where neither is known."""
    known = profiles.device(device)
    if isinstance(known, Gpu) and known.memory_bandwidth_bytes_per_s:
        return known.memory_bandwidth_bytes_per_s
    copies = [meta.ceilings.get("copy_bytes_per_s") for meta in profiles.metas.values() if meta.device == device]
    return max((copy for copy in copies if copy), default=None)


def _fit_without_rows(profiles: Profiles, device: str, runtime: str, precision: str) -> Fit:
    """The fit under a runtime in which the device was never timed, from the population and its other runtimes."""
    pairs = {(row.runtime, alike(row.precision)) for row in profiles.cost_rows(device=device, degree=1)}
    own_fits = [_own_fit(profiles, device, *pair) for pair in sorted(pairs - {(runtime, precision)})]
    found = [fit for fit in own_fits if fit is not None]
    # in other precisions of this runtime where there are any, else under other runtimes
    others = [fit for fit in found if fit.runtime == runtime] or found
    shares = population(profiles, runtime, precision)
    rates = [
        fit.log_parameters[0] - population(profiles, fit.runtime, fit.precision).mean[0] + shares.mean[0]
        for fit in others
    ]
    prior = _absolute(profiles, device, precision, shares, exp(float(np.median(rates))) if rates else None)
    mean, spread = prior.mean.copy(), prior.spread.copy()
    if others and peak_flop_per_s(profiles, device) is not None:
        gaps = []  # of the device's rate from that of each population, in logarithms
        for fit in others:
            expected = _absolute(
                profiles, device, fit.precision, population(profiles, fit.runtime, fit.precision), None
            )
            gaps.append(float(fit.log_parameters[0] - expected.mean[0]))
        mean[0] += SHIFT * float(np.mean(gaps))
        spread[0] = sqrt(spread[0] ** 2 * (1.0 - SHIFT**2) + float(np.var(gaps)) / len(gaps))
    seen = [f"{len(fit.rows)} of its rows under {fit.runtime} in {fit.precision}" for fit in others]
    origin = f"its datasheet and other devices under {runtime}" + (f", with {'; '.join(seen)}" if seen else "")
    own = tuple(dict.fromkeys(source for fit in others for source in fit.sources))
    return Fit(
        device=device,
        runtime=runtime,
        precision=precision,
        log_parameters=mean,
        covariance=np.diag(spread**2),
        sigma=SOURCE_SPREAD,
        origin=origin,
        sources=own or (profiles.device(device).source,),
    )
