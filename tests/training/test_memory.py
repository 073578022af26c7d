"""Where the device's memory runs out a run goes on with less a forward, and its numbers are those it would have had.

A forward or backward pass that runs out of memory is simulated on the CPU; tests/training/test_gpu.py has a real one.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import MicroBatch
from dpo_cli.models.logprobs import HiddenStates, ModelRunner
from dpo_cli.models.parallel import Parallel
from dpo_cli.utils.errors import DpoError
from tests.helpers import SAMPLE, make_model, random_pairs, size, write_rows
from tests.helpers.forwards import others
from tests.helpers.steps import make_trainer

ROWS = 12
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:ROWS]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def start(rows: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``start(folder, *more)``: two epochs of three steps in mostly two forwards each; the reference is cached."""
    cache = tmp_path_factory.mktemp("cache")
    common = (
        "train", "--model", tiny, "--data", rows, "--cache-dir", cache, "--batch-size", 4, "--epochs", 2,
        "--save-steps", 1, "--lr", 1e-3, "--max-tokens", 900,
    )  # fmt: skip
    return lambda folder, *more: CliRunner().invoke(app, [*map(str, (*common, "--output", folder, *more))])


@pytest.fixture(scope="module")
def whole(start: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never lacked memory."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = start(folder)
    assert result.exit_code == 0, result.output
    assert int(re.search(r"6 steps of 4 pairs in (\d+) micro-batches", result.stderr)[1]) >= 9  # type: ignore[index]
    return folder


class Limits:
    """Simulated memory: forwards over more tokens than ``tokens`` fail; so do the calls whose numbers are planted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tokens = 10**9
        self.forwards: set[int] = set()
        self.backwards: set[int] = set()
        self.seen = 0
        self.failed: list[int] = []  # tokens of each forward that failed, or whose backward did
        body, backward, within = ModelRunner.body, HiddenStates.backward, others(patch)

        def check(runner: ModelRunner, batch: MicroBatch) -> None:
            if within:
                return
            tokens = batch.input_ids.numel()
            several = runner.model.training and len(batch.lengths) > 2
            self.seen += several
            if tokens > self.tokens or (several and self.seen in self.forwards):
                self._fail(tokens)

        def limited_body(runner: ModelRunner, batch: MicroBatch, *rest: Any, **more: Any) -> HiddenStates:
            check(runner, batch)
            return body(runner, batch, *rest, **more)

        def limited_token_logps(runner: ModelRunner, batch: MicroBatch) -> Tensor:
            check(runner, batch)
            return token_logps(runner, batch)

        def limited_backward(hidden: HiddenStates, *losses: Tensor) -> None:
            if len(hidden.batch.lengths) > 2 and self.seen in self.backwards:
                self.backwards.discard(self.seen)
                hidden.values.register_hook(lambda grad: self._fail(hidden.batch.input_ids.numel()))
            backward(hidden, *losses)

        token_logps = ModelRunner.token_logps
        patch.setattr(ModelRunner, "token_logps", limited_token_logps)
        patch.setattr(ModelRunner, "body", limited_body)
        patch.setattr(HiddenStates, "backward", limited_backward)

    def _fail(self, tokens: int) -> None:
        self.failed.append(tokens)
        raise torch.OutOfMemoryError("simulated")


@pytest.fixture
def limits(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Limits:
    return Limits(monkeypatch)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_trajectory(run: Path, whole: Path) -> None:
    got, expected = lines(run), lines(whole)
    assert len(got) == len(expected) == 6
    for line, other in zip(got, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    off = sum(float((weights[name] - other).norm()) ** 2 for name, other in others.items()) ** 0.5
    assert off <= 1e-6 * sum(float(other.norm()) ** 2 for other in others.values()) ** 0.5


@pytest.mark.torture
@pytest.mark.parametrize("where", ["forwards", "backwards"])
def test_the_trajectory_is_that_of_a_run_with_memory_enough(
    start: Train, whole: Path, limits: Limits, tmp_path: Path, where: str
) -> None:
    """Memory runs out once, in a random micro-batch; a backward pass has by then left half of its gradient behind."""
    rng = random.Random(where)
    for number in range(size(3, 25)):
        limits.seen, limits.failed = 0, []
        setattr(limits, where, {rng.randint(1, 8)})
        run = tmp_path / str(number)
        result = start(run)
        assert result.exit_code == 0, result.output
        assert len(limits.failed) == 1, getattr(limits, where)
        (tokens,) = limits.failed
        told = f"warning: out of memory at {tokens:,} tokens per forward; continuing with --max-tokens {tokens // 2}"
        assert told in result.stderr
        assert_same_trajectory(run, whole)


def test_memory_that_is_short_all_the_time(start: Train, whole: Path, limits: Limits, tmp_path: Path) -> None:
    """Halved until it fits, and then kept: no forward fails again."""
    limits.tokens = 500
    result = start(tmp_path / "run")
    assert result.exit_code == 0, result.output
    told = [int(tokens) for tokens in re.findall(r"continuing with --max-tokens (\d+)", result.stderr)]
    assert told and len(told) == len(limits.failed) <= 2 and told[-1] <= 500
    assert_same_trajectory(tmp_path / "run", whole)


def test_a_resumed_run_keeps_the_smaller_forwards(
    start: Train, whole: Path, limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its weights are equal to the bit to those of the run that was not interrupted."""
    import dpo_cli.training.trackers

    limits.tokens = 500
    assert start(tmp_path / "through").exit_code == 0

    def killed(file: Path, step: int, *rest: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        original(file, step, *rest)

    original = dpo_cli.training.trackers.append_metrics
    with monkeypatch.context() as patch:
        patch.setattr(dpo_cli.training.trackers, "append_metrics", killed)
        assert start(tmp_path / "run").exit_code == 130
    limits.failed.clear()
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "after step 3 of 6" in result.stderr
    assert len(limits.failed) <= 1  # in the check of step 0, which comes before the checkpoint is read
    got, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "through"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert lines(tmp_path / "run") == lines(tmp_path / "through")


def test_a_pair_that_fits_nowhere_is_named(
    start: Train, whole: Path, limits: Limits, rows: Path, tmp_path: Path
) -> None:
    """With its place and length; what was trained before is in the last checkpoint."""
    limits.tokens = 300
    result = start(tmp_path / "run")
    assert result.exit_code == 1 and "Traceback" not in result.output
    found = re.search(r"error: (\S+): this pair alone \((\d+) tokens\) does not fit", result.stderr)
    assert found, result.stderr
    file, _, line = found[1].rpartition(":")
    assert Path(file) == rows and 1 <= int(line) <= ROWS and int(found[2]) > 300
    assert "--max-length" in result.stderr


def test_a_rank_of_a_sharded_model_stops_before_it_asks_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for it inside a forward: asked below, all would wait for ever."""
    runner = ModelRunner(make_model(), "shared", torch.float32, 64, torch.device("cpu"))
    monkeypatch.setattr(ModelRunner, "parallel", Parallel(sharded=True))
    trainer, _ = make_trainer(runner, random_pairs(2), TrainOptions(data=["none"]), torch.zeros(2, 2))
    monkeypatch.setattr("dpo_cli.utils.distributed.all_reduce_max", lambda _: pytest.fail("another rank was asked"))
    with pytest.raises(DpoError, match="with --fsdp all ranks run in lockstep: set a lower --max-tokens"):
        trainer._shrink(trainer.batch([0, 1], [0, 1]))


@pytest.mark.parametrize("kl", ["none", "exact"])
def test_scoring_goes_on_with_less_a_forward(
    tmp_path: Path, tiny: Path, rows: Path, whole: Path, limits: Limits, kl: str
) -> None:
    """The reference and an evaluation: every pair once, the same numbers."""

    def run(name: str, *arguments: Any) -> tuple[dict[str, Any], str]:
        call = (*arguments, "--model", tiny, "--data", rows, "--cache-dir", tmp_path / name, "--json")
        result = CliRunner().invoke(app, [*map(str, call)])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout), result.stderr

    expected, _ = run("ample", "eval", "--kl", kl, "--per-pair", tmp_path / "ample.jsonl")
    limits.tokens = 700
    filled, told = run("short", "precompute-ref", "--max-tokens", 4000)
    assert filled["misses"] == ROWS and "out of memory" in told
    got, told = run("short", "eval", "--kl", kl, "--per-pair", tmp_path / "short.jsonl", "--max-tokens", 4000)
    assert "out of memory" in told
    assert (tmp_path / "short.jsonl").read_text() == (tmp_path / "ample.jsonl").read_text()
    numbers = {name for name, value in expected.items() if isinstance(value, (int, float))}
    assert {name: got[name] for name in numbers} == pytest.approx({name: expected[name] for name in numbers})
    assert all(got[name] == expected[name] for name in expected.keys() - numbers - {"drift"})


def test_large_tensors_lie_in_huge_pages() -> None:
    """Touching a new tensor of 64 MiB takes a page fault for each 2 MiB of it, not for each 4 KiB."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the kernel gives no huge pages")
    code = (
        "import dpo_cli, resource, torch\n"
        "torch.ones(1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert int(ran.stdout) < 2**14 / 4
