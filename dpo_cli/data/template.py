"""Rendering with a chat template, and the control tokens that may stand inside messages."""

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


def plain_template(adds_bos: bool) -> str:
    """Return the template for a model that has none, with the BOS that the tokenizer adds to a text."""
    return ("{{ bos_token }}" if adds_bos else "") + PLAIN


def render(
    tokenizer: Any,
    messages: list[Message],
    add_generation_prompt: bool = False,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Render messages with the tokenizer's template unless another is given; ``arguments`` are passed to it.

    Raises:
        RowError: there is no template, or it refuses the messages.
    """
    if not (template or tokenizer.chat_template):
        raise RowError("the model has no chat template")
    # Reasoning under each name that a template may read, as transformers 5.23 has it and 5.17 does not.
    named = [m | dict.fromkeys(REASONING_KEYS, m[REASONING]) if REASONING in m else m for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            named,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(arguments or {}),
        )
    except Exception as error:  # a template can raise anything
        raise RowError(f"the chat template refuses the messages: {shortened(str(error), 200)}") from error
    return text


class ControlTokens:
    """The tokens with which a chat template separates turns, inside messages; tags of thinking do not count."""

    def __init__(self, tokenizer: Any) -> None:
        try:
            frame = render(tokenizer, [{"role": "user", "content": "u"}], add_generation_prompt=True)
        except RowError:
            frame = ""
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        # One of these ends each answer.
        self.special = tuple({*(token.content for token in added if token.special), tokenizer.eos_token})
        parting = (token.content for token in added if token.special or token.content in frame)
        names = sorted((name for name in parting if "think" not in name.lower()), key=len, reverse=True)
        self.token = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def first(self, value: Any) -> str | None:
        """Return the first control token in the strings of a nested value."""
        queue = [value]
        while queue:
            value = queue.pop()
            if isinstance(value, str) and (match := self.token.search(value)):
                return match[0]
            if isinstance(value, (dict, list, tuple)):
                queue += reversed(value.values() if isinstance(value, dict) else value)
        return None
