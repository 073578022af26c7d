"""What options may be: ranges of single options, and the combinations of options that are refused."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_cli.losses.divergences import DIVERGENCES, divergence
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import LOSSES
from dpo_cli.utils.errors import did_you_mean

GATE = re.compile(r"\s*([\w/.]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", re.ASCII)
# Numbers of an evaluation that --gate may name, by what they need; "/*" stands for both responses of a pair.
NUMBERS = {
    "": "pairs rows beta loss rewards/* rewards/margins rewards/accuracies rewards/ties logps/* ref_logps/* "
    "logp_accuracy/policy logp_accuracy/reference cross_entropy/* ref_cross_entropy/* perplexity/* ref_perplexity/* "
    "delta_kl_data/* rewards/margins_quantiles.0.05 rewards/margins_quantiles.0.25 rewards/margins_quantiles.0.5 "
    "rewards/margins_quantiles.0.75 rewards/margins_quantiles.0.95 length.margin_length_correlation "
    "length.accuracy_chosen_longer length.accuracy_chosen_longer_pairs length.accuracy_chosen_shorter "
    "length.accuracy_chosen_shorter_pairs length.accuracy_prefer_longer drift.fold drift.tokens drift.shifted "
    "drift.share judged.pairs judged.needed trained_on.pairs trained_on.prompts",
    "--kl exact": "kl/* reverse_kl/* entropy/* ref_entropy/* shifted_tokens/*",
    "--samples": "sequence_kl.token_kl sequence_kl.ended sequence_kl.prompts sequence_kl.samples "
    "sequence_kl.max_new_tokens",
    "--reward or --judge": "win_rate.share win_rate.ties win_rate.unclear win_rate.prompts win_rate.contests "
    "win_rate.policy_longer win_rate.policy_longer_contests win_rate.policy_shorter win_rate.policy_shorter_contests",
}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Check(NamedTuple):
    """The range of an option: a test of its value, and that test in words."""

    holds: Callable[[Any], bool]  # a ValueError counts as False
    must: str
    choices: tuple[str, ...] = ()


def one_of(*values: str) -> Check:
    """Check that a value is one of these words."""
    return Check(lambda v: v in values, "must be one of: " + ", ".join(values), values)


def numbers(text: str | float) -> list[float]:
    """Parse numbers separated by commas, lowest first."""
    return sorted(float(part) for part in str(text).split(","))


positive = Check(lambda v: math.isfinite(v) and v > 0, "must be greater than 0")
not_negative = Check(lambda v: math.isfinite(v) and v >= 0, "must be 0 or greater")
fraction = Check(lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
below_half = Check(lambda v: 0 <= v < 0.5, "must be at least 0 and less than 0.5")
probability = Check(lambda v: 0 <= v <= 1, "must be at least 0 and at most 1")
valid_seed = Check(lambda v: 0 <= v < 2**32, "must be at least 0 and less than 2^32")
at_least_16 = Check(lambda v: v >= 16, "must be at least 16 tokens")
precision = one_of("auto", "float32", "bfloat16")._replace(
    must="must be one of: auto, float32, bfloat16 (float16 overflows in training; a model stored in it can be used)"
)
device = Check(
    lambda v: bool(re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", v, re.ASCII)),
    "must be one of: auto, cuda, cuda:NUMBER, xpu, mps, cpu",
    ("auto", "cuda", "xpu", "mps", "cpu"),
)
losses = Check(
    lambda v: all(part.partition("=")[0].strip() in LOSSES for part in v.split(",")),
    f"must be one or more of {', '.join(LOSSES)}",
    tuple(LOSSES),
)
divergences = Check(
    lambda v: bool(divergence(v)),
    f"must be one of: {', '.join(DIVERGENCES)}, the last also with =ALPHA",
    tuple(DIVERGENCES),
)
several = Check(
    lambda v: all(map(positive.holds, numbers(v))) and len({f"{beta:g}" for beta in numbers(v)}) == len(numbers(v)),
    "must be different numbers greater than 0, separated by commas",
)
trackers = Check(
    lambda v: v == "none" or all(name.strip() in TRACKERS for name in v.split(",")),
    f"must be one or more of {', '.join(TRACKERS)}, separated by commas, or none",
    TRACKERS,
)
gates = Check(
    lambda v: all(map(GATE.fullmatch, v.split(","))),
    "must be conditions such as rewards/accuracies>=0.7, separated by commas, with >=, <=, > or <",
)
module_names = Check(
    lambda v: bool(re.fullmatch(r"[\w-]+(\.[\w-]+)*(,[\w-]+(\.[\w-]+)*)*", v, re.ASCII)),
    "must be names of modules, separated by commas, for example q_proj,v_proj",
)


def refused(options: Any) -> list[str]:
    """Return a message per contradiction between the options, with its remedy.

    Raises:
        UsageError: the loss cannot have the options that are given for it.
    """
    o = defaultdict(lambda: None, vars(options))  # None: the command has no such option, or it is not given
    trains, fsdp, lora = "lora_rank" in o, o["fsdp"], o["lora_rank"]
    sweeps = trains and "samples" in o
    objective = options.objective if trains else Objective()
    whole = objective.uses("ranking_sizes")
    ref, held_out = trains and o["ref_model"], o["eval_data"] or o["eval_fraction"]
    quantized = o["load_in_4bit"] or o["load_in_8bit"]
    of_adapters = ["lora_type", "lora_alpha", "lora_targets", "modules_to_save"]
    of_adapters += ["load_in_4bit", "load_in_8bit", "export"]
    unused = ", ".join(f"--{name.replace('_', '-')}" for name in of_adapters if trains and not lora and o[name])
    reads_held_out = o["eval_steps"] or o["show_answers"] or o["save_best"]
    in_full, merged = o["memory"] in (None, "auto", "full"), o["export"] == "merged"
    stored = lora and not merged and o["export_dtype"] != "float32"
    clips = o["memory"] == "in-backward" and o["max_grad_norm"]
    table = [
        (o["load_in_4bit"] and o["load_in_8bit"], "--load-in-4bit, --load-in-8bit: a base is quantized once"),
        (ref and not objective.reference, "--ref-model {ref_model}: --loss {loss} reads no reference; leave it out"),
        (
            whole and o["pairs"] not in (None, "ranking"),
            "--pairs {pairs}: --loss {loss} reads whole rankings; leave it out",
        ),
        (
            whole and (o["wpo"] or o["ld_alpha"] is not None),
            "--wpo, --ld-alpha: weigh pairs, not rankings; leave them out",
        ),
        (fsdp and (lora or ref), "--fsdp: shards a model that is trained in full; not with --lora-rank, --ref-model"),
        (fsdp and o["show_answers"], "--show-answers: a model in shards does not answer; use dpo eval --samples"),
        (unused, f"{unused}: no adapter is trained; add --lora-rank, for example 16, or leave it out"),
        (lora and not in_full, "--memory {memory}: an adapter's weights are few and stay float32; use full"),
        (clips, "--memory in-backward: nothing can be clipped; set --max-grad-norm 0"),
        (
            o["min_lr"] and o["lr_scheduler"] == "constant",
            "--min-lr {min_lr}: --lr-scheduler constant does not decay; leave it out, or take linear or cosine",
        ),
        (o["min_lr"] and o["min_lr"] > numbers(o["lr"])[0], "--min-lr {min_lr}: must be at most --lr, which is {lr}"),
        (stored, "--export-dtype {export_dtype}: an adapter is float32; add --export merged"),
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
        (o["reward"] and o["judge"], "--reward and --judge: give one of them"),
        (o["judge_model"] and not o["judge"], "--judge-model: needs --judge, the address that offers it"),
        ((o["reward"] or o["judge"]) and not o["samples"], "--reward, --judge: need --samples, for example 1"),
        (
            sweeps and not held_out,
            "--eval-data is missing: a sweep compares its runs on held-out rows; or hold out some by --eval-fraction",
        ),
        (
            sweeps and not objective.uses("beta") and (o["beta"] or len(numbers(o["lr"])) < 2),
            "--loss {loss}: reads no beta, so there is nothing to compare but several --lr",
        ),
    ]
    return [text.format_map(o) for refuse, text in table if refuse] + (_unknown_numbers(o) if o["gate"] else [])


def _unknown_numbers(options: Mapping[str, Any]) -> list[str]:
    """Return a message per number of ``--gate`` that this evaluation will not have."""
    given = {
        "": True,
        "--kl exact": options["kl"] == "exact",
        "--samples": options["samples"],
        "--reward or --judge": options["reward"] or options["judge"],
    }
    names = [(name, need) for need, text in NUMBERS.items() for name in text.split()]
    needs = {name.replace("*", side): need for name, need in names for side in ("chosen", "rejected")}
    short = {part: name for name in reversed(needs) for part in re.split("[/.]", name)}  # as accuracies
    problems = []
    for name in (GATE.fullmatch(condition)[1] for condition in options["gate"].split(",")):  # type: ignore[index]
        number = re.sub(r"\.(low|high)$", "", name)  # the ends of its interval
        if number not in needs:
            problems.append(f"--gate {name}: no such number{did_you_mean(number, needs, short)}")
        elif not given[needs[number]]:
            problems.append(f"--gate {name}: needs {needs[number]}")
    return problems
