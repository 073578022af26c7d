"""Messages in forms that a chat template shows: system messages, tool calls and tool results.

What a template can show is tested by rendering a few messages with it.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dpo_cli.data.messages import Message
from dpo_cli.data.rows import Row
from dpo_cli.data.template import PROBE, USER, ChatTemplate, answer

SYSTEM_FIRST = "pairs whose system message begins the first user turn: the chat template takes none"
SYSTEM_LAST = "pairs whose system message begins the last user turn, where the chat template puts it"
CALLS_WRITTEN = "pairs whose tool calls are written into an answer's text: the chat template does not show them"

_TOOL_ROLES = ("tool", "environment", "ipython", "observation", "function")


class TemplateAdapter:
    """Adapts messages to a chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        self.probe = template.probe

    def adapt(self, row: Row, notes: set[str]) -> Row:
        """Rewrite the system message, tool calls and tool results of a row so that the template shows them."""
        sides: list[list[Message]] = [[*row.prompt], [*row.chosen], [*row.rejected]]
        prompt = sides[0]
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if prompt[0]["role"] == "system" and users and (place := self._system_place):
            at = users[0] if place == SYSTEM_FIRST else users[-1]
            prompt[at] = prompt[at] | {"content": f"{prompt[0]['content']}\n\n{prompt[at]['content']}"}
            del prompt[0]
            notes.add(place)
        if any("tool_calls" in each or "function_calls" in each or each["role"] == "tool" for s in sides for each in s):
            ids = _CallIds(self._short_ids)
            sides[0] = [self._with_calls(message, ids, notes) for message in prompt]
            for side in sides[1:]:
                own = deepcopy(ids)  # each response continues the prompt's calls
                side[:] = [self._with_calls(message, own, notes) for message in side]
        return replace(row, prompt=sides[0], chosen=sides[1], rejected=sides[2])

    @cached_property
    def _system_place(self) -> str | None:
        """Where a system message must be moved, as a note; None if it can stay.

        Mistral's template puts it into the last user turn of a prompt, and drops it once an answer follows.
        """
        turns = [USER, answer("a"), {"role": "user", "content": "v"}]
        asked = self.probe({"role": "system", "content": PROBE}, *turns, generation=True)
        if PROBE not in asked:
            return SYSTEM_FIRST
        whole = self.probe({"role": "system", "content": PROBE}, *turns, answer("b"))
        if whole.startswith(asked[: asked.index(PROBE) + len(PROBE)]):
            return None
        moved = {"role": "user", "content": f"{PROBE}\n\nv"}
        return SYSTEM_LAST if self.probe(*turns[:2], moved, generation=True) == asked else SYSTEM_FIRST

    def _with_calls(self, message: Message, ids: _CallIds, notes: set[str]) -> Message:
        if message["role"] == "tool":
            return message | {"role": self._tool_role} | ids.of_result(message)
        hidden: dict[str, list[str]] = {}
        if calls := message.get("tool_calls"):
            if self._text_arguments is not None:
                message = self._form(message | {"tool_calls": [call | {"id": ids.of_call(call)} for call in calls]})
            else:
                hidden["tool_calls"] = [json.dumps(call, ensure_ascii=False) for call in calls]
        if isinstance(text := message.get("function_calls"), str) and not self._shows_function_calls:
            hidden["function_calls"] = [text]
        if not hidden:
            return message
        notes.add(CALLS_WRITTEN)
        content = "\n".join(filter(None, [message["content"], *(text for texts in hidden.values() for text in texts)]))
        return {key: value for key, value in message.items() if key not in hidden} | {"content": content}

    @cached_property
    def _text_arguments(self) -> bool | None:
        """Whether the template takes the arguments of a tool call as JSON text; None if it shows no tool calls."""
        call = _call("callcall1")
        if PROBE in self.probe(USER, call):
            return False
        return True if PROBE in self.probe(USER, _with_text_arguments(call)) else None

    def _form(self, message: Message) -> Message:
        return _with_text_arguments(message) if self._text_arguments else message

    @cached_property
    def _short_ids(self) -> bool:
        """Whether the template accepts only call ids of nine letters and digits, as Mistral's do."""
        return self._text_arguments is not None and not self.probe(USER, self._form(_call("call_0a1b2c3d")))

    @cached_property
    def _tool_role(self) -> str:
        """The role under which the template shows the result of a tool."""
        call = self._form(_call("callcall1")) if self._text_arguments is not None else answer("a")
        result = {"content": PROBE, "tool_call_id": "callcall1", "name": "f"}
        shown = (role for role in _TOOL_ROLES if PROBE in self.probe(USER, call, {"role": role} | result))
        return next(shown, "tool")

    @cached_property
    def _shows_function_calls(self) -> bool:
        return PROBE in self.probe(USER, answer("") | {"function_calls": PROBE})


@dataclass
class _CallIds:
    """Ids of a conversation's tool calls: their own, or numbers; ``short`` ones have nine letters and digits."""

    short: bool
    names: dict[str, str] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)  # calls without a result yet

    def of_call(self, call: dict[str, Any]) -> str:
        """Return the id of a call."""
        own = str(call.get("id") or f"call{len(self.names):05d}")
        name = re.sub("[^a-zA-Z0-9]", "", own)[-9:].rjust(9, "0") if self.short else own
        self.names[own] = name if name not in self.names.values() else f"call{len(self.names):05d}"
        self.open.append(own)
        return self.names[own]

    def of_result(self, message: Message) -> Message:
        """Return the id of the call that a tool's message answers: the message's own, or the first open one."""
        own = message.get("tool_call_id") or (self.open[0] if self.open else None)
        if own in self.open:
            self.open.remove(own)
        return {"tool_call_id": self.names.get(own, own)} if own else {}


def _call(call_id: str) -> Message:
    call = {"id": call_id, "type": "function", "function": {"name": PROBE, "arguments": {"a": 1}}}
    return answer("") | {"tool_calls": [call]}


def _with_text_arguments(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": text}})
    return message | {"tool_calls": calls}
