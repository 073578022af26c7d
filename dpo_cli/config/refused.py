"""Combinations of options that are refused before anything is loaded: one table for all commands."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from dpo_cli.losses.objective import Objective

_OF_ADAPTERS = (
    *("lora_type", "lora_alpha", "lora_targets", "modules_to_save", "load_in_4bit", "load_in_8bit", "export"),
)


def refused(options: Any) -> list[str]:
    """Say which of the options contradict each other, and what to do.

    Raises:
        UsageError: the loss cannot have the options that are given for it.
    """
    o = defaultdict(lambda: None, vars(options))  # None: the command has no such option, or it is not given
    trains, fsdp, lora = "lora_rank" in o, o["fsdp"], o["lora_rank"]
    sweeps = trains and "samples" in o
    objective = options.objective if trains else Objective()
    ref, held_out = trains and o["ref_model"], o["eval_data"] or o["eval_fraction"]
    quantized = o["load_in_4bit"] or o["load_in_8bit"]
    unused = ", ".join(f"--{name.replace('_', '-')}" for name in _OF_ADAPTERS if trains and not lora and o[name])
    reads_held_out = o["eval_steps"] or o["show_answers"] or o["save_best"]
    clips, in_full = o["max_grad_norm"], o["memory"] in (None, "auto", "full")
    stored, merged = o["export_dtype"] not in (None, "float32"), o["export"] == "merged"
    table = [
        (o["load_in_4bit"] and o["load_in_8bit"], "--load-in-4bit, --load-in-8bit: a base is quantized once"),
        (ref and not objective.reference, "--ref-model {ref_model}: --loss {loss} reads no reference; leave it out"),
        (fsdp and (lora or ref), "--fsdp: shards a model that is trained in full; not with --lora-rank, --ref-model"),
        (fsdp and o["show_answers"], "--show-answers: a model in shards does not answer; use dpo eval --samples"),
        (unused, f"{unused}: no adapter is trained; add --lora-rank, for example 16, or leave it out"),
        (lora and not in_full, "--memory {memory}: an adapter's weights are few and stay float32; use full"),
        (o["memory"] == "in-backward" and clips, "--memory in-backward: nothing can be clipped; set --max-grad-norm 0"),
        (
            lora and stored and not merged,
            "--export-dtype {export_dtype}: an adapter is float32; add --export merged",
        ),
        (merged and quantized, "--export merged: not over a quantized base; export the adapter, and use dpo merge"),
        (quantized and o["dtype"] == "float32", "--load-in-4bit, --load-in-8bit: not with --dtype float32"),
        (fsdp and quantized, "--fsdp: shards float32 weights; not with --load-in-4bit, --load-in-8bit"),
        (fsdp and not in_full, "--memory {memory}: its blocks of moments cannot be sharded; with --fsdp use full"),
        (quantized and o["lora_type"] == "dora", "--lora-type dora: not over a quantized base; use lora or rslora"),
        (o["eval_data"] and o["eval_fraction"], "--eval-data and --eval-fraction: give one of them"),
        (
            reads_held_out and not held_out,
            "--eval-steps, --show-answers and --save-best need held-out pairs: --eval-data or --eval-fraction",
        ),
        (sweeps and not o["eval_data"], "--eval-data is missing: a sweep compares its runs on held-out rows"),
        (sweeps and not objective.uses("beta"), "--loss {loss}: reads no beta, so there is nothing to compare"),
    ]
    return [text.format_map(o) for refuse, text in table if refuse]
