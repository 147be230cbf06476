import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from executors.models import SamplerState, build_sampler, resume, sampler_name, sampler_prediction, sampler_state
from executors.models.samplers import MAX_STEPS, SAMPLERS, history_size
from hybridsd_sim.errors import InputError
from hybridsd_sim.pricing.pricer import SOLVER_HISTORY

STEPS = 6


def noise_of(latents, step):
    """A stand-in for a UNet: depends on the latents and on the step, and is exact to repeat."""
    return torch.sin(latents * (step + 1)) + 0.1 * latents


def run(sampler, latents, start, stop):
    """The latents after steps `[start, stop)`."""
    for step in range(start, stop):
        timestep = sampler.timesteps[step]
        noise = noise_of(sampler.scale_model_input(latents, timestep), step)
        latents = sampler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def start_latents():
    """Seeded N(0, 1)."""
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("ddim", [801, 601, 401, 201, 1]),
        ("euler", [801, 601, 401, 201, 1]),
        ("dpmsolver++", [831, 665, 499, 333, 167]),
    ],
)
def test_timesteps_are_those_of_stable_diffusion_pipelines(name, timesteps):
    """Five steps begin and end where Stable Diffusion's own sampler configurations put them (leading, offset 1)."""
    sampler = build_sampler(name, 5)
    assert sampler.timesteps.tolist() == timesteps
    # The cumulative product of the scaled-linear betas at the last training step, as published with the checkpoints.
    assert sampler.alphas_cumprod[-1].item() == pytest.approx(0.004660, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sampler_finds_the_image_that_the_noise_belongs_to(name, prediction):
    """With the exact noise (or v) of a known image at every step, every sampler ends next to that image."""
    image = 0.5 * start_latents()
    sampler = build_sampler(name, 20, prediction=prediction)
    latents = torch.randn(image.shape, generator=torch.Generator().manual_seed(4)) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        alpha = sampler.alphas_cumprod[int(timestep)]
        standard = sampler.scale_model_input(latents, timestep)  # in every sampler: sqrt(a) image + sqrt(1 - a) noise
        noise = (standard - alpha**0.5 * image) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
        output = noise if prediction == "epsilon" else velocity
        latents = sampler.step(output, timestep, latents, return_dict=False)[0]
    remaining = (1 - sampler.alphas_cumprod[0]) ** 0.5 if name == "ddim" else 0.0
    assert (latents - image).abs().max() < 4 * remaining + 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, MAX_STEPS])
def test_sampler_stays_finite_at_the_limits_of_its_steps(name, steps):
    """A run of one step and one of the most steps allowed have distinct timesteps within the schedule."""
    sampler = build_sampler(name, steps)
    assert len(set(sampler.timesteps.tolist())) == steps
    assert max(sampler.timesteps.tolist()) <= 999
    assert run(sampler, start_latents(), 0, min(steps, 3)).isfinite().all()


@settings(max_examples=40)
@given(name=st.sampled_from(SAMPLERS), steps=st.integers(1, 20), data=st.data())
def test_resumed_sampler_goes_on_to_the_bit(name, steps, data):
    """A fresh sampler that resumes another's state at any step ends with the bits of the one that never stopped."""
    switch = data.draw(st.integers(0, steps))
    whole = run(build_sampler(name, steps), start_latents(), 0, steps)
    first, second = build_sampler(name, steps), build_sampler(name, steps)
    latents = run(first, start_latents(), 0, switch)
    resume(second, sampler_state(first), switch)
    assert getattr(second, "begin_index", switch) == switch  # not looked up by timestep
    assert torch.equal(run(second, latents, switch, steps), whole)


@pytest.mark.parametrize("switch", range(1, STEPS))
def test_without_its_history_a_second_order_sampler_ends_elsewhere(switch):
    """DPM-Solver++ needs its past output: restarted at a switch it ends elsewhere, unless the last step remains."""
    sampler = build_sampler("dpmsolver++", STEPS)
    latents = run(sampler, start_latents(), 0, switch)
    restarted = build_sampler("dpmsolver++", STEPS)
    restarted.set_begin_index(switch)
    whole = run(sampler, latents, switch, STEPS)
    assert torch.equal(run(restarted, latents, switch, STEPS), whole) == (switch == STEPS - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_history_is_what_the_planner_counts(name):
    """The tensors that cross a switch are as many as the planner prices, once a step was done, and none before."""
    sampler = build_sampler(name, STEPS)
    counts = [len(sampler_state(sampler).history)]
    latents = start_latents()
    for step in range(STEPS):
        latents = run(sampler, latents, step, step + 1)
        counts.append(len(sampler_state(sampler).history))
    assert counts == [0] + [SOLVER_HISTORY[name]] * STEPS
    assert counts == [history_size(name, step) for step in range(STEPS + 1)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_knows_its_name_and_prediction(name):
    """Name and prediction of a sampler come back in the words it was built with."""
    sampler = build_sampler(name, STEPS, prediction="v")
    assert (sampler_name(sampler), sampler_prediction(sampler)) == (name, "v")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddmi", 5, "epsilon"), "sampler: 'ddmi'; no such name in the catalogue. Did you mean ddim"),
        (
            ("ddim", 5, "v_prediction"),
            "prediction: 'v_prediction'; a UNet predicts epsilon or v",
        ),
        (("ddim", 0, "epsilon"), "num_inference_steps: 0; the schedule has 1000 training steps"),
        (("ddim", 999, "epsilon"), "num_inference_steps: 999; the schedule has 1000 training steps"),
    ],
)
def test_unknown_sampler_prediction_or_steps_are_refused(arguments, message):
    """A name that is not there, or a number of steps that the schedule does not have, is refused with what there is."""
    name, steps, prediction = arguments
    with pytest.raises(InputError) as caught:
        build_sampler(name, steps, prediction=prediction)
    assert message in str(caught.value)


def test_sampler_of_another_kind_is_refused():
    """A scheduler that this package does not build has no name here."""
    with pytest.raises(InputError, match="sampler: 'object'"):
        sampler_name(object())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (SamplerState((torch.zeros(1),), 2, 3), "sampler state: of step 3; the run goes on at step 2"),
        (SamplerState((), 2, 2), r"sampler history: 0 tensors; dpmsolver\+\+ carries 1 past model outputs into step 2"),
        (SamplerState((torch.zeros(1),) * 2, 2, 2), "sampler history: 2 tensors"),
        (SamplerState((torch.zeros(1),), 1, 2), r"sampler order: 1; dpmsolver\+\+ has order counter 2 at step 2"),
    ],
)
def test_state_that_does_not_fit_is_refused(state, message):
    """A state of another step, or with too little or too much history, is refused, not continued from."""
    with pytest.raises(InputError, match=message):
        resume(build_sampler("dpmsolver++", STEPS), state, 2)
