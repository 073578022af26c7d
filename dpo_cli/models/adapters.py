"""LoRA adapters by peft: which matrices get one, and how it is attached to the model's own modules.

Targets are listed by their full names. peft's own ``all-linear`` goes by the last part of a name: in mixtures of
experts it adapts routers and leaves out shared experts and dense layers, and in a model that reads images too it adapts
what no text runs through.

Adapters are injected into the model and no wrapper goes around it, so that body and head stay where they are. The
adapter's weights are float32 and trained; those of the base are frozen.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_cli.config.options import TrainOptions
from dpo_cli.models.split_weights import split
from dpo_cli.utils.errors import UsageError

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)  # GPT-2's are of transformers' own kind
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d)  # what can be named
# Why a matrix gets no adapter.
ROUTER, UNREACHED, OWN_FORWARD = "routers", "no log-prob of text depends on them", "more than a matrix product"
READ_DIRECTLY, NOT_NAMED = "read by fused kernels", "experts that --lora-targets does not name"
# A weight that the layer around it reads, as fused kernels of state-space models do, and not only its dtype or device.
READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is attached, so that only that is trained."""
    return hasattr(model, "peft_config")


def is_quantized(model: nn.Module) -> bool:
    """Whether its matrices are packed, so that it cannot be moved or cast."""
    return bool(getattr(model, "is_quantized", False))


# ---- attached ---------------------------------------------------------------------------------------------------


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
    assert options.lora_rank and options.lora_alpha
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
    matched = dict[str, None]()
    for name in names.split(","):
        ending = [full for full, _ in model.named_modules() if ends_with(full, name)]
        if not ending:
            kinds = sorted({kind_of(full.rpartition(".")[0]) for full, _ in model.named_parameters()})
            why = f"no module's name ends with {name}; there are {', '.join(kinds)}"
            raise UsageError(f"--modules-to-save {names}: {why}")
        matched.update(dict.fromkeys(ending))
    inside = tuple(f"{name}." for name in matched)
    if both := [name for name in (*targets.modules, *targets.parameters) if f"{name}.".startswith(inside)]:
        raise UsageError(
            f"--modules-to-save {names}: {kind_of(both[0])} would be trained whole and have an adapter; name other "
            "--lora-targets, or leave it out"
        )
    return [*matched]


def attach(model: PreTrainedModel, config: Any, seed: int = 0, where: str = "--lora-targets") -> Any:
    """Attach a new adapter to a model, in place; the model computes what it did before.

    A base in bfloat16 stays in bfloat16. ``seed`` alone decides the random part. ``where``: of the
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
        model.float()  # values computed from the base's weights, such as DoRA's magnitudes, are float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, config, "default")
        except Exception as error:  # of any type that peft raises
            raise UsageError(f"{where}: peft cannot adapt this: {str(error).splitlines()[0]}") from error
    config.target_modules = full_names  # which peft shortens to ends
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.detach().float()
    if halved:
        if not is_quantized(model):
            cast_frozen_to_bf16(model)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # like its frozen original, in any precision of the weights
                module.register_forward_hook(lambda _, given, result: result.to(torch.bfloat16))
    return tuner


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
            experts |= {kind} if own != "weight" else set()
        elif type(module).__name__ == "ModulesToSaveWrapper":
            whole[kind_of(name)] += 1
    also = f"; trained whole: {counted(whole)}" if whole else ""
    same = model.config.get_text_config().model_type == "gpt_oss"  # in 4.57.6 with peft 0.17.1
    return f"{kinds.total():,} matrices: {counted(kinds)}{also}", [] if same else sorted(experts)


@torch.no_grad()
def cast_frozen_to_bf16(model: nn.Module) -> None:
    """Cast the frozen weights of an adapter's base to bfloat16, rounded as by ``split``."""
    for p in model.parameters():
        if not p.requires_grad and p.dtype == torch.float32:
            p.data = split(p.detach().contiguous())[0]


# ---- which matrices get one -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Full names of the modules and parameters to adapt; ``left`` counts the other matrices by reason and kind."""

    modules: list[str]
    parameters: list[str]
    left: dict[str, Counter[str]]


def choose_targets(model: PreTrainedModel, names: str, logps: Callable[[], Tensor] | None = None) -> Targets:
    """Resolve ``--lora-targets``: ``all-linear``, or the ends of module and parameter names, separated by commas.

    All linear are the matrix products of the text model, and experts that are kept as one tensor; not routers,
    embeddings, the head, or what an adapter cannot reach. ``logps`` scores some text: (N,) nats; a module on which they
    do not depend gets no adapter. Without it every module counts as reached.

    Raises:
        UsageError: a name fits nothing, or nothing that can have an adapter.
    """
    every: dict[str, nn.Module] = dict(model.named_modules())
    experts = [*_experts(model)]
    stacked = [tensor for _, _, tensors in experts for tensor in tensors]
    if names == ALL_LINEAR:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        linear = [name for name, module in every.items() if isinstance(module, LINEAR)]
        named = [name for name in linear if not any(every[name] is end for end in ends)] + stacked
        routers = _routers(every, experts)
    else:
        named, routers = _named(every, stacked, names), set[str]()
    reached, read = _reached(model, logps), _read_directly(model)
    renamed = {end for end in {name.rpartition(".")[2] for name in named if name in every} if _is_renamed(model, end)}
    modules, parameters, skipped = list[str](), list[str](), defaultdict[str, Counter[str]](Counter)
    for name in named:
        module, as_parameter = every.get(name), name.rpartition(".")[2] in renamed
        owner = name if module else name.rpartition(".")[0]
        packed = type(module).__module__.startswith("bitsandbytes")  # whose forward is a matrix product too
        own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if reason := (
            (READ_DIRECTLY if name in read else "")
            or (ROUTER if name in routers else "")
            or (UNREACHED if pattern_of(owner) not in reached else "")
            or (OWN_FORWARD if own_forward and (as_parameter or not packed) else "")
        ):
            skipped[reason][kind_of(name)] += 1
        elif module and not as_parameter:
            modules.append(name)
        else:
            parameters.append(f"{name}.weight" if module else name)
    if names != ALL_LINEAR:
        if beyond := [(kind, reason) for reason, kinds in skipped.items() if reason != UNREACHED for kind in kinds]:
            kind, reason = beyond[0]
            raise UsageError(f"--lora-targets {names}: {kind} is {reason}, so that no adapter reaches it")
        if unnamed := Counter(kind_of(name) for name in stacked if name not in named):
            skipped[NOT_NAMED] = unnamed
    if not modules and not parameters:
        raise UsageError(f"--lora-targets {names}: nothing to adapt; {_adaptable_names(every, stacked)}")
    return Targets(modules, parameters, skipped)


def kind_of(name: str) -> str:
    """A module's name without those of the stacks it is in: ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj``.

    Where nothing comes after the number, the name of the stack: ``merger.mlp`` of ``merger.mlp.0``.
    """
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    own = [part for part in parts[first + 1 :] if not part.isdigit()]
    return ".".join(own or [part for part in parts if not part.isdigit()])


def counted(kinds: Counter[str]) -> str:
    """Kinds and their counts in words, equal counts together: ``30 each of mlp.up_proj, self_attn.q_proj``."""
    parts = []
    for count in sorted({*kinds.values()}, reverse=True):
        equal = sorted(kind for kind in kinds if kinds[kind] == count)
        parts.append(f"{count:,} {'each of ' if len(equal) > 1 else ''}{', '.join(equal)}")
    return "; ".join(parts)


def pattern_of(name: str) -> str:
    """A module's name with the numbers of layer and expert left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _reached(model: nn.Module, logps: Callable[[], Tensor] | None) -> set[str]:
    """Patterns of the modules that log-probs depend on, by their graph: of a list of experts some are enough."""
    if logps is None:
        return {pattern_of(name) for name, _ in model.named_modules()}
    called: dict[Any, list[str]] = defaultdict(list)  # a node of the graph, and whose output it made
    hooks = []
    for name, module in model.named_modules():

        def note(_module: nn.Module, _given: Any, output: Any, pattern: str = name) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                called[first.grad_fn].append(pattern)

        hooks.append(module.register_forward_hook(note))
    try:
        todo = [logps().sum().grad_fn]
    finally:
        for hook in hooks:
            hook.remove()
    seen = set[Any]()
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [earlier for earlier, _ in node.next_functions]
    return {pattern_of(name) for node in seen for name in called[node]}


def _read_directly(model: nn.Module) -> set[str]:
    """Modules whose weight the layer around them reads: on some devices their forward, and an adapter's, never runs."""
    around = {name: type(m) for name, m in model.named_modules() if any(isinstance(c, LINEAR) for c in m.children())}
    reads = defaultdict[type[nn.Module], list[str]](list)
    for kind in {*around.values()}:
        for each in kind.__mro__:
            if issubclass(each, nn.Module) and not each.__module__.startswith("torch.") and each is not PreTrainedModel:
                with suppress(OSError, TypeError):  # its source is not available
                    reads[kind] += READ.findall(inspect.getsource(each))
    return {f"{name}.{child}" for name, kind in around.items() for child in reads[kind]}


def _experts(model: nn.Module) -> Iterator[tuple[str, int, list[str]]]:
    """Name of each group of experts, their number, and the matrices that all of them share; of a list none."""
    for name, module in model.named_modules():
        about = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if "expert" not in about or "router" in about or isinstance(module, ADAPTABLE):
            continue
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and not n.endswith("bias")}
        if own or isinstance(module, nn.ModuleList):
            count = len(module) if isinstance(module, nn.ModuleList) else len(next(iter(own.values())))
            yield name, count, [f"{name}.{n}" for n in own]


def _routers(every: dict[str, nn.Module], experts: list[tuple[str, int, list[str]]]) -> set[str]:
    """Linear modules that score the experts beside them, or weigh the shared one."""
    linear = {name: module for name, module in every.items() if isinstance(module, nn.Linear)}
    inside = tuple(f"{name}." for name, module in every.items() if "Router" in type(module).__name__)
    routers = {name for name in linear if "router" in name or name.startswith(inside)}
    for group, count, _ in experts:
        block = group.rpartition(".")[0]
        beside = [n for n in linear if n.rpartition(".")[0] in (block, f"{block}.gate") and "proj" not in n]
        routers |= {name for name in beside if linear[name].out_features in (1, count)}
    return routers


def _named(every: dict[str, nn.Module], stacked: list[str], names: str) -> list[str]:
    """Modules and expert tensors whose names end with one of these; a group of experts stands for its tensors."""
    modules, tensors = dict[str, None](), dict[str, None]()
    for name in names.split(","):
        ending = [full for full in every if ends_with(full, name)]
        own = [full for full in ending if isinstance(every[full], ADAPTABLE)]
        of_experts = [full for full in stacked if ends_with(full, name) or full.rpartition(".")[0] in ending]
        if not own and not of_experts:
            why = f"no module's name ends with {name}"
            if ending:
                why = f"{name} is a {type(every[ending[0]]).__name__}, which takes no adapter"
            raise UsageError(f"--lora-targets {names}: {why}; {_adaptable_names(every, stacked)}")
        modules.update(dict.fromkeys(own))
        tensors.update(dict.fromkeys(of_experts))
    return [*modules, *tensors]


def ends_with(full: str, name: str) -> bool:
    """Whether a module's full name ends with a name, as peft matches names."""
    return f".{full}".endswith(f".{name}")


def _adaptable_names(every: dict[str, nn.Module], stacked: list[str]) -> str:
    linear = {name.rpartition(".")[2] for name, module in every.items() if isinstance(module, LINEAR)}
    experts = sorted({kind_of(name) for name in stacked})
    tensors = f", and tensors of experts {', '.join(experts)}" if experts else ""
    return f"linear ones are {', '.join(sorted(linear))}{tensors}"


def _is_renamed(model: PreTrainedModel, end: str) -> bool:
    """Whether peft takes a target of this name for an expert of transformers 4, which is part of a tensor now."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[end])
    with suppress(ValueError):  # such a part alone cannot be one
        convert_peft_config_for_transformers(config, model=model, conversions=None)
        return end not in (config.target_modules or ())
    return True
