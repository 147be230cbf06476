"""Results as text for the terminal and as data for its JSON: scenarios, predictions, simulations, plans, `verify`.

Returns strings and plain data; prints nothing. Simulations and capacity plans are shown from what their report saved
(`read_run`), so that the terminal, the JSON and the pages say the same. Columns that do not fit a width stand in
further blocks, under the same first columns; words are not broken. Text is plain ASCII as far as names are: dashes and
minus signs become hyphens, so that it can be searched and piped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from textwrap import TextWrapper, wrap
from typing import TYPE_CHECKING, Any

from hybridsd_sim.estimate import DASH, MINUS, Show, exact, interval, money, number, percent, scaled, score, signed
from hybridsd_sim.reporting.labels import Data

if TYPE_CHECKING:
    from hybridsd_sim.scenario import Scenario


GAP = 2

LONGEST_WORD = 36
"""Only longer words, such as paths, may be broken."""

SHOWN_POINTS = 8
"""Points of the frontier that fit a terminal; the report has all."""

TIE = "\N{NO-BREAK SPACE}"
"""Stands for a space between a key and its figure, where a table does not wrap."""

PLAIN = str.maketrans({DASH: "-", MINUS: "-", "\N{EN DASH}": "-", TIE: " "})
"""Typographic marks of `estimate` as every terminal and `grep` know them."""

BRACKETS = "In brackets: where the figure would fall in 95 of 100 repetitions of the run."

FIGURES = {
    "latency_p95_s": "p95 latency s",
    "slo_attainment": "inside SLO",
    "goodput_per_s": "goodput per s",
    "quality_mean": "CLIP",
    "gpu_seconds_per_image": "GPU s per image",
    "edge_energy_j_per_image": "edge J per image",
    "rent_usd_per_hour": "rent USD/h",
}
"""The figures of a run that a terminal shows, with their headings."""

SHARES = frozenset({"slo_attainment", "unserved_share", "utilisation"})
"""Figures that are shares of 1, written as per cent."""

LARGE = (("bytes_per_s", "B/s"), ("bytes", "B"), ("flops", "FLOP"))
"""What names of figures hold that are written with a prefix, and their units."""

VERIFIED = (
    "table", "rows", "fitted", "error", "worst", "in interval", "rows held out", "error held out", "worst held out",
    "in interval held out", "order",
)  # fmt: skip
"""Columns of the table of `verify`."""

SHOWN_CASES = 3
"""Rows named with one reason; the JSON has all."""

VERIFICATION_LEGEND = (
    "error: mean of |predicted / published - 1|.",
    "held out: with the row's own group (a resolution, a model or a device) left out of all rows and fits.",
    "rows held out: those that can still be predicted then; the figures held out are over these alone.",
    "fitted: rows that shaped a law or a constant.",
    "in interval: share of published values inside the predicted 90% interval.",
)


def to_json(data: object) -> str:
    """JSON text without NaN or infinity: what is not a number is null.

    Indented by two, with a newline at the end; keys keep their order.
    """
    return json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# ---- Tables and sentences -------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], width: int, *, keys: int = 1) -> str:
    """Aligned columns within `width` characters; those that do not fit stand below, beside the first `keys` again."""
    cells = [list(header), *([figure(cell) for cell in row] for row in rows)]
    columns = list(zip(*cells, strict=True))
    blocks = [columns[:keys]]
    for column in columns[keys:]:
        block = [*blocks[-1], column]
        if len(block) > keys + 1 and sum(map(_longest_word, block)) + GAP * (len(block) - 1) > width:
            blocks.append([*columns[:keys], column])
        else:
            blocks[-1] = block
    return "\n".join(_align(block, width) for block in blocks)


def _longest_word(column: Sequence[str]) -> int:
    words = (len(word) for cell in column for word in cell.split(" "))
    return min(max(words, default=0), LONGEST_WORD)


def _align(columns: Sequence[Sequence[str]], width: int) -> str:
    """One block: the widest columns are narrowed, down to their longest word, until all of them fit."""
    widths = [max(map(len, column)) for column in columns]
    least = [max(1, _longest_word(column)) for column in columns]
    while sum(widths) + GAP * (len(widths) - 1) > width:
        loose = [index for index, wide in enumerate(widths) if wide > least[index]]
        if not loose:
            break
        widths[max(loose, key=widths.__getitem__)] -= 1
    wrapped = []
    for column, wide in zip(columns, widths, strict=True):
        broken = ([wrap(part, wide, break_on_hyphens=False) for part in cell.splitlines()] for cell in column)
        wrapped.append([[line.replace(TIE, " ") for lines in parts for line in lines] or [""] for parts in broken])
    widths = [max(len(line) for lines in column for line in lines) for column in wrapped]
    head, *body = ([*zip_longest(*row, fillvalue="")] for row in zip(*wrapped, strict=True))
    rows = [*head, tuple("-" * wide for wide in widths), *(line for row in body for line in row)]
    padded = ([text.ljust(wide) for text, wide in zip(row, widths, strict=True)] for row in rows)
    return "".join(f"{(' ' * GAP).join(texts).rstrip()}\n" for texts in padded)


def sentences(lines: Iterable[str], width: int, mark: str = "- ") -> str:
    """A list of sentences, wrapped between words."""
    wrapper = TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    lines = (line.translate(PLAIN) for line in lines)
    wrapper.initial_indent, wrapper.subsequent_indent = mark, " " * len(mark)
    return "".join(f"{wrapper.fill(line)}\n" for line in lines)


def figure(value: Any, show: Show = number) -> str:
    """A figure as the report writes it; text as it is, yes and no in words; of a mapping the first five entries."""
    if value is None or isinstance(value, float):
        return show(value).translate(PLAIN)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        more = f", and {len(value) - 5} more" if len(value) > 5 else ""
        return ", ".join(f"{key}:{TIE}{figure(item, show)}" for key, item in list(value.items())[:5]) + more
    if isinstance(value, list | tuple):
        return ", ".join(figure(item, show) for item in value)
    return str(value)


def with_interval(found: Data | Sequence[float | None] | None, show: Show = number) -> str:
    """A figure, as a mapping or as (value, low, high), with its interval in brackets where that differs from it."""
    ends = [found.get(end) for end in ("value", "low", "high")] if isinstance(found, Mapping) else list(found or [None])
    value, low, high = (None if end is None or math.isnan(end) else end for end in [*ends, None, None][:3])
    if value is None or low is high is None or {show(low), show(high)} == {show(value)}:
        return figure(value, show)
    return f"{figure(value, show)} [{interval(low, high, show)}]".translate(PLAIN)


def formatter(key: str) -> Show:
    """How a figure of this name is written: shares as per cent, large ones with a prefix and unit (`215 TFLOP`)."""
    unit = next((unit for end, unit in LARGE if end in key), "")

    def prefixed(value: float | None) -> str:
        if not value or math.isnan(value):
            return number(value)
        show, whole = scaled(value, unit)
        return f"{show(value)}{TIE}{whole}"

    if key in SHARES:
        return percent
    if unit:
        return prefixed
    return money if "usd" in key else score if key.startswith("quality") and "fid" not in key else number


# ---- A scenario -----------------------------------------------------------------------------------------------------


def scenario_text(scenario: Scenario, width: int) -> str:
    """A resolved scenario in brief, and every change to its base."""
    keys = ("name", "seed", "horizon_s", "warmup_s", "replications")
    rows: list[tuple[str, Any]] = [(key, figure(getattr(scenario, key), exact)) for key in keys]
    for name, spec in scenario.requests.items():
        small = f" then {' or '.join(spec.small_models)}" if spec.small_models else ""
        rate = "" if spec.arrivals.rate_per_s is None else f" {exact(spec.arrivals.rate_per_s)}/s"
        slo = "no SLO" if spec.slo_s is None else f"p{exact(spec.slo_percentile)} within {exact(spec.slo_s)} s"
        floor = "" if spec.quality_floor is None else f", CLIP at least {score(spec.quality_floor)}"
        energy = "" if spec.edge_energy_j is None else f", at most {exact(spec.edge_energy_j)} J at the edge"
        shape = f"{spec.model}{small}, {spec.width_px}x{spec.height_px} px, {spec.num_inference_steps} steps"
        asked = f"{shape}, {spec.arrivals.process}{rate} from {spec.origin}, {slo}{floor}{energy}"
        rows.append((f"requests.{name}", asked))
    rows += [(f"edge.{name}", f"{f.replicas} x {f.device} on {f.network}") for name, f in scenario.edge.items()]
    for name, pool in scenario.pools.items():
        nodes = f"{pool.replicas_min} to {pool.replicas_max}" if pool.replicas is None else str(pool.replicas)
        size = f"{nodes} nodes of {pool.gpus_per_node} x {pool.gpu}"
        rows.append((f"pools.{name}", f"{size}, {pool.runtime}, {pool.purchase}, {pool.discipline}"))
    limits = scenario.budget.model_dump().items()
    rows += [(f"budget.{key}", figure(value, exact)) for key, value in limits if value is not None]
    rows += [(f"search.{key}", list(getattr(scenario.search, key))) for key in ("methods", "degrees", "policies")]
    rows += [("changed", line) for line in scenario.overrides_applied]
    return table(("key", "value"), rows, width)


# ---- A prediction ---------------------------------------------------------------------------------------------------


def prediction_text(figures: Data, width: int) -> str:
    """The figures of `pricing.prediction.to_json`, its parts with their sources, then what is to be said about them."""
    lists = {"parts", "sources", "unknown", "outside", "against_one_gpu"}
    sources = list(figures["sources"])
    parts = [
        (
            *(part[key] for key in ("name", "where")),
            with_interval({"value": part["seconds"], "low": part["low_s"], "high": part["high_s"]}),
            *(figure(part[key], formatter(key)) for key in ("devices", "usd", "edge_energy_j", "kind")),
            " ".join(f"[{sources.index(source) + 1}]" for source in part["sources"]),
        )
        for part in figures["parts"]
    ]
    header = ("part", "where", "seconds [90% interval]", "devices", "usd", "edge_energy_j", "kind", "sources")
    notes = [figures["against_one_gpu"]] if figures["against_one_gpu"] else []
    notes += [f"{name} is not known: {why}." for name, why in figures["unknown"].items()]
    notes += [f"Outside what was timed: {text}." for text in figures["outside"]]
    said = dict.fromkeys(
        f"{part['name']} on {part['where']}: {part['note']}" for part in figures["parts"] if part["note"]
    )
    notes += [f"{text}." for text in said if text not in figures["outside"]]
    text = (
        table(
            ("figure", "value"),
            [(key, figure(value, formatter(key))) for key, value in figures.items() if key not in lists],
            width,
        ),
        table(header, parts, width),
        "".join(sentences([source], width, f"[{number}] ") for number, source in enumerate(sources, 1)),
        sentences(notes, width),
    )
    return "\n".join(filter(None, text))


# ---- Simulations and capacity plans ---------------------------------------------------------------------------------


def simulation_data(saved: Data, page: str) -> dict[str, Any]:
    """Simulations for JSON: per policy verdict, replicas, rent, and every figure with interval, unit and reason."""
    return {"report": page, "runs": [_run_data(run) for run in saved["runs"]]}


def _run_data(run: Data) -> dict[str, Any]:
    verdict = {finding["name"]: {"ok": finding["ok"], "reason": finding["reason"]} for finding in run["verdict"]}
    keys = ("policy", "replicas", "usd_per_hour", "summary", "pools", "unserved")
    return {"verdict": verdict, **{key: run[key] for key in keys}}


def plan_data(saved: Data, page: str) -> dict[str, Any]:
    """A capacity plan for JSON: the chosen plans and nodes, their simulation, and what they were compared with."""
    chosen = _run_data(saved["runs"][0])
    plans = {choice["request_class"]: choice.get("label") for choice in saved["chosen"]}
    kept = (
        "feasible", "explanation", "savings", "bound", "chosen", "baselines", "frontier", "alternatives", "margins",
        "conflict", "sensitivity", "confidence", "robust", "evidence",
    )  # fmt: skip
    return {**chosen, "plans": plans, **{key: saved[key] for key in kept}, "report": page}


def simulation_text(saved: Data, width: int) -> str:
    """Verdicts first, then the figures of every policy and class, then why some are not known."""
    rows, notes = [], [BRACKETS]
    shown = [key for key in FIGURES if any(_value(run, key) is not None for run in saved["runs"])]
    for run in saved["runs"]:
        classes = run["summary"] if len(run["summary"]) > 2 else {"all": run["summary"]["all"]}
        for name, figures in classes.items():
            # nodes are rented for all classes together
            mine = [key for key in shown if key != "rent_usd_per_hour" or name == "all"]
            cells = (with_interval(figures[key], formatter(key)) if key in mine else "" for key in shown)
            rows.append((run["name"], name, *cells))
        overall = run["summary"]["all"]
        notes += [
            f"{FIGURES[key]} of {run['name']} is not known: {overall[key].get('note', '')}."
            for key in shown
            if overall[key]["value"] is None
        ]
    header = ("policy", "class", *(FIGURES[key] for key in shown))
    text = (_verdicts(saved["runs"], width), table(header, rows, width, keys=2), sentences(notes, width))
    return "\n".join(filter(None, text))


def _value(run: Data, key: str) -> Any:
    return run["summary"]["all"][key]["value"]


def _verdicts(runs: Sequence[Data], width: int) -> str:
    rows = [
        (run["name"] if index == 0 else "", found["name"], found["ok"], found["reason"])
        for run in runs
        for index, found in enumerate(run["verdict"])
    ]
    return table(("run", "verdict", "", "because"), rows, width, keys=3)


def plan_text(saved: Data, width: int) -> str:
    """The verdict, what serves each class, what to rent, what it was compared with, the frontier, and why."""
    run = saved["runs"][0]
    nodes = list(run["replicas"].items())
    overall = run["summary"]["all"]["latency_p95_s"], _value(run, "quality_mean")
    plans = [("chosen", run["usd_per_hour"], *overall, saved["feasible"])]
    plans += [
        (other["name"], other["usd_per_hour"], other["latency_p95_s"], other["quality"], _holds(other))
        for other in (*saved["baselines"], *saved["alternatives"])
    ]
    compared = [
        (name, figure(usd, money), with_interval(latency), figure(quality, score), holds)
        for name, usd, latency, quality, holds in plans
    ]
    text = (
        _verdicts(saved["runs"][:1], width),
        table(("class", "plan", "p95 latency s", "SLO s", "inside SLO", "CLIP"), list(_chosen(saved)), width),
        table(("pool", "nodes"), nodes, width) if nodes else "",
        table(("plan", "USD/h", "p95 latency s", "CLIP", "holds"), compared, width),
        _frontier(saved["frontier"], width),
        _varied("condition", saved["sensitivity"], width),
        _varied("scenario", saved["robust"], width),
        sentences(_remarks(saved), width),
    )
    return "\n".join(filter(None, text))


def _remarks(saved: Data) -> Iterator[str]:
    """Why the plan is what it is, how far from the cheapest, what a change would buy, how sure it is."""
    bound, sure = saved["bound"], saved["confidence"]
    yield from saved["explanation"]
    if saved["conflict_said"] and saved["conflict_said"] not in saved["explanation"]:
        yield saved["conflict_said"]
        yield from (each["said"] for each in saved["conflict"])
    if bound:
        yield bound["said"]
    yield from (margin["said"] for margin in saved["margins"])
    if sure:
        yield sure["said"]
    if saved["evidence_said"]:
        yield f"{saved['evidence_said']} The report has every one."
    yield BRACKETS


def _varied(what: str, variations: Sequence[Data], width: int) -> str:
    """The plan under other conditions."""
    rows = [
        (
            each["name"], with_interval(each["slo_attainment"], percent), with_interval(each["latency_p95_s"]),
            figure(each["usd_per_hour"], money), _holds(each),
        )
        for each in variations
    ]  # fmt: skip
    return table((what, "inside SLO", "p95 latency s", "USD/h", "holds"), rows, width) if rows else ""


def _holds(point: Data) -> str:
    """Whether a plan holds, why not, and by what that is known unless it was simulated."""
    holds = "yes" if point["feasible"] else f"no: {point['reason']}"
    return holds if point["known_by"] == "simulation" else f"{holds}, by {point['known_by']}"


def _chosen(saved: Data) -> Iterator[tuple[Any, ...]]:
    """A row for each plan of each class, the first with the figures of the class."""
    summary, classes = saved["runs"][0]["summary"], saved["scenario"]["classes"]
    for choice in saved["chosen"]:
        name, parts, away = choice["request_class"], choice["parts"], choice["turned_away"]
        latency, inside, clip = (summary[name][key] for key in ("latency_p95_s", "slo_attainment", "quality_mean"))
        slo_s = figure(classes[name]["slo_s"], exact)
        figures = (with_interval(latency), slo_s, with_interval(inside, percent), figure(clip["value"], score))
        shared = len(parts) > 1 or away
        labels = [f"{percent(part['share'])}: {part['label']}" if shared else part["label"] for part in parts]
        labels += [f"{percent(away)}: turned away"] if away else []
        yield name, (labels or [choice["note"]])[0], *figures
        yield from (("", label, "", "", "", "") for label in labels[1:])


def _frontier(points: Sequence[Data], width: int) -> str:
    """Plans that no other beats in dollars, latency and quality together, cheapest first; by what they are known."""
    ordered = sorted(points, key=lambda point: (point["usd_per_hour"] or 0.0, point["latency_p95_s"][0] or 0.0))
    last = min(len(ordered), SHOWN_POINTS) - 1
    rows = []
    for point in (ordered[round(n * (len(ordered) - 1) / max(last, 1))] for n in range(last + 1)):
        nodes = ", ".join(f"{nodes} x {pool}" for pool, nodes in point["replicas"].items() if nodes) or "none"
        rent, quality = figure(point["usd_per_hour"], money), figure(point["quality"], score)
        rows.append((rent, point["latency_p95_s"][0], quality, nodes))
    known = ", ".join(sorted({point["known_by"] for point in points}))
    more = [f"The report has all {len(points)} points of the frontier."] if len(points) > len(rows) else []
    more.insert(0, f"The frontier's figures are by {known}.")
    header = ("frontier USD/h", "p95 latency s", "CLIP", "nodes")
    return table(header, rows, width) + sentences(more, width) if rows else ""


def verification_text(data: Data, width: int) -> str:
    """A line a table, the worst row of each, then what is out of order, not counted or not predicted."""
    rows: list[tuple[Any, ...]] = []
    worst = []
    for found in data["tables"]:
        name, order = found["name"], {None: "", True: "right", False: f"{len(found['wrong_order'])} wrong"}
        errors, errors_out = (
            [figure(found[key + end], percent) for key in ("mare", "worst")] for end in ("", "_held_out")
        )
        inside, inside_out = _shares(found)
        counted = found["rows"], found["calibration_rows"], *errors, inside
        held_out = found["held_out_rows"], *errors_out, inside_out
        rows.append((name, *counted, *held_out, order[found["ranking_right"]]))
        if found["worst_row"]:
            known = (case for case in found["cases"] if case["counts"] and case["error"] is not None)
            case = max(known, key=lambda case: abs(case["error"]))
            worst.append((name, case["label"], case["published"], case["predicted"], _off(case)))
    total, fitted, out = (
        sum(found[key] for found in data["tables"]) for key in ("rows", "calibration_rows", "held_out_rows")
    )
    inside, inside_out = _shares(data)
    rows.append(("all", total, fitted, "", "", inside, out, "", "", inside_out, ""))
    text = (
        table(VERIFIED, rows, width),
        sentences(VERIFICATION_LEGEND, width),
        table(("table", "worst row", "published", "predicted", "error"), worst, width),
        sentences((note for found in data["tables"] for note in _notes(found)), width),
    )
    return "\n".join(filter(None, text))


def _shares(found: Data) -> tuple[str, str]:
    return figure(found["coverage90"], percent), figure(found["coverage90_held_out"], percent)


def _notes(found: Data) -> Iterator[str]:
    """What is to be said of a table: its wrong order, the rows that do not count, and those without a prediction."""
    name, cases = found["name"], found["cases"]
    if found["wrong_order"]:
        yield f"{name}, not in the published order: {_some([' and '.join(pair) for pair in found['wrong_order']])}."
    outliers = [case for case in cases if not case["counts"]]
    for reason in dict.fromkeys(case["notes"] for case in outliers):
        those = [f"{case['label']} ({_off(case)})" for case in outliers if case["notes"] == reason]
        yield f"{name}, not counted: {_some(those)}. Because: {reason}."
    if found["kept_when_held_out"]:
        because = f": {found['notes']}" if found["notes"] else ""
        shaped = f"constants of the catalogue that {found['kept_when_held_out']} of its figures shaped"
        yield f"{name}, held out, keeps {shaped}{because}."
    known = [case for case in cases if not case["why"]]
    yield from _missing(f"{name}, not predicted", cases, "why")
    yield from _missing(f"{name}, not predicted when held out", known, "why_held_out")


def _missing(what: str, cases: Sequence[Data], key: str) -> Iterator[str]:
    """The cases without a prediction, by the reason that they give under `key`."""
    for reason in dict.fromkeys(case[key] for case in cases if case[key]):
        yield f"{what}: {_some([case['label'] for case in cases if case[key] == reason])}. {reason}"


def _some(labels: Sequence[str]) -> str:
    more = f"; and {len(labels) - SHOWN_CASES} more" if len(labels) > SHOWN_CASES else ""
    return "; ".join(labels[:SHOWN_CASES]) + more


def _off(case: Data) -> str:
    return "not predicted" if case["error"] is None else signed(case["error"], percent).translate(PLAIN)
