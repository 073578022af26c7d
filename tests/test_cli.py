"""End to end through the command."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SAMPLE, Cli


@pytest.fixture
def small_run(dpo: Cli, tiny: Path, tmp_path: Path):
    out = dpo(
        "train", "--model", tiny, "--data", SAMPLE / "train.jsonl", "--eval-data", SAMPLE / "heldout.jsonl",
        "--max-steps", 3, "--batch-size", 4, "--lr", 1e-3, "--output", "run", "--show-answers", 1, "--json",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return tmp_path / "run", json.loads(out.stdout), out.stderr


def test_train_writes_the_run_folder(small_run) -> None:
    run, result, told = small_run
    assert {p.name for p in run.iterdir()} == {"config.yaml", "manifest.json", "metrics.jsonl", "model"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]
    assert "step 0      loss 0.693147  margin 0.000000" in told
    assert math.isclose(result["before"]["loss"], math.log(2), abs_tol=1e-6)
    assert result["before"]["rewards/accuracies"] == 0.5 and result["before"]["rewards/ties"] == 1
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
