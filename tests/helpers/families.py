"""Tiny models of many families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.data.schedule import Layout
from dpo_cli.models.loading import _disable_dropout
from tests.helpers import make_model

WINDOW = 7  # shorter than every prompt + response but the shortest
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gemma3_text": ALTERNATING,
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {},
    "granite": {},
    "mixtral": MOE,
    "smollm3": {},
    "cohere2": ALTERNATING | {"logit_scale": 1.0},
    "starcoder2": {"sliding_window": WINDOW},
    "glm4": {},
    "exaone4": ALTERNATING,
    "gpt_oss": ALTERNATING | MOE,
}


# Families whose attention has a part of its own, the layout they get, and what is said about the others.
SPECIAL: dict[str, tuple[dict[str, Any], Layout, list[str]]] = {
    "gemma2": (
        ALTERNATING | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "packed",
        ["shared: not supported by the code of this model: ValueError: its attention takes softcap"],
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, "padded", ["shared: off by", "packed: off by"]),
    "mamba": ({"state_size": 8, "scale": 3.0}, "padded", ["shared: off by", "packed: off by"]),
}


def make(family: str) -> PreTrainedModel:
    config = SPECIAL[family][0] if family in SPECIAL else FAMILIES[family]
    return small(family, **config)


def small(family: str, **config: Any) -> PreTrainedModel:
    """As ``load_model`` gives it: without dropout."""
    model = make_model(family, **{"vocab_size": 64, "max_position_embeddings": 128, **config})
    _disable_dropout(model)
    return model


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[tuple[int, int, int]], window: int | None = None
) -> Tensor:
    """Attention of a shared row by its definition: one mask over all T x T. (1, A, T, D) -> (1, T, A, D)."""
    owner, part, place = [], [], []
    for number, (prompt, chosen, rejected) in enumerate(spans):
        owner += [number] * (prompt + chosen + rejected)
        part += [0] * prompt + [1] * chosen + [2] * rejected
        place += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
    o, a, t = (torch.tensor(values, device=query.device) for values in (owner, part, place))
    behind = t[:, None] - t[None, :]
    seen = (o[:, None] == o[None, :]) & (behind >= 0) & ((a[None, :] == 0) | (a[:, None] == a[None, :]))
    if window is not None:
        seen &= behind < window
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
