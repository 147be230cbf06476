"""The laws of a run, and the recorder that fills its table."""

from __future__ import annotations

import json
from math import inf, isnan, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.errors import RunError
from hybridsd_sim.files import atomic_path, canonical_json, write_atomically
from hybridsd_sim.simulation import (
    COLUMNS,
    IN_FLIGHT,
    SERVED,
    UNSERVED,
    PlanFacts,
    Records,
    RunRecorder,
    check_laws,
    column,
)
from hybridsd_sim.simulation import records as records_module
from hybridsd_sim.simulation.records import INDEX, RAW_COLUMNS, WIDTH, GroupHistory, to_frame

HORIZON_S = 100.0
GPUS, PHONES = 4, 2
HYBRID = PlanFacts(
    "hybrid", degree=2, pool_index=0, fleet_index=0, usd=0.01, usd_per_gpu_s=0.001, edge_energy_j=5.0,
    bytes_down=40_000, quality=0.29, batch_gpu_s=(6.0, 4.0, 3.0),
)  # fmt: skip
CLOUD = HYBRID._replace(label="cloud", degree=1, fleet_index=-1, edge_energy_j=0.0, quality=0.3)
EDGE = HYBRID._replace(label="edge", degree=0, pool_index=-1, usd=0.0, usd_per_gpu_s=0.0, quality=nan)
PLANS = (HYBRID, CLOUD, EDGE)
NOTHING = dict.fromkeys(RAW_COLUMNS, nan) | {"reason": -1, "deadline_s": inf, "model_load_s": 0.0, "transfer_s": 0.0}
SIXTY_FOURTHS = st.integers(0, 90 * 64).map(lambda ticks: ticks / 64)
"""Seconds whose sums are exact, so that two spans touch or do not."""
NOWHERE = {"class_index": 0, "node": -1, "device": -1}


def raw(request, **values):
    """The raw columns of one request; what is not said does not apply."""
    row = NOTHING | NOWHERE | {"request": request} | values
    return tuple(float(row[name]) for name in RAW_COLUMNS)


def hybrid(request, arrival_s, device=0, **values):
    """A served request: 1 s of waiting and 3 s on two GPUs, 1 s of waiting and 4 s on a phone, 1 s on the network."""
    plain = {
        "plan_index": 0, "status": SERVED, "arrival_s": arrival_s, "cloud_ready_s": arrival_s + 0.5,
        "cloud_start_s": arrival_s + 1.5, "cloud_stop_s": arrival_s + 4.5, "edge_ready_s": arrival_s + 5.0,
        "edge_start_s": arrival_s + 6.0, "edge_stop_s": arrival_s + 10.0, "finish_s": arrival_s + 10.0,
        "transfer_s": 1.0, "node": 0, "device": device,
    }  # fmt: skip
    return raw(request, **(plain | values))


def refused(request, arrival_s):
    """A request that no plan serves."""
    return raw(request, plan_index=-1, status=UNSERVED, reason=0, arrival_s=arrival_s)


def recorded(rows, sink=None, horizon_s=HORIZON_S):
    """Records of one pool and one fleet from raw rows, or pairs of one and its marks, in the order of writing."""
    recorder = RunRecorder(Records(("photo",), ("a100",), ("phones",), (), ("no_candidate",)), horizon_s, sink)
    for facts in PLANS:
        recorder.add_plan(facts)
    for row in rows:
        if isinstance(row[-1], GroupHistory):
            recorder.write_with_history(*row)
        else:
            recorder.write(row)
        recorder.flush_if_full()
    return recorder.close()


def good_run():
    """A hybrid request, one on another phone, one at the edge alone, one refused, and one in flight at the horizon."""
    edge_only = raw(
        2, plan_index=2, status=SERVED, arrival_s=30.0, edge_ready_s=30.0, edge_start_s=30.0, edge_stop_s=35.0,
        finish_s=35.0, device=0,
    )  # fmt: skip
    late = hybrid(4, 95.0, status=IN_FLIGHT)
    return recorded([hybrid(0, 10.0), hybrid(1, 10.0, device=1), edge_only, refused(3, 40.0), late])


def broken_laws(records, gpus=GPUS, phones=PHONES):
    """What the laws say of a run; empty if it obeys them."""
    try:
        check_laws(records, {"a100": gpus}, {"phones": phones})
    except RunError as error:
        return str(error)
    return ""


def tampered(row, /, **values):
    """The good run with some columns of one request overwritten."""
    records = good_run()
    for name, value in values.items():
        records.table[row, INDEX[name]] = value
    return records


def batch(size, *, first=0, arrival_s=10.0, lost_gpu_s=0.0):
    """Hybrid requests that share one gang, each on a phone of its own, with their marks."""
    marks = GroupHistory(size, int(lost_gpu_s > 0), lost_gpu_s)
    return [(hybrid(first + place, arrival_s, device=place), marks) for place in range(size)]


class Pile:
    """A sink that keeps what it gets."""

    def __init__(self):
        self.blocks = []

    def write(self, rows):
        """Keep a copy of a block."""
        self.blocks.append(rows.copy())


def test_a_run_that_obeys_the_laws_passes():
    """A run with every kind of ending breaks no law, and neither does a run without requests."""
    assert not broken_laws(good_run())
    assert not broken_laws(recorded([]))


@pytest.mark.parametrize(
    ("request_number", "values", "law"),
    [
        (1, {"request": 0}, "once each"),
        (1, {"request": nan}, "once each"),
        (1, {"status": nan}, "neither served, unserved nor in flight"),
        (1, {"status": 3}, "neither served, unserved nor in flight"),
        (3, {"reason": -1}, "no reason"),
        (0, {"cloud_ready_s": 9.0}, "cloud_ready_s before its inputs"),
        (0, {"cloud_start_s": 10.2}, "cloud_start_s before its inputs"),
        (0, {"cloud_stop_s": 11.0}, "cloud_stop_s before its inputs"),
        (0, {"edge_ready_s": 14.0}, "edge_ready_s before its inputs"),
        (0, {"edge_start_s": 14.9}, "edge_start_s before its inputs"),
        (0, {"edge_stop_s": 15.5}, "edge_stop_s before its inputs"),
        (0, {"finish_s": 19.0}, "finish_s before its inputs"),
        (2, {"edge_ready_s": 29.0}, "edge_ready_s before its inputs"),
        (0, {"transfer_s": 1.1}, "do not sum to the latency"),
        (0, {"finish_s": 21.0}, "do not sum to the latency"),
        (0, {"finish_s": nan}, "do not sum to the latency"),
        (0, {"cloud_stop_s": nan}, "do not sum to the latency"),
        (0, {"gpu_seconds": 3.0}, "GPU-seconds charged"),
        (0, {"gpu_seconds": nan}, "GPU-seconds charged"),
        (0, {"degree": 3, "gpu_seconds": 9.0}, "pool a100 ran 5 devices of 4"),
        (1, {"device": 0}, "a device of phones runs two requests at once"),
        (0, {"batch_size": 2, "gpu_seconds": 3.0}, "1 batches have other members than they say"),
    ],
)
def test_each_law_names_what_breaks_it(request_number, values, law):
    """One wrong number in a good run fires the law that it breaks."""
    assert law in broken_laws(tampered(request_number, **values))


def test_rounding_breaks_no_law():
    """Sums of seconds may be off by what rounding does to them."""
    assert not broken_laws(tampered(0, finish_s=20.0 + 1e-8, gpu_seconds=6.0 - 1e-8))


def test_every_broken_law_is_named_at_once():
    """A run that breaks two laws says so in one error."""
    said = broken_laws(tampered(0, transfer_s=9.0, gpu_seconds=0.0))

    assert "latency" in said
    assert "GPU-seconds" in said


@pytest.mark.parametrize(("gpus", "phones", "law"), [(3, 2, "pool a100 ran 4"), (4, 1, "edge fleet phones ran 2")])
def test_devices_serve_no_more_than_they_can(gpus, phones, law):
    """Two gangs of two need four GPUs and two phones at once; fewer fire the law of capacity."""
    assert law in broken_laws(good_run(), gpus, phones)


def test_a_device_handed_over_at_one_instant_serves_one():
    """A gang that starts at the instant in which another stops needs no second set of GPUs and no second phone."""
    later = {"cloud_start_s": 14.5, "cloud_stop_s": 17.5, "edge_ready_s": 19.0, "edge_start_s": 20.0}
    second = hybrid(1, 14.0, **later, edge_stop_s=24.0, finish_s=24.0, transfer_s=2.0)

    assert not broken_laws(recorded([hybrid(0, 10.0), second]), gpus=2, phones=1)


def test_a_device_still_busy_at_the_horizon_serves_nobody_else():
    """A request that starts on a phone whose earlier request has not stopped by the horizon breaks the law."""
    busy = hybrid(0, 91.0, status=IN_FLIGHT)
    taken = hybrid(1, 92.0, edge_start_s=99.0, edge_stop_s=99.5, finish_s=99.5, transfer_s=1.0)

    assert "two requests at once" in broken_laws(recorded([busy, taken]), phones=9)


def test_a_gang_in_flight_still_holds_its_gpus():
    """GPUs of a gang that has not stopped by the horizon are not free."""
    held = hybrid(0, 96.0, status=IN_FLIGHT)
    also = hybrid(1, 96.5, device=1, status=IN_FLIGHT)

    assert "pool a100 ran 4 devices of 3" in broken_laws(recorded([held, also]), gpus=3)


@given(
    arrivals=st.lists(SIXTY_FOURTHS, min_size=1, max_size=40),
    holds=st.lists(SIXTY_FOURTHS.map(lambda seconds: seconds / 2 + 1), min_size=40, max_size=40),
    gpus=st.integers(1, 4),
)
def test_a_queue_in_order_of_arrival_obeys_the_laws(arrivals, holds, gpus):
    """Any first-come-first-served queue before any number of GPUs passes, and needs exactly the GPUs that it used."""
    free, rows, spans = [0.0] * gpus, [], []
    for request, (arrival_s, hold_s) in enumerate(zip(sorted(arrivals), holds, strict=False)):
        gpu = int(np.argmin(free))
        start_s = max(arrival_s, free[gpu])
        stop_s = free[gpu] = start_s + hold_s
        spans.append((start_s, stop_s))
        status = SERVED if stop_s <= HORIZON_S else IN_FLIGHT
        rows.append(raw(request, plan_index=1, status=status, arrival_s=arrival_s, cloud_ready_s=arrival_s,
                        cloud_start_s=start_s, cloud_stop_s=stop_s, finish_s=stop_s, node=gpu))  # fmt: skip
    records = recorded(rows)
    begun = [span for span in spans if span[0] <= HORIZON_S]
    peak = max(sum(begin <= at < end for begin, end in begun) for at, _ in begun)

    assert not broken_laws(records, gpus=peak)
    assert "devices of" in broken_laws(records, gpus=peak - 1)


@given(order=st.permutations(range(12)), flush_rows=st.integers(1, 20))
def test_the_order_of_booking_does_not_matter(order, flush_rows):
    """Records stand in order of arrival however requests end; a sink gets every row once, in the order of ending."""
    rows = [hybrid(request, 5.0 * request) if request % 3 else refused(request, 5.0 * request) for request in range(12)]
    pile = Pile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "FLUSH_ROWS", flush_rows)
        records = recorded([rows[request] for request in order], pile)

    np.testing.assert_array_equal(records.rows(), recorded(rows).rows())
    np.testing.assert_array_equal(np.concatenate(pile.blocks), records.rows()[list(order)])
    assert all(0 < len(block) <= flush_rows for block in pile.blocks)


def test_a_run_booked_at_once_is_the_same_as_row_by_row():
    """Whole columns, or one value for all, give the table that the rows give."""
    rows = [hybrid(request, 5.0 * request) if request % 3 else refused(request, 5.0 * request) for request in range(12)]
    columns = dict(zip(records_module.RAW_COLUMNS, np.array(rows).T, strict=True)) | {"model_load_s": 0.0}
    recorder = RunRecorder(Records(("photo",), ("a100",), ("phones",), (), ("no_candidate",)), HORIZON_S)
    for facts in PLANS:
        recorder.add_plan(facts)
    recorder.write_all(len(rows), columns)

    np.testing.assert_array_equal(recorder.close().rows(), recorded(rows).rows())


def test_many_rows_are_spread_block_by_block():
    """More rows than a block holds all arrive, and each sink block is a full one but the last."""
    pile = Pile()
    count = 2 * records_module.FLUSH_ROWS + 7
    records = recorded((refused(request, request / count) for request in range(count)), pile)

    assert [len(block) for block in pile.blocks] == [records_module.FLUSH_ROWS, records_module.FLUSH_ROWS, 7]
    assert len(records) == count
    assert not broken_laws(records)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (0, 1, 1, 2), (1, 2), (0, 2), (0, 0), (0, 1, 2, 1, 4)])
def test_a_request_booked_twice_or_never_is_refused(numbers):
    """Numbers with a double or a gap never pass for a complete run."""
    assert "once each" in broken_laws(recorded(refused(number, 1.0) for number in numbers))


def test_a_row_says_what_its_plan_says():
    """Degree, pool, fleet, joules, bytes and quality come from the plan; GPU-seconds and dollars from the time held."""
    row = dict(zip((name for name, _ in COLUMNS), recorded([hybrid(0, 10.0, model_load_s=1.5)]).rows()[0], strict=True))

    assert (row["degree"], row["pool_index"], row["fleet_index"]) == (2, 0, 0)
    assert (row["edge_energy_j"], row["bytes_down"], row["quality"]) == (5.0, 40_000, 0.29)
    assert row["gpu_seconds"] == 2 * 3.0
    assert row["usd"] == pytest.approx(0.01 + 2 * 1.5 * 0.001)


@given(size=st.integers(1, 3), gangs=st.integers(1, 5))
def test_a_batch_holds_its_gang_once(size, gangs):
    """The requests of a batch need the GPUs of one gang together, and bear its GPU-seconds in equal parts."""
    rows = [row for place in range(gangs) for row in batch(size, first=size * place, arrival_s=10.0 + 12.0 * place)]
    records = recorded(rows)

    assert not broken_laws(records, gpus=2, phones=size)
    assert "devices of" in broken_laws(records, gpus=1, phones=size)
    assert column(records.rows(), "gpu_seconds").sum() == pytest.approx(6.0 * gangs)
    assert (column(records.rows(), "batch_size") == size).all()


def test_a_batch_that_misses_a_member_breaks_the_law():
    """Three requests cannot be a batch of two, nor two one of three."""
    first, second, third = batch(3)
    pair = [(row, GroupHistory(2)) for row, _ in (first, second, third)]

    assert "other members" in broken_laws(recorded(pair), phones=9)
    assert "other members" in broken_laws(recorded([first, second]), phones=9)


@given(size=st.integers(1, 3))
def test_a_request_in_a_batch_is_charged_its_part_of_the_gang(size):
    """The GPU part of the dollars is the batch's divided by its size; the rest of the plan's price stays."""
    rows = recorded(batch(size)).rows()
    others_usd = 0.01 - 6.0 * 0.001

    assert column(rows, "usd") == pytest.approx(others_usd + HYBRID.batch_gpu_s[size - 1] * 0.001)


def test_a_batch_of_one_is_charged_to_the_bit_as_before():
    """GroupHistory that say nothing change nothing."""
    marked, plain = recorded([(hybrid(0, 10.0), GroupHistory())]), recorded([hybrid(0, 10.0)])

    assert marked.rows().tobytes() == plain.rows().tobytes()


def test_marks_stay_with_their_request_across_blocks():
    """A block that is written out takes its own marks along and leaves none for the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "FLUSH_ROWS", 2)
        rows = [
            (hybrid(n, 10.0 * n), GroupHistory(1, n, 2.5 * n)) if n % 3 == 0 else hybrid(n, 10.0 * n) for n in range(8)
        ]
        records = recorded(rows)

    assert column(records.rows(), "restarts").tolist() == [0, 0, 0, 3, 0, 0, 6, 0]
    assert column(records.rows(), "lost_gpu_s").tolist() == [0, 0, 0, 7.5, 0, 0, 15.0, 0]
    assert not broken_laws(records)


def test_a_plan_that_comes_late_is_known(monkeypatch):
    """A plan first used after a block was written out has its own facts all the same."""
    monkeypatch.setattr(records_module, "FLUSH_ROWS", 1)
    recorder = RunRecorder(Records(("photo",), ("a100",), ("phones",), (), ()), HORIZON_S)
    recorder.add_plan(CLOUD)
    recorder.write(hybrid(0, 1.0))
    recorder.flush_if_full()
    recorder.add_plan(HYBRID)
    recorder.write(hybrid(1, 1.0, plan_index=1))
    records = recorder.close()

    assert records.plans == ("cloud", "hybrid")
    assert column(records.rows(), "degree").tolist() == [1, 2]


def test_a_refused_request_costs_nothing_and_has_no_quality():
    """Without a plan there are no GPUs, dollars, joules or bytes, and no quality to speak of."""
    rows = recorded([refused(0, 1.0)]).rows()

    for name in ("degree", "gpu_seconds", "usd", "edge_energy_j", "bytes_down"):
        assert column(rows, name)[0] == 0
    for name in ("plan_index", "pool_index", "fleet_index"):
        assert column(rows, name)[0] == -1
    assert isnan(column(rows, "quality")[0])


@given(arrival_s=st.floats(80.0, 99.5))
def test_the_future_of_a_request_in_flight_is_not_told(arrival_s):
    """Times after the horizon are cut from rows in flight and from no others; GPUs count up to the horizon."""
    records = recorded([hybrid(0, arrival_s, status=IN_FLIGHT)])
    uncut = recorded([hybrid(0, arrival_s)], horizon_s=1e6)
    row, whole = records.rows()[0], uncut.rows()[0]
    start_s, stop_s = arrival_s + 1.5, arrival_s + 4.5

    for name in records_module.TIME_COLUMNS:
        was = whole[INDEX[name]]
        assert row[INDEX[name]] == was if was <= HORIZON_S else isnan(row[INDEX[name]])
    held_s = max(0.0, min(stop_s, HORIZON_S) - start_s)
    assert column(records.rows(), "gpu_seconds")[0] == pytest.approx(2 * held_s)
    assert not broken_laws(records)


def test_a_model_that_was_not_loaded_costs_nothing():
    """A request that still waits for its GPUs at the horizon has loaded no model, whatever its load would take."""
    waits = raw(0, plan_index=1, status=IN_FLIGHT, arrival_s=90.0, cloud_ready_s=91.0, model_load_s=22.7)
    rows = recorded([waits]).rows()

    assert column(rows, "model_load_s")[0] == 0.0
    assert column(rows, "gpu_seconds")[0] == 0.0
    assert column(rows, "usd")[0] == CLOUD.usd


def test_the_table_has_names_for_numbers():
    """A frame has names where records have indexes, nothing where they have -1, and whole numbers for counts."""
    frame = to_frame(good_run(), "cost_aware")

    assert frame["policy"].unique().tolist() == ["cost_aware"]
    assert frame["plan"].tolist()[:3] == ["hybrid", "hybrid", "edge"]
    assert frame["status"].tolist() == ["served", "served", "served", "unserved", "in flight"]
    assert frame["reason"].isna().tolist() == [True, True, True, False, True]
    assert frame.loc[3, "reason"] == "no_candidate"
    assert frame["pool"].isna().tolist() == [False, False, True, True, False]
    assert frame["device"].tolist() == [0, 1, 0, -1, 0]
    assert frame["degree"].dtype == np.int64
    assert len(frame.columns) == WIDTH + 2


def test_the_same_data_gives_the_same_bytes():
    """Canonical JSON does not depend on the order of keys, reads back as it was, and refuses NaN."""
    one, other = {"b": 1, "a": [0.1, None]}, {"a": [0.1, None], "b": 1}

    assert canonical_json(one) == canonical_json(other)
    assert json.loads(canonical_json(one)) == one
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": nan})


def fail_halfway(path):
    """A file of which only the first half is written when something goes wrong."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise ZeroDivisionError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Writing makes the folder, replaces what was there, and leaves nothing temporary behind, failed or not."""
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    (tmp_path / "new" / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "new" / "folder", b"cannot replace a folder")
    with pytest.raises(ZeroDivisionError):
        fail_halfway(path)

    assert path.read_bytes() == b"new"
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["file.txt", "folder"]
