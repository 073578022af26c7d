"""LoRA adapters by peft: attached to a model's own modules.

They are injected into the model and no wrapper goes around it, so that body and head stay where they are. The
adapter's weights are float32 and trained; those of the base are frozen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.config.options import TrainOptions
from dpo_cli.models.logprobs import forward_errors
from dpo_cli.models.lora_targets import (
    ALL_LINEAR,
    Targets,
    choose_targets,
    counted,
    ends_with,
    kind_of,
    pattern_of,
)
from dpo_cli.models.split_weights import split
from dpo_cli.utils.errors import UsageError


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is attached, so that only that is trained."""
    return hasattr(model, "peft_config")


def is_quantized(model: nn.Module) -> bool:
    """Whether its matrices are packed, so that it cannot be moved or cast."""
    return bool(getattr(model, "is_quantized", False))


def new_adapter(
    model: PreTrainedModel, options: TrainOptions, base: str, logps: Callable[[], Tensor] | None = None
) -> dict[str, Counter[str]]:
    """Attach a new adapter to a model, which ``base`` names, in place; ``logps`` as of ``choose_targets``.

    The layer's output is W x + s B A x, with s = alpha / rank, or alpha / sqrt(rank) of rslora.

    Returns:
        The matrices without an adapter, as of ``Targets``.

    Raises:
        UsageError: there is nothing to adapt, or peft cannot; a module to save does not exist, is adapted as well, or
            shares its weights with another one.
    """
    from peft import LoraConfig  # peft takes a second to import

    targets, tied = choose_targets(model, options.lora_targets or ALL_LINEAR, logps), is_tied(model)
    whole = _modules_to_save(model, options.modules_to_save, targets) if options.modules_to_save else []
    embedding = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    alone = [n for n in targets.modules if n in embedding + head] + [n for n in whole if n in head]
    if tied and alone:
        raise UsageError(
            f"--lora-targets, --modules-to-save: the weights of {alone[0]} are embedding and head at once, and one "
            "would be trained without the other; to train both as one, name the embedding in --modules-to-save"
        )
    if options.lora_type == "dora" and targets.parameters:
        raise UsageError(
            f"--lora-type dora: peft does not decompose {kind_of(targets.parameters[0])}, which it adapts as a "
            "parameter; take lora or rslora, or other --lora-targets"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        use_rslora=options.lora_type == "rslora",
        use_dora=options.lora_type == "dora",
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        modules_to_save=whole or None,
        ensure_weight_tying=tied and not {*embedding}.isdisjoint(whole),
    )
    attach(model, config, options.seed)
    return targets.left


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head share one tensor."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(model.get_input_embeddings(), "weight", head)


def _modules_to_save(model: PreTrainedModel, names: str, targets: Targets) -> list[str]:
    """Return all modules that ``--modules-to-save`` names by their ends."""
    found = dict[str, None]()
    for name in names.split(","):
        ending = [full for full, _ in model.named_modules() if ends_with(full, name)]
        if not ending:
            kinds = sorted({kind_of(full.rpartition(".")[0]) for full, _ in model.named_parameters()})
            why = f"no module's name ends with {name}; there are {', '.join(kinds)}"
            raise UsageError(f"--modules-to-save {names}: {why}")
        found.update(dict.fromkeys(ending))
    inside = tuple(f"{name}." for name in found)
    if both := [name for name in (*targets.modules, *targets.parameters) if f"{name}.".startswith(inside)]:
        raise UsageError(
            f"--modules-to-save {names}: {kind_of(both[0])} would be trained whole and have an adapter; name other "
            "--lora-targets, or leave it out"
        )
    return [*found]


def attach(model: PreTrainedModel, config: Any, seed: int = 0, where: str = "--lora-targets") -> Any:
    """Attach a new adapter to a model, in place; the model computes what it did before.

    A base in bfloat16 stays that. ``seed`` draws the random part, whatever was drawn before. ``where``: of the
    configuration, for errors.

    Returns:
        peft's ``LoraModel`` around the model.

    Raises:
        UsageError: peft cannot adapt a module or train it whole.
    """
    from peft import LoraModel
    from peft.utils import ModulesToSaveWrapper

    halved, full_names = model.dtype == torch.bfloat16, config.target_modules
    if halved and not is_quantized(model):
        model.float()  # what is computed of the base's weights, as DoRA's magnitudes are, in float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, config, "default")
        except Exception as error:  # of whatever type peft raises
            raise UsageError(f"{where}: peft cannot adapt this: {str(error).splitlines()[0]}") from error
    config.target_modules = full_names  # which peft shortens to ends
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.detach().float()
    if halved:
        if not is_quantized(model):
            cast_frozen_to_bf16(model)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # as its frozen original, whatever the weights' precision
                module.register_forward_hook(lambda _, given, result: result.to(torch.bfloat16))
    return tuner


def try_backward(model: PreTrainedModel, logps: Callable[[], Tensor]) -> list[str]:
    """Take the gradient of ``logps()`` (N,) once; returns the kinds of trained weights that it does not reach.

    Raises:
        UsageError: forward or backward fails with an adapter.
    """
    with forward_errors("--lora-targets: this model fails with an adapter"):
        logps().sum().backward()
    reached = {pattern_of(name) for name, p in model.named_parameters() if p.grad is not None}
    unreached = {name for name, p in model.named_parameters() if p.requires_grad and pattern_of(name) not in reached}
    model.zero_grad(set_to_none=True)
    return sorted({kind_of(re.split(r"\.(?:base_layer|lora_|modules_to_save)", name)[0]) for name in unreached})


def describe_adapter(model: PreTrainedModel) -> tuple[str, list[str]]:
    """Count the adapted matrices by kind, and what is trained in full beside them.

    Returns also the kinds of expert tensors among them that transformers 4 has as other modules, so that it cannot load
    their adapter.
    """
    kinds, whole, experts = Counter[str](), Counter[str](), set[str]()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            own = getattr(module, "parameter_name", "weight")
            kind = kind_of(name.replace(".base_layer", "") + f".{own}" * (own != "weight"))
            kinds[kind] += 1
            # of gpt_oss 4.57.6 with peft 0.17.1 computes the same
            if own != "weight" and model.config.get_text_config().model_type != "gpt_oss":
                experts.add(kind)
        elif type(module).__name__ == "ModulesToSaveWrapper":
            whole[kind_of(name)] += 1
    also = f"; trained whole: {counted(whole)}" if whole else ""
    return f"{kinds.total():,} matrices: {counted(kinds)}{also}", sorted(experts)


@torch.no_grad()
def cast_frozen_to_bf16(model: nn.Module) -> None:
    """Cast the frozen weights of an adapter's base to bfloat16, rounded as by ``split``."""
    for p in model.parameters():
        if not p.requires_grad and p.dtype == torch.float32:
            p.data = split(p.detach().contiguous())[0]
