"""What a plan's pictures are worth: CLIP score, FID and LPIPS by switch step and parallel method.

A plan starts from its large model's own published score and loses what the study of its model pair lost at that switch
step (`switch_loss`), plus what the study of its parallel method lost in that configuration (`method_loss`): losses add
up, which is conservative and labelled modelled. Whatever no study covers is unknown with a reason, never zero.

Losses are read off published tables. A loss is how much worse a score is than the large model's own in the same study:
CLIP lost, FID gained, LPIPS away from the pictures of one GPU. It is never negative, and unknown, with a reason, where
no study reaches. It is `quoted` where a published row has precisely these settings and says precisely this, else
`modelled`.

Switch steps. A later one never loses more: losses are made monotone by the largest one printed further along. Between
published ones the loss is linear. Against a monotone cubic (scipy's PCHIP), with each inner point of the published
curves left out in turn, the straight line misses by 5.7% of the full loss instead of 4.5%, but it makes the loss too
small at 26% of the points instead of 46%: most curves are convex, so that a chord lies above them, and a quality floor
is a promise. Sources: Hybrid SD (arXiv 2408.06646, repository tables), ObCLIP (arXiv 2510.04153).

Parallel methods. More GPUs never lose less: the largest loss printed for as many or fewer counts, and between printed
numbers of GPUs the next larger one. More synchronous steps never lose more: a loss is scaled by the share that was left
of it in the one configuration of its model that was published under several numbers of them (for AsyncDiff three
components at stride 2 under 1 to 11 of 50; FID, which that table leaves out, goes with CLIP). Beyond the last published
number the line leads to nothing lost at all steps; fewer than the first may lose more, and the note says so. At another
number of steps the nearest published one counts, and of synchronous steps the smaller of number and share. Sources:
AsyncDiff (arXiv 2406.06911, tables 1, 2, 6 and 7), DistriFusion (arXiv 2402.19481, table 1). AsyncDiff's table 3 is a
check, as it prints no warm-up and is not read: under 9 synchronous steps, which its row for four GPUs shares with table
2, CLIP comes out within 0.0003, LPIPS within 0.04, and FID 0.08 to 0.64 worse than printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from hybridsd_sim.estimate import Estimate, merged
from hybridsd_sim.perf import find_method
from hybridsd_sim.plan import Plan, Stage
from hybridsd_sim.profiles import Profiles, QualityRow, derived

Measure = Literal["clip", "fid", "lpips"]

Curve = Sequence[tuple[float, float]]

Points = list[tuple[float, float, str]]
"""Share of steps by the large model, loss, source."""

MEASURE_NAMES: Mapping[Measure, str] = {"clip": "CLIP score", "fid": "FID", "lpips": "LPIPS"}

DECIMALS = 6
"""Losses and scores are rounded to this many decimals, which no study prints."""

EXACT_METHODS = ("single", "cfg_parallel")
"""Methods that compute what one GPU computes, so that they lose nothing."""

DEFAULT_SYNC_MODE = "corrected_async_gn"

PUBLISHED_SYNC_MODES: Mapping[str, str] = {
    DEFAULT_SYNC_MODE: "",
    "sync_gn": "sync_gn counted as corrected_async_gn (LPIPS 0.207 against 0.211: DistriFusion, figure 9)",
}
"""GroupNorm modes whose loss is known, with what there is to say about them."""


@dataclass(frozen=True, slots=True)
class TableValue:
    """A score or a loss in the units of its measure, and the tables of `quality.csv` that it was read from.

    The estimate has no interval: tables print none.
    """

    estimate: Estimate
    tables: tuple[str, ...] = ()

    @classmethod
    def unknown(cls, note: str, sources: tuple[str, ...] = ()) -> TableValue:
        """What no table tells, and why."""
        return cls(Estimate.unknown(note, sources=sources))


NO_LOSS = TableValue(Estimate(0.0, kind="quoted"))


def study(table: str) -> str:
    """The study of a table: the first word of its name. Scores of different studies do not compare."""
    return table.split(maxsplit=1)[0]


def score_of(row: QualityRow, measure: Measure) -> float | None:
    """What a row prints of a measure."""
    return {"clip": row.clip, "fid": row.fid, "lpips": row.lpips}[measure]


def solo_scores(rows: Iterable[QualityRow], model: str, measure: Measure) -> list[tuple[QualityRow, float]]:
    """Rows, with their scores, of a model that does every step on one GPU; those of its siblings do not count."""
    scored = ((row, score_of(row, measure)) for row in rows if row.large_model == model)
    return [
        (row, score)
        for row, score in scored
        if score is not None and row.method in EXACT_METHODS and row.switch_step == row.num_inference_steps
    ]


def loss_of(row: QualityRow, rows: Iterable[QualityRow], measure: Measure) -> float | None:
    """How much worse a row is than its model alone at as many steps: of its own table, else of its study.

    Negative where the row is better. None where it does not print the measure or nothing compares. LPIPS is itself the
    distance to the pictures of the model alone.
    """
    score = score_of(row, measure)
    if score is None or measure == "lpips":
        return score
    bases = [
        (base.table != row.table, own)
        for base, own in solo_scores(rows, row.large_model, measure)
        if study(base.table) == study(row.table) and base.num_inference_steps == row.num_inference_steps
    ]
    return score_lost(score, min(bases, key=lambda base: base[0])[1], measure) if bases else None


def score_lost(score: float, base: float, measure: Measure) -> float:
    """By how much a score is worse than a base: CLIP falls, FID rises."""
    return round(base - score if measure == "clip" else score - base, DECIMALS)


def never_rising(points: Curve) -> list[tuple[float, float]]:
    """The lowest curve that never rises and lies nowhere below a point or below zero. Points stand in rising order."""
    losses = list(accumulate((loss for _, loss in reversed(points)), max, initial=0.0))[:0:-1]
    return [(at, loss) for (at, _), loss in zip(points, losses, strict=True)]


def interpolate(points: Curve, at: float) -> float | None:
    """The straight line between the two points around `at`; None outside them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


# ---- Switch steps ---------------------------------------------------------------------------------------------------


@derived()
def switch_loss(profiles: Profiles, large: str, small: str, share: float, measure: Measure) -> TableValue:
    """What handing over to the small model loses after the large one did this `share` of the steps, 0 to 1."""
    printed, table = _best_table(profiles, large, small, measure)
    if len(printed) < 2:
        return TableValue.unknown(f"no published quality for {large} followed by {small}")
    sources = merged(source for _, _, source in printed if source)
    value = interpolate(_falling(printed), share)
    if value is None:
        return TableValue.unknown(f"switch share {share:.2f} lies outside the published ones", sources)
    value = round(value, DECIMALS)
    if any(abs(at - share) < 1e-9 and abs(loss - value) < 1e-9 for at, loss, _ in printed):
        return TableValue(Estimate(value, kind="quoted", sources=sources), (table,))
    note = "interpolated between published switch steps"
    return TableValue(Estimate(value, kind="modelled", sources=sources, note=note), (table,))


def switch_curve(profiles: Profiles, large: str, small: str, measure: Measure = "clip") -> Points:
    """Points (share of steps by the large model, loss, source) of the table that covers this pair best, falling to 0.

    Best is the one printed to most decimals, then the one with most points. A table without its own score of the large
    model is completed from the other tables of its study. Share 1 loses nothing.
    """
    printed, _ = _best_table(profiles, large, small, measure)
    return [(*point, source) for point, (_, _, source) in zip(_falling(printed), printed, strict=True)]


def _falling(printed: Points) -> list[tuple[float, float]]:
    return never_rising([(share, loss) for share, loss, _ in printed])


@derived()
def _best_table(profiles: Profiles, large: str, small: str, measure: Measure) -> tuple[Points, str]:
    """What the best table prints of a pair, and the table's name; nothing where no table has it."""
    names = dict.fromkeys(row.table for row in profiles.quality if (row.large_model, row.small_model) == (large, small))
    printed = {name: _printed_points(profiles, name, large, small, measure) for name in names}
    decimals = dict.fromkeys(names, 0)
    for row in profiles.quality:
        if row.table in names and row.large_model == large and (score := score_of(row, measure)) is not None:
            decimals[row.table] = max(decimals[row.table], len(f"{score:g}".partition(".")[2]))
    best = max(names, key=lambda name: (decimals[name], len(printed[name])), default="")
    return printed.get(best, []), best


def _printed_points(profiles: Profiles, table: str, large: str, small: str, measure: Measure) -> Points:
    own = kin = [row for row in profiles.quality if row.table == table]
    if not solo_scores(own, large, measure):
        kin = [row for row in profiles.quality if study(row.table) == study(table)]
    bases = solo_scores(kin, large, measure)
    if not bases:
        return []
    points = {1.0: (0.0, "")}
    for row, alone_score in solo_scores(kin, small, measure)[:1]:
        points[0.0] = (score_lost(alone_score, bases[0][1], measure), row.source)
    for row in own:
        score = score_of(row, measure)
        if (row.large_model, row.small_model) == (large, small) and score is not None:
            share = (row.switch_step or 0) / row.num_inference_steps
            points[share] = (score_lost(score, bases[0][1], measure), row.source)
    return [(share, loss, source) for share, (loss, source) in sorted(points.items())]


@dataclass(frozen=True, slots=True)
class _Setting:
    """How a stage, or a published row, runs a method: `warmup` synchronous steps of a trajectory of `steps`."""

    degree: int
    stride: int
    warmup: int
    steps: int

    def __str__(self) -> str:
        return f"{self.degree} GPUs, {self.warmup} of {self.steps} steps synchronous"


@dataclass(frozen=True, slots=True)
class _Point:
    """A published run and its loss in one measure."""

    run: _Setting
    loss: float
    row: QualityRow


def method_loss(stage: Stage, steps: int, profiles: Profiles, measure: Measure) -> TableValue:
    """What the stage's parallel method loses in a trajectory of `steps` steps; unknown, with a reason, without a study.

    It is its own model's published loss, or the largest of the models that were published. A stage that does only some
    of the steps counts in full. Where every step computes what one GPU computes, nothing is lost.
    """
    warmup = stage.option("warmup_steps", _default_warmup(stage.method, stage.model, profiles))
    setting = _Setting(stage.degree, int(stage.option("stride", 1)), int(warmup), steps)
    if stage.method in EXACT_METHODS or stage.degree == 1 or setting.warmup >= stage.num_steps:
        return NO_LOSS
    stripes = stage.degree // 2 if stage.option("guidance_split", default=False) else stage.degree
    if stage.method != "asyncdiff" and (stripes == 1 or stage.option("sync_mode", "") == "full_sync"):
        return NO_LOSS
    return _published_loss(stage, setting, stripes, profiles, measure)


@derived(
    key=lambda stage, setting, *rest: (stage.model, stage.method, stage.degree, stage.options, setting.steps, rest[-1])
)
def _published_loss(stage: Stage, setting: _Setting, stripes: int, profiles: Profiles, measure: Measure) -> TableValue:
    """What tables say of a stage that is not exact, however many of the steps it does.

    `stripes` are those of one guidance branch.
    """
    sees_all = stripes == 2 and float(stage.option("partial", 0.0)) >= 1.0
    if stage.method == "pcpp" and not sees_all:
        return TableValue.unknown("pcpp: reviews call it worse than DistriFusion, but no score of it was published")
    if (mode := stage.option("sync_mode", DEFAULT_SYNC_MODE)) not in PUBLISHED_SYNC_MODES:
        return TableValue.unknown(f"{stage.method}: no score was published with sync_mode {mode}")
    method = "distrifusion" if stage.method == "pcpp" else stage.method
    if own := _of_model(setting, method, stage.model, profiles, measure):
        return _with_caveats(own, _caveats(stage))
    others = dict.fromkeys(row.large_model for row in profiles.quality if row.method == method)
    known = [loss for model in others if (loss := _of_model(setting, method, model, profiles, measure))]
    if not known:
        return TableValue.unknown(f"no published {MEASURE_NAMES[measure]} for {method} on {stage.degree} GPUs")
    worst = max(known, key=lambda loss: loss.estimate.value)
    return _with_caveats(worst, [f"{method} loss taken from other models' table, the largest", *_caveats(stage)])


def _default_warmup(method: str, model: str, profiles: Profiles) -> int:
    """Synchronous steps where nobody says: the method's default, which for AsyncDiff is larger on SDXL."""
    if method == "asyncdiff" and profiles.model(model).latent_space == "sdxl":
        return 3
    return int(find_method(method).defaults.get("warmup_steps", 0))


def _caveats(stage: Stage) -> list[str]:
    """How a stage differs from the published runs of its method, if it does."""
    differences = [PUBLISHED_SYNC_MODES[stage.option("sync_mode", DEFAULT_SYNC_MODE)]]
    if stage.method == "pcpp":
        differences.append("pcpp that sees the whole image on two stripes counted as distrifusion")
    if stage.option("guidance_split", default=False):
        differences.append("guidance split counted as no better than as many GPUs without it")
    if not stage.option("public_cut", default=True):
        differences.append("published with another cut of the UNet")
    return [text for text in differences if text]


def _with_caveats(loss: TableValue, caveats: Sequence[str]) -> TableValue:
    if not caveats:
        return loss
    note = "; ".join(filter(None, [*caveats, loss.estimate.note]))
    return replace(loss, estimate=replace(loss.estimate, kind="modelled", note=note))


# ---- Parallel methods: the tables -----------------------------------------------------------------------------------


def _of_model(run: _Setting, method: str, model: str, profiles: Profiles, measure: Measure) -> TableValue | None:
    """The loss of a setting by one model's rows; None where they reach no number of GPUs as large at this stride."""
    points = _points(method, model, profiles, measure)
    same = [point for point in points if point.run.stride == run.stride]
    anchor = _largest(same, run)
    if anchor is None:
        return None
    # Of a number of GPUs the run nearest in steps counts; runs on more GPUs at that number of steps lose no less.
    near = _nearest(same, run.steps).run.steps
    bound = _largest([point for point in same if point.run.steps == near], run)
    if bound and bound.loss < anchor.loss:
        anchor = bound
    share, sweep = _share_left(run, [points, _points(method, model, profiles, "clip")])
    value = round(max(0.0, anchor.loss) * share, DECIMALS)
    for point in same:
        if point.run == run and abs(point.loss - value) < 1e-9:
            return TableValue(Estimate(value, kind="quoted", sources=(point.row.source,)), (point.row.table,))
    used = [anchor.row, *(point.row for point in sweep)] if share < 1.0 else [anchor.row]
    more = ", and may lose more" if run.warmup < anchor.run.warmup else ""
    note = f"{method} loss on {run} modelled from {model} on {anchor.run}{more}"
    sources = merged(row.source for row in used)
    estimate = Estimate(value, kind="modelled", sources=sources, note=note)
    return TableValue(estimate, merged(row.table for row in used))


@derived()
def _points(method: str, model: str, profiles: Profiles, measure: Measure) -> tuple[_Point, ...]:
    """A model's runs in catalogue order. A row that prints no warm-up stands for the method's default.

    Where another row of the same configuration prints it, such a row is left out.
    """
    own = [row for row in profiles.quality if (row.method, row.large_model) == (method, model)]
    printed = {_configuration(row) for row in own if row.warmup_steps is not None}
    points = []
    for row in own:
        warmup, loss = row.warmup_steps, loss_of(row, profiles.quality, measure)
        if loss is None or (warmup is None and _configuration(row) in printed):
            continue
        options = dict(item.split("=") for item in row.options.split(";") if "=" in item)
        synchronous = _default_warmup(row.method, model, profiles) if warmup is None else warmup
        run = _Setting(row.degree, int(options.get("stride", 1)), synchronous, row.num_inference_steps)
        points.append(_Point(run, loss, row))
    return tuple(points)


def _configuration(row: QualityRow) -> tuple[int, str, int]:
    return row.degree, row.options, row.num_inference_steps


def _largest(points: Sequence[_Point], run: _Setting) -> _Point | None:
    """The run that loses most on as many GPUs, or on the next larger published number, or on fewer."""
    upper = min((point.run.degree for point in points if point.run.degree >= run.degree), default=None)
    if upper is None:
        return None
    degrees = sorted({point.run.degree for point in points if point.run.degree <= upper}, reverse=True)
    anchors = [_nearest([point for point in points if point.run.degree == degree], run.steps) for degree in degrees]
    return max(anchors, key=lambda point: point.loss)


def _nearest(points: Sequence[_Point], steps: int) -> _Point:
    """The run whose number of steps is nearest by ratio, with the fewest synchronous ones."""
    return min(points, key=lambda point: (abs(math.log(point.run.steps / steps)), point.run.warmup))


def _share_left(run: _Setting, measures: Sequence[Sequence[_Point]]) -> tuple[float, list[_Point]]:
    """The share of a loss that is left under so many synchronous steps, and the runs that tell it.

    They are the runs of the configuration that was published under most numbers of them; the first measure goes before
    the others where it has as many.
    """
    sweep: list[_Point] = []
    for points in measures:
        sweeps: dict[tuple[int, int, int], dict[int, _Point]] = {}  # by configuration, then by synchronous steps
        for point in points:
            key = (point.run.degree, point.run.stride, point.run.steps)
            sweeps.setdefault(key, {}).setdefault(point.run.warmup, point)
        longest = max(sweeps.values(), key=len, default={})
        if len(longest) > len(sweep):
            sweep = [longest[warmup] for warmup in sorted(longest)]
    steps, first = sweep[0].run.steps, sweep[0].loss
    shares = [(float(point.run.warmup), min(1.0, point.loss / first) if first > 0 else 1.0) for point in sweep]
    curve = [*never_rising(shares), (float(steps), 0.0)]
    position = run.warmup * min(1.0, steps / run.steps)
    if position <= curve[0][0]:
        return 1.0, sweep
    left = interpolate(curve, position)
    return (0.0 if left is None else left), sweep


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
    what: list[object] = []  # of each stage all that shapes the picture: not its pool
    for stage in plan.stages:
        how = (stage.method, stage.degree, stage.options) if stage.site.tier == "cloud" else ()
        what.append((stage.model, stage.start, stage.stop, *how))
    return *what, plan.vae, wanted, guided, size, sampler


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
    if plan.vae != "autoencoder-kl" and measure == "lpips":
        yield TableValue.unknown(f"{plan.vae}: its LPIPS was not published")
    elif plan.vae != "autoencoder-kl":
        note = f"{plan.vae}: its CLIP score was not published; its FID was no worse (15.79 against 16.19)"
        yield TableValue(Estimate(0.0, sources=("Hybrid SD table H2",), note=note))
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


def _score(values: Sequence[TableValue], measure: Measure, sampler: str | None) -> Estimate:
    """The first value less the others, which it loses; one that is unknown makes the score so."""
    base, *losses = (value.estimate for value in values)
    sources = merged(base.sources, *(loss.sources for loss in losses))
    if missing := [figure.note for figure in (base, *losses) if not figure.known]:
        return Estimate.unknown("; ".join(dict.fromkeys(missing)), sources=sources)
    lost = sum(loss.value for loss in losses)
    notes = [figure.note for figure in (base, *losses) if figure.note]
    tables = merged(*(value.tables for value in values))
    published = (SAMPLERS.get(table) or SAMPLERS.get(study(table), ()) for table in tables)
    if others := dict.fromkeys(names[-1] for names in published if names and sampler not in (None, *names)):
        notes.append(f"published with {' and '.join(others)}, not {sampler}")
    several = sum(loss.value != 0.0 for loss in losses) > 1
    modelled = several or bool(notes) or any(figure.kind == "modelled" for figure in (base, *losses))
    score = Estimate(
        round(base.value + (-lost if measure == "clip" else lost), DECIMALS),
        kind="modelled" if modelled else "quoted",
        sources=sources,
        note="; ".join(dict.fromkeys(notes)),
    )
    return with_interval(score, measure)
