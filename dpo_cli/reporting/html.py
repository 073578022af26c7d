"""``report.html``: what a training did and what an evaluation found, on one page that asks nothing of anybody.

One file, no script, no address outside; its only style sheet is named by its hash, so that none in the data counts.
Whatever comes from data passes ``shown`` and jinja's escaping; the plots are the only markup that is made elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, Template
from markupsafe import Markup

from dpo_cli.evaluation.scores import Evaluation, ShownPair, Token
from dpo_cli.losses.objective import DPO, Objective
from dpo_cli.reporting.charts import charts
from dpo_cli.reporting.curves import curves
from dpo_cli.reporting.plots import Plot, svg
from dpo_cli.utils.files import atomic_write
from dpo_cli.utils.formatting import NONE, between, fold, is_number, nats, number, percent, tick

Show = Callable[[Any], str]
MOST_TOKENS = 600  # of a response are shown one by one
SHADES = tuple(math.log(times) for times in (1.25, 2, 5, 20))  # where a colour of the heat map begins, either way
_UNSEEN = re.compile(  # controls, surrogates, what turns the direction of writing, and what is no character
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of; what is absent leaves its section out.

    ``history`` are the lines of ``metrics.jsonl``, ``manifest`` and ``options`` those of the run.
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
    """The report as HTML."""
    evaluation = about.evaluation
    result: Mapping[str, Any] = evaluation.result if evaluation else {}
    sections = {
        "headline": ("Headline", list(_headline(result, about.objective))),
        "findings": ("Findings", result.get("findings")),
        "training": ("Training", [_drawn(plot) for plot in curves(about.history, about.objective)]),
        "preference": ("Preference", [_drawn(plot) for plot in charts(evaluation)] if evaluation else []),
        "pairs": ("Pairs, token by token", [_pair(pair) for pair in evaluation.shown] if evaluation else []),
        "drift": ("Drift", (result.get("drift") or {}).get("top")),
        "samples": ("Samples", result.get("samples")),
        "numbers": ("All numbers", list(_all_numbers(result))),
        "manifest": ("Manifest", list(_flat(about.manifest or {}))),
        "options": ("Options", list(_flat(about.options or {}))),
    }
    css, template = _style()
    return template.render(
        title=about.title,
        css=css,
        css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        sections={
            name: each for name, each in sections.items() if each[1] or (name == "findings" and "judged" in result)
        },
        result=result,
        steps=len({line.get("step") for line in about.history if "loss" in line}),
        held_out=any("eval_loss" in line for line in about.history),
        shades=range(-len(SHADES), len(SHADES) + 1),
    )


@cache
def _style() -> tuple[Markup, Template]:
    here = files("dpo_cli.reporting")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown)
    environment.filters |= {"number": number, "percent": percent, "fold": fold, "nats": nats, "plain": tick}
    template = environment.from_string(here.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return Markup(here.joinpath("report.css").read_text(encoding="utf-8")), template  # noqa: S704 (our own file)


def shown(value: Any) -> Any:
    """Text as it may stand on the page: nothing in it that cannot be written, or that turns what stands around it."""
    if value is None or isinstance(value, Markup):
        return "" if value is None else value
    return _UNSEEN.sub("�", str(value).replace("\r\n", "\n").replace("\r", "\n"))


_between = partial(between, none="")


# ---- headline and tables ----------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """One number of the headline; ``of`` names it where there are two."""

    of: str
    value: str
    between: str


class Headline(NamedTuple):
    """One quantity that everybody asks for, and what it means."""

    name: str
    figures: list[Figure]
    meaning: str


def _headline(result: Mapping[str, Any], objective: Objective) -> Iterator[Headline]:
    def figures(names: Mapping[str, str], show: Show = number, before: str = "") -> list[Figure]:
        found = []
        for name, of in names.items():
            was = f"{show(result.get(before + name))} → " if before else ""
            interval = _between((result.get("intervals") or {}).get(name), show)
            if name in result:
                found.append(Figure(of, was + show(result[name]), interval))
        return found

    sides = ("chosen", "rejected")
    meaning = (
        {"loss": f"Of --loss {objective.name}, as the policy was trained."} if not objective.is_vanilla_dpo else {}
    )
    if not objective.reference:
        meaning["rewards"] = (
            f"Beta times the log-prob{' a token' * objective.length_normalized}: the loss reads no reference."
        )
    meaning = _MEANING | meaning
    items = [
        Headline("Accuracy", figures({"rewards/accuracies": ""}, percent), _MEANING["accuracy"]),
        Headline("Margin", figures({"rewards/margins": ""}, _signed), _MEANING["margin"]),
        *_effect(result.get("effect") or {}),
        Headline("Loss", figures({"loss": ""}), meaning["loss"]),
        Headline("Rewards", figures({f"rewards/{side}": side for side in sides}, _signed), meaning["rewards"]),
        Headline("KL a token", figures({f"kl/{side}": side for side in sides}), _MEANING["kl"]),
        Headline("Perplexity", figures({f"perplexity/{s}": s for s in sides}, before="ref_"), _MEANING["perplexity"]),
    ]
    if sampled := result.get("sequence_kl"):
        name = next((name for name in ("token_kl", "logratio") if is_number(sampled.get(name))), "token_kl")
        figure = Figure("", number(sampled.get(name)), _between(sampled.get(f"{name}_interval")))
        of = f"{number(sampled.get('samples'))} samples of each of {number(sampled.get('prompts'))} prompts"
        items.insert(-1, Headline("KL a response", [figure], _MEANING["sequence_kl"].format(of=of)))
    yield from (item for item in items if item.figures)


def _effect(effect: Mapping[str, Any]) -> Iterator[Headline]:
    if is_number(size := effect.get("margin_d")):
        figure = Figure("", _signed(size), _between(effect.get("margin_d_interval"), _signed))
        yield Headline("Effect", [figure], _MEANING["effect"])


_MEANING = {
    "accuracy": "Share of pairs whose chosen response has the higher reward. A coin gets half.",
    "margin": "Mean of chosen reward minus rejected reward: above 0, the policy ranks these pairs better on average.",
    "effect": "The margin in its standard deviations, whatever beta is: 0.2 is small, 0.5 medium, 0.8 large.",
    "loss": "The DPO loss. A policy that is its reference has ln 2 = 0.693, but for weights and margins of the pairs.",
    "rewards": "Beta times the log-ratio. Below 0 the responses grew rarer than under the reference.",
    "kl": "KL(policy ‖ reference) over the whole vocabulary at the positions of the responses, in nats.",
    "sequence_kl": "KL(policy ‖ reference) of whole responses in nats, from {of} by the policy.",
    "perplexity": "Before → after training: among how many tokens the model hesitates at each.",
}


def _signed(value: Any) -> str:
    return number(value, signed=True)


def _all_numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and interval of every number, named as in ``dpo eval --json``."""
    intervals = result.get("intervals") or {}
    for name, value in result.items():
        if is_number(value) or isinstance(value, float):
            yield name, number(value), _between(intervals.get(name))
    for section, content in result.items():
        if isinstance(content, Mapping) and section != "intervals":
            for name, value in content.items():
                if is_number(value) or isinstance(value, float):
                    yield f"{section}.{name}", number(value), _between(content.get(f"{name}_interval"))


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            several = value if isinstance(value, (list, tuple)) else [value]
            yield f"{prefix}{name}", "\n".join(map(_plain, several)) or NONE


def _plain(value: Any) -> str:
    if value is None or value != value:
        return NONE
    if isinstance(value, float):
        return tick(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- plots and pairs --------------------------------------------------------------------------------------------


def _drawn(plot: Plot) -> dict[str, Any]:
    caption = plot.caption.replace(" %", "\N{NO-BREAK SPACE}%")
    return {"title": plot.title, "what": plot.what, "caption": caption, "svg": Markup(svg(plot))}  # noqa: S704 (no text of the data)


class Cell(NamedTuple):
    """One token of the heat map; ``shade`` is None where it carries no loss."""

    text: str
    shade: int | None
    change: str = ""
    logps: str = ""
    entropies: str = ""
    kl: str = ""


def _pair(pair: ShownPair) -> dict[str, Any]:
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "why": pair.why.capitalize(),
        "where": pair.where,
        "margin": _signed(pair.margin),
        "prompt": "".join(token.text for token in pair.prompt),
        "sides": [_side(name, tokens) for name, tokens in sides.items()],
    }


def _side(name: str, tokens: list[Token]) -> dict[str, Any]:
    ratios = [ratio for token in tokens if (ratio := _logratio(token)) is not None]
    return {
        "name": name,
        "tokens": len(ratios),
        "logratio": _signed(math.fsum(ratios)),
        "cells": [_cell(token) for token in tokens[:MOST_TOKENS]],
        "more": max(len(tokens) - MOST_TOKENS, 0),
    }


def _logratio(token: Token) -> float | None:
    if not (is_number(token.logp) and is_number(token.ref_logp)):
        return None
    assert token.logp is not None and token.ref_logp is not None
    return token.logp - token.ref_logp


def _cell(token: Token) -> Cell:
    text = token.text.replace("\r", "").replace("\n", "↵\n")
    if (ratio := _logratio(token)) is None:
        return Cell(text, None)
    logps = f"{nats(token.ref_logp)} → {nats(token.logp)}"
    entropies = f"{nats(token.ref_entropy)} → {nats(token.entropy)}"
    kl = number(token.kl) if is_number(token.kl) else ""
    return Cell(text, shade(ratio), fold(ratio), logps, entropies, kl)


def shade(logratio: float) -> int:
    """The colour of a token: 0 where the two models agree, up to 4 where it is 20 times likelier, down to -4."""
    strength = sum(abs(logratio) >= begin for begin in SHADES)
    return strength if logratio > 0 else -strength
