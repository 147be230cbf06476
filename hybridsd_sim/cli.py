"""The command line: the only place that prints or exits.

Results go to standard output, as tables or as JSON alone; progress and logs go to standard error. Exit code 0 is fine, 1
means that a run failed, 2 that the input is wrong: the message names place, value, rule and remedy. Rooms are imported
inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridsd_sim.errors import HybridSDError, InputError, Problem

if TYPE_CHECKING:
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario

app = typer.Typer(
    help="Plan, price and simulate Stable Diffusion inference shared between edge devices and cloud GPU pools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
trace_app = typer.Typer(help="Read real request traces.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")


class Format(StrEnum):
    text = "text"
    json = "json"


class Runtime(StrEnum):
    eager = "eager"
    cudagraph = "cudagraph"
    compiled = "compiled"
    tensorrt = "tensorrt"


ScenarioPath = Annotated[str, typer.Argument(help="A scenario file, or the name of a shipped scenario.")]
ScenarioName = Annotated[str | None, typer.Option("--scenario", help="A named scenario inside the file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE on top of everything, dotted keys.")]
OutputFormat = Annotated[Format, typer.Option("--format", help="How to print the result.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder of the report; default reports/<run id>.")]


def main() -> None:
    """Run the command line; turn errors into messages and exit codes."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments)
    except HybridSDError as error:
        if debug:
            raise
        code = 2 if isinstance(error, InputError) else 1
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(code) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        from hybridsd_sim import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def check(
    scenario_path: ScenarioPath, scenario: ScenarioName = None, set_: Settings = None, format_: OutputFormat = Format.text
) -> None:
    """Validate a scenario and print it in brief."""
    from hybridsd_sim.candidates import check_names
    from hybridsd_sim.profiles import load_profiles

    resolved = _scenario(scenario_path, scenario, set_)
    check_names(resolved, load_profiles())
    if format_ is Format.json:
        _print_json(resolved.to_dict())
        return
    rows = [("name", resolved.name), ("horizon_s", f"{resolved.horizon_s:g}"), ("replications", resolved.replications)]
    rows += [(f"requests.{name}", _class_in_brief(spec)) for name, spec in resolved.requests.items()]
    rows += [(f"edge.{name}", f"{fleet.replicas} x {fleet.device} on {fleet.network}") for name, fleet in resolved.edge.items()]
    rows += [(f"pools.{name}", _pool_in_brief(pool)) for name, pool in resolved.pools.items()]
    rows += [("override", line) for line in resolved.overrides_applied]
    _print_table(("key", "value"), rows)


def _class_in_brief(spec: Any) -> str:
    rate = "" if spec.arrivals.rate_per_s is None else f" {spec.arrivals.rate_per_s:g}/s"
    slo = "no SLO" if spec.slo_s is None else f"p{spec.slo_percentile:g} within {spec.slo_s:g} s"
    shape = f"{spec.model} {spec.width_px}x{spec.height_px} px, {spec.num_inference_steps} steps"
    return f"{shape}, {spec.arrivals.process}{rate}, from {spec.origin}, {slo}"


def _pool_in_brief(pool: Any) -> str:
    nodes = f"{pool.replicas_min} to {pool.replicas_max}" if pool.replicas is None else str(pool.replicas)
    return f"{nodes} nodes of {pool.gpus_per_node} x {pool.gpu}, {pool.purchase}, {pool.discipline}"


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="The cloud model.")],
    gpu: Annotated[str, typer.Option(help="The GPU of the cloud stage.")] = "a100-sxm-80gb",
    interconnect: Annotated[str | None, typer.Option(help="GPU to GPU; default the GPU's own.")] = None,
    method: Annotated[str, typer.Option(help="Parallel method of the cloud stage.")] = "single",
    degree: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the method, e.g. stride=2.")] = None,
    small_model: Annotated[str | None, typer.Option(help="The edge model of a hybrid plan.")] = None,
    switch_step: Annotated[int | None, typer.Option(help="First step of the edge model.")] = None,
    edge_device: Annotated[str | None, typer.Option(help="The edge device.")] = None,
    network: Annotated[str | None, typer.Option(help="Access network between edge and cloud.")] = None,
    height_px: Annotated[int | None, typer.Option(help="Default: the model's native size.")] = None,
    width_px: Annotated[int | None, typer.Option(help="Default: the model's native size.")] = None,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Above 1: two UNet evaluations a step.")] = 7.5,
    measured_step_s: Annotated[float | None, typer.Option(help="Your own one-GPU guided step: predict from it.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="How the UNet is run.")] = Runtime.eager,
    format_: OutputFormat = Format.text,
) -> None:
    """Price one request under one plan with nobody else there: time, bytes, dollars, joules, quality, with sources."""
    from hybridsd_sim.predict import Ask, predict_cost, to_json

    ask = Ask(
        model=model, gpu=gpu, interconnect=interconnect, method=method, degree=degree,
        options=tuple(sorted(_settings(option, "--option").items())), small_model=small_model, switch_step=switch_step,
        edge_device=edge_device, network=network, height_px=height_px, width_px=width_px,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, measured_step_s=measured_step_s,
        runtime=runtime.value,
    )  # fmt: skip
    cost = predict_cost(ask, _profiles())
    figures = to_json(cost)
    if format_ is Format.json:
        _print_json(figures)
        return
    _print_table(
        ("part", "where", "seconds", "low", "high", "GPUs", "kind", "source"),
        [
            (p.name, p.where, _figure(p.seconds), _figure(p.low_s), _figure(p.high_s), p.devices, p.kind, "; ".join(p.sources))
            for p in cost.parts
        ],
    )
    _print_table(("figure", "value"), [(key, _figure(value)) for key, value in figures.items() if key not in {"sources", "parts"}])


@app.command()
def simulate(
    scenario_path: ScenarioPath,
    policy: Annotated[list[str] | None, typer.Option(help="Policies to run side by side; default the scenario's.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml: fixes the replicas; adds the policy `planned`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed.")] = None,
    replications: Annotated[int | None, typer.Option(help="Another number of replications.")] = None,
    out: OutFolder = None,
    scenario: ScenarioName = None,
    set_: Settings = None,
    format_: OutputFormat = Format.text,
) -> None:
    """Simulate policies side by side on the same requests and links."""
    from hybridsd_sim.candidates import find_candidates
    from hybridsd_sim.report import write_report
    from hybridsd_sim.simulate import simulate as run

    extra = {key: value for key, value in (("seed", seed), ("replications", replications)) if value is not None}
    resolved, profiles = _scenario(scenario_path, scenario, set_, extra), _profiles()
    deployment = None if plan is None else _deployment(plan)
    names = [*dict.fromkeys(_split(policy) or [*resolved.search.policies, *(["planned"] if deployment else [])])]
    results = []
    with _progress() as say:
        say("pricing candidate plans")
        options = find_candidates(resolved, profiles)
        for name in names:
            say(f"simulating {name}")
            results.append(run(resolved, profiles, policy=name, plan=deployment, options=options))
        folder = _run_folder(out, resolved, profiles, names)
        say("drawing the report")
        page = write_report(results, folder)
    if format_ is Format.json:
        _print_json({"report": str(page), "runs": [_run_json(result) for result in results]})
        return
    for result in results:
        _print_verdict(result.policy, result.verdict)
    _print_summaries(results)
    typer.echo(f"report: {page}")


@app.command(name="plan")
def plan_(
    scenario_path: ScenarioPath,
    budget_usd_per_hour: Annotated[float | None, typer.Option(help="Dollars an hour for nodes.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes for independent simulations.", min=1)] = 1,
    out: OutFolder = None,
    scenario: ScenarioName = None,
    set_: Settings = None,
    format_: OutputFormat = Format.text,
) -> None:
    """The capacity plan: which plan for each request class, how many nodes of which pool, confirmed by simulation."""
    from hybridsd_sim.optimize import optimize
    from hybridsd_sim.report import write_report

    extra = {} if budget_usd_per_hour is None else {"budget.usd_per_hour": budget_usd_per_hour}
    resolved, profiles = _scenario(scenario_path, scenario, set_, extra), _profiles()
    with _progress() as say, _fan_out(jobs) as fan_out:
        result = optimize(resolved, profiles, map=fan_out, progress=say)
        say("drawing the report")
        page = write_report(result, _run_folder(out, resolved, profiles, ["plan"]))
    if format_ is Format.json:
        _print_json(_plan_json(result, page))
        return
    _print_plan(result)
    typer.echo(f"report: {page}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a saved run.")],
    compare: Annotated[Path | None, typer.Option(help="Another run's folder: draw both side by side.")] = None,
    out: OutFolder = None,
) -> None:
    """Draw a saved run again, or two side by side."""
    from hybridsd_sim.report import compare_reports, draw_report

    if compare is None:
        page = draw_report(run)
    else:
        page = compare_reports(run, compare, out or Path("reports") / f"{run.name}-vs-{compare.name}")
    typer.echo(f"report: {page}")


@trace_app.command()
def describe(path: Annotated[Path, typer.Argument(help="A trace: CSV.")], format_: OutputFormat = Format.text) -> None:
    """Say what is in a trace: rate, burstiness, mix, popularity."""
    from hybridsd_sim.workload import describe_trace

    figures = describe_trace(path).to_dict()
    if format_ is Format.json:
        _print_json(figures)
    else:
        _print_table(("figure", "value"), [(key, _figure(value)) for key, value in figures.items()])


@trace_app.command(name="import")
def import_(
    path: Annotated[Path, typer.Argument(help="A trace: CSV.")],
    out: Annotated[Path, typer.Option(help="Where to write the imported trace.")],
) -> None:
    """Read a real trace and write it as arrivals that scenarios can replay."""
    from hybridsd_sim.workload import import_trace

    trace = import_trace(path)
    trace.write_csv(out)
    typer.echo(f"{len(trace.arrival_s)} requests: {out}")


def _scenario(
    path: str, name: str | None, settings: Sequence[str] | None, extra: Mapping[str, Any] | None = None
) -> Scenario:
    from hybridsd_sim.scenario import load_scenario

    return load_scenario(path, scenario=name, overrides={**_settings(settings, "--set"), **(extra or {})})


def _profiles() -> Profiles:
    from hybridsd_sim.profiles import load_profiles

    return load_profiles()


def _deployment(path: Path) -> Any:
    from hybridsd_sim.plan import deployment_from_dict
    from hybridsd_sim.scenario import load_yaml

    if not path.is_file():
        raise InputError(Problem("--plan", str(path), "no such file", "Give the plan.yaml that `plan` wrote."))
    try:
        return deployment_from_dict(load_yaml(path.read_text(encoding="utf-8"), str(path)))
    except (KeyError, TypeError, AttributeError) as error:
        rule = f"not a plan.yaml: {type(error).__name__} at {error}"
        raise InputError(Problem(str(path), "its content", rule, "Give the plan.yaml that `plan` wrote.")) from error


def _settings(pairs: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """KEY=VALUE pairs with values read as YAML scalars; all that are not pairs are reported together."""
    from hybridsd_sim.scenario import load_yaml

    bad = [pair for pair in pairs or () if "=" not in pair or pair.startswith("=")]
    if bad:
        raise InputError(Problem(flag, pair, "needs KEY=VALUE", "For example horizon_s=600.") for pair in bad)
    split = (pair.split("=", 1) for pair in pairs or ())
    return {key.strip(): load_yaml(value, f"{flag} {key}") for key, value in split}


def _split(values: Sequence[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list."""
    return [name for value in values or () for name in value.split(",") if name]


def _run_folder(out: Path | None, scenario: Scenario, profiles: Profiles, extra: Sequence[str]) -> Path:
    from hybridsd_sim import __version__
    from hybridsd_sim.report import run_id

    return out or Path("reports") / run_id(scenario, profiles.digest, scenario.seed, __version__, ",".join(extra))


@contextmanager
def _fan_out(jobs: int) -> Iterator[Callable[..., Any] | None]:
    """An order-keeping map over processes; None for one process."""
    if jobs == 1:
        yield None
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool.map


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A status line on standard error: a spinner for people, plain lines in logs."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, style="dim", highlight=False)
        return
    with console.status("starting") as status:
        yield status.update


def _print_json(data: object) -> None:
    sys.stdout.write(json.dumps(_clean(data), indent=2, allow_nan=False) + "\n")


def _clean(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False, soft_wrap=False)
    console.print(table)


def _figure(value: Any) -> str:
    """Four significant digits; a dash for what nobody knows."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "  ".join(_figure(item) for item in value)
    return str(value)


def _print_verdict(name: str, verdict: Any) -> None:
    for finding in verdict.findings:
        typer.echo(f"{name}: {finding.name}: {'yes' if finding.ok else 'no'} ({finding.reason})")


def _with_interval(row: Any, name: str) -> str:
    return f"{_figure(float(row[name]))} [{_figure(float(row[f'{name}_low']))}, {_figure(float(row[f'{name}_high']))}]"


def _print_summaries(results: Sequence[Any]) -> None:
    columns = ("latency_p95_s", "slo_attainment", "goodput_per_s", "quality_mean", "gpu_seconds_per_image")
    rows = []
    for result in results:
        for (policy, cls), row in result.summary.iterrows():
            rent = _figure(result.usd_per_hour) if cls == "all" else ""
            rows.append((policy, cls, *(_with_interval(row, name) for name in columns), rent))
    _print_table(("policy", "class", *columns, "rent_usd_per_hour"), rows)


def _run_json(result: Any) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "verdict": result.verdict.to_dict(),
        "replicas": dict(result.replicas),
        "usd_per_hour": result.usd_per_hour,
        "summary": result.summary.reset_index().to_dict(orient="records"),
    }


def _print_plan(result: Any) -> None:
    _print_verdict(result.scenario.name, result.verdict)
    summary = result.chosen_result.summary
    rows = []
    for name, option in result.chosen.items():
        row = summary.xs(name, level="request_class").iloc[0]
        slo = option.cost.request.slo_s
        shown = (_with_interval(row, "latency_p95_s"), _figure(slo), _with_interval(row, "slo_attainment"))
        rows.append((name, option.plan.label, *shown, _figure(option.quality)))
    _print_table(("class", "plan", "latency p95 s", "SLO s", "attainment", "CLIP"), rows)
    compared = [("chosen", result.usd_per_hour, None), *((b.name, b.usd_per_hour, b) for b in result.baselines)]
    _print_table(
        ("plan", "USD/h", "holds"),
        [
            (name, _figure(usd), ("yes" if result.feasible else "no") if b is None else ("yes" if b.feasible else f"no: {b.reason}"))
            for name, usd, b in compared
        ],
    )
    for sentence in result.explanation:
        typer.echo(f"- {sentence}")


def _plan_json(result: Any, page: Path) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "feasible": result.feasible,
        "verdict": result.verdict.to_dict(),
        "usd_per_hour": result.usd_per_hour,
        "replicas": dict(result.replicas_opt),
        "plans": {name: option.plan.label for name, option in result.chosen.items()},
        "baselines": [asdict(baseline) for baseline in result.baselines],
        "frontier": [asdict(point) for point in result.frontier],
        "explanation": list(result.explanation),
        "report": str(page),
    }
