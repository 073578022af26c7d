"""`dpo init --from`: DPO configurations of TRL (and the alignment handbook), axolotl and LLaMA-Factory as ours."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpo_cli.config.checks import TRACKERS
from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import OTHER_NAMES, resolve, write_new, yaml_items
from dpo_cli.losses.preference import LOSSES
from dpo_cli.utils.errors import UsageError

Config = dict[str, Any]

# What each trains with where its file is silent, by our names.
HF = {"batch_size": 8, "epochs": 3, "lr_scheduler": "linear", "warmup_ratio": 0, "seed": 42}
DEFAULTS: dict[str, Config] = {
    "TRL": {**HF, "lr": 1e-6, "max_length": 1024},
    "axolotl": {
        "batch_size": 1,
        "epochs": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "max_length": 512,
        "seed": 42,
    },
    "LLaMA-Factory": {**HF, "lr": 5e-5, "max_length": 2048, "finetuning_type": "lora"},
}
# Keys by which a TRL file is of DPO, or is not; the trainer is not named in it.
OF_DPO = {"beta", "loss_type", "max_prompt_length", "precompute_ref_log_probs", "rpo_alpha", "label_smoothing"}
NOT_DPO = {"grpo": {"num_generations", "reward_funcs"}, "kto": {"desirable_weight", "undesirable_weight"}}
OTHERWISE = {"output", "trust_remote_code", "fsdp", "dtype", "chat_template"}  # ours, which mean something else there
# Why a key has no counterpart: the first pattern that it matches.
REASONS = {
    r".*packing|.*padding_free|pad_to.*|flash.*|attn.*|sdp.*|xformers.*|.*liger.*|group_by.*": "rows are packed always",
    r"deepspeed|fsdp.*|accelerator.*|ddp.*|.*parallel_size|dp_.*|plugins": "see --memory and --fsdp",
    r"bf16|fp16|tf32|(torch_)?dtype|pure_bf16": "see --dtype; by default it is what the device has",
    r"precompute_ref.*|ref_.*batch_size|disable_dropout": "the reference is scored once and cached, without dropout",
    r"lora_dropout": "there is no dropout: the policy must begin as its reference",
    r"optim(izer)?": "the optimizer is AdamW; --memory split keeps its moments in 8 bits",
    r"wandb.*|swanlab.*|mlflow.*|hub_.*|push_to_hub|run_name": "see --report-to and dpo push",
    r"max_prompt_length|max_completion_length|truncation_mode": "the prompt is shortened first, to a quarter at most",
    r"chat_template|template|special_tokens|tokenizer.*|model_type|eot_tokens": "the model brings its template",
    r"warmup_steps": "the warm-up is a share of the steps, --warmup-ratio",
    r"trust_remote_\w+": "it runs foreign code, so give --trust-remote-code yourself",
    r"output": "see --output",
    r"(\w+_strategy)|(save|eval)s_per_epoch|(save|eval)_steps": "not carried over; see --save-steps and --eval-steps",
    r"max_samples|test_split_size": "make a smaller file, or see --max-steps",
    r"do_\w+|\w*(num_proc|workers)|log\w*|plot_\w+|overwrite_\w+|save_only_model|\w*eval_batch_size|resume\w*|"
    r"dataset_prepared_path|remove_unused_columns|gradient_checkpointing_kwargs|dataloader\w*": "not needed",
}


def import_config(source: Path, file: Path, devices: int = 1, data: Sequence[str] = (), force: bool = False) -> Config:
    """Write another trainer's configuration as a file for `dpo train`, which says where each value is from.

    ``devices``: how many train there, each with a batch of its own. ``data``: instead of the data sets named there.
    Returns the trainer and, by key, why others are left out or what they mean.

    Raises:
        UsageError: it is no configuration of DPO for one of these trainers, or ``file`` exists.
        NotWrittenError: it cannot be written.
    """
    import yaml

    theirs = {key: value for key, value, _ in yaml_items(source, "--from") if value is not None}
    peer, left = _peer(source, theirs), Config()
    try:
        options, origin = _translate(peer, theirs, devices, left)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--from {source}: a value cannot be read: {error}") from error
    if data:
        options["data"], origin["data"] = [*data], "--data"
        left.pop("dataset", None)
    resolved = resolve(TrainOptions, options)
    entries = [f"# From {source.name}, a configuration of {peer}, for dpo train --config {file}\n"]
    for name in options:
        value = yaml.safe_dump({name: getattr(resolved, name)}, allow_unicode=True)
        entries.append(f"# {origin.get(name, f'default of {peer}')}\n{value}")
    if left:
        lines = "".join(f"#   {key}: {' '.join(why.split())}\n" for key, why in left.items())
        entries.append(f"# Left out, or of another meaning there:\n{lines}")
    write_new(file, "\n".join(entries), force)
    return {"config": str(file), "from": peer, "left_out": left}


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result of ``import_config``: a line per key that is left out."""
    lines = [f"{key}: {why}" for key, why in result["left_out"].items()]
    head = [f"left out of a configuration of {result['from']}, or of another meaning there:"] if lines else []
    then = f"{result['config']} is written. Look it over, then: dpo train --config {result['config']}"
    return "\n".join([*head, *(f"  {line}" for line in lines), then])


def _peer(file: Path, theirs: Config) -> str:
    """Identify the trainer by its keys, and refuse what is not DPO."""
    if "base_model" in theirs:
        peer, kind = "axolotl", theirs.get("rl", "sft")
    elif theirs.keys() & {"stage", "finetuning_type", "cutoff_len", "pref_loss"}:
        peer, kind = "LLaMA-Factory", theirs.get("stage", "sft")
    elif "model_name_or_path" in theirs:
        peer, kind = "TRL", next((kind for kind, keys in NOT_DPO.items() if theirs.keys() & keys), "dpo")
        if kind == "dpo" and not theirs.keys() & OF_DPO:
            raise UsageError(f"--from {file}: nothing in it is of DPO alone; if it is of DPO, add beta: 0.1")
    else:
        raise UsageError(f"--from {file}: not recognised as a configuration of TRL, axolotl or LLaMA-Factory")
    if kind not in ("dpo", "ipo", "simpo", "orpo"):
        raise UsageError(f"--from {file}: trains {str(kind).upper()}; dpo trains on preference pairs alone")
    if (adapter := theirs.get("finetuning_type", "lora")) not in ("lora", "full"):
        raise UsageError(f"--from {file}: finetuning_type {adapter}: there are lora and full")
    return peer


def _translate(peer: str, theirs: Config, devices: int, left: Config) -> tuple[Config, dict[str, str]]:
    """Return our options and their origin; ``left`` gets the keys that have none, and what means something else."""
    config = DEFAULTS[peer] | {OTHER_NAMES.get(key, key): value for key, value in theirs.items()}
    origin = {OTHER_NAMES.get(key, key): f"{key} there" for key in theirs}
    batch, several, passes = config["batch_size"], config.pop("gradient_accumulation_steps", 1), float(config["epochs"])
    origin["batch_size"] = f"{batch} per device x {several} accumulated x {devices} devices"
    config |= {"batch_size": int(batch) * int(several) * devices, "epochs": max(1, round(passes))}
    if passes != round(passes):
        left["epochs"] = f"{passes:g}: passes are whole here; see --max-steps"
    if int(config.get("max_steps", 1)) < 1:
        del config["max_steps"]
    if peer == "TRL" and "loss_type" not in theirs:
        left["loss_type"] = "not named, so it is taken as DPO; files of TRL's ORPO and CPO look alike"
    _data(peer, config, left)
    _loss(config)
    _adapter(peer, config, left)
    _schedule(config, left)
    report = config.pop("report_to", [])
    if trackers := [name for name in ([report] if isinstance(report, str) else report) if name in TRACKERS]:
        config["report_to"] = trackers
    names = {f.name for f in fields(TrainOptions)} - OTHERWISE
    names -= {name for name in ("save_steps", "eval_steps") if not isinstance(config.get(name), int)}  # parts of a run
    if "eval_steps" in names & config.keys() and not config.keys() & {"eval_data", "eval_fraction"}:
        left["eval_steps"] = f"{config.pop('eval_steps')}: no held-out data are named there; add --eval-fraction 0.1"
    for name in config.keys() - names:
        why = next((why for pattern, why in REASONS.items() if re.fullmatch(pattern, name)), "no counterpart")
        left[origin.get(name, name).removesuffix(" there")] = f"{reprlib.repr(config[name])}: {why}"
    return {name: value for name, value in config.items() if name in names}, origin


def _data(peer: str, config: Config, left: Config) -> None:
    """Name the data sets as --data does; a part of a data set is no share of a mixture."""
    take, data = config.pop, config.get("data", [])
    names, listed = (data.split(","), []) if isinstance(data, str) else ([], data)
    if peer == "LLaMA-Factory":
        left["dataset"] = f"{data}: of their dataset_info.json; put files or hub ids there in data"
    splits = take("dataset_splits", None) or [take("dataset_train_split", None), take("dataset_test_split", None)]
    mixture, mixer = take("dataset_mixture", {}), take("dataset_mixer", {})
    about = {"name": take("dataset_config", None)}
    named = [about | {"path": name.strip(), "weight": mixer.get(name, 1)} for name in (*names, *mixer)]
    sets = [each | {"split": splits[0]} for each in named] + listed + mixture.get("datasets", [])
    held_out = [each | {"split": split} for each in named for split in splits[1:] if split] + take("test_datasets", [])
    if held_out:
        config["eval_data"] = [_name(each) for each in held_out]
    if size := mixture.get("test_split_size"):
        config["eval_fraction" if size < 1 else "test_split_size"] = size
    if (part := float(config.get("eval_fraction", 0))) >= 1:
        left["val_size"] = f"{part:g}: --eval-fraction is a share"
    if not 0 < part < 1:
        config.pop("eval_fraction", None)
    for each in sets:
        if each.get("weight", 1) != 1:
            other = "there a part of that data set is used; a share, as in NAME=0.7, is of the mixture"
            left[f"weight of {_name(each)}"] = f"{each['weight']}: {other}"
        if each.keys() & {"type", "columns"}:
            left[f"type of {_name(each)}"] = "its columns decide the format; see dpo explain, --columns"
    config["data"] = [_name(each) for each in sets]


def _name(each: Config) -> str:
    """Write a data set as NAME, NAME:SPLIT or NAME:CONFIG/SPLIT."""
    path, config, split = each.get("path", each.get("id")), each.get("name", each.get("config")), each.get("split")
    inner = f"{config}/{split or 'train'}" if config not in (None, "default") else split
    return f"{path}:{inner}" if inner else str(path)


def _loss(config: Config) -> None:
    """Name the loss with what is added to it, its options, and beta."""
    take = config.pop
    kind = take("rl", "dpo")
    take("stage", None)
    named = take("loss", "sigmoid" if kind == "dpo" else kind)
    names = [named] if isinstance(named, str) else named
    weights = dict(zip(names, take("loss_weights", [1] * len(names)), strict=False))
    if unknown := [name for name in names if name not in LOSSES]:
        raise UsageError(f"--from: the loss {', '.join(unknown)} is none of dpo losses")
    added = [take(key) for key in ("rpo_alpha", "pref_ftx", "cpo_alpha") if key in config]
    if sft := added[0] if added else kind == "simpo":  # as TRL's CPO trainer, which axolotl takes, adds it
        weights["sft"] = float(sft)
    if "simpo_gamma" in config:
        config["loss_options"] = {"simpo_gamma": take("simpo_gamma")}
    config |= {name: value for name, value in take("trl", {}).items() if name == "beta"}
    config["loss"] = names[0] if len(weights) == 1 else weights


def _adapter(peer: str, config: Config, left: Config) -> None:
    """Name the kind of adapter, and fill in what each trainer takes by default; full training has none."""
    take = config.pop
    kind = take("adapter", None) or take("finetuning_type", None) or ("lora" if take("use_peft", False) else None)
    special = [key.rpartition("use_")[2] for key in [*config] if key.endswith(("use_rslora", "use_dora")) and take(key)]
    if take("quantization_bit", None):
        config["load_in_4bit"] = True
    if kind in (None, "full"):
        unused = [key for key in config if key.startswith("lora_")]
        left |= {key: f"{take(key)!r}: no adapter is trained there" for key in unused}
        return
    usual = {"lora_rank": 16, "lora_alpha": 32} if peer == "TRL" else {"lora_rank": 8}
    config |= {key: value for key, value in usual.items() if key not in config}
    if take("lora_target_linear", False) or config.get("lora_targets") in ("all", "all-linear"):
        take("lora_targets", None)  # our default
    if special:
        config["lora_type"] = special[0]


def _schedule(config: Config, left: Config) -> None:
    """Name the schedule, and the learning rate at which it ends."""
    name, more = str(config["lr_scheduler"]), config.pop("lr_scheduler_kwargs", {})
    ours = {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"}.get(name, name)
    if ours not in ("linear", "cosine", "constant"):
        left["lr_scheduler"] = f"{name}: there are linear, cosine and constant"
        ours = "linear"
    config["lr_scheduler"] = ours
    rate = more.get("min_lr_rate", config.pop("cosine_min_lr_ratio", 0))
    if least := more.get("min_lr") or float(rate) * float(config.get("lr", 0)):
        config["min_lr"] = least
