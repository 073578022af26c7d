"""Files as records, each with its place: what is read, and what cannot be, before anyone asks what it means."""

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

from dpo_cli.errors import RowError, UsageError, printable

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_LINE = 64 * 2**20  # bytes of one row: what is longer is a broken or a hostile file
MAX_WHOLE = 2**28  # bytes of a file that can only be read as a whole
MAX_DEPTH = 64  # of lists and objects in each other: what reads or writes a row later may recurse


@dataclass(frozen=True, slots=True)
class Source:
    """Something that gives records: a file."""

    name: str  # as it was typed
    path: Path

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield each record's place, as ``file:line``, and the record, or a RowError that says why there is none.

        Raises:
            UsageError: it is unreadable or empty.
        """
        count = 0
        try:
            for where, record in _read_records(self.path):
                count += 1
                yield where, RowError(_TOO_DEEP) if _too_deep(record) else record
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"--data {self.name}: cannot be read ({error})") from error
        if count == 0:
            raise UsageError(f"--data {self.name}: the file has no rows")


def find_sources(data: list[str]) -> list[Source]:
    """What ``--data`` names, in order.

    Raises:
        UsageError: it is missing, or of an unknown kind.
    """
    return [Source(file, _checked_path(file)) for file in data]


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
