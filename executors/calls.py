"""What one call of a module does, counted on torch's meta device: real modules run on shapes alone, without memory.

FLOPs are 2 x multiply-accumulates of convolutions, linear layers and attention products, as torch.utils.flop_counter
counts them. Operations are ATen calls that are no views, about the number of kernels that an eager run launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_VIEWS = (
    *("view", "reshape", "permute", "transpose", "expand", "slice", "select", "split", "chunk", "unsqueeze"),
    *("squeeze", "detach", "alias", "as_strided", "t.default", "unbind", "narrow", "size", "stride", "prim."),
    *("empty", "lift", "sym_"),
)
"""Parts of the names of ATen calls that are not counted: they move no data, but for `cat.default`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What one call of a module does: operations, and FLOPs by kind."""

    ops: int
    flop_conv: int
    flop_linear: int
    flop_attention: int

    @property
    def flop(self) -> int:
        return self.flop_without_attention_products + self.flop_attention

    @property
    def flop_without_attention_products(self) -> int:
        return self.flop_conv + self.flop_linear


class _Operations(TorchDispatchMode):
    """Counts ATen calls that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(part in str(func) for part in _VIEWS)
        return func(*args, **(kwargs or {}))


class _AttentionProducts(TorchFunctionMode):
    """Takes scaled_dot_product_attention as one operation: kernels fuse it, the meta device would take it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.flop = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Scores and weighted values: two products of every query with every key."""
        self.count += 1
        self.flop += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def count_calls(call: Callable[[], object]) -> Calls:
    """What a call on the meta device does."""
    flops, operations, attention = FlopCounterMode(display=False), _Operations(), _AttentionProducts()
    with torch.no_grad(), flops, operations, attention:
        call()
    kinds = {str(op): int(count) for op, count in flops.get_flop_counts().get("Global", {}).items()}
    conv = sum(count for op, count in kinds.items() if "convolution" in op)
    return Calls(
        ops=operations.count + attention.count,
        flop_conv=conv,
        flop_linear=sum(kinds.values()) - conv,
        flop_attention=attention.flop,
    )
