"""What a parallel method loses, by configuration, synchronous steps and number of GPUs, read off published tables.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridsd_sim.losses import (
    DECIMALS,
    EXACT_METHODS,
    MEASURE_NAMES,
    NO_LOSS,
    Loss,
    Measure,
    between,
    falling,
    loss_of,
)
from hybridsd_sim.methods import find_method
from hybridsd_sim.plan import Stage
from hybridsd_sim.profiles import Profiles, QualityRow

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
