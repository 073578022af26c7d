"""The schedule of a run: which pairs each optimizer step trains on, cut into micro-batches, as a pure function."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from dpo_cli.data.pairs import Pair

Layout = Literal["shared", "packed", "padded", "alone"]
Step = list[tuple[int, ...]]  # the pairs of each micro-batch; rank r runs step[r::world_size]


def build_schedule(
    costs: Sequence[int],
    layout: Layout,
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    max_tokens: int,
    world_size: int,
    seed: int,
) -> list[Step]:
    """Return the micro-batches of every optimizer step of a run; a pure function of its arguments.

    Each epoch visits every pair exactly once, in an order of its own; its last step may be smaller than ``batch_size``.
    The number of micro-batches per step is a multiple of ``world_size``; with too few pairs some are empty.

    Units: ``costs`` and ``max_tokens`` in tokens, see ``row_costs``.
    """
    steps = step_pairs(len(costs), batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)
    return [split_into_micro_batches(indices, costs, layout, max_tokens, world_size) for indices in steps]


def step_pairs(count: int, *, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> list[list[int]]:
    """Return the pair indices of every step, which depend on neither the model nor the device."""
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
        if max_steps is not None and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def split_into_micro_batches(
    indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int, world_size: int
) -> Step:
    """Pack the pairs of one step into micro-batches, the same number for each of ``world_size`` ranks.

    The largest are split until their number is a multiple of ``world_size``; where that is not enough, some are empty.
    """
    bins = pack(indices, costs, layout, max_tokens)
    while len(bins) % world_size:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]))
        pairs = bins[largest]
        if len(pairs) < 2:
            bins.append(())
        else:
            bins[largest : largest + 1] = [pairs[::2], pairs[1::2]]
    return bins


def pack(indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int) -> list[tuple[int, ...]]:
    """Pack pairs into first-fit-decreasing bins of at most ``max_tokens``; a longer pair gets a bin of its own.

    In a padded forward every pair costs as much as the longest, which is the first of its bin. In the layout ``alone``
    each pair gets its own bin, so that every bin takes the same number of forwards.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    if layout == "alone":
        max_tokens = 0
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        charges = (costs[b[0] if layout == "padded" else index] for b in bins)
        fit = next((b for b, (left, charge) in enumerate(zip(room, charges, strict=True)) if charge <= left), None)
        if fit is None:
            bins.append([index])
            room.append(max_tokens - costs[index])
        else:
            room[fit] -= costs[bins[fit][0] if layout == "padded" else index]
            bins[fit].append(index)
    return [tuple(b) for b in bins]


def row_costs(pairs: Sequence[Pair], layout: Layout) -> list[int]:
    """Return the number of tokens that each pair takes up in a forward of this layout."""
    lengths = ((len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)
    if layout == "padded":
        return [2 * (prompt + max(chosen, rejected)) for prompt, chosen, rejected in lengths]
    return [prompt * (1 if layout == "shared" else 2) + chosen + rejected for prompt, chosen, rejected in lengths]


def probe_pairs(pairs: Sequence[Pair], layout: Layout, max_tokens: int) -> list[Pair]:
    """Select pairs for a trial forward: the longest that fits into ``max_tokens``, if any, and the shortest."""
    costs = row_costs(pairs, layout)
    shortest = costs.index(min(costs))
    longest = max(range(len(costs)), key=lambda i: costs[i] if costs[i] <= max_tokens else 0)
    return [pairs[i] for i in ([longest] if costs[longest] <= max_tokens else []) + [shortest]]
