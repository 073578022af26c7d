"""What a person or a script sees on stderr: on terminals of several kinds, in a pipe, quietly, as JSON."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.utils.console import Reporter
from tests.helpers import SAMPLE, cli_environment

VALUES = {
    "loss": 0.117,
    "rewards/margins": 2.1509,
    "rewards/accuracies": 1.0,
    "tokens_per_second": 203.2,
    "grad_norm": 3.5,
}
LONG = "of many words that no terminal of eighty columns has room for in one line, and a path: " + "/a/long/path" * 9
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)[;m]")


class Clock:
    """The time as a test has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("dpo_cli.utils.console.time.monotonic", lambda: self.now)


def until_closed(end: int) -> str:
    """All that comes to one end of a pseudo-terminal until nobody has the other end any more."""
    parts = []
    with suppress(OSError):
        while part := os.read(end, 2**16):
            parts.append(part)
    return b"".join(parts).decode()


def received(end: int) -> str:
    """All that has come to one end of a pseudo-terminal so far."""
    parts = []
    while select.select([end], [], [], 0.05)[0]:
        parts.append(os.read(end, 2**16))
    return b"".join(parts).decode()


def on_terminal(width: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[Reporter], object], **kind: str) -> str:
    """All that comes to a terminal so wide of what a reporter tells."""
    ours, theirs = pty.openpty()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as stream:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        for name, value in ({"TERM": "xterm-256color", "COLUMNS": str(width)} | kind).items():
            patch.setenv(name, value)
        patch.setattr(sys, "stderr", stream)
        action(Reporter())
        stream.flush()
        shown = received(ours)
    os.close(ours)
    return shown


def in_pipe(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[Reporter], object], quiet: bool = False, log_json: bool = False
) -> str:
    """All that a file gets of what a reporter tells."""
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        action(Reporter(quiet, log_json))
    return stream.getvalue()


def lines(shown: str) -> list[str]:
    """What stood on each line at any time, without the codes that move the cursor or colour."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", shown)) if line.strip()]


def train(reporter: Reporter) -> None:
    """Six steps of 24, with a warning among them."""
    with reporter.progress("train", 24, every=2) as progress:
        for step in range(1, 7):
            progress.advance(1, VALUES)
            if step == 3:
                reporter.warning("the disk is nearly full")


# ---- on a terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_bar_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    shown = lines(on_terminal(width, monkeypatch, train))
    assert all(len(line) <= width for line in shown if "warning" not in line)
    assert shown[-1].startswith("train 6/24 ━") and "grad_norm" not in shown[-1]
    if width == 160:
        assert shown[-1].endswith("loss 0.1170  margin 2.1509  accuracy 1.000  203 tok/s")


def test_a_line_beside_the_bar_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that comes past the reporter, by Python's own stderr."""

    def action(reporter: Reporter) -> None:
        with reporter.progress("train", 24) as outer, reporter.progress("held out", 8) as inner:
            inner.advance(4)
            outer.advance(1, VALUES)
            time.sleep(2)  # they are drawn every quarter of a second
            reporter.warning("the disk is nearly full")
            print("from elsewhere", file=sys.stderr)

    shown = lines(on_terminal(80, monkeypatch, action))
    assert "warning: the disk is nearly full" in shown and "from elsewhere" in shown
    assert any(line.startswith("held out 4/8 ━") for line in shown)


def test_the_bar_goes_and_the_cursor_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(80, monkeypatch, train)
    assert shown.endswith("\x1b[2K") and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_the_bar_shows_that_a_signal_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def action(reporter: Reporter) -> None:
        with reporter.progress("train", 24, stopping=lambda: bool(asked)) as progress:
            progress.advance(1, VALUES)
            asked.append(True)

    assert "  stopping" in lines(on_terminal(120, monkeypatch, action))[-1].replace("━ ", "  ")


def test_facts_wrap_at_words_under_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, path = lines(on_terminal(80, monkeypatch, lambda reporter: reporter.info("data", LONG)))
    assert first.startswith("data        of many words") and len(first) <= 80
    assert second.startswith(" " * 12 + "line, and a path:") and path.strip() == "/a/long/path" * 9  # to be copied


def test_no_color_takes_the_colours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COLOUR.search(on_terminal(80, monkeypatch, train))
    shown = on_terminal(80, monkeypatch, train, NO_COLOR="1")
    assert not COLOUR.search(shown) and lines(shown)[-1].startswith("train 6/24 ━")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(80, monkeypatch, train, TERM="dumb")
    assert "\x1b" not in shown and "━" not in shown
    told = lines(shown)
    assert [line.split()[1] for line in told] == ["2/24", "the", "4/24", "6/24"]


# ---- in a pipe --------------------------------------------------------------------------------------------------


def test_a_pipe_gets_whole_lines_without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which many a build server sets
    told = in_pipe(monkeypatch, lambda reporter: (reporter.info("data", LONG), reporter.warning(LONG), train(reporter)))
    assert "\x1b" not in told
    fact, warning, *steps = told.splitlines()
    assert fact == f"data        {LONG}" and warning == f"warning: {LONG}"
    assert len(steps) == 4 and steps[-1].startswith("train 6/24  loss 0.1170  margin 2.1509  accuracy 1.000  203 tok/s")


def test_time_is_told_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may hold an evaluation, or a compilation; silence is broken, too."""
    now = Clock(monkeypatch)

    def action(reporter: Reporter) -> None:
        with reporter.progress("train", 100, every=10) as progress:
            for seconds in (29, 2, 2, 2, 2):
                now.now += seconds
                progress.advance(1)

    assert in_pipe(monkeypatch, action) == "train 2/100  eta 0:03:16\n"


def test_tokens_a_second_are_those_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)

    def action(reporter: Reporter) -> None:
        with reporter.progress("reference", 3000, unit="tok") as progress:
            for seconds in (9, 2, 2):
                now.now += seconds
                progress.advance(1000)

    told = in_pipe(monkeypatch, action).splitlines()
    assert told == [
        f"reference {done}/3,000 tok  500 tok/s  eta 0:00:0{left}" for done, left in (("2,000", 2), ("3,000", 0))
    ]


# ---- quietly, and as JSON ---------------------------------------------------------------------------------------


def all_kinds(reporter: Reporter) -> None:
    reporter.info("data", "24 rows")
    reporter.info("", "the first: 'a\n' | 'b'")
    train(reporter)


def test_quiet_tells_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_pipe(monkeypatch, all_kinds, quiet=True) == "warning: the disk is nearly full\n"
    [told] = in_pipe(monkeypatch, all_kinds, quiet=True, log_json=True).splitlines()
    assert json.loads(told) == {"event": "warning", "text": "the disk is nearly full"}


def test_each_line_of_a_log_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [json.loads(line) for line in in_pipe(monkeypatch, all_kinds, log_json=True).splitlines()]
    assert told[:2] == [
        {"event": "info", "name": "data", "text": "24 rows"},
        {"event": "info", "name": "data", "text": "the first: 'a\n' | 'b'"},  # under the name that it goes on with
    ]
    assert [each["event"] for each in told[2:]] == ["progress", "warning", "progress", "progress"]
    last = told[-1]
    assert last.pop("eta_seconds") >= 0
    assert last == {"event": "progress", "what": "train", "done": 6, "total": 24, "unit": None} | VALUES


def test_a_rank_that_another_speaks_for_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    all_kinds(Reporter(mute=True))
    assert stream.getvalue() == ""


# ---- the command ------------------------------------------------------------------------------------------------


def options(tiny: Path, folder: Path) -> list[str]:
    named = {"--data": SAMPLE / "heldout.jsonl", "--model": tiny, "--cache-dir": folder / "cache"}
    return [str(word) for pair in named.items() for word in pair]


def test_a_training_as_json_or_quietly(tiny: Path, tmp_path: Path) -> None:
    shown = {}
    for flag in ("--log-json", "--quiet"):
        run = ["--max-steps", "2", "--batch-size", "2", "--logging-steps", "1", "--output", str(tmp_path / flag)]
        held_out = ["--eval-fraction", "0.05", "--kl", "none"] if flag == "--log-json" else []
        shown[flag] = CliRunner().invoke(app, ["train", *options(tiny, tmp_path), *run, *held_out, flag, "--json"])
        assert shown[flag].exit_code == 0, shown[flag].output
        assert json.loads(shown[flag].stdout)["steps"] == 2
    assert shown["--quiet"].stderr == ""
    told = [json.loads(line) for line in shown["--log-json"].stderr.splitlines()]
    steps = [each for each in told if each["event"] == "progress" and each["what"] == "train"]
    assert [each["done"] for each in steps] == [1, 2] and all(each["tokens_per_second"] > 0 for each in steps)
    evaluations = [each for each in told if each.get("name") == "held out" and "step" in each]
    assert [each["step"] for each in evaluations] == [0, 2] and evaluations[1]["rewards/margins"] > 0


def test_an_error_is_told_in_the_form_that_was_asked_for() -> None:
    told = CliRunner().invoke(app, ["train", "--data", "x", "--beta", "0", "--quiet"])
    assert told.exit_code == 2 and told.stderr == "error: --beta 0.0: must be greater than 0\n"
    told = CliRunner().invoke(app, ["train", "--data", "x", "--beta", "0", "--log-json"])
    error = {"event": "error", "text": "--beta 0.0: must be greater than 0", "exit_code": 2}
    assert told.exit_code == 2 and json.loads(told.stderr) == error


def test_the_command_on_a_real_terminal(tiny: Path, tmp_path: Path) -> None:
    """Its width is the terminal's own, and the result goes to stdout, which may be a file."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 64))
    environment = cli_environment(tmp_path) | {"TERM": "xterm"}
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "dpo_cli", "precompute-ref", *options(tiny, tmp_path), "--json"]
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    with ThreadPoolExecutor() as pool:  # a terminal holds little that nobody has read, and then its writer waits
        reading = pool.submit(until_closed, ours)
        result = json.loads(process.communicate(timeout=100)[0])
        shown = lines(reading.result())
    os.close(ours)
    assert process.returncode == 0 and result["misses"] == 88
    assert any(line.startswith("reference 0/") and "━━" in line for line in shown)
    assert all(len(line) <= 64 for line in shown if "/" not in line.split()[-1])  # a path is not cut in two


# ---- completion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dpo tr", ["train"]),
        ("dpo train --loss s", ["sigmoid", "sigmoid_norm", "sppo_hard", "sft", "simpo"]),
        ("dpo train --lora-t", ["--lora-type", "--lora-targets"]),
        ("dpo sweep --save-best rewards/a", ["rewards/accuracies"]),
        ("dpo train --data ", []),  # the shell's own: files
    ],
)
def test_a_shell_completes(typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = typed.split(" ")
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_DPO_COMPLETE": "complete_bash"}
    told = CliRunner().invoke(app, [], prog_name="dpo", env=asked)
    assert told.exit_code == 0 and told.stdout.split() == offered


def test_what_a_shell_shows_beside_an_option_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = {"_TYPER_COMPLETE_ARGS": "dpo train --lo", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = os.environ | typed | {"_DPO_COMPLETE": "complete_fish"}
    program = "import sys; sys.argv[0] = 'dpo'; from dpo_cli.cli.app import main; main()"
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert all(line.startswith("--lo") for line in out.stdout.splitlines()) and "--loss\t" in out.stdout
