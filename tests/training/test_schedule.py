"""The learning rate as a function of the step, and what the optimizer decays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from dpo_cli.config.options import TrainOptions
from dpo_cli.training.optimizer import learning_rate, make_optimizer
from dpo_cli.utils.errors import UsageError
from tests.helpers import make_model

HALF, QUARTER = 0.5, 0.25
DIAGONAL = math.sqrt(HALF) / 2  # half the cosine of 45°


def rates(steps: int, schedule: str, warmup_ratio: float, lr: float = 1.0, min_lr: float = 0.0) -> list[float]:
    options = TrainOptions(data=["x"], lr=lr, lr_scheduler=schedule, warmup_ratio=warmup_ratio, min_lr=min_lr)
    return [learning_rate(step, steps, options) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0.0, [1, HALF + DIAGONAL, HALF, HALF - DIAGONAL]),
        ("constant", 0.5, [QUARTER, HALF, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", 0.5, [QUARTER, HALF, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0.5, [QUARTER, HALF, 3 / 4, 1, 1, HALF + DIAGONAL, HALF, HALF - DIAGONAL]),
        ("linear", 0.1, [1, 3 / 4, 2 / 4, 1 / 4]),  # a tenth of four steps rounds to none
    ],
)
def test_worked_by_hand(schedule: str, warmup_ratio: float, expected: list[float]) -> None:
    assert rates(len(expected), schedule, warmup_ratio) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [HALF, 1, 1, 0.8, 0.6, 0.4]), ("cosine", [HALF, 1, 1, 0.2 + 0.8 * (HALF + DIAGONAL), 0.6, None])],
)
def test_a_floor(schedule: str, expected: list[float | None]) -> None:
    """The schedule falls to a fifth of the peak instead of 0; the warm-up still begins at 0."""
    found = rates(6, schedule, 1 / 3, min_lr=0.2)
    assert [rate for rate, want in zip(found, expected, strict=True) if want] == pytest.approx(
        [e for e in expected if e]
    )
    assert min(found[2:]) > 0.2


def test_a_floor_is_transformers_cosine_with_min_lr() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-6)
    kwargs = {"min_lr_rate": 0.1}
    theirs = get_scheduler("cosine_with_min_lr", optimizer, 0, 13, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(13):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(13, "cosine", 0.0, lr=1e-6, min_lr=1e-7) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "why"),
    [({"lr_scheduler": "constant"}, "does not decay"), ({"lr": 1e-6}, "at most --lr, which is 1e-06")],
)
def test_a_floor_that_cannot_be(given: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        TrainOptions(data=["x"], min_lr=1e-5, **{"lr": 1e-3} | given)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_equals_transformers_without_warmup(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=13)
    expected = []
    for _ in range(13):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(13, schedule, 0.0, lr=3e-4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@given(steps=st.integers(1, 200), warmup_ratio=st.floats(0, 1, exclude_max=True), lr=st.floats(1e-8, 10))
def test_rises_to_the_peak_and_falls_to_more_than_nothing(
    schedule: str, steps: int, warmup_ratio: float, lr: float
) -> None:
    course = rates(steps, schedule, warmup_ratio, lr)
    rising = round(warmup_ratio * steps)
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in course)
    assert course[:rising] == sorted(course[:rising])
    assert course[rising:] == sorted(course[rising:], reverse=True)
    assert max(course) == pytest.approx(lr, rel=1e-12)
    if rising < steps:
        assert course[rising] == pytest.approx(lr, rel=1e-12)  # the first step after the warm-up


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_matrices_decay(family: str) -> None:
    model = make_model(family)
    optimizer = make_optimizer(model, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    parameters = list(model.parameters())
    assert {p.ndim for p in parameters} == {1, 2}
    assert len(decay) == len(parameters)
    assert all(decay[id(p)] == (0.1 if p.ndim == 2 else 0.0) for p in parameters)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)  # none is there twice


def test_decay_shrinks_matrices_by_the_learning_rate_and_leaves_vectors() -> None:
    """AdamW with no gradient moves a weight by -lr * decay * weight alone."""
    model = make_model("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1), rtol=1e-6, atol=0)


def test_a_frozen_parameter_is_left_out() -> None:
    model = make_model()
    frozen = model.get_input_embeddings().weight
    frozen.requires_grad = False
    optimizer = make_optimizer(model, weight_decay=0.1)
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])
