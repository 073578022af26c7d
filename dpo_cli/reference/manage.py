"""`dpo cache`: reference log-probs and converted models on disk, listed and removed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import reason_of
from dpo_cli.utils.files import CACHED, DAY, remove_leftovers


@dataclass(frozen=True)
class CacheEntry:
    """One reference, or one converted model."""

    kind: str
    path: Path
    model: str
    bytes: int
    days_unused: float

    def shown(self) -> dict[str, Any]:
        """Return the entry as plain values."""
        about = {"kind": self.kind, "name": self.path.name, "model": self.model, "bytes": self.bytes}
        return about | {"days_unused": round(self.days_unused, 1)}


def select(cache_dir: Path, days: float | None = None, model: str | None = None) -> list[CacheEntry]:
    """Return the entries not used for so many days, if given, and of a model with this part of a name, if given."""
    entries = [
        (kind, entry, _model_of(entry / about))
        for kind, (folder, about) in CACHED.items()
        for entry in sorted((cache_dir.expanduser() / folder).glob("[0-9a-f]" * 32))
        if entry.is_dir() and not entry.is_symlink()
    ]
    chosen = []
    for kind, folder, name in entries:
        stats = []
        with suppress(FileNotFoundError):  # pruned meanwhile
            for file in (folder, *folder.iterdir()):
                with suppress(FileNotFoundError):
                    stats.append(file.lstat())
        if not stats:
            continue
        stats = stats[1:] or stats  # the files in it
        unused = max(time.time() - max(stat.st_mtime for stat in stats), 0) / DAY
        if (days is None or unused > days) and (model is None or model in name):
            chosen.append(CacheEntry(kind, folder, name, sum(stat.st_size for stat in stats), unused))
    return chosen


def _model_of(about: Path) -> str:
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # only a description
        return str(json.loads(about.read_text(encoding="utf-8")).get("model", "unknown"))
    return "unknown"


def listed(cache_dir: Path) -> dict[str, Any]:
    """Return the result of `dpo cache list`."""
    return {"cache_dir": str(cache_dir.expanduser()), "entries": [entry.shown() for entry in select(cache_dir)]}


def as_text(result: dict[str, Any]) -> str:
    """Format entries as a table."""
    lines = [f"{'kind':<11}{'name':<34}{'size':>12}{'unused':>10}  model"]
    for entry in result["entries"]:
        size, unused = f"{entry['bytes'] / 2**20:,.1f} MiB", f"{entry['days_unused']:.1f} d"
        lines.append(f"{entry['kind']:<11}{entry['name'][:32]:<34}{size:>12}{unused:>10}  {entry['model']}")
    return "\n".join(lines)


def prune(chosen: Sequence[CacheEntry], reporter: Reporter) -> dict[str, Any]:
    """Remove entries; they are computed again when they are needed."""
    for folder in {entry.path.parent for entry in chosen}:
        remove_leftovers(folder, older_than=DAY)
    removed = list[CacheEntry]()
    for entry in chosen:
        aside = entry.path.with_name(f".{entry.path.name}.pruned.tmp")  # a writer may create the folder again
        try:
            entry.path.rename(aside)
        except OSError as error:
            reporter.warning(f"{entry.path} cannot be removed ({reason_of(error)})")
            continue
        removed.append(entry)
        shutil.rmtree(aside, ignore_errors=True)
    return {"removed": [entry.path.name for entry in removed], "bytes": sum(entry.bytes for entry in removed)}


def as_text_of_pruned(result: dict[str, Any]) -> str:
    """Format the result of ``prune``."""
    count = len(result["removed"])
    entries = f"{count:,} {'entry' if count == 1 else 'entries'} removed, {result['bytes'] / 2**20:,.1f} MiB"
    return entries if count else "nothing to remove"
