"""The preference losses as pure functions.

Legend: P pairs. Responses are ordered chosen first: ``logps[:P]`` chosen, ``logps[P:]`` rejected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    logps: Tensor,
    ref_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    margins: Tensor | float = 0.0,
    weights: Tensor | float = 1.0,
) -> Tensor:
    """The DPO loss of each pair, conservative where labels may be flipped, with a margin and times a weight.

        loss = -weight * ((1 - eps) log sigma(beta * h - margin) + eps log sigma(-beta * h - margin)),
        h = log pi(yw|x)/ref(yw|x) - log pi(yl|x)/ref(yl|x)

    A flipped label says that the rejected response is better, by the same margin: so to exchange the two responses is
    to exchange eps and 1 - eps, and a label that says nothing (eps = 1/2) pulls to no side.

    Shapes: ``logps``, ``ref_logps`` (2P,), ``margins`` and ``weights`` (P,) or one for all -> (P,).
    Units: nats.
    Source: equation 7 of arXiv 2305.18290; label smoothing eps after https://ericmitchell.ai/cdpo.pdf; the margin is
        the offset of arXiv 2402.10571.
    """
    chosen, rejected = (logps - ref_logps).chunk(2)
    gained = beta * (chosen - rejected)  # (P,)
    right, flipped = F.logsigmoid(gained - margins), F.logsigmoid(-gained - margins)
    return weights * (-(1 - label_smoothing) * right - label_smoothing * flipped)
