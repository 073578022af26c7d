"""Readers of file formats: JSON lines, a JSON array, CSV, and Arrow tables (parquet, data sets) as records.

Each yields the place of a record in its file, as ``12`` for line 12 or as ``row 12``, and the record, or a RowError if
that row cannot be read.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dpo_cli.utils.errors import RowError, printable

Records = Iterator[tuple[str, Any]]
MAX_LINE = 64 * 2**20  # bytes; a longer line is a broken or hostile file
MAX_FILE = 256 * 2**20  # bytes of a file that is read as a whole
MAX_DEPTH = 64  # of nested lists and objects: later stages recurse
TOO_DEEP = "nested too deeply"


class SourceError(Exception):
    """The reason why a source cannot be read, without its name."""


def read_json_lines(stream: BinaryIO) -> Records:
    """Read one object per line."""
    for number, line in _lines(stream):
        if line.strip() not in (b"", b"\xef\xbb\xbf"):
            yield str(number), _json_line(line, "utf-8-sig" if number == 1 else "utf-8")


def _json_line(line: bytes, encoding: str) -> Any:
    try:
        return _DECODER.decode(line.rstrip(b"\r\n").decode(encoding))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return RowError(TOO_DEEP)
    except ValueError as error:
        return RowError(f"not JSON: {error}")


def read_json_array(stream: BinaryIO) -> Records:
    """Read the elements of one array."""
    try:
        text = _whole(stream).decode("utf-8-sig")
        rows = _DECODER.decode(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 (byte {error.start + 1})") from error
    except RecursionError as error:
        raise SourceError(TOO_DEEP) from error
    except ValueError as error:
        hint = "; name a file with one object per line .jsonl" if text.lstrip()[:1] == "{" else ""
        raise SourceError(f"not JSON: {error}{hint}") from error
    if not isinstance(rows, list):
        raise SourceError("must be one array of rows; name a file with one object per line .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def read_csv(stream: BinaryIO) -> Records:
    """Read rows under the column names of the first line; a row that spans lines is reported at its first."""
    texts = (line.decode("utf-8-sig" if number == 1 else "utf-8") for number, line in _lines(stream))
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(texts, strict=True)
    line = 1
    try:
        names = next(reader, [])
        _check_names(names)
        if len(names) == 1 and (separator := next((each for each in ";\t|" if each in names[0]), None)):
            raise SourceError(f"the only column is '{shortened(names[0])}': write commas, not {separator!r}")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(names):
                yield str(line), RowError(f"{len(cells)} cells under {len(names)} column names")
            elif cells:
                yield str(line), dict(zip(names, cells, strict=False))
            line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"line {line}: not CSV in UTF-8: {error}") from error


def read_parquet(stream: BinaryIO, path: Path) -> Records:
    """Read the rows of a parquet file, which is mapped from ``path`` unless ``stream`` decompresses it."""
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(BufferReader(_whole(stream)) if path.suffix == ".gz" else path) as file:
            _check_names(file.schema_arrow.names)
            yield from read_tables(file.iter_batches(128))  # few: a small file may repeat a long text many times
    except (ArrowException, ValueError) as error:
        raise SourceError(f"not a readable parquet file ({error})") from error


def read_tables(batches: Iterable[Any]) -> Records:
    """Read the rows of Arrow tables; values of the type JSON are decoded."""
    number = 0
    for batch in batches:
        json_fields = [field for field in batch.schema if "arrow.json" in str(field.type)]
        for record in _table_rows(batch, json_fields):
            number += 1
            yield f"row {number}", record


def _table_rows(batch: Any, json_fields: Sequence[Any]) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
        for field in json_fields:
            for row in rows:
                row[field.name] = _decode_json(row[field.name], field.type)
        return rows
    except (ValueError, OverflowError, RecursionError) as error:  # text that is not UTF-8, a date out of range
        if batch.num_rows == 1:
            return [RowError(f"cannot be read ({error})")]
        return [row for place in range(batch.num_rows) for row in _table_rows(batch.slice(place, 1), json_fields)]


def _decode_json(value: Any, kind: Any) -> Any:
    """Decode the JSON in a value, in which ``datasets`` stores what differs in type from row to row."""
    from pyarrow import types

    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if types.is_struct(kind):
        return {field.name: _decode_json(value[field.name], field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_decode_json(each, kind.value_type) for each in value]
    return value


# ---- helpers ----------------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise SourceError(f"line {number} is longer than {MAX_LINE >> 20} MiB")
        yield number, line


def _whole(stream: BinaryIO) -> bytes:
    content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise SourceError(f"longer than {MAX_FILE >> 20} MiB; write it as .jsonl")
    return content


def _check_names(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise SourceError(f"the column '{_most_common(names)}' occurs twice")


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) < len(items):
        raise ValueError(f"the key '{_most_common([key for key, _ in items])}' occurs twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def json_value(text: str) -> Any:
    """Decode JSON text; return None for any other text."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def is_too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Return whether lists and objects are nested too deeply to be processed."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_too_deep(each, levels - 1) for each in inner if isinstance(each, (dict, list, tuple)))


def _most_common(names: list[str]) -> str:
    return shortened(Counter(names).most_common(1)[0][0])


def shortened(text: str, length: int = 40) -> str:
    """Shorten text of the data for a message: printable, on one line."""
    return printable(" ".join(text[:length].split()) + "…" * (len(text) > length))
