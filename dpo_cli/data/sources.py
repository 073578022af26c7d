"""Sources of records: what ``--data`` names as files, folders, stdin and data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import io
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dpo_cli.data import readers
from dpo_cli.utils.errors import RowError, UsageError, reason_of, suggest_path

KINDS = f"{', '.join(readers.READERS)}, each optionally with .gz"
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".jsonl", ".yaml")  # never names on the hub
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Source:
    """A source of records that can be read repeatedly."""

    name: str  # the option and its value, for messages
    place: str  # how the location of each record begins
    read: Callable[[], readers.Records]
    rows: int = 0  # that it has, where a mixture draws some of them
    drawn: frozenset[int] | None = None  # their places, from 0; None: all are read

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the location of each record, as ``file:line``, and the record, or a RowError if it cannot be read.

        Raises:
            UsageError: the source is unreadable or empty.
        """
        empty = True
        try:
            for place, (where, record) in enumerate(self.read()):
                empty = False
                if self.drawn is not None and place not in self.drawn:
                    continue
                yield f"{self.place}:{where}", RowError(readers.TOO_DEEP) if readers.is_too_deep(record) else record
        except readers.SourceError as error:
            raise UsageError(f"{self.name}: {error}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.name}: cannot be read ({reason_of(error)})") from error
        if empty:
            raise UsageError(f"{self.name}: has no rows")


# ---- names ------------------------------------------------------------------------------------------------------


def find_sources(data: list[str], option: str = "--data", seed: int | None = None) -> list[Source]:
    """Return the sources that an option names, in order; data sets are not loaded yet.

    Where the names have shares, ``seed`` draws the rows of the mixture; without a seed all rows are kept.

    Raises:
        UsageError: a name is no readable source, or there is no such mixture.
    """
    pairs = [split_share(typed) for typed in data]
    names, shares = [name for name, _ in pairs], [share for _, share in pairs]
    groups = [_sources(name, f"{option} {name}") for name in names]
    if any(share is not None for share in shares):
        _check_shares(option, data, names, shares)
        if seed is not None:
            return [*_draw(option, groups, [share for share in shares if share], seed)]
    return [source for group in groups for source in group]


# ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:CONFIG/SPLIT
_HUB = re.compile(r"([a-z0-9][\w.-]*/[\w.-]+)(?::(?:([\w.-]+)/)?(\w+(?:\.\w+)*))?", re.ASCII | re.IGNORECASE)


def _sources(typed: str, name: str) -> list[Source]:
    if typed == "-":
        return [_stdin(name)]
    folder, _, split = typed.rpartition(":")
    if path := _existing(typed):
        if not path.is_dir():
            if not _is_known(path.name):
                raise UsageError(f"{name}: unknown kind of file; use {KINDS}")
            return [Source(name, str(path), partial(_read_file, path))]
        if not _is_saved(path):
            return _files(path, name)
        dataset, config, split = typed, "", ""
    elif (path := _existing(folder)) and _is_saved(path):
        dataset, config = folder, ""
    elif match := _hub_match(typed):
        dataset, config, split = (part or "" for part in match.groups())
    else:
        raise UsageError(f"{name}: no such file{suggest_path(Path(typed))}")
    return [Source(name, dataset, partial(_read_data_set, dataset, config, split, path))]


def _stdin(name: str) -> Source:
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"{name}: stdin is closed")
    if sys.stdin.isatty():
        raise UsageError(f"{name}: stdin is a terminal; pipe JSON lines into the command")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"{name}: several processes cannot share stdin; name a file")
    return Source(name, "stdin", lambda: readers.read_json_lines(io.BytesIO(_stdin_content(sys.stdin))))


@cache
def _stdin_content(stdin: Any) -> bytes:
    content: bytes = stdin.buffer.read()  # once: a later reading would find nothing
    return content


def _files(folder: Path, name: str) -> list[Source]:
    """Return the files of a known kind in a folder, by name."""
    try:
        files = sorted(p for p in folder.iterdir() if _is_known(p.name) and not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({reason_of(error)})") from error
    if not files:
        raise UsageError(f"{name}: the folder has no file to read; looked for {KINDS}")
    return [Source(f"{name.rstrip('/')}/{file.name}", str(file), partial(_read_file, file)) for file in files]


def _existing(typed: str) -> Path | None:
    try:
        path = Path(typed).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError):  # also an unknown user, or an impossible name
        return None
    return path if typed else None


def _is_known(file: str) -> bool:
    return file.removesuffix(".gz").endswith(tuple(readers.READERS))


def _is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` of ``datasets`` wrote the folder."""
    try:
        files = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return files >= {"state.json", "dataset_info.json"} or "dataset_dict.json" in files


# ---- readers ----------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> readers.Records:
    name = path.name.removesuffix(".gz")
    reader = next(reader for suffix, reader in readers.READERS.items() if name.endswith(suffix))
    with path.open("rb") if name == path.name else gzip.open(path) as stream:
        yield from reader(stream)  # type: ignore[arg-type]  # gzip's files are binary streams too


def _read_data_set(dataset: str, config: str, split: str, folder: Path | None) -> readers.Records:
    """Read a split, ``train`` or the only one by default, of a ``folder`` or from the hub; no code of it is run."""
    from datasets import load_dataset, load_from_disk, logging
    from pyarrow import ArrowException

    logging.set_verbosity_error()  # else it warns when it falls back to its cache
    try:
        splits = load_from_disk(str(folder)) if folder else load_dataset(dataset, config or None)
    except Exception as error:  # of many kinds: no network, no such name, no access, a damaged file
        causes = [each for each in (error, error.__cause__) if each is not None]
        reason = " ".join(": ".join(f"{type(each).__name__}: {each}" for each in causes).split())[:400]
        hint = f"; name a configuration as {dataset}:CONFIG/SPLIT" if "config" in reason.lower() else ""
        what = "the saved data set" if folder else "no such file, and the data set"
        raise readers.SourceError(f"{what} cannot be loaded ({reason}){hint}") from error
    if not isinstance(splits, dict):
        if split:
            raise readers.SourceError(f"the saved data set has no splits; name it without ':{split}'")
        rows = splits
    else:
        prefix = f"{dataset}:{config}/" if config else f"{dataset}:"
        if not split:
            split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else ""
        if split not in splits:
            raise readers.SourceError(f"name a split as {prefix}SPLIT; available: {', '.join(splits) or 'none'}")
        rows = splits[split]
    begin = "/".join(filter(None, (config, split)))
    try:
        for where, record in readers.read_tables(rows.with_format("arrow").iter(batch_size=128), is_mapped=True):
            yield f"{begin}:{where}" if begin else where, record
    except (ArrowException, ValueError, OverflowError) as error:
        raise readers.SourceError(f"the data set cannot be read ({reason_of(error)})") from error


# ---- the hub ----------------------------------------------------------------------------------------------------


def hub_id(typed: str) -> str | None:
    """Return the name of the hub data set that an option names, or None for local data."""
    match = _hub_match(split_share(typed)[0])
    return match[1] if match else None


def _hub_match(typed: str) -> re.Match[str] | None:
    match = _HUB.fullmatch(typed)
    if not match or _existing(typed) or _existing(typed.rpartition(":")[0]):
        return None
    # A name that begins with an existing folder can only be meant as a path.
    is_local = _is_known(match[1]) or is_path(match[1]) or Path(match[1].partition("/")[0]).is_dir()
    return None if is_local else match


def is_path(name: str) -> bool:
    """Return whether a name can only be meant as a path, so that it is never looked up on the hub."""
    return name.startswith((".", "/", "~", "runs/")) or name.endswith(FILES) or name.count("/") > 1


def unreachable() -> str:
    """Return why the hub cannot be reached, or an empty string if it can.

    The hub's libraries would retry ten times, with pauses. They are turned offline instead, unless they are loaded
    already; then they use their caches.
    """
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    if offline := [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]:
        return f"{offline[0]} is set"
    request = Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")  # noqa: S310
    try:
        urlopen(request, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 10)).close()  # noqa: S310
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        if hasattr(error, "code") or "SSL" in type(why).__name__:  # it answers, or the libraries know its certificate
            return ""
        if "huggingface_hub" not in sys.modules:
            os.environ[OFFLINE[0]] = "1"
        return reason_of(why)
    return ""


def kept_of_hub(name: str, data: bool = False) -> bool:
    """Return whether the caches of the hub's libraries may hold a model, or a data set, of that name."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    if data:
        sets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        if any(sets.glob(f"{name.partition('/')[0]}___*")):  # the rest of the name is written differently
            return True
    return Path(HF_HUB_CACHE, f"{'datasets' if data else 'models'}--{name.replace('/', '--')}").is_dir()


# ---- mixtures ---------------------------------------------------------------------------------------------------


def split_share(typed: str) -> tuple[str, float | None]:
    """Split ``NAME=SHARE``; the share is None where there is none, also where a file has a ``=`` in its name."""
    name, _, share = typed.rpartition("=")
    with suppress(ValueError):
        if name and not _existing(typed):
            return name, float(share)
    return typed, None


def _check_shares(option: str, data: list[str], names: list[str], shares: list[float | None]) -> None:
    given = [share for share in shares if share is not None]
    problem = ""
    if len(given) < len(shares):
        problem = f"{names[shares.index(None)]} has no share: give one to every name, or to none"
    elif not all(0 < share <= 1 for share in given):
        problem = "a share must be greater than 0 and at most 1"
    elif abs(sum(given) - 1) > 0.01:
        problem = f"shares are parts of the mixture and must add up to 1; these add up to {sum(given):g}"
    elif len({*names}) < len(names):
        problem = "a data set is named twice; name it once, with the sum of its shares"
    if problem:
        raise UsageError(f"{option} {', '.join(data)}: {problem}")


def _draw(option: str, groups: list[list[Source]], shares: list[float], seed: int) -> Iterator[Source]:
    """Draw each group's share of the largest mixture that repeats no row; the seed and the numbers of rows decide."""
    rows = [[sum(1 for _ in source.records()) for source in group] for group in groups]
    size = min(sum(counts) / share for counts, share in zip(rows, shares, strict=True))
    for number, (group, counts, share) in enumerate(zip(groups, rows, shares, strict=True)):
        if not (wanted := min(round(share * size), sum(counts))):
            raise UsageError(f"{option}: a share of {share:g} is less than a row: no mixture has more than {size:.0f}")
        drawn = sorted(random.Random(f"{seed}/mixture/{number}").sample(range(sum(counts)), wanted))
        for source, count in zip(group, counts, strict=True):
            own, drawn = [place for place in drawn if place < count], [p - count for p in drawn if p >= count]
            yield replace(source, rows=count, drawn=frozenset(own))
