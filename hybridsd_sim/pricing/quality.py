"""What a plan's pictures are worth: CLIP score, FID and LPIPS by switch step and parallel method.

A plan starts from its large model's own published score and loses what the study of its model pair lost at that switch
step (`losses`), plus what the study of its parallel method lost in that configuration (`method_losses`): losses add up,
which is conservative and labelled modelled. Whatever no study covers is None with a reason, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridsd_sim.estimate import Kind
from hybridsd_sim.plan import Plan, Stage
from hybridsd_sim.pricing.quality_losses import (
    DECIMALS,
    MEASURE_NAMES,
    NO_LOSS,
    Loss,
    Measure,
    alone,
    method_loss,
    study,
    switch_curve,
    switch_loss,
)
from hybridsd_sim.profiles import Profiles, QualityRow

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


REPEATS: Mapping[str, float] = {"clip": 0.004, "fid": 1.0}
"""By how much printings of one model's score differ: SD 1.4's CLIP score is 0.2958, 0.2993 and 0.3015 in three tables,
its FID 12.22, 13.05 and 13.86 (Hybrid SD's repository, ObCLIP). No LPIPS was printed twice."""

MODELLED_WIDER = 2.0
"""By how much wider the interval of a score is that no table prints. Modelled."""


def score_interval(measure: str, value: float | None, kind: Kind) -> tuple[float, float] | None:
    """The 90% interval of a score (`clip`, `fid`); None where there is no score or nobody printed one twice."""
    if value is None or measure not in REPEATS:
        return None
    width = REPEATS[measure] * (MODELLED_WIDER if kind == "modelled" else 1.0)
    return max(0.0, value - width), value + width


@dataclass(frozen=True, slots=True)
class Score:
    """A score with its kind, its sources, and why it is None if it is."""

    value: float | None
    kind: Kind
    sources: tuple[str, ...] = ()
    note: str = ""


UNKNOWN = Score(None, "modelled", (), "not asked for")


@dataclass(frozen=True, slots=True)
class Quality:
    """A plan's CLIP score in 0..1 (higher is better), with its kind, its sources, and why it is None if it is.

    `fid_score` is the Frechet inception distance to real pictures (lower is better). `lpips_score` is the distance in
    0..1 to the pictures that the large model alone would draw on one GPU; it is unknown for hand-overs.
    """

    clip: float | None
    kind: Kind
    sources: tuple[str, ...]
    note: str = ""
    fid_score: Score = UNKNOWN
    lpips_score: Score = UNKNOWN

    @property
    def fid(self) -> float | None:
        """The FID, lower is better; None where nobody knows."""
        return self.fid_score.value

    @property
    def lpips(self) -> float | None:
        """The LPIPS to one GPU's pictures, lower is better; None where nobody knows."""
        return self.lpips_score.value


def quality_of(
    plan: Plan,
    profiles: Profiles,
    *,
    wanted: str | None = None,
    guided: bool = True,
    size: tuple[int, int] | None = None,
    sampler: str | None = None,
) -> Quality:
    """The scores of a plan's pictures; each is None with a reason where no published table reaches.

    `wanted` is the model the user asked for. A small model that does every step is then the pair's switch step 0, so
    that one study's scores are compared; without such a study its own published score counts. All scores were published
    with guidance, so that pictures without it (`guided` False) have none. At another `size` (height, width in px) than
    the model's native one, or with another `sampler` than a study's (None: the study's own), scores are kept and marked
    as modelled.
    """
    key = (*(_drawn_by(stage) for stage in plan.stages), plan.vae, wanted, guided, size, sampler)
    return profiles.memory.recall(
        "quality", key, lambda: _quality(plan, profiles, wanted=wanted, guided=guided, size=size, sampler=sampler)
    )


def _drawn_by(stage: Stage) -> tuple[object, ...]:
    """What of a stage shapes the picture: not its pool."""
    steps = (stage.model, stage.start, stage.stop)
    return (*steps, stage.method, stage.degree, stage.options) if stage.site.tier == "cloud" else steps


def _quality(
    plan: Plan,
    profiles: Profiles,
    *,
    wanted: str | None,
    guided: bool,
    size: tuple[int, int] | None,
    sampler: str | None,
) -> Quality:
    if not guided:
        unknown = Score(None, "modelled", (), "scores were published with guidance only")
        return Quality(unknown.value, unknown.kind, unknown.sources, unknown.note, unknown, unknown)
    large = plan.stages[0].model
    if wanted is not None and switch_curve(profiles, wanted, large):
        large = wanted
    clip, fid, lpips = (
        _score([_base(profiles, large, measure), *_losses(plan, profiles, large, size, measure)], measure, sampler)
        for measure in MEASURE_NAMES
    )
    return Quality(clip.value, clip.kind, clip.sources, clip.note, fid, lpips)


def _losses(plan: Plan, profiles: Profiles, large: str, size: tuple[int, int] | None, measure: Measure) -> list[Loss]:
    steps = plan.num_inference_steps
    return [
        _switch_loss(plan, profiles, large, measure),
        _step_loss(steps, profiles, large, measure),
        _size_loss(profiles, large, size),
        _vae_loss(plan, measure),
        *(method_loss(stage, steps, profiles, measure) for stage in plan.cloud_stages),
    ]


def _score(parts: Sequence[Loss], measure: Measure, sampler: str | None) -> Score:
    """The first part is the base, the others are what it loses; one that is unknown makes the score so."""
    base, *losses = parts
    missing = [part.note for part in parts if part.value is None]
    sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
    if missing:
        return Score(None, "modelled", sources, "; ".join(dict.fromkeys(missing)))
    lost = sum(loss.value or 0.0 for loss in losses)
    value = round((base.value or 0.0) + (-lost if measure == "clip" else lost), DECIMALS)
    notes = [*(part.note for part in parts if part.note), *_other_samplers(parts, sampler)]
    several = sum(bool(loss.value) for loss in losses) > 1
    modelled = several or bool(notes) or any(part.kind == "modelled" for part in parts)
    return Score(value, "modelled" if modelled else "quoted", sources, "; ".join(dict.fromkeys(notes)))


def _other_samplers(parts: Iterable[Loss], sampler: str | None) -> list[str]:
    """Which samplers were published, where the request's is another one."""
    tables = dict.fromkeys(table for part in parts for table in part.tables)
    known = (SAMPLERS.get(table) or SAMPLERS.get(study(table), ()) for table in tables)
    others = dict.fromkeys(names[-1] for names in known if names and sampler not in (None, *names))
    return [f"published with {' and '.join(others)}, not {sampler}"] if others else []


def _own(profiles: Profiles, model: str, measure: Measure) -> tuple[QualityRow, float] | None:
    """The first row that scores a model, with its score; one with a CLIP score goes before others."""
    found = profiles.memory.recall(
        "scores", (model, measure), lambda: tuple(alone(profiles.quality, model, measure)), most=1024
    )
    return min(found, key=lambda one: one[0].clip is None, default=None)


def _base(profiles: Profiles, model: str, measure: Measure) -> Loss:
    """The model's own score; its distance from its own pictures is 0."""
    if measure == "lpips":
        return NO_LOSS
    if not (own := _own(profiles, model, measure)):
        return Loss(None, note=f"no published {MEASURE_NAMES[measure]} for {model}")
    row, score = own
    return Loss(score, "quoted", (row.source,), tables=(row.table,))


def _switch_loss(plan: Plan, profiles: Profiles, large: str, measure: Measure) -> Loss:
    models = tuple(dict.fromkeys((large, *(stage.model for stage in plan.stages))))
    if len(models) == 1:
        return NO_LOSS
    if len(models) > 2:
        return Loss(None, note=f"no table covers the chain {' -> '.join(models)}")
    boundary = next(stage.start for stage in plan.stages if stage.model == models[1])
    return switch_loss(profiles, large, models[1], boundary / plan.num_inference_steps, measure)


def _step_loss(steps: int, profiles: Profiles, large: str, measure: Measure) -> Loss:
    """What another number of steps than the published one costs: nothing from `FEWEST_STEPS` on, unknown below."""
    own = _own(profiles, large, measure)
    if not own or own[0].num_inference_steps == steps:
        return NO_LOSS
    note = f"{large}'s score was published at {own[0].num_inference_steps} steps"
    return Loss(0.0 if steps >= FEWEST_STEPS else None, note=note)


def _size_loss(profiles: Profiles, large: str, size: tuple[int, int] | None) -> Loss:
    """No study tells what another size costs: the score is kept, and marked."""
    native = profiles.model(large).native_px
    if size is None or size == (native, native):
        return NO_LOSS
    return Loss(0.0, note=f"{large}'s score was published at {native} px")


def _vae_loss(plan: Plan, measure: Measure) -> Loss:
    if plan.vae == "autoencoder-kl":
        return NO_LOSS
    if measure == "lpips":
        return Loss(None, note=f"{plan.vae}: its LPIPS was not published")
    note = f"{plan.vae}: its CLIP score was not published; its FID was no worse (15.79 against 16.19)"
    return Loss(0.0, "modelled", ("Hybrid SD table H2",), note)
