"""Readers of file formats: JSON lines, a JSON array, CSV, and Arrow tables (parquet, data sets) as records.

Each yields the place of a record in its file, as ``12`` for line 12 or as ``row 12``, and the record, or a RowError if
that row cannot be read.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from gzip import GzipFile
from io import BytesIO
from itertools import count
from typing import Any, BinaryIO

from dpo_cli.utils.errors import RowError, printable

Records = Iterator[tuple[str, Any]]
MAX_LINE = 64 * 2**20  # bytes; a longer line is a broken or hostile file
MAX_JSON = 256 * 2**20  # bytes of a .json file, which is read as a whole
MAX_UNPACKED = 2**30  # bytes of a parquet file that is decompressed in memory
MAX_DEPTH = 64  # of nested lists and objects: later stages recurse
BOM = b"\xef\xbb\xbf"
TOO_DEEP = "nested too deeply"


class SourceError(Exception):
    """The reason why a source cannot be read, without its name."""


def read_json_lines(stream: BinaryIO) -> Records:
    """Read one object per line."""
    for number, line in _lines(stream):
        if line.strip() in (b"", BOM):
            continue
        try:
            yield str(number), _decode(line.rstrip(b"\r\n"))
        except RowError as error:
            yield str(number), error


def read_json(stream: BinaryIO) -> Records:
    """Read the elements of one array, or one object per line."""
    content = _whole(stream, MAX_JSON, "write it as .jsonl, a row per line")
    if content.removeprefix(BOM).lstrip()[:1] != b"[":
        if _is_spread(content.decode("utf-8-sig", "replace").lstrip()):
            raise SourceError("must be an array of rows, or a row per line")
        yield from read_json_lines(BytesIO(content))
        return
    try:
        rows = _decode(content)
    except RowError as error:
        raise SourceError(str(error)) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def read_csv(stream: BinaryIO) -> Records:
    """Read rows under the column names of the first line; a row that spans lines is reported at its first."""
    csv.field_size_limit(MAX_LINE)
    texts = (line.decode("utf-8-sig" if number == 1 else "utf-8") for number, line in _lines(stream))
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


def read_parquet(stream: BinaryIO) -> Records:
    """Read the rows of a parquet file; one that is compressed as a whole is decompressed in memory."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        if isinstance(stream, GzipFile):
            stream = BytesIO(_whole(stream, MAX_UNPACKED, "unpack it"))
        with ParquetFile(stream) as file:
            _check_names(file.schema_arrow.names)
            yield from read_tables(file.iter_batches(128))  # few: a small file may repeat a long text many times
    except (ArrowException, ValueError, OverflowError) as error:
        raise SourceError(f"not a readable parquet file ({error})") from error


def read_tables(tables: Iterable[Any], is_mapped: bool = False) -> Records:
    """Read the rows of Arrow tables; of binary values, such as images, only whether there is one.

    Values of the type JSON are decoded: ``datasets`` stores so what differs in kind from row to row.
    A damaged table is refused, since a wrong offset would end the process. Text that is not UTF-8 is left to its row,
    unless the table is mapped into memory: behind one fault there may be others.
    """
    from pyarrow import ArrowInvalid

    numbers = count(1)
    for table in tables:
        for place in range(table.num_columns):
            try:
                table.select([place]).validate(full=True)
            except ArrowInvalid as error:
                if is_mapped or "UTF8" not in str(error):
                    raise
        for record in _table_rows(table):
            yield f"row {next(numbers)}", record


def _table_rows(table: Any) -> list[Any]:
    try:
        columns = {field.name: _cells(table.column(place), field) for place, field in enumerate(table.schema)}
    except RowError as error:
        if table.num_rows == 1:
            return [error]
        return [row for place in range(table.num_rows) for row in _table_rows(table.slice(place, 1))]
    return [{name: cells[place] for name, cells in columns.items()} for place in range(table.num_rows)]


def _cells(column: Any, field: Any) -> list[Any]:
    from pyarrow import ArrowException

    kind = str(field.type)
    try:
        cells: list[Any] = column.to_pylist()
        if "arrow.json" in kind:
            cells = [_decode_within(cell, field.type) for cell in cells]
    except UnicodeDecodeError as error:
        raise RowError(f"{shortened(field.name)}: not UTF-8 (byte {error.start + 1})") from error
    except (ArrowException, ValueError, OverflowError) as error:  # such as a date out of range
        raise RowError(f"{shortened(field.name)}: {shortened(str(error), 200)}") from error
    return [bool(cell) for cell in cells] if re.search(r"binary(?!\w*:)", kind) else cells


READERS = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}

# ---- helpers ----------------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise SourceError(f"line {number} is longer than {MAX_LINE >> 20} MiB")
        yield number, line


def _whole(stream: BinaryIO, limit: int, remedy: str) -> bytes:
    content = stream.read(limit + 1)
    if len(content) > limit:
        raise SourceError(f"longer than {limit >> 20} MiB; {remedy}")
    return content


def _is_spread(text: str) -> bool:
    """Return whether an object, complete or not, covers several lines; a line that was cut off does not."""
    try:
        return "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return text.startswith(("{\n", "{\r\n"))


def _decode(content: bytes) -> Any:
    try:
        return _DECODER.decode(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise RowError(f"not JSON: {error.msg} ({line}column {error.colno})") from error
    except RecursionError as error:
        raise RowError(TOO_DEEP) from error
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from error


def _decode_within(value: Any, kind: Any) -> Any:
    """Decode what is JSON in a value of an Arrow type."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(kind):
        return {field.name: _decode_within(value[field.name], field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_decode_within(each, kind.value_type) for each in value]
    return _decode(value.encode()) if getattr(kind, "extension_name", "") == "arrow.json" else value


def _check_names(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise SourceError(f"the column '{_most_common(names)}' occurs twice")


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) < len(items):
        raise ValueError(f"the key '{_most_common([key for key, _ in items])}' occurs twice")
    return record


def _most_common(names: list[str]) -> str:
    return shortened(Counter(names).most_common(1)[0][0])


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
    return levels == 0 or any(is_too_deep(each, levels - 1) for each in inner)


def shortened(text: str, length: int = 40) -> str:
    """Shorten text of the data for a message: printable, on one line."""
    return printable(" ".join(text[:length].split()) + "…" * (len(text) > length))
