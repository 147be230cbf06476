"""Every exception raised on purpose: place, value, rule, remedy.

Bad input is an `InputError` (exit code 2); a run that could not finish is a `RunError` (exit code 1). An `InputError`
carries all the problems found, not only the first, so that a user mends a file once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


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
