"""The work of one GPU as kernels: FLOPs and bytes at the rank's true shapes, and the time that a device fit gives them.

A UNet's layers become a table of arrays once for each size; a rank's share of it (a stripe, fewer keys, a component)
is a `Kernels`. A device's fitted parameters turn kernels into seconds:

    seconds = longer of  sum over kernels of longer of (FLOPs / rate of its kind, bytes / memory rate)
                         + operations x seconds_per_op
              and        operations x launch_s_per_op

The first line is the roofline. `seconds_per_op` is what a kernel takes however small it is, so that the efficiency of a
kernel falls with its shape: one whose FLOPs take as long as that reaches half of its rate. The second line is the host
that launches eager kernels one by one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridsd_sim.perf.unet import Layer, config_text, unet_layers

Floats = NDArray[np.float64]


KINDS = ("linear", "conv", "attention", "pointwise")
"""What a kernel computes; pointwise ones only move bytes."""

_LINEAR, _CONV, _ATTENTION, _POINTWISE = range(len(KINDS))

_KIND_OF = {
    "linear": _LINEAR, "conv": _CONV, "self_attention": _ATTENTION, "cross_attention": _ATTENTION,
    "group_norm": _POINTWISE, "layer_norm": _POINTWISE,
}  # fmt: skip

PARAMETERS = (
    "linear_flop_per_s", "conv_share", "attention_share", "memory_bytes_per_s", "seconds_per_op", "launch_s_per_op",
)  # fmt: skip
"""A device's parameters: the rate of large linear layers, those of convolutions and attention as shares of it, that of
the memory, and the seconds that an operation takes at least on the device and on the host."""

NORM_PASSES = 2.5
"""How often a norm and the pointwise work around it (activation, residual sum) read and write their tensor: the norm
once, the activation or sum one and a half times more. Modelled."""

HEAD_WIDTHS = (32, 64, 96, 128, 192, 256)
"""Widths of a head that fused attention kernels are built for (FlashAttention-2); others are padded to the next one."""

OPS_PER_LAYER = 1.7
"""Kernel launches a layer where nobody counted them: 1.66 to 1.80 in the catalogue's UNets."""

ELEMENT_BYTES: Mapping[str, float] = {
    "fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "w8a16": 1.0, "w6": 0.75, "w4": 0.5,
}  # fmt: skip
"""Bytes of one weight by precision."""

NO_LIMIT = 1e30
"""Bytes a second where no datasheet tells the memory's rate: bytes then cost nothing."""

_SHARPNESS = 8.0
"""Exponent p of the smooth maximum (device^p + host^p)^(1/p): near the bound both show, as overlap is never perfect."""


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """What one GPU executes: for each kernel its kind, FLOPs and bytes moved, and `ops` launches altogether.

    `executed` are the FLOPs with attention's heads padded (`HEAD_WIDTHS`), which is what takes time.
    """

    kind: NDArray[np.int8]
    flop: Floats
    executed: Floats
    bytes: Floats
    ops: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kernels):
            return NotImplemented
        arrays = ("kind", "flop", "executed", "bytes")
        return self.ops == other.ops and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in arrays)

    __hash__ = None  # type: ignore[assignment]

    @property
    def flops(self) -> float:
        """All FLOPs together."""
        return float(self.flop.sum())

    def and_bytes(self, moved: float) -> Kernels:
        """The same and one more pointwise kernel that moves these bytes."""
        return Kernels(
            np.append(self.kind, np.int8(_POINTWISE)),
            np.append(self.flop, 0.0),
            np.append(self.executed, 0.0),
            np.append(self.bytes, moved),
            self.ops,
        )


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What the layers of a UNet exchange when its image is cut into stripes, for one latent.

    Elements of all keys and values of self-attention, of the halo rows at one edge of a stripe (not of the first
    convolution, whose input every rank holds), and of the inputs that these rows are joined to; how many layers
    exchange keys and values or halo rows, how many of them are self-attentions, and how many GroupNorms there are.
    """

    kv_elements: int
    halo_elements: int
    joined_elements: int
    layers: int
    self_attentions: int
    group_norms: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerTable:
    """A UNet at one size as arrays over its layers, for one latent; `ops` are the launches of one call."""

    layers: tuple[Layer, ...]
    ops: float
    kind: NDArray[np.int8]
    flop: Floats
    padding: Floats
    weights: Floats
    moved: Floats
    striped: NDArray[np.bool_]
    self_attention: NDArray[np.bool_]
    units: NDArray[np.str_]
    exchanged: Exchanged

    def kernels(
        self,
        latents: float,
        *,
        stripe: float = 1.0,
        key_share: float = 1.0,
        units: Collection[str] | None = None,
        weight_bytes: float = 2.0,
        element_bytes: float = 2.0,
    ) -> Kernels:
        """A rank's share of one evaluation on `latents` latents.

        `stripe` of the rows of every layer that works on the image; fresh queries against `key_share` of the keys;
        only the layers of `units` where they are given. Weights are read once, whatever the stripe.
        """
        share = latents * np.where(self.striped, stripe, 1.0)
        flop = self.flop * share * np.where(self.self_attention, key_share, 1.0)
        moved = self.weights * weight_bytes + self.moved * share * element_bytes
        if units is None:
            return Kernels(self.kind, flop, flop * self.padding, moved, self.ops)
        mine = np.isin(self.units, sorted(units))
        executed = (flop * self.padding)[mine]
        return Kernels(self.kind[mine], flop[mine], executed, moved[mine], self.ops * float(mine.mean()))


def layer_table(config: Mapping[str, Any], height_px: int, width_px: int, ops: float | None = None) -> LayerTable:
    """The layers of the UNet with this config at this size as arrays; `ops` are its launches, if anybody counted them.

    Raises `InputError` as `unet_layers` does.
    """
    return _table(config_text(config), height_px, width_px, ops)


@lru_cache(maxsize=256)
def _table(text: str, height_px: int, width_px: int, ops: float | None) -> LayerTable:
    layers = unet_layers(json.loads(text), height_px, width_px)
    padding = []  # by how much wider a head is computed than it is; 1 without heads, and beyond every kernel's width
    for head_width in (layer.head_width for layer in layers):
        fitting = [width for width in HEAD_WIDTHS if width >= head_width]
        padding.append(fitting[0] / head_width if head_width and fitting else 1.0)
    haloed = [layer for layer in layers if layer.halo_elements]
    attentions = [layer for layer in layers if layer.op == "self_attention"]
    kind = np.array([_KIND_OF[layer.op] for layer in layers], np.int8)
    moved = np.array([layer.in_elements + layer.out_elements for layer in layers], np.float64)
    return LayerTable(
        layers=layers,
        ops=len(layers) * OPS_PER_LAYER if ops is None else ops,
        kind=kind,
        flop=np.array([2.0 * layer.macs for layer in layers]),
        padding=np.array(padding),
        weights=np.array([layer.params for layer in layers], np.float64),
        moved=np.where(kind == _POINTWISE, NORM_PASSES, 1.0) * moved,
        striped=np.array([layer.rows > 0 for layer in layers]),
        self_attention=np.array([layer.op == "self_attention" for layer in layers]),
        units=np.array([layer.unit for layer in layers]),
        exchanged=Exchanged(
            kv_elements=sum(layer.kv_elements for layer in attentions),
            halo_elements=sum(layer.halo_elements for layer in haloed if layer.unit != "conv_in"),
            joined_elements=sum(layer.in_elements for layer in haloed),
            layers=len(haloed) + len(attentions),
            self_attentions=len(attentions),
            group_norms=sum(layer.op == "group_norm" for layer in layers),
        ),
    )


def plain_kernels(conv: float, linear: float, attention: float, ops: float) -> Kernels:
    """A network of which only totals are known, such as a VAE: FLOPs by kind, and launches."""
    kinds = np.array([_LINEAR, _CONV, _ATTENTION], np.int8)
    flop = np.array([linear, conv, attention])
    return Kernels(kinds, flop, flop, np.zeros(3), ops)


class Batch:
    """Several `Kernels` whose seconds are wanted together, and again for each change of the parameters."""

    def __init__(self, items: Sequence[Kernels]) -> None:
        self._kind = np.concatenate([item.kind for item in items])
        self._executed = np.concatenate([item.executed for item in items])
        self._bytes = np.concatenate([item.bytes for item in items])
        self._starts = np.cumsum([0, *(len(item.kind) for item in items[:-1])])
        self._ops = np.array([item.ops for item in items])

    def seconds(self, log_parameters: Floats) -> Floats:
        """Seconds of each item under `log_parameters`: the natural logarithms of `PARAMETERS`, in their order."""
        linear, conv, attention, memory, per_op, launch = np.exp(log_parameters)
        rates = np.array([linear, linear * conv, linear * attention, np.inf])
        each = np.maximum(self._executed / rates[self._kind], self._bytes / memory)
        device, host = np.add.reduceat(each, self._starts) + self._ops * per_op, self._ops * launch
        high, low = np.maximum(device, host), np.minimum(device, host)
        smooth: Floats = high * (1.0 + (low / high) ** _SHARPNESS) ** (1.0 / _SHARPNESS)
        return smooth

    def gradient(self, log_parameters: Floats, step: float = 1e-4) -> Floats:
        """Relative change of each item's seconds by each log parameter (items x parameters)."""
        nudges = np.eye(len(log_parameters)) * step
        columns = [
            np.log(self.seconds(log_parameters + nudge) / self.seconds(log_parameters - nudge)) for nudge in nudges
        ]
        return np.stack(columns, axis=1) / (2 * step)
