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

    A condition on a number that the result does not have, or that is not finite, does not pass.
    """
    gates, numbers = [], flat_numbers(result)
    for condition in text.split(","):
        name, comparison, bound = GATE.fullmatch(condition).groups()  # type: ignore[union-attr]  # checked before
        value = float(numbers[name][0]) if name in numbers else math.nan
        about = f"it is {number(value)}" if name in numbers else f"no such number{did_you_mean(name, numbers)}"
        passed = COMPARISONS[comparison](value, float(bound))
        gates.append({"gate": condition.strip(), "value": value, "passed": passed, "text": about})
    return gates
