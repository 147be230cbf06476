"""The shape of a timed row and of the meta that stands beside a measured file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hybridsd_sim.profile_rows import Count, Name, NotNegative, Positive, Row, Written

ALIKE = {"bf16": "fp16"}
"""Precisions that run at one speed."""


def alike(precision: str) -> str:
    """The precision under whose name rows of this one are used and fitted."""
    return ALIKE.get(precision, precision)


class CostRow(Row):
    """Seconds of one component on one device. Sizes are 0 where the image does not matter; `*` stands for any name.

    `model` names a component for `vae_decode` and `text_encode`. `guidance`: the row is one guided step, a UNet call on
    2 x `batch_size` latents. A row of several GPUs averages over the steps named in its options, warm-up included.
    """

    device: Name
    runtime: Name
    precision: Name
    model: Name
    component: Literal[
        "text_encode",
        "step",
        "step_warmup",
        "vae_decode",
        "model_load",
        "handover_serialise",
        "handover_parse",
        "exchange",
    ]
    rank: Annotated[int, Field(ge=0)] | None = None
    height_px: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    width_px: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    batch_size: Count = 1
    guidance: bool = False
    method: Name = "single"
    degree: Count = 1
    options: str = ""
    seconds_median: Positive
    seconds_p05: Positive | None = None
    seconds_p95: Positive | None = None
    num_samples: Count | None = None
    peak_memory_bytes: Count | None = None
    comm_bytes: Annotated[int, Field(ge=0)] | None = None
    energy_j: NotNegative | None = None

    @property
    def said(self) -> dict[str, str]:
        """The options, by name."""
        return dict(part.split("=", 1) for part in self.options.split(";") if "=" in part)

    @property
    def latents(self) -> int:
        """Latents of the UNet call."""
        return self.batch_size * (2 if self.guidance else 1)

    @property
    def range_s(self) -> tuple[float, float]:
        """The 5th and 95th percentile.

        Where the source gives none (modelled): 3.5% to either side, which is what repetition does, and 10% for a row
        that was derived by a rule.
        """
        middle, share = self.seconds_median, 0.1 if self.kind == "modelled" else 0.035
        low, high = self.seconds_p05, self.seconds_p95
        return (1 - share) * middle if low is None else low, (1 + share) * middle if high is None else high

    @model_validator(mode="after")
    def _percentiles_must_rise(self) -> Self:
        known = [value for value in (self.seconds_p05, self.seconds_median, self.seconds_p95) if value is not None]
        if sorted(known) != known:
            raise ValueError("seconds_p05 <= seconds_median <= seconds_p95")
        if self.component in ("step", "step_warmup", "vae_decode") and not (self.height_px and self.width_px):
            raise ValueError(f"a {self.component} row needs height_px and width_px")
        return self


class Protocol(Written):
    """How a measurement was made: runs before the clock counts, runs counted, and what was dropped from those."""

    warmup_runs: Annotated[int, Field(ge=0)]
    runs: Count
    trimming: str = ""


class Meta(Written):
    """What stands beside a measured file: the machine, the software, the protocol. No paths, no host names.

    `processor` is what the chip calls itself. `ceilings` are the machine's own limits, measured in the same run, with
    units in their names.
    """

    device: Name
    processor: str = ""
    driver: str = ""
    libraries: Mapping[str, str] = Field(default_factory=dict)
    date: Name
    protocol: Protocol
    commit: str = ""
    fit_errors: Mapping[str, float] = Field(default_factory=dict)
    ceilings: Mapping[str, Positive] = Field(default_factory=dict)
