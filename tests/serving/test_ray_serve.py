"""Ray Serve routes as the scheduler decides: every call answered once, where it was decided, whoever dies."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError
from hybridsd_sim.plan import Request
from hybridsd_sim.serving.requests import complete_request, request_fields

if find_spec("ray") is None or find_spec("grpc") is None:
    pytest.skip("Ray Serve is not installed", allow_module_level=True)

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

import serve_plans
import serve_work
from hybridsd_sim import Scheduler
from hybridsd_sim.scheduling import RequestDone
from hybridsd_sim.serving.ray_serve import LOOK_S, TurnedAwayError
from serve_plans import JOURNALS, save_plan, studio
from waiting import within_a_minute

SIZES = ((512, 10, 1), (512, 30, 1), (1024, 20, 1))
PICTURE = Request(model="sd15", num_inference_steps=30, request_class="picture", slo_s=20.0)
POSTER = Request(model="sdxl", height_px=1024, width_px=1024, request_class="poster")


# ---- What a call asks for --------------------------------------------------------------------------------------------


@given(st.fixed_dictionaries({}, optional={
    "height_px": st.integers(64, 2048), "width_px": st.integers(64, 2048), "num_inference_steps": st.integers(1, 100),
    "num_images": st.integers(1, 8), "guidance_scale": st.floats(1.0, 20.0), "slo_s": st.floats(0.1, 100.0),
}))  # fmt: skip
def test_a_call_asks_for_the_same_however_it_says_so(fields):
    """A mapping, an object, keywords, a keyword with an object: one request; what they leave out is the class's."""
    own = {"picture": PICTURE}
    ways = [
        request_fields([fields], {}),
        request_fields([SimpleNamespace(**fields)], {}),
        request_fields(["a lighthouse at dusk"], fields),
        request_fields([], {"picture": SimpleNamespace(**fields)}),
    ]
    asked = [complete_request(way, own) for way in ways]
    assert asked == [asked[0]] * len(ways)
    assert all(getattr(asked[0], name) == fields.get(name, getattr(PICTURE, name)) for name in ("slo_s", "width_px"))
    assert complete_request(request_fields([asked[0]], {}), own) is asked[0]


def test_the_names_of_diffusers_are_understood():
    """`height`, `width` and `num_images_per_prompt` are what its pipelines are called with; a keyword goes first."""
    asked = request_fields(
        [{"height": 512, "class": "picture"}], {"height": 768, "width": "768", "num_images_per_prompt": 2}
    )
    found = complete_request(asked, {"picture": PICTURE, "poster": POSTER})
    assert (found.height_px, found.width_px, found.num_images, found.request_class) == (768, 768, 2, "picture")


def test_a_call_that_names_no_class_is_of_the_only_one():
    """Where there are several it has to say; a class that nobody knows stays what it was called."""
    assert complete_request({}, {"picture": PICTURE}) == PICTURE
    with pytest.raises(InputError, match="picture, poster"):
        complete_request({}, {"picture": PICTURE, "poster": POSTER})
    assert complete_request({"request_class": "film"}, {"picture": PICTURE}).request_class == "film"


def test_nothing_loads_ray_that_does_not_need_it():
    """Neither the package nor the readers of calls; only the router itself."""
    program = "import sys, hybridsd_sim.serving.requests, hybridsd_sim.scheduling; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_being_turned_away_survives_the_way_to_another_process():
    """The reason and the status arrive: 503 for what may be tried again, 422 for what no plan can serve."""
    late, unknown = (pickle.loads(pickle.dumps(TurnedAwayError(why))) for why in ("certain_late", "unknown_class"))  # noqa: S301
    assert (late.reason, late.status_code, str(late)) == ("certain_late", 503, "Turned away: certain_late.")
    assert unknown.status_code == 422


# ---- A real Ray ------------------------------------------------------------------------------------------------------


def deployed(kind, plan):
    """A deployment of two replicas behind the router, which follows a plan and tells them what it decides."""
    kwargs = {"plan": str(plan), "decision_argument": "decision"}
    return serve.deployment(kind).options(
        num_replicas=2, max_ongoing_requests=1, ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(
            request_router_class=serve_plans.JournallingRouter, request_router_kwargs=kwargs
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def studio_app(tmp_path_factory):
    """Two replicas behind an ingress; the folder of the plan that they are routed by."""
    folder = tmp_path_factory.mktemp("plan")
    save_plan(folder, studio())
    with serve_plans.local_serve():
        front = serve.deployment(serve_work.Front).options(ray_actor_options={"num_cpus": 0})
        serve.run(front.bind(deployed(serve_work.Gpu, folder).bind()), name="studio", route_prefix=None)
        yield folder


@pytest.fixture
def plan(studio_app):
    """The folder of the plan that routers follow, put back as it was."""
    yield studio_app
    save_plan(studio_app, studio())


@pytest.fixture
def gpu(plan):
    """A handle with a router of its own, that has made no calls yet; Ray's own function shares them."""
    return DeploymentHandle("Gpu", "studio")


def pictures(count, service_s=0.05):
    """Calls of mixed sizes; each says how long it takes, which is not what is predicted."""
    for index in range(count):
        px, steps, images = SIZES[index % len(SIZES)]
        size = {"height": px, "width": px, "num_inference_steps": steps, "num_images": images}
        yield size | {"name": index, "service_s": service_s * (1 + index % 3)}


def served(handle, calls):
    """Answers of calls that are made at once, in their order."""
    return [response.result(timeout_s=60) for response in [handle.remote(call) for call in calls]]


def decided(journal):
    """Decisions of a router."""
    return [entry[-1] for entry in journal if entry[0] == "decide"]


def ended(journal):
    """Numbers of the decisions whose end its scheduler was told of."""
    return {entry[1].number for entry in journal if entry[0] == "observe" and isinstance(entry[1], RequestDone)}


def test_every_call_is_answered_once_where_it_was_decided(gpu):
    """Placements are those of the scheduler, also where calls queue; its ledger is empty afterwards."""
    answers = served(gpu, pictures(30))
    assert [answer["name"] for answer in answers] == list(range(30))
    assert all(answer["decision"]["worker"] == answer["replica"] for answer in answers)
    assert len({answer["replica"] for answer in answers}) == 2
    journal = JOURNALS[-1]
    assert sorted(decision.number for decision in decided(journal)) == list(range(1, 31))  # each decided once
    within_a_minute(lambda: ended(journal) == set(range(1, 31)))


def test_decisions_are_those_of_the_scheduler_replayed(gpu, plan):
    """Asked and told the same at the same times, a scheduler without Ray decides the same, workers and waits."""
    served(gpu, pictures(24))
    journal = JOURNALS[-1]
    within_a_minute(lambda: len(ended(journal)) == 24)
    replay = Scheduler.from_plan(plan, workers=())
    for kind, *entry in list(journal):
        if kind == "observe":
            replay.observe(*entry)
        else:
            request, now, decision = entry
            assert replay.decide(request, None, now).to_dict() == decision.to_dict()
    assert replay.open_decisions == 0


def test_calls_of_a_replica_that_is_killed_are_answered_by_others(gpu):
    """Only what ran there fails, as ever in Ray, and succeeds when tried again; what waited is decided anew."""
    first = served(gpu, pictures(2))
    victim = first[0]
    responses = [gpu.remote(picture) for picture in pictures(12, service_s=0.1)]
    time.sleep(0.2)
    os.kill(victim["pid"], signal.SIGKILL)
    answers, lost = [], []
    for response, picture in zip(responses, pictures(12), strict=True):
        try:
            answers.append(response.result(timeout_s=60))
        except ray.exceptions.RayActorError:
            lost.append(picture)
    assert len(lost) <= 1  # max_ongoing_requests
    answers += served(gpu, lost)
    assert sorted(answer["name"] for answer in answers) == list(range(12))
    after = [answer for answer in answers if answer["replica"] != victim["replica"]]
    assert all(answer["decision"]["worker"] == answer["replica"] for answer in after)
    assert len(decided(JOURNALS[-1])) > 2 + 12 + len(lost)
    within_a_minute(lambda: len(ended(JOURNALS[-1])) == len(decided(JOURNALS[-1])))
    within_a_minute(lambda: len({answer["replica"] for answer in served(gpu, pictures(4))} - {victim["replica"]}) == 2)


def test_a_cancelled_call_gives_up_its_place(gpu):
    """One that waits is never served, the others are, and nothing of it stays in the ledger."""
    before = len(JOURNALS)
    responses = [gpu.remote(picture) for picture in pictures(8, service_s=0.5)]
    within_a_minute(lambda: len(JOURNALS) > before and len(decided(JOURNALS[-1])) >= 6)
    responses[5].cancel()
    answers = [response.result(timeout_s=60) for index, response in enumerate(responses) if index != 5]
    assert [answer["name"] for answer in answers] == [0, 1, 2, 3, 4, 6, 7]
    with pytest.raises(ray.serve.exceptions.RequestCancelledError):
        responses[5].result(timeout_s=60)
    within_a_minute(lambda: len(ended(JOURNALS[-1])) == 8)


def version_of(handle):
    """The number of the plan by which a call was decided."""
    return served(handle, pictures(1))[0]["decision"]["plan_version"]


def test_a_changed_plan_is_followed(gpu, plan):
    """Routers look at the file while calls come, and calls go on meanwhile."""
    assert version_of(gpu) == 1
    save_plan(plan, studio(), nodes=4)
    within_a_minute(lambda: version_of(gpu) == 2)


@pytest.mark.slow
def test_a_broken_plan_is_not_followed(gpu, plan):
    """A plan that cannot be read changes nothing, and the next one that can is loaded."""
    assert version_of(gpu) == 1
    (plan / "plan.yaml").write_text("replicas: [")
    time.sleep(1.5 * LOOK_S)
    assert [version_of(gpu), version_of(gpu)] == [1, 1]
    time.sleep(1.5 * LOOK_S)
    assert version_of(gpu) == 1
    save_plan(plan, studio(), nodes=4)
    within_a_minute(lambda: version_of(gpu) == 2)


def test_what_the_plan_turns_away_is_raised_at_the_caller(gpu, plan):
    """A plan for half of the pictures serves every other one; the rest gets the reason instead of an answer."""
    save_plan(plan, studio(), share=0.5)
    reasons = []
    for response in [gpu.remote(picture) for picture in pictures(10, service_s=0.02)]:
        try:
            reasons.append(response.result(timeout_s=60)["decision"]["reason"])
        except TurnedAwayError as error:
            reasons.append(error.reason)
    assert sorted(reasons) == ["planned"] * 5 + ["turned_away"] * 5


def test_calls_go_where_ray_sends_them_while_there_is_no_plan(gpu, plan):
    """A router whose plan is missing answers all the same, and follows the plan once it is there."""
    (plan / "plan.yaml").unlink()
    answers = served(gpu, pictures(6))
    assert [(answer["name"], answer["decision"]) for answer in answers] == [(index, None) for index in range(6)]
    save_plan(plan, studio())
    within_a_minute(lambda: served(gpu, pictures(1))[0]["decision"] is not None)


def test_a_call_that_cannot_be_read_is_served(gpu):
    """Whatever the router makes of it, the replica may understand."""
    answer = served(gpu, [{"height": "tall", "name": "odd", "service_s": 0.0}])[0]
    assert (answer["name"], answer["decision"]) == ("odd", None)


def test_calls_made_while_serving_one_request_are_all_answered(studio_app):
    """They share the id of that request, by which Ray's own index would find the first of them alone."""
    front = serve.get_deployment_handle("Front", "studio")
    answers = front.remote(list(pictures(8, service_s=0.02))).result(timeout_s=60)
    assert [answer["name"] for answer in answers] == list(range(8))
    assert all(answer["decision"]["worker"] == answer["replica"] for answer in answers)


@pytest.mark.slow
def test_calls_go_to_the_pool_that_the_plan_says(studio_app, tmp_path):
    """Replicas say which pool they belong to; one of a pool without a part in the plan gets nothing."""
    save_plan(tmp_path, studio("gpus", "spare"), "spare")
    pooled = deployed(serve_work.PooledGpu, tmp_path).bind(str(tmp_path))
    answers = served(serve.run(pooled, name="pools", route_prefix=None), pictures(6))
    serve.delete("pools")
    assert {answer["pool"] for answer in answers} == {"spare"}
    assert {answer["decision"]["pool"] for answer in answers} == {"spare"}
