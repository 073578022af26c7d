"""A run's state on disk: save, find, restore.

A checkpoint is a folder of safetensors and a manifest with every file's hash; it is whole or absent. Nothing is
pickled. There is no random state: no forward or step draws anything at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli.models import adapter_files
from dpo_cli.models.adapters import is_adapted
from dpo_cli.models.loading import put_weights
from dpo_cli.models.locate import WEIGHTS
from dpo_cli.models.parallel import parallel_of, reshard, shard_like
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError
from dpo_cli.utils.files import atomic_dir, load_checksummed, sha256, with_checksum

MANIFEST = "manifest.json"
FILES = {WEIGHTS, "optimizer.safetensors"}
ADAPTER_FILES = FILES - {WEIGHTS} | {adapter_files.CONFIG, adapter_files.WEIGHTS}  # a folder that peft loads as well


def save_checkpoint(
    checkpoints: Path, step: int, model: PreTrainedModel, optimizer: Optimizer, max_tokens: int, keep: int
) -> Path:
    """Write the state after ``step`` optimizer steps, then drop all but the newest ``keep`` checkpoints.

    Of a model with an adapter only the adapter is written: its base does not change. ``max_tokens`` is the current
    token budget, which decides the last bits of later steps. All ranks must call this; rank 0 writes the same files
    for any number of ranks.

    Raises:
        NotWrittenError: earlier checkpoints are kept.
    """
    folder = checkpoints / f"step-{step:06d}"
    reshard(model)
    if not distributed.on_rank_0(folder.exists):
        parallel = parallel_of(model)
        weights = parallel.gather({name: p.detach() for name, p in model.named_parameters()})
        state = optimizer.state_dict()["state"]
        moments = parallel.gather({f"{index}.{name}": t for index, own in state.items() for name, t in own.items()})
        if distributed.rank() == 0:
            with atomic_dir(folder) as temporary:
                if is_adapted(model):
                    adapter_files.save_adapter(model, temporary)
                else:
                    save_file(weights, temporary / WEIGHTS)
                save_file(moments, temporary / "optimizer.safetensors")
                written = {file.name: {"sha256": sha256(file)} for file in temporary.iterdir()}
                manifest = with_checksum({"step": step, "max_tokens": max_tokens, "files": written})
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if distributed.rank() == 0:
        for old in _folders(checkpoints)[keep:]:
            shutil.rmtree(old, ignore_errors=True)  # tried again at the next checkpoint
    distributed.barrier()
    return folder


def _folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [p for p in checkpoints.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(folders, key=lambda p: int(p.name[5:]), reverse=True)


def newest_checkpoint(checkpoints: Path, warn: Callable[[str], None]) -> tuple[Path, int] | None:
    """Return the newest whole checkpoint and its step; damaged ones are set aside with a warning."""
    for folder in _folders(checkpoints):
        if (step := verified_step(folder)) is not None:
            return folder, step
        aside = checkpoints / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        warn(f"checkpoint {folder.name} is damaged; it was set aside as {aside}, and the one before it is used")
    return None


def verified_step(folder: Path) -> int | None:
    """Return the step of a whole checkpoint, else None."""
    try:
        manifest = load_checksummed((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        complete = files.keys() in (FILES, ADAPTER_FILES)
        whole = complete and all(sha256(folder / name) == entry["sha256"] for name, entry in files.items())
        return manifest["step"] if whole and folder.name == f"step-{manifest['step']:06d}" else None
    except PermissionError:  # says nothing about what is in the file
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def restore_checkpoint(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> int:
    """Restore weights and moments; returns the token budget.

    Raises:
        DpoError: the checkpoint is of another model.
    """
    reshard(model)
    if is_adapted(model) != (folder / adapter_files.WEIGHTS).is_file():
        raise DpoError(f"{folder} is a checkpoint of another training: only one of the two has an adapter")
    (adapter_files.put_adapter if is_adapted(model) else put_weights)(model, folder)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / "optimizer.safetensors", framework="pt") as moments:
        for key in moments.keys():  # noqa: SIM118  # it is no mapping
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = shard_like(moments.get_tensor(key), parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    max_tokens: int = load_checksummed((folder / MANIFEST).read_text(encoding="utf-8"))["max_tokens"]
    return max_tokens
