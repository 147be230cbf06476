"""Whatever breaks in between, an image comes out the same or the request ends with a reason; nothing hangs."""

import asyncio
import math
import os
import random
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from executors.live import Client, ClientRequest
from hybridsd_sim.scheduling import Worker
from live_plans import LONG_S, STEPS, Counting, Punctual, small_deployment, wait_for

PROMPT = "a paper boat in the rain"
NODES = 2
"""So that one worker is left when the other one dies."""


@pytest.fixture(scope="module")
def undisturbed(town, url):
    """The image of a class when nothing goes wrong, made once."""
    made = {}

    def image(name, **ask):
        key = (name, *ask.items())
        if key not in made:
            number = len(made)
            [outcome] = town.ask(
                url, town.edge, ClientRequest(id=f"calm{number}", request_class=name, prompt=PROMPT, **ask)
            )
            assert outcome.status == "served"
            made[key] = outcome.image
        return made[key]

    return image


def start_request(town, url, ask, device=None, **settings):
    """One ask under way, on the town's loop, by a client with the town's own device unless told otherwise."""

    async def put():
        async with Client(url, device or town.edge, timeout_s=LONG_S, **settings) as client:
            return await client.ask(ask)

    return asyncio.run_coroutine_threadsafe(put(), town.background.loop)


def kill(pool, worker):
    """End a worker's processes as a machine that runs out of memory does."""
    for pid in pool.pids(worker):
        os.kill(pid, signal.SIGKILL)


# ---- Processes that die ---------------------------------------------------------------------------------------------


def test_a_worker_killed_at_any_step_loses_no_request(town, undisturbed):
    """The other worker goes on from the last checkpoint that arrived, and the image is the same."""
    wanted = undisturbed("long")
    wait_for(lambda: len(town.cloud.up()) == 2)
    pool, scheduler = Counting(town.cloud), town.scheduler()
    at_step = random.randrange(1, STEPS["long"][1] - 20)  # noqa: S311 -- a step, no secret
    with town.service(scheduler, pool) as url:
        work = start_request(town, url, ClientRequest(id="killed", request_class="long", prompt=PROMPT))
        wait_for(lambda: httpx.get(f"{url}/v1/images/killed").json().get("steps_done", 0) >= at_step)
        kill(town.cloud, pool.workers[0])
        outcome = work.result(LONG_S)
        wait_for(lambda: scheduler.open_decisions == 0)
    assert (outcome.status, outcome.restarts) == ("served", 1)
    assert outcome.worker == pool.workers[1] != pool.workers[0]
    assert pool.tasks[1].begun is not None
    assert len(outcome.cloud_step_s) <= STEPS["long"][1] - at_step + 1
    assert outcome.image == wanted


class DiesOnce(Counting):
    """A device that dies with the first task that it is given."""

    async def run(self, worker, task, *, on_step=None):
        if not self.tasks:
            kill(self.pool, worker)
        return await super().run(worker, task, on_step=on_step)


def test_when_every_process_dies_the_request_waits_for_them(town, undisturbed):
    """All cloud workers, then the device as it is given its part: each comes back, and the image is the same.

    The worker that has the request dies last, or the request might go to one whose death nobody has noticed yet.
    """
    wanted = undisturbed("long")
    pool = Counting(town.cloud)
    with town.service(town.scheduler(), pool, patience_s=LONG_S) as url:
        work = start_request(
            town, url, ClientRequest(id="all", request_class="long", prompt=PROMPT), DiesOnce(town.edge)
        )
        wait_for(lambda: httpx.get(f"{url}/v1/images/all").json().get("steps_done", 0) >= 5)
        pids = {worker: town.cloud.pids(worker) for worker in town.cloud.up()}
        for worker in sorted(pids, key=lambda worker: worker == pool.workers[0]):
            kill(town.cloud, worker)
            wait_for(lambda worker=worker: town.cloud.pids(worker) != pids[worker])
        outcome = work.result(LONG_S)
    assert (outcome.status, outcome.restarts) == ("served", 2)
    assert outcome.image == wanted


def test_a_request_that_kills_its_workers_ends(town):
    """After as many lost workers as it may have, a request ends with the reason instead of killing the next one."""
    pool, scheduler = Counting(town.cloud), town.scheduler()
    with town.service(scheduler, pool, restarts=0, patience_s=LONG_S) as url:
        work = start_request(town, url, ClientRequest(id="deadly", request_class="all_day"))
        wait_for(lambda: httpx.get(f"{url}/v1/images/deadly").json().get("steps_done", 0) > 0)
        kill(town.cloud, pool.workers[0])
        outcome = work.result(LONG_S)
    assert (outcome.status, outcome.reason, outcome.restarts) == ("unserved", "worker_lost", 1)
    assert scheduler.open_decisions == 0


def test_who_is_turned_away_for_certain_does_not_wait_for_workers(town):
    """While a worker is missing: a class that nobody knows and a promise that nobody can keep end at once."""
    there = [Worker(spec.name, spec.pool, spec.degree) for spec in town.specs]
    scheduler = town.scheduler(policy=Punctual(), workers=[*there, Worker("rented/9", "rented", 1)])
    asks = (
        ClientRequest(id="class", request_class="poster"),
        ClientRequest(id="promise", request_class="cloud", slo_s=0.1),
    )
    with town.service(scheduler, town.cloud, patience_s=LONG_S) as url:
        outcomes = town.ask(url, None, *asks, timeout_s=LONG_S / 2)
    assert [outcome.reason for outcome in outcomes] == ["unknown_class", "certain_late"]


def test_a_service_that_stops_leaves_nobody_waiting(town):
    """Who waits for an image when the service is stopped hears of it, or cannot reach it any more."""
    with town.service(town.scheduler(), town.cloud) as url:
        work = start_request(town, url, ClientRequest(id="stopped", request_class="all_day"), retries=1)
        wait_for(lambda: httpx.get(f"{url}/v1/images/stopped").json().get("steps_done", 0) > 0)
    outcome = work.result(LONG_S)
    assert (outcome.status, outcome.reason in {"stopped", "unreachable"}) == ("unserved", True)


# ---- Lines that break -----------------------------------------------------------------------------------------------


@dataclass
class Saboteur:
    """A connection that spoils what comes back: cut after `at` bytes, or a bit flipped every `at` bytes.

    It does so `times` times; `port` is the service's.
    """

    port: int
    at: int
    how: str
    times: int = 1
    threads: list[threading.Thread] = field(default_factory=list)
    ends: list[socket.socket] = field(default_factory=list)

    @contextmanager
    def line(self):
        """The address to call."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.begin(self.accept, listener)
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                for end in [listener, *self.ends]:
                    hang_up(end)
                for thread in self.threads:
                    thread.join(LONG_S)
                for end in self.ends:
                    end.close()

    def begin(self, work, *arguments):
        """Do something beside everything else."""
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self, listener):
        """Carry what comes on every connection both ways."""
        with suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", self.port))
                self.ends += [near, far]
                self.begin(self.carry, near, far, math.inf)
                self.begin(self.carry, far, near, self.at)

    def carry(self, source, sink, next_at):
        """Bytes from one end to the other, spoilt at `next_at` and every `at` bytes from there."""
        done = 0
        with suppress(OSError):
            while data := bytearray(source.recv(4096)):
                while self.times and done <= next_at < done + len(data):
                    self.times -= 1
                    if self.how == "cut":
                        sink.sendall(data[: next_at - done])
                        hang_up(source)
                        return hang_up(sink)
                    data[next_at - done] ^= 1 << self.at % 8
                    next_at += max(self.at, 1)
                done += len(data)
                sink.sendall(data)
        return hang_up(sink)


def hang_up(end):
    """End a connection both ways; whoever reads from it or waits on it learns that."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@settings(max_examples=25)
@given(at=st.integers(0, 4000), how=st.sampled_from(["cut", "flip"]))
@example(at=162, how="flip")  # in the length of the answer
def test_an_answer_spoilt_anywhere_is_asked_for_again(town, url, undisturbed, at, how):
    """Cut or with one bit flipped, in the head or in the image: the client asks again and has the very image."""
    wanted = undisturbed("cloud")
    ask = ClientRequest(id="spoilt", request_class="cloud", prompt=PROMPT)
    with Saboteur(httpx.URL(url).port, at, how).line() as line:
        [outcome] = town.ask(line, None, ask, retries=2, wait_s=2.0)
    assert (outcome.status, outcome.image == wanted) == ("served", True)
    assert outcome.retries <= 1


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_hand_over_spoilt_on_the_way_is_not_made_again(town, undisturbed, how):
    """The line breaks in the middle of the payload: it is sent again, and the cloud does nothing twice."""
    wanted = undisturbed("hybrid")
    pool = Counting(town.cloud)
    with town.service(town.scheduler(), pool) as url, Saboteur(httpx.URL(url).port, 100_000, how).line() as line:
        [outcome] = town.ask(line, town.edge, ClientRequest(id="torn", request_class="hybrid", prompt=PROMPT))
    assert (outcome.status, outcome.retries, len(pool.tasks)) == ("served", 1, 1)
    assert outcome.image == wanted


def test_a_line_that_spoils_everything_is_given_up(town, url):
    """After so many damaged answers the request ends with the reason."""
    ask = ClientRequest(id="noise", request_class="cloud", prompt=PROMPT)
    with Saboteur(httpx.URL(url).port, 1500, "flip", times=99).line() as line:
        [outcome] = town.ask(line, None, ask, retries=2)
    assert (outcome.status, outcome.reason in {"damaged", "unreachable"}) == ("unserved", True)
    assert outcome.retries == 2


@settings(max_examples=15)
@given(sent=st.binary(min_size=1, max_size=300))
def test_noise_on_the_line_is_survived(url, sent):
    """Bytes that are no HTTP get a refusal or a closed line, in time, and the next asker gets an answer."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=LONG_S) as line:
        line.sendall(sent + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: line.recv(4096), b""))
    assert b"Traceback" not in reply
    assert httpx.get(f"{url}/healthz").status_code == 200


# ---- Plans that change ----------------------------------------------------------------------------------------------


def test_a_plan_swapped_under_load_loses_no_request(town):
    """While requests come and go the switch step moves back and forth: each has the image of the plan it was given."""
    scheduler = town.scheduler()
    plans = [town.plan, small_deployment(town.scenario, town.profiles, hybrid=4)]
    with town.service(scheduler, town.cloud) as url:
        works = []
        for number in range(8):
            works.append(
                start_request(town, url, ClientRequest(id=f"swap{number}", request_class="hybrid", prompt=PROMPT))
            )
            wait_for(lambda name=f"swap{number}": httpx.get(f"{url}/v1/images/{name}").status_code in {200, 202})
            scheduler.replace_plan(plans[(number + 1) % 2])
        outcomes = [work.result(LONG_S) for work in works]
    assert {outcome.status for outcome in outcomes} == {"served"}
    assert sorted(outcome.plan_version for outcome in outcomes) == list(range(1, 9))
    for outcome in outcomes:
        assert len(outcome.cloud_step_s) == (3 if outcome.plan_version % 2 else 4)
    assert len({(outcome.plan_label, outcome.image) for outcome in outcomes}) == 2
    wait_for(lambda: scheduler.open_decisions == 0)
