"""Latent transfers: the bytes that cross a switch, what the network takes, and what both ends take to serialise.

Serialisation is tensors into bytes with their checksum at the sender, and out of them again at the receiver. It depends
on the payload alone, so that timed rows of every model and size serve: their rate is that of the device, and seconds
are in proportion to the bytes. Where a device has no rows, a usual rate serves, with a wide interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

from hybridsd_sim.estimate import KIND_ORDER, Estimate, merged
from hybridsd_sim.perf import elements_of
from hybridsd_sim.plan import Request
from hybridsd_sim.profiles import CostRow, Model, Profiles, derived

SOLVER_HISTORY = {"dpmsolver++": 1, "dpmsolver": 1, "unipc": 1, "pndm": 3, "ddim": 0, "euler": 0, "lcm": 0}
"""Latent-sized tensors of past model outputs that a sampler must keep across a switch."""

PROMPT_BYTES = 1024
"""A prompt with its parameters as JSON. Modelled."""

IMAGE_BYTES_PER_PX = 0.3
"""A JPEG at about 2.4 bits a pixel (300 kB at 1024 px). Modelled."""

SERIALISE_BYTES_PER_S = 1e9
"""Checksum and copy of a payload on one core. Modelled; measured on a CPU core: 0.7 to 1.0 GB/s."""


HEADER_SHARE = 0.01
"""A payload counts as timed up to this share below a timed one, which has a header besides its tensors."""

End = Literal["serialise", "parse"]
"""The sender's or the receiver's side of a transfer."""


def latent_elements(request: Request) -> int:
    """Elements of one latent of the request."""
    return elements_of(request.height_px, request.width_px)


def latent_transfer_bytes(request: Request, model: Model, *, with_embedding: bool) -> int:
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


@derived()
def serialisation_time(
    profiles: Profiles, device: str, end: End, payload_bytes: int, *, prefer: tuple[str, ...] = ()
) -> Estimate:
    """Seconds that `device` takes to serialise or to parse a payload, with their 90% interval.

    Its own rows go before those of any device (`*`), then measured before quoted; `prefer` names sources to take before
    all others. A row's `comm_bytes` are its payload. The seconds have the rows' kind inside the payloads that were
    timed and are modelled outside.
    """
    rows = _best(profiles.cost_rows(component=f"handover_{end}"), device, prefer)
    if not rows:
        seconds = payload_bytes / SERIALISE_BYTES_PER_S
        return Estimate(seconds, 0.0, 10 * seconds, note=f"checksum and copy at {SERIALISE_BYTES_PER_S / 1e9:g} GB/s")
    timed = sorted(row.comm_bytes or 0 for row in rows)
    within = (1 - HEADER_SHARE) * timed[0] <= payload_bytes <= timed[-1]
    # From the fastest to the slowest rate; a small payload may take as long as the quickest timed one.
    lows = [row.seconds.low / (row.comm_bytes or 1) for row in rows]
    highs = [row.seconds.high / (row.comm_bytes or 1) for row in rows]
    return Estimate(
        payload_bytes * median(row.seconds_median / (row.comm_bytes or 1) for row in rows),
        payload_bytes * min(lows),
        max(payload_bytes * max(highs), min(row.seconds.high for row in rows)),
        rows[0].kind if within else "modelled",
        merged(row.source for row in rows),
        f"in proportion to its bytes, from {timed[0]:,} to {timed[-1]:,} bytes on {device}",
    )


def _best(rows: Sequence[CostRow], device: str, prefer: Sequence[str]) -> list[CostRow]:
    """The best known rows for a device that say how many bytes they handled."""
    ranked: dict[tuple[bool, bool, int], list[CostRow]] = {}
    for row in rows:
        if row.comm_bytes and row.device in (device, "*"):
            liked = any(name in row.source for name in prefer)
            ranked.setdefault((not liked, row.device == "*", KIND_ORDER[row.kind]), []).append(row)
    return ranked[min(ranked)] if ranked else []
