"""A user's reward function, which scores what models answer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.evaluation.statistics import Interval, student
from dpo_cli.utils.errors import DpoError, UsageError, did_you_mean
from dpo_cli.utils.formatting import is_number


@dataclass(frozen=True)
class Reward:
    """A function of lists of prompts and answers that returns one number per answer; higher is better."""

    name: str
    function: Callable[[list[str], list[str]], Any]

    def mean(self, samples: Sequence[Mapping[str, Any]], answers: str) -> tuple[float, Interval]:
        """The mean reward and its interval over prompts; over the answers where there is only one prompt.

        ``samples`` are those of ``dpo eval --samples``; ``answers`` is the key of the texts that are scored.

        Raises:
            DpoError: the function failed, or did not return one number per answer.
        """
        prompts = [sample["prompt"] for sample in samples for _ in sample[answers]]
        texts = [text for sample in samples for text in sample[answers]]
        table = np.array(self._score(prompts, texts), np.float64).reshape(len(samples), -1)  # (prompts, answers)
        return float(table.mean()), student(table.mean(1) if len(table) > 1 else table[0])

    def _score(self, prompts: list[str], answers: list[str]) -> list[float]:
        try:
            with redirect_stdout(sys.stderr):  # stdout has the result alone
                returned = self.function([*prompts], [*answers])
            values = list(returned.tolist() if hasattr(returned, "tolist") else returned)
        except (Exception, SystemExit) as error:
            raise self._failed(f"it raised {type(error).__name__}: {error}") from error
        if len(values) != len(answers):
            raise self._failed(f"it returned {len(values)} values for {len(answers)} answers")
        for place, value in enumerate(values, 1):
            if not is_number(value):
                raise self._failed(f"value {place} of the {len(values)} it returned is {value!r}, not a finite number")
        return values

    def _failed(self, what: str) -> DpoError:
        return DpoError(f"--reward {self.name}: {what}. Trained runs are kept: fix it and run the same command again")


def load_reward(name: str) -> Reward:
    """Import the function MODULE:FUNCTION; modules in the current folder come after installed ones.

    Raises:
        UsageError: there is none.
    """
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that no file there shadows a library
    try:
        with redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        cause = f"{module_name} cannot be imported: {type(error).__name__}: {error}"
        raise UsageError(f"--reward {name}: {cause}") from error
    if not callable(reward := getattr(module, function, None)):
        where = getattr(module, "__file__", None) or "which is part of Python"
        near = did_you_mean(function, vars(module))
        raise UsageError(f"--reward {name}: {module_name} ({where}) has no function {function}{near}")
    return Reward(name, reward)
