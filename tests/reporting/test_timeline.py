"""The timeline: slices nest, a gang shows on each of its GPUs, and the file stays small."""

from __future__ import annotations

import json
from math import nan

from hypothesis import given
from hypothesis import strategies as st

from hand_made import hand_made_plan, hand_made_scenario
from hybridsd_sim.reporting import exports as timeline
from hybridsd_sim.reporting.exports import first_rows, write_rows


def slices(events):
    """The complete slices of each track, in order of time."""
    tracks = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    return tracks


def assert_nested(track):
    """Slices of one track begin in order and either follow or contain one another."""
    open_until = []
    for event in track:
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
        open_until.append(event["ts"] + event["dur"])


def test_the_timeline_is_a_small_honest_trace(tmp_path):
    """Slices nest on every track, a gang shows on each of its GPUs, and a request takes less than a kilobyte."""
    result = hand_made_plan(hand_made_scenario(tmp_path)).chosen_result
    write_rows(tmp_path / "requests.parquet", {"chosen": result})
    rows = first_rows(tmp_path / "requests.parquet", timeline.MOST_REQUESTS)
    assert len(rows) == len(result.replications[0])
    trace = timeline.trace(rows, {"a100": 4, "l40s": 1}, 600.0)
    assert len(json.dumps(trace)) < 1000 * len(rows)
    for track in slices(trace["traceEvents"]).values():
        assert_nested(track)
    assert gpus_of(trace["traceEvents"], "studio") == {2}
    assert gpus_of(trace["traceEvents"], "phone") == {2}  # one GPU, then the phone
    named = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert named == {"pool a100", "edge fleet laptops", "edge fleet phones"}
    assert all(event["ts"] >= 0 for event in trace["traceEvents"] if event["ph"] != "M")


def gpus_of(events, name):
    """On how many tracks the finished requests of a class show."""
    shown = {}
    for event in events:
        if event["ph"] == "X" and event["name"].startswith(name):
            shown.setdefault(event["name"], set()).add((event["pid"], event["tid"]))
    last = max(shown, key=lambda text: int(text.split()[-1]))
    return {len(places) for text, places in shown.items() if text != last}


def test_a_hand_over_is_an_arrow():
    """A request that goes on at the edge has an arrow from its GPU's slice to its device's slice."""
    row = row_of(7, 1.0, 2.0, 3.0, 1, 0.0)
    row |= {
        "fleet": "phones",
        "device": 4,
        "edge_ready_s": 3.1,
        "edge_start_s": 3.1,
        "edge_stop_s": 4.0,
        "finish_s": 4.0,
    }
    events = timeline.trace([row], {"pool": 1}, 60.0)["traceEvents"]
    start, end = (next(event for event in events if event["ph"] == phase) for phase in "sf")
    assert start["id"] == end["id"] == 7
    assert (start["ts"], end["ts"]) == (2_999_999, 3_100_000)
    assert [event["ts"] for event in events if event["ph"] in "be"] == [1_000_000, 2_000_000]


@given(
    st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(0.0, 9.0), st.integers(1, 4), st.floats(0.0, 3.0)), max_size=40)
)
def test_slices_nest_whatever_the_gangs(jobs):
    """Gangs of any size, first come first served on one node of four GPUs, give tracks that nest, with their loads."""
    free, rows = [0.0] * 4, []
    for number, (arrival, hold, degree, load) in enumerate(sorted(jobs)):
        free.sort()
        start = max([arrival, *free[:degree]])
        free[:degree] = [start + hold] * degree
        started = start if start < 60.0 else nan
        rows.append(row_of(number, arrival, started, start + hold, degree, min(load, hold)))
    events = timeline.trace(rows, {"pool": 4}, 60.0)["traceEvents"]
    for track in slices(events).values():
        assert_nested(track)
    assert all(event["ts"] + event["dur"] <= 60_000_000 for track in slices(events).values() for event in track)


def row_of(number, ready, start, stop, degree, load):
    """A cloud-only request as the timeline reads it."""
    nothing = dict.fromkeys(("edge_ready_s", "edge_start_s", "edge_stop_s"), nan)
    times = {"arrival_s": ready, "cloud_ready_s": ready, "cloud_start_s": start, "cloud_stop_s": stop, "finish_s": stop}
    where = {"pool": "pool", "node": 0, "fleet": None, "device": -1, "degree": degree, "model_load_s": load}
    return {"request": number, "request_class": "any", "plan": "a plan", **times, **nothing, **where}


def test_a_timeline_stops_at_its_limit():
    """Only the first requests are shown, however many there were."""
    rows = [row_of(n, float(n), float(n), n + 0.5, 1, 0.0) for n in range(timeline.MOST_REQUESTS + 50)]
    track = slices(timeline.trace(rows, {"pool": 1}, 1e6)["traceEvents"])
    assert sum(map(len, track.values())) == timeline.MOST_REQUESTS
