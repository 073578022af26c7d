"""Every format and every tokenizer family: what the model reads, written down by hand as tokens.

The tokenizers here have one token a word, so that an expectation is its words; what makes a family (BOS, EOS, special
tokens, template) is as in the family's own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_cli.data.pairs import Pair, model_input_ids
from dpo_cli.data.rows import Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model
from tests.helpers import write_rows
from tests.helpers.records import encode_row

WORDS = [
    *("Why", "How", "Hi", "Hello", "Because", "No", "Maybe", "One", "Two", "Be", "short", "You", "are", "a", "bot"),
    *("Sum", "it", "up", "text", "system", "user", "assistant", "model", "tool", "Human", "User", "Assistant"),
    *("get", "time", "12", ".", "?", "!", ":"),
]
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a bot<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# name: special tokens, BOS, EOS, whether a plain text gets a BOS, template
FAMILIES: dict[str, tuple[str, str | None, str, bool, str | None]] = {
    "llama 2": (
        "<s> </s> [INST] [/INST] <<SYS>> <</SYS>>",
        "<s>",
        "</s>",
        True,
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first and system else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "llama 3": (
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "mistral": (
        "<s> </s> [INST] [/INST]",
        "<s>",
        "</s>",
        True,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    ),
    "qwen": ("<|endoftext|> <|im_start|> <|im_end|>", None, "<|im_end|>", False, CHATML),
    "gemma": (
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        "<bos>",
        "<eos>",
        True,
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "phi": (
        "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        "<s>",
        "<|endoftext|>",
        False,
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ),
    "smollm": ("<|endoftext|> <|im_start|> <|im_end|>", "<|im_start|>", "<|im_end|>", False, CHATML),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", False, None),
}
SYSTEM = {"role": "system", "content": "Be short"}


@cache
def make(family: str) -> Any:
    """A tokenizer of the family: one token a word, a space, a line's end."""
    special, bos, eos, adds_bos, template = FAMILIES[family]
    vocabulary = {token: i for i, token in enumerate([*special.split(), "<unk>", " ", "\n", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\s|\w+|[^\w\s]"), "isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(token, special=True) for token in special.split()])
    if adds_bos:
        assert bos
        words.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos, chat_template=template)


def pair_of(family: str, record: Any, folder: Path, **reading: Any) -> Pair:
    file, format_ = write_rows(folder / "rows.jsonl", [record]), reading.pop("format", None)
    [row] = read_rows(find_sources([str(file)]), None, format_)
    assert isinstance(row, Row), row
    return encode_row(Encoder(make(family), **reading), row)[0]


def ids(family: str, text: str) -> list[int]:
    """Ids of tokens written one after the other, a space between two; ``_`` is a space, ``↵`` a line's end."""
    tokenizer = make(family)
    words = [{"_": " ", "↵": "\n"}.get(word, word) for word in text.split()]
    found: list[int] = tokenizer.convert_tokens_to_ids(words)
    assert tokenizer.unk_token_id not in found and None not in found, text
    return found


def check(family: str, record: Any, folder: Path, prompt: str, chosen: str, rejected: str, **reading: Any) -> None:
    pair = pair_of(family, record, folder, **reading)
    assert model_input_ids(pair.prompt).tolist() == ids(family, prompt)
    assert pair.chosen.tolist() == ids(family, chosen)
    assert pair.rejected.tolist() == ids(family, rejected)


# ---- families ---------------------------------------------------------------------------------------------------

DIALOGUE = {
    "prompt": [
        SYSTEM,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello !"},
        {"role": "user", "content": "Why ?"},
    ],
    "chosen": [{"role": "assistant", "content": "Because ."}],
    "rejected": [{"role": "assistant", "content": "No"}],
}
GOLDEN = {
    "llama 2": (
        "<s> [INST] _ <<SYS>> ↵ Be _ short ↵ <</SYS>> ↵ ↵ Hi _ [/INST] _ Hello _ ! _ </s> "
        "<s> [INST] _ Why _ ? _ [/INST]",
        "_ Because _ . _ </s>",
        "_ No _ </s>",
    ),
    "llama 3": (
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ↵ ↵ Be _ short <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ↵ ↵ Hi <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ↵ ↵ Hello _ ! <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ↵ ↵ Why _ ? <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ↵ ↵",
        "Because _ . <|eot_id|>",
        "No <|eot_id|>",
    ),
    "mistral": (  # its template takes no system message
        "<s> [INST] _ Be _ short ↵ ↵ Hi [/INST] _ Hello _ ! </s> [INST] _ Why _ ? [/INST]",
        "_ Because _ . </s>",
        "_ No </s>",
    ),
    "qwen": (
        "<|im_start|> system ↵ Be _ short <|im_end|> ↵ <|im_start|> user ↵ Hi <|im_end|> ↵ "
        "<|im_start|> assistant ↵ Hello _ ! <|im_end|> ↵ <|im_start|> user ↵ Why _ ? <|im_end|> ↵ "
        "<|im_start|> assistant ↵",
        "Because _ . <|im_end|>",
        "No <|im_end|>",
    ),
    "gemma": (  # nor does this
        "<bos> <start_of_turn> user ↵ Be _ short ↵ ↵ Hi <end_of_turn> ↵ "
        "<start_of_turn> model ↵ Hello _ ! <end_of_turn> ↵ "
        "<start_of_turn> user ↵ Why _ ? <end_of_turn> ↵ <start_of_turn> model ↵",
        "Because _ . <end_of_turn>",
        "No <end_of_turn>",
    ),
    "phi": (  # an answer ends with <|end|>; the EOS that the template puts behind a conversation is none of its own
        "<|system|> ↵ Be _ short <|end|> ↵ <|user|> ↵ Hi <|end|> ↵ <|assistant|> ↵ Hello _ ! <|end|> ↵ "
        "<|user|> ↵ Why _ ? <|end|> ↵ <|assistant|> ↵",
        "Because _ . <|end|>",
        "No <|end|>",
    ),
    "smollm": (
        "<|im_start|> system ↵ Be _ short <|im_end|> ↵ <|im_start|> user ↵ Hi <|im_end|> ↵ "
        "<|im_start|> assistant ↵ Hello _ ! <|im_end|> ↵ <|im_start|> user ↵ Why _ ? <|im_end|> ↵ "
        "<|im_start|> assistant ↵",
        "Because _ . <|im_end|>",
        "No <|im_end|>",
    ),
    "gpt2": (  # no template: written plainly
        "Be _ short ↵ ↵ User : _ Hi ↵ ↵ Assistant : _ Hello _ ! <|endoftext|> ↵ ↵ User : _ Why _ ? ↵ ↵ Assistant :",
        "_ Because _ . <|endoftext|>",
        "_ No <|endoftext|>",
    ),
}


@pytest.mark.parametrize("family", GOLDEN)
def test_a_dialogue_of_messages(family: str, tmp_path: Path) -> None:
    check(family, DIALOGUE, tmp_path, *GOLDEN[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_strings_get_what_the_tokenizer_adds_and_one_eos(family: str, tmp_path: Path) -> None:
    _, bos, eos, adds_bos, _ = FAMILIES[family]
    record = {"prompt": "Why ?", "chosen": " Because .", "rejected": " No"}
    start = f"{bos} " if adds_bos else ""
    check(family, record, tmp_path, f"{start}Why _ ?", f"_ Because _ . {eos}", f"_ No {eos}", format="strings")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bos_or_eos_that_the_text_brings_is_not_doubled(family: str, tmp_path: Path) -> None:
    _, bos, eos, adds_bos, _ = FAMILIES[family]
    start = bos if adds_bos else ""
    record = {"prompt": f"{start}Why ?", "chosen": f" Because .{eos}", "rejected": f" No{eos}"}
    check(family, record, tmp_path, f"{start} Why _ ?", f"_ Because _ . {eos}", f"_ No {eos}", format="strings")


# ---- formats ----------------------------------------------------------------------------------------------------

ASKED = (
    "<|im_start|> system ↵ You _ are _ a _ bot <|im_end|> ↵ <|im_start|> user ↵ Why _ ? <|im_end|> ↵ "
    "<|im_start|> assistant ↵"
)
SHORT = ASKED.replace("You _ are _ a _ bot", "Be _ short")
SAID = ("Because _ . <|im_end|>", "No <|im_end|>")
GOOD, BAD = {"role": "assistant", "content": "Because ."}, {"role": "assistant", "content": "No"}
WHY = {"role": "user", "content": "Why ?"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello !\n\nHuman: Why ?\n\nAssistant:"
# name: record, prompt, chosen, rejected
FORMATS: dict[str, tuple[Any, str, str, str]] = {
    "strings": ({"prompt": "Why ?", "chosen": " Because .", "rejected": " No"}, ASKED, *SAID),
    "strings with a system message": (
        {"system": "Be short", "prompt": "Why ?", "chosen": "Because .", "rejected": "No"},
        SHORT,
        *SAID,
    ),
    "messages": ({"prompt": [WHY], "chosen": [GOOD], "rejected": [BAD]}, ASKED, *SAID),
    "messages and strings": ({"prompt": [SYSTEM, WHY], "chosen": "Because .", "rejected": "No"}, SHORT, *SAID),
    "conversations": ({"chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, ASKED, *SAID),
    "dialogues as strings": (
        {"chosen": HH + " Because .", "rejected": HH + " No"},
        "↵ ↵ Human : _ Hi ↵ ↵ Assistant : _ Hello _ ! ↵ ↵ Human : _ Why _ ? ↵ ↵ Assistant :",
        "_ Because _ . <|im_end|>",
        "_ No <|im_end|>",
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "Be short"}, {"from": "human", "value": "Why ?"}],
            "chosen": {"from": "gpt", "value": "Because ."},
            "rejected": {"from": "gpt", "value": "No"},
        },
        SHORT,
        *SAID,
    ),
    "Alpaca": (
        {"instruction": "Sum it up :", "input": "text", "output": "x", "chosen": "Because .", "rejected": "No"},
        ASKED.replace("Why _ ?", "Sum _ it _ up _ : ↵ text"),
        *SAID,
    ),
    "Alpaca without input": (
        {"instruction": "Why ?", "input": "", "chosen": "Because .", "rejected": "No"},
        ASKED,
        *SAID,
    ),
    "Orca": ({"system": "Be short", "question": "Why ?", "chosen": "Because .", "rejected": "No"}, SHORT, *SAID),
    "Orca without system": ({"system": "", "question": "Why ?", "chosen": "Because .", "rejected": "No"}, ASKED, *SAID),
    "UltraFeedback": ({"prompt": "Why ?", "chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, ASKED, *SAID),
    "UltraFeedback, answers alone": ({"prompt": "Why ?", "chosen": [GOOD], "rejected": [BAD]}, ASKED, *SAID),
    "Stack Exchange": ({"question": "Why ?", "response_j": "Because .", "response_k": "No"}, ASKED, *SAID),
    "ranked by scores": (
        {"prompt": "Why ?", "responses": [" Maybe", " Because .", " No"], "scores": [2, 3.5, -1]},
        ASKED,
        *SAID,
    ),
    "ranked by ranks": (
        {"question": "Why ?", "responses": ["No", "Maybe", "Because ."], "ranks": [3, 2, 1]},
        ASKED,
        *SAID,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format(name: str, tmp_path: Path) -> None:
    record, *expected = FORMATS[name]
    check("smollm", record, tmp_path, *expected)


def test_of_several_turns_the_last_answer_carries_loss(tmp_path: Path) -> None:
    """The call and the tool's answer stand there as ``~id``."""
    call, tool = {"role": "assistant", "content": "get time"}, {"role": "tool", "content": "12"}
    record = {"prompt": [WHY], "chosen": [call, tool, GOOD], "rejected": [BAD]}
    pair = pair_of("smollm", record, tmp_path)
    context = ids("smollm", "get _ time <|im_end|> ↵ <|im_start|> tool ↵ 12 <|im_end|> ↵ <|im_start|> assistant ↵")
    assert pair.chosen.tolist() == [*(~each for each in context), *ids("smollm", SAID[0])]
    assert pair.prompt.tolist() == ids("smollm", ASKED) and pair.rejected.tolist() == ids("smollm", SAID[1])


def test_all_answers_that_differ_carry_loss(tmp_path: Path) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": "user" if i % 2 else "assistant", "content": text} for i, text in enumerate(texts)]

    record = {"prompt": [WHY], "chosen": said("One", "How ?", "Two"), "rejected": said("No", "How ?", "Maybe")}
    pair = pair_of("smollm", record, tmp_path, train_turns="all")
    between = [~i for i in ids("smollm", "↵ <|im_start|> user ↵ How _ ? <|im_end|> ↵ <|im_start|> assistant ↵")]
    for response, first, last in ((pair.chosen, "One", "Two"), (pair.rejected, "No", "Maybe")):
        expected = [*ids("smollm", f"{first} <|im_end|>"), *between, *ids("smollm", f"{last} <|im_end|>")]
        assert response.tolist() == expected


def test_the_real_tokenizer(tmp_path: Path) -> None:
    """SmolLM2's own: ids looked up in its vocabulary by hand."""
    record = {"prompt": [SYSTEM, WHY | {"content": "Why?"}], "chosen": "Because.", "rejected": "No."}
    [row] = read_rows(find_sources([str(write_rows(tmp_path / "rows.jsonl", [record]))]))
    assert isinstance(row, Row)
    pair, notes = encode_row(Encoder(load_tokenizer(find_model(None))), row)
    system = [1, 9690, 198, 6077, 1890, 2, 198]  # <|im_start|> system ↵ Be Ġshort <|im_end|> ↵
    user = [1, 4093, 198, 4898, 47, 2, 198]  # <|im_start|> user ↵ Why ? <|im_end|> ↵
    assert pair.prompt.tolist() == [*system, *user, 1, 520, 9531, 198]  # <|im_start|> ass istant ↵
    assert (pair.chosen.tolist(), pair.rejected.tolist()) == ([8653, 30, 2], [5230, 30, 2])
    assert notes == set()


def test_words_of_the_expectations_are_one_token_each() -> None:
    """Else an expectation could not be read."""
    for family in FAMILIES:
        tokenizer = make(family)
        for word in WORDS:
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
