"""Whatever is sent to the sidecar: who may ask, what is refused and how it is said, and nothing of it in the log."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from hybridsd_sim.errors import InputError
from hybridsd_sim.scheduling import WorkerUp
from hybridsd_sim.serving.app import build_app
from sidecars import LONG_S, MINE, TOKEN, Asker, Clock, problems

FOX = "a-fox-in-the-snow"


# ---- Bad input ------------------------------------------------------------------------------------------------------


GARBAGE = {
    "nothing": b"", "no JSON": b"{", "not UTF-8": b'{"request_class": "\xff"}', "null": b"null", "a number": b"7",
    "text": b'"picture"', "an empty object": b"{}", "an empty list": b"[]", "NaN": b'{"request_class": NaN}',
    "deep": b"[" * 30_000, "deep objects": b'{"a":' * 10_000, "a huge integer": b"9" * 5000, "1e400": b"1e400",
    "unknown": b'{"prompt": "x"}', "zeros": b"\0" * 100, "twice": b'{"replicas": {}, "replicas": {}}',
}  # fmt: skip
FIELDS = [
    '"num_inference_steps": NaN', '"guidance_scale": Infinity', '"slo_s": 1e400', '"num_images": 1e2',
    '"height_px": 99999999999999999999999999', '"height_px": 513', '"height_px": true', '"width_px": "512"',
    '"priority": -1001', '"slo_s": 0', '"quality_floor": 1.01', '"model": ""', '"request_class": ["picture"]',
    '"prompt": "a fox"', '"slo_s": {}', '"num_inference_steps": 0', f'"sampler": "{"x" * 201}"',
]  # fmt: skip
EVENTS = [
    '{"event": "step_done", "number": 1, "seconds": -1}', '{"event": "request_done", "number": 0}',
    '{"event": "request_done", "number": 1, "outcome": "lost"}', '{"event": "request_done", "number": 1, "at_s": NaN}',
    '{"event": "worker_up", "worker": "w", "pool": "a100", "gpus": 65}', '{"event": "tick"}', '{"number": 1}',
    json.dumps(257 * [{"event": "cloud_done", "number": 1}]),
]  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_answered_at_every_path(ask, scheduler, body):
    """Whatever is sent: 422 and what is wrong with it, and nothing has changed."""
    before = scheduler.active_plan, scheduler.open_decisions, scheduler.workers(0.0)
    for method, path in (("POST", "decide"), ("POST", "observe"), ("PUT", "plan"), ("POST", "whatif")):
        answer = ask(method, f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, (path, answer.text)
        problems(answer)
    assert (scheduler.active_plan, scheduler.open_decisions, scheduler.workers(0.0)) == before


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_no_such_thing_is_named(ask, field):
    """The place of the problem is the key, and its value is shown, cut short."""
    answer = ask.post("/v1/decide", f"{{{MINE[1:-1]}, {field}}}")
    assert answer.status_code == 422
    assert problems(answer)[0]["place"] == field.split('"')[1]
    assert max(map(len, problems(answer)[0].values())) <= 200


@pytest.mark.parametrize("event", EVENTS, ids=range(len(EVENTS)))
def test_an_event_that_cannot_be_is_refused(ask, event):
    """Unknown kinds, impossible numbers and too many at once."""
    assert ask.post("/v1/observe", event).status_code == 422


def test_what_is_not_asked_the_right_way_is_refused(ask):
    """Another path, method, type or query: each has its code, and all have one shape."""
    assert problems(ask("GET", "/v2/decide"))
    assert ask("GET", "/v2/decide").status_code == 404
    answer = ask("DELETE", "/v1/plan")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, PUT")
    problems(answer)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        answer = ask.post("/v1/decide", MINE, **{"Content-Type": kind})
        assert (answer.status_code, problems(answer)[0]["place"]) == (415, "Content-Type")
    assert ask.post("/v1/decide", MINE, **{"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200
    assert ask.post("/v1/decide?plan=yes", MINE).status_code == 422


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(scheduler, chunked):
    """413 by its length, or, where it comes in pieces without a length, as soon as they are too many."""
    read = []

    async def pieces():
        for _ in range(100):
            read.append(1)
            yield b" " * 1000

    with Asker(build_app(scheduler, max_body_bytes=5000)) as ask:
        answer = ask.post("/v1/decide", pieces() if chunked else b" " * 5001)
        assert answer.status_code == 413
        assert answer.headers["Connection"] == "close"
        assert "5000 bytes" in problems(answer)[0]["rule"]
        assert len(read) <= 8
        assert ask.post("/v1/decide", MINE + " " * (5000 - len(MINE))).status_code == 200


def test_a_worker_beyond_what_is_kept_is_refused(ask, scheduler, monkeypatch):
    """A caller that reports ever new workers cannot fill the memory."""
    monkeypatch.setattr("hybridsd_sim.scheduling.ledger.MAX_WORKERS", 3)
    up = [{"event": "worker_up", "worker": f"w{n}", "pool": "a100"} for n in range(3)]
    assert ask("POST", "/v1/observe", json=up[:1]).status_code == 200
    assert "at most 3" in problems(ask("POST", "/v1/observe", json=up))[0]["rule"]
    with pytest.raises(InputError, match="at most 3"):
        scheduler.observe(WorkerUp("w9", "a100", 0.0))


@pytest.mark.parametrize("begun", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(scheduler, monkeypatch, begun):
    """408 and the connection is closed, whether its first byte is missing or its last."""
    monkeypatch.setattr("hybridsd_sim.serving.guard.BODY_S", 0.05)

    async def silence():
        if begun:
            yield b"{"
        await asyncio.sleep(LONG_S)
        yield b"}"

    with Asker(build_app(scheduler)) as ask:
        answer = ask.post("/v1/decide", silence())
        assert (answer.status_code, answer.headers["Connection"]) == (408, "close")
        assert "0.05 s" in problems(answer)[0]["rule"]


# ---- Who may ask ----------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_told(scheduler):
    """401 for no token, a wrong one or another scheme; health and the empty page are for everybody."""
    with Asker(build_app(scheduler, token=TOKEN)) as ask:
        paths = ["/v1/plan", "/v1/whatif", "/metrics", "/openapi.json", "/nothing"]
        for wrong in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in paths:
                answer = ask("GET", path, headers=wrong)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
                problems(answer)
        assert ask.post("/v1/decide", MINE, Authorization=f"bearer {TOKEN}").json()["action"] == "run"
        assert [ask("GET", path).status_code for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]


@pytest.mark.parametrize(
    ("host", "code"), [("127.0.0.1:8470", 200), ("localhost", 200), ("[::1]:1", 200), ("evil.example", 421)]
)
def test_a_page_of_another_site_cannot_ask_by_its_own_name(ask, host, code):
    """The Host header must be this machine's, so that a name that was made to point here is of no use."""
    assert ask("GET", "/v1/plan", headers={"Host": host}).status_code == code


def test_too_many_requests_are_told_how_long_to_wait(scheduler, monkeypatch):
    """As many at once as in a second, then 429 with Retry-After, and after the wait they are answered again."""
    clock = Clock()
    monkeypatch.setattr("hybridsd_sim.serving.app.time.monotonic", clock)
    with Asker(build_app(scheduler, requests_per_s=0.5)) as ask:
        assert ask("GET", "/v1/plan").status_code == 200
        refused = ask("GET", "/v1/plan")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "2")
        problems(refused)
        assert ask("GET", "/healthz").status_code == ask("GET", "/metrics").status_code == 200
        clock.now += float(refused.headers["Retry-After"])
        assert ask("GET", "/v1/plan").status_code == 200


def test_who_has_no_token_uses_up_nothing_of_the_rate(scheduler):
    """A stranger's requests are refused for the token alone, and the owner's are answered as if there were none."""
    with Asker(build_app(scheduler, token=TOKEN, requests_per_s=1e-6)) as ask:
        assert {ask("GET", "/v1/plan").status_code for _ in range(5)} == {401}
        mine = {"Authorization": f"Bearer {TOKEN}"}
        assert [ask("GET", "/v1/plan", headers=mine).status_code for _ in range(2)] == [200, 429]


def test_nothing_that_a_request_carries_is_logged(ask, scheduler, monkeypatch, caplog):
    """Refused, decided or broken inside: the answer tells what is wrong, the log has no word of the request."""
    caplog.set_level(logging.DEBUG)
    assert FOX in ask.post("/v1/decide", json.dumps({"request_class": "picture", "sampler": {"x": FOX}})).text
    ask.post("/v1/decide", json.dumps({"request_class": FOX}), Authorization=FOX)

    def broken(*_: object) -> None:
        raise RuntimeError(FOX)

    monkeypatch.setattr(scheduler, "observe", broken)
    answer = ask("POST", "/v1/observe", json={"event": "worker_down", "worker": FOX})
    assert answer.status_code == 500
    assert "Traceback" not in answer.text
    assert FOX not in answer.text
    assert problems(answer)[0]["place"] == "server"
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert "RuntimeError in broken" in caplog.text
    assert not [record for record in ours if FOX in record.getMessage() or record.exc_info]


# ---- Fuzzing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(scheduler):
    """The sidecar as its own OpenAPI document describes it."""
    return schemathesis.openapi.from_asgi(
        "/openapi.json", build_app(scheduler, hosts=None, token=TOKEN), headers={"Authorization": f"Bearer {TOKEN}"}
    )


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_every_answer_is_one_that_was_described(described, mode):
    """What fits the description, and what just does not: codes, types and shapes that were described, no failure."""
    # What a schema cannot say (a pool that exists, a plan that fits) may be refused though it fits the schema.
    beyond = [check for check in CHECKS.get_all() if check.__name__ == "positive_data_acceptance"]
    seen = set()
    for found in described.get_all_operations():
        operation = found.ok()
        seen.add(operation.label)

        @settings(derandomize=True, max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=beyond)

        if mode.is_positive or operation.body or operation.query:
            check()
    assert len(seen) == 9
