"""Processors that are kept awake while something is timed, and who gets one of his own; where the system can do it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from executors.validation.rehearse import assign_cpus, available_cpus, keep_cpus_awake
from waiting import alive, within_a_minute

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no class of idle processes")


def test_every_processor_has_a_watcher_that_gives_way_to_anybody():
    """One of the idle class on each, until the end of the block, whatever ends it."""
    watchers = []

    def failing():
        with keep_cpus_awake() as started:
            watchers.extend(started)
            within_a_minute(lambda: all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in watchers))
            assert [os.sched_getaffinity(pid) for pid in watchers] == [{cpu} for cpu in available_cpus()]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert watchers
    assert not any(alive(pid) for pid in watchers)


def test_watchers_end_with_a_process_that_is_killed():
    """Nobody is left behind who would keep a processor busy for ever."""
    script = (
        "import time\nfrom executors.validation.rehearse import keep_cpus_awake\n"
        "with keep_cpus_awake() as pids:\n    print(*pids, flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        watchers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert watchers
    within_a_minute(lambda: not any(alive(pid) for pid in watchers))


def test_processes_have_a_processor_each_or_nobody_has():
    """In order, none twice; where they are too few, the system shares them out as it likes."""
    cpus = (2, 5, 7)
    assert assign_cpus([2, 1], cpus) == [(2, 5), (7,)]
    assert assign_cpus([1], cpus) == [(2,)]
    assert assign_cpus([2, 2], cpus) == [(), ()]
    assert assign_cpus([], cpus) == []
