"""Prompt trees: sequences that begin alike share the tokens of their beginning, so that each is computed once.

A sequence is a prompt and one response. It continues an earlier sequence from the depth at which the two part, or
begins a tree of its own. A pair is the smallest tree: its rejected sequence continues the chosen one from the prompt's
end.

Legend: P pairs; sequences in the order chosen, rejected, chosen, rejected, …
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dpo_cli.data.pairs import Ids, Pair, common_prefix, model_input_ids

MIN_SHARED = 64  # tokens: fewer are not worth a branch; docs/performance.md, "Prompt trees"


def sequences_of(pairs: Sequence[Pair]) -> list[Ids]:
    """Return the tokens that the model reads for each response of P pairs, its prompt included: 2P arrays."""
    return [model_input_ids(np.concatenate([p.prompt, response])) for p in pairs for response in (p.chosen, p.rejected)]


def branches(pairs: Sequence[Pair], sequences: Sequence[Ids]) -> list[tuple[int, int]]:
    """Return for each sequence an earlier one that it continues, and the tokens that they share; 0 if it begins a tree.

    Apart from a pair's own prompt and from whole sequences, fewer than ``MIN_SHARED`` tokens are not shared.
    """
    found = _longest_shared(sequences)
    for place, (_, depth) in enumerate(found):
        prompt = len(pairs[place // 2].prompt) if place % 2 else 0  # which the chosen sequence has
        if depth < min(prompt + MIN_SHARED, len(sequences[place])):
            found[place] = place - 1, prompt
    return found


def _longest_shared(sequences: Sequence[Ids]) -> list[tuple[int, int]]:
    """Find for each sequence the earlier one that shares most tokens with its beginning, and their number.

    Sequences that share most are neighbors in alphabetical order, so the last one is looked up and removed first.
    """
    content = [ids.astype(">i4").tobytes() for ids in sequences]
    order, last = sorted(range(len(sequences)), key=content.__getitem__), len(sequences)
    before = dict(zip([*order, last], [last, *order], strict=True))  # the sentinel ``last`` closes the ring
    after = {left: right for right, left in before.items()}
    shared = {i: common_prefix(sequences[before[i]], sequences[i]) for i in order[1:]}  # with the one before
    shared |= {last: 0} | dict.fromkeys(order[:1], 0)
    found = []
    for i in reversed(range(len(sequences))):
        left, right = before[i], after[i]
        found.append((left, shared[i]) if shared[i] >= shared[right] else (right, shared[right]))
        before[right], after[left] = left, right
        shared[right] = min(shared[i], shared[right])
    return found[::-1]


def own_tokens(pairs: Sequence[Pair]) -> list[int]:
    """Count the tokens that each pair adds to a forward of the pairs before it."""
    sequences = sequences_of(pairs)
    own = [len(ids) - depth for ids, (_, depth) in zip(sequences, branches(pairs, sequences), strict=True)]
    return [sum(own[i : i + 2]) for i in range(0, len(own), 2)]


def related(indices: Sequence[int], pairs: Sequence[Pair]) -> list[list[int]]:
    """Group the pairs that have sequences with a common beginning, each group in alphabetical order of the prompts."""
    beginnings = [_beginning(pairs[i].prompt, r) for i in indices for r in (pairs[i].chosen, pairs[i].rejected)]
    names = {content: number for number, content in enumerate(dict.fromkeys(beginnings))}
    columns = [names[content] for content in beginnings]
    if all(columns[i] == columns[i + 1] for i in range(0, len(columns), 2)) and 2 * len(names) == len(columns):
        return [[index] for index in indices]
    edges = coo_array((np.ones(len(columns)), (np.arange(len(columns)) // 2, columns)))
    groups = defaultdict[int, list[int]](list)
    for index, label in zip(indices, connected_components(edges @ edges.T)[1].tolist(), strict=True):
        groups[label].append(index)
    for group in groups.values():
        group.sort(key=lambda i: (pairs[i].prompt.astype(">i4").tobytes(), i))
    return list(groups.values())


def _beginning(prompt: Ids, response: Ids) -> bytes:
    ids = prompt if len(prompt) >= MIN_SHARED else np.append(prompt, model_input_ids(response[:MIN_SHARED]))
    return ids[:MIN_SHARED].tobytes()


def subtrees(
    indices: Sequence[int], pairs: Sequence[Pair], costs: Sequence[int], max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Cut the trees of these pairs into parts of at most ``max_tokens``, unless a single pair has more: pairs, tokens.

    Each part has the tokens of its own path again. ``costs`` are the tokens of each pair alone.
    """
    for group in related(indices, pairs):
        while len(group) > 1:
            total = np.cumsum(own_tokens([pairs[i] for i in group]))
            count = max(int(np.searchsorted(total, max_tokens, side="right")), 1)
            yield group[:count], int(total[count - 1])
            group = group[count:]
        yield from ((group, costs[i]) for i in group)
