"""What the figures of a report are called and what they mean, so that two readers of one report read the same thing.

Headings with their units, the parts of a plan and the parameters of a device fit in words, and the glossary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridsd_sim.estimate import MINUS, Show, interval

Data = dict[str, Any]
"""What a page is made from: plain data, as a saved run holds it."""

NAMES = {
    "offered_per_s": "Offered load (requests/s)",
    "served_per_s": "Served (requests/s)",
    "goodput_per_s": "Goodput (requests/s)",
    "unserved_share": "Unserved share",
    "latency_mean_s": "Mean latency (s)",
    "latency_p50_s": "Median latency (s)",
    "latency_p95_s": "p95 latency (s)",
    "latency_p99_s": "p99 latency (s)",
    "wait_mean_s": "Mean wait (s)",
    "slo_attainment": "Inside SLO",
    "quality_mean": "Quality (CLIP)",
    "gpu_seconds_per_image": "GPU time (GPU-seconds/image)",
    "metered_usd_per_image": "Metered cost (US$/image)",
    "edge_energy_j_per_image": "Edge energy (J/image)",
    "bytes_down_per_image": "Sent to the edge (bytes/image)",
    "rent_usd_per_hour": "Rent (US$/h)",
    "rent_usd_per_image": "Rent (US$/image)",
    "requests": "Requests counted",
    "served": "Served requests",
    "unserved": "Unserved requests",
    "in_flight": "In flight at the end",
}
"""Heading of each figure of a summary, with its unit."""


PARTS = {
    "text_encode": "Text encoding",
    "text_encode_edge": "Text encoding at the edge",
    "prompt_transfer": "Prompt to the cloud",
    "embedding_transfer": "Text embedding over the network",
    "embedding_transfer_serialise": "Text embedding, serialised",
    "embedding_transfer_parse": "Text embedding, parsed",
    "model_load": "Model load",
    "denoise_warmup": "Denoising, warm-up steps",
    "denoise": "Denoising",
    "handover": "Hand-over over the network",
    "handover_serialise": "Hand-over, serialised",
    "handover_parse": "Hand-over, parsed",
    "latent_transfer": "Latent over the network",
    "latent_transfer_serialise": "Latent, serialised",
    "latent_transfer_parse": "Latent, parsed",
    "vae_decode": "VAE decoding",
    "image_transfer": "Image to the edge",
    "device_overhead": "Device beyond its components",
    "latency_s": "Latency",
    "metered_usd_per_image": "Metered cost of an image",
    "edge_energy_j_per_image": "Edge energy of an image",
    "quality_clip": "Quality (CLIP score)",
    "quality_fid": "Quality (FID)",
    "quality_lpips": "Quality (LPIPS)",
}
"""Parts of a plan, and what they sum to."""


PARAMETERS = {
    "linear_flop_per_s": "Rate of large linear layers",
    "conv_share": "Convolutions, share of that rate",
    "attention_share": "Attention, share of that rate",
    "memory_bytes_per_s": "Memory rate",
    "seconds_per_op": "Device time of an operation however small",
    "launch_s_per_op": "Host time of a launch",
    "message_s": "Time of a message beside the link",
    "hidden_share": "Exchange that hides behind compute",
    "stripes_link_share": "Link reached by many small gathers",
    "broadcasts_link_share": "Link reached by whole activations",
    "walk_share": "Cached module, share of a launch",
    "unexplained_share": "Left unexplained",
    "text_encode_ratio": "Text encoders, over the law's time",
    "vae_decode_ratio": "VAE decoders, over the law's time",
}
"""Fitted parameters in words."""


GLOSSARY = (
    ("Feasible", "Every class keeps its SLO percentile and quality floor, and every budget holds, in the simulation."),
    ("Stable", "No queue grows over the run: the same load could go on for ever."),
    ("Converged", "The p95 latency is known to 10% of itself or better: more replications would change little."),
    (
        "In domain",
        "Every step time follows from steps of like size timed on its device, runtime and precision.",
    ),
    ("● Measured", "Timed by this project's executors on the device itself."),
    ("■ Quoted", "Taken from a publication, datasheet or price list, named in the sources, or from the scenario."),
    ("▲ Modelled", "Derived from measured or quoted figures by a stated rule, with an interval, or simulated."),
    ("Chosen", "The capacity plan that this report is about, as it was simulated."),
    ("Cloud only, edge only", "Every step of every request in the cloud, or on the user's device."),
    ("Static switch", "Every request is handed over after one share of its steps; 40% is the 10 of 25 of Hybrid SD."),
    ("Turned away", "The share of a class that no plan serves, so that the rest is served in time."),
    ("Frontier", "Plans that no other beats in rent, p95 latency and quality together."),
    ("Bound", "Rent and egress under which the search ruled every plan out; the gap is how far above it the plan is."),
    (
        "Known by",
        (
            "Simulation plays every event; the compiled recursion computes the same queues directly, on the same "
            "requests; the formula knows their rates and spreads alone."
        ),
    ),
    ("Latency", "Seconds from the request to the finished picture on the user's device, over served requests."),
    ("p95 latency", "95 of 100 served requests took no longer."),
    ("Idle latency", "Latency of one request when nobody else is there, at the network's median rates."),
    ("Wait", "Seconds a request stood ready and nobody worked on it: for GPUs, and for the user's own busy device."),
    ("Inside SLO", "Requests served in time, over all that were served, unserved, or in flight past their deadline."),
    ("Goodput", "Requests a second that were served inside their SLO."),
    ("Unserved", "Turned away, always with a reason. Requests in flight at the end are neither served nor unserved."),
    ("Quality", "CLIP score, 0 to 1, from published tables; losses by hand-over and by parallel method add up."),
    ("Rent", "US$ an hour of all rented nodes, used or not."),
    ("Metered cost", "US$ an image for the GPU-seconds it held and the bytes sent to the edge; idle nodes left out."),
    ("GPU-seconds", "GPUs held times seconds held: a worker group of four for two seconds is eight."),
    ("Edge energy", "Joules the user's device spends on one image: its power while generating times its busy seconds."),
    ("Utilisation", "Share of the rented GPUs' time in which a request held them."),
    ("Switch step", "Index of the first step done at the edge: 0 is all at the edge, the last is all in the cloud."),
    ("Method × degree", "How the cloud's steps are spread over GPUs, and over how many at once for one request."),
    (
        "95% interval",
        "Where the figure falls in 95 of 100 repetitions of the run, from replications or batches of time.",
    ),
    (
        "90% interval",
        (
            "Where a part's seconds are expected: its row's 5th to 95th percentile (where the source prints none, what "
            "repetition does: hosts and versions may differ by more), or what the law's parameters and residuals leave "
            "open. Ends of a total are sums of ends, as if all parts erred the same way."
        ),
    ),
    ("Rows fitted", "Timed one-GPU steps, measured or quoted, that a device's law was fitted to."),
    ("—", "Not known, with the reason beneath. A question mark is an end that the run is too short to tell."),
)
"""Words of the report and their definitions."""


def interval_line(figure: Mapping[str, Any], show: Show) -> str:
    """The interval of a figure at the digits shown; nothing where it does not differ from the figure there."""
    low, high = figure.get("low"), figure.get("high")
    if low is None and high is None:
        return "no interval" if figure.get("note") else ""
    same = None not in (low, high) and {show(low), show(high)} == {show(figure["value"])}
    return "" if same else interval(low, high, show)


def reach(figure: Mapping[str, Any]) -> str:
    """How far the ends of an interval lie from its figure, in per cent of it; nothing where that cannot be said."""
    value, low, high = (figure.get(end) for end in ("value", "low", "high"))
    if not value or low is None or high is None:
        return ""
    down, up = (f"{100 * share:.{0 if share >= 0.0995 else 1}f}" for share in (1.0 - low / value, high / value - 1.0))
    return f"±{up}%" if down == up else f"{MINUS}{down}% / +{up}%"


def listed(items: Sequence[str]) -> str:
    """One, two and three."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
