"""Steps of a trainer whose optimizer keeps the gradients it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.data.schedule import Step
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.training.loop import StopSignal
from dpo_cli.training.step import Trainer


@dataclass
class KeepGradients:
    """An optimizer that takes no step and keeps the gradients it was given."""

    model: torch.nn.Module
    gradients: list[Tensor] = field(default_factory=list)
    param_groups: list[dict[str, float]] = field(default_factory=lambda: [{"lr": 0.0}])

    def step(self) -> None:
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad()


def make_trainer(
    runner: ModelRunner, pairs: Sequence[Pair], options: TrainOptions, ref_logps: Tensor, weighted: Tensor | None = None
) -> tuple[Trainer, KeepGradients]:
    """A trainer of pairs with reference log-probs (P, 2)."""
    optimizer, weighted = KeepGradients(runner.model), ref_logps if weighted is None else weighted
    tables = (Pairs(pairs), runner.costs(pairs), ref_logps, weighted)
    return Trainer(runner, optimizer, *tables, options), optimizer


def take_step(trainer: Trainer, planned: Step) -> dict[str, float]:
    """The metrics of a step."""
    metrics = trainer.step(planned, trainer.micro_batches(planned), 1e-3, StopSignal())
    assert metrics is not None
    return metrics


def relative(a: list[Tensor], b: list[Tensor]) -> Iterator[float]:
    """Norms of the differences of tensors, by those of the second ones."""
    for x, y in zip(a, b, strict=True):
        yield float((x - y).norm() / y.norm())
