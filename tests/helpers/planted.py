"""Defects of every kind planted in clean rows, at places that are known."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

ACCENTED = ["café", "naïve", "Zürich", "señor", "crème brûlée", "it’s", "“quoted”", "£5", "20 °C", "façade", "Škoda"]
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>",
]  # fmt: skip


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


def empty_response(record: Record, rng: random.Random) -> None:
    put(record, response(rng), rng.choice(["...", " - ", "?", "👍", "\n---\n"]))


def thinking(record: Record, rng: random.Random) -> None:
    name = response(rng)
    put(record, name, f"<think>\nThe user asks something.\n</think>\n\n{get(record, name)}")


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
    "empty_response": empty_response,
    "thinking": thinking,
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


def swapped(record: Record) -> Record:
    other = copy.deepcopy(record)
    other["chosen"], other["rejected"] = other["rejected"], other["chosen"]
    return other


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
    planted.at["duplicate"] = set()
    for _ in range(each):
        planted.at["duplicate"].add(len(rows))
        rows.append(retyped(rows[free.pop()], rng))
    planted.at["contradiction"] = set()
    for _ in range(each):
        place = free.pop()
        planted.at["contradiction"] |= {place, len(rows)}
        rows.append(swapped(rows[place]))
    return planted


def _leak(planted: Planted, free: list[int], rng: random.Random, each: int) -> None:
    rows, held_out = planted.rows, planted.held_out
    planted.at = {kind: {free.pop() for _ in range(each)} for kind in ("leak_row", "leak_prompt")}
    held_out += [retyped(rows[place], rng) for place in planted.at["leak_row"]]
    for place in planted.at["leak_prompt"]:
        other = copy.deepcopy(rows[place])
        put(other, "chosen", "Something else entirely, as short as that. Next step: look it up.")
        held_out.append(other)
    rng.shuffle(held_out)
