"""A run before its first step: its data, model and schedule, which are reported, and the folder that it writes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config.options import DataOptions, TrainOptions
from dpo_cli.config.resolve import RESUME_MUTABLE, resolve, to_yaml
from dpo_cli.data.batching import Layout, Step, build_schedule, row_costs, step_pairs
from dpo_cli.data.pairs import Hashes, Pairs, trained_on
from dpo_cli.data.rows import BadRow, Reading
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.diagnostics import HOLD_OUT
from dpo_cli.evaluation.generation import generation_config
from dpo_cli.evaluation.kl import HeadInputs, Progress
from dpo_cli.models.adapter_files import check_loadable, settings, trainable_config
from dpo_cli.models.adapters import (
    attach,
    describe_adapter,
    experts_of_version_5,
    is_adapted,
    is_quantized,
    make_config,
    try_backward,
)
from dpo_cli.models.fingerprint import fingerprint
from dpo_cli.models.layout import experts_a_token
from dpo_cli.models.loading import compile_layers, dtype_name, export_dtype, load_tokenizer, release
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.logprobs import ModelRunner, forward_errors
from dpo_cli.models.lora_targets import choose_targets, counted
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.training.memory import Fit, fit, process_bytes, usable_bytes
from dpo_cli.training.optimizer import BYTES, SPLIT, learning_rate
from dpo_cli.training.prepare import (
    check_quantize,
    choose_model,
    choose_tokenizer,
    fill_reference,
    halved_if_split,
    hold_out,
    load_spread,
    load_weights,
    make_scorer,
    open_cache,
    read_pairs,
    reading_of,
    refuse_unread_terms,
    tell_long,
    weights_mode,
)
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError
from dpo_cli.utils.files import atomic_dir, file_lock, load_checksummed, sha256, to_json, with_checksum

LOCK = "run.lock"
TRIED = 512  # tokens of the pair whose gradient is tried, before it is known what fits the memory
TRAINED = "trained-pairs.safetensors"  # hashes of the pairs that are trained on
# The sum of the steps' learning rates is about the most that AdamW moves a weight. Each 1e-6 of it moved the margin of
# an easy preference by 0.17 nats on the packaged model, and by 0.009 with an adapter: below these it stays under a nat.
MOVES, MOVES_ADAPTER = 5e-6, 1e-4


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference that is another model than the start policy, which has scored and is gone.

    ``logps`` (P, 2) in nats are those of ``Run.scored()``; ``recorded`` is its side of the exact KL on the held-out
    pairs. Of a dry run there is neither.
    """

    source: ModelSource
    fingerprint: str
    layout: Layout
    cache: ReferenceCache
    logps: Tensor | None
    recorded: HeadInputs | None
    vocabulary: int  # that its head knows


@dataclasses.dataclass
class Run:
    """A run that is laid out and has not begun."""

    folder: Path
    options: TrainOptions
    source: ModelSource
    tokenizer: Any
    pairs: Pairs
    held_out: Pairs
    refused: list[BadRow]
    model: PreTrainedModel
    own_attention: str
    scorer: ModelRunner
    costs: list[int]  # tokens that each pair takes up in a forward
    plan: list[Step]
    start: str  # fingerprint of the start policy
    reference: Reference | None  # where it is not the start policy
    cache: ReferenceCache | None  # of the reference; None: the loss reads none
    fitted: Fit
    low: dict[str, Tensor] | None  # the lower halves of the weights, where the memory mode splits them
    experts: int  # that a token goes to, where the balance of a mixture is part of the loss; else 0

    def used(self) -> list[int]:
        """Places of the pairs that the plan trains on."""
        return sorted({i for step in self.plan for indices in step for i in indices})

    @cached_property
    def trained(self) -> Hashes:
        """``Pairs.hashes`` of the pairs that the plan trains on, and of those that a run trained on before it."""
        own = self.pairs.select(self.used()).hashes()
        earlier = trained_hashes(self.source.run, read_manifest(self.source.run)) if self.source.run else None
        return own if earlier is None else np.concatenate([own, earlier])

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        """How many of the held-out pairs are trained on too."""
        return trained_on(self.held_out, self.trained)

    def weighted_ref_logps(self, pairs: Pairs, ref_logps: Tensor) -> Tensor:
        """Reference log-probs of pairs with the token weights of LD-DPO: (P, 2) nats; ``ref_logps`` without."""
        alpha = self.options.objective.ld_alpha
        return ref_logps if alpha == 1 or self.cache is None else self.cache.weighted(pairs, alpha)

    def scored(self) -> Pairs:
        """The pairs that the reference scores: those that are used, then the held-out ones."""
        return self.pairs.select(self.used()) + self.held_out


def lay_out_run(
    options: TrainOptions,
    resume: Path | None,
    device: torch.device,
    reporter: Reporter,
    dry_run: bool = False,
) -> Run:
    """Everything up to the first forward of the start policy: data, model, layout and plan. Writes nothing to the run.

    A reference that is another model is loaded, scores and is gone before the policy is loaded.

    Raises:
        UsageError: an option, the data or the model cannot be used.
    """
    folder = distributed.on_rank_0(lambda: _checked_folder(options, resume))
    source = choose_model(options.model, options, reporter, base=options.base_model)
    source, options = _with_adapter(source, options, device, reporter)
    tokenizer = choose_tokenizer(source, options)
    reading = reading_of(options)
    options = dataclasses.replace(
        options,
        max_length=reading.max_length,
        control_tokens=reading.control_tokens,
        train_turns=reading.train_turns,
    )
    found = read_pairs(options.data, options, tokenizer, reporter)
    pairs, held_out = found.pairs, Pairs()
    if options.eval_data:
        found_held_out = read_pairs(options.eval_data, options, tokenizer, reporter, "held out")
        held_out, found.refused = found_held_out.pairs, found.refused + found_held_out.refused
    elif options.eval_fraction:
        pairs, held_out = hold_out(pairs, options.eval_fraction, options.seed)
        reporter.info("held out", f"{len(held_out):,} of the pairs")
    refuse_unread_terms(options.objective, pairs + held_out)

    process = process_bytes(device)
    options = _shards_of(options, resume, reporter)
    reference = (
        _scored_reference(options, tokenizer, pairs, held_out, device, reporter, dry_run) if options.ref_model else None
    )
    model, weights = load_spread(source, options, device, remember=not dry_run)
    own_attention = model.config._attn_implementation
    experts = experts_a_token(model, pairs[0]) if options.router_aux_loss_coef else 0
    mode = weights_mode(options.memory, bool(options.lora_rank), options.dtype, device)
    scorer = make_scorer(model, pairs + held_out, options, device, reporter, mode)
    if experts and not scorer.chunked_lm_head:
        raise UsageError("--router-aux-loss-coef: the model's head cannot run apart from its body; leave it out")
    weights, low = halved_if_split(model, weights, mode)
    if options.lora_rank:
        low = None  # what is halved is never trained
        _attach(model, options, source.name, scorer, pairs, reporter)
        if experts:
            _check_routers_train(scorer, pairs)
    fitted = fit(scorer, pairs, process, options.memory, options.gradient_checkpointing, options.max_tokens)
    if low is None and fitted.memory in SPLIT:  # auto found it; the halves keep less
        weights, low = halved_if_split(model, weights, fitted.memory)
        fitted = fit(scorer, pairs, process, fitted.memory, fitted.recompute, options.max_tokens)
    if options.compile:
        compile_layers(model)
    scorer.max_tokens = fitted.max_tokens
    tell_long(scorer, pairs + held_out, reporter)
    options = dataclasses.replace(
        options,
        max_tokens=fitted.max_tokens,
        dtype=dtype_name(scorer.dtype),
        memory=fitted.memory,
        gradient_checkpointing=fitted.recompute,
    )
    costs = scorer.costs(pairs)
    plan = build_schedule(
        costs,
        scorer.layout,
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_steps=options.max_steps,
        max_tokens=scorer.max_tokens,
        world_size=distributed.world_size(),
        seed=options.seed,
    )
    start = fingerprint(model, weights, scorer.layout, scorer.dtype)
    _check_ranks(options, pairs, held_out, start)
    _check_same_heads(options.ref_model, reference, model)
    own_cache = open_cache(options, start, source, scorer, reporter) if options.objective.reference else None
    run = Run(
        folder,
        options,
        source,
        tokenizer,
        pairs,
        held_out,
        found.refused,
        model,
        own_attention,
        scorer,
        costs,
        plan,
        start,
        reference,
        reference.cache if reference else own_cache,
        fitted,
        low,
        experts,
    )
    if fitted.memory == "in-backward" and any(len(step) > 1 for step in plan):
        raise UsageError(
            "--memory in-backward: a weight is updated as soon as its gradient is there, so each step must be one "
            "forward: a lower --batch-size, or a higher --max-tokens"
        )
    model.generation_config = generation_config(model, tokenizer, pairs)  # of the policy, and so of what is exported
    _tell_plan(run, reporter)
    return run


def _shards_of(options: TrainOptions, resume: Path | None, reporter: Reporter) -> TrainOptions:
    """The options of this process, which alone resumes what several began."""
    if not (resume and options.fsdp) or distributed.is_launched():
        return options
    reporter.info("shard", "one process resumes what began in shards")
    return dataclasses.replace(options, fsdp=False)


def _check_ranks(options: TrainOptions, pairs: Pairs, held_out: Pairs, start: str) -> None:
    """Refuse to begin where the ranks would not train the same, or not add up their gradients.

    Raises:
        UsageError: saying which.
    """
    if distributed.world_size() == 1:
        return
    if options.memory == "in-backward":
        raise UsageError("--memory in-backward: a gradient is used up before the ranks could add theirs; use split")
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in RESUME_MUTABLE}
    data = {"the_data": pairs.digest(), "the_held_out_data": held_out.digest()}
    distributed.check_same(**data, the_model=start, the_options=str(fixed))


def _with_adapter(
    source: ModelSource, options: TrainOptions, device: torch.device, reporter: Reporter
) -> tuple[ModelSource, TrainOptions]:
    """The source and options of an adapter's training, if there is to be one: those of the adapter that it starts from.

    Raises:
        UsageError: the options contradict that adapter, or it cannot be trained.
    """
    if options.lora_rank is None:
        return source, options
    check_quantize(options, source, device)
    if source.checkpoint and source.checkpoint != source.adapter:
        raise UsageError(
            f"--model {options.model}: an adapter needs a base that others can load; name the run, or its best/"
        )
    source = dataclasses.replace(source, quantize=options.quantize, attached=source.adapter is not None)
    if source.adapter is None:
        kind, targets = options.lora_type or "lora", options.lora_targets or "all-linear"
        alpha = options.lora_alpha or (16 if kind == "rslora" else 2 * options.lora_rank)
        return source, dataclasses.replace(options, lora_type=kind, lora_targets=targets, lora_alpha=alpha)
    own, began = settings(trainable_config(source.adapter)), trained_with(source.run) if source.run else None
    known = {name: (None, value, getattr(began, name, None)) for name, value in own.items()}  # also as the run says it
    if other := [name for name, values in known.items() if getattr(options, name) not in values]:
        differ = ", ".join(f"--{n.replace('_', '-')} {getattr(options, n)} (it has {own[n]})" for n in other)
        raise UsageError(
            f"--model {options.model}: an adapter keeps its own settings: {differ}; leave that out, or train all "
            "weights of the merged model without --lora-rank"
        )
    if began and (bits := began.quantize) != options.quantize:
        before, now = (f"in {each}" if each else "unquantized" for each in (bits, options.quantize))
        reporter.warning(
            f"the adapter was trained on its base {before} and continues on it {now}: the policy is not the same"
        )
    return source, dataclasses.replace(options, **own)


def _attach(
    model: PreTrainedModel, options: TrainOptions, base: str, scorer: ModelRunner, pairs: Pairs, reporter: Reporter
) -> None:
    """Put a new adapter into the model unless one is there, report what it is on, and try a backward pass.

    Raises:
        UsageError: the options name nothing that can be adapted, or a part would not be trained.
    """
    costs = scorer.costs(pairs)  # a longer pair also reaches what compresses many tokens into one
    most = max(min(costs), min(TRIED, scorer.max_tokens))
    batch = scorer.batch([pairs[max((i for i in range(len(pairs)) if costs[i] <= most), key=costs.__getitem__)]])
    left, new = Counter[tuple[str, str]](), not is_adapted(model)
    if new:
        rank, kind, alpha, names = options.lora_rank, options.lora_type, options.lora_alpha, options.lora_targets
        assert rank and kind and alpha and names
        with forward_errors("the model's own forward fails where gradients are wanted"):
            targets = choose_targets(model, names, lambda: scorer.token_logps(batch))
        whole = options.modules_to_save
        config = make_config(model, rank=rank, kind=kind, alpha=alpha, targets=targets, to_save=whole, base=base)
        attach(model, config, options.seed)
        check_loadable(model)
        left = targets.left
    about = f"{options.lora_type} of rank {options.lora_rank}, alpha {options.lora_alpha}"
    reporter.info("adapter", f"{about}, on {describe_adapter(model)}")
    if (experts := experts_of_version_5(model)) and options.export != "merged":
        reporter.warning(
            f"transformers 4 loads the exported adapter without its part on {', '.join(experts)}, or not at all: "
            "it needs transformers 5; for other tools take --export merged, or dpo merge"
        )
    for reason in dict.fromkeys(reason for reason, _ in left):
        kinds = Counter({kind: count for (why, kind), count in left.items() if why == reason})
        reporter.info("", f"without an adapter, {reason}: {counted(kinds)}")
    if unreached := try_backward(model, lambda: scorer.token_logps(batch)):
        if new:
            raise UsageError(
                f"--lora-targets, --modules-to-save: no log-prob of text depends on {', '.join(unreached)}, so that it "
                "would not be trained; leave it out"
            )
        reporter.info("", f"no log-prob of text depends on these, and they stay as they are: {', '.join(unreached)}")


def _check_routers_train(scorer: ModelRunner, pairs: Pairs) -> None:
    """Refuse to balance routers that nothing trained reaches.

    Raises:
        UsageError: no router is, or stands behind, a module that is trained.
    """
    costs = scorer.costs(pairs)
    shortest = pairs[costs.index(min(costs))]
    if not any(
        logits.requires_grad
        for logits in scorer.body(scorer.batch([shortest]), output_router_logits=True).router_logits
    ):
        raise UsageError(
            "--router-aux-loss-coef: nothing that is trained reaches a router, so there is nothing to balance; "
            "leave it out, or take other --lora-targets"
        )


def _scored_reference(
    options: TrainOptions,
    tokenizer: Any,
    pairs: Pairs,
    held_out: Pairs,
    device: torch.device,
    reporter: Reporter,
    dry_run: bool,
) -> Reference:
    """Load the reference that ``--ref-model`` names, let it score what the run will ask for, and give its memory back.

    Raises:
        UsageError: it cannot be loaded, or reads other tokens than the policy.
    """
    try:
        source = choose_model(options.ref_model, options, reporter, "reference")
        _check_same_tokens(options.ref_model, tokenizer, load_tokenizer(source))
        model, weights = load_weights(source, options, remember=not dry_run)
    except UsageError as error:
        raise UsageError(str(error).replace("--model", "--ref-model")) from error
    steps = step_pairs(
        len(pairs),
        batch_size=options.batch_size,
        epochs=options.epochs,
        max_steps=options.max_steps,
        seed=options.seed,
    )
    used = sorted({i for step in steps for i in step})
    scored = pairs.select(used) + held_out
    mode = weights_mode(options.memory, True, options.dtype, device)
    scorer = make_scorer(model, scored, options, device, reporter, mode)
    weights, _ = halved_if_split(model, weights, mode)
    if options.compile:
        compile_layers(model)
    name = fingerprint(model, weights, scorer.layout, scorer.dtype)
    cache = open_cache(options, name, source, scorer, reporter)
    logps, recorded = None, None
    if not dry_run:
        logps = fill_reference(cache, scored, scorer, reporter).logps
        if held_out and options.kl == "exact":  # the first rank evaluates
            states: list[HeadInputs] = []
            progress = Progress(reporter, "reference")
            distributed.on_rank_0(lambda: states.append(kl.record(scorer, held_out, options.cache_dir, progress)))
            recorded = states[0] if states else None
    vocabulary = _vocabulary(model)
    release(model)
    return Reference(source, name, scorer.layout, cache, logps, recorded, vocabulary)


def _check_same_heads(name: str | None, reference: Reference | None, model: PreTrainedModel) -> None:
    """Refuse an exact KL between heads that know so many tokens each."""
    if reference and reference.recorded and reference.vocabulary != _vocabulary(model):
        raise UsageError(
            f"--ref-model {name}: its head knows {reference.vocabulary:,} tokens and the policy's "
            f"{_vocabulary(model):,}, so there is no exact KL: add --kl none"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model's head knows."""
    return int(model.config.get_text_config().vocab_size)


def _check_same_tokens(name: str | None, tokenizer: Any, other: Any) -> None:
    """Refuse a reference to which the ids of the policy's tokenizer mean something else."""
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    if differing := [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]:
        token = min(differing)
        places = [f"token {ids[token]}" if token in ids else "no token" for ids in (theirs, mine)]
        raise UsageError(
            f"--ref-model {name}: its tokenizer is another one than the policy's: {token!r} is {places[0]} there and "
            f"{places[1]} here, and {len(differing) - 1:,} more differ"
        )


def _checked_folder(options: TrainOptions, resume: Path | None) -> Path:
    """The run's folder, which can be made; and options that contradict each other are refused."""
    folder = resume or options.output or _free_name(Path("runs", time.strftime("%Y%m%d-%H%M%S")))
    if resume is None and folder.exists():
        _refuse_if_held(folder)
        raise UsageError(f"--output {folder}: exists already; go on with it by --resume {folder}, or name another")
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--output {folder}: its path is not UTF-8") from error
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--output {folder}: cannot be made, for {above} is no folder that can be written to")
    if options.eval_data and options.eval_fraction:
        raise UsageError("--eval-data and --eval-fraction: give one of them")
    if not (options.eval_data or options.eval_fraction) and (
        options.eval_steps or options.show_answers or options.save_best
    ):
        raise UsageError(
            "--eval-steps, --show-answers and --save-best need held-out pairs: --eval-data or --eval-fraction"
        )
    if options.fsdp and options.show_answers:
        raise UsageError("--show-answers: a model in shards does not answer while it trains; use dpo eval --samples")
    if options.memory == "in-backward" and options.max_grad_norm:
        raise UsageError("--memory in-backward: no gradient is there long enough to be clipped; set --max-grad-norm 0")
    return folder


def _free_name(folder: Path) -> Path:
    """The folder, or the first of ``folder-2``, ``folder-3``, … that is not there: clocks are set back."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([folder], names) if not name.exists())


def _tell_plan(run: Run, reporter: Reporter) -> None:
    options, scorer = run.options, run.scorer
    if not options.objective.reference:
        reporter.info("reference", f"none: --loss {options.objective.name} reads none, so nothing is scored or cached")
    parameters, trained = run.model.num_parameters(), run.fitted.step_bytes.parameters
    threads = f", {torch.get_num_threads()} threads" if scorer.device.type == "cpu" else ""
    if (several := distributed.world_size()) > 1:
        share = "a share of the model" if options.fsdp else "the whole model"
        reporter.info(
            "ranks", f"{several} processes, {distributed.local_world_size()} of them here; each keeps {share}"
        )
    kept = _kept_of_adapter(run) if options.lora_rank else _KEPT[run.fitted.memory]
    reporter.info("device", f"{scorer.device.type}{threads}; compute {options.dtype}; {kept}")
    share = f"{trained:,} of them trained ({trained / parameters:.2%})" if options.lora_rank else "all trained"
    reporter.info("parameters", f"{parameters:,}, {share}")
    steps = [[i for indices in step for i in indices] for step in run.plan]
    tokens = sum(run.costs[i] for step in steps for i in step)
    padded_costs = row_costs(run.pairs, "padded")
    plain = sum(len(step) * max(padded_costs[i] for i in step) for step in steps)
    forwards = sum(len(step) for step in run.plan)
    budget = f"{forwards:,} forwards of at most {scorer.max_tokens:,} tokens"
    reporter.info("plan", f"{len(steps):,} steps of {options.batch_size} pairs in {budget}")
    padded = f"padded batches of {options.batch_size} would take {plain:,} ({plain / tokens:.1f} times)"
    reporter.info("tokens", f"{tokens:,} to train on; {padded}")
    need, room = run.fitted.estimate(run.plan, run.costs, run.pairs, scorer), usable_bytes(scorer.device)
    counted = run.fitted.step_bytes
    state = (counted.frozen + trained * sum(BYTES[run.fitted.memory]) / counted.shards) / 2**30
    again = ", activations computed again in the backward pass" if run.fitted.recompute else ""
    estimate = (
        f"about {need / 2**30:.1f} GiB at most (estimate), {state:.1f} of them weights, gradients and moments{again}"
    )
    reporter.info("memory", estimate)
    if need > room:
        reporter.warning(
            f"that is more than the {room / 2**30:.1f} GiB to be had: try a lower --max-length or --max-tokens"
        )
    disk, free = _disk_bytes(run), shutil.disk_usage(next(p for p in run.folder.absolute().parents if p.exists())).free
    reporter.info("disk", f"about {disk / 2**30:.1f} GiB at most, for checkpoints and exports")
    if disk > free:
        reporter.warning(
            f"that is more than the {free / 2**30:.1f} GiB that are free: try a lower --save-total-limit or "
            "--export-dtype bfloat16"
        )
    _hint(run, reporter)


def _disk_bytes(run: Run) -> int:
    """What a run's folder takes at most: the checkpoints it keeps, its exports, and one of each being written."""
    options, trained, steps = run.options, run.fitted.step_bytes.parameters, len(run.plan)
    weight, _, moments = BYTES[run.fitted.memory]
    checkpoint, exported = trained * (weight + moments), trained * 4
    if not options.lora_rank or options.export == "merged":
        exported = run.model.num_parameters() * export_dtype(options.export_dtype, run.source).itemsize
    if not options.lora_rank:
        checkpoint += 4 * (run.model.num_parameters() - trained)
    checkpoints = min(options.save_total_limit + 1, 1 + (steps - 1) // options.save_steps if options.save_steps else 1)
    return checkpoints * checkpoint + exported * (3 if options.save_best else 1)


def _hint(run: Run, reporter: Reporter) -> None:
    """Say what will keep the training from showing anything: too small steps, no held-out pairs or known ones."""
    options, steps = run.options, len(run.plan)
    least, tried = (MOVES_ADAPTER, 2e-4) if options.lora_rank else (MOVES, 2e-5)
    if sum(learning_rate(step, steps, options) for step in range(1, steps + 1)) < least:
        count = f"{steps:,} step{'s' * (steps > 1)} at lr {options.lr:g}"
        more = f"for a few hundred pairs try --lr {tried:g} --batch-size 8" if options.lr < tried else "take more steps"
        reporter.info("hint", f"{count} will hardly move the model: {more}")
    if not run.held_out:
        reporter.info("held out", f"no pairs: nothing will show whether the model learns the preference; {HOLD_OUT}")
    elif overlap := trained_on(run.held_out, run.trained, "will be")["text"]:
        reporter.warning(overlap)


_KEPT = {
    "full": "weights and moments float32",
    "split": "weights bfloat16 with their lower halves, moments 8 bits",
    "in-backward": "weights bfloat16 with their lower halves, moments 8 bits, updated in the backward pass",
}


def _kept_of_adapter(run: Run) -> str:
    coarse = "bfloat16" if run.model.dtype == torch.bfloat16 else "float32"
    packed = run.source.stored if is_quantized(run.model) else ""
    return f"frozen base {run.options.quantize or packed or coarse}, adapter and its moments float32"


@contextmanager
def begin(run: Run, manifest: dict[str, Any]) -> Iterator[Path]:
    """Make the run's folder with its options, manifest and refused rows, whole at once; hold it while the block runs.

    Yields: the folder, which has another name where nobody named it and a run that began meanwhile has this one.

    Raises:
        UsageError: another run made the folder meanwhile and is in it.
        DpoError: the folder cannot be written.
    """
    folder = run.folder
    with ExitStack() as holding:
        while not _began(run, manifest, folder, holding):
            folder = _free_name(run.folder)
        holding.callback((folder / LOCK).unlink, missing_ok=True)
        yield folder


def _began(run: Run, manifest: dict[str, Any], name: Path, holding: ExitStack) -> bool:
    """Make the folder of that name, see ``begin``; False if another run has it and any name will do."""
    with ExitStack() as trying:
        try:
            with atomic_dir(name, new=True) as folder:
                trying.enter_context(file_lock(folder / LOCK))
                (folder / "config.yaml").write_text(to_yaml(run.options), encoding="utf-8")
                content = with_checksum(manifest | {"config": sha256(folder / "config.yaml")})
                (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                save_file({"pairs": run.trained}, folder / TRAINED)
                if run.refused:
                    with (folder / "refused.jsonl").open("w", encoding="utf-8") as stream:
                        for bad in run.refused:
                            about = {"where": bad.where, "reason": bad.reason, "row": bad.record}
                            stream.write(to_json(about) + "\n")
        except DpoError:
            if run.options.output is None and name.exists():
                return False
            _refuse_if_held(name)
            raise
        holding.push(trying.pop_all())
        return True


def _refuse_if_held(folder: Path) -> None:
    """Say which process is at work in a run's folder, if one is."""
    if (folder / LOCK).is_file():
        with file_lock(folder / LOCK):
            pass


def make_manifest(run: Run, command: Sequence[str]) -> dict[str, Any]:
    """What it takes to tell, later, where a run's numbers come from."""
    packages = ("dpo-cli", "torch", "transformers", "accelerate", "safetensors", "peft")
    return {
        "command": shlex.join(command),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "device": run.scorer.device.type,
        "processes": distributed.world_size(),
        "data": {
            "files": run.options.data,
            "pairs": len(run.pairs),
            "refused": len(run.refused),
            "sha256": run.pairs.digest(),
            "trained": hashlib.sha256(run.trained.data).hexdigest(),
        },
        "held_out": {"files": run.options.eval_data, "pairs": len(run.held_out), "sha256": run.held_out.digest()},
        "start_model": run.source.title,
        "reference": {
            **(_named(run.options.ref_model) if run.reference else _named(run.options.model, run.options.base_model)),
            "fingerprint": run.reference.fingerprint if run.reference else run.start,
            "layout": run.reference.layout if run.reference else run.scorer.layout,
            "dtype": run.options.dtype,
        },
    } | (
        {"start": {**_named(run.options.model, run.options.base_model), "fingerprint": run.start}}
        if run.reference
        else {}
    )


def _named(model: str | None, base: str | None = None) -> dict[str, str | None]:
    """What a manifest says of a model, for ``locate.start_model``."""
    return {"model": _from_anywhere(model)} | ({"base_model": _from_anywhere(base)} if base else {})


def _from_anywhere(name: str | None) -> str | None:
    """A model's name, a local path as an absolute one: from another folder it would be taken for a name on the hub."""
    path = Path(name).expanduser() if name else None
    return str(path.absolute()) if path and path.exists() else name


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        UsageError: it is damaged, or somebody changed it.
    """
    try:
        manifest = load_checksummed((folder / "manifest.json").read_text(encoding="utf-8"))
        reference = manifest["reference"]
        texts = [manifest["data"]["sha256"], manifest["held_out"]["sha256"], manifest["config"], manifest["device"]]
        texts += [reference[name] for name in ("fingerprint", "values", "layout", "dtype")]
        start = start_of(manifest)
        texts.append(start["fingerprint"])
        if not all(
            isinstance(text, str)
            for text in [
                *(*texts, start["model"] or "", reference["model"] or "", str(manifest["versions"])),
                *(each.get("base_model", "") for each in (start, reference)),
            ]
        ):
            raise ValueError("it is of another kind")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'manifest.json'} cannot be trusted: {error}") from error


def trained_hashes(
    folder: Path, manifest: Mapping[str, Any], warn: Callable[[str], None] = lambda _: None
) -> Hashes | None:
    """Hashes of the pairs that a run trained on: (P, 2). None of a run that kept none, or with a warning if damaged."""
    if (expected := manifest["data"].get("trained")) is None:
        return None
    try:
        found: Hashes = load_file(folder / TRAINED)["pairs"]
        if hashlib.sha256(found.tobytes()).hexdigest() != expected:
            raise ValueError("it is not as it was written")
        return found.reshape(-1, 2)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        warn(f"{folder / TRAINED}: {error}; whether the run trained on these pairs is unknown")
        return None


def start_of(manifest: Mapping[str, Any]) -> Any:
    """What a manifest says of the start policy: the same as of the reference, unless that is another model."""
    return manifest.get("start", manifest["reference"])


def reading_as_trained(options: DataOptions, source: ModelSource) -> Reading:
    """How rows are read: of a run, as it read its own where the options leave that open."""
    reading = reading_of(options)
    if not source.run:
        return reading
    began = reading_of(trained_with(source.run))
    same = ("max_length", "control_tokens", "train_turns")
    return dataclasses.replace(reading, **{n: getattr(began, n) for n in same if getattr(options, n) is None})


def trained_with(folder: Path) -> TrainOptions:
    """The options that a run was trained with.

    Raises:
        UsageError: they are not those that it began with, or cannot be read.
    """
    if read_manifest(folder)["config"] != sha256(folder / "config.yaml"):
        raise UsageError(f"{folder / 'config.yaml'} changed since the run began")
    return resolve(TrainOptions, {}, folder / "config.yaml")


def check_same_run(folder: Path, manifest: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Refuse to resume with other data or start weights than the run began with; returns its manifest."""
    began = read_manifest(folder)
    checks = {"data": ("sha256", "the data"), "held_out": ("sha256", "the held-out data")}
    if "start" in began:
        checks |= {"start": ("fingerprint", "the start model"), "reference": ("fingerprint", "the reference")}
    else:
        checks["reference"] = ("fingerprint", "the start model")
    changed = [name for section, (key, name) in checks.items() if began[section][key] != manifest[section][key]]
    if changed:
        raise UsageError(
            f"--resume {folder}: {' and '.join(changed)} changed since the run began; start a new run instead"
        )
    known = manifest["versions"] | began["versions"]  # a run of before names fewer
    if (known, began["device"]) != (manifest["versions"], manifest["device"]):
        reporter.warning("the libraries or the device are others than when the run began: the last bits may differ")
    return began
