"""What ``--data`` names as records with their places, and what cannot be read, before anyone asks what it means."""

from __future__ import annotations

import atexit
import csv
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_cli.data.hub import Split, hub_split, is_path, is_saved, saved_split
from dpo_cli.data.tables import table_records
from dpo_cli.utils.errors import RowError, UsageError, name_beside, printable

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
PACKED = (".gz", ".zst")
MAX_LINE = 64 * 2**20  # bytes of one row: what is longer is a broken or a hostile file
MAX_WHOLE = 2**28  # bytes of a file that can only be read as a whole
MAX_DEPTH = 64  # of lists and objects in each other: what reads or writes a row later may recurse


class SourceError(Exception):
    """The reason why a source cannot be read, without its name."""


@dataclass(frozen=True, slots=True)
class Source:
    """Something that gives records, as often as it is asked: a file, a split of a data set, stdin."""

    name: str  # the option and what was typed, to begin a message with
    place: str  # what the places of its records begin with
    files: tuple[Path, ...]  # whose content, read as ``kind``, is the records; none: that is not known
    kind: str
    read: Callable[[], Iterator[tuple[str, Any]]]  # gives ``LINE`` or ``row N``, and a record or a RowError

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield each record's place, as ``file:line``, and the record, or a RowError that says why there is none.

        Raises:
            UsageError: it is unreadable or empty.
        """
        count = 0
        try:
            for where, record in self.read():
                count += 1
                yield f"{self.place}:{where}", RowError(_TOO_DEEP) if _too_deep(record) else record
        except SourceError as error:
            raise UsageError(f"{self.name}: {error}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.name}: cannot be read ({error})") from error
        if count == 0:
            raise UsageError(f"{self.name}: has no rows")


# ---- what a name stands for -------------------------------------------------------------------------------------


def find_sources(data: list[str], option: str = "--data") -> list[Source]:
    """What an option names, in order: files, folders of files, saved data sets, ``-`` for stdin, data sets of the hub.

    Raises:
        UsageError: it is missing, of an unknown kind, or a data set that cannot be loaded.
    """
    return [source for typed in data for source in _sources(typed, option)()]


def check_sources(data: list[str], option: str = "--data") -> None:
    """Refuse what cannot be, without loading a library or a data set.

    Raises:
        UsageError: it is missing, or of an unknown kind.
    """
    for typed in data:
        _sources(typed, option)


# ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG/SPLIT
_HUB = re.compile(r"([a-z0-9][\w.-]*/[\w.-]+)(?::(?:([\w.-]+)/)?(\w+(?:\.\w+)*))?", re.ASCII | re.IGNORECASE)


def _sources(typed: str, option: str) -> Callable[[], list[Source]]:
    """What gives the sources that a name stands for; only data sets are left to be loaded by it.

    Raises:
        UsageError: there is no such thing.
    """
    name = f"{option} {typed}"
    if typed == "-":
        stdin = _stdin(name)
        return lambda: [stdin]
    path, why = _found(typed)
    if path and path.is_dir():
        if is_saved(path):
            return lambda: [_split(saved_split(path, None, name), name, str(path))]
        files = _folder(path, name)
        return lambda: files
    if path:
        if not _is_known(path.name):
            raise UsageError(f"{name}: unknown kind of file; use {_KINDS}")
        return lambda: [_file(path, name)]
    before, _, split = typed.rpartition(":")
    folder = _found(before)[0] if before else None
    if folder and is_saved(folder):
        return lambda: [_split(saved_split(folder, split, name), name, str(folder))]
    match = _HUB.fullmatch(typed)
    if folder or not match or _is_known(match[1]) or _is_here(match[1]):
        raise UsageError(f"{name}: no such file ({why}){name_beside(Path(typed))}")
    dataset, config, split = match.groups()
    return lambda: [_split(hub_split(dataset, config, split, name), name, dataset)]


def hub_id(typed: str) -> str | None:
    """The data set of the hub that an option names; None of what lies on this disk or comes from stdin."""
    match = _HUB.fullmatch(typed)
    local = [typed, typed.rpartition(":")[0]]
    here = not match or _is_known(match[1]) or _is_here(match[1]) or any(n and _found(n)[0] for n in local)
    return None if here or not match else match[1]


def _is_here(name: str) -> bool:
    """Whether a name can only be meant as a path: also where it begins with a folder that is there."""
    return is_path(name) or Path(name.partition("/")[0]).is_dir()


def _found(typed: str) -> tuple[Path | None, str]:
    """The file or folder of that name; where there is none, why."""
    try:
        path = Path(typed).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # also a user or a name that cannot be
        return None, str(error)
    return path, ""


_KINDS = f"{', '.join(SUFFIXES)}, each also {' or '.join(PACKED)}"


def _is_known(file: str) -> bool:
    return _unpacked(file)[0].endswith(SUFFIXES)


def _unpacked(file: str) -> tuple[str, str]:
    """A file's name without how it is packed, and that."""
    packing = next((suffix for suffix in PACKED if file.endswith(suffix)), "")
    return file.removesuffix(packing), packing


def _file(path: Path, name: str) -> Source:
    unpacked, packing = _unpacked(path.name)
    kind = unpacked.rpartition(".")[2]
    return Source(name, str(path), (path,), kind + packing, partial(_read_file, path, kind, packing))


def _folder(path: Path, name: str) -> list[Source]:
    """The folder's own files of a known kind, by name."""
    try:
        found = sorted(p for p in path.iterdir() if _is_known(p.name) and not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error})") from error
    if not found:
        raise UsageError(f"{name}: the folder has no file to read; looked for {_KINDS}")
    return [_file(file, f"{name.rstrip('/')}/{file.name}") for file in found]


def _split(split: Split, name: str, dataset: str) -> Source:
    place = f"{dataset}:{split.name}" if split.name else dataset
    return Source(name, place, split.files, split.kind, partial(_read_split, split))


def _stdin(name: str) -> Source:
    """JSON lines from stdin; never kept, for nobody knows what they will be next time."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"{name}: stdin is closed")
    if sys.stdin.isatty():
        raise UsageError(f"{name}: stdin is a terminal; pipe JSON lines into the command")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{name}: several processes cannot share stdin; name a file")
    return Source(name, "stdin", (), "jsonl", partial(_read_stream, sys.stdin.buffer))


def _read_stream(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    copy = _copy(stream)
    copy.seek(0)
    yield from _read_json_lines(copy)


@cache
def _copy(stream: BinaryIO) -> BinaryIO:
    """All of a stream that can be read once, in a file that has no name and goes with the process."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (it is read again later)
    atexit.register(copy.close)
    shutil.copyfileobj(stream, copy)
    return cast(BinaryIO, copy)


# ---- records ----------------------------------------------------------------------------------------------------

_TOO_LONG = f"longer than {MAX_LINE >> 20} MiB"
_TOO_DEEP = "nested too deeply"
_NO_END = "not JSON: the array has no end"
REST = "; the rest of the file is not read"


def _read_file(path: Path, kind: str, packing: str) -> Iterator[tuple[str, Any]]:
    with _opened(path, packing) as stream:
        if kind == "parquet":
            yield from _read_parquet(_whole(stream) if packing else path)
        else:
            yield from {"jsonl": _read_json_lines, "json": _read_json_array, "csv": _read_csv}[kind](stream)


def _opened(path: Path, packing: str) -> BinaryIO:
    """The file's bytes, unpacked as they are read."""
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if packing == ".zst":
        from pyarrow import CompressedInputStream

        return BufferedReader(CompressedInputStream(path.open("rb"), "zstd"), 2**16)
    return path.open("rb")


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Every line; None for one that is longer than MAX_LINE, which is passed over in pieces."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) <= MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
        yield None


def _whole(stream: BinaryIO) -> BytesIO:
    content = BytesIO()
    while piece := stream.read(2**20):
        content.write(piece)
        if content.tell() > MAX_WHOLE:
            raise SourceError(f"longer than {MAX_WHOLE >> 20:,} MiB; write it as .jsonl")
    return content


def _read_json_lines(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(stream), 1):
        if line is None:
            yield str(number), RowError(_TOO_LONG)
        elif line.strip() not in (b"", b"\xef\xbb\xbf"):
            yield str(number), _json_line(line, "utf-8-sig" if number == 1 else "utf-8")


def _json_line(line: bytes, encoding: str) -> Any:
    """The line's value or a RowError."""
    try:
        return _DECODER.decode(line.rstrip(b"\r\n").decode(encoding))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return RowError(_json_reason(error))


def _read_json_array(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Elements of one array, decoded one at a time so that each knows its line."""
    try:
        text = _whole(stream).getvalue().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"not UTF-8 (byte {error.start + 1})") from error
    start = _skip_space(text, 0)
    if start == len(text):
        return
    if text[start] != "[":
        raise SourceError("must be one array of rows; for one object a line, name it .jsonl")
    places = _Places(text)
    start = _skip_space(text, start + 1)
    if not text.startswith("]", start):
        while True:
            try:
                record, end = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:  # past a broken element nothing can be told apart
                place = error.pos if isinstance(error, json.JSONDecodeError) else start
                reason = _json_reason(error) if start < len(text) else _NO_END
                yield places.where(place), RowError(reason + REST)
                return
            yield places.where(start), record
            start = _skip_space(text, end)
            if not text.startswith(",", start):
                break
            start = _skip_space(text, start + 1)
    if not text.startswith("]", start):
        reason = "not JSON: Expecting ',' or ']' after a row" if start < len(text) else _NO_END
        yield places.where(start), RowError(reason + REST)
    elif _skip_space(text, start + 1) < len(text):
        yield places.where(start + 1), RowError("not JSON: something follows the array" + REST)


class _Places:
    """Places in a text, asked for from the first to the last: lines, or numbers where the text is one line."""

    def __init__(self, text: str) -> None:
        self.text, self.counted, self.line, self.asked = text, 0, 1, 0
        self.of_one_line = "\n" not in text.strip()

    def where(self, place: int) -> str:
        self.line += self.text.count("\n", self.counted, place)
        self.counted = place
        self.asked += 1
        return f"row {self.asked}" if self.of_one_line else str(self.line)


def _read_csv(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
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
        _check_names(names)
        if len(names) == 1 and (separator := next((each for each in ";\t|" if each in names[0]), None)):
            raise SourceError(
                f"the only column is '{shortened(names[0])}': write {separator!r} between cells as a comma"
            )
        first, held = reader.line_num + 1, 0
        for cells in reader:
            if len(cells) > len(names):
                yield str(first), RowError(f"{len(cells)} cells under {len(names)} column names")
            elif cells:
                yield str(first), dict(zip(names, cells, strict=False))
            first, held = reader.line_num + 1, 0
    except (csv.Error, UnicodeDecodeError) as error:
        yield str(first), RowError(f"not CSV in UTF-8: {error}{REST}")


def _read_parquet(source: Path | BytesIO) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            _check_names(file.schema_arrow.names)
            yield from table_records(file.iter_batches(128))  # few: a small file may hold a long text for many rows
    except (ArrowException, ValueError) as error:
        raise SourceError(f"not a readable parquet file ({error})") from error


def _read_split(split: Split) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException

    try:
        yield from table_records(split.batches())
    except (ArrowException, ValueError) as error:
        raise SourceError(f"the data set cannot be read ({error})") from error


def _check_names(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise SourceError(f"the column '{_twice(names)}' is there twice")


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


def json_value(text: str) -> Any:
    """The value of a text that is JSON; None of any other, of JSON's null too."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


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
