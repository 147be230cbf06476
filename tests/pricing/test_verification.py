"""Predictions against published tables: what the figures mean, what is left out, and how good they have to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim.errors import InputError
from hybridsd_sim.estimate import Estimate
from hybridsd_sim.perf import is_multi_gpu_time, is_shared_memory_time
from hybridsd_sim.pricing.published_predictions import predict_cost_row, predict_figure, ratio
from hybridsd_sim.pricing.verification import (
    Case,
    Checked,
    CheckedTable,
    GroupKey,
    cases_of,
    check_tables,
    coverage,
    leaves_out,
    to_json,
    used_in_fits,
)
from hybridsd_sim.profiles import Published, PublishedRow, PublishedTable, load_published, timing_kind
from hybridsd_sim.reporting import verification_text

CONTRACT = {"name", "source", "rows", "calibration_rows", "mare", "worst", "mare_held_out", "coverage90"}


@pytest.fixture(scope="session")
def published():
    """The shipped tables."""
    return load_published()


@pytest.fixture(scope="session")
def report():
    """What `hybridsd-sim verify --format json` prints."""
    command = [sys.executable, "-W", "error", "-m", "hybridsd_sim", "verify", "--format", "json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def found(report):
    """A table of the report by name."""
    return {table["name"]: table for table in report["tables"]}.__getitem__


@pytest.fixture(scope="session")
def few(profiles):
    """Profiles with the rows of one publication alone, for which fits are quick."""
    return profiles.without(lambda row: "(DistriFusion)" not in row.source)


@pytest.fixture(scope="session")
def distrifusion(published):
    """The registered table of those rows."""
    return Published({"distrifusion": published.tables["distrifusion"]}, ())


def keep(profiles, *, without):
    """A fit that leaves nothing out."""
    return profiles


def several_gpus(profiles):
    """The times of several GPUs."""
    return [row for row in profiles.costs if timing_kind(row) == "multi_gpu"]


def figure(**columns):
    """A figure of the simplest kind: the UNet's FLOPs of one step."""
    said = {
        "table": "t", "quantity": "flops_without_attention_products", "value": 1e12, "model": "sd15",
        "sides_px": (512,), "kind": "quoted", "source": "Somebody", "source_date": "2026", "notes": "as printed",
    }  # fmt: skip
    return PublishedRow.model_validate(said | columns)


def table_of(**columns):
    """A table of figures."""
    said = {"name": "t", "title": "t", "group": "device", "kind": "quoted", "source": "Somebody", "source_date": "2026"}
    return PublishedTable.model_validate(said | columns)


def checked(published, predicted, *, width=0.1, counts=True):
    """A case that somebody published, with its prediction and an interval to either side."""
    row = figure(value=published, counts=counts)
    case = Case(
        table="t", label="one", source=row.source, published=published, low=published, high=published, counts=counts,
        notes=row.notes, key=GroupKey("device", "", ""), row=row,
    )  # fmt: skip
    prediction = Estimate(predicted, predicted * (1 - width), predicted * (1 + width))
    return Checked(case=case, predicted=prediction, held_out=prediction)


# ---- What the figures mean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "error", "inside"), [(1.0, 0.0, 1.0), (2.0, 0.5, 0.0), (0.5, 1.0, 0.0)])
def test_the_error_is_what_the_publication_makes_it(few, factor, error, inside):
    """Who publishes our predictions has no error and full coverage; twice of them is off by half."""
    rows = [
        row.model_copy(update={"seconds_median": factor * predict_cost_row(row, few).value, "source": "Somebody"})
        for row in several_gpus(few)
    ]
    tables = Published({"t": table_of(takes="multi_gpu")}, ())
    result = next(t for t in check_tables(few.with_costs(rows), tables, refit=keep) if t.table.name == "t")

    assert len(result.counted) == len(rows)
    assert result.mare == pytest.approx(error)
    assert abs(result.worst.error) == pytest.approx(error)
    assert result.mare_held_out == pytest.approx(error)
    assert result.coverage90 == inside


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=8))
def test_mean_and_worst_error(pairs):
    """The mean lies between nought and the worst, which is that of the case named."""
    table = CheckedTable(table=table_of(), cases=[checked(a, b) for a, b in pairs])
    errors = [abs(b / a - 1) for a, b in pairs]

    assert table.mare == pytest.approx(sum(errors) / len(errors))
    assert abs(table.worst.error) == max(errors)
    assert table.coverage90 == sum(0.9 * b <= a <= 1.1 * b for a, b in pairs) / len(pairs)


def test_an_outlier_is_listed_and_not_counted():
    """A figure that does not count changes no mean, and stands among the cases with its reason."""
    good, outlier = checked(1.0, 1.0), checked(1.0, 9.0, counts=False)
    table = CheckedTable(table=table_of(), cases=[good, outlier])
    data = to_json([table])["tables"][0]

    assert (table.mare, data["rows"], data["worst"]) == (0.0, 1, 0.0)
    assert [(case["counts"], case["notes"]) for case in data["cases"]] == [(True, "as printed"), (False, "as printed")]


def test_a_quantity_without_an_interval_has_no_coverage():
    """FLOPs are counted, not estimated: null, not 0 and not 1."""
    bare = replace(checked(1.0, 1.0), predicted=Estimate(1.0))

    assert coverage([bare]) is None
    assert CheckedTable(table=table_of(), cases=[bare]).coverage90 is None


def test_what_cannot_be_predicted_is_listed_with_the_reason(profiles):
    """An unknown quantity or model is a case without prediction; the rest of the table stands."""
    rows = (figure(), figure(quantity="colour"), figure(model="sd99"))
    result = check_tables(profiles.without(lambda _: True), Published({"t": table_of()}, rows))[0]

    assert [found.predicted is None for found in result.cases] == [False, True, True]
    assert [text in found.why for found, text in zip(result.cases[1:], ("colour", "sd99"), strict=True)] == [True, True]
    assert len(result.counted) == 1


@given(st.floats(0.1, 10), st.floats(0, 0.5), st.floats(0.1, 10), st.floats(0, 0.5))
def test_a_ratio_is_as_sure_as_its_parts(a, a_width, b, b_width):
    """The interval holds the ratio, is wider than each part's, and narrower than both ends put against each other."""
    above, below = (Estimate(v, v / (1 + w), v * (1 + w)) for v, w in ((a, a_width), (b, b_width)))
    found = ratio(above, below)

    assert found.value == pytest.approx(a / b)
    assert above.low / below.high <= found.low * (1 + 1e-9)
    assert found.low <= found.value * (1 + 1e-9)
    assert found.high / found.value >= max(1 + a_width, 1 + b_width) * (1 - 1e-9)
    assert found.high <= above.high / below.low * (1 + 1e-9)


def test_the_order_of_configurations(few, distrifusion):
    """Published order is right order; turned around, every pair apart is wrong; equal figures are not ranked."""
    result = check_tables(few, distrifusion, refit=keep)[0]
    turned = [replace(found, predicted=Estimate(1 / found.case.published), case=found.case) for found in result.cases]
    right = [replace(found, predicted=Estimate(found.case.published)) for found in result.cases]
    equal = [replace(found, case=replace(found.case, low=0.0, high=1e9)) for found in turned]
    tables = [replace(result, cases=cases) for cases in (right, turned, equal)]

    assert [table.ranking_right for table in tables] == [True, False, None]
    assert [len(table.wrong_order) for table in tables[::2]] == [0, 0]


# ---- What a prediction rests on -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gang(few):
    """A way to say that somebody measured a whole gang: its method's usual options, and what carried its ranks."""

    def row(component, ranks, seconds):
        columns = {
            "component": component, "options": f"ranks={ranks}", "kind": "measured", "source": "mine",
            "seconds_median": seconds, "seconds_p05": None, "seconds_p95": None,
        }  # fmt: skip
        return next(iter(several_gpus(few))).model_copy(update=columns)

    return row


@pytest.mark.parametrize("ranks", ["gloo", "nccl"])
@pytest.mark.parametrize("component", ["step", "step_warmup"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_measured_gang_is_predicted_without_its_own_seconds(few, gang, ranks, component, factor):
    """However long a gang's step was measured to take, its prediction is that of the law, to the last digit."""
    known, other = gang(component, ranks, 0.1), gang(component, ranks, 0.1 * factor)
    predictions = [
        predict_cost_row(known, few),
        predict_cost_row(known, few.with_costs([known])),
        predict_cost_row(other, few.with_costs([other])),
        predict_cost_row(known, few.with_costs([other, known])),
    ]

    assert len(set(predictions)) == 1
    assert predictions[0].low < predictions[0].value < predictions[0].high


def test_a_published_gang_is_not_answered_by_a_measured_one(few, gang):
    """Nor does a measured row of the same gang stand in for the law where somebody else's time is predicted."""
    published = gang("step", "nccl", 0.1).model_copy(update={"kind": "quoted"})

    assert predict_cost_row(published, few.with_costs([gang("step", "nccl", 9.0)])) == predict_cost_row(published, few)


def test_rows_that_shaped_a_constant_count_as_fitted(profiles):
    """For each constant that devices share, as many rows are marked as it says that it rests on."""
    used = used_in_fits(profiles)
    shapes = {
        "vae_decode_ratio": lambda row: row.component == "vae_decode",
        "text_encode_ratio": lambda row: row.component == "text_encode",
        "contention": is_shared_memory_time,
    }
    marked = {
        name: sum(row in used and shapes.get(name, is_multi_gpu_time)(row) for row in profiles.costs)
        for name in profiles.constants
    }

    assert marked == {name: constant.rows for name, constant in profiles.constants.items()}
    assert marked.keys() > shapes.keys()
    assert min(marked.values()) > 0


def test_figures_that_shaped_an_overhead_count_as_fitted(profiles, published):
    """Latencies end to end under a runtime with an overhead are where that overhead is from; outliers are not."""
    shaped = {
        row
        for row in published.rows
        if row.quantity == "latency_s" and row.counts and profiles.runtime(row.runtime).overhead_share is not None
    }

    assert {row for row in published.rows if row.fitted} == shaped
    assert Counter(row.runtime for row in shaped) == {"coreml": 13, "qnn": 2}


def test_a_constant_that_stays_when_held_out_is_said_aloud(profiles):
    """Figures from which a constant was derived are counted as fitted, and the text says that it stays."""
    tables = Published({"t": table_of(notes="the overhead stays")}, (figure(fitted=True), figure()))
    data = to_json(check_tables(profiles, tables, refit=keep))
    found = next(table for table in data["tables"] if table["name"] == "t")

    assert (found["calibration_rows"], found["kept_when_held_out"]) == (1, 1)
    assert [case["fitted"] for case in found["cases"]] == [True, False]
    assert "that 1 of its figures shaped: the overhead stays." in verification_text(data, 240)


# ---- What is left out -----------------------------------------------------------------------------------------------


def test_held_out_predictions_come_from_fits_without_the_group(few, distrifusion):
    """For each group one fit is asked for, and it is to lose exactly the publication's rows of that group."""
    asked = []

    def remember(profiles, *, without):
        asked.append({row.width_px for row in profiles.costs if without(row)})
        assert all(without(row) == (row.width_px in asked[-1]) for row in profiles.costs)
        return keep(profiles, without=without)

    check_tables(few, distrifusion, refit=remember)

    assert {1024} in asked
    assert {2048} in asked


def test_what_a_group_publishes_does_not_change_its_held_out_predictions(few, distrifusion):
    """All times of one resolution three times as long: its held-out predictions stay to the last digit."""
    slower = [
        row.model_copy(update={"seconds_median": row.seconds_median * (3 if row.width_px == 2048 else 1)})
        for row in few.costs
    ]
    results = [check_tables(known, distrifusion)[0] for known in (few, few.without(lambda _: True).with_costs(slower))]
    held = [
        {found.case.label: found.held_out.value for found in result.cases if "2048" in found.case.key.name}
        for result in results
    ]

    assert held[0] == pytest.approx(held[1], rel=1e-9)
    assert len(held[0]) == 5
    assert results[0].mare_held_out != pytest.approx(results[1].mare_held_out, rel=0.1)


def test_a_device_is_left_out_whoever_timed_it(profiles, published):
    """The group of a device holds the rows of all sources; that of a model those of its publication and network."""
    cases = [case for _, found in cases_of(profiles, published).values() for case in found]
    groups = {case.key for case in cases}
    device = next(key for key in groups if key.kind == "device" and key.name == "a100-sxm-80gb")
    model = next(key for key in groups if key.kind == "model" and "sd14" in key.name)
    rows = {key: [row for row in profiles.costs if leaves_out(key, profiles)(row)] for key in (device, model)}

    assert len({row.source for row in rows[device]}) > 5
    assert {row.device for row in rows[device]} == {"a100-sxm-80gb"}
    assert {(row.model, row.source.split(" table")[0]) for row in rows[model]} == {("sd15", model.source)}


# ---- What is in the tables ------------------------------------------------------------------------------------------


def test_every_time_that_a_law_predicts_stands_in_one_table(profiles, published):
    """Steps, encoders, decoders and exchanges, quoted and measured: each row once; a rank's own clock nowhere."""
    cases = [case for _, found in cases_of(profiles, published).values() for case in found]
    timed = Counter(id(row) for row in profiles.costs if timing_kind(row) is not None)

    assert Counter(id(case.row) for case in cases if not isinstance(case.row, PublishedRow)) == timed
    assert {row.kind for row in profiles.costs if id(row) in timed} == {"measured", "quoted", "modelled"}


def test_every_registered_table_has_rows(profiles, published):
    """No table lost its rows to a changed source."""
    assert set(published.tables) <= set(cases_of(profiles, published))


def test_a_users_own_measurement_forms_a_table(few):
    """Rows that no registered table takes stand under their device."""
    own = few.costs[0].model_copy(update={"kind": "measured", "source": "mine", "device": "rtx-4090"})
    tables = cases_of(few.with_costs([own]), Published({}, ()))

    assert [case.row for case in tables["measured rtx-4090"][1]] == [own]


def test_every_case_is_predicted_or_says_why_not(report, profiles, published):
    """Nothing disappears: each case of each table has a prediction or a reason, never both, held out or not."""
    expected = {name: [case.label for case in cases] for name, (_, cases) in cases_of(profiles, published).items()}
    assert {table["name"]: [case["label"] for case in table["cases"]] for table in report["tables"]} == expected

    for case in (case for table in report["tables"] for case in table["cases"]):
        for value, error, why in (("predicted", "error", "why"), ("held_out", "held_out_error", "why_held_out")):
            assert (case[value] is None) == bool(case[why]), case
            known = None if case[value] is None else pytest.approx(case[value] / case["published"] - 1)
            assert case[error] == known, case


def test_counts_are_those_of_the_cases(report):
    """Rows, held-out rows and fitted rows of a table are the cases that count and were predicted so, or were fitted."""
    for table in report["tables"]:
        counted = [case for case in table["cases"] if case["counts"] and case["predicted"] is not None]
        assert table["rows"] == len(counted)
        assert table["held_out_rows"] == sum(case["held_out"] is not None for case in counted)
        assert table["calibration_rows"] == sum(case["fitted"] for case in table["cases"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("t,flops", "u,flops"), "no such name"),
        (("1e12", "-1"), "value"),
        (("value,", "volume,"), "column 'volume'"),
        (("1e12,", "1e12,,"), "cells"),
        (("true", "false"), "says why in notes"),
    ],
)
def test_a_broken_file_is_refused_with_file_and_line(tmp_path, change, message):
    """Unknown tables and columns, impossible values, outliers without a reason: place, value, rule."""
    (tmp_path / "tables.csv").write_text(
        "name,title,group,kind,source,source_date,notes\nt,t,device,quoted,Somebody,2026,\n"
    )
    good = (
        "table,quantity,value,counts,model,sides_px,kind,source,source_date,notes\n"
        "t,flops,1e12,true,sd15,512,quoted,Somebody,2026,\n"
    )
    (tmp_path / "more.csv").write_text(good)
    assert len(load_published(tmp_path).rows) == 1

    (tmp_path / "more.csv").write_text(good.replace(*change))
    with pytest.raises(InputError, match=message) as error:
        load_published(tmp_path)
    assert "more.csv:" in str(error.value)


# ---- What is printed ------------------------------------------------------------------------------------------------


def test_json_has_the_keys_of_the_contract(report):
    """Every table has them; shares lie in 0..1, and errors are not negative."""
    for table in report["tables"]:
        assert table.keys() >= CONTRACT
        assert all(table[key] is None or table[key] >= 0 for key in ("mare", "worst", "mare_held_out"))
        assert table["coverage90"] is None or 0 <= table["coverage90"] <= 1
        assert 0 <= table["calibration_rows"] <= len(table["cases"])


@pytest.mark.parametrize("width", [80, 120, 240])
def test_the_text_names_every_table_and_keeps_the_width(report, width):
    """A line a table; nothing is wider than the terminal."""
    text = verification_text(report, width)

    assert all(table["name"].split(",")[0].split()[0] in text for table in report["tables"])
    assert max(map(len, text.splitlines())) <= width


def test_the_text_says_over_how_many_rows_the_held_out_error_is():
    """A row that cannot be predicted without its group is not in the figures held out: their own count says so."""
    lost = replace(checked(1.0, 1.2), held_out=None, why_held_out="no row left.")
    data = to_json([CheckedTable(table=table_of(), cases=[checked(1.0, 1.1), lost])])
    text = verification_text(data, 240)
    header, _, line, *_ = text.splitlines()
    cells = {name: line[header.index(name) :].split()[0] for name in ("rows ", "rows held out", "error held out")}

    assert cells == {"rows ": "2", "rows held out": "1", "error held out": "10.0%"}
    assert "not predicted when held out: one. no row left." in text


def test_an_unknown_format_is_refused():
    """Exit code 2, and nothing on standard output."""
    command = [sys.executable, "-m", "hybridsd_sim", "verify", "--format", "yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stdout) == (2, "")


# ---- How good the predictions are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distrifusion", "asyncdiff"])
def test_published_runs_on_several_gpus_are_predicted(found, name):
    """DistriFusion on 2 to 8 A100 (D2, D3) and AsyncDiff's fifteen latencies on A5000 (A1)."""
    table = found(name)

    assert table["rows"] == {"distrifusion": 10, "asyncdiff": 15}[name]
    assert table["mare"] <= 0.08
    assert table["mare_held_out"] <= 0.10
    assert table["worst"] <= 0.20
    assert table["ranking_right"]


def test_traffic_is_counted(found):
    """0.42 G elements at 1024 px and 1.58 G at 2048 px within 3 %; the printed 1.48 G stands apart."""
    table = found("distrifusion-traffic")

    assert table["worst"] <= 0.03
    assert [case["published"] for case in table["cases"] if not case["counts"]] == [1.48e9]


def test_flops_are_counted(found):
    """Hybrid SD's tables H1 to H3 within a per cent, which is their rounding."""
    assert found("hybrid-sd-flops")["worst"] <= 0.011


def test_pcpp_is_faster_than_distrifusion_and_sends_less(found):
    """The ends of both ranges come in the published order; about 70 % of the traffic is saved."""
    cases = {case["label"]: case["predicted"] for case in found("pcpp")["cases"]}
    most = {label: value for label, value in cases.items() if label.startswith("speedup_most")}
    ours, theirs = (next(v for label, v in most.items() if method in label) for method in ("pcpp", "distrifusion"))

    assert ours > theirs
    assert found("pcpp-traffic")["worst"] <= 0.10


def test_intervals_cover_about_what_they_say(report):
    """Nine in ten published values lie inside 90 % intervals, with their group left out of the fits too."""
    assert 0.85 <= report["coverage90"] <= 1.0
    assert 0.85 <= report["coverage90_held_out"] <= 0.98


def test_a_figure_knows_its_plan(profiles):
    """Half the steps by the small model: FLOPs lie midway; an unknown quantity is refused by name."""
    both, large, small = (
        predict_figure(figure(num_inference_steps=10, **row), profiles).value
        for row in ({"small_model": "bk-sdm-tiny", "switch_step": 5}, {}, {"model": "bk-sdm-tiny"})
    )

    assert both == pytest.approx((large + small) / 2)
    with pytest.raises(InputError, match="quantity"):
        predict_figure(figure(quantity="flopss"), profiles)
