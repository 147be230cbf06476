"""The pages of a report, block by block: the answer, savings, reasons, margins, other plans and conditions, evidence.

Reads the plain data of `contents` and writes blocks of `markup`; knows neither HTML nor Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.calibrated import calibrated
from hybridsd_sim.report.choices import BENEATH, LEGEND, chosen_plan, pools
from hybridsd_sim.report.conditions import conflict, margins, other_conditions
from hybridsd_sim.report.glossary import GLOSSARY, NAMES
from hybridsd_sim.report.known import how_known, sources_of
from hybridsd_sim.report.markup import (
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
from hybridsd_sim.report.numbers import Show, clip, number, percent
from hybridsd_sim.report.other_plans import compared, evidence, frontier

Data = Mapping[str, Any]
QUESTIONS = {"feasible": "Feasible", "stable": "Stable", "converged": "Converged", "in_domain": "In domain"}
SIDE_BY_SIDE = (
    "latency_p50_s", "latency_p95_s", "slo_attainment", "goodput_per_s", "quality_mean", "gpu_seconds_per_image",
    "metered_usd_per_image", "edge_energy_j_per_image",
)  # fmt: skip
"""Figures by which policies are compared."""


def plan_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The report of a capacity plan, verdict first."""
    yield Heading(f"Capacity plan: {data['scenario']['name']}", "top", 1)
    yield from _verdict(data["runs"][0], feasible=data["feasible"])
    yield _conditions(data, provenance)
    yield from conflict(data)
    yield from chosen_plan(data)
    yield from compared(data)
    yield from _why(data)
    yield from margins(data)
    yield from frontier(data, pictures)
    yield from other_conditions(data)
    yield from evidence(data)
    yield from how_known(data, pictures)
    yield from _rest(data, provenance, pictures)
    yield from _refused(data)
    yield from words()


def _why(data: Data) -> Iterator[Block]:
    """The explanation, without what savings and conflict have said before."""
    before = {each["said"] for each in (*data["savings"], *data["conflict"])} | {data["conflict_said"]}
    reasons = tuple(sentence for sentence in data["explanation"] if sentence not in before)
    if reasons:
        yield Heading("Why this plan", "why")
        yield Bullets(reasons)


def simulation_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """The report of simulations side by side: a verdict for each, then their figures."""
    yield Heading(f"Simulation: {data['scenario']['name']}", "top", 1)
    yield Heading("Verdicts", "verdict")
    yield _verdicts(data["runs"])
    yield _conditions(data, provenance)
    yield Heading("Policies side by side", "compared")
    classes = list(data["scenario"]["classes"])
    for name in [ALL, *(classes if len(classes) > 1 else ())]:
        yield _side_by_side(data, name)
    yield Paragraph(LEGEND, "note")
    for run in data["runs"]:
        yield pools(data, run)
    yield from how_known(data, pictures)
    yield from _rest(data, provenance, pictures)
    yield from words()


def _rest(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    yield Heading("Figures", "figures")
    drawn = [picture for picture in pictures if picture.name not in _elsewhere(data)]
    yield from drawn
    if not drawn:
        yield Paragraph("There is nothing to draw: no request was served.", "note")
    yield from _details(data)
    sources = sources_of(data)
    yield from calibrated(data, pictures, sources)
    yield from _provenance(provenance, sources)


def _elsewhere(data: Data) -> set[str]:
    """Figures that stand in sections of their own."""
    return {"known", "calibration"} | ({"frontier"} if data.get("frontier") else set())


def _conditions(data: Data, provenance: Data) -> Paragraph:
    """How the run was made, in small print."""
    scenario = data["scenario"]
    most = max(run["replications"] for run in data["runs"])
    runs = f"{'up to ' * _differ(data)}{most} replication{'s' * (most > 1)}"
    counted = f"{scenario['horizon_s'] - scenario['warmup_s']:,g} s each after {scenario['warmup_s']:,g} s of warm-up"
    text = f"From {runs} of {counted}, seed {scenario['seed']}; run {provenance['run_id']}."
    return Paragraph(text, "note")


def _differ(data: Data) -> bool:
    """Whether some runs were repeated more often than others."""
    return len({run["replications"] for run in data["runs"]}) > 1


def _verdict(run: Data, *, feasible: bool) -> Iterator[Block]:
    yield Heading("Verdict", "verdict")
    doubts = [QUESTIONS[f["name"]].lower() for f in run["verdict"] if not f["ok"] and f["name"] != "feasible"]
    if not feasible:
        text = "No plan that was found keeps every promise. What follows is the one that misses least."
    elif doubts:
        text = f"The plan keeps every promise, with reservations: not {', not '.join(doubts)}."
    else:
        text = "The plan keeps every promise, and the simulation behind it can be relied on."
    yield Paragraph(text, "lead")
    yield cards(run)


def cards(run: Data) -> Cards:
    """A run's verdict."""
    return Cards(tuple((QUESTIONS[f["name"]], f["ok"], f["reason"]) for f in run["verdict"]))


def _verdicts(runs: Sequence[Data]) -> Table:
    rows = [(Cell(run["name"]), *(answered(f["ok"], f["reason"]) for f in run["verdict"])) for run in runs]
    head = ("Policy", *QUESTIONS.values())
    return Table("Each policy's verdict", head, tuple(rows), words=frozenset(range(len(head))))


def _side_by_side(data: Data, name: str) -> Table:
    rows = []
    for run in data["runs"]:
        rent = cell(run["summary"][ALL]["rent_usd_per_hour"])
        rows.append((Cell(run["name"]), rent, *(cell(run["summary"][name][key], shown(key)) for key in SIDE_BY_SIDE)))
    head = ("Policy", "Rent, all classes (US$/h)", *(NAMES[key] for key in SIDE_BY_SIDE))
    title = "All requests" if name == ALL else f"Request class {name}"
    return Table(f"{title}; {BENEATH}", head, tuple(rows))


def shown(key: str) -> Show:
    """How a figure of a summary is written."""
    return percent if key in {"unserved_share", "slo_attainment"} else clip if key == "quality_mean" else number


def _details(data: Data) -> Iterator[Block]:
    yield Heading("Every figure", "details")
    text = "The same figures stand in summary.csv and pools.csv, one a line, with interval and unit."
    yield Paragraph(text, "note")
    for run in data["runs"]:
        turned_away = tuple(f"{number(n)} {name} requests unserved: {reason}" for name, reason, n in run["unserved"])
        yield Fold(f"Run {run['name']}", (_every_figure(run), *([Bullets(turned_away)] if turned_away else [])))


def _every_figure(run: Data) -> Table:
    classes = list(run["summary"])
    rows = []
    for key, figure in run["summary"][ALL].items():
        figures = (cell(run["summary"][name][key], shown(key)) for name in classes)
        rows.append((Cell(NAMES.get(key, key)), *figures, Cell(figure["unit"])))
    words_at = frozenset({0, len(classes) + 1})
    return Table(f"Run {run['name']}; {BENEATH}", ("Figure", *classes, "Unit"), tuple(rows), words=words_at)


def _provenance(provenance: Data, sources: Sequence[str]) -> Iterator[Block]:
    yield Heading("Where the numbers come from", "provenance")
    if sources:
        yield Bullets(tuple(sources), numbered=True)
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(provenance["libraries"].items()))
    made_by = f"{provenance['package']} {provenance['version']} with {libraries}"
    digests = (("Scenario digest", provenance["scenario_digest"]), ("Profiles digest", provenance["profiles_digest"]))
    overrides = ("Overrides", "; ".join(provenance["overrides_applied"]) or "none")
    known = tuple((name, digest or "not recorded") for name, digest in digests)
    yield Terms((("Made by", made_by), ("Run", provenance["run_id"]), *known, overrides))


def _refused(data: Data) -> Iterator[Block]:
    yield Heading("Refused plans", "refused")
    if not data["refusals"]:
        yield Paragraph("No plan of the search space was refused.", "note")
        return
    rows = tuple((Cell(name), Cell(reason), Cell(number(count))) for name, reason, count in data["refusals"])
    yield Table("Plans that cannot run, by reason", ("Request class", "Reason", "Plans"), rows, words=frozenset({0, 1}))


def words() -> Iterator[Block]:
    """What the words of a report mean."""
    yield Heading("Words", "words")
    yield Terms(GLOSSARY)
