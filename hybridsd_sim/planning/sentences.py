"""What savings, bound, margins, conflict, confidence and evidence of a capacity plan say, in plain sentences.

Terminal, pages and explanation say the same, because all of them take it from here. Every sentence names its unit and
by what the number is known: simulation, compiled recursion or formula.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from hybridsd_sim.estimate import exact, interval, money, percent, score, signed
from hybridsd_sim.planning.capacity_plan import CapacityPlan, Confidence, EvaluatedPlan, Margin, Relaxation, Saving
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scenario import ALL

KNOWN_BY: Mapping[str, str] = {
    "planned": "simulation", "simulate": "simulation", "screened": "compiled recursion", "screen": "compiled recursion",
    "analytic": "formula",
}  # fmt: skip
"""By what a figure is known, for the policy of an `Evaluated` and for the level of an evaluation."""

BETTER: Mapping[str, tuple[str, int, str, str]] = {
    "usd_per_hour": ("USD/h", 2, "save {}", "cost {} more"),
    "latency_p95_s": ("s", 2, "lower the p95 latency by {}", "raise the p95 latency by {}"),
    "quality": ("CLIP", 4, "lower the CLIP score by {}", "raise the CLIP score by {}"),
}
"""Unit and decimals of what a margin moves, and what its falling and its rising are called.

All three numbers of such a sentence have the same decimals, so that the difference is that of the two others.
"""

Mix = Sequence[tuple[float, Candidate]]
"""How a class's requests are shared out over plans."""

ROUNDING = 1e-6
"""Shares whose sum is this close to 1 leave nobody out."""

LEAST_SHARE = 0.001
"""Shares of requests below this are not worth a word."""

NORMAL_95 = 1.959964
"""Two-sided 95% point of the normal distribution, to the digits that saved intervals were written with."""


def capitalise(text: str) -> str:
    """The text with its first letter in capitals and the rest as it is, unlike `str.capitalize`."""
    return text[:1].upper() + text[1:]


def turned_away_share(mix: Mix) -> float:
    """The share of a class's requests that no plan serves; 0 within rounding."""
    missing = 1.0 - sum(share for share, _ in mix)
    return missing if mix and missing > ROUNDING else 0.0


# ---- Savings --------------------------------------------------------------------------------------------------------


def describe_savings(plan: CapacityPlan) -> Iterator[str]:
    """A sentence for each plan of another kind: dollars and quality, or why it does not hold."""
    yield from (_describe_saving(saving, plan) for saving in plan.savings)


def _describe_saving(saving: Saving, plan: CapacityPlan) -> str:
    if not saving.holds:
        return f"{capitalise(saving.other)} does not hold: {saving.reason.rstrip('.')}."
    own = plan.usd_per_hour
    if saving.usd_per_hour is None or own is None:
        return f"What the plan saves against {saving.other} is not known: a price is missing."
    known = next((other.policy for other in plan.baselines if other.name == saving.other), "planned")
    dollars = f"{money(own)} USD/h of rent against {money(own + saving.usd_per_hour)}"
    rest = f"{_loss(saving, plan)}{_unserved(saving)}"
    return f"It costs {_compared(saving)}: {dollars}, both by {KNOWN_BY.get(known, known)}{rest}."


def _compared(saving: Saving) -> str:
    """`40% less than ...`, or `as much as ...` within half a percent."""
    dollars, share, other = saving.usd_per_hour or 0.0, saving.share, saving.other
    if abs(dollars) < 0.005 or (share is not None and abs(share) < 0.005):
        return f"as much as {other}"
    amount = f"{money(abs(dollars))} USD/h" if share is None else percent(abs(share))
    return f"{amount} {'less' if dollars > 0 else 'more'} than {other}"


def _unserved(saving: Saving) -> str:
    """What is turned away, where either plan turns anybody away."""
    mine, theirs = saving.unserved
    if max(mine, theirs) < LEAST_SHARE:
        return ""
    return f", leaving {percent(mine)} of the requests unserved against {percent(theirs)}"


def _loss(saving: Saving, plan: CapacityPlan) -> str:
    quality = float(plan.chosen_result.summary.xs(ALL, level="request_class").iloc[0]["quality_mean"])
    own, change = None if math.isnan(quality) else quality, saving.quality
    if change is None:
        return "; the change in CLIP score is not known"
    if abs(change) < 5e-5:
        return ", with the same CLIP score" + ("" if own is None else f" of {score(own)}")
    if own is None:
        return f", with a CLIP score {'lower' if change < 0 else 'higher'} by {score(abs(change))}"
    return f", with a CLIP score of {score(own)} against {score(own - change)} ({signed(change, score)})"


# ---- The bound ------------------------------------------------------------------------------------------------------


def optimality_gap(plan: CapacityPlan) -> tuple[float, float, float] | None:
    """The bound, what the chosen plan costs (rent and metered egress), in USD an hour, and the gap as a share of it.

    None where the plan does not hold, where no bound is known or where a price is missing.
    """
    bound, cost = plan.bound_usd_per_hour, plan.cost_usd_per_hour
    if bound is None or cost is None or not plan.feasible:
        return None
    return bound, cost, max(0.0, 1.0 - bound / cost) if cost else 0.0


def describe_bound(plan: CapacityPlan) -> str:
    """How far the chosen plan can be from the cheapest that holds; empty where no bound is known."""
    found = optimality_gap(plan)
    if found is None:
        return ""
    bound, cost, gap = found
    return (
        f"The search found no plan under {money(bound)} USD/h: what the formula puts within reach was tried, each part "
        f"of a mix in time by itself. The plan costs {money(cost)} USD/h with what is sent to the edge: gap "
        f"{percent(gap)}."
    )


# ---- Margins, conflict, confidence, evidence ------------------------------------------------------------------------


def describe_margin(margin: Margin) -> str:
    """What one more second, dollar or point buys, or what it costs."""
    change, (before, after) = capitalise(margin.change), (margin.before, margin.after)
    unit, decimals, falls, rises = BETTER.get(
        margin.figure, ("", 4, f"lower {margin.figure} by {{}}", f"raise {margin.figure} by {{}}")
    )

    def amount(value: float) -> str:
        return f"{value:.{decimals}f} {unit}".rstrip()

    if after is None:
        return f"{change}: no plan would hold (by formula)." if before is not None else f"{change} does not help."
    if before is None:
        return f"{change} would make a plan possible, at {amount(after)} (by formula)."
    moved = after - before
    if abs(moved) < 0.5 * 10**-decimals:
        return f"{change} buys nothing and costs nothing: {amount(after)} with and without (by formula)."
    what = (falls if moved < 0 else rises).format(amount(abs(moved)))
    return f"{change} would {what}: {after:.{decimals}f} instead of {amount(before)} (by formula)."


def describe_infeasible_set(conflict: Sequence[Relaxation]) -> str:
    """How many constraints cannot be met together."""
    return (
        "This constraint cannot hold by itself."
        if len(conflict) == 1
        else f"These {len(conflict)} constraints cannot hold together; any {len(conflict) - 1} of them could."
    )


def describe_relaxation(relaxation: Relaxation) -> str:
    """A constraint of the conflict, and the least change of it alone that makes a plan possible."""
    name, asked, needed, unit = relaxation.constraint, relaxation.asked, relaxation.needed, relaxation.unit

    def quantity(value: float, digits: int = 4) -> str:
        return f"{score(value) if unit == 'CLIP' and digits == 4 else exact(value, digits)} {unit}".rstrip()

    if needed is None:
        stands = "" if asked is None else f", {quantity(asked)} asked"
        return f"{capitalise(name)}{stands}: no change of it alone helps."
    if asked is None:
        return f"{capitalise(name)}: {quantity(needed)} would do, all else as it is (by formula)."
    digits = next(n for n in (4, 6, 9, 17) if n == 17 or quantity(asked, n) != quantity(needed, n))
    changed = f"{quantity(needed, digits)} instead of {quantity(asked, digits)}"
    return f"{capitalise(name)}: {changed} would do, all else as it is (by formula)."


def probability_interval(share: float, draws: int) -> tuple[float, float]:
    """The 95% interval of a share of independent draws (Wilson, J. Am. Stat. Assoc. 22, 1927); 0 to 1 without draws."""
    if draws <= 0:
        return 0.0, 1.0
    square = NORMAL_95**2 / draws
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def describe_confidence(confidence: Confidence) -> str:
    """How sure the plan is, given the intervals of the modelled step costs, and whether that is what was asked."""
    low, high = probability_interval(confidence.probability, confidence.draws)
    grounds = f"{confidence.draws:,} draws by {KNOWN_BY.get(confidence.level, confidence.level)}"
    text = (
        "With the intervals of the modelled step costs the plan holds with probability "
        f"{exact(confidence.probability, 3)} ({grounds}, 95% interval {interval(low, high)})"
    )
    if confidence.asked is None:
        return f"{text}."
    reached = "" if confidence.probability >= confidence.asked else ", which it does not reach"
    return f"{text}; asked {exact(confidence.asked)}{reached}."


def describe_evidence(evidence: Sequence[EvaluatedPlan]) -> str:
    """How many capacity plans were tried, and how; empty for none."""
    if not evidence:
        return ""
    ways = Counter(KNOWN_BY.get(point.policy, point.policy) for point in evidence)
    counted = ", ".join(f"{count} by {way}" for way, count in ways.most_common())
    plans = "1 capacity plan was" if len(evidence) == 1 else f"{len(evidence)} capacity plans were"
    return f"{plans} tried in the search, on the same requests: {counted}."
