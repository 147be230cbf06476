"""How sure a report is: every number has a kind, every time an interval, every law its rows; sums and shares agree."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from math import exp, expm1, isclose
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made import A100, PHONE, handed_over, in_the_cloud, part
from hybridsd_sim import price
from hybridsd_sim.errors import InputError
from hybridsd_sim.estimate import KIND_ORDER, Estimate
from hybridsd_sim.perf import fit_of
from hybridsd_sim.plan import Deployment
from hybridsd_sim.pricing import pool_site, request_of
from hybridsd_sim.reporting import labels as numbers
from hybridsd_sim.reporting import write_report
from hybridsd_sim.reporting.breakdown import OWN, Rate, breakdowns, power_of, price_of, shares
from hybridsd_sim.reporting.calibration import constants_of, fits_of
from hybridsd_sim.reporting.data import contents
from hybridsd_sim.reporting.exports import tables

KINDS = tuple(KIND_ORDER)


@pytest.fixture(scope="module")
def real(quickstart, profiles):
    """The shipped quickstart, planned on a short horizon, as a report's data."""
    from hybridsd_sim import optimize

    short = quickstart.with_overrides({"horizon_s": 120, "warmup_s": 30, "replications": 1})
    return contents(optimize(short, profiles), profiles)


@pytest.fixture(scope="module")
def made(plan, profiles):
    """The plan made by hand as a report's data."""
    return contents(plan, profiles)


@pytest.fixture(scope="module", params=["by hand", "real"])
def data(request):
    """A report's data: of the plan made by hand, and of a real one."""
    return request.getfixturevalue("made" if request.param == "by hand" else "real")


@pytest.fixture(scope="module")
def page(report):
    """The page of the plan made by hand."""
    return (report / "index.html").read_text(encoding="utf-8")


def lines(content):
    """A CSV file's lines as mappings."""
    return list(csv.DictReader(io.StringIO(content.decode())))


def rows_below(page, caption):
    """The cells of the body rows of the tables whose caption holds these words, as text with tags."""
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        if caption in unescape(re.search(r"<caption>(.*?)</caption>", table)[1]):
            for row in re.findall(r"<tr.*?</tr>", table.partition("<tbody>")[2], re.DOTALL):
                yield re.findall(r"<(?:td|th)[^>]*>(.*?)</(?:td|th)>", row, re.DOTALL)


def figures(data):
    """Every part and total of every plan."""
    return [figure for plan in data["plans"] for figure in (*plan["parts"], *plan["totals"])]


def test_every_number_behind_a_plan_has_a_kind_and_a_ground(data):
    """Parts, totals, prices and powers are measured, quoted or modelled; what is not modelled names its source."""
    known = [figure for figure in (*figures(data), *data["rates"]) if figure["value"] is not None]
    assert known
    assert all(figure["kind"] in KINDS for figure in known)
    assert all(figure["sources"] for figure in data["rates"] if figure["value"] is not None)
    assert all(figure["sources"] or figure["note"] for figure in figures(data) if figure["value"] is None)


def test_every_time_has_an_interval_that_contains_it(data):
    """Low ends lie at or under the middle and high ends at or above it: parts, totals, rates, parameters, constants."""
    parameters = [one for fit in data["calibration"] for one in fit["parameters"]]
    everything = [*figures(data), *data["rates"], *parameters, *data["constants"]]
    assert all(part["low"] is not None for plan in data["plans"] for part in plan["parts"])
    for figure in everything:
        if figure["value"] is not None and figure["low"] is not None:
            assert figure["low"] <= figure["value"] * (1 + 1e-12)
        if figure["value"] is not None and figure["high"] is not None:
            assert figure["value"] <= figure["high"] * (1 + 1e-12)


def test_shares_of_the_latency_sum_to_one(data):
    """What is measured, quoted and modelled makes up the whole idle latency of every plan."""
    for plan in data["plans"]:
        assert set(plan["shares"]) == set(KINDS)
        assert sum(plan["shares"].values()) == pytest.approx(1.0)
        assert all(share >= 0 for share in plan["shares"].values())


def test_the_latency_and_its_interval_are_the_sums_of_the_parts(data):
    """A plan's latency and both its ends add up from the parts that count, and its kind is the weakest of theirs."""
    for plan in data["plans"]:
        total = next(total for total in plan["totals"] if total["figure"] == "latency_s")
        critical = [part for part in plan["parts"] if part["critical"]]
        for end in ("value", "low", "high"):
            assert total[end] == pytest.approx(sum(part[end] for part in critical))
        kinds = [part["kind"] for part in critical if part["value"] > 0]
        assert total["kind"] == max(kinds, key=KIND_ORDER.__getitem__)


def test_every_plan_that_is_compared_is_broken_down(plan, made):
    """The chosen plan of every class and every plan of the baselines stand there once, with the runs that follow it."""
    wanted = {("chosen", name, option.plan.label) for name, option in plan.chosen.items()}
    for run, result in plan.baseline_results.items():
        wanted |= {(run, *key) for key in result.used}
    found = [(run, plan["request_class"], plan["label"]) for plan in made["plans"] for run in plan["runs"]]
    assert set(found) == wanted
    assert len(found) == len(set(found))
    keys = [(plan["request_class"], plan["label"]) for plan in made["plans"]]
    assert len(keys) == len(set(keys))


def test_an_alternative_by_formula_is_broken_down_too(scenario, plan, profiles):
    """The plans of an alternative that nobody simulated are priced, with the parts that `price` gives them."""
    later = handed_over(15).plan
    other = replace(plan.alternatives[0], deployment=Deployment.pure({"a100": 1}, {"phone": later}))
    found = contents(replace(plan, alternatives=(other,)), profiles)["plans"]
    mine = next(each for each in found if each["runs"] == [other.name])
    expected = price(later, request_of("phone", scenario.requests["phone"]), profiles)
    assert [part["value"] for part in mine["parts"]] == [part.seconds.value for part in expected.parts]
    assert [part["kind"] for part in mine["parts"]] == [part.seconds.kind for part in expected.parts]


PARTS = st.lists(
    st.builds(
        lambda middle, down, up, kind, critical: part(
            "denoise", A100, middle, kind, low=middle * down, high=middle * up, critical=critical
        ),
        st.floats(1e-6, 1e3), st.floats(0.0, 1.0), st.floats(1.0, 10.0), st.sampled_from(KINDS), st.booleans(),
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


@given(PARTS, st.floats(0.1, 1.0), st.floats(1.0, 4.0), st.sampled_from(KINDS))
def test_any_parts_add_up(parts, low, high, price_kind):
    """Whatever the parts: shares sum to 1 unless nothing counts, totals lie in their intervals, kinds never improve."""
    cost = replace(in_the_cloud().cost, parts=tuple(parts))
    rate = Rate("a100", "GPU-hour", "US$", Estimate(1.5, 1.5 * low, 1.5 * high, price_kind, ("a list",)))
    plan = breakdowns([("chosen", "studio", cost)], {"a100": rate})[0]
    counted = sum(part.critical for part in parts)
    assert sum(plan["shares"].values()) == pytest.approx(1.0 if counted else 0.0)
    latency, money = plan["totals"][:2]
    assert latency["low"] <= latency["value"] * (1 + 1e-9)
    assert latency["value"] <= latency["high"] * (1 + 1e-9)
    assert money["value"] == pytest.approx(cost.usd / cost.request.num_images)
    least = low * sum(part.usd * part.seconds.low / part.seconds.value for part in parts) / cost.request.num_images
    most = high * sum(part.usd * part.seconds.high / part.seconds.value for part in parts) / cost.request.num_images
    assert (money["low"], money["high"]) == (pytest.approx(least), pytest.approx(most))
    kinds = {part.seconds.kind for part in parts} | {price_kind}
    assert money["kind"] == max(kinds, key=KIND_ORDER.__getitem__)


def test_nothing_that_takes_time_has_no_shares():
    """A plan whose parts take no time is of no kind, rather than a division by zero."""
    assert sum(shares([part("denoise", A100, 0.0)]).values()) == 0.0


def test_what_nobody_knows_has_a_reason_and_no_interval(made):
    """A total without a value has its reason, no interval, and the parts behind it are still there."""
    laptop = next(plan for plan in made["plans"] if plan["request_class"] == "laptop")
    energy = next(total for total in laptop["totals"] if total["figure"] == "edge_energy_j_per_image")
    assert (energy["value"], energy["low"], energy["high"]) == (None, None, None)
    assert energy["note"] == "no power figure for snapdragon-x-elite"


def test_a_price_of_the_scenario_is_its_own(profiles):
    """A pool's own price and a fleet's own power are quoted from the scenario; all else is from the catalogue's row."""
    own = price_of(replace(A100, usd_per_device_hour=2.5), profiles).figure
    assert (own.value, own.kind, own.sources) == (2.5, "quoted", (OWN,))
    assert power_of(replace(PHONE, power_w=6.0), profiles).figure.value == 6.0
    listed = price_of(A100, profiles).figure
    row = profiles.gpu_price("a100-sxm-80gb")
    assert (listed.value, listed.kind, listed.sources) == (row.usd, row.kind, (row.source,))
    device = profiles.edge_device("snapdragon-8-gen-3")
    power = power_of(PHONE, profiles).figure
    assert (power.value, power.low, power.high) == (device.power_w, device.power_low_w, device.power_high_w)
    assert (power.kind, power.sources) == (device.power_kind, (device.power_source,))


def test_a_price_that_nobody_lists_is_unknown(profiles):
    """Without a price or a power there is a reason in place of the value."""
    no_price = price_of(replace(A100, provider="nobody"), profiles).figure
    assert not no_price.known
    assert "a100-sxm-80gb" in no_price.note
    unknown = next(name for name, device in profiles.edge_devices.items() if device.power_w is None)
    assert power_of(replace(PHONE, device=unknown), profiles).figure.note == f"no power figure for {unknown}"


def test_the_calibration_is_the_fits_own(plan, made, profiles):
    """Every device, runtime and precision of plans and pools has its fit: the same parameters, rows and residuals."""
    sites = [site for option in plan.chosen.values() for site in option.plan.sites.values()]
    sites += [pool_site(name, pool) for name, pool in plan.scenario.pools.items()]
    found = {(fit["device"], fit["runtime"], fit["precision"]): fit for fit in made["calibration"]}
    assert set(found) == {(site.device, site.runtime, site.precision) for site in sites}
    for key, shown in found.items():
        fit = fit_of(profiles, *key)
        assert shown["note"] == fit.note
        assert shown["row_reach"] == pytest.approx(expm1(1.645 * fit.sigma))
        assert [row["published_s"] for row in shown["rows"]] == [row.seconds_median for row in fit.rows]
        assert [row["log_ratio"] for row in shown["rows"]] == list(fit.residuals)
        assert [row["source"] for row in shown["rows"]] == [row.source for row in fit.rows]
        assert [one["name"] for one in shown["parameters"]] == list(fit.parameters)
        for one in shown["parameters"]:
            ends, known = (one["value"], one["low"], one["high"]), fit.parameters[one["name"]]
            assert ends == (known.value, *known.interval) or (ends == (None, None, None) and one["note"])


def test_predicted_over_published_is_the_residual(data):
    """A row's predicted seconds follow from its published ones and the logarithm of their ratio."""
    rows = [row for fit in data["calibration"] for row in fit["rows"]]
    assert rows
    assert all(isclose(row["predicted_s"], row["published_s"] * exp(row["log_ratio"])) for row in rows)


def test_a_device_that_nobody_timed_says_what_it_rests_on(profiles):
    """Without rows of its own a device has no residuals, wide parameters where a datasheet helps, and a note."""
    timed = {row.device for row in profiles.costs}
    names = [name for name, device in profiles.gpus.items() if name not in timed and device.fp16_flop_per_s]
    site = replace(A100, device=names[0])
    (fit,) = fits_of([site, site], profiles)
    assert fit["rows"] == []
    assert fit["parameters"]
    assert "never timed" in fit["note"]


def test_precisions_of_one_speed_have_one_fit(profiles):
    """bf16 runs as fast as fp16: both stand there once."""
    (fit,) = fits_of([A100, replace(A100, precision="bf16")], profiles)
    assert fit["precision"] == "fp16"


def test_a_device_of_unknown_speed_is_told_apart(profiles):
    """A device without rows and without a datasheet peak has no law at all, and says so."""
    untimed = profiles.without(lambda row: row.device == PHONE.device)
    assert profiles.edge_device(PHONE.device).fp16_flop_per_s is None
    (fit,) = fits_of([PHONE], untimed)
    assert (fit["parameters"], fit["rows"], fit["row_reach"]) == ([], [], None)
    assert fit["note"]


def test_the_shared_constants_are_those_of_the_profiles(profiles):
    """Every fitted constant stands there with the rows it was fitted to, at its value."""
    found = {one["name"]: one for one in constants_of(profiles)}
    assert set(profiles.constants) <= set(found)
    for name, row in profiles.constants.items():
        assert (found[name]["value"], found[name]["rows"]) == (row.value, row.rows)
        assert found[name]["meaning"]


def test_the_tables_hold_what_the_page_holds(data):
    """parts.csv has every part, total and rate, the calibration files every parameter and row, to the last digit."""
    written = {name: lines(content) for name, content in tables(data).items()}
    assert [line["value"] for line in written["parts.csv"]] == [
        "" if figure["value"] is None else str(figure["value"]) for figure in (*figures(data), *data["rates"])
    ]
    assert all(line["kind"] in KINDS for line in written["parts.csv"])
    fitted = [one for fit in data["calibration"] for one in fit["parameters"] or [{"name": "", "value": None}]]
    expected = [(one["name"], one["value"]) for one in (*fitted, *data["constants"])]
    read = [(line["parameter"], float(line["value"] or "nan")) for line in written["calibration.csv"]]
    assert [name for name, _ in read] == [name for name, _ in expected]
    assert all(value == wanted for (_, value), (_, wanted) in zip(read, expected, strict=True) if wanted is not None)
    rows = [(fit["device"], row["log_ratio"]) for fit in data["calibration"] for row in fit["rows"]]
    assert [(line["device"], float(line["log_ratio"])) for line in written["calibration_rows.csv"]] == rows


def test_the_same_data_give_the_same_tables(plan, made, profiles):
    """Gathered again from profiles read again, every table has the same bytes."""
    from hybridsd_sim import load_profiles

    again = contents(plan, load_profiles())
    assert tables(again) == tables(made)
    assert json.dumps(again) == json.dumps(made)


def test_every_figure_of_a_run_has_a_kind(data):
    """Summaries say of every figure what it is: simulated ones are modelled, scores and rents as their rows are."""
    for run in data["runs"]:
        for row in run["summary"].values():
            assert all(figure["kind"] in KINDS for figure in row.values())
            assert row["latency_p95_s"]["kind"] == "modelled"
    kinds = {rate["kind"] for rate in data["rates"] if data["runs"][0]["replicas"].get(rate["where"])}
    assert {data["runs"][0]["summary"]["all"]["rent_usd_per_hour"]["kind"]} == kinds


def test_every_number_of_the_plan_table_wears_its_mark(page):
    """In the table of classes and in the comparison each figure has its kind's shape, or a dash its reason."""
    labels = ("Idle latency", "p95 latency", "Inside SLO", "Quality", "Metered cost", "Edge energy", "Rent")
    found = []
    for caption in ("Each request class", "The chosen plan against others", "Nearly as cheap", "order of the search"):
        table = next(each for each in re.findall(r"<table.*?</table>", page, re.DOTALL) if caption in each)
        found += re.findall(r'<td[^>]* data-label="([^"]+)">(.*?)</td>', table, re.DOTALL)
    figures = [cell for label, cell in found if label.startswith(labels) and cell != "none promised"]
    assert len(figures) == 3 * 6 - 1 + 3 * 5 + 4 + 2 * 4
    assert all(re.match(r'[^<]+ <span class="mark (measured|quoted|modelled)"|—<small', cell) for cell in figures)


def test_every_part_of_every_plan_stands_on_the_page(page, made):
    """Each plan's table has its parts and totals in order, each with value, interval and a kind in words."""
    rows = list(rows_below(page, "Parts of one request on an idle fleet"))
    expected = figures(made)
    assert len(rows) == len(expected)
    for (_, _, value, interval, kind, grounds), figure in zip(rows, expected, strict=True):
        if figure["value"] is None:
            assert value.startswith("—")
            continue
        assert f'<span class="chip {figure["kind"]}">' in kind
        assert interval
        assert "[" in grounds or "rule" in grounds
        if figure["low"] is not None and figure["value"]:
            assert numbers.reach(figure) in interval


def test_the_page_counts_the_numbers_by_kind(page, made):
    """The sentence that counts kinds agrees with the parts, scores and rates behind the chosen plans."""
    mine = [plan for plan in made["plans"] if "chosen" in plan["runs"]]
    counted = [part for plan in mine for part in plan["parts"] if part["value"]]
    counted += [total for plan in mine for total in plan["totals"] if total["figure"].startswith("quality")]
    counted = [figure for figure in (*counted, *made["rates"]) if figure["value"] is not None]
    kinds = Counter(figure["kind"] for figure in counted)
    said = re.search(r"Of the (\d+) times.*? (\d+) are measured .*?(\d+) are quoted .*?(\d+) are modelled", page)
    assert [int(number) for number in said.groups()] == [len(counted), *(kinds[kind] for kind in KINDS)]


def test_the_page_shows_every_law_with_its_parameters_and_rows(page, made):
    """Each device of the plans stands in the calibration with its rows counted; residual tables have every row."""
    overview = list(rows_below(page, "What the laws of the plans and of all pools rest on"))
    assert [(fit["device"], str(len(fit["rows"]))) for fit in made["calibration"]] == [
        (row[0].partition("<")[0], row[1]) for row in overview
    ]
    residuals = list(rows_below(page, "What was published or measured"))
    assert len(residuals) == sum(len(fit["rows"]) for fit in made["calibration"])
    assert len(list(rows_below(page, "Parameters of the laws"))) == sum(
        bool(f["parameters"]) for f in made["calibration"]
    )


def test_the_figure_of_laws_has_a_point_for_every_row(page, made):
    """The scatter has a panel for each fitted device with as many points as rows."""
    svg = re.search(r'<h3 id="figure-calibration">.*?(<svg.*?</svg>)', page, re.DOTALL)[1]
    fitted = [fit for fit in made["calibration"] if fit["rows"]]
    root = ET.fromstring(svg)  # noqa: S314 - the report's own figure
    groups = [each for each in root.iter() if each.get("id", "").startswith("calibration-PathCollection")]
    assert len(groups) == sum(len(fit["rows"]) for fit in fitted)
    assert all(fit["device"] in svg for fit in fitted)


def test_simulations_are_broken_down_too(scenario, plan, profiles, tmp_path):
    """A report of simulations has the plans of every policy, their parts, and the laws behind them."""
    runs = [plan.chosen_result, plan.baseline_results["edge only"]]
    text = write_report(runs, tmp_path / "run", profiles=profiles).read_text(encoding="utf-8")
    plans = {key for run in runs for key in run.used}
    assert len(list(rows_below(text, "How much of each plan's idle latency"))) == len(plans)
    found = contents(runs, profiles)["plans"]
    assert {(plan["request_class"], plan["label"]) for plan in found} == plans
    assert len(list(rows_below(text, "Parts of one request"))) == sum(len(p["parts"] + p["totals"]) for p in found)
    assert list(rows_below(text, "What the laws of the plans"))


def test_other_profiles_are_refused(plan, profiles, tmp_path):
    """A result is only reported with the profiles it was made with, given or read again."""
    others = profiles.with_costs([profiles.costs[0]])
    with pytest.raises(InputError, match="the result was made with others"):
        write_report(plan, tmp_path / "run", profiles=others)
    with pytest.raises(InputError, match="the result was made with others"):
        write_report(replace(plan, profiles_digest="0" * 64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@given(st.floats(1e-6, 1e6), st.floats(0.0, 1.0), st.floats(0.0, 9.0))
def test_the_reach_of_an_interval_is_in_per_cent_of_its_middle(middle, down, up):
    """Written as per cent, both ends are within half a unit of the last digit shown."""
    text = numbers.reach({"value": middle, "low": middle * (1 - down), "high": middle * (1 + up)})
    found = [float(number) for number in re.findall(r"[\d.]+", text)]
    assert found[0] == pytest.approx(100 * down, abs=0.51 if down >= 0.0995 else 0.051)
    assert found[-1] == pytest.approx(100 * up, abs=0.51 if up >= 0.0995 else 0.051)


def test_a_reach_that_cannot_be_said_is_left_out():
    """Nothing is written for 0, or where an end is not known."""
    assert numbers.reach({"value": 0.0, "low": 0.0, "high": 1.0}) == ""
    assert numbers.reach({"value": 1.0, "low": None, "high": 1.0}) == ""
    assert numbers.reach({"value": None, "low": None, "high": None}) == ""
