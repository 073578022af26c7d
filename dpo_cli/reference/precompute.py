"""``dpo precompute-ref``: fill the cache with the log-probs of a reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data.tokenize import reasons
from dpo_cli.reference.store import fill_reference
from dpo_cli.training.memory import fit, process_bytes
from dpo_cli.training.prepare import (
    check_quantize,
    choose_model,
    choose_tokenizer,
    load_scored_model,
    read_pairs,
)
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter


def precompute(options: PrecomputeOptions, reporter: Reporter) -> dict[str, Any]:
    """Score all pairs that the cache lacks, in the memory mode that a training would take; returns what it cost."""
    with distributed.started(lambda: "what was scored is kept, and the same command goes on from there") as device:
        distributed.check_same_command(options)
        return _precompute(options, device, reporter)


def _precompute(options: PrecomputeOptions, device: torch.device, reporter: Reporter) -> dict[str, Any]:
    source = choose_model(options.model, options, reporter, base=options.base_model)
    check_quantize(options, source, device)
    source = dataclasses.replace(source, quantize=options.quantize)
    rows = read_pairs(options.data, options, choose_tokenizer(source, options), reporter)
    pairs, process = rows.pairs, process_bytes(device)
    reference = load_scored_model(source, pairs, options, options.memory, device, reporter)
    trained = f"--load-in-{options.quantize}"
    if not options.quantize:
        memory = fit(reference.runner, pairs, process, options.memory, False, options.max_tokens).memory
        reference.split_weights(memory)
        trained = f"--memory {memory}"
    reporter.info("memory", f"scored for dpo train {trained}")
    if distributed.world_size() > 1:
        distributed.check_same(the_data=pairs.digest(), the_model=reference.fingerprint)
    cache = reference.open_cache(options, reporter)
    filled = fill_reference(cache, pairs, reference.runner, reporter)
    return {
        "rows": rows.rows,
        "refused": reasons(rows.refused),
        "pairs": len(pairs),
        "hits": filled.hits,
        "misses": filled.misses,
        "tokens": filled.tokens,
        "seconds": round(filled.seconds, 3),
        "cache_dir": str(cache.folder),
    }
