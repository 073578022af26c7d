"""Adapters of other tools: what is scored, trained, exported and merged is what plain peft computes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.models.adapter_files import CONFIG, WEIGHTS, described
from dpo_cli.models.locate import find_model
from dpo_cli.training.prepare import read_pairs
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, make_model, make_tokenizer, write_rows
from tests.helpers.adapters import Place, plain_logps

NATS = {"rtol": 0, "atol": 1e-4}
ATTENTION = ["q_proj", "v_proj"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
ADDED = ["<tool>", "</tool>"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where rows are; ``tied``, ``untied`` and ``moe`` are models."""
    place = Place(tmp_path_factory.mktemp("files"))
    for name, tied in (("tied", True), ("untied", False)):
        save(make_model("qwen2", tie_word_embeddings=tied), place.folder / name)
    save(make_model("qwen3_moe", **MOE), place.folder / "moe")
    lines = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:4]]
    for row in lines:
        row["chosen"] = f" {ADDED[0]}{row['chosen']}{ADDED[1]}"
    write_rows(place.folder / "rows.jsonl", lines)
    write_rows(place.folder / "held-out.jsonl", lines)
    return place


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)


def load(base: Path, tokens: int | None = None) -> PreTrainedModel:
    """A base, with other rows at random where it gets more of them: plain peft does not need ours."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        torch.manual_seed(9)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def by_peft(base: Path, adapter: Path, tokens: int | None = None) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(load(base, tokens), adapter)
    return adapted.base_model.model


def make_adapter(folder: Path, base: Path, config: Any, tokens: int | None = None, added: bool = False) -> Path:
    """A trained adapter, saved by peft; with ``tokens`` of a base that was resized, whose new rows are trained too."""
    model = load(base, tokens)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        torch.manual_seed(1)
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
        adapted.save_pretrained(folder)
    tokenizer = make_tokenizer()
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base))
    return folder


def change(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ATTENTION, **values})


def pairs_of(here: Place, model: Path) -> list[Pair]:
    """The rows as a model's tokenizer reads them."""
    asked = PrecomputeOptions(data=[str(here.folder / "held-out.jsonl")], cache_dir=here.folder / "cache")
    return [*read_pairs(asked.data, asked, AutoTokenizer.from_pretrained(model), Reporter(quiet=True)).pairs]


def check_training(here: Place, base: Path, adapter: Path, name: str, tokens: int | None = None) -> Path:
    """Train an adapter further, and compare reference, policy and export with plain peft; returns the run."""
    _, told = here.train(name, "--lora-rank", 4, "--max-steps", 2, model=adapter)
    assert "step 0      loss 0.693147" in told
    run, pairs = here.folder / name, pairs_of(here, adapter)
    found = here.per_pair(run)
    torch.testing.assert_close(found[:, 2:], plain_logps(by_peft(base, adapter, tokens), pairs), **NATS)
    torch.testing.assert_close(found[:, :2], plain_logps(by_peft(base, run / "model", tokens), pairs), **NATS)
    assert (found[:, :2] - found[:, 2:]).abs().max() > 0.1
    return run


def check_merging(here: Place, base: Path, adapter: Path, name: str, tokens: int | None = None) -> Path:
    """Merge an adapter, and evaluate it, and compare with plain peft; returns the merged model's folder."""
    expected = plain_logps(by_peft(base, adapter, tokens), pairs_of(here, adapter))
    here.done("merge", "--model", adapter, "--output", here.folder / name)
    merged = AutoModelForCausalLM.from_pretrained(here.folder / name)
    torch.testing.assert_close(plain_logps(merged, pairs_of(here, adapter)), expected, **NATS)
    torch.testing.assert_close(here.per_pair(adapter)[:, :2], expected, **NATS)
    return here.folder / name


# ---- kinds ------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16}, "lora_dropout": 0.5},
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "some layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.layers\.1\..*(q_proj|v_proj)"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias of B": {"lora_bias": True},
    "norms": {"modules_to_save": ["norm"]},
    "no targets": {"target_modules": None},
}
ENDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "dora on both": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [6, 300]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_lora_is_what_peft_computes(kind: str, here: Place) -> None:
    base, adapter = here.folder / "untied", here.folder / f"sft {kind}"
    make_adapter(adapter, base, lora(**KINDS[kind]))
    check_training(here, base, adapter, f"on {kind}")
    check_merging(here, base, adapter, f"merged {kind}")


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("kind", ENDS)
def test_embedding_and_head_of_an_adapter_are_what_peft_computes(kind: str, tied: str, here: Place) -> None:
    """Merged into a tied model, they are two matrices where the adapter parted them, and else one."""
    base, adapter = here.folder / tied, here.folder / f"sft {kind} {tied}"
    make_adapter(adapter, base, lora(**ENDS[kind]))
    check_training(here, base, adapter, f"on {kind} {tied}")
    merged = check_merging(here, base, adapter, f"merged {kind} {tied}")
    one = tied == "tied" and kind == "tokens"
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == one
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) != one


def test_experts_of_an_adapter_are_what_peft_computes(here: Place) -> None:
    base, adapter = here.folder / "moe", here.folder / "sft-experts"
    make_adapter(adapter, base, lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    run = check_training(here, base, adapter, "on-experts")
    check_merging(here, base, adapter, "merged-experts")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, run / "model"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)


def test_experts_of_transformers_4_are_what_peft_computes(here: Place) -> None:
    """There they were modules, each with an adapter; peft fuses them."""
    base, adapter = here.folder / "moe", here.folder / "sft-modules"
    make_adapter(adapter, base, lora())
    change(adapter, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"])
    torch.manual_seed(2)
    weights = load_file(adapter / WEIGHTS)
    for layer in (0, 1):
        for expert in range(4):
            for name, (out, into) in {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}.items():
                module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                weights[f"{module}.lora_A.weight"] = torch.randn(4, into) * 0.1
                weights[f"{module}.lora_B.weight"] = torch.randn(out, 4) * 0.1
    save_file(weights, adapter / WEIGHTS)
    check_training(here, base, adapter, "on-modules")
    check_merging(here, base, adapter, "merged-modules")


# ---- tokens that were added -------------------------------------------------------------------------------------

GROWN: dict[str, dict[str, Any]] = {
    "saved": {},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [384, 385], "lm_head": [384, 385]}},
    "tokens alone": {"trainable_token_indices": {"embed_tokens": [384, 385], "lm_head": [384, 385]}},
    "tied saved": {},
    "tied tokens": {"trainable_token_indices": [384, 385]},
}


@pytest.mark.parametrize("kind", GROWN)
def test_tokens_that_an_adapter_added_are_in_what_it_becomes(kind: str, here: Place) -> None:
    """In ``tokens alone`` their rows are all that the file has of the embedding."""
    base, adapter = here.folder / ("tied" if kind.startswith("tied") else "untied"), here.folder / f"grown {kind}"
    make_adapter(adapter, base, lora(**GROWN[kind]), tokens=386, added=True)
    if kind == "tokens alone":
        weights = load_file(adapter / WEIGHTS)
        save_file({name: t for name, t in weights.items() if "base_layer" not in name}, adapter / WEIGHTS)
    run = check_training(here, base, adapter, f"on grown {kind}", 386)
    left_out = [
        "original_module",
        ".modules_to_save.",
        *(["lm_head.token_adapter.tr"] if kind == "tied tokens" else []),
    ]
    names = {n for n in load_file(adapter / WEIGHTS) if not any(part in n for part in left_out)}
    assert load_file(run / "model" / WEIGHTS).keys() == names
    merged = check_merging(here, base, adapter, f"merged grown {kind}", 386)
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 386
    result, told = here.train(f"full {kind}", "--max-steps", 1, model=adapter)
    assert "its base is resized to the 386 tokens that the adapter was trained with" in told
    assert AutoModelForCausalLM.from_pretrained(result["model"]).get_input_embeddings().weight.shape[0] == 386


def test_fewer_tokens_than_the_base_has(here: Place) -> None:
    """As those who resize a padded embedding to the tokenizer's length have them."""
    base, adapter = here.folder / "padded", here.folder / "shrunk"
    save(make_model("qwen2", vocab_size=400), base)
    make_adapter(adapter, base, lora(modules_to_save=["embed_tokens", "lm_head"]), tokens=384)
    check_merging(here, base, adapter, "merged-shrunk", 384)


@pytest.mark.parametrize("trained", [{}, {"trainable_token_indices": {"embed_tokens": [384, 385]}}])
def test_tokens_of_which_nothing_says_what_they_are_are_refused(trained: dict[str, Any], here: Place) -> None:
    """Until a base that has them is named."""
    base = here.folder / "untied"
    adapter = make_adapter(here.folder / f"lost{len(trained)}", base, lora(**trained), tokens=386, added=True)
    weights = load_file(adapter / WEIGHTS)
    kept = {n: t for n, t in weights.items() if "lora" in n or "delta" in n}
    save_file(kept, adapter / WEIGHTS)
    lacking = "lm_head.weight" if trained else "model.embed_tokens.weight and lm_head.weight"
    reason = f"the adapter has 386 tokens, its base 384, and nothing says what the 2 new rows of {lacking} are"
    for more in ((), ("--lora-rank", 4)):
        assert reason in here.refused(*more, model=adapter)
    for command, more in (
        ("merge", ("--output", here.folder / "never")),
        ("eval", ("--data", here.folder / "rows.jsonl")),
    ):
        assert reason in here.refused("--model", adapter, *more, command=command)
    resized = here.folder / f"resized{len(trained)}"
    save(load(base, 386), resized)
    name = f"found{len(trained)}"
    here.train(name, "--lora-rank", 4, "--base-model", resized, model=adapter)
    expected = plain_logps(by_peft(resized, adapter), pairs_of(here, adapter))
    torch.testing.assert_close(here.per_pair(here.folder / name)[:, 2:], expected, **NATS)


def test_a_base_whose_own_tokenizer_has_more_tokens_is_as_it_is(here: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<never>"])
    save(make_model("qwen2"), here.folder / "over", tokenizer)
    adapter = make_adapter(here.folder / "on-over", here.folder / "over", lora())
    tokenizer.save_pretrained(adapter)
    _, told = here.train("over-run", "--lora-rank", 4, model=adapter)
    assert "resized" not in told


# ---- configurations ---------------------------------------------------------------------------------------------


def nulls(adapter: Path) -> None:
    """Every key that can be is null."""
    values = json.loads((adapter / CONFIG).read_text())
    kept = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
    change(adapter, **{name: None for name in values if name not in kept})


def old(adapter: Path) -> None:
    """As peft 0.3 wrote them."""
    values = json.loads((adapter / CONFIG).read_text())
    names = "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha lora_dropout"
    names += " modules_to_save peft_type r target_modules task_type"
    old = {name: values[name] for name in names.split()}
    (adapter / CONFIG).write_text(json.dumps(old))


def unsloth(adapter: Path) -> None:
    parts = {"base_model_class": "Qwen2ForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    change(adapter, auto_mapping=parts, unsloth_version="2025.9.1", corda_config=None, eva_config=None, lora_alpha=8.0)


@pytest.mark.parametrize("write", [nulls, old, unsloth])
def test_keys_that_say_nothing_are_no_reason_to_refuse(write: Callable[[Path], None], here: Place) -> None:
    base, adapter = here.folder / "untied", here.folder / write.__name__
    make_adapter(adapter, base, lora())
    expected = plain_logps(by_peft(base, adapter), pairs_of(here, adapter))
    write(adapter)
    _, told = here.train(f"on-{write.__name__}", "--lora-rank", 4, model=adapter)
    assert "does not know" not in told
    torch.testing.assert_close(here.per_pair(here.folder / f"on-{write.__name__}")[:, 2:], expected, **NATS)
    torch.testing.assert_close(here.per_pair(adapter)[:, :2], expected, **NATS)
    code, _, told = here.run("train", "--resume", here.folder / f"on-{write.__name__}")
    assert code == 0, told


def test_keys_of_a_later_peft_are_told(here: Place) -> None:
    adapter = make_adapter(here.folder / "later", here.folder / "untied", lora())
    change(adapter, use_later={"scale": 2}, later_too=None, later_off=False)
    for more in ((), ("--lora-rank", 4)):
        told = here.done("train", *here.options("never", adapter), *more, "--dry-run")[1]
        assert 'does not know and ignores use_later: {"scale": 2}\n' in told


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "replication": (lora(), {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "aLoRA": (lora(), {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "unknown": (lora(), {"peft_type": "MIXLORA"}, "its peft_type is MIXLORA"),
    "corda": (lora(), {"init_lora_weights": "corda"}, "it began as corda"),
    "pissa": (lora(), {"init_lora_weights": "pissa"}, "it began as pissa, which changes its base; save it as a plain"),
    "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {}, "PROMPT_TUNING"),
    "of another size": (lora(), {"rank_pattern": {"q_proj": 5}}, "lora_A.weight is [4, 32], and of its base [5, 32]"),
    "of other modules": (lora(), {"target_modules": ["k_proj"]}, "of other modules: it has no model.layers.0"),
    "of less modules": (lora(), {"target_modules": ["q_proj"]}, "its base has no model.layers.0.self_attn.v_proj"),
    "of no modules": (lora(), {"target_modules": ["none"]}, "not found in the base model"),
    "of a wrong type": (lora(), {"r": "many"}, "'many'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_go_on_is_refused_in_plain_text(name: str, here: Place) -> None:
    config, values, told = BROKEN[name]
    adapter = make_adapter(here.folder / f"broken {name}", here.folder / "untied", config)
    change(adapter, **values)
    for more in ((), ("--lora-rank", 4)):
        message = here.refused(*more, model=adapter)
        assert told in message and "�" not in message
    assert str(adapter) in here.refused("--model", adapter, "--output", here.folder / "never", command="merge")


def test_another_kind_of_adapter_is_merged_by_peft(here: Place) -> None:
    """As the refusal says; the result is a model as any."""
    base, adapter = here.folder / "untied", here.folder / "sft-IA3"
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    make_adapter(adapter, base, ia3)
    for more in ((), ("--lora-rank", 4)):
        assert "merge it into its base with peft's merge_and_unload" in here.refused(*more, model=adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    save(merged, here.folder / "by-peft")
    here.train("on-IA3", "--lora-rank", 4, "--max-steps", 1, model=here.folder / "by-peft")


def test_the_way_out_of_replicated_layers(here: Place) -> None:
    """Peft computes them on the small base, and any LoRA's on one whose layers are its own."""
    base, deep, adapter = (here.folder / name for name in ("two", "three", "replicated"))
    save(make_model("llama"), base)
    make_adapter(adapter, base, lora(layer_replication=[[0, 2], [1, 2]]))
    expected = plain_logps(by_peft(base, adapter), pairs_of(here, adapter))
    own, layers = load_file(base / "model.safetensors"), make_model("llama", num_hidden_layers=3)
    for name in [name for name in own if ".layers.1." in name]:
        own[name.replace(".layers.1.", ".layers.2.")] = own[name]
    layers.load_state_dict(own)
    save(layers, deep)
    change(adapter, layer_replication=None)
    found = here.per_pair(adapter, "--base-model", deep)
    torch.testing.assert_close(found[:, :2], expected, **NATS)


def test_a_bias_that_has_no_place_in_the_base_cannot_be_merged(here: Place) -> None:
    """But trained further it can be."""
    base, adapter = here.folder / "untied", here.folder / "biased"
    make_adapter(adapter, base, lora(lora_bias=True, target_modules=["o_proj"]))
    assert "the base layer has no bias); train it further with --lora-rank" in here.refused(model=adapter)
    check_training(here, base, adapter, "on-biased")


# ---- bases that are elsewhere -----------------------------------------------------------------------------------


def explain(*arguments: Any) -> str:
    """All that ``dpo explain`` tells."""
    return CliRunner().invoke(app, ["explain", *map(str, arguments)]).output


@pytest.mark.parametrize("named", ["/of/another/machine", "C:\\base", "./base", "../base", "", None, 5, "org/base"])
def test_a_base_that_is_not_there_can_be_named(named: Any, here: Place) -> None:
    base, adapter = here.folder / "untied", here.folder / "moved"
    shutil.rmtree(adapter, ignore_errors=True)
    make_adapter(adapter, base, lora())
    expected = plain_logps(by_peft(base, adapter), pairs_of(here, adapter))
    change(adapter, base_model_name_or_path=named)
    data = ("--data", here.folder / "rows.jsonl")
    commands = {"merge": ("--output", here.folder / "moved-merged"), "eval": data, "precompute-ref": data}
    if named != "org/base":  # which asks the hub
        refused = [here.refused("--model", adapter, *more, command=name) for name, more in commands.items()]
        for told in (*refused, here.refused("--lora-rank", 4, model=adapter), explain("--model", adapter, *data)):
            assert "--base-model PATH_OR_NAME" in told and (not isinstance(named, str) or named in told), told
    if named != "/of/another/machine":
        return
    for command, more in commands.items():
        here.done(command, "--model", adapter, "--base-model", base, *more)
    assert "[rejected]" in explain("--model", adapter, "--base-model", base, *data)
    for name, more in {"moved-on": ("--lora-rank", 4), "moved-full": ()}.items():
        here.train(name, *more, "--base-model", base, model=adapter)
        run = here.folder / name
        torch.testing.assert_close(here.per_pair(run)[:, 2:], expected, **NATS)
        torch.testing.assert_close(here.per_pair(run / "checkpoints" / "step-000002")[:, 2:], expected, **NATS)
        shutil.rmtree(here.folder / "cache")  # so that the reference has to be loaded
        torch.testing.assert_close(here.per_pair(run)[:, 2:], expected, **NATS)
        shutil.rmtree(run / "model")
        assert here.run("train", "--resume", run)[0] == 0
        torch.testing.assert_close(here.per_pair(run)[:, 2:], expected, **NATS)


def test_the_base_of_a_run_that_moved_can_be_named(here: Place) -> None:
    """That of its reference, too, which is the base itself."""
    base = shutil.copytree(here.folder / "untied", here.folder / "before")
    here.train("of-moved", "--lora-rank", 4, model=base)
    run, expected = here.folder / "of-moved", here.per_pair(here.folder / "of-moved")
    base.rename(here.folder / "after")
    shutil.rmtree(here.folder / "cache")
    assert "--base-model PATH_OR_NAME" in here.refused(
        "--model", run, "--data", here.folder / "rows.jsonl", command="eval"
    )
    for model in (run, run / "checkpoints" / "step-000004"):
        found = here.per_pair(model, "--base-model", here.folder / "after")
        torch.testing.assert_close(found, expected, **NATS)


def test_a_base_of_no_adapter_is_refused(here: Place) -> None:
    base, data = here.folder / "untied", ("--data", here.folder / "rows.jsonl")
    told = f"--base-model {base}: --model {here.folder / 'tied'} is no adapter"
    assert told in here.refused("--base-model", base, model=here.folder / "tied")
    for command, more in {"eval": data, "precompute-ref": data, "merge": ("--output", "x")}.items():
        assert told in here.refused("--model", here.folder / "tied", "--base-model", base, *more, command=command)
    adapter = make_adapter(here.folder / "nested", base, lora())
    for more in (("--base-model", adapter), ("--base-model", here.folder / "none")):
        assert f"error: --base-model {more[1]}: " in here.refused(*more, model=adapter)
    assert "--base-model: the name is empty" in here.refused("--base-model", "", model=adapter)


def test_a_base_on_a_hub_that_does_not_answer(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(here.folder / "on-hub", here.folder / "untied", lora())
    change(adapter, base_model_name_or_path="unsloth/tiny-bnb-4bit")
    monkeypatch.setattr("dpo_cli.models.locate.unreachable", lambda: "it is offline")
    told = here.refused(model=adapter)
    assert f"--model {adapter}: its base model unsloth/tiny-bnb-4bit: the hub cannot be reached (it is offline)" in told
    assert "--base-model PATH_OR_NAME" in told


def test_a_pinned_revision_of_the_base_is_not_passed_over(tmp_path: Path) -> None:
    """The base at main would be another model."""
    (tmp_path / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "revision": "v1.2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"someone/base: is wanted at revision v1\.2; download that; --base-model"):
        find_model(str(tmp_path))


def test_defaults_of_peft_are_no_part_of_a_fingerprint() -> None:
    """A later version adds some: an adapter would be another model by it, and no run of it could be resumed."""
    model = make_model()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    assert set(json.loads(described(model))) == {"r", "lora_alpha", "target_modules"}
