"""Experts under autocast: grouped products in bfloat16, gradients in float32. On a CPU, as CUDA does it otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.data.batching import collate
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner, precision, response_logps
from tests.helpers.families import make
from tests.models.test_flash import LENGTHS, pairs_of

MIXTURES = ["qwen3_moe", "mixtral", "gpt_oss"]


class Products(TorchDispatchMode):
    """The types of the factors of each grouped product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            self.dtypes.append((args[0].dtype, args[1].dtype))
        return func(*args, **kwargs or {})


def run(model: nn.Module, dtype: torch.dtype, checkpointing: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of responses and gradients, of a forward in training mode with shared prompts."""
    model.zero_grad()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    batch = collate(pairs_of(LENGTHS), "shared")
    with attention(model, PREFIX_SHARED):
        runner = ModelRunner(model.train(), "shared", dtype, 256, torch.device("cpu"))
        logps = response_logps(runner.token_logps(batch), batch.lengths)
        logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_products_are_bfloat16_and_gradients_float32(family: str, checkpointing: bool) -> None:
    """Forward, backward and recomputed; float32 without autocast."""
    model = make(family)
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        with Products() as seen:
            _, gradients = run(model, dtype, checkpointing)
        assert {grad.dtype for grad in gradients.values()} == {torch.float32}
        assert sum("experts" in name for name in gradients) >= 4
        products[dtype] = seen.dtypes
        assert set(seen.dtypes) == {(dtype, dtype)}
    assert len(products[torch.bfloat16]) == len(products[torch.float32]) >= 12


@pytest.mark.parametrize("family", MIXTURES)
def test_they_equal_the_models_own_loop_within_the_noise_of_bfloat16(family: str) -> None:
    """A linear layer per expert, which autocast knows. Routers agree: what differs is the order of sums."""
    model = make(family)
    exact, exact_gradients = run(model, torch.float32)
    grouped, gradients = run(model, torch.bfloat16)
    model.set_experts_implementation("eager")
    looped, looped_gradients = run(model, torch.bfloat16)
    assert (grouped - looped).abs().max() <= 2 * (looped - exact).abs().max()
    for name, gradient in looped_gradients.items():
        noise = (gradient - exact_gradients[name]).norm()
        assert (gradients[name] - gradient).norm() <= 2 * noise + 1e-6, name


@pytest.mark.skipif(
    bool(torch.version.cuda) and not torch.cuda.is_available(),
    reason="a CUDA build wants a driver for fake tensors too",
)
def test_cuda_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which refuse float32 factors as the fast kernel does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
    with FakeTensorMode(), Products() as seen, torch.no_grad():
        rows, weights = torch.empty(32, 64, device="cuda"), torch.empty(4, 64, 48, device="cuda")
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        with precision(rows.device, torch.bfloat16):
            out = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    assert seen.dtypes == [(torch.bfloat16, torch.bfloat16)] and out.dtype == torch.bfloat16
