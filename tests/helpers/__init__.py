"""A tiny real model and tokenizer, rows and pairs, and what else many tests share."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.data.batching import MicroBatch
from dpo_cli.data.pairs import Pair
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.utils.devices import CPU, KINDS, DeviceKind

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
torch.set_num_threads(1)  # the models are so small that more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for every process that a test starts


ROOT = Path(__file__).parents[2]
LONG = bool(os.environ.get("DPO_LONG"))  # set by ``make torture``
SAMPLE = ROOT / "sample_data"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def stand_in(monkeypatch: pytest.MonkeyPatch, kind: DeviceKind = CPU, **changes: Any) -> None:
    """Put the table's entry of another kind of device, or a changed one, in the place of the CPU's."""
    monkeypatch.setitem(KINDS, "cpu", replace(kind, **changes))


def token_logps(
    model: PreTrainedModel, batch: MicroBatch, dtype: torch.dtype = torch.float32, chunked_lm_head: bool = False
) -> torch.Tensor:
    """Log-probs (N,) of the response tokens of a batch on the model's device."""
    return ModelRunner(model, "padded", dtype, 0, model.device, chunked_lm_head).token_logps(batch)


def make_model(family: str = "llama", seed: int = 0, scale: float = 6.0, **config: Any) -> PreTrainedModel:
    """A small random model of a family whose log-probs differ strongly from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def sigmoid_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    margins: torch.Tensor | float = 0.0,
    weights: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The DPO loss of each pair as a run has it: (2P,), (2P,) -> (P,)."""
    pairs = Preferences(logps, ref_logps, torch.ones(len(logps)), logps, 1.0, margins, weights)
    return Objective(beta=beta, label_smoothing=label_smoothing)(pairs)


def bar_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing here as much as ask for a name; what was tried is in the list."""
    attempts: list[str] = []

    def barred(*arguments: Any, **_: Any) -> Any:
        attempts.append(str(arguments))
        raise OSError("no network here")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, barred)
    return attempts


def size(quick: int, long: int) -> int:
    """How many cases of a torture test: few in every run of the tests, many in ``make torture``."""
    return long if LONG else quick


@functools.cache
def trained_bpe() -> str:
    """A byte-level BPE trained on the sample data, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(SAMPLE / "train-strings.jsonl")], trainer)
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """That BPE with ChatML and its end-of-turn as EOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_bpe()),
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


def write_gguf(
    file: Path,
    tokenizer: PreTrainedTokenizerFast,
    split: str = "default",
    seed: int = 0,
    model: PreTrainedModel | None = None,
    kind: str = "q8_0",
) -> Path:
    """A tiny llama as a GGUF file, its tokenizer and template inside; matrices as ``kind`` has it.

    The rows of queries and keys of a ``model`` are in llama.cpp's order; those of the random one are taken to be.
    """
    permuted = model is not None
    model, writer = model or make_model(seed=seed, hidden_size=64, num_hidden_layers=1), gguf.GGUFWriter(file, "llama")
    config, stored = model.config, gguf.GGMLQuantizationType[kind.upper()]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_context_length(2048)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(64)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(8)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(384)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, special = tokenizer.get_vocab(), {token["id"] for token in saved["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    writer.add_token_types([3 if i in special else 1 for i in range(len(ids))])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array, each = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if permuted and (count := next((n for part, n in heads.items() if part in name), 0)):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 2:
            array, each = gguf.quants.quantize(array, stored), stored
        writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_pairs(count: int, seed: int = 0, longest: int = 20, vocabulary: int = 384) -> list[Pair]:
    """Pairs of random ids; lengths from 1."""
    rng = np.random.default_rng(seed)

    def ids() -> Any:
        return rng.integers(3, vocabulary, rng.integers(1, longest + 1)).astype(np.int32)

    return [Pair(f"row {i}", ids(), ids(), ids()) for i in range(count)]


def cached_logps(folder: Path) -> dict[bytes, float]:
    """The log-probs in a folder of the reference cache, by response key; none of its files may be damaged."""
    from dpo_cli.reference.store import read_folder

    found: dict[bytes, float] = {}
    for keys, logps, _, _ in read_folder(folder, pytest.fail):
        found.update(zip(keys, logps.tolist(), strict=True))
    return found


Cli = Callable[..., subprocess.CompletedProcess[str]]


def cli_environment(cache: Path) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(cache), "OMP_NUM_THREADS": "1"}
