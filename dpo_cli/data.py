"""Records of every accepted format as rows; what is wrong with a bad one is named.

A format is a reader that takes its columns from a record: ``FORMATS`` has them all, ``_format_of`` tells which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.columns import Columns, Message, Text, answer_of, has_surrogate
from dpo_cli.errors import RowError, UsageError, did_you_mean
from dpo_cli.records import Source, shortened

Three = tuple[Text, Text, Text]  # prompt, chosen, rejected

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input")
ANSWERS = ("chosen", "rejected", "responses", "scores", "ranks")
OTHERS = ("history", "system", "tools", "chat_template_kwargs", "id", "weight", "margin")
COLUMNS = (*PROMPTS, *ANSWERS, *OTHERS)
# What a template's rendering is asked for by the program itself.
RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
}
UNREAD = ("image", "images", "video", "videos", "audio", "audios")  # parts of a question that no text stands for


@dataclass(frozen=True, slots=True)
class Reading:
    """How records become pairs: all that decides a pair beside the record and the tokenizer."""

    columns: str | None = None
    format: str | None = None
    max_length: int = 1024
    control_tokens: str = "keep"
    train_turns: str = "last"


@dataclass(frozen=True, slots=True)
class Row:
    """One preference: all three fields are strings, or all three are message lists.

    ``template_arguments`` go to the chat template beside the messages. ``weight`` multiplies the pair's loss;
    ``margin`` is by how much its rewards should at least differ.
    """

    where: str
    format: str
    prompt: Text
    chosen: Text
    rejected: Text
    template_arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    record: Any = None


def read_rows(
    sources: Iterable[Source], columns: str | None = None, format_: str | None = None
) -> Iterator[Row | BadRow]:
    """Yield every row of every source in order, bad ones included.

    Raises:
        UsageError: a source is unreadable or empty, or ``columns`` is malformed.
    """
    names = _parse_columns(columns)
    for source in sources:
        for where, record in source.records():
            if isinstance(record, RowError):
                yield BadRow(where, str(record))
                continue
            try:
                yield _parse_row(record, where, names, format_)
            except RowError as error:
                yield BadRow(where, str(error), record)


def _parse_columns(columns: str | None) -> dict[str, str]:
    """The file's names of our columns, where they are others."""
    names = {}
    for part in filter(None, (columns or "").split(",")):
        ours, _, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not theirs:
            near = "" if ours in COLUMNS else did_you_mean(ours, COLUMNS)
            names_of = ", ".join(column for column in COLUMNS if column not in ("prompt", "chosen", "rejected"))
            how = "write it as prompt=NAME,chosen=NAME,rejected=NAME; also"
            raise UsageError(f"--columns {columns}: {how} {names_of}{near}")
        names[ours] = theirs
    return names


# ---- formats ----------------------------------------------------------------------------------------------------


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _strings(row: Columns) -> Three:
    return row.string("prompt"), row.string("chosen"), row.string("rejected")


def _messages(row: Columns) -> Three:
    return row.messages("prompt"), *row.answers()


def _conversations(row: Columns) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = row.messages("chosen"), row.messages("rejected")
    cut = _common_prefix(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":  # they part in a user's turn: what it answers is no prompt
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _hh(row: Columns) -> Three:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    chosen, rejected = row.string("chosen"), row.string("rejected")
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: _common_prefix(before_chosen, before_rejected)]
    if not shared:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if any(mark in answer[cut:] for mark in (HH_HUMAN, HH_ASSISTANT) for answer in (chosen, rejected)):
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _sharegpt(row: Columns) -> Three:
    column = "messages" if row.get("conversations") is None else "conversations"
    return row.messages(column), *row.answers()


def _alpaca(row: Columns) -> Three:
    turns: list[Message] = []
    for exchange in row.parsed("history", list):
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise RowError(f"{row.named('history')} must be a list of pairs of what was asked and answered")
        turns += [*_user(exchange[0]), *answer_of(exchange[1])]
    parts = [row.string("instruction"), *([row.string("input")] if row.get("input") else [])]
    return [*turns, *_user("\n".join(parts))], *row.answers()


def _orca(row: Columns) -> Three:
    return _user(row.string("input" if row.get("question") is None else "question")), *row.answers()


def _ultrafeedback(row: Columns) -> Three:
    """Conversations with their prompt beside them; or answers alone, which it begins."""
    asked, (prompt, chosen, rejected) = row.string("prompt"), _conversations(row)
    said = [" ".join(message["content"].split()) for message in prompt if message["role"] == "user"]
    if not said and "user" not in {message["role"] for message in chosen}:
        return _user(asked), *row.answers()
    if not any(" ".join(asked.split()) in text for text in said):
        raise RowError("prompt is not in the conversations beside it (--format conversations reads those alone)")
    return prompt, chosen, rejected


def _stackexchange(row: Columns) -> Three:
    """Of two answers to a question ``response_j`` is the better one."""
    renamed = Columns(row.record, row.names | {"chosen": "response_j", "rejected": "response_k"})
    return _orca(renamed)


def _ranked(row: Columns) -> Three:
    """The best of several answers against the worst."""
    column = next((name for name in PROMPTS if row.get(name) is not None), None)
    if column is None:
        raise RowError("prompt is missing")
    prompt = row.text(column)
    responses, values = row.parsed("responses", list), _values(row)
    if len(responses) < 2:
        raise RowError("responses must be at least two")
    if len(values) != len(responses):
        raise RowError(f"{len(responses)} responses have {len(values)} scores or ranks")
    worst, best = (pick(range(len(values)), key=values.__getitem__) for pick in (min, max))
    if values[worst] == values[best]:
        raise RowError("all responses have the same score or rank, so none is better")
    answers = Columns({"chosen": responses[best], "rejected": responses[worst]}, {})
    if isinstance(prompt, str) and column == "prompt" and isinstance(responses[best], str):
        return prompt, answers.string("chosen"), answers.string("rejected")
    return _user(prompt) if isinstance(prompt, str) else prompt, *answers.answers()


def _values(row: Columns) -> list[float]:
    """How good each response is: its score, or minus its rank, of which 1 is the best."""
    column, sign = ("scores", 1) if row.get("scores") is not None else ("ranks", -1)
    if row.get(column) is None:
        raise RowError("responses need scores (the higher the better) or ranks (1 is the best)")
    values = [Columns({column: value}, {}).number(column, math.nan) for value in row.parsed(column, list)]
    if any(map(math.isnan, values)):
        raise RowError(f"{row.named(column)} has one that is missing")
    return [sign * value for value in values]


# What --format names: how it is told, and its reader.
FORMATS: dict[str, tuple[str, Callable[[Columns], Three]]] = {
    "strings": ("prompt and responses as strings", _strings),
    "messages": ("prompt and responses as messages", _messages),
    "conversations": ("conversations with a common prefix", _conversations),
    "hh": ("dialogues as strings (HH)", _hh),
    "sharegpt": ("a conversation and its two ends (ShareGPT)", _sharegpt),
    "alpaca": ("instruction and input (Alpaca)", _alpaca),
    "orca": ("question and answers (Orca)", _orca),
    "ultrafeedback": ("conversations beside their prompt (UltraFeedback)", _ultrafeedback),
    "stackexchange": ("question, response_j and response_k (Stack Exchange)", _stackexchange),
    "ranked": ("ranked responses: the best against the worst", _ranked),
}


def _format_of(row: Columns) -> str:
    """The format that a record's columns tell of."""
    if row.get("responses") is not None and row.get("chosen") is None:
        return "ranked"
    if row.get("response_j") is not None and row.get("chosen") is None:
        return "stackexchange"
    if row.get("chosen") is None and "label" in row.record and {"completion", "response"} & row.record.keys():
        raise RowError("chosen is missing: the row is one response with a label, and DPO compares two")
    strings = isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)
    if isinstance(row.get("prompt"), list):
        return "messages"
    if "prompt" in row.names or row.get("prompt") is not None:
        return "strings" if strings or not isinstance(row.get("chosen"), (list, dict)) else "ultrafeedback"
    column = next((name for name in PROMPTS if row.get(name) is not None), None)
    if column is not None:
        return {"instruction": "alpaca", "question": "orca", "input": "orca"}.get(column, "sharegpt")
    return "conversations" if isinstance(row.get("chosen"), (list, dict)) else "hh"


# ---- records to rows --------------------------------------------------------------------------------------------


def _parse_row(record: Any, where: str, names: dict[str, str], format_: str | None) -> Row:
    if not isinstance(record, dict):
        raise RowError("not an object with the columns prompt, chosen, rejected")
    row = Columns(record, names)
    format_ = format_ or _format_of(row)
    if missing := [column for column in names if column not in OTHERS and row.get(column) is None]:
        near = did_you_mean(names[missing[0]], record)
        raise RowError(f"{row.named(missing[0])} is missing{near}")
    if unread := [column for column in UNREAD if record.get(column)]:
        raise RowError(f"has the column '{unread[0]}', and only text is read")
    told, read = FORMATS[format_]
    if format_ not in ("ranked", "stackexchange"):
        _check_kinds(row)
    prompt, chosen, rejected = read(row)
    n = len(prompt)
    if isinstance(prompt, list) and prompt and chosen[:n] == prompt == rejected[:n]:  # it stands before each once more
        chosen, rejected = chosen[n:], rejected[n:]
    arguments = _template_arguments(row)
    if row.names.get("system", "system") in record or arguments:
        if isinstance(prompt, str):
            told = f"{told}, made into turns"
        prompt, chosen, rejected = _with_system(row.get("system"), prompt, chosen, rejected)
    _check_content(prompt, chosen, rejected)
    weight, margin = row.number("weight", 1.0), row.number("margin", 0.0)
    if weight < 0:
        raise RowError(f"{row.named('weight')} must not be negative")
    if isinstance(name := row.get("id"), (str, int)) and name != "":
        where = f"{where} (id {shortened(str(name))})"
    return Row(where, told, prompt, chosen, rejected, arguments, weight, margin)


def _check_kinds(row: Columns) -> None:
    """Chosen and rejected are there, and of one kind."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected differ in kind: one is a string, the other a message list")


def _template_arguments(row: Columns) -> dict[str, Any]:
    """What the chat template gets beside the messages; a tool is given as the function that it is."""
    arguments: dict[str, Any] = row.parsed("chat_template_kwargs", dict)
    if taken := sorted(arguments.keys() & RESERVED):
        raise RowError(f"{row.named('chat_template_kwargs')} has '{taken[0]}', which is not the row's to say")
    tools = row.parsed("tools", list)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{row.named('tools')} must be a list of JSON objects")
    if tools:
        tools = [_without_nulls(tool) for tool in tools]
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        arguments = arguments | {"tools": wrapped}
    return arguments


def _without_nulls(value: Any) -> Any:
    """A tool without what it does not say: parquet gives each the columns of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _with_system(system: Any, prompt: Text, chosen: Text, rejected: Text) -> Three:
    """A conversation that begins with the system message; strings become turns of it."""
    if system is not None and not isinstance(system, str):
        raise RowError("system must be a string")
    if has_surrogate(system or ""):
        raise RowError("system has half of a surrogate pair, which is no text")
    if isinstance(prompt, str) and HH_ASSISTANT in prompt:
        raise RowError("a dialogue as strings has no place for a system message or tools; write it as messages")
    turns = _user(prompt) if isinstance(prompt, str) else prompt
    if system and turns and turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise RowError("the conversation has a system message, and the column 'system' another")
    if system and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": system}, *turns]
    return turns, answer_of(chosen), answer_of(rejected)


def _common_prefix(a: list[Any], b: list[Any]) -> int:
    """Length of what two lists begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _check_content(prompt: Text, chosen: Text, rejected: Text) -> None:
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, str):
            if not response.strip():
                raise RowError(f"{name} is empty")
        else:
            _check_response(response, name)
    if chosen == rejected:
        raise RowError("chosen equals rejected")
    if not prompt:
        raise RowError("prompt is empty: the conversations share no first message")
    if isinstance(prompt, list) and any(m["role"] == "user" and not m["content"].strip() for m in prompt):
        raise RowError("prompt has a user turn without text")
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"prompt ends with the role '{prompt[-1]['role']}'; it must end with user or tool")


def _check_response(response: list[Message], name: str) -> None:
    for message in response:
        if message["role"] not in ("assistant", "tool", "user"):
            raise RowError(f"{name} has a '{message['role']}' turn; it may stand before all answers only")
    if not response or response[-1]["role"] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    if not response[-1].get("tool_calls") and not response[-1]["content"].strip():
        raise RowError(f"{name} is empty")
