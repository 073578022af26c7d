"""The losses at margins worked by hand, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from dpo_cli.losses import sigmoid_loss

BETA = 0.5
# Three pairs whose margins beta * h are 0, 1 and 2: h is 0, 2 and 4 nats, gained on both sides.
LOGPS = [-10.0, -11.0, -12.0, -20.0, -23.0, -23.0]
REF_LOGPS = [-10.0, -12.0, -13.0, -20.0, -22.0, -20.0]
MARGINS = [0.0, 1.0, 2.0]


def at_margins(*margins: float, beta: float = BETA) -> tuple[Tensor, Tensor]:
    """Log-probs whose margins, in nats times beta, are these; the reference's are not zero."""
    ref_logps = torch.tensor([-7.0, -5.0]).repeat_interleave(len(margins))
    logps = ref_logps.clone()
    logps[: len(margins)] += torch.tensor(margins) / beta
    return logps.requires_grad_(), ref_logps


def test_worked_by_hand() -> None:
    losses = sigmoid_loss(torch.tensor(LOGPS), torch.tensor(REF_LOGPS), BETA)
    assert losses.shape == (3,)
    # -log sigma(m) = log(1 + e^-m): ln 2, ln 1.3678794, ln 1.1353353
    assert losses.tolist() == pytest.approx([0.6931472, 0.3132617, 0.1269280], abs=1e-6)


def test_label_smoothing_by_hand() -> None:
    losses = sigmoid_loss(torch.tensor(LOGPS), torch.tensor(REF_LOGPS), BETA, label_smoothing=0.1)
    # 0.9 log(1 + e^-m) + 0.1 log(1 + e^m), and log(1 + e^m) = m + log(1 + e^-m): the smooth part adds 0.1 m
    assert losses.tolist() == pytest.approx([0.6931472, 0.4132617, 0.3269280], abs=1e-6)


def test_the_reference_is_subtracted() -> None:
    """Adding to a response under policy and reference alike changes nothing."""
    logps, ref_logps, shift = torch.tensor(LOGPS), torch.tensor(REF_LOGPS), torch.arange(6.0)
    torch.testing.assert_close(
        sigmoid_loss(logps + shift, ref_logps + shift, BETA), sigmoid_loss(logps, ref_logps, BETA)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient(smoothing: float) -> None:
    """-beta * sigma(-margin) a pair by the chosen log-prob, the opposite by the rejected; smoothing mixes the signs."""
    logps = torch.tensor(LOGPS, requires_grad=True)
    sigmoid_loss(logps, torch.tensor(REF_LOGPS), BETA, smoothing).sum().backward()
    wanted = [-(1 - smoothing) * BETA / (1 + math.exp(m)) + smoothing * BETA / (1 + math.exp(-m)) for m in MARGINS]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(wanted + [-g for g in wanted], abs=1e-6)


def test_gradient_vanishes_at_the_smoothed_optimum() -> None:
    """With a share eps of flipped labels the best margin is log((1 - eps) / eps): 2.1972 for 0.1."""
    logps, ref_logps = at_margins(math.log(9))
    sigmoid_loss(logps, ref_logps, BETA, label_smoothing=0.1).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_huge_margins(smoothing: float, dtype: torch.dtype) -> None:
    logps, ref_logps = at_margins(1000.0, -1000.0)
    leaf = logps.detach().to(dtype).requires_grad_()
    losses = sigmoid_loss(leaf, ref_logps.to(dtype), BETA, smoothing)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1000 * smoothing, 1000 * (1 - smoothing)], rel=1e-2)
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert leaf.grad[1].item() == pytest.approx(-BETA * (1 - smoothing), rel=1e-2)  # a lost pair pulls with all of beta
