"""Prompt trees: a row in which shared beginnings are computed once gives the numbers of single sequences."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo_cli.data.batching
import dpo_cli.data.trees
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import collate
from dpo_cli.data.pairs import Pair, Pairs, model_input_ids
from dpo_cli.data.schedule import build_schedule, count_tokens, row_costs
from dpo_cli.data.trees import branches, most_tokens, sequences_of, tree_tokens
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.models.moe import token_counts
from dpo_cli.training.loop import StopSignal
from dpo_cli.training.step import Trainer
from tests.helpers.families import FAMILIES, make
from tests.helpers.forests import forest, joined, kinds, tokens
from tests.models.test_families import check_equal, score

CPU = torch.device("cpu")
KINDS = list(kinds(np.random.default_rng(0)))
FORESTS = st.builds(
    forest, st.integers(0, 2**32), pairs=st.integers(1, 12), depth=st.integers(1, 6), branching=st.integers(1, 8)
)


@pytest.fixture(autouse=True)
def share_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even three common tokens make a branch."""
    monkeypatch.setattr(dpo_cli.data.trees, "MIN_SHARED", 3)


def distinct_prefixes(pairs: list[Pair]) -> int:
    """Tokens of the forest that shares every beginning."""
    return len({ids[: n + 1].tobytes() for ids in sequences_of(pairs) for n in range(len(ids))})


# ---- the numbers of single sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_single_sequences(family: str) -> None:
    """Values and gradients, of every kind of tree in one row."""
    rng = np.random.default_rng(1)
    pairs = [pair for kind in kinds(rng).values() for pair in kind]
    model = make(family)
    assert collate(pairs, "shared").input_ids.numel() < 0.6 * collate(pairs, "packed").input_ids.numel()
    check_equal(score(model, pairs, "shared"), score(model, pairs, None))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss", "gpt2"])
def test_random_forests_are_equal_to_single_sequences(family: str, seed: int) -> None:
    pairs, model = forest(seed, pairs=12, depth=6, branching=8 if seed else 2), make(family)
    pairs = [
        dataclasses.replace(p, prompt=p.prompt[:60], chosen=p.chosen[-30:], rejected=p.rejected[-30:]) for p in pairs
    ]
    check_equal(score(model, pairs, "shared"), score(model, pairs, None))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_the_head_do_not_change_the_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that two pieces share is predicted in both."""
    pairs, model = kinds(np.random.default_rng(2))[kind], make("llama")
    whole = score(model, pairs, "shared")
    monkeypatch.setattr("tests.models.test_families.collate", lambda *given: collate(*given, 1.0, 9))
    check_equal(score(model, pairs, "shared"), whole)
    pieces = collate(pairs, "shared", 1.0, 9).pieces
    assert len(pieces) > 1 or len(collate(pairs, "shared").targets) <= 9
    assert all(p.distinct.stop - p.distinct.start <= 9 or len(p.ranking_sizes) == 1 for p in pieces)


# ---- the forest ---------------------------------------------------------------------------------------------------


def test_branches_by_hand() -> None:
    rng = np.random.default_rng(0)
    s, a, b, c = (tokens(rng, n) for n in (10, 5, 6, 7))
    pairs = [Pair("1", s, a, b), Pair("2", s, a, c), Pair("3", joined(s, a), b, c), Pair("4", s[:2], a, b)]
    sequences = sequences_of(pairs)
    found = branches(pairs, sequences)
    assert [depth for _, depth in found] == [0, 10, 15, 10, 15, 15, 0, 2]
    assert all(np.array_equal(sequences[i][:n], sequences[j][:n]) for j, (i, n) in enumerate(found) if n)
    assert tree_tokens(pairs) == 21 + 7 + 13 + 2 + 5 + 6


def test_too_few_common_tokens_make_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except those of a pair's own prompt, and of a whole sequence, here ``s a``."""
    monkeypatch.setattr(dpo_cli.data.trees, "MIN_SHARED", 64)
    rng = np.random.default_rng(0)
    s, a, b = tokens(rng, 10), tokens(rng, 5), tokens(rng, 6)
    assert tree_tokens([Pair("1", s, joined(a, b), joined(a, a)), Pair("2", s, b, a)]) == 10 + 11 + 10 + 10 + 6
    assert tree_tokens([Pair("1", s, a, b), Pair("2", s, b, a)]) == 21


@settings(deadline=None, max_examples=60)
@given(pairs=FORESTS)
def test_every_response_has_its_own_sequence_and_nothing_else(pairs: list[Pair]) -> None:
    """The keys of a segment, in order, are a sequence; its queries are the last of them, and nobody else's."""
    batch = collate(pairs, "shared")
    segments, ids = batch.segments, batch.input_ids[0]
    assert segments is not None and batch.position_ids is not None
    queries, keys = segments.query_bounds.tolist(), segments.key_bounds.tolist()
    wanted = {ids.tobytes() for ids in sequences_of(pairs)}
    starts = [0, *np.cumsum([part[-1][2] for part in segments.parts]).tolist()]
    for s, part in enumerate(segments.parts):
        places = segments.key_index[keys[s] : keys[s + 1]]
        assert ids[places].int().numpy().tobytes() in wanted
        own = list(range(queries[s], queries[s + 1]))
        assert own and places.tolist()[-len(own) :] == own
        assert batch.position_ids[0, places].tolist() == list(range(len(places)))
        assert places.tolist() == [starts[n] + i for n, begin, end in part for i in range(begin, end)]
    assert queries[-1] == len(ids) == tree_tokens(pairs)
    assert segments.longest_query == max(np.diff(queries)) and segments.longest_key == max(np.diff(keys))
    assert segments.uses.sum() == sum(map(len, sequences_of(pairs)))
    assert len(ids) >= distinct_prefixes(pairs)
    assert row_costs(pairs, "shared") == [tree_tokens([pair]) for pair in pairs]


@settings(deadline=None, max_examples=60)
@given(pairs=FORESTS)
def test_every_token_with_loss_is_predicted_once_from_the_one_before(pairs: list[Pair]) -> None:
    batch = collate(pairs, "shared")
    targets, before, places = [], [], []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            whole = model_input_ids(joined(pair.prompt, response))
            for place in np.flatnonzero(response >= 0) + len(pair.prompt):
                targets.append(int(whole[place]))
                before.append(int(whole[place - 1]))
                places.append(int(place) - 1)
    positions = batch.logit_positions[batch.edges]
    assert batch.targets[batch.edges].tolist() == targets
    assert batch.input_ids[0, positions].tolist() == before
    assert batch.position_ids is not None and batch.position_ids[0, positions].tolist() == places
    assert len(batch.targets) <= batch.input_ids.numel()


def test_all_common_tokens_are_shared_where_one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_cli.data.trees, "MIN_SHARED", 0)
    for seed in range(20):
        pairs = forest(seed, pairs=10, depth=5, branching=3)
        assert collate(pairs, "shared").input_ids.numel() == distinct_prefixes(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_counts_a_token_once_per_sequence(kind: str) -> None:
    """As in padded rows, where it stands once per sequence."""
    pairs = kinds(np.random.default_rng(3))[kind]
    shared, padded = collate(pairs, "shared"), collate(pairs, "padded")

    def counts(batch: Any) -> dict[int, float]:
        found: dict[int, float] = {}
        for token, times in zip(batch.input_ids.flatten().tolist(), token_counts(batch).tolist(), strict=True):
            found[token] = found.get(token, 0.0) + times
        return {token: times for token, times in found.items() if times}

    assert counts(shared) == counts(padded)


# ---- which pairs lie in a forward ---------------------------------------------------------------------------------


def rows_with(system: int, count: int) -> list[Pair]:
    """Two families of rows, each with a system prompt of its own, shuffled."""
    ids = iter(np.random.default_rng(0).permutation(100_000).astype(np.int32))

    def own(number: int) -> Any:
        return joined([next(ids) for _ in range(number)])

    prompts = [own(system), own(system)]
    return [Pair(f"row {i}", joined(prompts[i * 7 % 2], own(9)), own(8), own(7)) for i in range(count)]


@pytest.mark.parametrize("max_tokens", [130, 200, 2000])
def test_what_shares_a_beginning_lies_in_one_forward(max_tokens: int) -> None:
    """A tree that exceeds the budget is cut, each part with its path again; nothing exceeds the budget."""
    pairs = rows_with(100, 16)
    how: dict[str, Any] = {"batch_size": 16, "epochs": 1, "max_steps": None, "world_size": 1, "seed": 0}
    (step,) = build_schedule(pairs, "shared", max_tokens=max_tokens, **how)
    sizes = [collate([pairs[i] for i in indices], "shared").input_ids.numel() for indices in step]
    assert max(sizes) <= max_tokens
    assert sizes == [count_tokens(indices, pairs, row_costs(pairs, "shared"), "shared") for indices in step]
    families = [{i * 7 % 2 for i in indices} for indices in step]
    assert max_tokens == 2000 or all(len(family) == 1 for family in families)
    assert sum(sizes) == 16 * 24 + {130: 16, 200: 4, 2000: 2}[max_tokens] * 100
    assert sorted(i for indices in step for i in indices) == list(range(16))


def test_scoring_sorts_the_data_by_beginnings() -> None:
    pairs = rows_with(100, 40)
    runner = ModelRunner(make("llama"), "shared", torch.float32, 580, CPU)
    sizes = []
    for indices, _ in runner.forwards(pairs, lambda places, batch: sizes.append(batch.input_ids.numel())):
        assert len({i * 7 % 2 for i in indices}) == 1
    assert sum(sizes) == 40 * 24 + 2 * 100  # each system prompt once


def test_forwards_are_larger_where_repeating_a_beginning_would_cost() -> None:
    """Room for six times what pairs share on average; not for ever more, nor where few pairs share."""
    assert most_tokens(rows_with(400, 40), 2048) == pytest.approx(6 * 400, rel=0.06)  # two rows share with none
    assert most_tokens(rows_with(9000, 40), 2048) == 6 * 2048
    assert most_tokens(rows_with(5, 40), 2048) == 2048
    assert most_tokens(rows_with(400, 1), 2048) == 2048


# ---- training -----------------------------------------------------------------------------------------------------


def losses_of(pairs: list[Pair], max_tokens: int, steps: int = 10) -> tuple[list[float], int]:
    """The loss of each step of a training, and the tokens of its forwards."""
    model, options = (
        make("llama"),
        TrainOptions(data=["-"], beta=0.2, batch_size=12, ld_alpha=0.7, max_tokens=max_tokens),
    )
    model.set_attn_implementation(PREFIX_SHARED)
    runner = ModelRunner(model, "shared", torch.float32, max_tokens, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    costs, reference = runner.costs(pairs), torch.linspace(-30, -20, 2 * len(pairs)).view(-1, 2)
    trainer = Trainer(runner, optimizer, Pairs(pairs), costs, reference, reference, options)
    order: dict[str, Any] = {"batch_size": 12, "epochs": 9, "max_steps": steps, "world_size": 1, "seed": 0}
    losses, tokens = [], 0
    for step in build_schedule(pairs, "shared", max_tokens=max_tokens, **order):
        micro_batches = trainer.micro_batches(step)
        tokens += sum(batch.input_ids.numel() for batch in micro_batches)
        metrics = trainer.step(step, micro_batches, 1e-3, StopSignal())
        assert metrics is not None
        losses.append(metrics["loss"])
    return losses, tokens


def test_a_training_is_that_of_pairs_that_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps, in one forward each or in many, where trees are cut."""
    rng = np.random.default_rng(5)
    pairs = [dataclasses.replace(pair, where=kind) for kind, made in kinds(rng).items() for pair in made]
    whole, few = losses_of(pairs, 4096)
    cut, more = losses_of(pairs, 90)
    monkeypatch.setattr(dpo_cli.data.trees, "related", lambda indices, pairs: [[i] for i in indices])
    for module in (dpo_cli.data.trees, dpo_cli.data.batching):
        monkeypatch.setattr(module, "branches", pairs_alone)
    apart, most = losses_of(pairs, 4096)
    assert few < more < most and few < 0.7 * most
    assert whole == pytest.approx(apart, abs=1e-5) and cut == pytest.approx(apart, abs=1e-5)
    assert abs(whole[-1] - whole[0]) > 0.01


def pairs_alone(pairs: list[Pair], sequences: list[Any]) -> list[tuple[int, int]]:
    """Each rejected sequence continues the chosen one, which begins a tree."""
    return [(place - 1, len(pairs[place // 2].prompt) if place % 2 else 0) for place in range(len(sequences))]
