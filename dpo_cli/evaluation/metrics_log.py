"""``metrics.jsonl``: one line per training step and one per evaluation, whose names begin with ``eval_``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_cli.config.options import BEST
from dpo_cli.utils.files import atomic_write, to_json, writing

History = Sequence[Mapping[str, Any]]


def append_metrics(file: Path, step: int, values: Mapping[str, float], prefix: str = "") -> None:
    """Append one line; a value that is not finite becomes null."""
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(to_json({"step": step} | {prefix + name: value for name, value in values.items()}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read all complete lines; a value that was not finite is None."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the lines after ``step``, and a last line that a crash cut short."""
    lines = [line for line in read_metrics(file) if isinstance(line, dict) and line.get("step", math.inf) <= step]
    with atomic_write(file) as temporary:
        temporary.write_text("".join(to_json(line) + "\n" for line in lines), encoding="utf-8")


def evaluations(history: History) -> dict[int, dict[str, float]]:
    """Held-out metrics by step, without their prefix; null becomes NaN."""
    return {
        line["step"]: {
            name.removeprefix("eval_"): math.nan if value is None else value
            for name, value in line.items()
            if name.startswith("eval_")
        }
        for line in history
        if "eval_loss" in line
    }


def best_step(evaluated: Mapping[int, Mapping[str, float]], metric: str) -> int:
    """The step with the best value of a metric among ``evaluations``; the first of equals, never NaN."""
    goodness = {step: BEST[metric] * evaluated[step][metric] for step in sorted(evaluated)}
    return max(goodness, key=lambda step: -math.inf if math.isnan(goodness[step]) else goodness[step])


def mean_reward(values: Mapping[str, float]) -> float:
    """Mean reward of one step over chosen and rejected."""
    return (values["rewards/chosen"] + values["rewards/rejected"]) / 2


def step_rewards(history: History) -> list[float]:
    """``mean_reward`` of every training step."""
    return [mean_reward(line) for line in history if "rewards/chosen" in line]
