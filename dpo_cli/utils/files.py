"""Files and folders that are whole or absent, locks, checksums, JSON."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cli.utils.errors import NotWrittenError, UsageError

try:
    import fcntl
except ModuleNotFoundError as error:
    raise UsageError("Windows cannot lock files as runs need it; use WSL, the Windows Subsystem for Linux") from error

LOCK = "run.lock"  # in the folder of a run
DAY = 86_400  # seconds: no process writes one file or folder for as long
# Per kind of cache entry: its folder below --cache-dir, and the file in it that names the model.
CACHED = {"reference": ("reference", "about.json"), "model": ("models", "copy.json")}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write; it takes the name ``path`` if the block succeeds, else it is removed.

    Raises:
        NotWrittenError: the disk is full or the folder is closed; ``path`` is unchanged.
    """
    with _temporary(path) as temporary:
        yield temporary
        _sync_with_mode(temporary)
        temporary.replace(path)


@contextmanager
def atomic_dir(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill, as ``atomic_write``; it replaces an existing one, or with ``new`` fails.

    If several processes make one ``new`` folder only the first succeeds.
    """
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            _sync_with_mode(each)
        old = temporary.with_name(".old")
        if path.is_dir() and not new:
            path.rename(old)
        try:
            temporary.rename(path)  # fails on a folder that is not empty
        except BaseException:
            if old.is_dir():
                old.rename(path)
            raise


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name in a new folder beside ``path``, which is removed at the end with all that is left in it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            _remove(leftover, DAY)
        folder = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        try:
            yield folder / path.name
            sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file if the system refuses to write it: its own message often does not.

    Raises:
        NotWrittenError: instead of the system's error, also where a library rewords it.
    """
    try:
        yield
    except Exception as error:
        rust = re.search(r"([^:]*) \(os error \d+\)", str(error))  # how the Rust libraries reword it
        if not isinstance(error, OSError) and not rust:
            raise
        reason = rust[1].strip() if rust else (error.strerror if isinstance(error, OSError) else None) or error
        raise NotWrittenError(f"{path} cannot be written: {reason}") from error


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove temporary folders that killed processes left below a folder; ``older_than`` in seconds."""
    for parent, names, _ in os.walk(folder):  # which passes over a folder that vanishes meanwhile, as glob does not
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                _remove(Path(parent, name), older_than)


def _remove(folder: Path, older_than: float) -> None:
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime >= older_than:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold a lock file. The system releases it when the process ends, however it ends.

    Raises:
        UsageError: another process holds it.
    """
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{file.parent} is in use by another process") from None
        if not os.fstat(descriptor).st_nlink:  # its holder removed the file just before the lock
            raise UsageError(f"{file.parent} was in use by another process; try again")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def refuse_existing(folder: Path) -> None:
    """Refuse the folder of a new run if it exists, and say whether another process is using it."""
    if folder.exists():
        if (folder / LOCK).is_file():
            with file_lock(folder / LOCK):
                pass
        raise UsageError(f"--output {folder}: exists; choose another, or for a run use --resume {folder}")


def append_line(path: Path, line: str) -> None:
    """Append a line and sync it; whole where other processes append too, or where the last line has no end.

    Raises:
        NotWrittenError: the system refuses it.
    """
    with writing(path), path.open("ab+") as stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        begin = b"" if stream.read() in (b"", b"\n") else b"\n"
        stream.write(begin + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def sha256(path: Path) -> str:
    """Hash the content of a file (hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_with_mode(path: Path) -> None:
    """Sync a file or folder, with the mode of any new one: files of safetensors are private."""
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


# ---- JSON -------------------------------------------------------------------------------------------------------


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    with atomic_write(file) as temporary:
        temporary.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Add a hash of the content to it, so that damage and edits are noticed."""
    return content | {"sha256": _digest(content)}


def load_checksummed(text: str) -> dict[str, Any]:
    """Parse JSON that ``with_checksum`` made.

    Raises:
        ValueError: it was changed.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise ValueError("its content was changed")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_json(value: Any, indent: int | None = None) -> str:
    """Format a value as JSON, with null for NaN and infinities."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
