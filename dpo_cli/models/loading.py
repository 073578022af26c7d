"""Load policy and tokenizer, adapters merged or attached, choose the precision."""

from __future__ import annotations

import gc
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from dpo_cli.models import adapter_files
from dpo_cli.models.adapters import is_tied
from dpo_cli.models.locate import DEFAULT_MODEL, WEIGHTS, WITHOUT_HUB, ModelSource
from dpo_cli.models.parallel import shard_like
from dpo_cli.models.quantized import BITS, SCALES, dequantize, packing_of
from dpo_cli.utils.devices import DeviceKind, device_kind, empty_cache
from dpo_cli.utils.errors import DpoError, UsageError

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of images, sound
COMPUTED = re.compile(r"inv_freq|position_ids|masked_bias|attn\.bias$")  # buffers that old checkpoints hold


def _reason(error: Exception) -> str:
    if config := re.search(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'> for .*CausalLM", str(error)):
        return (
            f"it is no causal language model ({config[1]}): encoder-decoders, and models of images or sound whose "
            "language model transformers does not give alone, cannot be trained here"
        )
    if "trust_remote_code" in str(error):
        return "it brings Python code that would have to be run; if you trust it, add --trust-remote-code"
    kind = "" if isinstance(error, DpoError) else f"{type(error).__name__}: "
    return kind + re.sub(r"\x1b\[[\d;]*m|\t", "", str(error))


def load_tokenizer(source: ModelSource) -> Any:
    """Load the model's tokenizer, with its chat template."""
    own = {"pretrained_model_name_or_path": source.tokenizer, "trust_remote_code": source.trust}
    arguments = own if source.tokenizer else source.arguments()
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    except Exception as error:  # a malformed folder can make the library raise any error
        remedy = f"\n{WITHOUT_HUB}" if source.path == DEFAULT_MODEL else ""
        raise UsageError(f"--model {source.path}: its tokenizer cannot be loaded\n{_reason(error)}{remedy}") from error
    if source.gguf and "gguf_file" in arguments:
        _restore_digits(tokenizer, Path(source.path, source.gguf))
    return tokenizer


def _restore_digits(tokenizer: Any, file: Path) -> None:
    """Split digits one by one where the GGUF says the original did.

    transformers builds a plain byte-level pre-tokenizer from a GGUF and drops the kind that the file names.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    kind = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if kind and kind.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load the model with float32 weights, on the CPU, in evaluation mode, or quantized and on its device.

    Of a source without weights its shapes alone, which a trace fills with fake tensors; adapters are left out.

    Raises:
        UsageError: no such model, or its weights cannot be read.
    """
    name: str | Path | None = source.path
    remedy = f"\nIt is the base of {source.adapter}; --base-model names another" if source.adapter else ""
    try:
        model = _from_pretrained(source) if source.weights else _from_config(source)
        name, remedy = source.checkpoint or source.adapter, ""
        model = _completed(model, source) if source.weights else model
    except UsageError:
        raise
    except Exception as error:  # a malformed folder can make the libraries raise any error
        raise UsageError(f"--model {name}: cannot be loaded\n{_reason(error)}{remedy}") from error
    if is_multimodal(model) and not source.attached:  # text passes through its decoder, embeddings and head
        parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        read = {id(p) for part in parts if part is not None for p in part.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in read)
    for tensor in (*model.parameters(), *model.buffers()) if not source.quantize else ():
        tensor.data = tensor.data.clone()  # it may lie in the file's own memory, which others can write to
    _disable_dropout(model)
    model.eval()
    return model


def declared_class(config: PretrainedConfig) -> Any:
    """Return the auto class of the architecture that a checkpoint declares, multimodal or text only.

    Raises:
        ValueError: it is an encoder-decoder.
    """
    if config.is_encoder_decoder:  # its decoder alone would load, and no longer report that it is one
        raise ValueError("it is an encoder-decoder, and no causal language model")
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    return AutoModelForMultimodalLM if multimodal in (config.architectures or ()) else AutoModelForCausalLM


def load_exported(folder: Path, trust: bool, beside: Collection[str] = ()) -> PreTrainedModel:
    """Load the model of a folder in the class that its config declares, with float32 weights.

    Raises:
        ValueError: its weights, but for those named ``beside``, are not those of the class, or something else fails.
    """
    source = ModelSource(str(folder), "", "", trust=trust)
    try:
        if packing_of(source) is not None:
            raise ValueError("its config says that it is quantized")
        model = _from_pretrained(source)
    except Exception as error:  # of any type that the libraries raise
        raise ValueError(_reason(error)) from error
    if odd := [name for name in cast(Any, model).not_loaded if name not in beside]:
        raise ValueError(f"nothing reads its weights {', '.join(odd[:5])}")
    return model


def _from_pretrained(source: ModelSource) -> PreTrainedModel:
    """Load the model with transformers, in evaluation mode, without adapter and checkpoint; raises what it raises."""
    arguments, packing = source.arguments() | {"dtype": torch.float32}, packing_of(source)
    if "gguf_file" in arguments:  # packed blocks could be neither trained nor saved
        auto: Any = AutoModelForCausalLM
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
        config = AutoConfig.from_pretrained(**source.arguments())
        auto = declared_class(config)
        if source.quantize:
            # NormalFloat with its scales quantized too (arXiv 2305.14314), or LLM.int8() (2208.07339)
            bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            bits = {"load_in_8bit": True} if source.quantize == "8bit" else bits
            device = torch.device("cuda", torch.cuda.current_device())
            dtype = device_kind(device).dtypes[0]
            arguments["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
            arguments |= {"device_map": {"": device}, "dtype": dtype}
        if packing is not None:  # read so that it can be dequantized
            config.quantization_config = {**packing, "dequantize": True}
            on_cpu = {"device_map": {"": "cpu"}} if packing.get("quant_method") == BITS else {}
            arguments |= {"config": config} | on_cpu
    model: Any
    model, loaded = auto.from_pretrained(**arguments, output_loading_info=True)
    model.eval()
    if missing := sorted(loaded["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"it has no weights for {', '.join(missing[:5])}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("it is an adapter on the hub; download it and name its folder")
    if scales := sorted(name for name in loaded["unexpected_keys"] if name.endswith(SCALES)):
        raise ValueError(f"its weights are packed, and nothing reads {scales[0]}; name the model that it was made from")
    if packing is not None:
        dequantize(model)
    if not is_tied(model):  # whatever the config says: a class that believes it would overwrite one of two matrices
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.not_loaded = {} if source.gguf else _not_loaded(model, source, loaded["unexpected_keys"])
    if is_multimodal(model):
        files = (cached_file(source.path, f, _raise_exceptions_for_missing_entries=False) for f in PROCESSORS)
        model.processors = [Path(file) for file in files if file]
    return cast(PreTrainedModel, model)


def _from_config(source: ModelSource) -> PreTrainedModel:
    """Make the model of a configuration, whose weights have no values under a trace's fake tensors."""
    config = AutoConfig.from_pretrained(**source.arguments())
    auto = declared_class(config)
    vars(config).pop("quantization_config", None)  # packed weights are dequantized before they are trained
    return cast(PreTrainedModel, auto.from_config(config, dtype=torch.float32, trust_remote_code=source.trust))


def _not_loaded(model: PreTrainedModel, source: ModelSource, unexpected: set[str]) -> dict[str, Path | None]:
    """Return tensors of a checkpoint that its model does not have, and their files, None if there is none."""
    stored = dict[str, Path]()
    for file in source.folder().glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= dict.fromkeys(tensors.keys(), file)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = unexpected | {name for name in stored if any(re.search(pattern, name) for pattern in ignored)}
    return {name: stored.get(name) for name in sorted(names - model.state_dict().keys()) if not COMPUTED.search(name)}


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether a model reads images or sound too."""
    return type(model).__name__ == MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(model.config.model_type)


@torch.no_grad()
def put_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        DpoError: it is a checkpoint of another model.
    """
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / WEIGHTS, framework="pt") as weights:
        if set(weights.keys()) != parameters.keys():
            raise DpoError(f"{checkpoint} is a checkpoint of another model: its parameters have other names")
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights.get_tensor(name), parameter))


def _completed(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Add the adapter or the checkpoint that the source names, and the adapter's generation config."""
    if source.adapter:
        tokens, of_base = _tokens(source), _tokens(replace(source, tokenizer=None))
        adapter_files.fit_vocabulary(model, source.adapter, tokens if tokens > of_base else 0)
        if source.attached:
            adapter_files.attach_saved(model, source.adapter, source.name)
        else:
            model = adapter_files.merged(model, source.adapter)
        if (source.adapter / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.adapter)
    if source.checkpoint and source.checkpoint != source.adapter:
        put_weights(model, source.checkpoint)
    return model


def _tokens(source: ModelSource) -> int:
    """Count the ids of a model's tokenizer; 0 if it cannot be loaded."""
    with suppress(UsageError):
        return int(max(load_tokenizer(source).get_vocab().values(), default=-1)) + 1
    return 0


def release(model: nn.Module) -> None:
    """Free the memory of a model's weights, even if the model is still referenced."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def free_memory() -> None:
    """Free the memory of unreferenced models and optimizers, which are parts of cycles."""
    gc.collect()
    empty_cache()


def _disable_dropout(model: nn.Module) -> None:
    """Turn dropout and a router's jitter off for good: with them a policy would not be the reference at the start.

    Source: the DPO authors do so.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or name == "jitter_noise") and isinstance(value, float):
                setattr(module, name, 0.0)


# ---- precision --------------------------------------------------------------------------------------------------


def compute_dtype(name: str | None, kind: DeviceKind, halved: bool = False) -> torch.dtype:
    """Return the compute precision; ``auto``: bfloat16 for ``halved`` weights, else the first that the device has.

    Raises:
        UsageError: the device does not compute in it.
    """
    dtype = torch.bfloat16 if halved else kind.dtypes[0]
    if name not in (None, "auto"):
        dtype = cast(torch.dtype, getattr(torch, name))
    if dtype not in kind.dtypes:
        option = "--memory split" if name in (None, "auto") else f"--dtype {name}"
        raise UsageError(f"{option}: {kind.name} does not compute in {dtype_name(dtype)}; change it, or the --device")
    return dtype


def export_dtype(name: str, source: ModelSource) -> torch.dtype:
    """Return the precision of exported weights; ``auto``: that in which the start model is stored."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    config = AutoConfig.from_pretrained(**source.arguments())
    stored = config.dtype or config.get_text_config().dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the option's word for a precision."""
    return str(dtype).removeprefix("torch.")
