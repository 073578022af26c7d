"""Immutable files of reference log-probs, each named by its content's hash.

A shard is whole or absent and never changes, so reading needs no lock and several processes may add shards to one
folder side by side, also on a network file system, where a database's locks would not hold.

Legend: R responses, N response tokens that carry loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpo_cli.utils.files import atomic_write

KEY_BYTES = 16
NAMES = "[0-9a-f]" * 64 + ".safetensors"


class DamagedError(Exception):
    """A shard cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One response's log-prob, and those of its tokens (N,); nats."""

    logp: float
    token_logps: Tensor


def write_shard(folder: Path, entries: Mapping[bytes, Entry]) -> Path:
    """Add a shard of R responses by their keys.

    Raises:
        NotWrittenError: the folder is unchanged.
    """
    token_logps = [entry.token_logps for entry in entries.values()]
    content = save(
        {
            "keys": _bytes(b"".join(entries)).view(-1, KEY_BYTES),  # (R, 16)
            "logps": torch.tensor([entry.logp for entry in entries.values()], dtype=torch.float32),  # (R,)
            "token_logps": torch.cat(token_logps),  # (N,)
            "lengths": torch.tensor([len(logps) for logps in token_logps]),  # (R,)
            "reference": _bytes(folder.name.encode()),  # files can be copied into the wrong folder
        }
    )
    shard = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    with atomic_write(shard) as temporary:
        temporary.write_bytes(content)
    return shard


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_shard(shard: Path) -> tuple[list[bytes], Tensor, Tensor, Tensor]:
    """Read keys, log-probs (R,), token log-probs (N,) and tokens per response (R,).

    Raises:
        DamagedError: nothing of the file can be used.
        OSError: it cannot be read.
    """
    if shard.is_symlink():
        raise DamagedError("it is a link")
    content = shard.read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.stem:
        raise DamagedError("its content was changed")
    try:
        tensors = load(content)
        keys, logps, token_logps, lengths = (tensors[name] for name in ("keys", "logps", "token_logps", "lengths"))
        if not torch.equal(tensors["reference"], _bytes(shard.parent.name.encode())):
            raise DamagedError("it is of another reference")
    except (SafetensorError, KeyError) as error:
        raise DamagedError(f"it holds something else: {error}") from error
    count = len(keys)
    flat = all(tensor.shape == (count,) for tensor in (logps, lengths)) and token_logps.ndim == 1
    if keys.dtype != torch.uint8 or keys.shape != (count, KEY_BYTES) or not flat:
        raise DamagedError("its tensors have other shapes")
    if int(lengths.sum()) != len(token_logps) or not logps.isfinite().all():
        raise DamagedError("its tensors do not fit each other")
    joined = keys.numpy().tobytes()
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)], logps, token_logps, lengths


def read_folder(
    folder: Path, warn: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[list[bytes], Tensor, Tensor, Tensor]]:
    """Read every usable shard of a folder; damaged ones are removed with a warning."""
    for shard in sorted(folder.glob(NAMES)):
        try:
            yield read_shard(shard)
        except DamagedError as error:
            remove_damaged(shard)
            warn(f"reference cache: {shard} was removed: {error}; its pairs are recomputed")
        except FileNotFoundError:  # pruned meanwhile
            continue
        except OSError as error:
            warn(f"reference cache: {shard} cannot be read and is ignored ({error.strerror})")


def remove_damaged(shard: Path) -> None:
    """Remove a damaged shard if possible; a reader ignores it anyway."""
    with suppress(OSError):
        shard.unlink()
