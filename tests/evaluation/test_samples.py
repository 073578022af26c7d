"""Generation against plain forwards, and estimates of KL against a model all of whose responses can be written down.

That model knows 50 tokens and its responses have at most two: its EOS alone, or any other token and then any token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.data.pairs import Ids
from dpo_cli.evaluation.generation import as_pairs, by_prompt, generate, sequence_kl, text
from dpo_cli.evaluation.kl import score
from dpo_cli.evaluation.metrics import Table
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError
from tests.helpers import make_model
from tests.helpers.families import make

EOS = 2
V = 50
OTHERS = [token for token in range(V) if token != EOS]
RESPONSES = [[EOS], *([a, b] for a in OTHERS for b in range(V))]
BENT = {"top_k": 1, "temperature": 0.1, "repetition_penalty": 2.0, "min_new_tokens": 2, "suppress_tokens": [5, 6, 7],
        "do_sample": True, "no_repeat_ngram_size": 1, "bad_words_ids": [[8]], "sequence_bias": [[[9], 30.0]],
        "num_beams": 2, "max_new_tokens": 1, "forced_eos_token_id": 4, "eos_token_id": EOS, "use_cache": False,
        "stop_strings": "a"}  # fmt: skip


class NoTokenizer:
    eos_token_id = None


def tiny(seed: int, scale: float = 5.0) -> PreTrainedModel:
    return make_model(vocab_size=V, seed=seed, scale=scale)


def random_prompts(lengths: tuple[int, ...], vocabulary: int = V, seed: int = 0) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n).astype(np.int32) for n in lengths]


def runner_of(model: PreTrainedModel, max_tokens: int = 10_000, dtype: torch.dtype = torch.float32) -> ModelRunner:
    return ModelRunner(model, "padded", dtype, max_tokens, torch.device("cpu"))


def answer(model: PreTrainedModel, prompts: list[Ids], tokens: int = 2, **options: Any) -> list[list[Ids]]:
    """``options`` are of ``generate`` and of the runner."""
    runner = runner_of(model, **{name: options.pop(name) for name in ("max_tokens", "dtype") if name in options})
    return generate(runner, NoTokenizer(), prompts, model.config._attn_implementation, tokens, **options)


def lists(found: list[list[Ids]]) -> list[list[list[int]]]:
    return [[response.tolist() for response in mine] for mine in found]


# ---- generation -------------------------------------------------------------------------------------------------


def plainly(model: PreTrainedModel, prompt: Ids, tokens: int) -> list[int]:
    """The greedy response, a forward of the whole text a token."""
    ids = prompt.tolist()
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "opt", "bloom"])
def test_greedy_in_a_batch_is_greedy_alone(family: str) -> None:
    """Also where positions are learned, attention slides (over less than the padding), or is biased by distance."""
    model, prompts = make(family), random_prompts((13, 1, 20, 4, 9), 64)
    together = answer(model, prompts, 25)
    assert lists(together) == [[plainly(model, prompt, 25)] for prompt in prompts]


def test_the_seed_decides_the_samples_and_leaves_no_trace() -> None:
    model, prompts = tiny(0), random_prompts((3, 11, 5))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = answer(model, prompts, 9, copies=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert lists(answer(model, prompts, 9, copies=3, seed=1)) == lists(found)
    assert lists(answer(model, prompts, 9, copies=3, seed=2)) != lists(found)
    assert len({str(mine) for mine in found[0]}) == 3


def test_batches_keep_to_the_room_and_to_similar_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny(0), []
    inner = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **rest: shapes.append(tuple(ids.shape)) or inner(ids, **rest))
    answer(model, random_prompts((3, 30, 5, 28, 4, 60)), 10, max_tokens=80)
    assert shapes == [(1, 60), (2, 30), (3, 5)]


def test_what_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny(0), random_prompts((3, 11))

    def narrow(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", narrow)
    with pytest.raises(DpoError, match=r"2 answers \(11 \+ 9 tokens each\) do not fit.*--max-tokens"):
        answer(model, prompts, 9)
    monkeypatch.setattr(model, "generate", lambda *_, **__: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(UsageError, match="size"):  # any other error is not memory's
        answer(model, prompts, 9)


def test_a_model_that_cannot_generate_is_refused() -> None:
    """The cache of transformers raises where no layer attends."""
    model = make_model("lfm2", vocab_size=V, scale=3.0, layer_types=["conv", "conv"])
    with pytest.raises(UsageError, match=r"the model cannot generate answers: ValueError: .* leave out --samples"):
        answer(model, random_prompts((5,)), 4)


def test_the_model_is_left_as_it_was() -> None:
    model = make_model(attention_dropout=0.9)
    model.train()
    model.set_attn_implementation(PREFIX_SHARED)
    config = model.generation_config
    found = generate(runner_of(model), NoTokenizer(), random_prompts((4,)), "sdpa", 9)
    assert model.generation_config is config
    assert model.config._attn_implementation == PREFIX_SHARED
    with attention(model, "sdpa"):
        assert lists(found) == [[plainly(model.eval(), *random_prompts((4,)), 9)]]  # without dropout


def test_it_computes_in_the_precision_of_the_scoring() -> None:
    model, seen = tiny(0), set()
    model.lm_head.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    answer(model, random_prompts((4, 7)), 9, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}
    answer(model, random_prompts((4, 7)), 9)
    assert seen == {torch.bfloat16, torch.float32}


# ---- where a response ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["generation config", "config", "tokenizer"])
@pytest.mark.parametrize("ids", [7, [7, 11]])
def test_a_response_ends_with_the_first_eos_of_any(source: str, ids: Any) -> None:
    model, tokenizer = tiny(0), NoTokenizer()
    model.generation_config.eos_token_id = ids if source == "generation config" else None
    model.config.eos_token_id = {"generation config": 3, "config": ids}.get(source)
    tokenizer.eos_token_id = ids if source == "tokenizer" else 3
    prompts, known = random_prompts((4, 7)), np.atleast_1d(ids).tolist()
    found = [r for mine in generate(runner_of(model), tokenizer, prompts, "sdpa", 40, copies=30)
             for r in mine]  # fmt: skip
    assert {int(r[-1]) for r in found if len(r) < 40} == set(known)
    assert all(not set(r[:-1].tolist()) & set(known) for r in found)
    assert all(r[-1] in known or len(r) == 40 for r in found)
    assert any(3 in r.tolist() for r in found) and not all(len(r) < 40 for r in found)


def test_a_response_without_an_eos_goes_on_to_the_end() -> None:
    model = tiny(0)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    (found,) = answer(model, random_prompts((4,)), 30, copies=20)
    assert all(len(r) == 30 for r in found)
    assert EOS in np.concatenate(list(found))


def test_a_response_ends_where_the_context_does() -> None:
    model = make_model("gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, max_position_embeddings=16)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    found = answer(model, random_prompts((4, 13, 12)), 8)
    assert [len(r) for (r,) in found] == [8, 3, 4]


# ---- the distribution -------------------------------------------------------------------------------------------


class Enumerated(NamedTuple):
    """Of every response in ``RESPONSES``: log-probs under policy and reference, and the KLs of its tokens, summed."""

    logps: Table
    ref_logps: Table
    token_kl: Table

    @property
    def kl(self) -> float:
        return float(np.exp(self.logps) @ (self.logps - self.ref_logps))


def next_logps(model: PreTrainedModel, prompt: Ids) -> tuple[Table, Table]:
    """Of the first token (V,), and of the second by the first (V, V)."""
    ids = torch.tensor([[*prompt.tolist(), token] for token in range(V)])
    with torch.no_grad():
        found = model(ids).logits.double().log_softmax(-1).numpy()
    return found[0, -2], found[:, -1]


def enumerate_all(policy: PreTrainedModel, reference: PreTrainedModel, prompt: Ids) -> Enumerated:
    (p, ps), (q, qs) = next_logps(policy, prompt), next_logps(reference, prompt)

    def whole(first: Table, second: Table) -> Table:
        return np.concatenate([first[[EOS]], (first[:, None] + second)[OTHERS].reshape(-1)])

    kl, kls = float(np.exp(p) @ (p - q)), (np.exp(ps) * (ps - qs)).sum(-1)
    token_kl = np.concatenate([[kl], np.repeat(kl + kls[OTHERS], V)])
    return Enumerated(whole(p, ps), whole(q, qs), token_kl)


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return tiny(1)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny(0)


def test_samples_follow_the_models_own_distribution(policy: PreTrainedModel, tmp_path: Path) -> None:
    """Whatever its generation config says."""
    policy.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(BENT))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.generation_config.top_k == 1
    (prompt,) = random_prompts((4,))
    found = answer(model, [prompt], copies=6000, max_tokens=9000)[0]
    counted = dict.fromkeys(map(str, RESPONSES), 0)
    for response in found:
        counted[str(response.tolist())] += 1  # nothing but what was written down
    p = np.exp(enumerate_all(policy, policy, prompt).logps)
    assert p.sum() == pytest.approx(1)
    order = np.argsort(-p)
    bins = np.floor((p[order] * 6000).cumsum() / 8)  # about 8 expected in each, more in likely ones
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    seen, expected = (np.add.reduceat(x[order], starts) for x in (np.array([*counted.values()]), 6000 * p))
    assert len(seen) > 400 and chisquare(seen, expected).pvalue > 0.01
    assert lists(answer(model, [prompt], 20)) == [[plainly(policy, prompt, 20)]]


def test_the_chi_square_would_see_another_temperature(policy: PreTrainedModel) -> None:
    (prompt,) = random_prompts((4,))
    first, _ = next_logps(policy, prompt)
    found = answer(policy, [prompt], 1, copies=6000, max_tokens=9000)[0]
    seen = np.bincount([r[0] for r in found], minlength=V)

    def pvalue(temperature: float) -> float:
        p = np.exp(first / temperature)
        return float(chisquare(seen, 6000 * p / p.sum()).pvalue)

    assert pvalue(1) > 0.01 and pvalue(1.25) < 1e-4 and pvalue(0.8) < 1e-4


# ---- scoring and estimates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 4, 5])
def test_samples_are_scored_as_pairs(policy: PreTrainedModel, reference: PreTrainedModel, copies: int) -> None:
    prompts = random_prompts((4, 2, 6))
    found = answer(policy, prompts, copies=copies)
    pairs = as_pairs(prompts, found)
    assert [pair.where for pair in pairs][-1] == {1: "sample 3/1", 4: "sample 3/3", 5: "sample 3/5"}[copies]
    scored = []
    for model in (policy, reference):
        with attention(model, PREFIX_SHARED):
            scorer = ModelRunner(model, "shared", torch.float32, 40, torch.device("cpu"))
            table = score(scorer, pairs, Reporter(quiet=True).progress("test", 1))
        scored.append(by_prompt(table.logps(), copies))
    assert scored[0].shape == (3, copies)
    for place, prompt in enumerate(prompts):
        exact = enumerate_all(policy, reference, prompt)
        at = [RESPONSES.index(response.tolist()) for response in found[place]]
        np.testing.assert_allclose(scored[0][place], exact.logps[at], atol=1e-4)
        np.testing.assert_allclose(scored[1][place], exact.ref_logps[at], atol=1e-4)


def test_an_odd_sample_stands_beside_itself_and_counts_once() -> None:
    ids = [np.array([n], np.int32) for n in range(10, 16)]
    pairs = as_pairs(ids[:2], [list(ids[start : start + 3]) for start in (0, 3)])
    assert [(int(p.chosen[0]), int(p.rejected[0])) for p in pairs] == [(10, 11), (12, 12), (13, 14), (15, 15)]
    table = np.array([[p.chosen[0], p.rejected[0]] for p in pairs])
    assert by_prompt(table, 3).tolist() == [[10, 11, 12], [13, 14, 15]]


@pytest.fixture(scope="module")
def population(policy: PreTrainedModel, reference: PreTrainedModel) -> list[Enumerated]:
    return [enumerate_all(policy, reference, prompt) for prompt in random_prompts((4, 2, 6, 1) * 10, seed=3)]


def drawn(exact: Enumerated, copies: int, rng: np.random.Generator) -> Enumerated:
    p = np.exp(exact.logps)
    at = rng.choice(len(p), copies, p=p / p.sum())
    return Enumerated(*(values[at] for values in exact))


@pytest.mark.parametrize(("prompts", "copies"), [(1, 500), (60, 8)])
def test_intervals_cover_the_exact_kl(population: list[Enumerated], prompts: int, copies: int) -> None:
    """Mean over the prompts that are drawn from."""
    population = population[:1] if prompts == 1 else population
    rng, truth, covered = np.random.default_rng(0), float(np.mean([exact.kl for exact in population])), 0
    for _ in range(200):
        places = rng.integers(len(population), size=prompts) if len(population) > 1 else [0]
        found = sequence_kl(np.stack([drawn(population[place], copies, rng).token_kl for place in places]))
        low, high = found["token_kl_interval"]
        assert low <= found["token_kl"] <= high
        covered += low <= truth <= high
    assert 0.91 <= covered / 200 <= 0.99


def test_the_estimate_is_unbiased_and_narrower_than_the_log_ratio(population: list[Enumerated]) -> None:
    """Means over all responses, each with its probability."""
    exact = population[0]
    p, logratio = np.exp(exact.logps), exact.logps - exact.ref_logps
    assert p @ exact.token_kl == pytest.approx(exact.kl, abs=1e-6)
    assert p @ (exact.token_kl - exact.kl) ** 2 < 0.1 * (p @ (logratio - exact.kl) ** 2)


def test_from_generation_to_the_estimate(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    (prompt,) = random_prompts((4,))
    exact = enumerate_all(policy, reference, prompt)
    (found,) = answer(policy, [prompt], copies=2000, max_tokens=9000, seed=3)
    at = [RESPONSES.index(response.tolist()) for response in found]
    estimate = sequence_kl(exact.token_kl[at][None])
    assert (estimate["prompts"], estimate["samples"]) == (1, 2000)
    low, high = estimate["token_kl_interval"]
    assert low < exact.kl < high and high - low < 0.5 * exact.kl


def test_the_estimate_worked_by_hand() -> None:
    found = sequence_kl(np.array([[1.0, 3.0], [2.0, 6.0]]))
    assert found["token_kl"] == 3
    half = 12.706204736 * math.sqrt(2) / math.sqrt(2)  # means of prompts 2 and 4, Student's t of one degree of freedom
    assert found["token_kl_interval"] == pytest.approx([0, 3 + half])  # a KL is not below 0
    assert sequence_kl(np.zeros((2, 2)))["token_kl_interval"] == [0, 0]
    assert sequence_kl(np.ones((1, 1)))["token_kl_interval"] is None


def test_text_is_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array(tokenizer.encode("<|im_start|>user\nWhy?<|im_end|>\n"), np.int32)
    assert text(tokenizer, ids) == "user\nWhy?" and text(tokenizer, ids[:0]) == ""
