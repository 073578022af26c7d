"""Ranges of options: what a value must be, as a test and in words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_cli.losses.preference import DIVERGENCES, divergence

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Check(NamedTuple):
    """The range of an option: a test of its value, and that test in words."""

    holds: Callable[[Any], bool]  # a ValueError counts as False
    must: str
    choices: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether a value is in the range."""
        try:
            return self.holds(value)
        except ValueError:
            return False


def one_of(*values: str) -> Check:
    """Check that a value is one of these words."""
    return Check(lambda v: v in values, "must be one of: " + ", ".join(values), values)


def matching(pattern: str, must: str) -> Check:
    """Check that a whole value matches a regular expression."""
    return Check(lambda v: bool(re.fullmatch(pattern, v, re.ASCII)), must)


def numbers(text: str) -> list[float]:
    """Parse numbers separated by commas, lowest first."""
    return sorted(float(part) for part in text.split(","))


positive = Check(lambda v: math.isfinite(v) and v > 0, "must be greater than 0")
not_negative = Check(lambda v: math.isfinite(v) and v >= 0, "must be 0 or greater")
fraction = Check(lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
below_half = Check(lambda v: 0 <= v < 0.5, "must be at least 0 and less than 0.5")
probability = Check(lambda v: 0 <= v <= 1, "must be at least 0 and at most 1")
valid_seed = Check(lambda v: 0 <= v < 2**32, "must be at least 0 and less than 2^32")
at_least_16 = Check(lambda v: v >= 16, "must be at least 16 tokens")
precision = one_of("auto", "float32", "bfloat16")._replace(
    must="must be one of: auto, float32, bfloat16 (float16 overflows in training; a model stored in it can be used)"
)
divergences = Check(
    lambda v: bool(divergence(v)),
    f"must be one of: {', '.join(DIVERGENCES)}, the last also with =ALPHA",
    tuple(DIVERGENCES),
)
betas = Check(
    lambda v: all(map(positive.holds, numbers(v))) and len({f"{beta:g}" for beta in numbers(v)}) == len(numbers(v)),
    "must be different numbers greater than 0, separated by commas",
)
trackers = Check(
    lambda v: v == "none" or all(name.strip() in TRACKERS for name in v.split(",")),
    f"must be one or more of {', '.join(TRACKERS)}, separated by commas, or none",
    TRACKERS,
)
repository = matching(r"[\w-][\w.-]*/[\w-][\w.-]*", "must be ORG/NAME, for example my-name/my-model")
module_names = matching(
    r"[\w-]+(\.[\w-]+)*(,[\w-]+(\.[\w-]+)*)*",
    "must be names of modules, separated by commas, for example q_proj,v_proj",
)
