"""Laws of a stage's seconds: methods agree where they are one, rank where they differ, and know how sure they are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsd_sim import Profiles, Request, Site, Stage
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.perf import METHODS, denoising, find_method, fit_of, fitted_step_time
from hybridsd_sim.perf.stage_time import CollectiveStep, PhaseTime, stage_collectives, stage_times
from hybridsd_sim.profiles import CostRow

A100 = Site(name="cloud", tier="cloud", device="a100-sxm-80gb", runtime="cudagraph", gpus_per_node=8)
A5000 = Site(name="cloud", tier="cloud", device="rtx-a5000", runtime="eager", gpus_per_node=4)
NATIVE_PX = {"sd15": 512, "sd21": 768, "sdxl": 1024}
LINKS = ("nvlink4-switch", "nvlink3-switch", "pcie5", "pcie4", "pcie3")
"""From the fastest to the slowest."""
SITES = (A100, A5000, replace(A100, device="h100-sxm", runtime="eager"), replace(A100, device="l4", runtime="compiled"))

models = st.sampled_from(sorted(NATIVE_PX))
sites = st.sampled_from(SITES)
stripes = st.sampled_from(["distrifusion", "pcpp"])


def job(model: str = "sdxl", side_px: int | None = None, *, steps: int = 50, guided: bool = True) -> Request:
    """A request for one square image."""
    side_px = side_px or NATIVE_PX[model]
    scale = 7.5 if guided else 1.0
    return Request(model=model, height_px=side_px, width_px=side_px, num_inference_steps=steps, guidance_scale=scale)


def stage_of(request: Request, site: Site, method: str = "single", degree: int = 1, **options: object) -> Stage:
    """The whole denoising of a request on one site."""
    return Stage(
        start=0, stop=request.num_inference_steps, model=request.model, site=site, method=method, degree=degree,
        options=tuple(sorted(options.items())),  # type: ignore[arg-type]
    )  # fmt: skip


def phases(
    profiles: Profiles, request: Request, site: Site, method: str = "single", degree: int = 1, **options: object
) -> list[PhaseTime]:
    """The phases of a stage in time."""
    return list(stage_times(stage_of(request, site, method, degree, **options), request, profiles))


def seconds(
    profiles: Profiles, request: Request, site: Site, method: str = "single", degree: int = 1, **options: object
) -> float:
    """Seconds of the whole stage."""
    return sum(phase.seconds.value for phase in phases(profiles, request, site, method, degree, **options))


def relative_width(found: list[PhaseTime]) -> float:
    """How far apart the ends of a stage's interval are, as a factor."""
    return sum(phase.seconds.high for phase in found) / sum(phase.seconds.low for phase in found)


def never_rises(values: list[float]) -> bool:
    """Whether each is at most the one before it, but for rounding."""
    return all(after <= before * (1 + 1e-9) for before, after in pairwise(values))


# ---- One GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site.device}-{site.runtime}")
def test_degree_one_of_every_method_is_single(profiles: Profiles, method: str, site: Site) -> None:
    """On one GPU every method is one phase of the same seconds, interval and sources, with nothing exchanged."""
    (found,) = phases(profiles, job("sd15"), site, method)
    (single,) = phases(profiles, job("sd15"), site)

    assert found == single
    assert (found.comm_bytes, found.comm_exposed_s) == (0.0, 0.0)


def test_a_timed_step_is_taken_as_it_stands(profiles: Profiles) -> None:
    """Fifty steps of a row are fifty times its seconds, of its kind, with its source and range."""
    (row,) = profiles.cost_rows(device="rtx-a5000", model="sd15", degree=1, runtime="eager")
    (found,) = phases(profiles, job("sd15"), A5000)

    time, steps = found.seconds, 50 * row.seconds
    assert time.value == pytest.approx(steps.value)
    assert (time.kind, time.sources, time.within) == (row.kind, (row.source,), True)
    assert time.low < steps.low < time.value < steps.high < time.high


def test_sources_that_differ_widen_a_quoted_step(profiles: Profiles) -> None:
    """Where several sources timed one step, the interval of the one that is used reaches towards the others."""
    many = phases(profiles, job("sd15"), replace(A100, runtime="eager"))
    one = phases(profiles, job("sdxl", 1024), A100)

    assert relative_width(many) > 1.5 * relative_width(one)


@given(sites, models, st.integers(1, 100))
def test_steps_cost_alike_on_one_gpu(profiles: Profiles, site: Site, model: str, steps: int) -> None:
    """A stage of n steps takes n times one of a single step, whatever is known of the device."""
    one, many = (phases(profiles, job(model, steps=count), site) for count in (1, steps))

    assert many[0].seconds.value == pytest.approx(steps * one[0].seconds.value)
    assert relative_width(many) == pytest.approx(relative_width(one))


def test_the_law_stands_in_for_a_step_that_nobody_timed(profiles: Profiles) -> None:
    """An untimed size takes what the law says, scaled by how the nearest timed one of the network differs from it."""
    row = profiles.cost_rows(device="rtx-a5000", model="sd15", degree=1, runtime="eager")[0]
    larger = row.model_copy(update={"height_px": 640, "width_px": 640})
    fitted, nearest = (fitted_step_time(one, profiles).value for one in (larger, row))
    (found,) = phases(profiles, job("sd15", 640), A5000)

    assert found.seconds.value == pytest.approx(50 * fitted * row.seconds_median / nearest)
    assert (found.seconds.kind, "anchored" in found.seconds.note) == ("modelled", True)


def test_a_network_that_nobody_timed_there_takes_what_the_law_says(profiles: Profiles) -> None:
    """Without any row of the network on the device there is nothing to anchor on."""
    row = profiles.cost_rows(device="rtx-a5000", model="sd15", degree=1, runtime="eager")[0]
    steps = 50 * fitted_step_time(row.model_copy(update={"model": "bk-sdm-tiny"}), profiles)
    (found,) = phases(profiles, job("bk-sdm-tiny", 512), A5000)

    assert (found.seconds.value, *found.seconds.interval) == pytest.approx((steps.value, *steps.interval))
    assert "anchored" not in found.seconds.note


@pytest.mark.parametrize("side_px", [512, 448], ids=["timed", "modelled"])
def test_a_fixed_batch_runtime_pays_for_each_latent(profiles: Profiles, side_px: int) -> None:
    """Guidance doubles what a phone takes, where every call holds one latent."""
    phone = Site(name="phone", tier="edge", device="snapdragon-8-elite", runtime="qnn", precision="w8a16")
    plain, guided = (seconds(profiles, job("sd15", side_px, guided=flag), phone) for flag in (False, True))

    assert guided == pytest.approx(2 * plain)


# ---- Anchors --------------------------------------------------------------------------------------------------------


def compute_round(
    profiles: Profiles, site: Site, anchor: CostRow | None, method: str, degree: int, **options: object
) -> CollectiveStep:
    """A steady round of SDXL without its link: compute alone."""
    request = job()
    work = denoising(stage_of(request, site), request, profiles)
    phase = find_method(method).phases(work, degree, options)[-1]  # type: ignore[arg-type]
    fit = fit_of(profiles, site.device, site.runtime, site.precision)
    return CollectiveStep(phase.ranks, fit, None if anchor is None else (anchor, 0.02), None, degree, profiles)


@given(st.floats(0.1, 10.0), st.sampled_from([("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 8)]), sites)
def test_compute_follows_the_anchor(profiles: Profiles, factor: float, gang: tuple[str, int], site: Site) -> None:
    """A step that takes c times as long on one GPU takes c times as long on each of several."""
    row = profiles.cost_rows(device="a100-sxm-80gb", model="sdxl", degree=1, runtime="cudagraph")[0]
    slower = row.model_copy(update={"seconds_median": factor * row.seconds_median})
    one, other = (compute_round(profiles, site, anchor, *gang) for anchor in (row, slower))

    assert other.seconds(other.middle)[0] == pytest.approx(factor * one.seconds(one.middle)[0])
    assert other.log_spread() == pytest.approx(one.log_spread(), abs=1e-6)


def test_an_anchor_that_the_law_explains_changes_nothing(profiles: Profiles) -> None:
    """Anchored on what the law says of the whole step, a rank takes what the law says of its share."""
    row = profiles.cost_rows(device="a100-sxm-80gb", model="sdxl", degree=1, runtime="cudagraph")[0]
    row = row.model_copy(update={"seconds_median": fitted_step_time(row, profiles).value})
    anchored, free = (compute_round(profiles, A100, anchor, "distrifusion", 4) for anchor in (row, None))

    assert anchored.seconds(anchored.middle)[0] == pytest.approx(free.seconds(free.middle)[0])


def test_an_anchor_makes_a_gang_surer(profiles: Profiles) -> None:
    """With the device's own time of the step, only the share of it is left to the law."""
    row = profiles.cost_rows(device="a100-sxm-80gb", model="sdxl", degree=1, runtime="cudagraph")[0]
    for gang in (("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 8)):
        anchored, free = (compute_round(profiles, A100, anchor, *gang) for anchor in (row, None))
        assert anchored.log_spread() < free.log_spread(), gang


# ---- Several GPUs ---------------------------------------------------------------------------------------------------

LADDERS = (
    *(("distrifusion", (1, 2, 4, 8), {"sync_mode": mode}) for mode in ("corrected_async_gn", "full_sync", "no_sync")),
    ("distrifusion", (2, 4, 8), {"guidance_split": True}),
    ("pcpp", (1, 2, 4, 8), {}),
    ("cfg_parallel", (1, 2), {}),
    *(("asyncdiff", (1, 2, 3, 4), {"public_cut": public}) for public in (True, False)),
    ("asyncdiff", (3, 4, 5), {"stride": 2}),
)


@pytest.mark.parametrize(("method", "degrees", "options"), LADDERS, ids=str)
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_more_gpus_never_compute_more_each(
    profiles: Profiles, model: str, method: str, degrees: tuple[int, ...], options: dict[str, object]
) -> None:
    """The slowest rank's compute of a whole stage falls with every further GPU, or stays."""
    for site in SITES:
        times = [
            sum(
                count * max(float(t) for t in round_._batch.seconds(round_.middle[:6])[-len(round_.ranks) :])
                for count, round_ in stage_collectives(
                    stage_of(job(model), site, method, degree, **options), job(model), profiles
                )
            )
            for degree in degrees
        ]
        assert never_rises(times), site


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_the_slowest_rank_sets_the_pace(profiles: Profiles, degree: int, public: bool) -> None:
    """A round of AsyncDiff takes as long as its slowest component alone, wherever that stands in the order."""
    together = compute_round(profiles, A5000, None, "asyncdiff", degree, public_cut=public)
    law = together.middle[:6]
    alone = together._batch.seconds(law)
    walked = together.seconds(together.middle)[0] - max(alone)

    assert 0 < walked < 0.1 * max(alone)
    assert all(together.seconds(together.middle)[0] > time for time in alone)


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("side_px", [1024, 2048])
@pytest.mark.parametrize("link", LINKS)
def test_the_less_is_waited_for_the_faster_is_distrifusion(
    profiles: Profiles, degree: int, side_px: int, link: str
) -> None:
    """All synchronous is slowest, then GroupNorms alone, stale and corrected ones, none, and no exchange at all."""
    site = replace(A100, interconnect=link)
    times = {
        mode: seconds(profiles, job(side_px=side_px), site, "distrifusion", degree, sync_mode=mode)
        for mode in ("full_sync", "sync_gn", "corrected_async_gn", "stale_gn", "separate_gn", "no_sync")
    }

    assert never_rises(list(times.values()))
    assert times["full_sync"] > times["corrected_async_gn"] > times["no_sync"]
    # over a slow link nothing more can hide, so that what waits for everybody costs no more than what does not
    assert times["sync_gn"] >= times["corrected_async_gn"] > times["separate_gn"]


@given(st.sampled_from([2, 4, 8]), st.sampled_from(LINKS), st.sampled_from([1024, 2048]), st.floats(0.0, 1.0))
def test_pcpp_is_no_slower_than_distrifusion(
    profiles: Profiles, degree: int, link: str, side_px: int, partial: float
) -> None:
    """A part of the neighbours' keys is less to score and less to send than all keys of everybody."""
    site, request = replace(A100, interconnect=link), job(side_px=side_px)
    all_keys = seconds(profiles, request, site, "distrifusion", degree)

    assert seconds(profiles, request, site, "pcpp", degree, partial=partial) <= all_keys * (1 + 1e-9)


@given(stripes, st.sampled_from([2, 4, 8]), st.integers(1, 49))
def test_a_synchronous_step_costs_more_than_a_steady_one(
    profiles: Profiles, method: str, degree: int, warmup_steps: int
) -> None:
    """Every further warm-up step makes the stage longer, by the same amount."""
    fewer, more = (
        seconds(profiles, job(), A100, method, degree, warmup_steps=steps) for steps in (warmup_steps, warmup_steps + 1)
    )
    first, second = (seconds(profiles, job(), A100, method, degree, warmup_steps=steps) for steps in (1, 2))

    assert more > fewer
    assert more - fewer == pytest.approx(second - first, rel=1e-6)


@given(st.sampled_from([("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 8), ("asyncdiff", 2)]), sites)
def test_a_slower_link_takes_longer(profiles: Profiles, gang: tuple[str, int], site: Site) -> None:
    """From NVLink switches over PCIe 5 to PCIe 3 every method slows down, and more of its exchange shows."""
    found = [phases(profiles, job(), replace(site, interconnect=link), *gang) for link in LINKS]
    totals = [sum(phase.seconds.value for phase in some) for some in found]
    shown = [sum(phase.comm_exposed_s for phase in some) for some in found]

    assert never_rises(totals[::-1])
    assert totals[1] < totals[2]  # PCIe is slower than NVLink
    assert never_rises(shown[::-1])


def test_the_exchange_that_shows_is_part_of_the_time(profiles: Profiles) -> None:
    """Compute and what shows of the exchange are the phase; bytes are those of the method, round by round."""
    request = job()
    work = denoising(stage_of(request, A100), request, profiles)
    for method, degree in (("distrifusion", 8), ("pcpp", 4), ("asyncdiff", 3), ("cfg_parallel", 2)):
        expected = find_method(method).phases(work, degree, {})
        for phase, timed in zip(expected, phases(profiles, request, A100, method, degree), strict=True):
            assert 0 <= timed.comm_exposed_s < timed.seconds.value
            assert timed.comm_bytes == pytest.approx(phase.rounds * phase.work.received_bytes)


def with_gang(profiles: Profiles, options: str) -> tuple[Profiles, CostRow]:
    """The profiles with somebody's own step of DistriFusion on four A100."""
    (one_gpu, *_) = profiles.cost_rows(device="a100-sxm-80gb", model="sdxl", degree=1, runtime="cudagraph")
    said = {"method": "distrifusion", "degree": 4, "options": options, "kind": "measured", "seconds_median": 0.123}
    row = CostRow.model_validate(one_gpu.model_dump() | said)
    return profiles.with_costs([row]), row


def test_a_gang_that_was_measured_takes_what_was_measured(profiles: Profiles) -> None:
    """One's own row of several GPUs goes before the model, for its method, options, size and link alone."""
    own, row = with_gang(profiles, "guidance_split=false;ranks=nccl;sync_mode=corrected_async_gn")
    warmup, steady = phases(own, job(), A100, "distrifusion", 4)
    others = [
        phases(own, job(), replace(A100, interconnect="pcie4"), "distrifusion", 4)[-1],
        phases(own, job(), A100, "distrifusion", 4, sync_mode="no_sync")[-1],
        phases(own, job(), A100, "pcpp", 4)[-1],
        phases(own, job(side_px=2048), A100, "distrifusion", 4)[-1],
    ]

    assert steady.seconds.value == pytest.approx(45 * 0.123)
    assert (steady.seconds.kind, steady.seconds.sources) == ("measured", (row.source,))
    assert warmup.seconds.kind == "modelled"
    assert {phase.seconds.kind for phase in others} == {"modelled"}


def test_a_measured_gang_that_does_not_mention_an_option_had_its_default(profiles: Profiles) -> None:
    """A row that says nothing of its synchronisation is none of a run without any."""
    own, _ = with_gang(profiles, "ranks=nccl")

    assert phases(own, job(), A100, "distrifusion", 4)[-1].seconds.kind == "measured"
    assert phases(own, job(), A100, "distrifusion", 4, sync_mode="no_sync")[-1].seconds.kind == "modelled"


def test_what_a_method_cannot_run_is_refused(profiles: Profiles) -> None:
    """An illegal degree is an error with its rule, before anything is timed."""
    with pytest.raises(IllegalPlanError, match="rows must divide"):
        phases(profiles, job("sd21"), A100, "distrifusion", 8)


# ---- Intervals ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    st.sampled_from([("single", 1), ("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 8), ("asyncdiff", 3)]),
    sites,
    st.sampled_from(["sdxl", "sd15"]),
    st.sampled_from(LINKS),
)
def test_intervals_contain_the_middle(
    profiles: Profiles, gang: tuple[str, int], site: Site, model: str, link: str
) -> None:
    """Every phase has a middle between its ends, its sources, and a sentence where it is modelled."""
    for phase in phases(profiles, job(model), replace(site, interconnect=link), *gang):
        time = phase.seconds
        assert 0 < time.low < time.value < time.high
        assert time.sources
        assert time.kind != "modelled" or time.note


@pytest.mark.parametrize("gang", [("single", 1), ("distrifusion", 4), ("asyncdiff", 3)])
def test_a_device_that_was_never_timed_is_less_sure(profiles: Profiles, gang: tuple[str, int]) -> None:
    """Without any row of it, the same device has a wider interval, and says so."""
    blank = profiles.without(lambda row: row.device == "a100-sxm-80gb")
    known, unknown = (phases(some, job("sdxl", 896), A100, *gang) for some in (profiles, blank))

    assert relative_width(unknown) > 1.2 * relative_width(known)
    assert "never timed" in unknown[-1].seconds.note
    assert not any(phase.seconds.within for phase in unknown)


@given(st.sampled_from([("distrifusion", 8), ("asyncdiff", 3)]))
def test_a_link_of_uncertain_bandwidth_widens_the_interval(profiles: Profiles, gang: tuple[str, int]) -> None:
    """How fast PCIe is depends on the machine; what is sent over it is as unsure."""
    sure = profiles.interconnect("pcie4")
    unsure = sure.model_copy(
        update={"bandwidth_low": sure.bandwidth_low / 3, "bandwidth_high": sure.bandwidth_high * 3}
    )
    widths = [
        relative_width(
            phases(
                replace(profiles, interconnects={**profiles.interconnects, "pcie4": known}),
                job(),
                replace(A100, interconnect="pcie4"),
                *gang,
            )
        )
        for known in (sure, unsure)
    ]

    assert widths[1] > widths[0]


def test_the_spread_of_a_round_is_first_order_exact(profiles: Profiles) -> None:
    """Drawn from its own covariance, a round's seconds spread as much as it says (to first order)."""
    row = profiles.cost_rows(device="a100-sxm-80gb", model="sdxl", degree=1, runtime="cudagraph")[0]
    round_ = compute_round(profiles, A100, row, "distrifusion", 8)
    random = np.random.default_rng(3)
    draws = random.multivariate_normal(round_.middle, round_._covariance, size=400)
    spread = np.std([log(round_.seconds(vector)[0]) for vector in draws])

    assert np.hypot(spread, round_._noise) == pytest.approx(round_.log_spread(), rel=0.15)
