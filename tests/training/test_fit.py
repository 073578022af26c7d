"""What a run is expected to take of memory, how near that is to the truth, and what mode and token budget follow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import dpo_cli.training.memory
from dpo_cli.data.schedule import row_costs
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.training.memory import (
    WITH_GRADIENTS,
    Growth,
    MemoryChoice,
    StepBytes,
    choose_memory,
    count_bytes,
    count_head_tokens,
)
from dpo_cli.utils.devices import KINDS
from tests.helpers import SAMPLE, cli_environment, make_model, make_tokenizer, random_pairs, stand_in

CPU = torch.device("cpu")
MIB = 2**20
COUNTED = StepBytes(
    parameters=100,
    largest=10,
    kept=Growth(7.0, 5.0),
    outside=Growth(1.0, 1.0),
    layer=Growth(0.0, 2.0),
    per_logits=3,
    process=1000,
)
LAYER = round(WITH_GRADIENTS * 2 * 200)  # with 200 tokens, recomputed
PAIRS = random_pairs(12, longest=60)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(num_hidden_layers=6)  # of two, recomputing one saves nothing


def scorer_of(model: PreTrainedModel, **changes: Any) -> ModelRunner:
    return replace(ModelRunner(model, "shared", torch.float32, 512, CPU), **changes)


@pytest.mark.parametrize(
    ("memory", "recompute", "later", "expected"),
    [
        # Weights and moments 12 a parameter. One forward a step: the head's gradient and one to be added lie beside it.
        ("full", False, None, 1000 + 1200 + (7 + 5 * 200 + 3 * 20) + 2 * 40),
        # Several: what the later ones keep lies beside all gradients and one more of the largest tensor.
        ("full", False, (100, 10), 1000 + 1200 + max(7 + 1000 + 60 + 2 * 40, 7 + 500 + 30 + 400 + 40)),
        ("full", False, (200, 20), 1000 + 1200 + 7 + 1000 + 60 + 400 + 40),
        # A layer is recomputed beside all gradients in the end, or beside the layers' inputs and one gradient before.
        ("full", True, None, 1000 + 1200 + (400 + 40 + LAYER)),
        ("full", True, (200, 20), 1000 + 1200 + (1 + 200 + LAYER) + 400 + 40),
        ("full", True, (200, 300), 1000 + 1200 + (1 + 200 + 3 * 300) + 400 + 40),  # the logits are more
        ("split", False, (200, 20), 1000 + 600 + 7 + 1000 + 60 + 200 + 20),
        ("in-backward", False, None, 1000 + 600 + 7 + 1000 + 60 + 2 * 20),
    ],
)
def test_peak_by_hand(memory: str, recompute: bool, later: tuple[int, int] | None, expected: int) -> None:
    assert COUNTED.peak(memory, recompute, (200, 20), later) == expected


def test_the_budget_fills_the_room() -> None:
    """And not more: one block of 64 tokens more would be too many."""
    budget = COUNTED.max_tokens("full", False, 50_000, 20, 32768)
    assert budget % 64 == 0 and budget > 0
    peak, more = (COUNTED.peak("full", False, (n, 20), (n, 20)) for n in (budget, budget + 64))
    assert peak <= 50_000 < more
    assert COUNTED.max_tokens("full", False, 100, 20, 32768) == 0
    assert COUNTED.max_tokens("full", False, 50_000, 20, 2048) == 2048


def test_what_a_forward_keeps_is_counted(model: PreTrainedModel) -> None:
    """The count of two small forwards says what a larger one keeps: held tensors, measured another way."""
    scorer = scorer_of(model)
    with attention(model, PREFIX_SHARED):
        counted = count_bytes(scorer, PAIRS, process=0)
        batch = scorer.batch(PAIRS)
        held: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.detach()) or x.detach(), lambda x: x):
            scorer.body(batch)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    expected = sum(n for place, n in storages.items() if place not in own) * KINDS["cpu"].heap
    tokens = sum(row_costs(PAIRS, "shared"))
    assert counted.kept.at(tokens) == pytest.approx(expected, rel=0.15)
    assert counted.parameters == model.num_parameters()
    assert counted.outside.at(tokens) + 6 * counted.layer.at(tokens) >= counted.kept.at(tokens)
    assert counted.outside.at(tokens) + counted.layer.at(tokens) < 0.6 * counted.kept.at(tokens)


def test_recomputation_keeps_the_casts_of_one_layer(model: PreTrainedModel) -> None:
    """Autocast's copies of the weights are of all layers only where their activations are kept."""
    with attention(model, PREFIX_SHARED):
        counted = count_bytes(scorer_of(model, dtype=torch.bfloat16), PAIRS, 0)
    layer = [p for name, p in model.named_parameters() if ".layers.0." in name and p.ndim > 1]
    casts = KINDS["cpu"].heap * sum(2 * p.numel() for p in layer)
    assert casts < counted.layer.fixed < 1.5 * casts and counted.outside.fixed < casts
    assert 6 * casts < counted.kept.fixed < 9 * casts


def test_a_mask_over_the_row_bounds_the_budget(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own attention may keep T x T scores of a packed row: a line would promise several times too much."""
    pairs = random_pairs(14, longest=60)
    with attention(model, "eager"):
        runner = scorer_of(model, layout="packed", dtype=torch.bfloat16)
        counted = count_bytes(runner, pairs, 0)
        tokens = runner.batch(pairs).input_ids.numel()
        kept = KINDS["cpu"].heap * dpo_cli.training.memory._kept(runner, pairs)[0]
        assert counted.kept.at(tokens) == pytest.approx(kept, rel=0.05)
        assert replace(counted.kept, per_square=0.0).at(tokens) < kept / 2
        room = counted.peak("full", False, (tokens, 100), (tokens, 100))
        monkeypatch.setattr(dpo_cli.training.memory, "usable_bytes", lambda device: room)
        stand_in(monkeypatch, most_tokens=10**5)
        runner = replace(runner, kind=KINDS["cpu"])
        assert 0.8 * tokens < choose_memory(runner, pairs, 0, "full", False, None).max_tokens <= tokens
    with attention(model, PREFIX_SHARED):
        assert count_bytes(scorer_of(model), PAIRS, 0).kept.per_square == 0


def test_counting_leaves_nothing_behind(model: PreTrainedModel) -> None:
    """A graph whose outputs are kept by itself would never be freed."""
    import gc

    gc.collect()
    before = sum(type(o) is torch.Tensor for o in gc.get_objects())
    with attention(model, PREFIX_SHARED):
        count_bytes(scorer_of(model), PAIRS, process=0)
    gc.collect()
    assert sum(type(o) is torch.Tensor for o in gc.get_objects()) <= before


@pytest.mark.parametrize(
    ("room", "wanted", "expected"),
    [
        (10**9, ("auto", False, None), ("full", False, 2048)),
        (10**9, ("auto", True, None), ("full", True, 2048)),
        (10**9, ("split", False, 300), ("split", False, 300)),
        (0, ("auto", False, None), ("full", True, 512)),
        (0, ("full", False, None), ("full", False, 512)),
    ],
)
def test_the_fastest_that_fits(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, room: int, wanted: Any, expected: Any
) -> None:
    monkeypatch.setattr(dpo_cli.training.memory, "usable_bytes", lambda device: room)
    with attention(model, PREFIX_SHARED):
        found = choose_memory(scorer_of(model), PAIRS, 0, *wanted)
    assert (found.memory, found.recompute, found.max_tokens) == expected


def test_recomputation_before_8_bits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what is enough for all and for nothing, each way of the ladder has its turn, in order."""
    ways = []
    with attention(model, PREFIX_SHARED):
        counted = count_bytes(scorer_of(model), PAIRS, 0)
        most = counted.peak("full", False, (4096, 200), (4096, 200))
        for room in range(most, 0, -most // 200):
            monkeypatch.setattr(dpo_cli.training.memory, "usable_bytes", lambda device, room=room: room)
            found = choose_memory(scorer_of(model), PAIRS, 0, "auto", False, None)
            ways.append((found.memory, found.recompute))
    assert list(dict.fromkeys(ways)) == [*KINDS["cpu"].ladder]


def test_a_long_pair_decides(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than any budget, it has a forward of its own, whose room must be there."""
    (long,) = random_pairs(1)
    long = replace(long, prompt=np.resize(long.prompt, 1900), chosen=np.resize(long.chosen, 100))
    with attention(model, PREFIX_SHARED):
        counted = count_bytes(scorer_of(model), PAIRS, 0)
        room = counted.peak("full", False, (1000, 100), (1000, 100))
        monkeypatch.setattr(dpo_cli.training.memory, "usable_bytes", lambda device: room)
        assert not choose_memory(scorer_of(model), PAIRS, 0, "auto", False, None).recompute
        assert choose_memory(scorer_of(model), [*PAIRS, long], 0, "auto", False, 512).recompute


def test_at_head_is_what_meets_it_at_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [len(pair.chosen) + len(pair.rejected) for pair in PAIRS]
    assert count_head_tokens(scorer_of(model), PAIRS) == sum(tokens)
    stand_in(monkeypatch, logits_bytes=4 * 384 * (max(tokens) + 5))
    assert count_head_tokens(scorer_of(model), PAIRS) == max(tokens) + 5
    stand_in(monkeypatch, logits_bytes=4)
    assert count_head_tokens(scorer_of(model), PAIRS) == max(tokens)
    assert count_head_tokens(scorer_of(model, chunked_lm_head=False), PAIRS) == 0


def test_estimate_of_a_plan(model: PreTrainedModel) -> None:
    """By the largest first and the largest later micro-batch, whichever steps they are in."""
    scorer, tokens = scorer_of(model), row_costs(PAIRS, "shared")
    largest, *rest = sorted(range(len(PAIRS)), key=lambda i: -tokens[i])
    choice = MemoryChoice("full", False, 512, COUNTED)
    one = choice.estimate([[(largest,)], [(rest[0],)]], tokens, PAIRS, scorer)
    assert one == COUNTED.peak("full", False, (tokens[largest], count_head_tokens(scorer, [PAIRS[largest]])), None)
    several = choice.estimate([[(rest[0],), (largest,)], [(rest[1],)]], tokens, PAIRS, scorer)
    first, later = ((tokens[i], count_head_tokens(scorer, [PAIRS[i]])) for i in (rest[0], largest))
    assert several == COUNTED.peak("full", False, first, later)


# Not what the parent is told of a child by wait4: that is no less than what the parent itself once held.
TELLS_ITS_PEAK = """
import sys
from pathlib import Path
from dpo_cli.cli.app import main
from dpo_cli.training.memory import MemoryChoice
estimate = MemoryChoice.estimate
def printed(*given):
    bytes = estimate(*given)
    print("estimate", bytes)
    return bytes
MemoryChoice.estimate = printed
try:
    main()
finally:
    print(Path("/proc/self/status").read_text())
"""


@pytest.mark.parametrize("options", [(), ("--gradient-checkpointing",)], ids=" ".join)
def test_the_estimate_is_near_the_peak(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of a model whose state and activations are several times what the program itself takes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 128}
    make_model(**sizes, vocab_size=16384, scale=1.0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    command = ["--model", "model", "--data", "rows.jsonl", "--batch-size", "6", "--output", "run", *options]
    command += ["--cache-dir", "cache", "--max-tokens", "2048", "--save-steps", "0"]
    program = [sys.executable, "-c", TELLS_ITS_PEAK, "train", *command]
    out = subprocess.run(program, cwd=tmp_path, env=cli_environment(tmp_path), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "2 steps" in out.stderr
    (estimate,) = re.findall(r"estimate (\d+)", out.stdout)  # the line of the plan has one digit
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", out.stdout)
    assert int(estimate) / 2**10 == pytest.approx(int(peak), rel=0.15)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
