"""Commands of the README and of docs/data.md run as written; only the model is a tiny one, named at the end."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.data import FORMATS
from tests.conftest import ROOT, cli_environment


def commands(file: str) -> list[str]:
    """All `dpo …` lines of a file's code blocks, with continued lines joined, and those in its tables."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines = [line.split("  #")[0].strip() for line in lines if line.removeprefix("$ ").startswith("dpo ")]
    return lines + re.findall(r"^\|.*`(dpo [^`]*)` \|$", text, flags=re.MULTILINE)


EXPLAINED = [
    line for file in ("README.md", "docs/data.md") for line in commands(file) if line.startswith("dpo explain")
]


def test_readme_commands_run(tiny: Path, tmp_path: Path) -> None:
    both = dict.fromkeys(commands("README.md") + commands("docs/data.md"))
    found = [command for command in both if command not in EXPLAINED]
    assert {command.split()[1] for command in found} >= {"train", "precompute-ref", "eval", "check", "cache"}
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    environment = cli_environment(tmp_path / "home") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in found:
        words = shlex.split(command)
        if words[1] != "cache" and "--model" not in words and "--resume" not in words and "--help" not in words:
            words += ["--model", str(tiny)]
        out = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, f"{command}\n{out.stderr}"


@pytest.mark.parametrize("command", EXPLAINED)
def test_examples_of_rows_run(command: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the row is read in the format that stands beside it or in its file's name."""
    monkeypatch.chdir(ROOT)
    words, _, row = (shlex.split(part) if part else [] for part in command.partition(" <<< "))
    out = CliRunner().invoke(app, [*words[1:], "--model", str(tiny)], input=row[0] + "\n" if row else None)
    assert out.exit_code == 0, out.output
    assert "format " in out.stdout and "carry loss" in out.stdout
    beside = re.search(rf"^\| `(\w+)` .*`{re.escape(command)}` \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE)
    name = beside[1] if beside else Path(words[3]).stem
    assert name not in FORMATS or f"format      {FORMATS[name][0]}\n" in out.stdout


def test_every_format_has_its_example() -> None:
    for file in ("README.md", "docs/data.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"`{name}`" in text or f"formats/{name}.jsonl" in text for name in FORMATS), file
    assert len(EXPLAINED) >= 2 * len(FORMATS)


def test_an_example_runs_in_a_shell_as_it_stands(tiny: Path, tmp_path: Path) -> None:
    line = next(line for line in EXPLAINED if "<<<" in line).replace(" <<<", f" --model {shlex.quote(str(tiny))} <<<")
    environment = cli_environment(tmp_path) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0 and out.stdout.startswith("row         stdin:1 "), out.stderr
