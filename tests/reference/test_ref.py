"""``--ref-model``: a reference other than the start policy, which scores, goes, and is never taken for the policy."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.data.schedule import build_schedule, step_pairs
from dpo_cli.training import prepare
from tests.helpers import make_model, random_pairs
from tests.helpers.adapters import CLOSE, Place, make_place, plain_logps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Place:
    """Where ``run`` has the reference ``other``, of another size and seed than the start policy."""
    place = make_place(tmp_path_factory.mktemp("ref"), tokenizer)
    make_model(seed=7, hidden_size=48, num_hidden_layers=3).save_pretrained(place.folder / "other")
    tokenizer.save_pretrained(place.folder / "other")
    place.result, place.told = place.train("run", "--ref-model", place.folder / "other")  # type: ignore[attr-defined]
    return place


def test_step_0_says_where_policy_and_reference_start(place: Place) -> None:
    told, before = place.told, place.result["before"]  # type: ignore[attr-defined]
    assert "(policy and reference are two models, up to " in told and "check passed" not in told
    assert abs(before["loss"] - 0.693147) > 1e-3 and before["kl/chosen"] > 0.1
    models = (place.model, place.folder / "other")
    policy, reference = (plain_logps(AutoModelForCausalLM.from_pretrained(m), place.held_out()) for m in models)
    margins = 0.1 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    assert before["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert before["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-4)


def test_the_manifest_names_it_and_an_evaluation_uses_it(place: Place) -> None:
    manifest = json.loads((place.folder / "run" / "manifest.json").read_text())
    assert manifest["reference"]["model"] == str(place.folder / "other")
    assert manifest["start"]["model"] == str(place.model)
    assert manifest["start"]["fingerprint"] != manifest["reference"]["fingerprint"]
    reference = plain_logps(AutoModelForCausalLM.from_pretrained(place.folder / "other"), place.held_out())
    for model in ("run", "run/checkpoints/step-000002"):
        for more in ((), ("--kl", "none")):
            torch.testing.assert_close(place.per_pair(place.folder / model, *more)[:, 2:], reference, **CLOSE)
    after, found = place.result["after"], place.evaluated(place.folder / "run")  # type: ignore[attr-defined]
    assert {name: found[name] for name in after} == pytest.approx(after, abs=1e-5)  # the exact KL among them


@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)])
def test_a_cache_that_was_filled_ahead_needs_no_forward(lora: tuple[Any, ...], place: Place) -> None:
    shutil.rmtree(place.folder / "cache")
    for file in ("rows", "held-out"):
        place.done("precompute-ref", "--model", place.folder / "other", "--data", place.folder / f"{file}.jsonl")
    _, told = place.train(f"again{len(lora)}", "--ref-model", place.folder / "other", *lora)
    assert "reference   18 of 18 pairs cached: nothing to score" in told and told.count("pairs cached") == 1


def test_it_is_gone_before_the_policy_is_loaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    held: list[int] = []
    original = prepare.load_model

    def watched(source: Any) -> PreTrainedModel:
        alive = [model for there in loaded if (model := there()) is not None]
        held.append(sum(tensor.untyped_storage().nbytes() for model in alive for tensor in model.parameters()))
        model = original(source)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(prepare, "load_model", watched)
    place.train("watched", "--ref-model", place.folder / "other", "--max-steps", 1)
    assert held == [0, 0]


def test_a_resumed_run_keeps_its_reference(place: Place, tmp_path: Path) -> None:
    run = shutil.copytree(place.folder / "run", tmp_path / "run")
    shutil.rmtree(run / "model")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    code, _, told = place.run("train", "--resume", run)
    assert code == 0 and "after step 2 of 6" in told, told
    assert (run / "metrics.jsonl").read_text() == (place.folder / "run" / "metrics.jsonl").read_text()
    code, _, told = place.run("train", "--resume", run, "--ref-model", place.model)
    assert code == 2 and f"cannot change --ref-model {place.model}" in told


@pytest.mark.parametrize(
    ("changed", "told"), [("other", "the reference changed"), ("model", "the start model changed")]
)
def test_a_model_that_changed_is_not_gone_on_with(
    changed: str, told: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    place = make_place(tmp_path, tokenizer)
    shutil.copytree(place.model, tmp_path / "other")
    make_model(seed=3, tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    place.train("run", "--ref-model", tmp_path / "other", "--max-steps", 1)
    make_model(seed=4, tie_word_embeddings=True).save_pretrained(tmp_path / changed)
    code, _, message = place.run("train", "--resume", tmp_path / "run")
    assert code == 2 and f"{told} since the run began" in message


def test_an_adapter_may_be_measured_from_its_base(place: Place) -> None:
    """As when a policy that was fine-tuned already is to stay near the model before that."""
    place.train("lora", "--lora-rank", 4)
    result, told = place.train("on", "--lora-rank", 4, "--ref-model", place.model, model=place.folder / "lora")
    assert "two models" in told and result["before"]["rewards/margins"] > 0.1
    base = plain_logps(AutoModelForCausalLM.from_pretrained(place.model), place.held_out())
    torch.testing.assert_close(place.per_pair(place.folder / "on")[:, 2:], base, **CLOSE)


def test_the_start_policy_by_name_is_what_it_is_without(place: Place) -> None:
    result, told = place.train("itself", "--ref-model", place.model)
    assert "step 0      loss 0.693147" in told and "check passed" in told
    assert result["before"]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_other_tokens_are_refused_by_name(place: Place, tokenizer: PreTrainedTokenizerFast) -> None:
    other = shutil.copytree(place.folder / "other", place.folder / "odd")
    changed = AutoTokenizer.from_pretrained(other)
    changed.add_tokens(["<|odd|>"])
    changed.save_pretrained(other)
    message = place.refused("--ref-model", other)
    assert "its tokenizer differs from the policy's: '<|odd|>' is token 384 there and no token here" in message


def test_other_heads_have_no_exact_kl(place: Place, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of one family, some sizes have more rows than tokens."""
    make_model(vocab_size=400).save_pretrained(place.folder / "padded")
    tokenizer.save_pretrained(place.folder / "padded")
    message = place.refused("--ref-model", place.folder / "padded")
    assert "its head has 400 tokens and the policy's 384, so there is no exact KL: add --kl none" in message
    place.train("padded-run", "--ref-model", place.folder / "padded", "--kl", "none")


def test_a_reference_that_is_not_there_is_told_as_such(place: Place) -> None:
    assert "--ref-model ./none: no such folder" in place.refused("--ref-model", "./none")


def test_the_pairs_that_are_scored_are_those_of_the_plan() -> None:
    pairs = random_pairs(10)
    shape: dict[str, Any] = {"batch_size": 3, "epochs": 2, "seed": 5}
    for most in (None, 1, 4, 5, 99):
        plan = build_schedule(pairs, "shared", **shape, max_steps=most, max_tokens=9, world_size=1)
        steps = step_pairs(pairs, **shape, max_steps=most)
        assert [sorted(i for each in step for i in each) for step in plan] == [sorted(step) for step in steps]
