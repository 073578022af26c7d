"""``dpo precompute-ref``: fill the cache with the log-probs of a reference."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data.pairs import Pairs
from dpo_cli.data.tokenize import reasons
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.models.noise import excess, float32_hint
from dpo_cli.reference.store import fill_reference
from dpo_cli.training.memory import choose_memory, process_bytes
from dpo_cli.training.prepare import check_quantize, choose_model, choose_tokenizer, load_scored_model, read_pairs
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind
from dpo_cli.utils.errors import DpoError, plural


def precompute(options: PrecomputeOptions, reporter: Reporter) -> dict[str, Any]:
    """Score all pairs that the cache lacks, in the memory mode that a training would use; return what it cost.

    Raises:
        DpoError: with ``--verify``, a cached log-prob is off by more than arithmetic explains.
    """
    kept = "what was scored is kept, and the same command continues from there"
    with distributed.started(lambda: kept, options.device) as device:
        distributed.check_same_command(options)
        source = choose_model(options.model, options, reporter, base=options.base_model)
        check_quantize(options, source, device_kind(device))
        source = dataclasses.replace(source, quantize=options.quantize)
        rows = read_pairs(options.data, options, choose_tokenizer(source, options), reporter)
        pairs, process = rows.pairs, process_bytes(device)
        reference = load_scored_model(source, pairs, options, options.memory, device, reporter)
        trained = f"--load-in-{options.quantize}"
        if not options.quantize:
            memory = choose_memory(reference.runner, pairs, process, options.memory, False, options.max_tokens).memory
            reference.split_weights(memory)
            trained = f"--memory {memory}"
        reporter.info("memory", f"as in dpo train {trained}, which will read these log-probs")
        distributed.check_same(the_data=pairs.digest(), the_model=reference.fingerprint)
        cache = reference.open_cache(options, reporter)
        filled = fill_reference(cache, pairs, reference.runner, reporter)
        result: dict[str, Any] = {
            "rows": rows.rows,
            "refused": reasons(rows.refused),
            "pairs": len(pairs),
            "hits": filled.hits,
            "misses": filled.misses,
            "tokens": filled.tokens,
            "seconds": round(filled.seconds, 3),
            "cache_dir": str(cache.folder),
        }
        if options.verify:
            places = random.Random(0).sample(range(len(pairs)), min(options.verify, len(pairs)))
            largest = verify(filled.logps[places], pairs.select(places), reference.runner, str(cache.folder))
            result |= {"verified": len(places), "largest_difference": largest}
        return result


def as_text(result: dict[str, Any]) -> str:
    """Format the result of ``precompute``."""
    lines = [f"{plural(result['pairs'], 'pair')} in the cache: {result['cache_dir']}"]
    if "verified" in result:
        again = f"{plural(result['verified'], 'cached pair')} computed again"
        lines.append(f"{again}: log-probs differ by at most {result['largest_difference']:.1g} nats")
    return "\n".join(lines)


def verify(cached_logps: Tensor, pairs: Pairs, runner: ModelRunner, folder: str) -> float:
    """Return the largest difference between cached log-probs of pairs (P, 2) and fresh ones, in nats.

    Raises:
        DpoError: one is larger than arithmetic explains.
    """
    logps = torch.empty_like(cached_logps)
    for places, token_logps in runner.forwards(pairs, lambda _, batch: (runner.token_logps(batch), batch.lengths)):
        logps[list(places)] = response_logps(*token_logps).view(2, -1).T.cpu()
    off, tokens = logps - cached_logps, torch.from_numpy(pairs.loss_lengths)  # (P, 2)
    largest = float(off.abs().max())
    if excess(off.flatten(), tokens.flatten(), runner.noise) > 1:
        alone = [excess(*each, runner.noise) > 1 for each in zip(off, tokens, strict=True)]
        bad = [pair.where for pair, wrong in zip(pairs, alone, strict=True) if wrong or not any(alone)]
        raise DpoError(
            f"--verify: {len(bad)} of {len(pairs)} cached pairs are off by up to {largest:.3g} nats, among them "
            f"{', '.join(bad[:5])}. Something changed them: remove {folder}, and they are recomputed"
            f"{float32_hint(runner.dtype)}"
        )
    return largest
