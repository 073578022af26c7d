"""End to end through the command."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import SAMPLE, Cli, make_model


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
    files = {"config.yaml", "manifest.json", "metrics.jsonl", "report.html", "curves.png", "trained-pairs.safetensors"}
    assert {p.name for p in run.iterdir()} == files | {"checkpoints", "model"}
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


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [["--gradient-checkpointing"], ["--max-tokens", 300]])
def test_what_saves_memory_changes_no_number(dpo: Cli, tiny: Path, tmp_path: Path, flags: list[str]) -> None:
    common = [
        "train",
        "--model",
        tiny,
        "--data",
        SAMPLE / "train.jsonl",
        "--max-steps",
        2,
        "--batch-size",
        4,
        "--lr",
        1e-3,
    ]
    for name, more in (("plain", []), ("saving", flags)):
        out = dpo(*common, *more, "--output", name)
        assert out.returncode == 0 and "Warning" not in out.stderr, out.stderr
    for plain, saving in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "saving"), strict=True):
        assert plain == pytest.approx(saving, rel=1e-5, abs=1e-6)


def test_dropout_is_off(dpo: Cli, tmp_path: Path, tokenizer) -> None:
    """With it the policy would not be the reference at the first step."""
    folder = tmp_path / "gpt2"
    make_model("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = dpo("train", "--model", folder, "--data", SAMPLE / "train.jsonl", "--max-steps", 1, "--output", "run")
    assert out.returncode == 0, out.stderr
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
