"""Rows as a model's chat template can show them: what it lacks is made up for, and told.

A template may refuse system messages, show no tool calls or want their arguments as text, or be missing. What it can do
is found out by rendering a few messages.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from dpo_cli.columns import Message, has_surrogate
from dpo_cli.data import Row
from dpo_cli.errors import RowError
from dpo_cli.template import ControlTokens, plain_template, render

# What is told of a row, beside what tokens.py tells.
NO_TEMPLATE = "pairs of messages written as 'User: … Assistant: …': the model has no chat template (--chat-template)"
SYSTEM_MOVED = "pairs whose system message begins the first user turn: the chat template takes none"
CALLS_WRITTEN = "pairs whose tool calls are written as JSON: the chat template shows none"
TOOLS_UNSEEN = "pairs whose tools the chat template does not show"
THINKING_LEFT_OUT = "pairs with thinking that the chat template leaves out"
CONTROL_KEPT = "pairs with control tokens inside their messages, which act as such (--control-tokens keep)"
CONTROL_SANITIZED = "pairs with control tokens inside their messages, read as text (--control-tokens sanitize)"

_PROBE = "PROBE"
_ASKED = [{"role": "user", "content": "u"}]
_CALL = {"id": "callcall1", "type": "function", "function": {"name": _PROBE, "arguments": {"a": 1}}}  # ids: mistral's


class Chat:
    """A tokenizer's chat template, the plain one where there is none, and what it shows of a row.

    ``control_tokens`` says what becomes of those inside messages: ``keep``, ``sanitize`` or ``refuse``.
    """

    def __init__(self, tokenizer: Any, control_tokens: str, adds_bos: bool) -> None:
        self.tokenizer, self.control_tokens = tokenizer, control_tokens
        self.control = ControlTokens(tokenizer)
        self.template = None if tokenizer.chat_template else plain_template(adds_bos)  # None: the tokenizer's own
        # What follows an answer, such as ``<|im_end|>`` and a line's end.
        self.turn_end = self._probe(*_ASKED, _answer(_PROBE)).rpartition(_PROBE)[2]
        self.takes_system = _PROBE in self._probe({"role": "system", "content": _PROBE}, *_ASKED)
        forms = (_as_it_is, _with_text_arguments)
        called = _answer("") | {"tool_calls": [_CALL]}
        self.calls = next((form for form in forms if _PROBE in self._probe(*_ASKED, form(called))), None)
        thought = _answer(f"<think>{_PROBE}</think>\n\na") | {"reasoning_content": _PROBE}
        self.shows_thinking = _PROBE in self._probe(*_ASKED, thought)

    def _probe(self, *messages: Message) -> str:
        """What the template makes of messages; empty where it refuses them."""
        try:
            return render(self.tokenizer, [*messages], template=self.template)
        except RowError:
            return ""

    def render(self, messages: list[Message], arguments: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """The template's text; what in it is to be read as text is marked.

        Raises:
            RowError: the template refuses the messages, or they are no text.
        """
        text = render(self.tokenizer, messages, add_generation_prompt, self.template, arguments)
        if has_surrogate(text):
            raise RowError("the messages have half of a surrogate pair, which is no text")
        if self.control_tokens != "sanitize" or not self.control.first([messages, arguments]):
            return text
        try:
            marked, others = self.control.mark(messages), self.control.mark(arguments)
        except RecursionError as error:
            raise RowError("the messages are nested too deeply") from error
        return render(self.tokenizer, marked, add_generation_prompt, self.template, others)

    def adapted(self, row: Row) -> Row:
        """The row as the template can show it: a system message may begin the first user turn, a call be text."""
        if isinstance(row.prompt, str) or (self.takes_system and not _has(row, "tool_calls")):
            return row
        form, sides = self.calls or _with_calls_written, (row.prompt, row.chosen, row.rejected)
        prompt, chosen, rejected = ([form(message) for message in messages] for messages in sides)  # type: ignore[arg-type]
        if not self.takes_system and [message["role"] for message in prompt[:2]] == ["system", "user"]:
            content = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
            prompt = [prompt[1] | {"content": content}, *prompt[2:]]
        return replace(row, prompt=prompt, chosen=chosen, rejected=rejected)

    def notes(self, row: Row) -> set[str]:
        """What is to be told of a row.

        Raises:
            RowError: it has control tokens, which are to be refused.
        """
        if isinstance(row.prompt, str):
            return set()
        told = {
            NO_TEMPLATE: self.template is not None,
            SYSTEM_MOVED: not self.takes_system and row.prompt[0]["role"] == "system",
            CALLS_WRITTEN: self.calls is None and _has(row, "tool_calls"),
            THINKING_LEFT_OUT: not self.shows_thinking and (_has(row, "reasoning_content") or _thinks(row)),
            TOOLS_UNSEEN: "tools" in row.template_arguments and not self._shows_tools(row),
        }
        return {note for note, applies in told.items() if applies} | self._control_notes(row)

    def _shows_tools(self, row: Row) -> bool:
        messages: Any = self.adapted(row).prompt
        without = {name: value for name, value in row.template_arguments.items() if name != "tools"}
        return self.render(messages, row.template_arguments) != self.render(messages, without)

    def _control_notes(self, row: Row) -> set[str]:
        fields = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} | row.template_arguments
        found = {name: token for name, value in fields.items() if (token := self.control.first(value))}
        if found and self.control_tokens == "refuse":
            raise RowError(", ".join(f"{name} contains the control token '{token}'" for name, token in found.items()))
        return {CONTROL_SANITIZED if self.control_tokens == "sanitize" else CONTROL_KEPT} if found else set()


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _has(row: Row, key: str) -> bool:
    """Whether a message has something under this key."""
    sides: list[Any] = [row.prompt, row.chosen, row.rejected]
    return any(key in message and message[key] for messages in sides for message in messages)


def _thinks(row: Row) -> bool:
    """Whether a last answer has its thinking in it."""
    return any("</think>" in str(turns[-1]) for turns in (row.chosen, row.rejected))


# ---- forms of a tool call ---------------------------------------------------------------------------------------


def _as_it_is(message: Message) -> Message:
    """The arguments as an object, which most templates write as JSON."""
    return message


def _with_text_arguments(message: Message) -> Message:
    """The message with its calls' arguments as JSON text, which some templates want."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls} if calls else message


def _with_calls_written(message: Message) -> Message:
    """The message with its tool calls as JSON behind its text, for a template that has no form for them."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    if not calls:
        return message
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return others | {"content": "\n".join(filter(None, [message["content"], *calls]))}
