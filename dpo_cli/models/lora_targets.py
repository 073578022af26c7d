"""Which matrices a LoRA adapter is put on, by their full names, and why others get none.

peft's own ``all-linear`` goes by the last part of a name. In mixtures of experts it adapts routers and leaves out
shared experts and dense layers, and in a model that reads images too it adapts what no text runs through.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_cli.utils.errors import UsageError

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)  # GPT-2's are of transformers' own kind
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d)  # what can be named
# Why a matrix gets no adapter.
ROUTER, UNREACHED, OWN_FORWARD = "routers", "no log-prob of text depends on them", "more than a matrix product"
READ_DIRECTLY, NOT_NAMED = "read by fused kernels", "experts that --lora-targets does not name"
# A weight that the layer around it reads, as fused kernels of state-space models do, and not only its dtype or device.
READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")


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
    else:
        named = _named(every, stacked, names)
    routers = _routers(every, experts) if names == ALL_LINEAR else set[str]()
    reached, read = _reached(model, logps), _read_directly(model)
    renamed = {end for end in {name.rpartition(".")[2] for name in named if name in every} if _is_renamed(model, end)}
    modules, parameters, left = list[str](), list[str](), defaultdict[str, Counter[str]](Counter)
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
            left[reason][kind_of(name)] += 1
        elif module and not as_parameter:
            modules.append(name)
        else:
            parameters.append(f"{name}.weight" if module else name)
    if names != ALL_LINEAR:
        if beyond := [(kind, reason) for reason, kinds in left.items() if reason != UNREACHED for kind in kinds]:
            kind, reason = beyond[0]
            raise UsageError(f"--lora-targets {names}: {kind} is {reason}, so that no adapter reaches it")
        if unnamed := Counter(kind_of(name) for name in stacked if name not in named):
            left[NOT_NAMED] = unnamed
    if not modules and not parameters:
        raise UsageError(f"--lora-targets {names}: nothing to adapt; {_adaptable_names(every, stacked)}")
    return Targets(modules, parameters, left)


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
    groups: dict[int, list[str]] = {}
    for kind, count in sorted(kinds.items()):
        groups.setdefault(count, []).append(kind)
    words = {count: "each of " if len(group) > 1 else "" for count, group in groups.items()}
    return "; ".join(f"{count:,} {words[count]}{', '.join(groups[count])}" for count in sorted(groups, reverse=True))


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
                with suppress(OSError, TypeError):  # its source is not there
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
    found = {name for name in linear if "router" in name or name.startswith(inside)}
    for group, count, _ in experts:
        block = group.rpartition(".")[0]
        beside = [n for n in linear if n.rpartition(".")[0] in (block, f"{block}.gate") and "proj" not in n]
        found |= {name for name in beside if linear[name].out_features in (1, count)}
    return found


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
