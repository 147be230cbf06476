"""The shape of what was fitted: populations of devices and the constants of parallel methods, a row each.

They stand in `fitted/` of a profiles folder, written by `fitting` and read with the catalogue, so that a planner can
look at every number the model rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field

from hybridsd_sim.profile_rows import Name, NotNegative, Positive, Row

Efficiency = Literal[
    "linear_efficiency", "conv_share", "attention_share", "memory_efficiency", "seconds_per_op", "launch_s_per_op"
]
EFFICIENCIES: tuple[Efficiency, ...] = get_args(Efficiency)
"""A device's law in terms that compare between devices: efficiencies are shares of the datasheet's figures,
`conv_share` and `attention_share` are rates relative to linear layers."""


class Population(Row):
    """One parameter of the devices that were timed under a runtime: their middle and the spread between them.

    `spread` is the standard deviation of the natural logarithm.
    """

    runtime: Name
    precision: Name
    parameter: Efficiency
    mean: Positive
    spread: NotNegative
    devices: Annotated[int, Field(ge=0)]


class MethodConstant(Row):
    """A constant of the parallel methods, shared by all devices; `spread` is its logarithm's standard deviation."""

    name: Name
    value: Positive
    spread: NotNegative
    rows: Annotated[int, Field(ge=0)]


FITTED: Mapping[str, type[Row]] = {"populations": Population, "constants": MethodConstant}
"""The fitted tables: `fitted/<name>.csv` holds one of these rows a line."""
