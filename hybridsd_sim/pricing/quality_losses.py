"""What pictures lose, read off published tables: the scores of models alone, and the loss by switch step of a pair.

A loss is how much worse a score is than the large model's own in the same study: CLIP lost, FID gained, LPIPS away from
the pictures of one GPU. It is never negative, and it is None with a reason where no study reaches. A loss is `quoted`
where a published row has precisely these settings and says precisely this, else `modelled`.

Published losses are made monotone by the largest loss that was printed further along: a later switch step never loses
more. Between published settings the loss is linear. Against a monotone cubic (scipy's PCHIP), with each inner point of
the published curves left out in turn, the straight line misses by 5.7% of the full loss instead of 4.5%, but it makes
the loss too small at 26% of the points instead of 46%: most curves are convex, so that a chord lies above them, and a
quality floor is a promise.

Sources: Hybrid SD (arXiv 2408.06646, repository tables), ObCLIP (arXiv 2510.04153).

What a parallel method loses, by configuration, synchronous steps and number of GPUs, read off published tables.

More GPUs never lose less: the largest loss printed for as many or fewer counts, and between printed numbers of GPUs the
next larger one. More synchronous steps never lose more: a loss is scaled by the share that was left of it in the one
configuration of its model that was published under several numbers of them (for AsyncDiff three components at stride 2
under 1 to 11 of 50; FID, which that table leaves out, goes with CLIP). Beyond the last published number the line leads
to nothing lost at all steps; fewer than the first may lose more, and the note says so. At another number of steps the
nearest published one counts, and of synchronous steps the smaller of number and share.

AsyncDiff's table 3 checks this, as it prints no warm-up and is not read: under 9 synchronous steps, which its row for
four GPUs shares with table 2, CLIP comes out within 0.0003, LPIPS within 0.04, and FID 0.08 to 0.64 worse than printed.

Sources: AsyncDiff (arXiv 2406.06911, tables 1 to 3, 6 and 7), DistriFusion (arXiv 2402.19481, table 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from hybridsd_sim.estimate import Kind
from hybridsd_sim.perf import find_method
from hybridsd_sim.plan import Stage
from hybridsd_sim.profiles import Profiles, QualityRow

Measure = Literal["clip", "fid", "lpips"]

Curve = Sequence[tuple[float, float]]

Points = list[tuple[float, float, str]]
"""Share of steps by the large model, loss, source."""


MEASURE_NAMES: Mapping[Measure, str] = {"clip": "CLIP score", "fid": "FID", "lpips": "LPIPS"}

DECIMALS = 6
"""Losses and scores are rounded to this many decimals, which no study prints."""

EXACT_METHODS = ("single", "cfg_parallel")
"""Methods that compute what one GPU computes, so that they lose nothing."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, or a score, in the units of its measure, and why it is None if it is. `tables` are where it was read."""

    value: float | None
    kind: Kind = "modelled"
    sources: tuple[str, ...] = ()
    note: str = ""
    tables: tuple[str, ...] = ()


NO_LOSS = Loss(0.0, "quoted")


def study(table: str) -> str:
    """The study of a table: the first word of its name. Scores of different studies do not compare."""
    return table.split(maxsplit=1)[0]


def score_of(row: QualityRow, measure: Measure) -> float | None:
    """What a row prints of a measure."""
    return {"clip": row.clip, "fid": row.fid, "lpips": row.lpips}[measure]


def alone(rows: Iterable[QualityRow], model: str, measure: Measure) -> list[tuple[QualityRow, float]]:
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
        for base, own in alone(rows, row.large_model, measure)
        if study(base.table) == study(row.table) and base.num_inference_steps == row.num_inference_steps
    ]
    return worse(score, min(bases, key=lambda base: base[0])[1], measure) if bases else None


def worse(score: float, base: float, measure: Measure) -> float:
    """By how much a score is worse than a base: CLIP falls, FID rises."""
    return round(base - score if measure == "clip" else score - base, DECIMALS)


def falling(points: Curve) -> list[tuple[float, float]]:
    """The lowest curve that never rises and lies nowhere below a point or below zero. Points stand in rising order."""
    losses = list(accumulate((loss for _, loss in reversed(points)), max, initial=0.0))[:0:-1]
    return [(at, loss) for (at, _), loss in zip(points, losses, strict=True)]


def between(points: Curve, at: float) -> float | None:
    """The straight line between the two points around `at`; None outside them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


# ---- Switch steps ---------------------------------------------------------------------------------------------------


def switch_loss(profiles: Profiles, large: str, small: str, share: float, measure: Measure) -> Loss:
    """What handing over to the small model loses after the large one did this share of the steps."""
    key = (large, small, share, measure)
    return profiles.memory.recall("switch_losses", key, lambda: _switch_loss(profiles, large, small, share, measure))


def _switch_loss(profiles: Profiles, large: str, small: str, share: float, measure: Measure) -> Loss:
    printed, table = _best_table(profiles, large, small, measure)
    if len(printed) < 2:
        return Loss(None, note=f"no published quality for {large} followed by {small}")
    sources = tuple(dict.fromkeys(source for _, _, source in printed if source))
    value = between(_falling(printed), share)
    if value is None:
        return Loss(None, "modelled", sources, f"switch share {share:.2f} lies outside the published ones")
    value = round(value, DECIMALS)
    if any(abs(at - share) < 1e-9 and abs(loss - value) < 1e-9 for at, loss, _ in printed):
        return Loss(value, "quoted", sources, tables=(table,))
    return Loss(value, "modelled", sources, "interpolated between published switch steps", (table,))


def switch_curve(profiles: Profiles, large: str, small: str, measure: Measure = "clip") -> Points:
    """Points (share of steps by the large model, loss, source) of the table that covers this pair best, falling to 0.

    Best is the one printed to most decimals, then the one with most points. A table without its own score of the large
    model is completed from the other tables of its study. Share 1 loses nothing.
    """
    printed, _ = _best_table(profiles, large, small, measure)
    return [(*point, source) for point, (_, _, source) in zip(_falling(printed), printed, strict=True)]


def _falling(printed: Points) -> list[tuple[float, float]]:
    return falling([(share, loss) for share, loss, _ in printed])


def _best_table(profiles: Profiles, large: str, small: str, measure: Measure) -> tuple[Points, str]:
    """What the best table prints of a pair, and the table's name; nothing where no table has it."""
    key = (large, small, measure)
    return profiles.memory.recall("best_tables", key, lambda: _find_table(profiles, large, small, measure))


def _find_table(profiles: Profiles, large: str, small: str, measure: Measure) -> tuple[Points, str]:
    names = {row.table: row for row in profiles.quality if (row.large_model, row.small_model) == (large, small)}
    found = [(_printed(profiles, name, large, small, measure), name) for name in names]
    decimals = {name: _decimals(profiles, name, large, measure) for name in names}
    return max(found, key=lambda one: (decimals[one[1]], len(one[0])), default=([], ""))


def _decimals(profiles: Profiles, table: str, large: str, measure: Measure) -> int:
    rows = (row for row in profiles.quality if row.table == table and row.large_model == large)
    scores = (score_of(row, measure) for row in rows)
    return max((len(f"{score:g}".partition(".")[2]) for score in scores if score is not None), default=0)


def _printed(profiles: Profiles, table: str, large: str, small: str, measure: Measure) -> Points:
    own = [row for row in profiles.quality if row.table == table]
    kin = own if alone(own, large, measure) else [row for row in profiles.quality if study(row.table) == study(table)]
    bases = alone(kin, large, measure)
    if not bases:
        return []
    points = {1.0: (0.0, "")}
    for row, alone_score in alone(kin, small, measure)[:1]:
        points[0.0] = (worse(alone_score, bases[0][1], measure), row.source)
    for row in own:
        score = score_of(row, measure)
        if (row.large_model, row.small_model) == (large, small) and score is not None:
            share = (row.switch_step or 0) / row.num_inference_steps
            points[share] = (worse(score, bases[0][1], measure), row.source)
    return [(share, loss, source) for share, (loss, source) in sorted(points.items())]


DEFAULT_SYNC_MODE = "corrected_async_gn"

PUBLISHED_SYNC_MODES: Mapping[str, str] = {
    DEFAULT_SYNC_MODE: "",
    "sync_gn": "sync_gn counted as corrected_async_gn (LPIPS 0.207 against 0.211: DistriFusion, figure 9)",
}
"""GroupNorm modes whose loss is known, with what there is to say about them."""


@dataclass(frozen=True, slots=True)
class _Run:
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

    run: _Run
    loss: float
    row: QualityRow


def method_loss(stage: Stage, steps: int, profiles: Profiles, measure: Measure) -> Loss:
    """What the stage's parallel method loses in a trajectory of `steps` steps; None with a reason where nobody knows.

    It is its own model's published loss, or the largest of the models that were published. A stage that does only some
    of the steps counts in full.
    """
    run, stripes = _run_of(stage, steps, profiles), _stripes(stage)
    if _is_exact(stage, run, stripes):
        return NO_LOSS
    key = (stage.model, stage.method, stage.degree, stage.options, steps, measure)
    return profiles.memory.recall("method_losses", key, lambda: _published(stage, run, stripes, profiles, measure))


def _published(stage: Stage, run: _Run, stripes: int, profiles: Profiles, measure: Measure) -> Loss:
    """What tables say of a stage that is not exact, however many of the steps it does."""
    if reason := _unpublished(stage, stripes):
        return Loss(None, note=reason)
    method = "distrifusion" if stage.method == "pcpp" else stage.method
    if own := _of_model(run, method, stage.model, profiles, measure):
        return _with_caveats(own, _caveats(stage))
    others = dict.fromkeys(row.large_model for row in profiles.quality if row.method == method)
    known = [loss for model in others if (loss := _of_model(run, method, model, profiles, measure))]
    if not known:
        return Loss(None, note=f"no published {MEASURE_NAMES[measure]} for {method} on {stage.degree} GPUs")
    worst = max(known, key=lambda loss: loss.value or 0.0)
    return _with_caveats(worst, [f"{method} loss taken from other models' table, the largest", *_caveats(stage)])


# ---- The stage ------------------------------------------------------------------------------------------------------


def _run_of(stage: Stage, steps: int, profiles: Profiles) -> _Run:
    warmup = stage.option("warmup_steps", _default_warmup(stage.method, stage.model, profiles))
    return _Run(stage.degree, int(stage.option("stride", 1)), int(warmup), steps)


def _default_warmup(method: str, model: str, profiles: Profiles) -> int:
    """Synchronous steps where nobody says: the method's default, which for AsyncDiff is larger on SDXL."""
    if method == "asyncdiff" and profiles.model(model).latent_space == "sdxl":
        return 3
    return int(find_method(method).defaults.get("warmup_steps", 0))


def _stripes(stage: Stage) -> int:
    """Stripes of one guidance branch."""
    return stage.degree // 2 if stage.option("guidance_split", default=False) else stage.degree


def _is_exact(stage: Stage, run: _Run, stripes: int) -> bool:
    """Whether every step computes what one GPU computes."""
    if stage.method in EXACT_METHODS or stage.degree == 1 or run.warmup >= stage.num_steps:
        return True
    return stage.method != "asyncdiff" and (stripes == 1 or stage.option("sync_mode", "") == "full_sync")


def _unpublished(stage: Stage, stripes: int) -> str:
    """Why no table can say anything about a stage, if so."""
    sees_all = stripes == 2 and float(stage.option("partial", 0.0)) >= 1.0
    if stage.method == "pcpp" and not sees_all:
        return "pcpp: reviews call it worse than DistriFusion, but no score of it was published"
    mode = stage.option("sync_mode", DEFAULT_SYNC_MODE)
    return "" if mode in PUBLISHED_SYNC_MODES else f"{stage.method}: no score was published with sync_mode {mode}"


def _caveats(stage: Stage) -> list[str]:
    """How a stage differs from the published runs of its method, if it does."""
    said = [PUBLISHED_SYNC_MODES[stage.option("sync_mode", DEFAULT_SYNC_MODE)]]
    if stage.method == "pcpp":
        said.append("pcpp that sees the whole image on two stripes counted as distrifusion")
    if stage.option("guidance_split", default=False):
        said.append("guidance split counted as no better than as many GPUs without it")
    if not stage.option("public_cut", default=True):
        said.append("published with another cut of the UNet")
    return [text for text in said if text]


def _with_caveats(loss: Loss, caveats: Sequence[str]) -> Loss:
    if not caveats:
        return loss
    return Loss(loss.value, "modelled", loss.sources, "; ".join(filter(None, [*caveats, loss.note])), loss.tables)


# ---- The tables -----------------------------------------------------------------------------------------------------


def _of_model(run: _Run, method: str, model: str, profiles: Profiles, measure: Measure) -> Loss | None:
    """The loss of a run by one model's rows; None where they reach no number of GPUs as large at this stride."""
    points = _points(method, model, profiles, measure)
    same = [point for point in points if point.run.stride == run.stride]
    anchor = _anchor(same, run)
    if anchor is None:
        return None
    share, sweep = _share_left(run, [points, _points(method, model, profiles, "clip")])
    value = round(max(0.0, anchor.loss) * share, DECIMALS)
    for point in same:
        if point.run == run and abs(point.loss - value) < 1e-9:
            return Loss(value, "quoted", (point.row.source,), tables=(point.row.table,))
    used = [anchor.row, *(point.row for point in sweep)] if share < 1.0 else [anchor.row]
    sources = tuple(dict.fromkeys(row.source for row in used))
    return Loss(value, "modelled", sources, _how(run, anchor.run, anchor.row), tuple({row.table: row for row in used}))


def _how(run: _Run, anchor: _Run, row: QualityRow) -> str:
    more = ", and may lose more" if run.warmup < anchor.warmup else ""
    return f"{row.method} loss on {run} modelled from {row.large_model} on {anchor}{more}"


def _points(method: str, model: str, profiles: Profiles, measure: Measure) -> tuple[_Point, ...]:
    """A model's runs in catalogue order."""
    key = (method, model, measure)
    return profiles.memory.recall("runs", key, lambda: _read_points(method, model, profiles, measure))


def _read_points(method: str, model: str, profiles: Profiles, measure: Measure) -> tuple[_Point, ...]:
    """A model's runs in catalogue order. A row that prints no warm-up stands for the method's default.

    Where another row of the same configuration prints it, such a row is left out.
    """
    own = [row for row in profiles.quality if (row.method, row.large_model) == (method, model)]
    told = {_configuration(row) for row in own if row.warmup_steps is not None}
    points = []
    for row in own:
        warmup, loss = row.warmup_steps, loss_of(row, profiles.quality, measure)
        if loss is None or (warmup is None and _configuration(row) in told):
            continue
        default = _default_warmup(row.method, model, profiles)
        run = _Run(row.degree, _stride(row), default if warmup is None else warmup, row.num_inference_steps)
        points.append(_Point(run, loss, row))
    return tuple(points)


def _configuration(row: QualityRow) -> tuple[int, str, int]:
    return row.degree, row.options, row.num_inference_steps


def _stride(row: QualityRow) -> int:
    options = dict(item.split("=") for item in row.options.split(";") if "=" in item)
    return int(options.get("stride", 1))


def _anchor(points: Sequence[_Point], run: _Run) -> _Point | None:
    """The published run that a run of as many GPUs is modelled from; None where none has as many.

    Of a number of GPUs it is the one nearest in steps; runs on more GPUs at that nearest number of steps lose no less.
    """
    found = _largest(points, run)
    if found is None:
        return None
    near = _nearest(points, run.steps).run.steps
    bound = _largest([point for point in points if point.run.steps == near], run)
    return bound if bound and bound.loss < found.loss else found


def _largest(points: Sequence[_Point], run: _Run) -> _Point | None:
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


def _share_left(run: _Run, measures: Sequence[Sequence[_Point]]) -> tuple[float, list[_Point]]:
    """The share of a loss that is left under so many synchronous steps, and the runs that tell it.

    They are the runs of the configuration that was published under most numbers of them; the first measure goes before
    the others where it has as many.
    """
    sweep = max((_longest_sweep(points) for points in measures), key=len)
    steps, first = sweep[0].run.steps, sweep[0].loss
    shares = [(float(point.run.warmup), min(1.0, point.loss / first) if first > 0 else 1.0) for point in sweep]
    curve = [*falling(shares), (float(steps), 0.0)]
    position = run.warmup * min(1.0, steps / run.steps)
    if position <= curve[0][0]:
        return 1.0, sweep
    left = between(curve, position)
    return (0.0 if left is None else left), sweep


def _longest_sweep(points: Sequence[_Point]) -> list[_Point]:
    """Runs of one configuration by synchronous steps, each number once, in rising order."""
    sweeps: dict[tuple[int, int, int], dict[int, _Point]] = {}
    for point in points:
        key = (point.run.degree, point.run.stride, point.run.steps)
        sweeps.setdefault(key, {}).setdefault(point.run.warmup, point)
    longest = max(sweeps.values(), key=len, default={})
    return [longest[warmup] for warmup in sorted(longest)]
