"""The columns of one record: strings, messages and numbers, each checked when it is asked for."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from dpo_cli.data.readers import json_value, shortened
from dpo_cli.utils.errors import RowError, did_you_mean

Message = dict[str, Any]
Text = str | list[Message]

LARGEST = 3e38  # in float32
ROLES = ("system", "user", "assistant", "tool")
# Other names of the roles, in any case: ShareGPT's, those of programs that write like it, and the templates' own.
ALIASES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "environment": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
REASONING = "reasoning_content"
REASONING_KEYS = (REASONING, "reasoning", "thinking")  # by which rows and chat templates name it
ANSWER_KEYS = ("completion", "response", "answer", "text", "content", "output", "generated_text")  # of an object


TEXTS = ("prompt", "chosen", "rejected", "conversations", "messages", "context")  # which messages may be in


class Columns:
    """A record under our names of its columns; a value is checked when it is asked for."""

    def __init__(self, record: dict[str, Any], names: dict[str, str]) -> None:
        self.record, self.names = record, names
        self.texts: dict[str, Text] = {}  # those that were checked
        self.asked: set[str] = set()
        self.tools: Any = None  # those that stand inside a conversation's object, not in a column

    def renamed(self, **names: str) -> Columns:
        """The same record under more names."""
        other = Columns(self.record, self.names | names)
        other.asked = self.asked
        return other

    def get(self, column: str) -> Any:
        """The value, None where there is none; messages that were written as JSON text are read.

        A column that ``names`` gives another meaning has no longer the one that its own name says.
        """
        self.asked.add(column)
        if column not in self.names and column in self.names.values():
            return None
        value = self.record.get(self.names.get(column, column))
        if isinstance(value, str) and column in TEXTS:
            return _messages_in(value, column, self.named(column))
        return _one_text(value, self.named(column)) if column in TEXTS[:3] else value

    def named(self, column: str) -> str:
        """The column as an error names it."""
        return f"{column} (column '{self.names[column]}')" if column in self.names else column

    def text(self, column: str) -> Text:
        """A string, or messages, neither of them empty."""
        if column not in self.texts:
            self.texts[column] = self._checked_text(column)
        return self.texts[column]

    def _checked_text(self, column: str) -> Text:
        value, named = self.get(column), self.named(column)
        if value is None:
            raise MissingColumnError(f"{named} is missing")
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            if self.tools not in (None, value.get("tools")):
                raise RowError(f"{named} has other tools than the row or the other answer")
            value, self.tools = value["messages"], value.get("tools")
        if isinstance(value, str):
            if has_surrogate(value):
                raise RowError(f"{named} has half of a surrogate pair, which is no text")
            text: Text = value
        elif isinstance(value, (dict, list)):
            text = _conversation([value] if isinstance(value, dict) else value, named)
        else:
            raise RowError(
                f"{named} is {_KINDS.get(type(value), 'no text')}; it must be a string or a list of messages"
            )
        if not (text.strip() if isinstance(text, str) else text):
            raise RowError(f"{named} is empty")
        return text

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


class MissingColumnError(RowError):
    """A column that the format needs is not there: the row may have it under another name."""


_SHAREGPT = {"from": "role", "value": "content"}
_KINDS: dict[type, str] = {int: "a number", float: "a number", bool: "true or false"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLE = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](\w+)['"]""")
_SPOKEN = {"content", "value", "tool_calls"}
_LIST = re.compile(r"""\s*\[\s*\{\s*['"]\w+['"]\s*:.*\}\s*\]?\s*""", re.DOTALL)


def has_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in it; such a text cannot be encoded."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null: Arrow gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def answer_of(value: Text) -> list[Message]:
    """A response as messages; a string is one of the assistant, without the one space that a raw one begins with."""
    if not isinstance(value, str):
        return value
    return [{"role": "assistant", "content": value[1:] if value[:1] == " " and value[1:2].strip() else value}]


# ---- messages ---------------------------------------------------------------------------------------------------


def _messages_in(text: str, column: str, named: str) -> Any:
    """The messages that a text holds as JSON; any other text as it is: an answer may be JSON of its own kind."""
    if text.lstrip()[:1] not in ("{", "[") or not any(_is_role(found[1]) for found in _ROLE.finditer(text)):
        return text
    value = json_value(text)
    if value is None:
        if _LIST.fullmatch(text):
            raise RowError(f"{named} is a message list written as text, but not as JSON; write it as a list, in .jsonl")
        return text
    whole = isinstance(value, dict) and value.keys() <= {"messages", "tools"}
    inner = value.get("messages") if whole else value
    messages = inner if isinstance(inner, list) else [inner]
    roles = [each.get("role", each.get("from")) if isinstance(each, dict) else None for each in messages]
    if not messages or not all(map(_is_role, roles)):
        return text
    answer = str(roles[-1]).lower() not in ("system", "developer", "user", "human") and _SPOKEN & messages[-1].keys()
    return value if column not in ("chosen", "rejected") or answer else text


def _is_role(name: Any) -> bool:
    return isinstance(name, str) and (name.lower() in ROLES or name.lower() in ALIASES)


def _one_text(value: Any, named: str) -> Any:
    """The text of an object that has one, and of a list of one string; any other value as it is."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        if len(value) > 1:
            raise RowError(f"{named} is a list of {len(value)} strings; a row has one prompt and two answers")
        return value[0]
    if not isinstance(value, dict) or value.keys() & {"role", "from", "messages"}:
        return value
    keys = [key for key in ANSWER_KEYS if value.get(key) is not None]
    if len(keys) != 1:
        have = ", ".join(shortened(key) for key in list(value)[:8])
        raise RowError(f"{named}: must be a message with role and content, or an object with one text; it has {have}")
    return value[keys[0]]


def _conversation(messages: list[Any], named: str) -> list[Message]:
    """Messages, each as ``_message`` makes it; system messages that begin a conversation are joined into one."""
    found = [_message(message, f"{named}, message {number}") for number, message in enumerate(messages, 1)]
    while [message["role"] for message in found[:2]] == ["system", "system"]:
        found[:2] = [found[0] | {"content": f"{found[0]['content']}\n\n{found[1]['content']}"}]
    return found


def _message(message: Any, named: str) -> Message:
    """One message in the one form that the program knows, so that each version of transformers gives the same text.

    Its role is one of ``ROLES``, its content a string, its reasoning under ``reasoning_content``, its tool calls a list
    of objects whose arguments are objects. What is null or empty is not there. ShareGPT's ``from`` and ``value`` are
    ``role`` and ``content``.
    """
    if isinstance(message, dict) and "role" not in message and "from" in message:
        message = {_SHAREGPT.get(key, key): value for key, value in message.items()}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{named}: must be an object with role and content")
    written = message["role"].strip().lower()
    role = ALIASES.get(written, written)
    if role not in ROLES:
        near = did_you_mean(written, (*ROLES, *ALIASES)) or f"; use one of {', '.join(ROLES)}"
        raise RowError(f"{named}: unknown role '{shortened(message['role'])}'{near}")
    found = {key: value for key, value in message.items() if value is not None and key not in REASONING_KEYS}
    found |= {"role": role} | (_reasoning(message, named) if role == "assistant" else {})
    content = _content(message.get("content"), role, named)
    calls = _calls(found.pop("tool_calls", None) or found.pop("function_call", None), named)
    if written in ("function_call", "tool_call") and (own := _calls_in(content)):
        content, calls = "", _calls(own, named)
    if content is None and (calls or "function_calls" in found):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{named}: content must be a string")
    if has_surrogate(content):
        raise RowError(f"{named}: content has half of a surrogate pair, which is no text")
    return found | {"content": content} | ({"tool_calls": calls} if calls else {})


def _reasoning(message: Message, named: str) -> Message:
    """A message's reasoning under its one name; nothing where it has none."""
    found = {message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key].strip()}
    if len(found) > 1:
        raise RowError(f"{named}: has different texts under {' and '.join(k for k in REASONING_KEYS if k in message)}")
    return {REASONING: found.pop()} if found else {}


def _content(content: Any, role: str, named: str) -> Any:
    """A content as text, where it is a list of parts that are text; what a tool gave may be any JSON."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if role == "tool" and isinstance(content, (dict, list)):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        raise RowError(f"{named}: content has a part that is no text")
    return content


def _calls_in(content: Any) -> list[Any]:
    """The tool calls that a content is, as ShareGPT writes them; none where it is no JSON of that kind."""
    value = json_value(content) if isinstance(content, str) else None
    calls: list[Any] = value if isinstance(value, list) else [value]
    return calls if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls) else []


def _calls(calls: Any, named: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects: OpenAI writes them as JSON text, and most templates would once more.

    Text that is no object stays text. A null in an object is dropped, since Arrow puts it there; text has none of it.
    """
    if isinstance(calls, str) and calls.strip():
        calls = json_value(calls)
        if calls is None:
            raise RowError(f"{named}: tool_calls is text and not JSON")
    decoded = []
    for each in [calls] if isinstance(calls, dict) else calls or ():
        call = without_nulls(each)
        function = call.pop("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{named}: tool_calls must be a list of objects with a function's name and arguments")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str) and isinstance(value := json_value(arguments), dict):
            arguments = value
        if not isinstance(arguments, (dict, str)):
            raise RowError(f"{named}: a tool call's arguments must be an object")
        others = {} if function is call else call
        decoded.append(others | {"type": "function", "function": function | {"arguments": arguments}})
    return decoded
