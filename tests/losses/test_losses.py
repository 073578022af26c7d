"""The losses worked by hand, their gradients, and what an objective makes of them."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_cli.losses.divergences import DIVERGENCES, divergence
from dpo_cli.losses.objective import Objective, parse_objective
from dpo_cli.losses.preference import LOSSES, Loss, Preferences
from dpo_cli.utils.errors import UsageError
from tests.helpers import sigmoid_loss

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


# ---- all losses -------------------------------------------------------------------------------------------------

# One pair: r_w = 2, r_l = -2 nats; 4 and 2 tokens, so 1/2 and -1 a token; log-probs a token -2 and -3.
ONE = Preferences(
    logps=torch.tensor([-8.0, -6.0]).double(),
    ref_logps=torch.tensor([-10.0, -4.0]).double(),
    lengths=torch.tensor([4, 2]),
    full_logps=torch.tensor([-8.0, -6.0]).double(),
    mean_chosen_length=4.0,
    margins=torch.tensor([0.5]).double(),
    reward_baseline=0.5,
)
# At beta = 1/2, of which beta r_w = 1, beta r_l = -1, beta h = 2; where the margin of 1/2 is read, beta h - m = 3/2.
# log sigma(x) = -log(1 + e^-x): of 1.5 it is -0.201413, of -2.5 -2.578890, of 1 -0.313262, of -1 -1.313262.
BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, 0.201413),
    "robust": ({"label_smoothing": 0.1}, (0.9 * 0.201413 - 0.1 * 2.578890) / 0.8),
    "sigmoid_norm": ({}, 0.386871),  # log(1 + e^-0.75)
    "hinge": ({"beta": 0.25}, 0.5),  # 1 + 0.5 - 1
    "ipo": ({}, 0.25),  # (1.5 - 1)^2
    "dpop": ({}, 0.201413),  # the chosen response did not become rarer
    "exo_pair": ({"label_smoothing": 0.1}, 0.001943),  # 0.880797 log(0.880797/0.9) + 0.119203 log(0.119203/0.1)
    "nca_pair": ({}, 0.313262 + (1.313262 + 0.313262) / 2),
    "bco_pair": ({}, 2 * 0.313262),
    "bco": ({}, 0.474077 + 0.201413),  # -log sigma(1 - 0.5) - log sigma(0.5 + 1)
    "sppo_hard": ({}, 2.0),  # (2 - 1)^2 + (-2 + 1)^2
    "apo_zero": ({}, 2 * 0.268941),
    "apo_down": ({}, 0.731059 + 0.119203),
    "plackett_luce": ({}, 0.126928),  # as sigmoid without a margin
    "discopop": ({"options": {"discopop_tau": 1.0}}, 0.119203 * 0.126928 + 0.880797 * 0.135335),
    "sft": ({}, 2.0),  # 8/4
    "simpo": ({}, 0.974077),  # -log sigma(0.5 (-2 + 3) - 0.5 - 0.5)
    "orpo": ({}, 2.0 + 0.5 * 0.288751),  # log odds -1.854587 and -2.948932
    "cpo": ({}, 2.0 + 1.701413),  # -log sigma(0.5 (-8 + 6) - 0.5)
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_hand(name: str) -> None:
    options, wanted = BY_HAND[name]
    assert Objective({name: 1.0}, **{"beta": 0.5} | options)(ONE).tolist() == pytest.approx([wanted], abs=2e-6)


def pairs_of(count: int, seed: int = 0) -> Preferences:
    """Random pairs with margins and weights."""
    random = torch.Generator().manual_seed(seed)

    def draw(size: int, scale: float) -> Tensor:
        return scale * torch.randn(size, generator=random, dtype=torch.float64)

    lengths = torch.randint(1, 30, (2 * count,), generator=random)
    logps = -lengths * (0.5 + torch.rand(2 * count, generator=random, dtype=torch.float64))
    terms = {"margins": draw(count, 0.3), "weights": 1 + draw(count, 0.1).abs()}
    return Preferences(logps, logps + draw(2 * count, 3.0), lengths, logps - 1, 11.0, reward_baseline=0.3, **terms)


@pytest.mark.parametrize("f_divergence", [*DIVERGENCES, "alpha_divergence=1.5"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_gradient_is_that_of_its_value(name: str, f_divergence: str) -> None:
    """By finite differences in double precision, through all that a loss reads of the policy."""
    if f_divergence != "reverse_kl" and "f_divergence" not in LOSSES[name].reads:
        return
    eps = 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0
    objective, p = parse_objective(name, beta=0.4, label_smoothing=eps, f_divergence=f_divergence), pairs_of(5)

    def compute(logps: Tensor, full_logps: Tensor) -> Tensor:
        return objective(dataclasses.replace(p, logps=logps, full_logps=full_logps))

    leaves = (p.logps.clone().requires_grad_(), p.full_logps.clone().requires_grad_())
    assert torch.autograd.gradcheck(compute, leaves, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pairs_loss_is_its_own_times_its_weight(name: str) -> None:
    eps = 0.1 if name == "exo_pair" else 0.0
    objective, p = parse_objective(name, label_smoothing=eps), pairs_of(4)
    one = [dataclasses.replace(p, weights=1.0, margins=p.margins[i : i + 1], **of(p, i)) for i in range(4)]
    alone = torch.cat([objective(each) for each in one])
    torch.testing.assert_close(objective(p), p.weights * alone)


def of(p: Preferences, pair: int) -> dict[str, Tensor]:
    return {name: getattr(p, name)[pair::4] for name in ("logps", "ref_logps", "lengths", "full_logps")}


def test_dpop_holds_the_chosen_response_up_by_hand() -> None:
    """r_w = -1, r_l = -9: 0.5 (8 - 50) = -21, whatever the rejected one lost."""
    p = dataclasses.replace(ONE, logps=torch.tensor([-11.0, -13.0]).double(), margins=0.0)
    assert Objective({"dpop": 1.0}, beta=0.5)(p).tolist() == pytest.approx([21.0], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_far_from_the_reference(name: str) -> None:
    eps = 0.1 if "label_smoothing" in LOSSES[name].reads else 0.0
    for far in (1000.0, -1000.0):
        logps = (torch.tensor([-1001.0, -1001.0]) + torch.tensor([far, -far])).clamp(max=0).requires_grad_()
        p = Preferences(logps, torch.full((2,), -1001.0), torch.ones(2), logps, 1.0)
        loss = parse_objective(name, label_smoothing=eps)(p).sum()
        (gradient,) = torch.autograd.grad(loss, logps)
        assert gradient.isfinite().all() and (loss.isfinite() or name == "discopop")  # e^200 is no float32


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("forward_kl", 1 - 1 / 2), ("js_divergence", math.log(4 / 3)), ("alpha_divergence", 2 - math.sqrt(2)),
     ("alpha_divergence=3", 1.5), ("alpha_divergence=1", math.log(2)), ("reverse_kl", math.log(2))],
)  # fmt: skip
def test_f_divergences_by_hand(name: str, wanted: float) -> None:
    """Of a response that is twice as likely: (2^-1/2 - 1) / (-1/2) = 2 - 2^1/2 and (2^2 - 1) / 2."""
    assert divergence(name)(torch.tensor([2.0]).log()).tolist() == pytest.approx([wanted], abs=1e-6)


@pytest.mark.parametrize("name", [*DIVERGENCES, "alpha_divergence=0"])
def test_f_divergences_of_responses_that_became_very_rare_are_finite(name: str) -> None:
    """e^100 is no float32, of which the difference of two would be no number."""
    logps = torch.full((2,), -200.0, requires_grad=True)
    loss = parse_objective(f_divergence=name)(Preferences(logps, logps.detach() + 100, torch.ones(2), logps, 1.0)).sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    assert float(loss.detach()) == pytest.approx(math.log(2)) and gradient.isfinite().all()


def test_what_sft_does_not_read_is_no_obstacle() -> None:
    made = parse_objective("sigmoid,sft", label_smoothing=0.1, f_divergence="js_divergence")
    assert made.ignored_by("margins") is None and parse_objective("sigmoid,ipo").ignored_by("margins") == "ipo"


def test_a_combination_is_the_weighted_sum() -> None:
    p = pairs_of(6)
    parts = [Objective({name: 1.0})(p) for name in ("sigmoid", "ipo", "sft")]
    torch.testing.assert_close(
        parse_objective("sigmoid=2, ipo=0.5,sft=1e-1")(p), 2 * parts[0] + 0.5 * parts[1] + 0.1 * parts[2]
    )
    assert parse_objective("sigmoid,sft=0.2").name == "sigmoid=1,sft=0.2"


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "sigmoid,sft=x"}, "'sft=x': write NAME=NUMBER"),
        ({"loss": "sigmoid,sft=0"}, "a weight must be greater than 0"),
        ({"loss": "sigmoid,sft=inf"}, "'sft=inf': write NAME=NUMBER"),
        ({"loss": "sft=1,sft=2"}, "'sft=2': write NAME=NUMBER, each name once"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "--label-smoothing 0.1: --loss hinge does not read it; "),
        ({"loss": "sigmoid,hinge,sft", "label_smoothing": 0.1}, "--label-smoothing 0.1: --loss hinge does not read"),
        ({"loss": "sft", "label_smoothing": 0.1}, "--label-smoothing 0.1: --loss sft does not read it; "),
        ({"loss": "sigmoid,simpo", "f_divergence": "forward_kl"}, "--loss simpo does not read it"),
        ({"loss": "discopop", "loss_options": "discopop_tau=0"}, "discopop_tau greater than 0"),
        ({"loss": "exo_pair"}, "--loss exo_pair: needs --label-smoothing above 0"),
        ({"loss": "sigmoid,apo_zero", "f_divergence": "forward_kl"}, "--loss apo_zero does not read it"),
        ({"loss": "simpo", "f_divergence": "forward_kl"}, "--f-divergence forward_kl: --loss simpo does not read"),
        ({"loss": "cpo", "ld_alpha": 0.0}, "--ld-alpha 0.0: is about the ratio to the reference"),
        ({"loss_options": "simpo_gamma=1"}, "--loss-options simpo_gamma: --loss sigmoid does not read it; it has none"),
        ({"loss": "simpo", "loss_options": "gamma=1"}, "does not read it; it has simpo_gamma"),
        ({"loss": "simpo", "loss_options": "beta=1"}, "--loss-options beta: --loss simpo does not read it"),
        ({"loss": "simpo", "loss_options": "simpo_gamma"}, "'simpo_gamma': write NAME=NUMBER"),
        ({"loss": "simpo", "loss_options": "simpo_gamma=1,simpo_gamma=2"}, "each name once"),
        ({"loss": "discopop", "loss_options": "discopop_tau=-1"}, "discopop_tau greater than 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_objective(**options)
    assert told in str(caught.value)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
def test_every_loss_says_what_it_is(loss: Loss) -> None:
    assert loss.use.endswith(".") and loss.formula and ("arXiv" in loss.paper or "http" in loss.paper)
    assert all(isinstance(default, float) for default in loss.options.values())
