"""DPO finds the policy that theory names, where every response is known: the benchmark in small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.studies.recovery import BETAS, Toy, compare, expected_loss, log_probs, make_toy, train
from dpo_cli.losses.objective import Objective


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy(seed=1)


def test_all_responses_are_known(toy: Toy) -> None:
    assert np.exp(toy.logps).sum(1) == pytest.approx(1, abs=1e-5)
    assert toy.population().sum((0, 2)) == pytest.approx(1)
    assert toy.drawn(1000, seed=0).sum((0, 2)) == pytest.approx(1)
    assert toy.drawn(10**8, seed=0) == pytest.approx(toy.population(), abs=1e-4)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_is_level_at_the_optimum(toy: Toy, beta: float, said: bool) -> None:
    """Of whatever pairs: no log-prob of any response wants to move. At the reference they do."""
    ref_logps = torch.from_numpy(toy.logps)
    slopes = []
    for logps in (torch.from_numpy(np.log(toy.optimum(beta))), ref_logps.clone()):
        logps.requires_grad_()
        expected_loss(logps, ref_logps, Objective(beta=beta), toy.population(said)).backward()
        assert logps.grad is not None
        slopes.append(float(logps.grad.abs().max()))
    assert slopes[0] < 1e-9 < 1e-3 < slopes[1]


def test_training_finds_the_optimum(toy: Toy) -> None:
    before = compare(toy, 1.0, log_probs(toy.reference).detach().double().numpy())
    found = compare(toy, 1.0, train(toy, 1.0, toy.population(), steps=200))
    assert before.total_variation > 0.3 and before.error > 1
    assert found.total_variation < 0.02 and found.correlation > 0.99 and found.error < 0.1
