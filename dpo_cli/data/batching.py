"""Lay out a run as steps of packed, prefix-shared micro-batches.

Legend: P pairs, B rows, T tokens of a row, N response tokens that carry loss, S attention segments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_cli.data.pairs import Ids, Pair, Pairs, carries_loss, loss_tokens, read

Layout = Literal["shared", "packed", "padded", "alone"]
Step = list[tuple[int, ...]]  # the pairs of each micro-batch; rank r runs step[r::world]


# ---- the plan of a run ------------------------------------------------------------------------------------------


def plan_run(
    costs: Sequence[int],
    layout: Layout,
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    max_tokens: int,
    world: int,
    seed: int,
) -> list[Step]:
    """Every optimizer step of a run, as a pure function of its arguments.

    Each epoch holds every pair exactly once in an order of its own; its last step may be smaller than ``batch_size``.
    The number of micro-batches of a step is a multiple of ``world``; where pairs are too few some are empty.

    Units: ``costs`` and ``max_tokens`` in tokens, see ``row_costs``.
    """
    steps = step_pairs(len(costs), batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)
    return [cut_step(indices, costs, layout, max_tokens, world) for indices in steps]


def step_pairs(count: int, *, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> list[list[int]]:
    """Places of the pairs of every step, which neither the model nor the device decides."""
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
        if max_steps is not None and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def cut_step(indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int, world: int) -> Step:
    """One step's pairs as micro-batches, equally many for each of ``world`` ranks."""
    return _even(pack(indices, costs, layout, max_tokens), world)


def pack(indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int) -> list[tuple[int, ...]]:
    """First-fit-decreasing bins of at most ``max_tokens``; a pair that is longer gets a bin of its own.

    In a padded forward every pair takes up as much as the longest, which is the bin's first. Sequences that run alone
    have nothing to share: each pair gets a bin, so that all bins take as many forwards.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    if layout == "alone":
        max_tokens = 0
    for index in sorted(indices, key=lambda i: (-costs[i], i)):
        charges = (costs[b[0] if layout == "padded" else index] for b in bins)
        fit = next((b for b, (left, charge) in enumerate(zip(room, charges, strict=True)) if charge <= left), None)
        if fit is None:
            bins.append([index])
            room.append(max_tokens - costs[index])
        else:
            room[fit] -= costs[bins[fit][0] if layout == "padded" else index]
            bins[fit].append(index)
    return [tuple(b) for b in bins]


def _even(micro_batches: list[tuple[int, ...]], world: int) -> Step:
    """Split the fullest micro-batches until all ranks have equally many forwards; pad with empty ones at the end."""
    bins = list(micro_batches)
    while len(bins) % world:
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]))
        whole = bins[fullest]
        if len(whole) < 2:
            bins.append(())
        else:
            bins[fullest : fullest + 1] = [whole[::2], whole[1::2]]
    return bins


def row_costs(pairs: Sequence[Pair], layout: Layout) -> list[int]:
    """Tokens that each pair takes up in a forward of this layout."""
    lengths = (pairs if isinstance(pairs, Pairs) else Pairs(pairs)).lengths
    return cast(list[int], length_costs(lengths, layout).tolist())


def length_costs(lengths: Ids, layout: Layout) -> Ids:
    """The same from the lengths of prompt, chosen and rejected: (P, 3) -> (P,)."""
    prompt, chosen, rejected = lengths.T  # (P,) each
    if layout == "padded":
        costs = 2 * (prompt + np.maximum(chosen, rejected))
    else:
        costs = prompt * (1 if layout == "shared" else 2) + chosen + rejected
    return cast(Ids, costs)


def probes(pairs: Sequence[Pair], layout: Layout, max_tokens: int) -> list[Pair]:
    """Pairs to try a model on: the longest that fits ``max_tokens``, if one does, and the shortest."""
    costs = row_costs(pairs, layout)
    shortest = costs.index(min(costs))
    longest = max(range(len(costs)), key=lambda i: costs[i] if costs[i] <= max_tokens else 0)
    return [pairs[i] for i in ([longest] if costs[longest] <= max_tokens else []) + [shortest]]


# ---- one micro-batch --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segments:
    """Who attends to whom in a prefix-shared row: two query segments a pair, ``prompt+chosen`` and ``rejected``.

    Queries lie in the row in order. A segment's keys are ``key_index[key_bounds[s]:key_bounds[s+1]]``: itself for
    ``prompt+chosen``, the prompt and then itself for ``rejected``. Causality is aligned at the segment's last query and
    last key.

    Shapes: ``key_index`` (K,), ``query_bounds`` and ``key_bounds`` (S + 1,), all in tokens.
    """

    key_index: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    spans: tuple[tuple[int, int, int], ...]  # prompt, chosen and rejected tokens of each pair, on the host
    longest_query: int
    longest_key: int
    masks: dict[Any, Tensor] = field(default_factory=dict, init=False)  # those that attention has made for this row


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward over P pairs. Responses are in the order chosen, rejected, chosen, rejected, …

    Shapes: ``input_ids``, ``position_ids``, ``attention_mask`` (B, T), the latter two None where the model makes its
    own; ``predictors`` (N,) places in the flattened rows whose hidden state predicts ``targets`` (N,);
    ``lengths`` (2P,) tokens of each response that carry loss; ``pair_tokens`` the same a pair, on the host.
    ``alone`` are the row's sequences where each gets a forward of its own; what is computed is joined to the one row.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    pair_tokens: tuple[int, ...]
    segments: Segments | None
    alone: tuple[MicroBatch, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return _all_moved(self, device)


Tensors = TypeVar("Tensors", Segments, MicroBatch)


def _all_moved(of: Tensors, device: torch.device) -> Tensors:
    """A copy with every tensor, also those of its segments, on the device."""
    changed: dict[str, Any] = {}
    for each in fields(of):
        value = getattr(of, each.name)
        if isinstance(value, Tensor):
            changed[each.name] = moved(value, device)
        elif isinstance(value, Segments):
            changed[each.name] = _all_moved(value, device)
        elif each.name == "alone":
            changed[each.name] = tuple(_all_moved(one, device) for one in value)
    return replace(of, **changed)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from page-locked memory, so that the host need not wait for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def lay_out(pairs: Sequence[Pair], layout: Layout) -> MicroBatch:
    """Build the tensors of one forward over these pairs."""
    if layout == "shared":
        return _shared(pairs)
    sequences = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    if layout == "alone":
        return replace(_packed(sequences), alone=tuple(padded([sequence]) for sequence in sequences))
    return _packed(sequences) if layout == "packed" else padded(sequences)


def _shared(pairs: Sequence[Pair]) -> MicroBatch:
    """One row of ``prompt | chosen | rejected``; the rejected response's positions go on from the prompt's end."""
    ids, positions, keys, spans = [], [], [], []
    predictors: list[npt.ArrayLike] = []
    query_bounds, key_bounds, start = [0], [0], 0
    for pair in pairs:
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        ids += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(p + c), np.arange(p, p + r)]
        prompt_end, rejected = start + p - 1, start + p + c
        predictors += [np.arange(prompt_end, prompt_end + c), [prompt_end], np.arange(rejected, rejected + r - 1)]
        keys += [np.arange(start, rejected), np.arange(start, start + p), np.arange(rejected, rejected + r)]
        query_bounds += [rejected, rejected + r]
        key_bounds += [key_bounds[-1] + p + c, key_bounds[-1] + p + c + p + r]
        spans.append((p, c, r))
        start = rejected + r
    segments = Segments(
        key_index=_tensor(np.concatenate(keys)),
        query_bounds=torch.tensor(query_bounds, dtype=torch.int32),
        key_bounds=torch.tensor(key_bounds, dtype=torch.int32),
        spans=tuple(spans),
        longest_query=max(max(p + c, r) for p, c, r in spans),
        longest_key=max(p + max(c, r) for p, c, r in spans),
    )
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    return _micro_batch(
        _tensor(read(np.concatenate(ids)))[None],
        _tensor(np.concatenate(positions))[None],
        None,
        predictors,
        responses,
        segments,
    )


def _packed(sequences: Sequence[tuple[Ids, Ids]]) -> MicroBatch:
    """One row of whole sequences; positions restart at each, which is how transformers tells them apart."""
    ids = [part for sequence in sequences for part in sequence]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    ends = np.cumsum(lengths)
    predictors = [np.arange(end - len(r) - 1, end - 1) for end, (_, r) in zip(ends, sequences, strict=True)]
    positions = np.concatenate([np.arange(length) for length in lengths])
    return _micro_batch(
        _tensor(read(np.concatenate(ids)))[None],
        _tensor(positions)[None],
        None,
        predictors,
        [response for _, response in sequences],
        None,
    )


def padded(sequences: Sequence[tuple[Ids, Ids]]) -> MicroBatch:
    """One row a sequence, padded on the right; a single sequence needs no mask and is the plainest forward there is."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    predictors = []
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[row, :length] = read(np.concatenate([prompt, response]))
        mask[row, :length] = 1
        predictors.append(np.arange(len(prompt) - 1, length - 1) + row * longest)
    return _micro_batch(
        _tensor(ids),
        None,
        None if mask.all() else _tensor(mask),
        predictors,
        [response for _, response in sequences],
        None,
    )


def _micro_batch(
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    predictors: Sequence[npt.ArrayLike],
    responses: Sequence[Ids],
    segments: Segments | None,
) -> MicroBatch:
    """The tensors of a forward; ``predictors`` are of all response tokens, and kept of those that carry loss."""
    tokens, lengths = np.concatenate(responses), [loss_tokens(response) for response in responses]
    kept = carries_loss(tokens)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        predictors=_tensor(np.concatenate(predictors)[kept]),
        targets=_tensor(tokens[kept]),
        lengths=torch.tensor(lengths),
        pair_tokens=tuple(sum(lengths[i : i + 2]) for i in range(0, len(lengths), 2)),
        segments=segments,
    )


def _tensor(array: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
