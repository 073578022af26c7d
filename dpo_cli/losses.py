"""The preference losses as pure functions.

Legend: P pairs. Responses are ordered chosen first: ``logps[:P]`` chosen, ``logps[P:]`` rejected.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(logps: Tensor, ref_logps: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The DPO loss, conservative where labels may be flipped.

        loss = -(1 - eps) log sigma(beta * h) - eps log sigma(-beta * h),
        h = log pi(yw|x)/ref(yw|x) - log pi(yl|x)/ref(yl|x)

    Shapes: ``logps``, ``ref_logps`` (2P,) -> (P,).
    Units: nats.
    Source: equation 7 of arXiv 2305.18290; label smoothing eps after https://ericmitchell.ai/cdpo.pdf.
    """
    chosen, rejected = (logps - ref_logps).chunk(2)
    margins = beta * (chosen - rejected)  # (P,)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
