"""Waiting for what other processes do, and seeing whether they still run."""

from __future__ import annotations

import time
from pathlib import Path


def within_a_minute(happens):
    """Wait until something is true; what it is."""
    end_s = time.monotonic() + 60
    while not (found := happens()) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert found
    return found


def alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
