"""Every exception raised on purpose: place, value, rule, remedy.

Bad input is an `InputError` (exit code 2); a run that could not finish is a `RunError` (exit code 1). An `InputError`
carries all the problems found, not only the first, so that a user mends a file once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the input: where it stands, what it is, the rule it breaks, how to mend it."""

    place: str
    value: str
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.place}: {self.value}; {self.rule}"
        return f"{text}. {self.remedy}" if self.remedy else text


class HybridSDError(Exception):
    """Any error that `hybridsd_sim` raises on purpose."""


class InputError(HybridSDError):
    """The input is wrong; `problems` lists everything found, in the order of the input."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # whole to another process: exceptions go there by their message otherwise


class MissingDataError(InputError):
    """The profiles do not hold what was asked for; the remedy names the nearest rows."""


class IllegalPlanError(InputError):
    """A plan breaks a rule of its method, model or site."""


class RunError(HybridSDError):
    """A run that began could not finish, or broke one of its own laws."""


def unknown_name(place: str, name: str, known: Sequence[str]) -> Problem:
    """The problem of a name that is not in a catalogue, with the closest names that are."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"Known names: {', '.join(sorted(known))}."
    return Problem(place, repr(name), "no such name in the catalogue", remedy)


def shown(value: Any) -> str:
    """A value as it stands in messages: JSON, text in single quotes, cut after 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(loc: Sequence[str | int]) -> str:
    """A location as text: names joined by dots, positions in brackets."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def validation_rule(item: ErrorDetails) -> str:
    """The rule that pydantic says is broken, in the words of every other message."""
    if item["msg"].startswith("Extra inputs"):
        return "no such key"
    rule = item["msg"].removeprefix("Value error, ")
    rule = re.sub(r"^\w+ should", "must", rule).replace(" after validation", "")
    rule = re.sub(r"\ban object|a valid (mapping|dictionary)", "a mapping of keys", rule)
    rule = rule.replace("Field required", "this key is required")
    return f"{rule[:1].lower()}{rule[1:]}"


def validation_problem(item: ErrorDetails, *, tags: Collection[str] = ()) -> Problem:
    """One complaint of pydantic as a problem at the dotted path of what it complains of.

    `tags` are parts of a location that stand for the alternatives of a union and not for keys.
    """
    place = dotted([part for part in item["loc"] if part not in tags])
    value = "missing" if item["type"] == "missing" else shown(item["input"])
    return Problem(place, value, validation_rule(item))
