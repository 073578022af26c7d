"""Read preference rows of every accepted format and name what is wrong with a bad one."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_cli.errors import UsageError

Message = dict[str, Any]
Text = str | list[Message]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
COLUMNS = ("prompt", "chosen", "rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, slots=True)
class Row:
    """One preference: all three fields are strings, or all three are message lists."""

    where: str
    format: str
    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    record: Any = None


class RowError(ValueError):
    """The reason why a row is bad, without its place."""


def read_rows(files: list[str], columns: str | None = None) -> Iterator[Row | BadRow]:
    """Yield every row of every file in order, bad ones included.

    Raises:
        UsageError: a file is missing, unreadable, empty or of an unknown kind, or ``columns`` is malformed.
    """
    names = _parse_columns(columns)
    for file in files:
        path = _checked_path(file)
        count = 0
        try:
            for where, record in _read_records(path):
                count += 1
                if isinstance(record, RowError):
                    yield BadRow(where, str(record))
                    continue
                try:
                    yield _parse_row(record, where, names)
                except RowError as error:
                    yield BadRow(where, str(error), record)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"--data {file}: cannot be read ({error})") from error
        if count == 0:
            raise UsageError(f"--data {file}: the file has no rows")


def _checked_path(file: str) -> Path:
    try:
        path = Path(file).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also a user or a name that cannot be
        raise UsageError(f"--data {file}: no such file ({error})") from error
    if path.is_dir():
        raise UsageError(f"--data {file}: is a folder; name its files")
    if not path.name.removesuffix(".gz").endswith(SUFFIXES):
        raise UsageError(f"--data {file}: unknown kind of file; use {', '.join(SUFFIXES)}, each also .gz")
    return path


def _parse_columns(columns: str | None) -> dict[str, str]:
    names = {name: name for name in COLUMNS}
    for part in filter(None, (columns or "").split(",")):
        ours, _, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not theirs:
            raise UsageError(f"--columns {columns}: write it as prompt=NAME,chosen=NAME,rejected=NAME")
        names[ours] = theirs
    return names


# ---- files to records -------------------------------------------------------------------------------------------


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line or file:row, record or RowError)."""
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as opened:
        stream = cast(BinaryIO, opened)
        if plain.endswith(".jsonl"):
            yield from _read_json_lines(stream, path)
        elif plain.endswith(".json"):
            yield from _read_json_array(stream, path)
        else:
            yield from _read_csv(stream, path)


def _read_json_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip() in (b"", b"\xef\xbb\xbf"):
            continue
        try:
            record = _loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            record = RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
        except RowError as error:
            record = error
        yield f"{path}:{number}", record


def _read_json_array(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Elements of one array, decoded one at a time so that each knows its line."""
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--data {path}: not UTF-8 (byte {error.start + 1})") from error
    start = _skip_space(text, 0)
    if start == len(text):
        return
    if text[start] != "[":
        raise UsageError(f"--data {path}: must be one array of rows; for one object a line, name it .jsonl")
    lines = _LineCounter(text, path)
    start = _skip_space(text, start + 1)
    if not text.startswith("]", start):
        while True:
            try:
                record, end = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:  # past a broken element nothing can be told apart
                place = error.pos if isinstance(error, json.JSONDecodeError) else start
                yield lines.where(place), RowError((_json_reason(error) if text[start:] else _NO_END) + _REST)
                return
            yield lines.where(start), record
            start = _skip_space(text, end)
            if not text.startswith(",", start):
                break
            start = _skip_space(text, start + 1)
    if not text.startswith("]", start):
        yield (
            lines.where(start),
            RowError(("not JSON: Expecting ',' or ']' after a row" if text[start:] else _NO_END) + _REST),
        )
    elif text[start + 1 :].strip():
        yield lines.where(start + 1), RowError("not JSON: something follows the array" + _REST)


_NO_END = "not JSON: the array has no end"
_REST = "; the rest of the file is not read"


class _LineCounter:
    """Lines of places in a text that are asked for from the first to the last."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.counted, self.line = text, path, 0, 1

    def where(self, place: int) -> str:
        self.line += self.text.count("\n", self.counted, place)
        self.counted = place
        return f"{self.path}:{self.line}"


def _read_csv(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Rows under the first line's names, each told by its first line; a cell may span lines."""
    lines = (line.decode("utf-8-sig" if number == 1 else "utf-8") for number, line in enumerate(stream, 1))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    first = 1
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"--data {path}: the column '{twice}' is there twice")
        first = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(names):
                yield f"{path}:{first}", RowError(f"{len(cells)} cells under {len(names)} column names")
            elif cells:
                yield f"{path}:{first}", dict(zip(names, cells, strict=False))
            first = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        yield f"{path}:{first}", RowError(f"not CSV in UTF-8: {error}{_REST}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            records = (record for batch in file.iter_batches(1024) for record in batch.to_pylist())
            yield from ((f"{path}:row {number}", record) for number, record in enumerate(records, 1))
    except ArrowException as error:
        raise UsageError(f"--data {path}: not a readable parquet file ({error})") from error


def _decoder() -> json.JSONDecoder:
    def no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(items)
        if len(record) < len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"the key '{next(k for k in keys if keys.count(k) > 1)}' is there twice")
        return record

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON value")

    return json.JSONDecoder(object_pairs_hook=no_duplicates, parse_constant=no_constant)


_DECODER = _decoder()


def _loads(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(_json_reason(error)) from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return f"not JSON: {error}"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


# ---- records to rows --------------------------------------------------------------------------------------------


def _parse_row(record: Any, where: str, names: dict[str, str]) -> Row:
    if not isinstance(record, dict):
        raise RowError("not an object with the columns prompt, chosen, rejected")
    fields = {ours: _field(record, ours, theirs) for ours, theirs in names.items()}
    prompt, chosen, rejected = (fields[name] for name in COLUMNS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("chosen and rejected differ in kind: one is a string, the other a message list")
    if isinstance(chosen, str) and isinstance(prompt, list):
        prompt, chosen, rejected = prompt, _answer(chosen), _answer(rejected)
    if isinstance(chosen, str):
        format_ = "prompt and responses as strings" if prompt is not None else "dialogues as strings (HH)"
        prompt, chosen, rejected = (prompt, chosen, rejected) if prompt is not None else _split_hh(chosen, rejected)
    elif isinstance(prompt, list):
        format_ = "prompt and responses as messages"
    else:  # full conversations; a prompt string beside them is in them already
        format_ = "conversations with a common prefix"
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
    row = Row(where, format_, prompt, chosen, rejected)
    _check_content(row)
    return row


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _field(record: dict[str, Any], ours: str, theirs: str) -> Any:
    """One column, with its type checked; None only for a prompt that is not there."""
    named = ours if ours == theirs else f"{ours} (column '{theirs}')"
    value = record.get(theirs)
    if value is None:
        if ours == "prompt" and ours == theirs:
            return None
        raise RowError(f"{named} is missing")
    if isinstance(value, list):
        for number, message in enumerate(value, 1):
            _check_message(message, f"{named}, message {number}")
    elif not isinstance(value, str):
        raise RowError(f"{named} is a {type(value).__name__}; it must be a string or a list of messages")
    elif value.lstrip().startswith(('[{"role"', "[{'role'")):
        raise RowError(f"{named} is a message list written as text; write it as a list, in .jsonl or .parquet")
    elif _has_surrogate(value):
        raise RowError(f"{named} has half of a surrogate pair, which is no text")
    if not (value if isinstance(value, list) else value.strip()):
        raise RowError(f"{named} is empty")
    return value


def _check_message(message: Any, named: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{named}: must be an object with role and content")
    if message["role"] not in ROLES:
        raise RowError(f"{named}: unknown role '{message['role']}'; use one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise RowError(f"{named}: content must be a string")
    if _has_surrogate(content):
        raise RowError(f"{named}: content has half of a surrogate pair, which is no text")


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _split_hh(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    common = _common_prefix(chosen, rejected)
    cut = chosen.rfind(HH_ASSISTANT, 0, common)
    if cut < 0:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut += len(HH_ASSISTANT)
    if HH_HUMAN in chosen[cut:] or HH_HUMAN in rejected[cut:]:
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    cut = _common_prefix(chosen, rejected)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common_prefix(a: Any, b: Any) -> int:
    """Length of what two sequences begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _check_content(row: Row) -> None:
    for name, response in (("chosen", row.chosen), ("rejected", row.rejected)):
        if isinstance(response, str):
            if not response.strip():
                raise RowError(f"{name} is empty")
        else:
            _check_response(response, name)
    if row.chosen == row.rejected:
        raise RowError("chosen equals rejected")
    if not row.prompt:
        raise RowError("prompt is empty: the conversations share no first message")
    if isinstance(row.prompt, list) and row.prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(f"prompt ends with the role '{row.prompt[-1]['role']}'; it must end with user or tool")


def _check_response(response: list[Message], name: str) -> None:
    for message in response:
        if message["role"] not in ("assistant", "tool"):
            raise RowError(f"{name} has a '{message['role']}' turn; the two may differ in their last answer only")
    if not response or response[-1]["role"] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    if not response[-1].get("tool_calls") and not response[-1]["content"].strip():
        raise RowError(f"{name} is empty")
