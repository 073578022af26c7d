"""Pairs of token ids: one preference, and many of them in flat columns."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.int64]  # (P, 2): of each pair's prompt, and of the whole pair


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference; ``prompt + chosen`` and ``prompt + rejected`` are what the model reads.

    A response token without loss, such as one of a tool result, is stored as ``~id``; see ``model_input_ids``.
    """

    where: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    weight: float = 1.0  # multiplies its loss
    margin: float = 0.0  # by which its rewards should at least differ


def model_input_ids(ids: Ids) -> Ids:
    """Return the ids that the model reads: ``~id`` of a token without loss becomes ``id``."""
    return np.maximum(ids, ~ids)


def carries_loss(ids: Ids) -> npt.NDArray[np.bool_]:
    """Return the loss mask of response ids; every response has at least one token with loss."""
    return ids >= 0


def count_loss_tokens(response: Ids) -> int:
    """Count the loss-bearing tokens of a response: those whose log-probs are summed."""
    return int(np.count_nonzero(carries_loss(response)))


class Pairs(Sequence[Pair]):
    """Pairs in flat columns, so that a million need little more memory than their ids; a ``Pair`` is made on access."""

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])  # in ids: of each prompt, chosen and rejected, after the start of the first
        self._where: list[str] = []
        self._terms = array("f")  # weight and margin of each
        for pair in pairs:
            self.append(pair)

    @classmethod
    def from_arrays(cls, ids: Ids, lengths: Ids, terms: npt.NDArray[np.float32], where: list[str]) -> Pairs:
        """Build pairs from the ids of all (N,), ``lengths`` (P, 3), ``terms`` (P, 2) and P locations."""
        pairs = cls()
        pairs._ids.frombytes(ids.data.cast("B"))
        pairs._ends.frombytes(np.cumsum(lengths.reshape(-1), dtype=np.int64).data.cast("B"))
        pairs._terms.frombytes(terms.data.cast("B"))
        pairs._where = where
        return pairs

    def append(self, pair: Pair) -> None:
        """Append a pair."""
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            self._ids.frombytes(ids.tobytes())
            self._ends.append(len(self._ids))
        self._where.append(pair.where)
        self._terms.extend((pair.weight, pair.margin))

    def extend(self, other: Pairs) -> None:
        """Append all pairs of another object."""
        self._ends.frombytes((np.asarray(other._ends)[1:] + len(self._ids)).tobytes())
        self._ids += other._ids
        self._where += other._where
        self._terms += other._terms

    @property
    def where(self) -> list[str]:
        """The location of each pair in its file."""
        return self._where

    @property
    def ids(self) -> Ids:
        """The ids of all pairs in order, a view: (N,)."""
        return np.asarray(self._ids)

    @property
    def lengths(self) -> Ids:
        """Tokens of each pair's prompt, chosen and rejected: (P, 3)."""
        return np.diff(np.asarray(self._ends)).astype(np.int32).reshape(-1, 3)

    @property
    def loss_lengths(self) -> npt.NDArray[np.int64]:
        """Loss-bearing tokens of each pair's chosen and rejected: (P, 2)."""
        before = np.concatenate([[0], np.cumsum(carries_loss(self.ids))])  # in all ids
        return cast(npt.NDArray[np.int64], np.diff(before[np.asarray(self._ends)]).reshape(-1, 3)[:, 1:])

    @property
    def terms(self) -> npt.NDArray[np.float32]:
        """Weight and margin of each pair in the loss: (P, 2)."""
        return np.asarray(self._terms).reshape(-1, 2)

    def select(self, places: Sequence[int]) -> Pairs:
        """Return the pairs at these places; the object itself if that is all of them in order."""
        if len(places) == len(self) and all(place == i for i, place in enumerate(places)):
            return self
        return Pairs(self[place] for place in places)

    def largest_id(self) -> int:
        """Return the largest token id of all pairs."""
        return int(model_input_ids(self.ids).max(initial=0))

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

    def __add__(self, other: Pairs) -> Pairs:
        if not other:
            return self
        both = Pairs()
        both.extend(self)
        both.extend(other)
        return both

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> Pairs: ...
    def __getitem__(self, place: int | slice) -> Pair | Pairs:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        place = range(len(self))[place]  # negative indices and IndexError, as for a list
        start, prompt, chosen, rejected = self._ends[3 * place : 3 * place + 4]
        ids = np.asarray(self._ids[start:rejected])
        parts = ids[: prompt - start], ids[prompt - start : chosen - start], ids[chosen - start :]
        return Pair(self._where[place], *parts, *self._terms[2 * place : 2 * place + 2])


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
