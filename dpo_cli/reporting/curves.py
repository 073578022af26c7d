"""The curves of a training, from the lines of its ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.evaluation.scores import SIDES
from dpo_cli.losses.objective import DPO, Objective
from dpo_cli.reporting.plots import Colours, Column, Plot, limits, quieten, write_png
from dpo_cli.utils.formatting import is_number, number, percent, share_tick, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, Any]]
Points = tuple[Column, Column]
MOST_POINTS = 1000  # a line that are drawn one by one; of more, the range and mean of many at a time
SMOOTHED = 40  # points from which on a running mean goes along


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps; ``names`` are its names in the history, each with the role that colours it."""

    name: str
    title: str
    what: str
    caption: str
    names: dict[str, str]
    level: float | None = None
    percent: bool = False
    smooth: bool = True
    spiky: bool = False


CURVES = (
    Curve(
        "loss",
        "Loss",
        "",
        "Held-out loss that turns up while training goes on down means over-optimised: take an earlier checkpoint.",
        {"loss": "ink"},
    ),
    Curve(
        "margin",
        "Margin",
        "beta × nats",
        "Chosen reward minus rejected reward. Held-out pairs far behind training pairs: memorised.",
        {"rewards/margins": "ink"},
        0.0,
    ),
    Curve(
        "accuracy",
        "Accuracy",
        "",
        "Share of pairs whose chosen response has the higher reward. A coin gets half (dashed).",
        {"rewards/accuracies": "ink"},
        0.5,
        percent=True,
    ),
    Curve(
        "rewards",
        "Rewards",
        "beta × nats",
        "What opens between the two is the margin. Where both fall, the chosen responses grow rarer too.",
        {f"rewards/{side}": side for side in SIDES},
        0.0,
    ),
    Curve(
        "kl",
        "KL from the reference",
        "nats a token",
        "Exact, in nats a token, on each kind of response: what the preference has cost in drift.",
        {f"kl/{side}": side for side in SIDES},
        0.0,
    ),
    Curve(
        "lr",
        "Learning rate",
        "",
        "As the schedule planned it: warm-up, then decay.",
        {"learning_rate": "ink"},
        smooth=False,
    ),
    Curve(
        "norm",
        "Gradient norm",
        "",
        "Before clipping. One spike is an odd batch; a rising floor is a run that grows unstable.",
        {"grad_norm": "ink"},
        spiky=True,
    ),
)


@dataclass(frozen=True)
class Line:
    """Steps and values of one name, in training and held out."""

    role: str
    train: Points
    held: Points


def curves(history: History, objective: Objective = DPO) -> list[Plot]:
    """A plot of each quantity that the history has: training lines, and held-out ones (``eval_`` names) over them."""
    found = []
    for curve in CURVES:
        if curve.name == "loss" and objective.is_vanilla_dpo:
            dashed = f"Dashed: ln 2, the reference's own, but for weights and margins of the pairs. {curve.caption}"
            curve = dataclasses.replace(curve, level=math.log(2), caption=dashed)
        named = curve.names.items()
        lines = [Line(role, points(history, name), points(history, f"eval_{name}")) for name, role in named]
        if any(len(steps) for line in lines for steps, _ in (line.train, line.held)):
            draw = partial(_draw, curve=curve, lines=lines)
            found.append(Plot(curve.name, curve.title, curve.what, curve.caption, draw))
    return found


def write_curves(file: Path, history: History, objective: Objective = DPO) -> None:
    """Write all curves as one PNG.

    Raises:
        NotWrittenError: the disk is full or the folder is closed.
    """
    write_png(file, curves(history, objective))


def points(history: History, name: str) -> Points:
    """Steps and values of one name, in the order of steps; NaN where a value is no number that can be drawn."""
    found = {}
    for line in history:
        if name in line and is_number(line.get("step")):
            value = line[name]
            found[float(line["step"])] = float(value) if is_number(value) and abs(value) < 1e30 else math.nan
    steps = np.array(sorted(found), dtype=float)
    return steps, np.array([found[step] for step in steps], dtype=float)


# ---- drawing ----------------------------------------------------------------------------------------------------


def _draw(axes: Axes, colours: Colours, curve: Curve, lines: Sequence[Line]) -> None:
    """Training as lines, held-out pairs as rings; each is named where it ends."""
    show, sided = percent if curve.percent else number, len(lines) > 1
    ends: list[tuple[float, str, str]] = []
    for line in lines:
        (steps, values), (held_steps, held_values) = line.train, line.held
        both, ringed = len(steps) and len(held_steps), colours[line.role]
        if len(steps):
            colour = colours["muted"] if both and not sided else ringed
            last = _draw_training(axes, colour, steps, values, curve.smooth)
            ends.append((last, line.role if sided else "training" if both else "", colour))
        axes.plot(held_steps, held_values, "o-", color=ringed, lw=0.8, ms=4, mfc="none", mew=1.2)
        if len(known := held_values[np.isfinite(held_values)]) and not (sided and len(steps)):
            ends.append((float(known[-1]), line.role if sided else "held out", ringed))
    parts = [part for line in lines for part in (line.train, line.held)]
    axes.set_xlim(*limits(np.concatenate([steps for steps, _ in parts]), 0.02))
    _set_height(axes, colours, curve, np.concatenate([values for _, values in parts]))
    quieten(axes, colours, "step", whole=True, y_format=share_tick if curve.percent else tick)
    _label_ends(axes, [(y, f"{name}\n{show(y)}".strip(), colour) for y, name, colour in ends])


def _set_height(axes: Axes, colours: Colours, curve: Curve, values: Column) -> None:
    known = values[np.isfinite(values)]
    if curve.level is not None:
        axes.axhline(curve.level, color=colours["muted"], lw=0.8, dashes=(3, 3), zorder=1)
        known = np.append(known, curve.level)
    if curve.spiky and len(known) and known.min() > 0 and known.max() > 30 * np.median(known):
        axes.set_yscale("log")
        axes.set_ylim(*np.exp(limits(np.log(known))))
    else:
        axes.set_ylim(*limits(known))


def _draw_training(axes: Axes, colour: str, steps: Column, values: Column, smooth: bool) -> float:
    """Each step faint and a running mean firm; of a long run the range of many steps. Gives the last of the mean."""
    if len(steps) > MOST_POINTS:
        steps, values = _draw_range(axes, colour, steps, values)
    elif smooth and len(steps) >= SMOOTHED:
        axes.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
    if smooth and len(steps) >= SMOOTHED:
        values = _running_mean(values, len(steps) // 25)
    axes.plot(steps, values, color=colour, lw=1.5, marker="o" if len(steps) == 1 else "", ms=4)
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _draw_range(axes: Axes, colour: str, steps: Column, values: Column) -> Points:
    """Shade from the least to the most of many steps, so that no spike is lost; their middles and means."""
    many = -(-len(steps) // (MOST_POINTS // 2))
    parts = np.split(np.arange(len(steps)), range(many, len(steps), many))
    known = [values[part][np.isfinite(values[part])] for part in parts]
    table = np.array([(v.min(), v.mean(), v.max()) if len(v) else (np.nan,) * 3 for v in known])
    middles = np.array([steps[part].mean() for part in parts])
    axes.fill_between(middles, table[:, 0], table[:, 2], color=colour, alpha=0.25, lw=0)
    return middles, table[:, 1]


def _running_mean(values: Column, window: int) -> Column:
    """Mean over a centred window of the finite values; shorter at the ends, NaN where there is none."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    inside = counts[high] - counts[low]
    return np.where(inside > 0, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name the lines where they end, upwards, each clear of the one below."""
    to_axes = axes.transData + axes.transAxes.inverted()
    x, apart, below = axes.get_xlim()[1], 0.17, -math.inf
    known = sorted((float(to_axes.transform((x, y))[1]), text, colour) for y, text, colour in ends if math.isfinite(y))
    for rank, (at, text, colour) in enumerate(known):
        below = max(min(at, 0.97 - apart * (len(known) - 1 - rank)), below + apart, 0.05)
        axes.text(1.03, below, text, color=colour, va="center", linespacing=1.15, transform=axes.transAxes)
