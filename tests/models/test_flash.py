"""The flash branch of shared prompts without a GPU: the kernel's definition, on the CPU in float32, in its place.

What is tested is the branch's own work: bounds, gathered keys, windows, grouped heads, sinks. No kernel runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpo_cli.models.attention
from dpo_cli.data.pairs import Pair
from tests.helpers.families import FAMILIES, WINDOW, make
from tests.models.test_families import LENGTHS, check_equal, score

WINDOWED = ["mistral", "gemma3_text", "gpt_oss"]
ODD_LENGTHS = [(5, 3, 30), (30, 3, 3), (1, 1, 1), (40, 1, 2)]


def seen_scores(
    query: Tensor, key: Tensor, window: tuple[int, int], scale: float | None, last: bool
) -> tuple[Tensor, float]:
    """Scores (A, q, k) of one segment, -inf where row i does not see column j, and their scale.

    It sees ``i + k - q - left <= j <= i + k - q + right``, a negative side being unlimited. ``last``: rows are aligned
    at the last query and key, else at the first.
    """
    q, k, factor = len(query), len(key), query.shape[2] ** -0.5 if scale is None else scale
    ahead = torch.arange(k) - torch.arange(q)[:, None] - (k - q if last else 0)
    left, right = (k + q if side < 0 else side for side in window)
    scores = torch.einsum("qad,kad->aqk", query, key) * factor
    return scores.masked_fill((ahead > right) | (ahead < -left), -torch.inf), factor


def check_arguments(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], longest: Any) -> None:
    """What the kernel itself refuses, and what it would silently leave out."""
    for x in (query, key, value):
        assert x.ndim == 3 and x.stride(-1) == 1 and x.shape[2] == query.shape[2] <= 256 and x.shape[2] % 8 == 0
    for ends, tokens, most in zip(bounds, (query, key), longest, strict=True):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and type(most) is int
        assert ends[0] == 0 and ends[-1] == len(tokens) and 0 < ends.diff().min() <= ends.diff().max() <= most


def segments_of(*bounds: Tensor) -> Iterator[tuple[slice, slice]]:
    starts = [zip(ends.tolist(), ends.tolist()[1:], strict=False) for ends in bounds]
    return ((slice(*q), slice(*k)) for q, k in zip(*starts, strict=True))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    last: bool = True,
) -> Any:
    """``torch.nn.attention.varlen.varlen_attn`` by its definition: (T, A, D), and the log-sum-exp (A, T).

    Source: mha_varlen_fwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp; mask.h of flash-attn.
    """
    check_arguments(query, key, value, (query_bounds, key_bounds), (longest_query, longest_key))
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out, sums = [], []
    for q, k in segments_of(query_bounds, key_bounds):
        scores, _ = seen_scores(query[q], key[k], window_size, scale, last)
        sums.append(scores.logsumexp(-1))
        weights = scores.softmax(-1).nan_to_num()  # a row that sees nothing is zero
        out.append(torch.einsum("aqk,kad->qad", weights, value[k]))
    whole = torch.cat(out), torch.cat(sums, dim=1)
    return whole if return_aux is not None and return_aux.lse else whole[0]


def varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward pass: of the softmax it reads the output and the log-sum-exp alone.

    Source: flash_bwd_preprocess_kernel.h and flash_bwd_kernel.h of flash-attn, which store the sum of a key's heads.
    """
    check_arguments(query, key, value, (query_bounds, key_bounds), (longest_query, longest_key))
    assert grad.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    assert lse.shape == (query.shape[1], len(query)) and is_causal == (tuple(window_size) == (-1, 0))
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(query), *torch.zeros(2, len(key), heads * groups, key.shape[2])]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    for q, k in segments_of(query_bounds, key_bounds):
        scores, factor = seen_scores(query[q], key[k], window_size, scale, last=True)
        weights = (scores - lse[:, q, None]).exp()
        pulls = torch.einsum("qad,kad->aqk", grad[q], value[k]) - (grad[q] * out[q]).sum(-1).T[..., None]
        grads[0][q] = torch.einsum("aqk,kad->qad", weights * pulls, key[k]) * factor
        grads[1][k] = torch.einsum("aqk,qad->kad", weights * pulls, query[q]) * factor
        grads[2][k] = torch.einsum("aqk,qad->kad", weights, grad[q])
    summed = [x.unflatten(1, (heads, groups)).sum(2) for x in grads[1:]]
    return grads[0], summed[0], summed[1]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every shared forward take the flash branch; the list counts its calls."""
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return varlen(*arguments, **options)

    monkeypatch.setattr(dpo_cli.models.attention, "takes_flash", lambda *_: True)
    monkeypatch.setattr(dpo_cli.models.attention, "varlen_attn", counted)
    monkeypatch.setattr(dpo_cli.models.attention, "varlen_backward", varlen_backward)
    return calls


def pairs_of(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(f"row {i}", *(rng.integers(3, 64, n).astype(np.int32) for n in each)) for i, each in enumerate(lengths)
    ]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_single_sequences(
    family: str, grouped: bool, flash: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``grouped`` False: torch 2.11, whose kernel takes as many keys as queries."""
    monkeypatch.setattr(dpo_cli.models.attention, "GROUPED", grouped)
    model = make(family)
    for lengths in (LENGTHS, ODD_LENGTHS):
        pairs = pairs_of(lengths)
        check_equal(score(model, pairs, "shared"), score(model, pairs, None))
    assert len(flash) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", *WINDOWED])
def test_another_alignment_is_seen(family: str, flash: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_cli.models.attention, "varlen_attn", partial(varlen, last=False))
    pairs, model = pairs_of(LENGTHS), make(family)
    assert (score(model, pairs, "shared")[0] - score(model, pairs, None)[0]).abs().max() > 0.1  # nats


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("family", WINDOWED)
def test_another_window_is_seen(family: str, by: int, flash: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*arguments: Any, window_size: tuple[int, int], **options: Any) -> Any:
        assert window_size in ((-1, 0), (WINDOW - 1, 0))
        left = window_size[0] + by * (window_size[0] > 0)
        return varlen(*arguments, window_size=(left, 0), **options)

    monkeypatch.setattr(dpo_cli.models.attention, "varlen_attn", off)
    pairs, model = pairs_of(LENGTHS), make(family)
    assert (score(model, pairs, "shared")[0] - score(model, pairs, None)[0]).abs().max() > 0.1  # nats
