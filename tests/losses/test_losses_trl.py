"""Every loss of TRL 1.16's DPOTrainer, by its own code, against ours on the same token log-probs: values and gradients.

Its loss is computed from a model's outputs, so a stand-in for the model gives the outputs, and a trainer that was never
set up has the options.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from dpo_cli.data.batching import length_weights
from dpo_cli.losses.objective import Objective, parse_objective
from dpo_cli.losses.preference import LOSSES, Preferences
from dpo_cli.models.logprobs import response_logps

PAIRS, WIDTH, BETA = 7, 24, 0.3
NAMES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
EPS = {"exo_pair": 0.01, "robust": 0.1}  # those where TRL reads it, too


@dataclasses.dataclass
class Tokens:
    """Token log-probs of all responses, chosen first, as TRL has them, and where they are of one: (2P, WIDTH) each."""

    mask: Tensor
    policy: Tensor
    reference: Tensor
    collisions: Tensor


def make_tokens(dtype: torch.dtype = torch.float64) -> Tokens:
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, WIDTH + 1, (2 * PAIRS,), generator=random)
    starts = (torch.rand(2 * PAIRS, generator=random) * (WIDTH + 1 - lengths)).long()  # prompts of other lengths
    at = torch.arange(WIDTH)
    mask = (at >= starts[:, None]) & (at < (starts + lengths)[:, None])
    policy = -2 * torch.rand(2 * PAIRS, WIDTH, generator=random, dtype=dtype)
    reference = policy + 0.5 * torch.randn(2 * PAIRS, WIDTH, generator=random, dtype=dtype)
    collisions = -2 * torch.rand(2 * PAIRS, WIDTH, generator=random, dtype=dtype)
    return Tokens(mask, policy * mask, reference * mask, collisions * mask)


def theirs(tokens: Tokens, **options: Any) -> tuple[float, Tensor]:
    """TRL's loss, and its gradient by the policy's token log-probs."""
    leaf = tokens.policy.clone().requires_grad_()

    def model(log_probs: Tensor) -> Any:
        other = torch.zeros_like(log_probs)
        about = {"entropy": other, "mean_logits": other, "is_top1": other.bool()}
        return lambda **_: SimpleNamespace(log_probs=log_probs, log_sum_sq_probs=tokens.collisions, **about)

    trainer = object.__new__(DPOTrainer)
    known = {"loss_weights": [1.0], "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    known |= {"label_smoothing": 0.0, "use_weighting": False, "beta": BETA, "precompute_ref_logps": False}
    known |= {"aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    trainer.__dict__ |= known | {"accelerator": same, "_tp_size": 1} | options
    trainer.model, trainer.ref_model = torch.nn.Module(), model(tokens.reference)
    trainer.model.is_gradient_checkpointing = False
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05)
    whole = torch.cat(
        [torch.zeros(2 * PAIRS, 1, dtype=torch.bool), tokens.mask], 1
    ).long()  # its first token is no target
    inputs = {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}
    loss = trainer._compute_loss(model(leaf), inputs, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient * tokens.mask


def ours(tokens: Tokens, objective: Objective) -> tuple[float, Tensor]:
    """The same as a step takes it here."""
    leaf = tokens.policy.clone().requires_grad_()

    def flat(table: Tensor) -> Tensor:  # pair by pair
        order = [row for pair in range(PAIRS) for row in (pair, PAIRS + pair)]
        return torch.cat([table[row][tokens.mask[row]] for row in order])

    def order(lengths: Tensor) -> Tensor:  # the same
        return lengths.view(2, -1).T.reshape(-1)

    lengths = tokens.mask.sum(1)  # chosen first
    token_weights = length_weights(order(lengths), objective.ld_alpha)

    def logps(table: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        return response_logps(flat(table) * weights, order(lengths))

    aligned = ((logps(leaf.detach()) - logps(tokens.collisions)) / lengths).exp().chunk(2)
    pairs = Preferences(
        logps=logps(leaf, token_weights),
        ref_logps=logps(tokens.reference, token_weights),
        lengths=lengths,
        full_logps=logps(leaf),
        mean_chosen_length=float(lengths[:PAIRS].double().mean()),
        weights=aligned[0] * aligned[1] if objective.wpo else 1.0,
    )
    loss = objective(pairs).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


def check(tokens: Tokens, objective: Objective, **options: Any) -> None:
    (got, gradient), (wanted, their_gradient) = ours(tokens, objective), theirs(tokens, **options)
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)
    assert their_gradient.abs().max() > 1e-5  # else nothing was compared


def test_all_of_theirs_are_compared() -> None:
    text = " ".join((DPOConfig.__doc__ or "").split("loss_type (")[1].split("loss_weights (")[0].split())
    assert (
        all(f"`'{name}'`" in text for name in NAMES) and text.count("`'") == len(NAMES) + 2
    )  # beside the two AOT losses
    assert set(NAMES) <= set(LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_losses(name: str) -> None:
    eps = EPS.get(name, 0.0)
    check(make_tokens(), parse_objective(name, beta=BETA, label_smoothing=eps), loss_types=[name], label_smoothing=eps)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence", "alpha_divergence=1.5"])
@pytest.mark.parametrize("name", OF_DIVERGENCES)
def test_f_divergences(name: str, divergence: str) -> None:
    kind, _, alpha = divergence.partition("=")
    eps = EPS.get(name, 0.0)
    objective = parse_objective(name, beta=BETA, label_smoothing=eps, f_divergence=divergence)
    about = {"f_divergence_type": kind, "f_alpha_divergence_coef": float(alpha or 0.5), "label_smoothing": eps}
    tokens = make_tokens(torch.float32)  # theirs knows no other
    (got, gradient), (wanted, their_gradient) = ours(tokens, objective), theirs(tokens, loss_types=[name], **about)
    assert got == pytest.approx(wanted, rel=2e-6)
    assert float((gradient - their_gradient).norm() / their_gradient.norm()) < 2e-6  # of single precision sums


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "sft"])
def test_ld_dpo(name: str, alpha: float) -> None:
    eps = EPS.get(name, 0.0)
    objective = parse_objective(name, beta=BETA, label_smoothing=eps, ld_alpha=alpha)
    check(make_tokens(), objective, loss_types=[name], label_smoothing=eps, ld_alpha=alpha)


# Theirs cannot: hinge's gradient, whose value they overwrite. They weight the mean of sft, here its pairs are weighted.
NO_WPO = ("hinge", "sft")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_WPO])
def test_wpo(name: str) -> None:
    eps = EPS.get(name, 0.0)
    objective = parse_objective(name, beta=BETA, label_smoothing=eps, wpo=True)
    tokens = make_tokens()
    tokens.collisions += 0.3 * tokens.mask  # weights around 1
    check(tokens, objective, loss_types=[name], label_smoothing=eps, use_weighting=True)


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("sigmoid=0.8,bco_pair=0.2,sft=1", {}),  # MPO
        ("ipo=1,sft=0.2", {"ld_alpha": 0.3}),
        ("sigmoid=1,sft=0.5", {"f_divergence": "js_divergence"}),
    ],
)
def test_combinations(loss: str, more: dict[str, Any]) -> None:
    objective = parse_objective(loss, beta=BETA, **more)
    names = {"f_divergence_type" if name == "f_divergence" else name: value for name, value in more.items()}
    weights = list(objective.terms.values())
    check(make_tokens(), objective, loss_types=list(objective.terms), loss_weights=weights, **names)
