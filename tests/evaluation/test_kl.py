"""Exact divergences against truth: tiny models whose every continuation can be enumerated, and plain formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.data.pairs import Pair, Pairs, model_input_ids
from dpo_cli.data.schedule import Layout
from dpo_cli.evaluation.evaluator import TOP, Evaluator, shifted_tokens
from dpo_cli.evaluation.kl import FOLD, Stopped, TokenScores, compare, divergences, record, score
from dpo_cli.evaluation.metrics import PairScores
from dpo_cli.losses.objective import Objective
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError, UsageError
from tests.helpers import make_model, make_tokenizer, random_pairs

CPU = torch.device("cpu")
PROGRESS = Reporter(quiet=True).progress("test", 1)


def scorer_of(
    model: PreTrainedModel, layout: Layout = "shared", apart: bool = True, dtype: torch.dtype = torch.float32
) -> ModelRunner:
    model = copy.deepcopy(model)  # the one given keeps its own attention
    if layout == "shared":
        model.set_attn_implementation(PREFIX_SHARED)
    return ModelRunner(model, layout, dtype, 256, CPU, apart)


def compared(policy: ModelRunner, reference: ModelRunner, pairs: Pairs, folder: Path, policy_runs: bool) -> TokenScores:
    first, last = (reference, policy) if policy_runs else (policy, reference)
    return compare(last, record(first, pairs, folder, PROGRESS), pairs, PROGRESS, policy_runs=policy_runs)


def scores_between(policy: ModelRunner, reference: ModelRunner, pairs: Pairs, folder: Path) -> PairScores:
    return Evaluator(pairs, None, Objective()).scores(compared(policy, reference, pairs, folder, False))


# ---- everything enumerated --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 50, "max_position_embeddings": 64}
PROMPT = np.array([7, 3, 11], np.int32)


def next_logps(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Log-probs of all 50 next tokens, by the plainest forward there is, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    return logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def enumerated() -> tuple[PreTrainedModel, PreTrainedModel, Tensor, Tensor]:
    """Policy, reference, and the log-probs of all 50 x 50 responses of two tokens under each."""
    models = [make_model(seed=seed, **SMALL) for seed in (0, 1)]
    tables = []
    for model in models:
        first = next_logps(model, PROMPT)
        second = torch.stack([next_logps(model, [*PROMPT, token]) for token in range(50)])
        tables.append(first[:, None] + second)
    return models[0], models[1], tables[0], tables[1]


def all_responses() -> Pairs:
    """All 2,500 responses, two by two."""
    responses = [np.array(ids, np.int32) for ids in itertools.product(range(50), repeat=2)]
    return Pairs(Pair(f"row {i}", PROMPT, responses[i], responses[i + 1]) for i in range(0, 2500, 2))


def test_the_sum_of_token_kls_over_all_responses_is_the_sequence_kl(
    enumerated: tuple[PreTrainedModel, PreTrainedModel, Tensor, Tensor], tmp_path: Path
) -> None:
    """The chain rule: KL of whole responses = the policy's mean of the KLs of next tokens, summed along a response."""
    policy, reference, p, q = enumerated
    exact = float((p.exp() * (p - q)).sum())
    pairs = all_responses()
    found = compared(scorer_of(policy), scorer_of(reference), pairs, tmp_path, False)
    kl = torch.from_numpy(found.distributions["kl"].reshape(-1))  # of the responses in their order
    assert float((p.exp().flatten() * kl).sum()) == pytest.approx(exact, abs=1e-5)
    reverse = torch.from_numpy(found.distributions["reverse_kl"].reshape(-1))
    assert float((q.exp().flatten() * reverse).sum()) == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-5)
    assert exact > 0.1


def test_token_kls_and_entropies_are_those_enumerated(
    enumerated: tuple[PreTrainedModel, PreTrainedModel, Tensor, Tensor], tmp_path: Path
) -> None:
    policy, reference, _, _ = enumerated
    pairs = Pairs([Pair("row", PROMPT, np.array([4, 9], np.int32), np.array([30], np.int32))])
    found = compared(scorer_of(policy), scorer_of(reference), pairs, tmp_path, False)
    contexts, targets = [[*PROMPT], [*PROMPT, 4], [*PROMPT]], [4, 9, 30]
    expected = []
    for context, target in zip(contexts, targets, strict=True):
        p, q = next_logps(policy, context), next_logps(reference, context)
        kls = [(p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()]
        expected.append([p[target], q[target], -(p.exp() * p).sum(), -(q.exp() * q).sum(), *kls])
    rows = found.tokens
    assert torch.allclose(rows.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    for name, column in (("entropy", 2), ("ref_entropy", 3), ("kl", 4), ("reverse_kl", 5)):
        sums = [float(rows[:2, column].sum()), float(rows[2, column])]
        assert found.distributions[name][0] == pytest.approx(sums, abs=1e-5)


def test_the_change_of_cross_entropy_is_the_change_of_kl(
    enumerated: tuple[PreTrainedModel, PreTrainedModel, Tensor, Tensor], tmp_path: Path
) -> None:
    """H(data, policy) - H(data, reference) = KL(data || policy) - KL(data || reference): its entropy cancels."""
    policy, reference, p, q = enumerated
    chosen = np.random.default_rng(0).integers(0, 50, (40, 2))
    chosen[20:] = chosen[:20]  # so that the data has an entropy of its own
    chosen[30:] = chosen[:10]
    other = np.array([1, 2], np.int32)
    pairs = Pairs(Pair(f"row {i}", PROMPT, ids.astype(np.int32), other) for i, ids in enumerate(chosen))
    found = scores_between(scorer_of(policy), scorer_of(reference), pairs, tmp_path).means()
    share = torch.zeros(50, 50, dtype=torch.float64)
    for first, second in chosen:
        share[first, second] += 1 / len(chosen)
    kls = [float(torch.special.xlogy(share, share).sum() - (share * log).sum()) for log in (p, q)]
    assert 2 * found["delta_kl_data/chosen"] == pytest.approx(kls[0] - kls[1], abs=1e-5)  # two tokens a response
    assert abs(kls[0] - kls[1]) > 0.05


# ---- the same in every layout, whichever model runs last --------------------------------------------------------


def pairs_with_silent_tokens() -> Pairs:
    """Some responses have tokens that carry no loss."""
    pairs = random_pairs(23, seed=3)
    for pair in pairs[::3]:
        pair.chosen[: len(pair.chosen) // 2] = ~pair.chosen[: len(pair.chosen) // 2]
    return Pairs(pairs)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "alone"])
def test_every_layout_gives_the_same_either_way_round(layout: Layout, apart: bool, tmp_path: Path) -> None:
    policy, reference = (make_model(seed=seed) for seed in (0, 1))
    pairs = pairs_with_silent_tokens()
    expected = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, model_input_ids(response)]).astype(np.int64))[None]
            with torch.no_grad():
                logits = [model(input_ids=ids).logits[0, len(pair.prompt) - 1 : -1] for model in (policy, reference)]
            kept = torch.from_numpy(response >= 0)
            expected.append(divergences(*(each[kept] for each in logits), ids[0, len(pair.prompt) :][kept]))
    scorers = [scorer_of(model, layout, apart) for model in (policy, reference)]
    for policy_runs in (False, True):
        found = compared(*scorers, pairs, tmp_path, policy_runs)
        assert torch.allclose(found.tokens, torch.cat(expected), rtol=0, atol=2e-5)
        for column, scorer in enumerate(scorers):  # to the bit: step 0 is exactly ln 2
            assert np.array_equal(found.logps(column), score(scorer, pairs, PROGRESS).logps())


def test_in_bfloat16_the_log_probs_are_those_of_scoring_too(tmp_path: Path) -> None:
    scorers = [scorer_of(make_model(seed=seed), dtype=torch.bfloat16) for seed in (0, 1)]
    pairs = pairs_with_silent_tokens()
    recorded = record(scorers[0], pairs, tmp_path, PROGRESS)
    assert recorded.states.dtype == torch.bfloat16
    found = compare(scorers[1], recorded, pairs, PROGRESS, policy_runs=True)
    plain = [score(scorer, pairs, PROGRESS).logps() for scorer in scorers]
    assert np.array_equal(found.logps(1), plain[0]) and np.array_equal(found.logps(), plain[1])


def test_a_model_against_itself_is_zero_and_needs_no_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, pairs = scorer_of(make_model()), pairs_with_silent_tokens()
    recorded = record(scorer, pairs, tmp_path, PROGRESS)
    monkeypatch.setattr(ModelRunner, "body", lambda *_: pytest.fail("the body ran"))
    found = compare(scorer, recorded, pairs, PROGRESS, policy_runs=True, same=True)
    assert np.array_equal(found.logps(), found.logps(1))
    exact = found.distributions
    assert not exact["kl"].any() and not exact["reverse_kl"].any() and not exact["shifted_tokens"].any()
    assert np.array_equal(exact["entropy"], exact["ref_entropy"]) and (exact["entropy"] > 0).all()


def test_memory_that_runs_out_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorers, pairs = [scorer_of(make_model(seed=seed)) for seed in (0, 1)], pairs_with_silent_tokens()
    whole = compared(*scorers, pairs, tmp_path, True)
    body, failed = ModelRunner.body, []

    def limited(scorer: ModelRunner, batch: object) -> object:
        if batch.input_ids.numel() > 100:  # type: ignore[attr-defined]
            failed.append(batch)
            raise torch.OutOfMemoryError
        return body(scorer, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelRunner, "body", limited)
    found = compared(*scorers, pairs, tmp_path, True)
    assert failed and np.allclose(found.logps(), whole.logps(), rtol=0, atol=1e-4)
    assert np.allclose(found.distributions["kl"], whole.distributions["kl"], atol=1e-5)


# ---- shifted tokens ---------------------------------------------------------------------------------------------


def test_shifted_tokens_are_those_with_the_largest_changes(tmp_path: Path) -> None:
    policy, reference = make_model(seed=0, scale=14.0), make_model(seed=1, scale=14.0)
    pairs = Pairs(random_pairs(40, seed=1))
    found = compared(scorer_of(policy), scorer_of(reference), pairs, tmp_path, False)
    drift = shifted_tokens(found, pairs, make_tokenizer())
    every = np.sort(found.logratios.numpy())
    changes = [token["logp"] - token["ref_logp"] for token in drift["top"]]
    assert changes == pytest.approx([*every[::-1][:TOP], *every[:TOP]], abs=1e-5)
    far = int((np.abs(every) > math.log(FOLD)).sum())
    assert found.distributions["shifted_tokens"].sum() == drift["shifted"] == far > 2 * TOP
    assert drift["share"] == far / len(every)
    for token in drift["top"]:
        pair = next(pair for pair in pairs if pair.where == token["row"])
        text = make_tokenizer().decode(int(getattr(pair, token["response"])[token["place"]]))
        assert token["token"] == text


# ---- files ------------------------------------------------------------------------------------------------------


def test_hidden_states_are_in_the_order_of_the_pairs_in_a_file_without_a_name(tmp_path: Path) -> None:
    runner, pairs = scorer_of(make_model()), pairs_with_silent_tokens()
    recorded = record(runner, pairs, tmp_path, PROGRESS)
    assert not list(tmp_path.iterdir())
    alone = [record(runner, pairs.select([place]), tmp_path, PROGRESS) for place in range(len(pairs))]
    expected = torch.cat([each.states for each in alone])
    assert torch.allclose(recorded.states, expected, rtol=0, atol=1e-4)


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("dpo_cli.evaluation.kl.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(NotWrittenError, match="--kl none"):
        record(scorer_of(make_model()), pairs_with_silent_tokens(), tmp_path, PROGRESS)


def test_other_vocabularies_have_no_kl(tmp_path: Path) -> None:
    scorers = [scorer_of(make_model(vocab_size=size)) for size in (384, 400)]
    with pytest.raises(UsageError, match="have vocabularies of"):
        compared(*scorers, Pairs(random_pairs(3)), tmp_path, False)


@pytest.mark.parametrize("after", [1, 2])
def test_it_stops_when_asked(after: int, tmp_path: Path) -> None:
    scorer, pairs, asked = scorer_of(make_model()), Pairs(random_pairs(60)), []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > after

    with pytest.raises(Stopped):
        score(scorer, pairs, PROGRESS, stopped)
    assert len(asked) == after + 1
