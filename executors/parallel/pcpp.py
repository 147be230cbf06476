"""PCPP: partially conditioned patch parallelism (arXiv 2412.02962; code xiuyuz/pcpp).

DistriFusion with one change: after the synchronous steps, self-attention sees its own stripe and only a part of each
neighbour's. The public code sends whole stripes to the neighbours and uses a part of them, so its part saves attention
work but no traffic; here only the part that is used travels, unless `whole_stripes` asks for the public behaviour. A
transfer has a whole step to arrive, as DistriFusion's; in the public code it has one interval between attentions, which
is also what the planner assumes.
"""

from __future__ import annotations

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from .distrifusion import TENSORS_PER_MESSAGE, StaleExchange, StripeDenoiser, TensorBucket, register, self_attentions
from .group import Group


def used_tokens(tokens: int, partial: float) -> int:
    """Tokens of a neighbour's stripe of `tokens` that attention sees, rounded to the nearest (halves to even).

    `partial` is a share, 0 to 1.
    """
    return round(tokens * partial)


class NeighbourExchange:
    """The stripe ends of both neighbours as of the previous step, layer by layer.

    A rank sends the head of its stripe up and the tail down, and holds the tail of the one above and the head of the
    one below; at the image's border there is none.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.above = group.rank - 1 if group.rank > 0 else None
        self.below = group.rank + 1 if group.rank + 1 < group.size else None
        self._held: dict[str, dict[int, Tensor]] = {}
        self._packing: tuple[TensorBucket, TensorBucket] = TensorBucket(), TensorBucket()
        self._travelling: dict[str, tuple[TensorBucket, TensorBucket]] = {}

    @property
    def neighbours(self) -> list[int]:
        return [rank for rank in (self.above, self.below) if rank is not None]

    def forget(self) -> None:
        for buckets in {id(buckets): buckets for buckets in self._travelling.values()}.values():
            self._arrive(buckets)
        self._held.clear()

    def keep(self, name: str, ends: dict[int, Tensor]) -> None:
        """Hold the neighbours' stripe ends, by rank, for the next step."""
        self._held[name] = ends

    def stale(self, name: str) -> dict[int, Tensor]:
        """The neighbours' stripe ends of the step before, by rank."""
        if name in self._travelling:
            self._arrive(self._travelling[name])
        return self._held[name]

    def post(self, name: str, head: Tensor, tail: Tensor) -> None:
        """Let the own stripe's ends set out for the neighbours."""
        up, down = self._packing
        up.add(name, head)
        down.add(name, tail)
        if len(up.shapes) == TENSORS_PER_MESSAGE:
            self.flush()

    def flush(self) -> None:
        """Send what is packed; called at the end of a step."""
        up, down = self._packing
        if up.shapes:
            messages = {self.above: up.packed(), self.below: down.packed()}
            outgoing = {rank: tensor for rank, tensor in messages.items() if rank is not None}
            incoming = {rank: torch.empty_like(tensor) for rank, tensor in outgoing.items()}
            up.pending = self.group.start_exchange(outgoing, incoming)
            self._travelling |= dict.fromkeys(up.shapes, self._packing)
        self._packing = TensorBucket(), TensorBucket()

    def _arrive(self, buckets: tuple[TensorBucket, TensorBucket]) -> None:
        up, _ = buckets
        arrived = up.pending.wait() if up.pending else {}
        by_rank = {rank: up.unpacked(flat) for rank, flat in arrived.items()}
        for name in up.shapes:
            self._held[name] = {rank: tensors[name] for rank, tensors in by_rank.items()}
            del self._travelling[name]


class KeysOfNeighbours(ModelHook):
    """Lets a stripe's queries see its own keys (or values) and the near ends of the neighbours' stale ones.

    From (branches x images, tokens, inner width) to (branches x images, used above + tokens + used below, inner width);
    in synchronous steps to the whole image's tokens.
    """

    def __init__(self, name: str, everyone: StaleExchange, ends: NeighbourExchange, denoiser: PcppDenoiser) -> None:
        super().__init__()
        self.name, self.everyone, self.ends, self.denoiser = name, everyone, ends, denoiser

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        sent = self.denoiser.sent_tokens(output.shape[1])
        if self.everyone.synchronous:
            stripes = self.everyone.group.all_gather(output)
            self.ends.keep(self.name, {rank: self._end(stripes[rank], rank, sent) for rank in self.ends.neighbours})
            return torch.cat(stripes, dim=1)
        used = used_tokens(output.shape[1], self.denoiser.partial)
        near = {rank: self._end(end, rank, used) for rank, end in self.ends.stale(self.name).items()}
        before = [near[self.ends.above]] if self.ends.above in near else []
        after = [near[self.ends.below]] if self.ends.below in near else []
        seen = torch.cat([*before, output, *after], dim=1)
        if not self.everyone.frozen:
            self.ends.post(self.name, output[:, :sent], output[:, output.shape[1] - sent :])
        return seen

    def _end(self, stripe: Tensor, rank: int, tokens: int) -> Tensor:
        """The end of a neighbour's stripe that is near to this rank."""
        return stripe[:, stripe.shape[1] - tokens :] if rank == self.ends.above else stripe[:, :tokens]


class PcppDenoiser(StripeDenoiser):
    """One rank of PCPP: self-attention sees its own stripe and `partial` of each neighbour's."""

    @property
    def partial(self) -> float:
        return float(self.settings["partial"])

    def sent_tokens(self, tokens: int) -> int:
        """Tokens of a stripe that each neighbour is sent."""
        return tokens if self.settings["whole_stripes"] else used_tokens(tokens, self.partial)

    def hook_attention(self) -> None:
        self.ends = NeighbourExchange(self.branch)
        for name, attention in self_attentions(self.unet):
            for projection in ("to_k", "to_v"):
                hook = KeysOfNeighbours(f"{name}.{projection}", self.exchange, self.ends, self)
                register(getattr(attention, projection), hook)

    def begin(self, timesteps: Tensor) -> None:
        super().begin(timesteps)
        if self.branch.size > 1:
            self.ends.forget()

    def end_step(self) -> None:
        super().end_step()
        if self.branch.size > 1:
            self.ends.flush()
