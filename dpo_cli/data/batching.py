"""The tensors of a micro-batch: a row of prompt trees, packed or padded rows.

Legend: P pairs, B rows, T tokens of a row, N response tokens that carry loss, E distinct ones among them, S attention
segments, K keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_cli.data.pairs import Ids, Pair, count_loss_tokens, model_input_ids, rankings
from dpo_cli.data.schedule import Layout
from dpo_cli.data.trees import branches, sequences_of
from dpo_cli.utils.devices import device_kind

Integers = npt.NDArray[np.integer]
Make = Callable[..., "MicroBatch"]  # ``_micro_batch`` with its keywords
Value = TypeVar("Value")


class Piece(NamedTuple):
    """The part of a batch that the head runs over at a time: slices of P, N and E, and the pairs of each ranking."""

    pairs: slice
    tokens: slice
    distinct: slice
    ranking_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segments:
    """The attention segments of a row of prompt trees: the tokens of each sequence that no earlier one has.

    The queries of all segments follow each other in the row. The keys of segment s are its whole sequence, from the
    root of its tree: ``key_index[key_bounds[s]:key_bounds[s+1]]``. The causal mask is aligned to the last query and the
    last key of a segment. ``parts`` are the same keys as (segment, first token, end), on the host.

    Shapes: ``key_index`` (K,), ``query_bounds`` and ``key_bounds`` (S + 1,), in tokens; ``uses`` (T,), float32: how
    many responses have the token in their sequence.
    """

    key_index: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    uses: Tensor
    parts: tuple[tuple[tuple[int, int, int], ...], ...]
    longest_query: int
    longest_key: int
    masks: dict[Any, Tensor] = field(default_factory=dict, init=False)  # cache of models/attention.py


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward over P pairs. Responses are ordered chosen, rejected, chosen, rejected, …

    Shapes: ``input_ids``, ``position_ids``, ``attention_mask`` (B, T), the latter two None where the model makes its
    own; ``logit_positions`` (E,) indices into the flattened rows, whose hidden states predict ``targets`` (E,), each
    distinct token once; ``edges`` (N,) the place of each response token among them; ``lengths`` (2P,) tokens of each
    response that carry loss. ``pieces`` are what the head runs over at a time. ``alone`` holds one batch per
    sequence if each runs in a forward of its own; the results are concatenated.

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
    edges: Tensor
    lengths: Tensor
    pieces: tuple[Piece, ...]
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
        pinned = device.type != "cpu" and device_kind(device).pinned
        copy = value.pin_memory().to(device, non_blocking=True) if pinned else value.to(device)
    elif isinstance(value, tuple) and not isinstance(value, Piece):
        copy = tuple(to_device(each, device) for each in value)
    elif isinstance(value, (Segments, MicroBatch)):
        copies = {each.name: to_device(getattr(value, each.name), device) for each in fields(value) if each.init}
        copy = replace(value, **copies)
    return cast(Value, copy)


def collate(
    pairs: Sequence[Pair], layout: Layout, ld_alpha: float = 1.0, max_logit_rows: int = sys.maxsize
) -> MicroBatch:
    """Build the tensors of one forward over these pairs; their reference log-probs are zero until they are set.

    ``max_logit_rows``: the most tokens that the head predicts at a time, unless one ranking has more.
    """
    sequences = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    ranking_sizes = [len(ranking) for ranking in rankings(range(len(pairs)), pairs)]
    make = partial(_micro_batch, max_logit_rows=max_logit_rows, ranking_sizes=ranking_sizes)
    if layout == "shared":
        batch = _shared(pairs, make)
    elif layout == "padded":
        batch = padded(sequences, make)
    else:
        alone = tuple(padded([sequence]) for sequence in sequences) if layout == "alone" else ()
        batch = replace(_packed(sequences, make), alone=alone)
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


def _shared(pairs: Sequence[Pair], make: Make) -> MicroBatch:
    """Build one row of prompt trees; the positions of a sequence's own tokens continue those that it shares."""
    sequences = sequences_of(pairs)
    ids, positions, key_index, queries = [], [], [], []
    parts = list[tuple[tuple[int, int, int], ...]]()
    paths: list[Integers] = []  # the row's index of each token of a sequence
    routes: list[list[tuple[int, int, int]]] = []  # the same as parts of segments
    start = 0
    for sequence, (earlier, depth) in zip(sequences, branches(pairs, sequences), strict=True):
        own = len(sequence) - depth
        path, route = (paths[earlier][:depth], _cut(routes[earlier], depth)) if depth else (np.arange(0), [])
        if own:
            ids.append(sequence[depth:])
            positions.append(np.arange(depth, len(sequence)))
            path, route = np.append(path, np.arange(start, start + own)), [*route, (len(parts), 0, own)]
            key_index.append(path)
            queries.append(own)
            parts.append(tuple(route))
            start += own
        paths.append(path)
        routes.append(route)
    keys = [len(path) for path in key_index]
    segments = Segments(
        key_index=torch.as_tensor(np.concatenate(key_index), dtype=torch.int64),
        query_bounds=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        key_bounds=torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
        uses=torch.as_tensor(np.bincount(np.concatenate(paths), minlength=start), dtype=torch.float32),
        parts=tuple(parts),
        longest_query=max(queries),
        longest_key=max(keys),
    )
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    tails = [path[-len(response) - 1 :] for path, response in zip(paths, responses, strict=True)]
    return make(
        np.concatenate(ids)[None],
        np.concatenate(positions)[None],
        None,
        [tail[:-1] for tail in tails],
        responses,
        segments,
        np.concatenate([tail[1:] for tail in tails]),
    )


def _cut(route: Sequence[tuple[int, int, int]], depth: int) -> list[tuple[int, int, int]]:
    """Return the parts of a sequence up to this many tokens."""
    kept = []
    for segment, begin, end in route:
        if depth > 0:
            kept.append((segment, begin, min(end, begin + depth)))
        depth -= end - begin
    return kept


def _packed(sequences: Sequence[tuple[Ids, Ids]], make: Make) -> MicroBatch:
    """Build one row of whole sequences; positions restart at each, which is how transformers separates them."""
    row = model_input_ids(np.concatenate([part for sequence in sequences for part in sequence]))[None]
    responses = [response for _, response in sequences]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    ends = np.cumsum(lengths)
    logit_positions = [np.arange(end - len(r) - 1, end - 1) for end, r in zip(ends, responses, strict=True)]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return make(row, positions, None, logit_positions, responses)


def padded(sequences: Sequence[tuple[Ids, Ids]], make: Make | None = None) -> MicroBatch:
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
    return (make or _micro_batch)(ids, None, None if mask.all() else mask, logit_positions, responses)


def _micro_batch(
    ids: Integers,
    positions: Integers | None,
    mask: Integers | None,
    logit_positions: Sequence[Integers],
    responses: Sequence[Ids],
    segments: Segments | None = None,
    places: Integers | None = None,
    *,
    max_logit_rows: int = sys.maxsize,
    ranking_sizes: Sequence[int] = (),
) -> MicroBatch:
    """Build the batch; ``logit_positions`` covers all response tokens, of which those that carry loss are kept.

    ``places`` are the indices of the response tokens in the row, where several responses may share one.
    """
    tokens, lengths = np.concatenate(responses), [count_loss_tokens(response) for response in responses]
    has_loss, pairs = tokens >= 0, len(responses) // 2
    predicted = np.arange(int(has_loss.sum())) if places is None else places[has_loss]
    pieces, first, edges = _pieces(predicted, lengths, max_logit_rows, ranking_sizes or [1] * pairs)
    return MicroBatch(
        input_ids=torch.as_tensor(ids, dtype=torch.int64),
        position_ids=None if positions is None else torch.as_tensor(positions, dtype=torch.int64),
        attention_mask=None if mask is None else torch.as_tensor(mask, dtype=torch.int64),
        logit_positions=torch.as_tensor(np.concatenate(logit_positions)[has_loss][first], dtype=torch.int64),
        targets=torch.as_tensor(tokens[has_loss][first], dtype=torch.int64),
        edges=torch.as_tensor(edges, dtype=torch.int64),
        lengths=torch.tensor(lengths),
        pieces=pieces,
        segments=segments,
        token_weights=torch.ones(sum(lengths)),
        weights=torch.ones(pairs),
        margins=torch.zeros(pairs),
        ref_logps=torch.zeros(2 * pairs),
        weighted_ref_logps=torch.zeros(2 * pairs),
    )


def _pieces(
    predicted: Integers, lengths: Sequence[int], max_rows: int, ranking_sizes: Sequence[int]
) -> tuple[tuple[Piece, ...], Integers, Integers]:
    """Cut a batch into pieces of whole rankings of at most ``max_rows`` distinct tokens, unless one ranking has more.

    Shapes: ``predicted`` (N,) names of the tokens -> the pieces; the first place of each of the E distinct tokens of
    the pieces, (E,); the place of each token among them, (N,).
    """
    bounds_of_pairs = np.cumsum([0, *ranking_sizes])  # of the rankings
    order, ends = np.argsort(predicted, kind="stable"), np.cumsum(lengths)[2 * bounds_of_pairs[1:] - 1].tolist()
    again = predicted[order[1:]] == predicted[order[:-1]]
    earlier = np.full(len(predicted), -1)  # the last place with the same token
    earlier[order[1:][again]] = order[:-1][again]
    starts, rows = [0], 0  # the first ranking of each piece
    for ranking, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        piece = ends[starts[-1] - 1] if starts[-1] else 0  # its first token
        rows += int((earlier[begin:end] < piece).sum())
        if rows > max_rows and ranking > starts[-1]:
            starts.append(ranking)
            rows = int((earlier[begin:end] < begin).sum())
    cuts = [ends[ranking - 1] for ranking in starts[1:]]
    piece_of = np.searchsorted(cuts, np.arange(len(predicted)), side="right")
    _, first, names = np.unique(piece_of * (predicted.max() + 1) + predicted, return_index=True, return_inverse=True)
    ranks = np.argsort(np.argsort(first))  # tokens in the order of their first place
    first = np.sort(first)
    bounds = [
        bounds_of_pairs[[*starts, len(ends)]].tolist(),
        [0, *cuts, len(predicted)],
        [0, *np.searchsorted(first, cuts).tolist(), len(first)],
    ]
    slices = ([slice(a, b) for a, b in pairwise(each)] for each in bounds)
    sizes = [tuple(ranking_sizes[a:b]) for a, b in pairwise([*starts, len(ends)])]
    return tuple(map(Piece, *slices, sizes)), first, ranks[names]
