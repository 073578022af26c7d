"""The Hugging Face hub: names, reachability, caches and data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from dpo_cli.utils.errors import UsageError

FILES = (".gguf", ".safetensors", ".bin", ".pt", ".json", ".jsonl", ".yaml")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


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

    if off := [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]:
        return f"{off[0]} is set"
    request = Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")  # noqa: S310
    try:
        urlopen(request, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 10)).close()  # noqa: S310
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        if hasattr(error, "code") or "SSL" in type(why).__name__:  # it answers, or the libraries know its certificate
            return ""
        if "huggingface_hub" not in sys.modules:
            os.environ[OFFLINE[0]] = "1"
        return str(getattr(why, "strerror", None) or why)
    return ""


def kept_of_hub(name: str, data: bool = False) -> bool:
    """Return whether the caches of the hub's libraries may hold a model, or a data set, of that name."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    if data:
        sets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"))
        if any(sets.glob(f"{name.partition('/')[0]}___*")):  # the rest of the name is written differently
            return True
    return Path(HF_HUB_CACHE, f"{'datasets' if data else 'models'}--{name.replace('/', '--')}").is_dir()


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` of ``datasets`` wrote the folder."""
    try:
        files = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return files >= {"state.json", "dataset_info.json"} or "dataset_dict.json" in files


def load_split(name: str, dataset: str, config: str | None, split: str | None, folder: Path | None) -> tuple[str, Any]:
    """Load a split of a data set from ``folder`` or the hub, by default ``train`` or the only one, with its name.

    No code of the data set is run.

    Raises:
        UsageError: it cannot be loaded, or the split must be named; the message begins with ``name``.
    """
    from datasets import load_dataset, load_from_disk, logging

    logging.set_verbosity_error()  # else it warns when it falls back to its cache
    try:
        splits = load_from_disk(str(folder)) if folder else load_dataset(dataset, config)
    except Exception as error:  # of many kinds: no network, no such name, no access, a damaged file
        causes = [each for each in (error, error.__cause__) if each is not None]
        reason = " ".join(": ".join(f"{type(each).__name__}: {each}" for each in causes).split())[:400]
        hint = f"; name a configuration as {dataset}:CONFIG/SPLIT" if "config" in reason.lower() else ""
        what = "the saved data set" if folder else "no such file, and the data set"
        raise UsageError(f"{name}: {what} cannot be loaded ({reason}){hint}") from error
    if not isinstance(splits, dict):
        if split is not None:
            raise UsageError(f"{name}: the saved data set has no splits; name it without ':{split}'")
        return "", splits
    prefix = f"{dataset}:{config}/" if config else f"{dataset}:"
    if split is None:
        split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if split is None or split not in splits:
        raise UsageError(f"{name}: name a split as {prefix}SPLIT; available: {', '.join(splits) or 'none'}")
    return split, splits[split]
