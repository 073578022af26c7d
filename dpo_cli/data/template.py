"""A chat template: rendering, what it can show, and messages in the forms that it shows.

What a template can show is tested by rendering a few messages with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from dpo_cli.data.formats import common_prefix
from dpo_cli.data.messages import REASONING, REASONING_KEYS, Message, answer_of, check_encodable
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import Row
from dpo_cli.utils.errors import RowError

# Notes about a row.
SYSTEM_FIRST = "rows whose system message begins the first user turn: the chat template takes none"
SYSTEM_LAST = "rows whose system message begins the last user turn, where the chat template puts it"
CALLS_WRITTEN = "rows whose tool calls are written into an answer's text: the chat template does not show them"

# For a model without a template: dialogues as they are common in pretraining data.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PROBE = "PROBE"
USER: Message = {"role": "user", "content": "u"}
TOOL_ROLES = ("tool", "environment", "ipython", "observation", "function")


def leaves(value: Any) -> Iterator[str]:
    """Yield the keys and values of a nested value, those that are no strings as JSON."""
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += [each for item in reversed(value.items()) for each in reversed(item)]
        elif isinstance(value, (list, tuple)):
            queue += reversed(value)
        else:
            yield value if isinstance(value, str) else json.dumps(value, default=str)


class ChatTemplate:
    """The chat template of a tokenizer, or a ``plain`` one if it has none, with the BOS that the tokenizer adds.

    ``token`` matches its control tokens, with which it separates turns; tags of thinking do not count. One of the
    ``special`` ones ends each answer.
    """

    def __init__(self, tokenizer: Any, adds_bos: bool) -> None:
        self.tokenizer = tokenizer
        self.plain = None if tokenizer.chat_template else "{{ bos_token }}" * adds_bos + PLAIN
        frame = "" if self.plain else self.probe(USER, generation=True)
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self.special = tuple({*(token.content for token in added if token.special), tokenizer.eos_token})
        parting = (token.content for token in added if token.special or token.content in frame)
        names = sorted((name for name in parting if "think" not in name.lower()), key=len, reverse=True)
        self.token = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def render(self, messages: list[Message], arguments: Mapping[str, Any], generation: bool = False) -> str:
        """Render messages, and what opens an answer for ``generation``; ``arguments`` are passed to the template.

        Raises:
            RowError: the template refuses the messages, or they cannot be encoded.
        """
        # Reasoning under each name that a template may read, as transformers 5.23 has it and 5.17 does not.
        named = [m | dict.fromkeys(REASONING_KEYS, m[REASONING]) if REASONING in m else m for m in messages]
        options = {"chat_template": self.plain, "tokenize": False, "add_generation_prompt": generation}
        try:
            text: str = self.tokenizer.apply_chat_template(named, **options, **arguments)
        except Exception as error:  # a template can raise anything
            raise RowError(f"the chat template refuses the messages: {shortened(str(error), 200)}") from error
        check_encodable(text, "the messages")
        return text

    def probe(self, *messages: Message, generation: bool = False) -> str:
        """Render messages; empty if the template refuses them."""
        try:
            return self.render([*messages], {}, generation)
        except RowError:
            return ""

    def first_control_token(self, value: Any) -> str | None:
        """Return the first control token in a nested value."""
        return next((match[0] for leaf in leaves(value) if (match := self.token.search(leaf))), None)

    # ---- what it can show -------------------------------------------------------------------------------------------

    @cached_property
    def endings(self) -> tuple[str, str]:
        """The text that ends every answer, and the text after the last turn, which differs with Phi-3 only."""
        last, between = (self.probe(USER, *answer_of(PROBE), *more).rpartition(PROBE)[2] for more in ([], [USER]))
        shared = last[: common_prefix(last, between)]
        ends = [shared.rfind(token) + len(token) for token in self.special if token in shared]
        if ends:
            return shared[: max(ends)], last
        return last.rstrip() if last.rstrip().endswith(self.special) else "", last

    @cached_property
    def _system_place(self) -> str | None:
        """Where a system message must be moved, as a note; None if it can stay.

        Mistral's template puts it into the last user turn of a prompt, and drops it once an answer follows.
        """
        turns = [USER, *answer_of("a"), {"role": "user", "content": "v"}]
        asked = self.probe({"role": "system", "content": PROBE}, *turns, generation=True)
        if PROBE not in asked:
            return SYSTEM_FIRST
        whole = self.probe({"role": "system", "content": PROBE}, *turns, *answer_of("b"))
        if whole.startswith(asked[: asked.index(PROBE) + len(PROBE)]):
            return None
        moved = {"role": "user", "content": f"{PROBE}\n\nv"}
        return SYSTEM_LAST if self.probe(*turns[:2], moved, generation=True) == asked else SYSTEM_FIRST

    @cached_property
    def _text_arguments(self) -> bool | None:
        """Whether the arguments of a tool call must be JSON text; None if the template shows no tool calls."""
        shown = (as_text for as_text in (False, True) if PROBE in self.probe(USER, _call("callcall1", as_text)))
        return next(shown, None)

    @cached_property
    def _short_ids(self) -> bool:
        """Whether the template accepts only call ids of nine letters and digits, as Mistral's do."""
        return not self.probe(USER, _call("call_0a1b2c3d", self._text_arguments))

    @cached_property
    def _tool_role(self) -> str:
        """The role under which the template shows the result of a tool."""
        (call,) = answer_of("a") if self._text_arguments is None else [_call("callcall1", self._text_arguments)]
        result = {"content": PROBE, "tool_call_id": "callcall1", "name": "f"}
        shown = (role for role in TOOL_ROLES if PROBE in self.probe(USER, call, {"role": role} | result))
        return next(shown, "tool")

    @cached_property
    def _shows_function_calls(self) -> bool:
        return PROBE in self.probe(USER, {"role": "assistant", "content": "", "function_calls": PROBE})

    # ---- messages in these forms ------------------------------------------------------------------------------------

    def adapt(self, row: Row, notes: set[str]) -> Row:
        """Rewrite the system message, tool calls and tool results of a row so that the template shows them."""
        prompt: list[Message] = [*row.prompt]
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if prompt[0]["role"] == "system" and users and (place := self._system_place):
            at = users[0] if place == SYSTEM_FIRST else users[-1]
            prompt[at] = prompt[at] | {"content": f"{prompt[0]['content']}\n\n{prompt[at]['content']}"}
            del prompt[0]
            notes.add(place)
        n = len(prompt)
        whole = [self._with_calls([*prompt, *answer], notes) for answer in row.answers]
        return replace(row, prompt=whole[0][:n], answers=tuple(each[n:] for each in whole))

    def _with_calls(self, turns: list[Message], notes: set[str]) -> list[Message]:
        """Adapt the tool calls and results of a conversation; a result without an id is of the first open call."""
        ids: dict[str, str] = {}  # of the calls so far, as the template takes them
        unanswered: list[str] = []
        adapted = []
        for turn in turns:
            message, texts = dict(turn), []
            if turn["role"] == "tool":
                own = turn.get("tool_call_id") or next(iter(unanswered), None)
                if own in unanswered:
                    unanswered.remove(own)
                message |= {"role": self._tool_role} | ({"tool_call_id": ids.get(own, own)} if own else {})
            elif turn.get("tool_calls") and self._text_arguments is None:
                texts = [json.dumps(call, ensure_ascii=False) for call in message.pop("tool_calls")]
            elif turn.get("tool_calls"):
                message["tool_calls"] = [self._shown(call, ids, unanswered) for call in turn["tool_calls"]]
            if isinstance(turn.get("function_calls"), str) and not self._shows_function_calls:
                texts.append(message.pop("function_calls"))
            if texts:
                notes.add(CALLS_WRITTEN)
                message["content"] = "\n".join(filter(None, [turn["content"], *texts]))
            adapted.append(message)
        return adapted

    def _shown(self, call: dict[str, Any], ids: dict[str, str], unanswered: list[str]) -> dict[str, Any]:
        """Return a call with an id, its own or a number, and its arguments as the template takes them."""
        own = str(call.get("id") or f"call{len(ids):05d}")
        name = re.sub("[^a-zA-Z0-9]", "", own)[-9:].rjust(9, "0") if self._short_ids else own
        ids[own] = name if name not in ids.values() else f"call{len(ids):05d}"
        unanswered.append(own)
        function = call["function"]
        if self._text_arguments and not isinstance(function["arguments"], str):
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return call | {"id": ids[own], "function": function}


def _call(call_id: str, as_text: bool | None) -> Message:
    function = {"name": PROBE, "arguments": '{"a": 1}' if as_text else {"a": 1}}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
