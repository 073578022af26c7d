"""A reward that the user brings: a function of prompts and answers, which judges what models answer.

Legend: K answers a prompt.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_cli.evaluation.statistics import Interval, bootstrap, interval, ratios
from dpo_cli.utils.errors import DpoError, UsageError, did_you_mean
from dpo_cli.utils.formatting import is_number


@dataclass(frozen=True)
class Reward:
    """A function of lists of prompts and of answers that returns a number for each; higher is better."""

    name: str
    function: Callable[[list[str], list[str]], Any]

    def of(self, samples: Sequence[Mapping[str, Any]], answers: str) -> tuple[float, Interval]:
        """The mean over prompts, and its 95 % interval: over the answers where there is but one prompt.

        ``samples`` are those of ``dpo eval --samples``, and ``answers`` names the list of K texts that is judged.

        Raises:
            DpoError: the function failed, or did not return a number for each.
        """
        prompts = [sample["prompt"] for sample in samples for _ in sample[answers]]
        values = self._judged(prompts, [text for sample in samples for text in sample[answers]])
        table = values.reshape(len(samples), -1)  # (prompts, K)
        units = table.mean(1, keepdims=True) if len(table) > 1 else table.T
        (ends,) = bootstrap(ratios(units, np.ones_like(units)), len(units))
        return float(units.mean()), interval(ends)

    def _judged(self, prompts: list[str], answers: list[str]) -> npt.NDArray[np.float64]:
        try:
            with redirect_stdout(sys.stderr):  # stdout has the result alone
                found = self.function([*prompts], [*answers])
            values = list(found.tolist() if hasattr(found, "tolist") else found)
        except (Exception, SystemExit) as error:
            raise self._failed(f"it raised {type(error).__name__}: {error}") from error
        if len(values) != len(answers):
            raise self._failed(f"it returned {len(values)} values for {len(answers)} answers")
        for place, value in enumerate(values, 1):
            if not is_number(value):
                raise self._failed(f"value {place} of the {len(values)} it returned is {value!r}, no finite number")
        return np.array(values, np.float64)

    def _failed(self, what: str) -> DpoError:
        kept = "What was trained is kept: mend it, and give the same command again"
        return DpoError(f"--reward {self.name}: {what}. {kept}")


def load_reward(name: str) -> Reward:
    """The function at MODULE:FUNCTION; modules in the current folder are found behind those that are installed.

    Raises:
        UsageError: there is none.
    """
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that no file there takes the place of a library's; it may import more later
    try:
        with redirect_stdout(sys.stderr):
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward {name}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(judge := getattr(found, function, None)):
        where = getattr(found, "__file__", None) or "which is part of Python"
        near = did_you_mean(function, vars(found))
        raise UsageError(f"--reward {name}: {module} ({where}) has no function {function}{near}")
    return Reward(name, judge)
