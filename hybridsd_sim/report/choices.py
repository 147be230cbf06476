"""The chosen plan and what it was compared with: a sentence, what each class gets, what each policy costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.breakdown import weakest
from hybridsd_sim.report.markup import MARKS, Block, Cell, Heading, Paragraph, Table, answered, cell
from hybridsd_sim.report.numbers import DASH, MINUS, Show, clip, listed, number, percent, reach
from hybridsd_sim.report.tally import SIMULATED

Data = Mapping[str, Any]
BENEATH = "beneath a figure its 95% interval"
LEGEND = (
    f"{MARKS['measured']} measured by this project's executors; {MARKS['quoted']} quoted from a publication, datasheet "
    f"or price list; {MARKS['modelled']} modelled: derived from these by a stated rule, or simulated."
)
EXPECTED = ("cloud only", "edge only", "static switch")
"""Baselines that a capacity plan is held against wherever they can serve every class."""
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
    rows = [_class_row(data, choice, run["summary"].get(choice["request_class"], {})) for choice in data["chosen"]]
    head = (
        "Request class", "Plan", "Switch step", "Method × degree", "Nodes", "Idle latency (s)", "p95 latency (s)",
        "Inside SLO", "Quality (CLIP)", "Metered cost (US$/image)", "Edge energy (J/image)",
    )  # fmt: skip
    caption = "Each request class; beneath the idle latency its 90% interval, beneath other figures their 95% intervals"
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
        alike.setdefault(_to_do(choice), []).append(choice["request_class"])
    return f"{start}: {'; '.join(what.format(listed(names)) for what, names in alike.items())}."


def _to_do(choice: Data) -> str:
    """What to do with a class, or with several alike."""
    stages = choice["stages"]
    if not stages:
        return "no legal plan serves {}"
    if len(stages) > 1:
        return f"hand {{}} over after step {choice['switch_step']} of {choice['num_inference_steps']}"
    place = "at the edge" if stages[0]["tier"] == "edge" else f"on {stages[0]['site']}"
    return f"run every step of {{}} {place}"


def in_words(choice: Data) -> str:
    """A class's plan in words: which steps, of which model, where, and how."""
    if not choice["stages"]:
        return str(choice["note"])
    total = choice["num_inference_steps"]
    stages = [f"{_steps(stage, total)} steps of {stage['model']} {_where(stage)}" for stage in choice["stages"]]
    text = ", then ".join(stages)
    return f"{text[0].upper()}{text[1:]}{_decoded(choice)}"


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


def _decoded(choice: Data) -> str:
    """Where and by what the image is decoded, if not as usual: by the model's own VAE, where the last step ran."""
    vae = "" if choice["vae"] == "autoencoder-kl" else f" by {choice['vae']}"
    place = "" if choice["vae_site"] == choice["stages"][-1]["site"] else f" on {choice['vae_site']}"
    return f"; decoded{vae}{place}" if vae or place else ""


def _class_row(data: Data, choice: Data, figures: Data) -> tuple[Cell, ...]:
    name = choice["request_class"]
    spec = data["scenario"]["classes"][name]
    return (
        Cell(name, f"from {spec['fleet']}"),
        Cell(in_words(choice)),
        *_how(choice),
        _idle(data, name),
        cell(figures.get("latency_p95_s")),
        *_promised(spec, figures),
        cell(figures.get("metered_usd_per_image")),
        cell(figures.get("edge_energy_j_per_image")),
    )


def _how(choice: Data) -> tuple[Cell, Cell, Cell]:
    """Switch step, method and degree, nodes."""
    if not choice["stages"]:
        return Cell(DASH), Cell(DASH), Cell(DASH)
    step = Cell(f"{choice['switch_step']} of {choice['num_inference_steps']}")
    cloud = [stage for stage in choice["stages"] if stage["tier"] == "cloud"]
    if not cloud:
        return step, Cell("none", "nothing in the cloud"), Cell("0")
    nodes = f"{cloud[0]['nodes']} × {cloud[0]['site']}"
    return step, Cell(f"{cloud[0]['method']} × {cloud[0]['degree']}"), Cell(nodes)


def _idle(data: Data, name: str) -> Cell:
    """The latency of a class's plan when nobody else is there."""
    own, chosen = data["plans"], data["runs"][0]["name"]
    plan = next((plan for plan in own if plan["request_class"] == name and chosen in plan["runs"]), None)
    return Cell(DASH, "no legal plan") if plan is None else ranged(plan["totals"][0])


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


def compared(data: Data) -> Iterator[Block]:
    """The chosen plan beside the baselines, what it saves at which loss, and other plans nearly as cheap."""
    yield Heading("Compared with", "compared")
    own = _own_figures(data)
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
    if data["alternatives"]:
        yield _nearly_as_good(data)


def _own_figures(data: Data) -> dict[str, Any]:
    """The chosen plan's figures in the shape of a baseline's."""
    run, figures = data["runs"][0], data["runs"][0]["summary"][ALL]
    ends = ("value", "low", "high")
    return {
        "name": run["name"],
        "feasible": data["feasible"],
        "reason": run["verdict"][0]["reason"],
        "usd_per_hour": run["usd_per_hour"],
        "latency_p95_s": [figures["latency_p95_s"][end] for end in ends],
        "slo_attainment": [figures["slo_attainment"][end] for end in ends],
        "quality": figures["quality_mean"]["value"],
        "edge_energy_j_per_image": figures["edge_energy_j_per_image"]["value"],
    }


def _policy_row(point: Data, data: Data, chosen: Data | None) -> tuple[Cell, ...]:
    own = "chosen" if chosen is None else point["name"]
    figures: Data = next((run["summary"][ALL] for run in data["runs"] if run["name"] == own), {})

    def noted(key: str, show: Show, figure: str) -> Cell:
        said = {key: figures.get(figure, {}).get(key, "") for key in ("note", "kind")}
        return cell({"value": point[key], **said}, show)

    return (
        Cell(point["name"]),
        answered(point["feasible"], "" if point["feasible"] else point["reason"]),
        noted("usd_per_hour", number, "rent_usd_per_hour"),
        _interval(point["latency_p95_s"], number, figures.get("latency_p95_s")),
        _interval(point["slo_attainment"], percent, figures.get("slo_attainment")),
        noted("quality", clip, "quality_mean"),
        noted("edge_energy_j_per_image", number, "edge_energy_j_per_image"),
        Cell("") if chosen is None else _saving(chosen, point),
    )


def _interval(values: Sequence[float | None], show: Show, figure: Data | None = None) -> Cell:
    said = {"note": (figure or {}).get("note", ""), "kind": SIMULATED}
    return cell({"value": values[0], "low": values[1], "high": values[2], **said}, show)


def _saving(chosen: Data, other: Data) -> Cell:
    """Dollars saved in per cent, and the quality lost for them."""
    loss = _loss(chosen["quality"], other["quality"])
    if chosen["usd_per_hour"] is None or other["usd_per_hour"] is None:
        return Cell(DASH, "no price")
    if not other["usd_per_hour"]:
        return Cell(DASH, f"it rents nothing\n{loss}")
    saved = 1.0 - chosen["usd_per_hour"] / other["usd_per_hour"]
    return Cell(f"{100 * saved:.1f} %".replace("-", MINUS), loss)


def _loss(chosen: float | None, other: float | None) -> str:
    if chosen is None or other is None:
        return "loss of quality not known"
    change = chosen - other
    return "same quality" if abs(change) < 5e-5 else f"quality {MINUS if change < 0 else '+'}{abs(change):.4f}"


def _nearly_as_good(data: Data) -> Table:
    rows = []
    for point in data["alternatives"]:
        plans = "; ".join(f"{name}: {label}" for name, label in point["labels"].items())
        rent, latency = _rent(point, data), _interval(point["latency_p95_s"], number)
        quality = cell({"value": point["quality"], "kind": SIMULATED}, clip)
        rows.append((Cell(point["name"]), _nodes(point), rent, latency, quality, Cell(plans)))
    head = ("Other kind of plan", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Quality (CLIP)", "Plans")
    caption = "Nearly as cheap, by formula and not simulated (modelled)"
    return Table(caption, head, tuple(rows), words=frozenset({0, 1, 5}))


def _rent(point: Data, data: Data) -> Cell:
    """What a plan's nodes cost an hour: as well known as the worst known of their prices."""
    kinds = [rate["kind"] for rate in data["rates"] if point["replicas"].get(rate["where"])]
    return cell({"value": point["usd_per_hour"], "kind": weakest(kinds)})


def _nodes(point: Data) -> Cell:
    return Cell(", ".join(f"{count} × {pool}" for pool, count in point["replicas"].items() if count) or "none")


def simulated(data: Data) -> Table:
    """Every capacity plan that the search simulated, in its order."""
    rows = []
    for point in data["evidence"]:
        rent, latency = _rent(point, data), _interval(point["latency_p95_s"], number)
        share, answer = _interval(point["slo_attainment"], percent), answered(point["feasible"], point["reason"])
        rows.append((Cell(point["name"]), _nodes(point), rent, latency, share, answer))
    head = ("Name", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Feasible")
    return Table("In the order of the search", head, tuple(rows), words=frozenset({0, 1, 5}))
