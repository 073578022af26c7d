"""Rows to token ids: where the prompt ends, how a response ends, and what gives way when both are too long."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_cli.data.chat import CONTROL_KEPT, NO_TEMPLATE, REASONING_UNSEEN, TOOLS_UNSEEN, TURNS_WITHOUT_LOSS
from dpo_cli.data.messages import Message
from dpo_cli.data.pairs import Pair, Pairs, model_input_ids
from dpo_cli.data.rows import BadRow, Row
from dpo_cli.data.template import CALLS_WRITTEN, SYSTEM_FIRST
from dpo_cli.data.tokenize import BOUNDARY_MOVED, PROMPT_CUT, RESPONSE_CUT, Encoder, refusal, tokenize_rows
from dpo_cli.utils.errors import RowError, UsageError
from tests.helpers import CHATML, SAMPLE, random_pairs
from tests.helpers.records import encode_row

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"]
LONG = 100_000  # a max_length that truncates nothing


def cut(max_length: int = LONG, control_tokens: str = "keep") -> dict[str, Any]:
    return {"max_length": max_length, "control_tokens": control_tokens}


# Templates by what they write after an answer.
NO_TURN_END = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OTHER_TURN_END = CHATML.replace("<|im_end|>", "<end_of_turn>")
TRIMS = CHATML.replace("message['content']", "(message['content'] | trim)")
NO_BOS = NO_TURN_END.replace("{{ bos_token }}", "")
REFUSES_SYSTEM = (
    "{% for message in messages if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endfor %}"
    + CHATML
)
SHOWS_TOOLS = "{% for tool in tools or [] %}{{ '<tool>' + tool.function.name }}{% endfor %}" + CHATML.replace(
    "message['content']",
    "message['content'] + (message.tool_calls[0].function.name + '()' if message.tool_calls else '')",
)


@cache
def trained() -> str:
    """A small byte-level BPE with all the special tokens that the tokenizers here need."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(SAMPLE / "train-strings.jsonl")], trainer)
    return bpe.to_str()


@cache
def make(around: str = "$A", bos: str | None = "<s>", eos: str | None = "</s>", template: str | None = None) -> Any:
    """A tokenizer that puts ``around`` around every text, unless it is told to add no special tokens."""
    bpe = Tokenizer.from_str(trained())
    ids = [(token, SPECIAL.index(token)) for token in SPECIAL]
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token="<pad>", chat_template=template
    )


STRING_TOKENIZERS = {
    "adds nothing": make(),
    "adds BOS": make("<s> $A"),
    "adds EOS": make("$A </s>"),
    "adds BOS and EOS": make("<s> $A </s>"),
    "BOS is EOS": make("$A", bos="</s>"),
    "BOS is EOS, adds BOS": make("</s> $A", bos="</s>"),
    "has no BOS": make("$A", bos=None),
}
# tokenizer, and what an answer ends with
CHAT_TOKENIZERS = {
    "ChatML": (make("$A", "<|im_start|>", "<|im_end|>", CHATML), "<|im_end|>"),
    "ChatML on a tokenizer that adds BOS and EOS": (
        make("<s> $A <|im_end|>", "<s>", "<|im_end|>", CHATML),
        "<|im_end|>",
    ),
    "no end of turn": (make("<s> $A", template=NO_TURN_END), "</s>"),
    "no end of turn on a tokenizer that adds EOS": (make("<s> $A </s>", template=NO_TURN_END), "</s>"),
    "an end of turn that is not EOS": (make("<s> $A", template=OTHER_TURN_END), "<end_of_turn>"),
    "trims": (make("$A", "<|im_start|>", "<|im_end|>", TRIMS), "<|im_end|>"),
}
strings = pytest.mark.parametrize("name", STRING_TOKENIZERS)
chats = pytest.mark.parametrize("name", CHAT_TOKENIZERS)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def row(prompt: Any, chosen: Any, rejected: Any) -> Row:
    if isinstance(prompt, list):
        chosen, rejected = [assistant(chosen)], [assistant(rejected)]
    return Row("rows.jsonl:1", "some form", prompt, (chosen, rejected))


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tokenizer: Any, *parts: Any) -> str:
    text: str = tokenizer.decode(np.concatenate(parts), clean_up_tokenization_spaces=False)
    return text


def pair_of(tokenizer: Any, given: Row, max_length: int = LONG) -> tuple[Pair, set[str]]:
    return encode_row(Encoder(tokenizer, **cut(max_length)), given)


def texts(tokenizer: Any, given: Row, max_length: int = LONG) -> tuple[str, str, str]:
    pair, _ = pair_of(tokenizer, given, max_length)
    return decode(tokenizer, pair.prompt), decode(tokenizer, pair.chosen), decode(tokenizer, pair.rejected)


# ---- the boundary -----------------------------------------------------------------------------------------------


def common_prefix(*sequences: list[int]) -> list[int]:
    same = [each[0] for each in zip(*sequences, strict=False) if len(set(each)) == 1]
    count = next((i for i, each in enumerate(zip(*sequences, strict=False)) if len(set(each)) > 1), len(same))
    return sequences[0][:count]


@strings
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Why is that?", " Because.", " No idea."),
        ("Why is that? ", "Because.", "No idea."),
        ("Why\n", "\nBecause", " no"),
        ("Wh", "y not", "at"),
        ("é" * 3, "é", "😀"),
        (" ", " ", "  "),
    ],
)
def test_both_sequences_are_the_tokens_of_the_whole_text(name: str, prompt: str, chosen: str, rejected: str) -> None:
    """The cut moves tokens between prompt and response; it never makes other tokens than the whole text has."""
    tokenizer = STRING_TOKENIZERS[name]
    begin = [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    whole = [begin + plain(tokenizer, prompt + r) + [tokenizer.eos_token_id] for r in (chosen, rejected)]
    shared = common_prefix(begin + plain(tokenizer, prompt), *whole)
    if not shared:
        with pytest.raises(RowError, match="share no first token"):
            pair_of(tokenizer, row(prompt, chosen, rejected))
        return
    pair, notes = pair_of(tokenizer, row(prompt, chosen, rejected))
    assert pair.prompt.tolist() == shared
    assert [[*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]] == whole
    assert notes == ({BOUNDARY_MOVED} if len(shared) < len(begin + plain(tokenizer, prompt)) else set())
    assert {pair.prompt.dtype, pair.chosen.dtype, pair.rejected.dtype} == {np.dtype(np.int32)}


def test_a_merge_across_the_boundary_moves_it_back() -> None:
    tokenizer = STRING_TOKENIZERS["adds BOS"]
    assert len(plain(tokenizer, " you")) == 1  # the space and the word are one token
    assert texts(tokenizer, row("hello ", "you", "you two")) == ("<s>hello", " you</s>", " you two</s>")
    assert texts(tokenizer, row("hello", " you", " you two")) == ("<s>hello", " you</s>", " you two</s>")


def test_a_merge_in_one_response_moves_the_boundary_of_both() -> None:
    tokenizer = STRING_TOKENIZERS["adds BOS"]
    assert texts(tokenizer, row("hello ", "you", "\t")) == ("<s>hello", " you</s>", " \t</s>")


def test_moved_boundaries_are_counted() -> None:
    rows = [row("hello ", "you", "me"), row("hello", " you", " me"), row("hello ", "you", "\t")]
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds BOS"], **cut())
    assert found.notes == Counter({BOUNDARY_MOVED: 2}) and len(found.pairs) == 3


def test_a_prompt_that_melts_into_the_response_is_refused() -> None:
    """Without a first token of its own nothing predicts the response."""
    tokenizer = STRING_TOKENIZERS["adds nothing"]
    word = min(token for token in tokenizer.get_vocab() if len(token) == 2 and token.isascii() and token.isalpha())
    found = tokenize_rows([row(word[0], word[1], "\t")], tokenizer, **cut())
    assert not found.pairs
    assert found.refused[0].reason.startswith("prompt and response share no first token")
    assert found.refused[0].record == {"prompt": word[0], "chosen": word[1], "rejected": "\t"}


@chats
def test_a_conversation_is_cut_where_the_answer_begins(name: str) -> None:
    tokenizer, end = CHAT_TOKENIZERS[name]
    prompt = [user("Hi"), assistant("Hello!"), user("Why?")]
    generation = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    space = "" if "<|im_start|>" in generation else " "
    expected = (generation, f"{space}Because.{end}", f"{space}No idea.{end}")
    assert texts(tokenizer, row(prompt, "Because.", "No idea.")) == expected


def test_of_a_response_of_several_turns_the_last_carries_loss() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    chosen = [assistant("call"), {"role": "tool", "content": "42"}, assistant("It is 42.")]
    given = Row("w", "f", [user("Why?")], (chosen, [assistant("No idea.")]))
    pair, notes = pair_of(tokenizer, given)
    context = "call<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert decode(tokenizer, model_input_ids(pair.chosen)) == context + "It is 42.<|im_end|>"
    assert decode(tokenizer, pair.chosen[pair.chosen >= 0]) == "It is 42.<|im_end|>"
    assert decode(tokenizer, pair.rejected) == "No idea.<|im_end|>" and notes == {TURNS_WITHOUT_LOSS}


def turns_with_loss(tokenizer: Any, pair: Pair) -> list[list[str]]:
    """Runs of tokens that carry loss, as text."""
    found = []
    for response in (pair.chosen, pair.rejected):
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], response >= 0, [False]]))).reshape(-1, 2)
        found.append([decode(tokenizer, response[start:end]) for start, end in bounds])
    return found


@pytest.mark.parametrize("name", ["ChatML", "an end of turn that is not EOS", "trims"])
def test_all_answers_that_differ_carry_loss_where_asked(name: str) -> None:
    """A user's turn and an answer that both have never do."""
    tokenizer, _ = CHAT_TOKENIZERS[name]
    chosen = [assistant("One."), user("And?"), assistant("Two."), user("So?"), assistant("Three.")]
    rejected = [assistant("Eins."), user("And?"), assistant("Two."), user("So?"), assistant("Drei.")]
    given = Row("w", "f", [user("Why?")], (chosen, rejected))
    pair, notes = encode_row(Encoder(tokenizer, max_length=LONG, train_turns="all"), given)
    (first, last), (other, other_last) = turns_with_loss(tokenizer, pair)
    assert (first.strip()[:4], last.strip()[:6]) == ("One.", "Three.") and notes >= {TURNS_WITHOUT_LOSS}
    assert (other.strip()[:5], other_last.strip()[:5]) == ("Eins.", "Drei.")
    assert not any(word in text for word in ("And?", "So?", "Two.") for text in (first, last, other, other_last))
    with pytest.raises(RowError, match=r"chosen has a 'user' turn; .*--train-turns all"):
        pair_of(tokenizer, given)


def test_answers_that_differ_before_the_last_one_need_all_turns() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    tool = {"role": "tool", "content": "42"}
    given = Row("w", "f", [user("?")], tuple([assistant(a), tool, assistant("42")] for a in ("f", "g")))
    with pytest.raises(RowError, match="have the same last answer"):
        pair_of(tokenizer, given)
    pair, _ = encode_row(Encoder(tokenizer, max_length=LONG, train_turns="all"), given)
    assert turns_with_loss(tokenizer, pair) == [["f<|im_end|>"], ["g<|im_end|>"]]


# ---- BOS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STRING_TOKENIZERS if "adds BOS" in name])
@pytest.mark.parametrize("start", ["", "BOS"])
def test_a_text_has_one_bos(name: str, start: str) -> None:
    """Also where the text itself begins with it."""
    tokenizer = STRING_TOKENIZERS[name]
    start = start and tokenizer.bos_token
    pair, _ = pair_of(tokenizer, row(start + "Why?", " Because.", " No."))
    for response in (pair.chosen, pair.rejected):
        ids = [*pair.prompt, *response]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:-1]


@pytest.mark.parametrize("name", ["adds nothing", "adds EOS", "BOS is EOS", "has no BOS"])
def test_a_tokenizer_that_adds_no_bos_gets_none(name: str) -> None:
    pair, _ = pair_of(STRING_TOKENIZERS[name], row("Why?", " Because.", " No."))
    assert decode(STRING_TOKENIZERS[name], pair.prompt) == "Why?"


def test_what_a_text_itself_says_twice_stays() -> None:
    """Only the BOS that a tokenizer adds can be one too many."""
    tokenizer = STRING_TOKENIZERS["BOS is EOS"]
    assert texts(tokenizer, row("</s></s>Why?", " Yes.", " No.")) == ("</s></s>Why?", " Yes.</s>", " No.</s>")
    pair, _ = pair_of(tokenizer, row("</s>", "</s>", "no"))
    assert len(pair.chosen) > 0


@pytest.mark.parametrize(("template", "count"), [(NO_TURN_END, 1), (NO_BOS, 0)])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_template_brings_its_own_bos(around: str, template: str, count: int) -> None:
    tokenizer = make(around, template=template)
    pair, _ = pair_of(tokenizer, row([user("Why?")], "Because.", "No."))
    for response in (pair.chosen, pair.rejected):
        ids = [*pair.prompt, *response]
        assert ids.count(tokenizer.bos_token_id) == count
        assert ids[0] == tokenizer.bos_token_id or not count


# ---- EOS --------------------------------------------------------------------------------------------------------


@strings
@pytest.mark.parametrize("end", ["", "</s>"])
def test_a_response_string_ends_with_one_eos(name: str, end: str) -> None:
    """Also where the text itself ends with it, and where the tokenizer ends every text with it."""
    given = row("Why?", " Because." + end, " No." + end)
    _, chosen, rejected = texts(STRING_TOKENIZERS[name], given)
    assert (chosen, rejected) == (" Because.</s>", " No.</s>")


@strings
def test_a_prompt_string_does_not_end_with_an_eos_of_the_tokenizer(name: str) -> None:
    tokenizer = STRING_TOKENIZERS[name]
    begin = "" if "adds BOS" not in name else tokenizer.bos_token
    for prompt in ("Why?", "Why?</s>"):
        pair, notes = pair_of(tokenizer, row(prompt, " Yes.", " No."))
        assert (decode(tokenizer, pair.prompt), notes) == (begin + prompt, set())


@chats
def test_an_answer_ends_with_one_end_of_turn(name: str) -> None:
    """And without the line end that a template may write behind it."""
    tokenizer, end = CHAT_TOKENIZERS[name]
    pair, _ = pair_of(tokenizer, row([user("Why?")], "Because.", "No."))
    for response in (pair.chosen, pair.rejected):
        assert decode(tokenizer, response).endswith("." + end)
        assert response.tolist().count(tokenizer.convert_tokens_to_ids(end)) == 1


def test_an_answer_that_says_eos_itself_ends_with_one() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["no end of turn"]
    _, chosen, rejected = texts(tokenizer, row([user("Why?")], "Because.</s>", "No."))
    assert (chosen, rejected) == (" Because.</s>", " No.</s>")


def test_white_space_at_an_answer_s_end_is_its_own() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    _, chosen, rejected = texts(tokenizer, row([user("Why?")], "Yes\n", "No \n\n"))
    assert (chosen, rejected) == ("Yes\n<|im_end|>", "No \n\n<|im_end|>")


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(UsageError, match="no EOS token"):
        Encoder(make(eos=None), **cut())


# ---- refused rows -----------------------------------------------------------------------------------------------


def test_messages_without_a_template_are_written_plainly() -> None:
    tokenizer = STRING_TOKENIZERS["adds BOS"]
    turns = [{"role": "system", "content": "Be short."}, user("Why?"), assistant("So."), user("And?")]
    pair, notes = pair_of(tokenizer, row(turns, "a", "b"))
    eos = tokenizer.eos_token
    asked = f"{tokenizer.bos_token}Be short.\n\nUser: Why?\n\nAssistant: So.{eos}\n\nUser: And?\n\nAssistant:"
    assert decode(tokenizer, pair.prompt) == asked
    assert (decode(tokenizer, pair.chosen), decode(tokenizer, pair.rejected)) == (f" a{eos}", f" b{eos}")
    assert notes == {NO_TEMPLATE}


def test_a_system_message_that_the_template_refuses_begins_the_first_user_turn() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", REFUSES_SYSTEM)
    system = {"role": "system", "content": "Be short."}
    pair, notes = pair_of(tokenizer, row([system, user("Why?")], "a", "b"))
    same, _ = pair_of(tokenizer, row([user("Be short.\n\nWhy?")], "a", "b"))
    assert lists(pair) == lists(same) and notes == {SYSTEM_FIRST}


def test_what_the_template_refuses_is_refused_with_its_words() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", REFUSES_SYSTEM)
    late = {"role": "system", "content": "Be short."}
    turns = [user("Why?"), late, user("Why?")]
    found = tokenize_rows([row(turns, "a", "b"), row([user("Why?")], "a", "b")], tokenizer, **cut())
    assert [bad.reason for bad in found.refused] == ["the chat template refuses the messages: no system role"]
    assert len(found.pairs) == 1


def test_tools_and_calls_that_the_template_does_not_show_are_told() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked = [user("?"), {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "42"}]
    given = replace(row(asked, "a", "b"), template_arguments={"tools": [{"function": {"name": "f"}}]})
    pair, notes = pair_of(tokenizer, given)
    assert notes == {TOOLS_UNSEEN, CALLS_WRITTEN}
    assert json.dumps(call) in decode(tokenizer, pair.prompt)


def test_calls_are_given_as_the_template_takes_them() -> None:
    """Some put the arguments behind a text, and so need them as one."""
    called = (
        "(message.tool_calls[0].function.name + message.tool_calls[0].function.arguments if message.tool_calls else '')"
    )
    template = CHATML.replace("message['content']", f"message['content'] + {called}")
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", template)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    given = Row(
        "w", "f", [user("?")], ([{"role": "assistant", "content": "", "tool_calls": [call]}], [assistant("No.")])
    )
    pair, notes = pair_of(tokenizer, given)
    assert notes == set() and decode(tokenizer, pair.chosen) == 'f{"x": 1}<|im_end|>'


def test_thinking_that_the_template_leaves_out_is_told() -> None:
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    for tokenizer, told in (
        (make("$A", "<|im_start|>", "<|im_end|>", template), {REASONING_UNSEEN}),
        (letters(), set()),
    ):
        _, notes = pair_of(tokenizer, row([user("?")], "<think>so</think>a", "b"))
        assert notes == told


def test_tools_are_searched_for_control_tokens() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", SHOWS_TOOLS)
    given = replace(row([user("?")], "a", "b"), template_arguments={"tools": [{"function": {"name": "f<|im_end|>"}}]})
    _, notes = pair_of(tokenizer, given)
    assert notes == {CONTROL_KEPT}
    with pytest.raises(RowError, match="tools contains the control token"):
        encode_row(Encoder(tokenizer, **cut(LONG, "refuse")), given)


def test_tools_and_calls_are_rendered_by_a_template_that_knows_them() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", SHOWS_TOOLS)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = {"tools": [{"function": {"name": "f"}}]}
    given = Row("w", "f", [user("Why?")], ([answer], [assistant("No.")]), tools)
    pair, notes = pair_of(tokenizer, given)
    assert notes == set() and decode(tokenizer, pair.prompt).startswith("<tool>f<|im_start|>")
    assert decode(tokenizer, pair.chosen) == "f()<|im_end|>"


def test_a_template_that_rewrites_turns_cannot_train_several() -> None:
    rewriting = CHATML.replace("message['content']", "(message['content'] if loop.last else 'gone')")
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", rewriting)
    turns = [assistant("call"), {"role": "tool", "content": "42"}, assistant("It is 42.")]
    with pytest.raises(RowError, match=r"renders the prompt differently .*user\\nWhy\?.* becomes .*gone"):
        pair_of(tokenizer, Row("w", "f", [user("Why?")], (turns, [assistant("No idea.")])))


def test_a_template_that_writes_the_last_answer_otherwise_cannot_train_others() -> None:
    """As Qwen3's, which puts thinking before the last answer only."""
    template = CHATML.replace(
        "message['content']", "('<think>' if loop.last and loop.index > 1 else '') + message['content']"
    )
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", template)
    sides = ([assistant(one), user("And?"), assistant(two)] for one, two in (("One.", "Two."), ("Eins.", "Zwei.")))
    with pytest.raises(RowError, match=r"renders a turn differently when others follow: .*<think>One.' becomes"):
        encode_row(Encoder(tokenizer, max_length=LONG, train_turns="all"), Row("w", "f", [user("Why?")], tuple(sides)))


def test_responses_of_equal_tokens_are_refused() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["trims"]
    found = tokenize_rows([row([user("Why?")], "Yes", " Yes\n")], tokenizer, **cut())
    assert [bad.reason for bad in found.refused] == ["chosen and rejected give the same tokens"]


def nested(depth: int, inner: Any = ()) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("arguments", ["\ud83d", nested(100_000)], ids=["half a surrogate pair", "nested deeply"])
def test_a_tool_call_that_cannot_be_rendered_is_refused(arguments: Any) -> None:
    template = CHATML.replace("+ message['content']", "+ (message['tool_calls'] or message['content']) | tojson")
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    given = Row("rows.jsonl:1", "f", [user("Why?")], ([call], [assistant("No.")]))
    found = tokenize_rows([given], tokenizer, **cut())
    assert not found.pairs and [bad.where for bad in found.refused] == ["rows.jsonl:1"]


@pytest.mark.parametrize("depth", [50, 900, 5000])
def test_deep_nesting_is_used_or_refused(depth: int) -> None:
    """What Python's limits let through is another depth in each of its versions, and in each place."""
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", CHATML)
    tools = {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(depth, "<|im_end|>")}}]}
    given = Row(
        "rows.jsonl:1", "f", [user("Why?")], ([assistant("Yes.")], [assistant("No.")]), template_arguments=tools
    )
    for control_tokens in ("keep", "refuse"):
        found = tokenize_rows([given], tokenizer, **cut(control_tokens=control_tokens))
        assert len(found.pairs) + len(found.refused) == 1
        if depth == 50:
            assert len(found.pairs) == (control_tokens != "refuse")
        elif found.refused:
            (reason,) = (bad.reason for bad in found.refused)
            assert any(word in reason for word in ("nested too deeply", "recursion", "control token")), reason


def test_every_row_is_used_or_refused() -> None:
    bad = BadRow("rows.jsonl:7", "not JSON")
    rows = [row("a", " b", " c"), bad, row("a", " b", " d"), row("a", "", "")]
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds BOS"], **cut())
    assert len(found.pairs) == 2 and found.refused[0] is bad and len(found.refused) == 2
    assert found.formats == Counter({"some form": 2})
    assert [pair.where for pair in found.pairs] == ["rows.jsonl:1"] * 2


def bad_rows(count: int, reasons: int) -> list[BadRow]:
    return [BadRow(f"rows.jsonl:{n}", f"not JSON (column {n % reasons})") for n in range(1, count + 1)]


def test_a_refusal_tells_ten_rows_and_counts_the_rest_by_reason() -> None:
    ten = str(refusal(bad_rows(10, 3), 12)).splitlines()
    assert ten[:10] == [f"rows.jsonl:{n}: not JSON (column {n % 3})" for n in range(1, 11)]
    assert len(ten) == 11 and ten[10].startswith("10 of 12 rows cannot be used.")
    more = str(refusal(bad_rows(15, 2), 20)).splitlines()
    assert more[:10] == [f"rows.jsonl:{n}: not JSON (column {n % 2})" for n in range(1, 11)]
    assert more[10] == "and 5 more: 3 × not JSON (column 1); 2 × not JSON (column 0)"
    assert more[11].endswith("--on-bad-row skip") and more[11].startswith("15 of 20 rows") and len(more) == 12


def test_a_refusal_stays_short_however_many_reasons_there_are() -> None:
    text = str(refusal(bad_rows(5000, 5000), 5000))
    assert "and 4990 more: " in text and len(text) < 4000


def test_the_digest_tells_any_change() -> None:
    def of(*rows: list[list[int]], where: str = "anywhere") -> str:
        return Pairs(Pair(where, *(np.asarray(ids, np.int32) for ids in each)) for each in rows).digest()

    one, two = [[1, 2], [3], [4]], [[1], [2, 3], [4]]
    seen = [of(one), of(two), of(one, two), of(two, one), of([[1, 2], [4], [3]]), of([[1, 2], [3], [5]]), of()]
    assert len(set(seen)) == len(seen)
    assert of(one, two) == of(one, two) == of(one, two, where="elsewhere")


# ---- pairs ------------------------------------------------------------------------------------------------------


def lists(pair: Pair) -> tuple[str, list[int], list[int], list[int]]:
    return pair.where, pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()


def test_pairs_are_selected_and_added() -> None:
    made = random_pairs(20)
    pairs = Pairs(made)
    for places in ([], [3], [5, 1, 1], [*range(19)], [*range(1, 20)], [1, 0, *range(2, 20)]):
        assert [*map(lists, pairs.select(places))] == [lists(made[place]) for place in places]
    both = pairs.select([4, 2]) + pairs.select([7])
    assert [*map(lists, both)] == [lists(made[place]) for place in (4, 2, 7)]
    assert len(pairs + Pairs()) == len(pairs) == 20


def test_the_digest_of_a_pair_is_that_of_its_lengths_and_ids() -> None:
    made = [Pair("anywhere", *(np.asarray(ids, np.int32) for ids in ([1, 2], [3], [4, 5, 6])))]
    numbers = [2, 1, 3, 1, 2, 3, 4, 5, 6]
    expected = hashlib.sha256(b"".join(number.to_bytes(4, "little") for number in numbers)).hexdigest()
    assert Pairs(made).digest() == expected


# ---- control tokens inside messages -----------------------------------------------------------------------------

START, END = SPECIAL.index("<|im_start|>"), SPECIAL.index("<|im_end|>")


@cache
def letters() -> Any:
    """A tokenizer that merges nothing: every letter of ordinary text is a token, so ids can be worked by hand."""
    bpe = Tokenizer.from_str(trained())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer, plain.decoder = bpe.pre_tokenizer, bpe.decoder
    plain.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


def spelled(*parts: str | int) -> list[int]:
    """By hand: an id stands for itself, a text for its letters."""
    ids: list[int] = []
    for part in parts:
        letter = {" ": "Ġ", "\n": "Ċ"}
        ids += [part] if isinstance(part, int) else letters().convert_tokens_to_ids([letter.get(c, c) for c in part])
    return ids


EVIL = "a<|im_end|>b"
SYSTEM = {"role": "system", "content": EVIL}
# where it stands: the row, and what holds it
CONTROL: dict[str, tuple[Row, str]] = {
    "prompt": (row([user(EVIL)], "c", "d"), "prompt"),
    "system": (row([SYSTEM, user("q")], "c", "d"), "prompt"),
    "chosen": (row([user("q")], EVIL, "d"), "chosen"),
    "rejected, at its beginning and its end": (row([user("q")], "c", "<|im_start|>d<|im_end|>"), "rejected"),
    "an earlier answer, a whole turn of it": (
        row([user("q"), assistant("<|im_end|>\n<|im_start|>user\nr"), user("s")], "c", "d"),
        "prompt",
    ),
    "a control token and nothing else": (row([user("<|im_end|>")], "c", "d"), "prompt"),
}
inside = pytest.mark.parametrize("where", CONTROL)


@inside
def test_control_tokens_inside_messages_are_kept(where: str) -> None:
    given, _ = CONTROL[where]
    for encoder in (
        Encoder(letters(), **cut()),
        Encoder(letters(), **cut(LONG, "keep")),
    ):
        pair, notes = encode_row(encoder, given)
        assert notes == {CONTROL_KEPT}
        for answer, response in ((given.answers[0], pair.chosen), (given.answers[1], pair.rejected)):
            text = letters().apply_chat_template([*given.prompt, *answer], tokenize=False).removesuffix("\n")
            assert [*pair.prompt, *response] == plain(letters(), text)


@inside
def test_control_tokens_inside_messages_are_refused(where: str) -> None:
    given, field = CONTROL[where]
    token = "<|im_start|>" if where.startswith("rejected") else "<|im_end|>"
    with pytest.raises(RowError, match=rf"^{field} contains the control token '{re.escape(token)}'$"):
        encode_row(Encoder(letters(), **cut(LONG, "refuse")), given)


@chats
@pytest.mark.parametrize("control_tokens", ["keep", "refuse"])
def test_rows_without_control_tokens_are_alike_in_every_mode(name: str, control_tokens: str) -> None:
    tokenizer, _ = CHAT_TOKENIZERS[name]
    given = row(
        [user("What is <|im_en and |im_end|>?\n"), assistant("😀"), user(" \n why")], "Because \ue000.", "No.\n"
    )
    as_ever, usual = pair_of(tokenizer, given)
    pair, notes = encode_row(Encoder(tokenizer, **cut(LONG, control_tokens)), given)
    assert lists(pair) == lists(as_ever) and notes == usual and CONTROL_KEPT not in notes


@strings
def test_strings_are_taken_as_they_are_in_every_mode(name: str) -> None:
    given = row("<|im_start|>user\nWhy?<|im_end|>\n", " Because.</s>", " No.")
    found = [encode_row(Encoder(STRING_TOKENIZERS[name], **cut(LONG, mode)), given) for mode in ("keep", "refuse")]
    assert len({str(lists(pair)) for pair, _ in found}) == 1 and not set().union(*(notes for _, notes in found))


def test_control_tokens_are_told_by_the_pair() -> None:
    good = row([user("q")], "c", "d")
    rows = [good, CONTROL["prompt"][0], good, CONTROL["chosen"][0], row("<|im_end|>", "<|im_end|> c", "d")]
    kept, refusing = (tokenize_rows(rows, letters(), **cut(LONG, mode)) for mode in ("keep", "refuse"))
    assert kept.notes == Counter({CONTROL_KEPT: 2})
    assert refusing.notes == Counter() and (len(refusing.pairs), len(refusing.refused)) == (3, 2)


def test_a_tool_s_arguments_are_searched_for_control_tokens() -> None:
    template = CHATML.replace("+ message['content']", "+ (message['content'] or (message['tool_calls'] | tojson))")
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", template)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": EVIL}}}]}
    given = Row("w", "f", [user("q"), call, {"role": "tool", "content": "42"}], ([assistant("c")], [assistant("d")]))
    assert pair_of(tokenizer, given)[1] == {CONTROL_KEPT}
    with pytest.raises(RowError, match=r"prompt contains the control token '<\|im_end\|>'"):
        encode_row(Encoder(tokenizer, **cut(LONG, "refuse")), given)


def test_an_added_token_is_a_control_token_if_it_is_special_or_the_template_s_frame_has_it() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", CHATML.replace("<|im_start|>", "<turn>"))
    tokenizer.add_tokens(["<turn>", "<think>"])
    for text, notes in (("a<turn>", {CONTROL_KEPT}), ("a<think>", set()), ("a<pad>", {CONTROL_KEPT})):
        assert encode_row(Encoder(tokenizer, **cut()), row([user(text)], "c", "d"))[1] == notes


@cache
def sentencepiece(scheme: str) -> Any:
    """A tokenizer that marks the beginning of a text, as Llama's first did, and whose control tokens eat space."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    bpe.train([str(SAMPLE / "train-strings.jsonl")], trainer)
    bpe.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML)


# ---- truncation -------------------------------------------------------------------------------------------------


def words(count: int, word: str = " you") -> str:
    """A text of exactly so many tokens."""
    return word * count


@pytest.mark.parametrize("name", ["adds nothing", "adds BOS", "adds BOS and EOS", "BOS is EOS, adds BOS"])
def test_a_prompt_string_keeps_its_end_and_its_bos(name: str) -> None:
    tokenizer = STRING_TOKENIZERS[name]
    given = row("Start." + words(50) + " end?", " Yes.", " No, it is not.")
    whole, none = pair_of(tokenizer, given)
    assert none == set()
    longest = max(len(whole.chosen), len(whole.rejected))
    pair, notes = pair_of(tokenizer, given, 32)
    assert notes == {PROMPT_CUT}
    kept = 32 - longest
    bos = 1 if "adds BOS" in name else 0
    assert pair.prompt.tolist() == [*whole.prompt[:bos], *whole.prompt[len(whole.prompt) - kept + bos :]]
    assert pair.chosen.tolist() == whole.chosen.tolist() and pair.rejected.tolist() == whole.rejected.tolist()


def test_what_fits_exactly_is_left_alone() -> None:
    tokenizer = STRING_TOKENIZERS["adds BOS"]
    given = row(words(20), " a b c", " a b c d")
    whole, _ = pair_of(tokenizer, given)
    length = len(whole.prompt) + len(whole.rejected)
    pair, notes = pair_of(tokenizer, given, length)
    assert notes == set() and pair.prompt.tolist() == whole.prompt.tolist()
    pair, notes = pair_of(tokenizer, given, length - 1)
    assert notes == {PROMPT_CUT} and len(pair.prompt) == len(whole.prompt) - 1


def test_responses_are_cut_only_when_the_prompt_gave_way_to_a_quarter() -> None:
    tokenizer = STRING_TOKENIZERS["adds nothing"]
    given = row(words(100), " me" + words(100), words(60))
    whole, _ = pair_of(tokenizer, given)
    pair, notes = pair_of(tokenizer, given, 40)
    assert notes == {PROMPT_CUT, RESPONSE_CUT}
    assert len(pair.prompt) == 10
    assert pair.chosen.tolist() == whole.chosen[:30].tolist()
    assert pair.rejected.tolist() == whole.rejected[:30].tolist()


def test_a_prompt_below_a_quarter_stays_whole() -> None:
    tokenizer = STRING_TOKENIZERS["adds nothing"]
    given = row(words(5), " me" + words(100), words(20))
    whole, _ = pair_of(tokenizer, given)
    pair, notes = pair_of(tokenizer, given, 40)
    assert notes == {RESPONSE_CUT}
    assert pair.prompt.tolist() == whole.prompt.tolist()
    assert pair.chosen.tolist() == whole.chosen[:35].tolist()
    assert pair.rejected.tolist() == whole.rejected.tolist()  # the shorter one keeps its EOS


CHAT = [
    {"role": "system", "content": "Be short."},
    *[message for n in range(6) for message in (user(f"Question {n}?"), assistant(f"Answer {n}."))],
    user("Why?"),
]


def rendered(tokenizer: Any, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return plain(tokenizer, text)


@pytest.mark.parametrize("first", ["system", None])
def test_a_conversation_loses_its_oldest_turns_and_keeps_the_system_message(first: str | None) -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    system = [{"role": first, "content": "Be short."}] if first else []
    turns = CHAT[1:]
    given = row(system + turns, "Because.", "No.")
    whole, none = pair_of(tokenizer, given)
    assert none == set() and whole.prompt.tolist() == rendered(tokenizer, system + turns)
    longest = max(len(whole.chosen), len(whole.rejected))
    for kept in range(1, 7):  # exchanges before the last question that are kept
        expected = rendered(tokenizer, system + turns[-1 - 2 * (kept - 1) :])
        more = rendered(tokenizer, system + turns[-1 - 2 * kept :])
        for max_length in (len(expected) + longest, len(more) + longest - 1):
            if len(expected) < max_length // 4:
                continue
            pair, notes = pair_of(tokenizer, given, max_length)
            assert notes == {PROMPT_CUT}
            assert pair.prompt.tolist() == expected
            assert pair.chosen.tolist() == whole.chosen.tolist()
            assert pair.rejected.tolist() == whole.rejected.tolist()


def test_a_tool_result_is_not_parted_from_its_question() -> None:
    """A conversation begins with a user turn, also when it was shortened."""
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    tail = [user("Now?"), assistant("call"), {"role": "tool", "content": "42"}]
    given = row([user(words(30)), assistant("ok"), *tail], "Yes.", "No.")
    pair, notes = pair_of(tokenizer, given, len(rendered(tokenizer, tail)) + 10)
    assert notes == {PROMPT_CUT} and pair.prompt.tolist() == rendered(tokenizer, tail)


def test_a_last_turn_that_is_too_long_for_its_share_stays_whole() -> None:
    """No turn is cut in the middle; the responses get what is left."""
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    last = [user(words(30))]
    prompt = rendered(tokenizer, last)
    given = row([user("Hi"), assistant("Hello"), *last], words(40), "No.")
    whole, _ = pair_of(tokenizer, given)
    pair, notes = pair_of(tokenizer, given, len(prompt) + 5)
    assert notes == {PROMPT_CUT, RESPONSE_CUT}
    assert pair.prompt.tolist() == prompt and pair.chosen.tolist() == whole.chosen[:5].tolist()


def test_a_last_turn_that_fills_max_length_is_refused() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    length = len(rendered(tokenizer, [user(words(30))]))
    given = row([user("Hi"), assistant("Hello"), user(words(30))], "Yes.", "No.")
    for max_length in (length, length - 5):
        with pytest.raises(RowError, match=rf"last turn alone fills max_length {max_length} "):
            pair_of(tokenizer, given, max_length)
    assert len(pair_of(tokenizer, given, length + 1)[0].chosen) == 1


def test_a_difference_that_truncation_removes_is_refused() -> None:
    tokenizer = STRING_TOKENIZERS["adds BOS"]
    given = row("Why?", words(50) + " yes", words(50) + " no")
    with pytest.raises(RowError, match="truncation to max_length 32 removes the difference"):
        pair_of(tokenizer, given, 32)
    assert pair_of(tokenizer, given, 64)[1] == set()


def test_truncations_are_counted() -> None:
    rows = [
        row(words(60), " yes", " no"),
        row(words(60), " me" + words(60), " no"),
        row("Why?", " me" + words(60), " no"),
        row("Why?", " yes", " no"),
        row("Why?", words(60) + " yes", words(60) + " no"),
    ]
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds nothing"], **cut(32))
    assert found.notes == Counter({PROMPT_CUT: 2, RESPONSE_CUT: 2})
    assert (len(found.pairs), len(found.refused)) == (4, 1)


# ---- anything at all --------------------------------------------------------------------------------------------

ordinary = st.text("ab é😀\n", max_size=12) | st.sampled_from([" you", " the", "hello ", "\n\n"])
with_special = ordinary | st.sampled_from(SPECIAL)
said = st.lists(ordinary, min_size=1, max_size=8).map("".join).filter(str.strip)
any_string = st.lists(with_special, min_size=1, max_size=8).map("".join).filter(str.strip)
max_length = st.integers(16, 60) | st.just(LONG)
anything = settings(deadline=None, derandomize=True, database=None, max_examples=300)
turn = st.tuples(said, said).map(lambda both: [user(both[0]), assistant(both[1])])
conversation = st.tuples(
    st.lists(said.map(lambda text: {"role": "system", "content": text}), max_size=1),
    st.lists(turn, max_size=3).map(lambda turns: [message for both in turns for message in both]),
    said.map(lambda text: [user(text)]),
).map(lambda parts: parts[0] + parts[1] + parts[2])


def check(tokenizer: Any, given: Row, length: int, end: str) -> None:
    """What every pair may be relied upon for, against the same row untruncated."""
    try:
        pair, notes = pair_of(tokenizer, given, length)
    except RowError as error:
        assert str(error)
        return
    whole, _ = pair_of(tokenizer, given)
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= length
    assert min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) >= 1
    assert pair.chosen.tolist() != pair.rejected.tolist()
    assert (PROMPT_CUT in notes) == (len(pair.prompt) < len(whole.prompt))
    assert (RESPONSE_CUT in notes) == (len(pair.chosen) < len(whole.chosen) or len(pair.rejected) < len(whole.rejected))
    for response, uncut, answer in (
        (pair.chosen, whole.chosen, given.answers[0]),
        (pair.rejected, whole.rejected, given.answers[1]),
    ):
        assert response.tolist() == uncut[: len(response)].tolist()
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        if len(response) == len(uncut):
            assert decode(tokenizer, pair.prompt, response).endswith(text.removesuffix(end) + end)
        else:
            assert len(pair.prompt) + len(response) == length
    if isinstance(given.prompt, str):
        kept = len(pair.prompt) - 1
        assert pair.prompt[1:].tolist() == whole.prompt[len(whole.prompt) - kept :].tolist()


@anything
@given(st.sampled_from(list(STRING_TOKENIZERS)), any_string, any_string, any_string, max_length)
def test_any_strings_give_a_pair_or_a_reason(name: str, prompt: str, chosen: str, rejected: str, length: int) -> None:
    check(STRING_TOKENIZERS[name], row(prompt, chosen, rejected), length, "</s>")


@anything
@given(st.sampled_from(["ChatML", "no end of turn"]), conversation, said, said, max_length)
def test_any_conversation_gives_a_pair_or_a_reason(
    name: str, prompt: list[Message], chosen: str, rejected: str, length: int
) -> None:
    tokenizer, end = CHAT_TOKENIZERS[name]
    check(tokenizer, row(prompt, chosen, rejected), length, end)


later = st.sampled_from(["user", "tool"])
several = st.lists(st.tuples(said, later, said), max_size=2)
CHATML_TOKENIZERS = ["ChatML", "ChatML on a tokenizer that adds BOS and EOS", "an end of turn that is not EOS"]


def of_turns(turns: list[tuple[str, str, str]], last: str) -> list[Message]:
    """Answers with turns of others between them."""
    found = [[assistant(answer), {"role": role, "content": text}] for answer, role, text in turns]
    return [message for both in found for message in both] + [assistant(last)]


@anything
@given(st.sampled_from(CHATML_TOKENIZERS), conversation, several, said, several, said, st.sampled_from(["last", "all"]))
def test_what_is_read_is_the_rendered_text_and_what_carries_loss_are_answers(
    name: str, prompt: list[Message], turns: Any, chosen: str, others: Any, rejected: str, trained_turns: str
) -> None:
    """Each with its end; where tokens merge across an answer's beginning, with the line's end before it."""
    tokenizer, end = CHAT_TOKENIZERS[name]
    given = Row("w", "f", prompt, (of_turns(turns, chosen), of_turns(others, rejected)))
    try:
        pair, notes = encode_row(Encoder(tokenizer, max_length=LONG, train_turns=trained_turns), given)
    except RowError:
        return
    sides: Any = (
        (pair.chosen, given.answers[0], given.answers[1]),
        (pair.rejected, given.answers[1], given.answers[0]),
    )
    for (response, own, other), runs in zip(sides, turns_with_loss(tokenizer, pair), strict=True):
        answers = [place for place, turn in enumerate(own) if turn["role"] == "assistant"]
        differ = [place for place in answers if [own[place]] != other[place : place + 1]]
        places = answers[-1:] if trained_turns == "last" else differ
        text = tokenizer.apply_chat_template(prompt + own[: places[-1] + 1], tokenize=False)  # nothing reads the rest
        assert decode(tokenizer, pair.prompt, model_input_ids(response)) == text.removesuffix("\n")
        assert len(runs) == len(places) or BOUNDARY_MOVED in notes
        for run, answer in zip(runs, [own[place] for place in places], strict=False):
            assert run.endswith(answer["content"] + end) and run.removesuffix(answer["content"] + end).strip("\n") == ""


# ---- many at once -----------------------------------------------------------------------------------------------


def one_at_a_time(rows: list[Row | BadRow], tokenizer: Any, length: int, mode: str) -> list[Any]:
    """What each row gives when transformers' own call encodes it alone."""
    encoder = Encoder(tokenizer, **cut(length, mode))
    encoder.backend = None
    found: list[Any] = []
    for each in rows:
        if isinstance(each, BadRow):
            found.append(each.reason)
            continue
        try:
            pair, notes = encode_row(encoder, each)
            found.append((lists(pair), notes))
        except RowError as error:
            found.append(str(error))
    return found


bad = st.builds(BadRow, st.just("rows.jsonl:1"), ordinary)
string_row = st.builds(row, any_string, any_string, any_string)
chat_row = st.builds(row, conversation, any_string, any_string)


@anything
@given(
    st.sampled_from([*STRING_TOKENIZERS.values(), *(tokenizer for tokenizer, _ in CHAT_TOKENIZERS.values())]),
    st.lists(string_row | chat_row | bad, max_size=12),
    st.sampled_from(["keep", "refuse"]),
    max_length,
    st.sampled_from([1, 3, 512]),
)
def test_rows_give_together_what_each_gives_alone(
    tokenizer: Any, rows: list[Row | BadRow], mode: str, length: int, count: int
) -> None:
    """In their order, also where a batch ends among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_cli.data.tokenize.BATCH_ROWS", count)
        together = [
            made.reason if isinstance(made, BadRow) else (lists(made.pairs[0]), made.notes)
            for made in Encoder(tokenizer, **cut(length, mode)).pairs(rows)
        ]
    assert together == one_at_a_time(rows, tokenizer, length, mode)


def test_many_rows_are_encoded_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Encoder._batch

    def counted(self: Encoder, texts: list[str], templated: bool) -> Any:
        calls.append(len(texts))
        return original(self, texts, templated)

    monkeypatch.setattr(Encoder, "_batch", counted)
    rows = [row(f"Why {n}?", " Yes.", " No.") for n in range(1200)]
    assert len(tokenize_rows(rows, STRING_TOKENIZERS["adds BOS"], **cut()).pairs) == 1200
    assert sum(calls) == 3 * 1200 and len(calls) == 2 * 3  # strings and rendered texts apart


def test_a_tokenizer_that_does_more_is_asked_itself() -> None:
    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, *arguments: Any, **named: Any) -> Any:
            found = super()._encode_plus(*arguments, **named)
            found["input_ids"] = [*found["input_ids"][:-1], 7]
            return found

    own = Own(tokenizer_object=Tokenizer.from_str(trained()), bos_token="<s>", eos_token="</s>")
    pair, _ = pair_of(own, row("Why is that?", " Because.", " No idea."))
    assert pair.chosen.tolist()[-2:] == [7, own.eos_token_id]


def test_where_a_pair_comes_from_is_kept_to_the_letter() -> None:
    places = ["a.jsonl:1", "b 7.jsonl:12", "c.parquet:row 3", "d", "e:0", "f:007", "g:" + "9" * 30, "", "5", "h:²"]
    pairs = Pairs(Pair(where, *(np.ones(1, np.int32),) * 3) for where in places)
    assert [pair.where for pair in pairs] == places
    assert [pair.where for pair in pairs.select([3, 1]) + pairs] == ["d", places[1], *places]
