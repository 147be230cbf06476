from functools import lru_cache
from itertools import chain, pairwise, zip_longest

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from executors.models import build_sampler, build_unet, plain_config, replica, seeded_conditioning, seeded_latents
from executors.parallel import (
    Alone,
    AsyncDiffDenoiser,
    Denoiser,
    SingleDenoiser,
    denoise,
    denoising_of,
    resolve_settings,
    run_ranks,
)
from executors.parallel import asyncdiff as components
from executors.parallel.asyncdiff import cut_by_macs, cut_by_time, incoming_elements, time_units, unit_modules
from executors.parallel.denoiser import apply_guidance, predict_noise
from hybridsd_sim.errors import InputError
from hybridsd_sim.perf import unet_units
from small_models import SMALL, SMALLER

TIMED = {**SMALL, "block_out_channels": [64, 64]}
"""Two channels a group of the norms: one alone would lose what the time embedding adds to it."""
MIDLESS = {**SMALLER, "block_out_channels": [64, 64]}
PLAIN_MID = {**TIMED, "mid_block_type": "UNetMidBlock2D", "use_linear_projection": True}
DEEP = {
    **SMALL,
    "block_out_channels": [64, 64, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [1, 1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
"""SDXL's ways: no attention at the first level, several transformer blocks, pooled text and sizes."""
CONFIGS = {"small": TIMED, "midless": MIDLESS, "plain mid": PLAIN_MID, "deep": DEEP}
HEIGHT_PX, WIDTH_PX = 128, 64
TIMESTEPS = torch.tensor([900, 760, 610, 450, 300, 170, 60])
STEPS = len(TIMESTEPS)
SHAPES = [(2, 1), (3, 1), (4, 1), (3, 2), (4, 2)]
"""Every legal degree with its stride."""


@lru_cache
def unet_of(name="small", dtype=torch.float32):
    """A UNet that carries no hooks; ranks work on replicas."""
    return build_unet(CONFIGS[name], seed=5, dtype=dtype)


def list_units(unet):
    """The units at the size of the tests."""
    return unet_units(plain_config(unet.config), HEIGHT_PX, WIDTH_PX)


def latents_of(unet, seed=0):
    """Seeded latents of one image."""
    return seeded_latents(unet, images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX, seed=seed)


def conditioning_of(unet, guidance_scale=4.0):
    """Seeded conditioning, guided unless the scale is 1."""
    return seeded_conditioning(unet, images=1, guidance_scale=guidance_scale, seed=2)


def options(stride=1, warmup_steps=1):
    """The method's settings."""
    return {"stride": stride, "warmup_steps": warmup_steps}


def cut_of(unet, degree, stride=1):
    """The planner's cut for so many ranks."""
    return cut_by_macs(list_units(unet), degree - stride + 1)


class LinearSampler:
    """A straight step along the noise: enough of a sampler that every step's noise moves the latents."""

    def __init__(self, timesteps=TIMESTEPS):
        self.timesteps = timesteps

    def scale_model_input(self, latents, timestep):
        return latents

    def step(self, noise, timestep, latents, return_dict):
        return (latents - 0.2 * noise,)


def run_rank(group, name, settings, bounds, start, stop, dtype=torch.float32):
    """One rank's latents after every step, and the bytes that it had sent and received by then."""
    unet = replica(unet_of(name, dtype))
    denoiser = AsyncDiffDenoiser(unet, conditioning_of(unet).to("cpu", dtype), group, settings=settings, bounds=bounds)
    latents, traffic = [], []

    def on_step(step, after):
        latents.append(after)
        traffic.append((group.traffic.sent_bytes, group.traffic.received_bytes))

    denoise(denoiser, LinearSampler(), latents_of(unet), start=start, stop=stop, on_step=on_step)
    return torch.stack(latents), traffic


def run_asyncdiff(degree, *, name="small", stride=1, warmup_steps=1, bounds=None, start=0, stop=STEPS, **more):
    """Every rank's latents after every step, and its traffic."""
    bounds = bounds or cut_of(unet_of(name), degree, stride)
    args = (name, options(stride, warmup_steps), bounds, start, stop, *more.values())
    return run_ranks(run_rank, degree, args=args)


def run_alone(denoiser, unet, *, start=0, stop=STEPS):
    """The latents after every step of a denoiser that needs no company."""
    latents = []
    denoise(
        denoiser,
        LinearSampler(),
        latents_of(unet),
        start=start,
        stop=stop,
        on_step=lambda _, after: latents.append(after),
    )
    return torch.stack(latents)


@lru_cache
def run_single(name="small"):
    """The latents after every step of one device."""
    unet = unet_of(name)
    return run_alone(SingleDenoiser(unet, conditioning_of(unet)), unet)


def assert_close(ours, theirs):
    """Equal but for the order of sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- The paper's method told another way ----------------------------------------------------------------------------


def walk(unet):
    """Every unit's module in execution order, with the unit's name, from the structure of diffusers' model itself."""
    yield "conv_in", unet.conv_in
    for number, block in enumerate(unet.down_blocks):
        yield from walk_block(block, f"down{number}", "downsampler")
    if unet.mid_block is not None:
        yield from walk_block(unet.mid_block, "mid", None)
    for number, block in enumerate(unet.up_blocks):
        yield from walk_block(block, f"up{number}", "upsampler")
    yield "conv_out", unet.conv_out


def walk_block(block, name, sampler):
    """A block's units: pairs of a resnet and an attention block, then the sampler."""
    for index, pair in enumerate(zip_longest(block.resnets, getattr(block, "attentions", []))):
        for kind, module in zip(("resnet", "attention"), pair, strict=True):
            if module is not None:
                yield f"{name}.{kind}{index}", module
    for module in (sampler and getattr(block, f"{sampler}s")) or []:
        yield f"{name}.{sampler}", module


def activations(unet, conditioning, latents, timestep, given):
    """Every unit's output in one whole evaluation, where the units in `given` put out what stands there instead."""
    seen = {}

    def substitute(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output
            if name in given:
                return (given[name],) if isinstance(output, tuple) else given[name]
            return None

        return hook

    handles = [module.register_forward_hook(substitute(name)) for name, module in walk(unet)]
    predict_noise(unet, latents, timestep, conditioning)
    for handle in handles:
        handle.remove()
    return seen


class Reenactment(Denoiser):
    """AsyncDiff in one place, from whole evaluations in which stored outputs replace what others would compute.

    The paper, stride 1: the noise of step i comes from component N at timestep t_i, fed by what component N - 1 put out
    at step i - 1, which was fed by what component N - 2 put out at step i - 2, and so on; skip connections between
    components are one step old like any input; the first component reads the latent of its own step. At the first step
    after the synchronous ones, what is one step old is what the whole UNet put out in the last of these.

    Stride 2: steps go in pairs. At the first step i of a pair every component runs once, on the latent x_i but for
    timestep t_{i+1}, on inputs one pair old; the last component runs once more for t_i on the same inputs. That gives
    the noise of step i; the noise of step i + 1 is what the last component put out for t_{i+1}, from x_i.
    """

    def __init__(self, unet, conditioning, *, bounds, stride, warmup_steps):
        self.unet, self.conditioning, self.stride, self.synchronous_left = unet, conditioning, stride, warmup_steps
        names = ["time_embedding", *(name for name, _ in walk(unet))]
        self.parts = [names[start:stop] for start, stop in pairwise(bounds)]
        self.noises = []

    def begin(self, timesteps):
        self.timesteps = timesteps

    def component(self, number, latents, timestep):
        """What the units of one component put out now, on everyone else's outputs of the round before."""
        part = self.parts[number]
        given = {name: output for name, output in self.before.items() if name not in part}
        seen = activations(self.unet, self.conditioning, latents, timestep, given)
        return {name: seen[name] for name in part if name in seen}

    def round(self, latents, step):
        """The noises of the next `stride` steps."""
        last = len(self.parts) - 1
        extra = [self.component(last, latents, self.timesteps[step])["conv_out"]] if self.stride == 2 else []
        ahead = step + self.stride - 1
        if ahead == len(self.timesteps):
            return extra
        outputs = [self.component(number, latents, self.timesteps[ahead]) for number in range(len(self.parts))]
        self.before = {name: output for part in outputs for name, output in part.items()}
        return [*extra, self.before["conv_out"]]

    def noise(self, latents, step, timestep):
        if self.synchronous_left:
            self.synchronous_left -= 1
            self.before = activations(self.unet, self.conditioning, latents, timestep, {})
            return apply_guidance(self.before["conv_out"], self.conditioning.guidance_scale, torch.float32)
        self.noises = self.noises or self.round(latents, step)
        return apply_guidance(self.noises.pop(0), self.conditioning.guidance_scale, torch.float32)


def reenact(name, bounds, *, stride, warmup_steps, start=0, stop=STEPS):
    """The latents after every step as the paper would have them."""
    unet = replica(unet_of(name))
    told = Reenactment(unet, conditioning_of(unet), bounds=bounds, stride=stride, warmup_steps=warmup_steps)
    return run_alone(told, unet, start=start, stop=stop)


# ---- The method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degree", "stride"), [(2, 1), (4, 1), (3, 2)])
def test_a_run_of_synchronous_steps_only_is_single(degree, stride):
    """Every rank computes the whole UNet in synchronous steps, to the bit as a rank alone, and nothing travels."""
    for latents, traffic in run_asyncdiff(degree, stride=stride, warmup_steps=STEPS):
        assert torch.equal(latents, run_single())
        assert traffic[-1] == (0, 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_degree_1_is_single(stride):
    """A rank alone has the whole UNet, whatever the stride: to the bit the same latents and no traffic."""
    unet = unet_of()
    [(latents, traffic)] = run_asyncdiff(1, stride=stride, bounds=[0, len(list_units(unet))])
    assert torch.equal(latents, run_single())
    assert traffic[-1] == (0, 0)


@pytest.mark.parametrize(
    ("name", "degree", "stride"),
    [*(("small", *shape) for shape in SHAPES), ("midless", 3, 1), ("plain mid", 3, 2), ("deep", 3, 1), ("deep", 4, 2)],
)
def test_every_step_is_that_of_the_paper(name, degree, stride):
    """All ranks have, step after step, the latents of the slow re-enactment."""
    bounds = cut_of(unet_of(name), degree, stride)
    expected = reenact(name, bounds, stride=stride, warmup_steps=2)
    for latents, _ in run_asyncdiff(degree, name=name, stride=stride, warmup_steps=2):
        assert_close(latents, expected)
    assert not torch.allclose(expected[-1], run_single(name)[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("start", "stop", "warmup_steps"), [(0, 6, 1), (0, 7, 1), (3, 6, 1), (3, 7, 1), (2, 7, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_stage_has_its_own_synchronous_steps_and_its_own_end(stride, start, stop, warmup_steps):
    """A stage in the middle of a run starts synchronously, and a pair that its end cuts short is only a first half."""
    bounds = cut_of(unet_of(), 3, stride)
    expected = reenact("small", bounds, stride=stride, warmup_steps=warmup_steps, start=start, stop=stop)
    for latents, _ in run_asyncdiff(3, stride=stride, warmup_steps=warmup_steps, start=start, stop=stop):
        assert_close(latents, expected)


def constant_noises(group, bounds, stride):
    """The last of many noises of the same latents and timestep, after a synchronous step with others."""
    unet = replica(unet_of())
    denoiser = AsyncDiffDenoiser(unet, conditioning_of(unet, 1.0), group, settings=options(stride), bounds=bounds)
    rounds = len(bounds)  # the pipeline is full once the first component's output has passed through all
    timesteps = torch.tensor([900, *[300] * rounds * stride])
    denoiser.begin(timesteps)
    with torch.inference_mode():
        noises = [denoiser.noise(latents_of(unet, seed=min(step, 1)), step, t) for step, t in enumerate(timesteps)]
    return noises[-1]


@st.composite
def cuts(draw):
    """Bounds of any cut into two to four components."""
    count = len(list_units(unet_of()))
    inner = draw(st.lists(st.integers(1, count - 1), min_size=1, max_size=3, unique=True))
    return [0, *sorted(inner), count]


@given(bounds=cuts(), stride=st.sampled_from([1, 2]))
@settings(max_examples=12)
def test_components_are_together_the_whole_wherever_the_cuts_are(bounds, stride):
    """Once nothing that is stale differs from what is fresh, the noise is that of the whole UNet."""
    unet = unet_of()
    with torch.inference_mode():
        expected = predict_noise(unet, latents_of(unet, seed=1), torch.tensor(300), conditioning_of(unet, 1.0))
    for noise in run_ranks(constant_noises, len(bounds) - 2 + stride, args=(bounds, stride)):
        assert_close(noise, expected)


@pytest.mark.parametrize(("degree", "stride"), [(2, 1), (3, 2)])
def test_more_synchronous_steps_bring_the_result_closer_to_single(degree, stride):
    """Every synchronous step more lowers the distance to the latents of one device."""
    single = run_single()[-1]
    errors = [
        (run_asyncdiff(degree, stride=stride, warmup_steps=steps)[0][0][-1] - single).norm().item()
        for steps in (1, 3, 5, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0.0


def twice(group, bounds, first_steps):
    """The latents of a run that follows another one of another size, given up after some steps."""
    unet = replica(unet_of())
    denoiser = AsyncDiffDenoiser(unet, conditioning_of(unet), group, settings=options(), bounds=bounds)
    denoiser.begin(TIMESTEPS)
    with torch.inference_mode():
        for step, timestep in enumerate(TIMESTEPS[:first_steps]):
            denoiser.noise(torch.ones(1, 4, 16, 16), step, timestep)
    return run_alone(denoiser, unet)


@pytest.mark.parametrize("first_steps", [1, 3, STEPS])
def test_a_new_run_forgets_the_one_before(first_steps):
    """Whether the earlier run was finished or given up with tensors on their way, the next one is as if first."""
    bounds = cut_of(unet_of(), 3)
    expected = run_asyncdiff(3)[0][0]
    for latents in run_ranks(twice, 3, args=(bounds, first_steps)):
        assert torch.equal(latents, expected)


# ---- What a rank computes and sends ---------------------------------------------------------------------------------


def macs_of_a_step(denoiser, latents, step):
    """The multiply-accumulates of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser.noise(latents, step, TIMESTEPS[step])
    return counter.get_total_flops() // 2


def macs_of_steps(group, bounds, stride, warmup_steps=1):
    """The multiply-accumulates of every step of a rank."""
    unet = replica(unet_of())
    denoiser = AsyncDiffDenoiser(
        unet, conditioning_of(unet), group, settings=options(stride, warmup_steps), bounds=bounds
    )
    denoiser.begin(TIMESTEPS)
    return [macs_of_a_step(denoiser, latents_of(unet), step) for step in range(STEPS)]


@pytest.mark.parametrize(("degree", "stride"), SHAPES)
def test_a_round_computes_every_unit_once(degree, stride):
    """The components' work adds up to the UNet's, save for the time embedding, which is every rank's.

    With stride 2 the extra rank repeats the last component, and nobody computes in the second step of a pair.
    """
    unet = unet_of()
    whole = macs_of_a_step(SingleDenoiser(unet, conditioning_of(unet)), latents_of(unet), 0)
    embedding = list_units(unet)[0].macs * 2  # of both branches
    ranks = run_ranks(macs_of_steps, degree, args=(cut_of(unet, degree, stride), stride))
    components = ranks[: degree - stride + 1]
    assert all(rank[0] == whole for rank in ranks)
    for step in range(1, STEPS, stride):
        assert sum(rank[step] - embedding for rank in components) == whole - embedding
    if stride == 2:
        assert ranks[-1][1::2] == ranks[-2][1::2]
        assert all(rank[2::2] == [0] * (STEPS // 2) for rank in ranks)


def test_an_odd_last_step_is_the_extra_ranks_alone():
    """With no second step to work for, the other ranks of stride 2 compute nothing; here five steps make pairs."""
    unet = unet_of()
    bounds = cut_of(unet, 3, 2)
    *others, extra = [steps[-1] for steps in run_ranks(macs_of_steps, 3, args=(bounds, 2, 2))]
    assert others == [0, 0]
    assert extra > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("degree", "stride"), SHAPES)
def test_the_bytes_are_those_of_the_formula(degree, stride, dtype):
    """In every round a rank receives the tensors that its component reads and, unless it has it, the noise of a step.

    No tensors come before the first round, whose inputs are those of the last synchronous step, and none are sent in
    the last round, which nothing follows. Guidance doubles everything.
    """
    unet = unet_of()
    bounds, warmup_steps = cut_of(unet, degree, stride), 2
    incoming = incoming_elements(list_units(unet), bounds)
    noise = 2 * latents_of(unet).numel() * dtype.itemsize
    steps = STEPS - warmup_steps
    exchanges = -(-steps // stride) - 1
    runs = run_asyncdiff(degree, stride=stride, warmup_steps=warmup_steps, dtype=dtype)
    total_sent, total_received = (sum(traffic[-1][way] for _, traffic in runs) for way in (0, 1))
    assert total_sent == total_received
    for rank, (_, traffic) in enumerate(runs):
        sources = [degree - 1 - step % stride for step in range(steps)]
        arrived = incoming[min(rank, degree - stride)] * 2 * dtype.itemsize * exchanges
        noises = noise * sum(source != rank for source in sources)
        assert traffic[warmup_steps - 1] == (0, 0)
        assert traffic[-1][1] == arrived + noises


def test_what_arrives_is_the_activation_and_the_open_skip_connections():
    """Cut in the middle, the second half of the small UNet reads the mid block's output and every skip."""
    units = list_units(unet_of())
    by_name = {unit.name: unit.out_elements for unit in units}
    bounds = [0, [*by_name].index("up0.resnet0"), len(units)]
    skips = ["conv_in", "down0.attention0", "down0.downsampler", "down1.resnet0"]
    assert incoming_elements(units, bounds) == (0, sum(by_name[name] for name in ["mid.resnet1", *skips]))


@given(bounds=cuts())
def test_a_component_receives_less_than_everything_before_it(bounds):
    """The first component receives nothing; each later one at least the activation at its cut, none a tensor twice."""
    units = list_units(unet_of())
    first, *later = incoming_elements(units, bounds)
    assert first == 0
    for cut, elements in zip(bounds[1:-1], later, strict=True):
        activation = units[cut - 1].out_elements if cut > 1 else 0
        assert activation <= elements <= sum(unit.out_elements for unit in units[1:cut])


# ---- Units and cuts -------------------------------------------------------------------------------------------------


def params(modules):
    """How many parameters modules have together."""
    return sum(tensor.numel() for module in modules for tensor in module.parameters())


def assert_units_are_the_modules(unet):
    """Unit by unit the parameters are the modules', and no module is left over."""
    units = unet_units(plain_config(unet.config), 512, 512)
    modules = {unit.name: unit_modules(unet, unit.name) for unit in units}
    assert {name: params(parts) for name, parts in modules.items()} == {unit.name: unit.params for unit in units}
    assert params(chain(*modules.values())) == params([unet])


@pytest.mark.parametrize("name", CONFIGS)
def test_units_are_modules_of_diffusers(name):
    """Every unit has the modules with its parameters and its output, in execution order; none is left over."""
    unet = replica(unet_of(name))
    assert_units_are_the_modules(unet)
    units = list_units(unet)[1:]
    with torch.inference_mode():
        seen = activations(unet, conditioning_of(unet, 1.0), latents_of(unet), torch.tensor(5), {})
    assert [(unit.name, unit.out_elements) for unit in units] == [(name, out.numel()) for name, out in seen.items()]
    assert [unit_modules(unet, unit.name)[-1] for unit in units] == [module for _, module in walk(unet)]


def test_units_are_modules_in_every_shipped_model(profiles):
    """The published UNets too, pruned ones among them."""
    for model in profiles.models.values():
        assert_units_are_the_modules(build_unet(model.config, device="meta"))


@pytest.mark.parametrize(
    "bounds", [[0, 17], [0, 5, 5, 17], [0, 9, 5, 17], [1, 5, 9, 17], [0, 5, 9, 16], [0, 5, 9, 18], [0, 3, 5, 9, 17], []]
)
def test_bounds_that_do_not_cut_the_units_are_refused(bounds):
    """Three components need four bounds that rise from 0 to the number of units."""

    def build(group):
        AsyncDiffDenoiser(replica(unet_of()), conditioning_of(unet_of()), group, settings=options(), bounds=bounds)

    with pytest.raises(InputError, match="must rise from 0 to 17"):
        run_ranks(build, 3)


def test_the_settings_are_those_of_the_method():
    """What `resolve_settings` makes of no options at all is enough to build a rank."""
    unet = replica(unet_of())
    conditioning = conditioning_of(unet)
    job = denoising_of(unet, conditioning, images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX, steps=STEPS)
    legal = resolve_settings("asyncdiff", job, 1, {})
    denoiser = AsyncDiffDenoiser(unet, conditioning, Alone(), settings=legal, bounds=[0, len(job.units)])
    assert (denoiser.stride, denoiser.warmup_steps) == (1, 1)


def measured_bounds(group, name):
    """One rank's bounds from measured cost."""
    unet = unet_of(name)
    return cut_by_time(unet, conditioning_of(unet), group, latents_of(unet), group.size)


def test_every_rank_cuts_by_what_rank_0_measured(monkeypatch):
    """One rank measures, once; the others get its cut, whose slowest component is fastest."""
    calls = []
    seconds = [0.0, *[1e-3] * 15, 20e-3]

    def fake(*args):
        calls.append(args)
        return seconds

    monkeypatch.setattr(components, "time_units", fake)
    assert run_ranks(measured_bounds, 3, args=("small",)) == [[0, 8, 16, 17]] * 3
    assert len(calls) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_unit_but_the_time_embedding_costs_time(name):
    """Costs are measured unit by unit, on a copy: the UNet is left without hooks."""
    unet = unet_of(name)
    embedding, *others = time_units(unet, conditioning_of(unet), latents_of(unet))
    assert embedding == 0.0
    assert len(others) == len(list_units(unet)) - 1
    assert all(seconds > 0.0 for seconds in others)
    replica(unet)


def test_measured_bounds_run():
    """A cut from measured times is one that ranks can run."""
    bounds = run_ranks(measured_bounds, 2, args=("deep",))
    assert bounds[0] == bounds[1]
    expected = reenact("deep", bounds[0], stride=1, warmup_steps=1)
    assert_close(run_asyncdiff(2, name="deep", bounds=bounds[0])[1][0], expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_real_samplers_step_alike_on_all_ranks(sampler):
    """Whatever the sampler, every rank ends with the same latents to the bit."""
    ends = run_ranks(run_with_sampler, 3, args=(sampler,))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert ends[0].isfinite().all()


def run_with_sampler(group, name):
    """One rank's latents at the end of a run with stride 2."""
    unet = replica(unet_of())
    denoiser = AsyncDiffDenoiser(unet, conditioning_of(unet), group, settings=options(2), bounds=cut_of(unet, 3, 2))
    sampler = build_sampler(name, 6)
    return denoise(denoiser, sampler, latents_of(unet) * sampler.init_noise_sigma)
