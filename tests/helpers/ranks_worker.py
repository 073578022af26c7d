"""What tests/training/test_ranks.py lets each rank run: commands one after the other in one set of processes.

``python -m torch.distributed.run … -m tests.helpers.ranks_worker FOLDER CASE…``; a case has the arguments of its
command in FOLDER/CASE.json. What it printed and how it ended goes to FOLDER/CASE.RANK.json.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models.logprobs import HiddenStates
from dpo_cli.training.step import Trainer
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError
from tests.helpers.pictures import pictures

RANK = os.environ.get("RANK", "0")
POISONED = 7  # the pair whose loss is not a number


@contextmanager
def memory_runs_out() -> Iterator[None]:
    """On the last rank, once, at a micro-batch of more than one pair."""
    real, seen = HiddenStates.backward, []

    def backward(self: HiddenStates, *losses: Tensor) -> None:
        if RANK == "1" and not seen and len(self.batch.pair_tokens) > 1:
            seen.append(self.batch)
            raise torch.OutOfMemoryError("as if")
        real(self, *losses)

    with patch.object(HiddenStates, "backward", backward):
        yield


@contextmanager
def a_loss_is_nan() -> Iterator[None]:
    real = Trainer.batch

    def batch(self: Trainer, places: Any, step: Any) -> Any:
        made = real(self, places, step)
        bad = torch.tensor([torch.nan if place == POISONED else 1.0 for place in places])
        return dataclasses.replace(made, weights=made.weights * bad)

    with patch.object(Trainer, "batch", batch):
        yield


@contextmanager
def one_fails() -> Iterator[None]:
    """On the last rank alone, in its second step."""
    real, seen = Trainer.step, []

    def step(self: Trainer, *arguments: Any) -> Any:
        seen.append(1)
        if RANK == "1" and len(seen) == 2:
            raise DpoError("the disk of this host is gone")
        return real(self, *arguments)

    with patch.object(Trainer, "step", step):
        yield


PREPARED: dict[str, Callable[[], Any]] = {"oom": memory_runs_out, "nan": a_loss_is_nan, "alone": one_fails}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        with PREPARED.get(case, nullcontext)(), pictures(drawn=False):
            out = CliRunner().invoke(app, json.loads((folder / f"{case}.json").read_text()))
        if out.exception and not isinstance(out.exception, SystemExit):
            raise out.exception
        recorded = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        about = {"exit_code": out.exit_code, "stdout": out.stdout, "stderr": out.stderr}
        about["recorded"] = recorded.read_text() if recorded.exists() else ""
        (folder / f"{case}.{RANK}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
    distributed.hard_exit(0)
