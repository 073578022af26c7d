"""Models to measure with, and how much arithmetic their forwards are.

    python -m benchmarks.trl.shapes llama-1b FOLDER

writes random weights of a known shape as bfloat16 safetensors, with the tests' small tokenizer, whose ids fit any of
them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.data.pairs import Pair
from dpo_cli.models.loading import load_model, load_tokenizer
from dpo_cli.models.locate import find_model

ROOT = Path(__file__).parents[2]
_LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


def make_shape(name: str, folder: Path) -> None:
    """Random weights and a tokenizer in ``folder``; on the GPU where there is one, as it draws faster."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import make_model, make_tokenizer

    make_tokenizer().save_pretrained(folder)
    if name == "tiny":
        make_model(max_position_embeddings=8192).save_pretrained(folder)
        return
    config = AutoConfig.for_model("llama", max_position_embeddings=8192, **_LLAMA, **SHAPES[name])
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def ready_model(model: str | None, shape: str | None, folder: Path) -> Path:
    """A folder of safetensors that both sides load in the same way: the model's own, or one written here."""
    if shape == "tiny":
        make_shape(shape, folder)
        return folder
    if shape:  # in a process of its own, which gives its memory back
        subprocess.run([sys.executable, "-m", "benchmarks.trl.shapes", shape, str(folder)], cwd=ROOT, check=True)
        return folder
    source = find_model(model)
    if Path(source.path).is_dir() and not source.gguf and not source.adapter:
        return Path(source.path)
    load_model(source).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Arithmetic:
    """What a model's forward multiplies: parameters of body and head, and layers times width of its attention."""

    body: int
    head: int
    attention: int

    @classmethod
    def of(cls, folder: Path) -> Arithmetic:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = config.vocab_size * config.hidden_size
        embeddings = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        body = sum(p.numel() for p in model.parameters()) - head * len(embeddings)
        return cls(body, head, config.num_hidden_layers * config.num_attention_heads * size)

    def flops(self, pairs: Iterable[Pair], backward: bool) -> float:
        """Floating-point operations that these pairs need, each prompt once, the head on responses only.

        A multiplication of a token with a parameter is 2 forward and 4 backward; a query and a key of one layer are 4
        and 8 by width.
        """
        tokens = responses = scores = 0
        for pair in pairs:
            p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
            tokens, responses = tokens + p + c + r, responses + c + r
            scores += (p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2  # causal; rejected sees the prompt too
        forward = 2 * self.body * tokens + 2 * self.head * responses + 4 * self.attention * scores
        return (3 if backward else 1) * forward


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a square matrix product, the best of some: 8192 wide on a GPU, 2048 elsewhere."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def measure_device(dtype: str, device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Name of the card and operations a second of a matrix product.

    On CUDA from a process that ends: this one is to hold none of the card's memory.
    """
    if device == "cpu":
        return {"card": "", "matmul_rate": matmul_rate(getattr(torch, dtype), torch.device(device))}
    command = [sys.executable, "-m", "benchmarks.trl.shapes", dtype]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        make_shape(sys.argv[1], Path(sys.argv[2]))
    else:
        rate = matmul_rate(getattr(torch, sys.argv[1]), torch.device("cuda"))
        print(json.dumps({"card": torch.cuda.get_device_name(), "matmul_rate": rate}))
