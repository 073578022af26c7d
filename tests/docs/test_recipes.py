"""Recipes of docs/recipes run, are read without a network, and have the values that were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.data.sources import hub_id, split_share
from dpo_cli.evaluation.statistics import wilson
from tests.helpers import ROOT, Cli, bar_network, write_rows

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.yaml"))
SMOLLM2 = ROOT / "docs" / "recipes" / "smollm2-135m-ultrafeedback.yaml"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_resolve(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = bar_network(monkeypatch)
    options = resolve(TrainOptions, {}, recipe)
    assert options.data and not attempts
    first = f"dpo train --config {recipe.relative_to(ROOT)}"
    assert first in recipe.read_text(encoding="utf-8"), "it says how it is run"


def test_smollm2_is_as_published() -> None:
    options = resolve(TrainOptions, {}, SMOLLM2)
    published = (
        options.beta,
        options.lr,
        options.batch_size,
        options.epochs,
        options.lr_scheduler,
        options.warmup_ratio,
    )
    assert published == (0.5, 1e-6, 128, 2, "cosine", 0.1)
    assert (options.max_length, options.seed, options.loss, options.weight_decay) == (1024, 42, "sigmoid", 0)
    assert options.ref_model is None and options.lora_rank is None, "all weights, held to the start"
    assert options.eval_data is not None
    sets = [hub_id(name) for name in options.data + options.eval_data]
    assert sets == ["HuggingFaceH4/ultrafeedback_binarized"] * 2
    assert [name.partition(":")[2] for name in options.data + options.eval_data] == ["train_prefs", "test_prefs"]


def test_what_is_said_of_the_published_accuracy() -> None:
    """It is a share of 252 pairs, as the larger model's is, and as sure as that makes it."""
    assert [round(hits / 252, 4) for hits in (155, 170)] == [0.6151, 0.6746]
    assert [f"{end:.2f}" for end in wilson(155, 252)] == ["0.55", "0.67"]


# ---- every recipe, tiny -----------------------------------------------------------------------------------------


def ultrafeedback(i: int) -> dict[str, Any]:
    """A prompt as text beside whole conversations, as UltraFeedback, Tülu 3's and Dolci's rows have them."""
    question = {"role": "user", "content": f"What is {i} and one?"}
    answers = {"chosen": f"It is {i + 1}.", "rejected": "I do not know."}
    sides = {side: [question, {"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"id": f"row-{i}", "prompt": question["content"], **sides}


def thinking(i: int) -> dict[str, Any]:
    row = ultrafeedback(i)
    for side, thought in (("chosen", f"One more than {i}."), ("rejected", "Hm.")):
        row[side][-1]["content"] = f"<think>\n{thought}\n</think>\n{row[side][-1]['content']}"
    return row


def smoltalk2(i: int) -> dict[str, Any]:
    of_template = {"custom_instructions": None, "enable_thinking": i % 2 == 0, "python_tools": None, "xml_tools": None}
    return (thinking(i) if i % 2 == 0 else ultrafeedback(i)) | {"chat_template_kwargs": of_template}


def step_dpo(i: int) -> dict[str, Any]:
    prompt = f"### Instruction:\nAdd {i} and 1.\n\n### Response:\nStep 1: Write both down."
    return {"prompt": prompt, "chosen": f" Step 2: {i} + 1 = {i + 1}.", "rejected": f" Step 2: {i} + 1 = {i}."}


SHAPES = {"smollm3": smoltalk2, "think": thinking, "step-dpo": step_dpo}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe: Path, dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    """Two steps with its own options, but for the model, the files, and what a tiny model cannot hold."""
    shape = next((shape for part, shape in SHAPES.items() if part in recipe.stem), ultrafeedback)
    files = {name: write_rows(tmp_path / f"{name}.jsonl", [shape(i) for i in range(12)]) for name in ("a", "b", "held")}
    own = resolve(TrainOptions, {}, recipe)
    shares = [split_share(name)[1] for name in own.data]
    data = [f"{files['ab'[i]]}={share}" if share else files["ab"[i]] for i, share in enumerate(shares)]
    words: list[Any] = [word for each in data for word in ("--data", each)]
    words += ["--eval-data", files["held"]] if own.eval_data else []
    words += ["--model", tiny, "--batch-size", 4, "--max-steps", 2, "--max-length", min(own.max_length or 512, 512)]
    done = dpo("train", "--config", recipe, *words, "--output", "run", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and not result["refused"]
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    assert steps[0]["learning_rate"] == own.lr > steps[1]["learning_rate"] >= own.min_lr
    kept = yaml.safe_load(Path("run", "config.yaml").read_text())
    for name in ("loss", "beta", "lr", "min_lr", "lr_scheduler", "max_grad_norm", "seed", "epochs", "weight_decay"):
        assert kept[name] == getattr(own, name)


def test_the_published_numbers() -> None:
    """Of the files that the recipes name: loss, beta, learning rate, pairs per step, longest row."""
    published = {
        "olmo3-7b-instruct": ("sigmoid_norm", 5, 1e-6, 4 * 8 * 1 * 4, 16384),
        "olmo3-7b-think": ("sigmoid_norm", 5, 8e-8, 4 * 8 * 1 * 4, 16384),
        "qwen2-7b-step-dpo": ("sigmoid", 0.5, 5e-7, 8 * 4 * 4, 1024),
        "smollm2-135m-ultrafeedback": ("sigmoid", 0.5, 1e-6, 128, 1024),
        "smollm3-3b-apo": ("apo_zero", 0.05, 1e-6, 16 * 1 * 2, 24576),
        "tulu3-8b": ("sigmoid_norm", 5, 5e-7, 8 * 1 * 16, 2048),
        "zephyr-7b": ("sigmoid", 0.01, 5e-7, 8 * 8 * 2, 1024),
    }
    for recipe in RECIPES:
        o = resolve(TrainOptions, {}, recipe)
        assert (o.loss, o.beta, o.lr, o.batch_size, o.max_length) == published.pop(recipe.stem)
    assert not published
    smollm3 = resolve(TrainOptions, {}, SMOLLM2.with_name("smollm3-3b-apo.yaml"))
    assert smollm3.min_lr == pytest.approx(0.1 * smollm3.lr)
    drawn = [230_501 * 0.5, 216_385 * 0.25]
    shares = [split_share(name)[1] for name in smollm3.data]
    assert [round(each / sum(drawn), 2) for each in drawn] == shares
    assert smollm3.max_steps == sum(map(int, drawn)) // 32
