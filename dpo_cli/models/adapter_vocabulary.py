"""The vocabulary of an adapter that was trained with more tokens, or fewer, than its base has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from dpo_cli.models.adapter_files import PREFIX, WEIGHTS, read_config
from dpo_cli.models.adapters import is_tied
from dpo_cli.models.lora_targets import ends_with
from dpo_cli.utils.errors import UsageError


def fit(model: PreTrainedModel, folder: Path, tokens: int = 0) -> None:
    """Resize embedding and head of a base, in place, to those that an adapter was trained with.

    ``tokens``: of the adapter's tokenizer, if the base's own has fewer. New rows are 0 until the adapter's weights
    replace them.

    Raises:
        UsageError: the adapter's files do not say what the weights of new tokens are.
    """
    config, ends = read_config(folder), (model.get_input_embeddings(), model.get_output_embeddings())
    named: dict[str, Any] = {name: module for name, module in model.named_modules() if any(module is e for e in ends)}
    base: int = cast(Any, ends[0]).weight.shape[0]
    saved = {name: rows for name in named if (rows := _saved_rows(folder, name))}
    indices = {name: _token_indices(config, name, named[name] is ends[0]) for name in named}
    rows = max(saved.values(), default=0) or max(base, tokens, *(max(i, default=-1) + 1 for i in indices.values()))
    if rows == base:
        return
    new = set(range(base, rows))
    lacking = [name for name in named if name not in saved and not new <= indices[name]]
    own = [n for n in named if any(ends_with(n, each) for each in config.modules_to_save or ())]  # tied no longer
    if is_tied(model) and named.keys() - own - set(lacking):
        lacking = []
    if new and lacking:
        raise UsageError(
            f"{folder}: the adapter has {rows:,} tokens, its base {base:,}, and nothing says what the {len(new):,} new "
            f"rows of {' and '.join(f'{name}.weight' for name in lacking)} are; resize the base as it was for the "
            f"adapter (transformers' resize_token_embeddings({rows})), save it, and name it with --base-model"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for end in named:
            for parameter in model.get_submodule(end).parameters():
                parameter[base:] = 0
    cast(Any, model).resized = rows


def _saved_rows(folder: Path, end: str) -> int:
    """Return rows of the full weight that an adapter's file has for an embedding or a head; 0 if it has none."""
    whole = re.compile(rf"{re.escape(PREFIX + end)}\.(?:(?:token_adapter\.)?base_layer\.|modules_to_save\.)?weight")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return next((file.get_slice(n).get_shape()[0] for n in file.keys() if whole.fullmatch(n)), 0)  # noqa: SIM118


def _token_indices(config: Any, end: str, is_embedding: bool) -> set[int]:
    """Return the tokens whose rows an adapter replaces (``trainable_token_indices``)."""
    indices = config.trainable_token_indices or {}
    if not isinstance(indices, dict):
        return set(indices) if is_embedding else set()
    return {i for name, those in indices.items() if ends_with(end, name) for i in those}
