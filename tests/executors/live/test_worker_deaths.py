"""Workers of the live service that die: what is left of their tasks, and of their processes."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from executors.hybrid import parse
from executors.live import worker_pool
from executors.live.tasks import WorkerLost
from executors.live.worker_pool import WorkerProcesses
from hybridsd_sim.errors import InputError
from worker_site import ENDLESS, LONG_S, SENDER, levels, pair_method, task


def kill(pool, worker, rank=0):
    """Kill one process of a worker."""
    os.kill(pool.pids(worker)[rank], signal.SIGKILL)


LONGER = {"num_inference_steps": 12, "stop": 12}


def test_what_a_lost_worker_had_sent_is_gone_on_from_to_the_bit(site):
    """Kill a worker in its steps, one rank of another, and end a pool: every task comes back, none waits for ever.

    From its checkpoint another worker makes the picture that it would have been, with one-step and two-step samplers.
    """
    mortal = site.pool(
        site.spec("single"), site.spec("ended"), site.spec("ranks", method="cfg_parallel", degree=2), restart=False
    )
    ddim = task("ddim", checkpoint_every=2, **LONGER)
    dpm = task("dpm", checkpoint_every=3, sampler="dpmsolver++", **LONGER)

    async def lose_all():
        enough = asyncio.Event()

        def at(index, act):
            return lambda step, _: act() if step == index else None

        async with mortal:
            lost = asyncio.gather(
                mortal.run("single", ddim, on_step=at(5, lambda: kill(mortal, "single"))),
                mortal.run("single", task("queued")),
                mortal.run("ranks", task("two", **ENDLESS), on_step=at(2, lambda: kill(mortal, "ranks", 1))),
                return_exceptions=True,
            )
            killed = await lost
            left = mortal.up()
            with pytest.raises(WorkerLost, match=r"^worker single is not up"):
                await mortal.run("single", task())
            ended = asyncio.create_task(mortal.run("ended", dpm, on_step=at(7, enough.set)))
            await enough.wait()
        return *killed, await asyncio.gather(ended, return_exceptions=True), left

    single, queued, two, (ended,), left = site.do(lose_all())
    assert str(single) == str(queued) == "worker single died: killed by SIGKILL"
    assert str(two) == "worker ranks died: rank 1 of 2 killed by SIGKILL"
    assert str(ended) == "worker ended: its pool was ended"
    assert left == ("ended",)
    assert [event for event in site.heard if event[0] == "down"][-2:] in (
        [("down", "single"), ("down", "ranks")],
        [("down", "ranks"), ("down", "single")],
    )
    assert (queued.checkpoint, queued.step, two.checkpoint) == (None, 0, None)
    for lost, wanted, every in ((single, ddim, 2), (ended, dpm, 3)):
        assert lost.step % every == 0 < lost.step < 12
        assert parse(lost.checkpoint, SENDER).step == lost.step
        resumed = site.run("cloud", replace(wanted, begun=lost.checkpoint))
        assert len(resumed.step_s) == 12 - lost.step
        assert np.array_equal(levels(resumed), site.picture(wanted))


@pytest.mark.parametrize("step", [0, 3, 8])
@pytest.mark.parametrize(("worker", "rank"), [("cloud", 0), ("pair", 0), ("pair", 1)])
def test_a_worker_killed_at_any_step_gives_back_what_it_had_sent(site, worker, rank, step):
    """Whichever rank dies: the worker is replaced, and goes on from the checkpoint with the steps that were left."""
    wanted = task("killed", checkpoint_every=1, sampler="dpmsolver++", **LONGER)

    async def lose():
        at = lambda done, _: done == step and kill(site.workers, worker, rank)  # noqa: E731
        with pytest.raises(WorkerLost) as lost:
            await site.workers.run(worker, wanted, on_step=at)
        await site.until("up", worker)
        return lost.value

    site.heard.clear()
    lost = site.do(lose())
    assert str(lost) == f"worker {worker} died: {f'rank {rank} of 2 ' if worker == 'pair' else ''}killed by SIGKILL"
    assert step <= lost.step < 12
    resumed = site.run(worker, replace(wanted, begun=lost.checkpoint))
    assert len(resumed.step_s) == 12 - lost.step
    if worker == "cloud":
        assert np.array_equal(levels(resumed), site.picture(wanted))


def test_a_worker_that_dies_idle_is_there_again(site):
    """Rank 0 is killed while both wait for work: the worker is down, says so, and comes back with new processes."""
    before = site.workers.pids("pair")
    site.heard.clear()

    async def come_back():
        kill(site.workers, "pair")
        await site.until("down", "pair")
        with pytest.raises(WorkerLost, match=r"^worker pair is not up"):
            await site.workers.run("pair", task())
        assert levels(await site.workers.run("cloud", task())).any(), "the others work on"
        await site.until("up", "pair")
        return await site.workers.run("pair", task())

    assert np.array_equal(levels(site.do(come_back())), site.picture(task(), **pair_method(site)))
    assert site.heard == [("down", "pair"), ("up", "pair")]
    assert not set(before) & set(site.workers.pids("pair"))


def test_a_worker_that_the_machine_has_no_room_for_is_tried_again(site, monkeypatch):
    """When the operating system refuses a process to a worker that died, it is asked again until it grants one."""
    refusals = [OSError(errno.EAGAIN, "no more processes")] * 2

    def grudging(*arguments):
        if refusals:
            raise refusals.pop()
        return WorkerProcesses(*arguments)

    async def come_back():
        kill(site.workers, "cloud")
        await site.until("down", "cloud")
        await site.until("up", "cloud")
        return await site.workers.run("cloud", task())

    monkeypatch.setattr(worker_pool, "WorkerProcesses", grudging)
    assert np.array_equal(levels(site.do(come_back())), site.picture(task()))
    assert not refusals


def test_a_pool_with_a_worker_that_cannot_start_says_why(site):
    """What the worker found wrong comes out as it is, and the pool leaves nothing behind."""

    async def start():
        async with site.pool(replace(site.spec("x"), models=("small", "smal"))):
            pass

    children = set(active_children())
    with pytest.raises(InputError, match=r"'smal'.* Did you mean small"):
        site.do(start())
    assert set(active_children()) == children


ORPHANING = """
import asyncio, sys
from pathlib import Path
from executors.live import Task, ProcessPool, WorkerSpec

async def main(profiles, weights):
    weights = {"small": Path(weights)}
    worker = WorkerSpec(name="w", pool="p", models=("small",), weights=weights, profiles=Path(profiles))
    task = Task(key="x", model="small", height_px=192, width_px=64, num_inference_steps=900, stop=900)
    async with ProcessPool([worker]) as pool:
        await pool.run("w", task, on_step=lambda step, _: step == 0 and print(*pool.pids("w"), flush=True))

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def test_workers_do_not_outlive_the_process_that_started_them(site, tmp_path):
    """Kill the pool's process in the middle of a step: its workers end by themselves."""
    script = tmp_path / "parent.py"
    script.write_text(ORPHANING)
    said = [sys.executable, script, site.profiles, site.weights["small"]]
    root = Path(__file__).parents[3]
    with subprocess.Popen(said, stdout=subprocess.PIPE, env={"PYTHONPATH": str(root)}) as parent:
        pids = [int(text) for text in parent.stdout.readline().split()]
        parent.kill()
    deadline_s = time.monotonic() + LONG_S
    while any(map(lives, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert len(pids) == 1
    assert not any(map(lives, pids))


def lives(pid):
    """Whether a process is there and not merely waiting to be buried."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
