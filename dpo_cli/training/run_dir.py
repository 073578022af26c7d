"""A run's folder: its name, its lock, and the options, manifest and hashes of pairs that say what it trained on."""

from __future__ import annotations

import hashlib
import json
import operator
import platform
import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dpo_cli.config.options import DataOptions, TrainOptions
from dpo_cli.config.resolve import resolve, to_yaml
from dpo_cli.data.pairs import Hashes
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import NotWrittenError, UsageError
from dpo_cli.utils.files import (
    LOCK,
    atomic_dir,
    file_lock,
    load_checksummed,
    refuse_existing,
    sha256,
    to_json,
    with_checksum,
)

if TYPE_CHECKING:
    from dpo_cli.training.setup import Run

TRAINED = "trained-pairs.safetensors"  # hashes of the pairs that are trained on
ENCODER_DEFAULTS = {"max_length": 1024, "control_tokens": "keep", "train_turns": "last"}
ROW_DEFAULTS = {"pairs": "best-worst", "margin_per_score": 0.0}
PACKAGES = ("dpo-cli", "torch", "transformers", "accelerate", "safetensors", "peft")  # versions in the manifest


def choose_folder(output: Path | None, resume: Path | None) -> Path:
    """Return the folder to resume, or a new one; refuse a new one that exists or cannot be created."""
    if resume:
        return resume
    folder = output or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    refuse_existing(folder)
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--output {folder}: its path is not UTF-8") from error
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        Path(tempfile.mkdtemp(".tmp", ".", above)).rmdir()
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be created: no folder can be made in {above}") from error
    return folder


@contextmanager
def begin(run: Run, manifest: dict[str, Any]) -> Iterator[None]:
    """Create the run's folder atomically, with all that describes the run, and hold its lock in the block.

    Raises:
        UsageError: another run made the folder meanwhile.
        NotWrittenError: it cannot be written.
    """
    try:
        with atomic_dir(run.folder, new=True) as folder:
            (folder / "config.yaml").write_text(to_yaml(run.options), encoding="utf-8")
            content = with_checksum(manifest | {"config": sha256(folder / "config.yaml")})
            (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file({"pairs": run.trained}, folder / TRAINED)
            if run.refused:
                rows = ({"where": bad.where, "reason": bad.reason, "row": bad.record} for bad in run.refused)
                (folder / "refused.jsonl").write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    except NotWrittenError as error:
        if (run.folder / "manifest.json").exists():
            raise UsageError(f"{run.folder}: another process began a run in it; choose another") from error
        raise
    with file_lock(run.folder / LOCK):
        yield


def make_manifest(run: Run, command: Sequence[str]) -> dict[str, Any]:
    """Describe the origin of a run's numbers: versions, git commit, data, start policy and reference."""
    options, policy, reference = run.options, run.policy, run.reference
    start = _named(options.model, options.base_model)
    return {
        "command": shlex.join(command),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "device": policy.runner.kind.name,
        "processes": distributed.world_size(),
        "data": {
            "files": options.data,
            **({"drawn": run.drawn} if run.drawn else {}),
            "pairs": len(run.pairs),
            "refused": len(run.refused),
            "sha256": run.pairs.digest(),
            "trained": hashlib.sha256(run.trained.data).hexdigest(),
        },
        "held_out": {"files": options.eval_data, "pairs": len(run.held_out), "sha256": run.held_out.digest()},
        "start_model": policy.source.title,
        "start": start | {"fingerprint": policy.fingerprint},
        "reference": {
            **(_named(options.ref_model) if options.ref_model else start),
            "fingerprint": reference.fingerprint,
            "layout": reference.runner.layout,
            "dtype": options.dtype,
        },
    }


def _git_commit() -> str | None:
    """Return the commit of the working folder, if it is in a git repository."""
    with suppress(OSError):  # no git
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def _named(model: str | None, base: str | None = None) -> dict[str, str | None]:
    """Name a model for ``locate.start_model``, by an absolute path where it is a local one."""
    names = {"model": model} | ({"base_model": base} if base else {})
    local = {key: Path(name).expanduser() for key, name in names.items() if name}
    return names | {key: str(path.absolute()) for key, path in local.items() if path.exists()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a run.

    Raises:
        UsageError: it is missing, damaged or edited.
    """
    try:
        manifest = load_checksummed((folder / "manifest.json").read_text(encoding="utf-8"))
        start, reference = manifest["start"], manifest["reference"]
        texts = [manifest["data"]["sha256"], manifest["held_out"]["sha256"], manifest["config"], manifest["device"]]
        texts += [start["fingerprint"], *(reference[name] for name in ("fingerprint", "values", "layout", "dtype"))]
        texts += [each.get(name) or "" for each in (start, reference) for name in ("model", "base_model")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a value is not text")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / 'manifest.json'} cannot be trusted: {error}") from error


def trained_with(folder: Path) -> TrainOptions:
    """Return the options that a run was trained with.

    Raises:
        UsageError: they are not those that it began with, or cannot be read.
    """
    if read_manifest(folder)["config"] != sha256(folder / "config.yaml"):
        raise UsageError(f"{folder / 'config.yaml'} changed since the run began")
    return resolve(TrainOptions, {}, folder / "config.yaml")


def trained_hashes(
    folder: Path, manifest: Mapping[str, Any], warn: Callable[[str], None] = lambda _: None
) -> Hashes | None:
    """Return hashes of the pairs that a run trained on: (P, 2); None with a warning if they are damaged."""
    try:
        hashes: Hashes = load_file(folder / TRAINED)["pairs"]
        if hashlib.sha256(hashes.tobytes()).hexdigest() != manifest["data"]["trained"]:
            raise ValueError("its content was changed")
        return hashes.reshape(-1, 2)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        warn(f"{folder / TRAINED}: {error}; whether the run trained on these pairs is unknown")
        return None


def encoder_options(options: DataOptions, run: Path | None = None) -> dict[str, Any]:
    """Return the arguments of ``Encoder``: from the options, else from ``run``, else the defaults."""
    return _chosen(options, run, ENCODER_DEFAULTS)


def row_options(options: DataOptions, run: Path | None = None) -> dict[str, Any]:
    """Return further arguments of ``read_rows``: from the options, else from ``run``, else what the loss reads."""
    reads_rankings = isinstance(options, TrainOptions) and options.objective.uses("ranking_sizes")
    return _chosen(options, run, ROW_DEFAULTS | ({"pairs": "ranking"} if reads_rankings else {}))


def _chosen(options: DataOptions, run: Path | None, usual: dict[str, Any]) -> dict[str, Any]:
    places = [vars(options), vars(trained_with(run)) if run else {}, usual]
    return {name: next(each[name] for each in places if each.get(name) is not None) for name in usual}


def check_same_run(folder: Path, manifest: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Refuse to resume if data or weights changed since the run began; return its manifest."""
    from dpo_cli.models.fingerprint import same_weights

    saved = read_manifest(folder)
    # A fingerprint holds the device, too, and a run may be resumed on another.
    same_device = saved["device"] == manifest["device"]
    same = {"sha256": operator.eq, "fingerprint": operator.eq if same_device else same_weights}
    checks = [("data", "sha256", "the data"), ("held_out", "sha256", "the held-out data")]
    checks.append(("start", "fingerprint", "the start model"))
    if any(each["reference"]["fingerprint"] != each["start"]["fingerprint"] for each in (saved, manifest)):
        checks.append(("reference", "fingerprint", "the reference"))
    if changed := [what for name, key, what in checks if not same[key](saved[name][key], manifest[name][key])]:
        raise UsageError(
            f"--resume {folder}: {' and '.join(changed)} changed since the run began; start a new run instead"
        )
    if not same_device or saved["versions"] != manifest["versions"]:
        warn("the libraries or the device have changed since the run began: the last bits may differ")
    return saved
