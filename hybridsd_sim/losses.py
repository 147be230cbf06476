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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from hybridsd_sim.plan import Kind
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
