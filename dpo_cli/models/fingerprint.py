"""Fingerprints of everything that decides a log-prob; the tokens are in a response's key."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from dpo_cli.data.batching import Layout
from dpo_cli.models.adapter_files import described
from dpo_cli.models.adapters import is_adapted, is_quantized
from dpo_cli.models.loading import compiled
from dpo_cli.models.locate import ModelSource
from dpo_cli.utils.errors import DpoError
from dpo_cli.utils.files import atomic_write, sha256

# Increase it when log-probs are computed differently.
SCORING_VERSION = 2
# Keys of a config that do not change the forward.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "quantization_config")
FRESH_SECONDS = 2.0  # a file this new could change again within its time stamp


def fingerprint(model: PreTrainedModel, weights: str, layout: Layout, dtype: torch.dtype) -> str:
    """Hash everything that decides a log-prob (hex): 16 digits of how it is computed, then 48 of the weights."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_COMPUTED}
    about = {
        "config": config,
        "attention": "shared" if layout == "shared" else model.config._attn_implementation,
        "layout": layout,
        "dtype": str(dtype),
        "device": next(model.parameters()).device.type,
        "version": SCORING_VERSION,
    }
    if compiled(model):
        about["compiled"] = torch.__version__
    foreign = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers_modules.")]
    if foreign:  # --trust-remote-code
        about["code"] = [sha256(file) for file in sorted(Path(inspect.getfile(foreign[0])).parent.glob("*.py"))]
    how = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    return how.hexdigest()[:16] + weights[:48]


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, however they compute."""
    return one[16:] == other[16:]


def hash_weights(model: PreTrainedModel) -> str:
    """Hash the content of all parameters and saved buffers (hex), and an attached adapter's configuration."""
    content = hashlib.sha256(described(model).encode() if is_adapted(model) else b"")
    saved = model.state_dict()  # a buffer that is not there follows from the config
    tensors = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in saved)]
    if is_quantized(model):  # its scales are neither
        names = {name for name, _ in tensors}
        tensors += [item for item in saved.items() if item[0] not in names]
    for name, tensor in tensors:
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


class WeightsHashCache:
    """Caches the hash of a model's weights by the path, size, times and inode of their files.

    Create it before the model is loaded, so that files that change meanwhile are noticed. An edit cannot set back the
    change time (ctime).
    """

    def __init__(self, source: ModelSource, cache_dir: Path) -> None:
        self.source, self.folder = source, cache_dir.expanduser() / "weights"
        self.name = self._name()

    def hash(self, model: PreTrainedModel, remember: bool = True) -> str:
        """Return ``hash_weights`` of the model just loaded, from the cache if its files are unchanged."""
        if self.name is None or self.name != self._name():
            return hash_weights(model)
        file = self.folder / self.name
        with suppress(OSError, ValueError):
            weights, check = file.read_text(encoding="ascii").split()
            if check == _check(self.name, weights):
                return weights
        weights = hash_weights(model)
        if remember:
            with suppress(DpoError), atomic_write(file) as temporary:  # without it the next start hashes again
                temporary.write_text(f"{weights} {_check(self.name, weights)}\n", encoding="ascii")
        return weights

    def _name(self) -> str | None:
        """Hash what identifies the files without reading them; None if they are missing or too new."""
        try:
            stats = [(str(file), file.stat()) for file in _files(self.source)]
        except (OSError, ValueError):
            return None
        if not stats or time.time() - max(stat.st_ctime for _, stat in stats) < FRESH_SECONDS:
            return None
        seen = [(p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for p, s in sorted(stats)]
        loaders = [version(name) for name in ("torch", "transformers", "peft", "gguf")]
        how = [self.source.quantize, "attached" if self.source.attached else None]
        return hashlib.sha256(json.dumps([seen, loaders, *filter(None, how)]).encode()).hexdigest()


def _files(source: ModelSource) -> list[Path]:
    """Return all files that the loaded weights can depend on.

    Raises:
        OSError, ValueError: a hub model is not on this disk.
    """
    if source.gguf:
        files = [Path(source.path, source.gguf)]
    else:
        local = Path(source.path)
        folder = local if local.is_dir() else Path(snapshot_download(source.path, local_files_only=True))
        files = [file for file in folder.iterdir() if file.is_file()]
    parts = [part for part in (source.adapter, source.checkpoint) if part]
    return files + [file for part in parts for file in part.iterdir() if file.is_file()]


def _check(name: str, weights: str) -> str:
    return hashlib.sha256(f"{name} {weights}".encode()).hexdigest()
