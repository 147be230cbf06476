"""How far a profile has come: a bar with the time left for people, plain lines for logs, both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .grid import ProfileTarget
from .rows_file import is_first_process


class Progress:
    """Is told how far a profile has come. This one keeps silent."""

    def begin(self, total: float) -> None:
        """Work ahead: the sum of the targets' weights."""

    def start(self, target: ProfileTarget) -> None:
        """What is measured now."""

    def finish(self, target: ProfileTarget) -> None:
        """What was measured: its rows are written, unless it failed."""


class Lines(Progress):
    """A line for each target."""

    def __init__(self) -> None:
        self._total, self._done = 0.0, 0.0

    def begin(self, total: float) -> None:
        self._total = total

    def start(self, target: ProfileTarget) -> None:
        sys.stderr.write(f"{self._done / self._total:4.0%} {target}\n")

    def finish(self, target: ProfileTarget) -> None:
        self._done += target.weight


class Bar(Progress):
    """A bar that guesses the time left from the work that the targets take."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True), speed_estimate_period=3600)
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, total: float) -> None:
        self._bar.update(self._task, total=total)

    def start(self, target: ProfileTarget) -> None:
        self._bar.update(self._task, description=str(target))

    def finish(self, target: ProfileTarget) -> None:
        self._bar.advance(self._task, target.weight)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """How far a profile has come, on standard error: a bar with the time left for people, plain lines in logs.

    Under torchrun the first process shows it and the others keep silent.
    """
    if not is_first_process():
        yield Progress()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        with Bar() as bar:
            yield bar
