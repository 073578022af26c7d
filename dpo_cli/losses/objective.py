"""The objective of a run: a weighted sum of preference losses with their options, parsed and checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_cli.losses.preference import LOSSES, PAIR_FIELDS, RUN_OPTIONS, Loss, Preferences, divergence
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
        values = {name: getattr(p, name) for name in PAIR_FIELDS} | self._run_values
        parts = [
            weight * LOSSES[name].compute(p, **{key: values[key] for key in LOSSES[name].reads if key in values})
            for name, weight in self.terms.items()
        ]
        return p.weights * sum(parts[1:], parts[0])

    @cached_property
    def _run_values(self) -> dict[str, Any]:
        """The parameters of losses that are the same for all pairs, by name."""
        values = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return {**self.options, **values, "f_divergence": divergence(self.f_divergence)}

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


def list_losses() -> dict[str, Any]:
    """`dpo losses`: the description of each loss."""
    return {
        "losses": [
            {"name": loss.name, "use": loss.use, "formula": loss.formula, "paper": loss.paper}
            | {"reads": [name for name in loss.reads if name not in ("reward_baseline", *loss.options)]}
            | {"options": loss.options, "reference": loss.reference}
            for loss in LOSSES.values()
        ]
    }


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


def parse_objective(
    loss: str = "sigmoid",
    loss_options: str | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    ld_alpha: float | None = None,
    wpo: bool = False,
) -> Objective:
    """Build the objective from the options of the same names.

    Raises:
        UsageError: an unknown loss or loss option, or an option that the losses would ignore.
    """
    terms, own = _parse_terms(loss), _parse_numbers("--loss-options", loss_options or "")
    alpha = 1.0 if ld_alpha is None else ld_alpha
    objective = Objective(terms, beta, label_smoothing, f_divergence, alpha, wpo, own)
    options = sorted({name for each in objective.losses for name in each.options})
    for name, value in own.items():
        if name not in options:
            others = f"it has {', '.join(options)}" if options else "it has none of its own"
            raise UsageError(f"--loss-options {name}: --loss {objective.name} does not read it; {others}")
        least = "greater than 0" if name == "discopop_tau" else "0 or greater"  # which divides
        if value < 0 or (value == 0 and name == "discopop_tau"):
            raise UsageError(f"--loss-options {loss_options}: {name} must be {least}")
    for each in objective.losses:
        if each.reads.get("label_smoothing") is inspect.Parameter.empty and not label_smoothing:
            raise UsageError(f"--loss {each.name}: needs --label-smoothing above 0, for example 0.001")
    if ld_alpha is not None and not objective.reference:
        raise UsageError(f"--ld-alpha {ld_alpha}: is about the ratio to the reference, and --loss {loss} reads none")
    for name, given, default in (
        ("label_smoothing", label_smoothing, 0.0),
        ("f_divergence", f_divergence, "reverse_kl"),
    ):
        if given != default and (ignoring := objective.ignored_by(name)):
            able = ", ".join(other for other, each in LOSSES.items() if name in each.reads)
            flag = f"--{name.replace('_', '-')} {given}"
            raise UsageError(f"{flag}: --loss {ignoring} does not read it; these do: {able}")
    return objective


def _parse_terms(text: str) -> dict[str, float]:
    """Parse ``sigmoid`` or ``sigmoid=1,sft=0.2`` to weights by name."""
    parts = [part if "=" in part else f"{part}=1" for part in text.split(",")]
    for name in (part.partition("=")[0].strip() for part in parts):
        if name not in LOSSES:
            near = did_you_mean(name.replace("-", "_"), LOSSES) or f"; there are {', '.join(LOSSES)}"
            raise UsageError(f"--loss {text}: no loss is called '{name}'{near}")
    terms = _parse_numbers("--loss", ",".join(parts))
    if any(weight <= 0 for weight in terms.values()):
        raise UsageError(f"--loss {text}: a weight must be greater than 0")
    return terms


def _parse_numbers(flag: str, text: str) -> dict[str, float]:
    """Parse ``name=number,name=number`` by name."""
    numbers: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in numbers:
            raise UsageError(f"{flag} {text}: '{part.strip()}': write NAME=NUMBER, each name once, with commas between")
        numbers[name] = value
    return numbers
