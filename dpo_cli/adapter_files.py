"""Adapters on disk, as peft has them: read, attached with their weights, saved, merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.adapters import attach
from dpo_cli.errors import DpoError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # what peft puts before the names of a model's modules
# Ways to begin an adapter that leave its base as it is; others take something out of it.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
# What its configuration holds beside what it computes.
NOT_COMPUTED = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "task_type",
    "inference_mode",
    "init_lora_weights",
)


def read_config(folder: Path) -> Any:
    """The ``peft.LoraConfig`` of an adapter whose training can go on.

    Raises:
        ValueError: it is of another kind, or cannot be read.
    """
    from peft import LoraConfig, PeftConfig

    if json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type") != "LORA":
        raise ValueError("it is no LoRA adapter, and others are not trained here")
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    if config.init_lora_weights not in HARMLESS:
        raise ValueError(f"it began as {config.init_lora_weights}, which changes its base; merge it with dpo merge")
    config.lora_dropout, config.inference_mode = 0.0, False
    return config


def settings(config: Any) -> dict[str, Any]:
    """A ``peft.LoraConfig`` as options; targets that are no list of names are None."""
    names = {"lora_targets": config.target_modules, "modules_to_save": config.modules_to_save}
    lists = {o: ",".join(sorted(of)) if isinstance(of, (list, set)) else None for o, of in names.items()}
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    return {"lora_rank": config.r, "lora_kind": kind, "lora_alpha": config.lora_alpha, **lists}


def attach_saved(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Put an adapter into a model, in place, with the weights it was saved with; ``base`` finds the model again.

    Raises:
        ValueError, DpoError: it is not of this model, or of a kind that is not trained here.
    """
    config = read_config(folder)
    config.base_model_name_or_path = base
    attach(model, config)
    put_adapter(model, folder)


def put_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give an attached adapter the weights of a folder.

    Raises:
        DpoError: they are of another adapter.
    """
    from peft import set_peft_model_state_dict

    saved, own = load_file(folder / WEIGHTS), adapter_weights(model)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in own.items()}:
        odd = sorted(saved.keys() ^ own.keys()) or [n for n in saved if saved[n].shape != own[n].shape]
        raise DpoError(f"{folder} is an adapter of another model or of other modules: {odd[0]}")
    set_peft_model_state_dict(model, {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()})


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is trained of a model, under the names that it has in an adapter's file."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {PREFIX + name: tensor.detach().contiguous() for name, tensor in found.items()}


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter, its weights and its configuration, as peft does."""
    (folder / CONFIG).write_text(json.dumps(_plain(model) | {"inference_mode": True}, indent=2) + "\n")
    weights, seen = adapter_weights(model), set[int]()
    for name, tensor in weights.items():
        weights[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # tied ones are there twice, as of peft
        seen.add(tensor.data_ptr())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def described(model: PreTrainedModel) -> str:
    """All of an adapter's configuration that decides what it computes beside its weights.

    What is as peft has it by default is left out, so that a later peft's new fields change nothing.
    """
    from peft import LoraConfig

    usual = LoraConfig().to_dict() | {"r": None, "lora_alpha": None}  # which are always told
    told = {name: value for name, value in _plain(model).items() if name not in NOT_COMPUTED and value != usual[name]}
    return json.dumps(told, sort_keys=True)


def _plain(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's configuration as JSON has it: the same each time."""
    values = cast(Any, model).peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(values.items())}


@torch.no_grad()
def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with an adapter's weights added to its own.

    Raises:
        ValueError, Warning: the adapter is not of this model, or cannot be merged without changing what it computes.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
        adapted = PeftModel.from_pretrained(model, adapter)
    if not hasattr(adapted, "merge_and_unload"):
        raise ValueError("adapters of its kind cannot be merged; merge it by hand, or train one with LoRA")
    ids = torch.arange(16)[None] % model.config.get_text_config().vocab_size
    expected = adapted(input_ids=ids).logits
    whole: PreTrainedModel = adapted.merge_and_unload()
    whole.eval().requires_grad_(True)  # peft froze what is trained now
    off = float((whole(input_ids=ids).logits - expected).abs().max())
    if not off <= 1e-3 * float(expected.abs().max()):
        raise ValueError(f"merged into its base it computes something else (logits are off by {off:.2g})")
    return whole
