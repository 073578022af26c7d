"""docs/options.md has every option of every command, with its help and default.

    python -m tests.docs.test_options_docs

writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from html import escape
from typing import Any

import pytest
import typer

from dpo_cli.cli.app import app
from dpo_cli.cli.command import Output
from dpo_cli.config import options
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Every option, written by `make docs` from the program itself; the `--help` of a command prints the same. In a file for
`--config`, and from Python, a name has `_` in the place of `-`. `dpo init` writes all options of `dpo train` to a file.
"""
SECTIONS = (
    ("Pairs and the model", "All commands that read pairs.", options.DataOptions),
    ("Computing log-probs", "`train`, `sweep`, `precompute-ref` and `eval`.", options.Options),
    ("Weights in memory", "`train`, `sweep` and `precompute-ref`.", options.WeightsOptions),
    ("Sampled answers", "`eval` and `sweep`.", options.SampleOptions),
    ("dpo train", "And `sweep`, but for what its own section has.", options.TrainOptions),
    ("dpo sweep", "", options.SweepOptions),
    ("dpo eval", "", options.EvalOptions),
    ("dpo precompute-ref", "", options.PrecomputeOptions),
    ("dpo check", "", options.CheckOptions),
    ("dpo explain", "", options.ExplainOptions),
    ("Output", "All commands.", Output),
)
KINDS = [kind for *_, kind in SECTIONS]
GROUP = typer.main.get_command(app)


def commands(group: Any = GROUP, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield above + name, command


def params(command: Any) -> list[Any]:
    return [p for p in command.get_params(typer.Context(command)) if p.name != "help"]


def row(name: str, text: str, default: Any) -> str:
    shown = "" if default in (None, MISSING, False, ()) else str(default)
    return f"| `{name}` | {escape(text, quote=False)} | {escape(shown, quote=False)} |".replace("  |", " |")


def of_field(option: Field[Any]) -> str:
    about = option.metadata
    return row(f"--{option.name.replace('_', '-')}", about["help"], about["shown"] or option.default)


def page() -> str:
    """A table per class of options, and one of what commands have beside them."""
    parts, known = [HEAD], {f.name for kind in KINDS for f in fields(kind)}
    table = "| option | what it does | default |\n|---|---|---|\n"
    for title, users, kind in SECTIONS:
        own = [f for f in fields(kind) if f.name in kind.__annotations__]
        rows = "".join(of_field(f) + "\n" for f in own)
        parts.append(f"## {title}\n\n" + f"{users}\n\n" * bool(users) + table + rows)
    rows = ""
    for command, each in commands():
        for p in params(each):
            if p.name not in (known if each.kind else vars(Output())):
                name = p.opts[0] if p.opts[0].startswith("-") else (p.metavar or p.name).upper()
                text, _, default = (p.help or "").partition(" [default: ")
                rows += row(name, text, default.rstrip("]") or p.default).replace("| ", f"| `{command}` | ", 1) + "\n"
    head = "## Beside these\n\nOf single commands; a word in capitals is an argument without a flag.\n\n"
    parts.append(head + "| command | option | what it does | default |\n|---|---|---|---|\n" + rows)
    return "\n".join(parts)


def test_the_page_is_what_the_program_has() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


@pytest.mark.parametrize(("name", "command"), [*commands()])
def test_every_option_of_a_command_is_on_it(name: str, command: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{p.opts[0]}` |" in text for p in params(command) if p.opts[0].startswith("-")), name


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
