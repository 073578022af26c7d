"""Pairs that share their beginnings: random forests, and the kinds that real data has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dpo_cli.data.pairs import Ids, Pair

Generator = np.random.Generator


def tokens(rng: Generator, count: int) -> Ids:
    return rng.integers(3, 64, count).astype(np.int32)


def joined(*parts: npt.ArrayLike) -> Ids:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def kinds(rng: Generator) -> dict[str, list[Pair]]:
    """The shapes that data has, each small."""
    system, question, other = tokens(rng, 12), tokens(rng, 5), tokens(rng, 3)
    a, b, c, d = (tokens(rng, n) for n in (7, 6, 1, 4))
    prompt = joined(system, question)
    ranked = [Pair("ranked", prompt, *each) for each in ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))]
    turns, history = [], joined(system)
    for _ in range(6):
        history = joined(history, tokens(rng, 4))
        answer = tokens(rng, 5)
        turns.append(Pair("turn", history, answer, tokens(rng, 3)))
        history = joined(history, answer)
    return {
        "a common system prompt": [
            Pair("row", joined(system, tokens(rng, n)), tokens(rng, n + 1), tokens(rng, 4)) for n in range(1, 9)
        ],
        "ranked answers": ranked,
        "turns of one conversation": turns,
        "the same pair again": [Pair("row", prompt, a, b)] * 3,
        "the pair the other way round": [Pair("row", prompt, a, b), Pair("row", prompt, b, a)],
        "a response that begins with the other": [
            Pair("row", prompt, joined(a, b), a),
            Pair("row", prompt, d, joined(d, c)),
        ],
        "responses that begin alike": [
            Pair("row", other, joined(a, b), joined(a, d)),
            Pair("row", joined(other, a), c, d),
        ],
        "prompts that go on in a response": [Pair("row", prompt, a, b), Pair("row", joined(prompt, a[:4]), b, c)],
        "one token each": [Pair("row", c, c, d[:1]), Pair("row", c, d[:1], c)],
    }


def forest(seed: int, pairs: int, depth: int, branching: int) -> list[Pair]:
    """Pairs of random paths through a random forest of nodes of 0 to 9 tokens; any node may end the prompt."""
    rng = np.random.default_rng(seed)
    nodes: dict[tuple[int, ...], Ids] = {}
    made = []
    for row in range(pairs):
        shared = int(rng.integers(1, depth + 1))
        start = tuple(rng.integers(0, branching, shared).tolist())
        paths = [start + tuple(rng.integers(0, branching, rng.integers(1, depth + 1)).tolist()) for _ in range(2)]
        for path in (start, *paths):
            for end in range(1, len(path) + 1):
                nodes.setdefault(path[:end], tokens(rng, int(rng.integers(0, 10))))
        prompt = joined([int(rng.integers(3, 5))], *(nodes[start[:end]] for end in range(1, shared + 1)))
        sides = [joined(*(nodes[path[:end]] for end in range(shared + 1, len(path) + 1)), [2]) for path in paths]
        for side in sides:
            side[:-1] = np.where(rng.random(len(side) - 1) < 0.1, ~side[:-1], side[:-1])  # some carry no loss
        made.append(Pair(f"row {row}", prompt, *sides))
    return made
