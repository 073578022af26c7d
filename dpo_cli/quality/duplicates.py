"""What shows only between rows: copies, contradictions, cycles, leakage. A row is a few numbers here, never an object.

Legend: N rows, E edges (a row that chooses one response over another), V responses.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import numpy.typing as npt

from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.quality.checks import Texts
from dpo_cli.quality.near_duplicates import BANDS, Keys, Places, band_keys, mixed

Hashes = npt.NDArray[np.uint64]
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 512, 2**19  # whose signatures are made together
PEELED = 50  # times that responses are taken off which lie on no cycle


class Table:
    """Rows in flat columns: hashes of the normalized prompt, chosen and rejected, tokens, flags, band keys."""

    def __init__(self) -> None:
        self._hashes, self._tokens, self._flags, self._keys = array("Q"), array("i"), array("I"), array("I")
        self._waiting: list[Texts] = []
        self._held = 0  # characters of those

    def __len__(self) -> int:
        return len(self._flags)

    def add(self, plain: Texts, pair: Pair | None, flags: int) -> None:
        """One more row; one that cannot be used has no pair and empty texts."""
        self._hashes.extend(map(_hash, plain))
        if pair is None:
            self._tokens.extend([0] * 5)
        else:
            self._tokens.extend(map(len, (pair.prompt, pair.chosen, pair.rejected)))
            self._tokens.extend(map(count_loss_tokens, (pair.chosen, pair.rejected)))
        self._flags.append(flags)
        self._waiting.append(plain)
        self._held += sum(map(len, plain))
        if len(self._waiting) >= ROWS_AT_ONCE or self._held >= CHARACTERS_AT_ONCE:
            self._sign()

    def _sign(self) -> None:
        if self._waiting:
            self._keys.frombytes(band_keys(self._waiting).tobytes())
            self._waiting, self._held = [], 0

    @property
    def hashes(self) -> Hashes:
        """(N, 3)."""
        return np.asarray(self._hashes).reshape(-1, 3)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected: (N, 3)."""
        return np.asarray(self._tokens).reshape(-1, 5)[:, :3]

    @property
    def trained(self) -> npt.NDArray[np.int32]:
        """Tokens of the prompt, and those of chosen and rejected that carry loss: (N, 3)."""
        return np.asarray(self._tokens).reshape(-1, 5)[:, [0, 3, 4]]

    @property
    def flags(self) -> npt.NDArray[np.uint32]:
        """Bits of the kinds that were found in each row, which may be added to: (N,)."""
        return np.asarray(self._flags)

    @property
    def keys(self) -> Keys:
        """Band keys of all rows: (N, B)."""
        self._sign()
        return np.asarray(self._keys).reshape(-1, BANDS)


def _hash(plain: str) -> int:
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(*columns: Hashes) -> Hashes:
    """One hash of several, in this order."""
    out = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        out = mixed(out ^ column)
    return out


def row_hashes(hashes: Hashes) -> Hashes:
    """A hash of each whole row: (N,)."""
    return _mixed(*hashes.T)


def copies(keys: Hashes, places: Places, bad: npt.NDArray[np.bool_]) -> tuple[Places, Places]:
    """Those of ``places``, which ascend, whose key another one has, and for each the one that stays.

    That is the first that is not ``bad`` (N,), or the first where all are.
    """
    places = places[np.argsort(bad[places], kind="stable")]
    _, first, group = np.unique(keys[places], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[group] != np.arange(len(places)))
    again = again[np.argsort(places[again])]
    return places[again], places[first[group][again]]


def contradictions(hashes: Hashes, places: Places) -> tuple[Places, Places]:
    """Rows for which another has the same prompt and the same responses the other way round, and for each one such."""
    prompt, chosen, rejected = hashes[places].T
    either = _mixed(prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected))
    _, group = np.unique(either, return_inverse=True)
    way = (chosen < rejected).astype(np.int64)
    example = np.full((2, group.max(initial=-1) + 1), -1)
    for each in (0, 1):
        example[each, group[way == each]] = np.flatnonzero(way == each)
    opposite = example[1 - way, group]
    both = (opposite >= 0) & (chosen != rejected)
    return places[both], places[opposite[both]]


def cycles(hashes: Hashes, places: Places) -> Places:
    """Rows that lie on a cycle of preferences on one prompt; rows that contradict each other are not to be given."""
    prompt, chosen, rejected = hashes[places].T
    differ = chosen != rejected
    places = places[differ]
    ends = np.concatenate([_mixed(prompt, chosen)[differ], _mixed(prompt, rejected)[differ]])
    nodes = np.unique(ends, return_inverse=True)[1].reshape(2, -1)  # (2, E), each from 0 to V - 1
    for _ in range(PEELED):
        count = int(nodes.max(initial=-1)) + 1
        above, below = (np.bincount(side, minlength=count) > 0 for side in nodes)
        kept = above[nodes[1]] & below[nodes[0]]  # the loser wins elsewhere, and the winner loses
        if kept.all():
            break
        places, nodes = places[kept], nodes[:, kept]
    if not len(places):
        return places
    from networkx import DiGraph, strongly_connected_components

    graph = DiGraph(zip(*nodes.tolist(), strict=True))
    component = np.empty(int(nodes.max()) + 1, np.int64)
    for number, found in enumerate(strongly_connected_components(graph)):
        component[list(found)] = number
    on_one: Places = places[component[nodes[0]] == component[nodes[1]]]
    return on_one


def shared_with(keys: Hashes, places: Places, others: Places) -> tuple[Places, Places]:
    """Those of ``places`` whose key one of ``others`` has, and for each one such."""
    values, first = np.unique(keys[others], return_index=True)
    if not len(values):
        return places[:0], places[:0]
    at = np.minimum(np.searchsorted(values, keys[places]), len(values) - 1)
    found = values[at] == keys[places]
    return places[found], others[first[at[found]]]
