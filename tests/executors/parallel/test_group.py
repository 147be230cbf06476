"""The ranks: either carrier brings the same, every byte is counted, and a lost rank is noticed."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import multiprocessing

from executors.parallel import Alone, Group, build_denoiser, run_ranks
from group_work import collect, die_at_once, fail_on_rank_1, shout
from hybridsd_sim.errors import InputError, RunError

SECONDS = 60.0
"""Far below the collectives' own timeout of two minutes: a lost rank is noticed because it is gone."""


@pytest.fixture(scope="module")
def over_processes() -> list[dict]:
    """What four real processes received over gloo."""
    return run_ranks(collect, 4, kind="gloo", threads=1)


def test_loopback_gives_every_rank_what_processes_do(over_processes):
    """A rank cannot tell which carrier it works over, in the values nor in the bytes counted."""
    assert run_ranks(collect, 4) == over_processes


def test_every_byte_sent_is_received(over_processes):
    """Over all ranks the bytes sent equal the bytes received."""
    sent, received, _ = (sum(counts) for counts in zip(*(rank["traffic"] for rank in over_processes), strict=True))
    assert sent == received


def test_collectives_deliver_by_rank(over_processes):
    """An all-gather is ordered by rank, an exchange by sender, and a part of a group numbers its own ranks."""
    second = over_processes[1]
    assert [row[0][0] for row in second["gathered"]] == [0.0, 1.0, 2.0, 3.0]
    assert second["exchanged"][0][0][0] == 0.0
    assert over_processes[2]["exchanged"][1][0][0] == 10.0
    assert second["told"][0][0] == 103.0
    assert [row[0][0] for row in over_processes[3]["beside"]] == [2.0, 3.0]
    assert over_processes[3]["half"] == (1, 2)


def test_the_bytes_of_a_rank_follow_from_the_collectives(over_processes):
    """24-byte tensors: to three others, to one, from the one who tells, and to one in the half."""
    assert over_processes[0]["traffic"] == (24 * (3 + 1 + 0 + 1), 24 * (3 + 1 + 1 + 1), 4)
    assert over_processes[3]["traffic"] == (24 * (3 + 1 + 3 + 1), 24 * (3 + 1 + 0 + 1), 4)


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="the kernel's byte counters are those of Linux")
def test_bytes_counted_are_bytes_on_the_wire():
    """The kernel's loopback interface sees what the ranks counted, and less than a tenth more for headers.

    Others may talk over that interface too, so the quietest of three tries counts.
    """
    tries = [run_ranks(shout, 2, kind="gloo", threads=1) for _ in range(3)]
    counted = sum(rank[0] for rank in tries[0])
    on_the_wire = min(max(rank[1] for rank in ranks) for ranks in tries)
    assert counted <= on_the_wire <= 1.1 * counted


def test_a_killed_rank_ends_the_run_with_an_error():
    """Nobody waits for a dead rank, and no process is left behind."""
    began = time.monotonic()
    with pytest.raises(RunError, match=r"rank \d of 3"):
        run_ranks(die_at_once, 3, kind="gloo", threads=1)
    assert time.monotonic() - began < SECONDS
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("kind", ["gloo", "loopback"])
def test_a_rank_that_fails_says_why(kind):
    """The error of the rank that failed comes out, not that of those who waited for it."""
    with pytest.raises((RunError, ValueError), match="the model of rank 1 is broken"):
        run_ranks(fail_on_rank_1, 2, kind=kind, threads=1)


def test_ranks_that_disagree_are_stopped():
    """In loopback a rank that waits for what nobody will send is an error, not a hang."""

    def disagree(group: Group) -> None:
        if group.rank == 0:
            group.all_gather(torch.zeros(1))

    with pytest.raises(RunError, match="rank 0 waits"):
        run_ranks(disagree, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for GPUs on a machine without")
def test_devices_that_are_not_there_stop_the_run():
    """A group never falls back to fewer or other devices."""
    with pytest.raises(InputError, match="2 needed for 2 nccl ranks"):
        run_ranks(collect, 2, kind="nccl")
    with pytest.raises(InputError, match="1 needed"):
        run_ranks(collect, 2, kind="loopback", device="cuda:0")
    with pytest.raises(InputError, match="at least 1"):
        run_ranks(collect, 0)


def test_loopback_clocks_count_a_ranks_own_time():
    """The time of the others is not in a rank's clock: while one rank works, the clock of the one that waits stands."""

    def work(group: Group) -> float:
        group.barrier()
        before = group.clock()
        time.sleep(1.0 if group.rank == 1 else 0.0)
        group.barrier()
        return group.clock() - before

    waited, worked = run_ranks(work, 2)
    assert waited < 0.5
    assert worked >= 1.0


def test_one_rank_needs_nobody():
    """Alone, every collective gives back the own tensor and moves nothing."""
    group, own = Alone(), torch.ones(3)
    assert [tensor is own for tensor in group.all_gather(own)] == [True]
    assert group.broadcast(own, 0) is own
    assert group.start_exchange({}, {}).wait() == {}
    assert group.split([[0]]) is group
    group.barrier()
    assert (group.traffic.sent_bytes, group.traffic.received_bytes) == (0, 0)


def test_a_method_that_only_the_model_knows_is_refused():
    """A method without an executor is an error that names it and those there are."""
    with pytest.raises(InputError, match=r"ring; is modelled, but no executor runs it. Choose one of single.*pcpp"):
        build_denoiser("ring", None, None, SimpleNamespace(size=2), {}, latents=torch.empty(0))
