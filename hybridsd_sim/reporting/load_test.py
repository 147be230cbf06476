"""Sends the requests of a capacity plan to a running service and says whether it keeps what the plan promises.

    python load_test.py --url http://host:port/v1/images

Stands alone (Python 3.11, nothing to install) beside the `load_test.json` of a plan's report, which holds what to send
and what the simulation expects. The URL must answer a POST with the finished picture: the whole plan, its edge stages
too. What else the service asks for (a prompt, say) goes into `bodies` of that file; `request_class` and `seed` are
added to each body.

The replay is open-loop: requests leave at their arrival times however late answers are, each in a thread of its own.
Latency counts from the arrival time, not from the sending, so that a late sender cannot flatter the service; if the
sender's own lateness (99th percentile) exceeds 5% of the smallest expected median, the run is void.

- A promise holds where at least its percentile of the counted requests was answered within the SLO. Unserved requests
  (refused, timed out, answered with an error) are not inside it. Where the plan may turn requests away so that the
  others are in time (`search.minimise: turned_away_per_s`), those answered with an error are left out, as in its
  simulation.
- The service agrees with the simulation where the measured p95 lies inside the simulated 95% interval, widened on each
  side by the measured p95's own 95% interval: from binomial ranks, as if requests were independent, so that chance
  alone breaks it somewhat more often than one time in twenty.

Writes `results.csv` and `result.json` beside the load. Exit 0: every promise holds; 1: one is broken, or the run is
void; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import math
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

Data = dict[str, Any]

FORMAT = 1

LATENESS_SHARE = 0.05
"""The sender's own lateness, as a share of the smallest expected median latency, beyond which a run is void."""

NORMAL_95 = 1.959964

EVERYONE = "all"

ROUNDING = 1e-12

TOLERANCE_S = 1e-6
"""Rounding of seconds that the simulation allows too."""

ADMITTED = "admitted"
"""Whom a plan promises its SLO that turns away as few requests as it can: those that it does not turn away."""

HEAD = ("class", "requests", "p50 s", "p95 s", "p99 s", "mean s", "inside SLO", "per s", "promise", "agrees")

ANSWERS = {True: "holds", False: "BROKEN", None: "none"}

AGREES = {True: "yes", False: "no", None: "unknown"}

SHOWN = ("latency_p50_s", "latency_p95_s", "latency_p99_s", "latency_mean_s", "slo_attainment", "served_per_s")

COLUMNS = ("arrival_s", "request_class", "seed", "counted", "late_s", "latency_s", "reason")


class BadInputError(Exception):
    """What was asked for cannot be done: the file, the address or an option is wrong."""


@dataclass(slots=True)
class ReplayedRequest:
    """One request and what became of it: seconds of the plan; `reason` is empty where it was answered in full."""

    arrival_s: float
    request_class: str
    seed: int
    counted: bool
    late_s: float = 0.0
    latency_s: float = math.inf
    reason: str = "not sent"


@dataclass(slots=True)
class Target:
    """Where requests go and how: `time_scale` is how many real seconds a second of the plan lasts here."""

    url: SplitResult
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    time_scale: float = 1.0
    most_in_flight: int = 512


# ---- Sending ----------------------------------------------------------------------------------------------------


def replay(load: Data, requests: Sequence[Data], target: Target) -> tuple[list[ReplayedRequest], int]:
    """Send every request at its time; what became of each, and how many had to wait because the cap was reached.

    Blocks until the last answer is in. Times are those of the plan: real seconds over `target.time_scale`.
    """
    counted_from = float(load["count_from_s"])
    sent = [
        ReplayedRequest(r["arrival_s"], r["request_class"], r["seed"], r["arrival_s"] >= counted_from) for r in requests
    ]
    slots, capped, threads = threading.BoundedSemaphore(target.most_in_flight), 0, []
    begin_s = time.perf_counter() + 0.1
    for request, one in zip(requests, sent, strict=True):
        due_s = begin_s + one.arrival_s * target.time_scale
        time.sleep(max(0.0, due_s - time.perf_counter()))
        if not slots.acquire(blocking=False):
            capped += 1
            slots.acquire()
        body = json.dumps(body_of(load, request)).encode()
        threads.append(threading.Thread(target=_send, args=(one, body, due_s, target, slots), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return sent, capped


def body_of(load: Data, request: Data) -> dict[str, Any]:
    """What is posted: the body of the class, what this request changes of it, its class and its seed."""
    changed = {key: value for key, value in request.items() if key != "arrival_s"}
    return {**load["bodies"][request["request_class"]], **changed}


def _send(one: ReplayedRequest, body: bytes, due_s: float, target: Target, slots: threading.BoundedSemaphore) -> None:
    try:
        one.late_s = max(0.0, time.perf_counter() - due_s) / target.time_scale
        one.reason = _post(body, target)
        if not one.reason:
            one.latency_s = (time.perf_counter() - due_s) / target.time_scale
    finally:
        slots.release()


def _post(body: bytes, target: Target) -> str:
    """Post one body and read the whole answer; why it failed, or nothing where it did not."""
    address, deadline_s = target.url, time.perf_counter() + target.timeout_s
    make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = make(address.hostname or "", address.port, timeout=target.timeout_s)
    try:
        where = (address.path or "/") + (f"?{address.query}" if address.query else "")
        connection.request("POST", where, body, {"Content-Type": "application/json", **target.headers})
        answer = connection.getresponse()
        while answer.read(1 << 16):
            if time.perf_counter() > deadline_s:
                return "timed out"
    except TimeoutError:
        return "timed out"
    except ConnectionRefusedError:
        return "connection refused"
    except ssl.SSLError as error:
        return f"TLS: {error.reason or type(error).__name__}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"connection failed: {type(error).__name__}"
    finally:
        connection.close()
    return "" if 200 <= answer.status < 300 else f"HTTP {answer.status}"


# ---- Judging ----------------------------------------------------------------------------------------------------


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the sorted values do not exceed; NaN of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def quantile_interval(ordered: Sequence[float], share: float) -> tuple[float, float]:
    """The 95% interval of a quantile from binomial ranks; infinite where the values are too few to tell.

    Of n independent values the number below the q-quantile is binomial, so that the ranks n q +- 1.96 sqrt(n q (1 - q))
    enclose it (normal approximation: Conover, Practical Nonparametric Statistics, 1999, section 3.2).
    """
    count = len(ordered)
    half = NORMAL_95 * math.sqrt(count * share * (1.0 - share))
    low, high = math.floor(count * share - half) - 1, math.ceil(count * share + half)
    return ordered[low] if low >= 0 else -math.inf, ordered[high] if high < count else math.inf


def judge(load: Data, sent: Sequence[ReplayedRequest]) -> dict[str, Any]:
    """Expected and measured figures of every class and of all, with their verdicts.

    `promise_holds` is None where nothing is promised or counted. Where the plan turns requests away to keep its promise
    to the others (`promised_to`), those that the service answers with an error are not counted for it. `agrees` says
    whether the measured p95 lies in the simulated interval widened by its own; it is None where either is unknown.
    """
    slos = {name: row.get("slo_s") for name, row in load["expected"].items()}
    found = {}
    for name, expected in load["expected"].items():
        mine = [one for one in sent if one.counted and name in (EVERYONE, one.request_class)]
        due_s = {cls: math.inf if slo is None else slo + TOLERANCE_S for cls, slo in slos.items()}
        inside = sum(not one.reason and one.latency_s <= due_s[one.request_class] for one in mine)
        measured = _measured(mine, inside, load["count_from_s"])
        slo_s, attained = expected.get("slo_s"), measured["slo_attainment"]
        if load.get("promised_to") == ADMITTED and (left := sum(one.reason[:5] != "HTTP " for one in mine)):
            attained = inside / left
        promised = None if slo_s is None or not mine else attained >= expected["slo_percentile"] / 100 - ROUNDING
        agrees, p95, simulated = None, measured["latency_p95_s"], expected["latency_p95_s"]
        if simulated["value"] is not None and not math.isnan(p95):
            low, high = (simulated["value" if simulated[end] is None else end] for end in ("low", "high"))
            down, up = p95 - measured["latency_p95_s_low"], measured["latency_p95_s_high"] - p95
            agrees = bool(low - up <= p95 <= high + down)
        found[name] = {"expected": expected, "measured": measured, "promise_holds": promised, "agrees": agrees}
    return found


def _measured(mine: Sequence[ReplayedRequest], inside: int, from_s: float) -> dict[str, float]:
    """Figures of some requests, of which `inside` kept their SLO; NaN for what none of them can tell."""
    latency = sorted(one.latency_s for one in mine if not one.reason)
    span_s = max((one.arrival_s for one in mine), default=from_s) - from_s
    figures: dict[str, float] = {"requests": len(mine), "served": len(latency)}
    figures |= {f"latency_p{p}_s": quantile(latency, p / 100) for p in (50, 95, 99)}
    figures["latency_p95_s_low"], figures["latency_p95_s_high"] = quantile_interval(latency, 0.95)
    figures["latency_mean_s"] = sum(latency) / len(latency) if latency else math.nan
    figures["slo_attainment"] = inside / len(mine) if mine else math.nan
    figures["served_per_s"] = len(latency) / span_s if span_s else math.nan
    return figures


def lateness(load: Data, sent: Sequence[ReplayedRequest], share: float = LATENESS_SHARE) -> dict[str, Any]:
    """The sender's own lateness, how much is allowed, and whether the run is void for it.

    All in seconds of the plan: the 99th percentile over all requests against `share` of the smallest expected median. A
    run without an expected median is never void.
    """
    medians = [row["latency_p50_s"]["value"] for row in load["expected"].values()]
    allowed = share * min((value for value in medians if value is not None), default=math.inf)
    p99 = quantile(sorted(one.late_s for one in sent), 0.99)
    return {"p99_s": p99, "allowed_s": allowed, "void": bool(p99 > allowed)}


# ---- Telling ----------------------------------------------------------------------------------------------------


def result_text(result: Data) -> str:
    """The table of expected and measured figures, then what was unserved, late or void."""
    rows: list[tuple[str, ...]] = [HEAD]
    for name, found in result["classes"].items():
        expected, measured = found["expected"], found["measured"]
        slo_s = expected.get("slo_s")
        promise = "none" if slo_s is None else f"{expected['slo_percentile']:g}% in {slo_s:g} s"
        rows.append((name, "expected", *(_number(expected[key]["value"]) for key in SHOWN), promise, ""))
        answers = (ANSWERS[found["promise_holds"]], AGREES[found["agrees"]])
        rows.append(("", f"{measured['requests']} measured", *(_number(measured[key]) for key in SHOWN), *answers))
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{count} unserved: {reason}" for reason, count in result["unserved"].items()]
    if result["held_back"]:
        lines.append(f"{result['held_back']} requests were held back: as many in flight as allowed (--most-in-flight)")
    late = result["lateness"]
    lines.append(f"own lateness: p99 {_number(late['p99_s'])} s, at most {_number(late['allowed_s'])} s allowed")
    verdict = {True: "every promise holds", False: "a promise is broken", None: "void: the sender was too late"}
    return "\n".join([*lines, verdict[result["holds"]]]) + "\n"


def _number(value: float | None) -> str:
    """Three significant digits, never an exponent for what is large."""
    return "-" if value is None or not math.isfinite(value) else f"{float(f'{value:.3g}'):,g}"


def result_of(
    load: Data, sent: Sequence[ReplayedRequest], held_back: int, share: float = LATENESS_SHARE
) -> dict[str, Any]:
    """Everything that a run has shown; `holds` is None where it is void."""
    classes, late = judge(load, sent), lateness(load, sent, share)
    broken = any(found["promise_holds"] is False for found in classes.values())
    unserved = Counter(one.reason for one in sent if one.reason)
    return {
        "holds": None if late["void"] else not broken,
        "classes": classes,
        "unserved": dict(sorted(unserved.items())),
        "held_back": held_back,
        "lateness": late,
    }


def write(folder: Path, result: Data, sent: Iterable[ReplayedRequest]) -> None:
    """`results.csv`, a request a line in seconds of the plan, and `result.json`."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in sent:
            times = [f"{value:.6f}" if math.isfinite(value) else "" for value in (one.late_s, one.latency_s)]
            writer.writerow((one.arrival_s, one.request_class, one.seed, int(one.counted), *times, one.reason))
    text = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"
    (folder / "result.json").write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- The command ------------------------------------------------------------------------------------------------


def read_load(path: Path) -> dict[str, Any]:
    """The load of a plan. Raises `BadInputError` if it cannot be read or is of another format."""
    try:
        load = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: cannot be read as a load test: {error}") from error
    missing = {"count_from_s", "bodies", "requests", "expected"} - set(load if isinstance(load, dict) else ())
    if missing or load.get("format") != FORMAT:
        raise BadInputError(f"{path}: is no load test of format {FORMAT}; plan the scenario again")
    strangers = {request["request_class"] for request in load["requests"]} - (
        set(load["bodies"]) & set(load["expected"])
    )
    if strangers:
        raise BadInputError(
            f"{path}: classes without a body or without what is expected: {', '.join(sorted(strangers))}"
        )
    return dict(load)


def chosen_requests(load: Data, count: int | None) -> list[Data]:
    """The requests to send: the lead-in, and of the counted ones the first `count`. Raises `BadInputError` for none."""
    requests: list[Data] = list(load["requests"])
    lead = sum(request["arrival_s"] < load["count_from_s"] for request in requests)
    found = requests if count is None else requests[: lead + count]
    if len(found) == lead:
        raise BadInputError("there is no request to count: the horizon of the scenario is too short")
    return found


def _read_target(options: argparse.Namespace) -> Target:
    url = urlsplit(options.url)
    try:
        port_is_fine = url.port is None or url.port > 0
    except ValueError:
        port_is_fine = False
    if url.scheme not in ("http", "https") or not url.hostname or not port_is_fine:
        raise BadInputError(f"--url {options.url}: must be like http://host:port/path")
    wrong = [pair for pair in options.header if "=" not in pair]
    if wrong:
        raise BadInputError(f"--header {wrong[0]}: must be KEY=VALUE")
    headers = dict(pair.split("=", 1) for pair in options.header)
    return Target(url, headers, options.timeout, options.time_scale, options.most_in_flight)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Replay the requests of a capacity plan and check its promises.")
    parser.add_argument("--url", required=True, help="where a POST is answered with the finished picture")
    scale = (
        "real seconds that a second of the plan lasts; for stand-ins that are as much faster. Everything is told in "
    )
    parser.add_argument("--time-scale", type=_positive, default=1.0, help=f"{scale}seconds of the plan")
    parser.add_argument("--requests", type=_count, default=None, help="count only the first so many")
    parser.add_argument("--timeout", type=_positive, default=600.0, help="real seconds after which one is unserved")
    parser.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    parser.add_argument("--most-in-flight", type=_count, default=512, help="requests open at once")
    share = f"own lateness allowed, as a share of the smallest expected median (default {LATENESS_SHARE})"
    parser.add_argument("--lateness", type=_positive, default=LATENESS_SHARE, help=share)
    here = Path(__file__).resolve().with_name("load_test.json")
    parser.add_argument("--load", type=Path, default=here, help="default: load_test.json beside this script")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test; 0 if every promise holds, 1 if one is broken or the run is void, 2 if the input is wrong."""
    options = _parser().parse_args(arguments)
    try:
        load, target = read_load(options.load), _read_target(options)
        sent, held_back = replay(load, chosen_requests(load, options.requests), target)
        result = result_of(load, sent, held_back, options.lateness)
        write(options.load.parent, result, sent)
    except (BadInputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(result_text(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
