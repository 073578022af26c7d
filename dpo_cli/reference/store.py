"""Reference log-probs: computed once and kept on disk.

Each reference has a folder, named by its fingerprint, with shards of log-probs by response. Only rows that are not
cached are computed, and a crash loses at most the shard in flight.

Legend: R responses, N response tokens that carry loss, P pairs.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from dpo_cli.data.batching import MicroBatch, length_weights
from dpo_cli.data.pairs import Ids, Pair, Pairs, count_loss_tokens
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.reference import shards
from dpo_cli.reference.shards import KEY_BYTES, Entry
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, NotWrittenError, UsageError
from dpo_cli.utils.files import DAY, remove_leftovers, write_json

SHARD_SECONDS = 30.0  # a crash costs at most this much work
ABOUT = "about.json"


def response_key(prompt: Ids, response: Ids) -> bytes:
    """Hash all ids, as in ``Pair``, and where the response begins: the key of a log-prob within one reference."""
    content = len(prompt).to_bytes(4, "little") + prompt.tobytes() + response.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def pair_keys(pair: Pair) -> tuple[bytes, bytes]:
    """Return the keys of the chosen and of the rejected response."""
    return response_key(pair.prompt, pair.chosen), response_key(pair.prompt, pair.rejected)


def tokens_of(pair: Pair) -> int:
    """Count the tokens of a pair, its prompt once."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


class ReferenceCache:
    """The log-probs of one reference, by response key: those on disk, and those that this process adds.

    ``model`` names the reference to a person; nothing depends on it.
    """

    def __init__(self, cache_dir: Path, fingerprint: str, warn: Callable[[str], None], model: str = "unknown") -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):  # it names a folder, and may come from an edited manifest
            raise UsageError(f"'{fingerprint[:80]}' is no fingerprint of a reference")
        self.folder = cache_dir.expanduser() / "reference" / fingerprint[:32]
        self.model = model
        self.values: dict[bytes, float] = {}
        for keys, logps, _, _ in shards.read_folder(self.folder, warn):
            self.values.update(zip(keys, logps.tolist(), strict=True))
        with suppress(OSError):
            os.utime(self.folder / ABOUT)  # the time of its last use

    def lookup(self, pairs: Sequence[Pair]) -> Tensor:
        """Return log-probs of pairs: (P, 2) float32 nats, chosen and rejected; NaN where they are not cached."""
        values = [self.values.get(key, math.nan) for pair in pairs for key in pair_keys(pair)]
        return torch.tensor(values, dtype=torch.float32).view(-1, 2)

    def weighted(self, pairs: Pairs, alpha: float) -> Tensor:
        """Return log-probs with the token weights of LD-DPO, see ``length_weights``: (P, 2) nats.

        Raises:
            DpoError: shards have been removed since they were looked up.
        """
        loss_lengths, logps = pairs.loss_lengths, torch.full((len(pairs), 2), torch.nan)
        places: dict[bytes, list[tuple[int, int]]] = {}
        for place, pair in enumerate(pairs):
            for side, key in enumerate(pair_keys(pair)):
                places.setdefault(key, []).append((place, side))
        for keys, _, token_logps, lengths in shards.read_folder(self.folder):
            for key, of_response in zip(keys, token_logps.split(lengths.tolist()), strict=True):
                for place, side in places.get(key, ()):
                    counts = torch.from_numpy(loss_lengths[place])
                    weights = length_weights(counts, alpha).split(counts.tolist())[side]
                    logps[place, side] = (of_response * weights).double().sum()
        logps = distributed.all_reduce_known(logps)
        if logps.isnan().any():
            raise DpoError(f"{self.folder}: log-probs were removed while they were read; start again")
        return logps

    def open_for_writing(self) -> None:
        """Create the folder with the model's name, and remove temporary files that killed processes left there.

        Raises:
            UsageError: nothing can be written there.
        """
        try:
            write_json(self.folder / ABOUT, {"model": self.model})
        except NotWrittenError as error:
            raise UsageError(f"--cache-dir: no reference log-probs can be kept in {self.folder} ({error})") from error
        remove_leftovers(self.folder, older_than=DAY)  # other processes may be writing

    def add(self, entries: Mapping[bytes, Entry]) -> None:
        """Write a shard.

        Raises:
            NotWrittenError: earlier shards are kept.
        """
        try:
            shards.write_shard(self.folder, entries)
        except NotWrittenError as error:
            raise NotWrittenError(f"{error}. Earlier log-probs are kept; rerun the command to continue") from error
        self.values.update((key, entry.logp) for key, entry in entries.items())


def missing_places(logps: Tensor, pairs: Sequence[Pair]) -> list[int]:
    """Return the places of pairs that ``lookup`` did not find; of equal pairs only the first."""
    first: dict[tuple[bytes, bytes], int] = {}
    for place in logps.isnan().any(dim=1).nonzero().flatten().tolist():
        first.setdefault(pair_keys(pairs[place]), place)
    return list(first.values())


@dataclass
class ReferenceLogps:
    """Reference log-probs of P pairs (P, 2) in nats, and what they cost. Hits and misses count pairs."""

    logps: Tensor
    hits: int
    misses: int
    tokens: int = 0
    seconds: float = 0.0


def report_cached(cache: ReferenceCache, pairs: Sequence[Pair], reporter: Reporter) -> tuple[Tensor, list[int]]:
    """Report what the cache has of P pairs; returns that (P, 2), and the places of those to score, equal ones once."""
    logps = distributed.all_reduce_known(cache.lookup(pairs))
    missing = missing_places(logps, pairs)
    cached = len(pairs) - int(logps.isnan().any(dim=1).sum())
    todo = f"{len(missing):,} to score" if missing else "no reference forward"
    reporter.info("reference", f"{cached:,} of {len(pairs):,} pairs cached: {todo}")
    return logps, missing


def fill_reference(
    cache: ReferenceCache, pairs: Sequence[Pair], runner: ModelRunner, reporter: Reporter
) -> ReferenceLogps:
    """Score the pairs that are not cached and write them, a shard at least every 30 s, also when interrupted.

    Ranks share the work. Each writes its own shards, to one folder or, on hosts without a common disk, to its host's;
    log-probs of other ranks come over the network.

    Raises:
        UsageError: the cache cannot be written to.
        DpoError: a log-prob is not finite, or the disk is full; earlier log-probs are kept.
    """
    logps, missing = report_cached(cache, pairs, reporter)
    misses = int(logps.isnan().any(dim=1).sum())
    if not missing:
        return ReferenceLogps(logps, hits=len(pairs), misses=0)
    cache.open_for_writing()
    todo = Pairs(pairs[place] for place in missing)
    began = written = time.monotonic()
    share, waiting = (distributed.rank(), distributed.world_size()), dict[bytes, Entry]()

    def flush() -> None:
        entries = dict(waiting)
        waiting.clear()  # also if it fails: it is not tried again on the way out
        if entries:
            cache.add(entries)

    def score(_: Sequence[int], batch: MicroBatch) -> tuple[Tensor, Tensor]:
        token_logps = runner.token_logps(batch)
        return response_logps(token_logps, batch.lengths), token_logps

    tokens = sum(map(tokens_of, todo))
    try:
        with reporter.progress("reference", tokens, unit="tok") as progress:
            for indices, (sums, token_logps) in runner.forwards(todo, score, share):
                scored = [todo[i] for i in indices]
                values = sums.view(2, -1).T.tolist()  # (P, 2)
                if bad := [pair.where for pair, both in zip(scored, values, strict=True) if not isfinite(sum(both))]:
                    raise DpoError(
                        f"the reference gives a log-prob that is not finite for {', '.join(bad)}; try --dtype float32"
                    )
                keys = [key for pair in scored for key in pair_keys(pair)]
                lengths = [count_loss_tokens(response) for pair in scored for response in (pair.chosen, pair.rejected)]
                waiting.update(zip(keys, map(Entry, chain(*values), token_logps.cpu().split(lengths)), strict=True))
                progress.advance(sum(map(tokens_of, scored)) * share[1])  # the other ranks are about as fast
                if time.monotonic() - written > SHARD_SECONDS:
                    flush()
                    written = time.monotonic()
    finally:
        flush()
    logps, seconds = distributed.all_reduce_known(cache.lookup(pairs)), time.monotonic() - began
    rate = f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    reporter.info("", f"{tokens:,} tokens in {rate}; kept in {cache.folder}")
    return ReferenceLogps(logps, len(pairs) - misses, misses, tokens, seconds)
