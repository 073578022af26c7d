"""The losses at margins worked by hand, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import sigmoid_loss

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


def test_margins_and_weights_by_hand() -> None:
    margins, weights = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([2.0, 0.5, 3.0])
    losses = sigmoid_loss(torch.tensor(LOGPS), torch.tensor(REF_LOGPS), BETA, 0.0, margins, weights)
    # 2 log(1 + e^0.5), 0.5 log(1 + e^-1), 3 log(1 + e^-3)
    assert losses.tolist() == pytest.approx([1.9481540, 0.1566308, 0.1457621], abs=1e-6)


def test_a_flipped_label_has_the_margin_on_its_side_by_hand() -> None:
    losses = sigmoid_loss(torch.tensor(LOGPS), torch.tensor(REF_LOGPS), BETA, 0.1, torch.ones(3))
    # 0.9 log(1 + e^(1 - m)) + 0.1 log(1 + e^(1 + m)) for m = 0, 1, 2
    wanted = [0.9 * 1.3132617 + 0.1 * 1.3132617, 0.9 * 0.6931472 + 0.1 * 2.1269280, 0.9 * 0.3132617 + 0.1 * 3.0485874]
    assert losses.tolist() == pytest.approx(wanted, abs=1e-6)


def test_to_exchange_the_responses_is_to_exchange_the_labels() -> None:
    margins, logps, ref_logps = torch.tensor([0.5, 0.0, -1.0]), torch.tensor(LOGPS), torch.tensor(REF_LOGPS)
    torch.testing.assert_close(
        sigmoid_loss(logps.roll(3), ref_logps.roll(3), BETA, 0.8, margins),
        sigmoid_loss(logps, ref_logps, BETA, 0.2, margins),
    )


@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.0])
def test_a_label_that_says_nothing_pulls_to_no_side(margin: float) -> None:
    logps, ref_logps = at_margins(0.0)
    sigmoid_loss(logps, ref_logps, BETA, 0.5, torch.tensor([margin])).sum().backward()
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_with_margins_and_weights(smoothing: float) -> None:
    logps, margins, weights = torch.tensor(LOGPS, requires_grad=True), [0.5, 0.0, -1.0], [2.0, 0.5, 3.0]
    terms = torch.tensor(margins), torch.tensor(weights)
    sigmoid_loss(logps, torch.tensor(REF_LOGPS), BETA, smoothing, *terms).sum().backward()
    wanted = []
    for gained, margin, weight in zip(MARGINS, margins, weights, strict=True):
        right, flipped = (1 / (1 + math.exp(sign * gained - margin)) for sign in (1, -1))
        wanted.append(weight * BETA * (smoothing * flipped - (1 - smoothing) * right))
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(wanted + [-g for g in wanted], abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_margin_and_no_weight_change_no_bit(smoothing: float) -> None:
    def bits(*terms: Tensor) -> list[float]:
        logps = torch.randn(200, generator=torch.Generator().manual_seed(0)).requires_grad_()
        losses = sigmoid_loss(logps, torch.linspace(-1, 1, 200), BETA, smoothing, *terms)
        losses.sum().backward()
        assert logps.grad is not None
        return [*losses.tolist(), *logps.grad.tolist()]

    assert bits(torch.zeros(100), torch.ones(100)) == bits()


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
