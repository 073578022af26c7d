"""Rows as the model reads them: the chat template's text of the prompt, and behind it of each answer.

The prompt is the text that inference gives the model. What a template lacks is made up for and noted: it may take no
system message, show no tool calls, or open the answer's reasoning itself. What it can do is found by rendering a few
messages; that it did is checked on every row, where each message must be found in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from dpo_cli.data.formats import FORMATS, HH_ASSISTANT, common_prefix
from dpo_cli.data.messages import REASONING, Message, answer_of, check_encodable
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import Row, is_rendered
from dpo_cli.data.template import ControlTokens, plain_template, render
from dpo_cli.utils.errors import RowError

# What is noted of a row, beside what tokens.py notes.
NO_TEMPLATE = "pairs of messages written as 'User: … Assistant: …': the model has no chat template (--chat-template)"
SYSTEM_FIRST = "pairs whose system message begins the first user turn: the chat template takes none"
SYSTEM_LAST = "pairs whose system message begins the last user turn, where the chat template puts it"
CALLS_WRITTEN = "pairs whose tool calls are written into an answer's text: the chat template does not show them"
TOOLS_UNSEEN = "pairs whose tools the chat template does not show"
REASONING_UNSEEN = "pairs with an assistant's reasoning that the chat template leaves out"
EARLIER_UNSEEN = "pairs with an earlier assistant's text or tool call that the chat template leaves out"
HISTORY_CHANGES = (
    "pairs whose earlier turns the chat template rewrites once an answer follows: kept as inference has them"
)
TURNS_WITHOUT_LOSS = "pairs with turns behind the prompt that carry no loss (--train-turns)"
CONTROL_KEPT = "pairs with control tokens inside their messages, which act as such (--control-tokens keep)"
CONTROL_SANITIZED = "pairs with control tokens inside their messages, read as text (--control-tokens sanitize)"
# What follows the name of a format of strings.
WRAPPED = ", wrapped as a user turn and an answer; --format strings keeps them raw"
RENDERED = ", kept raw: rendered by a chat template already"
RENDERED_OTHERWISE = ", kept raw: rendered already, by another model's chat template"

_OPENED = re.compile(r"<([\w:]*(?:think|reason)[\w:]*)>\s*\Z", re.IGNORECASE)  # at the end of a prompt
_THOUGHT = re.compile(r"(?:(.*?)<think>)?(.*?)</think>(.*)", re.DOTALL)  # what is before, in and behind reasoning
_FLAG = re.compile(r"(?<![<\w])/(?:no_?)?think\b(?!>)")  # for the template, as in a system message of SmolLM3's
_TOOL_ROLES = ("tool", "environment", "ipython", "observation", "function")
_TAG = 40  # characters within which a prompt ends that opens reasoning
_SHORT = 12  # characters: a shorter text is looked for as a word of its own
_PROBE = "PROBE"
_USER: Message = {"role": "user", "content": "u"}


class Side(NamedTuple):
    """Prompt and answer in one text, of which the characters in ``spans`` carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool  # whether the template wrote an ending
    cuts: tuple[int, ...] = ()  # places that no token may span: a prompt opened there what its answer begins in


@dataclass(frozen=True, slots=True)
class Conversation:
    """The texts of a row; ``templated`` ones have all special tokens."""

    prompt: str
    chosen: Side
    rejected: Side
    templated: bool = True
    notes: frozenset[str] = frozenset()


class Chat:
    """A tokenizer's chat template, the plain one where there is none, and what it makes of a row.

    ``control_tokens`` says what becomes of those inside messages: ``keep``, ``sanitize`` or ``refuse``; ``train_turns``
    which of a response's turns carry loss: ``last`` or ``all``.
    """

    def __init__(self, tokenizer: Any, control_tokens: str, adds_bos: bool, train_turns: str) -> None:
        self.tokenizer, self.control_tokens, self.train_turns = tokenizer, control_tokens, train_turns
        self.control = ControlTokens(tokenizer)
        self.template = None if tokenizer.chat_template else plain_template(adds_bos)  # None: the tokenizer's own

    def as_turns(self, row: Row) -> Row:
        """The row as messages where it is strings for a chat template: a user turn, and an answer each.

        Strings stay as they are where a chat template was applied to them already.
        """
        if not isinstance(row.prompt, str) or row.raw or self.template or row.format == FORMATS["hh"][0]:
            return row
        if is_rendered(row.prompt):
            how = RENDERED if self.control.first(row.prompt) or HH_ASSISTANT in row.prompt else RENDERED_OTHERWISE
            return replace(row, format=row.format + how)
        eos = self.tokenizer.eos_token  # the template writes its own ending
        chosen, rejected = (answer_of(str(side).rstrip().removesuffix(eos)) for side in (row.chosen, row.rejected))
        turns = [_USER | {"content": row.prompt}]
        return replace(row, format=row.format + WRAPPED, prompt=turns, chosen=chosen, rejected=rejected)

    def conversation(self, row: Row) -> Conversation:
        """The texts of a row.

        Raises:
            RowError: the template refuses the messages or leaves one out, or it writes the prompt otherwise once an
                answer follows; the messages have control tokens that are to be refused.
        """
        if isinstance(row.prompt, str):
            texts = (row.prompt + str(side) for side in (row.chosen, row.rejected))
            sides = [Side(text, ((len(row.prompt), len(text)),), complete=False) for text in texts]
            return Conversation(row.prompt, sides[0], sides[1], templated=False)
        notes = self._control_notes(row) | ({NO_TEMPLATE} if self.template else set())
        row = self._adapted(row, notes)
        responses: tuple[Any, Any] = row.chosen, row.rejected
        several = max(map(len, responses)) > 1
        trained = self._trained(*responses) if several else ([0], [0])
        if several:
            notes.add(TURNS_WITHOUT_LOSS)
        prompt = self._render(row, row.prompt, generation=True)
        sides = [self._side(row, prompt, *side, notes) for side in zip(responses, trained, strict=True)]
        if _OPENED.search(prompt, max(0, len(prompt) - _TAG)):
            sides = [side._replace(cuts=tuple(sorted({len(prompt), *side.cuts}))) for side in sides]
        if not all(side.text.startswith(prompt) for side in sides):
            prompt = self._render(row, row.prompt)  # a first turn without loss is history, which no prompt opens
        for side, turns, places in zip(sides, responses, trained, strict=True):
            if not side.text.startswith(prompt):
                raise _other_prompt(prompt, side.text)
            self._check_seen(turns[: places[-1] + 1], side.text[len(prompt) :], notes, places)
        tools = [tool["function"] for tool in row.template_arguments.get("tools", ())]
        self._check_seen(row.prompt, prompt, notes, tools=tools)
        return Conversation(prompt, sides[0], sides[1], notes=frozenset(notes))

    def _render(self, row: Row, messages: Any, generation: bool = False) -> str:
        """The template's text; what in it is to be read as text is marked."""
        arguments = row.template_arguments
        text = render(self.tokenizer, messages, generation, self.template, arguments)
        check_encodable(text, "the messages")
        if self.control_tokens != "sanitize" or not self.control.first([messages, arguments]):
            return text
        try:
            marked, others = self.control.mark(messages), self.control.mark(arguments)
        except RecursionError as error:
            raise RowError("the messages are nested too deeply") from error
        return render(self.tokenizer, marked, generation, self.template, others)

    def _control_notes(self, row: Row) -> set[str]:
        fields = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} | row.template_arguments
        found = {name: token for name, value in fields.items() if (token := self.control.first(value))}
        if found and self.control_tokens == "refuse":
            raise RowError(", ".join(f"{name} contains the control token '{token}'" for name, token in found.items()))
        return {CONTROL_SANITIZED if self.control_tokens == "sanitize" else CONTROL_KEPT} if found else set()

    # ---- each trained turn behind the prompt that inference has for it ----------------------------------------------

    def _trained(self, chosen: list[Message], rejected: list[Message]) -> tuple[list[int], list[int]]:
        """Places of the turns that carry loss, in responses of which one has several."""
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
        found = []
        for name, (turns, others) in sides.items():
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            found.append([place for place in answers if [turns[place]] != others[place : place + 1]])
            if not found[-1]:
                raise RowError(f"{name} has no answer that differs from the other's")
        return found[0], found[1]

    def _side(self, row: Row, asked: str, turns: list[Message], trained: list[int], notes: set[str]) -> Side:
        text, spans, cuts, complete = "", [(0, 0)], [], False
        for place in trained:
            messages = [*row.prompt, *turns[:place]]
            before = self._render(row, messages, generation=True) if place else asked
            if not before.startswith(text):
                text = text.removesuffix(self._endings[0])  # an ending that only a last turn has
                spans[-1] = spans[-1][0], len(text)
            if not before.startswith(text):
                differ = _differ(text, before)
                raise RowError(f"the chat template writes a turn otherwise when others follow: {differ}")
            answer, complete, opened = self._turn(row, before, messages, turns[place], notes)
            cuts += [len(before)] * opened
            text = before + answer
            spans.append((len(before), len(text)))
        return Side(text, tuple(spans[1:]), complete, tuple(cuts))

    def _turn(
        self, row: Row, prompt: str, before: list[Message], turn: Message, notes: set[str]
    ) -> tuple[str, bool, bool]:
        """A turn behind its prompt, whether it has an ending, and whether the prompt opened what it begins in."""
        whole = self._render(row, [*before, turn])
        opened = _OPENED.search(prompt, max(0, len(prompt) - _TAG))
        if whole.startswith(prompt):
            answer = whole[len(prompt) :]
        elif opened and whole.startswith(prompt[: opened.start()]):
            turn = self.control.mark(turn) if self.control_tokens == "sanitize" else turn
            answer = _with_reasoning(opened, whole[opened.start() :], turn, notes)
        else:
            answer = self._behind_generation_prompt(row, prompt, whole, before)
            notes.add(HISTORY_CHANGES)
        ending, last_ending, next_turn = self._endings
        if last_ending and answer.endswith(last_ending):
            answer = answer.removesuffix(last_ending) + ending
        if answer.rstrip().endswith(self.control.special):
            return answer.rstrip(), True, bool(opened)
        follows = f"; a next turn would begin with '{next_turn}'" if next_turn else ""
        eos = self.tokenizer.eos_token
        notes.add(f"pairs whose answers end with '{eos}', the tokenizer's EOS: the chat template writes none{follows}")
        return answer, False, bool(opened)

    def _behind_generation_prompt(self, row: Row, prompt: str, whole: str, before: list[Message]) -> str:
        """A turn behind earlier ones that the template writes otherwise because of it: what its own opening precedes.

        So gpt-oss's drops the reasoning of earlier turns as soon as a final answer follows.
        """
        history = self._render(row, before)
        opening = prompt.removeprefix(history) if prompt.startswith(history) else ""
        lead = (
            self._probe(_USER, _answer(_PROBE)).removeprefix(self._probe(_USER, generation=True)).partition(_PROBE)[0]
        )
        begin = self._render(row, [*before, _answer(_PROBE)]).rpartition(_PROBE)[0].removesuffix(lead)
        if not (opening.strip() and begin.endswith(opening) and whole.startswith(begin)):
            raise _other_prompt(prompt, whole)
        return whole[len(begin) :]

    @cached_property
    def _endings(self) -> tuple[str, str, str]:
        """What ends an answer's turn wherever it stands, what is behind a last one, and what begins the next turn.

        Phi-3's writes ``<|end|>`` and, behind all turns, ``<|endoftext|>``: only the first is the answer's.
        """
        last, between = (self._probe(_USER, _answer(_PROBE), *more).rpartition(_PROBE)[2] for more in ([], [_USER]))
        shared = last[: common_prefix(last, between)]
        ends = [shared.rfind(token) + len(token) for token in self.control.special if token in shared]
        if ends:
            return shared[: max(ends)], last, ""
        if last.rstrip().endswith(self.control.special):
            return last.rstrip(), last, ""
        begin = self.control.token.match(between.lstrip())
        return "", last, begin[0] if begin else ""

    # ---- rows as the template can show them -------------------------------------------------------------------------

    def _probe(self, *messages: Message, generation: bool = False) -> str:
        """What the template makes of messages; empty where it refuses them."""
        try:
            return render(self.tokenizer, [*messages], generation, self.template)
        except RowError:
            return ""

    def _adapted(self, row: Row, notes: set[str]) -> Row:
        """The row with its system message, tool calls and tool results in forms that the template shows."""
        sides: list[list[Message]] = [[*row.prompt], [*row.chosen], [*row.rejected]]
        prompt = sides[0]
        if prompt[0]["role"] == "system" and (place := self._system_place):
            users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
            if users:
                at = users[0] if place == SYSTEM_FIRST else users[-1]
                content = f"{prompt[0]['content']}\n\n{prompt[at]['content']}"
                prompt[at] = prompt[at] | {"content": content}
                del prompt[0]
                notes.add(place)
        if any("tool_calls" in each or "function_calls" in each or each["role"] == "tool" for s in sides for each in s):
            ids = _CallIds(self._short_ids)
            sides[0] = [self._with_calls(message, ids, notes) for message in prompt]
            for side in sides[1:]:  # each follows the prompt's calls
                own = deepcopy(ids)
                side[:] = [self._with_calls(message, own, notes) for message in side]
        return replace(row, prompt=sides[0], chosen=sides[1], rejected=sides[2])

    @cached_property
    def _system_place(self) -> str | None:
        """Where a system message has to go, as a note says it; None: it can stay.

        Mistral's puts it into the last user turn of a prompt, and drops it as soon as an answer follows.
        """
        turns = [_USER, _answer("a"), {"role": "user", "content": "v"}]
        asked = self._probe({"role": "system", "content": _PROBE}, *turns, generation=True)
        if _PROBE not in asked:
            return SYSTEM_FIRST
        whole = self._probe({"role": "system", "content": _PROBE}, *turns, _answer("b"))
        if whole.startswith(asked[: asked.index(_PROBE) + len(_PROBE)]):
            return None
        moved = {"role": "user", "content": f"{_PROBE}\n\nv"}
        return SYSTEM_LAST if self._probe(*turns[:2], moved, generation=True) == asked else SYSTEM_FIRST

    def _with_calls(self, message: Message, ids: _CallIds, notes: set[str]) -> Message:
        """A message whose tool calls, or what a tool gave, are as the template shows them."""
        if message["role"] == "tool":
            return message | {"role": self._tool_role} | ids.of_result(message)
        if "tool_calls" in message and self._calls_form:
            calls = [call | {"id": ids.of_call(call)} for call in message["tool_calls"]]
            message = self._calls_form(message | {"tool_calls": calls})
        written = [] if self._calls_form else [json.dumps(c, ensure_ascii=False) for c in message.get("tool_calls", ())]
        hidden = ["tool_calls"] * bool(written)
        if isinstance(text := message.get("function_calls"), str) and not self._shows_function_calls:
            written, hidden = [*written, text], [*hidden, "function_calls"]
        if not written:
            return message
        notes.add(CALLS_WRITTEN)
        content = "\n".join(filter(None, [message["content"], *written]))
        return {key: value for key, value in message.items() if key not in hidden} | {"content": content}

    @cached_property
    def _calls_form(self) -> Any:
        """What makes the template show tool calls: arguments as the object, or as JSON text; None: nothing does."""
        forms = (_as_it_is, _with_text_arguments)
        return next((form for form in forms if _PROBE in self._probe(_USER, form(_call("callcall1")))), None)

    @cached_property
    def _short_ids(self) -> bool:
        """Whether the template takes a tool call only with an id of nine letters and digits, as Mistral's do."""
        return self._calls_form is not None and not self._probe(_USER, self._calls_form(_call("call_0a1b2c3d")))

    @cached_property
    def _tool_role(self) -> str:
        """The role under which the template shows what a tool gave."""
        call = self._calls_form(_call("callcall1")) if self._calls_form else _answer("a")
        about = {"content": _PROBE, "tool_call_id": "callcall1", "name": "f"}
        shown = (role for role in _TOOL_ROLES if _PROBE in self._probe(_USER, call, {"role": role} | about))
        return next(shown, "tool")

    @cached_property
    def _shows_function_calls(self) -> bool:
        return _PROBE in self._probe(_USER, _answer("") | {"function_calls": _PROBE})

    # ---- each message is in the text --------------------------------------------------------------------------------

    def _check_seen(
        self,
        messages: Any,
        text: str,
        notes: set[str],
        trained: Sequence[int] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Look for what messages say in their text; note what is left out of it.

        Raises:
            RowError: that is more than reasoning, and not of an earlier assistant's turn.
        """
        if self.control_tokens == "sanitize":
            text = text.replace(self.control.OPEN, "").replace(self.control.CLOSE, "")
        text = self.control.token.sub("\0", text)  # in which no message stands
        said = [
            (place, part, self.control.token.sub("\0", words))
            for place, each in enumerate(messages)
            for part, words in _said(each)
        ]
        said.sort(key=lambda each: -len(each[2]))  # so that "7" is not found in "37"
        names = [self.control.token.sub("\0", str(tool.get("name", ""))) for tool in tools]
        for place, part, words in (*said, *((-1, "", name) for name in names)):
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


class _CallIds:
    """Ids of a conversation's tool calls: their own, or numbers; ``short`` ones have nine letters and digits."""

    def __init__(self, short: bool) -> None:
        self.short, self.known, self.open = short, dict[str, str](), list[str]()

    def of_call(self, call: dict[str, Any]) -> str:
        """The id of a call."""
        own = str(call.get("id") or f"call{len(self.known):05d}")
        name = re.sub("[^a-zA-Z0-9]", "", own)[-9:].rjust(9, "0") if self.short else own
        self.known[own] = name if name not in self.known.values() else f"call{len(self.known):05d}"
        self.open.append(own)
        return self.known[own]

    def of_result(self, message: Message) -> Message:
        """What names the call that a tool's message answers: its own id, or the first that is open."""
        own = message.get("tool_call_id") or (self.open[0] if self.open else None)
        if own in self.open:
            self.open.remove(own)
        return {"tool_call_id": self.known.get(own, own)} if own else {}


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call(call_id: str) -> Message:
    call = {"id": call_id, "type": "function", "function": {"name": _PROBE, "arguments": {"a": 1}}}
    return _answer("") | {"tool_calls": [call]}


def _as_it_is(message: Message) -> Message:
    return message


def _with_text_arguments(message: Message) -> Message:
    """The message with its calls' arguments as JSON text."""
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": text}})
    return message | {"tool_calls": calls}


def _with_reasoning(opened: re.Match[str], answer: str, turn: Message, notes: set[str]) -> str:
    """An answer behind a prompt that opened its reasoning, which the template did not write: with it, or an empty one.

    R1's template drops reasoning, OLMo's knows none apart from the content. Qwen3.5's writes an empty one itself.
    """
    opening, end = opened[0], f"</{opened[1]}>"
    if end in answer and REASONING not in turn:
        return answer.lstrip().removeprefix(opening.rstrip()).removeprefix("\n" * opening.endswith("\n"))
    inside = _THOUGHT.match(turn["content"])
    reasoning = turn.get(REASONING) or (inside[2] if inside else "")
    if not reasoning:
        notes.add(f"pairs with an answer without reasoning, closed by {end!r}: the chat template's prompt opens it")
    begin = "" if opening.endswith("\n") else "\n"
    return f"{begin}{reasoning.strip()}\n{end}\n\n{answer.lstrip()}"


def _other_prompt(prompt: str, whole: str) -> RowError:
    """The error of a conversation that does not begin with its prompt."""
    differ = _differ(prompt, whole)
    thinks = (
        'chat_template_kwargs {"enable_thinking": true}, or ' if "</think>" in differ.partition(" becomes ")[0] else ""
    )
    return RowError(
        f"the chat template writes the prompt otherwise once its answer follows: {differ}, and inference reads the "
        f"first; give {thinks}another --chat-template"
    )


def _differ(one: str, other: str) -> str:
    """Where two texts part, in words."""
    at = common_prefix(one, other)
    return " becomes ".join(repr(text[max(0, at - 10) : at + 30]) for text in (one, other))


def _said(message: Message) -> Iterator[tuple[str, str]]:
    """What a message says: names of its parts and their texts, none of them empty."""
    parts = [("reasoning", message.get(REASONING, "")), ("text", message["content"])]
    if message["role"] == "assistant" and REASONING not in message and (inside := _THOUGHT.match(message["content"])):
        parts = [("text", inside[1] or ""), ("reasoning", inside[2]), ("text", inside[3])]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        parts += [("tool call", leaf) for leaf in (function["name"], *_leaves(function["arguments"]))]
    if isinstance(text := message.get("function_calls"), str):
        parts.append(("tool call", text))
    texts = ((part, _FLAG.sub("", text).strip()) for part, text in parts)
    yield from ((part, text) for part, text in texts if text)


def _leaves(value: Any) -> Iterator[str]:
    """All keys and values in arguments, which a template may write as JSON, in tags, or in its own way."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from (str(key), *_leaves(each))
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _find(words: str, text: str) -> str | None:
    """Words as they stand in a text: as they are, within JSON, as Python writes a constant, or spaced otherwise."""
    python = {"true": "True", "false": "False", "null": "None"}.get(words, words)
    for form in dict.fromkeys((words, json.dumps(words, ensure_ascii=False)[1:-1], python)):
        if len(form) > _SHORT:
            if form in text:
                return form
        elif re.search(rf"(?<!\w){re.escape(form)}(?!\w)" if form.isalnum() else re.escape(form), text):
            return form
    return words if len(words) > _SHORT and "".join(words.split()) in "".join(text.split()) else None
