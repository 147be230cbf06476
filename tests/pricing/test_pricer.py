"""Laws of the price: parts sum to totals, switch steps trade sides, published arithmetic comes out."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import lru_cache
from math import exp, log
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import CLOUD, PHONE, REQUEST, hybrid
from hybridsd_sim import Plan, Profiles, Request, Site, Stage, load_profiles, load_scenario, price
from hybridsd_sim.errors import IllegalPlanError, MissingDataError
from hybridsd_sim.perf.partition import RankWork
from hybridsd_sim.perf.roofline import plain_kernels
from hybridsd_sim.perf.stage_time import constants_of, exchange_s
from hybridsd_sim.pricing import Candidate, PlanCost, PredictionQuery, find_candidates
from hybridsd_sim.pricing.prediction import predict_cost
from hybridsd_sim.pricing.pricer import COMPONENTS, End, batch_seconds, latent_transfer_bytes, serialisation_time
from hybridsd_sim.profiles import PublishedRow, derived, load_published

switch_steps = st.integers(0, 25)
UNGAPPED = replace(PHONE, runtime="onnxruntime")
"""The same phone under a runtime of which nobody published both components and end to end."""
ENDS: tuple[End, End] = ("serialise", "parse")


@given(switch_steps, st.sampled_from([None, "lte", "5g", "wifi6"]), st.booleans())
def test_parts_sum_to_every_total(profiles: Profiles, k: int, network: str | None, cold: bool) -> None:
    """Seconds, dollars, joules and bytes of the parts are the totals; nothing is negative."""
    cost = price(hybrid(k, network=network), REQUEST, profiles, cold=cold)

    assert cost.latency_s == pytest.approx(sum(p.seconds.value for p in cost.parts if p.critical))
    assert cost.usd == pytest.approx(sum(p.usd or 0.0 for p in cost.parts))
    assert cost.edge_energy_j == pytest.approx(sum(p.energy_j or 0.0 for p in cost.parts))
    assert cost.bytes_down == sum(p.bytes_down for p in cost.parts)
    assert cost.compute_s + cost.comm_exposed_s == pytest.approx(cost.denoise_s)
    assert all(0 <= p.seconds.low <= p.seconds.value <= p.seconds.high for p in cost.parts)


def test_switch_step_zero_does_no_denoising_in_the_cloud(profiles: Profiles) -> None:
    """k = 0 is edge-only: no GPU-second, no byte on the network."""
    cost = price(hybrid(0), REQUEST, profiles)

    assert cost.gpu_seconds == 0
    assert cost.bytes_up == cost.bytes_down == 0


def test_the_last_switch_step_does_none_at_the_edge(profiles: Profiles) -> None:
    """k = T is cloud-only: the edge does nothing but receive the picture."""
    cost = price(hybrid(25), REQUEST, profiles)

    assert all(part.tier != "edge" for part in cost.parts)
    assert cost.parts[-1].name == "image_transfer"


@given(st.integers(1, 23))
def test_a_later_switch_moves_work_to_the_cloud(profiles: Profiles, k: int) -> None:
    """One more cloud step adds its GPU-seconds and takes one step's joules from the phone."""
    earlier, later = (price(hybrid(step), REQUEST, profiles) for step in (k, k + 1))

    assert later.gpu_seconds > earlier.gpu_seconds
    assert (later.edge_energy_j or 0) < (earlier.edge_energy_j or 0)
    assert later.quality.clip.value >= earlier.quality.clip.value


@pytest.mark.parametrize(("k", "tera_flops"), [(25, 33.89), (10, 22.64), (5, 18.89), (0, 15.14)])
def test_hybrid_sd_arithmetic_is_the_published_one(profiles: Profiles, k: int, tera_flops: float) -> None:
    """SD 1.4 + 224M, 25 guided steps, attention products left out (Hybrid SD, table H1), counted from configs."""
    cost = price(hybrid(k), REQUEST, profiles)

    assert cost.flops_without_attention_products == pytest.approx(tera_flops * 1e12, rel=1e-3)
    assert cost.flops > cost.flops_without_attention_products


@given(st.sampled_from(["ddim", "euler", "dpmsolver++", "pndm"]), st.integers(1, 4), st.booleans())
def test_what_crosses_at_a_switch(profiles: Profiles, sampler: str, images: int, guided: bool) -> None:
    """A latent of 4 x H/8 x W/8 in fp16 an image, once more for each tensor of solver history, and the embeddings."""
    request = replace(REQUEST, sampler=sampler, num_images=images, guidance_scale=7.0 if guided else 1.0)
    model = profiles.model("sd14")
    history = {"ddim": 0, "euler": 0, "dpmsolver++": 1, "pndm": 3}[sampler]
    alone = latent_transfer_bytes(request, model, with_embedding=False)

    assert alone == 32_768 * images * (1 + history)
    assert latent_transfer_bytes(request, model, with_embedding=True) - alone == 118_272 * (2 if guided else 1)


def test_an_edge_that_encodes_the_prompt_spares_the_network(profiles: Profiles) -> None:
    """The embeddings travel only if the edge lacks them; its own encoding runs while the cloud works."""
    own = hybrid(10)
    sent = replace(own, text_encode_site="cloud")
    costs = [price(plan, REQUEST, profiles) for plan in (own, sent)]

    assert costs[1].bytes_down - costs[0].bytes_down == 2 * 118_272
    beside = next(part for part in costs[0].parts if part.name == "text_encode_edge")
    assert not beside.critical


@given(st.integers(1, 24))
def test_a_handover_costs_both_ends(profiles: Profiles, k: int) -> None:
    """The cloud serialises and is paid for it, the network carries, the phone parses and draws power for it."""
    cost = price(hybrid(k), REQUEST, profiles)
    parts = {part.name: part for part in cost.parts if part.name.startswith("handover")}
    serialise, send, parse = (parts[name] for name in ("handover_serialise", "handover", "handover_parse"))

    assert (serialise.tier, send.tier, parse.tier) == ("cloud", "network", "edge")
    assert serialise.usd
    assert parse.energy_j
    assert [part.name for part in cost.parts if part.name in parts] == list(parts)


def test_nothing_is_serialised_where_nothing_crosses(profiles: Profiles) -> None:
    """Cloud-only and edge-only plans hand nothing over."""
    for plan in (hybrid(0), hybrid(25)):
        assert not any(
            "serialise" in part.name or "parse" in part.name for part in price(plan, REQUEST, profiles).parts
        )


devices = st.sampled_from(["cpu-1core", "cpu-2core", "snapdragon-8-elite", "a100-sxm-80gb"])


@given(devices, st.sampled_from(ENDS), st.integers(1, 10**7), st.integers(0, 10**7))
def test_a_larger_payload_takes_no_less(profiles: Profiles, device: str, end: End, payload: int, more: int) -> None:
    """Seconds and both ends of their interval rise with the bytes, timed or not; the interval holds the seconds."""
    small, large = (serialisation_time(profiles, device, end, size) for size in (payload, payload + more))

    assert large.value >= small.value > 0
    assert all(a <= b for a, b in zip(small.interval, large.interval, strict=True))
    assert small.low <= small.value <= small.high


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_was_timed_takes_what_was_timed(profiles: Profiles, end: End) -> None:
    """The only row of a device is given back at its payload as measured, and in proportion, modelled, elsewhere."""
    (row,) = profiles.cost_rows(device="cpu-1core", component=f"handover_{end}")
    payload = row.comm_bytes or 0
    same, half = (serialisation_time(profiles, "cpu-1core", end, size) for size in (payload, payload // 2))

    assert (same.value, same.kind, same.sources) == (pytest.approx(row.seconds_median), "measured", (row.source,))
    assert same.interval == pytest.approx(row.seconds.interval)
    assert half.value == pytest.approx(same.value / 2)
    assert half.kind == "modelled"


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_nobody_timed_is_modelled_with_a_wide_interval(profiles: Profiles, end: End) -> None:
    """A gigabyte takes a second, give or take a factor."""
    found = serialisation_time(profiles, "snapdragon-8-elite", end, 10**9)

    assert (found.value, found.kind) == (pytest.approx(1.0), "modelled")
    assert found.interval == (0.0, pytest.approx(10.0))


@given(st.integers(0, 24), st.integers(1, 3))
def test_a_phones_overhead_is_a_share_of_its_own_components(profiles: Profiles, k: int, images: int) -> None:
    """End to end a phone takes more than its components: a part that costs latency and joules, not the cloud's."""
    cost = price(hybrid(k), replace(REQUEST, num_images=images), profiles)
    (overhead,) = (part for part in cost.parts if part.name == "device_overhead")
    law = profiles.runtime(PHONE.runtime)
    own = sum(p.seconds.value for p in cost.parts if p.where == PHONE.name and p.name in COMPONENTS)

    assert overhead.seconds.value == pytest.approx(law.overhead_share * own)
    assert overhead.seconds.interval == pytest.approx((law.overhead_low * own, law.overhead_high * own))
    assert (overhead.where, overhead.seconds.kind, overhead.critical) == (PHONE.name, "modelled", True)
    assert overhead.energy_j
    assert overhead.seconds.sources == (law.overhead_source,)


@pytest.mark.parametrize("k", [0, 10, 25])
def test_no_overhead_where_none_was_seen(profiles: Profiles, k: int) -> None:
    """A runtime without a published gap has none, and a cloud never has one."""
    stages = tuple(replace(s, site=UNGAPPED) if s.site == PHONE else s for s in hybrid(k).stages)
    cost = price(replace(hybrid(k), stages=stages), REQUEST, profiles)

    assert "device_overhead" not in {part.name for part in cost.parts}


def end_to_end() -> list[PublishedRow]:
    """Published seconds from prompt to picture of phones, tablets and computers that did not reload their models."""
    return [row for row in load_published().rows if row.table == "phones-end-to-end" and row.counts]


def on_the_edge(row: PublishedRow, profiles: Profiles) -> PlanCost:
    """The price of the plan that a published figure belongs to."""
    site = Site(name="here", tier="edge", device=row.device or "", runtime=row.runtime, precision=row.precision)
    stage = Stage(start=0, stop=row.num_inference_steps, model=row.model, site=site)
    plan = Plan(stages=(stage,), text_encode_site="here", vae_site="here")
    (side,) = row.sides_px
    request = Request(
        model=row.model, height_px=side, width_px=side, num_inference_steps=row.num_inference_steps,
        guidance_scale=7.5 if row.guidance else 1.0,
    )  # fmt: skip
    return price(plan, request, profiles)


@pytest.mark.parametrize("runtime", ["qnn", "coreml"])
def test_overheads_are_those_of_the_published_pairs(profiles: Profiles, runtime: str) -> None:
    """The catalogue's share is the geometric mean of end to end over components; the pairs lie in their intervals."""
    rows = [row for row in end_to_end() if row.runtime == runtime]
    costs = [on_the_edge(row, profiles) for row in rows]
    sums = [sum(part.seconds.value for part in cost.parts if part.name in COMPONENTS) for cost in costs]
    law = profiles.runtime(runtime)

    assert len(rows) >= 2
    mean = exp(fmean(log(row.value / seconds) for row, seconds in zip(rows, sums, strict=True))) - 1
    assert law.overhead_share == pytest.approx(mean, abs=0.02)
    for row, cost in zip(rows, costs, strict=True):
        low, high = cost.latency_interval_s
        assert low <= row.value <= high, row


@given(st.integers(1, 6), st.booleans(), st.sampled_from(["sd14", "hybrid-sd-224m"]))
def test_a_phone_denoises_images_one_after_the_other(profiles: Profiles, images: int, guided: bool, small: str) -> None:
    """A compiled call holds one latent, so that each image and each half of guidance takes the same again."""
    scale = 7.0 if guided else 1.0
    one, many = (
        price(hybrid(0, small=small), replace(REQUEST, guidance_scale=scale, num_images=n), profiles)
        for n in (1, images)
    )
    unguided = price(hybrid(0, small=small), replace(REQUEST, guidance_scale=1.0), profiles)

    assert many.denoise_s == pytest.approx(images * one.denoise_s)
    assert one.denoise_s == pytest.approx((2 if guided else 1) * unguided.denoise_s)


def test_a_gang_is_charged_for_all_its_gpus(profiles: Profiles) -> None:
    """Four GPUs cost four times the seconds they are held, text encoder and VAE included."""
    plan = hybrid(25, method="distrifusion", degree=4)
    cost = price(plan, REQUEST, profiles)
    held = sum(part.seconds.value for part in cost.parts if part.tier == "cloud")

    assert cost.gpu_seconds == pytest.approx(4 * held)


def test_degree_one_of_a_parallel_method_costs_what_single_costs(profiles: Profiles) -> None:
    """There is nothing to exchange and nothing to split."""
    costs = [price(hybrid(25, method=m, degree=1), REQUEST, profiles) for m in ("single", "distrifusion", "asyncdiff")]

    assert len({cost.denoise_s for cost in costs}) == 1


def test_a_cold_start_adds_the_model_load(profiles: Profiles) -> None:
    """GenTD26's median base-model load, 22.718 s, is added and charged."""
    warm, cold = (price(hybrid(10), REQUEST, profiles, cold=flag) for flag in (False, True))

    assert cold.latency_s - warm.latency_s == pytest.approx(22.718)
    assert cold.gpu_seconds - warm.gpu_seconds == pytest.approx(22.718)


def test_an_unknown_price_is_null_and_not_zero(profiles: Profiles) -> None:
    """A GPU that nobody sells has no dollars; the rest of the price stands."""
    unsold = next(g for g in profiles.gpus if profiles.gpu_price(g) is None and profiles.cost_rows(device=g))
    stage = Stage(start=0, stop=25, model="sd14", site=replace(CLOUD, device=unsold, runtime="eager"))
    cost = price(Plan(stages=(stage,), text_encode_site="cloud", vae_site="cloud"), REQUEST, profiles)

    assert cost.usd is None
    assert cost.latency_s > 0
    assert any("price" in why for why in cost.unknowns)


def test_a_device_that_nobody_timed_is_refused_or_flagged(profiles: Profiles) -> None:
    """Without rows and datasheet there is no price; with a datasheet there is one, modelled and out of domain."""
    unknown = replace(PHONE, device=next(n for n, d in profiles.edge_devices.items() if d.fp16_flop_per_s is None))
    rows = profiles.cost_rows(device=unknown.device)
    if not rows:
        stage = Stage(start=0, stop=25, model="sd14", site=unknown)
        with pytest.raises(MissingDataError, match="Timed devices"):
            price(Plan(stages=(stage,), text_encode_site="phone", vae_site="phone"), REQUEST, profiles)


@given(
    received=st.floats(0, 1e9),
    messages=st.integers(1, 200),
    blocking=st.integers(0, 200),
    window=st.sampled_from([0.0, 1 / 70, 1.0]),
    compute=st.floats(1e-4, 1.0),
)
def test_hidden_exchange_is_never_more_than_there_is(
    profiles: Profiles, received: float, messages: int, blocking: int, window: float, compute: float
) -> None:
    """What shows of an exchange lies between nothing and all of it; a blocking one shows whole."""
    rank = RankWork(
        kernels=plain_kernels(0.0, 0.0, 0.0, 0.0),
        latents=2,
        exchange="broadcasts",
        received_bytes=received,
        messages=messages,
        blocking_messages=min(blocking, messages),
        window=window,
    )
    constants, _ = constants_of(profiles)
    shown, total = exchange_s(rank, 1e10, 1e-5, compute, constants), received / 1e10 + messages * 1e-5

    assert 0 <= shown <= total * (1 + 1e-12)
    if window == 0.0 or blocking >= messages:
        assert shown == pytest.approx(total)


def test_a_quoted_step_is_used_as_it_stands(profiles: Profiles) -> None:
    """SDXL at 1024 px on one A100 in CUDA graphs takes 5.02 s for 50 steps (DistriFusion, figure 6)."""
    cost = predict_cost(PredictionQuery(model="sdxl", gpu="a100-sxm-80gb", runtime="cudagraph"), profiles)

    assert cost.denoise_s == pytest.approx(5.02)
    assert {part.seconds.kind for part in cost.denoise_parts} == {"quoted"}


def test_ones_own_step_replaces_every_other_source(profiles: Profiles) -> None:
    """With --measured-step-s the one-GPU loop is that step times the steps, and more GPUs are predicted from it."""
    ask = PredictionQuery(model="sdxl", gpu="l4", runtime="cudagraph", measured_step_s=0.5)
    one, two = (
        predict_cost(replace(ask, method=m, degree=d), profiles) for m, d in (("single", 1), ("distrifusion", 2))
    )

    assert one.denoise_s == pytest.approx(25.0)
    assert {part.seconds.kind for part in one.denoise_parts} == {"measured"}
    assert 12.5 < two.denoise_s < 25.0
    assert "--measured-step-s" in two.sources


@pytest.mark.parametrize(
    ("px", "published"), [(1024, {2: 3.35, 4: 2.26, 8: 1.77}), (2048, {2: 13.3, 4: 7.60, 8: 4.81})]
)
def test_distrifusion_is_near_its_paper(profiles: Profiles, px: int, published: dict[int, float]) -> None:
    """Seconds of 50 steps on 2, 4 and 8 A100 (DistriFusion, figure 6): in the published order, each within a fifth."""
    ask = PredictionQuery(model="sdxl", gpu="a100-sxm-80gb", runtime="cudagraph", method="distrifusion", height_px=px)
    predicted = {degree: predict_cost(replace(ask, degree=degree), profiles).denoise_s for degree in published}

    assert sorted(predicted, key=predicted.__getitem__) == sorted(published, key=published.__getitem__)
    for degree, seconds in published.items():
        assert predicted[degree] == pytest.approx(seconds, rel=0.2)


def test_a_slow_link_can_make_parallelism_pointless(profiles: Profiles) -> None:
    """The same eight GPUs are slower on PCIe 3 than through an NVLink switch, and more of the exchange shows."""
    ask = PredictionQuery(model="sdxl", gpu="a100-sxm-80gb", runtime="cudagraph", method="distrifusion", degree=8)
    fast, slow = (predict_cost(replace(ask, interconnect=link), profiles) for link in ("nvlink3-switch", "pcie3"))

    assert slow.denoise_s > fast.denoise_s
    assert slow.comm_exposed_s > fast.comm_exposed_s
    assert slow.comm_bytes == fast.comm_bytes


# ---- What is worked out once ----------------------------------------------------------------------------------------

SHIPPED = ("quickstart", "photo-app", "studio-2k", "cpu-2core", "gentd26")
GANGS = [("single", 1), ("cfg_parallel", 2), ("distrifusion", 4), ("pcpp", 2), ("asyncdiff", 3)]


@lru_cache
def shipped_candidates(profiles: Profiles) -> list[tuple[Candidate, tuple[str, ...]]]:
    """Every candidate of the shipped scenarios, with the sources that its scenario prefers."""
    scenarios = [load_scenario(name) for name in SHIPPED]
    return [
        (option, scenario.search.prefer_sources)
        for scenario in scenarios
        for options in find_candidates(scenario, profiles).by_class.values()
        for option in options
    ]


@settings(max_examples=25)
@given(st.data())
def test_a_candidate_costs_what_fresh_profiles_say(profiles: Profiles, data: st.DataObject) -> None:
    """To the last bit: of all candidates priced together, any is what profiles that were just loaded make of it."""
    option, prefer = data.draw(st.sampled_from(shipped_candidates(profiles)))

    assert price(option.plan, option.cost.request, load_profiles(), prefer=prefer) == option.cost


@settings(max_examples=25)
@given(
    k=st.integers(0, 25),
    gang=st.sampled_from(GANGS),
    images=st.integers(1, 3),
    guided=st.booleans(),
    network=st.sampled_from(["lte", "wifi6"]),
    cold=st.booleans(),
)
def test_a_price_is_the_same_whatever_was_asked_before(
    profiles: Profiles, k: int, gang: tuple[str, int], images: int, guided: bool, network: str, cold: bool
) -> None:
    """To the last bit, over plans and requests: profiles that priced all else say what fresh ones say."""
    request = replace(REQUEST, num_images=images, guidance_scale=7.0 if guided else 1.0)
    method, degree = gang if guided else ("distrifusion", 2)
    plan = hybrid(k, network=network, method=method, degree=degree)

    assert price(plan, request, profiles, cold=cold) == price(plan, request, load_profiles(), cold=cold)


def test_profiles_of_other_content_share_nothing(profiles: Profiles) -> None:
    """A user's own row changes the price asked of the new profiles, and not that of the old ones."""
    plan = hybrid(25)
    before = price(plan, REQUEST, profiles)
    row = profiles.step_row(CLOUD.device, CLOUD.runtime, "sd14", (512, 512), latents=2) or profiles.cost_rows()[0]
    own = row.model_copy(
        update={
            "device": CLOUD.device, "runtime": CLOUD.runtime, "model": "sd14", "precision": "fp16", "kind": "measured",
            "height_px": 512, "width_px": 512, "batch_size": 1, "guidance": True, "method": "single", "degree": 1,
            "seconds_median": 0.5, "seconds_p05": None, "seconds_p95": None,
        }
    )  # fmt: skip

    assert price(plan, REQUEST, profiles.with_costs([own])).denoise_s == pytest.approx(12.5)
    assert price(plan, REQUEST, profiles) == before


def test_profiles_travel_without_what_was_worked_out(profiles: Profiles) -> None:
    """Pickled profiles are as small as before the first price, and price the same."""
    fresh = load_profiles()
    size = len(pickle.dumps(fresh))
    cost = price(hybrid(10), REQUEST, fresh)
    travelled = pickle.loads(pickle.dumps(fresh))  # noqa: S301 our own bytes

    assert len(pickle.dumps(fresh)) == size
    assert price(hybrid(10), REQUEST, travelled) == cost


def test_what_is_remembered_stays_bounded() -> None:
    """A table holds no more than it may; what it forgot is worked out again."""
    own = load_profiles()
    asked: list[int] = []

    @derived(most=3)
    def worked_out(profiles: Profiles, key: int) -> int:
        asked.append(key)
        return key

    for key in (0, 1, 2, 0, 3, 0):
        assert worked_out(own, key) == key
    assert asked == [0, 1, 2, 3, 0]


def test_equal_options_of_another_type_are_told_apart(profiles: Profiles) -> None:
    """A stride of `true` is refused although it equals 1, also after a stride of 1 was priced."""
    right, wrong = (hybrid(25, method="asyncdiff", degree=3, options=(("stride", value),)) for value in (1, True))
    price(right, REQUEST, profiles)

    with pytest.raises(IllegalPlanError, match="whole number"):
        price(wrong, REQUEST, profiles)


# ---- Requests denoised together -------------------------------------------------------------------------------------


@given(k=st.integers(1, 25), gang=st.sampled_from(GANGS), cap=st.integers(1, 5), images=st.integers(1, 2))
def test_a_batch_is_priced_as_so_many_images(
    profiles: Profiles, k: int, gang: tuple[str, int], cap: int, images: int
) -> None:
    """One request takes the cloud's share of a price; n take that of n times the images, with n prompts."""
    request = replace(REQUEST, num_images=images)
    plan = replace(hybrid(k, method=gang[0], degree=gang[1]), batch_cap=cap)
    alone = price(plan, request, profiles)
    prompt_s = next(part.seconds.value for part in alone.parts if part.name == "text_encode")
    found = batch_seconds(plan, request, profiles)
    many = [price(plan, replace(request, num_images=images * n), profiles).cloud_s for n in range(1, cap + 1)]

    assert len(found) == cap
    assert found[0] == alone.cloud_s
    assert list(found) == sorted(found)
    for n, (seconds, images_s) in enumerate(zip(found, many, strict=True)):
        assert seconds >= images_s + n * prompt_s - 1e-9
    assert found[-1] == pytest.approx(max(images_s + n * prompt_s for n, images_s in enumerate(many)))


def test_a_batch_takes_no_less_where_rows_say_so(profiles: Profiles) -> None:
    """A measured batch of two that was faster than one request alone does not make two requests faster than one."""
    row = profiles.cost_rows(device=CLOUD.device, runtime=CLOUD.runtime, degree=1)[0]
    where = {
        "model": "sd14", "precision": "fp16", "height_px": 512, "width_px": 512, "guidance": True, "kind": "measured",
        "seconds_p05": None, "seconds_p95": None, "method": "single", "degree": 1,
    }  # fmt: skip
    rows = [
        row.model_copy(update={**where, "batch_size": batch, "seconds_median": seconds})
        for batch, seconds in ((1, 0.5), (2, 0.1))
    ]
    one, two = batch_seconds(replace(hybrid(25), batch_cap=2), REQUEST, profiles.with_costs(rows))

    assert two == one
