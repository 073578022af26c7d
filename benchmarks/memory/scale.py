"""What training takes of each GPU's memory, by the estimator of ``dpo train``; prints the table of docs/scale.md.

``python -m benchmarks.memory.scale``, with ``--cards`` the one of README.md: a few seconds on a CPU. What a forward
keeps per token is counted on small models of the same kind and follows from their widths; no large one is made.
"""

import itertools
import sys
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.models.adapters import new_adapter
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.models.parallel import Parallel
from dpo_cli.training.memory import LOGIT_BYTES, USABLE, StepBytes, count_bytes
from dpo_cli.utils.devices import CPU, CUDA

GPU = 80e9  # bytes
TOKENS = 4096  # of a forward
MODES = ("full", "split", "in-backward")
RANKS = (2, 4, 8, 16, 64)
CARDS = (12, 16, 24, 48, 80, 141)  # GB
RANK = 16  # of adapters
# Hidden size, layers, MLP, heads, key-value heads, vocabulary, tied head: as published for SmolLM2-135M, Llama 3.2 1B,
# Llama 3.1 8B, Qwen 2.5 32B, Llama 3.1 70B.
SHAPES = {
    "135M": (576, 30, 1536, 9, 3, 49152, True),
    "1B": (2048, 16, 8192, 32, 8, 128256, True),
    "8B": (4096, 32, 14336, 32, 8, 128256, False),
    "32B": (5120, 64, 27648, 40, 8, 152064, False),
    "70B": (8192, 80, 28672, 64, 8, 128256, False),
}


def make(
    hidden: int, layers: int, mlp: int, heads: int, groups: int, vocabulary: int, tied: bool, adapter: bool = False
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    dtype = torch.bfloat16 if adapter else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if adapter:
        lora: Any = {"lora_rank": RANK, "lora_type": "lora", "lora_alpha": 2 * RANK}
        new_adapter(model, TrainOptions(data=["pairs.jsonl"], **lora), "")
    return model


def widths(config: LlamaConfig) -> list[float]:
    """What the bytes of a token are a sum of: each layer's width, MLP, keys and a constant; the width once more."""
    layers, keys = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    return [layers * config.hidden_size, layers * config.intermediate_size, layers * keys, layers, config.hidden_size]


@cache
def bytes_by_width(adapter: bool = False) -> np.ndarray:
    """Bytes a token for each of ``widths``, counted in bfloat16 on small models and solved for."""
    rows, counted = [], []
    for layers, hidden, mlp, groups in itertools.product((1, 3), (64, 128), (96, 256), (1, 2)):
        torch.manual_seed(0)
        model = make(hidden, layers, mlp, hidden // 32, groups, 384, True, adapter)
        scorer = ModelRunner(model, "packed", torch.bfloat16, TOKENS, torch.device("cpu"))
        ids = np.arange(3, 203, dtype=np.int32)
        pairs = [Pair("long", ids, ids, ids[:100]), Pair("short", ids[:50], ids[:60], ids[:40])]
        rows.append(widths(model.config))
        counted.append(count_bytes(scorer, pairs, 0).per_token / CPU.heap)
    solved, *_ = np.linalg.lstsq(np.array(rows), np.array(counted), rcond=None)
    assert np.allclose(np.array(rows) @ solved, counted, rtol=0.02), "the bytes of a token are no sum of the widths"
    return solved


def step_bytes(model: PreTrainedModel, shards: int = 1) -> StepBytes:
    """What ``dpo train`` would reckon with, on a GPU."""
    config, sizes = model.config, [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    per_token = float(np.array(widths(config)) @ bytes_by_width(frozen > 0))
    kept = config.num_hidden_layers * config.hidden_size * 4
    return StepBytes(
        parameters=sum(sizes),
        largest=max(sizes),
        fixed=0.0,
        per_token=per_token,
        per_token_recomputed=2 * per_token / config.num_hidden_layers + kept,
        per_logits=LOGIT_BYTES * config.vocab_size,
        process=0,
        shards=shards,
        gathered=Parallel(sharded=True).gathered_parameters(model) if shards > 1 else 0,
        frozen=frozen,
    )


def peak(model: PreTrainedModel, mode: str, shards: int = 1) -> int:
    """Bytes of each GPU, with activations recomputed."""
    at_head = min(TOKENS // 2, CUDA.logits_bytes // (4 * model.config.vocab_size))
    return step_bytes(model, shards).peak(mode, True, (TOKENS, at_head), (TOKENS, at_head))


def table() -> list[str]:
    """The table's lines: GiB of each GPU with activations recomputed, in bold where it fits."""
    heads = [*(f"`{mode}`" for mode in MODES), *(f"`--fsdp` over {ranks}" for ranks in RANKS)]
    lines = ["| model | parameters | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads))]
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = make(*shape)
        peaks = [peak(model, mode) for mode in MODES] + [peak(model, "full", ranks) for ranks in RANKS]
        cells = [f"**{peak / 2**30:,.0f}**" if peak <= USABLE * GPU else f"{peak / 2**30:,.0f}" for peak in peaks]
        lines.append(f"| {name} | {model.num_parameters() / 1e9:,.2f} · 10⁹ | " + " | ".join(cells) + " |")
    return lines


def cards() -> list[str]:
    """The table's lines: the first mode that fits each card, and the smallest card for an adapter."""
    heads = [*(f"{card} GB" for card in CARDS), f"`--lora-rank {RANK}` from"]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model, adapted = make(*shape), make(*shape, adapter=True)
        peaks = {f"`{mode}`": peak(model, mode) for mode in MODES}
        first = [next((mode for mode, most in peaks.items() if most <= USABLE * card * 1e9), "–") for card in CARDS]
        first.append(next((f"{card} GB" for card in CARDS if peak(adapted, "full") <= USABLE * card * 1e9), "–"))
        lines.append(f"| {name} | " + " | ".join(first) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(cards() if "--cards" in sys.argv else table()))
