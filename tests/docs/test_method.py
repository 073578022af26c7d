"""docs/method.md: each line of code it quotes is where it says, and computes the formula above it."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch

from dpo_cli.config.options import TrainOptions
from dpo_cli.evaluation.kl import COLUMNS, divergences
from dpo_cli.evaluation.metrics import PairScores, pair_sums, summarize
from dpo_cli.losses.objective import DPO, Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import response_logps, target_logps
from dpo_cli.training.optimizer import learning_rate
from tests.helpers import ROOT, sigmoid_loss

QUOTES = re.findall(
    r"^- \[`(\w+)\.([\w.]+)`\]\(\.\./dpo_cli/([\w/]+)\.py\)[^`\n]*: `(.+)`$",
    (ROOT / "docs/method.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
BETA = 0.3
LOGPS = torch.tensor([-10.0, -20.0, -31.0, -12.5, -19.0, -30.0], dtype=torch.float64)  # chosen first
REF_LOGPS = torch.tensor([-11.0, -19.0, -30.0, -11.0, -19.5, -29.0], dtype=torch.float64)
H = [2.5, -1.5, 0.0]  # by hand, of the three pairs above


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z))


def scores(beta: float = BETA) -> PairScores:
    logps, ref_logps = (t.view(2, 3).T.numpy() for t in (LOGPS, REF_LOGPS))
    tokens, terms = np.full((3, 2), 5.0), np.tile([1.0, 0.0], (3, 1))
    return PairScores(["a", "b", "c"], tokens, logps, ref_logps, terms, objective=Objective(beta=beta))


@pytest.mark.parametrize(("module", "name", "file", "line"), QUOTES)
def test_the_line_is_where_the_page_says(module: str, name: str, file: str, line: str) -> None:
    found: Any = reduce(getattr, name.split("."), importlib.import_module("dpo_cli." + file.replace("/", ".")))
    found = getattr(found, "func", found)  # a cached property
    source = inspect.getsource(found.fget if isinstance(found, property) else found)
    assert module == file.rpartition("/")[2]
    assert line in [each.strip().partition("  #")[0] for each in source.splitlines()]


def test_each_step_of_the_page_has_its_line() -> None:
    parts = re.split(r"^## ", (ROOT / "docs/method.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(parts) == 10
    assert [part[:1] for part in parts if "](../dpo_cli/" not in part] == ["2"]  # which sums over all responses
    assert len(QUOTES) == sum(part.count("](../dpo_cli/") for part in parts) > 15


def test_kl_is_its_sum_over_the_vocabulary() -> None:
    p_logits, q_logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = dict(zip(COLUMNS, divergences(p_logits, q_logits, torch.arange(4)).T, strict=True))
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    assert torch.allclose(found["kl"], (p * (p / q).log()).sum(-1))
    assert torch.allclose(found["reverse_kl"], (q * (q / p).log()).sum(-1))


def test_the_loss_is_least_where_the_objective_is_greatest() -> None:
    """Equations 3, 4, 6 and 7 on a prompt with five responses, all of which are known."""
    generator = torch.Generator().manual_seed(1)
    reward, ref = torch.randn(5, generator=generator).double(), torch.randn(5, generator=generator).double()
    ref_logps = ref.log_softmax(0)
    best = (ref_logps + reward / BETA).softmax(0)  # ref exp(r / beta) / Z

    def wanted(p: torch.Tensor) -> float:
        return float((p * (reward - BETA * (p.log() - ref_logps))).sum())

    log_z = (ref_logps + reward / BETA).logsumexp(0)
    assert wanted(best) == pytest.approx(BETA * float(log_z))
    other = ref_logps.exp()
    assert wanted(other) == pytest.approx(BETA * float(log_z - (other * (other / best).log()).sum()))

    first, second = torch.combinations(torch.arange(5)).T
    both = (
        torch.cat([first, second]),
        torch.cat([second, first]),
    )  # each pair is labelled both ways, as often as the reward has it
    share = torch.sigmoid(reward[both[0]] - reward[both[1]])
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        losses = sigmoid_loss(
            torch.cat([logps[side] for side in both]), torch.cat([ref_logps[side] for side in both]), BETA
        )
        loss = (share * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert 0.5 * float((logits.detach().softmax(0) - best).abs().sum()) < 1e-6  # total variation


def test_rewards_margins_and_accuracy_are_of_log_ratios() -> None:
    found = scores().means()
    assert found["rewards/chosen"] == pytest.approx(BETA * (1 - 1 - 1) / 3)
    assert found["rewards/margins"] == pytest.approx(BETA * sum(H) / 3)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["loss"] == pytest.approx(-sum(log_sigma(BETA * h) for h in H) / 3)
    losses = sigmoid_loss(LOGPS, REF_LOGPS, BETA)
    training = summarize(pair_sums(losses, LOGPS, REF_LOGPS, BETA).tolist())
    assert all(training[name] == pytest.approx(found[name]) for name in training)


def test_the_loss_of_a_pair() -> None:
    eps, margin, weight = 0.1, 0.7, 2.0
    found = sigmoid_loss(LOGPS, REF_LOGPS, BETA).tolist()
    assert found == pytest.approx([-log_sigma(BETA * h) for h in H])
    found = sigmoid_loss(LOGPS, REF_LOGPS, BETA, eps, margin, weight).tolist()
    right, flipped = ([log_sigma(sign * BETA * h - margin) for h in H] for sign in (1, -1))
    assert found == pytest.approx([-weight * ((1 - eps) * a + eps * b) for a, b in zip(right, flipped, strict=True)])


def test_the_gradient_pulls_the_difference() -> None:
    logps = LOGPS.clone().requires_grad_()
    sigmoid_loss(logps, REF_LOGPS, BETA).mean().backward()
    pull = [BETA / (1 + math.exp(BETA * h)) / 3 for h in H]
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-each for each in pull] + pull)


def test_a_responses_log_prob_is_the_sum_of_its_tokens() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    targets, lengths = torch.arange(9), torch.tensor([4, 2, 1, 2])  # chosen and rejected of each pair
    tokens = [math.log(logits[t].double().exp()[t] / logits[t].double().exp().sum()) for t in range(9)]
    chosen, rejected = [sum(tokens[0:4]), tokens[6]], [sum(tokens[4:6]), sum(tokens[7:9])]
    assert response_logps(target_logps(logits, targets), lengths).tolist() == pytest.approx(chosen + rejected)


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainOptions(data=["-"], lr=1.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 10, options) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_equal_models_have_the_loss_ln_2() -> None:
    equal = Preferences(LOGPS, LOGPS, torch.ones(6), LOGPS, 1.0)
    assert DPO(equal).tolist() == pytest.approx([math.log(2)] * 3) == [0.6931471805599453] * 3


def test_what_changed_about_the_data_is_minus_the_log_ratio_a_token() -> None:
    found = scores().means()
    assert found["delta_kl_data/chosen"] == pytest.approx(-(1 - 1 - 1) / 15)
    difference = found["cross_entropy/chosen"] - found["ref_cross_entropy/chosen"]  # of H(data, p) and H(data, q)
    assert found["delta_kl_data/chosen"] == pytest.approx(difference)
