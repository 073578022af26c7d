"""The worker of this package without prompt trees: a pair shares its prompt and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.trl.meter import serve
from benchmarks.trl.ours import Ours
from dpo_cli.data import batching, trees
from dpo_cli.data.pairs import Ids, Pair


def branches(pairs: Sequence[Pair], sequences: Sequence[Ids]) -> list[tuple[int, int]]:
    """A rejected sequence continues the chosen one from the prompt's end; a chosen one begins a tree."""
    return [(place - 1, len(pairs[place // 2].prompt) if place % 2 else 0) for place in range(len(sequences))]


def related(indices: Sequence[int], pairs: Sequence[Pair]) -> list[list[int]]:
    """Each pair by itself."""
    return [[index] for index in indices]


if __name__ == "__main__":
    batching.branches = trees.branches = branches
    trees.related = related
    trees.most_tokens = lambda pairs, unrelated: unrelated
    serve(Ours)
