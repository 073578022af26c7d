"""The memory modes through the command: the same training in fewer bytes, resumed and evaluated as any other.

What the modes compute is tested in tests/training/test_optimizer.py.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models.logprobs import HiddenStates, ModelRunner
from dpo_cli.training.loop import Trainer
from tests.helpers import SAMPLE, write_rows

ROWS, STEPS = 16, 4
MODES = ("full", "split", "in-backward")
# One forward a step, nothing clipped: what the mode in-backward needs, and the others are compared with.
COMMON = (
    "--batch-size",
    4,
    "--max-tokens",
    4096,
    "--max-grad-norm",
    0,
    "--lr",
    1e-3,
    "--warmup-ratio",
    0,
    "--save-steps",
    1,
)
Dpo = Callable[..., Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:ROWS]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def dpo(rows: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Dpo:
    cache = tmp_path_factory.mktemp("cache")

    def run(command: str, *arguments: Any, model: Any = tiny) -> Any:
        common = ("--model", model, "--data", rows, "--cache-dir", cache)
        return CliRunner().invoke(app, [command, *map(str, (*common, *arguments))])

    return run


@pytest.fixture(scope="module")
def runs(dpo: Dpo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each mode, all computing in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in MODES:
        options = ("--memory", mode, "--dtype", "bfloat16", "--eval-data", SAMPLE / "heldout-strings.jsonl")
        result = dpo("train", *COMMON, *options, "--output", folder / mode)
        assert result.exit_code == 0, result.output
    return {mode: folder / mode for mode in MODES}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_as_in_float32(runs: dict[str, Path], mode: str) -> None:
    """From ln 2 on: the reference is that of the weights that compute."""
    got, expected = ([line["loss"] for line in lines(runs[name]) if "loss" in line] for name in (mode, "full"))
    assert len(got) == STEPS and got[0] == pytest.approx(math.log(2), abs=1e-6)
    assert got[-1] < 0.6
    assert got == pytest.approx(expected, abs=0.02)


def test_updating_in_the_backward_pass_is_the_same_training(runs: dict[str, Path]) -> None:
    one, other = (weights(runs[mode]) for mode in ("split", "in-backward"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for line, same in zip(lines(runs["split"]), lines(runs["in-backward"]), strict=True):
        assert line == pytest.approx(same, rel=1e-2)  # the norm of bfloat16 gradients has three digits


@pytest.mark.parametrize("mode", MODES)
def test_the_exported_model_has_float32_weights(runs: dict[str, Path], mode: str) -> None:
    """In the split modes they are more than what computes."""
    exported = weights(runs[mode])
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    halved = [tensor for tensor in exported.values() if torch.equal(tensor.bfloat16().float(), tensor)]
    assert not halved
    model = AutoModelForCausalLM.from_pretrained(runs[mode] / "model")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_evaluated_as_in_training(runs: dict[str, Path], dpo: Dpo, mode: str) -> None:
    """`dpo eval` halves the weights of a run that computed with halves."""
    result = dpo("eval", "--json", "--data", SAMPLE / "heldout-strings.jsonl", model=runs[mode])
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["pairs"] == 88 + ROWS  # --data is repeatable, and the common rows are there too
    only = dpo("eval", "--json", "--per-pair", runs[mode] / "pairs.jsonl", model=runs[mode])
    assert only.exit_code == 0, only.output
    (last,) = [line for line in lines(runs[mode]) if line["step"] == STEPS and "eval_loss" in line]
    held_out = (again["loss"] * (88 + ROWS) - json.loads(only.stdout)["loss"] * ROWS) / 88
    assert held_out == pytest.approx(last["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("mode", ["split", "in-backward"])
def test_resumed_equals_uninterrupted(
    runs: dict[str, Path], dpo: Dpo, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes in the second step's backward pass; in-backward that step is finished all the same."""
    original, calls = HiddenStates.backward, []

    def interrupting(self: HiddenStates, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(HiddenStates, "backward", interrupting)
    options = ("--memory", mode, "--dtype", "bfloat16", "--eval-data", SAMPLE / "heldout-strings.jsonl")
    result = dpo("train", *COMMON, *options, "--output", tmp_path / "run")
    assert result.exit_code == 130, result.output
    done = 2 if mode == "in-backward" else 1
    assert f"interrupted after step {done} of {STEPS}" in result.stderr
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "run") == lines(runs[mode])
    one, other = weights(runs[mode]), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_options_that_do_not_go_together(dpo: Dpo, tmp_path: Path) -> None:
    for options, told in (
        (("--memory", "split", "--dtype", "float32"), "weights that --memory split splits compute in bfloat16"),
        (("--memory", "in-backward"), "set --max-grad-norm 0"),
        (("--memory", "in-backward", "--max-grad-norm", 0, "--max-tokens", 128), "a step must be one forward"),
        (("--memory", "half"), "must be one of"),
    ):
        result = dpo("train", *options, "--output", tmp_path / "run")
        assert result.exit_code == 2 and told in result.stderr, result.output
        assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_is_said_to_have_changed_weights(
    dpo: Dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = Trainer.step, []

    def spoiling(self: Trainer, *arguments: Any) -> Any:
        steps.append(arguments)
        if len(steps) == 3:
            self.runner.model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * math.nan)  # type: ignore[union-attr, index, operator]
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", spoiling)
    result = dpo("train", *COMMON, "--memory", "in-backward", "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert "step 3: the gradient is not finite" in result.stderr
    assert "Some weights were changed by this step, and earlier checkpoints are whole" in result.stderr
    monkeypatch.undo()
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-000001", "step-000002"]


def test_an_evaluation_that_lacks_memory_leaves_training_as_it_is(
    runs: dict[str, Path], dpo: Dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with less a forward; a training step that was one forward still is."""
    original, failed = ModelRunner._attempt, []

    def lacking(self: ModelRunner, pairs: Any, places: Any, *rest: Any) -> Any:
        if len(places) > 40:  # held-out ones: a step has 4
            failed.append(len(places))
            return None
        return original(self, pairs, places, *rest)

    monkeypatch.setattr(ModelRunner, "_attempt", lacking)
    options = ("--memory", "in-backward", "--dtype", "bfloat16", "--eval-data", SAMPLE / "heldout-strings.jsonl")
    result = dpo("train", *COMMON, *options, "--eval-steps", 1, "--max-tokens", 16384, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert len(failed) > STEPS and "out of memory" in result.stderr
    got, expected = ([line for line in lines(run) if "loss" in line] for run in (tmp_path / "run", runs["in-backward"]))
    assert got == expected


def test_many_forwards_a_step_add_up_in_bfloat16(runs: dict[str, Path], dpo: Dpo, tmp_path: Path) -> None:
    """Every forward of one pair adds a rounded gradient, and the trajectory stays that of one forward."""
    options = ("--memory", "split", "--batch-size", ROWS, "--epochs", STEPS)
    found = []
    for name, budget in (("many", 128), ("one", 16384)):
        result = dpo("train", *COMMON, *options, "--max-tokens", budget, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        found.append([(line["loss"], line["grad_norm"]) for line in lines(tmp_path / name)])
    many, one = found
    assert len(many) == len(one) == STEPS and many != one
    for (loss, norm), (whole_loss, whole_norm) in zip(many, one, strict=True):
        assert loss == pytest.approx(whole_loss, abs=0.01)
        assert norm == pytest.approx(whole_norm, rel=0.03)
