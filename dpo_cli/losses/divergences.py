"""The f-divergences that may hold a policy to its reference, as functions of the log-ratio."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import TYPE_CHECKING

from dpo_cli.losses.preference import Divergence, logsigmoid, reverse_kl

if TYPE_CHECKING:
    from torch import Tensor

# f'(u) of the ratio u = pi/ref, as a function of log u (table 1 of arXiv 2309.16240), without their common constant;
# that of the reverse KL, log u, is in preference.py.


def forward_kl(logratios: Tensor) -> Tensor:
    """1 - 1/u: the alpha-divergence at alpha = 0."""
    return alpha_divergence(logratios, 0.0)


def js_divergence(logratios: Tensor) -> Tensor:
    """log(2u / (1 + u))."""
    return math.log(2) + logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, alpha: float = 0.5) -> Tensor:
    """(u^(alpha - 1) - 1) / (alpha - 1), ratios beyond e^80 clamped."""
    power = alpha - 1
    return logratios if abs(power) < 1e-6 else ((power * logratios).clamp(max=80).exp() - 1) / power


DIVERGENCES = {each.__name__: each for each in (reverse_kl, forward_kl, js_divergence, alpha_divergence)}


@cache
def divergence(text: str) -> Divergence:
    """Parse ``--f-divergence``.

    Raises:
        ValueError: there is no such divergence.
    """
    name, given, alpha = text.partition("=")
    if name not in DIVERGENCES or (given and name != "alpha_divergence") or (given and not math.isfinite(float(alpha))):
        raise ValueError(text)
    return partial(alpha_divergence, alpha=float(alpha)) if given else DIVERGENCES[name]
