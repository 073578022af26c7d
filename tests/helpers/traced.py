"""A step of a small model on fake tensors of a device, CPU or CUDA, watched as `--trace` does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.data.schedule import build_schedule
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.shapes import ShapesRunner, shapes_only
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.optimizer import SPLIT_MODES, make_optimizer
from dpo_cli.training.step import Trainer
from dpo_cli.training.trace import Watch, watch_step
from dpo_cli.utils.cards import CARDS, standing_in

SIZES = {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}


class Copies(TorchDispatchMode):
    """Copies between the host and the device: all, and those for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.blocking = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        devices = {x.device.type for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        if (target := kwargs.get("device")) is not None:
            devices.add(torch.device(target).type)
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.all += 1
            if not kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2]):
                self.blocking.append(f"{name} {tuple(args[0].shape)}")
        return func(*args, **kwargs)


def traced_step(device: str, memory: str, recompute: bool) -> dict[str, Any]:
    rng, watch, copies = np.random.default_rng(0), Watch(device), Copies()
    pairs = Pairs(
        Pair(f"row {i}", *(rng.integers(3, 500, n).astype(np.int32) for n in rng.integers(20, 150, 3)))
        for i in range(32)
    )
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **SIZES)
    with standing_in(CARDS["h100"]), shapes_only(), watch:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=PREFIX_SHARED).eval()
        low = split_master_weights(model) if memory in SPLIT_MODES else None
        runner = ShapesRunner(model, "shared", torch.bfloat16, 4096, torch.device(device))
        choice, costs = choose_memory(runner, pairs, 0, memory, recompute, 4096), runner.costs(pairs)
        order = {"batch_size": 16, "epochs": 1, "max_steps": 1, "world_size": 1, "seed": 0}
        (step,) = build_schedule(pairs, "shared", max_tokens=4096, **order)
        if recompute:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        norm = 0.0 if memory == "in-backward" else 1.0
        options = TrainOptions(data=["x"], batch_size=16, memory=memory, max_grad_norm=norm, max_tokens=4096)
        optimizer, zeros = make_optimizer(model, 0.0, memory, low), torch.zeros(len(pairs), 2)
        del low
        trainer = Trainer(runner, optimizer, pairs, costs, zeros, zeros, options)
        with copies:
            watch_step(trainer, watch, step)
        estimate = choice.estimate([step], costs, pairs, runner)
    flash, waits = watch.operators["_varlen_attn"], len(watch.waits)
    found = {"flash": flash, "waits": waits, "peak": watch.highest, "parts": watch.peak, "estimate": estimate}
    return found | {"forwards": len(step), "copies": copies.all, "blocking": copies.blocking}
