"""Processors that are kept awake while something is timed, and who gets one of his own; where the system can do it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from executors.validation import rehearse as awake
from executors.validation.rehearse import a_cpu_each, kept_awake, own_cpus
from waiting import alive, within_a_minute

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no class of idle processes")


def test_every_processor_has_a_watcher_that_gives_way_to_anybody():
    """One of the idle class on each, until the end of the block, whatever ends it."""
    watchers = []

    def failing():
        with kept_awake() as started:
            watchers.extend(started)
            within_a_minute(lambda: all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in watchers))
            assert [os.sched_getaffinity(pid) for pid in watchers] == [{cpu} for cpu in own_cpus()]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert watchers
    assert not any(alive(pid) for pid in watchers)


def test_watchers_end_with_a_process_that_is_killed():
    """Nobody is left behind who would keep a processor busy for ever."""
    script = (
        "import time\nfrom executors.validation.rehearse import kept_awake\n"
        "with kept_awake() as pids:\n    print(*pids, flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        watchers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert watchers
    within_a_minute(lambda: not any(alive(pid) for pid in watchers))


def test_processes_have_a_processor_each_or_nobody_has(monkeypatch):
    """In order, none twice; where they are too few, the system shares them out as it likes."""
    monkeypatch.setattr(awake, "own_cpus", lambda: (2, 5, 7))
    assert a_cpu_each([2, 1]) == [(2, 5), (7,)]
    assert a_cpu_each([1]) == [(2,)]
    assert a_cpu_each([2, 2]) == [(), ()]
    assert a_cpu_each([]) == []
