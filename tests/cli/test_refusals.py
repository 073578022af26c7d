"""What a user gets wrong ends with exit code 2, one message that helps, nothing on stdout and nothing written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import to_yaml
from dpo_cli.data.pairs import Pairs
from dpo_cli.training.prepare import hold_out
from dpo_cli.utils.errors import UsageError, did_you_mean, suggest_path
from tests.helpers import Cli, cli_environment, make_model, random_pairs, write_rows

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
# name: (a line of a file, the reason that is told)
BAD_LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("{'prompt': 'Why?'}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    "no rejected": (json.dumps({"prompt": "Why?", "chosen": "Because."}), "rejected is missing"),
    "empty chosen": (json.dumps(GOOD | {"chosen": ""}), "chosen is empty"),
    "equal": (json.dumps(GOOD | {"rejected": "Because."}), "chosen equals rejected"),
}


def good(number: int) -> str:
    return json.dumps(GOOD | {"prompt": f"Why {number}?"})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [GOOD] * 2)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content; what the libraries below keep for themselves is theirs."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_relative_to(folder / "home") or path.is_relative_to(folder / "home" / ".cache" / "dpo")
    }


def refusal(command: Cli, folder: Path, *arguments: Any) -> str:
    """The message with which a command is refused; all that every refusal has in common is checked."""
    before = listing(folder)
    out = command(*arguments)
    assert out.returncode == 2, out.stderr
    assert out.stdout == ""
    assert "Traceback" not in out.stderr
    assert listing(folder) == before
    return out.stderr


def error_lines(stderr: str) -> list[str]:
    """The message from ``error:`` to the end; there is one."""
    lines = stderr.splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return [lines[start].removeprefix("error: "), *lines[start + 1 :]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--beta", 0), "--beta 0.0: must be greater than 0"),
        (("--beta", "nan"), "--beta nan: must be greater than 0"),
        (("--max-length", 3), "--max-length 3: must be at least 16 tokens"),
        (("--lr-scheduler", "steep"), "--lr-scheduler steep: must be one of: linear, cosine, constant"),
        (("--config", "none.yaml"), "--config none.yaml: cannot be read"),
        (("--resume", "."), "--resume .: no run there"),
        (("--resume", "none"), "--resume none: no run there"),
    ],
)
def test_a_wrong_value_is_refused(arguments: tuple[Any, ...], told: str, dpo: Cli, rows: Path, tmp_path: Path) -> None:
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--data", rows, *arguments))
    assert message.startswith(told)


def test_missing_data_is_refused(dpo: Cli, tmp_path: Path) -> None:
    [message] = error_lines(refusal(dpo, tmp_path, "train"))
    assert message.startswith("--data is missing: ") and "--data pairs.jsonl" in message


def test_an_unknown_option_in_the_file_is_refused_with_its_line_and_the_nearest(dpo: Cli, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: rows.jsonl\nbeta: 0.1\nlearningrate: 1e-6\nbatchsize: 4\n")
    told = error_lines(refusal(dpo, tmp_path, "train", "--config", "run.yaml"))
    assert told[0].startswith("run.yaml:3: unknown option 'learningrate'")
    assert told[1:] == ["run.yaml:4: unknown option 'batchsize'; did you mean 'batch_size'?"]


@pytest.mark.parametrize("command", ["train", "eval", "precompute-ref"])
def test_an_unknown_option_on_the_command_line_is_refused(command: str, dpo: Cli, rows: Path, tmp_path: Path) -> None:
    told = refusal(dpo, tmp_path, command, "--data", rows, "--max-lenght", 64)
    assert "unknown option --max-lenght; did you mean '--max-length'?" in told


def test_a_word_for_a_number_is_refused(dpo: Cli, rows: Path, tmp_path: Path) -> None:
    told = refusal(dpo, tmp_path, "train", "--data", rows, "--epochs", "many")
    assert "--epochs" in told and "integer" in told


def test_a_config_file_beside_resume_is_refused(dpo: Cli, rows: Path, tmp_path: Path) -> None:
    """A run goes on with its own options; another file must not be passed over in silence."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(TrainOptions(data=[str(rows)], model="./none")))
    (tmp_path / "run" / "manifest.json").write_text("{}")
    (tmp_path / "other.yaml").write_text("beta: 0.5\n")
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--resume", "run", "--config", "other.yaml"))
    assert "--resume" in message and "--config" in message


def test_a_missing_file_is_refused(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--model", tiny, "--data", "none.jsonl", "--json"))
    assert message.startswith("--data none.jsonl: no such file")


def test_ten_bad_rows_are_told_in_full_and_the_rest_counted(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    lines, reasons = zip(*(list(BAD_LINES.values()) * 4), strict=True)  # 16, each behind a good one
    (tmp_path / "rows.jsonl").write_text("".join(f"{good(n)}\n{line}\n" for n, line in enumerate(lines)))
    told = error_lines(refusal(dpo, tmp_path, "train", "--model", tiny, "--data", "rows.jsonl"))
    assert told[:10] == [f"rows.jsonl:{2 * n + 2}: {reasons[n]}" for n in range(10)]
    head, _, rest = told[10].partition(": ")
    assert head == "and 6 more"
    assert set(rest.split("; ")) == {f"{count} × {why}" for why, count in Counter(reasons[10:]).items()}
    assert told[11].startswith("16 of 32 rows cannot be used.") and told[11].endswith("--on-bad-row skip")
    assert len(told) == 12


@pytest.mark.parametrize("model", ["{here}/none", "./none", "none/of/these", "none.gguf"])
def test_a_model_that_is_not_there_is_refused(model: str, dpo: Cli, rows: Path, tmp_path: Path) -> None:
    model = model.format(here=tmp_path)
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--model", model, "--data", rows))
    assert message.startswith(f"--model {model}: no such f")


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("command", ["train", "precompute-ref", "eval"])
def test_a_bad_row_is_refused_with_its_place(command: str, name: str, dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    line, told = BAD_LINES[name]
    (tmp_path / "rows.jsonl").write_text(f"{good(1)}\n\n{line}\n{good(2)}\n")
    message = error_lines(refusal(dpo, tmp_path, command, "--model", tiny, "--data", "rows.jsonl"))
    assert message[0] == f"rows.jsonl:3: {told}"
    assert message[1].startswith("1 of 3 rows cannot be used.") and len(message) == 2


def test_bad_held_out_rows_are_refused(dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(BAD_LINES["equal"][0])
    given = ("--model", tiny, "--data", rows, "--eval-data", "held.jsonl")
    assert error_lines(refusal(dpo, tmp_path, "train", *given))[0] == "held.jsonl:1: chosen equals rejected"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", b"", "--data rows.jsonl: has no rows"),
        ("rows.jsonl.gz", b"{}", "--data rows.jsonl.gz: cannot be read"),
        ("rows.parquet", b"{}", "--data rows.parquet: not a readable parquet file"),
        ("rows.txt", b"{}", "--data rows.txt: unknown kind of file"),
    ],
)
def test_a_file_without_rows_is_refused(
    name: str, content: bytes, told: str, dpo: Cli, tiny: Path, tmp_path: Path
) -> None:
    """In one message: no library adds its own."""
    (tmp_path / name).write_bytes(content)
    stderr = refusal(dpo, tmp_path, "train", "--model", tiny, "--data", name)
    [message] = error_lines(stderr)
    assert message.startswith(told)
    before = [] if name == "rows.txt" else ["loading…", "model"]
    assert [line.split()[0] for line in stderr.splitlines()] == [*before, "error:"]


def copy_of(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    return folder


def test_a_model_folder_without_weights_is_refused(dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    model = copy_of(tiny, tmp_path / "m")
    (model / "model.safetensors").unlink()
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--model", "m", "--data", rows))
    assert message.startswith("--model m: the folder has no weights")
    (model / "pytorch_model.bin").write_bytes(b"")  # a pickle is no weights here
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--model", "m", "--data", rows))
    assert message.startswith("--model m: the folder has no weights")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_with_a_broken_file_is_refused(file: str, dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    broken = copy_of(tiny, tmp_path / "m") / file
    broken.write_bytes(broken.read_bytes()[:300])
    message = error_lines(refusal(dpo, tmp_path, "train", "--model", "m", "--data", rows))
    assert message[0].startswith("--model ") and "cannot be loaded" in message[0]


def test_a_folder_that_is_no_model_is_refused(dpo: Cli, rows: Path, tmp_path: Path) -> None:
    for name in (".", "home"):
        (tmp_path / "home").mkdir(exist_ok=True)
        [message] = error_lines(refusal(dpo, tmp_path, "train", "--model", name, "--data", rows))
        assert message.startswith(f"--model {name}: no model there")


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_output_that_exists_is_refused(kind: str, dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        if kind == "folder":
            (output / "metrics.jsonl").write_text("mine")
    given = ("--model", tiny, "--data", rows, "--output", "run")
    [message] = error_lines(refusal(dpo, tmp_path, "train", *given))
    assert message.startswith("--output run: exists") and "--resume run" in message
    [message] = error_lines(refusal(dpo, tmp_path, "train", *given, "--dry-run"))
    assert message.startswith("--output run: exists")


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_scored(
    dpo: Cli, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    given = ("--model", tiny, "--data", rows, "--output", "file/run")
    [message] = error_lines(refusal(dpo, tmp_path, "train", *given))
    assert message.startswith("--output file/run: ")


def test_a_run_without_its_manifest_is_refused(dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(TrainOptions(data=[str(rows)], model=str(tiny))))
    [message] = error_lines(refusal(dpo, tmp_path, "train", "--resume", "run"))
    assert message == "--resume run: no run there (manifest.json is missing)"


def test_holding_out_every_pair_is_refused(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [GOOD])
    given = ("--model", tiny, "--data", "rows.jsonl", "--eval-fraction", 0.5)
    [message] = error_lines(refusal(dpo, tmp_path, "train", *given))
    assert message == "--eval-fraction 0.5: leaves no pair of 1 to train on"


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    pairs = [dataclasses.replace(pair, prompt=pair.prompt % 7) for pair in random_pairs(100, longest=2)]
    training, held_out = hold_out(Pairs(pairs), 0.2, seed=1)
    asked, asked_again = ({pair.prompt.tobytes() for pair in side} for side in (training, held_out))
    assert not asked & asked_again and 10 <= len(held_out) <= 20
    assert sorted(pair.where for side in (training, held_out) for pair in side) == sorted(pair.where for pair in pairs)
    one = Pairs([dataclasses.replace(pair, prompt=pairs[0].prompt) for pair in pairs])
    with pytest.raises(UsageError, match="leaves no pair of 100 to train on; pairs of one prompt stay together"):
        hold_out(one, 0.2, seed=1)


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_cli", "losses"]
    with subprocess.Popen(
        command, env=cli_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_without_a_reader_of_stderr_the_result_is_still_told(tiny: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo_cli", "check", "--model", str(tiny), "--data", str(rows), "--json"]
    with subprocess.Popen(
        command, env=cli_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stderr.close()
        assert json.loads(process.stdout.read())["rows"] == 2 and process.wait() == 0


# ---- going on without bad rows ----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four good rows, the four bad ones, one whose difference truncation removes, one with a number that is too big."""
    same = "you " * 100
    lost = json.dumps({"prompt": "Why?", "chosen": same + "yes", "rejected": same + "no"})
    lines = [good(1), *(line for line, _ in BAD_LINES.values()), good(2), lost, good(3), good(4)]
    lines.append('{"prompt": "Why?", "chosen": 1e999, "rejected": "No idea."}')
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines))
    return path


REFUSED = [
    *((f"mixed.jsonl:{n}", why) for n, (_, why) in enumerate(BAD_LINES.values(), 2)),
    ("mixed.jsonl:7", "truncation to max_length 32 removes the difference between chosen and rejected"),
    ("mixed.jsonl:10", "chosen is a number; it must be a string or a list of messages"),
]


def test_skip_goes_on_and_counts(dpo: Cli, tiny: Path, mixed: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    given = ("--model", tiny, "--data", "mixed.jsonl", "--max-length", 32, "--on-bad-row", "skip")
    out = dpo("train", *given, "--dry-run", "--json")
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["pairs"] == 4
    assert "mixed.jsonl: 10 rows, 4 pairs, 6 refused" in out.stderr
    assert listing(tmp_path) == before  # nor does a dry run write anything
    out = dpo("precompute-ref", *given, "--json")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["pairs"] == 4 and "10 rows, 4 pairs, 6 refused" in out.stderr
    assert result["rows"] == result["pairs"] + sum(result["refused"].values()) == 10
    for reason, count in result["refused"].items():
        assert f"{count} refused: {reason}" in out.stderr


def test_a_tokenizer_of_another_model_is_refused(dpo: Cli, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """It gives tokens that the model has no embedding for."""
    make_model(vocab_size=100).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "small")
    out = dpo("precompute-ref", "--model", "small", "--data", rows)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert re.search(r"gives the token \d+ and the model knows 100", out.stderr)


def test_skip_is_refused_when_no_pair_is_left(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(line for line, _ in BAD_LINES.values()))
    given = ("--model", tiny, "--data", "rows.jsonl", "--on-bad-row", "skip")
    message = error_lines(refusal(dpo, tmp_path, "train", *given))
    assert message[:4] == [f"rows.jsonl:{n}: {why}" for n, (_, why) in enumerate(BAD_LINES.values(), 1)]
    assert message[4].startswith("4 of 4 rows cannot be used.")


def test_a_run_keeps_the_rows_that_it_refused(dpo: Cli, tiny: Path, mixed: Path, tmp_path: Path) -> None:
    out = dpo(
        "train", "--model", tiny, "--data", mixed.name, "--eval-data", mixed.name, "--max-length", 32,
        "--on-bad-row", "skip", "--batch-size", 2, "--max-steps", 1, "--output", "run", "--json",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    lines = (tmp_path / "run" / "refused.jsonl").read_text().splitlines()
    assert not any("Infinity" in line for line in lines)  # which is no JSON
    refused = [json.loads(line) for line in lines]
    assert [(line["where"], line["reason"]) for line in refused] == REFUSED * 2  # of the data and of the held out rows
    data = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]
    result = json.loads(out.stdout)
    assert data["pairs"] == result["pairs"] == 4 and result["held_out"] == 4
    assert out.stderr.count("mixed.jsonl: 10 rows, 4 pairs, 6 refused") == 2
    assert data["pairs"] + result["held_out"] + data["refused"] == 20  # rows in = used + refused
    assert refused[1]["row"] == json.loads(BAD_LINES["no rejected"][0])


# ---- the nearest name -------------------------------------------------------------------------------------------


def test_the_nearest_word() -> None:
    assert did_you_mean("sigmod", ["hinge", "sigmoid", "sigmoid_norm"]) == "; did you mean 'sigmoid'?"
    assert did_you_mean("xyz", ["hinge", "sigmoid"]) == "" == did_you_mean("xyz", [])


def test_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert suggest_path(tmp_path / "piars.jsonl") == f"; did you mean '{tmp_path / 'pairs.jsonl'}'?"
    assert suggest_path(tmp_path / "pairs.json") == f"; did you mean '{tmp_path / 'pairs.jsonl'}'?"
    assert suggest_path(tmp_path / "nothere.jsonl") == "", "the suffix alone is no likeness"
    assert suggest_path(tmp_path / "pairs.jsonl") == ""  # it is there
    assert suggest_path(tmp_path / "none" / "pairs.jsonl") == "" == suggest_path(Path("a\0b"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with pairs, a run's folder and a file of options."""
    row = {"question": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("data: pairs.jsonl\n")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "'train'"),
        ("train --bta 1", "--beta"),
        ("train --data piars.jsonl --model {tiny}", "'pairs.jsonl'"),
        ("train --data pairs.jsonl --loss sigmod", "'sigmoid'"),
        ("train --data pairs.jsonl --loss sigmod=1,sft=0.2", "'sigmoid'"),
        ("train --data pairs.jsonl --format alpacca", "'alpaca'"),
        ("train --data pairs.jsonl --memory splitt", "'split'"),
        ("train --data pairs.jsonl --lr-scheduler cosinus", "'cosine'"),
        ("train --data pairs.jsonl --f-divergence js_divergense", "'js_divergence'"),
        ("train --data pairs.jsonl --columns promt=question --model {tiny}", "'prompt'"),
        ("train --data pairs.jsonl --columns prompt=qestion --model {tiny}", "'question'"),
        ("train --data pairs.jsonl --model ./runs/frist", "'runs/first'"),
        ("train --resume runs/frist", "'runs/first'"),
        ("train --config rnu.yaml", "'run.yaml'"),
    ],
)
def test_a_command_tells_it(typed: str, meant: str, place: Path, dpo: Cli, tiny: Path) -> None:
    told = dpo(*typed.format(tiny=tiny).split())
    assert told.returncode == 2 and meant in told.stderr, told.stderr
    assert "did you mean" in told.stderr.lower() or "Possible options" in told.stderr


def test_a_run_is_named_by_model(place: Path, dpo: Cli) -> None:
    (place / "runs" / "first" / "model").mkdir()
    assert "did you mean --model runs/first?" in dpo("eval", "runs/first", "--data", "pairs.jsonl").stderr


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train --data pairs.jsonl --lr abc", "error: Invalid value for '--lr': Input should be a valid number; see "),
        ("train --data pairs.jsonl --lr abc", " train --help\n"),
        ("train --eval-fraction", "error: Option '--eval-fraction' requires an argument\n"),
        ("--verzion", "error: unknown option --verzion; did you mean '--version'?\n"),
        ("tran", "error: No such command 'tran'. Did you mean 'train'?\n"),
        ("sweep a.jsonl b.jsonl", "(a.jsonl b.jsonl); did you mean --data a.jsonl --data b.jsonl?\n"),
        ("losses simpo extra", "unexpected extra argument(s) (extra); see "),
        ("chat", "error: Missing argument 'RUN'; see "),
        ("init --from other.yaml", "error: --from other.yaml: cannot be read (No such file or directory)\n"),
    ],
)
def test_a_wrong_command_line_is_one_message(typed: str, message: str, place: Path, dpo: Cli) -> None:
    told = dpo(*typed.split())
    assert told.returncode == 2 and message in told.stderr and told.stderr.count("\n") == 1, told.stderr


def test_a_run_that_was_stopped_is_resumed_or_a_checkpoint_named(place: Path, dpo: Cli) -> None:
    run = place / "runs" / "stopped"
    run.mkdir(parents=True)
    for name in ("manifest.json", "config.yaml"):
        (run / name).write_text("{}")
    resume = "error: --model runs/stopped: the run is not complete; resume it: dpo train --resume runs/stopped"
    arguments = ("eval", "--data", "pairs.jsonl", "--model", "runs/stopped")
    assert dpo(*arguments).stderr == f"{resume}, or name one of its checkpoints/\n"


def test_what_lies_below_runs_is_never_looked_up_on_the_hub(
    place: Path, dpo: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    told = dpo("train", "--data", "pairs.jsonl", "--model", "runs/frist")
    assert told.returncode == 2
    assert told.stderr == "error: --model runs/frist: no such folder; did you mean 'runs/first'?\n"
