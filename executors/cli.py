"""The commands that touch torch: `hybridsd-sim profile|run|count|live|validate`; in a checkout `python -m executors`.

Results go to standard output, as text or as JSON alone; progress and logs go to standard error. Exit code 0 is fine, 1
means that a run failed, 2 that the input is wrong, 130 that it was interrupted: every message names place, value, rule
and remedy. Torch is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridsd_sim.cli_arguments import (
    TEXT,
    Format,
    OutputFormat,
    needs_extra,
    print_result,
    read_address,
    read_loads,
    read_numbers,
    read_options,
    read_sizes,
    read_weights,
    run_to_exit,
    split,
)
from hybridsd_sim.errors import InputError, Problem
from hybridsd_sim.estimate import percent

app = typer.Typer(
    help="Run, count and profile Stable Diffusion on real hardware, alone or in parallel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


class Ranks(StrEnum):
    """Where the ranks of a parallel method run."""

    process = "process"
    loopback = "loopback"


class Guidance(StrEnum):
    """Whether steps are guided."""

    on = "on"
    off = "off"
    both = "both"


Rows = list[list[Any]]
"""Cells of a table as `reporting.table` takes them."""

Options = Annotated[list[str] | None, typer.Option("--option", help="KEY=VALUE of the method, e.g. stride=2.")]

ProfilesFolder = Annotated[Path | None, typer.Option("--profiles", help="A profiles folder with models of yours.")]

Weights = Annotated[Path | None, typer.Option(help="A local diffusers folder; default seeded random weights.")]

Device = Annotated[str | None, typer.Option(help="Its name in the catalogue; default the one that is here.")]

Threads = Annotated[int | None, typer.Option(help="CPU threads of each rank.", min=1)]

RanksIn = Annotated[Ranks | None, typer.Option(help="Default process; loopback must be asked for.")]

_GUIDANCE = {Guidance.on: (True,), Guidance.off: (False,), Guidance.both: (True, False)}


def main() -> None:
    """Run the command line; turn errors into messages and exit codes."""
    run_to_exit(app)


@contextmanager
def _torch_command(command: str, extra: str = "executors") -> Iterator[None]:
    """Around what a command does: libraries keep silent unless something is wrong, and an extra that lacks is named."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # read when diffusers is imported, by the ranks too
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    with needs_extra(extra, command):
        if extra == "live":
            from stamina.instrumentation import set_on_retry_hooks

            set_on_retry_hooks(())  # an attempt that is made again is told by its result, not by the library's own log
        yield


@app.callback()
def _root(*, debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None: ...


@app.command()
@_torch_command("profile")
def profile(
    models: Annotated[list[str], typer.Option(help="Models of the catalogue.")],
    out: Annotated[Path, typer.Option(help="The profiles folder that rows are written to.")],
    sizes: Annotated[list[str] | None, typer.Option(help="Pixels: 512, or 512x768 (height x width).")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Parallel methods; default single.")] = None,
    degrees: Annotated[list[str] | None, typer.Option(help="Numbers of ranks; default 1.")] = None,
    batch_sizes: Annotated[list[str] | None, typer.Option(help="Images a step; default 1.")] = None,
    guidance: Annotated[Guidance, typer.Option(help="Guided steps evaluate the UNet twice.")] = Guidance.on,
    runtime: Annotated[str, typer.Option(help="eager or compiled.")] = "eager",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    components: Annotated[list[str] | None, typer.Option(help="Default step,step_warmup.")] = None,
    option: Options = None,
    device: Device = None,
    threads: Threads = None,
    ranks: RanksIn = None,
    runs: Annotated[int, typer.Option(help="Timed runs, at least 10.")] = 10,
    warmup_runs: Annotated[int, typer.Option(help="Runs before the clock counts.")] = 3,
    time_budget_s: Annotated[float | None, typer.Option(help="Leave what would take longer than this.")] = None,
    weights: Weights = None,
    profiles: ProfilesFolder = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Measure components and steps, and write cost rows. Seconds, bytes, memory, energy; goes on where it stopped."""
    from hybridsd_sim.profiles import load_profiles

    from .profiling import STEP_COMPONENTS, Sweep, find_device, show_progress
    from .profiling import profile as measure_all

    sweep = Sweep(
        models=_read_models(models), sizes=read_sizes(sizes), methods=split(methods) or ["single"],
        degrees=read_numbers(degrees, "--degrees"), batch_sizes=read_numbers(batch_sizes, "--batch-sizes"),
        guidance=_GUIDANCE[guidance], runtime=runtime, precision=precision,
        components=split(components) or STEP_COMPONENTS,
        options=read_options(option), ranks=None if ranks is None else ranks.value, warmup_runs=warmup_runs, runs=runs,
    )  # fmt: skip
    catalogue = load_profiles(profiles)
    here = find_device(catalogue, device, threads)
    try:
        with show_progress() as progress:
            outcome = measure_all(
                sweep, catalogue, here, out, weights=weights, time_budget_s=time_budget_s, progress=progress
            )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the rows so far are in {out}; run it again to go on", err=True)
        raise SystemExit(130) from None
    for problem in outcome.refused:
        typer.echo(f"not measured: {problem}", err=True)
    for target in outcome.left:
        typer.echo(f"left for want of time: {target}", err=True)
    data: dict[str, Any] = {
        "device": outcome.here.name, "threads": outcome.here.threads, "rows_written": len(outcome.rows),
        **{
            key: [str(item) for item in getattr(outcome, key)]
            for key in ("kept", "left", "failed", "refused", "files")
        },
        "ceilings": dict(outcome.ceilings), "measured": outcome.summary,
    }  # fmt: skip
    _print(format_, data, lambda: _outcome_table(outcome.summary))
    if outcome.failed:
        raise SystemExit(1)


@app.command()
@_torch_command("count")
def count(
    models: Annotated[list[str], typer.Option(help="Models, paths of a config.json, or VAEs and text encoders.")],
    sizes: Annotated[list[str] | None, typer.Option(help="Pixels: 512, or 512x768 (height x width).")] = None,
    degrees: Annotated[list[str] | None, typer.Option(help="Instead: bytes a step between so many stripes.")] = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Count parameters, FLOPs and exchanged bytes. For one latent, on torch's meta device."""
    from .profiling import are_components, component_rows, count_rows, pcpp_bytes_rows

    names, pixels = _read_models(models), read_sizes(sizes)
    if degrees is not None:
        rows = pcpp_bytes_rows(names, pixels, read_numbers(degrees, "--degrees"))
        what = "received by the busiest rank in a guided fp16 step"
    elif are_components(names):
        rows, what = component_rows(names, pixels), "for one prompt or latent"
    else:
        rows, what = count_rows(names, pixels), "for one latent"
    title = "name" if rows and "name" in rows[0] else "model"
    figures = [name for name in rows[0] if name != title] if rows else []
    header = [what, *(row[title] for row in rows)]
    _print(format_, {"rows": rows}, lambda: (header, [[name, *(row[name] for row in rows)] for name in figures]))


@app.command()
@_torch_command("run")
def run(
    model: Annotated[str, typer.Option(help="A model of the catalogue; with --listen the edge's.")],
    out: Annotated[Path | None, typer.Option(help="The image: a .png file.")] = None,
    small_model: Annotated[str | None, typer.Option(help="The model of the steps from --switch-step on.")] = None,
    switch_step: Annotated[int | None, typer.Option(help="First step of the small model.")] = None,
    method: Annotated[str, typer.Option(help="Parallel method of the first stage.")] = "single",
    degree: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    option: Options = None,
    ranks: Annotated[Ranks, typer.Option(help="Where the ranks run.")] = Ranks.loopback,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Above 1: two UNet evaluations a step.")] = 7.5,
    height_px: Annotated[int | None, typer.Option(help="Default the width, else the model's native size.")] = None,
    width_px: Annotated[int | None, typer.Option(help="Default the height, else the model's native size.")] = None,
    sampler: Annotated[str, typer.Option(help="ddim, euler or dpmsolver++.")] = "ddim",
    seed: Annotated[int, typer.Option(help="Of the first latents.")] = 0,
    prompt: Annotated[str, typer.Option(help="What to paint.")] = "a photograph of an astronaut riding a horse",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    payload: Annotated[str, typer.Option(help="Precision of what is handed over: fp32 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    timeout_s: Annotated[float, typer.Option(help="Longest silence of a rank or of the other side.")] = 120.0,
    edge: Annotated[str | None, typer.Option(help="HOST:PORT of the edge that does the last steps.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT: be the edge, until interrupted.")] = None,
    weights: Weights = None,
    small_weights: Weights = None,
    profiles: ProfilesFolder = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Make one image and say what each part took. Or be the edge of somebody's run."""
    from .image_command import RunOptions, make_image, run_edge

    wanted = RunOptions(
        model=model, small_model=small_model, switch_step=switch_step, method=method, degree=degree,
        options=read_options(option), ranks=ranks.value,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height_px=height_px,
        width_px=width_px, sampler=sampler, seed=seed, prompt=prompt, precision=precision,
        payload=payload, device=device, threads=threads, weights=weights, small_weights=small_weights,
        profiles=profiles, timeout_s=timeout_s,
    )  # fmt: skip
    if listen is not None:
        with suppress(KeyboardInterrupt):
            run_edge(
                wanted, read_address(listen, "--listen"), lambda there: typer.echo(f"listening on {there}", err=True)
            )
        return
    data = make_image(wanted, out, None if edge is None else read_address(edge, "--edge"))
    parts = [*data["seconds"].items(), *data["bytes"].items()]
    _print(format_, data, lambda: (["part", "seconds or bytes"], [[name, value] for name, value in parts]))


@app.command()
@_torch_command("live", "live")
def live(
    plan: Annotated[Path | None, typer.Argument(help="A plan.yaml, or the folder of the run that wrote it.")] = None,
    host: Annotated[str, typer.Option(help="Where to serve; other machines' askers need the token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8471,
    token: Annotated[str | None, typer.Option(help="Bearer token.", envvar="HYBRIDSD_TOKEN")] = None,
    ask: Annotated[str | None, typer.Option(help="Instead: the URL of a service to ask for one image.")] = None,
    request_class: Annotated[str | None, typer.Option(help="Request class of the image.")] = None,
    prompt: Annotated[str, typer.Option(help="What to paint.")] = "a photograph of an astronaut riding a horse",
    seed: Annotated[int, typer.Option(help="Of the first latents.", min=0)] = 0,
    slo_s: Annotated[float | None, typer.Option(help="Promised seconds; default those of the class.")] = None,
    network: Annotated[str | None, typer.Option(help="Shape the transfers as this class of networks does.")] = None,
    out: Annotated[Path | None, typer.Option(help="The image: a .png file.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of each process.", min=1)] = 1,
    weights: Annotated[list[str] | None, typer.Option(help="MODEL=FOLDER; default seeded random weights.")] = None,
    profiles: ProfilesFolder = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Serve a plan's hybrid images over HTTP. Or be the edge that asks a service for one and finishes it."""
    from .live import FetchOptions, ProcessSettings, ServeOptions, fetch, serve

    process = ProcessSettings(
        threads=threads, device=device, precision=precision, weights=read_weights(weights), profiles=profiles
    )
    if (plan is None) == (ask is None):
        raise InputError(Problem("live", "PLAN or --ask", "takes the one or the other", "See --help."))
    if plan is not None:
        options = ServeOptions(plan=plan, host=host, port=port, token=token, process=process)
        serve(options, lambda line: typer.echo(line, err=True))
        return
    if ask is None or request_class is None or out is None:
        raise InputError(Problem("--ask", str(ask), "needs --request-class and --out", "See --help."))
    wanted = FetchOptions(
        url=ask, request_class=request_class, out=out, prompt=prompt, seed=seed, slo_s=slo_s, network=network,
        token=token, process=process,
    )  # fmt: skip
    try:
        data = fetch(wanted)
    except KeyboardInterrupt:
        typer.echo("interrupted: the request was taken back", err=True)
        raise SystemExit(130) from None
    _print(format_, data, lambda: (["part", "seconds"], [[name, value] for name, value in data["seconds"].items()]))


@app.command()
@_torch_command("validate", "live")
def validate(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report; goes on where it stopped.")],
    kinds: Annotated[list[str] | None, typer.Option(help="Default cloud,edge,hybrid,parallel.")] = None,
    loads: Annotated[list[str] | None, typer.Option(help="Utilisations; default 0.3,0.6,0.8.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of all runs together.", min=1)] = 2040,
    trace: Annotated[Path | None, typer.Option(help="Its arrivals, at each load's rate; default Poisson.")] = None,
    tries: Annotated[int, typer.Option(help="Rounds over all kinds; each goes on with what is missing.", min=1)] = 5,
    runs: Annotated[Path | None, typer.Option("--from", help="Compare the runs in this folder, observe none.")] = None,
    format_: OutputFormat = TEXT,
) -> None:
    """Compare live runs with their simulation. Is the simulator right on this machine?"""
    from .validation import KINDS, LOADS
    from .validation import validate as carry_out

    chosen = read_loads(loads, "--loads") if loads else LOADS
    rows = carry_out(
        out, kinds=split(kinds) or tuple(KINDS), loads=chosen, requests=requests, trace=trace, tries=tries, runs=runs
    )
    header = list(rows[0]) if rows else []
    _print(format_, {"runs": rows}, lambda: (header, [list(row.values()) for row in rows]))


def _read_models(values: list[str]) -> list[str]:
    """The models named; `InputError` where there is none, which would do nothing and look like success."""
    if not (names := split(values)):
        raise InputError(Problem("--models", repr(",".join(values)), "names no model", "For example sd15,sdxl."))
    return names


# ---- Printing -------------------------------------------------------------------------------------------------------


def _print(format_: Format, data: Mapping[str, Any], rows: Callable[[], tuple[Sequence[str], Rows]]) -> None:
    """A result on standard output: JSON alone, or a table. Of several processes the first prints."""
    from hybridsd_sim.reporting import table

    from .profiling import is_first_process

    if is_first_process():
        print_result(format_, lambda: data, lambda width: table(*rows(), width))


def _outcome_table(summary: Iterable[Mapping[str, Any]]) -> tuple[list[str], Rows]:
    """A line for each component; the share is that of the fastest arithmetic measured in the same run."""
    header = [
        "model", "component", "px", "batch", "ranks", "median s", "p5 s", "p95 s", "MB in", "TFLOP/s", "of ceiling",
    ]  # fmt: skip
    rows: Rows = []
    for entry in summary:
        size = f"{entry['height_px']}x{entry['width_px']}" if entry["height_px"] else "-"
        ranks = "1" if entry["degree"] == 1 else f"{entry['method']} x{entry['degree']}"
        if entry["rank"] is not None:
            ranks += f", rank {entry['rank']} alone"
        seconds = [entry[f"seconds_{point}"] for point in ("median", "p05", "p95")]
        megabytes = None if entry["comm_bytes"] is None else entry["comm_bytes"] / 1e6
        rate = None if entry["flop_per_s"] is None else entry["flop_per_s"] / 1e12
        batch = f"{entry['batch_size']}{' guided' if entry['guidance'] else ''}"
        share = None if entry["share_of_ceiling"] is None else percent(entry["share_of_ceiling"])
        rows.append([entry["model"], entry["component"], size, batch, ranks, *seconds, megabytes, rate, share])
    return header, rows
