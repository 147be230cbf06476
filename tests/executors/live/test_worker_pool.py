"""The workers of the live service: real processes with small models, what they make, and what is left when they die."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from executors.hybrid import parse, serialise
from executors.live.tasks import TaskCancelled, WorkerLost
from executors.models import SamplerState
from executors.models.samplers import SAMPLERS
from executors.validation.rehearse import available_cpus
from hybridsd_sim.errors import InputError, RunError
from small_models import HEIGHT_PX, WIDTH_PX
from worker_site import ENDLESS, SENDER, STEPS, levels, pair_method, task

# ---- What workers make ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_worker_makes_the_picture_of_a_run(site, sampler):
    """Prompt, steps and decoder in a worker's process end with the picture of `executors run`, to the bit."""
    wanted = task(sampler=sampler)
    assert np.array_equal(levels(site.run("cloud", wanted)), site.picture(wanted))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("switch", [0, 1, STEPS])
def test_a_chain_of_workers_makes_the_picture_of_two_stages(site, sampler, switch):
    """The cloud's worker up to the switch step and the edge's from there: the two-stage picture of one process."""
    begun = site.run("cloud", task(sampler=sampler, stop=switch, decode=False))
    assert parse(begun.payload, SENDER).step == switch
    ended = site.run("edge", task(model="smaller", sampler=sampler, begun=begun.payload))
    wanted = site.picture(task(sampler=sampler), small="smaller", switch_step=switch)
    assert np.array_equal(levels(ended), wanted)
    assert (len(begun.step_s), len(ended.step_s)) == (switch, STEPS - switch)


@pytest.mark.skipif(not available_cpus(), reason="this system does not say where processes run")
def test_a_worker_stays_on_the_processors_it_was_given(site):
    """One that was given none goes where the system likes."""
    on = {name: os.sched_getaffinity(site.workers.pids(name)[0]) for name in ("cloud", "edge")}
    assert on == {"cloud": set(available_cpus()[-1:]), "edge": set(available_cpus())}


def test_a_worker_of_two_ranks_makes_what_its_ranks_make_in_one_process(site):
    """Two processes equal loopback ranks; prompts, sizes and guidance may change from task to task, and come back."""
    method = pair_method(site)
    first = task()
    for wanted in (first, replace(first, prompt="b"), replace(first, height_px=64, guidance_scale=1.0), first):
        assert np.array_equal(levels(site.run("pair", wanted)), site.picture(wanted, **method))
    assert not np.array_equal(site.picture(first), site.picture(first, **method)), "what is one step old must show"


def test_a_worker_of_two_ranks_that_was_stopped_between_steps_starts_afresh(site):
    """Nothing of a task that was cancelled, with tensors between the ranks on their way, is left in the next one."""

    async def stop_it():
        stop = lambda step, _: step == 2 and site.workers.cancel("stopped")  # noqa: E731
        with pytest.raises(TaskCancelled):
            await site.workers.run("pair", task("stopped", **ENDLESS), on_step=stop)

    site.do(stop_it())
    assert np.array_equal(levels(site.run("pair", task())), site.picture(task(), **pair_method(site)))


@pytest.mark.parametrize("payload", ["fp32", "fp16"])
def test_hand_overs_have_the_precision_that_was_asked_for(site, payload):
    """Half precision takes half the bytes."""
    data = site.run("cloud", task(stop=2, decode=False, payload=payload)).payload
    tensors_bytes = len(data) - 8 - int.from_bytes(data[:8], "little")
    elements = 4 * HEIGHT_PX // 8 * WIDTH_PX // 8 + 2 * 77 * 8
    assert tensors_bytes == elements * {"fp32": 4, "fp16": 2}[payload]


def test_times_are_those_of_the_parts(site):
    """Every part that a task has took time, none that it has not; together they fit into the time of the task."""
    before_s = time.monotonic()
    steps = []
    begun = site.run("cloud", task(stop=3, decode=False), on_step=lambda *step: steps.append(step))
    ended = site.run("cloud", task(begun=begun.payload))
    assert steps == list(enumerate(begun.step_s))
    assert begun.text_encode_s > 0 == begun.parse_s == begun.vae_decode_s
    assert ended.parse_s > 0 == ended.text_encode_s
    assert ended.vae_decode_s > 0
    for done in (begun, ended):
        parts_s = done.text_encode_s + done.parse_s + sum(done.step_s) + done.vae_decode_s + done.serialise_s
        assert 0 < parts_s <= done.stop_s - done.start_s
        assert done.serialise_s > 0
    assert before_s < begun.start_s < begun.stop_s < ended.start_s < ended.stop_s < time.monotonic()


# ---- The queue ------------------------------------------------------------------------------------------------------


def test_tasks_are_done_in_the_order_of_their_arrival(site):
    """Three at once are done one after the other, the first come first."""

    async def three():
        return await asyncio.gather(*(site.workers.run("cloud", task(str(number), seed=number)) for number in range(3)))

    done = site.do(three())
    assert all(first.stop_s <= second.start_s for first, second in pairwise(done))
    for number, image in enumerate(done):
        assert np.array_equal(levels(image), site.picture(task(seed=number)))


def test_cancelling_takes_effect_at_a_step_boundary_and_in_the_queue(site):
    """Of three tasks the running and the waiting one are called off; the third is done as if they had not been."""

    async def call_off():
        running = asyncio.create_task(
            site.workers.run("cloud", task("running", **ENDLESS), on_step=lambda *_: site.workers.cancel("running"))
        )
        waiting = asyncio.create_task(site.workers.run("cloud", task("waiting", **ENDLESS)))
        wanted = asyncio.create_task(site.workers.run("cloud", task("wanted")))
        await asyncio.sleep(0)
        site.workers.cancel("waiting")
        return await asyncio.gather(running, waiting, wanted, return_exceptions=True)

    running, waiting, wanted = site.do(call_off())
    assert [str(running), str(waiting)] == ["task running was cancelled", "task waiting was cancelled"]
    assert {type(running), type(waiting)} == {TaskCancelled}
    assert np.array_equal(levels(wanted), site.picture(task()))


def test_a_task_that_nobody_waits_for_is_not_done(site):
    """When the caller's own asyncio task is cancelled, the worker leaves the work and takes the next."""

    async def leave():
        started = asyncio.Event()
        run = site.workers.run("cloud", task("left", **ENDLESS), on_step=lambda *_: started.set())
        caller = asyncio.create_task(run)
        await started.wait()
        caller.cancel()
        with suppress(asyncio.CancelledError):
            await caller
        return await site.workers.run("cloud", task("left"))

    assert levels(site.do(leave())).shape == (HEIGHT_PX, WIDTH_PX, 3)


def test_cancelling_what_is_not_there_changes_nothing(site):
    """A task that has ended keeps its result, and its key may be used again."""
    site.run("cloud", task())
    site.workers.cancel("image")
    assert levels(site.run("cloud", task())).shape == (HEIGHT_PX, WIDTH_PX, 3)


def test_two_tasks_under_way_cannot_share_a_key(site):
    """The second is refused at once, whatever worker it is for; so is a worker that does not exist."""

    async def twice():
        first = asyncio.create_task(site.workers.run("cloud", task()))
        await asyncio.sleep(0)
        with pytest.raises(InputError, match=r"^key: 'image'; a task of this key is under way"):
            await site.workers.run("edge", task())
        await first

    site.do(twice())
    with pytest.raises(InputError, match=r"^worker: 'clod'; .* Did you mean cloud"):
        site.run("clod", task())
    with pytest.raises(InputError, match=r"^workers: x; every worker has a name of its own"):
        site.pool(site.spec("x"), site.spec("x"))


# ---- Tasks that cannot be done --------------------------------------------------------------------------------------


def begun(site, **changes):
    """A hand-over after two steps that is not what the task goes on from."""
    state = parse(site.run("cloud", task(stop=2, decode=False)).payload, SENDER)
    return serialise(replace(state, **changes))


BAD_TASKS = {
    "a model it does not have": ({"model": "sd15"}, "^model: 'sd15'; no such name"),
    "an illegal size": ({"height_px": 100}, "^height_px: 100; must be a multiple of 16"),
    "no size": ({"height_px": 0}, "^height_px: 0; must be"),
    "another sampler": ({"sampler": "plms"}, "^sampler: 'plms'"),
    "no steps": ({"num_inference_steps": 0, "stop": 0}, "^num_inference_steps: 0"),
    "a stop beyond the end": ({"stop": 9}, "^stop: 9; must lie in 0 to 4"),
    "an unfinished image": ({"stop": 2}, "^decode: after step 2; the latents are no image before step 4"),
    "a guidance without end": ({"guidance_scale": float("inf")}, "^guidance_scale: inf; must be a finite number"),
    "another precision": ({"payload": "fp8"}, "^payload: 'fp8'"),
    "a seed too large": ({"seed": 2**70}, "^task image failed: ValueError: Overflow"),
    "values that overflow": ({"guidance_scale": 1e38, "decode": False}, "^hand-over latents: .* NaN or infinite"),
    "an image that overflows": ({"guidance_scale": 1e38}, "^the image holds NaN or infinite values"),
}


@pytest.mark.parametrize("worker", ["cloud", "pair"])
@pytest.mark.parametrize(("changes", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_a_task_that_cannot_be_done_is_refused_in_the_workers_words(site, worker, changes, message):
    """One process or two: the reason arrives, and the worker is there for the next task."""
    before = site.workers.pids(worker)
    with pytest.raises(RunError, match=message) as caught:
        site.run(worker, task(**changes))
    assert not isinstance(caught.value, WorkerLost)
    assert site.run(worker, task(stop=1, decode=False)).step_s
    assert site.workers.pids(worker) == before


BAD_STATES = {
    "too short": (lambda _: b"abc", "^hand-over: 3 bytes"),
    "a flipped bit": (lambda site: begun(site)[:-9] + bytes([begun(site)[-9] ^ 1]) + begun(site)[-8:], "checksum"),
    "cut off": (lambda site: begun(site)[:-5], "whole safetensors file"),
    "another shape": (
        lambda site: begun(site, latents=torch.zeros(1, 4, 8, 8), state=SamplerState()),
        r"^hand-over shape: \(1, 4, 8, 8\); this side runs \(1, 4, 24, 8\)",
    ),
    "no embeddings": (lambda site: begun(site, embeds=None), "^hand-over embeds: none"),
    "other embeddings": (lambda site: begun(site, embeds=torch.zeros(2, 77, 16)), "a width of 8"),
    "other guidance": (
        lambda site: begun(site, guidance_scale=3.0),
        "^hand-over guidance_scale: 3.0; this side runs 7",
    ),
    "other steps": (lambda site: begun(site, num_inference_steps=9), "^hand-over num_inference_steps: 9"),
    "another sampler": (lambda site: begun(site, sampler="euler"), "^hand-over sampler: euler; this side runs ddim"),
}


@pytest.mark.parametrize(("state", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_cannot_be_gone_on_from_is_refused(site, state, message):
    """Damaged bytes and other jobs' states get a reason, which is the sender's to mend; the worker goes on."""
    with pytest.raises(RunError, match=message) as caught:
        site.run("pair", task(begun=state(site)))
    assert isinstance(caught.value.__cause__, InputError)
    assert levels(site.run("pair", task(begun=begun(site)))).shape == (HEIGHT_PX, WIDTH_PX, 3)


def test_a_state_beyond_the_tasks_stop_is_refused(site):
    """Steps are not taken back."""
    with pytest.raises(RunError, match=r"^hand-over step: 2; this task stops before step 1"):
        site.run("cloud", task(begun=begun(site), stop=1, decode=False))
