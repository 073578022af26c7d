"""Reference log-probs: computed once and kept on disk.

Each reference has a folder, named by its fingerprint, with shards: immutable files of log-probs by response, each named
by its content's hash. A shard is whole or absent and never changes, so reading needs no lock and several processes may
add shards side by side, also on a network file system, where a database's locks would not hold. Only rows that are not
cached are computed, and a crash loses at most the shard in flight.

Legend: R responses, N response tokens that carry loss, P pairs.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpo_cli.data.batching import MicroBatch, length_weights
from dpo_cli.data.pairs import Ids, Pair, Pairs, count_loss_tokens
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, NotWrittenError, UsageError, reason_of
from dpo_cli.utils.files import CACHED, DAY, atomic_write, remove_leftovers, write_json

SHARD_SECONDS = 30.0  # a crash costs about this much work
FOLDER, ABOUT = CACHED["reference"]
KEY_BYTES = 16
SHARD_GLOB = "[0-9a-f]" * 64 + ".safetensors"

# Keys, log-probs (R,), token log-probs (N,), tokens by response (R,).
Shard = tuple[list[bytes], Tensor, Tensor, Tensor]


class DamagedError(Exception):
    """A shard cannot be used; the message says why."""


def response_key(prompt: Ids, response: Ids) -> bytes:
    """Hash all ids, as in ``Pair``, and where the response begins: the key of a log-prob within one reference."""
    content = len(prompt).to_bytes(4, "little") + prompt.tobytes() + response.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def pair_keys(pair: Pair) -> tuple[bytes, bytes]:
    """Return the keys of the chosen and of the rejected response."""
    return response_key(pair.prompt, pair.chosen), response_key(pair.prompt, pair.rejected)


def pair_length(pair: Pair) -> int:
    """Count the tokens of a pair, its prompt once."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


class ReferenceCache:
    """The log-probs of one reference, by response key: those on disk, and those that this process adds.

    ``model`` names the reference to a person; nothing depends on it.
    """

    def __init__(self, cache_dir: Path, fingerprint: str, warn: Callable[[str], None], model: str = "unknown") -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):  # it names a folder, and may come from an edited manifest
            raise UsageError(f"manifest.json: '{fingerprint[:80]}' is not a reference fingerprint")
        self.folder = cache_dir.expanduser() / FOLDER / fingerprint[:32]
        self.model = model
        self.values: dict[bytes, float] = {}
        for keys, logps, _, _ in read_folder(self.folder, warn):
            self.values.update(zip(keys, logps.tolist(), strict=True))
        with suppress(OSError):
            os.utime(self.folder / ABOUT)  # the time of its last use

    def lookup(self, pairs: Sequence[Pair]) -> Tensor:
        """Return log-probs of pairs: (P, 2) float32 nats, chosen and rejected; NaN where they are not cached."""
        values = [self.values.get(key, math.nan) for pair in pairs for key in pair_keys(pair)]
        return torch.tensor(values, dtype=torch.float32).view(-1, 2)

    def weighted(self, pairs: Sequence[Pair], alpha: float) -> Tensor:
        """Return log-probs with the token weights of LD-DPO, see ``length_weights``: (P, 2) nats.

        Raises:
            DpoError: shards have been removed since they were looked up.
        """
        places: dict[bytes, list[tuple[int, int]]] = {}  # of each response among the pairs
        for place, pair in enumerate(pairs):
            for side, key in enumerate(pair_keys(pair)):
                places.setdefault(key, []).append((place, side))
        logps = torch.full((len(pairs), 2), torch.nan)  # NaN: another rank has it
        for keys, _, token_logps, lengths in read_folder(self.folder):
            for key, of_response in zip(keys, token_logps.split(lengths.tolist()), strict=True):
                for place, side in places.get(key, ()):
                    counts = [count_loss_tokens(each) for each in (pairs[place].chosen, pairs[place].rejected)]
                    weights = length_weights(torch.tensor(counts), alpha).split(counts)[side]
                    logps[place, side] = (of_response * weights).double().sum()
        logps = distributed.all_reduce_known(logps)
        if logps.isnan().any():
            raise DpoError(f"{self.folder}: log-probs were removed while they were read; start again")
        return logps

    def open_for_writing(self) -> None:
        """Create the folder and its ``about.json``, and remove what killed processes left there.

        Raises:
            UsageError: the folder cannot be written to.
        """
        try:
            write_json(self.folder / ABOUT, {"model": self.model})
        except NotWrittenError as error:
            raise UsageError(f"--cache-dir: cannot write reference log-probs to {self.folder} ({error})") from error
        remove_leftovers(self.folder, older_than=DAY)  # other processes may be writing

    def add(self, entries: Mapping[bytes, tuple[float, Tensor]]) -> None:
        """Write a shard of R responses, by key: the log-prob, and those of its tokens (N,), in nats.

        Raises:
            NotWrittenError: the disk is full.
        """
        logps, token_logps = zip(*entries.values(), strict=True)
        content = save(
            {
                "keys": _bytes(b"".join(entries)).view(-1, KEY_BYTES),  # (R, 16)
                "logps": torch.tensor(logps, dtype=torch.float32),  # (R,)
                "token_logps": torch.cat(token_logps),  # (N,)
                "lengths": torch.tensor([len(each) for each in token_logps]),  # (R,)
                "reference": _bytes(self.folder.name.encode()),  # files can be copied into the wrong folder
            }
        )
        try:
            with atomic_write(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors") as temporary:
                temporary.write_bytes(content)
        except NotWrittenError as error:
            raise NotWrittenError(f"{error}. Earlier log-probs are kept; rerun the command to continue") from error
        self.values.update(zip(entries, logps, strict=True))


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# ---- reading shards ---------------------------------------------------------------------------------------------


def read_folder(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Iterator[Shard]:
    """Read every usable shard of a folder; damaged ones are removed with a warning."""
    for shard in sorted(folder.glob(SHARD_GLOB)):
        try:
            yield read_shard(shard)
        except DamagedError as error:
            with suppress(OSError):  # readers ignore it anyway
                shard.unlink()
            warn(f"reference cache: {shard} is damaged: {error}; its pairs are recomputed")
        except FileNotFoundError:  # pruned meanwhile
            continue
        except OSError as error:
            warn(f"reference cache: {shard} cannot be read and is ignored ({reason_of(error)})")


def read_shard(shard: Path) -> Shard:
    """Read a shard.

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
        reference = tensors["reference"]
    except (SafetensorError, KeyError) as error:
        raise DamagedError(f"it holds something else: {error}") from error
    if not torch.equal(reference, _bytes(shard.parent.name.encode())):
        raise DamagedError("it is for another reference")
    count = len(keys)
    flat = all(tensor.shape == (count,) for tensor in (logps, lengths)) and token_logps.ndim == 1
    whole = flat and keys.dtype == torch.uint8 and keys.shape == (count, KEY_BYTES)
    if not whole or int(lengths.sum()) != len(token_logps) or not logps.isfinite().all():
        raise DamagedError("its tensors are not valid")
    joined = keys.numpy().tobytes()
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)], logps, token_logps, lengths


# ---- scoring ----------------------------------------------------------------------------------------------------


@dataclass
class ReferenceLogps:
    """Reference log-probs of P pairs (P, 2) in nats, and what they cost. Hits and misses count pairs.

    ``weighted`` has the token weights of LD-DPO.
    """

    logps: Tensor
    weighted: Tensor
    hits: int = 0
    misses: int = 0
    tokens: int = 0
    seconds: float = 0.0


def lookup_cached(cache: ReferenceCache, pairs: Sequence[Pair], reporter: Reporter) -> tuple[Tensor, list[int]]:
    """Report how many of P pairs are cached; return their log-probs (P, 2) and the distinct places to score."""
    logps = distributed.all_reduce_known(cache.lookup(pairs))
    uncached = logps.isnan().any(dim=1).nonzero().flatten().tolist()
    missing: dict[tuple[bytes, bytes], int] = {}
    for place in uncached:
        missing.setdefault(pair_keys(pairs[place]), place)
    todo = f"{len(missing):,} to score" if missing else "nothing to score"
    reporter.info("reference", f"{len(pairs) - len(uncached):,} of {len(pairs):,} pairs cached: {todo}")
    return logps, list(missing.values())


def fill_reference(
    cache: ReferenceCache, pairs: Sequence[Pair], runner: ModelRunner, reporter: Reporter, ld_alpha: float = 1.0
) -> ReferenceLogps:
    """Score the pairs that are not cached and write them, a shard about every 30 s, also when interrupted.

    Ranks share the work. Each writes its own shards to the cache on its host, which may be a shared disk, and gets the
    other ranks' log-probs over the network.

    Raises:
        UsageError: the cache cannot be written to.
        DpoError: a log-prob is not finite, or the disk is full; earlier log-probs are kept.
    """
    logps, missing = lookup_cached(cache, pairs, reporter)
    misses, tokens, seconds = int(logps.isnan().any(dim=1).sum()), 0, 0.0
    if missing:
        todo, began = Pairs(pairs[place] for place in missing), time.monotonic()
        _score(cache, todo, runner, reporter)
        logps, seconds = distributed.all_reduce_known(cache.lookup(pairs)), time.monotonic() - began
        tokens = sum(map(pair_length, todo))
        rate = f"{seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
        reporter.info("", f"{tokens:,} tokens in {rate}; kept in {cache.folder}")
    weighted = logps if ld_alpha == 1 else cache.weighted(pairs, ld_alpha)
    return ReferenceLogps(logps, weighted, len(pairs) - misses, misses, tokens, seconds)


def _score(cache: ReferenceCache, pairs: Pairs, runner: ModelRunner, reporter: Reporter) -> None:
    """Score this rank's share of the pairs into the cache."""
    cache.open_for_writing()
    share, last_flush = (distributed.rank(), distributed.world_size()), time.monotonic()
    waiting: dict[bytes, tuple[float, Tensor]] = {}

    def flush() -> None:
        entries = dict(waiting)
        waiting.clear()  # also if it fails: no second try on the way out
        if entries:
            cache.add(entries)

    def score(_: Sequence[int], batch: MicroBatch) -> tuple[Tensor, Tensor]:
        token_logps = runner.token_logps(batch)
        return response_logps(token_logps, batch.lengths), token_logps

    try:
        with reporter.progress("reference", sum(map(pair_length, pairs)), unit="tok") as progress:
            for indices, (sums, token_logps) in runner.forwards(pairs, score, share):
                scored = [pairs[i] for i in indices]
                logps = sums.view(2, -1).T.cpu()  # (P, 2)
                if bad := [scored[place].where for place in (~logps.isfinite()).any(1).nonzero().flatten().tolist()]:
                    raise DpoError(
                        f"the reference gives a log-prob that is not finite for {', '.join(bad)}; try --dtype float32"
                    )
                keys = [key for pair in scored for key in pair_keys(pair)]
                lengths = [count_loss_tokens(response) for pair in scored for response in (pair.chosen, pair.rejected)]
                entries = zip(logps.flatten().tolist(), token_logps.cpu().split(lengths), strict=True)
                waiting.update(zip(keys, entries, strict=True))
                progress.advance(sum(map(pair_length, scored)) * share[1])  # the other ranks are about as fast
                if time.monotonic() - last_flush > SHARD_SECONDS:
                    flush()
                    last_flush = time.monotonic()
    finally:
        flush()
