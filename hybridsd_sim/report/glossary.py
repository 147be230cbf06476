"""What the figures of a report are called and what they mean, so that two readers of one report read the same thing."""

from __future__ import annotations

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

GLOSSARY = (
    ("Feasible", "Every class keeps its SLO percentile and quality floor, and every budget holds, in the simulation."),
    ("Stable", "No queue grows over the run: the same load could go on for ever."),
    ("Converged", "The p95 latency is known to 10% of itself or better: more replications would change little."),
    (
        "In domain",
        "Every step time follows from steps of like size timed on its device, runtime and precision.",
    ),
    ("Measured", "Timed by this project's executors on the device itself."),
    ("Quoted", "Taken from a publication, datasheet or price list, named in the sources."),
    ("Modelled", "Derived from measured or quoted figures by a stated rule, with an interval."),
    ("Chosen", "The capacity plan that this report is about, as it was simulated."),
    ("Cloud only, edge only", "Every step of every request in the cloud, or on the user's device."),
    ("Static switch", "Every request is handed over after one share of its steps; 40% is the 10 of 25 of Hybrid SD."),
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
    ("GPU-seconds", "GPUs held times seconds held: a gang of four for two seconds is eight."),
    ("Edge energy", "Joules the user's device spends on one image: its power while generating times its busy seconds."),
    ("Utilisation", "Share of the rented GPUs' time in which a request held them."),
    ("Switch step", "Index of the first step done at the edge: 0 is all at the edge, the last is all in the cloud."),
    ("Method × degree", "How the cloud's steps are spread over GPUs, and over how many at once for one request."),
    (
        "95% interval",
        "Where the figure falls in 95 of 100 repetitions of the run, from replications or batches of time.",
    ),
    ("90% interval", "Where the prediction of a part's seconds is expected, from its rows' percentiles or residuals."),
    ("—", "Not known, with the reason beneath. A question mark is an end that the run is too short to tell."),
)
"""Words of the report and their definitions."""
