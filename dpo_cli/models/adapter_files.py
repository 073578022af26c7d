"""Adapters on disk, as peft, Unsloth and LLaMA-Factory save them: read, attach, save, merge."""

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
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.models.adapters import attach, is_tied
from dpo_cli.models.lora_targets import kind_of
from dpo_cli.utils.errors import DpoError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # what peft puts before the names of a model's modules
# Initializations that leave the base unchanged; others subtract from it.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
# Those that subtract the same whenever the adapter is loaded, so that it can be merged.
REPEATED = (*HARMLESS, "pissa", "olora")
# Keys of a configuration that do not change what the adapter computes.
NOT_COMPUTED = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "task_type",
    "inference_mode",
    "init_lora_weights",
)
# Keys that make a LoRA something that is not trained here.
VARIANTS = ("arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_bdlora", "use_qalora")
# Remedies that refusals end with.
FROM_BASE = "start from its base"
MERGE = "leave out --lora-rank, which merges it and trains all weights, or merge it with dpo merge first"
CONVERT = "save it as a plain LoRA where it was trained: peft's path_initial_model_for_weight_conversion"


def read_config(folder: Path) -> Any:
    """Read the ``peft.PeftConfig`` of an adapter of any kind; null keys have peft's defaults.

    Raises:
        UsageError: peft cannot compute what it describes.
    """
    from peft import LoraConfig, __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = _values(folder)
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UsageError(
            f"{folder / CONFIG}: its peft_type is {kind}, which peft {__version__} does not know; {FROM_BASE}"
        )
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
    began = values.pop("init_lora_weights", True)  # some ask for packages that saved weights do not need
    try:
        known = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        with _quiet():
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{name: values[name] for name in known & values.keys()})
    except (TypeError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise UsageError(f"{folder / CONFIG}: peft {__version__} cannot read it: {_line(error)}") from error
    if isinstance(config, LoraConfig):
        config.init_lora_weights, config.lora_dropout = began, 0.0
        if odd := [name for name in ("r", "lora_alpha") if not isinstance(getattr(config, name), (int, float))]:
            raise UsageError(f"{folder / CONFIG}: its {odd[0]} is {getattr(config, odd[0])!r}, which is no number")
    return config


def unknown_keys(folder: Path) -> dict[str, Any]:
    """Return the keys of an adapter's configuration that the installed peft does not know, but for versions.

    Raises:
        UsageError: as ``read_config``.
    """
    known = {f.name for f in dataclasses.fields(read_config(folder))}
    unknown = {name: value for name, value in _values(folder).items() if name not in known and value}
    return {name: value for name, value in unknown.items() if "version" not in name}


def _values(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration without its null keys."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return {name: value for name, value in values.items() if value is not None and name != "runtime_config"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / CONFIG}: cannot be read ({error})") from error


def _line(error: Exception) -> str:
    """Format a library's message as one line without control characters."""
    return re.sub(r"\x1b\[[\d;]*m|\s+", " ", str(error)).strip() or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence peft's and transformers' warnings: their causes are checked here, or change nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trainable_config(folder: Path) -> Any:
    """Read the ``peft.LoraConfig`` of an adapter that can be trained further.

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
    """Whether an adapter of this kind is a sum with the base's matrices."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    plain = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and config.peft_type not in ("XLORA", "POLY")
    return plain and not config.is_prompt_learning and not config.is_adaption_prompt


def settings(config: Any) -> dict[str, Any]:
    """Convert a ``peft.LoraConfig`` to options; None where no option can express it."""
    names = {"lora_targets": config.target_modules, "modules_to_save": config.modules_to_save}
    lists = {o: ",".join(sorted(of)) or None if isinstance(of, (list, set)) else None for o, of in names.items()}
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else None
    return {"lora_rank": config.r, "lora_type": kind, "lora_alpha": alpha, **lists}


# ---- load and save ----


def attach_saved(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Attach a saved adapter to a model, in place; ``base`` names the model in its configuration.

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
    """Load a folder's weights into an attached adapter, and into its base those saved beside them.

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
    from peft import __version__

    try:
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in adapter_weights(model).items()}
        lacking = [name.partition(".lora_")[0] for name in _put(model, weights)[1]]
    except Exception as error:  # of whatever type peft raises
        raise UsageError(
            f"--lora-targets: peft {__version__} cannot save and load this adapter: {_line(error)}"
        ) from error
    if lacking:
        kinds = ", ".join(sorted({kind_of(name) for name in lacking}))
        raise UsageError(
            f"--lora-targets: peft {__version__} would not load the adapter of {kinds} from its file, because it "
            "renames those weights; leave them out"
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
    """Read an adapter's file, under the names of this model, which may be a ``PeftModel``."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    found = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
    named = _loadable_names(model, {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in found.items()})
    return {prefix + name.removeprefix(PREFIX): tensor for name, tensor in named.items()}


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn errors of torch and peft about weights of other modules into one line."""
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
    """Return a weight's name in an adapter's file, without the common prefix."""
    return name.removeprefix(PREFIX).replace(".default", "")


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file: what is trained, and parts of the base that came with the adapter."""
    from peft import get_peft_model_state_dict

    with _quiet():
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found |= {name: parameters[name] for name in getattr(model, "of_base", ())}
    return _loadable_names(model, {PREFIX + name: tensor.detach().contiguous() for name, tensor in found.items()})


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter's weights and configuration, as peft does."""
    (folder / CONFIG).write_text(json.dumps(_plain(model) | {"inference_mode": True}, indent=2) + "\n")
    weights, seen = adapter_weights(model), set[int]()
    for name, tensor in weights.items():
        weights[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # tied ones are there twice, as of peft
        seen.add(tensor.data_ptr())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def described(model: PreTrainedModel) -> str:
    """Return the configuration that decides what an adapter computes, without peft's defaults.

    So new fields of a later peft change nothing.
    """
    from peft import LoraConfig

    usual = LoraConfig().to_dict() | {"r": None, "lora_alpha": None}  # which are always written
    own = {name: value for name, value in _plain(model).items() if name not in NOT_COMPUTED and value != usual[name]}
    return json.dumps(own, sort_keys=True)


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
    """Tie embedding and head again, unless an adapter made them differ."""
    head, embedding = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    else:
        model.all_tied_weights_keys = {}
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal
