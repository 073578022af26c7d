"""``dpo chat`` and ``dpo generate``: what a run's model answers, and what it answered before its training."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedModel, TextStreamer

from dpo_cli.config.options import EvalOptions
from dpo_cli.data.messages import Message, answer_of, user_turn
from dpo_cli.data.pairs import Ids
from dpo_cli.data.template import ChatTemplate
from dpo_cli.evaluation.evaluate import as_in_run
from dpo_cli.evaluation.generation import CUT, end_turns, eos_ids, generate, text
from dpo_cli.models.adapters import is_quantized
from dpo_cli.models.fingerprint import hash_weights, same_weights
from dpo_cli.models.loading import compute_dtype, load_model
from dpo_cli.models.locate import ModelSource, check_hub, find_model, start_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reporting.text import EMPTY
from dpo_cli.training.memory import process_bytes, usable_bytes
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import read_manifest, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind, start
from dpo_cli.utils.errors import DpoError, RowError, UsageError, printable
from dpo_cli.utils.files import append_line, to_json

WIDE = 100  # columns of a terminal from which on two answers stand side by side
GAP = 3  # columns between them
COMMANDS = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops the answers"
STOPPED = "stopped: that question is discarded"


@dataclass(frozen=True)
class Answer:
    """An answer; ``whole``: the model ended it, rather than a limit."""

    text: str
    whole: bool

    @property
    def marked(self) -> str:
        """The text, with a mark where it was cut."""
        return self.text + CUT * (not self.whole)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Model:
    """A model that answers; ``adapter``: whether an attached adapter takes part."""

    runner: ModelRunner
    tokenizer: Any
    adapter: bool = True

    def answer(self, history: list[Message], sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """Answer the last message, and ``show`` each piece of text as it is generated.

        Raises:
            UsageError: the chat template refuses the messages, or the model has no room for an answer.
        """
        model, streamer = cast(PreTrainedModel, self.runner.model), _Streamer(self.tokenizer, show)
        for layer in model.modules():
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                layer.enable_adapters(self.adapter)
        attention, tokens = model.config._attn_implementation, sampling.max_new_tokens
        answer = partial(generate, self.runner, self.tokenizer, [self._prompt(history)], attention, tokens)
        ((ids,),) = answer(int(sampling.temperature > 0), sampling.seed, sampling.temperature or 1.0, streamer)
        return Answer(text(self.tokenizer, ids), bool(np.isin(ids[-1:], eos_ids(model, self.tokenizer)).any()))

    def _prompt(self, history: list[Message]) -> Ids:
        """Render and encode a conversation; a single turn as it is where there is no chat template."""
        template = ChatTemplate(self.tokenizer, adds_bos=False)
        try:
            raw = template.plain and len(history) == 1
            text = history[0]["content"] if raw else template.render(history, {}, generation=True)
        except RowError as error:
            raise UsageError(str(error)) from error
        ids = self.tokenizer(text, add_special_tokens=bool(template.plain))["input_ids"]
        if template.plain and ids[-1:] == [self.tokenizer.eos_token_id]:
            ids.pop()
        if not ids:
            raise UsageError("the prompt is empty")
        model: Any = self.runner.model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(ids) >= context:
            raise UsageError(f"the conversation has {len(ids):,} tokens and the model's context {context:,}: /reset")
        return np.asarray(ids, dtype=np.int32)


class _Streamer(TextStreamer):
    """Passes on text as words are complete, without special tokens and leading space."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.begun = show, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        piece = text if self.begun else text.lstrip()
        self.begun |= bool(piece)
        self.show(printable(piece.expandtabs(4)))


# ---- the models of a run ----------------------------------------------------------------------------------------


def open_models(name: str, options: EvalOptions, before: bool, reporter: Reporter) -> dict[str, Model]:
    """Load the model that ``name`` stands for, and for a run the one that it began with: ``before`` and ``after``.

    Of an adapter's run one model is in memory; else the second is loaded where it fits the memory.

    Raises:
        UsageError: there is no such model, or it cannot be loaded.
    """
    source = choose_model(name, options, reporter, base=options.base_model)
    source = as_in_run(source, trained_with(source.run) if source.run else None)
    tokenizer = choose_tokenizer(source, options)
    after = _load(source, tokenizer, options)
    if not (before and source.run):
        return {"after": after}
    device, model = after.runner.device, after.runner.model
    began, base = start_model(read_manifest(source.run)["start"], options.base_model)
    try:
        start_source = find_model(began, options.trust_remote_code, base)
        if source.attached and not start_source.adapter:
            return {"before": replace(after, adapter=False), "after": after}
        size = sum(tensor.nbytes for tensor in model.parameters())
        if max(process_bytes(device), size) + size > usable_bytes(device):
            reporter.info("before", f"left out: a second model of {size / 2**30:.1f} GiB does not fit the memory")
            return {"after": after}
        check_hub({} if Path(start_source.path).exists() else {start_source.path: "the start model"}, {})
        recorded = read_manifest(source.run)["start"]["fingerprint"]
        first = _load(choose_model(began, options, reporter, "before", base), tokenizer, options, recorded)
    except UsageError as error:
        reporter.warning(f"the model before the training is left out: {error}")
        return {"after": after}
    cast(Any, first.runner.model).generation_config = cast(Any, model).generation_config
    return {"before": first, "after": after}


def _load(source: ModelSource, tokenizer: Any, options: EvalOptions, recorded: str | None = None) -> Model:
    """Load a model onto the device in its precision; a turn ends where its chat template ends it, too.

    Raises:
        UsageError: its weights are not those of the ``recorded`` fingerprint.
    """
    device = start(options.device)
    dtype, model = compute_dtype(options.dtype, device_kind(device)), load_model(source)
    if recorded and not same_weights(recorded[:16] + hash_weights(model)[:48], recorded):
        raise UsageError(f"{source.path} is no longer the model that the run began with")
    if not is_quantized(model):
        for p in model.parameters():  # buffers, such as rotary frequencies, stay float32
            p.data = p.data.to(dtype)
        model.to(device)  # type: ignore[arg-type]  # transformers' annotation hides torch's
    end_turns(model, tokenizer)
    return Model(ModelRunner(model, "padded", dtype, 1, device), tokenizer)


# ---- answers on a terminal --------------------------------------------------------------------------------------


def console(quiet: bool = False) -> Console:
    """Return the terminal of stdout; ``quiet``: nothing is shown on it."""
    return Console(highlight=False, markup=False, emoji=False, quiet=quiet)


def answer_all(
    models: Mapping[str, Model], histories: Mapping[str, list[Message]], sampling: Sampling, console: Console
) -> dict[str, Answer]:
    """Let each model answer its history, and show the answers as they come: in columns, or one under the other."""
    answers, texts, column = dict[str, Answer](), dict.fromkeys(models, ""), 0
    beside, live = len(models) > 1 and console.width >= WIDE, Live(console=console, auto_refresh=False)

    def show(name: str, piece: str) -> None:
        nonlocal column
        texts[name] += piece
        if not beside:
            for word in re.split(r"(?<=\s)", piece):
                if console.is_terminal and column + cell_len(word.rstrip()) > console.width:  # else it breaks words
                    console.print()
                    column = 0
                console.print(word, end="", soft_wrap=True)
                column = 0 if word.endswith("\n") else column + cell_len(word)
        elif console.is_terminal:
            live.update(_columns(texts, console, console.height - 2), refresh=True)

    with live if beside else nullcontext():
        for name, model in models.items():
            if len(models) > 1 and not beside:
                console.print(Text(name, "bold"))
            column = 0
            answers[name] = model.answer(histories[name], sampling, partial(show, name))
            texts[name] = answers[name].marked or EMPTY
            if not beside:
                console.print(texts[name].removeprefix(answers[name].text))
        if beside:
            live.update(_columns(texts, console))
    return answers


def _columns(texts: Mapping[str, str], console: Console, rows: int = 0) -> Table:
    """Put texts beside each other; of each the last ``rows`` lines, or with 0 all."""
    width = (console.width - GAP - len("^C")) // len(texts)  # else what a terminal shows of Ctrl-C begins a line
    columns = (Column(name, width=width) for name in texts)
    table = Table(*columns, box=None, pad_edge=False, padding=(0, GAP, 0, 0), collapse_padding=True)
    lines = (Text(printable(each.expandtabs(4))).wrap(console, width)[-rows:] for each in texts.values())
    table.add_row(*(Text("\n").join(each) for each in lines))
    return table


def generate_answers(
    models: Mapping[str, Model], prompts: list[str], sampling: Sampling, console: Console
) -> dict[str, Any]:
    """Answer each prompt on its own: `dpo generate`."""
    results = []
    for prompt in prompts:
        if len(prompts) > 1:
            console.print(Text(f"> {printable(prompt)}", "bold"))
        answers = answer_all(models, dict.fromkeys(models, user_turn(prompt)), sampling, console)
        results.append({"prompt": prompt} | {name: answer.marked for name, answer in answers.items()})
    return {"answers": results}


def chat(models: Mapping[str, Model], sampling: Sampling, save: Path | None, console: Console) -> None:
    """Talk with the models until the person ends it: `dpo chat`. Each model sees its own earlier answers.

    With ``save`` the person says which answer is better, without knowing whose it is; the pair is appended to that
    file, and both models continue from the better one, since the answers of a pair have one prompt.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones recalled
    console.print(Text(COMMANDS, "dim"))
    histories: dict[str, list[Message]] = {name: [] for name in models}
    for turn in count(sampling.seed):
        if (line := _typed("> ")) is None or line == "/exit":
            return
        if line == "/reset":
            histories = {name: [] for name in models}
        elif line.startswith("/") and " " not in line:
            console.print(Text(f"unknown: {line}; {COMMANDS}", "dim"))
        elif line:
            asked = {name: history + user_turn(line) for name, history in histories.items()}
            names = random.sample([*models], len(models)) if save else [*models]
            labels = dict(zip(names, "ab" if save else names, strict=False))
            try:
                drawn, speakers = replace(sampling, seed=turn % 2**32), {labels[name]: models[name] for name in names}
                answers = answer_all(speakers, {labels[name]: asked[name] for name in names}, drawn, console)
            except DpoError as error:
                console.print(Text(f"error: {printable(str(error))}", "red"))
                continue
            except KeyboardInterrupt:
                console.print(Text(f"\n{STOPPED}", "dim"))
                continue
            answers = {name: answers[labels[name]] for name in models}
            if save:
                better = _preferred(answers, labels, asked["after"], save, models["after"], console)
                answers = dict.fromkeys(models, answers[better])
            histories = {name: asked[name] + answer_of(answer.text) for name, answer in answers.items()}


def _typed(prompt: str) -> str | None:
    """Read a line; None at Ctrl-D. At Ctrl-C there is nothing to stop."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print(f"\n{COMMANDS}")
        return ""


def _preferred(
    answers: Mapping[str, Answer],
    labels: Mapping[str, str],
    prompt: list[Message],
    file: Path,
    model: Model,
    console: Console,
) -> str:
    """Ask which answer is better by the label it was shown with, append the pair, and return whose answer it is.

    That is ``after`` if neither is better; whose each answer is is shown afterwards.
    """
    texts = {name: answer.text for name, answer in answers.items()}
    if len({*texts.values()}) < 2 or not all(answer.text and answer.whole for answer in answers.values()):
        console.print(Text("not a pair: two different answers are needed, neither empty nor cut", "dim"))
        return "after"
    while (typed := (_typed("better? a, b, or enter for neither: ") or "").lower()) not in ("a", "b", ""):
        pass
    whose = sorted((label, name) for name, label in labels.items())
    console.print(Text(", ".join(f"{label}: {name}" for label, name in whose), "dim"))
    if not typed:
        return "after"
    better, worse = sorted(labels, key=lambda name: labels[name] != typed)
    row: dict[str, Any] = {"prompt": prompt[0]["content"], "chosen": texts[better], "rejected": texts[worse]}
    if model.tokenizer.chat_template or len(prompt) > 1:
        row = {"prompt": prompt} | {side: answer_of(row[side]) for side in ("chosen", "rejected")}
    append_line(file, to_json(row))
    return better
