"""What the parallel methods promise: legal degrees, work per rank, traffic; the published figures among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridsd_sim import Profiles
from hybridsd_sim.errors import IllegalPlanError
from hybridsd_sim.perf import METHODS, Denoising, balanced_cut, boundary_elements, find_method, layer_table, unet_units
from hybridsd_sim.perf.partition import TIME_EMBEDDING, component_works, whole

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


ASYNCDIFF = {
    ("sd15", 512): {2: (65, (0.44, 0.56)), 3: (73, (0.31, 0.38, 0.31)), 4: (65, (0.22, 0.22, 0.31, 0.25))},
    ("sd21", 768): {2: (146, (0.47, 0.53)), 3: (129, (0.325, 0.384, 0.291)), 4: (188, (0.25, 0.27, 0.22, 0.26))},
    ("sdxl", 1024): {2: (257, (0.56, 0.44)), 3: (257, (0.35, 0.34, 0.31)), 4: (276, (0.29, 0.23, 0.24, 0.23))},
}
"""AsyncDiff's public cuts of a guided step: MB broadcast a round in fp16, and each component's share of the MACs.

Counted by hooks on the public code's modules (czg1225/AsyncDiff @61d2be1).
"""
CUTS = [(model, px, count) for (model, px), cuts in ASYNCDIFF.items() for count in cuts]


@pytest.mark.parametrize(("model", "px", "count"), CUTS)
def test_asyncdiff_broadcasts_what_its_public_code_lists(profiles: Profiles, model: str, px: int, count: int) -> None:
    """Every listed module's output travels in every round, to every rank: within 2% of what the code sends."""
    megabytes, _ = ASYNCDIFF[model, px][count]
    works = component_works(denoising(profiles, model, px), count, public_cut=True)

    assert {round(work.received_bytes) for work in works} == {round(works[0].received_bytes)}
    assert works[0].received_bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert all(work.window == 0 for work in works)  # broadcasts block


@pytest.mark.parametrize(("model", "px", "count"), CUTS)
def test_asyncdiff_components_are_those_of_its_public_code(profiles: Profiles, model: str, px: int, count: int) -> None:
    """Each component's share of the MACs, attention included, is the public cut's."""
    _, shares = ASYNCDIFF[model, px][count]
    job = denoising(profiles, model, px)
    works = component_works(job, count, public_cut=True)

    assert [work.macs / whole(job).macs for work in works] == pytest.approx(shares, abs=0.03)


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl", "koala-700m", "hybrid-sd-224m"])
def test_components_compute_everything_once(profiles: Profiles, model: str, count: int, public: bool) -> None:
    """FLOPs and launches of all components are the UNet's, and the time embedding's once for each of them."""
    job = denoising(profiles, model, 512)
    works = component_works(job, count, public_cut=public)
    shared = job.kernels(units=[TIME_EMBEDDING])

    repeated = (count - 1) * shared.flops
    assert len(works) == count
    assert sum(work.kernels.flops for work in works) == pytest.approx(whole(job).kernels.flops + repeated)
    assert sum(work.kernels.ops for work in works) == pytest.approx(whole(job).kernels.ops + (count - 1) * shared.ops)


@pytest.mark.parametrize(("model", "px", "count"), CUTS)
def test_a_balanced_cut_is_no_heavier_than_the_public_one_and_sends_less(
    profiles: Profiles, model: str, px: int, count: int
) -> None:
    """What contiguous parts allow at best, with only the tensors that cross: SDXL's public cut is not contiguous."""
    job = denoising(profiles, model, px)
    public, balanced = (component_works(job, count, public_cut=flag) for flag in (True, False))

    if model != "sdxl":
        assert max(work.macs for work in balanced) <= max(work.macs for work in public)
    assert balanced[0].messages > 1


def test_a_network_that_the_public_code_does_not_know_is_cut_evenly(profiles: Profiles) -> None:
    """Asking for the public cut of another network gives the balanced one; SD 1.4 is SD 1.5's network."""
    job = denoising(profiles, "koala-700m", 1024)
    sd14, sd15 = (denoising(profiles, model, 512) for model in ("sd14", "sd15"))

    assert component_works(job, 3, public_cut=True) == component_works(job, 3, public_cut=False)
    assert component_works(sd14, 3, public_cut=True) == component_works(sd15, 3, public_cut=True)


def test_asyncdiff_walks_over_cached_modules_once_for_each_step_of_a_round(profiles: Profiles) -> None:
    """A round of stride 2 passes through the network twice; the warm-up computes everything and walks over nothing."""
    job = denoising(profiles, "sd15", 512)
    for degree, stride in ((2, 1), (3, 2)):
        warmup, steady = METHODS["asyncdiff"].phases(job, degree, {"stride": stride})
        walked = [rank.reused_ops + rank.kernels.ops for rank in steady.ranks]
        assert walked == pytest.approx([stride * job.table.ops] * len(steady.ranks))
        assert [rank.reused_ops for rank in warmup.ranks] == [0]


@pytest.mark.parametrize("name", ["distrifusion", "pcpp"])
@pytest.mark.parametrize("degree", [2, 8])
def test_group_norms_exchange_as_their_mode_says(profiles: Profiles, name: str, degree: int) -> None:
    """Every attention and wide convolution sends a message; GroupNorms none, a free one, or one that all wait for."""
    job = denoising(profiles, "sdxl", 1024)
    layers = sum(bool(layer.kv_elements or layer.halo_elements) for layer in job.layers)
    norms = sum(layer.op == "group_norm" for layer in job.layers)
    steady = {
        mode: METHODS[name].phases(job, degree, {"sync_mode": mode})[-1].work
        for mode in ("separate_gn", "corrected_async_gn", "stale_gn", "sync_gn", "full_sync")
    }
    found = {mode: (work.messages, work.blocking_messages) for mode, work in steady.items()}

    assert found == {
        "separate_gn": (layers + 1, 1),
        "corrected_async_gn": (layers + norms + 1, 1),
        "stale_gn": (layers + norms + 1, 1),
        "sync_gn": (layers + norms + 1, norms + 1),
        "full_sync": (layers + norms + 1, layers + norms + 1),
    }


def test_without_synchronising_only_the_noise_travels(profiles: Profiles) -> None:
    """DistriFusion's no_sync freezes its buffers after the warm-up: the same work, one small gather."""
    job = denoising(profiles, "sdxl", 1024)
    warmup, steady = METHODS["distrifusion"].phases(job, 8, {"sync_mode": "no_sync"})

    assert steady.work.kernels == warmup.work.kernels
    assert steady.work.received_bytes == pytest.approx(job.noise_bytes() * 7 / 8)
    assert steady.work.messages == 1


@pytest.mark.parametrize(("degree", "stripes_seen"), [(2, 1.3), (4, 1.6), (8, 1.6)])
def test_pcpp_scores_its_own_stripe_and_a_part_of_each_neighbour(
    profiles: Profiles, degree: int, stripes_seen: float
) -> None:
    """With p = 0.3 an inner stripe sees 1.6 stripes of the keys and one of two 1.3, of the N that DistriFusion sees."""
    job = denoising(profiles, "sdxl", 1024)
    products = job.latents * sum(layer.macs for layer in job.layers if layer.op == "self_attention") / degree
    pcpp, distrifusion = (METHODS[name].phases(job, degree, {})[-1].work for name in ("pcpp", "distrifusion"))

    assert distrifusion.macs - pcpp.macs == pytest.approx(products * (1 - stripes_seen / degree))


@given(st.sampled_from([2, 4, 8]), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_part_of_the_neighbours_costs_more(profiles: Profiles, degree: int, one: float, other: float) -> None:
    """PCPP scores and receives no less with a larger part, at most what DistriFusion does."""
    job = denoising(profiles, "sdxl", 1024)
    less, more = (METHODS["pcpp"].phases(job, degree, {"partial": part})[-1].work for part in sorted((one, other)))
    everything = METHODS["distrifusion"].phases(job, degree, {})[-1].work

    assert less.macs <= more.macs <= everything.macs * (1 + 1e-12)
    assert less.received_bytes <= more.received_bytes <= everything.received_bytes * (1 + 1e-12)


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
