"""``--lora-targets``: what is adapted, what is not and why, and that plain peft loads it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from benchmarks.studies import lora_targets
from dpo_cli.cli.app import app
from dpo_cli.models.adapters import NOT_NAMED, _routers, choose_targets, counted, kind_of
from dpo_cli.utils.errors import UsageError
from tests.helpers import ROOT, SAMPLE, make_model

DOCS = ROOT / "docs" / "adapters.md"
SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
SHARED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "scale": 3.0,
}
LOCAL = {"num_local_experts": 4}
LLAMA4 = LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "scale": 3.0}
IDS = torch.arange(3, 43)[None]


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    (tmp_path / "pairs.jsonl").write_text(
        "".join((SAMPLE / "train-strings.jsonl").read_text().splitlines(keepends=True)[:8])
    )

    def run(family: str, *more: Any, **config: Any) -> Any:
        model = make_model(family, **config)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options = ("--data", tmp_path / "pairs.jsonl", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run")
        steps = ("--max-steps", 2, "--batch-size", 4, "--lr", 1e-2, "--lora-rank", 4)
        told = CliRunner().invoke(app, ["train", "--model", *map(str, (tmp_path / "model", *options, *steps, *more))])
        return told, tmp_path / "run" / "model"

    return run


def adapted(folder: Path) -> set[str]:
    names = load_file(folder / "adapter_model.safetensors")
    return {kind_of(name.removeprefix("base_model.model.").split(".lora_")[0]) for name in names}


def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    rows = list(lora_targets.rows())
    text = DOCS.read_text()
    adapted = [row.partition(" /")[0] for row in rows]  # what is left differs: a router may be a module in one version
    assert len(rows) >= 20 and all(f"{row} /" in text for row in adapted)
    assert all(row.split(" | ")[2] == "0" for row in rows)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # within peft
@pytest.mark.parametrize(
    ("family", "config", "wanted"),
    [
        ("glm4_moe", SHARED, {"mlp.up_proj", "mlp.shared_experts.up_proj", "mlp.experts", "self_attn.q_proj"}),
        ("gpt_oss", LOCAL | {"num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}, {"mlp.experts"}),
        ("llama4_text", LLAMA4, {"feed_forward.experts", "feed_forward.shared_expert.up_proj"}),
        ("falcon_h1", MAMBA, {"mamba.in_proj", "feed_forward.up_proj"}),
    ],
)
def test_all_linear_trains_and_plain_peft_loads_it(
    family: str, config: dict[str, Any], wanted: set[str], train: Any, tmp_path: Path
) -> None:
    result, folder = train(family, **config)
    assert result.exit_code == 0, result.output
    experts = family in ("glm4_moe", "llama4_text")  # gpt_oss has the same tensors in transformers 4
    assert ("transformers 4 loads the exported adapter without its part on " in result.stderr) == experts, result.stderr
    found = adapted(folder)
    assert wanted <= {name.replace(".base_layer", "") for name in found}
    assert not any("router" in name or name.endswith(("gate", "out_proj")) for name in found)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    before = base(input_ids=IDS).logits
    after = PeftModel.from_pretrained(base, folder).eval()(input_ids=IDS).logits
    assert (after - before).abs().max() > 1e-3
    moved = {
        name for name, t in load_file(folder / "adapter_model.safetensors").items() if ".lora_B" in name and t.any()
    }
    assert {kind_of(name.removeprefix("base_model.model.").split(".lora_")[0]) for name in moved} == found
    full_names = json.loads((folder / "adapter_config.json").read_text())
    listed = [*full_names["target_modules"], *(full_names["target_parameters"] or ())]
    assert all(name.startswith("model.layers.") for name in listed)


def test_images_get_no_adapter(train: Any) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    text |= {"vocab_size": 384, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    result, folder = train("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert result.exit_code == 0, result.output
    names = load_file(folder / "adapter_model.safetensors")
    assert len(names) == 2 * 14 and not any("vision" in name for name in names)
    assert "without an adapter, no log-prob of text depends on them: 1 each of mlp.fc1, mlp.fc2," in result.stderr


@pytest.mark.parametrize(
    ("family", "config", "more", "told"),
    [
        ("falcon_h1", MAMBA, ("--lora-targets", "out_proj"), "out_proj is read by fused kernels, so that no adapter"),
        ("mamba", {"state_size": 8, "scale": 3.0}, ("--lora-targets", "conv1d"), "conv1d is read by fused kernels"),
        (
            "glm4_moe",
            SHARED,
            ("--lora-type", "dora"),
            "--lora-type dora: peft does not decompose mlp.",
        ),
        ("glm4_moe", SHARED, ("--lora-targets", "mlp.gate"), "mlp.gate is a Glm4MoeTopkRouter, which takes no adapter"),
        ("llama", {}, ("--modules-to-save", "q_proj"), "self_attn.q_proj would be trained whole and have an adapter"),
        ("llama", {}, ("--modules-to-save", "mlp"), "would be trained whole and have an adapter"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_scoring(
    family: str, config: dict[str, Any], more: tuple[str, str], told: str, train: Any
) -> None:
    result, folder = train(family, *more, **config)
    assert result.exit_code == 2 and told in result.stderr.replace("\n", " "), result.stderr
    assert not folder.parent.exists() and "reference " not in result.stderr


def test_what_peft_would_not_load_again_is_refused_before_scoring(train: Any) -> None:
    """peft renames laguna's ``mlp.shared_expert.`` as a pattern, whose dot also matches the s of ``shared_experts``."""
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "scale": 3.0}
    result, folder = train("laguna", **config)
    told = " ".join(result.stderr.split())
    assert result.exit_code == 2 and "would not load the adapter of mlp.shared_experts.down_proj, " in told, told
    assert not folder.parent.exists() and "reference " not in result.stderr
    result, _ = train("laguna", "--lora-targets", "q_proj,mlp.experts", **config)
    assert result.exit_code == 0, result.output


def test_names_are_found_by_their_ends_and_experts_by_theirs() -> None:
    model = make_model("glm4_moe", **SHARED)
    shared = choose_targets(model, "shared_experts.up_proj")
    assert (shared.modules, shared.parameters) == ([], ["model.layers.1.mlp.shared_experts.up_proj.weight"])
    experts = choose_targets(model, "q_proj,mlp.experts")
    assert [kind_of(name) for name in experts.modules] == ["self_attn.q_proj"] * 2
    assert [kind_of(name) for name in experts.parameters] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(
        UsageError, match=r"name ends with up; linear ones are .* tensors of experts mlp\.experts\.down"
    ):
        choose_targets(model, "up")


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ("gate_proj,up_proj,down_proj", {"mlp.experts.gate_up_proj"}),
        ("up_proj", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("mlp.experts.gate_up_proj", {"mlp.experts.down_proj"}),
        ("mlp.experts", set()),
        ("q_proj", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
    ],
)
def test_experts_are_not_left_out_without_a_word(names: str, left: set[str]) -> None:
    """They are one tensor in transformers 5, of another name than their parts."""
    assert {*choose_targets(make_model("glm4_moe", **SHARED), names).left.get(NOT_NAMED, ())} == left


def test_kinds_are_counted_together() -> None:
    assert [kind_of(f"a.{name}") for name in ("layers.3.mlp.experts.0.up", "merger.mlp.0", "b")] == [
        "mlp.experts.up",
        "a.merger.mlp",
        "a.b",
    ]
    assert not choose_targets(make_model("qwen2"), "all-linear").left
    assert counted(Counter({"a.b": 2, "c": 2, "d": 30})) == "30 d; 2 each of a.b, c"


def test_all_that_a_router_is_made_of_gets_no_adapter() -> None:
    """As zaya's, whose linear modules have names of a projection."""

    class ToyRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(4, 2)

    model = nn.ModuleDict({"gate": ToyRouter(), "up_proj": nn.Linear(4, 4)})
    assert _routers(dict(model.named_modules()), []) == {"gate.down_proj"}
