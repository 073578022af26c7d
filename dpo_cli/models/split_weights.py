"""float32 weights as bfloat16 ones that compute, and the low halves that bring them back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float32 values into the nearest bfloat16, which computes, and the int16 that is missing in it.

    Ties round away from zero: rounding them to even, as a cast does, could not be undone.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The very float32 values that ``split`` cut."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


@torch.no_grad()
def split_master_weights(model: nn.Module) -> dict[str, Tensor]:
    """Leave a float32 model its bfloat16 halves; returns the low ones by name, a tied weight once.

    Buffers and what is not trained stay as they are. To be done before the reference is scored, which is then that of
    the same weights.
    """
    low = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype == torch.float32:
            p.data, low[name] = split(p.detach().contiguous())
    return low


@contextmanager
def fp32_weights(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Give a halved model its float32 weights back for a while, to be exported; on the host, where there is room.

    A model that was not halved stays as it is.
    """
    halves = {p: p.data for p in model.parameters() if "low" in optimizer.state.get(p, {})}
    try:
        for p, high in halves.items():
            p.data = join(high.cpu(), optimizer.state[p]["low"].cpu().view_as(high))
        yield
    finally:
        for p, high in halves.items():
            p.data = high
