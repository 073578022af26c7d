"""The schedule of a run: which pairs make a step, and which of them lie in one forward.

A ranking is in one step and in one forward; so is a pair that belongs to none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Literal

from dpo_cli.data.pairs import Pair, rankings
from dpo_cli.data.trees import pair_tokens, subtrees

Layout = Literal["shared", "packed", "padded", "alone"]
Step = list[tuple[int, ...]]  # the pairs of each micro-batch; rank r runs step[r::world_size]
Part = tuple[list[int], int]  # pairs that stay together in a forward, and their tokens


def build_schedule(
    pairs: Sequence[Pair],
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

    Units: ``max_tokens`` in tokens per forward, see ``row_costs``.
    """
    steps, costs = step_pairs(pairs, batch_size, epochs, max_steps, seed), row_costs(pairs, layout)
    return [split_into_micro_batches(indices, pairs, costs, layout, max_tokens, world_size) for indices in steps]


def step_pairs(
    pairs: Sequence[Pair], batch_size: int, epochs: int, max_steps: int | None, seed: int
) -> list[list[int]]:
    """Return the pair indices of every step, which depend on neither the model nor the device.

    Each epoch visits every pair exactly once, in an order of its own. A step has at most ``batch_size`` pairs, unless
    one ranking has more; the last of an epoch, and one whose next ranking does not fit, may be smaller.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = rankings(range(len(pairs)), pairs)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        first = len(steps)
        for ranking in order:
            if len(steps) == first or len(steps[-1]) + len(ranking) > batch_size:
                steps.append([])
            steps[-1] += ranking
        if max_steps is not None and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def split_into_micro_batches(
    indices: Sequence[int],
    pairs: Sequence[Pair],
    costs: Sequence[int],
    layout: Layout,
    max_tokens: int,
    world_size: int,
) -> Step:
    """Pack the pairs of one step into micro-batches, the same number for each of ``world_size`` ranks.

    Those with the most rankings are split, else empty ones added, until their number is a multiple of ``world_size``;
    a pair alone is one, too.
    """
    packed = pack(parts(indices, pairs, costs, layout, max_tokens), layout, max_tokens)
    bins = [rankings(indices, pairs) for indices in packed]
    while len(bins) % world_size:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]))
        split = bins[largest]
        if len(split) < 2:
            bins.append([])
        else:
            bins[largest : largest + 1] = [split[::2], split[1::2]]
    return [tuple(chain(*each)) for each in bins]


def parts(
    indices: Sequence[int], pairs: Sequence[Pair], costs: Sequence[int], layout: Layout, max_tokens: int
) -> list[Part]:
    """Return what stays together in a forward, the part with most tokens first: trees where they are shared."""
    if layout == "shared":
        packable = list(subtrees(indices, pairs, costs, max_tokens))
    else:
        packable = [(each, count_tokens(each, pairs, costs, layout)) for each in rankings(indices, pairs)]
    return sorted(packable, key=lambda part: (-part[1], part[0]))


def pack(found: Sequence[Part], layout: Layout, max_tokens: int) -> list[tuple[int, ...]]:
    """Pack parts, in the order of ``parts``, first-fit in bins of at most ``max_tokens``; a longer one gets its own.

    In a padded forward every pair costs as much as the longest. In the layout ``alone`` each part gets its own bin, so
    that every bin of a single pair takes the same number of forwards.
    """
    bins: list[list[int]] = []
    sizes: list[tuple[int, int]] = []  # tokens of each bin, and of its longest pair if it is padded
    if layout == "alone":
        max_tokens = 0
    for indices, tokens in found:
        longest = tokens // len(indices) if layout == "padded" else 0
        for place, (before, width) in enumerate(sizes):
            width = max(width, longest)
            size = (len(bins[place]) + len(indices)) * width if width else before + tokens
            if size <= max_tokens:
                bins[place] += indices
                sizes[place] = size, width
                break
        else:
            bins.append([*indices])
            sizes.append((tokens, longest))
    return [tuple(b) for b in bins]


def row_costs(pairs: Sequence[Pair], layout: Layout) -> list[int]:
    """Return the number of tokens that each pair takes up in a forward of this layout."""
    lengths = ((len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)
    if layout == "padded":
        return [2 * (prompt + max(chosen, rejected)) for prompt, chosen, rejected in lengths]
    if layout == "shared":
        return [pair_tokens(pair) for pair in pairs]
    return [2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths]


def count_tokens(indices: Sequence[int], pairs: Sequence[Pair], costs: Sequence[int], layout: Layout) -> int:
    """Count the tokens of one forward over these pairs."""
    if layout == "shared" and len(indices) > 1:
        return sum(tokens for _, tokens in parts(indices, pairs, costs, layout, sys.maxsize))
    each = [costs[i] for i in indices]
    return len(each) * max(each, default=0) if layout == "padded" else sum(each)


def probe_pairs(pairs: Sequence[Pair], layout: Layout, max_tokens: int) -> list[Pair]:
    """Select pairs for a trial forward: the longest that fits into ``max_tokens``, if any, and the shortest."""
    costs = row_costs(pairs, layout)
    shortest = costs.index(min(costs))
    longest = max(range(len(costs)), key=lambda i: costs[i] if costs[i] <= max_tokens else 0)
    return [pairs[i] for i in ([longest] if costs[longest] <= max_tokens else []) + [shortest]]
