"""Compiled layers: the same training, under a reference of its own. Needs a C++ compiler, as users of --compile do."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.models.loading import compile_layers
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, Cli, make_model, write_rows

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it while it traces
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[COMPILER, pytest.mark.bench])])
def test_training_is_the_same_and_its_reference_its_own(
    backend: str, dpo: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU inductor takes two minutes to compile: ``make test-bench``. The graphs are the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:8]]
    write_rows(tmp_path / "rows.jsonl", rows)
    common = ("--model", tiny, "--data", "rows.jsonl", "--cache-dir", "cache")
    training = ("--batch-size", 4, "--lr", 1e-3, "--warmup-ratio", 0)
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        out = dpo("train", *common, *training, *options, "--output", name)
        assert out.returncode == 0, out.stderr
        assert "8 to score" in out.stderr  # what was scored otherwise is not taken
    for got, expected in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert lines(tmp_path / "compiled")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    refused = dpo("eval", "--model", "plain", "--data", "rows.jsonl", "--cache-dir", "cache", "--compile")
    assert refused.returncode == 2 and "the run was trained without it" in refused.stderr


def test_a_model_without_layers_to_compile_is_refused() -> None:
    model = make_model()
    model.model.layers = model.model.layers[:0]
    with pytest.raises(UsageError, match="no layers of transformers' kind"):
        compile_layers(model)
