"""What a plan's pictures are worth: CLIP score and FID by switch step and parallel method, from published tables.

A plan starts from its large model's own published score and loses what the study of its model pair lost at that switch
step, plus what the study of its parallel method lost in that configuration: losses add up, which is conservative.
Between published switch steps the loss is interpolated linearly in the share of steps done by the large model, which
keeps it monotone. Whatever no study covers is None with a reason, never zero.

Sources: Hybrid SD (arXiv 2408.06646, repository tables), ObCLIP (arXiv 2510.04153), AsyncDiff (arXiv 2406.06911,
tables 1 and 3), DistriFusion (arXiv 2402.19481, table 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridsd_sim.plan import Kind, Plan, Stage
from hybridsd_sim.profiles import Profiles, QualityRow

DECIMALS = 6
"""Scores are rounded to this many decimals, which no study prints."""
FEWEST_STEPS = 20
"""From here on a score hardly depends on the number of steps: SD 2.1 with DDIM has 31.60 at 50 steps, 31.53 at 27 and
31.46 at 21, but 30.99 at 11 (AsyncDiff, arXiv 2406.06911, tables 6 and 7)."""
EXACT_METHODS = ("single", "cfg_parallel")
"""Methods that compute what one GPU computes, so that they lose nothing."""


@dataclass(frozen=True, slots=True)
class Quality:
    """A plan's CLIP score in 0..1 (higher is better), with its kind, its sources, and why it is None if it is."""

    clip: float | None
    kind: Kind
    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Loss:
    clip: float | None
    kind: Kind
    sources: tuple[str, ...] = ()
    note: str = ""


NO_LOSS = _Loss(0.0, "quoted")


def quality_of(
    plan: Plan,
    profiles: Profiles,
    *,
    wanted: str | None = None,
    guided: bool = True,
    size: tuple[int, int] | None = None,
) -> Quality:
    """The CLIP score of a plan's pictures; None with a reason where no published table reaches.

    `wanted` is the model the user asked for. A small model that does every step is then the pair's switch step 0, so
    that one study's scores are compared; without such a study its own published score counts. All scores were published
    with guidance, so that pictures without it (`guided` False) have none, and at the model's native size, so that
    another `size` (height, width in px) is marked as modelled.
    """
    if not guided:
        return Quality(None, "modelled", (), "CLIP scores were published with guidance only")
    large = plan.stages[0].model
    if wanted is not None and switch_curve(profiles, wanted, large):
        large = wanted
    base = _base(profiles, large)
    losses = [
        _switch_loss(plan, profiles, large),
        _step_loss(plan, profiles, large),
        _size_loss(profiles, large, size),
        _vae_loss(plan),
        *(_method_loss(stage, profiles) for stage in plan.cloud_stages),
    ]
    parts = [base, *losses]
    missing = [part.note for part in parts if part.clip is None]
    sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
    if missing:
        return Quality(None, "modelled", sources, "; ".join(missing))
    score = round((base.clip or 0.0) - sum(loss.clip or 0.0 for loss in losses), DECIMALS)
    modelled = any(part.kind == "modelled" for part in parts) or sum(bool(loss.clip) for loss in losses) > 1
    return Quality(score, "modelled" if modelled else "quoted", sources, "; ".join(p.note for p in parts if p.note))


def _step_loss(plan: Plan, profiles: Profiles, large: str) -> _Loss:
    """What another number of steps than the published one costs: nothing from `FEWEST_STEPS` on, unknown below."""
    rows = [row for row in _alone(profiles.quality, large) if row.clip is not None]
    steps = plan.num_inference_steps
    if not rows or rows[0].num_inference_steps == steps:
        return NO_LOSS
    note = f"{large}'s score was published at {rows[0].num_inference_steps} steps"
    return _Loss(0.0, "modelled", (), note) if steps >= FEWEST_STEPS else _Loss(None, "modelled", (), note)


def _size_loss(profiles: Profiles, large: str, size: tuple[int, int] | None) -> _Loss:
    """No study tells what another size costs: the score is kept, and marked."""
    native = profiles.model(large).native_px
    if size is None or size == (native, native):
        return NO_LOSS
    return _Loss(0.0, "modelled", (), f"{large}'s score was published at {native} px")


def _vae_loss(plan: Plan) -> _Loss:
    if plan.vae == "autoencoder-kl":
        return NO_LOSS
    note = f"{plan.vae}: its CLIP score was not published; its FID was no worse (15.79 against 16.19)"
    return _Loss(0.0, "modelled", ("Hybrid SD table H2",), note)


def _base(profiles: Profiles, model: str) -> _Loss:
    rows = [row for row in _alone(profiles.quality, model) if row.clip is not None]
    if not rows:
        return _Loss(None, "modelled", note=f"no published CLIP score for {model}")
    return _Loss(rows[0].clip, "quoted", (rows[0].source,))


def _alone(rows: Iterable[QualityRow], model: str) -> list[QualityRow]:
    """Rows of a model that does every step on one GPU, in catalogue order; those of its siblings do not count."""
    return [
        row
        for row in rows
        if row.large_model == model and row.method in EXACT_METHODS and row.switch_step == row.num_inference_steps
    ]


def study(row: QualityRow) -> str:
    """The study a row belongs to: the first word of its table's name. Scores of different studies do not compare."""
    return row.table.split()[0]


def _switch_loss(plan: Plan, profiles: Profiles, large: str) -> _Loss:
    models = tuple(dict.fromkeys((large, *(stage.model for stage in plan.stages))))
    if len(models) == 1:
        return NO_LOSS
    if len(models) > 2:
        return _Loss(None, "modelled", note=f"no table covers the chain {' -> '.join(models)}")
    small = models[1]
    boundary = next(stage.start for stage in plan.stages if stage.model == small)
    curve = switch_curve(profiles, large, small)
    if len(curve) < 2:
        return _Loss(None, "modelled", note=f"no published quality for {large} followed by {small}")
    return _interpolate(curve, boundary / plan.num_inference_steps)


def switch_curve(profiles: Profiles, large: str, small: str) -> list[tuple[float, float, str]]:
    """Points (share of steps by the large model, CLIP lost, source) of the table that covers this pair best.

    Best is the one printed to most decimals, then the one with most points. A table without its own score of the large
    model is completed from the other tables of its study. Share 1 loses nothing.
    """
    tables = dict.fromkeys(
        row.table for row in profiles.quality if (row.large_model, row.small_model) == (large, small)
    )
    curves = [(_decimals(profiles, name, large), _table_curve(profiles, name, large, small)) for name in tables]
    return max(curves, key=lambda curve: (curve[0], len(curve[1])), default=(0, []))[1]


def _decimals(profiles: Profiles, table: str, large: str) -> int:
    scores = [row.clip for row in profiles.quality if row.table == table and row.large_model == large]
    return max((len(f"{score:g}".partition(".")[2]) for score in scores if score is not None), default=0)


def _table_curve(profiles: Profiles, table: str, large: str, small: str) -> list[tuple[float, float, str]]:
    scored = [row for row in profiles.quality if row.clip is not None]
    own = [row for row in scored if row.table == table]
    rows = own if _alone(own, large) else [row for row in scored if study(row) == table.split(maxsplit=1)[0]]
    bases = _alone(rows, large)
    if not bases:
        return []
    base = bases[0].clip or 0.0
    points = {1.0: (0.0, "")}
    for row in _alone(rows, small)[:1]:
        points[0.0] = (base - (row.clip or 0.0), row.source)
    for row in own:
        if (row.large_model, row.small_model) == (large, small):
            points[(row.switch_step or 0) / row.num_inference_steps] = (base - (row.clip or 0.0), row.source)
    return [(share, loss, source) for share, (loss, source) in sorted(points.items())]


def _interpolate(curve: Sequence[tuple[float, float, str]], share: float) -> _Loss:
    sources = tuple(dict.fromkeys(source for _, _, source in curve if source))
    for point, loss, _ in curve:
        if abs(point - share) < 1e-9:
            return _Loss(loss, "quoted", sources)
    below = [point for point in curve if point[0] < share]
    above = [point for point in curve if point[0] > share]
    if not below or not above:
        return _Loss(None, "modelled", sources, f"switch share {share:.2f} lies outside the published ones")
    (x0, y0, _), (x1, y1, _) = below[-1], above[0]
    value = y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return _Loss(value, "modelled", sources, "interpolated between published switch steps")


def _method_loss(stage: Stage, profiles: Profiles) -> _Loss:
    if stage.method in EXACT_METHODS or stage.degree == 1 or stage.option("sync_mode", "") == "full_sync":
        return NO_LOSS
    stride = int(stage.option("stride", 1))
    rows = [row for row in profiles.quality if row.method == stage.method and row.clip is not None]
    matching = [row for row in rows if row.degree == stage.degree and _stride(row) == stride]
    if not matching:
        reason = f"no published CLIP score for {stage.method} on {stage.degree} GPUs"
        return _Loss(None, "modelled", note=reason)
    losses = {row.large_model: (_loss_of(row, profiles), row.source) for row in reversed(matching)}
    if stage.model in losses:
        loss, source = losses[stage.model]
        return _Loss(max(0.0, loss), "quoted", (source,))
    loss, source = max(losses.values())
    note = f"{stage.method} loss taken from other models' table, the largest"
    return _Loss(max(0.0, loss), "modelled", (source,), note)


def _loss_of(row: QualityRow, profiles: Profiles) -> float:
    same_study = [other for other in profiles.quality if study(other) == study(row)]
    same_table = [other for other in same_study if other.table == row.table]
    for pool in (same_table, same_study):
        for base in _alone(pool, row.large_model):
            if base.clip is not None:
                return base.clip - (row.clip or 0.0)
    return 0.0


def _stride(row: QualityRow) -> int:
    options = dict(item.split("=") for item in row.options.split(";") if "=" in item)
    return int(options.get("stride", 1))
