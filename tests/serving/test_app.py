"""The sidecar over HTTP: the embedded scheduler's own answers, plans that are swapped, what-ifs, the command."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import socket
import threading
import time
from base64 import b64encode
from dataclasses import asdict, replace
from inspect import signature

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hybridsd_sim import cli as command
from hybridsd_sim.errors import InputError
from hybridsd_sim.plan import Request
from hybridsd_sim.scheduling import POLICIES, RequestDone
from hybridsd_sim.serving import is_loopback
from hybridsd_sim.serving.answers import WhatIfAnswer
from hybridsd_sim.serving.app import REQUESTS_PER_S, build_app
from hybridsd_sim.serving.listen import read_token, serve
from hybridsd_sim.serving.reload import PlanFile
from sidecars import LONG_S, MINE, TOKEN, Asker, Clock, embedded, problems, served, write_plan

# ---- Deciding -------------------------------------------------------------------------------------------------------


SENT = st.fixed_dictionaries(
    {"request_class": st.sampled_from(["picture", "nobody's"])},
    optional={
        "height_px": st.sampled_from([512, 768]), "num_inference_steps": st.integers(1, 60), "num_images": st.just(2),
        "slo_s": st.floats(0.1, 100.0), "priority": st.integers(-5, 5), "model": st.sampled_from(["sd14", "sdxl"]),
        "quality_floor": st.sampled_from([0.1, 0.9]), "guidance_scale": st.sampled_from([1.0, 9.0]),
    },
)  # fmt: skip


@pytest.mark.parametrize("policy", ["planned", "cost_aware", "edf_reject", "switch_by_queue"])
def test_it_answers_what_the_embedded_scheduler_decides(deployment, quickstart, profiles, policy):
    """The same requests and ends at the same times: the same answers, of the class's own values unless it is said."""

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(SENT, st.booleans()), min_size=1, max_size=8))
    def same(sent):
        mine, theirs = (embedded(deployment, quickstart, profiles=profiles, policy=policy) for _ in range(2))
        clock = Clock()
        with Asker(build_app(theirs, clock=clock)) as ask:
            for fields, with_plan in sent:
                clock.now += 0.25
                own = mine.requests.get(fields["request_class"], Request(model=""))
                expected = mine.decide(replace(own, **fields), None, clock.now)
                answer = ask("POST", f"/v1/decide?plan={str(with_plan).lower()}", json=fields)
                assert answer.status_code == 200, answer.text
                assert answer.json() == json.loads(json.dumps(expected.to_dict(with_plan=with_plan)))
                if expected.number % 2:
                    mine.observe(RequestDone(expected.number, clock.now))
                    ask("POST", "/v1/observe", json={"event": "request_done", "number": expected.number})
                assert mine.workers(clock.now) == theirs.workers(clock.now)

    same()


def test_one_event_or_a_list_frees_the_workers(ask, scheduler, clock):
    """Ends are taken in one by one or together, and what was said to happen later than now happened now."""
    numbers = [ask.post("/v1/decide", MINE).json()["number"] for _ in range(3)]
    assert scheduler.open_decisions == 3
    clock.now += 2.0
    assert ask("POST", "/v1/observe", json={"event": "request_done", "number": numbers[0]}).json() == {"observed": 1}
    rest = [{"event": "request_done", "number": number, "at_s": 1e9} for number in numbers[1:]]
    assert ask("POST", "/v1/observe", json=rest).json() == {"observed": 2}
    assert scheduler.open_decisions == 0
    assert {worker.queued for worker in scheduler.workers(clock.now)} == {0}
    step = {"event": "step_done", "number": 7, "seconds": 0.1}
    up, down = {"event": "worker_up", "worker": "spare", "pool": "a100"}, {"event": "worker_down", "worker": "a100/0"}
    assert ask("POST", "/v1/observe", json=[step, up, down, step]).json() == {"observed": 4}
    assert [worker.name for worker in scheduler.workers(clock.now)] == ["a100/1", "spare"]


def test_of_events_of_which_one_is_wrong_none_counts(ask, scheduler):
    """A worker of a pool that there is not, behind an end: the end is not taken in."""
    ask.post("/v1/decide", MINE)
    events = [{"event": "request_done", "number": 1}, {"event": "worker_up", "worker": "w", "pool": "a10"}]
    answer = ask("POST", "/v1/observe", json=events)
    assert answer.status_code == 422
    assert problems(answer)[0]["remedy"] == "Did you mean a100?"
    assert scheduler.open_decisions == 1


def test_of_events_of_which_one_worker_is_too_many_none_counts(ask, scheduler, clock, monkeypatch):
    """An end and a worker before it are not taken in either; one that goes makes room for the next."""
    monkeypatch.setattr("hybridsd_sim.scheduling.ledger.MAX_WORKERS", 3)
    ask.post("/v1/decide", MINE)
    end = {"event": "request_done", "number": 1}
    ups = [{"event": "worker_up", "worker": f"w{n}", "pool": "a100"} for n in range(2)]
    before = scheduler.workers(clock.now)
    assert "at most 3" in problems(ask("POST", "/v1/observe", json=[end, *ups]))[0]["rule"]
    assert (scheduler.open_decisions, scheduler.workers(clock.now)) == (1, before)
    down = {"event": "worker_down", "worker": "w0"}
    assert ask("POST", "/v1/observe", json=[end, ups[0], down, ups[1]]).json() == {"observed": 4}
    assert [worker.name for worker in scheduler.workers(clock.now)] == ["a100/0", "a100/1", "w1"]


# ---- Plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_put_is_followed(ask, scheduler, deployment, clock):
    """What GET answers is what PUT takes; the workers are then those that the new plan rents."""
    found = ask("GET", "/v1/plan").json()
    assert found["deployment"] == json.loads(json.dumps(deployment.to_dict()))
    assert (found["version"], found["policy"], found["scenario"]) == (1, "planned", "quickstart")
    assert ask("PUT", "/v1/plan", json=found["deployment"] | {"replicas": {"a100": 5}}).json() == {"version": 2}
    assert ask("GET", "/v1/plan").json()["version"] == ask.post("/v1/decide", MINE).json()["plan_version"] == 2
    assert len(scheduler.workers(clock.now)) == 5


def broken_plans(plan):
    """Deployments that must be refused, and a word that the refusal must say."""
    text = json.dumps(plan)
    yield text.replace('"start": 0', '"start": 1'), "stages"
    yield text.replace('"share": 1.0', '"share": 1e999'), "JSON"
    yield text.replace('"share": 1.0', '"share": 2.0'), "share"
    yield text.replace('"replicas"', '"nodes": 1, "replicas"'), "nodes"
    yield text.replace('{"a100": 2}', '{"a100": 1000000000}'), "workers"
    yield text.replace('{"a100": 2}', '{"a100": -1}'), "replicas"
    yield text.replace('{"a100": 2}', '{"h100": 2}'), "h100"
    yield text.replace('"model": "sd14"', '"model": "sd99"'), "sd99"
    yield text.replace('"batch_cap": 1', '"batch_cap": 1, "batch_cap": 2'), "twice"


def test_a_plan_that_does_not_fit_changes_nothing(ask, scheduler, deployment):
    """Every broken deployment is answered with its problems, and the plan in use stays."""
    for body, word in broken_plans(deployment.to_dict()):
        answer = ask("PUT", "/v1/plan", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, word
        assert word in json.dumps(problems(answer))
    assert scheduler.active_plan == (1, deployment)


def test_a_changed_file_is_followed_while_requests_run(scheduler, deployment, quickstart, folder, caplog):
    """The file changes, then breaks: the new plan is followed, the broken one is logged, and no decision fails."""

    async def run() -> None:
        async with app.router.lifespan_context(app), httpx.AsyncClient(**to_app) as client:
            write_plan(folder, replace(deployment, replicas={"a100": 3}), quickstart)
            assert await until(client, lambda: scheduler.version == 2)
            (folder / "plan.yaml").write_text("replicas: {a100: many}\n")
            assert await until(client, lambda: "the plan in use stays" in caplog.text)
            (folder / "plan.yaml").unlink()
            write_plan(folder, replace(deployment, replicas={"a100": 4}), quickstart)
            assert await until(client, lambda: scheduler.version == 3)

    async def until(client, happened) -> bool:
        stop = time.monotonic() + LONG_S
        while not happened() and time.monotonic() < stop:
            answer = await client.post("/v1/decide", json={"request_class": "picture"})
            assert answer.json()["reason"] == "planned"
            await asyncio.sleep(0)  # in one process nobody else would get a turn
        return happened()

    app = build_app(scheduler, plan_file=PlanFile(folder), reload_every_s=0.02)
    to_app = {"transport": httpx.ASGITransport(app), "base_url": "http://localhost"}
    asyncio.run(run())
    assert scheduler.active_plan[1].replicas == {"a100": 4}
    assert "replicas" in caplog.text


# ---- What if --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["planned", "cost_aware", "switch_by_queue", "edf_reject", "least_work"])
def test_a_what_if_is_what_would_be_decided_and_changes_nothing(deployment, quickstart, profiles, clock, policy):
    """Asked before each decision: the same choice, wait and finish; and the ledger is as if nobody had asked."""
    scheduler = embedded(deployment, quickstart, profiles=profiles, policy=policy)
    with Asker(build_app(scheduler, clock=clock)) as ask:
        for _ in range(6):
            before = scheduler.workers(clock.now), scheduler.open_decisions
            found = ask("POST", "/v1/whatif", json={"request": {"request_class": "picture"}}).json()
            assert (scheduler.workers(clock.now), scheduler.open_decisions) == before
            WhatIfAnswer.model_validate(found)
            decided = ask.post("/v1/decide", MINE).json()
            named = {"number": decided["number"], "worker": decided["worker"]}
            assert found["decision"] | named == decided
            taken = [option for option in found["options"] if option["taken"]]
            assert len(taken) == (decided["action"] != "reject")
            if taken:
                assert clock.now + taken[0]["latency_s"] == pytest.approx(decided["predicted_finish_s"])
                assert taken[0]["latency_interval_s"][0] <= taken[0]["latency_s"] <= taken[0]["latency_interval_s"][1]


def test_busy_pools_are_as_busy_as_said(ask):
    """Options on a pool wait as long as it is said to be busy, break their promise, and the page is told why."""
    question = {"request": {"request_class": "picture"}, "busy_s": {"a100": 30.0}}
    found = ask("POST", "/v1/whatif", json=question).json()
    assert [option["wait_s"] for option in found["options"]] == [30.0]
    assert found["options"][0]["misses"] == ["deadline"]
    assert found["decision"]["action"] == "queue"
    assert POLICIES["planned"].summary in found["why"]
    answer = ask("POST", "/v1/whatif", json=question | {"busy_s": {"b100": 1.0}})
    assert answer.status_code == 422
    assert "a100" in problems(answer)[0]["remedy"]


@pytest.mark.parametrize("policy", ["budgeted", "cost_aware", "switch_by_queue"])
def test_of_a_request_that_is_late_nothing_untrue_is_told(deployment, quickstart, profiles, clock, policy):
    """The plan that is taken need not be there first: each policy has its own reasons for it."""
    scenario = quickstart.with_overrides({"budget.usd_per_hour": 50.0})
    scheduler = embedded(deployment, scenario, profiles=profiles, policy=policy)
    with Asker(build_app(scheduler, clock=clock)) as ask:
        question = {"request": {"request_class": "picture", "slo_s": 0.01}, "busy_s": {"a100": 30.0}}
        found = ask("POST", "/v1/whatif", json=question).json()
    assert found["decision"]["reason"] == "late"
    assert all("deadline" in option["misses"] for option in found["options"])
    assert found["why"].startswith("No plan that the policy may take")
    assert "first" not in found["why"]


def test_what_protects_those_who_wait_is_told(deployment, quickstart, profiles, clock):
    """`edf_reject` turns away what it could do in time too, where it would make others late: the page says so."""
    scheduler = embedded(deployment, quickstart, profiles=profiles, policy="edf_reject")
    with Asker(build_app(scheduler, clock=clock)) as ask:
        patient = {"request_class": "picture", "slo_s": 20.0}
        while ask("POST", "/v1/decide", json=patient).json()["action"] != "reject":
            pass
        found = ask("POST", "/v1/whatif", json={"request": patient | {"slo_s": 12.0}}).json()
        assert found["decision"]["reason"] == "certain_late"
        assert "or make requests late that wait already" in found["why"]
        assert any("deadline" not in option["misses"] for option in found["options"]), found


def test_the_page_stands_alone(ask, scheduler):
    """One page without outside resources, which its own headers forbid; its form is filled from the plan."""
    answer = ask("GET", "/")
    assert not re.search(r"""(src|href|url\(|import)\s*[=(]?\s*["']?(https?:)?//""", answer.text)
    policy = answer.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        (written,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert b64encode(hashlib.sha256(written.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    found = ask("GET", "/v1/whatif").json()
    assert found["classes"]["picture"] | {"request_class": "picture"} == asdict(scheduler.requests["picture"])
    assert found["pools"] == ["a100"]


# ---- The command ----------------------------------------------------------------------------------------------------


def cut_off(line) -> bool:
    """Whether the server hangs up on headers without end."""
    try:
        line.sendall(b"GET / HTTP/1.1\r\n" + 1000 * (b"X: " + b"y" * 1000 + b"\r\n"))
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_the_command_serves_until_it_is_told_to_end(folder, deployment):
    """Threads decide while another swaps plans, a header without end is cut off, SIGTERM ends it with exit code 0."""
    with served(folder, HYBRIDSD_TOKEN=TOKEN) as (process, address):
        plan, found, stop = deployment.to_dict(), [], threading.Event()
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=LONG_S) as client:

            def decide() -> None:
                while not stop.is_set():
                    answer = client.post("/v1/decide", json={"request_class": "picture", "sampler": "ddim"})
                    found.append((answer.status_code, answer.json()["plan_version"]))

            threads = [threading.Thread(target=decide) for _ in range(4)]
            for thread in threads:
                thread.start()
            for nodes in range(3, 9):
                answer = client.put("/v1/plan", json=plan | {"replicas": {"a100": nodes}})
                assert answer.json() == {"version": nodes - 1}
            stop.set()
            for thread in threads:
                thread.join()
            assert {code for code, _ in found} == {200}
            assert {version for _, version in found} <= set(range(1, 8))
            families = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
            assert {"hybridsd_decisions", "hybridsd_workers", "hybridsd_plan_info"} <= families
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=LONG_S) as line:
            assert cut_off(line)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LONG_S)
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "picture" not in said
    assert TOKEN not in said


def test_the_command_bounds_the_rate(folder):
    """By the option where it is given, else by what the application itself allows."""
    assert signature(command.serve).parameters["requests_per_s"].default == REQUESTS_PER_S
    with served(folder, "--requests-per-s", "1") as (_, address):
        assert {httpx.get(f"{address}/v1/plan").status_code for _ in range(9)} == {200, 429}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "example.org"])  # noqa: S104 -- to be refused
def test_others_may_not_ask_without_a_token(folder, monkeypatch, host):
    """An address that other machines reach needs a token; this machine's own addresses do not."""
    monkeypatch.delenv("HYBRIDSD_TOKEN", raising=False)
    with pytest.raises(InputError, match="--token-file"):
        serve(folder, host=host, port=0)
    assert not is_loopback(host)
    assert all(map(is_loopback, ("127.0.0.1", "::1", "LocalHost", "127.1.2.3")))


def test_a_token_is_one_word_of_plain_characters(tmp_path, monkeypatch):
    """From a file, else from the environment; an empty one, or one that no header can carry, is refused."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("HYBRIDSD_TOKEN", "other")
    assert (read_token(file), read_token(None)) == (TOKEN, "other")
    monkeypatch.delenv("HYBRIDSD_TOKEN")
    assert read_token(None) is None
    for wrong in ("", " \n", "two words", "na\u00efve"):
        file.write_text(wrong)
        with pytest.raises(InputError, match="--token-file"):
            read_token(file)
    with pytest.raises(InputError, match="--token-file"):
        read_token(tmp_path / "nowhere")


def test_a_port_that_is_taken_and_a_policy_that_is_not_there_are_named(folder):
    """Both are wrong input, with what to choose instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: {port}"):
            serve(folder, host="127.0.0.1", port=port)
    with pytest.raises(InputError, match="cost_aware"):
        serve(folder, host="127.0.0.1", port=0, policy="cost_awar")
