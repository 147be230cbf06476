"""What a scenario has to serve with: edge fleets in users' hands, and pools of rented cloud nodes.

Part of the shape of the YAML; import the models from `scenario`, which reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hybridsd_sim.written import Broken, NonNegative, Positive, Text, Written

SPOT_PREEMPTIONS_PER_NODE_HOUR = 0.05
"""Assumption: a spot node is taken away every twenty hours, in the mean."""


class EdgeFleet(Written):
    """Devices of one kind in users' hands, and the network they sit on."""

    device: Text
    """Edge device of the catalogue (for example snapdragon-8-elite)."""
    replicas: Annotated[int, Field(ge=1, le=1_000_000_000)]
    """Number of devices."""
    network: Text
    """Access network of the catalogue between device and cloud: lte, 5g, wifi5, wifi6 or ethernet."""
    ownership: Literal["user", "shared"] = "user"
    """user: a device serves its owner's requests only; shared: any request may use any device."""
    runtime: Text | None = None
    """Runtime of the device's cost rows; null takes the device's default."""
    precision: Text | None = None
    """Precision of weights and activations; null takes the device's default."""
    power_w: Positive | None = None
    """Watts drawn while generating; null takes the catalogue's figure."""
    encodes_prompt: bool = True
    """Whether the device runs the text encoder itself, so that no embedding travels at a switch step."""


class Pool(Written):
    """Cloud nodes of one kind behind one queue."""

    gpu: Text
    """GPU of the catalogue (for example a100-sxm-80gb), or any other device that is rented as a node."""
    gpus_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs in one node; a gang of parallel GPUs never leaves its node."""
    interconnect: Text | None = None
    """Link between the GPUs of a node (for example nvlink3-switch); null takes the GPU's default."""
    runtime: Text = "cudagraph"
    """How the UNet is run: eager, cudagraph, compiled or tensorrt."""
    precision: Text = "fp16"
    """Precision of weights and activations."""
    purchase: Literal["on_demand", "spot"] = "on_demand"
    """How the nodes are bought; for a mix of both, write two pools: the optimiser shares the requests out."""
    provider: Text | None = None
    """Price list to use; null takes the catalogue's default."""
    usd_per_gpu_hour: NonNegative | None = None
    """Own price of one GPU for an hour; null takes the catalogue's."""
    replicas: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Nodes that simulate runs; null runs replicas_max, and plan always searches."""
    replicas_min: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Fewest nodes that a plan may rent."""
    replicas_max: Annotated[int, Field(ge=0, le=100_000)]
    """Most nodes that a plan may rent."""
    cold_start_s: NonNegative = 0.0
    """Seconds from renting a node until it serves; every node is rented at time 0, so let warmup_s cover it."""
    preemptions_per_node_hour: NonNegative | None = None
    """How often a node is taken away; null means never on demand, and 0.05 on spot (an assumption)."""
    replacement_s: NonNegative = 180.0
    """Seconds from a node's preemption until another one serves in its place; the rent runs on."""
    discipline: Literal["fifo", "gang_fifo", "backfill", "edf"] = "fifo"
    """Order of the queue: fifo, gang_fifo (the head reserves a node), backfill (short jobs pass), edf (deadlines)."""
    resident_models: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Models that one node keeps in memory; null means all of them, always loaded."""
    model_load_s: NonNegative | None = None
    """Seconds to load a model that is not resident; null takes the catalogue's figure."""
    telemetry_period_s: NonNegative = 0.0
    """Age at which a policy's view is renewed; 0 is always fresh. The longest of all pools holds for the whole view."""

    @property
    def preemptions_per_s(self) -> float:
        """How often a node is taken away, per second."""
        own = self.preemptions_per_node_hour
        return (own if own is not None else SPOT_PREEMPTIONS_PER_NODE_HOUR * (self.purchase == "spot")) / 3600

    @property
    def availability(self) -> float:
        """Share of the time that a node is there."""
        return 1.0 / (1.0 + self.preemptions_per_s * self.replacement_s)

    def _broken(self) -> Iterator[Broken]:
        low, high = self.replicas_min, self.replicas_max
        if low > high:
            yield (
                "replicas_min",
                low,
                f"must not exceed replicas_max, which is {high}",
                "Lower it or raise replicas_max.",
            )
        elif self.replicas is not None and not low <= self.replicas <= high:
            yield "replicas", self.replicas, f"must lie between replicas_min and replicas_max, {low} to {high}", ""
