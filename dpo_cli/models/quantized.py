"""Checkpoints whose weights are stored packed: dequantized, kept as the base of an adapter, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from dpo_cli.config.options import Options, TrainOptions
from dpo_cli.models.adapters import is_quantized
from dpo_cli.models.locate import ModelSource
from dpo_cli.utils.errors import UsageError

KEY = "quantization_config"
FOUR_BIT = "bitsandbytes_4bit"
# Those that transformers dequantizes on every device. The last two need bitsandbytes: an adapter goes over weights of 4
# bits as they are; those of 8 would compute otherwise in training, and otherwise beside other rows.
NAMES = {
    "mxfp4": "MXFP4",
    "fp8": "FP8",
    "mxfp8": "MXFP8",
    "bitsandbytes_8bit": "bitsandbytes 8 bit",
    FOUR_BIT: "bitsandbytes 4 bit",
}
SCALES = ("_scale_inv", ".weight_scale", ".SCB")  # without which weights of 8 bits are others


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's configuration says that its weights are packed."""

    method: str  # as transformers names it; empty where the configuration does not
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The method in words."""
        return NAMES.get(self.method, self.method or "in a way that its config.json does not name")

    def dequantizes(self, source: ModelSource) -> bool:
        """Whether the weights are dequantized on loading: always, or for an adapter that is merged into them."""
        return self.method != FOUR_BIT or (source.adapter is not None and not source.attached)

    def loading(self, config: PretrainedConfig, source: ModelSource) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` wants to load the weights so; in bfloat16 as ``--load-in-4bit``."""
        if "bitsandbytes" not in self.method:
            setattr(config, KEY, {**self.values, "dequantize": True})
            return {"config": config}
        on_gpu = torch.cuda.is_available() and not self.dequantizes(source)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        setattr(config, KEY, {**self.values, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")})
        device = torch.cuda.current_device() if on_gpu else "cpu"
        return {"config": config, "dtype": dtype, "device_map": {"": device}}


def packing_of(source: ModelSource) -> Packing | None:
    """How a model's weights are packed; None where they are not, or the configuration cannot be read."""
    if source.gguf:
        return None
    try:
        config = PretrainedConfig.get_config_dict(**source.arguments())[0]
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # text_config among them
    except Exception:  # whatever a folder from elsewhere raises; loading reports it
        return None
    found = [part[KEY] for part in parts if part.get(KEY) is not None]
    if not found:
        return None
    values = found[0] if isinstance(found[0], dict) else {}
    method = values.get("quant_method")
    for bits in ("4bit", "8bit"):
        if values.get(f"load_in_{bits}") is True:
            method = f"bitsandbytes_{bits}"
    return Packing(method if isinstance(method, str) else "", values)


def _made_from(source: ModelSource) -> str:
    """Describe the model with plain weights, by the model card."""
    base: Any = None
    with suppress(Exception):  # there is none, or whatever stands in it
        card = Path(source.path, "README.md") if Path(source.path).is_dir() else source.path
        base = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
    named = base[0] if isinstance(base, list) and base else base
    return "the model that it was made from" + (f" (model card: {named})" if isinstance(named, str) else "")


def admit(source: ModelSource, name: str | None, options: Options | None = None, frozen: bool = False) -> ModelSource:
    """The source with how its weights are stored, where they are packed in a way that serves what is asked for.

    ``options``: None of a merge. ``frozen``: it is a reference, which is not trained.

    Raises:
        UsageError: it does not, saying what does.
    """
    if not (packing := packing_of(source)):
        return source
    unpacked = _made_from(source)
    if not frozen and (quantize := getattr(options, "quantize", None)):
        raise UsageError(f"--load-in-{quantize}: {source.path} is packed already ({packing.name}); name {unpacked}")
    whose = f"--model {name}: {f'its base {source.name}' if source.adapter else 'it'} is packed ({packing.name})"
    other = f"name {unpacked}"
    if source.adapter:
        other = f"let its adapter_config.json name {unpacked}" if frozen else f"{other} with --base-model"
    if packing.method not in NAMES:
        raise UsageError(f"{whose}, which is neither scored nor trained here; {other}")
    if needs := [*_needs(packing, source, options, frozen)]:
        raise UsageError(f"{whose}, which needs {' and '.join(needs)}; or {other}")
    try:
        AutoQuantizationConfig.from_dict(dict(packing.values))
        _check_blocks(source, packing.values.get("weight_block_size"))
    except Exception as error:  # whatever stands in it
        raise UsageError(f"{whose} and cannot be read ({' '.join(str(error).split())}); {other}") from error
    stored = f"{packing.name}, dequantized to float32"
    if packing.method == FOUR_BIT:
        merges = options is None or getattr(options, "export", None) == "merged"
        stored = f"{stored} to merge" if merges else packing.name
    return replace(source, description=f"{source.description}, stored as {stored}", stored=stored)


def _needs(packing: Packing, source: ModelSource, options: Options | None, frozen: bool) -> Iterator[str]:
    """Unmet requirements for reading or training bitsandbytes weights."""
    if "bitsandbytes" in packing.method and not is_bitsandbytes_available():
        yield "the package bitsandbytes (pip install -U bitsandbytes)"
    if packing.method != FOUR_BIT:
        return
    if isinstance(options, TrainOptions) and not (frozen or options.lora_rank):
        own = "with the adapter's rank, or dpo merge first" if source.adapter else "16"
        yield f"an adapter to train (--lora-rank {own})"
    if getattr(options, "fsdp", False):
        yield "to be whole (leave out --fsdp)"
    if getattr(options, "lora_type", None) == "dora":
        yield "an adapter without norms of the base (--lora-type lora or rslora)"
    if torch.cuda.is_available() and getattr(options, "dtype", None) == "float32":
        yield "to compute in bfloat16 (leave out --dtype float32)"


def _check_blocks(source: ModelSource, block: Sequence[int] | None) -> None:
    """Refuse FP8 weights whose size is no multiple of the block size: transformers would spread the scales evenly.

    Raises:
        ValueError: naming the weight.
    """
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
def settle(model: PreTrainedModel, source: ModelSource, packing: Packing) -> None:
    """Make a model of packed weights that was just loaded, in place, what it is used as.

    A dequantized one is as if it was never packed: float32, and saved under plain names. In one that stays packed, what
    is not packed of it has the precision of ``Packing.loading``.

    Raises:
        ValueError: its weights are not packed as its configuration says, or would be dequantized wrongly.
    """
    if not packing.dequantizes(source):
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        for name, module in model.named_modules():  # those of bitsandbytes have the attribute
            if hasattr(module, "quant_state") and getattr(module.weight, "quant_state", None) is None:
                raise ValueError(
                    f"{name} is not packed, though its config.json says so: remove quantization_config there"
                )
        for parameter in model.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.data = parameter.to(dtype)
        return
    if is_quantized(model):
        model.dequantize(torch.float32)
    model.float()
    vars(model)["_weight_conversions"] = None  # how its packed tensors were read, which saving would reverse
    for module in model.modules():
        for config in (module.config, module.config.get_text_config()) if isinstance(module, PreTrainedModel) else ():
            for name in (KEY, "base_model_tp_plan", "base_model_ep_plan"):  # plans for packed tensors, of its own
                vars(config).pop(name, None)
