"""What crosses a link and how long that takes: between the edge and the cloud, and between the GPUs of a gang."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray

from hybridsd_sim.partition import RankWork
from hybridsd_sim.plan import Request
from hybridsd_sim.profiles import Interconnect, Model, Profiles

SOLVER_HISTORY = {"dpmsolver++": 1, "dpmsolver": 1, "unipc": 1, "pndm": 3, "ddim": 0, "euler": 0, "lcm": 0}
"""Latent-sized tensors of past model outputs that a sampler must keep across a switch."""
PROMPT_BYTES = 1024
"""A prompt with its parameters as JSON. Modelled."""
IMAGE_BYTES_PER_PX = 0.3
"""A JPEG at about 2.4 bits a pixel (300 kB at 1024 px). Modelled."""
SERIALISE_BYTES_PER_S = 1e9
"""Checksum and copy of a hand-over payload on one core. Modelled; measured on a CPU core: 0.7 to 1.0 GB/s."""


def latent_elements(request: Request) -> int:
    """Elements of one latent of the request."""
    return elements_of(request.height_px, request.width_px)


def elements_of(height_px: int, width_px: int) -> int:
    """Elements of one latent: 4 x H/8 x W/8."""
    return 4 * (height_px // 8) * (width_px // 8)


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


@dataclass(frozen=True, slots=True)
class Constant:
    """What a parallel method costs beside compute and bytes, the same on every device: where the fit starts.

    `value` and `spread` (standard deviation of the logarithm) are beliefs: orders of magnitude of NCCL calls, copies
    and hooks, chosen by people who had seen the published tables. Other centres, or spreads three times as wide, leave
    the held-out errors below 5%.
    """

    name: str
    value: float
    spread: float
    meaning: str


CONSTANTS = (
    Constant("message_s", 3e-5, 1.0, "seconds a layer's exchange costs a rank beside the link: pack, post, wait"),
    Constant("hidden_share", 0.5, 0.5, "part of an asynchronous exchange that hides behind compute"),
    Constant("stripes_link_share", 0.6, 0.5, "part of the link's bandwidth that many small gathers reach"),
    # The catalogue's bandwidths were measured with messages of this size, hence so little doubt.
    Constant("broadcasts_link_share", 1.0, 0.08, "part of the link's bandwidth that whole activations reach"),
    Constant("walk_share", 0.1, 1.0, "part of a launch that a cached module costs the host"),
)
"""The method constants, in the order of every vector of them."""
_NAMES = tuple(constant.name for constant in CONSTANTS)
Floats = NDArray[np.float64]


def constants_of(profiles: Profiles) -> tuple[Floats, Floats]:
    """Natural logarithms of the method constants as fitted and their covariance; where none was, as believed before."""
    rows = [profiles.constants.get(constant.name) for constant in CONSTANTS]
    values = [row.value if row else start.value for row, start in zip(rows, CONSTANTS, strict=True)]
    spreads = [row.spread if row else start.spread for row, start in zip(rows, CONSTANTS, strict=True)]
    return np.log(values), np.diag(np.square(spreads))


def unexplained_share(profiles: Profiles) -> float:
    """Standard deviation that published multi-GPU times keep around the model, relative; 10% before any were seen."""
    row = profiles.constants.get("unexplained_share")
    return row.value if row else 0.10


def contention(profiles: Profiles, link: Interconnect | None, device: str) -> tuple[float, float]:
    """By how much ranks of one machine's CPU slow each other's compute, and the spread of its logarithm."""
    shared = link is not None and link.shares_memory and device not in profiles.gpus
    row = profiles.constants.get("contention") if shared else None
    return (row.value, row.spread) if row else (1.0, 0.0)


def link_bytes_per_s(link: Interconnect, rank: RankWork, degree: int, constants: Floats) -> float:
    """Bytes a second that one rank receives in this kind of exchange.

    Over a shared bus, gathers of more than two GPUs slow down with the square root of their number (PCIe 5.0: 54 GB/s
    between two, 35 among four, 28 among eight; NVIDIA/nccl#1639); a broadcast has one sender at a time.
    """
    bandwidth = link.bandwidth_bytes_per_s
    if rank.exchange == "broadcasts":
        return bandwidth * exp(constants[_NAMES.index("broadcasts_link_share")])
    shared = 1.0 if link.scales_with_devices else min(1.0, sqrt(2.0 / degree))
    small = exp(constants[_NAMES.index("stripes_link_share")]) if rank.exchange == "stripes" else 1.0
    return bandwidth * shared * small


def exchange_s(rank: RankWork, bytes_per_s: float, latency_s: float, compute_s: float, constants: Floats) -> float:
    """Seconds of a round's exchange that its compute does not hide.

    Blocking messages show whole. Of the others a share hides, each up to its `window` of the compute, and all of them
    up to the compute itself: they share one link.
    """
    if rank.messages == 0:
        return 0.0
    message_s = latency_s + (exp(constants[_NAMES.index("message_s")]) if rank.exchange == "stripes" else 0.0)
    total = rank.received_bytes / bytes_per_s + rank.messages * message_s
    free = rank.messages - rank.blocking_messages
    if rank.window == 0.0 or free == 0:
        return total
    hideable = total - rank.blocking_messages * message_s
    share = min(1.0, exp(constants[_NAMES.index("hidden_share")]))
    return total - min(share * hideable, min(1.0, free * rank.window) * compute_s)


def walk_s(rank: RankWork, launch_s_per_op: float, constants: Floats) -> float:
    """Seconds in which the host walks over modules that only hand their cached outputs on (AsyncDiff)."""
    return rank.walked_ops * launch_s_per_op * exp(constants[_NAMES.index("walk_share")])


def actual_link(profiles: Profiles, name: str, degree: int) -> Interconnect:
    """The interconnect that carries a gang of `degree` GPUs: a bridge joins two cards, more meet on the bus below."""
    link = profiles.interconnect(name)
    return profiles.interconnect(link.beyond_pairs) if link.beyond_pairs and degree > 2 else link
