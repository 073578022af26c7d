"""docs/python.md is a notebook: its blocks run in order, with the tiny model in place of the one it names."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT, SAMPLE


def test_the_notebook_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    named = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert text.count(named) == 1, "the model is named once, and so replaced everywhere"
    blocks = re.findall(r"^```python\n(.*?)^```", text.replace(named, repr(str(tiny))), re.MULTILINE | re.DOTALL)
    (tmp_path / "sample_data").mkdir()
    for name, count in (("train.jsonl", 64), ("heldout.jsonl", 16)):
        lines = (SAMPLE / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "sample_data" / name).write_text("".join(lines[:count]), encoding="utf-8")
    for name in ("write_report", "write_plots"):  # they take most of the time of so small a run
        monkeypatch.setattr(f"dpo_cli.training.loop.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cell: dict[str, object] = {}
    said = ""
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), cell)  # as a notebook does
        seen = capsys.readouterr()
        assert seen.err == "" or "AutoModelForCausalLM" in block, "only transformers itself shows its progress"
        said += seen.out
    (told,) = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert said == told
    done, kept, both = (dict(cell[name]) for name in ("done", "kept", "both"))  # type: ignore[call-overload]
    assert done["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6) and done["after"]["loss"] < 0.69
    assert [line["step"] for line in cell["steps"]] == list(range(1, 9))  # type: ignore[attr-defined]
    assert (kept["hits"], kept["misses"]) == (64, 0), "the first run has scored its pairs"
    assert (
        both["a"]["model"].endswith("runs/lr-5e-06/model") and both["differences"]["rewards/margins"]["difference"] > 0
    )
