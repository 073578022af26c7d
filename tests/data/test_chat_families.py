"""Rows under the real chat templates of many families: what is asked, what carries loss, what is noted or refused.

What is expected is written by hand from the templates' sources: ``FAMILIES`` says how each writes a turn, ``CASES`` of
which turns a row is made. Nothing of it comes from the program. The templates are the copies that TRL brings; two that
it has not are written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data.rows import BadRow, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.utils.errors import RowError
from tests.helpers import ROOT, write_rows
from tests.helpers.chat import (
    CLOSED,
    FAMILIES,
    FIND,
    INLINE,
    MISTRAL,
    Arguments,
    Family,
    Record,
    as_json,
    at_inference,
    called,
    decoded,
    plain,
    tokenizer_of,
    written_call,
)
from tests.helpers.records import encode_row

# ---- how each family writes a turn ------------------------------------------------------------------------------


LEFT_OUT = "reasoning that the chat template leaves out"
WRITTEN = "tool calls are written into an answer's text"
NO_TOOLS = "tools the chat template does not show"
EMPTY = "without reasoning, closed by"
LAST_USER = "system message begins the last user turn"
MASKED = "turns after the prompt that carry no loss"
MERGED = "boundary moved back"


# ---- the rows ---------------------------------------------------------------------------------------------------

ASKED, THOUGHT, OTHER_THOUGHT, GOOD, BAD = "Which bus runs to Elm?", "Line six does.", "I guess.", "Six.", "None."
ELM, OAK = {"stop": "Elm"}, {"stop": "Oak"}
USER = {"role": "user", "content": ASKED}


def says(content: Any, **others: Any) -> Record:
    return {"role": "assistant", "content": content, **others}


def calls(*arguments: Any, content: Any = "", name: str = "find_bus") -> Record:
    made = [
        {"id": f"bus00000{place}", "type": "function", "function": {"name": name, "arguments": each}}
        for place, each in enumerate(arguments, 1)
    ]
    return says(content, tool_calls=made)


def gave(content: str, role: str = "tool") -> Record:
    return {"role": role, "tool_call_id": "bus000001", "name": "find_bus", "content": content}


def pair(*prompt: Record, chosen: Any, rejected: Any, **others: Any) -> Record:
    return {"prompt": list(prompt), "chosen": chosen, "rejected": rejected, **others}


@dataclass(frozen=True)
class Expected:
    """A row's tail of the prompt, from the first text that is the row's own, what carries loss, and the notes."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    masked: str = ""  # between the prompt and what of chosen carries loss
    same: bool = False  # the pair is refused, as both sides give the same


Case = tuple[Record, Callable[[Family], Expected]]


def thoughtful(family: Family, form: str, reasoning: str, text: str) -> str:
    """An answer with reasoning under its own key, inline or closed only."""
    forms = {"key": family.thought, "inline": family.inline or family.thought}
    forms["closed"] = family.closed or forms["inline"]
    found = forms[form]
    return (found % (reasoning, text) if found else family.answer % text) + family.ending


def empty(family: Family) -> tuple[str, ...]:
    return (EMPTY,) * family.note_thoughtless


def asked(family: Family, text: str = ASKED) -> str:
    return text + family.user_end + family.opening


def simple(family: Family, before: str = "", notes: tuple[str, ...] = ()) -> Expected:
    """Two answers without reasoning."""
    return Expected(before + asked(family), plain(family, GOOD), plain(family, BAD), (*notes, *empty(family)))


def of_system(text: str) -> Callable[[Family], Expected]:
    def expected(family: Family) -> Expected:
        whole = family.system % text
        # Between the two a family may open the user's turn, which its own form of a system message may have done.
        if not whole.endswith((family.next_user or "-", "\n\n")):
            whole += family.next_user
        return simple(family, whole, (LAST_USER,) * (family.template == MISTRAL))

    return expected


def of_reasoning(form: str, chosen: tuple[str, str], rejected: tuple[str, str]) -> Callable[[Family], Expected]:
    def expected(family: Family) -> Expected:
        hidden = form == "key" and not family.thought
        sides = [thoughtful(family, form, *each) for each in (chosen, rejected)]
        return Expected(asked(family), sides[0], sides[1], (LEFT_OUT,) * hidden, same=sides[0] == sides[1])

    return expected


def tool_notes(family: Family, *, call: bool = True, tools: bool = True) -> tuple[str, ...]:
    return (WRITTEN,) * (call and not family.call) + (NO_TOOLS,) * (tools and not family.shows_tools)


def of_call(
    chosen: Arguments, rejected: Arguments | None = None, name: str = "find_bus"
) -> Callable[[Family], Expected]:
    """A call against another, or against an answer."""

    def expected(family: Family) -> Expected:
        other = plain(family, BAD) if rejected is None else called(family, rejected, name)
        notes = (*tool_notes(family), *empty(family))
        return Expected(asked(family), called(family, chosen, name), other, notes)

    return expected


def of_several(family: Family) -> Expected:
    one = called(family, ELM)
    if family.several:
        both = family.several % ("find_bus", family.arguments(ELM), "find_bus", family.arguments(OAK))
    else:
        both = plain(family, "\n".join([written_call(as_json(ELM)), written_call(as_json(OAK), 2)]))
    return Expected(asked(family), both, one, (*tool_notes(family), *empty(family)))


def of_beside(family: Family) -> Expected:
    text, arguments = "I look.", family.arguments(ELM)
    if family.beside and "%(" in family.beside:
        whole = family.beside % {"name": "find_bus", "arguments": arguments, "text": text}
    elif family.beside:
        whole = family.beside % (text, "find_bus", arguments)
    elif family.call:
        whole = text + "\n" + family.call % ("find_bus", arguments)
    else:
        whole = plain(family, text + "\n" + written_call(as_json(ELM)))
    return Expected(asked(family), whole, plain(family, BAD), (*tool_notes(family), *empty(family)))


def called_before(family: Family) -> str:
    """The user's text and an earlier call."""
    if family.call:
        form = family.called % ("find_bus", family.arguments(ELM))
    else:
        form = family.earlier % written_call(as_json(ELM))
    return ASKED + family.user_end + form


def after_result(family: Family, text: str) -> str:
    """An answer behind what a tool gave: R1's template opens no reasoning there, Mistral's writes its space."""
    return (text if family.template == "deepseek_r1_distill.jinja" else family.answer % text) + family.ending


def of_result(family: Family) -> Expected:
    prompt = called_before(family) + family.result % "12:05" if family.result else ""
    opened = family.note_thoughtless and family.template != "deepseek_r1_distill.jinja"
    notes = (*tool_notes(family, tools=False), *(EMPTY,) * opened)
    return Expected(prompt, after_result(family, GOOD), after_result(family, BAD), notes)


def of_steps(family: Family) -> Expected:
    """Call, result and answer, of which the last carries loss; the call is the response's, and so behind the prompt."""
    opened = family.note_thoughtless and family.template != "deepseek_r1_distill.jinja"
    notes = (MASKED, *tool_notes(family, tools=False), *(EMPTY,) * opened)
    if not family.result:
        return Expected("", "", "")
    masked = called_before(family).removeprefix(ASKED + family.user_end) + family.result % "12:05"
    if family.template == MISTRAL:
        masked = masked.removeprefix("[/INST]")
        return Expected(ASKED + "[/INST]", after_result(family, GOOD), after_result(family, BAD), notes, masked)
    opening = family.opening if masked.startswith(family.opening) else ""
    if not opening:  # a first turn that is written otherwise than the prompt opens it: no opening in the prompt
        return Expected(ASKED + family.user_end, after_result(family, GOOD), after_result(family, BAD), notes, masked)
    return Expected(
        asked(family), after_result(family, GOOD), after_result(family, BAD), notes, masked.removeprefix(opening)
    )


def of_all_steps(family: Family) -> Expected:
    """Calls, results and answers that all differ, and all carry loss."""
    if not family.result:
        return Expected("", "", "")
    ending = "<|endoftext|>" if family.template == "glm4moe.jinja" else ""  # which a call in the middle has not
    sides = [
        called(family, each).removesuffix(ending) + after_result(family, text)
        for each, text in ((ELM, GOOD), (OAK, BAD))
    ]
    return Expected(asked(family), sides[0], sides[1], (MASKED, *tool_notes(family, tools=False)))


def of_turns(family: Family) -> Expected:
    """An earlier question and answer."""
    opening = "" if family.template == MISTRAL else family.user_end
    before = "Good day?" + opening + family.earlier % "Good day." + family.next_user
    return simple(family, before)


def of_thoughtless(family: Family) -> Expected:
    """``enable_thinking`` is false: an opening with empty reasoning, where the template has one."""
    if not family.thoughtless:
        return simple(family)
    answer = "\n%s" if family.template == "glm4moe.jinja" else "%s"
    sides = [answer % text + family.ending for text in (GOOD, BAD)]
    return Expected(ASKED + family.user_end + family.thoughtless, sides[0], sides[1])


def of_thoughtless_reasoning(family: Family) -> Expected:
    """Reasoning although ``enable_thinking`` is false: refused where the opening has an empty one."""
    return of_reasoning("key", (THOUGHT, GOOD), (THOUGHT, BAD))(family)


def reasoned(key: str) -> Record:
    return pair(USER, chosen=[says(GOOD, **{key: THOUGHT})], rejected=[says(BAD, **{key: OTHER_THOUGHT})])


SIMPLE = {"chosen": [says(GOOD)], "rejected": [says(BAD)]}
TOOLS = {"tools": [FIND]}
CALLED = [calls(ELM), gave("12:05")]
LABEL = "find_bus"
both_reasoned = of_reasoning("key", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD))
result_row = {"chosen": [says(GOOD)], "rejected": [says(BAD)]}
CASES: dict[str, Case] = {
    "system": (pair({"role": "system", "content": "Be terse."}, USER, **SIMPLE), of_system("Be terse.")),
    "developer": (pair({"role": "developer", "content": "Be terse."}, USER, **SIMPLE), of_system("Be terse.")),
    "system_and_developer": (
        pair({"role": "system", "content": "You plan."}, {"role": "developer", "content": "Be terse."}, USER, **SIMPLE),
        of_system("You plan.\n\nBe terse."),
    ),
    "reasoning": (reasoned("reasoning"), both_reasoned),
    "reasoning_content": (reasoned("reasoning_content"), both_reasoned),
    "thinking": (reasoned("thinking"), both_reasoned),
    "inline": (
        pair(USER, chosen=[says(INLINE % (THOUGHT, GOOD))], rejected=[says(INLINE % (OTHER_THOUGHT, BAD))]),
        of_reasoning("inline", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD)),
    ),
    "closed": (
        pair(USER, chosen=[says(CLOSED % (THOUGHT, GOOD))], rejected=[says(CLOSED % (OTHER_THOUGHT, BAD))]),
        of_reasoning("closed", (THOUGHT, GOOD), (OTHER_THOUGHT, BAD)),
    ),
    "one_side": (
        pair(USER, chosen=[says(GOOD)], rejected=[says(INLINE % (THOUGHT, BAD))]),
        lambda family: Expected(
            asked(family), plain(family, GOOD), thoughtful(family, "inline", THOUGHT, BAD), empty(family)
        ),
    ),
    "reasoning_differs": (
        pair(USER, chosen=[says(GOOD, reasoning=THOUGHT)], rejected=[says(GOOD, reasoning=OTHER_THOUGHT)]),
        of_reasoning("key", (THOUGHT, GOOD), (OTHER_THOUGHT, GOOD)),
    ),
    "inline_differs": (
        pair(USER, chosen=[says(INLINE % (THOUGHT, GOOD))], rejected=[says(INLINE % (OTHER_THOUGHT, GOOD))]),
        of_reasoning("inline", (THOUGHT, GOOD), (OTHER_THOUGHT, GOOD)),
    ),
    "call": (pair(USER, chosen=[calls(ELM)], rejected=[calls(OAK)], **TOOLS), of_call(ELM, OAK)),
    "call_as_text": (
        pair(USER, chosen=[calls('{"stop": "Elm"}', content=None)], rejected=[says(BAD)], **TOOLS),
        of_call(ELM),
    ),
    "call_empty_text": (pair(USER, chosen=[calls("")], rejected=[says(BAD)], **TOOLS), of_call({})),
    "call_null": (pair(USER, chosen=[calls(None)], rejected=[says(BAD)], **TOOLS), of_call({})),
    "call_with_nulls": (
        pair(USER, chosen=[calls({"line": None, "stop": "Elm"})], rejected=[says(BAD)], **TOOLS),
        of_call(ELM),
    ),
    "call_text_with_nulls": (
        pair(USER, chosen=[calls('{"line": null, "stop": "Elm"}')], rejected=[says(BAD)], **TOOLS),
        of_call({"line": None, "stop": "Elm"}),
    ),
    "calls_empty": (
        pair(USER, chosen=[says(GOOD, tool_calls=[])], rejected=[says(BAD, tool_calls=[])]),
        simple,
    ),
    "calls_null": (pair(USER, chosen=[says(GOOD, tool_calls=None)], rejected=[says(BAD, tool_calls=None)]), simple),
    "several": (pair(USER, chosen=[calls(ELM, OAK)], rejected=[calls(ELM)], **TOOLS), of_several),
    "result": (pair(USER, *CALLED, **result_row), of_result),
    "result_environment": (pair(USER, calls(ELM), gave("12:05", "environment"), **result_row), of_result),
    "result_ipython": (pair(USER, calls(ELM), gave("12:05", "ipython"), **result_row), of_result),
    "beside": (pair(USER, chosen=[calls(ELM, content="I look.")], rejected=[says(BAD)], **TOOLS), of_beside),
    "turns": (
        pair({"role": "user", "content": "Good day?"}, says("Good day."), USER, **SIMPLE),
        of_turns,
    ),
    "steps_last": (
        pair(USER, chosen=[calls(ELM), gave("12:05"), says(GOOD)], rejected=[calls(ELM), gave("12:05"), says(BAD)]),
        of_steps,
    ),
    "steps_all": (
        pair(USER, chosen=[calls(ELM), gave("12:05"), says(GOOD)], rejected=[calls(OAK), gave("13:35"), says(BAD)]),
        of_all_steps,
    ),
    "strings": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, simple),
    "json_text": (
        {"prompt": json.dumps([USER]), "chosen": json.dumps([says(GOOD)]), "rejected": json.dumps([says(BAD)])},
        simple,
    ),
    "thoughtless": (pair(USER, **SIMPLE, chat_template_kwargs={"enable_thinking": False}), of_thoughtless),
    "thoughtless_reasoning": (
        pair(
            USER,
            chosen=[says(GOOD, reasoning=THOUGHT)],
            rejected=[says(BAD, reasoning=THOUGHT)],
            chat_template_kwargs={"enable_thinking": False},
        ),
        of_thoughtless_reasoning,
    ),
}
MOVED = (WRITTEN, "system message begins the first")  # notes of a prompt that is not the messages' own


@dataclass(frozen=True)
class Trained:
    """What the model reads of a row: texts of its tokens, of responses all of them and those with loss."""

    prompt: str
    whole: list[str]
    loss: list[str]
    notes: set[str]


def train(name: str, record: Record, folder: Path, turns: str = "last") -> Trained | str:
    """A row as it is trained, or why it is refused."""
    tokenizer = tokenizer_of(name)
    [row] = read_rows(find_sources([str(write_rows(folder / "rows.jsonl", [record]))]))
    if isinstance(row, BadRow):
        return row.reason
    try:
        made, notes = encode_row(Encoder(tokenizer, max_length=8192, train_turns=turns), row)
    except RowError as error:
        return str(error)
    sides = (made.chosen.tolist(), made.rejected.tolist())
    return Trained(
        decoded(tokenizer, made.prompt.tolist()),
        [decoded(tokenizer, [i if i >= 0 else ~i for i in side]) for side in sides],
        [decoded(tokenizer, [i for i in side if i >= 0]) for side in sides],
        notes,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_row(name: str, case: str, tmp_path: Path) -> None:
    family, (record, expected_of) = FAMILIES[name], CASES[case]
    turns = "all" if case == "steps_all" else "last"
    found, expected = train(name, record, tmp_path, turns), expected_of(family)
    if case in family.refused:
        assert isinstance(found, str), found
        assert family.refused[case] in found
        return
    if expected.same:
        assert isinstance(found, str), found
        assert found == (
            "chosen and rejected give the same tokens: the chat template leaves out the reasoning in which they differ"
        )
        return
    assert isinstance(found, Trained), found
    assert found.loss == [expected.chosen, expected.rejected]
    if expected.masked:  # history, whose tokens may merge with the prompt's, since nothing of it carries loss
        whole = [found.prompt + response for response in found.whole]
        assert all(
            text.endswith(expected.prompt + expected.masked + loss)
            for text, loss in zip(whole, found.loss, strict=True)
        )
    else:
        assert found.prompt.endswith(expected.prompt)
        assert case == "steps_all" or found.whole == found.loss
    notes = {*expected.notes, *family.notes} | {note for note in found.notes if expected.masked and MERGED in note}
    assert {note for note in notes if any(note in each for each in found.notes)} == notes, found.notes
    assert len(found.notes) == len(notes), found.notes
    if not any(moved in each for moved in MOVED for each in found.notes) and not expected.masked:
        assert found.prompt == at_inference(name, record)


# ---- the table in the documentation -----------------------------------------------------------------------------

TITLES = {
    "qwen2_5": "Qwen 2.5",
    "qwen3": "Qwen 3",
    "qwen3_5_think": "Qwen 3.5, thinking",
    "qwen3_5_nothink": "Qwen 3.5, not thinking",
    "llama3_1": "Llama 3.1",
    "llama3": "Llama 3",
    "r1distill": "DeepSeek R1 distilled",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "gptoss": "gpt-oss",
    "glm4": "GLM 4.5",
    "phi3": "Phi 3",
    "cohere2": "Command R7B",
    "mistral": "Mistral 7B v0.3",
    "olmo3": "OLMo 3 Think",
}


def documented() -> dict[str, list[str]]:
    """The table in docs/data.md: what a template is called, and its columns."""
    text = (ROOT / "docs" / "data.md").read_text().split("## What each chat template shows")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def notes_of(found: Trained | str) -> str:
    return "" if isinstance(found, str) else " ".join(found.notes)


@pytest.mark.parametrize("name", FAMILIES)
def test_documented(name: str, tmp_path: Path) -> None:
    def row(case: str) -> Trained | str:
        return train(name, CASES[case][0], tmp_path)

    system = row("system")
    assert isinstance(system, Trained)
    calls_shown = "as text" if WRITTEN in notes_of(row("call")) else "yes"
    if isinstance(row("several"), str):
        calls_shown = "one a turn"
    reasoning = "left out" if LEFT_OUT in notes_of(row("reasoning")) else "yes"
    if EMPTY in notes_of(system):
        reasoning = "filled in"
    if isinstance(row("reasoning"), str):
        reasoning = "refused"
    ending = f"`{system.loss[0].split(GOOD)[1]}`"
    if "the tokenizer's EOS" in notes_of(system):
        ending += ", which is the EOS"
    assert documented()[TITLES[name]] == [
        "in a user turn" if f"Be terse.\n\n{ASKED}" in system.prompt else "yes",
        calls_shown,
        "refused" if isinstance(row("result"), str) else "yes",
        reasoning,
        ending,
    ]


def test_every_family_is_documented() -> None:
    assert list(documented()) == [TITLES[name] for name in FAMILIES]


# ---- rows that need a second look -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm4", "qwen3_5_think", "qwen3_5_nothink"])
def test_loss_begins_at_the_last_turn(name: str, tmp_path: Path) -> None:
    """An opening with empty reasoning, and an answer with reasoning: an earlier turn has that opening too."""
    given = {"chosen": [says(GOOD, reasoning=THOUGHT)], "rejected": [says(BAD, reasoning=THOUGHT)]}
    record = pair(USER, *CALLED, **given, chat_template_kwargs={"enable_thinking": False})
    found = train(name, record, tmp_path)
    assert isinstance(found, str), found.loss
    assert "enable_thinking" in found


def test_a_prompt_that_opened_a_thought_before_an_answer_without(tmp_path: Path) -> None:
    """Gemma's prompt behind a tool's result opens a thought, as an earlier turn did; the answer has none."""
    step = [{**calls(ELM), "reasoning": THOUGHT}, gave("12:05")]
    found = train("gemma4", pair(USER, *step, **SIMPLE, chat_template_kwargs={"enable_thinking": True}), tmp_path)
    assert isinstance(found, str), found.loss
    assert "the chat template renders the prompt differently" in found


def test_what_a_prompt_opened_is_no_answer_beside_a_response_of_several_turns(tmp_path: Path) -> None:
    """The line end behind <think> is the prompt's, also where the other response's history merges it with its own."""
    found = train("qwen3_5_think", pair(USER, chosen=[*CALLED, says(GOOD)], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss == ["\n</think>\n\nSix.<|im_end|>", "\n</think>\n\nNone.<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    [
        '{"from": "Elm", "to": "Oak"}',
        '[{"name": "Ann", "role": "driver"}]',
        '{"model": "small", "messages": [{"role": "user", "content": "Hm?"}]}',
        "[{'name': 'Ann', 'role': 'driver'}]",
    ],
)
def test_answers_that_are_json_of_their_own(answer: str, tmp_path: Path) -> None:
    found = train("qwen2_5", {"prompt": "Write it as JSON.", "chosen": answer, "rejected": BAD}, tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss[0] == answer + "<|im_end|>"


def test_calls_without_ids(tmp_path: Path) -> None:
    """Mistral's template wants ids: each call gets one of its own, and what was given the id of its call."""
    made: list[Record] = [{"function": {"name": name, "arguments": {}}} for name in ("find_bus", "find_tram")]
    results = [{"role": "tool", "content": text} for text in ("12:05", "12:35")]
    found = train("mistral", pair(USER, says("", tool_calls=made), *results, **SIMPLE), tmp_path)
    assert isinstance(found, Trained), found
    ids = re.findall(r'"id": "(\w{9})"', found.prompt)
    assert len(set(ids)) == 2
    assert re.findall(r'"call_id": "(\w{9})"', found.prompt) == ids


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4"])
def test_text_before_reasoning_is_not_lost(name: str, tmp_path: Path) -> None:
    """These templates drop what stands before <think>."""
    found = train(name, pair(USER, chosen=[says("Well. " + INLINE % (THOUGHT, GOOD))], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, str), found
    assert "leaves out" in found
    assert "Well." in found


def test_reasoning_under_its_key_stands_before_an_answer_that_names_its_mark(tmp_path: Path) -> None:
    answer = "Write </think> behind it."
    found = train("olmo3", pair(USER, chosen=[says(answer, reasoning=THOUGHT)], rejected=[says(BAD)]), tmp_path)
    assert isinstance(found, Trained), found
    assert found.loss[0] == f"\n{THOUGHT}\n</think>\n\n{answer}<|im_end|>"


def test_strings_with_a_system_message_are_wrapped_as_those_without(tmp_path: Path) -> None:
    """The space that parts a raw answer from its prompt is not the answer's."""
    record = {"prompt": ASKED, "chosen": " Six.", "rejected": " None."}
    for others in ({}, {"system": "Be terse."}, {"chat_template_kwargs": {"enable_thinking": False}}):
        found = train("qwen2_5", record | others, tmp_path)
        assert isinstance(found, Trained), found
        assert found.loss == ["Six.<|im_end|>", "None.<|im_end|>"]
