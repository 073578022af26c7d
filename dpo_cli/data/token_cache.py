"""The pairs of earlier starts, kept by content: data that was tokenized once is read back instead.

One file a source, with nothing in it that can run. Its name is the key, which is a hash of all that decides a pair,
and the hash of its own content.

Legend: P pairs, N token ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import BadRow, Reading, read_rows
from dpo_cli.data.sources import Source
from dpo_cli.data.tokenize import PairSet, only_asks_its_backend, tokenize_rows
from dpo_cli.utils.errors import NotWrittenError
from dpo_cli.utils.files import atomic_write, sha256, to_json

# Raise it when the same row and tokenizer give another pair, note or reason than before.
TOKENIZING_VERSION = 3
FOLDER, SUFFIX = "pairs", ".safetensors"
SMALL_BYTES = 2**19  # a source below this is tokenized in less than half a second: not worth a file


class Tokenized:
    """Sources as pairs of one tokenizer and one way to cut them, from ``cache_dir`` where they are there.

    ``remember`` lets new ones be written there; where that cannot be done they are tokenized again next time.
    """

    def __init__(
        self,
        cache_dir: Path,
        tokenizer: Any,
        reading: Reading,
        warn: Callable[[str], None],
        remember: bool = True,
    ) -> None:
        self.folder = cache_dir.expanduser() / FOLDER
        self.tokenizer, self.reading = tokenizer, reading
        self.warn, self.remember = warn, remember
        self.how = _fingerprint(tokenizer, reading)

    def read(self, source: Source, keep_refused: bool) -> tuple[PairSet, bool]:
        """The source's pairs and refused rows, the latter whole if kept; and whether they were read back.

        Raises:
            UsageError: as ``read_rows``.
        """
        key = self._key(source)
        if key and (found := self._look_up(key, source.place)):
            return found, True
        rows = read_rows([source], self.reading.columns, self.reading.format)
        found = tokenize_rows(rows, self.tokenizer, self.reading, keep_refused)
        usable = found.pairs and (keep_refused or not found.refused)
        if self.remember and usable and key and key == self._key(source):  # else it changed meanwhile
            with suppress(NotWrittenError):
                _write(self.folder, key, found, source.place)
        return found, False

    def _key(self, source: Source) -> str | None:
        """Hash of all that decides the source's pairs; None where it is small or does not lie in plain files."""
        try:
            if self.how is None or not source.files or not all(file.is_file() for file in source.files):
                return None
            if sum(file.stat().st_size for file in source.files) < SMALL_BYTES:
                return None
            content = [self.how, source.kind, *map(sha256, source.files)]
        except (OSError, ValueError):
            return None
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def _look_up(self, key: str, place: str) -> PairSet | None:
        for file in sorted(self.folder.glob(f"{key}-*{SUFFIX}")):
            try:
                found = _read(file, place)
            except (OSError, ValueError) as error:
                self.warn(f"{file} is ignored: {error}; {place} is tokenized anew")
                continue
            with suppress(OSError):
                os.utime(file)  # when it was last used
            return found
        return None


def _fingerprint(tokenizer: Any, reading: Reading) -> str | None:
    """Hash of all beside the data that decides a pair; None where that cannot be told from outside."""
    template = json.dumps(tokenizer.chat_template)
    if not only_asks_its_backend(tokenizer) or "strftime_now" in template:  # which writes today's date
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


def _write(folder: Path, key: str, found: PairSet, place: str) -> None:
    """Keep the pairs of the source whose places begin with ``place``, which itself is not named.

    Raises:
        NotWrittenError: nothing of it is there.
    """
    ids, lengths, files, numbers, terms = found.pairs.columns()
    kinds = list(dict.fromkeys(files))
    about = {
        "key": key,
        "where": [kind.removeprefix(place) for kind in kinds],
        "formats": found.formats,
        "notes": found.notes,
        "refused": [[bad.where.removeprefix(place), bad.reason, bad.record] for bad in found.refused],
    }
    numbered = {kind: number for number, kind in enumerate(kinds)}
    columns: dict[str, npt.NDArray[Any]] = {
        "ids": ids,  # (N,)
        "lengths": lengths,  # (P, 3)
        "numbers": numbers,  # (P,)
        "terms": terms,  # (P, 2)
        "where": np.array([numbered[file] for file in files], np.int32),  # (P,)
        "about": np.frombuffer(to_json(about).encode(), np.uint8),
    }
    content = hashlib.sha256()
    for piece in _pieces(columns):
        content.update(piece)
    with atomic_write(folder / f"{key}-{content.hexdigest()}{SUFFIX}") as temporary, temporary.open("wb") as stream:
        stream.writelines(_pieces(columns))


def _pieces(columns: dict[str, npt.NDArray[Any]]) -> list[bytes | memoryview]:
    """The columns as safetensors lays them out; its own ``save`` would copy them twice."""
    header, end = {}, 0
    for name, column in columns.items():
        start, end = end, end + column.nbytes
        kind = f"{column.dtype.kind.upper()}{8 * column.itemsize}"
        header[name] = {"dtype": kind, "shape": column.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return [len(text).to_bytes(8, "little"), text, *(column.data for column in columns.values())]


def _read(file: Path, place: str) -> PairSet:
    """What ``_write`` kept, as the pairs of the source whose places begin with ``place`` now.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as it was written.
    """
    key = checked(file)
    try:
        with safe_open(file, framework="np") as opened:
            names = ("ids", "lengths", "numbers", "terms", "where", "about")
            ids, lengths, numbers, terms, where, content = map(opened.get_tensor, names)
        about = json.loads(content.tobytes())
        if about["key"] != key:
            raise ValueError("it is of other data")
        kinds = [place + kind for kind in about["where"]]
        return PairSet(
            Pairs.of_columns(ids, lengths, [kinds[kind] for kind in where.tolist()], numbers, terms),
            [BadRow(place + rest, reason, record) for rest, reason, record in about["refused"]],
            Counter(about["formats"]),
            Counter(about["notes"]),
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"it holds something else ({error})") from error


def checked(file: Path) -> str:
    """The key in a kept file's name.

    Raises:
        OSError: it cannot be read.
        ValueError: its content is not what it is named by.
    """
    key, _, content = file.stem.partition("-")
    if sha256(file) != content:
        raise ValueError("it is damaged")
    return key


def kept(cache_dir: Path) -> dict[Path, os.stat_result]:
    """Every kept file of a cache, with its size and when it was last used."""
    found = {}
    for file in sorted((cache_dir.expanduser() / FOLDER).glob(f"{'[0-9a-f]' * 32}-*{SUFFIX}")):
        with suppress(FileNotFoundError):  # pruned meanwhile
            found[file] = file.stat()
    return found


def merged(parts: Sequence[PairSet]) -> PairSet:
    """The pairs of several sources as those of one."""
    found = parts[0]
    for part in parts[1:]:
        formats, notes = found.formats + part.formats, found.notes + part.notes
        found = PairSet(found.pairs + part.pairs, found.refused + part.refused, formats, notes)
    return found
