"""Combinations of options that are refused before anything is loaded: one table for all commands."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

_OF_ADAPTERS = (*("lora_type", "lora_alpha", "lora_targets", "modules_to_save", "load_in_4bit", "load_in_8bit"),)


def refused(options: Any) -> list[str]:
    """Say which of the options contradict each other, and what to do.

    Raises:
        UsageError: the loss cannot have the options that are given for it.
    """
    o = defaultdict(lambda: None, vars(options))  # None: the command has no such option, or it is not given
    trains, sweeps = "lora_rank" in o, "lora_rank" in o and "samples" in o
    objective = options.objective if trains else None
    lora, quantized = o["lora_rank"], o["load_in_4bit"] or o["load_in_8bit"]
    unused = [f"--{name.replace('_', '-')}" for name in _OF_ADAPTERS if trains and not lora and o[name]]
    held_out = o["eval_data"] or o["eval_fraction"]
    table = {
        "--load-in-4bit, --load-in-8bit: a base is quantized once; leave one out": o["load_in_4bit"]
        and o["load_in_8bit"],
        "--load-in-4bit, --load-in-8bit: they compute in bfloat16; leave out --dtype float32": quantized
        and o["dtype"] == "float32",
        "--memory {memory}: shards would cut its blocks of moments differently; with --fsdp use full": o["fsdp"]
        and o["memory"] not in ("auto", "full"),
        "--fsdp: shards are of whole float32 weights; leave out --load-in-4bit and --load-in-8bit": o["fsdp"]
        and quantized,
        "--ref-model {ref_model}: --loss {loss} reads no reference; leave it out": o["ref_model"]
        and objective
        and not objective.reference,
        "--fsdp: shards a model that is trained in full; leave it out with --lora-rank or --ref-model": o["fsdp"]
        and (lora or (trains and o["ref_model"])),
        f"{', '.join(unused)}: no adapter is trained; add --lora-rank, for example 16, or leave it out": unused,
        "--memory {memory}: an adapter's weights are few and stay float32, and its base is not trained and takes 2 "
        "bytes per parameter on CUDA; use full": lora and o["memory"] not in ("auto", "full"),
        "--memory in-backward: no gradient is there long enough to be clipped; set --max-grad-norm 0": o["memory"]
        == "in-backward"
        and o["max_grad_norm"],
        "--export-dtype {export_dtype}: an adapter is written in float32, in which it is trained; dpo merge writes the "
        "whole model in another": lora and o["export_dtype"] != "float32",
        "--lora-type dora: its norms would be computed in bfloat16 over a quantized base; use lora or rslora": lora
        and quantized
        and o["lora_type"] == "dora",
        "--eval-data and --eval-fraction: give one of them": o["eval_data"] and o["eval_fraction"] and not sweeps,
        "--eval-steps, --show-answers and --save-best need held-out pairs: --eval-data or --eval-fraction": (
            (o["eval_steps"] or o["show_answers"] or o["save_best"]) and not held_out
        ),
        "--show-answers: a model in shards does not answer while it trains; use dpo eval --samples": o["fsdp"]
        and o["show_answers"],
        "--eval-data is missing: a sweep compares its runs on held-out rows": sweeps and not o["eval_data"],
        "--eval-fraction: a sweep compares its runs on --eval-data; leave it out": sweeps and o["eval_fraction"],
        "--loss {loss}: reads no beta, so there is nothing to compare": sweeps
        and objective
        and not objective.uses("beta"),
    }
    return [text.format_map(o) for text, refuse in table.items() if refuse]
