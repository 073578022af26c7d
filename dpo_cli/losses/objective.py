"""The objective of a run: a weighted sum of preference losses with their options, parsed and checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_cli.losses.divergences import divergence
from dpo_cli.losses.preference import LOSSES, PAIR_FIELDS, RUN_OPTIONS, Loss, Preferences
from dpo_cli.utils.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Losses, each with its weight, and the options of the run that they read."""

    terms: Mapping[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    ld_alpha: float = 1.0  # LD-DPO: weight of the tokens beyond the length of the shorter response
    wpo: bool = False  # WPO: weight pairs by how likely the policy itself finds their responses
    options: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, p: Preferences) -> Tensor:
        """Compute the loss of each pair: (P,)."""
        values: dict[str, Any] = {"beta": self.beta, "label_smoothing": self.label_smoothing, **self.options}
        values |= {name: getattr(p, name) for name in PAIR_FIELDS} | {"f_divergence": divergence(self.f_divergence)}
        parts = [
            weight * LOSSES[loss].compute(p, **{name: values[name] for name in LOSSES[loss].reads if name in values})
            for loss, weight in self.terms.items()
        ]
        return p.weights * sum(parts[1:], parts[0])

    @property
    def losses(self) -> list[Loss]:
        """The losses of the sum."""
        return [LOSSES[name] for name in self.terms]

    @property
    def name(self) -> str:
        """The objective as ``--loss`` spells it."""
        return ",".join(n if list(self.terms.values()) == [1] else f"{n}={w:g}" for n, w in self.terms.items())

    @property
    def is_vanilla_dpo(self) -> bool:
        """Whether the loss is ln 2 where policy and reference are equal, for any pair."""
        return self.name == "sigmoid" and not self.wpo

    @property
    def reference(self) -> bool:
        """Whether any loss reads the reference."""
        return any(loss.reference for loss in self.losses)

    @property
    def length_normalized(self) -> bool:
        """Whether rewards are per token: those of a loss without a reference that defines them so."""
        return not self.reference and any(loss.length_normalized for loss in self.losses)

    def uses(self, name: str) -> bool:
        """Whether any loss has this parameter."""
        return any(name in loss.reads for loss in self.losses)

    def ignored_by(self, name: str) -> str | None:
        """The first loss without this parameter; sft, which compares nothing, counts only on its own."""
        comparing = [loss for loss in self.losses if loss.name != "sft"] or self.losses
        return next((loss.name for loss in comparing if name not in loss.reads), None)


DPO = Objective()


def list_losses(name: str | None = None) -> dict[str, Any]:
    """`dpo losses`: the description of each loss, or of one.

    Raises:
        UsageError: there is no such loss.
    """
    if name is not None and name not in LOSSES:
        raise UsageError(f"{name}: no such loss{did_you_mean(name, LOSSES)}; dpo losses lists them")
    return {
        "losses": [
            {"name": loss.name, "use": loss.use, "formula": loss.formula, "paper": loss.paper}
            | {"reads": [name for name in loss.reads if name not in ("reward_baseline", *loss.options)]}
            | {"options": loss.options, "reference": loss.reference}
            for loss in LOSSES.values()
            if name in (None, loss.name)
        ]
    }


def as_lines(result: Mapping[str, Any]) -> str:
    """Format the result of ``list_losses``: a line per loss."""
    width = max(len(each["name"]) for each in result["losses"])
    lines = [f"{each['name']:<{width}}  {each['use']}" for each in result["losses"]]
    return "\n".join([*lines, "", "dpo losses NAME shows one with formula, paper and options"])


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result of ``list_losses``: five lines per loss."""
    lines = [
        "r = log pi(y|x)/ref(y|x), w chosen, l rejected, h = r_w - r_l, m a pair's margin, eps --label-smoothing",
        "Several are added up by weight: --loss sigmoid=1,sft=0.2",
    ]
    for each in result["losses"]:
        own = "".join(f"  --loss-options {name}={value:g}" for name, value in each["options"].items())
        flags = "".join(f"  --{name.replace('_', '-')}" for name in each["reads"] if name in RUN_OPTIONS)
        lines += ["", f"{each['name']}{'' if each['reference'] else '  (no reference)'}", f"  {each['use']}"]
        lines += [f"  {each['formula']}", f"  {each['paper']}", f"  reads{flags + own or '  no option'}"]
    return "\n".join(lines)


def parse_objective(loss: str = "sigmoid", loss_options: str | None = None, **given: Any) -> Objective:
    """Build the objective from the options of the same names and those of ``Objective``; None leaves one open.

    Raises:
        UsageError: an unknown loss option, or an option that the losses would ignore.
    """
    terms = _parse_numbers("--loss", ",".join(part if "=" in part else f"{part}=1" for part in loss.split(",")))
    if min(terms.values()) <= 0:
        raise UsageError(f"--loss {loss}: a weight must be greater than 0")
    own, given = _parse_numbers("--loss-options", loss_options or ""), {n: v for n, v in given.items() if v is not None}
    objective = Objective(terms, options=own, **given)
    allowed = sorted({name for each in objective.losses for name in each.options})
    for name, value in own.items():
        if name not in allowed:
            others = ", ".join(allowed) or "none of its own"
            raise UsageError(f"--loss-options {name}: --loss {objective.name} does not read it; it has {others}")
        if value < 0 or (value == 0 and name == "discopop_tau"):  # which divides
            raise UsageError(f"--loss-options {loss_options}: must be 0 or greater, discopop_tau greater than 0")
    for each in objective.losses:
        if each.reads.get("label_smoothing") is inspect.Parameter.empty and not objective.label_smoothing:
            raise UsageError(f"--loss {each.name}: needs --label-smoothing above 0, for example 0.001")
    if "ld_alpha" in given and not objective.reference:
        raise UsageError(f"--ld-alpha {objective.ld_alpha}: is about the ratio to the reference, which {loss} lacks")
    for name in ("label_smoothing", "f_divergence"):
        value = getattr(objective, name)
        if value != getattr(DPO, name) and (ignoring := objective.ignored_by(name)):
            able = ", ".join(other.name for other in LOSSES.values() if name in other.reads)
            flag = f"--{name.replace('_', '-')} {value}"
            raise UsageError(f"{flag}: --loss {ignoring} does not read it; these do: {able}")
    return objective


def _parse_numbers(flag: str, text: str) -> dict[str, float]:
    """Parse ``name=number,name=number`` by name."""
    numbers: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, number = (word.strip() for word in part.partition("="))
        value = math.nan
        with suppress(ValueError):
            value = float(number)
        if name in numbers or not math.isfinite(value):
            raise UsageError(f"{flag} {text}: '{part.strip()}': write NAME=NUMBER, each name once, with commas between")
        numbers[name] = value
    return numbers
