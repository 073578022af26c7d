"""A run before its first step: its data, its policy and reference, and the schedule of its steps."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import RESUME_MUTABLE
from dpo_cli.data.batching import Step, build_schedule, step_pairs
from dpo_cli.data.pairs import Hashes, Pairs, trained_on
from dpo_cli.data.rows import BadRow
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.generation import generation_config
from dpo_cli.evaluation.kl import HeadInputs
from dpo_cli.models.attention import attention
from dpo_cli.models.layout import experts_a_token
from dpo_cli.models.loading import dtype_name, load_tokenizer, release
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import ReferenceCache, fill_reference
from dpo_cli.training.adapter import adapter_settings, attach_adapter
from dpo_cli.training.memory import Fit, fit, process_bytes
from dpo_cli.training.plan import report_plan
from dpo_cli.training.prepare import (
    ScoredModel,
    check_reference,
    choose_model,
    choose_tokenizer,
    hold_out,
    load_scored_model,
    read_pairs,
    refuse_unread_terms,
    weights_mode,
)
from dpo_cli.training.run_dir import choose_folder, read_manifest, reading_of, trained_hashes
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError


@dataclasses.dataclass
class Run:
    """A run that is laid out and has not begun.

    Where the reference is another model than the start policy it has scored and its weights are gone: ``ref_logps``
    (P, 2) in nats are those of ``scored()``, ``recorded`` is its side of the exact KL on the held-out pairs.
    """

    folder: Path
    options: TrainOptions
    tokenizer: Any
    pairs: Pairs
    held_out: Pairs
    refused: list[BadRow]
    policy: ScoredModel
    reference: ScoredModel
    cache: ReferenceCache | None  # of the reference; None: the loss reads none
    costs: list[int]  # tokens that each pair takes up in a forward
    plan: list[Step]
    fitted: Fit
    experts: int = 0  # that a token goes to, where the balance of a mixture is part of the loss
    ref_logps: Tensor | None = None
    recorded: HeadInputs | None = None

    @property
    def runner(self) -> ModelRunner:
        """The policy's."""
        return self.policy.runner

    @property
    def model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy.model

    @cached_property
    def used(self) -> list[int]:
        """The places of the pairs that the plan trains on."""
        return sorted({i for step in self.plan for indices in step for i in indices})

    def scored(self) -> Pairs:
        """Return the pairs that the reference scores: those that are used, then the held-out ones."""
        return self.pairs.select(self.used) + self.held_out

    @cached_property
    def trained(self) -> Hashes:
        """``Pairs.hashes`` of the pairs that the plan trains on, and of those that a run trained on before it."""
        own, run = self.pairs.select(self.used).hashes(), self.policy.source.run
        earlier = trained_hashes(run, read_manifest(run)) if run else None
        return own if earlier is None else np.concatenate([own, earlier])

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        """How many of the held-out pairs are trained on too."""
        return trained_on(self.held_out, self.trained)

    def weighted_ref_logps(self, pairs: Pairs, ref_logps: Tensor) -> Tensor:
        """Return reference log-probs of pairs with the token weights of LD-DPO: (P, 2) nats."""
        alpha = self.options.objective.ld_alpha
        return ref_logps if alpha == 1 or self.cache is None else self.cache.weighted(pairs, alpha)


def prepare_run(
    options: TrainOptions, resume: Path | None, device: torch.device, reporter: Reporter, dry_run: bool = False
) -> Run:
    """Do all up to the first step of a training: data, models, layout and schedule. Writes nothing to the run.

    A reference that is another model is loaded, scores and is gone before the policy is loaded.

    Raises:
        UsageError: an option, the data or the model cannot be used.
    """
    folder = distributed.on_rank_0(lambda: choose_folder(options.output, resume))
    source = choose_model(options.model, options, reporter, base=options.base_model)
    source, options = adapter_settings(source, options, device, reporter)
    check_reference(options)
    tokenizer = choose_tokenizer(source, options)
    pairs, held_out, refused = _read_data(options, tokenizer, reporter)
    process = process_bytes(device)
    if resume and options.fsdp and not distributed.is_launched():
        reporter.info("shard", "one process resumes what began in shards")
        options = dataclasses.replace(options, fsdp=False)
    reference, cache, ref_logps, recorded = None, None, None, None
    if options.ref_model:
        reference = _load_reference(options, tokenizer, pairs + held_out, device, reporter)
        cache = reference.open_cache(options, reporter)
        if not dry_run:
            ref_logps, recorded = _score_reference(reference, cache, options, pairs, held_out, reporter)
        release(reference.model)
    policy, experts = _load_policy(source, pairs, held_out, options, device, reporter)
    options, fitted = _fit_memory(policy, pairs, options, process)
    costs, ranks = policy.runner.costs(pairs), distributed.world_size()
    order = {"max_tokens": fitted.max_tokens, "world_size": ranks, **_order(options)}
    plan = build_schedule(costs, policy.runner.layout, **order)
    _check_plan(options, plan, pairs, held_out, policy.fingerprint)
    if options.objective.reference and not reference:
        cache = policy.open_cache(options, reporter)
    policy.model.generation_config = generation_config(policy.model, tokenizer, pairs)  # which is exported
    run = Run(
        folder=folder,
        options=options,
        tokenizer=tokenizer,
        pairs=pairs,
        held_out=held_out,
        refused=refused,
        policy=policy,
        reference=reference or policy,
        cache=cache,
        costs=costs,
        plan=plan,
        fitted=fitted,
        experts=experts,
        ref_logps=ref_logps,
        recorded=recorded,
    )
    _check_same_heads(run)
    report_plan(run, reporter)
    return run


def _order(options: TrainOptions) -> dict[str, Any]:
    """What decides which pairs a step has."""
    return {name: getattr(options, name) for name in ("batch_size", "epochs", "max_steps", "seed")}


def _read_data(options: TrainOptions, tokenizer: Any, reporter: Reporter) -> tuple[Pairs, Pairs, list[BadRow]]:
    """The pairs to train on, the held-out pairs, and the refused rows of both."""
    rows = read_pairs(options.data, options, tokenizer, reporter)
    pairs, held_out, refused = rows.pairs, Pairs(), rows.refused
    if options.eval_data:
        others = read_pairs(options.eval_data, options, tokenizer, reporter, "held out")
        held_out, refused = others.pairs, refused + others.refused
    elif options.eval_fraction:
        pairs, held_out = hold_out(pairs, options.eval_fraction, options.seed)
        reporter.info("held out", f"{len(held_out):,} of the pairs")
    refuse_unread_terms(options.objective, pairs + held_out)
    return pairs, held_out, refused


def _load_policy(
    source: ModelSource,
    pairs: Pairs,
    held_out: Pairs,
    options: TrainOptions,
    device: torch.device,
    reporter: Reporter,
) -> tuple[ScoredModel, int]:
    """The start policy, with its adapter and the weights of its memory mode, and the experts that a token goes to."""
    mode = weights_mode(options.memory, bool(options.lora_rank), options.dtype, device)
    policy = load_scored_model(source, pairs + held_out, options, mode, device, reporter)
    experts = 0
    if options.router_aux_loss_coef:
        with attention(policy.model, policy.own_attention):
            experts = experts_a_token(policy.model, pairs[0])
        if not policy.runner.chunked_lm_head:
            raise UsageError("--router-aux-loss-coef: the model's head cannot run apart from its body; leave it out")
    policy.split_weights(mode, trains=True)
    if options.lora_rank:
        attach_adapter(policy, options, pairs, reporter)
    if experts:
        costs = policy.runner.costs(pairs)
        batch = policy.runner.batch([pairs[costs.index(min(costs))]])
        if not any(logits.requires_grad for logits in policy.runner.body(batch, True).router_logits):
            raise UsageError(
                "--router-aux-loss-coef: nothing that is trained reaches a router, so there is nothing to balance; "
                "leave it out, or take other --lora-targets"
            )
    return policy, experts


def _fit_memory(policy: ScoredModel, pairs: Pairs, options: TrainOptions, process: int) -> tuple[TrainOptions, Fit]:
    """How the policy's state and activations fit the memory, and the options with all that is chosen at run time."""
    fitted = fit(policy.runner, pairs, process, options.memory, options.gradient_checkpointing, options.max_tokens)
    if not options.lora_rank and policy.split_weights(fitted.memory, trains=True):  # auto; the halves keep less
        fitted = fit(policy.runner, pairs, process, fitted.memory, fitted.recompute, options.max_tokens)
    policy.runner.max_tokens = fitted.max_tokens
    options = dataclasses.replace(
        options,
        **reading_of(options),
        max_tokens=fitted.max_tokens,
        dtype=dtype_name(policy.runner.dtype),
        memory=fitted.memory,
        gradient_checkpointing=fitted.recompute,
    )
    return options, fitted


def _check_plan(options: TrainOptions, plan: list[Step], pairs: Pairs, held_out: Pairs, start: str) -> None:
    """Refuse steps that the memory mode cannot take, and ranks that would not train the same."""
    if options.memory == "in-backward":
        if distributed.world_size() > 1:
            raise UsageError("--memory in-backward: a gradient is used up before the ranks could add theirs; use split")
        if any(len(step) > 1 for step in plan):
            raise UsageError(
                "--memory in-backward: a weight is updated as soon as its gradient is there, so each step must be one "
                "forward: a lower --batch-size, or a higher --max-tokens"
            )
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in RESUME_MUTABLE}
    data = {"the_data": pairs.digest(), "the_held_out_data": held_out.digest()}
    distributed.check_same(**data, the_model=start, the_options=str(fixed))


# ---- a reference that is another model --------------------------------------------------------------------------


def _load_reference(
    options: TrainOptions, tokenizer: Any, pairs: Pairs, device: torch.device, reporter: Reporter
) -> ScoredModel:
    """The model that ``--ref-model`` names."""
    mode = weights_mode(options.memory, True, options.dtype, device)
    try:
        source = choose_model(options.ref_model, options, reporter, "reference")
        mine, theirs = tokenizer.get_vocab(), load_tokenizer(source).get_vocab()
        if differing := [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]:
            token = min(differing)
            there, here = (f"token {ids[token]}" if token in ids else "no token" for ids in (theirs, mine))
            raise UsageError(
                f"--ref-model {options.ref_model}: its tokenizer is another one than the policy's: {token!r} is "
                f"{there} there and {here} here, and {len(differing) - 1:,} more differ"
            )
        reference = load_scored_model(source, pairs, options, mode, device, reporter)
    except UsageError as error:
        raise UsageError(str(error).replace("--model", "--ref-model")) from error
    reference.split_weights(mode)
    return reference


def _score_reference(
    reference: ScoredModel,
    cache: ReferenceCache,
    options: TrainOptions,
    pairs: Pairs,
    held_out: Pairs,
    reporter: Reporter,
) -> tuple[Tensor, HeadInputs | None]:
    """Log-probs of what the run will ask for, and on rank 0 the reference's side of the exact KL."""
    used = pairs.select(sorted({i for step in step_pairs(len(pairs), **_order(options)) for i in step}))
    logps = fill_reference(cache, used + held_out, reference.runner, reporter).logps
    states: list[HeadInputs | None] = [None]
    if held_out and options.kl == "exact":
        progress = kl.Progress(reporter, "reference")
        record = partial(kl.record, reference.runner, held_out, options.cache_dir, progress)
        distributed.on_rank_0(lambda: states.append(record()))
    return logps, states[-1]


def _check_same_heads(run: Run) -> None:
    theirs, ours = (model.config.get_text_config().vocab_size for model in (run.reference.model, run.model))
    if run.recorded and theirs != ours:
        raise UsageError(
            f"--ref-model {run.options.ref_model}: its head knows {theirs:,} tokens and the policy's {ours:,}, so "
            "there is no exact KL: add --kl none"
        )
