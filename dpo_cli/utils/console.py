"""What a person sees of a running job, on stderr: lines of text or JSON, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_cli.utils.errors import printable
from dpo_cli.utils.files import to_json


class _Console(Console):
    """Falls silent when who read it has gone: a training goes on, and its result is still told on stdout."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Reporter:
    """Tells a person what happens, on stderr: with a bar on a terminal, in lines elsewhere.

    ``quiet``: nothing but warnings. ``log_json``: each line is a JSON object with its kind under ``event``.
    ``mute``: nothing at all, for a rank that another one speaks for.
    """

    def __init__(self, quiet: bool = False, log_json: bool = False, mute: bool = False) -> None:
        self.quiet, self.log_json = quiet or mute, log_json
        self.console = _Console(
            file=sys.stderr,
            quiet=mute,
            highlight=False,
            soft_wrap=True,
            force_terminal=sys.stderr.isatty(),  # FORCE_COLOR makes no terminal of a file: bars have no place there
            force_jupyter=False,  # there it is stderr as well
        )
        self.live = self.console.is_interactive and not self.quiet and not log_json
        self.name = ""  # of the last fact

    def info(self, name: str, text: str, values: Mapping[str, float] | None = None) -> None:
        """One line under a name; an empty name goes on with the one before. A log has the ``values`` beside it."""
        self.name = name or self.name
        event: dict[str, Any] = {"event": "info", "name": self.name, "text": text}
        self.emit(event | dict(values or {}), text, f"{name:<12}", "bold")

    def warning(self, text: str) -> None:
        """Something that does not stop the run and that the user should know."""
        self.emit({"event": "warning", "text": text}, text, "warning: ", "yellow")

    def emit(self, event: Mapping[str, Any], text: str, head: str = "", style: str = "") -> None:
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
        if self.began and self.done == self.total:
            return  # of several ranks one counts for all, and had a little more than its share
        self.done = min(self.done + units, self.total)
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
        self.reporter.emit(event | more | dict(self.values), f"{self._count()}  {self._told()}")

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
