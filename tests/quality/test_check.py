"""Planted defects are found where they are, and next to nothing else; the command around it."""

from __future__ import annotations

import gzip
import json
import math
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import CheckOptions
from dpo_cli.data.rows import Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.quality.check import (
    PROBLEMS,
    TITLES,
    DataCheck,
    as_text,
    hashes,
    length_bias,
    row_issues,
    run_check,
)
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError, printable
from tests.helpers import SAMPLE, write_rows
from tests.helpers.clean import CLEAN, clean_rows
from tests.helpers.planted import Record, get, plant, put

EACH, SEEDS = 20, 5  # defects of every kind in one file; files
ALL = 10**6


def here(*arguments: Any) -> Any:
    """Run the command in this process, which has its imports behind it."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)


def check(model: Path, *data: Path, **options: Any) -> dict[str, Any]:
    given = {"model": str(model), "data": [str(each) for each in data], "examples": ALL} | options
    return run_check(CheckOptions(**given), Reporter(quiet=True))


def places(result: dict[str, Any]) -> dict[str, set[int]]:
    """Rows of one file with a finding, counted from 0, by kind."""
    out: dict[str, set[int]] = {}
    for finding in result["findings"]:
        found = {int(example["where"].partition(" (id ")[0].rpartition(":")[2]) - 1 for example in finding["examples"]}
        assert len(found) == finding["count"] or finding["kind"] == "length_bias"
        out.setdefault(finding["kind"], set()).update(found)
    return out


def read_records(name: str) -> list[Record]:
    return [json.loads(line) for line in (SAMPLE / name).read_text().splitlines()]


def prompt(text: str, chosen: str, rejected: str) -> Record:
    return {"prompt": text, "chosen": chosen, "rejected": rejected}


# ---- planted defects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl", "train-strings.jsonl", "heldout.jsonl"])
def test_the_sample_data_has_no_problem(tiny: Path, name: str) -> None:
    result = check(tiny, SAMPLE / name)
    assert result["problems"] == result["problem_rows"] == 0
    assert set(places(result)) <= {"length_bias"}
    assert as_text(result).splitlines()[-2] == f"no problems found in {result['rows']} rows"


@pytest.mark.parametrize("messages", [False, True])
def test_what_looks_like_a_defect_is_none(tiny: Path, tmp_path: Path, messages: bool) -> None:
    rows = clean_rows(messages)
    found = places(check(tiny, write_rows(tmp_path / "rows.jsonl", rows)))
    wrong = {kind: [CLEAN[place] for place in at] for kind, at in found.items() if kind in PROBLEMS}
    assert len(rows) > 50 and not wrong
    assert set(found) <= {"control_tokens", "other", "length_bias"}


@pytest.mark.parametrize("name", ["train.jsonl", "train-strings.jsonl"])
def test_planted_defects_are_found_and_nothing_else(tiny: Path, tmp_path: Path, name: str) -> None:
    planted_rows, hits, false = Counter[str](), Counter[str](), Counter[str]()
    rows = 0
    for seed in range(SEEDS):
        planted = plant(read_records(name), seed, EACH)
        result = check(tiny, write_rows(tmp_path / "rows.jsonl", planted.rows))
        found = places(result)
        rows += len(planted.rows)
        for kind in planted.at:
            planted_rows[kind] += len(planted.at[kind])
            hits[kind] += len(planted.at[kind] & found.get(kind, set()))
        planted.at["control_tokens"] = found.get("control_tokens", set()) & planted.at["markers"]
        for kind in found:
            false[kind] += len(found[kind] - planted.at.get(kind, set()))
    assert min(planted_rows.values()) >= 100
    missed = {kind: f"{hits[kind]} of {count}" for kind, count in planted_rows.items() if hits[kind] < 0.99 * count}
    assert not missed
    assert not {kind: count for kind, count in false.items() if count >= 0.01 * rows and kind != "length_bias"}


def test_planted_leaks_are_found_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    planted_rows, hits, false = Counter[str](), Counter[str](), Counter[str]()
    for seed in range(3):
        planted = plant(read_records("train.jsonl"), seed, 40, leak=True)
        held_out = write_rows(tmp_path / "held.jsonl", planted.held_out + read_records("heldout.jsonl"))
        data = write_rows(tmp_path / "rows.jsonl", planted.rows)
        found = places(check(tiny, data, eval_data=[str(held_out)]))
        for kind in planted.at:
            planted_rows[kind] += len(planted.at[kind])
            hits[kind] += len(planted.at[kind] & found.get(kind, set()))
            false[kind] += len(found.get(kind, set()) - planted.at[kind])
        assert set(found) <= {*planted.at, "length_bias"}
    assert all(hits[kind] >= 0.99 * count for kind, count in planted_rows.items()), hits
    assert sum(false.values()) < 0.01 * 3 * 328


def test_what_is_cut_is_noted(tiny: Path, tmp_path: Path) -> None:
    rows = [prompt("Why? " * 5, "a " * 60, "b " * 60), prompt("Long. " * 60, "yes it is", "no it is not")]
    found = places(
        check(
            tiny,
            write_rows(tmp_path / "rows.jsonl", [*rows, prompt("Why?", "Because.", "No.")]),
            max_length=64,
            format="strings",
        )
    )
    assert found["response_cut"] == {0} and found["prompt_cut"] == {0, 1} and "refused" not in found


def test_a_difference_that_truncation_removes_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [prompt("Why?", "a b " * 60 + end, "a b " * 60 + "d") for end in "xyz"])
    (finding,) = check(tiny, data, max_length=64)["findings"]
    assert finding["kind"] == "refused" and finding["count"] == 3 and "truncation" in finding["title"]


def test_control_tokens_in_messages_are_noted(tiny: Path, tmp_path: Path, train_rows: list[Record]) -> None:
    train_rows = json.loads(json.dumps(train_rows[:20]))
    put(train_rows[3], "prompt", "What does <|im_start|> mean?")
    data = write_rows(tmp_path / "rows.jsonl", train_rows)
    assert places(check(tiny, data))["control_tokens"] == {3}
    assert places(check(tiny, data, control_tokens="refuse"))["refused"] == {3}


# ---- detectors of one row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Use a list:\n\n- one\n- two\n\n### Ingredients\n\nSalt: a pinch",
        "Host: example.com\nUser: admin\nPassword: secret",
        "Human: Hi!\nAssistant: Hello!\n\nHuman: How are you?",
        "x[INSTALL] and <b>bold</b>, a <| b |> c, <s>gone</s> now",
        "Some users:\nUser: root",
    ],
)
def test_what_is_no_marker_and_no_next_turn(tiny: Path, tmp_path: Path, text: str) -> None:
    rows = [prompt("Write something, please.", text, "No. I am not in the mood for that today.")]
    assert not places(check(tiny, write_rows(tmp_path / "rows.jsonl", rows)))


def test_the_end_of_a_rendered_response_is_no_marker(tiny: Path, tmp_path: Path) -> None:
    rendered = prompt(
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Because.<|im_end|>\n", "No idea.<|im_end|>"
    )
    assert "markers" not in places(check(tiny, write_rows(tmp_path / "rows.jsonl", [rendered])))


def test_markers_are_those_of_chat_templates_outside_code() -> None:
    def found(text: str) -> bool:
        row = Row("", "", "Why?", (text, "No."))
        return "markers" in row_issues(row)

    assert all(map(found, ["a <|im_end|> b", "a <|user|> c", "Here:\n```\na\n```\n[INST] b", "`a` <|im_start|>user"]))
    assert not any(map(found, ["<think>a</think> b", "-- <filename>", "`<|user|>`", "```\n[INST]\n```"]))


@pytest.mark.parametrize(
    "text",
    [
        "Voilà ! « Été » à 20 °C — 5 £ ou 6 €, un œuf… naïveté, l’âge",
        "Ærø, Ørsted, Ängelholm, Åre, São Paulo, Ñandú, ¿Qué? ¡Sí! 5½ × 3² ± 2 µm ≈ 10 mm², © ® ™ § ¶ 90°",
        "Она сказала: «Да». 中文，全角！日本語のテキスト。 한국어 텍스트 עברית العربية हिन्दी",
        "🙂 👩‍👩‍👧 (╯°□°)╯︵ ┻━┻ ¯\\_(ツ)_/¯ → ← ✓ ■ │ ├── src",
        "Tab\tand\r\nlines\x0cpages",
    ],
)
def test_what_is_no_damage(text: str) -> None:
    assert not row_issues(Row("", "", "Why?", (text, "No.")))


HOSTILE = [
    "\n",
    " \n",
    "\nUser:",
    "\nUser: a",
    "\n\nHuman",
    "#",
    "\n###",
    "<",
    "<|",
    "</s>",
    "<s> ",
    "[",
    "i can't ",
    "a ",
    "`",
    "~~~",
    "\n\nHuman: ",
    "\nUser: \n",
    "\nA:",
    "; ",
    "é",
    "Ã",
    "©Â",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_no_time(piece: str) -> None:
    text = piece * (2_000_000 // len(piece))
    row = Row("", "", "Why?", (f"x{text}", f"x{text}y"))
    began = time.process_time()
    row_issues(row)
    hashes(row)
    assert time.process_time() - began < 5


# ---- lengths ----------------------------------------------------------------------------------------------------


def test_length_bias_by_hand() -> None:
    bias = length_bias(np.array([[10, 6], [8, 6], [9, 6], [5, 6], [6, 6]], np.int32))
    assert (bias["longer_chosen"], bias["shorter_chosen"], bias["ties"], bias["share"]) == (3, 1, 1, 0.75)
    assert bias["accuracy_prefer_longer"] == pytest.approx(0.7)
    assert bias["accuracy_prefer_shorter"] == pytest.approx(0.3)


@pytest.mark.parametrize(("longer", "said"), [(80, "the longer"), (20, "the shorter"), (60, None), (50, None)])
def test_length_that_tells_is_noted(tiny: Path, tmp_path: Path, longer: int, said: str | None) -> None:
    rows = []
    for number in range(200):
        texts = [f"That is the number {number}.", f"That is the number {number}, and many like it more than others."]
        rows.append(prompt(f"What is {number}?", *(texts[::-1] if number % 100 < longer else texts)))
    result = check(tiny, write_rows(tmp_path / "rows.jsonl", rows))
    found = [finding for finding in result["findings"] if finding["kind"] == "length_bias"]
    assert [(f["severity"], f["count"]) for f in found] == ([("note", 160)] if said else [])
    assert all(said in finding["title"] for finding in found)  # type: ignore[operator]
    assert result["length_bias"]["accuracy_prefer_longer"] == longer / 100


# ---- the command ------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_everything(tiny: Path, tmp_path: Path) -> None:
    rows = plant(read_records("train.jsonl"), 0, 5).rows
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = here(
        "check", "--model", tiny, "--data", data, "--eval-data", SAMPLE / "heldout.jsonl", "--json", "--examples", 2
    )
    assert out.returncode == 3, out.stderr  # rows that dpo train refuses
    result = json.loads(out.stdout)
    assert result["rows"] == len(rows) and result["pairs"] == len(rows) - 5
    assert set(result) == {
        "rows", "pairs", "formats", "problems", "problem_rows", "findings", "length_bias", "next",
    }  # fmt: skip
    assert result["problems"] == sum(finding["severity"] == "problem" for finding in result["findings"])
    for finding in result["findings"]:
        assert set(finding) == {"kind", "severity", "title", "count", "share", "examples"}
        assert finding["share"] == pytest.approx(finding["count"] / len(rows))
        assert finding["kind"] == "length_bias" or len(finding["examples"]) == min(2, finding["count"])
        for example in finding["examples"]:
            assert set(example) <= {"where", "text", "other"} and example["where"].startswith(str(data))


def test_strict_fails_on_problems_only(tiny: Path, tmp_path: Path) -> None:
    clean = here("check", "--model", tiny, "--data", SAMPLE / "train.jsonl", "--strict")
    assert clean.returncode == 0, clean.stderr
    follows = f"Next: dpo train --model {tiny} --data {SAMPLE / 'train.jsonl'} --eval-fraction 0.1"
    follows += " --batch-size 8 --lr 2e-05"  # for a few hundred pairs
    assert clean.stdout.splitlines()[-2:] == ["no problems found in 328 rows", follows]
    records = read_records("train.jsonl")
    data = write_rows(tmp_path / "rows.jsonl", [*records, records[7]])
    strict, plain = (here("check", "--model", tiny, "--data", data, *flags) for flags in (["--strict"], []))
    assert (strict.returncode, plain.returncode) == (3, 0)
    assert strict.stdout == plain.stdout
    options = ("--max-length", 512, "--pairs", "all", "--seed", 3)
    assert here("check", "--model", tiny, "--data", SAMPLE / "train.jsonl", *options).stdout.splitlines()[-1] == (
        f"Next: dpo train --model {tiny} --data {SAMPLE / 'train.jsonl'} --max-length 512 --pairs all --seed 3 "
        "--eval-fraction 0.1 --batch-size 8 --lr 2e-05"
    )
    assert strict.stdout.splitlines()[-2:] == [
        "problems: 1, in 1 of 329 rows", f"Next: dpo check --model {tiny} --data {data} --fix clean.jsonl"
    ]  # fmt: skip
    assert f"{data}:329 (see {data}:8): " in strict.stdout
    note = [
        *records,
        {**records[7], "chosen": [{"role": "assistant", "content": "..."}]},
    ]
    assert here("check", "--model", tiny, "--data", write_rows(data, note), "--strict").returncode == 0


def test_what_is_fixed_is_clean_and_else_as_it_was(tiny: Path, tmp_path: Path) -> None:
    for seed in range(3):
        planted = plant(read_records("train.jsonl"), seed, EACH)
        data, fixed = write_rows(tmp_path / f"rows{seed}.jsonl", planted.rows), tmp_path / f"fixed{seed}.jsonl"
        for number, row in enumerate(planted.rows):
            row["id"] = f"row {number} é"
        write_rows(data, planted.rows)
        before = data.read_bytes()
        result = check(tiny, data, fix=fixed)
        assert data.read_bytes() == before
        bad = set().union(*(found for kind, found in places(result).items() if kind in PROBLEMS))
        left = [row for number, row in enumerate(planted.rows) if number not in bad]
        kept = [json.loads(line) for line in fixed.read_text().splitlines()]
        assert kept == left and [list(row) for row in kept] == [list(row) for row in left]
        assert result["fixed"]["kept"] == len(kept)
        assert len(kept) + sum(result["fixed"]["dropped"].values()) == len(planted.rows)
        again = check(tiny, fixed)
        assert not again["problems"]
        with pytest.raises(UsageError, match="already exists"):
            check(tiny, data, fix=fixed)


def test_fix_takes_leaked_rows_out_of_the_training_file(tiny: Path, tmp_path: Path) -> None:
    records, fixed = read_records("train.jsonl"), tmp_path / "fixed.jsonl"
    data, held_out = (write_rows(tmp_path / f"{n}.jsonl", r) for n, r in (("rows", records), ("held", records[:9])))
    result = check(tiny, data, eval_data=[str(held_out)], fix=fixed)
    assert result["fixed"]["dropped"] == {"leak_row": 9}
    assert not check(tiny, fixed, eval_data=[str(held_out)])["problems"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_of_tables_are_fixed(tiny: Path, tmp_path: Path, kind: str) -> None:
    records = read_records("train-strings.jsonl")[:9]
    frame = Dataset.from_list([*records, records[2]])
    data, fixed = tmp_path / f"rows.{kind}", tmp_path / "fixed.jsonl"
    getattr(frame, f"to_{kind}")(data)
    assert check(tiny, data, fix=fixed)["fixed"] == {"file": str(fixed), "kept": 9, "dropped": {"duplicate": 1}}
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == records


def test_of_copies_the_one_stays_that_is_clean(tiny: Path, tmp_path: Path) -> None:
    good = prompt("Which is it?", "The left one, I think.", "The right one.")
    bad = {**good, "chosen": "The left\x1cone, I think."}  # a space to Python, and damage to a reader
    other = prompt("And who?", "Nobody that I know of.", "Somebody else.")
    data, fixed = write_rows(tmp_path / "rows.jsonl", [bad, good, other, good]), tmp_path / "fixed.jsonl"
    result = check(tiny, data, fix=fixed)
    assert places(result) == {"encoding": {0}, "duplicate": {3}}
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == [good, other]


def test_other_tools_make_another_prompt(tiny: Path, tmp_path: Path) -> None:
    def row(tool: str, chosen: str, rejected: str) -> Record:
        answers = {"chosen": [{"role": "assistant", "content": chosen}]}
        answers["rejected"] = [{"role": "assistant", "content": rejected}]
        return {"prompt": [{"role": "user", "content": "Weather?"}], "tools": [{"name": tool}], **answers}

    rows = [row("a", "It rains.", "I cannot see."), row("b", "It rains.", "I cannot see.")]
    rows += [row("c", "I cannot see.", "It rains."), row("a", "It rains.", "I cannot see.")]
    found = places(check(tiny, write_rows(tmp_path / "rows.jsonl", rows)))
    assert found["duplicate"] == {3} and "contradiction" not in found


def test_what_json_has_not_is_null_or_true(tiny: Path, tmp_path: Path) -> None:
    records = read_records("train-strings.jsonl")[:2]
    data, fixed = tmp_path / "rows.parquet", tmp_path / "fixed.jsonl"
    more = [{"x": math.nan, "y": [math.inf, 1.0]}, {"x": 0.5, "y": []}]
    Dataset.from_list([record | each for record, each in zip(records, more, strict=True)]).to_parquet(data)
    assert check(tiny, data, fix=fixed)["fixed"]["kept"] == 2
    lines = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert [(line["x"], line["y"]) for line in lines] == [(None, [None, 1.0]), (0.5, [])]
    fixed.unlink()
    Dataset.from_list([record | {"raw": b"\x00"} for record in records]).to_parquet(data)
    check(tiny, data, fix=fixed)
    assert [json.loads(line)["raw"] for line in fixed.read_text().splitlines()] == [True, True]


def test_lengths_count_what_carries_loss(tiny: Path, tmp_path: Path) -> None:
    def turn(role: str, text: str) -> Record:
        return {"role": role, "content": text}

    answers = [turn("assistant", "look it up " * 9), turn("tool", "12:00 " * 40), turn("assistant", "Noon.")]
    row = {"prompt": [turn("user", "When?")], "chosen": answers, "rejected": [turn("assistant", "I do not know that.")]}
    result = check(tiny, write_rows(tmp_path / "rows.jsonl", [row]))
    assert result["length_bias"]["shorter_chosen"] == 1


def test_the_documentation_has_every_kind() -> None:
    table = (SAMPLE.parent / "docs" / "data.md").read_text()
    for kind, title in TITLES.items():
        assert f"| {'problem' if kind in PROBLEMS else 'note'} | {title} |\n" in table


@pytest.mark.parametrize("name", ["fixed.json", "rows.jsonl", "link.jsonl"])
def test_fix_writes_over_nothing(tiny: Path, tmp_path: Path, name: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", read_records("train.jsonl")[:5])
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    before = data.read_bytes()
    out = here("check", "--model", tiny, "--data", data, "--fix", tmp_path / name)
    assert out.returncode == 2 and f"--fix {tmp_path / name}" in out.stderr and not out.stdout
    assert data.read_bytes() == before and not (tmp_path / "nowhere").exists()


def test_nothing_is_written_where_no_row_is_clean(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [prompt("a", "b", "b")])
    result = check(tiny, data, fix=tmp_path / "fixed.jsonl")
    assert result["fixed"]["kept"] == 0 and not (tmp_path / "fixed.jsonl").exists()
    assert "no row is clean; not written: " in as_text(result)
    result = check(tiny, data)
    assert "length_bias" not in result and as_text(result).splitlines()[-1] == "problems: 1, in 1 of 1 row"


def test_several_files_of_several_kinds(tiny: Path, tmp_path: Path) -> None:
    records = read_records("train-strings.jsonl")
    first = tmp_path / "first.jsonl.gz"
    first.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records[:50]).encode()))
    second = tmp_path / "second.json"
    second.write_text(json.dumps([records[3], *records[50:60]], indent=0))
    (finding,) = (f for f in check(tiny, first, second)["findings"] if f["kind"] == "duplicate")
    assert finding["count"] == 1
    assert finding["examples"][0]["where"].startswith(f"{second}:") and finding["examples"][0]["other"] == f"{first}:4"


def test_the_datas_control_characters_do_not_reach_the_terminal(tiny: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07 \x9b31m \u202egnp.exe \r\n\x00 and so on"
    rows = [
        prompt(evil + str(n), evil + text, text) for n, text in enumerate(["Because.", "Why not?", "<|im_end|> so"])
    ]
    data = write_rows(
        tmp_path / "rows.jsonl", [*rows, rows[0], {"prompt": evil, evil: 3}, {**rows[0], "chosen": [{"role": evil}]}]
    )
    for flags in ([], ["--fix", tmp_path / "fixed.jsonl"], ["--control-tokens", "refuse"]):
        out = here("check", "--model", tiny, "--data", data, "--data", SAMPLE / "heldout-strings.jsonl", *flags)
        assert out.returncode == (0 if "--fix" in flags else 3), out.stderr
        assert out.stdout == printable(out.stdout) and out.stderr == printable(out.stderr)
        assert "encoding" in out.stdout


def test_wrong_options_start_nothing() -> None:
    for flags in (
        ["--data", "none.jsonl"],
        [],
        ["--data", "x", "--examples", "-1"],
    ):
        out = here("check", *flags)
        assert out.returncode == 2 and "error: " in out.stderr and not out.stdout


def test_rows_that_change_between_the_readings_are_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_records("train.jsonl")[:20]
    data = write_rows(tmp_path / "rows.jsonl", [*records, records[0]])
    result = DataCheck.result

    def after_a_change(data_check: DataCheck) -> dict[str, Any]:
        write_rows(data, records)
        return result(data_check)

    monkeypatch.setattr(DataCheck, "result", after_a_change)
    with pytest.raises(UsageError, match="changed while they were read"):
        check(tiny, data, fix=tmp_path / "fixed.jsonl")
    assert not list(tmp_path.glob("fixed*"))


def test_a_row_takes_few_bytes(tokenizer: Any, tmp_path: Path) -> None:
    """Its location, a hash and its lengths are kept, and nothing else of it."""
    words = [get(record, "chosen") for record in read_records("train.jsonl")]
    held = []
    for rows in (300, 1300):
        with (tmp_path / "rows.jsonl").open("w") as stream:
            for n in range(rows):
                row = prompt(f"{n}: {words[n % 328]}", f"{n} {words[n % 41]}", f"{words[n % 37]} {n}")
                stream.write(json.dumps(row) + "\n")
        data_check = DataCheck(Encoder(tokenizer), 3)
        rows_read = read_rows(find_sources([str(tmp_path / "rows.jsonl")]))
        tracemalloc.start()
        data_check.read(rows_read)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert (held[1] - held[0]) / 1000 < 500
