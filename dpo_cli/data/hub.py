"""The Hugging Face hub: which names are its own, whether it can be reached; its data sets, and those of a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.utils.errors import UsageError

FILES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".jsonl", ".yaml")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # what turns the hub's libraries offline


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path, so that it is never looked up on the hub."""
    return name.startswith((".", "/", "~", "runs/")) or name.endswith(FILES) or name.count("/") > 1


def unreachable() -> str:
    """Why the hub cannot be reached, in short; empty where it can.

    The hub's libraries would try ten times, with pauses. They are turned offline instead, if they are not loaded yet:
    then they use what they have.
    """
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    if off := [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]:
        return f"{off[0]} is set"
    asked = Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")  # noqa: S310
    try:
        urlopen(asked, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 10)).close()  # noqa: S310
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        if hasattr(error, "code") or "SSL" in type(why).__name__:  # it answers, or the libraries know its certificate
            return ""
        if "huggingface_hub" not in sys.modules:
            os.environ[OFFLINE[0]] = "1"
        return str(getattr(why, "strerror", None) or why)
    return ""


def kept_of_hub(name: str, data: bool = False) -> bool:
    """Whether the caches of the hub's libraries may have a model, or a data set, of that name."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    if data:
        sets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        if any(sets.glob(f"{name.partition('/')[0]}___*")):  # which writes the rest of the name in its own way
            return True
    return Path(HF_HUB_CACHE, f"{'datasets' if data else 'models'}--{name.replace('/', '--')}").is_dir()


@dataclass(frozen=True, slots=True)
class Split:
    """A split of a data set, whose rows stay in its files until they are asked for."""

    name: str  # as it is typed behind the data set's; empty where that has no splits
    dataset: Any

    @property
    def files(self) -> tuple[Path, ...]:
        """What its rows lie in; none where they are in memory."""
        return tuple(Path(file["filename"]) for file in self.dataset.cache_files)

    @property
    def kind(self) -> str:
        """What beside the files decides its rows."""
        return f"{self.dataset.num_rows} rows of {self.dataset.features}"

    def batches(self) -> Iterator[Any]:
        """Its rows as small Arrow tables, without columns that have bytes in them: pictures, sounds."""
        columns = [field.name for field in self.dataset.features.arrow_schema if not _has_bytes(field.type)]
        for table in self.dataset.with_format("arrow", columns=columns).iter(batch_size=128):
            table.validate(full=True)  # the files are mapped into memory as they are, and may be damaged
            yield table


def _has_bytes(kind: Any) -> bool:
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    inner = getattr(kind, "value_type", getattr(kind, "item_type", None))  # of a list, of a map
    if inner is not None:
        return _has_bytes(inner)
    return any(ask(kind) for ask in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary))


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    try:
        files = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return files >= {"state.json", "dataset_info.json"} or "dataset_dict.json" in files


def saved_split(folder: Path, split: str | None, name: str) -> Split:
    """The split of that name in a folder that ``save_to_disk`` wrote, or its only one.

    Raises:
        UsageError: it cannot be loaded, or the split must be another; the message begins with ``name``.
    """
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # of any kind where a file is damaged
        raise UsageError(f"{name}: the saved data set cannot be loaded ({_reason(error)})") from error
    if isinstance(found, dict):
        return _chosen(found, split, f"{folder}:", name)
    if split is not None:
        raise UsageError(f"{name}: the saved data set has no splits; name it without ':{split}'")
    return Split("", found)


def hub_split(dataset: str, config: str | None, split: str | None, name: str) -> Split:
    """The split of that name of a data set of the hub, or ``train``, or its only one; no code of it is run.

    Raises:
        UsageError: it cannot be loaded, or the split must be another; the message begins with ``name``.
    """
    from datasets import load_dataset, logging

    logging.set_verbosity_error()  # else two lines where it loads what it has because the hub cannot be reached
    try:
        found = load_dataset(dataset, config)
    except Exception as error:  # of many kinds: no network, no such name, no right to it, files that are no data
        reason = _reason(error)
        how = f"; name a configuration as {dataset}:CONFIG/SPLIT" if "config" in reason.lower() else ""
        raise UsageError(f"{name}: no such file, and the data set cannot be loaded ({reason}){how}") from error
    if split is None and "train" in found:
        split = "train"
    before = f"{config}/" if config else ""
    chosen = _chosen(found, split, f"{dataset}:{before}", name)
    return Split(before + chosen.name, chosen.dataset)


def _chosen(found: dict[str, Any], split: str | None, before: str, name: str) -> Split:
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split is None or split not in found:
        raise UsageError(f"{name}: name a split as {before}SPLIT; there are: {', '.join(found) or 'none'}")
    return Split(split, found[split])


def _reason(error: Exception) -> str:
    """What the library says, on one line and not too long."""
    causes = [each for each in (error, error.__cause__) if each is not None]
    return " ".join(": ".join(f"{type(each).__name__}: {each}" for each in causes).split())[:400]
