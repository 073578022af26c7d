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
from dpo_cli.reporting.text import flat_numbers, format_interval, is_number, number, passed_names, percent
from dpo_cli.utils.errors import plural
from dpo_cli.utils.files import atomic_write

MAX_TOKENS = 600  # of a response that are shown
SHADES = tuple(math.log(times) for times in (1.25, 2, 5, 20))  # where a colour of the heat map begins, either way
_UNSEEN = re.compile(  # controls, surrogates, what turns the direction of writing, and what is no character
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; what is absent leaves its section out.

    ``history`` has the lines of ``metrics.jsonl``; ``manifest`` and ``options`` are those of the run,
    ``evaluated_with`` those of ``dpo eval``.
    """

    title: str
    evaluation: Evaluation | None = None
    history: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None
    objective: Objective = DPO
    evaluated_with: Mapping[str, Any] | None = None


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
    numbers = [(name, number(value), format_interval(ends)) for name, (value, ends) in flat_numbers(result).items()]
    sections = {
        "verdict": ("Verdict", "judged" in result),
        "headline": ("Headline", list(_headline(result, about.objective))),
        "facts": ("The run", list(_facts(about))),
        "samples": ("Answers before and after", result.get("samples")),
        "training": ("Training", curves(about.history)),
        "preference": ("Preference", pair_plots(evaluation.scores) if evaluation else []),
        "pairs": ("Pairs, token by token", evaluation.shown if evaluation else []),
        "drift": ("Tokens that changed most", (result.get("drift") or {}).get("top")),
        "numbers": ("All numbers", numbers),
        "manifest": ("Manifest", about.manifest and json.dumps(about.manifest, indent=2, default=str)),
        "options": ("Options", about.options and json.dumps(about.options, indent=2, default=str)),
        "evaluation": (
            "Options of the evaluation",
            about.evaluated_with and json.dumps(about.evaluated_with, indent=2, default=str),
        ),
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
        unnamed=("verdict", "headline", "facts"),  # their headings are for screen readers
        folded=("numbers", "manifest", "options", "evaluation"),
        shades=range(-len(SHADES), len(SHADES) + 1),
        max_tokens=MAX_TOKENS,
    )


@cache
def _style() -> tuple[Markup, Template]:
    folder = files("dpo_cli.reporting")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown)
    environment.filters |= {"number": number, "percent": percent, "fold": fold, "shade": shade, "picture": picture}
    environment.filters["passed"] = passed_names
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return Markup(folder.joinpath("report.css").read_text(encoding="utf-8")), template  # noqa: S704 (our own file)


def shown(value: Any) -> Any:
    """Return text that is safe on the page: without unprintable characters or those that change its direction."""
    if value is None or isinstance(value, Markup):
        return "" if value is None else value
    return _UNSEEN.sub("�", str(value).replace("\r\n", "\n").replace("\r", "\n"))


def _headline(result: Mapping[str, Any], objective: Objective) -> Iterator[dict[str, Any]]:
    """Yield the headline numbers: a name, (side, value, interval) each, and the meaning."""
    numbers, unit = flat_numbers(result), reward_unit(objective)
    longer = float(numbers.get("length.accuracy_prefer_longer", (math.nan,))[0])
    share, rule = max((longer, "longer"), (1 - longer, "shorter"))
    baseline = f", always choosing the {rule} answer {percent(share)}" if is_number(longer) else ""
    equal = "; 0 where the model equals its reference" if objective.reference else ""
    items = [
        ("Accuracy", "rewards/accuracies", f"Pairs whose chosen answer has the higher reward. Chance: 50%{baseline}."),
        ("Margin", "rewards/margins", f"Reward of chosen minus rejected: beta times {unit}{equal}."),
        ("KL per token", "kl/", "How far the next-token distribution moved from the reference, in nats."),
        ("KL per response", "sequence_kl.token_kl", "The same, summed over a sampled answer, in nats."),
        ("Win rate", "win_rate.share", "Sampled answers that were judged better than the reference's; a tie is half."),
    ]
    for name, key, meaning in items:
        show = number if name.startswith(("Margin", "KL")) else percent
        sides = SIDES if key.endswith("/") else ("",)
        figures = [
            (s, show(value), format_interval(ends, show))
            for s in sides
            for value, ends in [numbers.get(key + s, (None, None))]
        ]
        value = numbers.get(key, (math.nan,))[0]
        if name == "Accuracy" and is_number(value) and not result["judged"]["enough"]:  # a share would look like more
            figures = [("", f"{value * result['pairs']:g} of {result['pairs']}", "")]
        if key + sides[0] in numbers:
            yield {"name": name, "figures": figures, "meaning": meaning}


def _facts(about: ReportInput) -> Iterator[tuple[str, str]]:
    """Yield what the run was: a name and a text each; nothing of a model that is of no run."""
    options, manifest = about.options or {}, about.manifest or {}
    data, held_out, losses = manifest.get("data"), manifest.get("held_out"), [x for x in about.history if "loss" in x]
    if "start_model" in manifest:
        yield "start model", manifest["start_model"]
    if isinstance(data, Mapping) and isinstance(held_out, Mapping):
        yield "pairs", f"{number(data['pairs'])} to train on, {number(held_out['pairs'])} held out"
    if "lr" in options:
        steps = len({line.get("step") for line in losses})
        yield "steps", f"{number(steps)} of {plural(options.get('batch_size', 0), 'pair')} each"
        yield "learning rate", f"{options['lr']:g}, {options.get('lr_scheduler')}"
        adapter = f"adapter of rank {options['lora_rank']}" if options.get("lora_rank") else "all weights"
        yield "trained", f"{adapter}, beta {options.get('beta')}, loss {about.objective.name}"
    if "began" in manifest:
        yield "began", f"{manifest['began']}, on {manifest.get('device')}"


def fold(logratio: float) -> str:
    """Format how many times likelier or rarer something is, from the log of the ratio (nats)."""
    times = math.exp(min(abs(logratio), 700))
    if times < 1.05:
        return "as likely"
    return f"{number(times)}× {'likelier' if logratio > 0 else 'rarer'}"


def picture(plot: Plot) -> str:
    """Draw a plot as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png(plot)).decode()}"


def shade(logratio: float) -> int:
    """Return the colour of a token: 0 where the models agree, up to 4 where it is 20 times likelier, down to -4."""
    strength = sum(abs(logratio) >= begin for begin in SHADES)
    return strength if logratio > 0 else -strength
