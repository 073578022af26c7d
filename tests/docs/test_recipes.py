"""Recipes of docs/recipes are read without a network, and have the values that were published."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.data.sources import hub_id
from dpo_cli.evaluation.statistics import wilson
from tests.helpers import ROOT, bar_network

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
