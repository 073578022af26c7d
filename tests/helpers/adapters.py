"""Runs with adapters, and log-probs without the package's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data.batching import padded
from dpo_cli.data.pairs import Pair
from dpo_cli.training.prepare import read_pairs
from dpo_cli.utils.console import Reporter
from tests.helpers import SAMPLE, make_model, token_logps, write_rows

ROWS = 14
CLOSE = {"rtol": 0, "atol": 1e-5 * 16}  # of a sum over some dozens of tokens


class Place:
    """A folder with a tiny model, rows and a cache, where commands run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"

    def run(self, command: str, *arguments: Any) -> tuple[int, str, str]:
        """The exit code of a command, its stdout, and what it told."""
        common = ["--cache-dir", self.folder / "cache"] if command != "merge" else []
        result = CliRunner().invoke(app, [str(a) for a in (command, *arguments, *common)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    def done(self, command: str, *arguments: Any) -> tuple[dict[str, Any], str]:
        """The result of a command, and what it told."""
        code, out, told = self.run(command, *arguments, "--json")
        assert code == 0, told
        return json.loads(out), told

    def train(self, name: str, *more: Any, model: Path | None = None) -> tuple[dict[str, Any], str]:
        return self.done("train", *self.options(name, model), *more)

    def refused(self, *more: Any, command: str = "train", model: Path | None = None) -> str:
        """What a training is refused with; nothing of it is there."""
        options = self.options("refused", model) if command == "train" else []
        code, out, told = self.run(command, *options, *more)
        assert (code, out) == (2, "") and not (self.folder / "refused").exists(), told
        return told[told.index("error: ") :]

    def options(self, name: str, model: Path | None = None) -> list[Any]:
        """Six steps of three pairs."""
        return [
            *("--model", model or self.model, "--data", self.folder / "rows.jsonl", "--output", self.folder / name),
            *("--eval-data", self.folder / "held-out.jsonl", "--max-steps", 6, "--batch-size", 3, "--lr", 1e-2),
            *("--save-steps", 2, "--save-total-limit", 9, "--eval-steps", 3, "--max-tokens", 600, "--epochs", 2),
        ]

    def evaluated(self, model: Path, *more: Any) -> dict[str, Any]:
        return self.done("eval", "--model", model, "--data", self.folder / "held-out.jsonl", *more)[0]

    def per_pair(self, model: Path, *more: Any) -> Tensor:
        """Log-probs of policy, then of reference, of the held-out pairs: (P, 4)."""
        file = self.folder / "per-pair.jsonl"
        self.evaluated(model, "--per-pair", file, *more)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        names = [f"{of}logps/{side}" for of in ("", "ref_") for side in ("chosen", "rejected")]
        return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)

    def held_out(self) -> list[Pair]:
        asked = PrecomputeOptions(data=[str(self.folder / "held-out.jsonl")], cache_dir=self.folder / "cache")
        return [*read_pairs(asked.data, asked, AutoTokenizer.from_pretrained(self.model), Reporter(quiet=True)).pairs]


def make_place(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Place:
    place = Place(folder)
    make_model(tie_word_embeddings=True).save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    lines = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()]
    write_rows(folder / "rows.jsonl", lines[:ROWS])
    write_rows(folder / "held-out.jsonl", lines[-4:])
    return place


def plain_logps(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Log-probs (P, 2) by plain forwards of single sequences."""
    batches = [padded([(pair.prompt, r)]) for pair in pairs for r in (pair.chosen, pair.rejected)]
    with torch.no_grad():
        sums = [token_logps(model.eval(), batch, torch.float32).double().sum() for batch in batches]
    return torch.stack(sums).view(-1, 2)
