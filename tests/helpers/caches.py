"""A reference cache, and what changes its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.data.pairs import Pair
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import ReferenceCache, ReferenceLogps, fill_reference
from dpo_cli.utils.console import Reporter
from tests.helpers import make_model

# Processes of their own that need not load the libraries again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.helpers.preloaded"])


CPU = torch.device("cpu")
NOISE = 1e-3  # nats


def make_scorer() -> ModelRunner:
    torch.set_num_threads(1)
    return ModelRunner(make_model(), "packed", torch.float32, 120, CPU)


def open_cache(folder: Path, told: list[str] | None = None) -> ReferenceCache:
    """The cache on disk; what it warns of lands in ``told``, or fails the test."""
    return ReferenceCache(folder, "f" * 64, pytest.fail if told is None else told.append)


def fill(cache: ReferenceCache, pairs: Sequence[Pair], runner: ModelRunner) -> ReferenceLogps:
    return fill_reference(cache, pairs, runner, Reporter(quiet=True))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def write_shard(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A shard as the cache names it."""
    content = save(tensors)
    file = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    file.write_bytes(content)
    return file


def plant(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every shard below a folder by a valid one whose log-probs (R,) are changed."""
    for shard in shards(folder):
        tensors = load_file(shard)
        shard.unlink()
        write_shard(shard.parent, tensors | {"logps": change(tensors["logps"].clone())})


def dpo(*arguments: Any) -> tuple[dict[str, Any], str]:
    """Run a command in this process: its JSON and what it told."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def changed_config(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        section = config["rope_parameters"] if key in config["rope_parameters"] else config
        assert section.get(key) != value
        section[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def changed_weight(name: str, place: int) -> Callable[[Path], None]:
    """By one unit in the last place."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        flat = weights[name].view(-1)
        flat[place] = torch.nextafter(flat[place], torch.tensor(math.inf))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change
