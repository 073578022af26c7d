"""The plan of a run and the layouts of a micro-batch."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.data.batching import Layout, MicroBatch, build_schedule, collate, pack, padded, row_costs
from dpo_cli.data.pairs import Pair, model_input_ids
from tests.helpers import random_pairs

LAYOUTS: list[Layout] = ["shared", "packed", "padded", "alone"]

# ---- the plan -----------------------------------------------------------------------------------------------------

COSTS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
ARGUMENTS = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(LAYOUTS),
        "batch_size": st.integers(1, 20),
        "epochs": st.integers(1, 3),
        "max_steps": st.none() | st.integers(1, 30),
        "max_tokens": st.integers(16, 700),
        "world_size": st.integers(1, 5),
        "seed": st.integers(0, 2**40),
    }
)


def forward_size(indices: tuple[int, ...], costs: list[int], layout: Layout) -> int:
    """Tokens of a forward; in a padded one every pair takes up as much as the longest."""
    sizes = [costs[i] for i in indices]
    return len(sizes) * max(sizes) if layout == "padded" else sum(sizes)


def pairs_of(step: list[tuple[int, ...]]) -> list[int]:
    return [index for micro_batch in step for index in micro_batch]


@settings(deadline=None)
@given(costs=COSTS, arguments=ARGUMENTS)
def test_plan_holds_every_pair_once_an_epoch(costs: list[int], arguments: dict[str, Any]) -> None:
    plan = build_schedule(costs, **arguments)
    batch_size, max_steps = arguments["batch_size"], arguments["max_steps"]
    an_epoch = -(-len(costs) // batch_size)
    whole = an_epoch * arguments["epochs"]
    assert len(plan) == (whole if max_steps is None else min(whole, max_steps))
    for start in range(0, len(plan), an_epoch):
        steps = plan[start : start + an_epoch]
        seen = sorted(index for step in steps for index in pairs_of(step))
        if len(steps) == an_epoch:
            assert seen == list(range(len(costs)))
        else:  # max_steps cut the epoch short
            assert len(set(seen)) == len(seen) == len(steps) * batch_size
        assert [len(pairs_of(step)) for step in steps[: an_epoch - 1]] == [batch_size] * len(steps[: an_epoch - 1])
    assert all(1 <= len(pairs_of(step)) <= batch_size for step in plan)


@settings(deadline=None)
@given(costs=COSTS, arguments=ARGUMENTS)
def test_micro_batches_fit_and_are_even_over_ranks(costs: list[int], arguments: dict[str, Any]) -> None:
    world = arguments["world_size"]
    for step in build_schedule(costs, **arguments):
        assert len(step) % world == 0
        assert len(step) < len(pairs_of(step)) + world  # no more empty ones than it takes
        for indices in step:
            if len(indices) > 1:
                assert forward_size(indices, costs, arguments["layout"]) <= arguments["max_tokens"]
        empty = [not indices for indices in step]
        assert empty == sorted(empty) and sum(empty) < world  # at the end, so that rank 0 always has a pair


@settings(deadline=None)
@given(costs=COSTS, arguments=ARGUMENTS, noise=st.integers(0, 9))
def test_plan_is_a_pure_function(costs: list[int], arguments: dict[str, Any], noise: int) -> None:
    plan = build_schedule(costs, **arguments)
    random.seed(noise)
    before = random.getstate()
    assert build_schedule(tuple(costs), **arguments) == plan
    assert random.getstate() == before


def test_max_steps_is_a_cut_of_the_same_plan() -> None:
    arguments: dict[str, Any] = {
        "layout": "shared",
        "batch_size": 4,
        "epochs": 2,
        "max_tokens": 100,
        "world_size": 2,
        "seed": 3,
    }
    whole = build_schedule([10] * 18, max_steps=None, **arguments)
    assert len(whole) == 10
    assert build_schedule([10] * 18, max_steps=7, **arguments) == whole[:7]


def test_seed_and_epoch_change_the_order() -> None:
    def orders(seed: int) -> list[list[int]]:
        plan = build_schedule(
            [1] * 50, "shared", batch_size=1, epochs=2, max_steps=None, max_tokens=16, world_size=1, seed=seed
        )
        order = [index for step in plan for index in pairs_of(step)]
        return [order[:50], order[50:]]

    first, second = orders(0), orders(1)
    assert first[0] != first[1]  # each epoch has an order of its own
    assert first[0] != second[0] and first[1] != second[1]
    assert first[0] != sorted(first[0])


def test_which_pairs_make_a_step_does_not_depend_on_memory_or_ranks() -> None:
    costs = [7 * i % 90 + 10 for i in range(30)]

    def members(**changed: int) -> list[list[int]]:
        arguments = {"batch_size": 8, "epochs": 2, "max_tokens": 200, "world_size": 1, "seed": 5} | changed
        return [sorted(pairs_of(step)) for step in build_schedule(costs, "shared", max_steps=None, **arguments)]

    assert members() == members(max_tokens=16) == members(max_tokens=9999) == members(world_size=3)


def test_pack_by_hand() -> None:
    """First fit, longest first; the pair of 120 is longer than the budget and goes alone."""
    assert pack([0, 1, 2, 3, 4, 5], [60, 30, 120, 50, 40, 10], "shared", 100) == [(2,), (0, 4), (3, 1, 5)]


def test_pack_padded_by_hand() -> None:
    """A second pair takes up as much as the longest of its forward: 2 * 50 and 2 * 30 fit, 2 * 60 does not."""
    assert pack([0, 1, 2, 3, 4, 5], [60, 30, 120, 50, 40, 10], "padded", 100) == [(2,), (0,), (3, 4), (1, 5)]


def test_ranks_get_equally_many_micro_batches_by_hand() -> None:
    def step(costs: list[int], world: int) -> list[tuple[int, ...]]:
        return build_schedule(
            costs, "shared", batch_size=9, epochs=1, max_steps=1, max_tokens=100, world_size=world, seed=0
        )[0]

    assert [len(indices) for indices in step([10] * 5, 1)] == [5]
    assert [len(indices) for indices in step([10] * 5, 2)] == [3, 2]  # the one bin is split
    assert [len(indices) for indices in step([100, 50, 50], 3)] == [1, 1, 1]
    assert [len(indices) for indices in step([100, 100, 100], 2)] == [1, 1, 1, 0]


# ---- layouts ------------------------------------------------------------------------------------------------------


def vector(*ids: int) -> Any:
    return np.array(ids, dtype=np.int32)


TWO = [
    Pair("a", vector(10, 11, 12), vector(20, 21), vector(30, 31, 32)),
    Pair("b", vector(40), vector(50, 51, 52), vector(60)),
]


def test_shared_layout_by_hand() -> None:
    batch = collate(TWO, "shared")
    #                                      prompt      chosen  rejected    | prompt chosen    rejected
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 50, 51, 52, 60]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 1]]
    assert batch.attention_mask is None
    # The prompt's last token (2, then 8) predicts the first token of both responses.
    assert batch.logit_positions.tolist() == [2, 3, 2, 5, 6, 8, 9, 10, 8]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32, 50, 51, 52, 60]
    assert batch.lengths.tolist() == [2, 3, 3, 1]
    segments = batch.segments
    assert segments is not None
    assert segments.spans == ((3, 2, 3), (1, 3, 1))
    # Segments: a's prompt+chosen (5 queries), a's rejected (3), b's prompt+chosen (4), b's rejected (1).
    assert segments.query_bounds.tolist() == [0, 5, 8, 12, 13]
    assert segments.key_bounds.tolist() == [0, 5, 11, 15, 17]
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 8, 12]
    assert (segments.longest_query, segments.longest_key) == (5, 6)
    assert segments.query_bounds.dtype == segments.key_bounds.dtype == torch.int32  # what the flash kernel takes


def test_packed_layout_by_hand() -> None:
    batch = collate(TWO, "packed")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 31, 32, 40, 50, 51, 52, 40, 60]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]]
    assert batch.attention_mask is None and batch.segments is None
    assert batch.logit_positions.tolist() == [2, 3, 7, 8, 9, 11, 12, 13, 15]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32, 50, 51, 52, 60]


def test_padded_layout_by_hand() -> None:
    batch = collate(TWO, "padded")
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21, 0],
        [10, 11, 12, 30, 31, 32],
        [40, 50, 51, 52, 0, 0],
        [40, 60, 0, 0, 0, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [5, 6, 4, 2]
    assert batch.position_ids is None and batch.segments is None
    assert batch.logit_positions.tolist() == [2, 3, 8, 9, 10, 12, 13, 14, 18]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32, 50, 51, 52, 60]


HIDDEN = [  # 21, 30 and 31, 50 carry no loss
    Pair("a", vector(10, 11, 12), vector(20, ~21), vector(~30, ~31, 32)),
    Pair("b", vector(40), vector(~50, 51, 52), vector(60)),
]
POSITIONS = {"shared": [2, 6, 9, 10, 8], "packed": [2, 9, 12, 13, 15], "padded": [2, 10, 13, 14, 18]}
POSITIONS["alone"] = POSITIONS["packed"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_without_loss_are_read_and_not_predicted_by_hand(layout: Layout) -> None:
    batch, whole = collate(HIDDEN, layout), collate(TWO, layout)
    for name in ("input_ids", "position_ids", "attention_mask"):
        got, expected = getattr(batch, name), getattr(whole, name)
        assert got is expected or torch.equal(got, expected)
    assert batch.logit_positions.tolist() == POSITIONS[layout]
    assert batch.targets.tolist() == [20, 32, 51, 52, 60]
    assert batch.lengths.tolist() == [1, 1, 2, 1] and batch.pair_tokens == (2, 3)
    assert row_costs(HIDDEN, layout) == row_costs(TWO, layout)  # a forward computes them all


def test_sequences_that_run_alone_by_hand() -> None:
    """One row of them, for what is computed to be joined to; and each as the plainest forward there is."""
    batch, packed = collate(TWO, "alone"), collate(TWO, "packed")
    assert torch.equal(batch.input_ids, packed.input_ids) and torch.equal(batch.logit_positions, packed.logit_positions)
    singles = [padded([(pair.prompt, response)]) for pair in TWO for response in (pair.chosen, pair.rejected)]
    assert [each.input_ids.tolist() for each in batch.alone] == [each.input_ids.tolist() for each in singles]
    assert all(each.attention_mask is each.position_ids is None for each in batch.alone)
    assert pack([0, 1, 2], [10, 30, 20], "alone", 100) == [(1,), (2,), (0,)]  # as many forwards in each


def test_a_single_sequence_needs_no_mask() -> None:
    batch = padded([(TWO[0].prompt, TWO[0].rejected)])
    assert batch.input_ids.tolist() == [[10, 11, 12, 30, 31, 32]]
    assert batch.attention_mask is None and batch.position_ids is None


IDS = st.lists(st.integers(1, 999), min_size=1, max_size=12).map(lambda ids: vector(*ids))
RESPONSES = (
    st.lists(st.integers(-999, 999), min_size=1, max_size=12)
    .filter(lambda ids: max(ids) >= 0)  # something carries loss
    .map(lambda ids: vector(*ids))
)
PAIRS = st.lists(st.builds(Pair, st.just("row"), IDS, RESPONSES, RESPONSES), min_size=1, max_size=6)


@settings(deadline=None)
@given(pairs=PAIRS, layout=st.sampled_from(LAYOUTS))
def test_every_token_with_loss_is_predicted_from_the_one_before(pairs: list[Pair], layout: Layout) -> None:
    batch = collate(pairs, layout)
    responses = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    lengths = [sum(token >= 0 for token in response.tolist()) for _, response in responses]
    assert batch.lengths.tolist() == lengths
    assert batch.pair_tokens == tuple(map(sum, zip(lengths[::2], lengths[1::2], strict=True)))
    targets, before, places = [], [], []
    for prompt, response in responses:
        for place, token in enumerate(response.tolist()):
            if token >= 0:
                targets.append(token)
                before.append(model_input_ids(response)[place - 1] if place else prompt[-1])
                places.append(len(prompt) - 1 + place)
    assert batch.targets.tolist() == targets
    assert batch.input_ids.reshape(-1)[batch.logit_positions].tolist() == before
    if batch.position_ids is not None:
        assert batch.position_ids.reshape(-1)[batch.logit_positions].tolist() == places


@settings(deadline=None)
@given(pairs=PAIRS, layout=st.sampled_from(LAYOUTS))
def test_cost_is_the_size_of_the_forward(pairs: list[Pair], layout: Layout) -> None:
    """Exactly for a pair; in a padded batch of several, short pairs are padded to the longest."""
    for pair in pairs:
        assert collate([pair], layout).input_ids.numel() == row_costs([pair], layout)[0]
    together = collate(pairs, layout).input_ids.numel()
    costs = row_costs(pairs, layout)
    assert together == (len(pairs) * max(costs) if layout == "padded" else sum(costs))


@settings(deadline=None)
@given(pairs=PAIRS)
def test_segments_see_their_own_sequence_and_nothing_else(pairs: list[Pair]) -> None:
    """A segment's keys, read in order, are prompt + response; its queries are the last of them."""
    batch = collate(pairs, "shared")
    segments = batch.segments
    assert segments is not None
    ids, queries, keys = batch.input_ids[0], segments.query_bounds.tolist(), segments.key_bounds.tolist()
    assert len(queries) == len(keys) == 2 * len(pairs) + 1 and queries[-1] == len(ids)
    for s in range(2 * len(pairs)):
        pair = pairs[s // 2]
        places = segments.key_index[keys[s] : keys[s + 1]]
        response = pair.rejected if s % 2 else pair.chosen
        assert ids[places].tolist() == [*pair.prompt, *model_input_ids(response)]
        own = list(range(queries[s], queries[s + 1]))
        assert places.tolist()[-len(own) :] == own
        assert len(own) == len(response) + (0 if s % 2 else len(pair.prompt))
    assert segments.longest_query == max(np.diff(queries))
    assert segments.longest_key == max(np.diff(keys))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_moves(layout: Layout) -> None:
    moved = collate(random_pairs(3), layout).to(torch.device("meta"))
    parts = [part for part in (moved, moved.segments, *moved.alone) if part is not None]
    found = [getattr(part, name) for part in parts for name in part.__slots__]
    tensors = [value for value in found if isinstance(value, Tensor)]
    assert len(tensors) == {"shared": 13, "packed": 10, "padded": 10, "alone": 10 + 6 * 9}[layout]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(moved, MicroBatch)
