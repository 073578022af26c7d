"""From options to pairs, a scorer and their reference log-probs: what train, eval and precompute-ref share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cli.attention import PREFIX_SHARED
from dpo_cli.batch import row_cost
from dpo_cli.config import Options, PrecomputeOptions
from dpo_cli.data import read_rows
from dpo_cli.errors import UsageError
from dpo_cli.logps import Scorer
from dpo_cli.metrics import Reporter
from dpo_cli.model import (
    choose_layout,
    compute_dtype,
    default_device,
    default_max_tokens,
    find_model,
    fingerprint,
    load_model,
    load_tokenizer,
)
from dpo_cli.reference import Filled, ReferenceCache, fill
from dpo_cli.tokens import Pair, PairSet, refusal, tokenize_rows

DEFAULT_MAX_LENGTH = 1024


def read_pairs(files: list[str], options: Options, tokenizer: Any, reporter: Reporter, name: str = "data") -> PairSet:
    """Read and tokenize files, and tell what was found.

    Raises:
        UsageError: bad rows without ``--on-bad-row skip``, or no pair is left.
    """
    max_length = options.max_length or DEFAULT_MAX_LENGTH
    found = tokenize_rows(read_rows(files, options.columns), tokenizer, max_length)
    rows = len(found.pairs) + len(found.refused)
    if found.refused and (options.on_bad_row == "refuse" or not found.pairs):
        raise refusal(found.refused, rows)
    counts = f"{rows:,} rows, {len(found.pairs):,} pairs, {len(found.refused):,} refused"
    reporter.fact(name, f"{', '.join(files)}: {counts} ({', '.join(found.formats)})")
    for note, count in sorted(found.notes.items()):
        reporter.fact("", f"{count:,} {note}")
    return found


def make_scorer(
    model: PreTrainedModel, pairs: Sequence[Pair], options: Options, device: torch.device, reporter: Reporter
) -> Scorer:
    """Move the model to the device and settle how its forwards run."""
    model.to(device)  # type: ignore[arg-type]  # transformers' annotation hides torch's
    max_tokens = options.max_tokens or default_max_tokens(model, device)
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UsageError(f"a pair has {longest} tokens and the model reads at most {limit}; set --max-length {limit}")
    dtype = compute_dtype(options.dtype, device)
    layout, told = choose_layout(model, pairs, max_tokens, device, dtype)
    reporter.fact("layout", told)
    if layout == "shared":
        model.set_attn_implementation(PREFIX_SHARED)
    alone = sum(row_cost(pair, layout) > max_tokens for pair in pairs)
    if alone:
        reporter.warn(f"{alone:,} pairs are longer than --max-tokens {max_tokens}; each gets a forward of its own")
    return Scorer(model, layout, dtype, max_tokens, device)


def tell_missing(cache: ReferenceCache, pairs: Sequence[Pair], reporter: Reporter) -> int:
    """Tell what the cache has of the pairs; returns how many are to be scored, equal ones counted once."""
    missing = len(cache.missing(pairs))
    cached = sum(cache.has(pair) for pair in pairs)
    todo = f"{missing:,} to score" if missing else "no reference forward"
    reporter.fact("reference", f"{cached:,} of {len(pairs):,} pairs cached: {todo}")
    return missing


def fill_reference(cache: ReferenceCache, pairs: Sequence[Pair], scorer: Scorer, reporter: Reporter) -> Filled:
    """Score what the cache lacks, and tell it."""
    missing = tell_missing(cache, pairs, reporter)
    if not missing:
        return Filled(hits=len(pairs), misses=0)
    with reporter.progress("reference", missing) as progress:
        filled = fill(cache, pairs, scorer, progress.advance)
    rate = f"{filled.seconds:.1f} s ({filled.tokens / filled.seconds:,.0f} tokens/s)"
    reporter.fact("", f"{filled.tokens:,} tokens in {rate}; kept in {cache.folder}")
    return filled


def precompute(options: PrecomputeOptions, reporter: Reporter) -> dict[str, Any]:
    """`dpo precompute-ref`: fill the cache, and on request compare some of it with fresh forwards."""
    source = find_model(options.model)
    reporter.fact("model", source.told)
    tokenizer = load_tokenizer(source)
    pairs = read_pairs(options.data, options, tokenizer, reporter).pairs
    model = load_model(source)
    scorer = make_scorer(model, pairs, options, default_device(), reporter)
    cache = ReferenceCache(options.cache_dir, fingerprint(model, scorer.layout, scorer.dtype), reporter.warn)
    filled = fill_reference(cache, pairs, scorer, reporter)
    result: dict[str, Any] = {
        "pairs": len(pairs),
        "hits": filled.hits,
        "misses": filled.misses,
        "tokens": filled.tokens,
        "seconds": round(filled.seconds, 3),
        "cache_dir": str(cache.folder),
    }
    if options.verify:
        chosen = random.Random(0).sample(pairs, min(options.verify, len(pairs)))
        cached, largest = cache.lookup(chosen), 0.0
        for places, logps, _ in scorer.score(chosen):
            fresh = logps.view(2, -1).T.cpu()  # (P, 2)
            largest = max(largest, float((fresh - cached[list(places)]).abs().max()))
        result |= {"verified": len(chosen), "largest_difference": largest}
    return result


def hold_out(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split off a share of the pairs, at least one, by a seeded choice: (training, held out)."""
    count = max(1, round(len(pairs) * fraction))
    if count >= len(pairs):
        raise UsageError(f"--eval-fraction {fraction}: leaves no pair of {len(pairs)} to train on")
    out = set(random.Random(f"{seed}/held out").sample(range(len(pairs)), count))
    return [p for i, p in enumerate(pairs) if i not in out], [pairs[i] for i in sorted(out)]
