"""Lengths of the pairs, how well they alone predict the preference, and the cost of training.

Legend: P pairs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpo_cli.data.batching import build_schedule, length_costs
from dpo_cli.data.pairs import Ids
from dpo_cli.evaluation.statistics import wilson

PARTS = ("prompt", "chosen", "rejected")
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
BIASED, LEAST = 0.65, 0.6  # share of pairs, and what its interval must exceed


def statistics(lengths: Ids) -> dict[str, dict[str, float]]:
    """Compute mean, quantiles and maximum of each part, in tokens, from (P, 3)."""
    return {
        part: {"mean": float(column.mean())} | {name: float(np.quantile(column, q)) for name, q in QUANTILES.items()}
        for part, column in zip(PARTS, lengths.T, strict=True)
    }


def length_bias(lengths: Ids) -> dict[str, Any]:
    """Compute how often the longer response is chosen, from (P, 3) tokens; ties are counted separately.

    ``cohens_d`` is the difference of the mean lengths divided by the root of their mean variance. The accuracies are
    those of always preferring the longer or the shorter response, a tie counting half; a trained model must beat both.
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
    """Return in how many pairs length predicts the preference, and how; None if it hardly does."""
    low, high = bias["interval"]
    for name, accuracy, sure in (
        ("longer", "accuracy_prefer_longer", low),
        ("shorter", "accuracy_prefer_shorter", 1 - high),
    ):
        if bias[accuracy] >= BIASED and sure > LEAST:
            return bias[f"{name}_chosen"], f"the {name} response is chosen"
    return None


def budget(lengths: Ids, batch_size: int, epochs: int, max_tokens: int) -> dict[str, Any]:
    """Compute tokens and forwards per epoch and the steps of a run on pairs of (P, 3) tokens."""
    shared, padded = length_costs(lengths, "shared"), length_costs(lengths, "padded")  # (P,) each
    options: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "epochs": 1, "max_steps": None}
    schedule = build_schedule(shared.tolist(), "shared", **options, world_size=1, seed=0)
    padded_tokens = sum(_padded_tokens(step, padded) for step in schedule)
    tokens = int(shared.sum(dtype=np.int64))
    return {
        "pairs": len(lengths),
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "epochs": epochs,
        "steps": len(schedule) * epochs,
        "forwards_an_epoch": sum(len(step) for step in schedule),
        "tokens_an_epoch": tokens,
        "tokens_unshared_an_epoch": int(length_costs(lengths, "packed").sum(dtype=np.int64)),
        "tokens_padded_an_epoch": padded_tokens,
        "padded_over_shared": padded_tokens / tokens,
    }


def _padded_tokens(step: list[tuple[int, ...]], padded: Ids) -> int:
    places = [place for micro_batch in step for place in micro_batch]
    return len(places) * int(padded[places].max())
