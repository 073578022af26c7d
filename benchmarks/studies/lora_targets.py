"""The table of docs/adapters.md: of each family, how many matrices ``--lora-targets all-linear`` adapts.

    python -m benchmarks.studies.lora_targets

Tiny models of the families' own classes: the names are those of the large ones, the counts those of two layers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_cli.models.adapters import choose_targets, counted

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 384,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
ROUTED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mixtral": LOCAL,
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_moe_text": EXPERTS | LINEAR,
    "gpt_oss": LOCAL | {"layer_types": ["full_attention"] * 2},
    "deepseek_v2": ROUTED | LATENT,
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED,
    "dots1": ROUTED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1},
    "granitemoe": LOCAL,
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "minimax_m2": LOCAL,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    | {"expert_layer_offset": 1, "mamba_d_state": 8},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | LOCAL | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
}


def make(family: str) -> PreTrainedModel:
    """A tiny model of a family, in evaluation mode."""
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def rows() -> Iterator[str]:
    """Each family's line of the table."""
    ids = torch.arange(3, 43)[None]
    for family in FAMILIES:
        model = make(family)
        targets = choose_targets(model, "all-linear", lambda m=model: m(input_ids=ids, use_cache=False).logits)  # type: ignore[misc]
        done, left = len(targets.modules) + len(targets.parameters), sum(targets.left.values(), Counter[str]())
        routers = [n for n in (*targets.modules, *targets.parameters) if "router" in n or n.endswith("gate.weight")]
        yield f"| {family} | {done} / {done + left.total()} | {len(routers)} | {counted(left)} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| family | adapted / all | routers | without an adapter |\n|---|---:|---:|---|")
    for row in rows():
        print(row)
