"""Sources of records: what ``--data`` names as files, folders, stdin and data sets."""

from __future__ import annotations

import atexit
import gzip
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_cli.data.hub import is_path, is_saved, load_split
from dpo_cli.data.readers import (
    TOO_DEEP,
    Records,
    SourceError,
    is_too_deep,
    read_csv,
    read_json_array,
    read_json_lines,
    read_parquet,
    read_tables,
)
from dpo_cli.utils.errors import RowError, UsageError, name_beside

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
KINDS = f"{', '.join(SUFFIXES)}, each optionally with .gz"


class Source:
    """A source of records that can be read repeatedly.

    ``name`` is the option and its value, for messages; ``place`` begins the location of each record.
    """

    files: tuple[Path, ...] = ()  # whose content, read as ``kind``, defines the records; none: unknown
    kind = "jsonl"

    def __init__(self, name: str, place: str) -> None:
        self.name, self.place = name, place

    def _read(self) -> Records:
        raise NotImplementedError

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the location of each record, as ``file:line``, and the record, or a RowError if it cannot be read.

        Raises:
            UsageError: the source is unreadable or empty.
        """
        empty = True
        try:
            for where, record in self._read():
                empty = False
                yield f"{self.place}:{where}", RowError(TOO_DEEP) if is_too_deep(record) else record
        except SourceError as error:
            raise UsageError(f"{self.name}: {error}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.name}: cannot be read ({error})") from error
        if empty:
            raise UsageError(f"{self.name}: has no rows")


class FileSource(Source):
    """A file of one of ``SUFFIXES``."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, str(path))
        self.path, self.files = path, (path,)
        self.kind = path.name.removesuffix(".gz").rpartition(".")[2] + ".gz" * path.name.endswith(".gz")

    def _read(self) -> Records:
        kind = self.kind.removesuffix(".gz")
        readers = {"jsonl": read_json_lines, "json": read_json_array, "csv": read_csv}
        reader = readers.get(kind) or partial(read_parquet, path=self.path)
        with cast(BinaryIO, gzip.open(self.path) if kind != self.kind else self.path.open("rb")) as stream:
            yield from reader(stream)


class StdinSource(Source):
    """JSON lines from stdin."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "stdin")
        if sys.stdin is None or sys.stdin.closed:
            raise UsageError(f"{name}: stdin is closed")
        if sys.stdin.isatty():
            raise UsageError(f"{name}: stdin is a terminal; pipe JSON lines into the command")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(f"{name}: several processes cannot share stdin; name a file")

    def _read(self) -> Records:
        copy = _copy_of(sys.stdin.buffer)
        copy.seek(0)
        yield from read_json_lines(copy)


@cache
def _copy_of(stream: BinaryIO) -> BinaryIO:
    """Copy a stream that can be read only once to an unnamed temporary file."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (it is read again later)
    atexit.register(copy.close)
    shutil.copyfileobj(stream, copy)
    return cast(BinaryIO, copy)


class DatasetSource(Source):
    """A split of a data set of the hub, or of a ``folder`` that ``save_to_disk`` wrote; loaded on first use."""

    def __init__(self, name: str, dataset: str, config: str | None, split: str | None, folder: Path | None) -> None:
        super().__init__(name, dataset)
        self._arguments = dataset, config, split, folder

    @cached_property
    def _dataset(self) -> Any:
        self.place, dataset = load_split(self.name, *self._arguments)
        return dataset

    @property
    def files(self) -> tuple[Path, ...]:  # type: ignore[override]
        """The files of the split; none if it is in memory."""
        return tuple(Path(file["filename"]) for file in self._dataset.cache_files)

    @property
    def kind(self) -> str:  # type: ignore[override]
        """What defines the rows besides the files."""
        return f"{self._dataset.num_rows} rows of {self._dataset.features}"

    def _read(self) -> Records:
        from pyarrow import ArrowException

        try:
            yield from read_tables(self._batches())
        except (ArrowException, ValueError) as error:
            raise SourceError(f"the data set cannot be read ({error})") from error

    def _batches(self) -> Iterator[Any]:
        """Yield small Arrow tables, without binary columns such as images."""
        schema = self._dataset.features.arrow_schema
        columns = [field.name for field in schema if not re.search(r"binary(?!\w*:)", str(field.type))]
        for table in self._dataset.with_format("arrow", columns=columns).iter(batch_size=128):
            table.validate(full=True)  # memory-mapped files may be damaged
            yield table


# ---- names ------------------------------------------------------------------------------------------------------


def find_sources(data: list[str], option: str = "--data") -> list[Source]:
    """Return the sources that an option names, in order; data sets are not loaded yet.

    Raises:
        UsageError: a name stands for nothing that can be read.
    """
    return [source for typed in data for source in _sources(typed, f"{option} {typed}")]


# ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG/SPLIT
_HUB = re.compile(r"([a-z0-9][\w.-]*/[\w.-]+)(?::(?:([\w.-]+)/)?(\w+(?:\.\w+)*))?", re.ASCII | re.IGNORECASE)


def _sources(typed: str, name: str) -> list[Source]:
    if typed == "-":
        return [StdinSource(name)]
    if path := _existing(typed):
        if not path.is_dir():
            if not _is_known(path.name):
                raise UsageError(f"{name}: unknown kind of file; use {KINDS}")
            return [FileSource(name, path)]
        return [DatasetSource(name, typed, None, None, path)] if is_saved(path) else _folder(path, name)
    folder, _, split = typed.rpartition(":")
    if (path := _existing(folder)) and is_saved(path):
        return [DatasetSource(name, folder, None, split, path)]
    if not (match := _hub_match(typed)):
        raise UsageError(f"{name}: no such file{name_beside(Path(typed))}")
    dataset, config, split = match.groups()
    return [DatasetSource(name, dataset, config, split, None)]


def _folder(path: Path, name: str) -> list[Source]:
    """Return the files of a known kind in a folder, by name."""
    try:
        files = sorted(p for p in path.iterdir() if _is_known(p.name) and not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error})") from error
    if not files:
        raise UsageError(f"{name}: the folder has no file to read; looked for {KINDS}")
    return [FileSource(f"{name.rstrip('/')}/{file.name}", file) for file in files]


def hub_id(typed: str) -> str | None:
    """Return the name of the hub data set that an option names, or None for local data."""
    match = _hub_match(typed)
    return match[1] if match else None


def _hub_match(typed: str) -> re.Match[str] | None:
    match = _HUB.fullmatch(typed)
    if not match or _existing(typed) or _existing(typed.rpartition(":")[0]):
        return None
    # A name that begins with an existing folder can only be meant as a path.
    is_local = _is_known(match[1]) or is_path(match[1]) or Path(match[1].partition("/")[0]).is_dir()
    return None if is_local else match


def _existing(typed: str) -> Path | None:
    try:
        path = Path(typed).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError):  # also an unknown user, or an impossible name
        return None
    return path if typed else None


def _is_known(file: str) -> bool:
    return file.removesuffix(".gz").endswith(SUFFIXES)
