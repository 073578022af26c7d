"""Rows that are nearly the same: MinHash signatures, candidates by bands of them, and what a candidate is held to.

Legend: N rows, B bands, T shingles, M candidates.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_cli.quality.checks import NEGATIONS, Texts, loose

Keys = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

SHINGLE = 5  # characters
VALUES, BAND = 128, 6  # of a signature, and of a band of it: of responses that share 0.8, 99.8 % are candidates
BANDS = VALUES // BAND
NEIGHBOURS = 4  # of a row in each band that become candidates: no boilerplate makes them many
SHARE = 0.8  # of two rows' shingles that are common
LONGEST = 2**16  # characters of a part that are looked at
LEAST = 120  # characters of both responses: shorter ones are alike by chance, so that their prompt must be the same
MOST = 160  # shingles of a part that only one row has: a question behind much boilerplate is another question
_NUMBER = re.compile(r"\d+")
_MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5, 0xD6E8FEB86659FD93)
_PARTS = np.array([0x1B873593CC9E2D51, 0x85EBCA6B27D4EB2F], np.uint64)
_WEIGHTS = np.array([*_MIX, 0xA0761D6478BD642F], np.uint64)


def band_keys(rows: Sequence[Texts]) -> Keys:
    """A number for each band of a signature of each row's responses, from normalized texts: (N, B).

    Prompts are not in it: many rows may share most of theirs. Those of short responses are, as a whole.
    """
    from rensa import RMinHash

    hashes, ends = _shingles(rows)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, VALUES, 1)
    values = np.array(matrix.to_rows(), np.uint64)[:, : BANDS * BAND].reshape(len(rows), BANDS, BAND)
    return mixed((values * _WEIGHTS).sum(-1, dtype=np.uint64)).astype(np.uint32)


def _shingles(rows: Sequence[Texts]) -> tuple[npt.NDArray[np.uint64], Places]:
    """Hashes of the responses' shingles (T,), one from each character on, and where each row's end (N + 1,).

    The same shingle is another one in the other response, and under another prompt where responses are short.
    """
    gap = "\0" * (SHINGLE - 1)
    texts = [text[:LONGEST].replace("\0", " ") or " " for row in rows for text in row[1:]]
    codes = np.frombuffer((gap.join(texts) + gap).encode("utf-32-le"), np.uint32)
    within = codes[: len(codes) - SHINGLE + 1] != 0
    hashes = np.zeros(len(within), np.uint64)
    for place, factor in enumerate(_MIX):
        hashes += codes[place : place + len(within)] * np.uint64(factor)
    prompts = np.array([zlib.crc32(" ".join(loose(row.prompt)).encode()) if _short(row) else 0 for row in rows])
    salts = prompts.astype(np.uint64)[:, None] ^ _PARTS  # (N, 2)
    lengths = np.array([len(text) for text in texts])
    hashes = mixed(hashes[within] ^ np.repeat(salts.reshape(-1), lengths))
    return hashes, np.concatenate([[0], np.cumsum(lengths.reshape(-1, 2).sum(1))])


def _short(row: Texts) -> bool:
    return len(row.chosen) + len(row.rejected) < LEAST


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(_MIX[4])
    return values ^ (values >> np.uint64(32))


def candidates(keys: Keys, places: Places) -> Places:
    """Pairs of ``places``, which ascend, that may be near each other, the later one second: (M, 2), by the second."""
    found: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for band in range(keys.shape[1]):
        column = keys[places, band]
        order = np.argsort(column, kind="stable")
        column = column[order]
        for step in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(column[step:] == column[:-step])
            found.append(places[order[same + step]] << 32 | places[order[same]])
        found = [np.unique(np.concatenate(found))]
    return np.stack([found[0] & 0xFFFFFFFF, found[0] >> 32], axis=1)


def across(keys: Keys, some: Places, others: Places) -> Places:
    """Pairs of one of ``some`` and one of ``others`` that may be near each other: (M, 2), by the second."""
    found: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for band in range(keys.shape[1] if len(some) else 0):
        column = keys[some, band]
        order = np.argsort(column, kind="stable")
        column, wanted = column[order], keys[others, band]
        first = np.searchsorted(column, wanted)
        for step in range(NEIGHBOURS):
            place = np.minimum(first + step, len(some) - 1)
            same = column[place] == wanted
            found.append(others[same] << 32 | some[order[place[same]]])
        found = [np.unique(np.concatenate(found))]
    return np.stack([found[0] & 0xFFFFFFFF, found[0] >> 32], axis=1)


def is_near(a: Texts, b: Texts) -> bool:
    """Whether two rows of normalized texts say the same but for a few words.

    Most of their shingles are common, of the responses as of the whole; all numbers and negations are equal.
    """
    a, b = (Texts(*(text[:LONGEST] for text in row)) for row in (a, b))
    for x, y in zip(a, b, strict=True):
        if any(what.findall(x) != what.findall(y) for what in (_NUMBER, NEGATIONS)):
            return False
    if (_short(a) or _short(b)) and loose(a.prompt) != loose(b.prompt):
        return False
    common = either = 0
    for part in ("chosen", "rejected", "prompt"):
        both, whole = _common(getattr(a, part), getattr(b, part))
        common, either = common + both, either + whole
        if whole - both > MOST or both < whole / 2 or (part != "chosen" and common < SHARE * either):
            return False
    return True


def _common(x: str, y: str) -> tuple[int, int]:
    """Shingles that both texts have, and that either has."""
    if x == y or loose(x) == loose(y):
        count = max(len(x) - SHINGLE + 1, 1)
        return count, count
    some, other = ({text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))} for text in (x, y))
    both = len(some & other)
    return both, len(some) + len(other) - both
