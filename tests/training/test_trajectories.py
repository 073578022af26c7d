"""Golden trajectories: what trainings of every kind compute, recorded to the last digit in trajectories.json.

A change that is not meant to change numbers leaves them as they are: bit for bit on the machine that recorded them, and
on another one log-probs within ``LOGPS_TOLERANCE`` (relative), all else within ``TOLERANCE``. That cannot be 1e-6 with
rows of hundreds of nats: in float32, kernels for AVX2 in place of AVX-512 give log-probs that differ by 1e-7, losses
and gradient norms by 6e-6, and sums of weights by 9e-6, all relative. In bfloat16 they differ by more than that, so
the tests take oneDNN's kernels for plain AVX-512 (``tests/conftest.py``): with them an AMD EPYC has a Xeon's numbers,
bit for bit.

A change that is meant to records them again: ``python -m tests.training.test_trajectories``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from tests.helpers import SAMPLE, cli_environment, make_model, make_tokenizer, write_rows

RECORDED = Path(__file__).with_name("trajectories.json")
TOLERANCE = 1e-5  # log-probs of some hundred nats have steps of 3e-5 in float32, and beta makes 3e-6 of these
LOGPS_TOLERANCE = 1e-6
STEPS = 4
COMMON = ("--batch-size", 4, "--lr", 1e-3, "--max-steps", STEPS, "--max-length", 400, "--max-tokens", 2048)
COMMON += ("--memory", "full", "--dtype", "float32", "--warmup-ratio", 0, "--kl", "none")
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# name: family and its config, what is trained otherwise than above
CASES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "full": ("llama", {}, ()),
    "several micro-batches": ("llama", {}, ("--max-tokens", 500)),
    "lora": ("llama", {}, ("--lora-rank", 4)),
    "dora and modules to save": (
        "llama",
        {},
        ("--lora-rank", 4, "--lora-type", "dora", "--modules-to-save", "lm_head"),
    ),
    "split": ("llama", {}, ("--memory", "split", "--dtype", "bfloat16")),
    "in-backward": ("llama", {}, ("--memory", "in-backward", "--dtype", "bfloat16", "--max-grad-norm", 0)),
    "gradient checkpointing": ("llama", {}, ("--gradient-checkpointing",)),
    "mixture of experts": ("mixtral", MIXTURE, ("--router-aux-loss-coef", 0.1, "--max-tokens", 500)),
    "sliding window": ("gemma3_text", ALTERNATING, ()),
    "padded": ("gemma2", {"query_pre_attn_scalar": 8}, ()),
    "label smoothing": ("llama", {}, ("--label-smoothing", 0.2)),
    "ipo": ("llama", {}, ("--loss", "ipo")),
    "simpo": ("llama", {}, ("--loss", "simpo")),
    "robust and sft": ("llama", {}, ("--loss", "robust=1,sft=0.2", "--label-smoothing", 0.1)),
    "ld-dpo": ("llama", {}, ("--ld-alpha", 0.3)),
    "wpo": ("llama", {}, ("--wpo",)),
    "f-divergence": ("llama", {}, ("--f-divergence", "js_divergence")),
    "weights and margins": ("llama", {}, ()),
    "reference is another model": ("llama", {}, ("--ref-model", "other")),
}
Dpo = Callable[..., None]


class Place:
    """A folder with models and rows, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, make_tokenizer()
        rows = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[: 4 * STEPS]]
        write_rows(folder / "rows.jsonl", rows)
        terms = [{"weight": 0.5 + place % 3, "margin": 0.25 * (place % 4)} for place in range(len(rows))]
        write_rows(folder / "terms.jsonl", [row | more for row, more in zip(rows, terms, strict=True)])
        self.save_model("other", "llama", seed=1)

    def save_model(self, name: str, family: str, **config: Any) -> None:
        make_model(family, **{"scale": 3.0, **config}).save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)

    def dpo(self, command: str, *arguments: Any) -> None:
        words = [str(self.folder / word) if word in ("other",) else str(word) for word in arguments]
        result = CliRunner().invoke(app, [command, *words, "--cache-dir", str(self.folder / "cache")])
        assert result.exit_code == 0, result.output

    def train(self, case: str, *more: Any) -> Path:
        family, config, options = CASES[case]
        self.save_model(case, family, **config)
        rows, run = "terms" if case == "weights and margins" else "rows", self.folder / f"{case} run"
        data = ("--model", self.folder / case, "--data", self.folder / f"{rows}.jsonl", "--output", run)
        self.dpo("train", *data, *COMMON, *options, *more)
        return run


def of_weights(folder: Path) -> float:
    """One number that hears of every weight of a folder: the sum of their products with a fixed wave."""
    total = torch.zeros((), dtype=torch.float64)
    for name, tensor in sorted(load_file(next(folder.glob("*.safetensors"))).items()):
        flat = tensor.double().flatten()
        total += (flat * torch.cos(torch.arange(len(flat), dtype=torch.float64) + len(name))).sum()
    return total.item()


def of_run(run: Path) -> dict[str, Any]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    names = ("loss", "rewards/margins", "logps/chosen", "grad_norm")
    return {name: [step[name] for step in steps] for name in names} | {"weights": of_weights(run / "model")}


def of_pairs(file: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {name: [line[name] for line in lines] for name, value in lines[0].items() if isinstance(value, float)}


def resumed(place: Place) -> dict[str, Any]:
    """A run that a checkpoint ended and another process took up; equal to "full", which is never written twice."""
    run = place.train("full", "--save-steps", 2)
    whole = of_run(run)
    for path in ("checkpoints/step-000004", "model"):
        (run / path).rename(place.folder / path.replace("/", " of the whole "))
    place.dpo("train", "--resume", run)
    assert of_run(run) == whole
    return whole


def on_two_ranks(place: Place) -> dict[str, Any]:
    place.save_model("ranks", "llama")
    run = place.folder / "ranks run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpo_cli"]
    data = ("--model", place.folder / "ranks", "--data", place.folder / "rows.jsonl", "--output", run)
    command = [*launcher, "train", *map(str, (*data, *COMMON, "--max-tokens", 500))]
    out = subprocess.run(
        command, env=cli_environment(place.folder / "home"), capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return of_run(run)


def swept(place: Place) -> dict[str, Any]:
    place.save_model("sweep", "llama")
    data = (
        "--model",
        place.folder / "sweep",
        "--data",
        place.folder / "rows.jsonl",
        "--eval-data",
        SAMPLE / "heldout-strings.jsonl",
    )
    place.dpo("sweep", *data, *COMMON, "--beta", "0.05,0.5", "--output", place.folder / "swept")
    runs = sorted(path.parent for path in (place.folder / "swept").glob("*/metrics.jsonl"))
    assert len(runs) == 2
    return {run.name: of_run(run) for run in runs}


def evaluated(place: Place) -> dict[str, Any]:
    """With the exact KL, whose distributions both models run for."""
    run, pairs = place.train("full"), place.folder / "pairs.jsonl"
    place.dpo("eval", "--model", run, "--data", SAMPLE / "heldout-strings.jsonl", "--per-pair", pairs)
    return of_pairs(pairs)


OTHERS = {"resume": resumed, "2 ranks": on_two_ranks, "sweep": swept, "eval with the exact KL": evaluated}


def compute(case: str, folder: Path) -> dict[str, Any]:
    place = Place(folder)
    return OTHERS[case](place) if case in OTHERS else of_run(place.train(case))


def assert_close(found: Any, recorded: Any, where: str) -> None:
    if isinstance(recorded, dict):
        assert found.keys() == recorded.keys(), where
        for key, value in recorded.items():
            assert_close(found[key], value, f"{where}, {key}")
    elif "logps/" in where:
        assert found == pytest.approx(recorded, rel=LOGPS_TOLERANCE, abs=0), where
    else:
        assert found == pytest.approx(recorded, rel=TOLERANCE, abs=TOLERANCE), where


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_a_trajectory_is_as_recorded(case: str, tmp_path: Path) -> None:
    assert_close(compute(case, tmp_path), json.loads(RECORDED.read_text())[case], case)


def test_trainings_differ() -> None:
    """A recording in which an option changed nothing would hold nothing."""
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == {*CASES, *OTHERS}
    same = {"gradient checkpointing", "several micro-batches", "resume", "2 ranks", "full"}  # as "full" by design
    weights = {round(recorded[case]["weights"], 6) for case in CASES if case not in same}
    assert len(weights) == len([case for case in CASES if case not in same])


def record() -> None:
    """Compute all cases and write them down."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    found = {}
    for case in (*CASES, *OTHERS):
        with tempfile.TemporaryDirectory() as folder:
            found[case] = compute(case, Path(folder))
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
