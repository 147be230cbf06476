"""Starting ranks: what a rank that fails says to whoever started it, and what every rank is given."""

from __future__ import annotations

import socket
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from executors.parallel import Distributed, run_ranks
from hybridsd_sim.errors import IllegalPlanError, RunError
from ranks_work import be_killed, give_up, multiply_wrongly, refuse, threads_and_timeouts


def start(work, size=2, *args, **options):
    """Run on real processes, a thread each."""
    return run_ranks(work, size, kind="gloo", args=args, **{"threads": 1} | options)


def shown(error):
    """What --debug prints of an error."""
    return "".join(traceback.format_exception(error))


def test_wrong_input_found_by_a_rank_is_wrong_input() -> None:
    """An `InputError` of a rank comes out as it is, every problem with its remedy, and --debug shows where."""
    with pytest.raises(IllegalPlanError) as caught:
        start(refuse)
    assert str(caught.value) == "--degree: 2; must be 1. Mend it.\n--option: x; unknown"
    assert [problem.place for problem in caught.value.problems] == ["--degree", "--option"]
    assert "in refuse" in shown(caught.value)


def test_a_run_that_a_rank_gives_up_says_why_and_nothing_else() -> None:
    """A `RunError` of a rank keeps its words."""
    with pytest.raises(RunError) as caught:
        start(give_up)
    assert str(caught.value) == "the image holds NaN"


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_is_told_from_those_that_lost_it(broken) -> None:
    """Whichever rank fails, its own error is the message, in one line; its traceback is there for --debug."""
    with pytest.raises(RunError) as caught:
        start(multiply_wrongly, 2, broken)
    message = str(caught.value)
    assert message.startswith(f"rank {broken} of 2 failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "\n" not in message
    assert "in multiply_wrongly" in shown(caught.value)


def test_a_rank_that_is_killed_is_the_one_that_died() -> None:
    """Those who lost it are not blamed, and no process is left behind."""
    with pytest.raises(RunError, match=r"^rank 1 of 3 died: killed by SIGKILL$"):
        start(be_killed, 3)
    assert multiprocessing.active_children() == []


def test_ranks_share_the_threads_and_know_their_timeout() -> None:
    """By default a rank has its share of this process's threads; a part of a group is as patient as the whole."""
    torch.set_num_threads(5)
    assert start(threads_and_timeouts, 2, threads=None, timeout_s=33) == [(2, 33, 33)] * 2


@pytest.fixture
def torchrun(monkeypatch):
    """This process as the only rank that torchrun started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in (said | {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}).items():
        monkeypatch.setenv(name, str(value))
    yield
    dist.destroy_process_group()


def test_ranks_of_torchrun_know_their_timeout_too(torchrun) -> None:
    """A group that torchrun started waits as long as was asked for, whole or in parts, not torch's default."""
    assert start(threads_and_timeouts, 1, timeout_s=33) == [(1, 33, 33)]


def test_a_rank_of_torchrun_that_loses_another_at_the_end_fails(torchrun, monkeypatch) -> None:
    """Whoever cannot meet the others after the work does not pretend that all is well."""

    def lost(self):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Distributed, "barrier", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        start(threads_and_timeouts, 1)
