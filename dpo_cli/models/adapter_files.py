"""LoRA adapters on disk, as peft, Unsloth and LLaMA-Factory save them: read, attach, save, merge."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.models.adapters import attach, ends_with, is_tied, kind_of
from dpo_cli.utils.errors import DpoError, UsageError, reason_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # what peft puts before the names of a model's modules
# Initializations that leave the base unchanged; others subtract from it.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
# Keys of a configuration that do not change what the adapter computes.
NEUTRAL = {"base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode", "init_lora_weights"}
# Keys that make a LoRA something that is neither trained nor merged here.
VARIANTS = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("velora_config", "use_bdlora", "use_qalora"),
)
REPEATED = (
    "save the base with its layers repeated as layers of their own, name it with --base-model, and set "
    "layer_replication to null"
)


def read_config(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Any:
    """Read the ``peft.LoraConfig`` of an adapter; null keys have peft's defaults. ``warn`` of what peft ignores.

    Raises:
        UsageError: it is no LoRA, or a variant that can be neither trained nor merged here.
    """
    from peft import LoraConfig, __version__

    file = folder / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        values = {name: value for name, value in content.items() if value is not None and name != "runtime_config"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file}: cannot be read ({reason_of(error)})") from error
    if (kind := values.get("peft_type")) != "LORA":
        raise UsageError(
            f"{file}: not a LoRA adapter, its peft_type is {kind}; merge it into its base with peft's merge_and_unload "
            "and name the result, or start from its base"
        )
    if used := [name for name in VARIANTS if values.get(name)]:
        remedy = REPEATED if used[0] == "layer_replication" else "start from its base"
        raise UsageError(f"{file}: {used[0]} is on, which is neither trained nor merged here; {remedy}")
    began = values.pop("init_lora_weights", True)  # some ask for packages that saved weights do not need
    if began not in HARMLESS:
        raise UsageError(
            f"{file}: it began as {began}, which changes its base; save it as a plain LoRA where it was trained: "
            "peft's path_initial_model_for_weight_conversion"
        )
    field_names = {field.name for field in dataclasses.fields(LoraConfig)}
    if ignored := {k: values[k] for k in sorted(values.keys() - field_names) if values[k] and "version" not in k}:
        keys = ", ".join(f"{name}: {json.dumps(value)}" for name, value in ignored.items())
        warn(f"{file}: peft {__version__} does not know and ignores {keys[:300]}")
    try:
        with warnings.catch_warnings(action="ignore"):
            config = LoraConfig(**{name: value for name, value in values.items() if name in field_names})
        if odd := [each for each in (config.r, config.lora_alpha) if not isinstance(each, int | float)]:
            raise TypeError(f"{odd[0]!r} is no number")
    except (TypeError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise UsageError(f"{file}: peft {__version__} cannot read it: {_line(error)}") from error
    config.init_lora_weights, config.lora_dropout, config.inference_mode = began, 0.0, False
    return config


def settings(config: Any) -> dict[str, Any]:
    """Convert a ``peft.LoraConfig`` to options; None where no option can express it."""
    names = {"lora_targets": config.target_modules, "modules_to_save": config.modules_to_save}
    lists = {o: ",".join(sorted(of)) or None if isinstance(of, (list, set)) else None for o, of in names.items()}
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else None
    return {"lora_rank": config.r, "lora_type": kind, "lora_alpha": alpha, **lists}


def _line(error: Exception) -> str:
    """Format a library's message as one line without control characters."""
    return re.sub(r"\x1b\[[\d;]*m|\s+", " ", str(error)).strip() or type(error).__name__


# ---- load and save ----------------------------------------------------------------------------------------------


def attach_saved(model: PreTrainedModel, folder: Path, base: str) -> Any:
    """Attach a saved adapter to a model, in place; ``base`` names the model in its configuration.

    Returns:
        peft's ``LoraModel`` around the model.

    Raises:
        DpoError: it is not of this model, or of a kind that is not trained here.
    """
    config = read_config(folder)
    config.base_model_name_or_path = base
    with warnings.catch_warnings(action="ignore"):
        tuner = attach(model, config, where=str(folder / CONFIG))
    put_adapter(model, folder)
    return tuner


def put_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load a folder's weights into an attached adapter, and into its base those saved beside them.

    Raises:
        DpoError: they are of another adapter.
    """
    saved = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    try:
        unexpected, lacking = _put(model, saved)
        # peft writes some of what it saves with an embedding under a second name
        loaded = [tensor for name, tensor in saved.items() if name not in unexpected]
        odd = [n for n in unexpected if n not in saved or not any(torch.equal(saved[n], t) for t in loaded)]
        reason = f"it has no {lacking[0]}" if lacking else f"its base has no {odd[0]}" if odd else ""
    except KeyError as error:  # of a module that is saved whole
        reason = f"it has no {error.args[0]}"
    except RuntimeError as error:
        shapes = re.search(r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)", str(error))
        reason = f"{shapes[1]} is {shapes[2]}, and of its base {shapes[3]}" if shapes else _line(error)
    if reason:
        reason = reason.replace(".default", "")
        raise DpoError(f"{folder / WEIGHTS}: is of another model or of other modules: {reason}")
    cast(Any, model).of_base = sorted(
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in saved and not p.requires_grad and ".original_module." not in name
    )


def _put(model: nn.Module, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load weights into an attached adapter; returns those without a place, and trained parameters that got none."""
    from peft import set_peft_model_state_dict

    with warnings.catch_warnings(action="ignore"):
        result: Any = set_peft_model_state_dict(model, weights)
    trained = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    given = {number for name, number in trained.items() if name not in result.missing_keys}
    return result.unexpected_keys, [name for name, number in trained.items() if number not in given]


def check_loadable(model: PreTrainedModel) -> None:
    """Check that peft would load all of an attached adapter from its file.

    Raises:
        UsageError: it would not, so that the adapter could be trained and then neither resumed nor used.
    """
    from peft import __version__

    try:
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in adapter_weights(model).items()}
        lacking = {kind_of(name.partition(".lora_")[0]) for name in _put(model, weights)[1]}
    except Exception as error:  # of any type that peft raises
        reason = f"cannot save and load this adapter: {_line(error)}"
        raise UsageError(f"--lora-targets: peft {__version__} {reason}") from error
    if lacking:
        reason = f"would not load the adapter of {', '.join(sorted(lacking))} from its file, because it renames those"
        raise UsageError(f"--lora-targets: peft {__version__} {reason}; leave them out")


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file: what is trained, and parts of the base that came with the adapter."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings(action="ignore"):
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights |= {name: parameters[name] for name in getattr(model, "of_base", ())}
    return {PREFIX + name: tensor.detach().contiguous() for name, tensor in weights.items()}


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter's weights and configuration, as peft does."""
    (folder / CONFIG).write_text(json.dumps(_plain(model) | {"inference_mode": True}, indent=2) + "\n")
    weights, seen = adapter_weights(model), set[int]()
    for name, tensor in weights.items():
        weights[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # tied ones are saved twice, as by peft
        seen.add(tensor.data_ptr())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def described(model: PreTrainedModel) -> str:
    """Return the configuration that decides what an adapter computes, without the defaults of this version of peft."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict() | {"r": None, "lora_alpha": None}  # which are always written
    own = {name: value for name, value in _plain(model).items() if name not in NEUTRAL and value != usual[name]}
    return json.dumps(own)


def _plain(model: PreTrainedModel) -> dict[str, Any]:
    """Return the adapter's configuration as JSON values in a fixed order."""
    values = cast(Any, model).peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(values.items())}


@torch.no_grad()
def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter's weights to a model's own.

    Raises:
        DpoError: the adapter is not of this model.
        UsageError: it cannot be merged without changing what it computes.
    """
    head, tied = cast(Any, model.get_output_embeddings()), is_tied(model)
    tuner = attach_saved(model, folder, "")
    ids = torch.arange(-8, 8)[None] % model.config.get_text_config().vocab_size
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    if tied:  # an adapter may be of one of them alone
        head.weight = nn.Parameter(head.weight.detach().clone())
    try:
        with warnings.catch_warnings(action="ignore"):
            whole: PreTrainedModel = tuner.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = _line(error).rstrip(".")
        raise UsageError(f"{folder}: cannot be merged ({reason}); train it further with --lora-rank") from error
    if tied:
        head, embedding = cast(Any, whole.get_output_embeddings()), cast(Any, whole.get_input_embeddings())
        if equal := torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        else:
            whole.all_tied_weights_keys = {}
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = equal
    whole.eval().requires_grad_(True)  # peft froze what is trained now
    off = float((whole(input_ids=ids, use_cache=False).logits - expected).abs().max())
    if not off <= 1e-3 * float(expected.abs().max()):
        reason = f"merged into its base it computes something else (logits are off by {off:.2g})"
        raise UsageError(f"{folder}: {reason}; train it further with --lora-rank")
    return whole


# ---- an adapter that was trained with more tokens, or fewer, than its base has ---------------------------------------


def fit_vocabulary(model: PreTrainedModel, folder: Path, tokens: int = 0) -> None:
    """Resize embedding and head of a base, in place, to those that an adapter was trained with.

    ``tokens``: of the adapter's tokenizer, if the base's own has fewer. New rows are 0 until the adapter's weights
    replace them.

    Raises:
        UsageError: the adapter's files do not say what the weights of new tokens are.
    """
    config, ends = read_config(folder), (model.get_input_embeddings(), model.get_output_embeddings())
    named: dict[str, Any] = {name: module for name, module in model.named_modules() if any(module is e for e in ends)}
    base: int = cast(Any, ends[0]).weight.shape[0]
    saved = {name: rows for name in named if (rows := _saved_rows(folder, name))}
    indices = {name: _token_indices(config, name, named[name] is ends[0]) for name in named}
    rows = max(saved.values(), default=0) or max(base, tokens, *(max(i, default=-1) + 1 for i in indices.values()))
    if rows == base:
        return
    new = set(range(base, rows))
    lacking = [name for name in named if name not in saved and not new <= indices[name]]
    own = [n for n in named if any(ends_with(n, each) for each in config.modules_to_save or ())]  # tied no longer
    if is_tied(model) and named.keys() - own - set(lacking):
        lacking = []
    if new and lacking:
        raise UsageError(
            f"{folder}: the adapter has {rows:,} tokens, its base {base:,}, and nothing says what the {len(new):,} new "
            f"rows of {' and '.join(f'{name}.weight' for name in lacking)} are; resize the base as it was for the "
            f"adapter (transformers' resize_token_embeddings({rows})), save it, and name it with --base-model"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for end in named:
            for parameter in model.get_submodule(end).parameters():
                parameter[base:] = 0
    cast(Any, model).resized = rows


def _saved_rows(folder: Path, end: str) -> int:
    """Return rows of the full weight that an adapter's file has for an embedding or a head; 0 if it has none."""
    whole = re.compile(rf"{re.escape(PREFIX + end)}\.(?:(?:token_adapter\.)?base_layer\.|modules_to_save\.)?weight")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return next((file.get_slice(n).get_shape()[0] for n in file.keys() if whole.fullmatch(n)), 0)  # noqa: SIM118


def _token_indices(config: Any, end: str, is_embedding: bool) -> set[int]:
    """Return the tokens whose rows an adapter replaces (``trainable_token_indices``)."""
    indices = config.trainable_token_indices or {}
    if not isinstance(indices, dict):
        return set(indices) if is_embedding else set()
    return {i for name, those in indices.items() if ends_with(end, name) for i in those}
