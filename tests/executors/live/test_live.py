"""Live hybrid serving with real small UNets: what is served and when, whom it belongs to, what is kept and refused."""

import asyncio
import io
import json
import logging
import math
import time
from collections import Counter

import httpx
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from executors.hybrid import ImageRun, generate_image
from executors.live import Client, ClientRequest, Link, cloud_workers, edge_worker
from executors.live.client import clock_shift_s
from executors.live.messages import ImageRequest, ImageResponse
from executors.models import load_pipeline
from hybridsd_sim.errors import InputError
from hybridsd_sim.plan import Deployment
from hybridsd_sim.scheduling import CloudDone, RequestDone, StepDone
from hybridsd_sim.scheduling.policies import CloudOnly
from live_plans import LONG_S, STEPS, Counting, Punctual, frozen, small_plan, thaw, wait_for

PROMPT = "a lighthouse in a bottle"
TOKEN = "open sesame"  # noqa: S105 -- of services that live for one test
ERROR = {"place", "value", "rule", "remedy"}


def pixels(image):
    """A PNG's pixels."""
    return torch.frombuffer(bytearray(Image.open(io.BytesIO(image)).tobytes()), dtype=torch.uint8)


def assert_law(outcome):
    """Latency is the cloud's seconds, the edge's and the transfers'; nothing happens before its inputs exist."""
    parts = outcome.cloud_s + outcome.edge_s + outcome.transfer_s
    assert outcome.finish_s - outcome.arrival_s == pytest.approx(parts, abs=1e-6)
    names = ("arrival", "cloud_ready", "cloud_start", "cloud_stop", "edge_ready", "edge_start", "edge_stop", "finish")
    times = [value for name in names if not math.isnan(value := getattr(outcome, f"{name}_s"))]
    assert times == sorted(times)
    assert outcome.transfer_s >= 0


# ---- Serving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hybrid", "cloud", "edge", "decoded"])
def test_every_share_of_an_image_is_served(town, url, name):
    """Hybrid, all in the cloud, all at the edge, only decoded there: each side does its steps, and the sums hold."""
    [outcome] = town.ask(url, town.edge, ClientRequest(id=f"share-{name}", request_class=name, prompt=PROMPT))
    steps, cloud_steps = STEPS[name]
    assert (outcome.status, outcome.reason) == ("served", "")
    assert (len(outcome.cloud_step_s), len(outcome.edge_step_s)) == (cloud_steps, steps - cloud_steps)
    assert (outcome.worker, outcome.edge_device) == ("rented/0" if cloud_steps else None, -1 if name == "cloud" else 0)
    assert outcome.plan_label == town.plan.plans[name][0].plan.label
    assert Image.open(io.BytesIO(outcome.image)).size == (64, 64)
    assert_law(outcome)


def test_the_image_is_that_of_the_same_plan_in_one_process(town, url):
    """What cloud and edge make together over HTTP has the pixels of both models run here, one after the other."""
    large, small = (load_pipeline(name, vae="taesd", profiles=town.profiles) for name in ("small", "smaller"))
    run = ImageRun(
        model=large, small=small, latent_space="sd1", prompt=PROMPT, switch_step=3, num_inference_steps=6,
        guidance_scale=1.0, height_px=64, width_px=64, sampler="dpmsolver++", seed=5,
    )  # fmt: skip
    wanted = (generate_image(run).pixels * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(-1)
    [outcome] = town.ask(url, town.edge, ClientRequest(id="same", request_class="hybrid", prompt=PROMPT, seed=5))
    assert torch.equal(pixels(outcome.image), wanted)


def test_a_network_class_shapes_both_ways(town, url):
    """Over a link, the prompt and the payload take at least what the simulator charges for their bytes."""
    link = Link(half_rtt_s=0.02, up_bytes_per_s=20_000, down_bytes_per_s=2e6)
    [outcome] = town.ask(url, town.edge, ClientRequest(id="shaped", request_class="hybrid", link=link))
    assert outcome.cloud_ready_s - outcome.arrival_s >= link.up_s(1024)
    assert outcome.edge_ready_s - outcome.cloud_stop_s >= link.down_s(outcome.bytes_down)
    assert_law(outcome)


def test_the_scheduler_hears_of_every_step_and_every_end_once(town):
    """A step each of both stages, the worker free, the request over: then nothing is open in the ledger."""
    scheduler, heard = town.scheduler(), []
    observe = scheduler.observe
    scheduler.observe = lambda event: (heard.append(event), observe(event))
    with town.service(scheduler, town.cloud) as url:
        town.ask(url, town.edge, *(ClientRequest(id=f"heard{i}", request_class="hybrid") for i in range(2)))
    assert {kind: sum(isinstance(event, kind) for event in heard) for kind in (CloudDone, RequestDone)} == {
        CloudDone: 2, RequestDone: 2,
    }  # fmt: skip
    assert Counter((event.number, event.stage) for event in heard if isinstance(event, StepDone)) == {
        (number, stage): 3 for number in (1, 2) for stage in (0, 1)
    }
    assert scheduler.open_decisions == 0
    assert all(worker.queued == 0 for worker in scheduler.workers(time.monotonic()))


def test_what_the_scheduler_turns_away_has_its_reason(town):
    """A class without a plan, and one that nobody knows: unserved, with the scheduler's own word."""
    bare = Deployment({"rented": 1}, {name: mix for name, mix in town.plan.plans.items() if name != "edge"})
    scheduler = town.scheduler()
    scheduler.replace_plan(bare)
    with town.service(scheduler, town.cloud) as url:
        none, unknown = town.ask(
            url,
            None,
            ClientRequest(id="none", request_class="edge"),
            ClientRequest(id="unknown", request_class="poster"),
        )
    assert (none.status, unknown.status, unknown.reason) == ("unserved", "unserved", "unknown_class")
    assert none.reason in {"no_candidate", "turned_away"}
    assert math.isnan(none.finish_s)


# ---- Whose request it is --------------------------------------------------------------------------------------------


def test_an_order_that_is_repeated_is_not_carried_out_twice(town):
    """At the same time or after: one task for the workers, one image for everybody who asks."""
    pool = Counting(town.cloud)
    with town.service(town.scheduler(), pool) as url:
        ask = ClientRequest(id="again", request_class="cloud", prompt=PROMPT)
        outcomes = [*town.ask(url, None, ask, ask), *town.ask(url, None, ask)]
    assert len(pool.tasks) == 1
    assert len({outcome.image for outcome in outcomes}) == 1


def test_an_id_is_one_request_only(town, url):
    """Another order under a known id is refused, and the first one stays what it was."""
    [first] = town.ask(url, None, ClientRequest(id="mine", request_class="cloud", seed=1))
    [other] = town.ask(url, None, ClientRequest(id="mine", request_class="cloud", seed=2))
    assert (first.status, other.status, other.reason) == ("served", "unserved", "refused")
    assert "name of another request" in other.words


def test_who_waits_shorter_asks_again(town):
    """An answer that takes longer than the client waits for is asked for again, and made once."""
    pool = Counting(town.cloud)
    with town.service(town.scheduler(), pool) as url:
        message = {"id": "patient", "request_class": "cloud", "wait_s": 0}
        first = httpx.post(f"{url}/v1/images", json=message)
        [outcome] = town.ask(url, None, ClientRequest(id="patient", request_class="cloud"), wait_s=0.02)
    assert (first.status_code, first.json()["status"]) == (202, "open")
    assert (outcome.status, outcome.retries, len(pool.tasks)) == ("served", 0, 1)


def test_what_is_kept_is_bounded(town):
    """Of payloads beyond the bound only the newest is kept; what is made again for who asks again is the same image."""
    pool = Counting(town.cloud)
    with town.service(town.scheduler(), pool, keep_bytes=10) as url:
        large, other = (ClientRequest(id=name, request_class="cloud", prompt=PROMPT) for name in ("large", "other"))
        images = [town.ask(url, None, ask)[0].image for ask in (large, large, other, large)]
        counted = httpx.get(f"{url}/metrics").text
    assert [task.key.partition("/")[0] for task in pool.tasks] == ["large", "other", "large"]
    assert len(set(images)) == 1
    assert Image.open(io.BytesIO(images[0])).size == (64, 64)
    assert f"hybridsd_live_kept_bytes {float(len(images[0]))}" in counted


def test_what_is_kept_is_forgotten_in_time(town):
    """After a while nobody knows the request any more, and an edge that said nothing is closed as lost."""
    scheduler = town.scheduler()
    with town.service(scheduler, town.cloud, keep_s=0.2) as url:
        message = {"id": "lost", "request_class": "hybrid"}
        assert httpx.post(f"{url}/v1/images", json=message, timeout=LONG_S).status_code == 200
        assert scheduler.open_decisions == 1
        wait_for(lambda: httpx.get(f"{url}/v1/images/lost").status_code == 404)
    assert scheduler.open_decisions == 0


# ---- Cancelled and late ---------------------------------------------------------------------------------------------


def begun(url, name):
    """Wait until a request has done a step."""
    wait_for(lambda: httpx.get(f"{url}/v1/images/{name}").json().get("steps_done", 0) > 0)


def assert_free(town, url):
    """The worker takes the next request."""
    [outcome] = town.ask(url, town.edge, ClientRequest(id="next", request_class="cloud"))
    assert (outcome.status, outcome.reason) == ("served", "")


def test_a_request_that_is_taken_back_ends_at_the_next_step(town):
    """DELETE frees the worker for the next request; who waits for the image learns why there is none."""
    scheduler = town.scheduler()
    with town.service(scheduler, town.cloud) as url:
        work = asyncio.run_coroutine_threadsafe(
            one(url, ClientRequest(id="gone", request_class="all_day")), town.background.loop
        )
        begun(url, "gone")
        assert httpx.delete(f"{url}/v1/images/gone").status_code == 204
        outcome = work.result(LONG_S)
        assert (outcome.status, outcome.reason) == ("unserved", "cancelled")
        assert_free(town, url)
    assert scheduler.open_decisions == 0


def test_a_client_that_is_cancelled_takes_its_request_back(town):
    """Whoever cancels the asking task frees the worker."""
    scheduler = town.scheduler()
    with town.service(scheduler, town.cloud) as url:
        work = asyncio.run_coroutine_threadsafe(
            one(url, ClientRequest(id="off", request_class="all_day")), town.background.loop
        )
        begun(url, "off")
        work.cancel()
        wait_for(lambda: httpx.get(f"{url}/v1/images/off").json()["status"] == "unserved")
        assert_free(town, url)
    assert scheduler.open_decisions == 0


async def one(url, ask, pool=None):
    """One ask by a client of its own."""
    async with Client(url, pool) as client:
        return await client.ask(ask)


@pytest.mark.parametrize(("policy", "status"), [(Punctual(), "unserved"), (CloudOnly(), "served")])
def test_past_its_deadline_a_request_goes_on_only_if_the_policy_would_have_it(town, policy, status):
    """A policy that serves nobody late ends it with the reason, and the worker is told; another one serves it late."""
    scheduler = town.scheduler(policy=policy)
    with town.service(scheduler, town.cloud) as url, frozen(town.cloud, "rented/0"):
        ask = ClientRequest(id="late", request_class="cloud", slo_s=1.0)
        work = asyncio.run_coroutine_threadsafe(one(url, ask, town.edge), town.background.loop)
        if status == "unserved":
            assert (work.result(LONG_S).status, work.result().reason) == ("unserved", "deadline")
        else:
            time.sleep(1.5)
            assert httpx.get(f"{url}/v1/images/late").json()["status"] == "open"
        thaw(town.cloud, "rented/0")
        assert work.result(LONG_S).status == status
        assert_free(town, url)
    assert scheduler.open_decisions == 0


def test_who_would_be_late_for_certain_is_turned_away(town):
    """A promise that cannot be kept is refused at once by a policy that keeps its promises."""
    with town.service(town.scheduler(policy=Punctual()), town.cloud) as url:
        [outcome] = town.ask(url, None, ClientRequest(id="too-late", request_class="cloud", slo_s=0.1))
    assert (outcome.status, outcome.reason) == ("unserved", "certain_late")


def test_a_client_without_a_device_says_so(town, url):
    """What is left to the edge cannot be done by a client that has none: unserved, and the ledger is told."""
    [outcome] = town.ask(url, None, ClientRequest(id="no-edge", request_class="hybrid"))
    assert (outcome.status, outcome.reason) == ("unserved", "no_edge")
    wait_for(lambda: httpx.get(f"{url}/v1/images/no-edge").json()["status"] == "unserved")


# ---- Strangers ------------------------------------------------------------------------------------------------------


def test_only_who_has_the_token_is_served(town):
    """Without the token nothing but health and readiness answers; with it everything does."""
    with town.service(town.scheduler(), town.cloud, token=TOKEN) as url:
        assert httpx.get(f"{url}/healthz").status_code == httpx.get(f"{url}/readyz").status_code == 200
        for path in ("/metrics", "/v1/images/x"):
            refused = httpx.get(f"{url}{path}", headers={"authorization": f"Bearer {TOKEN[:-1]}"})
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"].keys() == ERROR
        ask = ClientRequest(id="token", request_class="cloud")
        assert town.ask(url, None, ask)[0].reason == "refused"
        assert town.ask(url, None, ask, token=TOKEN)[0].status == "served"


def test_pages_of_other_sites_cannot_ask(url):
    """A name that was made to point here is none of the service's, and what a form can send is no order."""
    message = {"id": "foreign", "request_class": "cloud"}
    rebound = httpx.post(f"{url}/v1/images", json=message, headers={"host": "evil.example"})
    as_text = httpx.post(f"{url}/v1/images", content=json.dumps(message), headers={"content-type": "text/plain"})
    assert (rebound.status_code, as_text.status_code) == (421, 415)
    assert rebound.json()["error"].keys() == as_text.json()["error"].keys() == ERROR
    assert httpx.get(f"{url}/v1/images/foreign").status_code == 404


def test_a_service_takes_no_more_than_it_may(town):
    """Bodies, orders a second and orders under way have a bound; who is one too many is told when to come again."""
    with town.service(town.scheduler(), town.cloud, max_body_bytes=200, max_open=1, requests_per_s=2) as url:
        message = {"id": "first", "request_class": "all_day", "wait_s": 0}
        assert httpx.post(f"{url}/v1/images", json=message | {"prompt": "x" * 300}).status_code == 413
        assert httpx.post(f"{url}/v1/images", json=message).status_code == 202
        answers = [httpx.post(f"{url}/v1/images", json=message | {"id": f"more{i}"}) for i in range(6)]
        httpx.delete(f"{url}/v1/images/first")
    assert {answer.status_code for answer in answers} == {429}
    assert all(answer.json()["retry_after_s"] > 0 and answer.headers["retry-after"] for answer in answers)
    assert {answer.json()["error"]["rule"] for answer in answers} == {
        "as many requests as the service takes are under way", "more requests a second than the service takes",
    }  # fmt: skip


def test_a_busy_service_is_asked_again_until_it_has_room(town):
    """Several at once on a service that takes one at a time: all are served in the end."""
    with town.service(town.scheduler(), town.cloud, max_open=1) as url:
        outcomes = town.ask(url, None, *(ClientRequest(id=f"busy{i}", request_class="cloud") for i in range(3)))
    assert [outcome.status for outcome in outcomes] == ["served"] * 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ImageRequest.model_fields, "outcome", "step_s", "nonsense"])
BODIES = st.binary(max_size=200) | st.dictionaries(FIELDS, VALUES, max_size=6).map(lambda d: json.dumps(d).encode())
PATHS = st.sampled_from(
    ["/v1/images", "/v1/images/x", "/v1/images/x/done", "/metrics", "/readyz", "/nowhere", "/v1/images/%00"]
)


@pytest.fixture(scope="module")
def known(town, url):
    """A request that the service knows, by the name of x."""
    assert town.ask(url, None, ClientRequest(id="x", request_class="cloud"))[0].status == "served"


@settings(max_examples=150)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    path=PATHS,
    body=BODIES,
    says=st.sampled_from(["application/json", "application/json; charset=utf-8", "text/plain"]),
)
def test_garbage_is_refused_in_one_shape(url, known, method, path, body, says):
    """Whatever is sent anywhere: an answer, no failure inside, and every refusal with place, value, rule and remedy."""
    answer = httpx.request(method, f"{url}{path}", content=body, headers={"content-type": says}, timeout=LONG_S)
    assert answer.status_code < 500
    assert b"Traceback" not in answer.content
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error.keys() == ERROR
        assert (error["rule"] == "Not Found") == (path == "/nowhere")
    if answer.status_code == 404:  # no such route, request or class
        assert path in {"/nowhere", "/v1/images/%00", "/v1/images"}


def test_nothing_that_a_request_carries_is_logged(town, caplog):
    """Neither prompt nor id nor class of a request, served or refused, reaches any log of the service."""
    caplog.set_level(logging.DEBUG)
    with town.service(town.scheduler(), town.cloud) as url:
        town.ask(url, town.edge, ClientRequest(id="canary-id", request_class="hybrid", prompt="canary-prompt"))
        town.ask(url, town.edge, ClientRequest(id="canary-two", request_class="canary-class", prompt="canary-prompt"))
        httpx.post(f"{url}/v1/images", json={"prompt": "canary-prompt", "id": 5})
    said = [record for record in caplog.records if record.name.partition(".")[0] not in {"httpx", "httpcore"}]
    assert not [record.getMessage() for record in said if "canary" in record.getMessage()]


def test_metrics_count_every_end_once(town):
    """Served, turned away and cancelled requests, each once, by status and reason; no label names a request."""
    with town.service(town.scheduler(), town.cloud) as url:
        town.ask(
            url,
            town.edge,
            ClientRequest(id="counted", request_class="hybrid"),
            ClientRequest(id="not", request_class="nobody"),
        )
        wait_for(
            lambda: 'hybridsd_live_requests_total{reason="",status="served"} 1.0' in httpx.get(f"{url}/metrics").text
        )
        text = httpx.get(f"{url}/metrics").text
    assert 'hybridsd_live_requests_total{reason="unknown_class",status="unserved"} 1.0' in text
    assert "hybridsd_live_open_requests 0.0" in text
    assert "hybridsd_live_wait_seconds_count 1.0" in text
    assert "hybridsd_live_cloud_seconds_count 1.0" in text
    assert "hybridsd_live_workers_up 1.0" in text
    assert "counted" not in text


# ---- Plans ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_or_reached_is_said_at_once(town):
    """An ask that no service would read is the caller's error; a service that is not there is a reason."""
    with pytest.raises(InputError, match=r"request.id: 'two words'"):
        town.ask("http://127.0.0.1:9", None, ClientRequest(id="two words", request_class="cloud"))
    with pytest.raises(InputError, match="address of a service"):
        Client("127.0.0.1:8471")
    [outcome] = town.ask("http://127.0.0.1:9", None, ClientRequest(id="nobody", request_class="cloud"), retries=1)
    assert (outcome.status, outcome.reason, outcome.retries) == ("unserved", "unreachable", 1)


def test_a_plan_says_which_workers_are_started(town):
    """A worker for as many GPUs as its degree, on every rented node, with its plans' models; the edge's device."""
    assert [spec.name for spec in cloud_workers(town.plan, town.settings)] == ["rented/0"]
    assert cloud_workers(town.plan, town.settings)[0].models == ("small",)
    hybrid = small_plan(town.scenario, town.profiles, "hybrid")
    assert edge_worker([hybrid], town.settings).models == ("smaller",)
    assert edge_worker([small_plan(town.scenario, town.profiles, "cloud")], town.settings) is None


@given(offset_s=st.floats(-1e6, 1e6), up_s=st.floats(0, 10), held_s=st.floats(0, 100), down_s=st.floats(0, 10))
def test_seconds_of_another_machines_clock_are_shifted_to_ours(offset_s, up_s, held_s, down_s):
    """Whatever a service's clock says, its times come to lie between asking and hearing; on one clock they stay."""
    received_s, heard_s = 100.0 + up_s, 100.0 + up_s + held_s + down_s
    answer = ImageResponse(status="served", received_s=received_s + offset_s, answered_s=received_s + held_s + offset_s)
    shift_s = clock_shift_s(answer, 100.0, heard_s)
    assert 100.0 - 1e-6 <= answer.received_s + shift_s <= answer.answered_s + shift_s <= heard_s + 1e-6
    if offset_s == 0:
        assert shift_s == 0
