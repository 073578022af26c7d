"""A bad file of each kind: what `dpo train` says of it is in ``bad_files.txt``, word for word.

After a change of words write it anew with ``python -m tests.data.test_bad_files``, and read it.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app

GOLDEN = Path(__file__).with_name("bad_files.txt")
ROW = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
LINE = json.dumps(ROW)
WHY, YES = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
TURNS: dict[str, Any] = {"prompt": [WHY], "chosen": "Because.", "rejected": "No."}
HH = "\n\nHuman: Hi\n\nAssistant:"


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


# kind: name of the file, its content (None: there is none), more options
FILES: dict[str, tuple[str, bytes | None, list[str]]] = {
    "no such file": ("none.jsonl", None, []),
    "another kind of file": ("pairs.txt", LINE.encode(), []),
    "nothing in it": ("pairs.jsonl", b"", []),
    "white space only": ("pairs.jsonl", b"\n  \n\n", []),
    "an empty array": ("pairs.json", b"[]", []),
    "no JSON": ("pairs.jsonl", b"prompt,chosen,rejected\n", []),
    "a line that was cut off": ("pairs.jsonl", LINE.encode() + b"\n" + LINE[:30].encode(), []),
    "two objects on a line": ("pairs.jsonl", (LINE + LINE).encode(), []),
    "an array without an end": ("pairs.json", f"[\n{LINE},\n{LINE}\n".encode(), []),
    "a broken row of an array": ("pairs.json", f"[\n{LINE},\n{{oops}}\n]".encode(), []),
    "something behind the array": ("pairs.json", f"[\n{LINE}\n]\n{LINE}".encode(), []),
    "an object over several lines": ("pairs.json", json.dumps(ROW, indent=2).encode(), []),
    "UTF-16": ("pairs.jsonl", LINE.encode("utf-16"), []),
    "Latin-1": ("pairs.jsonl", '{"prompt": "é"}'.encode("latin-1"), []),
    "a key twice": ("pairs.jsonl", LINE.replace("}", ', "chosen": "x"}').encode(), []),
    "not a number": ("pairs.jsonl", LINE.replace("}", ', "weight": NaN}').encode(), []),
    "gzip that is none": ("pairs.jsonl.gz", LINE.encode(), []),
    "gzip that was cut off": ("pairs.jsonl.gz", gzip.compress(LINE.encode() * 99, mtime=0)[:-9], []),
    "CSV with a column twice": ("pairs.csv", b"prompt,chosen,chosen\na,b,c\n", []),
    "CSV with more cells than names": ("pairs.csv", b"prompt,chosen,rejected\na,b,c,d\n", []),
    "CSV with a quote that is not closed": ("pairs.csv", b'prompt,chosen,rejected\n"a,b,c\n', []),
    "CSV with semicolons": ("pairs.csv", b"prompt;chosen;rejected\na;b;c\n", []),
    "parquet that is none": ("pairs.parquet", b"PAR1 and nothing else", []),
    "parquet of another table": ("pairs.parquet", table(a=[1], b=["x"]), []),
    "columns of other names": ("pairs.jsonl", lines({"question": "Why?", "good": "a", "bad": "b"}), []),
    "a response and a label": ("pairs.jsonl", lines({"prompt": "a", "completion": "b", "label": True}), []),
    "--columns that no row has": ("pairs.jsonl", lines(ROW), ["--columns", "chosen=good"]),
    "--columns that cannot be read": ("pairs.jsonl", lines(ROW), ["--columns", "good"]),
    "--format of other rows": ("pairs.jsonl", lines(ROW), ["--format", "messages"]),
    "an empty prompt": ("pairs.jsonl", lines(ROW | {"prompt": " "}), []),
    "an empty response": ("pairs.jsonl", lines(ROW | {"rejected": ""}), []),
    "a number as a response": ("pairs.jsonl", lines(ROW | {"chosen": 7}), []),
    "equal responses": ("pairs.jsonl", lines(ROW | {"rejected": ROW["chosen"]}), []),
    "messages as text": ("pairs.jsonl", lines(ROW | {"prompt": '[{"role": "user"}]'}), []),
    "an unknown role": ("pairs.jsonl", lines(TURNS | {"prompt": [{"role": "narrator", "content": "a"}]}), []),
    "a message without content": ("pairs.jsonl", lines(TURNS | {"prompt": [{"role": "user"}]}), []),
    "a picture": ("pairs.jsonl", lines(TURNS | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}), []),
    "a prompt that ends with an answer": ("pairs.jsonl", lines(TURNS | {"prompt": [WHY, YES]}), []),
    "a string and messages": ("pairs.jsonl", lines(TURNS | {"chosen": [YES]}), []),
    "conversations without a common turn": ("pairs.jsonl", lines({"chosen": [YES], "rejected": [WHY, YES]}), []),
    "conversations that part early": (
        "pairs.jsonl",
        lines({"chosen": [WHY, YES, WHY, YES], "rejected": [WHY, YES | {"content": "No."}, WHY, YES]}),
        [],
    ),
    "dialogues that part early": (
        "pairs.jsonl",
        lines({"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"}),
        [],
    ),
    "two system messages": (
        "pairs.jsonl",
        lines(TURNS | {"system": "Be kind.", "prompt": [{"role": "system", "content": "Be short."}, WHY]}),
        [],
    ),
    "tools that are no JSON": ("pairs.jsonl", lines(TURNS | {"tools": "get_time"}), []),
    "a weight that is a word": ("pairs.jsonl", lines(ROW | {"weight": "heavy"}), []),
    "a negative weight": ("pairs.jsonl", lines(ROW | {"weight": -1}), []),
    "responses without ranks": ("pairs.jsonl", lines({"prompt": "a", "responses": ["b", "c"]}), []),
    "responses of one rank": ("pairs.jsonl", lines({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}), []),
    "a prompt that fills max_length": (
        "pairs.jsonl",
        lines(TURNS | {"prompt": [WHY | {"content": "Why? " * 99}]}),
        ["--max-length", "16"],
    ),
    "a difference that is cut off": (
        "pairs.jsonl",
        lines(ROW | {"chosen": " so" * 99 + " a", "rejected": " so" * 99 + " b"}),
        ["--max-length", "32"],
    ),
    "many bad rows": ("pairs.jsonl", lines(*[ROW | {"chosen": ""}] * 12, {}, 7, ROW), []),
    "an empty chat template": ("pairs.jsonl", lines(ROW), ["--chat-template", "/dev/null"]),
    "a chat template that is not there": ("pairs.jsonl", lines(ROW), ["--chat-template", "none.jinja"]),
}


def told(kind: str, model: Path, folder: Path) -> str:
    """What `dpo train` says, with the folder's name left out."""
    name, content, options = FILES[kind]
    if content is not None:
        (folder / name).write_bytes(content)
    words = ["train", "--model", str(model), "--data", str(folder / name), "--output", str(folder / "run")]
    out = CliRunner().invoke(app, [*words, "--cache-dir", str(folder / "cache"), "--dry-run", *options])
    assert out.exit_code == 2 and not out.stdout and not (folder / "run").exists(), (kind, out.output)
    error: str = out.stderr[out.stderr.index("error: ") :]
    return error.replace(f"{folder}/", "").strip()


def golden() -> dict[str, str]:
    blocks = GOLDEN.read_text(encoding="utf-8").split("\n\n# ")[1:]
    return {block.partition("\n")[0]: block.partition("\n")[2].strip() for block in blocks}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_told_in_these_words(kind: str, tiny: Path, tmp_path: Path) -> None:
    assert told(kind, tiny, tmp_path) == golden()[kind]


def test_no_words_are_left_over() -> None:
    assert list(golden()) == list(FILES)


if __name__ == "__main__":
    from tests.helpers import make_model, make_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "tiny")
        make_model().save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        text = "What dpo train says of bad files; tests/data/test_bad_files.py makes each.\n"
        for number, kind in enumerate(FILES):
            (folder := Path(temporary, str(number))).mkdir()
            text += f"\n\n# {kind}\n{told(kind, model, folder)}\n"
    GOLDEN.write_text(text.replace("\n\n\n", "\n\n"), encoding="utf-8")
    sys.exit()
