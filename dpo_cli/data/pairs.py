"""Pairs of token ids: one preference, and many of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.int64]  # (P, 2): of each pair's prompt, and of the whole pair


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference; ``prompt + chosen`` and ``prompt + rejected`` are what the model reads.

    A response token without loss, such as one of a tool result, is stored as ``~id``, which is negative; see
    ``model_input_ids``. Every response has at least one token with loss.
    """

    where: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    weight: float = 1.0  # multiplies its loss
    margin: float = 0.0  # by which its rewards should at least differ
    ranking: int = 0  # equal for the pairs of one ranking, each of which begins where the one before it ends


def model_input_ids(ids: Ids) -> Ids:
    """Return the ids that the model reads: ``~id`` of a token without loss becomes ``id``."""
    return np.maximum(ids, ~ids)


def common_prefix(a: Ids, b: Ids) -> int:
    """Count the ids with which both begin."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def count_loss_tokens(response: Ids) -> int:
    """Count the tokens of a response that carry loss: those whose log-probs are summed."""
    return int(np.count_nonzero(response >= 0))


def rankings(indices: Iterable[int], pairs: Sequence[Pair]) -> list[list[int]]:
    """Group indices of pairs by ranking: those of one follow each other and stay together; any other pair is alone."""
    groups = list[list[int]]()
    for index in indices:
        if groups and pairs[index].ranking and pairs[index].ranking == pairs[groups[-1][0]].ranking:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class Pairs(list[Pair]):
    """Pairs in order, and arrays over all of them."""

    @property
    def ids(self) -> Ids:
        """The ids of all prompts, chosen and rejected responses in order: (N,)."""
        parts = [ids for pair in self for ids in (pair.prompt, pair.chosen, pair.rejected)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    @property
    def lengths(self) -> Ids:
        """Tokens of each pair's prompt, chosen and rejected: (P, 3)."""
        lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in self]
        return np.array(lengths, np.int32).reshape(-1, 3)

    @property
    def loss_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens that carry loss of each pair's chosen and rejected: (P, 2)."""
        counts = [(count_loss_tokens(pair.chosen), count_loss_tokens(pair.rejected)) for pair in self]
        return np.array(counts, np.int64).reshape(-1, 2)

    @property
    def terms(self) -> npt.NDArray[np.float32]:
        """Weight and margin of each pair in the loss: (P, 2)."""
        return np.array([(pair.weight, pair.margin) for pair in self], np.float32).reshape(-1, 2)

    def select(self, places: Iterable[int]) -> Pairs:
        """Return the pairs at these places."""
        return Pairs(self[place] for place in places)

    def digest(self) -> str:
        """Hash all token ids and lengths in order, and weights and margins if there are any (hex)."""
        content = hashlib.sha256(self.lengths.tobytes())
        content.update(self.ids.data)
        if (self.terms != (1, 0)).any():
            content.update(self.terms.data)
        return content.hexdigest()

    def hashes(self) -> Hashes:
        """Hash each pair's prompt, and the pair irrespective of which side is chosen, by its input ids: (P, 2)."""
        content = bytearray()
        for pair in self:
            prompt, *sides = (_hash(model_input_ids(ids).data) for ids in (pair.prompt, pair.chosen, pair.rejected))
            content += prompt + _hash(prompt + b"".join(sorted(sides)))
        return np.frombuffer(bytes(content), np.int64).reshape(-1, 2)

    def __add__(self, other: list[Pair]) -> Pairs:  # type: ignore[override]
        return Pairs([*self, *other])


def _hash(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def trained_on(pairs: Pairs, trained: Hashes, verb: str = "were") -> dict[str, Any]:
    """Count the pairs that a run trained on, and the prompts of other pairs; ``text`` reports both, if any.

    Shapes: ``trained`` are the ``Pairs.hashes`` of what the run trained on, (P, 2).
    """
    prompts, whole = (np.isin(ours, theirs) for ours, theirs in zip(pairs.hashes().T, trained.T, strict=True))
    count, more = int(whole.sum()), int((prompts & ~whole).sum())
    messages = []
    if count:
        of = f"{count:,} of these {len(pairs):,} pairs {verb} trained on"
        messages.append(f"{of}: accuracy on them says nothing about new pairs")
    if more:
        messages.append(f"the prompts of {more:,}{' more' * bool(count)} {verb} trained on with other responses")
    return {"pairs": count, "prompts": more, "text": "; ".join(messages)}
