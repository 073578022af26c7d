"""A check that a rendered text shows what its messages contain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_cli.data.messages import REASONING, Message
from dpo_cli.data.readers import shortened
from dpo_cli.utils.errors import RowError

TOOLS_UNSEEN = "pairs whose tools the chat template does not show"
REASONING_UNSEEN = "pairs with an assistant's reasoning that the chat template leaves out"
EARLIER_UNSEEN = "pairs with an earlier assistant's text or tool call that the chat template leaves out"

THOUGHT = re.compile(r"(?:(.*?)<think>)?(.*?)</think>(.*)", re.DOTALL)  # text before, in and after reasoning
_FLAG = re.compile(r"(?<![<\w])/(?:no_?)?think\b(?!>)")  # read by the template, as in a system message of SmolLM3
_SHORT = 12  # characters; a shorter text must occur as a word of its own


def check_visible(
    messages: Any,
    text: str,
    control_token: re.Pattern[str],
    notes: set[str],
    trained: Sequence[int] = (),
    tools: Sequence[dict[str, Any]] = (),
) -> None:
    """Find the content of messages and the names of tools in their text; note what it leaves out.

    Raises:
        RowError: it leaves out more than reasoning, tools, or an earlier turn of the assistant.
    """
    text = control_token.sub("\0", text)  # matches no message
    parts = [
        (place, part, control_token.sub("\0", words))
        for place, message in enumerate(messages)
        for part, words in _parts(message)
    ]
    parts.sort(key=lambda each: -len(each[2]))  # so that "7" is not found in "37"
    names = [control_token.sub("\0", str(tool.get("name", ""))) for tool in tools]
    for place, part, words in (*parts, *((-1, "", name) for name in names)):
        if seen := _find(words, text):
            text = text.replace(seen, "\0", 1)
        elif place < 0:
            notes.add(TOOLS_UNSEEN)
        elif part == "reasoning":
            notes.add(REASONING_UNSEEN)
        elif messages[place]["role"] == "assistant" and place not in trained:
            notes.add(EARLIER_UNSEEN)
        else:
            whose = "the answer's" if messages[place]["role"] == "assistant" else f"a {messages[place]['role']}'s"
            raise RowError(
                f"the chat template leaves out {whose} {part} '{shortened(words)}'; "
                "name one that shows it: --chat-template FILE"
            )


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield what a message contains: the names of its parts and their texts, none of them empty."""
    parts = [("reasoning", message.get(REASONING, "")), ("text", message["content"])]
    if message["role"] == "assistant" and REASONING not in message and (inside := THOUGHT.match(message["content"])):
        parts = [("text", inside[1] or ""), ("reasoning", inside[2]), ("text", inside[3])]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        parts += [("tool call", leaf) for leaf in (function["name"], *_leaves(function["arguments"]))]
    if isinstance(text := message.get("function_calls"), str):
        parts.append(("tool call", text))
    texts = ((part, _FLAG.sub("", text).strip()) for part, text in parts)
    yield from ((part, text) for part, text in texts if text)


def _leaves(value: Any) -> Iterator[str]:
    """Yield all keys and values of arguments, which a template may write as JSON, in tags, or in its own way."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from (str(key), *_leaves(each))
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _find(words: str, text: str) -> str | None:
    """Find words in a text: verbatim, in JSON, as a Python constant, or with other white space."""
    python = {"true": "True", "false": "False", "null": "None"}.get(words, words)
    for form in dict.fromkeys((words, json.dumps(words, ensure_ascii=False)[1:-1], python)):
        if len(form) > _SHORT:
            if form in text:
                return form
        elif re.search(rf"(?<!\w){re.escape(form)}(?!\w)" if form.isalnum() else re.escape(form), text):
            return form
    return words if len(words) > _SHORT and "".join(words.split()) in "".join(text.split()) else None
