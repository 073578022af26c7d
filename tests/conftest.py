"""Fixtures of all tests: a tiny real model and tokenizer, and the command, run in this process or in one of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers import (
    SAMPLE,
    Cli,
    cli_environment,
    make_model,
    make_tokenizer,
)
from tests.helpers.pictures import pictures

# Of oneDNN, before its first use: kernels for AMX or AVX-512's bfloat16 round otherwise than the recorded numbers.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
# They take minutes: begun last, they would leave one worker busy while the others have nothing more to do.
LONGEST = ("test_ranks", "test_torture", "test_resume")


def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: one more than there are cores, as many tests wait for processes and disks; 4 at most."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """Let no collection of garbage walk through the libraries again: commands collect, and it took 0.1 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a tiny llama with tokenizer and template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_rows() -> list[dict[str, Any]]:
    """The sample's training rows, as messages."""
    return [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text().splitlines()]


@pytest.fixture
def dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command here, in an empty folder with an empty cache: ``dpo("train", "--data", file)``."""
    from typer.testing import CliRunner

    from dpo_cli.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: Any, input: str | None = None) -> subprocess.CompletedProcess[str]:  # noqa: A002
        result = CliRunner().invoke(app, [*map(str, arguments)], input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def dpo_process(tmp_path: Path) -> Cli:
    """The same in a process of its own, for what a process has alone: its streams, imports, signals, environment."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dpo_cli", *map(str, arguments)]
        environment = cli_environment(tmp_path / "home")
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, **options
        )

    return run


@pytest.fixture(scope="session", autouse=True)
def _without_pictures_and_answers() -> Iterator[None]:
    with pictures(drawn=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_cli.training.results.ANSWERS_SHOWN", 0)  # generating takes most of a tiny training
        yield


@pytest.fixture(autouse=True)
def _with_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw them in tests marked ``pictures``."""
    with pictures(drawn=request.node.get_closest_marker("pictures") is not None):
        yield
