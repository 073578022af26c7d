"""Lengths of the pairs, how far they alone tell which response is chosen, and what a training on the pairs takes.

Legend: P pairs.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from dpo_cli.data.batching import build_schedule, length_costs
from dpo_cli.data.pairs import Ids
from dpo_cli.evaluation.statistics import wilson
from dpo_cli.models.loading import default_device

PARTS = ("prompt", "chosen", "rejected")
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
BIASED, SURELY = 0.65, 0.6  # share of pairs, and what the interval must be above


def statistics(lengths: Ids) -> dict[str, dict[str, float]]:
    """Mean, quantiles and maximum of each part, in tokens, from (P, 3)."""
    return {
        part: {"mean": float(column.mean())} | {name: float(np.quantile(column, q)) for name, q in QUANTILES.items()}
        for part, column in zip(PARTS, lengths.T, strict=True)
    }


def length_bias(lengths: Ids) -> dict[str, Any]:
    """How often the longer response is chosen, from (P, 3) tokens; pairs of equal lengths stand apart.

    ``cohens_d`` is the difference of the mean lengths over the root of their mean variance. The accuracies are those
    of always preferring the longer or the shorter response, a tie counting half: a trained model must beat both.
    """
    chosen, rejected = lengths[:, 1].astype(np.int64), lengths[:, 2].astype(np.int64)
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    pairs = len(lengths)
    spread = math.sqrt((float(chosen.var()) + float(rejected.var())) / 2)
    prefer_longer = (longer + (pairs - longer - shorter) / 2) / pairs
    return {
        "longer_chosen": longer,
        "shorter_chosen": shorter,
        "ties": pairs - longer - shorter,
        "share": longer / (longer + shorter) if longer + shorter else 0.5,
        "interval": list(wilson(longer, longer + shorter)),
        "cohens_d": float(chosen.mean() - rejected.mean()) / spread if spread else 0.0,
        "accuracy_prefer_longer": prefer_longer,
        "accuracy_prefer_shorter": 1 - prefer_longer,
    }


def biased_pairs(bias: dict[str, Any]) -> tuple[int, str] | None:
    """In how many pairs length tells which is chosen, and how; None where it hardly does."""
    low, high = bias["interval"]
    for name, accuracy, sure in (
        ("longer", "accuracy_prefer_longer", low),
        ("shorter", "accuracy_prefer_shorter", 1 - high),
    ):
        if bias[accuracy] >= BIASED and sure > SURELY:
            return bias[f"{name}_chosen"], f"the {name} response is chosen"
    return None


def budget(lengths: Ids, batch_size: int, epochs: int, max_tokens: int) -> dict[str, Any]:
    """What `dpo train` computes for pairs of (P, 3) tokens: tokens and forwards of an epoch, steps of the run."""
    shared, padded = length_costs(lengths, "shared"), length_costs(lengths, "padded")  # (P,) each
    way: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "epochs": 1, "max_steps": None}
    plan = build_schedule(shared.tolist(), "shared", **way, world_size=1, seed=0)
    wide = [_widest(step, padded) for step in plan]
    tokens = int(shared.sum(dtype=np.int64))
    return {
        "pairs": len(lengths),
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "epochs": epochs,
        "steps": len(plan) * epochs,
        "forwards_an_epoch": sum(len(step) for step in plan),
        "tokens_an_epoch": tokens,
        "tokens_unshared_an_epoch": int(length_costs(lengths, "packed").sum(dtype=np.int64)),
        "tokens_padded_an_epoch": sum(wide),
        "padded_over_shared": sum(wide) / tokens,
    }


def estimated_seconds(parameters: int, tokens: int, epochs: int) -> float:
    """About how long it takes to train some epochs on tokens, and to score them once under the reference.

    Six operations a parameter and token to train and two to score, at a share of the rate that a matrix product
    is measured to have here: 0.75 on a CPU (docs/performance.md), half on CUDA.
    """
    device = default_device()
    side, dtype, share = (1024, torch.float32, 0.75) if device.type == "cpu" else (8192, torch.bfloat16, 0.5)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        times.append(time.perf_counter() - began)
    return (6 * epochs + 2) * parameters * tokens / (share * 2 * side**3 / min(times))


def _widest(step: list[tuple[int, ...]], padded: Ids) -> int:
    places = [place for micro_batch in step for place in micro_batch]
    return len(places) * int(padded[places].max())
