"""What the ranks of the group's tests do; importable by started processes, and quickly so, without diffusers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from executors.parallel import Group


def die_at_once(group: Group) -> None:
    """Rank 1 is killed while the others wait for it."""
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_gather(torch.zeros(1))


def fail_on_rank_1(group: Group) -> None:
    """Rank 1 raises while the others wait for it."""
    if group.rank == 1:
        raise ValueError("the model of rank 1 is broken")
    group.all_gather(torch.zeros(1))


def collect(group: Group) -> dict[str, Any]:
    """Every collective once, with tensors that say who sent them."""
    own = torch.full((2, 3), float(group.rank))
    pending = group.start_all_gather(own)
    following, preceding = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    exchange = group.start_exchange({following: own * 10}, {preceding: torch.empty(2, 3)})
    told = group.broadcast(own + 100 if group.rank == group.size - 1 else torch.empty(2, 3), group.size - 1)
    half = group.split([range(group.size // 2), range(group.size // 2, group.size)])
    beside = half.all_gather(own)
    group.barrier()
    return {
        "gathered": [tensor.tolist() for tensor in pending.wait()],
        "exchanged": {rank: tensor.tolist() for rank, tensor in exchange.wait().items()},
        "told": told.tolist(),
        "beside": [tensor.tolist() for tensor in beside],
        "half": (half.rank, half.size),
        "traffic": (group.traffic.sent_bytes, group.traffic.received_bytes, group.traffic.messages),
    }


def shout(group: Group) -> tuple[int, int]:
    """Bytes that this rank counted as sent, and bytes that the kernel's loopback interface carried meanwhile."""
    group.barrier()
    before, counted = _loopback_bytes(), group.traffic.sent_bytes
    for _ in range(4):
        group.all_gather(torch.zeros(2**20))
    group.start_exchange({1 - group.rank: torch.zeros(2**20)}, {1 - group.rank: torch.empty(2**20)}).wait()
    group.barrier()
    return group.traffic.sent_bytes - counted, _loopback_bytes() - before


def _loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))
