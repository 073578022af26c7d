"""How evenly a mixture of experts routes its tokens: the auxiliary loss of its routers.

The loss is a product of two means over all tokens of a step. So that its gradient does not depend on how the step is
cut into micro-batches, the shares of the tokens that each expert gets, which have no gradient, are counted over the
whole step before the first backward pass. A prompt counts twice, as both sequences of a pair have it, in every layout.

Legend: B rows, T tokens of a row, E experts, L layers that have a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.data.collate import MicroBatch


@dataclass(frozen=True)
class Routed:
    """Sums over the layers and tokens of a forward.

    Shapes: ``probabilities`` (E,), those that the routers give each expert, with their graph; ``counts`` (E + 1,), how
    often each expert was chosen, and behind them the number of tokens, all times the layers.
    """

    probabilities: Tensor
    counts: Tensor


def routed(router_logits: Sequence[Tensor], batch: MicroBatch, experts: int) -> Routed:
    """Sum up what the routers of one forward say, whose tokens go to ``experts`` experts each.

    Shapes: ``router_logits`` L of (B * T, E).
    """
    times = _times(batch)  # (B * T,)
    probabilities, chosen = [], []
    for logits in router_logits:
        each = logits.float().view(len(times), -1).softmax(-1)
        best = torch.zeros_like(each).scatter_(1, each.topk(experts).indices, 1.0)
        probabilities.append(times @ each)
        chosen.append((times.double() @ best.double()).detach())
    tokens = times.double().sum()[None] * len(router_logits)
    return Routed(torch.stack(probabilities).sum(0), torch.cat([torch.stack(chosen).sum(0), tokens]))


def auxiliary_loss(part: Routed, counts: Tensor) -> Tensor:
    """What a forward adds to the load-balancing loss of a step with these ``counts`` (E + 1,): ().

        loss = E * sum over experts of f * p,
        f = share of the tokens that the expert is chosen for, p = mean probability that it is given

    It is the number of experts a token goes to where all are used evenly, and more where they are not.

    Source: equations 4 to 6 of arXiv 2101.03961, over all layers at once as in transformers; over a whole step as in
        arXiv 2501.11873.
    """
    shares = (counts / counts[-1])[:-1].to(part.probabilities)
    return len(shares) * (shares * part.probabilities).sum() / counts[-1].to(part.probabilities)


def _times(batch: MicroBatch) -> Tensor:
    """How often a pair's two sequences have each token of a forward: (B * T,), float32."""
    ids = batch.input_ids
    if batch.segments:
        parts = torch.tensor([n for p, c, r in batch.segments.spans for n in (p, c + r)])
        return torch.tensor([2.0, 1.0]).repeat(len(parts) // 2).repeat_interleave(parts).to(ids.device)
    mask = batch.attention_mask
    return (torch.ones_like(ids) if mask is None else mask).flatten().float()
