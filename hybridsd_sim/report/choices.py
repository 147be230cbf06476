"""The chosen plan: in a sentence, how far from the cheapest it can be, what each class gets, and how busy pools are.

A class may have several plans, each for a share of its requests; what is missing from their sum is turned away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridsd_sim.report.markup import MARKS, Block, Cell, Heading, Paragraph, Table, cell
from hybridsd_sim.report.numbers import DASH, Show, clip, listed, number, percent, reach

Data = Mapping[str, Any]
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
    """The chosen plan in one sentence: what to rent, and which classes are served alike."""
    run = data["runs"][0]
    rented = [f"{count} {name} node{'s' * (count > 1)}" for name, count in run["replicas"].items() if count]
    price = "an unknown price" if run["usd_per_hour"] is None else f"US$ {number(run['usd_per_hour'])} an hour"
    start = f"Rent {listed(rented)} for {price}" if rented else "Rent nothing"
    alike: dict[str, list[str]] = {}
    for choice in data["chosen"]:
        for what, who in _to_do(choice):
            alike.setdefault(what, []).append(who)
    return f"{start}: {'; '.join(what.format(listed(names)) for what, names in alike.items())}."


def _to_do(choice: Data) -> Iterator[tuple[str, str]]:
    """What to do with a class, or with several alike, and who is meant: the class or a share of it."""
    name = choice["request_class"]
    if not choice["parts"]:
        yield "no legal plan serves {}", name
    for part in choice["parts"]:
        yield _served(part), f"{percent(part['share'])} of {name}" if is_shared(choice) else name
    if choice["turned_away"]:
        yield "turn {} away", f"{percent(choice['turned_away'])} of {name}"


def _served(part: Data) -> str:
    stages = part["stages"]
    if len(stages) > 1:
        return f"hand {{}} over after step {part['switch_step']} of {part['num_inference_steps']}"
    place = "at the edge" if stages[0]["tier"] == "edge" else f"on {stages[0]['site']}"
    return f"run every step of {{}} {place}"


def is_shared(choice: Data) -> bool:
    """Whether a class has anything else than one plan for all of its requests."""
    return len(choice["parts"]) > 1 or choice["turned_away"] > 0


def in_words(part: Data) -> str:
    """A plan in words: which steps, of which model, where, and how."""
    total = part["num_inference_steps"]
    together = f", up to {part['batch_cap']} together" if part["batch_cap"] > 1 else ""
    stages = [
        f"{_steps(stage, total)} steps of {stage['model']} {_where(stage)}"
        f"{together if stage['tier'] == 'cloud' else ''}"
        for stage in part["stages"]
    ]
    text = ", then ".join(stages)
    return f"{text[0].upper()}{text[1:]}{_decoded(part)}"


def _steps(stage: Data, total: int) -> str:
    count = stage["stop"] - stage["start"]
    if count == total:
        return f"all {total}"
    return f"the other {count}" if stage["start"] else f"first {count} of {total}"


def _where(stage: Data) -> str:
    if stage["tier"] == "edge":
        return f"on the user's {stage['device']}"
    options = "".join(f", {key}" if value is True else f", {key} {value}" for key, value in stage["options"].items())
    how = "" if stage["degree"] == 1 else f" by {stage['method']} over {stage['degree']} GPUs{options}"
    device = "" if stage["device"] == stage["site"] else f" ({stage['device']})"
    return f"on {stage['site']}{device}{how}"


def _decoded(part: Data) -> str:
    """Where and by what the image is decoded, if not as usual: by the model's own VAE, where the last step ran."""
    vae = "" if part["vae"] == "autoencoder-kl" else f" by {part['vae']}"
    place = "" if part["vae_site"] == part["stages"][-1]["site"] else f" on {part['vae_site']}"
    return f"; decoded{vae}{place}" if vae or place else ""


def _class_rows(data: Data, choice: Data) -> Iterator[tuple[Cell, ...]]:
    """A row for each plan of a class, the first with what the whole class was simulated to get, one for the rest."""
    name = choice["request_class"]
    spec, figures = data["scenario"]["classes"][name], data["runs"][0]["summary"].get(choice["request_class"], {})
    simulated = (
        cell(figures.get("latency_p95_s")),
        *_promised(spec, figures),
        cell(figures.get("metered_usd_per_image")),
        cell(figures.get("edge_energy_j_per_image")),
    )
    blank = (Cell(""),) * len(simulated)
    if not choice["parts"]:
        nothing = (Cell(choice["note"]), *_how(None), Cell(DASH, choice["note"]))
        yield (Cell(name, f"from {spec['fleet']}"), *nothing, *simulated)
    for number_of, part in enumerate(choice["parts"]):
        share = f"\n{percent(part['share'])} of its requests" if is_shared(choice) else ""
        who = Cell(name, f"from {spec['fleet']}{share}")
        yield (who, Cell(in_words(part)), *_how(part), _idle(data, name, part), *(blank if number_of else simulated))
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


def _idle(data: Data, name: str, part: Data) -> Cell:
    """The latency of a plan of a class when nobody else is there."""
    chosen = data["runs"][0]["name"]
    mine = (plan for plan in data["plans"] if plan["request_class"] == name and chosen in plan["runs"])
    return ranged(next(plan for plan in mine if plan["label"] == part["label"])["totals"][0])


def ranged(figure: Data) -> Cell:
    """A figure with its 90% interval, and that in per cent, beneath."""
    return cell(figure, number, reach(figure))


def _promised(spec: Data, figures: Data) -> tuple[Cell, Cell]:
    """Attainment and quality, each with what was promised."""
    floor = "no floor" if spec["quality_floor"] is None else f"floor {clip(spec['quality_floor'])}"
    quality = cell(figures.get("quality_mean"), clip, floor)
    if spec["slo_s"] is None:
        return Cell("none promised"), quality
    slo = f"SLO {spec['slo_s']:g} s for {spec['slo_percentile']:g} %"
    return cell(figures.get("slo_attainment"), percent, slo), quality


def pools(data: Data, run: Data) -> Block:
    """Nodes, utilisation and waits of every pool of a run."""
    rows = []
    for pool in run["pools"]:
        spec, nodes = data["scenario"]["pools"][pool["pool"]], run["replicas"].get(pool["pool"], 0)
        size = f"{spec['gpus_per_node']} × {spec['gpu']} a node"
        figures = [cell(_or_idle(pool[key], nodes), show) for key, show in POOL_FIGURES]
        rows.append((Cell(pool["pool"], size), Cell(number(nodes)), cell(pool["gpus"]), cell(pool["jobs"]), *figures))
    if not rows:
        return Paragraph("The scenario has no pools: everything runs at the edge.", "note")
    head = ("Pool", "Nodes", "GPUs", "Jobs", "Utilisation", "Mean wait for GPUs (s)", "p95 wait for GPUs (s)")
    return Table(f"Pools of the run {run['name']}", head, tuple(rows))


def _or_idle(figure: Data, nodes: int) -> Data:
    """Pools that are not rented, or that nobody used, have no figures, and say so."""
    return figure if figure["value"] is not None else {**figure, "note": "no job came" if nodes else "not rented"}
