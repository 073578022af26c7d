"""Log-probabilities of responses, scoring of many pairs, and the gradient of a step."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dpo_cli.models.logprobs
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import collate, length_weights, padded
from dpo_cli.data.pairs import Pair
from dpo_cli.data.schedule import Layout, build_schedule
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner, likelihoods, response_logps
from tests.helpers import make_model, random_pairs, sigmoid_loss, token_logps
from tests.helpers.layouts import CPU, LAYOUTS, own
from tests.helpers.steps import make_trainer, relative, take_step

HEADS: dict[str, dict[str, Any]] = {  # heads that are more than one matrix product
    "llama": {},
    "phi": {"num_key_value_heads": 4},  # bias
    "cohere2": {"logit_scale": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0},  # its attention is soft-capped too, so it has no shared layout
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # tied to the embedding
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


def score_alone(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """(P, 2) nats, chosen and rejected, in a forward a response."""
    batches = [padded([(pair.prompt, r)]) for pair in pairs for r in (pair.chosen, pair.rejected)]
    return torch.stack([token_logps(model, batch, torch.float32).sum() for batch in batches]).view(-1, 2)


# ---- one forward --------------------------------------------------------------------------------------------------


HEADED = [(family, layout) for family in HEADS for layout in LAYOUTS if (family, layout) != ("gemma2", "shared")]


@pytest.mark.parametrize(("family", "layout"), HEADED)
def test_token_logps_by_hand(family: str, layout: Layout) -> None:
    """Log-softmax of the model's logits at the token before, sequence by sequence."""
    model, pairs = make_model(family, **HEADS[family]), random_pairs(4)
    wanted = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([*pair.prompt, *response])
            log_probs = model(ids[None]).logits[0].log_softmax(-1)  # (T, V)
            wanted += [log_probs[place - 1, ids[place]] for place in range(len(pair.prompt), len(ids))]
    with attention(model, own(layout)):
        got = token_logps(model, collate(pairs, layout), torch.float32)
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=0)
    assert got.std() > 0.1  # far from the uniform -log V, which any mistake would give too


def test_tokens_beyond_the_shorter_response_weigh_less_by_hand() -> None:
    """Two pairs, of 1 and 3 tokens and of 2 and 2: of the first rejected one the second and third token."""
    lengths = torch.tensor([1, 3, 2, 2])
    assert length_weights(lengths, 0.5).tolist() == [1, 1, 0.5, 0.5, 1, 1, 1, 1]
    assert length_weights(lengths, 1.0).tolist() == [1] * 8
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    assert response_logps(logps * length_weights(lengths, 0.5), lengths).tolist() == [-1, -11, -2 - 0.5 * 7, -15]


def test_weights_by_likelihood() -> None:
    """Mean over the tokens of a response of log p - log sum p^2, exponentiated, both responses multiplied (WPO)."""
    logits = torch.randn(130, 7, generator=torch.Generator().manual_seed(0))
    lengths, targets = torch.tensor([100, 30]), torch.arange(130) % 7
    log_p = logits.log_softmax(-1)
    token_logps = log_p.gather(1, targets[:, None])[:, 0]
    aligned = (token_logps - log_p.exp().square().sum(-1).log()).split([100, 30])
    wanted = (aligned[0].mean() + aligned[1].mean()).exp()
    assert likelihoods(token_logps, logits, torch.arange(130), lengths).tolist() == pytest.approx(
        [float(wanted)], rel=1e-5
    )


def test_response_logps_are_sums_chosen_first() -> None:
    batch = collate(random_pairs(3), "shared")
    lengths = batch.lengths.tolist()  # chosen, rejected, chosen, …
    numbered = torch.arange(6.0).repeat_interleave(batch.lengths)  # every token carries its response's number
    wanted = [number * lengths[number] for number in (0, 2, 4, 1, 3, 5)]
    assert response_logps(numbered, batch.lengths).tolist() == wanted


def test_sums_of_long_responses_are_exact() -> None:
    """Rounded once: added up one by one in float32, thousands of tokens would be off by more than noise."""
    ids = np.ones(2000, dtype=np.int32)
    batch = collate([Pair("long", ids[:1], ids, ids[:1500])], "shared")
    tokens = torch.empty(3500).uniform_(-9, 0, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([part.double().sum() for part in tokens.split([2000, 1500])])
    torch.testing.assert_close(response_logps(tokens, batch.lengths).double(), exact, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_float32_under_bfloat16_compute(model: PreTrainedModel, layout: Layout) -> None:
    batch = collate(random_pairs(6), layout)
    with attention(model, own(layout)):
        exact, coarse = (token_logps(model, batch, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert coarse.dtype == response_logps(coarse, batch.lengths).dtype == torch.float32
    assert 1e-4 < (coarse - exact).abs().max() < 0.2  # computed coarsely, and still the same numbers
    assert (coarse != coarse.bfloat16().float()).any()  # the softmax is not rounded to bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bfloat16_policy_equals_its_reference_exactly(model: PreTrainedModel) -> None:
    """The same forward gives the same bits, so that the loss at step 0 is ln 2."""
    batch = collate(random_pairs(6), "shared")
    with attention(model, PREFIX_SHARED):
        with torch.no_grad():
            reference = token_logps(model, batch, torch.bfloat16)
        assert torch.equal(token_logps(model, batch, torch.bfloat16), reference)


# ---- scoring many pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_covers_each_pair_once(model: PreTrainedModel, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_cli.models.logprobs, "WINDOW", 8)  # 30 pairs are several windows
    pairs = random_pairs(30)
    scorer = ModelRunner(model, layout, torch.float32, 160, CPU)
    places: list[int] = []
    table = torch.full((len(pairs), 2), torch.nan)
    model.train()  # score must not leave dropout on
    with attention(model, own(layout)):
        for indices, tokens in scorer.forwards(pairs, lambda _, batch: scorer.token_logps(batch)):
            assert not model.training and not tokens.requires_grad
            assert collate([pairs[i] for i in indices], layout).input_ids.numel() <= 160 or len(indices) == 1
            lengths = [len(r) for i in indices for r in (pairs[i].chosen, pairs[i].rejected)]
            table[list(indices)] = torch.stack([part.sum() for part in tokens.split(lengths)]).view(-1, 2)
            places += indices
    assert sorted(places) == list(range(30))
    with torch.no_grad():
        torch.testing.assert_close(table, score_alone(model, pairs), atol=1e-4, rtol=0)


def test_score_of_nothing(model: PreTrainedModel) -> None:
    assert list(ModelRunner(model, "shared", torch.float32, 64, CPU).forwards([], lambda *_: 0)) == []


# ---- the gradient of a step ---------------------------------------------------------------------------------------


PAIRS = random_pairs(64, longest=40)


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel) -> Tensor:
    """A reference apart from the policy, so that every pair has a weight of its own."""
    with torch.no_grad():
        return score_alone(model, PAIRS) + torch.linspace(-20, 20, 2 * len(PAIRS)).view(-1, 2)


def step_gradients(
    model: PreTrainedModel, reference: Tensor, layout: Layout, max_tokens: int
) -> tuple[list[Tensor], dict[str, float], list[tuple[int, ...]]]:
    """Gradients of one step over all pairs as the optimizer sees them, the step's metrics and its micro-batches."""
    options = TrainOptions(data=["-"], beta=0.1, label_smoothing=0.05, max_grad_norm=0.0, max_tokens=max_tokens)
    cut: dict[str, Any] = {"batch_size": len(PAIRS), "epochs": 1, "max_steps": 1, "world_size": 1, "seed": 0}
    (step,) = build_schedule(PAIRS, layout, max_tokens=max_tokens, **cut)
    runner = ModelRunner(model, layout, torch.float32, max_tokens, CPU)
    trainer, optimizer = make_trainer(runner, PAIRS, options, reference)
    with attention(model, own(layout)):
        values = take_step(trainer, step)
    assert optimizer.param_groups == [{"lr": 1e-3}]
    return optimizer.gradients, values, step


@pytest.fixture(scope="module")
def by_hand(model: PreTrainedModel, reference: Tensor) -> list[Tensor]:
    """Gradient of the mean loss over all pairs, each response in a forward of its own."""
    model.zero_grad()
    model.train()
    ref_logps = reference.T.reshape(-1)
    sigmoid_loss(score_alone(model, PAIRS).T.reshape(-1), ref_logps, 0.1, 0.05).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "alone"])  # whose forwards never grow
def test_gradient_does_not_depend_on_max_tokens(
    model: PreTrainedModel, reference: Tensor, by_hand: list[Tensor], layout: Layout
) -> None:
    many, many_values, cut = step_gradients(model, reference, layout, 256)
    few, few_values, whole = step_gradients(model, reference, layout, 4096)
    assert len(cut) >= 15 and len(whole) <= 3
    assert len({len(indices) for indices in cut}) >= 3  # a mean of micro-batch means would be far off
    assert max(relative(many, few)) < 1e-5
    assert max(relative(many, by_hand)) < 1e-5
    assert many_values == pytest.approx(few_values, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in by_hand]).norm().item()
    assert many_values["grad_norm"] == pytest.approx(norm, rel=1e-5)
