"""The load test of a plan: what it sends, how it judges, and that it tells a fast service from a slow or absent one."""

from __future__ import annotations

import csv
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.reporting import load_test, write_report
from hybridsd_sim.reporting.exports import ENOUGH, MOST, MOST_LEAD_IN, load_test_data
from hybridsd_sim.workload.arrivals import arrivals

PATIENT = ("--lateness", "1e9")
"""A machine that is busy with other work is no failure of the service."""


# ---- What is sent ---------------------------------------------------------------------------------------------------


def test_the_requests_are_the_scenarios_own_arrivals(plan, scenario):
    """Times and classes are those that the workload draws for the first replication, counted from the warm-up on."""
    load = load_test_data(plan)
    names, own = list(scenario.requests), list(arrivals(scenario, 0))
    first, from_s = own[0][0], load["count_from_s"]
    sent = [(request["arrival_s"], request["request_class"]) for request in load["requests"]]
    assert sent == [(pytest.approx(at - first, abs=1e-6), names[index]) for at, index in own[: len(sent)]]
    assert sum(at < from_s for at, _ in sent) == sum(at < scenario.warmup_s for at, _ in own)
    assert len({request["seed"] for request in load["requests"]}) > 0.99 * len(sent)


@pytest.mark.parametrize(("rate", "enough"), [(0.5, False), (2.0, True), (100.0, True)])
def test_the_window_shows_every_promised_percentile_where_the_horizon_allows(plan, scenario, rate, enough):
    """At least 459 requests of each class with an SLO, no more than it takes; too short a horizon is said."""
    rates = {f"requests.{name}.arrivals.rate_per_s": rate for name in scenario.requests}
    load = load_test_data(replace(plan, scenario=scenario.with_overrides(rates)))
    counted = [one for one in load["requests"] if one["arrival_s"] >= load["count_from_s"]]
    found = {name: sum(one["request_class"] == name for one in counted) for name in scenario.requests}
    assert len(load["requests"]) - len(counted) <= MOST_LEAD_IN
    if enough:
        assert load["too_few"] == {}
        assert min(found["phone"], found["laptop"]) == ENOUGH
        assert counted[-1]["request_class"] in {"phone", "laptop"}
    else:
        assert load["too_few"] == {name: found[name] for name in ("phone", "laptop")}


def test_a_rare_class_beside_a_common_one_does_not_flood_the_service(plan, scenario):
    """However rare a class, no more than some 5,000 requests are sent in all."""
    rates = {"requests.phone.arrivals.rate_per_s": 40.0, "requests.laptop.arrivals.rate_per_s": 0.1}
    load = load_test_data(replace(plan, scenario=scenario.with_overrides(rates)))
    assert len(load["requests"]) == MOST
    assert set(load["too_few"]) == {"laptop"}


def test_bodies_and_expectations_are_the_plans(plan, scenario):
    """Each class asks for its own picture; what is expected of it is the simulation's own figure with its interval."""
    load = load_test_data(plan)
    assert load["bodies"]["studio"] == {
        "model": "sdxl", "height_px": 512, "width_px": 512, "num_inference_steps": 25, "guidance_scale": 7.5,
        "num_images": 1, "sampler": "ddim",
    }  # fmt: skip
    assert set(load["expected"]) == {*scenario.requests, "all"}
    assert (load["expected"]["phone"]["slo_s"], load["expected"]["phone"]["slo_percentile"]) == (8.0, 95.0)
    for name, expected in load["expected"].items():
        row = plan.chosen_result.summary.loc["planned", name]
        for key in ("latency_p50_s", "latency_p95_s", "latency_mean_s", "slo_attainment", "served_per_s"):
            assert [expected[key][end] for end in ("value", "low", "high")] == [
                None if math.isnan(value) else value for value in (row[key], row[f"{key}_low"], row[f"{key}_high"])
            ]


def test_what_a_trace_asks_for_goes_along(plan, scenario, tmp_path):
    """A request whose images or steps differ from its class's says so, and its body has them."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,num_images,num_inference_steps\n0,1,25\n70,2,30\n80,1,25\n")
    arrival = {"process": "trace", "rate_per_s": None, "path": str(trace)}
    load = load_test_data(replace(plan, scenario=scenario.with_overrides({"requests.phone.arrivals": arrival})))
    unlike = [one for one in load["requests"] if "num_images" in one or "num_inference_steps" in one]
    assert [(one["num_images"], one["num_inference_steps"]) for one in unlike] == [(2, 30)]
    body = load_test.body_of(load, unlike[0])
    assert (body["num_images"], body["num_inference_steps"], body["height_px"]) == (2, 30, 512)
    assert (body["request_class"], body["seed"]) == ("phone", unlike[0]["seed"])


def test_the_same_plan_gives_the_same_load(plan, profiles, tmp_path, undrawn):
    """Written twice, load_test.json and load_test.py are byte for byte the same; the script is the package's own."""
    folders = [write_report(plan, tmp_path / name, profiles=profiles).parent for name in "ab"]
    for name in ("load_test.json", "load_test.py"):
        one, other = ((folder / name).read_bytes() for folder in folders)
        assert one == other
    with open(load_test.__file__, "rb") as file:  # noqa: PTH123 - any file, as the import system names it
        assert (folders[0] / "load_test.py").read_bytes() == file.read()
    assert json.loads((folders[0] / "load_test.json").read_text()) == json.loads(json.dumps(load_test_data(plan)))


# ---- How it is judged -----------------------------------------------------------------------------------------------


def expected(p50_s, p95_s, slo_s, percentile=95.0):
    """What a load expects of a class."""
    known = {"value": p95_s, "low": 0.9 * p95_s, "high": 1.1 * p95_s}
    row = {f"latency_{key}_s": known for key in ("p95", "p99", "mean")}
    row |= dict.fromkeys(("slo_attainment", "served_per_s"), known)
    return {"slo_s": slo_s, "slo_percentile": percentile, **row, "latency_p50_s": {**known, "value": p50_s}}


def load(arrival_s, *, p50_s=0.1, p95_s=0.2, slo_s=1.0, percentile=95.0, count_from_s=0.0):
    """A load of one class."""
    requests = [{"arrival_s": at, "request_class": "a", "seed": n} for n, at in enumerate(arrival_s)]
    row = expected(p50_s, p95_s, slo_s, percentile)
    return {
        "format": load_test.FORMAT, "count_from_s": count_from_s, "bodies": {"a": {"model": "sd14"}},
        "expected": {"a": row, "all": {**row, "slo_s": None}}, "requests": requests,
    }  # fmt: skip


def answered(latencies, *, late_s=0.0):
    """Requests a second apart with these latencies; None is one that was refused."""
    return [
        load_test.ReplayedRequest(
            float(n), "a", n, counted=True, late_s=late_s, latency_s=math.inf if s is None else s,
            reason="connection refused" if s is None else "",
        )
        for n, s in enumerate(latencies)
    ]  # fmt: skip


def test_a_plan_that_turns_away_promises_the_rest(plan):
    """Errors of the service do not break such a plan's promise, what takes too long or cannot be reached does."""
    sent = answered([1.0, 1.0, None, None])
    refused = [replace(one, reason="HTTP 503" if one.reason else "") for one in sent]
    own = load([0.0], slo_s=3.0) | {"promised_to": load_test.ADMITTED}
    assert load_test.judge(own, refused)["a"]["promise_holds"]
    assert not load_test.judge(own, sent)["a"]["promise_holds"]
    assert not load_test.judge(load([0.0], slo_s=3.0), refused)["a"]["promise_holds"]
    assert load_test.judge(own, refused)["a"]["measured"]["slo_attainment"] == 0.5
    assert "promised_to" not in load_test_data(plan)


@given(st.lists(st.one_of(st.none(), st.floats(0.001, 9.0)), min_size=1, max_size=60), st.floats(1.0, 99.0))
def test_a_promise_holds_where_its_percentile_was_answered_in_time(latencies, percentile):
    """The share inside the SLO is over all counted requests, the unserved among those that missed."""
    sent = answered(latencies)
    found = load_test.judge(load([0.0], slo_s=3.0, percentile=percentile), sent)["a"]
    inside = sum(s is not None and s <= 3.0 for s in latencies)
    assert found["measured"]["slo_attainment"] == pytest.approx(inside / len(latencies))
    assert found["promise_holds"] == (100 * inside >= percentile * len(latencies) - 1e-9)
    assert found["measured"]["served"] == sum(s is not None for s in latencies)


@given(st.lists(st.floats(0.001, 9.0), min_size=1, max_size=300), st.floats(0.01, 9.0))
def test_agreement_is_the_overlap_of_the_two_intervals(latencies, p95_s):
    """The measured p95 is inside the simulated interval widened by its own just where the two intervals overlap."""
    found = load_test.judge(load([0.0], p95_s=p95_s), answered(latencies))["a"]
    low, high = load_test.quantile_interval(sorted(latencies), 0.95)
    assert low <= found["measured"]["latency_p95_s"] <= high
    overlap = max(low, 0.9 * p95_s) - min(high, 1.1 * p95_s)
    if abs(overlap) > 1e-9:
        assert found["agrees"] == (overlap < 0)


def test_the_own_interval_covers_the_quantile_as_often_as_it_says():
    """Of many samples of an exponential, the interval of the p95 misses the true one about one time in twenty."""
    random = np.random.default_rng(5)
    samples = np.sort(random.exponential(size=(2000, 459)), axis=1)
    ends = np.array([load_test.quantile_interval(sample.tolist(), 0.95) for sample in samples])
    covered = np.mean((ends[:, 0] <= math.log(20)) & (math.log(20) <= ends[:, 1]))
    assert 0.93 <= covered <= 0.98


def test_nothing_answered_agrees_with_nothing():
    """With every request refused there is no p95 to hold against the simulation, and the promise is broken."""
    found = load_test.judge(load([0.0]), answered([None] * 5))["a"]
    assert (found["agrees"], found["promise_holds"]) == (None, False)
    assert "connection refused" in load_test.result_text(load_test.result_of(load([0.0]), answered([None] * 5), 0))


@pytest.mark.parametrize(("late_s", "void"), [(0.0049, False), (0.0051, True)])
def test_a_late_sender_voids_the_run(late_s, void):
    """Lateness beyond 5% of the smallest expected median leaves no verdict, whatever was measured."""
    result = load_test.result_of(load([0.0], p50_s=0.1), answered([0.1] * 50, late_s=late_s), 0)
    assert result["lateness"]["void"] is void
    assert result["holds"] is (None if void else True)
    assert ("void" in load_test.result_text(result)) is void


def test_the_lead_in_is_sent_and_not_counted():
    """Requests before `count_from_s` fill the service and stand in no figure; `--requests` counts beyond them."""
    given_load = load([0.0, 1.0, 2.0, 3.0, 4.0], count_from_s=2.0)
    assert len(load_test.chosen_requests(given_load, 2)) == 4
    assert len(load_test.chosen_requests(given_load, None)) == 5
    with pytest.raises(load_test.BadInputError, match="no request to count"):
        load_test.chosen_requests(load([0.0], count_from_s=2.0), None)
    sent = answered([9.0, 9.0, 0.1, 0.1, 0.1])
    sent[0].counted = sent[1].counted = False
    assert load_test.judge(given_load, sent)["a"]["measured"]["requests"] == 3


# ---- Against a server -----------------------------------------------------------------------------------------------


@contextmanager
def service(answer):
    """A local server that answers a POST with what `answer(body, headers)` returns: a status; None hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = answer(body, self.headers)
            if status is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"done")

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/images?x=1"
        finally:
            server.shutdown()
            thread.join()


def servers(count, seconds):
    """That many servers behind one queue, each busy so long with a request."""
    free = threading.Semaphore(count)

    def answer(*_):
        with free:
            time.sleep(seconds)
        return 200

    return answer


def ran(folder, given_load, url, *options):
    """Exit code, result and lines of a load test of this load."""
    path = folder / "load_test.json"
    path.write_text(json.dumps(given_load))
    code = load_test.main(["--url", url, "--load", str(path), *PATIENT, *options])
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return code, json.loads((folder / "result.json").read_text()), lines


def test_a_fast_enough_service_keeps_its_promise(tmp_path, capsys):
    """Four servers that need a hundredth of a second keep a promise of ten; the table says so, and exit is 0."""
    with service(servers(4, 0.01)) as url:
        code, result, lines = ran(tmp_path, load(np.linspace(0.0, 0.5, 40).tolist(), slo_s=10.0), url)
    assert (code, result["holds"], result["unserved"]) == (0, True, {})
    assert result["classes"]["a"]["measured"]["served"] == len(lines) == 40
    assert all(float(line["latency_s"]) >= 0.01 for line in lines)
    out = capsys.readouterr().out
    assert "95% in 10 s" in out
    assert "every promise holds" in out


def test_a_slow_service_breaks_its_promise(tmp_path, capsys):
    """One server that is asked for more than it can do answers most of them too late; exit is 1."""
    with service(servers(1, 0.1)) as url:
        code, result, _ = ran(tmp_path, load(np.linspace(0.0, 0.2, 20).tolist(), slo_s=0.5, p95_s=0.2), url)
    found = result["classes"]["a"]
    assert (code, result["holds"], found["promise_holds"], found["agrees"]) == (1, False, False, False)
    assert found["measured"]["served"] == 20
    assert found["measured"]["latency_p95_s"] > 1.5
    assert "BROKEN" in capsys.readouterr().out


def test_a_service_that_is_not_there_is_counted_and_not_a_traceback(tmp_path, capsys):
    """Refused connections are unserved with that reason; the promise is broken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        code, result, lines = ran(tmp_path, load([0.0, 0.01, 0.02]), url)
    assert code == 1
    assert result["unserved"] == {"connection refused": 3}
    assert [line["latency_s"] for line in lines] == ["", "", ""]
    assert capsys.readouterr().err == ""


def test_every_way_to_fail_has_its_reason(tmp_path):
    """Errors, hang-ups and answers that take too long are unserved, each by name; others are served."""
    gone = threading.Event()

    def answer(body, _):
        if body["seed"] == 3:
            gone.wait(30.0)
        return {0: 503, 1: None}.get(body["seed"], 200)

    with service(answer) as url:
        _, result, lines = ran(tmp_path, load([0.0] * 5), url, "--timeout", "3")
        gone.set()
    reasons = [line["reason"] for line in lines]
    assert (reasons[0], reasons[2], reasons[3], reasons[4]) == ("HTTP 503", "", "timed out", "")
    assert reasons[1].startswith("connection failed")
    assert result["classes"]["all"]["measured"]["served"] == 2


def test_requests_leave_on_time_however_late_answers_are(tmp_path):
    """A service that answers nobody before it has heard from everybody is answered by an open loop alone."""
    everybody = threading.Barrier(8)

    def answer(*_):
        everybody.wait(60.0)
        return 200

    with service(answer) as url:
        _, result, _ = ran(tmp_path, load(np.linspace(0.0, 0.1, 8).tolist()), url)
    assert result["classes"]["a"]["measured"]["served"] == 8


def test_a_cap_that_bites_is_said_and_voids_the_run(tmp_path, capsys):
    """With one request in flight at most, those held back are counted, and the run says nothing of the service."""
    with service(servers(4, 0.1)) as url:
        code, result, _ = ran(tmp_path, load([0.0] * 5), url, "--most-in-flight", "1", "--lateness", "0.05")
    assert result["held_back"] == 4
    assert (code, result["holds"]) == (1, None)
    assert "held back" in capsys.readouterr().out


def test_a_time_scale_is_told_in_the_plans_own_seconds(tmp_path):
    """Played ten times as fast, a twentieth of a second counts as half a second of the plan."""
    with service(servers(4, 0.05)) as url:
        _, result, lines = ran(tmp_path, load([0.0, 1.0, 2.0], slo_s=100.0), url, "--time-scale", "0.1")
    assert all(float(line["latency_s"]) >= 0.5 for line in lines)
    assert result["classes"]["a"]["measured"]["served_per_s"] == pytest.approx(1.5)


def test_bodies_and_headers_arrive_as_written(tmp_path):
    """The service gets the class's body with class and seed, the headers asked for, and the whole path."""
    seen = []

    def answer(body, headers):
        seen.append((body, headers["Authorization"]))
        return 200

    given_load = load([0.0])
    given_load["bodies"]["a"]["prompt"] = "a lighthouse"
    with service(answer) as url:
        ran(tmp_path, given_load, url, "--header", "Authorization=Bearer a=b")
    body = {"model": "sd14", "prompt": "a lighthouse", "request_class": "a", "seed": 0}
    assert seen == [(body, "Bearer a=b")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "ftp://host/"], "must be like http"),
        (["--url", "http://host:port/"], "must be like http"),
        (["--url", "nonsense"], "must be like http"),
        (["--url", "http://h/", "--header", "x"], "KEY=VALUE"),
        (["--url", "http://h/", "--load", "nowhere.json"], "cannot be read"),
        (["--url", "http://h/", "--time-scale", "0"], "not above 0"),
        (["--url", "http://h/", "--requests", "0"], "not at least 1"),
        ([], "--url"),
    ],
)
def test_bad_input_is_told_with_exit_2(tmp_path, capsys, options, said):
    """A wrong address, file, header or number ends with 2 and a sentence, before anything is sent."""
    (tmp_path / "load_test.json").write_text(json.dumps(load([0.0])))
    given = options if "--load" in options else [*options, "--load", str(tmp_path / "load_test.json")]
    try:
        code = load_test.main(given)
    except SystemExit as stopped:  # how argparse ends
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"format": 99}'])
def test_a_file_that_is_no_load_is_refused(tmp_path, capsys, content):
    """Anything but a load test of this format ends with 2."""
    (tmp_path / "load_test.json").write_text(content)
    assert load_test.main(["--url", "http://h/", "--load", str(tmp_path / "load_test.json")]) == 2
    assert "load test" in capsys.readouterr().err


def test_a_class_without_a_body_is_refused(tmp_path, capsys):
    """A request of a class that the file does not describe is named before anything is sent."""
    strange = load([0.0])
    strange["requests"][0]["request_class"] = "b"
    (tmp_path / "load_test.json").write_text(json.dumps(strange))
    assert load_test.main(["--url", "http://h/", "--load", str(tmp_path / "load_test.json")]) == 2
    assert "without a body" in capsys.readouterr().err


def test_the_script_stands_alone(plan, profiles, tmp_path, undrawn):
    """The copy in a report's folder runs without this package and its libraries, on the load beside it."""
    report = write_report(plan, tmp_path / "run", profiles=profiles).parent
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("load_test.py", "load_test.json"):
        shutil.copy(report / name, folder)
    with service(lambda *_: 200) as url:
        options = ("--url", url, "--time-scale", "0.005", "--requests", "20", *PATIENT)
        command = [sys.executable, "-I", "-S", str(folder / "load_test.py"), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode in {0, 1}
    result = json.loads((folder / "result.json").read_text())
    assert result["unserved"] == {}
    assert result["classes"]["all"]["measured"]["requests"] == 20
