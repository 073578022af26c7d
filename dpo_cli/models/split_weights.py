"""float32 weights as bfloat16 weights that compute and 16 low bits that restore them exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 values into the nearest bfloat16 and the int16 that it lacks.

    Ties round away from zero: rounding them to even, as a cast does, could not be undone.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Restore the float32 values that ``split`` took apart."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


@torch.no_grad()
def split_master_weights(model: nn.Module) -> dict[str, Tensor]:
    """Convert trained fp32 parameters to bf16 in place; returns the low 16 bits by name, a tied weight once.

    Call it before the reference is scored, which then has the same weights.
    """
    low = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype == torch.float32:
            p.data, low[name] = split(p.detach().contiguous())
    return low


@contextmanager
def fp32_weights(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Restore the float32 weights of a split model on the host while the block runs, to export them."""
    halves = {p: p.data for p in model.parameters() if "low" in optimizer.state.get(p, {})}
    try:
        for p, high in halves.items():
            p.data = join(high.cpu(), optimizer.state[p]["low"].cpu().view_as(high))
        yield
    finally:
        for p, high in halves.items():
            p.data = high
