"""An export is read back before it counts: what is wrong with it is said, and what text does not read stays."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models import adapter_files
from tests.helpers import SAMPLE, TINY, make_model

IDS = torch.arange(5, 69)[None]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LAYERS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
LATENT |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
Train = Callable[..., Any]


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Train:
    rows = (SAMPLE / "train-strings.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))

    def run(model: PreTrainedModel | None, *more: Any) -> Any:
        if model is not None:
            model.save_pretrained(tmp_path / "start")
            tokenizer.save_pretrained(tmp_path / "start")
        options = ("--data", tmp_path / "pairs.jsonl", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run")
        few = ("--max-steps", 2, "--batch-size", 4, "--lr", 1e-3)
        return CliRunner().invoke(app, ["train", "--model", *map(str, (tmp_path / "start", *options, *few, *more))])

    return run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "it has no weights for model.layers.1.mlp.up_proj",
        ),
        (lambda tensors: tensors["model.norm.weight"].mul_(1.1), "other log-probs than in memory, by "),
        (lambda tensors: tensors.update(more=torch.ones(2)), "nothing reads its weights more"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--lora-rank", 4, "--export", "merged")])
def test_a_wrong_export_is_said_and_the_checkpoint_kept(
    change: Callable[[dict[str, torch.Tensor]], Any],
    told: str,
    more: tuple[Any, ...],
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, save = make_model("llama"), PreTrainedModel.save_pretrained
    model.save_pretrained(tmp_path / "start")

    def spoiled(self: PreTrainedModel, folder: Any, **options: Any) -> None:
        save(self, folder, **options)
        if Path(folder) != tmp_path / "start":
            tensors = load_file(Path(folder) / "model.safetensors")
            change(tensors)
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    result = train(model, *more)
    message = result.stderr.replace("\n", " ")
    assert result.exit_code == 1 and told in message and "The trained weights are in " in message, result.output
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()
    monkeypatch.undo()
    resumed = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert resumed.exit_code == 0 and (tmp_path / "run" / "model").exists(), resumed.output


def test_an_adapter_is_merged_where_no_layer_attends(train: Train, tmp_path: Path) -> None:
    """The cache of transformers raises in a forward of such a model."""
    result = train(make_model("lfm2", scale=3.0, layer_types=["conv", "conv"]), "--lora-rank", 4, "--export", "merged")
    assert result.exit_code == 0 and (tmp_path / "run" / "model" / "model.safetensors").exists(), result.output


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_no_temporary_folder_is_named_where_an_adapter_cannot_be_loaded_again(
    export: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any, folder: Path) -> None:
        raise ValueError(f"{folder}/adapter_model.safetensors is broken")

    monkeypatch.setattr(adapter_files, "put_adapter", broken)
    result = train(make_model("llama"), "--lora-rank", 4, "--export", export)
    message = result.stderr[result.stderr.index("error: ") :]
    assert result.exit_code == 1 and ".tmp" not in message and tempfile.gettempdir() + "/tmp" not in message, message
    assert "adapter_model.safetensors is broken" in message and "The trained weights are in " in message
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()


def test_two_matrices_are_untied_whatever_the_config_says(train: Train, tokenizer: Any, tmp_path: Path) -> None:
    """A config that ties them, as some SFT tools leave it: transformers 4 would take the embedding for the head."""
    model = make_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "start")
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "start" / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(tmp_path / "start")
    result = train(None)
    assert result.exit_code == 0, result.output
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert config_of(tmp_path / "run" / "model")["tie_word_embeddings"] is False
    adapter = ("--lora-rank", 4, "--modules-to-save", "lm_head", "--export", "merged", "--output", tmp_path / "adapter")
    result = train(None, *adapter)
    assert result.exit_code == 0, result.output
    written = load_file(tmp_path / "adapter" / "model" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], model.state_dict()["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_what_the_class_does_not_load_is_kept(train: Train, tokenizer: Any, tmp_path: Path) -> None:
    """DeepSeek-V3's layer for predicting several tokens, which transformers passes over."""
    make_model("deepseek_v3", **LATENT).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    tensors = load_file(tmp_path / "start" / "model.safetensors")
    beside = {
        "model.layers.61.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.61.enorm.weight": torch.ones(32),
    }
    save_file(tensors | beside, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    result = train(None)
    assert result.exit_code == 0, result.output
    assert (
        "2 tensors of the checkpoint are not part of the model (eh_proj, enorm); a whole export keeps them"
        in result.stderr
    )
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert written.keys() == tensors.keys() | beside.keys()
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in beside.items()
    )


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "llava"])
def test_a_model_that_reads_images_is_exported_whole(family: str, train: Train, tmp_path: Path) -> None:
    text = TINY | (LAYERS if family == "gemma3" else {"model_type": {"mistral3": "mistral", "llava": "llama"}[family]})
    kinds = {
        "gemma3": {},
        "mistral3": {"model_type": "pixtral", "head_dim": 8},
        "llava": {"model_type": "clip_vision_model"},
    }
    config = {"text_config": text, "vision_config": VISION | kinds[family]}
    if family == "gemma3":
        config["mm_tokens_per_image"] = 4
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(family, **config))
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "preprocessor_config.json").write_text('{"size": 28}')
    result = train(model)
    assert result.exit_code == 0, result.output
    assert "not read by text, not trained, exported as they are: model.multi_modal_projector, model." in result.stderr
    folder, before = tmp_path / "run" / "model", load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert after.keys() == before.keys() and changed
    assert not any("vision" in name or "projector" in name for name in changed)
    assert config_of(folder)["architectures"] == [type(model).__name__]
    assert (folder / "preprocessor_config.json").read_text() == '{"size": 28}'
    again, info = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"]


@pytest.mark.parametrize(("stored", "asked", "dtype"), [
    (torch.float32, "bfloat16", torch.bfloat16),
    (torch.bfloat16, "auto", torch.bfloat16),
    (torch.float16, "auto", torch.float16),
    (torch.bfloat16, "float32", torch.float32),
])  # fmt: skip
def test_the_precision_of_an_export(
    stored: torch.dtype, asked: str, dtype: torch.dtype, train: Train, tmp_path: Path
) -> None:
    result = train(make_model("llama", tie_word_embeddings=True).to(stored), "--export-dtype", asked)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run" / "model"
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype} and "lm_head.weight" not in tensors
    assert config_of(folder)["dtype"] == str(dtype).removeprefix("torch.")
    exact = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in tensors.items())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def test_ropes_that_transformers_4_has_no_names_for(train: Train, tmp_path: Path) -> None:
    config = LAYERS | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384, "global_head_dim": 8}
    result = train(make_model("gemma4_text", scale=3.0, num_kv_shared_layers=0, **config))
    assert result.exit_code == 0, result.output
    assert "transformers 4 has no names for the rotary embeddings" in result.stderr.replace("\n", " ")
    folder = tmp_path / "run" / "model"
    assert "rope_theta" not in config_of(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    start.load_state_dict(
        load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors"), strict=False
    )
    assert torch.equal(logits(again), logits(start))


def test_the_disk_space_is_estimated(train: Train, tmp_path: Path) -> None:
    """Two checkpoints of 12 bytes a parameter, one more while it is written, and a model of 4."""
    result = train(make_model("llama", vocab_size=60_000), "--save-steps", 1, "--save-total-limit", 1)
    assert result.exit_code == 0, result.output
    parameters = make_model("llama", vocab_size=60_000).num_parameters()
    told = float(result.stderr.split("disk        about ")[1].split(" GiB")[0])
    assert told == pytest.approx(parameters * (2 * 12 + 4) / 2**30, abs=0.06) and told > 0.05
    held = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert held <= told * 2**30 * 1.05
