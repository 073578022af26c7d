"""A user's reward function, which scores what models answer."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.evaluation.statistics import Interval, student
from dpo_cli.utils.errors import DpoError, UsageError


@dataclass(frozen=True)
class Reward:
    """A function of lists of prompts and answers that returns one number per answer; higher is better."""

    name: str
    function: Callable[[list[str], list[str]], Any]

    def mean(self, samples: Sequence[Mapping[str, Any]], answers: str) -> tuple[float, Interval]:
        """The mean reward and its interval over prompts; over the answers where there is only one prompt.

        ``samples`` are those of ``dpo eval --samples``; ``answers`` is the key of the texts that are scored.

        Raises:
            DpoError: the function failed, or did not return one finite number per answer.
        """
        prompts = [sample["prompt"] for sample in samples for _ in sample[answers]]
        texts = [text for sample in samples for text in sample[answers]]
        try:
            with redirect_stdout(sys.stderr):  # stdout has the result alone
                returned = self.function(prompts, texts)
            values = np.array(returned.tolist() if hasattr(returned, "tolist") else returned, np.float64)
            if values.shape != (len(texts),) or not np.isfinite(values).all():
                raise ValueError(f"it returned {values.tolist()!s:.200}, not a finite number for each of {len(texts)}")
        except (Exception, SystemExit) as error:
            raise DpoError(
                f"--reward {self.name}: {type(error).__name__}: {error}. Trained runs are kept: fix it and run the "
                "same command again"
            ) from error
        table = values.reshape(len(samples), -1)  # (prompts, answers)
        return float(table.mean()), student(table.mean(1) if len(table) > 1 else table[0])


def load_reward(name: str) -> Reward:
    """Import the function MODULE:FUNCTION; modules in the current folder come after installed ones.

    Raises:
        UsageError: there is none.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that no file there shadows a library
    try:
        with redirect_stdout(sys.stderr):
            function = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward {name}: cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UsageError(f"--reward {name}: is no function")
    return Reward(name, function)
