"""What a person sees of a running job, on stderr: lines of text or JSON, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from textwrap import fill
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from dpo_cli.utils.errors import printable
from dpo_cli.utils.files import DAY, to_json


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would exit: a training outlives the reader of its log
        self.quiet = True


class Reporter:
    """Report a job's progress on stderr: a bar on a terminal, lines elsewhere.

    ``quiet``: only warnings. ``log_json``: each line is a JSON object with its kind under ``event``.
    ``mute``: nothing at all, for ranks other than 0.
    """

    def __init__(self, quiet: bool = False, log_json: bool = False, mute: bool = False) -> None:
        self.quiet, self.log_json = quiet or mute, log_json
        self.console = _Console(
            file=sys.stderr,
            quiet=mute,
            highlight=False,
            soft_wrap=True,
            force_terminal=sys.stderr.isatty(),  # with FORCE_COLOR rich would draw bars into a file
            force_jupyter=False,
        )
        self.live = self.console.is_interactive and not self.quiet and not log_json
        self.name = ""  # of the last line
        self.shown = set[tuple[str, str]]()  # lines by name and text

    def info(self, name: str, text: str, values: Mapping[str, float] | None = None) -> None:
        """Print one line under a name, once; an empty name continues the last one.

        A JSON log gets it as often as it is reported, and the ``values``.
        """
        self.name = name or self.name
        if (line := (self.name, text)) in self.shown and not self.log_json:
            return
        self.shown.add(line)
        event: dict[str, Any] = {"event": "info", "name": self.name, "text": text}
        self.emit(event | dict(values or {}), text, f"{name:<12}", "bold")

    def warning(self, text: str) -> None:
        """Print something that does not stop the run but that the user should know."""
        self.emit({"event": "warning", "text": text}, text, "warning: ", "yellow")

    def emit(self, event: Mapping[str, Any], text: str, head: str = "", style: str = "") -> None:
        """Print an event: as JSON, or as its text after a head, wrapped on a terminal."""
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

    def progress(self, *args: Any, **more: Any) -> Progress:
        """Show the progress of a job; see ``Progress``."""
        return Progress(self, *args, **more)


METRIC_FORMATS = {
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
}


def format_metrics(values: Mapping[str, float]) -> str:
    """Format the metrics that are shown during training."""
    return "  ".join(text.format(values[name]) for name, text in METRIC_FORMATS.items() if name in values)


class Progress:
    """The progress of a job: a bar on a terminal, else a line per ``every`` units or 30 s (no ``every``: 10 s).

    Remaining time and rate leave out the first, slow, units; the rate is shown if the unit is ``tok``.
    ``stopping``: whether a signal asked the job to stop.
    """

    def __init__(
        self,
        reporter: Reporter,
        what: str,
        total: int,
        done: int = 0,
        every: int | None = None,
        unit: str = "",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.reporter, self.every, self.unit, self.stopping = reporter, every, unit, stopping
        self.printed, self.patience = time.monotonic(), 30 if every else 10  # seconds without a line
        self.count_format, self.status = f"{what} {{task.completed:,}}/{{task.total:,}} {unit}".rstrip(), ""
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn(self.count_format),
            rich_progress.BarColumn(30),
            rich_progress.RenderableColumn(self),
            console=reporter.console,
            transient=True,
            disable=not reporter.live,
            get_time=time.monotonic,
            speed_estimate_period=DAY,
        )
        self.bar.add_task(what, total=total, completed=done)
        (self.task,) = self.bar.tasks

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __rich__(self) -> Text:
        """Return the text beside the bar: the metrics, or that the job stops."""
        stopping = "stopping after this forward; repeat to end at once"
        return Text(stopping if self.stopping() else self.status, no_wrap=True, overflow="crop")

    def advance(self, units: int, values: Mapping[str, float] | None = None) -> None:
        """Count units as done, with metrics to show beside them."""
        task, values, now = self.task, dict(values or {}), time.monotonic()
        self.bar.update(task.id, completed=min(task.completed + units, task.total or 0))
        eta = task.time_remaining
        if self.unit == "tok" and task.speed:
            values["tokens_per_second"] = task.speed
        left = "" if eta is None else f"eta {timedelta(seconds=eta)}"
        self.status = f"{format_metrics(values)}  {left}".strip()
        due = task.finished or (self.every and task.completed % self.every == 0)
        if not self.reporter.live and (due or now - self.printed >= self.patience):
            self.printed = now
            event = {"event": "progress", "what": task.description, "done": task.completed, "total": task.total}
            more = {"unit": self.unit or None, "eta_seconds": eta}
            self.reporter.emit(event | more | values, f"{self.count_format.format(task=task)}  {self.status}".rstrip())
