"""What must be scored again and what must not, and `dpo cache`."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import dpo_cli.models.fingerprint
import dpo_cli.reference.store
from dpo_cli.cli.app import app
from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data.batching import padded
from dpo_cli.data.pairs import Pairs
from dpo_cli.data.schedule import Layout
from dpo_cli.models.fingerprint import hash_weights
from dpo_cli.models.loading import load_model
from dpo_cli.models.locate import find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import pair_keys, read_folder, read_shard
from dpo_cli.training.prepare import read_pairs
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError
from dpo_cli.utils.files import file_lock
from tests.helpers import CHATML, ROOT, cached_logps, make_model, random_pairs, token_logps, write_rows
from tests.helpers.caches import NOISE, changed_config, changed_weight, dpo, fill, make_scorer, open_cache, shards

DAY = 24 * 60 * 60.0
LINES = {1, 2, 3, 4, 5, 6}  # of the file of rows; the last is a conversation of several turns, the fifth has a system
PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@dataclass(frozen=True)
class Place:
    """A model, six rows as messages, and the cache of their log-probs under that model."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def pairs(self, **options: Any) -> Pairs:
        asked = PrecomputeOptions(data=[str(self.rows)], **options)
        return read_pairs(asked.data, asked, AutoTokenizer.from_pretrained(self.model), Reporter(quiet=True)).pairs

    def common(self, *more: Any) -> list[str]:
        return [str(a) for a in ("--model", self.model, "--data", self.rows, "--cache-dir", self.cache, *more)]

    def precompute(self, *more: Any) -> dict[str, Any]:
        return dpo("precompute-ref", *self.common(*more))[0]

    def off(self, *more: Any) -> float:
        """How far the cached log-probs are from those that are computed now, in nats."""
        fresh = dpo("precompute-ref", *self.common(*more, "--cache-dir", self.folder / "fresh"))[0]
        tables = []
        for result in (self.precompute(*more), fresh):
            read = read_folder(Path(result["cache_dir"]))
            tables.append(
                {key: logp for keys, logps, *_ in read for key, logp in zip(keys, logps.tolist(), strict=True)}
            )
        shutil.rmtree(self.folder / "fresh")
        return max(abs(logp - tables[0][key]) for key, logp in tables[1].items())

    def told(self, command: str, *more: Any) -> str:
        """What a command tells a person."""
        return dpo(command, *self.common(*more))[1]

    def fails(self, *more: Any) -> tuple[int, str]:
        """The exit code of a precompute, and what it told."""
        result = CliRunner().invoke(app, ["precompute-ref", *self.common(*more)])
        return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, train_rows: list[dict[str, Any]]
) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    make_model(vocab_size=400).save_pretrained(place.model)  # some more than the tokenizer has
    tokenizer.save_pretrained(place.model)
    write_rows(place.rows, [train_rows[i] for i in (0, 1, 2, 3, 4, 23)])
    assert place.precompute()["misses"] == len(LINES)
    return place


@pytest.fixture
def place(tmp_path: Path, begun: Place) -> Place:
    """A copy of a place whose cache has all that its rows need."""
    return Place(shutil.copytree(begun.folder, tmp_path / "place"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the pairs stand that were scored."""
    found: list[str] = []
    original = ModelRunner.forwards

    def telling(self: ModelRunner, pairs: Any, compute: Any, *share: Any) -> Iterator[Any]:
        for result in original(self, pairs, compute, *share):
            if compute.__qualname__.startswith("_score"):
                found.extend(pairs[i].where for i in result[0])
            yield result

    monkeypatch.setattr(ModelRunner, "forwards", telling)
    return found


def lines_of(scored: list[str]) -> list[int]:
    return sorted(int(where.rpartition(":")[2]) for where in scored)


def edit(file: Path, change: Callable[[], Any]) -> None:
    """Change a file in place; its size must not change, and its time of change is set back."""
    before = file.stat()
    change()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def other_weights() -> bytes:
    """Of another model of the same shape, as a file."""
    return save(make_model(seed=1, vocab_size=400).state_dict(), metadata={"format": "pt"})


def put_other_weights(place: Place) -> None:
    """Write them over those that are there."""
    content = other_weights()

    def change() -> None:
        with place.weights.open("r+b") as stream:  # not cut short first, for it is mapped into memory
            stream.write(content)

    edit(place.weights, change)


def put_other_weights_in_place_of(place: Place) -> None:
    """As libraries save: under another name at first. What has the old file open goes on reading that."""
    file = place.folder / "other"
    file.write_bytes(other_weights())
    file.replace(place.weights)


def make_adapter(place: Place, name: str = "adapter", scale: float = 1.0) -> Path:
    """A LoRA adapter for the place's model; its B are of this scale."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(place.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers renamed
        model = get_peft_model(
            base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        )
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if "lora_B" in parameter:
                tensor.normal_(0, scale)
    model.save_pretrained(str(place.folder / name))
    config = json.loads((place.folder / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place.model)
    return place.folder / name


def nudge_adapter(adapter: Path) -> None:
    """One number of one B, by a thousandth."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)].view(-1)[3] *= 1.001
    edit(file, lambda: file.write_bytes(save(tensors, metadata={"format": "pt"})))


# ---- what must be scored again ----------------------------------------------------------------------------------


def longest(place: Place) -> int:
    """Tokens of the longest of the rows' prompts and responses."""
    return max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in place.pairs())


# Each makes one change to a place and returns the arguments that go with it, and the lines of the rows concerned.
Change = Callable[[Place, pytest.MonkeyPatch], tuple[list[Any], set[int]]]


def a_shorter_length(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in place.pairs()]
    allowed = sorted(lengths)[3]
    return ["--max-length", allowed], {line for line, length in enumerate(lengths, 1) if length > allowed}


def a_prompt_cut_on_the_left(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    """It gives way to a longer response, at a length that cut nothing before."""
    length = longest(place)
    rows = place.read()
    rows[5]["rejected"][0]["content"] += " And then there is more to say." * 8
    write_rows(place.rows, rows)
    return ["--max-length", length], {6}


def the_template(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    """By one token behind each turn."""
    file = place.model / "chat_template.jinja"
    assert file.read_text() == CHATML
    file.write_text(CHATML.replace("<|im_end|>\\n", "<|im_end|>\\n\\n"))
    return [], LINES


def a_system_prompt(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    rows = place.read()
    assert rows[1]["prompt"][0]["role"] == "user"
    rows[1]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    write_rows(place.rows, rows)
    return [], {2}


def an_added_token(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    assert tokenizer.add_tokens(["paper"]) == 1
    tokenizer.save_pretrained(place.model)
    concerned = {line for line, row in enumerate(place.rows.read_text().splitlines(), 1) if "paper" in row}
    assert 0 < len(concerned) < len(LINES)
    return [], concerned


def the_tokenizer(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    """It knows one merge less, of those that every row has."""
    file = place.model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop(0)
    file.write_text(json.dumps(content))
    return [], LINES


def one_weight(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    changed_weight("model.layers.1.mlp.down_proj.weight", 77)(place.model)
    return [], LINES


def rope_theta(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    changed_config("rope_theta", 10001.0)(place.model)
    return [], LINES


def rms_norm_eps(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    changed_config("rms_norm_eps", 1.1e-6)(place.model)
    return [], LINES


def the_precision(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    return ["--dtype", "bfloat16"], LINES


def forced(layout: Layout) -> Callable[..., tuple[ModelRunner, str]]:
    def choose(model: PreTrainedModel, _: Pairs, max_tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
        return ModelRunner(model, layout, dtype, max_tokens, device), "forced"

    return choose


def the_attention(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    patch.setattr("dpo_cli.training.prepare.choose_layout", forced("packed"))
    return [], LINES


def an_adapter(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    return ["--model", make_adapter(place)], LINES


def another_adapter(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    adapter = make_adapter(place)
    assert place.precompute("--model", adapter)["misses"] == len(LINES)
    nudge_adapter(adapter)
    return ["--model", adapter], LINES


def a_row(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    """Of the same size and with the same time of change."""
    rows = place.read()
    content = rows[2]["chosen"][0]["content"]
    rows[2]["chosen"][0]["content"] = ("X" if content[0] != "X" else "Y") + content[1:]
    edit(place.rows, lambda: write_rows(place.rows, rows))
    return [], {3}


def another_model_at_the_same_path(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    """Of the same size and with the same time of change."""
    assert place.precompute()["misses"] == 0
    put_other_weights(place)
    return [], LINES


def the_scoring_version(place: Place, patch: pytest.MonkeyPatch) -> tuple[list[Any], set[int]]:
    patch.setattr("dpo_cli.models.fingerprint.SCORING_VERSION", dpo_cli.models.fingerprint.SCORING_VERSION + 1)
    return [], LINES


MISSES: list[Change] = [
    a_shorter_length,
    a_prompt_cut_on_the_left,
    the_template,
    a_system_prompt,
    an_added_token,
    the_tokenizer,
    one_weight,
    rope_theta,
    rms_norm_eps,
    the_precision,
    the_attention,
    an_adapter,
    another_adapter,
    a_row,
    another_model_at_the_same_path,
    the_scoring_version,
]


@PEFT
@pytest.mark.parametrize("change", MISSES, ids=lambda change: change.__name__)
def test_what_changes_a_number_is_scored_again(
    place: Place, scored: list[str], monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    """The rows concerned and no others; nothing of what was kept before is lost, and what is new is kept beside it."""
    arguments, concerned = change(place, monkeypatch)
    kept = {shard: shard.read_bytes() for shard in shards(place.cache)}
    scored.clear()
    result = place.precompute(*arguments)
    assert lines_of(scored) == sorted(concerned)
    assert (result["hits"], result["misses"]) == (len(LINES) - len(concerned), len(concerned))
    assert {shard: shard.read_bytes() for shard in shards(place.cache) if shard in kept} == kept
    scored.clear()
    assert place.precompute(*arguments)["misses"] == 0 and scored == []
    assert place.off(*arguments) < NOISE


def test_a_prompt_that_was_cut_is_another_prompt(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen response, which nobody touched, has its log-prob behind the longer prompt and behind the shorter."""
    before = place.pairs()[5]
    arguments, _ = a_prompt_cut_on_the_left(place, monkeypatch)
    uncut, cut = place.pairs()[5], place.pairs(max_length=arguments[1])[5]
    assert uncut.prompt.tolist() == before.prompt.tolist() and len(cut.prompt) < len(before.prompt)
    assert uncut.chosen.tolist() == before.chosen.tolist() == cut.chosen.tolist()
    place.precompute()
    kept = cached_logps(only_reference(place))
    assert len(kept) == 12 + 1
    place.precompute(*arguments)
    kept = cached_logps(only_reference(place))
    assert len(kept) == 12 + 1 + 2
    old, new = (pair_keys(pair)[0] for pair in (before, cut))
    assert abs(kept[old] - kept[new]) > NOISE


def test_attention_matters_where_the_model_computes_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts shared it is ours, whichever the model would have."""

    def misses(layout: str, attention: str) -> int:
        def load(source: Any) -> PreTrainedModel:
            model = load_model(source)
            model.set_attn_implementation(attention)
            return model

        with monkeypatch.context() as patch:
            patch.setattr("dpo_cli.training.prepare.load_model", load)
            if layout != "shared":
                patch.setattr("dpo_cli.training.prepare.choose_layout", forced(layout))
            return int(place.precompute()["misses"])

    assert misses("shared", "sdpa") == misses("shared", "eager") == 0
    others = [("packed", "eager"), ("packed", "sdpa"), ("padded", "sdpa")]
    assert [misses(*other) for other in others] == [6, 6, 6]
    assert [misses(*other) for other in others] == [0, 0, 0]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
"""


def test_code_that_comes_with_a_model_decides_its_numbers(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the same weights and the same config."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    file = place.model / "config.json"
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = json.loads(file.read_text()) | {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    file.write_text(json.dumps(config))
    for scale in ("0.9", "0.8"):
        (place.model / "modeling_own.py").write_text(CODE.replace("SCALE", scale))
        assert place.precompute("--trust-remote-code")["misses"] == len(LINES)
        assert place.precompute("--trust-remote-code")["misses"] == 0
        assert place.off("--trust-remote-code") < NOISE


@PEFT
def test_an_adapters_numbers_are_those_of_the_adapter(place: Place) -> None:
    """As peft computes them without merging, token by token, each response alone; far from those of its base."""
    from peft import PeftModel

    adapter = make_adapter(place)
    folder = Path(place.precompute("--model", adapter)["cache_dir"])
    keys, logps, tokens, lengths = read_shard(shards(folder)[0])
    found = dict(zip(keys, tokens.split(lengths.tolist()), strict=True))
    base = cached_logps(next(f for f in (place.cache / "reference").iterdir() if f != folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), adapter).eval()
    for pair in place.pairs():
        for key, response in zip(pair_keys(pair), (pair.chosen, pair.rejected), strict=True):
            with torch.no_grad():
                expected = token_logps(model, padded([(pair.prompt, response)]), torch.float32)
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-4)
            assert abs(base[key] - float(logps[keys.index(key)])) > 0.1
    merged = load_model(find_model(str(adapter)))
    assert all(p.requires_grad for p in merged.parameters())  # peft freezes the base, and training goes on from it


# ---- what must not be scored again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        ("--beta", 0.7),
        ("--lr", 1e-3),
        ("--seed", 11),
        ("--batch-size", 2),
        ("--epochs", 3),
        ("--max-steps", 1),
        ("--label-smoothing", 0.2),
        ("--weight-decay", 0.1),
        ("--eval-fraction", 0.5),
        ("--max-tokens", 300),
        ("--gradient-checkpointing",),
    ],
    ids=lambda option: option[0],
)
def test_how_one_trains_changes_no_reference(place: Place, scored: list[str], option: tuple[Any, ...]) -> None:
    result, told = dpo("train", *place.common(*option), "--dry-run", "--output", place.folder / option[0])
    assert "pairs cached: nothing to score" in told
    assert result["reference_misses"] == 0 and scored == []


def test_training_reads_what_was_precomputed(place: Place) -> None:
    """Another beta, rate, seed, batch size, order and output, in a run that is not a dry one."""
    options = ("--beta", 0.4, "--lr", 1e-3, "--seed", 5, "--batch-size", 4, "--output", place.folder / "run")
    assert "6 of 6 pairs cached: nothing to score" in place.told("train", *options)


def renamed(place: Place) -> tuple[list[Any], set[int]]:
    place.rows.rename(place.folder / "other.jsonl")
    place.rows.symlink_to(place.folder / "other.jsonl")
    return [], set()


def shuffled(place: Place) -> tuple[list[Any], set[int]]:
    rows = place.read()
    write_rows(place.rows, [rows[i] for i in (3, 0, 5, 1, 4, 2)])
    return [], set()


def appended(place: Place) -> tuple[list[Any], set[int]]:
    row = place.read()[0] | {"chosen": [{"role": "assistant", "content": "Both."}]}
    write_rows(place.rows, [*place.read(), row])
    return [], {7}


def copied(place: Place) -> tuple[list[Any], set[int]]:
    return ["--model", shutil.copytree(place.model, place.folder / "elsewhere" / "copy")], set()


def a_length_that_cuts_nothing(place: Place) -> tuple[list[Any], set[int]]:
    return ["--max-length", longest(place)], set()


def smaller_forwards(place: Place) -> tuple[list[Any], set[int]]:
    return ["--max-tokens", 300], set()


def what_else_a_config_says(place: Place) -> tuple[list[Any], set[int]]:
    """Another program saved the model, in a precision that is not computed in, and to generate otherwise."""
    file = place.model / "config.json"
    other = {"transformers_version": "5.0.0", "dtype": "bfloat16", "use_cache": False, "architectures": ["LlamaModel"]}
    config = json.loads(file.read_text())
    assert config.keys() >= other.keys()
    file.write_text(json.dumps(config | other))
    (place.model / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    return [], set()


def an_adapter_that_adds_nothing(place: Place) -> tuple[list[Any], set[int]]:
    """As every adapter begins: with B = 0 it is its base."""
    return ["--model", make_adapter(place, scale=0.0)], set()


def as_strings(place: Place) -> tuple[list[Any], set[int]]:
    """The same ids, from rows that were rendered before."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in place.read()
    ]
    write_rows(place.rows, rows)
    return [], set()


HITS = [
    renamed,
    shuffled,
    appended,
    copied,
    a_length_that_cuts_nothing,
    smaller_forwards,
    what_else_a_config_says,
    an_adapter_that_adds_nothing,
    as_strings,
]


@PEFT
@pytest.mark.parametrize("change", HITS, ids=lambda change: change.__name__)
def test_what_changes_no_number_is_not_scored_again(place: Place, scored: list[str], change: Any) -> None:
    """But for a row that is new."""
    arguments, new = change(place)
    result = place.precompute(*arguments)
    assert (result["hits"], result["misses"], lines_of(scored)) == (len(LINES), len(new), sorted(new))
    assert place.off(*arguments) < NOISE


# ---- a reference is known by the content of its files ------------------------------------------------------------


def touch(place: Place) -> None:
    os.utime(place.weights)


def touch_with_its_own_times(place: Place) -> None:
    edit(place.weights, lambda: None)


def replace_by_a_copy(place: Place) -> None:
    copy = place.folder / "copy"
    shutil.copy2(place.weights, copy)
    copy.replace(place.weights)


def edit_the_config(place: Place) -> None:
    """Of the same size and with the same time of change: a weight's name could depend on it."""
    file = place.model / "config.json"
    edit(file, lambda: file.write_text(file.read_text().replace('"use_cache": true', '"use_cache":true ')))


def add_a_file(place: Place) -> None:
    (place.model / "model-00002.safetensors").write_bytes(place.weights.read_bytes())


@pytest.mark.parametrize(
    ("change", "misses"),
    [
        (put_other_weights, 6),
        (touch, 0),
        (touch_with_its_own_times, 0),
        (replace_by_a_copy, 0),
        (edit_the_config, 0),
        (add_a_file, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_may_be_others_are_hashed_again(place: Place, change: Callable[[Place], None], misses: int) -> None:
    assert place.precompute()["misses"] == 0
    change(place)
    assert place.precompute()["misses"] == misses
    assert place.precompute()["misses"] == 0


def test_the_same_files_elsewhere_are_the_same_reference(place: Place) -> None:
    place.precompute()
    moved = place.model.rename(place.folder / "moved")
    assert place.precompute("--model", moved)["misses"] == 0


@PEFT
def test_an_adapter_is_hashed_with_its_base(place: Place) -> None:
    """Another where either changes."""
    adapter = make_adapter(place)
    for change, misses in (
        (lambda: None, 6),
        (lambda: None, 0),
        (lambda: nudge_adapter(adapter), 6),
        (lambda: put_other_weights(place), 6),
        (lambda: None, 0),
    ):
        change()
        assert place.precompute("--model", adapter)["misses"] == misses


def test_files_that_change_while_they_are_loaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded has the first one's log-probs; the next start has the second one's."""

    def load(source: Any) -> PreTrainedModel:
        model = load_model(source)
        put_other_weights_in_place_of(place)
        return model

    with monkeypatch.context() as patch:
        patch.setattr("dpo_cli.training.prepare.load_model", load)
        assert place.precompute()["misses"] == 0
    assert place.precompute()["misses"] == len(LINES)


def test_a_model_in_memory_is_what_was_loaded(place: Place) -> None:
    """Whatever is written over its file: the log-probs are kept under the name of what was hashed."""
    model = load_model(find_model(str(place.model)))
    before = hash_weights(model)
    put_other_weights(place)
    assert hash_weights(model) == before


def test_a_dry_run_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither at home nor where it stands."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    result, told = dpo("train", "--model", place.model, "--data", place.rows, "--dry-run")
    assert "0 of 6 pairs cached: 6 to score" in told and result["reference_misses"] == 6
    assert list(home.rglob("*")) == list(here.rglob("*")) == []
    dpo("precompute-ref", "--model", place.model, "--data", place.rows)
    assert (home / ".cache" / "dpo" / "reference").is_dir()  # which is where it would have written


def make_read_only(folder: Path, patch: pytest.MonkeyPatch, admitted: bool = True) -> None:
    """As on a file system that is mounted so; ``admitted`` by it when it is asked."""
    ask = os.access
    if admitted:
        patch.setattr(os, "access", lambda p, mode, **k: ask(p, mode, **k) and not (mode & os.W_OK and inside(p)))

    def inside(path: Any) -> bool:
        return not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(folder)

    def refusing(original: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if inside(path) and writes(path, *arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return original(path, *arguments, **options)

        return call

    for name in ("rename", "replace", "unlink", "remove", "rmdir", "utime", "chmod"):
        patch.setattr(os, name, refusing(getattr(os, name), lambda *_: True))
    patch.setattr(os, "mkdir", refusing(os.mkdir, lambda path, *_: not Path(path).exists()))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    patch.setattr(os, "open", refusing(os.open, lambda path, flags, *_: bool(flags & writing)))


def test_a_cache_that_can_only_be_read_is_enough_when_it_has_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, whichever command."""
    with monkeypatch.context() as patch:
        make_read_only(place.cache, patch)
        for command, more in (("precompute-ref", ()), ("train", ("--output", place.folder / "run"))):
            told = place.told(command, *more)
            assert "6 of 6 pairs cached: nothing to score" in told and "warning" not in told


# ---- dpo cache --------------------------------------------------------------------------------------------------


def cache(place: Place, *arguments: Any, code: int = 0) -> tuple[str, str]:
    """Run ``dpo cache``: what it prints on stdout and stderr."""
    result = CliRunner().invoke(app, ["cache", *map(str, arguments), "--cache-dir", str(place.cache)])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result.stdout, result.stderr


def listed(place: Place) -> list[dict[str, Any]]:
    """The references of a cache as `dpo cache list` shows them."""
    result = json.loads(cache(place, "list", "--json")[0])
    assert result["cache_dir"] == str(place.cache)
    return [entry for entry in result["entries"] if entry["kind"] == "reference"]


def folders(place: Place) -> list[Path]:
    return sorted((place.cache / "reference").iterdir())


def only_reference(place: Place) -> Path:
    (folder,) = folders(place)
    return folder


def age(folder: Path, days: float) -> None:
    """Let all of a folder be as old as if nobody had used it since."""
    then = time.time() - days * DAY
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def test_list_shows_every_reference(place: Place) -> None:
    age(only_reference(place), 12.34)
    first, second = only_reference(place), Path(place.precompute("--dtype", "bfloat16")["cache_dir"])
    found = {entry["name"]: entry for entry in listed(place)}
    assert {name: entry["days_unused"] for name, entry in found.items()} == {first.name: 12.3, second.name: 0}
    for folder in (first, second):
        assert found[folder.name]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        assert found[folder.name]["model"] == place.model.name
    header, *lines = cache(place, "list")[0].splitlines()
    assert header.split() == ["kind", "name", "size", "unused", "model"] and len(lines) == 2


@pytest.mark.parametrize("there", ["nothing", "empty", "file"])
def test_an_empty_cache_is_no_error(place: Place, there: str) -> None:
    shutil.rmtree(place.cache)
    if there == "empty":
        (place.cache / "reference").mkdir(parents=True)
    if there == "file":
        place.cache.write_text("no folder")
    assert listed(place) == []
    assert json.loads(cache(place, "prune", "--older-than", 0, "--yes", "--json")[0]) == {"removed": [], "bytes": 0}
    assert place.cache.exists() == (there != "nothing")


@pytest.mark.parametrize("content", [None, "", "[1]", '{"model": null, "layout": [1]}', "[" * 100_000])
def test_the_description_of_a_reference_decides_nothing(place: Place, content: str | None) -> None:
    """It is listed, used, and removed, whatever became of that file; other files do no harm."""
    folder = only_reference(place)
    (folder / "about.json").unlink()
    if content is not None:
        (folder / "about.json").write_text(content)
    (place.cache / "reference" / "notes.txt").write_text("mine")
    save_file({"weight": torch.ones(3)}, folder / "weights.safetensors")
    (entry,) = listed(place)
    assert entry["name"] == folder.name and place.precompute()["misses"] == 0
    age(folder, 9)
    assert json.loads(cache(place, "prune", "--older-than", 5, "--yes", "--json")[0])["removed"] == [folder.name]


def test_names_in_a_cache_do_not_steer_a_terminal(place: Place) -> None:
    (only_reference(place) / "about.json").write_text(json.dumps({"model": "\x1b]0;x\x07\x1b[2J"}))
    assert "\x1b" not in cache(place, "list")[0] and "\x07" not in cache(place, "list")[0]


def linked(shard: Path) -> None:
    shard.rename(shard.with_name("elsewhere"))
    shard.symlink_to("elsewhere")


def flipped(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[7] ^= 4
    shard.write_bytes(content)


@pytest.mark.parametrize("harm", [linked, flipped])
def test_what_is_damaged_is_computed_again(place: Place, harm: Callable[[Path], None]) -> None:
    (shard,) = shards(place.cache)
    harm(shard)
    assert place.precompute()["misses"] == len(LINES) and place.precompute()["misses"] == 0


def test_a_shard_of_another_reference_is_damaged(place: Place) -> None:
    (shard,) = shards(place.cache)
    second = Path(place.precompute("--dtype", "bfloat16")["cache_dir"])
    shutil.copy(shard, second)
    assert "it is for another reference" in place.told("precompute-ref", "--dtype", "bfloat16")
    assert len(list(second.glob("*.safetensors"))) == 1


@pytest.fixture
def two(place: Place) -> tuple[Place, Path, Path]:
    """A place with two references: one of 40 days ago, and one of another model, just made."""
    old = only_reference(place)
    model = shutil.copytree(place.model, place.folder / "models" / "Fresh-2")
    changed_weight("lm_head.weight", 5)(model)
    new = Path(place.precompute("--model", model)["cache_dir"])
    age(old, 40)
    assert {old, new} == set(folders(place)) and old != new
    return place, old, new


def test_prune_must_be_told_what(two: tuple[Place, Path, Path]) -> None:
    """And removes nothing without --yes, but shows what it would."""
    place, old, new = two
    assert "--older-than DAYS" in cache(place, "prune", code=2)[1]
    assert "--model NAME" in cache(place, "prune", "--model", "", "--yes", code=2)[1]
    shown = cache(place, "prune", "--older-than", 30, code=2)[1]
    assert "add --yes" in shown and old.name[:30] in shown and new.name not in shown
    cache(place, "prune", "--older-than", 50)
    assert set(folders(place)) == {old, new}


@pytest.mark.parametrize(("by", "removed"), [(("--older-than", 30), 0), (("--model", "Fresh"), 1)])
def test_prune_removes_by_age_or_model(two: tuple[Place, Path, Path], by: tuple[Any, ...], removed: int) -> None:
    place, *both = two
    size = sum(file.stat().st_size for file in both[removed].iterdir())
    result = json.loads(cache(place, "prune", *by, "--yes", "--json")[0])
    assert result == {"removed": [both[removed].name], "bytes": size} and folders(place) == [both[1 - removed]]


def test_a_reference_that_was_used_is_not_old(two: tuple[Place, Path, Path]) -> None:
    place, old, _ = two
    assert place.precompute()["misses"] == 0
    assert json.loads(cache(place, "prune", "--older-than", 30, "--yes", "--json")[0])["removed"] == []
    assert old.exists()


def test_prune_reports_what_it_cannot_remove(two: tuple[Place, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    place, old, _ = two

    def rename(self: Path, _: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", rename)
    shown, err = cache(place, "prune", "--older-than", 30, "--yes", "--json")
    assert json.loads(shown)["removed"] == [] and f"{old} cannot be removed (Permission denied)" in err


def test_a_reference_that_is_pruned_while_it_is_filled_is_filled_further(tmp_path: Path) -> None:
    pairs, scorer = random_pairs(6, seed=9), make_scorer()
    cache = open_cache(tmp_path)
    fill(cache, pairs[:3], scorer)
    shutil.rmtree(cache.folder)
    assert fill(cache, pairs, scorer).misses == 3
    assert not fill(open_cache(tmp_path), pairs[3:], scorer).misses


# ---- where nothing can be written, and when the clock jumps -----------------------------------------------------


def test_a_cache_that_is_a_file_is_refused_before_anything_is_scored(place: Place, scored: list[str]) -> None:
    shutil.rmtree(place.cache)
    place.cache.write_text("no folder")
    code, told = place.fails()
    assert code == 2 and f"--cache-dir: cannot write reference log-probs to {place.cache}" in told
    assert scored == [] and place.cache.read_text() == "no folder"


@pytest.mark.parametrize("kind", ["reference", "model"])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_scored(
    place: Place, scored: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A row is missing, or all of a model: then there is not even a folder."""
    appended(place)
    more = ("--dtype", "bfloat16") if kind == "model" else ()
    with monkeypatch.context() as patch:
        make_read_only(place.cache, patch)
        code, told = place.fails(*more)
    assert code == 2 and "--cache-dir: cannot write reference log-probs to" in told and str(place.cache) in told
    assert scored == []
    assert place.precompute(*more)["misses"] == (7 if more else 1)  # and it was no more than that


def test_shards_are_written_by_a_clock_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: list[str]
) -> None:
    """The time of day jumps ten years to and fro: one shard. Thirty seconds pass a forward: a shard a forward."""
    now = time.time()
    jumps = itertools.cycle([now, now + 10 * 365 * DAY, now - 10 * 365 * DAY])
    pairs = random_pairs(16, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(jumps))
        filled = fill(open_cache(tmp_path / "jumps"), pairs, make_scorer())
    assert 0 <= filled.seconds < 60 and len(shards(tmp_path / "jumps")) == 1
    seconds = itertools.count(0, 31)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(seconds)))
        fill(open_cache(tmp_path / "passes"), pairs, make_scorer())
    assert len(shards(tmp_path / "passes")) >= 5


def test_a_reference_from_the_future_is_not_old(place: Place) -> None:
    """It was written before the clock was set right."""
    age(only_reference(place), -400)
    assert listed(place)[0]["days_unused"] == 0
    assert "0.0 d" in cache(place, "list")[0]
    for days in (0, 1):
        assert json.loads(cache(place, "prune", "--older-than", days, "--yes", "--json")[0])["removed"] == []
    assert place.precompute()["misses"] == 0
    assert listed(place)[0]["days_unused"] == 0
    cache(place, "prune", "--model", "model", "--yes")
    assert listed(place) == []


# ---- locks, and folders that only one can make ------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from dpo_cli.utils.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def run_python(code: str, argument: Any) -> subprocess.Popen[str]:
    """Start a process that is talked to by its input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(argument)],
        cwd=ROOT,  # whose package is the one that is tested
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds ``lock`` until its input ends."""
    with run_python(HOLD, tmp_path / "lock") as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_holder_is_refused(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    for _ in range(2):
        message = re.escape(f"{tmp_path} is in use by another process")
        with pytest.raises(UsageError, match=message), file_lock(tmp_path / "lock"):
            pytest.fail("two hold it")
    assert (tmp_path / "lock").exists() and holder.poll() is None


def test_a_lock_is_free_when_its_holder_has_ended(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.communicate("")
    assert holder.returncode == 0 and not (tmp_path / "lock").exists()
    with file_lock(tmp_path / "lock"), pytest.raises(UsageError), file_lock(tmp_path / "lock"):
        pytest.fail("two hold it")
    assert not (tmp_path / "lock").exists()


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Though its file is still there."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    with file_lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_lock_is_free_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), file_lock(tmp_path / "lock"):
        raise error
    assert list(tmp_path.iterdir()) == []
    with file_lock(tmp_path / "lock"):
        pass


def test_a_lock_whose_file_was_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last holder removed it after it was opened and before it was locked: a third one would lock another file."""
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        (tmp_path / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="try again"), file_lock(tmp_path / "lock"):
        pytest.fail("it holds a file that is gone")


def test_a_file_system_without_locks_does_not_stop_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with file_lock(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_made_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(DpoError, match=re.escape(f"{tmp_path / 'none' / 'lock'} cannot be written")):
        file_lock(tmp_path / "none" / "lock").__enter__()


MAKE = """
import sys
from pathlib import Path
from dpo_cli.utils.files import atomic_dir
from dpo_cli.utils.errors import DpoError
for line in sys.stdin:
    try:
        with atomic_dir(Path(line.strip()), new=True) as folder:
            (folder / "by").write_text(sys.argv[1])
            print("ready", flush=True)
            sys.stdin.readline()
    except DpoError as error:
        print("lost", error, flush=True)
    else:
        print("won", flush=True)
"""


def test_of_two_that_make_a_folder_one_does(tmp_path: Path) -> None:
    """Each has written its own, and both give it the name at once; ten times."""
    makers = [run_python(MAKE, name) for name in ("0", "1")]

    def say(text: str) -> None:
        for maker in makers:
            assert maker.stdin
            maker.stdin.write(f"{text}\n")
            maker.stdin.flush()

    def answers() -> list[str]:
        return [maker.stdout.readline().strip() for maker in makers if maker.stdout]

    try:
        for round_ in range(10):
            folder = tmp_path / f"round {round_}"
            say(str(folder))
            assert answers() == ["ready", "ready"]
            say("go")
            ends = answers()
            assert sorted(end.split()[0] for end in ends) == ["lost", "won"], ends
            assert any(str(folder) in end for end in ends)
            assert [file.name for file in folder.iterdir()] == ["by"]
            assert (folder / "by").read_text() == str(ends.index("won"))
            assert len(list(tmp_path.iterdir())) == round_ + 1
    finally:
        for maker in makers:
            maker.communicate()
    assert [maker.returncode for maker in makers] == [0, 0]
