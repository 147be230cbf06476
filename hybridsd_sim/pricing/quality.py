"""What a plan's pictures are worth: CLIP score, FID and LPIPS by switch step and parallel method.

A plan starts from its large model's own published score and loses what the study of its model pair lost at that switch
step (`switch_loss`), plus what the study of its parallel method lost in that configuration (`method_loss`): losses add
up, which is conservative and labelled modelled. Whatever no study covers is unknown with a reason, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hybridsd_sim.estimate import Estimate, merged
from hybridsd_sim.plan import Plan, Stage
from hybridsd_sim.pricing.quality_losses import (
    DECIMALS,
    MEASURE_NAMES,
    NO_LOSS,
    Measure,
    TableValue,
    method_loss,
    solo_scores,
    study,
    switch_curve,
    switch_loss,
)
from hybridsd_sim.profiles import Profiles, QualityRow, derived

FEWEST_STEPS = 20
"""From here on a score hardly depends on the number of steps: SD 2.1 with DDIM has 31.60 at 50 steps, 31.53 at 27 and
31.46 at 21, but 30.99 at 11 (AsyncDiff, arXiv 2406.06911, tables 6 and 7)."""

DPM_SOLVER = ("dpmsolver", "dpmsolver++")

SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "hybrid-sd": DPM_SOLVER,
    "hybrid-sd H2": ("lcm",),
    "obclip": DPM_SOLVER,
    "asyncdiff": ("ddim",),
    "asyncdiff A6": DPM_SOLVER,
    "distrifusion": ("ddim",),
}
"""The sampler that a table, or else its study, names; "DPM-Solver" is either of diffusers' multistep solvers."""

REPEATS: Mapping[Measure, float] = {"clip": 0.004, "fid": 1.0}
"""By how much printings of one model's score differ: SD 1.4's CLIP score is 0.2958, 0.2993 and 0.3015 in three tables,
its FID 12.22, 13.05 and 13.86 (Hybrid SD's repository, ObCLIP). No LPIPS was printed twice."""

MODELLED_WIDER = 2.0
"""By how much wider the interval of a score is that no table prints. Modelled."""

UNASKED = Estimate.unknown("not asked for")


@dataclass(frozen=True, slots=True)
class Quality:
    """The scores of a plan's pictures, each with its 90% interval where somebody printed such a score twice.

    `clip` is the CLIP score in 0..1, higher is better. `fid` is the Frechet inception distance to real pictures, lower
    is better. `lpips` is the distance in 0..1 to the pictures that the large model alone would draw on one GPU; it is
    unknown at switch steps.
    """

    clip: Estimate
    fid: Estimate = UNASKED
    lpips: Estimate = UNASKED


def with_interval(score: Estimate, measure: Measure) -> Estimate:
    """A score with its 90% interval: as far as printings of one score differ, further where no table prints it.

    Without one where the score is unknown, or where nobody printed such a score twice.
    """
    if not score.known or measure not in REPEATS:
        return score
    width = REPEATS[measure] * (MODELLED_WIDER if score.kind == "modelled" else 1.0)
    return replace(score, low=max(0.0, score.value - width), high=score.value + width)


def _quality_key(
    plan: Plan,
    _: Profiles,
    *,
    wanted: str | None = None,
    guided: bool = True,
    size: tuple[int, int] | None = None,
    sampler: str | None = None,
) -> tuple[object, ...]:
    return *(_drawn_by(stage) for stage in plan.stages), plan.vae, wanted, guided, size, sampler


@derived(key=_quality_key)
def quality_of(
    plan: Plan,
    profiles: Profiles,
    *,
    wanted: str | None = None,
    guided: bool = True,
    size: tuple[int, int] | None = None,
    sampler: str | None = None,
) -> Quality:
    """The scores of a plan's pictures; each is unknown, with a reason, where no published table reaches.

    `wanted` is the model the user asked for. A small model that does every step is then the pair's switch step 0, so
    that one study's scores are compared; without such a study its own published score counts. All scores were published
    with guidance, so that pictures without it (`guided` False) have none. At another `size` (height, width in px) than
    the model's native one, or with another `sampler` than a study's (None: the study's own), scores are kept and marked
    as modelled.
    """
    if not guided:
        unknown = Estimate.unknown("scores were published with guidance only")
        return Quality(unknown, unknown, unknown)
    large = plan.stages[0].model
    if wanted is not None and switch_curve(profiles, wanted, large):
        large = wanted
    return Quality(
        **{
            measure: _score(list(_values(plan, profiles, large, size, measure)), measure, sampler)
            for measure in MEASURE_NAMES
        }
    )


def _drawn_by(stage: Stage) -> tuple[object, ...]:
    """What of a stage shapes the picture: not its pool."""
    steps = (stage.model, stage.start, stage.stop)
    return (*steps, stage.method, stage.degree, stage.options) if stage.site.tier == "cloud" else steps


def _values(
    plan: Plan, profiles: Profiles, large: str, size: tuple[int, int] | None, measure: Measure
) -> Iterator[TableValue]:
    """The large model's own score, then all that the plan loses of it."""
    steps, native = plan.num_inference_steps, profiles.model(large).native_px
    own = _own_score(profiles, large, measure)
    if measure == "lpips":  # the distance of its pictures from themselves
        yield NO_LOSS
    elif own:
        row, score = own
        yield TableValue(Estimate(score, kind="quoted", sources=(row.source,)), (row.table,))
    else:
        yield TableValue.unknown(f"no published {MEASURE_NAMES[measure]} for {large}")
    yield _model_loss(plan, profiles, large, measure)
    if own and own[0].num_inference_steps != steps:
        note = f"{large}'s score was published at {own[0].num_inference_steps} steps"
        yield TableValue(Estimate(0.0, note=note)) if steps >= FEWEST_STEPS else TableValue.unknown(note)
    if size not in (None, (native, native)):  # no study tells what another size costs
        yield TableValue(Estimate(0.0, note=f"{large}'s score was published at {native} px"))
    yield _vae_loss(plan, measure)
    for stage in plan.cloud_stages:
        yield method_loss(stage, steps, profiles, measure)


@derived(most=1024)
def _own_score(profiles: Profiles, model: str, measure: Measure) -> tuple[QualityRow, float] | None:
    """The first row that scores a model, with its score; one with a CLIP score goes before others."""
    return min(solo_scores(profiles.quality, model, measure), key=lambda one: one[0].clip is None, default=None)


def _model_loss(plan: Plan, profiles: Profiles, large: str, measure: Measure) -> TableValue:
    """What the small model's steps lose; unknown for more than two models."""
    models = tuple(dict.fromkeys((large, *(stage.model for stage in plan.stages))))
    if len(models) == 1:
        return NO_LOSS
    if len(models) > 2:
        return TableValue.unknown(f"no table covers the chain {' -> '.join(models)}")
    boundary = next(stage.start for stage in plan.stages if stage.model == models[1])
    return switch_loss(profiles, large, models[1], boundary / plan.num_inference_steps, measure)


def _vae_loss(plan: Plan, measure: Measure) -> TableValue:
    if plan.vae == "autoencoder-kl":
        return NO_LOSS
    if measure == "lpips":
        return TableValue.unknown(f"{plan.vae}: its LPIPS was not published")
    note = f"{plan.vae}: its CLIP score was not published; its FID was no worse (15.79 against 16.19)"
    return TableValue(Estimate(0.0, sources=("Hybrid SD table H2",), note=note))


def _score(values: Sequence[TableValue], measure: Measure, sampler: str | None) -> Estimate:
    """The first value less the others, which it loses; one that is unknown makes the score so."""
    base, *losses = (value.estimate for value in values)
    sources = merged(base.sources, *(loss.sources for loss in losses))
    if missing := [figure.note for figure in (base, *losses) if not figure.known]:
        return Estimate.unknown("; ".join(dict.fromkeys(missing)), sources=sources)
    lost = sum(loss.value for loss in losses)
    notes = [*(figure.note for figure in (base, *losses) if figure.note), *_other_samplers(values, sampler)]
    several = sum(loss.value != 0.0 for loss in losses) > 1
    modelled = several or bool(notes) or any(figure.kind == "modelled" for figure in (base, *losses))
    score = Estimate(
        round(base.value + (-lost if measure == "clip" else lost), DECIMALS),
        kind="modelled" if modelled else "quoted",
        sources=sources,
        note="; ".join(dict.fromkeys(notes)),
    )
    return with_interval(score, measure)


def _other_samplers(values: Iterable[TableValue], sampler: str | None) -> list[str]:
    """Which samplers were published, where the request's is another one."""
    tables = merged(*(value.tables for value in values))
    known = (SAMPLERS.get(table) or SAMPLERS.get(study(table), ()) for table in tables)
    others = dict.fromkeys(names[-1] for names in known if names and sampler not in (None, *names))
    return [f"published with {' and '.join(others)}, not {sampler}"] if others else []
