"""The pages of a report, block by block: the answer, savings, reasons, margins, other conditions, evidence, words.

`plan_page` and `simulation_page` turn the plain data of `data.contents` into the blocks of `blocks`; they know neither
HTML nor Markdown. A section without anything to show is left out. `pictures` gives every drawn figure its caption, the
kinds of the numbers behind it, and an alternative text that tells the numbers that matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hybridsd_sim.estimate import Show, exact, interval, money, number, percent, score
from hybridsd_sim.reporting.blocks import (
    Block,
    Bullets,
    Cards,
    Cell,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
    Terms,
    answered,
    cell,
)
from hybridsd_sim.reporting.breakdown import provenance_blocks, sources_of
from hybridsd_sim.reporting.calibration import calibration_section
from hybridsd_sim.reporting.figures import FIGURES
from hybridsd_sim.reporting.labels import GLOSSARY, NAMES, Data, listed
from hybridsd_sim.reporting.plan_sections import (
    BENEATH,
    LEGEND,
    chosen_plan,
    compared,
    evidence,
    figures,
    folded,
    frontier,
    holds,
    own_figures,
    pools,
    refused,
)
from hybridsd_sim.reporting.run_data import IDLE
from hybridsd_sim.scenario import ALL

KINDS = ("measured", "quoted", "modelled")

CAPTIONS = {
    "frontier": (
        "Rent against latency; colour is quality. Circles are capacity plans that no other beats in all three; the "
        "named plans are simulated, with 95% intervals."
    ),
    "latency": "Share of requests served within a time. At the SLO, a curve should be above the dotted line.",
    "components": "Where dollars and GPU-seconds go. Hatched white: idle nodes, and requests outside the counted time.",
    "load": "How busy the rented GPUs are, and how many requests wait for them.",
    "switch": "What another switch step would do, on an idle fleet: latency with its 90% interval, and metered cost.",
    "known": "What each plan's idle latency is made of, and how far its 90% interval reaches.",
    "calibration": "Each device's law against the one-GPU rows that it was fitted to.",
}

QUESTIONS = {"feasible": "Feasible", "stable": "Stable", "converged": "Converged", "in_domain": "In domain"}

SIDE_BY_SIDE = (
    "latency_p50_s", "latency_p95_s", "slo_attainment", "goodput_per_s", "quality_mean", "gpu_seconds_per_image",
    "metered_usd_per_image", "edge_energy_j_per_image",
)  # fmt: skip
"""Figures by which policies are compared."""


def pictures(data: Data, drawn: Mapping[str, str]) -> list[Picture]:
    """The drawn figures with caption, alternative text and the kinds of the numbers behind them."""
    simulated = {kind for run in data["runs"] for kind in run["kinds"]}
    plans, curves, fits = data.get("plans", ()), data.get("switch_curve", {}), data.get("calibration", ())
    behind = {
        "frontier": simulated | {"modelled"},
        "switch": {point["kind"] for curve in curves.values() for point in curve},
        "known": {kind for plan in plans for kind, share in plan["shares"].items() if share},
        "calibration": {row["kind"] for fit in fits for row in fit["rows"]} | {"modelled"},
    }
    found = []
    for name, svg in drawn.items():
        kinds = tuple(kind for kind in KINDS if kind in behind.get(name, simulated))
        found.append(Picture(name, FIGURES[name][0], svg, " ".join(DESCRIBE[name](data)), CAPTIONS[name], kinds))
    return found


def _describe_frontier(data: Data) -> Iterator[str]:
    count = len(data["frontier"])
    yield f"Scatter plot of rent in US$ an hour against p95 latency in seconds, with {count} plans on the frontier."
    run = data["runs"][0]
    yield _place("chosen", run["usd_per_hour"], run["summary"][ALL]["latency_p95_s"]["value"])
    for point in data["baselines"]:
        yield _place(point["name"], point["usd_per_hour"], point["latency_p95_s"][0])


def _place(name: str, usd: float | None, seconds: float | None) -> str:
    return f"{name.capitalize()}: {money(usd)} US$ an hour at {number(seconds)} s."


def _describe_latency(data: Data) -> Iterator[str]:
    yield "Curves of the share of requests served within a time, a panel for each request class, a line for each run."
    for name, spec in data["scenario"]["classes"].items():
        limit = "any time" if spec["slo_s"] is None else f"{exact(spec['slo_s'])} s"
        shares = [(run["name"], run["summary"][name]) for run in data["runs"] if name in run["summary"]]
        text = ", ".join(f"{run} {percent(figures['slo_attainment']['value'])}" for run, figures in shares)
        yield f"{name} within {limit}: {text}."


def _describe_components(data: Data) -> Iterator[str]:
    yield "Stacked bars of dollars and of GPU-seconds an image by component, for each run."
    for run in data["runs"]:
        mine = [item for item in run["components"] if item["request_class"] == ALL and item["usd"] is not None]
        used = sum(item["usd"] for item in mine if item["component"] != IDLE)
        idle = sum(item["usd"] for item in mine if item["component"] == IDLE)
        dollars = f"{money(1000.0 * used)} used and {money(1000.0 * idle)} idle"
        yield f"{run['name'].capitalize()}: {dollars}, in US$ per 1,000 images."


def _describe_load(data: Data) -> Iterator[str]:
    yield "Lines over time: share of busy GPUs above, requests waiting below."
    for series in data["runs"][0]["series"]:
        busy, queue = series["busy"]["value"], series["queue"]["value"]
        mean = sum(busy) / len(busy)
        yield f"{series['pool']}: {percent(mean)} busy on average, at most {number(float(max(queue)))} waiting."


def _describe_switch(data: Data) -> Iterator[str]:
    yield "Latency and cost against the switch step, for each request class."
    for name, curve in data["switch_curve"].items():
        if curve:
            points = ", ".join(f"step {point['switch_step']}: {number(point['latency_s'])} s" for point in curve)
            yield f"{name}: {points}."


def _describe_shares(data: Data) -> Iterator[str]:
    yield "Stacked bars of the share of each plan's idle latency that is measured, quoted and modelled."
    for plan in data["plans"]:
        parts = ", ".join(f"{percent(share)} {kind}" for kind, share in plan["shares"].items())
        total = plan["totals"][0]
        ends = f"{number(total['value'])} s, 90% interval {interval(total['low'], total['high'])} s"
        yield f"{', '.join(plan['runs'])}, {plan['request_class']}: {ends}; {parts}."


def _describe_fits(data: Data) -> Iterator[str]:
    yield "Scatter plots of predicted against published seconds a step, a panel for each device, runtime and precision."
    for fit in data["calibration"]:
        if fit["rows"]:
            yield f"{fit['device']}, {fit['runtime']}, {fit['precision']}: {len(fit['rows'])} rows."


DESCRIBE = {
    "frontier": _describe_frontier, "latency": _describe_latency, "components": _describe_components,
    "load": _describe_load, "switch": _describe_switch, "known": _describe_shares, "calibration": _describe_fits,
}  # fmt: skip
"""What writes the alternative text of each figure."""


def conflict(data: Data) -> Iterator[Block]:
    """Which constraints cannot be met together, and the least change of each alone that would do."""
    if data["conflict"]:
        yield Heading("What cannot hold together", "conflict")
        yield Paragraph(data["conflict_said"], "lead")
        yield Bullets(tuple(each["said"] for each in data["conflict"]))


def margins(data: Data) -> Iterator[Block]:
    """What a little more of each limit, or of the traffic, buys or costs."""
    if data["margins"]:
        yield Heading("What a change would buy", "margins")
        yield Bullets(tuple(margin["said"] for margin in data["margins"]))


def other_conditions(data: Data) -> Iterator[Block]:
    """The plan under other traffic, speeds and networks, under other scenarios, and its confidence."""
    if data["sensitivity"]:
        yield Heading("Under other conditions", "sensitivity")
        yield Paragraph(_held(data["sensitivity"], "conditions"))
        yield _varied(data["sensitivity"], data, "Condition", "The same plan, without any change to it")
    if data["robust"]:
        yield Heading("Named scenarios", "robust")
        yield Paragraph(_held(data["robust"], "scenarios"))
        yield _varied(data["robust"], data, "Scenario", "The plan in each scenario")
    if found := data["confidence"]:
        yield Heading("Confidence", "confidence")
        yield Paragraph(found["said"])
        if len(found["by_class"]) > 1:
            rows = tuple((Cell(name), Cell(percent(p), mark="modelled")) for name, p in found["by_class"].items())
            caption = f"Share of the {found['draws']:,} draws in which a class keeps its own promises"
            yield Table(caption, ("Request class", "Probability"), rows)


def _held(variations: Sequence[Data], what: str) -> str:
    """How many conditions the plan holds under, and the names of the others."""
    broken = [each["name"] for each in variations if not each["feasible"]]
    if not broken:
        return f"The plan holds in all {len(variations)} {what}."
    return f"The plan holds in {len(variations) - len(broken)} of {len(variations)} {what}, not in: {listed(broken)}."


def _varied(variations: Sequence[Data], data: Data, what: str, caption: str) -> Block:
    """What became of the plan under each condition; the first row is the plan under its own."""
    own = {**own_figures(data), "name": "as planned"}
    rows = []
    for each in (own, *variations):
        _, rent, p95, share, quality = figures(each, data)
        rows.append((Cell(each["name"]), holds(each), share, p95, rent, quality, Cell(each["known_by"])))
    head = (what, "Holds", "Inside SLO", "p95 latency (s)", "Rent (US$/h)", "Quality (CLIP)", "Known by")
    table = Table(f"{caption}; {BENEATH}", head, tuple(rows), strong=frozenset({0}), words=frozenset({0, 1, 6}))
    return folded(table, f"All {len(variations)}")


def plan_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The report of a capacity plan, verdict first."""
    yield Heading(f"Capacity plan: {data['scenario']['name']}", "top", 1)
    yield from _verdict(data["runs"][0], feasible=data["feasible"])
    yield _conditions(data, provenance)
    yield from conflict(data)
    yield from chosen_plan(data)
    yield from compared(data)
    # The explanation, without what savings and conflict have said before.
    before = {each["said"] for each in (*data["savings"], *data["conflict"])} | {data["conflict_said"]}
    if reasons := tuple(sentence for sentence in data["explanation"] if sentence not in before):
        yield Heading("Why this plan", "why")
        yield Bullets(reasons)
    yield from margins(data)
    yield from frontier(data, pictures)
    yield from other_conditions(data)
    yield from evidence(data)
    yield from provenance_blocks(data, pictures)
    yield from _rest(data, provenance, pictures)
    yield from refused(data)
    yield from words()


def simulation_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The report of simulations side by side: a verdict for each, then their figures."""
    yield Heading(f"Simulation: {data['scenario']['name']}", "top", 1)
    yield Heading("Verdicts", "verdict")
    verdicts = [(Cell(r["name"]), *(answered(f["ok"], f["reason"]) for f in r["verdict"])) for r in data["runs"]]
    head: tuple[str, ...] = ("Policy", *QUESTIONS.values())
    yield Table("Each policy's verdict", head, tuple(verdicts), words=frozenset(range(len(head))))
    yield _conditions(data, provenance)
    yield Heading("Policies side by side", "compared")
    classes = list(data["scenario"]["classes"])
    head = ("Policy", "Rent, all classes (US$/h)", *(NAMES[key] for key in SIDE_BY_SIDE))
    for name in [ALL, *(classes if len(classes) > 1 else ())]:
        rows = []
        for run in data["runs"]:
            figures = (cell(run["summary"][name][key], shown(key)) for key in SIDE_BY_SIDE)
            rows.append((Cell(run["name"]), cell(run["summary"][ALL]["rent_usd_per_hour"], money), *figures))
        title = "All requests" if name == ALL else f"Request class {name}"
        yield Table(f"{title}; {BENEATH}", head, tuple(rows))
    yield Paragraph(LEGEND, "note")
    for run in data["runs"]:
        yield pools(data, run)
    yield from provenance_blocks(data, pictures)
    yield from _rest(data, provenance, pictures)
    yield from words()


def _rest(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """What closes every report: figures, every number, the calibration, and where the numbers come from."""
    yield Heading("Figures", "figures")
    # the others stand in sections of their own
    elsewhere = {"known", "calibration"} | ({"frontier"} if data.get("frontier") else set())
    drawn = [picture for picture in pictures if picture.name not in elsewhere]
    yield from drawn
    if not drawn:
        yield Paragraph("There is nothing to draw: no request was served.", "note")
    yield Heading("Every figure", "details")
    text = "The same figures stand in summary.csv and pools.csv, one a line, with interval and unit."
    yield Paragraph(text, "note")
    for run in data["runs"]:
        classes = list(run["summary"])
        rows = []
        for key, figure in run["summary"][ALL].items():
            figures = (cell(run["summary"][name][key], shown(key)) for name in classes)
            rows.append((Cell(NAMES.get(key, key)), *figures, Cell(figure["unit"])))
        words_at = frozenset({0, len(classes) + 1})
        table = Table(f"Run {run['name']}; {BENEATH}", ("Figure", *classes, "Unit"), tuple(rows), words=words_at)
        turned_away = tuple(f"{number(n)} {name} requests unserved: {reason}" for name, reason, n in run["unserved"])
        yield Fold(f"Run {run['name']}", (table, Bullets(turned_away)) if turned_away else (table,))
    sources = sources_of(data)
    yield from calibration_section(data, pictures, sources)
    yield Heading("Where the numbers come from", "provenance")
    if sources:
        yield Bullets(tuple(sources), numbered=True)
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(provenance["libraries"].items()))
    yield Terms(
        (
            ("Made by", f"{provenance['package']} {provenance['version']} with {libraries}"),
            ("Run", provenance["run_id"]),
            ("Scenario digest", provenance["scenario_digest"] or "not recorded"),
            ("Profiles digest", provenance["profiles_digest"] or "not recorded"),
            ("Overrides", "; ".join(provenance["overrides_applied"]) or "none"),
        )
    )


def _conditions(data: Data, provenance: Data) -> Paragraph:
    """How the run was made, in small print."""
    scenario = data["scenario"]
    repeated = {run["replications"] for run in data["runs"]}
    most = max(repeated)
    runs = f"{'up to ' * (len(repeated) > 1)}{most} replication{'s' * (most > 1)}"
    counted = (
        f"{exact(scenario['horizon_s'] - scenario['warmup_s'])} s each after {exact(scenario['warmup_s'])} s of warm-up"
    )
    text = f"From {runs} of {counted}, seed {scenario['seed']}; run {provenance['run_id']}."
    return Paragraph(text, "note")


def _verdict(run: Data, *, feasible: bool) -> Iterator[Block]:
    """Whether the plan keeps every promise, with which reservations."""
    yield Heading("Verdict", "verdict")
    failed = [QUESTIONS[f["name"]].lower() for f in run["verdict"] if not f["ok"] and f["name"] != "feasible"]
    if not feasible:
        text = "No plan that was found keeps every promise. What follows is the one that misses least."
    elif failed:
        text = f"The plan keeps every promise, with reservations: not {', not '.join(failed)}."
    else:
        text = "The plan keeps every promise, and the simulation behind it can be relied on."
    yield Paragraph(text, "lead")
    yield cards(run)


def cards(run: Data) -> Cards:
    """A run's verdict."""
    return Cards(tuple((QUESTIONS[f["name"]], f["ok"], f["reason"]) for f in run["verdict"]))


def shown(key: str) -> Show:
    """How a figure of a summary is written.

    SLO attainment and unserved share as per cent, quality as a score, dollars as money, all else as a number.
    """
    if key in {"unserved_share", "slo_attainment"}:
        return percent
    return score if key == "quality_mean" else money if "usd" in key else number


def words() -> Iterator[Block]:
    """What the words of a report mean."""
    yield Heading("Words", "words")
    yield Terms(GLOSSARY)
