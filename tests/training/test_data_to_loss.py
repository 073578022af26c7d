"""From the columns of a file to the loss: what a row brings is what is trained and scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import write_rows
from tests.helpers.caches import dpo


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_columns_and_turns_of_rows_reach_the_loss(tiny: Path, tmp_path: Path) -> None:
    """Of tool calls the last answer counts alone: `dpo eval` gives the sums of its tokens that an own forward gives."""
    tool = [{"role": "assistant", "content": "look"}, {"role": "tool", "content": "12"}]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Why {n}?"}],
            "chosen": [*tool, {"role": "assistant", "content": "Because it is so."}],
            "rejected": [{"role": "assistant", "content": f"No idea {n}."}],
            "weight": 0.5 + n,
            "margin": 0.25 * n,
        }
        for n in range(4)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    common = ("--model", tiny, "--data", tmp_path / "rows.jsonl", "--cache-dir", tmp_path / "cache")
    dpo("train", *common, "--output", tmp_path / "run", "--batch-size", 4, "--dtype", "float32")
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    expected = sum((0.5 + n) * math.log(1 + math.exp(0.25 * n)) for n in range(4)) / 4
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    dpo("eval", *common, "--per-pair", tmp_path / "scored.jsonl", "--dtype", "float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    for row, line in zip(rows, lines(tmp_path / "scored.jsonl"), strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)[
            :-1
        ]  # the last line's end
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = len(tokenizer("Because it is so.<|im_end|>")["input_ids"])
        places = range(len(ids) - answer, len(ids))
        assert line["tokens/chosen"] == answer
        assert line["logps/chosen"] == pytest.approx(float(sum(logps[i - 1, ids[i]] for i in places)), abs=1e-3)
