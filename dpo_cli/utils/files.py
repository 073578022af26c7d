"""Files and folders that are whole or absent, and locks that die with their holder."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cli.utils.errors import NotWrittenError, UsageError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; it takes the name ``path`` when the block ends well, else it is gone.

    Raises:
        NotWrittenError: the disk is full or the folder is closed; ``path`` is as it was.
    """
    with writing(path), _temporary(path, _new_file) as temporary:
        yield temporary
        _settle(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def atomic_dir(path: Path, new: bool = False) -> Iterator[Path]:
    """The same for a folder; one that is there already gives way when the new one is whole, or is an error if ``new``.

    Of several processes that make one ``new`` folder only the first does.
    """
    with writing(path), _temporary(path, tempfile.mkdtemp) as temporary:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            _settle(each)
        old = temporary.with_suffix(".old.tmp")
        if path.is_dir() and not new:
            path.rename(old)
        temporary.rename(path)  # fails on a folder that holds something
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _temporary(path: Path, make: Callable[[str, str, Path], str]) -> Iterator[Path]:
    """A new temporary file or folder beside ``path``, locked so that it is not taken for a dead process's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
    while True:
        temporary = Path(make(".tmp", f".{path.name}.", path.parent))
        with suppress(FileNotFoundError):  # another process swept it before it was locked
            lock = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                break
            os.close(lock)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock)


def _new_file(suffix: str, prefix: str, folder: Path) -> str:
    descriptor, name = tempfile.mkstemp(suffix, prefix, folder)
    os.close(descriptor)
    return name


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file when the system refuses to write it: its own message often does not.

    Raises:
        NotWrittenError: in place of the system's error, also where a library words it as one of its own.
    """
    try:
        yield
    except Exception as error:
        in_words = re.search(r"([^:]*) \(os error \d+\)", str(error))  # how the Rust libraries pass it on
        if not isinstance(error, OSError) and not in_words:
            raise
        reason = in_words[1].strip() if in_words else (error.strerror if isinstance(error, OSError) else None) or error
        raise NotWrittenError(f"{path} cannot be written: {reason}") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    with atomic_write(file) as temporary:
        temporary.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a hash of itself, so that damage and edits are noticed."""
    return content | {"sha256": _digest(content)}


def load_checksummed(text: str) -> dict[str, Any]:
    """The content of a sealed JSON file.

    Raises:
        ValueError: it is not what was written.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError("it is not as it was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON, with null for every number that JSON has no word for."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold a lock file while the block runs. The system lets go of it when the process ends, however it ends.

    Raises:
        UsageError: another process holds it; the message says which.
    """
    with writing(file):
        lock = _open_lock(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)


def _open_lock(file: Path) -> int:
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
            os.close(lock)
            raise UsageError(f"{file.parent} is in use by {holder or 'another process'}") from error
        except OSError:  # a file system without locks
            pass
        if os.fstat(lock).st_nlink:  # else its holder removed it just before the lock was ours
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return lock
        os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing below ``folder`` left; what one is writing now stays."""
    _sweep(folder.rglob(".*.tmp"))


def _sweep(temporaries: Iterable[Path]) -> None:
    for left in list(temporaries):
        with suppress(OSError):  # locked, gone, or not ours to remove
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Content hash of a file (hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _settle(path: Path) -> None:
    """Bring a file or folder to disk, with the mode any new one gets: temporary ones and safetensors' are private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
