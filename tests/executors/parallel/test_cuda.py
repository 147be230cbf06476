"""The same laws on a GPU, all ranks in one process on one card: `make gpu`.

In float32 the errors are those of rounding; in bfloat16, in which images are made, a few parts in a hundred of the
latents' size, since every layer rounds to eight bits.
"""

from __future__ import annotations

import pytest
import torch

from executors.models import build_sampler, build_unet, seeded_conditioning, seeded_latents
from executors.parallel import Alone, SingleDenoiser, denoise, run_ranks
from executors.profiling.measure import prepare_unet
from hybridsd_sim.perf.parallel_methods import SYNC_MODES
from hybridsd_sim.profiles import load_profiles
from rank_work import Case, run_case, run_cases

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]
DEVICE = "cuda"
STEPS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
EXACT_CASES = [
    *((degree, "distrifusion", {"sync_mode": "full_sync"}) for degree in (2, 3, 4)),
    *((2, "pcpp", {"sync_mode": mode, "warmup_steps": STEPS}) for mode in SYNC_MODES),
    (4, "distrifusion", {"sync_mode": "full_sync", "guidance_split": True}),
    (2, "cfg_parallel", {}),
    (3, "asyncdiff", {"warmup_steps": STEPS}),
]
STALE_CASES = [
    *(("distrifusion", {"sync_mode": mode, "warmup_steps": 2}) for mode in SYNC_MODES),
    ("pcpp", {"warmup_steps": 2}),
    ("asyncdiff", {"warmup_steps": 2}),
    ("asyncdiff", {"warmup_steps": 2, "stride": 2}),
]


@pytest.fixture(autouse=True)
def exact_arithmetic() -> None:
    """No TF32: float32 means float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("degree", "method", "options"), EXACT_CASES)
def test_what_is_exact_on_a_cpu_is_exact_on_a_gpu(degree, method, options, dtype):
    """Everything gathered, or every step synchronous: what one device computes."""
    case = Case(method, options, steps=STEPS, dtype=dtype)
    whole = run_case(Alone(DEVICE), Case(steps=STEPS, dtype=dtype)).latents[-1]
    for rank in run_ranks(run_case, degree, args=(case,), device=DEVICE):
        assert error(rank.latents[-1], whole) < TOLERANCE[dtype]


@pytest.mark.parametrize(("method", "options"), STALE_CASES)
def test_a_gpu_goes_stale_as_a_cpu_does(method, options):
    """The same weights on both devices: after every step the same latents, and the same bytes between the ranks."""
    degree = 3
    case = Case(method, options, steps=STEPS)
    to_cpu = run_ranks(run_case, degree, args=(case,))
    on_gpu = run_ranks(run_case, degree, args=(case,), device=DEVICE)
    for there, here in zip(to_cpu, on_gpu, strict=True):
        assert max(error(a, b) for a, b in zip(here.latents, there.latents, strict=True)) < TOLERANCE[torch.float32]
        assert here.traffic == there.traffic


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_compiled_step_is_an_eager_step(name):
    """Compiled into CUDA graphs, a real UNet in bfloat16 predicts the same noise, again and again."""
    unet = build_unet(load_profiles().model(name).config, device=DEVICE, dtype=torch.bfloat16)
    conditioning = seeded_conditioning(unet, guidance_scale=5.0)
    latents = seeded_latents(unet, images=1, height_px=512, width_px=512)
    eager = denoise(SingleDenoiser(unet, conditioning), build_sampler("ddim", STEPS, device=DEVICE), latents)
    compiled = SingleDenoiser(prepare_unet(unet, "compiled"), conditioning)
    for _ in range(2):
        ours = denoise(compiled, build_sampler("ddim", STEPS, device=DEVICE), latents)
        assert error(ours, eager) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_processes_over_nccl_compute_what_loopback_does():
    """Two real GPUs: the same latents and bytes as two ranks in turn on one."""
    cases = [Case(method, options, steps=STEPS) for method, options in STALE_CASES[:-1]]
    over_nccl = run_ranks(run_cases, 2, kind="nccl", args=(cases,))
    in_turn = run_ranks(run_cases, 2, args=(cases,), device=DEVICE)
    for there, here in zip(over_nccl[0], in_turn[0], strict=True):
        assert error(there.latents[-1], here.latents[-1]) < TOLERANCE[torch.float32]
        assert there.traffic == here.traffic
