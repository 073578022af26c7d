"""The exported folder as others meet it: its card, its generation config, a chat, and its way to the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, pipeline
from typer.testing import CliRunner

import dpo_cli.hub.push
import dpo_cli.training.loop
from dpo_cli.cli.app import app
from dpo_cli.data.sources import hub_id
from dpo_cli.evaluation.generation import generation_config
from dpo_cli.hub.model_card import MODEL_PLACEHOLDER, hub_name
from dpo_cli.models.loading import load_model
from dpo_cli.models.locate import DEFAULT_MODEL, PACKAGED, ModelSource, find_model
from tests.helpers import SAMPLE, make_model, random_pairs

Train = Callable[..., Any]


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    def run(*more: Any, model: Path = tiny, name: str = "first") -> Any:
        data = ("--data", SAMPLE / "train-strings.jsonl", "--model", model, "--cache-dir", tmp_path / "cache")
        steps = ("--max-steps", 2, "--batch-size", 4, "--lr", 1e-3, "--output", tmp_path / name)
        return CliRunner().invoke(app, ["train", *map(str, (*data, *steps, *more))])

    return run


# ---- the card ---------------------------------------------------------------------------------------------------


def test_the_card_tells_what_came_of_it(train: Train, tmp_path: Path) -> None:
    """The numbers are those of metrics.jsonl, and the library reads them back."""
    held_out = ("--eval-data", SAMPLE / "heldout-strings.jsonl", "--save-best", "loss")
    assert train(*held_out).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["step"] == 2 and "eval_loss" in line)
    for folder in ("model", "best"):
        card = ModelCard.load(tmp_path / "first" / folder / "README.md")
        assert f"| loss | 0.6931 | {last['eval_loss']:.4f} |" in card.text
        assert f"| implicit reward accuracy | 0.5000 | {last['eval_rewards/accuracies']:.4f} |" in card.text
        kl = f"{last['eval_kl/chosen']:.4f}"
        assert f"| KL to the reference on chosen responses, nats per token | 0.0000 | {kl} |" in card.text
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "dpo" in data["tags"] and "trl" not in data["tags"]
    assert "base_model" not in data and "datasets" not in data  # both are local
    assert "| beta | 0.1 |" in card.text and "vllm serve" in card.text and "convert_hf_to_gguf.py" in card.text


def test_the_card_names_what_is_on_the_hub(
    train: Train, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base model and licence as the base's own card says, which a copy of it brings along."""
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "README.md").write_text("---\nbase_model: org/first\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n")
    assert train(model=base).exit_code == 0
    data = ModelCard.load(tmp_path / "first" / "model" / "README.md").data.to_dict()
    assert (data["base_model"], data["license"]) == ("org/first", "apache-2.0")
    assert "model-index" not in data  # nothing was held out


def test_the_card_of_a_merged_model_keeps_base_and_licence(train: Train, tiny: Path, tmp_path: Path) -> None:
    """And neither card calls a loss without a reference DPO."""
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "README.md").write_text("---\nbase_model: org/first\nlicense: apache-2.0\n---\n# Base\n")
    assert train("--lora-rank", 2, "--loss", "simpo", model=base).exit_code == 0
    merged = ("merge", "--model", tmp_path / "first", "--output", tmp_path / "merged")
    assert CliRunner().invoke(app, [*map(str, merged)]).exit_code == 0
    for folder, library in ((tmp_path / "merged", "transformers"), (tmp_path / "first" / "model", "peft")):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert [data[k] for k in ("base_model", "license", "library_name")] == ["org/first", "apache-2.0", library]
        assert "loss simpo" in card.text and "Direct Preference" not in card.text and "dpo" not in data["tags"]
        assert str(tmp_path) not in card.content


@pytest.mark.parametrize("card", ["no metadata", "---\n{\n---\n", "---\nlicense: [a]\nbase_model: ../x\n---\n", "\xff"])
def test_a_strange_card_of_the_base_is_let_be(card: str, train: Train, tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "README.md").write_bytes(card.encode("latin-1"))
    assert train(model=base).exit_code == 0
    data = ModelCard.load(tmp_path / "first" / "model" / "README.md").data.to_dict()
    assert "license" not in data and "base_model" not in data


def test_names_on_the_hub_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows").mkdir()
    for typed, expected in (
        ("org/set", "org/set"),
        ("org/set:train", "org/set"),
        ("org/set:config/train", "org/set"),
        ("here/rows", None),
        ("here/rows:train", None),
        ("org/rows.jsonl", None),
        ("-", None),
        (str(tmp_path), None),
    ):
        assert hub_id(typed) == expected, typed
    assert hub_name(find_model("org/model")) == "org/model"
    assert hub_name(ModelSource("/cache/x", DEFAULT_MODEL, "told", gguf="x.gguf")) == DEFAULT_MODEL
    assert hub_name(ModelSource("/home/me/model", "model", "told")) is None


# ---- generation -------------------------------------------------------------------------------------------------


def make_text_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model whose answers end with the text alone."""
    model = make_model(eos_token_id=0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_chat_ends_with_its_turn(train: Train, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The end of turn ends an answer, though the base's config names the end of a text alone."""
    make_text_model(tmp_path / "base", tokenizer)
    assert train("--data", SAMPLE / "train.jsonl", model=tmp_path / "base").exit_code == 0
    config = GenerationConfig.from_pretrained(tmp_path / "first" / "model")
    assert config.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert config.pad_token_id == tokenizer.pad_token_id
    chat = pipeline("text-generation", str(tmp_path / "first" / "model"), device="cpu")
    answer = chat([{"role": "user", "content": "Hello."}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert [message["role"] for message in answer] == ["user", "assistant"]


def test_an_adapter_brings_the_end_of_turn_along(
    train: Train, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """To whoever evaluates it, goes on with it, or merges it."""
    make_text_model(tmp_path / "base", tokenizer)
    done = train("--data", SAMPLE / "train.jsonl", "--lora-rank", 2, model=tmp_path / "base")
    assert done.exit_code == 0, done.output
    ends = [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert load_model(find_model(str(tmp_path / "first"))).generation_config.eos_token_id == ends
    merged = ("merge", "--model", tmp_path / "first", "--output", tmp_path / "merged")
    assert CliRunner().invoke(app, [*map(str, merged)]).exit_code == 0
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == ends


@pytest.mark.filterwarnings("ignore:.*generation:UserWarning")
def test_a_generation_config_that_cannot_be_saved_is_mended(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make_model()
    for given, expected in (
        ({}, (False, None)),
        ({"temperature": 0.7}, (True, 0.7)),
        ({"temperature": 0.0, "do_sample": False}, (False, None)),
    ):
        model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **given)
        config = generation_config(model, tokenizer, random_pairs(3))
        config.save_pretrained(tmp_path)
        assert (bool(config.do_sample), config.temperature) == expected
        assert (config.eos_token_id, config.pad_token_id) == (2, 0)  # random ids end with no special token


# ---- the hub ----------------------------------------------------------------------------------------------------


class FakeHub:
    """Keeps what it is sent; ``fail`` names the call that raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.fail: dict[str, Exception] = {}

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self._call("create_repo")
        assert exist_ok
        self.private = private

    def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], commit_message: str) -> Any:
        self._call("create_commit")
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()
        self.message = commit_message
        return type("Done", (), {"repo_url": f"https://huggingface.co/{repo_id}"})

    def model_info(self, name: str) -> Any:
        self._call("model_info")
        return type("Info", (), {"private": self.private})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(dpo_cli.hub.push, "HfApi", lambda: fake)
    return fake


def test_a_pushed_run_is_its_model_and_nothing_else(hub: FakeHub, train: Train, tmp_path: Path, tiny: Path) -> None:
    assert train("--eval-fraction", 0.1).exit_code == 0
    local = content_of(tmp_path / "first")
    result = push(tmp_path / "first", "org/model", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["url"] == "https://huggingface.co/org/model"
    assert hub.private is True and json.loads(result.stdout)["private"] is True
    assert hub.calls == ["create_repo", "create_commit", "model_info"]
    exported = {path.name for path in (tmp_path / "first" / "model").iterdir()}
    assert set(hub.files) == exported
    for name, content in hub.files.items():
        for secret in (str(tmp_path), str(tiny), str(Path.home()), "train-strings"):
            assert secret.encode() not in content, name
    card = hub.files["README.md"].decode()
    assert "vllm serve org/model" in card and MODEL_PLACEHOLDER not in card and card.endswith("too.\n")
    assert content_of(tmp_path / "first") == local


def test_templates_below_the_model_are_pushed_and_hidden_files_are_not(hub: FakeHub, tmp_path: Path) -> None:
    for name in (
        "README.md",
        "tokenizer_config.json",
        "additional_chat_templates/tool.jinja",
        ".cache/a.json",
        "a.bin",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert push(tmp_path, "org/model").exit_code == 0
    assert hub.files.keys() == {"README.md", "tokenizer_config.json", "additional_chat_templates/tool.jinja"}


def content_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of the last change of each file."""
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def push(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


REFUSED: dict[str, tuple[Exception, int, str]] = {
    "no login": (LocalTokenNotFoundError("Token"), 2, "you are not logged in; run: hf auth login"),
    "offline": (OfflineModeIsEnabled("offline mode is enabled"), 1, "offline mode is enabled"),
    "may only read": (ConnectionError("403 Forbidden"), 1, "403 Forbidden\nTry again with: dpo push"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_told(case: str, hub: FakeHub, train: Train, tmp_path: Path) -> None:
    hub.fail["create_repo"], code, told = REFUSED[case]
    assert train().exit_code == 0
    result = push(tmp_path / "first", "org/model")
    assert result.exit_code == code and told in result.stderr, result.stderr
    assert "create_commit" not in hub.calls


def test_a_push_that_fails_says_how_to_try_again(hub: FakeHub, train: Train, tmp_path: Path) -> None:
    hub.fail = {"create_commit": ConnectionError("connection reset")}
    assert train().exit_code == 0
    result = push(tmp_path / "first", "me/model")
    again = f"dpo push {tmp_path / 'first'} me/model"
    assert result.exit_code == 1 and f"connection reset\nTry again with: {again}" in result.stderr
    hub.fail = {}
    done = CliRunner().invoke(app, [*again.split()[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["private"] is True and "model.safetensors" in hub.files


def test_push_says_what_it_cannot_push(hub: FakeHub, tmp_path: Path, train: Train) -> None:
    assert train().exit_code == 0
    for words, told in (
        ((tmp_path, "me/model"), "no trained model there"),
        ((tmp_path / "first", "model"), "must be ORG/NAME"),
    ):
        result = CliRunner().invoke(app, ["push", *map(str, words)])
        assert result.exit_code == 2 and told in result.stderr
    assert not hub.calls
    public = CliRunner().invoke(app, ["push", str(tmp_path / "first" / "model"), "me/model", "--public"])
    assert public.exit_code == 0 and hub.private is False


def test_an_adapter_goes_to_the_hub_if_its_base_is_there(hub: FakeHub, train: Train, tmp_path: Path) -> None:
    """Of a local base its configuration has the path, which nobody else could load."""
    told = "push a model of both: dpo merge"
    assert train("--lora-rank", 2).exit_code == 0
    file = tmp_path / "first" / "model" / "adapter_config.json"
    config = json.loads(file.read_text())
    for base in (config["base_model_name_or_path"], str(tmp_path / "gone"), PACKAGED, None, "", "org/base"):
        hub.calls.clear()
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        result = CliRunner().invoke(app, ["push", str(tmp_path / "first"), "me/model"])
        if base == "org/base":
            assert result.exit_code == 0, result.output
            assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == base
        else:
            assert result.exit_code == 2 and told in result.stderr and not hub.calls
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    del config["base_model_name_or_path"]
    file.write_text(json.dumps(config))
    result = push(tmp_path / "first", "me/model")
    assert result.exit_code == 2 and told in result.stderr and "names none" in result.stderr


def test_the_export_answers_as_the_model_in_memory(train: Train, tmp_path: Path) -> None:
    """What a server loads is what was trained: the pipeline's greedy tokens are the argmax of its own forward."""
    assert train().exit_code == 0
    chat = pipeline("text-generation", str(tmp_path / "first" / "model"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first" / "model")
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    found = chat("Hello there", max_new_tokens=1, do_sample=False, return_full_text=True)[0]["generated_text"]
    with torch.no_grad():
        best = chat.model(ids).logits[0, -1].argmax()
    assert found == tokenizer.decode([*ids[0], best], skip_special_tokens=True)
