"""Records as rows: a prompt and its answers, with weight, margin and template arguments; bad rows have a reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dpo_cli.data.formats import (
    COLUMNS,
    FORMATS,
    OTHERS,
    PAIRINGS,
    PROMPTS,
    Record,
    answer_names,
    detect_format,
    number,
    parsed,
)
from dpo_cli.data.messages import CONVERSATIONS, Text, answer_of, check_encodable, unwrap, user_turn, without_nulls
from dpo_cli.data.readers import TOO_DEEP, json_value, shortened
from dpo_cli.data.sources import Source
from dpo_cli.utils.errors import RowError, UsageError, did_you_mean

# A prompt that a chat template rendered: it begins with a template's marker, or ends with what opens an answer.
_BEGINS = re.compile(
    r"\s*(?:<\|[\w ]+\|>|<｜[^｜\s]+｜>|\[gMASK\]|<bos>|<s>\s*(?:\[INST\]|<\|)|\[INST\]|<start_of_turn>|<\|turn>"
    r"|\n\nHuman:)"
)
_OPENS = re.compile(
    r"(?:<\|assistant\|>|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|<\|im_start\|>assistant|assistant<\|end_header_id\|>|\[/INST\]"
    r"|<start_of_turn>model|### ?(?:Response|Assistant):|\n(?:Assistant|ASSISTANT):)\s*(?:<think>\s*)?\Z"
)
# Arguments of apply_chat_template that a row must not set.
RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
}
UNREAD = ("image", "images", "video", "videos", "audio", "audios")  # parts of a question that are not text


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its answers, best first: all strings, or all message lists. Equal ``levels`` give no order.

    ``pairs``: which of the answers are compared, a key of ``PAIRINGS``.
    """

    where: str
    format: str
    prompt: Text
    answers: tuple[Text, ...]
    template_arguments: dict[str, Any] = field(default_factory=dict)  # beside the messages
    weight: float = 1.0  # multiplies the loss of its pairs
    margin: float = 0.0  # the difference that their rewards should have at least
    raw: bool = False  # strings that no chat template wraps
    levels: tuple[float, ...] = (1.0, 0.0)
    pairs: str = "best-worst"
    margin_per_score: float = 0.0  # added to the margin of a pair for each unit of the difference of its levels
    notes: frozenset[str] = frozenset()

    @property
    def sides(self) -> dict[str, Text]:
        """The answers by their names."""
        return dict(zip(answer_names(len(self.answers)), self.answers, strict=True))

    def preferences(self, pairs: str | None = None) -> list[tuple[int, int]]:
        """Return the places of the two answers of each pair, the better one first; ``pairs``: other than the row's."""
        order, every = sorted({*self.levels}, reverse=True), (pairs or self.pairs) == "all"
        steps = [order.index(level) for level in self.levels]
        both = combinations(range(len(steps)), 2)
        return [(i, j) for i, j in both if 0 < steps[j] - steps[i] <= (len(order) if every else 1)]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    record: Any = None
    format: str = ""


def read_rows(
    sources: Iterable[Source],
    columns: str | None = None,
    format_: str | None = None,
    pairs: str = "best-worst",
    margin_per_score: float = 0.0,
) -> Iterator[Row | BadRow]:
    """Yield every row of every source in order, bad ones included.

    ``pairs``: which of several ranked answers are compared, a key of ``PAIRINGS``; ``margin_per_score``: see ``Row``.

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
                yield _parse_row(record, where, names, format_, pairs, margin_per_score)
            except RecursionError:
                yield BadRow(where, TOO_DEEP)
            except RowError as error:
                reason = str(error)
                for ours, theirs in names.items():
                    reason = re.sub(rf"^{ours}\b", lambda _: f"{ours} (column '{theirs}')", reason)  # noqa: B023
                yield BadRow(where, reason, record)


def _parse_columns(columns: str | None) -> dict[str, str]:
    """Parse ``--columns``: the data's names of our columns."""
    names = {}
    for part in filter(None, (columns or "").split(",")):
        ours, _, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not theirs:
            hint = "" if ours in COLUMNS else did_you_mean(ours, COLUMNS)
            others = ", ".join(column for column in COLUMNS if column not in ("prompt", "chosen", "rejected"))
            usage = f"write it as prompt=NAME,chosen=NAME,rejected=NAME; also {others}"
            raise UsageError(f"--columns {columns}: {usage}{hint}")
        names[ours] = theirs
    return names


def _parse_row(
    record: Any, where: str, names: dict[str, str], format_: str | None, pairs: str, margin_per_score: float
) -> Row:
    row = _our_columns(record, names)
    raw = format_ == "strings"  # as TRL's standard format
    format_ = format_ or detect_format(row)
    accepted = FORMATS[format_]._replace(pairs=pairs)
    label = accepted.label + f": {PAIRINGS[pairs]}" * (format_ == "ranked")
    if unread := sorted(names.keys() - {*accepted.columns, *OTHERS}):
        why = f"a row of the format '{format_}' has no {unread[0]}; name its format by --format"
        raise RowError(f"--columns {unread[0]}={names[unread[0]]}: {why}")
    sides = [row[name] for name in ("chosen", "rejected") if isinstance(row.get(name), (str, list, dict))]
    if "chosen" in accepted.columns and len({isinstance(side, str) for side in sides}) == 2:
        raise RowError("chosen and rejected differ in kind: one is a string, the other a message list")
    prompt, answers, levels, scored, notes = accepted.read(row, accepted)
    if margin_per_score and not scored:
        raise RowError("--margin-per-score: the row has no scores")
    arguments = _template_arguments(row)
    if {names.get("system", "system"), "system_prompt"} & record.keys() or arguments:
        label += ", made into turns" * isinstance(prompt, str)
        prompt = _with_system(row.get("system", row.get("system_prompt")), prompt)
        answers = tuple(map(answer_of, answers))
    weight, margin = number(row, "weight", 1.0), number(row, "margin", 0.0)
    if weight < 0:
        raise RowError("weight must not be negative")
    if isinstance(name := row.get("id"), (str, int)) and name != "":
        where = f"{where} (id {shortened(str(name))})"
    ranking = levels, pairs, margin_per_score, notes
    made = Row(where, label, prompt, answers, arguments, weight, margin, raw, *ranking)
    _check_content(made)
    return made


def _our_columns(record: Any, names: dict[str, str]) -> Record:
    """Return a record's values under our names of its columns, without nulls; messages in JSON text are decoded."""
    if not isinstance(record, dict):
        hint = "; a file that is one array of rows is named .json" if isinstance(record, list) else ""
        raise RowError(f"not an object with the columns prompt, chosen, rejected{hint}")
    if missing := [c for c in names if c not in OTHERS and record.get(names[c]) is None]:
        raise RowError(f"{missing[0]} is missing{did_you_mean(names[missing[0]], record)}")
    if unread := [column for column in UNREAD if record.get(column)]:
        raise RowError(f"has the column '{unread[0]}', and only text is read")
    row = {name: value for name, value in record.items() if value is not None and name not in names.values()}
    row |= {ours: record[theirs] for ours, theirs in names.items() if record.get(theirs) is not None}
    if mapped := names.keys() & {*PROMPTS}:  # then no other column is the prompt; ``input`` belongs to an instruction
        row = {name: value for name, value in row.items() if name not in {*PROMPTS} - mapped - {"input"}}
    texts = {"prompt", *CONVERSATIONS, *(name for each in FORMATS.values() for name in each.answers)}
    return {column: unwrap(value, column) if column in texts else value for column, value in row.items()}


def is_rendered(prompt: str) -> bool:
    """Return whether a chat template, of whichever model, was applied to a prompt before it was stored."""
    return bool(_BEGINS.match(prompt) or _OPENS.search(prompt, max(0, len(prompt) - 80)))


# ---- what is common to all formats ------------------------------------------------------------------------------


def _template_arguments(row: Record) -> dict[str, Any]:
    """Collect what the chat template gets beside the messages; tools are wrapped as functions."""
    arguments: dict[str, Any] = without_nulls(parsed(row, "chat_template_kwargs", dict))
    if taken := sorted(arguments.keys() & RESERVED):
        raise RowError(f"chat_template_kwargs has '{taken[0]}', which a row cannot set")
    tools = [json_value(tool) if isinstance(tool, str) else tool for tool in parsed(row, "tools", list)]
    if not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise RowError("tools must be a list of JSON objects")
    if not tools:
        return arguments
    tools = [without_nulls(tool) for tool in tools]
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return arguments | {"tools": wrapped}


def _with_system(system: Any, prompt: Text) -> Text:
    """Begin a conversation with a system message; a string becomes the user's turn."""
    if system is not None and not isinstance(system, str):
        raise RowError("system must be a string")
    check_encodable(system or "", "system")
    if isinstance(prompt, str) and is_rendered(prompt):
        raise RowError("a prompt that is rendered already has no place for a system message or tools; write messages")
    turns = user_turn(prompt) if isinstance(prompt, str) else prompt
    has_system = bool(turns) and turns[0]["role"] == "system"
    if system and has_system and turns[0]["content"] != system:
        raise RowError("the conversation has a system message, and the column 'system' another")
    return turns if has_system or not system else [{"role": "system", "content": system}, *turns]


def _check_content(row: Row) -> None:
    prompt, names = row.prompt, [*row.sides]
    if not prompt:
        raise RowError("prompt is empty: the conversations share no first message")
    for name, answer in row.sides.items():
        _check_response(answer_of(answer), name)
    for better, worse in row.preferences("all"):
        if row.answers[better] == row.answers[worse]:
            raise RowError(f"{names[better]} equals {names[worse]}")
    if isinstance(prompt, str):
        return
    if any(message["role"] == "user" and not message["content"].strip() for message in prompt):
        raise RowError("prompt has a user turn without text")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"prompt ends with the role '{prompt[-1]['role']}'; it must end with user or tool")


def _check_response(turns: list[dict[str, Any]], name: str) -> None:
    for message in turns:
        if message["role"] not in ("assistant", "tool", "user"):
            raise RowError(f"{name} has a '{message['role']}' turn; it may stand before all answers only")
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    if not turns[-1].get("tool_calls") and not turns[-1]["content"].strip():
        raise RowError(f"{name} is empty")
