"""Quiet plots: SVG whose colours are the page's own variables, and the same plots as a PNG.

Each is of the size of a phone's column, so that its text is as large as the page's wherever it is shown.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_cli.utils.files import atomic_write
from dpo_cli.utils.formatting import tick

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Column = npt.NDArray[np.float64]
Colours = Mapping[str, str]

WIDTH, HEIGHT = 350, 216  # CSS pixels, as are the margins
LEFT, RIGHT, TOP, BOTTOM = 44, 58, 10, 38
HEADING = 26  # above each plot of a PNG; on a page it is HTML
ON_PAPER: Colours = {
    "ink": "#23221f",
    "muted": "#6a665e",
    "rule": "#e3dfd6",
    "chosen": "#1c6bb0",
    "rejected": "#b4560a",
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # of an SVG
STAND_INS: Colours = {role: f"#0102{number:02x}" for number, role in enumerate(ON_PAPER, 3)}


@dataclass(frozen=True)
class Plot:
    """A plot that is still to be drawn. Its words are the package's own, never the data's."""

    name: str
    title: str
    what: str  # the height of the plot counts; stands beside the title
    caption: str
    draw: Callable[[Axes, Colours], None]


def svg(plot: Plot) -> str:
    """The plot as an SVG element: no style, script, address or text of the data in it, colours by CSS variables.

    The same plot gives the same bytes.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    with rc_context(_style(plot.name)):
        figure = _figure([plot], STAND_INS, heading=0)
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata=NO_METADATA, transparent=True)
    return _for_a_page(text.getvalue())


def write_png(file: Path, plots: Sequence[Plot]) -> None:
    """Write the plots as one picture, three in a row.

    Raises:
        NotWrittenError: the disk is full or the folder is closed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _write(file, plots, FigureCanvasAgg, format="png", dpi=144, metadata={"Software": None})


def write_svg(file: Path, plots: Sequence[Plot]) -> None:
    """Write the same picture as an SVG file that stands alone; its text is text. The same plots give the same bytes.

    Raises:
        NotWrittenError: the disk is full or the folder is closed.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    _write(file, plots, FigureCanvasSVG, format="svg", metadata=NO_METADATA)


def _write(file: Path, plots: Sequence[Plot], canvas: Callable[[Figure], object], **how: Any) -> None:
    from matplotlib import rc_context

    with rc_context(_style("picture")), atomic_write(file) as temporary:
        figure = _figure(plots, ON_PAPER, HEADING)
        canvas(figure)
        figure.savefig(temporary, facecolor="white", **how)


def _figure(plots: Sequence[Plot], colours: Colours, heading: int) -> Figure:
    """A figure of one inch for every 72 CSS pixels, with each plot drawn at its place."""
    from matplotlib.figure import Figure

    wide, high = max(min(len(plots), 3), 1) * WIDTH, max(math.ceil(len(plots) / 3), 1) * (HEIGHT + heading)
    figure = Figure(figsize=(wide / 72, high / 72), dpi=72)
    for place, plot in enumerate(plots):
        row, column = divmod(place, 3)
        left, top = column * WIDTH, high - row * (HEIGHT + heading)
        bottom, size = top - heading - HEIGHT + BOTTOM, (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
        axes = figure.add_axes(((left + LEFT) / wide, bottom / high, size[0] / wide, size[1] / high))
        plot.draw(axes, colours)
        if heading:
            figure.text((left + 14) / wide, (top - 20) / high, plot.title, weight="bold", color=colours["ink"])
    return figure


def _style(salt: str = "") -> Any:
    """What a matplotlibrc of the user's could turn to the worse; ``salt`` keeps the ids of two plots apart."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.usetex": False,
        "text.parse_math": False,
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page shows its own font
        "font.size": 10.5,
        "path.sketch": None,
        "path.effects": [],
        "axes.grid": False,
        "figure.autolayout": False,
        "figure.constrained_layout.use": False,
        "savefig.bbox": None,
    }


def _for_a_page(text: str) -> str:
    """What matplotlib wrote, as part of an HTML page that forbids styles of its own: they become attributes."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    text = re.sub(r' style="([^"]*)"', lambda found: _as_attributes(found[1]), text)
    text = re.sub(r'"[^"]*"', lambda found: _shorter(found[0]), text)
    for role, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{role})")
    text = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", text))
    return re.sub(r"<(g|defs)></\1>", "", text)


def _as_attributes(style: str) -> str:
    named = (part.partition(":")[::2] for part in style.split(";") if ":" in part)
    kept = ((name.strip(), value.strip()) for name, value in named if name.strip() != "font-family")
    return "".join(f' {name}="{value}"' for name, value in kept)


def _shorter(attribute: str) -> str:
    """An attribute without the decimals that no screen shows."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), attribute)


# ---- what all plots share ---------------------------------------------------------------------------------------


def limits(values: Column, pad: float = 0.06) -> tuple[float, float]:
    """Axis limits that hold all finite values with some air, also where they are all one or there is none."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    air = (high - low) * pad
    if air <= 1e-9 * max(abs(low), abs(high)):
        air = abs(high) * 0.1 or 0.5
    return low - air, high + air


def quieten(
    axes: Axes,
    colours: Colours,
    x: str,
    x_format: Callable[..., str] = tick,
    y_format: Callable[..., str] = tick,
    whole: bool = False,
    ticks: int = 5,
) -> None:
    """No frame, no tick marks, few lines, the name of x below. ``whole``: x counts something; ``ticks``: at most."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=colours["rule"], lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", colors=colours["muted"], labelsize=10.5, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(x_format))
    axes.yaxis.set_major_formatter(FuncFormatter(y_format))
    axes.yaxis.set_minor_formatter(NullFormatter())
    below = -30 / (HEIGHT - TOP - BOTTOM)
    axes.text(0.5, below, x, color=colours["muted"], ha="center", va="center", transform=axes.transAxes)
