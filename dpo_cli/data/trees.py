"""Prompt trees: sequences that begin alike share the tokens of their beginning, so that each is computed once.

A sequence is a prompt and one response. It continues an earlier sequence from the depth at which the two part, or
begins a tree of its own. A pair is the smallest tree: its rejected sequence continues the chosen one from the prompt's
end.

Legend: P pairs; sequences in the order chosen, rejected, chosen, rejected, …
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from dpo_cli.data.pairs import Ids, Pair, common_prefix, model_input_ids, rankings

MIN_SHARED = 16  # tokens: fewer are not worth a branch; docs/performance.md, "Prompt trees"
PATHS = 6  # times the shared beginning: the rest of a forward, so that repeating it costs little
SAMPLE = 256  # pairs


def sequences_of(pairs: Sequence[Pair]) -> list[Ids]:
    """Return the tokens that the model reads for each response of P pairs, its prompt included: 2P arrays."""
    return [model_input_ids(np.concatenate([p.prompt, response])) for p in pairs for response in (p.chosen, p.rejected)]


def branches(pairs: Sequence[Pair], sequences: Sequence[Ids]) -> list[tuple[int, int]]:
    """Return for each sequence an earlier one that it continues, and the tokens that they share; 0 if it begins a tree.

    Apart from a pair's own prompt and from whole sequences, fewer than ``MIN_SHARED`` tokens are not shared.
    """
    continued = _longest_shared(sequences)
    for place, (_, depth) in enumerate(continued):
        prompt = len(pairs[place // 2].prompt) if place % 2 else 0  # which the chosen sequence has
        if depth < min(prompt + MIN_SHARED, len(sequences[place])):
            continued[place] = place - 1, prompt
    return continued


def _longest_shared(sequences: Sequence[Ids]) -> list[tuple[int, int]]:
    """Find for each sequence the earlier one that shares most tokens with its beginning, and their number.

    Sequences that share most are neighbors when sorted; each is looked up and removed, the last one first.
    """
    order, last = sorted(range(len(sequences)), key=lambda i: sequences[i].tobytes()), len(sequences)
    before = dict(zip([*order, last], [last, *order], strict=True))  # the sentinel ``last`` closes the ring
    after = {left: right for right, left in before.items()}
    shared = {i: common_prefix(sequences[before[i]], sequences[i]) for i in order[1:]}  # with the one before
    shared |= {last: 0} | dict.fromkeys(order[:1], 0)
    longest = []
    for i in reversed(range(len(sequences))):
        left, right = before[i], after[i]
        longest.append((left, shared[i]) if shared[i] >= shared[right] else (right, shared[right]))
        before[right], after[left] = left, right
        shared[right] = min(shared[i], shared[right])
    return longest[::-1]


def tree_tokens(pairs: Sequence[Pair]) -> int:
    """Count the tokens of one forward over these pairs."""
    sequences = sequences_of(pairs)
    return sum(map(len, sequences)) - sum(depth for _, depth in branches(pairs, sequences))


def pair_tokens(pair: Pair) -> int:
    """Count the tokens of a forward over one pair, as ``tree_tokens``."""
    shared = common_prefix(model_input_ids(pair.chosen), model_input_ids(pair.rejected))
    shared *= shared >= min(MIN_SHARED, len(pair.rejected))
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - shared


def related(indices: Sequence[int], pairs: Sequence[Pair]) -> list[list[int]]:
    """Group the pairs that have sequences with a common beginning, each group sorted by its prompts."""
    beginnings = [_beginning(pairs[i].prompt, r) for i in indices for r in (pairs[i].chosen, pairs[i].rejected)]
    if len(set(beginnings)) == sum(len({*beginnings[i : i + 2]}) for i in range(0, len(beginnings), 2)):
        return [[index] for index in indices]
    nodes = {content: place for place, content in enumerate(dict.fromkeys(beginnings), len(indices))}
    own = np.repeat(np.arange(len(indices)), 2)  # a graph of pairs and beginnings
    edges = csr_array(
        (np.ones(len(own)), (own, [nodes[each] for each in beginnings])), (len(indices) + len(nodes),) * 2
    )
    labels = connected_components(edges, directed=False)[1].tolist()
    groups = defaultdict[int, list[int]](list)
    for index, label in zip(indices, labels, strict=False):
        groups[label].append(index)
    return [sorted(group, key=lambda i: (pairs[i].prompt.tobytes(), i)) for group in groups.values()]


def _beginning(prompt: Ids, response: Ids) -> bytes:
    ids = prompt if len(prompt) >= MIN_SHARED else np.append(prompt, model_input_ids(response[:MIN_SHARED]))
    return ids[:MIN_SHARED].tobytes()


def subtrees(
    indices: Sequence[int], pairs: Sequence[Pair], costs: Sequence[int], max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Cut the trees of these pairs into parts of at most ``max_tokens``, unless one ranking has more: pairs, tokens.

    Each part computes the tokens of its path again. ``costs`` are the ``pair_tokens`` of all pairs.
    """
    for group in related(indices, pairs):
        if len(group) == 1:
            yield group, costs[group[0]]
            continue
        part, most, seen = list[int](), 0, set[bytes]()  # most: a bound on its tokens, one ranking after the other
        for ranking in rankings(group, pairs):
            prompt, of_ranking = pairs[ranking[0]].prompt, [pairs[i] for i in ranking]
            new = {prompt.tobytes() + r.tobytes(): len(r) for pair in of_ranking for r in (pair.chosen, pair.rejected)}
            alone = own = sum(new.values()) + len(prompt)
            own -= sum(length for content, length in new.items() if content in seen)
            shared = common_prefix(prompt, pairs[part[-1]].prompt) if part else 0
            own -= shared if shared >= MIN_SHARED else 0
            if part and most + own > max_tokens:
                yield part, tree_tokens([pairs[i] for i in part])
                part, most, seen, own = [], 0, set(), alone
            part += ranking
            most += own
            seen |= new.keys()
        yield part, tree_tokens([pairs[i] for i in part])


def most_tokens(pairs: Sequence[Pair], unrelated: int) -> int:
    """Return the most tokens worth a forward: ``unrelated`` ones, or more where repeating what pairs share would cost.

    A forward has room for ``PATHS`` times the beginning that pairs share on average, as a sample of them shows.
    """
    sample = random.Random(0).sample(range(len(pairs)), min(SAMPLE, len(pairs)))
    chosen = sequences_of([pairs[i] for i in sample])[::2]
    shared = sum(depth for _, depth in _longest_shared(chosen) if depth >= MIN_SHARED) // len(sample)
    return min(max(unrelated, PATHS * shared), PATHS * unrelated)
