"""Add up steps and evaluations; write them to ``metrics.jsonl`` and show them to a person.

Legend: P pairs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
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
    """Tells a person what happens, on stderr: with a bar on a terminal, in lines elsewhere.

    ``quiet``: nothing but warnings. ``log_json``: each line is a JSON object with its kind under ``event``.
    ``mute``: nothing at all, for a rank that another one speaks for.
    """

    def __init__(self, quiet: bool = False, log_json: bool = False, mute: bool = False) -> None:
        self.quiet, self.log_json = quiet or mute, log_json
        self.console = Console(
            file=sys.stderr,
            quiet=mute,
            highlight=False,
            soft_wrap=True,
            force_terminal=sys.stderr.isatty(),  # FORCE_COLOR makes no terminal of a file: bars have no place there
        )
        self.live = self.console.is_interactive and not self.quiet and not log_json
        self.name = ""  # of the last fact

    def fact(self, name: str, text: str, values: Mapping[str, float] | None = None) -> None:
        """One line under a name; an empty name goes on with the one before. A log has the ``values`` beside it."""
        self.name = name or self.name
        event: dict[str, Any] = {"event": "fact", "name": self.name, "text": text}
        self.tell(event | dict(values or {}), text, f"{name:<12}", "bold")

    def warn(self, text: str) -> None:
        """Something that does not stop the run and that the user should know."""
        self.tell({"event": "warning", "text": text}, text, "warning: ", "yellow")

    def tell(self, event: Mapping[str, Any], text: str, head: str = "", style: str = "") -> None:
        """Show an event: as JSON, or as its text behind a head; wrapped on a terminal alone."""
        if self.quiet and event["event"] != "warning":
            return
        if self.log_json:
            self.console.print(Text(to_json(event)))
            return
        text = printable(head + text)
        if self.console.is_terminal:
            width, indent = max(self.console.width, 40), " " * len(head)
            text = fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        line = Text(text)
        line.stylize(style, 0, len(head))
        self.console.print(line)

    @contextmanager
    def progress(
        self,
        what: str,
        total: int,
        done: int = 0,
        every: int | None = None,
        unit: str = "",
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Progress]:
        """Show how far ``total`` units are done: by a bar, or lines, every ``every`` units and 30 s, else every 10 s.

        A ``unit`` named tok is shown with its rate. The bar says so once the job is ``stopping`` for a signal.
        """
        progress = Progress(self, what, total, done, every, unit, stopping)
        if not self.live:
            yield progress
            return
        with Live(progress, console=self.console, transient=True, redirect_stdout=sys.stdout.isatty()):
            self.console.show_cursor()  # a process that is killed could not
            yield progress


WORDS = {
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
}
# What a bar goes without where there is no room, the first of them first.
SPARED = ("rewards/accuracies", "rewards/margins", "tokens_per_second", "loss")


def brief(values: Mapping[str, float], spared: Sequence[str] = ()) -> str:
    """The metrics that are shown while they come in."""
    shown = (name for name in WORDS if name in values and name not in spared)
    return "  ".join(WORDS[name].format(values[name]) for name in shown)


def clock(seconds: float) -> str:
    """A duration as m:ss, or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """One running job; see ``Reporter.progress``."""

    def __init__(
        self,
        reporter: Reporter,
        what: str,
        total: int,
        done: int,
        every: int | None,
        unit: str,
        stopping: Callable[[], bool],
    ) -> None:
        self.reporter, self.what, self.total, self.every = reporter, what, total, every
        self.unit, self.stopping = unit, stopping
        self.patience = 30 if every else 10  # seconds without a line
        self.done = done
        self.started = self.told = time.monotonic()
        self.values: Mapping[str, float] = {}
        self.eta: float | None = None  # seconds
        self.began: tuple[float, int] | None = None  # when the clock began, and what was done by then

    def advance(self, units: int, values: Mapping[str, float] | None = None) -> None:
        """Count units as done, with metrics to show beside them. The first ones start the clock: they warm up."""
        self.done += units
        self.values, now = values or {}, time.monotonic()
        if self.began:
            pace = (self.done - self.began[1]) / max(now - self.began[0], 1e-9)
            self.eta = (self.total - self.done) / pace
            if self.unit == "tok":
                self.values = {"tokens_per_second": pace}
        else:
            self.began, self.eta = (now, self.done), None if self.done < self.total else 0.0
        counted = self.done == self.total or (self.every and self.done % self.every == 0)
        if self.reporter.live or not (counted or now - self.told >= self.patience):
            return
        self.told = now
        event: dict[str, Any] = {"event": "progress", "what": self.what, "done": self.done, "total": self.total}
        more = {"unit": self.unit or None, "eta_seconds": self.eta}
        self.reporter.tell(event | more | dict(self.values), f"{self._count()}  {self._told()}")

    def _count(self) -> str:
        return f"{self.what} {self.done:,}/{self.total:,} {self.unit}".rstrip()

    def _told(self, spared: Sequence[str] = ()) -> str:
        elapsed = time.monotonic() - self.started
        when = f"{clock(elapsed)} elapsed" if self.eta is None else f"eta {clock(self.eta)}"
        return "  ".join(filter(None, (brief(self.values, spared), when)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar: a line, with room behind it for the ``^C`` of an interrupt. A narrow one leaves metrics out."""
        count, widest = self._count(), options.max_width - 3
        if self.stopping():
            yield Text(f"{count}  stopping after this forward; once more to end at once", no_wrap=True, overflow="crop")
            return
        for fewer in range(len(SPARED) + 1):
            told = self._told(SPARED[:fewer])
            width = min(widest - len(f"{count}  {told}"), 40)
            if width >= (3 if fewer else 10):
                break
        line = Table.grid()
        line.add_row(f"{count} ", ProgressBar(self.total, self.done, max(width, 1)), f" {told}")
        yield line
