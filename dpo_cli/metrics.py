"""Add up steps and evaluations; write them to ``metrics.jsonl`` and show them to a person.

Legend: P pairs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from dpo_cli.config import BEST
from dpo_cli.disk import to_json, whole_file, writing
from dpo_cli.errors import printable
from dpo_cli.scores import TIE

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
    with whole_file(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


class Reporter:
    """Tells a person what happens, on stderr: rich on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line, shown as it is."""
        self.console.print(printable(text), markup=False)

    def fact(self, name: str, text: str) -> None:
        """One line under a name; an empty name goes on with the one before."""
        self.say(f"{name:<12}{text}")

    def warn(self, text: str) -> None:
        """Something that does not stop the run and that the user should know."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(
        self, what: str, total: int, done: int = 0, every: int | None = None, unit: str = ""
    ) -> Iterator[Progress]:
        """Show how far ``total`` units are done; ``every`` units a line where there is no terminal, else every 10 s.

        A named ``unit`` is shown with its rate.
        """
        if not self.console.is_terminal:
            yield Progress(self, what, total, done, every, unit)
            return
        columns = (
            TextColumn(escape(what)),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Bar(*columns, TextColumn("eta"), TimeRemainingColumn(), console=self.console, transient=True) as bar:
            yield Progress(self, what, total, done, every, unit, bar)


class Progress:
    """One running job; see ``Reporter.progress``."""

    def __init__(
        self,
        reporter: Reporter,
        what: str,
        total: int,
        done: int,
        every: int | None,
        unit: str = "",
        bar: Bar | None = None,
    ) -> None:
        self.reporter, self.what, self.total, self.done, self.every, self.bar = reporter, what, total, done, every, bar
        self.unit, self.first = unit, done
        self.began = self.told = time.monotonic()
        self.task = bar.add_task(what, total=total, completed=done, text="") if bar else None

    def advance(self, units: int, text: str = "") -> None:
        """Count units as done, and show ``text`` beside them."""
        self.done += units
        now = time.monotonic()
        seconds = max(now - self.began, 1e-9)
        if self.unit:
            text = f"{(self.done - self.first) / seconds:,.0f} {self.unit}/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, text=text)
            return
        due = self.done % self.every == 0 if self.every else now - self.told >= 10
        if due or self.done == self.total:
            eta = seconds / max(self.done - self.first, 1) * (self.total - self.done)
            count = f"{self.done:,}/{self.total:,} {self.unit}".rstrip()
            self.reporter.say(f"{self.what} {count}  {text}  eta {int(eta) // 60}:{int(eta) % 60:02d}")
            self.told = now
