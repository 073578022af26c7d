"""Runs that are stopped and resumed."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.helpers import SAMPLE, make_model, write_rows
from tests.helpers.caches import PROCESSES
from tests.helpers.pictures import pictures


@dataclass(frozen=True)
class Strike:
    """Send a signal to one's own process when a function is called for the n-th time."""

    function: str  # "module:name"
    call: int = 1
    signals: tuple[int, ...] = (signal.SIGKILL,)

    def arm(self) -> None:
        module, _, path = self.function.partition(":")
        *outer, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), itertools.count(1)

        def struck(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                for number in self.signals:
                    os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owner, name, struck)


def _main(arguments: list[str], folder: Path, told: Path, pause: float, strike: Strike | None) -> None:
    """What ``dpo ARGUMENTS`` does, in a process of its own."""
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HOME": str(folder), "MPLCONFIGDIR": str(folder.parent / "matplotlib")}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    sys.argv = ["dpo", *arguments]
    torch.set_num_threads(1)
    from dpo_cli.cli.app import main
    from dpo_cli.training.loop import Trainer

    if pause:
        step = Trainer.step
        Trainer.step = lambda *args: (time.sleep(pause), step(*args))[1]  # type: ignore[method-assign]
    if strike:
        strike.arm()
    with pictures(drawn=False):
        main()


@dataclass
class Command:
    """A command that is running or has ended."""

    process: Any
    output: Path

    def end(self) -> int:
        """Wait for its end; returns its exit code, or minus the signal that killed it."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.told
        return int(self.process.exitcode)

    @property
    def told(self) -> str:
        return self.output.read_text()


class Place:
    """A folder with a tiny model and rows, where commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.started: list[Any] = []

    def start(self, *arguments: Any, pause: float = 0.0, strike: Strike | None = None) -> Command:
        output = self.folder / f"told-{next(self.numbers)}.txt"
        call = ([str(a) for a in arguments], self.folder, output, pause, strike)
        process = PROCESSES.Process(target=_main, args=call)
        process.start()
        self.started.append(process)
        return Command(process, output)

    def dpo(self, *arguments: Any, strike: Strike | None = None) -> tuple[int, str]:
        """Run a command to its end: exit code and all it told."""
        command = self.start(*arguments, strike=strike)
        return command.end(), command.told

    def train(self, output: str, *arguments: Any, strike: Strike | None = None) -> tuple[int, str]:
        return self.dpo("train", *self.options(output), *arguments, strike=strike)

    def options(self, output: str) -> list[Any]:
        """Two epochs of 14 rows: 10 steps of 3 pairs, the last of an epoch of 2; mostly 2 forwards a step."""
        return [
            "--model", "model", "--data", "rows.jsonl", "--eval-data", "held-out.jsonl", "--output", output,
            "--epochs", 2, "--batch-size", 3, "--max-tokens", 600, "--lr", 1e-3, "--eval-steps", 4, "--save-steps", 2,
            "--cache-dir", "cache", "--show-answers", 0,
        ]  # fmt: skip


def make_place(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int = 14, **model: Any) -> Place:
    make_model(**model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()]
    write_rows(folder / "rows.jsonl", lines[:rows])
    write_rows(folder / "held-out.jsonl", lines[-4:])
    return Place(folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def newest_step(run: Path) -> int:
    """The last step in the metrics of a run that may be writing them."""
    metrics = run / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', metrics.read_text()) if metrics.exists() else []
    return int(steps[-1]) if steps else -1


def assert_equal(run: Path, whole: Path) -> None:
    """Same final weights to the bit, same metric lines to the letter."""
    got, expected = weights(run), weights(whole)
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    assert lines(run) == lines(whole)


def told_command(told: str) -> list[str]:
    """The command that an interrupted run says to continue with, without its ``dpo``."""
    found = re.search(r"Continue with: (.*)", told)
    assert found, told
    program, *arguments = shlex.split(found[1])
    assert program == "dpo"
    return arguments
