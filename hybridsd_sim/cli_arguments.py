"""What the command line was given: scenarios with flags on top, KEY=VALUE pairs, lists; all problems at once.

How a command line ends: errors as messages on standard error, and exit codes.

Exit 0 is fine, 1 means that the run failed, 2 that the input is wrong. `--debug`, anywhere in the line, shows
tracebacks.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from hybridsd_sim.errors import HybridSDError, InputError, Problem, unknown_name

if TYPE_CHECKING:
    from hybridsd_sim.profiles import Profiles
    from hybridsd_sim.scenario import Scenario


SERVER_LIBRARIES = frozenset({"anyio", "fastapi", "httptools", "prometheus_client", "starlette", "uvicorn"})
"""What the extra `serve` installs."""


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

    overrides: dict[str, Any] = pairs_of(settings, "--set", "seed=2")
    given = {flag: pair for flag, pair in (flags or {}).items() if pair[1] is not None}
    if twice := [flag for flag, (key, _) in given.items() if key in overrides]:
        raise InputError(Problem(flag, "given", f"--set {given[flag][0]} says it too", "Keep one.") for flag in twice)
    try:
        return load_scenario(path, scenario=name, overrides=overrides | dict(given.values()))
    except InputError as error:
        places = {f"--set: {key}": flag for flag, (key, _) in given.items()}
        raise InputError(replace(p, place=places.get(p.place, p.place)) for p in error.problems) from None


def profiles_of(scenario: Scenario) -> Profiles:
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


def pairs_of(pairs: Sequence[str] | None, flag: str, example: str) -> dict[str, str]:
    """KEY=VALUE pairs; all that are none, or repeat a key, are reported together."""
    found: dict[str, str] = {}
    problems = []
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(flag, repr(pair), "needs KEY=VALUE", f"For example {flag} {example}."))
        elif key.strip() in found:
            problems.append(Problem(flag, repr(pair), "a key may be given once only", "Keep one of them."))
        found[key.strip()] = value
    refuse(problems)
    return found


def options_of(given: Sequence[str] | None) -> tuple[tuple[str, Any], ...]:
    """A method's options with typed values, sorted by key."""
    from hybridsd_sim.scenario import read_value

    pairs = pairs_of(split(given), "--option", "stride=2")
    return tuple((key, read_value(value, f"--option {key}")) for key, value in sorted(pairs.items()))


def split(values: Sequence[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list."""
    return [name.strip() for value in values or () for name in value.split(",") if name.strip()]


def policy_problems(names: Sequence[str], place: str, *, planned: bool, budget: float | None) -> list[Problem]:
    """Policies that do not exist, follow a plan where none was `planned`, or spend a `budget` that is not there."""
    from hybridsd_sim.scheduling import POLICIES

    problems = [unknown_name(place, name, list(POLICIES)) for name in names if name not in POLICIES]
    if "planned" in names and not planned:
        problems.append(Problem(place, "planned", "follows a plan, and none was given", "Add --plan with a plan.yaml."))
    if "budgeted" in names and budget is None:
        problems.append(Problem(place, "budgeted", "spends budget.usd_per_hour, and there is none", "Give a budget."))
    return problems if names else [Problem(place, "nothing", "needs a policy", f"Known: {', '.join(POLICIES)}.")]


def import_server() -> ModuleType:
    """The room `server`. Raises `InputError` where its libraries, an extra, are not installed."""
    try:
        return import_module("hybridsd_sim.serving")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in SERVER_LIBRARIES:
            raise
        rule, remedy = f"needs {error.name}, which is not installed", "pip install 'hybridsd-sim[serve]'"
        raise InputError(Problem("serve", "given", rule, remedy)) from None


def refuse(problems: Sequence[Problem]) -> None:
    """Raise one `InputError` with all of them, if there are any."""
    if problems:
        raise InputError(problems)


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
