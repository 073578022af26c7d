"""Cache of tokenized pairs: data that was tokenized once is read back.

One safetensors file per source, named by a hash of everything that defines its pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import BadRow, Reading, read_rows
from dpo_cli.data.sources import Source
from dpo_cli.data.tokenize import PairSet, only_asks_its_backend, tokenize_rows
from dpo_cli.utils.errors import NotWrittenError
from dpo_cli.utils.files import atomic_write, sha256, to_json

# Increase it when the same row and tokenizer give another pair, note or reason than before.
TOKENIZING_VERSION = 4
FOLDER, SUFFIX = "pairs", ".safetensors"
SMALL_BYTES = 2**19  # a smaller source is tokenized in less than half a second and is not cached
ARRAYS = ("ids", "lengths", "terms", "about")


class TokenCache:
    """Tokenizes sources with one tokenizer, and caches the pairs below ``cache_dir``.

    With ``remember=False`` nothing is written. A cache that cannot be written is not an error.
    """

    def __init__(
        self, cache_dir: Path, tokenizer: Any, reading: Reading, warn: Callable[[str], None], remember: bool = True
    ) -> None:
        self.folder = cache_dir.expanduser() / FOLDER
        self.tokenizer, self.reading, self.warn, self.remember = tokenizer, reading, warn, remember
        self.fingerprint = _fingerprint(tokenizer, reading)

    def tokenize(self, source: Source, keep_refused: bool) -> tuple[PairSet, bool]:
        """Return the source's pairs and refused rows, with their records if kept; and whether they were cached.

        Raises:
            UsageError: as ``read_rows``.
        """
        key = self._key(source)
        file = self.folder / f"{key}{SUFFIX}"
        if key and file.is_file() and (cached := self._load(file, source.place)):
            return cached, True
        rows = read_rows([source], self.reading.columns, self.reading.format)
        result = tokenize_rows(rows, self.tokenizer, self.reading, keep_refused)
        is_complete = result.pairs and (keep_refused or not result.refused)
        if self.remember and is_complete and key and key == self._key(source):  # else it changed meanwhile
            with suppress(NotWrittenError):
                _save(file, result, source.place)
        return result, False

    def _key(self, source: Source) -> str | None:
        """Hash everything that defines the source's pairs; None if it is small, or not in plain files."""
        try:
            if self.fingerprint is None or not source.files or not all(file.is_file() for file in source.files):
                return None
            if sum(file.stat().st_size for file in source.files) < SMALL_BYTES:
                return None
            content = [self.fingerprint, source.kind, *map(sha256, source.files)]
        except (OSError, ValueError):
            return None
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _load(self, file: Path, place: str) -> PairSet | None:
        try:
            arrays, about = _read(file)
        except (OSError, ValueError) as error:
            self.warn(f"{file} is ignored: {error}; {place} is tokenized again")
            return None
        with suppress(OSError):
            os.utime(file)  # last used now
        pairs = Pairs.from_arrays(**arrays, where=[place + where for where in about["where"]])
        refused = [BadRow(place + where, reason, record) for where, reason, record in about["refused"]]
        return PairSet(pairs, refused, Counter(about["formats"]), Counter(about["notes"]))


def _fingerprint(tokenizer: Any, reading: Reading) -> str | None:
    """Hash everything besides the data that defines a pair; None if the tokenizer runs code that cannot be hashed."""
    template = json.dumps(tokenizer.chat_template)
    if not only_asks_its_backend(tokenizer) or "strftime_now" in template:  # writes today's date
        return None
    tokenizer("a")  # turns off truncation and padding, which an earlier call may have left on
    about = [
        TOKENIZING_VERSION,
        [version(name) for name in ("tokenizers", "transformers", "jinja2")],
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        template,
        tokenizer.special_tokens_map,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.split_special_tokens,
        dataclasses.astuple(reading),
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _save(file: Path, result: PairSet, place: str) -> None:
    """Write the pairs of the source whose locations begin with ``place``, which itself is not stored.

    Raises:
        NotWrittenError: nothing was written.
    """
    about = {
        "where": [where.removeprefix(place) for where in result.pairs.where],
        "formats": result.formats,
        "notes": result.notes,
        "refused": [[bad.where.removeprefix(place), bad.reason, bad.record] for bad in result.refused],
    }
    pairs = result.pairs
    arrays: dict[str, npt.NDArray[Any]] = {"ids": pairs.ids, "lengths": pairs.lengths, "terms": pairs.terms}
    arrays["about"] = np.frombuffer(to_json(about).encode(), np.uint8)
    with atomic_write(file) as temporary:
        save_file(arrays, temporary, {"digest": _digest(file.stem, arrays)})


def _digest(key: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    content = hashlib.sha256(key.encode())
    for name in ARRAYS:
        content.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        content.update(np.ascontiguousarray(arrays[name]).data)
    return content.hexdigest()


def _read(file: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read the arrays and the description of a cached file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of other data.
    """
    try:
        with safe_open(file, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in ARRAYS}
            digest = (opened.metadata() or {}).get("digest")
    except SafetensorError as error:
        raise ValueError("it is damaged") from error
    if digest != _digest(file.stem, arrays):
        raise ValueError("it is damaged")
    about = arrays.pop("about")
    return arrays, json.loads(about.tobytes())


def check_file(file: Path) -> None:
    """Check the content of a cached file against its digest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    _read(file)


def cached_files(cache_dir: Path) -> dict[Path, os.stat_result]:
    """Return every cached file, with its size and when it was last used."""
    files = {}
    for file in sorted((cache_dir.expanduser() / FOLDER).glob(f"{'[0-9a-f]' * 32}{SUFFIX}")):
        with suppress(FileNotFoundError):  # pruned meanwhile
            files[file] = file.stat()
    return files


def merge(parts: Sequence[PairSet]) -> PairSet:
    """Join the pairs of several sources."""
    if len(parts) == 1:
        return parts[0]
    whole = PairSet()
    for part in parts:
        whole.pairs.extend(part.pairs)
        whole.refused += part.refused
        whole.formats += part.formats
        whole.notes += part.notes
    return whole
