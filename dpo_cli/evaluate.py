"""Implicit rewards and margins of a policy against its reference.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import EvalOptions
from dpo_cli.disk import to_json, whole_file
from dpo_cli.errors import UsageError
from dpo_cli.fingerprint import WeightsMemo, fingerprint, same_weights
from dpo_cli.logps import Scorer
from dpo_cli.losses import sigmoid_loss
from dpo_cli.metrics import Reporter, pair_sums, summarize
from dpo_cli.model import (
    ModelSource,
    compile_layers,
    default_device,
    dtype_name,
    load_model,
)
from dpo_cli.pairs import Pair, Pairs, loss_tokens
from dpo_cli.prepare import (
    choose_model,
    choose_tokenizer,
    fill_reference,
    halved_if_split,
    load_weights,
    make_scorer,
    open_cache,
    read_pairs,
    tell_long,
)
from dpo_cli.reference import ReferenceCache
from dpo_cli.run import read_manifest, reading_as_trained, trained_with
from dpo_cli.tokens import reasons

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def policy_logps(
    scorer: Scorer,
    pairs: Sequence[Pair],
    reporter: Reporter,
    what: str = "evaluate",
    stopped: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Log-probs of all pairs under the policy: (P, 2) float32 nats on the host, chosen and rejected.

    None when it is ``stopped``, which is asked after each forward.
    """
    table = torch.full((len(pairs), 2), torch.nan)
    with reporter.progress(what, len(pairs)) as progress:
        for places, logps, _ in scorer.score(pairs):
            table[list(places)] = logps.view(2, -1).T.cpu()
            progress.advance(len(places))
            if stopped():
                return None
    return table


def evaluate(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float, terms: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Loss, rewards, margin and accuracy over P pairs.

    Shapes: ``policy``, ``reference`` (P, 2) nats; ``terms`` (P, 2) as in ``Pairs.terms``.
    """
    logps, ref_logps = policy.T.reshape(-1), reference.T.reshape(-1)  # (2P,), chosen first
    weights, margins = torch.tensor(terms).T
    losses = sigmoid_loss(logps, ref_logps, beta, label_smoothing, margins, weights)
    return summarize(pair_sums(losses, logps, ref_logps, beta).tolist())


def run_eval(options: EvalOptions, reporter: Reporter) -> dict[str, Any]:
    """`dpo eval`: score pairs under the policy and compare with the reference, one model in memory at a time.

    A run brings its own beta, truncation, control tokens, precision and reference, so that the numbers are those of
    its training.
    """
    source = choose_model(options.model, options, reporter)
    run, given_compile = _run_options(source), options.compile
    reading = reading_as_trained(options, source)
    options = dataclasses.replace(
        options,
        max_length=reading.max_length,
        dtype=options.dtype or run.get("dtype"),
        control_tokens=reading.control_tokens,
        train_turns=reading.train_turns,
        compile=run.get("compile", options.compile),
        beta=options.beta or run.get("beta", 0.1),
    )
    if given_compile and not options.compile:
        raise UsageError("--compile: the run was not trained so, and its numbers would be others")
    assert options.beta is not None
    tokenizer = choose_tokenizer(source, options)
    found = read_pairs(options.data, options, tokenizer, reporter)
    pairs = found.pairs
    memory = run.get("memory", "full")
    memo = WeightsMemo(source, options.cache_dir)
    model = load_model(source)
    weights = memo.hash(model) if options.ref is None and source.run is None else ""
    scorer = make_scorer(model, pairs, options, default_device(), reporter, memory)
    weights = halved_if_split(model, weights, memory)[0]
    tell_long(scorer, pairs, reporter)
    if options.compile:
        compile_layers(model)
    policy = policy_logps(scorer, pairs, reporter)
    assert policy is not None
    reference = _reference_logps(options, source, weights, memory, pairs, scorer, reporter)
    result: dict[str, Any] = {"rows": found.rows, "refused": reasons(found.refused), "pairs": len(pairs)}
    result["beta"] = options.beta
    result |= evaluate(policy, reference, options.beta, run.get("label_smoothing", 0.0), pairs.terms)
    result |= {"ref_logps/chosen": float(reference[:, 0].mean()), "ref_logps/rejected": float(reference[:, 1].mean())}
    result |= _cross_entropies(pairs, policy, reference)
    rewards = options.beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    result["rewards/margins_quantiles"] = {str(q): float(margins.quantile(q)) for q in QUANTILES}
    if options.per_pair:
        _write_per_pair(options.per_pair, pairs, policy, reference, rewards)
    return result


def _run_options(source: ModelSource) -> dict[str, Any]:
    if source.run is None:
        return {}
    options = trained_with(source.run)
    names = ("dtype", "beta", "label_smoothing", "memory", "compile")
    return {name: getattr(options, name) for name in names}


def _reference_logps(
    options: EvalOptions,
    source: ModelSource,
    weights: str,
    memory: str,
    pairs: Pairs,
    scorer: Scorer,
    reporter: Reporter,
) -> Tensor:
    """Log-probs of all pairs under the reference: (P, 2) nats. Its model is loaded only if the cache lacks pairs.

    ``weights`` is the hash of the policy's, which is the reference where it is no run. A loaded reference takes the
    policy's place in memory: never two models at once.
    """
    if options.ref is None and source.run is None:
        reporter.fact("reference", "the model itself: it is no run, and there is no --ref")
        own = fingerprint(cast(PreTrainedModel, scorer.model), weights, scorer.layout, scorer.dtype)
        return fill_reference(open_cache(options, own, source, scorer, reporter), pairs, scorer, reporter).logps
    trained_from: dict[str, Any] = {}
    name = options.ref
    if name is None and source.run is not None:
        manifest = read_manifest(source.run)
        trained_from = manifest["reference"]
        name = trained_from["model"]
        computed = (trained_from["layout"], trained_from["dtype"], manifest["device"])
        if computed == (scorer.layout, dtype_name(scorer.dtype), scorer.device.type):
            cache = ReferenceCache(options.cache_dir, trained_from["fingerprint"], reporter.warn)
            if not cache.lookup(pairs).isnan().any():
                return fill_reference(cache, pairs, scorer, reporter).logps
    scorer.model.to("meta")  # frees the policy's weights
    gc.collect()
    try:
        reference = choose_model(name, options, reporter, "reference")
        model, weights = load_weights(reference, options)
    except UsageError as error:
        raise UsageError(f"the reference cannot be loaded; name it with --ref\n{error}") from error
    scorer = make_scorer(model, pairs, options, scorer.device, reporter, memory)
    weights = halved_if_split(model, weights, memory)[0]
    if options.compile:
        compile_layers(model)
    found = fingerprint(model, weights, scorer.layout, scorer.dtype)
    if trained_from and not same_weights(found, trained_from["fingerprint"]):
        raise UsageError(f"{reference.path} is no longer the model the run began with; name that one with --ref")
    return fill_reference(open_cache(options, found, reference, scorer, reporter), pairs, scorer, reporter).logps


def _cross_entropies(pairs: Sequence[Pair], policy: Tensor, reference: Tensor) -> dict[str, float]:
    """Nats a response token, over all of a side that carry loss: minus the summed log-probs by their number."""
    tokens = {side: sum(loss_tokens(getattr(pair, side)) for pair in pairs) for side in ("chosen", "rejected")}
    return {
        f"{prefix}cross_entropy/{side}": float(-logps[:, column].double().sum() / tokens[side])
        for prefix, logps in (("", policy), ("ref_", reference))
        for column, side in enumerate(("chosen", "rejected"))
    }


def _write_per_pair(file: Path, pairs: Sequence[Pair], policy: Tensor, reference: Tensor, rewards: Tensor) -> None:
    """One line a pair; ``tokens`` of a response are those that carry loss, which its log-probs are sums over."""
    with whole_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for pair, logps, ref_logps, reward in zip(
            pairs, policy.tolist(), reference.tolist(), rewards.tolist(), strict=True
        ):
            line = {
                "row": pair.where,
                "logps/chosen": logps[0],
                "logps/rejected": logps[1],
                "ref_logps/chosen": ref_logps[0],
                "ref_logps/rejected": ref_logps[1],
                "rewards/chosen": reward[0],
                "rewards/rejected": reward[1],
                "margin": reward[0] - reward[1],
                "tokens/prompt": len(pair.prompt),
                "tokens/chosen": loss_tokens(pair.chosen),
                "tokens/rejected": loss_tokens(pair.rejected),
            }
            stream.write(to_json(line) + "\n")
