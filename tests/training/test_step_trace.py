"""The training step stays short to read: few frames from the loop to the backward pass, few functions, few files."""

from pathlib import Path

from typer.testing import CliRunner

from benchmarks.step_trace import traced
from dpo_cli.cli.app import app
from tests.helpers import SAMPLE


def test_from_the_loop_to_the_backward_pass(tiny: Path, tmp_path: Path) -> None:
    data = ("--model", tiny, "--data", SAMPLE / "train.jsonl", "--cache-dir", tmp_path / "cache")
    with traced() as trace:
        out = CliRunner().invoke(app, ["train", *map(str, data), "--max-steps", "1", "--output", str(tmp_path / "run")])
    assert out.exit_code == 0, out.output
    assert len(trace.frames) <= 6 and sum(name.startswith("cli/") for name in trace.frames) <= 2, trace.frames
    loop = trace.frames[trace.frames.index("training/loop.py:train") :]
    assert len(loop) <= 4 and len(trace.files(trace.frames)) <= 4, trace.frames
    assert len(trace.functions) <= 25 and len(trace.files(trace.functions)) <= 5, trace.functions
