"""Files and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; it takes the name ``path`` when the block ends well, else it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; one that is there already gives way when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
    try:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            _settle(each)
        old = temporary.with_suffix(".old.tmp")
        if path.is_dir():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    with whole_file(file) as temporary:
        temporary.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON, with null for every number that JSON has no word for."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing below ``folder`` left behind."""
    for left in list(folder.rglob(".*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def sha256(path: Path) -> str:
    """Content hash of a file (hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _settle(path: Path) -> None:
    """Bring a file or folder to disk, with the mode any new one gets: temporary ones and safetensors' are private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
