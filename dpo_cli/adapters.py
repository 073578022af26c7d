"""LoRA adapters by peft: attached to a model's own modules.

They go into the model itself and no wrapper goes around it, so that body and head are where they are without one. The
adapter's weights are float32 and trained; those of the base are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_cli.errors import UsageError
from dpo_cli.optimizer import split

LINEAR = (nn.Linear, Conv1D)  # GPT-2's are of transformers' own kind


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is attached, so that nothing but that is trained."""
    return hasattr(model, "peft_config")


def is_quantized(model: nn.Module) -> bool:
    """Whether its matrices are packed, so that it can neither be moved nor cast."""
    return bool(getattr(model, "is_quantized", False))


def make_config(
    model: PreTrainedModel, *, rank: int, kind: str, alpha: int, targets: str, to_save: str | None, base: str
) -> Any:
    """The ``peft.LoraConfig`` of a new adapter for this model, which ``base`` names to whoever loads it again.

    The layer's output is W x + s B A x, with s = alpha / rank, or alpha / sqrt(rank) of rslora.

    Raises:
        UsageError: a name is of no module, or a target of one of another kind.
    """
    from peft import LoraConfig  # peft takes a second to import

    whole = _full_names(model, "--modules-to-save", to_save) if to_save else None
    if targets != "all-linear":
        named = _full_names(model, "--lora-targets", targets, (*LINEAR, nn.Embedding, nn.Conv1d))
        _refuse_tied(model, "--lora-targets", named)
    if whole:
        _refuse_tied(model, "--modules-to-save", [name for name in whole if not _is_embedding(model, name)])
    tied = bool(whole) and model.config.get_text_config().tie_word_embeddings
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        target_modules=targets if targets == "all-linear" else targets.split(","),
        modules_to_save=whole,
        ensure_weight_tying=tied and any(_is_embedding(model, name) for name in whole or ()),
    )


def _is_embedding(model: PreTrainedModel, name: str) -> bool:
    return model.get_submodule(name) is model.get_input_embeddings()


def _full_names(
    model: PreTrainedModel, option: str, names: str, kinds: tuple[type[nn.Module], ...] = (nn.Module,)
) -> list[str]:
    """All modules whose name ends so.

    Raises:
        UsageError: none does, or one that does is of none of these kinds.
    """
    found: list[str] = []
    for name in names.split(","):
        those = {full: m for full, m in model.named_modules() if full == name or full.endswith(f".{name}")}
        other = [type(module).__name__ for module in those.values() if not isinstance(module, kinds)]
        if not those or other:
            why = f"{name} is a {other[0]}, which takes no adapter" if other else f"no module's name ends with {name}"
            linear = {full.rpartition(".")[2] for full, m in model.named_modules() if isinstance(m, LINEAR)}
            raise UsageError(f"{option} {names}: {why}; linear ones are {', '.join(sorted(linear))}")
        found += those
    return found


def _refuse_tied(model: PreTrainedModel, option: str, names: list[str]) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = [name for name in names if any(model.get_submodule(name) is end for end in ends)]
    if shared and model.config.get_text_config().tie_word_embeddings:
        raise UsageError(
            f"{option}: the weights of {shared[0]} are embedding and head at once, and one would be trained without "
            "the other; to train both as one, name the embedding in --modules-to-save"
        )


def attach(model: PreTrainedModel, config: Any, seed: int = 0) -> None:
    """Put an adapter into a model, in place: its start, with which the model computes what it did before.

    A base in bfloat16 stays that. ``seed`` draws what of the start is random, whatever was drawn before.

    Raises:
        UsageError: a module that is to have an adapter is of no kind that can have one.
    """
    from peft import inject_adapter_in_model
    from peft.utils import ModulesToSaveWrapper

    dtype = model.dtype
    if dtype != torch.float32 and not is_quantized(model):
        model.float()  # what is computed of the base's weights, as DoRA's magnitudes are, in float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:  # peft's words for a module of another kind
            raise UsageError(f"--lora-targets: {str(error).splitlines()[0]}") from error
    for p in trained(model):
        p.data = p.detach().float()
    if dtype == torch.bfloat16 and not is_quantized(model):
        coarsen(model)
    if dtype == torch.bfloat16:
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # as its frozen original, whatever the weights' precision
                module.register_forward_hook(lambda _, given, result: result.to(torch.bfloat16))


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are trained."""
    return (p for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def coarsen(model: nn.Module) -> None:
    """Leave the frozen weights of an adapter's base the bfloat16 halves that ``optimizer.halve`` would."""
    for p in model.parameters():
        if not p.requires_grad and p.dtype == torch.float32:
            p.data = split(p.detach().contiguous())[0]
