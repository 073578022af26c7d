"""Records in every file format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dpo_cli.data.pairs import Pair
from dpo_cli.data.rows import BadRow, Row
from dpo_cli.data.tokenize import Encoder
from dpo_cli.utils.errors import RowError

STRINGS = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
BOM = b"\xef\xbb\xbf"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be short."}


# name: (record, what the format is called, prompt, chosen, rejected)
FORMS: dict[str, tuple[dict[str, Any], str, Any, Any, Any]] = {
    "strings": (STRINGS, "prompt and responses as strings", "Why?", "Because.", "No idea."),
    "messages": (
        {"prompt": [SYSTEM, user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("No.")]},
        "prompt and responses as messages",
        [SYSTEM, user("Why?")],
        [assistant("Because.")],
        [assistant("No.")],
    ),
    "conversations": (
        {
            "chosen": [user("Hi"), assistant("Hello!"), user("Why?"), assistant("Because.")],
            "rejected": [user("Hi"), assistant("Hello!"), user("Why?"), assistant("No.")],
        },
        "conversations with a common prefix",
        [user("Hi"), assistant("Hello!"), user("Why?")],
        [assistant("Because.")],
        [assistant("No.")],
    ),
    "conversations beside a prompt string": (
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("Because.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        "conversations beside their prompt (UltraFeedback)",
        [user("Why?")],
        [assistant("Because.")],
        [assistant("No.")],
    ),
    "dialogues": (
        {"chosen": HH + " Because.", "rejected": HH + " Be quiet."},
        "dialogues as strings (HH)",
        HH,
        " Because.",
        " Be quiet.",
    ),
    "prompt messages, response strings": (
        {"prompt": [user("Why?")], "chosen": "Because.", "rejected": "No."},
        "prompt and responses as messages",
        [user("Why?")],
        [assistant("Because.")],
        [assistant("No.")],
    ),
}
SUFFIXES = ("jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "parquet.gz")


def encode_row(encoder: Encoder, row: Row) -> tuple[Pair, set[str]]:
    """The pair of a row, and its notes."""
    made = next(encoder.pairs([row]))
    if isinstance(made, BadRow):
        raise RowError(made.reason)
    [pair] = made.pairs
    return pair, made.notes


def packed(content: bytes, name: str) -> bytes:
    """The content as a file of that name holds it."""
    return gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def kind_of(name: str) -> str:
    return name.removesuffix(".gz").rpartition(".")[2]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records in the container that the name asks for, each beginning on a line of its own."""
    kind = kind_of(path.name)
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), sink)
        content = sink.getvalue()
    elif kind == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        content = buffer.getvalue().encode()
    else:
        lines = [json.dumps(record) for record in records]
        content = ("[\n" + ",\n".join(lines) + "\n]\n" if kind == "json" else "\n".join(lines) + "\n").encode()
    path.write_bytes(packed(content, path.name))


text = st.text(st.characters(exclude_categories=[]), max_size=8)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
value = st.recursive(scalar, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
role = st.sampled_from(["system", "user", "assistant", "tool"]) | text
message = st.fixed_dictionaries(
    {}, optional={"role": role, "content": text | value, "tool_calls": st.lists(value, max_size=2)}
)
messages = st.lists(
    message | st.builds(assistant, st.text(max_size=3)) | st.builds(user, st.text(max_size=3)), max_size=4
)
dialogue = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", " b", "\n"]), max_size=7).map("".join)
field = text | st.text("ab ", max_size=3) | messages | dialogue | value
record = st.fixed_dictionaries({}, optional={"prompt": field, "chosen": field, "rejected": field, "x": value}) | value
