"""The schedule of a run, in micro-batches, and a micro-batch's tensors: prefix-shared, packed or padded rows.

Legend: P pairs, B rows, T tokens of a row, N response tokens that carry loss, S attention segments, K keys.
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

from dpo_cli.data.pairs import Ids, Pair, count_loss_tokens, model_input_ids
from dpo_cli.utils.devices import device_kind

Layout = Literal["shared", "packed", "padded", "alone"]
Step = list[tuple[int, ...]]  # the pairs of each micro-batch; rank r runs step[r::world_size]
Integers = npt.NDArray[np.integer]
Value = TypeVar("Value")

# ---- which pairs ------------------------------------------------------------------------------------------------


def build_schedule(
    costs: Sequence[int],
    layout: Layout,
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    max_tokens: int,
    world_size: int,
    seed: int,
) -> list[Step]:
    """Return the micro-batches of every optimizer step of a run; a pure function of its arguments.

    Units: ``costs`` and ``max_tokens`` in tokens, see ``row_costs``.
    """
    steps = step_pairs(len(costs), batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)
    return [split_into_micro_batches(indices, costs, layout, max_tokens, world_size) for indices in steps]


def step_pairs(count: int, *, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> list[list[int]]:
    """Return the pair indices of every step, which depend on neither the model nor the device.

    Each epoch visits every pair exactly once, in an order of its own; its last step may be smaller than ``batch_size``.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
        if max_steps is not None and len(steps) >= max_steps:
            return steps[:max_steps]
    return steps


def split_into_micro_batches(
    indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int, world_size: int
) -> Step:
    """Pack the pairs of one step into micro-batches, the same number for each of ``world_size`` ranks.

    Those with the most pairs are split, else empty ones added, until their number is a multiple of ``world_size``.
    """
    bins = pack(indices, costs, layout, max_tokens)
    while len(bins) % world_size:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]))
        pairs = bins[largest]
        if len(pairs) < 2:
            bins.append(())
        else:
            bins[largest : largest + 1] = [pairs[::2], pairs[1::2]]
    return bins


def pack(indices: Sequence[int], costs: Sequence[int], layout: Layout, max_tokens: int) -> list[tuple[int, ...]]:
    """Pack pairs first-fit-decreasing in bins of at most ``max_tokens``; a longer pair gets its own bin.

    In a padded forward every pair costs as much as the longest, which is the first of its bin. In the layout ``alone``
    each pair gets its own bin, so that every bin takes the same number of forwards.
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


def row_costs(pairs: Sequence[Pair], layout: Layout) -> list[int]:
    """Return the number of tokens that each pair takes up in a forward of this layout."""
    lengths = ((len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)
    if layout == "padded":
        return [2 * (prompt + max(chosen, rejected)) for prompt, chosen, rejected in lengths]
    return [prompt * (1 if layout == "shared" else 2) + chosen + rejected for prompt, chosen, rejected in lengths]


def probe_pairs(pairs: Sequence[Pair], layout: Layout, max_tokens: int) -> list[Pair]:
    """Select pairs for a trial forward: the longest that fits into ``max_tokens``, if any, and the shortest."""
    costs = row_costs(pairs, layout)
    shortest = costs.index(min(costs))
    longest = max(range(len(costs)), key=lambda i: costs[i] if costs[i] <= max_tokens else 0)
    return [pairs[i] for i in ([longest] if costs[longest] <= max_tokens else []) + [shortest]]


# ---- their tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segments:
    """The attention segments of a prefix-shared row: two per pair, ``prompt + chosen`` and ``rejected``.

    The queries of all segments follow each other in the row. The keys of segment s are
    ``key_index[key_bounds[s]:key_bounds[s+1]]``: its own tokens for ``prompt + chosen``; the prompt and its own tokens
    for ``rejected``. The causal mask is aligned to the last query and the last key of a segment.

    Shapes: ``key_index`` (K,), ``query_bounds`` and ``key_bounds`` (S + 1,), all in tokens.
    """

    key_index: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    spans: tuple[tuple[int, int, int], ...]  # prompt, chosen and rejected tokens of each pair, on the host
    longest_query: int
    longest_key: int
    masks: dict[Any, Tensor] = field(default_factory=dict, init=False)  # cache of models/attention.py


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward over P pairs. Responses are ordered chosen, rejected, chosen, rejected, …

    Shapes: ``input_ids``, ``position_ids``, ``attention_mask`` (B, T), the latter two None where the model makes its
    own; ``logit_positions`` (N,) indices into the flattened rows, whose hidden states predict ``targets`` (N,);
    ``lengths`` (2P,) tokens of each response that carry loss; ``pair_tokens`` their sum per pair, on the host.
    ``alone`` holds one batch per sequence if each runs in a forward of its own; the results are concatenated.

    The rest is what the loss reads beside the policy's log-probs: ``token_weights`` (N,) of LD-DPO; ``weights`` and
    ``margins`` (P,) of the pairs; ``ref_logps`` and ``weighted_ref_logps`` (2P,) nats, chosen first, the latter with
    ``token_weights``; the mean length of the step's chosen responses in tokens, the mean reward of earlier steps.
    ``places`` are the indices of the pairs in the run. A ``dummy`` keeps a rank in lockstep and counts for nothing.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    logit_positions: Tensor
    targets: Tensor
    lengths: Tensor
    pair_tokens: tuple[int, ...]
    segments: Segments | None
    token_weights: Tensor
    weights: Tensor
    margins: Tensor
    ref_logps: Tensor
    weighted_ref_logps: Tensor
    mean_chosen_length: float = 1.0
    reward_baseline: float = 0.0
    places: tuple[int, ...] = ()
    dummy: bool = False
    alone: tuple[MicroBatch, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device."""
        return to_device(self, device)


def to_device(value: Value, device: torch.device) -> Value:
    """Copy a tensor, or all tensors of a batch, to a device.

    Where that helps they go through pinned memory, so that the host does not wait for the copy.
    """
    copy: Any = value
    if isinstance(value, Tensor):
        copy = value.pin_memory().to(device, non_blocking=True) if device_kind(device).pinned else value.to(device)
    elif isinstance(value, tuple):
        copy = tuple(to_device(each, device) for each in value)
    elif isinstance(value, (Segments, MicroBatch)):
        copies = {each.name: to_device(getattr(value, each.name), device) for each in fields(value) if each.init}
        copy = replace(value, **copies)
    return cast(Value, copy)


def collate(pairs: Sequence[Pair], layout: Layout, ld_alpha: float = 1.0) -> MicroBatch:
    """Build the tensors of one forward over these pairs; their reference log-probs are zero until they are set."""
    sequences = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    if layout == "shared":
        batch = _shared(pairs)
    elif layout == "padded":
        batch = padded(sequences)
    else:
        alone = tuple(padded([sequence]) for sequence in sequences) if layout == "alone" else ()
        batch = replace(_packed(sequences), alone=alone)
    return replace(
        batch,
        token_weights=length_weights(batch.lengths, ld_alpha),
        weights=torch.tensor([pair.weight for pair in pairs]),
        margins=torch.tensor([pair.margin for pair in pairs]),
    )


def length_weights(lengths: Tensor, alpha: float) -> Tensor:
    """Weigh the tokens beyond the length of the shorter response of a pair by ``alpha``, all others by 1.

    Shapes: ``lengths`` (2P,), chosen, rejected, … -> (N,), float32.
    Source: LD-DPO, arXiv 2409.06411.
    """
    shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)  # (2P,)
    counts = torch.stack([shared, lengths - shared], 1).flatten()  # (4P,)
    return torch.tensor([1.0, alpha]).repeat(len(lengths)).repeat_interleave(counts)


def _shared(pairs: Sequence[Pair]) -> MicroBatch:
    """Build one row of ``prompt | chosen | rejected``; positions of the rejected response continue the prompt's."""
    ids, positions, keys, spans = [], [], [], []
    logit_positions: list[npt.ArrayLike] = []
    query_bounds, key_bounds, start = [0], [0], 0
    for pair in pairs:
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        ids += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(p + c), np.arange(p, p + r)]
        prompt_end, rejected = start + p - 1, start + p + c
        logit_positions += [np.arange(prompt_end, prompt_end + c), [prompt_end], np.arange(rejected, rejected + r - 1)]
        keys += [np.arange(start, rejected), np.arange(start, start + p), np.arange(rejected, rejected + r)]
        query_bounds += [rejected, rejected + r]
        key_bounds += [key_bounds[-1] + p + c, key_bounds[-1] + p + c + p + r]
        spans.append((p, c, r))
        start = rejected + r
    segments = Segments(
        key_index=torch.as_tensor(np.concatenate(keys), dtype=torch.int64),
        query_bounds=torch.tensor(query_bounds, dtype=torch.int32),
        key_bounds=torch.tensor(key_bounds, dtype=torch.int32),
        spans=tuple(spans),
        longest_query=max(max(p + c, r) for p, c, r in spans),
        longest_key=max(p + max(c, r) for p, c, r in spans),
    )
    row = model_input_ids(np.concatenate(ids))[None]
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    return _micro_batch(row, np.concatenate(positions)[None], None, logit_positions, responses, segments)


def _packed(sequences: Sequence[tuple[Ids, Ids]]) -> MicroBatch:
    """Build one row of whole sequences; positions restart at each, which is how transformers separates them."""
    row = model_input_ids(np.concatenate([part for sequence in sequences for part in sequence]))[None]
    responses = [response for _, response in sequences]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    ends = np.cumsum(lengths)
    logit_positions = [np.arange(end - len(r) - 1, end - 1) for end, r in zip(ends, responses, strict=True)]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return _micro_batch(row, positions, None, logit_positions, responses, None)


def padded(sequences: Sequence[tuple[Ids, Ids]]) -> MicroBatch:
    """Build one row per sequence, padded on the right; without a mask where nothing is padded."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    logit_positions = []
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[row, :length] = model_input_ids(np.concatenate([prompt, response]))
        mask[row, :length] = 1
        logit_positions.append(np.arange(len(prompt) - 1, length - 1) + row * longest)
    responses = [response for _, response in sequences]
    return _micro_batch(ids, None, None if mask.all() else mask, logit_positions, responses, None)


def _micro_batch(
    ids: Integers,
    positions: Integers | None,
    mask: Integers | None,
    logit_positions: Sequence[npt.ArrayLike],
    responses: Sequence[Ids],
    segments: Segments | None,
) -> MicroBatch:
    """Build the batch; ``logit_positions`` covers all response tokens, of which those that carry loss are kept."""
    tokens, lengths = np.concatenate(responses), [count_loss_tokens(response) for response in responses]
    has_loss, pairs = tokens >= 0, len(responses) // 2
    return MicroBatch(
        input_ids=torch.as_tensor(ids, dtype=torch.int64),
        position_ids=None if positions is None else torch.as_tensor(positions, dtype=torch.int64),
        attention_mask=None if mask is None else torch.as_tensor(mask, dtype=torch.int64),
        logit_positions=torch.as_tensor(np.concatenate(logit_positions)[has_loss], dtype=torch.int64),
        targets=torch.as_tensor(tokens[has_loss], dtype=torch.int64),
        lengths=torch.tensor(lengths),
        pair_tokens=tuple(sum(lengths[i : i + 2]) for i in range(0, len(lengths), 2)),
        segments=segments,
        token_weights=torch.ones(sum(lengths)),
        weights=torch.ones(pairs),
        margins=torch.zeros(pairs),
        ref_logps=torch.zeros(2 * pairs),
        weighted_ref_logps=torch.zeros(2 * pairs),
    )
