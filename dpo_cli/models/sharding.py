"""A model whose weights, gradients and moments lie in shards over the ranks: torch's ``fully_shard`` (FSDP2).

Each layer is gathered when it runs and resharded afterwards; what is outside the layers (embeddings, last norm, head)
is gathered with the body's forward and stays until the backward pass is over, so that the head can run in between.
Everything is gathered and added up in float32: the numbers are those of a whole model but for the order of sums.

All ranks must run equally many forwards and backward passes, in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.models.logprobs import BODY
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import UsageError


def shard(model: Any, device: torch.device) -> None:
    """Shard a model on the host over the ranks' devices, in place, one layer after the other.

    Raises:
        UsageError: the model has no layers that are known as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError("--fsdp: the model has no layers of transformers' kind to shard by; leave it out")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in [*layers, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)  # a step's gradient is the sum of all ranks', not their mean
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # not yet in torch 2.11
            sharded.set_reduce_scatter_unused_params(True)  # an expert may get no token on one rank
    setattr(model, BODY, lambda **inputs: model.base_model(**inputs))
    register_fsdp_forward_method(model, BODY)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model was sharded."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free what the last forward gathered, so that the parameters are the shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor on all ranks, which must all call this; others are returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; others are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, which all ranks have, as ``like`` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather parameters and saved buffers of a sharded model on rank 0's host; a tied one once.

    All ranks must call this; the others get nothing.
    """
    reshard(model)
    gathered: dict[int, Tensor] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            full = full_tensor(tensor.detach())
            gathered[id(tensor)] = full.cpu() if distributed.rank() == 0 else full.new_empty(0)
        found[name] = gathered[id(tensor)]
    return found if distributed.rank() == 0 else {}


def iter_full_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Gather each tensor on the host, one after the other; all ranks must iterate."""
    for name, tensor in tensors.items():
        yield name, full_tensor(tensor.detach()).cpu()


def gathered_parameters(model: Any) -> int:
    """Count the parameters and gradients that a rank has gathered at a time.

    Those outside the layers and their gradients, two layers being gathered, one's gradients and their reduction.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return int(2 * rest + 4 * max(sizes))
