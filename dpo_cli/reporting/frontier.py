"""Plots of a sweep: what each reward costs in KL from the reference, a point for every beta."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.reporting.plots import Colours, Column, Plot, limits, quieten
from dpo_cli.utils.formatting import share_tick, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = Mapping[str, Any]
FAR = 30  # times, from which on the KLs of a sweep are drawn on a logarithmic axis

NAME = (30, 11)  # CSS pixels that a point's name takes up


@dataclass(frozen=True)
class Quantity:
    """What is drawn over the KL; ``level`` is that of the reference."""

    name: str
    title: str
    what: str
    caption: str
    level: float
    percent: bool = False


MARGIN = Quantity(
    "rewards/margins",
    "Margin and KL",
    "beta × nats",
    "Chosen reward minus rejected reward on held-out pairs. It has beta in it, so compare accuracies between betas.",
    0.0,
)
ACCURACY = Quantity(
    "rewards/accuracies",
    "Accuracy and KL",
    "",
    "Share of held-out pairs whose chosen response has the higher reward. A coin gets half (dashed).",
    0.5,
    percent=True,
)


def frontier(points: Sequence[Point], unit: str, reference_reward: float | None = None) -> list[Plot]:
    """Plots of margin and accuracy over KL, and before them of the answers' reward where the reference has one.

    ``points`` have ``beta``, ``kl`` and the quantities' names, each with its interval under ``intervals``.
    """
    quantities = [MARGIN, ACCURACY]
    if reference_reward is not None:
        caption = "Mean reward of sampled answers; dashed: the reference's own answers."
        quantities = [Quantity("reward", "Reward and KL", "", caption, reference_reward), *quantities]
    points = sorted(points, key=lambda point: float(point["beta"]))
    return [
        Plot(f"frontier-{q.name}", q.title, q.what, q.caption, partial(_draw, points=points, unit=unit, quantity=q))
        for q in quantities
    ]


def _draw(axes: Axes, colours: Colours, points: Sequence[Point], unit: str, quantity: Quantity) -> None:
    """The points in the order of beta, each with its beta and both intervals."""
    (x, x_ends), (y, y_ends) = (_column(points, name) for name in ("kl", quantity.name))
    ink, muted = colours["ink"], colours["muted"]
    axes.axhline(quantity.level, color=muted, lw=0.8, dashes=(3, 3), zorder=1)
    beside = axes.get_yaxis_transform()
    axes.text(1.02, quantity.level, "reference", color=muted, size=9, va="center", transform=beside)
    axes.hlines(y, *x_ends, color=muted, lw=0.9)
    axes.vlines(x, *y_ends, color=muted, lw=0.9)
    axes.plot(x, y, "o-", color=ink, lw=1.2, ms=4)
    axes.set_ylim(*limits(np.append(y_ends, quantity.level), 0.1))
    y_format = share_tick if quantity.percent else tick
    quieten(axes, colours, f"KL from the reference, {unit}", y_format=y_format)
    _set_width(axes, x, x_ends)
    _label(axes, ink, x, y, [f"β {tick(point['beta'])}" for point in points])


def _set_width(axes: Axes, x: Column, x_ends: Column) -> None:
    """All intervals with room for the last label; KLs that lie far apart on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    positive = np.where(x_ends > 0, x_ends, x)  # an interval that reaches 0 has no end on a logarithmic axis
    far = bool((x > 0).all()) and x.max() > FAR * x.min()
    low, high = limits(np.log(positive) if far else x_ends)
    high += (high - low) / 10
    if not far:
        axes.set_xlim(low, high)
        return
    axes.set_xscale("log")
    axes.set_xlim(math.exp(low), math.exp(high))
    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)))
    ticks = [first * 10.0**power for power in powers for first in (1, 3)]
    ticks = [each for each in ticks if low <= math.log(each) <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 5)]))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, colour: str, x: Column, y: Column, labels: Sequence[str]) -> None:
    """Name the points where no other's name is: to the right above each if it can be, below, or to the left."""
    places, taken = axes.transData.transform(np.column_stack([x, y])), np.zeros((0, 2))
    for i in np.argsort(x):
        spots = [(side, height) for side in ("left", "right") for height in (4, -11)]  # its side that is at the point
        corners = [places[i] + (4 if side == "left" else -4 - NAME[0], height) for side, height in spots]
        free = [k for k, corner in enumerate(corners) if not (np.abs(taken - corner) < NAME).all(1).any()]
        side, height = spots[k := free[0] if free else 0]
        taken = np.vstack([taken, corners[k]])
        offset = (4 if side == "left" else -4, height)
        about: Any = {"textcoords": "offset points", "ha": side, "color": colour, "size": 9}
        axes.annotate(labels[i], (x[i], y[i]), offset, **about)


def _column(points: Sequence[Point], name: str) -> tuple[Column, Column]:
    """Values (N,) of one name and the ends (2, N) of their intervals; the value itself where there is none."""
    values = [point[name] for point in points]
    ends = [point["intervals"][name] or (value, value) for point, value in zip(points, values, strict=True)]
    return np.array(values, float), np.array(ends, float).T
