"""How well lengths alone predict the preference.

Legend: P pairs.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.data.pairs import Ids
from dpo_cli.evaluation.statistics import wilson

BIASED, LEAST = 0.65, 0.6  # share of pairs, and what its interval must exceed


def length_bias(lengths: Ids) -> dict[str, Any]:
    """Compute how often the longer response is chosen, from (P, 2) tokens of chosen and rejected.

    The accuracies are those of always preferring the longer or the shorter response, a tie counting half; a trained
    model must beat both.
    """
    chosen, rejected = lengths.T  # (P,) each
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    ties = len(lengths) - longer - shorter
    prefer_longer = (longer + ties / 2) / len(lengths)
    return {
        "longer_chosen": longer,
        "shorter_chosen": shorter,
        "ties": ties,
        "share": longer / (longer + shorter) if longer + shorter else 0.5,
        "interval": list(wilson(longer, longer + shorter)),
        "accuracy_prefer_longer": prefer_longer,
        "accuracy_prefer_shorter": 1 - prefer_longer,
    }


def biased_pairs(bias: dict[str, Any]) -> tuple[int, str] | None:
    """Return in how many pairs length predicts the preference, and how; None if it hardly does."""
    low, high = bias["interval"]
    for name, sure in (("longer", low), ("shorter", 1 - high)):
        if bias[f"accuracy_prefer_{name}"] >= BIASED and sure > LEAST:
            return bias[f"{name}_chosen"], f"the {name} response is chosen"
    return None
