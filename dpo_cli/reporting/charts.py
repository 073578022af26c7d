"""Plots of one evaluation: margins, reliability, length, accuracy by bucket.

Legend: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.evaluation.scores import Evaluation, Scores
from dpo_cli.reporting.plots import LEFT, WIDTH, Colours, Column, Plot, limits, quieten
from dpo_cli.utils.formatting import between, is_number, nice, number, percent, share_tick, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
MOST_DOTS = 2000


@dataclass(frozen=True)
class Known:
    """The pairs whose margin is a finite number: margins, wins, and chosen tokens less rejected tokens, (P,) each."""

    margins: Column
    wins: Column
    gaps: Column


def charts(evaluation: Evaluation) -> list[Plot]:
    """A plot of everything that the evaluation has."""
    result, known = evaluation.result, _known(evaluation.scores)
    buckets, curve = result.get("buckets") or {}, (result.get("calibration") or {}).get("curve")
    found = []
    if len(known.margins):
        draw = partial(_draw_margins, known=known)
        found.append(Plot("margins", "Margins", "pairs", _said_of_margins(known.margins), draw))
    if curve:
        said = RELIABILITY + _said_of_error(result["calibration"])
        draw = partial(_draw_reliability, curve=curve)
        found.append(Plot("reliability", "Reliability", "share ranked right", said, draw))
    if rows := buckets.get("margin"):
        draw = partial(_draw_buckets, rows=rows)
        found.append(Plot("by-margin", "Accuracy by size of margin", "", BY_MARGIN, draw))
    if len(known.margins):
        said = _said_of_length(len(known.margins), result.get("length") or {})
        draw = partial(_draw_lengths, known=known)
        found.append(Plot("length", "Margin and length", "margin", said, draw))
    if rows := buckets.get("length"):
        draw = partial(_draw_buckets, rows=rows)
        found.append(Plot("by-length", "Accuracy by length gap", "tokens", BY_LENGTH, draw))
    return found


def _known(scores: Scores) -> Known:
    with np.errstate(all="ignore"):
        margins, wins = scores.margins, scores.wins
    keep = np.isfinite(margins) & (np.abs(margins) < 1e30)  # what can be drawn
    return Known(margins[keep], wins[keep], (scores.tokens[:, 0] - scores.tokens[:, 1])[keep])


RELIABILITY = (
    "Confidence σ(|margin|) against the share ranked right, with 95 % intervals; a larger dot holds more pairs. "
    "Below the diagonal the policy is surer than it is right."
)
BY_MARGIN = (
    "Fifths of the pairs by |margin|, from undecided to sure, with 95 % intervals. It should climb; "
    "low at the sure end means mistaken labels or a wrong lesson."
)
BY_LENGTH = (
    "By tokens of the chosen response less those of the rejected one. Far apart at the two ends: "
    "the policy goes by length."
)


def _said_of_margins(margins: Column) -> str:
    low, median, high = np.quantile(margins, [0.05, 0.5, 0.95])
    return (
        f"Right of 0 the chosen response has the higher reward. Median {number(median, True)} (dashed), nine in ten "
        f"between {number(low, True)} and {number(high, True)}; the outermost bars hold all that lies beyond."
    )


def _said_of_error(calibration: Mapping[str, Any]) -> str:
    error, by_chance = calibration.get("ece"), calibration.get("ece_expected")
    if not (is_number(error) and is_number(by_chance)):
        return ""
    return f" They are {number(error)} apart on average (ECE), where chance alone makes {number(by_chance)} of it."


def _said_of_length(pairs: int, length: Mapping[str, Any]) -> str:
    every = f" (of {pairs:,}, one in {-(-pairs // MOST_DOTS)} is shown)" if pairs > MOST_DOTS else ""
    text = f"Each dot is a pair{every}. A slope is a length bias"
    if not is_number(rank := length.get("margin_length_correlation")):
        return f"{text}."
    ends = between(length.get("margin_length_correlation_interval"), partial(number, signed=True))
    return f"{text}; the rank correlation is {number(rank, True)} (95 %: {ends})."


# ---- drawing ----------------------------------------------------------------------------------------------------


def _draw_margins(axes: Axes, colours: Colours, known: Known) -> None:
    margins, wins = known.margins, known.wins
    low, high = np.quantile(margins, [0.005, 0.995])
    spread = max(high, 0.0) - min(low, 0.0)
    width = nice(spread / 32) if spread > 1e-9 else 0.05
    first, last = math.floor(min(low, 0.0) / width), math.ceil(max(high, 0.0) / width)
    edges = np.arange(min(first, -2), max(last, 2) + 1) * width
    for part, role in ((wins == 0, "rejected"), (wins == 1, "chosen")):
        counts, _ = np.histogram(np.clip(margins[part], edges[0], np.nextafter(edges[-1], 0)), edges)
        axes.bar(edges[:-1][counts > 0], counts[counts > 0], width * 0.88, align="edge", color=colours[role], lw=0)
    if ties := int((wins == 0.5).sum()):
        axes.bar([0.0], [ties], width * 0.3, color=colours["muted"], lw=0)
    axes.axvline(float(np.median(margins)), color=colours["ink"], lw=1, dashes=(3, 3))
    axes.set_xlim(edges[0] - width, edges[-1] + width)
    axes.set_ylim(0, axes.dataLim.ymax * 1.15 or 1)
    _wide(axes)
    quieten(axes, colours, "margin")
    for x, side, share, word, role in (
        (0.0, "left", (wins == 0).mean(), "wrong", "rejected"),
        (1.0, "right", (wins == 1).mean(), "right", "chosen"),
    ):
        said = f"{percent(share, 0)} {word}"
        axes.text(x, 0.97, said, color=colours[role], ha=side, va="top", weight="bold", transform=axes.transAxes)


def _draw_reliability(axes: Axes, colours: Colours, curve: Sequence[Row]) -> None:
    held = [row for row in curve if all(is_number(row.get(name)) for name in ("pairs", "predicted", "observed"))]
    held = [row for row in held if row["pairs"] > 0]
    most = max((row["pairs"] for row in held), default=1)
    axes.plot([0.5, 1], [0.5, 1], color=colours["muted"], lw=0.8, dashes=(3, 3))
    for row in held:
        _whisker(axes, colours["ink"], row.get("interval"), row["predicted"])
    x, y = [row["predicted"] for row in held], [row["observed"] for row in held]
    axes.scatter(x, y, [10 + 60 * row["pairs"] / most for row in held], color=colours["chosen"], lw=0, zorder=3)
    axes.set_xlim(0.485, 1.015)
    axes.set_ylim(-0.02, 1.02)
    _wide(axes)
    quieten(axes, colours, "confidence σ(|margin|)", x_format=share_tick, y_format=share_tick)


def _whisker(axes: Axes, colour: str, interval: Any, at: float, flat: bool = False) -> None:
    if isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval)):
        ends = (list(interval), [at, at]) if flat else ([at, at], list(interval))
        axes.plot(*ends, color=colour, lw=1.1, alpha=0.75, solid_capstyle="butt")


def _draw_lengths(axes: Axes, colours: Colours, known: Known) -> None:
    every = -(-len(known.margins) // MOST_DOTS)
    gaps, margins, wins = known.gaps[::every], known.margins[::every], known.wins[::every]
    for part, role in ((wins == 0, "rejected"), (wins == 0.5, "muted"), (wins == 1, "chosen")):
        if part.any():
            axes.scatter(gaps[part], margins[part], 11, color=colours[role], alpha=0.6, lw=0)
    axes.axhline(0, color=colours["muted"], lw=0.8)
    axes.axvline(0, color=colours["muted"], lw=0.8, dashes=(3, 3))
    axes.set_xlim(*_core(gaps))
    axes.set_ylim(*_core(margins))
    _wide(axes)
    quieten(axes, colours, "← chosen shorter · tokens · chosen longer →", whole=True)


def _core(values: Column) -> tuple[float, float]:
    """Limits around nearly all values and 0: one odd pair does not press the others together."""
    low, high = np.quantile(values, [0.01, 0.99])
    reach = 3 * (high - low) or 1.0
    return limits(np.append(values[(values >= low - reach) & (values <= high + reach)], 0.0))


def _draw_buckets(axes: Axes, colours: Colours, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        axes.axhline(place, color=colours["rule"], lw=0.8, zorder=0)
        if is_number(row.get("accuracy")):
            _whisker(axes, colours["ink"], row.get("interval"), place, flat=True)
            axes.scatter([row["accuracy"]], [place], 30, color=colours["chosen"], lw=0, zorder=3)
        said = f"{percent(row.get('accuracy'), 0)}  of {number(row.get('pairs'))}"
        axes.text(1.04, place, said, color=colours["ink"], va="center", transform=axes.get_yaxis_transform())
    axes.axvline(0.5, color=colours["muted"], lw=0.8, dashes=(3, 3))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _wide(axes, left=92, right=84)
    quieten(axes, colours, "ranked right", x_format=share_tick, ticks=3)
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), [_span(row) for row in rows])


def _span(row: Row) -> str:
    low, high = (tick(float(f"{row[end]:.2g}")) if is_number(row.get(end)) else "" for end in ("from", "to"))
    return f"{low} to {high}" if low and high else f"up to {high}" if high else f"from {low}" if low else "all"


def _wide(axes: Axes, left: float = LEFT, right: float = 14) -> None:
    """Take the room that a curve leaves for the names at its ends."""
    box = axes.get_position()
    axes.set_position((left / WIDTH, box.y0, (WIDTH - left - right) / WIDTH, box.height))
