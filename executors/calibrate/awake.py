"""Keeps processors awake while requests are timed on them, and each process of a worker on a processor of its own.

A processor that has nothing to do goes to sleep; the next task finds another clock, cold caches or, on a virtual
machine, a host that has lent the processor to somebody else. Steps then take a few per cent more or less from one half
minute to the next. A process of the lowest scheduling class (SCHED_IDLE) that does nothing on every processor prevents
that, and gives way at once to whoever has something to do; but it counts against a container's CPU quota, under which
nobody should calibrate. Both are Linux's; elsewhere nothing is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_WATCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent = int(sys.argv[2])
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


def own_cpus() -> tuple[int, ...]:
    """The CPUs that this process may use, by number; none where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def a_cpu_each(processes: Sequence[int]) -> list[tuple[int, ...]]:
    """CPUs for workers of so many processes, one a process; none for anybody where there are too few."""
    free = iter(own_cpus())
    if sum(processes) > len(own_cpus()):
        return [()] * len(processes)
    return [tuple(next(free) for _ in range(count)) for count in processes]


@contextmanager
def kept_awake() -> Iterator[tuple[int, ...]]:
    """No CPU of this process sleeps inside the block; the ids of the processes that watch, which end with it."""
    watchers: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in own_cpus() if hasattr(os, "SCHED_IDLE") else ():
            command = [sys.executable, "-c", _WATCH, str(cpu), str(os.getpid())]
            watchers.append(subprocess.Popen(command))  # noqa: S603 -- this very program
        yield tuple(watcher.pid for watcher in watchers)
    finally:
        for watcher in watchers:
            watcher.kill()
        for watcher in watchers:
            watcher.wait()
