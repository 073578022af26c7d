"""GGUF models converted to safetensors once and cached: a GGUF file takes ten times as long to load."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.loading import load_model, load_tokenizer, release
from dpo_cli.models.locate import ModelSource
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError
from dpo_cli.utils.files import atomic_dir, load_checksummed, sha256, with_checksum

# Increase it when the conversion changes.
CONVERSION_VERSION = 1
FOLDER, MANIFEST = "models", "copy.json"
LARGEST = 2**30  # bytes of a GGUF file whose weights are copied, which take up to eight times as much in float32


def use_converted(source: ModelSource, cache_dir: Path, weights: bool, reporter: Reporter) -> ModelSource:
    """Return the source of a GGUF model with its cached copy, which is made if there is none; others as they are.

    Tokenizer and config are a copy of their own, for commands that need no ``weights``. If a copy cannot be written, or
    would not compute the same, the GGUF file is read, with a warning.

    Raises:
        UsageError: the GGUF file cannot be loaded.
    """
    if not source.gguf:
        return source
    loaders = [version(name) for name in ("transformers", "tokenizers", "gguf")]
    file = Path(source.path, source.gguf)
    about = [CONVERSION_VERSION, loaders, sha256(file)]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    folder = cache_dir.expanduser() / FOLDER
    plain = ModelSource(source.path, source.base, source.description, gguf=source.gguf, trust=source.trust)
    try:
        if not source.tokenizer:
            source = replace(source, converted=_copy(folder / f"{key}-tokenizer", plain, _write_tokenizer, reporter))
        if weights and file.stat().st_size <= LARGEST:
            source = replace(source, weights=_copy(folder / f"{key}-weights", plain, _write_model, reporter))
    except NotWrittenError as error:
        reporter.warning(f"{error}; the model is read from its GGUF file, which takes longer")
    return source


def _copy(folder: Path, source: ModelSource, write: Callable[[ModelSource, Path], None], reporter: Reporter) -> Path:
    """Return the folder of a whole copy, made if it is missing or damaged."""
    if is_whole(folder):
        with suppress(OSError):
            os.utime(folder / MANIFEST)  # the time of its last use
        return folder
    if folder.exists():
        reporter.warning(f"{folder} is damaged; the GGUF file is converted again")
    else:
        reporter.info("", f"converting its GGUF file once, so that later starts are quick: {folder}")
    try:
        with atomic_dir(folder) as temporary:
            write(source, temporary)
            files = {file.name: sha256(file) for file in temporary.iterdir()}
            manifest = with_checksum({"model": source.base, "from": source.description, "files": files})
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except NotWrittenError:
        if not is_whole(folder):  # else another process was first
            raise
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a copy has the files that were written, unchanged, and no others."""
    try:
        files = load_checksummed((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        complete = {file.name for file in folder.iterdir()} == {*files, MANIFEST} and not folder.is_symlink()
        return complete and all(sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_tokenizer(source: ModelSource, folder: Path) -> None:
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    AutoConfig.from_pretrained(**source.arguments()).save_pretrained(folder)
    both = tokenizer, load_tokenizer(replace(source, converted=folder))
    one, other = ((each.backend_tokenizer.to_str(), each.special_tokens_map, each.chat_template) for each in both)
    if one != other:
        raise NotWrittenError(f"{source.gguf}: its tokenizer cannot be converted exactly")


def _write_model(source: ModelSource, folder: Path) -> None:
    model = load_model(source)
    model.save_pretrained(folder)
    began = _name(model)
    release(model)
    if _name(load_model(replace(source, weights=folder))) != began:
        raise NotWrittenError(f"{source.gguf}: its weights cannot be converted exactly")


def _name(model: PreTrainedModel) -> str:
    return fingerprint(model, hash_weights(model), "packed", torch.float32)


class Copy(NamedTuple):
    """One copy on disk."""

    folder: Path
    model: str
    bytes: int
    used: float  # seconds since the epoch


def kept(cache_dir: Path) -> list[Copy]:
    """List every copy in a cache."""
    copies = []
    for folder in sorted((cache_dir.expanduser() / FOLDER).glob(f"{'[0-9a-f]' * 32}-*")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is none, or was pruned meanwhile
            model = str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["model"])
            size = sum(file.stat().st_size for file in folder.iterdir())
            copies.append(Copy(folder, model, size, (folder / MANIFEST).stat().st_mtime))
    return copies
