"""Comparison of rows: copies, contradictions and leakage, from a few hashes per row.

Legend: N rows.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import numpy.typing as npt

from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.quality.checks import Texts

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


class RowTable:
    """Per row: hashes of its normalized texts, token counts, and the issue types found, as bits."""

    def __init__(self) -> None:
        self._hashes, self._tokens, self._flags = array("Q"), array("i"), array("I")

    def __len__(self) -> int:
        return len(self._flags)

    def add(self, normalized: Texts, pair: Pair | None, flags: int) -> None:
        """Append a row; a refused one has no pair."""
        prompt, chosen, rejected = map(_digest, normalized)
        keys = prompt, _digest(prompt + chosen + rejected), _digest(prompt + rejected + chosen)
        self._hashes.extend(int.from_bytes(key[:8]) for key in keys)
        parts = [pair.prompt, pair.chosen, pair.rejected] if pair else [np.empty(0, np.int32)] * 3
        self._tokens.extend([*map(len, parts), *map(count_loss_tokens, parts[1:])])
        self._flags.append(flags)

    @property
    def hashes(self) -> tuple[Hashes, Hashes, Hashes]:
        """Hashes of the prompt, of the row, and of the row with its responses swapped: (N,) each."""
        prompts, rows, swapped = np.asarray(self._hashes).reshape(-1, 3).T
        return prompts, rows, swapped

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected, and the loss-bearing ones of chosen and rejected: (N, 5)."""
        return np.asarray(self._tokens).reshape(-1, 5)

    @property
    def flags(self) -> npt.NDArray[np.uint32]:
        """Issue types of each row as bits; a view that may be written to: (N,)."""
        return np.asarray(self._flags)


def _digest(content: str | bytes) -> bytes:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).digest()


def find_copies(keys: Hashes, places: Places, bad: npt.NDArray[np.bool_]) -> tuple[Places, Places]:
    """Return the ``places`` whose key occurs at another place that is kept, and that place for each.

    The first place that is not ``bad`` (N,) is kept, or the first of all.
    """
    places = places[np.argsort(bad[places], kind="stable")]
    _, first, group = np.unique(keys[places], return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[group] != np.arange(len(places)))
    copies = copies[np.argsort(places[copies])]
    return places[copies], places[first[group][copies]]


def find_matches(keys: Hashes, places: Places, other_keys: Hashes, others: Places) -> tuple[Places, Places]:
    """Return the ``places`` whose key is among the keys of ``others``, and the first such other for each."""
    values, first = np.unique(other_keys[others], return_index=True)
    matches = places[np.isin(keys[places], values)]
    return matches, others[first[np.searchsorted(values, keys[matches])]]
