"""Reference log-probs: computed once, kept on disk, never wrong.

A folder a reference, named by its fingerprint; in it immutable safetensors shards named by their content's hash. A
shard is whole or absent, several processes may write side by side, and appended rows are all that is computed.

Legend: R responses, N response tokens, P pairs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from dpo_cli.disk import whole_file
from dpo_cli.errors import DpoError
from dpo_cli.logps import Scorer
from dpo_cli.tokens import Ids, Pair

KEY_BYTES = 16
SHARD_SECONDS = 30.0  # a crash costs at most this much work


def response_key(prompt: Ids, response: Ids) -> bytes:
    """Name of a response's log-prob within one reference: a hash of all ids and of where the response begins."""
    content = len(prompt).to_bytes(4, "little") + prompt.tobytes() + response.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def pair_keys(pair: Pair) -> tuple[bytes, bytes]:
    """Keys of the chosen and of the rejected response."""
    return response_key(pair.prompt, pair.chosen), response_key(pair.prompt, pair.rejected)


class ReferenceCache:
    """The log-probs of one reference that are on disk, by response key."""

    def __init__(self, cache_dir: Path, fingerprint: str, warn: Callable[[str], None]) -> None:
        self.folder = cache_dir.expanduser() / "reference" / fingerprint[:32]
        self.values: dict[bytes, float] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            try:
                self.values |= _read_shard(shard)
            except _DamagedError:
                aside = shard.with_suffix(".damaged")
                with suppress(FileNotFoundError):  # another process was first
                    shard.rename(aside)
                warn(f"reference cache: {shard.name[:12]}… is damaged; set aside as {aside}, its pairs are recomputed")
            except (OSError, KeyError, ValueError) as error:
                warn(f"reference cache: {shard} is no shard of ours and is ignored ({error})")

    def write(self, keys: Sequence[bytes], token_logps: Sequence[Tensor]) -> None:
        """Add a shard of R responses: their log-probs, summed and token by token."""
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES).copy()),  # (R, 16)
            "logps": torch.tensor([self.values[key] for key in keys], dtype=torch.float32),  # (R,)
            "token_logps": torch.cat(list(token_logps)),  # (N,)
            "lengths": torch.tensor([len(logps) for logps in token_logps]),  # (R,)
        }
        content = save(tensors)
        with whole_file(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors") as temporary:
            temporary.write_bytes(content)

    def missing(self, pairs: Sequence[Pair]) -> list[int]:
        """Places of the pairs of which a response is not cached; of equal pairs only the first."""
        seen: set[tuple[bytes, bytes]] = set()
        places = []
        for place, pair in enumerate(pairs):
            keys = pair_keys(pair)
            if keys not in seen and not self.has(pair):
                seen.add(keys)
                places.append(place)
        return places

    def has(self, pair: Pair) -> bool:
        """Whether both responses are cached."""
        return all(key in self.values for key in pair_keys(pair))

    def lookup(self, pairs: Sequence[Pair]) -> Tensor:
        """Reference log-probs of pairs that are all cached: (P, 2) float32 nats, chosen and rejected."""
        values = [self.values[key] for pair in pairs for key in pair_keys(pair)]
        return torch.tensor(values, dtype=torch.float32).view(-1, 2)


class _DamagedError(Exception):
    """A shard's content is not what it is named by."""


def _read_shard(shard: Path) -> dict[bytes, float]:
    """Log-probs of a shard by response key; its content is hashed first."""
    content = shard.read_bytes()
    if len(shard.stem) != 64:
        raise ValueError("its name is no hash")
    if hashlib.sha256(content).hexdigest() != shard.stem:
        raise _DamagedError
    tensors = load(content)
    keys = tensors["keys"].numpy().tobytes()
    places = range(0, len(keys), KEY_BYTES)
    return dict(zip((keys[i : i + KEY_BYTES] for i in places), tensors["logps"].tolist(), strict=True))


@dataclass
class Filled:
    """What filling the cache took. Hits and misses count pairs."""

    hits: int
    misses: int
    tokens: int = 0
    seconds: float = 0.0


def fill(
    cache: ReferenceCache,
    pairs: Sequence[Pair],
    scorer: Scorer,
    on_progress: Callable[[int], None] = lambda pairs: None,
) -> Filled:
    """Score the pairs that are not cached and write them, a shard at least every 30 s, also when interrupted.

    Raises:
        DpoError: a log-prob is not finite; it is not kept.
    """
    places = cache.missing(pairs)
    missing = [pairs[place] for place in places]
    hits = sum(cache.has(pair) for pair in pairs)
    filled = Filled(hits=hits, misses=len(pairs) - hits)
    began = written = time.monotonic()
    waiting: list[tuple[bytes, Tensor]] = []  # response keys and their token log-probs (N,)

    def flush() -> None:
        if waiting:
            cache.write([key for key, _ in waiting], [logps for _, logps in waiting])
            waiting.clear()

    try:
        for indices, logps, token_logps in scorer.score(missing):
            scored = [missing[i] for i in indices]
            if not logps.isfinite().all():
                finite = logps.isfinite().view(2, -1).all(dim=0).tolist()
                rows = ", ".join(pair.where for pair, good in zip(scored, finite, strict=True) if not good)
                raise DpoError(f"the reference gives a log-prob that is not finite for {rows}; try --dtype float32")
            sums = logps.view(2, -1).T.reshape(-1).tolist()  # (2P,) chosen, rejected, … of each pair
            keys = [key for pair in scored for key in pair_keys(pair)]
            lengths = [len(response) for pair in scored for response in (pair.chosen, pair.rejected)]
            cache.values.update(zip(keys, sums, strict=True))
            waiting += zip(keys, token_logps.cpu().split(lengths), strict=True)
            filled.tokens += sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in scored)
            on_progress(len(scored))
            if time.monotonic() - written > SHARD_SECONDS:
                flush()
                written = time.monotonic()
    finally:
        flush()
    filled.seconds = time.monotonic() - began
    return filled
