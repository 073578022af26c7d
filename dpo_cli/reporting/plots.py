"""Plots by matplotlib in one quiet theme: pictures for the report, and as files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_cli.evaluation.metrics import SIDES, PairScores
from dpo_cli.losses.objective import DPO, Objective
from dpo_cli.utils.files import atomic_write
from dpo_cli.utils.formatting import is_number, number, percent

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.axes import Axes

Column = npt.NDArray[np.float64]
History = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 350, 216  # points of one plot
COLORS = {"ink": "#23221f", "muted": "#6a665e", "rule": "#e3dfd6", "chosen": "#1c6bb0", "rejected": "#b4560a"}
INK, MUTED = COLORS["ink"], COLORS["muted"]
THEME: Any = {
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.{size}.size": 0 for axis in "xy" for size in ("major", "minor")},
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["rule"],
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo",  # the same input gives the same bytes
}
FAR = 30  # ratio of the largest to the smallest value from which an axis is logarithmic
SMOOTHED = 40  # steps from which on a running mean is drawn


@dataclass(frozen=True)
class Plot:
    """A plot to be drawn. Its words are the package's own, never the data's."""

    title: str
    unit: str
    caption: str
    draw: Callable[[Axes], None]


def png(plot: Plot) -> bytes:
    """Draw a plot without its title, on a transparent ground."""
    picture = io.BytesIO()
    _save(picture, [replace(plot, title="", unit="")], format="png", dpi=108, transparent=True)
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
            axes = figure.add_subplot(rows, columns, place)
            plot.draw(axes)
            axes.set_title(" · ".join(filter(None, (plot.title, plot.unit))), pad=20)
        figure.savefig(target, metadata={"Date": None}, **how)


# ---- curves of a training ---------------------------------------------------------------------------------------


CURVES = (  # title, unit, metrics, where a dashed line is drawn, caption
    ("Loss", "", ["loss"], None, "Held-out loss that rises while the training loss falls: over-optimised."),
    ("Margin", "beta × nats", ["rewards/margins"], 0, "Held-out pairs far behind training pairs: memorised."),
    ("Accuracy", "", ["rewards/accuracies"], 0.5, "Share of pairs ranked right. A coin gets half (dashed)."),
    ("Rewards", "beta × nats", [f"rewards/{s}" for s in SIDES], 0, "The gap between the two is the margin."),
    ("KL from the reference", "nats per token", [f"kl/{s}" for s in SIDES], 0, "What the preference cost."),
    ("Gradient norm", "", ["grad_norm"], None, "Before clipping. A rising floor: the run becomes unstable."),
)


def curves(history: History, objective: Objective = DPO) -> list[Plot]:
    """Plot each quantity in the lines of ``metrics.jsonl``; held-out ones (``eval_``) as rings."""
    plots = []
    for title, unit, names, level, caption in CURVES:
        if title == "Loss" and objective.is_vanilla_dpo:
            level, caption = math.log(2), f"{caption} Dashed: ln 2, the start model's but for weights and margins."
        if any(len(points(history, prefix + name)[0]) for name in names for prefix in ("", "eval_")):
            draw = partial(_draw_curve, history=history, names=names, level=level, as_percent=title == "Accuracy")
            plots.append(Plot(title, unit, caption, draw))
    return plots


def points(history: History, name: str) -> tuple[Column, Column]:
    """Steps and finite values of a metric, in the order of steps; the last of a step counts."""
    values = {line["step"]: line[name] for line in history if is_number(line.get(name)) and is_number(line.get("step"))}
    steps = sorted(step for step, value in values.items() if abs(value) < 1e30)  # what can be drawn
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def _draw_curve(axes: Axes, history: History, names: Sequence[str], level: float | None, as_percent: bool) -> None:
    show = percent if as_percent else number
    for name in names:
        side = name.partition("/")[2] if len(names) > 1 else ""
        color = COLORS[side or "ink"]
        (steps, values), held_out = points(history, name), points(history, f"eval_{name}")
        if len(steps):
            faint = MUTED if not side and len(held_out[0]) else color
            window = len(steps) // 20 if len(steps) >= SMOOTHED else 1
            if window > 1:
                axes.plot(steps, values, color=faint, lw=0.7, alpha=0.35)
                values = np.convolve(values, np.full(window, 1 / window), "valid")
                steps = steps[(window - 1) // 2 :][: len(values)]
            marker = "o" if len(steps) == 1 else ""
            axes.plot(steps, values, marker=marker, color=faint, label=f"{side or 'training'} {show(values[-1])}")
        if len(held_out[0]):
            label = None if side and len(steps) else f"{side or 'held out'} {show(held_out[1][-1])}"
            axes.plot(*held_out, "o-", color=color, lw=0.8, ms=4, mfc="none", label=label)
    if level is not None:
        axes.axhline(level, color=MUTED, lw=0.8, ls="--", zorder=1)
    _finish(axes, "step", y_percent=as_percent)


# ---- plots of an evaluation -------------------------------------------------------------------------------------


def pair_plots(scores: PairScores) -> list[Plot]:
    """Plots of the pairs whose margin is finite: their margins, and margin against length."""
    with np.errstate(all="ignore"):
        margins, wins = scores.margins, scores.wins
    keep = np.isfinite(margins) & (np.abs(margins) < 1e30)  # what can be drawn
    if not keep.any():
        return []
    margins, wins, gaps = margins[keep], wins[keep], (scores.tokens[:, 0] - scores.tokens[:, 1])[keep]
    low, median, high = (number(end, signed=True) for end in np.quantile(margins, [0.05, 0.5, 0.95]))
    histogram = (
        f"Right of 0 the chosen response has the higher reward. Median {median} (dashed), 90% between {low} and "
        f"{high}; the outermost bars include everything beyond."
    )
    by_length = partial(_draw_lengths, gaps=gaps, margins=margins, wins=wins)
    return [
        Plot("Margins", "pairs", histogram, partial(_draw_margins, margins=margins, wins=wins)),
        Plot("Margin and length", "margin", "One dot per pair. A slope is a length bias.", by_length),
    ]


def _draw_margins(axes: Axes, margins: Column, wins: Column) -> None:
    low, high = np.quantile(np.append(margins, 0.0), [0.005, 0.995])
    width = (high - low) / 32 if high - low > 1e-9 else 0.05
    edges = np.arange(min(math.floor(low / width), -1), max(math.ceil(high / width), 1) + 1) * width  # 0 is one of them
    for value, role in ((0, "rejected"), (0.5, "muted"), (1, "chosen")):
        part = np.clip(margins[wins == value], edges[0], edges[-1])
        axes.hist(part, edges.tolist(), color=COLORS[role], rwidth=0.9)
    for x, word, role in ((0.0, "wrong", "rejected"), (1.0, "right", "chosen")):
        text, side = f"{percent((wins == x).mean(), 0)} {word}", "right" if x else "left"
        axes.text(x, 1.03, text, color=COLORS[role], ha=side, transform=axes.transAxes)
    axes.axvline(float(np.median(margins)), color=INK, lw=1, ls="--")
    _finish(axes, "margin")


def _draw_lengths(axes: Axes, gaps: Column, margins: Column, wins: Column) -> None:
    roles = np.array([COLORS["rejected"], MUTED, COLORS["chosen"]])[(2 * wins).astype(int)]
    axes.scatter(gaps, margins, 11, color=roles.tolist(), alpha=0.6, lw=0)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axvline(0, color=MUTED, lw=0.8, ls="--")
    _finish(axes, "← chosen shorter · tokens · chosen longer →")


# ---- the frontier of a sweep ------------------------------------------------------------------------------------


def frontier(points: Sequence[Mapping[str, Any]], unit: str) -> list[Plot]:
    """Plots of margin and accuracy over KL.

    ``points`` have ``beta``, ``kl`` and the quantities' names, each with its interval under ``intervals``.
    """
    points = sorted(points, key=lambda point: float(point["beta"]))
    draw = partial(_draw_frontier, points=points, unit=unit)
    return [
        Plot("Margin and KL", "beta × nats", "", partial(draw, name="rewards/margins", level=0.0)),
        Plot("Accuracy and KL", "", "", partial(draw, name="rewards/accuracies", level=0.5)),
    ]


def _draw_frontier(axes: Axes, points: Sequence[Mapping[str, Any]], unit: str, name: str, level: float) -> None:
    (x, x_errors), (y, y_errors) = (_with_errors(points, each) for each in ("kl", name))
    axes.axhline(level, color=MUTED, lw=0.8, ls="--", zorder=1)
    axes.errorbar(x, y, y_errors, x_errors, fmt="o-", color=INK, ecolor=MUTED, elinewidth=0.9, lw=1.2, ms=4)
    for at, height, point in zip(x, y, points, strict=True):
        axes.annotate(f"β {point['beta']:g}", (at, height), (5, -11), textcoords="offset points", size=9)
    if min(x) > 0 and max(x) > FAR * min(x):
        axes.set_xscale("log")
    axes.margins(x=0.12)
    _finish(axes, f"KL from the reference, {unit}", y_percent=name == "rewards/accuracies")


def _with_errors(points: Sequence[Mapping[str, Any]], name: str) -> tuple[Column, Column]:
    """Values (N,) of one name and how far their intervals reach below and above, (2, N)."""
    values = np.array([point[name] for point in points], float)
    ends = [point["intervals"][name] or (value, value) for point, value in zip(points, values, strict=True)]
    return values, np.abs(np.array(ends, float).T - values)


def _finish(axes: Axes, x: str, y_percent: bool = False) -> None:
    """Name the x axis and show few ticks; a legend stands above the axes if a line has a label."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

    axes.set_xlabel(x)
    for axis, ticks in ((axes.xaxis, 5), (axes.yaxis, 4)):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
        else:
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
    if y_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, borderaxespad=0, fontsize=9, labelcolor=MUTED)
