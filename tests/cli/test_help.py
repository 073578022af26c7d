"""What a person reads who asks for help: commands in the order of use, options in groups, examples that run."""

from __future__ import annotations

import re
import shlex
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.help import EXAMPLES, PANELS

COMMANDS = [
    *("check", "explain", "train", "chat", "generate", "eval", "sweep", "init", "losses", "precompute-ref"),
    *("cache list", "cache prune", "merge", "export", "push"),
]


def read(*words: str) -> str:
    out = CliRunner().invoke(app, [*words, "--help"])
    assert out.exit_code == 0, out.output
    return out.stdout


def options_of(text: str) -> dict[str, list[str]]:
    """Of each heading the options below it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"([A-Z][\w ,]*):", line):
            found[heading[1]] = []
        elif found and (flag := re.match(r"  (?:-h, )?--([\w-]+)", line)):
            found[[*found][-1]].append(flag[1].replace("-", "_"))
    return found


def test_commands_stand_in_the_order_of_use_and_whole() -> None:
    text = read()
    below = text.partition("Commands, in the order of use:\n")[2]
    names = [line.split()[0] for line in below.splitlines() if re.match(r"  \w", line)]
    assert names == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    assert "..." not in below


def test_options_stand_in_groups_and_those_of_every_day_first() -> None:
    text = read("train")
    groups = options_of(text)
    assert [name for name in groups if name != "Examples"] == [*PANELS, "Advanced"]
    everyday = ["data", "eval_data", "eval_fraction", "model", "output", "beta", "lr", "epochs", "batch_size"]
    assert sorted(groups["Everyday options"]) == sorted([*everyday, "lora_rank"])
    assert set(groups["Advanced"]) <= {"router_aux_loss_coef", "cache_dir", "help"}
    assert "--lr-scheduler [linear|cosine|constant]" in text.replace(
        "linear|cosine|constant", "[linear|cosine|constant]"
    )
    assert "<list[str]>" not in text


def test_a_panel_names_options_that_there_are() -> None:
    names = " ".join(PANELS.values()).split()
    there = {name for command in COMMANDS for group in options_of(read(*command.split())).values() for name in group}
    assert set(names) <= there and max(Counter(names).values()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_two_examples_of_each_command_name_its_options(command: str) -> None:
    lines = read(*command.split()).partition("Examples:\n")[2].splitlines()
    assert [line.strip() for line in lines] == [*EXAMPLES[command.split()[-1]]] and len(lines) == 2
    group = typer.main.get_command(app)
    for name in command.split():
        group = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    for line in lines:
        words = shlex.split(line)
        assert words[: 1 + len(command.split())] == ["dpo", *command.split()]
        group.make_context(command, words[1 + len(command.split()) :], resilient_parsing=True)
        known = {flag for parameter in group.get_params(typer.Context(group)) for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize(("name", "told"), [("simpoo", "did you mean 'simpo'?"), ("x", "dpo losses lists them")])
def test_a_loss_that_is_none(name: str, told: str) -> None:
    out = CliRunner().invoke(app, ["losses", name])
    assert out.exit_code == 2 and f"{name}: no such loss" in out.stderr and told in out.stderr


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate"])
def test_other_trainers_options_are_known(flag: str) -> None:
    out = CliRunner().invoke(app, ["train", "--data", "rows.jsonl", flag, "1"])
    assert out.exit_code == 2 and "did you mean '--lr'?" in out.stderr
