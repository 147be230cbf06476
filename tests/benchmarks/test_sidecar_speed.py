"""How many decisions a second the sidecar makes over HTTP, against a bare route in the same run.

The figures are printed. For the whole measurement, with the server alone on one core and the load on another:

    SIDECAR_SECONDS=30 pytest tests/benchmarks/test_sidecar_speed.py

wrk keeps eight connections busy with mixed requests, about a hundred of them open; every fifth tells of four that have
ended. Decisions are counted apart; latencies are those of all requests. With `SIDECAR_TARGET=1` too, on a machine that
does nothing else, the targets are held: `LEAST_PER_S` decisions a second, 99 of 100 answers within `MOST_P99_MS`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from hybridsd_sim import Profiles, Scenario
from sidecars import handed_over, served, write_plan

MOST_OF_BARE = 6.0
"""Processor seconds of a request to the sidecar, over those of a bare route that reads and writes the same JSON."""
LEAST_PER_S = 2000.0
MOST_P99_MS = 10.0
SECONDS = int(os.environ.get("SIDECAR_SECONDS", "4"))
CONNECTIONS = 8
needs_wrk = pytest.mark.skipif(
    not (shutil.which("wrk") and shutil.which("taskset")) or len(os.sched_getaffinity(0)) < 2,
    reason="wrk and taskset are not installed, or there is one core only",
)
LOAD = """
local said = {"", ',"num_inference_steps":20', ',"num_inference_steps":30', ',"num_images":2', ',"slo_s":4.5'}
local count, open, first, last = 0, {}, 1, 0
local threads = {}
decided = 0
setup = function(thread) table.insert(threads, thread) end
wrk.headers["Content-Type"] = "application/json"
response = function(status, headers, body)
  if status == 200 and body:find('"action":', 1, true) then decided = decided + 1 end
  local number = body:match('"number":([1-9]%d*)')
  if number then last = last + 1; open[last] = number end
end
request = function()
  count = count + 1
  if count % 5 > 0 or last - first < 100 then
    return wrk.format("POST", "/v1/decide", nil, '{"request_class":"picture"' .. said[count % 5 + 1] .. '}')
  end
  local ends = {}
  for _ = 1, 4 do
    ends[#ends + 1] = '{"event":"request_done","number":' .. open[first] .. '}'
    open[first] = nil
    first = first + 1
  end
  return wrk.format("POST", "/v1/observe", nil, "[" .. table.concat(ends, ",") .. "]")
end
done = function(summary)
  local errors, sum = summary.errors, 0
  for _, thread in ipairs(threads) do sum = sum + thread:get("decided") end
  print("Decisions/sec: " .. sum / (summary.duration / 1e6))
  print("Failed: " .. errors.connect + errors.read + errors.write + errors.timeout + errors.status)
end
"""
BARE = """
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def answer(request):
    return JSONResponse(await request.json())

routes = [Route("/v1/" + name, answer, methods=["POST"]) for name in ("decide", "observe")]
uvicorn.run(Starlette(routes=routes), port=int(sys.argv[1]), access_log=False, log_level="warning")
"""
BARE_PORT = 8479


@pytest.mark.parametrize("policy", ["planned", "cost_aware"])
@needs_wrk
def test_decisions_over_http(
    tmp_path: Path, quickstart: Scenario, profiles: Profiles, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    """A decision or an end over HTTP costs at most `MOST_OF_BARE` times as much as a bare route, and none fails."""
    folder = write_plan(tmp_path / "run", handed_over(quickstart, profiles, 3), quickstart)
    (tmp_path / "load.lua").write_text(LOAD)
    with bare() as process:
        reference = loaded(process, f"http://127.0.0.1:{BARE_PORT}", tmp_path)
    with served(folder, "--policy", policy, "--requests-per-s", "1e6") as (process, address):
        ours = loaded(process, address, tmp_path)
    ratio = ours["cpu_s_each"] / reference["cpu_s_each"]
    with capsys.disabled():
        print(  # noqa: T201 the figures are what the reader came for
            f"\n{policy}: {ours['decisions_per_s']:,.0f} decisions a second of {ours['per_s']:,.0f} requests, p50 "
            f"{ours['p50_ms']:.2f} ms, p99 {ours['p99_ms']:.2f} ms, {1e6 * ours['cpu_s_each']:.0f} us of processor "
            f"each: {ratio:.1f} times a bare route, which made {reference['per_s']:,.0f} a second; load of the machine "
            f"{os.getloadavg()[0]:.1f}"
        )
    assert ours["failed"] == reference["failed"] == 0
    assert ours["decisions_per_s"] > 0.0
    assert ratio < MOST_OF_BARE
    if os.environ.get("SIDECAR_TARGET") == "1":
        assert ours["decisions_per_s"] >= LEAST_PER_S
        assert ours["p99_ms"] < MOST_P99_MS


@contextmanager
def bare() -> Iterator[subprocess.Popen[str]]:
    """A bare route that answers with the JSON that it gets."""
    process = subprocess.Popen([sys.executable, "-c", BARE, str(BARE_PORT)], text=True)
    try:
        for _ in range(300):
            time.sleep(0.1)
            try:
                urlopen(f"http://127.0.0.1:{BARE_PORT}/").close()
            except OSError as error:
                if getattr(error, "code", None) == 404:
                    break
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def loaded(process: subprocess.Popen[str], address: str, folder: Path) -> dict[str, float]:
    """What wrk says of a server on a core of its own, after a second of warm-up, and its processor seconds."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {first})
    command = ["taskset", "-c", str(second), "wrk", "-t1", f"-c{CONNECTIONS}", "--latency", "-s", "load.lua", address]
    subprocess.run([*command, "-d1s"], cwd=folder, check=True, capture_output=True)
    before = _cpu_s(process.pid)
    said = subprocess.run([*command, f"-d{SECONDS}s"], cwd=folder, check=True, capture_output=True, text=True).stdout
    (count,) = re.findall(r"(\d+) requests in", said)
    return {
        "per_s": float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0]),
        "p50_ms": _ms(said, "50%"),
        "p99_ms": _ms(said, "99%"),
        "decisions_per_s": float(re.findall(r"Decisions/sec: ([\d.]+)", said)[0]),
        "failed": float(re.findall(r"Failed: (\d+)", said)[0]),
        "cpu_s_each": (_cpu_s(process.pid) - before) / int(count),
    }


def _ms(said: str, share: str) -> float:
    """A percentile of wrk's latencies."""
    value, unit = re.findall(rf"^\s+{share}\s+([\d.]+)(us|ms|s)$", said, re.MULTILINE)[0]
    return float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
