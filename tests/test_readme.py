"""The README's commands run as written; only the model is a tiny one, named at the end."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, cli_environment


def readme_commands() -> list[str]:
    """All `dpo …` lines of the README's code blocks, with continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.startswith("dpo ")]


def test_readme_commands_run(tiny: Path, tmp_path: Path) -> None:
    commands = readme_commands()
    assert {command.split()[1] for command in commands} >= {"train", "precompute-ref", "eval", "cache"}
    (tmp_path / "sample_data").symlink_to(ROOT / "sample_data")
    environment = cli_environment(tmp_path / "home") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        words = shlex.split(command)
        if words[1] != "cache" and "--model" not in words and "--resume" not in words and "--help" not in words:
            words += ["--model", str(tiny)]
        out = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, f"{command}\n{out.stderr}"
