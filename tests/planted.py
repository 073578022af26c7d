"""Defects of every kind planted in clean rows, at places that are known."""

from __future__ import annotations

import copy
import itertools
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.quality.checks import NEGATIONS

Record = dict[str, Any]

ACCENTED = ["café", "naïve", "Zürich", "señor", "crème brûlée", "it’s", "“quoted”", "£5", "20 °C", "façade", "Škoda"]
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>",
]  # fmt: skip
NEXT_TURNS = [
    "\n\nHuman: Thanks, and what about the garden?\n\nAssistant: Water it.",
    "\n\nHuman: thanks",
    "\n\nAssistant: Also:",
    "\nUser: What else could I do?\nAssistant: Nothing.",
    "\nUser: ok\nAssistant: Good luck!",
    "\n### Instruction:\nWrite a poem.",
    "\n\n### Human: And then?",
    "\nHUMAN: Is that all there is?\n\nASSISTANT: It is.",
    "\n\nUser: why\nAI: Because.",
]
REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with that request.",
    "I cannot help you with this.",
    "Sorry, but I'm not able to provide that information.",
    "As an AI language model, I cannot answer that question.",
    "I am sorry, but I cannot comply with your request.",
    "I'm unable to assist with that.",
    "I apologize, but I can't provide help with this.",
    "Unfortunately, I won't be able to help with that.",
    "I must decline to answer that.",
    "Sorry, I can't do that.",
    "I don't feel comfortable answering that question.",
]
OTHER_SCRIPTS = [
    "Сначала закройте кран, потом снимите прокладку и посмотрите, не треснула ли она.",
    "先把水龙头关上，然后取下垫圈，看看有没有裂纹。",
    "まず水道の元栓を閉めて、それからパッキンを外して確認してください。",
    "먼저 수도꼭지를 잠그고 패킹을 빼서 금이 갔는지 확인하세요.",
    "أغلق الصنبور أولا ثم انزع الحلقة وتأكد من أنها سليمة.",
    "Κλείστε πρώτα τη βρύση και μετά βγάλτε τη φλάντζα για να δείτε αν έχει σπάσει.",
    "תסגרו קודם את הברז ואחר כך תוציאו את האטם ותבדקו אם הוא סדוק.",
    "पहले नल बंद करें, फिर वॉशर निकालकर देखें कि वह टूटा तो नहीं है।",
    "ก่อนอื่นปิดก๊อกน้ำแล้วถอดแหวนยางออกมาดูว่าแตกหรือไม่",
]


@dataclass
class Planted:
    """Rows, held-out rows, and where each kind of defect stands in the rows, counted from 0."""

    rows: list[Record]
    held_out: list[Record] = field(default_factory=list)
    at: dict[str, set[int]] = field(default_factory=dict)


def get(record: Record, name: str) -> str:
    value = record[name]
    return value if isinstance(value, str) else value[-1]["content"]


def put(record: Record, name: str, text: str) -> None:
    if isinstance(record[name], str):
        record[name] = text
    else:
        record[name][-1]["content"] = text


def response(rng: random.Random) -> str:
    return rng.choice(["chosen", "rejected"])


# ---- one row ----------------------------------------------------------------------------------------------------


def encoding(record: Record, rng: random.Random) -> None:
    name = rng.choice(["prompt", "chosen", "rejected"])
    text = get(record, name)
    how = rng.randrange(4)
    if how == 0:
        word = rng.choice(ACCENTED).encode().decode(rng.choice(["cp1252", "latin-1"]), "replace").replace("\n", " ")
    else:
        word = ["caf\ufffd", "it\x92s", "colour\x1b[0m"][how - 1]
    words = text.split(" ")
    words.insert(rng.randrange(1, len(words)), word)
    put(record, name, " ".join(words))


def markers(record: Record, rng: random.Random) -> None:
    name = response(rng)
    words = get(record, name).split(" ")
    words.insert(rng.randrange(1, len(words)), rng.choice(MARKERS))
    put(record, name, " ".join(words))


def next_turn(record: Record, rng: random.Random) -> None:
    name = response(rng)
    put(record, name, get(record, name) + rng.choice(NEXT_TURNS))


def near_identical(record: Record, rng: random.Random) -> None:
    text = re.sub(r"[^\w\s.,:!?'’]|_", "", get(record, "chosen"))  # in code and maths each sign may mean something
    put(record, "chosen", text)
    edits: list[Callable[[], str]] = [
        lambda: text.replace(". ", "!  ").replace(", ", " "),
        lambda: text.rstrip(".") + "...",
        lambda: text.replace(" ", "  "),
        lambda: " " + text + " ",
        lambda: text.replace("\n", "  \n"),
    ]
    while get(record, "chosen") == (edited := rng.choice(edits)()):
        pass
    put(record, "rejected", edited)


def few_edits(record: Record, rng: random.Random) -> None:
    text = get(record, "chosen")
    while len(text) < 150:  # in a short one every letter may mean something
        text += " " + "".join(rng.choices(string.ascii_lowercase, k=7))
    put(record, "chosen", text)
    at = rng.randrange(10, len(text) - 10)
    letter = next(i for i in range(at, len(text)) if text[i].isalpha() and text[i - 1].isalpha())
    edits: list[Callable[[], str]] = [
        text.upper,
        text.lower,
        lambda: text[:letter] + text[letter + 1 :],
        lambda: text[:letter] + text[letter] + text[letter:],
    ]
    while get(record, "chosen") == (edited := rng.choice(edits)()):
        pass
    put(record, "rejected", edited)


def refusal_chosen(record: Record, rng: random.Random) -> None:
    put(record, "chosen", rng.choice(REFUSALS))


def refusal_rejected(record: Record, rng: random.Random) -> None:
    put(record, "rejected", rng.choice(REFUSALS))


def empty_response(record: Record, rng: random.Random) -> None:
    put(record, response(rng), rng.choice(["...", " - ", "?", "👍", "\n---\n"]))


def thinking(record: Record, rng: random.Random) -> None:
    name = response(rng)
    put(record, name, f"<think>\nThe user asks something.\n</think>\n\n{get(record, name)}")


def script(record: Record, rng: random.Random) -> None:
    put(record, response(rng), rng.choice(OTHER_SCRIPTS))


def refused(record: Record, rng: random.Random) -> None:
    how = rng.randrange(3)
    if how == 0:
        del record["rejected"]
    elif how == 1:
        record["chosen"] = copy.deepcopy(record["rejected"])
    else:
        put(record, "chosen", "  ")


IN_ONE_ROW = {
    "encoding": encoding,
    "markers": markers,
    "next_turn": next_turn,
    "near_identical": near_identical,
    "few_edits": few_edits,
    "refusal_chosen": refusal_chosen,
    "refusal_rejected": refusal_rejected,
    "empty_response": empty_response,
    "thinking": thinking,
    "script": script,
    "refused": refused,
}

# ---- between rows -----------------------------------------------------------------------------------------------


def retyped(record: Record, rng: random.Random) -> Record:
    """The same but for case and spaces."""
    other = copy.deepcopy(record)
    for name in ("prompt", "chosen", "rejected"):
        text = get(other, name)
        how = rng.randrange(4)
        put(
            other,
            name,
            text if how == 0 else text.replace(" ", "  ") if how == 1 else text.lower() if how == 2 else text,
        )
    return other


def reworded(record: Record, rng: random.Random) -> Record:
    """The same but for a word in each response and one more in the prompt."""
    other = copy.deepcopy(record)
    for name in ("chosen", "rejected"):
        words = get(other, name).split(" ")
        says = re.compile(rf"\d|{NEGATIONS.pattern}")  # a number or a negation: no other word says the same
        plain = [i for i, word in enumerate(words) if not says.search(word.lower())]
        words[rng.choice(plain)] = rng.choice(["maybe", "quite", "simply", "also"])
        put(other, name, " ".join(words))
    words = get(other, "prompt").split(" ")
    words.insert(rng.randrange(1, len(words)), rng.choice(["please", "really", "just"]))
    put(other, "prompt", " ".join(words))
    return other


def swapped(record: Record) -> Record:
    other = copy.deepcopy(record)
    other["chosen"], other["rejected"] = other["rejected"], other["chosen"]
    return other


def circle(record: Record, rng: random.Random) -> list[Record]:
    """Rows that close a cycle of three or four with the given one."""
    first, last = record["chosen"], record["rejected"]
    steps = [last]
    for number in range(rng.randrange(1, 3)):
        other = copy.deepcopy(record)
        put(other, "chosen", f"{get(other, 'rejected')} Or so, number {number}.")
        steps.append(other["chosen"])
    steps.append(first)
    ends = itertools.pairwise(steps)
    return [copy.deepcopy({**record, "chosen": better, "rejected": worse}) for better, worse in ends]


def plant(clean: list[Record], seed: int, each: int, leak: bool = False) -> Planted:
    """A copy of the rows with ``each`` defects of every kind; no row has two of them."""
    rng = random.Random(seed)
    rows = copy.deepcopy(clean)
    prompts: dict[str, int] = {}
    for record in rows:  # rows that share a prompt are left alone: a defect in one might be one in the other
        prompts[get(record, "prompt")] = prompts.get(get(record, "prompt"), 0) + 1
    free = [i for i, record in enumerate(rows) if prompts[get(record, "prompt")] == 1]
    rng.shuffle(free)
    planted = Planted(rows)
    if leak:
        _leak(planted, free, rng, each)
        return planted
    for kind, spoil in IN_ONE_ROW.items():
        planted.at[kind] = {free.pop() for _ in range(each)}
        for place in planted.at[kind]:
            spoil(rows[place], rng)
    for kind, make in (("duplicate", retyped), ("near_duplicate", reworded)):
        planted.at[kind] = set()
        for _ in range(each):
            planted.at[kind].add(len(rows))
            rows.append(make(rows[free.pop()], rng))
    for kind in ("contradiction", "cycle"):
        planted.at[kind] = set()
        for _ in range(each):
            place = free.pop()
            more = [swapped(rows[place])] if kind == "contradiction" else circle(rows[place], rng)
            planted.at[kind] |= {place, *range(len(rows), len(rows) + len(more))}
            rows += more
    return planted


def _leak(planted: Planted, free: list[int], rng: random.Random, each: int) -> None:
    rows, held_out = planted.rows, planted.held_out
    planted.at = {kind: {free.pop() for _ in range(each)} for kind in ("leak_row", "leak_prompt", "leak_near")}
    held_out += [retyped(rows[place], rng) for place in planted.at["leak_row"]]
    held_out += [reworded(rows[place], rng) for place in planted.at["leak_near"]]
    for place in planted.at["leak_prompt"]:
        other = copy.deepcopy(rows[place])
        put(other, "chosen", "Something else entirely, as short as that. Next step: look it up.")
        held_out.append(other)
    rng.shuffle(held_out)
