"""Immutable files of reference log-probs, each named by its content's hash.

A shard is whole or absent and never changes, so reading needs no lock, and several processes may add shards to one
folder side by side. A key may be in several shards, always with the same value.

Legend: R responses, N response tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpo_cli.disk import whole_file

KEY_BYTES = 16
SUFFIX, DAMAGED = ".safetensors", ".damaged"
SMALL_BYTES, MANY = 8 * 2**20, 64  # so many shards smaller than this are merged into one


class DamagedError(Exception):
    """A shard's content is not what it is named by."""


class ForeignError(Exception):
    """A file in a folder of shards is none; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One response's log-prob, and those of its tokens (N,); nats."""

    logp: float
    token_logps: Tensor


def write_shard(folder: Path, entries: Mapping[bytes, Entry]) -> Path:
    """Add a shard of R responses by their keys.

    Raises:
        DpoError: it cannot be written; nothing of it is there.
    """
    token_logps = [entry.token_logps for entry in entries.values()]
    tensors = {
        "keys": torch.from_numpy(np.frombuffer(b"".join(entries), np.uint8).reshape(-1, KEY_BYTES).copy()),  # (R, 16)
        "logps": torch.tensor([entry.logp for entry in entries.values()], dtype=torch.float32),  # (R,)
        "token_logps": torch.cat(token_logps),  # (N,)
        "lengths": torch.tensor([len(logps) for logps in token_logps]),  # (R,)
    }
    content = save(tensors)
    shard = folder / (hashlib.sha256(content).hexdigest() + SUFFIX)
    with whole_file(shard) as temporary:
        temporary.write_bytes(content)
    return shard


def read_shard(shard: Path) -> tuple[list[bytes], Tensor, Tensor, Tensor]:
    """Its keys, and as tensors the log-probs (R,), the tokens' log-probs (N,) and tokens a response (R,).

    Raises:
        DamagedError, ForeignError: nothing of the file can be used.
        OSError: it cannot be read.
    """
    if len(shard.stem) != 64:
        raise ForeignError("its name is no hash")
    content = shard.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.stem:
        raise DamagedError
    try:
        tensors = load(content)
        keys, logps, token_logps, lengths = (tensors[name] for name in ("keys", "logps", "token_logps", "lengths"))
    except (SafetensorError, KeyError) as error:
        raise ForeignError(f"it holds something else: {error}") from error
    shapes = keys.shape == (len(keys), KEY_BYTES) and len(keys) == len(logps) == len(lengths)
    if not shapes or int(lengths.sum()) != len(token_logps) or not logps.isfinite().all():
        raise ForeignError("its tensors do not fit each other")
    joined = keys.numpy().tobytes()
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)], logps, token_logps, lengths


def read_folder(folder: Path, warn: Callable[[str], None]) -> dict[bytes, float]:
    """All log-probs of a folder by response key. A damaged shard is set aside, a foreign file ignored, both told."""
    values: dict[bytes, float] = {}
    for shard in _each(folder):
        try:
            keys, logps, _, _ = read_shard(shard)
            values.update(zip(keys, logps.tolist(), strict=True))
        except DamagedError:
            warn(f"reference cache: {shard.name[:12]}… is damaged; {set_aside(shard)}, its pairs are recomputed")
        except FileNotFoundError:  # merged meanwhile by another process; its content comes in another shard
            continue
        except (OSError, ForeignError) as error:
            warn(f"reference cache: {shard} is no shard of ours and is ignored ({error})")
    return values


def _each(folder: Path) -> Iterator[Path]:
    """Every shard, also those that other processes add while it goes on."""
    seen: set[Path] = set()
    while fresh := sorted(set(folder.glob(f"*{SUFFIX}")) - seen):
        yield from fresh
        seen.update(fresh)


def set_aside(shard: Path) -> str:
    """Rename a damaged shard, so that it is no longer read; returns what became of it, in words."""
    aside = shard.with_suffix(DAMAGED)
    try:
        with suppress(FileNotFoundError):  # another process was first
            shard.rename(aside)
    except OSError as error:
        return f"it cannot be set aside ({error.strerror})"
    return f"set aside as {aside}"


def merge_small(folder: Path) -> None:
    """Put many small shards into one. What is merged is removed only when the new shard is on disk.

    Raises:
        DpoError: the new shard cannot be written; the folder is as it was.
    """
    small = []
    for shard in folder.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):
            if shard.stat().st_size < SMALL_BYTES:
                small.append(shard)
    if len(small) < MANY:
        return
    entries: dict[bytes, Entry] = {}
    merged = []
    for shard in sorted(small):
        try:
            keys, logps, token_logps, lengths = read_shard(shard)
        except (OSError, DamagedError, ForeignError):  # the next reader tells
            continue
        parts = token_logps.split(lengths.tolist())
        entries.update((key, Entry(logp, part)) for key, logp, part in zip(keys, logps.tolist(), parts, strict=True))
        merged.append(shard)
    if len(merged) > 1:
        kept = write_shard(folder, entries)
        for shard in merged:
            if shard != kept:
                shard.unlink(missing_ok=True)
