"""Add up steps and evaluations, and write them to ``metrics.jsonl``.

Legend: P pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.config.options import BEST
from dpo_cli.evaluation.scores import TIE
from dpo_cli.utils.files import atomic_write, to_json, writing

SUMS = ("loss", "rewards/chosen", "rewards/rejected", "wins", "ties", "logps/chosen", "logps/rejected", "pairs")


def pair_sums(losses: Tensor, logps: Tensor, ref_logps: Tensor, beta: float, lengths: Tensor | None = None) -> Tensor:
    """Sums over P pairs of everything that is reported, so that a step needs one reduce and one read-back.

    Weights and margins of the pairs are in the losses alone. With ``lengths`` (2P,) rewards are a token's.

    Shapes: ``losses`` (P,), ``logps`` and ``ref_logps`` (2P,), chosen first -> (8,), float64, named by ``SUMS``.
    Units: nats.
    """
    logratios = (logps - ref_logps).double()
    tie: Tensor | float = TIE
    if lengths is not None:
        logratios, tie = logratios / lengths, TIE / lengths.view(2, -1).min(0).values
    chosen, rejected = logratios.chunk(2)
    h = chosen - rejected  # (P,)
    logps_chosen, logps_rejected = logps.double().chunk(2)
    columns = [losses.double(), beta * chosen, beta * rejected, h > tie, h.abs() <= tie, logps_chosen, logps_rejected]
    sums = [column.sum() for column in columns]
    return torch.stack([*(s.double() for s in sums), torch.full_like(sums[0], len(losses))]).detach()


def summarize(sums: list[float]) -> dict[str, float]:
    """Means over pairs under their public names. A tie counts half a win in the accuracy and is reported beside it."""
    total = dict(zip(SUMS, sums, strict=True))
    mean = {name: value / total["pairs"] for name, value in total.items()}
    return {
        "loss": mean["loss"],
        "rewards/chosen": mean["rewards/chosen"],
        "rewards/rejected": mean["rewards/rejected"],
        "rewards/margins": mean["rewards/chosen"] - mean["rewards/rejected"],
        "rewards/accuracies": mean["wins"] + mean["ties"] / 2,
        "rewards/ties": mean["ties"],
        "logps/chosen": mean["logps/chosen"],
        "logps/rejected": mean["logps/rejected"],
    }


def mean_reward(values: Mapping[str, float]) -> float:
    """Mean reward of a step over both sides."""
    return (values["rewards/chosen"] + values["rewards/rejected"]) / 2


def step_rewards(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """``mean_reward`` of every step that is among the lines."""
    return [mean_reward(line) for line in history if "rewards/chosen" in line]


def append_metrics(file: Path, step: int, values: dict[str, float], prefix: str = "") -> None:
    """Add one line; a value that is no finite number is written as null."""
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(to_json({"step": step} | {prefix + name: value for name, value in values.items()}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of the file but one that is cut short; a number that was not finite is None."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def evaluations(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The held-out metrics that are among the lines, by step; one that was not finite is NaN."""
    return {
        line["step"]: {
            name.removeprefix("eval_"): math.nan if value is None else value
            for name, value in line.items()
            if name.startswith("eval_")
        }
        for line in history
        if "eval_loss" in line
    }


def best_step(found: Mapping[int, Mapping[str, float]], metric: str) -> int:
    """The step of the best of ``evaluations``, the first of equals; one that was not finite is none."""

    def goodness(step: int) -> float:
        value = BEST[metric] * found[step][metric]
        return -math.inf if math.isnan(value) else value

    return max(sorted(found), key=goodness)


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and a last line that a crash cut short."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
