"""What training takes of each GPU's memory, as ``dpo train`` reckons; prints the table of docs/scale.md.

``python -m benchmarks.memory.scale``, with ``--cards`` that of single cards: a minute on a CPU. The models have their
real sizes and no values, so what a forward keeps is counted on them as on a GPU; tests/training/test_trace.py compares
the estimate with the bytes of whole steps.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.models.adapters import new_adapter
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.parallel import Parallel
from dpo_cli.models.shapes import ShapesRunner, shapes_only
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training.memory import USABLE, StepBytes, count_bytes
from dpo_cli.training.optimizer import SPLIT_MODES
from dpo_cli.utils.cards import CARDS, standing_in

GPU = 80e9  # bytes
TOKENS = 4096  # of a forward
MODES = ("full", "split", "in-backward")
RANKS = (2, 4, 8, 16, 64)
SIZES = (12, 16, 24, 48, 80, 141)  # GB of cards
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
IDS = np.arange(3, 203, dtype=np.int32)
PAIRS = [Pair("long", IDS, IDS, IDS[:100]), Pair("short", IDS[:50], IDS[:60], IDS[:40])]


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
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PREFIX_SHARED, dtype=torch.float32)
    if adapter:
        model.to(torch.bfloat16)
        lora: Any = {"lora_rank": RANK, "lora_type": "lora", "lora_alpha": 2 * RANK}
        new_adapter(model, TrainOptions(data=["pairs.jsonl"], **lora), "")
    return model


class Counted:
    """A model and the bytes of its steps, with weights in float32 or split."""

    def __init__(self, shape: tuple[Any, ...], adapter: bool = False) -> None:
        with standing_in(CARDS["h100"]), shapes_only():
            self.model = make(*shape, adapter=adapter)
            runner = ShapesRunner(self.model, "shared", torch.bfloat16, TOKENS, torch.device("cpu"))
            self.at_head = min(TOKENS // 2, runner.max_logit_rows)
            self.whole: StepBytes = count_bytes(runner, PAIRS, 0)
            if not adapter:
                split_master_weights(self.model)
                self.split: StepBytes = count_bytes(runner, PAIRS, 0)

    def peak(self, mode: str, shards: int = 1) -> int:
        """Bytes of each GPU, with activations recomputed."""
        counted, forward = self.split if mode in SPLIT_MODES else self.whole, (TOKENS, self.at_head)
        if shards > 1:
            kept, outside, layer = (replace(each, fixed=0.0) for each in (counted.kept, counted.outside, counted.layer))
            gathered = Parallel(sharded=True).gathered_parameters(self.model)
            counted = replace(counted, kept=kept, outside=outside, layer=layer, shards=shards, gathered=gathered)
        return counted.peak(mode, True, forward, forward)


def table(names: Iterable[str] = SHAPES) -> list[str]:
    """The table's lines of these models: GiB of each GPU with activations recomputed, in bold where it fits."""
    heads = [*(f"`{mode}`" for mode in MODES), *(f"`--fsdp` over {ranks}" for ranks in RANKS)]
    lines = ["| model | parameters | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads))]
    for name in names:
        counted = Counted(SHAPES[name])
        peaks = [counted.peak(mode) for mode in MODES] + [counted.peak("full", ranks) for ranks in RANKS]
        cells = [f"**{peak / 2**30:,.0f}**" if peak <= USABLE * GPU else f"{peak / 2**30:,.0f}" for peak in peaks]
        lines.append(f"| {name} | {counted.whole.parameters / 1e9:,.2f} · 10⁹ | " + " | ".join(cells) + " |")
    return lines


def cards() -> list[str]:
    """The table's lines: the first mode that fits each card, and the smallest card for an adapter."""
    heads = [*(f"{card} GB" for card in SIZES), f"`--lora-rank {RANK}` from"]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, shape in SHAPES.items():
        counted, adapted = Counted(shape), Counted(shape, adapter=True).peak("full")
        peaks = {f"`{mode}`": counted.peak(mode) for mode in MODES}
        first = [next((mode for mode, most in peaks.items() if most <= USABLE * card * 1e9), "–") for card in SIZES]
        first.append(next((f"{card} GB" for card in SIZES if adapted <= USABLE * card * 1e9), "–"))
        lines.append(f"| {name} | " + " | ".join(first) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(cards() if "--cards" in sys.argv else table()))
