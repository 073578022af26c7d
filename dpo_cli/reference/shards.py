"""Immutable files of reference log-probs, each named by its content's hash.

A shard is whole or absent and never changes, so reading needs no lock, and several processes may add shards to one
folder side by side. A key may be in several shards, with values that differ by arithmetic noise at most.

Legend: R responses, N response tokens that carry loss.
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

from dpo_cli.utils.files import atomic_write

KEY_BYTES = 16
SUFFIX, DAMAGED = ".safetensors", ".damaged"
SMALL_BYTES, MANY = 8 * 2**20, 64  # so many shards smaller than this are merged
MERGED_BYTES = 64 * 2**20  # into some of about this size


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
        NotWrittenError: nothing of it is there.
    """
    token_logps = [entry.token_logps for entry in entries.values()]
    tensors = {
        "keys": _key_rows(b"".join(entries)),
        "logps": torch.tensor([entry.logp for entry in entries.values()], dtype=torch.float32),  # (R,)
        "token_logps": torch.cat(token_logps),  # (N,)
        "lengths": torch.tensor([len(logps) for logps in token_logps]),  # (R,)
    }
    return _write(folder, tensors)


def _write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    content = save(tensors | {"reference": _name(folder)})
    shard = folder / (hashlib.sha256(content).hexdigest() + SUFFIX)
    with atomic_write(shard) as temporary:
        temporary.write_bytes(content)
    return shard


def _name(folder: Path) -> Tensor:
    """The folder's name as bytes: a shard says whose it is, since shards can be copied."""
    return torch.tensor(list(folder.name.encode()), dtype=torch.uint8)


def read_shard(shard: Path) -> tuple[list[bytes], Tensor, Tensor, Tensor]:
    """Its keys, and as tensors the log-probs (R,), the tokens' log-probs (N,) and tokens a response (R,).

    Raises:
        DamagedError, ForeignError: nothing of the file can be used.
        OSError: it cannot be read.
    """
    if len(shard.stem) != 64:
        raise ForeignError("its name is no hash")
    if shard.is_symlink() or shard.is_dir():
        raise ForeignError("it is no file")
    content = shard.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.stem:
        raise DamagedError
    try:
        tensors = load(content)
        keys, logps, token_logps, lengths = (tensors[name] for name in ("keys", "logps", "token_logps", "lengths"))
    except (SafetensorError, KeyError) as error:
        raise ForeignError(f"it holds something else: {error}") from error
    if keys.dtype != torch.uint8 or keys.ndim != 2 or any(t.ndim != 1 for t in (logps, token_logps, lengths)):
        raise ForeignError("its tensors are of other kinds")
    shapes = keys.shape == (len(keys), KEY_BYTES) and len(keys) == len(logps) == len(lengths)
    if not shapes or int(lengths.sum()) != len(token_logps) or not logps.isfinite().all():
        raise ForeignError("its tensors do not fit each other")
    if not torch.equal(tensors.get("reference", torch.empty(0)), _name(shard.parent)):
        raise ForeignError("it is of another reference")
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
        except ForeignError as error:
            warn(f"reference cache: {shard} is no shard of ours and is ignored ({error})")
        except OSError as error:
            warn(f"reference cache: {shard} cannot be read and is ignored ({error.strerror})")
    return values


def responses(folder: Path) -> Iterator[tuple[bytes, Tensor]]:
    """Key and token log-probs (N,) of every response in shards that can be read; of equal keys the last counts."""
    for shard in _each(folder):
        with suppress(OSError, DamagedError, ForeignError):  # ``read_folder`` told
            keys, _, token_logps, lengths = read_shard(shard)
            yield from zip(keys, token_logps.split(lengths.tolist()), strict=True)


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
    """Put many small shards into few. What is merged is removed only when the new shard is on disk.

    Raises:
        NotWrittenError: a new shard cannot be written; no log-prob is lost.
        OSError: an old one cannot be removed; the same.
    """
    sizes: dict[Path, int] = {}
    for shard in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(FileNotFoundError):
            sizes[shard] = shard.stat().st_size
    small = [shard for shard, size in sizes.items() if size < SMALL_BYTES]
    if len(small) < MANY:
        return
    group: list[Path] = []
    for shard in small:
        group.append(shard)
        if sum(sizes[each] for each in group) >= MERGED_BYTES or shard is small[-1]:
            _merge(group)
            group = []


def _merge(group: list[Path]) -> None:
    content, merged = [], []
    for shard in group:
        with suppress(OSError, DamagedError, ForeignError):  # the next reader tells
            content.append(read_shard(shard))
            merged.append(shard)
    if len(merged) < 2:
        return
    keys = [key for shard_keys, _, _, _ in content for key in shard_keys]
    logps, token_logps, lengths = map(torch.cat, list(zip(*content, strict=True))[1:])
    last = torch.zeros(len(keys), dtype=torch.bool)  # of equal keys the last counts, as it does in read_folder
    last[list({key: place for place, key in enumerate(keys)}.values())] = True
    kept_keys = b"".join(key for key, kept in zip(keys, last.tolist(), strict=True) if kept)
    tensors = {
        "keys": _key_rows(kept_keys),
        "logps": logps[last],
        "token_logps": token_logps[last.repeat_interleave(lengths)],
        "lengths": lengths[last],
    }
    new = _write(group[0].parent, tensors)
    for shard in merged:
        if shard != new:
            shard.unlink(missing_ok=True)


def _key_rows(keys: bytes) -> Tensor:
    """Joined keys as rows: (R, 16) bytes."""
    return torch.from_numpy(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES).copy())
