"""Reads a plan.yaml strictly, and says where it does not fit a scenario.

A plan names the pools, devices, classes and steps that it was made for; under another scenario it would be carried out
on hardware that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hybridsd_sim.errors import InputError, Problem, unknown_name, validation_problem
from hybridsd_sim.plan import Deployment, Plan
from hybridsd_sim.pricing.search_space import plan_problems, request_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import RequestClass, Scenario, load_yaml

SHARES = "must each lie in (0, 1] and not exceed 1 together"

REMEDY, AGAIN = "Give the plan.yaml that `plan` wrote.", "Plan this scenario anew."


def load_deployment(path: str | Path) -> Deployment:
    """Read what `plan` wrote. Raises `InputError` for anything else: all problems at once, each with its place."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or "unreadable"
        raise InputError(Problem(str(path), found, "a plan must be a file that can be read", REMEDY)) from None
    return read_deployment(load_yaml(text, str(path)), str(path))


def read_deployment(data: Any, place: str) -> Deployment:
    """A deployment from the plain data of `Deployment.to_dict`, with numbers that are finite; as strict as a file's."""
    try:
        found = TypeAdapter(Deployment).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
        problems = [validation_problem(item, tags=("bool", "int", "float", "str")) for item in items]
        raise InputError(
            replace(problem, place=f"{place}: {problem.place}" if problem.place else place, remedy=REMEDY)
            for problem in problems
        ) from None
    except InputError as error:
        raise InputError(_at(f"{place}: ", problem) for problem in error.problems) from None
    # Keys that no plan has are those that do not come back.
    extra = _missing(data, json.loads(json.dumps(found.to_dict())), "")
    problems = [Problem(f"{place}: {key}", "unknown key", "stands in no plan", REMEDY) for key in extra]
    problems += [
        Problem(f"{place}: replicas.{pool}", str(nodes), "counts nodes, so it is at least 0", REMEDY)
        for pool, nodes in found.replicas.items()
        if nodes < 0
    ]
    problems += [
        Problem(f"{place}: plans.{name}", f"shares {[part.share for part in mix]}", SHARES, REMEDY)
        for name, mix in found.plans.items()
        if not mix or any(not 0.0 < part.share <= 1.0 for part in mix) or sum(p.share for p in mix) > 1.0 + 1e-9
    ]
    if problems:
        raise InputError(problems)
    return found


def load_plan_scenario(file: Path) -> Scenario:
    """The scenario of the run that wrote a plan.yaml, from the provenance.json beside it.

    Raises `InputError` if there is none, or one that cannot be read.
    """
    beside = file.with_name("provenance.json")
    remedy = "Name the plan.yaml in the folder of the run that wrote it, or pass its scenario."
    try:
        written = json.loads(beside.read_text(encoding="utf-8"))["scenario"]
        return Scenario.model_validate_json(json.dumps(written))
    except OSError as error:
        rule = "the scenario of a plan is read from beside it"
        raise InputError(Problem(str(beside), error.strerror or "unreadable", rule, remedy)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(Problem(str(beside), type(error).__name__, "must be what `plan` wrote", remedy)) from error


def _at(place: str, problem: Problem) -> Problem:
    return replace(problem, place=f"{place}{problem.place}", remedy=problem.remedy or REMEDY)


def _missing(given: Any, known: Any, path: str) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        for key, value in given.items():
            inner = f"{path}.{key}" if path else str(key)
            yield from _missing(value, known[key], inner) if key in known else (inner,)
    elif isinstance(given, list) and isinstance(known, list):
        for index, pair in enumerate(zip(given, known, strict=True)):
            yield from _missing(*pair, f"{path}[{index}]")


def deployment_problems(
    found: Deployment, scenario: Scenario, profiles: Profiles, *, complete: bool = True
) -> list[Problem]:
    """Where a plan names what the scenario does not have, breaks a rule of legality, or leaves a class out.

    Without `complete` a class may be left out: its requests are then turned away.
    """
    problems = []
    for key, given, known in (("plans", found.plans, scenario.requests), ("replicas", found.replicas, scenario.pools)):
        strange = [name for name in given if name not in known]
        rule = "is not in the scenario"
        problems += [replace(unknown_name(f"plan: {key}", name, list(known)), rule=rule) for name in strange]
    for name, spec in scenario.requests.items():
        if name in found.plans:
            for index, part in enumerate(found.plans[name]):
                place = f"plan: plans.{name}[{index}].plan"
                misfits = list(_plan_misfits(place, part.plan, spec, scenario))
                if not misfits:
                    try:
                        illegal: Sequence[Problem] = plan_problems(part.plan, request_of(name, spec), profiles)
                    except InputError as error:
                        illegal = error.problems
                    misfits = [_at(f"{place}: ", problem) for problem in illegal]
                problems += misfits
        elif complete:
            problems.append(Problem("plan: plans", repr(name), "this request class has no plan", AGAIN))
    return problems


def _plan_misfits(place: str, plan: Plan, spec: RequestClass, scenario: Scenario) -> Iterator[Problem]:
    devices = {name: pool.gpu for name, pool in scenario.pools.items()}
    devices |= {name: fleet.device for name, fleet in scenario.edge.items()}
    for name, site in plan.sites.items():
        if devices.get(name) != site.device:
            rule = f"the scenario has {devices.get(name, 'no pool or fleet of that name')}"
            yield Problem(place, f"{site.device} in {name}", rule, AGAIN)
    if plan.num_inference_steps != spec.num_inference_steps:
        rule = f"the scenario asks for {spec.num_inference_steps}"
        yield Problem(place, f"{plan.num_inference_steps} steps", rule, AGAIN)
    for stage in plan.stages:
        if stage.model not in (spec.model, *spec.small_models):
            rule = f"the scenario allows {', '.join((spec.model, *spec.small_models))}"
            yield Problem(place, stage.model, rule, AGAIN)
