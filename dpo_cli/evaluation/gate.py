"""Conditions on the numbers of an evaluation, by which a script or CI can fail: ``--gate``."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from dpo_cli.config.checks import GATE
from dpo_cli.reporting.text import flat_numbers, number
from dpo_cli.utils.errors import did_you_mean

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def check_gates(text: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare numbers of a result, named as in the report's table, with the bounds of ``--gate``.

    NAME.low and NAME.high are the ends of a number's interval. A condition on a number that is missing or not finite
    does not pass, nor any where there are too few pairs to judge.
    """
    gates, numbers, enough = [], dict[str, float](), result["judged"]["enough"]
    for name, (value, interval) in flat_numbers(result).items():
        numbers |= {name: value} | dict(zip((f"{name}.low", f"{name}.high"), interval or (), strict=False))
    for condition in text.split(","):
        name, comparison, bound = GATE.fullmatch(condition).groups()  # type: ignore[union-attr]  # checked before
        value = float(numbers.get(name, math.nan))
        about = f"it is {number(value)}" if name in numbers else f"no such number{did_you_mean(name, numbers)}"
        about += "" if enough else ", of too few pairs to judge"
        passed = enough and COMPARISONS[comparison](value, float(bound))
        gates.append({"gate": condition.strip(), "value": value, "passed": passed, "text": about})
    return gates
