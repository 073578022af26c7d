"""The vocabulary of an adapter that was trained with more tokens, or fewer, than its base has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from dpo_cli.models.adapter_files import PREFIX, WEIGHTS, read_config
from dpo_cli.utils.errors import UsageError


def vocabulary(model: PreTrainedModel, folder: Path, tokens: int = 0) -> int:
    """Return how many rows a base's embedding and head need for an adapter trained with another vocabulary.

    ``tokens``: of the adapter's tokenizer, if the base's own has fewer.

    Raises:
        UsageError: the adapter's files do not say what the weights of new tokens are.
    """
    config, ends = read_config(folder), _ends(model)
    base = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    found = {name: _rows_of_end(folder, name) for name in ends}
    sizes = {rows for whole in found.values() for rows in whole.values()}
    indices = {name: _token_indices(config, name, next(iter(ends))) for name in ends}
    rows = max(sizes) if sizes else max(base, tokens, *(max(those, default=-1) + 1 for those in indices.values()))
    new = set(range(base, rows))
    whole = getattr(config, "modules_to_save", None) or ()
    own = [name for name in ends if _ends_with(name, whole)]  # which are tied no longer
    kept = [
        (f"{name}.{kind}", name if name in own else id(p), kind in found[name] or (p.ndim > 1 and new <= indices[name]))
        for name, end in ends.items()
        for kind, p in end.named_parameters()
    ]
    known = {tensor for _, tensor, named in kept if named}
    if new and (lacking := [name for name, tensor, _ in kept if tensor not in known]):
        raise UsageError(
            f"{folder}: the adapter has {rows:,} tokens, its base {base:,}, and nothing says what the {len(new):,} new "
            f"rows of {' and '.join(lacking)} are; resize the base as it was for the adapter (transformers' "
            f"resize_token_embeddings({rows})), save it, and name it with --base-model"
        )
    return rows


def resize(model: PreTrainedModel, rows: int) -> None:
    """Resize embedding and head in place; new rows are 0 until an adapter's weights replace them."""
    before = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for end in _ends(model).values():
            for parameter in end.parameters():
                parameter[before:] = 0


def _ends(model: PreTrainedModel) -> dict[str, Any]:
    """Return embedding and head by their names."""
    names = {module: name for name, module in model.named_modules()}
    return {names[end]: end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}


def _rows_of_end(folder: Path, end: str) -> dict[str, int]:
    """Return rows of the full weight and bias that an adapter's file has for an embedding or a head."""
    whole = re.compile(
        rf"{re.escape(PREFIX + end)}\.(?:(?:token_adapter\.)?base_layer\.|modules_to_save\.)?(weight|bias)"
    )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        matched = ((whole.fullmatch(name), name) for name in file.keys())  # noqa: SIM118  # it is no mapping
        return {match[1]: file.get_slice(name).get_shape()[0] for match, name in matched if match}


def _token_indices(config: Any, end: str, embedding: str) -> set[int]:
    """Return the tokens whose rows an adapter replaces (``trainable_token_indices``)."""
    indices = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(indices, dict):
        return set(indices) if end == embedding else set()
    return {i for name, those in indices.items() if _ends_with(end, [name]) for i in those}


def _ends_with(module: str, names: Iterable[str]) -> bool:
    """Whether a module's name ends with one of these, as peft matches names."""
    return any(f".{module}".endswith(f".{name}") for name in names)
