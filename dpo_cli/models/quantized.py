"""Checkpoints whose weights are stored packed: dequantized, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from dpo_cli.models.adapters import is_quantized
from dpo_cli.models.locate import ModelSource
from dpo_cli.utils.errors import UsageError

KEY = "quantization_config"
BITS = "bitsandbytes"
METHODS = {"mxfp4": "MXFP4", "fp8": "FP8", "mxfp8": "MXFP8", BITS: BITS}  # dequantized on every device
SCALES = ("_scale_inv", ".weight_scale", ".SCB")  # without them 8-bit weights have other values


def packing_of(source: ModelSource) -> Mapping[str, Any] | None:
    """The quantization config of a model; None where it has none, or the configuration cannot be read."""
    if source.gguf:
        return None
    try:
        config = PretrainedConfig.get_config_dict(**source.arguments())[0]
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # text_config among them
    except Exception:  # any error of a malformed folder; loading reports it
        return None
    packings = [part[KEY] for part in parts if part.get(KEY) is not None]
    packing = (packings[0] if isinstance(packings[0], dict) else {}) if packings else None
    if packing and (packing.get("load_in_4bit") is True or packing.get("load_in_8bit") is True):
        return {**packing, "quant_method": BITS}  # which its first versions did not name
    return packing


def admit(source: ModelSource, name: str | None, frozen: bool = False) -> ModelSource:
    """The source with how its weights are stored, where they are packed in a way that can be dequantized.

    ``frozen``: it is a reference, which is not trained.

    Raises:
        UsageError: they cannot be, saying which model to name instead.
    """
    if (packing := packing_of(source)) is None:
        return source
    method = packing.get("quant_method")
    if not isinstance(method, str):
        method = "in a way that its config.json does not name"
    stored = METHODS.get(method, method)
    whose = f"--model {name}: {f'its base {source.name}' if source.adapter else 'it'} is packed ({stored})"
    other = f"name {_made_from(source)}"
    if source.adapter:
        other = f"let its adapter_config.json {other}" if frozen else f"{other} with --base-model"
    if method not in METHODS:
        raise UsageError(f"{whose}, which is neither scored nor trained here; {other}")
    if method == BITS and not is_bitsandbytes_available():
        raise UsageError(f"{whose}, which needs the package {BITS} (pip install -U {BITS}); or {other}")
    try:
        AutoQuantizationConfig.from_dict(dict(packing))
        _check_blocks(source, packing.get("weight_block_size"))
    except Exception as error:  # any malformed content
        raise UsageError(f"{whose} and cannot be read ({' '.join(str(error).split())}); {other}") from error
    stored = f"{stored}, dequantized to float32"
    return replace(source, description=f"{source.description}, stored as {stored}", stored=stored)


def _made_from(source: ModelSource) -> str:
    """Describe the model with plain weights, by the model card, else by the configuration."""
    names: list[tuple[Any, str]] = []
    with suppress(Exception):  # no card, or a malformed one
        card = Path(source.path, "README.md") if Path(source.path).is_dir() else source.path
        base = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
        names.append((base[0] if isinstance(base, list) and base else base, "model card"))
    names.append((PretrainedConfig.get_config_dict(**source.arguments())[0].get("_name_or_path"), "config.json"))
    named = [f" ({where}: {name})" for name, where in names if isinstance(name, str) and name not in ("", source.path)]
    return "the model that it was made from" + (named[0] if named else "")


def _check_blocks(source: ModelSource, block: Sequence[int] | None) -> None:
    """Refuse FP8 weights whose size is no multiple of the block size: transformers would spread the scales evenly."""
    if not block:
        return
    if not Path(source.path).is_dir():
        snapshot_download(source.path, allow_patterns=["model*.safetensors"])  # which loading would do next
    shapes: dict[str, list[int]] = {}
    for file in source.folder().glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    for name, grid in shapes.items():
        shape = shapes.get(name.removesuffix("_scale_inv"), [])[-2:]
        sizes = zip(shape, grid[-2:], block, strict=False)
        if name.endswith("_scale_inv") and any(count > 1 and size != count * each for size, count, each in sizes):
            raise ValueError(f"{name}: its blocks of {block} do not divide a weight of {shape}")


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> None:
    """Make a model of packed weights that was just loaded, in place, as if it was never packed.

    Its weights are float32, and saved under plain names.

    Raises:
        ValueError: weights are not packed as the config says; bitsandbytes would have rounded them.
    """
    for name, module in model.named_modules():
        if hasattr(module, "quant_state") and getattr(module.weight, "quant_state", None) is None:
            raise ValueError(f"{name} is not packed, though its config.json says so: remove {KEY} there")
    if is_quantized(model):
        model.dequantize(torch.float32)
    model.float()
    vars(model)["_weight_conversions"] = None  # how its packed tensors were read, which saving would reverse
    for module in model.modules():
        for config in (module.config, module.config.get_text_config()) if isinstance(module, PreTrainedModel) else ():
            for name in (KEY, "base_model_tp_plan", "base_model_ep_plan"):  # plans for packed tensors, of its own
                vars(config).pop(name, None)
