"""Follows a plan's file: when its content changes, the plan is replaced; a broken file is refused and logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from hybridsd_sim.errors import InputError

LOG = logging.getLogger("hybridsd_sim.server")
EVERY_S = 1.0
"""Seconds between two looks at the file."""


class PlanFile:
    """A plan.yaml, or the folder of a run that holds one, and whether it has changed since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path / "plan.yaml" if path.is_dir() else path
        self._stamp, self._digest = self._now(), self._content()

    def changed(self) -> bool:
        """Whether the content differs from that of the last look. A file that is not there has not changed."""
        stamp = self._now()
        if stamp is None or stamp == self._stamp:
            return False
        before, self._stamp, self._digest = self._digest, stamp, self._content()
        return self._digest not in {before, None}

    def _now(self) -> tuple[int, int, int] | None:
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
    """Replace the plan whenever its file changes, for ever; what is wrong with the file is logged."""
    while True:
        await asyncio.sleep(every_s)
        try:
            if await asyncio.to_thread(file.changed):
                LOG.info("plan %d is in use: %s has changed", await replace(file.path), file.path)
        except InputError as error:
            for problem in error.problems:
                LOG.error("the plan in use stays: %s", problem)  # noqa: TRY400 -- it names the place in the file
        except Exception as error:  # noqa: BLE001 -- whatever one version of the file does, the next is looked at
            LOG.error("the plan in use stays: %s", type(error).__name__)  # noqa: TRY400
