"""Loopback against real processes: for every method and mode, step by step, the same latents and the same bytes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from executors.parallel import run_ranks
from hybridsd_sim.perf.parallel_methods import SYNC_MODES
from rank_work import Case, run_cases

PATCHES = [
    Case(method, {"sync_mode": mode, "warmup_steps": 2})
    for method, mode in product(("distrifusion", "pcpp"), SYNC_MODES)
]
OTHERS = [
    Case("pcpp", {"warmup_steps": 1, "whole_stripes": True}, sampler="euler"),
    Case("pcpp", {"warmup_steps": 1, "partial": 0.6}, guidance_scale=1.0),
    Case("distrifusion", {"warmup_steps": 1, "unbiased_variance": True}, sampler="dpmsolver++"),
    Case("asyncdiff", {"warmup_steps": 2}),
    Case("asyncdiff", {"warmup_steps": 1}, sampler="dpmsolver++"),
]
SPLIT = [Case(method, {"warmup_steps": 2, "guidance_split": True}) for method in ("distrifusion", "pcpp")]
STRIDE_2 = [Case("asyncdiff", {"warmup_steps": 1, "stride": 2}, steps=steps) for steps in (5, 6)]

CASES = {
    2: [*PATCHES, *OTHERS, *SPLIT, Case("cfg_parallel")],
    3: [*PATCHES[2:9:6], *OTHERS, *STRIDE_2],
    4: [*PATCHES[1:9:7], Case("asyncdiff", {"warmup_steps": 2}), *SPLIT, *STRIDE_2],
}


@pytest.mark.parametrize("degree", CASES)
def test_loopback_computes_and_counts_what_processes_do(degree):
    """A rank's latents after every step and its bytes do not depend on what carries them."""
    over_gloo = run_ranks(run_cases, degree, kind="gloo", args=(CASES[degree],), threads=1)
    in_turn = run_ranks(run_cases, degree, args=(CASES[degree],))
    for rank, (theirs, ours) in enumerate(zip(over_gloo, in_turn, strict=True)):
        for case, there, here in zip(CASES[degree], theirs, ours, strict=True):
            for step, (a, b) in enumerate(zip(there.latents, here.latents, strict=True)):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), f"rank {rank}, step {step}, {case}"
            assert there.traffic == here.traffic, f"rank {rank}, {case}"
