"""The benchmark against TRL runs, both sides compute the same, and what goes wrong is told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import swift
from benchmarks.trl import bench
from benchmarks.trl.bench import main, take_turns
from benchmarks.trl.cases import CASES, Lengths, draw_lengths, synthetic_rows
from benchmarks.trl.meter import KILLED, Worker, WorkerDiedError
from benchmarks.trl.shapes import Arithmetic
from dpo_cli.data.rows import read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.utils.errors import UsageError
from tests.helpers import ROOT, random_pairs, write_rows

SMALL = ("--shape", "tiny", "--device", "cpu", "--case", "hh", "--rounds", "1", "--pairs", "2", "--batch-size", "2")
# A worker that reads its job, says that it is ready, and dies of its first phase.
DIES = 'import os, sys; input(); print(\'{"ready": true, "ids": []}\', flush=True); input(); os.kill(os.getpid(), 9)'


def results(file: Path) -> dict[str, Any]:
    (result,) = json.loads(file.read_text())["results"]
    return {line["phase"]: line for line in result["lines"]} | {"result": result}


# ---- lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_lengths_have_the_published_statistics(name: str) -> None:
    case = CASES[name]
    lengths = np.array(draw_lengths(case, 4000, longest=100_000))
    prompt, chosen, rejected = lengths.T
    assert np.median(prompt + chosen) == pytest.approx(case.median, rel=0.04)
    assert np.median(prompt + rejected) == pytest.approx(case.median, rel=0.04)
    assert np.median(prompt) / np.median(chosen) == pytest.approx(case.ratio, rel=0.08)
    if case.sigma:
        assert np.log(chosen).std() == pytest.approx(case.sigma, rel=0.05)
        assert abs(np.corrcoef(chosen, rejected)[0, 1]) < 0.05
    else:
        assert set(chosen) == set(rejected) == {128}


def test_lengths_are_seeded_and_bounded() -> None:
    case = CASES["capybara"]
    assert draw_lengths(case, 9, 4096, seed=1) == draw_lengths(case, 9, 4096, seed=1) != draw_lengths(case, 9, 4096)
    bounded = draw_lengths(case, 200, longest=1024)
    assert max(p + max(c, r) for p, c, r in bounded) <= 1026  # each of two parts is rounded
    assert [b for b, a in zip(bounded, draw_lengths(case, 200, 99_999), strict=True) if b != a]


def test_text_has_the_drawn_lengths(tokenizer: Any) -> None:
    rows = synthetic_rows(Lengths(2.0, 240), 40, tokenizer, longest=4096)
    for row, drawn in zip(rows, draw_lengths(Lengths(2.0, 240), 40, 4096), strict=True):
        counted = [len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected")]
        assert counted == pytest.approx([drawn[0], drawn[1] - 1, drawn[2] - 1], abs=3)


def test_rows_of_an_agent_begin_with_one_system_prompt(tokenizer: Any) -> None:
    case = Lengths(1.0, 100, system=80)
    rows = [tokenizer(row["prompt"]).input_ids for row in synthetic_rows(case, 12, tokenizer, longest=4096)]
    assert all(ids[:75] == rows[0][:75] for ids in rows) and len({tuple(ids) for ids in rows}) == 12
    plain = synthetic_rows(Lengths(1.0, 100), 12, tokenizer, longest=4096)
    assert np.mean([len(ids) for ids in rows]) == pytest.approx(
        80 + np.mean([len(tokenizer(row["prompt"]).input_ids) for row in plain]), rel=0.1
    )


def test_arithmetic_by_hand(tiny: Path) -> None:
    """The tiny llama: 2 layers of width 32, 4 heads of 8, 2 of keys and values, 64 wide inside, 384 tokens."""
    (pair,) = random_pairs(1, seed=3)
    p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    scores = sum(range(1, p + c + 1)) + sum(range(p + 1, p + r + 1))
    forward = 2 * body * (p + c + r) + 2 * 384 * 32 * (c + r) + 4 * 2 * 32 * scores
    assert Arithmetic.of(tiny).flops([pair], backward=False) == forward
    assert Arithmetic.of(tiny).flops([pair], backward=True) == 3 * forward


# ---- workers ----------------------------------------------------------------------------------------------------


def worker(folder: Path, program: str, limit: float = 60) -> Worker:
    return Worker([sys.executable, "-c", program], {}, folder / "log", os.environ, limit)


class Recorded:
    """A worker that only writes down when it was at work."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"waiting": True}

    def block(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self.log.append(self.name)
        return {"seconds": 1.0}, {"finished": {}}


def test_sides_take_turns() -> None:
    log: list[str] = []
    take_turns({name: Recorded(name, log) for name in "AB"}, "train", {"A": [1, 2, 2], "B": [1, 2, 2]}, [])  # type: ignore[dict-item]
    assert log == list("ABABAB")


def test_a_killed_worker_is_reported_and_the_other_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    dead: list[str] = []
    workers: dict[str, Any] = {"ours": Recorded("ours", log), "trl": worker(tmp_path, DIES)}
    took, _ = take_turns(workers, "train", {side: [1, 2] for side in workers}, dead)
    assert dead == [f"trl, train: {KILLED}"]
    assert list(workers) == list(took) == ["ours"] and len(took["ours"]) == 2


def test_a_worker_that_fails_or_hangs_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="exit code 1: ZeroDivisionError: division by zero"):
        worker(tmp_path, "input(); 1 / 0")
    with pytest.raises(WorkerDiedError, match="no answer in 1 s"):
        worker(tmp_path, "import time; time.sleep(60)", limit=1)
    with pytest.raises(WorkerDiedError, match="out of memory: much"):
        worker(tmp_path, 'print(\'{"error": "out of memory: much"}\')')


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.bench
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    found = results(tmp_path / "out.json")
    assert not found["result"]["void"] and not found["result"]["dead"] and found["result"]["same_ids"]
    for phase in ("precompute", "train", "eval"):
        assert found[phase]["ours"]["pairs_per_s"] > 0 and found[phase]["trl"]["pairs_per_s"] > 0
    assert len(found["train"]["losses"]["ours"]) == 3 and found["result"]["loss_difference"] < 1e-4
    assert found["start, cold"]["ours"]["pairs_scored"] == 6 and found["start, cold"]["trl"]["reference_forwards"] == 3
    assert found["start, warm"]["ours"]["pairs_scored"] == 0 and found["start, warm"]["trl"]["reference_forwards"] == 0
    sweep = [line for line in found["result"]["lines"] if line["phase"] == "sweep"]
    assert [line["pairs_scored"] for line in sweep if line["side"] == "ours"] == [0]
    assert [line["reference_forwards"] for line in sweep if line["side"] == "trl"] == [3]
    shown = capsys.readouterr().out
    assert "| hh | 2 | train |" in shown and "same tokens; losses differ by at most" in shown


@pytest.mark.bench
def test_bfloat16_and_accumulated_batches_agree(tmp_path: Path) -> None:
    arguments = [*SMALL, "--phases", "train", "eval", "--dtype", "bfloat16", "--grid", "1"]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    found = results(tmp_path / "out.json")
    assert found["result"]["trl_batch"] == 1 and 0 < found["result"]["loss_difference"] < 2e-2
    assert set(found["eval"]["losses"]) == {"ours", "trl"}


@pytest.mark.bench
def test_other_losses_are_void(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--phases", "train", "--ours-options", "--lr 1e-2"]) == 1
    shown = capsys.readouterr().out
    assert "| VOID |" in shown and "VOID: losses differ by" in shown


@pytest.mark.bench
def test_a_killed_side_is_in_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench.COMMANDS, "trl", [sys.executable, "-c", "import os; input(); os.kill(os.getpid(), 9)"])
    assert main([*SMALL, "--phases", "precompute"]) == 0  # for want of memory: a result, not a fault
    shown = capsys.readouterr().out
    assert f"trl, start: {KILLED}" in shown and "| hh | 2 | precompute |" in shown


@pytest.mark.bench
def test_commands_with_passed_options_on_rows_of_a_file(tmp_path: Path) -> None:
    """`dpo train` itself, step by step, and the error of one that does not start."""
    rows = [{"prompt": f"say {n}", "chosen": f" {n} it is", "rejected": " no"} for n in range(10)]
    data = ["--shape", "tiny", "--device", "cpu", "--data", str(write_rows(tmp_path / "rows.jsonl", rows))]
    data += ["--batch-size", "2", "--rounds", "2", "--pairs", "2", "--phases", "command", "--sides", "ours"]
    out = tmp_path / "out.json"
    assert main([*data, "--ours-options=--gradient-checkpointing", "--json", str(out)]) == 0
    assert len(results(out)["command"]["ours"]["blocks"]) == 3
    assert main([*data, "--ours-options=--no-such-option", "--json", str(out)]) == 1
    assert "unknown option --no-such-option" in results(out)["result"]["dead"][0]


def test_the_pairs_of_the_rival_are_those_of_the_case(tmp_path: Path) -> None:
    """Its file, read as its format, has the same prompts and responses in the order of the steps."""
    records = [{"prompt": f"say {n}", "chosen": f" {n} it is", "rejected": " no"} for n in range(6)]
    job = {"train": str(write_rows(tmp_path / "rows.jsonl", records)), "order": [[4, 1], [0, 5]]}
    rows = [*read_rows(find_sources([str(swift.write_rows(job, tmp_path))]), None, "swift")]
    found = [[part[0]["content"].strip() for part in (row.prompt, *row.answers)] for row in rows]
    assert found == [[text.strip() for text in records[place].values()] for place in (4, 1, 0, 5)]


def test_a_rival_that_is_not_there_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swift.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["swift", "--model", "none", "--case", "hh"])
    assert swift.main() == 0
    assert "ms-swift is not installed: its padding-free DPO is left out" in capsys.readouterr().out


@pytest.mark.bench
def test_the_hour_with_a_gpu_runs_without_one(tmp_path: Path) -> None:
    """Every part ends well, or is left out in a line, within nine minutes."""
    own = {"DEVICE": "cpu", "SIZES": "tiny", "OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=os.environ | own, check=True, timeout=560)
    ended = re.findall(r"^== (\S+): exit code (\d+)", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(ended) == 11 and {code for _, code in ended} == {"0"}


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with pytest.raises((SystemExit, UsageError), match="only 1 rows"):
        main(["--shape", "tiny", "--device", "cpu", "--data", str(data), "--phases", "train"])
