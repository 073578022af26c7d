"""The plan of a run and the layouts of a micro-batch."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.data.batching import MicroBatch, collate, padded
from dpo_cli.data.pairs import Pair, model_input_ids
from dpo_cli.data.schedule import Layout, build_schedule, count_tokens, pack, parts, row_costs
from tests.helpers import random_pairs

LAYOUTS: list[Layout] = ["shared", "packed", "padded", "alone"]

# ---- the plan -----------------------------------------------------------------------------------------------------


def cut_from(lengths: list[tuple[int, int, int]], alike: bool) -> list[Pair]:
    """Pairs of these lengths; their prompts begin alike, or with tokens of their own."""
    rng = np.random.default_rng(len(lengths))
    common = rng.integers(5, 900, 200).astype(np.int32)
    pairs = []
    for row, (prompt, *responses) in enumerate(lengths):
        ids = common[:prompt] if alike else np.append(vector(1000 + row), common[: prompt - 1])
        pairs.append(Pair(f"row {row}", ids, *(rng.integers(5, 900, n).astype(np.int32) for n in responses)))
    return pairs


def vector(*ids: int) -> Any:
    return np.array(ids, dtype=np.int32)


def sized(*costs: int) -> list[Pair]:
    """Pairs that take up so many tokens in a row of trees, and share none."""
    return cut_from([(cost - 2, 1, 1) for cost in costs], alike=False)


LENGTHS = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30)
SCHEDULED = st.builds(cut_from, LENGTHS, st.booleans())
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


def pairs_of(step: list[tuple[int, ...]]) -> list[int]:
    return [index for micro_batch in step for index in micro_batch]


@settings(deadline=None)
@given(pairs=SCHEDULED, arguments=ARGUMENTS)
def test_plan_holds_every_pair_once_an_epoch(pairs: list[Pair], arguments: dict[str, Any]) -> None:
    plan = build_schedule(pairs, **arguments)
    batch_size, max_steps = arguments["batch_size"], arguments["max_steps"]
    an_epoch = -(-len(pairs) // batch_size)
    whole = an_epoch * arguments["epochs"]
    assert len(plan) == (whole if max_steps is None else min(whole, max_steps))
    for start in range(0, len(plan), an_epoch):
        steps = plan[start : start + an_epoch]
        seen = sorted(index for step in steps for index in pairs_of(step))
        if len(steps) == an_epoch:
            assert seen == list(range(len(pairs)))
        else:  # max_steps cut the epoch short
            assert len(set(seen)) == len(seen) == len(steps) * batch_size
        assert [len(pairs_of(step)) for step in steps[: an_epoch - 1]] == [batch_size] * len(steps[: an_epoch - 1])
    assert all(1 <= len(pairs_of(step)) <= batch_size for step in plan)


@settings(deadline=None)
@given(pairs=SCHEDULED, arguments=ARGUMENTS)
def test_micro_batches_fit_and_are_even_over_ranks(pairs: list[Pair], arguments: dict[str, Any]) -> None:
    world, costs = arguments["world_size"], row_costs(pairs, arguments["layout"])
    for step in build_schedule(pairs, **arguments):
        assert len(step) % world == 0
        assert len(step) < len(pairs_of(step)) + world  # no more empty ones than it takes
        for indices in step:
            if len(indices) > 1:
                size = collate([pairs[i] for i in indices], arguments["layout"]).input_ids.numel()
                assert size <= arguments["max_tokens"]
                assert count_tokens(indices, pairs, costs, arguments["layout"]) == size
        empty = [not indices for indices in step]
        assert empty == sorted(empty) and sum(empty) < world  # at the end, so that rank 0 always has a pair


@settings(deadline=None)
@given(pairs=SCHEDULED, arguments=ARGUMENTS, noise=st.integers(0, 9))
def test_plan_is_a_pure_function(pairs: list[Pair], arguments: dict[str, Any], noise: int) -> None:
    plan = build_schedule(pairs, **arguments)
    random.seed(noise)
    before = random.getstate()
    assert build_schedule(tuple(pairs), **arguments) == plan
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
    whole = build_schedule(sized(*[10] * 18), max_steps=None, **arguments)
    assert len(whole) == 10
    assert build_schedule(sized(*[10] * 18), max_steps=7, **arguments) == whole[:7]


def test_seed_and_epoch_change_the_order() -> None:
    def orders(seed: int) -> list[list[int]]:
        plan = build_schedule(
            sized(*[3] * 50), "shared", batch_size=1, epochs=2, max_steps=None, max_tokens=16, world_size=1, seed=seed
        )
        order = [index for step in plan for index in pairs_of(step)]
        return [order[:50], order[50:]]

    first, second = orders(0), orders(1)
    assert first[0] != first[1]  # each epoch has an order of its own
    assert first[0] != second[0] and first[1] != second[1]
    assert first[0] != sorted(first[0])


def test_which_pairs_make_a_step_does_not_depend_on_memory_or_ranks() -> None:
    pairs = sized(*(7 * i % 90 + 10 for i in range(30)))

    def members(**changed: int) -> list[list[int]]:
        arguments = {"batch_size": 8, "epochs": 2, "max_tokens": 200, "world_size": 1, "seed": 5} | changed
        return [sorted(pairs_of(step)) for step in build_schedule(pairs, "shared", max_steps=None, **arguments)]

    assert members() == members(max_tokens=16) == members(max_tokens=9999) == members(world_size=3)


def test_pack_by_hand() -> None:
    """First fit, longest first; the pair of 120 is longer than the budget and goes alone."""
    costs = [60, 30, 120, 50, 40, 10]
    sorted_parts = parts(range(6), sized(*costs), costs, "shared", 100)
    assert sorted_parts == [([2], 120), ([0], 60), ([3], 50), ([4], 40), ([1], 30), ([5], 10)]
    assert pack(sorted_parts, "shared", 100) == [(2,), (0, 4), (3, 1, 5)]


def test_pack_padded_by_hand() -> None:
    """A second pair takes up as much as the longest of its forward: 2 * 50 and 2 * 30 fit, 2 * 60 does not."""
    costs = [60, 30, 120, 50, 40, 10]
    assert pack(parts(range(6), TWO * 3, costs, "padded", 100), "padded", 100) == [(2,), (0,), (3, 4), (1, 5)]


def test_ranks_get_equally_many_micro_batches_by_hand() -> None:
    def step(costs: list[int], world: int) -> list[tuple[int, ...]]:
        return build_schedule(
            sized(*costs), "shared", batch_size=9, epochs=1, max_steps=1, max_tokens=100, world_size=world, seed=0
        )[0]

    assert [len(indices) for indices in step([10] * 5, 1)] == [5]
    assert [len(indices) for indices in step([10] * 5, 2)] == [3, 2]  # the one bin is split
    assert [len(indices) for indices in step([100, 50, 50], 3)] == [1, 1, 1]
    assert [len(indices) for indices in step([100, 100, 100], 2)] == [1, 1, 1, 0]


# ---- layouts ------------------------------------------------------------------------------------------------------


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
    assert segments.parts == (((0, 0, 5),), ((0, 0, 3), (1, 0, 3)), ((2, 0, 4),), ((2, 0, 1), (3, 0, 1)))
    assert segments.uses.tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
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
    assert batch.lengths.tolist() == [1, 1, 2, 1]
    assert batch.edges.tolist() == [0, 1, 2, 3, 4] and batch.pieces == (
        (slice(0, 2), slice(0, 5), slice(0, 5), (1, 1)),
    )
    assert row_costs(HIDDEN, layout) == row_costs(TWO, layout)  # a forward computes them all


def test_sequences_that_run_alone_by_hand() -> None:
    """One row of them, for what is computed to be joined to; and each as the plainest forward there is."""
    batch, packed = collate(TWO, "alone"), collate(TWO, "packed")
    assert torch.equal(batch.input_ids, packed.input_ids) and torch.equal(batch.logit_positions, packed.logit_positions)
    singles = [padded([(pair.prompt, response)]) for pair in TWO for response in (pair.chosen, pair.rejected)]
    assert [each.input_ids.tolist() for each in batch.alone] == [each.input_ids.tolist() for each in singles]
    assert all(each.attention_mask is each.position_ids is None for each in batch.alone)
    assert pack([([1], 30), ([2], 20), ([0], 10)], "alone", 100) == [(1,), (2,), (0,)]  # as many forwards in each


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
    targets, before, places = [], [], []
    for prompt, response in responses:
        for place, token in enumerate(response.tolist()):
            if token >= 0:
                targets.append(token)
                before.append(model_input_ids(response)[place - 1] if place else prompt[-1])
                places.append(len(prompt) - 1 + place)
    assert batch.targets[batch.edges].tolist() == targets
    positions = batch.logit_positions[batch.edges]
    assert batch.input_ids.reshape(-1)[positions].tolist() == before
    if batch.position_ids is not None:
        assert batch.position_ids.reshape(-1)[positions].tolist() == places


@settings(deadline=None)
@given(pairs=PAIRS, layout=st.sampled_from(LAYOUTS))
def test_cost_is_the_size_of_the_forward(pairs: list[Pair], layout: Layout) -> None:
    """Exactly for a pair; several may share more than is counted, where a short sequence begins another one."""
    for pair in pairs:
        assert collate([pair], layout).input_ids.numel() == row_costs([pair], layout)[0]
    together = collate(pairs, layout).input_ids.numel()
    assert together <= count_tokens(range(len(pairs)), pairs, row_costs(pairs, layout), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_moves(layout: Layout) -> None:
    moved = collate(random_pairs(3), layout).to(torch.device("meta"))
    parts = [part for part in (moved, moved.segments, *moved.alone) if part is not None]
    found = [getattr(part, name) for part in parts for name in part.__slots__]
    tensors = [value for value in found if isinstance(value, Tensor)]
    assert len(tensors) == {"shared": 15, "packed": 11, "padded": 11, "alone": 11 + 6 * 10}[layout]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(moved, MicroBatch)
