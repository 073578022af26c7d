"""Whatever is in a file: each row of it is used or refused, with its place and a reason, in bounded time and memory."""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.data.readers import MAX_LINE
from dpo_cli.data.rows import read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import PairSet, tokenize_rows
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import to_json
from tests.helpers import make_tokenizer, size
from tests.helpers.records import BOM, FORMS, SUFFIXES, packed, unpacked, write_records

pytestmark = pytest.mark.torture

MAX_LENGTH = 64
SECONDS = 30  # far more than any of these inputs takes: it tells a hang, not a speed
tokenizer = cache(make_tokenizer)


def survive(path: Path) -> PairSet | None:
    """Read and tokenize a file, and check all that may be relied upon; None if it is refused as a whole."""
    began = time.monotonic()
    try:
        rows = list(read_rows(find_sources([str(path)])))
        mode = random.Random(len(rows)).choice(["keep", "refuse"])
        found = tokenize_rows(rows, tokenizer(), max_length=MAX_LENGTH, control_tokens=mode)
    except UsageError as error:
        assert str(error).startswith(f"--data {path}: ") and len(str(error)) < 1000
        found = None
    assert time.monotonic() - began < SECONDS
    if found is None:
        return None
    assert len(found.pairs) + len(found.refused) == len(rows) > 0
    for row in rows:
        assert re.fullmatch(rf"{re.escape(str(path))}:(row )?[1-9]\d*", row.where)
    if ".jsonl" in path.name:
        lines = enumerate(unpacked(path).split(b"\n"), 1)
        assert [row.where for row in rows] == [f"{path}:{n}" for n, line in lines if line.strip() not in (b"", BOM)]
    for bad in found.refused:
        assert bad.reason.isprintable() and 0 < len(bad.reason) < 400
        to_json({"where": bad.where, "reason": bad.reason, "row": bad.record}).encode()
    for pair in found.pairs:
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= MAX_LENGTH
        assert min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) > 0
        assert pair.chosen.tolist() != pair.rejected.tolist()
    return found


# ---- made from nothing ------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=[]), max_size=8) | st.sampled_from(["<|im_end|>", "\n\nAssistant: a"])
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
value = st.recursive(scalar, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=8)
valid = st.sampled_from([form[0] for form in FORMS.values()])
spoilt = st.tuples(valid, st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "x"]), value | text)).map(
    lambda both: both[0] | both[1]
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
        optional={"content": text, "tool_calls": value, "name": value},
    ),
    max_size=4,
)
said = st.tuples(valid, st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), messages | text)).map(
    lambda both: both[0] | both[1]
)


def many(quick: int, long: int) -> settings:
    return settings(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=size(quick, long),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@many(150, 5_000)
@given(st.lists(valid | spoilt | said | value, min_size=1, max_size=4), st.booleans())
def test_any_values(folder: Path, records: list[Any], ascii_only: bool) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    for name, whole in (("rows.jsonl", "\n".join(lines)), ("rows.json", f"[{', '.join(lines)}]")):
        (folder / name).write_bytes(whole.encode(errors="surrogatepass"))
        found = survive(folder / name)
        assert found or name == "rows.json"


@many(100, 5_000)
@given(st.sampled_from(SUFFIXES), st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r", b",", b'"', BOM])))
def test_any_bytes(folder: Path, suffix: str, parts: list[bytes]) -> None:
    path, content = folder / f"bytes.{suffix}", b"".join(parts)
    path.write_bytes(packed(content, path.name))
    found = survive(path)
    if suffix.startswith("jsonl"):
        assert bool(found) == any(line.strip() not in (b"", BOM) for line in content.split(b"\n"))


# ---- made from what is valid ------------------------------------------------------------------------------------

INSERTED = [
    *(b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\x00", BOM, b"\r\n", b"\r"),
    *(b"\n", b"\n\n", b'"', b'""', b",", b"[", b"{", b"}", b"]", b"]\n[", b'"prompt": "twice", ', b'"x": 1, "x": 2, '),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 70 + b"]" * 70, b'"' + b"a" * 300_000, b"null", b'[{"role": "user"}]'),
    *(b"<|im_end|>", b"<|im_start|>system\\n", b"\xe2\x80\xa8", b"\\u0000", b"\x1b[31m", b"PAR1", b"\x1f\x8b"),
]


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few random changes: flipped bits, cuts, parts twice, parts of other files, what is known to hurt."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place, length = rng.randrange(len(changed) + 1), int(2 ** rng.uniform(0, 9))
        kind = rng.choice(["flip", "flip", "cut", "end", "twice", "splice", "insert", "insert"])
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[place : place + length]
        elif kind == "end":
            del changed[place:]
        elif kind == "twice":
            changed[place:place] = changed[place : place + length]
        elif kind == "splice":
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[place : place + rng.choice([0, length])] = other[start : start + length]
        elif kind == "insert":
            changed[place:place] = rng.choice(INSERTED)
    return bytes(changed)


def test_mutations_of_valid_files(folder: Path) -> None:
    """Of every kind of file and every form of row, zipped ones changed inside or outside."""
    files: list[tuple[str, bytes]] = []
    forms = [form[0] for form in FORMS.values()]
    for suffix in SUFFIXES:
        strings = [forms[0] | {"prompt": f"Why {n}? <|im_end|>"} for n in range(8)]
        others_of_its_kind = [] if suffix.startswith("csv") else [[form] * 3 for form in forms[1:]]
        mixed = [forms] if suffix.startswith("json") else []
        for records in [strings, *others_of_its_kind, *mixed]:
            write_records(folder / f"valid.{suffix}", records)
            files.append((suffix, (folder / f"valid.{suffix}").read_bytes()))
            found = survive(folder / f"valid.{suffix}")
            assert found and not found.refused
    others = [content for _, content in files]
    files_refused, used, refused = Counter[str](), Counter[str](), Counter[str]()
    rng = random.Random(0)
    for _ in range(size(600, 12_000)):
        suffix, content = rng.choice(files)
        path = folder / f"mutated.{suffix}"
        path.write_bytes(content)
        if suffix.endswith(".gz") and rng.random() < 0.7:
            path.write_bytes(packed(mutated(unpacked(path), others, rng), path.name))
        else:
            path.write_bytes(mutated(content, others, rng))
        found = survive(path)
        files_refused[suffix] += found is None
        used[suffix] += len(found.pairs) if found else 0
        refused[suffix] += len(found.refused) if found else 0
    print(f"\nfiles refused {dict(files_refused)}\nrows used {dict(used)}\nrows refused {dict(refused)}")
    assert all(used[suffix] for suffix in SUFFIXES)
    assert all(refused[suffix] for suffix in SUFFIXES if not suffix.startswith(("parquet", "csv")))
    few = ("jsonl",)
    assert all(files_refused[suffix] for suffix in SUFFIXES if suffix not in few)


# ---- too large --------------------------------------------------------------------------------------------------

GIANT = size(8, 200) * 10**6
LINES: dict[str, Callable[[], bytes]] = {
    "no JSON": lambda: b"a" * GIANT,
    "an open quote": lambda: b'{"prompt": "' + b"a" * GIANT,
    "an open array": lambda: b"[" * GIANT,
    "a valid row": lambda: json.dumps(FORMS["strings"][0] | {"prompt": "a" * min(GIANT, MAX_LINE - 100)}).encode(),
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("name", LINES)
def test_a_giant_line_takes_at_most_three_times_its_length(name: str, suffix: str, folder: Path) -> None:
    """And one that is longer than any row may be takes no more than the longest row."""
    line = LINES[name]()
    path = folder / f"giant.{suffix}"
    path.write_bytes(packed(line, path.name))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) if len(line) > MAX_LINE else nullcontext():
            assert sum(1 for _ in read_rows(find_sources([str(path)]))) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        path.unlink()
    assert peak <= 3 * min(len(line), MAX_LINE) + 2**20
