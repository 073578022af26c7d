"""Attention over a packed row of prompt trees, in which all sequences that share a beginning see the one copy of it.

Legend: T packed tokens, K gathered keys, A query heads, G key-value heads, D head size.

The tokens of a segment attend causally to its whole sequence, from the root of its tree: of a pair, ``prompt + chosen``
to itself, and ``rejected`` to the prompt and to itself. transformers is given this function by name and passes
``segments`` through the model to it; no model is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from dpo_cli.data.batching import Segments

PREFIX_SHARED = "dpo_prefix_shared"
varlen_backward = torch.ops.torch_attn._varlen_attn_backward
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
    flash: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from each segment to its own sequence.

    ``s_aux`` are attention sinks: a logit per head that joins every softmax without a value. ``flash``: whether the
    device has it, see ``utils/devices.py``. Dropout is off everywhere.

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
    if takes_flash(flash, query):
        return _varlen(query, key, value, segments, scaling, s_aux, sliding_window), None
    # Split, not sliced: the backward pass of a slice fills a whole row with zeros, one for every segment.
    lengths = [part[-1][2] for part in segments.parts]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for place, part in enumerate(segments.parts):
        k, v = keys[place], values[place]
        if prefix := part[:-1]:
            k, v = (torch.cat([*(x[s][:, :, a:b] for s, a, b in prefix), x[place]], dim=2) for x in (keys, values))
        outputs.append(_causal(queries[place], k, v, segments, scaling, s_aux, sliding_window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def takes_flash(flash: bool, query: Tensor) -> bool:
    """Whether flash attention runs: the device has it, and for queries of this type."""
    return flash and query.dtype in (torch.bfloat16, torch.float16)


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sinks: Tensor | None,
    window: int | None,
) -> Tensor:
    """One flash call for all segments; its causality is aligned at the last query and key. -> (1, T, A, D)."""
    query = query[0].transpose(0, 1)  # (T, A, D)
    key, value = (x[0].transpose(0, 1)[segments.key_index] for x in (key, value))  # (K, G, D)
    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if GROUPED and groups > 1 else {}
    if groups > 1 and not GROUPED:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bounds = segments.query_bounds, segments.key_bounds, segments.longest_query, segments.longest_key
    options = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0), **grouped}
    if sinks is not None:
        attended: Tensor = _FlashWithSinks.apply(query, key, value, sinks, bounds, options)
        return attended[None]
    out = varlen_attn(query, key, value, *bounds, **options)
    assert isinstance(out, Tensor)
    return out[None]


class _FlashWithSinks(torch.autograd.Function):
    """Flash attention with a sink per head, which torch's kernel does not support.

    A sink adds its exponential to each softmax's denominator, so it scales the output. With the sinks in the output
    and in the log-sum-exp, the kernel's backward pass is exact: of the softmax it reads these two alone,
    ``score.grad = exp(score - lse) * (out.grad @ value - out.grad @ out)``. torch has no gradient through the
    log-sum-exp of ``varlen_attn``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Any, options: dict[str, Any]
    ) -> Tensor:
        out, lse = varlen_attn(query, key, value, *bounds, return_aux=AuxRequest(lse=True), **options)
        with_sinks = torch.logaddexp(lse, sinks.float()[:, None])  # (A, T)
        out = (out * (lse - with_sinks).exp().T[..., None]).to(out.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, with_sinks)
        ctx.bounds, ctx.scale, ctx.window = bounds, options["scale"], options["window_size"]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        unused = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # state of dropout
        grads = varlen_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse,
            *ctx.bounds,
            ctx.window == (-1, 0),
            unused,
            ctx.scale,
            list(ctx.window),
        )
        shares = (sinks.float()[:, None] - lse).exp()  # of the sinks in each softmax, (A, T)
        grad_sinks = -(shares * (grad.float() * out.float()).sum(-1).T).sum(1)
        return (*grads, grad_sinks.to(sinks.dtype), None, None)


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
