"""`dpo sweep`: ordinary runs from one reference, and the frontier of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SAMPLE, make_model, write_rows
from tests.test_eval import dpo, invoke

BETAS = "0.03,0.1,0.3,1"


def command(folder: Path, *more: Any, beta: str = BETAS) -> list[Any]:
    return [
        "sweep", "--model", folder / "start", "--data", folder / "train.jsonl", "--eval-data", folder / "held-out.jsonl",
        "--epochs", 8, "--batch-size", 4, "--lr", 2e-3, "--beta", beta, "--output", folder / "sweep",
        "--cache-dir", folder / "cache", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sweep")
    make_model().save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    for name, source in (("train", "train-strings"), ("held-out", "heldout-strings")):
        rows = [json.loads(line) for line in (SAMPLE / f"{source}.jsonl").read_text().splitlines()]
        write_rows(folder / f"{name}.jsonl", rows[:12])
    return folder


def test_it(place):
    import time
    t = time.time()
    out = invoke(*command(place))
    print(time.time() - t)
    print(out.output)
    t = time.time()
    print(json.dumps(dpo(*command(place, "--samples", 3, "--sample-prompts", 4, "--sample-tokens", 8)), indent=1))
    print(time.time() - t)
