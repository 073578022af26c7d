"""``report.html``: what a training did and what an evaluation found, on one page.

One file without scripts or outside addresses; its only style sheet is named by its hash, so styles in the data have no
effect. Whatever comes from data passes ``shown`` and jinja's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from dpo_cli.evaluation.evaluator import Evaluation
from dpo_cli.evaluation.metrics import SIDES, reward_unit
from dpo_cli.losses.objective import DPO, Objective
from dpo_cli.reporting.plots import Plot, curves, pair_plots, png
from dpo_cli.reporting.text import format_interval, is_number, number, percent
from dpo_cli.utils.files import atomic_write

MAX_TOKENS = 600  # of a response that are shown
SHADES = tuple(math.log(times) for times in (1.25, 2, 5, 20))  # where a colour of the heat map begins, either way
_UNSEEN = re.compile(  # controls, surrogates, what turns the direction of writing, and what is no character
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; what is absent leaves its section out.

    ``history`` has the lines of ``metrics.jsonl``; ``manifest`` and ``options`` are those of the run.
    """

    title: str
    evaluation: Evaluation | None = None
    history: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None
    objective: Objective = DPO


def write_report(file: Path, about: ReportInput) -> None:
    """Write the report; the same input gives the same bytes.

    Raises:
        NotWrittenError: the disk is full or the folder is closed.
    """
    with atomic_write(file) as temporary:
        temporary.write_text(page(about), encoding="utf-8")


def page(about: ReportInput) -> str:
    """Render the report as HTML."""
    evaluation = about.evaluation
    result: Mapping[str, Any] = evaluation.result if evaluation else {}
    sections = {
        "headline": ("Headline", list(_headline(result, about.objective))),
        "findings": ("Findings", "judged" in result),
        "training": ("Training", curves(about.history)),
        "preference": ("Preference", pair_plots(evaluation.scores) if evaluation else []),
        "pairs": ("Pairs, token by token", evaluation.shown if evaluation else []),
        "drift": ("Drift", (result.get("drift") or {}).get("top")),
        "samples": ("Samples", result.get("samples")),
        "numbers": ("All numbers", list(_all_numbers(result))),
        "manifest": ("Manifest", about.manifest and json.dumps(about.manifest, indent=2, default=str)),
        "options": ("Options", about.options and json.dumps(about.options, indent=2, default=str)),
    }
    css, template = _style()
    return template.render(
        title=about.title,
        css=css,
        css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        sections={name: each for name, each in sections.items() if each[1]},
        result=result,
        steps=len({line.get("step") for line in about.history if "loss" in line}),
        held_out=any("eval_loss" in line for line in about.history),
        shades=range(-len(SHADES), len(SHADES) + 1),
        max_tokens=MAX_TOKENS,
    )


@cache
def _style() -> tuple[Markup, Template]:
    folder = files("dpo_cli.reporting")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown)
    environment.filters |= {"number": number, "percent": percent, "fold": fold, "shade": shade, "picture": picture}
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return Markup(folder.joinpath("report.css").read_text(encoding="utf-8")), template  # noqa: S704 (our own file)


def shown(value: Any) -> Any:
    """Return text that is safe on the page: without unprintable characters or those that change its direction."""
    if value is None or isinstance(value, Markup):
        return "" if value is None else value
    return _UNSEEN.sub("�", str(value).replace("\r\n", "\n").replace("\r", "\n"))


def _headline(result: Mapping[str, Any], objective: Objective) -> Iterator[dict[str, Any]]:
    """Yield the headline numbers: a name, (side, value, interval) each, and the meaning."""
    sampled: Mapping[str, Any] = result.get("sequence_kl") or {}
    values = {**result, "sequence_kl": sampled.get("token_kl")}
    intervals = {**(result.get("intervals") or {}), "sequence_kl": sampled.get("token_kl_interval")}
    start = "; ln 2 = 0.693 where policy and reference are equal" if objective.is_vanilla_dpo else ""
    items = [
        ("Accuracy", "rewards/accuracies", "Share of pairs ranked right. A coin gets half."),
        ("Margin", "rewards/margins", "Mean of chosen reward minus rejected reward."),
        ("Loss", "loss", f"Of --loss {objective.name}{start}."),
        ("Rewards", "rewards/", f"Beta times {reward_unit(objective)}."),
        ("KL per token", "kl/", "KL(policy ‖ reference) over the vocabulary at the responses' tokens, in nats."),
        ("KL per response", "sequence_kl", "KL(policy ‖ reference) of sampled responses, in nats."),
        ("Perplexity before", "ref_perplexity/", "The reference's, on these responses."),
        ("Perplexity after", "perplexity/", "The policy's, on these responses."),
    ]
    for name, key, meaning in items:
        show = percent if name == "Accuracy" else number
        sides = SIDES if key.endswith("/") else ("",)
        if values.get(key + sides[0]) is not None:
            figures = [(s, show(values[key + s]), format_interval(intervals.get(key + s), show)) for s in sides]
            yield {"name": name, "figures": figures, "meaning": meaning}


def _all_numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and interval of every number, named as in ``dpo eval --json``."""
    flat = {name: (value, (result.get("intervals") or {}).get(name)) for name, value in result.items()}
    for section, content in result.items():
        if isinstance(content, Mapping) and section != "intervals":
            flat |= {f"{section}.{name}": (value, content.get(f"{name}_interval")) for name, value in content.items()}
    for name, (value, interval) in flat.items():
        if is_number(value) or isinstance(value, float):
            yield name, number(value), format_interval(interval)


def fold(logratio: float) -> str:
    """Format how many times likelier or rarer something is, from the log of the ratio (nats)."""
    times = number(math.exp(min(abs(logratio), 700)))
    return f"{times}× {'likelier' if logratio > 0 else 'rarer'}"


def picture(plot: Plot) -> str:
    """Draw a plot as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png(plot)).decode()}"


def shade(logratio: float) -> int:
    """Return the colour of a token: 0 where the models agree, up to 4 where it is 20 times likelier, down to -4."""
    strength = sum(abs(logratio) >= begin for begin in SHADES)
    return strength if logratio > 0 else -strength
