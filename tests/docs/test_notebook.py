"""docs/notebooks/first_dpo.ipynb runs from its first cell to its last, with the tiny model and no installation."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from tests.helpers import ROOT

NOTEBOOK = json.loads((ROOT / "docs/notebooks/first_dpo.ipynb").read_text(encoding="utf-8"))
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the tiny model stands for it


def test_its_cells_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display: Any = ModuleType("IPython.display")
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    known: dict[str, Any] = {}
    said = ""
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] != "code" or "install" in cell["metadata"].get("tags", ()):
            continue
        code = "".join(cell["source"]).replace(BASE, str(tiny))
        lines = code.splitlines()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages
            exec("\n".join(line for line in lines if not line.startswith("!")), known)
        for line in (line for line in lines if line.startswith("!")):
            words = shlex.split(line[1:].format(**known))
            out = CliRunner().invoke(app, words[1:])
            assert words[0] == "dpo" and out.exit_code == 0, out.output
            said += out.output
    assert "no problems found in 60 rows" in said and "length predicts the preference" in said
    assert "step 0" in said
    assert "too few to judge" not in said, "enough pairs are held out"
    assert (tmp_path / "runs/first/model/model.safetensors").is_file()


def test_it_is_a_notebook_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len({*ids}) == len(ids)
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
