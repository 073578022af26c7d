"""Sources of records: what ``--data`` names as files, folders, stdin and data sets."""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from dpo_cli.data.hub import is_path, is_saved, load_split
from dpo_cli.data.readers import (
    TOO_DEEP,
    Records,
    SourceError,
    is_too_deep,
    read_csv,
    read_json,
    read_json_lines,
    read_parquet,
    read_tables,
)
from dpo_cli.utils.errors import RowError, UsageError, name_beside

READERS = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet, ".csv": read_csv}
KINDS = f"{', '.join(READERS)}, each optionally with .gz"


@dataclass(frozen=True)
class Source:
    """A source of records that can be read repeatedly.

    ``name`` is the option and its value, for messages; ``place`` begins the location of each record.
    """

    name: str
    place: str
    read: Callable[[], Records]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the location of each record, as ``file:line``, and the record, or a RowError if it cannot be read.

        Raises:
            UsageError: the source is unreadable or empty.
        """
        empty = True
        try:
            for where, record in self.read():
                empty = False
                yield f"{self.place}:{where}", RowError(TOO_DEEP) if is_too_deep(record) else record
        except SourceError as error:
            raise UsageError(f"{self.name}: {error}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.name}: cannot be read ({error})") from error
        if empty:
            raise UsageError(f"{self.name}: has no rows")


def _read_file(path: Path) -> Records:
    name = path.name.removesuffix(".gz")
    reader = next(reader for suffix, reader in READERS.items() if name.endswith(suffix))
    with path.open("rb") if name == path.name else gzip.open(path) as stream:
        yield from reader(stream)  # type: ignore[arg-type]  # gzip's files are binary streams too


def _read_stdin() -> Records:
    return read_json_lines(io.BytesIO(_stdin_content(sys.stdin)))


@cache
def _stdin_content(stdin: Any) -> bytes:
    content: bytes = stdin.buffer.read()  # once: a later reading would find nothing
    return content


def _read_data_set(name: str, dataset: str, config: str | None, split: str | None, folder: Path | None) -> Records:
    from pyarrow import ArrowException

    split, rows = load_split(name, dataset, config, split, folder)
    begin = "/".join(filter(None, (config, split)))
    try:
        for where, record in read_tables(rows.with_format("arrow").iter(batch_size=128), is_mapped=True):
            yield f"{begin}:{where}" if begin else where, record
    except (ArrowException, ValueError, OverflowError) as error:
        raise SourceError(f"the data set cannot be read ({error})") from error


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
        return [_stdin(name)]
    if path := _existing(typed):
        if not path.is_dir():
            if not _is_known(path.name):
                raise UsageError(f"{name}: unknown kind of file; use {KINDS}")
            return [Source(name, str(path), partial(_read_file, path))]
        return [_data_set(name, typed, None, None, path)] if is_saved(path) else _folder(path, name)
    folder, _, split = typed.rpartition(":")
    if (path := _existing(folder)) and is_saved(path):
        return [_data_set(name, folder, None, split, path)]
    if not (match := _hub_match(typed)):
        raise UsageError(f"{name}: no such file{name_beside(Path(typed))}")
    dataset, config, split = match.groups()
    return [_data_set(name, dataset, config, split, None)]


def _stdin(name: str) -> Source:
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"{name}: stdin is closed")
    if sys.stdin.isatty():
        raise UsageError(f"{name}: stdin is a terminal; pipe JSON lines into the command")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{name}: several processes cannot share stdin; name a file")
    return Source(name, "stdin", _read_stdin)


def _data_set(name: str, dataset: str, config: str | None, split: str | None, folder: Path | None) -> Source:
    """Return a split of a data set of the hub, or of a ``folder`` that ``save_to_disk`` wrote."""
    return Source(name, dataset, partial(_read_data_set, name, dataset, config, split, folder))


def _folder(path: Path, name: str) -> list[Source]:
    """Return the files of a known kind in a folder, by name."""
    try:
        files = sorted(p for p in path.iterdir() if _is_known(p.name) and not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error})") from error
    if not files:
        raise UsageError(f"{name}: the folder has no file to read; looked for {KINDS}")
    return [Source(f"{name.rstrip('/')}/{file.name}", str(file), partial(_read_file, file)) for file in files]


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
    return file.removesuffix(".gz").endswith(tuple(READERS))
