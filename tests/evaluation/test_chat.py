"""What a run answers after its training and before: against transformers' own generation, on a terminal, and saved."""

from __future__ import annotations

import json
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import EvalOptions
from dpo_cli.evaluation import chat as chatting
from dpo_cli.evaluation.chat import Answer, Model, Sampling, generate_answers, open_models
from dpo_cli.evaluation.generation import user_text
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import append_line
from tests.helpers import SAMPLE, make_model, make_tokenizer
from tests.helpers.chat import tokenizer_of

GREEDY = Sampling(8, 0.0, 0)
FEW = ("--max-new-tokens", 8)


def dpo(*arguments: Any, typed: str | None = None) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)], input=typed)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model, a run of all weights, and one of an adapter, both far from it."""
    folder = tmp_path_factory.mktemp("chat")
    make_model().save_pretrained(folder / "start")
    make_tokenizer().save_pretrained(folder / "start")
    trained = ("--model", folder / "start", "--data", SAMPLE / "train.jsonl", "--cache-dir", folder / "cache")
    steps = ("--max-steps", 2, "--batch-size", 4, "--kl", "none")
    dpo("train", *trained, *steps, "--lr", 1e-2, "--output", folder / "full")
    dpo("train", *trained, *steps, "--lr", 1e-1, "--lora-rank", 4, "--output", folder / "lora")
    return folder


def by_transformers(folder: Path, prompt: str, adapter: Path | None = None) -> str:
    """The greedy answer of a folder's model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model.load_adapter(adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip() + "…"


def opened(run: Path, before: bool = True) -> dict[str, Model]:
    return open_models(str(run), EvalOptions(data=[], model=[str(run)]), before, Reporter(mute=True))


# ---- the answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_before_and_after_are_those_of_transformers(place: Path, kind: str) -> None:
    out = dpo("generate", place / kind, "How do I clean a pan?", "Hello", *FEW, "--json")
    for answer in json.loads(out.stdout)["answers"]:
        assert answer["before"] == by_transformers(place / "start", answer["prompt"])
        own = (place / "start", place / "lora" / "model") if kind == "lora" else (place / "full" / "model", None)
        assert answer["after"] == by_transformers(own[0], answer["prompt"], own[1])
        assert answer["before"] != answer["after"]


def test_a_run_of_an_adapter_is_one_model_in_memory(place: Path) -> None:
    models = opened(place / "lora")
    assert models["before"].runner.model is models["after"].runner.model
    assert [*opened(place / "full")] == ["before", "after"]


@pytest.mark.parametrize("name", ["full/model", "full/checkpoints/step-000002", "lora/checkpoints/step-000002"])
def test_parts_of_a_run_are_the_run(place: Path, name: str) -> None:
    whole = dpo("generate", place / name.split("/")[0], "Hello", *FEW, "--json").stdout
    assert dpo("generate", place / name, "Hello", *FEW, "--json").stdout == whole


def test_a_model_that_is_no_run_has_one_answer(place: Path) -> None:
    for arguments in ((place / "start",), (place / "lora", "--no-before")):
        (answer,) = json.loads(dpo("generate", *arguments, "Hello", *FEW, "--json").stdout)["answers"]
        assert answer.keys() == {"prompt", "after"}


def test_a_second_model_is_loaded_where_it_fits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatting, "usable_bytes", lambda device: 1.0)
    out = dpo("generate", place / "full", "Hello", *FEW)
    assert "before      left out: a second model of 0.0 GiB does not fit the memory" in out.stderr
    assert "before" not in out.stdout and "before" in dpo("generate", place / "lora", "Hello", *FEW).stdout


def test_a_temperature_draws_and_a_seed_repeats(place: Path) -> None:
    def drawn(seed: int) -> str:
        return str(dpo("generate", place / "lora", "Hi", *FEW, "--temperature", 1.5, "--seed", seed, "--json").stdout)

    assert drawn(1) == drawn(1) != drawn(2)


def test_without_a_chat_template_the_prompt_is_plain_text(place: Path) -> None:
    model = opened(place / "start")["after"]
    model.tokenizer.chat_template = None
    once, upon = {"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon"}
    assert model._prompt([once]).tolist() == model.tokenizer("Once")["input_ids"]
    several = model.tokenizer.decode(model._prompt([once, upon, once]))
    assert "User: Once" in several and "Assistant: upon" in several and several.endswith("Assistant:")
    with pytest.raises(UsageError, match="the prompt is empty"):
        model._prompt([once | {"content": ""}])


def test_before_is_the_model_that_the_run_began_with_or_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatting, "hash_weights", lambda model: "0" * 64)
    out = dpo("generate", place / "full", "Hello", *FEW)
    assert "is no longer the model that the run began with" in out.stderr and "before" not in out.stdout


# ---- the conversation -------------------------------------------------------------------------------------------


def test_each_model_keeps_its_own_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, generate = [], chatting.generate

    def recorded(runner: Any, tokenizer: Any, prompts: Any, *more: Any, **options: Any) -> Any:
        asked.append(tokenizer.decode(prompts[0]))
        return generate(runner, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(chatting, "generate", recorded)
    dpo("chat", place / "lora", *FEW, typed="First?\n\n/what\nSecond?\n/reset\nThird?\n/exit\nFourth?\n")
    first = [by_transformers(place / "start", "First?", adapter) for adapter in (None, place / "lora" / "model")]
    assert len(asked) == 6 and first[0] != first[1]
    assert all(answer[:-1] in prompt and "First?" in prompt for answer, prompt in zip(first, asked[2:4], strict=True))
    assert all("First?" not in prompt and "Second?" not in prompt for prompt in asked[4:])


class Scripted:
    """Answers in the place of models: of each model one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[Answer]) -> None:
        self.histories: list[list[dict[str, str]]] = []
        waiting = {True: iter(answers["after"]), False: iter(answers["before"])}

        def answer(model: Model, history: Any, sampling: Sampling, show: Any) -> Answer:
            self.histories.append(history)
            said = next(waiting[model.adapter])
            show(said.text)
            return said

        monkeypatch.setattr(Model, "answer", answer)


def test_saved_pairs_are_trained_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = [Answer(text, True) for text in ("Scrub it.", "Yes.", "Same.", "", "Two.")] + [Answer("cu", False)]
    before = [Answer(text, True) for text in ("It depends.", "No.", "Same.", "Old.", "One.", "Whole.")]
    seen, file = Scripted(monkeypatch, after=after, before=before), tmp_path / "pairs.jsonl"
    names = [["before", "after"], ["after", "before"]] * 3  # whose the answers a and b are
    drawn = iter(names)
    monkeypatch.setattr("dpo_cli.evaluation.chat.random.sample", lambda models, count: next(drawn))
    typed = "A pan?\nboth\nB\nSure?\nb\nSame?\nEmpty?\n/reset\nNeither?\n\nCut?\n"  # "both" is asked again
    out = dpo("chat", place / "lora", "--save", file, typed=typed)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("Scrub it.", "It depends."), ("No.", "Yes.")
    ]  # fmt: skip
    assert [turn["content"] for turn in rows[1]["prompt"]] == ["A pan?", "Scrub it.", "Sure?"]
    assert seen.histories[2] == seen.histories[3] == rows[1]["prompt"], "a pair has one prompt"
    assert out.stdout.count("not a pair") == 3
    asked, said = out.stdout.index("better?"), out.stdout.index("a: {}, b: {}".format(*names[0]))
    assert asked < said and not {"before", "after"} & {*out.stdout[:asked].split()}, "whose it is comes afterwards"
    read = dpo("train", "--model", place / "start", "--data", file, "--dry-run", "--json")
    assert json.loads(read.stdout)["pairs"] == 2 and "prompt and responses as messages" in read.stderr


def test_ctrl_c_stops_the_answers_and_not_the_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stopped is no part of the conversation, though one model had answered; at the prompt it does nothing."""
    asked = []

    def answer(model: Model, history: Any, sampling: Sampling, show: Any) -> Answer:
        asked.append(([turn["content"] for turn in history], model.adapter))
        if asked[-1] == (["Stopped?"], True):
            raise KeyboardInterrupt
        return Answer("Yes.", True)

    typed = iter(["Stopped?", KeyboardInterrupt, "Next?", "More?", "/exit"])

    def entered(prompt: str) -> str:
        if (line := next(typed)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(line)

    monkeypatch.setattr(Model, "answer", answer)
    monkeypatch.setattr("builtins.input", entered)
    out = dpo("chat", place / "lora")
    assert out.stdout.count(chatting.STOPPED) == 1 and out.stdout.count(chatting.COMMANDS) == 2
    whole = ["Next?", "Yes.", "More?"]
    assert [history for history, _ in asked] == [["Stopped?"]] * 2 + [["Next?"]] * 2 + [whole] * 2
    monkeypatch.setattr(Model, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert CliRunner().invoke(app, ["generate", str(place / "lora"), "Hello"]).exit_code == 130


def test_appending_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"n": -1}')  # as an editor may leave it
    numbers = [range(start, 100, 4) for start in range(4)]

    def write(mine: range) -> None:
        for number in mine:
            append_line(file, json.dumps({"n": number, "text": "ä" * 9000}))

    threads = [threading.Thread(target=write, args=(mine,)) for mine in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(line)["n"] for line in file.read_text().splitlines()) == [-1, *range(100)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("chat", "full", "--json"), "--json: a chat is for a person"),
        (("chat", "full", "--save", "pairs.csv"), "--save pairs.csv: takes a name that ends with .jsonl"),
        (("chat", "full", "--save", "p.jsonl", "--no-before"), "leave out --no-before"),
        (("chat", "full", "--save", "none/p.jsonl"), "--save none/p.jsonl: takes a name that ends with .jsonl, in a"),
        (("chat", "start", "--save", "p.jsonl"), "start has no model before its training to compare with"),
        (("chat", "ful"), "error: ful"),
        (("generate", "./ful", "Hello"), "./ful: no such folder; did you mean 'full'?"),
        (("generate", "full", "Hello", " "), "PROMPT: a prompt is empty"),
        (("generate", "full", "Hello", "--device", "tpu"), "--device tpu: must be one of"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...], told: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = CliRunner().invoke(app, [*arguments], input="")
    assert out.exit_code == 2 and told in out.stderr and "--model" not in out.stderr, out.output


# ---- on a terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("width", [80, 140])
def test_answers_stand_side_by_side_where_there_is_room(
    place: Path, width: int, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word " * 30
    Scripted(monkeypatch, after=[Answer("", True)], before=[Answer(long.strip(), False)])
    console = Console(file=StringIO(), width=width, height=9, force_terminal=live, highlight=False)
    (answer,) = generate_answers(opened(place / "lora"), ["Hello"], GREEDY, console)["answers"]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert answer == {"prompt": "Hello", "before": long.strip() + "…", "after": ""}
    beside = [line for line in shown.splitlines() if "before" in line and "after" in line]
    assert bool(beside) == (width == 140) and "(empty answer)" in shown and "word…" in shown.replace("\n", "")
    if width == 80 and live:  # no word is broken; elsewhere lines are as the model wrote them
        assert sum(line.startswith("word ") for line in shown.splitlines()) == 2 and "w\nord" not in shown
    assert (long.strip() in shown) == (width == 80 and not live)


def test_an_answer_does_not_steer_the_terminal(place: Path) -> None:
    streamer = chatting._Streamer(make_tokenizer(), (pieces := list[str]()).append)
    streamer.on_finalized_text("\n a\x1b[31m ")
    streamer.on_finalized_text("[bold]b", stream_end=True)
    assert pieces == ["a�[31m ", "[bold]b"]


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "gemma3", "phi3", "mistral", "gptoss"])
def test_of_a_prompt_the_last_words_of_the_user_are_shown(family: str) -> None:
    tokenizer = tokenizer_of(family)
    turns = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]
    turns.append({"role": "user", "content": "Two\nlines: how?"})
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert user_text(tokenizer, torch.tensor(ids).numpy()) == "Two\nlines: how?"


def test_a_prompt_without_template_is_shown_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Once upon a time", return_tensors="np")["input_ids"][0]
    assert user_text(tokenizer, ids) == "Once upon a time"
