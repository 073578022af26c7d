"""Pairs of token ids: one preference, and many of them in flat columns."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.int64]  # (P, 2): of each pair's prompt, and of the whole pair
DIGEST_PAIRS = 4096  # hashed at a time


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
    """Pairs in flat columns, so that a million take the room of their ids; a pair's arrays are made when asked for."""

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])  # in ids: of each prompt, chosen and rejected, behind the start of the first
        self._files: list[str] = []  # what stands before the number in where a pair comes from: few texts, shared
        self._numbers = array("q")  # the number behind it; -1: none
        self._terms = array("f")  # weight and margin of each
        for pair in pairs:
            self.append(pair)

    @classmethod
    def of_columns(
        cls,
        ids: Ids,
        lengths: Ids,
        files: list[str],
        numbers: npt.NDArray[np.int64],
        terms: npt.NDArray[np.float32],
    ) -> Pairs:
        """Pairs from what ``columns`` gives."""
        pairs = cls()
        pairs._ids.frombytes(ids.data.cast("B"))
        pairs._ends.frombytes(np.cumsum(lengths.reshape(-1), dtype=np.int64).data.cast("B"))
        pairs._files = files
        pairs._numbers.frombytes(numbers.data.cast("B"))
        pairs._terms.frombytes(terms.data.cast("B"))
        return pairs

    def columns(self) -> tuple[Ids, Ids, list[str], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """All P pairs: N token ids in order (N,), ``lengths``, P texts and numbers (P,) that say where from; ``terms``.

        What is given is the columns themselves, to be let go of before a pair is appended.
        """
        return np.asarray(self._ids), self.lengths, self._files, np.asarray(self._numbers), self.terms

    def append(self, pair: Pair) -> None:
        """Add a pair at the end."""
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            self._ids.frombytes(ids.tobytes())
            self._ends.append(len(self._ids))
        file = pair.where.rstrip("0123456789")
        number = pair.where[len(file) :]
        plain = 0 < len(number) < 19 and number[0] != "0"
        self._files.append(sys.intern(file if plain else pair.where))
        self._numbers.append(int(number) if plain else -1)
        self._terms.extend((pair.weight, pair.margin))

    @property
    def lengths(self) -> Ids:
        """Tokens of each pair's prompt, chosen and rejected: (P, 3)."""
        return np.diff(np.asarray(self._ends)).astype(np.int32).reshape(-1, 3)

    @property
    def loss_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens that carry loss in each pair's chosen and rejected: (P, 2)."""
        before = np.concatenate([[0], np.cumsum(carries_loss(np.asarray(self._ids)))])  # of all ids
        return cast(npt.NDArray[np.int64], np.diff(before[np.asarray(self._ends)]).reshape(-1, 3)[:, 1:])

    @property
    def terms(self) -> npt.NDArray[np.float32]:
        """Weight and margin of each pair in the loss: (P, 2)."""
        return np.asarray(self._terms).reshape(-1, 2)

    def select(self, places: Sequence[int]) -> Pairs:
        """The pairs at these places; the object itself if that is all of them in order."""
        if len(places) == len(self) and all(place == i for i, place in enumerate(places)):
            return self
        some = Pairs()
        for place in places:
            start, *ends = self._ends[3 * place : 3 * place + 4]
            some._ends.extend(end - start + len(some._ids) for end in ends)
            some._ids += self._ids[start : ends[-1]]
        some._files = [self._files[place] for place in places]
        some._numbers.extend(self._numbers[place] for place in places)
        for place in places:
            some._terms.extend(self._terms[2 * place : 2 * place + 2])
        return some

    def largest_id(self) -> int:
        """The largest token id of all pairs."""
        ids = np.asarray(self._ids)
        return max(int(ids.max(initial=0)), ~int(ids.min(initial=0)))

    def digest(self) -> str:
        """Content hash over all token ids and lengths in order, and weights and margins if there are any (hex)."""
        content = hashlib.sha256()
        ids, ends = np.asarray(self._ids), np.asarray(self._ends)
        for start in range(0, len(ends) - 1, 3 * DIGEST_PAIRS):
            some = ends[start : start + 3 * DIGEST_PAIRS + 1]
            lengths = np.diff(some).astype(np.int32)
            content.update(np.insert(ids[some[0] : some[-1]], some[:-1] - some[0], lengths).data)  # before each part
        if (self.terms != (1, 0)).any():
            content.update(self.terms.data)
        return content.hexdigest()

    def hashes(self) -> Hashes:
        """Hashes of each pair's prompt and of the pair, whichever side is chosen, by the ids that are read: (P, 2)."""
        ids, content = np.asarray(self._ids), bytearray()
        for place in range(len(self)):
            ends = pairwise(self._ends[3 * place : 3 * place + 4])
            prompt, *sides = (_hash(model_input_ids(ids[start:end]).data) for start, end in ends)
            content += prompt + _hash(prompt + b"".join(sorted(sides)))
        return np.frombuffer(bytes(content), np.int64).reshape(-1, 2)

    def __add__(self, other: Pairs) -> Pairs:
        if not other:
            return self
        both = Pairs()
        both._ids = self._ids + other._ids
        both._ends = self._ends + array("q", (np.asarray(other._ends)[1:] + len(self._ids)).tobytes())
        both._files, both._numbers = self._files + other._files, self._numbers + other._numbers
        both._terms = self._terms + other._terms
        return both

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> Pairs: ...
    def __getitem__(self, place: int | slice) -> Pair | Pairs:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        place = range(len(self))[place]  # from the end where negative, and IndexError, as a list has them
        start, prompt, chosen, rejected = self._ends[3 * place : 3 * place + 4]
        number = self._numbers[place]
        where = self._files[place] + (str(number) if number >= 0 else "")
        ids = np.asarray(self._ids[start:rejected])
        terms = self._terms[2 * place : 2 * place + 2]
        return Pair(where, ids[: prompt - start], ids[prompt - start : chosen - start], ids[chosen - start :], *terms)


def _hash(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def trained_on(pairs: Pairs, trained: Hashes, verb: str = "were") -> dict[str, Any]:
    """How many of the pairs a run trained on, and how many prompts of the other ones; ``text`` says so, if any.

    Shapes: ``trained`` are the ``Pairs.hashes`` of what the run trained on.
    """
    prompts, whole = (np.isin(mine, theirs) for mine, theirs in zip(pairs.hashes().T, trained.T, strict=True))
    count, more = int(whole.sum()), int((prompts & ~whole).sum())
    told = []
    if count:
        of = f"{count:,} of these {len(pairs):,} pairs {verb} trained on"
        told.append(f"{of}: accuracy on them says nothing about new pairs")
    if more:
        told.append(f"the prompts of {more:,}{' more' * bool(count)} {verb} trained on with other responses")
    return {"pairs": count, "prompts": more, "text": "; ".join(told)}
