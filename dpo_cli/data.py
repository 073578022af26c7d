"""Read preference rows of every accepted format and name what is wrong with a bad one."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_cli.errors import UsageError, printable

Message = dict[str, Any]
Text = str | list[Message]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
COLUMNS = ("prompt", "chosen", "rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MAX_LINE = 64 * 2**20  # bytes of one row: what is longer is a broken or a hostile file
MAX_WHOLE = 2**28  # bytes of a file that can only be read as a whole
MAX_DEPTH = 64  # of lists and objects in each other: what reads or writes a row later may recurse


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
                if _too_deep(record):
                    record = RowError(_TOO_DEEP)
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


def kind_of(path: Path) -> tuple[str, bool]:
    """By which of the suffixes, without its dot, a file is read; and whether it is zipped."""
    return path.name.removesuffix(".gz").rpartition(".")[2], path.name.endswith(".gz")


def _parse_columns(columns: str | None) -> dict[str, str]:
    names = {name: name for name in COLUMNS}
    for part in filter(None, (columns or "").split(",")):
        ours, _, theirs = (piece.strip() for piece in part.partition("="))
        if ours not in COLUMNS or not theirs:
            raise UsageError(f"--columns {columns}: write it as prompt=NAME,chosen=NAME,rejected=NAME")
        names[ours] = theirs
    return names


# ---- files to records -------------------------------------------------------------------------------------------

_TOO_LONG = f"longer than {MAX_LINE >> 20} MiB"
_TOO_DEEP = "nested too deeply"
_NO_END = "not JSON: the array has no end"
REST = "; the rest of the file is not read"


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line or file:row, record or RowError)."""
    kind, zipped = kind_of(path)
    with gzip.open(path, "rb") if zipped else path.open("rb") as opened:
        stream = cast(BinaryIO, opened)
        if kind == "jsonl":
            yield from _read_json_lines(stream, path)
        elif kind == "json":
            yield from _read_json_array(stream, path)
        elif kind == "csv":
            yield from _read_csv(stream, path)
        else:
            yield from _read_parquet(_whole(stream, path) if zipped else path, path)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Every line; None for one that is longer than MAX_LINE, which is passed over in pieces."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
        yield None


def _whole(stream: BinaryIO, path: Path) -> BytesIO:
    content = BytesIO()
    while piece := stream.read(2**20):
        content.write(piece)
        if content.tell() > MAX_WHOLE:
            raise UsageError(f"--data {path}: longer than {MAX_WHOLE >> 20:,} MiB; write it as .jsonl")
    return content


def _read_json_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(stream), 1):
        if line is None:
            yield f"{path}:{number}", RowError(_TOO_LONG)
        elif line.strip() not in (b"", b"\xef\xbb\xbf"):
            yield f"{path}:{number}", _json_line(line, "utf-8-sig" if number == 1 else "utf-8")


def _json_line(line: bytes, encoding: str) -> Any:
    """The line's value or a RowError."""
    try:
        return _DECODER.decode(line.rstrip(b"\r\n").decode(encoding))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return RowError(_json_reason(error))


def _read_json_array(stream: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Elements of one array, decoded one at a time so that each knows its line."""
    try:
        text = _whole(stream, path).getvalue().decode("utf-8-sig")
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
                reason = _json_reason(error) if start < len(text) else _NO_END
                yield lines.where(place), RowError(reason + REST)
                return
            yield lines.where(start), record
            start = _skip_space(text, end)
            if not text.startswith(",", start):
                break
            start = _skip_space(text, start + 1)
    if not text.startswith("]", start):
        reason = "not JSON: Expecting ',' or ']' after a row" if start < len(text) else _NO_END
        yield lines.where(start), RowError(reason + REST)
    elif _skip_space(text, start + 1) < len(text):
        yield lines.where(start + 1), RowError("not JSON: something follows the array" + REST)


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
    held = 0  # bytes of the row that is being read

    def lines() -> Iterator[str]:
        nonlocal held
        for number, line in enumerate(_lines(stream), 1):
            held += len(line or b"")
            if line is None or held > MAX_LINE:
                raise csv.Error(_TOO_LONG)
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines(), strict=True)
    first = 1
    try:
        names = next(reader, [])
        _check_names(names, path)
        first, held = reader.line_num + 1, 0
        for cells in reader:
            if len(cells) > len(names):
                yield f"{path}:{first}", RowError(f"{len(cells)} cells under {len(names)} column names")
            elif cells:
                yield f"{path}:{first}", dict(zip(names, cells, strict=False))
            first, held = reader.line_num + 1, 0
    except (csv.Error, UnicodeDecodeError) as error:
        yield f"{path}:{first}", RowError(f"not CSV in UTF-8: {error}{REST}")


def _read_parquet(source: Path | BytesIO, path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            _check_names(file.schema_arrow.names, path)
            batches = file.iter_batches(128)  # few: one small file may hold a long text for each of many rows
            records = (record for batch in batches for record in _batch_records(batch))
            yield from ((f"{path}:row {number}", record) for number, record in enumerate(records, 1))
    except (ArrowException, ValueError) as error:
        raise UsageError(f"--data {path}: not a readable parquet file ({error})") from error


def _batch_records(batch: Any) -> list[Any]:
    """The batch's rows; a RowError for one that holds text that is not UTF-8 or a date that is none."""
    try:
        records: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RowError(f"cannot be read ({error})")]
        return [record for place in range(batch.num_rows) for record in _batch_records(batch.slice(place, 1))]
    return records


def _check_names(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise UsageError(f"--data {path}: the column '{_twice(names)}' is there twice")


def _decoder() -> json.JSONDecoder:
    def no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(items)
        if len(record) < len(items):
            raise ValueError(f"the key '{_twice([key for key, _ in items])}' is there twice")
        return record

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON value")

    return json.JSONDecoder(object_pairs_hook=no_duplicates, parse_constant=no_constant)


_DECODER = _decoder()


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return f"not JSON: {error}"


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, position)).end()


def _too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_too_deep(each, levels - 1) for each in inner if isinstance(each, (dict, list, tuple)))


def _twice(names: list[str]) -> str:
    """The name that is there most often."""
    return shortened(Counter(names).most_common(1)[0][0])


def shortened(text: str, length: int = 40) -> str:
    """Text of the data as part of a reason: printable, on one line, and not long."""
    return printable(" ".join(text[:length].split()) + "…" * (len(text) > length))


_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogate(text: str) -> bool:
    """Whether half of a surrogate pair is in it; such a text cannot be encoded."""
    return not text.isascii() and _SURROGATE.search(text) is not None


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
    elif has_surrogate(value):
        raise RowError(f"{named} has half of a surrogate pair, which is no text")
    if not (value if isinstance(value, list) else value.strip()):
        raise RowError(f"{named} is empty")
    return value


def _check_message(message: Any, named: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"{named}: must be an object with role and content")
    if message["role"] not in ROLES:
        raise RowError(f"{named}: unknown role '{shortened(message['role'])}'; use one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise RowError(f"{named}: content must be a string")
    if has_surrogate(content):
        raise RowError(f"{named}: content has half of a surrogate pair, which is no text")


def _split_hh(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: _common_prefix(before_chosen, before_rejected)]
    if not shared:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if HH_HUMAN in chosen[cut:] or HH_HUMAN in rejected[cut:]:
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    cut = _common_prefix(chosen, rejected)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common_prefix(a: list[Any], b: list[Any]) -> int:
    """Length of what two lists begin with alike."""
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
