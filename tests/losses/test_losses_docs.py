"""What is told of the losses: the table of docs/losses.md, `dpo losses`, and the example of CONTRIBUTING.md, applied.

    python -m tests.losses.test_losses_docs

writes the table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import TrainOptions
from dpo_cli.losses.objective import list_losses
from dpo_cli.losses.preference import LOSSES
from tests.helpers import ROOT

DOCS = ROOT / "docs" / "losses.md"
TABLE = re.compile(r"(?<=<!-- losses: written by `make docs` -->\n).*?(?=<!-- /losses -->)", re.DOTALL)


def table() -> str:
    """A line a loss."""
    lines = ["| `--loss` | when | loss of a pair | reads | source |", "|---|---|---|---|---|"]
    for loss in list_losses()["losses"]:
        reads = [f"`{name}`" for name in loss["reads"]] + [f"`{n}` = {v:g}" for n, v in loss["options"].items()]
        formula = loss["formula"].replace("|", "\\|")
        paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", loss["paper"])
        lines.append(f"| `{loss['name']}` | {loss['use']} | {formula} | {', '.join(reads)} | {paper} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_the_losses_say() -> None:
    found = TABLE.search(DOCS.read_text(encoding="utf-8"))
    assert found and found[0] == table(), "make docs"


def test_dpo_losses_lists_them() -> None:
    out = CliRunner().invoke(app, ["losses"])
    assert out.exit_code == 0
    lines = [line.split(maxsplit=1) for line in out.stdout.splitlines()]
    assert lines[: len(LOSSES)] == [[name, loss.use] for name, loss in LOSSES.items()]
    as_data = json.loads(CliRunner().invoke(app, ["losses", "--json"]).stdout)["losses"]
    assert [each["name"] for each in as_data] == list(LOSSES)
    for each in as_data:
        one = CliRunner().invoke(app, ["losses", each["name"]]).stdout
        (block,) = re.findall(rf"^{each['name']}(?:  .*)?\n((?:  .*\n)+)", one, re.MULTILINE)
        assert all(text in block for text in (each["use"], each["formula"], each["paper"]))
        assert all(f"--loss-options {name}=" in block for name in each["options"])


def test_the_help_names_them() -> None:
    text = " ".join(TrainOptions.__dataclass_fields__["loss"].metadata["help"].split())
    assert all(re.search(rf"\b{name}\b", text) for name in LOSSES)


def test_the_example_of_a_new_loss_is_all_that_it_takes(tmp_path: Path) -> None:
    """Its diff is applied to a copy of the package as it stands in CONTRIBUTING.md."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    file, *rest = (part.split("\n", 1) for part in re.split(r"^\+\+\+ b/|^@@.*\n", diff, flags=re.MULTILINE)[1:])
    assert len(rest) == 1 and file[0] == "dpo_cli/losses/preference.py"
    lines = "\n".join(rest[0]).splitlines()
    assert sum(line.startswith("+") for line in lines) <= 15 and not any(line.startswith("-") for line in lines)
    shutil.copytree(ROOT / "dpo_cli", tmp_path / "dpo_cli", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / file[0]
    text, before = copy.read_text(encoding="utf-8"), "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
    assert text.count(before) == 1
    copy.write_text(text.replace(before, "".join(line[1:] + "\n" for line in lines)), encoding="utf-8")
    name = re.findall(r"^\+def (\w+)", diff, re.MULTILINE)
    code = (
        "import json, torch; from typer.testing import CliRunner; from dpo_cli.cli.app import app; import dpo_cli\n"
        "from dpo_cli.config.options import TrainOptions; from dpo_cli.losses.preference import Preferences\n"
        f"objective = TrainOptions(data=['-'], loss='{name[0]}=2', beta=0.5).objective\n"
        "p = Preferences(torch.tensor([2., -2.]), torch.zeros(2), torch.ones(2), torch.zeros(2), 1.0)\n"
        "told = [CliRunner().invoke(app, words).stdout for words in (['losses', '--json'], ['train', '--help'])]\n"
        "print(json.dumps([dpo_cli.__file__, objective(p).tolist(), *told]))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    where, losses, told, text = json.loads(out.stdout)
    assert Path(where).is_relative_to(tmp_path)
    assert losses == [2 * 0.1353352963924408] or abs(losses[0] - 2 * 0.135335) < 1e-5  # e^-2
    assert name[0] in [each["name"] for each in json.loads(told)["losses"]] and name[0] in text


if __name__ == "__main__":
    DOCS.write_text(TABLE.sub(lambda _: table(), DOCS.read_text(encoding="utf-8")), encoding="utf-8")
