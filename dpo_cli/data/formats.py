"""Records of every accepted format as rows; what is wrong with a bad one is named.

A format is a reader that takes its columns from a record: ``FORMATS`` has them all, ``_format_of`` tells which it is.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.data.columns import Columns, Message, MissingColumnError, Text, answer_of, has_surrogate, without_nulls
from dpo_cli.data.readers import json_value, shortened
from dpo_cli.data.sources import Source
from dpo_cli.utils.errors import RowError, UsageError, did_you_mean

Three = tuple[Text, Text, Text]  # prompt, chosen, rejected

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# A prompt that a chat template rendered: it begins with a template's marker, or ends with what opens an answer.
_BEGINS = re.compile(
    r"\s*(?:<\|[\w ]+\|>|<｜[^｜\s]+｜>|\[gMASK\]|<bos>|<s>\s*(?:\[INST\]|<\|)|\[INST\]|<start_of_turn>|<\|turn>"
    r"|\n\nHuman:)"
)
_OPENS = re.compile(
    r"(?:<\|assistant\|>|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|<\|im_start\|>assistant|assistant<\|end_header_id\|>|\[/INST\]"
    r"|<start_of_turn>model|### ?(?:Response|Assistant):|\n(?:Assistant|ASSISTANT):)\s*(?:<think>\s*)?\Z"
)
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input", "context")
ANSWERS = ("chosen", "rejected", "responses", "scores", "ranks")
# Several answers to one prompt, and the columns that may rank them; without one each answer is an object with its own.
RANKED = {"responses": ("scores", "ranks"), "generations": ("ratings",), "completions": ()}
OWN_RANKS = ("rank", "score", "overall_score", "rating")
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
    ``margin`` is by how much its rewards should at least differ. ``raw`` strings are never wrapped by a chat template.
    """

    where: str
    format: str
    prompt: Text
    chosen: Text
    rejected: Text
    template_arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    margin: float = 0.0
    raw: bool = False


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
            except MissingColumnError as error:
                yield BadRow(where, f"{error}{_other_columns(record, names, format_)}", record)
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


def is_rendered(prompt: str) -> bool:
    """Whether a chat template, of whichever model, was applied to a prompt before it was stored."""
    return bool(_BEGINS.match(prompt) or _OPENS.search(prompt, max(0, len(prompt) - 80)))


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _strings(row: Columns) -> Three:
    return row.string("prompt"), row.string("chosen"), row.string("rejected")


def _messages(row: Columns) -> Three:
    return row.messages("prompt"), *row.answers()


def _conversations(row: Columns) -> tuple[list[Message], list[Message], list[Message]]:
    return _parted(row.messages("chosen"), row.messages("rejected"))


def _parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations cut where they part."""
    cut = common_prefix(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":  # they part in a user's turn: what it answers is no prompt
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _hh(row: Columns) -> Three:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    chosen, rejected = row.string("chosen"), row.string("rejected")
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: common_prefix(before_chosen, before_rejected)]
    if not shared:
        why = "prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'"
        raise MissingColumnError(why)
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if any(mark in answer[cut:] for mark in (HH_HUMAN, HH_ASSISTANT) for answer in (chosen, rejected)):
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _sharegpt(row: Columns) -> Three:
    prompt = row.messages("messages" if row.get("conversations") is None else "conversations")
    if prompt in (row.text("chosen"), row.text("rejected")):  # the whole conversation of one of them, once more
        return _conversations(row)
    return prompt, *row.answers()


def _openai(row: Columns) -> Three:
    """OpenAI's: the input is an object with messages, and with tools."""
    given = row.parsed("input", dict)
    row.tools = given.get("tools")
    answers = row.renamed(chosen="preferred_output", rejected="non_preferred_output")
    return Columns(given, {}).messages("messages"), *answers.answers()


def _swift(row: Columns) -> Three:
    """ms-swift's: a conversation that ends with the chosen answer, and the rejected answer or conversation."""
    whole = row.messages("messages")
    if row.get("rejected_messages") is not None:
        return _parted(whole, row.messages("rejected_messages"))
    if whole[-1]["role"] != "assistant":
        raise RowError("messages must end with the chosen answer, since rejected_response is the other")
    return whole[:-1], whole[-1:], answer_of(row.text("rejected_response"))


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
    return _orca(row.renamed(chosen="response_j", rejected="response_k"))


def _ranked(row: Columns) -> Three:
    """The best of several answers against the worst."""
    if (column := _prompt_column(row)) is None:
        raise MissingColumnError("prompt is missing")
    prompt = row.text(column)
    answers = next((name for name in RANKED if row.get(name) is not None), "responses")
    responses = row.parsed(answers, list)
    if len(responses) < 2:
        raise RowError(f"{answers} must be at least two")
    values = _values(row, answers, responses)
    if len(values) != len(responses):
        raise RowError(f"{len(responses)} {answers} have {len(values)} scores or ranks")
    rated = [place for place, value in enumerate(values) if not math.isnan(value)]
    if len(rated) < 2:
        raise RowError(f"of {len(responses)} {answers} {len(rated)} have a score or rank; two are needed")
    worst, best = (pick(rated, key=values.__getitem__) for pick in (min, max))
    if values[worst] == values[best]:
        raise RowError("all responses have the same score or rank, so none is better")
    two = Columns({"chosen": responses[best], "rejected": responses[worst]}, {})
    chosen, rejected = two.text("chosen"), two.text("rejected")
    if column == "prompt" and isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    return _user(prompt) if isinstance(prompt, str) else prompt, answer_of(chosen), answer_of(rejected)


def _values(row: Columns, answers: str, responses: list[Any]) -> list[float]:
    """How good each response is: its score, or minus its rank, of which the least is the best; NaN for none."""
    column = next((name for name in RANKED[answers] if row.get(name) is not None), None)
    if column:
        values = [Columns({column: value}, {}).number(column, math.nan) for value in row.parsed(column, list)]
    else:
        own = [key for key in OWN_RANKS if all(isinstance(each, dict) and key in each for each in responses)]
        if not own:
            how = " or ".join(RANKED[answers]) or "a rank or score of its own in each"
            raise RowError(f"{answers} need {how} (scores: the higher the better; ranks: the lower)")
        column = own[0]
        values = [Columns(each, {}).number(column, math.nan) for each in responses]
    return [-value if column in ("ranks", "rank") else value for value in values]


# What --format names: what it is called, and its reader.
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
    "openai": ("input, preferred and non-preferred output (OpenAI)", _openai),
    "swift": ("a conversation with the chosen answer, and the rejected one (ms-swift)", _swift),
}
OWN_ANSWERS = ("ranked", "stackexchange", "openai", "swift")  # whose answers have other names


def _format_of(row: Columns) -> str:
    """The format that a record's columns stand for; those that --columns names come first."""
    if row.get("chosen") is None:
        if any(row.get(name) is not None for name in RANKED):
            return "ranked"
        if row.get("preferred_output") is not None:
            return "openai"
        if row.get("messages") is not None and {"rejected_response", "rejected_messages"} & row.record.keys():
            return "swift"
        if row.get("response_j") is not None:
            return "stackexchange"
        if "label" in row.record and {"completion", "response"} & row.record.keys():
            raise RowError("chosen is missing: the row is one response with a label, and DPO compares two")
    column = _prompt_column(row)
    if column == "prompt" and isinstance(row.get("prompt"), list):
        return "messages"
    if column == "prompt":
        strings = isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)
        return "strings" if strings or not isinstance(row.get("chosen"), (list, dict)) else "ultrafeedback"
    if column is not None:
        return {"instruction": "alpaca", "question": "orca", "input": "orca"}.get(column, "sharegpt")
    return "conversations" if isinstance(row.get("chosen"), (list, dict)) else "hh"


def _prompt_column(row: Columns) -> str | None:
    """Our name of the column that has the prompt."""
    present = (
        name
        for name in sorted(PROMPTS, key=lambda name: name not in row.names)
        if name in row.names or row.get(name) is not None
    )
    return next(present, None)


def _other_columns(record: dict[str, Any], names: dict[str, str], format_: str | None) -> str:
    """The end of a message about a missing column: a --columns with which the row is read, or what the row has."""
    found, taken = dict(names), names.values()
    left = [name for name in record if record[name] is not None and name not in taken and name.isprintable()]
    typing = ""
    for ours, words in _WORDS.items():
        if ours in found or record.get(ours) is not None or (ours == "prompt" and {*PROMPTS} & {*left}):
            continue
        called = next((name for name in left if words & {*_WORD.findall(name.lower())}), None)
        if theirs := called or next(iter(difflib.get_close_matches(ours, left, n=1, cutoff=0.75)), None):
            found[ours] = theirs
            left.remove(theirs)
            typing = typing or ("" if called else f"; did you mean '{theirs}'?")
    if found != names:
        try:
            _parse_row(record, "", found, format_)
        except RowError:
            pass
        else:
            columns = ",".join(f"{ours}={found[ours]}" for ours in COLUMNS if ours in found)
            return f"{typing} Try --columns {columns}" if typing else f"; try --columns {columns}"
    if not record or record.keys() & {"chosen", "rejected"}:
        return ""
    have = ", ".join(shortened(name) for name in list(record)[:8])
    return f"; the row has {have} (name yours as --columns prompt=NAME,chosen=NAME,rejected=NAME)"


_WORD = re.compile(r"[a-z]+")
_WORDS = {  # by which other columns are called
    "rejected": {"rejected", "non", "dispreferred", "bad", "worse", "worst", "negative", "loser", "declined"},
    "chosen": {"chosen", "preferred", "good", "better", "best", "positive", "winner", "accepted"},
    "prompt": {"prompt", "question", "query", "instruction", "request", "context", "input"},
}


# ---- records to rows --------------------------------------------------------------------------------------------


def _parse_row(record: Any, where: str, names: dict[str, str], format_: str | None) -> Row:
    if not isinstance(record, dict):
        array = "; a file that is one array of rows is named .json" if isinstance(record, list) else ""
        raise RowError(f"not an object with the columns prompt, chosen, rejected{array}")
    row = Columns(record, names)
    raw = format_ == "strings"  # as TRL's standard format: asked for, strings stay as they are
    format_ = format_ or _format_of(row)
    if missing := [column for column in names if column not in OTHERS and row.get(column) is None]:
        near = did_you_mean(names[missing[0]], record)
        raise RowError(f"{row.named(missing[0])} is missing{near}")
    if unread := [column for column in UNREAD if record.get(column)]:
        raise RowError(f"has the column '{unread[0]}', and only text is read")
    label, read = FORMATS[format_]
    row.asked.clear()
    if format_ not in OWN_ANSWERS:
        _check_kinds(row)
    sides = _without_prompt(*read(row))
    arguments = _template_arguments(row)
    system = row.get("system_prompt" if row.get("system") is None else "system")
    if {row.names.get("system", "system"), "system_prompt"} & record.keys() or arguments:
        label += ", made into turns" * isinstance(sides[0], str)
        sides = _with_system(system, *sides)
    prompt, chosen, rejected = sides
    _check_content(prompt, chosen, rejected)
    weight, margin = row.number("weight", 1.0), row.number("margin", 0.0)
    if weight < 0:
        raise RowError(f"{row.named('weight')} must not be negative")
    if isinstance(name := row.get("id"), (str, int)) and name != "":
        where = f"{where} (id {shortened(str(name))})"
    if unread := sorted(names.keys() - row.asked):
        why = f"a row of the format '{format_}' has no {unread[0]}; name its format by --format"
        raise RowError(f"--columns {unread[0]}={names[unread[0]]}: {why}")
    return Row(where, label, prompt, chosen, rejected, arguments, weight, margin, raw)


def _without_prompt(prompt: Text, chosen: Text, rejected: Text) -> Three:
    """Responses without the messages of the prompt, where these stand before each once more."""
    n = len(prompt)
    if isinstance(prompt, list) and prompt and chosen[:n] == prompt == rejected[:n]:
        return prompt, chosen[n:], rejected[n:]
    return prompt, chosen, rejected


def _check_kinds(row: Columns) -> None:
    """Chosen and rejected are there, and of one kind."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected differ in kind: one is a string, the other a message list")


def _template_arguments(row: Columns) -> dict[str, Any]:
    """What the chat template gets beside the messages; a tool is given as the function that it is."""
    arguments: dict[str, Any] = without_nulls(row.parsed("chat_template_kwargs", dict))
    if taken := sorted(arguments.keys() & RESERVED):
        raise RowError(f"{row.named('chat_template_kwargs')} has '{taken[0]}', which is not the row's to say")
    tools = row.parsed("tools", list) or row.tools or []
    tools = [json_value(tool) if isinstance(tool, str) else tool for tool in tools]  # each may be JSON text
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{row.named('tools')} must be a list of JSON objects")
    if tools:
        tools = [without_nulls(tool) for tool in tools]
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        if not all(isinstance(tool["function"], dict) for tool in wrapped):
            raise RowError(f"{row.named('tools')} has a tool whose function is no object")
        arguments = arguments | {"tools": wrapped}
    return arguments


def _with_system(system: Any, prompt: Text, chosen: Text, rejected: Text) -> Three:
    """A conversation that begins with the system message; strings become turns of it."""
    if system is not None and not isinstance(system, str):
        raise RowError("system must be a string")
    if has_surrogate(system or ""):
        raise RowError("system has half of a surrogate pair, which is no text")
    if isinstance(prompt, str) and is_rendered(prompt):
        raise RowError("a prompt that is rendered already has no place for a system message or tools; write messages")
    turns = _user(prompt) if isinstance(prompt, str) else prompt
    if system and turns and turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise RowError("the conversation has a system message, and the column 'system' another")
    if system and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": system}, *turns]
    return turns, answer_of(chosen), answer_of(rejected)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of what two lists or texts begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _check_content(prompt: Text, chosen: Text, rejected: Text) -> None:
    if not prompt:
        raise RowError("prompt is empty: the conversations share no first message")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, str):
            if not response.strip():
                raise RowError(f"{name} is empty")
        else:
            _check_response(response, name)
    if chosen == rejected:
        raise RowError("chosen equals rejected")
    if all(isinstance(each, str) and _is_list(each) for each in (prompt, chosen, rejected)):
        raise RowError("prompt, chosen and rejected are lists of strings written as text; write a row for each of them")
    if isinstance(prompt, list) and any(m["role"] == "user" and not m["content"].strip() for m in prompt):
        raise RowError("prompt has a user turn without text")
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"prompt ends with the role '{prompt[-1]['role']}'; it must end with user or tool")


def _is_list(text: str) -> bool:
    """Whether a text is a JSON list of strings."""
    value = json_value(text) if text.startswith("[") else None
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _check_response(response: list[Message], name: str) -> None:
    for message in response:
        if message["role"] not in ("assistant", "tool", "user"):
            raise RowError(f"{name} has a '{message['role']}' turn; it may stand before all answers only")
    if not response or response[-1]["role"] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    if not response[-1].get("tool_calls") and not response[-1]["content"].strip():
        raise RowError(f"{name} is empty")
