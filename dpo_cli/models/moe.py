"""The load-balancing loss of a mixture of experts.

The loss is a product of two means over all tokens of a step. So that its gradient does not depend on how the step is
cut into micro-batches, the share of the tokens that each expert gets, which has no gradient, is counted over the whole
step before the first backward pass. A token counts once per sequence that contains it, in every layout: a prompt twice.
A tree routes it once, which gives the same choice for all of its sequences.

Legend: B rows, T tokens of a row, E experts, L layers that have a router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_cli.data.batching import MicroBatch, padded
from dpo_cli.data.pairs import Pair
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.utils.errors import UsageError


def routed(router_logits: Sequence[Tensor], batch: MicroBatch, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """Sum the routers' probabilities over the layers and tokens of a forward, and count their choices.

    Shapes: ``router_logits`` L of (B * T, E) -> ``probabilities`` (E,), with their graph, and ``counts`` (E + 1,): how
    often each expert was chosen, then the number of tokens, all times the layers. Zeros for a dummy batch.
    """
    times = token_counts(batch)  # (B * T,)
    probabilities, chosen = [], []
    for logits in router_logits:
        each = logits.float().view(len(times), -1).softmax(-1)
        best = torch.zeros_like(each).scatter_(1, each.topk(num_experts_per_tok).indices, 1.0)
        probabilities.append(times @ each)
        chosen.append((times @ best).long())  # exact: below 2^24 in a forward
    tokens = times.sum().long()[None] * len(router_logits)
    return torch.stack(probabilities).sum(0), torch.cat([torch.stack(chosen).sum(0), tokens])


def auxiliary_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Compute the share of a forward (E,) in the load-balancing loss of a step with these ``counts`` (E + 1,): ().

        loss = E * sum over experts of f * p,
        f = share of the tokens routed to the expert, p = mean of its probability

    It equals ``num_experts_per_tok`` where all experts are used evenly, and is larger where they are not.

    Source: equations 4 to 6 of arXiv 2101.03961, over all layers at once as in transformers; over a whole step as in
        arXiv 2501.11873.
    """
    shares = (counts / counts[-1])[:-1].to(probabilities)
    return len(shares) * (shares * probabilities).sum() / counts[-1].to(probabilities)


def token_counts(batch: MicroBatch) -> Tensor:
    """Count how many sequences contain each token of a forward: (B * T,), float32; 0 for padding and dummy batches."""
    ids = batch.input_ids
    if batch.dummy:
        return torch.zeros(ids.numel(), device=ids.device)
    if batch.segments:
        return batch.segments.uses
    mask = batch.attention_mask
    return (torch.ones_like(ids) if mask is None else mask).flatten().float()


@torch.no_grad()
def experts_per_token(runner: ModelRunner, pair: Pair) -> int:
    """Return the experts per token of a mixture whose load-balancing loss is known.

    Raises:
        UsageError: the model is no mixture of experts, or its own loss of a pair differs from ours.
    """
    model: Any = runner.model
    batch = padded([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]).to(runner.device)
    try:
        experts = int(model.config.get_text_config().num_experts_per_tok)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        own = float(model(**inputs, output_router_logits=True, use_cache=False).aux_loss)
        hidden = replace(runner, dtype=torch.float32).body(batch, output_router_logits=True)
        ours = float(auxiliary_loss(*routed(hidden.router_logits, batch, experts)))
        if math.isclose(own, ours, rel_tol=1e-4):
            return experts
        why = f"balances its experts by another loss ({own:.6g}, not {ours:.6g})"
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        why = "is no mixture of experts whose routers can be read"
        if not runner.chunked_lm_head:
            why = "has a head that cannot run apart from its body"
    raise UsageError(f"--router-aux-loss-coef: {type(model).__name__} {why}; leave it out")
