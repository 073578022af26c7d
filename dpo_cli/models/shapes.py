"""A model of which only the shapes are known, under torch's fake tensors: what a trace runs, see training/trace.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PreTrainedModel

from dpo_cli.data.batching import MicroBatch, collate
from dpo_cli.data.pairs import Pair
from dpo_cli.data.schedule import probe_pairs
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.layout import DESCRIPTIONS
from dpo_cli.models.logprobs import ModelRunner, forward_errors


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make and compute tensors without values within the block."""
    apply = nn.Module._apply

    def by_data(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
            tensor.data = function(tensor.data)
        return module

    # torch swaps a fake parameter with its cast one, and refuses that where anything refers to it (torch 2.13)
    nn.Module._apply = by_data  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


class ShapesRunner(ModelRunner):
    """A runner whose model has no values, and whose batches have: their shapes follow from them."""

    def batch(self, pairs: Sequence[Pair], ld_alpha: float = 1.0) -> MicroBatch:
        """Build the tensors of one forward, real ones on the CPU."""
        with unset_fake_temporarily():
            batch = collate(pairs, self.layout, ld_alpha, self.max_logit_rows)
        return batch.to(self.device)


@torch.no_grad()
def assume_layout(
    model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[ModelRunner, str]:
    """Take the layout ``shared`` if the model's code can run it, and say that it is assumed.

    Raises:
        UsageError: it cannot; which other layout gives the right numbers is not known without values.
    """
    runner = ShapesRunner(model, "shared", dtype, max_tokens, device)
    remedy = "; only its weights show which layout it takes, so leave out --trace"
    with forward_errors("--trace: this model does not run in shared rows", remedy), attention(model, PREFIX_SHARED):
        runner.token_logps(runner.batch(probe_pairs(pairs, "shared", max_tokens)[-1:]))
    return runner, f"{DESCRIPTIONS['shared']}; assumed, as without values nothing can be compared"
