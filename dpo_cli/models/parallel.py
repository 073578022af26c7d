"""How the model of a run lies over its processes: whole in each, or in shards by torch's ``fully_shard`` (FSDP2).

Of a sharded model each layer is gathered when it runs and resharded afterwards; what is outside the layers (embeddings,
last norm, head) is gathered with the body's forward and stays until the backward pass is over, so that the head can run
in between. Everything is gathered and added up in float32: the numbers are those of a whole model but for the order of
sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_cli.utils import distributed
from dpo_cli.utils.errors import UsageError

BODY = "run_body"  # method of a sharded model that runs its body and gathers the parameters outside the layers

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """How the processes of a run, one or several, share its model; all differences between the two ways are here.

    ``sharded``: each holds a shard of each parameter, of its gradient and of its moments, and all must run equally many
    forwards and backward passes. Else each holds the whole model, and a step ends with the sum of the gradients.
    """

    sharded: bool

    def run(self, action: Callable[[], T]) -> T:
        """Run the model outside of the steps: in shards on all ranks in step, else on rank 0 for all."""
        return action() if self.sharded else distributed.on_rank_0(action)

    def on_rank_0(self, action: Callable[[], T]) -> T:
        """Run ``action`` on one rank only, within ``run``."""
        return distributed.on_rank_0(action) if self.sharded else action()

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any of the ranks in ``run``."""
        return bool(distributed.all_reduce_max([flag])[0]) if self.sharded else flag

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Sum the gradients over the ranks and clip them; returns their norm before: ()."""
        if not self.sharded:  # else the backward pass has reduced them
            distributed.all_reduce_gradients([p for p in model.parameters() if p.requires_grad])
        parameters = [p for p in model.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
        return full_tensor(norm.detach())

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather tensors one after the other on rank 0's host, tied ones once; all ranks must call this.

        The other ranks get nothing of a sharded model. Tensors of a whole one are returned unchanged.
        """
        if not self.sharded:
            return dict(tensors)
        gathered: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in gathered:
                full = full_tensor(tensor.detach())
                gathered[id(tensor)] = full.cpu() if distributed.rank() == 0 else full.new_empty(0)
        return {name: gathered[id(t)] for name, t in tensors.items()} if distributed.rank() == 0 else {}

    def gathered_parameters(self, model: nn.Module) -> int:
        """Count the parameters and gradients that a rank has gathered at a time.

        Those outside the layers and their gradients, two gathered layers, one's gradients and their reduction.
        """
        if not self.sharded:
            return 0
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers(model)]
        rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
        return int(2 * rest + 4 * max(sizes))


def parallel_of(model: nn.Module) -> Parallel:
    """Return how a model lies over the processes."""
    return Parallel(sharded=isinstance(model, FSDPModule))


def shard(model: Any, device: torch.device) -> None:
    """Shard a model on the host over the ranks' devices, in place, one layer after the other.

    Raises:
        UsageError: the model has no layers that are known as such, or there is one process.
    """
    if not distributed.is_launched():
        raise UsageError("--fsdp: there is one process to shard over; start it with torchrun")
    blocks = layers(model)
    if not blocks:
        raise UsageError("--fsdp: the model has no layers of transformers' kind to shard by; leave it out")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in [*blocks, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)  # a step's gradient is the sum of all ranks', not their mean
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # not yet in torch 2.11
            sharded.set_reduce_scatter_unused_params(True)  # an expert may get no token on one rank
    setattr(model, BODY, lambda **inputs: model.base_model(**inputs))
    register_fsdp_forward_method(model, BODY)


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, of transformers' kind, which are recomputed or sharded one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def reshard(model: nn.Module) -> None:
    """Free what the last forward of a sharded model gathered, so that the parameters are the shards."""
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
