"""Log-probability of each response under a model.

Legend: P pairs, B rows, T tokens of a row, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_cli.batch import Layout, MicroBatch, lay_out, pack, row_costs
from dpo_cli.errors import DpoError
from dpo_cli.tokens import Pair

WINDOW = 512  # pairs of similar length that are packed together when order does not matter


@dataclass
class Scorer:
    """A model and the one way its forwards run, so that policy and reference go the same path.

    ``max_tokens`` shrinks when the device runs out of memory.

    Units: ``max_tokens`` in tokens a forward.
    """

    model: nn.Module
    layout: Layout
    dtype: torch.dtype
    max_tokens: int
    device: torch.device
    warn: Callable[[str], None] = lambda text: None

    def batch(self, pairs: Sequence[Pair]) -> MicroBatch:
        """The tensors of one forward, on the device."""
        return lay_out(pairs, self.layout).to(self.device)

    def token_logps(self, batch: MicroBatch) -> Tensor:
        """``token_logps`` of the model in the compute precision: (N,) nats."""
        return token_logps(self.model, batch, self.dtype)

    def costs(self, pairs: Sequence[Pair]) -> list[int]:
        """Tokens that each pair takes up in a forward."""
        return row_costs(pairs, self.layout)

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
        """Score all pairs in packed forwards, longest first; with less a forward where memory runs out.

        Yields: places of P pairs in ``pairs``; their logps (2P,), chosen first; their token log-probs (N,).

        Raises:
            DpoError: one pair alone does not fit the device's memory.
        """
        self.model.eval()
        costs = self.costs(pairs)
        by_length = sorted(range(len(pairs)), key=lambda i: (-costs[i], i))
        for start in range(0, len(by_length), WINDOW):
            waiting = pack(by_length[start : start + WINDOW], costs, self.layout, self.max_tokens)
            while waiting:
                scored = self._score([pairs[i] for i in waiting[0]])
                if scored is not None:
                    yield waiting.pop(0), *scored
                else:
                    self.shrink([pairs[i] for i in waiting[0]])
                    left = [i for indices in waiting for i in indices]
                    waiting = pack(left, costs, self.layout, self.max_tokens)

    def _score(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor] | None:
        """The sums (2P,) and token log-probs (N,) of one forward; None when memory ran out."""
        try:
            batch = self.batch(pairs)
            logps = self.token_logps(batch)
            return response_logps(logps, batch), logps
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None  # what the forward holds is free only when this frame is gone

    def shrink(self, pairs: Sequence[Pair]) -> None:
        """Halve ``max_tokens`` after a forward over these pairs ran out of memory, below what they took; tell it.

        Raises:
            DpoError: it was a single pair, so that nothing is left to halve.
        """
        taken = sum(self.costs(pairs)) if self.layout != "padded" else len(pairs) * max(self.costs(pairs))
        if len(pairs) == 1:
            raise DpoError(
                f"{pairs[0].where}: this pair alone ({taken:,} tokens) does not fit the device's memory; "
                "a lower --max-length helps, in training --gradient-checkpointing too"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_tokens = min(self.max_tokens, taken) // 2
        self.warn(f"out of memory at {taken:,} tokens a forward; going on with --max-tokens {self.max_tokens}")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory ran out: torch's own error, or that of a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


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
