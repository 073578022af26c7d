"""Rows as text: the prompt as the chat template renders it, followed by each response.

The prompt is exactly the text that the model gets at inference. What a template cannot show is adapted and noted (see
``template``); every message of every row must occur in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

from dpo_cli.data.formats import FORMATS, common_prefix
from dpo_cli.data.messages import REASONING, Message, answer_of, user_turn
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import Row, is_rendered
from dpo_cli.data.template import PROBE, USER, ChatTemplate, leaves
from dpo_cli.utils.errors import RowError

# Notes about a row.
NO_TEMPLATE = "rows of messages written as 'User: … Assistant: …': the model has no chat template (--chat-template)"
HISTORY_CHANGES = "rows whose earlier turns the chat template rewrites once an answer follows: kept as at inference"
TURNS_WITHOUT_LOSS = "rows with turns after the prompt that carry no loss (--train-turns)"
CONTROL_KEPT = "rows with control tokens inside their messages, which act as such (--control-tokens)"
TOOLS_UNSEEN = "rows whose tools the chat template does not show"
REASONING_UNSEEN = "rows with an assistant's reasoning that the chat template leaves out"
EARLIER_UNSEEN = "rows with an earlier assistant's text or tool call that the chat template leaves out"
# Appended to the name of a format of strings.
WRAPPED = ", wrapped as a user turn and an answer; --format strings keeps them raw"
RENDERED = ", kept raw: rendered by a chat template already"

_OPENED = re.compile(r"<([\w:]*(?:think|reason)[\w:]*)>\s*\Z", re.IGNORECASE)  # at the end of a prompt
_TAG = 40  # characters within which a prompt ends that opens reasoning
_THOUGHT = re.compile(r"(?:(.*?)<think>)?(.*?)</think>(.*)", re.DOTALL)  # text before, in and after reasoning
_FLAG = re.compile(r"(?<![<\w])/(?:no_?)?think\b(?!>)")  # read by the template, as in a system message of SmolLM3
_SHORT = 12  # characters; a shorter text must occur as a word of its own


class Side(NamedTuple):
    """Prompt and response in one text, of which the characters in ``spans`` carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool  # whether the template wrote an ending
    cuts: tuple[int, ...] = ()  # places that no token may span: where a prompt opened the answer's reasoning

    @property
    def first(self) -> str:
        """The text up to the first cut."""
        return self.text[: self.cuts[0]] if self.cuts else self.text


@dataclass(frozen=True, slots=True)
class Conversation:
    """The texts of a row, as turns if it is rendered; ``templated`` ones have all special tokens."""

    row: Row
    prompt: str
    sides: tuple[Side, ...]
    templated: bool = True
    notes: frozenset[str] = frozenset()


class Chat:
    """Renders rows with a tokenizer's chat template, or with a plain one if it has none.

    ``control_tokens``: ``keep`` or ``refuse`` those inside messages; ``train_turns``: the turns of a response that
    carry loss, ``last`` or ``all``.
    """

    def __init__(self, tokenizer: Any, control_tokens: str, adds_bos: bool, train_turns: str) -> None:
        self.eos, self.control_tokens, self.train_turns = tokenizer.eos_token, control_tokens, train_turns
        self.template = ChatTemplate(tokenizer, adds_bos)

    def as_turns(self, row: Row) -> Row:
        """Convert strings that no chat template rendered to messages, if the model has one."""
        if not isinstance(row.prompt, str) or row.raw or self.template.plain or row.format == FORMATS["hh"].label:
            return row
        if is_rendered(row.prompt):
            return replace(row, format=row.format + RENDERED)
        # The template writes its own ending.
        answers = tuple(answer_of(str(answer).rstrip().removesuffix(self.eos)) for answer in row.answers)
        return replace(row, format=row.format + WRAPPED, prompt=user_turn(row.prompt), answers=answers)

    def conversation(self, row: Row) -> Conversation:
        """Render the texts of a row.

        Raises:
            RowError: the template refuses the messages or leaves one out, or it renders the prompt differently once an
                answer follows; the messages have control tokens that are to be refused.
        """
        as_turns = row = self.as_turns(row)
        if isinstance(row.prompt, str):
            texts = (row.prompt + str(answer) for answer in row.answers)
            raw = tuple(Side(text, ((len(row.prompt), len(text)),), complete=False) for text in texts)
            return Conversation(row, row.prompt, raw, templated=False)
        notes = {NO_TEMPLATE} if self.template.plain else set()
        self._check_control_tokens(row, notes)
        row = self.template.adapt(row, notes)
        turns: Any = row.prompt
        responses: tuple[Any, ...] = row.answers
        trained = self._trained(row)
        if max(map(len, responses)) > 1:
            notes.add(TURNS_WITHOUT_LOSS)
        prompt = self.template.render(turns, row.template_arguments, generation=True)
        sides = [self._side(row, prompt, *side, notes) for side in zip(responses, trained, strict=True)]
        if not all(side.text.startswith(prompt) for side in sides):
            # A first turn without loss is history, which no prompt opens.
            prompt = self.template.render(turns, row.template_arguments)
        for side, response, places in zip(sides, responses, trained, strict=True):
            if not side.text.startswith(prompt):
                raise _other_prompt(prompt, side.text)
            self._check_visible(response[: places[-1] + 1], side.text[len(prompt) :], notes, places)
        self._check_visible(turns, prompt, notes, tools=row.template_arguments.get("tools", ()))
        return Conversation(as_turns, prompt, tuple(sides), notes=frozenset(notes))

    def _check_control_tokens(self, row: Row, notes: set[str]) -> None:
        fields = {"prompt": row.prompt} | row.sides | row.template_arguments
        tokens = {name: token for name, value in fields.items() if (token := self.template.first_control_token(value))}
        if tokens and self.control_tokens == "refuse":
            raise RowError(", ".join(f"{name} contains the control token '{token}'" for name, token in tokens.items()))
        if tokens:
            notes.add(CONTROL_KEPT)

    # ---- each trained turn after the prompt that it has at inference ------------------------------------------------

    def _trained(self, row: Row) -> list[list[int]]:
        """Return the places of the turns that carry loss, for each answer."""
        places, sides = [], cast(dict[str, list[Message]], row.sides)
        for name, turns in sides.items():
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            differ = [p for p in answers if any([turns[p]] != other[p : p + 1] for other in sides.values())]
            if self.train_turns == "last" and any(turn["role"] == "user" for turn in turns):
                raise RowError(
                    f"{name} has a 'user' turn; the two may differ in their last answer only "
                    "(--train-turns all trains all answers that differ)"
                )
            if self.train_turns == "all" and not differ:
                raise RowError(f"{name} has no answer that differs from the other's")
            places.append(differ if self.train_turns == "all" else answers[-1:])
        names, ends = [*sides], [turns[-1] for turns in sides.values()]
        same = [(names[i], names[j]) for i, j in row.preferences("all") if ends[i] == ends[j]]
        if self.train_turns == "last" and same:
            raise RowError(f"{' and '.join(same[0])} have the same last answer; they differ before (--train-turns all)")
        return places

    def _side(self, row: Row, asked: str, turns: list[Message], trained: list[int], notes: set[str]) -> Side:
        text, spans, complete = "", [(0, 0)], False
        cuts = [len(asked)] if _opened(asked) else []
        for place in trained:
            history = [*row.prompt, *turns[:place]]
            before = self.template.render(history, row.template_arguments, generation=True) if place else asked
            if not before.startswith(text):
                text = text.removesuffix(self.template.endings[0])  # an ending that only a last turn has
                spans[-1] = spans[-1][0], len(text)
            if not before.startswith(text):
                change = _difference(text, before)
                raise RowError(f"the chat template renders a turn differently when others follow: {change}")
            reply, complete = self._turn(row, before, history, turns[place], notes)
            cuts += [len(before)] if place and _opened(before) else []
            text = before + reply
            spans.append((len(before), len(text)))
        return Side(text, tuple(spans[1:]), complete, tuple(cuts))

    def _turn(self, row: Row, prompt: str, history: list[Message], turn: Message, notes: set[str]) -> tuple[str, bool]:
        """Render a turn after its prompt, and return whether it has an ending."""
        whole, opened = self.template.render([*history, turn], row.template_arguments), _opened(prompt)
        if whole.startswith(prompt):
            reply = whole[len(prompt) :]
        elif opened and whole.startswith(prompt[: opened.start()]):
            reply = _with_reasoning(opened, whole[opened.start() :], turn, notes)
        else:
            reply = self._after_generation_prompt(row, prompt, whole, history)
            notes.add(HISTORY_CHANGES)
        ending, last_ending = self.template.endings
        if last_ending and reply.endswith(last_ending):
            reply = reply.removesuffix(last_ending) + ending
        if reply.rstrip().endswith(self.template.special):
            return reply.rstrip(), True
        notes.add(f"rows whose answers end with '{self.eos}', the tokenizer's EOS: the chat template writes none")
        return reply, False

    def _after_generation_prompt(self, row: Row, prompt: str, whole: str, history: list[Message]) -> str:
        """Return a turn whose presence changes how the template renders earlier turns, from its own opening on.

        The template of gpt-oss drops the reasoning of earlier turns once a final answer follows.
        """
        template, arguments = self.template, row.template_arguments
        asked = template.render(history, arguments)
        opening = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        lead = template.probe(USER, *answer_of(PROBE)).removeprefix(template.probe(USER, generation=True))
        begin = template.render([*history, *answer_of(PROBE)], arguments).rpartition(PROBE)[0]
        begin = begin.removesuffix(lead.partition(PROBE)[0])
        if not (opening.strip() and begin.endswith(opening) and whole.startswith(begin)):
            raise _other_prompt(prompt, whole)
        return whole[len(begin) :]

    # ---- what the text shows of the messages ------------------------------------------------------------------------

    def _check_visible(
        self, messages: Any, text: str, notes: set[str], trained: Sequence[int] = (), tools: Sequence[Any] = ()
    ) -> None:
        """Find the content of messages and the names of tools in their text; note what it leaves out.

        Raises:
            RowError: it leaves out more than reasoning, tools, or an earlier turn of the assistant.
        """
        hide = partial(self.template.token.sub, "\0")  # control tokens, which match no message
        parts = [(at, part, hide(words)) for at, message in enumerate(messages) for part, words in _parts(message)]
        parts.sort(key=lambda each: -len(each[2]))  # so that "7" is not found in "37"
        parts += [(-1, "tool", hide(str(tool["function"].get("name", "")))) for tool in tools]
        text = hide(text)
        for place, part, words in parts:
            if passage := _find(words, text):
                text = text.replace(passage, "\0", 1)
            elif part == "tool":
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


def _opened(prompt: str) -> re.Match[str] | None:
    """Match the tag with which a prompt opens the answer's reasoning, if it does."""
    return _OPENED.search(prompt, max(0, len(prompt) - _TAG))


def _with_reasoning(opened: re.Match[str], reply: str, turn: Message, notes: set[str]) -> str:
    """Add the reasoning, or an empty one, to an answer whose prompt opened it, if the template did not write it."""
    opening, end = opened[0], f"</{opened[1]}>"
    if end in reply and REASONING not in turn:
        return reply.lstrip().removeprefix(opening.rstrip()).removeprefix("\n" * opening.endswith("\n"))
    inside = _THOUGHT.match(turn["content"])
    reasoning = turn.get(REASONING) or (inside[2] if inside else "")
    if not reasoning:
        notes.add(f"rows with an answer without reasoning, closed by {end!r}: the chat template's prompt opens it")
    begin = "" if opening.endswith("\n") else "\n"
    return f"{begin}{reasoning.strip()}\n{end}\n\n{reply.lstrip()}"


def _other_prompt(prompt: str, whole: str) -> RowError:
    change = _difference(prompt, whole)
    thinks = 'chat_template_kwargs {"enable_thinking": true}, or ' if "</think>" in change.split(" becomes ")[0] else ""
    return RowError(
        f"the chat template renders the prompt differently once its answer follows: {change}, and inference reads the "
        f"first; give {thinks}another --chat-template"
    )


def _difference(one: str, other: str) -> str:
    at = common_prefix(one, other)
    return " becomes ".join(repr(text[max(0, at - 10) : at + 30]) for text in (one, other))


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield what a message contains: the names of its parts and their texts, none of them empty."""
    parts = [("reasoning", message.get(REASONING, "")), ("text", message["content"])]
    if message["role"] == "assistant" and REASONING not in message and (inside := _THOUGHT.match(message["content"])):
        parts = [("text", inside[1] or ""), ("reasoning", inside[2]), ("text", inside[3])]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        parts += [("tool call", leaf) for leaf in (function["name"], *leaves(function["arguments"]))]
    if isinstance(text := message.get("function_calls"), str):
        parts.append(("tool call", text))
    texts = ((part, _FLAG.sub("", text).strip()) for part, text in parts)
    yield from ((part, text) for part, text in texts if text)


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
