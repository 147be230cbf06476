"""The pages of a report, block by block: verdict first, then the plan, what it was compared with, figures, provenance.

Reads the plain data of `contents` and writes blocks of `markup`; knows neither HTML nor Markdown. Words and the order of
sections are decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridsd_sim.metrics import ALL
from hybridsd_sim.report.glossary import GLOSSARY, NAMES
from hybridsd_sim.report.markup import (
    DASH,
    MINUS,
    Bullets,
    Cards,
    Cell,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
    Terms,
    cell,
    listed,
    number,
    percent,
)

Data = Mapping[str, Any]
QUESTIONS = {"feasible": "Feasible", "stable": "Stable", "converged": "Converged", "in_domain": "In domain"}


def clip(score: float | None) -> str:
    """A CLIP score with the four decimals of the published tables."""
    return DASH if score is None else f"{score:.4f}"


def plan_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Any]:
    """The report of a capacity plan, verdict first."""
    yield Heading(f"Capacity plan: {data['scenario']['name']}", "top", 1)
    yield from _verdict(data["runs"][0], feasible=data["feasible"])
    yield _conditions(data, provenance)
    yield from _plan(data)
    yield from _compared(data)
    if data["explanation"]:
        yield Heading("Why this plan", "why")
        yield Bullets(tuple(data["explanation"]))
    yield from _figures(pictures)
    yield from _details(data)
    yield from _provenance(data, provenance)
    yield from _refused(data)
    yield from _words()


def simulation_page(data: Data, provenance: Data, pictures: Sequence[Picture]) -> Iterator[Any]:
    """The report of simulations side by side: a verdict for each, then their figures."""
    yield Heading(f"Simulation: {data['scenario']['name']}", "top", 1)
    yield Heading("Verdicts", "verdict")
    yield _verdicts(data["runs"])
    yield _conditions(data, provenance)
    yield Heading("Policies side by side", "compared")
    for name in [ALL, *data["scenario"]["classes"]] if len(data["scenario"]["classes"]) > 1 else [ALL]:
        yield _side_by_side(data, name)
    yield from _figures(pictures)
    yield from _details(data)
    yield from _provenance(data, provenance)
    yield from _words()


def _conditions(data: Data, provenance: Data) -> Paragraph:
    """How the run was made, in small print."""
    scenario = data["scenario"]
    runs = f"{scenario['replications']} replication{'s' * (scenario['replications'] > 1)}"
    counted = f"{scenario['horizon_s'] - scenario['warmup_s']:,g} s each after {scenario['warmup_s']:,g} s of warm-up"
    text = f"From {runs} of {counted}, seed {scenario['seed']}; run {provenance['run_id']}."
    return Paragraph(text, "note")


def _verdict(run: Data, *, feasible: bool) -> Iterator[Any]:
    yield Heading("Verdict", "verdict")
    doubts = [QUESTIONS[f["name"]].lower() for f in run["verdict"] if not f["ok"] and f["name"] != "feasible"]
    if not feasible:
        text = "No plan that was found keeps every promise. What follows is the one that misses least."
    elif doubts:
        text = f"The plan keeps every promise, with reservations: not {', not '.join(doubts)}."
    else:
        text = "The plan keeps every promise, and the simulation behind it can be relied on."
    yield Paragraph(text, "lead")
    yield Cards(tuple((QUESTIONS[f["name"]], f["ok"], f["reason"]) for f in run["verdict"]))


def _verdicts(runs: Sequence[Data]) -> Table:
    rows = [
        (
            Cell(run["name"]),
            *(Cell("yes" if f["ok"] else "no", f["reason"], "yes" if f["ok"] else "no") for f in run["verdict"]),
        )
        for run in runs
    ]
    head = ("Policy", *(QUESTIONS[f["name"]] for f in runs[0]["verdict"]))
    return Table("Each policy's verdict", head, tuple(rows), words=frozenset(range(len(head))))


def _plan(data: Data) -> Iterator[Any]:
    yield Heading("The plan", "plan")
    yield Paragraph(sentence(data), "lead")
    run = data["runs"][0]
    rows = [_class_row(data, choice, run["summary"].get(choice["request_class"], {})) for choice in data["chosen"]]
    head = (
        "Request class", "Plan", "Switch step", "Method × degree", "Nodes", "p95 latency (s)", "SLO (s)", "Inside SLO",
        "Quality (CLIP)", "Metered cost (US$/image)", "Edge energy (J/image)",
    )  # fmt: skip
    yield Table(
        "Each request class; beneath a figure its 95% interval", head, tuple(rows), words=frozenset({0, 1, 3, 4})
    )
    yield _pools(data, run)


def sentence(data: Data) -> str:
    """The chosen plan in one sentence."""
    run = data["runs"][0]
    rented = [f"{count} {name} node{'s' * (count > 1)}" for name, count in run["replicas"].items() if count]
    price = "an unknown price" if run["usd_per_hour"] is None else f"US$ {number(run['usd_per_hour'])} an hour"
    start = f"Rent {listed(rented)} for {price}" if rented else "Rent nothing"
    return f"{start}: {'; '.join(_in_brief(choice) for choice in data['chosen'])}."


def _in_brief(choice: Data) -> str:
    name, stages = choice["request_class"], choice["stages"]
    if not stages:
        return f"{name} has no legal plan"
    if len(stages) == 1:
        place = "at the edge" if stages[0]["tier"] == "edge" else f"on {stages[0]['site']}"
        return f"{name} does every step {place}"
    return f"{name} is handed over after step {choice['switch_step']} of {choice['num_inference_steps']}"


def in_words(choice: Data) -> str:
    """A class's plan in words: which steps, of which model, where, and how."""
    if not choice["stages"]:
        return choice["note"]
    total = choice["num_inference_steps"]
    parts = []
    for stage in choice["stages"]:
        count = stage["stop"] - stage["start"]
        steps = (
            f"all {total}"
            if count == total
            else f"first {count} of {total}"
            if not stage["start"]
            else f"the other {count}"
        )
        parts.append(f"{steps} steps of {stage['model']} {_where(stage)}")
    text = ", then ".join(parts)
    return f"{text[0].upper()}{text[1:]}{_decoded(choice)}"


def _decoded(choice: Data) -> str:
    """Where and by what the image is decoded, if not as usual: by the model's own VAE, where the last step ran."""
    vae = "" if choice["vae"] == "autoencoder-kl" else f" by {choice['vae']}"
    place = "" if choice["vae_site"] == choice["stages"][-1]["site"] else f" on {choice['vae_site']}"
    return f"; decoded{vae}{place}" if vae or place else ""


def _where(stage: Data) -> str:
    if stage["tier"] == "edge":
        return f"on the user's {stage['device']}"
    options = "".join(f", {key} {value}" for key, value in stage["options"].items())
    how = "" if stage["degree"] == 1 else f" by {stage['method']} over {stage['degree']} GPUs{options}"
    return f"on {stage['site']} ({stage['device']}){how}"


def _class_row(data: Data, choice: Data, figures: Data) -> tuple[Cell, ...]:
    name = choice["request_class"]
    spec = data["scenario"]["classes"][name]
    cloud = [stage for stage in choice["stages"] if stage["tier"] == "cloud"]
    floor = "no floor" if spec["quality_floor"] is None else f"floor {clip(spec['quality_floor'])}"
    quality = cell(figures.get("quality_mean"), clip, floor)
    return (
        Cell(name, f"from {spec['fleet']}"),
        Cell(in_words(choice)),
        Cell(f"{choice['switch_step']} of {choice['num_inference_steps']}") if choice["stages"] else Cell(DASH),
        Cell(f"{cloud[0]['method']} × {cloud[0]['degree']}") if cloud else Cell("none", "nothing in the cloud"),
        Cell(f"{cloud[0]['nodes']} × {cloud[0]['site']}") if cloud else Cell("0"),
        cell(figures.get("latency_p95_s")),
        Cell("none") if spec["slo_s"] is None else Cell(f"{spec['slo_s']:g}", f"for {spec['slo_percentile']:g} %"),
        Cell("none promised") if spec["slo_s"] is None else cell(figures.get("slo_attainment"), percent),
        quality,
        cell(figures.get("metered_usd_per_image")),
        cell(figures.get("edge_energy_j_per_image")),
    )


def _pools(data: Data, run: Data) -> Any:
    rows = []
    for pool in run["pools"]:
        spec, nodes = data["scenario"]["pools"][pool["pool"]], run["replicas"].get(pool["pool"], 0)
        size = f"{spec['gpus_per_node']} × {spec['gpu']} a node"
        figures = [cell(_or_idle(pool[key], nodes), show) for key, show in (
            ("utilisation", percent), ("queue_wait_mean_s", number), ("queue_wait_p95_s", number))]  # fmt: skip
        rows.append((Cell(pool["pool"], size), Cell(number(nodes)), cell(pool["gpus"]), cell(pool["jobs"]), *figures))
    if not rows:
        return Paragraph("The scenario has no pools: everything runs at the edge.", "note")
    head = ("Pool", "Nodes", "GPUs", "Jobs", "Utilisation", "Mean wait for GPUs (s)", "p95 wait for GPUs (s)")
    return Table(f"Pools of the run {run['name']}", head, tuple(rows))


def _or_idle(figure: Data, nodes: int) -> Data:
    """Pools that are not rented, or that nobody used, have no figures, and say so."""
    if figure["value"] is not None:
        return figure
    return {**figure, "note": "no job came here" if nodes else "not rented"}


def _compared(data: Data) -> Iterator[Any]:
    yield Heading("Compared with", "compared")
    if not data["baselines"]:
        yield Paragraph("No other policy can serve every class, so there is nothing to compare with.", "note")
        return
    run, everyone = data["runs"][0], data["runs"][0]["summary"][ALL]
    own = {
        "name": run["name"], "feasible": data["feasible"], "reason": run["verdict"][0]["reason"],
        "usd_per_hour": run["usd_per_hour"], "quality": everyone["quality_mean"]["value"],
        "edge_energy_j_per_image": everyone["edge_energy_j_per_image"]["value"],
        **{key: [everyone[key][end] for end in ("value", "low", "high")] for key in ("latency_p95_s", "slo_attainment")},
    }  # fmt: skip
    rows = [
        _policy_row(own, None, everyone),
        *(_policy_row(b, own, _figures_of(data, b["name"])) for b in data["baselines"]),
    ]
    head = (
        "Policy", "Feasible", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Quality (CLIP)", "Edge energy (J/image)",
        "The chosen plan saves",
    )  # fmt: skip
    caption = "The chosen plan against others, each with its own best pools; beneath a figure its 95% interval"
    yield Table(caption, head, tuple(rows), strong=frozenset({0}), words=frozenset({0, 1}))
    if data["alternatives"]:
        yield _nearly_as_good(data)


def _figures_of(data: Data, name: str) -> Data:
    return next((run["summary"][ALL] for run in data["runs"] if run["name"] == name), {})


def _policy_row(point: Data, chosen: Data | None, figures: Data) -> tuple[Cell, ...]:
    def noted(value: float | None, show: Any, key: str) -> Cell:
        why = figures.get(key, {}).get("note", "")
        return Cell(show(value), (why or "not known") if value is None else "")

    answer = "yes" if point["feasible"] else "no"
    return (
        Cell(point["name"]),
        Cell(answer, "" if point["feasible"] else point["reason"], answer),
        noted(point["usd_per_hour"], number, "rent_usd_per_hour"),
        _interval(point["latency_p95_s"], number, figures.get("latency_p95_s")),
        _interval(point["slo_attainment"], percent, figures.get("slo_attainment")),
        noted(point["quality"], clip, "quality_mean"),
        noted(point["edge_energy_j_per_image"], number, "edge_energy_j_per_image"),
        Cell("") if chosen is None else _saving(chosen, point),
    )


def _interval(values: Sequence[float | None], show: Any, figure: Data | None = None) -> Cell:
    note = (figure or {}).get("note", "")
    return cell({"value": values[0], "low": values[1], "high": values[2], "note": note}, show)


def _saving(chosen: Data, other: Data) -> Cell:
    """Dollars saved in per cent, at which loss of quality."""
    loss = _loss(chosen["quality"], other["quality"])
    if chosen["usd_per_hour"] is None or other["usd_per_hour"] is None:
        return Cell(DASH, "no price")
    if not other["usd_per_hour"]:
        return Cell(DASH, f"it rents nothing; {loss}")
    saved = 1.0 - chosen["usd_per_hour"] / other["usd_per_hour"]
    return Cell(f"{100 * saved:.1f} %".replace("-", MINUS), loss)


def _loss(chosen: float | None, other: float | None) -> str:
    if chosen is None or other is None:
        return "loss of quality not known"
    change = chosen - other
    return "same quality" if abs(change) < 5e-5 else f"quality {MINUS if change < 0 else '+'}{abs(change):.4f}"


def _nearly_as_good(data: Data) -> Table:
    rows = [
        (
            Cell(point["name"]), Cell(", ".join(f"{n} × {pool}" for pool, n in point["replicas"].items() if n) or "none"),
            Cell(number(point["usd_per_hour"])), _interval(point["latency_p95_s"], number), Cell(clip(point["quality"])),
            Cell("; ".join(f"{name}: {label}" for name, label in point["labels"].items())),
        )
        for point in data["alternatives"]
    ]  # fmt: skip
    head = ("Other kind of plan", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Quality (CLIP)", "Plans")
    return Table(
        "Nearly as cheap, by formula and not simulated (modelled)", head, tuple(rows), words=frozenset({0, 1, 5})
    )


def _side_by_side(data: Data, name: str) -> Table:
    keys = (("latency_p50_s", number), ("latency_p95_s", number), ("slo_attainment", percent), ("goodput_per_s", number),
            ("quality_mean", clip), ("gpu_seconds_per_image", number), ("metered_usd_per_image", number),
            ("edge_energy_j_per_image", number))  # fmt: skip
    rows = []
    for run in data["runs"]:
        rent = Cell(
            number(run["usd_per_hour"]), "" if run["usd_per_hour"] is not None else "no price for a rented pool"
        )
        rows.append((Cell(run["name"]), rent, *(cell(run["summary"][name][key], show) for key, show in keys)))
    head = ("Policy", "Rent, all classes (US$/h)", *(NAMES[key] for key, _ in keys))
    title = "All requests" if name == ALL else f"Request class {name}"
    return Table(f"{title}; beneath a figure its 95% interval", head, tuple(rows))


def _figures(pictures: Sequence[Picture]) -> Iterator[Any]:
    yield Heading("Figures", "figures")
    yield from pictures
    if not pictures:
        yield Paragraph("There is nothing to draw: no request was served.", "note")


def _details(data: Data) -> Iterator[Any]:
    yield Heading("Every figure", "details")
    yield Paragraph(
        "The same figures stand in summary.csv and pools.csv, one per line, with unit and interval.", "note"
    )
    for run in data["runs"]:
        names = list(run["summary"])
        rows = [
            (Cell(NAMES.get(key, key)), *(cell(run["summary"][name][key], shower(key)) for name in names), Cell(unit))
            for key, unit in ((key, figure["unit"]) for key, figure in run["summary"][names[-1]].items())
        ]
        table = Table(
            f"Run {run['name']}", ("Figure", *names, "Unit"), tuple(rows), words=frozenset({0, len(names) + 1})
        )
        turned_away = [f"{count} {cls} requests unserved: {reason}" for cls, reason, count in run["unserved"]]
        yield Fold(f"Run {run['name']}", (table, *([Bullets(tuple(turned_away))] if turned_away else [])))
    if data.get("evidence"):
        yield Fold(f"All {len(data['evidence'])} capacity plans that were simulated", (_evidence(data),))


def shower(key: str) -> Any:
    """How a figure of a summary is written."""
    return percent if key in {"unserved_share", "slo_attainment"} else clip if key == "quality_mean" else number


def _evidence(data: Data) -> Table:
    rows = [
        (
            Cell(point["name"]), Cell(", ".join(f"{n} × {pool}" for pool, n in point["replicas"].items() if n) or "none"),
            Cell(number(point["usd_per_hour"])), _interval(point["latency_p95_s"], number),
            _interval(point["slo_attainment"], percent), Cell("yes" if point["feasible"] else "no", point["reason"],
                                                              "yes" if point["feasible"] else "no"),
        )
        for point in data["evidence"]
    ]  # fmt: skip
    head = ("Name", "Nodes", "Rent (US$/h)", "p95 latency (s)", "Inside SLO", "Feasible")
    return Table("In the order of the search", head, tuple(rows), words=frozenset({0, 1, 5}))


def _provenance(data: Data, provenance: Data) -> Iterator[Any]:
    yield Heading("Where the numbers come from", "provenance")
    sources = list(dict.fromkeys(source for part in data["parts"] for source in part["sources"]))
    rows = tuple(_part_row(part, sources) for part in data["parts"])
    head = ("Component", "Request class", "Where", "Value", "90% interval", "Kind", "Source")
    if rows:
        caption = "Parts behind the plans, one request on an idle fleet"
        yield Table(caption, head, rows, words=frozenset({0, 1, 2, 5, 6}))
        yield Heading("Sources", "sources", 3)
        yield Bullets(tuple(sources), numbered=True)
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(provenance["libraries"].items()))
    yield Terms(
        (
            ("Made by", f"{provenance['package']} {provenance['version']} with {libraries}"),
            ("Run", provenance["run_id"]),
            ("Scenario digest", provenance["scenario_digest"]),
            ("Profiles digest", provenance["profiles_digest"] or "not recorded"),
            ("Overrides", "; ".join(provenance["overrides_applied"]) or "none"),
        )
    )


def _part_row(part: Data, sources: Sequence[str]) -> tuple[Cell, ...]:
    show = clip if part["unit"] == "CLIP score" else number
    note = part["note"] if part["within"] else f"outside what was timed: {part['note']}"
    low, high = part["low"], part["high"]
    return (
        Cell(part["component"].replace("_", " ")),
        Cell(part["request_class"]),
        Cell(part["where"] or "published tables"),
        Cell(DASH, part["note"]) if part["value"] is None else Cell(f"{show(part['value'])} {part['unit']}"),
        Cell("none given" if low is None or high is None else f"{show(low)}–{show(high)} {part['unit']}"),
        Cell(part["kind"], mark=part["kind"]),
        Cell(
            "" if part["sources"] else "this model's own rule",
            note,
            sources=tuple(sources.index(s) + 1 for s in part["sources"]),
        ),
    )


def _refused(data: Data) -> Iterator[Any]:
    yield Heading("Refused plans", "refused")
    if not data["refusals"]:
        yield Paragraph("No plan of the search space was refused.", "note")
        return
    rows = tuple((Cell(name), Cell(reason), Cell(number(count))) for name, reason, count in data["refusals"])
    yield Table("Plans that cannot run, by reason", ("Request class", "Reason", "Plans"), rows, words=frozenset({0, 1}))


def _words() -> Iterator[Any]:
    yield Heading("Words", "words")
    yield Terms(GLOSSARY)
