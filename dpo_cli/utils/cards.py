"""GPUs by name, for a trace: what a run would take there is computed on any machine, see training/trace.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dpo_cli.utils.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: matrix products without sparsity, sums in float32.

    Units: memory as torch reports it, in bytes; rates in FLOP per second; bandwidth in bytes per second.
    """

    name: str
    capability: tuple[int, int]
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float


# Compute capability, GiB that torch reports, TFLOP/s in bfloat16 and float32, TB/s. Source: NVIDIA's data sheets.
_SHEETS = {
    "b200": ((10, 0), 178.3, 2250, 75, 7.7),
    "h200": ((9, 0), 139.7, 989.4, 66.9, 4.8),
    "h100": ((9, 0), 79.1, 989.4, 66.9, 3.35),
    "a100": ((8, 0), 79.1, 312, 19.5, 2.039),
    "a100-40": ((8, 0), 39.4, 312, 19.5, 1.555),
    "l40s": ((8, 9), 44.3, 362, 91.6, 0.864),
    "l4": ((8, 9), 22.0, 121, 30.3, 0.3),
    "a10g": ((8, 6), 22.0, 70, 35, 0.6),
    "5090": ((12, 0), 31.4, 209.5, 104.8, 1.792),
    "4090": ((8, 9), 23.6, 165.2, 82.6, 1.008),
    "3090": ((8, 6), 23.7, 71, 35.6, 0.936),
    "v100": ((7, 0), 31.7, 15.7, 15.7, 0.9),  # no bfloat16: as float32
    "t4": ((7, 5), 14.7, 8.1, 8.1, 0.32),
}
CARDS = {
    name: Card(name, capability, gib * 2**30, bfloat16 * 1e12, float32 * 1e12, bandwidth * 1e12)
    for name, (capability, gib, bfloat16, float32, bandwidth) in _SHEETS.items()
}

_traced: list[Card] = []  # the card that stands in for the device, while a trace runs


@contextmanager
def standing_in(card: Card) -> Iterator[None]:
    """Choose everything that depends on the device as on this card, while tensors are fake ones of the CPU."""
    _traced.append(card)
    try:
        yield
    finally:
        _traced.pop()


def traced_card() -> Card | None:
    """Return the card that stands in for the device; None outside of a trace."""
    return _traced[-1] if _traced else None


def check_trace(dry_run: bool, trace: bool, card: str | None) -> bool:
    """Whether a training is to be traced.

    Raises:
        UsageError: these options need another one, or there is no such card.
    """
    if (trace or card) and not (dry_run and trace):
        raise UsageError("--trace, --card: need --dry-run and --trace, as in dpo train --dry-run --trace --card h100")
    if card:
        find_card(card)
    return trace


def find_card(name: str | None) -> Card:
    """Return the card of ``--card``, or without a name the one that is in this machine.

    Raises:
        UsageError: it is not in the table.
    """
    if name is not None:
        if name.lower() in CARDS:
            return CARDS[name.lower()]
        raise UsageError(f"--card {name}: must be one of: {', '.join(CARDS)}{did_you_mean(name.lower(), CARDS)}")
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"--trace: there is no CUDA device here; name one by --card: {', '.join(CARDS)}")
    here, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    same = [card for card in CARDS.values() if re.search(rf"\b{card.name.partition('-')[0]}\b", here.lower())]
    if not same:
        raise UsageError(f"--trace: nothing is known of the {here} here; name a card by --card: {', '.join(CARDS)}")
    return replace(min(same, key=lambda card: abs(card.memory - memory)), memory=memory)
