"""A run's state on disk: save, find, restore, export.

A checkpoint is a folder of safetensors and a manifest with every file's size and hash; it is whole or absent. Nothing
is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli import adapters
from dpo_cli.adapters import is_adapted
from dpo_cli.disk import sealed, sha256, unsealed, whole_folder
from dpo_cli.errors import DpoError
from dpo_cli.model import WEIGHTS, put_weights

MANIFEST = "manifest.json"
FILES = {WEIGHTS, "optimizer.safetensors", "rng.safetensors"}
ADAPTER_FILES = FILES - {WEIGHTS} | {adapters.CONFIG, adapters.WEIGHTS}  # a folder that peft loads as well


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states that whatever is random in a step draws from, as bytes."""
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

    Of a model with an adapter that is all that is written: its base does not change.

    ``max_tokens`` is the token budget that the run has come down to, which decides the last bits of later steps.

    Raises:
        NotWrittenError: the checkpoints that were there still are.
    """
    folder = checkpoints / _name(step)
    if not folder.exists():
        with whole_folder(folder) as temporary:
            if is_adapted(model):
                adapters.save_adapter(model, temporary)
            else:
                save_file({name: p.detach() for name, p in model.named_parameters()}, temporary / WEIGHTS)
            save_file(_moments(optimizer), temporary / "optimizer.safetensors")
            save_file(rng, temporary / "rng.safetensors")
            files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in temporary.iterdir()}
            manifest = sealed({"step": step, "max_tokens": max_tokens, "files": files})
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for old in _folders(checkpoints)[keep:]:
        shutil.rmtree(old, ignore_errors=True)  # tried again at the next checkpoint
    return folder


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
    """The newest checkpoint whose files are all as they were written, and its step; others are set aside and told."""
    for folder in _folders(checkpoints):
        if (step := verified_step(folder)) is not None:
            return folder, step
        aside = checkpoints / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        warn(f"checkpoint {folder.name} is damaged; it was set aside as {aside}, and the one before is taken")
    return None


def verified_step(folder: Path) -> int | None:
    """The step of a checkpoint that is whole, else None."""
    try:
        manifest = _read_manifest(folder)
        files = manifest["files"]
        known = files.keys() in (FILES, ADAPTER_FILES)
        whole = known and all(sha256(folder / name) == told["sha256"] for name, told in files.items())
        return manifest["step"] if whole and folder.name == _name(manifest["step"]) else None
    except PermissionError:  # says nothing about what is in the file
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    return unsealed((folder / MANIFEST).read_text(encoding="utf-8"))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def restore_checkpoint(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> int:
    """Bring weights, moments and random states back to what they were; returns the token budget of then.

    Raises:
        DpoError: the checkpoint is of another model.
    """
    if is_adapted(model) != (folder / adapters.WEIGHTS).is_file():
        raise DpoError(f"{folder} is a checkpoint of another training: only one of the two has an adapter")
    (adapters.put_adapter if is_adapted(model) else put_weights)(model, folder)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    max_tokens: int = _read_manifest(folder)["max_tokens"]
    return max_tokens


def export_model(folder: Path, model: PreTrainedModel, tokenizer: Any, card: str) -> None:
    """Write a folder that any Hugging Face tool loads: weights, config, tokenizer with template, model card.

    Of a model with an adapter the folder is that adapter's.
    """
    with whole_folder(folder) as temporary:
        if is_adapted(model):
            adapters.save_adapter(model, temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
