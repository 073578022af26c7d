"""A run before its first step: its data, its policy and reference, the schedule of its steps, and the printed plan."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import RESUME_MUTABLE
from dpo_cli.data.pairs import Hashes, Pairs, trained_on
from dpo_cli.data.rows import BadRow
from dpo_cli.data.schedule import Step, build_schedule, count_tokens, row_costs, step_pairs
from dpo_cli.data.tokenize import PairSet
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.diagnostics import HOLD_OUT, count_new
from dpo_cli.evaluation.generation import generation_config
from dpo_cli.models.attention import attention
from dpo_cli.models.loading import dtype_name, export_dtype, load_tokenizer, release
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.moe import experts_per_token
from dpo_cli.reference.store import ReferenceCache, ReferenceLogps, fill_reference
from dpo_cli.training.adapter import attach_adapter, resolve_adapter
from dpo_cli.training.memory import MemoryChoice, choose_memory, process_bytes, usable_bytes
from dpo_cli.training.optimizer import BYTES, learning_rate
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
from dpo_cli.training.run_dir import choose_folder, encoder_options, read_manifest, row_options, trained_hashes
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import describe, device_kind
from dpo_cli.utils.errors import UsageError, plural

# The sum of the steps' learning rates is about the most that AdamW moves a weight. Each 1e-6 of it moved the margin of
# an easy preference by 0.17 nats on the packaged model, and by 0.009 with an adapter: below these it stays under a nat.
MIN_LR_SUM, MIN_LR_SUM_ADAPTER = 5e-6, 1e-4
STATE_DESCRIPTIONS = {
    "full": "weights and moments float32",
    "split": "weights bfloat16 with their lower halves, moments 8 bits",
    "in-backward": "weights bfloat16 with their lower halves, moments 8 bits, updated in the backward pass",
}


@dataclasses.dataclass
class Run:
    """A run that has not begun; ``prepare_run`` fills in what it chooses, top down."""

    folder: Path
    options: TrainOptions  # in the end with all choices made at run time
    device: torch.device
    reporter: Reporter
    tokenizer: Any
    pairs: Pairs
    held_out: Pairs
    refused: list[BadRow]
    drawn: dict[str, int]  # rows of each data set of a mixture
    used: list[int]  # places of the pairs that the run trains on
    reference: ScoredModel = dataclasses.field(init=False)
    cache: ReferenceCache | None = None  # of the reference; None: the loss reads none
    scores: ReferenceLogps = dataclasses.field(init=False)  # of ``scored()``, see ``score_reference``
    recorded: kl.HeadInputs | None = None  # the reference's side of the exact KL, on the ranks that evaluate
    policy: ScoredModel = dataclasses.field(init=False)
    experts: int = 0  # per token, where the loss balances the routers of a mixture
    memory_choice: MemoryChoice = dataclasses.field(init=False)
    costs: list[int] = dataclasses.field(init=False)  # tokens that each pair takes up in a forward
    plan: list[Step] = dataclasses.field(init=False)

    def count_tokens(self, steps: Sequence[Step]) -> int:
        """Count the tokens of the forwards of these steps."""
        layout = self.policy.runner.layout
        return sum(count_tokens(places, self.pairs, self.costs, layout) for step in steps for places in step)

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
        """Count the held-out pairs that are trained on too."""
        return trained_on(self.held_out, self.trained)


def prepare_run(
    options: TrainOptions,
    resume: Path | None,
    device: torch.device,
    reporter: Reporter,
    dry_run: bool = False,
    weights: bool = True,
) -> Run:
    """Prepare a run up to its first step: data, models, layout and schedule. Write nothing to its folder.

    A separate reference model is loaded and released before the policy is loaded. Without ``weights``, for a trace,
    the policy has shapes alone.

    Raises:
        UsageError: an option, the data or the model cannot be used.
    """
    folder = distributed.on_rank_0(lambda: choose_folder(options.output, resume))
    source = choose_model(options.model, options, reporter, base=options.base_model, weights=weights)
    source, options = resolve_adapter(source, options, device, reporter)
    check_reference(options)
    tokenizer = choose_tokenizer(source, options)
    rows, held_out = _read_data(options, tokenizer, reporter)
    pairs = rows.pairs
    order = {name: getattr(options, name) for name in ("batch_size", "epochs", "max_steps", "seed")}
    used = sorted({i for step in step_pairs(pairs, **order) for i in step})
    process = process_bytes(device)
    if resume and options.fsdp and not distributed.is_launched():
        reporter.info("shard", "off, resumed in one process")
        options = dataclasses.replace(options, fsdp=False)
    run = Run(folder, options, device, reporter, tokenizer, pairs, held_out, rows.refused, rows.drawn, used)
    if options.ref_model:
        _load_reference(run)
        if not dry_run:
            score_reference(run)
            record_reference(run)
        release(run.reference.model)
    _load_policy(run, source)
    _choose_memory(run, process)
    run.costs = run.policy.runner.costs(run.pairs)
    room = {"max_tokens": run.memory_choice.max_tokens, "world_size": distributed.world_size()}
    run.plan = build_schedule(run.pairs, run.policy.runner.layout, **room, **order)
    _check_plan(run)
    if not options.ref_model:
        run.reference = run.policy
        run.cache = run.policy.open_cache(options, reporter) if options.objective.reference and weights else None
    run.policy.model.generation_config = generation_config(run.policy.model, tokenizer, run.pairs)  # exported with it
    _report_plan(run)
    return run


def _read_data(options: TrainOptions, tokenizer: Any, reporter: Reporter) -> tuple[PairSet, Pairs]:
    """Return the pairs to train on, with the refused rows of all data, and the held-out pairs."""
    rows, held_out = read_pairs(options.data, options, tokenizer, reporter), Pairs()
    if options.eval_data:
        others = read_pairs(options.eval_data, options, tokenizer, reporter, "held out")
        held_out, rows.refused = others.pairs, rows.refused + others.refused
    elif options.eval_fraction:
        rows.pairs, held_out = hold_out(rows.pairs, options.eval_fraction, options.seed)
        reporter.info("held out", f"{len(held_out):,} of the pairs")
    refuse_unread_terms(options.objective, rows.pairs + held_out)
    return rows, held_out


def _load_policy(run: Run, source: ModelSource) -> None:
    """Load the start policy, with its adapter and the weights of its memory mode."""
    options, pairs = run.options, run.pairs
    mode = weights_mode(options.memory, bool(options.lora_rank), options.dtype, device_kind(run.device))
    policy = load_scored_model(source, pairs + run.held_out, options, mode, run.device, run.reporter)
    if options.router_aux_loss_coef:
        with attention(policy.model, policy.own_attention):
            run.experts = experts_per_token(policy.runner, pairs[0])
    policy.split_weights(mode, trains=True)
    if options.lora_rank:
        attach_adapter(policy, options, pairs, run.reporter)
    if run.experts:
        costs = policy.runner.costs(pairs)
        batch = policy.runner.batch([pairs[costs.index(min(costs))]])
        if not any(logits.requires_grad for logits in policy.runner.body(batch, True).router_logits):
            raise UsageError(
                "--router-aux-loss-coef: the routers depend on no trained weight; leave it out or change --lora-targets"
            )
    if options.ref_model and run.held_out and options.kl == "exact":
        theirs, ours = (each.model.config.get_text_config().vocab_size for each in (run.reference, policy))
        if theirs != ours:
            raise UsageError(
                f"--ref-model {options.ref_model}: its head has {theirs:,} tokens and the policy's {ours:,}, so "
                "there is no exact KL: add --kl none"
            )
    run.policy = policy


def _choose_memory(run: Run, process: int) -> None:
    """Choose how the policy's state and activations fit the memory, and record all choices in the options."""
    policy, runner, pairs, options = run.policy, run.policy.runner, run.pairs, run.options
    choice = choose_memory(runner, pairs, process, options.memory, options.gradient_checkpointing, options.max_tokens)
    if not options.lora_rank and policy.split_weights(choice.memory, trains=True):  # ``auto`` chose to split
        choice = choose_memory(runner, pairs, process, choice.memory, choice.recompute, options.max_tokens)
    runner.max_tokens = choice.max_tokens
    run.memory_choice = choice
    run.options = dataclasses.replace(
        options,
        **encoder_options(options),
        **row_options(options),
        max_tokens=choice.max_tokens,
        dtype=dtype_name(runner.dtype),
        memory=choice.memory,
        gradient_checkpointing=choice.recompute,
    )


def _check_plan(run: Run) -> None:
    """Refuse steps that the memory mode cannot take, and ranks that would not train the same."""
    if run.options.memory == "in-backward":
        if distributed.world_size() > 1:
            raise UsageError("--memory in-backward: updates each weight before ranks can sum gradients; use split")
        if any(len(step) > 1 for step in run.plan):
            raise UsageError(
                "--memory in-backward: a weight is updated as soon as its gradient is computed, so a step must be one "
                "forward: lower --batch-size or raise --max-tokens"
            )
    fixed = {name: value for name, value in vars(run.options).items() if name not in RESUME_MUTABLE}
    data = {"the_data": run.pairs.digest(), "the_held_out_data": run.held_out.digest()}
    distributed.check_same(**data, the_model=run.policy.fingerprint, the_options=str(fixed))


# ---- the reference ----------------------------------------------------------------------------------------------


def _load_reference(run: Run) -> None:
    """Load the model that ``--ref-model`` names, and open its cache."""
    options, reporter = run.options, run.reporter
    mode = weights_mode(options.memory, True, options.dtype, device_kind(run.device))
    try:
        source = choose_model(options.ref_model, options, reporter, "reference")
        mine, theirs = run.tokenizer.get_vocab(), load_tokenizer(source).get_vocab()
        if differing := [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]:
            token = min(differing)
            ref_id, policy_id = (f"token {ids[token]}" if token in ids else "no token" for ids in (theirs, mine))
            raise UsageError(
                f"--ref-model {options.ref_model}: its tokenizer differs from the policy's: {token!r} is "
                f"{ref_id} there and {policy_id} here; tokens that differ: {len(differing):,}"
            )
        run.reference = load_scored_model(source, run.pairs + run.held_out, options, mode, run.device, reporter)
    except UsageError as error:
        raise UsageError(str(error).replace("--model", "--ref-model")) from error
    run.reference.split_weights(mode)
    run.cache = run.reference.open_cache(options, reporter)


def score_reference(run: Run) -> None:
    """Score the pairs under the reference, using its cache.

    Raises:
        NotWrittenError: the disk has no room for its log-probs.
    """
    if run.cache:
        alpha = run.options.objective.ld_alpha
        run.scores = fill_reference(run.cache, run.scored(), run.reference.runner, run.reporter, alpha)
    else:  # training reads no value (0); an evaluation shows none (NaN)
        logps = torch.full((len(run.scored()), 2), torch.nan)
        logps[: len(run.used)] = 0.0
        run.scores = ReferenceLogps(logps, logps)


def record_reference(run: Run) -> None:
    """Run the reference on the held-out pairs, for the exact KL of every evaluation.

    Raises:
        NotWrittenError: the disk has no room for its hidden states.
    """
    options, runner, reporter = run.options, run.reference.runner, run.reporter
    if run.held_out and options.kl == "exact":
        reporter.info("", "one pass over the held-out pairs for the exact KL")
        progress = reporter.progress("reference", len(run.held_out))

        def record() -> None:
            run.recorded = kl.record(runner, run.held_out, options.cache_dir, progress)

        runner.parallel.run(record)


# ---- the plan ---------------------------------------------------------------------------------------------------


def _report_plan(run: Run) -> None:
    """Report what the run will do and use; warn of too little memory or disk, and of held-out pairs trained on."""
    options, runner, reporter = run.options, run.policy.runner, run.reporter
    trained = run.memory_choice.step_bytes.parameters
    if not options.objective.reference:
        reporter.info("reference", f"none: --loss {options.objective.name} reads none, so nothing is scored or cached")
    if (several := distributed.world_size()) > 1:
        share = "a share of the model" if options.fsdp else "the whole model"
        local = distributed.local_world_size()
        reporter.info("ranks", f"{several} processes, {local} of them here; each keeps {share}")
    kept = STATE_DESCRIPTIONS[options.memory]
    if options.lora_rank:
        base = options.quantize or ("bfloat16" if run.policy.model.dtype == torch.bfloat16 else "float32")
        kept = f"frozen base {base}, adapter and its moments float32"
    reporter.info("device", f"{describe(runner.device, options.device)}; compute {options.dtype}; {kept}")
    parameters = run.policy.model.num_parameters()
    share = f"{trained:,} of them trained ({trained / parameters:.2%})" if trained < parameters else "all trained"
    reporter.info("parameters", f"{parameters:,}, {share}")
    steps, padded_costs = [[i for each in step for i in each] for step in run.plan], row_costs(run.pairs, "padded")
    forwards = f"{plural(sum(map(len, run.plan)), 'micro-batch')}, max_tokens {runner.max_tokens:,}"
    size = f"{'up to ' * any(pair.ranking for pair in run.pairs)}{plural(options.batch_size, 'pair')}"
    reporter.info("plan", f"{plural(len(steps), 'step')} of {size} in {forwards}")
    if options.max_steps and len(steps) < options.max_steps:
        passes = plural(options.epochs, "epoch")
        reporter.info("", f"--max-steps {options.max_steps} is more than {passes} of these pairs: add --epochs for it")
    tokens = run.count_tokens(run.plan)
    plain = sum(len(step) * max(padded_costs[i] for i in step) for step in steps)
    apart = sum(run.costs[i] for step in steps for i in step)
    others = {f"padded batches of {options.batch_size}": plain}
    if runner.layout == "shared" and tokens < apart:
        others |= {"pairs that share only their own prompt": apart}
    more = "".join(f"; {what} would take {count:,} ({count / tokens:.1f} times)" for what, count in others.items())
    reporter.info("tokens", f"{tokens:,} to train on{more}")
    _report_room(run)
    least, suggested_lr = (MIN_LR_SUM_ADAPTER, 2e-4) if options.lora_rank else (MIN_LR_SUM, 2e-5)
    if sum(learning_rate(step, len(steps), options) for step in range(1, len(steps) + 1)) < least:
        count = f"{plural(len(steps), 'step')} at lr {options.lr:g}"
        low = options.lr < suggested_lr
        more = f"for a few hundred pairs try --lr {suggested_lr:g} --batch-size 8" if low else "take more steps"
        reporter.info("hint", f"{count} will hardly move the model: {more}")
    if not run.held_out:
        reporter.info("held out", f"no pairs: nothing will show whether the model learns the preference; {HOLD_OUT}")
        return
    overlap = trained_on(run.held_out, run.trained, "will be")
    if overlap["text"]:
        reporter.warning(overlap["text"])
    if few := count_new(len(run.held_out), overlap["pairs"]).get("text"):
        reporter.info("held out", few)


def report_time(run: Run, unscored: Pairs) -> None:
    """Report about how long the run will take, on a CPU, whose small forwards are as fast per token as large ones.

    A step counts as three forwards; answers, updates and checkpoints are left out.
    """
    options, runner, steps = run.options, run.policy.runner, len(run.plan)
    if runner.device.type != "cpu":
        return
    places = run.plan[0][0][:4]
    with torch.no_grad():
        batch, began = runner.batch(run.pairs.select(places)), time.perf_counter()
        runner.token_logps(batch)
    per_token = (time.perf_counter() - began) / count_tokens(places, run.pairs, run.costs, runner.layout)
    passes = 1 + math.ceil(steps / (options.eval_steps or steps)) + (options.kl == "exact")
    tokens = 3 * run.count_tokens(run.plan) + sum(runner.costs(unscored)) + passes * sum(runner.costs(run.held_out))
    seconds = max(round(per_token * tokens), 1)
    run.reporter.info("time", f"about {timedelta(seconds=seconds)} for scoring, steps and evaluations (estimate)")


def _report_room(run: Run) -> None:
    """Report the estimated peaks of memory and disk; warn of one that exceeds what is free."""
    options, choice, state, unit = run.options, run.memory_choice, run.memory_choice.step_bytes, 2**30
    runner, model, reporter = run.policy.runner, run.policy.model, run.reporter
    need, room = choice.estimate(run.plan, run.costs, run.pairs, runner), usable_bytes(runner.device)
    kept = (state.frozen + state.parameters * sum(BYTES[choice.memory]) / state.shards) / unit
    again = "; the backward pass recomputes activations" if choice.recompute else ""
    parts = f"{kept:.1f} of them weights, gradients and moments{again}"
    reporter.info("memory", f"about {need / unit:.1f} GiB at most (estimate), {parts}")
    weight, _, moments = BYTES[choice.memory]
    checkpoint, exported = state.parameters * (weight + moments), state.parameters * 4
    if not options.lora_rank or options.export == "merged":
        exported = model.num_parameters() * export_dtype(options.export_dtype, run.policy.source).itemsize
    if not options.lora_rank:
        checkpoint += 4 * (model.num_parameters() - state.parameters)
    saves = 1 + (len(run.plan) - 1) // options.save_steps if options.save_steps else 1
    # The checkpoints that are kept, the exports, and one of each being written.
    disk = min(options.save_total_limit + 1, saves) * checkpoint + exported * (3 if options.save_best else 1)
    free = shutil.disk_usage(next(p for p in run.folder.absolute().parents if p.exists())).free
    reporter.info("disk", f"about {disk / unit:.1f} GiB at most, for checkpoints and exports")
    for what, size, available, remedy in (
        ("memory", need, room, "a lower --max-length or --max-tokens"),
        ("disk", disk, free, "a lower --save-total-limit or --export-dtype bfloat16"),
    ):
        if size > available:
            reporter.warning(f"{what}: that is more than the {available / unit:.1f} GiB free: try {remedy}")
