"""Messages in one form: roles, content, reasoning and tool calls, whichever way a data set writes them."""

from __future__ import annotations

import json
import re
from typing import Any

from dpo_cli.data.readers import json_value, shortened
from dpo_cli.utils.errors import RowError, did_you_mean

Message = dict[str, Any]
Text = str | list[Message]

ROLES = ("system", "user", "assistant", "tool")
# Other names of the roles, in any case: ShareGPT's, those of similar programs, and those of chat templates.
ALIASES = {
    alias: role
    for role, aliases in {
        "system": "developer",
        "user": "human prompter",
        "assistant": "gpt chatgpt model chatbot function_call tool_call",
        "tool": "observation environment ipython function function_response tool_response",
    }.items()
    for alias in aliases.split()
}
REASONING = "reasoning_content"
REASONING_KEYS = (REASONING, "reasoning", "thinking")  # names of it in rows and chat templates
CONVERSATIONS = ("conversations", "messages", "context", "rejected_messages")  # columns of them
TEXT_KEYS = ("completion", "response", "answer", "text", "content", "output", "generated_text")  # of an object

_SURROGATE = re.compile("[\ud800-\udfff]")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:.*\}\s*\]\s*", re.DOTALL)


def user_turn(text: str) -> list[Message]:
    """Return a text as the user's message."""
    return [{"role": "user", "content": text}]


def answer_of(value: Text) -> list[Message]:
    """Return a response as messages; a string is the assistant's, without a single leading space."""
    if not isinstance(value, str):
        return value
    return [{"role": "assistant", "content": value[1:] if value[:1] == " " and value[1:2].strip() else value}]


def check_encodable(text: str, name: str) -> None:
    """Refuse text with a lone surrogate, which cannot be encoded."""
    if not text.isascii() and _SURROGATE.search(text):
        raise RowError(f"{name} has half of a surrogate pair, which is no text")


def without_nulls(value: Any) -> Any:
    """Remove keys whose value is null: Arrow gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


# ---- values that hold messages or text --------------------------------------------------------------------------


def unwrap(value: Any, column: str) -> Any:
    """Return the messages in JSON text, or the only text of an object or a list; any other value as it is."""
    if isinstance(value, str):
        return _messages_in(value, column)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and column not in CONVERSATIONS:
        return value[0]
    if not isinstance(value, dict) or column in CONVERSATIONS or value.keys() & {"role", "from", "messages"}:
        return value
    keys = [key for key in TEXT_KEYS if value.get(key) is not None]
    if len(keys) != 1:
        have = ", ".join(shortened(key) for key in list(value)[:8])
        raise RowError(f"{column}: must be a message with role and content, or an object with one text; it has {have}")
    return value[keys[0]]


def _messages_in(text: str, column: str) -> Any:
    """Decode messages in JSON text; other text, such as an answer in JSON, is returned as it is."""
    if _PYTHON_MESSAGES.fullmatch(text):
        raise RowError(f"{column} is a message list written as text, but not as JSON; write it as a list, in .jsonl")
    value = json_value(text) if text.lstrip()[:1] in ("{", "[") else None
    is_conversation = isinstance(value, dict) and "messages" in value and value.keys() <= {"messages", "tools"}
    inner: Any = value["messages"] if is_conversation else value  # type: ignore[index]
    messages = inner if isinstance(inner, list) else [inner]
    roles = [_role(each) for each in messages]
    if not roles or None in roles:
        return text
    is_answer = roles[-1] in ("assistant", "tool") and {"content", "value", "tool_calls"} & messages[-1].keys()
    return value if column in ("prompt", *CONVERSATIONS) or is_answer else text


def _role(message: Any) -> str | None:
    name = message.get("role", message.get("from")) if isinstance(message, dict) else None
    written = name.strip().lower() if isinstance(name, str) else ""
    return written if written in ROLES else ALIASES.get(written)


# ---- messages ---------------------------------------------------------------------------------------------------


def conversation(messages: list[Any], name: str) -> list[Message]:
    """Normalize messages; leading system messages are joined into one."""
    turns = [_message(message, f"{name}, message {number}") for number, message in enumerate(messages, 1)]
    while [message["role"] for message in turns[:2]] == ["system", "system"]:
        turns[:2] = [turns[0] | {"content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}]
    return turns


def _message(message: Any, name: str) -> Message:
    """Normalize one message, so that every version of transformers renders it alike.

    Its role is one of ``ROLES``, its content a string, its reasoning under ``reasoning_content``, its tool calls a list
    of objects whose arguments are objects. Null and empty values are removed.
    """
    if isinstance(message, dict) and "role" not in message and "from" in message:  # ShareGPT
        message = {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{name}: must be an object with role and content")
    written, role = message["role"].strip().lower(), _role(message)
    if role is None:
        hint = did_you_mean(written, (*ROLES, *ALIASES)) or f"; use one of {', '.join(ROLES)}"
        raise RowError(f"{name}: unknown role '{shortened(message['role'])}'{hint}")
    turn = {key: value for key, value in message.items() if value is not None and key not in REASONING_KEYS}
    turn["role"] = role
    thoughts = [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key].strip()]
    if thoughts and role == "assistant":
        turn[REASONING] = thoughts[0]
    content = _content(message.get("content"), role, name)
    calls = _calls(turn.pop("tool_calls", None) or turn.pop("function_call", None), name)
    if written in ("function_call", "tool_call") and (own := _calls_in(content)):
        content, calls = "", _calls(own, name)
    if content is None and (calls or "function_calls" in turn):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{name}: content must be a string")
    check_encodable(content, f"{name}: content")
    return turn | {"content": content} | ({"tool_calls": calls} if calls else {})


def _content(content: Any, role: str, name: str) -> Any:
    """Join the parts of a content that are text; the result of a tool may be any JSON."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if role == "tool" and isinstance(content, (dict, list)):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        raise RowError(f"{name}: content has a part that is no text")
    return content


def _calls_in(content: Any) -> list[Any]:
    """Decode tool calls that are the content of a message, as in ShareGPT."""
    value = json_value(content) if isinstance(content, str) else None
    calls: list[Any] = value if isinstance(value, list) else [value]
    return calls if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls) else []


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Normalize tool calls; arguments in JSON text, as OpenAI writes them, become objects.

    Text that is no object stays text. A null in an object is removed, since Arrow puts it there; one in text stays.
    """
    if isinstance(calls, str) and calls.strip():
        calls = json_value(calls)
        if calls is None:
            raise RowError(f"{name}: tool_calls is text and not JSON")
    normalized = []
    for each in [calls] if isinstance(calls, dict) else calls or ():
        call = without_nulls(each)
        function = call.pop("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{name}: tool_calls must be a list of objects with a function's name and arguments")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str) and isinstance(value := json_value(arguments), dict):
            arguments = value
        if not isinstance(arguments, (dict, str)):
            raise RowError(f"{name}: a tool call's arguments must be an object")
        others = {} if function is call else call
        normalized.append(others | {"type": "function", "function": function | {"arguments": arguments}})
    return normalized
