"""Rows as text: the prompt as the chat template renders it, followed by each response.

The prompt is exactly the text that the model gets at inference. What a template cannot show is adapted and noted (see
``adapt``); every message of every row must occur in the text (see ``visible``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from dpo_cli.data.adapt import TemplateAdapter
from dpo_cli.data.formats import FORMATS, common_prefix
from dpo_cli.data.messages import REASONING, Message, answer_of, check_encodable
from dpo_cli.data.rows import Row, is_rendered
from dpo_cli.data.template import PROBE, USER, ChatTemplate, answer
from dpo_cli.data.visible import THOUGHT, check_visible
from dpo_cli.utils.errors import RowError

# Notes about a row.
NO_TEMPLATE = "pairs of messages written as 'User: … Assistant: …': the model has no chat template (--chat-template)"
HISTORY_CHANGES = "pairs whose earlier turns the chat template rewrites once an answer follows: kept as at inference"
TURNS_WITHOUT_LOSS = "pairs with turns after the prompt that carry no loss (--train-turns)"
CONTROL_KEPT = "pairs with control tokens inside their messages, which act as such (--control-tokens)"
# Appended to the name of a format of strings.
WRAPPED = ", wrapped as a user turn and an answer; --format strings keeps them raw"
RENDERED = ", kept raw: rendered by a chat template already"

_OPENED = re.compile(r"<([\w:]*(?:think|reason)[\w:]*)>\s*\Z", re.IGNORECASE)  # at the end of a prompt
_TAG = 40  # characters within which a prompt ends that opens reasoning


class Side(NamedTuple):
    """Prompt and response in one text, of which the characters in ``spans`` carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool  # whether the template wrote an ending
    cuts: tuple[int, ...] = ()  # places that no token may span: where a prompt opened the answer's reasoning


@dataclass(frozen=True, slots=True)
class Conversation:
    """The texts of a row; ``templated`` ones have all special tokens."""

    prompt: str
    chosen: Side
    rejected: Side
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
        self.adapter = TemplateAdapter(self.template)

    def as_turns(self, row: Row) -> Row:
        """Convert strings to messages if the model has a chat template: a user turn, and an answer each.

        Strings that a chat template rendered already are kept.
        """
        if not isinstance(row.prompt, str) or row.raw or self.template.plain or row.format == FORMATS["hh"][0]:
            return row
        if is_rendered(row.prompt):
            return replace(row, format=row.format + RENDERED)
        # The template writes its own ending.
        chosen, rejected = (answer_of(str(side).rstrip().removesuffix(self.eos)) for side in (row.chosen, row.rejected))
        turns = [USER | {"content": row.prompt}]
        return replace(row, format=row.format + WRAPPED, prompt=turns, chosen=chosen, rejected=rejected)

    def conversation(self, row: Row) -> Conversation:
        """Render the texts of a row.

        Raises:
            RowError: the template refuses the messages or leaves one out, or it renders the prompt differently once an
                answer follows; the messages have control tokens that are to be refused.
        """
        if isinstance(row.prompt, str):
            texts = (row.prompt + str(side) for side in (row.chosen, row.rejected))
            sides = [Side(text, ((len(row.prompt), len(text)),), complete=False) for text in texts]
            return Conversation(row.prompt, sides[0], sides[1], templated=False)
        notes = self._control_notes(row) | ({NO_TEMPLATE} if self.template.plain else set())
        row = self.adapter.adapt(row, notes)
        responses: tuple[Any, Any] = row.chosen, row.rejected
        trained = self._trained(*responses)
        if max(map(len, responses)) > 1:
            notes.add(TURNS_WITHOUT_LOSS)
        prompt = self._render(row, row.prompt, generation=True)
        sides = [self._side(row, prompt, *side, notes) for side in zip(responses, trained, strict=True)]
        if not all(side.text.startswith(prompt) for side in sides):
            prompt = self._render(row, row.prompt)  # a first turn without loss is history, which no prompt opens
        for side, turns, places in zip(sides, responses, trained, strict=True):
            if not side.text.startswith(prompt):
                raise _other_prompt(prompt, side.text)
            check_visible(turns[: places[-1] + 1], side.text[len(prompt) :], self.template.token, notes, places)
        tools = [tool["function"] for tool in row.template_arguments.get("tools", ())]
        check_visible(row.prompt, prompt, self.template.token, notes, tools=tools)
        return Conversation(prompt, sides[0], sides[1], notes=frozenset(notes))

    def _render(self, row: Row, messages: Any, generation: bool = False) -> str:
        text = self.template.render(messages, generation, row.template_arguments)
        check_encodable(text, "the messages")
        return text

    def _control_notes(self, row: Row) -> set[str]:
        fields = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} | row.template_arguments
        tokens = {name: token for name, value in fields.items() if (token := self.template.first_control_token(value))}
        if tokens and self.control_tokens == "refuse":
            raise RowError(", ".join(f"{name} contains the control token '{token}'" for name, token in tokens.items()))
        return {CONTROL_KEPT} if tokens else set()

    # ---- each trained turn after the prompt that it has at inference ------------------------------------------------

    def _trained(self, chosen: list[Message], rejected: list[Message]) -> tuple[list[int], list[int]]:
        """Return the places of the turns that carry loss."""
        sides = {"chosen": (chosen, rejected), "rejected": (rejected, chosen)}
        if self.train_turns == "last":
            for name, (turns, _) in sides.items():
                if any(turn["role"] == "user" for turn in turns):
                    raise RowError(
                        f"{name} has a 'user' turn; the two may differ in their last answer only "
                        "(--train-turns all trains all answers that differ)"
                    )
            if chosen[-1] == rejected[-1]:
                raise RowError("chosen and rejected have the same last answer; they differ before (--train-turns all)")
            return [len(chosen) - 1], [len(rejected) - 1]
        places = []
        for name, (turns, others) in sides.items():
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            places.append([place for place in answers if [turns[place]] != others[place : place + 1]])
            if not places[-1]:
                raise RowError(f"{name} has no answer that differs from the other's")
        return places[0], places[1]

    def _side(self, row: Row, asked: str, turns: list[Message], trained: list[int], notes: set[str]) -> Side:
        text, spans, complete = "", [(0, 0)], False
        cuts = [len(asked)] if _opened(asked) else []
        for place in trained:
            messages = [*row.prompt, *turns[:place]]
            before = self._render(row, messages, generation=True) if place else asked
            if not before.startswith(text):
                text = text.removesuffix(self._endings[0])  # an ending that only a last turn has
                spans[-1] = spans[-1][0], len(text)
            if not before.startswith(text):
                change = _difference(text, before)
                raise RowError(f"the chat template renders a turn differently when others follow: {change}")
            answer, complete = self._turn(row, before, messages, turns[place], notes)
            cuts += [len(before)] if place and _opened(before) else []
            text = before + answer
            spans.append((len(before), len(text)))
        return Side(text, tuple(spans[1:]), complete, tuple(cuts))

    def _turn(self, row: Row, prompt: str, before: list[Message], turn: Message, notes: set[str]) -> tuple[str, bool]:
        """Render a turn after its prompt, and say if it has an ending."""
        whole, opened = self._render(row, [*before, turn]), _opened(prompt)
        if whole.startswith(prompt):
            answer = whole[len(prompt) :]
        elif opened and whole.startswith(prompt[: opened.start()]):
            answer = _with_reasoning(opened, whole[opened.start() :], turn, notes)
        else:
            answer = self._after_generation_prompt(row, prompt, whole, before)
            notes.add(HISTORY_CHANGES)
        ending, last_ending = self._endings
        if last_ending and answer.endswith(last_ending):
            answer = answer.removesuffix(last_ending) + ending
        if answer.rstrip().endswith(self.template.special):
            return answer.rstrip(), True
        notes.add(f"pairs whose answers end with '{self.eos}', the tokenizer's EOS: the chat template writes none")
        return answer, False

    def _after_generation_prompt(self, row: Row, prompt: str, whole: str, before: list[Message]) -> str:
        """Return a turn whose presence changes how the template renders earlier turns, from its own opening on.

        The template of gpt-oss drops the reasoning of earlier turns once a final answer follows.
        """
        history = self._render(row, before)
        opening = prompt.removeprefix(history) if prompt.startswith(history) else ""
        lead = (
            self.template.probe(USER, answer(PROBE))
            .removeprefix(self.template.probe(USER, generation=True))
            .partition(PROBE)[0]
        )
        begin = self._render(row, [*before, answer(PROBE)]).rpartition(PROBE)[0].removesuffix(lead)
        if not (opening.strip() and begin.endswith(opening) and whole.startswith(begin)):
            raise _other_prompt(prompt, whole)
        return whole[len(begin) :]

    @cached_property
    def _endings(self) -> tuple[str, str]:
        """What ends an answer's turn at any place, and what follows the last turn.

        The template of Phi-3 writes ``<|end|>`` and, after all turns, ``<|endoftext|>``, which is not the answer's.
        """
        last, between = (self.template.probe(USER, answer(PROBE), *more).rpartition(PROBE)[2] for more in ([], [USER]))
        shared = last[: common_prefix(last, between)]
        ends = [shared.rfind(token) + len(token) for token in self.template.special if token in shared]
        if ends:
            return shared[: max(ends)], last
        return last.rstrip() if last.rstrip().endswith(self.template.special) else "", last


def _opened(prompt: str) -> re.Match[str] | None:
    """Match the tag with which a prompt opens the answer's reasoning, if it does."""
    return _OPENED.search(prompt, max(0, len(prompt) - _TAG))


def _with_reasoning(opened: re.Match[str], answer: str, turn: Message, notes: set[str]) -> str:
    """Add the reasoning, or an empty one, to an answer whose prompt opened it, if the template did not write it.

    The template of R1 drops reasoning, OLMo's has none apart from the content, Qwen3.5's writes an empty one itself.
    """
    opening, end = opened[0], f"</{opened[1]}>"
    if end in answer and REASONING not in turn:
        return answer.lstrip().removeprefix(opening.rstrip()).removeprefix("\n" * opening.endswith("\n"))
    inside = THOUGHT.match(turn["content"])
    reasoning = turn.get(REASONING) or (inside[2] if inside else "")
    if not reasoning:
        notes.add(f"pairs with an answer without reasoning, closed by {end!r}: the chat template's prompt opens it")
    begin = "" if opening.endswith("\n") else "\n"
    return f"{begin}{reasoning.strip()}\n{end}\n\n{answer.lstrip()}"


def _other_prompt(prompt: str, whole: str) -> RowError:
    change = _difference(prompt, whole)
    thinks = (
        'chat_template_kwargs {"enable_thinking": true}, or ' if "</think>" in change.partition(" becomes ")[0] else ""
    )
    return RowError(
        f"the chat template renders the prompt differently once its answer follows: {change}, and inference reads the "
        f"first; give {thinks}another --chat-template"
    )


def _difference(one: str, other: str) -> str:
    at = common_prefix(one, other)
    return " becomes ".join(repr(text[max(0, at - 10) : at + 30]) for text in (one, other))
