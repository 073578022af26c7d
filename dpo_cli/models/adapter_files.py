"""Adapters on disk, as peft, Unsloth and LLaMA-Factory save them: read, attached with their weights, saved, merged."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.models.adapters import attach, is_tied
from dpo_cli.models.lora_targets import kind_of
from dpo_cli.utils.errors import DpoError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # what peft puts before the names of a model's modules
# Initializations that leave the base unchanged; others take something out of it.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
# Those that take the same out of it whenever the adapter is loaded, so that it can be merged.
REPEATED = (*HARMLESS, "pissa", "olora")
# What its configuration holds beside what it computes.
NOT_COMPUTED = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "task_type",
    "inference_mode",
    "init_lora_weights",
)
# Keys of peft's that make of a LoRA something that this does not compute in training.
VARIANTS = ("arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_bdlora", "use_qalora")
# Remedies that refusals end with.
FROM_BASE = "start from its base"
MERGE = "leave out --lora-rank, which merges it and trains all weights, or merge it with dpo merge first"
CONVERT = "save it as a plain LoRA where it was trained: peft's path_initial_model_for_weight_conversion"


def read_config(folder: Path) -> Any:
    """Read the ``peft.PeftConfig`` of an adapter of any kind; keys that are null are as peft has them by default.

    Raises:
        UsageError: peft cannot compute what it describes.
    """
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = _values(folder)
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UsageError(f"{folder / CONFIG}: its peft_type is {kind}, which {_peft()} does not know; {FROM_BASE}")
    if values.get("layer_replication"):
        raise UsageError(
            f"{folder / CONFIG}: layer_replication lets layers share their base's weights, which can be neither "
            "trained nor merged apart; save the base with its layers repeated as layers of their own, name it with "
            "--base-model, and set layer_replication to null"
        )
    if values.get("alora_invocation_tokens"):
        raise UsageError(
            f"{folder / CONFIG}: it is an aLoRA (alora_invocation_tokens), which is off until a prompt invokes it, and "
            f"can be neither merged nor trained here; {FROM_BASE}"
        )
    began = values.pop("init_lora_weights", True)  # which asks for packages and settings that its weights make needless
    try:
        known = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        with _quiet():
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{name: values[name] for name in known & values.keys()})
    except (TypeError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise UsageError(f"{folder / CONFIG}: {_peft()} cannot read it: {_line(error)}") from error
    if isinstance(config, LoraConfig):
        config.init_lora_weights, config.lora_dropout = began, 0.0
        if odd := [name for name in ("r", "lora_alpha") if not isinstance(getattr(config, name), (int, float))]:
            raise UsageError(f"{folder / CONFIG}: its {odd[0]} is {getattr(config, odd[0])!r}, which is no number")
    return config


def unknown_keys(folder: Path) -> dict[str, Any]:
    """What an adapter's configuration holds that the installed peft knows nothing of, and that is no name or version.

    Raises:
        UsageError: as ``read_config``.
    """
    known = {f.name for f in dataclasses.fields(read_config(folder))}
    unknown = {name: value for name, value in _values(folder).items() if name not in known and value}
    return {name: value for name, value in unknown.items() if "version" not in name}


def _values(folder: Path) -> dict[str, Any]:
    """An adapter's configuration without the keys that are null."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return {name: value for name, value in values.items() if value is not None and name != "runtime_config"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / CONFIG}: cannot be read ({error})") from error


def _peft() -> str:
    from peft import __version__

    return f"peft {__version__}"


def _line(error: Exception) -> str:
    """A library's message in one line without control characters."""
    return re.sub(r"\x1b\[[\d;]*m|\s+", " ", str(error)).strip() or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence peft's and transformers' warnings: what they warn of is checked here, or changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainable_config(folder: Path) -> Any:
    """Read the ``peft.LoraConfig`` of an adapter whose training can go on.

    Raises:
        UsageError: it is of another kind, or cannot be read.
    """
    from peft import LoraConfig

    config = read_config(folder)
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        way = MERGE if _mergeable(config) else FROM_BASE
        raise UsageError(
            f"{folder}: not a LoRA adapter but {config.peft_type.value}, which cannot be trained here; {way}"
        )
    if config.init_lora_weights not in HARMLESS:
        way = MERGE if config.init_lora_weights in REPEATED else CONVERT
        raise UsageError(f"{folder}: it began as {config.init_lora_weights}, which changes its base; {way}")
    if used := [name for name in VARIANTS if getattr(config, name, None)]:
        raise UsageError(f"{folder}: {used[0]} is on, which is not trained here; {MERGE}")
    config.inference_mode = False
    return config


def _mergeable(config: Any) -> bool:
    """Whether adapters of its kind are matrices beside a base's own, which they can be added to."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    plain = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and config.peft_type not in ("XLORA", "POLY")
    return plain and not config.is_prompt_learning and not config.is_adaption_prompt


def settings(config: Any) -> dict[str, Any]:
    """A ``peft.LoraConfig`` as options; what no option can say is None: targets that are no list, a broken alpha."""
    names = {"lora_targets": config.target_modules, "modules_to_save": config.modules_to_save}
    lists = {o: ",".join(sorted(of)) or None if isinstance(of, (list, set)) else None for o, of in names.items()}
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else None
    return {"lora_rank": config.r, "lora_type": kind, "lora_alpha": alpha, **lists}


# ---- how many tokens it has ----


def vocabulary(model: PreTrainedModel, folder: Path, tokens: int = 0) -> int:
    """Find how many rows embedding and head of a base need for an adapter that was trained on more tokens, or on fewer.

    ``tokens`` are those of the adapter's tokenizer, if the base's own has fewer.

    Raises:
        UsageError: the adapter's files do not say what the weights of new tokens are.
    """
    config, ends = read_config(folder), _ends(model)
    base = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    found = {name: _rows_of_end(folder, name) for name in ends}
    sizes = {rows for whole in found.values() for rows in whole.values()}
    indices = {name: _token_indices(config, name, next(iter(ends))) for name in ends}
    rows = max(sizes) if sizes else max(base, tokens, *(max(those, default=-1) + 1 for those in indices.values()))
    new = set(range(base, rows))
    whole = getattr(config, "modules_to_save", None) or ()
    own = [name for name in ends if _ends_with(name, whole)]  # which are tied no longer
    kept = [
        (f"{name}.{kind}", name if name in own else id(p), kind in found[name] or (p.ndim > 1 and new <= indices[name]))
        for name, end in ends.items()
        for kind, p in end.named_parameters()
    ]
    known = {tensor for _, tensor, named in kept if named}
    if new and (lacking := [name for name, tensor, _ in kept if tensor not in known]):
        raise UsageError(
            f"{folder}: the adapter has {rows:,} tokens, its base {base:,}, and nothing says what the {len(new):,} new "
            f"rows of {' and '.join(lacking)} are; resize the base as it was for the adapter (transformers' "
            f"resize_token_embeddings({rows})), save it, and name it with --base-model"
        )
    return rows


def resize(model: PreTrainedModel, rows: int) -> None:
    """Give embedding and head so many rows, in place; new ones are 0 until an adapter's weights take their place."""
    before = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for end in _ends(model).values():
            for parameter in end.parameters():
                parameter[before:] = 0


def _ends(model: PreTrainedModel) -> dict[str, Any]:
    """Embedding and head by their names."""
    names = {module: name for name, module in model.named_modules()}
    return {names[end]: end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}


def _rows_of_end(folder: Path, end: str) -> dict[str, int]:
    """Rows of the whole weight and bias that an adapter's file has for an embedding or a head."""
    whole = re.compile(
        rf"{re.escape(PREFIX + end)}\.(?:(?:token_adapter\.)?base_layer\.|modules_to_save\.)?(weight|bias)"
    )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        matched = ((whole.fullmatch(name), name) for name in file.keys())  # noqa: SIM118  # it is no mapping
        return {match[1]: file.get_slice(name).get_shape()[0] for match, name in matched if match}


def _token_indices(config: Any, end: str, embedding: str) -> set[int]:
    """Tokens whose rows of an embedding or a head an adapter has of its own (``trainable_token_indices``)."""
    indices = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(indices, dict):
        return set(indices) if end == embedding else set()
    return {i for name, those in indices.items() if _ends_with(end, [name]) for i in those}


def _ends_with(module: str, names: Iterable[str]) -> bool:
    """Whether a module's name ends with one of these, as peft matches names."""
    return any(f".{module}".endswith(f".{name}") for name in names)


# ---- into a model and back ----


def attach_saved(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Put an adapter into a model, in place, with the weights it was saved with; ``base`` finds the model again.

    Raises:
        DpoError: it is not of this model, or of a kind that is not trained here.
    """
    config = trainable_config(folder)
    config.base_model_name_or_path = base
    try:
        with _quiet():
            attach(model, config)
    except UsageError as error:
        raise UsageError(str(error).replace("--lora-targets", str(folder / CONFIG), 1)) from error
    put_adapter(model, folder)


def put_adapter(model: nn.Module, folder: Path) -> None:
    """Give an attached adapter the weights of a folder, and its base those that are there beside them.

    Raises:
        DpoError: they are of another adapter.
    """
    saved = _weights(model, folder)
    with _fitting(folder):
        result, lacking = _put(model, saved)
    if lacking:
        raise _other(folder, f"it has no {_in_file(lacking[0])}")
    # peft writes some of what it saves with an embedding under a second name
    known = [tensor for name, tensor in saved.items() if name not in result.unexpected_keys]
    copies = {n for n in result.unexpected_keys if n in saved and any(torch.equal(saved[n], t) for t in known)}
    if odd := [name for name in result.unexpected_keys if name not in copies]:
        raise _other(folder, f"its base has no {_in_file(odd[0])}")
    cast(Any, model).of_base = sorted(
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in saved and not p.requires_grad and ".original_module." not in name
    )


def check_loadable(model: PreTrainedModel) -> None:
    """Check that peft would load all of an attached adapter from its file.

    Raises:
        UsageError: it would not, so that the adapter could be trained and then neither resumed nor used.
    """
    try:
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in adapter_weights(model).items()}
        lacking = [name.partition(".lora_")[0] for name in _put(model, weights)[1]]
    except Exception as error:  # of whatever type peft raises
        raise UsageError(f"--lora-targets: {_peft()} cannot save and load this adapter: {_line(error)}") from error
    if lacking:
        kinds = ", ".join(sorted({kind_of(name) for name in lacking}))
        raise UsageError(
            f"--lora-targets: {_peft()} would not load the adapter of {kinds} from its file, because it renames those "
            "weights; leave them out"
        )


def _put(model: nn.Module, weights: dict[str, Tensor]) -> tuple[Any, list[str]]:
    """Load weights into an attached adapter; returns peft's result and the trained parameters that got none."""
    from peft import set_peft_model_state_dict

    with _quiet():
        result: Any = set_peft_model_state_dict(model, weights)
    trained = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    given = {number for name, number in trained.items() if name not in result.missing_keys}
    return result, [name for name, number in trained.items() if number not in given]


def _loadable_names(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapter, named so that peft loads them.

    peft renames an adapter's weights as transformers renames those of a checkpoint. Some of these patterns also match
    names that are right already (laguna's ``mlp.shared_expert.`` matches ``mlp.shared_experts``), and what such a
    pattern spoils is named as in a checkpoint of the base.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    def loaded(names: Iterable[tuple[str, str]]) -> set[str]:
        shapes = {stored: weights[name].to("meta") for name, stored in names}
        return {*convert_peft_adapter_state_dict_for_transformers(model, model.peft_config["default"], shapes)}

    spoilt = weights.keys() - loaded((name, name) for name in weights)
    if not spoilt:
        return weights
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    renamings = [each for each in get_model_conversion_mapping(base) if isinstance(each, WeightRenaming)]
    stored = {name: name for name in weights}
    for renaming in (each.reverse_transform() for each in reversed(renamings)):
        stored |= {name: renaming.rename_source_key(stored[name])[0] for name in spoilt}
    mended = spoilt & loaded(stored.items())
    return {stored[name] if name in mended else name: tensor for name, tensor in weights.items()}


def _weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What an adapter's file holds, under the names that it has in this model, which may be a ``PeftModel``."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    found = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
    named = _loadable_names(model, {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in found.items()})
    return {prefix + name.removeprefix(PREFIX): tensor for name, tensor in named.items()}


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn what torch and peft say of weights that are of other modules into one line."""
    try:
        with _quiet():
            yield
    except KeyError as error:  # of a module that is saved whole
        raise _other(folder, f"it has no {_in_file(error.args[0])}") from error
    except RuntimeError as error:
        shapes = re.search(r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)", str(error))
        reason = f"{_in_file(shapes[1])} is {shapes[2]}, and of its base {shapes[3]}" if shapes else _line(error)
        raise _other(folder, reason) from error


def _other(folder: Path, reason: str) -> DpoError:
    return DpoError(f"{folder / WEIGHTS}: is of another model or of other modules: {reason}")


def _in_file(name: str) -> str:
    """A weight's name as it is in an adapter's file, but for what all of them begin with."""
    return name.removeprefix(PREFIX).replace(".default", "")


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What an adapter's file holds of a model, under the names it has there.

    That is what is trained, and what of the frozen base came with the adapter: an embedding of more tokens, say.
    """
    from peft import get_peft_model_state_dict

    with _quiet():
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found |= {name: parameters[name] for name in getattr(model, "of_base", ())}
    return _loadable_names(model, {PREFIX + name: tensor.detach().contiguous() for name, tensor in found.items()})


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

    usual = LoraConfig().to_dict() | {"r": None, "lora_alpha": None}  # which are always written
    own = {name: value for name, value in _plain(model).items() if name not in NOT_COMPUTED and value != usual[name]}
    return json.dumps(own, sort_keys=True)


def _plain(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's configuration as JSON has it: the same each time."""
    values = cast(Any, model).peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(values.items())}


@torch.no_grad()
def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter's weights added to its own.

    Raises:
        DpoError: the adapter is not of this model.
        UsageError: it cannot be merged without changing what it computes.
    """
    from peft import get_peft_model

    config = read_config(folder)
    if not _mergeable(config):
        raise UsageError(f"{folder}: adapters of its kind ({config.peft_type.value}) cannot be merged; {FROM_BASE}")
    if (began := getattr(config, "init_lora_weights", True)) not in REPEATED:
        raise UsageError(f"{folder}: it began as {began}, whose change of the base is in no file; {CONVERT}")
    config.inference_mode = False
    head, tied = cast(Any, model.get_output_embeddings()), is_tied(model)
    with _quiet():
        adapted: Any = get_peft_model(model, config)
    put_adapter(adapted, folder)
    adapted.eval()
    ids = torch.arange(-8, 8)[None] % model.config.get_text_config().vocab_size
    expected = adapted(input_ids=ids, use_cache=False).logits
    if tied:  # an adapter may be of one of them alone
        head.weight = nn.Parameter(head.weight.detach().clone())
    try:
        with _quiet():
            whole: PreTrainedModel = adapted.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{folder}: cannot be merged ({_line(error).rstrip('.')}); train it further with --lora-rank"
        ) from error
    if tied:
        _tie_if_equal(whole)
    whole.eval().requires_grad_(True)  # peft froze what is trained now
    off = float((whole(input_ids=ids, use_cache=False).logits - expected).abs().max())
    if not off <= 1e-3 * float(expected.abs().max()):
        reason = f"merged into its base it computes something else (logits are off by {off:.2g})"
        raise UsageError(f"{folder}: {reason}; train it further with --lora-rank")
    return whole


def _tie_if_equal(model: PreTrainedModel) -> None:
    """Let embedding and head be one matrix again, unless an adapter has parted them."""
    head, embedding = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal
