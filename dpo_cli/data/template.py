"""Rendering with a chat template, and the control tokens that may stand inside messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
    """The tokens with which a chat template separates turns, inside messages; tags of thinking do not count.

    ``mark`` puts marks around them, which survive rendering; ``encode`` encodes what is marked as text. The ids equal
    those of ``apply_chat_template(sanitize_control_tokens=True)`` of transformers, which 5.17 does not have.
    """

    OPEN, CLOSE = "\ud800", "\udfff"  # lone surrogates, which no text has

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            frame = render(tokenizer, [{"role": "user", "content": "u"}], add_generation_prompt=True)
        except RowError:
            frame = ""
        added = [(t, i) for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()]
        self.special = tuple({*(t.content for t, _ in added if t.special), tokenizer.eos_token})  # one ends each answer
        parting = [(t.content, i) for t, i in added if t.special or t.content in frame]
        self.ids = {content: i for content, i in parting if "think" not in content.lower()}  # part of an answer
        any_token = "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or "(?!)"
        self.token = re.compile(any_token)
        self.marked = re.compile(f"{self.OPEN}({any_token}){self.CLOSE}|[{self.OPEN}{self.CLOSE}]")

    def of_turns(self) -> set[str]:
        """Return the tokens that the template writes around turns."""
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        try:
            return set(self.token.findall(render(self.tokenizer, turns * 2)))
        except RowError:
            return set()

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

    def mark(self, value: Any) -> Any:
        """Put marks around the control tokens in the strings of a value.

        Raises:
            RecursionError: it is nested too deeply.
        """
        if isinstance(value, str):
            return self.token.sub(rf"{self.OPEN}\g<0>{self.CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, (list, tuple)) else value

    def unmark(self, text: str) -> str:
        """Remove the marks."""
        return text.replace(self.OPEN, "").replace(self.CLOSE, "")

    def encode(self, text: str) -> list[int]:
        """Encode a rendered text."""
        first, *rest = self.marked.split(text)
        ids = self._ids(first)
        for token, behind in zip(rest[::2], rest[1::2], strict=True):
            as_text = self._ids_inside(token, self._ids_as_text) if token else []  # None: a mark without its token
            if token and self.ids[token] in as_text:
                raise RowError(f"the tokenizer reads '{token}' as a control token wherever it stands")
            ids += as_text + self._ids_inside(behind, self._ids)
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Encode a rendered text that follows another one and shares no token with it."""
        return self._ids_inside(text, self.encode)

    def _ids_inside(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode text in the middle of another: SentencePiece would put a space before its first word."""
        for before in ("\n", ":"):  # the first that does not merge with the text
            ids, own = encode(before + text), self._ids(before)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        return encode(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _ids_as_text(self, text: str) -> list[int]:
        """Encode without looking for added tokens."""
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer:
            text = backend.normalizer.normalize_str(text)
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for word in words for token in backend.model.tokenize(word)]
