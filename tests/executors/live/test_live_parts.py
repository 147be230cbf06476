"""Parts of the live service by themselves: what is kept, what is no answer, whose GPU it is, who may listen."""

import asyncio
import socket
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI, Response
from hypothesis import given
from hypothesis import strategies as st

from executors.live import ClientRequest, ServiceSettings, Task, WorkerSpec
from executors.live.dispatch import Dispatcher, place_on_gpus
from executors.live.messages import (
    DIGEST,
    EdgeStage,
    ErrorResponse,
    ImageRequest,
    ImageResponse,
    ImageSettings,
    content_digest,
    decode_response,
    encode_head,
)
from executors.live.request import OpenRequests, RequestMetrics
from executors.live.service import respond
from executors.live.tasks import Channel, MessageKind, TaskQueue, encode_message
from executors.parallel import open_rendezvous
from hybridsd_sim.errors import InputError
from live_plans import LONG_S, served

JOB = ImageSettings(height_px=64, width_px=64, num_inference_steps=6, guidance_scale=1.0, sampler="ddim")
EDGE = EdgeStage(model="smaller", vae="taesd", start=0, job=JOB)


# ---- What is kept ---------------------------------------------------------------------------------------------------


def test_what_made_room_for_others_is_refused_and_made_again(town):
    """Of two images that are done at once there is room for one: the other's asker is told to ask again, and may."""

    async def both():
        counters = RequestMetrics()
        open_requests = OpenRequests(
            Dispatcher(town.scheduler(), town.cloud, town.specs), ServiceSettings(keep_bytes=1), counters
        )
        messages = [ImageRequest(id=name, request_class="cloud") for name in ("first", "second")]
        entries = [open_requests.take(message) for message in messages]
        await asyncio.wait({open_request.task for open_request in entries})
        answers = [
            respond(open_request, message, 0.0, counters)
            for open_request, message in zip(entries, messages, strict=True)
        ]
        again = open_requests.take(messages[0])
        await asyncio.wait({again.task})
        return entries, answers, again

    entries, (refused, answered), again = town.background.run(both())
    said, nothing = decode_response(refused.body, refused.headers[DIGEST])
    assert isinstance(said, ErrorResponse)
    assert (refused.status_code, said.retry_after_s > 0, nothing) == (503, True, b"")
    assert answered.status_code == 200
    assert again is not entries[0]
    assert again.payload


def test_what_is_forgotten_holds_no_payload(town):
    """Nobody can ask for it any more, so that its bytes are free, whoever still holds the request itself."""

    async def kept():
        open_requests = OpenRequests(
            Dispatcher(town.scheduler(), town.cloud, town.specs), ServiceSettings(keep_s=0.5), RequestMetrics()
        )
        open_request = open_requests.take(ImageRequest(id="brief", request_class="cloud"))
        await asyncio.wait({open_request.task})
        size = len(open_request.payload)
        while open_requests.find("brief"):  # noqa: ASYNC110 -- it tells nobody
            await asyncio.sleep(0.05)
        return size, len(open_request.payload)

    size, left = town.background.run(kept())
    assert size > 0 == left


def test_what_was_taken_back_is_answered_without_its_payload(town):
    """A hand-over that the client cancels is none any more for who asks again."""
    with town.service(town.scheduler(), town.cloud) as url:
        message = {"id": "back", "request_class": "hybrid"}
        first = httpx.post(f"{url}/v1/images", json=message, timeout=LONG_S)
        httpx.delete(f"{url}/v1/images/back")
        again = httpx.post(f"{url}/v1/images", json=message, timeout=LONG_S)
    assert decode_response(first.content, first.headers[DIGEST])[1]
    answer, payload = decode_response(again.content, again.headers[DIGEST])
    assert (again.status_code, answer.status, answer.reason, payload) == (409, "unserved", "cancelled", b"")


# ---- What is no answer ----------------------------------------------------------------------------------------------


def service_that_says(answer, deaf=0):
    """A service that always says this, and fails so many times to hear the last words; they are counted."""
    app, heard = FastAPI(), []

    @app.post("/v1/images")
    async def ask():
        head = encode_head(answer)
        return Response(head, headers={DIGEST: content_digest(head)})

    @app.post("/v1/images/{name}/done")
    async def done(name: str):
        heard.append(name)
        return Response(status_code=503 if len(heard) <= deaf else 204)

    return app, heard


@pytest.mark.parametrize("hollow", [
    ImageResponse(status="served"), ImageResponse(status="handed_over", edge=EDGE.model_copy(update={"start": 3})),
])  # fmt: skip
def test_an_answer_without_its_payload_is_damaged(town, hollow):
    """No image of no bytes is served, and no edge begins anew what the cloud has begun: it is asked for again."""
    with served(town.background, service_that_says(hollow)[0]) as url:
        [outcome] = town.ask(url, town.edge, ClientRequest(id="hollow", request_class="hybrid"), retries=1)
    assert (outcome.status, outcome.reason, outcome.retries) == ("unserved", "damaged", 1)


@pytest.mark.parametrize(("deaf", "times"), [(0, 1), (2, 3), (9, 3)])
def test_last_words_are_said_until_they_are_heard(town, deaf, times):
    """How the edge's part ended is told again where the service fails to take it, three times at most."""
    app, heard = service_that_says(ImageResponse(status="handed_over", edge=EDGE), deaf)
    with served(town.background, app) as url:
        [outcome] = town.ask(url, None, ClientRequest(id="said", request_class="edge"))
    assert outcome.reason == "no_edge"
    assert heard == ["said"] * times


# ---- What was called off --------------------------------------------------------------------------------------------


@given(others=st.lists(st.sampled_from([1, 2, 4, 5]), max_size=6), at=st.integers(0, 6))
def test_whatever_else_is_called_off_the_task_under_way_is_too(others, at):
    """Cancels of tasks that have ended, wait or are named twice neither hide that of the third nor stand for it."""
    task = Task(key="x", model="small", height_px=64, width_px=64, num_inference_steps=1, stop=1)
    near, far = socket.socketpair()
    with near, far:
        inbox = TaskQueue(Channel(near))
        for ticket in (3, 4, 5):
            far.sendall(encode_message(MessageKind.task, ticket, task))
        assert inbox.next()[0] == 3
        for ticket in others:
            far.sendall(encode_message(MessageKind.cancel, ticket))
        assert not inbox.is_cancelled(3)
        for ticket in [*others[:at], 3, *others[at:]]:
            far.sendall(encode_message(MessageKind.cancel, ticket))
        assert inbox.is_cancelled(3)


# ---- Whose GPU it is, and who may listen ----------------------------------------------------------------------------


def specs(*degrees):
    """Workers on GPUs, of so many ranks each."""
    return [
        WorkerSpec(name=f"p/{index}", pool="p", models=("m",), degree=degree, device="cuda")
        for index, degree in enumerate(degrees)
    ]


@given(num_workers=st.integers(2, 8), spare=st.integers(0, 3))
def test_every_worker_has_a_gpu_of_its_own(num_workers, spare):
    """Workers of one rank each are spread over the GPUs; nothing else about them changes."""
    asked = specs(*[1] * num_workers)
    found = place_on_gpus(asked, num_workers + spare)
    assert [spec.device for spec in found] == [f"cuda:{index}" for index in range(num_workers)]
    assert [replace(spec, device="cuda") for spec in found] == asked


@pytest.mark.parametrize("degree", [1, 2])
def test_a_single_worker_has_the_gpus_to_itself(degree):
    """Its ranks count from the first GPU."""
    assert place_on_gpus(specs(degree), 2) == tuple(specs(degree))


@pytest.mark.parametrize(("degrees", "num_gpus", "message"), [
    ((1,), 0, "0 GPUs.* makes 1"), ((1, 1), 1, "1 GPUs.* makes 2"), ((2,), 1, "1 GPUs.* makes 2"),
    ((1, 2), 4, "p/1; has several ranks"),
])  # fmt: skip
def test_gpus_that_are_not_there_are_refused(degrees, num_gpus, message):
    """Neither do two workers share a GPU, nor the ranks of one with another worker."""
    with pytest.raises(InputError, match=message):
        place_on_gpus(specs(*degrees), num_gpus)


def test_ranks_meet_where_no_other_machine_can():
    """The meeting place answers on its own address of this machine, and on no other one."""
    store = open_rendezvous()
    socket.create_connection(("127.0.0.1", store.port), timeout=LONG_S).close()
    with pytest.raises(OSError, match=r"."):
        socket.create_connection(("127.0.0.2", store.port), timeout=1.0)
