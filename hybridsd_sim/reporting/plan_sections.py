"""The sections on the chosen plan and on plans beside it: what to rent, what it saves, the frontier, the evidence.

A class may have several plans, each for a share of its requests; what is missing from their sum is turned away. Every
section turns the plain data of `data.contents` into blocks, and is left out where it has nothing to show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from hybridsd_sim.estimate import DASH, Show, exact, money, number, percent, score, signed, weakest
from hybridsd_sim.reporting.blocks import (
    MARKS,
    Block,
    Bullets,
    Cell,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
    answered,
    cell,
    ranged,
)
from hybridsd_sim.reporting.labels import Data, listed
from hybridsd_sim.reporting.run_data import SIMULATED
from hybridsd_sim.scenario import ALL

BENEATH = "beneath a figure its 95% interval"

LEGEND = (
    f"{MARKS['measured']} measured by this project's executors; {MARKS['quoted']} quoted from a publication, datasheet "
    f"or price list; {MARKS['modelled']} modelled: derived from these by a stated rule, or simulated."
)

POOL_FIGURES: tuple[tuple[str, Show], ...] = (
    ("utilisation", percent),
    ("queue_wait_mean_s", number),
    ("queue_wait_p95_s", number),
)

PLAN_COLUMNS = ("Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)")
"""Headings of what `figures` tells of a plan."""

EXPECTED = ("cloud only", "edge only", "static switch")
"""Baselines that a capacity plan is held against wherever they can serve every class."""

FEW = 12
"""Rows of a table that stands open; longer ones are opened by the reader."""

CHECK = (
    "To check the plan against a running service, give its address to the script beside this page: python load_test.py "
    "--url ADDRESS. It replays the scenario's own requests at their own times, and holds what it "
    "measures against every SLO and against this simulation."
)

NOWHERE = "a queue grows without end"


def chosen_plan(data: Data) -> Iterator[Block]:
    """What to rent, what every request class gets of it, and how busy the pools are."""
    run = data["runs"][0]
    yield Heading("The plan", "plan")
    yield Paragraph(sentence(data), "lead")
    if data["bound"]:
        yield Paragraph(data["bound"]["said"])
    rows = [row for choice in data["chosen"] for row in _class_rows(data, choice)]
    head = (
        "Request class", "Plan", "Switch step", "Method × degree", "Nodes", "Idle latency (s)", "p95 latency (s)",
        "Inside SLO", "Quality (CLIP)", "Metered cost (US$/image)", "Edge energy (J/image)",
    )  # fmt: skip
    caption = "Each request class; beneath the idle latency its 90% interval, beneath other figures their 95% intervals"
    if any(is_shared(choice) for choice in data["chosen"]):
        caption += "; a class with several plans has its simulated figures beside the first"
    yield Table(caption, head, tuple(rows), words=frozenset({0, 1, 3, 4}))
    yield Paragraph(LEGEND, "note")
    yield pools(data, run)


def sentence(data: Data) -> str:
    """The chosen plan in one sentence: what to rent, and which classes, or shares of them, are served alike."""
    run = data["runs"][0]
    rented = [f"{count} {name} node{'s' * (count > 1)}" for name, count in run["replicas"].items() if count]
    price = "an unknown price" if run["usd_per_hour"] is None else f"US$ {money(run['usd_per_hour'])} an hour"
    start = f"Rent {listed(rented)} for {price}" if rented else "Rent nothing"
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for choice in data["chosen"]:
        name = choice["request_class"]
        if not choice["parts"]:
            alike["no legal plan serves {}"].append(name)
        for part in choice["parts"]:
            first = part["stages"][0]
            place = "at the edge" if first["tier"] == "edge" else f"on {first['site']}"
            what = f"run every step of {{}} {place}"
            if len(part["stages"]) > 1:
                what = f"hand {{}} over after step {part['switch_step']} of {part['num_inference_steps']}"
            alike[what].append(f"{percent(part['share'])} of {name}" if is_shared(choice) else name)
        if choice["turned_away"]:
            alike["turn {} away"].append(f"{percent(choice['turned_away'])} of {name}")
    return f"{start}: {'; '.join(what.format(listed(names)) for what, names in alike.items())}."


def is_shared(choice: Data) -> bool:
    """Whether a class has anything else than one plan for all of its requests."""
    return len(choice["parts"]) > 1 or choice["turned_away"] > 0


def describe_part(part: Data) -> str:
    """A plan in words: which steps, of which model, where, and how."""
    total = part["num_inference_steps"]
    together = f", up to {part['batch_cap']} together" if part["batch_cap"] > 1 else ""
    stages = []
    for stage in part["stages"]:
        count = stage["stop"] - stage["start"]
        some = f"the other {count}" if stage["start"] else f"first {count} of {total}"
        steps = f"all {total}" if count == total else some
        where = f"on the user's {stage['device']}"
        if stage["tier"] == "cloud":
            options = "".join(f", {key}" if v is True else f", {key} {v}" for key, v in stage["options"].items())
            how = "" if stage["degree"] == 1 else f" by {stage['method']} over {stage['degree']} GPUs{options}"
            device = "" if stage["device"] == stage["site"] else f" ({stage['device']})"
            where = f"on {stage['site']}{device}{how}{together}"
        stages.append(f"{steps} steps of {stage['model']} {where}")
    text = ", then ".join(stages)
    # usually decoded by the model's own VAE, where the last step ran
    vae = "" if part["vae"] == "autoencoder-kl" else f" by {part['vae']}"
    place = "" if part["vae_site"] == part["stages"][-1]["site"] else f" on {part['vae_site']}"
    return f"{text[0].upper()}{text[1:]}" + (f"; decoded{vae}{place}" if vae or place else "")


def _class_rows(data: Data, choice: Data) -> Iterator[tuple[Cell, ...]]:
    """A row for each plan of a class, the first with what the whole class was simulated to get, one for the rest."""
    name, run = choice["request_class"], data["runs"][0]
    spec, figures = data["scenario"]["classes"][name], run["summary"].get(name, {})
    attained = Cell("none promised")
    if spec["slo_s"] is not None:
        slo = f"SLO {exact(spec['slo_s'])} s for {exact(spec['slo_percentile'])}%"
        attained = cell(figures.get("slo_attainment"), percent, slo)
    floor = "no floor" if spec["quality_floor"] is None else f"floor {score(spec['quality_floor'])}"
    simulated = (
        cell(figures.get("latency_p95_s")),
        attained,
        cell(figures.get("quality_mean"), score, floor),
        cell(figures.get("metered_usd_per_image"), money),
        cell(figures.get("edge_energy_j_per_image")),
    )
    blank = (Cell(""),) * len(simulated)
    if not choice["parts"]:
        nothing = (Cell(choice["note"]), *_how(None), Cell(DASH, choice["note"]))
        yield (Cell(name, f"from {spec['fleet']}"), *nothing, *simulated)
    mine = [plan for plan in data["plans"] if plan["request_class"] == name and run["name"] in plan["runs"]]
    for number_of, part in enumerate(choice["parts"]):
        share = f"\n{percent(part['share'])} of its requests" if is_shared(choice) else ""
        who = Cell(name, f"from {spec['fleet']}{share}")
        idle = ranged(next(plan for plan in mine if plan["label"] == part["label"])["totals"][0])
        yield (who, Cell(describe_part(part)), *_how(part), idle, *(blank if number_of else simulated))
    if choice["turned_away"]:
        who = Cell(name, f"{percent(choice['turned_away'])} of its requests")
        yield (who, Cell("Turned away: there is no room for them"), *(Cell(""),) * 4, *blank)


def _how(part: Data | None) -> tuple[Cell, Cell, Cell]:
    """Switch step, method and degree, nodes."""
    if part is None:
        return Cell(DASH), Cell(DASH), Cell(DASH)
    step = Cell(f"{part['switch_step']} of {part['num_inference_steps']}")
    cloud = [stage for stage in part["stages"] if stage["tier"] == "cloud"]
    if not cloud:
        return step, Cell("none", "nothing in the cloud"), Cell("0")
    nodes = f"{cloud[0]['nodes']} × {cloud[0]['site']}"
    together = f"up to {part['batch_cap']} together" if part["batch_cap"] > 1 else ""
    return step, Cell(f"{cloud[0]['method']} × {cloud[0]['degree']}", together), Cell(nodes)


def pools(data: Data, run: Data) -> Block:
    """Nodes, utilisation and waits of every pool of a run."""
    rows = []
    for pool in run["pools"]:
        spec, nodes = data["scenario"]["pools"][pool["pool"]], run["replicas"].get(pool["pool"], 0)
        size = f"{spec['gpus_per_node']} × {spec['gpu']} a node"
        # pools that are not rented, or that nobody used, have no figures, and say so
        idle = {"note": "no job came" if nodes else "not rented"}
        shown = ((pool[key], show) for key, show in POOL_FIGURES)
        figures = [cell(each if each["value"] is not None else each | idle, show) for each, show in shown]
        rows.append((Cell(pool["pool"], size), Cell(number(nodes)), cell(pool["gpus"]), cell(pool["jobs"]), *figures))
    if not rows:
        return Paragraph("The scenario has no pools: everything runs at the edge.", "note")
    head = ("Pool", "Nodes", "GPUs", "Jobs", "Utilisation", "Mean wait for GPUs (s)", "p95 wait for GPUs (s)")
    return Table(f"Pools of the run {run['name']}", head, tuple(rows))


def compared(data: Data) -> Iterator[Block]:
    """What the chosen plan saves against plans of other kinds, at which loss of quality, and their figures."""
    yield Heading("What it saves", "savings")
    if data["savings"]:
        yield Bullets(tuple(saving["said"] for saving in data["savings"]))
    own = own_figures(data)
    rows = [_policy_row(own, data, None), *(_policy_row(point, data, own) for point in data["baselines"])]
    head = (
        "Policy", "Feasible", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)",
        "Edge energy (J/image)", "The chosen plan saves",
    )  # fmt: skip
    caption = f"The chosen plan against others, each with its own best pools; {BENEATH}"
    yield Table(caption, head, tuple(rows), strong=frozenset({0}), words=frozenset({0, 1}))
    absent = [name for name in EXPECTED if not any(point["name"].startswith(name) for point in data["baselines"])]
    if absent:
        yield Paragraph(f"Not compared: {listed(absent)}. No legal plan of that kind serves every class.", "note")


def own_figures(data: Data) -> dict[str, Any]:
    """The chosen plan's figures in the shape of another plan's."""
    run, figures = data["runs"][0], data["runs"][0]["summary"][ALL]
    ends = ("value", "low", "high")
    return {
        "name": run["name"],
        "known_by": "simulation",
        "feasible": data["feasible"],
        "reason": run["verdict"][0]["reason"],
        "usd_per_hour": run["usd_per_hour"],
        "latency_p95_s": [figures["latency_p95_s"][end] for end in ends],
        "slo_attainment": [figures["slo_attainment"][end] for end in ends],
        "quality": figures["quality_mean"]["value"],
        "edge_energy_j_per_image": figures["edge_energy_j_per_image"]["value"],
        "replicas": run["replicas"],
    }


def _policy_row(point: Data, data: Data, chosen: Data | None) -> tuple[Cell, ...]:
    own = "chosen" if chosen is None else point["name"]
    figures: Data = next((run["summary"][ALL] for run in data["runs"] if run["name"] == own), {})

    def noted(key: str, show: Show, figure: str) -> Cell:
        said = {key: figures.get(figure, {}).get(key, "") for key in ("note", "kind")}
        return cell({"value": point[key], **said}, show)

    return (
        Cell(point["name"]),
        holds(point),
        noted("usd_per_hour", money, "rent_usd_per_hour"),
        _interval(point["latency_p95_s"], number, figures.get("latency_p95_s")),
        _interval(point["slo_attainment"], percent, figures.get("slo_attainment")),
        noted("quality", score, "quality_mean"),
        noted("edge_energy_j_per_image", number, "edge_energy_j_per_image"),
        Cell("") if chosen is None else _saving(chosen, point),
    )


def holds(point: Data) -> Cell:
    """Whether a plan holds; the reason where it does not."""
    return answered(point["feasible"], "" if point["feasible"] else point["reason"])


def _interval(values: Sequence[float | None], show: Show, figure: Data | None = None) -> Cell:
    said = {"note": (figure or {}).get("note", ""), "kind": SIMULATED}
    return cell({"value": values[0], "low": values[1], "high": values[2], **said}, show)


def _saving(chosen: Data, other: Data) -> Cell:
    """Dollars saved in per cent, and the quality lost for them."""
    loss = "loss of quality not known"
    if chosen["quality"] is not None and other["quality"] is not None:
        change = chosen["quality"] - other["quality"]
        loss = "same quality" if abs(change) < 5e-5 else f"quality {signed(change, score)}"
    if chosen["usd_per_hour"] is None or other["usd_per_hour"] is None:
        return Cell(DASH, "no price")
    if not other["usd_per_hour"]:
        return Cell(DASH, f"it rents nothing\n{loss}")
    return Cell(percent(1.0 - chosen["usd_per_hour"] / other["usd_per_hour"]), loss)


def frontier(data: Data, pictures: Sequence[Picture]) -> Iterator[Block]:
    """Plans that no other beats in cost, latency and quality, as figure and table, and near plans of other kinds."""
    if not data["frontier"] and not data["alternatives"]:
        return
    yield Heading("Frontier and alternatives", "frontier")
    if data["frontier"]:
        yield from (picture for picture in pictures if picture.name == "frontier")
        points = sorted(
            data["frontier"], key=lambda point: (point["usd_per_hour"] or 0.0, point["latency_p95_s"][0] or 0.0)
        )
        rows: list[tuple[Cell, ...]] = [(*figures(point, data), Cell(point["known_by"])) for point in points]
        head: tuple[str, ...] = (*PLAN_COLUMNS, "Known by")
        caption = (
            "Plans that no other beats in rent, p95 latency and quality together, the cheapest first; beneath a figure "
            "its 95% interval where it was simulated"
        )
        yield folded(Table(caption, head, tuple(rows), words=frozenset({0, 5})), f"The frontier: {len(points)} plans")
    if data["alternatives"]:
        rows = []
        for point in data["alternatives"]:
            plans = "; ".join(f"{name}: {label}" for name, label in point["labels"].items())
            rows.append((Cell(point["name"]), *figures(point, data), Cell(point["known_by"]), Cell(plans)))
        head = ("Other kind of plan", *PLAN_COLUMNS, "Known by", "Plans")
        yield Table("Nearly as cheap, and of another kind", head, tuple(rows), words=frozenset({0, 1, 6, 7}))


def figures(point: Data, data: Data) -> tuple[Cell, Cell, Cell, Cell, Cell]:
    """Nodes, rent, p95 latency, share inside SLO and quality of a plan, the columns of `PLAN_COLUMNS`.

    The rent is as well known as the worst known of the nodes' prices.
    """
    nodes = ", ".join(f"{count} × {pool}" for pool, count in point["replicas"].items() if count) or "none"
    prices = [rate["kind"] for rate in data["rates"] if point["replicas"].get(rate["where"])]
    rent = cell({"value": point["usd_per_hour"], "kind": weakest(prices)}, money)
    quality = cell({"value": point["quality"], "kind": SIMULATED}, score)
    p95 = _interval(point["latency_p95_s"], number, {} if point["feasible"] else {"note": NOWHERE})
    share = _interval(point["slo_attainment"], percent)
    return Cell(nodes), rent, p95, share, quality


def evidence(data: Data) -> Iterator[Block]:
    """Every capacity plan that the search evaluated, in its order."""
    if not data["evidence"]:
        return
    yield Heading("Evidence", "evidence")
    holding = sum(point["feasible"] for point in data["evidence"])
    yield Paragraph(f"{data['evidence_said']} {holding} of them held every promise.")
    rows = []
    for point in data["evidence"]:
        known, answer = Cell(point["known_by"]), answered(point["feasible"], point["reason"])
        rows.append((Cell(point["name"]), *figures(point, data), known, answer))
    head = ("Name", *PLAN_COLUMNS, "Known by", "Feasible")
    table = Table(f"In the order of the search; {BENEATH}", head, tuple(rows), words=frozenset({0, 1, 6, 7}))
    yield folded(table, f"All {len(rows)} in the order of the search")
    yield Paragraph(CHECK, "note")


def refused(data: Data) -> Iterator[Block]:
    """Plans of the search space that cannot run, by class and reason."""
    yield Heading("Refused plans", "refused")
    if not data["refusals"]:
        yield Paragraph("No plan of the search space was refused.", "note")
        return
    rows = tuple((Cell(name), Cell(reason), Cell(number(count))) for name, reason, count in data["refusals"])
    yield Table("Plans that cannot run, by reason", ("Request class", "Reason", "Plans"), rows, words=frozenset({0, 1}))


def folded(table: Table, summary: str) -> Block:
    """A table; a long one is for the reader to open."""
    return table if len(table.rows) <= FEW else Fold(summary, (table,))
