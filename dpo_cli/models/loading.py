"""Load policy and tokenizer, adapters merged or attached, and say how the model's forward may be laid out."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from dpo_cli.data.batching import Layout, probe_pairs, row_costs
from dpo_cli.data.collate import MicroBatch, collate, padded
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.models import adapter_files
from dpo_cli.models.adapters import is_tied
from dpo_cli.models.attention import PREFIX_SHARED, UnsupportedAttentionError, attention
from dpo_cli.models.locate import DEFAULT_MODEL, WEIGHTS, WITHOUT_HUB, ModelSource, gguf_value
from dpo_cli.models.logprobs import body_states, forward_errors, token_logps
from dpo_cli.models.moe import auxiliary_loss, routed
from dpo_cli.models.quantized import SCALES, packing_of, settle
from dpo_cli.models.sharding import shard_like
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


def count_parameters(source: ModelSource) -> int | None:
    """Number of parameters, from the configuration; None where it cannot be derived, or of an unconverted GGUF."""
    if source.gguf and not source.converted:
        return None
    try:
        return int(_without_weights(source).num_parameters())
    except Exception:  # of any kind; only an estimate needs it
        return None


def _without_weights(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device, by its configuration."""
    arguments = source.arguments() if not source.converted else {"pretrained_model_name_or_path": source.converted}
    config = AutoConfig.from_pretrained(**arguments)
    with torch.device("meta"):
        model: PreTrainedModel = declared_class(config).from_config(config, trust_remote_code=source.trust)
    return model


def with_vocabulary(source: ModelSource) -> ModelSource:
    """An adapter's source with the tokens that its base is to get, where the adapter was trained with others.

    Raises:
        UsageError: peft cannot compute the adapter, or nothing says what new tokens' weights are.
    """
    if source.adapter is None:
        return source
    adapter_files.read_config(source.adapter)
    try:
        base = _without_weights(source)
    except Exception:  # of any kind; loading the model reports it
        return source
    rows = cast(nn.Embedding, base.get_input_embeddings()).weight.shape[0]
    own = _tokens(source)
    if own > rows and own <= _tokens(replace(source, tokenizer=None)):  # of no use to the base either
        own = 0
    wanted = adapter_files.vocabulary(base, source.adapter, own)
    return replace(source, tokens=wanted) if wanted != rows else source


def _tokens(source: ModelSource) -> int:
    """Ids that a model's tokenizer gives; 0 of one that cannot be loaded."""
    try:
        return int(max(load_tokenizer(source).get_vocab().values(), default=-1)) + 1
    except UsageError:
        return 0


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, chat template included."""
    arguments = source.arguments()
    if own := source.tokenizer or source.converted:
        arguments = {"pretrained_model_name_or_path": own, "trust_remote_code": source.trust}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
    except Exception as error:  # whatever a folder from elsewhere makes the library raise
        told = f"--model {source.path}: its tokenizer cannot be loaded\n{_reason(error)}"
        raise UsageError(told + (f"\n{WITHOUT_HUB}" if source.path == DEFAULT_MODEL else "")) from error
    if source.gguf and not own:
        _restore_digits(tokenizer, Path(source.path, source.gguf))
    return tokenizer


def _restore_digits(tokenizer: Any, file: Path) -> None:
    """Split digits one by one where the GGUF says the original did.

    transformers builds a plain byte-level pre-tokenizer from a GGUF and drops the kind that the file names.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if gguf_value(file, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )


def load_model(source: ModelSource) -> PreTrainedModel:
    """The model with float32 weights, on the CPU, in evaluation mode.

    A quantized one, on its device, where ``source.quantize`` asks for it or an adapter goes over a packed base.

    Raises:
        UsageError: no such model, or its weights cannot be read.
    """
    try:
        model = _from_pretrained(source)
    except Exception as error:  # whatever a folder from elsewhere makes the libraries raise
        base = f"\nIt is the base of {source.adapter}; --base-model names another" if source.adapter else ""
        raise UsageError(f"--model {source.path}: cannot be loaded\n{_reason(error)}{base}") from error
    try:
        model = _completed(model, source)
    except UsageError:
        raise
    except Exception as error:  # the same of an adapter's or a checkpoint's
        raise UsageError(
            f"--model {source.checkpoint or source.adapter}: cannot be loaded\n{_reason(error)}"
        ) from error
    if not source.attached:
        freeze_unread(model)
    for tensor in (*model.parameters(), *model.buffers()) if not source.quantize else ():
        tensor.data = tensor.data.clone()  # it may lie in the file's own memory, which others can write to
    _disable_dropout(model)
    model.eval()
    return model


def declared_class(config: PretrainedConfig) -> Any:
    """The auto class of the architecture that a checkpoint declares: one that reads images or sound too, if it does."""
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    return AutoModelForMultimodalLM if multimodal in (config.architectures or ()) else AutoModelForCausalLM


def load_exported(folder: Path, trust: bool, beside: Collection[str] = ()) -> PreTrainedModel:
    """The model of a folder in the class that its config declares, with float32 weights.

    Raises:
        ValueError: its weights, but for those named ``beside``, are not those of the class, or something else fails.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        if getattr(config, "quantization_config", None):
            raise ValueError("its config says that it is quantized")
        arguments = {"dtype": torch.float32, "trust_remote_code": trust, "use_safetensors": True}
        loaded: Any = declared_class(config).from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:  # of whatever type the libraries raise
        raise ValueError(_reason(error)) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in loaded[1][kind] if name not in beside):
            raise ValueError(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}")
    model: PreTrainedModel = loaded[0]
    model.eval()
    return model


def _from_pretrained(source: ModelSource) -> PreTrainedModel:
    """The model as transformers loads it, without adapter and checkpoint.

    Raises:
        ValueError: some of its weights would be drawn at random or not be what they were; and whatever transformers
            raises.
    """
    auto, arguments = _loading(source)
    loaded: Any = auto.from_pretrained(**arguments, output_loading_info=True)
    model: PreTrainedModel = loaded[0]
    model.eval()
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"it has no weights for {', '.join(missing[:5])}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("it is an adapter on the hub; download it and name its folder")
    if scales := sorted(name for name in loaded[1]["unexpected_keys"] if name.endswith(SCALES)):
        raise ValueError(f"its weights are packed, and nothing reads {scales[0]}; name the model that it was made from")
    if packing := packing_of(source):
        settle(model, source, packing)
    if not is_tied(model):  # whatever the config says: a class that believes it would overwrite one of two matrices
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    if "gguf_file" not in arguments:
        cast(Any, model).not_loaded = _not_loaded(model, source, loaded[1]["unexpected_keys"])
    if is_multimodal(model):
        files = (cached_file(source.path, f, _raise_exceptions_for_missing_entries=False) for f in PROCESSORS)
        cast(Any, model).processors = [Path(file) for file in files if file]
    return model


def _loading(source: ModelSource) -> tuple[Any, dict[str, Any]]:
    """The auto class that loads a model, and the arguments of its ``from_pretrained``."""
    arguments = source.arguments()
    if "gguf_file" in arguments:  # packed blocks could be neither trained nor saved
        return AutoModelForCausalLM, arguments | {
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": torch.float32,
        }
    # Its decoder alone would load, and no longer report that it is one.
    if (config := AutoConfig.from_pretrained(**arguments)).is_encoder_decoder:
        raise ValueError("it is an encoder-decoder, and no causal language model")
    extra: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    if source.quantize:
        extra |= {"quantization_config": _bits(source.quantize), "device_map": {"": torch.cuda.current_device()}}
        extra["dtype"] = torch.bfloat16
    if packing := packing_of(source):
        extra |= packing.loading(config, source)
    return declared_class(config), arguments | extra


def _not_loaded(model: PreTrainedModel, source: ModelSource, unexpected: set[str]) -> dict[str, Path | None]:
    """Tensors of a checkpoint that its model does not have, and their files; None of one that is not found there."""
    stored, ignored = _stored_tensors(source), model._keys_to_ignore_on_load_unexpected or ()
    names = unexpected | {name for name in stored if any(re.search(pattern, name) for pattern in ignored)}
    return {name: stored.get(name) for name in sorted(names - model.state_dict().keys()) if not COMPUTED.search(name)}


def _stored_tensors(source: ModelSource) -> dict[str, Path]:
    """The file of each tensor of a checkpoint."""
    index, single = (
        cached_file(source.path, file, _raise_exceptions_for_missing_entries=False)
        for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if index:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: Path(index).with_name(file) for name, file in files.items()}
    if not single:
        return {}
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), Path(single))


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether a model reads images or sound too."""
    return type(model).__name__ == MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(model.config.model_type)


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze what text never reaches: of a multimodal model all but its decoder, embeddings and head."""
    if is_multimodal(model):
        parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        read = {id(p) for part in parts if part is not None for p in part.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in read)


@torch.no_grad()
def put_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give a model the weights of a checkpoint.

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
    """The model with the adapter or the weights that its source names beside it, and the adapter's ends of answers."""
    if source.tokens:
        adapter_files.resize(model, source.tokens)
    if source.adapter and source.attached:
        adapter_files.attach_saved(model, source.adapter, source.name)
    elif source.adapter:
        model = adapter_files.merged(model, source.adapter)
    if source.adapter and (source.adapter / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.adapter)
    if source.checkpoint and source.checkpoint != source.adapter:
        put_weights(model, source.checkpoint)
    return model


def _bits(quantize: str) -> BitsAndBytesConfig:
    """4bit: NormalFloat with its scales quantized too (arXiv 2305.14314); 8bit: LLM.int8() (2208.07339)."""
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def release(model: nn.Module) -> None:
    """Give back the memory of a model's weights, whoever still holds it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def free_memory() -> None:
    """Give back what models and optimizers took that nobody holds any more; they are parts of cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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


# ---- device and memory ------------------------------------------------------------------------------------------


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(name: str | None, device: torch.device, halved: bool = False) -> torch.dtype:
    """``auto``: bfloat16 on CUDA and for ``halved`` weights, else float32."""
    if name in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" or halved else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def export_dtype(name: str, source: ModelSource) -> torch.dtype:
    """The precision in which weights are written; ``auto``: that in which the start model is stored."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    arguments = source.arguments() if not source.converted else {"pretrained_model_name_or_path": source.converted}
    config = AutoConfig.from_pretrained(**arguments)
    stored = config.dtype or config.get_text_config().dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The option's word for a precision."""
    return str(dtype).removeprefix("torch.")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer on its own, in place: they are alike, and one graph serves rows of every length.

    Raises:
        UsageError: the model has no layers that are known as such.
    """
    from torch._inductor import config as inductor

    if hasattr(inductor, "emulate_precision_casts"):  # as without: the graph with a backward pass would round elsewhere
        inductor.emulate_precision_casts = True
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)
    if not compiled(model):
        raise UsageError("--compile: the model has no layers of transformers' kind; leave it out")


def compiled(model: PreTrainedModel) -> bool:
    """Whether its layers were compiled."""
    return any(module._compiled_call_impl for module in model.modules())


# ---- mixtures of experts ----------------------------------------------------------------------------------------


@torch.no_grad()
def experts_a_token(model: PreTrainedModel, pair: Pair) -> int:
    """How many experts each token goes to in a mixture whose load-balancing loss is known.

    Raises:
        UsageError: the model is no mixture of experts, or its own loss of a pair is another than ours.
    """
    batch = padded([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]).to(model.device)
    asked = {"output_router_logits": True, "use_cache": False, "attention_mask": batch.attention_mask}
    try:
        experts = int(model.config.get_text_config().num_experts_per_tok)
        own = float(model(batch.input_ids, **asked).aux_loss)
        part = routed(body_states(model, batch, torch.float32, output_router_logits=True).router_logits, batch, experts)
        ours = float(auxiliary_loss(part, part.counts))
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        why = f"{type(model).__name__} is no mixture of experts whose routers can be read"
        raise UsageError(f"--router-aux-loss-coef: {why}; leave it out") from error
    if not math.isclose(own, ours, rel_tol=1e-4):
        why = f"{type(model).__name__} balances its experts by another loss ({own:.6g}, not {ours:.6g})"
        raise UsageError(f"--router-aux-loss-coef: {why}; leave it out")
    return experts


# ---- layout -----------------------------------------------------------------------------------------------------

# Names in configurations of a length at which a forward changes: with its longest sequence (longrope) or with the
# places in its rows (Llama 4).
THRESHOLDS = ("original_max_position_embeddings", "attention_chunk_size", "floor_scale")


@torch.no_grad()
def choose_layout(
    model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Layout, bool, str]:
    """The most compact layout whose log-probs equal those of each response alone, and a sentence about it.

    The bool says whether the head may run apart from the body, see ``ModelRunner``.

    Real pairs are scored in forwards of each layout, see ``_tried``, in float32 and in the compute precision, and
    compared with the plainest forward there is: one response, the model's own attention, no padding. Sparse attention
    is not tried with sequences beyond ``index_topk`` tokens, of which it chooses: it breaks ties by the row's length.

    Raises:
        DpoError: no layout gives the numbers of single sequences.
        UsageError: the model's own forward fails; a token's log-prob depends on the tokens behind it, is another in
            training, or changes when the model has read a longer sequence.
    """
    groups, limit = _tried(model, pairs, max_tokens, device)
    alone, places = _responses([pair for group in groups for pair in group], device)
    precisions = dict.fromkeys((torch.float32, dtype))
    with forward_errors("the model's own forward fails on a pair of the data"):
        expected = {p: _scored(model, alone, p)[places] for p in precisions}
    if not all(logps.isfinite().all() for logps in expected.values()):
        raise DpoError("the start model's log-probs are not finite: its weights are broken, or --dtype is too coarse")
    with forward_errors("the model's own forward fails in training mode"):
        _check_alone(model, alone[-1])
    try:
        together = _scored(model, alone, torch.float32, apart=True)[places]
        apart = bool((together - expected[torch.float32]).abs().nan_to_num(math.inf).max() < 1e-3)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # a body or a head of another kind
        apart = False
    chosen = getattr(model.config.get_text_config(), "index_topk", None) or math.inf
    sparse = alone[-1].input_ids.shape[1] > chosen
    limit = min(limit, chosen) if sparse else limit
    reasons = ["its attention chooses tokens, and breaks ties by the row's length"] if sparse else []
    layouts: list[Layout] = ["alone"] if sparse else [*_TOLD]
    for layout in layouts:
        forwards = [collate(group, layout).to(device) for group in groups]
        try:
            with attention(model, PREFIX_SHARED if layout == "shared" else None):
                scored = {p: _scored(model, forwards, p, apart) for p in precisions}
            off = {p: (logps - expected[p]).abs().nan_to_num(math.inf) for p, logps in scored.items()}
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            known = isinstance(error, UnsupportedAttentionError)
            reasons.append(f"{layout}: {error if known else 'not supported by the code of this model'}")
            continue
        if off[torch.float32].max() < 1e-3 and off[dtype].mean() < 0.1:
            reasons += [] if apart else ["the head cannot run apart from the body"]
            reasons += (
                [f"--max-length {limit} lets sequences share one"] if limit < math.inf and layout == "alone" else []
            )
            why = f" ({'; '.join(reasons)})" if reasons else ""
            largest = f"{off[torch.float32].max():.0e} nats a token"
            return layout, apart, f"{_TOLD[layout]}; equal to single sequences within {largest}{why}"
        reasons.append(f"{layout}: off by {max(float(each.max()) for each in off.values()):.2g} nats")
    if limit < math.inf:
        raise UsageError(
            f"sequences longer than {limit} tokens change the model's log-probs of shorter ones, beside and after them "
            f"({'; '.join(reasons)}); set --max-length {limit}"
        )
    raise DpoError(f"no layout gives this model's log-probs of single sequences: {'; '.join(reasons)}")


def _tried(
    model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int, device: torch.device
) -> tuple[list[list[Pair]], float]:
    """The pairs of each forward to try a layout on; and the length beyond which sequences change those of up to it.

    Always two pairs, the longest that fits ``max_tokens`` among them, and a third that is the shorter with one token
    of its prompt left: behind a long prompt nothing would be seen of what the state of a state-space model keeps of
    the sequence before. The longest of all by itself, where it does not fit. For each threshold of the configuration
    the longest pair beside one with a sequence up to it, or a longer row where no sequence is longer. The third is
    left out where it alone would be on the other side of a threshold.

    Infinity: no threshold lies between two sequences.
    """
    first = probe_pairs(pairs, "padded", max_tokens)
    cut = replace(first[-1], prompt=first[-1].prompt[-1:])
    lengths = (pairs if isinstance(pairs, Pairs) else Pairs(pairs)).lengths
    sequences = lengths[:, :1] + lengths[:, 1:]  # (P, 2)
    shorter, longest = sequences.min(1), int(sequences.max())
    long = pairs[int(sequences.max(1).argmax())]
    thresholds = sorted(_thresholds(model.config.get_text_config().to_dict()))
    other_side = any(1 + min(len(cut.chosen), len(cut.rejected)) <= length < shorter.min() for length in thresholds)
    groups = [first if other_side else [*first, cut]] + [[long]] * (2 * longest > max_tokens)
    between = [length for length in thresholds if shorter.min() <= length < longest]
    for length in between:
        short = pairs[int(np.where(shorter <= length, shorter, 0).argmax())]
        groups.append([long, short])
    beyond = [length for length in thresholds if longest <= length < max_tokens]
    groups += [[first[0]] * (length // row_costs(first, "shared")[0] + 1) + [first[-1]] for length in beyond]
    return groups, min(between, default=math.inf)


def _responses(tried: Sequence[Pair], device: torch.device) -> tuple[list[MicroBatch], Tensor]:
    """A forward for each response of these pairs, equal ones once, and shorter ones before one that may leave state.

    The tensor (N,) holds the place of each of the pairs' tokens among theirs.
    """
    sequences = [(pair.prompt, response) for pair in tried for response in (pair.chosen, pair.rejected)]
    names = [(prompt.tobytes(), response.tobytes()) for prompt, response in sequences]
    kept = dict(sorted(zip(names, sequences, strict=True), key=lambda each: sum(map(len, each[1]))))
    batches = [padded([sequence]).to(device) for sequence in kept.values()]
    counts = [len(batch.targets) for batch in batches]
    places = dict(zip(kept, torch.arange(sum(counts), device=device).split(counts), strict=True))
    return batches, torch.cat([places[name] for name in names])


def _scored(model: PreTrainedModel, forwards: Sequence[MicroBatch], dtype: torch.dtype, apart: bool = False) -> Tensor:
    """The token log-probs of one forward after the other: (N,) nats."""
    return torch.cat([token_logps(model, batch, dtype, apart) for batch in forwards])


def _thresholds(config: Mapping[str, Any]) -> set[int]:
    """The lengths that a configuration names, or a part of it."""
    found = {int(value) for name, value in config.items() if name in THRESHOLDS and isinstance(value, int | float)}
    return found.union(*(_thresholds(part) for part in config.values() if isinstance(part, dict)))


def _check_alone(model: PreTrainedModel, batch: MicroBatch) -> None:
    """Refuse a model whose log-probs of one sequence are others in training, or with another last token.

    Raises:
        UsageError: it reads ahead, or draws at random while it trains.
    """
    expected, ids = token_logps(model, batch, torch.float32), batch.input_ids.clone()
    ids[0, -1] = int(ids[0, -1] == 0)

    def off() -> float:
        logps = token_logps(model, replace(batch, input_ids=ids), torch.float32)
        return float((logps - expected).abs().nan_to_num(math.inf).max())

    model.train()
    in_training = off()
    model.eval()
    if in_training < 1e-3:
        return
    if (ahead := off()) >= 1e-3:
        raise UsageError(
            f"the model is no causal language model: a token's log-prob changes by {ahead:.2g} nats with what stands "
            "behind it. Take one that predicts each token from those before it"
        )
    raise UsageError(
        f"in training the model's log-probs are others than in evaluation, by {in_training:.2g} nats a token: "
        "something in it is drawn at random, so that the policy would not be its reference. Take another model"
    )


_TOLD: dict[Layout, str] = {
    "shared": "packed rows, each prompt computed once for both responses",
    "packed": "packed rows, the prompt computed once for each response",
    "padded": "padded batches, the prompt computed once for each response",
    "alone": "one sequence per forward",
}
