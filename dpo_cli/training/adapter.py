"""The adapter of a run: its settings, its targets, and a check that all of it is trained."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import torch

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pairs
from dpo_cli.models.adapter_files import check_loadable, read_config, settings
from dpo_cli.models.adapters import counted, describe_adapter, is_adapted, kind_of, new_adapter, pattern_of
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.logprobs import forward_errors
from dpo_cli.training.prepare import ScoredModel, check_quantize
from dpo_cli.training.run_dir import trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind
from dpo_cli.utils.errors import UsageError

PROBE_TOKENS = 512  # tokens of the trial backward pass, which runs before the memory is measured


def resolve_adapter(
    source: ModelSource, options: TrainOptions, device: torch.device, reporter: Reporter
) -> tuple[ModelSource, TrainOptions]:
    """Fill in the source and options that an adapter needs, from the adapter to start from if there is one.

    Raises:
        UsageError: the options contradict that adapter, or it cannot be trained.
    """
    if options.lora_rank is None:
        return source, options
    check_quantize(options, source, device_kind(device))
    if source.checkpoint and source.checkpoint != source.adapter:
        raise UsageError(
            f"--model {options.model}: a full checkpoint cannot be an adapter's base; name its run, or best/"
        )
    source = dataclasses.replace(source, quantize=options.quantize, attached=source.adapter is not None)
    if source.adapter is None:
        kind, targets = options.lora_type or "lora", options.lora_targets or "all-linear"
        alpha = options.lora_alpha or (16 if kind == "rslora" else 2 * options.lora_rank)
        return source, dataclasses.replace(options, lora_type=kind, lora_targets=targets, lora_alpha=alpha)
    own, earlier = settings(read_config(source.adapter)), trained_with(source.run) if source.run else None
    same = {name: (None, value, getattr(earlier, name, None)) for name, value in own.items()}  # or as the run spells it
    if other := [name for name, values in same.items() if getattr(options, name) not in values]:
        differ = ", ".join(f"--{n.replace('_', '-')} {getattr(options, n)} (it has {own[n]})" for n in other)
        raise UsageError(
            f"--model {options.model}: an adapter keeps its own settings: {differ}; use its values, or "
            "train the merged model in full without --lora-rank"
        )
    if earlier and (bits := earlier.quantize) != options.quantize:
        before, now = (f"in {each}" if each else "unquantized" for each in (bits, options.quantize))
        reporter.warning(
            f"the adapter was trained on its base {before} and continues on it {now}: the policy is not the same"
        )
    return source, dataclasses.replace(options, **own)


def attach_adapter(policy: ScoredModel, options: TrainOptions, pairs: Pairs, reporter: Reporter) -> None:
    """Attach a new adapter unless the model has one, report its targets, and try a backward pass.

    Raises:
        UsageError: no target can be adapted, or a part would not be trained.
    """
    policy.low = None  # the base is frozen
    model, runner, new = policy.model, policy.runner, not is_adapted(policy.model)
    costs = runner.costs(pairs)  # long pairs also reach modules that merge many tokens into one
    most = max(min(costs), min(PROBE_TOKENS, runner.max_tokens))
    batch = runner.batch([pairs[max((i for i in range(len(pairs)) if costs[i] <= most), key=costs.__getitem__)]])
    skipped = dict[str, Counter[str]]()
    if new:
        with forward_errors("the model's own forward fails with gradients enabled"):
            skipped = new_adapter(model, options, policy.source.name, lambda: runner.token_logps(batch))
        check_loadable(model)
    adapted, experts = describe_adapter(model)
    about = f"{options.lora_type} of rank {options.lora_rank}, alpha {options.lora_alpha}"
    reporter.info("adapter", f"{about}, on {adapted}")
    if experts and options.export != "merged":
        reporter.warning(
            f"transformers 4 loads the exported adapter without its part on {', '.join(experts)}, or not at all: "
            "it needs transformers 5; for other tools take --export merged, or dpo merge"
        )
    for reason, counts in skipped.items():
        reporter.info("", f"without an adapter, {reason}: {counted(counts)}")
    with forward_errors("--lora-targets: this model fails with an adapter"):
        runner.token_logps(batch).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    reached = {pattern_of(name) for name, gradient in trained.items() if gradient is not None}
    model.zero_grad()
    if names := [name for name in trained if pattern_of(name) not in reached]:
        kinds = sorted({kind_of(re.split(r"\.(?:base_layer|lora_|modules_to_save)", name)[0]) for name in names})
        if new:
            raise UsageError(
                f"--lora-targets, --modules-to-save: no log-prob of text depends on {', '.join(kinds)}, so it would "
                "not be trained; leave it out"
            )
        reporter.info("", f"not trained, as no log-prob of text depends on them: {', '.join(kinds)}")
