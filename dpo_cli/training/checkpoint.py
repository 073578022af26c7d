"""A run's state on disk: save, find, restore.

A checkpoint is a folder of safetensors and a manifest with every file's size and hash; it is whole or absent. Nothing
is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli.models import adapter_files
from dpo_cli.models.adapters import is_adapted
from dpo_cli.models.loading import put_weights
from dpo_cli.models.locate import WEIGHTS
from dpo_cli.models.sharding import full_tensor, is_sharded, iter_full_tensors, reshard, shard_like
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError
from dpo_cli.utils.files import atomic_dir, load_checksummed, sha256, with_checksum

MANIFEST = "manifest.json"
KINDS = {torch.float32: "F32"}  # of what a sharded model trains with, as safetensors names it
FILES = {WEIGHTS, "optimizer.safetensors", "rng.safetensors"}
ADAPTER_FILES = FILES - {WEIGHTS} | {adapter_files.CONFIG, adapter_files.WEIGHTS}  # a folder that peft loads as well


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the random generators of a step, as bytes."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def save_checkpoint(
    checkpoints: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: Optimizer,
    rng: dict[str, Tensor],
    max_tokens: int,
    keep: int,
) -> Path:
    """Write the state after ``step`` optimizer steps, then drop all but the newest ``keep`` checkpoints.

    Of a model with an adapter only the adapter is written: its base does not change. ``max_tokens`` is the current
    token budget, which decides the last bits of later steps. Rank 0 writes the same files whatever the number of ranks;
    for a sharded model all ranks must call this.

    Raises:
        NotWrittenError: earlier checkpoints are kept.
    """
    folder = checkpoints / _name(step)
    reshard(model)
    weights, moments = {name: p.detach() for name, p in model.named_parameters()}, _moments(optimizer)
    there = distributed.on_rank_0(folder.exists)
    if not there and distributed.rank() > 0 and is_sharded(model):
        for tensor in (*weights.values(), *moments.values()):
            full_tensor(tensor.detach())  # for the first rank to write
    if distributed.rank() == 0 and not there:
        with atomic_dir(folder) as temporary:
            if is_adapted(model):
                adapter_files.save_adapter(model, temporary)
            else:
                _save(weights, temporary / WEIGHTS)
            _save(moments, temporary / "optimizer.safetensors")
            save_file(rng, temporary / "rng.safetensors")
            files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in temporary.iterdir()}
            manifest = with_checksum({"step": step, "max_tokens": max_tokens, "files": files})
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if distributed.rank() == 0:
        for old in _folders(checkpoints)[keep:]:
            shutil.rmtree(old, ignore_errors=True)  # tried again at the next checkpoint
    distributed.barrier()
    return folder


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors in the format of safetensors; sharded ones are gathered one at a time."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        save_file(dict(tensors), file)
        return
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in iter_full_tensors(tensors):
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _moments(optimizer: Optimizer) -> dict[str, Tensor]:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # some may be on their way to the host
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, moments in state.items() for name, tensor in moments.items()}


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
        manifest = _read_manifest(folder)
        files = manifest["files"]
        complete = files.keys() in (FILES, ADAPTER_FILES)
        whole = complete and all(sha256(folder / name) == entry["sha256"] for name, entry in files.items())
        return manifest["step"] if whole and folder.name == _name(manifest["step"]) else None
    except PermissionError:  # says nothing about what is in the file
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    return load_checksummed((folder / MANIFEST).read_text(encoding="utf-8"))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def restore_checkpoint(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> int:
    """Restore weights, moments and random states; returns the token budget.

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
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    max_tokens: int = _read_manifest(folder)["max_tokens"]
    return max_tokens
