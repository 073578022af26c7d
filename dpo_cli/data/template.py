"""A chat template: rendering, and the control tokens that may stand inside messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.messages import REASONING, REASONING_KEYS, Message
from dpo_cli.data.readers import shortened
from dpo_cli.utils.errors import RowError

# For a model without a template: dialogues as they are common in pretraining data.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PROBE = "PROBE"
USER: Message = {"role": "user", "content": "u"}


def answer(content: str) -> Message:
    """Return an assistant's message."""
    return {"role": "assistant", "content": content}


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

    def render(
        self, messages: list[Message], generation: bool = False, arguments: Mapping[str, Any] | None = None
    ) -> str:
        """Render messages, and what opens an answer for ``generation``; ``arguments`` are passed to the template.

        Raises:
            RowError: the template refuses the messages.
        """
        # Reasoning under each name that a template may read, as transformers 5.23 has it and 5.17 does not.
        named = [m | dict.fromkeys(REASONING_KEYS, m[REASONING]) if REASONING in m else m for m in messages]
        options = {"chat_template": self.plain, "tokenize": False, "add_generation_prompt": generation}
        try:
            text: str = self.tokenizer.apply_chat_template(named, **options, **(arguments or {}))
        except Exception as error:  # a template can raise anything
            raise RowError(f"the chat template refuses the messages: {shortened(str(error), 200)}") from error
        return text

    def probe(self, *messages: Message, generation: bool = False) -> str:
        """Render messages; empty if the template refuses them."""
        try:
            return self.render([*messages], generation)
        except RowError:
            return ""

    def first_control_token(self, value: Any) -> str | None:
        """Return the first control token in the strings of a nested value."""
        queue = [value]
        while queue:
            value = queue.pop()
            if isinstance(value, str) and (match := self.token.search(value)):
                return match[0]
            if isinstance(value, (dict, list, tuple)):
                queue += reversed(value.values() if isinstance(value, dict) else value)
        return None
