"""Plots by matplotlib: pictures for the report, and as files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.evaluation.metrics import SIDES, History, PairScores, Table
from dpo_cli.reporting.text import is_number, number
from dpo_cli.utils.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 350, 216  # points of one plot
COLORS = {"ink": "#23221f", "muted": "#6a665e", "chosen": "#1c6bb0", "rejected": "#b4560a"}
THEME: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLORS["muted"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo",  # the same input gives the same bytes
}
OUTCOMES = {0.0: "wrong", 0.5: "tie", 1.0: "right"}  # of ``PairScores.wins``
WIN_COLORS = {0.0: COLORS["ink"], 0.5: "#cdc8bd", 1.0: "#948d80"}  # blue and orange are chosen and rejected
LARGEST = 1e30  # a larger value cannot be drawn


@dataclass(frozen=True)
class Plot:
    """A plot to be drawn. Its words are the package's own, never the data's."""

    title: str
    caption: str
    draw: Callable[[Axes], None]


def png(plot: Plot) -> bytes:
    """Draw a plot without its title, on a transparent ground."""
    picture = io.BytesIO()
    _save(picture, [replace(plot, title="")], format="png", dpi=96, transparent=True)
    return picture.getvalue()


def write_plots(file: Path, plots: Sequence[Plot]) -> None:
    """Write plots as one picture, three in a row: SVG or PNG, by the file's name.

    Raises:
        NotWrittenError: the disk is full or the folder is closed.
    """
    with atomic_write(file) as temporary:
        _save(temporary, plots, format=file.suffix[1:], dpi=144, facecolor="white")


def _save(target: Any, plots: Sequence[Plot], **how: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns, rows = max(min(len(plots), 3), 1), max(math.ceil(len(plots) / 3), 1)
    with rc_context(THEME):
        figure = Figure(figsize=(columns * WIDTH / 72, rows * HEIGHT / 72), layout="constrained")
        for place, plot in enumerate(plots, 1):
            axes = figure.add_subplot(rows, columns, place, title=plot.title)
            plot.draw(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        figure.savefig(target, metadata={"Date": None}, **how)


# ---- curves of a training ---------------------------------------------------------------------------------------


CURVES = (  # title, metrics, where a dashed line is drawn, caption
    ("Loss", ["loss"], None, "If the held-out loss rises while the training loss falls, stop earlier."),
    (
        "Margin, beta × nats",
        ["rewards/margins"],
        0,
        "If held-out pairs stay far behind training pairs, those were memorised.",
    ),
    ("Accuracy", ["rewards/accuracies"], 0.5, "Share of pairs ranked right. Dashed: chance."),
    ("Rewards, beta × nats", [f"rewards/{s}" for s in SIDES], 0, "The gap between the two is the margin."),
    (
        "KL from the reference, nats per token",
        [f"kl/{s}" for s in SIDES],
        0,
        "How far the model moved to learn the preference.",
    ),
    ("Gradient norm", ["grad_norm"], None, "Before clipping. If it keeps rising, the run becomes unstable."),
)


def curves(history: History) -> list[Plot]:
    """Plot each quantity in the lines of ``metrics.jsonl``; held-out ones (``eval_``) as rings."""
    plots = []
    for title, names, level, caption in CURVES:
        if any(len(points(history, prefix + name)[0]) for name in names for prefix in ("", "eval_")):
            plots.append(Plot(title, caption, partial(_draw_curve, history=history, names=names, level=level)))
    return plots


def points(history: History, name: str) -> tuple[Table, Table]:
    """Steps and finite values of a metric, in the order of steps; the last of a step counts."""
    values = {line["step"]: line[name] for line in history if is_number(line.get(name)) and is_number(line.get("step"))}
    steps = sorted(step for step, value in values.items() if abs(value) < LARGEST)
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def _draw_curve(axes: Axes, history: History, names: Sequence[str], level: float | None) -> None:
    training: dict[str, Any] = {"marker": ".", "ms": 2, "lw": 1, "alpha": 0.5}
    held_out: dict[str, Any] = {"marker": "o", "ls": "--", "mfc": "none"}
    for name in names:
        side = name.partition("/")[2] if len(names) > 1 else ""
        for line, kind, style in ((name, "training", training), (f"eval_{name}", "held out", held_out)):
            steps, values = points(history, line)
            if len(steps):
                label = f"{side} {kind} {number(values[-1])}".strip()
                line_style = {"ls": ""} if len(steps) < 3 else {}  # two points show no course
                axes.plot(steps, values, color=COLORS[side or "ink"], label=label, **style | line_style)
    if level is not None:
        axes.axhline(level, color=COLORS["muted"], lw=0.8, ls="--", zorder=1)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step")


# ---- plots of an evaluation -------------------------------------------------------------------------------------


def pair_plots(scores: PairScores) -> list[Plot]:
    """Plots of the pairs whose margin is finite: their margins, and margin against length."""
    with np.errstate(all="ignore"):
        margins, wins = scores.margins, scores.wins
    keep = np.isfinite(margins) & (np.abs(margins) < LARGEST)
    if not keep.any():
        return []
    margins, wins, gaps = margins[keep], wins[keep], (scores.tokens[:, 0] - scores.tokens[:, 1])[keep]
    caption = (
        "Right of 0 the chosen answer has the higher reward. Dashed: the median. The outer bars include all beyond."
    )
    by_length = partial(_draw_lengths, gaps=gaps, margins=margins, wins=wins)
    return [
        Plot("Margins, pairs", caption, partial(_draw_margins, margins=margins, wins=wins)),
        Plot("Margin and length", "One dot per pair. A slope means a length bias.", by_length),
    ]


def _draw_margins(axes: Axes, margins: Table, wins: Table) -> None:
    shown = np.clip(margins, *np.quantile(margins, [0.005, 0.995]))
    axes.hist(
        [shown[wins == win] for win in OUTCOMES],
        bins=32,
        stacked=True,
        color=[*WIN_COLORS.values()],
        label=[f"{(wins == win).mean():.0%} {word}" for win, word in OUTCOMES.items()],
    )
    axes.axvline(float(np.median(margins)), color=COLORS["muted"], lw=1, ls="--")
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("margin")


def _draw_lengths(axes: Axes, gaps: Table, margins: Table, wins: Table) -> None:
    axes.scatter(gaps, margins, 11, color=[WIN_COLORS[win] for win in wins.tolist()], alpha=0.6, lw=0)
    axes.axhline(0, color=COLORS["muted"], lw=0.8, ls="--")
    axes.set(xlabel="tokens of chosen - rejected", ylabel="margin")


# ---- the frontier of a sweep ------------------------------------------------------------------------------------


def frontier(points: Sequence[Mapping[str, Any]], unit: str) -> list[Plot]:
    """Plots of margin and accuracy over KL.

    ``points`` have ``beta``, ``kl`` and the quantities' names, each with its interval under ``intervals``.
    """
    draw = partial(_draw_frontier, points=sorted(points, key=lambda point: float(point["beta"])), unit=unit)
    return [
        Plot("Margin and KL", "", partial(draw, name="rewards/margins")),
        Plot("Accuracy and KL", "", partial(draw, name="rewards/accuracies")),
    ]


def _draw_frontier(axes: Axes, points: Sequence[Mapping[str, Any]], unit: str, name: str) -> None:
    values, errors = {}, {}
    for each in ("kl", name):
        values[each] = np.array([point[each] for point in points], float)  # (N,)
        ends = [point["intervals"][each] or (point[each], point[each]) for point in points]
        errors[each] = np.abs(np.array(ends, float).T - values[each])  # below and above: (2, N)
    x, y = values.values()
    several = len({each["lr"] for each in points}) > 1  # no line through points of several learning rates
    axes.errorbar(x, y, errors[name], errors["kl"], fmt="o" if several else "o-", color=COLORS["ink"], elinewidth=0.9)
    for at, height, point in zip(x, y, points, strict=True):
        rate = f", lr {point['lr']:g}" * several
        axes.annotate(f"β {point['beta']:g}{rate}", (at, height), (5, -11), textcoords="offset points")
    axes.set(xlabel=f"KL from the reference, {unit}", ylabel=name)
