"""The command line: with `cli_arguments`, which the executors share, the only place that prints or exits.

Results go to standard output, as tables or as JSON alone; progress and logs go to standard error. Exit code 0 is fine,
1 means that a run failed, 2 that the input is wrong: every message names place, value, rule and remedy. Packages are
imported inside the commands, so that `--help` answers at once.

This is also the only place that knows the executors: their commands stand beside those defined here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hybridsd_sim.cli_arguments import (
    TEXT,
    OutputFormat,
    named_scenarios,
    needs_extra,
    output_aside,
    policy_problems,
    print_result,
    read_options,
    read_profiles,
    read_scenario,
    refuse,
    run_to_exit,
    split,
    together,
)
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.version import __version__

if TYPE_CHECKING:
    from hybridsd_sim.planning import Store
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario


EXECUTORS = ("profile", "run", "count", "live", "validate")
"""The commands that run on torch."""


class _Commands(TyperGroup):
    """The commands of this module, then the executors', whose module is read when one of those is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *EXECUTORS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in EXECUTORS:
            return super().get_command(ctx, cmd_name)
        # Inside this package once installed, at the top of a checkout otherwise: then first on the path, of the
        # processes that the executors start too, for another distribution has a package of that name.
        if find_spec("hybridsd_sim.executors"):
            executors = import_module("hybridsd_sim.executors.cli")
        else:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            executors = import_module("executors.cli")
        commands: Any = typer.main.get_command(executors.app)
        return commands.get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Commands,
    help="Plan, price and simulate Stable Diffusion inference shared between edge devices and cloud GPU pools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # help as plain text, for loading rich takes longer than all the rest
)

trace_app = typer.Typer(help="Read real request traces.", no_args_is_help=True, rich_markup_mode=None)

app.add_typer(trace_app, name="trace")


REPORTS = Path("reports")

ScenarioPath = Annotated[str, typer.Argument(metavar="SCENARIO", help="A file, or a shipped scenario's name.")]

ScenarioName = Annotated[str | None, typer.Option("--scenario", help="A named scenario inside the file.")]

Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE on top of everything, dotted keys.")]

TracePath = Annotated[Path, typer.Argument(help="A trace: CSV.")]

OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder of the report; default reports/<run id>.")]


def main() -> None:
    """Run the command line; turn errors into messages and exit codes."""
    run_to_exit(app)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def check(
    path: ScenarioPath, scenario: ScenarioName = None, set_: Settings = None, format_: OutputFormat = TEXT
) -> None:
    """Validate a scenario and print it in brief."""
    from hybridsd_sim.pricing import check_names
    from hybridsd_sim.reporting import scenario_text

    resolved = read_scenario(path, scenario, set_)
    profiles = read_profiles(resolved)
    budget = resolved.budget.usd_per_hour
    policies = policy_problems(resolved.search.policies, "search.policies", planned=True, budget=budget)
    together(lambda: check_names(resolved, profiles), lambda: refuse(policies))
    print_result(format_, resolved.to_dict, lambda width: scenario_text(resolved, width))


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
    edge_device: Annotated[str | None, typer.Option(help="The edge device; default the cloud's GPU.")] = None,
    network: Annotated[str | None, typer.Option(help="Access network; default no transfers.")] = None,
    height_px: Annotated[int | None, typer.Option(help="Default the width, else the model's native size.")] = None,
    width_px: Annotated[int | None, typer.Option(help="Default the height, else the model's native size.")] = None,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Above 1: two UNet evaluations a step.")] = 7.5,
    num_images: Annotated[int, typer.Option(help="Images generated together.")] = 1,
    measured_step_s: Annotated[float | None, typer.Option(help="Your own one-GPU guided step.")] = None,
    runtime: Annotated[str, typer.Option(help="How the UNet runs: eager, cudagraph, compiled, tensorrt.")] = "eager",
    format_: OutputFormat = TEXT,
) -> None:
    """Price one request under one plan. Time, bytes, dollars, joules and quality, each with its sources."""
    from hybridsd_sim.pricing import PredictionQuery, predict_plan
    from hybridsd_sim.profiles import load_profiles
    from hybridsd_sim.reporting import prediction_text

    query = PredictionQuery(
        model=model, gpu=gpu, interconnect=interconnect, method=method, degree=degree,
        options=tuple(read_options(option).items()),
        small_model=small_model, switch_step=switch_step, edge_device=edge_device, network=network,
        height_px=height_px, width_px=width_px, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, num_images=num_images, measured_step_s=measured_step_s, runtime=runtime,
    )  # fmt: skip
    figures = predict_plan(query, load_profiles())
    print_result(format_, lambda: figures, lambda width: prediction_text(figures, width))


@app.command()
def simulate(
    path: ScenarioPath,
    policy: Annotated[list[str] | None, typer.Option(help="Policies; default the scenario's.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.yaml, for replicas and the policy planned.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed.")] = None,
    replications: Annotated[int | None, typer.Option(help="Another number of replications.")] = None,
    out: OutFolder = None,
    scenario: ScenarioName = None,
    set_: Settings = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Simulate policies side by side on the same requests and links."""
    from hybridsd_sim.pricing import check_names, deployment_problems, find_candidates, load_deployment
    from hybridsd_sim.reporting import simulation_data, simulation_text
    from hybridsd_sim.simulation import simulate as run

    flags = {"--seed": ("seed", seed), "--replications": ("replications", replications)}
    resolved, deployment, _ = together(
        lambda: read_scenario(path, scenario, set_, flags),
        lambda: None if plan is None else load_deployment(plan),
        lambda: _check_folder(out),
    )
    names = split(policy) if policy else [*resolved.search.policies, *(["planned"] if deployment else [])]
    names, place = list(dict.fromkeys(names)), "--policy" if policy else "search.policies"
    profiles = read_profiles(resolved)
    budget = resolved.budget.usd_per_hour
    problems = policy_problems(names, place, planned=deployment is not None, budget=budget)
    problems += deployment_problems(deployment, resolved, profiles) if deployment else []
    together(lambda: check_names(resolved, profiles), lambda: refuse(problems))
    with _progress() as say:
        say("pricing candidate plans")
        options = find_candidates(resolved, profiles)
        results = []
        for name in names:
            say(f"simulating {name}")
            results.append(run(resolved, profiles, policy=name, plan=deployment, options=options))
        say("drawing the report")
        saved, page = _write(results, out or _run_folder(resolved, profiles, names, plan), profiles)
    print_result(format_, lambda: simulation_data(saved, page), lambda width: simulation_text(saved, width), page)


@app.command(name="plan")
def plan_(
    path: ScenarioPath,
    budget_usd_per_hour: Annotated[float | None, typer.Option(help="Dollars an hour for nodes.")] = None,
    robust: Annotated[bool, typer.Option("--robust", help="One plan that holds for all the file's scenarios.")] = False,
    jobs: Annotated[int, typer.Option(help="Simulations to run side by side.", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(metavar="local|ADDRESS", help="Run them on Ray.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no finished simulations, use none.")] = False,
    out: OutFolder = None,
    scenario: ScenarioName = None,
    set_: Settings = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Find the capacity plan. The plan of each request class and the nodes of each pool, confirmed by simulation."""
    from hybridsd_sim.planning import optimize, workers
    from hybridsd_sim.reporting import plan_data, plan_text

    flags = {"--budget-usd-per-hour": ("budget.usd_per_hour", budget_usd_per_hour)}
    resolved, _ = together(lambda: read_scenario(path, scenario, set_, flags), lambda: _check_folder(out))
    others = named_scenarios(path, set_, flags) if robust else {}
    profiles, ran = read_profiles(resolved), ["plan", *(f"{name} {other.digest}" for name, other in others.items())]

    # Ray prints on standard output when a worker dies; that is for results alone.
    with _simulation_store(no_cache) as store, output_aside(), _progress() as say, workers(jobs, ray) as fan_out:
        result = optimize(resolved, profiles, map=fan_out, store=store, robust=others, progress=say)
        say("drawing the report")
        saved, page = _write(result, out or _run_folder(resolved, profiles, ran), profiles)
    print_result(format_, lambda: plan_data(saved, page), lambda width: plan_text(saved, width), page)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of saved runs, to draw again.")],
    compare: Annotated[bool, typer.Option("--compare", help="Draw the last two side by side instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison; default reports/A-vs-B.")] = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Draw a saved run again, or two side by side."""
    from hybridsd_sim.reporting import compare_reports, draw_report

    if compare and len(runs) < 2:
        raise InputError(Problem("--compare", str(runs[0]), "two runs stand side by side", "Name two folders."))
    if out is not None and not compare:
        raise InputError(Problem("--out", str(out), "goes with --compare", "A run is drawn in its own folder."))
    pages = []
    for folder in runs[:-2] if compare else runs:
        with _writing(folder):
            pages.append(str(draw_report(folder)))
    if compare:
        folder = out or REPORTS / "-vs-".join(run.resolve().name for run in runs[-2:])
        with _writing(folder):
            pages.append(str(compare_reports(runs[-2], runs[-1], folder)))
    print_result(format_, lambda: {"reports": pages}, lambda _: "", *pages)


@app.command()
def verify(
    profiles: Annotated[list[Path] | None, typer.Option(help="Folders of yours, laid over the shipped one.")] = None,
    write_fits: Annotated[Path | None, typer.Option(help="Fit everything anew, and write it to this folder.")] = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Hold predictions against every published and measured table. Each is also made without its own group."""
    from hybridsd_sim.perf import fitted, write_fitted
    from hybridsd_sim.pricing import verify_tables
    from hybridsd_sim.profiles import load_profiles
    from hybridsd_sim.reporting import verification_text

    known = load_profiles(profiles)
    with _progress() as say:
        if write_fits:
            say("fitting")
            known = fitted(known)
            with _writing(write_fits):
                write_fitted(known, write_fits)
        data = verify_tables(known, progress=say)
    print_result(format_, lambda: data, lambda width: verification_text(data, width))


@app.command()
def serve(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.yaml, or the folder of the run with it.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8470,
    policy: Annotated[str | None, typer.Option(help="Policy that decides; default the plan is followed.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Bearer token; default in HYBRIDSD_TOKEN.")] = None,
    requests_per_s: Annotated[float, typer.Option(help="Requests answered a second; beyond, 429.", min=1)] = 5000.0,
) -> None:
    """Serve a plan's scheduler over HTTP. With metrics and a what-if page; follows the plan's file when it changes."""
    with needs_extra("serve", "serve"):
        from hybridsd_sim.serving import serve as run
    run(plan, host=host, port=port, policy=policy, token_file=token_file, requests_per_s=requests_per_s)


@trace_app.command()
def describe(path: TracePath, format_: OutputFormat = TEXT) -> None:
    """Say what is in a trace: rate, burstiness, mix, popularity."""
    from hybridsd_sim.reporting import table
    from hybridsd_sim.workload import describe_trace

    figures = describe_trace(path).to_dict()
    print_result(format_, lambda: figures, lambda width: table(("figure", "value"), list(figures.items()), width))


@trace_app.command(name="import")
def import_(
    path: TracePath, out: Annotated[Path, typer.Option(help="The file.")], format_: OutputFormat = TEXT
) -> None:
    """Read a real trace and write it as arrivals that scenarios can replay."""
    from hybridsd_sim.workload import import_trace

    trace = import_trace(path)
    trace.write_csv(out)
    print_result(
        format_, lambda: {"requests": len(trace), "path": str(out)}, lambda _: f"{len(trace)} requests: {out}\n"
    )


def _run_folder(scenario: Scenario, profiles: Profiles, ran: Sequence[str], plan: Path | None = None) -> Path:
    """The default folder: whatever shapes the result has a part in its name, a plan.yaml too."""
    from hashlib import sha256

    from hybridsd_sim.reporting import run_id

    what = ",".join(ran) + (f"+{sha256(plan.read_bytes()).hexdigest()}" if plan else "")
    return REPORTS / run_id(scenario, profiles.digest, scenario.seed, __version__, what)


def _check_folder(out: Path | None) -> None:
    """Whether a report can be written there, before the work that it takes: try it, and leave no trace."""
    from tempfile import TemporaryDirectory

    from hybridsd_sim.reporting import DRAWN, SAVED

    folder = (out or REPORTS).absolute()
    with _writing(out or REPORTS):
        TemporaryDirectory(dir=next(place for place in (folder, *folder.parents) if place.exists())).cleanup()
    if out and (strangers := sorted({path.name for path in out.glob("*")} - {*SAVED, *DRAWN})):
        rule = f"holds {', '.join(strangers[:3])}, which no report wrote"
        raise InputError(Problem("--out", str(out), rule, "Name a new folder, or empty this one."))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say which folder could not be written, and why."""
    try:
        yield
    except OSError as error:
        remedy = "Name a folder that you may write to."
        raise InputError(Problem(str(folder), error.strerror or str(error), "cannot be written", remedy)) from error


def _write(result: Any, folder: Path, profiles: Profiles) -> tuple[dict[str, Any], str]:
    """Save and draw the report; what it saved, and the path of its page."""
    from hybridsd_sim.reporting import read_run, write_report

    with _writing(folder):
        page = write_report(result, folder, profiles=profiles)
    return read_run(folder)[0], str(page)


@contextmanager
def _simulation_store(no_cache: bool) -> Iterator[Store | None]:
    """Where finished simulations are kept; None, and a word on standard error, where nothing can be written.

    Ends a run that is interrupted with exit code 130, and says what it leaves behind.
    """
    from hybridsd_sim.planning import default_folder, open_store

    store: Store | None = None
    if not no_cache:
        try:
            store = open_store(default_folder())
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            typer.echo(f"no finished simulation is kept for another run: {error}", err=True)
    before = len(store) if store else 0
    try:
        yield store
    except KeyboardInterrupt:
        kept = f"{len(store) - before} finished simulations are kept in {store.folder}" if store else "nothing is kept"
        again = "continue" if store else "start anew"
        typer.echo(f"interrupted: {kept}; run the same command again to {again}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error: a spinner for people, plain lines in logs."""
    if not sys.stderr.isatty():
        yield lambda text: typer.echo(text, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
