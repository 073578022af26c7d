"""Records of every accepted format as rows; what is wrong with a bad one is named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.errors import RowError, UsageError
from dpo_cli.records import Source, shortened

Message = dict[str, Any]
Text = str | list[Message]

COLUMNS = ("prompt", "chosen", "rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


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
                yield _parse_row(record, where, names)
            except RowError as error:
                yield BadRow(where, str(error), record)


def _parse_columns(columns: str | None) -> dict[str, str]:
    names = {name: name for name in COLUMNS}
    for part in filter(None, (columns or "").split(",")):
        ours, _, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not theirs:
            raise UsageError(f"--columns {columns}: write it as prompt=NAME,chosen=NAME,rejected=NAME")
        names[ours] = theirs
    return names


_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in it; such a text cannot be encoded."""
    return not text.isascii() and _SURROGATE.search(text) is not None


# ---- records to rows --------------------------------------------------------------------------------------------


def _parse_row(record: Any, where: str, names: dict[str, str]) -> Row:
    if not isinstance(record, dict):
        raise RowError("not an object with the columns prompt, chosen, rejected")
    fields = {ours: _field(record, ours, theirs) for ours, theirs in names.items()}
    prompt, chosen, rejected = (fields[name] for name in COLUMNS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected differ in kind: one is a string, the other a message list")
    if isinstance(chosen, str) and isinstance(prompt, list):
        prompt, chosen, rejected = prompt, _answer(chosen), _answer(rejected)
    if isinstance(chosen, str):
        format_ = "prompt and responses as strings" if prompt is not None else "dialogues as strings (HH)"
        prompt, chosen, rejected = (prompt, chosen, rejected) if prompt is not None else _split_hh(chosen, rejected)
    elif isinstance(prompt, list):
        format_ = "prompt and responses as messages"
    else:  # full conversations; a prompt string beside them is in them already
        format_ = "conversations with a common prefix"
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
    row = Row(where, format_, prompt, chosen, rejected)
    _check_content(row)
    return row


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _field(record: dict[str, Any], ours: str, theirs: str) -> Any:
    """One column, with its type checked; None only for a prompt that is not there."""
    named = ours if ours == theirs else f"{ours} (column '{theirs}')"
    value = record.get(theirs)
    if value is None:
        if ours == "prompt" and ours == theirs:
            return None
        raise RowError(f"{named} is missing")
    if isinstance(value, list):
        for number, message in enumerate(value, 1):
            _check_message(message, f"{named}, message {number}")
    elif not isinstance(value, str):
        raise RowError(f"{named} is a {type(value).__name__}; it must be a string or a list of messages")
    elif value.lstrip().startswith(('[{"role"', "[{'role'")):
        raise RowError(f"{named} is a message list written as text; write it as a list, in .jsonl or .parquet")
    elif has_surrogate(value):
        raise RowError(f"{named} has half of a surrogate pair, which is no text")
    if not (value if isinstance(value, list) else value.strip()):
        raise RowError(f"{named} is empty")
    return value


def _check_message(message: Any, named: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{named}: must be an object with role and content")
    if message["role"] not in ROLES:
        raise RowError(f"{named}: unknown role '{shortened(message['role'])}'; use one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise RowError(f"{named}: content must be a string")
    if has_surrogate(content):
        raise RowError(f"{named}: content has half of a surrogate pair, which is no text")


def _split_hh(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: _common_prefix(before_chosen, before_rejected)]
    if not shared:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if HH_HUMAN in chosen[cut:] or HH_HUMAN in rejected[cut:]:
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    cut = _common_prefix(chosen, rejected)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common_prefix(a: list[Any], b: list[Any]) -> int:
    """Length of what two lists begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _check_content(row: Row) -> None:
    for name, response in (("chosen", row.chosen), ("rejected", row.rejected)):
        if isinstance(response, str):
            if not response.strip():
                raise RowError(f"{name} is empty")
        else:
            _check_response(response, name)
    if row.chosen == row.rejected:
        raise RowError("chosen equals rejected")
    if not row.prompt:
        raise RowError("prompt is empty: the conversations share no first message")
    if isinstance(row.prompt, list) and row.prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"prompt ends with the role '{row.prompt[-1]['role']}'; it must end with user or tool")


def _check_response(response: list[Message], name: str) -> None:
    for message in response:
        if message["role"] not in ("assistant", "tool"):
            raise RowError(f"{name} has a '{message['role']}' turn; the two may differ in their last answer only")
    if not response or response[-1]["role"] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    if not response[-1].get("tool_calls") and not response[-1]["content"].strip():
        raise RowError(f"{name} is empty")
