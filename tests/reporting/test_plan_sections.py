"""What a capacity plan's report says beyond its simulation: savings, bound, margins, conflicts, conditions, mixes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made import BOUND, CONFIDENCE, CONFLICT, MARGINS, RENT, handed_over
from hybridsd_sim.planning import (
    Confidence,
    describe_confidence,
    describe_margin,
    describe_relaxation,
    describe_savings,
    optimality_gap,
    probability_interval,
    turned_away_share,
)
from hybridsd_sim.planning.capacity_plan import Margin, Relaxation, Saving, saving
from hybridsd_sim.planning.explanation import explain
from hybridsd_sim.reporting import plan_data, plan_text, to_json, write_report
from hybridsd_sim.reporting.data import contents
from hybridsd_sim.reporting.terminal import PLAIN


@pytest.fixture(scope="module")
def bare(plan):
    """The same plan where nothing but its simulations is known."""
    return replace(
        plan, bound_usd_per_hour=None, margins=(), sensitivity=(), confidence=None, robust=(), savings=(),
        frontier=(), alternatives=(), evidence=(), explanation=(),
    )  # fmt: skip


@pytest.fixture
def shown(profiles, tmp_path, undrawn):
    """A plan as all its readers see it: page, Markdown, terminal and JSON."""

    def show(plan):
        folder = write_report(plan, tmp_path / "run", profiles=profiles).parent
        saved = json.loads((folder / "capacity.json").read_text())
        page = (folder / "index.html").read_text()
        return {
            "html": page,
            "page": unescape(re.sub(r"<[^>]*>", " ", page.partition("<main>")[2])),
            "markdown": (folder / "report.md").read_text(),
            "text": plan_text(saved, 10_000),
            "json": json.loads(to_json(plan_data(saved, "page"))),
        }

    return show


def everywhere(shown, sentence):
    """Whether page, Markdown and terminal all say this."""
    plain = sentence.translate(PLAIN)
    return sentence in shown["page"] and sentence in shown["markdown"] and plain in shown["text"]


def headings(html):
    """The sections of a page in their order."""
    return re.findall(r'<h2 id="([^"]+)"', html)


def row_of(html, caption, name):
    """The text of the cells of a table's row, by the table's caption and the row's name."""
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        if caption in table:
            for row in re.findall(r'<tr role="row".*?</tr>', table.partition("<tbody>")[2], re.DOTALL):
                cells = re.findall(r"<(?:td|th)[^>]*>(.*?)</(?:td|th)>", row, re.DOTALL)
                if unescape(cells[0]).startswith(name):
                    return [unescape(re.sub(r"<[^>]*>", " ", cell)).split() for cell in cells]
    return None


def test_sections_stand_in_the_order_of_a_planners_questions(plan, shown):
    """Answer, savings, reasons, margins, frontier, conditions, confidence, evidence, then how all of it is known."""
    found = headings(shown(plan)["html"])
    wanted = ["verdict", "plan", "savings", "why", "margins", "frontier", "sensitivity", "robust", "confidence"]
    assert found[:11] == [*wanted, "evidence", "known"]


def test_what_a_plan_does_not_know_has_no_section(bare, shown):
    """Without margins, frontier, conditions, confidence and evidence there is no heading, sentence or key for them."""
    said = shown(bare)
    assert headings(said["html"])[:4] == ["verdict", "plan", "savings", "known"]
    for words in ("No plan under", "buys nothing", "with probability", "capacity plans were tried", "None"):
        assert words not in said["page"] + said["text"]
    assert said["json"]["bound"] is said["json"]["confidence"] is None
    assert said["json"]["margins"] == said["json"]["robust"] == []


def test_savings_are_told_with_dollars_share_loss_and_grounds(plan, shown):
    """Against each plan of another kind: what is saved at which loss of quality, or why the other does not hold."""
    said = shown(plan)
    sentence = (
        "It costs 50.0% less than cloud only: 6.00 USD/h of rent against 12.00, both by simulation, with a CLIP score "
        "lower by 0.0229."
    )
    assert sentence in said["page"]
    assert sentence in said["markdown"]
    assert "Edge only does not hold: phone: 61.0% inside 8 s, promised 95%." in said["page"]
    assert said["json"]["savings"][0]["usd_per_hour"] == RENT
    assert said["json"]["savings"][0]["said"] == sentence


def test_savings_are_the_differences_of_two_plans(plan):
    """Rent saved, its share, the change of the score and who is left unserved follow from the plans' own figures."""
    chosen, cloud, edge = plan.evidence[0], *plan.baselines[:2]
    against_cloud, against_edge = saving(chosen, cloud), saving(chosen, replace(edge, unserved_share=0.25))
    saved = cloud.usd_per_hour - chosen.usd_per_hour

    assert (against_cloud.other, against_cloud.holds) == ("cloud only", True)
    assert against_cloud.usd_per_hour == pytest.approx(saved)
    assert against_cloud.share == pytest.approx(saved / cloud.usd_per_hour)
    assert (against_edge.holds, against_edge.reason) == (False, edge.reason)
    assert against_edge.unserved == (0.0, 0.25)


def test_a_saving_tells_whom_it_leaves_unserved(plan):
    """A plan that turns requests away is not cheaper for the same work, and the sentence says so."""
    kept = Saving("cloud only", True, "", 1.0, 0.1, None, (0.04, 0.6))
    (said,) = describe_savings(replace(plan, savings=(kept,)))

    assert "leaving 4.0% of the requests unserved against 60.0%" in said


@pytest.mark.parametrize(
    ("saving", "words"),
    [
        (Saving("a", True, "", 0.0, 0.0, 0.0), "as much as a: 6.00 USD/h of rent against 6.00"),
        (Saving("a", True, "", -6.0, None, 0.01), "6.00 USD/h more than a: 6.00 USD/h of rent against 0,"),
        (Saving("a", True, "", -1.5, -1 / 3, None), "33.3% more than a: 6.00 USD/h of rent against 4.50"),
        (Saving("a", True, "", None, None, 0.0), "What the plan saves against a is not known"),
        (Saving("a", False, "too slow", None, None, None), "A does not hold: too slow."),
    ],
)
def test_a_saving_that_is_none_is_told_as_it_is(plan, saving, words):
    """As dear, dearer, dearer than nothing, of unknown price, or against a plan that does not hold."""
    (said,) = describe_savings(replace(plan, savings=(saving,)))
    assert words in said


def test_a_saving_is_told_once(plan, shown):
    """Where the explanation repeats a saving, the page says it under savings and not again among the reasons."""
    sentence = next(describe_savings(plan))
    page = shown(replace(plan, explanation=("Rent one node.", sentence)))["page"]
    assert page.count(sentence) == 1
    assert page.count("Rent one node.") == 1


def test_the_bound_and_its_gap_are_told(plan, shown):
    """Bound, cost with egress, and the gap between the two as a share of the cost."""
    said = shown(plan)
    bound, cost, gap = optimality_gap(plan)
    assert bound == BOUND
    assert cost == RENT + 0.01
    assert gap == pytest.approx(1 - BOUND / cost)
    assert everywhere(said, "The search found no plan under 5.70 USD/h: what the formula puts within reach was tried")
    assert everywhere(said, f"gap {gap:.1%}")
    assert said["json"]["bound"]["gap"] == pytest.approx(gap)


def test_a_plan_that_does_not_hold_has_no_gap(plan):
    """Neither an infeasible plan nor one of unknown price is held against a bound; a bound above the cost is no gap."""
    assert optimality_gap(replace(plan, feasible=False)) is None
    assert optimality_gap(replace(plan, bound_usd_per_hour=None)) is None
    assert optimality_gap(replace(plan, cost_usd_per_hour=None)) is None
    assert optimality_gap(replace(plan, bound_usd_per_hour=100.0))[2] == 0.0


def test_margins_are_told_in_words(plan, shown):
    """What a change saves, costs, speeds up, leaves alone or makes impossible, with both values and their unit."""
    said = shown(plan)
    sentences = [
        "One more second of SLO would save 0.93 USD/h: 5.09 instead of 6.02 USD/h (by formula).",
        "0.005 more CLIP would cost 2.00 USD/h more: 8.02 instead of 6.02 USD/h (by formula).",
        "One more dollar an hour would lower the p95 latency by 0.80 s: 1.70 instead of 2.50 s (by formula).",
        "One more joule at the edge buys nothing and costs nothing: 6.02 USD/h with and without (by formula).",
        "Twice the traffic: no plan would hold (by formula).",
    ]
    assert [margin["said"] for margin in said["json"]["margins"]] == sentences
    assert all(everywhere(said, sentence) for sentence in sentences)
    assert [margin["after"] for margin in said["json"]["margins"]] == [margin.after for margin in MARGINS]


@given(st.sampled_from(["usd_per_hour", "latency_p95_s", "quality"]), st.floats(0.01, 900.0), st.floats(0.01, 900.0))
def test_a_margin_says_the_difference_and_its_direction(figure, before, after):
    """The number told is the difference at the decimals of its unit, and the verb says which way it goes."""
    said = describe_margin(Margin("a change", figure, before, after))
    decimals = 4 if figure == "quality" else 2
    if "buys nothing" in said:
        assert abs(after - before) <= 0.5 * 10**-decimals
        return
    assert f" {abs(after - before):.{decimals}f} " in said
    assert ("save" in said or "lower" in said) == (after < before)


def test_a_margin_from_or_to_nothing():
    """A change that makes a plan possible says so; one without effect on an infeasible scenario does not help."""
    assert describe_margin(Margin("a change", "usd_per_hour", None, 3.0)).startswith(
        "A change would make a plan possible"
    )
    assert describe_margin(Margin("a change", "usd_per_hour", None, None)) == "A change does not help."


def test_a_conflict_is_told_with_the_least_relaxations(plan, shown):
    """The constraints that cannot hold together, each with what it would have to be, stand right after the verdict."""
    said = shown(replace(plan, feasible=False, conflict=CONFLICT))
    assert headings(said["html"])[:3] == ["verdict", "conflict", "plan"]
    assert everywhere(said, "These 3 constraints cannot hold together")
    assert everywhere(said, "SLO of phone: 9.25 s instead of 8 s would do, all else as it is (by formula).")
    assert everywhere(said, "Quality floor of phone: 0.28501 CLIP instead of 0.285 CLIP would do")
    assert everywhere(said, "Budget, 4 USD/h asked: no change of it alone helps.")
    assert [each["needed"] for each in said["json"]["conflict"]] == [each.needed for each in CONFLICT]


def test_the_explanation_of_a_conflict_is_the_conflict(plan, profiles, scenario, shown):
    """The explanation names the conflict in the words of its own section, and the page does not say it twice."""
    from hybridsd_sim.planning.analytic import Sizer
    from hybridsd_sim.pricing import find_candidates

    broken = replace(plan, feasible=False, conflict=CONFLICT)
    told = tuple(explain(broken, find_candidates(scenario, profiles), Sizer(scenario, profiles)))
    assert told[1].startswith("These 3 constraints")
    assert told[2:5] == tuple(map(describe_relaxation, CONFLICT))
    said = shown(replace(broken, explanation=told))
    assert all(said[reader].count("These 3 constraints") == 1 for reader in ("page", "markdown", "text"))


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_a_relaxation_never_says_the_same_number_twice(asked, needed):
    """Two numbers that differ are told with as many digits as it takes to tell them apart."""
    said = describe_relaxation(Relaxation("it", asked, needed, ""))
    if asked != needed:
        one, _, other = said.removeprefix("It: ").partition(" would")[0].partition(" instead of ")
        assert one != other
        assert float(other.replace(",", "")) == pytest.approx(asked, rel=5.01e-4)


def test_conditions_are_tabled_with_their_grounds(plan, shown):
    """Each condition has attainment, p95 with interval, rent, whether it holds and why not, and by what it is known."""
    said = shown(plan)
    caption = "The same plan, without any change to it"
    row = row_of(said["html"], caption, "traffic +10%")
    assert "no" in row[1]
    assert row[2][0] == "91.3%"
    assert row[3] == ["8.80", "▲", "8.10–9.70"]
    assert row[4][0] == "6.50"
    assert row[6] == ["compiled", "recursion"]
    assert row_of(said["html"], caption, "traffic +100%")[3][:3] == ["—", "a", "queue"]
    assert row_of(said["html"], caption, "as planned")[6] == ["simulation"]
    assert "The plan holds in 1 of 3 conditions, not in: traffic +10% and traffic +100%." in said["page"]
    assert "The plan holds in 1 of 2 scenarios, not in: lossy." in said["page"]
    assert row_of(said["html"], "The plan in each scenario", "lossy")[6] == ["compiled", "recursion"]
    assert {"traffic -10%", "busy"} <= {each["name"] for each in said["json"]["sensitivity"] + said["json"]["robust"]}
    lines = [line for line in said["text"].splitlines() if line.startswith("traffic +10%")]
    assert re.search(r"91\.3% \[89\.0-93\.0%\].*8\.80 \[8\.10-9\.70\].*6\.50.*by compiled recursion", lines[0])


def test_the_confidence_is_told_with_its_draws(plan, shown):
    """Probability, draws, level, interval and what was asked; beneath, each class by itself."""
    said = shown(plan)
    sentence = (
        "With the intervals of the modelled step costs the plan holds with probability 0.87 (200 draws by compiled "
        "recursion, 95% interval 0.816–0.910); asked 0.9, which it does not reach."
    )
    assert everywhere(said, sentence)
    assert row_of(said["html"], "Share of the 200 draws", "laptop")[1] == ["99.0%", "▲"]
    assert said["json"]["confidence"]["probability"] == CONFIDENCE.probability
    assert describe_confidence(Confidence(1.0, None, 50, {}, "simulate")).endswith("interval 0.929–1.00).")
    assert describe_confidence(Confidence(0.95, 0.9, 50, {}, "simulate")).endswith("asked 0.9.")


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_interval_of_a_probability_holds_it(hits, draws):
    """The interval lies in 0 to 1, contains the share, and shrinks with the draws."""
    share = min(hits, draws) / draws
    low, high = probability_interval(share, draws)
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1.0 + 1e-12
    wider_low, wider_high = probability_interval(share, max(1, draws // 2))
    assert high - low <= wider_high - wider_low + 1e-12


def test_the_evidence_is_every_plan_in_order_with_its_reason(plan, shown):
    """Each simulated plan stands once, in the order of the search, with intervals and whether it holds."""
    said = shown(plan)
    table = next(t for t in re.findall(r"<table.*?</table>", said["html"], re.DOTALL) if "order of the search" in t)
    names = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', table)
    assert names == [point.name for point in plan.evidence]
    assert (
        "2 capacity plans were tried in the search, on the same requests: 2 by simulation. 1 of them held every promise"
        in said["page"]
    )
    tried = "2 capacity plans were tried in the search, on the same requests: 2 by simulation."
    assert f"{tried} The report has every one." in said["text"]
    assert len(said["json"]["evidence"]) == 2


def test_a_long_table_is_for_the_reader_to_open(plan, shown):
    """A dozen rows stand open; more are folded away under a line that counts them."""
    html = shown(replace(plan, evidence=plan.evidence * 10))["html"]
    assert "<summary>All 20 in the order of the search</summary>" in html


def test_the_frontier_says_how_it_is_known(plan, shown):
    """Each point has its rent, latency and score, and whether simulation, recursion or formula found it."""
    points = tuple(replace(point, level="screen") for point in plan.frontier[:1]) + plan.frontier[1:]
    said = shown(replace(plan, frontier=points))
    table = next(t for t in re.findall(r"<table.*?</table>", said["html"], re.DOTALL) if "no other beats in rent" in t)
    assert re.findall(r'data-label="Known by">(.*?)<', table) == ["compiled recursion", *["formula"] * 3]
    assert re.findall(r'data-label="Rent \(US\$/h\)">([\d.]+)', table) == ["6.00", "8.00", "10.00", "12.00"]
    assert "The frontier's figures are by compiled recursion, formula." in said["text"]


def mixed(plan, *shares):
    """The plan with the phone's requests shared out over hand-overs after these steps."""
    mix = tuple((share, handed_over(step)) for share, step in shares)
    return replace(plan, mixes={**plan.mixes, "phone": mix})


def test_a_class_may_have_several_plans(plan, shown):
    """Every part has its share, its own row and its own idle latency; what is missing is turned away and said to be."""
    said = shown(mixed(plan, (0.7, 10), (0.2, 15)))
    lead = (
        "hand 70.0% of phone over after step 10 of 25; hand 20.0% of phone over after step 15 of 25; "
        "turn 10.0% of phone away"
    )
    assert lead in said["page"]
    rows = re.findall(r'<tr role="row"><th[^>]*>phone<small.*?</tr>', said["html"], re.DOTALL)
    assert [re.search(r"([\d.]+)% of its requests", row)[1] for row in rows[:3]] == ["70.0", "20.0", "10.0"]
    assert [re.findall(r'data-label="Idle latency \(s\)">([\d.]*)', row)[0] for row in rows[:3]] == ["2.57", "2.37", ""]
    assert "Turned away: there is no room for them" in said["page"]
    first = [line for line in said["text"].splitlines() if "70.0%: sd14 on a100 [0,10)" in line]
    assert first
    assert "20.0%: sd14 on a100 [0,15)" in said["text"]
    assert "10.0%: turned away" in said["text"]
    assert said["json"]["chosen"][0]["parts"][1]["share"] == 0.2
    assert said["json"]["chosen"][0]["turned_away"] == pytest.approx(0.1)
    assert " + " in said["json"]["plans"]["phone"]


def test_one_plan_for_all_reads_as_if_there_were_no_shares(plan, shown):
    """No share, no hundred per cent, nothing turned away."""
    said = shown(plan)
    lead = "Rent 1 a100 node for US$ 6.00 an hour: hand phone over after step 10 of 25; run every step of laptop at the"
    assert lead in said["page"]
    for reader in ("page", "markdown", "text"):
        assert not re.search(r"of its requests|turned away|100% of|100\.0%:", said[reader])


def test_every_part_of_a_mix_is_broken_down(plan, profiles):
    """Both plans of a class stand among the parts behind the chosen plan, and both mark the switch curve."""
    data = contents(mixed(plan, (0.6, 10), (0.4, 15)), profiles)
    labels = {each["label"] for each in data["plans"] if each["request_class"] == "phone" and "chosen" in each["runs"]}
    assert labels == {handed_over(10).plan.label, handed_over(15).plan.label}
    assert [point["switch_step"] for point in data["switch_curve"]["phone"] if point["chosen"]] == [10, 15]


def test_the_explanation_tells_a_mix(plan, profiles, scenario):
    """The explanation says who gets which plan and how many are turned away, and nothing of it for a single plan."""
    from hybridsd_sim.planning.analytic import Sizer
    from hybridsd_sim.pricing import find_candidates

    found, sizer = find_candidates(scenario, profiles), Sizer(scenario, profiles)
    told = " ".join(explain(mixed(plan, (0.7, 10), (0.25, 15)), found, sizer))
    assert "phone: its requests are shared out: 70.0% by sd14 on a100 [0,10)" in told
    assert "phone: 5.0% of its requests are turned away" in told
    alone = " ".join(explain(plan, found, sizer))
    assert "shared out" not in alone
    assert "turned away" not in alone


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6), st.floats(0.0, 0.9))
def test_what_no_plan_serves_is_turned_away(weights, away):
    """Shares and what is turned away sum to 1; rounding turns nobody away."""
    shares = [weight / sum(weights) * (1 - away) for weight in weights]
    found = turned_away_share([(share, None) for share in shares])
    assert found == pytest.approx(away, abs=1e-6)
    assert turned_away_share([(weight / sum(weights), None) for weight in weights]) == 0.0
    assert turned_away_share([]) == 0.0


def test_a_batch_cap_is_told(plan, shown):
    """A plan that denoises several requests together says how many at most, in words, table, Markdown and terminal."""
    option = handed_over(10)
    batched = replace(option, plan=replace(option.plan, batch_cap=4))
    batched = replace(batched, cost=replace(option.cost, plan=batched.plan))
    said = shown(replace(plan, mixes={**plan.mixes, "phone": ((1.0, batched),)}))
    assert "First 10 of 25 steps of sd14 on a100 (a100-sxm-80gb), up to 4 together, then the other 15" in said["page"]
    assert all("up to 4 together" in said[reader] for reader in ("markdown", "text"))
    assert "single × 1 up to 4 together" in re.sub(r"\s+", " ", said["page"])
