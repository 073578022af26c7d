"""Packed checkpoints: dequantized as by hand, or refused with a way out that works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.loading import load_model
from dpo_cli.models.locate import find_model
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, make_model, make_tokenizer

IDS = torch.arange(3, 40)[None]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
UNPACKED = "the model that it was made from"
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])  # of FP4, by code


def change(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def pack_fp8(name: str, x: Tensor, block: int = 16) -> tuple[dict[str, Tensor], Tensor] | None:
    if not name.endswith("proj.weight"):
        return None
    rows, columns = x.shape
    blocks = x.view(rows // block, block, columns // block, block)
    scales = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    plain = packed.float() * scales[:, None, :, None]
    return {name: packed.view(rows, columns), f"{name}_scale_inv": scales}, plain.view(rows, columns)


def pack_fp8_whole(name: str, x: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """One scale a weight, with one of its inputs beside it."""
    if not name.endswith("proj.weight"):
        return None
    scale = x.abs().max() / 448
    packed = (x / scale).to(torch.float8_e4m3fn)
    stored = {name: packed, f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(0.5)}
    return stored, packed.float() * scale


def pack_mxfp8(name: str, x: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """The exponents of blocks of 32 in a row."""
    if not name.endswith("proj.weight"):
        return None
    blocks = x.unflatten(1, (-1, 32))
    exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 8
    packed = (blocks / 2**exponents).clamp(-448, 448).to(torch.float8_e4m3fn)  # torch 2.11 does not saturate
    stored = {name: packed.flatten(1), f"{name}_scale_inv": (exponents[..., 0] + 127).to(torch.uint8)}
    return stored, (packed.float() * 2**exponents).flatten(1)


def pack_mxfp4(name: str, x: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
    """Experts (E, in, out) as blocks (E, out, in/32, 16) of two codes a byte, and their exponents."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    experts, rows, columns = x.shape
    blocks = x.transpose(1, 2).reshape(experts, columns, rows // 32, 32)
    exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
    codes = ((blocks / 2**exponents)[..., None] - VALUES).abs().argmin(-1)
    plain = (VALUES[codes] * 2**exponents).view(experts, columns, rows).transpose(1, 2).contiguous()
    both = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    return {f"{name}_blocks": both, f"{name}_scales": (exponents[..., 0] + 127).to(torch.uint8)}, plain


def both(
    folder: Path, pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor] | None], values: Any, **model: Any
) -> tuple[Path, Path]:
    """A model packed, and the same dequantized by hand."""
    packed, plain = folder / "packed", folder / "plain"
    make_model(**model).save_pretrained(plain)
    make_tokenizer().save_pretrained(plain)
    shutil.copytree(plain, packed)
    change(packed, quantization_config=values, dtype="bfloat16")
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, x in load_file(plain / "model.safetensors").items():
        stored, dequantized = pack(name, x) or ({name: x.bfloat16()}, x.bfloat16().float())
        tensors[0].update(stored)
        tensors[1][name] = dequantized
    for each, path in zip(tensors, (packed, plain), strict=True):
        save_file(each, path / "model.safetensors", metadata={"format": "pt"})
    return packed, plain


def make_gpt_oss(folder: Path) -> tuple[Path, Path]:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    layers = ["sliding_attention", "full_attention"]
    return both(folder, pack_mxfp4, MXFP4, family="gpt_oss", scale=4.0, layer_types=layers, **experts)


def make_fp8(folder: Path) -> tuple[Path, Path]:
    return both(folder, pack_fp8, FP8, family="qwen3")


def make_fp8_experts(folder: Path) -> tuple[Path, Path]:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return both(folder, pack_fp8, FP8, family="qwen3_moe", **sizes)


def make_fp8_whole(folder: Path) -> tuple[Path, Path]:
    values = FP8 | {"activation_scheme": "static", "weight_block_size": None}
    return both(folder, pack_fp8_whole, values, family="qwen3")


def make_mxfp8(folder: Path) -> tuple[Path, Path]:
    values = FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    return both(folder, pack_mxfp8, values, family="qwen3")


MAKERS = [make_gpt_oss, make_fp8, make_fp8_experts, make_fp8_whole, make_mxfp8]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> list[Any]:
    """The options of a short training, but for its model."""
    lines = (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:4]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return ["--data", tmp_path / "rows.jsonl", "--max-length", 128]


def run(folder: Path, command: str, *arguments: Any) -> tuple[int, str]:
    common = ["--cache-dir", folder / "cache"] if command != "merge" else []
    result = CliRunner().invoke(app, [str(a) for a in (command, *arguments, *common)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def done(*arguments: Any) -> str:
    code, told = run(*arguments)
    assert code == 0, told
    return told


def refused(*arguments: Any) -> str:
    """The one line of a refusal before any data is read."""
    code, told = run(*arguments)
    *before, line = told.splitlines()
    assert code == 2 and line.startswith("error: ") and not re.search("^(data|error)", "\n".join(before), re.M), told
    return line


def check_export(folder: Path) -> None:
    """It loads whole and computes what it says: nothing of it is packed."""
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert all(t.dtype == torch.float32 for t in load_file(folder / "model.safetensors").values())
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_dequantized_is_what_it_is_by_hand(make: Any, tmp_path: Path) -> None:
    sources = [find_model(str(path)) for path in make(tmp_path)]
    packed, plain = (load_model(source) for source in sources)
    assert not packed.is_quantized and not hasattr(packed, "hf_quantizer")
    assert "quantization_config" not in json.dumps(packed.config.to_dict(), default=str)
    own, expected = packed.state_dict(), plain.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    one, other = (fingerprint(m, hash_weights(m), "packed", torch.float32) for m in (packed, plain))
    assert one == other
    packed.save_pretrained(tmp_path / "saved")
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys()
        == load_file(tmp_path / "plain" / "model.safetensors").keys()
    )
    check_export(tmp_path / "saved")


@pytest.mark.parametrize("make", MAKERS[:3])
def test_a_dequantized_model_is_trained_as_a_plain_one(make: Any, tmp_path: Path, rows: list[Any]) -> None:
    packed, plain = make(tmp_path)
    runs = tmp_path / "of-packed", tmp_path / "of-plain"
    for model, folder in zip((packed, plain), runs, strict=True):
        told = done(tmp_path, "train", "--model", model, *rows, "--lr", "1e-4", "--output", folder)
        assert ("dequantized to float32" in told) == (model == packed)
    assert "reference   4 of 4 pairs cached" in told
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    check_export(runs[0] / "model")


def test_an_adapter_is_merged_into_the_dequantized_model(tmp_path: Path, rows: list[Any]) -> None:
    packed, plain = make_gpt_oss(tmp_path)
    more = ("--lora-rank", 4, "--lr", "1e-2", "--export", "merged")
    done(tmp_path, "train", "--model", packed, *rows, *more, "--output", tmp_path / "run")
    (adapter,) = (tmp_path / "run" / "checkpoints").iterdir()
    told = done(tmp_path, "merge", "--model", adapter, "--output", tmp_path / "merged")
    assert "stored as MXFP4, dequantized to float32" in told
    base = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(base | {"base_model_name_or_path": str(plain)}))
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    before = expected(IDS).logits
    expected.load_adapter(str(adapter))
    for folder in (tmp_path / "run" / "model", tmp_path / "merged"):
        check_export(folder)
        found = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        torch.testing.assert_close(found, expected(IDS).logits, rtol=0, atol=1e-3)
    assert (found - before).abs().max() > 0.1


REFUSED = {
    "gptq": GPTQ,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "of-2031": {"quant_method": "of-2031"},
    "in a way that its config.json does not name": "gptq",
    "in a way that its config.json does not name ": ["gptq"],
    "in a way that its config.json does not name  ": {},
    "in a way that its config.json does not name   ": {"quant_method": ["gptq"]},
    "FP8": FP8 | {"weight_block_size": "128"},
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_model("qwen3").save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("name", REFUSED)
def test_other_packed_models_are_refused(name: str, plain: Path, tmp_path: Path, rows: list[Any]) -> None:
    packed = change(shutil.copytree(plain, tmp_path / "packed"), quantization_config=REFUSED[name])
    for more in ((), ("--lora-rank", 4), ("--dry-run",)):
        told = refused(tmp_path, "train", "--model", packed, *rows, *more)
        assert told.startswith(f"error: --model {packed}: it is packed ({name.strip()})")
        assert told.endswith(f"; name {UNPACKED}") and "install" not in told


def test_every_command_refuses_and_the_way_out_works(plain: Path, tmp_path: Path, rows: list[Any]) -> None:
    packed = change(shutil.copytree(plain, tmp_path / "packed"), quantization_config=GPTQ)
    (packed / "README.md").write_text(f"---\nbase_model:\n- {plain}\n---\n\n# Packed\n")
    way_out = f"name {UNPACKED} (model card: {plain})"
    for command in ("train", "eval", "precompute-ref", "sweep"):
        more = (
            ("--beta", 0.1, "--beta", 0.2, "--eval-data", rows[1], "--output", tmp_path / "s")
            if command == "sweep"
            else ()
        )
        told = refused(tmp_path, command, "--model", packed, *rows, *more)
        assert f"--model {packed}: it is packed (gptq)" in told and told.endswith(way_out)
    for command in ("train", "eval"):
        told = refused(tmp_path, command, "--model", plain, "--ref-model", packed, *rows)
        assert told.startswith(f"error: --ref-model {packed}: it is packed (gptq)") and told.endswith(way_out)
    named = re.findall(r"model card: (\S+)\)", told)
    done(tmp_path, "train", "--model", *named, *rows, "--lora-rank", 4, "--output", tmp_path / "run")
    file = tmp_path / "run" / "model" / "adapter_config.json"
    adapter = json.loads(file.read_text())
    file.write_text(json.dumps(adapter | {"base_model_name_or_path": str(packed)}))
    told = refused(tmp_path, "merge", "--model", file.parent, "--output", tmp_path / "merged")
    assert f"its base {packed} is packed (gptq)" in told and told.endswith("with --base-model"), told
    done(tmp_path, "merge", "--model", file.parent, "--base-model", named[0], "--output", tmp_path / "merged")


def test_what_is_packed_inside_a_larger_model_is_seen(plain: Path, tmp_path: Path, rows: list[Any]) -> None:
    text = {"text_config": {"quantization_config": GPTQ}}
    packed = change(shutil.copytree(plain, tmp_path / "packed"), **text, _name_or_path="someone/Plain-1B")
    told = refused(tmp_path, "train", "--model", packed, *rows)
    assert told.endswith(f"name {UNPACKED} (config.json: someone/Plain-1B)")
    done(tmp_path, "train", "--model", change(plain, quantization_config=None), *rows, "--dry-run")


def test_blocks_that_transformers_would_place_wrongly_are_refused(tmp_path: Path, rows: list[Any]) -> None:
    """Two blocks of 48 rows over 64: it would take 32 rows each."""
    packed, _ = make_fp8(tmp_path)
    change(packed, quantization_config=FP8 | {"weight_block_size": [48, 16]})
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:2].contiguous()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    assert "do not divide a weight" in refused(tmp_path, "train", "--model", packed, *rows)


def test_scales_that_nothing_reads_are_no_plain_model(tmp_path: Path) -> None:
    packed, _ = make_fp8(tmp_path)
    change(packed, quantization_config=None)
    with pytest.raises(UsageError, match=r"its weights are packed, and nothing reads model\.layers\.0.*_scale_inv"):
        load_model(find_model(str(packed)))


# ---- bitsandbytes -----------------------------------------------------------------------------------------------


def test_bitsandbytes_without_its_package_names_what_is_missing(
    plain: Path, tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.models.quantized.is_bitsandbytes_available", lambda: False)
    for packing in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}):
        packed = change(plain, quantization_config=packing)
        told = refused(tmp_path, "train", "--model", packed, *rows)
        assert "needs the package bitsandbytes (pip install -U bitsandbytes); or name the model" in told


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bitsandbytes_is_dequantized(bits: str, plain: Path, tmp_path: Path, rows: list[Any]) -> None:
    """It trains whole and by an adapter, which is merged, and what is exported is plain."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
    config = BitsAndBytesConfig(**(asked if bits == "4bit" else {"load_in_8bit": True}))
    given: Any = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": "cpu"}
    packed = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(plain, **given).save_pretrained(packed)
    make_tokenizer().save_pretrained(packed)
    before = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, device_map="cpu")
    expected = before.dequantize(torch.float32).float()(IDS).logits
    torch.testing.assert_close(load_model(find_model(str(packed)))(IDS).logits, expected, rtol=0, atol=1e-4)
    told = done(tmp_path, "train", "--model", packed, *rows, "--output", tmp_path / "whole")
    assert "stored as bitsandbytes, dequantized to float32" in told
    check_export(tmp_path / "whole" / "model")
    more = ("--lora-rank", 4, "--lr", "1e-2", "--export", "merged", "--output", tmp_path / "run")
    done(tmp_path, "train", "--model", packed, *rows, *more)
    check_export(tmp_path / "run" / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(IDS).logits
    assert (found - expected).abs().max() > 0.1
    (adapter,) = (tmp_path / "run" / "checkpoints").iterdir()
    done(tmp_path, "merge", "--model", adapter, "--output", tmp_path / "merged")
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(t, exported[n]) for n, t in load_file(tmp_path / "merged" / "model.safetensors").items())
    done(tmp_path, "train", "--resume", tmp_path / "run")


def test_plain_weights_under_a_config_of_bitsandbytes_are_refused(plain: Path) -> None:
    pytest.importorskip("bitsandbytes")
    change(plain, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UsageError, match=r"is not packed, though its config\.json says so"):
        load_model(find_model(str(plain)))
