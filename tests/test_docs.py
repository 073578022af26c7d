"""All of README.md and docs/ runs as written, with a tiny model, few rows and an empty folder; or says why it does not.

``tests/pages.py`` says how a block is marked that is not to run.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner

from dpo_cli import plots
from dpo_cli.cli import app
from tests.conftest import ROOT, SAMPLE
from tests.pages import EXECUTED, RUN_BY, SHELL, SHOWN, Block, anchors, blocks, links, pages, spans

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the tiny model stands for it
OWN_DATA = ("my-pairs.jsonl", "pairs.jsonl", "test.jsonl", "train.jsonl", "heldout.jsonl")  # that pages speak of
ROWS = {"train": 32, "heldout": 20}
HARMLESS = ("cat ", "cp ", "head ", "ls ", "mkdir ")  # that stand beside ours
OF_OTHERS = {"--ours-options", "--grid", "--case", "--phases"}  # options of benchmarks, named alone


def _commands(group: Any, names: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {}
    for name, each in group.commands.items():
        found |= _commands(each, (*names, name)) if hasattr(each, "commands") else {(*names, name): each}
    return found


COMMANDS = _commands(typer.main.get_command(app))
OPTIONS = {
    names: {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    for names, command in COMMANDS.items()
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it, with fewer rows."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "sample_data").mkdir()
    (folder / "sample_data" / "formats").symlink_to(SAMPLE / "formats")
    for name, rows in ROWS.items():
        lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / "sample_data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name in OWN_DATA[:3]:
        (folder / name).symlink_to(folder / "train.jsonl")
    return folder


@pytest.fixture
def reader(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which one page is read, with a home of its own. Plots stay empty: other tests draw them."""
    monkeypatch.setattr(plots, "_figure", lambda *_, **__: Figure(figsize=(1, 1)))
    for file in few.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def _run(command: str, tiny: Path) -> None:
    command, _, given = command.replace(BASE, str(tiny)).partition(" <<< ")
    words = shlex.split(command)
    if words[0] != "dpo":
        assert command.startswith(HARMLESS), "say why it is not run"
        subprocess.run(words, check=True, timeout=10, capture_output=True)
        return
    (names,) = [names for names in COMMANDS if tuple(words[1 : 1 + len(names)]) == names]
    known = OPTIONS[names]
    if "--model" in known and names[0] != "cache" and not {"--model", "--resume", "--help"} & set(words):
        words += ["--model", str(tiny)]
    (row,) = shlex.split(given) or [""]
    out = CliRunner().invoke(app, words[1:], input=row + "\n" if row else None)
    assert out.exit_code == 0, out.output


@pytest.mark.parametrize(
    "page", [page for page in pages() if any(not b.mark for b in blocks(page) if b.language in EXECUTED)]
)
def test_a_page_runs_as_written(page: str, reader: Path, tiny: Path) -> None:
    known: dict[str, Any] = {}
    for block in blocks(page):
        if block.mark or block.language not in EXECUTED:
            continue
        try:
            if block.language == "python":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of other packages
                    exec(compile(block.text.replace(BASE, str(tiny)), block.where, "exec"), known)
            for command in block.commands if block.language in SHELL else []:
                _run(command, tiny)
        except Exception as error:
            raise AssertionError(f"{block.where}\n{block.text}") from error


@pytest.mark.parametrize("page", pages())
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(page):
        assert block.language in (*EXECUTED, *SHOWN), f"{block.where}: say the block's language"
        assert not block.mark or block.language in EXECUTED, f"{block.where}: nobody would run it"
        assert not block.mark or RUN_BY.fullmatch(block.mark) or re.fullmatch(r"not run: .{10,}", block.mark), (
            block.where
        )
        if by := RUN_BY.fullmatch(block.mark):
            assert by[2] in _functions(ROOT / by[1]), f"{block.where}: {by[0]}"


def _functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_options_are_there(page: str) -> None:
    """Of the command they stand behind; alone, of any."""
    for span in spans(page):
        words = re.split(r"[\s=]+", span)
        own = [i for i, word in enumerate(words) if word in ("dpo", "dpo_cli")]
        other = re.match(r"--\w[\w-]*", span) is None
        if not own and other:
            continue
        rest = words[own[0] + 1 :] if own else words
        names = next((names for names in COMMANDS if tuple(rest[: len(names)]) == names), None)
        assert names or not own or not rest or rest[0] in ("cache", "--version", "--help"), (
            f"{page}: {span}: no such command"
        )
        known = OPTIONS[names] if names else {"--version", "--help"}.union(OF_OTHERS, *OPTIONS.values())
        unknown = {word for word in rest if re.fullmatch(r"--[\w-]+", word)} - known
        assert not unknown, f"{page}: {span}: {unknown}"


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{page}: {file}"
        assert not anchor or anchor in anchors(file), f"{page}: {file}#{anchor}"


def test_the_demo_runs(reader: Path, tiny: Path) -> None:
    """`make demo`, as make prints it, without its setup."""
    out = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    (command,) = re.findall(r"^\.venv/bin/(dpo .*)$", out.stdout.replace("\\\n", " "), re.MULTILINE)
    _run(command, tiny)
    (report,) = reader.glob("runs/*/report.html")
    assert "Findings" in report.read_text(encoding="utf-8")


def test_a_block_is_read_with_its_mark() -> None:
    """The reader of pages itself, on a page of which everything is known."""
    block = Block("README.md", 0, "console", "", "$ dpo check --data a.jsonl \\\n    --strict  # why\n# nothing\n")
    assert block.commands == ["dpo check --data a.jsonl --strict"]
    assert RUN_BY.fullmatch("run by tests/test_docs.py: test_links_lead_somewhere")
