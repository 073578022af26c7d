"""The auxiliary loss of a mixture of experts: transformers' value and gradient, whatever the layout and the cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.data.batching import MicroBatch, collate
from dpo_cli.data.pairs import Pair
from dpo_cli.data.schedule import Layout
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.models.moe import auxiliary_loss, routed
from tests.helpers import SAMPLE, make_model, random_pairs

CPU = torch.device("cpu")
TWO_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": TWO_OF_FOUR | {"moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "olmoe": TWO_OF_FOUR,
}
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded", "alone")


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param, **MIXTURES[request.param])


def scorer(model: PreTrainedModel, layout: Layout) -> ModelRunner:
    return ModelRunner(model, layout, torch.float32, 4096, CPU)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def backward(model: PreTrainedModel, pairs: Sequence[Pair], layout: Layout) -> tuple[float, dict[str, Tensor]]:
    """The auxiliary loss of pairs in one forward, and its gradient alone."""
    model.zero_grad()
    with attention(model, PREFIX_SHARED if layout == "shared" else None):
        runner = scorer(model, layout)
        hidden = runner.body(runner.batch(pairs), output_router_logits=True)
        for piece in hidden.head_pieces():
            (0 * piece.logps.sum()).backward()
        loss = auxiliary_loss(*routed(hidden.router_logits, hidden.batch, 2))
        hidden.backward(loss)
    return float(loss.detach()), gradients(model)


def test_value_and_gradient_of_transformers_in_every_layout(model: PreTrainedModel) -> None:
    """Its own loss is taken over padded batches, whose padding does not count."""
    pairs = random_pairs(3)
    batch = collate(pairs, "padded")
    model.zero_grad()
    own = model(batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True).aux_loss
    own.backward()
    wanted = gradients(model)
    for layout in LAYOUTS:
        value, found = backward(model, pairs, layout)
        assert value == pytest.approx(float(own.detach()), rel=1e-6)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_worked_by_hand() -> None:
    """One layer, four experts, one of them a token; all tokens prefer the first, and by as much."""
    pairs = random_pairs(1)
    batch: MicroBatch = collate(pairs, "shared")
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0]).log().expand(batch.input_ids.numel(), 4)
    probabilities, counts = routed([logits], batch, 1)
    tokens = 2 * len(pairs[0].prompt) + len(pairs[0].chosen) + len(pairs[0].rejected)
    assert counts.tolist() == [tokens, 0, 0, 0, tokens]
    assert float(auxiliary_loss(probabilities, counts)) == pytest.approx(4 * 1 * 0.5)  # even routing has 1
    even = torch.full((4,), 2.5), torch.tensor([5.0, 5, 5, 5, 10])
    assert float(auxiliary_loss(*even)) == pytest.approx(2)  # two of four experts a token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    make_model("mixtral", **MIXTURES["mixtral"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: Path, output: Path, *more: Any) -> list[dict[str, Any]]:
    data = ("--model", model, "--data", SAMPLE / "train-strings.jsonl", "--cache-dir", output.parent / "cache")
    steps = ("--batch-size", 8, "--max-grad-norm", 0, "--warmup-ratio", 0, "--output", output)
    result = CliRunner().invoke(app, ["train", *map(str, (*data, *steps, *more))])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_step_does_not_depend_on_how_it_is_cut(folder: Path, tmp_path: Path) -> None:
    balanced = ("--router-aux-loss-coef", 10, "--max-steps", 2, "--lr", 1e-3)
    whole = train(folder, tmp_path / "whole", *balanced, "--max-tokens", 8192)
    cut = train(folder, tmp_path / "cut", *balanced, "--max-tokens", 512)
    again = train(folder, tmp_path / "again", *balanced, "--max-tokens", 512, "--gradient-checkpointing")
    alone = train(folder, tmp_path / "alone", "--max-steps", 2, "--lr", 1e-3, "--max-tokens", 8192)
    assert whole[0]["loss"] == pytest.approx(0.693147, abs=1e-6) == alone[0]["loss"]
    assert "aux_loss" not in alone[0] and whole[0]["grad_norm"] != pytest.approx(alone[0]["grad_norm"], rel=1e-3)
    for name in ("loss", "aux_loss", "grad_norm"):
        for step in range(2):
            for other in (cut, again):
                assert other[step][name] == pytest.approx(whole[step][name], rel=2e-4), (name, step)


def test_it_evens_out_the_routing(folder: Path, tmp_path: Path) -> None:
    lines = train(folder, tmp_path / "run", "--router-aux-loss-coef", 10, "--max-steps", 12, "--lr", 3e-3)
    assert 2 <= lines[-1]["aux_loss"] < lines[0]["aux_loss"] - 0.01  # 2.017 before: nearly even by chance


def test_a_model_without_experts_is_refused(tiny: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny, "--data", SAMPLE / "train-strings.jsonl", "--router-aux-loss-coef", 0.01)
    result = CliRunner().invoke(app, ["train", *map(str, arguments), "--cache-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "--router-aux-loss-coef: LlamaForCausalLM is no mixture of experts" in result.stderr


@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (("--lora-targets", "lm_head"), False),
        (("--lora-targets", "lm_head", "--modules-to-save", "model.norm"), False),
        (("--lora-targets", "layers.1.self_attn.o_proj"), True),
    ],
)
def test_routers_that_nothing_trained_reaches_are_refused(
    targets: tuple[str, ...], reached: bool, folder: Path, tmp_path: Path
) -> None:
    data = ("--model", folder, "--data", SAMPLE / "train-strings.jsonl", "--cache-dir", tmp_path)
    adapter = ("--router-aux-loss-coef", 1, "--lora-rank", 2, *targets, "--output", tmp_path / "run")
    steps = ("--max-steps", 1, "--batch-size", 2)
    result = CliRunner().invoke(app, ["train", *map(str, (*data, *adapter, *steps))])
    assert result.exit_code == (0 if reached else 2), result.output
    assert ("the routers depend on no trained weight" in result.stderr) is not reached
