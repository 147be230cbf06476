"""What the parallel methods promise: legal degrees, work per rank, traffic; the published figures among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.methods import METHODS, find_method
from hybridsd_sim.partition import Denoising, balanced_cut, boundary_elements, whole
from hybridsd_sim.roofline import layer_table
from hybridsd_sim.unet import unet_units

PARALLEL = ("cfg_parallel", "distrifusion", "pcpp", "asyncdiff")


def denoising(
    profiles: Profiles, model: str, px: int, *, steps: int = 50, guided: bool = True, num_images: int = 1
) -> Denoising:
    """A guided job of one image at a square size."""
    entry = profiles.model(model)
    return Denoising(
        table=layer_table(entry.config, px, px, entry.ops),
        units=unet_units(entry.config, px, px),
        num_steps=steps,
        latents=num_images * (2 if guided else 1),
        guided=guided,
        latent_elements=4 * (px // 8) ** 2,
        family=entry.latent_space,
        public_cuts=profiles.public_cuts(model),
    )


@pytest.mark.parametrize("name", METHODS)
def test_degree_one_of_any_method_is_single(profiles: Profiles, name: str) -> None:
    """On one GPU every method is one phase of the whole UNet without an exchange."""
    job = denoising(profiles, "sd15", 512)
    phases = METHODS[name].phases(job, 1, {})

    assert [(phase.steps, phase.rounds, phase.work) for phase in phases] == [(50, 50, whole(job))]
    assert METHODS[name].problems(job, 1, {}) == []


@given(
    st.sampled_from(PARALLEL),
    st.integers(1, 60),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 9),
    st.sampled_from([1, 2]),
)
def test_phases_cover_every_step_once(
    profiles: Profiles, name: str, steps: int, degree: int, warmup: int, stride: int
) -> None:
    """Whatever is legal, the steps of its phases sum to those asked for, and no rank computes more than everything."""
    job = denoising(profiles, "sd15", 512, steps=steps)
    options: dict[str, int] = {} if name == "cfg_parallel" else {"warmup_steps": warmup}
    options |= {"stride": stride} if name == "asyncdiff" else {}
    method = METHODS[name]
    if method.problems(job, degree, options):
        return
    phases = method.phases(job, degree, options)

    assert sum(phase.steps for phase in phases) == steps
    assert all(0 < phase.rounds <= phase.steps for phase in phases)
    assert all(phase.work.macs <= whole(job).macs * (1 + 1e-12) for phase in phases)


@pytest.mark.parametrize(
    ("px", "degree", "giga_elements"), [(1024, 2, 0.218), (1024, 4, 0.339), (1024, 8, 0.424), (2048, 8, 1.583)]
)
def test_distrifusion_traffic_is_the_papers(profiles: Profiles, px: int, degree: int, giga_elements: float) -> None:
    """Elements received by a device per step: 0.42 G at 1024 px (DistriFusion, table 2); 1.58 G derived at 2048."""
    job = denoising(profiles, "sdxl", px)
    steady = METHODS["distrifusion"].phases(job, degree, {})[-1].work

    assert (steady.received_bytes - job.noise_bytes()) / 2 == pytest.approx(giga_elements * 1e9, rel=0.003)


def test_pcpp_cuts_traffic_as_published(profiles: Profiles) -> None:
    """Whole stripes to two of eight are 2/7 of DistriFusion's keys and values; the part used is less still."""
    job = denoising(profiles, "sdxl", 1024)
    whole_stripes = METHODS["pcpp"].phases(job, 8, {"whole_stripes": True})[-1].work.received_bytes
    used_only = METHODS["pcpp"].phases(job, 8, {})[-1].work.received_bytes
    everything = METHODS["distrifusion"].phases(job, 8, {})[-1].work.received_bytes

    assert 1 - whole_stripes / everything == pytest.approx(0.62, abs=0.02)  # the keys and values alone: 0.71
    assert used_only < whole_stripes


def test_pcpp_with_everything_on_two_gpus_is_distrifusion(profiles: Profiles) -> None:
    """p = 1 with one neighbour sees the whole image: the same work and the same traffic."""
    job = denoising(profiles, "sd15", 512)
    pcpp = METHODS["pcpp"].phases(job, 2, {"partial": 1.0})[-1].work
    distrifusion = METHODS["distrifusion"].phases(job, 2, {})[-1].work

    assert pcpp.macs == pytest.approx(distrifusion.macs)
    assert pcpp.received_bytes == pytest.approx(distrifusion.received_bytes)


def test_stripes_share_the_image_work_and_repeat_the_rest(profiles: Profiles) -> None:
    """Two stripes cost slightly more than the whole: only what does not depend on the image is done twice."""
    job = denoising(profiles, "sd15", 512)
    share = METHODS["distrifusion"].phases(job, 2, {})[-1].work.macs / whole(job).macs

    assert 0.5 < share < 0.503


def test_guidance_split_gives_each_branch_half_the_gpus(profiles: Profiles) -> None:
    """Four GPUs with split guidance are two branches of two stripes on one latent each."""
    job = denoising(profiles, "sdxl", 1024)
    split = METHODS["distrifusion"].phases(job, 4, {"guidance_split": True})[-1].work
    branch = METHODS["distrifusion"].phases(denoising(profiles, "sdxl", 1024, guided=False), 2, {})[-1].work

    assert split.macs == pytest.approx(branch.macs)
    assert split.latents == 1


@pytest.mark.parametrize(("stride", "degrees"), [(1, (2, 3, 4)), (2, (3, 4, 5))])
def test_asyncdiff_needs_two_to_four_components(profiles: Profiles, stride: int, degrees: tuple[int, ...]) -> None:
    """N = degree - stride + 1 is 2, 3 or 4; anything else is refused with the degrees that would do."""
    job = denoising(profiles, "sd15", 512)
    allowed = [d for d in range(2, 9) if not METHODS["asyncdiff"].problems(job, d, {"stride": stride})]

    assert tuple(allowed) == degrees
    (problem,) = METHODS["asyncdiff"].problems(job, 8, {"stride": stride})
    assert ", ".join(map(str, degrees)) in problem.remedy


def test_asyncdiff_stride_two_shares_a_round_between_two_steps(profiles: Profiles) -> None:
    """Of 50 steps one is synchronous; the other 49 take 49 rounds at stride 1 and 25 at stride 2 (paper: 49 and 25)."""
    job = denoising(profiles, "sd21", 768)
    rounds = [
        METHODS["asyncdiff"].phases(job, degree, {"stride": stride})[-1].rounds for degree, stride in ((2, 1), (3, 2))
    ]

    assert rounds == [49, 25]


def test_asyncdiff_warms_sdxl_up_for_three_steps(profiles: Profiles) -> None:
    """The default number of synchronous steps is 1, and 3 for SDXL."""
    warmups = [METHODS["asyncdiff"].phases(denoising(profiles, m, 1024), 2, {})[0].steps for m in ("sd15", "sdxl")]

    assert warmups == [1, 3]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=14), st.integers(1, 4))
def test_a_balanced_cut_is_the_best_cut(loads: list[int], parts: int) -> None:
    """No other contiguous cut has a lighter heaviest part (compared with all cuts)."""
    from itertools import combinations, pairwise

    parts = min(parts, len(loads))
    bounds = balanced_cut(loads, parts)

    def heaviest(cut: list[int]) -> int:
        return max(sum(loads[a:b]) for a, b in pairwise(cut))

    everything = ([0, *cut, len(loads)] for cut in combinations(range(1, len(loads)), parts - 1))
    assert len(bounds) == parts + 1
    assert heaviest(bounds) == min(map(heaviest, everything))


def test_no_cut_sends_nothing_and_more_cuts_send_more(profiles: Profiles) -> None:
    """Every further cut adds the tensors that cross it."""
    units = denoising(profiles, "sd15", 512).units
    sent = [boundary_elements(units, cuts) for cuts in ((), (12,), (12, 20), (12, 20, 30))]

    assert sent[0] == 0
    assert sent == sorted(sent)


@pytest.mark.parametrize(
    ("name", "degree", "options", "guided", "words"),
    [
        ("single", 2, {}, True, "exactly 1 GPU"),
        ("cfg_parallel", 3, {}, True, "1 or 2 GPUs"),
        ("cfg_parallel", 2, {}, False, "needs guidance"),
        ("distrifusion", 3, {}, True, "rows must divide"),
        ("distrifusion", 3, {"guidance_split": True}, True, "even number"),
        ("distrifusion", 2, {"sync_mode": "full"}, True, "full_sync"),
        ("distrifusion", 2, {"stride": 2}, True, "no such option"),
        ("pcpp", 2, {"partial": 1.5}, True, "from 0 to 1"),
        ("asyncdiff", 2, {"stride": 3}, True, "stride 1 or 2"),
        ("asyncdiff", 2, {"warmup_steps": -1}, True, "at least 1"),
        ("distrifusion", 0, {}, True, "at least 1"),
    ],
)
def test_what_is_illegal_is_refused_with_its_rule(
    profiles: Profiles, name: str, degree: int, options: dict[str, object], guided: bool, words: str
) -> None:
    """Each rule has its own sentence."""
    job = denoising(profiles, "sd15", 512, guided=guided)
    problems = METHODS[name].problems(job, degree, options)  # type: ignore[arg-type]

    assert any(words in str(problem) for problem in problems), problems


def test_twelve_rows_do_not_divide_by_eight(profiles: Profiles) -> None:
    """768 px has activations of 12 rows: eight GPUs are refused and the stripe counts that fit are named."""
    (problem,) = METHODS["distrifusion"].problems(denoising(profiles, "sd21", 768), 8, {})

    assert "12 rows do not divide by 8" in problem.rule
    assert "1, 2, 3, 4, 6, 12" in problem.remedy


def test_an_unknown_method_names_the_nearest() -> None:
    """A typing slip is answered with what was probably meant."""
    with pytest.raises(IllegalPlanError, match="distrifusion"):
        find_method("distrifuson")
