"""Attention over a packed row in which both responses see the one prompt.

Legend: T packed tokens, K gathered keys, A query heads, G key-value heads, D head size.

A row holds ``prompt | chosen | rejected`` a pair. ``prompt+chosen`` attends causally to itself; ``rejected`` attends to
the prompt and to itself. transformers is given this function by name and passes ``segments`` through the model to it;
no model is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from dpo_cli.data.batching import Segments
from dpo_cli.utils.cards import device_kind

PREFIX_SHARED = "dpo_prefix_shared"
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not yet in torch 2.11


def prefix_shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each pair, the prompt shared by both responses.

    ``s_aux`` are attention sinks: a logit per head that joins every softmax without a value. Dropout is off everywhere.

    Shapes: ``query`` (1, A, T, D), ``key`` and ``value`` (1, G, T, D), ``s_aux`` (A,) -> (1, T, A, D).
    Source: the signature is transformers' attention interface; packing with shared prefixes after arXiv 2410.20305;
        sinks as in gpt-oss (arXiv 2508.10925).

    Raises:
        ValueError: soft-capping, a position bias, or a forward without segments.
    """
    if foreign := [name for name in ("softcap", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"its attention takes {foreign[0]}")
    if segments is None:
        raise ValueError("it does not pass segments on")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if device_kind(query.device) == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and s_aux is None:
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    # Split, not sliced: the backward pass of a slice fills a whole row with zeros, one for every segment.
    lengths = [n for prompt, chosen, rejected in segments.spans for n in (prompt + chosen, rejected)]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    parts = []
    for place, (prompt, _, _) in enumerate(segments.spans):
        first, second = 2 * place, 2 * place + 1
        # the rejected response sees the prompt, out of ``prompt+chosen``, and itself
        k, v = (torch.cat([x[first][:, :, :prompt], x[second]], dim=2) for x in (keys, values))
        parts.append(_causal(queries[first], keys[first], values[first], segments, scaling, s_aux, sliding_window))
        parts.append(_causal(queries[second], k, v, segments, scaling, s_aux, sliding_window))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sinks: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attend from a sequence's last queries to all its keys: (1, A, q, D), (1, G, k, D) -> (1, A, q, D)."""
    mask, gqa = _mask(query, key, window, segments, causal=sinks is None), query.shape[1] != key.shape[1]
    if sinks is not None:  # one more key, of zeros, whose score is what is added to it; its value is zero too
        assert mask is not None
        column = sinks.to(query.dtype)[None, :, None, None].expand(1, -1, query.shape[2], 1)
        mask = torch.cat([mask[None, None].expand(1, query.shape[1], -1, -1), column], dim=3)  # (1, A, q, k + 1)
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def _mask(query: Tensor, key: Tensor, window: int | None, segments: Segments, causal: bool) -> Tensor | None:
    """Return the mask to add to the scores (q, k) of a sequence's last queries, so that each sees no later key.

    None where plain causality is the same and ``causal`` allows it. Made once per batch, for every layer.
    """
    q, k = query.shape[2], key.shape[2]
    if causal and q == k and (window is None or window >= k):
        return None
    name = (q, k, window, query.dtype)
    if name not in segments.masks:
        ahead = torch.arange(k, device=query.device) - torch.arange(k - q, k, device=query.device)[:, None]
        hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
        segments.masks[name] = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
    return segments.masks[name]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """One flash call for all segments; its causality is aligned at the last query and key. -> (1, T, A, D)."""
    keys, values = (x[0].transpose(0, 1)[segments.key_index] for x in (key, value))  # (K, G, D)
    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if GROUPED and groups > 1 else {}
    if groups > 1 and not GROUPED:
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    out = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        segments.query_bounds,
        segments.key_bounds,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(PREFIX_SHARED, prefix_shared_attention)


@contextmanager
def attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Compute with the attention of this name for a while; None leaves the model's own."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name or before)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
