"""What tests/training/test_ranks.py lets each rank run: commands one after the other in one set of processes.

``run_ranks`` forks them from a process that has the libraries loaded, with the variables and the store that torchrun
gives to those that it starts. A case has the arguments of its command in FOLDER/CASE.json. What it printed and how it
ended goes to FOLDER/CASE.RANK.json.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch import Tensor
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models.logprobs import HiddenStates
from dpo_cli.training.step import Trainer
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError
from tests.helpers.caches import PROCESSES
from tests.helpers.pictures import pictures

POISONED = 7  # the pair whose loss is not a number


@contextmanager
def memory_runs_out() -> Iterator[None]:
    """On the last rank, once, at a micro-batch of more than one pair."""
    real, seen = HiddenStates.backward, []

    def backward(self: HiddenStates, *losses: Tensor) -> None:
        if os.environ["RANK"] == "1" and not seen and len(self.batch.weights) > 1:
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
        if os.environ["RANK"] == "1" and len(seen) == 2:
            raise DpoError("the disk of this host is gone")
        return real(self, *arguments)

    with patch.object(Trainer, "step", step):
        yield


PREPARED: dict[str, Callable[[], Any]] = {"oom": memory_runs_out, "nan": a_loss_is_nan, "alone": one_fails}


def _rank(folder: Path, cases: list[str], environment: dict[str, str]) -> None:
    """What one rank does, in its process."""
    descriptor = os.open(folder / f"told-{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    torch.set_num_threads(1)
    for case in cases:
        with PREPARED.get(case, nullcontext)(), pictures(drawn=False):
            out = CliRunner().invoke(app, json.loads((folder / f"{case}.json").read_text()))
        if out.exception and not isinstance(out.exception, SystemExit):
            raise out.exception
        recorded = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        about = {"exit_code": out.exit_code, "stdout": out.stdout, "stderr": out.stderr}
        about["recorded"] = recorded.read_text() if recorded.exists() else ""
        (folder / f"{case}.{environment['RANK']}.json").write_text(json.dumps(about))
    distributed.hard_exit(0)


def run_ranks(folder: Path, ranks: int, cases: list[str], environment: dict[str, str]) -> None:
    """Run cases on so many ranks, to their end."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = []
    for rank in map(str, range(ranks)):
        errors = folder / f"error-{ranks}-{rank}.json"
        own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": str(errors)}
        process = PROCESSES.Process(target=_rank, args=(folder, cases, environment | common | own))
        process.start()
        processes.append(process)
    for rank, process in enumerate(processes):
        process.join(600)
        assert process.exitcode == 0, (folder / f"told-{rank}.txt").read_text()
