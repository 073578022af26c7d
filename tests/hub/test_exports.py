"""An export is read as it was trained: by this version of transformers, and by version 4 through its own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.hub.export import export_model
from dpo_cli.models.locate import ModelSource
from tests.helpers import make_model, make_tokenizer

BASE = {"rope_type": "default", "rope_theta": 1000000.0}
LLAMA = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000000.0, "original_max_position_embeddings": 512}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 2048}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Each family's configuration, and what transformers 4.57.6 reads of it.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"rope_parameters": LLAMA},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA.items() if k != "rope_theta"}},
    ),
    "qwen2": ({"rope_parameters": BASE}, {"rope_theta": 1000000.0, "rope_scaling": None}),
    "qwen3": (
        {"rope_parameters": YARN},
        {"rope_theta": 1000000.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
    ),
    "qwen3_moe": ({"rope_parameters": BASE, **EXPERTS}, {"rope_theta": 1000000.0, "num_experts": 4}),
    "gemma3_text": (LAYERS, {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None}),
    "mistral": ({"rope_parameters": BASE}, {"rope_theta": 1000000.0}),
    "phi3": (
        {"rope_parameters": LONG, "max_position_embeddings": 4096, "original_max_position_embeddings": 2048},
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "original_max_position_embeddings": 2048,
        },
    ),
    "gpt_neox": (
        {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 1000000.0, "rotary_pct": 0.5},
    ),
    "stablelm": ({}, {"partial_rotary_factor": 0.25}),
    "olmo2": ({"rope_parameters": BASE}, {"rope_theta": 1000000.0}),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(5, 205)[None]).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_has_the_names_of_both_versions(family: str, tmp_path: Path) -> None:
    config, older = FAMILIES[family]
    model = make_model(family, **config)
    export_model(tmp_path / "model", model, make_tokenizer(), "card", source=ModelSource("start", "start", "start"))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: written.get(key) for key in older} == older and "rope_parameters" in written
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    ropes = again.config.to_dict()["rope_parameters"]
    ropes.pop("type", None)  # Phi-3's older name of rope_type
    assert ropes == model.config.to_dict()["rope_parameters"]


def test_a_tokenizer_has_a_class_that_both_versions_know(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    export_model(tmp_path / "model", make_model(), tokenizer, "card", source=ModelSource("start", "start", "start"))
    written = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(written.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "<|im_start|>user\nWhy 10?<|turn|><|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.all_special_ids == tokenizer.all_special_ids
