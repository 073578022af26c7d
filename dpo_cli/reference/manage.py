"""`dpo cache`: what reference log-probs and tokenized pairs are on disk, whether they are whole, and which can go."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_cli.data import token_cache as tokenized
from dpo_cli.models import converted
from dpo_cli.reference import shards
from dpo_cli.reference.shards import DAMAGED, SUFFIX
from dpo_cli.reference.store import ABOUT
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.files import remove_leftovers

DAY = 24 * 60 * 60.0


@dataclass(frozen=True)
class Kept:
    """One reference on disk."""

    folder: Path
    about: dict[str, str]
    shards: int
    responses: int
    damaged: int
    bytes: int
    used: float  # seconds since the epoch

    def words(self) -> dict[str, Any]:
        """What is shown of it."""
        how = " ".join(self.about.get(name, "") for name in ("layout", "dtype", "device")).strip()
        return {
            "reference": self.folder.name,
            "model": self.about.get("model", "unknown"),
            "how": how,
            "responses": self.responses,
            "shards": self.shards,
            "damaged": self.damaged,
            "bytes": self.bytes,
            "days_unused": round(max(time.time() - self.used, 0) / DAY, 1),
        }


def references(cache_dir: Path) -> list[Kept]:
    """Every reference in a cache, the one used last first."""
    found = [each for each in (cache_dir.expanduser() / "reference").glob("*") if each.is_dir()]
    ours = [each for each in found if re.fullmatch("[0-9a-f]{32}", each.name) and not each.is_symlink()]
    return sorted(map(_kept, ours), key=lambda kept: kept.used, reverse=True)


def _kept(folder: Path) -> Kept:
    about: dict[str, str] = {}
    try:
        content = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about = {str(name): str(value) for name, value in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):  # it says nothing that is needed
        pass
    stats = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # merged or pruned meanwhile
            if file.is_file():
                stats.append((file, file.stat()))
    found = [file for file, _ in stats if file.suffix == SUFFIX]
    return Kept(
        folder,
        about,
        shards=len(found),
        responses=sum(map(_responses, found)),
        damaged=sum(file.suffix == DAMAGED for file, _ in stats),
        bytes=sum(stat.st_size for _, stat in stats),
        used=max((stat.st_mtime for _, stat in stats), default=folder.stat().st_mtime),
    )


def _responses(shard: Path) -> int:
    """How many responses a shard holds by its header alone; none where it cannot be read."""
    try:
        with safe_open(shard, framework="pt") as file:
            return int(file.get_slice("keys").get_shape()[0])
    except (OSError, SafetensorError, IndexError):
        return 0


def list_references(cache_dir: Path) -> dict[str, Any]:
    """`dpo cache list`."""
    sizes, copies = [stat.st_size for stat in tokenized.kept(cache_dir).values()], converted.kept(cache_dir)
    return {
        "cache_dir": str(cache_dir.expanduser()),
        "references": [kept.words() for kept in references(cache_dir)],
        "tokenized": {"files": len(sizes), "bytes": sum(sizes)},
        "models": [{"copy": copy.folder.name, "model": copy.model, "bytes": copy.bytes} for copy in copies],
    }


def verify(cache_dir: Path, reporter: Reporter) -> dict[str, Any]:
    """`dpo cache verify`: hash every file anew; what is damaged is set aside or removed, and will be made again."""
    kept = references(cache_dir)
    total, files = sum(each.shards for each in kept), tokenized.kept(cache_dir)
    damaged, foreign, unreadable, responses = list[str](), list[str](), list[str](), 0
    with reporter.progress("verify", total + len(files)) as progress:
        for shard in (shard for each in kept for shard in sorted(each.folder.glob(f"*{SUFFIX}"))):
            try:
                responses += len(shards.read_shard(shard)[0])
            except shards.DamagedError:
                damaged.append(str(shard))
                reporter.warning(f"{shard} is damaged; {shards.set_aside(shard)}")
            except FileNotFoundError:  # merged meanwhile
                pass
            except shards.ForeignError as error:
                foreign.append(str(shard))
                reporter.warning(f"{shard} is no shard of ours ({error})")
            except OSError as error:
                unreadable.append(str(shard))
                reporter.warning(f"{shard} cannot be read ({error.strerror})")
            progress.advance(1)
        for file in files:
            try:
                tokenized.checked(file)
            except ValueError:
                damaged.append(str(file))
                with suppress(OSError):
                    file.unlink()
                reporter.warning(f"{file} is damaged; its data is tokenized again when it is used")
            except FileNotFoundError:  # pruned meanwhile
                pass
            except OSError as error:
                unreadable.append(str(file))
                reporter.warning(f"{file} cannot be read ({error.strerror})")
            progress.advance(1)
    found = {"damaged": damaged, "unreadable": unreadable, "foreign": foreign}
    return {"shards": total, "responses": responses, "tokenized": len(files), **found}


def old_or_of(cache_dir: Path, days: float | None, model: str | None) -> list[Kept]:
    """References not used for so many days, if given, and of a model or fingerprint that ``model`` names, if given."""
    return [
        kept
        for kept in references(cache_dir)
        if (days is None or time.time() - kept.used > days * DAY)
        and (model is None or model in kept.about.get("model", "") or kept.folder.name.startswith(model))
    ]


def unused(cache_dir: Path, days: float | None, model: str | None) -> dict[Path, int]:
    """Tokenized pairs, which are of no one model, and copies of models, chosen in the same way; their bytes."""
    before = math.inf if days is None else time.time() - days * DAY
    files = tokenized.kept(cache_dir) if model is None else {}
    copies = [each for each in converted.kept(cache_dir) if each.used < before and (model or "") in each.model]
    pairs = {file: stat.st_size for file, stat in files.items() if stat.st_mtime < before}
    return pairs | {each.folder: each.bytes for each in copies}


def prune(chosen: list[Kept], others: dict[Path, int], reporter: Reporter) -> dict[str, Any]:
    """`dpo cache prune`: remove references, pairs and copies of models; they are made again when they are needed."""
    sizes = {kept.folder: kept.bytes for kept in chosen} | others
    for folder in {path.parent for path in sizes}:
        remove_leftovers(folder)  # also what a prune that was killed had renamed
    removed = list[Path]()
    for path in sizes:
        aside = path.with_name(f".{path.name}.pruned.tmp")  # a writer may make the folder again
        try:
            path.rename(aside) if path.is_dir() else path.unlink()
        except OSError as error:
            reporter.warning(f"{path} cannot be removed ({error.strerror})")
            continue
        removed.append(path)
        shutil.rmtree(aside, ignore_errors=True)
    return {"removed": [path.name for path in removed], "bytes": sum(sizes[path] for path in removed)}
