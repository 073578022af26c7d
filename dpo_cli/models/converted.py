"""GGUF models converted to transformers' files once and cached: a GGUF file takes ten times as long to load."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.loading import load_model, load_tokenizer, release
from dpo_cli.models.locate import ModelSource
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError
from dpo_cli.utils.files import CACHED, atomic_dir, load_checksummed, sha256, with_checksum

# Increase it when the conversion changes.
CONVERSION_VERSION = 2
FOLDER, MANIFEST = CACHED["model"]
LARGEST = 2**30  # bytes of a GGUF file that is copied, which takes up to eight times as much in float32


def use_converted(source: ModelSource, cache_dir: Path, make: bool, reporter: Reporter) -> ModelSource:
    """Return the source of a GGUF model with its cached copy, if there is one; others as they are.

    ``make`` a missing or damaged one. If it cannot be written, or would not compute the same, the GGUF file is read,
    with a warning.

    Raises:
        UsageError: the GGUF file cannot be loaded.
    """
    if not source.gguf or (file := Path(source.path, source.gguf)).stat().st_size > LARGEST:
        return source
    about = [CONVERSION_VERSION, [version(name) for name in ("transformers", "tokenizers", "gguf")], sha256(file)]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    folder = cache_dir.expanduser() / FOLDER / name
    if is_whole(folder):
        with suppress(OSError):
            os.utime(folder / MANIFEST)  # the time of its last use
        return replace(source, converted=folder)
    if not make:
        return source
    if folder.exists():
        reporter.warning(f"{folder} is damaged; the GGUF file is converted again")
    reporter.info("", f"converting its GGUF file once, so that later starts are quick: {folder}")
    try:
        with atomic_dir(folder) as temporary:
            _convert(source, temporary)
            files = {path.name: sha256(path) for path in temporary.iterdir()}
            manifest = with_checksum({"model": source.base, "from": source.description, "files": files})
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except NotWrittenError as error:
        if not is_whole(folder):  # else another process was first
            reporter.warning(f"{error}; the model is read from its GGUF file, which takes longer")
            return source
    return replace(source, converted=folder)


def is_whole(folder: Path) -> bool:
    """Whether a copy has the files that were written, unchanged, and no others."""
    try:
        files = load_checksummed((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        complete = {file.name for file in folder.iterdir()} == {*files, MANIFEST} and not folder.is_symlink()
        return complete and all(sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(source: ModelSource, folder: Path) -> None:
    """Write tokenizer, configuration and weights, load them again, and refuse them if they are not the same."""
    plain = ModelSource(source.path, source.base, source.description, gguf=source.gguf, trust=source.trust)

    def described(tokenizer: Any, model: PreTrainedModel) -> tuple[str, ...]:
        specials = str((tokenizer.special_tokens_map, tokenizer.chat_template))
        weights = fingerprint(model, hash_weights(model), "packed", torch.float32)
        return weights, tokenizer.backend_tokenizer.to_str(), specials

    tokenizer, model = load_tokenizer(plain), load_model(plain)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    began, copy = described(tokenizer, model), replace(plain, converted=folder)
    release(model)
    if described(load_tokenizer(copy), load_model(copy)) != began:
        raise NotWrittenError(f"{source.gguf}: it cannot be converted exactly")
