"""Fingerprints of everything that decides a log-prob; the tokens are in a response's key."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel
from xxhash import xxh3_128

from dpo_cli.data.schedule import Layout
from dpo_cli.models.adapter_files import described
from dpo_cli.models.adapters import is_adapted, is_quantized
from dpo_cli.utils.devices import device_kind
from dpo_cli.utils.files import sha256

# Increase it when log-probs are computed differently.
SCORING_VERSION = 3
# Keys of a config that do not change the forward.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "quantization_config")


def fingerprint(model: PreTrainedModel, weights: str, layout: Layout, dtype: torch.dtype) -> str:
    """Hash everything that decides a log-prob (hex): 16 digits of how it is computed, then 48 of the weights."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_COMPUTED}
    about = {
        "config": config,
        "attention": "shared" if layout == "shared" else model.config._attn_implementation,
        "layout": layout,
        "dtype": str(dtype),
        "device": device_kind(next(model.parameters()).device).name,
        "version": SCORING_VERSION,
    }
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
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        content.update(xxh3_128(values.data).digest())  # as fast as memory is read
    return content.hexdigest()
