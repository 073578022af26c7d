"""The columns of one record: strings, messages and numbers, each checked when it is asked for."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any

from dpo_cli.errors import RowError, did_you_mean
from dpo_cli.records import shortened

Message = dict[str, Any]
Text = str | list[Message]

LARGEST = 3e38  # in float32
ROLES = ("system", "developer", "user", "assistant", "tool")
# Other names of the roles: ShareGPT's and those of programs that write like it.
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


class Columns:
    """A record under our names of its columns; a value is checked when it is asked for."""

    def __init__(self, record: dict[str, Any], names: dict[str, str]) -> None:
        self.record, self.names = record, names
        self.texts: dict[str, Text] = {}  # those that were checked

    def get(self, column: str) -> Any:
        """The value as it is, None where there is none."""
        return self.record.get(self.names.get(column, column))

    def named(self, column: str) -> str:
        """The column as an error tells it."""
        return f"{column} (column '{self.names[column]}')" if column in self.names else column

    def text(self, column: str) -> Text:
        """A string, or messages, neither of them empty."""
        if column not in self.texts:
            self.texts[column] = self._checked_text(column)
        return self.texts[column]

    def _checked_text(self, column: str) -> Text:
        value, named = self.get(column), self.named(column)
        if value is None:
            raise RowError(f"{named} is missing{self._other_names(column)}")
        if isinstance(value, str):
            _check_string(value, named)
            text: Text = value
        elif isinstance(value, (dict, list)):
            messages = [value] if isinstance(value, dict) else value
            text = [_message(message, f"{named}, message {number}") for number, message in enumerate(messages, 1)]
        else:
            raise RowError(
                f"{named} is {_KINDS.get(type(value), 'no text')}; it must be a string or a list of messages"
            )
        if not (text.strip() if isinstance(text, str) else text):
            raise RowError(f"{named} is empty")
        return text

    def _other_names(self, missing: str) -> str:
        """What the row has, where its columns seem to be named otherwise."""
        if missing not in _MEANS or missing in self.names or not self.record or _MEANS.keys() & self.record.keys():
            return ""
        others = ", ".join(shortened(name) for name in list(self.record)[:8])
        return f"; the row has {others} (--columns {missing}=NAME, if one of them is always {_MEANS[missing]})"

    def string(self, column: str) -> str:
        """A string that is not empty."""
        value = self.text(column)
        if not isinstance(value, str):
            raise RowError(f"{self.named(column)} must be a string in this format")
        return value

    def messages(self, column: str) -> list[Message]:
        """A list of messages that is not empty."""
        value = self.text(column)
        if isinstance(value, str):
            raise RowError(f"{self.named(column)} must be a list of messages in this format")
        return value

    def answers(self) -> tuple[list[Message], list[Message]]:
        """Chosen and rejected as messages; a string is one of the assistant."""
        chosen, rejected = self.text("chosen"), self.text("rejected")
        return answer_of(chosen), answer_of(rejected)

    def number(self, column: str, default: float) -> float:
        """A finite number, also in float32; a string may hold one, as in CSV."""
        value = self.get(column)
        if value is None or value == "":
            return default
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) < LARGEST:
            raise RowError(f"{self.named(column)} must be a finite number, not {shortened(repr(value))}")
        return number

    def parsed(self, column: str, kind: type[Any]) -> Any:
        """A list or object, also where it is written as JSON text; empty where there is none."""
        value = self.get(column)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except (ValueError, RecursionError) as error:
                raise RowError(f"{self.named(column)} is not JSON: {error}") from error
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise RowError(f"{self.named(column)} must be a {'list' if kind is list else 'JSON object'}")
        return value


_SHAREGPT = {"from": "role", "value": "content"}
_MEANS = {"chosen": "the better answer", "rejected": "the worse answer"}
_KINDS: dict[type, str] = {int: "a number", float: "a number", bool: "true or false"}


def _check_string(text: str, named: str) -> None:
    if _MESSAGES.match(text):
        raise RowError(f"{named} is a message list written as text; write it as a list, in .jsonl or .parquet")
    if has_surrogate(text):
        raise RowError(f"{named} has half of a surrogate pair, which is no text")


_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in it; such a text cannot be encoded."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def _message(message: Any, named: str) -> Message:
    """A message with ``role`` and ``content``, which ShareGPT calls ``from`` and ``value``."""
    if isinstance(message, dict) and "role" not in message and "from" in message:
        message = {_SHAREGPT.get(key, key): value for key, value in message.items()}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{named}: must be an object with role and content")
    said = message["role"]
    role = ALIASES.get(said, said)
    if role not in ROLES:
        near = did_you_mean(said, ROLES) or f"; use one of {', '.join(ROLES)}"
        raise RowError(f"{named}: unknown role '{shortened(said)}'{near}")
    content: Any = message.get("content")
    if isinstance(content, list):
        content = _joined(content, named)
    if said == "function_call" and (calls := _calls(content)):
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if message.get("tool_calls"):
        message = message | {"tool_calls": _decoded(message["tool_calls"], named)}
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{named}: content must be a string")
    if has_surrogate(content):
        raise RowError(f"{named}: content has half of a surrogate pair, which is no text")
    as_it_is = role == said and content is message.get("content")
    return dict(message) if as_it_is else message | {"role": role, "content": content}


def _joined(parts: list[Any], named: str) -> str:
    """Content that is a list of parts, if all of them are text."""
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise RowError(f"{named}: content has a part that is no text")


def _calls(content: Any) -> list[dict[str, Any]]:
    """ShareGPT's function call as tool calls; none where it is no JSON."""
    try:
        value = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _decoded(calls: Any, named: str) -> list[Any]:
    """Tool calls whose arguments are objects: OpenAI writes them as JSON text, and most templates would once more."""
    decoded = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{named}: tool_calls must be a list of objects with a function's name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        function = function | {"arguments": {} if arguments is None else arguments}
        decoded.append(call | {"function": function} if "function" in call else function)
    return decoded


def answer_of(value: Text) -> list[Message]:
    """A response as messages; a string is one of the assistant."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value
