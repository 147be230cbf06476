"""How a command line begins and ends: arguments become values, errors become messages and exit codes.

Both command lines, this package's and the executors', share the options that they have in common, and read lists,
sizes, addresses and KEY=VALUE pairs with these functions. What is wrong is an `InputError` that names the option; where
several things are, all are told at once. Exit code 0 is fine, 1 means that the run failed, 2 that the input is wrong.
`--debug`, anywhere in the line, shows tracebacks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from enum import StrEnum
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hybridsd_sim.errors import HybridSDError, InputError, Problem, unknown_name

if TYPE_CHECKING:
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario


class Format(StrEnum):
    """How a result is printed."""

    text = "text"
    json = "json"


OutputFormat = Annotated[Format, typer.Option("--format", help="How to print the result.")]

TEXT = Format.text


def together(*steps: Callable[[], Any]) -> list[Any]:
    """What the steps return, or one `InputError` with the problems of all of them."""
    results: list[Any] = []
    problems: list[Problem] = []
    for step in steps:
        try:
            results.append(step())
        except InputError as error:
            problems += error.problems
    refuse(problems)
    return results


def read_scenario(
    path: str, name: str | None, settings: Sequence[str] | None, flags: Mapping[str, tuple[str, Any]] | None = None
) -> Scenario:
    """The resolved scenario; `flags` are options that set a key of their own, and are named in messages about it."""
    from hybridsd_sim.scenario import load_scenario

    overrides: dict[str, Any] = read_pairs(settings, "--set", example="seed=2")
    given = {flag: pair for flag, pair in (flags or {}).items() if pair[1] is not None}
    if twice := [flag for flag, (key, _) in given.items() if key in overrides]:
        raise InputError(Problem(flag, "given", f"--set {given[flag][0]} says it too", "Keep one.") for flag in twice)
    try:
        return load_scenario(path, scenario=name, overrides=overrides | dict(given.values()))
    except InputError as error:
        places = {f"--set: {key}": flag for flag, (key, _) in given.items()}
        raise InputError(replace(p, place=places.get(p.place, p.place)) for p in error.problems) from None


def read_profiles(scenario: Scenario) -> Profiles:
    """The shipped profiles, and over them those that the scenario names."""
    from hybridsd_sim.profiles import load_profiles

    return load_profiles(scenario.search.profiles)


def named_scenarios(
    path: str, settings: Sequence[str] | None, flags: Mapping[str, tuple[str, Any]] | None = None
) -> dict[str, Scenario]:
    """Every scenario that a file names, resolved under the same options; where it names none, every override.

    Raises `InputError` where there is neither.
    """
    from hybridsd_sim.scenario import named_blocks

    scenarios, overrides = named_blocks(path)
    if not (names := scenarios or overrides):
        rule, remedy = "names neither scenarios nor overrides to plan for", "Add `overrides:`, or leave --robust out."
        raise InputError(Problem("--robust", path, rule, remedy))
    read = together(*(lambda name=name: read_scenario(path, name, settings, flags) for name in names))
    return dict(zip(names, read, strict=True))


def split(values: Sequence[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list, each value once."""
    return list(dict.fromkeys(_items(values)))


def _items(values: Sequence[str] | None) -> list[str]:
    return [item.strip() for value in values or () for item in value.split(",") if item.strip()]


def read_pairs(pairs: Sequence[str] | None, flag: str, *, example: str, form: str = "KEY=VALUE") -> dict[str, str]:
    """Pairs of `form`, whose values are still text; all that are none, or repeat a key, are reported together."""
    found: dict[str, str] = {}
    problems = []
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(flag, repr(pair), f"needs {form}", f"For example {flag} {example}."))
        elif key.strip() in found:
            problems.append(Problem(flag, repr(pair), "a key may be given once only", "Keep one of them."))
        found[key.strip()] = value
    refuse(problems)
    return found


def read_options(given: Sequence[str] | None) -> dict[str, Any]:
    """A method's options sorted by key. Values mean what they mean in a scenario: true, True, 2, 0.3 and text."""
    from hybridsd_sim.scenario import read_value

    pairs = read_pairs(_items(given), "--option", example="stride=2")
    return {key: read_value(value, f"--option {key}") for key, value in sorted(pairs.items())}


def read_weights(given: Sequence[str] | None) -> dict[str, Path]:
    """Folders of weights by model. Raises `InputError` for all that is no MODEL=FOLDER, or names no folder."""
    form, example = "MODEL=FOLDER, a folder that exists", "sd15=models/sd15"
    pairs = read_pairs(given, "--weights", example=example, form=form)
    folders = {model: Path(folder.strip()) for model, folder in pairs.items()}
    refuse(
        [
            Problem("--weights", repr(f"{model}={pairs[model]}"), f"needs {form}", f"For example --weights {example}.")
            for model, folder in folders.items()
            if not folder.is_dir()
        ]
    )
    return folders


def read_numbers(values: Sequence[str] | None, flag: str) -> list[int]:
    """Whole numbers; 1 where none is given."""
    return [_whole(text, flag) for text in split(values) or ["1"]]


def read_sizes(values: Sequence[str] | None) -> list[tuple[int, int]]:
    """Sizes as (height_px, width_px); one number is a square, and 512 is the default."""
    sizes = []
    for text in split(values) or ["512"]:
        sides = [_whole(part, "--sizes") for part in text.split("x")]
        if len(sides) > 2:
            rule = "must be one number, or height x width"
            raise InputError(Problem("--sizes", repr(text), rule, "Such as 512x768."))
        sizes.append((sides[0], sides[-1]))
    return sizes


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(Problem(flag, repr(text), "must be a whole number")) from None


def read_loads(values: Sequence[str], flag: str) -> list[float]:
    """Utilisations, above 0 and below 1."""
    loads = []
    for text in split(values):
        try:
            loads.append(float(text))
        except ValueError:
            loads.append(nan)
        if not 0.0 < loads[-1] < 1.0:
            raise InputError(Problem(flag, repr(text), "must be a number above 0 and below 1", "For example 0.3,0.6."))
    return loads


def read_address(text: str, flag: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(Problem(flag, repr(text), "needs HOST:PORT", "For example 127.0.0.1:8471."))
    return host, int(port)


def policy_problems(names: Sequence[str], place: str, *, planned: bool, budget: float | None) -> list[Problem]:
    """Policies that do not exist, follow a plan where none was `planned`, or spend a `budget` that is not there."""
    from hybridsd_sim.scheduling import POLICIES

    problems = [unknown_name(place, name, list(POLICIES)) for name in names if name not in POLICIES]
    if "planned" in names and not planned:
        problems.append(Problem(place, "planned", "follows a plan, and none was given", "Add --plan with a plan.yaml."))
    if "budgeted" in names and budget is None:
        problems.append(Problem(place, "budgeted", "spends budget.usd_per_hour, and there is none", "Give a budget."))
    return problems if names else [Problem(place, "nothing", "needs a policy", f"Known: {', '.join(POLICIES)}.")]


@contextmanager
def needs_extra(extra: str, command: str) -> Iterator[None]:
    """Around what a command does: `InputError` with the extra to install where a library of it is missing.

    A module of our own that is missing is a mistake of ours, and is told as what it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in {"", "hybridsd_sim", "executors"}:
            raise
        rule, remedy = f"needs {library}, which is not installed", f"pip install 'hybridsd-sim[{extra}]'"
        raise InputError(Problem(command, "given", rule, remedy)) from None


@contextmanager
def output_aside() -> Iterator[None]:
    """Send what libraries print on standard output, in C too, to standard error: a result stands there alone."""
    with redirect_stdout(sys.stderr):
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one `InputError` with all of them, if there are any."""
    if problems:
        raise InputError(problems)


def print_result(format_: Format, data: Callable[[], Any], text: Callable[[int], str], *pages: str) -> None:
    """A result on standard output: JSON alone, or text as wide as the terminal, 120 characters where there is none."""
    from hybridsd_sim.reporting import to_json

    if format_ is Format.json:
        typer.echo(to_json(data()), nl=False)
        return
    shown = text(shutil.get_terminal_size((120, 24)).columns)
    typer.echo("\n".join(filter(None, (shown, "".join(f"report: {page}\n" for page in pages)))), nl=False)


def run_to_exit(app: Callable[..., Any]) -> None:
    """Run a typer app on this process's arguments; turn errors into messages and exit codes."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments)
    except InputError as error:
        _stop(2, error.problems, debug=debug)
    except HybridSDError as error:
        _stop(1, [error], debug=debug)
    except Exception as error:  # noqa: BLE001 -- whatever else happens, people get a message and scripts an exit code
        _stop(1, [f"{type(error).__name__}: {error}. Add --debug to see where."], debug=debug)


def _stop(code: int, messages: Sequence[object], *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    sys.stderr.writelines(f"error: {message}\n" for message in messages)
    raise SystemExit(code)
