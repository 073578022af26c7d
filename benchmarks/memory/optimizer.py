"""What the optimizer's memory modes cost and how true their moments are.

speed      seconds of a step on the shapes of SmolLM2-135M, random gradients, a process a mode
operators  operators of a step on the shapes of Llama-3.1-8B, counted on fake tensors
moments    updates of AdamW, of this optimizer and of torchao's 8-bit AdamW where it is installed, on real gradients

    python benchmarks/memory/optimizer.py speed
    python benchmarks/memory/optimizer.py operators
    python benchmarks/memory/optimizer.py moments --model FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training.optimizer import BYTES, SPLIT_MODES, SmallAdamW, make_optimizer

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TENSORS = ["model.embed_tokens", *(f"model.layers.{n}.mlp.{name}" for n, name in ((15, "down_proj"), (29, "up_proj")))]
TENSORS += ["model.layers.0.self_attn.q_proj", "model.layers.20.self_attn.o_proj"]
VALUES, STEPS = 32768, (20, 100, 500)  # of each tensor; when the updates are compared


def take_step(optimizer: Any, memory: str, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    if memory == "in-backward":
        with optimizer.fused_backward():
            pass
    else:
        optimizer.step()


def speed(memory: str, steps: int = 4) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2))
    optimizer = make_optimizer(model, 0.1, memory, split_master_weights(model) if memory in SPLIT_MODES else None)
    took = []
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random).mul_(1e-3).to(p.dtype)
        wall, cpu = time.perf_counter(), time.process_time()
        take_step(optimizer, memory, 1e-6)
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
        optimizer.zero_grad()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held += sum(p.nbytes for p in model.parameters())
    wall, cpu = (min(column) for column in zip(*took[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{memory:12s} {wall:5.2f} s  {cpu:5.2f} CPU s  {peak:,.0f} MiB peak  "
        f"{held / model.num_parameters():.2f} bytes a parameter in weights and state"
    )


class Operators(TorchDispatchMode):
    """Counts the operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace != "prim"
        return func(*args, **kwargs or {})


def operators(memory: str) -> tuple[int, int]:
    """Operators of the optimizer's second step, and the tensors that it updates."""
    with FakeTensorMode():
        config = AutoConfig.for_model("llama", **LLAMA_8B)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = make_optimizer(model, 0.1, memory, split_master_weights(model) if memory in SPLIT_MODES else None)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            with Operators() as counted:
                take_step(optimizer, memory, 1e-6)
    return counted.count, len(list(model.parameters()))


def gradients(folder: str, rows: int = 20) -> dict[str, Tensor]:
    """The DPO gradient of single sample rows at the start: (rows, VALUES) of each tensor."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[Tensor]] = {name: [] for name in TENSORS}
    with open("sample_data/train-strings.jsonl", encoding="utf-8") as stream:  # noqa: PTH123
        lines = [json.loads(line) for line in stream][:rows]
    for row in lines:
        sums = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side], return_tensors="pt").input_ids[:, :120]
            sums.append(-model(input_ids=ids, labels=ids).loss * ids.shape[1])
        (-0.05 * (sums[0] - sums[1])).backward()
        for name in TENSORS:
            found[name].append(model.get_submodule(name).weight.grad.reshape(-1)[:VALUES].clone())
        model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def update_of(memory: str) -> Callable[[Tensor], Tensor]:
    """A function from the step's gradient to the update that it makes, in learning rates."""
    weight = nn.ParameterList([nn.Parameter(torch.zeros(VALUES // 256, 256))])
    groups = [{"params": list(weight), "weight_decay": 0.0}]
    optimizer = make_optimizer(weight, 0.0) if memory == "full" else SmallAdamW(groups, {})

    def update(gradient: Tensor) -> Tensor:
        weight[0].data.zero_()
        weight[0].grad = gradient.view(-1, 256).clone()
        take_step(optimizer, memory, 1.0)
        return -weight[0].detach().view(-1).clone()

    return update


def torchao_update() -> Callable[[Tensor], Tensor]:
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    step, lr = torch.tensor(0.0), torch.tensor(1.0)
    moments = [OptimState8bit.zeros((VALUES,), signed, 256) for signed in (True, False)]

    def update(gradient: Tensor) -> Tensor:
        weight = torch.zeros(VALUES)
        step.add_(1)
        single_param_adam(weight, gradient, step, *moments, None, lr, 0.9, 0.999, 0.0, 1e-8, True, False)
        return -weight

    return update


def moments(folder: str) -> None:
    """Each value's gradients change their size over the run, e-fold either way, and their signs are shuffled."""
    for name, grads in gradients(folder).items():
        torch.manual_seed(0)
        drift, signs = torch.randn(VALUES), torch.randint(0, 2, (64, VALUES)) * 2 - 1
        updates = {"exact": update_of("full"), "8 bits": update_of("split")}
        try:
            updates["torchao"] = torchao_update()
        except ImportError:
            print("torchao is not installed")
        errors: dict[str, list[str]] = {each: [] for each in updates}
        largest = dict.fromkeys(updates, 0.0)
        for step in range(1, STEPS[-1] + 1):
            gradient = grads[(step * 7 + step // 20) % len(grads)] * torch.exp(drift * step / STEPS[-1])
            done = {each: update(gradient * signs[step % 64]) for each, update in updates.items()}
            for each, update in done.items():
                largest[each] = max(largest[each], float(update.abs().max()))
                if step in STEPS:
                    errors[each].append(f"{float((update - done['exact']).norm() / done['exact'].norm()):8.1%}")
        print(f"{name}: error of the update after {STEPS} steps; largest update of all, in learning rates")
        for each in updates:
            print(f"    {each:8s} {' '.join(errors[each])}   {largest[each]:10,.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "operators", "moments"])
    parser.add_argument("--memory", choices=BYTES)
    parser.add_argument("--model", help="folder of the model whose gradients are taken")
    arguments = parser.parse_args()
    if arguments.what == "moments":
        moments(arguments.model)
    elif arguments.what == "operators":
        for memory in [arguments.memory] if arguments.memory else sorted(SPLIT_MODES):
            count, tensors = operators(memory)
            print(f"{memory:12s} {count:,} operators for {tensors} tensors")
    elif arguments.memory:
        speed(arguments.memory)
    else:
        for memory in BYTES:
            subprocess.run([sys.executable, __file__, "speed", "--memory", memory], check=True)


if __name__ == "__main__":
    main()
