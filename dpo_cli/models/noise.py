"""How far two computations of a response's log-prob lie apart by arithmetic alone.

Kernels add up in orders of their own, which may depend on the number of rows. In 16 bits a difference in the last bit
of an early layer grows to the size of the model's own rounding error; so that error, against float32, is the measure.

Legend: R responses, N tokens that carry loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_cli.data.batching import MicroBatch
from dpo_cli.data.pairs import Pair
from dpo_cli.models.logprobs import ModelRunner

FLOAT32 = 1e-3  # nats per root of a response's tokens: allowed in every precision
SAMPLE = 1024  # tokens of the forward by which noise is measured


def excess(differences: Tensor, tokens: Tensor, noise: float) -> float:
    """Divide the differences between two log-probs of each response by the largest that arithmetic explains.

    Above 1 they are of two models. It is the largest of three ratios: of the largest difference, of their root mean
    square, and of their sum, in which a small shift of all responses shows.

    Shapes: ``differences`` and ``tokens`` that carry loss: (R,) each.
    Units: nats; ``noise`` as in ``ModelRunner``.
    Source: docs/performance.md, "Arithmetic noise".
    """
    differences, tokens = differences.double().cpu(), tokens.double().cpu()
    per_root, root = differences / tokens.sqrt(), len(tokens) ** 0.5
    measured = [per_root.abs().max(), per_root.square().mean().sqrt(), differences.sum().abs() / tokens.sum().sqrt()]
    allowed = [max(10 * noise, FLOAT32), max((1.5 + 4.5 / root) * noise, FLOAT32), max(6 * noise, FLOAT32 * root)]
    return float((torch.stack(measured) / torch.tensor(allowed)).nan_to_num(math.inf, math.inf).max())


def float32_hint(dtype: torch.dtype) -> str:
    """Return the way out of an excess that a device's 16-bit kernels caused after all."""
    return "" if dtype == torch.float32 else ". If that does not help, compute with --dtype float32"


def rms(differences: Tensor) -> float:
    """Return the root mean square of differences (N,): a device sync."""
    return float(differences.square().mean().sqrt())


@torch.no_grad()
def draw_probes(runner: ModelRunner, pairs: Sequence[Pair]) -> tuple[MicroBatch, Tensor]:
    """Score pairs drawn at random in float32: their batch and token log-probs (N,); float32 weights are needed."""
    drawn = random.Random(0).sample(pairs, min(len(pairs), SAMPLE))
    costs, room, fitting = runner.costs(drawn), min(SAMPLE, runner.max_tokens), list[Pair]()
    for pair, cost in zip(drawn, costs, strict=True):
        if cost <= room:
            fitting.append(pair)
            room -= cost
    batch = runner.batch(fitting or [drawn[costs.index(min(costs))]])
    return batch, replace(runner, dtype=torch.float32).token_logps(batch)


@torch.no_grad()
def measure_noise(runner: ModelRunner) -> None:
    """Set the ``noise`` of a runner with ``probes`` to that of the weights as they are now."""
    if runner.probes:
        batch, exact = runner.probes
        runner.noise = rms(runner.token_logps(batch) - exact)
