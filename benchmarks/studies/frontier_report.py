"""What ``benchmarks.studies.frontier`` measured, as numbers at equal KL, as a table and as a picture.

Legend: S seeds, L levels of KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.evaluation.metrics import Table
from dpo_cli.evaluation.statistics import student
from dpo_cli.reporting.plots import COLORS, THEME
from dpo_cli.utils.files import atomic_write

Point = Mapping[str, Any]
LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # nats, at which methods are compared
COLOURS = {"DPO": "#1c6bb0", "SFT on chosen": "#b4560a", "unlikelihood": "#7a4fa3", "best-of-N": "#23221f"}


def summary(points: Sequence[Point], best_of: Sequence[Point], optimum: Sequence[Point]) -> dict[str, Any]:
    """Gains over the reference at equal KL: of each method, of DPO over the others, of best-of-N and of the optimum.

    Beside them each method's ``slope``, by all of its points.
    """
    levels = np.array(LEVELS)
    columns = {name: np.column_stack([at(points, name, levels), slopes(points, name)]) for name in _names(points)}
    others = [name for name in columns if name != "DPO"]
    columns |= {f"DPO - {name}": columns["DPO"] - columns[name] for name in others}
    *gains, slope = (
        {name: _mean(table[:, place]) for name, table in columns.items()} for place in range(len(LEVELS) + 1)
    )
    found: dict[str, Any] = {name: [gain[name] for gain in gains] for name in columns}
    for name, curve in (("best-of-N", best_of), ("optimum", optimum)):
        found[name] = [_plain(gain) for gain in along(curve, levels)]
    return {"kl": list(LEVELS), "gain": found, "slope": slope}


def slopes(points: Sequence[Point], name: str) -> Table:
    """A method's gain for each root of its KL, by least squares over all of a seed's points: (S,).

    Near the reference KL grows with the square of a step and the gain with the step itself. Far points weigh most.
    """
    mine = [point for point in points if point["method"] == name]
    by_seed = [[point for point in mine if point["seed"] == seed] for seed in sorted({p["seed"] for p in mine})]
    return np.array([sum(p["gain"] * p["kl"] ** 0.5 for p in some) / sum(p["kl"] for p in some) for some in by_seed])


def at(points: Sequence[Point], name: str, levels: Table) -> Table:
    """A method's gain at each level, seed by seed: (S, L); NaN beyond the farthest that a seed's trainings went."""
    mine = [point for point in points if point["method"] == name]
    seeds = sorted({point["seed"] for point in mine})
    return np.array([along([point for point in mine if point["seed"] == seed], levels) for seed in seeds])


def along(points: Sequence[Point], levels: Table) -> Table:
    """Gain at each level, straight over the root of KL from the reference through the points in order of KL: (L,)."""
    found = sorted([(0.0, 0.0), *((point["kl"], point["gain"]) for point in points)])
    kls, gains = np.array(found).T
    return np.interp(np.sqrt(levels), np.sqrt(kls), gains, right=np.nan)


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point["method"] for point in points))


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Table) -> dict[str, Any] | None:
    """Mean over seeds and its interval; None where a seed has none."""
    return {"mean": float(values.mean()), "interval": student(values)} if np.isfinite(values).all() else None


# ---- words ------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: gains at equal KL, and where each training was measured, both as means over seeds."""
    told = result["summary"]
    lines = ["| gain at a KL of | " + " | ".join(f"{kl:g}" for kl in told["kl"]) + " | by root of KL |"]
    lines += ["|---|" + "---:|" * (len(told["kl"]) + 1)]
    for name, row in told["gain"].items():
        lines.append(f"| {name} | " + " | ".join(map(_told, [*row, told["slope"].get(name)])) + " |")
    lines += ["", "| method | step | KL, nats | gain |", "|---|---:|---:|---:|"]
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in result["points"]:
        groups.setdefault((point["method"], point["setting"], point["step"]), []).append(point)
    for (method, setting, step), mine in groups.items():
        kl, gain = (_mean(np.array([point[name] for point in mine])) for name in ("kl", "gain"))
        lines.append(f"| {' '.join((method, setting)).strip()} | {step} | {_told(kl)} | {_told(gain)} |")
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return f"{value:.2f}"
    ends = value["interval"]
    return f"{value['mean']:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")


# ---- a picture --------------------------------------------------------------------------------------------------


def draw(file: Path, result: Mapping[str, Any]) -> None:
    """A point a measured policy; a line a method, its mean over seeds, with the band of the mean's interval."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points, muted = result["points"], COLORS["muted"]
    far = max(point["kl"] for point in points) * 1.04
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ideal, best = ([point for point in result[name] if point["kl"] <= far] for name in ("optimum", "best_of"))
    axes.plot(*_columns([{"kl": 0.0, "gain": 0.0}, *ideal]), color=muted, lw=1, ls=":", label="optimum")
    axes.plot(*_columns(best), "D", color=COLOURS["best-of-N"], ms=4, label="best-of-N")
    for point in best:
        axes.annotate(f"{point['n']}", (point["kl"], point["gain"]), (-4, 6), textcoords="offset points", size=8)
    for name in _names(points):
        mine = [point for point in points if point["method"] == name]
        ends = [max(p["kl"] for p in mine if p["seed"] == seed) for seed in {p["seed"] for p in mine}]
        levels = np.minimum(np.linspace(0, min(ends) ** 0.5, 80) ** 2, min(ends))
        curve, colour = at(points, name, levels), COLOURS.get(name, muted)
        axes.plot(levels, curve.mean(0), color=colour, lw=1.8, label=name)
        axes.plot(*_columns(mine), "o", color=colour, ms=3.5, alpha=0.6)
        band = np.array([student(column) or (np.nan, np.nan) for column in curve.T])
        axes.fill_between(levels, *band.T, color=colour, alpha=0.12, lw=0)
    with rc_context(THEME), atomic_write(file) as temporary:
        axes.set_xlabel("KL from the reference, nats a completion (the scale is of its root)", color=muted)
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axes.set_xticks(ticks := [0.0, *(kl for kl in (*LEVELS, 8.0, 16.0) if kl <= far)], [f"{kl:g}" for kl in ticks])
        axes.set_ylabel("reward gained over the reference", color=muted)
        axes.set_xlim(0, far)
        axes.axhline(0, color=muted, lw=0.8)
        figure.legend(frameon=False, loc="outside upper center", ncols=5, fontsize=9)
        figure.savefig(temporary, format="png", dpi=144, metadata={"Software": None})


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point["kl"] for point in points], [point["gain"] for point in points]
