"""A tiny model of each kind goes through ``dpo train``: step 0 at ln 2, three steps, and a folder that generates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from tests.helpers import SAMPLE, TINY, make_model, write_gguf, write_rows

ALTERNATING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BALANCED = ("--router-aux-loss-coef", 0.01)
SHARED, PACKED, PADDED = "each prompt computed once for both responses", "packed rows, the prompt", "padded batches"
# Name: family, its config, the layout it gets, further options.
KINDS: dict[str, tuple[str, dict[str, Any], str, tuple[Any, ...]]] = {
    "mixture of experts": ("mixtral", MOE, SHARED, BALANCED),
    "many small experts": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 1}, SHARED, BALANCED),
    "experts, all layers": ("olmoe", EXPERTS, SHARED, BALANCED),
    "latent attention": (
        "deepseek_v3",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
        SHARED,
        (),
    ),
    "tied head": ("llama", {"tie_word_embeddings": True}, SHARED, ()),
    "untied head": ("llama", {"tie_word_embeddings": False}, SHARED, ()),
    "soft-capped": (
        "gemma2",
        ALTERNATING | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "final_logit_softcapping": 10.0},
        PACKED,
        (),
    ),
    "scaled head": ("cohere", {"logit_scale": 0.5}, SHARED, ()),
    "divided head": ("granite", {"logits_scaling": 2.0}, SHARED, ()),
    "sliding window": ("mistral", {"sliding_window": 7}, SHARED, ()),
    "windows in turn": ("gemma3_text", ALTERNATING, SHARED, ()),
    "attention sinks": ("gpt_oss", ALTERNATING | MOE, SHARED, BALANCED),
    "position biases": ("bloom", {"n_layer": 2, "n_head": 4}, PADDED, ()),
    "attention of its own": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, PACKED, ()),
    "state space": ("mamba", {"state_size": 8, "scale": 3.0}, PADDED, ()),
    "state space and attention in turn": (
        "jamba",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 8, "scale": 3.0},
        PADDED,
        (),
    ),
    "state space beside attention": ("falcon_h1", HEADS | {"mamba_d_ssm": 64, "scale": 3.0}, PADDED, ()),
    "linear attention": (
        "qwen3_next",
        EXPERTS
        | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 32}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "scale": 3.0},
        PADDED,
        (),
    ),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"], "scale": 3.0}, PADDED, ()),
    "images too, text alone": (
        "gemma3",
        {"text_config": TINY | ALTERNATING, "vision_config": VISION | {"image_size": 28, "patch_size": 14}}
        | {"mm_tokens_per_image": 4},
        SHARED,
        (),
    ),
    "more embeddings than tokens": ("llama", {"vocab_size": 448}, SHARED, ()),
}
BEST_ADAPTER = {"many small experts", "tied head", "state space beside attention"}  # whose best/ is tried too
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:12]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [json.loads(line) for line in lines])


@pytest.fixture
def train(rows: Path, tmp_path: Path) -> Train:
    def run(model: Path, *more: Any) -> Any:
        common = ("--model", model, "--data", rows, "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run")
        steps = ("--max-steps", 3, "--batch-size", 4, "--lr", 1e-4, "--max-length", 400)
        return CliRunner().invoke(app, ["train", *map(str, (*common, *steps, *more))])

    return run


def logps(model: Any) -> Tensor:
    """Of each token of some text given those before it: nats."""
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0]


def generates(folder: Path) -> bool:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return bool(model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1])


def after_step(start: Path, run: Path, step: int) -> Tensor:
    """``logps`` of the start model with the weights of a checkpoint, whatever the exports hold."""
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    if (checkpoint / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, checkpoint)
    else:
        odd = model.load_state_dict(load_file(checkpoint / "weights.safetensors"), strict=False)
        assert not odd.unexpected_keys
    return logps(model)


def exported(start: Path, folder: Path) -> Tensor:
    """``logps`` of what plain transformers and peft load from a folder."""
    if (folder / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        return logps(PeftModel.from_pretrained(base, folder))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return logps(model)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*is_gradient_checkpointing")  # of the models' own code
@pytest.mark.parametrize("kind", KINDS)
def test_trains_exports_and_generates(
    kind: str, train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    family, config, layout, more = KINDS[kind]
    start, run = tmp_path / "model", tmp_path / "run"
    make_model(family, **config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    best = ("--eval-fraction", 0.25, "--kl", "none", "--save-best", "loss", "--lr", 1e-2)
    result = train(start, *more, *best)
    assert result.exit_code == 0, result.output
    assert layout in result.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    # tiny models with large weights: a response's log-prob of some 700 nats has steps of 6e-5, which beta takes to 6e-6
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=3e-6)
    assert len(steps) == 3 and all(("aux_loss" in line) == bool(more) for line in steps)
    check_exports(start, run)
    assert generates(run / "model")

    few = best if kind in BEST_ADAPTER else ("--lr", 1e-2)
    result = train(start, "--lora-rank", 4, *few, "--output", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    check_exports(start, tmp_path / "lora")
    merge = ("merge", "--model", tmp_path / "lora", "--output", tmp_path / "merged")
    assert CliRunner().invoke(app, [*map(str, merge)]).exit_code == 0
    assert (exported(start, tmp_path / "merged") - after_step(start, tmp_path / "lora", 3)).abs().max() < 1e-4


def check_exports(start: Path, run: Path) -> None:
    """model/ is the last checkpoint, and not the start; best/ is the model of the lowest held-out loss."""
    before, last = logps(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)), after_step(start, run, 3)
    assert (last - before).abs().max() > 1e-3
    assert (exported(start, run / "model") - last).abs().max() < 1e-4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    assert (run / "best").exists() == bool(held_out) and held_out.keys() <= {0, 3}
    if held_out:
        best = last if held_out[3] < held_out[0] else before
        assert (exported(start, run / "best") - best).abs().max() < 1e-4


def test_a_gguf_file(train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """It is dequantised, trained, and exported as any other model."""
    write_gguf(tmp_path / "tiny.Q8_0.gguf", tokenizer)
    result = train(tmp_path / "tiny.Q8_0.gguf")
    assert result.exit_code == 0, result.output
    assert (
        "tiny.Q8_0.gguf, 8-bit copy (Q8_0), dequantised" in result.stderr
        and "step 0      loss 0.693147" in result.stderr
    )
    folder = tmp_path / "run" / "model"
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    answer = AutoModelForCausalLM.from_pretrained(folder).generate(torch.arange(5, 9)[None], max_new_tokens=2)
    assert answer.shape[1] > 4


def test_a_model_stored_in_float16(train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its weights are read as float32, and trained and written so."""
    make_model().half().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    result = train(tmp_path / "model")
    assert result.exit_code == 0 and "weights and moments float32" in result.stderr
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert generates(tmp_path / "run" / "model")


def test_float16_is_no_precision_to_compute_in(tiny: Path, train: Train) -> None:
    result = train(tiny, "--dtype", "float16")
    assert result.exit_code == 2
    assert "--dtype float16: must be one of: auto, float32, bfloat16 (float16 overflows" in result.stderr


def test_a_tokenizer_with_more_tokens_than_embeddings(
    train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = train(tmp_path / "model")
    assert result.exit_code == 2
    assert "and the model knows 300: they do not fit" in result.stderr and "resize_token_embeddings" in result.stderr


OTHERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    | {f"{part}_{what}": 32 for part in ("encoder", "decoder") for what in ("ffn_dim",)}
    | {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "llava": {"text_config": {"model_type": "llama", **TINY}, "vision_config": VISION | {"image_size": 28}},
}


@pytest.mark.parametrize("family", OTHERS)
def test_what_is_no_causal_language_model_is_refused(
    family: str, train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **({"vocab_size": 384} if family != "llava" else {}), **OTHERS[family])
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = train(tmp_path / "model")
    assert result.exit_code == 2, result.output
    assert "no causal language model" in result.stderr
    assert len(result.stderr) < 1500, "a list of all that transformers knows helps nobody"
