"""Real trainings of a tiny model on data that is wrong in one way: each raises the finding for it and no other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.data.batching import MicroBatch, collate
from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.evaluation.diagnostics import Evidence, diagnose
from dpo_cli.evaluation.metrics import PairScores, Table
from dpo_cli.evaluation.statistics import intervals, length_bias
from dpo_cli.losses.objective import Objective
from dpo_cli.models.logprobs import ModelRunner, response_logps
from tests.helpers import make_model, sigmoid_loss

CPU = torch.device("cpu")
EOS, FIRST, WORDS = 2, 4, 64  # ids below FIRST are special


def words(rng: np.random.Generator, count: int, low: int = FIRST, high: int = WORDS) -> list[int]:
    return rng.integers(low, high, count).tolist()  # type: ignore[no-any-return]


def pair(place: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    """Of words; both responses end."""
    ids = (np.array(part, np.int32) for part in (prompt, [*chosen, EOS], [*rejected, EOS]))
    return Pair(f"rows.jsonl:{place + 1}", *ids)


def start(scale: float = 3.0) -> PreTrainedModel:
    return make_model(scale=scale, vocab_size=WORDS)


def scorer(model: PreTrainedModel) -> ModelRunner:
    return ModelRunner(model, "padded", torch.float32, 4096, CPU)


SFT = Objective({"sft": 1.0})


def backward(model: PreTrainedModel, batch: MicroBatch, objective: Objective, pairs: int) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch; its losses (P,) and log-probs (2P,)."""
    hidden, losses = scorer(model).body(batch), []
    for piece in hidden.head_pieces():
        losses.append(objective(piece))
        (losses[-1].sum() / pairs).backward()
    hidden.backward()
    return torch.cat(losses).detach(), torch.cat(hidden.full_logps, 1).flatten()


def pretrain(model: PreTrainedModel, pairs: Sequence[Pair], steps: int, lr: float) -> None:
    """Teach the model to answer like the chosen responses."""
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr, weight_decay=0), np.random.default_rng(0)
    for _ in range(steps):
        batch = collate([pairs[i] for i in rng.choice(len(pairs), 32)], "padded")
        backward(model, batch, SFT, 32)
        optimizer.step()
        optimizer.zero_grad()


def table(model: PreTrainedModel, pairs: Sequence[Pair]) -> Tensor:
    """Log-probs of all pairs: (P, 2) nats."""
    logps = torch.zeros(len(pairs), 2)
    runner = scorer(model)
    for places, scored in runner.forwards(pairs, lambda _, batch: (runner.token_logps(batch), batch.lengths)):
        logps[list(places)] = response_logps(*scored).view(2, -1).T
    return logps


@dataclass
class Trained:
    policy: PreTrainedModel
    reference: PreTrainedModel
    beta: float
    history: list[dict[str, Any]]

    def scores(self, pairs: Sequence[Pair]) -> PairScores:
        logps, ref_logps = (table(model, pairs).double().numpy() for model in (self.policy, self.reference))
        tokens = np.array([[count_loss_tokens(pair.chosen), count_loss_tokens(pair.rejected)] for pair in pairs], float)
        terms, exact = np.tile([1.0, 0.0], (len(pairs), 1)), distributions(self.policy, self.reference, pairs)
        where, objective = [p.where for p in pairs], Objective(beta=self.beta)
        return PairScores(where, tokens, logps, ref_logps, terms, objective=objective, distributions=exact)

    def found(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        scores = self.scores(pairs)
        return diagnose(Evidence(scores, intervals(scores), length_bias(scores), self.history))[0]


@torch.no_grad()
def distributions(policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair]) -> dict[str, Table]:
    """By plain forwards over all pairs at once: the model is tiny."""
    batch: MicroBatch = collate(pairs, "padded")
    p, q = (
        model.get_output_embeddings()(scorer(model).body(batch).values).double().log_softmax(-1)
        for model in (policy, reference)
    )
    changed = (p - q).gather(1, batch.targets[:, None])[:, 0]
    shifted = (changed.abs() > np.log(20)).double()
    entropies = [-(a.exp() * b).sum(-1) for a, b in ((p, p), (q, q), (p, q), (q, p))]
    each = [*entropies[:2], entropies[2] - entropies[0], entropies[3] - entropies[1], shifted]  # (N,) each
    sums = [torch.segment_reduce(x, "sum", lengths=batch.lengths, unsafe=True).view(-1, 2).numpy() for x in each]
    names = ("entropy", "ref_entropy", "kl", "reverse_kl", "shifted_tokens")
    return dict(zip(names, sums, strict=True))


def train(
    model: PreTrainedModel, pairs: Sequence[Pair], held_out: Sequence[Pair], steps: int, lr: float, beta: float
) -> Trained:
    """DPO by a plain loop, with the lines that metrics.jsonl would have; 16 pairs a step, some ten evaluations."""
    policy, ref_logps, ref_held_out = copy.deepcopy(model), table(model, pairs), table(model, held_out).T.reshape(-1)
    optimizer, rng = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0), np.random.default_rng(0)
    history: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            places = rng.choice(len(pairs), 16, replace=len(pairs) < 16)
            reference = ref_logps[places].T.reshape(-1)
            batch = replace(collate([pairs[i] for i in places], "padded"), weighted_ref_logps=reference)
            losses, logps = backward(policy, batch, Objective(beta=beta), 16)
            optimizer.step()
            optimizer.zero_grad()
            margins = beta * (logps - reference).view(2, -1).diff(dim=0).neg()[0]
            means = {"loss": losses.mean(), "rewards/margins": margins.mean()}
            history.append({"step": step, "learning_rate": lr} | {name: float(mean) for name, mean in means.items()})
        if step % (steps // 10) == 0:
            held_out_loss = sigmoid_loss(table(policy, held_out).T.reshape(-1), ref_held_out, beta).mean()
            history.append({"step": step, "eval_loss": float(held_out_loss)})
    return Trained(policy, model, beta, history)


# ---- data that is wrong in one way ------------------------------------------------------------------------------


def of_lengths(rng: np.random.Generator, count: int, longer: float) -> list[Pair]:
    """One word again and again, so that only lengths differ; of a share of the pairs the longer one is chosen."""
    found = []
    for place in range(count):
        short, long = sorted(int(length) for length in rng.choice(np.arange(2, 16), 2, replace=False))
        first, second = (long, short) if rng.random() < longer else (short, long)
        word = words(rng, 1)
        found.append(pair(place, word * 3, word * first, word * second))
    return found


def with_small_edits(rng: np.random.Generator, count: int) -> list[Pair]:
    """Counting on in steps of one to three, right and with one wrong word near the beginning."""
    found, size = [], WORDS - FIRST
    for place in range(count):
        begin, stride, at = rng.integers(0, size), rng.integers(1, 4), rng.integers(0, 3)
        sequence = (begin + stride * np.arange(14)) % size
        right, wrong = sequence[4:], sequence[4:].copy()
        wrong[at] = (wrong[at] + rng.integers(1, 3)) % size
        found.append(pair(place, *((FIRST + part).tolist() for part in (sequence[:4], right, wrong))))
    return found


def styled(
    rng: np.random.Generator, count: int, clear: float, flipped: float = 0.0
) -> tuple[list[Pair], npt.NDArray[np.bool_]]:
    """Most words of a good response are of the lower half, of a bad one of the upper; and which labels are flipped."""
    found, flips, middle = [], rng.random(count) < flipped, (FIRST + WORDS) // 2
    for place in range(count):
        length = int(rng.integers(8, 13))
        low, high = (rng.integers(FIRST + shift, middle + shift, (2, length)) for shift in (0, middle - FIRST))
        good, bad = (
            np.where(rng.random(length) < share, low[i], high[i]) for i, share in enumerate((clear, 1 - clear))
        )
        chosen, rejected = (bad, good) if flips[place] else (good, bad)
        found.append(pair(place, words(rng, 4), chosen.tolist(), rejected.tolist()))
    return found, flips


# ---- the findings -----------------------------------------------------------------------------------------------


def test_length_biased_data() -> None:
    rng = np.random.default_rng(0)
    data, unseen = of_lengths(rng, 1000, 0.9), of_lengths(rng, 300, 0.7)
    model = start()
    pretrain(model, of_lengths(rng, 1000, 0.5), 40, 3e-3)
    (finding,) = train(model, data, unseen, 40, 3e-4, beta=0.5).found(unseen)
    assert finding["kind"] == "length_bias" and "longer" in finding["title"]
    numbers = finding["numbers"]
    assert numbers["accuracy_chosen_longer"] > 0.9 and numbers["accuracy_chosen_shorter"] < 0.1
    assert numbers["correlation"] > 0.7


def test_displaced_chosen_responses() -> None:
    """The model counts well already, so that what is pushed down behind the wrong word is what follows a right one."""
    rng = np.random.default_rng(2)
    data, unseen = with_small_edits(rng, 1000), with_small_edits(rng, 300)
    model = start()
    pretrain(model, with_small_edits(rng, 1000), 200, 3e-3)
    trained = train(model, data, unseen, 15, 4e-4, beta=0.5)
    (finding,) = trained.found(unseen)
    numbers = finding["numbers"]
    assert finding["kind"] == "displaced_chosen"
    assert numbers["rejected"] < numbers["chosen"] < -1 and numbers["fell"] > 0.6
    assert trained.scores(unseen).wins.mean() > 0.75  # which looks like success


def test_over_trained_run() -> None:
    rng = np.random.default_rng(0)
    data, unseen = styled(rng, 32, 0.6)[0], styled(rng, 400, 0.6)[0]
    model = start()
    pretrain(model, styled(rng, 1000, 0.5)[0], 40, 3e-3)
    (finding,) = train(model, data, unseen, 100, 1e-3, beta=2).found(unseen)
    numbers = finding["numbers"]
    assert finding["kind"] == "over_optimised"
    assert 0 < numbers["best_step"] < 40 and numbers["last_step"] == 100
    assert numbers["last_loss"] > numbers["best_loss"] + numbers["noise"]
    assert f"step {numbers['best_step']:.0f}" in finding["title"]


def test_healthy_run_and_its_reference_have_no_finding() -> None:
    rng = np.random.default_rng(0)
    data, unseen = styled(rng, 1000, 0.7)[0], styled(rng, 300, 0.7)[0]
    model = start()
    pretrain(model, styled(rng, 1000, 0.5)[0], 40, 3e-3)
    trained = train(model, data, unseen, 40, 3e-4, beta=0.5)
    assert trained.scores(unseen).wins.mean() > 0.7 and trained.found(unseen) == []
    trained.policy, trained.history = trained.reference, []
    scores = trained.scores(unseen)
    assert not scores.margins.any() and trained.found(unseen) == []


def test_memorised_pairs_of_labels_that_say_nothing() -> None:
    """Also on few held-out pairs."""
    rng = np.random.default_rng(1)
    data, unseen = styled(rng, 24, 0.5)[0], styled(rng, 200, 0.5)[0]
    trained = train(start(), data, unseen, 60, 1e-3, beta=0.1)
    kinds = {finding["kind"] for finding in trained.found(unseen)}
    assert "memorised" in kinds and not kinds & {"at_chance", "over_optimised", "nothing_learned"}
    few = [unseen[place] for place in np.argsort(trained.scores(unseen).margins)[50:56]]
    (finding,) = trained.found(few)
    assert finding["kind"] == "memorised"
    assert finding["numbers"]["training_loss"] < 0.1 and finding["numbers"]["loss"] > 0.72


def test_labels_that_say_nothing_seen_once() -> None:
    rng = np.random.default_rng(1)
    data, unseen = styled(rng, 2000, 0.5)[0], styled(rng, 200, 0.5)[0]
    (finding,) = train(start(), data, unseen, 30, 3e-4, beta=0.5).found(unseen)
    assert finding["kind"] == "at_chance"


@pytest.mark.parametrize("held_out", [6, 100])
def test_a_learning_rate_too_low_to_learn(held_out: int) -> None:
    rng = np.random.default_rng(0)
    data, unseen = styled(rng, 100, 0.8)[0], styled(rng, held_out, 0.8)[0]
    (finding,) = train(start(), data, unseen, 10, 1e-6, beta=0.1).found(unseen)
    assert finding["kind"] == "nothing_learned" and "--lr 2e-05" in finding["advice"]
