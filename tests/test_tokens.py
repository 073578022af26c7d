"""Rows to token ids: where the prompt ends, how a response ends, and what gives way when both are too long."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_cli.data import BadRow, Message, Row, RowError
from dpo_cli.errors import UsageError
from dpo_cli.tokens import BOUNDARY_MOVED, PROMPT_CUT, RESPONSE_CUT, Encoder, Pair, digest, refusal, tokenize_rows
from tests.conftest import CHATML, SAMPLE

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"]
LONG = 100_000  # a max_length that truncates nothing

# Templates by what they write after an answer.
NO_TURN_END = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OTHER_TURN_END = CHATML.replace("<|im_end|>", "<end_of_turn>")
TRIMS = CHATML.replace("message['content']", "(message['content'] | trim)")
NO_BOS = NO_TURN_END.replace("{{ bos_token }}", "")
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


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
    return Row("rows.jsonl:1", "some form", prompt, chosen, rejected)


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tokenizer: Any, *parts: Any) -> str:
    text: str = tokenizer.decode(np.concatenate(parts), clean_up_tokenization_spaces=False)
    return text


def pair_of(tokenizer: Any, given: Row, max_length: int = LONG) -> tuple[Pair, set[str]]:
    return Encoder(tokenizer, max_length).pair(given)


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
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds BOS"], LONG)
    assert found.notes == Counter({BOUNDARY_MOVED: 2}) and len(found.pairs) == 3


def test_a_prompt_that_melts_into_the_response_is_refused() -> None:
    """Without a first token of its own nothing predicts the response."""
    tokenizer = STRING_TOKENIZERS["adds nothing"]
    word = min(token for token in tokenizer.get_vocab() if len(token) == 2 and token.isascii() and token.isalpha())
    found = tokenize_rows([row(word[0], word[1], "\t")], tokenizer, LONG)
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


def test_a_response_of_several_turns_is_rendered_whole() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["ChatML"]
    chosen = [assistant("call"), {"role": "tool", "content": "42"}, assistant("It is 42.")]
    given = Row("w", "f", [user("Why?")], chosen, [assistant("No idea.")])
    assert texts(tokenizer, given)[1] == (
        "call<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>"
    )


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
        Encoder(make(eos=None), LONG)


# ---- refused rows -----------------------------------------------------------------------------------------------


def test_messages_without_a_template_are_refused() -> None:
    found = tokenize_rows([row([user("Why?")], "a", "b")], STRING_TOKENIZERS["adds BOS"], LONG)
    assert found.refused[0].reason.startswith("a row of messages needs a chat template")


def test_what_the_template_refuses_is_refused_with_its_words() -> None:
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", REFUSES_SYSTEM)
    system = {"role": "system", "content": "Be short."}
    found = tokenize_rows([row([system, user("Why?")], "a", "b"), row([user("Why?")], "a", "b")], tokenizer, LONG)
    assert [bad.reason for bad in found.refused] == ["the chat template refuses the messages: no system role"]
    assert len(found.pairs) == 1


def test_responses_of_equal_tokens_are_refused() -> None:
    tokenizer, _ = CHAT_TOKENIZERS["trims"]
    found = tokenize_rows([row([user("Why?")], "Yes", " Yes\n")], tokenizer, LONG)
    assert [bad.reason for bad in found.refused] == ["chosen and rejected give the same tokens"]


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("arguments", ["\ud83d", nested(900)], ids=["half a surrogate pair", "nested deeply"])
def test_a_tool_call_that_cannot_be_rendered_is_refused(arguments: Any) -> None:
    template = CHATML.replace("+ message['content']", "+ (message['tool_calls'] or message['content']) | tojson")
    tokenizer = make("$A", "<|im_start|>", "<|im_end|>", template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    given = Row("rows.jsonl:1", "f", [user("Why?")], [call], [assistant("No.")])
    found = tokenize_rows([given], tokenizer, LONG)
    assert not found.pairs and [bad.where for bad in found.refused] == ["rows.jsonl:1"]


def test_every_row_is_used_or_refused() -> None:
    bad = BadRow("rows.jsonl:7", "not JSON")
    rows = [row("a", " b", " c"), bad, row("a", " b", " d"), row([user("a")], "b", "c")]
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds BOS"], LONG)
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
        return digest(Pair(where, *(np.asarray(ids, np.int32) for ids in each)) for each in rows)

    one, two = [[1, 2], [3], [4]], [[1], [2, 3], [4]]
    seen = [of(one), of(two), of(one, two), of(two, one), of([[1, 2], [4], [3]]), of([[1, 2], [3], [5]]), of()]
    assert len(set(seen)) == len(seen)
    assert of(one, two) == of(one, two) == of(one, two, where="elsewhere")


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


@pytest.mark.parametrize("first", ["system", "developer", None])
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
        with pytest.raises(RowError, match=rf"last turn alone fills max_length \({length} of {max_length} tokens\)"):
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
    found = tokenize_rows(rows, STRING_TOKENIZERS["adds nothing"], 32)
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
        (pair.chosen, whole.chosen, given.chosen),
        (pair.rejected, whole.rejected, given.rejected),
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
