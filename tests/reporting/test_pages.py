"""The report: verdict first, every number with its unit, the same bytes from the same result, nothing half written."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from hand_made import RENT, at_the_edge, handed_over, in_the_cloud, run
from hybridsd_sim.errors import InputError
from hybridsd_sim.estimate import number
from hybridsd_sim.plan import Deployment, deployment_from_dict
from hybridsd_sim.reporting import blocks as markup
from hybridsd_sim.reporting import compare_reports, draw_report, run_id, write_report
from hybridsd_sim.reporting.rendering import to_html
from hybridsd_sim.scenario import load_yaml
from hybridsd_sim.simulation import COLUMNS


def everything(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path):
    """A CSV file's lines as mappings."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def data_of(folder):
    """What a saved run says, as data."""
    return json.loads((folder / "capacity.json").read_text())


class Page(HTMLParser):
    """A page read strictly: tags closed in order, with every id, address and piece of text noted."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.text, self.cells = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src", "xlink:href", "srcset", "action") if key in found]
        self.cells += [[]] if tag in {"td", "th"} else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1].append(data)


def read(folder):
    """The folder's page, read strictly."""
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_run_id_names_what_shapes_the_result(scenario):
    """A run's name is the scenario's with a hash that moves with scenario, profiles, seed, version and what was run."""
    first = run_id(scenario, "p", 3, "1.0", "plan")
    assert first == run_id(scenario, "p", 3, "1.0", "plan")
    assert re.fullmatch(r"by-hand-[0-9a-f]{12}", first)
    changed = [
        run_id(scenario.with_overrides({"seed": 4}), "p", 3, "1.0", "plan"), run_id(scenario, "q", 3, "1.0", "plan"),
        run_id(scenario, "p", 4, "1.0", "plan"), run_id(scenario, "p", 3, "1.1", "plan"),
        run_id(scenario, "p", 3, "1.0", "cost_aware"),
    ]  # fmt: skip
    assert len({first, *changed}) == 6


def test_the_folder_holds_what_is_promised(report):
    """Data, pages, figures and timeline stand in the run's folder, and nothing else does."""
    names = ("frontier", "latency", "components", "load", "switch", "known", "calibration")
    figures = {f"figures/{name}.svg" for name in names}
    tables = {"summary.csv", "pools.csv", "parts.csv", "calibration.csv", "calibration_rows.csv"}
    saved = {
        "provenance.json",
        "plan.yaml",
        "requests.parquet",
        "capacity.json",
        *tables,
        "load_test.json",
        "load_test.py",
    }
    assert set(everything(report)) == saved | figures | {"index.html", "report.md", "timeline.json.gz"}


def test_the_same_result_gives_the_same_bytes(plan, report, tmp_path):
    """Writing a result twice gives byte-identical folders, whatever they are called."""
    again = write_report(plan, tmp_path / "of another name").parent
    assert everything(again) == everything(report)


def test_a_saved_run_drawn_later_elsewhere_gives_the_same_bytes(plan, report, tmp_path):
    """Saving alone, and drawing in a fresh interpreter with another hash seed, gives what both at once give."""
    page = write_report(plan, tmp_path / "run", draw=False)
    assert not page.exists()
    code = "import sys, pathlib, hybridsd_sim.reporting as r; r.draw_report(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(page.parent)], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert everything(page.parent) == everything(report)


def test_the_users_matplotlib_settings_do_not_show(report, tmp_path):
    """Figures look the same under whatever settings the caller's own plots use, and leave those settings alone."""
    import matplotlib as mpl

    copy = tmp_path / "copy"
    shutil.copytree(report, copy)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        draw_report(copy)
        assert mpl.rcParams["font.size"] == 30
    assert everything(copy) == everything(report)


def test_the_verdict_comes_before_any_number(report):
    """Between title and verdict no digit stands, and the verdict's four questions have yes or no and a reason."""
    text = (report / "index.html").read_text()
    start = text.index("<h1")
    before = re.sub(r"<[^>]*>", "", text[start : text.index('<ul class="verdict">')]).replace("by-hand", "")
    assert not re.search(r"\d", before)
    cards = re.findall(r'<li class="(yes|no)">.*?<strong>(.*?): (yes|no)</strong><span>(.+?)</span>', text)
    assert [name for _, name, _, _ in cards] == ["Feasible", "Stable", "Converged", "In domain"]
    assert all(look == answer for look, _, answer, _ in cards)
    assert text.index('<ul class="verdict">') < text.index("<table")


def test_the_page_is_well_formed_and_stands_alone(report):
    """Tags close in order, ids are unique, links inside lead somewhere, and nothing is loaded from elsewhere or run."""
    page = read(report)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert all(link.startswith(("#", "https://")) for link in page.links)
    loading = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source"}
    assert not loading & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    style = re.search(r"<style>(.*?)</style>", (report / "index.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_figures_are_well_formed_and_described(report):
    """Every figure is XML with a title and without dates; inside the page it has a description with numbers."""
    for path in sorted((report / "figures").iterdir()):
        root = ET.fromstring(path.read_text())  # noqa: S314 - the report's own file
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert "<dc:date>" not in path.read_text()
    pictures = [attributes for tag, attributes in read(report).tags if tag == "svg"]
    assert len(pictures) == 7
    assert all(re.search(r"\d", attributes["aria-label"]) for attributes in pictures)


@pytest.mark.parametrize(
    ("name", "units", "note"),
    [
        ("frontier", ["(US$ an hour)", "(s)", "CLIP score"], "95% intervals"),
        ("latency", ["(s)", "share of requests"], "95% intervals"),
        ("components", ["US$ per 1,000 images", "GPU-seconds an image"], "95% intervals"),
        ("load", ["(share)", "requests waiting", "(min)"], "replications"),
        ("switch", ["(s)", "US$ per", "switch step"], "90% intervals"),
        ("known", ["share of the plan's idle latency", " s"], "90% intervals"),
        ("calibration", ["published step (s)", "predicted (s)"], "90% of quoted rows"),
    ],
)
def test_every_figure_has_units_intervals_and_kinds(report, name, units, note):
    """Axes carry units, the note says what the bands are, and measured, quoted or modelled is written on the figure."""
    text = " ".join(ET.fromstring((report / "figures" / f"{name}.svg").read_text()).itertext())  # noqa: S314
    assert all(unit in text for unit in units)
    assert note in text
    assert re.search("measured|quoted|modelled", text)


def test_every_kind_is_labelled(report):
    """Measured, quoted and modelled parts wear their labels, in words, on the page and in Markdown."""
    page, markdown = (report / "index.html").read_text(), (report / "report.md").read_text()
    for kind in ("measured", "quoted", "modelled"):
        assert f'<span class="chip {kind}">{markup.MARKS[kind]} {kind}</span>' in page
        assert f"| {markup.MARKS[kind]} {kind} |" in markdown
    phone = next(plan for plan in data_of(report)["plans"] if plan["request_class"] == "phone")
    kinds = {(part["component"], part["kind"]) for part in phone["parts"]}
    assert {("denoise", "measured"), ("denoise", "quoted"), ("text_encode", "modelled")} <= kinds


def test_every_source_is_listed(report, plan):
    """Every source behind the chosen plans is listed, and a part without one says that it is a rule of this model."""
    page = "".join(read(report).text)
    assert all(source in page for option in plan.chosen.values() for source in option.cost.sources)
    assert "this model's own rule" in page
    assert "outside what was timed" in page


def test_every_number_of_the_tables_has_a_unit(report):
    """Each line of summary.csv and pools.csv has a unit, and what is empty has its reason."""
    for name, owner in (("summary.csv", "request_class"), ("pools.csv", "pool")):
        found = lines(report / name)
        assert {"policy", owner, "figure", "value", "low", "high", "unit", "kind", "note"} == set(found[0])
        assert all(line["unit"] for line in found)
        assert all(
            float(line["value"]) >= 0.0 if line["value"] else line["note"] for line in found if name == "summary.csv"
        )
    assert len(lines(report / "summary.csv")) == 3 * 4 * 21


def test_every_figure_of_the_summary_stands_on_the_page(report):
    """Each value of summary.csv is shown on the page, at its three digits, beside its unit."""
    rows = re.findall(r"<tr.*?</tr>", (report / "index.html").read_text(), re.DOTALL)
    text = " ".join(read(report).text)
    for line in lines(report / "summary.csv"):
        assert line["unit"] in text
        value = line["value"]
        if value and line["figure"] == "latency_p95_s":
            assert any(f">{number(float(value))} <" in row and ">s<" in row for row in rows)


def test_the_summary_is_the_simulations_own(report, plan):
    """summary.csv repeats the simulation's figures to the last digit."""
    frame = plan.chosen_result.summary
    for line in lines(report / "summary.csv"):
        if line["policy"] == "chosen" and line["value"]:
            assert float(line["value"]) == frame.loc["planned", line["request_class"]][line["figure"]]


def test_what_nobody_knows_is_a_dash_with_its_reason(report):
    """An unknown power or quality is null in the data and an em dash with its reason on the pages, never 0."""
    figures = data_of(report)["runs"][0]["summary"]
    assert figures["laptop"]["edge_energy_j_per_image"]["value"] is None
    assert figures["laptop"]["edge_energy_j_per_image"]["note"] == "no power figure for snapdragon-x-elite"
    assert figures["studio"]["quality_mean"]["note"] == "no published CLIP score for sdxl"
    cells = ["".join(cell) for cell in read(report).cells]
    assert "—no power figure for snapdragon-x-elite" in cells
    assert "—no published CLIP score for sdxl" in cells
    assert "—" not in cells
    assert "—<br>no power figure for snapdragon-x-elite" in (report / "report.md").read_text()
    assert not any(word in "".join(cells) for word in ("nan", "None", "inf"))


def test_the_markdown_says_what_the_page_says(report):
    """report.md has the page's headings and table captions, and links figures that exist."""
    markdown, page = (report / "report.md").read_text(), (report / "index.html").read_text()
    headings = re.findall(r"<h[123] id=[^>]*>(.*?)</h", page)
    assert [f"# {text}" for text in headings if f"# {text}" not in markdown] == []
    captions = re.findall(r"<caption>(.*?)</caption>", page)
    assert all(f"*{unescape(caption)}*" in markdown for caption in captions)
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert len(linked) == 7
    assert all((report / path).is_file() for path in linked)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert all(a == b for (a, b), line in zip(pairwise(bars), table[1:], strict=True) if "---" in line)


def test_the_comparison_states_saving_and_loss(report):
    """Every policy has its rent, whether it is feasible or why not, and what the chosen plan saves at which loss."""
    text = " ".join(read(report).text)
    assert "50.0%" in text
    assert "61.0% inside 8 s" in text
    assert "it rents nothing" in text
    assert "loss of quality not known" in text
    assert "Not compared: static switch" in text


def test_refusals_and_explanation_are_told(report, plan):
    """Refused plans stand with class, reason and count; the explanation is given word for word."""
    text = " ".join(read(report).text)
    assert "a gang stays inside one node | a100 has 4 GPUs a node" in text
    assert all(sentence in text for sentence in plan.explanation)


def test_components_sum_to_what_was_booked(report, plan):
    """Dollars and GPU-seconds by component add up to what each class was metered, and with the idle to the rent."""
    run = data_of(report)["runs"][0]
    for key, figure in (("usd", "metered_usd_per_image"), ("gpu_seconds", "gpu_seconds_per_image")):
        for name in ("phone", "laptop", "studio"):
            total = sum(item[key] for item in run["components"] if item["request_class"] == name)
            assert total == pytest.approx(run["summary"][name][figure]["value"], rel=1e-9, abs=1e-12)
    images = run["summary"]["all"]["served"]["value"]
    everyone = {item["component"]: item for item in run["components"] if item["request_class"] == "all"}
    gpu_seconds = sum(item["gpu_seconds"] for item in everyone.values()) * images
    assert gpu_seconds == pytest.approx(4 * 540.0 * 2, rel=1e-9)
    usd = sum(item["usd"] for name, item in everyone.items() if name != "transfer") * images
    assert usd == pytest.approx(RENT * 540.0 * 2 / 3600, rel=1e-9)


def test_a_latency_curve_ends_at_what_was_served(report):
    """Curves rise from 0 towards the share that is served at all, inside their band, and meet the SLO attainment."""
    data = data_of(report)
    for each in data["runs"]:
        for name, curve in each["latency"].items():
            share, low, high = (np.array(curve[key]) for key in ("share", "low", "high"))
            assert (np.diff(share) >= 0).all()
            assert (low <= share + 1e-12).all()
            assert (share <= high + 1e-12).all()
            slo_s = data["scenario"]["classes"][name]["slo_s"]
            inside = [s for s, x in zip(share, curve["latency_s"], strict=True) if slo_s is None or x <= slo_s]
            attained = each["summary"][name]["slo_attainment"]["value"]
            assert inside[-1] <= attained + 1e-12
            assert inside[-1] >= attained - 0.02


def test_requests_are_all_there(report, plan):
    """requests.parquet has every request of every run, with names for indexes and the meaning of each column."""
    import pyarrow.parquet as pq

    table = pq.read_table(report / "requests.parquet")
    results = {"chosen": plan.chosen_result, **plan.baseline_results}
    assert table.num_rows == sum(len(records) for result in results.values() for records in result.replications)
    assert all(field.metadata[b"meaning"] for field in table.schema if field.name not in {"policy", "replication"})
    assert len(table.schema) == len(COLUMNS) + 2
    own = table.slice(0, 400).to_pydict()
    rows = plan.chosen_result.replications[0].rows()
    assert own["arrival_s"] == rows[:, 5].tolist()
    assert set(own["request_class"]) == {"phone", "laptop", "studio"}
    assert {p for p, c in zip(own["pool"], own["request_class"], strict=True) if c == "laptop"} == {None}


def test_two_plans_of_one_name_are_told_apart_by_their_class(scenario, plan, tmp_path, undrawn):
    """Two classes whose plans read alike are written, and each class's money is divided by its own plan."""
    option = handed_over(10)
    twin = replace(option, request_class="laptop", fleet_index=0)
    result = run(scenario, {"phone": option, "laptop": twin}, 1)
    both = replace(plan, mixes={"phone": ((1.0, option),), "laptop": ((1.0, twin),)}, chosen_result=result)
    folder = write_report(both, tmp_path / "run").parent
    found = {(item["request_class"], item["component"]) for item in data_of(folder)["runs"][0]["components"]}
    assert {("phone", "denoising"), ("laptop", "denoising")} <= found
    assert not any(name == "not broken down" for _, name in found)


def test_provenance_says_what_made_the_run(report, scenario, profiles):
    """Version, libraries, seed, digests and the resolved scenario are kept; no folder, host or date is."""
    text = (report / "provenance.json").read_text()
    found = json.loads(text)
    assert found["run_id"] == run_id(scenario, profiles.digest, 3, found["version"], "plan")
    assert {"numpy", "pandas", "scipy", "simpy"} <= set(found["libraries"])
    assert found["scenario"]["requests"]["phone"]["slo_s"] == 8.0
    assert (found["seed"], found["scenario_digest"], found["profiles_digest"]) == (3, scenario.digest, profiles.digest)
    assert not re.search(r"\d{4}-\d\d-\d\d", text)


def test_provenance_forgets_folders(plan, scenario, tmp_path, undrawn):
    """The path of a trace is cut down to the file's name, also where overrides quote it."""
    trace = tmp_path / "somebody" / "may.csv"
    trace.parent.mkdir()
    trace.write_text("arrival_s\n0\n70\n")
    arrivals = {"process": "trace", "rate_per_s": None, "path": str(trace)}
    moved = scenario.with_overrides({"requests.phone.arrivals": arrivals})
    changed = replace(plan, scenario=moved)
    text = (write_report(changed, tmp_path / "run", draw=False).parent / "provenance.json").read_text()
    assert "may.csv" in text
    assert "somebody" not in text


def test_the_plan_can_be_read_back(report, plan):
    """plan.yaml is the deployment."""
    data = load_yaml((report / "plan.yaml").read_text(), "plan.yaml")
    assert deployment_from_dict(data) == plan.deployment


def fail(*_):
    """Something that goes wrong."""
    message = "the disk is full"
    raise OSError(message)


def test_a_failure_leaves_nothing_behind(plan, tmp_path, monkeypatch):
    """A report that cannot be finished is not there at all, nor is any trace of it."""
    monkeypatch.setattr("hybridsd_sim.reporting.figures.draw", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_report(plan, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_earlier_report(plan, report, tmp_path, monkeypatch):
    """A report that cannot be replaced stays as it was."""
    copy = tmp_path / "run"
    shutil.copytree(report, copy)
    monkeypatch.setattr("hybridsd_sim.reporting.figures.draw", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_report(plan, copy)
    assert everything(copy) == everything(report)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_folder_has_no_public_name(plan, tmp_path, monkeypatch):
    """While a report is drawn, its folder does not exist under its name."""
    seen = []

    def look(*_):
        seen.append([path.name for path in tmp_path.iterdir()])
        return {}

    monkeypatch.setattr("hybridsd_sim.reporting.figures.draw", look)
    write_report(plan, tmp_path / "run")
    assert seen
    assert all(name.startswith(".") for names in seen for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_earlier_report_is_replaced(plan, report, tmp_path):
    """Writing into the folder of an earlier report replaces it whole."""
    folder = tmp_path / "run"
    shutil.copytree(report, folder)
    (folder / "index.html").write_text("old")
    write_report(plan, folder)
    assert everything(folder) == everything(report)


def test_a_folder_of_something_else_is_left_alone(plan, tmp_path):
    """A folder with files that no report wrote is refused, with its place and a remedy, and stays untouched."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex, which no report wrote.*Name a new folder"):
        write_report(plan, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_is_no_run_is_refused(tmp_path, report):
    """Drawing a folder without saved data, or with data of another format, is an input error that says so."""
    with pytest.raises(InputError, match=r"no saved run; lacks capacity\.json"):
        draw_report(tmp_path)
    copy = tmp_path / "run"
    shutil.copytree(report, copy)
    (copy / "capacity.json").write_text(json.dumps({**data_of(report), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        draw_report(copy)
    with pytest.raises(InputError, match="at least one simulation"):
        write_report([], tmp_path / "none")


def test_an_infeasible_plan_says_so_first(plan, tmp_path, undrawn):
    """A plan that breaks a promise is reported with its reason where the verdict stands."""
    text = " ".join(read(write_report(replace(plan, feasible=False), tmp_path / "run").parent).text)
    assert "No plan that was found keeps every promise" in text
    assert text.index("No plan that was found") < text.index("Rent 1 a100 node")


def test_a_plan_without_cloud_alternatives_or_service(scenario, plan, tmp_path):
    """Nothing rented, compared or refused, and classes without any plan, still make a full report."""
    result = run(scenario, {"laptop": at_the_edge()}, 0)
    bare = replace(
        plan, mixes={"laptop": ((1.0, at_the_edge()),)}, chosen_result=result, baselines=(), baseline_results={},
        frontier=(), alternatives=(), evidence=(), switch_curve={}, refusals={}, explanation=(),
        deployment=Deployment({"a100": 0}, {}),
    )  # fmt: skip
    folder = write_report(bare, tmp_path / "run").parent
    text = " ".join(read(folder).text)
    assert "Rent nothing: no legal plan serves phone and studio; run every step of laptop at the edge." in text
    assert "no legal plan" in text
    assert "No plan of the search space was refused." in text
    assert not (folder / "figures" / "switch.svg").exists()
    assert not (folder / "figures" / "load.svg").exists()


def test_a_run_that_served_nobody_is_still_reported(scenario, plan, tmp_path, undrawn):
    """With every request turned away the figures are dashes with that reason, and the turned away are counted."""
    result = run(scenario, {}, 1)
    folder = write_report([result], tmp_path / "run").parent
    text = " ".join(read(folder).text)
    assert "no request was served" in text
    assert re.search(r"\d+ phone requests unserved: no_candidate", text)
    assert json.loads(gzip.decompress((folder / "timeline.json.gz").read_bytes()))["traceEvents"] == []


def test_an_unknown_price_is_never_zero(scenario, plan, tmp_path):
    """Without a price, rent and cost are dashes with the reason, in the plan, the comparison and the figures."""
    priceless = [
        replace(p, usd=None, unknown="no spot price for a100") if p.tier == "cloud" else p
        for p in handed_over(10).cost.parts
    ]
    option = replace(handed_over(10), cost=replace(handed_over(10).cost, parts=tuple(priceless)))
    result = replace(run(scenario, {"phone": option}, 1), usd_per_hour=None)
    bare = replace(plan, mixes={"phone": ((1.0, option),)}, chosen_result=result, switch_curve={"phone": (option,)})
    folder = write_report(bare, tmp_path / "run").parent
    cells = ["".join(cell) for cell in read(folder).cells]
    assert "—no spot price for a100" in cells
    assert "—no price for a rented pool" in cells
    assert "for an unknown price" in " ".join(read(folder).text)
    assert "no price" in (folder / "figures" / "components.svg").read_text()


def test_simulations_stand_side_by_side(scenario, profiles, tmp_path, undrawn):
    """Several policies are reported together: a verdict for each, their figures, and no plan's sections."""
    options = {"phone": handed_over(10), "laptop": at_the_edge(), "studio": in_the_cloud()}
    results = [run(scenario, options, nodes, policy=policy) for nodes, policy in ((1, "cost_aware"), (2, "least_work"))]
    folder = write_report(results, tmp_path / "run", profiles=profiles).parent
    text = " ".join(read(folder).text)
    assert "Policies side by side" in text
    assert "cost_aware" in text
    assert "Compared with" not in text
    assert not (folder / "plan.yaml").exists()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["run_id"] == run_id(scenario, profiles.digest, 3, provenance["version"], "cost_aware,least_work")


def test_one_policy_twice_keeps_both(scenario, tmp_path, undrawn):
    """The same policy under two plans of the fleet gives two runs in the report."""
    results = [run(scenario, {"laptop": at_the_edge()}, nodes, policy="cost_aware") for nodes in (0, 1)]
    folder = write_report(results, tmp_path / "run").parent
    assert [each["name"] for each in data_of(folder)["runs"]] == ["cost_aware", "cost_aware #2"]


def test_two_runs_are_compared(report, scenario, plan, tmp_path):
    """A comparison shows what was asked differently and how every figure changed, beyond chance or within it."""
    faster = scenario.with_overrides({"requests.phone.slo_s": 5.0})
    other = replace(
        plan, scenario=faster, chosen_result=run(faster, {k: v for k, v in plan.chosen.items() if k != "phone"}, 1)
    )
    second = write_report(other, tmp_path / "second").parent
    folder = compare_reports(report, second, tmp_path / "both").parent
    page = read(folder)
    text = " ".join(page.text)
    assert "requests.phone.slo_s" in text
    assert "beyond chance" in text
    assert "A: chosen" in (folder / "figures" / "latency.svg").read_text()
    assert len(page.ids) == len(set(page.ids))
    again = compare_reports(report, second, tmp_path / "again").parent
    assert everything(again) == everything(folder)


def test_a_run_compared_with_itself_differs_in_nothing(report, tmp_path, undrawn):
    """The same run on both sides has nothing asked differently and no figure changed."""
    text = " ".join(read(compare_reports(report, report, tmp_path / "both").parent).text)
    assert "Nothing: scenario, profiles and version are the same." in text
    assert "beyond chance" not in text


def test_text_of_users_cannot_become_markup():
    """Names and reasons with angle brackets, quotes or bars are shown, not obeyed."""
    table = markup.Table("<b>", ('"quoted"',), ((markup.Cell("<script>alert(1)</script>", "a | b"),),))
    Page(to_html([table]))
    assert "<script>" not in to_html([table])
    assert "a \\| b" in table.markdown()
    assert to_html([markup.Paragraph("<i>")]) == "<p>&lt;i&gt;</p>"


def test_loading_the_package_draws_nothing():
    """Importing reporting loads neither matplotlib nor pandas nor pyarrow."""
    code = "import sys, hybridsd_sim.reporting; print(*{'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_a_real_plan_is_reported(quickstart, profiles, tmp_path):
    """The shipped quickstart, planned on a short horizon, makes a full report with sources behind its numbers."""
    from hybridsd_sim import optimize

    short = quickstart.with_overrides({"horizon_s": 300, "warmup_s": 30, "replications": 2})
    folder = write_report(optimize(short, profiles), tmp_path / "run").parent
    text = " ".join(read(folder).text)
    assert "Rent" in text
    assert "arXiv" in text
    names = {"frontier", "latency", "components", "load", "switch", "known", "calibration"}
    assert {path.stem for path in (folder / "figures").iterdir()} == names
