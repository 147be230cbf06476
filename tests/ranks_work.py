"""What the ranks of the tests of starting ranks do; importable by started processes, and quickly, without diffusers."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor

from executors.parallel import Group
from hybridsd_sim.errors import IllegalPlanError, Problem, RunError


def refuse(group: Group) -> None:
    """Rank 1 refuses its input, with two problems, while the others wait for it."""
    if group.rank == 1:
        raise IllegalPlanError([Problem("--degree", "2", "must be 1", "Mend it."), Problem("--option", "x", "unknown")])
    group.barrier()


def give_up(group: Group) -> None:
    """Rank 1 cannot finish its run while the others wait for it."""
    if group.rank == 1:
        raise RunError("the image holds NaN")
    group.barrier()


def multiply_wrongly(group: Group, broken: int) -> Tensor:
    """One rank makes an error of torch's, of the same type as a lost connection's, while the others wait for it."""
    if group.rank == broken:
        return torch.zeros(2, 3) @ torch.zeros(2, 3)
    return group.all_gather(torch.zeros(1))[0]


def be_killed(group: Group) -> None:
    """Rank 1 is killed while the others wait for it."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_gather(torch.zeros(1))


def threads_and_timeouts(group: Group) -> tuple[int, float, float]:
    """The rank's threads, and the seconds after which its group and a part of it give a collective up."""
    part = group.split([range(group.size)])
    return torch.get_num_threads(), _timeout_s(group), _timeout_s(part)


def _timeout_s(group: Group) -> float:
    seconds: float = group._process_group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds
