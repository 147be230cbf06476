"""Follows a plan's file: when its content changes, the plan is replaced; a broken file is refused and logged.

A changed time stamp makes the file be read, a changed digest of its content makes the plan be replaced: a file that is
only touched, or written again as it was, changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from hybridsd_sim.errors import InputError

LOG = logging.getLogger("hybridsd_sim.server")

EVERY_S = 1.0
"""Seconds between two looks at the file."""


class FileState(NamedTuple):
    """The state of a file: what tells cheaply that it was touched, and its content; None where it is not there."""

    stamp: tuple[int, int, int] | None
    digest: bytes | None


class PlanFile:
    """A plan.yaml, or the folder of a run that holds one, and the state of it that is in use.

    That is the state in which it is when this is made: make it before the file is read, and no change is missed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "plan.yaml" if path.is_dir() else path
        self._in_use = FileState(self._stamp(), self._content())

    def changed(self) -> FileState | None:
        """The file's state, if its content is not the one in use. A file that is not there has not changed."""
        stamp = self._stamp()
        if stamp is None or stamp == self._in_use.stamp:
            return None
        seen = FileState(stamp, self._content())
        if seen.digest == self._in_use.digest:
            self._in_use = seen
        return None if seen.digest in {self._in_use.digest, None} else seen

    def taken(self, seen: FileState) -> None:
        """That state is in use from now on."""
        self._in_use = seen

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _content(self) -> bytes | None:
        try:
            return sha256(self.path.read_bytes()).digest()
        except OSError:
            return None


async def follow(file: PlanFile, replace: Callable[[Path], Awaitable[int]], every_s: float = EVERY_S) -> None:
    """Replace the plan whenever its file changes, for ever.

    A file that will not do is tried again at every look, as what it needs may come after it; what is wrong with it is
    logged when it is another thing than at the look before.
    """
    logged: list[str] = []
    while True:
        await asyncio.sleep(every_s)
        wrong: list[str] = []
        try:
            if seen := await asyncio.to_thread(file.changed):
                LOG.info("plan %d is in use: %s has changed", await replace(file.path), file.path)
                file.taken(seen)
        except InputError as error:
            wrong = [str(problem) for problem in error.problems]
        except Exception as error:  # noqa: BLE001 -- whatever one version of the file does, the next is looked at
            wrong = [type(error).__name__]
        if wrong != logged:
            for problem in wrong:
                LOG.error("the plan in use stays: %s", problem)
        logged = wrong
