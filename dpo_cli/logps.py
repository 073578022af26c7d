"""Log-probability of each response under a model.

Legend: P pairs, B rows, T tokens of a row, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_cli.batch import Layout, MicroBatch, lay_out, pack, row_cost
from dpo_cli.tokens import Pair

WINDOW = 512  # pairs of similar length that are packed together when order does not matter


@dataclass(frozen=True)
class Scorer:
    """A model and the one way its forwards run, so that policy and reference go the same path.

    Units: ``max_tokens`` in tokens a forward.
    """

    model: nn.Module
    layout: Layout
    dtype: torch.dtype
    max_tokens: int
    device: torch.device

    def batch(self, pairs: Sequence[Pair]) -> MicroBatch:
        """The tensors of one forward, on the device."""
        return lay_out(pairs, self.layout).to(self.device)

    def token_logps(self, batch: MicroBatch) -> Tensor:
        """``token_logps`` of the model in the compute precision: (N,) nats."""
        return token_logps(self.model, batch, self.dtype)

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
        """Score all pairs in packed forwards, longest first.

        Yields: places of P pairs in ``pairs``; their logps (2P,), chosen first; their token log-probs (N,).
        """
        self.model.eval()
        costs = [row_cost(pair, self.layout) for pair in pairs]
        by_length = sorted(range(len(pairs)), key=lambda i: (-costs[i], i))
        for start in range(0, len(by_length), WINDOW):
            for indices in pack(by_length[start : start + WINDOW], costs, self.layout, self.max_tokens):
                batch = self.batch([pairs[i] for i in indices])
                logps = self.token_logps(batch)
                yield indices, response_logps(logps, batch), logps


def token_logps(model: nn.Module, batch: MicroBatch, dtype: torch.dtype) -> Tensor:
    """Log-probability of every response token given all tokens before it.

    Only hidden states that predict a response token meet the head: ``logits_to_keep`` leaves that to the model's own
    forward, with whatever bias, scale or soft-cap its head has.

    Shapes: -> (N,), float32, responses in the batch's order.
    Units: nats.
    """
    keep, row, column = _kept_columns(batch)
    inputs = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask, "segments": batch.segments}
    given = {name: value for name, value in inputs.items() if value is not None}
    with torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=batch.input_ids, logits_to_keep=keep, use_cache=False, **given).logits  # (B, kept, V)
    logits = logits[0] if row is None else logits[row, column]  # (N, V)
    return -F.cross_entropy(logits.float(), batch.targets, reduction="none")


def _kept_columns(batch: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Columns whose logits the model computes, and where among them the predictors are (None: just so)."""
    width = batch.input_ids.shape[1]
    if batch.input_ids.shape[0] == 1:
        return batch.predictors, None, None
    keep, column = torch.unique(batch.predictors % width, return_inverse=True)
    return keep, batch.predictors // width, column


def response_logps(token_logps: Tensor, batch: MicroBatch) -> Tensor:
    """Sum token log-probs to one number a response.

    Shapes: (N,) -> (2P,), float32, all chosen first and then all rejected.
    Units: nats.
    """
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=batch.lengths, unsafe=True)  # (2P,) pair by pair
    return sums.float().view(-1, 2).T.reshape(-1)


def noise(dtype: torch.dtype) -> float:
    """How far two computations of one response's log-prob may lie apart by arithmetic alone.

    Units: nats per square root of the response's tokens. Source: docs/performance.md, "Arithmetic noise".
    """
    return 1e-3 if dtype == torch.float32 else 0.1
