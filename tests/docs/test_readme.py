"""Examples of rows, in docs/data.md and sample_data/formats, are read in the format that they stand for."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.data.formats import FORMATS
from tests.helpers import ROOT, SAMPLE, cli_environment
from tests.helpers.pages import commands, read

DATA = "docs/data.md"
FILES = [f"dpo explain --data sample_data/formats/{file.name}" for file in sorted((SAMPLE / "formats").iterdir())]
EXPLAINED = [line for line in commands(DATA) if line.startswith("dpo explain")] + FILES


@pytest.mark.parametrize("command", EXPLAINED)
def test_examples_of_rows_run(command: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the row is read in the format that stands beside it or in its file's name."""
    monkeypatch.chdir(ROOT)
    words, _, row = (shlex.split(part) if part else [] for part in command.partition(" <<< "))
    out = CliRunner().invoke(app, [*words[1:], "--model", str(tiny)], input=row[0] + "\n" if row else None)
    assert out.exit_code == 0, out.output
    assert "format " in out.stdout and "\npart      loss " in out.stdout
    beside = re.search(rf"^\| `(\w+)` .*`{re.escape(command)}` \|$", read(DATA), re.MULTILINE)
    name = beside[1] if beside else Path(words[3]).stem
    assert name not in FORMATS or f"format      {FORMATS[name][0]}" in out.stdout


def test_every_format_has_its_example() -> None:
    beside = re.findall(r"^\| `(\w+)` .*`dpo explain [^`]*` \|$", read(DATA), re.MULTILINE)
    assert set(beside) == set(FORMATS) <= {Path(line).stem for line in FILES}


def test_an_example_runs_in_a_shell_as_it_stands(tiny: Path, tmp_path: Path) -> None:
    line = next(line for line in EXPLAINED if "<<<" in line).replace(" <<<", f" --model {shlex.quote(str(tiny))} <<<")
    environment = cli_environment(tmp_path) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0 and out.stdout.startswith("row         stdin:1\n"), out.stderr
