"""What crosses a link and how long that takes: between the edge and the cloud, and between the GPUs of a gang."""

from __future__ import annotations

from hybridsd_sim.partition import RankWork
from hybridsd_sim.plan import Request
from hybridsd_sim.profiles import Model

OVERLAP_SHARE = 0.575
"""Part of an asynchronous exchange that hides behind compute: 60 % at 1024 px, 55 % at 2048 px, the rest contends for
the GPU (derived from DistriFusion, arXiv 2402.19481, table 2: (sync - async) / (sync - no communication))."""
SOLVER_HISTORY = {"dpmsolver++": 1, "dpmsolver": 1, "unipc": 1, "pndm": 3, "ddim": 0, "euler": 0, "lcm": 0}
"""Latent-sized tensors of past model outputs that a sampler must keep across a switch."""
PROMPT_BYTES = 1024
"""A prompt with its parameters as JSON. Modelled."""
IMAGE_BYTES_PER_PX = 0.3
"""A JPEG at about 2.4 bits a pixel (300 kB at 1024 px). Modelled."""
SERIALISE_BYTES_PER_S = 1e9
"""Checksum and copy of a hand-over payload on one core. Modelled; measured on a CPU core: 0.7 to 1.0 GB/s."""


def latent_elements(request: Request) -> int:
    """Elements of one latent: 4 x H/8 x W/8."""
    return 4 * (request.height_px // 8) * (request.width_px // 8)


def handover_bytes(request: Request, model: Model, *, with_embedding: bool) -> int:
    """Bytes that cross at a switch step, fp16: latents, solver history, and the embeddings if the edge lacks them."""
    tensors = 1 + SOLVER_HISTORY.get(request.sampler, 0)
    latents = latent_elements(request) * request.num_images * tensors * 2
    prompts = 2 if request.guided else 1
    return latents + (model.text_embedding_bytes_fp16 * prompts if with_embedding else 0)


def image_bytes(request: Request) -> int:
    """Bytes of the finished pictures as sent to the user."""
    return round(request.height_px * request.width_px * IMAGE_BYTES_PER_PX) * request.num_images


def transfer_s(bytes_moved: int, rate_bytes_per_s: float, rtt_s: float) -> float:
    """Seconds of one transfer: half a round trip, then the payload at the link's rate."""
    return rtt_s / 2 + bytes_moved / rate_bytes_per_s


def exchange_s(rank: RankWork, bandwidth_bytes_per_s: float, latency_s: float, compute_s: float) -> float:
    """Seconds of a round's exchange that its compute does not hide.

    A blocking exchange (`window` 0) shows whole. Otherwise `OVERLAP_SHARE` of each message hides, up to the window.
    """
    if rank.messages == 0:
        return 0.0
    total = rank.received_bytes / bandwidth_bytes_per_s + rank.messages * latency_s
    hidden = rank.messages * min(OVERLAP_SHARE * total / rank.messages, rank.window * compute_s)
    return total - hidden
