"""All of README.md and docs/ runs as written, with a tiny model, few rows and an empty folder; or says why it does not.

``tests/helpers/pages.py`` says how a block is marked that is not to run.
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
from rich.text import Text
from typer.testing import CliRunner

from benchmarks.studies.pictures import IMAGES, draw, lines_of
from dpo_cli.cli.app import app
from tests.helpers import ROOT, SAMPLE
from tests.helpers.pages import (
    EXECUTED,
    FENCE,
    RUN_BY,
    SHELL,
    SHOWN,
    Block,
    anchors,
    blocks,
    executed,
    links,
    pages,
    read,
    spans,
)

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the tiny model stands for it
OWN_DATA = ("my-pairs.jsonl", "pairs.jsonl", "test.jsonl", "train.jsonl", "heldout.jsonl")  # that pages speak of
ROWS = {"train": 32, "heldout": 20}
HARMLESS = ("cat ", "cp ", "head ", "ls ", "mkdir ")  # that stand beside ours
OF_OTHERS = {  # options of benchmarks, pip, hf, named alone
    *("--ours-options", "--grid", "--case", "--phases", "--logdir"),
    *("--no-deps", "--upgrade", "--force", "--timeout", "--secrets", "--with"),
}


def _commands(group: Any, names: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {}
    context = typer.Context(group)
    for name in group.list_commands(context):
        each = group.get_command(context, name)
        found |= _commands(each, (*names, name)) if hasattr(each, "list_commands") else {(*names, name): each}
    return found


COMMANDS = {(): typer.main.get_command(app)} | _commands(typer.main.get_command(app))
OPTIONS = {
    names: {option for parameter in command.get_params(typer.Context(command)) for option in parameter.opts}
    | {"--help", "-h"}
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
    names, _ = _command(words)
    assert names, "no such command"
    if "--model" in OPTIONS[names] and names[0] != "cache" and not {"--model", "--resume", "--help"} & set(words):
        words += ["--model", str(tiny)]
    (row,) = shlex.split(given) or [""]
    out = CliRunner().invoke(app, words[1:], input=row + "\n" if row else None)
    assert out.exit_code == 0, out.output


@pytest.mark.parametrize("page", [page for page in pages() if executed(page)])
def test_a_page_runs_as_written(page: str, reader: Path, tiny: Path) -> None:
    known: dict[str, Any] = {}
    for block in executed(page):
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
    assert read(page).count("```") == 2 * len(FENCE.findall(read(page))), "a block that begins within a line"
    for block in blocks(page):
        assert block.language in (*EXECUTED, *SHOWN), f"{block.where}: say the block's language"
        assert not block.mark or block.language in EXECUTED, f"{block.where}: nobody would run it"
        by, reason = RUN_BY.fullmatch(block.mark), re.fullmatch(r"not run: .{10,}", block.mark)
        assert by or reason or not block.mark, f"{block.where}: {block.mark}"
        assert not by or by[2] in _functions(ROOT / by[1]), f"{block.where}: there is no {by[2]}"


def _functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_options_are_there(page: str) -> None:
    """Of the command they stand behind; alone, of any."""
    for span in spans(page):
        words = re.split(r"[\s=]+", span)
        names, given = _command(words)
        if names is None and words[0] != "dpo" and not re.match(r"--\w", span):
            continue
        known = OPTIONS[names] if names else OF_OTHERS.union(*OPTIONS.values())
        unknown = {word for word in given if re.fullmatch(r"--\w[\w-]*", word)} - known
        assert not unknown, f"{page}: {span}: {unknown}"
        others = {"cache", *OPTIONS[()]}
        assert names or words[0] != "dpo" or not given or given[0] in others, f"{page}: {span}"


def _command(words: list[str]) -> tuple[tuple[str, ...] | None, list[str]]:
    """Names of the command of ours that is among the words, and what follows ``dpo``; without one None, and all."""
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word in ("dpo", "dpo_cli") and (found := [n for n in COMMANDS if n and tuple(rest[: len(n)]) == n]):
            return found[0], rest
    return None, words[1:] if words[0] == "dpo" else words


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{page}: {file}"
        assert not anchor or anchor in anchors(file), f"{page}: {file}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    """Of the site, and of the pages' own index."""
    files = {Path(page).name for page in pages() if page.startswith("docs/")}
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(nav) == sorted(files)
    assert {file.name for file, _ in links("docs/index.md") if file.suffix == ".md"} == files - {"index.md"}


def test_the_demo_runs(reader: Path, tiny: Path) -> None:
    """`make demo`, as make prints it, without its setup."""
    out = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    (command,) = re.findall(r"^\.venv/bin/(dpo .*)$", out.stdout.replace("\\\n", " "), re.MULTILINE)
    _run(command, tiny)
    (report,) = reader.glob("runs/*/report.html")
    assert "Verdict" in report.read_text(encoding="utf-8")


def test_a_block_is_read_without_prompts_and_comments() -> None:
    block = Block("README.md", 0, "console", "", "$ dpo check --data a.jsonl \\\n    --strict  # why\n# nothing\n")
    assert block.commands == ["dpo check --data a.jsonl --strict"]


def test_what_is_not_ours_needs_a_mark(tiny: Path) -> None:
    with pytest.raises(AssertionError, match="say why it is not run"):
        _run("pip install .", tiny)


def test_the_pictures_load_nothing_and_are_small() -> None:
    drawn = (IMAGES / "terminal.svg").read_text(encoding="utf-8")
    assert "held out" in drawn.replace("&#160;", " ") and not re.search(r"url\(.?http|@import|href=", drawn)
    assert (IMAGES / "report.png").stat().st_size < 300_000


def test_a_bar_that_was_wiped_out_is_in_the_picture(tmp_path: Path) -> None:
    """As rich writes it: the bar is drawn over itself, and gone at the end."""
    bars = "".join(f"\r\x1b[2Ktrain \x1b[32m━━━\x1b[0m {step}/2 loss 0.{step}" for step in (1, 2))
    log = f"plan  2 steps\r\n\x1b[?25l{bars}\r\n\x1b[?25h\r\x1b[1A\x1b[2Kheld out  0.5\r\nrun   runs/a\r\n"
    lines = lines_of(log)
    assert [Text.from_ansi(line).plain for line in lines] == [
        "plan  2 steps",
        "train ━━━ 2/2 loss 0.2",
        "held out  0.5",
        "run   runs/a",
        "",
    ]
    draw("dpo train", lines, tmp_path / "terminal.svg")
    drawn = (tmp_path / "terminal.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    assert all(part in drawn for part in ("$ dpo train", "held out  0.5", "━━━"))
